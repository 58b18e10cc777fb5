//! `active-request-scorer`: fewer requests of this router in flight is better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Inputs, LOAD_DEFAULT, Plugin, ProducerRef, Scorer, View};

/// `active-request-scorer`: with `c` requests in flight, 1 when `c <= idleThreshold`, else
/// `(max - c) / max * maxBusyScore`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ActiveRequest {
    /// Deprecated and without effect: the producer knows when requests end.
    pub request_timeout: Option<String>,
    /// Requests up to which an endpoint counts as idle; less than 0 means 0.
    pub idle_threshold: i64,
    /// The most that an endpoint gets that is not idle, 0 to 1; anything else means 1.
    pub max_busy_score: f64,
    /// Producer of in-flight load: the name of an `inflight-load-producer`.
    pub in_flight_load_producer_name: Option<String>,
}

impl Default for ActiveRequest {
    fn default() -> ActiveRequest {
        ActiveRequest {
            request_timeout: None,
            idle_threshold: 0,
            max_busy_score: 1.0,
            in_flight_load_producer_name: None,
        }
    }
}

impl Plugin for ActiveRequest {
    fn inputs(&self) -> Inputs<'_> {
        let load = ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT);
        Inputs { load: Some(load), ..Inputs::default() }
    }

    fn inert(&self) -> Vec<String> {
        let (idle, busy) = (self.idle_threshold, self.max_busy_score);
        [
            (
                self.request_timeout.is_some(),
                "requestTimeout: deprecated; the producer knows when requests end".to_owned(),
            ),
            (idle < 0, format!("idleThreshold {idle}: negative, so 0 counts")),
            (
                !(0.0..=1.0).contains(&busy),
                format!("maxBusyScore {busy}: not in [0, 1], so 1 counts"),
            ),
        ]
        .into_iter()
        .filter(|(given, _)| *given)
        .map(|(_, text)| text)
        .collect()
    }
}

impl Scorer for ActiveRequest {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let max = view.rows.iter().map(|row| row.inflight.requests).max().unwrap_or(0);
        let busy = self.max_busy_score;
        let busy = if (0.0..=1.0).contains(&busy) { busy } else { 1.0 };
        for (row, cell) in view.rows.iter().zip(column) {
            let count = row.inflight.requests;
            *cell = if i64::from(count) <= self.idle_threshold.max(0) {
                1.0
            } else {
                f64::from(max - count) / f64::from(max) * busy
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_published_vectors_hold() {
        let idle = |idle_threshold| ActiveRequest { idle_threshold, ..Default::default() };
        let busy = ActiveRequest { max_busy_score: 0.5, ..Default::default() };
        let wide = ActiveRequest { max_busy_score: 1.5, idle_threshold: -4, ..Default::default() };
        assert_eq!(wide.inert().len(), 2);
        let table: [(ActiveRequest, &[u32], &[f64]); 8] = [
            (idle(0), &[3, 0, 6], &[0.5, 1.0, 0.0]),
            (idle(0), &[4, 0, 1], &[0.0, 1.0, 0.75]),
            (idle(0), &[0, 0], &[1.0, 1.0]),
            (idle(2), &[2, 4], &[1.0, 0.0]),
            (busy, &[3, 0, 6], &[0.25, 1.0, 0.0]),
            (wide, &[3, 0, 6], &[0.5, 1.0, 0.0]),
            (idle(0), &[5], &[0.0]),
            (idle(0), &[], &[]),
        ];
        for (mut scorer, counts, scores) in table {
            let mut fixture = Fixture::new(counts.len());
            for (at, count) in counts.iter().enumerate() {
                fixture.inflight(at, *count, 0);
            }
            assert_scores(&fixture.score(&mut scorer), scores);
        }
    }
}
