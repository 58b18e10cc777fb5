//! `predicted-latency-producer`: how fast will each endpoint answer, and is that in time?

use schemars::JsonSchema;
use serde::Deserialize;

use super::uncached_tokens;
use crate::decision::{Headers, Request};
use crate::fleet::Endpoint;
use crate::stage::{
    Inputs, LOAD_DEFAULT, Latency, PREFIX_DEFAULT, Plugin, PrefixMatch, ProducerRef, Row,
};

/// Header of the limit for the first token in milliseconds, and the name that it had before.
pub(crate) const TTFT_HEADERS: [&str; 2] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"];
/// The same for each further token.
const TPOT_HEADERS: [&str; 2] = ["x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"];
/// Value of the role label of endpoints that generate no tokens.
const PREFILL_ROLE: &str = "prefill";

/// Parameters of `predicted-latency-producer`. kvroute asks no prediction server: it predicts from
/// the speeds that it learns of each endpoint's answers, the work that it has given it, its queue
/// and its KV cache. Until first tokens have been seen that were not delayed by a queue, there is
/// no prediction, and the plugins that read one do without.
///
/// A client's limits are the request headers `x-llm-d-slo-ttft-ms` and `x-llm-d-slo-tpot-ms`, or
/// `x-slo-ttft-ms` and `x-slo-tpot-ms`. A request that sets one of them is judged by that one
/// alone; for one without limits every endpoint is too slow by the whole of its latency, so that
/// the fastest is preferred.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PredictedLatency {
    /// The limit of time per token counts this many times; above 0.
    pub slo_buffer_factor: f64,
    /// Nanoseconds after which a request is forgotten that never ended. Accepted: such a request
    /// ends after `kvroute.inflight_age_max_s`.
    #[serde(rename = "contextTTL")]
    pub context_ttl: Option<i64>,
    /// Whether time per token counts; else only time to first token does.
    pub streaming_mode: bool,
    /// The label whose value `prefill` marks endpoints that generate no tokens, so that time per
    /// token says nothing about them.
    pub endpoint_role_label: Option<String>,
    /// Whether anything is predicted.
    pub predict_in_produce: bool,
    /// Producer of prefix matches.
    pub prefix_match_info_producer_name: Option<String>,
    /// Producer of in-flight load.
    pub in_flight_load_producer_name: Option<String>,
    /// Accepted: images are not part of the estimate.
    pub use_encoder_cache_features: bool,
    /// Accepted, as `useEncoderCacheFeatures` is.
    pub encoder_cache_match_info_producer_name: Option<String>,
    /// Deprecated and without effect.
    pub sampling_mean: Option<f64>,
    /// Deprecated and without effect.
    pub max_decode_token_samples_for_prediction: Option<i64>,
}

impl Default for PredictedLatency {
    fn default() -> PredictedLatency {
        PredictedLatency {
            slo_buffer_factor: 1.0,
            context_ttl: None,
            streaming_mode: false,
            endpoint_role_label: None,
            predict_in_produce: true,
            prefix_match_info_producer_name: None,
            in_flight_load_producer_name: None,
            use_encoder_cache_features: false,
            encoder_cache_match_info_producer_name: None,
            sampling_mean: None,
            max_decode_token_samples_for_prediction: None,
        }
    }
}

/// How fast the client wants its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slo {
    /// Seconds to the first token.
    pub ttft_s: Option<f64>,
    /// Seconds per further token.
    pub tpot_s: Option<f64>,
}

impl Slo {
    /// What the headers say. A value that is no positive number sets no limit.
    pub fn of(headers: &Headers<'_>) -> Slo {
        let seconds = |names: [&str; 2]| {
            let text = names.into_iter().find_map(|name| headers.get(name))?;
            let ms: f64 = text.trim().parse().ok()?;
            (ms.is_finite() && ms > 0.0).then_some(ms / 1e3)
        };
        Slo { ttft_s: seconds(TTFT_HEADERS), tpot_s: seconds(TPOT_HEADERS) }
    }

    /// Whether there is any.
    pub fn is_some(&self) -> bool {
        self.ttft_s.is_some() || self.tpot_s.is_some()
    }

