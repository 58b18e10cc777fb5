//! Sends the requests of a scenario to an OpenAI-compatible server and measures what a client
//! feels.
//!
//! The requests are those of the simulation ([`crate::traffic`]), and the result is the same
//! [`RunRecord`]. Open loops are open: requests leave at times fixed beforehand, whether or not
//! answers come. The generator measures its own lateness (from the planned time to the moment the
//! request is handed to the network) and calls a run invalid when it was late: then it measured
//! itself.

mod client;
mod driver;
mod prompt;
mod scrape;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full, Limited};
use kvroute_tokens::Tokenizer;
use kvroute_wire::models;
use tokio::time::Instant;

use crate::record::RunRecord;
use crate::scenario::Scenario;
pub use crate::summary::LAG_P99_MAX_S;
use crate::traffic::{Traffic, TrafficError};
use client::Client;
use driver::Driver;
use prompt::Prompts;
pub use scrape::Scraper;

/// How long the names of models may take.
const MODELS_TIMEOUT: Duration = Duration::from_secs(10);

/// Which API requests use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadApi {
    /// `/v1/completions`.
    #[default]
    Completions,
    /// `/v1/chat/completions`; the turns of a session are messages.
    ChatCompletions,
}

/// How prompts are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptForm {
    /// Words.
    #[default]
    Text,
    /// Token ids of words; `/v1/completions` only.
    Ids,
}

/// Where and how to send.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Name of the run.
    pub name: String,
    /// Where, for example `http://127.0.0.1:8000`.
    pub url: String,
    /// Model to ask for.
    pub model: String,
    /// API.
    pub api: LoadApi,
    /// Text or ids.
    pub form: PromptForm,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Without a complete answer after this, a request has failed.
    pub timeout: Duration,
    /// The scenario's times pass this many times faster.
    pub speed: f64,
    /// A run whose requests left later than this (99th percentile) is invalid.
    pub lag_p99_max_s: f64,
    /// Decides prompts, order and arrivals.
    pub seed: u64,
    /// Addresses (`HOST:PORT`) of the fleet in order, for the record; others are added as answers
    /// name them.
    pub endpoints: Vec<String>,
}

impl LoadConfig {
    /// Completions with text at the scenario's own speed.
    pub fn new(name: &str, url: &str, model: &str) -> LoadConfig {
        LoadConfig {
            name: name.to_owned(),
            url: url.to_owned(),
            model: model.to_owned(),
            api: LoadApi::default(),
            form: PromptForm::default(),
            api_key: None,
            timeout: Duration::from_secs(300),
            speed: 1.0,
            lag_p99_max_s: LAG_P99_MAX_S,
            seed: 0,
            endpoints: Vec::new(),
        }
    }
}

/// A load that cannot be sent at all.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not a URL of a server.
    #[error("{url:?} is not a URL of the form http://HOST:PORT: {reason}")]
    Url {
        /// As given.
        url: String,
        /// Why.
        reason: String,
    },
    /// The requests of the scenario cannot be made.
    #[error(transparent)]
    Traffic(#[from] TrafficError),
    /// The tokenizer knows too few words to make texts from.
    #[error(
        "the tokenizer has {found} plain words, at least {} are needed",
        crate::words::WORDS_MIN
    )]
    TooFewWords {
        /// Found.
        found: usize,
    },
    /// The tokenizer cannot count a prompt.
    #[error("the tokenizer cannot count a prompt of this API: {0}")]
    Tokens(String),
    /// A chat has no form with token ids.
    #[error("a chat cannot be sent as token ids: use completions, or text")]
    ChatOfIds,
    /// Not a number above 0.
    #[error("speed is {0}, it must be a finite number above 0")]
    Speed(f64),
    /// Not sendable in a header.
    #[error("the API key has characters that a header cannot carry")]
    ApiKey,
    /// The server does not say which models it serves.
    #[error("{url}/v1/models does not name a model ({reason}): name one")]
    NoModel {
        /// As given.
        url: String,
        /// Why.
        reason: String,
    },
}

