//! Which block does a name mean? Eight bytes a name, and two or four for the run it lies in.
//!
//! Names are hashes: a mixed name's first bits choose a segment (extendible hashing: a full segment
//! splits alone, so nothing is ever rebuilt as a whole), inside of which names are sorted, without
//! gaps. Of even numbers in order, where one must be can be computed to within a few places. The
//! segment implies at least the first eight bits, whose room in a word the place in the run takes.

use std::ops::Range;

use super::runs::Place;
use crate::event::EngineHash;

/// First bits that choose a segment, at least: as many as a word has no room for.
const BITS_MIN: u32 = 8;
/// And at most, so that names which are no hashes cannot make the directory grow without end.
const BITS_MAX: u32 = 22;
/// Names of a segment before it splits, if its names can be told apart by their bits.
const SEGMENT_NAMES_MAX: usize = 128;
/// Names that a full segment makes room for: what lies idle is half of it on average.
const STEP: usize = 8;
/// Names around the computed place that are looked at together.
const NEAR: usize = 16;
/// Names of a segment that may be gone before their room is taken back, at most.
const GONE_MAX: usize = 1 << 14;
/// Run of a name that is gone. Its room is taken back when there is reason to.
const GONE: u32 = u32::MAX;
const GONE_SHORT: u16 = u16::MAX;

/// Names in order, then the runs they lie in: two bytes each where that is enough, or four.
#[derive(Debug)]
struct Segment {
    /// For each name a word: the mixed name without its first byte, then the place in the run.
    data: Box<[u64]>,
    len: u32,
    gone: u16,
    /// First bits that all its names share.
    bits: u8,
    is_wide: bool,
}

/// Words that so many names take.
const fn words_for(names: usize, is_wide: bool) -> usize {
    names + names / if is_wide { 2 } else { 4 }
}

impl Segment {
    fn new(bits: u32) -> Segment {
        Segment { data: Box::default(), len: 0, gone: 0, bits: bits as u8, is_wide: false }
    }

