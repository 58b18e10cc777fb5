//! Which endpoints hold a block, and how do they hold it?
//!
//! One table from block key to its holders. Two holders fit into the table's place; a longer list
//! lives in a dense side array, sorted by slot. A holder is 4 bytes.

use std::collections::BTreeMap;

use super::table::{Cell, Table, btree_bytes};
use crate::event::Tier;

/// One endpoint's relation to one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holder {
    pub slot: u16,
    /// [`Holder::TIERS`] by `Tier::index()`, [`Holder::HISTORY`].
    pub bits: u8,
    /// Requests on their way that will fill the block, up to 255; the table counts the others.
    pub speculations: u8,
}

impl Holder {
    /// Resident in any tier.
    pub const TIERS: u8 = 0b0_1111;
    /// In the endpoint's routing history.
    pub const HISTORY: u8 = 0b1_0000;
    /// Not a holder: the pair is the position of a longer list.
    const LIST: u8 = 0b1000_0000;

    pub fn tier(tier: Tier) -> u8 {
        1 << tier.index()
    }

    pub fn is_resident(self) -> bool {
        self.bits & Holder::TIERS != 0
    }

    fn is_void(self) -> bool {
        self.bits == 0 && self.speculations == 0
    }
}

/// The holders of one block: none, one, two, or the position of a list.
#[derive(Clone, Copy, Debug)]
struct Pair([Holder; 2]);

impl Cell for Pair {
    const EMPTY: Pair = Pair([Holder { slot: 0, bits: 0, speculations: 0 }; 2]);

    fn is_empty(&self) -> bool {
        self.0[0].is_void()
    }
}

impl Pair {
    fn list(position: usize) -> Pair {
        let (low, high) = (position as u16, (position >> 16) as u16);
        let half = |slot| Holder { slot, bits: Holder::LIST, speculations: 0 };
        Pair([half(low), half(high)])
    }

    fn position(&self) -> Option<usize> {
        let [low, high] = self.0;
        let is_list = low.bits == Holder::LIST;
        is_list.then_some(usize::from(low.slot) | usize::from(high.slot) << 16)
    }

    fn holders(&self) -> &[Holder] {
        match self.0 {
            [first, _] if first.is_void() => &[],
            [_, second] if second.is_void() => &self.0[..1],
            _ => &self.0,
        }
    }
}

#[derive(Debug)]
struct List {
    key: u64,
    holders: Vec<Holder>,
}

const LIST_START: usize = 4;

/// The table of all blocks anybody holds.
#[derive(Debug)]
pub(super) struct Blocks {
    table: Table<Pair>,
    lists: Vec<List>,
    list_bytes: usize,
    /// Speculations beyond 255 per block and slot.
    more: BTreeMap<(u64, u16), u32>,
    entries: usize,
}

impl Blocks {
    pub fn new() -> Blocks {
        let more = BTreeMap::new();
        Blocks { table: Table::new(), lists: Vec::new(), list_bytes: 0, more, entries: 0 }
    }

