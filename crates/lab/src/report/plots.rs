//! Which plots stand in a report, and what is in them.

use crate::scenario::{Figures, PublishedStage};
use crate::summary::{Run, Stage};

use super::Report;
use super::plot::{Axis, Mark, Plot, Series, Strip, Strips};
use super::text::{Shown, plain};
use super::timeline::{Point, Timeline};

/// A logarithmic axis beyond this factor between the largest and the smallest value.
const LOG_BEYOND: f64 = 25.0;

/// A run this long has an axis in minutes.
const MINUTES_BEYOND_S: f64 = 600.0;

/// A figure of a stage.
struct Measure {
    title: &'static str,
    unit: &'static str,
    shown: Shown,
    log: bool,
    of: fn(&Stage) -> f64,
    published: fn(&Figures) -> Option<f64>,
}

#[rustfmt::skip]
const MEASURES: [Measure; 8] = {
    use Shown::{Millis, Percent, Seconds, Small, Whole};
    [
        Measure { title: "Time to first token, 90th percentile", unit: "seconds", shown: Seconds,
            log: true, of: |s| s.summary.ttft_s.p90, published: |f| f.ttft_p90_s },
        Measure { title: "Time to first token, mean", unit: "seconds", shown: Seconds,
            log: true, of: |s| s.summary.ttft_s.mean, published: |f| f.ttft_mean_s },
        Measure { title: "Output tokens per second", unit: "tokens per second", shown: Whole,
            log: false, of: |s| s.summary.output_tokens_per_s,
            published: |f| f.output_tokens_per_s },
        Measure { title: "Time per output token, mean",
            unit: "milliseconds", shown: Millis, log: false, of: |s| s.tpot_s.mean,
            published: |f| f.itl_mean_s.map(|itl| itl * 2.0) },
        Measure { title: "Hit ratio: prompt tokens from cache", unit: "%", shown: Percent,
            log: false, of: |s| s.summary.hit_ratio, published: |_| None },
        Measure { title: "Requests waiting per engine, mean at decisions", unit: "requests",
            shown: Small, log: false, of: |s| s.summary.wait_queue.mean,
            published: |f| f.wait_queue_mean },
        Measure { title: "KV cache in use, mean at decisions", unit: "%", shown: Percent,
            log: false, of: |s| s.summary.kv_usage.mean, published: |f| f.kv_usage_mean },
        Measure { title: "Requests refused, rejected or failed", unit: "%", shown: Percent,
            log: false, of: |s| s.failed_ratio, published: |_| None },
    ]
};

/// What runs along the axis of stages.
enum Along {
    /// Rates, distinct and growing.
    Rates,
    /// Positions of stages, named by rate.
    Stages(Vec<(f64, String)>),
    /// There is one stage only: runs beside each other.
    Runs(Vec<(f64, String)>),
}

/// Stage figures of all runs; none when there are no stages.
pub(super) fn by_stage(report: &Report) -> Vec<Plot> {
    let runs = &report.file.runs;
    let Some(along) = Along::of(runs) else { return Vec::new() };
    let lost = runs.iter().flat_map(|run| &run.stages).any(|stage| stage.failed_ratio > 0.0);
    let measures = MEASURES.iter().filter(|m| lost || !m.title.starts_with("Requests refused"));
    measures.map(|measure| measure.plot(runs, &along)).collect()
}

impl Along {
    fn of(runs: &[Run]) -> Option<Along> {
        let stages = &runs.iter().max_by_key(|run| run.stages.len())?.stages;
        let growing = stages.windows(2).all(|pair| pair[0].rate < pair[1].rate);
        let named = |at: usize, stage: &Stage| match stage.rate > 0.0 {
            true => (at as f64 + 1.0, plain(stage.rate)),
            false => (at as f64 + 1.0, format!("#{}", at + 1)),
        };
        match stages[..] {
            [] => None,
            [_] => {
                let names = runs.iter().enumerate().map(|(at, run)| (at as f64, run.name.clone()));
                Some(Along::Runs(names.collect()))
            }
            [ref first, ..] if growing && first.rate > 0.0 => Some(Along::Rates),
            _ => {
                let names = stages.iter().enumerate().map(|(at, stage)| named(at, stage));
                Some(Along::Stages(names.collect()))
            }
        }
    }

    fn axis(&self) -> Axis {
        let spread = |names: &[(f64, String)]| {
            let (first, last) = (names.first(), names.last());
            Some((first.map_or(0.0, |f| f.0) - 0.5, last.map_or(0.0, |l| l.0) + 0.5))
        };
        let (label, range, names) = match self {
            Along::Rates => ("requests per second", None, Vec::new()),
            Along::Stages(names) if names.iter().all(|(_, name)| name.starts_with('#')) => {
                ("stage", spread(names), names.clone())
            }
            Along::Stages(names) => ("stage, by requests per second", spread(names), names.clone()),
            Along::Runs(names) => ("run", spread(names), names.clone()),
        };
        Axis { label: label.to_owned(), range, names, log_beyond: None }
    }

    fn position(&self, run: usize, at: usize, stage: &Stage) -> f64 {
        match self {
            Along::Rates => stage.rate,
            Along::Stages(_) => at as f64 + 1.0,
            Along::Runs(_) => run as f64,
        }
    }
}

