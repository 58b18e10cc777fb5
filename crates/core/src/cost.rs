//! What would a request cost on each endpoint, and what did requests cost before?
//!
//! Keeps what a cost is made of: commitments of KV cache ([`crate::committed`]) and speeds
//! ([`crate::learn`]). Switched off unless a plan has a scorer that reads it.

use serde::{Deserialize, Serialize};

use crate::Time;
use crate::blocks::{BlockKey, Chain, ChainSpec};
use crate::committed::{Commitment, Committed, CommittedState, Work};
use crate::decision::Request;
use crate::fleet::{Endpoint, EndpointId};
use crate::learn::{Circumstances, Learned, Learner, OUTPUT_TOKENS_MIN, SeenState, Speed};
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
    /// What of that is more than a first guess.
    pub learned: Learned,
    /// Tokens that the answer is expected to have.
    pub output_tokens: f64,
}

/// How long an endpoint is expected to take, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Until the KV cache has room for the request.
    pub wait_s: f64,
    /// Until the first token, from then on: what is ahead and the request's own prompt.
    pub prefill_s: f64,
    /// Each further token.
    pub step_s: f64,
}

impl Costing {
    /// Seconds of a decoding step while a request with this prompt is in the batch.
    pub fn step_s(&self, prompt_tokens: u32) -> f64 {
        let own_context = f64::from(prompt_tokens) + self.output_tokens / 2.0;
        let context = self.work.context as f64 + own_context;
        self.speed.step_base_s + self.speed.step_per_token_s * context
    }

    /// KV tokens that the requests in flight and this one need beyond `room_tokens`; none where
    /// no metrics tell the room.
    pub fn overflow_tokens(&self, room_tokens: Option<u64>) -> u64 {
        let needed = self.committed_tokens.saturating_add(self.added_tokens);
        room_tokens.map_or(0, |room| needed.saturating_sub(room))
    }

    /// What a request of `prompt_tokens`, of which `uncached_tokens` must be computed, is expected
    /// to meet, behind `foreign_tokens` of prompts that others than this router have queued there.
    ///
    /// Prefill is the line that was learned, at all tokens that must be computed until then. A
    /// full cache drains as answers end: as a whole in the time of one answer, so its share that
    /// is missing in the same share of that time.
    pub fn estimate(
        &self,
        prompt_tokens: u32,
        uncached_tokens: u32,
        foreign_tokens: u64,
    ) -> Estimate {
        let step_s = self.step_s(prompt_tokens);
        let room = self.capacity_tokens.map_or(1.0, |room| room.max(1) as f64);
        let missing = self.overflow_tokens(self.capacity_tokens) as f64 / room;
        let ahead = self.work.prefill as f64 + foreign_tokens as f64;
        let prefill_tokens = ahead + f64::from(uncached_tokens);
        Estimate {
            wait_s: missing * self.speed.output_tokens * step_s,
            prefill_s: self.speed.first_token_base_s
                + self.speed.prefill_per_token_s * prefill_tokens,
            step_s,
        }
    }
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

/// What costs on one endpoint depend on, in a form that can be kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostState {
    /// What the requests in flight need.
    pub committed: CommittedState,
    /// What was learned of its speed, and when last.
    pub learned: Option<(Time, SeenState)>,
    /// Work that it was given lately.
    pub recent: Option<RecentState>,
}

/// Work given to one endpoint lately.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecentState {
    /// Tokens, as they counted then.
    #[serde(with = "crate::journal::exact")]
    pub tokens: f64,
    /// When they were counted.
    pub at: Time,
}

/// How fast that is forgotten, seconds: long enough to see several requests of each prefix, short
/// enough that a prefix which is asked for no more does not count.
const RECENT_S: f64 = 30.0;

/// An answer of several tokens that arrives in a smaller share of the time before its first byte
/// was not streamed.
const STREAMED_SHARE_MIN: f64 = 0.01;

impl Costs {
    pub fn new(enabled: bool, blocks_max: usize) -> Costs {
        let committed = Committed::new(blocks_max);
        Costs { enabled, committed, learner: Learner::default(), recent: Vec::new() }
    }

