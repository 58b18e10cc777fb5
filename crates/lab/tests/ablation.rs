//! Does every term of kvroute's policy do something, and is the whole not worse than llm-d's blend?
//!
//! A term that changes no decision where it can matter is a fault, not a matter of taste: it is
//! computed from something that is always zero. What terms are worth on whole scenarios prints
//! `scripts/ablation.sh`.

#![allow(clippy::unwrap_used, reason = "tests fail that way")]

use std::path::Path;
use std::thread;

use kvroute_core::decision::DecisionRecord;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_lab::model::Profile;
use kvroute_lab::record::RunRecord;
use kvroute_lab::report::Report;
use kvroute_lab::scenario::{ProfileSpec, Scenario, StageSpec};
use kvroute_lab::sim::{self, Arm, Policy, Watch};

const POLICY: &str = include_str!("../../../config/presets/kvroute.yaml");
const BLEND: &str = include_str!("../../../config/presets/blend.yaml");

/// Seeds of each configuration.
const SEEDS: u64 = 2;

/// By how much the throughput of equal policies differs over so few and so short runs.
const THROUGHPUT_NOISE: f64 = 0.05;

/// Four engines that are asked for more than their KV caches hold: all prompts together need 1.3
/// times as much as there is, and so do the requests in flight at the peak.
const OVERLOADED: &str = "
name: overloaded
fleet:
  engines: 4
  profile: qwen3-32b-tp2-h100
  kv_tokens: 20480
  block_size: 64
workload:
  kind: shared-prefix
  groups: 32
  users: 3
  prefix_tokens: 1900
  question_tokens: 500
  output_tokens: 250
  order: random
  zipf: 1.2
load:
  arrivals: poisson
  stages:
    - { rate: 8, duration_s: 8, warmup: true }
    - { rate: 16, duration_s: 15 }
";

fn plan(text: &str) -> Plan {
    Plan::build(&kvroute_wire::config::parse(text, "test.yaml").unwrap(), Experimental::Allowed)
        .unwrap()
}

/// The policy with one weight set; the others as they are, or 0.
fn with(weight: &str, value: f64, others_zero: bool) -> String {
    let line = |line: &str| match line.split_once(": ") {
        Some((field, _)) if field.trim() == weight => format!("{field}: {value}\n"),
        Some((field, _)) if field.ends_with("Weight") && others_zero => format!("{field}: 0\n"),
        _ => format!("{line}\n"),
    };
    POLICY.lines().map(line).collect()
}

/// The weights of the policy, as its file names them.
fn weights() -> Vec<&'static str> {
    let fields = POLICY.lines().filter_map(|line| line.trim().split_once(": "));
    fields.map(|(field, _)| field).filter(|field| field.ends_with("Weight")).collect()
}

/// Runs of one configuration, seed by seed, and their decisions as text.
struct Outcome {
    records: Vec<RunRecord>,
    endpoints: Vec<String>,
}

fn outcome(scenario: &Scenario, name: &str, plan: Plan) -> Outcome {
    let arm = Arm { name: name.to_owned(), policy: Policy::Plan(Box::new(plan)) };
    let mut outcome = Outcome { records: Vec::new(), endpoints: Vec::new() };
    for seed in 1..=SEEDS {
        let mut endpoints = String::new();
        let mut log = |decision: &DecisionRecord| {
            endpoints.push_str(decision.endpoint.as_str());
            endpoints.push('\n');
        };
        let mut watch = Watch { progress: &mut |_| {}, decisions: Some(&mut log) };
        let folder = Path::new(".");
        outcome.records.push(sim::run(scenario, folder, &arm, seed, &mut watch).unwrap());
        outcome.endpoints.push(endpoints);
    }
    outcome
}

#[test]
fn every_weight_of_the_policy_is_in_its_file() {
    let all = format!("{:?}", kvroute_core::score::Cost::default());
    assert_eq!(weights().len(), all.matches("_weight: ").count(), "{:?} of {all}", weights());
}

