//! Where would a request go, and why? The path of a request up to its decision, on a copy of what
//! the brain knows: nothing is reserved, forwarded or noted.
//!
//! The same code answers in a running router, and offline from a snapshot of one.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use kvroute_core::blocks::{ChainSpec, TokenSpace};
use kvroute_core::brain::{Brain, Snapshot, SnapshotError, SnapshotHost};
use kvroute_core::decision::{Decision, DecisionRecord, Headers, Reject, TokensKnown};
use kvroute_core::{EndpointId, Time};
use kvroute_wire::parsers::request_path;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{mpsc, watch};

use crate::config::RouterConfig;
use crate::error::RouteError;
use crate::headers;
use crate::route::{self, Candidate};
use crate::shared::{Phase, Shared};
use crate::tokenize::{self, Asked};

/// Shown in place of a request id.
const REQUEST_ID: &str = "explain";
/// In the list of tokenizers of a snapshot: for all models that are not named.
const ALL_MODELS: &str = "*";

/// What the router made of a request's prompts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PromptRecord {
    /// The model that the request named, where another one serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewritten_from: Option<String>,
    /// Characters of the text that was tokenized, template included; of estimated tokens those of
    /// the text that was counted. `None`: there was no text.
    pub rendered_chars: Option<u64>,
    /// Prompts of the request.
    pub prompts: u32,
    /// Tokens of all prompts.
    pub tokens: u32,
    /// What the tokens are.
    pub known: Option<TokensKnown>,
    /// Blocks that were looked up, one for each size and kind of tokens.
    pub blocks: Vec<BlocksRecord>,
}

/// Blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BlocksRecord {
    /// Tokens per block.
    pub block_size: u32,
    /// What the tokens are.
    pub space: TokenSpace,
    /// Blocks of all prompts.
    pub blocks: u64,
}

impl PromptRecord {
    pub(crate) fn of(asked: &Asked) -> PromptRecord {
        PromptRecord::default().of_another(asked)
    }

    /// The same in the memory of a record that nobody needs any more.
    pub(crate) fn of_another(self, asked: &Asked) -> PromptRecord {
        let mut blocks = self.blocks;
        blocks.clear();
        for chain in asked.prompts.iter().flat_map(|prompt| &prompt.chains) {
            let (ChainSpec { block_size, space, .. }, keys) = (chain.spec, chain.keys.len() as u64);
            let is_this = |b: &&mut BlocksRecord| (b.block_size, b.space) == (block_size, space);
            match blocks.iter_mut().find(is_this) {
                Some(record) => record.blocks += keys,
                None => blocks.push(BlocksRecord { block_size, space, blocks: keys }),
            }
        }
        blocks.sort_unstable_by_key(|record| (record.block_size, record.space));
        let rewrite = asked.rewrite.as_ref().filter(|rewrite| rewrite.changes());
        PromptRecord {
            rewritten_from: rewrite.map(|rewrite| rewrite.from.clone()),
            rendered_chars: asked.rendered_chars,
            prompts: u32::try_from(asked.prompts.len()).unwrap_or(u32::MAX),
            tokens: asked.prompt_tokens,
            known: Some(asked.known),
            blocks,
        }
    }
}

/// Why a request would be refused.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RejectRecord {
    /// HTTP status.
    pub status: u16,
    /// Value of `x-llm-d-request-dropped-reason`.
    pub reason: &'static str,
    /// In words.
    pub message: String,
}

/// Where a request would go.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explained {
    /// What its prompts are.
    pub prompt: PromptRecord,
    /// The decision; `None`: it would be refused.
    pub decision: Option<DecisionRecord>,
    /// Why.
    pub rejected: Option<RejectRecord>,
    /// Who else may serve it, next best first.
    pub fallback: Vec<String>,
    /// What the real decision reads and this one could not, in words.
    pub left_out: Vec<String>,
}

/// A request to explain.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The path that the client would post to; `None`: what the body looks like.
    pub path: Option<String>,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The client's body.
    pub body: Bytes,
    /// Seed of the decision; `None`: that of the next one.
    pub seed: Option<u64>,
}

