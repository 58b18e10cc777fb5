//! Reports of made-up records.

use std::collections::BTreeMap;

use kvroute_core::Rng;

use super::*;
use crate::record::{Lag, Moment, RequestRecord, StageRecord};
use crate::scenario::{
    ClientSpec, Figures, FleetSpec, LoadSpec, Published, PublishedStage, WorkloadSpec,
};

const RATES: [f64; 6] = [3.0, 10.0, 20.0, 30.0, 45.0, 60.0];
const IN_FLIGHT_MAX: u32 = 300;

/// The published pattern, small.
pub(crate) fn scenario() -> Scenario {
    let spec: WorkloadSpec = serde_json::from_str(
        r#"{"kind": "shared-prefix", "groups": 150, "users": 5, "prefix_tokens": 6319,
            "question_tokens": 1262, "output_tokens": 1000}"#,
    )
    .unwrap();
    let fleet: FleetSpec = serde_json::from_str(
        r#"{"engines": 8, "profile": "qwen3-32b-tp2-h100", "kv_tokens": 307328, "block_size": 64}"#,
    )
    .unwrap();
    let load: LoadSpec =
        serde_json::from_str(r#"{"stages": [{"rate": 3, "duration_s": 1}]}"#).unwrap();
    let stage = |rate: f64| PublishedStage {
        rate,
        figures: Figures {
            output_tokens_per_s: Some(170.0 * rate.min(40.0)),
            ttft_mean_s: Some(0.3),
            ttft_p90_s: Some(0.5),
            itl_mean_s: Some(0.02),
            ..Figures::default()
        },
    };
    let summary = Figures {
        output_tokens_per_s: Some(5000.0),
        ttft_p90_s: Some(0.5),
        wait_queue_p90: Some(0.0),
        ..Figures::default()
    };
    Scenario {
        name: "made-up".into(),
        description: "Eight engines, 150 shared prefixes: what the report looks like.".into(),
        fleet,
        workload: spec,
        load,
        client: ClientSpec { in_flight_max: IN_FLIGHT_MAX, ..ClientSpec::default() },
        faults: Vec::new(),
        published: vec![Published {
            name: "precise".into(),
            summary,
            stages: RATES.map(stage).to_vec(),
        }],
    }
}

/// A run whose figures look like those of a router that hits this share of prompts; slow ones
/// collapse above 15 requests per second.
pub(crate) fn record(name: &str, seed: u64, hit: f64) -> RunRecord {
    let mut rng = Rng::seeded(seed ^ name.len() as u64);
    let mut made = RunRecord { name: name.into(), seed, ..RunRecord::default() };
    let mut now_s = 0.0;
    let rates = [15.0].into_iter().chain(RATES);
    for (at, rate) in rates.enumerate() {
        let slow = if rate > 15.0 && hit < 0.8 { (1.0 - hit) * rate } else { 0.25 };
        let mut stage = StageRecord {
            rate,
            duration_s: 20.0,
            warmup: at == 0,
            begin_s: now_s,
            ..<_>::default()
        };
        let mut last_s: f64 = now_s;
        for i in 0..(rate * 20.0) as u32 {
            let sent_s = now_s + f64::from(i) / rate;
            let ttft_s =
                slow * (0.5 + rng.next_f64()) * if slow > 1.0 { f64::from(i) / 200.0 } else { 1.0 };
            let total_s = ttft_s + 20.0 + rate / 3.0;
            let cached = if rng.next_f64() < hit { 7000 } else { 0 };
            let ending = if i > 900 { Ending::Refused } else { Ending::Answered };
            last_s = last_s.max(sent_s + total_s);
            stage.gaps_s.add((total_s - ttft_s) / 999.0, 999);
            stage.waiting.add((slow * rng.next_f64()).floor(), 8);
            stage.kv_usage.add((0.3 + rate / 60.0 * rng.next_f64()).min(1.0), 8);
            made.requests.push(RequestRecord {
                stage: at as u32,
                ending,
                sent_s,
                ttft_s: ttft_s as f32,
                total_s: total_s as f32,
                prompt_tokens: 7581,
                cached_tokens: cached,
                output_tokens: 1000,
                counted_tokens: 942.0,
                ..RequestRecord::default()
            });
        }
        moments(&mut made.timeline, &mut rng, (now_s, last_s), slow, hit);
        made.stages.push(stage);
        now_s = last_s + 3.0;
    }
    made
}

