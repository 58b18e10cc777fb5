//! What goes when memory is short?
//!
//! History first (oldest first), then speculations (soonest over first), then events that wait for
//! a parent (the endpoint with most, oldest first), then resident blocks (the endpoint with most,
//! first stored first). Nothing drives out what is worth more than itself.

use serde::Serialize;

use super::Index;
use super::sets::Plane;

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

/// Blocks go in parts of the whole, so that looking through them is rare.
const EVICT_PART: usize = 16;

/// More than a block can allocate in every list that there is.
const BLOCK_BYTES_MAX: usize = 1024;

/// Blocks that are let in before somebody looks again: what grows unasked for stays small.
const ROOM_LEFT_MAX: usize = 4096;

impl Index {
    /// Makes sure that so many more blocks of an endpoint, and `extra` bytes, can be added within
    /// the budget; whether that is so. Counts memory that growing tables need for a moment.
    pub(super) fn make_room(
        &mut self,
        slot: u16,
        blocks: usize,
        extra: usize,
        class: Class,
    ) -> bool {
        if self.has_room_left(blocks + extra / BLOCK_BYTES_MAX + 1) {
            return true;
        }
        // Nothing grows by more than half of what there is: mostly that is answer enough.
        let bytes = self.bytes();
        let much = blocks * BLOCK_BYTES_MAX + extra + bytes / 2 + (64 << 10);
        if bytes + much <= self.limits.bytes_max {
            // It is for the next ones, too, when there is room for all to grow twice.
            let far = self.limits.bytes_max.saturating_sub(bytes * 9 / 4 + much + (64 << 10));
            self.room_left = (far / (BLOCK_BYTES_MAX * 9 / 4)).min(ROOM_LEFT_MAX);
            return true;
        }
        let mut is_trimmed = true;
        loop {
            let growth = self.slots[usize::from(slot)].as_deref().map_or(0, |endpoint| {
                let history = class == Class::History;
                let pieces =
                    if history { endpoint.history.growth_bytes(blocks / 16 + 4) } else { 0 };
                endpoint.growth_bytes_max(blocks) + pieces
            });
            let tree = self.tree.growth_bytes(blocks, self.slots.len());
            // Lists of the blocks and of the runs they are in.
            let need = growth + tree + extra + blocks * 64;
            if self.bytes() + need <= self.limits.bytes_max {
                return true;
            }
            if !is_trimmed {
                self.trim();
            } else if !self.evict(class) {
                return false;
            }
            is_trimmed = !is_trimmed;
        }
    }

    /// Whether so many more blocks are known to fit, without a look at what there is.
    pub(super) fn has_room_left(&mut self, blocks: usize) -> bool {
        let left = self.room_left.checked_sub(blocks);
        self.room_left = left.unwrap_or(self.room_left);
        left.is_some()
    }

    /// Drives out the least that may go; whether there was anything.
    pub(super) fn evict(&mut self, class: Class) -> bool {
        self.evict_history()
            || class >= Class::Speculative && self.evict_speculation()
            || class >= Class::Pending && self.evict_pending()
            || class >= Class::Resident && self.evict_resident()
    }

    /// Drops the blocks that only the longest unused requests used: one request's at least.
    fn evict_history(&mut self) -> bool {
        let total: usize = self.slots.iter().flatten().map(|e| e.history.len()).sum();
        let mut out = 0;
        while let Some((slot, stamp)) = self.oldest_history().filter(|_| out <= total / EVICT_PART)
        {
            self.change(slot, |endpoint, tree| {
                while endpoint.history.oldest_stamp() == Some(stamp)
                    && let Some(span) = endpoint.history.pop(usize::MAX)
                {
                    tree.unhold(span, slot, 1 << Plane::HISTORY, |_, _| ());
                    out += span.len();
                }
                endpoint.history.trim();
            });
        }
        self.evicted.history += out as u64;
        out > 0
    }

    /// Slot and number of the request that used its blocks before all others.
    fn oldest_history(&self) -> Option<(u16, u32)> {
        let age = |stamp: u32| self.stamp.wrapping_sub(stamp);
        let ages = self.slots.iter().flatten().filter_map(|endpoint| {
            endpoint.history.oldest_stamp().map(|stamp| (age(stamp), endpoint.slot, stamp))
        });
        let oldest = ages.max_by_key(|&(age, slot, _)| (age, slot));
        oldest.map(|(_, slot, stamp)| (slot, stamp))
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
        let out = self.change(slot, |endpoint, tree| {
            endpoint.evict_oldest(tree, resident.div_ceil(EVICT_PART))
        });
        self.evicted.resident += out as u64;
        out > 0
    }
}
