//! What does a body ask for, in tokens and block keys? Read, rendered, tokenized and hashed in
//! one go.
//!
//! Bodies that take little time are read where they arrive: that costs less than handing them
//! over. The others go to a bounded number of blocking threads, so that a prompt of a million
//! tokens stalls nobody else. How long a body takes is learned from those before it. Whatever is
//! missing on the way lowers the knowledge, never the request.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use kvroute_core::blocks::{PromptExtras, Root, chain};
use kvroute_core::decision::{NoTokens, PromptChains, TokensKnown};
use kvroute_core::fleet::RootKind;
use kvroute_core::plan::TokensNeed;
use kvroute_tokens::{Tokenizer, TokensError};
use kvroute_wire::api::Api;
use kvroute_wire::request::{self, Prompt, RequestBody};
use tracing::warn;

use crate::error::RouteError;
use crate::metrics::ReasonLabel;
use crate::shared::Shared;

/// Bodies expected to take up to this long are read on the task that received them.
const INLINE_NS_MAX: u64 = 400_000;
/// Time per KiB of body before any has been read; a cached prompt takes a tenth of it.
pub(crate) const NS_PER_KIB_AT_START: u64 = 25_000;
/// Smallest body from which the time per KiB is learned; below, fixed costs dominate.
const LEARN_BYTES_MIN: usize = 2 << 10;
/// Bytes of text for which a token is charged where tokens are not known.
const BYTES_PER_TOKEN: usize = 4;
/// Longest session id that is used.
const SESSION_ID_BYTES_MAX: usize = 256;

/// What a body asks for, as far as routing goes.
#[derive(Debug)]
pub(crate) struct Asked {
    pub model: String,
    pub max_tokens: Option<u32>,
    /// See `core::decision::Request`.
    pub skips_cache: bool,
    /// vLLM's `session_id`.
    pub session_id: Option<String>,
    pub prompts: Vec<PromptChains>,
    pub prompt_tokens: u32,
    pub known: TokensKnown,
    /// What is not known is missing because of this request alone: it says nothing about how the
    /// model's requests are routed.
    pub request_at_fault: bool,
}

impl Asked {
    /// For requests whose body is not read.
    pub fn nothing() -> Asked {
        Asked {
            model: String::new(),
            max_tokens: None,
            skips_cache: false,
            session_id: None,
            prompts: Vec::new(),
            prompt_tokens: 0,
            known: TokensKnown::None(NoTokens::NoPrompt),
            request_at_fault: false,
        }
    }
}

/// Reads a body of a routed API.
pub(crate) async fn read(
    shared: &Arc<Shared>,
    api: Api,
    body: &Bytes,
) -> Result<Asked, RouteError> {
    let started = Instant::now();
    let expected_ns = (body.len() as u64 >> 10) * shared.tokenize_ns_per_kib.load(Relaxed);
    let asked = if expected_ns <= INLINE_NS_MAX || shared.tokens == TokensNeed::None {
        timed(shared, api, body)
    } else {
        read_elsewhere(shared, api, body).await
    };
    shared.metrics.tokenize.observe(started.elapsed().as_secs_f64());
    asked
}

/// Reads, and learns how long it takes: a moving average over about eight bodies. Races between
/// threads lose a sample, which does not matter.
fn timed(shared: &Shared, api: Api, body: &[u8]) -> Result<Asked, RouteError> {
    let started = Instant::now();
    let asked = read_now(shared, api, body);
    if body.len() >= LEARN_BYTES_MIN {
        let ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let seen = ns.saturating_mul(1024) / body.len() as u64;
        let before = shared.tokenize_ns_per_kib.load(Relaxed);
        shared.tokenize_ns_per_kib.store((before * 7 + seen.min(u64::from(u32::MAX))) / 8, Relaxed);
    }
    asked
}

/// The permit goes with the work, which cannot be stopped once it runs, even if the client goes.
async fn read_elsewhere(shared: &Arc<Shared>, api: Api, body: &Bytes) -> Result<Asked, RouteError> {
    let room = Arc::clone(&shared.tokenize_room).acquire_owned().await;
    let (there, bytes) = (Arc::clone(shared), body.clone());
    let work = tokio::task::spawn_blocking(move || {
        let asked = timed(&there, api, &bytes);
        drop(room);
        asked
    });
    match work.await {
        Ok(asked) => asked,
        // A tokenizer that panics must not take the request with it.
        Err(_) => {
            let parsed = request::parse(api, body)?;
            let model = model_of(shared, &parsed)?;
            complain(shared, &model, &"it panicked");
            Ok(without_tokens(&parsed, model, body.len(), NoTokens::TokenizerFailed))
        }
    }
}

fn read_now(shared: &Shared, api: Api, body: &[u8]) -> Result<Asked, RouteError> {
    let parsed = request::parse(api, body)?;
    let model = model_of(shared, &parsed)?;
    if shared.tokens == TokensNeed::None {
        return Ok(without_tokens(&parsed, model, body.len(), NoTokens::NotNeeded));
    }
    let (tokens, known) = match tokens_of(shared, &model, &parsed) {
        Ok(tokens) => tokens,
        Err(Missing { why, request_at_fault }) => {
            let asked = without_tokens(&parsed, model, body.len(), why);
            return Ok(Asked { request_at_fault, ..asked });
        }
    };
    let (specs, root) = {
        let brain = shared.brain.lock();
        (brain.chain_specs(), brain.root_of(&model))
    };
    let root = match root {
        RootKind::Base => Root::Base,
        RootKind::Adapter => Root::Adapter(&model),
    };
    let extras = PromptExtras { cache_salt: parsed.cache_salt.as_deref(), items: &parsed.items };
    let chains_of = |tokens: &Vec<u32>| PromptChains {
        chains: specs.of(known).iter().map(|spec| chain(*spec, root, tokens, &extras)).collect(),
    };
    let prompts = tokens.iter().map(chains_of).collect();
    let prompt_tokens = tokens.iter().map(Vec::len).sum::<usize>();
    let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    Ok(Asked { prompts, prompt_tokens, known, ..about(&parsed, model) })
}

