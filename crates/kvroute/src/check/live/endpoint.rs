//! The questions to one engine, in their order: each may need what an earlier one found.

use http::Method;
use kvroute_core::fleet::ServedModel;
use kvroute_router::ask::{self, Answer, AskError, Engine};
use kvroute_wire::prometheus::{self, CacheConfig, Scrape};
use kvroute_wire::{models, usage};
use serde_json::json;

use super::events::{self, Probe, Told};
use super::{Check, EndpointReport, Finding, Question, Status, clock, prompts, report};

/// Bytes of an error's body that are shown.
const SHOWN_BYTES_MAX: usize = 200;

/// An engine and what it has said so far.
pub(super) struct Asker<'a> {
    pub engine: &'a Engine,
    pub question: &'a Question,
    pub findings: Vec<Finding>,
    /// Seconds by which its clock is ahead, by the date of its first answer.
    date_skew_s: Option<f64>,
}

/// What an engine says about itself, as far as later questions need it.
#[derive(Default)]
pub(super) struct About {
    /// Model to ask for.
    pub model: String,
    /// Longest sequence.
    pub max_model_len: Option<u32>,
    /// Tokens per block.
    pub block_size: Option<u32>,
    /// Prefix caching and names of blocks.
    pub cache: CacheConfig,
}

/// Asks one engine everything.
pub(super) async fn check(engine: &Engine, question: &Question) -> EndpointReport {
    let mut asker = Asker { engine, question, findings: Vec::new(), date_skew_s: None };
    if let Some(listed) = asker.reach().await {
        let mut about = About::default();
        asker.metrics(&mut about).await;
        asker.model(&listed, &mut about);
        let mut event_skew_s = None;
        if !about.model.is_empty() {
            prompts::check(&mut asker, &about).await;
            event_skew_s = asker.probe(&mut about).await;
        }
        asker.block_size(&about);
        asker.findings.push(clock::finding(asker.date_skew_s, event_skew_s));
    }
    report(engine, asker.findings)
}

