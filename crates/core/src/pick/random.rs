//! `random-picker`: uniform, whatever the scores.

use schemars::JsonSchema;
use serde::Deserialize;

use super::Parameters;
use crate::Rng;
use crate::stage::{Picker, Plugin, View};

/// `random-picker`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Random(Parameters);

impl Plugin for Random {}

impl Picker for Random {
    fn endpoints_max(&self) -> usize {
        self.0.endpoints_max()
    }

    fn pick(&mut self, _view: &View<'_>, totals: &[f64], rng: &mut Rng, order: &mut Vec<usize>) {
        order.extend(0..totals.len());
        rng.shuffle(order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn scores_do_not_matter() {
        let fixture = Fixture::new(3);
        let mut first = [0u32; 3];
        for seed in 0..3000 {
            first[fixture.pick(&mut Random::default(), &[0.0, 9.0, 1.0], seed)[0]] += 1;
        }
        assert!(first.iter().all(|n| (850..1150).contains(n)), "{first:?}");
    }
}
