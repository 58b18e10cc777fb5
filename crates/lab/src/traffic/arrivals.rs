//! When do the requests of a stage arrive?

use kvroute_core::Rng;

use super::Stage;
use crate::scenario::ArrivalKind;

/// The times of all arrivals of a stage, ascending, seconds from its start.
pub(super) fn times(kind: ArrivalKind, stage: &Stage, rng: &mut Rng) -> Vec<f64> {
    let count = stage.arrivals as usize;
    match kind {
        ArrivalKind::Poisson => poisson(stage.rate, count, rng),
        ArrivalKind::Constant => filled(0.0, stage.duration_s, count, rng).collect(),
        ArrivalKind::Even => (0..count).map(|i| i as f64 / stage.rate).collect(),
        ArrivalKind::Closed | ArrivalKind::Trace => vec![0.0; count],
    }
}

/// As inference-perf's `PoissonLoadTimer`: a Poisson count for each second, spread over all of it,
/// until there are `count`; the stage may so end a little early or late.
fn poisson(rate: f64, count: usize, rng: &mut Rng) -> Vec<f64> {
    let mut times = Vec::with_capacity(count);
    let mut second = 0.0;
    while times.len() < count {
        let arrivals = poisson_count(rate, rng);
        let rest = count - times.len();
        times.extend(filled(second, 1.0, arrivals, rng).take(rest));
        second += 1.0;
    }
    times
}

/// `count` exponential gaps from `start`, scaled so that the last one ends at `start + length`.
fn filled(start: f64, length: f64, count: usize, rng: &mut Rng) -> impl Iterator<Item = f64> {
    let gaps: Vec<f64> = (0..count).map(|_| exponential(rng)).collect();
    let scale = length / gaps.iter().sum::<f64>();
    gaps.into_iter().scan(0.0, move |sum, gap| {
        *sum += gap;
        Some(start + *sum * scale)
    })
}

/// Arrivals of a Poisson process within one unit of time.
fn poisson_count(rate: f64, rng: &mut Rng) -> usize {
    let mut sum = exponential(rng);
    let mut count = 0;
    while sum < rate {
        count += 1;
        sum += exponential(rng);
    }
    count
}

/// An exponential draw of mean 1, above 0.
pub(super) fn exponential(rng: &mut Rng) -> f64 {
    // 1 - u is in (0, 1]; the least possible draw above 0 keeps sums of gaps positive.
    -(1.0 - rng.next_f64()).ln() + f64::MIN_POSITIVE
}
