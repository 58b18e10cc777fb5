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
    Steps(Box<[Step]>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Run {
    cover: Cover,
    len: u16,
    /// Names may lead to places here that mean nothing any more: no place is given to another
    /// block until they are gone.
    pub tainted: bool,
}

impl Run {
    const NONE: Run = Run { cover: Cover::Whole(EMPTY), len: 0, tainted: false };

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

    /// The part that a block lies in; nobody holds what is behind the end.
    #[inline]
    pub fn step(&self, at: u16) -> Step {
        match &self.cover {
            Cover::Whole(set) if at < self.len => Step { end: self.len, set: *set },
            Cover::Whole(_) => Step { end: u16::MAX, set: EMPTY },
            Cover::Steps(steps) => {
                let step = steps.iter().find(|step| at < step.end);
                step.copied().unwrap_or(Step { end: u16::MAX, set: EMPTY })
            }
        }
    }

    /// Changes who holds a part, if that can be done where it stands; else what it becomes, if all
    /// of it is held by the same.
    fn change_in_place(&mut self, part: Span, new: impl FnOnce(SetId) -> SetId) -> Changed {
        let Cover::Steps(steps) = &mut self.cover else { return Changed::Not(None) };
        let at = steps.partition_point(|step| step.end <= part.from);
        let Some(&Step { end, set }) = steps.get(at).filter(|step| part.to <= step.end) else {
            return Changed::Not(None);
        };
        let to = new(set);
        if to == set {
            return Changed::Done;
        }
        // Mostly a neighbour has that set already, and only the border moves.
        let before = at.checked_sub(1).map(|before| steps[before]);
        let is_set = |step: Option<&Step>| step.is_some_and(|step| step.set == to);
        if part.to < end && is_set(before.as_ref()) && before.map(|b| b.end) == Some(part.from) {
            steps[at - 1].end = part.to;
            return Changed::Done;
        }
        let start = before.map_or(0, |before| before.end);
        if part.to == end && start < part.from && is_set(steps.get(at + 1)) {
            steps[at].end = part.from;
            return Changed::Done;
        }
        Changed::Not(Some(to))
    }

    fn bytes(&self) -> usize {
        match &self.cover {
            Cover::Whole(_) => 0,
            Cover::Steps(steps) => size_of_val(&**steps),
        }
    }
}

enum Changed {
    Done,
    /// What holds the part from now on, if it is one set.
    Not(Option<SetId>),
}

/// All runs.
#[derive(Debug)]
pub(super) struct Runs {
    runs: Vec<Run>,
    /// Keys of their blocks; none where names are keys.
    keys: Vec<Vec<BlockKey>>,
    free: Vec<u32>,
    /// Bytes of the runs' contents.
    heap: usize,
    scratch: Vec<Step>,
}

impl Runs {
    pub const fn new() -> Runs {
        Runs { runs: Vec::new(), keys: Vec::new(), free: Vec::new(), heap: 0, scratch: Vec::new() }
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.runs.capacity() * size_of::<Run>()
            + self.keys.capacity() * size_of::<Vec<BlockKey>>()
            + self.free.capacity() * 4
            + self.heap
            + self.scratch.capacity() * size_of::<Step>()
    }

    /// Most bytes that `blocks` more, and a change of who holds them, can allocate.
    pub fn growth_bytes(&self, blocks: usize) -> usize {
        let runs = if self.runs.len() < self.runs.capacity() { 0 } else { self.next() };
        let steps = 2 * size_of::<Step>() * usize::from(RUN_BLOCKS_MAX);
        (runs + blocks / 64 + 2) * (size_of::<Run>() + size_of::<Vec<BlockKey>>())
            + (self.free.len() * 2).max(16) * 4
            + blocks * 8
            + 4 * steps
            + usize::from(RUN_BLOCKS_MAX) * 16
    }

    /// Beyond the numbers of all runs so far.
    pub fn numbers(&self) -> usize {
        self.runs.len()
    }

    fn next(&self) -> usize {
        self.runs.len() + self.runs.len() / 8 + 16
    }

    #[inline]
    pub fn get(&self, run: u32) -> &Run {
        &self.runs[run as usize]
    }

    /// The set that holds a place; [`EMPTY`] for one that is gone.
    #[inline]
    pub fn set(&self, place: Place) -> SetId {
        let run = self.runs.get(place.run as usize);
        run.map_or(EMPTY, |run| run.step(place.at.into()).set)
    }

    /// The blocks around a place that are held by the same, and the set that holds them.
    #[inline]
    pub fn stretch(&self, place: Place) -> (Span, SetId) {
        let at = u16::from(place.at);
        let nobody = (Span { run: place.run, from: at, to: at }, EMPTY);
        let Some(run) = self.runs.get(place.run as usize) else { return nobody };
        let mut from = 0;
        for step in run.steps() {
            if at < step.end {
                return (Span { run: place.run, from, to: step.end }, step.set);
            }
            from = step.end;
        }
        nobody
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
        self.take_keys(run);
        self.free.push(run);
        if self.free.len() == self.runs.len() {
            *self = Runs::new();
        }
    }

    /// Keys of a run's blocks; none where names are keys.
    #[inline]
    pub fn keys(&self, run: u32) -> &[BlockKey] {
        self.keys.get(run as usize).map_or(&[], |keys| keys)
    }

    /// Appends blocks that a set holds, with their keys where those are kept.
    pub fn append(&mut self, sets: &mut Sets, id: u32, blocks: u16, keys: &[BlockKey], set: SetId) {
        self.append_keys(id, keys);
        let run = &mut self.runs[id as usize];
        let before = run.bytes();
        let end = run.len + blocks;
        match &mut run.cover {
            Cover::Whole(whole) if *whole == set => {}
            Cover::Whole(whole) if run.len == 0 => {
                *whole = set;
                sets.keep(set);
            }
            Cover::Whole(whole) => {
                let first = Step { end: run.len, set: *whole };
                run.cover = Cover::Steps([first, Step { end, set }].into());
                sets.keep(set);
            }
            Cover::Steps(steps) => match steps.last_mut() {
                Some(last) if last.set == set => last.end = end,
                _ => {
                    let mut more = Vec::with_capacity(steps.len() + 1);
                    more.extend_from_slice(steps);
                    more.push(Step { end, set });
                    *steps = more.into();
                    sets.keep(set);
                }
            },
        }
        run.len = end;
        self.heap = self.heap + run.bytes() - before;
    }

    fn append_keys(&mut self, run: u32, more: &[BlockKey]) {
        let at = run as usize;
        if more.is_empty() {
            return;
        }
        if self.keys.len() <= at {
            let room = self.runs.capacity().max(at + 1) - self.keys.len();
            self.keys.reserve_exact(room);
            self.keys.resize(at + 1, Vec::new());
        }
        let keys = &mut self.keys[at];
        let before = keys.capacity();
        if before - keys.len() < more.len() {
            // A prompt's blocks come many at a time, an answer's one by one.
            let room = if keys.is_empty() { 0 } else { 4 + keys.len() / 8 };
            keys.reserve_exact(more.len().max(room));
        }
        keys.extend_from_slice(more);
        self.heap += (keys.capacity() - before) * size_of::<BlockKey>();
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
        let known = match run.change_in_place(span, |set| new(sets, set, span.from..span.to)) {
            Changed::Done => return,
            Changed::Not(known) => known,
        };
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
                let set = known.unwrap_or_else(|| new(sets, step.set, from..to));
                push(to, set);
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
            (Cover::Steps(steps), _) if steps.len() == made.len() => steps.copy_from_slice(&made),
            _ => run.cover = Cover::Steps(made[..].into()),
        }
        self.heap = self.heap + run.bytes() - before;
        made.clear();
        self.scratch = made;
    }

    /// Drops the last blocks of a run if all of them and the one before are held by the same;
    /// whether they are.
    pub fn shorten(&mut self, span: Span) -> bool {
        let run = &mut self.runs[span.run as usize];
        if span.to != run.len || span.from == 0 {
            return false;
        }
        match &mut run.cover {
            Cover::Whole(_) => {}
            Cover::Steps(steps) => {
                let [.., before, last] = &mut steps[..] else { return false };
                if before.end >= span.from {
                    return false;
                }
                last.end = span.from;
            }
        }
        run.len = span.from;
        self.cut_keys(span.run);
        true
    }

    /// Drops the blocks at the end that nobody holds; how many are left.
    pub fn cut(&mut self, id: u32) -> u16 {
        let run = &mut self.runs[id as usize];
        let before = run.bytes();
        match &mut run.cover {
            Cover::Whole(EMPTY) => run.len = 0,
            Cover::Whole(_) => return run.len,
            Cover::Steps(steps) => {
                if steps.last().is_none_or(|last| last.set != EMPTY) {
                    return run.len;
                }
                let left = &steps[..steps.len() - 1];
                run.len = left.last().map_or(0, |last| last.end);
                run.cover = match left {
                    [one] => Cover::Whole(one.set),
                    left => Cover::Steps(left.into()),
                };
            }
        }
        let len = run.len;
        self.heap = self.heap + run.bytes() - before;
        self.cut_keys(id);
        len
    }

    /// Keys only of the blocks that are left.
    fn cut_keys(&mut self, id: u32) {
        let len = self.runs[id as usize].len;
        if let Some(keys) = self.keys.get_mut(id as usize) {
            let before = keys.capacity();
            keys.truncate(len.into());
            if before > 2 * keys.len() {
                keys.shrink_to(keys.len() + keys.len() / 8);
            }
            self.heap -= (before - keys.capacity()) * size_of::<BlockKey>();
        }
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
        let keys = self.keys.get_mut(run as usize).map(std::mem::take).unwrap_or_default();
        self.heap -= keys.capacity() * size_of::<BlockKey>();
        keys
    }

    /// Keys will not be kept any more.
    pub fn drop_keys(&mut self) {
        debug_assert!(self.keys.iter().all(Vec::is_empty), "all keys have been taken");
        self.keys = Vec::new();
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
        self.keys.truncate(self.runs.len());
        self.keys.shrink_to(self.keys.len().next_multiple_of(16));
        self.free.retain(|&run| run < len);
        self.runs.shrink_to(self.runs.len().next_multiple_of(16));
        self.free.shrink_to(self.free.len().next_multiple_of(16));
        self.scratch = Vec::new();
    }

    #[cfg(test)]
    pub fn recount(&self) -> (usize, usize) {
        let keys = self.keys.iter().map(|keys| keys.capacity() * size_of::<BlockKey>());
        (self.heap, self.runs.iter().map(Run::bytes).sum::<usize>() + keys.sum::<usize>())
    }
}
