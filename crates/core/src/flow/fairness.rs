//! `global-strict-fairness-policy`, `round-robin-fairness-policy` and `program-aware-fairness`:
//! which flow of a priority goes first?
//!
//! Flows come in the order of their names, so that nothing depends on where they are kept.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::ordering::OrderKey;
use crate::Time;
use crate::config::Ignored;
use crate::stage::Plugin;

/// Parameters of `global-strict-fairness-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GlobalStrict {}

impl GlobalStrict {
    /// The flow whose first request goes before those of all others, whosever it is; given the
    /// key of each flow's first request, `None` for an empty flow.
    pub fn next(self, heads: &[Option<OrderKey>]) -> Option<usize> {
        let heads = heads.iter().enumerate().filter_map(|(at, key)| Some(((*key)?, at)));
        heads.min().map(|(_, at)| at)
    }
}

/// Parameters of `round-robin-fairness-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RoundRobinFlows {}

impl RoundRobinFlows {
    /// The next flow with requests after the one that was served last, by name and length of each.
    /// A flow that is gone has its turn taken by the one that follows its name.
    pub fn next(self, last: Option<&str>, flows: &[(&str, usize)]) -> Option<usize> {
        let start = flows.partition_point(|(name, _)| last.is_some_and(|last| *name <= last));
        let turn = (start..flows.len()).chain(0..start);
        turn.into_iter().find(|at| flows[*at].1 > 0)
    }
}

/// Parameters of `program-aware-fairness`. A program is all requests of one flow.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ProgramAware {
    /// How programs are compared.
    pub strategy: Strategy,
    /// Weight of having got little, 0 or more.
    pub las_weight_service: f64,
    /// Weight of how long the program's first request has waited, 0 or more.
    pub las_weight_head_wait: f64,
    /// After so many seconds half of what a program got is forgotten; 0: nothing ever is.
    pub las_half_life_seconds: f64,
    /// A program that has finished nothing for so many seconds is forgotten; 0: none is.
    pub eviction_ttl_seconds: f64,
    /// Seconds between two looks for such programs, above 0.
    pub eviction_sweep_seconds: f64,
    /// Was removed.
    #[schemars(skip)]
    las_decay_factor: Option<Ignored>,
}

/// How programs are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Least attained service: who has got least goes first.
    #[default]
    #[serde(alias = "")]
    Las,
}

impl Default for ProgramAware {
    fn default() -> ProgramAware {
        ProgramAware {
            strategy: Strategy::Las,
            las_weight_service: 0.8,
            las_weight_head_wait: 0.2,
            las_half_life_seconds: 60.0,
            eviction_ttl_seconds: 3_600.0,
            eviction_sweep_seconds: 300.0,
            las_decay_factor: None,
        }
    }
}

/// What a program has got, in tokens; those of the answer count twice.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Service {
    attained: f64,
    at: Time,
}

/// A flow as `program-aware-fairness` compares it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlowHead {
    /// What the program has got, as of now.
    pub attained: f64,
    /// How long its first request has waited; `None`: it has none.
    pub waited: Option<Duration>,
}

impl ProgramAware {
    /// Which flow goes first: the highest of `lasWeightService * (1 - service) +
    /// lasWeightHeadWait * wait`, both scaled to 0..1 over the flows that have requests, 0.5 where
    /// all are equal; the first among equals.
    pub fn next(&self, flows: &[FlowHead]) -> Option<usize> {
        let waiting = || {
            let flows = flows.iter().enumerate();
            flows.filter_map(|(at, flow)| Some((at, flow.attained, flow.waited?.as_secs_f64())))
        };
        let service = Range::of(waiting().map(|(_, attained, _)| attained));
        let wait = Range::of(waiting().map(|(_, _, waited)| waited));
        let score = |attained, waited| {
            self.las_weight_service * (1.0 - service.scale(attained))
                + self.las_weight_head_wait * wait.scale(waited)
        };
        let mut best: Option<(usize, f64)> = None;
        for (at, attained, waited) in waiting() {
            let score = score(attained, waited);
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((at, score));
            }
        }
        best.map(|(at, _)| at)
    }

    /// What a program has got, with what is forgotten by now taken off.
    pub fn attained(&self, service: &Service, now: Time) -> f64 {
        if self.las_half_life_seconds <= 0.0 {
            return service.attained;
        }
        let half_lives = now.since(service.at).as_secs_f64() / self.las_half_life_seconds;
        service.attained * 0.5f64.powf(half_lives)
    }

    /// Charges a program for a request that is over: `prompt + 2 * completion` tokens.
    pub fn charge(&self, service: &mut Service, now: Time, prompt: u32, completion: u32) {
        let cost = f64::from(prompt) + 2.0 * f64::from(completion);
        *service = Service { attained: self.attained(service, now) + cost, at: now };
    }

    /// Whether a program without requests, whose last one ended then, is forgotten.
    pub fn is_forgotten(&self, now: Time, last_end: Time) -> bool {
        let ttl = self.eviction_ttl_seconds;
        ttl > 0.0 && now.since(last_end).as_secs_f64() > ttl
    }
}

struct Range {
    min: f64,
    max: f64,
}

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Range {
        let none = Range { min: f64::INFINITY, max: f64::NEG_INFINITY };
        values.fold(none, |range, value| Range {
            min: range.min.min(value),
            max: range.max.max(value),
        })
    }

    fn scale(&self, value: f64) -> f64 {
        if self.min < self.max { (value - self.min) / (self.max - self.min) } else { 0.5 }
    }
}

impl Plugin for GlobalStrict {}
impl Plugin for RoundRobinFlows {}

