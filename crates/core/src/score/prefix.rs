//! `prefix-cache-scorer` and `precise-prefix-cache-scorer`: more of the prompt in cache is better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::Ignored;
use crate::produce::{ApproxPrefix, Indexer, KvEvents, PrecisePrefix as Producer, TokenProcessor};
use crate::stage::{Inputs, PREFIX_DEFAULT, Plugin, PrefixMatch, ProducerRef, Scorer, View};

/// Matched tokens from which the length part is full, by default.
pub(super) const SCALE_TOKENS: f64 = 8192.0;

/// Type name of the precise producer.
const PRECISE: &str = "precise-prefix-cache-producer";

/// `prefix-cache-scorer`: with weight `w`,
/// `(1 - w) * match / total + w * min(1, match * block_size / scale)^2`.
///
/// `match` is the sum of tier weights, not cut to an integer: a prompt that lies half on disk is
/// rated half as good, where llm-d's truncation would drop up to one block.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Prefix {
    /// Producer of prefix matches: the name of a prefix cache producer;
    /// `approx-prefix-cache-producer` when left out.
    pub prefix_match_info_producer_name: Option<String>,
    /// What the length of the match weighs against its share of the prompt, 0 to 1.
    pub match_length_weight: f64,
    /// Matched tokens from which the length part is full.
    pub match_length_scale_tokens: f64,
    /// Parameters of the releases of 2025, in which the scorer had a producer of its own. Any of
    /// them means that form: see [`Prefix::older_form`].
    pub mode: Option<PrefixMode>,
    /// Of the older form, mode `estimated`: bytes per block, 64 when left out.
    #[serde(alias = "hashBlockSize")]
    pub block_size: Option<u32>,
    /// Of the older form, mode `estimated`: blocks of a prompt that are looked at.
    pub max_prefix_blocks_to_match: Option<u32>,
    /// Of the older form, mode `estimated`: blocks remembered per endpoint.
    pub lru_capacity_per_server: Option<u32>,
    /// Of the older form, mode `cache_tracking`.
    pub token_processor_config: Option<TokenProcessor>,
    /// Of the older form, mode `cache_tracking`.
    pub indexer_config: Option<Indexer>,
    /// Of the older form, mode `cache_tracking`.
    pub kv_events_config: Option<KvEvents>,
}

/// Where matches come from in the older form of `prefix-cache-scorer`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PrefixMode {
    /// Routing history over blocks of text.
    #[default]
    Estimated,
    /// The engines' events. Scores are stretched so that the longest match is 1 and the shortest
    /// of those that match at all is 0; where all are equal they are 1.
    CacheTracking,
}

/// Bytes per block of the older form.
const OLDER_BLOCK_BYTES: u32 = 64;
/// Blocks of a prompt that the older form looks at.
const OLDER_BLOCKS_MAX: u32 = 256;

impl Default for Prefix {
    fn default() -> Prefix {
        Prefix {
            prefix_match_info_producer_name: None,
            match_length_weight: 0.0,
            match_length_scale_tokens: SCALE_TOKENS,
            mode: None,
            block_size: None,
            max_prefix_blocks_to_match: None,
            lru_capacity_per_server: None,
            token_processor_config: None,
            indexer_config: None,
            kv_events_config: None,
        }
    }
}

impl Prefix {
    /// The mode, if the parameters are those of the releases of 2025.
    pub fn older_form(&self) -> Option<PrefixMode> {
        let tracking = self.token_processor_config.is_some()
            || self.indexer_config.is_some()
            || self.kv_events_config.is_some();
        let estimated = self.block_size.is_some()
            || self.max_prefix_blocks_to_match.is_some()
            || self.lru_capacity_per_server.is_some();
        match (self.mode, tracking, estimated) {
            (Some(mode), _, _) => Some(mode),
            (None, true, _) => Some(PrefixMode::CacheTracking),
            (None, false, true) => Some(PrefixMode::Estimated),
            (None, false, false) => None,
        }
    }

    /// The history that stands behind the older form, mode `estimated`.
    pub fn older_history(&self) -> ApproxPrefix {
        let defaults = ApproxPrefix::default();
        ApproxPrefix {
            max_prefix_tokens_to_match: 0,
            max_prefix_blocks_to_match: self.max_prefix_blocks_to_match.unwrap_or(OLDER_BLOCKS_MAX),
            lru_capacity_per_server: self
                .lru_capacity_per_server
                .unwrap_or(defaults.lru_capacity_per_server),
            block_bytes: Some(self.block_size.unwrap_or(OLDER_BLOCK_BYTES).max(4)),
            ..defaults
        }
    }

    /// The producer that stands behind the older form, mode `cache_tracking`.
    pub fn older_tracking(&self) -> Producer {
        Producer {
            token_processor_config: self.token_processor_config.clone().unwrap_or_default(),
            indexer_config: self.indexer_config.clone().unwrap_or_default(),
            kv_events_config: self.kv_events_config.clone().unwrap_or_default(),
            ..Producer::default()
        }
    }

