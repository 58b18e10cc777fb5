//! `load-aware-scorer`: an empty queue is worth half a point, a full one nothing.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, Scorer, View};

/// `load-aware-scorer`: `0.5 * (1 - min(waiting, threshold) / threshold)`; 0.5 is the most.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoadAware {
    /// Waiting requests from which the score is 0.
    pub threshold: f64,
}

impl Default for LoadAware {
    fn default() -> LoadAware {
        LoadAware { threshold: 128.0 }
    }
}

impl Plugin for LoadAware {
    fn check(&self) -> Result<(), String> {
        if self.threshold > 0.0 {
            return Ok(());
        }
        Err(format!("threshold {} must be positive", self.threshold))
    }
}

impl Scorer for LoadAware {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            if let Some(signals) = row.signals {
                let waiting = f64::from(signals.waiting).min(self.threshold);
                *cell = 0.5 * (1.0 - waiting / self.threshold);
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
        assert!(LoadAware { threshold: 0.0 }.check().is_err());
    }
}
