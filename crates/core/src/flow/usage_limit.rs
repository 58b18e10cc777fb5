//! `static-usage-limit-policy`, `priority-holdback-policy` and `soft-reflective-ceiling-policy`:
//! up to which saturation of the fleet may requests of a priority leave the queue?
//!
//! Each gives one ceiling per priority, the highest priority first: requests of that priority go
//! while the saturation is below it. 0 holds them all back.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `static-usage-limit-policy`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct StaticLimit {
    /// The ceiling of every priority, 0 or more; 1: the fleet may be filled.
    pub threshold: f64,
}

impl Default for StaticLimit {
    fn default() -> StaticLimit {
        StaticLimit { threshold: 1.0 }
    }
}

impl StaticLimit {
    /// One ceiling per priority.
    pub fn ceilings(&self, priorities: &[i32]) -> Vec<f64> {
        vec![self.threshold; priorities.len()]
    }
}

impl Plugin for StaticLimit {
    fn check(&self) -> Result<(), String> {
        let threshold = self.threshold;
        if threshold.is_finite() && threshold >= 0.0 {
            return Ok(());
        }
        Err(format!("threshold is {threshold}, not a number of 0 or more"))
    }
}

/// Parameters of `priority-holdback-policy`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PriorityHoldback {
    /// How ceilings fall from the highest priority to the lowest.
    pub shape: Shape,
    /// What they fall with.
    pub domain: Domain,
    /// Ceiling of the lowest priority, at least 0 and below `maxCeiling`. Required.
    pub min_ceiling: Option<f64>,
    /// Ceiling of the highest priority, above 0, at most 1.
    pub max_ceiling: f64,
}

/// How ceilings fall.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Evenly.
    #[default]
    Linear,
}

/// What ceilings fall with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Domain {
    /// The place among the priorities in use: each is one step below the one before.
    #[default]
    Rank,
    /// The priorities' own numbers.
    Value,
}

impl Default for PriorityHoldback {
    fn default() -> PriorityHoldback {
        PriorityHoldback {
            shape: Shape::Linear,
            domain: Domain::Rank,
            min_ceiling: None,
            max_ceiling: 1.0,
        }
    }
}

impl PriorityHoldback {
    /// One ceiling per priority, which fall from the highest on. With one priority, or several
    /// equal numbers by `value`, nobody is held back for anybody.
    pub fn ceilings(&self, priorities: &[i32]) -> Vec<f64> {
        let max = self.max_ceiling;
        let spread = max - self.min_ceiling.unwrap_or(max);
        let (Some(first), Some(last)) = (priorities.first(), priorities.last()) else {
            return Vec::new();
        };
        let (first, last) = (f64::from(*first), f64::from(*last));
        let steps = priorities.len() - 1;
        let fallen = |(at, priority): (usize, &i32)| match self.domain {
            _ if steps == 0 => 0.0,
            Domain::Rank => at as f64 / steps as f64,
            Domain::Value if first == last => 0.0,
            Domain::Value => (first - f64::from(*priority)) / (first - last),
        };
        priorities.iter().enumerate().map(fallen).map(|share| max - share * spread).collect()
    }
}

impl Plugin for PriorityHoldback {
    fn check(&self) -> Result<(), String> {
        let max = self.max_ceiling;
        let Some(min) = self.min_ceiling else {
            return Err("minCeiling is required: the ceiling of the lowest priority".into());
        };
        if !(0.0..1.0).contains(&min) {
            return Err(format!("minCeiling is {min}, not at least 0 and below 1"));
        }
        if !(max > 0.0 && max <= 1.0) {
            return Err(format!("maxCeiling is {max}, not above 0 and at most 1"));
        }
        if min >= max {
            return Err(format!("minCeiling {min} is not below maxCeiling {max}"));
        }
        Ok(())
    }
}

/// Parameters of `soft-reflective-ceiling-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SoftReflective {}

impl Plugin for SoftReflective {}

/// How often each priority has been at its ceiling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SoftReflectiveTicks(BTreeMap<i32, u64>);

