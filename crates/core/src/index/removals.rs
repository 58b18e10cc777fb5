//! Which blocks has an endpoint lost lately?
//!
//! A request is promised blocks when it is decided and takes them when its engine admits it; what
//! is evicted in between is nobody's lie. Two generations of a small Bloom filter remember the last
//! thousand removals or more. It errs on one side: it may say that a block was removed that was
//! not, never the other way.

const BITS: usize = 8192;
/// With two bits each, some 5 % of other blocks seem removed when a generation is full.
const GENERATION_MAX: u64 = 1024;

/// The last removals of one endpoint.
#[derive(Debug)]
pub(super) struct Removals {
    bits: [[u64; BITS / 64]; 2],
    /// The count at which each generation began: the one that is written, and the one before.
    began: [u64; 2],
    count: u64,
}

impl Removals {
    /// None yet. Counts from `began`: of marks before that, everything was removed.
    pub const fn new(began: u64) -> Removals {
        Removals { bits: [[0; BITS / 64]; 2], began: [began; 2], count: began }
    }

    /// How many there have been: a mark to ask with later.
    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn note(&mut self, key: u64) {
        if self.count - self.began[0] >= GENERATION_MAX {
            self.bits.swap(0, 1);
            self.bits[0] = [0; BITS / 64];
            self.began = [self.count, self.began[0]];
        }
        self.count += 1;
        for bit in places(key) {
            self.bits[0][bit / 64] |= 1 << (bit % 64);
        }
    }

    /// Everything was removed.
    pub fn note_all(&mut self) {
        self.count += 1;
        self.began = [self.count; 2];
        self.bits = [[0; BITS / 64]; 2];
    }

    /// Whether a block may have been removed since the count was `mark`. What is too long ago to
    /// be remembered may have been.
    pub fn may_include(&self, key: u64, mark: u64) -> bool {
        if mark >= self.count {
            return false;
        }
        let has =
            |bits: &[u64]| places(key).iter().all(|bit| bits[bit / 64] >> (bit % 64) & 1 == 1);
        mark < self.began[1] || has(&self.bits[0]) || (mark < self.began[0] && has(&self.bits[1]))
    }
}

/// Keys are hashes already.
fn places(key: u64) -> [usize; 2] {
    [key as usize % BITS, (key >> 32) as usize % BITS]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn a_removal_is_never_forgotten_and_others_rarely_seem_removed() {
        let (mut removals, mut rng) = (Removals::new(0), Rng::seeded(1));
        let mut keys = Vec::new();
        for _ in 0..5000 {
            let key = rng.next_u64();
            keys.push((key, removals.count()));
            removals.note(key);
        }
        assert!(keys.iter().all(|(key, mark)| removals.may_include(*key, *mark)));
        assert!(!removals.may_include(keys[4999].0, removals.count()));
        let mark = removals.count() - 1000;
        let wrong = (0..1000).filter(|_| removals.may_include(rng.next_u64(), mark)).count();
        assert!(wrong < 150, "{wrong}");
        removals.note_all();
        assert!(removals.may_include(7, mark));
        assert!(!removals.may_include(7, removals.count()));
    }
}
