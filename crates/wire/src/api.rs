//! Which API does a request path belong to?

/// The APIs whose bodies are understood. Everything else passes through and is routed by load.
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
    /// vLLM `/inference/v1/generate`: token ids in, token ids out.
    VllmGenerate,
    /// Any other path.
    Other,
}

impl Api {
    /// The API of a request path. The query is ignored, and so is what stands before the last
    /// segments, because gateways mount the APIs under prefixes of their own (llm-d matches
    /// suffixes too).
    pub fn from_path(path: &str) -> Api {
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let path = path.strip_suffix('/').unwrap_or(path);
        match () {
            () if path.ends_with("/chat/completions") => Api::ChatCompletions,
            () if path.ends_with("/completions") => Api::Completions,
            () if path.ends_with("/responses") => Api::Responses,
            () if path.ends_with("/embeddings") => Api::Embeddings,
            () if path.ends_with("/inference/v1/generate") => Api::VllmGenerate,
            () => Api::Other,
        }
    }

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Api::Completions => "completions",
            Api::ChatCompletions => "chat_completions",
            Api::Responses => "responses",
            Api::Embeddings => "embeddings",
            Api::VllmGenerate => "vllm_generate",
            Api::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Api;

    #[test]
    fn paths() {
        let table = [
            ("/v1/completions", Api::Completions),
            ("/v1/completions/", Api::Completions),
            ("/v1/completions?x=/v1/embeddings", Api::Completions),
            ("/v1/chat/completions", Api::ChatCompletions),
            ("/team-a/v1/chat/completions", Api::ChatCompletions),
            ("/v1/chat/completions/render", Api::Other),
            ("/v1/responses", Api::Responses),
            ("/v1/responses/resp_1", Api::Other),
            ("/v1/embeddings", Api::Embeddings),
            ("/inference/v1/generate", Api::VllmGenerate),
            ("/generate", Api::Other),
            ("/v1/mycompletions", Api::Other),
            ("/v1/models", Api::Other),
            ("/", Api::Other),
            ("", Api::Other),
        ];
        for (path, api) in table {
            assert_eq!(Api::from_path(path), api, "{path}");
        }
    }
}
