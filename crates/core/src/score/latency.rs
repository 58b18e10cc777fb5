//! `latency-scorer`: endpoints that are expected to answer in time are better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{
    Inputs, LATENCY_DEFAULT, Latency as Predicted, PREFIX_DEFAULT, Plugin, ProducerRef, Row,
    Scorer, View,
};

/// Seconds by which headrooms must differ to differ at all.
const RANGE_MIN_S: f64 = 1e-12;

/// `latency-scorer`. What is left of the client's limits decides, see `predicted-latency-producer`.
/// Only the best of these groups that is not empty is scored, others get 0: endpoints that are in
/// time (or have no prediction); that are late and idle; late per token only; late with the first
/// token only; late with both.
///
/// Within the group, the distance to each limit goes from 0 (least) to 1 (most); `x` is their mean,
/// by `ttftWeight` and `tpotWeight` (a distance in which all are equal does not count). The score
/// is `(floor(100 x) + 1) / 100` with strategy `most`, and that of `1 - x` with `least` and
/// wherever endpoints are late.
///
/// Without any prediction the score is a mean of the free share of the KV cache, the share by which
/// the queue is shorter than the longest, and the share of the prompt in cache.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Latency {
    /// Weight of time to first token, 0 or more.
    pub ttft_weight: f64,
    /// Weight of time per token, 0 or more; both 0: time to first token alone.
    pub tpot_weight: f64,
    /// Which endpoint that is in time is best.
    pub headroom_selection_strategy: HeadroomSelectionStrategy,
    /// Weight of the free KV cache while nothing is predicted, 0 or more; all three 0: it alone.
    #[serde(rename = "compositeKVWeight")]
    pub composite_kv_weight: f64,
    /// Weight of the queue while nothing is predicted, 0 or more.
    pub composite_queue_weight: f64,
    /// Weight of the prompt's cached share while nothing is predicted, 0 or more.
    pub composite_prefix_weight: f64,
    /// Producer of predicted latencies.
    pub latency_prediction_info_producer_name: Option<String>,
    /// Producer of prefix matches.
    pub prefix_match_info_producer_name: Option<String>,
}

/// Which endpoint that is in time is best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum HeadroomSelectionStrategy {
    /// The one closest to the limit, so that faster ones stay free.
    #[default]
    #[serde(alias = "")]
    Least,
    /// The one furthest from it.
    Most,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency {
            ttft_weight: 0.8,
            tpot_weight: 0.2,
            headroom_selection_strategy: HeadroomSelectionStrategy::Least,
            composite_kv_weight: 1.0,
            composite_queue_weight: 1.0,
            composite_prefix_weight: 1.0,
            latency_prediction_info_producer_name: None,
            prefix_match_info_producer_name: None,
        }
    }
}

/// The groups, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    InTime,
    LateAndIdle,
    LatePerToken,
    LateFirstToken,
    LateBoth,
}

impl Group {
    fn of(row: &Row, predicted: &Predicted) -> Group {
        let late = (predicted.ttft_headroom_s < 0.0, predicted.tpot_headroom_s < 0.0);
        match late {
            (false, false) => Group::InTime,
            _ if row.inflight.requests == 0 => Group::LateAndIdle,
            (false, true) => Group::LatePerToken,
            (true, false) => Group::LateFirstToken,
            (true, true) => Group::LateBoth,
        }
    }
}

/// From the least to the most distance to one limit.
#[derive(Clone, Copy, Debug)]
struct Range {
    least: f64,
    most: f64,
}

impl Range {
    fn of(distances: impl Iterator<Item = f64>) -> Range {
        let none = Range { least: f64::INFINITY, most: f64::NEG_INFINITY };
        distances.fold(none, |range, distance| Range {
            least: range.least.min(distance),
            most: range.most.max(distance),
        })
    }

    fn is_wide(self) -> bool {
        self.most - self.least > RANGE_MIN_S
    }

    /// From 0 to 1.
    fn place(self, distance: f64) -> f64 {
        if self.is_wide() { (distance - self.least) / (self.most - self.least) } else { 0.5 }
    }
}

impl Latency {
    fn score_predicted(&self, rows: &[Row], column: &mut [f64]) {
        // An endpoint without a prediction among others that have one is neither early nor late.
        let known = |row: &Row| usable(row).unwrap_or_default();
        let groups = rows.iter().map(|row| Group::of(row, &known(row)));
        let Some(best) = groups.min() else { return };
        let is_best = |row: &&Row| Group::of(row, &known(row)) == best;
        let ttft_s = |row: &Row| known(row).ttft_headroom_s.abs();
        let tpot_s = |row: &Row| known(row).tpot_headroom_s.abs();
        let ttft = Range::of(rows.iter().filter(is_best).map(ttft_s));
        let tpot = Range::of(rows.iter().filter(is_best).map(tpot_s));
        let (ttft_weight, tpot_weight) = self.weights(ttft, tpot);
        let least = best != Group::InTime
            || self.headroom_selection_strategy == HeadroomSelectionStrategy::Least;
        for (row, cell) in rows.iter().zip(column) {
            *cell = 0.0;
            if is_best(&row) {
                let x =
                    ttft_weight * ttft.place(ttft_s(row)) + tpot_weight * tpot.place(tpot_s(row));
                let x = if least { 1.0 - x } else { x };
                *cell = (((x * 100.0).floor() + 1.0) / 100.0).clamp(0.0, 1.0);
            }
        }
    }

