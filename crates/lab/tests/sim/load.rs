//! When requests are sent, and what the client adds.

use std::path::Path;

use kvroute_lab::record::Ending;
use kvroute_lab::scenario::{ArrivalKind, Scenario};
use kvroute_lab::traffic::Traffic;

use crate::kit::{EPSILON_S, chosen, end_s, plan, run, run_arm, small, steady};

#[test]
fn requests_beyond_the_clients_limit_never_reach_the_router() {
    let mut scenario = steady(200.0, 2.0);
    scenario.client.in_flight_max = 9;
    let run = run(&scenario, "precise", 1);
    let requests = &run.record.requests;
    let refused = run.count(Ending::Refused);
    assert_eq!(requests.len(), 400);
    assert!((1..400).contains(&refused), "{refused}");
    assert_eq!(run.decisions.len(), 400 - refused);
    assert_eq!(run.in_flight_max(), 9);
    for request in requests.iter().filter(|r| r.ending == Ending::Refused) {
        assert_eq!((request.endpoint, request.ttft_s, request.total_s), (u16::MAX, 0.0, 0.0));
        let at = request.sent_s;
        let on_their_way = requests
            .iter()
            .filter(|r| r.ending != Ending::Refused)
            .filter(|r| r.sent_s <= at && end_s(r) > at - EPSILON_S);
        assert!(on_their_way.count() >= 9, "refused at {at} although there was room");
    }
}

#[test]
fn a_stage_begins_after_the_last_answer_of_the_one_before_and_a_pause() {
    let run = run(&small(), "precise", 2);
    let [first, second] = &run.record.stages[..] else { panic!() };
    let of = |stage: u32| run.record.requests.iter().filter(move |r| r.stage == stage);
    assert_eq!((of(0).count(), of(1).count()), (60, 120));
    let ended = of(0).map(end_s).fold(0.0, f64::max);
    assert_eq!(first.begin_s, 0.0);
    assert!((second.begin_s - (ended.ceil() + 2.0)).abs() < EPSILON_S, "{ended} {second:?}");
    assert!(of(1).all(|r| r.sent_s >= second.begin_s));
}

#[test]
fn stages_that_do_not_wait_follow_each_other_and_overlap() {
    let mut scenario = small();
    scenario.load.drain_between_stages = false;
    scenario.load.arrivals = ArrivalKind::Constant;
    let run = run(&scenario, "precise", 2);
    let begin_s = run.record.stages[1].begin_s;
    assert_eq!(begin_s, 4.0);
    let of = |stage: u32| run.record.requests.iter().filter(move |r| r.stage == stage);
    assert!(of(0).all(|r| r.sent_s <= begin_s + 1e-6));
    assert!(of(0).any(|r| end_s(r) > begin_s), "nothing overlaps: the test shows nothing");
    assert!(of(1).all(|r| (begin_s..=begin_s + 4.0 + 1e-6).contains(&r.sent_s)));
}

#[test]
fn a_quantum_rounds_first_tokens_up_and_changes_nothing_else() {
    let mut scenario = small();
    let exact = run(&scenario, "kvroute", 5);
    scenario.client.quantum_s = 0.1;
    let rounded = run(&scenario, "kvroute", 5);
    assert_eq!(exact.log(), rounded.log());
    for (exact, rounded) in exact.record.requests.iter().zip(&rounded.record.requests) {
        let tenths = f64::from(rounded.ttft_s) / 0.1;
        assert!((tenths - tenths.round()).abs() < EPSILON_S, "{}", rounded.ttft_s);
        let added = rounded.ttft_s - exact.ttft_s;
        assert!((-1e-6..0.1).contains(&added), "{exact:?} {rounded:?}");
        assert_eq!(exact.total_s, rounded.total_s);
    }
}

#[test]
fn overheads_add_exactly() {
    let mut scenario = small();
    scenario.load.stages.truncate(1);
    (scenario.client.overhead_before_s, scenario.client.overhead_after_s) = (0.0, 0.0);
    let without = run(&scenario, "round-robin", 1);
    (scenario.client.overhead_before_s, scenario.client.overhead_after_s) = (0.06, 0.067);
    let with = run(&scenario, "round-robin", 1);
    for (without, with) in without.record.requests.iter().zip(&with.record.requests) {
        assert_eq!(without.sent_s, with.sent_s);
        for (bare, full) in [(without.ttft_s, with.ttft_s), (without.total_s, with.total_s)] {
            let added = f64::from(full) - f64::from(bare);
            assert!((added - 0.127).abs() < 1e-5, "{without:?} {with:?}");
        }
    }
    assert!((with.decisions[0].at_s - with.record.requests[0].sent_s - 0.06).abs() < 1e-9);
}

#[test]
fn a_closed_loop_keeps_its_clients_busy_and_no_more() {
    let mut scenario = steady(1.0, 3.0);
    scenario.load.arrivals = ArrivalKind::Closed;
    scenario.load.stages[0].rate = None;
    scenario.client.in_flight_max = 7;
    let run = run(&scenario, "precise", 1);
    assert_eq!((run.count(Ending::Refused), run.in_flight_max()), (0, 7));
    let requests = &run.record.requests;
    assert!(requests.len() > 50, "{}", requests.len());
    for (at, request) in requests.iter().enumerate().skip(7) {
        let cause = requests[..at].iter().any(|r| (end_s(r) - request.sent_s).abs() < EPSILON_S);
        assert!(cause, "{request:?} follows no answer");
        assert!(request.sent_s < 3.0);
    }
    for tenth in 0..30 {
        let at = f64::from(tenth) / 10.0 + 0.0517;
        let busy = requests.iter().filter(|r| r.sent_s <= at && end_s(r) > at).count();
        assert!(busy == 7 || at > 3.0, "{busy} on their way at {at}");
    }
}

