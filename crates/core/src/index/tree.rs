//! Which blocks are there, under which key and name, and who holds them?
//!
//! Blocks lie in runs ([`super::runs`]), in the order of the prompts that they come from. A prompt
//! goes through a run from some place on and leaves it where another block follows, which then
//! begins a run of its own. Keys are chained, so equal keys at one place mean that all blocks
//! before are equal, too: a lookup compares the last key of a stretch, not each.
//!
//! What engines call a block is kept once for all engines that call it alike ([`super::names`]).
//! Where these names are the keys themselves ([`Naming::Native`]), runs have no keys of their own.

use std::ops::Range;

use super::names::{Found, Names};
use super::runs::{Place, RUN_BLOCKS_MAX, Runs, Span};
use super::sets::{EMPTY, Plane, Set, SetId, Sets};
use super::table::{Number, Table};
use crate::blocks::BlockKey;

/// What engines' names for blocks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Naming {
    /// Anything: each block has a key and, where an engine holds it, a name.
    #[default]
    Portable,
    /// The keys themselves: one map is enough.
    Native,
}

/// One way to hold blocks, of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    pub slot: u16,
    pub plane: u8,
}

/// Part of a prompt: blocks of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub span: Span,
    /// Nobody held them before.
    pub is_new: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Tree {
    pub runs: Runs,
    pub sets: Sets,
    pub names: Names,
    /// First keys of runs, where runs have keys.
    starts: Table<Number>,
    naming: Naming,
    /// Endpoints that use the names of all.
    sharing: Vec<u64>,
    /// Endpoints that have names of their own.
    pub apart: usize,
    blocks: usize,
    holders: usize,
    /// Names of blocks that nobody holds under them.
    dead: usize,
    tainted: Vec<u32>,
}

impl Tree {
    pub const fn new() -> Tree {
        Tree {
            runs: Runs::new(),
            sets: Sets::new(),
            names: Names::new(),
            starts: Table::new(),
            naming: Naming::Portable,
            sharing: Vec::new(),
            apart: 0,
            blocks: 0,
            holders: 0,
            dead: 0,
            tainted: Vec::new(),
        }
    }

