//! Is a request served by several endpoints in turn? One function over three kinds of deciders.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Inputs, PREFIX_DEFAULT, Plugin, ProducerRef};

/// `prefix-based-pd-decider`: prefill elsewhere if the prompt is long enough, and enough of it is
/// not cached on the chosen decode endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PrefixBased {
    /// Uncached tokens from which prefill goes elsewhere; 0: never.
    pub non_cached_tokens: u32,
    /// Shorter prompts are never disaggregated.
    pub prompt_tokens: u32,
}

/// `always-disagg-pd-decider`: always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Always {}

/// `always-disagg-multimodal-decider`: if the request holds images, audio or video.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlwaysMultimodal {}

/// A decider of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decider {
    /// By what is not cached.
    PrefixBased(PrefixBased),
    /// Always.
    Always,
    /// By the media of the request.
    Multimodal,
}

impl Decider {
    /// Whether to disaggregate a request of `prompt_tokens`, of which `uncached_tokens` are not
    /// cached on the decode endpoint, and which holds `media` multimodal items.
    pub fn decide(self, prompt_tokens: u32, uncached_tokens: u32, media: usize) -> bool {
        match self {
            Decider::Always => true,
            Decider::Multimodal => media > 0,
            Decider::PrefixBased(PrefixBased { non_cached_tokens, prompt_tokens: least }) => {
                non_cached_tokens > 0
                    && prompt_tokens >= least
                    && uncached_tokens >= non_cached_tokens
            }
        }
    }
}

impl Plugin for PrefixBased {
    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            prefix: Some(ProducerRef::Default(PREFIX_DEFAULT)),
            tokens: true,
            ..Inputs::default()
        }
    }
}

impl Plugin for Always {}

impl Plugin for AlwaysMultimodal {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { tokens: true, ..Inputs::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uncached_part_decides_for_prompts_that_are_long_enough() {
        let by = |non_cached_tokens, prompt_tokens| {
            Decider::PrefixBased(PrefixBased { non_cached_tokens, prompt_tokens })
        };
        let table = [
            (by(0, 0), 1_000, 1_000, false),
            (by(16, 0), 100, 16, true),
            (by(16, 0), 100, 15, false),
            (by(16, 200), 199, 199, false),
            (by(16, 200), 200, 16, true),
            (Decider::Always, 0, 0, true),
        ];
        for (decider, prompt, uncached, expected) in table {
            assert_eq!(decider.decide(prompt, uncached, 0), expected, "{decider:?}");
        }
        assert!(!Decider::Multimodal.decide(100, 100, 0));
        assert!(Decider::Multimodal.decide(0, 0, 1));
    }
}
