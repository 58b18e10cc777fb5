//! What does the plan decide, and is it what was expected?

use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use super::check::NONE;
use super::{Cached, ConfigTest, Expect, Names, TestEndpoint, TestRequest};
use crate::blocks::{Chain, ChainSpec, PromptExtras, Root, chain};
use crate::brain::{
    Brain, EndpointSnapshot, SNAPSHOT_FORMAT, Snapshot, SnapshotError, SnapshotHost,
};
use crate::decision::{
    Decision, DecisionRecord, Headers, NoTokens, PromptChains, Reject, Request, ResponseEvent,
    TokensKnown,
};
use crate::fleet::{
    EndpointId, EndpointSpec, EndpointState, EngineMetrics, LoraMetrics, RootKind, ServedModel,
};
use crate::index::{BlocksState, ResidentState};
use crate::learn::SeenState;
use crate::load::Load;
use crate::plan::{Plan, TokensNeed};
use crate::stream::StreamState;
use crate::{Rng, Time};

/// The moment of every test: late enough for metrics to be old.
const NOW: Time = Time(1_000_000_000_000_000);
/// How long an endpoint that fails is passed over.
const FAILING: Duration = Duration::from_secs(1);
/// Adapters that fit at once on an endpoint of a test.
const ADAPTERS_MAX: usize = 8;
/// What adapters of a test belong to.
const BASE_MODEL: &str = "base";
/// Steps of serving as records name them.
const PREFILL: &str = "prefill";
const ENCODE: &str = "encode";
/// The header of `session`.
const SESSION: &str = "x-session-id";

/// What came of one test.
#[derive(Clone, Debug, PartialEq)]
pub struct TestOutcome {
    /// Its name.
    pub name: String,
    /// Seeds that were tried, up to the first that failed.
    pub seeds: u32,
    /// `None`: it holds.
    pub failure: Option<TestFailure>,
}

/// How a test failed.
#[derive(Clone, Debug, PartialEq)]
pub struct TestFailure {
    /// The seed, counted from 0.
    pub seed: u32,
    /// What was expected, in words.
    pub expected: String,
    /// What happened instead, in words.
    pub found: String,
    /// The decision; `None`: the request was refused.
    pub record: Option<Box<DecisionRecord>>,
}

/// Runs the tests of a configuration, which have passed [`super::check()`].
pub fn run(plan: &Plan, tests: &[ConfigTest]) -> Vec<TestOutcome> {
    tests.iter().map(|test| run_one(plan, test)).collect()
}

fn run_one(plan: &Plan, test: &ConfigTest) -> TestOutcome {
    let mut seeds = 0;
    let fleet = snapshot(plan, test);
    let failure = (0..test.seeds).find_map(|seed| {
        seeds += 1;
        match fleet.as_ref().map_err(Clone::clone).and_then(|f| decide(plan, test, f, seed)) {
            Ok(decided) => compare(&test.expect, seed, decided),
            Err(found) => {
                let (expected, found) = ("a fleet that can be".to_owned(), found.to_string());
                Some(TestFailure { seed, expected, found, record: None })
            }
        }
    });
    TestOutcome { name: test.name.clone(), seeds, failure }
}

/// The decision about a test's request; outside: why there can be no such fleet.
fn decide(
    plan: &Plan,
    test: &ConfigTest,
    fleet: &Snapshot,
    seed: u32,
) -> Result<Result<DecisionRecord, Reject>, SnapshotError> {
    let mut brain = Brain::restore(plan.clone(), fleet, Rng::seeded(seed.into()).next_u64())?;
    for (at, request) in test.after.iter().enumerate() {
        let decided = ask(&mut brain, request, &format!("after[{at}]"));
        if let (Ok(Decision { ticket, .. }), false) = (decided, request.in_flight) {
            brain.on_response(NOW, ticket, ResponseEvent::FirstChunk);
            brain.on_response(NOW, ticket, ResponseEvent::End { status: 200 });
        }
    }
    Ok(ask(&mut brain, &test.request, &test.name).map(|decision| decision.record))
}