fn model_of(shared: &Shared, parsed: &RequestBody<'_>) -> Result<String, RouteError> {
    let given = parsed.model.as_deref().filter(|m| !m.is_empty());
    given.or(shared.default_model.as_deref()).map(str::to_owned).ok_or(RouteError::NoModel)
}

fn about(parsed: &RequestBody<'_>, model: String) -> Asked {
    let session_id = parsed.session_id.as_deref().filter(|s| s.len() <= SESSION_ID_BYTES_MAX);
    Asked {
        model,
        max_tokens: parsed.max_tokens,
        skips_cache: parsed.skips_cache,
        session_id: session_id.map(str::to_owned),
        ..Asked::nothing()
    }
}

fn without_tokens(
    parsed: &RequestBody<'_>,
    model: String,
    body_bytes: usize,
    why: NoTokens,
) -> Asked {
    let prompt_tokens = match &parsed.prompt {
        Prompt::TokenIds(prompts) => prompts.iter().map(Vec::len).sum(),
        _ => body_bytes / BYTES_PER_TOKEN,
    };
    Asked {
        prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
        known: TokensKnown::None(why),
        ..about(parsed, model)
    }
}

/// Why a prompt has no tokens here.
struct Missing {
    why: NoTokens,
    /// See [`Asked`].
    request_at_fault: bool,
}

/// The tokens of each prompt: as the engine will see them, or estimated where the plan is content
/// with that or no tokenizer is known for the model.
fn tokens_of(
    shared: &Shared,
    model: &str,
    parsed: &RequestBody<'_>,
) -> Result<(Vec<Vec<u32>>, TokensKnown), Missing> {
    let exact = shared.tokens == TokensNeed::Exact;
    match (&parsed.prompt, tokenizer_of(shared, model).filter(|_| exact)) {
        (Prompt::None(why), _) => Err(failure(shared, model, &TokensError::NoPrompt(*why))),
        (Prompt::TokenIds(prompts), _) => Ok((prompts.clone(), TokensKnown::Exact)),
        (_, Some(tokenizer)) => match tokenizer.tokens_of(parsed) {
            Ok(tokens) => Ok((tokens, TokensKnown::Exact)),
            Err(error) => Err(failure(shared, model, &error)),
        },
        (prompt, None) => Ok((estimate(prompt), TokensKnown::Estimated)),
    }
}

/// The model's own tokenizer, its base model's, or the default.
fn tokenizer_of<'a>(shared: &'a Shared, model: &str) -> Option<&'a Tokenizer> {
    let tokenizers = &shared.tokenizers;
    if tokenizers.by_model.is_empty() {
        return tokenizers.default.as_ref();
    }
    tokenizers.by_model.get(model).or(tokenizers.default.as_ref())
}

/// Some prompts cannot be tokenized here and never could (images), and some never will be
/// (nonsense, which the engine refuses). All are counted; only what lies in the tokenizer deserves
/// a line in the log, because only that will happen to other requests as well.
fn failure(shared: &Shared, model: &str, error: &TokensError) -> Missing {
    let reason = error.reason();
    shared.metrics.tokenize_failures.get_or_create(&ReasonLabel { reason }).inc();
    let why = match error {
        TokensError::NoPrompt(_) => NoTokens::NoPrompt,
        TokensError::TooLarge { .. } => NoTokens::TooLong,
        _ => NoTokens::TokenizerFailed,
    };
    let request_at_fault = error.is_clients_fault();
    if !request_at_fault {
        complain(shared, model, error);
    }
    Missing { why, request_at_fault }
}

/// Says once for each model that its prompts cannot be tokenized; the counter tells how often.
fn complain(shared: &Shared, model: &str, error: &dyn std::fmt::Display) {
    if shared.is_first_complaint(model) {
        warn!(model, %error, "A prompt could not be tokenized; such requests are routed by load.");
    }
}

/// Pseudo tokens of the prompt's text. A conversation counts as the JSON of its tools and
/// messages, which grows at its end from turn to turn like the prompt does.
fn estimate(prompt: &Prompt<'_>) -> Vec<Vec<u32>> {
    let texts: Vec<Cow<'_, [u8]>> = match prompt {
        Prompt::None(_) => Vec::new(),
        Prompt::TokenIds(prompts) => return prompts.clone(),
        Prompt::Texts(texts) => texts.iter().map(|t| Cow::Borrowed(t.as_bytes())).collect(),
        Prompt::Chat(chat) => {
            let mut text = Vec::new();
            for part in [chat.tools, chat.documents].into_iter().flatten() {
                text.extend_from_slice(part.get().as_bytes());
            }
            // Without the closing bracket, which would differ from the next turn's comma.
            let messages = chat.messages.json().trim_end().trim_end_matches(']');
            text.extend_from_slice(messages.as_bytes());
            vec![Cow::Owned(text)]
        }
    };
    texts.iter().map(|text| kvroute_tokens::estimate(text)).collect()
}
