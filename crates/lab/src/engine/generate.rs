//! From the body of a request to the sequences an engine has to compute, or to vLLM's refusal.

use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use kvroute_wire::api::Api;
use kvroute_wire::request::{self, BodyError, RequestBody};
use serde::Deserialize;

use super::Shared;
use super::http::Refusal;
use crate::model::{NewRequest, Output};

/// Sequences one request may ask for: prompts times `n`.
const SEQUENCES_PER_REQUEST_MAX: usize = 4096;

/// Output tokens after which the model stops by itself where the client sets no limit.
const OWN_STOP_TOKENS: u32 = 256;

/// `max_tokens` of `/v1/completions` and `/inference/v1/generate` when absent.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The fields that matter here beyond those routing reads. A field of a wrong type is refused.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Options {
    n: Option<u32>,
    temperature: Option<f64>,
    seed: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    ignore_eos: Option<bool>,
    return_token_ids: Option<bool>,
    vllm_xargs: Option<Xargs>,
    sampling_params: Option<Box<Options>>,
    request_id: Option<String>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Xargs {
    kv_cache_report_mode: Option<String>,
}

/// A request ready to be computed.
pub(super) struct Prepared {
    pub(super) api: Api,
    pub(super) id: String,
    pub(super) model: String,
    /// Answers per prompt.
    pub(super) n: u32,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) return_token_ids: bool,
    /// Prompt of each sequence group of `n`.
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) max_tokens: u32,
    pub(super) stop_after: Option<u32>,
    pub(super) cache_salt: Option<String>,
    pub(super) adapter: Option<String>,
    pub(super) greedy: bool,
    pub(super) seed: Option<u64>,
    pub(super) report_reused: bool,
}

impl Prepared {
    /// The sequences, numbered from `first_id`: prompt by prompt, `n` each.
    pub(super) fn sequences(&self, first_id: u64) -> impl Iterator<Item = NewRequest> + '_ {
        let n = u64::from(self.n);
        let count = self.prompts.len() as u64 * n;
        (0..count).map(move |i| {
            let output = match self.greedy {
                true => Output::Greedy,
                false => Output::Sampled(self.seed.unwrap_or(first_id).wrapping_add(i)),
            };
            NewRequest {
                id: first_id + i,
                tokens: self.prompts[(i / n) as usize].clone(),
                max_tokens: self.max_tokens,
                stop_after: self.stop_after,
                cache_salt: self.cache_salt.clone(),
                adapter: self.adapter.clone(),
                output,
                report_reused: self.report_reused,
            }
        })
    }

    /// Tokens of all prompts.
    pub(super) fn prompt_tokens(&self) -> u32 {
        self.prompts.iter().map(|prompt| prompt.len() as u32).sum()
    }
}

/// Reads, checks and tokenizes a request.
pub(super) fn prepare(
    shared: &Arc<Shared>,
    api: Api,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Prepared, Refusal> {
    let parsed = request::parse(api, body).map_err(bad_body)?;
    let options: Options = serde_json::from_slice(body)
        .map_err(|error| Refusal::validation(error.to_string(), None))?;
    let (model, adapter) = served(shared, parsed.model.as_deref())?;
    let prompts = shared.text.prompts(&parsed).map_err(|error| {
        let status = StatusCode::BAD_REQUEST;
        Refusal::new(status, "BadRequestError", error.to_string(), None)
    })?;
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        let message = "Either prompt or prompt_embeds must be provided and non-empty.";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "BadRequestError", message, None));
    }
    let sampling = options.sampling_params.as_deref().unwrap_or(&options);
    let n = checked_n(sampling, prompts.len())?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let (max_tokens, stop_after) = output_limit(shared, api, &parsed, sampling, longest)?;
    let stream_options = options.stream_options.unwrap_or_default();
    let report =
        options.vllm_xargs.as_ref().and_then(|xargs| xargs.kv_cache_report_mode.as_deref());
    Ok(Prepared {
        api,
        id: request_id(shared, api, headers, options.request_id.as_deref()),
        model,
        n,
        stream: options.stream.unwrap_or(false),
        include_usage: stream_options.include_usage.unwrap_or(false),
        continuous_usage: stream_options.include_usage.unwrap_or(false)
            && stream_options.continuous_usage_stats.unwrap_or(false),
        return_token_ids: options.return_token_ids.unwrap_or(false),
        max_tokens,
        stop_after,
        cache_salt: parsed.cache_salt.map(|salt| salt.into_owned()),
        adapter,
        greedy: sampling.temperature == Some(0.0),
        seed: sampling.seed.map(|seed| seed as u64),
        report_reused: report == Some("full"),
        prompts,
    })
}

