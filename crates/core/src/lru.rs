//! Which keys were used last? A small ordered map with a capacity.

use std::collections::BTreeMap;

/// Keys with values, in order of last use. Ordered maps, so that nothing depends on a hash seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lru<K, V> {
    entries: BTreeMap<K, (u64, V)>,
    by_tick: BTreeMap<u64, K>,
    tick: u64,
}

impl<K, V> Default for Lru<K, V> {
    fn default() -> Lru<K, V> {
        Lru { entries: BTreeMap::new(), by_tick: BTreeMap::new(), tick: 0 }
    }
}

impl<K: Ord + Clone, V> Lru<K, V> {
    /// When the key was used last, on a clock that counts uses.
    pub fn tick(&self, key: &K) -> Option<u64> {
        self.entries.get(key).map(|(tick, _)| *tick)
    }

    /// The value of a key; not a use.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.entries.get(key).map(|(_, value)| value)
    }

    /// Uses a key; beyond `capacity` keys the one unused longest goes.
    pub fn put(&mut self, key: K, value: V, capacity: usize) {
        self.tick += 1;
        if let Some((old, _)) = self.entries.insert(key.clone(), (self.tick, value)) {
            self.by_tick.remove(&old);
        }
        self.by_tick.insert(self.tick, key);
        while self.entries.len() > capacity {
            self.pop_oldest();
        }
    }

    /// Forgets a key.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q)
    where
        K: std::borrow::Borrow<Q>,
    {
        if let Some((tick, _)) = self.entries.remove(key) {
            self.by_tick.remove(&tick);
        }
    }

    /// The key unused longest, and its value.
    pub fn oldest(&self) -> Option<(&K, &V)> {
        let (_, key) = self.by_tick.first_key_value()?;
        self.entries.get(key).map(|(_, value)| (key, value))
    }

    /// All keys with their values, the one unused longest first.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let keys = self.by_tick.values();
        keys.filter_map(|key| self.entries.get_key_value(key).map(|(key, (_, value))| (key, value)))
    }

    /// Forgets the key unused longest.
    pub fn pop_oldest(&mut self) {
        if let Some((_, key)) = self.by_tick.pop_first() {
            self.entries.remove(&key);
        }
    }

    /// Keeps the keys whose value passes.
    pub fn retain(&mut self, mut keep: impl FnMut(&V) -> bool) {
        self.entries.retain(|_, (_, value)| keep(value));
        let entries = &self.entries;
        self.by_tick.retain(|_, key| entries.contains_key(key));
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_unused_longest_goes_first() {
        let mut lru = Lru::default();
        for key in ["a", "b", "a", "c"] {
            lru.put(key, key.len(), 2);
        }
        assert_eq!(lru.oldest(), Some((&"a", &1)));
        assert_eq!(lru.get("b"), None);
        lru.remove("a");
        assert_eq!(lru.oldest(), Some((&"c", &1)));
        lru.retain(|_| false);
        assert_eq!((lru.len(), lru.oldest()), (0, None));
        lru.pop_oldest();
    }
}
