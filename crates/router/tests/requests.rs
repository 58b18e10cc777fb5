//! What a client and an engine see of a request that goes through the router.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::*;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;

#[tokio::test]
async fn a_request_goes_through_unchanged_and_headers_are_in_order() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let headers = "x-request-id: req-7\r\ntraceparent: 00-aa-bb-01\r\ntracestate: k=v\r\n\
        x-gateway-destination-endpoint: 9.9.9.9:1\r\nx-prefiller-host-port: 9.9.9.9:1\r\n\
        x-kvroute-endpoint: x\r\nx-forwarded-for: 10.0.0.9\r\naccept-encoding: gzip\r\n\
        connection: x-hop\r\nx-hop: 1\r\nauthorization: Bearer t\r\n";
    let got = send(router.http_addr(), post_with("/v1/completions?a=b", headers, COMPLETION)).await;
    assert_eq!((got.status, got.body.as_str()), (200, OK_BODY));
    assert_eq!(got.headers["x-request-id"], "req-7");
    assert_eq!(got.headers["x-kvroute-endpoint"], engine.addr.to_string());
    let seen = engine.seen().remove(0);
    assert_eq!(seen.body, COMPLETION.as_bytes());
    assert_eq!(seen.target, "/v1/completions?a=b");
    let table = [
        ("host", Some(engine.addr.to_string())),
        ("x-request-id", Some("req-7".to_owned())),
        ("traceparent", Some("00-aa-bb-01".to_owned())),
        ("tracestate", Some("k=v".to_owned())),
        ("authorization", Some("Bearer t".to_owned())),
        ("x-forwarded-for", Some("10.0.0.9, 127.0.0.1".to_owned())),
        ("x-gateway-destination-endpoint", None),
        ("x-prefiller-host-port", None),
        ("x-kvroute-endpoint", None),
        ("x-hop", None),
        ("accept-encoding", None),
    ];
    for (name, value) in table {
        assert_eq!(seen.header(name), value.as_deref(), "{name}");
    }
}

#[tokio::test]
async fn the_decision_and_what_was_delivered_can_be_asked_for() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let request = post_with("/v1/completions", "x-request-id: why-1\r\n", COMPLETION);
    send(router.http_addr(), request).await;
    let page = admin_json(&router, "/decisions/why-1").await;
    assert_eq!(page["decision"]["endpoint"], engine.addr.to_string());
    assert_eq!(page["decision"]["mode"], "approximate");
    assert_eq!(page["decision"]["reason"], "tokens-estimated");
    assert_eq!(page["outcome"]["status"], 200);
    assert_eq!(page["outcome"]["delivered_tokens"], 4);
    assert_eq!(page["outcome"]["prompt_tokens"], 9);
    assert_eq!(admin_json(&router, "/decisions?last=5").await.as_array().unwrap().len(), 1);
    assert_eq!(admin(&router, "/decisions/other").await.status, 404);
    assert_eq!(admin(&router, "/decisions?last=x").await.status, 400);
    let endpoint = engine.addr;
    let series = format!("kvroute_cache_delivered_tokens_total{{endpoint=\"{endpoint}\"}}");
    assert_eq!(metric(&router, &series).await, 4.0);
    let series = format!(
        "kvroute_requests_total{{endpoint=\"{endpoint}\",status=\"200\",mode=\"approximate\"}}"
    );
    assert_eq!(metric(&router, &series).await, 1.0);
    let mode = metric(&router, "kvroute_model_mode{model=\"m\",mode=\"approximate\"}").await;
    assert_eq!(mode, 1.0);
    assert_eq!(metric(&router, "kvroute_fallbacks_total{reason=\"tokens-estimated\"}").await, 1.0);
}

