//! Blocks that requests on their way will fill: until a time, or until they are withdrawn.

use std::collections::{BTreeMap, BTreeSet};

use super::runs::Span;
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
    /// The prompt's blocks, first to last.
    pub spans: Box<[Span]>,
}

#[derive(Debug)]
pub(super) struct Speculations {
    serial: u64,
    live: BTreeMap<u64, Speculation>,
    by_until: BTreeSet<(Time, u64)>,
    spans: usize,
    /// How many say so of a span: run, slot, first and last place.
    counts: BTreeMap<(u32, u16, u16, u16), u32>,
}

const LIVE_BYTES: usize = size_of::<(u64, Speculation)>();
const UNTIL_BYTES: usize = size_of::<(Time, u64)>();
const COUNT_BYTES: usize = size_of::<((u32, u16, u16, u16), u32)>();

impl Speculations {
    pub fn new() -> Speculations {
        let (live, by_until) = (BTreeMap::new(), BTreeSet::new());
        Speculations { serial: 0, live, by_until, spans: 0, counts: BTreeMap::new() }
    }

    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// At least the bytes on the heap.
    pub fn bytes(&self) -> usize {
        btree_bytes(self.live.len(), LIVE_BYTES)
            + btree_bytes(self.by_until.len(), UNTIL_BYTES)
            + btree_bytes(self.counts.len(), COUNT_BYTES)
            + self.spans * size_of::<Span>()
    }

    /// Most bytes that one more of `spans` spans takes.
    pub fn growth_bytes(&self, spans: usize) -> usize {
        btree_bytes(1, LIVE_BYTES)
            + btree_bytes(1, UNTIL_BYTES)
            + btree_bytes(self.counts.len() + spans, COUNT_BYTES)
            - btree_bytes(self.counts.len(), COUNT_BYTES)
            + spans * size_of::<Span>()
    }

    pub fn push(&mut self, speculation: Speculation) -> SpeculationId {
        self.serial += 1;
        self.spans += speculation.spans.len();
        self.by_until.insert((speculation.until, self.serial));
        for span in &speculation.spans {
            *self.counts.entry((span.run, speculation.slot, span.from, span.to)).or_insert(0) += 1;
        }
        self.live.insert(self.serial, speculation);
        SpeculationId(self.serial)
    }

    pub fn get(&self, id: SpeculationId) -> Option<&Speculation> {
        self.live.get(&id.0)
    }

    /// Ends one. Of its spans, those that no other says are told to `end`, with what others say of
    /// the same run.
    pub fn remove(&mut self, id: SpeculationId, mut end: impl FnMut(Span, &[Span])) -> bool {
        let Some(speculation) = self.live.remove(&id.0) else { return false };
        self.by_until.remove(&(speculation.until, id.0));
        self.spans -= speculation.spans.len();
        let slot = speculation.slot;
        let mut others = Vec::new();
        for &span in &speculation.spans {
            let key = (span.run, slot, span.from, span.to);
            let Some(count) = self.counts.get_mut(&key) else { continue };
            *count -= 1;
            if *count > 0 {
                continue;
            }
            self.counts.remove(&key);
            let run = (span.run, slot, 0, 0)..=(span.run, slot, u16::MAX, u16::MAX);
            let same = self.counts.range(run);
            others.clear();
            others.extend(same.map(|((run, _, from, to), _)| Span {
                run: *run,
                from: *from,
                to: *to,
            }));
            end(span, &others);
        }
        true
    }

    /// The speculation that ends first.
    pub fn first(&self) -> Option<(Time, SpeculationId)> {
        self.by_until.first().map(|&(until, id)| (until, SpeculationId(id)))
    }
}
