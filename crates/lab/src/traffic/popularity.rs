//! Which group does a request belong to?

use kvroute_core::Rng;

/// Draws groups: equally, or by Zipf's law, in which the group of rank `r` has a share in
/// proportion to `r^-exponent`.
#[derive(Debug)]
pub(super) struct Popularity {
    /// Sums of shares up to each group; empty when all are equal.
    sums: Vec<f64>,
    groups: usize,
}

impl Popularity {
    /// Group 0 is the most popular one.
    pub(super) fn new(groups: u32, exponent: Option<f64>) -> Popularity {
        let mut sum = 0.0;
        let shares = exponent
            .into_iter()
            .flat_map(|exponent| (1..=groups).map(move |rank| f64::from(rank).powf(-exponent)));
        let sums = shares
            .map(|share| {
                sum += share;
                sum
            })
            .collect();
        Popularity { sums, groups: groups as usize }
    }

    /// The group of one request.
    pub(super) fn draw(&self, rng: &mut Rng) -> u32 {
        let Some(total) = self.sums.last() else { return rng.below(self.groups) as u32 };
        let at = rng.next_f64() * total;
        // Rounding may put `at` on the total itself.
        self.sums.partition_point(|sum| *sum <= at).min(self.groups - 1) as u32
    }
}
