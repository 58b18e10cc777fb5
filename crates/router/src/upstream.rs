//! How is an endpoint reached over HTTP? A connection whose bytes are read where they are needed,
//! and a pool of idle ones for each endpoint.
//!
//! There is no task behind a connection: the response body is read by whoever sends it on, so a
//! slow client slows the engine down, a dropped response closes the connection at once, and a
//! burst of chunks costs one read and one write.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use http::HeaderValue;
use kvroute_core::fleet::EndpointId;
use kvroute_core::stream::StreamOrder;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::Sleep;

use crate::discover::Target;
use crate::events::Subscription;
use crate::events::feed::Speaker;
use crate::http1::{self, Framing, Head, Http1Error};
use crate::metrics::EndpointMetrics;
use crate::tls::{Tls, TlsStream};

/// Bytes to ask a socket for at once.
const READ_BYTES: usize = 16 << 10;
/// A buffer with less room than this is replaced: pieces of a stream share one until then.
const READ_BYTES_MIN: usize = 4 << 10;

/// Why an exchange with an endpoint failed.
#[derive(Debug, Error)]
pub(crate) enum UpstreamError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// No connection in time.
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// Closed before the response began.
    #[error("the connection was closed before an answer")]
    Closed,
    /// Closed inside of a response.
    #[error("the connection was closed in the middle of an answer")]
    Truncated,
    /// Something other than HTTP/1.1 came back.
    #[error("{0}")]
    Protocol(#[from] Http1Error),
    /// No response in time.
    #[error("no answer within {0:?}")]
    FirstByteTimeout(Duration),
    /// A proxy in front of the endpoint answered with an error of its own.
    #[error("the proxy answered in the place of the endpoint")]
    ProxyAnswered,
    /// Silence inside of a response.
    #[error("no data for {0:?} in the middle of an answer")]
    IdleTimeout(Duration),
}

impl UpstreamError {
    /// Whether the endpoint ended a connection that an answer was to come over, as a process that
    /// dies does. Silence is something else: an engine may be slow.
    pub fn is_connection_lost(&self) -> bool {
        matches!(self, UpstreamError::Broken(_) | UpstreamError::Closed | UpstreamError::Truncated)
    }
}

/// What bytes go over.
#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    /// Pages of metrics only; it lies elsewhere because it is large and rare.
    Tls(Box<TlsStream>),
}

impl Stream {
    async fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let stream = match self {
            Stream::Tcp(stream) => stream,
            Stream::Tls(stream) => {
                stream.write_all(head).await?;
                stream.write_all(body).await?;
                return stream.flush().await;
            }
        };
        let mut sent = 0;
        while sent < head.len() {
            let parts = [IoSlice::new(&head[sent..]), IoSlice::new(body)];
            match stream.write_vectored(&parts).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => sent += n,
            }
        }
        stream.write_all(&body[sent - head.len()..]).await
    }
}

/// One timer for all waits over a connection. It is set again only when it fires or is too late:
/// nearly all of them end long before.
#[derive(Debug, Default)]
struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    /// Ready when `due` is over.
    fn poll(&mut self, due: tokio::time::Instant, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if sleep.deadline() > due {
            sleep.as_mut().reset(due);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if tokio::time::Instant::now() >= due {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(due);
        }
        Poll::Pending
    }
}

/// One HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    buf: BytesMut,
    alarm: Alarm,
    /// It has carried an exchange before, so the peer may have closed it meanwhile.
    pub reused: bool,
    idle_since: Instant,
}

impl Connection {
    /// Connects within `timeout`.
    pub async fn open(address: SocketAddr, timeout: Duration) -> Result<Connection, UpstreamError> {
        let stream = tokio::time::timeout(timeout, TcpStream::connect(address))
            .await
            .map_err(|_| UpstreamError::ConnectTimeout(timeout))?
            .map_err(UpstreamError::Connect)?;
        stream.set_nodelay(true).map_err(UpstreamError::Connect)?;
        let (stream, buf, alarm) = (Stream::Tcp(stream), BytesMut::new(), Alarm::default());
        Ok(Connection { stream, buf, alarm, reused: false, idle_since: Instant::now() })
    }

