//! Can what we know about an endpoint's cache be trusted, and what must be done so that it can?
//!
//! One [`Stream`] per endpoint follows the sequence numbers of its engine's KV events. It decides
//! which batches are applied, when knowledge is void, and when the host must ask the engine's
//! replay socket. It does no IO: the host feeds [`StreamInput`]s and obeys [`StreamOrder`]s.
//!
//! What is guaranteed, for an engine whose events are complete and whose numbers go up by one:
//!
//! - In state [`StreamState::Live`] the effects so far, applied in order, give exactly the
//!   engine's state after its batch `last`. What the engine published later is in flight, or was
//!   lost unnoticed because nothing has arrived since: the next batch shows it. In particular no
//!   block is claimed that the engine had dropped by then.
//! - Every loss, duplicate, restart or refused event between two batches that arrive is noticed
//!   with the later one, and ends the state `Live` before it is applied, unless it is harmless.
//! - A restart shows by a number that is not the next one, or by `Lost` and `Connected`: then the
//!   last batch is asked for again and compared. Without a replay socket one restart stays
//!   unnoticed: of an engine that had published exactly as many batches, unheard, as were seen of
//!   the one before.
//! - From any state, a complete replay from 0 or an applied `Cleared` leads back to `Live`.
//! - Memory is bounded by `held_batches_max` batches.

#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::Time;
use crate::event::{EventBatch, KvEvent};

/// What happened on an endpoint's event sockets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamInput {
    /// The subscription is up, for the first time or again.
    Connected,
    /// The subscription is down. A replay in progress is not over by that: it ends with
    /// `ReplayDone` or `ReplayFailed`.
    Lost,
    /// A batch came from the subscription. One that could not be decoded as a whole is left out.
    Batch {
        /// Its sequence number.
        seq: u64,
        /// What it says.
        batch: EventBatch,
    },
    /// A batch came from the replay socket.
    ReplayBatch {
        /// Its sequence number.
        seq: u64,
        /// What it says.
        batch: EventBatch,
    },
    /// The engine marked the end of the replay.
    ReplayDone,
    /// The replay broke off, timed out or could not be started.
    ReplayFailed,
    /// Predicted and delivered hits drift apart: what the events told is wrong.
    Drift,
    /// Predicted and delivered hits agree again.
    Agrees,
    /// Time has passed. A few per second are enough.
    Tick,
}

/// What the host must do after an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum StreamOrder {
    /// Nothing.
    None,
    /// Ask the replay socket for all batches from this number on, feed them as `ReplayBatch`, and
    /// end with `ReplayDone` or `ReplayFailed`. At most one replay is ordered at a time.
    Replay {
        /// The first number to ask for. It may be a batch that was seen before: whether it comes
        /// again unchanged tells whether the engine has restarted.
        from: u64,
    },
}

/// Why an endpoint's knowledge cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuspectReason {
    /// The engine had published before the subscription began, and could not replay it.
    LateStart,
    /// Batches are missing and could not be replayed.
    Gap,
    /// The engine's replay buffer did not reach back far enough, or had a hole.
    ReplayIncomplete,
    /// More batches arrived during a replay than may be held.
    HeldOverflow,
    /// A batch had events that could not be decoded.
    BadEvents,
    /// Predictions do not match what the engine delivers.
    Drift,
    /// The subscription is down, or came back and nothing has confirmed yet that the engine is
    /// still the same.
    Lost,
}

impl SuspectReason {
    /// All reasons, in the order of their declaration.
    pub const ALL: [SuspectReason; 7] = [
        SuspectReason::LateStart,
        SuspectReason::Gap,
        SuspectReason::ReplayIncomplete,
        SuspectReason::HeldOverflow,
        SuspectReason::BadEvents,
        SuspectReason::Drift,
        SuspectReason::Lost,
    ];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            SuspectReason::LateStart => "late_start",
            SuspectReason::Gap => "gap",
            SuspectReason::ReplayIncomplete => "replay_incomplete",
            SuspectReason::HeldOverflow => "held_overflow",
            SuspectReason::BadEvents => "bad_events",
            SuspectReason::Drift => "drift",
            SuspectReason::Lost => "lost",
        }
    }
}

