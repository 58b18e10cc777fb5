//! The engine's event sockets: PUB for the stream, ROUTER for replay, as vLLM 0.32 has them.
//!
//! A message is three frames: topic, sequence number (8 bytes, big endian, from 0), msgpack batch.
//! A replay request is `["", start]`; the answer is `["", topic, sequence, payload]` for every kept
//! message from `start` on, then `["", "", ff ff ff ff ff ff ff ff, ""]`.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvroute_core::event::{EventBatch, KvEvent};
use kvroute_wire::kv_event;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::zmtp::{self, Incoming, Peer};

/// Messages kept for replay (vLLM's default).
pub const BUFFER_STEPS_MAX: usize = 10_000;

/// Messages queued for one subscriber before it loses some (vLLM's default high-water mark).
pub const SUBSCRIBER_QUEUE_MAX: usize = 100_000;

/// Topics one subscriber may subscribe to.
const TOPICS_PER_SUBSCRIBER_MAX: usize = 64;

/// Wait before connecting again (libzmq's default).
const RECONNECT: Duration = Duration::from_millis(100);

const END_SEQUENCE: [u8; 8] = [0xff; 8];

struct Subscriber {
    id: u64,
    topics: Vec<Bytes>,
    queue: mpsc::Sender<Bytes>,
}

struct State {
    next_sequence: u64,
    kept: VecDeque<(u64, Bytes)>,
    subscribers: Vec<Subscriber>,
    next_subscriber: u64,
    drop_next: u32,
    paused: bool,
    payload: Vec<u8>,
}

/// Numbers, keeps and sends the event batches of one engine.
pub(super) struct Publisher {
    topic: String,
    state: Mutex<State>,
    subscribed: watch::Sender<usize>,
}