    /// Shakes hands over a new connection, with a server that is to be `host`.
    pub async fn encrypt(self, tls: &Tls, host: &str) -> Result<Connection, UpstreamError> {
        let stream = match self.stream {
            Stream::Tcp(tcp) => Stream::Tls(Box::new(tls.connect(host, tcp).await?)),
            encrypted @ Stream::Tls(_) => encrypted,
        };
        Ok(Connection { stream, ..self })
    }

    /// Sends a request, or a part of one, in as few writes as the socket takes. `None`: not within
    /// `limit`.
    pub async fn send(
        &mut self,
        head: &[u8],
        body: &[u8],
        limit: Duration,
    ) -> Option<io::Result<()>> {
        let Connection { stream, alarm, .. } = self;
        let mut sending = pin!(stream.send(head, body));
        let mut due = None;
        std::future::poll_fn(|cx| match sending.as_mut().poll(cx) {
            Poll::Ready(sent) => Poll::Ready(Some(sent)),
            Poll::Pending => {
                let due = due.get_or_insert_with(|| tokio::time::Instant::now() + limit);
                alarm.poll(*due, cx).map(|()| None)
            }
        })
        .await
    }

    /// Makes room for an answer of so many bytes, which is read at once then.
    pub fn expect_bytes(&mut self, bytes: usize) {
        self.buf.reserve(bytes);
    }

    /// Waits for the head of the response, for `limit`.
    pub async fn read_head(
        &mut self,
        to_head: bool,
        limit: Duration,
    ) -> Result<Head, UpstreamError> {
        let mut due = None;
        std::future::poll_fn(|cx| {
            loop {
                if let Some(head) = http1::parse_head(&mut self.buf, to_head)? {
                    return Poll::Ready(Ok(head));
                }
                match self.poll_fill(cx)? {
                    Poll::Ready(0) => return Poll::Ready(Err(UpstreamError::Closed)),
                    Poll::Ready(_) => {}
                    Poll::Pending => {
                        let due = due.get_or_insert_with(|| tokio::time::Instant::now() + limit);
                        let late = UpstreamError::FirstByteTimeout(limit);
                        return self.alarm.poll(*due, cx).map(|()| Err(late));
                    }
                }
            }
        })
        .await
    }

    /// Ready when nothing has come for `limit` since `last`.
    pub fn poll_silence(
        &mut self,
        last: Instant,
        limit: Duration,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        self.alarm.poll(tokio::time::Instant::from_std(last) + limit, cx)
    }

    /// The next piece of the body; empty when it is complete.
    pub fn poll_body(
        &mut self,
        framing: &mut Framing,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Bytes, UpstreamError>> {
        loop {
            if !self.buf.is_empty() {
                let data = framing.decode(&mut self.buf)?;
                if !data.is_empty() {
                    return Poll::Ready(Ok(data));
                }
            }
            if framing.is_done() {
                return Poll::Ready(Ok(Bytes::new()));
            }
            if ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(match framing {
                    Framing::Close => Ok(Bytes::new()),
                    _ => Err(UpstreamError::Truncated),
                });
            }
        }
    }

    /// Reads a whole body of at most `bytes_max` into `into`, whose memory is reused.
    pub async fn read_body(
        &mut self,
        framing: &mut Framing,
        into: &mut Vec<u8>,
        bytes_max: usize,
    ) -> Result<(), UpstreamError> {
        into.clear();
        loop {
            let data = std::future::poll_fn(|cx| self.poll_body(framing, cx)).await?;
            if data.is_empty() {
                return Ok(());
            }
            if into.len() + data.len() > bytes_max {
                return Err(UpstreamError::Protocol(Http1Error::Length));
            }
            into.extend_from_slice(&data);
        }
    }

