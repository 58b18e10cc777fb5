//! The figures as Markdown tables, ratios to the pass-through first.

use std::fmt::Write;

use serde::Serialize;

use crate::memory;
use crate::open_loop;
use crate::saturate;

/// Under which load.
#[derive(Debug, Serialize)]
pub struct Conditions {
    pub rate: f64,
    pub seconds: u64,
    pub warmup_seconds: u64,
    pub engines: u32,
    pub prompts: usize,
    pub prompt_bytes: f64,
    pub prompt_tokens: f64,
    pub output_tokens: u32,
}

/// One router.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    /// By the gap between tokens, milliseconds.
    pub open: Vec<(u64, open_loop::Measured)>,
    pub closed: Vec<saturate::Measured>,
    pub paced: Vec<saturate::Measured>,
    pub idle: Option<memory::Idle>,
    pub long_prompts: Option<memory::LongPrompts>,
    /// Why the rest is missing.
    pub broken: Option<String>,
}

impl Row {
    pub fn new(name: String) -> Row {
        Row {
            name,
            open: Vec::new(),
            closed: Vec::new(),
            paced: Vec::new(),
            idle: None,
            long_prompts: None,
            broken: None,
        }
    }

    fn loops(&self) -> impl Iterator<Item = &saturate::Measured> {
        self.closed.iter().chain(&self.paced)
    }

    /// By the name of its shape.
    fn measured(&self, shape: &str) -> Option<&saturate::Measured> {
        self.loops().find(|measured| measured.shape == shape)
    }

