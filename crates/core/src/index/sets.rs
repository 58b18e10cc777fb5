//! Which endpoints hold a block, and how? Sets that many runs share.
//!
//! A set has up to six planes, one for each way to hold a block, and of each a bit for every
//! endpoint's slot. Equal sets have one number, so a run carries four bytes whatever the fleet's
//! size. Most changes are the same over and over (one endpoint joins or leaves a set): they are
//! remembered.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::table::{Number, Table};
use crate::event::Tier;

/// Number of a set. Equal numbers mean equal sets while somebody uses them.
pub(super) type SetId = u32;

/// Nobody.
pub(super) const EMPTY: SetId = 0;

/// Ways to hold a block.
pub(super) struct Plane;

impl Plane {
    /// Resident, by `Tier::index()`: planes 0 to 3.
    pub fn tier(tier: Tier) -> u8 {
        tier.index() as u8
    }

    /// Routed there lately.
    pub const HISTORY: u8 = 4;
    /// A request that will fill the block is on its way.
    pub const SPECULATIVE: u8 = 5;
    /// Planes in all.
    pub const COUNT: usize = 6;
    /// The planes of tiers, as bits.
    pub const TIERS: u8 = 0b1111;
}

/// Words of one plane or of several.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Words {
    One(u64),
    Many(Box<[u64]>),
}

impl Words {
    #[inline]
    fn as_slice(&self) -> &[u64] {
        match self {
            Words::One(word) => std::slice::from_ref(word),
            Words::Many(words) => words,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Words::One(_) => 0,
            Words::Many(words) => size_of_val(&**words),
        }
    }
}

/// Who holds a block, by plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    /// Bits of the planes that are not empty.
    pub planes: u8,
    /// All planes' words, as many of each: up to the highest slot of any.
    words: Words,
}

impl Set {
    const NONE: Set = Set { planes: 0, words: Words::One(0) };

    /// Words of each plane.
    #[inline]
    pub fn width(&self) -> usize {
        match self.planes.count_ones() as usize {
            0 | 1 => self.words.as_slice().len(),
            planes => self.words.as_slice().len() / planes,
        }
    }

    /// A word of a plane that is there.
    #[inline]
    pub fn word(&self, plane: u8, at: usize) -> u64 {
        if self.planes & 1 << plane == 0 {
            return 0;
        }
        let width = self.width();
        let before = (self.planes & ((1 << plane) - 1)).count_ones() as usize;
        match at < width {
            true => self.words.as_slice()[before * width + at],
            false => 0,
        }
    }

    /// Word `at` of all these planes together.
    #[inline]
    pub fn union(&self, planes: u8, at: usize) -> u64 {
        let planes = planes & self.planes;
        if planes == self.planes && planes.is_power_of_two() {
            return self.words.as_slice().get(at).copied().unwrap_or(0);
        }
        let mut left = planes;
        let mut union = 0;
        while left != 0 {
            union |= self.word(left.trailing_zeros() as u8, at);
            left &= left - 1;
        }
        union
    }

    /// The planes in which a slot is, as bits.
    #[inline]
    pub fn of(&self, slot: u16) -> u8 {
        let (at, bit) = (usize::from(slot) / 64, 1u64 << (slot % 64));
        if self.planes.is_power_of_two() {
            let word = self.words.as_slice().get(at).copied().unwrap_or(0);
            return if word & bit != 0 { self.planes } else { 0 };
        }
        let mut planes = 0;
        let mut left = self.planes;
        while left != 0 {
            let plane = left.trailing_zeros();
            planes |= u8::from(self.word(plane as u8, at) & bit != 0) << plane;
            left &= left - 1;
        }
        planes
    }

