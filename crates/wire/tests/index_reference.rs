//! Does the index say of real engines' events what an obvious, slow one says? Each recording is
//! replayed for three endpoints at once: two whose engines call blocks alike, a few batches apart,
//! the second with copies in host memory as well, and one whose names are its own.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(clippy::print_stderr, reason = "what is skipped is seen, and how much was compared")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use kvroute_core::blocks::{self, BlockKey, Chain, ChainSpec, PromptExtras, Root, TokenSpace};
use kvroute_core::event::{BlockRemoved, BlockStored, EngineHash, Extra, KvEvent, Tier};
use kvroute_core::index::{Hits, Index, IndexLimits, Naming, TierWeights};
use kvroute_core::{EndpointId, Rng};
use kvroute_wire::{kv_event, trace};

/// A block and all before it, as bytes that no other blocks have: the adapter, then of each block
/// the tokens and the extras.
type Prefix = Vec<u8>;

/// What an engine holds, by its names: where the block is in which prompt, and copies by tier.
#[derive(Default)]
struct Reference {
    held: BTreeMap<EngineHash, (Prefix, [u32; 4])>,
    /// Events whose parent is not known, with the blocks that have left again.
    waiting: Vec<(BlockStored, Vec<usize>)>,
}

fn start(adapter: Option<&str>) -> Prefix {
    format!("{adapter:?};").into_bytes()
}

fn push_block(prefix: &mut Prefix, tokens: &[u32], extras: &[Extra]) {
    tokens.iter().for_each(|token| prefix.extend(token.to_le_bytes()));
    prefix.extend(format!("{extras:?};").bytes());
}

impl Reference {
    fn apply(&mut self, event: &KvEvent) {
        match event {
            KvEvent::Stored(stored) => self.stored(stored),
            KvEvent::Removed(gone) => {
                gone.hashes.iter().for_each(|&hash| self.removed(hash, gone.tier));
            }
            KvEvent::Cleared => *self = Reference::default(),
        }
    }

    fn stored(&mut self, event: &BlockStored) {
        let tier = event.tier.index();
        let has = |hash| self.held.get(hash).is_some_and(|held| held.1[tier] > 0);
        let is_first = event.parent.is_none() && event.hashes.len() > 1;
        if event.tokens.is_empty() {
            for hash in &event.hashes {
                self.held.entry(*hash).and_modify(|held| held.1[tier] += 1);
            }
        } else if is_first && event.hashes.iter().all(has) {
            // Announced again, no copy.
        } else {
            self.waiting.push((event.clone(), Vec::new()));
            let is_due = |reference: &Reference| {
                reference.waiting.iter().position(|(event, _)| reference.parent(event).is_some())
            };
            while let Some(at) = is_due(self) {
                let (event, gone) = self.waiting.remove(at);
                self.place(&event, &gone);
            }
        }
    }

    fn parent(&self, event: &BlockStored) -> Option<Prefix> {
        match event.parent {
            None => Some(start(event.lora_name.as_deref())),
            Some(parent) => self.held.get(&parent).map(|held| held.0.clone()),
        }
    }

    fn place(&mut self, event: &BlockStored, gone: &[usize]) {
        let mut prefix = self.parent(event).unwrap();
        let blocks = event.tokens.ids().chunks_exact(event.block_size as usize);
        for (at, (&hash, tokens)) in event.hashes.iter().zip(blocks).enumerate() {
            push_block(&mut prefix, tokens, event.extras.get(at).map_or(&[], Vec::as_slice));
            if !gone.contains(&at) {
                let held = self.held.entry(hash).or_insert((prefix.clone(), [0; 4]));
                held.1[event.tier.index()] += 1;
            }
        }
    }

    fn removed(&mut self, hash: EngineHash, tier: Tier) {
        if let Some(held) = self.held.get_mut(&hash).filter(|held| held.1[tier.index()] > 0) {
            held.1[tier.index()] -= 1;
        } else {
            for (event, gone) in self.waiting.iter_mut().filter(|(event, _)| event.tier == tier) {
                let is_it = |at: &usize| event.hashes[*at] == hash && !gone.contains(at);
                if let Some(at) = (0..event.hashes.len()).find(is_it) {
                    gone.push(at);
                    break;
                }
            }
        }
        self.held.retain(|_, held| held.1 != [0; 4]);
    }

