//! Which requests does a scenario send, and when? The same for virtual time and for HTTP.
//!
//! Prompts are made of virtual token ids below [`TOKEN_IDS`]: equal ids mean equal text. A host
//! that sends text gives each id a word.
//!
//! Everything is a function of the scenario and the seed. Each prompt, each draw and the arrivals
//! of each stage have a random stream of their own, so that none depends on when another is asked
//! for.

mod agentic;
mod arrivals;
mod popularity;
mod shared;

use std::path::Path;
use std::sync::Arc;

use kvroute_core::Rng;

use crate::scenario::{ArrivalKind, Scenario, StageSpec, WorkloadKind};
use agentic::Agentic;
use shared::SharedPrefix;

/// Virtual token ids are below this.
pub const TOKEN_IDS: u32 = 32_000;

/// Longest prompt, in tokens.
pub const PROMPT_TOKENS_MAX: u64 = 10_000_000;

/// Most tokens of prompts that a workload keeps in memory (four bytes each).
pub const KEPT_TOKENS_MAX: u64 = 256 << 20;

/// Most requests that arrive by themselves in one stage.
pub const STAGE_REQUESTS_MAX: u64 = 50_000_000;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Equal for equal prompts within a run, for caches; never reused for another prompt.
    pub prompt_id: u64,
    /// The prompt.
    pub tokens: Arc<[u32]>,
    /// Length of the answer.
    pub output_tokens: u32,
    /// What the answer says, where a later prompt repeats it; else empty.
    pub output: Arc<[u32]>,
    /// What the request states.
    pub max_tokens: Option<u32>,
    /// Whose prefix: requests of one group share one.
    pub group: u32,
    /// Requests of one conversation; sent as a header that session affinity can read.
    pub session: Option<u64>,
}

/// A request and when it is due.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// Seconds from the start of its stage.
    pub at_s: f64,
    /// The request.
    pub call: Call,
}

/// One stage as planned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Requests per second; 0 for closed loops and traces.
    pub rate: f64,
    /// Seconds of sending.
    pub duration_s: f64,
    /// Left out of figures.
    pub warmup: bool,
    /// Clients of a closed loop; 0 for an open one.
    pub clients: u32,
    /// Requests that arrive by themselves, follow-ups not counted; a closed loop: its clients.
    pub arrivals: u64,
}

/// A scenario whose requests cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TrafficError {
    /// The file of a trace cannot be read.
    #[error("cannot read the trace {path}: {source}")]
    Read {
        /// As resolved.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A line of a trace makes no sense.
    #[error("{path}:{line}: {message}")]
    Line {
        /// File.
        path: String,
        /// From 1.
        line: u64,
        /// What is wrong and what is expected.
        message: String,
    },
    /// More than fits in memory, or nothing.
    #[error("{0}")]
    Size(String),
}

/// The requests of one run, made as they are asked for.
#[derive(Debug)]
pub struct Traffic {
    seed: u64,
    arrivals: ArrivalKind,
    stages: Vec<Stage>,
    progress: Vec<Progress>,
    source: Source,
    sessions_end_with_stage: bool,
    counted_output_ratio: f64,
    bytes_per_token: f64,
}

/// How far a stage is.
#[derive(Debug, Default)]
struct Progress {
    /// Made when the stage is first asked for.
    times: Option<Vec<f64>>,
    /// Of `times`, how many have been handed out.
    arrived: usize,
    /// Prompts asked for, or sessions started.
    asked: u64,
}

#[derive(Debug)]
enum Source {
    Shared(SharedPrefix),
    Agentic(Agentic),
}

impl Traffic {
    /// Prepares a run. `folder` is where relative paths of traces start. The seed decides prompts,
    /// order and arrivals, and nothing else does.
    ///
    /// # Errors
    /// See [`TrafficError`].
    pub fn new(scenario: &Scenario, folder: &Path, seed: u64) -> Result<Traffic, TrafficError> {
        let _ = folder;
        let spec = &scenario.workload;
        let source = match spec.kind {
            WorkloadKind::SharedPrefix => Source::Shared(SharedPrefix::new(spec, seed)?),
            WorkloadKind::Agentic => Source::Agentic(Agentic::new(spec, seed)?),
            kind => return Err(TrafficError::Size(format!("no traffic of the kind {kind:?}"))),
        };
        let stages = stages(scenario)?;
        Ok(Traffic {
            seed,
            arrivals: scenario.load.arrivals,
            progress: stages.iter().map(|_| Progress::default()).collect(),
            stages,
            source,
            sessions_end_with_stage: scenario.load.drain_between_stages,
            counted_output_ratio: spec.counted_output_ratio.unwrap_or(1.0),
            bytes_per_token: spec.bytes_per_token.unwrap_or(4.0),
        })
    }

    /// All stages, in order.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Tokens that the client counts in an answer, over tokens generated.
    pub fn counted_output_ratio(&self) -> f64 {
        self.counted_output_ratio
    }

