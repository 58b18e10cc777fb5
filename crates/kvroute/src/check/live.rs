//! `kvroute check --live`: are the engines as the configuration expects them?
//!
//! Every engine is asked the same questions, each answered by one [`Finding`]: what was asked,
//! what was found, and what to change. A few tiny requests reach each engine: texts to tokenize,
//! and completions of one token over prompts that nobody else sends.

use std::sync::Arc;
use std::time::Duration;

use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Plan, TokensNeed};
use kvroute_core::plugin::PluginSpec;
use kvroute_router::Tokenizers;
use kvroute_router::ask::{AskLimits, Engine};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

mod clock;
mod endpoint;
mod events;
mod prompts;
mod show;

/// Engines that are asked at the same time.
const ENGINES_AT_ONCE_MAX: usize = 16;

/// How an answer is to be taken; the worse, the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Could not be told; the finding says why.
    Unknown,
    /// Works, but not as well as it could, or not elsewhere.
    Warning,
    /// Routing suffers.
    Wrong,
}

impl Status {
    /// All, the best first.
    pub const ALL: [Status; 4] = [Status::Ok, Status::Unknown, Status::Warning, Status::Wrong];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Unknown => "unknown",
            Status::Warning => "warning",
            Status::Wrong => "wrong",
        }
    }
}

/// What is looked at, in the order in which it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Does an engine answer there?
    Reachable,
    /// Is its clock right?
    Clock,
    /// Does it serve the model?
    Model,
    /// Does it tell its load?
    Metrics,
    /// Are its blocks as long as the configuration says?
    BlockSize,
    /// Does it reuse what it holds?
    PrefixCaching,
    /// Does it cut texts into the same tokens?
    Tokenizer,
    /// Does it render conversations the same way?
    Template,
    /// Does it tell what it holds?
    Events,
    /// Does it repeat what was missed?
    Replay,
    /// Can its names of blocks be computed?
    FirstHash,
    /// Does it tell what it reused?
    Usage,
}

impl Check {
    /// All, in order.
    pub const ALL: [Check; 12] = [
        Check::Reachable,
        Check::Clock,
        Check::Model,
        Check::Metrics,
        Check::BlockSize,
        Check::PrefixCaching,
        Check::Tokenizer,
        Check::Template,
        Check::Events,
        Check::Replay,
        Check::FirstHash,
        Check::Usage,
    ];

    /// Its name in tables; in JSON with `_` for a space.
    pub fn as_str(self) -> &'static str {
        match self {
            Check::Reachable => "reachable",
            Check::Clock => "clock",
            Check::Model => "model",
            Check::Metrics => "metrics",
            Check::BlockSize => "block size",
            Check::PrefixCaching => "prefix caching",
            Check::Tokenizer => "tokenizer",
            Check::Template => "template",
            Check::Events => "events",
            Check::Replay => "replay",
            Check::FirstHash => "first hash",
            Check::Usage => "usage",
        }
    }
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: Check,
    /// How it is.
    pub status: Status,
    /// Which question was put to the engine.
    pub asked: String,
    /// What came out, in words.
    pub found: String,
    /// What to change; `None` when nothing has to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

impl Finding {
    fn new(
        (check, status): (Check, Status),
        asked: impl Into<String>,
        found: impl Into<String>,
    ) -> Finding {
        Finding { check, status, asked: asked.into(), found: found.into(), change: None }
    }

    fn change(self, change: impl Into<String>) -> Finding {
        Finding { change: Some(change.into()), ..self }
    }
}

/// Everything about one engine.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointReport {
    /// Its name: `ip:port`, or the one that a file gives it.
    pub endpoint: String,
    /// `ip:port`.
    pub address: String,
    /// The worst of its findings.
    pub status: Status,
    /// In the order of [`Check`].
    pub findings: Vec<Finding>,
}

/// Everything about all engines.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst of all findings.
    pub status: Status,
    /// In the order in which the engines are named.
    pub endpoints: Vec<EndpointReport>,
}

impl Report {
    /// How many findings have this status.
    pub fn count(&self, status: Status) -> usize {
        let findings = self.endpoints.iter().flat_map(|endpoint| &endpoint.findings);
        findings.filter(|finding| finding.status == status).count()
    }

    /// The tables for a person, one for each engine, and a line that counts.
    pub fn table(&self) -> String {
        show::table(self)
    }
}

/// A value and where the configuration states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stated<T> {
    /// As `precise.yaml: precise-prefix-cache-producer.tokenProcessorConfig.hashSeed`.
    pub place: String,
    /// What stands there.
    pub value: T,
}

/// What configurations expect of the engines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Some plugin reads KV events.
    pub reads_events: bool,
    /// Some plugin wants the engine's own tokens.
    pub wants_tokens: bool,
    /// Tokens per block.
    pub block_sizes: Vec<Stated<u32>>,
    /// Seeds of block hashes.
    pub hash_seeds: Vec<Stated<String>>,
    /// Models.
    pub models: Vec<Stated<String>>,
}

