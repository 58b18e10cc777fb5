//! Who holds which block, and how far does a prompt's chain reach on each endpoint?
//!
//! Blocks lie in a tree of runs, in the order of the prompts that they come from
//! (`index/tree.rs`). A run says once for many neighbours who holds them (`index/sets.rs`), in
//! three kinds of knowledge: *resident* (the engine said so, per tier), *speculative* (a request
//! that will fill the block is on its way) and *history* (a request with this block was routed
//! there). Engines name blocks by hashes of their own. Those that call blocks alike, as engines
//! with one hash seed do, share one map from name to block; one that does not has a map to itself.
//!
//! Invariants:
//! - A resident bit is set exactly while some engine hash of the endpoint with that key has at
//!   least one copy in that tier; a copy ends with one removal.
//! - `usage().bytes` counts capacities, not entries, and never exceeds `bytes_max` because of
//!   blocks, speculations, history or pending events; the fixed part of endpoints (some 3,500
//!   bytes each) comes on top when the budget is smaller than that.
//! - Removing an endpoint costs its own blocks only. Names that nobody uses any more are swept up
//!   when they are a sixteenth of all: on average that is a few steps for each block that was
//!   removed. Nothing else is left behind.
//! - Nothing depends on the order of a randomly seeded map: the same calls give the same answers.

mod along;
mod applied;
mod apply;
mod budget;
mod endpoint;
mod history;
mod lookup;
mod names;
mod pending;
#[cfg(test)]
mod reference;
mod removals;
mod runs;
mod sets;
mod speculations;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeMap;

use serde::Serialize;

pub use applied::{Applied, SkipReason};
pub use budget::Evicted;
pub use lookup::{Hit, Hits, TierWeights};
pub use speculations::SpeculationId;
pub use state::{BlocksState, ExpectedState, GroupState, ResidentState};
pub use tree::Naming;

use crate::blocks::{BlockKey, Chain};
use crate::event::{EngineHash, Tier};
use crate::{EndpointId, Time};
use budget::Class;
use endpoint::Endpoint;
use names::Search;
use runs::Span;
use sets::Plane;
use speculations::{Speculation, Speculations};
use tree::{Hold, Part, Tree};

/// What the index may grow to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLimits {
    /// Bytes on the heap, allocated capacity, everything included.
    pub bytes_max: usize,
    /// Blocks of routing history per endpoint; 0 keeps none.
    pub history_blocks_per_endpoint_max: u32,
    /// Blocks with an unknown parent per endpoint; 0 keeps none.
    pub pending_blocks_per_endpoint_max: u32,
    /// Speculations at one time, of all endpoints.
    pub speculations_max: u32,
}

impl Default for IndexLimits {
    /// 1 GiB (some 40 million resident blocks), 31,250 history blocks per endpoint (the default of
    /// llm-d's approximate producer), 8,192 pending blocks, 65,536 speculations.
    fn default() -> IndexLimits {
        IndexLimits {
            bytes_max: 1 << 30,
            history_blocks_per_endpoint_max: 31_250,
            pending_blocks_per_endpoint_max: 8192,
            speculations_max: 65_536,
        }
    }
}

/// Numbers about the whole index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IndexUsage {
    /// Bytes on the heap, by capacity.
    pub bytes: usize,
    /// The limit for them.
    pub bytes_max: usize,
    /// Endpoints.
    pub endpoints: usize,
    /// Distinct blocks that anybody holds in any way.
    pub blocks: usize,
    /// Pairs of block and endpoint.
    pub holders: usize,
    /// Resident engine hashes, of all endpoints.
    pub resident: usize,
    /// Blocks of routing history, of all endpoints.
    pub history: usize,
    /// Requests whose blocks are speculated.
    pub speculations: usize,
    /// Blocks that wait for their parent, of all endpoints.
    pub pending: usize,
    /// What engines' names for blocks are taken for.
    pub naming: Naming,
    /// What a limit drove out, since the start.
    pub evicted: Evicted,
}

/// Numbers about one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EndpointUsage {
    /// Tokens per block, as its events told.
    pub block_size: Option<u32>,
    /// Resident engine hashes.
    pub resident: usize,
    /// The same per tier, by `Tier::index()`.
    pub by_tier: [u32; 4],
    /// Copies beyond the first of the same block in the same tier.
    pub copies_extra: u64,
    /// Its engine calls blocks otherwise than others do, which costs a map of its own.
    pub own_names: bool,
    /// KV cache groups seen.
    pub groups: usize,
    /// Blocks that wait for their parent.
    pub pending: u32,
    /// Blocks of routing history.
    pub history: usize,
    /// Requests whose blocks are speculated.
    pub speculations: usize,
    /// Bytes on the heap that belong to it alone.
    pub bytes: usize,
}

