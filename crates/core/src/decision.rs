//! What is asked, and what is answered: a request as the brain sees it, and the decision with its
//! whole explanation.

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Serialize, Serializer};
use smallvec::SmallVec;

use crate::blocks::{Chain, ChainSpec};
use crate::event::Tier;
use crate::fleet::{EndpointId, Name};
use crate::load::Ticket;
use crate::produce::HeldId;
use crate::stage::ResponseHeader;
use crate::stream::StreamState;

/// One prompt of a request: a chain for each spec that [`crate::brain::Brain::chain_specs`] named
/// and that could be computed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptChains {
    /// In any order.
    pub chains: Vec<Chain>,
}

impl PromptChains {
    /// The chain of a spec.
    pub fn get(&self, spec: ChainSpec) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.spec == spec)
    }
}

/// The request headers that scheduling may read; see `Plan::headers`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<'a>(pub &'a [(&'a str, &'a str)]);

impl<'a> Headers<'a> {
    /// No header.
    pub const NONE: &'static Headers<'static> = &Headers(&[]);

    /// The first value of a header; names compare without case.
    pub fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }
}

/// Why there are no token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoTokens {
    /// The plan reads none.
    NotNeeded,
    /// The request has no prompt, or its API is unknown.
    NoPrompt,
    /// No tokenizer for the model, and no estimate wanted.
    NoTokenizer,
    /// The tokenizer or the chat template failed.
    TokenizerFailed,
    /// The prompt exceeds a limit of the tokenizer.
    TooLong,
}

/// What the tokens of a request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokensKnown {
    /// What the engine will see.
    Exact,
    /// Four bytes each.
    Estimated,
    /// There are none.
    None(NoTokens),
}

/// A request, as far as scheduling cares.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Shown in the record.
    pub id: &'a str,
    /// Model or adapter.
    pub model: &'a str,
    /// One entry per prompt.
    pub prompts: &'a [PromptChains],
    /// Tokens of all prompts, counted as `tokens_known` says; an estimate from the length where
    /// there are no tokens.
    pub prompt_tokens: u32,
    /// What the tokens are.
    pub tokens_known: TokensKnown,
    /// Most output tokens, where the client limits them.
    pub max_tokens: Option<u32>,
    /// The engine computes the whole prompt whatever it has cached (`prompt_logprobs`).
    pub skips_cache: bool,
    /// As [`crate::brain::Brain::hold`] named it, once its wait is over.
    pub held: Option<HeldId>,
    /// Multimodal items, in order: one key for each content.
    pub media: &'a [u64],
    /// Below 0: the request may be refused when the fleet is full.
    pub priority: i32,
    /// What scheduling may read.
    pub headers: &'a Headers<'a>,
    /// The only endpoints that may serve it; `None`: all.
    pub allowed: Option<&'a [EndpointId]>,
}

/// Nothing is asked: for requests of which only a part matters.
impl Default for Request<'_> {
    fn default() -> Self {
        Request {
            id: "",
            model: "",
            prompts: &[],
            prompt_tokens: 0,
            tokens_known: TokensKnown::None(NoTokens::NoPrompt),
            max_tokens: None,
            skips_cache: false,
            held: None,
            media: &[],
            priority: 0,
            headers: Headers::NONE,
            allowed: None,
        }
    }
}

/// What a response said about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseEvent {
    /// The first byte of the body.
    FirstChunk,
    /// Token counts, as the engine reports them.
    Usage {
        /// Of all prompts.
        prompt_tokens: u32,
        /// Of those, from the engine's cache. `None`: the engine does not tell.
        cached_tokens: Option<u32>,
        /// Generated so far.
        completion_tokens: u32,
    },
    /// The response is complete.
    End {
        /// HTTP status.
        status: u16,
    },
    /// The response stopped early, or never came.
    Aborted,
}

/// How much is known about where a prompt is cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// From the engine's own events.
    Precise,
    /// From what was routed there, wholly or in part.
    Approximate,
    /// Nothing: only load counts.
    #[default]
    LoadOnly,
}

