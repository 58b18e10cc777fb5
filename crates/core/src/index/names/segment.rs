//! A part of the table of names: a hundred or so, in order, without gaps.
//!
//! Where a name must be can be computed to within a few places, because mixed names are even.

use crate::index::runs::Place;

/// Names that a full segment makes room for: what lies idle is half of it on average.
pub(super) const STEP: usize = 8;
/// Names around the computed place that are looked at together.
const NEAR: usize = 16;
/// Names of a segment that may be gone before their room is taken back, at most.
const GONE_MAX: usize = 1 << 14;
/// Run of a name that is gone. Its room is taken back when there is reason to.
const GONE: u32 = u32::MAX;
const GONE_SHORT: u16 = u16::MAX;
/// Bits of a word that say the place in the run. Of a name, the segment's number implies them.
const AT: u64 = 0xFF;

/// Names, then the runs they lie in: two bytes each where that is enough, or four.
#[derive(Debug, Default)]
pub(super) struct Segment {
    /// For each name a word: the mixed name, whose last byte is the place in the run.
    data: Box<[u64]>,
    len: u32,
    gone: u16,
    is_wide: bool,
}

/// Words that so many names take.
const fn words_for(names: usize, is_wide: bool) -> usize {
    names + names.div_ceil(if is_wide { 2 } else { 4 })
}

