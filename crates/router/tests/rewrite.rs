//! Requests for one model that another one serves: what the engine gets, and what the client.
//! Row 99 of docs/differences.md: nothing but the name changes.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use kvroute_core::settings::Settings;
use kvroute_router::RouterHandle;
use support::*;

const BY_HEADER: &str = "x-llm-d-model-name-rewrite: target/1\r\n";
/// Numbers, escapes and spaces that a JSON library would write in another way.
const ASKED: &str = "{ \"prompt\":\"say \\\"model\\\":\\\"incoming\\\" <&> \u{e9}\",\n\"seed\" : \
    9007199254740993, \"model\": \"in\\u0063oming\",\"n\":1.0 }";
const SENT: &str = "{ \"prompt\":\"say \\\"model\\\":\\\"incoming\\\" <&> \u{e9}\",\n\"seed\" : \
    9007199254740993, \"model\": \"target/1\",\"n\":1.0 }";
const ANSWERED: &str = r#"{"id":"1","model":"target/1",
    "choices":[{"text":"\"model\":\"target/1\"","input":{"model":"target/1"}}],
    "usage":{"prompt_tokens":9,"completion_tokens":2}}"#;
const TOLD: &str = r#"{"id":"1","model":"incoming",
    "choices":[{"text":"\"model\":\"target/1\"","input":{"model":"target/1"}}],
    "usage":{"prompt_tokens":9,"completion_tokens":2}}"#;

/// A router with these rules, in YAML.
async fn routed(engine: &Mock, rules: &str) -> RouterHandle {
    let yaml = format!("kvroute: {{model_rewrites: {rules}}}");
    let config = kvroute_wire::config::parse(&yaml, "test.yaml").unwrap();
    let model_rewrites = config.kvroute.limits.model_rewrites;
    router(&[engine.addr], Settings { model_rewrites, ..settings() }).await
}

const RULE: &str = "[{name: canary, matches: [{model: incoming}], targets: [{model: target/1}]}]";

async fn asks(router: &RouterHandle, path: &str, headers: &str, body: &str) -> Got {
    send(router.http_addr(), post_with(path, headers, body)).await
}

fn last(engine: &Mock) -> Seen {
    engine.seen().pop().unwrap()
}

#[tokio::test]
async fn the_engine_gets_its_name_and_the_client_its_own() {
    let engine = Mock::start().await;
    engine.script(Script::Answer(200, ANSWERED.to_owned()));
    let older = "x-gateway-model-name-rewrite: target/1\r\n";
    let both = "x-gateway-model-name-rewrite: other\r\nx-llm-d-model-name-rewrite: target/1\r\n";
    let wins = "x-llm-d-model-name-rewrite: other\r\n";
    let table = [
        ("[]", BY_HEADER, ""),
        ("[]", older, ""),
        ("[]", both, ""),
        (RULE, "", "canary"),
        (RULE, wins, "canary"),
    ];
    for (rules, headers, rule) in table {
        let router = routed(&engine, rules).await;
        let headers = format!("{headers}x-request-id: rw\r\naccept-encoding: gzip\r\n");
        let got = asks(&router, "/v1/completions", &headers, ASKED).await;
        assert_eq!((got.status, got.body.as_str(), got.complete), (200, TOLD, true), "{headers}");
        let seen = last(&engine);
        assert_eq!(String::from_utf8(seen.body.clone()).unwrap(), SENT);
        assert_eq!(seen.header("content-length"), Some(SENT.len().to_string().as_str()));
        for name in ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"] {
            assert_eq!(seen.header(name), None);
        }
        let page = admin_json(&router, "/decisions/rw").await;
        assert_eq!(page["decision"]["model"], "target/1");
        assert_eq!(page["prompt"]["rewritten_from"], "incoming");
        assert_eq!(page["outcome"]["prompt_tokens"], 9);
        let labels = format!("rule=\"{rule}\",from=\"incoming\",to=\"target/1\"");
        let series = format!("kvroute_model_rewrites_total{{{labels}}}");
        assert_eq!(metric(&router, &series).await, 1.0);
        let mode = "kvroute_model_mode{model=\"target/1\",mode=\"approximate\"}";
        assert_eq!(metric(&router, mode).await, 1.0);
    }
}