/// An SSE answer whose usage object is cut at every byte.
#[tokio::test]
async fn usage_of_a_stream_is_found_wherever_it_is_cut() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
        transfer-encoding: chunked\r\n\r\n";
    let text = "data: {\"choices\":[]}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":31,\
        \"completion_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":16}}}\n\n\
        data: [DONE]\n\n";
    for cut in (1..text.len()).step_by(7) {
        let (a, b) = text.as_bytes().split_at(cut);
        let mut pieces = vec![head.to_vec()];
        for part in [a, b] {
            pieces.push(format!("{:x}\r\n", part.len()).into_bytes());
            pieces.push([part, b"\r\n"].concat());
        }
        pieces.push(b"0\r\n\r\n".to_vec());
        engine.script(Script::Raw(pieces));
        let id = format!("cut-{cut}");
        let headers = format!("x-request-id: {id}\r\n");
        let body = r#"{"model":"m","prompt":"x","stream":true}"#;
        let got = send(router.http_addr(), post_with("/v1/completions", &headers, body)).await;
        assert_eq!((got.body.as_str(), got.complete), (text, true), "cut {cut}");
        let page = admin_json(&router, &format!("/decisions/{id}")).await;
        assert_eq!(page["outcome"]["delivered_tokens"], 16, "cut {cut}: {page}");
    }
}

#[tokio::test]
async fn what_the_router_does_not_know_passes_through() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let got = send(router.http_addr(), get("/v1/models")).await;
    assert_eq!((got.status, got.body.as_str()), (200, OK_BODY));
    assert!(got.headers.contains_key("x-kvroute-endpoint"));
    // A body of unknown length and content is passed on as it comes.
    let request = "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: r\r\n\
        transfer-encoding: chunked\r\n\r\n5\r\n\0binA\r\n3\r\nryB\r\n0\r\n\r\n";
    assert_eq!(send(router.http_addr(), request).await.status, 200);
    assert_eq!(send(router.http_addr(), post("/tokenize", "{\"prompt\":\"x\"}")).await.status, 200);
    let seen = engine.seen();
    assert_eq!((seen[0].method.as_str(), seen[0].target.as_str()), ("GET", "/v1/models"));
    assert_eq!(seen[0].header("content-length"), None);
    assert_eq!(seen[1].body, b"\0binAryB");
    assert_eq!(seen[2].header("content-length"), Some("14"));
    let series = format!(
        "kvroute_requests_total{{endpoint=\"{}\",status=\"200\",mode=\"pass-through\"}}",
        engine.addr
    );
    assert_eq!(metric(&router, &series).await, 3.0);
    works(&router).await;
}