/// Why a request cannot be explained.
#[derive(Debug, Error)]
pub enum ExplainError {
    /// A real one would not have been routed either.
    #[error("the request would be refused before it is routed: {0}")]
    Request(String),
    /// The snapshot is of no use.
    #[error("the snapshot cannot be used: {0}")]
    Snapshot(#[from] SnapshotError),
    /// No state to decide in.
    #[error("{0}")]
    Start(String),
}

/// The path that a body is usually posted to.
pub fn path_of(body: &[u8]) -> &'static str {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Shape {
        messages: Option<IgnoredAny>,
        prompt: Option<IgnoredAny>,
        input: Option<IgnoredAny>,
        token_ids: Option<IgnoredAny>,
    }
    match serde_json::from_slice::<Shape>(body).unwrap_or_default() {
        Shape { messages: Some(_), .. } => "/v1/chat/completions",
        Shape { prompt: None, input: Some(_), .. } => "/v1/responses",
        Shape { prompt: None, token_ids: Some(_), .. } => "/inference/v1/generate",
        _ => "/v1/completions",
    }
}

/// Decides about a request on a copy of what the brain knows at `now`.
pub(crate) async fn explain(
    shared: &Arc<Shared>,
    now: Time,
    question: Question,
) -> Result<Explained, RouteError> {
    let Question { path, headers: mut client, body, seed } = question;
    headers::strip(&mut client);
    let header = |name: &str| client.get(name).and_then(|value| value.to_str().ok());
    let path = path.as_deref().unwrap_or_else(|| path_of(&body));
    let api = shared.parsers.resolve(request_path(path, header))?;
    if api.is_grpc() {
        return Err(RouteError::Grpc(api.as_str()));
    }
    let asked = match api {
        api if !shared.rewriter.reads_body(api, &client) => Asked::nothing(),
        api => tokenize::read(shared, api, &body, tokenize::Hints::of_explained(&client)).await?,
    };
    let prompt = PromptRecord::of(&asked);
    let seen = route::scheduling_headers(shared, &client, &asked);
    let seen = Headers(&seen);
    let candidate =
        Candidate { request_id: REQUEST_ID, asked: &asked, headers: &client, allowed: None };
    let request = route::scheduled(shared, &candidate, &seen, None);
    let (plan, snapshot, seed) = {
        let brain = shared.brain.lock();
        let seed = seed.unwrap_or_else(|| brain.next_seed());
        (brain.plan().clone(), brain.snapshot_for(now, &request), seed)
    };
    let mut copy = Brain::restore(plan, &snapshot, seed)
        .expect("a snapshot that was just taken has this format and no contradictions");
    let decided = copy.decide(now, &request);
    let fallback = decided.as_ref().map_or(Vec::new(), |d| names(&copy, &d.fallback));
    Ok(explained(prompt, decided, snapshot.left_out, fallback))
}

fn names(brain: &Brain, ids: &[EndpointId]) -> Vec<String> {
    ids.iter().filter_map(|id| brain.fleet().get(*id)).map(|e| e.name.to_string()).collect()
}

fn explained(
    prompt: PromptRecord,
    decided: Result<Decision, Reject>,
    left_out: Vec<String>,
    fallback: Vec<String>,
) -> Explained {
    let (decision, rejected) = match decided {
        Ok(decision) => (Some(decision.record), None),
        Err(reject) => {
            let (status, reason) = (reject.status(), reject.dropped_reason());
            (None, Some(RejectRecord { status, reason, message: reject.to_string() }))
        }
    };
    Explained { prompt, decision, rejected, fallback, left_out }
}

/// Why there is no snapshot.
#[derive(Debug, Error)]
#[error(
    "the fleet's snapshot would take about {bytes} bytes, more than {bytes_max} \
     (kvroute.snapshot_bytes_max); raise the limit, or explain one request (POST /explain)"
)]
pub(crate) struct TooLarge {
    bytes: usize,
    bytes_max: usize,
}

