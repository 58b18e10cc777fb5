//! What does an engine answer, asked from outside of a router? One exchange, one event or one
//! replay at a time, over the router's own connections, for `kvroute check --live`.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method};
use kvroute_core::event::EventBatch;
use kvroute_core::settings::Settings;
use kvroute_wire::kv_event;
use thiserror::Error;

use crate::config::{EndpointFlag, EventsConfig, EventsSource};
use crate::discover::{FileSource, NameSource, Target};
use crate::events::place;
pub use crate::events::place::Place;
use crate::events::replay::{Replay, ReplayItem};
use crate::headers::RANK;
use crate::http1::Head;
use crate::upstream::{Connection, UpstreamError};
use crate::zmtp::{Role, Socket};

/// Longest wait for a connection, and for the first words over it.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// One engine, as flags or a file name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    /// `ip:port` or the file's name for it.
    pub name: String,
    /// Of its HTTP server.
    pub address: SocketAddr,
    /// Data parallel rank.
    pub rank: u32,
    /// Where its events come from.
    pub events: EventsSource,
}

impl From<&Target> for Engine {
    fn from(target: &Target) -> Engine {
        let (name, events) = (target.name.clone(), target.events.clone());
        Engine { name, address: target.address, rank: target.rank, events }
    }
}

/// The engines that flags and a file name, in their order, host names resolved. `events` holds
/// for those that say nothing about events.
///
/// # Errors
/// The file cannot be read, or a name cannot be resolved.
pub async fn engines(
    flags: Vec<EndpointFlag>,
    file: Option<&Path>,
    events: &EventsConfig,
) -> Result<Vec<Engine>, String> {
    let mut names = NameSource::new(flags, events.clone());
    names.refresh().await?;
    let mut engines: Vec<Engine> = names.targets().iter().map(Engine::from).collect();
    if let Some(file) = file {
        let mut file = FileSource::new(file.to_owned(), events.clone());
        file.refresh().await?;
        engines.extend(file.targets().iter().map(Engine::from));
    }
    Ok(engines)
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum AskError {
    /// Nobody listens there.
    #[error("connection refused")]
    Refused,
    /// No connection for another reason.
    #[error("{0}")]
    Connect(String),
    /// A connection, but nothing that is HTTP came over it.
    #[error("{0}")]
    NotHttp(String),
    /// The answer took too long or broke off.
    #[error("{0}")]
    Answer(String),
}

impl From<UpstreamError> for AskError {
    fn from(error: UpstreamError) -> AskError {
        match &error {
            UpstreamError::Connect(io) if io.kind() == std::io::ErrorKind::ConnectionRefused => {
                AskError::Refused
            }
            UpstreamError::Connect(_) | UpstreamError::ConnectTimeout(_) => {
                AskError::Connect(error.to_string())
            }
            UpstreamError::Protocol(_) | UpstreamError::Closed => {
                AskError::NotHttp(error.to_string())
            }
            _ => AskError::Answer(error.to_string()),
        }
    }
}

/// What an HTTP server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Every header.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value, when it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// How much of an engine's time and answers is taken.
#[derive(Clone, Copy, Debug)]
pub struct AskLimits {
    /// Longest wait for a whole answer.
    pub answer: Duration,
    /// Largest body, in bytes.
    pub body_bytes_max: usize,
    /// Largest event message, in bytes.
    pub event_bytes_max: usize,
}

/// One exchange over a connection of its own. A body goes as JSON.
///
/// # Errors
/// [`AskError`]; a status of any kind is an answer.
pub async fn exchange(
    engine: &Engine,
    method: &Method,
    path: &str,
    body: &[u8],
    limits: &AskLimits,
) -> Result<Answer, AskError> {
    let mut headers = HeaderMap::new();
    if engine.rank > 0 {
        headers.insert(RANK, HeaderValue::from(engine.rank));
    }
    exchange_at(engine.address, method, path, &headers, body, limits).await
}

/// The same at any address, with further headers. The path is written as it is.
///
/// # Errors
/// [`AskError`]; a status of any kind is an answer.
pub async fn exchange_at(
    address: SocketAddr,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    body: &[u8],
    limits: &AskLimits,
) -> Result<Answer, AskError> {
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\n");
    if method == Method::POST {
        let length = body.len();
        request += &format!("content-type: application/json\r\ncontent-length: {length}\r\n");
    }
    for (name, value) in headers {
        let value = value.to_str().map_err(|e| AskError::Connect(format!("{name}: {e}")))?;
        request += &format!("{name}: {value}\r\n");
    }
    let asked = once(address, request, body, limits.body_bytes_max, limits.answer).await;
    let (head, body) = asked?;
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
}

/// Sends one request over a connection of its own and reads the whole answer, all within
/// `timeout`. `head` holds the request line and headers, each ended, without the empty line.
pub(crate) async fn once(
    address: SocketAddr,
    head: String,
    body: &[u8],
    bytes_max: usize,
    timeout: Duration,
) -> Result<(Head, Vec<u8>), UpstreamError> {
    let head = head + "connection: close\r\n\r\n";
    let exchange = async {
        let mut connection = Connection::open(address, timeout.min(CONNECT_MAX)).await?;
        let late = || UpstreamError::FirstByteTimeout(timeout);
        connection.send(head.as_bytes(), body, timeout).await.ok_or_else(late)??;
        let mut head = connection.read_head(false, timeout).await?;
        let mut page = Vec::new();
        connection.read_body(&mut head.framing, &mut page, bytes_max).await?;
        Ok((head, page))
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .unwrap_or(Err(UpstreamError::FirstByteTimeout(timeout)))
}

/// Does a ZeroMQ socket answer at this address? That is what a port of events given as HTTP port
/// looks like.
pub async fn speaks_zmtp(address: SocketAddr, limits: &AskLimits) -> bool {
    Socket::connect(address, Role::Sub, CONNECT_MAX, limits.event_bytes_max).await.is_ok()
}

/// Where the engine's events come from.
///
/// # Errors
/// Why that cannot be told, and what to do.
pub async fn event_place(engine: &Engine) -> Result<Place, String> {
    place::find(engine.address, engine.rank, &engine.events, CONNECT_MAX).await
}

/// A subscription to all events of a publisher.
#[derive(Debug)]
pub struct EventStream {
    socket: Socket,
}

impl EventStream {
    /// Connects and subscribes.
    ///
    /// # Errors
    /// Why there is no such publisher at `HOST:PORT`.
    pub async fn open(address: &str, limits: &AskLimits) -> Result<EventStream, String> {
        let connected =
            Socket::connect(address, Role::Sub, CONNECT_MAX, limits.event_bytes_max).await;
        let mut socket = connected.map_err(|error| error.to_string())?;
        socket.subscribe(b"").await.map_err(|error| error.to_string())?;
        Ok(EventStream { socket })
    }

    /// The next batch and its sequence number. Cancelling this loses none.
    ///
    /// # Errors
    /// The connection ended, or a message is not an event batch.
    pub async fn next(&mut self) -> Result<(u64, EventBatch), String> {
        let frames = self.socket.recv().await.map_err(|error| error.to_string())?;
        let [_topic, seq, payload] = frames.as_slice() else {
            return Err(format!("a message of {} frames; KV events have 3", frames.len()));
        };
        let seq = crate::events::numbered(seq).ok_or("a sequence number that is none")?;
        Ok((seq, kv_event::decode_batch(payload).map_err(|error| error.to_string())?))
    }
}

/// Asks a replay socket at `HOST:PORT` for everything from `from` on; how many batches came.
///
/// # Errors
/// It does not answer as a replay socket does.
pub async fn replay(address: &str, from: u64, limits: &AskLimits) -> Result<usize, String> {
    let settings = Settings {
        replay_timeout_ms: u32::try_from(limits.answer.as_millis()).unwrap_or(u32::MAX),
        event_bytes_max: limits.event_bytes_max,
        ..Settings::default()
    };
    let mut replay = Replay::start(address.to_owned(), from, &settings);
    let mut batches = 0;
    loop {
        match replay.next().await {
            ReplayItem::Batch { .. } => batches += 1,
            ReplayItem::Done => return Ok(batches),
            ReplayItem::Failed(reason) => return Err(reason),
        }
    }
}
