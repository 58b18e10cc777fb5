//! Does a decision ask for memory? Once warm it does not: not for the record, nor for what is
//! remembered until the answer has come, whatever the fleet's size.

use std::alloc::System;

use bytes::Bytes;
use kvroute_core::EndpointId;
use kvroute_core::event::{BlockStored, EngineHash, EventBatch, GroupKind, KvEvent, Tier};
use kvroute_core::fleet::{EndpointSpec, EngineMetrics};
use kvroute_core::plan::Plan;
use kvroute_core::stream::{StreamInput, StreamOrder};
use kvroute_router::rehearse::{Read, Rehearsal};
use kvroute_router::{EventsSource, RouterConfig, Tokenizers};
use kvroute_tokens::Tokenizer;
use kvroute_wire::api::Api;
use kvroute_wire::request;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::runtime::Runtime;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const BLOCK: usize = 16;
/// Decisions before any is counted: until the ring of decisions is full, and what is in flight and
/// the routing history have their size.
const WARMUP: usize = 600;
const ROUNDS: usize = 100;
/// What the index asks for when a request will fill blocks that nobody holds: the speculation's
/// own list, its place in the lists of its endpoint and of all, and now and then a larger table.
const SPECULATION_MAX: f64 = 6.0;

/// For a new question, besides: the tokenizer's lists and what the tree keeps of it.
const NEW_TEXT_MAX: usize = 30;

fn rehearsal(plan: Plan, tokenizer: &Tokenizer) -> Rehearsal {
    let mut plan = plan;
    plan.settings.decisions_bytes_max = 64 << 10;
    let config = RouterConfig {
        plan,
        config: String::new(),
        seed: 1,
        http: None,
        ext_proc: None,
        admin: None,
        metrics: None,
        endpoints: Vec::new(),
        endpoints_file: None,
        endpoints_missing: None,
        events: EventsSource::Off.into(),
        tokenizers: Tokenizers { default: Some(tokenizer.clone()), ..Tokenizers::default() },
        default_model: None,
        tls: None,
        record: None,
        upstream_metric_names: None,
    };
    Rehearsal::new(config).expect("the plan is complete")
}

/// Endpoints that hold the blocks of `tokens`, with live streams and fresh metrics.
fn enter(rehearsal: &Rehearsal, endpoints: usize, tokens: &[u32]) -> Vec<EndpointId> {
    let full = tokens.len() / BLOCK;
    let enter = |at: usize| {
        let spec = EndpointSpec {
            name: format!("engine-{at}"),
            address: format!("10.0.0.{at}:8000"),
            labels: Default::default(),
            rank: 0,
            replay_available: false,
            events_expected: true,
        };
        let id = rehearsal.brain().add_endpoint(rehearsal.now(), spec).expect("there is room");
        let stored = BlockStored {
            hashes: (1..=full as u64).map(EngineHash).collect(),
            parent: None,
            tokens: tokens[..full * BLOCK].to_vec().into(),
            block_size: BLOCK as u32,
            lora_name: None,
            tier: Tier::Gpu,
            extras: Vec::new(),
            group: None,
            kind: GroupKind::Full,
        };
        let events = vec![KvEvent::Stored(stored)];
        let batch = EventBatch { timestamp_s: 0.0, events, rank: None, events_bad: 0 };
        let input = StreamInput::Batch { seq: 0, batch };
        let order = rehearsal.brain().on_stream(rehearsal.now(), id, input);
        assert_eq!(order, StreamOrder::None);
        id
    };
    (0..endpoints).map(enter).collect()
}

fn scrape(rehearsal: &Rehearsal, ids: &[EndpointId]) {
    let metrics = EngineMetrics {
        kv_usage: 0.5,
        block_size: Some(BLOCK as u32),
        blocks: Some(100_000),
        ..EngineMetrics::default()
    };
    ids.iter().for_each(|id| rehearsal.brain().on_metrics(rehearsal.now(), *id, &metrics));
}

fn body(system: &str, question: &str) -> Bytes {
    Bytes::from(format!(
        r#"{{"model":"m","messages":[{{"role":"system","content":"{system}"}},
            {{"role":"user","content":"{question}"}}],"max_tokens":100}}"#
    ))
}

