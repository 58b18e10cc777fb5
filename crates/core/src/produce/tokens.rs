//! `token-producer`: how does a prompt become tokens?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::{GoDuration, Ignored};
use crate::stage::Plugin;

/// Parameters of `token-producer`. kvroute tokenizes in its own process whenever it is given the
/// model's tokenizer, and estimates otherwise; a `vllm` section says that exact tokens are wanted,
/// its address is not called.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Tokens {
    /// The model whose tokenizer is meant.
    pub model_name: Option<String>,
    /// Exact tokens, which llm-d asks a render server for.
    pub vllm: Option<VllmRender>,
    /// Estimated tokens.
    pub estimate: Option<TokenEstimate>,
    /// Deprecated and without effect.
    pub uds_tokenizer_config: Option<Ignored>,
}

/// `vllm`, without effect beyond its presence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct VllmRender {
    /// Render server.
    pub url: Option<String>,
    /// Of one call.
    pub timeout: Option<GoDuration>,
    /// Of one call with multimodal items.
    pub mm_timeout: Option<GoDuration>,
}

/// `estimate`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TokenEstimate {
    /// Tokens of images.
    pub image: Option<ImageEstimate>,
    /// Tokens of videos.
    pub video: Option<VideoEstimate>,
}

/// `estimate.image`; its fields are read when multimodal estimates are.
pub type ImageEstimate = Ignored;
/// `estimate.video`; its fields are read when multimodal estimates are.
pub type VideoEstimate = Ignored;

impl Plugin for Tokens {
    fn inert(&self) -> Vec<String> {
        let text = "vllm: prompts are tokenized in this process, its url is not called";
        self.vllm.iter().map(|_| text.to_owned()).collect()
    }
}