#[tokio::test]
async fn a_stream_is_restored_wherever_it_is_cut() {
    let engine = Mock::start().await;
    let router = routed(&engine, RULE).await;
    let event = |model: &str, text: &str| {
        format!("data: {{\"model\": \"{model}\",\"choices\":[{{\"text\":\"{text}\"}}]}}\n\n")
    };
    let of = |model| {
        event(model, "a") + &event(model, "\\\"model\\\":\\\"target/1\\\"") + "data: [DONE]\n\n"
    };
    let (text, expected) = (of("target/1"), of("incoming"));
    let body = r#"{"model":"incoming","prompt":"x","stream":true}"#;
    for cut in (1..text.len()).step_by(5) {
        let (a, b) = text.as_bytes().split_at(cut);
        // With a length, which no longer fits, and without one.
        let head = match cut % 2 {
            0 => format!("content-length: {}\r\n\r\n", text.len()),
            _ => "\r\n".to_owned(),
        };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{head}");
        engine.script(Script::Raw(vec![head.into_bytes(), a.to_vec(), b.to_vec()]));
        let got = asks(&router, "/v1/completions", "", body).await;
        assert_eq!((got.body.as_str(), got.complete), (expected.as_str(), true), "cut {cut}");
        assert_eq!(got.headers.get("content-length"), None);
        assert_eq!(last(&engine).body, body.replace("incoming", "target/1").as_bytes());
    }
}

#[tokio::test]
async fn a_request_without_a_model_goes_out_as_it_came() {
    let engine = Mock::start().await;
    engine.script(Script::Answer(200, ANSWERED.to_owned()));
    let router = routed(&engine, "[]").await;
    let body = r#"{"prompt":"x"}"#;
    assert_eq!(asks(&router, "/v1/completions", "", body).await.status, 400);
    let headers = format!("{BY_HEADER}x-request-id: none\r\n");
    let got = asks(&router, "/v1/completions", &headers, body).await;
    assert_eq!((got.status, got.body.as_str()), (200, ANSWERED));
    assert_eq!(last(&engine).body, body.as_bytes());
    let page = admin_json(&router, "/decisions/none").await;
    assert_eq!(page["decision"]["model"], "target/1");
}

/// Coding clients count tokens under the name that they ask for.
#[tokio::test]
async fn counted_tokens_are_those_of_the_model_that_serves() {
    let engine = Mock::start().await;
    let rules = "[{name: all, targets: [{model: target/1}]}]";
    let router = routed(&engine, rules).await;
    let body = r#"{"messages":[],"model":"claude"}"#;
    let path = "/v1/messages/count_tokens";
    engine.script(Script::Answer(200, r#"{"input_tokens":3,"model":"target/1"}"#.to_owned()));
    let got = asks(&router, path, "", body).await;
    assert_eq!(got.body, r#"{"input_tokens":3,"model":"claude"}"#);
    assert_eq!(last(&engine).body, br#"{"messages":[],"model":"target/1"}"#);
    assert_eq!(asks(&router, path, "", "no JSON").await.status, 200);
    assert_eq!(last(&engine).body, b"no JSON");
}

#[tokio::test]
async fn answers_that_cannot_be_read_pass_as_they_are() {
    let engine = Mock::start().await;
    let router = routed(&engine, RULE).await;
    let body = r#"{"model":"incoming","prompt":"x"}"#;
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n{ANSWERED}",
        ANSWERED.len()
    );
    engine.script(Script::Raw(vec![answer.into_bytes()]));
    let got = asks(&router, "/v1/completions", "", body).await;
    assert_eq!((got.body.as_str(), got.complete), (ANSWERED, true));
    // Of an answer that breaks off, what was held back is passed on.
    let cut = "{\"id\":\"1\",\"model\":\"targ";
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{cut}");
    engine.script(Script::ResetAfter(answer.into_bytes()));
    let got = asks(&router, "/v1/completions", "", body).await;
    assert_eq!((got.body.as_str(), got.complete), (cut, false));
}

#[tokio::test]
async fn another_endpoint_gets_the_same_body() {
    let (bad, good) = (Mock::start().await, Mock::start().await);
    bad.script(Script::Close);
    let yaml = format!("kvroute: {{model_rewrites: {RULE}}}");
    let config = kvroute_wire::config::parse(&yaml, "test.yaml").unwrap();
    let model_rewrites = config.kvroute.limits.model_rewrites;
    let settings = Settings { model_rewrites, ..settings() };
    let router = round_robin(&[bad.addr, good.addr], settings).await;
    ready(&router, 2).await;
    for _ in 0..2 {
        let got = asks(&router, "/v1/completions", "", ASKED).await;
        assert_eq!(got.status, 200, "{got:?}");
    }
    assert!(!bad.seen().is_empty());
    assert!(good.seen().iter().all(|seen| seen.body == SENT.as_bytes()));
}