impl Measure {
    fn plot(&self, runs: &[Run], along: &Along) -> Plot {
        let percent = self.shown == Shown::Percent;
        let series: Vec<Series> =
            runs.iter().enumerate().map(|(at, run)| self.series(at, run, along)).collect();
        let twice = match self.unit == "milliseconds" && series.iter().any(|s| !s.hollow.is_empty())
        {
            true => " (published: twice its ITL)",
            false => "",
        };
        Plot {
            title: format!("{}{twice}", self.title),
            x: along.axis(),
            y: Axis {
                label: self.unit.to_owned(),
                range: percent.then_some((0.0, 100.0)),
                names: Vec::new(),
                log_beyond: self.log.then_some(LOG_BEYOND),
            },
            series,
        }
    }

    fn series(&self, colour: usize, run: &Run, along: &Along) -> Series {
        let mut series = Series { name: run.name.clone(), colour, ..Series::default() };
        let scale = self.shown.scale();
        let text = |value: f64| format!("{}{}", self.shown.text(value), self.shown.unit());
        for (at, stage) in run.stages.iter().enumerate() {
            let x = along.position(colour, at, stage);
            let value = (self.of)(stage);
            let place = match stage.rate > 0.0 {
                true => format!("{}, {} requests/s", run.name, plain(stage.rate)),
                false => format!("{}, stage {}", run.name, at + 1),
            };
            let seeds = run.seeds.iter().filter_map(|seed| seed.stages.get(at)).map(self.of);
            let (low, high) = seeds.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
            let mut title = format!("{place}: {}", text(value));
            if run.seeds.len() > 1 && low <= high {
                series.band.push((x, low * scale, high * scale));
                title = format!("{title} (seeds: {} to {})", text(low), text(high));
            }
            let label = match along {
                Along::Runs(_) => text(value),
                Along::Rates | Along::Stages(_) => String::new(),
            };
            series.marks.push(Mark { x, y: value * scale, title, label });
            if let Some(value) = published(run, stage).and_then(|p| (self.published)(&p.figures)) {
                let title = format!("{place}, published: {}", text(value));
                series.hollow.push(Mark { x, y: value * scale, title, label: String::new() });
            }
        }
        series
    }
}

/// What was published for the rate of this stage.
fn published<'a>(run: &'a Run, stage: &Stage) -> Option<&'a PublishedStage> {
    let published = run.published.as_ref()?;
    published.stages.iter().find(|p| (p.rate - stage.rate).abs() < 1e-6)
}

/// A line over time: in which unit, and how it comes from a point.
type Curve = fn(&Point) -> Option<f64>;

/// The fleet over time, one picture for each quantity; none where nobody looked.
pub(super) fn over_time(report: &Report) -> Vec<Strips> {
    if report.timelines.iter().all(|timeline| timeline.points.is_empty()) {
        return Vec::new();
    }
    let pictures: [(&str, &str, bool, &[Curve]); 4] = [
        (
            "Requests waiting per engine: mean, and the largest of an engine (faint)",
            "requests",
            false,
            &[|p| Some(p.waiting), |p| Some(p.waiting_max)],
        ),
        ("KV cache in use, mean over engines, %", "%", true, &[|p| Some(p.kv_usage * 100.0)]),
        (
            "Hit ratio: prompt tokens admitted from cache, %",
            "%",
            true,
            &[|p| p.hit_ratio.map(|ratio| ratio * 100.0)],
        ),
        ("Output tokens per second", "tokens/s", false, &[|p| Some(p.output_tokens_per_s)]),
    ];
    let picture = |(title, unit, percent, curves): (&str, &str, bool, &[Curve])| {
        strips(report, title, unit, percent, curves)
    };
    pictures.into_iter().map(picture).collect()
}

fn strips(report: &Report, title: &str, unit: &str, percent: bool, curves: &[Curve]) -> Strips {
    let ends = report.timelines.iter().filter_map(|line| line.points.last());
    let end_s = ends.map(|last| last.at_s).fold(0.0, f64::max);
    let (scale, label) = match end_s > MINUTES_BEYOND_S {
        true => (60.0, "minutes"),
        false => (1.0, "seconds"),
    };
    let strip = |(colour, line): (usize, &Timeline)| Strip {
        name: report.file.runs.get(colour).map_or_else(String::new, |run| run.name.clone()),
        colour,
        lines: curves
            .iter()
            .map(|of| line.points.iter().map(|p| Some((p.at_s / scale, of(p)?))).collect())
            .collect(),
        stages: line.stages.iter().map(|span| stage_mark(span, scale)).collect(),
    };
    Strips {
        title: title.to_owned(),
        x: Axis { label: label.to_owned(), range: Some((0.0, end_s / scale)), ..Axis::default() },
        y: Axis {
            label: unit.to_owned(),
            range: percent.then_some((0.0, 100.0)),
            ..Axis::default()
        },
        strips: report.timelines.iter().enumerate().map(strip).collect(),
    }
}

fn stage_mark(span: &super::timeline::Span, scale: f64) -> (f64, f64, String, String) {
    let kind = if span.warmup { "warm-up" } else { "stage" };
    let unit = if span.label.starts_with('#') { "" } else { " requests/s" };
    let title = format!("{kind} {}{unit}: {:.0} s to {:.0} s", span.label, span.from_s, span.to_s);
    let label = if span.warmup { "warm-up".to_owned() } else { span.label.clone() };
    (span.from_s / scale, span.to_s / scale, label, title)
}
