//! What the index knows about one endpoint: its engine's names for blocks and the copies of each.

mod latest;
mod own;

use std::collections::{BTreeMap, BTreeSet};

use super::apply::{COMPARED_EVERY, COMPARED_MIN};
use super::history::History;
use super::names::{Found, Search, Sought};
use super::pending::Pending;
use super::removals::Removals;
use super::runs::{Place, Span};
use super::sets::{Plane, SetId};
use super::speculations::SpeculationId;
use super::table::{Cell, Table, btree_bytes};
use super::tree::{Hold, Part, Tree};
use super::{GroupState, SkipReason};
use crate::blocks::BlockKey;
use crate::event::{EngineHash, GroupKind, Tier};
use latest::Latest;
use own::Own;
pub(super) use own::OwnBlock;

/// Names that are sought before the first of them is found.
const SOUGHT_MAX: usize = 32;

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
    /// None: it shares names with others.
    own: Option<Box<Own>>,
    /// Runs that it holds blocks of or has held some of, by age; one may be there twice.
    runs: Vec<u32>,
    /// How many were left when those had been looked through.
    runs_left: usize,
    /// Blocks in any tier, or names where it has its own.
    resident: usize,
    /// Copies beyond the first, by engine hash and tier.
    copies: BTreeMap<(u64, u8), u32>,
    /// Blocks whose names were compared with their keys since it was empty.
    pub compared: u32,
    /// Events since then whose names were not all compared.
    pub events: u32,
    /// Of the blocks that it holds under the names of all.
    pub latest: Latest,
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
            own: None,
            runs: Vec::new(),
            runs_left: 0,
            resident: 0,
            copies: BTreeMap::new(),
            compared: 0,
            events: 0,
            latest: Latest::new(),
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
        self.resident
    }

    /// Whether its events can be applied without a look at groups, what waits, and names of its
    /// own.
    pub fn is_plain(&self) -> bool {
        self.own.is_none() && self.groups.is_empty() && self.pending.blocks() == 0
    }

    /// Whether it holds some block twice.
    pub fn has_copies(&self) -> bool {
        !self.copies.is_empty()
    }

    /// Whether the names of its next event are taken for keys without a comparison, where names
    /// are keys.
    pub fn is_trusted(&self) -> bool {
        self.compared >= COMPARED_MIN && !self.events.wrapping_add(1).is_multiple_of(COMPARED_EVERY)
    }

    /// An event has come, of so many blocks.
    pub fn trust(&mut self, blocks: usize) {
        self.compared = self.compared.wrapping_add(blocks as u32).max(COMPARED_MIN);
        self.events = self.events.wrapping_add(1);
    }

    /// Whether it has names of its own.
    pub fn has_own_names(&self) -> bool {
        self.own.is_some()
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
            + self.own.as_ref().map_or(0, |own| own.bytes())
            + self.runs_bytes()
            + btree_bytes(self.copies.len(), COPIES_ENTRY_BYTES)
            + self.hashes.bytes()
            + self.pending.bytes()
            + self.history.bytes()
            + self.speculations.capacity() * size_of::<SpeculationId>()
    }

    /// Most bytes that `blocks` more in any group can allocate here.
    pub fn growth_bytes_max(&self, blocks: usize) -> usize {
        let groups = self.groups.iter().map(|group| group.members.growth_bytes()).max();
        let speculations = match self.speculations.len() < self.speculations.capacity() {
            true => 0,
            false => (self.speculations.len() * 2).max(4) * size_of::<SpeculationId>(),
        };
        let copies = btree_bytes(self.copies.len() + blocks, COPIES_ENTRY_BYTES)
            - btree_bytes(self.copies.len(), COPIES_ENTRY_BYTES);
        let own = self.own.as_ref().map_or(0, |own| own.growth_bytes_max(blocks));
        // A table grows by half, more than once when many blocks come.
        let beside = if self.groups.is_empty() { 0 } else { blocks * 96 };
        let runs = if self.runs.len() < self.runs.capacity() { 0 } else { self.runs_next() };
        self.hashes.growth_bytes()
            + groups.unwrap_or(0)
            + beside
            + speculations
            + own
            + copies
            + (runs + blocks / 128 + 2) * 4
    }

    /// Whether a second group has been seen.
    pub fn is_hybrid(&self) -> bool {
        self.groups.len() > 1
    }

    /// Where an event of this group belongs. `kind` is what an event with content says; one
    /// without content, or a removal, goes where its group went before.
    pub fn route(&mut self, tree: &Tree, group: Option<u32>, kind: Option<GroupKind>) -> Route {
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
            (None, Some(kind)) => self.learn(tree, id, kind),
        };
        match self.groups[at].kind {
            GroupKind::NotIndexable => Route::Skip(SkipReason::NotIndexable),
            GroupKind::Full if self.indexed_group == Some(id) => Route::Indexed,
            _ => Route::Beside(at),
        }
    }

    fn learn(&mut self, tree: &Tree, id: u32, kind: GroupKind) -> usize {
        self.groups.push(Group { id, kind, members: Table::new() });
        if kind == GroupKind::Full && self.indexed_group.is_none() {
            self.indexed_group = Some(id);
        }
        if self.groups.len() == 2 {
            for (hash, _) in self.names(tree) {
                let Some((_, key)) = self.place_of(tree, EngineHash(hash)) else { continue };
                self.hashes.insert(key.0, HashOf { hash, known: true });
            }
        }
        self.groups.len() - 1
    }

    /// The block of an engine hash and its key, if the endpoint holds it.
    pub fn place_of(&self, tree: &Tree, hash: EngineHash) -> Option<(Place, BlockKey)> {
        match &self.own {
            Some(own) => own.names.get(hash.0).map(|named| (named.place, named.key)),
            None => {
                let place = self.latest.get(hash).or_else(|| {
                    let place = tree.names.get(hash.0)?;
                    // What it holds has its name: no need to ask whether the name is alive.
                    (tree.set(place).of(self.slot) & Plane::TIERS != 0).then_some(place)
                })?;
                Some((place, tree.key_of(place, hash.0)))
            }
        }
    }

    pub fn has(&self, tree: &Tree, hash: EngineHash, tier: Tier) -> bool {
        let bit = 1 << Plane::tier(tier);
        match &self.own {
            Some(own) => own.names.get(hash.0).is_some_and(|named| named.tiers & bit != 0),
            None => {
                let place = tree.names.get(hash.0);
                place.is_some_and(|place| tree.set(place).of(self.slot) & bit != 0)
            }
        }
    }

    fn hold(&self, tier: Tier) -> Hold {
        Hold { slot: self.slot, plane: Plane::tier(tier) }
    }

    /// One more copy of each block of a part, whose names are known to all; how many were the
    /// first of their tier here, and whether a request was expected to fill one.
    pub fn add(&mut self, tree: &mut Tree, part: Part, names: &[u64], tier: Tier) -> (usize, bool) {
        let mut first = part.span.len();
        let mut awaited = false;
        let bit = 1 << Plane::tier(tier);
        if part.is_new {
            self.resident += first;
        } else {
            let Endpoint { copies, resident, .. } = self;
            let from = part.span.from;
            let hold = Hold { slot: self.slot, plane: Plane::tier(tier) };
            tree.add(part.span, hold, |range, planes| {
                awaited |= planes & 1 << Plane::SPECULATIVE != 0;
                *resident += if planes & Plane::TIERS == 0 { range.len() } else { 0 };
                if planes & bit != 0 {
                    first -= range.len();
                    for at in range {
                        let name = names[usize::from(at - from)];
                        *copies.entry((name, bit)).or_insert(0) += 1;
                    }
                }
            });
        }
        self.by_tier[tier.index()] += first as u32;
        self.enter(tree, part.span.run);
        self.note_hashes(tree, part.span, names);
        (first, awaited)
    }

    /// The first copies in their tier of so many blocks of a run, held in these ways so far.
    pub fn holds(&mut self, tree: &Tree, run: u32, blocks: usize, tier: Tier, planes: u8) {
        self.resident += if planes & Plane::TIERS == 0 { blocks } else { 0 };
        self.by_tier[tier.index()] += blocks as u32;
        self.enter(tree, run);
    }

    /// Bytes of the one list that grows when a block is held for the first time.
    pub fn runs_bytes(&self) -> usize {
        self.runs.capacity() * 4
    }

    fn note_hashes(&mut self, tree: &Tree, span: Span, names: &[u64]) {
        if self.is_hybrid() {
            for (at, &hash) in names.iter().enumerate() {
                let key = tree.key_of(span.place(at), hash);
                self.hashes.insert(key.0, HashOf { hash, known: true });
            }
        }
    }

    /// It holds something of a run from now on.
    #[inline]
    fn enter(&mut self, tree: &Tree, run: u32) {
        if self.runs.last() != Some(&run) {
            self.enter_another(tree, run);
        }
    }

    fn enter_another(&mut self, tree: &Tree, run: u32) {
        if self.runs.len() == self.runs.capacity() {
            if self.runs.len() > 2 * self.runs_left + 64 {
                self.look_through_runs(tree);
            }
            let more = self.runs_next() - self.runs.len();
            self.runs.reserve_exact(more);
        }
        self.runs.push(run);
    }

    fn runs_next(&self) -> usize {
        self.runs.len() + self.runs.len() / 4 + 8
    }

    /// Leaves each run once, and of those only the ones that it holds something of.
    fn look_through_runs(&mut self, tree: &Tree) {
        let slot = self.slot;
        let mut seen = BTreeSet::new();
        let holds = |run: u32| {
            let steps = tree.runs.span(run).to;
            let mut steps = (steps > 0).then(|| tree.runs.get(run).steps()).into_iter().flatten();
            steps.any(|step| tree.sets.get(step.set).of(slot) & Plane::TIERS != 0)
        };
        self.runs.retain(|&run| holds(run) && seen.insert(run));
        self.runs.shrink_to(self.runs.len() + 8);
        self.runs_left = self.runs.len();
    }

    /// One copy less of each block; how many there were of which was none.
    pub fn remove(
        &mut self,
        tree: &mut Tree,
        hashes: &[EngineHash],
        tier: Tier,
        search: &mut Search,
    ) -> usize {
        let mut missing = 0;
        if self.own.is_some() {
            for &hash in hashes {
                let known = self.remove_own(tree, hash, tier) || self.pending.remove(hash, tier);
                missing += usize::from(!known);
            }
            return missing;
        }
        for hashes in hashes.chunks(SOUGHT_MAX) {
            let Search { sought, found } = search;
            sought.clear();
            sought.extend(tree.names.seek(hashes));
            let mut rest = &sought[..];
            while let Some((first, others)) = rest.split_first() {
                rest = others;
                let hash = EngineHash(first.name);
                match self.gather(tree, first, others, tier, found) {
                    None => missing += usize::from(!self.pending.remove(hash, tier)),
                    Some(_) if take_one(&mut self.copies, (hash.0, 1 << Plane::tier(tier))) => {}
                    Some(stretch) => {
                        rest = &others[found.len() - 1..];
                        self.drop_found(tree, stretch, found, tier);
                    }
                }
            }
        }
        tree.names.settle();
        missing
    }

    /// The block that is called so, and with it those that come next in the event and lie beside
    /// it, all held by the same. `None` if the endpoint does not hold it.
    fn gather(
        &self,
        tree: &Tree,
        first: &Sought,
        others: &[Sought],
        tier: Tier,
        found: &mut Vec<Found>,
    ) -> Option<Stretch> {
        let first = tree.names.find_sought(first)?;
        let (held, set) = tree.runs.stretch(first.place);
        let planes = tree.sets.get(set).of(self.slot);
        if planes & 1 << Plane::tier(tier) == 0 {
            return None;
        }
        found.clear();
        found.push(first);
        let mut span = Span::of(first.place);
        // Each of its own where a block may have several copies.
        for other in others.iter().take_while(|_| self.copies.is_empty()) {
            let next = tree.names.find_sought(other).filter(|next| held.has(next.place));
            let Some(next) = next else { break };
            match u16::from(next.place.at) {
                at if at + 1 == span.from => span.from = at,
                at if at == span.to => span.to += 1,
                _ => break,
            }
            found.push(next);
        }
        Some(Stretch { span, set, planes })
    }

    /// All copies of neighbours are gone from one tier.
    fn drop_found(&mut self, tree: &mut Tree, stretch: Stretch, found: &[Found], tier: Tier) {
        self.by_tier[tier.index()] -= found.len() as u32;
        if stretch.planes & Plane::TIERS == 1 << Plane::tier(tier) {
            self.resident -= found.len();
            let keys = tree.keys(stretch.span.run);
            let is_hybrid = self.is_hybrid();
            for one in found {
                let key = keys.get(usize::from(one.place.at)).map_or(one.name, |key| key.0);
                self.removals.note(key);
                self.latest.forget(one.name);
                if is_hybrid {
                    self.forget_hash(key, one.name);
                }
            }
        }
        tree.unhold_found(stretch.span, stretch.set, self.hold(tier), found);
    }

    fn forget_hash(&mut self, key: u64, hash: u64) {
        if self.hashes.get(key).is_some_and(|of| of.hash == hash) {
            self.hashes.remove(key);
        }
    }

    /// Names and places of the blocks that it holds, in no order that means anything. Cost: all
    /// names of all endpoints that share them.
    fn names(&self, tree: &Tree) -> Vec<(u64, Place)> {
        match &self.own {
            Some(own) => own.names.iter().map(|(hash, named)| (hash, named.place)).collect(),
            None => {
                let holds = |place| tree.set(place).of(self.slot) & Plane::TIERS != 0;
                tree.names.iter().filter(|(_, place)| holds(*place)).collect()
            }
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

    /// Blocks of a kept state are held, called by their keys.
    pub fn restored(&mut self, tree: &mut Tree, part: Part, tier: Tier, had: u8, key: BlockKey) {
        if had & 1 << Plane::tier(tier) == 0 {
            self.by_tier[tier.index()] += 1;
            self.resident += usize::from(had & Plane::TIERS == 0);
        }
        self.enter(tree, part.span.run);
        if self.is_hybrid() {
            self.hashes.insert(key.0, HashOf { hash: key.0, known: true });
        }
    }

    /// Forgets what the engine reported, groups included: a restarted engine may have others.
    pub fn clear(&mut self, tree: &mut Tree) {
        self.forget_blocks(tree);
        self.groups = Vec::new();
        self.indexed_group = None;
        self.pending.clear();
    }

    /// Forgets the blocks of the indexed group.
    pub fn forget_blocks(&mut self, tree: &mut Tree) {
        for run in std::mem::take(&mut self.runs) {
            tree.unhold(tree.runs.span(run), self.slot, Plane::TIERS, |_, _| ());
        }
        self.runs_left = 0;
        self.resident = 0;
        tree.apart -= usize::from(self.own.take().is_some());
        tree.share(self.slot, true);
        self.removals.note_all();
        self.latest.clear();
        self.copies.clear();
        self.hashes = Table::new();
        self.by_tier = [0; 4];
        self.compared = 0;
    }

    /// Forgets at least `count` of the blocks whose runs it holds longest, whole runs; how many it
    /// were.
    pub fn evict_oldest(&mut self, tree: &mut Tree, count: usize) -> usize {
        self.look_through_runs(tree);
        let mut out = 0;
        let mut gone = BTreeSet::new();
        let mut named = Vec::new();
        if self.own.is_some() || self.is_hybrid() || !self.copies.is_empty() {
            named = self.names(tree);
        }
        let mut runs = self.runs.iter().copied();
        while out < count
            && let Some(run) = runs.next()
        {
            let by_tier = &mut self.by_tier;
            tree.unhold(tree.runs.span(run), self.slot, Plane::TIERS, |range, planes| {
                out += range.len();
                for (tier, blocks) in by_tier.iter_mut().enumerate() {
                    *blocks -= if planes & 1 << tier != 0 { range.len() as u32 } else { 0 };
                }
            });
            gone.insert(run);
        }
        let left = runs.len();
        self.runs.drain(..self.runs.len() - left);
        self.runs_left = left;
        self.removals.note_all();
        self.latest.clear();
        named.retain(|(_, place)| gone.contains(&place.run));
        self.forget_evicted(&named, out);
        self.trim(2);
        out
    }

    /// Gives memory back when less than `1 / part` is used.
    pub fn trim(&mut self, part: usize) {
        if let Some(own) = &mut self.own {
            own.names.trim(part);
        }
        self.hashes.trim(part);
        self.groups.iter_mut().for_each(|group| group.members.trim(part));
    }

    /// The longest boundary, at most `blocks` blocks, from which the other groups can go on too.
    /// `assumed` says which blocks count as present there without being reported.
    ///
    /// A sliding window of `w` tokens needs the last `ceil((w - 1) / block_size)` blocks before
    /// the boundary, a state space group the last one, a second full group all of them.
    pub fn boundary(&self, keys: &[BlockKey], assumed: impl Fn(usize) -> bool) -> usize {
        let present = |group: &Group, at: usize| {
            let hash = self.hashes.get(keys[at].0);
            hash.is_some_and(|of| group.members.get(of.hash).is_some()) || assumed(at)
        };
        let mut boundary = keys.len();
        for group in self.others().filter(|group| group.kind == GroupKind::Full) {
            let missing = (0..boundary).find(|&at| !present(group, at));
            boundary = missing.unwrap_or(boundary);
        }
        while boundary > 0 {
            let missing = self.others().filter_map(|group| {
                let from = boundary - self.needed(group.kind).min(boundary);
                (from..boundary).rfind(|&at| !present(group, at))
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

    /// Key and tiers of every block, in the order of runs. Cost: its blocks; all names where these
    /// are the keys.
    pub fn blocks(&self, tree: &Tree) -> Vec<(u64, u8)> {
        let mut blocks = BTreeMap::new();
        let tiers = |place| tree.set(place).of(self.slot) & Plane::TIERS;
        for &run in self.runs.iter().filter(|run| tree.runs.span(**run).to > 0) {
            for (at, key) in tree.keys(run).iter().enumerate() {
                let place = Place { run, at: at as u8 };
                blocks.insert(place, (key.0, tiers(place)));
            }
        }
        if blocks.is_empty() {
            blocks.extend(tree.names.iter().map(|(key, place)| (place, (key, tiers(place)))));
        }
        blocks.into_values().filter(|(_, tiers)| *tiers != 0).collect()
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
    pub fn copies_by_hash(&self, tree: &Tree) -> BTreeMap<(u64, u8), u32> {
        let mut all = BTreeMap::new();
        for (hash, place) in self.names(tree) {
            let tiers = match &self.own {
                Some(own) => own.names.get(hash).map_or(0, |named| named.tiers),
                None => tree.set(place).of(self.slot) & Plane::TIERS,
            };
            for bit in (0..4).map(|tier| 1 << tier).filter(|bit| tiers & bit != 0) {
                let extra = self.copies.get(&(hash, bit)).copied().unwrap_or(0);
                all.insert((hash, bit), 1 + extra);
            }
        }
        all
    }
}

/// Neighbours that are held by the same.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    span: Span,
    set: SetId,
    /// How the endpoint holds them.
    planes: u8,
}

const COPIES_ENTRY_BYTES: usize = size_of::<((u64, u8), u32)>();

fn take_one<K: Ord>(counts: &mut BTreeMap<K, u32>, of: K) -> bool {
    let Some(count) = counts.get_mut(&of) else { return false };
    *count -= 1;
    if *count == 0 {
        counts.remove(&of);
    }
    true
}
