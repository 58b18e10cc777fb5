//! What a vLLM 0.32 server answers: the JSON shapes of its HTTP API, for a server that must not
//! be told apart from it.
//!
//! Fields and their order are those of vLLM's response models. A whole answer lists every field,
//! null where unset; a streamed chunk lists only what was set; the last chunk of a stream, with
//! the usage, leaves nulls out.

use serde::{Deserialize, Serialize};

/// A field that is always null.
pub type Null = ();

/// How much a request cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of all prompts.
    pub prompt_tokens: u32,
    /// Of all outputs.
    pub completion_tokens: u32,
    /// Prompt tokens served from the cache (of the last prompt, when there are several).
    pub cached_tokens: Option<u32>,
    /// Prompt tokens that entered the cache; chat only.
    pub created_cache_tokens: Option<u32>,
}

/// `usage` of a whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
    completion_tokens: u32,
    prompt_tokens_details: Option<PromptTokensDetails>,
    completion_tokens_details: Null,
}

#[derive(Clone, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: Option<u32>,
    created_cache_tokens: Option<u32>,
    multimodal_tokens: Null,
}

impl From<Counts> for Usage {
    fn from(counts: Counts) -> Usage {
        Usage {
            prompt_tokens: counts.prompt_tokens,
            total_tokens: counts.prompt_tokens.saturating_add(counts.completion_tokens),
            completion_tokens: counts.completion_tokens,
            prompt_tokens_details: counts.cached_tokens.map(|cached_tokens| PromptTokensDetails {
                cached_tokens: Some(cached_tokens),
                created_cache_tokens: counts.created_cache_tokens,
                multimodal_tokens: (),
            }),
            completion_tokens_details: (),
        }
    }
}

/// `usage` of a streamed chunk: the details come with the last one only.
#[derive(Clone, Debug, Serialize)]
pub struct ChunkUsage {
    prompt_tokens: u32,
    total_tokens: u32,
    completion_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<ChunkPromptTokensDetails>,
}

#[derive(Clone, Debug, Serialize)]
struct ChunkPromptTokensDetails {
    cached_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_cache_tokens: Option<u32>,
}

impl From<Counts> for ChunkUsage {
    fn from(counts: Counts) -> ChunkUsage {
        let created_cache_tokens = counts.created_cache_tokens;
        ChunkUsage {
            prompt_tokens: counts.prompt_tokens,
            total_tokens: counts.prompt_tokens.saturating_add(counts.completion_tokens),
            completion_tokens: counts.completion_tokens,
            prompt_tokens_details: counts.cached_tokens.map(|cached_tokens| {
                ChunkPromptTokensDetails { cached_tokens, created_cache_tokens }
            }),
        }
    }
}

/// Answer of `/v1/completions`.
#[derive(Clone, Debug, Serialize)]
pub struct Completion<'a> {
    /// `cmpl-...`.
    pub id: &'a str,
    /// `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// One per prompt and `n`.
    pub choices: Vec<CompletionChoice<'a>>,
    /// Always null.
    pub service_tier: Null,
    /// Always null.
    pub system_fingerprint: Null,
    /// Cost.
    pub usage: Usage,
    /// Always null.
    pub kv_transfer_params: Null,
    /// Always null.
    pub ec_transfer_params: Null,
    /// Always null.
    pub metrics: Null,
}

/// One answer of `/v1/completions`.
#[derive(Clone, Debug, Serialize)]
pub struct CompletionChoice<'a> {
    /// Position.
    pub index: u32,
    /// Output.
    pub text: &'a str,
    /// Always null.
    pub logprobs: Null,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Always null.
    pub stop_reason: Null,
    /// With `return_token_ids`.
    pub token_ids: Option<&'a [u32]>,
    /// Always null.
    pub prompt_logprobs: Null,
    /// With `return_token_ids`.
    pub prompt_token_ids: Option<&'a [u32]>,
    /// Always null.
    pub routed_experts: Null,
}

/// A streamed chunk of `/v1/completions`.
#[derive(Clone, Debug, Serialize)]
pub struct CompletionChunk<'a> {
    /// `cmpl-...`.
    pub id: &'a str,
    /// `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// None in the chunk with the usage.
    pub choices: Vec<CompletionChunkChoice<'a>>,
    /// With `include_usage` (last chunk) or `continuous_usage_stats` (every chunk).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<ChunkUsage>,
}

