//! What an endpoint knows whose engine calls blocks otherwise than others do.

use std::collections::{BTreeMap, BTreeSet};

use super::{Endpoint, HashOf, take_one};
use crate::blocks::BlockKey;
use crate::event::{EngineHash, Tier};
use crate::index::runs::{Place, Span};
use crate::index::sets::Plane;
use crate::index::table::{Cell, Table, btree_bytes};
use crate::index::tree::{Part, Tree};

/// What one engine hash stands for, on an endpoint that has names of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named {
    pub key: BlockKey,
    pub place: Place,
    /// Tiers that hold at least one copy under this name, as bits by `Tier::index()`.
    pub tiers: u8,
}

impl Cell for Named {
    const EMPTY: Named = Named { key: BlockKey(0), place: Place { run: 0, at: 0 }, tiers: 0 };

    fn is_empty(&self) -> bool {
        self.tiers == 0
    }
}

/// A block, and what the endpoint alone calls it.
#[derive(Clone, Copy, Debug)]
pub struct OwnBlock {
    pub hash: EngineHash,
    pub key: BlockKey,
    pub place: Place,
}

/// Names of an endpoint whose engine calls blocks otherwise than others do, or one block by several
/// names.
#[derive(Debug)]
pub(super) struct Own {
    pub names: Table<Named>,
    /// Names beyond the first of the same block, by block and tier.
    pub aliases: BTreeMap<(Place, u8), u32>,
}

impl Own {
    pub fn bytes(&self) -> usize {
        size_of::<Own>()
            + self.names.bytes()
            + btree_bytes(self.aliases.len(), size_of::<((Place, u8), u32)>())
    }

    pub fn growth_bytes_max(&self, blocks: usize) -> usize {
        self.names.growth_bytes() + blocks * (48 + 2 * size_of::<((Place, u8), u32)>() + 32) + 512
    }
}

impl Endpoint {
    /// One more copy of a block under a name of its own; whether it is the first of this name in
    /// this tier. `is_new`: nobody held the block before.
    pub fn add_own(
        &mut self,
        tree: &mut Tree,
        block: OwnBlock,
        tier: Tier,
        is_new: bool,
    ) -> (bool, bool) {
        let OwnBlock { hash, key, place } = block;
        let bit = 1 << Plane::tier(tier);
        let known = self.own.as_ref().and_then(|own| own.names.get(hash.0)).copied();
        if known.is_some_and(|known| known.place != place) {
            // The engine gave the name to other content: what it named before is gone.
            self.forget(tree, hash);
        }
        let mut named = known.filter(|known| known.place == place).unwrap_or(Named::EMPTY);
        if named.tiers & bit != 0 {
            *self.copies.entry((hash.0, bit)).or_insert(0) += 1;
            let planes = tree.set(place).of(self.slot);
            return (false, planes & 1 << Plane::SPECULATIVE != 0);
        }
        let (mut is_alias, mut awaited) = (false, false);
        if !is_new {
            tree.add(Span::of(place), self.hold(tier), |_, planes| {
                is_alias = planes & bit != 0;
                awaited = planes & 1 << Plane::SPECULATIVE != 0;
            });
        }
        self.resident += usize::from(named.tiers == 0);
        self.by_tier[tier.index()] += 1;
        named = Named { key, place, tiers: named.tiers | bit };
        if let Some(own) = &mut self.own {
            own.names.insert(hash.0, named);
            if is_alias {
                *own.aliases.entry((place, bit)).or_insert(0) += 1;
            }
        }
        self.enter(tree, place.run);
        if self.is_hybrid() {
            self.hashes.insert(key.0, HashOf { hash: hash.0, known: true });
        }
        (true, awaited)
    }

    /// One copy less; whether there was one. For names of its own.
    pub(super) fn remove_own(&mut self, tree: &mut Tree, hash: EngineHash, tier: Tier) -> bool {
        let bit = 1 << Plane::tier(tier);
        if !self.has(tree, hash, tier) {
            return false;
        }
        if !take_one(&mut self.copies, (hash.0, bit)) {
            self.drop_tier(tree, hash.0, bit);
        }
        true
    }

    /// All copies under a name of its own are gone from one tier.
    fn drop_tier(&mut self, tree: &mut Tree, hash: u64, bit: u8) {
        let Some(own) = &mut self.own else { return };
        let Some(named) = own.names.get_mut(hash) else { return };
        let Named { key, place, tiers } = *named;
        let is_last = tiers == bit;
        match is_last {
            true => drop(own.names.remove(hash)),
            false => named.tiers &= !bit,
        }
        let is_alias = take_one(&mut own.aliases, (place, bit));
        self.by_tier[bit.trailing_zeros() as usize] -= 1;
        if is_last {
            self.resident -= 1;
            self.removals.note(key.0);
            self.forget_hash(key.0, hash);
        }
        if !is_alias {
            tree.unhold(Span::of(place), self.slot, bit, |_, _| ());
        }
    }

    /// Drops a name of its own from all tiers and groups.
    fn forget(&mut self, tree: &mut Tree, hash: EngineHash) {
        let named = self.own.as_ref().and_then(|own| own.names.get(hash.0));
        let tiers = named.map_or(0, |named| named.tiers);
        for bit in (0..4).map(|tier| 1 << tier).filter(|bit| tiers & bit != 0) {
            self.copies.remove(&(hash.0, bit));
            self.drop_tier(tree, hash.0, bit);
        }
        for group in &mut self.groups {
            group.members.remove(hash.0);
        }
    }

    /// From now on it has names of its own, but those of new blocks are still to come. Cost: all
    /// names.
    pub fn own_names(&mut self, tree: &mut Tree, new: &[Part]) {
        let mut names = Table::new();
        let is_new = |place: Place| new.iter().any(|part| part.is_new && part.span.has(place));
        for (hash, place) in self.names(tree).into_iter().filter(|(_, place)| !is_new(*place)) {
            let tiers = tree.set(place).of(self.slot) & Plane::TIERS;
            names.insert(hash, Named { key: tree.key_of(place, hash), place, tiers });
        }
        self.resident = names.len();
        self.own = Some(Box::new(Own { names, aliases: BTreeMap::new() }));
        tree.apart += 1;
        tree.share(self.slot, false);
        tree.sweep(|_, _| true);
    }

    /// What else is known of blocks that were evicted.
    pub(super) fn forget_evicted(&mut self, named: &[(u64, Place)], blocks: usize) {
        let mut names_gone = blocks;
        if let Some(own) = &mut self.own {
            names_gone = named.len();
            for (hash, place) in named {
                let tiers = own.names.remove(*hash).map_or(0, |named| named.tiers);
                for bit in (0..4).map(|tier| 1 << tier).filter(|bit| tiers & bit != 0) {
                    // Counted by block before, each name of it counts.
                    if own.aliases.contains_key(&(*place, bit)) {
                        take_one(&mut own.aliases, (*place, bit));
                        self.by_tier[bit.trailing_zeros() as usize] -= 1;
                    }
                }
            }
        }
        self.resident -= names_gone;
        for (hash, _) in named {
            for bit in (0..4).map(|tier| 1u8 << tier) {
                self.copies.remove(&(*hash, bit));
            }
            for group in &mut self.groups {
                group.members.remove(*hash);
            }
        }
        let gone: BTreeSet<u64> = named.iter().map(|(hash, _)| *hash).collect();
        let keys = self.hashes.iter().filter(|(_, of)| gone.contains(&of.hash));
        let keys: Vec<u64> = keys.map(|(key, _)| key).collect();
        for key in keys {
            self.hashes.remove(key);
        }
    }
}
