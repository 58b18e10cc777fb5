//! `queue-scorer` and `running-requests-size-scorer`: shorter is better, relative to the other
//! candidates.

use schemars::JsonSchema;
use serde::Deserialize;

use super::relative;
use crate::stage::{Plugin, Scorer, View};

/// `queue-scorer`: `(max - q) / (max - min)` over the engines' waiting requests; all equal: 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Queue {}

/// `running-requests-size-scorer`: the same over running requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Running {}

impl Plugin for Queue {}

impl Scorer for Queue {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        relative(column, |at| Some(f64::from(view.rows[at].signals?.waiting)));
    }
}

impl Plugin for Running {}

impl Scorer for Running {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        relative(column, |at| Some(f64::from(view.rows[at].signals?.running)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_published_vectors_hold() {
        let table: [(&[u32], &[f64]); 5] = [
            (&[10, 5, 0], &[0.0, 0.5, 1.0]),
            (&[5, 5], &[1.0, 1.0]),
            (&[0, 0, 0], &[1.0, 1.0, 1.0]),
            (&[7], &[1.0]),
            (&[], &[]),
        ];
        for (values, scores) in table {
            let mut fixture = Fixture::new(values.len());
            for (at, value) in values.iter().enumerate() {
                fixture.signals(at, *value, *value, 0.0);
            }
            assert_scores(&fixture.score(&mut Queue {}), scores);
            assert_scores(&fixture.score(&mut Running {}), scores);
        }
    }

    #[test]
    fn an_endpoint_without_metrics_has_no_score_and_does_not_move_the_others() {
        let mut fixture = Fixture::new(3);
        fixture.signals(0, 4, 0, 0.0);
        fixture.signals(2, 2, 0, 0.0);
        assert_scores(&fixture.score(&mut Queue {}), &[0.0, f64::NAN, 1.0]);
        assert_scores(&Fixture::new(2).score(&mut Queue {}), &[f64::NAN, f64::NAN]);
    }
}
