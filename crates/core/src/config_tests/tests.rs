use super::*;
use crate::config::EndpointPickerConfig;
use crate::plan::{Experimental, Plan};

fn read(text: &str) -> EndpointPickerConfig {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}"))
}

fn outcomes(text: &str) -> Vec<TestOutcome> {
    let config = read(text);
    let plan = Plan::build(&config, Experimental::Refused).unwrap();
    check(&config.kvroute.tests).unwrap();
    run(&plan, &config.kvroute.tests)
}

const EXAMPLES: [(&str, &str); 3] = [
    ("load", include_str!("../../../../config/tests/load.yaml")),
    ("prefix", include_str!("../../../../config/tests/prefix.yaml")),
    ("disaggregated", include_str!("../../../../config/tests/disaggregated.yaml")),
];

#[test]
fn the_examples_hold() {
    for (file, text) in EXAMPLES {
        let outcomes = outcomes(text);
        assert!(outcomes.len() >= 3, "{file}");
        for outcome in outcomes {
            assert_eq!(outcome.failure, None, "{file}: {}", outcome.name);
        }
    }
}

/// Every expectation of the examples, turned round, fails.
#[test]
fn the_examples_can_fail() {
    for (file, text) in EXAMPLES {
        let mut config = read(text);
        let plan = Plan::build(&config, Experimental::Refused).unwrap();
        for test in &mut config.kvroute.tests {
            let chosen = std::mem::take(&mut test.expect.endpoint);
            let expect = match chosen.0.is_empty() {
                true => Expect { not: Names(vec!["nobody".into()]), ..Expect::default() },
                false => Expect { not: chosen, ..Expect::default() },
            };
            test.expect = expect;
        }
        for outcome in run(&plan, &config.kvroute.tests) {
            let failure = outcome.failure.unwrap_or_else(|| panic!("{file}: {}", outcome.name));
            assert!(failure.expected.starts_with("it does not go to"), "{failure:?}");
            assert_eq!((outcome.seeds, failure.seed), (1, 0));
        }
    }
}

const ONE: &str = "
plugins: [{type: queue-scorer}, {type: max-score-picker}]
kvroute:
  endpoints_max: 7
  tests:
    - name: t
      fleet: [{name: a}, {name: b}]
      request: {tokens: 10}
      expect: {endpoint: a}
  retries_max: 1
";

#[test]
fn a_tie_must_fall_right_under_every_seed() {
    let outcome = outcomes(ONE).remove(0);
    let failure = outcome.failure.unwrap();
    assert_eq!(
        (failure.expected.as_str(), failure.found.as_str()),
        ("it goes to a", "it goes to b")
    );
    assert_eq!(outcome.seeds, failure.seed + 1);
    assert_eq!(failure.record.unwrap().endpoint.as_str(), "b");
}

