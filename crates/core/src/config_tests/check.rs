//! Can a test mean what it says?

use super::{
    AFTER_MAX, BLOCKS_MAX, Cached, ConfigTest, Expect, FLEET_MAX, Names, SEEDS_MAX, TESTS_MAX,
    TOKENS_MAX, TestEndpoint, TestRequest,
};
use crate::plan::PlanError;

/// Stands for nobody, where a profile need not choose.
pub(super) const NONE: &str = "none";

type Checked = Result<(), PlanError>;

/// Checks the tests of a configuration.
///
/// # Errors
/// The first test that can mean nothing, with its place in the configuration.
pub fn check(tests: &[ConfigTest]) -> Checked {
    most("kvroute.tests", tests.len(), TESTS_MAX, "tests")?;
    for (at, test) in tests.iter().enumerate() {
        let path = format!("kvroute.tests[{at}]");
        if test.name.is_empty() {
            return wrong(format!("{path}.name"), "a test needs a name");
        }
        if tests[..at].iter().any(|other| other.name == test.name) {
            return wrong(format!("{path}.name"), format!("two tests are called '{}'", test.name));
        }
        check_one(&path, test)?;
    }
    Ok(())
}

fn check_one(path: &str, test: &ConfigTest) -> Checked {
    if test.seeds == 0 || test.seeds > SEEDS_MAX {
        return wrong(format!("{path}.seeds"), format!("write 1 to {SEEDS_MAX}"));
    }
    most(&format!("{path}.fleet"), test.fleet.len(), FLEET_MAX, "endpoints")?;
    for (at, endpoint) in test.fleet.iter().enumerate() {
        let path = format!("{path}.fleet[{at}]");
        let same = |other: &TestEndpoint| other.name == endpoint.name;
        if endpoint.name.is_empty() || endpoint.name == NONE {
            return wrong(format!("{path}.name"), "an endpoint needs a name, and not 'none'");
        }
        if test.fleet[..at].iter().any(same) {
            let message = format!("two endpoints are called '{}'", endpoint.name);
            return wrong(format!("{path}.name"), message);
        }
        check_endpoint(&path, endpoint, &test.request)?;
    }
    most(&format!("{path}.after"), test.after.len(), AFTER_MAX, "requests")?;
    for (at, request) in test.after.iter().enumerate() {
        check_request(&format!("{path}.after[{at}]"), request)?;
    }
    check_request(&format!("{path}.request"), &test.request)?;
    most(&format!("{path}.fleet"), blocks_of(test), BLOCKS_MAX, "cached blocks")?;
    check_expect(&format!("{path}.expect"), &test.expect, &test.fleet)
}

fn check_endpoint(path: &str, endpoint: &TestEndpoint, request: &TestRequest) -> Checked {
    if !(0.0..=1.0).contains(&endpoint.kv_usage) {
        return wrong(format!("{path}.kv_usage"), "write a share from 0 to 1");
    }
    if endpoint.block_size == 0 {
        return wrong(format!("{path}.block_size"), "must be positive");
    }
    let age = endpoint.metrics_age_s;
    if !age.is_finite() || age < 0.0 {
        return wrong(format!("{path}.metrics_age_s"), "write seconds, 0 or more");
    }
    for (at, cached) in endpoint.cached.iter().enumerate() {
        let path = format!("{path}.cached[{at}]");
        let Cached { prompt, share, tokens, .. } = cached;
        if share.is_some() && tokens.is_some() {
            return wrong(path, "write `share` or `tokens`, not both");
        }
        if share.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
            return wrong(format!("{path}.share"), "write a share from 0 to 1");
        }
        if prompt.is_none() && request.prompt.is_none() && request.tokens.is_none() {
            return wrong(path, "the request has no prompt; write `prompt` here or there");
        }
    }
    Ok(())
}

/// Blocks that the fleet holds, where all were of the smallest size: a chain of each size is kept.
fn blocks_of(test: &ConfigTest) -> usize {
    let size = test.fleet.iter().map(|endpoint| endpoint.block_size).min().unwrap_or(1).max(1);
    let cached = test.fleet.iter().flat_map(|endpoint| &endpoint.cached);
    let blocks = cached.map(|cached| {
        let prompt = cached.prompt.as_ref().or(test.request.prompt.as_ref());
        let counted = test.request.tokens.unwrap_or(0) as usize;
        let tokens = prompt.map_or(counted, |text| text.len().div_ceil(4));
        cached.tokens_of(tokens) / size as usize
    });
    blocks.fold(0, usize::saturating_add)
}

fn check_request(path: &str, request: &TestRequest) -> Checked {
    if request.prompt.is_some() && request.tokens.is_some() {
        return wrong(path, "write `prompt` or `tokens`, not both");
    }
    if request.tokens.is_some_and(|tokens| tokens > TOKENS_MAX) {
        return wrong(format!("{path}.tokens"), format!("at most {TOKENS_MAX}"));
    }
    Ok(())
}

fn check_expect(path: &str, expect: &Expect, fleet: &[TestEndpoint]) -> Checked {
    if *expect == Expect::default() {
        return wrong(path, "expects nothing: write `endpoint`, `not`, `rejected`, ...");
    }
    let chosen = Expect { rejected: false, ..expect.clone() };
    if expect.rejected && chosen != Expect::default() {
        return wrong(path, "a request that is refused goes nowhere: write `rejected` alone");
    }
    let known = |names: &Names, field: &str, none: bool| {
        let unknown = names.0.iter().find(|name| {
            let is_none = none && name.as_str() == NONE;
            !is_none && !fleet.iter().any(|endpoint| endpoint.name == **name)
        });
        let Some(name) = unknown else { return Ok(()) };
        let names: Vec<&str> = fleet.iter().map(|endpoint| endpoint.name.as_str()).collect();
        let names = crate::plugin::nearest_first(name, names.into_iter()).join(", ");
        wrong(
            format!("{path}.{field}"),
            format!("'{name}' is not in the fleet; there are: {names}"),
        )
    };
    known(&expect.endpoint, "endpoint", false)?;
    known(&expect.not, "not", false)?;
    known(&expect.prefill, "prefill", true)?;
    known(&expect.encode, "encode", true)
}

fn most(path: &str, found: usize, max: usize, what: &str) -> Checked {
    if found <= max { Ok(()) } else { wrong(path, format!("{found} {what}, at most {max}")) }
}

fn wrong(path: impl Into<String>, message: impl Into<String>) -> Checked {
    Err(PlanError { path: path.into(), message: message.into() })
}
