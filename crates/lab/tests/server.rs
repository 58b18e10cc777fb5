//! A simulated engine over loopback, as its clients see it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod recording;
mod support;

use std::collections::{BTreeMap, BTreeSet};

use kvroute_core::event::KvEvent;
use kvroute_lab::model::Adapter;
use serde_json::{Value, json};
use support::{Zmtp, call, engine, get, metric, post};

fn prompt(head: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| 40 + (head * 7 + i) % 50).collect()
}

fn completion(prompt: &[u32], max_tokens: u32) -> Value {
    json!({"model": "base", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0})
}

/// Names of the fields of a JSON value, nested with dots, list indices left out.
fn fields(value: &Value, path: &str, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, inner)| {
            let path = format!("{path}.{key}");
            fields(inner, &path, out);
            out.insert(path);
        }),
        Value::Array(items) => items.iter().for_each(|inner| fields(inner, path, out)),
        _ => {}
    }
}

fn field_set(value: &Value) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    fields(value, "", &mut out);
    out
}

#[tokio::test]
async fn answers_have_the_recorded_fields() {
    let engine = engine(|_| {}).await;
    let address = engine.http_addr();
    let recorded: Vec<Value> = serde_json::from_str(&recording::read("responses.json")).unwrap();
    let chat = json!({"model": "base", "max_tokens": 4, "temperature": 0,
        "messages": [{"role": "user", "content": "hello there"}]});
    for expected in &recorded {
        let path = expected["path"].as_str().unwrap();
        let label = expected["label"].as_str().unwrap();
        let answer = match label {
            "chat-turn-0" => post(address, path, chat.clone()).await,
            "shared-prefix-0" => post(address, path, completion(&prompt(0, 40), 8)).await,
            "n2-greedy-same-decode" => {
                let body = json!({"prompt": prompt(1, 9), "n": 2, "temperature": 0});
                post(address, path, body).await
            }
            "reset_prefix_cache" => post(address, path, json!({})).await,
            _ => get(address, path).await,
        };
        assert_eq!(answer.status, expected["status"], "{label}: {}", answer.body);
        let ours = answer.json();
        match label {
            // Of these answers, id, choices and usage were recorded.
            "chat-turn-0" | "shared-prefix-0" => {
                for key in ["choices", "usage"] {
                    let theirs = expected["response"].get(key).unwrap_or(&expected[key]);
                    assert_eq!(field_set(&ours[key]), field_set(theirs), "{label} {key}");
                }
                assert_eq!(ours["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
            }
            "n2-greedy-same-decode" | "reset_prefix_cache" | "version" => {
                assert_eq!(ours, expected["response"], "{label}");
            }
            _ => assert_eq!(field_set(&ours), field_set(&expected["response"]), "{label}"),
        }
    }
}

#[tokio::test]
async fn a_streamed_completion_has_one_chunk_per_token_then_usage_then_done() {
    let engine = engine(|_| {}).await;
    let address = engine.http_addr();
    let mut body = completion(&prompt(0, 40), 5);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let cold = post(address, "/v1/completions", body.clone()).await.events();
    let warm = post(address, "/v1/completions", body.clone()).await.events();
    assert_eq!(cold.len(), 6);
    for (i, chunk) in cold[..5].iter().enumerate() {
        assert_eq!(chunk["object"], "text_completion");
        assert_eq!(chunk["usage"]["completion_tokens"], i + 1);
        assert!(chunk["usage"].get("prompt_tokens_details").is_none());
        let finish = if i == 4 { json!("length") } else { Value::Null };
        assert_eq!(chunk["choices"][0]["finish_reason"], finish);
        assert!(!chunk["choices"][0]["text"].as_str().unwrap().is_empty());
    }
    assert_eq!(cold[5]["choices"], json!([]));
    assert_eq!(cold[5]["usage"]["total_tokens"], 45);
    assert_eq!(cold[5]["usage"]["prompt_tokens_details"], json!({"cached_tokens": 0}));
    assert_eq!(warm[5]["usage"]["prompt_tokens_details"], json!({"cached_tokens": 32}));
    let text = |events: &[Value]| -> String {
        events[..5].iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect()
    };
    assert_eq!(text(&cold), text(&warm), "temperature 0 repeats itself");
    body["stream"] = false.into();
    let whole = post(address, "/v1/completions", body).await.json();
    assert_eq!(whole["choices"][0]["text"], text(&cold));
}

#[tokio::test]
async fn a_streamed_chat_opens_with_the_role() {
    let engine = engine(|_| {}).await;
    let body = json!({"model": "base", "stream": true, "max_tokens": 3, "n": 2,
        "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": "tell me a long story about a router"}]});
    let events = post(engine.http_addr(), "/v1/chat/completions", body).await.events();
    assert_eq!(events.len(), 2 * (1 + 3) + 1);
    for index in [0, 1] {
        let own: Vec<&Value> =
            events.iter().filter(|e| e["choices"][0]["index"] == json!(index)).collect();
        assert_eq!(own[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(own[0].get("prompt_token_ids"), Some(&Value::Null));
        assert!(own[1]["choices"][0]["delta"].get("role").is_none());
        assert_eq!(own[3]["choices"][0]["finish_reason"], "length");
    }
    let usage = &events[8]["usage"];
    assert_eq!(usage["completion_tokens"], 6);
    assert!(usage["prompt_tokens_details"]["created_cache_tokens"].is_u64());
}

#[tokio::test]
async fn bad_requests_get_vllms_errors_and_the_next_one_works() {
    let engine = engine(|config| config.max_model_len = 64).await;
    let address = engine.http_addr();
    let long = prompt(0, 64);
    let table = [
        ("/v1/completions", "{", 400, "Bad Request"),
        ("/v1/completions", "[]", 400, "Bad Request"),
        ("/v1/completions", r#"{"prompt":{"a":1}}"#, 400, "Bad Request"),
        ("/v1/completions", r#"{"prompt":"x","stream":"yes"}"#, 400, "Bad Request"),
        ("/v1/completions", r#"{"prompt":[]}"#, 400, "Error"),
        ("/v1/completions", r#"{"prompt":"hello","max_tokens":0}"#, 400, "BadRequestError"),
        ("/v1/completions", r#"{"model":"x","prompt":"hello"}"#, 404, "NotFoundError"),
        ("/v1/completions", r#"{"prompt":"hello","max_tokens":64}"#, 400, "BadRequestError"),
        ("/v1/nothing", "{}", 404, "Not Found"),
        ("/v1/models", "{}", 405, "Method Not Allowed"),
    ];
    for (path, body, status, kind) in table {
        let answer = call(address, "POST", path, body).await;
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["code"], status, "{path} {body}");
        let text = error["type"].as_str().unwrap();
        assert!(text == kind || text.ends_with(kind) || kind == "Error", "{path} {body}: {text}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    }
    let answer = post(address, "/v1/completions", completion(&long, 1)).await;
    assert_eq!(answer.json()["error"]["param"], "input_tokens");
    let good = post(address, "/v1/completions", completion(&long[..60], 4)).await;
    assert_eq!(good.status, 200, "{}", good.body);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequence() {
    // Slow enough that the answer would take minutes.
    let engine = engine(|config| config.speed = 0.05).await;
    let address = engine.http_addr();
    let mut body = completion(&prompt(0, 40), 10_000);
    body["stream"] = true.into();
    let streamed = tokio::spawn(async move { post(address, "/v1/completions", body).await.status });
    let whole = tokio::spawn(async move {
        post(address, "/v1/completions", completion(&prompt(9, 40), 10_000)).await.status
    });
    while engine.stats().running < 2 {
        tokio::task::yield_now().await;
    }
    streamed.abort();
    whole.abort();
    while engine.stats().running > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(engine.stats().aborted, 2);
    let aborted =
        metric(address, "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\"");
    assert_eq!(aborted.await, 2.0);
}

/// What a metrics page consists of.
struct PageShape {
    /// Family name to type.
    types: BTreeMap<String, String>,
    /// Sample names with their label names.
    samples: BTreeSet<(String, Vec<String>)>,
}

fn page_shape(page: &str) -> PageShape {
    let mut types = BTreeMap::new();
    let mut samples = BTreeSet::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            types.insert(name.to_owned(), kind.to_owned());
        } else if !line.starts_with('#') && !line.contains("_bucket{") {
            let (series, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            // No label value of these pages holds `",` followed by a letter.
            let labels = labels.trim_end_matches('}').split("\",").filter(|l| !l.is_empty());
            let names = labels.map(|label| label.split('=').next().unwrap().to_owned()).collect();
            samples.insert((name.to_owned(), names));
        }
    }
    PageShape { types, samples }
}

#[tokio::test]
async fn metrics_have_the_recorded_names_labels_and_types() {
    let adapters = vec![Adapter { name: "lora-a".into(), path: "a".into() }];
    let engine = engine(|config| config.adapters = adapters).await;
    let address = engine.http_addr();
    let mut body = completion(&prompt(0, 40), 3);
    body["model"] = "lora-a".into();
    for _ in 0..2 {
        assert_eq!(post(address, "/v1/completions", body.clone()).await.status, 200);
    }
    let ours = get(address, "/metrics").await;
    assert_eq!(ours.kind, "text/plain; version=0.0.4; charset=utf-8");
    let recorded = recording::read("metrics.prom") + &recording::read("metrics-lora.prom");
    let PageShape { types: their_types, samples: their_samples } = page_shape(&recorded);
    let PageShape { types: our_types, samples: our_samples } = page_shape(&ours.body);
    // The process's own figures are not the engine's.
    let own = |name: &str| !name.starts_with("process_");
    for (name, kind) in their_types.iter().filter(|(name, _)| own(name)) {
        assert_eq!(our_types.get(name), Some(kind), "{name}");
    }
    assert!(
        our_types
            .keys()
            .filter(|name| own(name))
            .all(|name| { their_types.contains_key(name) || name == "vllm:lora_requests_info" })
    );
    let theirs: BTreeSet<_> = their_samples.iter().filter(|(name, _)| own(name)).collect();
    let ours: BTreeSet<_> = our_samples.iter().filter(|(name, _)| own(name)).collect();
    assert_eq!(ours, theirs);
    assert_eq!(metric(address, "vllm:prefix_cache_queries_total").await, 80.0);
    assert_eq!(metric(address, "vllm:prefix_cache_hits_total").await, 32.0);
    assert_eq!(metric(address, "vllm:time_to_first_token_seconds_count").await, 2.0);
    assert_eq!(metric(address, "vllm:kv_cache_usage_perc").await, 0.0);
}

#[tokio::test]
async fn events_come_in_order_before_the_answer_and_can_be_replayed() {
    let engine = engine(|_| {}).await;
    let address = engine.http_addr();
    let mut subscriber = Zmtp::subscriber(&engine).await;
    for head in 0..4 {
        assert_eq!(
            post(address, "/v1/completions", completion(&prompt(head, 40), 2)).await.status,
            200
        );
    }
    let mut raw = Vec::new();
    for sequence in 0..4 {
        let frames = subscriber.message().await.unwrap();
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[0], b"kv@127.0.0.1:8000@base");
        assert_eq!(frames[1], u64::to_be_bytes(sequence));
        raw.push(frames);
    }
    let replay = engine.replay_addr().unwrap();
    for start in [0, 2, 1_000_000] {
        let messages = Zmtp::replay(replay, start).await;
        let (end, kept) = messages.split_last().unwrap();
        let first = (start as usize).min(4);
        assert_eq!(kept.len(), 4 - first);
        for (message, original) in kept.iter().zip(&raw[first..]) {
            assert_eq!(message[0], b"");
            assert_eq!(message[1..], original[..]);
        }
        // The recorded end marker has four frames: empty, empty, eight ff, empty.
        assert_eq!(*end, [&b""[..], b"", &[0xff; 8], b""]);
    }
}

#[tokio::test]
async fn replay_frames_are_the_recorded_ones() {
    let lines = recording::read("replay.jsonl");
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["nframes"], 4);
        if line["payload_len"] == 0 {
            let frames: Vec<Vec<u8>> = line["frames_b64"]
                .as_array()
                .unwrap()
                .iter()
                .map(|frame| recording::base64(frame.as_str().unwrap()))
                .collect();
            assert_eq!(frames, [&b""[..], b"", &[0xff; 8], b""]);
        }
    }
    let recorded = recording::Recording::load("sha256_cbor");
    for (i, batch) in recorded.batches.iter().enumerate() {
        assert_eq!(batch.sequence, (i as u64).to_be_bytes());
        assert_eq!(batch.batch.rank, Some(0));
    }
}

#[tokio::test]
async fn lost_events_are_a_gap_that_replay_fills_until_it_forgets() {
    let engine = engine(|_| {}).await;
    let address = engine.http_addr();
    let mut subscriber = Zmtp::subscriber(&engine).await;
    let send = async |head| {
        let answer = post(address, "/v1/completions", completion(&prompt(head, 40), 1)).await;
        assert_eq!(answer.status, 200);
    };
    send(0).await;
    engine.drop_next_batches(1);
    send(1).await;
    send(2).await;
    engine.pause_events(true);
    send(3).await;
    engine.pause_events(false);
    send(4).await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(subscriber.batch().await.0);
    }
    assert_eq!(seen, [0, 2, 4]);
    assert_eq!(engine.batches(), 5);
    let replay = engine.replay_addr().unwrap();
    assert_eq!(Zmtp::replay(replay, 1).await.len(), 4 + 1);
    engine.forget_replay();
    assert_eq!(Zmtp::replay(replay, 1).await.len(), 1);
}

#[tokio::test]
async fn a_reset_is_refused_while_busy_and_shows_with_the_next_request() {
    let engine = engine(|_| {}).await;
    let address = engine.http_addr();
    let mut subscriber = Zmtp::subscriber(&engine).await;
    let body = completion(&prompt(0, 40), 1);
    post(address, "/v1/completions", body.clone()).await;
    assert_eq!(post(address, "/reset_prefix_cache", json!({})).await.json()["success"], true);
    let answer = post(address, "/v1/completions", body).await.json();
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    subscriber.batch().await;
    let (_, batch) = subscriber.batch().await;
    assert!(matches!(batch.events[..], [KvEvent::Cleared, KvEvent::Stored(_)]), "{batch:?}");
    // Steps of a tenth of a second: long enough to ask in between.
    engine.set_slowdown(1000.0);
    let busy = tokio::spawn(async move {
        post(address, "/v1/completions", completion(&prompt(1, 40), 10_000)).await.status
    });
    while engine.stats().running == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(post(address, "/reset_prefix_cache", json!({})).await.json()["success"], false);
    busy.abort();
}

#[tokio::test]
async fn a_killed_engine_breaks_connections_and_another_takes_its_ports() {
    let engine = engine(|config| config.speed = 0.05).await;
    let address = engine.http_addr();
    let mut subscriber = Zmtp::subscriber(&engine).await;
    let mut body = completion(&prompt(0, 40), 10_000);
    body["stream"] = true.into();
    let request = hyper::Request::post(format!("http://{address}/v1/completions"))
        .body(http_body_util::Full::new(bytes::Bytes::from(body.to_string())))
        .unwrap();
    let mut answer = support::http().request(request).await.unwrap().into_body();
    let first = http_body_util::BodyExt::frame(&mut answer).await.unwrap().unwrap();
    assert!(first.data_ref().unwrap().starts_with(b"data: {"));
    assert_eq!(subscriber.batch().await.0, 0);
    let config = engine.config().clone();
    engine.kill().await;
    loop {
        match http_body_util::BodyExt::frame(&mut answer).await {
            Some(Ok(_)) => {}
            Some(Err(_)) => break,
            None => panic!("a broken answer must not look complete"),
        }
    }
    assert_eq!(subscriber.message().await, None);
    let again = kvroute_lab::engine::serve(config).await.unwrap();
    assert_eq!((again.http_addr(), again.batches()), (address, 0));
    assert_eq!(get(address, "/health").await.status, 200);
}

#[tokio::test]
async fn a_shutdown_answers_what_is_in_flight() {
    let engine = engine(|config| config.speed = 1.0).await;
    let address = engine.http_addr();
    let answer = tokio::spawn(async move {
        post(address, "/v1/completions", completion(&prompt(0, 40), 50)).await
    });
    while engine.stats().running == 0 {
        tokio::task::yield_now().await;
    }
    engine.shutdown().await;
    let answer = answer.await.unwrap().json();
    assert_eq!(answer["usage"]["completion_tokens"], 50);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn the_small_endpoints_answer() {
    let adapters = vec![Adapter { name: "lora-a".into(), path: "/adapters/a".into() }];
    let engine = engine(|config| config.adapters = adapters).await;
    let address = engine.http_addr();
    let text = "the router sends a request";
    let tokenized =
        post(address, "/tokenize", json!({"model": "base", "prompt": text})).await.json();
    let tokens = tokenized["tokens"].as_array().unwrap();
    assert_eq!(tokenized["count"], tokens.len());
    assert_eq!(tokenized["max_model_len"], 16_384);
    let back =
        post(address, "/detokenize", json!({"model": "base", "tokens": tokens})).await.json();
    assert_eq!(back["prompt"], text);
    let chat = json!({"model": "base", "messages": [{"role": "user", "content": text}]});
    let chat = post(address, "/tokenize", chat).await.json();
    assert!(chat["count"].as_u64().unwrap() > tokens.len() as u64);
    let models = get(address, "/v1/models").await.json();
    assert_eq!(models["data"][1]["id"], "lora-a");
    assert_eq!(models["data"][1]["parent"], "base");
    assert_eq!(models["data"][1]["max_model_len"], Value::Null);
    let generate = json!({"token_ids": prompt(0, 20), "sampling_params": {"max_tokens": 3},
        "model": "base", "stream": false});
    let generated = post(address, "/inference/v1/generate", generate).await.json();
    assert_eq!(generated["choices"][0]["token_ids"].as_array().unwrap().len(), 3);
    assert_eq!(generated["usage"]["prompt_tokens"], 20);
    let embeddings = json!({"model": "base", "input": ["one", "two"]});
    let embeddings = post(address, "/v1/embeddings", embeddings).await.json();
    assert_eq!(embeddings["data"].as_array().unwrap().len(), 2);
    assert_eq!(get(address, "/load").await.json()["server_load"], 0);
    let two = json!({"prompt": ["first prompt", "second prompt"], "max_tokens": 2, "n": 2});
    let two = post(address, "/v1/completions", two).await.json();
    assert_eq!(two["choices"].as_array().unwrap().len(), 4);
    assert_eq!(two["choices"][3]["index"], 3);
}
