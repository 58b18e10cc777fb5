//! Where did the blocks go that an endpoint stored lately?
//!
//! An answer's next block names the one before it as its parent, and that came a moment ago.

use crate::event::EngineHash;
use crate::index::runs::Place;

/// More than the requests that an engine usually runs at a time would need more room than the
/// lookups that they save are worth.
const ENTRIES: usize = 64;

/// Some of the blocks that an endpoint holds, by what its engine calls them. Whoever takes a block
/// from the endpoint must have it forgotten here.
#[derive(Debug)]
pub struct Latest([(u64, Place); ENTRIES]);

const NONE: (u64, Place) = (0, Place { run: u32::MAX, at: 0 });

impl Latest {
    pub const fn new() -> Latest {
        Latest([NONE; ENTRIES])
    }

    #[inline]
    pub fn get(&self, hash: EngineHash) -> Option<Place> {
        let (name, place) = self.0[index(hash.0)];
        (name == hash.0 && place.run != u32::MAX).then_some(place)
    }

    #[inline]
    pub fn put(&mut self, name: u64, place: Place) {
        self.0[index(name)] = (name, place);
    }

    #[inline]
    pub fn forget(&mut self, name: u64) {
        let entry = &mut self.0[index(name)];
        if entry.0 == name {
            *entry = NONE;
        }
    }

    pub fn clear(&mut self) {
        self.0 = [NONE; ENTRIES];
    }
}

fn index(name: u64) -> usize {
    (name.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - ENTRIES.trailing_zeros())) as usize
}