/// The residency index. See the module's documentation.
#[derive(Debug)]
pub struct Index {
    limits: IndexLimits,
    tree: Tree,
    slots: Vec<Option<Box<Endpoint>>>,
    /// Sum of `Endpoint::bytes` of all endpoints.
    endpoint_bytes: usize,
    /// Beyond every mark that endpoints which are forgotten gave out: the same one may come back.
    removals_begin: u64,
    speculations: Speculations,
    /// Counts calls of `record`: orders history by age.
    stamp: u32,
    evicted: Evicted,
    /// Endpoints with several KV cache groups.
    hybrids: usize,
    /// Blocks that fit into the budget, as was found not long ago.
    room_left: usize,
    /// Of the endpoints, by slot; 0 where there is none.
    generations: Vec<u32>,
    scratch: Scratch,
    /// Events that were stored and removed the short way.
    #[cfg(test)]
    along: [u64; 2],
}

/// Memory that is used again.
#[derive(Debug, Default)]
struct Scratch {
    parts: Vec<Part>,
    keys: Vec<BlockKey>,
    names: Vec<u64>,
    search: Search,
}

impl Scratch {
    fn bytes(&self) -> usize {
        self.parts.capacity() * size_of::<Part>()
            + (self.keys.capacity() + self.names.capacity()) * 8
            + self.search.bytes()
    }
}

/// What an endpoint grows by when it changes is more than this only for a reason.
const GROWTH_BYTES_SMALL: usize = 4096;

impl Index {
    /// An index that knows nothing.
    pub fn new(limits: IndexLimits) -> Index {
        Index {
            limits,
            tree: Tree::new(),
            slots: Vec::new(),
            endpoint_bytes: 0,
            removals_begin: 0,
            speculations: Speculations::new(),
            stamp: 0,
            evicted: Evicted::default(),
            hybrids: 0,
            room_left: 0,
            generations: Vec::new(),
            scratch: Scratch::default(),
            #[cfg(test)]
            along: [0; 2],
        }
    }

    /// Makes room for what an endpoint will say. Another endpoint in the same slot is removed;
    /// adding the same one twice does nothing.
    pub fn add_endpoint(&mut self, id: EndpointId) {
        let slot = usize::from(id.slot);
        if self.slots.len() <= slot {
            self.slots.reserve_exact(slot + 1 - self.slots.len());
            self.slots.resize_with(slot + 1, || None);
            self.generations.reserve_exact(slot + 1 - self.generations.len());
            self.generations.resize(slot + 1, 0);
        }
        if let Some(old) = &self.slots[slot] {
            if old.generation == id.generation {
                return;
            }
            self.take_endpoint(id.slot);
        }
        let endpoint = Box::new(Endpoint::new(id.slot, id.generation, self.removals_begin));
        self.endpoint_bytes += endpoint.bytes();
        self.slots[slot] = Some(endpoint);
        self.generations[slot] = id.generation;
        self.tree.share(id.slot, true);
        self.room_left = 0;
        // Into a full index it comes at the cost of others.
        while self.bytes() > self.limits.bytes_max && self.evict(Class::Resident) {
            self.trim();
        }
    }

    /// Forgets an endpoint. Cost: its own blocks, and giving back memory that it filled.
    pub fn remove_endpoint(&mut self, id: EndpointId) {
        if self.endpoint(id).is_some() {
            self.take_endpoint(id.slot);
            let used = self.slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
            self.slots.truncate(used);
            self.slots.shrink_to_fit();
            self.generations.truncate(used);
            self.generations.shrink_to_fit();
            self.trim();
        }
    }

    fn take_endpoint(&mut self, slot: u16) {
        let Some(mut endpoint) = self.slots[usize::from(slot)].take() else { return };
        self.endpoint_bytes -= endpoint.bytes();
        self.hybrids -= usize::from(endpoint.is_hybrid());
        endpoint.clear(&mut self.tree);
        self.removals_begin = self.removals_begin.max(endpoint.removals.count() + 1);
        for span in endpoint.history.oldest_first() {
            self.tree.unhold(span, slot, 1 << Plane::HISTORY, |_, _| ());
        }
        for id in endpoint.speculations {
            self.end_speculation(id);
        }
        self.tree.share(slot, false);
    }

    /// Gives memory back after a large removal.
    fn trim(&mut self) {
        self.scratch = Scratch::default();
        let used = self.slots.len();
        self.tree.trim(used);
    }

