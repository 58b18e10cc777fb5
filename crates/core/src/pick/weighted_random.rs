//! `weighted-random-picker`: random, in proportion to the totals.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Parameters, best_first};
use crate::Rng;
use crate::settings::Settings;
use crate::stage::{Picker, Plugin, View};

/// `weighted-random-picker`: sampling without replacement by keys `U^(1/score)` (Efraimidis and
/// Spirakis, A-Res). Endpoints of score 0 come last, in random order.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(from = "Parameters")]
pub struct WeightedRandom {
    parameters: Parameters,
    keys: Vec<f64>,
    /// As many as may be tried, once that is known.
    tried_max: Option<usize>,
}

impl From<Parameters> for WeightedRandom {
    fn from(parameters: Parameters) -> WeightedRandom {
        WeightedRandom { parameters, keys: Vec::new(), tried_max: None }
    }
}

impl Plugin for WeightedRandom {
    fn prepare(&mut self, settings: &Settings) {
        self.tried_max = Some(self.parameters.tried_max(settings));
    }
}

impl Picker for WeightedRandom {
    fn endpoints_max(&self) -> usize {
        self.parameters.endpoints_max()
    }

    fn pick(&mut self, _view: &View<'_>, totals: &[f64], rng: &mut Rng, order: &mut Vec<usize>) {
        order.extend(0..totals.len());
        rng.shuffle(order);
        self.keys.clear();
        // ln(U)/score has the order of U^(1/score) and does not underflow for small scores.
        self.keys.extend(totals.iter().map(|total| {
            let u = 1.0 - rng.next_f64();
            if *total > 0.0 { u.ln() / total } else { f64::NEG_INFINITY }
        }));
        best_first(order, &self.keys, self.tried_max.unwrap_or(usize::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn shares(totals: &[f64]) -> Vec<u32> {
        let fixture = Fixture::new(totals.len());
        let mut first = vec![0u32; totals.len()];
        for seed in 0..6000 {
            first[fixture.pick(&mut WeightedRandom::default(), totals, seed)[0]] += 1;
        }
        first
    }

    #[test]
    fn shares_follow_the_scores_and_zeros_are_uniform() {
        let first = shares(&[1.0, 2.0, 3.0, 0.0]);
        assert!((800..1200).contains(&first[0]), "{first:?}");
        assert!((1800..2200).contains(&first[1]), "{first:?}");
        assert!((2800..3200).contains(&first[2]), "{first:?}");
        assert_eq!(first[3], 0);
        let first = shares(&[0.0, 0.0]);
        assert!(first.iter().all(|n| (2800..3200).contains(n)), "{first:?}");
        let first = shares(&[1e-300, 0.0]);
        assert_eq!(first[1], 0);
    }
}