/// Allocations of a decision, on average, from the chains to what the proxy needs.
fn allocations(rehearsal: &Rehearsal, ids: &[EndpointId], asked: &[Read]) -> f64 {
    let mut counted = 0;
    for round in 0..WARMUP + ROUNDS {
        // Speculations end, and metrics stay fresh.
        assert!(rehearsal.brain().tick(rehearsal.now()).is_empty());
        if round % 50 == 0 {
            scrape(rehearsal, ids);
        }
        let region = Region::new(ALLOCATOR);
        let decided = rehearsal.choose(&asked[round % asked.len()]).expect("one is chosen");
        let change = region.change();
        if round >= WARMUP {
            counted += change.allocations + change.reallocations;
        }
        decided.answer();
    }
    counted as f64 / ROUNDS as f64
}

/// Allocations of whole decisions, from body to endpoint, of which nine in ten need no more: for a
/// body that was seen, and for those with new questions behind a beginning that was seen. The
/// tenth is for a machine so busy that bodies are read on another thread.
fn whole_decisions(
    plan: &Plan,
    tokenizer: &Tokenizer,
    tokens: &[u32],
    bodies: [&dyn Fn(usize) -> Bytes; 2],
    runtime: &Runtime,
) -> [usize; 2] {
    let rehearsal = rehearsal(plan.clone(), tokenizer);
    let ids = enter(&rehearsal, 8, tokens);
    bodies.map(|body| {
        let mut counted = Vec::new();
        for round in 0..WARMUP + ROUNDS {
            assert!(rehearsal.brain().tick(rehearsal.now()).is_empty());
            if round % 50 == 0 {
                scrape(&rehearsal, &ids);
            }
            let body = body(round);
            let region = Region::new(ALLOCATOR);
            let decided = runtime.block_on(rehearsal.decide(&body)).expect("one is chosen");
            let change = region.change();
            counted.push(change.allocations + change.reallocations);
            decided.answer();
        }
        let counted = &mut counted[WARMUP..];
        counted.sort_unstable();
        counted[ROUNDS * 9 / 10]
    })
}

/// One test, because the allocator counts the whole process.
#[test]
fn decisions_ask_for_no_memory_once_warm() {
    let tokenizer = Tokenizer::demo();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let system = "a long system prompt that everybody shares. ".repeat(60);
    let seen = body(&system, "what everybody asks");
    let parsed = request::parse(Api::ChatCompletions, &seen).unwrap();
    let tokens = tokenizer.tokens_of(&parsed).unwrap().remove(0);
    assert!(tokens.len() > 20 * BLOCK, "{}", tokens.len());
    for plan in [Plan::least_cost(), Plan::precise(), Plan::baseline_round_robin()] {
        let new = |at| body(&system, &format!("new question {at}\\n").repeat(9));
        let bodies: [&dyn Fn(usize) -> Bytes; 2] = [&|_| seen.clone(), &new];
        let [again, first] = whole_decisions(&plan, &tokenizer, &tokens, bodies, &runtime);
        assert_eq!(again, 0, "from body to decision, text seen before");
        assert!(first <= NEW_TEXT_MAX, "from body to decision, new questions: {first}");
        println!("{first} from body to decision, new questions");

        for endpoints in [8, 24] {
            let rehearsal = rehearsal(plan.clone(), &tokenizer);
            let ids = enter(&rehearsal, endpoints, &tokens);
            let read = |body: &Bytes| runtime.block_on(rehearsal.read(body)).unwrap();
            let repeated = [read(&seen)];
            let counted = allocations(&rehearsal, &ids, &repeated);
            assert_eq!(counted, 0.0, "{endpoints} endpoints, all blocks held");
            let question = |at| body(&system, &format!("question {at} of somebody else").repeat(9));
            let new: Vec<Read> = (0..50).map(|at| read(&question(at))).collect();
            let counted = allocations(&rehearsal, &ids, &new);
            assert!(counted <= SPECULATION_MAX, "{endpoints} endpoints, new questions: {counted}");
        }
    }
}
