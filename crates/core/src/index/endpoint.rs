//! What the index knows about one endpoint: its engine's names for blocks and the copies of each.

use std::collections::BTreeMap;

use super::history::History;
use super::holders::{Blocks, Holder};
use super::pending::Pending;
use super::removals::Removals;
use super::speculations::SpeculationId;
use super::table::{Cell, Table, btree_bytes};
use super::{GroupState, SkipReason};
use crate::blocks::BlockKey;
use crate::event::{EngineHash, GroupKind, Tier};

/// What one engine hash stands for.
#[derive(Clone, Copy, Debug)]
struct Named {
    key: u64,
    /// Counts the stores of the endpoint: orders blocks by age.
    stamp: u32,
    /// Tiers that hold at least one copy, by [`Holder::tier`].
    tiers: u8,
}

impl Cell for Named {
    const EMPTY: Named = Named { key: 0, stamp: 0, tiers: 0 };

    fn is_empty(&self) -> bool {
        self.tiers == 0
    }
}

/// Copies of a block per tier, in a group that is not indexed by tokens.
#[derive(Clone, Copy, Debug)]
struct Copies([u16; 4]);

impl Cell for Copies {
    const EMPTY: Copies = Copies([0; 4]);

    fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }
}

/// An engine hash of an endpoint with several groups, by our key.
#[derive(Clone, Copy, Debug)]
struct HashOf {
    hash: u64,
    known: bool,
}

impl Cell for HashOf {
    const EMPTY: HashOf = HashOf { hash: 0, known: false };

    fn is_empty(&self) -> bool {
        !self.known
    }
}

#[derive(Debug)]
struct Group {
    id: u32,
    kind: GroupKind,
    members: Table<Copies>,
}

/// Where an event belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// The group whose blocks are indexed by their tokens.
    Indexed,
    /// Another group that limits what can be reused, by position.
    Beside(usize),
    /// Nowhere.
    Skip(SkipReason),
    /// To a group nothing was stored in.
    Unknown,
}

/// Groups per endpoint: real models have at most a handful.
const GROUPS_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Endpoint {
    pub slot: u16,
    pub generation: u32,
    /// Tokens per block; 0 until an event told.
    pub block_size: u32,
    indexed_group: Option<u32>,
    groups: Vec<Group>,
    names: Table<Named>,
    stamp: u32,
    /// Copies beyond the first, by engine hash and tier.
    copies: BTreeMap<(u64, u8), u32>,
    /// Engine hashes beyond the first with the same key, by key and tier.
    aliases: BTreeMap<(u64, u8), u32>,
    /// Key to engine hash, once there is a group beside the indexed one.
    hashes: Table<HashOf>,
    pub by_tier: [u32; 4],
    pub removals: Removals,
    pub pending: Pending,
    pub history: History,
    pub speculations: Vec<SpeculationId>,
}

impl Endpoint {
    /// Holds nothing. Its removals are counted from `removals_begin`.
    pub fn new(slot: u16, generation: u32, removals_begin: u64) -> Endpoint {
        Endpoint {
            slot,
            generation,
            block_size: 0,
            indexed_group: None,
            groups: Vec::new(),
            names: Table::new(),
            stamp: 0,
            copies: BTreeMap::new(),
            aliases: BTreeMap::new(),
            hashes: Table::new(),
            by_tier: [0; 4],
            removals: Removals::new(removals_begin),
            pending: Pending::new(),
            history: History::new(),
            speculations: Vec::new(),
        }
    }

    /// Engine hashes with at least one copy.
    pub fn resident(&self) -> usize {
        self.names.len()
    }

    /// Copies beyond the first of their block and tier.
    pub fn copies_extra(&self) -> u64 {
        self.copies.values().map(|&n| u64::from(n)).sum()
    }

    pub fn groups_count(&self) -> usize {
        self.groups.len()
    }

    /// Bytes on the heap, itself included.
    pub fn bytes(&self) -> usize {
        let groups = self.groups.iter().map(|group| group.members.bytes()).sum::<usize>();
        size_of::<Endpoint>()
            + self.groups.capacity() * size_of::<Group>()
            + groups
            + self.names.bytes()
            + btree_bytes(self.copies.len(), size_of::<((u64, u8), u32)>())
            + btree_bytes(self.aliases.len(), size_of::<((u64, u8), u32)>())
            + self.hashes.bytes()
            + self.pending.bytes()
            + self.history.bytes()
            + self.speculations.capacity() * size_of::<SpeculationId>()
    }

