//! What an event did to the index.

use std::ops::AddAssign;

/// Why blocks of an event were left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SkipReason {
    /// The endpoint is gone or was never added.
    UnknownEndpoint,
    /// Their KV cache group says nothing about prefix reuse.
    NotIndexable,
    /// The tokens of a group that should be full do not fill the blocks.
    NotDense,
    /// A block that is not full, or smaller than the endpoint's blocks.
    PartialBlock,
    /// Block size, tokens and extras contradict each other.
    Malformed,
    /// The kind of a group changed without a reset.
    GroupChanged,
    /// More KV cache groups than any real model has.
    TooManyGroups,
    /// `bytes_max` is reached and nothing of less worth can go.
    OverBudget,
}

impl SkipReason {
    /// All reasons, in the order of their declaration.
    pub const ALL: [SkipReason; 8] = [
        SkipReason::UnknownEndpoint,
        SkipReason::NotIndexable,
        SkipReason::NotDense,
        SkipReason::PartialBlock,
        SkipReason::Malformed,
        SkipReason::GroupChanged,
        SkipReason::TooManyGroups,
        SkipReason::OverBudget,
    ];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            SkipReason::UnknownEndpoint => "unknown_endpoint",
            SkipReason::NotIndexable => "not_indexable",
            SkipReason::NotDense => "not_dense",
            SkipReason::PartialBlock => "partial_block",
            SkipReason::Malformed => "malformed",
            SkipReason::GroupChanged => "group_changed",
            SkipReason::TooManyGroups => "too_many_groups",
            SkipReason::OverBudget => "over_budget",
        }
    }
}

/// Counts of blocks, but for `cleared`. Every block of an event is counted once, blocks that
/// waited for their parent once more (under `resolved`) when it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// First copies: new to their tier on this endpoint.
    pub stored: u64,
    /// Further copies.
    pub duplicate: u64,
    /// Listed again without a new copy (`kv_cache_report_mode=full`): not counted as a copy.
    pub reannounced: u64,
    /// Copies that ended.
    pub removed: u64,
    /// Removals and tier updates of blocks that are not known: nothing to do.
    pub unknown: u64,
    /// Kept until their parent is known.
    pub pending: u64,
    /// Waiting blocks whose parent came: applied.
    pub resolved: u64,
    /// Waiting blocks that went without: too many or too old.
    pub pending_dropped: u64,
    /// Left out, by `SkipReason`.
    pub skipped: [u64; SkipReason::ALL.len()],
    /// Events that emptied the cache.
    pub cleared: u64,
    /// Events that changed the endpoint's block size, which voids what was known before.
    pub resized: u64,
}

impl Applied {
    /// Blocks left out for a reason.
    pub fn skipped_for(&self, reason: SkipReason) -> u64 {
        self.skipped[reason as usize]
    }

    pub(super) fn skip(&mut self, reason: SkipReason, blocks: usize) {
        self.skipped[reason as usize] += blocks as u64;
    }
}

impl AddAssign for Applied {
    fn add_assign(&mut self, other: Applied) {
        self.stored += other.stored;
        self.duplicate += other.duplicate;
        self.reannounced += other.reannounced;
        self.removed += other.removed;
        self.unknown += other.unknown;
        self.pending += other.pending;
        self.resolved += other.resolved;
        self.pending_dropped += other.pending_dropped;
        self.skipped.iter_mut().zip(other.skipped).for_each(|(sum, n)| *sum += n);
        self.cleared += other.cleared;
        self.resized += other.resized;
    }
}