/// Everything that the router decides by. The brain is locked for one endpoint's blocks at a time,
/// so these are of moments that lie some milliseconds apart.
pub(crate) fn snapshot(shared: &Shared) -> Result<Snapshot, TooLarge> {
    let bytes_max = shared.settings.snapshot_bytes_max;
    let fits = |bytes: usize| match bytes <= bytes_max {
        true => Ok(()),
        false => Err(TooLarge { bytes, bytes_max }),
    };
    let mut snapshot = {
        let brain = shared.brain.lock();
        fits(brain.snapshot_bytes())?;
        brain.snapshot_without_blocks(shared.clock.now())
    };
    for endpoint in &mut snapshot.endpoints {
        endpoint.blocks = shared.brain.lock().snapshot_blocks(endpoint.endpoint.id);
    }
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let tokenizers = &shared.tokenizers;
    let default = tokenizers.default.iter().map(|_| ALL_MODELS.to_owned());
    snapshot.host = SnapshotHost {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config: shared.config.clone(),
        taken_unix_s: since_epoch.map_or(0.0, |d| d.as_secs_f64()),
        default_model: shared.default_model.clone(),
        tokenizers: tokenizers.by_model.keys().cloned().chain(default).collect(),
    };
    fits(snapshot.bytes())?;
    Ok(snapshot)
}

/// A router that only explains, as of the moment of a snapshot. It has no sockets.
pub struct Offline {
    shared: Arc<Shared>,
    snapshot: Snapshot,
}

impl Offline {
    /// From a configuration, of which plan, tokenizers and model count, and a snapshot.
    ///
    /// # Errors
    /// The snapshot is of another format, or its endpoints contradict each other.
    pub fn new(config: RouterConfig, snapshot: Snapshot) -> Result<Offline, ExplainError> {
        let brain = Brain::restore(config.plan.clone(), &snapshot, snapshot.next_seed)?;
        let config = RouterConfig { record: None, ..config };
        let (scraper, _) = mpsc::unbounded_channel();
        let (phase, _) = watch::channel(Phase::Stopped);
        let shared = crate::share(config, phase, scraper)
            .map_err(|error| ExplainError::Start(error.to_string()))?;
        *shared.brain.lock() = brain;
        Ok(Offline { shared: Arc::new(shared), snapshot })
    }

    /// Where a request would have gone then.
    ///
    /// # Errors
    /// The request is one that a router refuses before it routes: its body, or no model.
    pub async fn explain(&self, question: Question) -> Result<Explained, ExplainError> {
        let explained = explain(&self.shared, self.snapshot.at, question).await;
        let mut explained = explained.map_err(|e| ExplainError::Request(e.to_string()))?;
        let known = |what: &String| !explained.left_out.contains(what);
        let lost: Vec<String> =
            self.snapshot.left_out.iter().filter(|w| known(w)).cloned().collect();
        explained.left_out.extend(lost);
        Ok(explained)
    }
}

/// A header as typed: `name: value`.
///
/// # Errors
/// What is wrong, in words.
pub fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let wrong = || format!("`{text}` is not a header; write 'name: value'");
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    let name = name.trim().parse().map_err(|_| wrong())?;
    Ok((name, value.trim().parse().map_err(|_| wrong())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_tell_their_path() {
        let table = [
            (r#"{"messages": []}"#, "/v1/chat/completions"),
            (r#"{"prompt": "x"}"#, "/v1/completions"),
            (r#"{"input": "x"}"#, "/v1/responses"),
            (r#"{"token_ids": [1]}"#, "/inference/v1/generate"),
            (r#"{}"#, "/v1/completions"),
            ("nonsense", "/v1/completions"),
        ];
        for (body, path) in table {
            assert_eq!(path_of(body.as_bytes()), path, "{body}");
        }
    }

    #[test]
    fn headers_as_typed() {
        let (name, value) = header("X-Session-Id:  a b ").unwrap();
        assert_eq!((name.as_str(), value.to_str().unwrap()), ("x-session-id", "a b"));
        for wrong in ["x", ": y", "a b: c", "x: \u{7f}\n"] {
            assert!(header(wrong).unwrap_err().contains("name: value"), "{wrong:?}");
        }
    }
}