    /// How fast an endpoint is believed to be.
    pub fn speed(&self, now: Time, id: EndpointId) -> Speed {
        self.learner.speed(now, id)
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
        let blocks: u64 =
            chains(request, spec).map(|chain| self.committed.added_tokens(id, chain)).sum();
        let tail = tail_tokens(request, spec);
        let metrics = endpoint.metrics();
        // The engine counts its blocks in its own size; events may be of smaller ones.
        let size = metrics.and_then(|m| m.block_size).filter(|size| *size > 0);
        let size = size.or_else(|| endpoint.block_size());
        let capacity = metrics.and_then(|m| m.blocks).zip(size);
        Costing {
            committed_tokens: self.committed.tokens(id),
            added_tokens: blocks + tail + output_tokens as u64,
            capacity_tokens: capacity.map(|(blocks, size)| u64::from(blocks) * u64::from(size)),
            work: self.committed.work(id),
            recent_tokens: self.recent(now, id),
            speed: self.learner.speed(now, id),
            learned: self.learner.learned(),
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

    /// The request goes to the endpoint of this row; `prefilled`: another one computes the prompt,
    /// so that the time to the first token teaches nothing about this one.
    pub fn begin(
        &mut self,
        now: Time,
        row: &Row,
        request: &Request<'_>,
        spec: Option<ChainSpec>,
        prefilled: bool,
    ) -> Option<Costed> {
        if !self.enabled {
            return None;
        }
        let costing = &row.costing;
        let prompt_tokens = u64::from(request.prompt_tokens);
        let output = costing.output_tokens;
        let prefill = match (prefilled, request.skips_cache) {
            (true, _) => 0,
            (false, true) => prompt_tokens,
            (false, false) => u64::from(row.uncached_tokens),
        };
        let work = Work { prefill, context: prompt_tokens + (output / 2.0) as u64 };
        let own_tokens = tail_tokens(request, spec) + output as u64;
        self.give(now, row.id, prefill as f64 + output);
        let commitment = self.committed.commit(row.id, chains(request, spec), own_tokens, work);
        // A queue, or a cache that is too full, makes a first token late, not the computing of it.
        let queued = row.signals.is_none_or(|signals| signals.waiting > 0);
        let full = costing
            .capacity_tokens
            .is_some_and(|room| costing.committed_tokens + costing.added_tokens > room);
        let ahead = costing.work.prefill + prefill;
        let seen = Circumstances {
            prefill_tokens: (!queued && !full && !prefilled).then_some(ahead as f64),
            context_tokens: 0.0,
        };
        Some(Costed { commitment, seen, decided: now, first: None, completion_tokens: None })
    }

    /// The first byte of an answer has come. What it teaches is known at the end: an error comes at
    /// once, and an answer that is not streamed comes late, whatever the prompt.
    pub fn first_token(&mut self, now: Time, id: EndpointId, costed: &mut Costed) {
        if costed.first.is_some() {
            return;
        }
        self.committed.prefilled(&mut costed.commitment);
        costed.seen.context_tokens = self.committed.work(id).context as f64;
        costed.first = Some(now);
    }

    /// The engine told how long the answer is.
    pub fn usage(&self, costed: &mut Costed, completion_tokens: u32) {
        costed.completion_tokens = Some(completion_tokens);
    }

    /// The request goes elsewhere; what it would have taught about the first endpoint is void.
    pub fn redirect(
        &mut self,
        now: Time,
        to: EndpointId,
        uncached_tokens: u32,
        costed: &mut Costed,
    ) {
        self.committed.redirect(&mut costed.commitment, to, uncached_tokens.into());
        costed.seen.prefill_tokens = None;
        (costed.decided, costed.first) = (now, None);
    }

    /// The request has ended.
    pub fn end(&mut self, now: Time, id: EndpointId, costed: Costed, succeeded: bool) {
        let after = self.committed.work(id).context as f64;
        self.committed.release(costed.commitment);
        let (true, Some(first)) = (succeeded, costed.first) else { return };
        let before_s = first.since(costed.decided).as_secs_f64();
        let after_s = now.since(first).as_secs_f64();
        let tokens = costed.completion_tokens;
        if let Some(tokens) = tokens {
            self.learner.answer(now, id, tokens);
        }
        let has_steps = tokens.is_none_or(|tokens| tokens >= OUTPUT_TOKENS_MIN);
        if has_steps && after_s < STREAMED_SHARE_MIN * before_s {
            return;
        }
        self.learner.first_token(now, id, &costed.seen, before_s);
        if let Some(tokens) = tokens {
            let context_tokens = (costed.seen.context_tokens + after) / 2.0;
            self.learner.steps(now, id, context_tokens, after_s, tokens);
        }
    }

    /// What costs on an endpoint depend on; of these blocks only, where some are given. `None`:
    /// the plan reads no costs.
    pub fn state(&self, id: EndpointId, only: Option<&[&[BlockKey]]>) -> Option<CostState> {
        let recent = self.recent.get(usize::from(id.slot));
        let recent = recent.filter(|recent| recent.generation == id.generation);
        self.enabled.then(|| CostState {
            committed: self.committed.state(id, only),
            learned: self.learner.endpoint_state(id),
            recent: recent.map(|recent| RecentState { tokens: recent.tokens, at: recent.at }),
        })
    }

    /// What was learned of the whole fleet.
    pub fn fleet_state(&self) -> SeenState {
        self.learner.fleet_state()
    }

    /// Takes up again what [`Costs::fleet_state`] told.
    pub fn restore_fleet(&mut self, state: &SeenState) {
        self.learner.restore_fleet(state);
    }

    /// Takes up again what [`Costs::state`] told.
    pub fn restore(&mut self, id: EndpointId, state: &CostState) {
        self.committed.restore(id, &state.committed);
        if let Some((at, learned)) = &state.learned {
            self.learner.restore_endpoint(id, *at, learned);
        }
        if let Some(RecentState { tokens, at }) = state.recent {
            let slot = usize::from(id.slot);
            if self.recent.len() <= slot {
                self.recent.resize(slot + 1, Recent::default());
            }
            self.recent[slot] = Recent { generation: id.generation, tokens, at };
        }
    }

    /// The endpoint has left.
    pub fn forget(&mut self, id: EndpointId) {
        self.committed.forget(id);
        self.learner.forget(id);
    }
}

/// The chains of a request that an endpoint's blocks are looked up with.
fn chains<'a>(
    request: &Request<'a>,
    spec: Option<ChainSpec>,
) -> impl Iterator<Item = &'a Chain> + Clone {
    request.prompts.iter().filter_map(move |prompt| prompt.get(spec?))
}

