//! The way of KV events from an engine to the brain: a subscriber per endpoint, its link, its
//! replays. Does what the live router's subscriber does, over links that fail.

use std::collections::VecDeque;
use std::time::Duration;

use kvroute_core::stream::{StreamInput, StreamOrder, StreamState};
use kvroute_core::{EndpointId, Time};
use kvroute_wire::kv_event;

use super::delivery::Counted;
use super::engine::Message;
use super::fleet::{Member, ReplaySocket};
use super::world::{Event, World};
use super::{Checked, Sabotage, ensure};

/// How often an order that cannot be obeyed is refused in a row, as in the live router.
const REFUSALS_MAX: usize = 4;
/// First and longest wait between two attempts to connect, milliseconds.
const RECONNECT_MS: (u64, u64) = (100, 5_000);
/// Longest silence inside of a replay, milliseconds.
const REPLAY_SILENCE_MS: u64 = 5_000;

/// The connection of a subscriber to a publisher.
#[derive(Debug)]
pub(super) struct Link {
    /// Counts connections, so that events of an earlier one are recognised.
    connection: u64,
    pub up: bool,
    /// The process whose publisher knows the subscription.
    pub subscribed: Option<u64>,
    /// Messages on their way, in order.
    wire: VecDeque<Message>,
    /// When the last of them arrives.
    latest: Time,
    pub lose_next: u32,
    pub repeat_next: bool,
    pub garble_next: bool,
    /// The next message must arrive: it alone shows a restart.
    pub protect_next: bool,
    pub dark_until: Time,
    pub dark_loses: bool,
    replay: Option<Replay>,
    replays: u64,
    /// What a tick ordered and nobody has picked up.
    mailbox: StreamOrder,
    attempts: u32,
    /// Messages of an earlier connection that turn up after the next one stands.
    late: Vec<Message>,
    /// By how much sabotage has renumbered messages.
    skew: u64,
}

/// A replay under way.
#[derive(Debug)]
struct Replay {
    no: u64,
    from: u64,
    until: Time,
    /// `None` before the engine has been asked.
    answer: Option<Answer>,
}

/// What an engine answers to a replay request.
#[derive(Debug)]
struct Answer {
    run: u64,
    messages: VecDeque<Message>,
    /// It ends with the end marker.
    whole: bool,
}

/// What happens to replays of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplayMood {
    Fine,
    Refused,
    Truncated,
    Slow,
}

impl Link {
    pub fn new() -> Link {
        Link {
            connection: 0,
            up: false,
            subscribed: None,
            wire: VecDeque::new(),
            latest: Time::ZERO,
            lose_next: 0,
            repeat_next: false,
            garble_next: false,
            protect_next: false,
            dark_until: Time::ZERO,
            dark_loses: false,
            replay: None,
            replays: 0,
            mailbox: StreamOrder::None,
            attempts: 0,
            late: Vec::new(),
            skew: 0,
        }
    }

    /// The connection's number, for an event about it.
    pub fn connection(&self) -> u64 {
        self.connection
    }

    /// Everything that is wrong with it is over.
    pub fn heal(&mut self) {
        (self.lose_next, self.repeat_next, self.garble_next) = (0, false, false);
        self.dark_until = Time::ZERO;
        self.late.clear();
    }
}

impl World {
    // --- connecting

    pub fn connect(&mut self, host: usize, id: EndpointId) -> Checked {
        let (now, jitter) = (self.now, self.ms(0, 40));
        let Some(run) = self.hosts[host].process.as_ref().map(|process| process.run) else {
            return self.connect_later(host, id);
        };
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let link = &mut member.link;
        if now < link.dark_until {
            return self.connect_later(host, id);
        }
        link.connection += 1;
        (link.up, link.subscribed, link.attempts) = (true, None, 0);
        let connection = link.connection;
        let waiting = std::mem::replace(&mut link.mailbox, StreamOrder::None);
        self.note(format!("link {host} is up (run {run})"));
        self.after_ms(jitter, Event::Subscribed { host, id, connection });
        self.refuse(host, id, waiting)?;
        let order = self.tell(host, id, StreamInput::Connected, None)?;
        self.obey(host, id, order)
    }

    fn connect_later(&mut self, host: usize, id: EndpointId) -> Checked {
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let attempts = member.link.attempts;
        member.link.attempts += 1;
        let wait = (RECONNECT_MS.0 << attempts.min(10)).min(RECONNECT_MS.1);
        self.after_ms(wait, Event::Connect { host, id });
        Ok(())
    }