    /// Source: llm-d-kv-cache-manager 0.3, normalisation over the endpoints that match.
    fn stretch(&self, view: &View<'_>, column: &mut [f64]) {
        let blocks = |row| view.prefix(row).blocks;
        let matching = || view.rows.iter().map(blocks).filter(|blocks| *blocks > 0);
        let (least, most) = (matching().min().unwrap_or(0), matching().max().unwrap_or(0));
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = match blocks(row) {
                0 => 0.0,
                _ if least == most => 1.0,
                blocks => f64::from(blocks - least) / f64::from(most - least),
            };
        }
    }
}

/// The score of a match: its length against `scale` tokens weighs `weight`, its share of the
/// prompt the rest.
pub(super) fn value(m: PrefixMatch, weight: f64, scale: f64) -> f64 {
    if m.total == 0 {
        return 0.0;
    }
    let tokens = m.weighted * f64::from(m.block_size);
    let length = (tokens / scale).min(1.0).powi(2);
    weight * length + (1.0 - weight) * m.ratio()
}

/// Why the two parameters of [`value`] make no sense.
pub(super) fn check(weight: f64, scale: f64) -> Result<(), String> {
    if !(0.0..=1.0).contains(&weight) {
        return Err(format!("matchLengthWeight {weight} is not in [0, 1]"));
    }
    if scale > 0.0 {
        return Ok(());
    }
    Err(format!("matchLengthScaleTokens {scale} must be positive"))
}

impl Plugin for Prefix {
    fn inputs(&self) -> Inputs<'_> {
        let default = match self.older_form() {
            Some(PrefixMode::CacheTracking) => PRECISE,
            _ => PREFIX_DEFAULT,
        };
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, default);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        self.older_tracking().check()?;
        check(self.match_length_weight, self.match_length_scale_tokens)
    }
}

impl Scorer for Prefix {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        if self.older_form() == Some(PrefixMode::CacheTracking) {
            return self.stretch(view, column);
        }
        for (row, cell) in view.rows.iter().zip(column) {
            let (weight, scale) = (self.match_length_weight, self.match_length_scale_tokens);
            *cell = value(view.prefix(row), weight, scale);
        }
    }
}

/// `precise-prefix-cache-scorer`: `match / total` of the precise producer; the configured one, or
/// one made from these parameters.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PrecisePrefix {
    /// Parameters of the producer that is created when none is configured.
    pub token_processor_config: TokenProcessor,
    /// See [`Producer`].
    pub indexer_config: Indexer,
    /// See [`Producer`].
    pub kv_events_config: KvEvents,
    /// See [`Producer`].
    pub speculative_indexing: bool,
    /// See [`Producer`].
    #[serde(rename = "speculativeTTL")]
    pub speculative_ttl: Option<crate::config::GoDuration>,
    /// Of older releases, without effect: prompts are tokenized by the token producer.
    pub tokenizers_pool_config: Option<Ignored>,
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

impl Plugin for PrecisePrefix {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { prefix: Some(ProducerRef::Default(PRECISE)), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        self.producer().check()
    }

    fn inert(&self) -> Vec<String> {
        let text = "tokenizersPoolConfig: prompts are tokenized by the token producer";
        let pool = self.tokenizers_pool_config.iter().map(|_| text.to_owned());
        self.producer().inert().into_iter().chain(pool).collect()
    }
}

impl Scorer for PrecisePrefix {
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
    fn the_older_form_stretches_the_scores_of_those_that_match() {
        let mode = Some(PrefixMode::CacheTracking);
        let mut scorer = Prefix { mode, ..Prefix::default() };
        let mut fixture = Fixture::new(4);
        for (row, matched) in [0.0, 4.0, 10.0, 7.0].into_iter().enumerate() {
            fixture.prefix(row, matched, 12, 64);
        }
        assert_scores(&fixture.score(&mut scorer), &[0.0, 0.0, 1.0, 0.5]);
        let mut fixture = Fixture::new(3);
        fixture.prefix(1, 5.0, 12, 64);
        fixture.prefix(2, 5.0, 12, 64);
        assert_scores(&fixture.score(&mut scorer), &[0.0, 1.0, 1.0]);
    }

    #[test]
    fn the_older_form_is_told_by_its_parameters() {
        let read = |json: &str| -> Prefix { serde_json::from_str(json).unwrap() };
        assert_eq!(read("{}").older_form(), None);
        let history = read(r#"{"maxPrefixBlocksToMatch": 256, "lruCapacityPerServer": 31250}"#);
        assert_eq!(history.older_form(), Some(PrefixMode::Estimated));
        let history = history.older_history();
        assert_eq!((history.block_tokens(Some(64)), history.blocks_max(16)), (16, 256));
        let tracking =
            read(r#"{"mode": "cache_tracking", "tokenProcessorConfig": {"blockSizeTokens": 64}}"#);
        assert_eq!(tracking.older_form(), Some(PrefixMode::CacheTracking));
        assert_eq!(tracking.older_tracking().block_tokens_assumed(), 64);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        assert!(Prefix { match_length_weight: 1.1, ..Default::default() }.check().is_err());
        assert!(Prefix { match_length_scale_tokens: 0.0, ..Default::default() }.check().is_err());
        assert!(Prefix::default().check().is_ok());
    }
}
