//! What happened in each engine's cache? One subscriber for each endpoint, and a socket that
//! engines connect to.
//!
//! A subscriber finds the publisher, connects, reads, decodes and hands each batch to the brain,
//! holding the brain's lock for that one batch. Whatever is lost is the business of
//! `core::stream`: it sees connections, sequence numbers and replays, and orders replays here.
//! There is no queue in between: when the router is slow, TCP slows the publisher down, and what
//! that one drops shows as a gap.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvroute_core::event::EventBatch;
use kvroute_core::settings::ms;
use kvroute_core::stream::{StreamInput, StreamOrder};
use kvroute_wire::kv_event;
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::config::EventsSource;
use crate::shared::Shared;
use crate::upstream::Upstream;
use crate::zmtp::{Role, Socket, ZmtpError};

pub(crate) mod bound;
pub(crate) mod feed;
pub(crate) mod place;
pub(crate) mod replay;

use feed::{Feed, Speaker};
use place::Place;
use replay::{Replay, ReplayItem};

/// First and longest wait between two attempts to connect.
const RECONNECT_MS: (u64, u64) = (100, 5_000);
/// Publishers that say something this often are listened to this often: each time costs a thread's
/// turn, which is more than most batches.
const PAUSE: Duration = Duration::from_millis(5);
/// How often a quiet stream is looked at.
const TICK: Duration = Duration::from_millis(500);

/// What a subscriber is doing, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Subscription {
    /// The endpoint has no event stream, or the plan needs none.
    #[default]
    Off,
    /// The endpoint's labels do not match `podLabelSelector`.
    Unselected,
    /// Looking for the publisher.
    Searching,
    /// The engine is to connect to this socket of the router.
    Awaited(String),
    /// Waiting to try again.
    Failed(String),
    /// Connected to this publisher, and how it was found.
    Connected(String),
}

/// Why a connection to a publisher ended.
#[derive(Debug)]
enum End {
    Socket(ZmtpError),
    /// The engine works, and says nothing about it.
    Silent,
    /// The engine has connected to the router.
    Displaced,
    /// Whoever connected to the router has long said nothing about any endpoint.
    Useless,
    /// The endpoint has left the fleet.
    Gone,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Socket(error) => write!(f, "{error}"),
            End::Silent => write!(f, "the engine is busy but sends no events"),
            End::Displaced => write!(f, "the engine has connected to the router"),
            End::Useless => write!(f, "nothing about any endpoint for a long time"),
            End::Gone => write!(f, "the endpoint has left the fleet"),
        }
    }
}

/// Follows an endpoint's events until it leaves the fleet.
pub(crate) async fn subscribe(shared: Arc<Shared>, upstream: Arc<Upstream>, source: EventsSource) {
    let turns = upstream.speaker.subscribe();
    let feed = Feed { shared, upstream, speaker: Speaker::Own };
    let mut subscriber = Subscriber { feed, source, turns, heard: false };
    let mut delay = RECONNECT_MS.0;
    loop {
        if turn(&mut subscriber.turns, true).await.is_err() {
            return;
        }
        let ended = subscriber.connect_and_follow().await;
        if subscriber.heard {
            delay = RECONNECT_MS.0;
        }
        match ended {
            Ok(End::Gone) => return,
            Ok(_) => continue,
            Err(reason) => subscriber.feed.failed(reason),
        }
        let jitter = 1.0 - fastrand::f64() / 4.0;
        tokio::time::sleep(Duration::from_millis(delay).mul_f64(jitter)).await;
        delay = (delay * 2).min(RECONNECT_MS.1);
    }
}

/// Waits until the own subscription has the word, or has it no more.
async fn turn(
    turns: &mut watch::Receiver<Speaker>,
    own: bool,
) -> Result<(), watch::error::RecvError> {
    turns.wait_for(|speaker| (*speaker == Speaker::Own) == own).await.map(drop)
}

struct Subscriber {
    feed: Feed,
    source: EventsSource,
    /// Who has the word.
    turns: watch::Receiver<Speaker>,
    /// A message has come over the current connection.
    heard: bool,
}

impl Subscriber {
    /// `Ok` when there is nothing more to do for now, otherwise why the connection could not be
    /// made or ended.
    async fn connect_and_follow(&mut self) -> Result<End, String> {
        self.heard = false;
        let (shared, upstream) = (&self.feed.shared, &self.feed.upstream);
        let timeout = ms(shared.settings.connect_timeout_ms.max(1));
        let place = place::find(upstream.address, upstream.rank, &self.source, timeout).await?;
        let shown = format!("{} ({})", place.events, place.known);
        if place.guessed && shared.upstreams.shares_host(upstream) {
            return Err(format!(
                "{shown}: other endpoints are on this host, too, so nobody knows whose events \
                 these are; write --endpoint URL,events=tcp://HOST:PORT for each"
            ));
        }
        let bytes_max = shared.settings.event_bytes_max;
        let connected = Socket::connect(&place.events, Role::Sub, timeout, bytes_max).await;
        let mut socket = connected.map_err(|e| format!("{shown}: {e}"))?;
        socket.subscribe(b"").await.map_err(|e| format!("{shown}: {e}"))?;
        let Some(order) = self.feed.connected(shown.clone()) else { return Ok(End::Displaced) };
        let mut replay = None;
        match self.follow(&mut socket, &place, order, &mut replay).await {
            end @ (End::Gone | End::Displaced) => Ok(end),
            end => {
                self.feed.lost();
                Err(format!("{shown}: {end}"))
            }
        }
    }

