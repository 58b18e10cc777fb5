//! `active-request-scorer`: fewer requests of this router in flight is better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Inputs, LOAD_DEFAULT, Plugin, ProducerRef, Scorer, View};

/// `active-request-scorer`: with `c` requests in flight, 1 when `c <= idleThreshold`, else
/// `(max - c) / max * maxBusyScore`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ActiveRequest {
    /// Accepted and without effect, as in llm-d.
    pub request_timeout: Option<String>,
    /// Requests up to which an endpoint counts as idle.
    pub idle_threshold: u32,
    /// The most that an endpoint gets that is not idle, 0 to 1.
    pub max_busy_score: f64,
    /// Producer of in-flight load.
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

    fn check(&self) -> Result<(), String> {
        if (0.0..=1.0).contains(&self.max_busy_score) {
            return Ok(());
        }
        Err(format!("maxBusyScore {} is not in [0, 1]", self.max_busy_score))
    }
}

impl Scorer for ActiveRequest {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let max = view.rows.iter().map(|row| row.inflight.requests).max().unwrap_or(0);
        for (row, cell) in view.rows.iter().zip(column) {
            let count = row.inflight.requests;
            *cell = if count <= self.idle_threshold {
                1.0
            } else {
                f64::from(max - count) / f64::from(max) * self.max_busy_score
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
        let table: [(ActiveRequest, &[u32], &[f64]); 5] = [
            (idle(0), &[3, 0, 6], &[0.5, 1.0, 0.0]),
            (idle(0), &[4, 0, 1], &[0.0, 1.0, 0.75]),
            (idle(0), &[0, 0], &[1.0, 1.0]),
            (idle(2), &[2, 4], &[1.0, 0.0]),
            (busy, &[3, 0, 6], &[0.25, 1.0, 0.0]),
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