    fn endpoint(&self, id: EndpointId) -> Option<&Endpoint> {
        let endpoint = self.slots.get(usize::from(id.slot))?.as_deref()?;
        (endpoint.generation == id.generation).then_some(endpoint)
    }

    /// Changes one endpoint and the blocks, and keeps the running sum of bytes right. The slot
    /// must be taken.
    fn change<R>(&mut self, slot: u16, change: impl FnOnce(&mut Endpoint, &mut Tree) -> R) -> R {
        let endpoint = self.slots[usize::from(slot)].as_mut().expect("callers checked the slot");
        let (before, hybrid_before) = (endpoint.bytes(), endpoint.is_hybrid());
        let result = change(endpoint, &mut self.tree);
        let after = endpoint.bytes();
        if after > before + GROWTH_BYTES_SMALL {
            // A table was made of much that was there: others may have to go.
            self.room_left = 0;
        }
        self.endpoint_bytes = self.endpoint_bytes + after - before;
        self.hybrids =
            self.hybrids + usize::from(endpoint.is_hybrid()) - usize::from(hybrid_before);
        result
    }

    /// Forgets what the engine reported about an endpoint, pending events included. Routing
    /// history, speculations and the block size stay.
    pub fn clear_resident(&mut self, id: EndpointId) {
        if self.endpoint(id).is_some() {
            self.change(id.slot, |endpoint, tree| endpoint.clear(tree));
            self.trim();
        }
    }

    /// Tokens per block of an endpoint, once its events told.
    pub fn block_size(&self, id: EndpointId) -> Option<u32> {
        self.endpoint(id).map(|endpoint| endpoint.block_size).filter(|&size| size > 0)
    }

    /// How many blocks an endpoint has lost: a mark for [`Index::may_have_lost`].
    pub fn removals(&self, id: EndpointId) -> u64 {
        self.endpoint(id).map_or(0, |endpoint| endpoint.removals.count())
    }

    /// Whether an endpoint may have lost a block since the mark was taken. It may seem so of a
    /// few others; an endpoint that is gone has lost all.
    pub fn may_have_lost(&self, id: EndpointId, key: BlockKey, mark: u64) -> bool {
        self.endpoint(id).is_none_or(|endpoint| endpoint.removals.may_include(key.0, mark))
    }

    /// Notes that a prompt with these first blocks was routed to an endpoint. Of more than the
    /// limit the first are kept.
    pub fn record(&mut self, id: EndpointId, keys: &[BlockKey]) {
        let limit = self.limits.history_blocks_per_endpoint_max as usize;
        let keys = &keys[..keys.len().min(limit)];
        if self.endpoint(id).is_none() || keys.is_empty() {
            return;
        }
        self.stamp = self.stamp.wrapping_add(1);
        if !self.make_room(id.slot, keys.len(), 0, Class::History) {
            return;
        }
        let hold = Hold { slot: id.slot, plane: Plane::HISTORY };
        let parts = self.hold(keys, hold);
        let stamp = self.stamp;
        self.change(id.slot, |endpoint, tree| {
            // From the end, so that of two blocks of a prompt the earlier one stays longer.
            for part in parts.iter().rev() {
                endpoint.history.touch(part.span, stamp);
            }
            while endpoint.history.len() > limit
                && let Some(old) = endpoint.history.pop(endpoint.history.len() - limit)
            {
                tree.unhold(old, hold.slot, 1 << Plane::HISTORY, |_, _| ());
            }
        });
        self.scratch.parts = parts;
        self.tree.sweep_if_due();
    }

    /// The blocks of a prompt, held in one more way. The caller gives the list back.
    fn hold(&mut self, keys: &[BlockKey], hold: Hold) -> Vec<Part> {
        let mut parts = std::mem::take(&mut self.scratch.parts);
        parts.clear();
        self.tree.path(None, keys, hold, &mut parts);
        for part in parts.iter().filter(|part| !part.is_new) {
            self.tree.add(part.span, hold, |_, _| ());
        }
        parts
    }

    /// Notes that a request which will fill a chain's blocks is on its way to an endpoint. It ends
    /// at `until`, by [`Index::withdraw`], or once the engine has stored the last block.
    pub fn speculate(&mut self, id: EndpointId, chain: &Chain, until: Time) -> SpeculationId {
        let limit = self.limits.speculations_max as usize;
        if self.endpoint(id).is_none() || chain.keys.is_empty() || limit == 0 {
            return SpeculationId::NONE;
        }
        while self.speculations.len() >= limit {
            self.evict_speculation();
        }
        let blocks = chain.keys.len();
        let entry = self.speculations.growth_bytes(blocks.min(blocks / 16 + 4)) + 64;
        if !self.make_room(id.slot, blocks, entry, Class::Speculative) {
            return SpeculationId::NONE;
        }
        let hold = Hold { slot: id.slot, plane: Plane::SPECULATIVE };
        let parts = self.hold(&chain.keys, hold);
        let spans: Box<[Span]> = parts.iter().map(|part| part.span).collect();
        self.scratch.parts = parts;
        let made = self.speculations.push(Speculation { slot: id.slot, until, spans });
        self.change(id.slot, |endpoint, _| endpoint.speculations.push(made));
        made
    }