impl Publisher {
    pub(super) fn new(topic: String) -> Arc<Publisher> {
        let state = State {
            next_sequence: 0,
            kept: VecDeque::new(),
            subscribers: Vec::new(),
            next_subscriber: 0,
            drop_next: 0,
            paused: false,
            payload: Vec::new(),
        };
        let (subscribed, _) = watch::channel(0);
        Arc::new(Publisher { topic, state: Mutex::new(state), subscribed })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes what happened in one step.
    pub(super) fn publish(&self, events: Vec<KvEvent>, unix_s: f64) {
        let batch = EventBatch { timestamp_s: unix_s, events, rank: Some(0), events_bad: 0 };
        let mut state = self.state();
        let State { payload, .. } = &mut *state;
        payload.clear();
        kv_event::encode_batch(&batch, payload);
        let payload = Bytes::copy_from_slice(payload);
        let sequence = state.next_sequence;
        state.next_sequence += 1;
        if state.kept.len() >= BUFFER_STEPS_MAX {
            state.kept.pop_front();
        }
        state.kept.push_back((sequence, payload.clone()));
        if state.drop_next > 0 {
            state.drop_next -= 1;
            return;
        }
        if !state.paused {
            let mut wire = BytesMut::with_capacity(payload.len() + self.topic.len() + 32);
            let frames = [self.topic.as_bytes(), &sequence.to_be_bytes(), &payload];
            zmtp::encode_message(&frames, &mut wire);
            let wire = wire.freeze();
            for subscriber in &state.subscribers {
                if subscriber.topics.iter().any(|topic| self.topic.as_bytes().starts_with(topic)) {
                    // A full queue loses the message, as at libzmq's high-water mark.
                    let _ = subscriber.queue.try_send(wire.clone());
                }
            }
        }
    }

    /// The next sequence number: how many batches there were.
    pub(super) fn sequence(&self) -> u64 {
        self.state().next_sequence
    }

    /// The next `count` batches are numbered and kept, but not sent.
    pub(super) fn drop_next(&self, count: u32) {
        self.state().drop_next = count;
    }

    /// While paused, batches are numbered and kept, but not sent.
    pub(super) fn pause(&self, paused: bool) {
        self.state().paused = paused;
    }

    /// Forgets what is kept for replay.
    pub(super) fn forget_kept(&self) {
        self.state().kept.clear();
    }

    /// How many connections have subscribed to something.
    pub(super) fn subscribers(&self) -> watch::Receiver<usize> {
        self.subscribed.subscribe()
    }

    fn count_subscribers(&self, state: &State) {
        let count = state.subscribers.iter().filter(|s| !s.topics.is_empty()).count();
        self.subscribed.send_replace(count);
    }

    /// Serves the PUB socket until dropped.
    pub(super) async fn serve_events(self: Arc<Publisher>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    if let Ok((stream, _)) = accepted {
                        connections.spawn(self.clone().subscriber(stream));
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    /// Publishes to a subscriber that listens, over one connection after the other, until dropped.
    pub(super) async fn publish_to(self: Arc<Publisher>, router: SocketAddr) {
        loop {
            if let Ok(stream) = TcpStream::connect(router).await {
                self.clone().subscriber(stream).await;
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn subscriber(self: Arc<Publisher>, stream: TcpStream) {
        let Ok(peer) = Peer::accept(stream, "PUB").await else { return };
        let (queue, messages) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let id = {
            let mut state = self.state();
            state.next_subscriber += 1;
            let id = state.next_subscriber;
            state.subscribers.push(Subscriber { id, topics: Vec::new(), queue });
            id
        };
        let _leave = Leave { publisher: &self, id };
        if let Err(error) = self.feed(id, peer, messages).await {
            tracing::debug!(%error, "a subscriber left");
        }
    }

    async fn feed(
        &self,
        id: u64,
        mut peer: Peer,
        mut messages: mpsc::Receiver<Bytes>,
    ) -> io::Result<()> {
        loop {
            tokio::select! {
                incoming = peer.read() => self.subscription(id, incoming?),
                Some(message) = messages.recv() => peer.write(&message).await?,
            }
        }
    }

    fn subscription(&self, id: u64, incoming: Incoming) {
        let change = match incoming {
            Incoming::Message(frames) => zmtp::legacy_subscription(&frames),
            other => Some(other),
        };
        let mut state = self.state();
        let Some(subscriber) = state.subscribers.iter_mut().find(|s| s.id == id) else { return };
        match change {
            Some(Incoming::Subscribe(topic))
                if subscriber.topics.len() < TOPICS_PER_SUBSCRIBER_MAX =>
            {
                subscriber.topics.push(topic);
            }
            Some(Incoming::Cancel(topic)) => {
                if let Some(at) = subscriber.topics.iter().position(|known| *known == topic) {
                    subscriber.topics.remove(at);
                }
            }
            _ => {}
        }
        self.count_subscribers(&state);
    }

    /// Serves the replay socket until dropped.
    pub(super) async fn serve_replay(self: Arc<Publisher>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    if let Ok((stream, _)) = accepted {
                        connections.spawn(self.clone().replayer(stream));
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn replayer(self: Arc<Publisher>, stream: TcpStream) {
        let Ok(mut peer) = Peer::accept(stream, "ROUTER").await else { return };
        while let Ok(incoming) = peer.read().await {
            if self.replay(&mut peer, incoming).await.is_err() {
                return;
            }
        }
    }

    async fn replay(&self, peer: &mut Peer, incoming: Incoming) -> io::Result<()> {
        let Incoming::Message(frames) = incoming else { return Ok(()) };
        let [_, start] = &frames[..] else {
            tracing::warn!(frames = frames.len(), "a replay request must have 2 frames");
            return Ok(());
        };
        // Like Python's int.from_bytes: any length counts.
        let start = start.iter().fold(0u64, |sum, &byte| sum.wrapping_shl(8) | u64::from(byte));
        let wanted: Vec<(u64, Bytes)> =
            self.state().kept.iter().filter(|(sequence, _)| *sequence >= start).cloned().collect();
        let mut wire = BytesMut::new();
        for (sequence, payload) in wanted {
            wire.clear();
            let frames = [b"", self.topic.as_bytes(), &sequence.to_be_bytes(), &payload];
            zmtp::encode_message(&frames, &mut wire);
            peer.write(&wire).await?;
        }
        wire.clear();
        zmtp::encode_message(&[b"", b"", &END_SEQUENCE, b""], &mut wire);
        peer.write(&wire).await
    }
}

struct Leave<'a> {
    publisher: &'a Publisher,
    id: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let mut state = self.publisher.state();
        state.subscribers.retain(|subscriber| subscriber.id != self.id);
        self.publisher.count_subscribers(&state);
    }
}
