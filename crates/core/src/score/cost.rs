//! `kvroute-cost-scorer`: the least harm done, in seconds, is best.

use serde::Deserialize;

use crate::produce::uncached_tokens;
use crate::stage::{Inputs, ProducerRef, Row, Scorer, View};

/// Type name of the producer that is read when none is named.
const PRECISE: &str = "precise-prefix-cache-producer";

/// `kvroute-cost-scorer`: `1 / (1 + cost)`, where the cost is in seconds of waiting that the
/// request causes, to itself and to others:
///
/// ```text
/// cost = prefill * (1 + interferenceWeight * n)        its own prefill, and what that delays
///      + overflowWeight * prefill_per_token * overflow what must be recomputed when KV runs out
///      + decodeWeight * output * step                  its own answer, at the pace of the batch
/// ```
///
/// with `prefill = prefill_per_token * uncached tokens`, `n` requests in flight, `overflow` the KV
/// tokens that requests in flight and this one need beyond what the endpoint has, `output` the
/// expected answer in tokens, and `step = step_base + step_per_token * context tokens in flight`.
/// The seconds per token are learned per endpoint from its answers; see [`crate::learn`].
///
/// The prefill queue is left out on purpose: leaving a warm endpoint because of its queue copies
/// a prefix elsewhere, evicts another one there, and costs more than it saves.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Cost {
    /// Producer of prefix matches.
    pub prefix_match_info_producer_name: Option<String>,
    /// What a second of delay in everybody else's answer weighs, per request.
    pub interference_weight: f64,
    /// Share of the overflow that will be computed again.
    pub overflow_weight: f64,
    /// What a second of the answer weighs against a second before its first token.
    pub decode_weight: f64,
}

impl Default for Cost {
    fn default() -> Cost {
        Cost {
            prefix_match_info_producer_name: None,
            interference_weight: 0.02,
            overflow_weight: 0.3,
            decode_weight: 0.03,
        }
    }
}

impl Cost {
    /// Seconds of harm that the request does on an endpoint.
    pub fn seconds(&self, view: &View<'_>, row: &Row) -> f64 {
        let costing = &row.costing;
        let speed = &costing.speed;
        let uncached = uncached_tokens(view.request.prompt_tokens, view.prefix(row));
        let prefill = speed.prefill_per_token_s * f64::from(uncached);
        let others = f64::from(row.inflight.requests);
        let needed = costing.committed_tokens + costing.added_tokens;
        let overflow = costing.capacity_tokens.map_or(0, |room| needed.saturating_sub(room)) as f64;
        let own = f64::from(view.request.prompt_tokens) + costing.output_tokens / 2.0;
        let context = costing.work.context as f64 + own;
        let step = speed.step_base_s + speed.step_per_token_s * context;
        prefill * (1.0 + self.interference_weight * others)
            + self.overflow_weight * speed.prefill_per_token_s * overflow
            + self.decode_weight * costing.output_tokens * step
    }
}

impl Scorer for Cost {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PRECISE);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        for (name, weight) in [
            ("interferenceWeight", self.interference_weight),
            ("overflowWeight", self.overflow_weight),
            ("decodeWeight", self.decode_weight),
        ] {
            if !weight.is_finite() || weight < 0.0 {
                return Err(format!("{name} {weight} must be finite and not negative"));
            }
        }
        Ok(())
    }

    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = 1.0 / (1.0 + self.seconds(view, row));
        }
    }
}