    /// The headers that are read.
    pub fn headers() -> Vec<String> {
        TTFT_HEADERS.into_iter().chain(TPOT_HEADERS).map(str::to_owned).collect()
    }
}

impl PredictedLatency {
    /// What is expected of the request on an endpoint that has `prefix` of it cached; `None`:
    /// nothing has been learned yet, or nothing shall be predicted.
    pub fn predict(
        &self,
        endpoint: &Endpoint,
        row: &Row,
        prefix: PrefixMatch,
        request: &Request<'_>,
    ) -> Option<Latency> {
        let costing = &row.costing;
        if !self.predict_in_produce || !costing.learned.first_token {
            return None;
        }
        let prompt = request.prompt_tokens;
        let uncached = if request.skips_cache { prompt } else { uncached_tokens(prompt, prefix) };
        let foreign_tokens = u64::from(foreign_waiting(row)) * u64::from(prompt);
        let estimate = costing.estimate(prompt, uncached, foreign_tokens);
        let ttft_s = estimate.wait_s + estimate.prefill_s;
        let slo = Slo::of(request.headers);
        // A pace that means nothing, or that nobody has seen, must not decide.
        let paced = self.streaming_mode && costing.learned.step && !self.is_prefill(endpoint);
        let tpot_limit = slo.tpot_s.filter(|_| paced).map(|s| s * self.slo_buffer_factor);
        let limited = slo.ttft_s.is_some() || tpot_limit.is_some();
        let headroom = |limit: Option<f64>, predicted: f64| match limit {
            Some(limit) => limit - predicted,
            None if limited => 0.0,
            None => -predicted,
        };
        Some(Latency {
            ttft_s,
            tpot_s: estimate.step_s,
            ttft_headroom_s: headroom(slo.ttft_s, ttft_s),
            tpot_headroom_s: if paced { headroom(tpot_limit, estimate.step_s) } else { 0.0 },
        })
    }

    fn is_prefill(&self, endpoint: &Endpoint) -> bool {
        let label = self.endpoint_role_label.as_deref().filter(|label| !label.is_empty());
        let role = label.and_then(|label| endpoint.labels.get(label));
        role.is_some_and(|role| role == PREFILL_ROLE)
    }
}

/// Requests in the engine's queue that are not this router's: of its own it knows the work.
fn foreign_waiting(row: &Row) -> u32 {
    row.signals.map_or(0, |signals| {
        let there = signals.waiting.saturating_add(signals.running);
        there.saturating_sub(row.inflight.requests).min(signals.waiting)
    })
}

