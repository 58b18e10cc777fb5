//! A shared-prefix workload as inference-perf describes it in its configuration.

use kvroute_wire::yaml;
use serde::Deserialize;

use super::TrafficError;
use crate::scenario::{ArrivalKind, PromptOrder, SCENARIO_BYTES_MAX, StageSpec};
use crate::scenario::{WorkloadKind, WorkloadSpec};

/// As far as it matters here; what inference-perf does with other sections is its own business.
#[derive(Deserialize)]
struct File {
    data: Data,
    load: Option<Load>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(rename = "type")]
    kind: DataKind,
    shared_prefix: Section,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum DataKind {
    SharedPrefix,
}

/// Strict: lengths with a distribution or several turns would be another workload.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    #[serde(alias = "num_unique_system_prompts")]
    num_groups: u32,
    #[serde(alias = "num_users_per_system_prompt")]
    num_prompts_per_group: u32,
    system_prompt_len: u32,
    question_len: u32,
    output_len: u32,
    #[serde(default, rename = "seed")]
    _seed: Option<i64>,
}

#[derive(Deserialize)]
struct Load {
    #[serde(rename = "type")]
    kind: LoadKind,
    stages: Vec<LoadStage>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LoadKind {
    Constant,
    Poisson,
}

#[derive(Deserialize)]
struct LoadStage {
    rate: f64,
    duration: f64,
}

/// What the configuration asks for.
#[derive(Debug)]
pub(super) struct Config {
    pub workload: WorkloadSpec,
    /// The `load` section, when there is one.
    pub load: Option<(ArrivalKind, Vec<StageSpec>)>,
}

/// Reads a configuration; `base` has what it does not say.
pub(super) fn read(text: &str, path: &str, base: &WorkloadSpec) -> Result<Config, TrafficError> {
    let file: File = yaml::read(text, path, SCENARIO_BYTES_MAX)?;
    let DataKind::SharedPrefix = file.data.kind;
    let section = file.data.shared_prefix;
    let workload = WorkloadSpec {
        kind: WorkloadKind::SharedPrefix,
        groups: Some(section.num_groups),
        users: Some(section.num_prompts_per_group),
        prefix_tokens: Some(section.system_prompt_len),
        question_tokens: Some(section.question_len),
        output_tokens: Some(section.output_len),
        order: Some(PromptOrder::Cyclic),
        ..base.clone()
    };
    let load = file.load.map(|load| {
        let kind = match load.kind {
            LoadKind::Constant => ArrivalKind::Constant,
            LoadKind::Poisson => ArrivalKind::Poisson,
        };
        let stage = |stage: &LoadStage| StageSpec {
            rate: Some(stage.rate),
            duration_s: stage.duration,
            warmup: false,
        };
        (kind, load.stages.iter().map(stage).collect())
    });
    Ok(Config { workload, load })
}
