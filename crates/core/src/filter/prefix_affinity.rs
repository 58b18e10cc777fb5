//! `prefix-cache-affinity-filter`: stick to endpoints that hold the prompt, until they are too
//! busy.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{Filter, Inputs, LOAD_DEFAULT, PREFIX_DEFAULT, Plugin, ProducerRef, Row, View};

/// Parameters of `prefix-cache-affinity-filter`. The *sticky* set holds the candidates whose match
/// is at least `affinityThreshold` of the prompt. It is kept alone, except when it is empty, with
/// probability `explorationProbability`, or when the best of it would answer later than the best
/// of the rest by more than `maxTTFTPenaltyMs`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PrefixAffinity {
    /// Share of the prompt, 0 to 1; 0 switches the filter off.
    pub affinity_threshold: f64,
    /// 0 to 1.
    pub exploration_probability: f64,
    /// Milliseconds of time to first token; 0: no limit.
    #[serde(rename = "maxTTFTPenaltyMs")]
    pub max_ttft_penalty_ms: f64,
    /// How time to first token is estimated.
    pub ttft_source: TtftSource,
    /// Tokens per second that an endpoint prefills at best.
    pub peak_prefill_throughput: f64,
    /// Producer of prefix matches.
    pub prefix_match_info_producer_name: Option<String>,
    /// Producer of in-flight load.
    pub in_flight_load_producer_name: Option<String>,
    /// Accepted; used with `ttftSource: latencyPredictor` only.
    pub latency_prediction_info_producer_name: Option<String>,
}

/// Where the filter takes an endpoint's time to first token from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TtftSource {
    /// In-flight tokens over `peakPrefillThroughput`.
    PrefillThroughput,
    /// Predicted latency.
    LatencyPredictor,
}

impl Default for PrefixAffinity {
    fn default() -> PrefixAffinity {
        PrefixAffinity {
            affinity_threshold: 0.80,
            exploration_probability: 0.0,
            max_ttft_penalty_ms: 18_000.0,
            ttft_source: TtftSource::PrefillThroughput,
            peak_prefill_throughput: 15_928.0,
            prefix_match_info_producer_name: None,
            in_flight_load_producer_name: None,
            latency_prediction_info_producer_name: None,
        }
    }
}

impl PrefixAffinity {
    fn sticky(&self, view: &View<'_>, row: &Row) -> bool {
        let prefix = view.prefix(row);
        prefix.total > 0 && prefix.ratio() >= self.affinity_threshold
    }

    fn ttft_ms(&self, row: &Row) -> f64 {
        row.inflight.tokens as f64 / self.peak_prefill_throughput * 1000.0
    }

    fn best_ttft_ms(&self, view: &View<'_>, sticky: bool) -> f64 {
        let rows = view.rows.iter().filter(|row| self.sticky(view, row) == sticky);
        rows.map(|row| self.ttft_ms(row)).fold(f64::INFINITY, f64::min)
    }
}

impl Plugin for PrefixAffinity {
    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            prefix: Some(ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT)),
            load: Some(ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT)),
            ..Inputs::default()
        }
    }

    fn check(&self) -> Result<(), String> {
        let unit = 0.0..=1.0;
        if !unit.contains(&self.affinity_threshold) {
            return Err(format!("affinityThreshold {} is not in [0, 1]", self.affinity_threshold));
        }
        if !unit.contains(&self.exploration_probability) {
            let p = self.exploration_probability;
            return Err(format!("explorationProbability {p} is not in [0, 1]"));
        }
        if self.max_ttft_penalty_ms.is_nan() || self.max_ttft_penalty_ms < 0.0 {
            let ms = self.max_ttft_penalty_ms;
            return Err(format!("maxTTFTPenaltyMs {ms} must not be negative"));
        }
        if self.peak_prefill_throughput.is_nan() || self.peak_prefill_throughput <= 0.0 {
            let rate = self.peak_prefill_throughput;
            return Err(format!("peakPrefillThroughput {rate} must be positive"));
        }
        match self.ttft_source {
            TtftSource::PrefillThroughput => Ok(()),
            TtftSource::LatencyPredictor => Err("ttftSource latencyPredictor is not available in \
                 this version; use prefillThroughput"
                .into()),
        }
    }
}

impl Filter for PrefixAffinity {
    fn filter(&mut self, view: &View<'_>, rng: &mut Rng, keep: &mut [bool]) {
        if view.rows.len() <= 1 || self.affinity_threshold <= 0.0 {
            return;
        }
        let sticky = view.rows.iter().filter(|row| self.sticky(view, row)).count();
        if sticky == 0 || sticky == view.rows.len() {
            return;
        }
        if self.exploration_probability > 0.0 && rng.next_f64() < self.exploration_probability {
            return;
        }
        let penalty_ms = self.best_ttft_ms(view, true) - self.best_ttft_ms(view, false);
        if self.max_ttft_penalty_ms > 0.0 && penalty_ms > self.max_ttft_penalty_ms {
            return;
        }
        for (row, keep) in view.rows.iter().zip(keep) {
            *keep = self.sticky(view, row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn check(filter: &PrefixAffinity, rows: &[(u32, u64)], kept: &[bool]) {
        let mut fixture = Fixture::new(rows.len());
        for (at, (blocks, tokens)) in rows.iter().enumerate() {
            fixture.prefix(at, f64::from(*blocks), 10, 16);
            fixture.inflight(at, 1, *tokens);
        }
        assert_eq!(fixture.filter(&mut filter.clone()), kept, "{rows:?}");
    }

    #[test]
    fn sticks_until_the_penalty_is_too_high() {
        let filter = PrefixAffinity { peak_prefill_throughput: 1000.0, ..Default::default() };
        check(&filter, &[(8, 0), (7, 0), (10, 0)], &[true, false, true]);
        check(&filter, &[(0, 0), (7, 0)], &[true, true]);
        check(&filter, &[(0, 0)], &[true]);
        // 18 s of penalty is allowed, more is not.
        check(&filter, &[(9, 18_000), (0, 0)], &[true, false]);
        check(&filter, &[(9, 18_001), (0, 0)], &[true, true]);
        let no_limit = PrefixAffinity { max_ttft_penalty_ms: 0.0, ..filter.clone() };
        check(&no_limit, &[(9, 1_000_000), (0, 0)], &[true, false]);
        let off = PrefixAffinity { affinity_threshold: 0.0, ..filter.clone() };
        check(&off, &[(9, 0), (0, 0)], &[true, true]);
        let explorer = PrefixAffinity { exploration_probability: 1.0, ..filter };
        check(&explorer, &[(9, 0), (0, 0)], &[true, true]);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let bad = PrefixAffinity { affinity_threshold: 1.5, ..Default::default() };
        assert!(bad.check().is_err());
        let bad = PrefixAffinity { peak_prefill_throughput: 0.0, ..Default::default() };
        assert!(bad.check().is_err());
        let bad =
            PrefixAffinity { ttft_source: TtftSource::LatencyPredictor, ..Default::default() };
        assert!(bad.check().is_err());
        assert!(PrefixAffinity::default().check().is_ok());
    }
}
