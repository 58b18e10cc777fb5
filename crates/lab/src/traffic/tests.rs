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
