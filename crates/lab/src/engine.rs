//! A simulated vLLM server: what a client sees of a real one, without the GPU.
//!
//! [`serve`] starts one engine: OpenAI-style HTTP with streaming, `/metrics`, `/tokenize` and the
//! rest of what a router touches, KV events over ZMTP with replay. Behind it runs
//! [`EngineModel`], its steps stretched over real time. Many engines fit in one process: each is a
//! handful of tasks.
//!
//! [`EngineHandle`] also breaks things on purpose: an engine can be killed and started again on
//! the same ports, slowed down, and made to lose events.

mod answer;
mod generate;
mod http;
mod metrics;
mod publisher;
mod runner;
mod text;
mod zmtp;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kvroute_tokens::Tokenizer;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::model::{
    Adapter, EngineModel, HashAlgorithm, ModelConfig, ModelConfigError, Profile, Stats,
};
use metrics::Metrics;
use publisher::Publisher;
use runner::Command;
use text::Text;

pub use publisher::{BUFFER_STEPS_MAX, SUBSCRIBER_QUEUE_MAX};

/// How to run one engine.
#[derive(Clone)]
pub struct EngineConfig {
    /// Where HTTP listens; port 0 picks one.
    pub http: SocketAddr,
    /// Name of the base model.
    pub model: String,
    /// LoRA adapters.
    pub adapters: Vec<Adapter>,
    /// Most distinct adapters in one step.
    pub max_loras: u32,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Tokens per KV block.
    pub block_size: u32,
    /// `num_gpu_blocks`, the null block included.
    pub kv_blocks: u32,
    /// Longest sequence, prompt and output together.
    pub max_model_len: u32,
    /// Most sequences in one step.
    pub max_num_seqs: u32,
    /// Most tokens computed in one step.
    pub max_num_batched_tokens: u32,
    /// Where the event socket listens; `None` publishes nothing.
    pub events: Option<SocketAddr>,
    /// Where the replay socket listens.
    pub replay: Option<SocketAddr>,
    /// A router to which events are published over a connection that the engine makes, too.
    pub events_to: Option<SocketAddr>,
    /// First frame of every event message.
    pub topic: String,
    /// Hardware.
    pub profile: Profile,
    /// How many times faster than the hardware time passes.
    pub speed: f64,
    /// Seed of the output.
    pub seed: u64,
    /// How blocks are named.
    pub hash: HashAlgorithm,
    /// `PYTHONHASHSEED`.
    pub hash_seed: String,
}

impl EngineConfig {
    /// A small engine on ports of the loopback interface that the system picks, with events and
    /// replay.
    pub fn loopback(model: &str, tokenizer: Tokenizer, profile: Profile) -> EngineConfig {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        EngineConfig {
            http: any,
            model: model.to_owned(),
            adapters: Vec::new(),
            max_loras: 1,
            tokenizer,
            block_size: 16,
            kv_blocks: 4097,
            max_model_len: 16_384,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            events: Some(any),
            replay: Some(any),
            events_to: None,
            topic: String::new(),
            profile,
            speed: 1.0,
            seed: 0,
            hash: HashAlgorithm::default(),
            hash_seed: "vllm-none-hash".to_owned(),
        }
    }
}