    fn bytes(&self) -> usize {
        self.data.len() * size_of::<u64>()
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

    fn fits(&self, run: u32) -> bool {
        self.is_wide || run < u32::from(GONE_SHORT) || run == GONE
    }

    /// Where a mixed name is, give or take a few.
    #[inline]
    fn guess(&self, mixed: u64) -> usize {
        // The bits after those that all share say which part of the names comes before.
        let fraction = (mixed << self.bits) >> 32;
        ((fraction * u64::from(self.len)) >> 32) as usize
    }

    /// The first place whose word is not below that of a mixed name.
    #[inline]
    fn lower_bound(&self, mixed: u64) -> usize {
        let (words, word) = (self.words(), mixed << 8);
        let mut at = self.guess(mixed);
        // Mostly it is near enough to be found by halves, without a branch nobody could foresee.
        let from = at.saturating_sub(NEAR / 2).min(words.len().saturating_sub(NEAR));
        if let Some(near) = words[from..].first_chunk::<NEAR>() {
            let mut below = 0;
            for half in [8, 4, 2, 1] {
                below += half * usize::from(near[(below + half - 1) % NEAR] < word);
            }
            below += usize::from(near[below % NEAR] < word);
            at = from + below;
            if (below > 0 || from == 0) && (below < NEAR || at == words.len()) {
                return at;
            }
        }
        while at < words.len() && words[at] < word {
            at += 1;
        }
        while at > 0 && words[at - 1] >= word {
            at -= 1;
        }
        at
    }

    #[inline]
    fn place(&self, at: usize) -> Option<Place> {
        let run = self.run(at);
        (run != GONE).then(|| Place { run, at: self.data[at] as u8 })
    }

    #[inline]
    fn is(&self, at: usize, mixed: u64) -> bool {
        self.words().get(at).is_some_and(|word| (word ^ (mixed << 8)) >> 8 == 0)
    }

    fn set(&mut self, at: usize, mixed: u64, place: Place) {
        if !self.fits(place.run) {
            self.resize(self.room(), true);
        }
        self.data[at] = mixed << 8 | u64::from(place.at);
        self.set_run(at, place.run);
    }

    fn insert(&mut self, at: usize, mixed: u64, place: Place) {
        let len = self.len as usize;
        if len == self.room() || !self.fits(place.run) {
            self.resize(len + STEP, !self.fits(place.run) || self.is_wide);
        }
        let room = self.room();
        let (words, runs) = self.data.split_at_mut(room);
        words.copy_within(at..len, at + 1);
        match self.is_wide {
            true => bytemuck::cast_slice_mut::<u64, u32>(runs).copy_within(at..len, at + 1),
            false => bytemuck::cast_slice_mut::<u64, u16>(runs).copy_within(at..len, at + 1),
        }
        self.len += 1;
        self.set(at, mixed, place);
    }

    /// Some of its names, of which none is gone, in no more room than they need.
    fn part(&self, names: Range<usize>) -> Segment {
        let (len, from) = (names.len(), self.room());
        let room = len.next_multiple_of(STEP);
        let mut data = vec![0; words_for(room, self.is_wide)];
        data[..len].copy_from_slice(&self.data[names.clone()]);
        let (runs, new) = (&self.data[from..], &mut data[room..]);
        if self.is_wide {
            let runs = &bytemuck::cast_slice::<u64, u32>(runs)[names];
            bytemuck::cast_slice_mut::<u64, u32>(new)[..len].copy_from_slice(runs);
        } else {
            let runs = &bytemuck::cast_slice::<u64, u16>(runs)[names];
            bytemuck::cast_slice_mut::<u64, u16>(new)[..len].copy_from_slice(runs);
        }
        Segment { data: data.into(), len: len as u32, ..*self }
    }

    /// The same names in room for this many.
    fn resize(&mut self, names: usize, is_wide: bool) {
        let names = names.max(self.len as usize).next_multiple_of(STEP);
        let mut new = Segment {
            data: vec![0; words_for(names, is_wide)].into(),
            len: self.len,
            gone: self.gone,
            bits: self.bits,
            is_wide,
        };
        let len = self.len as usize;
        new.data[..len].copy_from_slice(self.words());
        if is_wide == self.is_wide {
            let (from, to) = (&self.data[self.room()..], new.room());
            let runs = from.len().min(new.data.len() - to);
            new.data[to..to + runs].copy_from_slice(&from[..runs]);
        } else {
            (0..len).for_each(|at| new.set_run(at, self.run(at)));
        }
        *self = new;
    }

    /// Keeps the names of which that is said, and only the room that they need.
    fn retain(&mut self, mut keep: impl FnMut(u64, Place) -> bool) {
        let mut kept = 0;
        for at in 0..self.len as usize {
            if let Some(place) = self.place(at).filter(|place| keep(self.data[at], *place)) {
                self.data[kept] = self.data[at];
                self.set_run(kept, place.run);
                kept += 1;
            }
        }
        self.shrink(kept);
    }

    /// Takes back the room of names that are gone.
    fn compact(&mut self) {
        let (len, room) = (self.len as usize, self.room());
        let (words, runs) = self.data.split_at_mut(room);
        let kept = match self.is_wide {
            true => keep_others(&mut words[..len], bytemuck::cast_slice_mut(runs), GONE),
            false => keep_others(&mut words[..len], bytemuck::cast_slice_mut(runs), GONE_SHORT),
        };
        self.shrink(kept);
    }

    /// Its first names are those that are kept, in only the room that they need.
    fn shrink(&mut self, kept: usize) {
        self.len = kept as u32;
        self.gone = 0;
        if self.room() >= kept + STEP {
            let is_wide = self.is_wide && (0..kept).any(|at| self.run(at) >= GONE_SHORT.into());
            self.resize(kept, is_wide);
        }
    }
}

/// Moves the names whose runs are not `gone` to the front; how many they are.
fn keep_others<R: Copy + PartialEq>(words: &mut [u64], runs: &mut [R], gone: R) -> usize {
    let mut kept = 0;
    // Without a branch: which names are gone, nobody could foresee.
    for at in 0..words.len() {
        let run = runs[at];
        (words[kept], runs[kept]) = (words[at], run);
        kept += usize::from(run != gone);
    }
    kept
}

/// A name that was found: until names change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub name: u64,
    segment: u32,
    at: u32,
    pub place: Place,
}