/// Prompt tokens that are in no block with a key.
fn tail_tokens(request: &Request<'_>, spec: Option<ChainSpec>) -> u64 {
    let keyed = chains(request, spec)
        .map(|chain| chain.keys.len() as u64 * u64::from(chain.spec.block_size))
        .sum();
    u64::from(request.prompt_tokens).saturating_sub(keyed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decision::{PromptChains, TokensKnown};
    use crate::fleet::{EndpointSpec, EngineMetrics, Fleet};
    use crate::load::Load;
    use crate::stage::Signals;

    struct Host {
        costs: Costs,
        fleet: Fleet,
        id: EndpointId,
        now: Time,
    }

    impl Host {
        fn new() -> Host {
            let mut fleet = Fleet::default();
            let spec = EndpointSpec {
                name: "a".into(),
                address: "a:80".into(),
                labels: Default::default(),
                rank: 0,
                replay_available: false,
                events_expected: true,
            };
            let id = fleet.add(spec, 1).unwrap();
            let now = Time::from_secs_f64(1.0);
            Host { costs: Costs::new(true, 1000), fleet, id, now }
        }

        fn pass(&mut self, seconds: f64) -> Time {
            self.now = self.now + std::time::Duration::from_secs_f64(seconds);
            self.now
        }

        /// A request of `tokens` tokens that is answered after so many seconds, and has all of its
        /// answer after so many more.
        fn serve(&mut self, tokens: u32, first_s: f64, rest_s: f64, answer: Option<u32>, ok: bool) {
            let request = Request {
                id: "",
                model: "m",
                prompts: &[PromptChains { chains: Vec::new() }],
                prompt_tokens: tokens,
                tokens_known: TokensKnown::Exact,
                ..Request::default()
            };
            let endpoint = self.fleet.get(self.id).unwrap();
            let row = Row {
                id: self.id,
                at: 0,
                signals: Some(Signals { waiting: 0, running: 0, kv_usage: 0.0 }),
                inflight: Load::default(),
                uncached_tokens: tokens,
                costing: self.costs.costing(self.now, endpoint, &request, None),
                latency: None,
            };
            let mut costed = self.costs.begin(self.now, &row, &request, None, false).unwrap();
            let now = self.pass(first_s);
            self.costs.first_token(now, self.id, &mut costed);
            if let Some(answer) = answer {
                self.costs.usage(&mut costed, answer);
            }
            let now = self.pass(rest_s);
            self.costs.end(now, self.id, costed, ok);
        }

        fn speed(&self) -> Speed {
            self.costs.speed(self.now, self.id)
        }
    }

    #[test]
    fn an_estimate_counts_what_is_ahead_and_what_does_not_fit() {
        let speed = Speed {
            first_token_base_s: 0.1,
            prefill_per_token_s: 0.001,
            step_base_s: 0.01,
            step_per_token_s: 1e-6,
            output_tokens: 100.0,
        };
        let idle = Costing {
            added_tokens: 1_000,
            capacity_tokens: Some(10_000),
            speed,
            output_tokens: 50.0,
            ..Costing::default()
        };
        let close = |estimate: Estimate, expected: [f64; 3]| {
            let is = [estimate.wait_s, estimate.prefill_s, estimate.step_s];
            let same = is.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9);
            assert!(same, "{is:?} is not {expected:?}");
        };
        // Own context: 900 tokens, and half of an answer of 50.
        let step = 0.01 + 1e-6 * 925.0;
        close(idle.estimate(900, 400, 0), [0.0, 0.5, step]);
        let work = Work { prefill: 2_000, context: 50_000 };
        close(Costing { work, ..idle }.estimate(900, 400, 600), [0.0, 3.1, step + 0.05]);
        // 14,000 tokens where 10,000 fit: two fifths of an answer of 100 tokens.
        let full = Costing { committed_tokens: 13_000, ..idle };
        close(full.estimate(900, 400, 0), [0.4 * 100.0 * step, 0.5, step]);
        close(Costing { capacity_tokens: None, ..full }.estimate(900, 400, 0), [0.0, 0.5, step]);
        assert_eq!(full.overflow_tokens(Some(20_000)), 0);
        assert_eq!(Costing { committed_tokens: u64::MAX, ..idle }.overflow_tokens(None), 0);
    }

    #[test]
    fn errors_that_come_at_once_teach_nothing() {
        let mut host = Host::new();
        (0..200).for_each(|_| host.serve(7_000, 0.001, 0.0, None, false));
        assert_eq!(host.speed(), Speed::default());
    }

    #[test]
    fn answers_that_are_not_streamed_teach_their_length_only() {
        let mut host = Host::new();
        for at in 0..200 {
            // Prompts of different lengths, and answers that take 20 s whatever the prompt.
            host.serve(100 + at % 2 * 3_000, 20.0, 0.0001, Some(1_000), true);
        }
        let (speed, before) = (host.speed(), Speed::default());
        assert!(speed.output_tokens > 900.0);
        assert_eq!(Speed { output_tokens: before.output_tokens, ..speed }, before);
    }

    #[test]
    fn streamed_and_short_answers_teach() {
        let mut host = Host::new();
        (0..100).for_each(|at| host.serve(100 + at % 2 * 7_000, 3.6, 200.0, Some(1_001), true));
        assert!(host.speed().step_base_s > 0.1, "{:?}", host.speed());
        let mut host = Host::new();
        for at in 0..100 {
            let tokens = 100 + at % 2 * 7_000;
            host.serve(tokens, 0.1 + 500e-6 * f64::from(tokens), 0.0, Some(1), true);
        }
        assert!(host.speed().prefill_per_token_s > 300e-6, "{:?}", host.speed());
    }

    #[test]
    fn capacity_is_in_blocks_of_the_engine_not_of_its_events() {
        let mut host = Host::new();
        let metrics =
            EngineMetrics { blocks: Some(100), block_size: Some(32), ..EngineMetrics::default() };
        host.fleet.on_metrics(host.now, host.id, &metrics);
        host.fleet.on_block_size(host.id, Some(16));
        let request = Request {
            id: "",
            model: "m",
            prompt_tokens: 10,
            tokens_known: TokensKnown::Exact,
            ..Request::default()
        };
        let endpoint = host.fleet.get(host.id).unwrap();
        let costing = host.costs.costing(host.now, endpoint, &request, None);
        assert_eq!(costing.capacity_tokens, Some(3_200));
    }
}
