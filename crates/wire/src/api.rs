//! Which APIs are understood, and what is read of them?

use std::sync::LazyLock;

use crate::parsers::Parsers;

/// The APIs that some parser claims. Everything else passes through and is routed by load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// OpenAI `/v1/completions`.
    Completions,
    /// OpenAI `/v1/chat/completions`.
    ChatCompletions,
    /// OpenAI `/v1/responses`.
    Responses,
    /// OpenAI `/v1/embeddings`, with vLLM's `messages` form.
    Embeddings,
    /// OpenAI `/v1/conversations`: stores items, generates nothing.
    Conversations,
    /// OpenAI `/v1/images/generations`.
    Images,
    /// vLLM `/v1/chat/completions/render` and its like: the prompt as ids, nothing is generated.
    Render,
    /// Anthropic `/v1/messages`.
    Messages,
    /// Anthropic `/v1/messages/count_tokens`: forwarded as it is, its answer too.
    CountTokens,
    /// vLLM `/inference/v1/generate`: token ids in, token ids out.
    VllmGenerate,
    /// SGLang `/generate`.
    SglangGenerate,
    /// vLLM's gRPC method `VllmEngine/Generate`.
    GrpcGenerate,
    /// vLLM's gRPC method `VllmEngine/Embed`.
    GrpcEmbed,
    /// Vertex AI's gRPC method `PredictionService/ChatCompletions`.
    VertexChat,
    /// Vertex AI's gRPC method `PredictionService/RawPredict`.
    VertexRaw,
    /// Vertex AI's gRPC method `PredictionService/StreamRawPredict`.
    VertexStreamRaw,
    /// Any other path.
    Other,
}

static DEFAULT_PARSERS: LazyLock<Parsers> = LazyLock::new(Parsers::default);

impl Api {
    /// All APIs.
    pub const ALL: [Api; 17] = [
        Api::Completions,
        Api::ChatCompletions,
        Api::Responses,
        Api::Embeddings,
        Api::Conversations,
        Api::Images,
        Api::Render,
        Api::Messages,
        Api::CountTokens,
        Api::VllmGenerate,
        Api::SglangGenerate,
        Api::GrpcGenerate,
        Api::GrpcEmbed,
        Api::VertexChat,
        Api::VertexRaw,
        Api::VertexStreamRaw,
        Api::Other,
    ];

    /// The API of a request path under the parsers of a configuration that lists none.
    pub fn from_path(path: &str) -> Api {
        DEFAULT_PARSERS.resolve(path).unwrap_or(Api::Other)
    }

    /// Whether bodies are read before a request is routed. The others pass through as they come.
    pub fn reads_body(self) -> bool {
        !matches!(self, Api::CountTokens | Api::Other)
    }

    /// Whether answers say how many tokens a prompt had and how many came from the cache.
    pub fn tells_usage(self) -> bool {
        self.reads_body() && !matches!(self, Api::Conversations | Api::Render)
    }

    /// Whether bodies have a place for the name of a model. Without one, the engine serves what it
    /// serves.
    pub fn names_model(self) -> bool {
        !matches!(self, Api::SglangGenerate | Api::GrpcGenerate | Api::GrpcEmbed)
    }

    /// Whether bodies and answers are gRPC frames.
    pub fn is_grpc(self) -> bool {
        matches!(
            self,
            Api::GrpcGenerate
                | Api::GrpcEmbed
                | Api::VertexChat
                | Api::VertexRaw
                | Api::VertexStreamRaw
        )
    }

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Api::Completions => "completions",
            Api::ChatCompletions => "chat_completions",
            Api::Responses => "responses",
            Api::Embeddings => "embeddings",
            Api::Conversations => "conversations",
            Api::Images => "images",
            Api::Render => "render",
            Api::Messages => "messages",
            Api::CountTokens => "count_tokens",
            Api::VllmGenerate => "vllm_generate",
            Api::SglangGenerate => "sglang_generate",
            Api::GrpcGenerate => "grpc_generate",
            Api::GrpcEmbed => "grpc_embed",
            Api::VertexChat => "vertex_chat",
            Api::VertexRaw => "vertex_raw",
            Api::VertexStreamRaw => "vertex_stream_raw",
            Api::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Api;

    #[test]
    fn paths_under_the_default_parsers() {
        let table = [
            ("/v1/completions", Api::Completions),
            ("/v1/completions/", Api::Completions),
            ("/v1/completions?x=/v1/embeddings", Api::Completions),
            ("/v1/chat/completions", Api::ChatCompletions),
            ("/team-a/v1/chat/completions", Api::ChatCompletions),
            ("/v1/chat/completions/render", Api::Render),
            ("/v1/completions/render", Api::Render),
            ("/v1/responses", Api::Responses),
            ("/v1/responses/resp_1", Api::Other),
            ("/v1/embeddings", Api::Embeddings),
            ("/v1/conversations", Api::Conversations),
            ("/v1/images/generations", Api::Images),
            ("/v1/images/edits", Api::Other),
            ("/v1/messages", Api::Messages),
            ("/v1/messages/count_tokens", Api::CountTokens),
            ("/v1/messages/batches", Api::Other),
            ("/inference/v1/generate", Api::VllmGenerate),
            ("/generate", Api::Other),
            ("/vllm.grpc.engine.VllmEngine/Generate", Api::Other),
            ("/v1/mycompletions", Api::Other),
            ("/v1/my.completions", Api::Other),
            ("/v1/models", Api::Other),
            ("/", Api::Other),
            ("", Api::Other),
        ];
        for (path, api) in table {
            assert_eq!(Api::from_path(path), api, "{path}");
        }
    }

    #[test]
    fn names_differ() {
        let names: std::collections::BTreeSet<_> =
            Api::ALL.iter().map(|api| api.as_str()).collect();
        assert_eq!(names.len(), Api::ALL.len());
    }
}