/// What a chunk adds to one answer.
#[derive(Clone, Debug, Serialize)]
pub struct CompletionChunkChoice<'a> {
    /// Position.
    pub index: u32,
    /// What is new.
    pub text: &'a str,
    /// Always null.
    pub logprobs: Null,
    /// With the last token.
    pub finish_reason: Option<&'static str>,
    /// Always null.
    pub stop_reason: Null,
    /// With `return_token_ids`, in the first chunk of a choice.
    pub prompt_token_ids: Option<&'a [u32]>,
    /// With `return_token_ids`.
    pub token_ids: Option<&'a [u32]>,
}

/// Answer of `/v1/chat/completions`.
#[derive(Clone, Debug, Serialize)]
pub struct ChatCompletion<'a> {
    /// `chatcmpl-...`.
    pub id: &'a str,
    /// `chat.completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// One per `n`.
    pub choices: Vec<ChatChoice<'a>>,
    /// Always null.
    pub service_tier: Null,
    /// Always null.
    pub system_fingerprint: Null,
    /// Cost.
    pub usage: Usage,
    /// Always null.
    pub prompt_logprobs: Null,
    /// With `return_token_ids`.
    pub prompt_token_ids: Option<&'a [u32]>,
    /// Always null.
    pub prompt_text: Null,
    /// Always null.
    pub kv_transfer_params: Null,
    /// Always null.
    pub ec_transfer_params: Null,
    /// Always null.
    pub metrics: Null,
}

/// One answer of `/v1/chat/completions`.
#[derive(Clone, Debug, Serialize)]
pub struct ChatChoice<'a> {
    /// Position.
    pub index: u32,
    /// Output.
    pub message: ChatMessage<'a>,
    /// Always null.
    pub logprobs: Null,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Always null.
    pub stop_reason: Null,
    /// With `return_token_ids`.
    pub token_ids: Option<&'a [u32]>,
    /// Always null.
    pub routed_experts: Null,
}

/// The assistant's message.
#[derive(Clone, Debug, Serialize)]
pub struct ChatMessage<'a> {
    /// `assistant`.
    pub role: &'static str,
    /// Text.
    pub content: &'a str,
    /// Always null.
    pub refusal: Null,
    /// Always null.
    pub annotations: Null,
    /// Always null.
    pub audio: Null,
    /// Always null.
    pub function_call: Null,
    /// Always null.
    pub reasoning: Null,
}

/// A streamed chunk of `/v1/chat/completions`.
#[derive(Clone, Debug, Serialize)]
pub struct ChatChunk<'a> {
    /// `chatcmpl-...`.
    pub id: &'a str,
    /// `chat.completion.chunk`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// None in the chunk with the usage.
    pub choices: Vec<ChatChunkChoice<'a>>,
    /// With `include_usage` (last chunk) or `continuous_usage_stats` (every chunk).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<ChunkUsage>,
    /// In the chunk that opens a choice: null or, with `return_token_ids`, the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Option<&'a [u32]>>,
    /// In the chunk that opens a choice: null.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_text: Option<Null>,
}

/// What a chunk adds to one answer.
#[derive(Clone, Debug, Serialize)]
pub struct ChatChunkChoice<'a> {
    /// Position.
    pub index: u32,
    /// What is new.
    pub delta: ChatDelta<'a>,
    /// Always null.
    pub logprobs: Null,
    /// With the last token.
    pub finish_reason: Option<&'static str>,
    /// Null, with the last token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<Null>,
    /// Null or, with `return_token_ids`, the tokens; absent in the chunk that opens a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Option<&'a [u32]>>,
}

/// The new part of the assistant's message.
#[derive(Clone, Debug, Serialize)]
pub struct ChatDelta<'a> {
    /// In the chunk that opens a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text.
    pub content: &'a str,
}

/// Answer of `/inference/v1/generate`.
#[derive(Clone, Debug, Serialize)]
pub struct Generated<'a> {
    /// As given, or made up.
    pub request_id: &'a str,
    /// Served model.
    pub model: &'a str,
    /// Unix seconds.
    pub created: u64,
    /// Cost.
    pub usage: Usage,
    /// Always null.
    pub prompt_logprobs: Null,
    /// Always null.
    pub prompt_token_id_logprobs: Null,
    /// Always null.
    pub prompt_token_ids: Null,
    /// Always null.
    pub mm_placeholders: Null,
    /// Always null.
    pub metrics: Null,
    /// Always null.
    pub kv_transfer_params: Null,
    /// Always null.
    pub ec_transfer_params: Null,
    /// `tokens`.
    pub output_mode: &'static str,
    /// One per `n`.
    pub choices: Vec<GeneratedChoice<'a>>,
}

