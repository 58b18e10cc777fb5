//! A part of the table of names: a hundred or so, in the order in which they came, without gaps.
//!
//! Of each name one byte, its tag, lies apart. A name is looked for among the tags, many of which
//! are compared at once, and then mostly compared with one name only.

use wide::u8x16;

use crate::index::runs::Place;

/// Runs below this take two bytes.
const RUNS_SHORT: u32 = u16::MAX as u32;
/// Run of a name that is gone. Its room is taken back when there is reason to.
const GONE: u32 = u32::MAX;
/// Names of a segment that may be gone before their room is taken back: at least, and at most.
const GONE_MIN: usize = 8;
const GONE_MAX: usize = 200;
/// Bits of a word that say the place in the run. Of a name, the segment's number implies them.
const AT: u64 = 0xFF;
/// Bytes of a word beside its tag, and their bits.
const REST: usize = 7;
const REST_BITS: u64 = (1 << (8 * REST)) - 1;
/// Bytes of a name beside its tag, where runs take two bytes, and where they take four.
const SHORT: usize = REST + 2;
const LONG: usize = REST + 4;
/// Tags that are compared at once.
const TAGS: usize = 64;

/// A name is a word of eight bytes, the mixed name whose last byte is the place in the run. Here
/// are the tags of all words, which are their first bytes, then for each its other bytes and the
/// run that it lies in.
#[derive(Debug, Default)]
pub(super) struct Segment {
    data: Box<[u8]>,
    len: u32,
    /// Names for which there is room behind these.
    spare: u16,
    /// Names that are gone, as far as that is counted.
    gone: u8,
    /// Whether runs take four bytes.
    is_wide: bool,
}

impl Segment {
    /// Most bytes of a name.
    pub const NAME_BYTES_MAX: usize = 1 + LONG;

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Names, with those that are gone.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    #[inline]
    fn room(&self) -> usize {
        self.len as usize + usize::from(self.spare)
    }

    /// What is kept of a name beside its tag, and what is behind it.
    #[inline]
    fn from(&self, at: usize) -> &[u8] {
        &self.data[self.start(at)..]
    }

    #[inline]
    fn start(&self, at: usize) -> usize {
        self.room() + if self.is_wide { LONG * at } else { SHORT * at }
    }

    #[inline]
    fn run(&self, at: usize) -> u32 {
        let one = self.from(at);
        match self.is_wide {
            true => one.first_chunk().map_or(GONE, run_of_long),
            false => one.first_chunk().map_or(GONE, run_of_short),
        }
    }

    #[inline]
    fn set_run(&mut self, at: usize, run: u32) {
        let start = self.start(at) + REST;
        // All ones say that a name is gone in both forms.
        match self.is_wide {
            true => self.data[start..start + 4].copy_from_slice(&run.to_le_bytes()),
            false => self.data[start..start + 2].copy_from_slice(&(run as u16).to_le_bytes()),
        }
    }

    /// Where a mixed name is, gone or not.
    #[inline]
    pub fn find(&self, mixed: u64) -> Option<usize> {
        let parts = self.data.as_chunks().0.iter().take(self.len().div_ceil(TAGS));
        for (part, tags) in parts.enumerate() {
            let mut same = tagged(tags, tag(mixed));
            while same != 0 {
                let at = part * TAGS + same.trailing_zeros() as usize;
                if self.is_at(at, mixed) {
                    return Some(at);
                }
                same &= same - 1;
            }
        }
        None
    }

    /// Whether a mixed name, gone or not, is there.
    #[inline]
    pub fn is_at(&self, at: usize, mixed: u64) -> bool {
        at < self.len()
            && (rest(self.from(at)) ^ mixed) & REST_BITS & !AT == 0
            && self.data[at] == tag(mixed)
    }

    /// The first of the names that have a mixed one's tag. Reads from there, so that it is near.
    #[inline]
    pub fn seek(&self, mixed: u64) -> usize {
        let parts = self.data.as_chunks().0.iter().take(self.len().div_ceil(TAGS));
        for (part, tags) in parts.enumerate() {
            let same = tagged(tags, tag(mixed));
            if same != 0 {
                let at = part * TAGS + same.trailing_zeros() as usize;
                std::hint::black_box(self.data.get(self.start(at)).copied());
                return at;
            }
        }
        0
    }

    /// Reads what [`Segment::find`] will, so that it is near.
    #[inline]
    pub fn touch(&self) -> u8 {
        let byte = |at: usize| self.data.get(at).copied().unwrap_or(0);
        byte(0) ^ byte(TAGS)
    }

