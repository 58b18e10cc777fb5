//! `kvroute engine`: a simulated vLLM server until somebody stops it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use kvroute_lab::engine::{self, EngineConfig};
use kvroute_lab::model::{Adapter, HashAlgorithm, Profile};
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use tracing::info;

use crate::{cli, serve};

/// Runs `kvroute engine`.
///
/// # Errors
/// A flag is wrong or an address is taken.
pub fn main(args: &cli::Engine) -> anyhow::Result<ExitCode> {
    let config = configure(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let engine = engine::serve(config).await?;
        info!(
            http = %engine.http_addr(),
            kv_events = shown(engine.events_addr()),
            replay = shown(engine.replay_addr()),
            "The simulated engine listens."
        );
        serve::stop_signal().await?;
        engine.shutdown().await;
        anyhow::Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn configure(args: &cli::Engine) -> anyhow::Result<EngineConfig> {
    let tokenizer = with_template(args)?;
    let profile = profile(&args.profile).context("--profile")?;
    let socket = |text: &Option<String>| text.as_deref().map(engine::parse_endpoint).transpose();
    let mut config = EngineConfig::loopback(&args.model, tokenizer, profile);
    config.http = args.http;
    config.adapters = args.adapters.iter().map(|name| adapter(name)).collect();
    config.events = socket(&args.kv_events).context("--kv-events")?;
    config.replay = socket(&args.replay).context("--replay")?;
    let router = args.kv_events_connect.as_deref().map(engine::parse_endpoint);
    config.events_to = router.transpose().context("--kv-events-connect")?;
    let topic = || format!("kv@{}@{}", args.http, args.model);
    config.topic = args.kv_events_topic.clone().unwrap_or_else(topic);
    config.block_size = args.block_size;
    config.kv_blocks = args.kv_blocks;
    config.hash = HashAlgorithm::from_name(&args.prefix_caching_hash_algo).ok_or_else(|| {
        let name = &args.prefix_caching_hash_algo;
        anyhow!("--prefix-caching-hash-algo {name}: write sha256_cbor or xxhash_cbor")
    })?;
    config.hash_seed.clone_from(&args.hash_seed);
    config.max_model_len = args.max_model_len;
    config.speed = args.speed;
    config.seed = args.seed;
    Ok(config)
}

fn shown(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "off".to_owned(), |address| address.to_string())
}

/// The tokenizer of `--tokenizer` with the template of `--chat-template`.
fn with_template(args: &cli::Engine) -> anyhow::Result<Tokenizer> {
    let template = args.chat_template.as_ref().map(|path| {
        let shown = path.display();
        std::fs::read_to_string(path).with_context(|| format!("--chat-template {shown}"))
    });
    let options =
        TokenizerOptions { chat_template: template.transpose()?, ..TokenizerOptions::default() };
    load(args.tokenizer.as_deref(), &options)
}

/// The tokenizer of `--tokenizer`, or the built-in one.
///
/// # Errors
/// The file is not there or none.
pub fn tokenizer(path: Option<&Path>) -> anyhow::Result<Tokenizer> {
    load(path, &TokenizerOptions::default())
}

fn load(path: Option<&Path>, options: &TokenizerOptions) -> anyhow::Result<Tokenizer> {
    match path {
        None => Ok(Tokenizer::demo_with(options)?),
        Some(path) => Tokenizer::load(path, options)
            .with_context(|| format!("--tokenizer {}", path.display())),
    }
}

/// A built-in profile by name, or a JSON file.
///
/// # Errors
/// No such profile, or a file that is none.
pub fn profile(name: &str) -> anyhow::Result<Profile> {
    if !name.ends_with(".json") {
        return Ok(Profile::built_in(name)?);
    }
    let text = std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?;
    Ok(Profile::parse(&text, name)?)
}

fn adapter(name: &str) -> Adapter {
    Adapter { name: name.to_owned(), path: name.to_owned() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[tokio::test]
    async fn it_starts_as_its_help_says() {
        let parsed = cli::Cli::try_parse_from(["kvroute", "engine", "--http", "127.0.0.1:0"]);
        let Some(args) = parsed.unwrap().engine() else { panic!("another command") };
        let engine = engine::serve(configure(&args).unwrap()).await.unwrap();
        assert_ne!(engine.http_addr().port(), 0);
        engine.shutdown().await;
    }
}