/// The names of all blocks that have one.
#[derive(Debug)]
pub(super) struct Names {
    /// By the first `bits` bits of a mixed name: the segment.
    directory: Vec<u32>,
    bits: u32,
    segments: Vec<Segment>,
    len: usize,
    /// Bytes of all segments' contents.
    heap: usize,
    /// Segments in which many names are gone.
    sparse: Vec<u32>,
}

const MULTIPLY: [u64; 2] = [0xD6E8_FEB8_6659_FD93, 0x9E37_79B9_7F4A_7C15];
/// Inverse modulo 2^64 of each.
const DIVIDE: [u64; 2] = [inverse(MULTIPLY[0]), inverse(MULTIPLY[1])];

/// Newton's iteration doubles the right bits each time; an odd number is its own inverse in three.
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut bits = 3;
    while bits < 64 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)));
        bits *= 2;
    }
    inverse
}

/// Spreads names that are small numbers. Each number has one that it comes from.
#[inline]
fn mix(name: u64) -> u64 {
    let mixed = name.wrapping_mul(MULTIPLY[0]);
    (mixed ^ mixed >> 32).wrapping_mul(MULTIPLY[1])
}

fn unmix(mixed: u64) -> u64 {
    let name = mixed.wrapping_mul(DIVIDE[1]);
    (name ^ name >> 32).wrapping_mul(DIVIDE[0])
}

impl Names {
    pub const fn new() -> Names {
        Names {
            directory: Vec::new(),
            bits: 1,
            segments: Vec::new(),
            len: 0,
            heap: 0,
            sparse: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        (self.directory.capacity() + self.sparse.capacity()) * size_of::<u32>()
            + self.segments.capacity() * size_of::<Segment>()
            + self.heap
    }

    /// Most bytes that `names` more can allocate, with what is copied while the old is there.
    pub fn growth_bytes(&self, names: usize) -> usize {
        let word = size_of::<u64>() + size_of::<u32>();
        let segments = match self.segments.is_empty() {
            true => 1 << BITS_MIN,
            false => segments_next(self.segments.len()),
        };
        names * word
            + names.min(segments) * STEP * word
            + 2 * (SEGMENT_NAMES_MAX + STEP) * word
            + segments * size_of::<Segment>()
            + self.directory.len().max(1 << BITS_MIN) * 2 * size_of::<u32>()
    }

    #[inline]
    fn number(&self, mixed: u64) -> Option<u32> {
        self.directory.get((mixed >> (64 - self.bits)) as usize).copied()
    }

    /// Reads from where each of these names must be. What names are found one after the other waits
    /// for memory each time; this waits for all of them at once.
    pub fn prefetch(&self, names: &[EngineHash]) {
        let mut read = 0;
        for name in names {
            let mixed = mix(name.0);
            let Some(number) = self.number(mixed) else { return };
            let segment = &self.segments[number as usize];
            let at = segment.guess(mixed);
            let run = segment.room() + at / if segment.is_wide { 2 } else { 4 };
            read ^= segment.data.get(at.saturating_sub(NEAR / 2)).copied().unwrap_or(0);
            read ^= segment.data.get(at + NEAR / 2 - 1).copied().unwrap_or(0);
            read ^= segment.data.get(run).copied().unwrap_or(0);
        }
        std::hint::black_box(read);
    }

    #[inline]
    pub fn find(&self, name: u64) -> Option<Found> {
        let mixed = mix(name);
        let number = self.number(mixed)?;
        let segment = &self.segments[number as usize];
        let at = segment.lower_bound(mixed);
        let place = segment.is(at, mixed).then(|| segment.place(at)).flatten()?;
        Some(Found { name, segment: number, at: at as u32, place })
    }

    #[inline]
    pub fn get(&self, name: u64) -> Option<Place> {
        self.find(name).map(|found| found.place)
    }

    /// What the name means already, or nothing and from now on this place.
    pub fn get_or_insert(&mut self, name: u64, place: Place) -> Option<Place> {
        let mixed = mix(name);
        if self.directory.is_empty() {
            self.open();
        }
        loop {
            let number = self.directory[(mixed >> (64 - self.bits)) as usize] as usize;
            let segment = &mut self.segments[number];
            let at = segment.lower_bound(mixed);
            let before = segment.bytes();
            if segment.is(at, mixed) {
                if let Some(known) = segment.place(at) {
                    return Some(known);
                }
                segment.gone -= 1;
                segment.set(at, mixed, place);
            } else if (segment.len as usize) < SEGMENT_NAMES_MAX
                || u32::from(segment.bits) >= BITS_MAX
            {
                segment.insert(at, mixed, place);
            } else if segment.gone > 0 {
                segment.compact();
                self.heap = self.heap + segment.bytes() - before;
                continue;
            } else {
                self.split(number, mixed);
                continue;
            }
            self.heap = self.heap + self.segments[number].bytes() - before;
            self.len += 1;
            return None;
        }
    }

    /// Gives a name that is there another place.
    pub fn set(&mut self, name: u64, place: Place) {
        if let Some(Found { segment, at, .. }) = self.find(name) {
            let segment = &mut self.segments[segment as usize];
            let before = segment.bytes();
            segment.set(at as usize, mix(name), place);
            self.heap = self.heap + segment.bytes() - before;
        }
    }

    /// Takes a name away. What was found before can still be taken.
    pub fn take(&mut self, found: Found) {
        let segment = &mut self.segments[found.segment as usize];
        segment.set_run(found.at as usize, GONE);
        segment.gone += 1;
        self.len -= 1;
        if usize::from(segment.gone) == (segment.len as usize / 4).clamp(STEP, GONE_MAX) {
            self.sparse.push(found.segment);
        }
    }

    /// Takes back the room of names that are gone, where that is much.
    pub fn settle(&mut self) {
        if self.len == 0 {
            *self = Names::new();
            return;
        }
        while let Some(number) = self.sparse.pop() {
            let segment = &mut self.segments[number as usize];
            let before = segment.bytes();
            segment.compact();
            self.heap = self.heap + segment.bytes() - before;
        }
    }

    #[cfg(test)]
    fn remove(&mut self, name: u64) -> bool {
        let found = self.find(name);
        if let Some(found) = found {
            self.take(found);
            self.settle();
        }
        found.is_some()
    }

    /// The first byte of all mixed names under an entry of the directory, in its place.
    fn first_byte(&self, entry: usize) -> u64 {
        ((entry as u64) << (64 - self.bits)) & !(u64::MAX >> BITS_MIN)
    }

    /// Entries of the directory that begin a segment, with its number.
    fn starts(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let mut last = None;
        let entries = self.directory.iter().copied().enumerate();
        entries.filter(move |(_, number)| last.replace(*number) != Some(*number))
    }

    /// All names with their places, in an order that only the names decide.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Place)> + '_ {
        self.starts().flat_map(|(entry, number)| {
            let segment = &self.segments[number as usize];
            let first = self.first_byte(entry);
            let name = move |at: usize| unmix(segment.data[at] >> 8 | first);
            let all = 0..segment.len as usize;
            all.filter_map(move |at| Some((name(at), segment.place(at)?)))
        })
    }

