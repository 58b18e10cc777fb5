//! Does a configuration decide as its author expects? Tests that stand in the configuration
//! itself, under `kvroute.tests`: a fleet in some state, a request, and where it must go.
//!
//! [`run`] builds the fleet as a snapshot, restores a brain from it under the plan, and compares
//! what it decides, for several seeds.

mod check;
mod run;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

pub use check::check;
pub use run::{TestFailure, TestOutcome, run};

use crate::event::Tier;

/// Most tests of one configuration.
pub const TESTS_MAX: usize = 1_000;
/// Most endpoints of one test.
pub const FLEET_MAX: usize = 512;
/// Most requests before the one that is tested.
pub const AFTER_MAX: usize = 100;
/// Most seeds of one test.
pub const SEEDS_MAX: u32 = 1_000;
/// Most tokens of one prompt.
pub const TOKENS_MAX: u32 = 1_000_000;
/// Most blocks that the endpoints of one test hold together, in blocks of the smallest size.
pub const BLOCKS_MAX: usize = 1_000_000;

/// Seeds of a test that names none.
const SEEDS: u32 = 8;
/// Tokens per block of an endpoint that names none.
const BLOCK_SIZE: u32 = 16;

/// One test of a configuration.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigTest {
    /// Shown when it fails.
    pub name: String,
    /// The endpoints and what is known about them.
    pub fleet: Vec<TestEndpoint>,
    /// Requests that came before, in order; each goes where the configuration sends it.
    #[serde(default)]
    pub after: Vec<TestRequest>,
    /// The request.
    pub request: TestRequest,
    /// Where it must go.
    pub expect: Expect,
    /// How many seeds to try: every one of them must go where it must. One seed is one way in
    /// which ties and random choices can fall.
    #[serde(default = "seeds")]
    pub seeds: u32,
}

fn seeds() -> u32 {
    SEEDS
}

/// One endpoint of a test. What is left out is as on an endpoint that has nothing to do.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TestEndpoint {
    /// Its name, by which `expect` calls it. Required.
    pub name: String,
    /// Labels that filters read.
    pub labels: BTreeMap<String, String>,
    /// Data parallel rank.
    pub rank: u32,
    /// Models that it lists; when left out it has not been asked.
    pub models: Option<Vec<String>>,
    /// Adapters that run on it.
    pub adapters: Vec<String>,
    /// Requests queued in the engine.
    pub waiting: u32,
    /// Requests being computed.
    pub running: u32,
    /// Share of its KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// KV blocks in total.
    pub kv_blocks: Option<u32>,
    /// Tokens per block.
    pub block_size: u32,
    /// Age of its metrics in seconds; beyond `kvroute.metrics_staleness_ms` they count as missing.
    pub metrics_age_s: f64,
    /// Whether it has been scraped at all.
    pub scraped: bool,
    /// Whether its event stream is complete; else it has none.
    pub events: bool,
    /// Whether it has just refused a connection.
    pub failing: bool,
    /// Requests of this router in flight there.
    pub inflight_requests: u32,
    /// Their tokens that are still to be computed.
    pub inflight_tokens: u64,
    /// What its cache holds.
    pub cached: Vec<Cached>,
}

impl Default for TestEndpoint {
    fn default() -> TestEndpoint {
        TestEndpoint {
            name: String::new(),
            labels: BTreeMap::new(),
            rank: 0,
            models: None,
            adapters: Vec::new(),
            waiting: 0,
            running: 0,
            kv_usage: 0.0,
            kv_blocks: None,
            block_size: BLOCK_SIZE,
            metrics_age_s: 0.0,
            scraped: true,
            events: true,
            failing: false,
            inflight_requests: 0,
            inflight_tokens: 0,
            cached: Vec::new(),
        }
    }
}

/// A part of a prompt that an endpoint holds, in whole blocks from its start. Without `share` and
/// `tokens` all of it.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cached {
    /// The prompt; when left out, that of the test's request.
    pub prompt: Option<String>,
    /// How much of it, 0 to 1.
    pub share: Option<f64>,
    /// How many tokens of it.
    pub tokens: Option<u32>,
    /// Where.
    #[schemars(with = "TierName")]
    pub tier: Tier,
}

impl Default for Cached {
    fn default() -> Cached {
        Cached { prompt: None, share: None, tokens: None, tier: Tier::Gpu }
    }
}

impl Cached {
    /// How many tokens of a prompt of so many it means.
    fn tokens_of(&self, prompt: usize) -> usize {
        let share = self.share.map(|share| (share * prompt as f64) as usize);
        let count = share.or(self.tokens.map(|tokens| tokens as usize));
        count.map_or(prompt, |count| count.min(prompt))
    }
}

/// Names of tiers, for the schema.
#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(dead_code, reason = "the schema alone names them")]
enum TierName {
    Gpu,
    Cpu,
    Disk,
    Other,
}

/// A request of a test.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TestRequest {
    /// Model or adapter; `model` when left out.
    pub model: String,
    /// The text of the prompt: four bytes count as one token.
    pub prompt: Option<String>,
    /// Instead of a text, a prompt of so many tokens. All such prompts begin alike.
    pub tokens: Option<u32>,
    /// Most tokens of the answer.
    pub output_tokens: Option<u32>,
    /// Headers that plugins read.
    pub headers: BTreeMap<String, String>,
    /// The header `x-session-id`.
    pub session: Option<String>,
    /// Priority; below 0 it may be refused when the fleet is full.
    pub priority: i32,
    /// Images, videos and sounds, by any name: equal names are equal items.
    pub media: Vec<String>,
    /// Under `after`: it is still being answered.
    pub in_flight: bool,
}

impl Default for TestRequest {
    fn default() -> TestRequest {
        TestRequest {
            model: "model".into(),
            prompt: None,
            tokens: None,
            output_tokens: None,
            headers: BTreeMap::new(),
            session: None,
            priority: 0,
            media: Vec::new(),
            in_flight: false,
        }
    }
}

/// What must come of a request. Everything that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Expect {
    /// It goes to this endpoint, or to one of these.
    pub endpoint: Names,
    /// It goes to none of these.
    pub not: Names,
    /// It is refused.
    pub rejected: bool,
    /// Its prompt is computed by one of these; `none`: by nobody else than who answers.
    pub prefill: Names,
    /// Its images, videos and sounds are encoded by one of these; `none`: by nobody else.
    pub encode: Names,
    /// The profile that chooses who answers.
    pub profile: Option<String>,
}

/// One name, or a list of names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(pub Vec<String>);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" or "))
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Names, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Names;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name or a list of names")
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Names, E> {
                Ok(Names(vec![name.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = list.next_element()? {
                    names.push(name);
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl JsonSchema for Names {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Names".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        })
    }
}
