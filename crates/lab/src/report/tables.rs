//! The tables of a report, as text in cells.

use crate::scenario::Figures;
use crate::summary::{Run, Summary, SummaryFile};

use super::Report;
use super::text::{Shown, grouped, plain, relative};

/// A table; the first column names its row.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Table {
    pub title: String,
    pub note: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new(title: &str, note: &str, head: &[&str]) -> Table {
        let head = head.iter().map(|&cell| cell.to_owned()).collect();
        Table { title: title.to_owned(), note: note.to_owned(), head, rows: Vec::new() }
    }
}

const PUBLISHED_NOTE: &str = "As benchmarks of llm-d report: output tokens/s is the plain mean \
     over stages; TTFT and ITL are means of stage figures weighted by the number of answers; \
     requests that were refused count in requests/s and nowhere else; each token has two time \
     stamps, so ITL is about half of the true gap; queue and KV use are sampled at decisions, \
     warm-up included.";

const POOLED_NOTE: &str = "All requests of all stages but the warm-up in one pool. Requests/s are \
     answered ones over the time in which any was on its way; lost ones were refused, rejected or \
     failed; TTFT is of answered requests; TPOT is the true time between two output tokens.";

/// The figures of each run as a benchmark would have published them.
pub(super) fn published_style(file: &SummaryFile) -> Table {
    let head = [
        "run",
        "output tokens/s",
        "requests/s",
        "TTFT mean s",
        "p50",
        "p90",
        "p99",
        "ITL mean ms",
        "p90",
        "waiting mean",
        "p90",
        "max",
        "KV use mean %",
        "p90",
        "max",
        "hit ratio %",
    ];
    let mut table = Table::new("Aggregated as published", PUBLISHED_NOTE, &head);
    table.rows.extend(file.runs.iter().map(|run| {
        let ranged = |shown, of: fn(&Summary) -> f64| {
            with_range(shown, of(&run.summary), run.seeds.iter().map(|seed| of(&seed.summary)))
        };
        let s = &run.summary;
        vec![
            run.name.clone(),
            ranged(Shown::Whole, |s| s.output_tokens_per_s),
            grouped(s.requests_per_s, 2),
            ranged(Shown::Seconds, |s| s.ttft_s.mean),
            Shown::Seconds.text(s.ttft_s.p50),
            ranged(Shown::Seconds, |s| s.ttft_s.p90),
            Shown::Seconds.text(s.ttft_s.p99),
            Shown::Millis.text(s.itl_s.mean),
            Shown::Millis.text(s.itl_s.p90),
            Shown::Small.text(s.wait_queue.mean),
            Shown::Small.text(s.wait_queue.p90),
            Shown::Small.text(s.wait_queue.max),
            Shown::Percent.text(s.kv_usage.mean),
            Shown::Percent.text(s.kv_usage.p90),
            Shown::Percent.text(s.kv_usage.max),
            Shown::Percent.text(s.hit_ratio),
        ]
    }));
    table
}

/// The figures of each run with all requests in one pool.
pub(super) fn pooled(file: &SummaryFile) -> Table {
    let head = [
        "run",
        "requests",
        "lost %",
        "output tokens/s",
        "requests/s",
        "TTFT mean s",
        "p50",
        "p90",
        "p99",
        "TPOT mean ms",
        "p50",
        "p90",
        "waiting mean",
        "p90",
        "KV use mean %",
        "p90",
        "hit ratio %",
    ];
    let mut table = Table::new("All requests in one pool", POOLED_NOTE, &head);
    table.rows.extend(file.runs.iter().map(|run| {
        let ranged = |shown, of: fn(&Summary) -> f64| {
            let seeds = run.seeds.iter().map(|seed| of(&seed.pooled.summary));
            with_range(shown, of(&run.pooled.summary), seeds)
        };
        let s = &run.pooled.summary;
        vec![
            run.name.clone(),
            Shown::Whole.text(s.requests as f64),
            Shown::Percent.text(run.pooled.failed_ratio),
            ranged(Shown::Whole, |s| s.output_tokens_per_s),
            grouped(s.requests_per_s, 2),
            ranged(Shown::Seconds, |s| s.ttft_s.mean),
            Shown::Seconds.text(s.ttft_s.p50),
            ranged(Shown::Seconds, |s| s.ttft_s.p90),
            Shown::Seconds.text(s.ttft_s.p99),
            Shown::Millis.text(s.itl_s.mean),
            Shown::Millis.text(s.itl_s.p50),
            Shown::Millis.text(s.itl_s.p90),
            Shown::Small.text(s.wait_queue.mean),
            Shown::Small.text(s.wait_queue.p90),
            Shown::Percent.text(s.kv_usage.mean),
            Shown::Percent.text(s.kv_usage.p90),
            Shown::Percent.text(s.hit_ratio),
        ]
    }));
    table
}