    /// Ends a speculation, if it has not ended.
    pub fn withdraw(&mut self, speculation: SpeculationId) {
        if let Some(slot) = self.speculations.get(speculation).map(|s| s.slot) {
            self.change(slot, |endpoint, _| {
                endpoint.speculations.retain(|&id| id != speculation);
                if endpoint.speculations.is_empty() {
                    endpoint.speculations = Vec::new();
                }
            });
            self.end_speculation(speculation);
            self.tree.sweep_if_due();
        }
    }

    fn end_speculation(&mut self, id: SpeculationId) {
        let Some(slot) = self.speculations.get(id).map(|speculation| speculation.slot) else {
            return;
        };
        let tree = &mut self.tree;
        let hold = Hold { slot, plane: Plane::SPECULATIVE };
        self.speculations.remove(id, |span, others| {
            // What others say of the same blocks still holds.
            let mut from = span.from;
            while from < span.to {
                let covers = |other: &&Span| other.from <= from && from < other.to;
                if let Some(other) = others.iter().find(covers) {
                    from = other.to;
                    continue;
                }
                let next = others.iter().map(|other| other.from).filter(|&start| start > from);
                let to = next.min().map_or(span.to, |next| next.min(span.to));
                tree.unhold(Span { from, to, ..span }, hold.slot, 1 << hold.plane, |_, _| ());
                from = to;
            }
        });
    }

    /// Ends the speculations whose time has come.
    pub fn expire(&mut self, now: Time) {
        while let Some((until, id)) = self.speculations.first()
            && until <= now
        {
            self.withdraw(id);
        }
    }

    /// Bytes on the heap.
    fn bytes(&self) -> usize {
        self.tree.bytes()
            + self.scratch.bytes()
            + self.slots.capacity() * size_of::<Option<Box<Endpoint>>>()
            + self.generations.capacity() * 4
            + self.endpoint_bytes
            + self.speculations.bytes()
    }

    /// Numbers about the whole index. Cost: the number of endpoints.
    pub fn usage(&self) -> IndexUsage {
        let endpoints = || self.slots.iter().flatten();
        IndexUsage {
            bytes: self.bytes(),
            bytes_max: self.limits.bytes_max,
            endpoints: endpoints().count(),
            blocks: self.tree.blocks(),
            holders: self.tree.holders(),
            resident: endpoints().map(|endpoint| endpoint.resident()).sum(),
            history: endpoints().map(|endpoint| endpoint.history.len()).sum(),
            speculations: self.speculations.len(),
            pending: endpoints().map(|endpoint| endpoint.pending.blocks() as usize).sum(),
            naming: self.tree.naming(),
            evicted: self.evicted,
        }
    }

    /// What an endpoint's engine holds as far as it told: copies by engine hash and tier, pending
    /// blocks left out. For comparison with the engine itself. Cost: the names of all blocks.
    pub fn resident_copies(&self, id: EndpointId) -> BTreeMap<(EngineHash, Tier), u32> {
        let Some(endpoint) = self.endpoint(id) else { return BTreeMap::new() };
        let tier_of = |bit: u8| Tier::ALL.into_iter().find(|tier| 1 << Plane::tier(*tier) == bit);
        let copies = endpoint.copies_by_hash(&self.tree).into_iter();
        copies.filter_map(|((hash, bit), n)| Some(((EngineHash(hash), tier_of(bit)?), n))).collect()
    }

    /// Numbers about one endpoint; all zero when it is not known.
    pub fn endpoint_usage(&self, id: EndpointId) -> EndpointUsage {
        let Some(endpoint) = self.endpoint(id) else { return EndpointUsage::default() };
        EndpointUsage {
            block_size: self.block_size(id),
            resident: endpoint.resident(),
            by_tier: endpoint.by_tier,
            copies_extra: endpoint.copies_extra(),
            own_names: endpoint.has_own_names(),
            groups: endpoint.groups_count(),
            pending: endpoint.pending.blocks(),
            history: endpoint.history.len(),
            speculations: endpoint.speculations.len(),
            bytes: endpoint.bytes(),
        }
    }
}
