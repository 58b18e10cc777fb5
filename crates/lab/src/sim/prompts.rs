//! Which chains does a prompt have? Computed once for each prompt that repeats.

use std::sync::Arc;

use kvroute_core::blocks::{Chain, PromptExtras, Root, TokenSpace, chain};
use kvroute_core::brain::ChainSpecs;
use kvroute_core::decision::{PromptChains, TokensKnown};
use rustc_hash::FxHashMap;

use crate::traffic::Call;

/// Prompts whose chains are kept.
const CACHED_MAX: usize = 65_536;

/// Bytes per estimated token, as the router estimates.
const ESTIMATED_BYTES: f64 = 4.0;

/// The chains of all prompts.
pub(super) struct Prompts {
    bytes_per_token: f64,
    specs: ChainSpecs,
    cached: FxHashMap<u64, Arc<[PromptChains]>>,
}

impl Prompts {
    pub fn new(bytes_per_token: f64) -> Prompts {
        let (specs, cached) = (ChainSpecs::default(), FxHashMap::default());
        Prompts { bytes_per_token, specs, cached }
    }

    /// The chains that a request must come with now.
    pub fn chains(
        &mut self,
        specs: ChainSpecs,
        known: TokensKnown,
        call: &Call,
    ) -> Arc<[PromptChains]> {
        if specs != self.specs || self.cached.len() >= CACHED_MAX {
            self.specs = specs;
            self.cached.clear();
        }
        if let Some(chains) = self.cached.get(&call.prompt_id) {
            return Arc::clone(chains);
        }
        let mut estimated: Option<Vec<u32>> = None;
        let chains: Vec<Chain> = specs
            .of(known)
            .iter()
            .map(|spec| {
                let tokens: &[u32] = match spec.space {
                    TokenSpace::Exact => &call.tokens,
                    TokenSpace::Estimated => {
                        estimated.get_or_insert_with(|| self.estimate(&call.tokens))
                    }
                };
                chain(*spec, Root::Base, tokens, &PromptExtras::default())
            })
            .collect();
        let chains: Arc<[PromptChains]> = Arc::from([PromptChains { chains }]);
        self.cached.insert(call.prompt_id, Arc::clone(&chains));
        chains
    }

    /// How many tokens a router without a tokenizer takes the prompt for.
    pub fn estimated_tokens(&self, tokens: usize) -> u32 {
        (tokens as f64 * self.bytes_per_token / ESTIMATED_BYTES) as u32
    }

    /// Estimated tokens of the text that these tokens would have: each is a function of the tokens
    /// whose bytes it covers.
    fn estimate(&self, tokens: &[u32]) -> Vec<u32> {
        let at = |byte: f64| {
            let token = (byte / self.bytes_per_token) as usize;
            u64::from(tokens.get(token).copied().unwrap_or(0))
        };
        let count = self.estimated_tokens(tokens.len());
        (0..count)
            .map(|i| {
                let first = f64::from(i) * ESTIMATED_BYTES;
                let (a, b) = (at(first), at(first + ESTIMATED_BYTES - 1.0));
                ((a << 32 | b).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_have_equal_estimates() {
        let prompts = Prompts::new(6.13);
        let a: Vec<u32> = (0..1000).collect();
        let mut b = a.clone();
        b[500] = 7;
        let (a, b) = (prompts.estimate(&a), prompts.estimate(&b));
        assert_eq!(a.len(), 1532);
        let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        assert_eq!(same, (500.0 * 6.13 / 4.0) as usize);
    }
}
