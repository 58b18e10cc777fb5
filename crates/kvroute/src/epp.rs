//! `kvroute epp`: llm-d's Endpoint Picker for Envoy, started as llm-d's Helm charts start theirs.
//! Flags, ports and environment are llm-d's; docs/epp.md lists them and what differs.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use kvroute_router::Listens;
use tracing::{error, info, warn};

use crate::{cli, serve};

mod flags;
mod logging;
mod resolve;
mod rules;
mod table;
mod values;

pub use flags::Flag;
use flags::{Asked, EppFlags};
use rules::Fleet;
pub use table::FLAGS;

/// Runs `kvroute epp` with the arguments behind it; `log` goes before llm-d's flags about logging.
///
/// # Errors
/// A flag or the configuration is wrong, or an address is taken.
pub fn main(args: &cli::Epp, log: Option<&str>) -> anyhow::Result<ExitCode> {
    let flags = match flags::parse(&texts(&args.args)?).map_err(anyhow::Error::msg)? {
        Asked::Help => {
            cli::say(flags::help().trim_end());
            return Ok(ExitCode::SUCCESS);
        }
        Asked::Run(flags) => *flags,
    };
    cli::init_logging(log.unwrap_or_else(|| logging::filter(&flags)), logging::is_json(&flags));
    let env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    rules::check(&flags, &env).map_err(anyhow::Error::msg)?;
    let (config, fleet) = resolve::router(&flags, &env)?;
    for remark in rules::remarks(&flags, &env, &fleet) {
        warn!("{remark}");
    }
    let drain = drain(&flags, &config);
    info!(
        pool = rules::pool_name(&flags, &env),
        namespace = rules::namespace(&flags, &env),
        given = ?flags.given,
        "Starting as Endpoint Picker."
    );
    if let Fleet::Watched(what) = &fleet {
        error!("No endpoints: {}.", rules::unwatched(what));
    }
    serve::run(config, drain, flag_of)
}

/// The flag that says where something listens.
fn flag_of(what: Listens) -> &'static str {
    match what {
        Listens::ExtProc => "--grpc-port",
        Listens::Health => "--grpc-health-port",
        Listens::Metrics => "--metrics-port",
        Listens::Admin | Listens::Clients => "--admin",
    }
}

fn texts(args: &[OsString]) -> anyhow::Result<Vec<String>> {
    let text = |arg: &OsString| {
        let text = arg.to_str().map(str::to_owned);
        text.with_context(|| format!("the argument {} is no text (UTF-8)", arg.display()))
    };
    args.iter().map(text).collect()
}

/// How long ext_proc goes on after SIGTERM.
fn drain(flags: &EppFlags, config: &kvroute_router::RouterConfig) -> Duration {
    let planned = Duration::from_secs(u64::from(config.plan.settings.drain_timeout_s));
    flags.drain_timeout.unwrap_or(planned)
}