impl Asker<'_> {
    pub(super) fn push(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    pub(super) async fn get(&self, path: &str) -> Result<Answer, AskError> {
        ask::exchange(self.engine, &Method::GET, path, b"", &self.question.limits).await
    }

    pub(super) async fn post(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<Answer, AskError> {
        let body = body.to_string().into_bytes();
        ask::exchange(self.engine, &Method::POST, path, &body, &self.question.limits).await
    }

    /// The answer to `GET /v1/models`, when something that may be an engine gave it.
    async fn reach(&mut self) -> Option<Answer> {
        let asked = "GET /v1/models";
        let answer = match self.get("/v1/models").await {
            Ok(answer) => answer,
            Err(error) => {
                let finding = self.unreachable(asked, &error).await;
                self.push(finding);
                return None;
            }
        };
        let date = answer.header("date").and_then(clock::http_date_unix_s);
        self.date_skew_s = date.map(|date| date - clock::now_unix_s());
        let server = answer.header("server").unwrap_or("a server without a name").to_owned();
        let is_engine = matches!(answer.status, 401 | 403)
            || (answer.status == 200 && models::parse(&answer.body).is_ok())
            || self.has_metrics().await;
        let status = if is_engine { Status::Ok } else { Status::Wrong };
        let found = match is_engine {
            true => format!("an engine answers ({server})"),
            false => format!(
                "an HTTP server answers at {} ({server}) that is no engine: GET /v1/models gives \
                 status {}, and /metrics holds no engine's metrics",
                self.engine.address, answer.status
            ),
        };
        let finding = Finding::new((Check::Reachable, status), asked, found);
        self.push(if is_engine { finding } else { finding.change(OTHER_PORT) });
        is_engine.then_some(answer)
    }

    async fn has_metrics(&self) -> bool {
        let page = self.get("/metrics").await;
        page.is_ok_and(|answer| prometheus::parse(&answer.body).is_ok())
    }

    async fn unreachable(&self, asked: &str, error: &AskError) -> Finding {
        let address = self.engine.address;
        let wrong = |found: String| Finding::new((Check::Reachable, Status::Wrong), asked, found);
        match error {
            AskError::Refused => wrong(format!(
                "nothing listens at {address}: connection refused; the port is wrong, or the \
                 engine is not running"
            ))
            .change(OTHER_PORT),
            AskError::Connect(reason) => wrong(format!("{address} cannot be reached: {reason}"))
                .change(
                    "check the host's address, and that no firewall drops connections to the port",
                ),
            AskError::NotHttp(_) | AskError::Answer(_)
                if ask::speaks_zmtp(address, &self.question.limits).await =>
            {
                wrong(format!(
                    "the port is wrong: a ZeroMQ socket answers at {address}, not an HTTP server; \
                     it is a port of KV events or of replays"
                ))
                .change(OTHER_PORT)
            }
            AskError::NotHttp(reason) => wrong(format!(
                "the port is wrong: what answers at {address} is no HTTP server ({reason})"
            ))
            .change(OTHER_PORT),
            AskError::Answer(reason) => {
                wrong(format!("{address} accepts connections, but answers nothing: {reason}"))
                    .change("look into the engine's log: it is starting, stuck, or not an engine")
            }
        }
    }

    /// Whether the model is served, and which one to try prompts with.
    fn model(&mut self, listed: &Answer, about: &mut About) {
        let asked = "GET /v1/models";
        let served = match models::parse(&listed.body) {
            Ok(served) if listed.status == 200 => served,
            _ => {
                let found = format!(
                    "the models cannot be told: status {}{}",
                    listed.status,
                    shown(&listed.body)
                );
                let status = Status::Unknown;
                let finding = Finding::new((Check::Model, status), asked, found);
                self.push(match listed.status {
                    401 | 403 => finding.change(
                        "the engine wants an API key (vLLM: --api-key), which kvroute has none \
                         of: it passes the clients' on; adapters are told from base models by \
                         /v1/models only",
                    ),
                    _ => finding,
                });
                return;
            }
        };
        let wanted = self.question.model.as_ref();
        let is_served = |name: &String| served.iter().any(|model| model.id == *name);
        let base = served.iter().find(|model| model.parent.is_none()).or(served.first());
        let chosen = wanted.filter(|name| is_served(name)).or(base.map(|model| &model.id));
        about.model = chosen.cloned().unwrap_or_default();
        about.max_model_len = models::max_model_len(&listed.body, &about.model);
        let finding = self.judge_models(asked, &served, about);
        self.push(finding);
    }

    fn judge_models(&self, asked: &str, served: &[ServedModel], about: &About) -> Finding {
        let names = served.iter().map(|model| match &model.parent {
            Some(parent) => format!("{} (adapter of {parent})", model.id),
            None => model.id.clone(),
        });
        let names = names.collect::<Vec<_>>().join(", ");
        let expected = &self.question.expected.models;
        let flag = self.question.model.iter().map(|name| ("--model", name));
        let stated = expected.iter().map(|stated| (stated.place.as_str(), &stated.value));
        let missing: Vec<_> = flag
            .chain(stated)
            .filter(|(_, name)| !served.iter().any(|model| model.id == **name))
            .collect();
        let Some((place, name)) = missing.first() else {
            let length = about.max_model_len.map(|tokens| format!(", {tokens} tokens at most"));
            let found = format!("serves {names}{}", length.unwrap_or_default());
            return Finding::new((Check::Model, Status::Ok), asked, found);
        };
        let found = format!("{place} says `{name}`, which is not served; served: {names}");
        Finding::new((Check::Model, Status::Wrong), asked, found).change(format!(
            "write a served name there, or start vLLM with --served-model-name {name}"
        ))
    }

    async fn metrics(&mut self, about: &mut About) {
        let asked = "GET /metrics";
        let page = match self.get("/metrics").await {
            Ok(answer) if answer.status == 200 => Ok(answer.body),
            Ok(answer) => Err(format!("status {}", answer.status)),
            Err(error) => Err(error.to_string()),
        };
        let read = page.and_then(|page| match prometheus::parse(&page) {
            Ok(scrape) => Ok((scrape, prometheus::cache_config(&page))),
            Err(error) => Err(error.to_string()),
        });
        let finding = match read {
            Ok((Scrape { engine, metrics }, cache)) => {
                let count = |n: Option<u32>| n.map_or("unknown".to_owned(), |n| n.to_string());
                let found = format!(
                    "metrics of {}: blocks of {} tokens, {} of them, {:.0} % in use, {} requests \
                     running, {} waiting",
                    engine.as_str(),
                    count(metrics.block_size),
                    count(metrics.blocks),
                    metrics.kv_usage * 100.0,
                    metrics.running,
                    metrics.waiting,
                );
                (about.block_size, about.cache) = (metrics.block_size, cache);
                Finding::new((Check::Metrics, Status::Ok), asked, found)
            }
            Err(error) => {
                let found = format!("no load can be read: {error}; its load counts as unknown");
                Finding::new((Check::Metrics, Status::Wrong), asked, found).change(
                    "start vLLM without --disable-log-stats (SGLang: with --enable-metrics), and \
                     let /metrics through where a proxy stands in front of the engine",
                )
            }
        };
        self.push(finding);
    }

    /// Sends a prompt that nobody has sent before, waits for its event, and sends it again. How
    /// far the engine's clock is ahead by the event, in seconds.
    async fn probe(&mut self, about: &mut About) -> Option<f64> {
        let told = match events::check(self, about).await {
            Ok(told) => told,
            Err(refused) => {
                let asked = "POST /v1/completions, one token";
                for check in [Check::PrefixCaching, Check::Usage] {
                    self.push(Finding::new((check, Status::Unknown), asked, refused.clone()));
                }
                return None;
            }
        };
        let Told { probe, event_skew_s } = told;
        let again = self.complete(&about.model, &probe).await;
        self.judge_again(about, &probe, again);
        event_skew_s
    }

    /// One completion of one token; the answer's body.
    pub(super) async fn complete(&self, model: &str, probe: &Probe) -> Result<Vec<u8>, String> {
        let body = json!({
            "model": model, "prompt": probe.prompt, "max_tokens": 1, "temperature": 0
        });
        match self.post("/v1/completions", &body).await {
            Ok(answer) if answer.status == 200 => Ok(answer.body),
            Ok(answer) => Err(format!(
                "the probe was refused with status {}{}",
                answer.status,
                shown(&answer.body)
            )),
            Err(error) => Err(format!("the probe was not answered: {error}")),
        }
    }

    fn judge_again(&mut self, about: &About, probe: &Probe, again: Result<Vec<u8>, String>) {
        let asked = "POST /v1/completions with the same prompt a second time";
        let mut scanner = usage::UsageScanner::new();
        let body = match again {
            Ok(body) => body,
            Err(refused) => {
                self.push(Finding::new((Check::Usage, Status::Unknown), asked, refused));
                return;
            }
        };
        scanner.push(&body);
        let usage = scanner.usage().unwrap_or_default();
        let enabled = about.cache.prefix_caching;
        let full = "a prompt of more than one block";
        let caching =
            |status, found: String| Finding::new((Check::PrefixCaching, status), asked, found);
        let off = "start vLLM with --enable-prefix-caching (SGLang: without \
                   --disable-radix-cache), or nothing is gained by routing to a warm cache";
        self.push(match (enabled, usage.cached_tokens) {
            (Some(false), _) => {
                caching(Status::Wrong, "prefix caching is off (enable_prefix_caching)".into())
                    .change(off)
            }
            (_, Some(cached)) if cached > 0 => caching(
                Status::Ok,
                format!("on: {cached} of {} tokens came from the cache", usage.prompt_tokens),
            ),
            (Some(true), None) => caching(Status::Ok, "on (enable_prefix_caching)".into()),
            _ if !probe.is_long => {
                let found = format!("{full} does not fit into the model's length");
                caching(Status::Unknown, found)
            }
            (Some(true), Some(_)) => caching(
                Status::Warning,
                "on, but the same prompt sent twice found nothing in the cache".into(),
            )
            .change("give the engine more KV cache: what it computes is driven out at once"),
            (None, Some(_)) => {
                let found = "off: the same prompt sent twice found nothing in the cache";
                caching(Status::Wrong, found.into()).change(off)
            }
            (None, None) => caching(
                Status::Unknown,
                "neither metrics nor usage tell whether prefixes are cached".into(),
            ),
        });
        let counted = |status, found: &str| Finding::new((Check::Usage, status), asked, found);
        self.push(match usage.cached_tokens {
            Some(_) => counted(Status::Ok, "answers tell how many tokens came from the cache"),
            None => counted(
                Status::Warning,
                "answers do not tell how many prompt tokens came from the cache, so kvroute \
                 cannot compare what it predicted with what was delivered",
            )
            .change(
                "start vLLM with --enable-prompt-tokens-details (SGLang: \
                     --enable-cache-report)",
            ),
        });
    }

    /// Compares the engine's block size, by its events or else its metrics, with what is
    /// configured.
    fn block_size(&mut self, about: &About) {
        let asked = "GET /metrics (cache_config_info), and a BlockStored event";
        let Some(engine) = about.block_size.filter(|size| *size > 0) else {
            let found = "neither metrics nor events tell the engine's block size";
            self.push(Finding::new((Check::BlockSize, Status::Unknown), asked, found));
            return;
        };
        let stated = &self.question.expected.block_sizes;
        let Some(other) = stated.iter().find(|stated| stated.value != engine) else {
            let found = format!("{engine} tokens per block");
            self.push(Finding::new((Check::BlockSize, Status::Ok), asked, found));
            return;
        };
        let (place, value) = (&other.place, other.value);
        let divides = value > 0 && engine % value == 0;
        let found = format!(
            "the block size differs: {place} says {value}, the engine's blocks hold {engine} \
             tokens. kvroute takes {engine} as soon as an event shows it; until then its matches \
             are wrong{}",
            match divides {
                true => "",
                false => ", and llm-d's, which needs a divisor of the engine's size, always are",
            }
        );
        let status = if divides { Status::Warning } else { Status::Wrong };
        self.push(Finding::new((Check::BlockSize, status), asked, found).change(format!(
            "write {engine} there or leave it out, or start vLLM with --block-size {value}"
        )));
    }
}

const OTHER_PORT: &str = "correct the port in --endpoint or the endpoints file: it is the one of \
                          the engine's HTTP server (vLLM: --port, 8000 unless given)";

/// The beginning of an error's body, for people.
pub(super) fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(SHOWN_BYTES_MAX)]);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() { text } else { format!(": {text}") }
}
