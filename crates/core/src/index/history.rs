//! What was routed to an endpoint lately: a set of blocks, least recently used out first.

use super::table::{Number, Table};

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    key: u64,
    /// Number of the request that used the block last.
    stamp: u32,
    newer: u32,
    older: u32,
}

/// The blocks, linked from newest to oldest.
#[derive(Debug)]
pub(super) struct History {
    places: Table<Number>,
    nodes: Vec<Node>,
    newest: u32,
    oldest: u32,
}

impl History {
    pub const fn new() -> History {
        History { places: Table::new(), nodes: Vec::new(), newest: NONE, oldest: NONE }
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.places.bytes() + self.nodes.capacity() * size_of::<Node>()
    }

    /// Bytes that one more block allocates while the old memory is still there.
    pub fn growth_bytes(&self) -> usize {
        let nodes = match self.nodes.len() < self.nodes.capacity() {
            true => 0,
            false => self.nodes_next() * size_of::<Node>(),
        };
        self.places.growth_bytes() + nodes
    }

    fn nodes_next(&self) -> usize {
        (self.nodes.len() + self.nodes.len() / 2).max(8)
    }

    /// Makes a block the newest; whether it is new here.
    pub fn touch(&mut self, key: u64, stamp: u32) -> bool {
        let known = self.places.get(key).map(|place| place.0);
        let place = match known {
            Some(place) => {
                self.unlink(place);
                place
            }
            None => {
                if self.nodes.len() == self.nodes.capacity() {
                    self.nodes.reserve_exact(self.nodes_next() - self.nodes.len());
                }
                self.nodes.push(Node { key, stamp, newer: NONE, older: NONE });
                let place = (self.nodes.len() - 1) as u32;
                self.places.insert(key, Number(place));
                place
            }
        };
        self.nodes[place as usize].stamp = stamp;
        self.link(place);
        known.is_none()
    }

    /// The stamp of the oldest block.
    pub fn oldest_stamp(&self) -> Option<u32> {
        self.nodes.get(self.oldest as usize).map(|node| node.stamp)
    }

    /// Removes and returns the oldest block.
    pub fn pop(&mut self) -> Option<u64> {
        let key = self.nodes.get(self.oldest as usize)?.key;
        let place = self.oldest;
        self.unlink(place);
        self.places.remove(key);
        self.nodes.swap_remove(place as usize);
        let last = self.nodes.len() as u32;
        if place != last {
            self.moved(last, place);
        }
        Some(key)
    }

    /// All blocks, in no order that means anything.
    pub fn keys(&self) -> impl Iterator<Item = u64> + '_ {
        self.nodes.iter().map(|node| node.key)
    }

    /// All blocks, the one unused longest first.
    pub fn oldest_first(&self) -> impl Iterator<Item = u64> + '_ {
        let newer = |node: &&Node| self.nodes.get(node.newer as usize);
        std::iter::successors(self.nodes.get(self.oldest as usize), newer).map(|node| node.key)
    }

    /// Gives memory back when less than half is used.
    pub fn trim(&mut self) {
        self.places.trim(2);
        if self.nodes.len() * 2 < self.nodes.capacity() {
            self.nodes.shrink_to_fit();
        }
    }

    fn link(&mut self, place: u32) {
        let older = std::mem::replace(&mut self.newest, place);
        self.nodes[place as usize].newer = NONE;
        self.nodes[place as usize].older = older;
        match self.nodes.get_mut(older as usize) {
            Some(node) => node.newer = place,
            None => self.oldest = place,
        }
    }

    fn unlink(&mut self, place: u32) {
        let Node { newer, older, .. } = self.nodes[place as usize];
        match self.nodes.get_mut(newer as usize) {
            Some(node) => node.older = older,
            None => self.newest = older,
        }
        match self.nodes.get_mut(older as usize) {
            Some(node) => node.newer = newer,
            None => self.oldest = newer,
        }
    }

    /// Repairs the links to a node that changed its place.
    fn moved(&mut self, from: u32, to: u32) {
        let Node { key, newer, older, .. } = self.nodes[to as usize];
        self.places.insert(key, Number(to));
        match self.nodes.get_mut(newer as usize) {
            Some(node) => node.older = to,
            None => self.newest = to,
        }
        match self.nodes.get_mut(older as usize) {
            Some(node) => node.newer = to,
            None => self.oldest = to,
        }
        debug_assert!(from != to, "a node that stays needs no repair");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn the_oldest_goes_first() {
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let mut history = History::new();
            let mut model: Vec<(u64, u32)> = Vec::new();
            for stamp in 0..2000 {
                let key = rng.below(60) as u64;
                if rng.below(3) == 0 {
                    assert_eq!(history.oldest_stamp(), model.first().map(|e| e.1));
                    let want = if model.is_empty() { None } else { Some(model.remove(0).0) };
                    assert_eq!(history.pop(), want, "seed {seed}");
                } else {
                    let known = model.iter().position(|entry| entry.0 == key);
                    assert_eq!(history.touch(key, stamp), known.is_none(), "seed {seed}");
                    known.map(|i| model.remove(i));
                    model.push((key, stamp));
                }
                history.trim();
                assert_eq!(history.len(), model.len());
                let mut keys: Vec<u64> = history.keys().collect();
                let mut want: Vec<u64> = model.iter().map(|entry| entry.0).collect();
                keys.sort_unstable();
                want.sort_unstable();
                assert_eq!(keys, want, "seed {seed}");
            }
            while history.pop().is_some() {}
            history.trim();
            assert_eq!(history.bytes(), 0);
        }
    }
}