    /// By tier, the prefixes that are there; first those in any tier.
    fn by_tier(&self) -> [BTreeSet<&[u8]>; 5] {
        let is_there = |copies: &[u32; 4], way: usize| way == 0 || copies[way - 1] > 0;
        std::array::from_fn(|way| {
            let held = self.held.values().filter(|held| is_there(&held.1, way));
            held.map(|held| held.0.as_slice()).collect()
        })
    }
}

/// A prompt that occurred.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Prompt {
    adapter: Option<String>,
    salt: Option<String>,
    block_size: u32,
    tokens: Vec<u32>,
}

impl Prompt {
    fn chain(&self) -> Chain {
        let root = self.adapter.as_deref().map_or(Root::Base, Root::Adapter);
        let extras = PromptExtras { cache_salt: self.salt.as_deref(), items: &[] };
        blocks::chain(ChainSpec::exact(self.block_size), root, &self.tokens, &extras)
    }

    /// Of each depth.
    fn prefixes(&self) -> Vec<Prefix> {
        let mut prefix = start(self.adapter.as_deref());
        let salt: Vec<Extra> = self.salt.clone().map(Extra::Text).into_iter().collect();
        let blocks = self.tokens.chunks_exact(self.block_size as usize).enumerate();
        let step = |(at, tokens): (usize, &[u32])| {
            push_block(&mut prefix, tokens, if at == 0 { &salt } else { &[] });
            prefix.clone()
        };
        blocks.map(step).collect()
    }

    /// Itself, cut somewhere, with something else in the last block, and somewhere.
    fn variants(&self, rng: &mut Rng) -> [Prompt; 4] {
        let mut variants = std::array::from_fn(|_| self.clone());
        let [_, cut, other_end, other] = &mut variants;
        cut.tokens.truncate(rng.below(self.tokens.len() + 1));
        *other_end.tokens.last_mut().unwrap() ^= 1;
        other.tokens[rng.below(self.tokens.len())] ^= 1;
        variants
    }
}

type Batches = Vec<Vec<KvEvent>>;

fn stored(batches: &Batches) -> impl Iterator<Item = &BlockStored> {
    batches.iter().flatten().filter_map(|event| match event {
        KvEvent::Stored(stored) => Some(stored),
        _ => None,
    })
}

/// The prompts whose blocks were ever stored, as long as they became.
fn prompts(batches: &Batches) -> Vec<Prompt> {
    let mut by_hash: BTreeMap<EngineHash, Prompt> = BTreeMap::new();
    for event in stored(batches) {
        let mut prompt = event.parent.map(|parent| by_hash[&parent].clone()).unwrap_or(Prompt {
            adapter: event.lora_name.clone(),
            salt: None,
            block_size: event.block_size,
            tokens: Vec::new(),
        });
        let blocks = event.tokens.ids().chunks_exact(event.block_size as usize);
        for (at, (&hash, tokens)) in event.hashes.iter().zip(blocks).enumerate() {
            match event.extras.get(at).map(Vec::as_slice) {
                None | Some([]) => {}
                Some([Extra::Text(salt)]) if prompt.tokens.is_empty() => {
                    prompt.salt = Some(salt.clone());
                }
                Some(extras) => panic!("not recorded: {extras:?}"),
            }
            prompt.tokens.extend(tokens);
            by_hash.insert(hash, prompt.clone());
        }
    }
    let all: BTreeSet<Prompt> = by_hash.into_values().collect();
    let goes_on = |prompt: &&Prompt| {
        all.iter().any(|longer| {
            longer != *prompt
                && (&longer.adapter, &longer.salt) == (&prompt.adapter, &prompt.salt)
                && longer.tokens.starts_with(&prompt.tokens)
        })
    };
    all.iter().filter(|prompt| !goes_on(prompt)).cloned().collect()
}

fn renamed(batches: &Batches, mut name: impl FnMut(EngineHash) -> EngineHash) -> Batches {
    let mut batches = batches.clone();
    for event in batches.iter_mut().flatten() {
        match event {
            KvEvent::Stored(event) => {
                event.parent = event.parent.map(&mut name);
                event.hashes.iter_mut().for_each(|hash| *hash = name(*hash));
            }
            KvEvent::Removed(event) => {
                event.hashes.iter_mut().for_each(|hash| *hash = name(*hash));
            }
            KvEvent::Cleared => {}
        }
    }
    batches
}