    /// The weights of both distances, 1 together.
    fn weights(&self, ttft: Range, tpot: Range) -> (f64, f64) {
        match (ttft.is_wide(), tpot.is_wide()) {
            (true, false) => return (1.0, 0.0),
            (false, true) => return (0.0, 1.0),
            _ => {}
        }
        let sum = self.ttft_weight + self.tpot_weight;
        if sum <= 0.0 { (1.0, 0.0) } else { (self.ttft_weight / sum, self.tpot_weight / sum) }
    }

    fn score_composite(&self, view: &View<'_>, column: &mut [f64]) {
        let weights =
            [self.composite_kv_weight, self.composite_queue_weight, self.composite_prefix_weight];
        let sum: f64 = weights.iter().sum();
        let [kv, queue, prefix] =
            if sum <= 0.0 { [1.0, 0.0, 0.0] } else { weights.map(|weight| weight / sum) };
        let signals = view.rows.iter().filter_map(|row| row.signals);
        let longest = f64::from(signals.map(|signals| signals.waiting).max().unwrap_or(0));
        for (row, cell) in view.rows.iter().zip(column) {
            let load = match row.signals {
                Some(signals) => {
                    let waiting = f64::from(signals.waiting);
                    let shorter = if longest > 0.0 { (longest - waiting) / longest } else { 1.0 };
                    kv * (1.0 - signals.kv_usage) + queue * shorter
                }
                None if kv + queue > 0.0 => continue,
                None => 0.0,
            };
            let score = load + prefix * view.prefix(row).ratio();
            *cell = ((score * 100.0).round() / 100.0).clamp(0.0, 1.0);
        }
    }
}

/// The prediction, unless it is no number.
fn usable(row: &Row) -> Option<Predicted> {
    let finite = |p: &Predicted| p.ttft_headroom_s.is_finite() && p.tpot_headroom_s.is_finite();
    row.latency.filter(finite)
}

impl Plugin for Latency {
    fn inputs(&self) -> Inputs<'_> {
        let latency = ProducerRef::of(&self.latency_prediction_info_producer_name, LATENCY_DEFAULT);
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT);
        Inputs { latency: Some(latency), prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        for (name, weight) in [
            ("ttftWeight", self.ttft_weight),
            ("tpotWeight", self.tpot_weight),
            ("compositeKVWeight", self.composite_kv_weight),
            ("compositeQueueWeight", self.composite_queue_weight),
            ("compositePrefixWeight", self.composite_prefix_weight),
        ] {
            if !weight.is_finite() || weight < 0.0 {
                return Err(format!("{name} {weight} must be finite and not negative"));
            }
        }
        Ok(())
    }
}

