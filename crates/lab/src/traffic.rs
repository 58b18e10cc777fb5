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
mod inference_perf;
mod popularity;
mod shared;
pub mod trace;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use kvroute_core::Rng;
use kvroute_wire::yaml::YamlError;

use crate::scenario::{ArrivalKind, SCENARIO_BYTES_MAX, Scenario, StageSpec, WorkloadKind};
use agentic::Agentic;
use shared::SharedPrefix;
use trace::Trace;

/// Virtual token ids are below this.
pub const TOKEN_IDS: u32 = 32_000;

/// Longest prompt, in tokens.
pub const PROMPT_TOKENS_MAX: u64 = 10_000_000;

/// Most tokens of prompts that a workload keeps in memory (four bytes each).
pub const KEPT_TOKENS_MAX: u64 = 256 << 20;

/// Most prompts, and most shared prefixes, that a workload keeps in memory.
pub const KEPT_PROMPTS_MAX: u64 = 10_000_000;

/// Bytes of prompt text per token, where a scenario does not say.
const BYTES_PER_TOKEN: f64 = 4.0;

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
    /// A configuration of inference-perf makes no sense.
    #[error(transparent)]
    Config(#[from] YamlError),
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
    Trace(Trace),
}

impl Traffic {
    /// Prepares a run. `folder` is where relative paths of traces start. The seed decides prompts,
    /// order and arrivals, and nothing else does.
    ///
    /// # Errors
    /// See [`TrafficError`].
    pub fn new(scenario: &Scenario, folder: &Path, seed: u64) -> Result<Traffic, TrafficError> {
        let spec = &scenario.workload;
        let (mut arrivals, mut listed) = (scenario.load.arrivals, scenario.load.stages.clone());
        let source = match spec.kind {
            WorkloadKind::SharedPrefix => Source::Shared(SharedPrefix::new(spec, seed)?),
            WorkloadKind::Agentic => Source::Agentic(Agentic::new(spec, seed)?),
            WorkloadKind::Trace => match open(scenario, folder, seed)? {
                Opened::Trace(trace) => Source::Trace(trace),
                Opened::Config(shared, load) => {
                    if arrivals == ArrivalKind::Trace {
                        (arrivals, listed) = load;
                    }
                    Source::Shared(shared)
                }
            },
        };
        let stages = match &source {
            Source::Trace(trace) if arrivals == ArrivalKind::Trace => vec![trace_stage(trace)],
            _ => stages(&listed, arrivals, scenario.client.in_flight_max)?,
        };
        Ok(Traffic {
            seed,
            arrivals,
            progress: stages.iter().map(|_| Progress::default()).collect(),
            stages,
            source,
            sessions_end_with_stage: scenario.load.drain_between_stages,
            counted_output_ratio: spec.counted_output_ratio.unwrap_or(1.0),
            bytes_per_token: spec.bytes_per_token.unwrap_or(BYTES_PER_TOKEN),
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
        let (kind, seed, source) = (self.arrivals, self.seed, &self.source);
        let times = progress.times.get_or_insert_with(|| match source {
            Source::Trace(trace) if kind == ArrivalKind::Trace => trace.times(),
            _ => arrivals::times(kind, plan, &mut stream(seed, Stream::Arrivals, stage as u64)),
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
            Source::Trace(trace) => trace.call(),
        }
    }
}

/// What the file of a workload holds.
enum Opened {
    Trace(Trace),
    /// With the load that the file describes; no stages when it does not.
    Config(SharedPrefix, (ArrivalKind, Vec<StageSpec>)),
}

/// Reads the file of a workload; its content says of which kind it is.
fn open(scenario: &Scenario, folder: &Path, seed: u64) -> Result<Opened, TrafficError> {
    let spec = &scenario.workload;
    let file = folder.join(needed(spec.file.as_deref(), "file")?);
    let path = file.display().to_string();
    let unreadable = |source| TrafficError::Read { path: path.clone(), source };
    let mut reader = BufReader::new(File::open(&file).map_err(unreadable)?);
    let mut number = 0;
    let Some(first) = trace::next_line(&mut reader, &mut number, &path)? else {
        return Err(TrafficError::Size(format!("the trace {path} is empty")));
    };
    let request_tokens_max = scenario.fleet.request_tokens_max();
    if trace::is_json_lines(&first) {
        let options = trace::Options {
            seed,
            output_tokens: spec.output_tokens,
            max_tokens_sent: spec.max_tokens_sent.unwrap_or(true),
            bytes_per_token: spec.bytes_per_token.unwrap_or(BYTES_PER_TOKEN),
            request_tokens_max,
            timed: scenario.load.arrivals == ArrivalKind::Trace,
        };
        return Ok(Opened::Trace(Trace::read(options, &path, first, number, &mut reader)?));
    }
    // Read from its start again, so that errors have the right lines.
    let mut text = String::new();
    let bounded = File::open(&file).map_err(unreadable)?.take(SCENARIO_BYTES_MAX as u64 + 1);
    BufReader::new(bounded).read_to_string(&mut text).map_err(unreadable)?;
    let config = inference_perf::read(&text, &path, spec)?;
    let shared = SharedPrefix::new(&config.workload, seed)?;
    let length = shared.request_tokens();
    if length > request_tokens_max {
        return Err(TrafficError::Size(format!(
            "{path}: a prompt and its answer have {length} tokens, an engine has room for \
             {request_tokens_max} (fleet.kv_tokens)"
        )));
    }
    Ok(Opened::Config(shared, config.load.unwrap_or((ArrivalKind::Poisson, Vec::new()))))
}

/// The only stage of a trace that brings its times.
fn trace_stage(trace: &Trace) -> Stage {
    let times = trace.times();
    Stage {
        rate: 0.0,
        duration_s: times.last().copied().unwrap_or_default(),
        warmup: false,
        clients: 0,
        arrivals: times.len() as u64,
    }
}

/// Plans the stages that a load lists.
fn stages(
    listed: &[StageSpec],
    arrivals: ArrivalKind,
    in_flight_max: u32,
) -> Result<Vec<Stage>, TrafficError> {
    if listed.is_empty() {
        let message = "the load has no stages: list some in load.stages, or, with `arrivals: \
                       trace`, in the file";
        return Err(TrafficError::Size(message.into()));
    }
    let clients = match arrivals {
        ArrivalKind::Closed => in_flight_max,
        _ => 0,
    };
    listed.iter().map(|spec| stage(spec, clients)).collect()
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
    Block,
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
