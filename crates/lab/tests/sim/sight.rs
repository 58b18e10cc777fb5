//! What the router sees of the engines, and how old it is.

use kvroute_core::stream::StreamState;
use kvroute_lab::record::{Ending, RequestRecord};
use kvroute_lab::scenario::{ArrivalKind, FaultKind, FaultSpec, Scenario};

use crate::kit::{EPSILON_S, Run, end_s, fault, first_s, of, run, steady};

/// One engine that is busy for some seconds, seen late and seldom.
fn seen_late(scrape_interval_s: f64, stats_delay_s: f64) -> Scenario {
    let mut scenario = steady(40.0, 5.0);
    scenario.fleet.engines = 1;
    scenario.fleet.kv_tokens = 262_144;
    scenario.fleet.scrape_interval_s = scrape_interval_s;
    scenario.fleet.stats_delay_s = stats_delay_s;
    scenario
}

/// Requests between their first token and their last at some time: as many as the engine was
/// computing, where no prompt is waiting. `None` so close to a change that rounding decides.
fn computed_at(requests: &[RequestRecord], at_s: f64) -> Option<u32> {
    let near = |time_s: f64| (time_s - at_s).abs() < EPSILON_S;
    let spans = || requests.iter().map(|r| (first_s(r), end_s(r)));
    match spans().any(|(first, end)| near(first) || near(end)) {
        true => None,
        false => Some(spans().filter(|(first, end)| (*first..*end).contains(&at_s)).count() as u32),
    }
}

#[test]
fn statistics_are_as_old_as_scrapes_and_delays_make_them() {
    for (scrape_interval_s, stats_delay_s) in [(0.05, 0.0), (0.05, 0.3), (0.7, 0.1)] {
        let what = format!("every {scrape_interval_s} s, after {stats_delay_s} s");
        let run = run(&seen_late(scrape_interval_s, stats_delay_s), "load", 3);
        assert_eq!(run.count(Ending::Answered), 200);
        let (mut compared, mut most) = (0, 0);
        for decision in &run.decisions {
            let load = of(decision, 0).load;
            let Some(age) = load.metrics_age_s else {
                assert!(decision.at_s <= scrape_interval_s, "{what}: never scraped");
                continue;
            };
            assert!(age < scrape_interval_s + 1e-6, "{what}: scraped {age} s ago");
            let as_of = decision.at_s - age - stats_delay_s;
            if let Some(expected) = computed_at(&run.record.requests, as_of) {
                assert_eq!(load.running, Some(expected), "{what}, at {}", decision.at_s);
                compared += 1;
                most = most.max(expected);
            }
        }
        assert!(compared > 100 && most > 3, "{what}: {compared} compared, at most {most}");
    }
}

/// One prompt, asked for again and again.
fn repeated() -> Scenario {
    let mut scenario = steady(4.0, 4.0);
    scenario.load.arrivals = ArrivalKind::Even;
    scenario.fleet.engines = 1;
    scenario.workload.groups = Some(1);
    scenario.workload.users = Some(1);
    scenario.workload.output_tokens = Some(2);
    scenario
}

fn assert_known_after(run: &Run, delay_s: f64) {
    let computed = first_s(&run.record.requests[0]);
    let (mut before, mut after) = (0, 0);
    for (request, decision) in run.pairs().skip(1) {
        let hit = of(decision, 0).hit;
        let known = decision.at_s > computed + delay_s;
        // 550 tokens are 34 blocks and a tail.
        assert_eq!(hit.resident, if known { 34 } else { 0 }, "{delay_s} s: {decision:?}");
        assert_eq!(request.cached_tokens, 544, "the engine has it at once");
        if known { after += 1 } else { before += 1 }
    }
    assert!(after > 4 && (before > 3 || delay_s < 0.1), "{before} {after}");
}

#[test]
fn a_prefix_is_resident_when_its_event_arrives_and_expected_before() {
    for delay_s in [0.005, 1.2] {
        let mut scenario = repeated();
        scenario.fleet.event_delay_s = delay_s;
        let plain = run(&scenario, "precise", 1);
        assert_known_after(&plain, delay_s);
        assert!(plain.decisions.iter().all(|d| of(d, 0).hit.expected == of(d, 0).hit.resident));
        let speculating = run(&scenario, "blend", 1);
        assert_known_after(&speculating, delay_s);
        // The first decision may come before the size of a block is known.
        let first = first_s(&speculating.record.requests[0]);
        let grace = |d: &&kvroute_core::decision::DecisionRecord| d.at_s < first + 0.25;
        let soon = speculating.decisions.iter().skip(2).filter(grace);
        assert!(soon.clone().all(|d| of(d, 0).hit.matched == 34), "{:?}", soon.collect::<Vec<_>>());
    }
}

#[test]
fn a_fault_delays_events_as_the_fleets_own_delay_does() {
    let mut scenario = repeated();
    let delay_s = Some(1.195);
    scenario.faults = vec![FaultSpec { delay_s, ..fault(FaultKind::EventDelay, 0, 0.0, 1.0) }];
    assert_known_after(&run(&scenario, "precise", 1), 1.2);
}

/// One client and an overhead longer than the delay of events: whenever the router decides, it has
/// heard of everything that happened.
pub fn quiescent() -> Scenario {
    let mut scenario = steady(1.0, 6.0);
    scenario.load.arrivals = ArrivalKind::Closed;
    scenario.load.stages[0].rate = None;
    scenario.client.in_flight_max = 1;
    scenario.client.overhead_before_s = 0.02;
    scenario.workload.output_tokens = Some(10);
    scenario.fleet.kv_tokens = 2048;
    scenario.workload.groups = Some(40);
    scenario
}

/// Whether the router knew what each engine that it chose would find in its cache.
pub fn agree(run: &Run) -> impl Iterator<Item = (f64, bool)> {
    run.pairs()
        .map(|(request, decision)| (decision.at_s, request.cached_tokens == decision.chosen_tokens))
}

#[test]
fn a_quiet_index_knows_exactly_what_the_engines_hold() {
    for seed in 0..4 {
        for name in ["precise", "blend", "kvroute"] {
            let run = run(&quiescent(), name, seed);
            assert!(run.decisions.len() > 80, "{}", run.decisions.len());
            let wrong: Vec<f64> =
                agree(&run).filter(|(at_s, agrees)| !agrees && *at_s > 0.1).map(|d| d.0).collect();
            assert!(wrong.is_empty(), "seed {seed}, {name}: {wrong:?}");
            let whole = run.pairs().filter(|(_, d)| d.chosen_tokens == 544).count();
            let none = run.pairs().skip(36).filter(|(_, d)| d.available_tokens == 0).count();
            assert!(whole > 0 && none > 0, "{name}: hits {whole}, evicted {none}");
            let live = |run: &Run| {
                let last = run.decisions.last().unwrap();
                last.candidates.iter().filter(|c| c.stream == StreamState::Live).count()
            };
            assert!(live(&run) > 0);
        }
    }
}
