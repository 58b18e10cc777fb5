//! The tables, with llm-d's published figures beside ours.

use std::fmt::Write as _;

use crate::measure::{EXTRA_PIECES, Row};
use crate::{Bench, Transport};

/// llm-d's own figures, `high_qps_small_token_comparison_analysis.md` in
/// `test/perf/config/studyanalysis` of its repository (500 requests/s of 200 tokens, answers of
/// 100, 10 endpoints), by what it was configured with.
struct Published {
    config: &'static str,
    cores: f64,
    p50_ms: f64,
    p95_ms: f64,
}

const LLM_D: [Published; 2] = [
    Published { config: "optimized-baseline", cores: 4.94, p50_ms: 3.59, p95_ms: 78.55 },
    Published { config: "random", cores: 3.62, p50_ms: 0.69, p95_ms: 4.15 },
];
/// Cores of 100 idle endpoints scraped every 50 ms.
const LLM_D_IDLE_CORES: f64 = 7.5;

/// The machine and the work.
pub fn conditions(args: &Bench) -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned();
    let tokenizer = match &args.tokenizer {
        Some(file) => file.display().to_string(),
        None => "the built-in one".to_owned(),
    };
    format!(
        "Machine: {cores} cores of {model}, load average {load} at the start; router, Envoy's part \
         and engines share them.\nTokenizer: {tokenizer}. Open loops: {} requests/s, answers of {} \
         tokens {} ms apart.\n",
        args.rate, args.answer_tokens, args.token_gap_ms
    )
}

/// Everything that was measured, as Markdown.
pub fn tables(args: &Bench, rows: &[Row]) -> String {
    let mut out = String::new();
    published(&mut out, args, rows);
    requests(&mut out, args, rows);
    work(&mut out, args, rows);
    out
}

/// A row whose loops were disturbed says so.
fn name(row: &Row) -> String {
    let tls = if row.transport == Transport::Tls { ", TLS" } else { "" };
    let disturbed = row.open.is_disturbed() || row.silent.is_disturbed();
    let mark = if disturbed { " (disturbed)" } else { "" };
    let Row { config, endpoints, prompt_tokens, .. } = row;
    format!("{config}, {endpoints} endpoints, {prompt_tokens} tokens{tls}{mark}")
}

fn published(out: &mut String, args: &Bench, rows: &[Row]) {
    let is_same = |row: &&Row| {
        (row.endpoints, row.prompt_tokens, row.transport) == (10, 200, Transport::Plain)
            && args.rate == 500.0
            && args.answer_tokens == 100
    };
    let same: Vec<&Row> = rows.iter().filter(is_same).collect();
    line(
        out,
        "\n| 500 requests/s, 200 tokens, 10 endpoints | cores | ratio | decision p50, ms | \
         ratio | p95, ms | ratio |",
    );
    line(out, "|---|---|---|---|---|---|---|");
    for published in &LLM_D {
        let Published { config, cores, p50_ms, p95_ms } = published;
        line(out, &format!("| llm-d, {config} | {cores} | 1 | {p50_ms} | 1 | {p95_ms} | 1 |"));
        for row in same.iter().filter(|row| (row.config == "random") == (*config == "random")) {
            let (own, inside) = (row.open.cores(), row.inside_us);
            let (p50, p95) = (inside.p50 / 1e3, inside.p95 / 1e3);
            line(
                out,
                &format!(
                    "| kvroute, {} | {own:.2} | 1/{:.0} | {p50:.3} | 1/{:.0} | {p95:.3} | 1/{:.0} |",
                    row.config,
                    cores / own,
                    p50_ms / p50,
                    p95_ms / p95
                ),
            );
        }
    }
    line(out, "\n| idle, scraped every 50 ms | cores | ratio to llm-d with 100 |");
    line(out, "|---|---|---|");
    line(out, &format!("| llm-d, 100 endpoints | {LLM_D_IDLE_CORES} | 1 |"));
    let mut told: Vec<(&str, usize)> = Vec::new();
    for row in rows.iter().filter(|row| row.transport == Transport::Plain) {
        let key = (row.config.as_str(), row.endpoints);
        if told.contains(&key) {
            continue;
        }
        told.push(key);
        let (idle, ratio) = (row.idle_cores, LLM_D_IDLE_CORES / row.idle_cores);
        line(
            out,
            &format!(
                "| kvroute, {}, {} endpoints | {idle:.3} | 1/{ratio:.0} |",
                row.config, row.endpoints
            ),
        );
    }
}

fn requests(out: &mut String, args: &Bench, rows: &[Row]) {
    line(
        out,
        &format!(
            "\n| {} requests/s, answers streamed | cores | decided inside p50 / p95 / p99, µs | \
         seen by the caller, µs | the same, one caller, µs | requests late p99, ms | \
         others' cores |",
            args.rate
        ),
    );
    line(out, "|---|---|---|---|---|---|---|");
    for row in rows {
        let three =
            |q: &crate::measure::Quantiles| format!("{:.0} / {:.0} / {:.0}", q.p50, q.p95, q.p99);
        line(
            out,
            &format!(
                "| {} | {:.2} | {} | {} | {} | {:.1} | {:.2} |",
                name(row),
                row.open.cores(),
                three(&row.inside_us),
                three(&row.open.decided_us),
                three(&row.alone.decided_us),
                row.open.late_ms,
                row.open.other_cores
            ),
        );
    }
}

fn work(out: &mut String, args: &Bench, rows: &[Row]) {
    line(
        out,
        "\n| | CPU s per 1,000 requests, answers without bodies | with them | CPU of a \
         streamed token, µs | requests/s per core, closed loop | allocations of a request | KiB of \
         them | allocations of a token | memory, MB |",
    );
    line(out, "|---|---|---|---|---|---|---|---|---|");
    let pieces = f64::from(args.answer_tokens + EXTRA_PIECES);
    for row in rows {
        let (closed, silent, open) = (&row.closed, &row.silent, &row.open);
        let per = |count: u64, requests: f64| count as f64 / requests;
        let allocations = per(closed.allocations.count, closed.requests);
        let with = per(open.allocations.count, open.requests);
        let without = per(silent.allocations.count, silent.requests);
        line(
            out,
            &format!(
                "| {} | {:.3} | {:.3} | {:.2} | {:.0} | {allocations:.0} | {:.1} | {:.1} | {:.0} |",
                name(row),
                closed.cpu_us() / 1e3,
                open.cpu_us() / 1e3,
                (open.cpu_us() - silent.cpu_us()) / pieces,
                1e6 / closed.cpu_us(),
                per(closed.allocations.bytes, closed.requests) / 1024.0,
                (with - without) / pieces,
                row.rss_mb
            ),
        );
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let _ = writeln!(out, "\nLoad average at the end: {}", load.split(' ').next().unwrap_or("?"));
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}
