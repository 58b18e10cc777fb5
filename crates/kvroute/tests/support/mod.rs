//! Engines, a router and a client for end-to-end tests, all in this process, all on loopback.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use kvroute_core::plan::Plan;
use kvroute_lab::engine::{self, EngineConfig, EngineHandle};
use kvroute_lab::model::Profile;
use kvroute_router::{EventsSource, RouterConfig, RouterHandle, Tokenizers};
use kvroute_tokens::Tokenizer;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub const MODEL: &str = "demo";
/// Long enough for a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub async fn engine() -> EngineHandle {
    engine::serve(engine_config()).await.unwrap()
}

pub fn engine_config() -> EngineConfig {
    let profile = Profile::built_in("tiny").unwrap();
    EngineConfig::loopback(MODEL, Tokenizer::demo(), profile)
}

pub fn flag(engine: &EngineHandle) -> String {
    let (events, replay) = (engine.events_addr().unwrap(), engine.replay_addr().unwrap());
    format!("http://{},events=tcp://{events},replay=tcp://{replay}", engine.http_addr())
}

pub fn name(engine: &EngineHandle) -> String {
    engine.http_addr().to_string()
}

pub fn config(plan: Plan, flags: &[String]) -> RouterConfig {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    RouterConfig {
        plan,
        config: String::new(),
        seed: 1,
        http: Some(any),
        ext_proc: None,
        admin: Some(any),
        endpoints: flags.iter().map(|flag| flag.parse().unwrap()).collect(),
        endpoints_file: None,
        endpoints_missing: None,
        metrics: None,
        events: EventsSource::default().into(),
        tokenizers: Tokenizers { default: Some(Tokenizer::demo()), ..Tokenizers::default() },
        default_model: None,
        tls: None,
        record: None,
        upstream_metric_names: None,
    }
}

/// A router that has heard from every engine, and subscribed where its plan reads events.
pub async fn router(config: RouterConfig, engines: &[EngineHandle]) -> RouterHandle {
    let reads_events = config.plan.reads_events();
    let router = kvroute_router::start(config).await.unwrap();
    wait_until("every engine answers", || {
        let brain = router.brain();
        let answering = brain.fleet().iter().filter(|e| e.metrics().is_some()).count();
        let heard = engines.iter().all(|e| !reads_events || *e.subscribers().borrow() > 0);
        answering >= engines.len() && heard
    })
    .await;
    router
}

pub async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain: {what}");
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn cached_tokens(&self) -> u64 {
        self.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    }

    pub fn endpoint(&self) -> &str {
        &self.headers["x-kvroute-endpoint"]
    }
}

/// One exchange on a connection of its own.
pub async fn http(addr: SocketAddr, method: &str, path: &str, body: &str) -> Answer {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, rest) = text.split_once("\r\n\r\n").expect("an answer has a head");
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let chunked = headers.get("transfer-encoding").is_some_and(|value| value == "chunked");
    let body = if chunked { dechunk(rest) } else { rest.to_owned() };
    Answer { status, headers, body }
}

fn dechunk(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        body += &after[..size];
        rest = after[size..].strip_prefix("\r\n").unwrap_or_default();
    }
    body
}

pub async fn complete(router: &RouterHandle, prompt: &str) -> Answer {
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 4}).to_string();
    http(router.http_addr(), "POST", "/v1/completions", &body).await
}

pub async fn admin(router: &RouterHandle, path: &str) -> Value {
    http(router.admin_addr(), "GET", path, "").await.json()
}

/// The decision about an answered request.
pub async fn decision(router: &RouterHandle, answer: &Answer) -> Value {
    admin(router, &format!("/decisions/{}", answer.headers["x-request-id"])).await
}

/// The stream of one engine, as the admin address shows it.
pub async fn stream(router: &RouterHandle, engine: &EngineHandle) -> Value {
    let index = admin(router, "/index").await;
    let endpoints = index["endpoints"].as_array().unwrap().clone();
    let wanted = name(engine);
    endpoints.into_iter().find(|e| e["endpoint"] == wanted.as_str()).unwrap()["stream"].clone()
}

/// Every batch that these engines published has been applied.
pub async fn settled(router: &RouterHandle, engines: &[&EngineHandle]) {
    for engine in engines {
        let wanted = name(engine);
        wait_until("events have been applied", || {
            let brain = router.brain();
            let id = brain.fleet().by_name(&wanted).map(|endpoint| endpoint.id);
            id.and_then(|id| brain.stream_counters(id))
                .is_some_and(|counters| counters.applied >= engine.batches())
        })
        .await;
    }
}

/// A prompt of about `words` tokens that begins like all of its group.
pub fn prompt(group: usize, question: usize) -> String {
    let mut text = format!("Rules of group {group}.");
    for i in 0..120 {
        text += &format!(" rule {} of {group}", i * 7 + group);
    }
    text + &format!(" Question {question}: what about {}?", question * 31)
}