#[test]
fn stages_of_a_closed_loop_must_wait_for_each_other() {
    let text = |drain: bool| {
        format!(
            "name: closed
fleet: {{ engines: 1, profile: tiny, kv_tokens: 8192 }}
workload:
  {{ kind: shared-prefix, groups: 1, users: 1,
     prefix_tokens: 9, question_tokens: 9, output_tokens: 9 }}
load:
  arrivals: closed
  drain_between_stages: {drain}
  stages: [{{ duration_s: 1 }}, {{ duration_s: 1 }}]
client: {{ in_flight_max: 3 }}
"
        )
    };
    let error = Scenario::parse(&text(false), "closed.yaml").unwrap_err().to_string();
    assert!(error.contains("closed.yaml:8") && error.contains("drain_between_stages"), "{error}");
    let run = run(&Scenario::parse(&text(true), "closed.yaml").unwrap(), "precise", 1);
    let second = run.record.requests.iter().filter(|r| r.stage == 1).count();
    assert!(second > 10 && run.count(Ending::Refused) == 0);
}

#[test]
fn the_oracle_puts_each_group_on_its_engine() {
    let scenario = small();
    let run = run(&scenario, "oracle", 9);
    let mut traffic = Traffic::new(&scenario, Path::new("."), 9).unwrap();
    let mut calls = Vec::new();
    for stage in 0..2 {
        calls.extend(std::iter::from_fn(|| traffic.next(stage)).map(|arrival| arrival.call));
    }
    assert_eq!(calls.len(), run.record.requests.len());
    for (call, request) in calls.iter().zip(&run.record.requests) {
        assert_eq!(u32::from(request.endpoint), call.group % 3);
    }
    assert!(run.decisions.iter().zip(&calls).all(|(d, c)| u32::from(chosen(d)) == c.group % 3));
}

const TRACE: &str = r#"{"timestamp":500,"input_length":1200,"output_length":7,"hash_ids":[1, 2, 3]}
{"timestamp":1000,"input_length":1024,"output_length":5,"hash_ids":[1, 9]}
{"timestamp":3250,"input_length":1200,"output_length":40,"hash_ids":[1, 2, 3]}
"#;

#[test]
fn a_trace_runs_at_its_own_times() {
    let folder = std::env::temp_dir().join(format!("kvroute-sim-trace-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("trace.jsonl"), TRACE).unwrap();
    let text = "
name: trace
fleet: { engines: 2, profile: tiny, kv_tokens: 8192 }
workload: { kind: trace, file: trace.jsonl }
load: { arrivals: trace }
";
    let scenario = Scenario::parse(text, "trace.yaml").unwrap();
    let arm = crate::kit::arm("precise");
    let mut watch = kvroute_lab::sim::Watch { progress: &mut |_| {}, decisions: None };
    let record = kvroute_lab::sim::run(&scenario, &folder, &arm, 1, &mut watch);
    std::fs::remove_dir_all(&folder).unwrap();
    let requests = record.unwrap().requests;
    let sent: Vec<f64> = requests.iter().map(|r| r.sent_s - requests[0].sent_s).collect();
    assert_eq!(sent, [0.0, 0.5, 2.75]);
    let shape = requests.iter().map(|r| (r.prompt_tokens, r.output_tokens));
    assert_eq!(shape.collect::<Vec<_>>(), [(1200, 7), (1024, 5), (1200, 40)]);
    assert!(requests.iter().all(|r| r.ending == Ending::Answered));
    // 512 tokens of the first prompt, then all whole blocks of it.
    assert_eq!(requests[0].cached_tokens, 0);
    assert_eq!(requests[1].cached_tokens, 512);
    assert_eq!(requests[2].cached_tokens, 1184);
}

#[test]
fn sessions_name_themselves_to_the_router() {
    let text = "
name: sessions
fleet: { engines: 4, profile: tiny, kv_tokens: 65536 }
workload:
  kind: agentic
  groups: 2
  prefix_tokens: 64
  question_tokens: 40
  output_tokens: 20
  turns: 4
  think_s: 0.5
load: { arrivals: constant, stages: [{ rate: 4, duration_s: 5 }] }
";
    let scenario = Scenario::parse(text, "sessions.yaml").unwrap();
    let pinned = plan(
        "
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - type: session-affinity-scorer
    parameters: { strategy: session_id }
  - type: max-score-picker
schedulingProfiles:
  - name: default
    plugins: [{ pluginRef: session-affinity-scorer }, { pluginRef: max-score-picker }]
",
    );
    let policy = kvroute_lab::sim::Policy::Plan(Box::new(pinned));
    let arm = kvroute_lab::sim::Arm { name: "pinned".into(), policy };
    let run = run_arm(&scenario, &arm, 1);
    // Turns after the first have a longer prompt; their session is pinned, so one engine is best.
    let first = run.record.requests.iter().map(|r| r.prompt_tokens).min().unwrap();
    let later = run.pairs().filter(|(r, _)| r.prompt_tokens > first);
    let tied: Vec<u32> = later.map(|(_, decision)| decision.tied).collect();
    assert!(tied.len() > 20, "{tied:?}");
    assert!(tied.iter().all(|tied| *tied == 1), "{tied:?}");
}
