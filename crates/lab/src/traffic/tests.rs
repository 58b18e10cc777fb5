//! Do the requests follow from the seed, and are they as many and as distributed as asked for?

use super::*;

pub(super) fn b2b() -> Scenario {
    Scenario::built_in("b2b-saas").unwrap()
}

/// A small workload with stages of `rate` and `duration_s`.
fn scenario(edit: impl Fn(&mut Scenario)) -> Scenario {
    let mut scenario = b2b();
    scenario.workload.prefix_tokens = Some(9);
    scenario.workload.question_tokens = Some(4);
    edit(&mut scenario);
    scenario
}

fn traffic(scenario: &Scenario, seed: u64) -> Traffic {
    Traffic::new(scenario, Path::new("."), seed).unwrap()
}

fn stage_of(traffic: &mut Traffic, stage: usize) -> Vec<Arrival> {
    std::iter::from_fn(|| traffic.next(stage)).collect()
}

#[test]
fn the_published_workload_has_the_published_counts_and_lengths() {
    let mut traffic = traffic(&b2b(), 1);
    let counts: Vec<u64> = traffic.stages().iter().map(|stage| stage.arrivals).collect();
    assert_eq!(&counts[..5], [750, 60, 200, 300, 760]);
    assert_eq!(counts.iter().sum::<u64>(), 17_084);
    assert_eq!((traffic.counted_output_ratio(), traffic.bytes_per_token()), (0.942, 6.13));
    let all = stage_of(&mut traffic, 1);
    assert_eq!(all.len(), 60);
    for Arrival { call, .. } in &all {
        assert_eq!((call.tokens.len(), call.output_tokens), (7581, 1000));
        assert_eq!((call.max_tokens, call.session), (Some(1000), None));
        assert!(call.tokens.iter().all(|id| *id < TOKEN_IDS));
    }
}

#[test]
fn equal_seeds_give_equal_requests_in_whatever_order_stages_are_asked() {
    let scenario = scenario(|s| s.workload.order = Some(crate::scenario::PromptOrder::Random));
    let (mut a, mut b, mut c) =
        (traffic(&scenario, 1), traffic(&scenario, 1), traffic(&scenario, 2));
    let (a1, a2) = (stage_of(&mut a, 1), stage_of(&mut a, 2));
    let (b2, b1) = (stage_of(&mut b, 2), stage_of(&mut b, 1));
    assert_eq!((&a1, &a2), (&b1, &b2));
    let c1 = stage_of(&mut c, 1);
    assert_ne!(a1[0].call.tokens, c1[0].call.tokens);
    assert_ne!(a1[0].at_s, c1[0].at_s);
    assert_eq!(a.next(99), None);
    assert_eq!(a.next(1), None);
}

#[test]
fn a_cycle_visits_every_prompt_in_the_same_order_in_every_stage() {
    let mut traffic = traffic(&scenario(|_| ()), 3);
    let ids = |arrivals: &[Arrival]| -> Vec<u64> {
        arrivals.iter().map(|arrival| arrival.call.prompt_id).collect()
    };
    let first = ids(&stage_of(&mut traffic, 0));
    let last = ids(&stage_of(&mut traffic, 16));
    assert_eq!(last.len(), 1500);
    assert_eq!((&last[..750], &last[750..]), (&first[..], &first[..]));
    let mut sorted = first;
    sorted.sort_unstable();
    assert_eq!(sorted, (0..750).collect::<Vec<u64>>());
}

#[test]
fn groups_share_their_prefix_and_users_their_prompt() {
    let mut traffic = traffic(&scenario(|_| ()), 4);
    let mut calls: Vec<Call> =
        stage_of(&mut traffic, 16).into_iter().map(|arrival| arrival.call).collect();
    calls.sort_by_key(|call| call.prompt_id);
    assert!(Arc::ptr_eq(&calls[0].tokens, &calls[1].tokens));
    for pair in calls.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        assert_eq!(u64::from(a.group), a.prompt_id / 5);
        assert_eq!(a.tokens == b.tokens, a.prompt_id == b.prompt_id);
        assert_eq!(a.tokens[..9] == b.tokens[..9], a.group == b.group);
    }
}

