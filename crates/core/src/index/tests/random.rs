//! Thousands of random steps, after each of which index and model agree.

use std::collections::BTreeSet;

use super::super::reference::{Model, Prefix};
use super::super::*;
use crate::Rng;
use crate::blocks::{self, ChainSpec, MultimodalSpan, PromptExtras, Root};
use crate::event::{BlockRemoved, BlockStored, EngineHash, Extra, GroupKind, KvEvent, Tier};

const WEIGHTS: TierWeights = TierWeights([1.0, 0.75, 0.5, 0.25]);

/// Kinds of endpoints, by slot.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    /// Engine events without groups.
    Plain,
    /// One group; the same content may have two engine hashes.
    Aliased,
    /// Sliding window, full and state space groups.
    Hybrid,
}

struct Prompt {
    tokens: Vec<u32>,
    adapter: Option<&'static str>,
    salt: Option<&'static str>,
    image: Option<MultimodalSpan>,
}

impl Prompt {
    /// Few tokens and short prompts: prefixes meet all the time.
    fn random(rng: &mut Rng) -> Prompt {
        let tokens = (0..rng.below(14)).map(|_| rng.below(2) as u32).collect();
        let rare = |rng: &mut Rng, text| (rng.below(8) == 0).then_some(text);
        let image = rare(rng, "image").map(|identifier| MultimodalSpan {
            identifier: identifier.into(),
            offset: rng.below(6) as u32,
            length: 1 + rng.below(4) as u32,
        });
        Prompt { tokens, adapter: rare(rng, "lora"), salt: rare(rng, "salt"), image }
    }

    fn chain(&self, size: u32) -> Chain {
        let root = self.adapter.map_or(Root::Base, Root::Adapter);
        let extras = PromptExtras { cache_salt: self.salt, items: self.image.as_slice() };
        blocks::chain(ChainSpec::exact(size), root, &self.tokens, &extras)
    }

    /// Long prompts of few kinds, with nothing but tokens.
    fn long(rng: &mut Rng) -> Prompt {
        let token = |rng: &mut Rng| u32::from(rng.below(12) == 0);
        let tokens = (0..rng.below(90)).map(|_| token(rng)).collect();
        Prompt { tokens, adapter: None, salt: None, image: None }
    }

    /// Extras of one block, found token by token.
    fn extras(&self, size: usize, block: usize) -> Vec<Extra> {
        let holds = |span: &&MultimodalSpan| {
            (block * size..(block + 1) * size)
                .any(|token| (span.offset..span.offset + span.length).contains(&(token as u32)))
        };
        let image = self.image.iter().filter(holds);
        let mut extras: Vec<Extra> =
            image.map(|span| Extra::Multimodal(span.identifier.clone())).collect();
        extras.extend(self.salt.filter(|_| block == 0).map(|salt| Extra::Text(salt.into())));
        extras
    }

    fn prefix(&self, size: usize) -> Prefix {
        let texts = |block| {
            let extras = self.extras(size, block).into_iter();
            extras
                .map(|extra| match extra {
                    Extra::Text(text) | Extra::Multimodal(text) => text,
                    Extra::Digest(_) => unreachable!(),
                })
                .collect()
        };
        let chunks = self.tokens.chunks_exact(size).enumerate();
        let blocks = chunks.map(|(i, chunk)| (chunk.to_vec(), texts(i))).collect();
        Prefix { adapter: self.adapter.map(str::to_owned), blocks }
    }
}

struct World {
    rng: Rng,
    index: Index,
    model: Model,
    endpoints: Vec<(EndpointId, Shape)>,
    speculations: Vec<(SpeculationId, u64)>,
    serial: u64,
    now: Time,
    applied: Applied,
    /// Blocks of hits seen, so that a test that compares nothing but zeros fails.
    seen: [u64; 4],
    /// What each endpoint holds, by slot, if all engines store what follows something that they
    /// hold, and store it once.
    orderly: Option<BTreeSet<(u16, EngineHash)>>,
}