/// How far a load has come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Requests of all stages that arrive by themselves.
    pub planned: u64,
    /// Sent or refused.
    pub sent: u64,
    /// Answered, refused or failed.
    pub ended: u64,
    /// Of those, not answered.
    pub failed: u64,
    /// Position of the stage that began last.
    pub stage: usize,
    /// How many there are.
    pub stages: usize,
    /// Seconds since the start.
    pub at_s: f64,
    /// Seconds of sending, all stages.
    pub planned_s: f64,
}

/// One look at one engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Look {
    /// Requests waiting.
    pub waiting: f64,
    /// Requests being computed.
    pub running: f64,
    /// KV blocks in use, 0 to 1.
    pub kv_usage: f64,
}

/// Looks at every engine: called with each request and for the timeline, so it must be quick.
pub type Looks = Arc<dyn Fn() -> Vec<Look> + Send + Sync>;

/// Requests that failed for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub example: String,
}

/// What a load measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Everything that reports read. Without looks at the engines it has no queues and no KV usage.
    pub record: RunRecord,
    /// Requests without a complete answer, by kind of reason.
    pub failures: BTreeMap<String, Failure>,
    /// Answers without usage: their tokens are counted by events.
    pub without_usage: u64,
    /// Answers that do not say how many prompt tokens came from the cache: 0 is recorded.
    pub without_cached: u64,
    /// Stopped before the end. The record holds only what had ended, and its name says so.
    pub partial: bool,
    /// False when the generator was late: the figures mean nothing then.
    pub valid: bool,
}

/// A load that is ready to be sent.
pub struct Load {
    config: LoadConfig,
    traffic: Traffic,
    prompts: Prompts,
    client: Client,
    in_flight_max: usize,
    drain_between_stages: bool,
}

impl Load {
    /// Prepares everything that can fail. `folder` is where relative paths of the scenario start.
    ///
    /// # Errors
    /// [`LoadError`]. Failures of requests are part of what is measured.
    pub fn new(
        config: LoadConfig,
        scenario: &Scenario,
        folder: &Path,
        tokenizer: &Tokenizer,
    ) -> Result<Load, LoadError> {
        if !config.speed.is_finite() || config.speed <= 0.0 {
            return Err(LoadError::Speed(config.speed));
        }
        let client = Client::new(&config)?;
        let prompts = Prompts::new(&config, tokenizer)?;
        let traffic = Traffic::new(scenario, folder, config.seed)?;
        Ok(Load {
            config,
            traffic,
            prompts,
            client,
            in_flight_max: scenario.client.in_flight_max as usize,
            drain_between_stages: scenario.load.drain_between_stages,
        })
    }

    /// Sends the load and waits for all answers, or until `stop`. `looks` tells the queues and KV
    /// usage of the engines; `progress` is called after whatever happens.
    pub async fn run(
        self,
        looks: Option<Looks>,
        stop: impl Future<Output = ()>,
        progress: impl FnMut(Progress),
    ) -> Measured {
        Driver::new(self, looks, Instant::now()).run(stop, progress).await
    }
}

/// The first model that a server names.
///
/// # Errors
/// [`LoadError::NoModel`] when there is none, [`LoadError::Url`], [`LoadError::ApiKey`].
pub async fn served_model(url: &str, api_key: Option<&str>) -> Result<String, LoadError> {
    let mut request = Request::new(Full::<Bytes>::default());
    *request.uri_mut() = client::uri(url, "/v1/models")?;
    *request.headers_mut() = client::authorization(api_key)?;
    let page = async {
        let response = client::http().request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), client::PAGE_BYTES_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        match status.is_success() {
            true => Ok(body),
            false => Err(format!("status {}", status.as_u16())),
        }
    };
    let no_model = |reason| LoadError::NoModel { url: url.to_owned(), reason };
    let page = tokio::time::timeout(MODELS_TIMEOUT, page).await;
    let page = page.unwrap_or_else(|_| Err("no answer".to_owned())).map_err(no_model)?;
    let models = models::parse(&page).map_err(|error| no_model(error.to_string()))?;
    let first = models.into_iter().find(|model| model.parent.is_none());
    first.map(|model| model.id).ok_or_else(|| no_model("the list is empty".to_owned()))
}
