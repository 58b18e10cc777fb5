//! What goes wrong, and how it looks from the router.

use kvroute_core::decision::DecisionRecord;
use kvroute_core::stream::{StreamState, SuspectReason};
use kvroute_lab::record::Ending;
use kvroute_lab::scenario::{FaultKind, FaultSpec, ProfileSpec};

use crate::assert_all_ended;
use crate::kit::{EPSILON_S, Run, chosen, end_s, fault, first_s, of, run, small, steady};
use crate::sight::{agree, quiescent};

const ENGINE: usize = 1;

fn between(run: &Run, from_s: f64, to_s: f64) -> impl Iterator<Item = &DecisionRecord> {
    run.decisions.iter().filter(move |d| d.at_s >= from_s && d.at_s < to_s)
}

#[test]
fn a_crash_breaks_begun_answers_moves_the_rest_and_empties_the_cache() {
    let mut scenario = steady(150.0, 9.0);
    scenario.workload.output_tokens = Some(100);
    scenario.faults = vec![fault(FaultKind::Crash, ENGINE as u16, 3.0, 2.0)];
    let (mut broken, mut moved) = (0, 0);
    for seed in 0..3 {
        let run = run(&scenario, "blend", seed);
        assert_all_ended(&scenario, &run.record, &format!("seed {seed}"));
        for (request, decision) in run.pairs() {
            let there = request.endpoint == ENGINE as u16;
            if request.ending == Ending::Failed {
                assert!(there && request.ttft_s > 0.0 && first_s(request) <= 3.0 + EPSILON_S);
                assert!((end_s(request) - 3.0).abs() < EPSILON_S, "{request:?}");
                broken += 1;
            } else if chosen(decision) == ENGINE as u16 && !there {
                assert_eq!(request.ending, Ending::Answered);
                assert!(first_s(request) > 3.0 && decision.at_s < 5.0, "{request:?}");
                moved += usize::from(decision.at_s < 3.0);
            } else if there {
                assert!(end_s(request) <= 3.0 + EPSILON_S || decision.at_s >= 5.0, "{request:?}");
            }
        }
        let back = run.pairs().filter(|(r, d)| r.endpoint == ENGINE as u16 && d.at_s >= 5.0);
        let cached: Vec<u32> = back.map(|(r, _)| r.cached_tokens).collect();
        assert!(cached.len() > 20, "{}", cached.len());
        assert_eq!(cached[0], 0, "the cache survived");
        assert!(cached.iter().any(|tokens| *tokens > 0));
        let last = run.decisions.last().unwrap();
        assert_eq!(of(last, ENGINE).stream, StreamState::Live);
    }
    assert!(broken > 0 && moved > 0, "{broken} broken, {moved} moved");
}

#[test]
fn a_restarted_engine_is_not_heard_before_the_router_has_subscribed_again() {
    let mut scenario = steady(150.0, 9.0);
    scenario.faults = vec![fault(FaultKind::Crash, ENGINE as u16, 3.0, 2.0)];
    let run = run(&scenario, "random", 1);
    assert!(between(&run, 3.0, 5.0).count() > 100);
    let run = crate::kit::run(&scenario, "precise", 1);
    for decision in between(&run, 3.0 + EPSILON_S, 5.5) {
        let heard = match of(decision, ENGINE).stream {
            StreamState::Suspect(SuspectReason::Lost) => false,
            // The answers of the empty engine contradict what is still known of the full one.
            StreamState::Suspect(SuspectReason::Drift) => decision.at_s < 5.0,
            _ => true,
        };
        assert!(!heard, "{:?} at {}", of(decision, ENGINE).stream, decision.at_s);
    }
    assert!(between(&run, 5.0, 5.5).count() > 50);
    let served = run.record.requests.iter().filter(|r| r.endpoint == ENGINE as u16);
    assert!(served.filter(|r| (5.0..5.4).contains(&r.sent_s)).count() > 0, "nothing to hear");
    assert!(between(&run, 6.5, 9.0).all(|d| of(d, ENGINE).stream == StreamState::Live));
}

#[test]
fn while_every_engine_is_down_requests_fail_at_once() {
    let mut scenario = steady(30.0, 5.0);
    let all = FaultSpec { engine: None, ..fault(FaultKind::Crash, 0, 1.0, 2.0) };
    scenario.faults = vec![all];
    let run = run(&scenario, "precise", 1);
    assert_all_ended(&scenario, &run.record, "all down");
    for (request, decision) in run.pairs() {
        let down = (1.0..3.0).contains(&decision.at_s);
        assert_eq!(request.ending == Ending::Failed, down || broken_at(request, 1.0));
        assert!(!down || (f64::from(request.total_s) - 0.01).abs() < EPSILON_S, "{request:?}");
    }
    assert!(run.count(Ending::Failed) > 50 && run.count(Ending::Answered) > 60);
}

fn broken_at(request: &kvroute_lab::record::RequestRecord, at_s: f64) -> bool {
    request.ending == Ending::Failed && (end_s(request) - at_s).abs() < EPSILON_S
}

