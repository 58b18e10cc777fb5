//! The load generator against simulated engines.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::sync::Arc;

use kvroute_lab::load::{self, LoadApi, LoadConfig, StagePlan};
use kvroute_lab::summary::Sample;
use kvroute_lab::workload::{Order, SharedPrefix, Workload};

fn workload() -> Arc<Workload> {
    let spec = SharedPrefix {
        groups: 3,
        users: 4,
        prefix_tokens: 64,
        question_tokens: 32,
        output_tokens: 6,
        order: Order::Cyclic,
        seed: 5,
    };
    Arc::new(Workload::shared_prefix(&spec, &kvroute_tokens::Tokenizer::demo()).unwrap())
}

#[tokio::test]
async fn a_load_on_one_engine_finds_every_shared_prefix() {
    let engine = support::engine(|_| {}).await;
    let url = format!("http://{}", engine.http_addr());
    let mut config = LoadConfig::new(&url, "base", 40.0, 0.3);
    config.stages.push(StagePlan { rate: 40.0, duration_s: 0.6, warmup: false });
    // Not the figures are tested here but that they add up.
    config.lag_max = std::time::Duration::from_secs(60);
    for api in [LoadApi::Completions, LoadApi::ChatCompletions] {
        config.api = api;
        let mut last = load::Progress::default();
        let sample = Sample { waiting: 0.0, kv_usage: 0.25 };
        let probe: load::Probe = Arc::new(move || vec![sample]);
        let report =
            load::run(&config, &workload(), Some(probe), |progress| last = progress).await.unwrap();
        let errors: Vec<_> = report.outcomes.iter().filter_map(|o| o.error.as_ref()).collect();
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!((last.planned, last.sent, last.ended, last.failed), (36, 36, 36, 0));
        assert!(report.outcomes.iter().all(|outcome| outcome.observation.gaps_s.len() == 5));
        let run = report.run("one");
        assert_eq!((run.failed, run.valid, run.stages.len()), (0, true, 2));
        assert_eq!(run.summary.requests, 36);
        assert_eq!(run.summary.kv_usage.max, 0.25);
        // All but the last of six blocks: at least one token of a prompt is always computed.
        assert!(run.stages[1].summary.hit_ratio > 0.8, "{:?}", run.stages[1]);
        assert!(run.summary.output_tokens_per_s > 0.0 && run.summary.ttft_s.p50 > 0.0);
    }
}

#[tokio::test]
async fn failures_are_counted_and_lateness_makes_a_run_invalid() {
    let engine = support::engine(|_| {}).await;
    let url = format!("http://{}", engine.http_addr());
    let mut config = LoadConfig::new(&url, "no-such-model", 50.0, 0.2);
    config.lag_max = std::time::Duration::ZERO;
    let report = load::run(&config, &workload(), None, |_| {}).await.unwrap();
    assert!(report.outcomes.iter().all(|o| o.error.as_ref().unwrap().starts_with("404")));
    let run = report.run("bad");
    assert_eq!((run.failed, run.valid), (10, false));
    assert_eq!(run.summary.hit_ratio, 0.0);
    for url in ["127.0.0.1:1", "https://127.0.0.1:1", ""] {
        let config = LoadConfig { url: url.to_owned(), ..config.clone() };
        assert!(load::run(&config, &workload(), None, |_| {}).await.is_err(), "{url}");
    }
}