/// One answer of `/inference/v1/generate`, whole or a chunk of it.
#[derive(Clone, Debug, Serialize)]
pub struct GeneratedChoice<'a> {
    /// Position.
    pub index: u32,
    /// `stop`, `length`, or null in a chunk that is not the last.
    pub finish_reason: Option<&'static str>,
    /// Always null.
    pub stop_reason: Null,
    /// Output.
    pub token_ids: &'a [u32],
    /// Always null.
    pub routed_experts: Null,
    /// Always null.
    pub sampling_mask: Null,
    /// Always null.
    pub weight_versions: Null,
    /// Always null.
    pub logprobs: Null,
}

/// A streamed chunk of `/inference/v1/generate`.
#[derive(Clone, Debug, Serialize)]
pub struct GeneratedChunk<'a> {
    /// As given, or made up.
    pub request_id: &'a str,
    /// With `include_usage` (last chunk) or `continuous_usage_stats` (every chunk).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<ChunkUsage>,
    /// `tokens`.
    pub output_mode: &'static str,
    /// None in the chunk with the usage.
    pub choices: Vec<GeneratedChoice<'a>>,
}

/// Answer of `/v1/embeddings`.
#[derive(Clone, Debug, Serialize)]
pub struct Embeddings<'a> {
    /// `embd-...`.
    pub id: &'a str,
    /// `list`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// One per input.
    pub data: Vec<Embedding>,
    /// Cost.
    pub usage: Usage,
}

/// One embedding.
#[derive(Clone, Debug, Serialize)]
pub struct Embedding {
    /// Position.
    pub index: u32,
    /// `embedding`.
    pub object: &'static str,
    /// The vector.
    pub embedding: Vec<f32>,
}

/// Answer of `/v1/models`.
#[derive(Clone, Debug, Serialize)]
pub struct Models<'a> {
    /// `list`.
    pub object: &'static str,
    /// The base model first, then adapters.
    pub data: Vec<ModelCard<'a>>,
}

/// One served model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelCard<'a> {
    /// Name to ask for.
    pub id: &'a str,
    /// `model`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// `vllm`.
    pub owned_by: &'static str,
    /// Path of the weights.
    pub root: &'a str,
    /// Base model of an adapter.
    pub parent: Option<&'a str>,
    /// Longest sequence; null for an adapter.
    pub max_model_len: Option<u32>,
    /// One entry.
    pub permission: [ModelPermission; 1],
}

/// OpenAI's permission object, with vLLM's fixed values.
#[derive(Clone, Debug, Serialize)]
pub struct ModelPermission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Null,
    is_blocking: bool,
}

impl ModelPermission {
    /// The permission `id`, made at `created` (Unix seconds).
    pub fn new(id: String, created: u64) -> ModelPermission {
        ModelPermission {
            id,
            object: "model_permission",
            created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: (),
            is_blocking: false,
        }
    }
}

/// Answer of `/tokenize`.
#[derive(Clone, Debug, Serialize)]
pub struct Tokenized<'a> {
    /// Of tokens.
    pub count: usize,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Ids.
    pub tokens: &'a [u32],
    /// With `return_token_strs`.
    pub token_strs: Option<Vec<String>>,
}

/// What is read of an answer of `/tokenize`.
#[derive(Clone, Debug, Deserialize)]
pub struct TokensRead {
    /// Ids.
    pub tokens: Vec<u32>,
}

/// What is read of an answer of `/detokenize`.
#[derive(Clone, Debug, Deserialize)]
pub struct TextRead {
    /// Text.
    pub prompt: String,
}

/// Answer of `/detokenize`.
#[derive(Clone, Debug, Serialize)]
pub struct Detokenized<'a> {
    /// Text.
    pub prompt: &'a str,
}

/// One entry of `/kv_event_sources`.
#[derive(Clone, Debug, Serialize)]
pub struct KvEventSource<'a> {
    /// Whether events are published.
    pub enable_kv_cache_events: bool,
    /// `zmq`.
    pub publisher: &'static str,
    /// Of the publisher.
    pub endpoint: &'a str,
    /// Of the replay socket.
    pub replay_endpoint: Option<&'a str>,
    /// Messages kept for replay.
    pub buffer_steps: usize,
    /// Messages queued per subscriber.
    pub hwm: usize,
    /// Messages queued for the publisher.
    pub max_queue_size: usize,
    /// First frame of every message.
    pub topic: &'a str,
}

/// The body of an error.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorBody<'a> {
    /// What went wrong.
    pub error: ErrorInfo<'a>,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorInfo<'a> {
    /// For a person.
    pub message: &'a str,
    /// `BadRequestError`, `NotFoundError`, `Bad Request`, ...
    #[serde(rename = "type")]
    pub kind: &'a str,
    /// Field at fault.
    pub param: Option<&'a str>,
    /// HTTP status.
    pub code: u16,
}
