//! A hash table from u64 keys whose memory is known to the byte before it is allocated.
//!
//! Open addressing with linear probing and backward-shift deletion: no tombstones, so a table that
//! stays equally full never rehashes, and removing really frees a place. It grows by half.

/// A value that can say "this place is empty", so that places need no extra tag.
pub(super) trait Cell: Copy {
    const EMPTY: Self;
    fn is_empty(&self) -> bool;
}

#[derive(Clone, Copy, Debug)]
struct Place<V> {
    key: u64,
    value: V,
}

#[derive(Clone, Debug)]
pub(super) struct Table<V> {
    places: Vec<Place<V>>,
    len: usize,
}

const PLACES_MIN: usize = 8;

/// Entries that `places` may hold: three quarters, so that a miss looks at 8 places on average.
fn room(places: usize) -> usize {
    places - places / 4
}

impl<V: Cell> Table<V> {
    pub const fn new() -> Table<V> {
        Table { places: Vec::new(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.places.len() * size_of::<Place<V>>()
    }

    /// Bytes that the next new key allocates (before the old places are freed); 0 if it fits.
    pub fn growth_bytes(&self) -> usize {
        match self.len < room(self.places.len()) {
            true => 0,
            false => self.places_next() * size_of::<Place<V>>(),
        }
    }

    fn places_next(&self) -> usize {
        (self.places.len() + self.places.len() / 2).max(PLACES_MIN)
    }

    /// Where a key would be if the table were empty. Multiplying and folding spreads keys that
    /// are small numbers; taking the high part of a product maps a hash onto any number of places.
    fn home(&self, key: u64) -> usize {
        let product = u128::from(key ^ 0x9E37_79B9_7F4A_7C15) * 0xD6E8_FEB8_6659_FD93;
        let hash = (product >> 64) as u64 ^ product as u64;
        ((u128::from(hash) * self.places.len() as u128) >> 64) as usize
    }

    fn after(&self, place: usize) -> usize {
        if place + 1 == self.places.len() { 0 } else { place + 1 }
    }

    /// The place of a key, or the empty place where it belongs; `None` in a table of no places.
    fn find(&self, key: u64) -> Option<usize> {
        if self.places.is_empty() {
            return None;
        }
        let mut place = self.home(key);
        loop {
            let here = &self.places[place];
            if here.value.is_empty() || here.key == key {
                return Some(place);
            }
            place = self.after(place);
        }
    }

    pub fn get(&self, key: u64) -> Option<&V> {
        let value = &self.places[self.find(key)?].value;
        (!value.is_empty()).then_some(value)
    }

    /// The value of a key. The caller must not empty it; [`Table::remove`] does that.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut V> {
        let place = self.find(key)?;
        let value = &mut self.places[place].value;
        (!value.is_empty()).then_some(value)
    }

    /// Sets the value of a key.
    pub fn insert(&mut self, key: u64, value: V) {
        debug_assert!(!value.is_empty(), "an empty value cannot be stored");
        if let Some(old) = self.get_mut(key) {
            *old = value;
            return;
        }
        if self.len >= room(self.places.len()) {
            self.resize(self.places_next());
        }
        self.put(key, value);
        self.len += 1;
    }

    fn put(&mut self, key: u64, value: V) {
        let mut place = self.home(key);
        while !self.places[place].value.is_empty() {
            place = self.after(place);
        }
        self.places[place] = Place { key, value };
    }

    pub fn remove(&mut self, key: u64) -> Option<V> {
        let mut gap = self.find(key)?;
        let value = self.places[gap].value;
        if value.is_empty() {
            return None;
        }
        self.len -= 1;
        let places = self.places.len();
        let mut place = self.after(gap);
        while !self.places[place].value.is_empty() {
            let home = self.home(self.places[place].key);
            // Moving back to the gap is allowed unless the home lies between the two.
            if (place + places - home) % places >= (place + places - gap) % places {
                self.places[gap] = self.places[place];
                gap = place;
            }
            place = self.after(place);
        }
        self.places[gap].value = V::EMPTY;
        Some(value)
    }

    /// All entries, in an order that only the operations so far decide.
    pub fn iter(&self) -> impl Iterator<Item = (u64, V)> + Clone + '_ {
        let full = self.places.iter().filter(|place| !place.value.is_empty());
        full.map(|place| (place.key, place.value))
    }