    /// Most bytes that one more block in any group can allocate here.
    pub fn growth_bytes_max(&self) -> usize {
        let groups = self.groups.iter().map(|group| group.members.growth_bytes()).max();
        let speculations = match self.speculations.len() < self.speculations.capacity() {
            true => 0,
            false => (self.speculations.len() * 2).max(4) * size_of::<SpeculationId>(),
        };
        self.names.growth_bytes()
            + speculations
            + self.hashes.growth_bytes()
            + groups.unwrap_or(0)
            + 2 * btree_bytes(1, size_of::<((u64, u8), u32)>())
    }

    /// Whether a second group has been seen.
    pub fn is_hybrid(&self) -> bool {
        self.groups.len() > 1
    }

    /// Where an event of this group belongs. `kind` is what an event with content says; one
    /// without content, or a removal, goes where its group went before.
    pub fn route(&mut self, group: Option<u32>, kind: Option<GroupKind>) -> Route {
        let Some(id) = group else {
            return match kind {
                None | Some(GroupKind::Full) => Route::Indexed,
                Some(_) => Route::Skip(SkipReason::NotIndexable),
            };
        };
        let known = self.groups.iter().position(|group| group.id == id);
        let at = match (known, kind) {
            (Some(at), Some(kind)) if self.groups[at].kind != kind => {
                return Route::Skip(SkipReason::GroupChanged);
            }
            (Some(at), _) => at,
            (None, None) if self.groups.is_empty() => return Route::Indexed,
            (None, None) => return Route::Unknown,
            (None, Some(_)) if self.groups.len() == GROUPS_MAX => {
                return Route::Skip(SkipReason::TooManyGroups);
            }
            (None, Some(kind)) => self.learn(id, kind),
        };
        match self.groups[at].kind {
            GroupKind::NotIndexable => Route::Skip(SkipReason::NotIndexable),
            GroupKind::Full if self.indexed_group == Some(id) => Route::Indexed,
            _ => Route::Beside(at),
        }
    }

    fn learn(&mut self, id: u32, kind: GroupKind) -> usize {
        self.groups.push(Group { id, kind, members: Table::new() });
        if kind == GroupKind::Full && self.indexed_group.is_none() {
            self.indexed_group = Some(id);
        }
        if self.groups.len() == 2 {
            for (hash, named) in self.names.iter() {
                self.hashes.insert(named.key, HashOf { hash, known: true });
            }
        }
        self.groups.len() - 1
    }

    pub fn key_of(&self, hash: EngineHash) -> Option<BlockKey> {
        self.names.get(hash.0).map(|named| BlockKey(named.key))
    }

    pub fn has(&self, hash: EngineHash, tier: Tier) -> bool {
        self.names.get(hash.0).is_some_and(|named| named.tiers & Holder::tier(tier) != 0)
    }

    /// One more copy of a block; whether it is the first of this engine hash in this tier.
    pub fn add(
        &mut self,
        blocks: &mut Blocks,
        hash: EngineHash,
        key: BlockKey,
        tier: Tier,
    ) -> bool {
        let bit = Holder::tier(tier);
        let mut named = match self.names.get(hash.0) {
            Some(named) if named.key == key.0 => *named,
            Some(_) => {
                // The engine gave the name to other content: what it named before is gone.
                self.forget(blocks, hash);
                Named { key: key.0, ..Named::EMPTY }
            }
            None => Named { key: key.0, ..Named::EMPTY },
        };
        if named.tiers & bit != 0 {
            *self.copies.entry((hash.0, bit)).or_insert(0) += 1;
            return false;
        }
        self.stamp = self.stamp.wrapping_add(1);
        named.stamp = self.stamp;
        named.tiers |= bit;
        self.names.insert(hash.0, named);
        self.by_tier[tier.index()] += 1;
        if !blocks.set(key.0, self.slot, bit) {
            *self.aliases.entry((key.0, bit)).or_insert(0) += 1;
        }
        if self.is_hybrid() {
            self.hashes.insert(key.0, HashOf { hash: hash.0, known: true });
        }
        true
    }

    /// One copy less; whether there was one.
    pub fn remove(&mut self, blocks: &mut Blocks, hash: EngineHash, tier: Tier) -> bool {
        let bit = Holder::tier(tier);
        if !self.has(hash, tier) {
            return false;
        }
        if take_one(&mut self.copies, (hash.0, bit)) {
            return true;
        }
        self.drop_tier(blocks, hash.0, bit);
        true
    }

