//! How is a hole in an event stream filled? A replay socket answers one request with all batches
//! it still holds.
//!
//! Request `["", seq]`; answers `["", topic, seq, payload]` (vLLM up to 0.24 without the topic)
//! and at the end a sequence number of all ones with an empty payload. Each replay has its own
//! connection, a deadline, and a limit for silence.

use bytes::Bytes;
use kvroute_core::settings::{Settings, ms};
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant};

use super::numbered;
use crate::zmtp::{Role, Socket};

/// Longest silence inside of a replay. Publishers serve it between two batches.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Batches read ahead of their application.
const AHEAD_MAX: usize = 64;
/// Sequence number of the end marker.
const END: u64 = u64::MAX;

/// What comes out of a replay.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReplayItem {
    /// A batch, not decoded.
    Batch { seq: u64, payload: Bytes },
    /// All that the engine holds has come.
    Done,
    /// It ended without the end marker.
    Failed(String),
}

/// A replay under way; dropping it ends it.
pub(crate) struct Replay {
    items: mpsc::Receiver<ReplayItem>,
    task: tokio::task::JoinHandle<()>,
}

impl Replay {
    /// Asks `address` for everything from sequence number `from` on.
    pub fn start(address: String, from: u64, settings: &Settings) -> Replay {
        let (sender, items) = mpsc::channel(AHEAD_MAX);
        let timeout = ms(settings.replay_timeout_ms.max(1));
        let bytes_max = settings.event_bytes_max;
        let task = tokio::spawn(async move {
            let last = match read(&address, from, timeout, bytes_max, &sender).await {
                Ok(()) => ReplayItem::Done,
                Err(reason) => ReplayItem::Failed(format!("{address}: {reason}")),
            };
            // Nobody listens any more when the subscription has ended.
            let _ = sender.send(last).await;
        });
        Replay { items, task }
    }

    /// The next item. The last one is `Done` or `Failed`.
    pub async fn next(&mut self) -> ReplayItem {
        let item = self.items.recv().await;
        item.unwrap_or_else(|| ReplayItem::Failed("the replay was cut short".to_owned()))
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read(
    address: &str,
    from: u64,
    timeout: Duration,
    bytes_max: usize,
    items: &mpsc::Sender<ReplayItem>,
) -> Result<(), String> {
    let deadline = Instant::now() + timeout;
    let mut socket = Socket::connect(address, Role::Dealer, SILENCE_MAX.min(timeout), bytes_max)
        .await
        .map_err(|e| e.to_string())?;
    socket.send(&[b"", &from.to_be_bytes()]).await.map_err(|e| e.to_string())?;
    loop {
        let until = deadline.min(Instant::now() + SILENCE_MAX);
        let frames = tokio::time::timeout_at(until, socket.recv())
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|e| e.to_string())?;
        let (seq, payload) = parts(&frames).ok_or("an answer of an unknown form")?;
        if seq == END && payload.is_empty() {
            return Ok(());
        }
        let batch = ReplayItem::Batch { seq, payload: payload.clone() };
        items.send(batch).await.map_err(|_| "nobody waits for it".to_owned())?;
    }
}

/// Sequence number and payload of an answer, with or without delimiter and topic.
fn parts(frames: &[Bytes]) -> Option<(u64, &Bytes)> {
    let (seq, payload) = match frames {
        [_delimiter, _topic, seq, payload] => (seq, payload),
        // Either the delimiter or the topic is missing; the number is in the same place.
        [_, seq, payload] => (seq, payload),
        [seq, payload] => (seq, payload),
        _ => return None,
    };
    Some((numbered(seq)?, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_all_versions() {
        let seq = Bytes::copy_from_slice(&7u64.to_be_bytes());
        let (empty, topic, payload) =
            (Bytes::new(), Bytes::from_static(b"kv@x"), Bytes::from_static(b"p"));
        for frames in [
            vec![empty.clone(), topic.clone(), seq.clone(), payload.clone()],
            vec![empty.clone(), seq.clone(), payload.clone()],
            vec![seq.clone(), payload.clone()],
        ] {
            assert_eq!(parts(&frames), Some((7, &payload)));
        }
        assert_eq!(parts(std::slice::from_ref(&seq)), None);
        assert_eq!(parts(&[empty, topic, payload.clone(), seq]), None);
    }
}
