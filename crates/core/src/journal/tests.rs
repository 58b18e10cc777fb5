//! A brain built again from a recording decides the same, byte for byte.

use std::collections::BTreeMap;
use std::sync::mpsc;

use serde::de::IgnoredAny;

use super::*;
use crate::Rng;
use crate::blocks::{BlockKey, Chain, ChainSpec, PromptExtras, Root, TokenSpace, chain};
use crate::decision::NoTokens;
use crate::event::{BlockRemoved, BlockStored, EngineHash, GroupKind, Tier};
use crate::fleet::LoraMetrics;
use crate::plan::{Experimental, Plan};
use crate::settings::Settings;

const BLOCK: usize = 16;

/// What a reader of entries sees.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Read {
    Call(Box<Call<'static>>),
    Added(IgnoredAny),
    Decided(IgnoredAny),
}

/// A host that does anything at any time.
pub(crate) struct Chaos {
    pub brain: Brain,
    pub rng: Rng,
    pub now: Time,
    names: u32,
    ids: Vec<EndpointId>,
    tickets: Vec<Ticket>,
    seqs: BTreeMap<EndpointId, u64>,
}

impl Chaos {
    pub fn new(brain: Brain, seed: u64) -> Chaos {
        let rng = Rng::seeded(seed);
        let (ids, tickets, seqs) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut chaos = Chaos { brain, rng, now: Time::ZERO, names: 0, ids, tickets, seqs };
        (0..4).for_each(|_| chaos.add());
        chaos
    }

    fn id(&mut self) -> EndpointId {
        let stale = EndpointId { slot: 0, generation: 0 };
        match self.rng.below(self.ids.len() + 1) {
            0 => stale,
            n => self.ids[n - 1],
        }
    }

    fn ticket(&mut self) -> Ticket {
        match self.tickets.len() {
            0 => Ticket::from((3, 9)),
            n => self.tickets[self.rng.below(n)],
        }
    }

    fn add(&mut self) {
        self.names += 1;
        let name = format!("e{}", self.names % 7);
        let spec = EndpointSpec {
            address: format!("{name}:80"),
            name,
            labels: BTreeMap::from([("llm-d.ai/role".to_owned(), "both".to_owned())]),
            rank: 0,
            replay_available: self.rng.below(2) == 0,
            events_expected: self.rng.below(4) > 0,
        };
        self.ids.extend(self.brain.add_endpoint(self.now, spec));
    }

    fn prompt(&mut self) -> Vec<u32> {
        let (group, blocks) = (self.rng.below(6) as u32, self.rng.below(12));
        (0..(blocks * BLOCK + 5) as u32).map(|i| group * 100_000 + i).collect()
    }

