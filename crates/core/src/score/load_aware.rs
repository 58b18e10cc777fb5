//! `load-aware-scorer`: an empty queue is worth half a point, a full one nothing.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, Scorer, View};

/// Waiting requests from which the score is 0, by default.
const THRESHOLD: f64 = 128.0;

/// `load-aware-scorer`: `0.5 * (1 - min(waiting, threshold) / threshold)`; 0.5 is the most.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoadAware {
    /// Waiting requests from which the score is 0; 0 and less mean 128.
    pub threshold: f64,
}

impl Default for LoadAware {
    fn default() -> LoadAware {
        LoadAware { threshold: THRESHOLD }
    }
}

impl Plugin for LoadAware {
    fn inert(&self) -> Vec<String> {
        let given = self.threshold;
        let text = || format!("threshold {given}: not positive, so {THRESHOLD} counts");
        if given > 0.0 { Vec::new() } else { vec![text()] }
    }
}

impl Scorer for LoadAware {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let threshold = if self.threshold > 0.0 { self.threshold } else { THRESHOLD };
        for (row, cell) in view.rows.iter().zip(column) {
            if let Some(signals) = row.signals {
                let waiting = f64::from(signals.waiting).min(threshold);
                *cell = 0.5 * (1.0 - waiting / threshold);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_published_vector_holds() {
        let mut fixture = Fixture::new(4);
        for (at, waiting) in [2, 0, 15].into_iter().enumerate() {
            fixture.signals(at, waiting, 0, 0.0);
        }
        let mut scorer = LoadAware { threshold: 10.0 };
        assert_scores(&fixture.score(&mut scorer), &[0.4, 0.5, 0.0, f64::NAN]);
        assert_scores(&Fixture::new(0).score(&mut scorer), &[]);
    }

    #[test]
    fn a_threshold_that_is_not_positive_is_the_default_one() {
        let mut fixture = Fixture::new(1);
        fixture.signals(0, 64, 0, 0.0);
        for threshold in [0.0, -3.0, 128.0] {
            let mut scorer = LoadAware { threshold };
            assert_scores(&fixture.score(&mut scorer), &[0.25]);
            assert_eq!(scorer.inert().is_empty(), threshold > 0.0);
        }
    }
}
