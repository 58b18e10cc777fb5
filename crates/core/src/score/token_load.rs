//! `token-load-scorer`: fewer uncached prompt tokens in flight, this request's included, is better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Inputs, LOAD_DEFAULT, Plugin, ProducerRef, Scorer, View};

/// Tokens from which the score is 0, by default: 128 prompts of 32,768.
const THRESHOLD_TOKENS: f64 = 4_194_304.0;

/// `token-load-scorer`: with `x` the tokens in flight plus this request's uncached tokens,
/// `1 - min(x, threshold) / threshold`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TokenLoad {
    /// Tokens from which the score is 0; 0 and less mean 4194304.
    pub queue_threshold_tokens: f64,
    /// Producer of in-flight load: the name of an `inflight-load-producer`.
    pub in_flight_load_producer_name: Option<String>,
}

impl Default for TokenLoad {
    fn default() -> TokenLoad {
        TokenLoad { queue_threshold_tokens: THRESHOLD_TOKENS, in_flight_load_producer_name: None }
    }
}

impl Plugin for TokenLoad {
    fn inputs(&self) -> Inputs<'_> {
        let load = ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT);
        Inputs { load: Some(load), ..Inputs::default() }
    }

    fn inert(&self) -> Vec<String> {
        let given = self.queue_threshold_tokens;
        let text =
            || format!("queueThresholdTokens {given}: not positive, so {THRESHOLD_TOKENS} counts");
        if given > 0.0 { Vec::new() } else { vec![text()] }
    }
}

impl Scorer for TokenLoad {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let given = self.queue_threshold_tokens;
        let threshold = if given > 0.0 { given } else { THRESHOLD_TOKENS };
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
        assert_scores(&Fixture::new(0).score(&mut scorer), &[]);
    }

    #[test]
    fn a_threshold_that_is_not_positive_is_the_default_one() {
        let mut fixture = Fixture::new(1);
        fixture.inflight(0, 1, 2_097_152);
        for given in [0.0, -5.0, f64::NAN] {
            let mut scorer = TokenLoad { queue_threshold_tokens: given, ..Default::default() };
            assert_scores(&fixture.score(&mut scorer), &[0.5]);
            assert_eq!(scorer.inert().len(), 1);
        }
        assert!(TokenLoad::default().inert().is_empty());
    }
}
