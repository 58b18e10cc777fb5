//! What the tests need around a router: engines that do as they are told, a client that shows
//! what really came, and waiting for conditions.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_core::settings::Settings;
use kvroute_router::{EventsSource, RouterConfig, RouterHandle, Tokenizers};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

pub mod events;

pub const LONG: Duration = Duration::from_secs(20);

/// Waits until `condition` holds; panics with `what` when it never does.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = tokio::time::Instant::now() + LONG;
    while !condition() {
        assert!(tokio::time::Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a mock engine does with the next requests.
#[derive(Clone)]
pub enum Script {
    /// A complete answer.
    Answer(u16, String),
    /// These bytes, head included, piece by piece with a pause between them; then close.
    Raw(Vec<Vec<u8>>),
    /// Close without a word.
    Close,
    /// Reset the connection without a word.
    Reset,
    /// Say nothing until the client goes.
    Stall,
    /// These bytes, then wait for `go`, then these, then keep the connection.
    Gate(Vec<u8>, Arc<Notify>, Vec<u8>),
    /// These bytes, then reset.
    ResetAfter(Vec<u8>),
    /// An answer before the body was read, then close.
    Refuse(Vec<u8>),
}

/// A request that an engine got.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

#[derive(Default)]
pub struct MockState {
    pub seen: Mutex<Vec<Seen>>,
    pub scrapes: AtomicUsize,
    /// Connections that carried at least one request other than a scrape.
    pub connections: AtomicUsize,
    /// Requests whose client went away before the answer was complete.
    pub cancelled: AtomicUsize,
    /// Pieces of `Script::Raw` that the socket has taken.
    pub pieces: AtomicUsize,
    pub script: Mutex<Option<Script>>,
    pub metrics: Mutex<Option<String>>,
    pub event_sources: Mutex<Option<String>>,
    pub models: Mutex<String>,
}

/// A mock engine on a port of its own.
pub struct Mock {
    pub addr: SocketAddr,
    pub state: Arc<MockState>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub const METRICS: &str = "vllm:num_requests_running{engine=\"0\"} 0\n\
    vllm:num_requests_waiting{engine=\"0\"} 0\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.1\n";
pub const OK_BODY: &str = "{\"id\":\"x\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\
    \"completion_tokens\":2,\"prompt_tokens_details\":{\"cached_tokens\":4}}}";

impl Mock {
    pub async fn start() -> Mock {
        Mock::start_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_at(addr: SocketAddr) -> Mock {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(MockState::default());
        *state.script.lock() = Some(Script::Answer(200, OK_BODY.to_owned()));
        *state.metrics.lock() = Some(METRICS.to_owned());
        *state.models.lock() = r#"{"data":[{"id":"m"}]}"#.to_owned();
        let there = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(connection(stream, Arc::clone(&there)));
            }
        });
        Mock { addr, state, task }
    }

    pub fn script(&self, script: Script) {
        *self.state.script.lock() = Some(script);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().clone()
    }

    pub fn cancelled(&self) -> usize {
        self.state.cancelled.load(Ordering::SeqCst)
    }

    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    pub fn scrapes(&self) -> usize {
        self.state.scrapes.load(Ordering::SeqCst)
    }
}

async fn connection(mut stream: TcpStream, state: Arc<MockState>) {
    let mut buf = Vec::new();
    let mut counted = false;
    loop {
        let Some(seen) = read_request(&mut stream, &mut buf, &state).await else { return };
        let script = state.script.lock().clone();
        let page = match seen.target.as_str() {
            "/metrics" => {
                state.scrapes.fetch_add(1, Ordering::SeqCst);
                Some(state.metrics.lock().clone())
            }
            "/v1/models" if seen.header("x-request-id").is_none() => {
                Some(Some(state.models.lock().clone()))
            }
            "/kv_event_sources" => Some(state.event_sources.lock().clone()),
            _ => None,
        };
        if let Some(page) = page {
            let status = if page.is_some() { 200 } else { 404 };
            let text = answer(status, &page.unwrap_or_default());
            if stream.write_all(text.as_bytes()).await.is_err() {
                return;
            }
            continue;
        }
        if !std::mem::replace(&mut counted, true) {
            state.connections.fetch_add(1, Ordering::SeqCst);
        }
        state.seen.lock().push(seen);
        if !play(&mut stream, script, &state).await {
            return;
        }
    }
}

/// Whether the connection stays.
async fn play(stream: &mut TcpStream, script: Option<Script>, state: &MockState) -> bool {
    match script {
        Some(Script::Answer(status, body)) => {
            stream.write_all(answer(status, &body).as_bytes()).await.is_ok()
        }
        Some(Script::Raw(pieces)) => {
            for piece in pieces {
                if stream.write_all(&piece).await.is_err() {
                    state.cancelled.fetch_add(1, Ordering::SeqCst);
                    return false;
                }
                state.pieces.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            false
        }
        Some(Script::Reset) => {
            stream.set_zero_linger().unwrap();
            false
        }
        Some(Script::ResetAfter(bytes)) => {
            let _ = stream.write_all(&bytes).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            stream.set_zero_linger().unwrap();
            false
        }
        Some(Script::Stall) => {
            gone(stream).await;
            state.cancelled.fetch_add(1, Ordering::SeqCst);
            false
        }
        Some(Script::Gate(first, go, rest)) => {
            if stream.write_all(&first).await.is_err() {
                return false;
            }
            tokio::select! {
                () = go.notified() => stream.write_all(&rest).await.is_ok(),
                () = gone(stream) => {
                    state.cancelled.fetch_add(1, Ordering::SeqCst);
                    false
                }
            }
        }
        Some(Script::Close | Script::Refuse(_)) | None => false,
    }
}

async fn gone(stream: &mut TcpStream) {
    let mut rest = [0; 64];
    while let Ok(n) = stream.read(&mut rest).await {
        if n == 0 {
            return;
        }
    }
}

pub fn answer(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads one request; under `Script::Refuse` answers as soon as the head is there.
async fn read_request(
    stream: &mut TcpStream,
    buf: &mut Vec<u8>,
    state: &MockState,
) -> Option<Seen> {
    let end = loop {
        if let Some(at) = find(buf, b"\r\n\r\n") {
            break at + 4;
        }
        fill(stream, buf).await?;
    };
    let head = String::from_utf8(buf.drain(..end).collect()).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<(String, String)> = lines
        .filter_map(|l| l.split_once(": "))
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .collect();
    let mut seen = Seen { method, target, headers, body: Vec::new() };
    let early = match &*state.script.lock() {
        Some(Script::Refuse(bytes)) if seen.target.starts_with("/v1/c") => Some(bytes.clone()),
        _ => None,
    };
    if let Some(early) = early {
        let _ = stream.write_all(&early).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        return None;
    }
    if let Some(length) = seen.header("content-length").and_then(|v| v.parse::<usize>().ok()) {
        while buf.len() < length {
            fill(stream, buf).await?;
        }
        seen.body = buf.drain(..length).collect();
    } else if seen.header("transfer-encoding").is_some() {
        loop {
            let end = loop {
                if let Some(at) = find(buf, b"\r\n") {
                    break at;
                }
                fill(stream, buf).await?;
            };
            let line = String::from_utf8(buf.drain(..end + 2).collect()).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            while buf.len() < size + 2 {
                fill(stream, buf).await?;
            }
            seen.body.extend(buf.drain(..size));
            buf.drain(..2);
            if size == 0 {
                break;
            }
        }
    }
    Some(seen)
}

async fn fill(stream: &mut TcpStream, buf: &mut Vec<u8>) -> Option<()> {
    match stream.read_buf(buf).await {
        Ok(n) if n > 0 => Some(()),
        _ => None,
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// Settings that make tests quick.
pub fn settings() -> Settings {
    Settings {
        scrape_interval_ms: 10,
        scrape_backoff_max_ms: 100,
        discovery_interval_ms: 50,
        failure_backoff_ms: 10,
        failure_backoff_max_ms: 20,
        ..Settings::default()
    }
}

pub fn plan(settings: Settings) -> Plan {
    let config =
        EndpointPickerConfig { kvroute: settings.into(), ..EndpointPickerConfig::precise() };
    Plan::build(&config, Experimental::Refused).unwrap()
}

/// A router for these endpoints.
pub fn config(endpoints: &[SocketAddr], settings: Settings) -> RouterConfig {
    RouterConfig {
        plan: plan(settings),
        config: String::new(),
        seed: 1,
        http: Some("127.0.0.1:0".parse().unwrap()),
        ext_proc: None,
        admin: Some("127.0.0.1:0".parse().unwrap()),
        endpoints: endpoints.iter().map(|a| format!("http://{a}").parse().unwrap()).collect(),
        endpoints_file: None,
        endpoints_missing: None,
        metrics: None,
        events: EventsSource::Off.into(),
        tokenizers: Tokenizers::default(),
        default_model: None,
        tls: None,
        record: None,
        upstream_metric_names: None,
    }
}

/// A router that takes endpoint after endpoint, so that each gets its share.
pub async fn round_robin(endpoints: &[SocketAddr], settings: Settings) -> RouterHandle {
    let plan = Plan { settings: settings.clone(), ..Plan::baseline_round_robin() };
    kvroute_router::start(RouterConfig { plan, ..config(endpoints, settings) }).await.unwrap()
}

pub async fn router(endpoints: &[SocketAddr], settings: Settings) -> RouterHandle {
    kvroute_router::start(config(endpoints, settings)).await.unwrap()
}

/// What a client got.
#[derive(Clone, Debug)]
pub struct Got {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
    /// The body ended as its framing says.
    pub complete: bool,
}

impl Got {
    pub fn error_message(&self) -> String {
        let json: serde_json::Value = serde_json::from_str(&self.body).expect(&self.body);
        json["error"]["message"].as_str().unwrap_or_default().to_owned()
    }
}

/// One request on a connection of its own.
pub async fn send(addr: SocketAddr, request: impl AsRef<[u8]>) -> Got {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    // The router may answer and close before it has read everything.
    let _ = stream.write_all(request.as_ref()).await;
    read_answer(&mut stream).await
}

/// Reads one answer, to the end that its framing tells.
pub async fn read_answer(stream: &mut TcpStream) -> Got {
    tokio::time::timeout(LONG, read_answer_inner(stream)).await.expect("an answer in time")
}

async fn read_answer_inner(stream: &mut TcpStream) -> Got {
    let mut buf = Vec::new();
    let end = loop {
        if let Some(at) = find(&buf, b"\r\n\r\n") {
            break at + 4;
        }
        fill(stream, &mut buf).await.expect("the head of an answer");
    };
    let head = String::from_utf8(buf.drain(..end).collect()).unwrap();
    let mut lines = head.lines();
    let status: u16 = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|l| l.split_once(": "))
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .collect();
    let chunked = headers.contains_key("transfer-encoding");
    let length = headers.get("content-length").and_then(|v| v.parse::<usize>().ok());
    let length = if status == 204 { Some(0) } else { length };
    let mut body = Vec::new();
    let complete = if chunked {
        loop {
            if let Some((data, rest)) = take_chunk(&buf) {
                let last = data.is_empty();
                body.extend_from_slice(&data);
                buf = rest;
                if last {
                    break true;
                }
            } else if fill(stream, &mut buf).await.is_none() {
                break false;
            }
        }
    } else {
        let length = length.unwrap_or(usize::MAX);
        while buf.len() < length && fill(stream, &mut buf).await.is_some() {}
        body = buf;
        length == usize::MAX || body.len() == length
    };
    Got { status, headers, body: String::from_utf8_lossy(&body).into_owned(), complete }
}

fn take_chunk(buf: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let line = find(buf, b"\r\n")?;
    let size = usize::from_str_radix(std::str::from_utf8(&buf[..line]).ok()?, 16).ok()?;
    let end = line + 2 + size + 2;
    (buf.len() >= end).then(|| (buf[line + 2..line + 2 + size].to_vec(), buf[end..].to_vec()))
}

/// A POST with a JSON body.
pub fn post(path: &str, body: &str) -> String {
    post_with(path, "", body)
}

/// The same with header lines, each ending in `\r\n`.
pub fn post_with(path: &str, headers: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\n{headers}\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: router\r\n\r\n")
}

pub const COMPLETION: &str = r#"{"model":"m","prompt":"Hello there","max_tokens":5}"#;

/// A request that must work: shows that the router still serves.
pub async fn works(router: &RouterHandle) -> Got {
    let got = send(router.http_addr(), post("/v1/completions", COMPLETION)).await;
    assert_eq!(got.status, 200, "{got:?}");
    got
}

/// A page of the admin address.
pub async fn admin(router: &RouterHandle, path: &str) -> Got {
    send(router.admin_addr(), get(path)).await
}

pub async fn admin_json(router: &RouterHandle, path: &str) -> serde_json::Value {
    let got = admin(router, path).await;
    serde_json::from_str(&got.body).expect(&got.body)
}

/// The value of a metric with these labels, 0 when it is not there.
pub async fn metric(router: &RouterHandle, series: &str) -> f64 {
    let page = admin(router, "/metrics").await.body;
    let line = page.lines().find(|l| l.strip_prefix(series).is_some_and(|r| r.starts_with(' ')));
    line.and_then(|l| l.rsplit_once(' ')).map_or(0.0, |(_, v)| v.parse().unwrap())
}

/// Waits until every endpoint has answered a scrape.
pub async fn ready(router: &RouterHandle, endpoints: usize) {
    let until = tokio::time::Instant::now() + LONG;
    loop {
        let page = admin_json(router, "/readyz").await;
        if page["endpoints_answering"] == endpoints {
            return;
        }
        assert!(tokio::time::Instant::now() < until, "never ready: {page}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a gRPC call of one message comes to: its `grpc-status` and the bytes of the answer.
pub async fn grpc_call<S>(stream: S, path: &str, message: &[u8]) -> (u16, Vec<u8>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let (answer, mut send) = client.send_request(request, false).unwrap();
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message);
    send.send_data(framed.into(), true).unwrap();
    let (head, mut body) = answer.await.unwrap().into_parts();
    let mut bytes = Vec::new();
    while let Some(piece) = body.data().await {
        bytes.extend_from_slice(&piece.unwrap());
    }
    let trailers = body.trailers().await.unwrap().unwrap_or(head.headers);
    (trailers["grpc-status"].to_str().unwrap().parse().unwrap(), bytes)
}