/// Anthropic's messages: read like a chat, their usage found, errors in their shape.
#[tokio::test]
async fn messages_are_read_and_token_counts_pass_through() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let text = "event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":15,\
        \"cache_read_input_tokens\":16,\"output_tokens\":0}}}\n\n\
        event: message_delta\ndata: {\"usage\":{\"output_tokens\":3}}\n\n";
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
    engine.script(Script::Raw(vec![head.into(), text[..80].into(), text[80..].into()]));
    let body = r#"{"model":"m","max_tokens":5,"stream":true,"messages":[
        {"role":"user","content":[{"type":"text","text":"hi"}]}]}"#;
    let request = post_with("/v1/messages", "x-request-id: msg-1\r\n", body);
    assert_eq!(send(router.http_addr(), request).await.body, text);
    let page = admin_json(&router, "/decisions/msg-1").await;
    assert_eq!(page["decision"]["reason"], "tokens-estimated", "{page}");
    assert_eq!(page["outcome"]["delivered_tokens"], 16);
    assert_eq!(page["outcome"]["prompt_tokens"], 31);
    assert_eq!(page["outcome"]["completion_tokens"], 3);

    // Whatever it holds, a body whose tokens are to be counted is not looked at.
    engine.script(Script::Answer(200, r#"{"input_tokens":7}"#.to_owned()));
    let got = send(router.http_addr(), post("/v1/messages/count_tokens", "{nonsense")).await;
    assert_eq!((got.status, got.body.as_str()), (200, r#"{"input_tokens":7}"#));
    assert_eq!(engine.seen()[1].body, b"{nonsense");

    let got = send(router.http_addr(), post("/v1/messages", r#"{"model":"m"}"#)).await;
    let error = concat!(
        r#"{"type":"error","error":{"type":"invalid_request_error","#,
        r#""message":"`messages` is missing; messages needs it"}}"#
    );
    assert_eq!((got.status, got.body.as_str()), (400, error));
    assert_eq!(engine.seen().len(), 2);
}

#[tokio::test]
async fn head_requests_and_empty_answers_end_where_they_should() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let raw = b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n".to_vec();
    engine.script(Script::Raw(vec![raw]));
    // A body that is not there cannot be wrong: the engine says what it thinks of it.
    let got = send(router.http_addr(), post("/v1/completions", "")).await;
    assert_eq!(got.status, 204);
    let got = send(router.http_addr(), post("/v1/load_lora_adapter", "{}")).await;
    assert_eq!((got.status, got.headers["x-a"].as_str()), (204, "1"));
    engine.script(Script::Raw(vec![b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n".to_vec()]));
    let mut stream = TcpStream::connect(router.http_addr()).await.unwrap();
    stream.write_all(b"HEAD /x HTTP/1.1\r\nhost: r\r\n\r\n").await.unwrap();
    stream.write_all(get("/y").as_bytes()).await.unwrap();
    let mut answer = String::new();
    while !answer.contains("\r\n\r\n") {
        let mut bytes = [0; 512];
        let n = tokio::io::AsyncReadExt::read(&mut stream, &mut bytes).await.unwrap();
        assert_ne!(n, 0, "{answer}");
        answer.push_str(std::str::from_utf8(&bytes[..n]).unwrap());
    }
    assert!(answer.contains("content-length: 99"), "{answer}");
    // An answer without a length ends with its connection.
    engine.script(Script::Raw(vec![b"HTTP/1.1 200 OK\r\n\r\nsome".to_vec(), b" text".to_vec()]));
    let got = send(router.http_addr(), get("/z")).await;
    assert_eq!((got.body.as_str(), got.complete), ("some text", true));
}

#[tokio::test]
async fn connections_are_used_again() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let mut stream = TcpStream::connect(router.http_addr()).await.unwrap();
    for _ in 0..20 {
        stream.write_all(post("/v1/completions", COMPLETION).as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut stream).await.status, 200);
    }
    assert_eq!(engine.connections(), 1);
    assert_eq!(metric(&router, "kvroute_connections").await, 1.0);
}

#[tokio::test]
async fn http2_without_tls_works_on_the_same_port() {
    use http_body_util::{BodyExt, Full};
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let stream = TcpStream::connect(router.http_addr()).await.unwrap();
    let (mut client, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    tokio::spawn(connection);
    let mut answers = tokio::task::JoinSet::new();
    for n in 0..30 {
        let request = http::Request::post(format!("http://{}/v1/completions", router.http_addr()))
            .header("x-request-id", format!("h2-{n}"))
            .body(Full::new(bytes::Bytes::from_static(COMPLETION.as_bytes())))
            .unwrap();
        answers.spawn(client.send_request(request));
    }
    while let Some(answer) = answers.join_next().await {
        let answer = answer.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.headers()["x-request-id"].to_str().unwrap().starts_with("h2-"));
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, OK_BODY);
    }
    assert_eq!(engine.seen().len(), 30);
    works(&router).await;
}

#[tokio::test]
async fn a_long_answer_comes_through_whole() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let body = "0123456789abcdef".repeat(1 << 19);
    engine.script(Script::Answer(200, body.clone()));
    let got = send(router.http_addr(), get("/file")).await;
    assert!(got.body == body && got.complete, "{} of {} bytes", got.body.len(), body.len());
}

#[tokio::test]
async fn a_slow_reader_slows_the_engine_down() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let mut pieces = vec![b"HTTP/1.1 200 OK\r\n\r\n".to_vec()];
    pieces.extend(std::iter::repeat_n(vec![b'x'; 1 << 20], 64));
    engine.script(Script::Raw(pieces));
    let mut stream = TcpStream::connect(router.http_addr()).await.unwrap();
    stream.write_all(get("/flood").as_bytes()).await.unwrap();
    eventually("the request arrives", || !engine.seen().is_empty()).await;
    // So much does not fit into socket buffers: the engine must come to a stop.
    let pieces = || engine.state.pieces.load(std::sync::atomic::Ordering::SeqCst);
    let mut before = usize::MAX;
    while pieces() != before {
        before = pieces();
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    assert!(before < 64, "the router took all of it");
    drop(stream);
    eventually("the engine is cut off", || engine.cancelled() == 1).await;
    works_after(&engine, &router).await;
}

async fn works_after(engine: &Mock, router: &kvroute_router::RouterHandle) {
    engine.script(Script::Answer(200, OK_BODY.to_owned()));
    works(router).await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_and_frees_its_place() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    let first = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n".to_vec();
    let gate = Script::Gate(first, Arc::new(Notify::new()), Vec::new());
    for (n, script) in [Script::Stall, gate].into_iter().enumerate() {
        engine.script(script);
        let mut stream = TcpStream::connect(router.http_addr()).await.unwrap();
        let request = post_with("/v1/completions", "x-request-id: gone\r\n", COMPLETION);
        stream.write_all(request.as_bytes()).await.unwrap();
        eventually("the engine has it", || engine.seen().len() == n + 1).await;
        if n == 1 {
            let mut bytes = [0; 600];
            let mut seen = Vec::new();
            while !seen.ends_with(b"2\r\nab\r\n") {
                let n = tokio::io::AsyncReadExt::read(&mut stream, &mut bytes).await.unwrap();
                assert_ne!(n, 0);
                seen.extend_from_slice(&bytes[..n]);
            }
        }
        assert_eq!(router.inflight(), 1);
        drop(stream);
        eventually("the engine is told", || engine.cancelled() == n + 1).await;
        eventually("the place is free", || router.inflight() == 0).await;
        assert_eq!(metric(&router, "kvroute_client_aborts_total").await, (n + 1) as f64);
        let page = admin_json(&router, "/decisions/gone").await;
        assert_eq!(page["outcome"]["status"], 499);
        let load = admin_json(&router, "/endpoints").await;
        assert_eq!(load[0]["inflight_requests"], 0, "{load}");
    }
    works_after(&engine, &router).await;
}

#[tokio::test]
async fn draining_lets_requests_finish_and_takes_no_new_ones() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    ready(&router, 1).await;
    let go = Arc::new(Notify::new());
    let first = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc".to_vec();
    engine.script(Script::Gate(first, Arc::clone(&go), b"def".to_vec()));
    let (http, admin_addr) = (router.http_addr(), router.admin_addr());
    let open = tokio::spawn(async move { send(http, post("/v1/completions", COMPLETION)).await });
    eventually("the engine has it", || engine.seen().len() == 1).await;
    let shutdown = tokio::spawn(router.shutdown(LONG));
    loop {
        let ready = send(admin_addr, get("/readyz")).await;
        if ready.status == 503 && ready.body.contains("draining") {
            break;
        }
    }
    while TcpStream::connect(http).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    go.notify_one();
    let got = open.await.unwrap();
    assert_eq!((got.body.as_str(), got.complete), ("abcdef", true));
    assert!(shutdown.await.unwrap(), "all finished");
}

#[tokio::test]
async fn the_drain_timeout_breaks_off_what_is_left() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    engine.script(Script::Stall);
    let mut stream = TcpStream::connect(router.http_addr()).await.unwrap();
    stream.write_all(post("/v1/completions", COMPLETION).as_bytes()).await.unwrap();
    eventually("the engine has it", || engine.seen().len() == 1).await;
    assert!(!router.shutdown(Duration::from_millis(50)).await);
    eventually("the engine is told", || engine.cancelled() == 1).await;
}

#[tokio::test]
async fn long_model_names_are_kept_nowhere_for_good() {
    let engine = Mock::start().await;
    let mut settings = settings();
    settings.decisions_bytes_max = 1 << 20;
    let router = router(&[engine.addr], settings).await;
    ready(&router, 1).await;
    for at in 0..20 {
        let model = format!("{at}{}", "x".repeat(200 << 10));
        let body = format!(r#"{{"model":"{model}","prompt":"Hello there"}}"#);
        send(router.http_addr(), post("/v1/completions", &body)).await;
    }
    let kept = admin_json(&router, "/decisions?last=100").await;
    assert!(kept.as_array().is_some_and(|kept| (1..=5).contains(&kept.len())));
    let page = admin(&router, "/metrics").await.body;
    assert!(page.contains("kvroute_model_mode{model=\"other\"") && !page.contains("xxx"));
}

#[tokio::test]
async fn explaining_a_request_counts_nothing() {
    let engine = Mock::start().await;
    let router = router(&[engine.addr], settings()).await;
    ready(&router, 1).await;
    let explained = send(router.admin_addr(), post("/explain", COMPLETION)).await;
    assert_eq!(explained.status, 200, "{}", explained.body);
    assert_eq!(metric(&router, "kvroute_tokenize_seconds_count").await, 0.0);
    works(&router).await;
    assert_eq!(metric(&router, "kvroute_tokenize_seconds_count").await, 1.0);
}