#[test]
fn arrivals_keep_their_rate_and_their_stage() {
    for kind in [ArrivalKind::Poisson, ArrivalKind::Constant, ArrivalKind::Even] {
        let scenario = scenario(|s| {
            s.load.arrivals = kind;
            let stage = StageSpec { rate: Some(20.0), duration_s: 400.0, warmup: false };
            s.load.stages = vec![stage];
        });
        let mut traffic = traffic(&scenario, 5);
        let times: Vec<f64> = stage_of(&mut traffic, 0).iter().map(|a| a.at_s).collect();
        assert_eq!(times.len(), 8000);
        assert!(times.is_sorted() && times[0] >= 0.0, "{kind:?}");
        let end = times[times.len() - 1];
        assert!((380.0..420.0).contains(&end), "{kind:?} ends at {end}");
        let mut counts = vec![0.0; 440];
        times.iter().for_each(|at| counts[*at as usize] += 1.0);
        let counts = &counts[..380];
        let mean = counts.iter().sum::<f64>() / 380.0;
        let variance = counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / 380.0;
        assert!((19.0..21.0).contains(&mean), "{kind:?}: {mean} per second");
        let expected = if kind == ArrivalKind::Even { 0.0..0.5 } else { 15.0..26.0 };
        assert!(expected.contains(&variance), "{kind:?}: variance {variance}");
    }
}

#[test]
fn zipf_and_uniform_groups_have_their_shares() {
    let (uniform, zipf) = (1.0 / 150.0, Some(1.2));
    for (exponent, first, last) in [(zipf, 0.2661, 0.000_651), (None, uniform, uniform)] {
        let scenario = scenario(|s| {
            s.workload.order = Some(crate::scenario::PromptOrder::Random);
            s.workload.zipf = exponent;
            s.load.stages[0].rate = Some(1000.0);
        });
        let calls = stage_of(&mut traffic(&scenario, 6), 0);
        let share = |group: u32| {
            calls.iter().filter(|a| a.call.group == group).count() as f64 / calls.len() as f64
        };
        for (group, expected) in [(0, first), (149, last)] {
            let found = share(group);
            let slack = 0.003 + 0.02 * expected;
            assert!((found - expected).abs() < slack, "{exponent:?} {group}: {found}");
        }
    }
}

#[test]
fn a_closed_loop_begins_with_its_clients_and_ends_with_its_time() {
    let scenario = scenario(|s| {
        s.load.arrivals = ArrivalKind::Closed;
        s.client.in_flight_max = 3;
        s.load.stages = vec![StageSpec { rate: None, duration_s: 10.0, warmup: false }];
    });
    let mut traffic = traffic(&scenario, 7);
    assert_eq!(traffic.stages()[0].clients, 3);
    let first = stage_of(&mut traffic, 0);
    assert_eq!(first.iter().map(|a| a.at_s).collect::<Vec<_>>(), [0.0; 3]);
    let next = traffic.follow_up(0, &first[0].call, 2.5).unwrap();
    assert_eq!(next.at_s, 2.5);
    assert!(first.iter().all(|a| a.call.prompt_id != next.call.prompt_id));
    assert_eq!(traffic.follow_up(0, &next.call, 10.0), None);
}

#[test]
fn an_open_load_has_no_follow_ups() {
    let mut traffic = traffic(&scenario(|_| ()), 8);
    let first = traffic.next(1).unwrap();
    assert_eq!(traffic.follow_up(1, &first.call, 0.5), None);
}