    /// The slots in any of these planes, in order.
    pub fn slots(&self, planes: u8) -> impl Iterator<Item = u16> + '_ {
        (0..self.width()).flat_map(move |at| {
            let mut word = self.union(planes, at);
            std::iter::from_fn(move || {
                let bit = (word != 0).then(|| word.trailing_zeros() as u16)?;
                word &= word - 1;
                Some(at as u16 * 64 + bit)
            })
        })
    }

    /// Whether a slot of these is in one of the planes.
    #[inline]
    pub fn meets(&self, planes: u8, slots: &[u64]) -> bool {
        let mut pairs = slots.iter().enumerate();
        pairs.any(|(at, &word)| word != 0 && word & self.union(planes, at) != 0)
    }

    /// The set with one bit other than it is.
    fn with(&self, slot: u16, plane: u8, on: bool) -> Set {
        let (word, bit) = (usize::from(slot) / 64, 1u64 << (slot % 64));
        let width = self.width().max(if on { word + 1 } else { 0 });
        let mut planes: [Vec<u64>; Plane::COUNT] = Default::default();
        let mut used = 0;
        for (at, words) in (0u8..).zip(&mut planes) {
            words.extend((0..width).map(|word| self.word(at, word)));
            if let Some(word) = words.get_mut(word).filter(|_| at == plane) {
                match on {
                    true => *word |= bit,
                    false => *word &= !bit,
                }
            }
            used = used.max(words.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1));
        }
        let mut set = Set { planes: 0, words: Words::One(0) };
        let mut all = Vec::with_capacity(Plane::COUNT * used);
        for (at, words) in planes.iter().enumerate().filter(|(_, w)| w.iter().any(|&w| w != 0)) {
            set.planes |= 1 << at;
            all.extend_from_slice(&words[..used]);
        }
        match all[..] {
            [] => {}
            [word] => set.words = Words::One(word),
            _ => set.words = Words::Many(all.into()),
        }
        set
    }

    fn hash(&self) -> u64 {
        let words = self.words.as_slice();
        xxh3_64_with_seed(bytemuck::cast_slice(words), u64::from(self.planes))
    }
}

#[derive(Clone, Copy, Debug)]
struct Change {
    from: SetId,
    /// Slot, plane and whether the bit is set.
    what: u32,
    to: SetId,
}

#[derive(Debug)]
struct Shared {
    set: Set,
    /// Steps of runs that have it.
    users: u32,
    /// Under which number it is found.
    hash: u64,
}

/// All sets in use.
#[derive(Debug)]
pub(super) struct Sets {
    sets: Vec<Shared>,
    free: Vec<SetId>,
    by_hash: Table<Number>,
    changes: Vec<Change>,
    unused: usize,
    heap: usize,
}

const CHANGES: usize = 128;
/// Sets without users that are kept, beside as many as have some.
const UNUSED_MAX: usize = 32;

impl Sets {
    pub const fn new() -> Sets {
        Sets {
            sets: Vec::new(),
            free: Vec::new(),
            by_hash: Table::new(),
            changes: Vec::new(),
            unused: 0,
            heap: 0,
        }
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.sets.capacity() * size_of::<Shared>()
            + self.free.capacity() * size_of::<SetId>()
            + self.by_hash.bytes()
            + self.changes.capacity() * size_of::<Change>()
            + self.heap
    }

    /// Most bytes that a few changes can allocate in a fleet of `slots` slots.
    pub fn growth_bytes(&self, slots: usize) -> usize {
        let set = size_of::<Shared>() + size_of::<SetId>();
        8 * (Plane::COUNT * slots.div_ceil(64) * 8)
            + (self.sets.len() / 8 + 32) * set
            + self.by_hash.growth_bytes()
            + CHANGES * size_of::<Change>()
    }

    #[inline]
    pub fn get(&self, id: SetId) -> &Set {
        static NONE: Set = Set::NONE;
        self.sets.get(id as usize).map_or(&NONE, |shared| &shared.set)
    }

    /// The set that differs in one bit.
    #[inline]
    pub fn change(&mut self, from: SetId, slot: u16, plane: u8, on: bool) -> SetId {
        let what = u32::from(slot) << 4 | u32::from(plane) << 1 | u32::from(on);
        let mixed = (from ^ what.wrapping_mul(0x85EB_CA6B)).wrapping_mul(0x9E37_79B1);
        let at = mixed as usize >> (32 - CHANGES.trailing_zeros());
        if let Some(known) = self.changes.get(at)
            && known.from == from
            && known.what == what
        {
            return known.to;
        }
        let to = self.find(self.get(from).with(slot, plane, on));
        if self.changes.is_empty() {
            let never = Change { from: u32::MAX, what: 0, to: EMPTY };
            self.changes = vec![never; CHANGES];
        }
        self.changes[at] = Change { from, what, to };
        to
    }

    /// The number of a set.
    fn find(&mut self, set: Set) -> SetId {
        if set.planes == 0 {
            return EMPTY;
        }
        let mut hash = set.hash();
        while let Some(&Number(id)) = self.by_hash.get(hash) {
            if self.sets[id as usize].set == set {
                return id;
            }
            hash = hash.wrapping_add(1);
        }
        if self.sets.is_empty() {
            self.sets.push(Shared { set: Set::NONE, users: 1, hash: 0 });
        }
        self.heap += set.words.bytes();
        let shared = Shared { set, users: 0, hash };
        let id = match self.free.pop() {
            Some(id) => {
                self.sets[id as usize] = shared;
                id
            }
            None => {
                if self.sets.len() == self.sets.capacity() {
                    self.sets.reserve_exact(self.sets.len() / 8 + 16);
                }
                self.sets.push(shared);
                (self.sets.len() - 1) as SetId
            }
        };
        self.by_hash.insert(hash, Number(id));
        self.unused += 1;
        id
    }

