//! Is every senseless scenario refused, at its place, with a hint?

use crate::scenario::{Scenario, ScenarioError};

/// Line numbers in the tables below count from here.
const GOOD: &str = "\
name: test
fleet:
  engines: 2
  profile: tiny
  kv_tokens: 4096
workload:
  kind: shared-prefix
  groups: 3
  users: 2
  prefix_tokens: 100
  question_tokens: 20
  output_tokens: 10
load:
  stages:
    - { rate: 5, duration_s: 10 }
client:
  in_flight_max: 9
faults:
  - { kind: crash, engine: 1, at_s: 3, for_s: 2 }
published:
  - name: other
    summary: { ttft_mean_s: 1 }
    stages:
      - { rate: 5, ttft_mean_s: 1 }
";

#[test]
fn a_good_scenario_is_read() {
    let scenario = Scenario::parse(GOOD, "good.yaml").unwrap();
    assert_eq!((scenario.fleet.block_size, scenario.fleet.blocks()), (16, 256));
    assert_eq!(scenario.published[0].stages[0].figures.ttft_mean_s, Some(1.0));
}

const STAGES: &str = "  stages:\n    - {";

/// What to replace, by what, where the error must point and what it must hold.
#[test]
fn bad_scenarios_are_refused_at_their_place() {
    let closed = &format!("  arrivals: closed\n{STAGES}");
    let trace = &format!("  arrivals: trace\n{STAGES}");
    let table = [
        ("name: test", "name: ' '", "1:7", "name is empty"),
        ("engines: 2", "engines: 0", "3:12", "at least 1"),
        ("engines: 2", "engines: 5000", "3:12", "the limit is 4096"),
        ("engines: 2", "engins: 2", "3:3", "engines"),
        ("profile: tiny", "profile: tinny", "4:12", "nearest first: tiny"),
        ("kv_tokens: 4096", "kv_tokens: 128", "5:14", "room for 112 tokens"),
        ("kv_tokens: 4096", "kv_tokens: 4096\n  event_delay_s: -1", "6:18", "from 0 to"),
        ("kv_tokens: 4096", "kv_tokens: 4096\n  scrape_interval_s: 0", "6:22", "above 0"),
        ("kv_tokens: 4096", "kv_tokens: 4096\n  stats_delay_s: .nan", "6:18", "from 0 to"),
        ("kind: shared-prefix", "kind: shared", "7:9", "shared-prefix"),
        ("  users: 2\n", "", "6:1", "workload.users is missing; `shared-prefix` needs it"),
        ("users: 2", "users: 2\n  turns: 3", "10:10", "its fields are: groups, users"),
        ("users: 2", "users: 2\n  file: x", "10:9", "is not for `shared-prefix`"),
        ("users: 2", "users: 0", "9:10", "at least 1"),
        ("users: 2", "users: 2\n  zipf: 1.2", "10:9", "needs `order: random`"),
        ("users: 2", "users: 2\n  bytes_per_token: 0", "10:20", "above 0"),
        ("kind: shared-prefix", "kind: agentic", "9:10", "is not for `agentic`"),
        ("kind: shared-prefix", "kind: trace", "8:11", "is not for `trace`"),
        ("rate: 5, duration_s: 10 }", "duration_s: 10 }", "15:7", "rate is missing"),
        ("rate: 5, duration_s: 10 }", "rate: 5 }", "15:7", "duration_s"),
        ("duration_s: 10", "duration_s: 0.1", "15:15", "gives no request"),
        ("duration_s: 10", "duration_s: .inf", "15:30", "above 0 and at most"),
        (STAGES, closed, "16:15", "`arrivals: closed`"),
        (STAGES, trace, "14:13", "from a file"),
        ("    - { rate: 5, duration_s: 10 }\n", "    []\n", "14:3", "at least one stage"),
        ("in_flight_max: 9", "in_flight_max: 0", "17:18", "at least 1"),
        ("in_flight_max: 9", "quantum_s: -0.1", "17:14", "from 0 to"),
        ("engine: 1", "engine: 2", "19:28", "0 to 1"),
        ("for_s: 2", "for_s: 0", "19:47", "above 0"),
        ("for_s: 2", "for_s: 2, share: 0.5", "19:57", "its fields are: engine, at_s, for_s"),
        ("kind: crash", "kind: event-loss", "19:5", "share is missing; `event-loss` needs it"),
        ("kind: crash", "kind: slow-engine, factor: -2", "19:34", "above 0"),
        ("kind: crash", "kind: event-delay, delay_s: 0", "19:35", "above 0"),
        ("kind: crash", "kind: event-duplication, share: 2", "19:39", "at most 1"),
        ("kind: crash", "kind: crush", "19:13", "crash"),
        ("name: other", "name: ''", "21:11", "is empty"),
        ("{ rate: 5, ttft_mean_s: 1 }", "{ rate: 0 }", "24:17", "above 0"),
        ("{ rate: 5, ttft_mean_s: 1 }", "{ rate: 5, ttft: 1 }", "24:", "ttft"),
        ("{ ttft_mean_s: 1 }", "{ ttft: 1 }", "22:16", "ttft_mean_s"),
    ];
    let mut faults = Vec::new();
    for (from, to, place, expected) in table {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from} is not in the scenario");
        let error = Scenario::parse(&text, "bad.yaml").unwrap_err();
        let at = format!("bad.yaml:{place}");
        if !error.message.contains(expected) || !error.rendered.contains(&at) {
            faults.push(format!("{from} -> {to}: no `{expected}` at {place} in {error}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn constants_of_a_profile_are_checked_at_their_place() {
    let text = GOOD.replace(
        "profile: tiny",
        "profile: { step_base_s: 0.01, step_per_seq_s: 0, step_per_context_token_s: 0,
    step_per_unique_token_s: 0, prefill_per_token_s: 0, prefill_attention_s: 1e-9 }",
    );
    Scenario::parse(&text, "good.yaml").unwrap();
    for (from, to, place, expected) in [
        ("1e-9", "-1e-9", (5, 78), "fleet.profile.prefill_attention_s is -0.000000001"),
        ("0.01", "0", (4, 27), "fleet.profile.step_base_s is 0"),
        ("1e-9", ".inf", (4, 3), "fleet.profile a constant is not"),
    ] {
        let error = Scenario::parse(&text.replace(from, to), "bad.yaml").unwrap_err();
        assert!(error.message.contains(expected), "{error}");
        assert_eq!(error.line.zip(error.column), Some(place), "{error}");
    }
}

#[test]
fn a_closed_loop_needs_a_number_of_clients() {
    let text = GOOD.replace("stages:\n    - { rate: 5, ", "arrivals: closed\n  stages:\n    - { ");
    Scenario::parse(&text, "good.yaml").unwrap();
    let text = text.replace("in_flight_max: 9", "quantum_s: 0");
    let error = Scenario::parse(&text, "bad.yaml").unwrap_err();
    assert!(error.message.contains("client.in_flight_max is 100000"), "{error}");
    assert_eq!(error.line.zip(error.column), Some((17, 1)), "{error}");
}

#[test]
fn names_come_first_and_unknown_ones_list_what_there_is() {
    for (name, _) in Scenario::BUILT_IN {
        let (scenario, _) = Scenario::load(name).unwrap();
        assert_eq!(scenario.name, name);
        assert!(!scenario.description.is_empty(), "{name} lacks a description");
    }
    let error = Scenario::load("b2b-sass").unwrap_err();
    assert!(matches!(error, ScenarioError::Unknown { .. }));
    assert!(error.to_string().contains("nearest first: b2b-saas"), "{error}");
    let folder = env!("CARGO_MANIFEST_DIR");
    let (scenario, found) = Scenario::load(&format!("{folder}/scenarios/b2b-saas.yaml")).unwrap();
    assert_eq!(scenario.name, "b2b-saas");
    assert!(found.ends_with("scenarios"));
    assert!(matches!(Scenario::load(folder), Err(ScenarioError::Read { .. })));
}
