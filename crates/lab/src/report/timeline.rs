//! The fleet over time, thin enough to be drawn.

use crate::record::{Moment, RunRecord, StageRecord};

use super::text::plain;

/// Points of a line at most.
pub(super) const POINTS_MAX: usize = 600;

/// One run over time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Timeline {
    /// At most [`POINTS_MAX`].
    pub points: Vec<Point>,
    /// In order, warm-up included.
    pub stages: Vec<Span>,
    pub seed: u64,
}

/// A stage on the axis of time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Span {
    pub from_s: f64,
    pub to_s: f64,
    /// Rate; where there is none, its number, warm-up not counted.
    pub label: String,
    pub warmup: bool,
}

/// Some moments in one: means, the largest, shares of sums.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Point {
    pub at_s: f64,
    pub waiting: f64,
    pub waiting_max: f64,
    pub kv_usage: f64,
    /// Nothing was admitted when there is none.
    pub hit_ratio: Option<f64>,
    pub output_tokens_per_s: f64,
}

impl Timeline {
    pub fn of(record: &RunRecord) -> Timeline {
        let moments = &record.timeline;
        let step = match moments[..] {
            [first, second, ..] => second.at_s - first.at_s,
            _ => 0.0,
        };
        let mut before_s = moments.first().map_or(0.0, |first| first.at_s - step);
        let size = moments.len().div_ceil(POINTS_MAX).max(1);
        let mut points = Vec::new();
        for some in moments.chunks(size) {
            let point = Point::of(some, before_s);
            before_s = point.at_s;
            points.push(point);
        }
        Timeline { stages: spans(record, before_s), points, seed: record.seed }
    }
}

fn spans(record: &RunRecord, end_s: f64) -> Vec<Span> {
    let stages = &record.stages;
    let next = stages.iter().skip(1).map(|stage| stage.begin_s).chain([f64::INFINITY]);
    let mut number = 0;
    let mut span = |(stage, to_s): (&StageRecord, f64)| {
        number += usize::from(!stage.warmup);
        Span {
            from_s: stage.begin_s,
            to_s: to_s.min(end_s).max(stage.begin_s),
            label: match stage.rate > 0.0 {
                true => plain(stage.rate),
                false => format!("#{number}"),
            },
            warmup: stage.warmup,
        }
    };
    stages.iter().zip(next).map(&mut span).collect()
}

impl Point {
    fn of(moments: &[Moment], before_s: f64) -> Point {
        let sum = |of: fn(&Moment) -> f64| moments.iter().map(of).sum::<f64>();
        let mean = |of: fn(&Moment) -> f64| sum(of) / moments.len().max(1) as f64;
        let at_s = moments.last().map_or(before_s, |last| last.at_s);
        let prompt = sum(|moment| moment.prompt_tokens as f64);
        let span = at_s - before_s;
        Point {
            at_s,
            waiting: mean(|moment| f64::from(moment.waiting)),
            waiting_max: moments.iter().map(|m| f64::from(m.waiting_max)).fold(0.0, f64::max),
            kv_usage: mean(|moment| f64::from(moment.kv_usage)),
            hit_ratio: (prompt > 0.0).then(|| sum(|m| m.cached_tokens as f64) / prompt),
            output_tokens_per_s: match span > 0.0 {
                true => sum(|moment| moment.output_tokens as f64) / span,
                false => 0.0,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_is_thinned_without_losing_tokens_or_peaks() {
        let moment = |i: u32| Moment {
            at_s: f64::from(i + 1) * 0.5,
            waiting: 1.0,
            waiting_max: if i == 777 { 50.0 } else { 2.0 },
            output_tokens: 100,
            prompt_tokens: if i < 1000 { 10 } else { 0 },
            cached_tokens: if i < 1000 { 5 } else { 0 },
            ..Moment::default()
        };
        let timeline = (0..5000).map(moment).collect();
        let line = Timeline::of(&RunRecord { timeline, ..RunRecord::default() });
        assert!(line.points.len() <= POINTS_MAX && line.points.len() > POINTS_MAX / 2);
        let peak = line.points.iter().map(|p| p.waiting_max).fold(0.0, f64::max);
        assert_eq!(peak, 50.0);
        assert!(line.points.iter().all(|p| (p.output_tokens_per_s - 200.0).abs() < 1e-6));
        assert_eq!((line.points[0].hit_ratio, line.points[500].hit_ratio), (Some(0.5), None));
        assert_eq!(Timeline::of(&RunRecord::default()).points, []);
    }
}
