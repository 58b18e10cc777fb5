//! What happened in each engine's cache? One subscriber for each endpoint.
//!
//! A subscriber finds the publisher, connects, reads, decodes and hands each batch to the brain,
//! holding the brain's lock for that one batch. Whatever is lost is the business of
//! `core::stream`: it sees connections, sequence numbers and replays, and orders replays here.
//! There is no queue in between: when the router is slow, TCP slows the publisher down, and what
//! that one drops shows as a gap.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use kvroute_core::brain::Brain;
use kvroute_core::settings::ms;
use kvroute_core::stream::{StreamInput, StreamOrder, StreamState};
use kvroute_wire::kv_event;
use serde::Serialize;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::config::EventsSource;
use crate::shared::Shared;
use crate::upstream::Upstream;
use crate::zmtp::{Role, Socket, ZmtpError};

pub(crate) mod place;
pub(crate) mod replay;

use place::Place;
use replay::{Replay, ReplayItem};

/// First and longest wait between two attempts to connect.
const RECONNECT_MS: (u64, u64) = (100, 5_000);
/// How often a quiet stream is looked at.
const TICK: Duration = Duration::from_millis(500);
/// The watchdog's patience doubles up to this factor while it finds nothing.
const WATCHDOG_FACTOR_MAX: u64 = 32;

/// Most refusals in a row.
const REFUSALS_MAX: usize = 4;

/// What a subscriber is doing, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Subscription {
    /// The endpoint has no event stream, or the plan needs none.
    #[default]
    Off,
    /// Looking for the publisher.
    Searching,
    /// Waiting to try again.
    Failed(String),
    /// Connected to this publisher.
    Connected(String),
}

/// Why a connection to a publisher ended.
#[derive(Debug)]
enum End {
    Socket(ZmtpError),
    /// The engine works, and says nothing about it.
    Silent,
    /// The endpoint has left the fleet.
    Gone,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Socket(error) => write!(f, "{error}"),
            End::Silent => write!(f, "the engine is busy but sends no events"),
            End::Gone => write!(f, "the endpoint has left the fleet"),
        }
    }
}

/// Follows an endpoint's events until it leaves the fleet.
pub(crate) async fn subscribe(shared: Arc<Shared>, upstream: Arc<Upstream>, source: EventsSource) {
    let mut subscriber =
        Subscriber { shared, upstream, source, heard: false, patience: 1, known: false };
    let mut delay = RECONNECT_MS.0;
    *subscriber.upstream.subscription.lock() = Subscription::Searching;
    loop {
        let ended = subscriber.connect_and_follow().await;
        if subscriber.heard {
            delay = RECONNECT_MS.0;
        }
        let Err(reason) = ended else { return };
        subscriber.failed(reason);
        let jitter = 1.0 - fastrand::f64() / 4.0;
        tokio::time::sleep(Duration::from_millis(delay).mul_f64(jitter)).await;
        delay = (delay * 2).min(RECONNECT_MS.1);
    }
}

struct Subscriber {
    shared: Arc<Shared>,
    upstream: Arc<Upstream>,
    source: EventsSource,
    /// A message has come over the current connection.
    heard: bool,
    /// Factor of the watchdog's patience.
    patience: u64,
    /// There has been a connection before.
    known: bool,
}

impl Subscriber {
    /// `Ok` when the endpoint is gone, otherwise why the connection could not be made or ended.
    async fn connect_and_follow(&mut self) -> Result<(), String> {
        self.heard = false;
        let settings = &self.shared.settings;
        let timeout = ms(settings.connect_timeout_ms.max(1));
        let place =
            place::find(self.upstream.address, self.upstream.rank, &self.source, timeout).await?;
        let address = place.events.as_str();
        let bytes_max = settings.event_bytes_max;
        let connected = Socket::connect(address, Role::Sub, timeout, bytes_max).await;
        let mut socket = connected.map_err(|e| format!("{address}: {e}"))?;
        socket.subscribe("").await.map_err(|e| format!("{address}: {e}"))?;
        if std::mem::replace(&mut self.known, true) {
            self.upstream.metrics.stream_reconnects.inc();
        }
        self.upstream.busy_ms.store(0, Ordering::Relaxed);
        info!(endpoint = self.upstream.name, address, "Subscribed to an endpoint's KV events.");
        *self.upstream.subscription.lock() = Subscription::Connected(place.events.clone());
        self.refuse(self.upstream.take_order());
        let order = self.tell(StreamInput::Connected);
        let mut replay = None;
        let end = self.follow(&mut socket, &place, order, &mut replay).await;
        if let End::Gone = end {
            return Ok(());
        }
        self.refuse(self.tell(StreamInput::Lost));
        if replay.is_some() {
            self.refuse(self.tell(StreamInput::ReplayFailed));
        }
        Err(format!("{address}: {end}"))
    }

    fn failed(&self, reason: String) {
        let mut shown = self.upstream.subscription.lock();
        let failed = Subscription::Failed(reason);
        if *shown != failed {
            let Subscription::Failed(reason) = &failed else { return };
            warn!(endpoint = self.upstream.name, reason, "An endpoint's KV events are missing.");
            *shown = failed;
        }
    }

