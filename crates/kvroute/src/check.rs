//! `kvroute check`: does a configuration load, what does it do, and are the engines as it expects
//! them?

use std::path::Path;
use std::process::ExitCode;

use anyhow::{anyhow, bail};
use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::config_tests::{self, TestOutcome};
use kvroute_core::plan::{Experimental, Plan};
use kvroute_router::{EventsConfig, ask};
use kvroute_tokens::TokenizerOptions;
use kvroute_wire::config::ConfigError;
use serde_json::{Value, json};

use crate::config::{text_from, text_of};
use crate::{cli, config};

pub mod live;
mod tests;

/// A file that was looked at.
struct Checked {
    name: String,
    outcome: Result<Good, ConfigError>,
}

/// A file that loads.
struct Good {
    config: EndpointPickerConfig,
    plan: Plan,
    /// What came of the tests that it holds.
    tests: Vec<TestOutcome>,
}

impl Checked {
    fn fails_a_test(&self) -> bool {
        let tests = self.outcome.as_ref().map_or(&[][..], |good| &good.tests);
        tests.iter().any(|test| test.failure.is_some())
    }
}

/// Runs `kvroute check`.
///
/// # Errors
/// A flag contradicts another one, or names something that is wrong.
pub fn main(args: &cli::Check) -> anyhow::Result<ExitCode> {
    let engines = &args.engines;
    let no_endpoints = engines.endpoints.is_empty() && engines.endpoints_file.is_none();
    if args.live == no_endpoints {
        bail!(match args.live {
            true => "no engines: give --live --endpoint URL or --endpoints-file FILE",
            false => "endpoints are asked with --live only: add it, or leave the endpoints out",
        });
    }
    if args.files.iter().filter(|file| is_stdin(file)).count() > 1 {
        bail!("`-` is standard input, which can be read once");
    }
    let experimental = args.allow_experimental_plugins.into();
    let files: Vec<Checked> = args.files.iter().map(|file| check(file, experimental)).collect();
    let all_load = files.iter().all(|file| file.outcome.is_ok());
    // Engines are not held against a configuration that does not load.
    let report = match args.live && all_load {
        true => Some(ask_engines(engines, &events(engines, &files), expected(&files))?),
        false => None,
    };
    match args.json {
        true => cli::say(&json(&files, report.as_ref()).to_string()),
        false => {
            cli::say(text(&files).trim_end());
            report.iter().for_each(|report| cli::say(&report.table()));
        }
    }
    let engines_wrong = report.is_some_and(|report| report.status == live::Status::Wrong);
    let wrong = engines_wrong || files.iter().any(Checked::fails_a_test);
    Ok(match (all_load, wrong) {
        (false, _) => ExitCode::from(2),
        (true, true) => ExitCode::FAILURE,
        (true, false) => ExitCode::SUCCESS,
    })
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

fn check(file: &Path, experimental: Experimental) -> Checked {
    let name = if is_stdin(file) { "<stdin>".to_owned() } else { file.display().to_string() };
    let outcome = read(file, &name).and_then(|text| {
        let (config, plan) = config::read(&text, &name, experimental)?;
        let tests = config_tests::run(&plan, &config.kvroute.tests);
        Ok(Good { config, plan, tests })
    });
    Checked { name, outcome }
}

/// The text of a file, or why it cannot be one of a configuration.
fn read(file: &Path, name: &str) -> Result<String, ConfigError> {
    if is_stdin(file) { text_from(std::io::stdin(), name) } else { text_of(file) }
}

fn expected(files: &[Checked]) -> live::Expected {
    let mut expected = live::Expected::default();
    for file in files {
        if let Ok(good) = &file.outcome {
            expected.add(&file.name, &good.config, &good.plan);
        }
    }
    if files.is_empty() {
        let built_in = EndpointPickerConfig::least_cost();
        expected.add("the built-in configuration", &built_in, &Plan::least_cost());
    }
    expected
}

fn text(files: &[Checked]) -> String {
    let one = |file: &Checked| match &file.outcome {
        Ok(good) => {
            let plan = indented(&good.plan.to_string());
            format!("{}: ok\n\n{plan}\n{}", file.name, indented(&tests::text(&good.tests)))
        }
        Err(error) => format!("{error}\n\n"),
    };
    files.iter().map(one).collect()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn json(files: &[Checked], report: Option<&live::Report>) -> Value {
    let one = |file: &Checked| match &file.outcome {
        Ok(good) => json!({
            "file": file.name,
            "ok": true,
            "plan": good.plan.shown(),
            "tests": tests::json(&good.tests),
        }),
        Err(error) => json!({
            "file": file.name,
            "ok": false,
            "errors": [{
                "line": error.line,
                "column": error.column,
                "path": error.path,
                "message": error.message,
            }],
        }),
    };
    let mut object = json!({"files": files.iter().map(one).collect::<Vec<_>>()});
    if let Some(report) = report {
        object["live"] = json!(report);
    }
    object
}

/// Where events come from by the flags, or the first configuration that says it.
fn events(args: &cli::Engines, files: &[Checked]) -> EventsConfig {
    let plans = files.iter().filter_map(|file| file.outcome.as_ref().ok()).map(|good| &good.plan);
    let built_in = Plan::least_cost();
    let mut said = plans.map(|plan| config::events(args, plan));
    let nothing = EventsConfig::default();
    said.find(|events| *events != nothing).unwrap_or_else(|| config::events(args, &built_in))
}

/// Asks every engine that the flags name. `events` holds for those that say nothing about events.
///
/// # Errors
/// A flag or a file that is named by one is wrong, or a host name cannot be resolved.
pub fn ask_engines(
    args: &cli::Engines,
    events: &EventsConfig,
    expected: live::Expected,
) -> anyhow::Result<live::Report> {
    let flags = config::endpoints(args)?;
    let tokenizers = config::tokenizers(&args.tokenizers, &TokenizerOptions::default())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let engines = ask::engines(flags, args.endpoints_file.as_deref(), events).await;
        let engines = engines.map_err(|error| anyhow!(error))?;
        let question = live::Question::new(engines, tokenizers, expected, args.model.clone());
        Ok(live::run(question).await)
    })
}
