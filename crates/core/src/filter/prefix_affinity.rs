//! `prefix-cache-affinity-filter`: stick to endpoints that hold the prompt, until they are too
//! busy.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{
    Filter, Inputs, LATENCY_DEFAULT, LOAD_DEFAULT, PREFIX_DEFAULT, Plugin, ProducerRef, Row, View,
};

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
    /// Producer of predicted latencies, for `ttftSource: latencyPredictor`.
    pub latency_prediction_info_producer_name: Option<String>,
}

/// Where the filter takes an endpoint's time to first token from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum TtftSource {
    /// In-flight tokens over `peakPrefillThroughput`.
    PrefillThroughput,
    /// What `predicted-latency-producer` predicts; without a prediction nothing is too late.
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

    /// Infinite where nothing is predicted.
    fn ttft_ms(&self, row: &Row) -> f64 {
        match self.ttft_source {
            TtftSource::PrefillThroughput => {
                row.inflight.tokens as f64 / self.peak_prefill_throughput * 1000.0
            }
            TtftSource::LatencyPredictor => {
                row.latency.map_or(f64::INFINITY, |latency| latency.ttft_s * 1000.0)
            }
        }
    }

    fn best_ttft_ms(&self, view: &View<'_>, sticky: bool) -> f64 {
        let rows = view.rows.iter().filter(|row| self.sticky(view, row) == sticky);
        rows.map(|row| self.ttft_ms(row)).fold(f64::INFINITY, f64::min)
    }
}

impl Plugin for PrefixAffinity {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT);
        let load = ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT);
        let latency = ProducerRef::of(&self.latency_prediction_info_producer_name, LATENCY_DEFAULT);
        let limited = self.max_ttft_penalty_ms > 0.0;
        let predicted = self.ttft_source == TtftSource::LatencyPredictor;
        Inputs {
            prefix: Some(prefix),
            load: (limited && !predicted).then_some(load),
            latency: (limited && predicted).then_some(latency),
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
        let rate = self.peak_prefill_throughput;
        let used =
            self.max_ttft_penalty_ms > 0.0 && self.ttft_source == TtftSource::PrefillThroughput;
        if rate.is_nan() || rate < 0.0 || (used && rate == 0.0) {
            return Err(format!("peakPrefillThroughput {rate} must be positive"));
        }
        Ok(())
    }

    fn inert(&self) -> Vec<String> {
        let inputs = self.inputs();
        let why = |source: &str| match self.max_ttft_penalty_ms > 0.0 {
            true => format!("it is for ttftSource {source}"),
            false => "maxTTFTPenaltyMs is 0, so nothing is estimated".to_owned(),
        };
        let load = self.in_flight_load_producer_name.is_some() && inputs.load.is_none();
        let latency =
            self.latency_prediction_info_producer_name.is_some() && inputs.latency.is_none();
        let load = load.then(|| ("inFlightLoadProducerName", why("prefillThroughput")));
        let latency =
            latency.then(|| ("latencyPredictionInfoProducerName", why("latencyPredictor")));
        load.into_iter().chain(latency).map(|(name, why)| format!("{name}: {why}")).collect()
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
    use crate::stage::Latency;

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
    fn predictions_say_how_late_the_sticky_would_be() {
        let mut filter =
            PrefixAffinity { ttft_source: TtftSource::LatencyPredictor, ..Default::default() };
        let mut kept = |ttfts_s: [Option<f64>; 3]| {
            let mut fixture = Fixture::new(3);
            for (at, ttft_s) in ttfts_s.into_iter().enumerate() {
                fixture.prefix(at, if at < 2 { 9.0 } else { 0.0 }, 10, 16);
                fixture.inflight(at, 1, u64::MAX);
                if let Some(ttft_s) = ttft_s {
                    fixture.latency(at, Latency { ttft_s, ..Latency::default() });
                }
            }
            fixture.filter(&mut filter)
        };
        let (sticky, all) = ([true, true, false], [true, true, true]);
        assert_eq!(kept([Some(60.0), Some(18.5), Some(0.5)]), sticky);
        assert_eq!(kept([Some(60.0), Some(18.6), Some(0.5)]), all);
        assert_eq!(kept([None, None, None]), sticky);
        assert_eq!(kept([Some(60.0), None, None]), sticky);
        assert_eq!(kept([None, Some(1.0), Some(0.5)]), sticky);
        assert_eq!(kept([None, None, Some(0.5)]), all);
    }

    #[test]
    fn what_is_read_goes_by_the_source_and_the_limit() {
        let name = Some("p".to_owned());
        let all = PrefixAffinity {
            in_flight_load_producer_name: name.clone(),
            latency_prediction_info_producer_name: name,
            ..Default::default()
        };
        let source = |ttft_source| PrefixAffinity { ttft_source, ..all.clone() };
        let rate = source(TtftSource::PrefillThroughput);
        assert!(rate.inputs().load.is_some() && rate.inputs().latency.is_none());
        assert_eq!(rate.inert().len(), 1);
        let predicted = source(TtftSource::LatencyPredictor);
        assert!(predicted.inputs().load.is_none() && predicted.inputs().latency.is_some());
        assert!(predicted.inert()[0].starts_with("inFlightLoadProducerName"));
        let unlimited = PrefixAffinity { max_ttft_penalty_ms: 0.0, ..all };
        assert_eq!(
            unlimited.inputs(),
            Inputs { prefix: rate.inputs().prefix, ..Inputs::default() }
        );
        assert_eq!(unlimited.inert().len(), 2);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let bad = PrefixAffinity { affinity_threshold: 1.5, ..Default::default() };
        assert!(bad.check().is_err());
        let bad = PrefixAffinity { peak_prefill_throughput: 0.0, ..Default::default() };
        assert!(bad.check().is_err());
        let unlimited = PrefixAffinity { max_ttft_penalty_ms: 0.0, ..bad.clone() };
        assert!(unlimited.check().is_ok());
        let predicted = PrefixAffinity { ttft_source: TtftSource::LatencyPredictor, ..bad };
        assert!(predicted.check().is_ok());
        assert!(PrefixAffinity::default().check().is_ok());
    }
}
