//! The load generator against simulated engines.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvroute_lab::engine::EngineHandle;
use kvroute_lab::load::{
    self, Load, LoadApi, LoadConfig, LoadError, Look, Measured, PromptForm, Scraper,
};
use kvroute_lab::record::{Ending, RequestRecord};
use kvroute_lab::scenario::Scenario;
use kvroute_tokens::Tokenizer;

/// 3 groups of 4 users, 64 + 32 tokens; each prompt once in the first stage, twice in the second.
fn scenario(load: &str) -> Scenario {
    let text = format!(
        "
name: test
fleet: {{engines: 1, profile: tiny, kv_tokens: 65536, block_size: 16}}
workload: {{kind: shared-prefix, groups: 3, users: 4, prefix_tokens: 64, question_tokens: 32,
  output_tokens: 6}}
{load}"
    );
    Scenario::parse(&text, "test").unwrap()
}

const TWO_STAGES: &str = "
load:
  arrivals: even
  stages: [{rate: 40, duration_s: 0.3}, {rate: 40, duration_s: 0.6}]
";

fn config(engine: &EngineHandle) -> LoadConfig {
    let url = format!("http://{}", engine.http_addr());
    // Not the lateness of a busy machine is tested here.
    LoadConfig { lag_p99_max_s: 60.0, ..LoadConfig::new("one", &url, "base") }
}

async fn run(config: LoadConfig, scenario: &Scenario) -> Measured {
    let load = Load::new(config, scenario, Path::new("."), &Tokenizer::demo()).unwrap();
    load.run(None, std::future::pending(), |_| {}).await
}

fn count(measured: &Measured, keep: impl Fn(&RequestRecord) -> bool) -> usize {
    measured.record.requests.iter().filter(|request| keep(request)).count()
}

#[tokio::test]
async fn prefixes_hit_the_cache_as_the_scenario_says() {
    let scenario = scenario(TWO_STAGES);
    for (api, form) in [
        (LoadApi::Completions, PromptForm::Text),
        (LoadApi::Completions, PromptForm::Ids),
        (LoadApi::ChatCompletions, PromptForm::Text),
    ] {
        let engine = support::engine(|_| {}).await;
        let mut last = load::Progress::default();
        let looks = Arc::new(|| vec![Look { waiting: 2.0, running: 1.0, kv_usage: 0.25 }]);
        let config = LoadConfig { api, form, speed: 4.0, ..config(&engine) };
        let load = Load::new(config, &scenario, Path::new("."), &Tokenizer::demo()).unwrap();
        let progress = |progress| last = progress;
        let measured = load.run(Some(looks), std::future::pending(), progress).await;
        assert!(measured.failures.is_empty(), "{:?}", measured.failures);
        assert_eq!((last.planned, last.sent, last.ended, last.failed), (36, 36, 36, 0));
        let record = &measured.record;
        assert!(measured.valid && !measured.partial && record.lag.is_some());
        assert_eq!((measured.without_usage, measured.without_cached), (0, 0));
        let whole = |r: &RequestRecord| {
            (r.prompt_tokens, r.output_tokens, r.ending) == (96, 6, Ending::Answered)
        };
        assert_eq!(count(&measured, whole), 36, "{:?}", record.requests[0]);
        assert!(record.requests.iter().all(|r| r.ttft_s > 0.0 && r.total_s >= r.ttft_s));
        // At four times the speed; the second stage begins when the first is answered.
        assert_eq!((record.stages[1].rate, record.stages[1].duration_s), (160.0, 0.15));
        assert!(record.stages[1].begin_s > 0.5);
        let gaps = [record.stages[0].gaps_s.count(), record.stages[1].gaps_s.count()];
        assert_eq!(gaps, [12 * 5, 24 * 5]);
        // In the second stage every prompt is cached, but for its last block: at least one token
        // is always computed. In the first, 9 of 12 find the prefix of their group.
        let second = |r: &RequestRecord| r.stage == 1 && r.cached_tokens == 80;
        assert_eq!(count(&measured, second), 24, "{api:?} {form:?}");
        let first = |r: &RequestRecord| r.stage == 0 && (48..80).contains(&r.cached_tokens);
        assert!(count(&measured, first) >= 6, "{api:?} {form:?}");
        let looked = |stage: usize| record.stages[stage].waiting.count();
        assert_eq!((looked(0), looked(1)), (12, 24), "at each request");
        assert_eq!(record.stages[1].kv_usage.max(), 0.25);
        assert!(record.timeline.iter().any(|moment| moment.waiting_max == 2.0));
    }
}

