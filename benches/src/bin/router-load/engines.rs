//! The simulated engines, in a process of their own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use kvroute_lab::engine::{self, EngineConfig};
use kvroute_lab::model::Profile;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::process;
use crate::work;

/// The model that is asked for.
pub const MODEL: &str = "bench";

/// Loading a large tokenizer takes a second or two; a busy machine several times that.
const START_MAX: Duration = Duration::from_secs(60);

/// Settings of the process.
#[derive(Args)]
pub struct EnginesArgs {
    #[arg(long)]
    pub count: u32,
    #[arg(long)]
    pub token_gap_ms: u64,
    #[arg(long)]
    pub kv_blocks: u32,
    #[arg(long)]
    pub max_model_len: u32,
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

/// Where one engine listens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Address {
    pub http: SocketAddr,
    pub events: SocketAddr,
    pub replay: SocketAddr,
}

/// Runs the engines until standard input ends, that is, until the parent has gone.
pub async fn main(args: EnginesArgs) -> anyhow::Result<()> {
    let tokenizer = work::load(args.tokenizer.as_deref())?;
    let profile = profile(args.token_gap_ms);
    let (mut engines, mut addresses) = (Vec::new(), Vec::new());
    for i in 0..args.count {
        let mut config = EngineConfig::loopback(MODEL, tokenizer.clone(), profile.clone());
        config.kv_blocks = args.kv_blocks;
        config.max_model_len = args.max_model_len;
        config.seed = u64::from(i);
        let engine = engine::serve(config).await?;
        addresses.push(Address {
            http: engine.http_addr(),
            events: engine.events_addr().context("events are on")?,
            replay: engine.replay_addr().context("replay is on")?,
        });
        engines.push(engine);
    }
    println!("{}", serde_json::to_string(&addresses)?);
    let mut rest = Vec::new();
    tokio::io::stdin().read_to_end(&mut rest).await?;
    Ok(())
}

/// A step takes the gap between tokens, whatever is in it: prefill costs no time, so that a better
/// cache hit cannot hide what a router adds.
fn profile(token_gap_ms: u64) -> Profile {
    Profile {
        name: "bench".to_owned(),
        step_base_s: (token_gap_ms as f64 / 1000.0).max(1e-9),
        step_per_seq_s: 0.0,
        step_per_context_token_s: 0.0,
        step_per_unique_token_s: 0.0,
        prefill_per_token_s: 0.0,
        prefill_attention_s: 0.0,
    }
}

/// The engines' process, seen from outside.
pub struct Engines {
    child: Child,
    pub addresses: Vec<Address>,
}

impl Engines {
    pub async fn start(args: &EnginesArgs) -> anyhow::Result<Engines> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("engines");
        command.args(["--count", &args.count.to_string()]);
        command.args(["--token-gap-ms", &args.token_gap_ms.to_string()]);
        command.args(["--kv-blocks", &args.kv_blocks.to_string()]);
        command.args(["--max-model-len", &args.max_model_len.to_string()]);
        if let Some(path) = &args.tokenizer {
            command.arg("--tokenizer").arg(path);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("the engines' process")?;
        let stdout = child.stdout.take().context("its output is piped")?;
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line).await.map(|_| ());
        let started = tokio::time::timeout(START_MAX, async { read }).await;
        started.context("the engines do not start")??;
        let addresses = serde_json::from_str(&line).context("the engines did not start")?;
        Ok(Engines { child, addresses })
    }

    pub fn usage(&self) -> process::Usage {
        process::usage(self.child.id())
    }

    pub async fn stop(mut self) {
        drop(self.child.stdin.take());
        if tokio::time::timeout(Duration::from_secs(5), self.child.wait()).await.is_err() {
            // It is killed when the handle goes.
            eprintln!("the engines did not end by themselves");
        }
    }
}
