//! Engines' events in tests: batches, publishers of a real ZeroMQ library, and what came of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvroute_core::event::{BlockStored, EngineHash, EventBatch, GroupKind, KvEvent, Tier};
use kvroute_core::stream::StreamState;
use kvroute_router::RouterHandle;
use kvroute_wire::kv_event::encode_batch;
use parking_lot::Mutex;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::eventually;

/// One full block of its own, opening a prompt.
pub fn stored(hash: u64) -> EventBatch {
    let tokens: Vec<u32> = (0..16).map(|t| t + 1000 * u32::try_from(hash).unwrap()).collect();
    let event = BlockStored {
        hashes: vec![EngineHash(hash)].into(),
        parent: None,
        tokens: tokens.into(),
        block_size: 16,
        lora_name: None,
        tier: Tier::Gpu,
        extras: Vec::new(),
        group: None,
        kind: GroupKind::Full,
    };
    let events = vec![KvEvent::Stored(event)];
    EventBatch { timestamp_s: 1.0, events, rank: Some(0), events_bad: 0 }
}

pub fn payload(batch: &EventBatch) -> Vec<u8> {
    let mut out = Vec::new();
    encode_batch(batch, &mut out);
    out
}

pub fn message(frames: &[&[u8]]) -> ZmqMessage {
    let frames: Vec<bytes::Bytes> =
        frames.iter().map(|f| bytes::Bytes::copy_from_slice(f)).collect();
    ZmqMessage::try_from(frames).unwrap()
}

/// A publisher with a replay socket, as in an engine.
pub struct Publisher {
    socket: PubSocket,
    pub events: SocketAddr,
    pub replay: SocketAddr,
    /// What the replay socket still holds, from sequence number 0.
    held: Arc<Mutex<Vec<Vec<u8>>>>,
    next: u64,
    replayer: tokio::task::JoinHandle<()>,
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.replayer.abort();
    }
}

pub async fn free_port() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

impl Publisher {
    pub async fn start(events: SocketAddr, with_topic: bool) -> Publisher {
        let mut socket = PubSocket::new();
        // The port may still belong to the publisher before this one.
        while socket.bind(&format!("tcp://{events}")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut replies = RouterSocket::new();
        let replay = free_port().await;
        replies.bind(&format!("tcp://{replay}")).await.unwrap();
        let held: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let there = Arc::clone(&held);
        let replayer = tokio::spawn(async move {
            while let Ok(request) = replies.recv().await {
                let frames = request.into_vec();
                assert_eq!(frames.len(), 3, "identity, delimiter, number");
                let from = u64::from_be_bytes(frames[2][..].try_into().unwrap());
                let mut answers: Vec<(u64, Vec<u8>)> =
                    there.lock().iter().cloned().enumerate().map(|(n, p)| (n as u64, p)).collect();
                answers.retain(|(n, _)| *n >= from);
                answers.push((u64::MAX, Vec::new()));
                for (seq, payload) in answers {
                    let seq = seq.to_be_bytes();
                    let mut parts: Vec<&[u8]> = vec![&frames[0], b""];
                    if with_topic {
                        parts.push(b"kv@engine@m");
                    }
                    parts.extend([&seq[..], &payload[..]]);
                    replies.send(message(&parts)).await.unwrap();
                }
            }
        });
        Publisher { socket, events, replay, held, next: 0, replayer }
    }

    /// Publishes a batch; what is `lost` or `garbled` is only kept for replay.
    pub async fn publish(&mut self, batch: &EventBatch, lost: bool, garbled: bool) {
        let good = payload(batch);
        self.held.lock().push(good.clone());
        let seq = self.next.to_be_bytes();
        self.next += 1;
        if !lost {
            let sent: &[u8] = if garbled { b"\xc1garbage" } else { &good };
            self.socket.send(message(&[b"", &seq, sent])).await.unwrap();
        }
    }

    pub fn sources(&self) -> String {
        format!(
            r#"{{"0":{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:{}",
            "replay_endpoint":"tcp://*:{}","topic":""}}}}"#,
            self.events.port(),
            self.replay.port()
        )
    }
}

pub fn resident(router: &RouterHandle) -> usize {
    let brain = router.brain();
    let id = brain.fleet().iter().next().unwrap().id;
    brain.index().endpoint_usage(id).resident
}

pub fn state(router: &RouterHandle) -> Option<StreamState> {
    let brain = router.brain();
    let id = brain.fleet().iter().next()?.id;
    brain.stream_state(id)
}

pub async fn caught_up(router: &RouterHandle, blocks: usize) {
    eventually(&format!("{blocks} blocks"), || {
        resident(router) == blocks && state(router) == Some(StreamState::Live)
    })
    .await;
}
