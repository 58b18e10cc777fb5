//! Which parsers may claim a request, and in which order?
//!
//! A parser reads the bodies of some APIs and finds the usage in their answers. The paths that
//! each one claims are a matter of formats and stand in the wire crate.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of a parser: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Parser {}

impl Plugin for Parser {}

/// A parser, named as in llm-d.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParserKind {
    /// OpenAI's APIs over HTTP.
    Openai,
    /// Anthropic's messages API.
    Anthropic,
    /// vLLM's own generate API.
    VllmHttp,
    /// SGLang's own generate API.
    SglangHttp,
    /// vLLM's gRPC API.
    VllmGrpc,
    /// Vertex AI's prediction service (gRPC).
    Vertex,
    /// Claims no path and takes what no other parser does; bodies stay unread.
    Passthrough,
}

impl ParserKind {
    /// All parsers.
    pub const ALL: [ParserKind; 7] = [
        ParserKind::Openai,
        ParserKind::Anthropic,
        ParserKind::VllmHttp,
        ParserKind::SglangHttp,
        ParserKind::VllmGrpc,
        ParserKind::Vertex,
        ParserKind::Passthrough,
    ];

    /// The parsers of a configuration that lists none.
    pub const DEFAULTS: [ParserKind; 4] =
        [ParserKind::Openai, ParserKind::Anthropic, ParserKind::VllmHttp, ParserKind::Passthrough];

    /// The plugin type that users write.
    pub fn plugin_type(self) -> &'static str {
        match self {
            ParserKind::Openai => "openai-parser",
            ParserKind::Anthropic => "anthropic-parser",
            ParserKind::VllmHttp => "vllmhttp-parser",
            ParserKind::SglangHttp => "sglanghttp-parser",
            ParserKind::VllmGrpc => "vllmgrpc-parser",
            ParserKind::Vertex => "vertexai-parser",
            ParserKind::Passthrough => "passthrough-parser",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_take_no_parameters() {
        assert_eq!(serde_saphyr::from_str::<Parser>("{}").unwrap(), Parser {});
        assert!(serde_saphyr::from_str::<Parser>("{model: x}").is_err());
    }
}