    /// Keeps the names of which that is said, and gives back memory. Cost: all names.
    pub fn retain(&mut self, mut keep: impl FnMut(u64, Place) -> bool) {
        let starts: Vec<(usize, u32)> = self.starts().collect();
        for (entry, number) in starts {
            let first = self.first_byte(entry);
            let segment = &mut self.segments[number as usize];
            let before = (segment.bytes(), segment.len - u32::from(segment.gone));
            segment.retain(|word, place| keep(unmix(word >> 8 | first), place));
            self.heap = self.heap + segment.bytes() - before.0;
            self.len -= (before.1 - segment.len) as usize;
        }
        self.sparse = Vec::new();
        if self.len == 0 {
            *self = Names::new();
        }
        self.close_sparse();
    }

    fn open(&mut self) {
        self.bits = BITS_MIN;
        self.directory = (0..1 << BITS_MIN).collect();
        self.segments = (0..1 << BITS_MIN).map(|_| Segment::new(BITS_MIN)).collect();
    }

    /// A table of few names in many segments is made anew.
    fn close_sparse(&mut self) {
        if self.segments.len() > 1 << BITS_MIN
            && self.len < self.segments.len() * (SEGMENT_NAMES_MAX / 16)
        {
            let old = std::mem::replace(self, Names::new());
            for (name, place) in old.iter() {
                self.get_or_insert(name, place);
            }
        }
    }