    /// Distinct blocks.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Pairs of block and holder.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        let more = btree_bytes(self.more.len(), size_of::<((u64, u16), u32)>());
        self.table.bytes() + self.lists.capacity() * size_of::<List>() + self.list_bytes + more
    }

    /// Most bytes that adding one holder to one block can allocate while the old memory is still
    /// there, in a fleet of `slots` slots.
    pub fn growth_bytes_max(&self, slots: usize) -> usize {
        let lists = match self.lists.len() < self.lists.capacity() {
            true => 0,
            false => self.lists_next() * size_of::<List>(),
        };
        let list = (LIST_START + slots + slots / 2) * size_of::<Holder>();
        self.table.growth_bytes() + lists + list + btree_bytes(1, 16)
    }

    fn lists_next(&self) -> usize {
        (self.lists.len() + self.lists.len() / 2).max(8)
    }

    /// All holders of a block, sorted by slot once there are more than two.
    pub fn holders(&self, key: u64) -> &[Holder] {
        let Some(pair) = self.table.get(key) else { return &[] };
        match pair.position() {
            None => pair.holders(),
            Some(position) => &self.lists[position].holders,
        }
    }

    /// One holder of a block; void when it does not hold it.
    pub fn holder(&self, key: u64, slot: u16) -> Holder {
        let holders = self.holders(key);
        let found = match holders.len() {
            0..=2 => holders.iter().find(|holder| holder.slot == slot),
            _ => {
                holders.binary_search_by_key(&slot, |holder| holder.slot).ok().map(|i| &holders[i])
            }
        };
        found.copied().unwrap_or(Holder { slot, ..Holder::default() })
    }

    /// Sets a bit; whether it was unset.
    pub fn set(&mut self, key: u64, slot: u16, bit: u8) -> bool {
        let old = self.holder(key, slot);
        self.put(key, old, Holder { bits: old.bits | bit, ..old });
        old.bits & bit == 0
    }

    /// Unsets bits.
    pub fn unset(&mut self, key: u64, slot: u16, bits: u8) {
        let old = self.holder(key, slot);
        self.put(key, old, Holder { bits: old.bits & !bits, ..old });
    }

    /// Counts one more request that will fill the block.
    pub fn speculate(&mut self, key: u64, slot: u16) {
        let old = self.holder(key, slot);
        match old.speculations {
            u8::MAX => *self.more.entry((key, slot)).or_insert(0) += 1,
            n => self.put(key, old, Holder { speculations: n + 1, ..old }),
        }
    }

    /// Counts one less.
    pub fn withdraw(&mut self, key: u64, slot: u16) {
        if let Some(more) = self.more.get_mut(&(key, slot)) {
            *more -= 1;
            if *more == 0 {
                self.more.remove(&(key, slot));
            }
            return;
        }
        let old = self.holder(key, slot);
        debug_assert!(old.speculations > 0, "withdrawn without having been speculated");
        self.put(key, old, Holder { speculations: old.speculations.saturating_sub(1), ..old });
    }

    fn put(&mut self, key: u64, old: Holder, new: Holder) {
        if old == new {
            return;
        }
        self.entries += usize::from(old.is_void());
        self.entries -= usize::from(new.is_void());
        let pair = self.table.get(key).copied().unwrap_or(Pair::EMPTY);
        match pair.position() {
            Some(position) => self.put_in_list(position, new),
            None => self.put_in_pair(key, pair, new),
        }
    }

    fn put_in_pair(&mut self, key: u64, mut pair: Pair, new: Holder) {
        let len = pair.holders().len();
        match pair.holders().iter().position(|holder| holder.slot == new.slot) {
            Some(i) if new.is_void() => {
                pair.0[i] = pair.0[len - 1];
                pair.0[len - 1] = Pair::EMPTY.0[0];
            }
            Some(i) => pair.0[i] = new,
            None if len < 2 => pair.0[len] = new,
            None => {
                let [a, b] = pair.0;
                pair = self.list_of(key, [a, b, new]);
            }
        }
        match pair.is_empty() {
            true => drop(self.table.remove(key)),
            false => self.table.insert(key, pair),
        }
    }

    fn list_of(&mut self, key: u64, mut three: [Holder; 3]) -> Pair {
        three.sort_unstable_by_key(|holder| holder.slot);
        let mut holders = Vec::with_capacity(LIST_START);
        holders.extend_from_slice(&three);
        if self.lists.len() == self.lists.capacity() {
            self.lists.reserve_exact(self.lists_next() - self.lists.len());
        }
        self.list_bytes += holders.capacity() * size_of::<Holder>();
        self.lists.push(List { key, holders });
        Pair::list(self.lists.len() - 1)
    }

    fn put_in_list(&mut self, position: usize, new: Holder) {
        let List { key, holders } = &mut self.lists[position];
        let before = holders.capacity();
        match holders.binary_search_by_key(&new.slot, |holder| holder.slot) {
            Ok(i) if new.is_void() => drop(holders.remove(i)),
            Ok(i) => holders[i] = new,
            Err(i) => {
                if holders.len() == before {
                    holders.reserve_exact(before / 2);
                }
                holders.insert(i, new);
            }
        }
        if holders.len() * 4 < holders.capacity() {
            holders.shrink_to(holders.len() * 2);
        }
        self.list_bytes += holders.capacity() * size_of::<Holder>();
        self.list_bytes -= before * size_of::<Holder>();
        if let [a, b] = holders[..] {
            let key = *key;
            self.drop_list(position);
            self.table.insert(key, Pair([a, b]));
        }
    }

    fn drop_list(&mut self, position: usize) {
        let list = self.lists.swap_remove(position);
        self.list_bytes -= list.holders.capacity() * size_of::<Holder>();
        if let Some(moved) = self.lists.get(position) {
            self.table.insert(moved.key, Pair::list(position));
        }
        if self.lists.len() * 4 < self.lists.capacity() {
            self.lists.shrink_to(self.lists.len());
        }
    }

    /// Gives memory back after a large removal.
    pub fn trim(&mut self, part: usize) {
        self.table.trim(part);
        if self.lists.len() * part < self.lists.capacity() {
            self.lists.shrink_to_fit();
        }
    }

    /// Bytes recounted from the parts, to check the running sums.
    #[cfg(test)]
    pub fn recount(&self) -> (usize, usize) {
        let list = |list: &List| list.holders.capacity() * size_of::<Holder>();
        let bytes = self.table.bytes()
            + self.lists.capacity() * size_of::<List>()
            + self.lists.iter().map(list).sum::<usize>()
            + btree_bytes(self.more.len(), size_of::<((u64, u16), u32)>());
        let entries = self.table.iter().map(|(key, _)| self.holders(key).len()).sum();
        (bytes, entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn behaves_like_a_map_of_maps() {
        for seed in 0..16 {
            let mut rng = Rng::seeded(seed);
            let mut blocks = Blocks::new();
            let mut model: BTreeMap<(u64, u16), (u8, u32)> = BTreeMap::new();
            let slots = [2, 3, 7, 40][seed as usize % 4];
            for _ in 0..1500 {
                let (key, slot) = (rng.below(9) as u64, rng.below(slots) as u16);
                let bit = 1 << rng.below(5);
                let (bits, speculations) = model.entry((key, slot)).or_default();
                match rng.below(4) {
                    0 => {
                        assert_eq!(blocks.set(key, slot, bit), *bits & bit == 0);
                        *bits |= bit;
                    }
                    1 => {
                        blocks.unset(key, slot, bit);
                        *bits &= !bit;
                    }
                    2 => {
                        let n = if rng.below(30) == 0 { 300 } else { 1 };
                        (0..n).for_each(|_| blocks.speculate(key, slot));
                        *speculations += n;
                    }
                    _ if *speculations > 0 => {
                        let n = 1 + rng.below(*speculations as usize) as u32;
                        (0..n).for_each(|_| blocks.withdraw(key, slot));
                        *speculations -= n;
                    }
                    _ => {}
                }
                model.retain(|_, (bits, speculations)| (*bits, *speculations) != (0, 0));
                for (&(key, slot), &(bits, speculations)) in &model {
                    let speculations = speculations.min(255) as u8;
                    let want = Holder { slot, bits, speculations };
                    assert_eq!(blocks.holder(key, slot), want, "seed {seed}");
                }
                assert_eq!(blocks.recount(), (blocks.bytes(), model.len()), "seed {seed}");
                assert_eq!(blocks.entries(), model.len(), "seed {seed}");
            }
            for (&(key, slot), &(bits, speculations)) in &model {
                blocks.unset(key, slot, bits);
                (0..speculations).for_each(|_| blocks.withdraw(key, slot));
            }
            blocks.trim(4);
            assert_eq!((blocks.len(), blocks.entries(), blocks.bytes()), (0, 0, 0), "seed {seed}");
        }
    }
}
