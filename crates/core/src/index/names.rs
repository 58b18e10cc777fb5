//! Which block does a name mean? Eight bytes a name, and two or four for the run it lies in.
//!
//! Names are hashes: a mixed name's first bits choose a segment (extendible hashing: a full segment
//! splits alone, so nothing is ever rebuilt as a whole), inside of which names are sorted, without
//! gaps. Of even numbers in order, where one must be can be computed to within a few places. The
//! segment implies at least the first eight bits, whose room in a word the place in the run takes.

use super::runs::Place;

/// First bits that choose a segment, at least: as many as a word has no room for.
const BITS_MIN: u32 = 8;
/// And at most, so that names which are no hashes cannot make the directory grow without end.
const BITS_MAX: u32 = 26;
/// Names of a segment before it splits.
const SEGMENT_NAMES_MAX: usize = 256;
/// Names that a full segment makes room for: what lies idle is half of it on average.
const STEP: usize = 16;

/// Numbers of runs, as short as they allow.
#[derive(Debug)]
enum Numbers {
    Short(Vec<u16>),
    Long(Vec<u32>),
}

impl Numbers {
    fn get(&self, at: usize) -> u32 {
        match self {
            Numbers::Short(list) => u32::from(list[at]),
            Numbers::Long(list) => list[at],
        }
    }

    fn fit(&mut self, run: u32) {
        if let Numbers::Short(list) = self
            && run > u32::from(u16::MAX)
        {
            let mut long = Vec::with_capacity(list.capacity());
            long.extend(list.iter().map(|&run| u32::from(run)));
            *self = Numbers::Long(long);
        }
    }

    fn set(&mut self, at: usize, run: u32) {
        self.fit(run);
        match self {
            Numbers::Short(list) => list[at] = run as u16,
            Numbers::Long(list) => list[at] = run,
        }
    }

    fn insert(&mut self, at: usize, run: u32) {
        self.fit(run);
        match self {
            Numbers::Short(list) => list.insert(at, run as u16),
            Numbers::Long(list) => list.insert(at, run),
        }
    }

    fn remove(&mut self, at: usize) {
        match self {
            Numbers::Short(list) => drop(list.remove(at)),
            Numbers::Long(list) => drop(list.remove(at)),
        }
    }

    fn split_off(&mut self, at: usize) -> Numbers {
        match self {
            Numbers::Short(list) => Numbers::Short(list.split_off(at)),
            Numbers::Long(list) => Numbers::Long(list.split_off(at)),
        }
    }

    fn truncate(&mut self, len: usize) {
        match self {
            Numbers::Short(list) => list.truncate(len),
            Numbers::Long(list) => list.truncate(len),
        }
    }

    fn reserve_exact(&mut self, more: usize) {
        match self {
            Numbers::Short(list) => list.reserve_exact(more),
            Numbers::Long(list) => list.reserve_exact(more),
        }
    }

    fn shrink_to(&mut self, capacity: usize) {
        match self {
            Numbers::Short(list) => list.shrink_to(capacity),
            Numbers::Long(list) => list.shrink_to(capacity),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Numbers::Short(list) => list.capacity() * size_of::<u16>(),
            Numbers::Long(list) => list.capacity() * size_of::<u32>(),
        }
    }
}

#[derive(Debug)]
struct Segment {
    /// Mixed names without their first byte, then the place in the run.
    words: Vec<u64>,
    runs: Numbers,
    /// First bits that all its names share.
    bits: u32,
}

impl Segment {
    fn new(bits: u32) -> Segment {
        Segment { words: Vec::new(), runs: Numbers::Short(Vec::new()), bits }
    }

    fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>() + self.runs.bytes()
    }

    /// The first place whose word is not below that of a mixed name.
    fn lower_bound(&self, mixed: u64) -> usize {
        let (words, word) = (&self.words[..], mixed << 8);
        // The bits after those that all share say which part of the names comes before.
        let fraction = (mixed << self.bits) >> 32;
        let mut at = ((fraction * words.len() as u64) >> 32) as usize;
        while at < words.len() && words[at] < word {
            at += 1;
        }
        while at > 0 && words[at - 1] >= word {
            at -= 1;
        }
        at
    }

    fn place(&self, at: usize) -> Place {
        Place { run: self.runs.get(at), at: self.words[at] as u8 }
    }

    fn is(&self, at: usize, mixed: u64) -> bool {
        self.words.get(at).is_some_and(|word| (word ^ (mixed << 8)) >> 8 == 0)
    }

    fn insert(&mut self, at: usize, mixed: u64, place: Place) {
        if self.words.len() == self.words.capacity() {
            self.words.reserve_exact(STEP);
            self.runs.reserve_exact(STEP);
        }
        self.words.insert(at, mixed << 8 | u64::from(place.at));
        self.runs.insert(at, place.run);
    }

    fn remove(&mut self, at: usize) {
        self.words.remove(at);
        self.runs.remove(at);
        if self.words.len() + 3 * STEP < self.words.capacity() {
            self.trim();
        }
    }

    /// Room for what is there, in whole steps.
    fn trim(&mut self) {
        let capacity = self.words.len().next_multiple_of(STEP);
        self.words.shrink_to(capacity);
        self.runs.shrink_to(capacity);
    }
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
        Names { directory: Vec::new(), bits: 0, segments: Vec::new(), len: 0, heap: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.directory.capacity() * size_of::<u32>()
            + self.segments.capacity() * size_of::<Segment>()
            + self.heap
    }

    /// Most bytes that `names` more can allocate, with what is copied while the old is there.
    pub fn growth_bytes(&self, names: usize) -> usize {
        let split = 2 * SEGMENT_NAMES_MAX * (size_of::<u64>() + size_of::<u32>());
        let step = STEP * (size_of::<u64>() + size_of::<u32>());
        let segments = match self.segments.is_empty() {
            true => 1 << BITS_MIN,
            false => segments_next(self.segments.len()),
        };
        names * 14
            + names.min(self.segments.len().max(1 << BITS_MIN)) * step
            + split
            + segments * size_of::<Segment>()
            + self.directory.len().max(1 << BITS_MIN) * 2 * size_of::<u32>()
    }

    fn segment(&self, mixed: u64) -> Option<&Segment> {
        let at = *self.directory.get((mixed >> (64 - self.bits.max(1))) as usize)?;
        self.segments.get(at as usize)
    }

    pub fn get(&self, name: u64) -> Option<Place> {
        let mixed = mix(name);
        let segment = self.segment(mixed)?;
        let at = segment.lower_bound(mixed);
        segment.is(at, mixed).then(|| segment.place(at))
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
            if segment.is(at, mixed) {
                return Some(segment.place(at));
            }
            if segment.words.len() >= SEGMENT_NAMES_MAX && segment.bits < BITS_MAX {
                self.split(number, mixed);
                continue;
            }
            let before = segment.bytes();
            segment.insert(at, mixed, place);
            self.heap = self.heap + segment.bytes() - before;
            self.len += 1;
            return None;
        }
    }

    /// Gives a name that is there another place.
    pub fn set(&mut self, name: u64, place: Place) {
        let mixed = mix(name);
        let Some(&number) = self.directory.get((mixed >> (64 - self.bits.max(1))) as usize) else {
            return;
        };
        let segment = &mut self.segments[number as usize];
        let at = segment.lower_bound(mixed);
        if segment.is(at, mixed) {
            let before = segment.bytes();
            segment.words[at] = mixed << 8 | u64::from(place.at);
            segment.runs.set(at, place.run);
            self.heap = self.heap + segment.bytes() - before;
        }
    }

    /// Whether the name was there.
    pub fn remove(&mut self, name: u64) -> bool {
        let mixed = mix(name);
        let Some(&number) = self.directory.get((mixed >> (64 - self.bits.max(1))) as usize) else {
            return false;
        };
        let segment = &mut self.segments[number as usize];
        let at = segment.lower_bound(mixed);
        let found = segment.is(at, mixed);
        if found {
            let before = segment.bytes();
            segment.remove(at);
            self.heap = self.heap + segment.bytes() - before;
            self.len -= 1;
            self.close_empty();
        }
        found
    }

    /// All names with their places, in an order that only the names decide.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Place)> + '_ {
        let mut last = None;
        let numbers = self.directory.iter().enumerate().filter(move |(_, number)| {
            let is_first = last != Some(**number);
            last = Some(**number);
            is_first
        });
        numbers.flat_map(|(at, &number)| {
            let segment = &self.segments[number as usize];
            let first = ((at as u64) << (64 - self.bits)) & !(u64::MAX >> BITS_MIN);
            let name = move |at: usize| unmix(segment.words[at] >> 8 | first);
            (0..segment.words.len()).map(move |at| (name(at), segment.place(at)))
        })
    }

    /// Keeps the names of which that is said, and gives back memory. Cost: all names.
    pub fn retain(&mut self, mut keep: impl FnMut(u64, Place) -> bool) {
        let mut last = None;
        for at in 0..self.directory.len() {
            let number = self.directory[at];
            if last.replace(number) == Some(number) {
                continue;
            }
            let first = ((at as u64) << (64 - self.bits)) & !(u64::MAX >> BITS_MIN);
            let segment = &mut self.segments[number as usize];
            let before = (segment.bytes(), segment.words.len());
            let mut kept = 0;
            for at in 0..segment.words.len() {
                let (word, place) = (segment.words[at], segment.place(at));
                if keep(unmix(word >> 8 | first), place) {
                    segment.words[kept] = word;
                    segment.runs.set(kept, place.run);
                    kept += 1;
                }
            }
            segment.words.truncate(kept);
            segment.runs.truncate(kept);
            segment.trim();
            self.heap = self.heap + segment.bytes() - before.0;
            self.len -= before.1 - kept;
        }
        self.close_empty();
        self.close_sparse();
    }

    fn open(&mut self) {
        self.bits = BITS_MIN;
        self.directory = (0..1 << BITS_MIN).collect();
        self.segments = (0..1 << BITS_MIN).map(|_| Segment::new(BITS_MIN)).collect();
    }

    fn close_empty(&mut self) {
        if self.len == 0 {
            *self = Names::new();
        }
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
        if self.segments[number].bits == self.bits {
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
        let bits = segment.bits;
        // Bit `bits` of a mixed name, counted from the first, as it lies in a word.
        let bit = 1u64 << (64 + 8 - bits);
        let middle = segment.words.partition_point(|word| word & bit == 0);
        let (words, runs) = (segment.words.split_off(middle), segment.runs.split_off(middle));
        let mut upper = Segment { words, runs, bits };
        segment.trim();
        upper.trim();
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
                3 => assert_eq!(names.remove(name), model.remove(&name).is_some()),
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
