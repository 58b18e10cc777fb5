//! Blocks that requests on their way will fill: until a time, or until they are withdrawn.

use std::collections::{BTreeMap, BTreeSet};

use super::table::btree_bytes;
use crate::Time;

/// Names one call of `Index::speculate`. The id of a speculation that is over does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpeculationId(pub(super) u64);

impl SpeculationId {
    /// The id of no speculation: an endpoint that is gone, or a chain without keys.
    pub const NONE: SpeculationId = SpeculationId(0);
}

#[derive(Debug)]
pub(super) struct Speculation {
    pub slot: u16,
    pub until: Time,
    pub keys: Box<[u64]>,
}

#[derive(Debug)]
pub(super) struct Speculations {
    serial: u64,
    live: BTreeMap<u64, Speculation>,
    by_until: BTreeSet<(Time, u64)>,
    keys: usize,
}

/// Bytes that one speculation takes here at most, besides its keys.
pub(super) const ENTRY_BYTES_MAX: usize =
    btree_bytes(1, size_of::<(u64, Speculation)>()) + btree_bytes(1, size_of::<(Time, u64)>());

impl Speculations {
    pub fn new() -> Speculations {
        let (live, by_until) = (BTreeMap::new(), BTreeSet::new());
        Speculations { serial: 0, live, by_until, keys: 0 }
    }

    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// At least the bytes on the heap.
    pub fn bytes(&self) -> usize {
        btree_bytes(self.live.len(), size_of::<(u64, Speculation)>())
            + btree_bytes(self.by_until.len(), size_of::<(Time, u64)>())
            + self.keys * 8
    }

    pub fn push(&mut self, speculation: Speculation) -> SpeculationId {
        self.serial += 1;
        self.keys += speculation.keys.len();
        self.by_until.insert((speculation.until, self.serial));
        self.live.insert(self.serial, speculation);
        SpeculationId(self.serial)
    }

    pub fn get(&self, id: SpeculationId) -> Option<&Speculation> {
        self.live.get(&id.0)
    }

    pub fn remove(&mut self, id: SpeculationId) -> Option<Speculation> {
        let speculation = self.live.remove(&id.0)?;
        self.by_until.remove(&(speculation.until, id.0));
        self.keys -= speculation.keys.len();
        Some(speculation)
    }

    /// The speculation that ends first.
    pub fn first(&self) -> Option<(Time, SpeculationId)> {
        self.by_until.first().map(|&(until, id)| (until, SpeculationId(id)))
    }
}
