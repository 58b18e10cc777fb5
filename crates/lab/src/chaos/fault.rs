//! What goes wrong, when, and for how long.

use std::time::Duration;

use super::Checked;
use super::stream::ReplayMood;
use super::world::{Event, World};

/// Kinds of faults and how often each comes, out of their sum.
const KINDS: [(Kind, usize); 24] = [
    (Kind::BatchesLost, 8),
    (Kind::BatchRepeated, 4),
    (Kind::BatchGarbled, 3),
    (Kind::LinkDelayed, 5),
    (Kind::LinkDark, 5),
    (Kind::LinkBroken, 7),
    (Kind::ReplayRefused, 3),
    (Kind::ReplayTruncated, 4),
    (Kind::ReplaySlow, 3),
    (Kind::ReplayForgotten, 2),
    (Kind::Crash, 5),
    (Kind::QuietRestart, 2),
    (Kind::ResetThrough, 5),
    (Kind::ResetBeside, 3),
    (Kind::EndpointLeaves, 3),
    (Kind::EngineReplaced, 2),
    (Kind::MetricsDark, 3),
    (Kind::MetricsFrozen, 3),
    (Kind::Unreachable, 3),
    (Kind::EngineSlow, 3),
    (Kind::AskedBeside, 6),
    (Kind::TicksLate, 3),
    (Kind::ClockJumps, 1),
    (Kind::LateWord, 2),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    BatchesLost,
    BatchRepeated,
    BatchGarbled,
    LinkDelayed,
    LinkDark,
    LinkBroken,
    ReplayRefused,
    ReplayTruncated,
    ReplaySlow,
    ReplayForgotten,
    Crash,
    QuietRestart,
    ResetThrough,
    ResetBeside,
    EndpointLeaves,
    EngineReplaced,
    MetricsDark,
    MetricsFrozen,
    Unreachable,
    EngineSlow,
    AskedBeside,
    TicksLate,
    ClockJumps,
    LateWord,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::BatchesLost => "batches lost",
            Kind::BatchRepeated => "batch repeated by the link",
            Kind::BatchGarbled => "batch unreadable",
            Kind::LinkDelayed => "link delayed",
            Kind::LinkDark => "link partitioned",
            Kind::LinkBroken => "link broken",
            Kind::ReplayRefused => "replays refused",
            Kind::ReplayTruncated => "replays truncated",
            Kind::ReplaySlow => "replays slow",
            Kind::ReplayForgotten => "replay buffer emptied",
            Kind::Crash => "engine crashed",
            Kind::QuietRestart => "engine restarted behind its connection",
            Kind::ResetThrough => "cache reset through the router",
            Kind::ResetBeside => "cache reset beside the router",
            Kind::EndpointLeaves => "endpoint removed",
            Kind::EngineReplaced => "endpoint replaced",
            Kind::MetricsDark => "metrics partitioned",
            Kind::MetricsFrozen => "metrics stale",
            Kind::Unreachable => "engine unreachable",
            Kind::EngineSlow => "engine slow",
            Kind::AskedBeside => "engine asked beside the router",
            Kind::TicksLate => "ticks late",
            Kind::ClockJumps => "clock jumped",
            Kind::LateWord => "word about an endpoint that is gone",
        }
    }
}

impl World {
    pub fn count_fault(&mut self, name: &'static str) {
        *self.faults.entry(name).or_insert(0) += 1;
    }

    /// Something goes wrong.
    pub fn fault(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        let wait = self.ms(20, 350);
        self.after_ms(wait, Event::Fault);
        let sum = KINDS.iter().map(|(_, weight)| weight).sum();
        let mut at = self.rng.below(sum);
        for (kind, weight) in KINDS {
            if at < weight {
                let host = self.rng.below(self.hosts.len());
                self.count_fault(kind.as_str());
                self.note(format!("fault at {host}: {}", kind.as_str()));
                return self.strike(kind, host);
            }
            at -= weight;
        }
        Ok(())
    }

    fn strike(&mut self, kind: Kind, host: usize) -> Checked {
        match kind {
            Kind::BatchesLost
            | Kind::BatchRepeated
            | Kind::BatchGarbled
            | Kind::LinkDelayed
            | Kind::LinkDark
            | Kind::LinkBroken => {
                self.strike_link(kind, host);
                Ok(())
            }
            Kind::ReplayRefused | Kind::ReplayTruncated | Kind::ReplaySlow => {
                self.strike_replays(kind, host);
                Ok(())
            }
            Kind::Crash | Kind::QuietRestart | Kind::EndpointLeaves | Kind::EngineReplaced => {
                self.strike_engine(kind, host)
            }
            Kind::LateWord => {
                self.late_word();
                Ok(())
            }
            _ => {
                self.strike_host(kind, host);
                Ok(())
            }
        }
    }