/// An engine that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A port is taken or not allowed.
    #[error("{what} cannot listen on {address}: {source}")]
    Bind {
        /// Which socket.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Settings that cannot work.
    #[error(transparent)]
    Model(#[from] ModelConfigError),
    /// No or negative speed.
    #[error("speed is {0}, it must be a finite number above 0")]
    Speed(f64),
    /// Not an address of the form `tcp://HOST:PORT`.
    #[error("{0:?} is not an endpoint: write tcp://*:PORT or tcp://IP:PORT")]
    Endpoint(String),
}

/// Reads an endpoint in vLLM's form: `tcp://*:PORT` (every interface) or `tcp://IP:PORT`.
///
/// # Errors
/// [`EngineError::Endpoint`] for anything else.
pub fn parse_endpoint(text: &str) -> Result<SocketAddr, EngineError> {
    let rest = text.strip_prefix("tcp://");
    let address = rest.map(|rest| match rest.strip_prefix("*:") {
        Some(port) => format!("0.0.0.0:{port}"),
        None => rest.to_owned(),
    });
    let parsed = address.and_then(|address| address.parse().ok());
    parsed.ok_or_else(|| EngineError::Endpoint(text.to_owned()))
}

/// The other way round.
fn endpoint(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("tcp://*:{}", address.port()),
        false => format!("tcp://{address}"),
    }
}

/// What the tasks of an engine share.
struct Shared {
    config: EngineConfig,
    text: Text,
    publisher: Option<Arc<Publisher>>,
    metrics: Mutex<Metrics>,
    commands: mpsc::UnboundedSender<Command>,
    next_request: AtomicU64,
    next_id: AtomicU64,
    in_flight: AtomicUsize,
    drained: watch::Sender<bool>,
    started_unix_s: f64,
}

impl Shared {
    fn metrics(&self) -> MutexGuard<'_, Metrics> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, EngineError> {
    TcpListener::bind(address).await.map_err(|source| EngineError::Bind { what, address, source })
}

