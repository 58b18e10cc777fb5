//! `utilization-detector`: how full are the engines, by their own metrics?

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::saturation_of;
use crate::Rng;
use crate::config::GoDuration;
use crate::stage::{Detector, Filter, Plugin, Row, Signals, View};

/// Parameters of `utilization-detector`. The saturation is the mean over all endpoints of
/// `max(queue / queueDepthThreshold, KV use / kvCacheUtilThreshold)`, where an endpoint without
/// metrics, or with older ones than `metricsStalenessThreshold`, counts as 1. As a filter it keeps
/// endpoints with fresh metrics below both thresholds, each times `1 + headroom`, or all where
/// there is none.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Utilization {
    /// Waiting requests with which an endpoint is full; above 0.
    pub queue_depth_threshold: i64,
    /// Share of the KV cache with which an endpoint is full; above 0, at most 1.
    pub kv_cache_util_threshold: f64,
    /// Age from which metrics count as missing; above 0. It should exceed
    /// `kvroute.scrape_interval_ms`.
    pub metrics_staleness_threshold: GoDuration,
    /// As a filter, this share above the thresholds is allowed; 0 or more.
    pub headroom: f64,
}

impl Default for Utilization {
    fn default() -> Utilization {
        Utilization {
            queue_depth_threshold: 5,
            kv_cache_util_threshold: 0.8,
            metrics_staleness_threshold: GoDuration(Duration::from_millis(200)),
            headroom: 0.0,
        }
    }
}

impl Utilization {
    fn signals(&self, view: &View<'_>, row: &Row) -> Option<Signals> {
        view.endpoint(row)?.signals(view.now, self.metrics_staleness_threshold.0)
    }
}

impl Plugin for Utilization {
    fn check(&self) -> Result<(), String> {
        if self.queue_depth_threshold <= 0 {
            let depth = self.queue_depth_threshold;
            return Err(format!("queueDepthThreshold {depth} must be positive"));
        }
        if !(self.kv_cache_util_threshold > 0.0 && self.kv_cache_util_threshold <= 1.0) {
            let usage = self.kv_cache_util_threshold;
            return Err(format!("kvCacheUtilThreshold {usage} is not above 0 and at most 1"));
        }
        if self.metrics_staleness_threshold.0.is_zero() {
            return Err("metricsStalenessThreshold must be positive".into());
        }
        super::check_headroom(self.headroom)
    }
}

impl Detector for Utilization {
    fn saturation(&self, view: &View<'_>) -> f64 {
        let signals = view.rows.iter().map(|row| self.signals(view, row));
        saturation_of(signals, self.queue_depth_threshold as f64, self.kv_cache_util_threshold)
    }
}

