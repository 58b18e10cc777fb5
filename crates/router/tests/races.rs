//! Does a request see the index as it is between two events, whoever else is at the lock? One
//! thread applies events as the router does, in slices and letting others in between; others ask,
//! and note the version that they found. Every answer must be the one of its version, and no
//! version older than what was known before the question.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(clippy::print_stderr, reason = "a failure can be repeated with the seed")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

use kvroute_core::blocks::{Chain, ChainSpec, PromptExtras, Root, chain};
use kvroute_core::brain::Brain;
use kvroute_core::decision::{PromptChains, Request, ResponseEvent, TokensKnown};
use kvroute_core::event::{
    BlockRemoved, BlockStored, EngineHash, EventBatch, GroupKind, KvEvent, Tier,
};
use kvroute_core::fleet::{EndpointSpec, EngineMetrics};
use kvroute_core::index::{Hit, Hits, Index, IndexLimits, TierWeights};
use kvroute_core::plan::Plan;
use kvroute_core::stream::{StreamInput, StreamOrder};
use kvroute_core::{EndpointId, Rng, Time};
use parking_lot::{Mutex, MutexGuard};

const READERS: u64 = 3;

fn chain_of(block_size: u32, tokens: &[u32]) -> Chain {
    chain(ChainSpec::exact(block_size), Root::Base, tokens, &PromptExtras::default())
}

/// Blocks of a chain, as an engine names them.
fn names(chain: &Chain, seed: u64) -> Vec<EngineHash> {
    chain.keys.iter().map(|key| EngineHash(key.0 ^ seed)).collect()
}

fn stored(
    hashes: Vec<EngineHash>,
    parent: Option<EngineHash>,
    tokens: &[u32],
    block_size: u32,
) -> KvEvent {
    KvEvent::Stored(BlockStored {
        hashes: hashes.into(),
        parent,
        tokens: tokens.to_vec().into(),
        block_size,
        lora_name: None,
        tier: Tier::Gpu,
        extras: Vec::new(),
        group: None,
        kind: GroupKind::Full,
    })
}

/// Lets somebody else read before the writer goes on, once `ask` has said so.
fn await_a_read(reads: &AtomicU64, ask: impl FnOnce()) {
    let before = reads.load(SeqCst);
    ask();
    while reads.load(SeqCst) == before {
        thread::yield_now();
    }
}

const BLOCK: usize = 4;
const EVENTS: u64 = 3000;
const IDS: [EndpointId; 3] = [id(0), id(1), id(2)];

const fn id(slot: u16) -> EndpointId {
    EndpointId { slot, generation: 0 }
}

/// Endpoints 0 and 1 call blocks alike.
fn seed_of(id: EndpointId) -> u64 {
    if id.slot == 2 { 0x9d1b_58d3_5bd1_e995 } else { 0x0f0f_f0f0_3c3c_c3c3 }
}

/// Prompts that begin alike.
fn prompts(rng: &mut Rng) -> Vec<Vec<u32>> {
    let tokens = |blocks: usize, rng: &mut Rng| -> Vec<u32> {
        (0..blocks).flat_map(|_| [rng.below(3) as u32; BLOCK]).collect()
    };
    (0..24).map(|_| tokens(1 + rng.below(12), rng)).collect()
}

/// Some blocks in the middle of a prompt come or go; sometimes all go.
fn event(rng: &mut Rng, id: EndpointId, prompts: &[Vec<u32>]) -> KvEvent {
    let tokens = &prompts[rng.below(prompts.len())];
    let names = names(&chain_of(BLOCK as u32, tokens), seed_of(id));
    let from = if rng.below(2) == 0 { 0 } else { rng.below(names.len()) };
    let to = from + 1 + rng.below(names.len() - from);
    let hashes = names[from..to].to_vec();
    match rng.below(200) {
        0 => KvEvent::Cleared,
        1..90 => {
            KvEvent::Removed(BlockRemoved { hashes: hashes.into(), tier: Tier::Gpu, group: None })
        }
        _ => {
            let parent = from.checked_sub(1).map(|before| names[before]);
            stored(hashes, parent, &tokens[from * BLOCK..to * BLOCK], BLOCK as u32)
        }
    }
}

fn empty() -> Index {
    let mut index = Index::new(IndexLimits::default());
    IDS.iter().for_each(|&id| index.add_endpoint(id));
    index
}

fn answer(index: &Index, chain: &Chain, hits: &mut Hits) -> [Hit; 3] {
    index.lookup(chain, &TierWeights::default(), hits);
    IDS.map(|id| hits.get(id))
}

/// Events applied, and what came of them.
struct Versioned {
    index: Index,
    version: u64,
}

/// Checked when all threads are done: the writer would wait for ever for a reader that fails.
struct Read {
    version: u64,
    /// What was published before and after.
    published: [u64; 2],
    chain: usize,
    hits: [Hit; 3],
}