fn ask(brain: &mut Brain, request: &TestRequest, id: &str) -> Result<Decision, Reject> {
    let tokens = tokens_of(request);
    let known = match (brain.plan().tokens, &tokens) {
        (_, None) => TokensKnown::None(NoTokens::NoPrompt),
        (TokensNeed::None, _) => TokensKnown::None(NoTokens::NotNeeded),
        (TokensNeed::Estimated, _) => TokensKnown::Estimated,
        (TokensNeed::Exact, _) => TokensKnown::Exact,
    };
    let tokens = tokens.unwrap_or_default();
    let specs = brain.chain_specs();
    let chains = specs.of(known).iter().map(|spec| chain_of(brain, request, *spec, &tokens));
    let prompts = [PromptChains { chains: chains.collect() }];
    let session = request.session.iter().map(|session| (SESSION, session.as_str()));
    let headers = request.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let headers: Vec<(&str, &str)> = headers.chain(session).collect();
    let media: Vec<u64> = request.media.iter().map(|item| xxh3_64(item.as_bytes())).collect();
    let prompts = if matches!(known, TokensKnown::None(_)) { &[][..] } else { &prompts[..] };
    let request = Request {
        id,
        model: &request.model,
        prompts,
        prompt_tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        tokens_known: known,
        max_tokens: request.output_tokens,
        skips_cache: false,
        held: None,
        media: &media,
        priority: request.priority,
        headers: &Headers(&headers),
        allowed: None,
    };
    brain.decide(NOW, &request)
}

fn chain_of(brain: &Brain, request: &TestRequest, spec: ChainSpec, tokens: &[u32]) -> Chain {
    let root = match brain.root_of(&request.model) {
        RootKind::Base => Root::Base,
        RootKind::Adapter => Root::Adapter(&request.model),
    };
    chain(spec, root, tokens, &PromptExtras::default())
}

/// Numbers that stand for the tokens of a prompt; as if an engine's tokenizer had made them.
fn tokens_of(request: &TestRequest) -> Option<Vec<u32>> {
    let text = request.prompt.as_deref().map(quads);
    text.or_else(|| request.tokens.map(|tokens| (1..=tokens).collect()))
}

/// Four bytes a token, as prompts are estimated that have no tokenizer.
fn quads(text: &str) -> Vec<u32> {
    let quad = |bytes: &[u8]| bytes.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
    text.as_bytes().chunks(4).map(quad).collect()
}

/// The fleet of a test.
fn snapshot(plan: &Plan, test: &ConfigTest) -> Result<Snapshot, SnapshotError> {
    let inflight = test.fleet.iter().map(|endpoint| endpoint.inflight_requests);
    let adapters = test.fleet.iter().flat_map(|endpoint| endpoint.adapters.clone());
    let endpoints = (0u16..).zip(&test.fleet).map(|(slot, endpoint)| {
        let id = EndpointId { slot, generation: 0 };
        endpoint_of(id, endpoint)
    });
    let mut snapshot = Snapshot {
        format: SNAPSHOT_FORMAT,
        host: SnapshotHost::default(),
        at: NOW,
        left_out: Vec::new(),
        endpoints: endpoints.collect(),
        adapters: adapters.collect(),
        next_seed: 0,
        inflight_requests: inflight.fold(0, u32::saturating_add),
        learned: SeenState::default(),
        memories: Vec::new(),
    };
    // The chains that are looked up depend on the fleet.
    let brain = Brain::restore(plan.clone(), &snapshot, 0)?;
    for (endpoint, state) in test.fleet.iter().zip(&mut snapshot.endpoints) {
        state.blocks = blocks_of(&brain, test, endpoint);
    }
    Ok(snapshot)
}

fn endpoint_of(id: EndpointId, endpoint: &TestEndpoint) -> EndpointSnapshot {
    let lora = LoraMetrics {
        running: endpoint.adapters.clone(),
        waiting: Vec::new(),
        max: endpoint.adapters.len().max(ADAPTERS_MAX) as u32,
    };
    let metrics = EngineMetrics {
        waiting: endpoint.waiting,
        running: endpoint.running,
        kv_usage: endpoint.kv_usage,
        block_size: Some(endpoint.block_size),
        blocks: endpoint.kv_blocks,
        lora: (!endpoint.adapters.is_empty()).then_some(lora),
        ..EngineMetrics::default()
    };
    let age = Duration::try_from_secs_f64(endpoint.metrics_age_s).unwrap_or(Duration::MAX);
    let adapters = endpoint.adapters.iter();
    let adapters = adapters
        .map(|id| ServedModel { id: id.clone(), parent: Some(BASE_MODEL.to_owned()) })
        .collect::<Vec<_>>();
    let models = endpoint.models.as_ref().map(|models| {
        let models = models.iter().map(|id| ServedModel { id: id.clone(), parent: None });
        models.chain(adapters).collect()
    });
    let state = EndpointState {
        id,
        spec: EndpointSpec {
            name: endpoint.name.clone(),
            address: format!("{}:8000", endpoint.name),
            labels: endpoint.labels.clone(),
            rank: endpoint.rank,
            replay_available: false,
            events_expected: endpoint.events,
        },
        metrics: endpoint.scraped.then(|| (NOW - age, metrics)),
        scrape_failures: 0,
        models,
        attributes: Vec::new(),
        block_size_seen: Some(endpoint.block_size),
        failures: u32::from(endpoint.failing),
        avoided_until: if endpoint.failing { NOW + FAILING } else { Time::ZERO },
    };
    EndpointSnapshot {
        endpoint: state,
        stream: if endpoint.events { StreamState::Live } else { StreamState::Initial },
        in_doubt: false,
        prompt_differs: false,
        load: Load { requests: endpoint.inflight_requests, tokens: endpoint.inflight_tokens },
        costs: None,
        blocks: BlocksState::default(),
    }
}

