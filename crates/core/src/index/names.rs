//! Which block does a name mean? Eight bytes a name, and two or four for the run it lies in.
//!
//! Names are hashes: a mixed name's last bits choose a segment by linear hashing (Litwin, 1980: the
//! table grows by one segment at a time, which takes its names from one other). A segment's number
//! implies at least a name's last eight bits, whose room in a word the place in the run takes.

mod segment;

use super::runs::Place;
use crate::event::EngineHash;
use segment::Segment;

/// Segments at least, so that a name's last byte follows from where it is.
const SEGMENTS_MIN: usize = 1 << 8;
/// Names of a segment on average, at most.
const SEGMENT_NAMES: usize = 96;
/// Names that a full segment makes room for: what lies idle is half of it on average.
const STEP: usize = 8;
/// The same in large tables, where making room takes longer.
const STEP_MAX: usize = 16;
/// Segments of a large table.
const LARGE_FROM_SEGMENTS: usize = 1 << 12;

/// Smaller tables stay in caches.
pub(super) const PREFETCHED_FROM_BYTES: usize = 1 << 20;

/// A name that was found: until names change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub name: u64,
    segment: u32,
    at: u32,
    pub place: Place,
}

/// A name, and where in its segment it may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sought {
    pub name: u64,
    at: u32,
}

/// Lists of an event's names, which are used again.
#[derive(Debug, Default)]
pub(super) struct Search {
    pub sought: Vec<Sought>,
    pub found: Vec<Found>,
}

impl Search {
    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.sought.capacity() * size_of::<Sought>() + self.found.capacity() * size_of::<Found>()
    }
}

/// The names of all blocks that have one.
#[derive(Debug)]
pub(super) struct Names {
    segments: Vec<Segment>,
    /// Last bits of a mixed name that say the segment, unless there is none with that number yet:
    /// then the first of them does not count.
    mask: u64,
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
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(MULTIPLY[1]);
    mixed ^ mixed >> 32
}

fn unmix(mixed: u64) -> u64 {
    let name = (mixed ^ mixed >> 32).wrapping_mul(DIVIDE[1]);
    (name ^ name >> 32).wrapping_mul(DIVIDE[0])
}

