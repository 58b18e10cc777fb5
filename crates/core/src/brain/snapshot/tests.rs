//! A restored brain decides as the original, and explaining leaves no trace.

use super::*;
use crate::blocks::{PromptExtras, Root, chain};
use crate::decision::{PromptChains, Reason, ResponseEvent, TokensKnown};
use crate::event::{BlockStored, EngineHash, EventBatch, GroupKind, KvEvent, Tier};
use crate::fleet::EndpointSpec;
use crate::journal::tests::{Chaos, plans};
use crate::plan::Experimental;
use crate::stream::StreamInput;

fn text(decided: &Result<Decision, Reject>) -> String {
    let known = decided.as_ref().map(|d| (d.endpoint, &d.fallback, &d.response_headers, &d.record));
    serde_json::to_string(&known).unwrap()
}

fn kept(snapshot: &Snapshot) -> Snapshot {
    let written = serde_json::to_string(snapshot).unwrap();
    let read: Snapshot = serde_json::from_str(&written).unwrap();
    assert_eq!(&read, snapshot);
    assert!(written.len() <= snapshot.bytes() + 4096, "{} {}", written.len(), snapshot.bytes());
    read
}

fn compare(brain: &mut Brain, now: Time, request: &Request<'_>, context: &str) -> bool {
    let (before, counters, seed) = (brain.snapshot(now), *brain.counters(), brain.next_seed());
    let explained = text(&brain.explain(now, request, None));
    assert_eq!(brain.snapshot(now), before, "{context}");
    assert_eq!((*brain.counters(), brain.next_seed()), (counters, seed), "{context}");
    let plan = brain.plan().clone();
    let mut restored = Brain::restore(plan, &kept(&before), seed).unwrap();
    assert_eq!(restored.chain_specs(), brain.chain_specs(), "{context}");
    let offline = text(&restored.decide(now, request));
    let real = brain.decide(now, request);
    assert_eq!(offline, text(&real), "{context}");
    assert_eq!(explained, text(&real), "{context}");
    real.is_ok()
}

#[test]
fn a_restored_brain_decides_as_the_original_after_any_history() {
    let (mut decided, mut rejected) = (0, 0);
    for seed in 0..24u64 {
        let plan =
            [&plans()[..], &[sessions(), disaggregated()]].concat()[seed as usize % 6].clone();
        let mut chaos = Chaos::new(Brain::new(plan, seed), seed);
        for step in 0..60 {
            (0..8).for_each(|_| chaos.step());
            let context = format!("seed {seed}, step {step}");
            let made = chaos.ask(|brain, now, request| compare(brain, now, request, &context));
            decided += u32::from(made);
            rejected += u32::from(!made);
        }
    }
    assert!(decided > 300 && rejected > 5, "{decided} decided, {rejected} rejected");
}

/// The limit of a snapshot counts what plugins remember: it is written, too.
#[test]
fn what_plugins_remember_counts_in_bytes() {
    let id = EndpointId { slot: u16::MAX, generation: u32::MAX };
    let session = |at: u64| (format!("{at:0>200}"), id, Time(u64::MAX));
    for memory in [
        Memory::Sessions((0..10_000).map(session).collect()),
        Memory::Items(vec![(id, vec![u64::MAX; 10_000])]),
        Memory::Endpoints(vec![id; 10_000]),
        Memory::Last(Some("e".repeat(10_000))),
        Memory::LeftOut("w".repeat(10_000)),
    ] {
        let mut snapshot = Brain::new(sessions(), 1).snapshot(Time::ZERO);
        snapshot.memories = vec![(String::new(), "p".to_owned(), memory)];
        kept(&snapshot);
    }
}

fn read(text: &str) -> Plan {
    let config = serde_saphyr::from_str(text).unwrap();
    Plan::build(&config, Experimental::Allowed).unwrap()
}

/// Plugins that remember.
fn sessions() -> Plan {
    read(
        "plugins:\n  - type: session-affinity-scorer\n    parameters:\n      strategy: session_id\n\
         \x20 - type: no-hit-lru-scorer\n  - type: weighted-random-picker\n",
    )
}

/// Two profiles for one request.
fn disaggregated() -> Plan {
    read(
        "plugins:
  - {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
  - {type: always-disagg-pd-decider}
  - {type: queue-scorer}
  - {type: prefix-cache-scorer}
  - {type: mm-embeddings-cache-scorer}
  - {type: max-score-picker}
schedulingProfiles:
  - {name: prefill, plugins: [{pluginRef: queue-scorer}]}
  - {name: decode, plugins: [{pluginRef: prefix-cache-scorer}, {pluginRef: queue-scorer},
     {pluginRef: mm-embeddings-cache-scorer}]}
",
    )
}

fn stored(group: u32, kind: GroupKind, hashes: &[u64], tokens: &[u32], tier: Tier) -> KvEvent {
    KvEvent::Stored(BlockStored {
        hashes: hashes.iter().map(|hash| EngineHash(*hash)).collect(),
        parent: None,
        tokens: tokens.to_vec().into(),
        block_size: 4,
        lora_name: None,
        tier,
        extras: Vec::new(),
        group: Some(group),
        kind,
    })
}

fn endpoint(brain: &mut Brain, name: &str) -> EndpointId {
    let spec = EndpointSpec {
        name: name.into(),
        address: format!("{name}:80"),
        labels: Default::default(),
        rank: 0,
        replay_available: false,
        events_expected: true,
    };
    brain.add_endpoint(Time(0), spec).unwrap()
}

fn exact_chains(brain: &Brain, tokens: &[u32]) -> [PromptChains; 1] {
    let (specs, extras) = (brain.chain_specs(), PromptExtras::default());
    let chains = specs.exact().iter().map(|spec| chain(*spec, Root::Base, tokens, &extras));
    [PromptChains { chains: chains.collect() }]
}

fn asking(prompts: &[PromptChains], prompt_tokens: u32) -> Request<'_> {
    Request {
        id: "r",
        model: "m",
        prompts,
        prompt_tokens,
        tokens_known: TokensKnown::Exact,
        ..Request::default()
    }
}

