//! `inflight-load-producer`: what has this router sent to an endpoint that is not answered yet?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, PrefixMatch};

/// Parameters of `inflight-load-producer`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct InflightLoad {
    /// Whether the expected output is charged as well as the prompt.
    pub add_estimated_output_tokens: bool,
    /// Expected output tokens per prompt token, 0 or more.
    pub output_ratio: f64,
    /// Upper end of that expectation, in tokens; `max_tokens` of the request is one, too.
    pub max_estimated_output_tokens: Option<u32>,
    /// Producer of the matches that are subtracted from the prompt: the name of a prefix cache
    /// producer.
    pub prefix_match_info_producer_name: Option<String>,
    /// Accepted; replicas do not tell each other.
    pub sync_cross_replica_state: Option<bool>,
}

impl Default for InflightLoad {
    fn default() -> InflightLoad {
        InflightLoad {
            add_estimated_output_tokens: false,
            output_ratio: 1.5,
            max_estimated_output_tokens: None,
            prefix_match_info_producer_name: None,
            sync_cross_replica_state: None,
        }
    }
}

impl InflightLoad {
    /// Output tokens charged from pick to end.
    pub fn output_tokens(&self, prompt_tokens: u32, max_tokens: Option<u32>) -> u32 {
        if !self.add_estimated_output_tokens {
            return 0;
        }
        let estimate = (f64::from(prompt_tokens) * self.output_ratio).round() as u32;
        let limit = self.max_estimated_output_tokens.unwrap_or(u32::MAX);
        estimate.min(limit).min(max_tokens.unwrap_or(u32::MAX))
    }
}

/// Prompt tokens an endpoint must compute: `(total - match) * block_size` plus the tail that has
/// no key, `max(0, prompt - total * block_size)`. Never more than the prompt: a partial last block
/// with a key is charged by its tokens.
pub fn uncached_tokens(prompt_tokens: u32, prefix: PrefixMatch) -> u32 {
    let keyed = prefix.total.saturating_mul(prefix.block_size).min(prompt_tokens);
    let matched = prefix.blocks.saturating_mul(prefix.block_size).min(keyed);
    prompt_tokens - matched
}

impl Plugin for InflightLoad {
    fn check(&self) -> Result<(), String> {
        if self.output_ratio.is_finite() && self.output_ratio >= 0.0 {
            return Ok(());
        }
        Err(format!("outputRatio {} must not be negative", self.output_ratio))
    }

    fn inert(&self) -> Vec<String> {
        let text = "syncCrossReplicaState: replicas do not tell each other what is in flight";
        let given = self.sync_cross_replica_state.filter(|wanted| *wanted);
        given.map(|_| text.to_owned()).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uncached_is_what_no_block_covers() {
        let prefix = |blocks, total| PrefixMatch { weighted: 0.0, blocks, total, block_size: 16 };
        let table =
            [(100, 0, 6, 100), (100, 4, 6, 36), (100, 6, 6, 4), (100, 7, 7, 0), (10, 0, 0, 10)];
        for (prompt, blocks, total, uncached) in table {
            assert_eq!(uncached_tokens(prompt, prefix(blocks, total)), uncached);
        }
    }

    #[test]
    fn expected_output_is_capped_by_both_limits() {
        let on = InflightLoad { add_estimated_output_tokens: true, ..Default::default() };
        let capped = InflightLoad { max_estimated_output_tokens: Some(50), ..on.clone() };
        assert_eq!(InflightLoad::default().output_tokens(100, None), 0);
        assert_eq!(on.output_tokens(100, None), 150);
        assert_eq!(on.output_tokens(1, None), 2);
        assert!(InflightLoad { output_ratio: -1.0, ..on.clone() }.check().is_err());
        assert_eq!(on.output_tokens(100, Some(20)), 20);
        assert_eq!(capped.output_tokens(100, None), 50);
    }
}
