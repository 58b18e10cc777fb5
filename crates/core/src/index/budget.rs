//! What goes when memory is short?
//!
//! History first (oldest first), then speculations (soonest over first), then events that wait for
//! a parent (the endpoint with most, oldest first), then resident blocks (the endpoint with most,
//! first stored first). Nothing drives out what is worth more than itself.

use serde::Serialize;

use super::Index;
use super::holders::Holder;

/// What memory is needed for; may drive out its own kind and those above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    History,
    Speculative,
    Pending,
    Resident,
}

/// What a limit drove out before its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Evicted {
    /// Blocks of routing history, to stay within `bytes_max`.
    pub history: u64,
    /// Speculations, to stay within `bytes_max` or `speculations_max`.
    pub speculations: u64,
    /// Blocks that waited for their parent, to stay within `bytes_max`.
    pub pending: u64,
    /// Resident blocks, to stay within `bytes_max`: the index knows less than the engines hold.
    pub resident: u64,
}

/// Resident blocks go in parts of the endpoint's blocks, so that sorting them by age is rare.
const EVICT_PART: usize = 16;

impl Index {
    /// Makes sure that one more block of an endpoint, and `extra` bytes, can be added within the
    /// budget; whether that is so. Counts memory that growing tables need for a moment.
    pub(super) fn make_room(&mut self, slot: u16, extra: usize, class: Class) -> bool {
        loop {
            let growth = self.slots[usize::from(slot)].as_deref().map_or(0, |endpoint| {
                let grows = endpoint.growth_bytes_max();
                grows + if class == Class::History { endpoint.history.growth_bytes() } else { 0 }
            });
            let need = growth + extra + self.blocks.growth_bytes_max(self.slots.len());
            if self.bytes() + need <= self.limits.bytes_max {
                return true;
            }
            if !self.evict(class) {
                return false;
            }
        }
    }

    /// Drives out the least that may go; whether there was anything.
    pub(super) fn evict(&mut self, class: Class) -> bool {
        self.evict_history()
            || class >= Class::Speculative && self.evict_speculation()
            || class >= Class::Pending && self.evict_pending()
            || class >= Class::Resident && self.evict_resident()
    }

    /// Drops the blocks that only the longest unused request of all used.
    fn evict_history(&mut self) -> bool {
        let age = |stamp: u32| self.stamp.wrapping_sub(stamp);
        let ages = self.slots.iter().flatten().filter_map(|endpoint| {
            endpoint.history.oldest_stamp().map(|stamp| (age(stamp), endpoint.slot, stamp))
        });
        let Some((_, slot, stamp)) = ages.max_by_key(|&(age, slot, _)| (age, slot)) else {
            return false;
        };
        let mut out = 0;
        self.change(slot, |endpoint, blocks| {
            while endpoint.history.oldest_stamp() == Some(stamp)
                && let Some(key) = endpoint.history.pop()
            {
                blocks.unset(key, slot, Holder::HISTORY);
                out += 1;
            }
            endpoint.history.trim();
        });
        self.blocks.trim(2);
        self.evicted.history += out;
        true
    }

    pub(super) fn evict_speculation(&mut self) -> bool {
        let Some((_, id)) = self.speculations.first() else { return false };
        self.withdraw(id);
        self.evicted.speculations += 1;
        true
    }

    fn evict_pending(&mut self) -> bool {
        let endpoints = self.slots.iter().flatten();
        let most = endpoints.map(|e| (e.pending.blocks(), e.slot)).max();
        let Some((1.., slot)) = most else { return false };
        let out = self.change(slot, |endpoint, _| endpoint.pending.pop_oldest());
        self.evicted.pending += out.map_or(0, |waiting| waiting.event.hashes.len() as u64);
        true
    }

    fn evict_resident(&mut self) -> bool {
        let endpoints = self.slots.iter().flatten();
        let most = endpoints.map(|endpoint| (endpoint.resident(), endpoint.slot)).max();
        let Some((resident @ 1.., slot)) = most else { return false };
        let out = self.change(slot, |endpoint, blocks| {
            endpoint.evict_oldest(blocks, resident.div_ceil(EVICT_PART))
        });
        self.blocks.trim(2);
        self.evicted.resident += out as u64;
        true
    }
}
