//! Known answers by hand, and the published summary from its own stages.

use super::*;
use crate::scenario::Figures;

fn stage(rate: f64, duration_s: f64, warmup: bool) -> StageRecord {
    StageRecord { rate, duration_s, warmup, ..StageRecord::default() }
}

fn answer(stage: u32, sent_s: f64, ttft_s: f32, total_s: f32, cached: u32) -> RequestRecord {
    RequestRecord {
        stage,
        sent_s,
        ttft_s,
        total_s,
        prompt_tokens: 100,
        cached_tokens: cached,
        output_tokens: 10,
        counted_tokens: 9.5,
        ..RequestRecord::default()
    }
}

fn lost(stage: u32, sent_s: f64, ending: Ending) -> RequestRecord {
    RequestRecord { stage, sent_s, ending, prompt_tokens: 100, ..RequestRecord::default() }
}

/// A warm-up, a stage with three answers, and one with one answer and three losses.
fn record(seed: u64) -> RunRecord {
    let mut stages = vec![stage(1.0, 1.0, true), stage(2.0, 2.0, false), stage(4.0, 1.0, false)];
    stages[1].gaps_s.add(0.02, 20);
    stages[1].gaps_s.add(0.04, 7);
    stages[2].gaps_s.add(0.05, 9);
    stages[0].waiting.add(8.0, 1);
    stages[1].waiting.add(0.0, 2);
    stages[2].waiting.add(4.0, 1);
    stages[2].kv_usage.add(0.5, 4);
    let requests = vec![
        answer(0, 0.0, 9.0, 9.0, 0),
        answer(1, 10.0, 0.25, 1.0, 50),
        answer(1, 10.5, 0.5, 1.0, 100),
        answer(1, 11.0, 0.75, 4.0, 60),
        answer(2, 20.0, 1.5, 2.0, 10),
        lost(2, 20.25, Ending::Refused),
        lost(2, 20.5, Ending::Rejected),
        lost(2, 20.75, Ending::Failed),
    ];
    RunRecord { name: "a".into(), seed, stages, requests, ..RunRecord::default() }
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "found {found}, expected {expected}");
}

#[test]
fn the_published_aggregation_by_hand() {
    let record = record(7);
    let run = Run::of(&[&record], None);
    let s = SeedRun::exact(&record).summary;
    assert_eq!(run.summary, s.rounded());
    assert_eq!(s.requests, 7);
    // 28.5 tokens in 5 s, 9.5 in 2 s, and the mean of the two.
    close(s.output_tokens_per_s, (5.7 + 4.75) / 2.0);
    close(s.requests_per_s, 7.0 / 3.0);
    close(s.ttft_s.mean, (0.5 * 3.0 + 1.5) / 4.0);
    close(s.ttft_s.p90, (0.7 * 3.0 + 1.5) / 4.0);
    let gaps: (f64, f64) = (0.68 / (54.0 + 9.0), 0.45 / (18.0 + 3.0));
    close(s.itl_s.mean, (gaps.0 * 3.0 + gaps.1) / 4.0);
    close(s.itl_s.p50, 0.0);
    close(s.itl_s.p90, (0.04 * 3.0 + 0.05) / 4.0);
    // Warm-up included, as every decision was sampled.
    assert_eq!((s.wait_queue.mean, s.wait_queue.p90, s.wait_queue.max), (3.0, 8.0, 8.0));
    assert_eq!(s.kv_usage.mean, 0.5);
    close(s.hit_ratio, 0.55);
    assert_eq!(run.stages.len(), 2);
    let stage = &run.stages[1];
    assert_eq!((stage.rate, stage.summary.requests, stage.failed_ratio), (4.0, 4, 0.75));
    assert_eq!((stage.summary.requests_per_s, stage.summary.ttft_s.p50), (4.0, 1.5));
    close(stage.tpot_s.mean, 0.05);
    assert!(run.valid && run.lag_s.is_none());
    assert_eq!(run.failed, 3);
}

#[test]
fn the_pool_by_hand() {
    let record = record(7);
    let pooled = Run::of(&[&record], None).pooled;
    let s = &pooled.summary;
    assert_eq!((s.requests, pooled.failed_ratio), (7, 0.4286));
    close(s.output_tokens_per_s, 5.43);
    close(s.requests_per_s, 0.5714);
    close(s.ttft_s.mean, 0.75);
    close(s.ttft_s.p50, 0.625);
    close(s.ttft_s.p90, 1.275);
    close(s.itl_s.mean, 0.031389);
    assert_eq!((s.itl_s.p50, s.itl_s.p90), (0.02, 0.05));
    assert_eq!((s.wait_queue.mean, s.wait_queue.max), (1.333, 4.0));
}

#[test]
fn seeds_are_averaged_and_the_largest_kept() {
    let (one, mut two) = (record(7), record(9));
    two.stages[2].waiting.add(12.0, 1);
    two.requests[1].ttft_s = 0.55;
    two.lag = Some(Lag { p50: 0.001, p99: 0.2, max: 0.3 });
    let run = Run::of(&[&one, &two], None);
    let (a, b) = (&run.seeds[0], &run.seeds[1]);
    assert_eq!((a.seed, b.seed), (7, 9));
    assert!(b.summary.ttft_s.mean > a.summary.ttft_s.mean);
    close(run.summary.ttft_s.mean, (a.summary.ttft_s.mean + b.summary.ttft_s.mean) / 2.0);
    close(run.stages[0].summary.ttft_s.mean, 0.55);
    assert_eq!((a.summary.wait_queue.max, run.summary.wait_queue.max), (8.0, 12.0));
    assert_eq!((run.failed, run.valid), (6, false));
    assert_eq!(run.lag_s.unwrap().p99, 0.2);
}

