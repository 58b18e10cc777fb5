//! What would a request cost on each endpoint, and what did requests cost before?
//!
//! Keeps what a cost is made of: commitments of KV cache ([`crate::committed`]) and speeds
//! ([`crate::learn`]). Switched off unless a plan has a scorer that reads it.

use crate::Time;
use crate::blocks::ChainSpec;
use crate::committed::{Commitment, Committed, Work};
use crate::decision::Request;
use crate::fleet::{Endpoint, EndpointId};
use crate::learn::{Circumstances, Learner, Speed};
use crate::stage::Row;

/// What a request would meet on one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Costing {
    /// KV tokens that requests in flight have committed there.
    pub committed_tokens: u64,
    /// KV tokens that this one would add: blocks that none of them has, tail, expected output.
    pub added_tokens: u64,
    /// KV tokens that it has room for; `None`: its metrics do not say.
    pub capacity_tokens: Option<u64>,
    /// What requests in flight still have it compute.
    pub work: Work,
    /// Tokens of work that it was given lately: prompt tokens to compute and expected output, each
    /// fading with a time constant of half a minute.
    pub recent_tokens: f64,
    /// How fast it is.
    pub speed: Speed,
    /// Tokens that the answer is expected to have.
    pub output_tokens: f64,
}

/// What is remembered of a request in flight.
#[derive(Debug)]
pub(crate) struct Costed {
    commitment: Commitment,
    seen: Circumstances,
    decided: Time,
    first: Option<Time>,
    completion_tokens: Option<u32>,
}

/// Commitments and speeds.
#[derive(Debug)]
pub(crate) struct Costs {
    enabled: bool,
    committed: Committed,
    learner: Learner,
    recent: Vec<Recent>,
}

/// Work given to one endpoint lately, in tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Recent {
    generation: u32,
    tokens: f64,
    at: Time,
}

/// How fast that is forgotten, seconds: long enough to see several requests of each prefix, short
/// enough that a prefix which is asked for no more does not count.
const RECENT_S: f64 = 30.0;

impl Costs {
    pub fn new(enabled: bool, blocks_max: usize) -> Costs {
        let committed = Committed::new(blocks_max);
        Costs { enabled, committed, learner: Learner::default(), recent: Vec::new() }
    }

    /// How fast an endpoint is believed to be.
    pub fn speed(&self, id: EndpointId) -> Speed {
        self.learner.speed(id)
    }

    /// What a request would meet on an endpoint whose blocks are looked up as `spec` says.
    pub fn costing(
        &self,
        now: Time,
        endpoint: &Endpoint,
        request: &Request<'_>,
        spec: Option<ChainSpec>,
    ) -> Costing {
        if !self.enabled {
            return Costing::default();
        }
        let id = endpoint.id;
        let output_tokens = self.output_tokens(request);
        let chains = request.prompts.iter().filter_map(|prompt| prompt.get(spec?));
        let (mut blocks, mut keyed) = (0, 0);
        for chain in chains {
            blocks += self.committed.added_tokens(id, chain);
            keyed += chain.keys.len() as u64 * u64::from(chain.spec.block_size);
        }
        let tail = u64::from(request.prompt_tokens).saturating_sub(keyed);
        let metrics = endpoint.metrics();
        let capacity = metrics.and_then(|m| m.blocks).zip(endpoint.block_size());
        Costing {
            committed_tokens: self.committed.tokens(id),
            added_tokens: blocks + tail + output_tokens as u64,
            capacity_tokens: capacity.map(|(blocks, size)| u64::from(blocks) * u64::from(size)),
            work: self.committed.work(id),
            recent_tokens: self.recent(now, id),
            speed: self.learner.speed(id),
            output_tokens,
        }
    }

    fn recent(&self, now: Time, id: EndpointId) -> f64 {
        let recent = self.recent.get(usize::from(id.slot));
        recent.filter(|recent| recent.generation == id.generation).map_or(0.0, |recent| {
            recent.tokens * (-now.since(recent.at).as_secs_f64() / RECENT_S).exp()
        })
    }

