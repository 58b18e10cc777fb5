//! What the router learns of engines: load, models, KV events, and which endpoints there are.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvroute_core::settings::Settings;
use kvroute_router::{EventsSource, RouterHandle, Tokenizers};
use support::events::*;
use support::*;

async fn events_router(engine: &Mock, events: EventsSource, settings: Settings) -> RouterHandle {
    let mut config = config(&[engine.addr], settings);
    config.events = events.into();
    kvroute_router::start(config).await.unwrap()
}

#[tokio::test]
async fn events_are_followed_through_loss_garbage_and_restart() {
    for with_topic in [true, false] {
        let engine = Mock::start().await;
        let mut publisher = Publisher::start(free_port().await, with_topic).await;
        *engine.state.event_sources.lock() = Some(publisher.sources());
        publisher.publish(&stored(1), true, false).await;
        let limits = Settings { replay_cooldown_ms: 50, ..settings() };
        let router = events_router(&engine, EventsSource::default(), limits).await;
        caught_up(&router, 1).await;

        for hash in 2..5 {
            publisher.publish(&stored(hash), false, false).await;
        }
        caught_up(&router, 4).await;
        // Lost on the way, then unreadable: the next one shows the hole, a replay fills it.
        for (hash, lost, garbled) in [(5, true, false), (6, false, false), (7, false, true)] {
            publisher.publish(&stored(hash), lost, garbled).await;
        }
        publisher.publish(&stored(8), false, false).await;
        caught_up(&router, 8).await;
        let endpoint = engine.addr;
        let series = format!("kvroute_events_bad_total{{endpoint=\"{endpoint}\"}}");
        assert_eq!(metric(&router, &series).await, 1.0);
        let series = format!("kvroute_stream_replays_total{{endpoint=\"{endpoint}\"}}");
        assert!(metric(&router, &series).await >= 2.0);
        let series = format!("kvroute_stream_state{{endpoint=\"{endpoint}\",state=\"live\"}}");
        assert_eq!(metric(&router, &series).await, 1.0);
        let view = admin_json(&router, "/index").await;
        assert_eq!(view["endpoints"][0]["blocks_by_tier"]["gpu"], 8, "{view}");
        assert_eq!(view["endpoints"][0]["block_size"], 16);
        let stream = &view["endpoints"][0]["stream"];
        assert!(stream["subscription"]["connected"].is_string(), "{view}");
        assert_eq!(stream["reconnects"], 0, "the first connection is none: {view}");
        assert!(view["counters"]["scrapes_failed"].is_u64(), "{view}");
        assert_eq!(view["endpoints"][0]["blocks"]["resident"], 8, "{view}");
        let bare = [&view["counters"]["decisions"], &view["counters"]["candidates"]];
        assert_eq!(bare, [&serde_json::Value::Null; 2], "numbers have names");
        assert!(view["endpoints"][0]["blocks"]["by_tier"].is_null(), "numbers have names");

        // A new process at the same place knows nothing of the old blocks.
        let events = publisher.events;
        drop(publisher);
        let mut publisher = Publisher::start(events, with_topic).await;
        *engine.state.event_sources.lock() = Some(publisher.sources());
        publisher.publish(&stored(20), true, false).await;
        caught_up(&router, 1).await;
        publisher.publish(&stored(21), false, false).await;
        caught_up(&router, 2).await;
        works(&router).await;
    }
}

#[tokio::test]
async fn a_cache_reset_through_the_router_is_known_at_once() {
    let engine = Mock::start().await;
    let mut publisher = Publisher::start(free_port().await, true).await;
    *engine.state.event_sources.lock() = Some(publisher.sources());
    publisher.publish(&stored(1), true, false).await;
    let router = events_router(&engine, EventsSource::default(), settings()).await;
    caught_up(&router, 1).await;
    engine.script(Script::Answer(500, "{}".to_owned()));
    send(router.http_addr(), post("/reset_prefix_cache", "")).await;
    assert_eq!(resident(&router), 1, "a reset that failed is none");
    engine.script(Script::Answer(200, "{}".to_owned()));
    send(router.http_addr(), post("/reset_prefix_cache?x=1", "")).await;
    assert_eq!(resident(&router), 0);
}

