//! What do engines tell that connect to the router? One socket for all of them.
//!
//! Each connection is a publisher's. Its messages name their endpoint in the topic,
//! `kv@ADDRESS@MODEL`; the model is not needed. A message of nobody who is known is counted and
//! shown. There is no replay: what was missed stays missing, and the stream says so.

mod topic;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvroute_core::fleet::EndpointId;
use kvroute_core::settings::ms;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::feed::{Feed, Speaker};
use super::{End, TICK, decode, numbered};
use crate::config::BoundSocket;
use crate::metrics::{Metrics, ReasonLabel};
use crate::shared::Shared;
use crate::upstream::Upstream;
use crate::zmtp::{Role, Socket, ZmtpError};
use topic::Miss;

/// Topics of one connection whose endpoints are remembered; more are looked up again.
const TOPICS_MAX: usize = 1_024;
/// Longest topic.
const TOPIC_BYTES_MAX: usize = 1_024;
/// A connection that speaks for no endpoint is closed after this much silence, because its engine
/// may be gone unnoticed; one that lives connects again.
const USELESS_MAX: Duration = Duration::from_secs(600);
/// Rest after a connection could not be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What came over the bound socket, for people.
pub(crate) struct Bound {
    address: String,
    topic_filter: String,
    /// Messages that were not used, by topic.
    unused: Mutex<BTreeMap<String, u64>>,
    topics_max: usize,
    numbers: AtomicU64,
}

/// The same as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct BoundView {
    address: String,
    topic_filter: String,
    connections: i64,
    /// Messages that were not used, by topic; `other` are those of further topics.
    unused: BTreeMap<String, u64>,
}

impl Bound {
    /// `topics_max` topics are named, the rest are `other`.
    pub fn new(socket: &BoundSocket, topics_max: u32) -> Bound {
        Bound {
            address: format!("tcp://{}:{}", socket.host, socket.port),
            topic_filter: socket.topic_filter.clone(),
            unused: Mutex::default(),
            topics_max: topics_max as usize,
            numbers: AtomicU64::new(0),
        }
    }

    /// Where engines connect.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// What is shown.
    pub fn view(&self, metrics: &Metrics) -> BoundView {
        BoundView {
            address: self.address.clone(),
            topic_filter: self.topic_filter.clone(),
            connections: metrics.bound_connections.get(),
            unused: self.unused.lock().clone(),
        }
    }

    /// Counts a message that was not used; whether it is the first of its topic.
    fn count(&self, topic: &str) -> bool {
        let mut unused = self.unused.lock();
        if let Some(count) = unused.get_mut(topic) {
            *count += 1;
            return false;
        }
        let named = unused.len() < self.topics_max;
        let topic = if named { topic } else { "other" };
        let count = unused.entry(topic.to_owned()).or_default();
        *count += 1;
        named || *count == 1
    }
}

/// Listens for engines.
pub(crate) async fn listen(socket: &BoundSocket) -> std::io::Result<TcpListener> {
    let host = if socket.host == "*" { "0.0.0.0" } else { &socket.host };
    TcpListener::bind((host, socket.port)).await
}

/// Serves engines that connect, until its task is aborted.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(shared.settings.event_connections_max as usize));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "An engine's connection could not be accepted.");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            drop_one(&shared, "connections");
            warn!(%peer, "Too many engines are connected (kvroute.event_connections_max).");
            continue;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            shared.metrics.bound_connections.inc();
            serve_one(&shared, stream, peer).await;
            shared.metrics.bound_connections.dec();
            drop(permit);
        });
    }
}

fn drop_one(shared: &Shared, reason: &'static str) {
    shared.metrics.bound_dropped.get_or_create(&ReasonLabel { reason }).inc();
}

async fn serve_one(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let Some(bound) = &shared.bound else { return };
    let timeout = ms(shared.settings.connect_timeout_ms.max(1));
    let bytes_max = shared.settings.event_bytes_max;
    let opened = async {
        let mut socket = Socket::accept(stream, Role::Sub, timeout, bytes_max).await?;
        socket.subscribe(bound.topic_filter.as_bytes()).await?;
        Ok::<Socket, ZmtpError>(socket)
    };
    let mut socket = match opened.await {
        Ok(socket) => socket,
        Err(error) => {
            drop_one(shared, "handshake");
            debug!(%peer, %error, "A connection to the event socket is no publisher's.");
            return;
        }
    };
    info!(%peer, "An engine has connected to the event socket.");
    let number = bound.numbers.fetch_add(1, Ordering::Relaxed);
    let mut connection = Connection {
        shared: Arc::clone(shared),
        peer,
        number,
        routes: HashMap::new(),
        version: shared.upstreams.version(),
        held: BTreeMap::new(),
        heard: Instant::now(),
    };
    let end = connection.follow(&mut socket).await;
    info!(%peer, reason = %end, "An engine's connection to the event socket ended.");
    connection.end(&end);
}