    fn strike_link(&mut self, kind: Kind, host: usize) {
        let (now, few, wait) = (self.now, 1 + self.rng.below(3) as u32, self.ms(100, 6_000));
        let (loses, at_once) = (self.one_in(2), self.ms(0, 20));
        let Some(member) = self.hosts[host].member.as_mut() else { return };
        let link = &mut member.link;
        match kind {
            Kind::BatchesLost => link.lose_next = few,
            Kind::BatchRepeated => link.repeat_next = true,
            Kind::BatchGarbled => link.garble_next = !link.protect_next,
            Kind::LinkDelayed => {
                (link.dark_until, link.dark_loses) = (now + Duration::from_millis(wait / 4), false);
            }
            Kind::LinkDark => {
                (link.dark_until, link.dark_loses) = (now + Duration::from_millis(wait), loses);
            }
            _ => {
                let (id, connection) = (member.id, link.connection());
                self.after_ms(at_once, Event::LinkLost { host, id, connection });
            }
        }
    }

    fn strike_replays(&mut self, kind: Kind, host: usize) {
        let mood = match kind {
            Kind::ReplayRefused => ReplayMood::Refused,
            Kind::ReplayTruncated => ReplayMood::Truncated,
            _ => ReplayMood::Slow,
        };
        let until = self.now + Duration::from_millis(self.ms(500, 6_000));
        self.hosts[host].replay_mood = (mood, until);
    }

    fn strike_engine(&mut self, kind: Kind, host: usize) -> Checked {
        let away = self.ms(50, 4_000);
        match kind {
            Kind::Crash => {
                self.crash(host, false)?;
                self.after_ms(away, Event::Restart(host));
            }
            // What shows it, the first batch, must not be lost with the connection.
            Kind::QuietRestart => {
                let now = self.now;
                let member = self.hosts[host].member.as_ref();
                let listens = |link: &super::stream::Link| {
                    link.up && link.subscribed.is_some() && now >= link.dark_until
                };
                if member.is_some_and(|member| listens(&member.link)) {
                    self.restart_quietly(host)?;
                }
            }
            Kind::EndpointLeaves => {
                self.leave(host)?;
                self.after_ms(away, Event::Rejoin(host));
            }
            _ => {
                self.leave(host)?;
                self.crash(host, false)?;
                self.hosts[host].block_size = [4, 8, 16][self.rng.below(3)];
                self.after_ms(away / 2, Event::Restart(host));
                self.after_ms(away, Event::Rejoin(host));
            }
        }
        Ok(())
    }

    fn strike_host(&mut self, kind: Kind, host: usize) {
        let until = self.now + Duration::from_millis(self.ms(200, 5_000));
        match kind {
            Kind::ReplayForgotten => {
                if let Some(process) = &mut self.hosts[host].process {
                    process.kept.clear();
                }
            }
            Kind::ResetThrough => {
                let prompt = self.pool.unique(1);
                self.begin(prompt, true);
            }
            Kind::ResetBeside => {
                let done = self.hosts[host].process.as_mut().map(|p| p.reset_cache());
                self.note(format!("reset of {host}: {done:?}"));
            }
            Kind::MetricsDark => self.hosts[host].metrics_dark_until = until,
            Kind::MetricsFrozen => self.hosts[host].metrics_frozen_until = until,
            Kind::Unreachable => self.hosts[host].unreachable_until = until,
            Kind::EngineSlow => self.hosts[host].slow_until = until,
            Kind::AskedBeside => {
                let prompt = self.pool.draw(&mut self.rng);
                self.ask_beside(host, prompt);
            }
            Kind::TicksLate => self.ticks_blocked_until = until,
            _ => self.now = self.now + Duration::from_secs(self.ms(20, 4 * 3_600)),
        }
    }

    /// A scrape, a failure or a batch of an endpoint that has left arrives after all.
    fn late_word(&mut self) {
        use kvroute_core::event::EventBatch;
        use kvroute_core::fleet::EngineMetrics;
        use kvroute_core::stream::StreamInput;
        if self.gone.is_empty() {
            return;
        }
        let (now, id) = (self.now, self.gone[self.rng.below(self.gone.len())]);
        let metrics = EngineMetrics { block_size: Some(32), ..EngineMetrics::default() };
        self.brain.on_metrics(now, id, &metrics);
        self.brain.on_models(id, Vec::new());
        self.brain.on_cache_reset(now, id);
        self.calls.endpoints_failed += 1;
        self.brain.on_endpoint_failed(now, id);
        self.calls.scrapes_failed += 1;
        self.brain.on_scrape_failed(now, id);
        let _ = self.brain.on_stream(now, id, StreamInput::Connected);
        let batch = EventBatch::default();
        let _ = self.brain.on_stream(now, id, StreamInput::Batch { seq: 0, batch });
    }
}