impl World {
    fn new(seed: u64, limits: IndexLimits) -> World {
        World {
            rng: Rng::seeded(seed),
            index: Index::new(limits),
            model: Model::new(limits),
            endpoints: Vec::new(),
            speculations: Vec::new(),
            serial: 0,
            now: Time::ZERO,
            applied: Applied::default(),
            seen: [0; 4],
            orderly: None,
        }
    }

    /// What an engine does that has nothing in its way: the next blocks of a prompt come, or its
    /// last ones go.
    fn orderly_event(&mut self, id: EndpointId) -> Option<KvEvent> {
        let held = self.orderly.as_ref()?;
        let size = World::size(id);
        let prompt = Prompt::long(&mut self.rng);
        let names: Vec<EngineHash> =
            prompt.chain(size).keys.iter().map(|key| self.hash(id, key.0, 0)).collect();
        let is_held = |name: &&EngineHash| held.contains(&(id.slot, **name));
        let from = names.iter().take_while(is_held).count();
        let count = 1 + self.rng.below(4);
        if self.rng.below(3) == 0 {
            let last = names[..from].iter().rev().take(count);
            let hashes = last.copied().collect();
            return Some(KvEvent::Removed(BlockRemoved { hashes, tier: Tier::Gpu, group: None }));
        }
        let new = names[from..].iter().take(count).take_while(|name| !is_held(name)).count();
        let until = from + new;
        let tokens = prompt.tokens[from * size as usize..until * size as usize].to_vec();
        (new > 0).then(|| {
            KvEvent::Stored(BlockStored {
                hashes: names[from..until].iter().copied().collect(),
                parent: from.checked_sub(1).map(|parent| names[parent]),
                tokens: tokens.into(),
                block_size: size,
                lora_name: None,
                tier: Tier::Gpu,
                extras: Vec::new(),
                group: None,
                kind: GroupKind::Full,
            })
        })
    }

    /// Follows what orderly engines hold.
    fn follow(&mut self, slot: u16, event: Option<&KvEvent>) {
        let Some(held) = &mut self.orderly else { return };
        match event {
            Some(KvEvent::Stored(stored)) => held.extend(stored.hashes.iter().map(|h| (slot, *h))),
            Some(KvEvent::Removed(removed)) => {
                removed.hashes.iter().for_each(|hash| _ = held.remove(&(slot, *hash)));
            }
            Some(KvEvent::Cleared) | None => held.retain(|(of, _)| *of != slot),
        }
    }

    fn prompt(&mut self) -> Prompt {
        match self.orderly {
            Some(_) => Prompt::long(&mut self.rng),
            None => Prompt::random(&mut self.rng),
        }
    }

    fn size(id: EndpointId) -> u32 {
        2 + u32::from(id.slot == 3)
    }

    fn hash(&self, id: EndpointId, key: u64, alias: u64) -> EngineHash {
        // Slots 0 and 1 name blocks alike, as engines with one seed do.
        EngineHash(key ^ alias ^ (u64::from(id.slot / 2) << 40))
    }

    fn stored(&mut self, id: EndpointId, shape: Shape) -> KvEvent {
        let size = World::size(id);
        let (prompt, keys) = loop {
            let prompt = Prompt::random(&mut self.rng);
            let keys = prompt.chain(size).keys;
            if !keys.is_empty() {
                break (prompt, keys);
            }
        };
        let alias = if shape == Shape::Aliased { self.rng.below(2) as u64 } else { 0 };
        let from = if self.rng.below(3) == 0 { self.rng.below(keys.len()) } else { 0 };
        let until = from + 1 + self.rng.below(keys.len() - from);
        let size = size as usize;
        let hash = |block: usize| self.hash(id, keys[block].0, alias);
        let mut event = BlockStored {
            hashes: (from..until).map(hash).collect(),
            parent: from.checked_sub(1).map(hash),
            tokens: prompt.tokens[from * size..until * size].to_vec().into(),
            block_size: size as u32,
            lora_name: prompt.adapter.map(str::to_owned),
            tier: Tier::Gpu,
            extras: (from..until).map(|block| prompt.extras(size, block)).collect(),
            group: [None, Some(0), Some(1)][shape as usize],
            kind: GroupKind::Full,
        };
        event.tier = self.tier();
        if event.extras.iter().all(Vec::is_empty) {
            event.extras = Vec::new();
        }
        if shape == Shape::Hybrid && self.rng.below(2) == 0 {
            let window = GroupKind::SlidingWindow { window: 5 };
            (event.group, event.kind) =
                [(Some(0), window), (Some(2), GroupKind::Mamba)][self.rng.below(2)];
            event.hashes.remove(self.rng.below(event.hashes.len()));
        } else if self.rng.below(8) == 0 {
            (event.tokens, event.extras) = (Vec::new().into(), Vec::new());
            event.block_size = 0;
        }
        KvEvent::Stored(event)
    }