#[tokio::test]
async fn a_publisher_that_is_missing_is_named_and_found_later() {
    let engine = Mock::start().await;
    let nobody = EventsSource::Ask { events: free_port().await.port(), replay: None };
    let router = events_router(&engine, nobody, settings()).await;
    let reason = |view: &serde_json::Value| {
        view["endpoints"][0]["stream"]["subscription"]["failed"].as_str().map(str::to_owned)
    };
    let until = tokio::time::Instant::now() + LONG;
    loop {
        let view = admin_json(&router, "/index").await;
        if let Some(reason) = reason(&view) {
            assert!(reason.contains("answered with 404"), "{reason}");
            assert!(reason.contains("--kv-events-port"), "{reason}");
            break;
        }
        assert!(tokio::time::Instant::now() < until, "{view}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut publisher = Publisher::start(free_port().await, true).await;
    publisher.publish(&stored(1), true, false).await;
    *engine.state.event_sources.lock() = Some(publisher.sources());
    caught_up(&router, 1).await;
}

#[tokio::test]
async fn an_engine_that_does_not_know_the_question_is_found_at_the_default_port() {
    let engine = Mock::start().await;
    let mut publisher = Publisher::start(free_port().await, true).await;
    publisher.publish(&stored(1), true, false).await;
    let port = publisher.events.port();
    let guess = EventsSource::Ask { events: port, replay: Some(publisher.replay.port()) };
    let router = events_router(&engine, guess.clone(), settings()).await;
    caught_up(&router, 1).await;
    let view = admin_json(&router, "/index").await;
    let place = view["endpoints"][0]["stream"]["subscription"]["connected"].to_string();
    for words in [&format!("127.0.0.1:{port}"), "default port", "answered with 404"] {
        assert!(place.contains(words), "{words}: {place}");
    }

    // Whose events are these, when two engines of the host could publish them?
    let other = Mock::start().await;
    let mut config = config(&[engine.addr, other.addr], settings());
    config.events = guess.into();
    let router = kvroute_router::start(config).await.unwrap();
    let until = tokio::time::Instant::now() + LONG;
    loop {
        let view = admin_json(&router, "/index").await;
        let failed = |at: usize| {
            let subscription = &view["endpoints"][at]["stream"]["subscription"];
            subscription["failed"].to_string().contains("nobody knows whose events")
        };
        if failed(0) && failed(1) {
            break;
        }
        assert!(tokio::time::Instant::now() < until, "{view}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn something_else_at_the_event_port_does_no_harm() {
    let engine = Mock::start().await;
    let other = Mock::start().await;
    let events = EventsSource::Ports { events: other.addr.port(), replay: None };
    let limits = Settings { connect_timeout_ms: 200, ..settings() };
    let router = events_router(&engine, events, limits).await;
    let until = tokio::time::Instant::now() + LONG;
    loop {
        let view = admin_json(&router, "/index").await.to_string();
        if view.contains("no answer within 200ms; is this a KV event port?") {
            break;
        }
        assert!(tokio::time::Instant::now() < until, "{view}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    works(&router).await;
}

#[tokio::test]
async fn a_busy_engine_without_events_is_connected_to_again() {
    let engine = Mock::start().await;
    let busy = METRICS.replace("running{engine=\"0\"} 0", "running{engine=\"0\"} 3");
    *engine.state.metrics.lock() = Some(busy);
    let publisher = Publisher::start(free_port().await, true).await;
    *engine.state.event_sources.lock() = Some(publisher.sources());
    let limits = Settings { event_idle_watchdog_s: 1, ..settings() };
    let router = events_router(&engine, EventsSource::default(), limits).await;
    let series = format!("kvroute_stream_reconnects_total{{endpoint=\"{}\"}}", engine.addr);
    let until = tokio::time::Instant::now() + LONG;
    while metric(&router, &series).await < 1.0 {
        assert!(tokio::time::Instant::now() < until, "never connected again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn load_and_models_are_read_and_the_dead_are_asked_seldom() {
    let engine = Mock::start().await;
    *engine.state.metrics.lock() = Some(
        "vllm:num_requests_running{engine=\"0\"} 7\nvllm:num_requests_waiting{engine=\"0\"} 3\n\
         vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\n"
            .to_owned(),
    );
    *engine.state.models.lock() =
        r#"{"data":[{"id":"base"},{"id":"lora-a","parent":"base"}]}"#.to_owned();
    let limits = Settings { scrape_backoff_max_ms: 200, ..settings() };
    let router = router(&[engine.addr], limits).await;
    ready(&router, 1).await;
    eventually("models are known", || {
        let brain = router.brain();
        brain.fleet().iter().next().is_some_and(|e| e.models().is_some())
    })
    .await;
    let page = admin_json(&router, "/endpoints").await;
    assert_eq!(page[0]["running"], 7);
    assert_eq!(page[0]["waiting"], 3);
    assert_eq!(page[0]["kv_usage"], 0.25);
    assert_eq!(page[0]["models"], serde_json::json!(["base", "lora-a"]));
    // A page without the numbers counts as none: zeros would make the engine look idle.
    *engine.state.metrics.lock() = Some("python_info 1\n".to_owned());
    eventually("it counts as failing", || {
        let brain = router.brain();
        brain.fleet().iter().next().is_some_and(|e| e.scrape_failures() >= 6)
    })
    .await;
    let before = engine.scrapes();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let asked = engine.scrapes() - before;
    assert!(asked <= 8, "{asked} scrapes in 0.6 s, at most one in 150 ms was due");
    let ready_page = admin(&router, "/readyz").await;
    assert_eq!(ready_page.status, 503);
    assert!(ready_page.body.contains("none of 1 endpoints answers"), "{ready_page:?}");
    *engine.state.metrics.lock() = Some(METRICS.to_owned());
    ready(&router, 1).await;
}

#[tokio::test]
async fn scraping_uses_one_connection() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    eventually("20 scrapes", || engine.scrapes() >= 20).await;
    let series = format!("kvroute_scrape_failures_total{{endpoint=\"{}\"}}", engine.addr);
    assert_eq!(metric(&router, &series).await, 0.0);
}

fn write(path: &std::path::Path, endpoints: &[(&str, SocketAddr)]) {
    let mut text = "endpoints:\n".to_owned();
    for (name, addr) in endpoints {
        text.push_str(&format!(
            "- name: {name}\n  address: {}\n  port: \"{}\"\n  labels: {{ role: both }}\n",
            addr.ip(),
            addr.port()
        ));
    }
    std::fs::write(path, text).unwrap();
}

fn names(router: &RouterHandle) -> Vec<String> {
    router.brain().fleet().iter().map(|e| e.name.to_string()).collect()
}

#[tokio::test]
async fn a_file_of_endpoints_is_followed() {
    let (a, b) = (Mock::start().await, Mock::start().await);
    let dir = std::env::temp_dir().join(format!("kvroute-file-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("endpoints.yaml");
    write(&path, &[("one", a.addr)]);
    let mut config = config(&[], settings());
    config.endpoints_file = Some(path.clone());
    let router = kvroute_router::start(config).await.unwrap();
    assert_eq!(names(&router), ["one"], "known when start returns");
    assert_eq!(works(&router).await.headers["x-kvroute-endpoint"], "one");
    write(&path, &[("one", a.addr), ("two", b.addr)]);
    eventually("two endpoints", || names(&router) == ["one", "two"]).await;

    // A faulty file changes nothing, and says where the fault is.
    std::fs::write(&path, "endpoints:\n- nam: one\n").unwrap();
    let until = tokio::time::Instant::now() + LONG;
    while metric(&router, "kvroute_discovery_errors_total{reason=\"file\"}").await == 0.0 {
        assert!(tokio::time::Instant::now() < until, "the fault is not noticed");
    }
    let page = admin(&router, "/readyz").await.body;
    assert!(page.contains("endpoints.yaml") && page.contains("nam"), "{page}");
    assert_eq!(names(&router), ["one", "two"]);

    write(&path, &[("two", b.addr)]);
    eventually("one is gone", || names(&router) == ["two"]).await;
    for _ in 0..5 {
        assert_eq!(works(&router).await.headers["x-kvroute-endpoint"], "two");
    }
    let page = admin(&router, "/metrics").await.body;
    assert!(!page.contains("up{endpoint=\"one\"}"), "no labels of what is gone: {page}");
    assert!(!admin(&router, "/endpoints").await.body.contains("\"one\""));
    assert!(!admin(&router, "/readyz").await.body.contains("endpoints.yaml"));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn a_file_of_endpoints_that_is_wrong_at_first_prevents_the_start() {
    let dir = std::env::temp_dir().join(format!("kvroute-wrong-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("endpoints.yaml");
    let label =
        "endpoints:\n- { name: a, address: 127.0.0.1, port: \"1\", labels: { kvroute/rank: x } }";
    let table = [
        (None, "No such file"),
        (Some("endpoints:\n- nam: one\n"), "endpoints.yaml:2:"),
        (Some(label), "label kvroute/rank has a wrong value"),
    ];
    for (text, says) in table {
        if let Some(text) = text {
            std::fs::write(&path, text).unwrap();
        }
        let mut config = config(&[], settings());
        config.endpoints_file = Some(path.clone());
        let error = kvroute_router::start(config).await.err().expect("no start");
        let shown = error.to_string();
        assert!(matches!(error, kvroute_router::StartError::Endpoints(_)), "{shown}");
        assert!(shown.contains("endpoints.yaml") && shown.contains(says), "{shown}");
    }
    // A name that cannot be resolved yet is no fault of the file.
    let text = "endpoints:\n- { name: a, address: no-such-host.invalid, port: \"1\" }\n";
    std::fs::write(&path, text).unwrap();
    let mut config = config(&[], settings());
    config.endpoints_file = Some(path.clone());
    let started = kvroute_router::start(config).await;
    assert!(started.is_ok(), "{:?}", started.err());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn requests_of_an_endpoint_that_left_finish() {
    let engine = Mock::start().await;
    let dir = std::env::temp_dir().join(format!("kvroute-leave-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("endpoints.yaml");
    write(&path, &[("one", engine.addr)]);
    let mut config = config(&[], settings());
    config.endpoints_file = Some(path.clone());
    let router = kvroute_router::start(config).await.unwrap();
    let go: Arc<tokio::sync::Notify> = Arc::default();
    let first = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab".to_vec();
    engine.script(Script::Gate(first, Arc::clone(&go), b"cd".to_vec()));
    let http = router.http_addr();
    let open = tokio::spawn(async move { send(http, post("/v1/completions", COMPLETION)).await });
    eventually("the engine has it", || engine.seen().len() == 1).await;
    std::fs::write(&path, "endpoints: []\n").unwrap();
    eventually("it has left", || names(&router).is_empty()).await;
    go.notify_one();
    let got = open.await.unwrap();
    assert_eq!((got.body.as_str(), got.complete), ("abcd", true));
    eventually("the place is free", || router.inflight() == 0).await;
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn a_name_stands_for_its_addresses() {
    let engine = Mock::start().await;
    let mut config = config(&[], settings());
    config.endpoints = vec![
        format!("http://localhost:{}", engine.addr.port()).parse().unwrap(),
        "http://no-such-host.invalid:1".parse().unwrap(),
    ];
    let router = kvroute_router::start(config).await.unwrap();
    assert_eq!(names(&router), [engine.addr.to_string()]);
    works(&router).await;
    assert!(metric(&router, "kvroute_discovery_errors_total{reason=\"name\"}").await >= 1.0);
}

#[tokio::test]
async fn a_prompt_that_cannot_be_tokenized_is_routed_by_load() {
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    let tokenizer = kvroute_tokens::Tokenizer::demo();
    config.tokenizers = Tokenizers { default: Some(tokenizer), ..Tokenizers::default() };
    let router = kvroute_router::start(config).await.unwrap();
    let image = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url",
        "image_url":{"url":"http://x/y.png"}}]}]}"#;
    works(&router).await;
    let exact = "kvroute_model_mode{model=\"m\",mode=\"approximate\"}";
    assert_eq!(metric(&router, exact).await, 1.0);
    let got = send(router.http_addr(), post("/v1/chat/completions", image)).await;
    assert_eq!(got.status, 200);
    let id = &got.headers["x-request-id"];
    let page = admin_json(&router, &format!("/decisions/{id}")).await;
    assert_eq!(page["decision"]["mode"], "load-only", "{page}");
    assert_eq!(page["decision"]["reason"], "tokenizer-failed");
    // One request that nobody could tokenize says nothing about the model.
    assert_eq!(metric(&router, "kvroute_fallbacks_total{reason=\"tokenizer-failed\"}").await, 0.0);
    assert_eq!(metric(&router, exact).await, 1.0);
    assert_eq!(
        metric(&router, "kvroute_tokenize_failures_total{reason=\"multimodal\"}").await,
        1.0
    );

    // A long prompt is read on another thread and comes to exact tokens.
    let long = format!(r#"{{"model":"m","prompt":"{}"}}"#, "some words ".repeat(20_000));
    let got = send(router.http_addr(), post("/v1/completions", &long)).await;
    let id = &got.headers["x-request-id"];
    let page = admin_json(&router, &format!("/decisions/{id}")).await;
    assert_eq!(page["decision"]["reason"], "events-not-expected", "{page}");
    assert!(page["decision"]["prompt_tokens"].as_u64().unwrap() > 1_000);
}

#[tokio::test]
async fn chats_that_take_the_slow_way_to_text_are_counted() {
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    let tokenizer = kvroute_tokens::Tokenizer::demo();
    config.tokenizers = Tokenizers { default: Some(tokenizer), ..Tokenizers::default() };
    let router = kvroute_router::start(config).await.unwrap();
    let plain = r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
    let with_tool = r#"{"model":"m","messages":[{"role":"user","content":"hello"}],
        "tools":[{"type":"function","function":{"name":"clock","parameters":{}}}]}"#;
    let mut want = [0.0, 0.0];
    for (body, way) in [(plain, 0), (plain, 0), (with_tool, 1)] {
        let got = send(router.http_addr(), post("/v1/chat/completions", body)).await;
        assert_eq!(got.status, 200);
        want[way] += 1.0;
        for (way, want) in ["direct", "jinja"].iter().zip(want) {
            let series = format!("kvroute_chats_rendered_total{{way=\"{way}\"}}");
            assert_eq!(metric(&router, &series).await, want, "{series}");
        }
    }
}
