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

/// What one request contributes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observation {
    /// When it was sent, seconds from the start of the run.
    pub sent_s: f64,
    /// When its answer was complete.
    pub end_s: f64,
    /// From sending to the first token; `None` when there was no complete answer.
    pub ttft_s: Option<f64>,
    /// Gaps between its tokens.
    pub gaps_s: Vec<f32>,
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the prompt, from the cache.
    pub cached_tokens: u64,
    /// Of the answer.
    pub output_tokens: u64,
}

/// One look at one engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Requests waiting.
    pub waiting: f64,
    /// KV blocks in use, 0 to 1.
    pub kv_usage: f64,
}

impl Summary {
    /// The figures of these requests and samples.
    pub fn of(observations: &[Observation], samples: &[Sample]) -> Summary {
        let answered: Vec<&Observation> =
            observations.iter().filter(|request| request.ttft_s.is_some()).collect();
        let first = observations.iter().map(|request| request.sent_s).fold(f64::INFINITY, f64::min);
        let last = answered.iter().map(|request| request.end_s).fold(f64::NEG_INFINITY, f64::max);
        let per_second = |count: u64| match last - first {
            span if span.is_finite() && span > 0.0 => count as f64 / span,
            _ => 0.0,
        };
        let sum = |of: fn(&Observation) -> u64| answered.iter().map(|request| of(request)).sum();
        let prompt_tokens: u64 = sum(|request| request.prompt_tokens);
        let cached_tokens: u64 = sum(|request| request.cached_tokens);
        let ttft = sorted(answered.iter().filter_map(|request| request.ttft_s));
        let gaps = sorted(answered.iter().flat_map(|r| &r.gaps_s).map(|&gap| f64::from(gap)));
        Summary {
            requests: observations.len() as u64,
            output_tokens_per_s: per_second(sum(|request| request.output_tokens)),
            requests_per_s: per_second(answered.len() as u64),
            ttft_s: FirstToken {
                mean: mean(&ttft),
                p50: percentile(&ttft, 50.0),
                p90: percentile(&ttft, 90.0),
                p99: percentile(&ttft, 99.0),
            },
            itl_s: TokenGap {
                mean: mean(&gaps),
                p50: percentile(&gaps, 50.0),
                p90: percentile(&gaps, 90.0),
            },
            wait_queue: queue(samples.iter().map(|sample| sample.waiting)),
            kv_usage: queue(samples.iter().map(|sample| sample.kv_usage)),
            hit_ratio: match prompt_tokens {
                0 => 0.0,
                _ => cached_tokens as f64 / prompt_tokens as f64,
            },
        }
    }
}

impl SummaryFile {
    /// A file without runs, for one seed.
    pub fn new(scenario: &str, seed: u64) -> SummaryFile {
        SummaryFile { scenario: scenario.to_owned(), seed, seeds: 1, runs: Vec::new() }
    }

    /// Takes over the runs of another file of the same scenario.
    pub fn merge(&mut self, other: SummaryFile) {
        self.runs.extend(other.runs);
    }
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

fn queue(samples: impl Iterator<Item = f64>) -> Queue {
    let sorted = sorted(samples);
    Queue {
        mean: mean(&sorted),
        p90: percentile(&sorted, 90.0),
        max: sorted.last().copied().unwrap_or(0.0),
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
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

    fn request(sent_s: f64, ttft_s: Option<f64>) -> Observation {
        Observation {
            sent_s,
            end_s: sent_s + 1.0,
            ttft_s,
            gaps_s: vec![0.1, 0.3],
            prompt_tokens: 100,
            cached_tokens: 75,
            output_tokens: 3,
        }
    }

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
    fn failed_requests_count_as_requests_only() {
        let requests = [request(0.0, Some(0.5)), request(1.0, Some(0.7)), request(1.5, None)];
        let samples =
            [Sample { waiting: 0.0, kv_usage: 0.5 }, Sample { waiting: 4.0, kv_usage: 1.0 }];
        let summary = Summary::of(&requests, &samples);
        assert_eq!(summary.requests, 3);
        assert_eq!(summary.requests_per_s, 1.0);
        assert_eq!(summary.output_tokens_per_s, 3.0);
        assert!((summary.ttft_s.mean - 0.6).abs() < 1e-12);
        assert_eq!(summary.hit_ratio, 0.75);
        assert_eq!((summary.wait_queue.mean, summary.wait_queue.max), (2.0, 4.0));
        assert_eq!(Summary::of(&[], &[]), Summary::default());
    }

    #[test]
    fn the_file_has_the_published_shape() {
        let mut file = SummaryFile::new("x", 7);
        let summary = Summary::default();
        let stages = vec![Stage { rate: 3.0, ..Stage::default() }];
        let run = Run { name: "a".into(), summary, stages, valid: true, ..Run::default() };
        file.merge(SummaryFile { runs: vec![run], ..file.clone() });
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