    fn tier(&mut self) -> Tier {
        match self.rng.below(4) {
            0 => Tier::ALL[self.rng.below(4)],
            _ => Tier::Gpu,
        }
    }

    fn removed(&mut self, id: EndpointId, shape: Shape) -> KvEvent {
        let KvEvent::Stored(stored) = self.stored(id, shape) else { unreachable!() };
        KvEvent::Removed(BlockRemoved {
            hashes: stored.hashes,
            tier: stored.tier,
            group: stored.group,
        })
    }

    fn come_or_go(&mut self) {
        if self.endpoints.len() < 3 || (self.endpoints.len() < 5 && self.rng.below(2) == 0) {
            let slot = self.rng.below(5) as u16;
            if self.endpoints.iter().all(|(id, _)| id.slot != slot) {
                self.serial += 1;
                let id = EndpointId { slot, generation: self.serial as u32 };
                let shape =
                    [Shape::Plain, Shape::Plain, Shape::Aliased, Shape::Plain, Shape::Hybrid];
                self.endpoints.push((id, shape[usize::from(slot)]));
                self.index.add_endpoint(id);
                self.model.add_endpoint(id);
            }
        } else {
            let (id, _) = self.endpoints.swap_remove(self.rng.below(self.endpoints.len()));
            self.index.remove_endpoint(id);
            self.model.remove_endpoint(id);
            self.follow(id.slot, None);
        }
    }

    fn request(&mut self, id: EndpointId) {
        let prompt = self.prompt();
        let chain = prompt.chain(World::size(id));
        let prefix = prompt.prefix(World::size(id) as usize);
        match self.rng.below(4) {
            0 => {
                self.index.record(id, &chain.keys);
                self.model.record(id, &prefix);
            }
            1 | 2 if !chain.keys.is_empty() => {
                self.serial += 1;
                let until = Time(self.now.0 + self.rng.below(20) as u64);
                let made = self.index.speculate(id, &chain, until);
                self.model.speculate(self.serial, id, &prefix, until);
                self.speculations.push((made, self.serial));
            }
            _ if !self.speculations.is_empty() => {
                // Withdrawing one that has ended does nothing: it stays in the list.
                let (made, serial) = self.speculations[self.rng.below(self.speculations.len())];
                self.index.withdraw(made);
                self.model.withdraw(serial);
            }
            _ => {}
        }
    }

    fn step(&mut self) {
        if self.endpoints.is_empty() || self.rng.below(40) == 0 {
            self.come_or_go();
            return;
        }
        let (id, shape) = self.endpoints[self.rng.below(self.endpoints.len())];
        let event = match self.rng.below(20) {
            0..15 if self.orderly.is_some() => match self.orderly_event(id) {
                Some(event) => event,
                None => return,
            },
            0..10 => self.stored(id, shape),
            10..15 => self.removed(id, shape),
            15..18 => return self.request(id),
            18 if self.rng.below(6) == 0 => KvEvent::Cleared,
            19 if self.rng.below(6) == 0 => {
                self.index.clear_resident(id);
                self.model.clear_resident(id);
                self.follow(id.slot, None);
                return;
            }
            _ => {
                self.now = Time(self.now.0 + 1 + self.rng.below(3) as u64);
                self.index.expire(self.now);
                self.model.expire(self.now);
                return;
            }
        };
        self.model.apply(id, &event);
        self.follow(id.slot, Some(&event));
        let mut event = event;
        if let (KvEvent::Stored(stored), 0) = (&mut event, self.rng.below(2)) {
            stored.hash_tokens();
        }
        self.applied += self.index.apply(id, &event);
    }

