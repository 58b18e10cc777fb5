//! `probabilistic-admitter`: the fuller the fleet, the more of the low priorities are refused.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::detect::saturation_of;
use crate::stage::{Admitter, Plugin, View};

/// Parameters of `probabilistic-admitter`. A request of a priority below 0 is refused with
/// probability `min(saturation^power * k, 1)`, where the saturation is the mean over all endpoints
/// of `max(queue / queueDepthThreshold, KV use / kvCacheUtilThreshold)`, and 1 for an endpoint
/// without metrics.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Probabilistic {
    /// Waiting requests with which an endpoint is full; above 0.
    pub queue_depth_threshold: i64,
    /// Share of the KV cache with which an endpoint is full; above 0.
    pub kv_cache_util_threshold: f64,
    /// How late refusals set in; above 0.
    pub power: f64,
    /// How soon all are refused; above 0.
    pub k: f64,
}

impl Default for Probabilistic {
    fn default() -> Probabilistic {
        Probabilistic {
            queue_depth_threshold: 5,
            kv_cache_util_threshold: 0.8,
            power: 5.0,
            k: 300.0,
        }
    }
}

impl Plugin for Probabilistic {
    fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("queueDepthThreshold", self.queue_depth_threshold as f64),
            ("kvCacheUtilThreshold", self.kv_cache_util_threshold),
            ("power", self.power),
            ("k", self.k),
        ] {
            if !value.is_finite() || value <= 0.0 {
                return Err(format!("{name} {value} must be positive"));
            }
        }
        Ok(())
    }
}

impl Admitter for Probabilistic {
    fn admit(&self, view: &View<'_>, rng: &mut Rng) -> Result<(), String> {
        let priority = view.request.priority;
        if priority >= 0 || view.rows.is_empty() {
            return Ok(());
        }
        let queue = self.queue_depth_threshold as f64;
        let signals = view.rows.iter().map(|row| row.signals);
        let saturation = saturation_of(signals, queue, self.kv_cache_util_threshold);
        let probability = (saturation.powf(self.power) * self.k).min(1.0);
        if rng.next_f64() >= probability {
            return Ok(());
        }
        Err(format!(
            "the fleet is {:.0} % full, and a request of priority {priority} is then refused with \
             probability {probability:.2}; send it later",
            saturation * 100.0
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn full(waiting: u32, kv_usage: f64, priority: i32) -> Fixture {
        let mut fixture = Fixture::new(2);
        (0..2).for_each(|at| fixture.signals(at, waiting, 1, kv_usage));
        fixture.priority(priority);
        fixture
    }

    /// Share of requests that are refused.
    fn refused(fixture: &Fixture, admitter: &Probabilistic) -> f64 {
        let refused = (0..4_000).filter(|seed| fixture.admit(admitter, *seed).is_err());
        refused.count() as f64 / 4_000.0
    }

    #[test]
    fn the_probability_follows_the_saturation() {
        let admitter = Probabilistic::default();
        // 300 * 0.3^5, from 0.24 of the KV cache or 1.5 waiting of 5.
        let table = [
            (full(0, 0.0, -1), 0.0),
            (full(0, 0.24, -1), 0.729),
            (full(1, 0.0, -1), 0.096),
            (full(5, 0.0, -1), 1.0),
            (full(0, 0.8, -1), 1.0),
            (full(u32::MAX, 0.0, -1), 1.0),
            (full(50, 1.0, 0), 0.0),
        ];
        for (fixture, expected) in table {
            let share = refused(&fixture, &admitter);
            assert!((share - expected).abs() < 0.03, "{share} is not {expected}");
            assert_eq!(refused(&fixture.reversed(), &admitter), share);
        }
        let linear = Probabilistic { power: 1.0, k: 0.5, ..admitter };
        let share = refused(&full(3, 0.0, -7), &linear);
        assert!((share - 0.3).abs() < 0.03, "{share}");
    }

    #[test]
    fn nobody_is_refused_by_an_empty_fleet_and_silence_counts_as_full() {
        let admitter = Probabilistic::default();
        let mut empty = Fixture::new(0);
        empty.priority(-1);
        assert!(empty.admit(&admitter, 1).is_ok());
        let mut silent = Fixture::new(2);
        silent.priority(-1);
        assert!(silent.admit(&admitter, 1).unwrap_err().contains("100 % full"));
        // Half of 1 and 0: 300 * 0.5^5 is more than 1.
        silent.signals(0, 0, 0, 0.0);
        assert!(silent.admit(&admitter, 1).is_err());
        let mild = Probabilistic { k: 8.0, ..admitter };
        let share = refused(&silent, &mild);
        assert!((share - 0.25).abs() < 0.03, "{share}");
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let fine = Probabilistic::default();
        assert!(fine.check().is_ok());
        let bad = [
            (Probabilistic { queue_depth_threshold: 0, ..fine.clone() }, "queueDepthThreshold 0"),
            (Probabilistic { kv_cache_util_threshold: -0.5, ..fine.clone() }, "kvCacheUtil"),
            (Probabilistic { power: 0.0, ..fine.clone() }, "power"),
            (Probabilistic { k: f64::NAN, ..fine.clone() }, "k NaN"),
        ];
        for (bad, words) in bad {
            assert!(bad.check().unwrap_err().starts_with(words), "{words}");
        }
    }
}
