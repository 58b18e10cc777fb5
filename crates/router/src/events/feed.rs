//! How do batches of one endpoint reach the brain, and who may bring them?
//!
//! An endpoint's events come over the router's own subscription, or over a connection that the
//! engine has made to the router's bound socket. Both may be there, so one [`Speaker`] at a time
//! has the word: an engine that connects names its endpoint itself, so it goes before the own
//! subscription, and the newest connection before an older one, which may be dead unnoticed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvroute_core::brain::Brain;
use kvroute_core::event::EventBatch;
use kvroute_core::stream::{StreamInput, StreamOrder, StreamState};
use parking_lot::MutexGuard;
use tracing::{info, warn};

use super::Subscription;
use crate::shared::Shared;
use crate::upstream::Upstream;

/// The watchdog's patience doubles up to this factor while it finds nothing.
const WATCHDOG_FACTOR_MAX: u64 = 32;
/// Most refusals in a row.
const REFUSALS_MAX: usize = 4;

/// Whose messages about an endpoint count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// The router's own subscription.
    #[default]
    Own,
    /// The connection of this number to the bound socket.
    Bound(u64),
}

/// What one speaker tells about one endpoint.
#[derive(Clone)]
pub(crate) struct Feed {
    pub shared: Arc<Shared>,
    pub upstream: Arc<Upstream>,
    pub speaker: Speaker,
}

impl Feed {
    /// Whether this speaker has the word.
    pub fn has_word(&self) -> bool {
        *self.upstream.speaker.borrow() == self.speaker
    }

    /// Takes the word for a connection to the bound socket, unless a newer one has it.
    pub fn take_word(&self) -> bool {
        self.upstream.speaker.send_if_modified(|speaker| {
            let goes_before = match (self.speaker, *speaker) {
                (Speaker::Bound(ours), Speaker::Bound(theirs)) => ours > theirs,
                (Speaker::Bound(_), Speaker::Own) => true,
                (Speaker::Own, _) => false,
            };
            if goes_before {
                *speaker = self.speaker;
            }
            goes_before
        })
    }

    /// Leaves the word to the own subscription.
    pub fn leave_word(&self) {
        self.upstream.speaker.send_if_modified(|speaker| {
            let ours = *speaker == self.speaker;
            if ours {
                *speaker = Speaker::Own;
            }
            ours
        });
    }

    /// Says what the subscription is doing; `false` when somebody else has the word.
    pub fn show(&self, subscription: Subscription) -> bool {
        let speaker = self.upstream.speaker.borrow();
        let ours = *speaker == self.speaker;
        if ours {
            *self.upstream.subscription.lock() = subscription;
        }
        ours
    }

    /// Says, and logs when it is new, why there are no events.
    pub fn failed(&self, reason: String) {
        let failed = Subscription::Failed(reason.clone());
        let before = self.upstream.subscription.lock().clone();
        if before != failed && self.show(failed) {
            let endpoint = self.upstream.name.as_str();
            warn!(endpoint, reason, "An endpoint's KV events are missing.");
        }
    }

    /// A connection is there, for the first time or again, `place` in words. `None` when somebody
    /// else has the word.
    pub fn connected(&self, place: String) -> Option<StreamOrder> {
        let upstream = &self.upstream;
        info!(endpoint = upstream.name, place, "Connected to an endpoint's KV events.");
        let before = self.has_word().then(|| upstream.subscription.lock().clone())?;
        if matches!(before, Subscription::Connected(_)) {
            // Another speaker had the word, and its replay goes with it.
            self.lost();
        }
        if !self.show(Subscription::Connected(place)) {
            return None;
        }
        if upstream.heard_before.swap(true, Ordering::Relaxed) {
            upstream.metrics.stream_reconnects.inc();
        }
        upstream.busy_ms.store(0, Ordering::Relaxed);
        self.refuse(upstream.take_order());
        Some(self.tell(StreamInput::Connected))
    }

    /// The connection is gone, and a replay that was under way with it.
    pub fn lost(&self) {
        self.refuse(self.tell(StreamInput::Lost));
        self.refuse(self.tell(StreamInput::ReplayFailed));
    }

    /// A message came. What cannot be read is counted and left out; its sequence number is then
    /// missing, which the stream notices.
    pub fn message(&self, seq: Option<u64>, batch: Option<EventBatch>) -> StreamOrder {
        let upstream = &self.upstream;
        upstream.patience.store(1, Ordering::Relaxed);
        upstream.busy_ms.store(0, Ordering::Relaxed);
        upstream.metrics.stream_messages.inc();
        match seq.zip(batch) {
            Some((seq, batch)) => {
                upstream.metrics.events_bad.inc_by(u64::from(batch.events_bad));
                self.tell(StreamInput::Batch { seq, batch })
            }
            None => {
                upstream.metrics.events_bad.inc();
                StreamOrder::None
            }
        }
    }

    /// Tells the brain, if this speaker has the word.
    pub fn tell(&self, input: StreamInput) -> StreamOrder {
        let (now, id) = (self.shared.clock.now(), self.upstream.id);
        let seen = |brain: &Brain| {
            brain.stream_state(id).zip(brain.stream_counters(id).map(|c| (c.gaps, c.restarts)))
        };
        // Held while the brain hears it, so that nobody takes the word in between.
        let speaker = self.upstream.speaker.borrow();
        if *speaker != self.speaker {
            return StreamOrder::None;
        }
        let (before, order, after) = {
            let mut brain = self.shared.brain.lock();
            let before = seen(&brain);
            let order = brain.on_stream_slice(now, id, input);
            let after = seen(&brain);
            // A request that waits goes first, if there is one.
            while brain.is_behind(id) {
                MutexGuard::bump(&mut brain);
                brain.catch_up(id);
            }
            (before, order, after)
        };
        drop(speaker);
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

    /// Answers an order that cannot be obeyed. The stream does not repeat it at once; it is asked
    /// a few times only, in case it ever does.
    pub fn refuse(&self, mut order: StreamOrder) {
        for _ in 0..REFUSALS_MAX {
            if order == StreamOrder::None {
                return;
            }
            order = self.tell(StreamInput::ReplayFailed);
        }
    }

    /// Has the engine worked for long without a word? Then the connection may be dead without
    /// having been closed. An engine that has nothing to say is asked less and less often.
    pub fn is_silent(&self) -> bool {
        let upstream = &self.upstream;
        let limit_ms = u64::from(self.shared.settings.event_idle_watchdog_s) * 1_000;
        let patience = upstream.patience.load(Ordering::Relaxed);
        let silent =
            limit_ms > 0 && upstream.busy_ms.load(Ordering::Relaxed) >= limit_ms * patience;
        if silent {
            upstream.patience.store((patience * 2).min(WATCHDOG_FACTOR_MAX), Ordering::Relaxed);
        }
        silent
    }
}
