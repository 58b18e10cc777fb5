//! Everything that can go wrong with a request: the status, the message, the counter, and that
//! the next request works.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::time::Duration;

use kvroute_core::settings::Settings;
use support::*;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

/// An address where nobody listens.
async fn dead_address() -> std::net::SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn bad_bodies_are_refused_with_a_reason() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let table = [
        ("/v1/completions", "{not json", "bad_body", "not valid JSON"),
        ("/v1/completions", "[1]", "bad_body", "must be a JSON object"),
        ("/v1/completions", r#"{"prompt":"x"}"#, "no_model", "names no model"),
        ("/v1/completions", r#"{"model":"m","prompt":{"a":1}}"#, "bad_body", "`prompt` must be"),
        ("/v1/completions", r#"{"model":7,"prompt":"x"}"#, "bad_body", "`model` must be"),
        ("/v1/chat/completions", r#"{"model":"m"}"#, "bad_body", "`messages`"),
        ("/v1/chat/completions", r#"{"model":"m","messages":"x"}"#, "bad_body", "`messages`"),
        ("/v1/embeddings", r#"{"model":"m","input":true}"#, "bad_body", "`input`"),
    ];
    for (path, body, reason, says) in table {
        let series = format!("kvroute_rejects_total{{reason=\"{reason}\"}}");
        let before = metric(&router, &series).await;
        let got = send(router.http_addr(), post(path, body)).await;
        assert_eq!(got.status, 400, "{body}: {got:?}");
        assert!(got.error_message().contains(says), "{body}: {got:?}");
        assert!(got.headers.contains_key("x-request-id"), "{body}");
        assert_eq!(got.headers["content-type"], "application/json");
        assert_eq!(metric(&router, &series).await, before + 1.0, "{body}");
        works(&router).await;
    }
    assert_eq!(engine.seen().len(), table.len(), "engines see good requests only");
    let deep = format!(r#"{{"model":"m","messages":{}}}"#, "[".repeat(100_000));
    let got = send(router.http_addr(), post("/v1/chat/completions", &deep)).await;
    assert_eq!(got.status, 400);
    works(&router).await;
}

#[tokio::test]
async fn a_default_model_stands_in() {
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    config.default_model = Some("m".to_owned());
    let router = kvroute_router::start(config).await.unwrap();
    let got = send(router.http_addr(), post("/v1/completions", r#"{"prompt":"x"}"#)).await;
    assert_eq!(got.status, 200);
}

#[tokio::test]
async fn too_much_is_refused() {
    let engine = Mock::start().await;
    let limits = Settings { body_bytes_max: 1_000, header_bytes_max: 2_000, ..settings() };
    let router = router(&[engine.addr], limits).await;
    let big = format!(r#"{{"model":"m","prompt":"{}"}}"#, "x".repeat(1_000));
    let chunked = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n\
         {:x}\r\n{big}\r\n0\r\n\r\n",
        big.len()
    );
    let header = format!("x-long: {}\r\n", "y".repeat(2_000));
    let table = [
        (post("/v1/completions", &big), 413, "body_too_large", "larger than 1000 bytes"),
        (chunked, 413, "body_too_large", "larger than 1000 bytes"),
        (post("/v1/audio", &big), 413, "body_too_large", "larger than 1000 bytes"),
        (post_with("/v1/completions", &header, COMPLETION), 431, "head_too_large", "2000 bytes"),
        (get(&format!("/?{}", "z".repeat(2_000))), 431, "head_too_large", "2000 bytes"),
    ];
    for (request, status, reason, says) in table {
        let series = format!("kvroute_rejects_total{{reason=\"{reason}\"}}");
        let before = metric(&router, &series).await;
        let got = send(router.http_addr(), request).await;
        assert_eq!(got.status, status, "{got:?}");
        assert!(got.error_message().contains(says), "{got:?}");
        assert_eq!(metric(&router, &series).await, before + 1.0);
        works(&router).await;
    }
    // Far above the limit hyper itself refuses, and closes.
    let huge = format!("x-long: {}\r\n", "y".repeat(100_000));
    let got = send(router.http_addr(), post_with("/v1/completions", &huge, COMPLETION)).await;
    assert_eq!(got.status, 431);
    counted(&router, "head_too_large", 3.0).await;
    let got = send(router.http_addr(), "GET / HTTP/1.1\r\nbad header\r\n\r\n").await;
    assert_eq!(got.status, 400);
    counted(&router, "bad_request_head", 1.0).await;
    works(&router).await;
}

const HELD: &str = "kvroute_request_bodies_held_bytes";

/// Waits until so many bytes of request bodies are held.
async fn held(router: &kvroute_router::RouterHandle, bytes: usize) {
    let until = tokio::time::Instant::now() + LONG;
    while metric(router, HELD).await != bytes as f64 {
        assert!(tokio::time::Instant::now() < until, "never {bytes} held");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Bodies count from their first piece until an endpoint answers.
#[tokio::test]
async fn bodies_that_find_no_room_are_refused() {
    let engine = Mock::start().await;
    let limits = Settings { body_bytes_max: 1_000, bodies_bytes_max: 1_000, ..settings() };
    let router = router(&[engine.addr], limits).await;
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "x".repeat(600));
    let request = post("/v1/completions", &body);
    let mut slow = TcpStream::connect(router.http_addr()).await.unwrap();
    slow.write_all(&request.as_bytes()[..request.len() - 10]).await.unwrap();
    held(&router, body.len() - 10).await;
    let got = send(router.http_addr(), &request).await;
    assert_eq!((got.status, got.headers["retry-after"].as_str()), (503, "1"), "{got:?}");
    assert_eq!(got.headers["x-llm-d-request-dropped-reason"], "rejected-saturated");
    assert!(got.error_message().contains("kvroute.bodies_bytes_max"), "{got:?}");
    assert_eq!(metric(&router, "kvroute_rejects_total{reason=\"bodies_full\"}").await, 1.0);
    // What was taken for it has been given back, and a small one fits.
    held(&router, body.len() - 10).await;
    works(&router).await;
    // Complete, it is kept for another endpoint as long as this one is silent.
    engine.script(Script::Stall);
    slow.write_all(&request.as_bytes()[request.len() - 10..]).await.unwrap();
    eventually("the engine has it", || engine.seen().len() == 2).await;
    held(&router, body.len()).await;
    assert_eq!(send(router.http_addr(), &request).await.status, 503);
    drop(slow);
    held(&router, 0).await;
    // An answer's head is enough.
    let go = std::sync::Arc::new(tokio::sync::Notify::new());
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{".to_vec();
    engine.script(Script::Gate(head, std::sync::Arc::clone(&go), b"}".to_vec()));
    let mut client = TcpStream::connect(router.http_addr()).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    eventually("the engine has it", || engine.seen().len() == 3).await;
    held(&router, 0).await;
    assert_eq!(router.inflight(), 1);
    go.notify_one();
    assert_eq!(read_answer(&mut client).await.body, "{}");
}

/// Waits for a count of rejects: hyper's own are counted when their connection has ended.
async fn counted(router: &kvroute_router::RouterHandle, reason: &str, count: f64) {
    let series = format!("kvroute_rejects_total{{reason=\"{reason}\"}}");
    let until = tokio::time::Instant::now() + LONG;
    while metric(router, &series).await != count {
        assert!(tokio::time::Instant::now() < until, "{reason} is never {count}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for_long() {
    let engine = Mock::start().await;
    let limits = Settings { client_body_timeout_s: 1, ..settings() };
    let router = router(&[engine.addr], limits).await;
    let request = "POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 50\r\n\r\n{";
    let got = send(router.http_addr(), request).await;
    assert_eq!(got.status, 408, "{got:?}");
    assert_eq!(metric(&router, "kvroute_rejects_total{reason=\"body_timeout\"}").await, 1.0);
    works(&router).await;
}

#[tokio::test]
async fn a_client_that_sends_nothing_is_hung_up_on() {
    let engine = Mock::start().await;
    let limits = Settings { client_header_timeout_ms: 100, ..settings() };
    let router = router(&[engine.addr], limits).await;
    for start in ["", "GET / HT"] {
        let mut stream = TcpStream::connect(router.http_addr()).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let read = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest);
        tokio::time::timeout(LONG, read).await.expect("the end").unwrap();
    }
    works(&router).await;
}

#[tokio::test]
async fn without_endpoints_the_answer_is_503_and_not_ready() {
    let router = router(&[], settings()).await;
    for request in [post("/v1/completions", COMPLETION), get("/v1/models")] {
        let got = send(router.http_addr(), request).await;
        assert_eq!(got.status, 503, "{got:?}");
        assert!(got.error_message().contains("the fleet is empty"), "{got:?}");
        assert_eq!(got.headers["retry-after"], "1");
    }
    let series = "kvroute_rejects_total{reason=\"rejected-no-endpoints\"}";
    assert_eq!(metric(&router, series).await, 2.0);
    let ready = admin(&router, "/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("no source of endpoints lists any"), "{ready:?}");
    assert_eq!(admin(&router, "/healthz").await.status, 200);
}

#[tokio::test]
async fn over_the_limit_of_requests_the_answer_is_429() {
    let engine = Mock::start().await;
    let limits = Settings { inflight_requests_max: 1, ..settings() };
    let router = router(&[engine.addr], limits).await;
    engine.script(Script::Stall);
    let mut stalled = TcpStream::connect(router.http_addr()).await.unwrap();
    stalled.write_all(post("/v1/completions", COMPLETION).as_bytes()).await.unwrap();
    eventually("the engine has it", || engine.seen().len() == 1).await;
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!((got.status, got.headers["retry-after"].as_str()), (429, "1"), "{got:?}");
    assert_eq!(metric(&router, "kvroute_rejects_total{reason=\"inflight_limit\"}").await, 1.0);
    drop(stalled);
    eventually("the place is free", || router.inflight() == 0).await;
    engine.script(Script::Answer(200, OK_BODY.to_owned()));
    works(&router).await;
}

/// Sends until each of two endpoints has been tried; all requests must succeed on `good`.
async fn all_succeed(router: &kvroute_router::RouterHandle, good: &Mock, reason: &str) {
    let series = format!("kvroute_retries_total{{reason=\"{reason}\"}}");
    for _ in 0..200 {
        let got = works(router).await;
        assert_eq!(got.headers["x-kvroute-endpoint"], good.addr.to_string());
        if metric(router, &series).await > 0.0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the bad endpoint was never tried: {}", admin(router, "/metrics").await.body);
}

#[tokio::test]
async fn another_endpoint_takes_over_before_the_first_byte() {
    let good = Mock::start().await;
    let dead = dead_address().await;
    let first = round_robin(&[good.addr, dead], settings()).await;
    all_succeed(&first, &good, "connect").await;
    let failures =
        format!("kvroute_upstream_failures_total{{endpoint=\"{dead}\",reason=\"connect\"}}");
    assert!(metric(&first, &failures).await >= 1.0);
    for (script, reason) in [(Script::Reset, "reset"), (Script::Close, "closed")] {
        let bad = Mock::start().await;
        bad.script(script);
        let next = round_robin(&[good.addr, bad.addr], settings()).await;
        all_succeed(&next, &good, reason).await;
        // The body that failed was sent again, whole.
        assert!(good.seen().iter().all(|s| s.body == COMPLETION.as_bytes()));
    }
}

#[tokio::test]
async fn the_dead_are_found_by_scrapes_and_not_by_requests() {
    let (good, dead) = (Mock::start().await, dead_address().await);
    // Shorter at first than a scrape may take: the wait is doubled until it is long enough.
    let limits = Settings { failure_backoff_max_ms: 10_000, ..settings() };
    let router = round_robin(&[good.addr, dead], limits).await;
    let failed_scrapes = || {
        let brain = router.brain();
        brain.fleet().by_name(&dead.to_string()).unwrap().scrape_failures()
    };
    eventually("a failed scrape", || failed_scrapes() >= 1).await;
    while failed_scrapes() < 8 {
        assert_eq!(works(&router).await.headers["x-kvroute-endpoint"], good.addr.to_string());
        let page = admin_json(&router, "/endpoints").await;
        let listed = page.as_array().unwrap();
        let row = listed.iter().find(|row| row["name"] == dead.to_string()).unwrap();
        assert_eq!(row["avoided"], true, "{row}");
    }
    let page = admin(&router, "/metrics").await.body;
    assert!(!page.contains("kvroute_upstream_failures_total{"), "no request met it: {page}");
}

#[tokio::test]
async fn an_engine_that_accepts_but_stays_silent_is_avoided_after_a_few_scrapes() {
    let good = Mock::start().await;
    // The kernel accepts connections to it.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = mute.local_addr().unwrap().to_string();
    // Answers, but not with metrics: that is no reason to avoid it.
    let other = Mock::start().await;
    *other.state.metrics.lock() = None;
    let limits = Settings { scrape_timeout_ms: 50, failure_backoff_max_ms: 10_000, ..settings() };
    let router = router(&[good.addr, mute.local_addr().unwrap(), other.addr], limits).await;
    let failures_of = |name: &str| {
        let brain = router.brain();
        let endpoint = brain.fleet().by_name(name).unwrap();
        (endpoint.scrape_failures(), endpoint.failures())
    };
    let mut before = (0, 0);
    eventually("three scrapes have failed", || {
        let seen = failures_of(&name);
        if seen.0 < 3 {
            before = seen;
        }
        seen.0 >= 3 && seen.1 >= 1
    })
    .await;
    assert_eq!(before.1, 0, "a late page or two is what a busy engine looks like");
    let other = other.addr.to_string();
    eventually("the other's scrapes have failed", || failures_of(&other).0 >= 3).await;
    assert_eq!(failures_of(&other).1, 0);
}

#[tokio::test]
async fn when_nobody_answers_the_client_is_told() {
    let (a, b) = (dead_address().await, dead_address().await);
    let router = router(&[a, b], settings()).await;
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!(got.status, 502, "{got:?}");
    assert!(got.error_message().contains("cannot connect"), "{got:?}");
    assert!(got.headers.contains_key("x-request-id"));
    assert_eq!(metric(&router, "kvroute_rejects_total{reason=\"connect\"}").await, 1.0);
    let retries = metric(&router, "kvroute_retries_total{reason=\"connect\"}").await;
    assert_eq!(retries, 1.0, "there is no third endpoint");
    let engine = Mock::start_at(a).await;
    for _ in 0..100 {
        let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
        if got.status == 200 {
            assert_eq!(engine.seen().len(), 1);
            return;
        }
    }
    panic!("the endpoint that came back is not used");
}

#[tokio::test]
async fn retries_end() {
    let engines = [Mock::start().await, Mock::start().await, Mock::start().await];
    engines.iter().for_each(|e| e.script(Script::Close));
    let addresses: Vec<_> = engines.iter().map(|e| e.addr).collect();
    let limits = Settings { retries_max: 1, failure_backoff_ms: 0, ..settings() };
    let router = router(&addresses, limits).await;
    let request = post_with("/v1/completions", "x-request-id: all\r\n", COMPLETION);
    let got = send(router.http_addr(), request).await;
    assert_eq!(got.status, 502);
    let outcome = &admin_json(&router, "/decisions/all").await["outcome"];
    assert_eq!((&outcome["attempts"], &outcome["status"]), (&2.into(), &502.into()), "{outcome}");
    assert_eq!(outcome["endpoint"], got.headers["x-kvroute-endpoint"].as_str(), "the last one");
    assert!(got.error_message().contains(&got.headers["x-kvroute-endpoint"]), "{got:?}");
    let series = "kvroute_retries_total{reason=\"closed\"}";
    assert_eq!(metric(&router, series).await, 1.0, "the last failure is not retried");
    assert_eq!(engines.iter().map(|e| e.seen().len()).sum::<usize>(), 2);
    let got = send(router.http_addr(), get("/x")).await;
    assert_eq!(got.status, 502);
    assert_eq!(engines.iter().map(|e| e.seen().len()).sum::<usize>(), 4, "GET is repeatable");
    let got = send(router.http_addr(), post("/reset_prefix_cache", "")).await;
    assert_eq!(got.status, 502);
    assert_eq!(engines.iter().map(|e| e.seen().len()).sum::<usize>(), 5, "POST is not");
}

#[tokio::test]
async fn after_the_first_byte_the_error_is_passed_on() {
    let (bad, other) = (Mock::start().await, Mock::start().await);
    let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n".to_vec();
    let counted = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc".to_vec();
    let scripts = [
        Script::ResetAfter(chunked.clone()),
        Script::ResetAfter(counted.clone()),
        Script::Raw(vec![chunked.clone()]),
        Script::Raw(vec![counted]),
        Script::Raw(vec![[&chunked[..], b"zz\r\n"].concat()]),
    ];
    for script in scripts {
        [&bad, &other].iter().for_each(|e| e.script(script.clone()));
        let router = router(&[bad.addr, other.addr], settings()).await;
        let before = bad.seen().len() + other.seen().len();
        let request = post_with("/v1/completions", "x-request-id: cut\r\n", COMPLETION);
        let got = send(router.http_addr(), request).await;
        assert_eq!((got.status, got.complete), (200, false), "{got:?}");
        assert_eq!(bad.seen().len() + other.seen().len(), before + 1, "no second try");
        eventually("the place is free", || router.inflight() == 0).await;
        let page = admin_json(&router, "/decisions/cut").await;
        let error = page["outcome"]["error"].as_str().unwrap();
        let lost = error.contains("connection");
        let told = router.brain().counters().endpoints_failed;
        assert_eq!(told, u64::from(lost), "a lost connection is a failure of the engine: {page}");
        [&bad, &other].iter().for_each(|e| e.script(Script::Answer(200, OK_BODY.to_owned())));
        works(&router).await;
    }
}

#[tokio::test]
async fn silence_has_limits() {
    let engine = Mock::start().await;
    let limits = Settings { first_byte_timeout_s: 1, response_idle_timeout_s: 1, ..settings() };
    let router = router(&[engine.addr], limits).await;
    engine.script(Script::Stall);
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!(got.status, 504, "{got:?}");
    assert!(got.error_message().contains("no answer within 1s"), "{got:?}");
    let series = "kvroute_rejects_total{reason=\"first_byte_timeout\"}";
    assert_eq!(metric(&router, series).await, 1.0);
    eventually("the engine is told", || engine.cancelled() == 1).await;
    let first = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n".to_vec();
    engine.script(Script::Gate(first, std::sync::Arc::default(), Vec::new()));
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!((got.status, got.complete), (200, false));
    let series = format!(
        "kvroute_upstream_failures_total{{endpoint=\"{}\",reason=\"idle_timeout\"}}",
        engine.addr
    );
    assert_eq!(metric(&router, &series).await, 1.0);
    engine.script(Script::Answer(200, OK_BODY.to_owned()));
    works(&router).await;
}

#[tokio::test]
async fn an_engines_own_errors_reach_the_client() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    engine.script(Script::Answer(404, "{\"error\":\"no such model\"}".to_owned()));
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!((got.status, got.body.as_str()), (404, "{\"error\":\"no such model\"}"));
    // An engine that refuses a long body before it has read it.
    let refusal = answer(413, "{\"error\":\"too long\"}").into_bytes();
    engine.script(Script::Refuse(refusal));
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "x".repeat(8 << 20));
    let got = send(router.http_addr(), post("/v1/completions", &body)).await;
    assert!([413, 502].contains(&got.status), "{got:?}");
    engine.script(Script::Raw(vec![b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec()]));
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!(got.status, 502);
    assert!(got.error_message().contains("not HTTP/1.1"), "{got:?}");
    assert_eq!(metric(&router, "kvroute_rejects_total{reason=\"protocol\"}").await, 1.0);
    engine.script(Script::Answer(200, OK_BODY.to_owned()));
    works(&router).await;
}

#[tokio::test]
async fn a_connection_closed_while_idle_is_no_failure() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let closing = answer(200, OK_BODY).into_bytes();
    for _ in 0..10 {
        // Raw closes after its answer, though nothing in the head says so.
        engine.script(Script::Raw(vec![closing.clone()]));
        works(&router).await;
    }
    let page = admin(&router, "/metrics").await.body;
    assert!(!page.contains("kvroute_upstream_failures_total{"), "{page}");
}

#[tokio::test]
async fn tunnels_are_refused() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let got = send(router.http_addr(), "CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n").await;
    assert_eq!(got.status, 501, "{got:?}");
    assert_eq!(metric(&router, "kvroute_rejects_total{reason=\"tunnel\"}").await, 1.0);
    works(&router).await;
}

#[tokio::test]
async fn the_admin_address_is_read_only() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    assert_eq!(send(router.admin_addr(), post("/metrics", "")).await.status, 405);
    assert_eq!(admin(&router, "/nothing").await.status, 404);
    assert_eq!(admin(&router, "/").await.status, 200);
    works(&router).await;
}
