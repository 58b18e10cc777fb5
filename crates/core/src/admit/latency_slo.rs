//! `latency-slo-admitter`: refuse what nobody can answer in time.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::produce::Slo;
use crate::stage::{Admitter, Inputs, LATENCY_DEFAULT, Plugin, ProducerRef, Signals, View};

/// Share of the KV cache below which an endpoint has just started.
const COLD_KV_USAGE: f64 = 0.02;

/// Parameters of `latency-slo-admitter`. A request of a priority below 0 with a latency limit (see
/// `predicted-latency-producer`) is refused when predictions exist and none of them keeps the
/// limit, unless an endpoint runs nothing, uses less than 2 % of its KV cache, or does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LatencySlo {
    /// Producer of predicted latencies.
    pub latency_prediction_info_producer_name: Option<String>,
}

impl Plugin for LatencySlo {
    fn inputs(&self) -> Inputs<'_> {
        let latency = ProducerRef::of(&self.latency_prediction_info_producer_name, LATENCY_DEFAULT);
        Inputs { latency: Some(latency), ..Inputs::default() }
    }

    fn headers(&self) -> Vec<String> {
        Slo::headers()
    }
}

impl Admitter for LatencySlo {
    fn admit(&self, view: &View<'_>, _rng: &mut Rng) -> Result<(), String> {
        if view.request.priority >= 0 || !Slo::of(view.request.headers).is_some() {
            return Ok(());
        }
        let free = |signals: Signals| signals.running == 0 || signals.kv_usage < COLD_KV_USAGE;
        let mut predictions = view.rows.iter().filter_map(|row| row.latency).peekable();
        let admits = predictions.peek().is_none()
            || predictions.any(|latency| latency.is_in_time())
            || view.rows.iter().any(|row| row.signals.is_none_or(free));
        if admits {
            return Ok(());
        }
        let priority = view.request.priority;
        Err(format!(
            "no endpoint is expected to answer within the latency limit of this request; it has \
             priority {priority}, and is not tried. Send it later, or with a higher limit"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use crate::stage::Latency;

    /// Two endpoints that are late and busy, and a request that may be refused.
    fn late() -> Fixture {
        let mut fixture = Fixture::new(2);
        fixture.priority(-1);
        fixture.header("x-llm-d-slo-ttft-ms", "500");
        for at in 0..2 {
            fixture.signals(at, 3, 5, 0.5);
            fixture.latency(at, Latency { ttft_headroom_s: -1.0, ..Latency::default() });
        }
        fixture
    }

    #[test]
    fn all_but_the_hopeless_are_admitted() {
        type Change = fn(&mut Fixture);
        let table: [(&str, Change, bool); 13] = [
            ("late and busy", |_| {}, false),
            ("another header", |f| f.header("x-slo-tpot-ms", "5"), false),
            ("a high priority", |f| f.priority(0), true),
            ("no limit", |f| f.header("x-other", "500"), true),
            ("a limit that is none", |f| f.header("x-slo-ttft-ms", "soon"), true),
            ("one is in time", |f| f.latency(1, Latency::default()), true),
            (
                "late per token",
                |f| f.latency(1, Latency { tpot_headroom_s: -0.1, ..Latency::default() }),
                false,
            ),
            (
                "no number",
                |f| f.latency(1, Latency { tpot_headroom_s: f64::NAN, ..Latency::default() }),
                false,
            ),
            ("one is idle", |f| f.signals(1, 0, 0, 0.5), true),
            ("one is cold", |f| f.signals(1, 3, 5, 0.019), true),
            ("not quite cold", |f| f.signals(1, 3, 5, 0.02), false),
            ("empty", |f| *f = empty(), true),
            ("nothing predicted", |f| *f = unpredicted(), true),
        ];
        for (name, change, admitted) in table {
            let mut fixture = late();
            change(&mut fixture);
            let admitter = LatencySlo::default();
            assert_eq!(fixture.admit(&admitter, 1).is_ok(), admitted, "{name}");
            assert_eq!(fixture.reversed().admit(&admitter, 1).is_ok(), admitted, "{name}");
        }
    }

    fn empty() -> Fixture {
        let mut fixture = Fixture::new(0);
        fixture.priority(-1);
        fixture.header("x-slo-ttft-ms", "500");
        fixture
    }

    fn unpredicted() -> Fixture {
        let mut fixture = Fixture::new(1);
        fixture.priority(-1);
        fixture.header("x-slo-ttft-ms", "500");
        fixture.signals(0, 3, 5, 0.5);
        fixture
    }

    #[test]
    fn an_endpoint_that_says_nothing_may_be_free() {
        let mut fixture = empty();
        assert!(fixture.admit(&LatencySlo::default(), 1).is_ok());
        fixture = Fixture::new(1);
        fixture.priority(-1);
        fixture.header("x-slo-ttft-ms", "500");
        fixture.latency(0, Latency { ttft_headroom_s: -1.0, ..Latency::default() });
        assert!(fixture.admit(&LatencySlo::default(), 1).is_ok());
        fixture.signals(0, 0, 1, 0.5);
        assert!(fixture.admit(&LatencySlo::default(), 1).unwrap_err().contains("priority -1"));
    }
}
