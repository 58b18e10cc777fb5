//! What does a plugin see, and what must it answer?
//!
//! Small traits: a filter clears bits of a mask, a scorer writes one column, a picker orders rows.
//! All run inside one decision, synchronously, on slices that the pipeline owns.

use crate::cost::Costing;
use crate::decision::Request;
use crate::fleet::{Endpoint, EndpointId, Fleet, Name};
use crate::load::Load;
use crate::memory::Memory;
use crate::plugin::Role;
use crate::settings::Settings;
use crate::{Rng, Time};

/// The load signals of an endpoint, from metrics that are not stale.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Signals {
    /// Requests queued in the engine.
    pub waiting: u32,
    /// Requests being computed.
    pub running: u32,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_usage: f64,
}

/// How much of the request's prompts one producer finds on one endpoint, over all prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrefixMatch {
    /// Matched blocks, each by the weight of its tier.
    pub weighted: f64,
    /// Matched blocks.
    pub blocks: u32,
    /// Blocks of the prompts; 0: nothing is known (no tokens, or prompts below one block).
    pub total: u32,
    /// Tokens per block.
    pub block_size: u32,
}

impl PrefixMatch {
    /// Weighted share of the prompts that matched, 0 to 1.
    pub fn ratio(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.weighted / f64::from(self.total) }
    }
}

/// One endpoint that is still a candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// The endpoint.
    pub id: EndpointId,
    /// Its position among all candidates of the request; columns of the producers go by it.
    pub at: u32,
    /// `None`: never scraped, or stale.
    pub signals: Option<Signals>,
    /// What this router has in flight there.
    pub inflight: Load,
    /// Prompt tokens that the endpoint would have to compute.
    pub uncached_tokens: u32,
    /// What a cost is made of; all zero unless the plan has a scorer that reads it.
    pub costing: Costing,
    /// What is expected of the request there; `None`: nothing reads it, or nothing is known.
    pub latency: Option<Latency>,
}

/// How fast an endpoint is expected to serve the request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    /// Seconds to the first token.
    pub ttft_s: f64,
    /// Seconds per further token.
    pub tpot_s: f64,
    /// What is left of the client's limit for the first token, seconds; negative: it would be
    /// missed.
    pub ttft_headroom_s: f64,
    /// The same for further tokens.
    pub tpot_headroom_s: f64,
}

impl Latency {
    /// Whether the request's limits are expected to hold.
    pub fn is_in_time(&self) -> bool {
        self.ttft_headroom_s >= 0.0 && self.tpot_headroom_s >= 0.0
    }
}

/// How many of the request's multimodal items an endpoint holds encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MediaMatch {
    /// Size of the items that it holds.
    pub matched: u64,
    /// Size of all items of the request; 0: there are none.
    pub total: u64,
}

/// Everything a stage may read about one request.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The moment of the decision.
    pub now: Time,
    /// The request.
    pub request: &'a Request<'a>,
    /// Names, labels, metrics.
    pub fleet: &'a Fleet,
    /// Candidates left, by endpoint name.
    pub rows: &'a [Row],
    /// Matches of the producer that the stage asked for, by `Row::at`; empty when it asked for
    /// none.
    pub prefix: &'a [PrefixMatch],
    /// The same for multimodal items.
    pub media: &'a [MediaMatch],
    /// The sessions that producers found, by the producer's name.
    pub sessions: &'a [(Name, String)],
    /// The profile that runs; empty outside of profiles.
    pub profile: &'a str,
    /// The endpoint that an earlier profile chose for the same request.
    pub peer: Option<&'a Endpoint>,
}

impl View<'_> {
    /// The match on one candidate.
    pub fn prefix(&self, row: &Row) -> PrefixMatch {
        self.prefix.get(row.at as usize).copied().unwrap_or_default()
    }

    /// The multimodal items on one candidate.
    pub fn media(&self, row: &Row) -> MediaMatch {
        self.media.get(row.at as usize).copied().unwrap_or_default()
    }

    /// The session that a producer found.
    pub fn session(&self, producer: &str) -> Option<&str> {
        let mut found = self.sessions.iter().filter(|(name, _)| name.as_str() == producer);
        found.next().map(|(_, id)| id.as_str())
    }

    /// The table entry of one candidate.
    pub fn endpoint(&self, row: &Row) -> Option<&Endpoint> {
        self.fleet.get(row.id)
    }
}

/// What a plugin must be given; the plan creates missing producers from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inputs<'a> {
    /// Prefix matches: of the named producer, or of the default one.
    pub prefix: Option<ProducerRef<'a>>,
    /// In-flight requests and tokens: of the named producer, or of the default one.
    pub load: Option<ProducerRef<'a>>,
    /// Predicted latencies: of the named producer, or of the default one.
    pub latency: Option<ProducerRef<'a>>,
    /// Multimodal items in encoder caches: of the named producer, or of the default one.
    pub media: Option<ProducerRef<'a>>,
    /// The request's session: of the named producer, or of the default one.
    pub session: Option<ProducerRef<'a>>,
    /// How many tokens the prompt has, or which multimodal items it holds.
    pub tokens: bool,
}

