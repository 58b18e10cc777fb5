//! A few connections that each send the next request when the last is answered: what a request
//! costs a router that does not go to sleep in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engines::{Engines, MODEL};
use crate::target::Target;
use crate::work::Work;
use crate::workload::Workload;

/// Loops before anything is measured.
const WARMUP: Duration = Duration::from_secs(2);

/// Prompt bytes of a small request.
const SMALL_BYTES: usize = 80;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A short prompt, one JSON answer.
    Small,
    /// A whole prompt, one JSON answer.
    Big,
    /// A whole prompt, an answer streamed as fast as the engine can.
    Burst,
}

impl Shape {
    pub const ALL: [Shape; 3] = [Shape::Small, Shape::Big, Shape::Burst];

    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Small => "small",
            Shape::Big => "30 KB",
            Shape::Burst => "30 KB, streamed",
        }
    }

    fn body(self, workload: &Workload, position: usize) -> Bytes {
        let text = &workload.prompt(position).text;
        let prompt = match self {
            Shape::Small => &text[..text.len().min(SMALL_BYTES)],
            Shape::Big | Shape::Burst => text,
        };
        let mut body = json!({
            "model": MODEL,
            "max_tokens": workload.spec.output_tokens,
            "ignore_eos": true,
            "prompt": prompt,
        });
        if self == Shape::Burst {
            body["stream"] = true.into();
            body["stream_options"] = json!({"include_usage": true});
        }
        body.to_string().into()
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub shape: &'static str,
    pub requests: u64,
    pub errors: u64,
    pub requests_per_s: f64,
    /// CPU microseconds of the router for a request.
    pub cpu_us: f64,
    /// CPU microseconds of the engines for a request.
    pub engines_cpu_us: f64,
}

/// One connection's client.
pub struct Sender {
    http: Client<HttpConnector, Full<Bytes>>,
    uri: String,
}

impl Sender {
    pub fn new(url: &str) -> Sender {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let http = Client::builder(TokioExecutor::new()).build(connector);
        Sender { http, uri: format!("{url}/v1/completions") }
    }

    /// Sends one body and reads the answer to its end.
    pub async fn send(&self, body: Bytes) -> anyhow::Result<usize> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.uri)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = self.http.request(request).await?;
        let status = response.status();
        let mut body = response.into_body();
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            bytes += frame?.data_ref().map_or(0, Bytes::len);
        }
        anyhow::ensure!(status.is_success(), "{status}");
        Ok(bytes)
    }
}

#[derive(Default)]
struct Counts {
    answers: AtomicU64,
    errors: AtomicU64,
    stop: AtomicBool,
}

/// One loop for each sender, for a while.
pub async fn run(
    shape: Shape,
    target: &Target,
    engines: &Engines,
    work: &Work,
    span: Duration,
) -> anyhow::Result<Measured> {
    let counts = Arc::new(Counts::default());
    let mut loops = JoinSet::new();
    for (workload, url) in work.senders.iter().zip(&target.urls) {
        let (workload, sender, counts) = (workload.clone(), Sender::new(url), counts.clone());
        loops.spawn(async move {
            let mut position = 0;
            while !counts.stop.load(Ordering::Relaxed) {
                let answer = sender.send(shape.body(&workload, position)).await;
                let count = if answer.is_ok() { &counts.answers } else { &counts.errors };
                count.fetch_add(1, Ordering::Relaxed);
                position += 1;
            }
        });
    }
    tokio::time::sleep(WARMUP).await;
    let answers = || counts.answers.load(Ordering::Relaxed);
    let (begin, before) = (Instant::now(), answers());
    let (router, engine) = (target.usage(), engines.usage());
    tokio::time::sleep(span).await;
    let requests = answers() - before;
    let router = target.usage() - router;
    let engine = engines.usage() - engine;
    let requests_per_s = requests as f64 / begin.elapsed().as_secs_f64();
    counts.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = loops.join_next().await {
        ended?;
    }
    let errors = counts.errors.load(Ordering::Relaxed);
    let cpu_us = router.cpu_s * 1e6 / requests.max(1) as f64;
    let engines_cpu_us = engine.cpu_s * 1e6 / requests.max(1) as f64;
    let shape = shape.name();
    Ok(Measured { shape, requests, errors, requests_per_s, cpu_us, engines_cpu_us })
}