/// How far knowledge can be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamState {
    /// Nothing has been heard.
    #[default]
    Initial,
    /// Knowledge is complete as of the last batch.
    Live,
    /// A replay is under way; knowledge is as old as the last applied batch, or being rebuilt.
    Replaying,
    /// Knowledge has holes or claims too much.
    Suspect(SuspectReason),
}

/// What a stream may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// Whether the engine has a replay socket.
    pub replay_available: bool,
    /// Batches kept back while a replay is under way.
    pub held_batches_max: u32,
    /// Rest after a replay that failed or was incomplete.
    pub replay_cooldown: Duration,
}

impl Default for StreamLimits {
    /// No replay socket, 1,024 held batches, 30 s rest.
    fn default() -> StreamLimits {
        StreamLimits {
            replay_available: false,
            held_batches_max: 1024,
            replay_cooldown: Duration::from_secs(30),
        }
    }
}

/// What must happen to the index, in this order.
#[derive(Clone, Copy, Debug)]
pub enum StreamEffect<'a> {
    /// Apply the events.
    Apply(&'a EventBatch),
    /// Forget what the engine reported: it restarted, or knowledge is void.
    Reset,
}

/// Counts since the stream began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StreamCounters {
    /// Batches from the subscription.
    pub batches: u64,
    /// Batches applied, from either socket.
    pub applied: u64,
    /// Of these, from the replay socket.
    pub replayed: u64,
    /// Batches dropped because they had been applied before, or came late from an engine that is
    /// gone.
    pub duplicates: u64,
    /// Times that numbers were missing.
    pub gaps: u64,
    /// Numbers missing in these gaps.
    pub missed: u64,
    /// Restarts of the engine.
    pub restarts: u64,
    /// Times that knowledge was declared void.
    pub resets: u64,
    /// Replays ordered.
    pub replays: u64,
    /// Replays that failed.
    pub replays_failed: u64,
    /// Replays with a hole, or that began too late.
    pub replays_incomplete: u64,
    /// Batches dropped because too many were held.
    pub held_dropped: u64,
    /// Events that could not be decoded.
    pub events_bad: u64,
    /// Times that the subscription went down.
    pub lost: u64,
    /// Replayed batches that nobody had asked for.
    pub stray: u64,
}

/// A batch as it is recognised: two batches with one number are the same only if this agrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    seq: u64,
    print: u64,
}

impl Seen {
    fn new(seq: u64, batch: &EventBatch) -> Seen {
        let first = batch.events.first().map_or(0, |event| match event {
            KvEvent::Stored(stored) => stored.hashes.first().map_or(1, |hash| hash.0),
            KvEvent::Removed(removed) => removed.hashes.first().map_or(2, |hash| hash.0),
            KvEvent::Cleared => 3,
        });
        let parts = [batch.timestamp_s.to_bits(), batch.events.len() as u64, first];
        Seen { seq, print: xxh3_64_with_seed(bytemuck::bytes_of(&parts), 0) }
    }
}

/// A replay under way.
#[derive(Clone, Copy, Debug)]
struct Replay {
    /// The batch that must come first, unchanged; `None` for a replay of everything.
    anchor: Option<Seen>,
    /// The number that must come next.
    next: u64,
    /// A batch has come.
    begun: bool,
    /// Batches that were new.
    applied: u64,
    /// The engine turned out to be another one: the rest of this replay means nothing.
    void: bool,
    /// Number that had been reached before everything was asked for again.
    goal: Option<u64>,
    /// What to call the endpoint if this fails.
    reason: SuspectReason,
}

