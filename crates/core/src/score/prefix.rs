//! `prefix-cache-scorer` and `precise-prefix-cache-scorer`: more of the prompt in cache is better.

use serde::Deserialize;

use crate::produce::PrecisePrefix as Producer;
use crate::stage::{Inputs, PREFIX_DEFAULT, PrefixMatch, ProducerRef, Scorer, View};

/// Type name of the precise producer.
const PRECISE: &str = "precise-prefix-cache-producer";

/// `prefix-cache-scorer`: with weight `w`,
/// `(1 - w) * match / total + w * min(1, match * block_size / scale)^2`.
///
/// `match` is the sum of tier weights, not cut to an integer: a prompt that lies half on disk is
/// rated half as good, where llm-d's truncation would drop up to one block.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Prefix {
    /// Producer of prefix matches.
    pub prefix_match_info_producer_name: Option<String>,
    /// 0 to 1.
    pub match_length_weight: f64,
    /// Matched tokens from which the length part is full.
    pub match_length_scale_tokens: f64,
}

impl Default for Prefix {
    fn default() -> Prefix {
        Prefix {
            prefix_match_info_producer_name: None,
            match_length_weight: 0.0,
            match_length_scale_tokens: 8192.0,
        }
    }
}

impl Prefix {
    fn value(&self, m: PrefixMatch) -> f64 {
        if m.total == 0 {
            return 0.0;
        }
        let tokens = m.weighted * f64::from(m.block_size);
        let length = (tokens / self.match_length_scale_tokens).min(1.0).powi(2);
        let w = self.match_length_weight;
        w * length + (1.0 - w) * m.ratio()
    }
}

impl Scorer for Prefix {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.match_length_weight) {
            return Err(format!("matchLengthWeight {} is not in [0, 1]", self.match_length_weight));
        }
        if self.match_length_scale_tokens > 0.0 {
            return Ok(());
        }
        Err(format!("matchLengthScaleTokens {} must be positive", self.match_length_scale_tokens))
    }

    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = self.value(view.prefix(row));
        }
    }
}

/// `precise-prefix-cache-scorer`: `match / total` of the precise producer; the configured one, or
/// one made from these parameters.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PrecisePrefix {
    /// Parameters of the producer that is created when none is configured.
    pub token_processor_config: crate::produce::TokenProcessor,
    /// See [`Producer`].
    pub indexer_config: crate::produce::Indexer,
    /// See [`Producer`].
    pub kv_events_config: crate::produce::KvEvents,
    /// See [`Producer`].
    pub speculative_indexing: bool,
    /// See [`Producer`].
    #[serde(rename = "speculativeTTL")]
    pub speculative_ttl: Option<crate::config::GoDuration>,
}

impl PrecisePrefix {
    /// The producer that stands behind the scorer when the configuration has none.
    pub fn producer(&self) -> Producer {
        Producer {
            token_processor_config: self.token_processor_config.clone(),
            indexer_config: self.indexer_config.clone(),
            kv_events_config: self.kv_events_config.clone(),
            speculative_indexing: self.speculative_indexing,
            speculative_ttl: self.speculative_ttl,
        }
    }
}

impl Scorer for PrecisePrefix {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { prefix: Some(ProducerRef::Default(PRECISE)), ..Inputs::default() }
    }

    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = view.prefix(row).ratio();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_published_vectors_hold() {
        let plain = Prefix::default();
        let mixed = Prefix {
            match_length_weight: 0.5,
            match_length_scale_tokens: 100.0,
            ..Default::default()
        };
        let table = [
            (&plain, 5.0, 10, 1, 0.5),
            (&mixed, 5.0, 10, 1, 0.25125),
            (&mixed, 50.0, 100, 1, 0.375),
            (&mixed, 200.0, 200, 16, 1.0),
            (&plain, 0.0, 0, 16, 0.0),
            (&plain, 7.6, 8, 16, 0.95),
        ];
        for (scorer, matched, total, block_size, score) in table {
            let mut fixture = Fixture::new(1);
            fixture.prefix(0, matched, total, block_size);
            assert_scores(&fixture.score(&mut scorer.clone()), &[score]);
        }
        assert_scores(&Fixture::new(1).score(&mut Prefix::default()), &[0.0]);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        assert!(Prefix { match_length_weight: 1.1, ..Default::default() }.check().is_err());
        assert!(Prefix { match_length_scale_tokens: 0.0, ..Default::default() }.check().is_err());
        assert!(Prefix::default().check().is_ok());
    }
}