#[test]
fn faults_that_overlap_end_with_the_last() {
    let mut scenario = steady(30.0, 8.0);
    scenario.faults = vec![
        fault(FaultKind::Crash, ENGINE as u16, 1.0, 3.0),
        fault(FaultKind::Crash, ENGINE as u16, 2.0, 4.0),
        fault(FaultKind::MetricsPartition, 2, 1.0, 1.0),
        fault(FaultKind::MetricsPartition, 2, 1.5, 4.5),
    ];
    let run = run(&scenario, "precise", 1);
    assert_all_ended(&scenario, &run.record, "overlapping");
    let there = |r: &kvroute_lab::record::RequestRecord| r.endpoint == ENGINE as u16;
    let sent = run.record.requests.iter().filter(|r| there(r)).map(|r| r.sent_s);
    assert!(sent.clone().all(|at| !(1.0..5.9).contains(&at)), "{:?}", sent.collect::<Vec<_>>());
    assert!(sent.clone().any(|at| at > 6.0));
    assert!(between(&run, 4.0, 6.0).all(|d| of(d, 2).load.waiting.is_none()));
    assert!(between(&run, 6.1, 8.0).all(|d| of(d, 2).load.waiting.is_some()));
}

#[test]
fn lost_events_mislead_until_the_gap_shows_and_a_replay_heals() {
    let mut misled = 0;
    for seed in 0..6 {
        let mut scenario = quiescent();
        scenario.load.stages[0].duration_s = 10.0;
        let share = Some(1.0);
        scenario.faults = vec![FaultSpec { share, ..fault(FaultKind::EventLoss, 0, 2.0, 2.0) }];
        scenario.faults[0].engine = None;
        let run = run(&scenario, "precise", seed);
        for (at_s, agrees) in agree(&run) {
            let blind = (2.0..7.0).contains(&at_s) || at_s < 0.1;
            assert!(agrees || blind, "seed {seed}: wrong at {at_s}");
            misled += usize::from(!agrees && at_s > 2.0);
        }
        let last = run.decisions.last().unwrap();
        assert!(last.candidates.iter().all(|c| c.stream == StreamState::Live), "{last:?}");
    }
    assert!(misled > 0, "losing all events made no difference");
}

#[test]
fn events_that_come_twice_change_no_decision() {
    let mut scenario = small();
    let once = run(&scenario, "kvroute", 4);
    let twice = FaultSpec { share: Some(1.0), ..fault(FaultKind::EventDuplication, 0, 0.0, 60.0) };
    scenario.faults = vec![FaultSpec { engine: None, ..twice }];
    assert_eq!(once.log(), run(&scenario, "kvroute", 4).log());
}

#[test]
fn metrics_that_cannot_be_read_grow_old_and_then_count_as_missing() {
    let mut scenario = steady(40.0, 9.0);
    scenario.faults = vec![fault(FaultKind::MetricsPartition, ENGINE as u16, 2.0, 4.0)];
    let run = run(&scenario, "load", 1);
    let age = |d: &DecisionRecord, engine: usize| of(d, engine).load.metrics_age_s.unwrap();
    for decision in between(&run, 0.1, 9.0) {
        let load = of(decision, ENGINE).load;
        let blind_s = decision.at_s - 2.0;
        match decision.at_s {
            at if (2.1..6.0).contains(&at) => {
                assert!((age(decision, ENGINE) - blind_s).abs() < 0.06, "at {at}");
                // Two seconds are the router's own limit.
                let missing = age(decision, ENGINE) > 2.0;
                assert_eq!(load.waiting.is_none() && load.kv_usage.is_none(), missing, "at {at}");
            }
            at if !(2.0..6.1).contains(&at) => assert!(load.waiting.is_some(), "at {at}"),
            _ => {}
        }
        assert!(age(decision, 0) < 0.06 && of(decision, 0).load.waiting.is_some());
    }
}

#[test]
fn a_slow_engine_is_given_less() {
    // Prompts long enough to tell a slow engine from one that is waited for, and so many groups
    // that there is always one to be placed.
    let mut scenario = steady(4.0, 40.0);
    scenario.workload.groups = Some(60);
    scenario.fleet.profile = ProfileSpec::Named("qwen3-32b-tp2-h100".into());
    scenario.fleet.kv_tokens = 65_536;
    scenario.workload.prefix_tokens = Some(3_000);
    scenario.workload.question_tokens = Some(500);
    let share = |faults: Vec<FaultSpec>| {
        let scenario = kvroute_lab::scenario::Scenario { faults, ..scenario.clone() };
        let runs = (0..3).map(|seed| run(&scenario, "kvroute", seed).record.requests);
        let requests: Vec<_> = runs.flatten().collect();
        let there = requests.iter().filter(|r| r.endpoint == ENGINE as u16).count();
        there as f64 / requests.len() as f64
    };
    let healthy = share(Vec::new());
    let factor = Some(3.0);
    let slow = FaultSpec { factor, ..fault(FaultKind::SlowEngine, ENGINE as u16, 0.0, 60.0) };
    let slow = share(vec![slow]);
    assert!((0.25..0.42).contains(&healthy), "{healthy}");
    println!("{slow} of all requests, {healthy} when healthy");
    assert!(slow < 0.85 * healthy, "{slow} of all requests, {healthy} when healthy");
}

#[test]
fn a_slow_engine_takes_its_factor_longer() {
    let mut scenario = steady(5.0, 2.0);
    scenario.fleet.engines = 1;
    let alone = run(&scenario, "random", 1);
    let factor = Some(3.0);
    scenario.faults = vec![FaultSpec { factor, ..fault(FaultKind::SlowEngine, 0, 0.0, 60.0) }];
    let slow = run(&scenario, "random", 1);
    let gap = |run: &Run| run.record.stages[0].gaps_s.mean();
    let ratio = gap(&slow) / gap(&alone);
    assert!((2.8..4.0).contains(&ratio), "{ratio}");
}