/// Why the knowledge is what it is. Each is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The event stream is complete.
    EventsLive,
    /// The configuration asks for routing history.
    HistoryConfigured,
    /// Only estimated tokens: they never match an engine's blocks.
    TokensEstimated,
    /// The endpoint has no event stream.
    EventsNotExpected,
    /// The stream has not spoken yet.
    StreamInitial,
    /// A gap is being filled.
    StreamReplaying,
    /// The stream is known to be incomplete.
    StreamSuspect,
    /// The engine delivers less than its events promise.
    Drift,
    /// The engine counts other prompt tokens than the router: its tokenizer or chat template is
    /// not the one that the router was given.
    PromptDiffers,
    /// The configuration places requests that arrive together, whatever is cached.
    BurstPlaced,
    /// The configuration has no prefix scoring.
    #[default]
    NotConfigured,
    /// The request has no prompt.
    NoPrompt,
    /// No tokenizer for the model.
    NoTokenizer,
    /// The tokenizer failed.
    TokenizerFailed,
    /// The prompt exceeds a limit of the tokenizer.
    PromptTooLong,
    /// The request came without the chain of the endpoint's block size.
    NoChain,
}

impl Reason {
    /// All, in the order of `index()`.
    pub const ALL: [Reason; 16] = [
        Reason::EventsLive,
        Reason::HistoryConfigured,
        Reason::TokensEstimated,
        Reason::EventsNotExpected,
        Reason::StreamInitial,
        Reason::StreamReplaying,
        Reason::StreamSuspect,
        Reason::Drift,
        Reason::PromptDiffers,
        Reason::BurstPlaced,
        Reason::NotConfigured,
        Reason::NoPrompt,
        Reason::NoTokenizer,
        Reason::TokenizerFailed,
        Reason::PromptTooLong,
        Reason::NoChain,
    ];

    /// Position in per-reason arrays.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The mode that it explains.
    pub fn mode(self) -> Mode {
        match self {
            Reason::EventsLive => Mode::Precise,
            Reason::HistoryConfigured
            | Reason::TokensEstimated
            | Reason::EventsNotExpected
            | Reason::StreamInitial
            | Reason::StreamReplaying
            | Reason::StreamSuspect
            | Reason::Drift
            | Reason::PromptDiffers
            | Reason::BurstPlaced => Mode::Approximate,
            Reason::NotConfigured
            | Reason::NoPrompt
            | Reason::NoTokenizer
            | Reason::TokenizerFailed
            | Reason::PromptTooLong
            | Reason::NoChain => Mode::LoadOnly,
        }
    }

    /// The name in metrics and records.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::EventsLive => "events-live",
            Reason::HistoryConfigured => "history-configured",
            Reason::TokensEstimated => "tokens-estimated",
            Reason::EventsNotExpected => "events-not-expected",
            Reason::StreamInitial => "stream-initial",
            Reason::StreamReplaying => "stream-replaying",
            Reason::StreamSuspect => "stream-suspect",
            Reason::Drift => "drift",
            Reason::PromptDiffers => "prompt-differs",
            Reason::BurstPlaced => "burst-placed",
            Reason::NotConfigured => "not-configured",
            Reason::NoPrompt => "no-prompt",
            Reason::NoTokenizer => "no-tokenizer",
            Reason::TokenizerFailed => "tokenizer-failed",
            Reason::PromptTooLong => "prompt-too-long",
            Reason::NoChain => "no-chain",
        }
    }
}

impl Mode {
    /// The name in metrics and records.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Precise => "precise",
            Mode::Approximate => "approximate",
            Mode::LoadOnly => "load-only",
        }
    }
}

impl From<NoTokens> for Reason {
    fn from(why: NoTokens) -> Reason {
        match why {
            NoTokens::NotNeeded => Reason::NotConfigured,
            NoTokens::NoPrompt => Reason::NoPrompt,
            NoTokens::NoTokenizer => Reason::NoTokenizer,
            NoTokens::TokenizerFailed => Reason::TokenizerFailed,
            NoTokens::TooLong => Reason::PromptTooLong,
        }
    }
}