    /// All copies of an engine hash in one tier are gone.
    fn drop_tier(&mut self, blocks: &mut Blocks, hash: u64, bit: u8) {
        let Some(named) = self.names.get_mut(hash) else { return };
        let key = named.key;
        if named.tiers == bit {
            self.removals.note(key);
            self.names.remove(hash);
            if self.hashes.get(key).is_some_and(|of| of.hash == hash) {
                self.hashes.remove(key);
            }
        } else {
            named.tiers &= !bit;
        }
        self.by_tier[bit.trailing_zeros() as usize] -= 1;
        if !take_one(&mut self.aliases, (key, bit)) {
            blocks.unset(key, self.slot, bit);
        }
    }

    /// Drops an engine hash from all tiers and groups.
    pub fn forget(&mut self, blocks: &mut Blocks, hash: EngineHash) {
        let tiers = self.names.get(hash.0).map_or(0, |named| named.tiers);
        for bit in Tier::ALL.map(Holder::tier) {
            if tiers & bit != 0 {
                self.copies.remove(&(hash.0, bit));
                self.drop_tier(blocks, hash.0, bit);
            }
        }
        for group in &mut self.groups {
            group.members.remove(hash.0);
        }
    }

    /// One more copy in a group beside the indexed one; whether it is the first there.
    pub fn add_beside(&mut self, at: usize, hash: EngineHash, tier: Tier) -> bool {
        let members = &mut self.groups[at].members;
        let mut copies = members.get(hash.0).copied().unwrap_or(Copies::EMPTY);
        let first = copies.0[tier.index()] == 0;
        copies.0[tier.index()] = copies.0[tier.index()].saturating_add(1);
        members.insert(hash.0, copies);
        first
    }

    /// One copy less there; whether there was one.
    pub fn remove_beside(&mut self, at: usize, hash: EngineHash, tier: Tier) -> bool {
        let members = &mut self.groups[at].members;
        let Some(copies) = members.get_mut(hash.0).filter(|c| c.0[tier.index()] > 0) else {
            return false;
        };
        let mut left = *copies;
        left.0[tier.index()] -= 1;
        match left.is_empty() {
            true => drop(members.remove(hash.0)),
            false => *copies = left,
        }
        true
    }

    /// The engine calls a group full that skips blocks: it is none, and its holes must not hide
    /// what the indexed group knows.
    pub fn distrust(&mut self, at: usize) {
        self.groups[at].kind = GroupKind::NotIndexable;
        self.groups[at].members = Table::new();
    }

    /// Forgets what the engine reported, groups included: a restarted engine may have others.
    pub fn clear(&mut self, blocks: &mut Blocks) {
        for (_, named) in std::mem::replace(&mut self.names, Table::new()).iter() {
            blocks.unset(named.key, self.slot, named.tiers);
        }
        self.removals.note_all();
        self.copies.clear();
        self.aliases.clear();
        self.hashes = Table::new();
        self.groups = Vec::new();
        self.indexed_group = None;
        self.by_tier = [0; 4];
        self.pending.clear();
    }

    /// Forgets about `count` of the blocks that were stored first; how many it were.
    pub fn evict_oldest(&mut self, blocks: &mut Blocks, count: usize) -> usize {
        let mut ages: Vec<u32> =
            self.names.iter().map(|(_, named)| self.stamp.wrapping_sub(named.stamp)).collect();
        if ages.is_empty() {
            return 0;
        }
        let youngest_out = ages.len() - count.clamp(1, ages.len());
        let (_, &mut age_min, _) = ages.select_nth_unstable(youngest_out);
        drop(ages);
        let old = |named: &Named| self.stamp.wrapping_sub(named.stamp) >= age_min;
        let out: Vec<u64> =
            self.names.iter().filter(|(_, named)| old(named)).map(|(hash, _)| hash).collect();
        out.iter().for_each(|&hash| self.forget(blocks, EngineHash(hash)));
        self.trim(2);
        out.len()
    }

    /// Gives memory back when less than `1 / part` is used.
    pub fn trim(&mut self, part: usize) {
        self.names.trim(part);
        self.hashes.trim(part);
        self.groups.iter_mut().for_each(|group| group.members.trim(part));
    }