impl Plugin for ProgramAware {
    fn check(&self) -> Result<(), String> {
        if self.las_decay_factor.is_some() {
            return Err("lasDecayFactor was removed: lasHalfLifeSeconds says how fast is \
                        forgotten; a factor f per second is a half-life of ln 0.5 / ln f"
                .into());
        }
        let fields = [
            ("lasWeightService", self.las_weight_service),
            ("lasWeightHeadWait", self.las_weight_head_wait),
            ("lasHalfLifeSeconds", self.las_half_life_seconds),
            ("evictionTtlSeconds", self.eviction_ttl_seconds),
        ];
        for (field, value) in fields {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{field} is {value}, not a number of 0 or more"));
            }
        }
        let sweep = self.eviction_sweep_seconds;
        if !(sweep.is_finite() && sweep > 0.0) {
            return Err(format!("evictionSweepSeconds is {sweep}, not a number above 0"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_all_requests_goes_first() {
        let key = |deadline, number| Some((Time(deadline), Time(0), number));
        let table: [(&[Option<OrderKey>], _); 5] = [
            (&[], None),
            (&[None, None], None),
            (&[None, key(3, 1)], Some(1)),
            (&[key(5, 1), key(3, 9), key(3, 8)], Some(2)),
            (&[key(u64::MAX, 1), None, key(u64::MAX, 0)], Some(2)),
        ];
        for (heads, next) in table {
            assert_eq!(GlobalStrict {}.next(heads), next, "{heads:?}");
        }
    }

    #[test]
    fn flows_take_turns() {
        let flows = [("a", 1), ("b", 0), ("c", 2), ("d", 1)];
        let table: [(_, &[(&str, usize)], _); 8] = [
            (None, &[], None),
            (None, &flows, Some(0)),
            (Some("a"), &flows, Some(2)),
            (Some("c"), &flows, Some(3)),
            (Some("d"), &flows, Some(0)),
            (Some("bb"), &flows, Some(2)),
            (Some("z"), &flows, Some(0)),
            (Some("a"), &[("a", 0), ("b", 0)], None),
        ];
        for (last, flows, next) in table {
            assert_eq!(RoundRobinFlows {}.next(last, flows), next, "{last:?} {flows:?}");
        }
    }

    fn flow(attained: f64, waited_ms: u64) -> FlowHead {
        FlowHead { attained, waited: Some(Duration::from_millis(waited_ms)) }
    }

    #[test]
    fn who_has_got_least_goes_first_unless_others_wait_too_long() {
        let empty = FlowHead { attained: 0.0, waited: None };
        let table: [(&[FlowHead], _); 7] = [
            (&[], None),
            (&[empty], None),
            (&[empty, flow(9.0, 0)], Some(1)),
            (&[flow(100.0, 5), flow(10.0, 5)], Some(1)),
            // Service 0.8 against wait 0.2.
            (&[flow(100.0, 9_000), flow(10.0, 0)], Some(1)),
            // All have got the same: who waits longest.
            (&[flow(10.0, 1), flow(10.0, 3), flow(10.0, 2)], Some(1)),
            (&[flow(10.0, 1), flow(10.0, 1)], Some(0)),
        ];
        for (flows, next) in table {
            assert_eq!(ProgramAware::default().next(flows), next, "{flows:?}");
        }
        let patient = ProgramAware { las_weight_service: 0.1, ..ProgramAware::default() };
        assert_eq!(patient.next(&[flow(100.0, 9_000), flow(10.0, 0)]), Some(0));
    }

    #[test]
    fn half_of_what_a_program_got_is_forgotten_per_half_life() {
        let policy = ProgramAware::default();
        let at = |s: f64| Time::from_secs_f64(s);
        let mut service = Service::default();
        policy.charge(&mut service, at(10.0), 100, 50);
        let close = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-9);
        close(policy.attained(&service, at(10.0)), 200.0);
        close(policy.attained(&service, at(70.0)), 100.0);
        policy.charge(&mut service, at(70.0), 0, 10);
        close(policy.attained(&service, at(70.0)), 120.0);
        close(policy.attained(&service, at(5.0)), 120.0);
        let never = ProgramAware { las_half_life_seconds: 0.0, ..policy.clone() };
        close(never.attained(&service, at(9e9)), 120.0);
        let table = [(3_600.0, false), (3_601.0, true)];
        for (now, forgotten) in table {
            assert_eq!(policy.is_forgotten(at(now), Time::ZERO), forgotten);
        }
        let ever = ProgramAware { eviction_ttl_seconds: 0.0, ..policy };
        assert!(!ever.is_forgotten(at(9e9), Time::ZERO));
    }

    #[test]
    fn mistakes_name_their_field() {
        let read = |text: &str| serde_saphyr::from_str::<ProgramAware>(text);
        let table = [
            ("lasDecayFactor: 0.99997", "lasDecayFactor was removed"),
            ("lasWeightService: -0.1", "lasWeightService is -0.1"),
            ("lasWeightHeadWait: .inf", "lasWeightHeadWait is inf"),
            ("lasHalfLifeSeconds: -1", "lasHalfLifeSeconds is -1"),
            ("evictionTtlSeconds: .nan", "evictionTtlSeconds is NaN"),
            ("evictionSweepSeconds: 0", "evictionSweepSeconds is 0"),
        ];
        for (text, message) in table {
            assert!(read(text).unwrap().check().unwrap_err().starts_with(message), "{text}");
        }
        assert!(read("strategy: wfq").is_err());
        assert_eq!(read("strategy: las").unwrap(), ProgramAware::default());
        assert_eq!(ProgramAware::default().check(), Ok(()));
    }
}
