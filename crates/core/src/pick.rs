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
    /// Endpoints offered as an ordered list; 0 and less mean 1.
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