impl SoftReflective {
    /// One ceiling per priority: 1, or 0 for now. The highest priority is never held back.
    /// Priority `i` of `n` has its ceiling at `1 - i * saturation / (n - 1)`; from there on it
    /// goes in one of `round(saturation / (1 - saturation))` calls, and not at all when the fleet
    /// is full. Ticks of priorities that are not in use are forgotten.
    pub fn ceilings(
        self,
        ticks: &mut SoftReflectiveTicks,
        saturation: f64,
        priorities: &[i32],
    ) -> Vec<f64> {
        ticks.0.retain(|priority, _| priorities.contains(priority));
        let steps = priorities.len().saturating_sub(1).max(1) as f64;
        let ceiling = |(at, priority): (usize, &i32)| {
            let reflected = 1.0 - at as f64 * saturation / steps;
            if at == 0 || saturation < reflected {
                return 1.0;
            }
            // A saturation that is not a number says nothing about room.
            if saturation.is_nan() || saturation >= 1.0 {
                return 0.0;
            }
            // The summand keeps the quotient finite just below 1.
            let period = (saturation / (1.0 - saturation + 1e-9)).round().max(1.0) as u64;
            let tick = ticks.0.entry(*priority).or_default();
            *tick = tick.wrapping_add(1);
            if tick.is_multiple_of(period) { 1.0 } else { 0.0 }
        };
        priorities.iter().enumerate().map(ceiling).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::assert_scores;

    #[test]
    fn a_static_limit_is_the_same_for_all() {
        assert_eq!(StaticLimit::default().ceilings(&[5, 0, -1]), [1.0; 3]);
        let read: StaticLimit = serde_saphyr::from_str("threshold: 0.8").unwrap();
        assert_eq!((read.ceilings(&[1]), read.ceilings(&[])), (vec![0.8], vec![]));
        for bad in [f64::NAN, f64::INFINITY, -0.1] {
            let error = StaticLimit { threshold: bad }.check().unwrap_err();
            assert!(error.starts_with("threshold is "));
        }
        assert_eq!(read.check(), Ok(()));
    }

    #[test]
    fn holdback_falls_from_the_highest_priority_on() {
        let with = |domain, min, max| PriorityHoldback {
            domain,
            min_ceiling: Some(min),
            max_ceiling: max,
            ..PriorityHoldback::default()
        };
        let table: [(_, &[i32], &[f64]); 9] = [
            (with(Domain::Rank, 0.5, 1.0), &[], &[]),
            (with(Domain::Rank, 0.5, 0.9), &[7], &[0.9]),
            (with(Domain::Rank, 0.5, 1.0), &[10, 0], &[1.0, 0.5]),
            (with(Domain::Rank, 0.5, 1.0), &[100, 1, 0], &[1.0, 0.75, 0.5]),
            (with(Domain::Rank, 0.0, 0.9), &[3, 2, 1, 0], &[0.9, 0.6, 0.3, 0.0]),
            (with(Domain::Value, 0.5, 1.0), &[100, 50, 0], &[1.0, 0.75, 0.5]),
            (with(Domain::Value, 0.5, 1.0), &[10, 9, 0], &[1.0, 0.95, 0.5]),
            (with(Domain::Value, 0.2, 1.0), &[i32::MAX, i32::MIN], &[1.0, 0.2]),
            (with(Domain::Value, 0.2, 1.0), &[4, 4], &[1.0, 1.0]),
        ];
        for (policy, priorities, ceilings) in table {
            assert_eq!(policy.check(), Ok(()));
            assert_scores(&policy.ceilings(priorities), ceilings);
        }
    }

    #[test]
    fn holdback_parameters_are_checked() {
        let table = [
            ("{}", "minCeiling is required"),
            ("minCeiling: 1.0", "minCeiling is 1"),
            ("minCeiling: -0.1", "minCeiling is -0.1"),
            ("{minCeiling: 0.1, maxCeiling: 0}", "maxCeiling is 0"),
            ("{minCeiling: 0.1, maxCeiling: 1.1}", "maxCeiling is 1.1"),
            ("{minCeiling: 0.5, maxCeiling: 0.5}", "minCeiling 0.5 is not below"),
            ("minCeiling: .nan", "minCeiling is NaN"),
        ];
        for (text, message) in table {
            let policy: PriorityHoldback = serde_saphyr::from_str(text).unwrap();
            assert!(policy.check().unwrap_err().starts_with(message), "{text}");
        }
        for bad in ["{shape: sigmoid}", "{domain: explicit}", "{ceilings: {}}"] {
            assert!(serde_saphyr::from_str::<PriorityHoldback>(bad).is_err());
        }
    }

    #[test]
    fn soft_ceilings_let_some_through_as_the_fleet_fills() {
        let mut ticks = SoftReflectiveTicks::default();
        let mut open = |saturation: f64, priorities: &[i32], calls: usize| {
            let mut open = vec![0; priorities.len()];
            for _ in 0..calls {
                let ceilings = SoftReflective {}.ceilings(&mut ticks, saturation, priorities);
                assert!(ceilings.iter().all(|c| *c == 0.0 || *c == 1.0));
                open.iter_mut().zip(ceilings).for_each(|(n, c)| *n += c as usize);
            }
            open
        };
        assert_eq!(open(0.9, &[], 3), [0; 0]);
        assert_eq!(open(0.9, &[3], 3), [3]);
        assert_eq!(open(1.5, &[3], 3), [3]);
        // Two priorities: the ceiling of the lower one is at 0.5. Periods 1, 2, 4, 9.
        for (saturation, passed) in [(0.0, 36), (0.49, 36), (0.5, 36), (0.67, 18), (0.8, 9)] {
            assert_eq!(open(saturation, &[1, 0], 36), [36, passed], "{saturation}");
        }
        assert_eq!(open(0.9, &[1, 0], 36), [36, 4]);
        assert_eq!(open(1.0, &[1, 0], 36), [36, 0]);
        assert_eq!(open(f64::NAN, &[1, 0], 36), [36, 0]);
        // Three: at 0.62 the ceilings are 1, 0.69 and 0.38; the period is round(1.63) = 2.
        assert_eq!(open(0.62, &[2, 1, 0], 36), [36, 36, 18]);
        assert_eq!(open(0.999_999_999_9, &[1, 0], 100), [100, 0]);
    }

    #[test]
    fn a_priority_keeps_its_turn_while_others_come_and_go() {
        let mut ticks = SoftReflectiveTicks::default();
        let mut of = |priorities: &[i32]| SoftReflective {}.ceilings(&mut ticks, 0.8, priorities);
        assert_eq!(of(&[1, 0]), [1.0, 0.0]);
        assert_eq!(of(&[2, 1, 0])[2], 0.0);
        assert_eq!(of(&[1, 0]), [1.0, 0.0]);
        assert_eq!(of(&[1, 0]), [1.0, 1.0], "the fourth call");
        assert_eq!(of(&[5]), [1.0]);
        assert!(ticks.0.is_empty());
    }
}