    /// The longest boundary, at most `blocks` blocks, from which the other groups can go on too.
    /// `assumed` says which blocks count as present there without being reported.
    ///
    /// A sliding window of `w` tokens needs the last `ceil((w - 1) / block_size)` blocks before
    /// the boundary, a state space group the last one, a second full group all of them.
    pub fn boundary(&self, keys: &[BlockKey], assumed: impl Fn(BlockKey) -> bool) -> usize {
        let present = |group: &Group, key: &BlockKey| {
            let hash = self.hashes.get(key.0);
            hash.is_some_and(|of| group.members.get(of.hash).is_some()) || assumed(*key)
        };
        let mut boundary = keys.len();
        for group in self.others().filter(|group| group.kind == GroupKind::Full) {
            let missing = keys[..boundary].iter().position(|key| !present(group, key));
            boundary = missing.unwrap_or(boundary);
        }
        while boundary > 0 {
            let missing = self.others().filter_map(|group| {
                let from = boundary - self.needed(group.kind).min(boundary);
                let missing = keys[from..boundary].iter().rposition(|key| !present(group, key));
                missing.map(|i| from + i)
            });
            match missing.min() {
                // Every boundary between the missing block and this one needs it as well.
                Some(missing) => boundary = missing,
                None => break,
            }
        }
        boundary
    }

    fn others(&self) -> impl Iterator<Item = &Group> {
        let beside = |group: &&Group| self.indexed_group != Some(group.id);
        self.groups.iter().filter(beside).filter(|g| g.kind != GroupKind::NotIndexable)
    }

    /// How many blocks before a boundary a group must hold; full groups are checked before.
    fn needed(&self, kind: GroupKind) -> usize {
        match kind {
            GroupKind::SlidingWindow { window } => {
                window.saturating_sub(1).div_ceil(self.block_size.max(1)) as usize
            }
            GroupKind::Mamba => 1,
            GroupKind::Full | GroupKind::NotIndexable => 0,
        }
    }

    /// Key and tiers of every engine hash, in no order that means anything.
    pub fn names(&self) -> impl Iterator<Item = (u64, u8)> + Clone + '_ {
        self.names.iter().map(|(_, named)| (named.key, named.tiers))
    }

    /// Whether one of the groups is the indexed one.
    pub fn has_indexed_group(&self) -> bool {
        self.indexed_group.is_some()
    }

    /// The groups beside the indexed one, each with those of `keys` that it holds.
    pub fn group_states(&self, keys: impl Iterator<Item = u64> + Clone) -> Vec<GroupState> {
        let beside = self.groups.iter().filter(|group| self.indexed_group != Some(group.id));
        let state = |group: &Group| {
            let holds = |key: &u64| {
                let hash = self.hashes.get(*key);
                hash.is_some_and(|of| group.members.get(of.hash).is_some())
            };
            let keys = keys.clone().filter(holds).map(BlockKey).collect();
            GroupState { kind: group.kind, keys }
        };
        beside.map(state).collect()
    }

    /// Groups as [`Endpoint::group_states`] told, where each block is called by its key.
    pub fn restore_groups(&mut self, has_indexed: bool, states: &[GroupState]) {
        let indexed = Group { id: 0, kind: GroupKind::Full, members: Table::new() };
        self.groups = if has_indexed { vec![indexed] } else { Vec::new() };
        self.indexed_group = has_indexed.then_some(0);
        for (id, state) in (1u32..).zip(states.iter().take(GROUPS_MAX)) {
            let mut members = Table::new();
            state.keys.iter().for_each(|key| members.insert(key.0, Copies([1, 0, 0, 0])));
            self.groups.push(Group { id, kind: state.kind, members });
        }
    }

    /// Engine hashes with their copies per tier, sorted.
    pub fn copies_by_hash(&self) -> BTreeMap<(u64, u8), u32> {
        let mut all = BTreeMap::new();
        for (hash, named) in self.names.iter() {
            for bit in Tier::ALL.map(Holder::tier) {
                if named.tiers & bit != 0 {
                    let extra = self.copies.get(&(hash, bit)).copied().unwrap_or(0);
                    all.insert((hash, bit), 1 + extra);
                }
            }
        }
        all
    }
}

fn take_one(counts: &mut BTreeMap<(u64, u8), u32>, of: (u64, u8)) -> bool {
    let Some(count) = counts.get_mut(&of) else { return false };
    *count -= 1;
    if *count == 0 {
        counts.remove(&of);
    }
    true
}
