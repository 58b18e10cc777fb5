//! The demo's engines, and a router in front of them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use kvroute_core::plan::Plan;
use kvroute_lab::engine::{self, EngineConfig, EngineHandle};
use kvroute_lab::load::{Look, Looks};
use kvroute_lab::model::{HashAlgorithm, Profile};
use kvroute_router::{EventsSource, ExtProcConfig, RouterConfig, RouterHandle, Tokenizers};
use kvroute_tokens::Tokenizer;

/// Name of the served model.
pub const MODEL: &str = "demo";

const HARDWARE: &str = "qwen3-32b-tp2-h100";
/// The router knows its engines within two scrapes; this is for a machine that is busy.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(20);

/// Simulated engines in this process.
pub struct Fleet {
    engines: Arc<Vec<EngineHandle>>,
}

impl Fleet {
    /// Starts `count` engines on free ports of the loopback interface.
    pub async fn start(
        count: usize,
        kv_blocks: u32,
        speed: f64,
        tokenizer: &Tokenizer,
        seed: u64,
    ) -> anyhow::Result<Fleet> {
        let profile = Profile::built_in(HARDWARE)?;
        let mut engines = Vec::new();
        for i in 0..count {
            let mut config = EngineConfig::loopback(MODEL, tokenizer.clone(), profile.clone());
            config.kv_blocks = kv_blocks;
            config.speed = speed;
            config.seed = seed ^ (i as u64 + 1).rotate_left(32);
            config.hash = HashAlgorithm::XxhashCbor;
            engines.push(engine::serve(config).await.context("cannot start an engine")?);
        }
        Ok(Fleet { engines: Arc::new(engines) })
    }

    /// Starts a router in front of all engines, under a plan and the text that it came from.
    pub async fn route(
        &self,
        (plan, config): (Plan, String),
        tokenizer: &Tokenizer,
        seed: u64,
    ) -> anyhow::Result<RouterHandle> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let endpoints = self.engines.iter().map(|engine| flag(engine).parse());
        let config = RouterConfig {
            plan,
            config,
            seed,
            http: Some(any),
            ext_proc: Some(ExtProcConfig::plain(any)),
            admin: Some(any),
            endpoints: endpoints.collect::<Result<_, _>>()?,
            endpoints_file: None,
            endpoints_missing: None,
            metrics: None,
            events: EventsSource::Off.into(),
            tokenizers: Tokenizers { default: Some(tokenizer.clone()), ..Tokenizers::default() },
            default_model: None,
            tls: None,
            record: None,
            upstream_metric_names: None,
        };
        Ok(kvroute_router::start(config).await?)
    }

    /// Waits until the router has metrics of every engine, and every event stream is subscribed
    /// to where the plan reads them.
    pub async fn wait_until_known(&self, router: &RouterHandle) -> anyhow::Result<()> {
        let known = async {
            while !self.is_known(router) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(KNOWN_TIMEOUT, known).await.is_err() {
            bail!("the router did not reach every engine within {KNOWN_TIMEOUT:?}");
        }
        Ok(())
    }

    fn is_known(&self, router: &RouterHandle) -> bool {
        let brain = router.brain();
        let scraped = brain.fleet().iter().filter(|endpoint| endpoint.metrics().is_some()).count();
        let subscribed = !brain.plan().reads_events()
            || self.engines.iter().all(|engine| *engine.subscribers().borrow() > 0);
        scraped == self.engines.len() && subscribed
    }

    /// Looks at every engine.
    pub fn looks(&self) -> Looks {
        let engines = Arc::clone(&self.engines);
        Arc::new(move || engines.iter().map(look).collect())
    }

    /// Queue, running requests and share of used blocks of each engine.
    pub fn engines(&self) -> &[EngineHandle] {
        &self.engines
    }

    /// Stops the engines.
    pub async fn shutdown(self) {
        let Ok(engines) = Arc::try_unwrap(self.engines) else { return };
        for engine in engines {
            engine.shutdown().await;
        }
    }
}

fn look(engine: &EngineHandle) -> Look {
    let stats = engine.stats();
    let (waiting, running) = (f64::from(stats.waiting), f64::from(stats.running));
    Look { waiting, running, kv_usage: stats.kv_usage }
}

fn flag(engine: &EngineHandle) -> String {
    let mut flag = format!("http://{}", engine.http_addr());
    if let Some(events) = engine.events_addr() {
        flag += &format!(",events=tcp://{events}");
        if let Some(replay) = engine.replay_addr() {
            flag += &format!(",replay=tcp://{replay}");
        }
    }
    flag
}