impl Names {
    pub const fn new() -> Names {
        Names { segments: Vec::new(), mask: 0, len: 0, heap: 0, sparse: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.sparse.capacity() * size_of::<u32>()
            + self.segments.capacity() * size_of::<Segment>()
            + self.heap
    }

    /// Most bytes that `names` more can allocate, with what is copied while the old is there, when
    /// the runs that they lie in are below `runs`.
    pub fn growth_bytes(&self, names: usize, runs: usize) -> usize {
        let segments = segments_next(self.segments.len());
        // Each that gets a name, or is cut in two, may have room for some more than it needs, and
        // give all its runs four bytes.
        let touched = segments.min(names + 2 * names.div_ceil(SEGMENT_NAMES));
        let names_max = 2 * SEGMENT_NAMES + STEP_MAX;
        let wider = if runs > usize::from(u16::MAX) { 2 * names_max } else { 0 };
        (names + touched * STEP_MAX + 2 * names_max) * Segment::NAME_BYTES_MAX
            + touched * wider
            + segments * size_of::<Segment>()
    }

    /// The segment of a mixed name; too high if there is none at all.
    #[inline]
    fn number(&self, mixed: u64) -> usize {
        let number = (mixed & self.mask) as usize;
        match number < self.segments.len() {
            true => number,
            false => number & (self.mask >> 1) as usize,
        }
    }

    /// Reads from where each of these names must be, and from where they go if they are new. What
    /// names are found one after the other waits for memory each time; this waits for all at once.
    pub fn prefetch(&self, names: &[EngineHash], are_new: bool) {
        let mut read = 0;
        for name in names {
            let Some(segment) = self.segments.get(self.number(mix(name.0))) else { return };
            read ^= segment.touch();
            read ^= if are_new { segment.touch_end() } else { 0 };
        }
        std::hint::black_box(read);
    }

    #[inline]
    pub fn find(&self, name: u64) -> Option<Found> {
        let mixed = mix(name);
        let number = self.number(mixed);
        let segment = self.segments.get(number)?;
        let at = segment.find(mixed)?;
        let place = segment.place(at)?;
        Some(Found { name, segment: number as u32, at: at as u32, place })
    }

    /// Looks where names may be, if that waits for memory: so it does for all of them at once.
    #[inline]
    pub fn seek<'a>(&'a self, names: &'a [EngineHash]) -> impl Iterator<Item = Sought> + 'a {
        let waits = names.len() > 1 && self.bytes() >= PREFETCHED_FROM_BYTES;
        names.iter().map(move |&EngineHash(name)| {
            if !waits {
                return Sought { name, at: u32::MAX };
            }
            let mixed = mix(name);
            let segment = self.segments.get(self.number(mixed));
            Sought { name, at: segment.map_or(u32::MAX, |segment| segment.seek(mixed) as u32) }
        })
    }

    /// A name that was sought; others may have been taken since.
    #[inline]
    pub fn find_sought(&self, sought: &Sought) -> Option<Found> {
        let Sought { name, at } = *sought;
        if at == u32::MAX {
            return self.find(name);
        }
        let mixed = mix(name);
        let number = self.number(mixed);
        let segment = self.segments.get(number)?;
        if !segment.is_at(at as usize, mixed) {
            return self.find(name);
        }
        let place = segment.place(at as usize)?;
        Some(Found { name, segment: number as u32, at, place })
    }

    #[inline]
    pub fn get(&self, name: u64) -> Option<Place> {
        self.find(name).map(|found| found.place)
    }

    /// What the name means already, or nothing and from now on this place.
    pub fn get_or_insert(&mut self, name: u64, place: Place) -> Option<Place> {
        let mixed = mix(name);
        if self.len >= self.segments.len() * SEGMENT_NAMES {
            self.grow();
        }
        let number = self.number(mixed);
        let step = if self.segments.len() < LARGE_FROM_SEGMENTS { STEP } else { STEP_MAX };
        let segment = &mut self.segments[number];
        let before = segment.bytes();
        match segment.find(mixed) {
            None => segment.insert(mixed, place, step),
            Some(at) => match segment.place(at) {
                Some(known) => return Some(known),
                None => segment.set(at, place),
            },
        }
        self.heap = self.heap + segment.bytes() - before;
        self.len += 1;
        None
    }

    /// Gives a name that is there another place.
    pub fn set(&mut self, name: u64, place: Place) {
        if let Some(Found { segment, at, .. }) = self.find(name) {
            let segment = &mut self.segments[segment as usize];
            let before = segment.bytes();
            segment.set(at as usize, place);
            self.heap = self.heap + segment.bytes() - before;
        }
    }

    /// Takes a name away. What was found before can still be taken.
    pub fn take(&mut self, found: Found) {
        self.len -= 1;
        if self.segments[found.segment as usize].take(found.at as usize) {
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

    /// Takes back the room of all names that are gone. Cost: the segments that have some.
    pub fn trim(&mut self) {
        self.sparse.clear();
        let all = (0..).zip(&self.segments);
        self.sparse.extend(all.filter(|(_, segment)| segment.has_idle()).map(|(number, _)| number));
        self.settle();
        self.sparse = Vec::new();
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

    /// All names with their places.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Place)> + '_ {
        (0..).zip(&self.segments).flat_map(|(number, segment)| {
            segment.iter().map(move |(mixed, place)| (unmix(mixed | number & 0xFF), place))
        })
    }

    /// Keeps the names of which that is said, and gives back memory. Cost: all names.
    pub fn retain(&mut self, mut keep: impl FnMut(u64, Place) -> bool) {
        (self.len, self.heap) = (0, 0);
        for (number, segment) in (0..).zip(&mut self.segments) {
            segment.retain(|word, place| keep(unmix(word & !0xFF | number & 0xFF), place));
            self.len += segment.len();
            self.heap += segment.bytes();
        }
        self.sparse = Vec::new();
        if self.len == 0 {
            *self = Names::new();
        }
        self.close_sparse();
    }

    /// A table of few names in many segments is made anew.
    fn close_sparse(&mut self) {
        if self.segments.len() > SEGMENTS_MIN
            && self.len < self.segments.len() * (SEGMENT_NAMES / 16)
        {
            let old = std::mem::replace(self, Names::new());
            for (name, place) in old.iter() {
                self.get_or_insert(name, place);
            }
        }
    }

    /// Adds a segment, or the first ones.
    fn grow(&mut self) {
        let count = self.segments.len();
        if count == 0 {
            self.segments.resize_with(SEGMENTS_MIN, Segment::default);
            self.mask = 2 * SEGMENTS_MIN as u64 - 1;
            return;
        }
        if count == self.segments.capacity() {
            self.segments.reserve_exact(segments_next(count) - count);
        }
        // The highest bit of the new one's number tells its names from those that stay.
        let half = (self.mask >> 1) as usize;
        let segment = &mut self.segments[count & half];
        let before = segment.bytes();
        let new = segment.split_off(self.mask - half as u64);
        self.heap = self.heap + segment.bytes() + new.bytes() - before;
        self.segments.push(new);
        if count as u64 == self.mask {
            self.mask = 2 * self.mask + 1;
        }
    }
}

fn segments_next(segments: usize) -> usize {
    (segments + segments / 8 + 16).max(SEGMENTS_MIN)
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
                    let room = names.bytes() + names.growth_bytes(1, usize::MAX);
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
            let spread = [1, 0x9E37_79B9_7F4A_7C15, 1 << 32, 1 << 48][seed as usize % 4];
            drive(seed, [20, 300, 20_000][seed as usize % 3], spread);
        }
    }

    #[test]
    fn growth_is_foretold_where_runs_need_more_bytes() {
        let mut rng = Rng::seeded(1);
        let mut names = Names::new();
        let short = Place { run: 7, at: 0 };
        for _ in 0..50_000 {
            names.get_or_insert(rng.next_u64(), short);
        }
        for more in [1, 100, 1_000, 10_000] {
            let most = names.bytes() + names.growth_bytes(more, 1 << 20);
            let long = Place { run: (1 << 20) - 1, at: 0 };
            for _ in 0..more {
                names.get_or_insert(rng.next_u64(), long);
            }
            assert!(names.bytes() <= most, "{more}: {} > {most}", names.bytes());
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
            assert!(bytes < 11.6, "{count} names: {bytes:.2} bytes each");
        }
    }
}