/// What the threads share.
struct Race {
    lock: Mutex<Versioned>,
    /// A version that has been reached; the last one when the writer is done.
    published: AtomicU64,
    /// Goes up with each version, and when the writer waits for a read: who has read, waits for
    /// the next turn, so that the work is bounded.
    turn: AtomicU64,
    reads: AtomicU64,
}

impl Race {
    fn next_turn(&self) {
        self.turn.fetch_add(1, SeqCst);
    }

    fn write(&self, events: &[(EndpointId, KvEvent)], rng: &mut Rng) {
        let mut state = self.lock.lock();
        for (id, event) in events {
            state.index.apply(*id, event);
            state.version += 1;
            self.published.store(state.version, SeqCst);
            self.next_turn();
            match rng.below(4) {
                0 => {}
                // After the last version there may be nobody left to wait for.
                1 if state.version < EVENTS => {
                    let wait = || await_a_read(&self.reads, || self.next_turn());
                    MutexGuard::unlocked(&mut state, wait);
                }
                _ => MutexGuard::bump(&mut state),
            }
        }
    }

    fn read(&self, chains: &[Chain], rng: &mut Rng) -> Vec<Read> {
        let (mut seen, mut hits): (Vec<Read>, _) = (Vec::new(), Hits::new());
        let mut turn = 0;
        while seen.last().is_none_or(|read| read.version < EVENTS) {
            while self.turn.load(SeqCst) == turn {
                thread::yield_now();
            }
            turn = self.turn.load(SeqCst);
            let chain = rng.below(chains.len());
            let known = self.published.load(SeqCst);
            let state = self.lock.lock();
            let (version, index) = (state.version, &state.index);
            let hits = answer(index, &chains[chain], &mut hits);
            self.reads.fetch_add(1, SeqCst);
            drop(state);
            let known = known.max(seen.last().map_or(0, |read| read.version));
            let published = [known, self.published.load(SeqCst)];
            let read = Read { version, published, chain, hits };
            seen.push(read);
        }
        seen
    }
}

fn race(seed: u64) {
    eprintln!("seed {seed}");
    let mut rng = Rng::seeded(seed);
    let prompts = prompts(&mut rng);
    let chains: Vec<Chain> = prompts.iter().map(|tokens| chain_of(BLOCK as u32, tokens)).collect();
    let any = |_| {
        let id = IDS[rng.below(IDS.len())];
        (id, event(&mut rng, id, &prompts))
    };
    let events: Vec<(EndpointId, KvEvent)> = (0..EVENTS).map(any).collect();
    let race = Race {
        lock: Mutex::new(Versioned { index: empty(), version: 0 }),
        published: AtomicU64::new(0),
        turn: AtomicU64::new(0),
        reads: AtomicU64::new(0),
    };
    let mut reads: Vec<Read> = thread::scope(|scope| {
        let reader = |at| {
            let (race, chains) = (&race, &chains);
            scope.spawn(move || race.read(chains, &mut Rng::seeded(seed * 100 + at)))
        };
        let readers: Vec<_> = (1..=READERS).map(reader).collect();
        race.write(&events, &mut rng);
        readers.into_iter().flat_map(|reader| reader.join().unwrap()).collect()
    });
    reads.sort_by_key(|read| read.version);
    let (mut index, mut version, mut hits) = (empty(), 0, Hits::new());
    let mut before = chains.iter().map(|chain| answer(&index, chain, &mut hits)).collect();
    let mut now: Vec<[Hit; 3]> = Vec::clone(&before);
    // Reads that would be wrong one version earlier.
    let mut telling = 0;
    let versions: BTreeSet<u64> = reads.iter().map(|read| read.version).collect();
    for read in &reads {
        let [from, to] = read.published;
        assert!((from..=to).contains(&read.version), "{from} {} {to}", read.version);
        while version < read.version {
            let (id, event) = &events[version as usize];
            index.apply(*id, event);
            version += 1;
            let answers = chains.iter().map(|chain| answer(&index, chain, &mut hits));
            before = std::mem::replace(&mut now, answers.collect());
        }
        assert_eq!(read.hits, now[read.chain], "version {version}, chain {}", read.chain);
        telling += u64::from(now[read.chain] != before[read.chain]);
    }
    eprintln!("{} reads of {} versions, {telling} telling", reads.len(), versions.len());
    assert!(versions.len() as u64 > EVENTS / 8 && telling > 10);
}

#[test]
fn every_answer_is_the_one_of_its_version() {
    (1..=8).for_each(race);
}

/// Tokens of a block.
const SIZE: u32 = 16;
/// Blocks of an event: four are a slice.
const EVENT_BLOCKS: usize = 64;
const BATCHES: u64 = 6;
const BATCH_EVENTS: u64 = 40;

fn tokens(event: u64) -> Vec<u32> {
    (0..EVENT_BLOCKS as u32 * SIZE).map(|at| event as u32 * 100_000 + at).collect()
}

