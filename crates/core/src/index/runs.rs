//! Stretches of blocks that follow one another in some prompt, and who holds which part.
//!
//! Most neighbours are held by the same endpoints, so a run says that once for a whole stretch and
//! again only where it changes.

use std::ops::Range;

use super::sets::{EMPTY, SetId, Sets};
use crate::blocks::BlockKey;

/// Blocks of a run at most: a place in it is a byte.
pub(super) const RUN_BLOCKS_MAX: u16 = 256;

/// Where a block lies: its run, and its place there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub run: u32,
    pub at: u8,
}

/// Neighbouring blocks of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub run: u32,
    pub from: u16,
    pub to: u16,
}

impl Span {
    pub fn of(place: Place) -> Span {
        let from = u16::from(place.at);
        Span { run: place.run, from, to: from + 1 }
    }

    pub fn len(self) -> usize {
        usize::from(self.to - self.from)
    }

    pub fn place(self, at: usize) -> Place {
        Place { run: self.run, at: (usize::from(self.from) + at) as u8 }
    }

    pub fn has(self, place: Place) -> bool {
        self.run == place.run && (self.from..self.to).contains(&u16::from(place.at))
    }

    /// The part from block `from` to block `to` of it.
    pub fn part(self, part: Range<usize>) -> Span {
        let at = |n: usize| self.from + n as u16;
        Span { run: self.run, from: at(part.start), to: at(part.end) }
    }
}

/// Up to `end`, blocks are held by `set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub end: u16,
    pub set: SetId,
}

#[derive(Debug)]
enum Cover {
    Whole(SetId),
    Steps(Vec<Step>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Run {
    /// Keys of its blocks; none where names are keys.
    pub keys: Vec<BlockKey>,
    cover: Cover,
    len: u16,
    /// Names may lead to places here that mean nothing any more: no place is given to another
    /// block until they are gone.
    pub tainted: bool,
}

impl Run {
    const NONE: Run = Run { keys: Vec::new(), cover: Cover::Whole(EMPTY), len: 0, tainted: false };

    pub fn len(&self) -> u16 {
        self.len
    }

    /// What holds which part, from the first block on.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        let (whole, steps) = match &self.cover {
            Cover::Whole(set) => (Some(Step { end: self.len, set: *set }), &[][..]),
            Cover::Steps(steps) => (None, &steps[..]),
        };
        whole.filter(|step| step.end > 0).into_iter().chain(steps.iter().copied())
    }

    /// The set of one block; [`EMPTY`] behind the end.
    pub fn set(&self, at: u8) -> SetId {
        match &self.cover {
            Cover::Whole(set) if u16::from(at) < self.len => *set,
            Cover::Whole(_) => EMPTY,
            Cover::Steps(steps) => {
                steps.iter().find(|step| u16::from(at) < step.end).map_or(EMPTY, |step| step.set)
            }
        }
    }

    fn bytes(&self) -> usize {
        let steps = match &self.cover {
            Cover::Whole(_) => 0,
            Cover::Steps(steps) => steps.capacity() * size_of::<Step>(),
        };
        self.keys.capacity() * 8 + steps
    }
}

/// All runs.
#[derive(Debug)]
pub(super) struct Runs {
    runs: Vec<Run>,
    free: Vec<u32>,
    /// Bytes of the runs' contents.
    heap: usize,
    scratch: Vec<Step>,
}

impl Runs {
    pub const fn new() -> Runs {
        Runs { runs: Vec::new(), free: Vec::new(), heap: 0, scratch: Vec::new() }
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.runs.capacity() * size_of::<Run>()
            + self.free.capacity() * 4
            + self.heap
            + self.scratch.capacity() * size_of::<Step>()
    }

    /// Most bytes that `blocks` more, and a change of who holds them, can allocate.
    pub fn growth_bytes(&self, blocks: usize) -> usize {
        let runs = if self.runs.len() < self.runs.capacity() { 0 } else { self.next() };
        let steps = 2 * size_of::<Step>() * usize::from(RUN_BLOCKS_MAX);
        (runs + blocks / 64 + 2) * size_of::<Run>()
            + (self.free.len() * 2).max(16) * 4
            + blocks * 8
            + 4 * steps
            + usize::from(RUN_BLOCKS_MAX) * 16
    }

    fn next(&self) -> usize {
        self.runs.len() + self.runs.len() / 8 + 16
    }

    pub fn get(&self, run: u32) -> &Run {
        &self.runs[run as usize]
    }

    /// The set that holds a place; [`EMPTY`] for one that is gone.
    pub fn set(&self, place: Place) -> SetId {
        self.runs.get(place.run as usize).map_or(EMPTY, |run| run.set(place.at))
    }

    /// A new run without blocks.
    pub fn open(&mut self) -> u32 {
        if let Some(run) = self.free.pop() {
            return run;
        }
        if self.runs.len() == self.runs.capacity() {
            let more = self.next() - self.runs.len();
            self.runs.reserve_exact(more);
        }
        self.runs.push(Run::NONE);
        (self.runs.len() - 1) as u32
    }

    /// A run without blocks is gone.
    pub fn close(&mut self, run: u32) {
        let old = std::mem::replace(&mut self.runs[run as usize], Run::NONE);
        debug_assert_eq!(old.len, 0, "a run with blocks stays");
        self.heap -= old.bytes();
        self.free.push(run);
        if self.free.len() == self.runs.len() {
            *self = Runs::new();
        }
    }

