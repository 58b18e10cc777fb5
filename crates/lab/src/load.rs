//! Sends a workload to an OpenAI-compatible server and measures what a client feels.
//!
//! Open loop: requests leave at times fixed beforehand, whether or not answers come. The generator
//! measures its own lateness (from the planned time to the moment the request is handed to the
//! network) and marks a run invalid when it was late: then it measured itself.

mod client;

use std::sync::Arc;
use std::time::Duration;

use kvroute_core::Rng;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::summary::{Observation, Pooled, Run, Sample, Stage, Summary, percentile};
use crate::workload::Workload;
use client::Client;

/// How often the engines are sampled.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

/// When requests leave within a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrivals {
    /// Exponential gaps, scaled to fill the stage exactly.
    #[default]
    Poisson,
    /// Equal gaps.
    Constant,
}

/// A stretch of constant rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StagePlan {
    /// Requests per second.
    pub rate: f64,
    /// Seconds.
    pub duration_s: f64,
    /// Leave it out of the report.
    pub warmup: bool,
}

/// Which API requests use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadApi {
    /// `/v1/completions`.
    #[default]
    Completions,
    /// `/v1/chat/completions`, one user message.
    ChatCompletions,
}

/// What to send where.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Where, for example `http://127.0.0.1:8000`.
    pub url: String,
    /// Model to ask for.
    pub model: String,
    /// API.
    pub api: LoadApi,
    /// Stages, one after the other; each waits until the one before is answered.
    pub stages: Vec<StagePlan>,
    /// Arrivals within a stage.
    pub arrivals: Arrivals,
    /// Requests in flight at most; more fail at once, as at a gateway's limit.
    pub in_flight_max: usize,
    /// Without an answer after this, a request has failed.
    pub timeout: Duration,
    /// A run whose requests left later than this (99th percentile) is invalid.
    pub lag_max: Duration,
    /// Seed of the arrivals.
    pub seed: u64,
}

impl LoadConfig {
    /// One stage of completions with Poisson arrivals.
    pub fn new(url: &str, model: &str, rate: f64, duration_s: f64) -> LoadConfig {
        LoadConfig {
            url: url.to_owned(),
            model: model.to_owned(),
            api: LoadApi::Completions,
            stages: vec![StagePlan { rate, duration_s, warmup: false }],
            arrivals: Arrivals::Poisson,
            in_flight_max: 4096,
            timeout: Duration::from_secs(300),
            lag_max: Duration::from_millis(50),
            seed: 0,
        }
    }
}

/// A load that cannot be sent at all.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not a URL of a server.
    #[error("{url:?} is not a URL of the form http://HOST:PORT: {reason}")]
    Url {
        /// As given.
        url: String,
        /// Why.
        reason: String,
    },
    /// No stage would send anything.
    #[error("a stage needs a rate and a duration above 0, found {rate} for {duration_s} s")]
    Stage {
        /// Requests per second.
        rate: f64,
        /// Seconds.
        duration_s: f64,
    },
}

/// One request and what came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Position of its stage.
    pub stage: usize,
    /// Position in its stage.
    pub position: usize,
    /// What it contributes to the figures.
    pub observation: Observation,
    /// How late it left, seconds.
    pub lag_s: f64,
    /// `x-kvroute-endpoint` of the answer.
    pub endpoint: Option<String>,
    /// Why there is no complete answer.
    pub error: Option<String>,
}

/// How late requests left, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lag {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// What a load measured.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// The stages as planned.
    pub stages: Vec<StagePlan>,
    /// All requests, in the order in which they ended.
    pub outcomes: Vec<Outcome>,
    /// Looks at the engines, with the stage.
    pub samples: Vec<(usize, Sample)>,
    /// The generator's own lateness.
    pub lag: Lag,
    /// False when the generator was late: the figures mean nothing then.
    pub valid: bool,
}

/// Looks at every engine; called while requests are being sent.
pub type Probe = Arc<dyn Fn() -> Vec<Sample> + Send + Sync>;

/// How far a load has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests of all stages.
    pub planned: usize,
    /// Sent.
    pub sent: usize,
    /// Answered or failed.
    pub ended: usize,
    /// Of those, failed.
    pub failed: usize,
}