    /// Reads what [`Segment::insert`] will change, so that it is near.
    #[inline]
    pub fn touch_end(&self) -> u8 {
        self.data.get(self.start(self.len())).copied().unwrap_or(0)
    }

    /// What a name means, if it is not gone.
    #[inline]
    pub fn place(&self, at: usize) -> Option<Place> {
        let run = self.run(at);
        (run != GONE).then(|| Place { run, at: rest(self.from(at)) as u8 })
    }

    /// Gives a name that is there, gone or not, another place.
    pub fn set(&mut self, at: usize, place: Place) {
        if !self.fits(place.run) {
            self.resize(self.room(), true);
        }
        self.gone = self.gone.saturating_sub(u8::from(self.run(at) == GONE));
        let start = self.start(at);
        self.data[start] = place.at;
        self.set_run(at, place.run);
    }

    #[inline]
    fn fits(&self, run: u32) -> bool {
        self.is_wide || run < RUNS_SHORT
    }

    /// Adds a name that is not there. A full segment makes room for `step` names.
    #[inline]
    pub fn insert(&mut self, mixed: u64, place: Place, step: usize) {
        if self.spare == 0 || !self.fits(place.run) {
            self.make_room(place.run, step);
        }
        let at = self.len as usize;
        let word = mixed & !AT | u64::from(place.at);
        self.data[at] = tag(word);
        let start = self.start(at);
        self.data[start..start + REST].copy_from_slice(&word.to_le_bytes()[..REST]);
        self.set_run(at, place.run);
        self.len += 1;
        self.spare -= 1;
    }

    /// Room for one more name, in such a run.
    #[cold]
    fn make_room(&mut self, run: u32, step: usize) {
        if usize::from(self.gone) >= GONE_MIN {
            self.squeeze(|_, _, _| true);
        }
        if self.spare == 0 || !self.fits(run) {
            let names = (self.len as usize + 1).next_multiple_of(step);
            self.resize(names, self.is_wide || !self.fits(run));
        }
    }

    /// A name is gone; whether so many are now that their room should be taken back.
    #[inline]
    pub fn take(&mut self, at: usize) -> bool {
        self.set_run(at, GONE);
        self.gone = self.gone.saturating_add(1);
        usize::from(self.gone) == (self.len as usize / 2).clamp(GONE_MIN, GONE_MAX)
    }

    /// Whether names are gone, or room is spare.
    pub fn has_idle(&self) -> bool {
        self.gone > 0 || usize::from(self.spare) >= GONE_MIN
    }

    /// Takes back the room of names that are gone.
    pub fn compact(&mut self) {
        self.squeeze(|_, _, _| true);
        self.shrink();
    }

    /// Keeps the names of which that is said, in only the room that they need.
    pub fn retain(&mut self, mut is_kept: impl FnMut(u64, Place) -> bool) {
        self.squeeze(|tag, rest, run| {
            let word = u64::from(tag) << (8 * REST) | rest & REST_BITS;
            is_kept(word, Place { run, at: word as u8 })
        });
        self.shrink();
    }

    /// Takes out the names that have a bit.
    pub fn split_off(&mut self, bit: u64) -> Segment {
        let mut other = Segment { data: self.data.clone(), ..*self };
        other.squeeze(|_, rest, _| rest & bit != 0);
        other.shrink();
        self.squeeze(|_, rest, _| rest & bit == 0);
        self.shrink();
        other
    }

    /// Keeps the names of whose tag, rest and run that is said; their room stays.
    fn squeeze(&mut self, is_kept: impl FnMut(u8, u64, u32) -> bool) {
        let room = self.room();
        let (tags, names) = self.data.split_at_mut(room);
        let tags = &mut tags[..self.len as usize];
        let kept = match self.is_wide {
            true => keep::<LONG>(tags, names.as_chunks_mut().0, run_of_long, is_kept),
            false => keep::<SHORT>(tags, names.as_chunks_mut().0, run_of_short, is_kept),
        };
        (self.len, self.gone) = (kept as u32, 0);
        match u16::try_from(room - kept) {
            Ok(spare) => self.spare = spare,
            Err(_) => *self = self.in_room(room, kept.next_multiple_of(GONE_MIN), self.is_wide),
        }
    }

