//! What is simulated or measured: a fleet, a workload, a load, a client, faults.
//!
//! A scenario is a YAML file, read strictly: an unknown field, a missing one, or one that its kind
//! does not know is an error with line and column. Times are seconds, sizes are tokens.

pub mod check;
pub mod schema;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use kvroute_core::plugin::nearest_first;
use kvroute_wire::yaml::{Tree, YamlError};
use serde::{Deserialize, Serialize};

use crate::model::Profile;

/// A whole scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Shown in reports.
    pub name: String,
    /// What it shows, in a sentence.
    #[serde(default)]
    pub description: String,
    /// The engines.
    pub fleet: FleetSpec,
    /// What is asked.
    pub workload: WorkloadSpec,
    /// When it is asked.
    pub load: LoadSpec,
    /// Who asks.
    #[serde(default)]
    pub client: ClientSpec,
    /// What goes wrong, and when.
    #[serde(default)]
    pub faults: Vec<FaultSpec>,
    /// Figures that somebody measured on real hardware, to be shown beside.
    #[serde(default)]
    pub published: Vec<Published>,
}

/// The engines: equal ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetSpec {
    /// How many.
    pub engines: u16,
    /// How long a step takes: the name of a built-in profile, or its constants.
    pub profile: ProfileSpec,
    /// KV cache of one engine, as vLLM prints it at start ("GPU KV cache size"). One block of it is
    /// the null block.
    pub kv_tokens: u64,
    /// Tokens per KV block.
    #[serde(default = "defaults::block_size")]
    pub block_size: u32,
    /// Most tokens computed in one step (`--max-num-batched-tokens`).
    #[serde(default = "defaults::max_batched_tokens")]
    pub max_batched_tokens: u32,
    /// Most sequences in one step (`--max-num-seqs`).
    #[serde(default = "defaults::max_seqs")]
    pub max_seqs: u32,
    /// Admit a prompt only when blocks for all of it are free (vLLM 0.32) instead of when its first
    /// chunk fits (earlier versions).
    #[serde(default)]
    pub reserve_full_prompt: bool,
    /// How often the router reads each engine's metrics.
    #[serde(default = "defaults::scrape_interval_s")]
    pub scrape_interval_s: f64,
    /// From the end of a step to the arrival of its KV events at the router.
    #[serde(default = "defaults::event_delay_s")]
    pub event_delay_s: f64,
    /// From the end of a step until its statistics can be read.
    #[serde(default = "defaults::stats_delay_s")]
    pub stats_delay_s: f64,
}

impl FleetSpec {
    /// KV blocks of one engine, the null block included.
    pub fn blocks(&self) -> u64 {
        self.kv_tokens / u64::from(self.block_size.max(1))
    }

    /// Longest request of an engine, prompt and answer together, in tokens.
    pub fn request_tokens_max(&self) -> u64 {
        self.blocks().saturating_sub(1) * u64::from(self.block_size)
    }
}

/// A step-time profile.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ProfileSpec {
    /// A built-in one.
    Named(String),
    /// Its constants.
    Inline(Profile),
}

/// Kinds of workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadKind {
    /// Groups that share a prefix, users within a group that each repeat a question.
    SharedPrefix,
    /// Sessions of several turns: each prompt is all that was said before, and something new.
    Agentic,
    /// From a file.
    Trace,
}

/// In which order prompts are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptOrder {
    /// One shuffled order, from its start in every stage.
    #[default]
    Cyclic,
    /// Each request draws its prompt.
    Random,
}

