//! The brain end to end: events in, decisions out, responses back.

mod handlers;
mod log;
mod plans;
mod rules;
mod slices;

use std::collections::BTreeMap;

use super::*;
use crate::blocks::{PromptExtras, Root, chain};
use crate::decision::{
    Decision, Headers, Mode, NoTokens, PromptChains, Reject, Request, TokensKnown,
};
use crate::event::{BlockRemoved, BlockStored, EngineHash, EventBatch, GroupKind, KvEvent, Tier};

/// A brain with endpoints, a clock, and the sequence numbers of their streams.
struct Host {
    brain: Brain,
    ids: Vec<EndpointId>,
    seqs: BTreeMap<EndpointId, u64>,
    now: Time,
    requests: u32,
}

const BLOCK: usize = 16;

fn spec(name: &str) -> EndpointSpec {
    EndpointSpec {
        name: name.into(),
        address: format!("{name}:8000"),
        labels: BTreeMap::new(),
        rank: 0,
        replay_available: false,
        events_expected: true,
    }
}

/// A prompt of `tokens` tokens that starts differently for each `group`.
fn prompt(group: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| group * 100_000 + i).collect()
}

fn batch(events: Vec<KvEvent>) -> EventBatch {
    EventBatch { timestamp_s: 0.0, events, rank: None, events_bad: 0 }
}

/// The full blocks of a prompt, as an engine announces them.
fn stored(tokens: &[u32], block: usize) -> KvEvent {
    let full = tokens.len() / block;
    KvEvent::Stored(BlockStored {
        hashes: (0..full).map(|i| EngineHash(hash(tokens, i, block))).collect(),
        parent: None,
        tokens: tokens[..full * block].to_vec().into(),
        block_size: block as u32,
        lora_name: None,
        tier: Tier::Gpu,
        extras: Vec::new(),
        group: None,
        kind: GroupKind::Full,
    })
}

fn hash(tokens: &[u32], at: usize, block: usize) -> u64 {
    (u64::from(tokens[0]) << 32) + (at * block) as u64 + 1
}

fn removed(tokens: &[u32], from: usize) -> KvEvent {
    let full = tokens.len() / BLOCK;
    let hashes = (from..full).map(|i| EngineHash(hash(tokens, i, BLOCK))).collect();
    KvEvent::Removed(BlockRemoved { hashes, tier: Tier::Gpu, group: None })
}

impl Host {
    fn new(plan: Plan, names: &[&str]) -> Host {
        let mut brain = Brain::new(plan, 1);
        let add = |name: &&str| brain.add_endpoint(Time::ZERO, spec(name)).unwrap();
        let ids = names.iter().map(add).collect();
        let seqs = BTreeMap::new();
        Host { brain, ids, seqs, now: Time::from_secs_f64(1.0), requests: 0 }
    }