    /// What is published between connection and subscription reaches nobody.
    pub fn subscribed(&mut self, host: usize, id: EndpointId, connection: u64) {
        let run = self.hosts[host].process.as_ref().map(|process| process.run);
        let Some(member) = self.hosts[host].member_mut(id) else { return };
        if member.link.connection == connection && member.link.up {
            member.link.subscribed = run;
            if !member.link.late.is_empty() {
                let wait = self.ms(0, 400);
                self.after_ms(wait, Event::Late { host, id, connection });
            }
        }
    }

    pub fn link_lost(&mut self, host: usize, id: EndpointId, connection: u64) -> Checked {
        let keep = self.one_in(2) && !self.calm;
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let link = &mut member.link;
        if !link.up || link.connection != connection {
            return Ok(());
        }
        (link.up, link.subscribed, link.protect_next) = (false, None, false);
        let wire = std::mem::take(&mut link.wire);
        if keep {
            link.late = wire.into();
        }
        let replaying = link.replay.take().is_some();
        self.note(format!("link {host} is lost"));
        let order = self.tell(host, id, StreamInput::Lost, None)?;
        self.refuse(host, id, order)?;
        if replaying {
            let order = self.tell(host, id, StreamInput::ReplayFailed, None)?;
            self.refuse(host, id, order)?;
        }
        let wait = self.ms(75, 100);
        self.after_ms(wait, Event::Connect { host, id });
        Ok(())
    }

    /// Messages of a connection that is gone, after newer ones. Those of a process that is gone
    /// come only where a replay can tell them from its successor's.
    pub fn late(&mut self, host: usize, id: EndpointId, connection: u64) {
        let run = self.hosts[host].process.as_ref().map(|process| process.run);
        let told_apart = self.hosts[host].replay != ReplaySocket::None;
        let Some(member) = self.hosts[host].member_mut(id) else { return };
        if !member.link.up || member.link.connection != connection {
            return;
        }
        let late = std::mem::take(&mut member.link.late);
        for message in late.into_iter().filter(|m| told_apart || Some(m.run) == run) {
            self.count_fault("batch after reconnect");
            self.send(host, id, message);
        }
    }

    // --- live messages

    /// A process publishes: its link takes the message, or does not.
    pub fn publish(&mut self, host: usize, message: Message) {
        let now = self.now;
        let Some(member) = self.hosts[host].member.as_mut() else { return };
        let (id, link) = (member.id, &mut member.link);
        if !link.up || link.subscribed != Some(message.run) {
            return;
        }
        if !std::mem::take(&mut link.protect_next) {
            let lost = link.lose_next > 0;
            link.lose_next = link.lose_next.saturating_sub(1);
            if lost || (now < link.dark_until && link.dark_loses) {
                self.note(format!("batch {} of {host} is lost", message.seq));
                return self.count_fault("batch lost");
            }
        }
        if self.sabotaged(Sabotage::HiddenLoss, 9) {
            self.skew(host);
            return;
        }
        let repeat = self.hosts[host]
            .member_mut(id)
            .is_some_and(|member| std::mem::take(&mut member.link.repeat_next));
        if repeat {
            self.count_fault("batch repeated");
            self.send(host, id, message.clone());
        }
        self.send(host, id, message);
    }

    fn skew(&mut self, host: usize) {
        if let Some(member) = self.hosts[host].member.as_mut() {
            member.link.skew += 1;
        }
    }

    fn send(&mut self, host: usize, id: EndpointId, mut message: Message) {
        let arrives = self.now + Duration::from_millis(self.ms(1, 30));
        let Some(member) = self.hosts[host].member_mut(id) else { return };
        let link = &mut member.link;
        message.seq = message.seq.saturating_sub(link.skew);
        link.latest = link.latest.max(arrives).max(link.dark_until);
        link.wire.push_back(message);
        let (at, connection) = (link.latest, link.connection);
        self.at(at, Event::Deliver { host, id, connection });
    }