    /// Asks something.
    pub fn ask<R>(&mut self, ask: impl FnOnce(&mut Brain, Time, &Request<'_>) -> R) -> R {
        let (tokens, specs) = (self.prompt(), self.brain.chain_specs());
        let known = match self.rng.below(6) {
            0 => TokensKnown::Estimated,
            1 => TokensKnown::None(NoTokens::NoTokenizer),
            _ => TokensKnown::Exact,
        };
        let extras = PromptExtras::default();
        let chains = specs.of(known).iter().map(|s| chain(*s, Root::Base, &tokens, &extras));
        let prompts = [PromptChains { chains: chains.collect() }];
        let (id, allowed) = (format!("r{}", self.rng.below(1000)), [self.id(), self.id()]);
        let request = Request {
            id: &id,
            model: ["base", "adapter", "\u{1f980} \"quoted\""][self.rng.below(3)],
            prompts: &prompts,
            prompt_tokens: tokens.len() as u32,
            tokens_known: known,
            max_tokens: [None, Some(17)][self.rng.below(2)],
            skips_cache: self.rng.below(9) == 0,
            held: None,
            media: &[7, u64::MAX],
            priority: [0, 7, -1][self.rng.below(3)],
            headers: &Headers(&[("x-session-id", "s\n1")]),
            allowed: (self.rng.below(5) == 0).then_some(&allowed[..]),
        };
        ask(&mut self.brain, self.now, &request)
    }

    fn decide(&mut self) {
        let decided = self.ask(|brain, now, request| brain.decide(now, request));
        self.tickets.extend(decided.map(|decision| decision.ticket));
    }

    fn stream(&mut self) {
        let (id, tokens) = (self.id(), self.prompt());
        let full = tokens.len() / BLOCK;
        let hashes: Vec<EngineHash> =
            (0..full).map(|i| EngineHash((u64::from(tokens[0]) << 40) + i as u64 + 1)).collect();
        let event = match self.rng.below(6) {
            0 => KvEvent::Cleared,
            1 => KvEvent::Removed(BlockRemoved {
                hashes: hashes.into(),
                tier: Tier::Gpu,
                group: None,
            }),
            _ => KvEvent::Stored(stored(hashes, &tokens[..full * BLOCK])),
        };
        let timestamp_s = self.rng.next_f64() * 1e9;
        // The long ones are applied in slices, with calls in between.
        let events = vec![event; [1, 1, 1, 60][self.rng.below(4)]];
        let batch = EventBatch { timestamp_s, events, rank: None, events_bad: 0 };
        let seq = self.seqs.entry(id).or_insert(0);
        *seq += [0, 1, 1, 1, 1, 1, 1, 2][self.rng.below(8)];
        let seq = *seq;
        let input = match self.rng.below(16) {
            0 => StreamInput::Connected,
            1 => StreamInput::Lost,
            2 => StreamInput::ReplayDone,
            3 => StreamInput::ReplayFailed,
            4 | 5 => StreamInput::ReplayBatch { seq, batch },
            _ => StreamInput::Batch { seq, batch },
        };
        let _ = match self.rng.below(3) {
            0 => self.brain.on_stream(self.now, id, input),
            _ => self.brain.on_stream_slice(self.now, id, input),
        };
        if self.rng.below(2) == 0 {
            self.brain.catch_up(id);
        }
    }

    fn respond(&mut self) {
        let ticket = self.ticket();
        let event = match self.rng.below(4) {
            0 => ResponseEvent::FirstChunk,
            1 => ResponseEvent::Usage {
                prompt_tokens: 100,
                cached_tokens: [None, Some(64), Some(0)][self.rng.below(3)],
                completion_tokens: 4,
            },
            2 => ResponseEvent::End { status: [200, 500][self.rng.below(2)] },
            _ => ResponseEvent::Aborted,
        };
        self.brain.on_response(self.now, ticket, event);
    }

    pub fn step(&mut self) {
        self.now = Time(self.now.0 + self.rng.below(40_000_000) as u64);
        let id = self.id();
        match self.rng.below(24) {
            0 => self.add(),
            1 if self.rng.below(4) == 0 => self.brain.remove_endpoint(self.now, id),
            2 => self.brain.on_scrape_failed(self.now, id),
            3 => self.brain.on_endpoint_failed(self.now, id),
            4 if self.rng.below(4) == 0 => self.brain.on_cache_reset(self.now, id),
            5 => {
                let parent = Some("base".to_owned());
                let models = vec![ServedModel { id: "adapter".into(), parent }];
                self.brain.on_models(id, models);
            }
            6 | 7 => {
                let metrics = metrics(&mut self.rng);
                self.brain.on_metrics(self.now, id, &metrics);
            }
            8 => {
                let values = [("gpu".to_owned(), [self.rng.next_f64(), 1.0][self.rng.below(2)])];
                let valid_for = Duration::from_millis(self.rng.below(3000) as u64);
                self.brain.on_attributes(self.now, id, "dcgm", &values, valid_for);
            }
            9..=12 => self.stream(),
            13..=16 => self.respond(),
            17 => {
                let ticket = self.ticket();
                self.brain.redirect(self.now, ticket, id);
            }
            18 => {
                let _ = self.brain.tick(self.now);
            }
            _ => self.decide(),
        }
    }
}

fn stored(hashes: Vec<EngineHash>, tokens: &[u32]) -> BlockStored {
    BlockStored {
        hashes: hashes.into(),
        parent: None,
        tokens: tokens.to_vec().into(),
        block_size: BLOCK as u32,
        lora_name: None,
        tier: Tier::Gpu,
        extras: Vec::new(),
        group: None,
        kind: GroupKind::Full,
    }
}

fn metrics(rng: &mut Rng) -> EngineMetrics {
    EngineMetrics {
        waiting: rng.below(5) as u32,
        running: rng.below(50) as u32,
        kv_usage: rng.next_f64(),
        block_size: Some(BLOCK as u32),
        blocks: Some(1000),
        lora: Some(LoraMetrics { running: vec!["adapter".into()], waiting: vec![], max: 4 }),
        prefix_queries_tokens: Some(u64::MAX),
        prefix_hits_tokens: None,
    }
}

pub(crate) fn plans() -> [Plan; 4] {
    let settings = Settings {
        inflight_requests_max: 40,
        endpoints_max: 5,
        index_bytes_max: 60_000,
        inflight_age_max_s: 3,
        ..Settings::default()
    };
    let with = |plan: Plan| Plan { settings: settings.clone(), ..plan };
    let read = |text: &str| {
        Plan::build(&serde_saphyr::from_str(text).unwrap(), Experimental::Allowed).unwrap()
    };
    let approximate = read(include_str!("../../../../config/approximate.yaml"));
    [
        with(Plan::precise()),
        with(approximate),
        with(Plan::baseline_round_robin()),
        with(Plan::least_cost()),
    ]
}

/// A recorder that writes every entry as a line.
fn to_lines() -> (Recorder, mpsc::Receiver<String>) {
    let (sender, lines) = mpsc::channel();
    let recorder = move |entry: Entry<'_>| match sender.send(line(&entry)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    (Box::new(recorder), lines)
}

fn line(entry: &Entry<'_>) -> String {
    serde_json::to_string(entry).unwrap()
}

fn record(plan: Plan, seed: u64) -> Vec<String> {
    let (recorder, lines) = to_lines();
    let mut brain = Brain::new(plan, seed);
    brain.set_recorder(Some(recorder));
    let mut chaos = Chaos::new(brain, seed);
    (0..500).for_each(|_| chaos.step());
    drop(chaos);
    lines.iter().collect()
}

#[test]
fn random_calls_replayed_give_the_same_bytes() {
    let (mut decided, mut rejected) = (0, 0);
    for seed in 0..24 {
        let plan = plans()[seed as usize % 4].clone();
        let recorded = record(plan.clone(), seed);
        let (recorder, replayed) = to_lines();
        let mut brain = Brain::new(plan, seed);
        brain.set_recorder(Some(recorder));
        for text in &recorded {
            match serde_json::from_str(text).unwrap() {
                Read::Call(call) => drop(brain.apply(*call)),
                Read::Added(IgnoredAny) | Read::Decided(IgnoredAny) => {}
            }
        }
        drop(brain);
        let replayed: Vec<String> = replayed.iter().collect();
        let differs = recorded.iter().zip(&replayed).position(|(a, b)| a != b);
        if let Some(at) = differs {
            panic!("seed {seed}, entry {at}:\n{}\n{}", recorded[at], replayed[at]);
        }
        assert_eq!(recorded.len(), replayed.len(), "seed {seed}");
        decided += recorded.iter().filter(|l| l.starts_with("{\"decided\":{\"Ok\"")).count();
        rejected += recorded.iter().filter(|l| l.starts_with("{\"decided\":{\"Err\"")).count();
    }
    assert!(decided > 1000 && rejected > 10, "{decided} decided, {rejected} rejected");
}

#[test]
fn another_seed_or_a_missing_call_shows() {
    let recorded = record(Plan::precise(), 3);
    let replay = |seed: u64, left_out: &str| {
        let mut brain = Brain::new(Plan::precise(), seed);
        let calls = recorded.iter().filter(|text| !text.starts_with(left_out));
        let answers = calls.filter_map(|text| match serde_json::from_str(text).unwrap() {
            Read::Call(call) => Some(brain.apply(*call)),
            _ => None,
        });
        let decided = answers.filter_map(|answer| match answer {
            Answer::Decided(decided) => Some(line(&Entry::Decided(Cow::Owned(*decided)))),
            _ => None,
        });
        decided.collect::<Vec<String>>()
    };
    let live: Vec<String> =
        recorded.iter().filter(|l| l.starts_with("{\"decided\"")).cloned().collect();
    assert_eq!(replay(3, "nothing"), live);
    assert_ne!(replay(4, "nothing"), live);
    assert_ne!(replay(3, "{\"call\":{\"on_stream\""), live);
    assert_ne!(replay(3, "{\"call\":{\"on_response\""), live);
}

#[test]
fn a_recorder_that_breaks_hears_no_more() {
    let mut brain = Brain::new(Plan::precise(), 1);
    let (sender, heard) = mpsc::channel();
    brain.set_recorder(Some(Box::new(move |entry| {
        sender.send(entry.bytes()).unwrap();
        ControlFlow::Break(())
    })));
    let _ = brain.tick(Time(1));
    let _ = brain.tick(Time(2));
    assert_eq!(heard.iter().count(), 1);
}

fn every_event() -> Vec<KvEvent> {
    let extras = vec![
        vec![Extra::Text("salt \u{0}\"".into()), Extra::Multimodal("image".into())],
        vec![Extra::Digest(vec![0, 255, 7])],
    ];
    let mut with_extras = stored(vec![EngineHash(0), EngineHash(u64::MAX)], &[1, u32::MAX]);
    with_extras.extras = extras;
    with_extras.lora_name = Some("lora".into());
    with_extras.parent = Some(EngineHash(u64::MAX - 1));
    with_extras.kind = GroupKind::SlidingWindow { window: 128 };
    with_extras.group = Some(2);
    let mut bare = stored(Vec::new(), &[]);
    (bare.kind, bare.tier) = (GroupKind::Mamba, Tier::Disk);
    let removed =
        BlockRemoved { hashes: vec![EngineHash(7)].into(), tier: Tier::Other, group: Some(1) };
    let mut last = stored(vec![EngineHash(1 << 63)], &[5]);
    (last.kind, last.tier) = (GroupKind::NotIndexable, Tier::Cpu);
    let stored = [with_extras, bare, last].map(KvEvent::Stored);
    stored.into_iter().chain([KvEvent::Removed(removed), KvEvent::Cleared]).collect()
}

fn every_stream_input() -> Vec<StreamInput> {
    let batch = |timestamp_s: f64| EventBatch {
        timestamp_s,
        events: every_event(),
        rank: Some(3),
        events_bad: 1,
    };
    let odd = [0.1 + 0.2, -0.0, 1.797e308, f64::MIN_POSITIVE, f64::INFINITY, 1_764_000_000.123_456];
    let batches = odd.map(|stamp| StreamInput::Batch { seq: u64::MAX, batch: batch(stamp) });
    let rest = [
        StreamInput::Connected,
        StreamInput::Lost,
        StreamInput::ReplayBatch { seq: 0, batch: batch(1.0) },
        StreamInput::ReplayDone,
        StreamInput::ReplayFailed,
        StreamInput::Drift,
        StreamInput::Agrees,
        StreamInput::Tick,
    ];
    batches.into_iter().chain(rest).collect()
}

fn every_request() -> Vec<Asked<'static>> {
    let key = |n: u64| BlockKey(n);
    let specs = [
        ChainSpec::exact(16),
        ChainSpec { block_size: 4, space: TokenSpace::Estimated, partial_tail: true },
    ];
    let chains =
        specs.map(|spec| Chain { spec, keys: vec![key(0), key(1), key(u64::MAX)], tokens: 50 });
    let full = Asked {
        id: "id".into(),
        model: "model".into(),
        prompts: vec![PromptChains { chains: chains.into() }, PromptChains::default()].into(),
        prompt_tokens: 100,
        tokens_known: TokensKnown::Exact,
        max_tokens: Some(9),
        skips_cache: true,
        held: None,
        media: vec![1, u64::MAX].into(),
        priority: i32::MIN,
        headers: vec![("x-session-id".into(), "\u{7f}".into())],
        allowed: Some(vec![EndpointId { slot: 1, generation: 2 }].into()),
    };
    let whys = [
        NoTokens::NotNeeded,
        NoTokens::NoPrompt,
        NoTokens::NoTokenizer,
        NoTokens::TokenizerFailed,
        NoTokens::TooLong,
    ];
    let without = |tokens_known| Asked {
        tokens_known,
        prompts: Vec::new().into(),
        max_tokens: None,
        headers: Vec::new(),
        allowed: None,
        ..full.clone()
    };
    let known = whys.map(TokensKnown::None).into_iter().chain([TokensKnown::Estimated]);
    known.map(without).chain([full.clone()]).collect()
}