    /// Bytes of prompt text per token, for routers that hash text.
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes_per_token
    }

    /// The next request of a stage that arrives by itself, in order of time; `None` when the stage
    /// has no more. Of a closed loop: the first request of each client.
    pub fn next(&mut self, stage: usize) -> Option<Arrival> {
        let plan = self.stages.get(stage)?;
        let progress = &mut self.progress[stage];
        let (kind, seed) = (self.arrivals, self.seed);
        let times = progress.times.get_or_insert_with(|| {
            arrivals::times(kind, plan, &mut stream(seed, Stream::Arrivals, stage as u64))
        });
        let at_s = *times.get(progress.arrived)?;
        progress.arrived += 1;
        if progress.arrived == times.len() {
            progress.times = Some(Vec::new());
        }
        let call = self.first_call(stage);
        Some(Arrival { at_s, call })
    }

    /// The request that follows when this one has ended, `at_s` seconds after the start of its
    /// stage: the next of a closed loop, the next turn of a session. `None`: nothing follows (the
    /// session is over, or the time of the stage is; sessions outlive it where stages do not wait
    /// for each other).
    pub fn follow_up(&mut self, stage: usize, ended: &Call, at_s: f64) -> Option<Arrival> {
        let plan = *self.stages.get(stage)?;
        if let Source::Agentic(agentic) = &self.source
            && let Some((think_s, call)) = agentic.next_turn(ended)
        {
            let at_s = at_s + think_s;
            let cut = self.sessions_end_with_stage && at_s >= plan.duration_s;
            return (!cut).then_some(Arrival { at_s, call });
        }
        if at_s >= plan.duration_s || plan.clients == 0 {
            return None;
        }
        let call = self.first_call(stage);
        Some(Arrival { at_s, call })
    }

    /// The next prompt of a stage that continues nothing.
    fn first_call(&mut self, stage: usize) -> Call {
        let position = self.progress[stage].asked;
        self.progress[stage].asked += 1;
        match &mut self.source {
            Source::Shared(shared) => shared.call(stage as u64, position),
            Source::Agentic(agentic) => agentic.begin(stage as u64, position),
        }
    }
}

/// Plans the stages that a scenario lists.
fn stages(scenario: &Scenario) -> Result<Vec<Stage>, TrafficError> {
    let load = &scenario.load;
    if load.stages.is_empty() {
        return Err(TrafficError::Size("the load has no stages; add some to load.stages".into()));
    }
    let clients = match load.arrivals {
        ArrivalKind::Closed => scenario.client.in_flight_max,
        _ => 0,
    };
    load.stages.iter().map(|spec| stage(spec, clients)).collect()
}

fn stage(spec: &StageSpec, clients: u32) -> Result<Stage, TrafficError> {
    let (rate, duration_s) = (spec.rate.unwrap_or(0.0), spec.duration_s);
    let arrivals = match clients {
        0 => (rate * duration_s).floor(),
        clients => f64::from(clients),
    };
    if !(1.0..=STAGE_REQUESTS_MAX as f64).contains(&arrivals) {
        return Err(TrafficError::Size(format!(
            "a stage of {rate} requests/s for {duration_s} s has {arrivals} requests; from 1 to \
             {STAGE_REQUESTS_MAX} are possible"
        )));
    }
    let rate = if clients == 0 { rate } else { 0.0 };
    Ok(Stage { rate, duration_s, warmup: spec.warmup, clients, arrivals: arrivals as u64 })
}

/// What a random stream is for: streams of one seed must not repeat each other.
#[derive(Clone, Copy, Debug)]
enum Stream {
    Arrivals = 1,
    Order,
    Draw,
    Prefix,
    Question,
    Think,
}

/// A random stream of its own for each purpose and index.
fn stream(seed: u64, purpose: Stream, index: u64) -> Rng {
    // Two rounds, so that neighbouring seeds and indices have nothing in common.
    let mut outer = Rng::seeded(seed ^ (purpose as u64).rotate_right(8));
    Rng::seeded(outer.next_u64() ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Appends random virtual tokens.
fn push_tokens(tokens: &mut Vec<u32>, count: usize, rng: &mut Rng) {
    let id = |bits: u64| ((bits * u64::from(TOKEN_IDS)) >> 32) as u32;
    tokens.reserve_exact(count);
    for at in (0..count).step_by(2) {
        let bits = rng.next_u64();
        tokens.push(id(bits >> 32));
        if at + 1 < count {
            tokens.push(id(bits & u64::from(u32::MAX)));
        }
    }
}

/// A field that the kind of workload needs.
fn needed<T>(value: Option<T>, field: &str) -> Result<T, TrafficError> {
    value.ok_or_else(|| TrafficError::Size(format!("the workload lacks `{field}`")))
}

#[cfg(test)]
mod tests;
