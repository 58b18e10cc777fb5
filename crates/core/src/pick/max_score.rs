//! `max-score-picker`: the highest total; ties in random order.

use schemars::JsonSchema;
use serde::Deserialize;

use super::Parameters;
use crate::Rng;
use crate::stage::{Picker, Plugin, View};

/// `max-score-picker`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct MaxScore(Parameters);

impl Plugin for MaxScore {}

impl Picker for MaxScore {
    fn endpoints_max(&self) -> usize {
        self.0.endpoints_max()
    }

    fn pick(&mut self, _view: &View<'_>, totals: &[f64], rng: &mut Rng, order: &mut Vec<usize>) {
        order.extend(0..totals.len());
        rng.shuffle(order);
        order.sort_by(|a, b| totals[*b].total_cmp(&totals[*a]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn the_highest_wins_and_ties_are_spread() {
        let fixture = Fixture::new(4);
        let mut first = [0u32; 4];
        for seed in 0..1000 {
            let order = fixture.pick(&mut MaxScore::default(), &[0.5, 1.0, 0.1, 1.0], seed);
            assert_eq!(order.len(), 4);
            assert_eq!(order[2..], [0, 2]);
            first[order[0]] += 1;
        }
        assert!(first[1] > 400 && first[3] > 400 && first[1] + first[3] == 1000, "{first:?}");
    }
}