/// The stages of one run.
pub(super) fn stages(run: &Run) -> Table {
    let head = [
        "stage",
        "rate/s",
        "requests",
        "lost %",
        "output tokens/s",
        "TTFT mean s",
        "p50",
        "p90",
        "p99",
        "TPOT mean ms",
        "ITL mean ms",
        "p90",
        "waiting mean",
        "max",
        "KV use mean %",
        "hit ratio %",
    ];
    let note = "Each stage alone; ITL as a load generator with two stamps per token sees it.";
    let mut table = Table::new(&format!("Stages: {}", run.name), note, &head);
    table.rows.extend(run.stages.iter().enumerate().map(|(at, stage)| {
        let s = &stage.summary;
        vec![
            (at + 1).to_string(),
            rate(stage.rate),
            Shown::Whole.text(s.requests as f64),
            Shown::Percent.text(stage.failed_ratio),
            Shown::Whole.text(s.output_tokens_per_s),
            Shown::Seconds.text(s.ttft_s.mean),
            Shown::Seconds.text(s.ttft_s.p50),
            Shown::Seconds.text(s.ttft_s.p90),
            Shown::Seconds.text(s.ttft_s.p99),
            Shown::Millis.text(stage.tpot_s.mean),
            Shown::Millis.text(s.itl_s.mean),
            Shown::Millis.text(s.itl_s.p90),
            Shown::Small.text(s.wait_queue.mean),
            Shown::Small.text(s.wait_queue.max),
            Shown::Percent.text(s.kv_usage.mean),
            Shown::Percent.text(s.hit_ratio),
        ]
    }));
    table
}

/// What may have been published, and the same figure of ours.
struct Known {
    title: &'static str,
    shown: Shown,
    published: fn(&Figures) -> Option<f64>,
    here: fn(&Summary) -> f64,
}

#[rustfmt::skip]
const KNOWN: [Known; 12] = {
    use Shown::{Millis, Percent, Seconds, Small, Whole};
    [
        Known { title: "output tokens/s", shown: Whole,
            published: |f| f.output_tokens_per_s, here: |s| s.output_tokens_per_s },
        Known { title: "requests/s", shown: Small,
            published: |f| f.requests_per_s, here: |s| s.requests_per_s },
        Known { title: "TTFT mean s", shown: Seconds,
            published: |f| f.ttft_mean_s, here: |s| s.ttft_s.mean },
        Known { title: "TTFT p90 s", shown: Seconds,
            published: |f| f.ttft_p90_s, here: |s| s.ttft_s.p90 },
        Known { title: "ITL mean ms", shown: Millis,
            published: |f| f.itl_mean_s, here: |s| s.itl_s.mean },
        Known { title: "ITL p90 ms", shown: Millis,
            published: |f| f.itl_p90_s, here: |s| s.itl_s.p90 },
        Known { title: "waiting mean", shown: Small,
            published: |f| f.wait_queue_mean, here: |s| s.wait_queue.mean },
        Known { title: "waiting p90", shown: Small,
            published: |f| f.wait_queue_p90, here: |s| s.wait_queue.p90 },
        Known { title: "waiting max", shown: Small,
            published: |f| f.wait_queue_max, here: |s| s.wait_queue.max },
        Known { title: "KV use mean %", shown: Percent,
            published: |f| f.kv_usage_mean, here: |s| s.kv_usage.mean },
        Known { title: "KV use p90 %", shown: Percent,
            published: |f| f.kv_usage_p90, here: |s| s.kv_usage.p90 },
        Known { title: "KV use max %", shown: Percent,
            published: |f| f.kv_usage_max, here: |s| s.kv_usage.max },
    ]
};

