//! Stored blocks whose parent is not known yet: kept until it is, oldest out first.
//!
//! A late start or a lost message leaves blocks whose place in a prompt cannot be told. They are
//! worth keeping for a while: a replay or a re-announced prefix gives them their place.

use std::collections::BTreeMap;

use super::table::btree_bytes;
use crate::event::{BlockStored, EngineHash, Extra, Tier};

/// One event that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub event: BlockStored,
    /// Blocks that left the cache while they waited.
    pub gone: Vec<u32>,
}

impl Waiting {
    fn heap_bytes(&self) -> usize {
        heap_bytes(&self.event) + self.gone.capacity() * 4
    }
}

/// Bytes that a copy of an event occupies besides the value itself.
pub(super) fn heap_bytes(event: &BlockStored) -> usize {
    let text = |extra: &Extra| match extra {
        Extra::Text(text) | Extra::Multimodal(text) => text.len(),
        Extra::Digest(bytes) => bytes.len(),
    };
    let extras: usize =
        event.extras.iter().flatten().map(|e| text(e) + size_of::<Extra>()).sum::<usize>()
            + event.extras.len() * size_of::<Vec<Extra>>();
    let name = event.lora_name.as_ref().map_or(0, String::len);
    let hashes = if event.hashes.spilled() { event.hashes.len() * 8 } else { 0 };
    hashes + event.tokens.heap_bytes() + extras + name
}

#[derive(Debug)]
pub(super) struct Pending {
    by_parent: BTreeMap<(u64, u64), Waiting>,
    /// Serial number to parent: the order of arrival.
    order: BTreeMap<u64, u64>,
    serial: u64,
    blocks: u32,
    heap: usize,
}

/// Bytes that an event takes here at most, besides its own copy.
pub(super) const ENTRY_BYTES_MAX: usize =
    btree_bytes(1, size_of::<((u64, u64), Waiting)>()) + btree_bytes(1, size_of::<(u64, u64)>());

impl Pending {
    pub fn new() -> Pending {
        let (by_parent, order) = (BTreeMap::new(), BTreeMap::new());
        Pending { by_parent, order, serial: 0, blocks: 0, heap: 0 }
    }

    /// Waiting blocks, those that left meanwhile included.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// At least the bytes on the heap.
    pub fn bytes(&self) -> usize {
        btree_bytes(self.by_parent.len(), size_of::<((u64, u64), Waiting)>())
            + btree_bytes(self.order.len(), size_of::<(u64, u64)>())
            + self.heap
    }

    /// Keeps a copy of an event with an unknown parent.
    pub fn push(&mut self, parent: EngineHash, event: &BlockStored) {
        let waiting = Waiting { event: event.clone(), gone: Vec::new() };
        self.heap += waiting.heap_bytes();
        self.blocks += waiting.event.hashes.len() as u32;
        self.serial += 1;
        self.order.insert(self.serial, parent.0);
        self.by_parent.insert((parent.0, self.serial), waiting);
    }

    /// The first event that waits for this parent.
    pub fn take(&mut self, parent: EngineHash) -> Option<Waiting> {
        let range = (parent.0, 0)..=(parent.0, u64::MAX);
        let (&(parent, serial), _) = self.by_parent.range(range).next()?;
        self.out(parent, serial)
    }

    /// The event that waits longest.
    pub fn pop_oldest(&mut self) -> Option<Waiting> {
        let (&serial, &parent) = self.order.first_key_value()?;
        self.out(parent, serial)
    }

    fn out(&mut self, parent: u64, serial: u64) -> Option<Waiting> {
        let waiting = self.by_parent.remove(&(parent, serial))?;
        self.order.remove(&serial);
        self.heap -= waiting.heap_bytes();
        self.blocks -= waiting.event.hashes.len() as u32;
        Some(waiting)
    }

    /// Notes that a waiting block left the cache; whether there was one. Cost: all waiting blocks.
    pub fn remove(&mut self, hash: EngineHash, tier: Tier) -> bool {
        for waiting in self.by_parent.values_mut().filter(|w| w.event.tier == tier) {
            for (i, _) in waiting.event.hashes.iter().enumerate().filter(|(_, h)| **h == hash) {
                let i = i as u32;
                if !waiting.gone.contains(&i) {
                    self.heap -= waiting.gone.capacity() * 4;
                    waiting.gone.push(i);
                    self.heap += waiting.gone.capacity() * 4;
                    return true;
                }
            }
        }
        false
    }

    pub fn clear(&mut self) {
        *self = Pending::new();
    }
}
