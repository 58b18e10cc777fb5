//! Whatever the network does, the index converges to the engine's true state after a resync, and
//! is exactly the engine's state at the last applied batch whenever the stream is live.
//!
//! An engine stores, copies, evicts, clears and restarts; a hostile network drops, repeats, swaps
//! and garbles batches and breaks connections; replays fail, stop short and have holes.

use std::collections::{BTreeMap, VecDeque};

use super::*;
use crate::event::{BlockRemoved, BlockStored, EngineHash, GroupKind, Tier};
use crate::index::{Index, IndexLimits};
use crate::{EndpointId, Rng};

const ID: EndpointId = EndpointId { slot: 0, generation: 0 };
const GPU: u8 = 1;

/// Copies by engine hash and tier bit, as the index counts them.
type Truth = BTreeMap<(u64, u8), u32>;

/// A batch on its way.
#[derive(Clone)]
struct Message {
    seq: u64,
    batch: EventBatch,
}

struct Engine {
    run: u64,
    seq: u64,
    /// Resident blocks with their copies; the children of a block end in one more token.
    blocks: BTreeMap<Vec<u32>, u32>,
    buffer: VecDeque<Message>,
    buffer_max: usize,
    /// The state after each batch, by run and number.
    states: BTreeMap<(u64, u64), Truth>,
}

