//! `approx-prefix-cache-producer`: what was routed to an endpoint is probably in its cache.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::blocks::{ChainSpec, TokenSpace};
use crate::stage::Plugin;

/// Smallest block, whatever is configured or learned: llm-d clamps to it, and shorter blocks would
/// change the meaning of scores in existing configurations.
const BLOCK_TOKENS_MIN: u32 = 64;

/// Parameters of `approx-prefix-cache-producer`. A match is contiguous from the first block on
/// each endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ApproxPrefix {
    /// Take the block size from the endpoints, the largest there is.
    pub auto_tune: bool,
    /// Tokens per block when not tuned, or before the endpoints have told theirs. Less than 64, or
    /// none, means 64.
    pub block_size_tokens: Option<u32>,
    /// Deprecated: characters per block. Four make a token.
    pub block_size: Option<u32>,
    /// Tokens of a prompt that are looked at; 0: `maxPrefixBlocksToMatch` decides.
    pub max_prefix_tokens_to_match: u32,
    /// Blocks of a prompt that are looked at, when the limit in tokens is 0; 0: all.
    pub max_prefix_blocks_to_match: u32,
    /// Blocks remembered per endpoint. One history serves all producers; the largest value counts.
    pub lru_capacity_per_server: u32,
    /// Blocks of so many bytes, full ones only: how llm-d's releases of 2025 cut prompts. Not a
    /// parameter; follows from the older form of `prefix-cache-scorer`.
    #[serde(skip)]
    pub block_bytes: Option<u32>,
}

impl Default for ApproxPrefix {
    fn default() -> ApproxPrefix {
        ApproxPrefix {
            auto_tune: true,
            block_size_tokens: None,
            block_size: None,
            max_prefix_tokens_to_match: 131_072,
            max_prefix_blocks_to_match: 2_048,
            lru_capacity_per_server: 31_250,
            block_bytes: None,
        }
    }
}

impl ApproxPrefix {
    /// Tokens per block, given the largest block size that the endpoints have shown.
    pub fn block_tokens(&self, engines: Option<u32>) -> u32 {
        if let Some(bytes) = self.block_bytes {
            return (bytes / 4).max(1);
        }
        let tokens = self.block_size_tokens.unwrap_or(BLOCK_TOKENS_MIN);
        let configured = self.block_size.map_or(tokens, |chars| chars / 4);
        let wanted = if self.auto_tune { engines.unwrap_or(configured) } else { configured };
        wanted.max(BLOCK_TOKENS_MIN)
    }

    /// The chain that history is kept for: a last partial block counts, too.
    pub fn chain_spec(&self, engines: Option<u32>, space: TokenSpace) -> ChainSpec {
        let partial_tail = self.block_bytes.is_none();
        ChainSpec { block_size: self.block_tokens(engines), space, partial_tail }
    }

    /// Blocks of a prompt that are looked at.
    pub fn blocks_max(&self, block_tokens: u32) -> u32 {
        match (self.max_prefix_tokens_to_match, self.max_prefix_blocks_to_match) {
            (0, 0) => u32::MAX,
            (0, blocks) => blocks,
            (tokens, _) => (tokens / block_tokens.max(1)).max(1),
        }
    }
}

impl Plugin for ApproxPrefix {
    fn inert(&self) -> Vec<String> {
        let small = self.block_size_tokens.filter(|tokens| *tokens < BLOCK_TOKENS_MIN);
        let overruled = self.block_size_tokens.filter(|_| self.block_size.is_some());
        let small = small.map(|tokens| {
            format!("blockSizeTokens {tokens}: blocks have at least {BLOCK_TOKENS_MIN} tokens")
        });
        let overruled = overruled.map(|_| "blockSizeTokens: blockSize stands beside it".to_owned());
        small.into_iter().chain(overruled).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_size_is_learned_or_configured_and_never_below_64() {
        let tuned = ApproxPrefix::default();
        let fixed = ApproxPrefix {
            auto_tune: false,
            block_size_tokens: Some(128),
            ..ApproxPrefix::default()
        };
        let chars = ApproxPrefix { auto_tune: false, block_size: Some(400), ..fixed.clone() };
        let table = [(&tuned, None, 64), (&tuned, Some(16), 64), (&tuned, Some(256), 256)];
        let table = table.into_iter().chain([(&fixed, Some(256), 128), (&chars, None, 100)]);
        for (producer, engines, tokens) in table {
            assert_eq!(producer.block_tokens(engines), tokens, "{producer:?} {engines:?}");
        }
    }

    #[test]
    fn a_block_size_that_is_too_small_is_named() {
        let sized = |tokens| ApproxPrefix { block_size_tokens: tokens, ..ApproxPrefix::default() };
        for (tokens, inert) in [(None, 0), (Some(16), 1), (Some(64), 0), (Some(128), 0)] {
            assert_eq!(sized(tokens).inert().len(), inert, "{tokens:?}");
            assert_eq!(sized(tokens).block_tokens(None), tokens.unwrap_or(0).max(64));
        }
    }

    #[test]
    fn the_limit_in_tokens_wins_over_the_one_in_blocks() {
        let with = |tokens, blocks| ApproxPrefix {
            max_prefix_tokens_to_match: tokens,
            max_prefix_blocks_to_match: blocks,
            ..ApproxPrefix::default()
        };
        assert_eq!(with(131_072, 5).blocks_max(64), 2_048);
        assert_eq!(with(0, 5).blocks_max(64), 5);
        assert_eq!(with(0, 0).blocks_max(64), u32::MAX);
    }
}