    /// Gives back room, if there is some.
    fn shrink(&mut self) {
        let len = self.len as usize;
        if usize::from(self.spare) >= GONE_MIN {
            let is_wide = self.is_wide && (0..len).any(|at| self.run(at) >= RUNS_SHORT);
            self.resize(len.next_multiple_of(GONE_MIN), is_wide);
        }
    }

    /// The same names in room for this many.
    fn resize(&mut self, names: usize, is_wide: bool) {
        *self = self.in_room(self.room(), names, is_wide);
    }

    /// The same with room for so many names, where there is room for `before` now.
    fn in_room(&self, before: usize, room: usize, is_wide: bool) -> Segment {
        let len = self.len as usize;
        let (tags, names) = self.data.split_at(before);
        let bytes = if is_wide { LONG } else { SHORT };
        let mut data = Vec::with_capacity(room * (1 + bytes));
        data.extend_from_slice(&tags[..len]);
        data.resize(room, 0);
        match (self.is_wide, is_wide) {
            (false, true) => names.as_chunks::<SHORT>().0[..len].iter().for_each(|name| {
                data.extend_from_slice(&name[..REST]);
                data.extend_from_slice(&run_of_short(name).to_le_bytes());
            }),
            (true, false) => names.as_chunks::<LONG>().0[..len]
                .iter()
                .for_each(|name| data.extend_from_slice(&name[..SHORT])),
            _ => data.extend_from_slice(&names[..bytes * len]),
        }
        data.resize(room * (1 + bytes), 0);
        let spare = (room - len) as u16;
        Segment { data: data.into(), len: self.len, spare, gone: self.gone, is_wide }
    }

    /// Mixed names, but for their last byte, with their places.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Place)> + '_ {
        (0..self.len()).filter_map(|at| {
            let word = u64::from(self.data[at]) << (8 * REST) | rest(self.from(at)) & REST_BITS;
            Some((word & !AT, self.place(at)?))
        })
    }
}

#[inline]
fn tag(word: u64) -> u8 {
    (word >> (8 * REST)) as u8
}

/// A word of which the first bytes of a list are all but the tag; the tag's bits are any.
#[inline]
fn rest(name: &[u8]) -> u64 {
    name.first_chunk().map_or(0, |rest| u64::from_le_bytes(*rest))
}

#[inline]
fn run_of_long(name: &[u8; LONG]) -> u32 {
    let [.., a, b, c, d] = *name;
    u32::from_le_bytes([a, b, c, d])
}

#[inline]
fn run_of_short(name: &[u8; SHORT]) -> u32 {
    let [.., a, b] = *name;
    match u16::from_le_bytes([a, b]) {
        u16::MAX => GONE,
        run => run.into(),
    }
}

/// Moves what is kept to the front; how much that is.
fn keep<const BYTES: usize>(
    tags: &mut [u8],
    names: &mut [[u8; BYTES]],
    run: impl Fn(&[u8; BYTES]) -> u32,
    mut is_kept: impl FnMut(u8, u64, u32) -> bool,
) -> usize {
    let mut kept = 0;
    // Without a branch: which names are gone, nobody could foresee.
    for at in 0..tags.len() {
        let (tag, name) = (tags[at], names[at]);
        (tags[kept], names[kept]) = (tag, name);
        let run = run(&name);
        kept += usize::from((run != GONE) & is_kept(tag, rest(&name), run));
    }
    kept
}

/// Which of some tags are this one: a bit for each.
#[inline]
fn tagged(tags: &[u8; TAGS], tag: u8) -> u64 {
    let (rows, _) = tags.as_chunks::<16>();
    let tag = u8x16::splat(tag);
    let masks = rows.iter().map(|row| u64::from(u8x16::new(*row).simd_eq(tag).to_bitmask()));
    masks.rev().fold(0, |all, mask| all << 16 | mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_where_most_others_were_dropped() {
        let mut segment = Segment::default();
        let place = Place { run: 7, at: 3 };
        (1..70_000).for_each(|name| segment.insert(name << 8, place, 16));
        segment.retain(|word, _| word >> 8 <= 3);
        for name in 1..70_000 {
            let found = segment.find(name << 8).and_then(|at| segment.place(at));
            assert_eq!(found, (name <= 3).then_some(place), "{name}");
        }
    }

    #[test]
    fn a_tag_is_found_wherever_it_is() {
        for at in 0..TAGS {
            let mut tags = [7; TAGS];
            tags[at] = 200;
            assert_eq!((tagged(&tags, 200), tagged(&tags, 7)), (1 << at, !(1 << at)));
        }
    }
}
