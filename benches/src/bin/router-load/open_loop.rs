//! Requests at a fixed rate, whether or not answers come: latency, CPU, memory, errors.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use kvroute_lab::load::{self, Load, LoadConfig};
use kvroute_lab::record::{Ending, RequestRecord};
use kvroute_lab::scenario::Scenario;
use kvroute_lab::summary::percentile;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engines::{Engines, MODEL};
use crate::process::{self, Usage};
use crate::target::Target;
use crate::work::Work;
use crate::workload::SharedPrefix;

/// Requests later than this (99th percentile) were not sent at the rate that was asked for.
const LAG_P99_MAX_S: f64 = 0.010;

/// How long a router without requests is watched.
const IDLE: Duration = Duration::from_secs(3);

/// Which load.
pub struct OpenLoop {
    pub rate: f64,
    pub warmup: Duration,
    pub span: Duration,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// Memory of the router while measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Memory {
    /// Before the first request.
    pub idle_mb: f64,
    pub start_mb: f64,
    pub end_mb: f64,
    pub max_mb: f64,
    /// Of the line that fits the samples best.
    pub slope_mb_per_min: f64,
    /// Of the second half alone: what a cache that fills up does not have in the end.
    pub second_half_slope_mb_per_min: f64,
    /// Seconds from the start of the load, and MB.
    pub samples: Vec<(f64, f64)>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub requests: usize,
    /// Of all requests, those of the warm-up included: text and count.
    pub errors: BTreeMap<String, u64>,
    pub first_token: Latency,
    pub whole_answer: Latency,
    /// Cached prompt tokens over prompt tokens, as the engines report them.
    pub hit_ratio: f64,
    /// CPU seconds of the router for each 1,000 requests.
    pub cpu_s_per_1000: f64,
    /// CPU milliseconds each second without requests.
    pub idle_cpu_ms_per_s: f64,
    /// The same for the engines and this process, to see who is the bottleneck.
    pub engines_cpu_s_per_1000: f64,
    pub generator_cpu_s_per_1000: f64,
    /// Cores that everything else on the machine kept busy: noise.
    pub other_cores: f64,
    pub memory: Memory,
    /// How late requests left, 99th percentile.
    pub lag_p99_ms: f64,
    /// Were they on time?
    pub valid: bool,
}

/// One look at the processes.
#[derive(Clone, Copy, Debug)]
struct Look {
    at_s: f64,
    router: Usage,
    engines: Usage,
    generator: Usage,
    machine_cpu_s: f64,
}

impl Look {
    fn now(at_s: f64, target: &Target, engines: &Engines) -> Look {
        Look {
            at_s,
            router: target.usage(),
            engines: engines.usage(),
            generator: process::usage_of_this(),
            machine_cpu_s: process::machine_cpu_s(),
        }
    }

    /// CPU seconds of everything else on the machine.
    fn others_cpu_s(&self) -> f64 {
        self.machine_cpu_s - self.router.cpu_s - self.engines.cpu_s - self.generator.cpu_s
    }
}

