//! A small scenario, and what a run of it shows.

use std::path::Path;

use kvroute_core::decision::{Candidate, DecisionRecord};
use kvroute_core::plan::{Experimental, Plan};
use kvroute_lab::record::{Ending, RequestRecord, RunRecord};
use kvroute_lab::scenario::{FaultKind, FaultSpec, Scenario, StageSpec};
use kvroute_lab::sim::{self, Arm, Policy, Watch};

/// Times in a record are 32 bits wide: this is more than their error.
pub const EPSILON_S: f64 = 1e-4;

const SMALL: &str = "
name: small
fleet:
  engines: 3
  profile: tiny
  kv_tokens: 8192
  block_size: 16
  scrape_interval_s: 0.05
  event_delay_s: 0.005
  stats_delay_s: 0.02
workload:
  kind: shared-prefix
  groups: 12
  users: 3
  prefix_tokens: 480
  question_tokens: 70
  output_tokens: 60
  order: random
load:
  arrivals: poisson
  stages:
    - { rate: 15, duration_s: 4 }
    - { rate: 30, duration_s: 4 }
client:
  overhead_before_s: 0.01
";

/// Three engines whose caches hold a third of all prompts.
pub fn small() -> Scenario {
    Scenario::parse(SMALL, "small.yaml").unwrap()
}

/// The same with one stage of this rate.
pub fn steady(rate: f64, duration_s: f64) -> Scenario {
    let mut scenario = small();
    scenario.load.stages = vec![StageSpec { rate: Some(rate), duration_s, warmup: false }];
    scenario
}

pub fn fault(kind: FaultKind, engine: u16, at_s: f64, for_s: f64) -> FaultSpec {
    let engine = Some(engine);
    FaultSpec { kind, engine, at_s, for_s, share: None, delay_s: None, factor: None }
}

pub fn plan(text: &str) -> Plan {
    Plan::build(&kvroute_wire::config::parse(text, "test.yaml").unwrap(), Experimental::Allowed)
        .unwrap()
}

pub fn preset(name: &str) -> Plan {
    plan(match name {
        "random" => include_str!("../../../../config/presets/random.yaml"),
        "load" => include_str!("../../../../config/presets/load.yaml"),
        "estimated" => include_str!("../../../../config/presets/estimated.yaml"),
        "precise" => include_str!("../../../../config/presets/precise.yaml"),
        "blend" => include_str!("../../../../config/presets/blend.yaml"),
        "kvroute" => include_str!("../../../../config/presets/kvroute.yaml"),
        "round-robin" => include_str!("../../../../config/presets/round-robin.yaml"),
        other => panic!("no preset {other}"),
    })
}

pub const PRESETS: [&str; 7] =
    ["random", "load", "estimated", "precise", "blend", "kvroute", "round-robin"];

pub fn arm(name: &str) -> Arm {
    let policy = match name {
        "oracle" => Policy::Oracle,
        preset_name => Policy::Plan(Box::new(preset(preset_name))),
    };
    Arm { name: name.to_owned(), policy }
}

/// A run and its decisions.
pub struct Run {
    pub record: RunRecord,
    pub decisions: Vec<DecisionRecord>,
}

pub fn run(scenario: &Scenario, name: &str, seed: u64) -> Run {
    run_arm(scenario, &arm(name), seed)
}

pub fn run_arm(scenario: &Scenario, arm: &Arm, seed: u64) -> Run {
    let mut decisions = Vec::new();
    let mut log = |decision: &DecisionRecord| decisions.push(decision.clone());
    let mut watch = Watch { progress: &mut |_| {}, decisions: Some(&mut log) };
    let record = sim::run(scenario, Path::new("."), arm, seed, &mut watch).unwrap();
    Run { record, decisions }
}

impl Run {
    /// The decision log as it would be written.
    pub fn log(&self) -> String {
        let lines = self.decisions.iter().map(|d| serde_json::to_string(d).unwrap());
        lines.collect::<Vec<_>>().join("\n")
    }

    pub fn count(&self, ending: Ending) -> usize {
        self.record.requests.iter().filter(|request| request.ending == ending).count()
    }

    /// Requests with their decisions. Nothing may have been refused or rejected: then they are as
    /// many, and in the same order.
    pub fn pairs(&self) -> impl Iterator<Item = (&RequestRecord, &DecisionRecord)> {
        assert_eq!(self.record.requests.len(), self.decisions.len());
        self.record.requests.iter().zip(&self.decisions)
    }

    /// Most requests on their way at once.
    pub fn in_flight_max(&self) -> usize {
        let accepted = || self.record.requests.iter().filter(|r| r.ending != Ending::Refused);
        let sent = accepted().map(|r| (r.sent_s, 1i64));
        let ended = accepted().map(|r| (end_s(r) - EPSILON_S, -1));
        let mut changes: Vec<(f64, i64)> = sent.chain(ended).collect();
        changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut now = 0;
        let most = changes.iter().map(|(_, change)| {
            now += change;
            now
        });
        most.max().unwrap_or(0) as usize
    }
}

pub fn end_s(request: &RequestRecord) -> f64 {
    request.sent_s + f64::from(request.total_s)
}

pub fn first_s(request: &RequestRecord) -> f64 {
    request.sent_s + f64::from(request.ttft_s)
}

/// What a decision knew about an engine.
pub fn of(decision: &DecisionRecord, engine: usize) -> &Candidate {
    let name = format!("engine-{engine:04}");
    decision.candidates.iter().find(|c| c.endpoint.as_str() == name).unwrap()
}

/// The engine that a decision chose.
pub fn chosen(decision: &DecisionRecord) -> u16 {
    decision.endpoint.as_str().strip_prefix("engine-").unwrap().parse().unwrap()
}