/// Why no endpoint was chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reject {
    /// There is none that may serve it.
    #[error("no endpoint can serve the request: {why}")]
    NoEndpoints {
        /// What is missing.
        why: NoEndpoints,
    },
    /// A filter removed the last candidate.
    #[error("filter {filter:?} left no endpoint of {candidates}; retry later")]
    Saturated {
        /// Its name.
        filter: Name,
        /// How many it was given.
        candidates: u32,
    },
    /// A screener removed the last candidate.
    #[error("screener {screener:?} left no endpoint of {candidates}")]
    Screened {
        /// Its name.
        screener: Name,
        /// How many it was given.
        candidates: u32,
    },
    /// The fleet is full, and the request's priority is below 0.
    #[error("system saturated, sheddable request dropped")]
    Shed,
    /// An admitter refused the request.
    #[error("request cannot be admitted: {why} ({admitter})")]
    NotAdmitted {
        /// Its name.
        admitter: Name,
        /// In words.
        why: String,
    },
    /// The request names a profile that does not exist.
    #[error("there is no scheduling profile {name:?}; header {header} must name one of: {names}")]
    NoProfile {
        /// What it names.
        name: String,
        /// In which header.
        header: String,
        /// The profiles that there are.
        names: String,
    },
    /// The request wants an endpoint that has some of its prompt cached, or none.
    #[error(
        "endpoint {endpoint:?} has nothing of the prompt cached, and the request prefers none \
             then (prefer: if-available)"
    )]
    NotCached {
        /// Who would have served it.
        endpoint: Name,
    },
    /// The router has reached its limit.
    #[error("{requests_max} requests are in flight, the router's limit; retry later")]
    TooManyInFlight {
        /// `kvroute.inflight_requests_max`.
        requests_max: u32,
    },
}

/// What is missing when there is no candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NoEndpoints {
    /// Discovery has found none.
    #[error("the fleet is empty")]
    EmptyFleet,
    /// None of those that the request allows is in the fleet.
    #[error("none of the endpoints that the request allows is in the fleet")]
    NoneAllowed,
}

impl Reject {
    /// HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Reject::NoEndpoints { .. } | Reject::Screened { .. } => 503,
            Reject::NoProfile { .. } => 400,
            Reject::NotCached { .. } => 412,
            Reject::Saturated { .. }
            | Reject::TooManyInFlight { .. }
            | Reject::Shed
            | Reject::NotAdmitted { .. } => 429,
        }
    }

    /// Value of `x-llm-d-request-dropped-reason`, and metrics label.
    pub fn dropped_reason(&self) -> &'static str {
        match self {
            Reject::NoEndpoints { .. } | Reject::Screened { .. } => "rejected-no-endpoints",
            Reject::NoProfile { .. } => "rejected-other",
            Reject::NotCached { .. } => "not-cached",
            Reject::Saturated { .. }
            | Reject::TooManyInFlight { .. }
            | Reject::Shed
            | Reject::NotAdmitted { .. } => "rejected-saturated",
        }
    }
}

/// A few endpoints, in order.
pub type Endpoints = SmallVec<[EndpointId; 4]>;

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// Names the reservation; the host reports the response with it.
    pub ticket: Ticket,
    /// Who serves the request.
    pub endpoint: EndpointId,
    /// Who else may, next best first: for retries.
    pub fallback: Endpoints,
    /// Headers that plugins want on the response.
    pub response_headers: Vec<ResponseHeader>,
    /// Headers that tell the endpoint who else works for the request.
    pub request_headers: Vec<RequestHeader>,
    /// The port of the chosen host that the request goes to, when not the endpoint's own; then
    /// the endpoint's own address stands in `x-data-parallel-host-port`.
    pub primary_port: Option<u16>,
    /// Why.
    pub record: DecisionRecord,
}

/// A header on the request to the endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RequestHeader {
    /// Lower case.
    pub name: &'static str,
    /// The value.
    pub value: String,
}

/// Where the decode endpoint has the prompt computed: `host:port`, comma-separated.
pub const PREFILLER_HEADER: &str = "x-prefiller-host-port";
/// Where it has images, audio and video encoded.
pub const ENCODERS_HEADER: &str = "x-encoder-hosts-ports";
/// From whom it takes cached blocks.
pub const KV_SOURCE_HEADER: &str = "x-kv-cache-source-host-port";
/// Request header of preferences (RFC 7240): with `if-available`, a request that nothing of is
/// cached is refused.
pub const PREFER_HEADER: &str = "prefer";
/// The chosen rank, where one port takes the requests of all.
pub const DATA_PARALLEL_HEADER: &str = "x-data-parallel-host-port";

