//! Which of the rated endpoints serves the request? One file per plugin.
//!
//! Every picker lists all candidates, the best first: the first is chosen, the next are for
//! retries. Behind as many as can be tried the order means nothing.

mod max_score;
mod random;
mod round_robin;
mod weighted_random;

pub use max_score::MaxScore;
pub use random::Random;
pub use round_robin::RoundRobin;
pub use weighted_random::WeightedRandom;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::settings::Settings;

/// Parameters that llm-d's pickers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Parameters {
    /// How many endpoints the proxy is offered, the best first, to fall back on; 0 and less mean
    /// 1.
    max_num_of_endpoints: i64,
}

impl Default for Parameters {
    fn default() -> Parameters {
        Parameters { max_num_of_endpoints: 1 }
    }
}

impl Parameters {
    fn endpoints_max(self) -> usize {
        usize::try_from(self.max_num_of_endpoints).unwrap_or(1).max(1)
    }

    /// How many candidates may be tried.
    fn tried_max(self, settings: &Settings) -> usize {
        let retries = usize::try_from(settings.retries_max).unwrap_or(usize::MAX);
        self.endpoints_max().max(retries.saturating_add(1))
    }
}

/// Brings the `tried_max` candidates with the highest keys to the front, the highest first, of
/// equal ones the one that stands first; the others keep their order. As a stable sort would, in
/// one pass for each and in no memory of its own.
fn best_first(order: &mut [usize], keys: &[f64], tried_max: usize) {
    for from in 0..tried_max.min(order.len()) {
        let mut best = from;
        for at in from + 1..order.len() {
            if keys[order[at]].total_cmp(&keys[order[best]]).is_gt() {
                best = at;
            }
        }
        order[from..=best].rotate_right(1);
    }
}

#[cfg(test)]
mod tests {
    use crate::Rng;
    use crate::fixture::{Fixture, every_spec};

    #[test]
    fn every_candidate_is_offered_once() {
        for seed in 0..300 {
            let mut rng = Rng::seeded(seed);
            for n in 1..6 {
                let fixture = Fixture::new(n);
                let total = |_| match rng.below(4) {
                    0 => 0.0,
                    1 => 1.0,
                    _ => rng.next_f64() * 3.0,
                };
                let totals: Vec<f64> = (0..n).map(total).collect();
                for spec in every_spec() {
                    let Some(mut picker) = spec.parts().picker else { continue };
                    assert!(picker.endpoints_max() > 0);
                    let mut order = fixture.pick(&mut *picker, &totals, seed);
                    order.sort_unstable();
                    assert!(order.iter().copied().eq(0..n), "seed {seed} {spec:?} {totals:?}");
                }
            }
        }
    }

    #[test]
    fn the_best_come_first_as_a_stable_sort_brings_them() {
        for seed in 0..200 {
            let mut rng = Rng::seeded(seed);
            let n = rng.below(40);
            let keys: Vec<f64> = (0..n).map(|_| rng.below(6) as f64 - 2.0).collect();
            let mut order: Vec<usize> = (0..n).collect();
            rng.shuffle(&mut order);
            let mut sorted = order.clone();
            sorted.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
            let tried = rng.below(8);
            super::best_first(&mut order, &keys, tried);
            assert_eq!(order[..tried.min(n)], sorted[..tried.min(n)], "seed {seed}");
            order.sort_unstable();
            assert!(order.into_iter().eq(0..n), "seed {seed}");
        }
    }

    #[test]
    fn less_than_one_endpoint_means_one() {
        for (given, offered) in [(0, 1), (-3, 1), (1, 1), (3, 3)] {
            let parameters = super::Parameters { max_num_of_endpoints: given };
            assert_eq!(parameters.endpoints_max(), offered);
        }
    }
}