fn every_call() -> Vec<Call<'static>> {
    let (now, id) = (Time(u64::MAX), EndpointId { slot: u16::MAX, generation: u32::MAX });
    let ticket = Ticket::from((7, u32::MAX));
    let spec = EndpointSpec {
        name: "n".into(),
        address: "n:80".into(),
        labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        rank: 3,
        replay_available: true,
        events_expected: false,
    };
    let model =
        |parent: Option<&str>| ServedModel { id: "m".into(), parent: parent.map(str::to_owned) };
    let usage = ResponseEvent::Usage {
        prompt_tokens: 1,
        cached_tokens: Some(0),
        completion_tokens: u32::MAX,
    };
    let end = ResponseEvent::End { status: 200 };
    let responses = [ResponseEvent::FirstChunk, usage, end, ResponseEvent::Aborted];
    let many = [EngineMetrics::default(), metrics(&mut Rng::seeded(1))];
    let values = vec![("a \"".to_owned(), 0.1 + 0.2), (String::new(), f64::INFINITY)];
    let valid_for = Duration::new(u64::MAX, 999_999_999);
    let mut calls = vec![
        Call::OnAttributes { now, id, producer: "p".into(), values: values.into(), valid_for },
        Call::AddEndpoint { now, spec: Cow::Owned(spec) },
        Call::RemoveEndpoint { now, id },
        Call::OnScrapeFailed { now, id },
        Call::OnModels { id, models: vec![model(None), model(Some("base"))].into() },
        Call::OnEndpointFailed { now, id },
        Call::OnCacheReset { now, id },
        Call::Redirect { now, ticket, to: id },
        Call::Tick { now },
    ];
    let streams = every_stream_input().into_iter().map(Cow::<StreamInput>::Owned);
    calls.push(Call::CatchUp { id });
    for input in streams {
        calls.push(Call::OnStreamSlice { now, id, input: input.clone() });
        calls.push(Call::OnStream { now, id, input });
    }
    calls.extend(many.map(|m| Call::OnMetrics { now, id, metrics: Cow::Owned(m) }));
    calls.extend(responses.map(|event| Call::OnResponse { now, ticket, event }));
    calls.extend(every_request().into_iter().map(|request| Call::Decide { now, request }));
    calls
}