/// Sends the load and waits for all answers. `progress` is called after each request.
///
/// # Errors
/// [`LoadError`] when nothing can be sent; failures of requests are part of the report.
pub async fn run(
    config: &LoadConfig,
    workload: &Arc<Workload>,
    probe: Option<Probe>,
    mut progress: impl FnMut(Progress),
) -> Result<LoadReport, LoadError> {
    let client = Arc::new(Client::new(config)?);
    let mut plans = Vec::new();
    for (i, stage) in config.stages.iter().enumerate() {
        let usable = |value: f64| value.is_finite() && value > 0.0;
        if !usable(stage.rate) || !usable(stage.duration_s) {
            let StagePlan { rate, duration_s, .. } = *stage;
            return Err(LoadError::Stage { rate, duration_s });
        }
        plans.push(departures(stage, config.arrivals, config.seed ^ (i as u64) << 32));
    }
    let mut state = Progress { planned: plans.iter().map(Vec::len).sum(), ..Progress::default() };
    let origin = Instant::now();
    let (mut outcomes, mut samples) = (Vec::new(), Vec::new());
    for (stage, plan) in plans.iter().enumerate() {
        let sending = Sending { config, client: &client, workload, stage, origin };
        sending
            .run(plan, probe.as_ref(), &mut samples, &mut |sent, outcome| {
                state.sent += usize::from(sent);
                if let Some(outcome) = outcome {
                    state.ended += 1;
                    state.failed += usize::from(outcome.error.is_some());
                    outcomes.push(outcome);
                }
                progress(state);
            })
            .await;
    }
    let lag = lag(&outcomes);
    let valid = lag.p99 <= config.lag_max.as_secs_f64();
    Ok(LoadReport { stages: config.stages.clone(), outcomes, samples, lag, valid })
}

fn lag(outcomes: &[Outcome]) -> Lag {
    let mut lags: Vec<f64> = outcomes.iter().map(|outcome| outcome.lag_s).collect();
    lags.sort_by(f64::total_cmp);
    let max = lags.last().copied().unwrap_or(0.0);
    Lag { p50: percentile(&lags, 50.0), p99: percentile(&lags, 99.0), max }
}

/// Seconds from the start of a stage at which its requests leave.
fn departures(stage: &StagePlan, arrivals: Arrivals, seed: u64) -> Vec<f64> {
    let count = ((stage.rate * stage.duration_s) as usize).max(1);
    let mut rng = Rng::seeded(seed);
    let gaps: Vec<f64> = (0..count)
        .map(|_| match arrivals {
            Arrivals::Constant => 1.0,
            Arrivals::Poisson => -(1.0 - rng.next_f64()).ln(),
        })
        .collect();
    let total: f64 = gaps.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut at = 0.0;
    gaps.iter()
        .map(|gap| {
            let now = at;
            at += gap / total * stage.duration_s;
            now
        })
        .collect()
}

/// One stage on its way.
struct Sending<'a> {
    config: &'a LoadConfig,
    client: &'a Arc<Client>,
    workload: &'a Arc<Workload>,
    stage: usize,
    origin: Instant,
}