impl Expected {
    /// Adds what a configuration expects; `file` names it in findings.
    pub fn add(&mut self, file: &str, config: &EndpointPickerConfig, plan: &Plan) {
        self.reads_events |= plan.reads_events();
        self.wants_tokens |= plan.tokens == TokensNeed::Exact;
        for entry in &config.plugins {
            let at = |field: &str| format!("{file}: {}.{field}", entry.name());
            match &entry.spec {
                PluginSpec::PrecisePrefixProducer(precise) => {
                    let processor = &precise.token_processor_config;
                    let fields = [
                        ("blockSizeTokens", processor.block_size_tokens),
                        ("blockSize", processor.block_size),
                    ];
                    for (field, value) in fields {
                        let place = at(&format!("tokenProcessorConfig.{field}"));
                        self.block_sizes.extend(value.map(|value| Stated { place, value }));
                    }
                    if !processor.hash_seed.is_empty() {
                        let place = at("tokenProcessorConfig.hashSeed");
                        let value = processor.hash_seed.clone();
                        self.hash_seeds.push(Stated { place, value });
                    }
                }
                PluginSpec::TokenProducer(tokens) => {
                    let place = at("modelName");
                    let value = tokens.model_name.clone();
                    self.models.extend(value.map(|value| Stated { place, value }));
                }
                _ => {}
            }
        }
    }
}

/// Whom to ask, and what should come out.
#[derive(Clone, Debug)]
pub struct Question {
    /// The engines.
    pub engines: Vec<Engine>,
    /// kvroute's own tokenizers.
    pub tokenizers: Tokenizers,
    /// What the configurations expect.
    pub expected: Expected,
    /// Model of `--model`: the one that prompts are tried with.
    pub model: Option<String>,
    /// Longest wait for an event after the request that causes it was answered.
    pub event_patience: Duration,
    /// Longest wait for an answer, and the largest ones.
    pub limits: AskLimits,
}

impl Question {
    /// A question with the usual limits: 5 s for an event, 60 s for an answer of one token.
    pub fn new(
        engines: Vec<Engine>,
        tokenizers: Tokenizers,
        expected: Expected,
        model: Option<String>,
    ) -> Question {
        let limits = AskLimits {
            answer: Duration::from_secs(60),
            body_bytes_max: 16 << 20,
            event_bytes_max: 64 << 20,
        };
        let event_patience = Duration::from_secs(5);
        Question { engines, tokenizers, expected, model, event_patience, limits }
    }
}

/// Asks all engines.
pub async fn run(question: Question) -> Report {
    let question = Arc::new(question);
    let room = Arc::new(Semaphore::new(ENGINES_AT_ONCE_MAX));
    let mut asking = JoinSet::new();
    for at in 0..question.engines.len() {
        let (question, room) = (Arc::clone(&question), Arc::clone(&room));
        asking.spawn(async move {
            let _permit = room.acquire_owned().await;
            (at, endpoint::check(&question.engines[at], &question).await)
        });
    }
    let mut reports = asking.join_all().await;
    reports.sort_by_key(|(at, _)| *at);
    let endpoints: Vec<EndpointReport> = reports.into_iter().map(|(_, report)| report).collect();
    let status = worst(endpoints.iter().map(|endpoint| endpoint.status));
    Report { status, endpoints }
}

fn worst(statuses: impl Iterator<Item = Status>) -> Status {
    statuses.max().unwrap_or(Status::Ok)
}

/// Findings of one engine, put in order.
fn report(engine: &Engine, mut findings: Vec<Finding>) -> EndpointReport {
    findings.sort_by_key(|finding| finding.check);
    EndpointReport {
        endpoint: engine.name.clone(),
        address: engine.address.to_string(),
        status: worst(findings.iter().map(|finding| finding.status)),
        findings,
    }
}

#[cfg(test)]
mod tests {
    use kvroute_core::plan::Experimental;

    use super::*;

    #[test]
    fn every_check_is_documented() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/check.md");
        let text = std::fs::read_to_string(path).unwrap();
        for check in Check::ALL {
            let name = check.as_str();
            assert!(text.contains(&format!("### {name}\n")), "docs/check.md: {name}");
            let json = serde_json::to_value(check).unwrap();
            assert_eq!(json, name.replace(' ', "_"));
        }
        for status in Status::ALL {
            assert!(text.contains(&format!("`{}`", status.as_str())), "{status:?}");
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
    }

    #[test]
    fn what_a_configuration_states() {
        let text = "plugins:\n  - type: token-producer\n    parameters: {modelName: m}\n  \
                    - type: precise-prefix-cache-producer\n    name: p\n    parameters:\n      \
                    tokenProcessorConfig: {blockSize: 64, hashSeed: \"42\"}\n  \
                    - type: prefix-cache-scorer\n    parameters: \
                    {prefixMatchInfoProducerName: p}\n";
        let config = kvroute_wire::config::parse(text, "c.yaml").unwrap();
        let plan = crate::config::load_text(text, "c.yaml", Experimental::Allowed).unwrap();
        let mut expected = Expected::default();
        expected.add("c.yaml", &config, &plan);
        assert!(expected.reads_events && expected.wants_tokens);
        let stated = |place: &str, value: &str| Stated {
            place: format!("c.yaml: {place}"),
            value: value.to_owned(),
        };
        assert_eq!(expected.models, [stated("token-producer.modelName", "m")]);
        assert_eq!(expected.hash_seeds, [stated("p.tokenProcessorConfig.hashSeed", "42")]);
        let place = "c.yaml: p.tokenProcessorConfig.blockSize".to_owned();
        assert_eq!(expected.block_sizes, [Stated { place, value: 64 }]);
    }
}