impl Plugin for PredictedLatency {
    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            prefix: Some(ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT)),
            load: Some(ProducerRef::of(&self.in_flight_load_producer_name, LOAD_DEFAULT)),
            tokens: true,
            ..Inputs::default()
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.slo_buffer_factor.is_finite() && self.slo_buffer_factor > 0.0 {
            return Ok(());
        }
        Err(format!("sloBufferFactor {} must be positive", self.slo_buffer_factor))
    }

    fn headers(&self) -> Vec<String> {
        Slo::headers()
    }

    fn inert(&self) -> Vec<String> {
        let encoder = self.encoder_cache_match_info_producer_name.is_some();
        let given = [
            (
                self.context_ttl.is_some(),
                "contextTTL: requests that never end do so after kvroute.inflight_age_max_s",
            ),
            (
                self.use_encoder_cache_features || encoder,
                "useEncoderCacheFeatures and encoderCacheMatchInfoProducerName: images are not \
                 part of the estimate",
            ),
            (self.sampling_mean.is_some(), "samplingMean: deprecated"),
            (
                self.max_decode_token_samples_for_prediction.is_some(),
                "maxDecodeTokenSamplesForPrediction: deprecated",
            ),
            (
                !self.streaming_mode && self.slo_buffer_factor != 1.0,
                "sloBufferFactor: it is for time per token, which counts with streamingMode only",
            ),
        ];
        given.into_iter().filter(|(given, _)| *given).map(|(_, text)| text.to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::committed::Work;
    use crate::config::Buffered;
    use crate::cost::Costing;
    use crate::fleet::{EndpointSpec, Fleet};
    use crate::learn::{Learned, Speed};
    use crate::load::Load;
    use crate::stage::Signals;

    const BOTH: Learned = Learned { first_token: true, step: true };

    /// 0.1 s and 1 ms per token to the first, 20 ms per further token.
    fn row() -> Row {
        let speed = Speed {
            first_token_base_s: 0.1,
            prefill_per_token_s: 0.001,
            step_base_s: 0.02,
            step_per_token_s: 0.0,
            output_tokens: 100.0,
        };
        Row {
            id: crate::EndpointId { slot: 0, generation: 0 },
            at: 0,
            signals: None,
            inflight: Load::default(),
            uncached_tokens: 0,
            costing: Costing { speed, learned: BOTH, ..Costing::default() },
            latency: None,
        }
    }

    fn request<'a>(headers: &'a Headers<'a>) -> Request<'a> {
        Request { id: "", model: "m", prompt_tokens: 1_000, headers, ..Request::default() }
    }

    fn predict(producer: &PredictedLatency, row: &Row, sent: &[(&str, &str)]) -> Option<Latency> {
        let mut fleet = Fleet::default();
        let spec = EndpointSpec {
            name: "a".into(),
            address: "a:80".into(),
            labels: [("role".to_owned(), "prefill".to_owned())].into(),
            rank: 0,
            replay_available: false,
            events_expected: true,
        };
        let id = fleet.add(spec, 1).unwrap();
        let half = PrefixMatch { weighted: 50.0, blocks: 50, total: 100, block_size: 10 };
        let headers = Headers(sent);
        producer.predict(fleet.get(id).unwrap(), row, half, &request(&headers))
    }

    fn check(producer: &PredictedLatency, row: &Row, sent: &[(&str, &str)], expected: [f64; 4]) {
        let found = predict(producer, row, sent).unwrap();
        let is = [found.ttft_s, found.tpot_s, found.ttft_headroom_s, found.tpot_headroom_s];
        let same = is.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9);
        assert!(same, "{sent:?}: {is:?} is not {expected:?}");
    }

    #[test]
    fn limits_come_from_headers_and_the_canonical_name_wins() {
        type Case<'a> = (&'a [(&'a str, &'a str)], Option<f64>, Option<f64>);
        let table: [Case<'_>; 7] = [
            (&[], None, None),
            (&[("x-slo-ttft-ms", "200")], Some(0.2), None),
            (&[("x-slo-ttft-ms", "200"), ("x-llm-d-slo-ttft-ms", "1.5")], Some(0.0015), None),
            (&[("X-LLM-D-SLO-TPOT-MS", " 30 ")], None, Some(0.03)),
            (&[("x-llm-d-slo-tpot-ms", "fast"), ("x-slo-tpot-ms", "30")], None, None),
            (&[("x-slo-ttft-ms", "0"), ("x-slo-tpot-ms", "-5")], None, None),
            (&[("x-slo-ttft-ms", "NaN"), ("x-slo-tpot-ms", "inf")], None, None),
        ];
        for (sent, ttft_s, tpot_s) in table {
            assert_eq!(Slo::of(&Headers(sent)), Slo { ttft_s, tpot_s }, "{sent:?}");
        }
    }

    #[test]
    fn headrooms_are_limits_less_predictions() {
        let plain = PredictedLatency::default();
        let streaming = PredictedLatency { streaming_mode: true, ..plain.clone() };
        let buffered = PredictedLatency { slo_buffer_factor: 0.5, ..streaming.clone() };
        let label = Some("role".to_owned());
        let prefill = PredictedLatency { endpoint_role_label: label, ..streaming.clone() };
        let other = Some("other".to_owned());
        let unlabelled = PredictedLatency { endpoint_role_label: other, ..streaming.clone() };
        let ttft = ("x-llm-d-slo-ttft-ms", "1000");
        let tpot = ("x-llm-d-slo-tpot-ms", "50");
        let row = row();
        type Case<'a> = (&'a PredictedLatency, &'a [(&'a str, &'a str)], f64, f64);
        let table: [Case<'_>; 11] = [
            // Without a limit the fastest is the least late.
            (&plain, &[], -0.6, 0.0),
            (&streaming, &[], -0.6, -0.02),
            (&plain, &[ttft], 0.4, 0.0),
            (&plain, &[ttft, tpot], 0.4, 0.0),
            // A limit that is not looked at is none.
            (&plain, &[tpot], -0.6, 0.0),
            (&streaming, &[ttft, tpot], 0.4, 0.03),
            (&streaming, &[ttft], 0.4, 0.0),
            (&streaming, &[tpot], 0.0, 0.03),
            (&buffered, &[ttft, tpot], 0.4, 0.005),
            (&prefill, &[ttft, tpot], 0.4, 0.0),
            (&unlabelled, &[ttft, tpot], 0.4, 0.03),
        ];
        for (producer, sent, ttft_headroom, tpot_headroom) in table {
            check(producer, &row, sent, [0.6, 0.02, ttft_headroom, tpot_headroom]);
        }
    }

    #[test]
    fn work_and_queue_delay_the_first_token() {
        let producer = PredictedLatency::default();
        let mut busy = row();
        busy.costing.work = Work { prefill: 2_000, context: 0 };
        check(&producer, &busy, &[], [2.6, 0.02, -2.6, 0.0]);
        // Of the five that wait two are this router's at most: three prompts as long as this one.
        busy.signals = Some(Signals { waiting: 5, running: 4, kv_usage: 0.1 });
        busy.inflight.requests = 6;
        check(&producer, &busy, &[], [5.6, 0.02, -5.6, 0.0]);
        busy.inflight.requests = 9;
        check(&producer, &busy, &[], [2.6, 0.02, -2.6, 0.0]);
        busy.inflight.requests = 1;
        check(&producer, &busy, &[], [7.6, 0.02, -7.6, 0.0]);
    }

    #[test]
    fn what_nobody_has_seen_is_not_predicted() {
        let streaming = PredictedLatency { streaming_mode: true, ..Default::default() };
        let mut cold = row();
        cold.costing.learned = Learned { first_token: false, step: true };
        assert_eq!(predict(&streaming, &cold, &[]), None);
        cold.costing = Costing::default();
        assert_eq!(predict(&streaming, &cold, &[]), None);
        let off = PredictedLatency { predict_in_produce: false, ..Default::default() };
        assert_eq!(predict(&off, &row(), &[]), None);
        // First tokens are known, the pace is not: it does not decide.
        let mut paceless = row();
        paceless.costing.learned = Learned { first_token: true, step: false };
        let sent = [("x-slo-ttft-ms", "1000"), ("x-slo-tpot-ms", "1")];
        check(&streaming, &paceless, &sent, [0.6, 0.02, 0.4, 0.0]);
    }

    #[test]
    fn parameters_are_strict_and_say_what_has_no_effect() {
        let read = |key: &str, value: Buffered| {
            let map = Buffered::Map(vec![(key.to_owned(), value)]);
            PredictedLatency::deserialize(map.into_deserializer::<serde::de::value::Error>())
        };
        let ttl = read("contextTTL", Buffered::Unsigned(300_000_000_000)).unwrap();
        assert_eq!(ttl.context_ttl, Some(300_000_000_000));
        assert_eq!(ttl.inert().len(), 1);
        assert!(read("contextTTL", Buffered::Text("5m".into())).is_err());
        assert!(read("contextTtl", Buffered::Unsigned(1)).is_err());
        assert_eq!(read("samplingMean", Buffered::Float(0.5)).unwrap().inert().len(), 1);
        let samples = read("maxDecodeTokenSamplesForPrediction", Buffered::Unsigned(0)).unwrap();
        assert_eq!(samples.inert().len(), 1);
        let factor = read("sloBufferFactor", Buffered::Float(0.5)).unwrap();
        assert!(factor.inert()[0].contains("streamingMode"));
        assert!(PredictedLatency::default().inert().is_empty());
        for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let bad = PredictedLatency { slo_buffer_factor: factor, ..Default::default() };
            assert!(bad.check().unwrap_err().starts_with("sloBufferFactor"));
        }
        assert!(PredictedLatency::default().check().is_ok());
    }
}