#[test]
fn impossible_sizes_are_refused() {
    type Edit = fn(&mut Scenario);
    let edits: [(Edit, &str); 5] = [
        (|s| s.workload.groups = None, "lacks `groups`"),
        (|s| s.workload.groups = Some(u32::MAX), "do not fit in memory"),
        (|s| s.workload.prefix_tokens = Some(u32::MAX), "do not fit in memory"),
        (|s| s.load.stages.clear(), "no stages"),
        (|s| s.load.stages[0].rate = Some(1e12), "from 1 to"),
    ];
    for (edit, expected) in edits {
        let error = Traffic::new(&scenario(edit), Path::new("."), 1).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn agentic(edit: impl Fn(&mut Scenario)) -> Scenario {
    let mut scenario = Scenario::built_in("agentic").unwrap();
    scenario.workload.prefix_tokens = Some(40);
    scenario.workload.question_tokens = Some(6);
    scenario.workload.output_tokens = Some(3);
    edit(&mut scenario);
    scenario
}

/// All turns of the session that begins with `first`, each answered after a second.
fn session_of(traffic: &mut Traffic, stage: usize, first: Arrival) -> Vec<Arrival> {
    let next = |last: &Arrival| traffic.follow_up(stage, &last.call, last.at_s + 1.0);
    std::iter::successors(Some(first), next).collect()
}

#[test]
fn each_turn_repeats_all_that_was_said() {
    let mut traffic = traffic(&agentic(|_| ()), 1);
    assert_eq!(traffic.stages()[1].arrivals, 720);
    let first = stage_of(&mut traffic, 1);
    let mut waits = 0.0;
    let mut ids = std::collections::BTreeSet::new();
    for first in &first {
        let turns = session_of(&mut traffic, 1, first.clone());
        assert_eq!(turns.len(), 8);
        for pair in turns.windows(2) {
            let (last, next) = (&pair[0].call, &pair[1].call);
            let said = [&last.tokens[..], &last.output[..]].concat();
            assert_eq!(next.tokens[..said.len()], said[..]);
            assert_eq!((next.tokens.len(), last.output.len()), (said.len() + 6, 3));
            assert_eq!((next.session, next.group), (last.session, last.group));
            waits += pair[1].at_s - pair[0].at_s - 1.0;
        }
        assert!(turns[7].call.output.is_empty());
        ids.extend(turns.iter().map(|turn| turn.call.prompt_id));
    }
    assert_eq!(ids.len(), 720 * 8);
    let mean = waits / (720.0 * 7.0);
    assert!((7.5..8.5).contains(&mean), "think time {mean}");
    for a in &first[1..] {
        let shared = a.call.tokens[..40] == first[0].call.tokens[..40];
        assert_eq!(shared, a.call.group == first[0].call.group);
        assert_ne!(a.call.tokens[40..], first[0].call.tokens[40..]);
    }
}

#[test]
fn sessions_do_not_depend_on_the_order_of_events() {
    let (mut a, mut b) = (traffic(&agentic(|_| ()), 2), traffic(&agentic(|_| ()), 2));
    let (first_a, first_b) = (stage_of(&mut a, 1), stage_of(&mut b, 1));
    let sessions_a: Vec<_> =
        first_a.into_iter().map(|first| session_of(&mut a, 1, first)).collect();
    let mut sessions_b: Vec<_> =
        first_b.into_iter().rev().map(|first| session_of(&mut b, 1, first)).collect();
    sessions_b.reverse();
    assert_eq!(sessions_a, sessions_b);
}

#[test]
fn sessions_end_with_a_stage_that_drains() {
    let mut traffic = traffic(&agentic(|s| s.load.drain_between_stages = true), 3);
    let first = traffic.next(0).unwrap();
    assert!(traffic.follow_up(0, &first.call, 1.0).is_some());
    assert_eq!(traffic.follow_up(0, &first.call, 150.0), None);
}

#[test]
fn a_client_of_a_closed_loop_begins_a_new_session_after_the_last_turn() {
    let mut traffic = traffic(
        &agentic(|s| {
            s.load.arrivals = ArrivalKind::Closed;
            s.client.in_flight_max = 2;
            s.workload.turns = Some(2);
            s.workload.think_s = Some(0.0);
            s.load.stages[1].rate = None;
            s.load.stages[2].rate = None;
        }),
        4,
    );
    let first = stage_of(&mut traffic, 1);
    assert_eq!(first.len(), 2);
    let turns: Vec<_> = session_of(&mut traffic, 1, first[0].clone());
    let sessions: Vec<u64> = turns.iter().map(|turn| turn.call.session.unwrap()).collect();
    assert_eq!(turns.len(), 240);
    assert_eq!(sessions[0], sessions[1]);
    assert!(sessions[2] > first[1].call.session.unwrap());
}

#[test]
fn every_built_in_scenario_makes_requests() {
    for (name, _) in Scenario::BUILT_IN {
        let scenario = Scenario::built_in(name).unwrap();
        let mut traffic = traffic(&scenario, 1);
        let room = scenario.fleet.request_tokens_max();
        for stage in 0..traffic.stages().len() {
            let call = traffic.next(stage).unwrap().call;
            assert!(call.tokens.len() as u64 + u64::from(call.output_tokens) <= room);
            assert!(traffic.next(stage).is_some(), "{name}: stage {stage}");
        }
    }
}