type Effect<'e> = &'e mut dyn FnMut(StreamEffect<'_>);

/// Applied batches that are remembered, to tell a late duplicate from a restart.
const RECENT_MAX: usize = 32;

/// The state machine of one endpoint's event stream. See the module's documentation.
#[derive(Debug)]
pub struct Stream {
    limits: StreamLimits,
    connected: bool,
    /// The connection was lost, and nothing has come since.
    unverified: bool,
    /// The engine said that it has published nothing.
    fresh: bool,
    last: Option<Seen>,
    last_timestamp_s: f64,
    recent: VecDeque<Seen>,
    doubt: Option<SuspectReason>,
    /// A replay of everything may end the doubt.
    curable: bool,
    replay: Option<Replay>,
    replay_not_before: Time,
    held: VecDeque<(u64, EventBatch)>,
    /// The newest batch that came during a replay, held or dropped.
    newest: Option<Seen>,
    dropped: bool,
    counters: StreamCounters,
}

impl Stream {
    /// A stream of which nothing has been heard.
    pub fn new(limits: StreamLimits) -> Stream {
        Stream {
            limits,
            connected: false,
            unverified: false,
            fresh: false,
            last: None,
            last_timestamp_s: 0.0,
            recent: VecDeque::new(),
            doubt: None,
            curable: false,
            replay: None,
            replay_not_before: Time::ZERO,
            held: VecDeque::new(),
            newest: None,
            dropped: false,
            counters: StreamCounters::default(),
        }
    }

    /// A stream that is in a state, as a snapshot tells: to decide with, not to be continued.
    pub(crate) fn in_state(limits: StreamLimits, state: StreamState) -> Stream {
        let mut stream = Stream::new(limits);
        match state {
            StreamState::Initial => {}
            StreamState::Live => stream.fresh = true,
            StreamState::Suspect(reason) => stream.doubt = Some(reason),
            StreamState::Replaying => {
                stream.replay = Some(Replay {
                    anchor: None,
                    next: 0,
                    begun: false,
                    applied: 0,
                    void: false,
                    goal: None,
                    reason: SuspectReason::Gap,
                });
            }
        }
        stream
    }

    /// How far knowledge can be trusted.
    pub fn state(&self) -> StreamState {
        if self.replay.is_some() {
            return StreamState::Replaying;
        }
        match (self.doubt, self.last) {
            (Some(reason), _) => StreamState::Suspect(reason),
            (None, None) if !self.fresh => StreamState::Initial,
            _ if self.unverified => StreamState::Suspect(SuspectReason::Lost),
            _ => StreamState::Live,
        }
    }

    /// Whether the subscription is up.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Number of the last applied batch.
    pub fn last_seq(&self) -> Option<u64> {
        self.last.map(|last| last.seq)
    }

    /// Counts since the stream began.
    pub fn counters(&self) -> &StreamCounters {
        &self.counters
    }

    /// Takes an input, calls `effect` for each thing that must happen to the index, and returns
    /// what the host must do.
    pub fn on(&mut self, now: Time, input: StreamInput, effect: Effect<'_>) -> StreamOrder {
        match input {
            StreamInput::Connected => self.connected(now),
            StreamInput::Lost => self.lost(),
            StreamInput::Batch { seq, batch } => {
                self.connected = true;
                self.counters.batches += 1;
                match self.replay {
                    Some(_) => self.hold(seq, batch),
                    None => self.live(now, seq, batch, effect),
                }
            }
            StreamInput::ReplayBatch { seq, batch } => self.replayed(seq, &batch, effect),
            StreamInput::ReplayDone => self.replay_done(now, effect),
            StreamInput::ReplayFailed => self.replay_failed(now, effect),
            StreamInput::Drift => self.drift(now),
            StreamInput::Agrees => self.agrees(),
            StreamInput::Tick => self.cure(now),
        }
    }

    fn connected(&mut self, now: Time) -> StreamOrder {
        self.connected = true;
        if !self.can_replay(now) {
            return StreamOrder::None;
        }
        match self.last {
            // An engine that is idle would not tell by itself what it holds.
            None => self.replay_all(SuspectReason::LateStart),
            Some(_) if self.doubt.is_some() && self.curable => self.cure(now),
            Some(last) if self.unverified => self.replay_after(last, SuspectReason::Lost),
            Some(_) => StreamOrder::None,
        }
    }

    fn lost(&mut self) -> StreamOrder {
        self.counters.lost += 1;
        self.connected = false;
        self.unverified = true;
        if let Some(replay) = &mut self.replay {
            // It may be the end of an engine whose successor is heard next.
            replay.void = true;
            self.forget_held();
        }
        StreamOrder::None
    }

    fn forget_held(&mut self) {
        self.held.clear();
        (self.newest, self.dropped) = (None, false);
    }

    fn drift(&mut self, now: Time) -> StreamOrder {
        let nothing_known = self.last.is_none() && !self.fresh;
        if nothing_known || self.replay.is_some() {
            return StreamOrder::None;
        }
        self.suspect(SuspectReason::Drift, true);
        self.cure(now)
    }

    fn agrees(&mut self) -> StreamOrder {
        if self.replay.is_none() {
            (self.doubt, self.curable) = (None, false);
        }
        StreamOrder::None
    }

    /// Asks for everything again where that may end a doubt.
    fn cure(&mut self, now: Time) -> StreamOrder {
        match self.doubt {
            Some(reason) if self.curable && self.connected && self.can_replay(now) => {
                self.replay_all(reason)
            }
            _ => StreamOrder::None,
        }
    }

    // --- live batches

    fn live(&mut self, now: Time, seq: u64, batch: EventBatch, effect: Effect<'_>) -> StreamOrder {
        let seen = Seen::new(seq, &batch);
        let Some(last) = self.last else { return self.first(now, seq, batch, effect) };
        if seq.checked_sub(1) == Some(last.seq) {
            if self.is_outdated(&batch) {
                self.counters.duplicates += 1;
                return StreamOrder::None;
            }
            if self.unverified && self.can_replay(now) {
                let _ = self.hold(seq, batch);
                return self.replay_after(last, SuspectReason::Lost);
            }
            self.apply(seen, &batch, effect);
            return StreamOrder::None;
        }
        if self.recent.contains(&seen) {
            self.counters.duplicates += 1;
            return StreamOrder::None;
        }
        if seq <= last.seq {
            self.counters.restarts += 1;
            self.start_over(effect);
            return self.first(now, seq, batch, effect);
        }
        self.count_gap(last, seq);
        if self.can_replay(now) {
            let _ = self.hold(seq, batch);
            return self.replay_after(last, SuspectReason::Gap);
        }
        self.void(SuspectReason::Gap, true, effect);
        self.apply(seen, &batch, effect);
        StreamOrder::None
    }

    /// The first batch of an engine.
    fn first(&mut self, now: Time, seq: u64, batch: EventBatch, effect: Effect<'_>) -> StreamOrder {
        if seq > 0 && self.can_replay(now) {
            let _ = self.hold(seq, batch);
            return self.replay_all(SuspectReason::LateStart);
        }
        (self.doubt, self.curable) = (None, false);
        if seq > 0 {
            self.suspect(SuspectReason::LateStart, true);
        }
        self.apply(Seen::new(seq, &batch), &batch, effect);
        StreamOrder::None
    }

    /// Whether a batch is of an engine that is gone, though its number fits: a replay may have told
    /// what its successor published while the batch was under way. Should the engine's clock have
    /// been set back instead, the next batch shows a gap, and a replay fills it.
    fn is_outdated(&self, batch: &EventBatch) -> bool {
        self.limits.replay_available && batch.timestamp_s < self.last_timestamp_s
    }

    fn apply(&mut self, seen: Seen, batch: &EventBatch, effect: Effect<'_>) {
        effect(StreamEffect::Apply(batch));
        self.counters.applied += 1;
        self.counters.events_bad += u64::from(batch.events_bad);
        self.last = Some(seen);
        self.last_timestamp_s = batch.timestamp_s;
        self.fresh = false;
        if std::mem::take(&mut self.unverified) && self.limits.replay_available {
            // The number fits, which may be chance; a replay can tell.
            self.suspect(SuspectReason::Lost, true);
        }
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(seen);
        if batch.events_bad > 0 {
            // A removal may be among them, and a store after a clear as well.
            self.suspect(SuspectReason::BadEvents, true);
        } else if batch.events.contains(&KvEvent::Cleared) {
            (self.doubt, self.curable) = (None, false);
        }
    }

    fn count_gap(&mut self, last: Seen, seq: u64) {
        self.counters.gaps += 1;
        self.counters.missed += seq - last.seq - 1;
    }

    /// What comes next is of another engine, or may be.
    fn start_over(&mut self, effect: Effect<'_>) {
        self.reset(effect);
        self.last = None;
        self.recent.clear();
        (self.doubt, self.curable) = (None, false);
        (self.unverified, self.fresh) = (false, false);
    }

    fn reset(&mut self, effect: Effect<'_>) {
        self.counters.resets += 1;
        effect(StreamEffect::Reset);
    }

    fn suspect(&mut self, reason: SuspectReason, curable: bool) {
        self.doubt = Some(reason);
        self.curable = curable;
    }

    /// Knowledge claims too much; what comes from now on is right but not everything.
    fn void(&mut self, reason: SuspectReason, curable: bool, effect: Effect<'_>) {
        self.reset(effect);
        self.suspect(reason, curable);
        self.unverified = false;
    }

    // --- replay

    fn can_replay(&self, now: Time) -> bool {
        self.limits.replay_available && self.replay.is_none() && now >= self.replay_not_before
    }

    fn replay_all(&mut self, reason: SuspectReason) -> StreamOrder {
        let goal = self.last.map(|last| last.seq);
        self.begin(Replay { goal, ..Replay::new(None, reason) }, 0)
    }

    fn replay_after(&mut self, last: Seen, reason: SuspectReason) -> StreamOrder {
        self.begin(Replay::new(Some(last), reason), last.seq)
    }

    fn begin(&mut self, replay: Replay, from: u64) -> StreamOrder {
        self.counters.replays += 1;
        self.replay = Some(replay);
        StreamOrder::Replay { from }
    }

    /// Keeps a live batch until the replay is over.
    fn hold(&mut self, seq: u64, batch: EventBatch) -> StreamOrder {
        let seen = Seen::new(seq, &batch);
        if let Some(before) = self.newest.or(self.last)
            && seq <= before.seq
        {
            let held = |(at, held): &(u64, EventBatch)| Seen::new(*at, held) == seen;
            // Once the engine may be another one, what was applied before proves nothing.
            let void = self.replay.is_some_and(|replay| replay.void);
            let known = self.newest == Some(seen)
                || self.held.iter().any(held)
                || (!void && self.recent.contains(&seen));
            if known {
                self.counters.duplicates += 1;
                return StreamOrder::None;
            }
            // What is held and what is being replayed is of an engine that is gone.
            self.counters.restarts += 1;
            self.forget_held();
            self.replay.iter_mut().for_each(|replay| replay.void = true);
        }
        self.newest = Some(seen);
        if self.dropped || self.held.len() >= self.limits.held_batches_max as usize {
            self.counters.held_dropped += 1;
            self.dropped = true;
        } else {
            self.held.push_back((seq, batch));
        }
        StreamOrder::None
    }

    fn replayed(&mut self, seq: u64, batch: &EventBatch, effect: Effect<'_>) -> StreamOrder {
        let Some(mut replay) = self.replay.filter(|replay| !replay.void) else {
            self.counters.stray += u64::from(self.replay.is_none());
            return StreamOrder::None;
        };
        let seen = Seen::new(seq, batch);
        if replay.anchor.is_some_and(|anchor| !replay.begun && seq == anchor.seq) {
            replay.begun = true;
            replay.void = replay.anchor != Some(seen);
            self.unverified &= replay.void;
            self.counters.restarts += u64::from(replay.void);
        } else if seq < replay.next {
            self.counters.duplicates += 1;
        } else {
            let hole = seq > replay.next || (replay.anchor.is_some() && !replay.begun);
            if hole {
                self.counters.replays_incomplete += 1;
                // A buffer that begins too late will not begin earlier next time.
                self.void(SuspectReason::ReplayIncomplete, replay.begun, effect);
            } else if replay.anchor.is_none() && !replay.begun {
                self.forget_all(effect);
            }
            self.apply(seen, batch, effect);
            // Asking for it once more would give the same bytes.
            self.curable &= batch.events_bad == 0;
            self.counters.replayed += 1;
            (replay.begun, replay.next) = (true, seq.saturating_add(1));
            replay.applied += 1;
        }
        self.replay = Some(replay);
        StreamOrder::None
    }

    /// Everything is told again from the beginning.
    fn forget_all(&mut self, effect: Effect<'_>) {
        if self.last.is_some() {
            self.reset(effect);
        }
        (self.doubt, self.curable) = (None, false);
        self.unverified = false;
    }

    fn replay_done(&mut self, now: Time, effect: Effect<'_>) -> StreamOrder {
        let Some(replay) = self.replay.take() else { return StreamOrder::None };
        // An engine always has its latest batch: one that does not know ours never sent it.
        let unknown = replay.anchor.is_some() && !replay.begun;
        if replay.void || unknown {
            self.counters.restarts += u64::from(!replay.void);
            self.start_over(effect);
            return match self.held.front() {
                Some((0, _)) => self.drain(now, true, SuspectReason::LateStart, effect),
                _ => self.replay_all(SuspectReason::LateStart),
            };
        }
        if replay.begun {
            let short = replay.goal > self.last_seq();
            if short {
                self.counters.replays_incomplete += 1;
                self.suspect(SuspectReason::ReplayIncomplete, true);
            }
            if self.doubt.is_some() {
                self.rest(now);
            }
            return self.drain(now, replay.applied > 0, SuspectReason::LateStart, effect);
        }
        // Everything was asked for, and there is nothing.
        self.forget_all(effect);
        self.last = None;
        self.recent.clear();
        self.fresh = self.held.is_empty();
        self.rest(now);
        self.drain(now, false, SuspectReason::ReplayIncomplete, effect)
    }

    fn replay_failed(&mut self, now: Time, effect: Effect<'_>) -> StreamOrder {
        let Some(replay) = self.replay.take() else { return StreamOrder::None };
        self.counters.replays_failed += 1;
        self.rest(now);
        let batches_dropped = replay.reason == SuspectReason::HeldOverflow;
        if replay.void {
            self.start_over(effect);
            self.suspect(SuspectReason::LateStart, true);
        } else if batches_dropped || (replay.anchor.is_none() && replay.begun) {
            self.void(replay.reason, true, effect);
        } else if replay.anchor.is_none() {
            self.suspect(replay.reason, true);
        }
        self.drain(now, false, SuspectReason::LateStart, effect)
    }

    fn rest(&mut self, now: Time) {
        self.replay_not_before = now + self.limits.replay_cooldown;
    }

    /// Applies what was held during a replay. After one that brought something new, another gap is
    /// worth another replay. `unknown` is what to call batches before the first one held.
    fn drain(
        &mut self,
        now: Time,
        mut progress: bool,
        unknown: SuspectReason,
        effect: Effect<'_>,
    ) -> StreamOrder {
        let newest = self.newest.take();
        while let Some((seq, batch)) = self.held.pop_front() {
            let seen = Seen::new(seq, &batch);
            match self.last {
                None => {
                    (self.doubt, self.curable) = (None, false);
                    if seq > 0 {
                        self.suspect(unknown, unknown == SuspectReason::LateStart);
                    }
                }
                Some(last) if seq <= last.seq => {
                    if self.recent.iter().any(|r| r.seq == seq && r.print != seen.print) {
                        // One engine was replayed, another one is live.
                        self.counters.restarts += 1;
                        self.start_over(effect);
                        self.forget_held();
                        return self.replay_all(SuspectReason::LateStart);
                    }
                    self.counters.duplicates += 1;
                    continue;
                }
                Some(last) if seq - 1 == last.seq && self.is_outdated(&batch) => {
                    self.counters.duplicates += 1;
                    continue;
                }
                Some(last) if seq - 1 == last.seq => {}
                Some(last) => {
                    self.count_gap(last, seq);
                    if progress && self.can_replay(now) {
                        self.held.push_front((seq, batch));
                        self.newest = newest;
                        return self.replay_after(last, SuspectReason::Gap);
                    }
                    self.void(SuspectReason::Gap, true, effect);
                }
            }
            self.apply(seen, &batch, effect);
            progress = true;
        }
        if !std::mem::take(&mut self.dropped) {
            return StreamOrder::None;
        }
        // What followed the held batches had to be dropped: it is a gap that is known already.
        match self.last {
            Some(last) if progress && self.can_replay(now) => {
                let replay = Replay::new(Some(last), SuspectReason::HeldOverflow);
                let goal = newest.map(|newest| newest.seq);
                self.begin(Replay { goal, ..replay }, last.seq)
            }
            _ => {
                self.void(SuspectReason::HeldOverflow, true, effect);
                StreamOrder::None
            }
        }
    }
}

impl Replay {
    fn new(anchor: Option<Seen>, reason: SuspectReason) -> Replay {
        let next = anchor.map_or(0, |anchor| anchor.seq.saturating_add(1));
        Replay { anchor, next, begun: false, applied: 0, void: false, goal: None, reason }
    }
}
