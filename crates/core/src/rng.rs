//! The one random generator of the project: small, seedable, the same numbers for ever.

/// xoshiro256++ (Blackman and Vigna, public domain algorithm), seeded by SplitMix64.
///
/// The algorithm is part of the product: a seed that is printed today must reproduce the same
/// decisions with a later version.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// A generator whose whole future is a function of `seed`.
    pub fn seeded(seed: u64) -> Rng {
        let mut x = seed;
        let state = std::array::from_fn(|_| {
            x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = x;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        });
        Rng { state }
    }

    /// A generator whose first number is `first`: makes a decision whose seed is known.
    pub fn beginning_with(first: u64) -> Rng {
        // The first number is `rotl(s[0] + s[3], 23) + s[0]`; what follows needs a state that is
        // not all zero.
        Rng { state: [0, 0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, first.rotate_right(23)] }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; 0 when `n` is 0. Lemire's multiply-shift, whose bias is below 2^-32 for
    /// the sizes a fleet can have.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_of_a_seed_is_fixed() {
        let mut rng = Rng::seeded(1);
        assert_eq!(
            [rng.next_u64(), rng.next_u64()],
            [14_971_601_782_005_023_387, 13_781_649_495_232_077_965]
        );
    }

    #[test]
    fn a_generator_begins_with_a_given_number() {
        for first in [0, 1, 7, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mut rng = Rng::beginning_with(first);
            assert_eq!(rng.next_u64(), first);
            assert_ne!(rng.next_u64(), rng.next_u64());
        }
    }

    #[test]
    fn below_stays_below_and_reaches_every_value() {
        let mut rng = Rng::seeded(7);
        let mut seen = [false; 5];
        (0..200).for_each(|_| seen[rng.below(5)] = true);
        assert_eq!(seen, [true; 5]);
        assert_eq!(rng.below(0), 0);
    }
}