    /// Distinct blocks that anybody holds.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Pairs of block and endpoint.
    pub fn holders(&self) -> usize {
        self.holders
    }

    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.runs.bytes()
            + self.sets.bytes()
            + self.names.bytes()
            + self.starts.bytes()
            + self.sharing.capacity() * 8
            + self.tainted.capacity() * 4
    }

    /// Most bytes that `blocks` more blocks, named or not, can allocate in a fleet of `slots`.
    pub fn growth_bytes(&self, blocks: usize, slots: usize) -> usize {
        let tainted = (self.tainted.len() * 2).max(4) * 4;
        self.runs.growth_bytes(blocks)
            + self.sets.growth_bytes(slots)
            + self.names.growth_bytes(blocks, self.runs.numbers() + blocks)
            + self.starts.growth_bytes()
            + tainted
    }

    /// Whether an endpoint uses the names of all.
    pub fn share(&mut self, slot: u16, shares: bool) {
        let (at, bit) = (usize::from(slot) / 64, 1u64 << (slot % 64));
        if self.sharing.len() <= at {
            self.sharing.reserve_exact(at + 1 - self.sharing.len());
            self.sharing.resize(at + 1, 0);
        }
        match shares {
            true => self.sharing[at] |= bit,
            false => self.sharing[at] &= !bit,
        }
    }

    #[inline]
    pub fn set(&self, place: Place) -> &Set {
        self.sets.get(self.runs.set(place))
    }

    /// The key of a block, where runs have keys.
    pub fn key(&self, place: Place) -> Option<BlockKey> {
        self.runs.keys(place.run).get(usize::from(place.at)).copied()
    }

    /// The key of a block that is called so.
    pub fn key_of(&self, place: Place, name: u64) -> BlockKey {
        self.key(place).unwrap_or(BlockKey(name))
    }

    /// Whether some endpoint holds blocks of a set under the names of all.
    #[inline]
    pub fn is_named(&self, set: &Set) -> bool {
        match self.naming {
            Naming::Portable if self.apart == 0 => set.planes & Plane::TIERS != 0,
            Naming::Portable => set.meets(Plane::TIERS, &self.sharing),
            Naming::Native => set.planes != 0,
        }
    }

    /// Where a prompt's first key, or the first one that leaves a run, is found.
    #[inline]
    pub fn start(&self, key: BlockKey) -> Option<Place> {
        match self.naming {
            Naming::Portable => {
                let &Number(run) = self.starts.get(key.0)?;
                Some(Place { run, at: 0 })
            }
            Naming::Native => self.names.get(key.0).filter(|place| self.runs.set(*place) != EMPTY),
        }
    }

    /// How many of these keys, of which the first is at a place, are there and behind it.
    pub fn reach(&self, place: Place, keys: &[BlockKey]) -> usize {
        let run = self.runs.get(place.run);
        let left = usize::from(run.len()).saturating_sub(usize::from(place.at));
        let keys = &keys[..left.min(keys.len())];
        let at = |n: usize| Place { run: place.run, at: (usize::from(place.at) + n) as u8 };
        let own = self.runs.keys(place.run).get(usize::from(place.at)..).unwrap_or_default();
        let is_there = |n: usize| match self.naming {
            Naming::Portable => own[n] == keys[n],
            Naming::Native => self.names.get(keys[n].0) == Some(at(n)),
        };
        match keys.len() {
            0 => 0,
            all if is_there(all - 1) => all,
            all => {
                // What is equal at one place is equal before it.
                let (mut reach, mut end) = (0, all - 1);
                while reach < end {
                    let middle = (reach + end) / 2;
                    if is_there(middle) { reach = middle + 1 } else { end = middle }
                }
                reach
            }
        }
    }

    /// Finds the blocks of these keys behind one (or the first of a prompt), and makes those that
    /// are not there, held as told.
    pub fn path(
        &mut self,
        after: Option<Place>,
        keys: &[BlockKey],
        hold: Hold,
        parts: &mut Vec<Part>,
    ) {
        let (mut last, mut done) = (after, 0);
        while done < keys.len() {
            let rest = &keys[done..];
            let next = last.and_then(|last| Some(Place { at: last.at.checked_add(1)?, ..last }));
            let onward = next.map_or(0, |next| self.onward(next, rest));
            let (place, is_new, count) = match (onward, next) {
                (1.., Some(next)) => (next, false, onward),
                _ => match self.start(rest[0]) {
                    Some(start) => (start, false, self.onward(start, rest).max(1)),
                    None => {
                        let (place, count) = self.make(last, rest, hold);
                        (place, true, count)
                    }
                },
            };
            let from = u16::from(place.at);
            let span = Span { run: place.run, from, to: from + count as u16 };
            last = Some(span.place(count - 1));
            done += count;
            match parts.last_mut() {
                Some(before)
                    if before.span.run == span.run
                        && before.span.to == span.from
                        && before.is_new == is_new =>
                {
                    before.span.to = span.to;
                }
                _ => parts.push(Part { span, is_new }),
            }
        }
    }

    /// How many of these keys are there, from a place on, as blocks that may be held by more. Where
    /// names are keys, a block that nobody holds has none: it may be elsewhere by now.
    fn onward(&self, place: Place, keys: &[BlockKey]) -> usize {
        match self.naming {
            Naming::Portable => self.reach(place, keys),
            Naming::Native if self.names.get(keys[0].0) != Some(place) => 0,
            Naming::Native => {
                let (run, at) = (self.runs.get(place.run), u16::from(place.at));
                let steps = run.steps().skip_while(|step| step.end <= at);
                let solid = steps.take_while(|step| step.set != EMPTY).last();
                let solid = solid.map_or(0, |step| usize::from(step.end - at));
                self.reach(place, &keys[..solid.min(keys.len())])
            }
        }
    }

    /// Makes the first of some blocks, and as many of those behind it as fit and are not there.
    fn make(&mut self, last: Option<Place>, keys: &[BlockKey], hold: Hold) -> (Place, usize) {
        let behind = last.filter(|last| {
            let run = self.runs.get(last.run);
            let is_end = u16::from(last.at) + 1 == run.len();
            is_end && run.len() < RUN_BLOCKS_MAX && !run.tainted
        });
        let run = behind.map_or_else(|| self.runs.open(), |last| last.run);
        let from = self.runs.get(run).len();
        let fit = usize::from(RUN_BLOCKS_MAX - from).min(keys.len());
        let place = |at: usize| Place { run, at: (usize::from(from) + at) as u8 };
        let count = match self.naming {
            Naming::Portable => {
                let others = keys[1..fit].iter().take_while(|key| self.start(**key).is_none());
                1 + others.count()
            }
            Naming::Native => {
                let mut count = 0;
                while count < fit && self.name_key(keys[count], place(count)) {
                    count += 1;
                }
                count
            }
        };
        let set = self.sets.change(EMPTY, hold.slot, hold.plane, true);
        let kept = if self.naming == Naming::Portable { &keys[..count] } else { &[] };
        self.runs.append(&mut self.sets, run, count as u16, kept, set);
        if self.naming == Naming::Portable && from == 0 {
            self.starts.insert(keys[0].0, Number(run));
        }
        self.note_made(count);
        (place(0), count)
    }

    /// Gives a new block its key for a name, unless there is a block with that key.
    fn name_key(&mut self, key: BlockKey, place: Place) -> bool {
        match self.names.get_or_insert(key.0, place) {
            Some(known) if self.runs.set(known) != EMPTY => false,
            Some(_) => {
                self.names.set(key.0, place);
                self.dead = self.dead.saturating_sub(1);
                true
            }
            None => true,
        }
    }

    /// So many blocks are new, with one holder.
    pub fn note_made(&mut self, blocks: usize) {
        self.blocks += blocks;
        self.holders += blocks;
    }

    /// Somebody more holds so many blocks.
    pub fn note_holders(&mut self, blocks: usize) {
        self.holders += blocks;
    }

    /// Blocks are held in one more way; `before` is told how the endpoint held them so far.
    pub fn add(&mut self, span: Span, hold: Hold, mut before: impl FnMut(Range<u16>, u8)) {
        let (mut blocks, mut holders) = (0, 0);
        self.runs.change(&mut self.sets, span, |sets, set, range| {
            let planes = sets.get(set).of(hold.slot);
            before(range.clone(), planes);
            if planes & 1 << hold.plane != 0 {
                return set;
            }
            blocks += if set == EMPTY { range.len() } else { 0 };
            holders += if planes == 0 { range.len() } else { 0 };
            sets.change(set, hold.slot, hold.plane, true)
        });
        self.blocks += blocks;
        self.holders += holders;
    }

    /// Blocks are no longer held in these ways; `before` is told of those that were, and how. A
    /// name that is left without a holder is swept up later.
    pub fn unhold(
        &mut self,
        span: Span,
        slot: u16,
        planes: u8,
        mut before: impl FnMut(Range<u16>, u8),
    ) {
        if span.len() == 0 {
            return;
        }
        let (mut blocks, mut holders, mut dead) = (0, 0, 0);
        let (naming, sharing) = (self.naming, &self.sharing);
        let is_named = |set: &Set| match naming {
            Naming::Portable => set.meets(Plane::TIERS, sharing),
            Naming::Native => set.planes != 0,
        };
        self.runs.change(&mut self.sets, span, |sets, set, range| {
            let held = sets.get(set).of(slot);
            let gone = held & planes;
            if gone == 0 {
                return set;
            }
            let mut left = set;
            for plane in (0..8).filter(|plane| gone & 1 << plane != 0) {
                left = sets.change(left, slot, plane, false);
            }
            blocks += if left == EMPTY { range.len() } else { 0 };
            holders += if held == gone { range.len() } else { 0 };
            if is_named(sets.get(set)) && !is_named(sets.get(left)) {
                dead += range.len();
            }
            before(range, held);
            left
        });
        self.blocks -= blocks;
        self.holders -= holders;
        if dead > 0 {
            self.dead += dead;
            if self.runs.taint(span.run) {
                self.tainted.push(span.run);
            }
        }
        if blocks > 0 {
            self.settle(span.run);
        }
    }

    /// The same for neighbours of one set by their names, in one way; names go with their last
    /// holders.
    pub fn unhold_found(&mut self, span: Span, set: SetId, hold: Hold, found: &[Found]) {
        let left = self.sets.change(set, hold.slot, hold.plane, false);
        let still = self.sets.get(left);
        let is_nameless = left == EMPTY || !self.is_named(still);
        self.holders -= if still.of(hold.slot) == 0 { span.len() } else { 0 };
        if is_nameless {
            found.iter().for_each(|found| self.names.take(*found));
        }
        if left != EMPTY {
            self.runs.change(&mut self.sets, span, |_, _, _| left);
            return;
        }
        self.blocks -= span.len();
        if !self.runs.shorten(span) {
            self.runs.change(&mut self.sets, span, |_, _, _| EMPTY);
            self.settle(span.run);
        }
    }

    /// Drops what nobody holds at the end of a run, and the run when nothing is left.
    fn settle(&mut self, run: u32) {
        let first = self.runs.keys(run).first().copied();
        if self.runs.cut(run) > 0 {
            return;
        }
        if let Some(first) = first {
            self.starts.remove(first.0);
        }
        if !self.runs.get(run).tainted {
            self.runs.close(run);
        }
    }

    /// Calls the blocks of a part by the first of these names.
    ///
    /// # Errors
    /// One means another block, or its block is called otherwise.
    pub fn name(&mut self, part: Part, names: &[u64]) -> Result<(), ()> {
        for (at, &name) in names[..part.span.len()].iter().enumerate() {
            let place = part.span.place(at);
            if !part.is_new {
                match self.names.get(name) {
                    Some(known) if known == place => {
                        let set = self.set(place);
                        if !self.is_named(set) {
                            self.dead = self.dead.saturating_sub(1);
                        }
                        continue;
                    }
                    _ if self.is_named(self.set(place)) => return Err(()),
                    _ => {}
                }
                if self.runs.get(place.run).tainted {
                    // A name nobody uses may lead here: it must not come to life again.
                    self.sweep(|_, _| true);
                }
            }
            match self.names.get_or_insert(name, place) {
                Some(known) if known != place => {
                    if self.is_named(self.set(known)) {
                        return Err(());
                    }
                    self.names.set(name, place);
                    self.dead = self.dead.saturating_sub(1);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Drops the names under which nobody holds a block, and of the others those that `keep`
    /// refuses. Cost: all names.
    pub fn sweep(&mut self, mut keep: impl FnMut(u64, Place) -> bool) {
        let mut names = std::mem::replace(&mut self.names, Names::new());
        names.retain(|name, place| self.is_named(self.set(place)) && keep(name, place));
        self.names = names;
        self.dead = 0;
        for run in std::mem::take(&mut self.tainted) {
            self.runs.clean(run);
            if self.runs.get(run).len() == 0 {
                self.runs.close(run);
            }
        }
    }

    /// Sweeps when there is enough to sweep, so that a block's removal costs little on average:
    /// a small table always, another once a sixteenth of its names are dead.
    pub fn sweep_if_due(&mut self) {
        if self.dead > 0 && (self.dead * 16 > self.names.len() || self.names.len() < 4096) {
            self.sweep(|_, _| true);
        }
        if self.blocks == 0 && self.names.len() == 0 {
            self.naming = Naming::Portable;
        }
        self.sets.tidy();
    }

    /// Gives memory back after a large removal, in a fleet of `slots` slots.
    pub fn trim(&mut self, slots: usize) {
        self.sharing.truncate(slots.div_ceil(64));
        self.sharing.shrink_to_fit();
        self.sweep_if_due();
        self.names.trim();
        self.sets.forget_unused();
        self.starts.trim(2);
        if self.tainted.is_empty() {
            self.tainted = Vec::new();
            self.runs.trim();
        }
    }

    /// Keys of a run's blocks, where runs have keys.
    pub fn keys(&self, run: u32) -> &[BlockKey] {
        self.runs.keys(run)
    }

    /// From now on names are keys, as those that will be given turn out to be. Cost: all blocks.
    pub fn go_native(&mut self) {
        debug_assert_eq!(self.names.len(), 0, "nothing is called otherwise");
        let runs: Vec<u32> = self.runs.ids().collect();
        for run in runs {
            let keys = self.runs.take_keys(run);
            for (at, key) in keys.into_iter().enumerate() {
                let place = Place { run, at: at as u8 };
                if self.runs.set(place) != EMPTY {
                    self.names.get_or_insert(key.0, place);
                }
            }
        }
        self.runs.drop_keys();
        self.starts = Table::new();
        self.naming = Naming::Native;
    }

    /// Checks counts against a recount.
    #[cfg(test)]
    pub fn check(&self) {
        let (heap, recounted) = self.runs.recount();
        assert_eq!(heap, recounted);
        let (mut blocks, mut holders) = (0, 0);
        let mut users = std::collections::BTreeMap::new();
        for run in self.runs.ids() {
            let mut start = 0;
            for step in self.runs.get(run).steps() {
                let set = self.sets.get(step.set);
                let len = usize::from(step.end - start);
                blocks += if step.set == EMPTY { 0 } else { len };
                holders += set.slots(u8::MAX).count() * len;
                if step.set != EMPTY {
                    *users.entry(step.set).or_insert(0) += 1;
                }
                start = step.end;
            }
        }
        assert_eq!((self.blocks, self.holders), (blocks, holders));
        assert_eq!(self.sets.users(), users);
        let dead = self.names.iter().filter(|(_, p)| !self.is_named(self.set(*p))).count();
        assert!(dead <= self.dead, "{dead} dead names, {} counted", self.dead);
        if self.naming == Naming::Native {
            assert_eq!(self.names.len() - dead, blocks, "each block has its key for a name");
        }
    }
}
