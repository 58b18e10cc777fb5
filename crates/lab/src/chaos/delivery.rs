//! What has the router been told about one endpoint's cache, and how far may it believe that?

use std::collections::{BTreeMap, BTreeSet};

/// The books about one endpoint's stream, kept beside the core's own.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// The processes that batches of each number came from.
    delivered: BTreeMap<u64, BTreeSet<u64>>,
    /// The process of the last batch that was applied as it came, unless all was forgotten since.
    run: Option<u64>,
    /// Two processes in one: a restart that no number shows. Possible without a replay socket, and
    /// documented there.
    pub mixed: bool,
    /// Trusted again because predictions were right in a row, not because it is complete.
    pub believed: bool,
    /// The cache was emptied through the router, and no batch has been applied since.
    pub reset_claimed: bool,
    /// Counters when they were last looked at.
    pub last: Counted,
}

/// Counters of the core that say how knowledge came about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub resets: u64,
    pub cleared: u64,
    pub agreements: u64,
    pub applied: u64,
}

impl Heard {
    /// A batch is about to be told.
    pub fn delivers(&mut self, run: u64, seq: u64) {
        self.delivered.entry(seq).or_default().insert(run);
    }

    /// Processes that a batch of this number came from.
    pub fn runs(&self, seq: u64) -> impl Iterator<Item = u64> + '_ {
        self.delivered.get(&seq).into_iter().flatten().copied()
    }

    /// Compares the core's counters with those of the last look.
    pub fn counted(&mut self, now: Counted) {
        if now.resets != self.last.resets || now.cleared != self.last.cleared {
            (self.mixed, self.believed, self.run) = (false, false, None);
        }
        self.believed |= now.agreements != self.last.agreements;
        self.reset_claimed &= now.applied == self.last.applied;
        self.last = now;
    }

    /// A live batch has been told, after which the core counts `now`. Whether it was applied to
    /// what an earlier process had told.
    pub fn told(&mut self, run: u64, now: Counted) -> bool {
        let applied = now.applied != self.last.applied;
        self.counted(now);
        applied && self.run.replace(run).is_some_and(|known| known != run)
    }
}