/// Why a request went where it went. The score matrix that decided is the one that is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DecisionRecord {
    /// The client's or the router's id.
    pub request_id: String,
    /// Seconds since the host's origin of time.
    pub at_s: f64,
    /// Model or adapter.
    pub model: String,
    /// Profile that ran.
    pub profile: Name,
    /// Who serves it.
    pub endpoint: Name,
    /// Knowledge about the chosen endpoint.
    pub mode: Mode,
    /// Why no better.
    pub reason: Reason,
    /// Candidates whose knowledge is worse than precise, where the plan wants precise knowledge.
    pub candidates_degraded: u32,
    /// Tokens of all prompts.
    pub prompt_tokens: u32,
    /// Best predicted hit among the candidates, in tokens.
    pub available_tokens: u32,
    /// Predicted hit on the chosen one, in tokens.
    pub chosen_tokens: u32,
    /// Seed of the decision's random choices (ties, exploration), as hexadecimal text.
    #[serde(serialize_with = "hexadecimal")]
    pub seed: u64,
    /// Candidates with exactly the best total.
    pub tied: u32,
    /// Total of the chosen one less the best of the others; `None` when it was alone.
    pub margin: Option<f64>,
    /// Stages that removed candidates or could have, in order, built-in ones first.
    pub filters: Vec<FilterRecord>,
    /// Every endpoint that was considered, by name.
    pub candidates: Vec<Candidate>,
    /// Scores of those that no filter removed.
    pub scores: ScoreMatrix,
    /// The other profiles that ran, in order: who works for the request before it is answered.
    pub others: Vec<ProfileRecord>,
    /// Headers for the endpoint.
    pub request_headers: Vec<RequestHeader>,
}

/// What one profile beside the primary one concluded.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProfileRecord {
    /// The profile.
    pub profile: Name,
    /// The part of the work: `prefill` or `encode`.
    pub step: &'static str,
    /// Whom it chose.
    pub endpoint: Option<Name>,
    /// Why nobody.
    pub failed: Option<String>,
    /// As in [`DecisionRecord`].
    pub tied: u32,
    /// As in [`DecisionRecord`].
    pub margin: Option<f64>,
    /// As in [`DecisionRecord`].
    pub filters: Vec<FilterRecord>,
    /// Who removed whom.
    pub removed: Vec<RemovedRecord>,
    /// As in [`DecisionRecord`].
    pub scores: ScoreMatrix,
}

/// A candidate that a filter removed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RemovedRecord {
    /// The candidate.
    pub endpoint: Name,
    /// The filter.
    pub by: Name,
}

impl ProfileRecord {
    fn bytes(&self) -> usize {
        size_of::<ProfileRecord>()
            + self.failed.as_ref().map_or(0, String::capacity)
            + self.filters.capacity() * size_of::<FilterRecord>()
            + self.removed.capacity() * size_of::<RemovedRecord>()
            + self.scores.bytes()
    }
}

impl DecisionRecord {
    /// Memory of the record, for a store that is bounded by bytes. An estimate from above for
    /// what the record alone owns.
    pub fn bytes(&self) -> usize {
        size_of::<DecisionRecord>()
            + self.request_id.capacity()
            + self.model.capacity()
            + self.filters.capacity() * size_of::<FilterRecord>()
            + self.candidates.capacity() * size_of::<Candidate>()
            + self.scores.bytes()
            + self.others.iter().map(ProfileRecord::bytes).sum::<usize>()
            + self.request_headers.iter().map(|h| size_of_val(h) + h.value.len()).sum::<usize>()
    }
}

fn hexadecimal<S: Serializer>(seed: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{seed:016x}"))
}

/// What one filter did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FilterRecord {
    /// The filter; built-in ones are `kvroute:failing` and `kvroute:model`.
    pub name: Name,
    /// Candidates before.
    pub candidates: u32,
    /// Candidates after.
    pub kept: u32,
}

/// What was known about one candidate.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Candidate {
    /// The endpoint.
    pub endpoint: Name,
    /// The filter that removed it.
    pub removed_by: Option<Name>,
    /// Why the knowledge about its cache is what it is.
    pub reason: Reason,
    /// Its event stream.
    pub stream: StreamState,
    /// Its cache, as the plan's main producer sees it.
    pub hit: HitRecord,
    /// Its load.
    pub load: LoadRecord,
}

