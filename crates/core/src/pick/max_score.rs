//! `max-score-picker`: the highest total; ties in random order.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Parameters, best_first};
use crate::Rng;
use crate::settings::Settings;
use crate::stage::{Picker, Plugin, View};

/// `max-score-picker`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(from = "Parameters")]
pub struct MaxScore {
    parameters: Parameters,
    /// As many as may be tried, once that is known.
    tried_max: Option<usize>,
}

impl From<Parameters> for MaxScore {
    fn from(parameters: Parameters) -> MaxScore {
        MaxScore { parameters, tried_max: None }
    }
}

impl Plugin for MaxScore {
    fn prepare(&mut self, settings: &Settings) {
        self.tried_max = Some(self.parameters.tried_max(settings));
    }
}

impl Picker for MaxScore {
    fn endpoints_max(&self) -> usize {
        self.parameters.endpoints_max()
    }

    fn pick(&mut self, _view: &View<'_>, totals: &[f64], rng: &mut Rng, order: &mut Vec<usize>) {
        order.extend(0..totals.len());
        rng.shuffle(order);
        best_first(order, totals, self.tried_max.unwrap_or(usize::MAX));
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