fn bound(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

/// A running engine. Dropping it kills the engine.
pub struct EngineHandle {
    shared: Arc<Shared>,
    pace: watch::Sender<f64>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

/// Starts an engine. Its sockets are open when this returns.
///
/// # Errors
/// [`EngineError`] when a socket cannot be opened or the settings cannot work.
pub async fn serve(mut config: EngineConfig) -> Result<EngineHandle, EngineError> {
    if !config.speed.is_finite() || config.speed <= 0.0 {
        return Err(EngineError::Speed(config.speed));
    }
    let text = Text::new(config.tokenizer.clone());
    let model_config = model_config(&config, &text);
    let model = EngineModel::new(model_config.clone(), config.profile.clone())?;
    let http = listen("HTTP", config.http).await?;
    config.http = bound(&http, config.http);
    let mut tasks = JoinSet::new();
    let publisher = publish(&mut config, &mut tasks).await?;
    let (commands, receiver) = mpsc::unbounded_channel();
    let (pace, pace_seen) = watch::channel(1.0 / config.speed);
    let (stop, stop_seen) = watch::channel(false);
    let started_unix_s = unix_s();
    let metrics = Mutex::new(Metrics::new(&config.model, &model_config, started_unix_s));
    let shared = Arc::new(Shared {
        config,
        text,
        publisher,
        metrics,
        commands,
        next_request: AtomicU64::new(1),
        next_id: AtomicU64::new(0),
        in_flight: AtomicUsize::new(0),
        drained: watch::channel(false).0,
        started_unix_s,
    });
    tasks.spawn(runner::run(shared.clone(), model, receiver, pace_seen));
    tasks.spawn(http::serve(shared.clone(), http, stop_seen));
    Ok(EngineHandle { shared, pace, stop, tasks })
}

/// Starts the event sockets that are wanted; ports that the system picks are noted.
async fn publish(
    config: &mut EngineConfig,
    tasks: &mut JoinSet<()>,
) -> Result<Option<Arc<Publisher>>, EngineError> {
    if config.events.is_none() && config.events_to.is_none() {
        return Ok(None);
    }
    let publisher = Publisher::new(config.topic.clone());
    if let Some(router) = config.events_to {
        tasks.spawn(publisher.clone().publish_to(router));
    }
    if let Some(address) = config.events {
        let events = listen("the event socket", address).await?;
        config.events = Some(bound(&events, address));
        tasks.spawn(publisher.clone().serve_events(events));
        if let Some(address) = config.replay {
            let replay = listen("the replay socket", address).await?;
            config.replay = Some(bound(&replay, address));
            tasks.spawn(publisher.clone().serve_replay(replay));
        }
    }
    Ok(Some(publisher))
}

fn model_config(config: &EngineConfig, text: &Text) -> ModelConfig {
    ModelConfig {
        block_size: config.block_size,
        blocks: config.kv_blocks,
        max_model_len: config.max_model_len,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_loras: config.max_loras,
        reserve_full_prompt: true,
        events: true,
        hash: config.hash,
        hash_seed: config.hash_seed.clone(),
        adapters: config.adapters.clone(),
        output_ids: text.output_ids(),
        seed: config.seed,
    }
}

impl EngineHandle {
    /// Where HTTP listens.
    pub fn http_addr(&self) -> SocketAddr {
        self.shared.config.http
    }

    /// Where the event socket listens.
    pub fn events_addr(&self) -> Option<SocketAddr> {
        self.shared.config.events
    }

    /// Where the replay socket listens.
    pub fn replay_addr(&self) -> Option<SocketAddr> {
        self.shared.config.replay.filter(|_| self.shared.config.events.is_some())
    }

    /// The settings, with the ports in use: start an engine with them and it takes this one's
    /// place.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Statistics as of the end of the last step.
    pub fn stats(&self) -> Stats {
        self.shared.metrics().stats().clone()
    }

    /// Event batches published so far.
    pub fn batches(&self) -> u64 {
        self.shared.publisher.as_ref().map_or(0, |publisher| publisher.sequence())
    }

    /// How many connections have subscribed to the events; watch it to wait for one.
    pub fn subscribers(&self) -> watch::Receiver<usize> {
        match &self.shared.publisher {
            Some(publisher) => publisher.subscribers(),
            None => watch::channel(0).1,
        }
    }

    /// Empties the prefix cache like `POST /reset_prefix_cache`; says whether it was done.
    pub async fn reset(&self) -> bool {
        let (reply, done) = oneshot::channel();
        let sent = self.shared.commands.send(Command::Reset(reply));
        sent.is_ok() && done.await.unwrap_or(false)
    }

    /// The next `count` event batches are numbered and kept for replay, but not sent.
    pub fn drop_next_batches(&self, count: u32) {
        if let Some(publisher) = &self.shared.publisher {
            publisher.drop_next(count);
        }
    }

    /// While paused, event batches are numbered and kept for replay, but not sent.
    pub fn pause_events(&self, paused: bool) {
        if let Some(publisher) = &self.shared.publisher {
            publisher.pause(paused);
        }
    }

    /// Forgets what is kept for replay, as if it had been too long ago.
    pub fn forget_replay(&self) {
        if let Some(publisher) = &self.shared.publisher {
            publisher.forget_kept();
        }
    }

    /// Makes every step take `factor` times as long; 1 is normal.
    pub fn set_slowdown(&self, factor: f64) {
        self.pace.send_replace(factor / self.shared.config.speed);
    }

    /// Dies at once: connections break in the middle of an answer, ports are free on return.
    pub async fn kill(mut self) {
        self.tasks.abort_all();
        while self.tasks.join_next().await.is_some() {}
    }

    /// Takes no more connections, answers what is in flight, then ends.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.shared.drained.subscribe().wait_for(|drained| *drained).await;
        self.kill().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_vllms_form() {
        let table = [("tcp://*:5557", "0.0.0.0:5557"), ("tcp://127.0.0.1:1", "127.0.0.1:1")];
        for (text, address) in table {
            let parsed = parse_endpoint(text).unwrap();
            assert_eq!(parsed.to_string(), address);
            assert_eq!(endpoint(parsed), text);
        }
        for text in ["", "*:5557", "tcp://host", "ipc:///tmp/x", "tcp://*:x"] {
            let error = parse_endpoint(text).unwrap_err().to_string();
            assert!(error.contains("write tcp://*:PORT"), "{error}");
        }
    }
}