fn bad_body(error: BodyError) -> Refusal {
    let param = match &error {
        BodyError::WrongType { field, .. } | BodyError::Missing { field, .. } => Some(*field),
        _ => None,
    };
    Refusal::validation(error.to_string(), param)
}

/// The name under which a model is asked for, and the adapter behind it.
pub(super) fn served(
    shared: &Shared,
    asked: Option<&str>,
) -> Result<(String, Option<String>), Refusal> {
    let base = &shared.config.model;
    match asked {
        None => Ok((base.clone(), None)),
        Some(name) if name == base => Ok((base.clone(), None)),
        Some(name) if shared.config.adapters.iter().any(|adapter| adapter.name == name) => {
            Ok((name.to_owned(), Some(name.to_owned())))
        }
        Some(name) => {
            let message = format!("The model `{name}` does not exist. Valid aliases: {base}.");
            let status = StatusCode::NOT_FOUND;
            Err(Refusal::new(status, "NotFoundError", message, Some("model")))
        }
    }
}

fn checked_n(sampling: &Options, prompts: usize) -> Result<u32, Refusal> {
    let refuse =
        |message| Err(Refusal::new(StatusCode::BAD_REQUEST, "BadRequestError", message, None));
    let n = sampling.n.unwrap_or(1);
    if n == 0 {
        return refuse(format!("n must be at least 1, got {n}."));
    }
    if n > 1 && sampling.temperature == Some(0.0) {
        return refuse(format!("n must be 1 when using greedy sampling, got {n}."));
    }
    if prompts.saturating_mul(n as usize) > SEQUENCES_PER_REQUEST_MAX {
        return refuse(format!(
            "{prompts} prompts with n = {n} are more than {SEQUENCES_PER_REQUEST_MAX} sequences."
        ));
    }
    Ok(n)
}

/// `max_tokens`, and where the model stops by itself.
fn output_limit(
    shared: &Shared,
    api: Api,
    parsed: &RequestBody<'_>,
    sampling: &Options,
    longest: usize,
) -> Result<(u32, Option<u32>), Refusal> {
    let limit = shared.config.max_model_len;
    let asked = sampling.max_completion_tokens.or(sampling.max_tokens);
    if let Some(asked) = asked.filter(|asked| *asked < 1) {
        let message = format!("max_tokens must be at least 1, got {asked}.");
        let status = StatusCode::BAD_REQUEST;
        return Err(Refusal::new(status, "BadRequestError", message, Some("max_tokens")));
    }
    let too_long = |message: String| {
        let status = StatusCode::BAD_REQUEST;
        Refusal::new(status, "BadRequestError", message, Some("input_tokens"))
    };
    if longest >= limit as usize {
        return Err(too_long(format!(
            "This model's maximum context length is {limit} tokens. However, your prompt contains \
             {longest} input tokens, which exceeds this limit even without any output tokens. \
             Please reduce the length of the input prompt."
        )));
    }
    let room = limit - longest as u32;
    match parsed.max_tokens {
        Some(asked) if asked > room => Err(too_long(format!(
            "This model's maximum context length is {limit} tokens. However, you requested {asked} \
             output tokens and your prompt contains {longest} input tokens. Please reduce the \
             length of the input prompt or the number of requested output tokens."
        ))),
        Some(asked) => Ok((asked, None)),
        None if api == Api::ChatCompletions => {
            Ok((room, (sampling.ignore_eos != Some(true)).then_some(OWN_STOP_TOKENS)))
        }
        None => Ok((DEFAULT_MAX_TOKENS.min(room), None)),
    }
}

fn request_id(shared: &Shared, api: Api, headers: &HeaderMap, given: Option<&str>) -> String {
    let from_header = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let base = from_header.or(given).map_or_else(|| shared.random_id(), str::to_owned);
    match api {
        Api::ChatCompletions => format!("chatcmpl-{base}"),
        Api::Completions => format!("cmpl-{base}"),
        Api::Embeddings => format!("embd-{base}"),
        _ => base,
    }
}