    pub fn deliver(&mut self, host: usize, id: EndpointId, connection: u64) -> Checked {
        let now = self.now;
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let link = &mut member.link;
        if !link.up || link.connection != connection {
            return Ok(());
        }
        if now < link.dark_until {
            let at = link.dark_until;
            self.at(at, Event::Deliver { host, id, connection });
            return Ok(());
        }
        let Some(message) = link.wire.pop_front() else { return Ok(()) };
        let garbled = std::mem::take(&mut link.garble_next);
        let payload = match garbled {
            true => &message.payload[..message.payload.len() / 2],
            false => &message.payload[..],
        };
        let Ok(mut batch) = kv_event::decode_batch(payload) else {
            self.note(format!("batch {} of {host} cannot be read", message.seq));
            return ensure(garbled, "what an engine encodes can be decoded", || {
                format!("batch {} of run {}", message.seq, message.run)
            });
        };
        if self.sabotaged(Sabotage::EmptiedBatch, 7) {
            batch.events.clear();
        }
        let (run, seq) = (message.run, message.seq);
        self.note(format!("batch {seq} of {host} (run {run}), {} events", batch.events.len()));
        let order = self.tell(host, id, StreamInput::Batch { seq, batch }, Some(run))?;
        self.obey(host, id, order)
    }

    // --- the brain

    /// What the core has counted about an endpoint's stream.
    pub fn counted(&self, id: EndpointId) -> Counted {
        let counters = self.brain.stream_counters(id).copied().unwrap_or_default();
        Counted {
            resets: counters.resets,
            cleared: self.brain.stream_applied(id).map_or(0, |applied| applied.cleared),
            agreements: self.brain.ledger().account(id).verdicts.agreements,
            applied: counters.applied,
        }
    }

