//! `kvroute serve`: the router until somebody stops it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use kvroute_core::plan::NoteKind;
use kvroute_router::{Listens, StartError};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::{cli, config};

/// Runs `kvroute serve`.
///
/// # Errors
/// The configuration is wrong or an address is taken.
pub fn main(args: &cli::Serve) -> anyhow::Result<ExitCode> {
    let config = config::router(args)?;
    let drain = Duration::from_secs(u64::from(config.plan.settings.drain_timeout_s));
    run(config, drain, flag_of)
}

/// The flag that says where something listens.
fn flag_of(what: Listens) -> &'static str {
    match what {
        Listens::Clients => "--http",
        Listens::ExtProc | Listens::Health => "--ext-proc",
        Listens::Admin | Listens::Metrics => "--admin",
    }
}

/// Runs a router until SIGTERM or SIGINT; what it has begun then has `drain` to finish. `flag_of`
/// names the flag that is to blame for an address.
///
/// # Errors
/// It cannot start.
pub fn run(
    config: kvroute_router::RouterConfig,
    drain: Duration,
    flag_of: fn(Listens) -> &'static str,
) -> anyhow::Result<ExitCode> {
    warn_of_degradations(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let finished = runtime.block_on(async {
        let router = kvroute_router::start(config).await.map_err(|error| match error {
            StartError::Listen { what, .. } => anyhow::Error::new(error).context(flag_of(what)),
            _ => error.into(),
        })?;
        stop_signal().await.context("cannot listen for signals")?;
        tokio::select! {
            finished = router.shutdown(drain) => anyhow::Ok(finished),
            // The second time it is meant.
            again = stop_signal() => again.map(|()| false).context("cannot listen for signals"),
        }
    })?;
    info!(all_requests_finished = finished, "Stopped.");
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(ExitCode::SUCCESS)
}

/// What the set-up itself rules out is said once, at the start.
fn warn_of_degradations(config: &kvroute_router::RouterConfig) {
    let no_tokenizer = config.tokenizers.default.is_none() && config.tokenizers.by_model.is_empty();
    if config.plan.reads_events() && no_tokenizer {
        warn!(
            "No tokenizer is given, so prompts are estimated and routing is approximate, by \
             history. Give --tokenizer the model's tokenizer.json for precise routing."
        );
    }
    for note in &config.plan.notes {
        match note.kind {
            NoteKind::Added => info!("Added to the configuration: {}.", note.text),
            NoteKind::Inert => warn!("Without effect in the configuration: {}.", note.text),
            NoteKind::Warning => warn!("In the configuration: {}.", note.text),
        }
    }
}

/// Waits for SIGTERM or SIGINT.
pub async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