/// As an engine that names blocks by their keys would have said it.
fn native(batches: &Batches) -> Batches {
    let mut keys: BTreeMap<EngineHash, BlockKey> = BTreeMap::new();
    for event in stored(batches) {
        let root = event.lora_name.as_deref().map_or(Root::Base, Root::Adapter);
        let root = blocks::root(event.block_size, TokenSpace::Exact, root);
        let mut added = Vec::new();
        let parent = event.parent.map_or(root, |parent| keys[&parent]);
        blocks::extend(parent, event.block_size, event.tokens.ids(), &event.extras, &mut added);
        keys.extend(event.hashes.iter().copied().zip(added));
    }
    renamed(batches, |hash| EngineHash(keys.get(&hash).map_or(hash.0, |key| key.0)))
}

/// Every other event's blocks are copied to host memory, and of what is removed some leave it too.
fn offloading(batches: &Batches) -> Batches {
    let copied = |(at, event): (usize, &KvEvent)| match event {
        KvEvent::Stored(event) if at.is_multiple_of(2) => Some(KvEvent::Stored(BlockStored {
            tokens: Vec::new().into(),
            extras: Vec::new(),
            parent: None,
            tier: Tier::Cpu,
            ..event.clone()
        })),
        KvEvent::Removed(event) if at.is_multiple_of(3) => {
            Some(KvEvent::Removed(BlockRemoved { tier: Tier::Cpu, ..event.clone() }))
        }
        _ => None,
    };
    let both = |(at, batch): (usize, &Vec<KvEvent>)| {
        let events = (at..).zip(batch);
        events
            .flat_map(|(at, event)| [Some(event.clone()), copied((at, event))])
            .flatten()
            .collect()
    };
    batches.iter().enumerate().map(both).collect()
}

struct Engine {
    id: EndpointId,
    batches: Batches,
    /// Batches that it is late.
    delay: usize,
    reference: Reference,
}

#[derive(Debug, Default)]
struct Seen {
    comparisons: u64,
    hits: u64,
    in_host_memory: u64,
    /// Comparisons where the endpoints are not all alike.
    different: u64,
}

struct Replay {
    index: Index,
    engines: [Engine; 3],
    seen: Seen,
}

impl Replay {
    fn new(batches: &Batches) -> Replay {
        let own = renamed(batches, |hash| EngineHash(hash.0 ^ 0x5bd1_e995_9d1b_58d3));
        let batches = [(batches.clone(), 0), (offloading(batches), 3), (own, 5)];
        let mut index = Index::new(IndexLimits::default());
        let mut slot = 0;
        let engines = batches.map(|(batches, delay)| {
            let id = EndpointId { slot, generation: 1 };
            slot += 1;
            index.add_endpoint(id);
            Engine { id, batches, delay, reference: Reference::default() }
        });
        Replay { index, engines, seen: Seen::default() }
    }

    fn apply(&mut self, step: usize) {
        for engine in &mut self.engines {
            let at = step.checked_sub(engine.delay);
            for event in at.and_then(|at| engine.batches.get(at)).into_iter().flatten() {
                self.index.apply(engine.id, event);
                engine.reference.apply(event);
            }
        }
    }

    fn clear(&mut self, at: usize) {
        self.index.clear_resident(self.engines[at].id);
        self.engines[at].reference = Reference::default();
    }

    /// The endpoint goes, and comes back in the same place knowing nothing.
    fn remove(&mut self, at: usize, prompts: &[Prompt]) {
        let engine = &mut self.engines[at];
        let old = engine.id;
        engine.reference = Reference::default();
        engine.id.generation += 1;
        self.index.remove_endpoint(old);
        let mut hits = Hits::new();
        for prompt in prompts {
            self.index.lookup(&prompt.chain(), &TierWeights::default(), &mut hits);
            assert_eq!(hits.get(old).any, 0);
        }
        self.index.add_endpoint(self.engines[at].id);
    }