    /// `n` endpoints whose streams are live and whose metrics are fresh and equal.
    fn live(n: usize) -> Host {
        let names: Vec<String> = (0..n).map(|i| format!("e{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut host = Host::new(Plan::precise(), &names);
        for id in host.ids.clone() {
            host.metrics(id, 0, 0.0);
            host.say(id, Vec::new());
        }
        host
    }

    fn metrics(&mut self, id: EndpointId, waiting: u32, kv_usage: f64) {
        let metrics = EngineMetrics {
            waiting,
            kv_usage,
            block_size: Some(BLOCK as u32),
            ..EngineMetrics::default()
        };
        self.brain.on_metrics(self.now, id, &metrics);
    }

    /// One message of an engine's event stream.
    fn say(&mut self, id: EndpointId, events: Vec<KvEvent>) {
        let seq = self.seqs.entry(id).or_insert(0);
        let input = StreamInput::Batch { seq: *seq, batch: batch(events) };
        *seq += 1;
        assert_eq!(self.brain.on_stream(self.now, id, input), StreamOrder::None);
    }

    fn hold(&mut self, id: EndpointId, tokens: &[u32]) {
        self.say(id, vec![stored(tokens, BLOCK)]);
    }

    fn chains(&self, tokens: &[u32], known: TokensKnown) -> Vec<PromptChains> {
        let specs = self.brain.chain_specs();
        let extras = PromptExtras::default();
        let chains = specs.of(known).iter().map(|s| chain(*s, Root::Base, tokens, &extras));
        vec![PromptChains { chains: chains.collect() }]
    }

    fn try_ask(
        &mut self,
        tokens: &[u32],
        change: impl FnOnce(&mut Request<'_>),
    ) -> Result<Decision, Reject> {
        self.requests += 1;
        let id = format!("r{}", self.requests);
        let exact = self.chains(tokens, TokensKnown::Exact);
        let estimated = self.chains(tokens, TokensKnown::Estimated);
        let mut request = Request {
            id: &id,
            model: "model",
            prompts: &exact,
            prompt_tokens: tokens.len() as u32,
            tokens_known: TokensKnown::Exact,
            ..Request::default()
        };
        change(&mut request);
        match request.tokens_known {
            TokensKnown::Exact => {}
            TokensKnown::Estimated => request.prompts = &estimated,
            TokensKnown::None(_) => request.prompts = &[],
        }
        self.brain.decide(self.now, &request)
    }

    fn ask(&mut self, tokens: &[u32]) -> Decision {
        self.try_ask(tokens, |_| {}).unwrap()
    }

    fn answer(&mut self, decision: &Decision, prompt_tokens: u32, cached_tokens: u32) {
        for event in [
            ResponseEvent::FirstChunk,
            ResponseEvent::Usage {
                prompt_tokens,
                cached_tokens: Some(cached_tokens),
                completion_tokens: 1,
            },
            ResponseEvent::End { status: 200 },
        ] {
            self.brain.on_response(self.now, decision.ticket, event);
        }
    }

    fn pass(&mut self, secs: f64) {
        self.now = Time::from_secs_f64(self.now.as_secs_f64() + secs);
        assert_eq!(self.brain.tick(self.now), []);
    }
}

#[test]
fn the_holder_is_chosen_and_the_three_numbers_are_right() {
    let mut host = Host::live(4);
    let shared = prompt(1, 10 * BLOCK);
    host.hold(host.ids[2], &shared);
    host.hold(host.ids[1], &shared[..4 * BLOCK]);
    let long = [shared, prompt(9, 21)].concat();
    let decision = host.ask(&long);
    let record = &decision.record;
    assert_eq!(decision.endpoint, host.ids[2]);
    assert_eq!((record.mode, record.reason), (Mode::Precise, Reason::EventsLive));
    assert_eq!((record.available_tokens, record.chosen_tokens), (160, 160));
    assert_eq!(record.candidates[2].hit.resident, 10);
    assert_eq!(record.candidates[2].hit.blocks, 11);
    assert_eq!(record.candidates[1].hit.resident, 4);
    assert_eq!(record.candidates[2].load.uncached_tokens, 21);
    assert_eq!(record.tied, 1);
    assert!(record.margin.unwrap() > 1.0);
    assert_eq!(host.brain.load(host.ids[2]), Load { requests: 1, tokens: 21 });
    host.answer(&decision, 181, 160);
    assert_eq!(host.brain.load(host.ids[2]), Load::default());
    let account = host.brain.ledger().account(host.ids[2]);
    assert_eq!(account.decided.requests, 1);
    assert_eq!(account.reported.available_tokens, 160);
    assert_eq!(account.reported.chosen_tokens, 160);
    assert_eq!(account.delivered_tokens, 160);
    assert_eq!((account.verdicts.right, account.verdicts.below), (1, 0));
    assert_eq!(host.brain.counters().decisions[Reason::EventsLive.index()], 1);
}

#[test]
fn a_full_hit_leaves_the_last_token_to_compute() {
    let mut host = Host::live(2);
    let tokens = prompt(1, 10 * BLOCK);
    host.hold(host.ids[1], &tokens);
    let decision = host.ask(&tokens);
    assert_eq!(decision.endpoint, host.ids[1]);
    assert_eq!(decision.record.chosen_tokens, 144);
    host.answer(&decision, 160, 144);
    assert_eq!(host.brain.ledger().total().verdicts.right, 1);
}

#[test]
fn evictions_are_followed() {
    let mut host = Host::live(2);
    let tokens = prompt(1, 10 * BLOCK + 1);
    host.hold(host.ids[0], &tokens);
    host.hold(host.ids[1], &tokens[..5 * BLOCK]);
    host.say(host.ids[0], vec![removed(&tokens, 2)]);
    let decision = host.ask(&tokens);
    assert_eq!(decision.endpoint, host.ids[1]);
    assert_eq!(decision.record.candidates[0].hit.resident, 2);
    host.say(host.ids[1], vec![KvEvent::Cleared]);
    host.say(host.ids[0], vec![KvEvent::Cleared]);
    host.answer(&decision, 161, 80);
    host.pass(1.0);
    assert_eq!(host.ask(&tokens).record.candidates[0].hit.resident, 0);
}

#[test]
fn a_cold_burst_in_one_instant_is_spread_evenly() {
    let mut host = Host::live(4);
    let mut counts = BTreeMap::new();
    for group in 0..100 {
        let decision = host.ask(&prompt(group + 1, 200));
        *counts.entry(decision.endpoint).or_insert(0) += 1;
    }
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [25, 25, 25, 25]);
}

#[test]
fn a_burst_with_one_prefix_sees_itself_before_any_event() {
    let mut host = Host::live(4);
    let tokens = prompt(1, 200);
    let first = host.ask(&tokens);
    assert_eq!(first.record.chosen_tokens, 0);
    for _ in 0..10 {
        let next = host.ask(&tokens);
        assert_eq!(next.endpoint, first.endpoint);
        assert_eq!(next.record.chosen_tokens, 192);
        let candidate = next.record.candidates.iter().find(|c| c.endpoint == next.record.endpoint);
        let hit = candidate.unwrap().hit;
        assert_eq!((hit.resident, hit.expected), (0, 12));
    }
    // A promise that rests on requests on their way is not held against the engine.
    host.answer(&first, 200, 0);
    assert_eq!(host.brain.ledger().total().verdicts.right, 1);
    assert_eq!(host.brain.index().usage().speculations, 11);
    host.pass(0.3);
    assert_eq!(host.brain.index().usage().speculations, 10);
    host.pass(31.0);
    assert_eq!(host.brain.index().usage().speculations, 0);
}

#[test]
fn a_lying_stream_is_put_in_doubt_and_believed_again() {
    let mut host = Host::live(2);
    let tokens = prompt(1, 10 * BLOCK + 5);
    host.hold(host.ids[0], &tokens);
    let decision = host.ask(&tokens);
    assert_eq!(decision.endpoint, host.ids[0]);
    // The engine was reset and its events were lost.
    host.answer(&decision, 165, 0);
    assert_eq!(host.brain.counters().drifts, 1);
    let drifting = StreamState::Suspect(SuspectReason::Drift);
    assert_eq!(host.brain.stream_state(host.ids[0]), Some(drifting));
    let other = prompt(2, 10 * BLOCK + 5);
    host.hold(host.ids[0], &other);
    let only: &'static [EndpointId] = vec![host.ids[0]].leak();
    for _ in 0..5 {
        let decision = host.try_ask(&other, |r| r.allowed = Some(only)).unwrap();
        assert_eq!(decision.record.reason, Reason::Drift);
        assert_eq!(decision.record.mode, Mode::Approximate);
        assert_eq!(decision.record.candidates_degraded, 1);
        host.answer(&decision, 165, 160);
    }
    assert_eq!(host.brain.stream_state(host.ids[0]), Some(StreamState::Live));
    assert!(!host.brain.ledger().in_doubt(host.ids[0]));
    let account = host.brain.ledger().account(host.ids[0]);
    assert_eq!((account.verdicts.drifts, account.verdicts.agreements), (1, 1));
}

#[test]
fn a_drifting_endpoint_is_known_by_its_history_alone() {
    let mut host = Host::live(2);
    let old = prompt(1, 10 * BLOCK + 5);
    host.hold(host.ids[0], &old);
    let decision = host.ask(&old);
    host.answer(&decision, 165, 0);
    let believed = prompt(2, 10 * BLOCK + 5);
    host.hold(host.ids[0], &believed);
    let decision = host.ask(&believed);
    let hit = decision.record.candidates[0].hit;
    assert_eq!((hit.resident, hit.matched), (10, 0));
    let again = host.ask(&old);
    assert_eq!(again.record.candidates[0].hit.matched, 10);
}

#[test]
fn a_late_subscription_is_believed_once_it_misses_nothing() {
    let mut host = Host::new(Plan::precise(), &["a"]);
    let id = host.ids[0];
    host.metrics(id, 0, 0.0);
    host.seqs.insert(id, 100);
    let tokens = prompt(1, 10 * BLOCK + 5);
    host.hold(id, &tokens);
    let late = StreamState::Suspect(SuspectReason::LateStart);
    assert_eq!(host.brain.stream_state(id), Some(late));
    for _ in 0..5 {
        let decision = host.ask(&tokens);
        assert_eq!(decision.record.reason, Reason::StreamSuspect);
        assert_eq!(decision.record.chosen_tokens, 160);
        host.answer(&decision, 165, 160);
    }
    assert_eq!(host.brain.stream_state(id), Some(StreamState::Live));
    assert_eq!(host.ask(&tokens).record.reason, Reason::EventsLive);
}

#[test]
fn a_silent_stream_is_bridged_by_history() {
    let mut host = Host::new(Plan::precise(), &["a", "b"]);
    host.ids.clone().into_iter().for_each(|id| host.metrics(id, 0, 0.0));
    let tokens = prompt(1, 10 * BLOCK);
    let first = host.ask(&tokens);
    assert_eq!(first.record.reason, Reason::StreamInitial);
    host.answer(&first, 160, 0);
    host.pass(60.0);
    host.ids.clone().into_iter().for_each(|id| host.metrics(id, 0, 0.0));
    let second = host.ask(&tokens);
    assert_eq!(second.endpoint, first.endpoint);
    assert_eq!(second.record.mode, Mode::Approximate);
    let total = host.brain.ledger().total().verdicts;
    assert_eq!((total.unjudged, total.right), (1, 0));
}

#[test]
fn without_tokens_load_decides_and_the_reason_is_told() {
    let mut host = Host::live(2);
    host.metrics(host.ids[0], 5, 0.5);
    let none = |why| move |r: &mut Request<'_>| r.tokens_known = TokensKnown::None(why);
    for (why, reason) in [
        (NoTokens::NoTokenizer, Reason::NoTokenizer),
        (NoTokens::NoPrompt, Reason::NoPrompt),
        (NoTokens::TokenizerFailed, Reason::TokenizerFailed),
        (NoTokens::TooLong, Reason::PromptTooLong),
    ] {
        let decision = host.try_ask(&prompt(1, 100), none(why)).unwrap();
        assert_eq!(decision.endpoint, host.ids[1]);
        assert_eq!((decision.record.mode, decision.record.reason), (Mode::LoadOnly, reason));
        assert_eq!(host.brain.counters().decisions[reason.index()], 1);
    }
    let estimated = |r: &mut Request<'_>| r.tokens_known = TokensKnown::Estimated;
    let first = host.try_ask(&prompt(3, 1000), estimated).unwrap();
    assert_eq!(first.record.reason, Reason::TokensEstimated);
    let second = host.try_ask(&prompt(3, 1000), estimated).unwrap();
    assert_eq!(second.endpoint, first.endpoint);
    assert!(second.record.chosen_tokens > 900);
}

#[test]
fn a_redirect_moves_load_and_expectation() {
    let mut host = Host::live(3);
    let tokens = prompt(1, 10 * BLOCK + 8);
    host.hold(host.ids[0], &tokens);
    host.hold(host.ids[1], &tokens[..3 * BLOCK]);
    let decision = host.ask(&tokens);
    assert_eq!((decision.endpoint, decision.fallback[0]), (host.ids[0], host.ids[1]));
    assert_eq!(decision.fallback.len(), 2);
    host.brain.on_endpoint_failed(host.now, host.ids[0]);
    host.brain.redirect(host.now, decision.ticket, host.ids[1]);
    assert_eq!(host.brain.load(host.ids[0]), Load::default());
    assert_eq!(host.brain.load(host.ids[1]), Load { requests: 1, tokens: 120 });
    host.answer(&decision, 168, 48);
    assert_eq!(host.brain.load(host.ids[1]), Load::default());
    let account = host.brain.ledger().account(host.ids[1]);
    assert_eq!((account.reported.chosen_tokens, account.delivered_tokens), (48, 48));
    assert_eq!(account.verdicts.right, 1);
    assert_eq!(host.brain.counters().redirected, 1);
    assert_eq!(host.brain.index().usage().speculations, 0);
}

#[test]
fn endpoints_with_different_block_sizes_share_a_fleet() {
    let mut host = Host::new(Plan::precise(), &["a", "b"]);
    let tokens = prompt(1, 320);
    host.say(host.ids[0], vec![stored(&tokens[..160], 16)]);
    host.say(host.ids[1], vec![stored(&tokens, 32)]);
    let sizes: Vec<u32> = host.brain.chain_specs().exact().iter().map(|s| s.block_size).collect();
    assert_eq!(sizes, [16, 32]);
    let decision = host.ask(&tokens);
    assert_eq!(decision.endpoint, host.ids[1]);
    let hits = decision.record.candidates.iter().map(|c| (c.hit.resident, c.hit.blocks));
    assert_eq!(hits.collect::<Vec<_>>(), [(10, 20), (10, 10)]);
}

#[test]
fn an_emptied_cache_is_forgotten_at_once() {
    let mut host = Host::live(2);
    let tokens = prompt(1, 10 * BLOCK + 1);
    host.hold(host.ids[0], &tokens);
    let decision = host.ask(&tokens);
    assert_eq!(decision.record.chosen_tokens, 160);
    host.answer(&decision, 161, 160);
    host.brain.on_cache_reset(host.now, host.ids[0]);
    let hit = host.ask(&tokens).record.candidates[0].hit;
    assert_eq!((hit.resident, hit.history), (0, 0));
}

/// The prompt waits in the engine while its cache is emptied through the router: what it then
/// lacks has been removed, and the engine's events are as right as before.
#[test]
fn a_promise_from_before_a_cache_reset_is_no_evidence_after_it() {
    let mut host = Host::live(1);
    let id = host.ids[0];
    let (tokens, other) = (prompt(1, 10 * BLOCK + 1), prompt(2, 10 * BLOCK));
    host.hold(id, &other);
    host.say(id, vec![removed(&other, 0)]);
    host.hold(id, &tokens);
    let decision = host.ask(&tokens);
    assert_eq!(decision.record.chosen_tokens, 160);
    host.brain.on_cache_reset(host.now, id);
    host.say(id, vec![KvEvent::Cleared]);
    host.answer(&decision, 161, 0);
    let verdicts = host.brain.ledger().account(id).verdicts;
    assert_eq!((verdicts.evicted, verdicts.below, verdicts.drifts), (1, 0, 0));
}

/// The holder is worth its load only to a request that reads the cache.
#[test]
fn least_cost_does_not_follow_a_cache_that_the_request_does_not_read() {
    for (skips_cache, chosen) in [(false, 0), (true, 1)] {
        let mut host = Host::new(Plan::least_cost(), &["e0", "e1"]);
        for id in host.ids.clone() {
            host.metrics(id, 0, 0.0);
            host.say(id, Vec::new());
        }
        let (tokens, busy) = (prompt(1, 100 * BLOCK), prompt(2, 10 * BLOCK));
        host.hold(host.ids[0], &tokens);
        host.hold(host.ids[0], &busy);
        assert_eq!(host.ask(&busy).endpoint, host.ids[0]);
        let decision = host.try_ask(&tokens, |request| request.skips_cache = skips_cache).unwrap();
        assert_eq!(decision.endpoint, host.ids[chosen], "{:?}", decision.record.scores);
    }
}
