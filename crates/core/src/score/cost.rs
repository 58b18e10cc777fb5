//! `kvroute-cost-scorer`: the least harm done, in seconds, is best.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::produce::uncached_tokens;
use crate::stage::{Inputs, Plugin, ProducerRef, Row, Scorer, View};

/// Share of an endpoint's KV from which on it is scarce.
const PRESSURE_FROM: f64 = 0.8;

/// Type name of the producer that is read when none is named.
const PRECISE: &str = "precise-prefix-cache-producer";

/// `kvroute-cost-scorer`: `1 / (1 + cost)`, where the cost is in seconds of waiting that the
/// request causes, to itself and to others. With `p` the seconds per prompt token:
///
/// ```text
/// cost = p * uncached * (1 + interferenceWeight * n)  its own prefill, and whom that delays
///      + copyWeight * p * uncached * pressure         what a copy drives out where KV is scarce
///      + overflowWeight * p * overflow                what must be recomputed when KV runs out
///      + decodeWeight * output * step                 its own answer, at the pace of the batch
///      + spreadWeight * p * ahead * cold              new prefixes go where little went lately
/// ```
///
/// `n` are the requests in flight, `pressure` goes from 0 to 1 while their KV and this one's fill
/// the last fifth of what the endpoint has, `overflow` the KV tokens that they and this one need
/// beyond what the endpoint has (the least that any candidate has, where its metrics do not say),
/// `output` the expected answer in tokens, `step = step_base + step_per_token * context tokens in
/// flight`, `ahead` the tokens of work that the endpoint was given in the last half minute beyond
/// the least of any candidate, and `cold` the share of the prompt that is not cached. Seconds per
/// token are learned per endpoint from its answers; see [`crate::learn`].
///
/// The prefill queue is left out on purpose: leaving a warm endpoint because of its queue copies
/// a prefix elsewhere, evicts another one there, and costs more than it saves.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Cost {
    /// Producer of prefix matches.
    pub prefix_match_info_producer_name: Option<String>,
    /// What a second of delay in another answer weighs, for each request in flight.
    pub interference_weight: f64,
    /// What a token of prefix that must be computed there costs others when KV is scarce.
    pub copy_weight: f64,
    /// Share of the overflow that will be computed again.
    pub overflow_weight: f64,
    /// What a second of the answer weighs against a second before its first token.
    pub decode_weight: f64,
    /// What a second of work given lately weighs when a new prefix is placed.
    pub spread_weight: f64,
}

impl Default for Cost {
    fn default() -> Cost {
        Cost {
            prefix_match_info_producer_name: None,
            interference_weight: 0.02,
            copy_weight: 1.0,
            overflow_weight: 0.3,
            decode_weight: 0.03,
            spread_weight: 0.25,
        }
    }
}

/// What a candidate is compared with.
#[derive(Clone, Copy, Debug)]
struct Least {
    /// The least work that any candidate was given lately, in tokens.
    recent: f64,
    /// The least KV tokens that any candidate has room for; `None`: no metrics say.
    room: Option<u64>,
}

impl Least {
    fn of(rows: &[Row]) -> Least {
        let recent = rows.iter().map(|row| row.costing.recent_tokens);
        Least {
            recent: recent.fold(f64::INFINITY, f64::min),
            room: rows.iter().filter_map(|row| row.costing.capacity_tokens).min(),
        }
    }
}

impl Cost {
    /// Seconds of harm that the request does on an endpoint.
    fn seconds(&self, view: &View<'_>, row: &Row, least: Least) -> f64 {
        let costing = &row.costing;
        let speed = &costing.speed;
        let prompt = view.request.prompt_tokens;
        let uncached = f64::from(match view.request.skips_cache {
            true => prompt,
            false => uncached_tokens(prompt, view.prefix(row)),
        });
        let others = f64::from(row.inflight.requests);
        let needed = costing.committed_tokens + costing.added_tokens;
        let room = costing.capacity_tokens.or(least.room);
        let overflow = costing.overflow_tokens(room) as f64;
        // Where no metrics tell the room, nothing is scarce.
        let filled = room.map_or(0.0, |room| needed as f64 / room.max(1) as f64);
        let pressure = ((filled - PRESSURE_FROM) / (1.0 - PRESSURE_FROM)).clamp(0.0, 1.0);
        let cold = uncached / f64::from(prompt.max(1));
        let ahead = (costing.recent_tokens - least.recent).max(0.0);
        let prefill_tokens = uncached * (1.0 + self.interference_weight * others)
            + self.copy_weight * uncached * pressure
            + self.overflow_weight * overflow
            + self.spread_weight * ahead * cold;
        speed.prefill_per_token_s * prefill_tokens
            + self.decode_weight * costing.output_tokens * costing.step_s(prompt)
    }
}

