//! What happened in a run, in virtual time or over HTTP, before anybody aggregates it?
//!
//! The simulation and the load generator both make a [`RunRecord`]; summaries and reports read it.
//! Its size grows with requests (some 64 bytes each) and never with tokens: gaps between tokens are
//! tallied.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One scenario under one configuration with one seed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunRecord {
    /// Name of the configuration.
    pub name: String,
    /// Decides arrivals, prompts, ties.
    pub seed: u64,
    /// In order, warm-up stages included.
    pub stages: Vec<StageRecord>,
    /// In order of sending.
    pub requests: Vec<RequestRecord>,
    /// The fleet over time, at equal distances.
    pub timeline: Vec<Moment>,
    /// `None` in virtual time. How late requests left; a run that was late is invalid.
    pub lag: Option<Lag>,
}

/// One stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageRecord {
    /// Requests per second as planned; 0 for closed loops and traces.
    pub rate: f64,
    /// Seconds of sending as planned.
    pub duration_s: f64,
    /// Left out of figures.
    pub warmup: bool,
    /// When its first request was due, seconds from the start of the run.
    pub begin_s: f64,
    /// Seconds between output tokens of the same answer, as the client sees them.
    pub gaps_s: Tally,
    /// Requests waiting in an engine, of every engine at every decision, as the router saw it.
    pub waiting: Tally,
    /// KV blocks in use, 0 to 1, likewise.
    pub kv_usage: Tally,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// A complete answer.
    #[default]
    Answered,
    /// The client's own limit on requests in flight: never sent.
    Refused,
    /// The router had no endpoint for it.
    Rejected,
    /// Broken off: engine gone, time out, error status.
    Failed,
}

/// One request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestRecord {
    /// Position of its stage.
    pub stage: u32,
    /// Endpoint, by position in the fleet; `u16::MAX` when none.
    pub endpoint: u16,
    /// How it ended.
    pub ending: Ending,
    /// When it was sent, seconds from the start of the run.
    pub sent_s: f64,
    /// From sending to the first token, as measured by the client; 0 when there was none.
    pub ttft_s: f32,
    /// From sending to the end of the answer.
    pub total_s: f32,
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of the prompt, from the engine's cache.
    pub cached_tokens: u32,
    /// Generated.
    pub output_tokens: u32,
    /// Generated, as the client's tokenizer counts them (re-tokenising merges some).
    pub counted_tokens: f32,
}

/// The fleet at one moment; shares and sums over the time since the moment before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moment {
    /// Seconds from the start of the run.
    pub at_s: f64,
    /// Requests in flight at the client.
    pub in_flight: u32,
    /// Mean over engines.
    pub waiting: f32,
    /// Largest of an engine.
    pub waiting_max: f32,
    /// Mean over engines.
    pub running: f32,
    /// Mean over engines, 0 to 1.
    pub kv_usage: f32,
    /// Output tokens of all engines since the moment before.
    pub output_tokens: u64,
    /// Prompt tokens of requests admitted since the moment before.
    pub prompt_tokens: u64,
    /// Of those, from caches.
    pub cached_tokens: u64,
    /// Preemptions since the moment before.
    pub preemptions: u64,
}

/// How late requests left, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// Values counted at a resolution: exact sum, percentiles to the resolution, bounded size.
#[derive(Clone, Debug, PartialEq)]
pub struct Tally {
    quantum: f64,
    counts: BTreeMap<u64, u64>,
    count: u64,
    sum: f64,
    max: f64,
}

impl Default for Tally {
    /// Resolution 0.0001: a tenth of a millisecond, or a hundredth of a percent.
    fn default() -> Tally {
        Tally { quantum: 1e-4, counts: BTreeMap::new(), count: 0, sum: 0.0, max: 0.0 }
    }
}

impl Tally {
    /// Counts a value `times` times. Negative and non-finite values count as 0.
    pub fn add(&mut self, value: f64, times: u64) {
        if times == 0 {
            return;
        }
        let value = if value.is_finite() { value.max(0.0) } else { 0.0 };
        *self.counts.entry((value / self.quantum).round() as u64).or_default() += times;
        self.count += times;
        self.sum += value * times as f64;
        self.max = self.max.max(value);
    }

    /// Takes over the values of another tally of the same resolution.
    pub fn merge(&mut self, other: &Tally) {
        for (bin, times) in &other.counts {
            *self.counts.entry(*bin).or_default() += times;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// How many values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their sum.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// Their mean; 0 when there are none.
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// The largest; 0 when there are none.
    pub fn max(&self) -> f64 {
        self.max
    }

    /// The value at a percentile (nearest rank), to the resolution; 0 when there are none.
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = (percent.clamp(0.0, 100.0) / 100.0 * self.count as f64).ceil().max(1.0) as u64;
        let mut below = 0;
        for (bin, times) in &self.counts {
            below += times;
            if below >= rank {
                return *bin as f64 * self.quantum;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_is_exact_in_the_mean_and_to_its_resolution_in_percentiles() {
        let mut tally = Tally::default();
        (1..=100).for_each(|i| tally.add(f64::from(i) / 100.0, 1));
        tally.add(f64::NAN, 1);
        assert_eq!((tally.count(), tally.max()), (101, 1.0));
        assert!((tally.sum() - 50.5).abs() < 1e-9);
        assert!((tally.percentile(50.0) - 0.5).abs() < 1e-3);
        assert!((tally.percentile(100.0) - 1.0).abs() < 1e-3);
        let mut twice = tally.clone();
        twice.merge(&tally);
        assert_eq!((twice.count(), twice.mean()), (202, tally.mean()));
        assert_eq!(Tally::default().percentile(90.0), 0.0);
    }
}