    async fn follow(
        &mut self,
        socket: &mut Socket,
        place: &Place,
        order: StreamOrder,
        replay: &mut Option<Replay>,
    ) -> End {
        let upstream = Arc::clone(&self.feed.upstream);
        self.obey(order, place, replay);
        let mut turns = self.turns.clone();
        let mut displaced = pin!(turn(&mut turns, false));
        let mut ordered = pin!(upstream.next_order());
        let mut tick = tokio::time::interval_at(Instant::now() + TICK, TICK);
        let (mut pause, shared) = (Pause::default(), Arc::clone(&self.feed.shared));
        loop {
            let order = tokio::select! {
                biased;
                _ = &mut displaced => return End::Displaced,
                item = next_item(replay) => self.replayed(item, replay),
                order = &mut ordered => {
                    ordered.set(upstream.next_order());
                    order
                }
                message = pause.recv(socket, &shared.pulse) => match message {
                    Ok(frames) => self.message(&frames),
                    Err(error) => return End::Socket(error),
                },
                _ = tick.tick() => {
                    if self.feed.shared.upstreams.get(upstream.id).is_none() {
                        return End::Gone;
                    }
                    if self.feed.is_silent() {
                        return End::Silent;
                    }
                    StreamOrder::None
                }
            };
            self.obey(order, place, replay);
        }
    }

    /// One message of the publisher: topic, sequence number, payload.
    fn message(&mut self, frames: &[Bytes]) -> StreamOrder {
        self.heard = true;
        match frames {
            [_topic, seq, payload] => self.feed.message(numbered(seq), decode(payload)),
            _ => self.feed.message(None, None),
        }
    }

    fn replayed(&mut self, item: ReplayItem, replay: &mut Option<Replay>) -> StreamOrder {
        let (feed, endpoint) = (&self.feed, self.feed.upstream.name.as_str());
        match item {
            ReplayItem::Batch { seq, payload } => match decode(&payload) {
                Some(batch) => {
                    feed.upstream.metrics.events_bad.inc_by(u64::from(batch.events_bad));
                    feed.tell(StreamInput::ReplayBatch { seq, batch })
                }
                None => {
                    feed.upstream.metrics.events_bad.inc();
                    StreamOrder::None
                }
            },
            ReplayItem::Done => {
                *replay = None;
                debug!(endpoint, "A replay of KV events is complete.");
                feed.tell(StreamInput::ReplayDone)
            }
            ReplayItem::Failed(reason) => {
                *replay = None;
                warn!(endpoint, reason, "A replay of KV events failed.");
                feed.tell(StreamInput::ReplayFailed)
            }
        }
    }

    fn obey(&self, order: StreamOrder, place: &Place, replay: &mut Option<Replay>) {
        let StreamOrder::Replay { from } = order else { return };
        match &place.replay {
            Some(address) => {
                let endpoint = self.feed.upstream.name.as_str();
                debug!(endpoint, from, "Asking for a replay of KV events.");
                *replay = Some(Replay::start(address.clone(), from, &self.feed.shared.settings));
            }
            None => self.feed.refuse(order),
        }
    }
}

/// Tells all subscribers that pause when to go on. One timer for all: to set one costs a thread's
/// turn, too.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    wanted: Notify,
    beat: Notify,
}

impl Pulse {
    /// Beats as long as anybody waits for it.
    pub async fn run(shared: Arc<Shared>) {
        let pulse = &shared.pulse;
        loop {
            pulse.wanted.notified().await;
            tokio::time::sleep(PAUSE).await;
            pulse.beat.notify_waiters();
        }
    }

    /// Waits for at most [`PAUSE`].
    async fn wait(&self) {
        let beat = self.beat.notified();
        self.wanted.notify_one();
        beat.await;
    }
}

/// When a publisher is listened to: at once after a silence, else once in a while.
#[derive(Default)]
struct Pause {
    heard: Option<Instant>,
    is_due: bool,
}

impl Pause {
    /// The next message. Cancelling this loses none.
    async fn recv(&mut self, socket: &mut Socket, pulse: &Pulse) -> Result<Vec<Bytes>, ZmtpError> {
        if let Some(frames) = socket.recv_read().await? {
            return Ok(frames);
        }
        if self.is_due && !socket.has_more {
            pulse.wait().await;
        }
        self.is_due = false;
        let frames = socket.recv().await?;
        let now = Instant::now();
        let before = self.heard.replace(now);
        self.is_due = before.is_some_and(|before| now - before < 2 * PAUSE);
        Ok(frames)
    }
}

/// A batch of events; `None` when it cannot be read as a whole. Its tokens are hashed here, where
/// nobody waits for the brain.
fn decode(payload: &[u8]) -> Option<EventBatch> {
    let decoded = kv_event::decode_batch(payload);
    let decoded = decoded.inspect_err(|error| debug!(%error, "A batch of events is unreadable."));
    let mut batch = decoded.ok()?;
    batch.hash_tokens();
    Some(batch)
}

async fn next_item(replay: &mut Option<Replay>) -> ReplayItem {
    match replay {
        Some(replay) => replay.next().await,
        None => std::future::pending().await,
    }
}

/// A sequence number as publishers send it: 8 bytes, big endian.
pub(crate) fn numbered(frame: &[u8]) -> Option<u64> {
    frame.try_into().ok().map(u64::from_be_bytes)
}