#[test]
fn every_call_survives_being_written_and_read() {
    for call in every_call() {
        let text = serde_json::to_string(&call).unwrap();
        let read: Call<'static> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, call, "{text}");
        assert_eq!(read.clone().into_owned(), read);
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
    }
}

#[test]
fn a_number_that_is_none_keeps_its_bits() {
    for bits in [f64::NAN.to_bits(), 0x7ff8_0000_0000_0abc, 0xfff0_0000_0000_0001] {
        let batch = EventBatch { timestamp_s: f64::from_bits(bits), ..EventBatch::default() };
        let text = serde_json::to_string(&batch).unwrap();
        let read: EventBatch = serde_json::from_str(&text).unwrap();
        assert_eq!(read.timestamp_s.to_bits(), bits, "{text}");
    }
}

#[test]
fn what_no_recorder_wrote_is_refused() {
    let table = [
        r#"{"tick":{"now":-1}}"#,
        r#"{"tick":{"now":1,"then":2}}"#,
        r#"{"tock":{"now":1}}"#,
        r#"{"redirect":{"now":1,"ticket":[1],"to":[0,0]}}"#,
        r#"{"on_attributes":{"now":1,"id":[0,0],"producer":"p","values":[["k",0.5]],
            "valid_for":{"secs":1,"nanos":0}}}"#,
        r#"{"on_stream":{"now":1,"id":[70000,0],"input":"tick"}}"#,
        r#"{"on_stream":{"now":1,"id":[0,0],"input":{"batch":{"seq":1,"batch":
            {"timestamp_s":"one","events":[],"rank":null,"events_bad":0}}}}}"#,
    ];
    for text in table {
        assert!(serde_json::from_str::<Call<'static>>(text).is_err(), "{text}");
    }
    for keys in ["0123456789abcde", "0123456789abcdeg", "01234567 9abcdef", "é"] {
        let text = format!(r#"{{"hashes":"{keys}","tier":"gpu","group":null}}"#);
        assert!(serde_json::from_str::<BlockRemoved>(&text).is_err(), "{text}");
    }
}

#[test]
fn memory_is_counted_where_it_is() {
    let tokens: Vec<u32> = (0..1000).collect();
    let events = vec![KvEvent::Stored(stored(vec![EngineHash(1); 62], &tokens))];
    let batch = EventBatch { events, ..EventBatch::default() };
    let input = StreamInput::Batch { seq: 0, batch };
    let id = EndpointId { slot: 0, generation: 0 };
    let small = Entry::Call(Call::Tick { now: Time(0) }).bytes();
    let call = Call::OnStream { now: Time(0), id, input: Cow::Owned(input) };
    let large = Entry::Call(call).bytes();
    assert!((4400..6000).contains(&(large - small)), "{large} {small}");
}
