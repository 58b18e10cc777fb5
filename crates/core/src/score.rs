//! How good is each candidate? One file per plugin; formulas are those of llm-d.
//!
//! A scorer that has no data for an endpoint (never scraped, stale metrics) leaves NaN there: the
//! endpoint gets nothing from this scorer, and the decision record shows that data was missing.

mod active_request;
mod context_length;
mod cost;
mod encoder_cache;
mod endpoint_attribute;
mod header_label;
mod kv_usage;
mod latency;
mod load_aware;
mod lora_affinity;
mod multicluster;
mod no_hit_lru;
mod prefix;
mod queue;
mod session_affinity;
mod token_load;
mod topology_affinity;

pub use active_request::ActiveRequest;
pub use context_length::ContextLength;
pub use cost::Cost;
pub use encoder_cache::EncoderCache;
pub use endpoint_attribute::{
    AdaptiveRange, EndpointAttribute, FixedRange, Normalization, ScoreAlgorithm, ScoreAlgorithmType,
};
pub use header_label::HeaderLabel;
pub use kv_usage::KvUsage;
pub use latency::{HeadroomSelectionStrategy, Latency};
pub use load_aware::LoadAware;
pub use lora_affinity::LoraAffinity;
pub use multicluster::{
    CLUSTER_KV_USAGE, CLUSTER_QUEUE, ClusterKvUsage, ClusterPrefix, ClusterQueue,
};
pub use no_hit_lru::NoHitLru;
pub use prefix::{PrecisePrefix, Prefix};
pub use queue::{Queue, Running};
pub use session_affinity::{
    AGENT_IDENTITY, EncodedEndpointHeader, SessionAffinity, SessionId, SessionSource, Strategy,
};
pub use token_load::TokenLoad;
pub use topology_affinity::TopologyAffinity;

/// Between the least and the most of the candidates: the least value scores 1, the most 0; where
/// all are equal, 1. A candidate without a value has no score and does not move the others.
fn relative(column: &mut [f64], value: impl Fn(usize) -> Option<f64>) {
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in (0..column.len()).filter_map(&value) {
        (least, most) = (least.min(value), most.max(value));
    }
    for (at, cell) in column.iter_mut().enumerate() {
        if let Some(value) = value(at) {
            *cell = if most == least { 1.0 } else { (most - value) / (most - least) };
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Rng;
    use crate::fixture::{Fixture, assert_scores, every_spec};
    use crate::plugin::PluginKind;

    #[test]
    fn every_score_lies_between_0_and_1_and_goes_with_its_endpoint() {
        for seed in 0..300 {
            let fixture = Fixture::random(&mut Rng::seeded(seed));
            for spec in every_spec() {
                let Some(mut scorer) = spec.parts().scorer else { continue };
                let scores = fixture.score(&mut *scorer);
                let fits = |score: &f64| score.is_nan() || (0.0..=1.0).contains(score);
                assert!(scores.iter().all(fits), "seed {seed} {spec:?} {scores:?}");
                // Cold prompts go by name where nothing else tells endpoints apart.
                if spec.kind() != PluginKind::NoHitLruScorer {
                    let mut backwards = fixture.reversed().score(&mut *scorer);
                    backwards.reverse();
                    assert_scores(&backwards, &scores);
                }
            }
        }
    }
}