    /// Gives memory back when less than `1 / part` of the room is used.
    pub fn trim(&mut self, part: usize) {
        if self.len == 0 {
            self.places = Vec::new();
        } else if self.len * part < room(self.places.len()) {
            let mut places = PLACES_MIN;
            while room(places) < self.len {
                places += places / 2;
            }
            if places < self.places.len() {
                self.resize(places);
            }
        }
    }

    fn resize(&mut self, places: usize) {
        let empty = Place { key: 0, value: V::EMPTY };
        let old = std::mem::replace(&mut self.places, vec![empty; places]);
        old.iter().filter(|place| !place.value.is_empty()).for_each(|p| self.put(p.key, p.value));
    }
}

/// An index or a number, for tables from keys to places elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number(pub u32);

impl Cell for Number {
    const EMPTY: Number = Number(u32::MAX);

    fn is_empty(&self) -> bool {
        self.0 == u32::MAX
    }
}

/// At least the bytes that a standard B-tree map of `len` entries of `entry` bytes can occupy:
/// nodes of 11 places may be filled with 5 entries, and have up to 12 children.
pub(super) const fn btree_bytes(len: usize, entry: usize) -> usize {
    match len {
        0 => 0,
        _ => len * (entry * 11 / 5 + 32) + 11 * entry + 128,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Rng;

    /// Small keys make long runs and wrap-around likely.
    fn drive(seed: u64, keys: usize) {
        let mut rng = Rng::seeded(seed);
        let (mut table, mut model) = (Table::new(), BTreeMap::new());
        for step in 0..4000 {
            let key = rng.below(keys) as u64;
            match rng.below(5) {
                0 | 1 => {
                    let growth = table.growth_bytes();
                    let before = table.bytes();
                    let new = !model.contains_key(&key);
                    table.insert(key, Number(step));
                    model.insert(key, step);
                    let grown = table.bytes() != before;
                    assert!(!grown || (new && table.bytes() == growth), "seed {seed}");
                }
                2 => assert_eq!(table.remove(key).map(|n| n.0), model.remove(&key)),
                3 => assert_eq!(table.get(key).map(|n| n.0), model.get(&key).copied()),
                _ if rng.below(50) == 0 => table.trim(1 + rng.below(4)),
                _ => {}
            }
            assert_eq!(table.len(), model.len(), "seed {seed}");
        }
        let mut all: Vec<(u64, u32)> = table.iter().map(|(key, n)| (key, n.0)).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(model.clone()), "seed {seed}");
        model.keys().for_each(|&key| assert!(table.remove(key).is_some()));
        table.trim(4);
        assert_eq!((table.len(), table.bytes()), (0, 0));
    }

    #[test]
    fn behaves_like_a_map() {
        for seed in 0..60 {
            drive(seed, [3, 20, 200, 2000][seed as usize % 4]);
        }
    }

    #[test]
    fn small_numbers_and_round_numbers_are_spread() {
        for step in [1u64, 16, 1 << 32] {
            let mut table = Table::new();
            (0..10_000u64).for_each(|i| table.insert(i * step, Number(0)));
            let far = |key: u64| {
                let found = table.find(key).unwrap();
                (found + table.places.len() - table.home(key)) % table.places.len()
            };
            let total: usize = (0..10_000u64).map(|i| far(i * step)).sum();
            assert!(total < 10_000 * 4, "keys {step} apart lie {total} places from home");
        }
    }
}