impl Plugin for Cost {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PRECISE);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        for (name, weight) in [
            ("interferenceWeight", self.interference_weight),
            ("copyWeight", self.copy_weight),
            ("overflowWeight", self.overflow_weight),
            ("decodeWeight", self.decode_weight),
            ("spreadWeight", self.spread_weight),
        ] {
            if !weight.is_finite() || weight < 0.0 {
                return Err(format!("{name} {weight} must be finite and not negative"));
            }
        }
        Ok(())
    }
}

impl Scorer for Cost {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let least = Least::of(view.rows);
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = 1.0 / (1.0 + self.seconds(view, row, least));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::committed::Work;
    use crate::cost::Costing;
    use crate::fixture::Fixture;
    use crate::learn::Speed;

    /// Two endpoints that are alike, and a prompt of 1,000 tokens of which 60 blocks have a key.
    fn alike() -> (Fixture, Costing) {
        let mut fixture = Fixture::new(2);
        let costing = Costing {
            committed_tokens: 50_000,
            added_tokens: 2_000,
            capacity_tokens: Some(100_000),
            work: Work { prefill: 1_000, context: 80_000 },
            speed: Speed::default(),
            output_tokens: 200.0,
            recent_tokens: 10_000.0,
            ..Costing::default()
        };
        fixture.prompt_tokens(1_000);
        for at in 0..2 {
            fixture.prefix(at, 30.0, 60, 16);
            fixture.inflight(at, 10, 0);
            fixture.costing(at, costing);
        }
        (fixture, costing)
    }

    #[test]
    fn each_term_costs_what_it_says() {
        let only = |weight: fn(&mut Cost)| {
            let zero = Cost {
                interference_weight: 0.0,
                copy_weight: 0.0,
                overflow_weight: 0.0,
                decode_weight: 0.0,
                spread_weight: 0.0,
                ..Cost::default()
            };
            let mut one = zero.clone();
            weight(&mut one);
            (zero, one)
        };
        let (mut fixture, mut costing) = alike();
        costing.committed_tokens = 99_000;
        costing.recent_tokens = 15_000.0;
        fixture.costing(1, costing);
        let p = Speed::default().prefill_per_token_s;
        let step = Speed::default().step_base_s + Speed::default().step_per_token_s * 81_100.0;
        type Term = (fn(&mut Cost), f64);
        let table: [Term; 5] = [
            (|c| c.interference_weight = 0.1, p * 520.0 * 0.1 * 10.0),
            (|c| c.copy_weight = 0.5, p * 520.0 * 0.5),
            (|c| c.overflow_weight = 0.5, p * 0.5 * 1_000.0),
            (|c| c.decode_weight = 0.03, 0.03 * 200.0 * step),
            (|c| c.spread_weight = 0.1, p * 0.1 * 5_000.0 * 0.52),
        ];
        for (term, (weight, expected)) in table.into_iter().enumerate() {
            let (mut zero, mut one) = only(weight);
            let cost = |score: f64| 1.0 / score - 1.0;
            let without = cost(fixture.score(&mut zero)[1]);
            let with = cost(fixture.score(&mut one)[1]);
            assert!((without - p * 520.0).abs() < 1e-9, "{without}");
            assert!((with - without - expected).abs() < 1e-9, "term {term}: {with} {without}");
        }
    }

    #[test]
    fn what_is_worse_scores_lower() {
        let worse: [fn(&mut Fixture, Costing); 4] = [
            |f, _| f.prefix(1, 10.0, 60, 16),
            |f, c| f.costing(1, Costing { committed_tokens: 120_000, ..c }),
            |f, c| f.costing(1, Costing { work: Work { context: 900_000, ..c.work }, ..c }),
            |f, c| f.costing(1, Costing { recent_tokens: 90_000.0, ..c }),
        ];
        for (at, worsen) in worse.into_iter().enumerate() {
            let (mut fixture, costing) = alike();
            let equal = fixture.score(&mut Cost::default());
            assert_eq!(equal[0], equal[1]);
            worsen(&mut fixture, costing);
            let scores = fixture.score(&mut Cost::default());
            assert!(scores[1] < scores[0], "{at}: {scores:?}");
        }
    }

    #[test]
    fn an_endpoint_that_does_not_say_its_room_has_no_more_than_the_others() {
        let (mut fixture, mut costing) = alike();
        costing.committed_tokens = 150_000;
        fixture.costing(0, costing);
        fixture.costing(1, Costing { capacity_tokens: None, ..costing });
        let scores = fixture.score(&mut Cost::default());
        assert_eq!(scores[0], scores[1]);
    }

    #[test]
    fn weights_out_of_range_are_refused() {
        assert!(Cost { decode_weight: -1.0, ..Cost::default() }.check().is_err());
        assert!(Cost { spread_weight: f64::NAN, ..Cost::default() }.check().is_err());
        assert!(Cost::default().check().is_ok());
    }
}
