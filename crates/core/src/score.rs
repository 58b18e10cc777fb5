//! How good is each candidate? One file per plugin; formulas are those of llm-d.
//!
//! A scorer that has no data for an endpoint (never scraped, stale metrics) leaves NaN there: the
//! endpoint gets nothing from this scorer, and the decision record shows that data was missing.

mod active_request;
mod cost;
mod kv_usage;
mod latency;
mod load_aware;
mod lora_affinity;
mod no_hit_lru;
mod prefix;
mod queue;
mod session_affinity;
mod token_load;

pub use active_request::ActiveRequest;
pub use cost::Cost;
pub use kv_usage::KvUsage;
pub use latency::{HeadroomSelectionStrategy, Latency};
pub use load_aware::LoadAware;
pub use lora_affinity::LoraAffinity;
pub use no_hit_lru::NoHitLru;
pub use prefix::{PrecisePrefix, Prefix};
pub use queue::{Queue, Running};
pub use session_affinity::{
    EncodedEndpointHeader, SessionAffinity, SessionId, SessionSource, Strategy,
};
pub use token_load::TokenLoad;

#[cfg(test)]
mod tests {
    use crate::Rng;
    use crate::config::Buffered;
    use crate::fixture::{Fixture, assert_scores};
    use crate::plugin::PluginKind;

    fn random_fixture(rng: &mut Rng) -> Fixture {
        let n = rng.below(6);
        let mut fixture = Fixture::new(n);
        for at in 0..n {
            if rng.below(4) > 0 {
                let usage = rng.below(11) as f64 / 10.0;
                fixture.signals(at, rng.below(200) as u32, rng.below(50) as u32, usage);
            }
            fixture.inflight(at, rng.below(9) as u32, rng.next_u64() >> rng.below(64));
            fixture.uncached(at, rng.below(1_000_000) as u32);
            let total = rng.below(100) as u32;
            let matched = rng.below(total as usize + 1) as f64;
            fixture.prefix(at, matched, total, 16);
        }
        fixture
    }

    #[test]
    fn every_score_lies_between_0_and_1_and_goes_with_its_endpoint() {
        for seed in 0..300 {
            let fixture = random_fixture(&mut Rng::seeded(seed));
            for kind in PluginKind::ALL {
                let none = Buffered::Null.into_deserializer::<serde::de::value::Error>();
                let Some(mut scorer) = kind.read(none).unwrap().parts().scorer else { continue };
                let scores = fixture.score(&mut *scorer);
                let fits = |score: &f64| score.is_nan() || (0.0..=1.0).contains(score);
                assert!(scores.iter().all(fits), "seed {seed} {kind:?} {scores:?}");
                // Cold prompts go by name where nothing else tells endpoints apart.
                if *kind != PluginKind::NoHitLruScorer {
                    let mut backwards = fixture.reversed().score(&mut *scorer);
                    backwards.reverse();
                    assert_scores(&backwards, &scores);
                }
            }
        }
    }
}