#[test]
fn tests_stand_between_limits() {
    let config = read(ONE);
    let limits = &config.kvroute.limits;
    assert_eq!((limits.endpoints_max, limits.retries_max, config.kvroute.tests.len()), (7, 1, 1));
    for (text, part) in [
        ("kvroute: {endpoint_max: 7}", "endpoint_max"),
        ("kvroute: {tests: [{name: a, flet: []}]}", "flet"),
        ("kvroute: {tests: [], tests: []}", "tests"),
        ("kvroute: {tests: 3}", "sequence"),
        ("kvroute: {tests: [{name: a, fleet: [{name: a, cached: [{tier: tape}]}]}]}", "tape"),
    ] {
        let error = serde_saphyr::from_str::<EndpointPickerConfig>(text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn what_can_mean_nothing_is_refused_with_its_place() {
    let base = "name: t, request: {tokens: 1}, expect: {endpoint: a}";
    let table = [
        ("{name: '', fleet: [{name: a}], request: {tokens: 1}, expect: {endpoint: a}}", "name"),
        (&format!("{{{base}, fleet: [{{name: a}}, {{name: a}}]}}"), "fleet[1].name"),
        (&format!("{{{base}, fleet: [{{}}]}}"), "fleet[0].name"),
        (&format!("{{{base}, fleet: [{{name: b}}]}}"), "expect.endpoint"),
        (&format!("{{{base}, seeds: 0, fleet: [{{name: a}}]}}"), "seeds"),
        (&format!("{{{base}, fleet: [{{name: a, kv_usage: 1.5}}]}}"), "fleet[0].kv_usage"),
        (&format!("{{{base}, fleet: [{{name: a, block_size: 0}}]}}"), "fleet[0].block_size"),
        (
            &format!("{{{base}, fleet: [{{name: a, metrics_age_s: .nan}}]}}"),
            "fleet[0].metrics_age_s",
        ),
        (
            &format!("{{{base}, fleet: [{{name: a, cached: [{{share: 2}}]}}]}}"),
            "fleet[0].cached[0].share",
        ),
        (
            &format!("{{{base}, fleet: [{{name: a, cached: [{{share: 1, tokens: 2}}]}}]}}"),
            "fleet[0].cached[0]",
        ),
        ("{name: t, fleet: [{name: a}], request: {}, expect: {}}", "expect"),
        (
            "{name: t, fleet: [{name: a}], request: {}, expect: {rejected: true, endpoint: a}}",
            "expect",
        ),
        (
            "{name: t, fleet: [{name: a, cached: [{}]}], request: {}, expect: {endpoint: a}}",
            "fleet[0].cached[0]",
        ),
        (
            "{name: t, fleet: [{name: a}], request: {tokens: 2000000}, expect: {endpoint: a}}",
            "request.tokens",
        ),
        (
            "{name: t, fleet: [{name: a}], request: {tokens: 1, prompt: x}, expect: {endpoint: a}}",
            "request",
        ),
    ];
    for (test, place) in table {
        let config = read(&format!("kvroute: {{tests: [{test}]}}"));
        let error = check(&config.kvroute.tests).unwrap_err();
        assert_eq!(error.path, format!("kvroute.tests[0].{place}"), "{error}");
    }
}

/// A few lines of text must not ask for more memory than a machine has.
#[test]
fn the_blocks_of_a_fleet_are_limited() {
    let fleet = |endpoints: usize, size: u32| {
        let one = |at| format!("{{name: e{at}, block_size: {size}, cached: [{{}}]}}");
        let all = (0..endpoints).map(one).collect::<Vec<_>>().join(", ");
        let request = "request: {tokens: 1000000}, expect: {endpoint: e0}";
        let config = read(&format!("kvroute: {{tests: [{{name: t, {request}, fleet: [{all}]}}]}}"));
        check(&config.kvroute.tests)
    };
    assert_eq!((fleet(16, 16), fleet(1, 1)), (Ok(()), Ok(())));
    for (endpoints, size) in [(17, 16), (2, 1), (512, 16)] {
        let error = fleet(endpoints, size).unwrap_err();
        assert_eq!(error.path, "kvroute.tests[0].fleet");
        assert!(error.message.contains("cached blocks, at most 1000000"), "{error}");
    }
}

/// State that only some plugins read: sessions, requests in flight, adapters, models, failures.
#[test]
fn the_whole_state_of_a_fleet_can_be_said() {
    let text = "
plugins:
  - type: active-request-scorer
  - type: lora-affinity-scorer
  - type: max-score-picker
kvroute:
  tests:
    - name: requests in flight
      fleet: [{name: a, inflight_requests: 3}, {name: b}]
      request: {tokens: 10}
      expect: {endpoint: b}
    - name: earlier requests are in flight
      fleet: [{name: a, inflight_requests: 1}, {name: b}]
      after: [{tokens: 10, in_flight: true}, {tokens: 10, in_flight: true}, {tokens: 10}]
      request: {tokens: 10}
      expect: {endpoint: [a, b]}
    - name: adapters
      fleet: [{name: a}, {name: b, adapters: [x]}]
      request: {model: x, tokens: 10}
      expect: {endpoint: b}
    - name: models
      fleet: [{name: a, models: [other]}, {name: b, models: [model], inflight_requests: 5}]
      request: {tokens: 10}
      expect: {endpoint: b}
    - name: one that has just failed
      fleet: [{name: a, failing: true}, {name: b, inflight_requests: 5}]
      request: {tokens: 10}
      expect: {not: a}
";
    for outcome in outcomes(text) {
        assert_eq!(outcome.failure, None, "{}", outcome.name);
    }
}

/// An engine without events, or of estimated tokens, is known by history.
#[test]
fn what_is_cached_is_found_by_any_kind_of_knowledge() {
    for (producer, events) in [
        ("precise-prefix-cache-producer", true),
        ("precise-prefix-cache-producer", false),
        ("approx-prefix-cache-producer", true),
    ] {
        let text = format!(
            "
plugins:
  - type: {producer}
  - type: prefix-cache-scorer
    parameters: {{prefixMatchInfoProducerName: {producer}}}
  - type: max-score-picker
kvroute:
  tests:
    - name: hit
      fleet:
        - {{name: a, events: {events}, cached: [{{tokens: 640}}]}}
        - {{name: b, events: {events}, cached: [{{prompt: other}}]}}
      request: {{tokens: 1000}}
      expect: {{endpoint: a}}
"
        );
        assert_eq!(outcomes(&text)[0].failure, None, "{producer} {events}");
    }
}