    /// Cuts the segment of a mixed name in two by its next bit.
    fn split(&mut self, number: usize, mixed: u64) {
        if u32::from(self.segments[number].bits) == self.bits {
            self.directory = self.directory.iter().flat_map(|&number| [number; 2]).collect();
            self.bits += 1;
        }
        if self.segments.len() == self.segments.capacity() {
            let next = segments_next(self.segments.len());
            self.segments.reserve_exact(next - self.segments.len());
        }
        let new = self.segments.len() as u32;
        let segment = &mut self.segments[number];
        let before = segment.bytes();
        segment.bits += 1;
        let bits = u32::from(segment.bits);
        // Bit `bits` of a mixed name, counted from the first, as it lies in a word.
        let bit = 1u64 << (64 + 8 - bits);
        let lower = segment.words().partition_point(|word| word & bit == 0);
        let upper = segment.part(lower..segment.len as usize);
        *segment = segment.part(0..lower);
        self.heap = self.heap + segment.bytes() + upper.bytes() - before;
        self.segments.push(upper);
        // Its entries of the directory lie together; the second half is the new segment's.
        let share = 1usize << (self.bits - bits);
        let first = (mixed >> (64 - self.bits)) as usize & !(2 * share - 1);
        self.directory[first + share..first + 2 * share].fill(new);
    }
}

fn segments_next(segments: usize) -> usize {
    segments + segments / 8 + 16
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Rng;

    fn place(n: u64) -> Place {
        Place { run: (n >> 8) as u32 & 0x3_ffff, at: n as u8 }
    }

    #[test]
    fn mixing_can_be_undone() {
        let mut rng = Rng::seeded(1);
        for name in (0..1000).chain((0..1000).map(|_| rng.next_u64())) {
            assert_eq!(unmix(mix(name)), name);
        }
    }

    /// `spread` says how far apart the names lie.
    fn drive(seed: u64, count: usize, spread: u64) {
        let mut rng = Rng::seeded(seed);
        let (mut names, mut model) = (Names::new(), BTreeMap::new());
        for step in 0..4 * count as u64 {
            let name = (rng.below(count) as u64).wrapping_mul(spread);
            match rng.below(6) {
                0..3 => {
                    let room = names.bytes() + names.growth_bytes(1);
                    let known = names.get_or_insert(name, place(step * 7));
                    assert!(names.bytes() <= room, "seed {seed}");
                    assert_eq!(known, model.get(&name).copied(), "seed {seed}");
                    model.entry(name).or_insert(place(step * 7));
                }
                3 => {
                    assert_eq!(names.remove(name), model.remove(&name).is_some(), "seed {seed}");
                }
                4 => assert_eq!(names.get(name), model.get(&name).copied(), "seed {seed}"),
                _ if rng.below(count) == 0 => {
                    names.retain(|name, place| (name ^ u64::from(place.run)) % 3 > 0);
                    model.retain(|name, place| (name ^ u64::from(place.run)) % 3 > 0);
                }
                _ => {
                    names.set(name, place(step));
                    model.entry(name).and_modify(|known| *known = place(step));
                }
            }
            assert_eq!(names.len(), model.len(), "seed {seed}");
        }
        let mut all: Vec<_> = names.iter().collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(model.clone()), "seed {seed}");
        let heap: usize = names.segments.iter().map(Segment::bytes).sum();
        assert_eq!(names.heap, heap, "seed {seed}");
        names.retain(|name, _| name == 0);
        model.keys().filter(|&&name| name != 0).for_each(|&name| assert!(!names.remove(name)));
        names.remove(0);
        names.settle();
        assert_eq!((names.len(), names.bytes()), (0, 0));
    }

    #[test]
    fn behaves_like_a_map() {
        for seed in 0..24 {
            let spread = [1, 0x9E37_79B9_7F4A_7C15, 1 << 32][seed as usize % 3];
            drive(seed, [20, 300, 20_000][seed as usize / 8], spread);
        }
    }

    #[test]
    fn a_name_takes_little_more_than_its_ten_bytes() {
        for count in [42_400u64, 300_000] {
            let mut names = Names::new();
            for name in 0..count {
                names.get_or_insert(name, place(name % 4096));
            }
            let bytes = names.bytes() as f64 / count as f64;
            println!("{count} names: {bytes:.2} bytes each");
            assert!(bytes < 11.2, "{count} names: {bytes:.2} bytes each");
        }
    }
}