#[test]
fn runs_keep_the_order_given_and_find_what_was_published() {
    let b = RunRecord { name: "b".into(), ..record(7) };
    let figures = Figures { output_tokens_per_s: Some(1.0), ..Figures::default() };
    let published = Published { name: "a".into(), summary: figures, stages: Vec::new() };
    let mut scenario = crate::report::tests::scenario();
    scenario.published = vec![published];
    let file = SummaryFile::of(&scenario, &[b, record(7), record(8)]);
    assert_eq!((file.seed, file.seeds, file.runs.len()), (7, 2, 2));
    assert_eq!((file.runs[0].name.as_str(), file.runs[1].name.as_str()), ("b", "a"));
    assert!(file.runs[0].published.is_none());
    let json = serde_json::to_value(&file).unwrap();
    let shown = &json["runs"][1]["published"]["summary"];
    assert_eq!(*shown, serde_json::json!({"output_tokens_per_s": 1.0}), "no nulls");
    assert_eq!(serde_json::from_value::<SummaryFile>(json).unwrap(), file);
}

#[test]
fn nothing_sent_is_no_figure() {
    let empty = RunRecord::default();
    assert_eq!(Run::of(&[&empty], None).summary, Summary::default());
    assert_eq!(Run::of(&[], None).pooled, Pooled::default());
    let record = RunRecord { stages: vec![stage(0.0, 0.0, false)], ..empty };
    assert_eq!(Run::of(&[&record], None).stages, [Stage::default()]);
    let stray = RunRecord { requests: vec![answer(9, 0.0, f32::NAN, 1.0, 0)], ..record };
    assert_eq!(Run::of(&[&stray], None).summary.requests, 0);
}

#[test]
fn overlapping_stages_do_not_count_time_twice() {
    assert_eq!(covered(vec![(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]), 4.0);
    assert_eq!(covered(Vec::new()), 0.0);
}

/// Scheduler; mean and 90th percentile of each stage; the same of the summary.
type Benchmark = (&'static str, [(f64, f64); 16], f64, f64);

/// Requests of the sixteen stages of the benchmark that llm-d published (Qwen3-32B, 73% of KV
/// capacity) and mean and 90th percentile of TTFT in each.
const SENT: [u64; 16] =
    [60, 200, 300, 760, 748, 750, 750, 735, 1520, 1548, 1518, 1470, 1508, 1485, 1482, 1500];
#[rustfmt::skip]
const STAGES: [Benchmark; 4] = [
    ("precise", [
        (0.291, 0.498), (0.335, 0.6), (0.249, 0.4), (0.363, 0.6),
        (0.3, 0.5), (0.303, 0.583), (0.296, 0.509), (0.275, 0.5),
        (0.269, 0.488), (0.281, 0.5), (0.293, 0.589), (0.311, 0.6),
        (0.288, 0.507), (0.308, 0.6), (0.319, 0.6), (0.283, 0.5),
    ], 0.298, 0.542),
    ("estimated", [
        (0.3, 0.497), (0.271, 0.499), (0.232, 0.4), (0.329, 0.6),
        (0.407, 0.7), (0.37, 0.609), (0.373, 0.708), (2.78, 2.459),
        (13.16, 43.018), (16.941, 43.515), (18.081, 44.93), (19.111, 46.335),
        (21.94, 47.284), (22.327, 50.108), (23.423, 49.93), (24.281, 50.226),
    ], 13.316, 31.083),
    ("random", [
        (0.622, 0.82), (0.826, 1.398), (1.278, 2.299), (25.073, 70.273),
        (28.185, 78.42), (30.689, 82.943), (32.212, 86.182), (34.043, 91.519),
        (54.196, 101.272), (53.247, 101.142), (53.572, 101.265), (56.13, 103.514),
        (56.035, 105.004), (54.844, 104.321), (56.803, 106.816), (57.426, 105.988),
    ], 45.281, 92.551),
    ("load", [
        (0.944, 1.609), (2.241, 4.124), (4.013, 7.002), (29.229, 77.707),
        (28.71, 72.972), (32.534, 85.979), (32.831, 83.806), (33.874, 88.086),
        (53.545, 100.911), (53.802, 101.524), (56.746, 105.884), (55.208, 105.015),
        (58.807, 108.572), (58.467, 110.681), (61.75, 113.278), (58.497, 110.184),
    ], 46.987, 94.865),
];

#[test]
fn the_published_summary_follows_from_its_stages() {
    for (name, stages, mean, p90) in STAGES {
        let stages: Vec<Stage> = stages
            .iter()
            .zip(SENT)
            .map(|(&(mean, p90), requests)| {
                let ttft_s = FirstToken { mean, p90, ..FirstToken::default() };
                let summary = Summary { requests, ttft_s, ..Summary::default() };
                Stage { summary, ..Stage::default() }
            })
            .collect();
        let found = |answered: Vec<u64>| as_published(&stages, &answered, 452.0).ttft_s;
        let capped = found(SENT.map(|count| count.min(1024)).to_vec());
        // Stage values are printed to a millisecond, so the sum is known to half of one.
        assert!((capped.mean - mean).abs() < 0.001, "{name}: {capped:?}");
        assert!((capped.p90 - p90).abs() < 0.001, "{name}: {capped:?}");
        if name != "precise" {
            assert!((found(SENT.to_vec()).mean - mean).abs() > 0.2, "{name}: the limit matters");
        }
    }
}
