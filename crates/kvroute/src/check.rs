//! `kvroute check`: does a configuration load, what does it do, and are the engines as it expects
//! them?

use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::Plan;
use kvroute_router::ask;
use kvroute_tokens::TokenizerOptions;

use crate::{cli, config};

pub mod live;

/// Runs `kvroute check`.
///
/// # Errors
/// A flag contradicts another one, or a file cannot be read or is wrong.
pub fn main(args: &cli::Check) -> anyhow::Result<ExitCode> {
    let engines = &args.engines;
    let no_endpoints = engines.endpoints.is_empty() && engines.endpoints_file.is_none();
    if args.live == no_endpoints {
        bail!(match args.live {
            true => "no engines: give --live --endpoint URL or --endpoints-file FILE",
            false => "endpoints are asked with --live only: add it, or leave the endpoints out",
        });
    }
    let mut expected = live::Expected::default();
    let mut files = Vec::new();
    for file in &args.files {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
        let plan = config::load_text(&text, &name, args.allow_experimental_plugins.into())?;
        let parsed = kvroute_wire::config::parse(&text, &name).map_err(|e| anyhow!("{e}"))?;
        expected.add(&name, &parsed, &plan);
        files.push((name, plan));
    }
    if files.is_empty() {
        let built_in = EndpointPickerConfig::least_cost();
        expected.add("the built-in configuration", &built_in, &Plan::least_cost());
    }
    let report = args.live.then(|| ask_engines(engines, expected)).transpose()?;
    match args.json {
        true => cli::say(&json(&files, report.as_ref()).to_string()),
        false => {
            files.iter().for_each(|(name, plan)| cli::say(&format!("{name}\n{plan}")));
            report.iter().for_each(|report| cli::say(&report.table()));
        }
    }
    let wrong = report.is_some_and(|report| report.status == live::Status::Wrong);
    Ok(if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn json(files: &[(String, Plan)], report: Option<&live::Report>) -> serde_json::Value {
    let files: Vec<_> = files
        .iter()
        .map(|(file, plan)| serde_json::json!({"file": file, "plan": plan.to_string()}))
        .collect();
    match report {
        Some(report) => serde_json::json!({"files": files, "live": report}),
        None => serde_json::json!({"files": files}),
    }
}

/// Asks every engine that the flags name.
///
/// # Errors
/// A flag or a file that is named by one is wrong, or a host name cannot be resolved.
pub fn ask_engines(args: &cli::Engines, expected: live::Expected) -> anyhow::Result<live::Report> {
    let flags = config::endpoints(args)?;
    let tokenizers = config::tokenizers(&args.tokenizers, &TokenizerOptions::default())?;
    let events = config::events(args);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let engines = ask::engines(flags, args.endpoints_file.as_deref(), &events).await;
        let engines = engines.map_err(|error| anyhow!(error))?;
        let question = live::Question::new(engines, tokenizers, expected, args.model.clone());
        Ok(live::run(question).await)
    })
}