    /// A read that does not fill the buffer leaves the socket known as empty, so the next one waits
    /// without asking it. Neither future holds state between two polls.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, io::Error>> {
        if self.buf.capacity() - self.buf.len() < READ_BYTES_MIN {
            self.buf.reserve(READ_BYTES);
        }
        match &mut self.stream {
            Stream::Tcp(stream) => pin!(stream.read_buf(&mut self.buf)).poll(cx),
            Stream::Tls(stream) => pin!(stream.read_buf(&mut self.buf)).poll(cx),
        }
    }

    /// Can another request be sent? Not when the peer closed it or sent something unasked.
    fn is_fresh(&mut self, idle_max: Duration) -> bool {
        let mut probe = [0u8; 1];
        let Stream::Tcp(stream) = &self.stream else { return false };
        self.buf.is_empty()
            && self.idle_since.elapsed() < idle_max
            && matches!(stream.try_read(&mut probe),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// What sources of metrics need to know about an endpoint beyond its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Whereabouts {
    /// Its host as listed, a name or an address.
    pub host: String,
    /// Name of its pod; empty: not known.
    pub pod: String,
    /// Address of its node.
    pub node: Option<IpAddr>,
    /// Host and address of its metrics, when they are not at the endpoint.
    pub metrics: Option<(String, SocketAddr)>,
}

/// One endpoint as the router's sockets see it.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub id: EndpointId,
    pub name: String,
    pub address: SocketAddr,
    /// Data parallel rank.
    pub rank: u32,
    /// Other ranks are served at the same address, so the engine must be told which is meant.
    pub shares_address: AtomicBool,
    /// Where its requests go: another port of its host where one port takes those of all ranks.
    pub served_at: SocketAddr,
    /// Its own address, for the header that names it there.
    pub data_parallel: Option<HeaderValue>,
    /// `host:port`, for the `host` header.
    pub authority: String,
    /// Where its metrics are.
    pub whereabouts: Whereabouts,
    /// What its labels say.
    pub labels: BTreeMap<String, String>,
    /// The name, for the response header.
    pub header: HeaderValue,
    pub metrics: EndpointMetrics,
    /// Milliseconds the engine was seen working since its last KV event.
    pub busy_ms: AtomicU64,
    /// Whether it answered the last scrape.
    pub up: AtomicBool,
    /// Factor of the watchdog's patience with its events.
    pub patience: AtomicU64,
    /// What its event subscriber is doing.
    pub subscription: Mutex<Subscription>,
    /// Whose messages about it count.
    pub speaker: watch::Sender<Speaker>,
    /// Its events have had a connection before.
    pub heard_before: AtomicBool,
    /// What the brain wants its subscriber to do.
    order: Mutex<StreamOrder>,
    ordered: Notify,
    idle: Mutex<Vec<Connection>>,
    limits: PoolLimits,
}

/// How many idle connections are kept, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolLimits {
    pub idle_max: usize,
    pub idle_timeout: Duration,
    pub connect_timeout: Duration,
}

impl Upstream {
    pub fn new(
        id: EndpointId,
        target: &Target,
        metrics: EndpointMetrics,
        limits: PoolLimits,
        primary_port: Option<u16>,
    ) -> Upstream {
        let address = target.address;
        let served_at = SocketAddr::new(address.ip(), primary_port.unwrap_or(address.port()));
        let own = HeaderValue::from_str(&address.to_string()).ok();
        Upstream {
            id,
            name: target.name.clone(),
            address,
            served_at,
            data_parallel: primary_port.and(own),
            rank: target.rank,
            shares_address: AtomicBool::new(false),
            authority: served_at.to_string(),
            whereabouts: target.whereabouts.clone(),
            labels: target.labels.clone(),
            header: HeaderValue::from_str(&target.name).unwrap_or(HeaderValue::from_static("-")),
            metrics,
            busy_ms: AtomicU64::new(0),
            up: AtomicBool::new(false),
            patience: AtomicU64::new(1),
            subscription: Mutex::default(),
            speaker: watch::Sender::new(Speaker::Own),
            heard_before: AtomicBool::new(false),
            order: Mutex::new(StreamOrder::None),
            ordered: Notify::new(),
            idle: Mutex::default(),
            limits,
        }
    }