/// Which producer a plugin reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProducerRef<'a> {
    /// The producer of this name.
    Named(&'a str),
    /// The default type, which is created when it is not configured.
    Default(&'static str),
}

impl<'a> ProducerRef<'a> {
    /// The reference of an optional `...ProducerName` parameter.
    pub fn of(name: &'a Option<String>, default: &'static str) -> ProducerRef<'a> {
        match name.as_deref() {
            Some(name) if !name.is_empty() => ProducerRef::Named(name),
            _ => ProducerRef::Default(default),
        }
    }

    /// The name either way: a default producer is called like its type.
    pub fn name(self) -> &'a str {
        match self {
            ProducerRef::Named(name) => name,
            ProducerRef::Default(name) => name,
        }
    }
}

/// Type name of the default producer of prefix matches.
pub const PREFIX_DEFAULT: &str = "approx-prefix-cache-producer";
/// Type name of the default producer of in-flight load.
pub const LOAD_DEFAULT: &str = "inflight-load-producer";
/// Type name of the default producer of predicted latencies.
pub const LATENCY_DEFAULT: &str = "predicted-latency-producer";
/// Type name of the default producer of encoder cache matches.
pub const MEDIA_DEFAULT: &str = "mm-embeddings-cache-producer";
/// Type name of the default producer of session ids.
pub const SESSION_DEFAULT: &str = "session-id-producer";

/// A header that a plugin wants on the response.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ResponseHeader {
    /// Lower case.
    pub name: String,
    /// The value.
    pub value: String,
}

/// What happened to the request that a stage has just seen.
#[derive(Clone, Copy, Debug)]
pub struct Picked<'a> {
    /// The moment of the decision.
    pub now: Time,
    /// Whom the profile chose.
    pub endpoint: &'a Endpoint,
    /// The request.
    pub request: &'a Request<'a>,
    /// The sessions that producers found, by the producer's name.
    pub sessions: &'a [(Name, String)],
    /// The profile that chose it.
    pub profile: &'a str,
    /// Whether that endpoint answers the client; else it does a part of the work before.
    pub primary: bool,
}

/// A plugin that another one names in its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference<'a> {
    /// Where in the parameters, as `deciders.prefill`.
    pub path: &'static str,
    /// The name of the other plugin.
    pub name: &'a str,
    /// What the other must be able to do.
    pub role: Role,
}

/// What every plugin tells about its parameters, and what those with state are told.
pub trait Plugin {
    /// What it must be given.
    fn inputs(&self) -> Inputs<'_> {
        Inputs::default()
    }

    /// Why its parameters make no sense, in words for the user; the first word is the field.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Request headers that it reads, lower case.
    fn headers(&self) -> Vec<String> {
        Vec::new()
    }

    /// Other plugins that its parameters name.
    fn references(&self) -> Vec<Reference<'_>> {
        Vec::new()
    }

    /// Parameters that were given and change nothing here, in words for the user.
    fn inert(&self) -> Vec<String> {
        Vec::new()
    }

    /// Told once, before the first decision.
    fn prepare(&mut self, _settings: &Settings) {}

    /// The decision that followed the last run of this profile. Told to the plugins of a profile
    /// that chose.
    fn picked(&mut self, _picked: &Picked<'_>) -> Option<ResponseHeader> {
        None
    }

    /// The endpoint has left the fleet.
    fn forget(&mut self, _id: EndpointId) {}

    /// What its answers depend on besides the request and the fleet. A plugin that remembers
    /// anything must say so here: a snapshot without it would explain another decision.
    fn memory(&self) -> Memory {
        Memory::Nothing
    }

    /// Takes up again what [`Plugin::memory`] told; what it never tells changes nothing.
    fn recall(&mut self, _memory: &Memory) {}
}

/// Removes candidates.
pub trait Filter: Plugin + Send {
    /// Clears `keep[i]` for each `view.rows[i]` that must not serve the request. All are set on
    /// entry; setting one again has no effect.
    fn filter(&mut self, view: &View<'_>, rng: &mut Rng, keep: &mut [bool]);
}

/// Rates candidates.
pub trait Scorer: Plugin + Send {
    /// Writes `column[i]` for `view.rows[i]`, 0 (worst) to 1. On entry all are NaN; a NaN that
    /// stays means "no data", counts as 0 and is shown as missing.
    fn score(&mut self, view: &View<'_>, column: &mut [f64]);
}

/// Says how full the fleet is.
pub trait Detector: Plugin + Send {
    /// From 0, idle, over 1, full, to anything above. No candidates: 1. `view.rows` are those of
    /// one stage of serving (prefill or decode) where the fleet has both.
    fn saturation(&self, view: &View<'_>) -> f64;
}

/// Decides whether a request is let in at all.
pub trait Admitter: Plugin + Send {
    /// `Err`: why not, in words for the client.
    fn admit(&self, view: &View<'_>, rng: &mut Rng) -> Result<(), String>;
}

/// Orders candidates.
pub trait Picker: Plugin + Send {
    /// How many endpoints are offered to a proxy as an ordered list.
    fn endpoints_max(&self) -> usize;

    /// Fills `order` with indices into `view.rows`, best first. `totals[i]` is the weighted sum of
    /// scores of `view.rows[i]`.
    fn pick(&mut self, view: &View<'_>, totals: &[f64], rng: &mut Rng, order: &mut Vec<usize>);
}
