//! Which of the rated endpoints serves the request? One file per plugin.
//!
//! Every picker orders all candidates; the first is chosen, the next are for retries.

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
    fn less_than_one_endpoint_means_one() {
        for (given, offered) in [(0, 1), (-3, 1), (1, 1), (3, 3)] {
            let parameters = super::Parameters { max_num_of_endpoints: given };
            assert_eq!(parameters.endpoints_max(), offered);
        }
    }
}