fn moments(all: &mut Vec<Moment>, rng: &mut Rng, (from, to): (f64, f64), slow: f64, hit: f64) {
    let (from, to) = ((from * 2.0) as u32, ((to + 3.0) * 2.0) as u32);
    for half in from..to {
        let share = f64::from(half - from) / f64::from(to - from).max(1.0);
        let load = (share * std::f64::consts::PI).sin();
        let sending = share < 0.4;
        all.push(Moment {
            at_s: f64::from(half) / 2.0,
            waiting: (load * slow) as f32,
            waiting_max: (load * slow * (1.0 + rng.next_f64())) as f32,
            kv_usage: (0.2 + 0.8 * load).min(1.0) as f32,
            output_tokens: (load * 4000.0 * (0.9 + 0.2 * rng.next_f64())) as u64,
            prompt_tokens: if sending { 10_000 } else { 0 },
            cached_tokens: if sending {
                (10_000.0 * hit * (0.8 + 0.2 * rng.next_f64())) as u64
            } else {
                0
            },
            ..Moment::default()
        });
    }
}

fn report() -> Report {
    let mut records = Vec::new();
    for (name, hit) in [("precise", 0.94), ("estimated", 0.85), ("random", 0.1), ("load", 0.05)] {
        records.extend((1..=3).map(|seed| record(name, seed, hit)));
    }
    Report::new(&scenario(), &records)
}

/// Every opened element is closed, in order, and no text holds a bare `<`.
fn check_balance(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let end = rest.find('>').expect("a tag ends");
        let tag = &rest[..end];
        assert!(!tag.contains('<'), "{tag}");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or("");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "near {}", &rest[..rest.len().min(80)]);
        } else if !tag.ends_with('/') && !matches!(name, "!DOCTYPE" | "meta" | "br") {
            open.push(name);
        }
        rest = &rest[end + 1..];
    }
    assert_eq!(open, Vec::<&str>::new());
}

#[test]
fn the_page_is_well_formed_and_needs_nothing_else() {
    let html = report().html();
    check_balance(&html);
    for outside in ["http:", "https:", "//", "src=", "href=", "url(", "@import", "<script"] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert_eq!(html.matches("<svg").count(), 8 + 4);
    for number in ["NaN", "inf"] {
        assert!(!html.contains(&format!("\"{number}")) && !html.contains(&format!(" {number} ")));
    }
    assert!(html.contains("class=\"band\"") && html.contains("class=\"hollow\""));
    assert!(html.contains("precise, 60 requests/s, published: 0.500 s"));
    assert!(html.len() < 1 << 20, "{} bytes", html.len());
}

#[test]
fn a_hostile_name_stays_text() {
    let name = "</td><script>alert('&')</script>|\"\n`x`";
    let mut scenario = scenario();
    scenario.name = name.into();
    scenario.description = name.into();
    let report = Report::new(&scenario, &[record(name, 1, 0.5)]);
    let html = report.html();
    check_balance(&html);
    assert!(!html.contains("<script") && html.contains("&lt;script&gt;"));
    let markdown = report.markdown();
    assert!(!markdown.contains("<script") && !markdown.contains("\n`x`"));
    tables_of(&markdown);
    assert_eq!(serde_json::from_str::<SummaryFile>(&report.json()).unwrap(), *report.summary());
}

/// Rows of each table by its title; all rows of a table are equally wide.
fn tables_of(markdown: &str) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let (mut title, mut width) = (String::new(), 0);
    for line in markdown.lines() {
        if let Some(text) = line.strip_prefix("## ") {
            (title, width) = (text.to_owned(), 0);
        } else if line.starts_with('|') {
            let cells = line.replace("\\\\", "").replace("\\|", "").matches('|').count() - 1;
            assert!(width == 0 || width == cells, "{line}");
            width = cells;
            *found.entry(title.clone()).or_default() += 1;
        }
    }
    found.values_mut().for_each(|lines| *lines -= 2);
    found
}