impl Scorer for Latency {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        if view.rows.iter().any(|row| usable(row).is_some()) {
            self.score_predicted(view.rows, column);
        } else {
            self.score_composite(view, column);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;
    use crate::fixture::{Fixture, assert_scores};

    fn predicted(ttft_headroom_s: f64, tpot_headroom_s: f64) -> Predicted {
        Predicted { ttft_s: 1.0, tpot_s: 0.1, ttft_headroom_s, tpot_headroom_s }
    }

    /// Endpoints by headrooms, of which each has one request in flight.
    fn busy(headrooms: &[(f64, f64)]) -> Fixture {
        let mut fixture = Fixture::new(headrooms.len());
        for (at, (ttft, tpot)) in headrooms.iter().enumerate() {
            fixture.latency(at, predicted(*ttft, *tpot));
            fixture.inflight(at, 1, 0);
        }
        fixture
    }

    fn most() -> Latency {
        let headroom_selection_strategy = HeadroomSelectionStrategy::Most;
        Latency { headroom_selection_strategy, ..Latency::default() }
    }

    #[test]
    fn the_best_group_alone_is_scored() {
        let least = Latency::default();
        type Case<'a> = (&'a Latency, &'a [(f64, f64)], &'a [f64]);
        let most = most();
        let only_tpot = Latency { ttft_weight: 0.0, ..Latency::default() };
        let none = Latency { ttft_weight: 0.0, tpot_weight: 0.0, ..Latency::default() };
        let table: [Case<'_>; 15] = [
            (&least, &[], &[]),
            // One, and all equal: half way.
            (&least, &[(1.0, 1.0)], &[0.51]),
            (&least, &[(1.0, 0.0), (1.0, 0.0)], &[0.51, 0.51]),
            (&least, &[(-1.0, 0.0), (-1.0, 0.0)], &[0.51, 0.51]),
            // In time: the closest to the limit, or the furthest.
            (&least, &[(1.0, 0.0), (2.0, 0.0), (5.0, 0.0)], &[1.0, 0.76, 0.01]),
            (&most, &[(1.0, 0.0), (2.0, 0.0), (5.0, 0.0)], &[0.01, 0.26, 1.0]),
            // Both count: 0.8 and 0.2.
            (&most, &[(0.0, 0.1), (4.0, 0.0), (1.0, 0.05)], &[0.21, 0.81, 0.31]),
            (&only_tpot, &[(0.0, 0.1), (4.0, 0.0), (1.0, 0.05)], &[0.01, 1.0, 0.51]),
            (&none, &[(0.0, 0.1), (4.0, 0.0), (1.0, 0.05)], &[1.0, 0.01, 0.76]),
            // A limit that all are equally far from does not count.
            (&most, &[(1.0, 0.1), (1.0, 0.2)], &[0.01, 1.0]),
            // Late ones get nothing beside one in time.
            (&least, &[(-1.0, 1.0), (3.0, 0.0), (1.0, -1.0)], &[0.0, 0.51, 0.0]),
            // All late: per token only, before first token only, before both; least late is best
            // whatever the strategy.
            (&most, &[(-1.0, -1.0), (-1.0, 0.0), (0.0, -1.0)], &[0.0, 0.0, 0.51]),
            (&most, &[(-1.0, -1.0), (-1.0, 0.0), (-5.0, 0.0)], &[0.0, 1.0, 0.01]),
            (&most, &[(-1.0, -1.0), (-5.0, -5.0)], &[1.0, 0.01]),
            // No number is no prediction, which is neither early nor late.
            (&least, &[(f64::NAN, 1.0), (-1.0, 0.0)], &[0.51, 0.0]),
        ];
        for (scorer, headrooms, expected) in table {
            assert_scores(&busy(headrooms).score(&mut scorer.clone()), expected);
        }
    }

    #[test]
    fn of_late_ones_the_idle_are_preferred() {
        let mut fixture = busy(&[(-1.0, 0.0), (-9.0, -9.0), (0.0, -1.0), (-5.0, -9.0)]);
        fixture.inflight(1, 0, 0);
        fixture.inflight(3, 0, 0);
        assert_scores(&fixture.score(&mut Latency::default()), &[0.0, 0.01, 0.0, 1.0]);
        // One in time is better than any idle one.
        fixture.latency(2, predicted(0.1, 0.0));
        assert_scores(&fixture.score(&mut Latency::default()), &[0.0, 0.0, 0.51, 0.0]);
    }

    #[test]
    fn without_predictions_load_and_cache_count() {
        let mut fixture = Fixture::new(4);
        fixture.signals(0, 0, 0, 0.4);
        fixture.signals(1, 10, 0, 0.0);
        fixture.signals(2, 5, 0, 0.9);
        (0..4).for_each(|at| fixture.prefix(at, 5.0, 10, 16));
        let expected = [0.7, 0.5, 0.37, f64::NAN];
        assert_scores(&fixture.score(&mut Latency::default()), &expected);
        let weighted = Latency {
            composite_kv_weight: 2.0,
            composite_queue_weight: 2.0,
            composite_prefix_weight: 4.0,
            ..Latency::default()
        };
        assert_scores(&fixture.score(&mut weighted.clone()), &[0.65, 0.5, 0.4, f64::NAN]);
        let none = Latency {
            composite_kv_weight: 0.0,
            composite_queue_weight: 0.0,
            composite_prefix_weight: 0.0,
            ..Latency::default()
        };
        assert_scores(&fixture.score(&mut none.clone()), &[0.6, 1.0, 0.1, f64::NAN]);
        // Where load does not count, its absence does not, either.
        let prefix = Latency { composite_prefix_weight: 1.0, ..none };
        assert_scores(&fixture.score(&mut prefix.clone()), &[0.5; 4]);
        // Empty queues are as good as can be.
        let mut idle = Fixture::new(2);
        (0..2).for_each(|at| idle.signals(at, 0, 0, 0.0));
        assert_scores(&idle.score(&mut Latency::default()), &[0.67, 0.67]);
        // A use that is no number is no data.
        idle.signals(1, 0, 0, f64::NAN);
        assert_scores(&idle.score(&mut Latency::default()), &[0.67, f64::NAN]);
        assert_scores(&Fixture::new(2).score(&mut Latency::default()), &[f64::NAN; 2]);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let bad = [
            Latency { ttft_weight: -0.1, ..Latency::default() },
            Latency { tpot_weight: f64::NAN, ..Latency::default() },
            Latency { composite_kv_weight: f64::INFINITY, ..Latency::default() },
        ];
        for (bad, name) in bad.iter().zip(["ttftWeight", "tpotWeight", "compositeKVWeight"]) {
            assert!(bad.check().unwrap_err().starts_with(name));
        }
        assert!(Latency::default().check().is_ok());
    }

