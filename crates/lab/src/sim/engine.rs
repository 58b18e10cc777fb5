//! One engine of the simulation: the model, what it publishes, and what faults do to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kvroute_core::Time;
use kvroute_core::event::EventBatch;
use kvroute_core::fleet::EngineMetrics;

use crate::model::{EngineModel, HashAlgorithm, ModelConfig, ModelConfigError, Profile, Step};
use crate::scenario::FleetSpec;
use crate::traffic::TOKEN_IDS;

/// Batches that an engine keeps for replays (vLLM's `buffer_steps`).
const REPLAY_BATCHES_MAX: usize = 10_000;

/// Statistics as they become readable.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reading {
    pub visible: Time,
    pub waiting: u32,
    pub running: u32,
    pub kv_usage: f64,
}

/// One engine.
pub(super) struct Engine {
    config: ModelConfig,
    profile: Profile,
    model: EngineModel,
    /// Counts its lives: what belongs to an earlier one is ignored.
    pub epoch: u32,
    pub up: bool,
    /// Crashes that are not over: it is back when the last of them is.
    crashes: u32,
    /// The router listens to its events.
    pub subscribed: bool,
    /// The step in progress.
    step: Option<Step>,
    seq: u64,
    /// The last batches, where faults make replays likely.
    replay: VecDeque<(u64, Arc<EventBatch>)>,
    replay_kept: bool,
    readings: VecDeque<Reading>,
    scrape: Scrape,
    pub faults: Faults,
    preemptions: u64,
    delivered: Time,
}

/// What faults do at the moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Faults {
    /// Share of event batches that is lost.
    pub loss: f64,
    /// Share of event batches that comes twice.
    pub duplication: f64,
    /// Added to the delay of events, seconds.
    pub delay_s: f64,
    /// Metrics cannot be read.
    pub partition: bool,
    /// Factor on the duration of steps.
    pub pace: f64,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults { loss: 0.0, duplication: 0.0, delay_s: 0.0, partition: false, pace: 1.0 }
    }
}

/// The router's scrapes of one engine: every `interval` from `phase` on.
struct Scrape {
    phase: Duration,
    interval: Duration,
    done: Option<u64>,
}

/// What a scrape brought.
pub(super) enum Scraped {
    /// None was due.
    NotDue,
    /// Nothing could be read.
    Failed,
    /// Metrics, read at this time.
    Metrics(Time, EngineMetrics),
}

impl Engine {
    /// An idle engine, which makes `events` or not. `phase` is the share of the scrape interval
    /// before its first scrape.
    pub fn new(
        fleet: &FleetSpec,
        profile: &Profile,
        seed: u64,
        phase: f64,
        events: bool,
        replay_kept: bool,
    ) -> Result<Engine, ModelConfigError> {
        let blocks = (fleet.kv_tokens / u64::from(fleet.block_size.max(1))).min(1 << 31) as u32;
        let config = ModelConfig {
            block_size: fleet.block_size,
            blocks,
            max_model_len: blocks.saturating_sub(1).saturating_mul(fleet.block_size),
            max_num_seqs: fleet.max_seqs,
            max_num_batched_tokens: fleet.max_batched_tokens,
            reserve_full_prompt: fleet.reserve_full_prompt,
            events,
            hash: HashAlgorithm::Plain,
            output_ids: (0..TOKEN_IDS).collect(),
            seed,
            ..ModelConfig::default()
        };
        let interval = Duration::from_secs_f64(fleet.scrape_interval_s.max(1e-3));
        Ok(Engine {
            model: EngineModel::new(config.clone(), profile.clone())?,
            config,
            profile: profile.clone(),
            epoch: 0,
            up: true,
            crashes: 0,
            subscribed: true,
            step: None,
            seq: 0,
            replay: VecDeque::new(),
            replay_kept,
            readings: VecDeque::from([Reading {
                visible: Time::ZERO,
                waiting: 0,
                running: 0,
                kv_usage: 0.0,
            }]),
            scrape: Scrape { phase: interval.mul_f64(phase), interval, done: None },
            faults: Faults::default(),
            preemptions: 0,
            delivered: Time::ZERO,
        })
    }

    pub fn model(&mut self) -> &mut EngineModel {
        &mut self.model
    }

    /// Starts the next step unless one is in progress; the time at which it will end. What the
    /// engine says about itself is readable `stats_delay` after the end of the last one.
    pub fn start(&mut self, now: Time, stats_delay: Duration) -> Option<Time> {
        if self.step.is_some() || !self.up {
            return None;
        }
        self.model.set_pace(self.faults.pace);
        match self.model.next_step(now) {
            Some(step) => {
                let end = now + step.duration;
                self.step = Some(step);
                Some(end)
            }
            None => {
                self.publish_stats(now + stats_delay);
                None
            }
        }
    }