    /// An idle connection, or a new one; always a new one when `fresh`.
    pub async fn connection(&self, fresh: bool) -> Result<Connection, UpstreamError> {
        if !fresh && let Some(connection) = self.idle_connection() {
            return Ok(connection);
        }
        Connection::open(self.served_at, self.limits.connect_timeout).await
    }

    fn idle_connection(&self) -> Option<Connection> {
        loop {
            // The lock ends with this statement: probing the socket needs none.
            let mut connection = self.idle.lock().pop()?;
            if connection.is_fresh(self.limits.idle_timeout) {
                return Some(connection);
            }
        }
    }

    /// Takes a connection back whose exchange is complete.
    pub fn give_back(&self, mut connection: Connection) {
        connection.reused = true;
        connection.idle_since = Instant::now();
        if connection.buf.capacity() > 4 * READ_BYTES {
            connection.buf = BytesMut::new();
        }
        let mut idle = self.idle.lock();
        if idle.len() < self.limits.idle_max && connection.buf.is_empty() {
            idle.push(connection);
        }
    }

    /// Closes connections that have been idle for too long.
    pub fn reap(&self) {
        let keep = self.limits.idle_timeout;
        self.idle.lock().retain(|c| c.idle_since.elapsed() < keep);
    }

    /// Closes all idle connections.
    pub fn close_idle(&self) {
        self.idle.lock().clear();
    }

    /// Gives the endpoint's subscriber an order.
    pub fn order(&self, order: StreamOrder) {
        *self.order.lock() = order;
        self.ordered.notify_one();
    }

    /// The next order. Cancelling this loses none.
    pub async fn next_order(&self) -> StreamOrder {
        self.ordered.notified().await;
        self.take_order()
    }

    /// The order that waits, if any.
    pub fn take_order(&self) -> StreamOrder {
        std::mem::replace(&mut *self.order.lock(), StreamOrder::None)
    }

    /// Notes that the engine was seen working for this long.
    pub fn note_busy(&self, ms: u64) {
        self.busy_ms.fetch_add(ms, Ordering::Relaxed);
    }
}

/// All endpoints by slot, read without a lock on every request.
#[derive(Debug, Default)]
pub(crate) struct Upstreams {
    slots: ArcSwap<Vec<Option<Arc<Upstream>>>>,
    version: AtomicU64,
}

impl Upstreams {
    /// The endpoint, unless it has left the fleet.
    pub fn get(&self, id: EndpointId) -> Option<Arc<Upstream>> {
        let slots = self.slots.load();
        slots.get(usize::from(id.slot))?.as_ref().filter(|u| u.id == id).cloned()
    }

    /// All endpoints, by slot.
    pub fn all(&self) -> Vec<Arc<Upstream>> {
        self.slots.load().iter().flatten().cloned().collect()
    }

    /// Changes whenever an endpoint joins or leaves.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Whether another endpoint of the same rank has the same host.
    pub fn shares_host(&self, upstream: &Upstream) -> bool {
        let slots = self.slots.load();
        slots.iter().flatten().any(|other| {
            let same = (other.address.ip(), other.rank) == (upstream.address.ip(), upstream.rank);
            same && other.id != upstream.id
        })
    }

    /// Adds an endpoint in its slot. One task changes the fleet, so no update is lost.
    pub fn insert(&self, upstream: Arc<Upstream>) {
        let mut slots = Vec::clone(&self.slots.load());
        let at = usize::from(upstream.id.slot);
        if slots.len() <= at {
            slots.resize(at + 1, None);
        }
        slots[at] = Some(upstream);
        self.slots.store(Arc::new(slots));
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Removes an endpoint; requests on their way keep theirs.
    pub fn remove(&self, id: EndpointId) -> Option<Arc<Upstream>> {
        let mut slots = Vec::clone(&self.slots.load());
        let slot = slots.get_mut(usize::from(id.slot))?;
        let removed = slot.take_if(|u| u.id == id)?;
        self.slots.store(Arc::new(slots));
        self.version.fetch_add(1, Ordering::Release);
        Some(removed)
    }
}
