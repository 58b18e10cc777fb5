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

/// Bytes of the body of a small request.
const SMALL_BYTES: usize = 200;

/// Tokens of a long answer.
pub const LONG_TOKENS: u32 = 1_000;

/// Long answers at once, where their tokens come one by one.
const PACED_CALLERS: usize = 64;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A short prompt, one JSON answer.
    Small,
    /// A whole prompt, one JSON answer.
    Big,
    /// A whole prompt, an answer streamed as fast as the engine can.
    Burst,
    /// A short prompt, a long answer streamed as fast as the engine can.
    Long,
    /// The same with time between the tokens, so that each is a chunk of its own.
    Paced,
}

impl Shape {
    /// Those that need engines without a gap between tokens.
    pub const CLOSED: [Shape; 4] = [Shape::Small, Shape::Big, Shape::Burst, Shape::Long];

    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Small => "200 bytes",
            Shape::Big => "whole prompt",
            Shape::Burst => "whole prompt, streamed",
            Shape::Long => "200 bytes, 1,000 tokens streamed at once",
            Shape::Paced => "64 streams of 1,000 tokens",
        }
    }

    fn callers(self, senders: usize) -> usize {
        if self == Shape::Paced { PACED_CALLERS } else { senders }
    }

    fn is_streamed(self) -> bool {
        matches!(self, Shape::Burst | Shape::Long | Shape::Paced)
    }

    fn body(self, workload: &Workload, position: usize) -> Bytes {
        let text = &*workload.prompt(position).text;
        match self {
            Shape::Big | Shape::Burst => self.body_of(workload, text),
            Shape::Small | Shape::Long | Shape::Paced => {
                let room = SMALL_BYTES.saturating_sub(self.body_of(workload, "").len());
                let mut end = room.min(text.len());
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                self.body_of(workload, &text[..end])
            }
        }
    }

    fn body_of(self, workload: &Workload, prompt: &str) -> Bytes {
        let is_long = matches!(self, Shape::Long | Shape::Paced);
        let tokens = if is_long { LONG_TOKENS } else { workload.spec.output_tokens };
        let mut body = json!({
            "model": MODEL,
            "max_tokens": tokens,
            "ignore_eos": true,
            "prompt": prompt,
        });
        if self.is_streamed() {
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
    /// CPU microseconds of the router for a request; where tokens are paced, for so many tokens as
    /// one answer has.
    pub cpu_us: f64,
    /// Of these, the part of an Endpoint Picker beside a proxy.
    pub picker_cpu_us: Option<f64>,
    /// Memory of the router at the end.
    pub rss_mb: f64,
    /// CPU microseconds of the engines for a request.
    pub engines_cpu_us: f64,
}

/// Of each shape the loop with the median CPU, with the errors of all.
pub fn medians(mut all: Vec<Measured>) -> Vec<Measured> {
    let mut medians = Vec::new();
    while let Some(first) = all.first() {
        let shape = first.shape;
        let (mut same, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|m| m.shape == shape);
        all = others;
        same.sort_by(|a, b| a.cpu_us.total_cmp(&b.cpu_us));
        let errors = same.iter().map(|measured| measured.errors).sum();
        medians.push(Measured { errors, ..same.swap_remove(same.len() / 2) });
    }
    medians
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

    /// Sends one body and reads the answer to its end; `seen` hears of each piece.
    pub async fn send(&self, body: Bytes, mut seen: impl FnMut(&Bytes)) -> anyhow::Result<()> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.uri)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = self.http.request(request).await?;
        let status = response.status();
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame?.data_ref().into_iter().for_each(&mut seen);
        }
        anyhow::ensure!(status.is_success(), "{status}");
        Ok(())
    }
}

#[derive(Default)]
struct Counts {
    answers: AtomicU64,
    errors: AtomicU64,
    /// Of streams; each event has two.
    line_ends: AtomicU64,
    stop: AtomicBool,
}

impl Counts {
    /// Answers so far, where tokens are paced by their tokens: they take longer than is measured.
    fn answers(&self, shape: Shape) -> f64 {
        match shape {
            Shape::Paced => {
                let events = self.line_ends.load(Ordering::Relaxed) as f64 / 2.0;
                events / f64::from(LONG_TOKENS)
            }
            _ => self.answers.load(Ordering::Relaxed) as f64,
        }
    }
}

/// Sends until it is told to stop.
async fn ask(shape: Shape, workload: Arc<Workload>, url: String, at: usize, counts: Arc<Counts>) {
    let sender = Sender::new(&url);
    let mut position = at;
    while !counts.stop.load(Ordering::Relaxed) {
        let answer = sender.send(shape.body(&workload, position), |piece| {
            if shape == Shape::Paced {
                let line_ends = piece.iter().filter(|byte| **byte == b'\n').count() as u64;
                counts.line_ends.fetch_add(line_ends, Ordering::Relaxed);
            }
        });
        let count = if answer.await.is_ok() { &counts.answers } else { &counts.errors };
        count.fetch_add(1, Ordering::Relaxed);
        position += 1;
    }
}

/// Loops for a while; those that are in the middle of a paced answer then are given up.
pub async fn run(
    shape: Shape,
    target: &Target,
    engines: &Engines,
    work: &Work,
    span: Duration,
) -> anyhow::Result<Measured> {
    let counts = Arc::new(Counts::default());
    let mut loops = JoinSet::new();
    for caller in 0..shape.callers(work.senders.len()) {
        let at = caller % work.senders.len();
        let (workload, url) = (work.senders[at].clone(), target.urls[at].clone());
        loops.spawn(ask(shape, workload, url, caller, counts.clone()));
    }
    tokio::time::sleep(WARMUP).await;
    let (begin, before) = (Instant::now(), counts.answers(shape));
    let (router, picker, engine) = (target.usage(), target.picker_usage(), engines.usage());
    tokio::time::sleep(span).await;
    let answers = (counts.answers(shape) - before).max(1e-9);
    let used = target.usage() - router;
    let us = |cpu_s: f64| cpu_s * 1e6 / answers;
    let measured = Measured {
        shape: shape.name(),
        requests: answers as u64,
        errors: 0,
        requests_per_s: answers / begin.elapsed().as_secs_f64(),
        cpu_us: us(used.cpu_s),
        picker_cpu_us: picker
            .zip(target.picker_usage())
            .map(|(before, after)| us((after - before).cpu_s)),
        rss_mb: target.usage().rss_mb,
        engines_cpu_us: us((engines.usage() - engine).cpu_s),
    };
    counts.stop.store(true, Ordering::Relaxed);
    if shape == Shape::Paced {
        loops.shutdown().await;
    }
    while let Some(ended) = loops.join_next().await {
        ended?;
    }
    Ok(Measured { errors: counts.errors.load(Ordering::Relaxed), ..measured })
}