fn batch(events: std::ops::Range<u64>) -> EventBatch {
    let event = |n| {
        let tokens = tokens(n);
        stored(names(&chain_of(SIZE, &tokens), 0x3c3c), None, &tokens, SIZE)
    };
    EventBatch { timestamp_s: 0.0, events: events.map(event).collect(), rank: None, events_bad: 0 }
}

/// A brain and the only endpoint that ever says something, beside one that is silent.
fn brain() -> (Brain, EndpointId) {
    let mut brain = Brain::new(Plan::precise(), 1);
    let mut add = |name: &str| {
        let spec = EndpointSpec {
            name: name.into(),
            address: format!("{name}:8000"),
            labels: BTreeMap::new(),
            rank: 0,
            replay_available: false,
            events_expected: true,
        };
        let id = brain.add_endpoint(Time::ZERO, spec).unwrap();
        let metrics = EngineMetrics { block_size: Some(SIZE), ..EngineMetrics::default() };
        brain.on_metrics(Time::ZERO, id, &metrics);
        let input = StreamInput::Batch { seq: 0, batch: batch(0..0) };
        assert_eq!(brain.on_stream(Time::ZERO, id, input), StreamOrder::None);
        id
    };
    let ids = ["a", "b"].map(&mut add);
    (brain, ids[0])
}

/// What one question found; see [`Read`].
struct Asked {
    event: u64,
    blocks_applied: u64,
    resident: u32,
}

/// Asks until all events are there.
fn decide(lock: &Mutex<Brain>, id: EndpointId, reads: &AtomicU64, rng: &mut Rng) -> Vec<Asked> {
    let (mut last, mut seen) = (0, Vec::new());
    while last < BATCHES * BATCH_EVENTS {
        // Near what is just coming.
        let event = (last + rng.below(12) as u64).saturating_sub(4);
        let tokens = tokens(event);
        let prompts = [PromptChains { chains: vec![chain_of(SIZE, &tokens)] }];
        let request = Request {
            id: "race",
            model: "model",
            prompts: &prompts,
            prompt_tokens: tokens.len() as u32,
            tokens_known: TokensKnown::Exact,
            ..Request::default()
        };
        let mut brain = lock.lock();
        let blocks_applied = brain.stream_applied(id).unwrap().stored;
        let decision = brain.decide(Time::ZERO, &request).unwrap();
        reads.fetch_add(1, SeqCst);
        drop(brain);
        let resident = decision.record.candidates[0].hit.resident;
        seen.push(Asked { event, blocks_applied, resident });
        last = blocks_applied / EVENT_BLOCKS as u64;
        lock.lock().on_response(Time::ZERO, decision.ticket, ResponseEvent::End { status: 200 });
    }
    seen
}

/// How many questions of one reader found part of a batch applied.
fn check(asked: &[Asked]) -> u64 {
    let (mut last, mut between) = (0, 0);
    for Asked { event, blocks_applied, resident } in asked {
        let version = blocks_applied / EVENT_BLOCKS as u64;
        assert_eq!(blocks_applied % EVENT_BLOCKS as u64, 0, "half an event");
        assert!(version >= last, "{version} after {last}");
        let expected = if *event < version { EVENT_BLOCKS } else { 0 };
        assert_eq!(*resident as usize, expected, "event {event} of {version}");
        between += u64::from(!version.is_multiple_of(BATCH_EVENTS));
        last = version;
    }
    between
}

#[test]
fn decisions_between_slices_see_whole_events_in_their_order() {
    let (brain, id) = brain();
    let (lock, reads) = (Mutex::new(brain), AtomicU64::new(0));
    let between: u64 = thread::scope(|scope| {
        let reader = |seed| {
            let (lock, reads) = (&lock, &reads);
            scope.spawn(move || decide(lock, id, reads, &mut Rng::seeded(seed)))
        };
        let readers: Vec<_> = (1..=READERS).map(reader).collect();
        for number in 0..BATCHES {
            let events = number * BATCH_EVENTS..(number + 1) * BATCH_EVENTS;
            let input = StreamInput::Batch { seq: number + 1, batch: batch(events) };
            let mut brain = lock.lock();
            assert_eq!(brain.on_stream_slice(Time::ZERO, id, input), StreamOrder::None);
            let mut slices = 0;
            while brain.is_behind(id) {
                match slices % 2 {
                    0 => MutexGuard::unlocked(&mut brain, || await_a_read(&reads, || ())),
                    _ => MutexGuard::bump(&mut brain),
                }
                brain.catch_up(id);
                slices += 1;
            }
        }
        readers.into_iter().map(|reader| check(&reader.join().unwrap())).sum()
    });
    eprintln!("{} decisions, {between} between slices", reads.load(SeqCst));
    // At least one in every other gap between slices of four events.
    assert!(between >= BATCHES * (BATCH_EVENTS / 4 - 1) / 2);
}
