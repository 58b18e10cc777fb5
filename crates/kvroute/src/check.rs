//! `kvroute check`: does a configuration load, and what does it do?

use std::process::ExitCode;

use anyhow::{Context, bail};

use crate::{cli, config};

/// Runs `kvroute check`.
///
/// # Errors
/// A flag contradicts another one, or a file cannot be read or is wrong.
pub fn main(args: &cli::Check) -> anyhow::Result<ExitCode> {
    let engines = &args.engines;
    if !args.live && !(engines.endpoints.is_empty() && engines.endpoints_file.is_none()) {
        bail!("endpoints are asked with --live only: add it, or leave the endpoints out");
    }
    for file in &args.files {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
        let plan = config::load_text(&text, &name)?;
        cli::say(&format!("{name}\n{plan}"));
    }
    Ok(ExitCode::SUCCESS)
}