impl Segment {
    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<u64>()
    }

    /// Names that are not gone.
    pub fn live(&self) -> usize {
        self.len as usize - usize::from(self.gone)
    }

    #[inline]
    fn room(&self) -> usize {
        if self.is_wide { self.data.len() / 3 * 2 } else { self.data.len() / 5 * 4 }
    }

    #[inline]
    fn words(&self) -> &[u64] {
        &self.data[..self.len as usize]
    }

    #[inline]
    fn run(&self, at: usize) -> u32 {
        let runs = &self.data[self.room()..];
        if self.is_wide {
            return bytemuck::cast_slice::<u64, u32>(runs)[at];
        }
        match bytemuck::cast_slice::<u64, u16>(runs)[at] {
            GONE_SHORT => GONE,
            run => u32::from(run),
        }
    }

    fn set_run(&mut self, at: usize, run: u32) {
        let room = self.room();
        let runs = &mut self.data[room..];
        match self.is_wide {
            true => bytemuck::cast_slice_mut::<u64, u32>(runs)[at] = run,
            false => {
                let short = if run == GONE { GONE_SHORT } else { run as u16 };
                bytemuck::cast_slice_mut::<u64, u16>(runs)[at] = short;
            }
        }
    }

    /// Where a mixed name is, give or take a few.
    #[inline]
    fn guess(&self, mixed: u64) -> usize {
        (((mixed >> 32) * u64::from(self.len)) >> 32) as usize
    }

    /// The first name that is not below a word.
    #[inline]
    fn lower_bound(&self, word: u64) -> usize {
        let words = self.words();
        // Mostly it is near enough to be found by halves, without a branch nobody could foresee.
        let from = self.guess(word).saturating_sub(NEAR / 2);
        let from = from.min(words.len().saturating_sub(NEAR));
        if let Some(near) = words[from..].first_chunk::<NEAR>() {
            let mut below = 0;
            for half in [8, 4, 2, 1] {
                below += half * usize::from(near[(below + half - 1) % NEAR] < word);
            }
            below += usize::from(near[below % NEAR] < word);
            let at = from + below;
            if (below > 0 || from == 0) && (below < NEAR || at == words.len()) {
                return at;
            }
        }
        words.partition_point(|other| *other < word)
    }

    /// Where a mixed name is, gone or not, or else where it belongs.
    #[inline]
    pub fn find(&self, mixed: u64) -> Result<usize, usize> {
        let word = mixed & !AT;
        let at = self.lower_bound(word);
        match self.words().get(at) {
            Some(other) if other & !AT == word => Ok(at),
            _ => Err(at),
        }
    }

    /// Reads from where a name must be, so that it is near when it is looked for.
    #[inline]
    pub fn touch(&self, mixed: u64) -> u64 {
        let at = self.guess(mixed);
        let run = self.room() + at / if self.is_wide { 2 } else { 4 };
        let word = |at: usize| self.data.get(at).copied().unwrap_or(0);
        word(at.saturating_sub(NEAR / 2)) ^ word(at + NEAR / 2 - 1) ^ word(run)
    }

    /// What a name means, if it is not gone.
    #[inline]
    pub fn place(&self, at: usize) -> Option<Place> {
        let run = self.run(at);
        (run != GONE).then(|| Place { run, at: self.data[at] as u8 })
    }

    /// Gives a name that is there, gone or not, another place.
    pub fn set(&mut self, at: usize, place: Place) {
        if !self.fits(place.run) {
            self.resize(self.room(), true);
        }
        self.gone = self.gone.saturating_sub(u16::from(self.run(at) == GONE));
        self.data[at] = self.data[at] & !AT | u64::from(place.at);
        self.set_run(at, place.run);
    }

    fn fits(&self, run: u32) -> bool {
        self.is_wide || run < u32::from(GONE_SHORT)
    }

    /// Adds a name that is not there, where it belongs.
    pub fn insert(&mut self, at: usize, mixed: u64, place: Place) {
        let len = self.len as usize;
        if len == self.room() || !self.fits(place.run) {
            self.resize(len + 1, self.is_wide || !self.fits(place.run));
        }
        let room = self.room();
        let (words, runs) = self.data.split_at_mut(room);
        put(words, at, len, mixed & !AT | u64::from(place.at));
        match self.is_wide {
            true => put(bytemuck::cast_slice_mut(runs), at, len, place.run),
            false => put(bytemuck::cast_slice_mut(runs), at, len, place.run as u16),
        }
        self.len += 1;
    }

    /// A name is gone; whether so many are now that their room should be taken back.
    pub fn take(&mut self, at: usize) -> bool {
        self.set_run(at, GONE);
        self.gone = self.gone.saturating_add(1);
        usize::from(self.gone) == (self.len as usize / 4).clamp(STEP, GONE_MAX)
    }

    /// Takes back the room of names that are gone.
    pub fn compact(&mut self) {
        self.retain(|_, _| true);
    }

    /// Keeps the names of which that is said, in only the room that they need.
    pub fn retain(&mut self, is_kept: impl FnMut(u64, Place) -> bool) {
        let len = self.len as usize;
        let (words, runs) = self.data.split_at_mut(self.room());
        let words = &mut words[..len];
        let kept = if self.is_wide {
            keep(words, bytemuck::cast_slice_mut::<u64, u32>(runs), |run| run, is_kept)
        } else {
            let long = |run: u16| if run == GONE_SHORT { GONE } else { run.into() };
            keep(words, bytemuck::cast_slice_mut::<u64, u16>(runs), long, is_kept)
        };
        (self.len, self.gone) = (kept as u32, 0);
        if self.room() >= kept + STEP {
            let is_wide = self.is_wide && (0..kept).any(|at| self.run(at) >= GONE_SHORT.into());
            self.resize(kept, is_wide);
        }
    }

    /// Takes out the names that have a bit.
    pub fn split_off(&mut self, bit: u64) -> Segment {
        let mut other = Segment { data: self.data.clone(), ..*self };
        other.retain(|word, _| word & bit != 0);
        self.retain(|word, _| word & bit == 0);
        other
    }

    /// The same names in room for this many.
    fn resize(&mut self, names: usize, is_wide: bool) {
        let (len, room) = (self.len as usize, names.next_multiple_of(STEP));
        let data = vec![0; words_for(room, is_wide)].into_boxed_slice();
        let mut new = Segment { data, is_wide, ..*self };
        new.data[..len].copy_from_slice(self.words());
        if is_wide == self.is_wide {
            let from = &self.data[self.room()..];
            let runs = from.len().min(new.data.len() - room);
            new.data[room..room + runs].copy_from_slice(&from[..runs]);
        } else {
            (0..len).for_each(|at| new.set_run(at, self.run(at)));
        }
        *self = new;
    }

    /// Mixed names, but for their last byte, with their places.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Place)> + '_ {
        let all = 0..self.len as usize;
        all.filter_map(|at| Some((self.data[at] & !AT, self.place(at)?)))
    }
}

/// Moves one in between the first `len` of a list that has room for it.
#[inline]
fn put<T: Copy>(list: &mut [T], at: usize, len: usize, one: T) {
    let list = &mut list[..=len];
    list.copy_within(at..len, at + 1);
    list[at] = one;
}

/// Moves what is kept to the front; how much that is.
fn keep<R: Copy>(
    words: &mut [u64],
    runs: &mut [R],
    long: impl Fn(R) -> u32,
    mut is_kept: impl FnMut(u64, Place) -> bool,
) -> usize {
    let mut kept = 0;
    // Without a branch: which names are gone, nobody could foresee.
    for at in 0..words.len() {
        let (word, run) = (words[at], runs[at]);
        (words[kept], runs[kept]) = (word, run);
        let place = Place { run: long(run), at: word as u8 };
        kept += usize::from((place.run != GONE) & is_kept(word, place));
    }
    kept
}