/// What one producer found on one endpoint, over all prompts, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct HitRecord {
    /// Tokens per block.
    pub block_size: u32,
    /// Blocks of the prompts.
    pub blocks: u32,
    /// Matched blocks: what scorers saw.
    pub matched: u32,
    /// The same, weighted by tier.
    pub matched_weighted: f64,
    /// Tokens that the engine is expected to take from its cache: `matched`, without the last
    /// token of a prompt, which is always computed.
    pub predicted_tokens: u32,
    /// Matched by the engine's events alone.
    pub resident: u32,
    /// Of those, contiguous in one tier.
    #[serde(serialize_with = "by_tier")]
    pub by_tier: [u32; 4],
    /// With blocks of requests on their way.
    pub expected: u32,
    /// By routing history.
    pub history: u32,
}

fn by_tier<S: Serializer>(blocks: &[u32; 4], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(Tier::ALL.iter().map(|tier| (tier.as_str(), blocks[tier.index()])))
}

/// The load of one endpoint at the moment of the decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LoadRecord {
    /// Requests of this router in flight.
    pub inflight_requests: u32,
    /// Tokens of this router in flight.
    pub inflight_tokens: u64,
    /// Prompt tokens of this request that it would compute.
    pub uncached_tokens: u32,
    /// Requests queued in the engine; `None`: metrics missing or stale.
    pub waiting: Option<u32>,
    /// Requests being computed.
    pub running: Option<u32>,
    /// Share of KV blocks in use.
    pub kv_usage: Option<f64>,
    /// Age of the metrics, stale ones included; `None`: never scraped.
    pub metrics_age_s: Option<f64>,
}

/// Scores: one row per endpoint, one column per scorer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScoreMatrix {
    /// The scorers.
    pub columns: Vec<ScoreColumn>,
    /// The endpoints, by name.
    pub rows: Vec<ScoreRow>,
    /// Raw scores, row by row; NaN: no data.
    pub raw: Vec<f64>,
}

/// A scorer and what it counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ScoreColumn {
    /// Name of the plugin.
    pub name: Name,
    /// Factor of its scores.
    pub weight: f64,
}

/// An endpoint and its sum.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ScoreRow {
    /// The endpoint.
    pub endpoint: Name,
    /// Sum of contributions.
    pub total: f64,
}

/// One score and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// As the scorer wrote it; `null` in JSON: no data.
    pub raw: f64,
    /// `raw` within 0 to 1, times the weight; 0 without data.
    pub contribution: f64,
    /// `raw` was outside 0 to 1.
    pub clamped: bool,
}

impl Score {
    /// The rule of the sum.
    pub fn of(raw: f64, weight: f64) -> Score {
        let within = if raw.is_nan() { 0.0 } else { raw.clamp(0.0, 1.0) };
        let clamped = !raw.is_nan() && within != raw;
        Score { raw, contribution: within * weight, clamped }
    }
}

impl ScoreMatrix {
    /// One cell.
    pub fn score(&self, row: usize, column: usize) -> Option<Score> {
        let weight = self.columns.get(column)?.weight;
        let raw = self.raw.get(row * self.columns.len() + column)?;
        Some(Score::of(*raw, weight))
    }

    fn bytes(&self) -> usize {
        self.columns.capacity() * size_of::<ScoreColumn>()
            + self.rows.capacity() * size_of::<ScoreRow>()
            + self.raw.capacity() * size_of::<f64>()
    }
}

/// As a list of rows, each with its total and a map from scorer to score.
impl Serialize for ScoreMatrix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rows = serializer.serialize_seq(Some(self.rows.len()))?;
        for row in 0..self.rows.len() {
            rows.serialize_element(&MatrixRow { matrix: self, row })?;
        }
        rows.end()
    }
}

struct MatrixRow<'a> {
    matrix: &'a ScoreMatrix,
    row: usize,
}

#[derive(Serialize)]
struct MatrixCell<'a> {
    scorer: &'a Name,
    weight: f64,
    #[serde(flatten)]
    score: Score,
}

impl Serialize for MatrixRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let MatrixRow { matrix, row } = self;
        let cells: Vec<MatrixCell<'_>> = matrix
            .columns
            .iter()
            .enumerate()
            .filter_map(|(at, column)| {
                let score = matrix.score(*row, at)?;
                Some(MatrixCell { scorer: &column.name, weight: column.weight, score })
            })
            .collect();
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("endpoint", &matrix.rows[*row].endpoint)?;
        map.serialize_entry("total", &matrix.rows[*row].total)?;
        map.serialize_entry("scores", &cells)?;
        map.end()
    }
}