    fn compare(&mut self, hits: &mut Hits, context: &str) {
        let prompt = self.prompt();
        for size in [2, 3] {
            self.index.lookup(&prompt.chain(size), &WEIGHTS, hits);
            let prefix = prompt.prefix(size as usize);
            for slot in 0..6 {
                let known = self.endpoints.iter().find(|(id, _)| id.slot == slot);
                let id = known.map_or(EndpointId { slot, generation: 0 }, |(id, _)| *id);
                let want = self.model.lookup(id, &prefix, prompt.tokens.len(), &WEIGHTS);
                assert_eq!(hits.get(id), want, "{context}: {id:?} {:?}", prompt.tokens);
                let counts = [want.resident, want.expected, want.history, want.any];
                self.seen.iter_mut().zip(counts).for_each(|(sum, n)| *sum += u64::from(n));
                let stale = EndpointId { generation: id.generation.wrapping_sub(1), ..id };
                assert_eq!(hits.get(stale), Hit::default(), "{context}");
            }
        }
    }
}

/// What was applied, the sum of hits, and how many events took the short way.
fn drive(
    seed: u64,
    steps: u32,
    limits: IndexLimits,
    orderly: bool,
) -> (Applied, [u64; 4], [u64; 2]) {
    let start = Index::new(limits).usage();
    let mut world = World::new(seed, limits);
    world.orderly = orderly.then(BTreeSet::new);
    let mut hits = Hits::new();
    for step in 0..steps {
        world.step();
        world.compare(&mut hits, &format!("seed {seed} step {step}"));
        if step % 64 == 0 {
            world.index.check();
        }
    }
    for (id, _) in std::mem::take(&mut world.endpoints) {
        world.index.remove_endpoint(id);
    }
    world.index.check();
    assert_eq!(world.index.usage(), start, "seed {seed}: nothing is left behind");
    (world.applied, world.seen, world.index.along)
}

fn drive_all(seeds: std::ops::Range<u64>, limits: IndexLimits) -> Applied {
    let (mut applied, mut seen) = (Applied::default(), [0; 4]);
    for seed in seeds {
        let (one, hits, _) = drive(seed, 1000, limits, false);
        applied += one;
        seen.iter_mut().zip(hits).for_each(|(sum, n)| *sum += n);
    }
    assert!(seen.iter().all(|&sum| sum > 5_000), "too few hits to mean anything: {seen:?}");
    applied
}

#[test]
fn equals_the_model() {
    let applied = drive_all(0..25, super::ROOMY);
    let Applied { stored, duplicate, reannounced, removed, unknown, .. } = applied;
    let Applied { pending, resolved, cleared, .. } = applied;
    let counts = [stored, duplicate, reannounced, removed, unknown, pending, resolved, cleared];
    assert!(counts.iter().all(|&n| n > 100), "too rare to mean anything: {applied:?}");
    assert_eq!(applied.pending_dropped, 0);
}

#[test]
fn equals_the_model_when_lists_are_short() {
    let short = IndexLimits {
        history_blocks_per_endpoint_max: 5,
        pending_blocks_per_endpoint_max: 6,
        ..super::ROOMY
    };
    let applied = drive_all(1000..1025, short);
    assert!(applied.pending_dropped > 100 && applied.resolved > 100, "{applied:?}");
}

#[test]
fn orderly_engines_equal_the_model_and_their_events_take_the_short_way() {
    let (mut applied, mut along) = (Applied::default(), [0; 2]);
    for seed in 2000..2010 {
        let (one, _, short) = drive(seed, 1000, super::ROOMY, true);
        applied += one;
        along.iter_mut().zip(short).for_each(|(sum, n)| *sum += n);
    }
    assert!(along[0] > 300 && along[1] > 1000, "too few short ways: {along:?}");
    assert!(applied.removed > 1000, "{applied:?}");
    assert_eq!((applied.unknown, applied.pending, applied.duplicate), (0, 0, 0), "{applied:?}");
}