#[test]
fn every_term_changes_decisions_and_the_whole_is_not_behind_the_blend() {
    let scenario = Scenario::parse(OVERLOADED, "overloaded.yaml").unwrap();
    let mut arms = vec![("kvroute", POLICY.to_owned()), ("blend", BLEND.to_owned())];
    let silent = format!("{POLICY}kvroute:\n  speculative: false\n");
    arms.push(("without speculation", silent));
    arms.extend(weights().into_iter().map(|weight| (weight, with(weight, 0.0, false))));
    let outcomes: Vec<Outcome> = thread::scope(|scope| {
        let spawn = |(name, text): &(&'static str, String)| {
            let (name, plan, scenario) = (*name, plan(text), &scenario);
            scope.spawn(move || outcome(scenario, name, plan))
        };
        let running: Vec<_> = arms.iter().map(spawn).collect();
        running.into_iter().map(|arm| arm.join().unwrap()).collect()
    });
    let records: Vec<RunRecord> = outcomes.iter().flat_map(|o| o.records.clone()).collect();
    let report = Report::new(&scenario, &records);
    let runs = &report.summary().runs;
    println!("{:<22} tokens/s  TTFT mean   p90     hits", "");
    for run in runs {
        let pooled = &run.pooled.summary;
        let ttft = pooled.ttft_s;
        let (tokens, hits) = (pooled.output_tokens_per_s, pooled.hit_ratio);
        println!(
            "{:<22} {tokens:>8.0} {:>9.2} s {:>6.2} s {hits:.3}",
            run.name, ttft.mean, ttft.p90
        );
    }
    for ((name, _), other) in arms.iter().zip(&outcomes).skip(2) {
        let changed = outcomes[0].endpoints.iter().zip(&other.endpoints).filter(|(a, b)| a != b);
        assert!(changed.count() > 0, "{name} changes no decision");
    }
    let tokens = |run: usize| runs[run].pooled.summary.output_tokens_per_s;
    assert!(tokens(0) > (1.0 - THROUGHPUT_NOISE) * tokens(1), "{} {}", tokens(0), tokens(1));
}

/// Runs a fleet that is `factor` times as slow as the one of the scenario, which is about what a
/// router believes beforehand. The record, and what the last quarter of the decisions say about
/// every engine: prompt tokens that it would compute, and the cost.
fn costs_learned(factor: f64, policy: &str) -> (RunRecord, Vec<(f64, f64)>) {
    let mut scenario = Scenario::parse(OVERLOADED, "slow.yaml").unwrap();
    scenario.fleet.profile = ProfileSpec::Inline(scaled(factor));
    scenario.fleet.kv_tokens = 200_000;
    scenario.workload.output_tokens = Some(100);
    scenario.workload.groups = Some(100);
    scenario.workload.zipf = None;
    scenario.load.stages.truncate(1);
    scenario.load.stages[0] =
        StageSpec { rate: Some(6.0 / factor), duration_s: 40.0 * factor, warmup: false };
    let arm = Arm { name: "slow".to_owned(), policy: Policy::Plan(Box::new(plan(policy))) };
    let mut costs = Vec::new();
    let mut log = |decision: &DecisionRecord| {
        for (row, candidate) in decision.candidates.iter().enumerate() {
            assert_eq!(decision.scores.rows[row].endpoint, candidate.endpoint);
            let score = decision.scores.score(row, 0).unwrap().raw;
            costs.push((f64::from(candidate.load.uncached_tokens), 1.0 / score - 1.0));
        }
    };
    let mut watch = Watch { progress: &mut |_| {}, decisions: Some(&mut log) };
    let record = sim::run(&scenario, Path::new("."), &arm, 1, &mut watch).unwrap();
    let last = costs.len() - costs.len() / 4;
    (record, costs.split_off(last))
}

fn scaled(factor: f64) -> Profile {
    let fast = Profile::built_in("qwen3-32b-tp2-h100").unwrap();
    Profile {
        step_base_s: fast.step_base_s * factor,
        step_per_seq_s: fast.step_per_seq_s * factor,
        step_per_context_token_s: fast.step_per_context_token_s * factor,
        step_per_unique_token_s: fast.step_per_unique_token_s * factor,
        prefill_per_token_s: fast.prefill_per_token_s * factor,
        prefill_attention_s: fast.prefill_attention_s * factor,
        ..fast
    }
}

#[test]
fn hardware_is_learned_within_a_factor_of_two() {
    for factor in [0.2, 1.0, 5.0] {
        // With no other term a cost is the time of the uncached tokens alone.
        let (_, costs) = costs_learned(factor, &with("", 0.0, true));
        let (tokens, seconds) = costs.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
        let (learned, truth) = (seconds / tokens, scaled(factor).prefill_per_token_s);
        println!("{factor}: {learned:.3e} s per prompt token, truly {truth:.3e}");
        assert!((0.5..2.0).contains(&(learned / truth)), "{factor}: {learned} s, {truth} s");
        // A weight so large that nothing else counts: the time of an answer of 100 tokens.
        let weight = 1e6;
        let (record, costs) = costs_learned(factor, &with("decodeWeight", weight, true));
        let mean = costs.iter().map(|(_, cost)| cost).sum::<f64>() / costs.len() as f64;
        let (learned, truth) = (mean / weight / 100.0, record.stages[0].gaps_s.mean());
        println!("{factor}: {learned:.3e} s per output token, truly {truth:.3e}");
        assert!((0.5..2.0).contains(&(learned / truth)), "{factor}: {learned} s, {truth} s");
    }
}