    fn compare(&mut self, prompts: &[Prompt], rng: &mut Rng) {
        let held = self.engines.each_ref().map(|engine| engine.reference.by_tier());
        let mut hits = Hits::new();
        let some: Vec<&Prompt> = prompts.iter().filter(|_| rng.below(2) == 0).collect();
        for prompt in some.into_iter().flat_map(|prompt| prompt.variants(rng)) {
            let prefixes = prompt.prefixes();
            self.index.lookup(&prompt.chain(), &TierWeights::default(), &mut hits);
            let mut all = BTreeSet::new();
            for (engine, held) in self.engines.iter().zip(&held) {
                let reach = |held: &BTreeSet<&[u8]>| {
                    prefixes.iter().take_while(|prefix| held.contains(prefix.as_slice())).count()
                };
                let expected = held.each_ref().map(|held| reach(held) as u32);
                let hit = hits.get(engine.id);
                let [gpu, cpu, disk, other] = hit.by_tier;
                assert_eq!([hit.resident, gpu, cpu, disk, other], expected, "{:?}", engine.id);
                assert_eq!((hit.expected, hit.any, hit.history), (expected[0], expected[0], 0));
                self.seen.comparisons += 1;
                self.seen.hits += u64::from(expected[0] > 0);
                self.seen.in_host_memory += u64::from(expected[2] > expected[1]);
                all.insert(expected);
            }
            self.seen.different += u64::from(all.len() > 1);
        }
    }
}

/// Replays for one choice of the endpoint that is cleared; the one after it is removed.
fn replay(name: &str, batches: &Batches, naming: Naming, cleared: usize) -> Seen {
    let mut rng = Rng::seeded(cleared as u64);
    let prompts = prompts(batches);
    let batches = if naming == Naming::Native { &native(batches) } else { batches };
    let mut replay = Replay::new(batches);
    for step in 0..batches.len() + 5 {
        replay.apply(step);
        if step == batches.len() / 2 {
            replay.clear(cleared);
        }
        if step == batches.len() / 2 + 4 {
            replay.remove((cleared + 1) % 3, &prompts);
        }
        replay.compare(&prompts, &mut rng);
    }
    assert_eq!(replay.index.usage().naming, naming, "{name}");
    for engine in &replay.engines {
        let held = engine.reference.held.iter();
        let by_tier = |(hash, (_, copies)): (&EngineHash, &(Prefix, [u32; 4]))| {
            let (hash, copies) = (*hash, *copies);
            Tier::ALL.map(|tier| ((hash, tier), copies[tier.index()]))
        };
        let copies = held.flat_map(by_tier).filter(|(_, copies)| *copies > 0);
        assert_eq!(replay.index.resident_copies(engine.id), copies.collect(), "{name}");
    }
    replay.seen
}

/// Recordings by name, and which endpoints are cleared in turn: all with those of the clone.
fn recordings() -> Vec<(String, PathBuf, &'static [usize])> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let folders: [(_, &[usize]); 2] =
        [("../../tests/data/traces", &[0, 1, 2]), ("../../../shared/data/vllm-traces", &[2])];
    for (folder, cleared) in folders {
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else {
            eprintln!("skipped: {folder} is not there");
            continue;
        };
        let files = entries.map(|entry| entry.unwrap().path().join("kv_events.jsonl"));
        let mut files: Vec<PathBuf> = files.filter(|file| file.exists()).collect();
        files.sort();
        found.extend(files.into_iter().map(|file| (file.display().to_string(), file, cleared)));
    }
    found
}

fn read(file: &Path) -> Batches {
    let lines = std::fs::read(file).unwrap();
    let messages = trace::messages(&lines).map(Result::unwrap);
    let payloads = messages.map(|message| message.payload().unwrap().to_vec());
    payloads.map(|payload| kv_event::decode_batch(&payload).unwrap().events).collect()
}

#[test]
fn index_and_reference_agree_on_recorded_events() {
    let mut replayed = 0;
    for (name, file, cleared) in recordings() {
        let batches = read(&file);
        let groups: BTreeSet<Option<u32>> = stored(&batches).map(|event| event.group).collect();
        if groups.len() > 1 {
            eprintln!("skipped: {name} has several cache groups, which end hits elsewhere");
            continue;
        }
        for naming in [Naming::Portable, Naming::Native] {
            for &cleared in cleared {
                let seen = replay(&name, &batches, naming, cleared);
                assert!(seen.hits > 100 && seen.different > 100, "{name}: too few hits");
                assert!(seen.in_host_memory > 0, "{name}: no copies that matter");
                eprintln!("{name}, {naming:?}, {cleared} cleared: {seen:?}");
            }
        }
        replayed += 1;
    }
    assert!(replayed >= 3, "{replayed} recordings");
}