    fn open(&self, gap_ms: u64) -> Option<&open_loop::Measured> {
        self.open.iter().find(|(gap, _)| *gap == gap_ms).map(|(_, measured)| measured)
    }
}

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    pub conditions: Conditions,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(conditions: Conditions) -> Report {
        Report { conditions, rows: Vec::new() }
    }

    /// No request failed and no generator was late.
    pub fn all_good(&self) -> bool {
        self.rows.iter().all(|row| {
            row.broken.is_none()
                && row.open.iter().all(|(_, open)| open.valid && open.errors.is_empty())
                && row.loops().all(|measured| measured.errors == 0)
                && row.long_prompts.as_ref().is_none_or(|seen| seen.errors == 0)
        })
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let c = &self.conditions;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{} engines; {} prompts of {:.0} bytes ({:.0} tokens); answers of {} tokens.\n",
            c.engines, c.prompts, c.prompt_bytes, c.prompt_tokens, c.output_tokens
        );
        let gaps: Vec<u64> = self.rows.first().map(gaps).unwrap_or_default();
        for gap in gaps {
            self.open(gap, &mut text);
            self.memory(gap, &mut text);
        }
        let shapes = saturate::Shape::CLOSED.into_iter().chain([saturate::Shape::Paced]);
        for shape in shapes {
            self.closed(shape.name(), &mut text);
        }
        self.idle(&mut text);
        self.long_prompts(&mut text);
        self.errors(&mut text);
        text
    }

    fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    fn open(&self, gap_ms: u64, text: &mut String) {
        let c = &self.conditions;
        let _ = writeln!(
            text,
            "### {} requests/s for {} s, tokens {gap_ms} ms apart\n\n\
             | target | CPU, ratio to pass-through | CPU s per 1,000 requests | CPU ms/s idle | \
             added to first token, p50 / p99 ms | added to whole answer, p50 / p99 ms | \
             errors of requests | hit ratio | cores used by others |\n\
             |---|---|---|---|---|---|---|---|---|",
            c.rate, c.seconds
        );
        let base = |name: &str| self.row(name).and_then(|row| row.open(gap_ms));
        let direct = base("direct").filter(|open| open.valid);
        let floor = base("passthrough").filter(|open| open.valid);
        for row in &self.rows {
            let Some(open) = row.open(gap_ms) else { continue };
            if !open.valid {
                let _ = writeln!(
                    text,
                    "| {} | the generator was late (p99 {:.1} ms): no figures |",
                    row.name, open.lag_p99_ms
                );
                continue;
            }
            let added = |of: fn(&open_loop::Measured) -> open_loop::Latency| match direct {
                Some(direct) if row.name != "direct" => {
                    let (with, without) = (of(open), of(direct));
                    let (p50, p99) = (with.p50_ms - without.p50_ms, with.p99_ms - without.p99_ms);
                    format!("{p50:.2} / {p99:.2}")
                }
                _ => format!("({:.2} / {:.2})", of(open).p50_ms, of(open).p99_ms),
            };
            let failed: u64 = open.errors.values().sum();
            let _ = writeln!(
                text,
                "| {} | {} | {:.3} | {:.1} | {} | {} | {failed} of {} | {:.3} | {:.2} |",
                row.name,
                ratio(open.cpu_s_per_1000, floor.map(|floor| floor.cpu_s_per_1000)),
                open.cpu_s_per_1000,
                open.idle_cpu_ms_per_s,
                added(|open| open.first_token),
                added(|open| open.whole_answer),
                open.requests,
                open.hit_ratio,
                open.other_cores,
            );
        }
        if let Some(direct) = direct {
            let _ = writeln!(
                text,
                "\nIn brackets: without a router, not added. Engines: {:.3} CPU s per 1,000 \
                 requests, load generator: {:.3}.",
                direct.engines_cpu_s_per_1000, direct.generator_cpu_s_per_1000
            );
        }
        text.push('\n');
    }

    fn memory(&self, gap_ms: u64, text: &mut String) {
        text.push_str(
            "| target | RSS MB: before the load | start | end | max | slope MB/min | \
             slope of the second half |\n|---|---|---|---|---|---|---|\n",
        );
        for row in self.rows.iter().filter(|row| row.name != "direct") {
            let Some(open) = row.open(gap_ms).filter(|open| open.valid) else { continue };
            let memory = &open.memory;
            let _ = writeln!(
                text,
                "| {} | {:.1} | {:.1} | {:.1} | {:.1} | {:+.2} | {:+.2} |",
                row.name,
                memory.idle_mb,
                memory.start_mb,
                memory.end_mb,
                memory.max_mb,
                memory.slope_mb_per_min,
                memory.second_half_slope_mb_per_min,
            );
        }
        text.push('\n');
    }

    /// Nothing where it was not measured.
    fn closed(&self, shape: &str, text: &mut String) {
        let rows: Vec<_> =
            self.rows.iter().filter_map(|row| Some((row, row.measured(shape)?))).collect();
        if rows.is_empty() {
            return;
        }
        let _ = writeln!(
            text,
            "### {shape}: CPU\n\n| target | CPU, ratio to pass-through | \
             CPU s per 1,000 requests | requests/s per core | requests/s seen | RSS MB after | \
             engines' CPU s per 1,000 |\n|---|---|---|---|---|---|---|",
        );
        let floor = self.row("passthrough").and_then(|row| row.measured(shape));
        let floor = floor.map(|floor| floor.cpu_us);
        for (row, measured) in rows {
            let per_core = match measured.cpu_us > 0.0 {
                true => format!("{:.0}", 1e6 / measured.cpu_us),
                false => "-".to_owned(),
            };
            let _ = writeln!(
                text,
                "| {} | {} | {:.4} | {per_core} | {:.0} | {:.0} | {:.4} |",
                row.name,
                ratio(measured.cpu_us, floor),
                measured.cpu_us / 1000.0,
                measured.requests_per_s,
                measured.rss_mb,
                measured.engines_cpu_us / 1000.0,
            );
            if let Some(picker_us) = measured.picker_cpu_us {
                let _ = writeln!(
                    text,
                    "| {}, of it kvroute | {} | {:.4} | {:.0} | | | |",
                    row.name,
                    ratio(picker_us, floor),
                    picker_us / 1000.0,
                    1e6 / picker_us.max(1e-9),
                );
            }
        }
        text.push('\n');
    }

    fn idle(&self, text: &mut String) {
        let mut rows = self.rows.iter().filter_map(|row| Some((row, row.idle?))).peekable();
        let Some((_, memory::Idle { engines, .. })) = rows.peek() else { return };
        let _ = writeln!(
            text,
            "### No requests, {engines} engines\n\n| target | CPU ms/s | RSS MB |\n|---|---|---|"
        );
        for (row, idle) in rows {
            let _ =
                writeln!(text, "| {} | {:.1} | {:.0} |", row.name, idle.cpu_ms_per_s, idle.rss_mb);
        }
        text.push('\n');
    }

    fn long_prompts(&self, text: &mut String) {
        let mut rows =
            self.rows.iter().filter_map(|row| Some((row, row.long_prompts.as_ref()?))).peekable();
        let Some((_, first)) = rows.peek() else { return };
        let _ = writeln!(
            text,
            "### Prompts of {:.0} tokens ({:.1} MB), the same four in each round, RSS MB\n\n\
             | target | before | largest | after each round | best answer, ms | errors |\n\
             |---|---|---|---|---|---|",
            first.prompt_tokens,
            first.prompt_bytes / 1e6
        );
        for (row, seen) in rows {
            let after: Vec<String> = seen.after_mb.iter().map(|mb| format!("{mb:.0}")).collect();
            let _ = writeln!(
                text,
                "| {} | {:.0} | {:.0} | {} | {:.0} | {} |",
                row.name,
                seen.before_mb,
                seen.max_mb,
                after.join(" / "),
                seen.answer_ms,
                seen.errors
            );
        }
        text.push('\n');
    }

    fn errors(&self, text: &mut String) {
        for row in &self.rows {
            if let Some(reason) = &row.broken {
                let _ = writeln!(text, "{}: {reason}", row.name);
            }
            for (gap_ms, open) in &row.open {
                for (error, count) in &open.errors {
                    let _ = writeln!(text, "{} at {gap_ms} ms: {count} x {error}", row.name);
                }
            }
            for measured in row.loops().filter(|measured| measured.errors > 0) {
                let (shape, count) = (measured.shape, measured.errors);
                let _ = writeln!(text, "{}, closed loop, {shape}: {count} errors", row.name);
            }
        }
    }
}

fn gaps(row: &Row) -> Vec<u64> {
    row.open.iter().map(|(gap, _)| *gap).collect()
}

fn ratio(value: f64, base: Option<f64>) -> String {
    match base {
        Some(base) if base > 0.0 => format!("{:.2}", value / base),
        _ => "-".to_owned(),
    }
}
