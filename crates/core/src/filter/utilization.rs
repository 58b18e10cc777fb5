//! `utilization-filter`: is the endpoint less busy than a limit?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{Filter, Inputs, LOAD_DEFAULT, Plugin, ProducerRef, Row, View};

/// `utilization-filter`: keeps endpoints that hold every condition. An endpoint whose metrics are
/// missing or stale passes only when no endpoint with metrics does, and only by the conditions that
/// need none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Utilization {
    /// All of them must hold; at least one is required.
    pub conditions: Vec<Condition>,
    /// Keep all endpoints when none passes. Else the request is refused.
    pub fallback_on_empty: bool,
    /// Producer of in-flight load, for `active-requests`.
    pub in_flight_load_producer_name: Option<String>,
}

/// An upper limit.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Condition {
    /// What is limited.
    pub metric: UtilizationMetric,
    /// The largest value that passes: a count, or for `kv-cache-utilization` a share from 0 to 1.
    pub max_value: f64,
}

/// What can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UtilizationMetric {
    /// Requests that this router has in flight there.
    ActiveRequests,
    /// Requests that the engine computes.
    RunningRequests,
    /// Requests that wait in the engine.
    WaitingQueue,
    /// Share of KV blocks in use, 0 to 1.
    KvCacheUtilization,
}

impl UtilizationMetric {
    /// `None`: the engine has not told, or too long ago.
    fn value(self, row: &Row) -> Option<f64> {
        Some(match self {
            UtilizationMetric::ActiveRequests => f64::from(row.inflight.requests),
            UtilizationMetric::RunningRequests => f64::from(row.signals?.running),
            UtilizationMetric::WaitingQueue => f64::from(row.signals?.waiting),
            UtilizationMetric::KvCacheUtilization => row.signals?.kv_usage,
        })
    }
}

impl Utilization {
    /// Whether every condition holds; `unknown` is the answer where nothing is known.
    fn passes(&self, row: &Row, unknown: bool) -> bool {
        self.conditions.iter().all(|condition| {
            condition.metric.value(row).map_or(unknown, |value| value <= condition.max_value)
        })
    }
}

impl Plugin for Utilization {
    fn inputs(&self) -> Inputs<'_> {
        let mut metrics = self.conditions.iter().map(|condition| condition.metric);
        let reads_load = metrics.any(|metric| metric == UtilizationMetric::ActiveRequests);
        let load = ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT);
        Inputs { load: reads_load.then_some(load), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        if self.conditions.is_empty() {
            return Err("conditions is empty: list at least one".into());
        }
        for (at, Condition { metric, max_value }) in self.conditions.iter().enumerate() {
            if max_value.is_nan() || *max_value < 0.0 {
                return Err(format!("conditions[{at}].maxValue {max_value} must not be negative"));
            }
            if *metric == UtilizationMetric::KvCacheUtilization && *max_value > 1.0 {
                return Err(format!(
                    "conditions[{at}].maxValue {max_value} is not in [0, 1]: \
                     kv-cache-utilization is a share"
                ));
            }
        }
        Ok(())
    }
}

impl Filter for Utilization {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        for unknown in [false, true] {
            if view.rows.iter().any(|row| self.passes(row, unknown)) {
                for (row, keep) in view.rows.iter().zip(keep) {
                    *keep = self.passes(row, unknown);
                }
                return;
            }
        }
        keep.fill(self.fallback_on_empty);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn filter(conditions: &[(UtilizationMetric, f64)], fallback_on_empty: bool) -> Utilization {
        let condition = |(metric, max_value): &(UtilizationMetric, f64)| Condition {
            metric: *metric,
            max_value: *max_value,
        };
        Utilization {
            conditions: conditions.iter().map(condition).collect(),
            fallback_on_empty,
            ..Utilization::default()
        }
    }

    #[test]
    fn every_condition_must_hold() {
        use UtilizationMetric::*;
        let mut fixture = Fixture::new(3);
        fixture.signals(0, 0, 10, 0.5);
        fixture.signals(1, 4, 20, 0.9);
        fixture.signals(2, 0, 40, 1.0);
        fixture.inflight(0, 7, 0);
        fixture.inflight(1, 1, 0);
        type Case<'a> = (&'a [(UtilizationMetric, f64)], bool, [bool; 3]);
        let table: [Case<'_>; 7] = [
            (&[(ActiveRequests, 1.0)], false, [false, true, true]),
            (&[(RunningRequests, 20.0)], false, [true, true, false]),
            (&[(WaitingQueue, 0.0)], false, [true, false, true]),
            (&[(KvCacheUtilization, 0.9)], false, [true, true, false]),
            (&[(WaitingQueue, 0.0), (RunningRequests, 30.0)], false, [true, false, false]),
            (&[(RunningRequests, 5.0)], false, [false; 3]),
            (&[(RunningRequests, 5.0)], true, [true; 3]),
        ];
        for (conditions, fallback, kept) in table {
            let mut filter = filter(conditions, fallback);
            assert_eq!(fixture.filter(&mut filter), kept, "{filter:?}");
        }
        assert_eq!(Fixture::new(0).filter(&mut filter(&[], false)), [true; 0]);
    }

    #[test]
    fn what_is_not_known_comes_second() {
        use UtilizationMetric::{ActiveRequests, WaitingQueue};
        let mut fixture = Fixture::new(3);
        fixture.signals(0, 3, 0, 0.0);
        fixture.inflight(2, 9, 0);
        let waiting = [(WaitingQueue, 5.0)];
        assert_eq!(fixture.filter(&mut filter(&waiting, false)), [true, false, false]);
        let waiting = [(WaitingQueue, 2.0), (ActiveRequests, 5.0)];
        assert_eq!(fixture.filter(&mut filter(&waiting, false)), [false, true, false]);
        let active = [(ActiveRequests, 5.0)];
        assert_eq!(fixture.filter(&mut filter(&active, false)), [true, true, false]);
    }

    #[test]
    fn limits_that_make_no_sense_are_refused() {
        use UtilizationMetric::{ActiveRequests, KvCacheUtilization, WaitingQueue};
        assert!(filter(&[], true).check().is_err());
        assert!(filter(&[(ActiveRequests, -1.0)], true).check().is_err());
        assert!(filter(&[(WaitingQueue, f64::NAN)], true).check().is_err());
        assert!(filter(&[(KvCacheUtilization, 80.0)], true).check().is_err());
        assert!(filter(&[(KvCacheUtilization, 0.8)], true).check().is_ok());
        assert!(
            serde_json::from_str::<Utilization>(
                r#"{"conditions": [{"metric": "active-requests"}]}"#
            )
            .is_err()
        );
        assert!(filter(&[(WaitingQueue, 0.0)], true).inputs().load.is_none());
        assert!(filter(&[(ActiveRequests, 0.0)], true).inputs().load.is_some());
    }
}