    /// Appends blocks that a set holds, with their keys where those are kept.
    pub fn append(
        &mut self,
        sets: &mut Sets,
        run: u32,
        blocks: u16,
        keys: &[BlockKey],
        set: SetId,
    ) {
        let run = &mut self.runs[run as usize];
        let before = run.bytes();
        if run.keys.capacity() - run.keys.len() < keys.len() {
            // A prompt's blocks come many at a time, an answer's one by one.
            let more = if run.len == 0 { 0 } else { 4 + usize::from(run.len) / 8 };
            run.keys.reserve_exact(keys.len().max(more));
        }
        run.keys.extend_from_slice(keys);
        let end = run.len + blocks;
        match &mut run.cover {
            Cover::Whole(whole) if *whole == set => {}
            Cover::Whole(whole) if run.len == 0 => {
                *whole = set;
                sets.keep(set);
            }
            Cover::Whole(whole) => {
                let first = Step { end: run.len, set: *whole };
                run.cover = Cover::Steps(vec![first, Step { end, set }]);
                sets.keep(set);
            }
            Cover::Steps(steps) => match steps.last_mut() {
                Some(last) if last.set == set => last.end = end,
                _ => {
                    steps.push(Step { end, set });
                    sets.keep(set);
                }
            },
        }
        run.len = end;
        self.heap = self.heap + run.bytes() - before;
    }

    /// Changes who holds a part: `new` is told each set there and for how many blocks, and says
    /// which it becomes.
    pub fn change(
        &mut self,
        sets: &mut Sets,
        span: Span,
        mut new: impl FnMut(&mut Sets, SetId, Range<u16>) -> SetId,
    ) {
        let run = &mut self.runs[span.run as usize];
        if let Cover::Whole(set) = &mut run.cover
            && (span.from, span.to) == (0, run.len)
        {
            let to = new(sets, *set, 0..span.to);
            sets.keep(to);
            sets.release(*set);
            *set = to;
            return;
        }
        let mut made = std::mem::take(&mut self.scratch);
        let mut push = |end: u16, set: SetId| match made.last_mut() {
            Some(last) if last.set == set => last.end = end,
            _ => made.push(Step { end, set }),
        };
        let mut start = 0;
        for step in run.steps() {
            let inside = step.end.min(span.to).max(start);
            let (from, to) = (span.from.clamp(start, inside), inside);
            if start < from {
                push(from, step.set);
            }
            if from < to {
                push(to, new(sets, step.set, from..to));
            }
            if to < step.end {
                push(step.end, step.set);
            }
            start = step.end;
        }
        made.iter().for_each(|step| sets.keep(step.set));
        run.steps().for_each(|step| sets.release(step.set));
        let before = run.bytes();
        match (&mut run.cover, &made[..]) {
            (_, [one]) => run.cover = Cover::Whole(one.set),
            (Cover::Steps(steps), _) => {
                steps.clear();
                if steps.capacity() < made.len() || steps.capacity() > 2 * made.len() + 2 {
                    *steps = Vec::with_capacity(made.len() + 1);
                }
                steps.extend_from_slice(&made);
            }
            (Cover::Whole(_), _) => run.cover = Cover::Steps(made.clone()),
        }
        self.heap = self.heap + run.bytes() - before;
        made.clear();
        self.scratch = made;
    }

    /// Drops the blocks at the end that nobody holds; how many are left.
    pub fn cut(&mut self, run: u32) -> u16 {
        let run = &mut self.runs[run as usize];
        let before = run.bytes();
        match &mut run.cover {
            Cover::Whole(EMPTY) => run.len = 0,
            Cover::Whole(_) => return run.len,
            Cover::Steps(steps) => {
                if steps.last().is_none_or(|last| last.set != EMPTY) {
                    return run.len;
                }
                steps.pop();
                run.len = steps.last().map_or(0, |last| last.end);
                if let [one] = steps[..] {
                    run.cover = Cover::Whole(one.set);
                }
            }
        }
        run.keys.truncate(usize::from(run.len));
        if run.keys.capacity() > 2 * run.keys.len() {
            run.keys.shrink_to(run.keys.len() + run.keys.len() / 8);
        }
        self.heap = self.heap + run.bytes() - before;
        run.len
    }

    /// Marks a run, whether it was not marked before.
    pub fn taint(&mut self, run: u32) -> bool {
        !std::mem::replace(&mut self.runs[run as usize].tainted, true)
    }

    pub fn clean(&mut self, run: u32) {
        self.runs[run as usize].tainted = false;
    }

    /// Numbers of the runs that have blocks.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(&self.runs).filter(|(_, run)| run.len > 0).map(|(id, _)| id)
    }

    /// Takes the keys of a run, which goes on without.
    pub fn take_keys(&mut self, run: u32) -> Vec<BlockKey> {
        let keys = std::mem::take(&mut self.runs[run as usize].keys);
        self.heap -= keys.capacity() * 8;
        keys
    }

    /// All of a run; nothing of one that is gone.
    pub fn span(&self, run: u32) -> Span {
        let to = self.runs.get(run as usize).map_or(0, |run| run.len);
        Span { run, from: 0, to }
    }

    /// Gives back memory that long waits for runs.
    pub fn trim(&mut self) {
        while self.runs.last().is_some_and(|run| run.len == 0 && !run.tainted) {
            self.runs.pop();
        }
        let len = self.runs.len() as u32;
        self.free.retain(|&run| run < len);
        self.runs.shrink_to(self.runs.len().next_multiple_of(16));
        self.free.shrink_to(self.free.len().next_multiple_of(16));
        self.scratch = Vec::new();
    }

    #[cfg(test)]
    pub fn recount(&self) -> (usize, usize) {
        (self.heap, self.runs.iter().map(Run::bytes).sum())
    }
}