/// The summaries beside the published ones; `None` when nothing was published.
pub(super) fn comparison(file: &SummaryFile) -> Option<Table> {
    let runs: Vec<_> =
        file.runs.iter().filter_map(|run| Some((run, run.published.as_ref()?))).collect();
    let mut head = vec!["figure"];
    head.extend(runs.iter().map(|(run, _)| run.name.as_str()));
    let note = "Here / published (relative error); * where the published value lies within the \
         range of the seeds.";
    let mut table = Table::new("Beside the published figures", note, &head);
    for known in &KNOWN {
        let cells = runs.iter().map(|(run, published)| {
            let published = (known.published)(&published.summary)?;
            let seeds = run.seeds.iter().map(|seed| (known.here)(&seed.summary));
            Some(beside(known.shown, (known.here)(&run.summary), published, seeds))
        });
        let cells: Vec<Option<String>> = cells.collect();
        if cells.iter().any(Option::is_some) {
            let mut row = vec![known.title.to_owned()];
            row.extend(cells.into_iter().map(Option::unwrap_or_default));
            table.rows.push(row);
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

/// One run's stages beside the published ones, by rate; `None` when none was published.
pub(super) fn stage_comparison(run: &Run) -> Option<Table> {
    let published = run.published.as_ref()?;
    let pairs: Vec<_> = run
        .stages
        .iter()
        .enumerate()
        .filter_map(|(at, stage)| {
            let same = |p: &&crate::scenario::PublishedStage| (p.rate - stage.rate).abs() < 1e-6;
            Some((at, stage, published.stages.iter().find(same)?))
        })
        .collect();
    let columns: Vec<&Known> = KNOWN
        .iter()
        .filter(|known| pairs.iter().any(|(.., p)| (known.published)(&p.figures).is_some()))
        .collect();
    if columns.is_empty() {
        return None;
    }
    let mut head = vec!["rate/s"];
    head.extend(columns.iter().map(|known| known.title));
    let title = format!("Stages beside the published ones: {}", run.name);
    let note = "Here / published (relative error); * where the published value lies within the \
         range of the seeds.";
    let mut table = Table::new(&title, note, &head);
    let mut errors = vec![Vec::new(); columns.len()];
    for (at, stage, published) in pairs {
        let mut row = vec![rate(stage.rate)];
        for (known, errors) in columns.iter().zip(&mut errors) {
            let here = (known.here)(&stage.summary);
            let of_seed = run.seeds.iter().filter_map(|seed| seed.stages.get(at));
            let seeds = of_seed.map(|stage| (known.here)(&stage.summary));
            row.push(match (known.published)(&published.figures) {
                Some(published) => {
                    errors.extend(relative(here, published));
                    beside(known.shown, here, published, seeds)
                }
                None => String::new(),
            });
        }
        table.rows.push(row);
    }
    let mean = |errors: &Vec<f64>| match errors.len() {
        0 => String::new(),
        n => format!("{:.1}%", errors.iter().map(|e| e.abs()).sum::<f64>() / n as f64),
    };
    table.rows.push([vec!["mean |error|".into()], errors.iter().map(mean).collect()].concat());
    Some(table)
}

/// Which share of each stage's requests was lost, and how; `None` when none was.
pub(super) fn losses(report: &Report) -> Option<Table> {
    let runs = &report.file.runs;
    let lost = |losses: &super::Losses| losses.refused + losses.rejected + losses.failed;
    if report.losses.iter().flatten().all(|stage| lost(stage) == 0) {
        return None;
    }
    let mut head = vec!["stage", "rate/s"];
    head.extend(runs.iter().map(|run| run.name.as_str()));
    let note = format!(
        "Requests refused at the client's limit of {} in flight, rejected by the router, or \
         failed. Figures aggregated as published are of the others only: where requests are \
         refused, a stage is a burst up to the limit and its drain, not a steady state at its \
         rate, and its TTFT says nothing of those that got no answer.",
        grouped(f64::from(report.about.in_flight_max), 0)
    );
    let mut table = Table::new("What was not answered", &note, &head);
    let stages = report.losses.iter().map(Vec::len).max().unwrap_or(0);
    for at in 0..stages {
        let of_runs: Vec<_> = report.losses.iter().map(|stages| stages.get(at)).collect();
        if of_runs.iter().flatten().all(|losses| lost(losses) == 0) {
            continue;
        }
        let of_stage = runs.iter().find_map(|run| run.stages.get(at)).map_or(0.0, |s| s.rate);
        let mut row = vec![(at + 1).to_string(), rate(of_stage)];
        row.extend(of_runs.iter().map(|losses| match losses {
            Some(losses) => {
                let share = |(part, how): (u64, &str)| {
                    let share = part as f64 / losses.requests.max(1) as f64;
                    (part > 0).then(|| format!("{}% {how}", Shown::Percent.text(share)))
                };
                let kinds = [
                    (losses.refused, "refused"),
                    (losses.rejected, "rejected"),
                    (losses.failed, "failed"),
                ];
                let shares: Vec<String> = kinds.into_iter().filter_map(share).collect();
                if shares.is_empty() { "none".to_owned() } else { shares.join(", ") }
            }
            None => String::new(),
        }));
        table.rows.push(row);
    }
    Some(table)
}

fn rate(rate: f64) -> String {
    if rate > 0.0 { plain(rate) } else { "-".to_owned() }
}

/// The mean, and the range when there are several.
fn with_range(shown: Shown, mean: f64, seeds: impl Iterator<Item = f64>) -> String {
    let (mut low, mut high, mut count) = (f64::MAX, f64::MIN, 0);
    for value in seeds {
        (low, high, count) = (low.min(value), high.max(value), count + 1);
    }
    match count {
        0 | 1 => shown.text(mean),
        _ => format!("{} [{} to {}]", shown.text(mean), shown.text(low), shown.text(high)),
    }
}

fn beside(shown: Shown, here: f64, published: f64, seeds: impl Iterator<Item = f64>) -> String {
    let seeds: Vec<f64> = seeds.collect();
    let within = seeds.len() > 1
        && seeds.iter().any(|&seed| seed <= published)
        && seeds.iter().any(|&seed| seed >= published);
    let error = match relative(here, published) {
        // Adding 0 turns a rounded -0 into 0.
        Some(percent) => format!(" ({:+.1}%)", (percent * 10.0).round() / 10.0 + 0.0),
        None => String::new(),
    };
    let mark = if within { " *" } else { "" };
    format!("{} / {}{error}{mark}", shown.text(here), shown.text(published))
}
