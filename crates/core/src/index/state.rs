//! Which blocks does an endpoint hold, in a form that can be kept and looked up again?
//!
//! Lookups ask by key only, so an engine's own names are left out: a restored endpoint calls each
//! block by its key. What only later events need (copies, ages, waiting blocks) is left out too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Index;
use super::endpoint::Endpoint;
use super::runs::{Place, Span};
use super::sets::Plane;
use super::speculations::Speculation;
use super::tree::{Hold, Naming, Part, Tree};
use crate::blocks::BlockKey;
use crate::event::{GroupKind, Tier};
use crate::{EndpointId, Time};

/// The blocks of one endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlocksState {
    /// Tokens per block as its events told; 0: they have not.
    pub block_size: u32,
    /// What its engine reported, one list for each set of tiers.
    pub resident: Vec<ResidentState>,
    /// Whether one of its KV cache groups is the indexed one.
    pub has_indexed_group: bool,
    /// Its other groups.
    pub groups: Vec<GroupState>,
    /// Blocks that requests on their way will fill.
    pub expected: Vec<ExpectedState>,
    /// What was routed there, the block unused longest first.
    #[serde(with = "crate::journal::packed")]
    pub history: Vec<BlockKey>,
}

/// Blocks that are in the same tiers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResidentState {
    /// The tiers.
    pub tiers: Vec<Tier>,
    /// The blocks.
    #[serde(with = "crate::journal::packed")]
    pub keys: Vec<BlockKey>,
}

/// A KV cache group beside the indexed one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupState {
    /// What it needs of a boundary.
    pub kind: GroupKind,
    /// Indexed blocks that it holds too.
    #[serde(with = "crate::journal::packed")]
    pub keys: Vec<BlockKey>,
}

/// Blocks that a request on its way will fill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedState {
    /// When that is no longer expected.
    pub until: Time,
    /// The blocks.
    #[serde(with = "crate::journal::packed")]
    pub keys: Vec<BlockKey>,
}

/// Sets of tiers, each with the blocks that are in exactly these.
#[derive(Default)]
struct ByTiers([Vec<BlockKey>; 16]);

impl ByTiers {
    fn push(&mut self, tiers: u8, key: u64) {
        self.0[usize::from(tiers & Plane::TIERS)].push(BlockKey(key));
    }

    fn into_states(self) -> Vec<ResidentState> {
        let lists = (0u8..).zip(self.0).filter(|(tiers, keys)| *tiers > 0 && !keys.is_empty());
        let tiers_of =
            |set: u8| Tier::ALL.into_iter().filter(move |t| set & 1 << Plane::tier(*t) != 0);
        lists.map(|(set, keys)| ResidentState { tiers: tiers_of(set).collect(), keys }).collect()
    }
}

impl BlocksState {
    /// Blocks named in it.
    pub fn keys(&self) -> usize {
        self.resident.iter().map(|part| part.keys.len()).sum::<usize>()
            + self.groups.iter().map(|group| group.keys.len()).sum::<usize>()
            + self.expected.iter().map(|part| part.keys.len()).sum::<usize>()
            + self.history.len()
    }
}

impl Index {
    /// Everything that lookups can find of an endpoint. Cost: its blocks.
    pub(crate) fn state(&self, id: EndpointId) -> BlocksState {
        let Some(endpoint) = self.endpoint(id) else { return BlocksState::default() };
        let mut resident = ByTiers::default();
        let blocks = endpoint.blocks(&self.tree);
        blocks.iter().for_each(|(key, tiers)| resident.push(*tiers, *key));
        let keys = self.keys();
        let speculations = endpoint.speculations.iter();
        let expected = speculations.filter_map(|id| self.speculations.get(*id)).map(|made| {
            let spans = made.spans.iter().flat_map(|span| keys.of(*span));
            ExpectedState { until: made.until, keys: spans.collect() }
        });
        BlocksState {
            resident: resident.into_states(),
            groups: endpoint.group_states(blocks.iter().map(|(key, _)| *key)),
            expected: expected.collect(),
            history: endpoint.history.oldest_first().flat_map(|s| keys.of(s).rev()).collect(),
            ..shape_of(endpoint)
        }
    }

