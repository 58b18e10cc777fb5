//! `token-load-scorer`: fewer uncached prompt tokens in flight, this request's included, is better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Inputs, LOAD_DEFAULT, Plugin, ProducerRef, Scorer, View};

/// `token-load-scorer`: with `x` the tokens in flight plus this request's uncached tokens,
/// `1 - min(x, threshold) / threshold`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TokenLoad {
    /// Tokens from which the score is 0.
    pub queue_threshold_tokens: f64,
    /// Producer of in-flight load.
    pub in_flight_load_producer_name: Option<String>,
}

impl Default for TokenLoad {
    fn default() -> TokenLoad {
        TokenLoad { queue_threshold_tokens: 4_194_304.0, in_flight_load_producer_name: None }
    }
}

impl Plugin for TokenLoad {
    fn inputs(&self) -> Inputs<'_> {
        let load = ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT);
        Inputs { load: Some(load), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        if self.queue_threshold_tokens > 0.0 {
            return Ok(());
        }
        Err(format!("queueThresholdTokens {} must be positive", self.queue_threshold_tokens))
    }
}

impl Scorer for TokenLoad {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let threshold = self.queue_threshold_tokens;
        for (row, cell) in view.rows.iter().zip(column) {
            let tokens = row.inflight.tokens.saturating_add(u64::from(row.uncached_tokens)) as f64;
            *cell = 1.0 - tokens.min(threshold) / threshold;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_published_vectors_hold() {
        let mut fixture = Fixture::new(4);
        fixture.inflight(0, 1, 500);
        fixture.inflight(1, 1, 250);
        fixture.uncached(1, 250);
        fixture.inflight(3, 9, u64::MAX);
        fixture.uncached(3, 1);
        let mut scorer = TokenLoad { queue_threshold_tokens: 1000.0, ..Default::default() };
        assert_scores(&fixture.score(&mut scorer), &[0.5, 0.5, 1.0, 0.0]);
    }
}