    async fn follow(
        &mut self,
        socket: &mut Socket,
        place: &Place,
        order: StreamOrder,
        replay: &mut Option<Replay>,
    ) -> End {
        let upstream = Arc::clone(&self.upstream);
        self.obey(order, place, replay);
        let mut tick = tokio::time::interval_at(Instant::now() + TICK, TICK);
        loop {
            let order = tokio::select! {
                message = socket.recv() => match message {
                    Ok(frames) => self.message(&frames),
                    Err(error) => return End::Socket(error),
                },
                item = next_item(replay) => self.replayed(item, replay),
                order = upstream.next_order() => order,
                _ = tick.tick() => {
                    if self.shared.upstreams.get(self.upstream.id).is_none() {
                        return End::Gone;
                    }
                    if self.is_silent() {
                        return End::Silent;
                    }
                    StreamOrder::None
                }
            };
            self.obey(order, place, replay);
        }
    }

    /// One message of the publisher: topic, sequence number, payload. What cannot be read is
    /// counted and left out; its sequence number is then missing, which the stream notices.
    fn message(&mut self, frames: &[Bytes]) -> StreamOrder {
        self.heard = true;
        self.patience = 1;
        self.upstream.busy_ms.store(0, Ordering::Relaxed);
        self.upstream.metrics.stream_messages.inc();
        let decoded = match frames {
            [_topic, seq, payload] => numbered(seq).zip(self.decode(payload)),
            _ => None,
        };
        match decoded {
            Some((seq, batch)) => self.tell(StreamInput::Batch { seq, batch }),
            None => {
                self.upstream.metrics.events_bad.inc();
                StreamOrder::None
            }
        }
    }

    fn decode(&self, payload: &[u8]) -> Option<kvroute_core::event::EventBatch> {
        match kv_event::decode_batch(payload) {
            Ok(batch) => {
                self.upstream.metrics.events_bad.inc_by(u64::from(batch.events_bad));
                Some(batch)
            }
            Err(error) => {
                debug!(endpoint = self.upstream.name, %error, "A batch of events is unreadable.");
                None
            }
        }
    }

    fn replayed(&mut self, item: ReplayItem, replay: &mut Option<Replay>) -> StreamOrder {
        match item {
            ReplayItem::Batch { seq, payload } => match self.decode(&payload) {
                Some(batch) => self.tell(StreamInput::ReplayBatch { seq, batch }),
                None => {
                    self.upstream.metrics.events_bad.inc();
                    StreamOrder::None
                }
            },
            ReplayItem::Done => {
                *replay = None;
                debug!(endpoint = self.upstream.name, "A replay of KV events is complete.");
                self.tell(StreamInput::ReplayDone)
            }
            ReplayItem::Failed(reason) => {
                *replay = None;
                warn!(endpoint = self.upstream.name, reason, "A replay of KV events failed.");
                self.tell(StreamInput::ReplayFailed)
            }
        }
    }

    fn tell(&self, input: StreamInput) -> StreamOrder {
        let (now, id) = (self.shared.clock.now(), self.upstream.id);
        let seen = |brain: &Brain| {
            brain.stream_state(id).zip(brain.stream_counters(id).map(|c| (c.gaps, c.restarts)))
        };
        let (before, order, after) = {
            let mut brain = self.shared.brain.lock();
            let before = seen(&brain);
            let order = brain.on_stream(now, id, input);
            (before, order, seen(&brain))
        };
        if let (Some(before), Some(after)) = (before, after) {
            self.log_change(before, after);
        }
        order
    }

    /// States with the numbers of gaps and restarts: what changed is worth a line.
    fn log_change(
        &self,
        (was, (gaps, restarts)): (StreamState, (u64, u64)),
        (is, now): (StreamState, (u64, u64)),
    ) {
        let endpoint = self.upstream.name.as_str();
        if now.1 > restarts {
            warn!(endpoint, "An engine restarted: its old blocks are forgotten.");
        }
        if now.0 > gaps {
            warn!(endpoint, "Events of an endpoint were lost.");
        }
        match is {
            _ if was == is => {}
            StreamState::Suspect(reason) => {
                let reason = reason.as_str();
                warn!(endpoint, reason, "An endpoint's cache is known in part: history helps out.");
            }
            StreamState::Live => info!(endpoint, "An endpoint's cache is known exactly."),
            StreamState::Initial | StreamState::Replaying => {}
        }
    }

    fn obey(&self, order: StreamOrder, place: &Place, replay: &mut Option<Replay>) {
        let StreamOrder::Replay { from } = order else { return };
        match &place.replay {
            Some(address) => {
                debug!(endpoint = self.upstream.name, from, "Asking for a replay of KV events.");
                *replay = Some(Replay::start(address.clone(), from, &self.shared.settings));
            }
            None => self.refuse(order),
        }
    }

    /// Answers an order that cannot be obeyed. The stream does not repeat it at once; it is asked
    /// a few times only, in case it ever does.
    fn refuse(&self, mut order: StreamOrder) {
        for _ in 0..REFUSALS_MAX {
            if order == StreamOrder::None {
                return;
            }
            order = self.tell(StreamInput::ReplayFailed);
        }
    }

    /// Has the engine worked for long without a word? Then the connection may be dead without
    /// having been closed. An engine that has nothing to say is asked less and less often.
    fn is_silent(&mut self) -> bool {
        let limit_ms = u64::from(self.shared.settings.event_idle_watchdog_s) * 1_000;
        let silent = limit_ms > 0
            && self.upstream.busy_ms.load(Ordering::Relaxed) >= limit_ms * self.patience;
        if silent {
            self.patience = (self.patience * 2).min(WATCHDOG_FACTOR_MAX);
        }
        silent
    }
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