#[tokio::test]
async fn refused_failed_and_rejected_requests_are_counted_by_kind() {
    let engine = support::engine(|_| {}).await;
    // Ten at once, three of which may be in flight.
    let capped = scenario(
        "
load: {arrivals: even, stages: [{rate: 1000, duration_s: 0.01}]}
client: {in_flight_max: 3}
",
    );
    let fast = LoadConfig { speed: 1000.0, ..config(&engine) };
    let measured = run(fast, &capped).await;
    let refused = count(&measured, |r| r.ending == Ending::Refused);
    assert!((1..=7).contains(&refused), "{refused}");
    assert_eq!(measured.failures["too many in flight"].count, refused as u64);
    assert_eq!(count(&measured, |r| r.ending == Ending::Answered), 10 - refused);

    let open = scenario("load: {arrivals: even, stages: [{rate: 100, duration_s: 0.05}]}");
    let unknown = LoadConfig { model: "no-such-model".to_owned(), ..config(&engine) };
    let measured = run(unknown, &open).await;
    assert_eq!(measured.failures["status 404"].count, 5);
    assert!(measured.failures["status 404"].example.contains("no-such-model"));

    // A step takes longer than the client waits.
    engine.set_slowdown(1e6);
    let impatient = LoadConfig { timeout: Duration::from_millis(50), ..config(&engine) };
    let measured = run(impatient, &open).await;
    assert_eq!(measured.failures["timeout"].count, 5);

    let gone = config(&engine);
    engine.kill().await;
    let measured = run(gone, &open).await;
    assert_eq!(measured.failures["cannot connect"].count, 5);
    assert_eq!(count(&measured, |r| r.ending == Ending::Failed && r.ttft_s == 0.0), 5);
}

#[tokio::test]
async fn a_closed_loop_keeps_its_clients_busy() {
    let engine = support::engine(|_| {}).await;
    let closed = scenario(
        "
load: {arrivals: closed, stages: [{duration_s: 0.3}]}
client: {in_flight_max: 3}
",
    );
    let mut in_flight_max = 0;
    let load = Load::new(config(&engine), &closed, Path::new("."), &Tokenizer::demo()).unwrap();
    let progress = |p: load::Progress| in_flight_max = in_flight_max.max(p.sent - p.ended);
    let measured = load.run(None, std::future::pending(), progress).await;
    assert!(measured.failures.is_empty(), "{:?}", measured.failures);
    assert!(measured.record.requests.len() > 6, "{}", measured.record.requests.len());
    assert_eq!(in_flight_max, 3);
    assert_eq!(count(&measured, |r| r.ending == Ending::Answered), measured.record.requests.len());
}

#[tokio::test]
async fn a_session_repeats_what_was_really_answered() {
    let text = "
name: sessions
fleet: {engines: 1, profile: tiny, kv_tokens: 65536, block_size: 16}
workload: {kind: agentic, groups: 1, prefix_tokens: 64, question_tokens: 32, output_tokens: 32,
  turns: 3, think_s: 0.001}
load: {arrivals: even, drain_between_stages: false, stages: [{rate: 20, duration_s: 0.2}]}
";
    let scenario = Scenario::parse(text, "test").unwrap();
    for (api, form) in [
        (LoadApi::Completions, PromptForm::Text),
        (LoadApi::Completions, PromptForm::Ids),
        (LoadApi::ChatCompletions, PromptForm::Text),
    ] {
        let engine = support::engine(|_| {}).await;
        let measured = run(LoadConfig { api, form, ..config(&engine) }, &scenario).await;
        assert!(measured.failures.is_empty(), "{:?}", measured.failures);
        assert_eq!(measured.record.requests.len(), 4 * 3);
        // A later turn finds the prompt before it and the answer to it; another answer than the
        // real one would end the match where the answer begins. The last token of an answer is
        // never computed, and a block must be full.
        for (turn, least) in [(1, 64 + 64 - 16), (2, 64 + 2 * 64 - 16)] {
            let tokens = 64 + (turn + 1) * 32 + turn * 32;
            let of_turn =
                |r: &RequestRecord| r.prompt_tokens >= tokens && r.prompt_tokens < tokens + 40;
            assert_eq!(count(&measured, of_turn), 4, "{api:?} {form:?} {turn}");
            let found = |r: &RequestRecord| of_turn(r) && r.cached_tokens >= least;
            assert_eq!(count(&measured, found), 4, "{api:?} {form:?} {turn}: {measured:?}");
        }
    }
}

#[tokio::test]
async fn engines_are_scraped_and_a_dead_one_says_nothing() {
    let engine = support::engine(|_| {}).await;
    let urls = [format!("http://{}", engine.http_addr()), "http://127.0.0.1:1".to_owned()];
    let scraper = Scraper::start(&urls, Duration::from_millis(1)).unwrap();
    let looks = scraper.looks();
    let seen = async {
        while looks().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), seen).await.unwrap();
    assert_eq!(looks(), [Look::default()]);
    assert!(Scraper::start(&["x".to_owned()], Duration::ZERO).is_err());
}

#[tokio::test]
async fn the_first_model_of_a_server_is_found() {
    let engine = support::engine(|_| {}).await;
    let url = format!("http://{}/", engine.http_addr());
    assert_eq!(load::served_model(&url, Some("key")).await.unwrap(), "base");
    engine.kill().await;
    assert!(matches!(load::served_model(&url, None).await, Err(LoadError::NoModel { .. })));
}

#[test]
fn loads_that_cannot_be_sent_are_refused() {
    let scenario = scenario(TWO_STAGES);
    let good = LoadConfig::new("one", "http://127.0.0.1:1", "base");
    let refused = |config: LoadConfig| {
        let load = Load::new(config, &scenario, Path::new("."), &Tokenizer::demo());
        load.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(refused(good.clone()), "");
    for url in ["127.0.0.1:1", "https://127.0.0.1:1", ""] {
        assert!(refused(LoadConfig { url: url.to_owned(), ..good.clone() }).contains("http://"));
    }
    assert!(refused(LoadConfig { speed: 0.0, ..good.clone() }).contains("speed"));
    let key = Some("a\nb".to_owned());
    assert!(refused(LoadConfig { api_key: key, ..good }).contains("key"));
}