/// An endpoint that a connection speaks for, and where in the connection.
struct Held {
    feed: Feed,
    topic: Vec<u8>,
    rank: Option<u32>,
}

/// A rank, and whom a topic with it means.
type Route = (Option<u32>, Result<EndpointId, Miss>);

struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    number: u64,
    /// What topics meant, each for the rank it came with last.
    routes: HashMap<Vec<u8>, Route>,
    /// Of the fleet that `routes` is about.
    version: u64,
    held: BTreeMap<(u16, u32), Held>,
    heard: Instant,
}

impl Connection {
    async fn follow(&mut self, socket: &mut Socket) -> End {
        let mut tick = tokio::time::interval_at(Instant::now() + TICK, TICK);
        loop {
            tokio::select! {
                message = socket.recv() => match message {
                    Ok(frames) => self.message(&frames),
                    Err(error) => return End::Socket(error),
                },
                _ = tick.tick() => {
                    if let Some(end) = self.tick() {
                        return end;
                    }
                }
            }
        }
    }

    fn message(&mut self, frames: &[Bytes]) {
        self.heard = Instant::now();
        let (topic, seq, batch) = match frames {
            [topic, seq, payload] => (topic, numbered(seq), decode(payload)),
            [topic, ..] => (topic, None, None),
            [] => return,
        };
        let rank = batch.as_ref().and_then(|batch| batch.rank);
        let found = self.endpoint(topic, rank);
        let upstream = found.and_then(|id| self.shared.upstreams.get(id).ok_or(Miss::Unknown));
        let upstream = match upstream {
            Ok(upstream) => upstream,
            Err(miss) => return self.miss(topic, miss),
        };
        match self.word(upstream, topic, rank) {
            Some(feed) => feed.refuse(feed.message(seq, batch)),
            None => self.miss(topic, Miss::Superseded),
        }
    }

    /// The endpoint that a topic means.
    fn endpoint(&mut self, topic: &[u8], rank: Option<u32>) -> Result<EndpointId, Miss> {
        let version = self.shared.upstreams.version();
        if version != self.version || self.routes.len() > TOPICS_MAX {
            self.routes.clear();
            self.version = version;
        }
        if let Some((known, found)) = self.routes.get(topic)
            && *known == rank
        {
            return *found;
        }
        if topic.len() > TOPIC_BYTES_MAX {
            return Err(Miss::Malformed);
        }
        let all = self.shared.upstreams.all();
        let found = topic::find(&all, topic, rank).map(|upstream| upstream.id);
        self.routes.insert(topic.to_vec(), (rank, found));
        found
    }

    /// The feed of an endpoint that this topic of this connection has the word for. It is taken
    /// with the first message.
    fn word(&mut self, upstream: Arc<Upstream>, topic: &[u8], rank: Option<u32>) -> Option<Feed> {
        if let Some(held) = self.held.get_mut(&upstream.id.into())
            && held.feed.has_word()
        {
            let known = held.rank.zip(rank).is_none_or(|(known, rank)| known == rank);
            held.rank = held.rank.or(rank);
            return (known && held.topic == topic).then(|| held.feed.clone());
        }
        let (id, speaker) = (upstream.id, Speaker::Bound(self.number));
        let feed = Feed { shared: Arc::clone(&self.shared), upstream, speaker };
        if !feed.take_word() {
            return None;
        }
        let bound = self.shared.bound.as_ref().map_or_else(String::new, Bound::address);
        let order = feed.connected(format!("{} at {bound}", self.peer))?;
        feed.refuse(order);
        self.held.insert(id.into(), Held { feed: feed.clone(), topic: topic.to_vec(), rank });
        Some(feed)
    }

    fn miss(&self, topic: &[u8], miss: Miss) {
        drop_one(&self.shared, miss.as_str());
        let Some(bound) = &self.shared.bound else { return };
        let topic = topic[..topic.len().min(TOPIC_BYTES_MAX)].escape_ascii().to_string();
        if bound.count(&topic) {
            let (peer, reason) = (self.peer, miss.as_str());
            warn!(topic, %peer, reason, "KV events of an engine that connected are not used.");
        }
    }

    /// What time brings: `Some` when the connection is not worth keeping.
    fn tick(&mut self) -> Option<End> {
        let upstreams = &self.shared.upstreams;
        self.held.retain(|_, held| upstreams.get(held.feed.upstream.id).is_some());
        let mut useful = false;
        for Held { feed, .. } in self.held.values().filter(|held| held.feed.has_word()) {
            useful = true;
            feed.refuse(feed.upstream.take_order());
            if feed.is_silent() {
                return Some(End::Silent);
            }
        }
        (!useful && self.heard.elapsed() > USELESS_MAX).then_some(End::Useless)
    }

    /// Tells everybody that the connection spoke for.
    fn end(self, end: &End) {
        for Held { feed, .. } in self.held.into_values() {
            if feed.has_word() {
                feed.lost();
                feed.failed(format!("the engine at {} has gone: {end}", self.peer));
                feed.leave_word();
            }
        }
    }
}