/// What is cached stands in the engine's events as well as in the routing history, so that it is
/// found by whatever kind of knowledge the plan asks for.
fn blocks_of(brain: &Brain, test: &ConfigTest, endpoint: &TestEndpoint) -> BlocksState {
    let specs = brain.chain_specs();
    let specs = match brain.plan().tokens {
        TokensNeed::None => &[],
        TokensNeed::Estimated => specs.estimated(),
        TokensNeed::Exact => specs.exact(),
    };
    let mut state = BlocksState { block_size: endpoint.block_size, ..BlocksState::default() };
    for cached in &endpoint.cached {
        let tokens = cached_tokens(cached, &test.request);
        for spec in specs {
            let chain = chain_of(brain, &test.request, *spec, &tokens);
            if *spec == ChainSpec::exact(endpoint.block_size) && endpoint.events {
                let (tiers, keys) = (vec![cached.tier], chain.keys.clone());
                state.resident.push(ResidentState { tiers, keys });
            }
            state.history.extend(chain.keys);
        }
    }
    state
}

fn cached_tokens(cached: &Cached, request: &TestRequest) -> Vec<u32> {
    let prompt = cached.prompt.as_deref().map(quads).or_else(|| tokens_of(request));
    let mut tokens = prompt.unwrap_or_default();
    tokens.truncate(cached.tokens_of(tokens.len()));
    tokens
}

fn compare(
    expect: &Expect,
    seed: u32,
    decided: Result<DecisionRecord, Reject>,
) -> Option<TestFailure> {
    let (found, record) = match decided {
        Err(reject) => match expect.rejected {
            true => return None,
            false => (format!("it is refused: {reject}"), None),
        },
        Ok(record) => match holds(expect, &record) {
            true => return None,
            false => (found(expect, &record), Some(Box::new(record))),
        },
    };
    Some(TestFailure { seed, expected: expected(expect), found, record })
}

fn holds(expect: &Expect, record: &DecisionRecord) -> bool {
    let is_in = |names: &Names, name: &str| names.0.iter().any(|known| known == name);
    let chosen = record.endpoint.as_str();
    let helps =
        |names: &Names, step: &str| names.0.is_empty() || is_in(names, helper(record, step));
    !expect.rejected
        && (expect.endpoint.0.is_empty() || is_in(&expect.endpoint, chosen))
        && !is_in(&expect.not, chosen)
        && expect.profile.as_deref().is_none_or(|profile| record.profile.as_str() == profile)
        && helps(&expect.prefill, PREFILL)
        && helps(&expect.encode, ENCODE)
}

/// Who does a part of the work before the answer; [`NONE`]: nobody.
fn helper<'a>(record: &'a DecisionRecord, step: &str) -> &'a str {
    let other = record.others.iter().find(|other| other.step == step);
    other.and_then(|other| other.endpoint.as_ref()).map_or(NONE, |name| name.as_str())
}

fn expected(expect: &Expect) -> String {
    let named =
        |what: &str, names: &Names| (!names.0.is_empty()).then(|| format!("{what} {names}"));
    let parts = [
        expect.rejected.then(|| "it is refused".to_owned()),
        named("it goes to", &expect.endpoint),
        named("it does not go to", &expect.not),
        expect.profile.as_ref().map(|profile| format!("by profile {profile}")),
        named("prefill by", &expect.prefill),
        named("encode by", &expect.encode),
    ];
    parts.into_iter().flatten().collect::<Vec<String>>().join(", ")
}

fn found(expect: &Expect, record: &DecisionRecord) -> String {
    let mut text = format!("it goes to {}", record.endpoint);
    if expect.profile.is_some() {
        text += &format!(", by profile {}", record.profile);
    }
    for (names, step) in [(&expect.prefill, PREFILL), (&expect.encode, ENCODE)] {
        if !names.0.is_empty() {
            text += &format!(", {step} by {}", helper(record, step));
        }
    }
    text
}
