//! Does the simulation do what its scenario says, and nothing else?
//!
//! Everything is checked from outside: in the record of a run, and in its decisions.

#![allow(clippy::unwrap_used, reason = "tests fail that way")]

mod faults;
mod kit;
mod load;
mod sight;

use kit::{PRESETS, run, small};
use kvroute_lab::record::{Ending, RunRecord};
use kvroute_lab::report::Report;
use kvroute_lab::scenario::{FaultKind, FaultSpec, Scenario};
use kvroute_lab::traffic::Traffic;

fn planned(scenario: &Scenario, seed: u64) -> u64 {
    let traffic = Traffic::new(scenario, std::path::Path::new("."), seed).unwrap();
    traffic.stages().iter().map(|stage| stage.arrivals).sum()
}

/// Every request has one line in the record, and has ended: the scenarios have an overhead, so one
/// that was sent and lost sight of would show by its duration of 0.
fn assert_all_ended(scenario: &Scenario, record: &RunRecord, what: &str) {
    assert_eq!(record.requests.len() as u64, planned(scenario, record.seed), "{what}");
    for (at, request) in record.requests.iter().enumerate() {
        let what = format!("{what}, request {at}: {request:?}");
        match request.ending {
            Ending::Answered => {
                assert!(request.ttft_s > 0.0 && request.ttft_s <= request.total_s, "{what}");
                assert_eq!(Some(request.output_tokens), scenario.workload.output_tokens, "{what}");
            }
            Ending::Refused => assert_eq!(request.total_s, 0.0, "{what}"),
            Ending::Rejected | Ending::Failed => assert!(request.total_s > 0.0, "{what}"),
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let scenario = small();
    for name in PRESETS.into_iter().chain(["oracle"]) {
        let (a, b, other) =
            (run(&scenario, name, 7), run(&scenario, name, 7), run(&scenario, name, 8));
        let json =
            |run: &kit::Run| Report::new(&scenario, std::slice::from_ref(&run.record)).json();
        assert!(!a.decisions.is_empty());
        assert_eq!(json(&a), json(&b), "{name}");
        assert_eq!(a.log(), b.log(), "{name}");
        assert_ne!(json(&a), json(&other), "{name}");
        assert_ne!(a.log(), other.log(), "{name}");
    }
}

#[test]
fn the_order_of_configurations_changes_none_of_them() {
    let scenario = small();
    let of = |names: &[&str]| {
        let runs = names.iter().flat_map(|name| [run(&scenario, name, 3), run(&scenario, name, 4)]);
        let records: Vec<RunRecord> = runs.map(|run| run.record).collect();
        Report::new(&scenario, &records).summary().clone()
    };
    let (ahead, back) =
        (of(&["random", "precise", "kvroute"]), of(&["kvroute", "precise", "random"]));
    assert_eq!(
        ahead.runs.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(),
        ["random", "precise", "kvroute"]
    );
    for run in &ahead.runs {
        assert_eq!(back.runs.iter().find(|other| other.name == run.name), Some(run));
        assert_eq!(run.seeds.len(), 2);
    }
}

#[test]
fn watching_decisions_changes_nothing() {
    let scenario = small();
    let watched = run(&scenario, "kvroute", 1).record;
    let mut watch = kvroute_lab::sim::Watch { progress: &mut |_| {}, decisions: None };
    let folder = std::path::Path::new(".");
    let arm = kit::arm("kvroute");
    assert_eq!(kvroute_lab::sim::run(&scenario, folder, &arm, 1, &mut watch).unwrap(), watched);
}

#[test]
fn every_request_ends_exactly_once_whatever_fails() {
    let kinds = [
        FaultKind::Crash,
        FaultKind::EventLoss,
        FaultKind::EventDelay,
        FaultKind::EventDuplication,
        FaultKind::MetricsPartition,
        FaultKind::SlowEngine,
    ];
    let (mut refused, mut failed) = (0, 0);
    for seed in 0..24 {
        let mut rng = kvroute_core::Rng::seeded(seed);
        let mut scenario = small();
        scenario.client.in_flight_max = 4 + rng.below(40) as u32;
        scenario.load.drain_between_stages = rng.below(2) == 0;
        scenario.faults = (0..rng.below(8))
            .map(|_| {
                let kind = kinds[rng.below(kinds.len())];
                let engine = [None, Some(rng.below(3) as u16)][rng.below(2)];
                let only = |of: FaultKind, value: f64| (kind == of).then_some(value);
                let share = 0.1 + 0.9 * rng.next_f64();
                FaultSpec {
                    kind,
                    engine,
                    at_s: 8.0 * rng.next_f64(),
                    for_s: 0.1 + 3.0 * rng.next_f64(),
                    share: only(FaultKind::EventLoss, share)
                        .or(only(FaultKind::EventDuplication, share)),
                    delay_s: only(FaultKind::EventDelay, 2.0 * share),
                    factor: only(FaultKind::SlowEngine, 10.0 * share),
                }
            })
            .collect();
        for name in ["random", "precise", "kvroute"] {
            let run = run(&scenario, name, seed);
            assert_all_ended(&scenario, &run.record, &format!("seed {seed}, {name}"));
            let accepted = run.record.requests.len() - run.count(Ending::Refused);
            assert_eq!(run.decisions.len() + run.count(Ending::Rejected), accepted, "seed {seed}");
            refused += run.count(Ending::Refused);
            failed += run.count(Ending::Failed);
        }
    }
    assert!(refused > 20 && failed > 20, "{refused} refused, {failed} failed");
}
