//! What came of the tests of a configuration, for people and as JSON.

use kvroute_core::config_tests::{TestFailure, TestOutcome};
use serde_json::{Value, json};

use crate::explain::{Paint, decision_text};

/// A line for each test; of one that fails also the decision.
pub(super) fn text(tests: &[TestOutcome]) -> String {
    if tests.is_empty() {
        return String::new();
    }
    let failed = tests.iter().filter(|test| test.failure.is_some()).count();
    let mut text = format!("tests: {} of {} hold\n", tests.len() - failed, tests.len());
    for TestOutcome { name, seeds, failure } in tests {
        let Some(failure) = failure else {
            text += &format!("  ok      {name} ({seeds} seeds)\n");
            continue;
        };
        let TestFailure { seed, expected, found, record } = failure;
        text += &format!("  FAILED  {name}\n");
        text +=
            &format!("          expected: {expected}\n          but:      {found} (seed {seed})\n");
        if let Some(record) = record {
            let shown = decision_text(record, Paint::Plain);
            text += &format!("\n{}\n", super::indented(&shown));
        }
    }
    text
}

/// One object for each test.
pub(super) fn json(tests: &[TestOutcome]) -> Vec<Value> {
    let one = |TestOutcome { name, seeds, failure }: &TestOutcome| match failure {
        None => json!({"name": name, "ok": true, "seeds": seeds}),
        Some(TestFailure { seed, expected, found, record }) => json!({
            "name": name,
            "ok": false,
            "seeds": seeds,
            "seed": seed,
            "expected": expected,
            "found": found,
            "decision": record,
        }),
    };
    tests.iter().map(one).collect()
}