/// What is asked. Which fields are needed depends on `kind`; others are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadSpec {
    /// Which kind.
    pub kind: WorkloadKind,
    /// Shared prefixes (agentic: system prompts, shared by sessions).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<u32>,
    /// Users of each prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<u32>,
    /// Length of a shared prefix, as the engine counts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_tokens: Option<u32>,
    /// Length of a user's question (agentic: of what each turn adds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question_tokens: Option<u32>,
    /// Length of an answer (a trace has its own; this is for lines without one).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<u32>,
    /// Tokens that the client counts in an answer, over tokens generated. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counted_output_ratio: Option<f64>,
    /// Bytes of prompt text per token, for routers that hash text. Default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_token: Option<f64>,
    /// Shared prefix only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<PromptOrder>,
    /// Exponent of the popularity of groups, with `order: random`; without it all are equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zipf: Option<f64>,
    /// Agentic: turns of a session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turns: Option<u32>,
    /// Agentic: mean seconds from an answer to the next turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub think_s: Option<f64>,
    /// Whether requests state `max_tokens`. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens_sent: Option<bool>,
    /// Trace: path, relative to the scenario file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArrivalKind {
    /// Each second has a Poisson number of arrivals with exponential gaps, scaled to the second
    /// (inference-perf's `poisson`).
    #[default]
    Poisson,
    /// Exponential gaps, scaled to fill the stage exactly (inference-perf's `constant`).
    Constant,
    /// Equal gaps.
    Even,
    /// `in_flight_max` clients, each of which sends its next request when the last is answered.
    Closed,
    /// The times of the trace.
    Trace,
}

/// When requests are sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSpec {
    /// How.
    #[serde(default)]
    pub arrivals: ArrivalKind,
    /// One after the other. Not with the times of a trace.
    #[serde(default)]
    pub stages: Vec<StageSpec>,
    /// Start a stage only when every request of the one before has ended; the pause is that of
    /// inference-perf: the rest of the second in which it looks, and two seconds more. Default
    /// true.
    #[serde(default = "defaults::yes")]
    pub drain_between_stages: bool,
}

/// A stretch of constant rate: `floor(rate * duration_s)` requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageSpec {
    /// Requests per second. Not for closed loops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Seconds of sending.
    pub duration_s: f64,
    /// Leave it out of figures.
    #[serde(default)]
    pub warmup: bool,
}

/// Who asks, and what lies between.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientSpec {
    /// Requests in flight at most; more fail at once, before the router sees them.
    pub in_flight_max: u32,
    /// From sending to the arrival at the engine.
    pub overhead_before_s: f64,
    /// From the end of an engine's step to the client.
    pub overhead_after_s: f64,
    /// Measured times to the first token are rounded up to multiples of this; 0: not at all.
    pub quantum_s: f64,
}

impl Default for ClientSpec {
    fn default() -> ClientSpec {
        ClientSpec {
            in_flight_max: 100_000,
            overhead_before_s: 0.0,
            overhead_after_s: 0.0,
            quantum_s: 0.0,
        }
    }
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// The engine dies with its cache and its requests; `for_s` later it is back, empty.
    Crash,
    /// A `share` of its event batches is lost.
    EventLoss,
    /// Its events arrive `delay_s` later.
    EventDelay,
    /// A `share` of its event batches arrives twice.
    EventDuplication,
    /// Its metrics cannot be read.
    MetricsPartition,
    /// Its steps take `factor` times as long.
    SlowEngine,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultSpec {
    /// Which.
    pub kind: FaultKind,
    /// Position of the engine; without it all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<u16>,
    /// Start, seconds from the start of the run.
    pub at_s: f64,
    /// How long.
    pub for_s: f64,
    /// Of event batches, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay_s: Option<f64>,
    /// Above 1 is slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
}

/// Figures of one configuration that somebody else measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Shown beside the run of this name.
    pub name: String,
    /// Over all stages.
    #[serde(default)]
    pub summary: Figures,
    /// By rate.
    #[serde(default)]
    pub stages: Vec<PublishedStage>,
}

/// Figures of one stage that somebody else measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedStage {
    /// Requests per second.
    pub rate: f64,
    /// What was measured.
    #[serde(flatten)]
    pub figures: Figures,
}

/// What was measured, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Figures {
    /// Counted output tokens per second.
    pub output_tokens_per_s: Option<f64>,
    /// Requests per second.
    pub requests_per_s: Option<f64>,
    /// Time to first token.
    pub ttft_mean_s: Option<f64>,
    /// Time to first token.
    pub ttft_p90_s: Option<f64>,
    /// Between tokens, as published.
    pub itl_mean_s: Option<f64>,
    /// Between tokens, as published.
    pub itl_p90_s: Option<f64>,
    /// Requests waiting in an engine.
    pub wait_queue_mean: Option<f64>,
    /// Requests waiting in an engine.
    pub wait_queue_p90: Option<f64>,
    /// Requests waiting in an engine.
    pub wait_queue_max: Option<f64>,
    /// 0 to 1.
    pub kv_usage_mean: Option<f64>,
    /// 0 to 1.
    pub kv_usage_p90: Option<f64>,
    /// 0 to 1.
    pub kv_usage_max: Option<f64>,
}