#[test]
fn the_tables_have_a_row_for_each_run_stage_and_figure() {
    let markdown = report().markdown();
    let tables = tables_of(&markdown);
    let expected = [
        ("Aggregated as published", 4),
        ("All requests in one pool", 4),
        ("Beside the published figures", 3),
        ("What was not answered", 1),
        ("Stages beside the published ones: precise", 7),
        ("Stages: precise", 6),
        ("Stages: load", 6),
    ];
    for (title, rows) in expected {
        assert_eq!(tables.get(title), Some(&rows), "{title} in {tables:?}");
    }
    assert_eq!(tables.len(), 6 + 4 - 1);
    assert!(markdown.contains("refused at the client's limit of 300 in flight"));
    // 299 of 1,200 at 60 requests per second.
    assert!(markdown.contains("| 24.9% refused |"));
}

#[test]
fn the_same_records_give_the_same_bytes() {
    let (one, two) = (report(), report());
    assert_eq!(one.json(), two.json());
    assert_eq!(one.html(), two.html());
    assert!(one.json().len() < 200_000);
    let longest = |text: &str| {
        let digits = |word: &str| word.split('.').nth(1).map_or(0, str::len);
        text.split([' ', ',', '\n']).filter(|w| w.parse::<f64>().is_ok()).map(digits).max()
    };
    assert!(longest(&one.json()) <= Some(6), "no more digits than mean something");
}

#[test]
fn the_file_has_the_shape_that_others_read() {
    let json: serde_json::Value = serde_json::from_str(&report().json()).unwrap();
    assert_eq!((&json["seed"], &json["seeds"]), (&1.into(), &3.into()));
    let keys = |value: &serde_json::Value| -> Vec<String> {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort_unstable();
        keys
    };
    let run = &json["runs"][0];
    let expected = ["failed", "name", "pooled", "published", "seeds", "stages", "summary", "valid"];
    assert_eq!(keys(run), expected);
    assert_eq!(keys(&json["runs"][1]).len(), expected.len() - 1, "not published");
    let figures = [
        "hit_ratio",
        "itl_s",
        "kv_usage",
        "output_tokens_per_s",
        "requests",
        "requests_per_s",
        "ttft_s",
        "wait_queue",
    ];
    assert_eq!(keys(&run["summary"]), figures);
    let sorted = |more: &[&'static str]| {
        let mut all = [&figures[..], more].concat();
        all.sort_unstable();
        all
    };
    assert_eq!(keys(&run["pooled"]), sorted(&["failed_ratio"]));
    assert_eq!(keys(&run["stages"][0]), sorted(&["failed_ratio", "rate", "tpot_s"]));
    assert_eq!(keys(&run["summary"]["ttft_s"]), ["mean", "p50", "p90", "p99"]);
    assert_eq!(keys(&run["summary"]["itl_s"]), ["mean", "p50", "p90"]);
    assert_eq!(keys(&run["summary"]["wait_queue"]), ["max", "mean", "p90"]);
    assert_eq!(keys(&run["seeds"][2]), ["pooled", "seed", "stages", "summary"]);
    assert_eq!(run["seeds"].as_array().unwrap().len(), 3);
}

#[test]
fn one_stage_a_trace_and_nothing_at_all_are_reports_too() {
    let mut one = record("only", 1, 0.9);
    one.stages.truncate(2);
    one.lag = Some(Lag { p50: 0.0, p99: 0.4, max: 0.5 });
    let mut trace = record("trace", 1, 0.9);
    trace.stages.iter_mut().for_each(|stage| stage.rate = 0.0);
    trace.timeline.clear();
    for records in [vec![one.clone()], vec![trace], vec![], vec![RunRecord::default()]] {
        let report = Report::new(&scenario(), &records);
        check_balance(&report.html());
        tables_of(&report.markdown());
    }
    let report = Report::new(&scenario(), &[one]);
    assert!(report.html().contains("only is invalid") && report.markdown().contains("0.400 s"));
}

#[test]
fn three_files_are_written() {
    let dir = std::env::temp_dir().join(format!("kvroute-report-{}", std::process::id()));
    let report = report();
    report.write(&dir.join("deep")).unwrap();
    for (file, text) in [
        ("summary.json", report.json()),
        ("report.md", report.markdown()),
        ("report.html", report.html()),
    ] {
        assert_eq!(std::fs::read_to_string(dir.join("deep").join(file)).unwrap(), text);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
