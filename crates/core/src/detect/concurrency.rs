//! `concurrency-detector`: how full are the endpoints, by what this router has given them?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::load::Load;
use crate::stage::{Detector, Filter, Inputs, LOAD_DEFAULT, Plugin, ProducerRef, View};

/// Parameters of `concurrency-detector`. The saturation is what is in flight on all endpoints over
/// what they may have in flight together. As a filter it removes endpoints that have reached their
/// limit times `1 + headroom`; it may remove all.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Concurrency {
    /// Requests that an endpoint should have in flight at most; above 0.
    pub max_concurrency: i64,
    /// Tokens that an endpoint should have in flight at most; above 0.
    pub max_token_concurrency: i64,
    /// What is counted.
    pub concurrency_mode: ConcurrencyMode,
    /// As a filter, this share above the limit is allowed; 0 or more.
    pub headroom: f64,
    /// Producer of in-flight load.
    pub in_flight_load_producer_name: Option<String>,
}

/// What `concurrency-detector` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ConcurrencyMode {
    /// Requests.
    #[default]
    Requests,
    /// Tokens.
    Tokens,
    /// Whichever of both is closer to its limit.
    Hybrid,
}

impl Default for Concurrency {
    fn default() -> Concurrency {
        Concurrency {
            max_concurrency: 100,
            max_token_concurrency: 1_000_000,
            concurrency_mode: ConcurrencyMode::Requests,
            headroom: 0.0,
            in_flight_load_producer_name: None,
        }
    }
}

impl Concurrency {
    fn counts_requests(&self) -> bool {
        self.concurrency_mode != ConcurrencyMode::Tokens
    }

    fn counts_tokens(&self) -> bool {
        self.concurrency_mode != ConcurrencyMode::Requests
    }

    /// The larger of the shares that count, for loads of `endpoints` endpoints.
    fn share(&self, requests: u128, tokens: u128, endpoints: usize) -> f64 {
        let of = |count: u128, max: i64| count as f64 / (max as f64 * endpoints as f64);
        let requests =
            if self.counts_requests() { of(requests, self.max_concurrency) } else { 0.0 };
        let tokens =
            if self.counts_tokens() { of(tokens, self.max_token_concurrency) } else { 0.0 };
        requests.max(tokens)
    }

    /// Whether one more request fits.
    fn has_room(&self, load: Load) -> bool {
        // Whole requests and tokens: a limit of 1.5 is reached at 1.
        let limit = |max: i64| (max as f64 * (1.0 + self.headroom)) as u64;
        let requests =
            !self.counts_requests() || u64::from(load.requests) < limit(self.max_concurrency);
        requests && (!self.counts_tokens() || load.tokens < limit(self.max_token_concurrency))
    }
}

impl Plugin for Concurrency {
    fn inputs(&self) -> Inputs<'_> {
        let load = ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT);
        Inputs { load: Some(load), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        for (name, max) in [
            ("maxConcurrency", self.max_concurrency),
            ("maxTokenConcurrency", self.max_token_concurrency),
        ] {
            if max <= 0 {
                return Err(format!("{name} {max} must be positive"));
            }
        }
        super::check_headroom(self.headroom)
    }
}

impl Detector for Concurrency {
    fn saturation(&self, view: &View<'_>) -> f64 {
        if view.rows.is_empty() {
            return 1.0;
        }
        let requests = view.rows.iter().map(|row| u128::from(row.inflight.requests)).sum();
        let tokens = view.rows.iter().map(|row| u128::from(row.inflight.tokens)).sum();
        self.share(requests, tokens, view.rows.len())
    }
}

impl Filter for Concurrency {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        for (row, keep) in view.rows.iter().zip(keep) {
            *keep = self.has_room(row.inflight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn detector(concurrency_mode: ConcurrencyMode, headroom: f64) -> Concurrency {
        Concurrency {
            max_concurrency: 10,
            max_token_concurrency: 1_000,
            concurrency_mode,
            headroom,
            in_flight_load_producer_name: None,
        }
    }

    fn fixture(loads: &[(u32, u64)]) -> Fixture {
        let mut fixture = Fixture::new(loads.len());
        for (at, (requests, tokens)) in loads.iter().enumerate() {
            fixture.inflight(at, *requests, *tokens);
        }
        fixture
    }

    #[test]
    fn the_saturation_is_all_that_is_in_flight_over_all_that_may_be() {
        // By requests, tokens, and both.
        type Case<'a> = (&'a [(u32, u64)], [f64; 3]);
        let table: [Case<'_>; 7] = [
            (&[], [1.0, 1.0, 1.0]),
            (&[(0, 0)], [0.0, 0.0, 0.0]),
            (&[(5, 100)], [0.5, 0.1, 0.5]),
            (&[(5, 100), (0, 1_900)], [0.25, 1.0, 1.0]),
            (&[(10, 0), (10, 0)], [1.0, 0.0, 1.0]),
            (&[(30, 0), (0, 0)], [1.5, 0.0, 1.5]),
            (&[(1, u64::MAX), (1, u64::MAX)], [0.1, u64::MAX as f64 / 1e3, u64::MAX as f64 / 1e3]),
        ];
        let modes = [ConcurrencyMode::Requests, ConcurrencyMode::Tokens, ConcurrencyMode::Hybrid];
        for (loads, expected) in table {
            for (mode, expected) in modes.into_iter().zip(expected) {
                for fixture in [fixture(loads), fixture(loads).reversed()] {
                    let found = fixture.saturation(&detector(mode, 0.5));
                    let close = (found - expected).abs() <= 1e-9 * expected.max(1.0);
                    assert!(close, "{loads:?} {mode:?}: {found}");
                }
            }
        }
    }

    #[test]
    fn endpoints_at_their_limit_are_removed_even_all() {
        use ConcurrencyMode::{Hybrid, Requests, Tokens};
        let loads = [(9, 999), (10, 0), (0, 1_000), (12, 1_200), (u32::MAX, u64::MAX)];
        let table = [
            (Requests, 0.0, [true, false, true, false, false]),
            (Tokens, 0.0, [true, true, false, false, false]),
            (Hybrid, 0.0, [true, false, false, false, false]),
            (Requests, 0.25, [true, true, true, false, false]),
            (Requests, 0.35, [true, true, true, true, false]),
            (Tokens, 0.2, [true, true, true, false, false]),
            (Hybrid, 0.3, [true, true, true, true, false]),
        ];
        for (mode, headroom, kept) in table {
            let mut filter = detector(mode, headroom);
            assert_eq!(fixture(&loads).filter(&mut filter), kept, "{mode:?} {headroom}");
            let mut backwards = fixture(&loads).reversed().filter(&mut filter);
            backwards.reverse();
            assert_eq!(backwards, kept);
        }
        let mut filter = detector(Requests, 0.0);
        assert_eq!(fixture(&[(10, 0), (11, 0)]).filter(&mut filter), [false, false]);
        assert!(fixture(&[]).filter(&mut filter).is_empty());
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let fine = Concurrency::default();
        assert!(fine.check().is_ok());
        let bad = [
            (Concurrency { max_concurrency: 0, ..fine.clone() }, "maxConcurrency 0"),
            (Concurrency { max_token_concurrency: -5, ..fine.clone() }, "maxTokenConcurrency -5"),
            (Concurrency { headroom: -1.0, ..fine.clone() }, "headroom"),
            (Concurrency { headroom: f64::INFINITY, ..fine.clone() }, "headroom"),
        ];
        for (bad, words) in bad {
            assert!(bad.check().unwrap_err().starts_with(words), "{words}");
        }
    }
}