mod defaults {
    pub fn block_size() -> u32 {
        16
    }
    pub fn max_batched_tokens() -> u32 {
        8192
    }
    pub fn max_seqs() -> u32 {
        1024
    }
    pub fn scrape_interval_s() -> f64 {
        0.05
    }
    pub fn event_delay_s() -> f64 {
        0.005
    }
    pub fn stats_delay_s() -> f64 {
        0.1
    }
    pub fn yes() -> bool {
        true
    }
}

impl Scenario {
    /// The scenarios that ship with the program: name and file content.
    pub const BUILT_IN: [(&'static str, &'static str); 7] = [
        ("b2b-saas", include_str!("../scenarios/b2b-saas.yaml")),
        ("b2b-saas-steady", include_str!("../scenarios/b2b-saas-steady.yaml")),
        ("overload-110", include_str!("../scenarios/overload-110.yaml")),
        ("overload-150", include_str!("../scenarios/overload-150.yaml")),
        ("zipf", include_str!("../scenarios/zipf.yaml")),
        ("agentic", include_str!("../scenarios/agentic.yaml")),
        ("faults", include_str!("../scenarios/faults.yaml")),
    ];

    /// The built-in scenario `name`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn built_in(name: &str) -> Result<Scenario, ScenarioError> {
        match Scenario::BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Ok(Scenario::parse(text, &format!("{name}.yaml"))?),
            None => Err(ScenarioError::unknown(name)),
        }
    }

    /// The built-in scenario of that name, else the file at that path; with the folder in which
    /// relative paths start.
    ///
    /// # Errors
    /// Neither exists, or the file is wrong.
    pub fn load(name_or_path: &str) -> Result<(Scenario, PathBuf), ScenarioError> {
        if Scenario::BUILT_IN.iter().any(|(known, _)| *known == name_or_path) {
            return Ok((Scenario::built_in(name_or_path)?, PathBuf::from(".")));
        }
        let path = Path::new(name_or_path);
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(ScenarioError::unknown(name_or_path));
            }
            Err(source) => {
                return Err(ScenarioError::Read { path: name_or_path.to_owned(), source });
            }
        };
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        Ok((Scenario::parse(&text, name_or_path)?, folder))
    }

    /// Reads and checks a scenario; `file` names it in errors.
    ///
    /// # Errors
    /// What is wrong and where.
    pub fn parse(text: &str, file: &str) -> Result<Scenario, YamlError> {
        let tree = Tree::parse(text, file, SCENARIO_BYTES_MAX)?;
        let scenario = tree.read()?;
        check::check(&scenario).map_err(|check::Fault { path, message }| {
            tree.error(&path, &format!("{path} {message}"))
        })?;
        Ok(scenario)
    }
}

/// A scenario that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Neither the name of a built-in scenario nor a file.
    #[error(
        "no scenario {name}: no file of that name, and none built in. Built in, nearest first: {}",
        nearest_first(name, Scenario::BUILT_IN.iter().map(|(name, _)| *name)).join(", ")
    )]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The file cannot be read.
    #[error("cannot read the scenario {path}: {source}")]
    Read {
        /// As given.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is wrong.
    #[error(transparent)]
    Yaml(#[from] YamlError),
}

impl ScenarioError {
    fn unknown(name: &str) -> ScenarioError {
        ScenarioError::Unknown { name: name.to_owned() }
    }
}

/// Largest scenario file, in bytes.
pub const SCENARIO_BYTES_MAX: usize = 16 << 20;

impl<'de> Deserialize<'de> for ProfileSpec {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<ProfileSpec, D::Error> {
        struct Either;
        impl<'de> serde::de::Visitor<'de> for Either {
            type Value = ProfileSpec;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a profile, or its constants")
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<ProfileSpec, E> {
                Ok(ProfileSpec::Named(name.to_owned()))
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                map: A,
            ) -> Result<ProfileSpec, A::Error> {
                let map = serde::de::value::MapAccessDeserializer::new(map);
                Profile::deserialize(map).map(ProfileSpec::Inline)
            }
        }
        from.deserialize_any(Either)
    }
}