/// Speeds of endpoints and of the fleet, and an engine that counts other prompt tokens.
#[test]
fn what_was_learned_and_concluded_is_kept() {
    let mut brain = Brain::new(Plan::least_cost(), 1);
    let tokens: Vec<u32> = (0..2400).collect();
    for name in ["a", "b"] {
        let id = endpoint(&mut brain, name);
        let events = vec![stored(0, GroupKind::Full, &[1], &tokens[..4], Tier::Gpu)];
        let batch = EventBatch { timestamp_s: 1.0, events, rank: None, events_bad: 0 };
        let _ = brain.on_stream(Time(1), id, StreamInput::Batch { seq: 0, batch });
    }
    let mut now = Time::from_secs_f64(1.0);
    for _ in 0..12 {
        let prompts = exact_chains(&brain, &tokens);
        let ticket = brain.decide(now, &asking(&prompts, 2400)).unwrap().ticket;
        now = now + std::time::Duration::from_secs(3);
        brain.on_response(now, ticket, ResponseEvent::FirstChunk);
        let (prompt_tokens, cached_tokens) = (2399, Some(4));
        let usage = ResponseEvent::Usage { prompt_tokens, cached_tokens, completion_tokens: 700 };
        brain.on_response(now, ticket, usage);
        now = now + std::time::Duration::from_secs(90);
        brain.on_response(now, ticket, ResponseEvent::End { status: 200 });
    }
    endpoint(&mut brain, "unseen");
    let prompts = exact_chains(&brain, &tokens);
    let request = asking(&prompts, 2400);
    let reasons = brain.explain(now, &request, None).unwrap().record.candidates;
    assert!(reasons.iter().any(|known| known.reason == Reason::PromptDiffers), "{reasons:?}");
    assert!(compare(&mut brain, now, &request, "learned"));
}

/// Sliding windows, tiers and a second name of one block.
#[test]
fn groups_and_tiers_are_kept() {
    let mut brain = Brain::new(Plan::precise(), 1);
    let ids = ["a", "b", "c"].map(|name| endpoint(&mut brain, name));
    let tokens: Vec<u32> = (0..24).collect();
    let window = GroupKind::SlidingWindow { window: 6 };
    let full = |tier| stored(0, GroupKind::Full, &[11, 12, 13, 14, 15], &tokens[..20], tier);
    let events = [
        vec![full(Tier::Gpu), stored(1, window, &[11, 12, 13], &tokens[..12], Tier::Gpu)],
        vec![full(Tier::Cpu), stored(7, GroupKind::NotIndexable, &[11], &tokens[..4], Tier::Gpu)],
        vec![full(Tier::Gpu), full(Tier::Disk)],
    ];
    for (id, events) in ids.iter().zip(events) {
        let batch = EventBatch { timestamp_s: 1.0, events, rank: None, events_bad: 0 };
        let _ = brain.on_stream(Time(1), *id, StreamInput::Batch { seq: 0, batch });
    }
    let prompts = exact_chains(&brain, &tokens);
    let request = asking(&prompts, 24);
    let record = brain.explain(Time(2), &request, Some(3)).unwrap().record;
    let hits: Vec<u32> = record.candidates.iter().map(|c| c.hit.resident).collect();
    assert_eq!(hits, [3, 5, 5]);
    assert!(compare(&mut brain, Time(2), &request, "groups"));
}

#[test]
fn another_format_and_contradictions_are_refused() {
    let mut chaos = Chaos::new(Brain::new(Plan::precise(), 0), 0);
    (0..50).for_each(|_| chaos.step());
    let good = chaos.brain.snapshot(chaos.now);
    let restore = |snapshot: &Snapshot| Brain::restore(Plan::precise(), snapshot, 0).map(|_| ());
    assert_eq!(restore(&good), Ok(()));
    let other = Snapshot { format: FORMAT + 1, ..good.clone() };
    assert_eq!(restore(&other), Err(SnapshotError::Format { found: FORMAT + 1 }));
    let mut twice = good.clone();
    twice.endpoints.push(good.endpoints[0].clone());
    assert!(matches!(restore(&twice), Err(SnapshotError::Endpoints(_))));
    let mut place = good.clone();
    let mut moved = good.endpoints[0].clone();
    moved.endpoint.spec.address = "elsewhere:1".into();
    place.endpoints.push(moved);
    assert!(matches!(restore(&place), Err(SnapshotError::Endpoints(_))));
}