impl Filter for Utilization {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        let queue = self.queue_depth_threshold as f64 * (1.0 + self.headroom);
        let kv = self.kv_cache_util_threshold * (1.0 + self.headroom);
        let fits = |signals: Signals| f64::from(signals.waiting) < queue && signals.kv_usage < kv;
        let passes = |row: &Row| self.signals(view, row).is_some_and(fits);
        if view.rows.iter().any(passes) {
            for (row, keep) in view.rows.iter().zip(keep) {
                *keep = passes(row);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use crate::fleet::EngineMetrics;

    /// Endpoints by when they were scraped, in seconds, and what they said; the time is 10 s.
    fn fixture(endpoints: &[Option<(f64, u32, f64)>]) -> Fixture {
        let mut fixture = Fixture::new(endpoints.len());
        for (at, endpoint) in endpoints.iter().enumerate() {
            if let Some((at_s, waiting, kv_usage)) = *endpoint {
                fixture.now_s(at_s);
                let metrics = EngineMetrics { waiting, kv_usage, ..EngineMetrics::default() };
                fixture.metrics(at, &metrics);
            }
        }
        fixture.now_s(10.0);
        fixture
    }

    fn fresh(waiting: u32, kv_usage: f64) -> Option<(f64, u32, f64)> {
        Some((9.9, waiting, kv_usage))
    }

    #[test]
    fn each_endpoint_is_as_full_as_its_fuller_half() {
        type Case<'a> = (&'a [Option<(f64, u32, f64)>], f64);
        let table: [Case<'_>; 10] = [
            (&[], 1.0),
            (&[fresh(2, f64::NAN)], 0.4),
            (&[None], 1.0),
            (&[fresh(0, 0.0)], 0.0),
            (&[fresh(2, 0.16)], 0.4),
            (&[fresh(1, 0.4)], 0.5),
            (&[fresh(10, 1.0)], 2.0),
            (&[fresh(0, 0.4), fresh(5, 0.0), fresh(0, 0.0)], 0.5),
            // Stale and missing metrics: full.
            (&[fresh(0, 0.0), Some((9.7, 0, 0.0))], 0.5),
            (&[fresh(0, 0.0), None, Some((9.8, 0, 0.0)), Some((9.79, 90, 1.0))], 0.5),
        ];
        for (endpoints, expected) in table {
            for fixture in [fixture(endpoints), fixture(endpoints).reversed()] {
                let found = fixture.saturation(&Utilization::default());
                assert!((found - expected).abs() < 1e-9, "{endpoints:?}: {found}");
            }
        }
        let patient = Utilization {
            metrics_staleness_threshold: GoDuration(Duration::from_secs(5)),
            ..Utilization::default()
        };
        assert_eq!(fixture(&[Some((6.0, 0, 0.0))]).saturation(&patient), 0.0);
    }

    #[test]
    fn those_below_both_thresholds_pass_or_all() {
        let roomy = Utilization { headroom: 0.2, ..Utilization::default() };
        let plain = Utilization::default();
        type Case<'a> = (&'a Utilization, &'a [Option<(f64, u32, f64)>], &'a [bool]);
        let table: [Case<'_>; 9] = [
            (&plain, &[], &[]),
            (&plain, &[fresh(0, f64::NAN), fresh(0, 0.0)], &[false, true]),
            (&plain, &[fresh(9, 1.0)], &[true]),
            (&plain, &[fresh(4, 0.79), fresh(5, 0.0), fresh(0, 0.8)], &[true, false, false]),
            (&plain, &[fresh(0, 0.0), None, Some((9.7, 0, 0.0))], &[true, false, false]),
            (&plain, &[None, Some((9.7, 0, 0.0))], &[true, true]),
            (&plain, &[fresh(5, 0.0), fresh(0, 0.9), None], &[true, true, true]),
            (&roomy, &[fresh(5, 0.95), fresh(6, 0.0), fresh(0, 0.96)], &[true, false, false]),
            (&roomy, &[fresh(0, 0.0), fresh(0, 0.0)], &[true, true]),
        ];
        for (filter, endpoints, kept) in table {
            assert_eq!(fixture(endpoints).filter(&mut filter.clone()), kept, "{endpoints:?}");
            let mut backwards = fixture(endpoints).reversed().filter(&mut filter.clone());
            backwards.reverse();
            assert_eq!(backwards, kept);
        }
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let fine = Utilization::default();
        assert!(fine.check().is_ok());
        let zero = GoDuration(Duration::ZERO);
        let bad = [
            (Utilization { queue_depth_threshold: 0, ..fine.clone() }, "queueDepthThreshold"),
            (Utilization { kv_cache_util_threshold: 0.0, ..fine.clone() }, "kvCacheUtilThreshold"),
            (Utilization { kv_cache_util_threshold: 1.1, ..fine.clone() }, "kvCacheUtilThreshold"),
            (Utilization { metrics_staleness_threshold: zero, ..fine.clone() }, "metricsStale"),
            (Utilization { headroom: -0.1, ..fine.clone() }, "headroom"),
            (Utilization { headroom: f64::NAN, ..fine.clone() }, "headroom"),
        ];
        for (bad, words) in bad {
            assert!(bad.check().unwrap_err().starts_with(words), "{words}");
        }
    }
}