    /// The same, of these blocks only: what a lookup of a chain of them can find. The answers go
    /// with `ids`. Cost: blocks up to the first that nobody holds, times holders of each.
    pub(crate) fn state_of(&self, ids: &[EndpointId], chains: &[&[BlockKey]]) -> Vec<BlocksState> {
        let mut resident: Vec<ByTiers> = ids.iter().map(|_| ByTiers::default()).collect();
        let known = |id: &EndpointId| self.endpoint(*id);
        let mut states: Vec<BlocksState> =
            ids.iter().map(|id| known(id).map_or(BlocksState::default(), shape_of)).collect();
        let mut expected: Vec<Vec<BlockKey>> = vec![Vec::new(); ids.len()];
        let last = self.slots.len();
        let mut place_of = vec![None; last];
        for (at, id) in ids.iter().enumerate().filter(|(_, id)| known(id).is_some()) {
            place_of[usize::from(id.slot)] = Some(at);
        }
        for chain in chains {
            self.find(chain, &mut |key, set| {
                for slot in set.slots(u8::MAX) {
                    let place = place_of.get(usize::from(slot)).copied().flatten();
                    let Some(at) = place else { continue };
                    let planes = set.of(slot);
                    if planes & Plane::TIERS != 0 {
                        resident[at].push(planes, key.0);
                    }
                    if planes & 1 << Plane::HISTORY != 0 {
                        states[at].history.push(key);
                    }
                    if planes & 1 << Plane::SPECULATIVE != 0 {
                        expected[at].push(key);
                    }
                }
            });
        }
        for (at, (resident, keys)) in resident.into_iter().zip(expected).enumerate() {
            let state = &mut states[at];
            state.resident = resident.into_states();
            let names = state.resident.iter().flat_map(|part| &part.keys).map(|key| key.0);
            if let Some(endpoint) = known(&ids[at]) {
                state.groups = endpoint.group_states(names);
            }
            if !keys.is_empty() {
                state.expected.push(ExpectedState { until: Time(u64::MAX), keys });
            }
        }
        states
    }

    /// Gives an endpoint that holds nothing what [`Index::state`] told.
    pub(crate) fn restore(&mut self, id: EndpointId, state: &BlocksState) {
        self.add_endpoint(id);
        let slot = id.slot;
        self.change(slot, |endpoint, tree| endpoint.restore(tree, state));
        for part in &state.expected {
            let hold = Hold { slot, plane: Plane::SPECULATIVE };
            let spans = part.keys.iter().map(|key| self.tree.restore(*key, hold).0.span).collect();
            let made = self.speculations.push(Speculation { slot, until: part.until, spans });
            self.change(slot, |endpoint, _| endpoint.speculations.push(made));
        }
        let hold = Hold { slot, plane: Plane::HISTORY };
        for key in &state.history {
            self.stamp = self.stamp.wrapping_add(1);
            let (span, stamp) = (self.tree.restore(*key, hold).0.span, self.stamp);
            self.change(slot, |endpoint, _| endpoint.history.touch(span, stamp));
        }
    }

    fn keys(&self) -> Keys<'_> {
        let mut names = BTreeMap::new();
        if self.tree.naming() == Naming::Native {
            names.extend(self.tree.names.iter().map(|(key, place)| (place, BlockKey(key))));
        }
        Keys { tree: &self.tree, names }
    }
}

/// Keys of blocks by where they lie.
struct Keys<'a> {
    tree: &'a Tree,
    names: BTreeMap<Place, BlockKey>,
}

impl Keys<'_> {
    fn of(&self, span: Span) -> impl DoubleEndedIterator<Item = BlockKey> {
        let places = (0..span.len()).map(move |at| span.place(at));
        places.filter_map(|place| self.tree.key(place).or(self.names.get(&place).copied()))
    }
}

/// What does not grow with the blocks.
fn shape_of(endpoint: &Endpoint) -> BlocksState {
    BlocksState {
        block_size: endpoint.block_size,
        has_indexed_group: endpoint.has_indexed_group(),
        ..BlocksState::default()
    }
}

impl Tree {
    /// Holds a block of which nothing is known but its key: a run of its own, unless it is there.
    /// Also in which ways the endpoint held it before.
    fn restore(&mut self, key: BlockKey, hold: Hold) -> (Part, u8) {
        let mut parts = Vec::new();
        self.path(None, &[key], hold, &mut parts);
        let mut had = 0;
        if !parts[0].is_new {
            self.add(parts[0].span, hold, |_, planes| had = planes);
        }
        (parts[0], had)
    }
}

impl Endpoint {
    /// What the engine calls the blocks is not known, nor asked for any more.
    fn restore(&mut self, tree: &mut Tree, state: &BlocksState) {
        self.block_size = state.block_size;
        self.restore_groups(state.has_indexed_group, &state.groups);
        for part in &state.resident {
            for (key, tier) in
                part.keys.iter().flat_map(|key| part.tiers.iter().map(move |t| (*key, *t)))
            {
                let hold = Hold { slot: self.slot, plane: Plane::tier(tier) };
                let (part, had) = tree.restore(key, hold);
                self.restored(tree, part, tier, had, key);
            }
        }
    }
}