impl OpenLoop {
    pub async fn run(
        &self,
        target: &Target,
        engines: &Engines,
        work: &Work,
    ) -> anyhow::Result<Measured> {
        let before = target.usage();
        tokio::time::sleep(IDLE).await;
        let idle_cpu_s = (target.usage() - before).cpu_s;
        let begin = Instant::now();
        let mut senders = self.send(target, work)?;
        let mut looks = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let (mut requests, mut errors) = (Vec::new(), BTreeMap::new());
        let (mut lag_p99_s, mut valid) = (0.0_f64, true);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    looks.push(Look::now(begin.elapsed().as_secs_f64(), target, engines));
                }
                ended = senders.join_next() => match ended {
                    None => break,
                    Some(measured) => {
                        let measured = measured?;
                        valid &= measured.valid;
                        lag_p99_s = lag_p99_s.max(measured.record.lag.unwrap_or_default().p99);
                        requests.extend(measured.record.requests);
                        for (kind, failure) in measured.failures {
                            let text = format!("{kind}: {}", failure.example);
                            *errors.entry(text).or_insert(0) += failure.count;
                        }
                    }
                }
            }
        }
        let idle_cpu_ms_per_s = idle_cpu_s * 1000.0 / IDLE.as_secs_f64();
        let lag_p99_ms = lag_p99_s * 1000.0;
        let measured = self.measured(&requests, &looks)?;
        let memory = Memory { idle_mb: before.rss_mb, ..measured.memory };
        Ok(Measured { errors, idle_cpu_ms_per_s, lag_p99_ms, valid, memory, ..measured })
    }

    /// Each sender has a share of the rate; Poisson processes add up to one.
    fn send(&self, target: &Target, work: &Work) -> anyhow::Result<JoinSet<load::Measured>> {
        let mut senders = JoinSet::new();
        let rate = self.rate / work.senders.len() as f64;
        let duration_s = (self.warmup + self.span).as_secs_f64();
        for (i, (workload, url)) in work.senders.iter().zip(&target.urls).enumerate() {
            let config = LoadConfig {
                lag_p99_max_s: LAG_P99_MAX_S,
                timeout: Duration::from_secs(30),
                seed: i as u64 + 1,
                ..LoadConfig::new("open loop", url, MODEL)
            };
            let scenario = scenario(&workload.spec, rate, duration_s)?;
            let load = Load::new(config, &scenario, Path::new("."), &work.tokenizer)?;
            senders.spawn(load.run(None, std::future::pending(), |_| {}));
        }
        Ok(senders)
    }

    fn measured(&self, requests: &[RequestRecord], looks: &[Look]) -> anyhow::Result<Measured> {
        let (from_s, to_s) = (self.warmup.as_secs_f64(), (self.warmup + self.span).as_secs_f64());
        let inside: Vec<&Look> = looks
            .iter()
            .filter(|look| look.at_s >= from_s - 0.5 && look.at_s <= to_s + 0.5)
            .collect();
        let first = inside.first().context("the load ended before it was measured")?;
        let last = inside.last().context("the load ended before it was measured")?;
        let sent_inside = |from_s: f64, to_s: f64| {
            let sent = requests.iter().map(|request| request.sent_s);
            sent.filter(|&at| at >= from_s && at < to_s).count()
        };
        let thousands = sent_inside(first.at_s, last.at_s) as f64 / 1000.0;
        anyhow::ensure!(thousands > 0.0, "no request was sent while measuring");
        let cpu = |of: fn(&Look) -> Usage| (of(last) - of(first)).cpu_s / thousands;
        let counted: Vec<&RequestRecord> = requests
            .iter()
            .filter(|request| request.sent_s >= from_s && request.ending == Ending::Answered)
            .collect();
        let total = |of: fn(&RequestRecord) -> u32| -> f64 {
            counted.iter().map(|request| f64::from(of(request))).sum()
        };
        Ok(Measured {
            requests: sent_inside(from_s, f64::INFINITY),
            errors: BTreeMap::new(),
            first_token: latency(counted.iter().map(|request| f64::from(request.ttft_s))),
            whole_answer: latency(counted.iter().map(|request| f64::from(request.total_s))),
            hit_ratio: total(|r| r.cached_tokens) / total(|r| r.prompt_tokens).max(1.0),
            cpu_s_per_1000: cpu(|look| look.router),
            engines_cpu_s_per_1000: cpu(|look| look.engines),
            generator_cpu_s_per_1000: cpu(|look| look.generator),
            other_cores: (last.others_cpu_s() - first.others_cpu_s()) / (last.at_s - first.at_s),
            memory: memory(&inside, looks),
            idle_cpu_ms_per_s: 0.0,
            lag_p99_ms: 0.0,
            valid: true,
        })
    }
}

/// A sender's share of the load.
fn scenario(spec: &SharedPrefix, rate: f64, duration_s: f64) -> anyhow::Result<Scenario> {
    let SharedPrefix { groups, users, prefix_tokens, question_tokens, output_tokens, .. } = spec;
    let text = format!(
        "
name: open loop
fleet: {{engines: 1, profile: tiny, kv_tokens: 1000000}}
workload: {{kind: shared-prefix, groups: {groups}, users: {users},
  prefix_tokens: {prefix_tokens}, question_tokens: {question_tokens},
  output_tokens: {output_tokens}}}
load: {{arrivals: constant, stages: [{{rate: {rate}, duration_s: {duration_s}}}]}}
client: {{in_flight_max: 4096}}
"
    );
    Ok(Scenario::parse(&text, "open loop")?)
}

fn latency(seconds: impl Iterator<Item = f64>) -> Latency {
    let mut ms: Vec<f64> = seconds.map(|s| s * 1000.0).collect();
    ms.sort_by(f64::total_cmp);
    Latency { p50_ms: percentile(&ms, 50.0), p99_ms: percentile(&ms, 99.0) }
}

fn memory(inside: &[&Look], all: &[Look]) -> Memory {
    let points: Vec<(f64, f64)> = inside.iter().map(|l| (l.at_s, l.router.rss_mb)).collect();
    let second_half = &points[points.len() / 2..];
    Memory {
        idle_mb: 0.0,
        start_mb: points.first().map_or(0.0, |point| point.1),
        end_mb: points.last().map_or(0.0, |point| point.1),
        max_mb: points.iter().map(|point| point.1).fold(0.0, f64::max),
        slope_mb_per_min: slope(&points) * 60.0,
        second_half_slope_mb_per_min: slope(second_half) * 60.0,
        samples: all.iter().map(|look| (look.at_s, look.router.rss_mb)).collect(),
    }
}

/// Least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len().max(1) as f64;
    let x_mean = points.iter().map(|point| point.0).sum::<f64>() / count;
    let y_mean = points.iter().map(|point| point.1).sum::<f64>() / count;
    let covariance: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let variance: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_slope_and_a_point_has_none() {
        let line: Vec<(f64, f64)> =
            (0..9).map(|x| (f64::from(x), 3.0 - 2.0 * f64::from(x))).collect();
        assert!((slope(&line) + 2.0).abs() < 1e-12);
        assert_eq!(slope(&line[..1]), 0.0);
        assert_eq!(slope(&[]), 0.0);
    }
}