    /// Tells the brain and keeps the books. `run` is the process that a batch came from.
    pub fn tell(
        &mut self,
        host: usize,
        id: EndpointId,
        input: StreamInput,
        run: Option<u64>,
    ) -> Result<StreamOrder, super::Violation> {
        self.touched.push(host);
        let last_seq = self.brain.stream_last_seq(id);
        let (live, told) = match &input {
            StreamInput::Batch { seq, .. } => (Some(*seq), Some(*seq)),
            StreamInput::ReplayBatch { seq, .. } => (None, Some(*seq)),
            _ => (None, None),
        };
        if let (Some(seq), Some(run)) = (told, run)
            && let Some(member) = self.hosts[host].member_mut(id)
        {
            member.heard.delivers(run, seq);
        }
        let order = self.brain.on_stream(self.now, id, input);
        self.saw_state(id);
        let (counted, replays) = (self.counted(id), self.hosts[host].replay != ReplaySocket::None);
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(order) };
        let (Some(seq), Some(run)) = (live, run) else {
            member.heard.counted(counted);
            return Ok(order);
        };
        if member.heard.told(run, counted) && !replays {
            member.heard.mixed = true;
            let next = last_seq.map(|last| last + 1);
            ensure(next == Some(seq), "a restart is noticed", || {
                format!("batch {seq} of {host} (run {run}) was applied after {last_seq:?}")
            })?;
        }
        Ok(order)
    }

    fn saw_state(&mut self, id: EndpointId) {
        let state = match self.brain.stream_state(id) {
            Some(StreamState::Suspect(reason)) => reason.as_str(),
            Some(StreamState::Live) => "live",
            Some(StreamState::Replaying) => "replaying",
            Some(StreamState::Initial) | None => return,
        };
        self.saw(state);
    }

    // --- orders

    /// An order that a tick gave: a subscriber picks it up when it is connected.
    pub fn post(&mut self, id: EndpointId, order: StreamOrder) -> Checked {
        let Some(host) = self.host_of(id) else {
            return ensure(false, "orders are for endpoints of the fleet", || format!("{id:?}"));
        };
        let wait = self.ms(0, 5);
        if let Some(member) = self.hosts[host].member_mut(id) {
            member.link.mailbox = order;
        }
        self.after_ms(wait, Event::Mailbox { host, id });
        Ok(())
    }

    pub fn mailbox(&mut self, host: usize, id: EndpointId) -> Checked {
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        if !member.link.up {
            return Ok(());
        }
        let order = std::mem::replace(&mut member.link.mailbox, StreamOrder::None);
        self.obey(host, id, order)
    }

    fn obey(&mut self, host: usize, id: EndpointId, order: StreamOrder) -> Checked {
        let StreamOrder::Replay { from } = order else { return Ok(()) };
        if self.hosts[host].replay != ReplaySocket::Present {
            return self.refuse(host, id, order);
        }
        let until = self.now + Duration::from_millis(self.settings.replay_timeout_ms.into());
        let wait = self.ms(2, 60);
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let link = &mut member.link;
        ensure(link.replay.is_none(), "one replay is ordered at a time", || {
            format!("another one from {from} for {host}")
        })?;
        link.replays += 1;
        let replay = link.replays;
        link.replay = Some(Replay { no: replay, from, until, answer: None });
        self.note(format!("replay of {host} from {from}"));
        self.after_ms(wait, Event::ReplayNext { host, id, replay });
        Ok(())
    }

    fn refuse(&mut self, host: usize, id: EndpointId, mut order: StreamOrder) -> Checked {
        for _ in 0..REFUSALS_MAX {
            if order == StreamOrder::None {
                return Ok(());
            }
            order = self.tell(host, id, StreamInput::ReplayFailed, None)?;
        }
        ensure(order == StreamOrder::None, "a refused order is not repeated", || {
            format!("{order:?} for {host} after {REFUSALS_MAX} refusals")
        })
    }

    // --- replays

    pub fn replay_next(&mut self, host: usize, id: EndpointId, replay: u64) -> Checked {
        let (now, slow) = (self.now, self.mood(host) == ReplayMood::Slow);
        let wait = match (slow, self.calm) {
            (true, _) => self.ms(100, REPLAY_SILENCE_MS + 500),
            (false, true) => 0,
            (false, false) => self.ms(0, 4),
        };
        let run = self.hosts[host].process.as_ref().map(|process| process.run);
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let link = &mut member.link;
        let Some(task) = link.replay.as_mut().filter(|task| task.no == replay) else {
            return Ok(());
        };
        let late = wait > REPLAY_SILENCE_MS || now > task.until;
        let Some(answer) = task.answer.as_mut() else { return self.ask_replay(host, id, replay) };
        if late || run != Some(answer.run) {
            return self.replay_over(host, id, StreamInput::ReplayFailed);
        }
        let Some(message) = answer.messages.pop_front() else {
            let whole = answer.whole;
            let input = if whole { StreamInput::ReplayDone } else { StreamInput::ReplayFailed };
            return self.replay_over(host, id, input);
        };
        self.after_ms(wait, Event::ReplayNext { host, id, replay });
        let batch = kv_event::decode_batch(&message.payload);
        let Ok(batch) = batch else {
            return ensure(false, "what an engine encodes can be decoded", || {
                format!("replayed batch {} of run {}", message.seq, message.run)
            });
        };
        self.note(format!("replayed batch {} of {host} (run {})", message.seq, message.run));
        let input = StreamInput::ReplayBatch { seq: message.seq, batch };
        let order = self.tell(host, id, input, Some(message.run))?;
        self.obey(host, id, order)
    }

    /// The replay socket is asked: what it has kept until now is the answer.
    fn ask_replay(&mut self, host: usize, id: EndpointId, replay: u64) -> Checked {
        let mood = self.mood(host);
        let dark = self.now < self.hosts[host].member.as_ref().map_or(self.now, Member::dark_until);
        let Some(process) = self.hosts[host].process.as_ref() else {
            return self.replay_over(host, id, StreamInput::ReplayFailed);
        };
        if mood == ReplayMood::Refused || dark {
            return self.replay_over(host, id, StreamInput::ReplayFailed);
        }
        let (run, kept) = (process.run, process.kept.clone());
        let cut = (mood == ReplayMood::Truncated).then(|| self.rng.below(kept.len() + 1));
        let wait = self.ms(0, 10);
        let Some(member) = self.hosts[host].member_mut(id) else { return Ok(()) };
        let Some(task) = member.link.replay.as_mut() else { return Ok(()) };
        let from = task.from;
        let messages = kept.into_iter().filter(|message| message.seq >= from);
        let messages = messages.take(cut.unwrap_or(usize::MAX)).collect();
        task.answer = Some(Answer { run, messages, whole: cut.is_none() });
        self.after_ms(wait, Event::ReplayNext { host, id, replay });
        Ok(())
    }

    fn replay_over(&mut self, host: usize, id: EndpointId, input: StreamInput) -> Checked {
        if let Some(member) = self.hosts[host].member_mut(id) {
            member.link.replay = None;
        }
        self.note(format!("replay of {host} ends: {input:?}"));
        let order = self.tell(host, id, input, None)?;
        self.obey(host, id, order)
    }

    fn mood(&self, host: usize) -> ReplayMood {
        let (mood, until) = self.hosts[host].replay_mood;
        if self.now < until { mood } else { ReplayMood::Fine }
    }
}
