//! How did a run go? The shape of `summary.json`, and how records become figures.
//!
//! Every run has its figures twice. `summary` aggregates as published benchmarks of llm-d do, so
//! that it can be compared with them: means of stage figures, requests that were refused left out,
//! gaps between tokens halved by a load generator that stamps each token twice. `pooled` is what a
//! user of the service would have seen: all requests in one pool, failed ones counted, true
//! seconds per output token.

mod aggregate;

use serde::{Deserialize, Serialize, Serializer};

use crate::record::Lag;
use crate::scenario::Published;

/// A run over HTTP is invalid when the 99th percentile of its schedule lag is above this.
pub const LAG_P99_MAX_S: f64 = 0.05;

/// `summary.json`: one scenario, several runs side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryFile {
    /// Name of the scenario.
    pub scenario: String,
    /// Seed of workload and arrivals; the first of several.
    pub seed: u64,
    /// How many seeds each run has.
    pub seeds: u64,
    /// One per scheduler or configuration.
    pub runs: Vec<Run>,
}

/// One scheduler or configuration under the scenario. With several seeds `summary`, `pooled` and
/// `stages` are the plain means of their figures; of `max` the largest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Name of the configuration.
    pub name: String,
    /// Over all stages, aggregated as published.
    pub summary: Summary,
    /// Over all stages, all requests in one pool.
    pub pooled: Pooled,
    /// Stage by stage, warm-up left out.
    pub stages: Vec<Stage>,
    /// Seed by seed; empty where nobody repeated the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<SeedRun>,
    /// What somebody measured on real hardware.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "known_only")]
    pub published: Option<Published>,
    /// Whether the requests left on time; figures of a run that did not mean nothing.
    pub valid: bool,
    /// Requests without a complete answer, of all seeds, warm-up left out.
    pub failed: u64,
    /// How late requests left, the worst of all seeds; absent in virtual time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_s: Option<Lag>,
}

/// One run with one seed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SeedRun {
    /// The seed.
    pub seed: u64,
    /// As in [`Run`].
    pub summary: Summary,
    /// As in [`Run`].
    pub pooled: Pooled,
    /// As in [`Run`].
    pub stages: Vec<Stage>,
}

/// One stage of constant rate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Requests per second; 0 for closed loops and traces.
    pub rate: f64,
    /// Figures, of this stage alone, aggregated as published.
    #[serde(flatten)]
    pub summary: Summary,
    /// Requests without a complete answer over all, 0 to 1.
    pub failed_ratio: f64,
    /// True seconds from one output token to the next.
    pub tpot_s: TokenGap,
}

/// The figures of all requests in one pool. Percentiles are of answered requests; how many were not
/// answered stands beside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pooled {
    /// Output tokens of answers over the time in which a request was on its way, requests answered
    /// over the same time, true seconds from one output token to the next.
    #[serde(flatten)]
    pub summary: Summary,
    /// Requests without a complete answer over all, 0 to 1.
    pub failed_ratio: f64,
}

/// The figures of a run or a stage. Of answered requests, except `requests`, which counts all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests, those included that were refused or failed.
    pub requests: u64,
    /// Output tokens per second, as the client counts tokens.
    pub output_tokens_per_s: f64,
    /// Requests sent per second of sending; pooled: answered per second.
    pub requests_per_s: f64,
    /// From sending to the first token.
    pub ttft_s: FirstToken,
    /// Between tokens, each of which has two time stamps; pooled: the true gaps.
    pub itl_s: TokenGap,
    /// Requests waiting in an engine: every engine at every decision, as the router saw it.
    pub wait_queue: Queue,
    /// KV blocks in use, 0 to 1; sampled likewise.
    pub kv_usage: Queue,
    /// Cached prompt tokens over prompt tokens, as the engines report them.
    pub hit_ratio: f64,
}

/// Seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FirstToken {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// Seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenGap {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
}

/// Of samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    /// Mean.
    pub mean: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Largest.
    pub max: f64,
}

/// Figures that nobody measured are left out instead of written as null.
fn known_only<S: Serializer>(of: &Option<Published>, to: S) -> Result<S::Ok, S::Error> {
    fn strip(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(fields) => {
                fields.retain(|_, field| !field.is_null());
                fields.values_mut().for_each(strip);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(of).map_err(serde::ser::Error::custom)?;
    strip(&mut value);
    value.serialize(to)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn mean(values: &[f64]) -> f64 {
    // An empty sum is -0.
    values.iter().sum::<f64>() / values.len().max(1) as f64 + 0.0
}

/// The percentile of sorted values, between two of them in proportion, as numpy does; 0 when there
/// are none.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = last as f64 * percent.clamp(0.0, 100.0) / 100.0;
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        let values = [1.0, 2.0, 3.0, 4.0];
        let expected = [(0.0, 1.0), (50.0, 2.5), (90.0, 3.7), (100.0, 4.0)];
        for (percent, value) in expected {
            assert!((percentile(&values, percent) - value).abs() < 1e-12);
        }
        assert_eq!(percentile(&[], 50.0), 0.0);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
    }

    #[test]
    fn the_file_has_the_published_shape() {
        let summary = Summary::default();
        let stages = vec![Stage { rate: 3.0, ..Stage::default() }];
        let run = Run { name: "a".into(), summary, stages, valid: true, ..Run::default() };
        let file = SummaryFile { scenario: "x".into(), seed: 7, seeds: 1, runs: vec![run] };
        let json: serde_json::Value = serde_json::to_value(&file).unwrap();
        let stage = &json["runs"][0]["stages"][0];
        assert_eq!(stage["rate"], 3.0);
        for key in ["requests", "output_tokens_per_s", "requests_per_s", "hit_ratio"] {
            assert!(stage[key].is_number(), "{key}");
        }
        for (key, inner) in [
            ("ttft_s", &["mean", "p50", "p90", "p99"][..]),
            ("itl_s", &["mean", "p50", "p90"]),
            ("wait_queue", &["mean", "p90", "max"]),
            ("kv_usage", &["mean", "p90", "max"]),
        ] {
            let keys = json["runs"][0]["summary"][key].as_object().unwrap();
            assert_eq!(keys.len(), inner.len());
            assert!(inner.iter().all(|name| keys.contains_key(*name)), "{key}");
        }
        assert_eq!(serde_json::from_value::<SummaryFile>(json).unwrap(), file);
    }
}