    /// The same, step by step: in time or late; of the late the idle, then by what is late.
    fn slowly(scorer: &Latency, headrooms: &[Option<(f64, f64)>], idle: &[bool]) -> Vec<f64> {
        let all: Vec<usize> = (0..headrooms.len()).collect();
        let of = |at: usize| headrooms[at].unwrap_or((0.0, 0.0));
        let pick = |wanted: &dyn Fn(usize) -> bool| -> Vec<usize> {
            all.iter().copied().filter(|at| wanted(*at)).collect()
        };
        let late = |at: usize| of(at).0 < 0.0 || of(at).1 < 0.0;
        let tries = [
            pick(&|at| !late(at)),
            pick(&|at| late(at) && idle[at]),
            pick(&|at| late(at) && of(at).0 >= 0.0),
            pick(&|at| late(at) && of(at).1 >= 0.0),
            all.clone(),
        ];
        let (nth, bucket) = tries.iter().enumerate().find(|(_, b)| !b.is_empty()).unwrap();
        let least =
            nth > 0 || scorer.headroom_selection_strategy == HeadroomSelectionStrategy::Least;
        let column = |value: &dyn Fn(usize) -> f64| -> Option<Vec<f64>> {
            let mut sorted: Vec<f64> = bucket.iter().map(|at| value(*at)).collect();
            sorted.sort_by(f64::total_cmp);
            let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
            let differ = high - low > RANGE_MIN_S;
            differ.then(|| all.iter().map(|at| (value(*at) - low) / (high - low)).collect())
        };
        let ttft = column(&|at| of(at).0.abs());
        let tpot = column(&|at| of(at).1.abs());
        let sum = scorer.ttft_weight + scorer.tpot_weight;
        let share = if sum > 0.0 { scorer.ttft_weight / sum } else { 1.0 };
        let other = if sum > 0.0 { scorer.tpot_weight / sum } else { 0.0 };
        all.iter()
            .map(|at| {
                if !bucket.contains(at) {
                    return 0.0;
                }
                let x = match (&ttft, &tpot) {
                    (Some(ttft), None) => ttft[*at],
                    (None, Some(tpot)) => tpot[*at],
                    (Some(ttft), Some(tpot)) => share * ttft[*at] + other * tpot[*at],
                    (None, None) => share * 0.5 + other * 0.5,
                };
                let percent = ((if least { 1.0 - x } else { x }) * 100.0) as i64 + 1;
                percent.min(100) as f64 / 100.0
            })
            .collect()
    }

    #[test]
    fn scores_are_those_of_the_steps_one_by_one() {
        for seed in 0..2_000 {
            let mut rng = Rng::seeded(seed);
            let n = 1 + rng.below(6);
            let mut fixture = Fixture::new(n);
            // Few values, so that ties, zeros and equal columns are frequent.
            let value = |rng: &mut Rng| (rng.below(7) as f64 - 3.0) / 4.0;
            let sign = rng.below(3);
            let mut headrooms = vec![None; n];
            let mut idle = vec![false; n];
            for at in 0..n {
                let mut pair = (value(&mut rng), value(&mut rng));
                if sign == 0 {
                    pair = (-pair.0.abs() - 0.25, -pair.1.abs());
                }
                if rng.below(8) > 0 {
                    headrooms[at] = Some(pair);
                    fixture.latency(at, predicted(pair.0, pair.1));
                }
                idle[at] = rng.below(4) == 0;
                fixture.inflight(at, u32::from(!idle[at]), 0);
            }
            if headrooms.iter().all(Option::is_none) {
                continue;
            }
            let weights = [0.0, 0.2, 0.8];
            let mut scorer = if rng.below(2) == 0 { most() } else { Latency::default() };
            scorer.ttft_weight = weights[rng.below(3)];
            scorer.tpot_weight = weights[rng.below(3)];
            let expected = slowly(&scorer, &headrooms, &idle);
            let scores = fixture.score(&mut scorer);
            let same = scores.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-9);
            assert!(same, "seed {seed}: {scores:?} is not {expected:?} {headrooms:?}");
            let mut backwards = fixture.reversed().score(&mut scorer);
            backwards.reverse();
            assert_scores(&backwards, &scores);
        }
    }
}
