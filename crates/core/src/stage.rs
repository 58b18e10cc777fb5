//! What does a plugin see, and what must it answer?
//!
//! Three small traits: a filter clears bits of a mask, a scorer writes one column, a picker orders
//! rows. All run inside one decision, synchronously, on slices that the pipeline owns.

use crate::cost::Costing;
use crate::decision::Request;
use crate::fleet::{Endpoint, EndpointId, Fleet};
use crate::load::Load;
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
}

impl View<'_> {
    /// The match on one candidate.
    pub fn prefix(&self, row: &Row) -> PrefixMatch {
        self.prefix.get(row.at as usize).copied().unwrap_or_default()
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
    /// Who will serve it.
    pub endpoint: &'a Endpoint,
    /// The request.
    pub request: &'a Request<'a>,
}

/// Removes candidates.
pub trait Filter: Send {
    /// What it must be given.
    fn inputs(&self) -> Inputs<'_> {
        Inputs::default()
    }

    /// Why its parameters make no sense, in words for the user.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Clears `keep[i]` for each `view.rows[i]` that must not serve the request. All are set on
    /// entry; setting one again has no effect.
    fn filter(&self, view: &View<'_>, rng: &mut Rng, keep: &mut [bool]);
}

/// Rates candidates.
pub trait Scorer: Send {
    /// What it must be given.
    fn inputs(&self) -> Inputs<'_> {
        Inputs::default()
    }

    /// Why its parameters make no sense, in words for the user.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Request headers that it reads, lower case.
    fn headers(&self) -> Vec<String> {
        Vec::new()
    }

    /// Told once, before the first decision.
    fn prepare(&mut self, _settings: &Settings) {}

    /// Writes `column[i]` for `view.rows[i]`, 0 (worst) to 1. On entry all are NaN; a NaN that
    /// stays means "no data", counts as 0 and is shown as missing.
    fn score(&mut self, view: &View<'_>, column: &mut [f64]);

    /// The decision that followed the last `score` of this request.
    fn picked(&mut self, _picked: &Picked<'_>) -> Option<ResponseHeader> {
        None
    }

    /// The endpoint has left the fleet.
    fn forget(&mut self, _id: EndpointId) {}
}

/// Orders candidates.
pub trait Picker: Send {
    /// How many endpoints are offered to a proxy as an ordered list.
    fn endpoints_max(&self) -> usize;

    /// Fills `order` with indices into `view.rows`, best first. `totals[i]` is the weighted sum of
    /// scores of `view.rows[i]`.
    fn pick(&mut self, view: &View<'_>, totals: &[f64], rng: &mut Rng, order: &mut Vec<usize>);
}