    /// The step that has just ended.
    pub fn take_step(&mut self, now: Time, stats_delay: Duration) -> Option<Step> {
        let step = self.step.take()?;
        self.publish_stats(now + stats_delay);
        Some(step)
    }

    fn publish_stats(&mut self, visible: Time) {
        let stats = self.model.stats();
        let (waiting, running, kv_usage) = (stats.waiting, stats.running, stats.kv_usage);
        self.readings.push_back(Reading { visible, waiting, running, kv_usage });
    }

    /// Numbers a batch of events.
    pub fn publish(&mut self, batch: EventBatch) -> (u64, Arc<EventBatch>) {
        let (seq, batch) = (self.seq, Arc::new(batch));
        self.seq += 1;
        if self.replay_kept {
            self.replay.push_back((seq, Arc::clone(&batch)));
            if self.replay.len() > REPLAY_BATCHES_MAX {
                self.replay.pop_front();
            }
        }
        (seq, batch)
    }

    /// When a batch that would arrive at `due` does so: after those before it.
    pub fn delivery(&mut self, due: Time) -> Time {
        self.delivered = self.delivered.max(due);
        self.delivered
    }

    /// What the replay socket answers.
    pub fn replayed(&self, from: u64) -> Vec<(u64, Arc<EventBatch>)> {
        let at = self.replay.partition_point(|(seq, _)| *seq < from);
        self.replay.iter().skip(at).cloned().collect()
    }

    /// Does the scrape that was due last.
    pub fn scrape(&mut self, now: Time) -> Scraped {
        let Some(since) = now.since(Time::ZERO).checked_sub(self.scrape.phase) else {
            return Scraped::NotDue;
        };
        let number = (since.as_nanos() / self.scrape.interval.as_nanos().max(1)) as u64;
        if self.scrape.done.is_some_and(|done| done >= number) {
            return Scraped::NotDue;
        }
        self.scrape.done = Some(number);
        if self.faults.partition || !self.up {
            return Scraped::Failed;
        }
        let nanos = self.scrape.interval.as_nanos() as u64 * number;
        let at = Time::ZERO + self.scrape.phase + Duration::from_nanos(nanos);
        while self.readings.len() > 1 && self.readings[1].visible <= at {
            self.readings.pop_front();
        }
        let Some(reading) = self.readings.front() else { return Scraped::Failed };
        let metrics = EngineMetrics {
            waiting: reading.waiting,
            running: reading.running,
            kv_usage: reading.kv_usage,
            block_size: Some(self.config.block_size),
            blocks: Some(self.config.blocks),
            ..EngineMetrics::default()
        };
        Scraped::Metrics(at, metrics)
    }

    /// Dies, with everything it holds.
    pub fn crash(&mut self) {
        self.up = false;
        self.subscribed = false;
        self.crashes += 1;
        self.epoch += 1;
        self.step = None;
    }

    /// One crash is over. After the last one it comes back, empty; whether it has.
    pub fn restart(&mut self, now: Time) -> Result<bool, ModelConfigError> {
        self.crashes = self.crashes.saturating_sub(1);
        if self.crashes > 0 {
            return Ok(false);
        }
        self.delivered = now;
        self.model = EngineModel::new(self.config.clone(), self.profile.clone())?;
        self.preemptions = 0;
        self.up = true;
        self.seq = 0;
        self.replay.clear();
        self.readings.clear();
        self.readings.push_back(Reading { visible: now, waiting: 0, running: 0, kv_usage: 0.0 });
        Ok(true)
    }

    /// Preemptions since the last call.
    pub fn preemptions(&mut self) -> u64 {
        let all = self.model.stats().preemptions;
        all.saturating_sub(std::mem::replace(&mut self.preemptions, all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NewRequest, Output};
    use crate::scenario::Scenario;

    #[test]
    fn a_crash_does_not_count_preemptions_again() {
        let fleet = Scenario::built_in("faults").unwrap().fleet;
        let fleet = FleetSpec { kv_tokens: 36, block_size: 4, ..fleet };
        let profile = Profile::built_in("tiny").unwrap();
        let mut engine = Engine::new(&fleet, &profile, 1, 0.0, false, false).unwrap();
        for id in 0..2 {
            let tokens = (0..12).map(|token| token + 100 * id as u32).collect();
            let output = Output::Sampled(id);
            let request =
                NewRequest { id, tokens, max_tokens: 20, output, ..NewRequest::default() };
            engine.model().submit(Time::ZERO, request).unwrap();
        }
        let mut now = Time::ZERO;
        while let Some(end) = engine.start(now, Duration::ZERO) {
            now = end;
            engine.take_step(now, Duration::ZERO).unwrap();
        }
        assert!(engine.preemptions() > 0);
        engine.crash();
        assert_eq!(engine.preemptions(), 0);
        engine.restart(now).unwrap();
        assert_eq!(engine.preemptions(), 0);
    }
}