    /// One more user.
    #[inline]
    pub fn keep(&mut self, id: SetId) {
        if id != EMPTY {
            let users = &mut self.sets[id as usize].users;
            *users += 1;
            self.unused -= usize::from(*users == 1);
        }
    }

    /// One user less.
    #[inline]
    pub fn release(&mut self, id: SetId) {
        if id != EMPTY {
            let users = &mut self.sets[id as usize].users;
            *users -= 1;
            self.unused += usize::from(*users == 0);
        }
    }

    /// Forgets sets without users once they are many. Numbers of such sets mean nothing then.
    pub fn tidy(&mut self) {
        let used = self.sets.len() - self.free.len();
        if self.unused > UNUSED_MAX && self.unused * 2 > used {
            self.forget_unused();
        }
    }

    /// Forgets sets without users now.
    pub fn forget_unused(&mut self) {
        if self.sets.len() == self.free.len() + self.unused + 1 {
            *self = Sets::new();
            return;
        }
        for (id, shared) in (0u32..).zip(&mut self.sets) {
            if shared.users == 0 && shared.set.planes != 0 {
                self.heap -= shared.set.words.bytes();
                self.by_hash.remove(shared.hash);
                shared.set = Set::NONE;
                self.free.push(id);
            }
        }
        while self.sets.last().is_some_and(|last| last.users == 0) {
            self.sets.pop();
        }
        let len = self.sets.len() as SetId;
        self.free.retain(|&id| id < len);
        self.sets.shrink_to(self.sets.len().next_multiple_of(16));
        self.free.shrink_to(self.free.len().next_multiple_of(16));
        self.by_hash.trim(2);
        self.unused = 0;
        self.changes = Vec::new();
    }

    /// Whether the counts of users are these.
    #[cfg(test)]
    pub fn users(&self) -> std::collections::BTreeMap<SetId, u32> {
        let used = (0u32..).zip(&self.sets).skip(1).filter(|(_, shared)| shared.users > 0);
        used.map(|(id, shared)| (id, shared.users)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::Rng;

    #[test]
    fn behaves_like_sets_of_pairs() {
        for seed in 0..12 {
            let mut rng = Rng::seeded(seed);
            let mut sets = Sets::new();
            let mut known: Vec<(SetId, BTreeSet<(u16, u8)>)> = vec![(EMPTY, BTreeSet::new())];
            let slots = [3, 64, 65, 1000][seed as usize % 4];
            for _ in 0..600 {
                let (from, mut pairs) = known[rng.below(known.len())].clone();
                let (slot, plane) = (rng.below(slots) as u16, rng.below(6) as u8);
                let on = rng.below(3) > 0;
                let to = sets.change(from, slot, plane, on);
                match on {
                    true => pairs.insert((slot, plane)),
                    false => pairs.remove(&(slot, plane)),
                };
                let set = sets.get(to);
                for slot in pairs.iter().map(|pair| pair.0).chain([slot, 0, 999]) {
                    let planes = (0..6).filter(|&plane| pairs.contains(&(slot, plane)));
                    let want = planes.fold(0, |bits, plane| bits | 1 << plane);
                    assert_eq!(set.of(slot), want, "seed {seed}");
                }
                let planes = 1 + rng.below(63) as u8;
                let want: BTreeSet<u16> =
                    pairs.iter().filter(|p| planes & 1 << p.1 != 0).map(|p| p.0).collect();
                assert!(set.slots(planes).eq(want.iter().copied()), "seed {seed}");
                let some = [rng.next_u64(), rng.next_u64()];
                let is_in = |slot: &u16| {
                    some.get(usize::from(*slot) / 64).is_some_and(|w| w >> (slot % 64) & 1 == 1)
                };
                assert_eq!(set.meets(planes, &some), want.iter().any(is_in), "seed {seed}");
                for (id, other) in &known {
                    assert_eq!(
                        *id == to,
                        *other == pairs,
                        "seed {seed}: equal numbers, equal sets"
                    );
                }
                if known.iter().all(|(id, _)| *id != to) {
                    sets.keep(to);
                    known.push((to, pairs));
                }
                if known.len() > 20 {
                    let (id, _) = known.swap_remove(1 + rng.below(known.len() - 1));
                    sets.release(id);
                }
                sets.tidy();
            }
            known.into_iter().for_each(|(id, _)| sets.release(id));
            sets.forget_unused();
            assert_eq!(sets.bytes(), 0, "seed {seed}");
        }
    }
}