    fn give(&mut self, now: Time, id: EndpointId, tokens: f64) {
        let tokens = self.recent(now, id) + tokens;
        let slot = usize::from(id.slot);
        if self.recent.len() <= slot {
            self.recent.resize(slot + 1, Recent::default());
        }
        self.recent[slot] = Recent { generation: id.generation, tokens, at: now };
    }

    /// Clients ask for more than they get: an answer is expected to be at most twice as long as
    /// answers have been.
    fn output_tokens(&self, request: &Request<'_>) -> f64 {
        let usual = self.learner.fleet().output_tokens;
        request.max_tokens.map_or(usual, |max| f64::from(max).min(2.0 * usual))
    }

    /// The request goes to the endpoint of this row.
    pub fn begin(
        &mut self,
        now: Time,
        row: &Row,
        request: &Request<'_>,
        spec: Option<ChainSpec>,
    ) -> Option<Costed> {
        if !self.enabled {
            return None;
        }
        let costing = &row.costing;
        let chains = request.prompts.iter().filter_map(|prompt| prompt.get(spec?));
        let keyed: u64 = chains
            .clone()
            .map(|chain| chain.keys.len() as u64 * u64::from(chain.spec.block_size))
            .sum();
        let prompt_tokens = u64::from(request.prompt_tokens);
        let output = costing.output_tokens;
        let prefill = u64::from(row.uncached_tokens);
        let work = Work { prefill, context: prompt_tokens + (output / 2.0) as u64 };
        let own_tokens = prompt_tokens.saturating_sub(keyed) + output as u64;
        self.give(now, row.id, prefill as f64 + output);
        let commitment = self.committed.commit(row.id, chains, own_tokens, work);
        // A queue, or a cache that is too full, makes a first token late, not the computing of it.
        let queued = row.signals.is_none_or(|signals| signals.waiting > 0);
        let full = costing
            .capacity_tokens
            .is_some_and(|room| costing.committed_tokens + costing.added_tokens > room);
        let ahead = costing.work.prefill + prefill;
        let seen = Circumstances {
            prefill_tokens: (!queued && !full).then_some(ahead as f64),
            context_tokens: 0.0,
        };
        Some(Costed { commitment, seen, decided: now, first: None, completion_tokens: None })
    }

    /// The first token has come.
    pub fn first_token(&mut self, now: Time, id: EndpointId, costed: &mut Costed) {
        if costed.first.is_some() {
            return;
        }
        let seconds = now.since(costed.decided).as_secs_f64();
        self.learner.first_token(id, &costed.seen, seconds);
        self.committed.prefilled(&mut costed.commitment);
        costed.seen.context_tokens = self.committed.work(id).context as f64;
        costed.first = Some(now);
    }

    /// The engine told how long the answer is.
    pub fn usage(&self, costed: &mut Costed, completion_tokens: u32) {
        costed.completion_tokens = Some(completion_tokens);
    }

    /// The request goes elsewhere; what it would have taught about the first endpoint is void.
    pub fn redirect(&mut self, now: Time, to: EndpointId, costed: &mut Costed) {
        self.committed.redirect(&mut costed.commitment, to);
        costed.seen.prefill_tokens = None;
        (costed.decided, costed.first) = (now, None);
    }

    /// The request has ended.
    pub fn end(&mut self, now: Time, id: EndpointId, costed: Costed, succeeded: bool) {
        let after = self.committed.work(id).context as f64;
        self.committed.release(costed.commitment);
        if let (true, Some(first), Some(tokens)) =
            (succeeded, costed.first, costed.completion_tokens)
        {
            let context_tokens = (costed.seen.context_tokens + after) / 2.0;
            let seconds = now.since(first).as_secs_f64();
            self.learner.answer(id, context_tokens, seconds, tokens);
        }
    }

    /// The endpoint has left.
    pub fn forget(&mut self, id: EndpointId) {
        self.committed.forget(id);
        self.learner.forget(id);
    }
}