/// Engine hashes differ between runs, as with a random seed.
fn hash(run: u64, path: &[u32]) -> EngineHash {
    let parts = path.iter().fold(run + 1, |hash, &token| hash * 31 + u64::from(token) + 1);
    EngineHash(parts.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

impl Engine {
    fn truth(&self) -> Truth {
        let copies = self.blocks.iter();
        copies.map(|(path, &copies)| ((hash(self.run, path).0, GPU), copies)).collect()
    }

    fn store(&mut self, rng: &mut Rng) -> KvEvent {
        let mut path: Vec<u32> = (0..1 + rng.below(4)).map(|_| rng.below(3) as u32).collect();
        // Parents are there while a request uses them: cut to one missing block, or copy the last.
        let depth = (1..path.len()).find(|&n| !self.blocks.contains_key(&path[..n]));
        path.truncate(depth.unwrap_or(path.len()));
        *self.blocks.entry(path.clone()).or_insert(0) += 1;
        let parent = path[..path.len() - 1].to_vec();
        KvEvent::Stored(BlockStored {
            hashes: vec![hash(self.run, &path)].into(),
            parent: (!parent.is_empty()).then(|| hash(self.run, &parent)),
            tokens: vec![path[path.len() - 1]; 2].into(),
            block_size: 2,
            lora_name: None,
            tier: Tier::Gpu,
            extras: Vec::new(),
            group: Some(0),
            kind: GroupKind::Full,
        })
    }

    fn evict(&mut self, rng: &mut Rng) -> Option<KvEvent> {
        let path = self.blocks.keys().nth(rng.below(self.blocks.len()))?.clone();
        let copies = self.blocks.get_mut(&path)?;
        *copies -= 1;
        if *copies == 0 {
            self.blocks.remove(&path);
        }
        let hashes = vec![hash(self.run, &path)];
        Some(KvEvent::Removed(BlockRemoved {
            hashes: hashes.into(),
            tier: Tier::Gpu,
            group: Some(0),
        }))
    }

    fn clear(&mut self) -> KvEvent {
        self.blocks.clear();
        KvEvent::Cleared
    }

    fn step(&mut self, rng: &mut Rng) -> Message {
        let mut events = Vec::new();
        for _ in 0..1 + rng.below(3) {
            events.extend(match rng.below(60) {
                0 => Some(self.clear()),
                1..25 => self.evict(rng),
                _ => Some(self.store(rng)),
            });
        }
        self.publish(events)
    }

    fn publish(&mut self, events: Vec<KvEvent>) -> Message {
        let timestamp_s = (self.run * 1_000_000 + self.seq) as f64;
        let batch = EventBatch { timestamp_s, events, ..EventBatch::default() };
        let message = Message { seq: self.seq, batch };
        self.states.insert((self.run, self.seq), self.truth());
        self.seq += 1;
        self.buffer.push_back(message.clone());
        if self.buffer.len() > self.buffer_max {
            self.buffer.pop_front();
        }
        message
    }

    fn restart(&mut self) {
        self.run += 1;
        self.seq = 0;
        self.blocks.clear();
        self.buffer.clear();
    }
}

struct World {
    rng: Rng,
    engine: Engine,
    wire: VecDeque<Message>,
    /// Batches of the replay under way; it fails where they end in `None`.
    replay: Option<VecDeque<Option<Message>>>,
    order: Option<u64>,
    stream: Stream,
    index: Index,
    /// Run and number of the last applied batch, and the run since the last reset.
    last: Option<(u64, u64)>,
    since_reset: Option<u64>,
    /// Batches of two runs without a reset between: chance, which only happens without replay.
    mixed: bool,
    now: Time,
    live_checks: u64,
    context: String,
}

impl World {
    fn new(seed: u64, limits: StreamLimits, buffer_max: usize) -> World {
        let mut index = Index::new(IndexLimits::default());
        index.add_endpoint(ID);
        let engine = Engine {
            run: 1,
            seq: 0,
            blocks: BTreeMap::new(),
            buffer: VecDeque::new(),
            buffer_max,
            states: BTreeMap::new(),
        };
        World {
            rng: Rng::seeded(seed),
            engine,
            wire: VecDeque::new(),
            replay: None,
            order: None,
            stream: Stream::new(limits),
            index,
            last: None,
            since_reset: None,
            mixed: false,
            now: Time::ZERO,
            live_checks: 0,
            context: format!("seed {seed}, {limits:?}, buffer {buffer_max}"),
        }
    }

    fn feed(&mut self, input: StreamInput) {
        let World { stream, index, last, since_reset, mixed, .. } = self;
        let order = stream.on(self.now, input, &mut |effect| match effect {
            StreamEffect::Reset => {
                index.clear_resident(ID);
                (*since_reset, *mixed) = (None, false);
            }
            StreamEffect::Apply(batch) => {
                let run = (batch.timestamp_s / 1e6) as u64;
                let cleared = batch.events.contains(&KvEvent::Cleared) && batch.events_bad == 0;
                *mixed = !cleared && (*mixed || since_reset.is_some_and(|since| since != run));
                *since_reset = Some(run);
                *last = Some((run, (batch.timestamp_s % 1e6) as u64));
                batch.events.iter().for_each(|event| _ = index.apply(ID, event));
            }
        });
        if let StreamOrder::Replay { from } = order {
            assert!(self.order.is_none() && self.replay.is_none(), "{}", self.context);
            self.order = Some(from);
        }
        self.check();
    }

    /// The guarantee of the state `Live`.
    fn check(&mut self) {
        assert!(self.stream.held.len() <= self.stream.limits.held_batches_max as usize);
        if self.stream.state() != StreamState::Live {
            return;
        }
        self.live_checks += 1;
        let chance = self.mixed && !self.stream.limits.replay_available;
        if let Some(last) = self.last.filter(|_| self.stream.last_seq().is_some() && !chance) {
            let known = self.index.copies_by_hash(ID);
            assert_eq!(known, self.engine.states[&last], "{} at {last:?}", self.context);
            assert_eq!(self.index.usage().pending, 0, "{}", self.context);
        }
    }

    /// Puts a batch on the wire, or does something else with it.
    fn send(&mut self, message: Message) {
        match self.rng.below(40) {
            0 | 1 if message.seq > 0 => {}
            2 => self.wire.extend([message.clone(), message]),
            // What shows a restart, the first batch of a run, comes first of that run.
            3 if self.wire.back().is_some_and(|before| before.seq > 0) => {
                let at = self.wire.len() - 1;
                self.wire.insert(at, message);
            }
            4 => {
                let mut garbled = message;
                let left = self.rng.below(garbled.batch.events.len() + 1);
                garbled.batch.events_bad = (garbled.batch.events.len() - left) as u32;
                garbled.batch.events.truncate(left);
                self.wire.push_back(garbled);
            }
            _ => self.wire.push_back(message),
        }
    }

    fn start_replay(&mut self, from: u64, hostile: bool) {
        let mut batches: VecDeque<Option<Message>> =
            self.engine.buffer.iter().filter(|m| m.seq >= from).cloned().map(Some).collect();
        match if hostile { self.rng.below(12) } else { usize::MAX } {
            0 => {
                batches.truncate(self.rng.below(batches.len() + 1));
                batches.push_back(None);
            }
            // The first one is there or the buffer does not reach back.
            1 if batches.len() > 2 => {
                batches.remove(1 + self.rng.below(batches.len() - 1));
            }
            2 if batches.len() > 2 => {
                let at = 1 + self.rng.below(batches.len() - 2);
                batches.swap(at, at + 1);
            }
            _ => {}
        }
        self.replay = Some(batches);
    }

    fn replay_step(&mut self) {
        let Some(batches) = &mut self.replay else { return };
        let input = match batches.pop_front() {
            Some(Some(Message { seq, batch, .. })) => StreamInput::ReplayBatch { seq, batch },
            Some(None) => StreamInput::ReplayFailed,
            None => StreamInput::ReplayDone,
        };
        if !matches!(input, StreamInput::ReplayBatch { .. }) {
            self.replay = None;
        }
        self.feed(input);
    }

    fn deliver(&mut self) {
        if let Some(Message { seq, batch, .. }) = self.wire.pop_front() {
            self.feed(StreamInput::Batch { seq, batch });
        }
    }

    fn disconnect(&mut self) {
        self.wire.clear();
        self.feed(StreamInput::Lost);
        for _ in 0..self.rng.below(4) {
            let _ = self.engine.step(&mut self.rng);
        }
    }

    fn hostile_step(&mut self) {
        self.now = self.now + Duration::from_secs(1);
        match self.rng.below(100) {
            0..40 => {
                let message = self.engine.step(&mut self.rng);
                self.send(message);
            }
            40..75 => self.deliver(),
            75..90 => match self.order.take() {
                Some(from) => self.start_replay(from, true),
                None => self.replay_step(),
            },
            90..93 => self.feed(StreamInput::Tick),
            93 => {
                self.disconnect();
                self.feed(StreamInput::Connected);
            }
            94 if self.rng.below(3) == 0 => {
                // Seen by its lower numbers alone: the connection seems to hold.
                self.engine.restart();
                let first = self.engine.step(&mut self.rng);
                self.wire.push_back(first);
            }
            95 if self.rng.below(3) == 0 => {
                self.engine.restart();
                self.disconnect();
                self.feed(StreamInput::Connected);
            }
            96 => self.feed(StreamInput::Drift),
            _ => {}
        }
    }

    /// A quiet network, until nothing is left to do.
    fn settle(&mut self) {
        for round in 0..2000 {
            self.now = self.now + Duration::from_secs(10);
            if let Some(from) = self.order.take() {
                self.start_replay(from, false);
            }
            while self.replay.is_some() {
                self.replay_step();
            }
            self.deliver();
            self.feed(StreamInput::Tick);
            let waits = self.order.is_some() || self.stream.state() == StreamState::Replaying;
            let rested = round > 10;
            if rested && self.wire.is_empty() && !waits {
                return;
            }
        }
        panic!("{}: never settles", self.context);
    }

    fn publish(&mut self) {
        let message = self.engine.step(&mut self.rng);
        self.wire.push_back(message);
        self.settle();
    }

    fn assert_equal(&self) {
        assert_eq!(self.stream.state(), StreamState::Live, "{}", self.context);
        let last = (self.engine.run, self.engine.seq - 1);
        assert_eq!(self.last, Some(last), "{}", self.context);
        assert_eq!(self.index.copies_by_hash(ID), self.engine.truth(), "{}", self.context);
        assert_eq!(self.index.usage().pending, 0, "{}", self.context);
    }
}

/// Returns how often the guarantee of `Live` was checked.
fn drive(seed: u64, limits: StreamLimits, buffer_max: usize) -> u64 {
    let mut world = World::new(seed, limits, buffer_max);
    for _ in 0..world.rng.below(30) {
        let _ = world.engine.step(&mut world.rng);
    }
    world.feed(StreamInput::Connected);
    for _ in 0..300 {
        world.hostile_step();
    }
    // The network recovers.
    world.settle();
    world.publish();
    world.publish();
    if world.stream.state() != StreamState::Live || world.mixed {
        let whole_buffer = limits.replay_available && buffer_max > 1000;
        assert!(!whole_buffer, "{}: {:?}", world.context, world.stream.state());
        let cleared = world.engine.clear();
        let message = world.engine.publish(vec![cleared]);
        world.wire.push_back(message);
        world.settle();
        world.publish();
    }
    world.assert_equal();
    world.live_checks
}

#[test]
fn converges_without_replay() {
    let limits = StreamLimits { replay_available: false, ..StreamLimits::default() };
    let checks: u64 = (0..700).map(|seed| drive(seed, limits, 1)).sum();
    assert!(checks > 10_000, "the stream was hardly ever live: {checks}");
}

#[test]
fn converges_by_replay_alone_when_the_buffer_reaches_back() {
    let limits = StreamLimits { replay_available: true, ..StreamLimits::default() };
    let checks: u64 = (10_000..10_700).map(|seed| drive(seed, limits, 100_000)).sum();
    assert!(checks > 10_000, "the stream was hardly ever live: {checks}");
}

#[test]
fn converges_with_short_buffers_and_few_held_batches() {
    let mut checks = 0;
    for seed in 20_000..21_400 {
        let limits = StreamLimits {
            replay_available: true,
            held_batches_max: seed as u32 % 5,
            replay_cooldown: Duration::from_secs(seed % 40),
        };
        checks += drive(seed, limits, 1 + seed as usize % 60);
    }
    assert!(checks > 10_000, "the stream was hardly ever live: {checks}");
}
