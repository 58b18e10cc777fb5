//! How full is the fleet? One file per plugin, and how the stages of serving are put together.

mod concurrency;
mod utilization;

pub use concurrency::{Concurrency, ConcurrencyMode};
pub use utilization::Utilization;

use crate::filter::{decodes, prefills, role_of};
use crate::stage::{Detector, Row, Signals, View};

/// How full the fuller stage of serving is: an endpoint belongs to the prefill stage where
/// `prefill-filter` keeps it, to the decode stage where `decode-filter` does, and to both where
/// both do. A stage without endpoints does not count; 1 where neither has any.
pub fn saturation_by_stage(detector: &dyn Detector, view: &View<'_>) -> f64 {
    let stage = |belongs: fn(Option<&str>) -> bool| -> Option<f64> {
        let has = |row: &&Row| belongs(role_of(view, row));
        let rows: Vec<Row> = view.rows.iter().filter(has).copied().collect();
        (!rows.is_empty()).then(|| detector.saturation(&View { rows: &rows, ..*view }))
    };
    match (stage(prefills), stage(decodes)) {
        (Some(prefill), Some(decode)) => prefill.max(decode),
        (one, other) => one.or(other).unwrap_or(1.0),
    }
}

/// The mean of what endpoints have waiting and in their KV cache, each by its threshold, the larger
/// of the two; 1 for one that does not say, and without any.
pub(crate) fn saturation_of(
    endpoints: impl Iterator<Item = Option<Signals>>,
    queue_threshold: f64,
    kv_threshold: f64,
) -> f64 {
    let (mut sum, mut count) = (0.0, 0u32);
    for signals in endpoints {
        let of = |signals: Signals| {
            (f64::from(signals.waiting) / queue_threshold).max(signals.kv_usage / kv_threshold)
        };
        sum += signals.map_or(1.0, of);
        count += 1;
    }
    if count == 0 { 1.0 } else { sum / f64::from(count) }
}

fn check_headroom(headroom: f64) -> Result<(), String> {
    if headroom.is_finite() && headroom >= 0.0 {
        return Ok(());
    }
    Err(format!("headroom {headroom} must not be negative; 0.2 stands for a fifth"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::ROLE_LABEL;
    use crate::fixture::Fixture;

    #[test]
    fn the_fuller_stage_counts_and_an_empty_one_does_not() {
        let detector = Concurrency { max_concurrency: 10, ..Default::default() };
        type Case<'a> = (&'a [(&'a str, u32)], f64);
        let table: [Case<'_>; 10] = [
            (&[], 1.0),
            (&[("encode", 3)], 1.0),
            (&[("", 3), ("", 5)], 0.4),
            (&[("decode", 3), ("", 5)], 0.4),
            (&[("prefill", 9), ("decode", 1), ("decode", 3)], 0.9),
            (&[("encode-prefill", 2), ("decode", 8), ("decode", 4)], 0.6),
            // Those that do both count in both.
            (&[("prefill", 2), ("both", 8), ("decode", 1)], 0.5),
            (&[("prefill-decode", 4), ("encode-prefill-decode", 2)], 0.3),
            // What gets no requests does not thin the others out.
            (&[("prefill", 6), ("encode", 0), ("unknown", 0), ("decode", 2)], 0.6),
            (&[("prefill", 15)], 1.5),
        ];
        for (endpoints, expected) in table {
            let mut fixture = Fixture::new(endpoints.len());
            for (at, (role, requests)) in endpoints.iter().enumerate() {
                fixture.inflight(at, *requests, 0);
                if !role.is_empty() {
                    fixture.label(at, ROLE_LABEL, role);
                }
            }
            for fixture in [fixture.clone(), fixture.reversed()] {
                let found = fixture.saturation(&ByStage(detector.clone()));
                assert!((found - expected).abs() < 1e-9, "{endpoints:?}: {found}");
            }
        }
    }

    #[derive(Clone)]
    struct ByStage(Concurrency);

    impl crate::stage::Plugin for ByStage {}

    impl Detector for ByStage {
        fn saturation(&self, view: &View<'_>) -> f64 {
            saturation_by_stage(&self.0, view)
        }
    }
}