impl Sending<'_> {
    async fn run(
        &self,
        plan: &[f64],
        probe: Option<&Probe>,
        samples: &mut Vec<(usize, Sample)>,
        report: &mut impl FnMut(bool, Option<Outcome>),
    ) {
        let begin = Instant::now();
        let (results, mut ended) = mpsc::unbounded_channel();
        let slots = Arc::new(Semaphore::new(self.config.in_flight_max.min(Semaphore::MAX_PERMITS)));
        let mut tasks = JoinSet::new();
        let mut tick = tokio::time::interval(SAMPLE_INTERVAL);
        let mut next = 0;
        let mut open = plan.len();
        while open > 0 {
            let due = plan.get(next).map(|&at| begin + Duration::from_secs_f64(at));
            let departure = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = departure => {
                    let due = due.unwrap_or(begin);
                    tasks.spawn(self.request(next, due, slots.clone(), results.clone()));
                    next += 1;
                    report(true, None);
                }
                Some(outcome) = ended.recv() => {
                    open -= 1;
                    report(false, Some(outcome));
                }
                _ = tick.tick(), if due.is_some() => {
                    let looked = probe.map(|probe| probe()).unwrap_or_default();
                    samples.extend(looked.into_iter().map(|sample| (self.stage, sample)));
                }
            }
        }
    }

    fn request(
        &self,
        position: usize,
        due: Instant,
        slots: Arc<Semaphore>,
        results: mpsc::UnboundedSender<Outcome>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let client = self.client.clone();
        let workload = self.workload.clone();
        let (stage, origin) = (self.stage, self.origin);
        let timeout = self.config.timeout;
        async move {
            let outcome = Outcome { stage, position, ..Outcome::default() };
            let sent = Instant::now();
            let mut outcome = match slots.try_acquire() {
                Err(_) => Outcome { error: Some("too many in flight".into()), ..outcome },
                Ok(_slot) => {
                    let prompt = workload.prompt(position);
                    let answer = client.send(&prompt.text, workload.output_tokens, outcome);
                    match tokio::time::timeout(timeout, answer).await {
                        Ok(outcome) => outcome,
                        Err(_) => Outcome {
                            stage,
                            position,
                            error: Some(format!("no answer within {} s", timeout.as_secs())),
                            ..Outcome::default()
                        },
                    }
                }
            };
            outcome.lag_s = sent.duration_since(due).as_secs_f64();
            outcome.observation.sent_s = sent.duration_since(origin).as_secs_f64();
            outcome.observation.end_s = origin.elapsed().as_secs_f64();
            // The receiver waits for every request, so it is there.
            let _ = results.send(outcome);
        }
    }
}

impl LoadReport {
    /// The figures, named: overall and per stage, warm-up left out.
    pub fn run(&self, name: &str) -> Run {
        let counted = |stage: usize| !self.stages[stage].warmup;
        let observations = |keep: &dyn Fn(usize) -> bool| -> Vec<Observation> {
            let kept = self.outcomes.iter().filter(|outcome| keep(outcome.stage));
            kept.map(|outcome| outcome.observation.clone()).collect()
        };
        let samples = |keep: &dyn Fn(usize) -> bool| -> Vec<Sample> {
            self.samples.iter().filter(|(stage, _)| keep(*stage)).map(|(_, s)| *s).collect()
        };
        let stages = (0..self.stages.len()).filter(|&stage| counted(stage)).map(|stage| {
            let only = move |other: usize| other == stage;
            let summary = Summary::of(&observations(&only), &samples(&only));
            let failed_ratio = self.failed(&only) as f64 / summary.requests.max(1) as f64;
            Stage { rate: self.stages[stage].rate, summary, failed_ratio, tpot_s: summary.itl_s }
        });
        let summary = Summary::of(&observations(&counted), &samples(&counted));
        let failed = self.failed(&counted);
        let failed_ratio = failed as f64 / summary.requests.max(1) as f64;
        Run {
            name: name.to_owned(),
            summary,
            pooled: Pooled { summary, failed_ratio },
            stages: stages.collect(),
            valid: self.valid,
            failed,
            ..Run::default()
        }
    }

    /// Requests without a complete answer, of the stages to keep.
    fn failed(&self, keep: &dyn Fn(usize) -> bool) -> u64 {
        self.outcomes.iter().filter(|o| keep(o.stage) && o.error.is_some()).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn departures_fill_the_stage_and_repeat_with_the_seed() {
        let stage = StagePlan { rate: 20.0, duration_s: 5.0, warmup: false };
        for arrivals in [Arrivals::Poisson, Arrivals::Constant] {
            let at = departures(&stage, arrivals, 3);
            assert_eq!(at.len(), 100);
            assert!(at.is_sorted() && at[0] == 0.0 && at[99] < 5.0);
            assert_eq!(at, departures(&stage, arrivals, 3));
        }
        let constant = departures(&stage, Arrivals::Constant, 0);
        assert!((constant[1] - 0.05).abs() < 1e-9);
        let other = departures(&stage, Arrivals::Poisson, 4);
        assert_ne!(departures(&stage, Arrivals::Poisson, 3), other);
    }
}
