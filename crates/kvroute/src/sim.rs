//! `kvroute sim`: a scenario under one or several configurations, in virtual time.

mod show;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, anyhow, bail};
use kvroute_core::decision::DecisionRecord;
use kvroute_core::plan::Experimental;
use kvroute_lab::chaos;
use kvroute_lab::record::RunRecord;
use kvroute_lab::report::Report;
use kvroute_lab::scenario::Scenario;
use kvroute_lab::sim::{self, Arm, Policy, Watch};

use crate::cli::{self, say};
use crate::{config, recording};
use show::Progress;

/// The configurations that are compared when none is named: the published ones and our own.
const COMPARED: [&str; 5] = ["random", "load", "estimated", "precise", "kvroute"];

/// The name of the placement that knows the workload beforehand.
const ORACLE: &str = "oracle";

/// Runs `kvroute sim`.
///
/// # Errors
/// A scenario or a configuration is wrong, or a file cannot be read or written.
pub fn main(args: &cli::Sim) -> anyhow::Result<ExitCode> {
    if args.list {
        return list();
    }
    if let Some(seed) = args.fault_seed {
        return repeat_faults(seed, args.fault_steps, args.json);
    }
    if let Some(path) = &args.recording {
        let other = match args.config.as_slice() {
            [] => None,
            [one] => Some(PathBuf::from(one)),
            _ => bail!("--recording takes one --config at most"),
        };
        return recording::main(path, other.as_deref(), args.json);
    }
    let report = simulate(args)?;
    if let Some(dir) = &args.out {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create the folder {}", dir.display()))?;
        report.write(dir).with_context(|| format!("cannot write to {}", dir.display()))?;
    }
    match args.json {
        true => say(&report.json()),
        false => show::table(report.summary(), args.out.as_deref()),
    }
    Ok(ExitCode::SUCCESS)
}

fn simulate(args: &cli::Sim) -> anyhow::Result<Report> {
    let (scenario, folder) = Scenario::load(&args.scenario)?;
    let arms = arms(&args.config, args.allow_experimental_plugins.into())?;
    let seeds: Vec<u64> = (0..u64::from(args.seeds)).map(|i| args.seed.wrapping_add(i)).collect();
    let jobs: Vec<(&Arm, u64)> =
        arms.iter().flat_map(|arm| seeds.iter().map(move |seed| (arm, *seed))).collect();
    if args.decisions.is_some() && jobs.len() != 1 {
        bail!("--decisions is for one configuration and one seed, this would run {}", jobs.len());
    }
    let records = match &args.decisions {
        Some(path) => vec![logged(&scenario, &folder, jobs[0], path)?],
        None => parallel(&scenario, &folder, &jobs, args.threads)?,
    };
    Ok(Report::new(&scenario, &records))
}

/// The named configurations: presets, or files, which are called by their stems.
fn arms(names: &[String], experimental: Experimental) -> anyhow::Result<Vec<Arm>> {
    let all: Vec<String> = match names {
        [] => COMPARED.map(str::to_owned).to_vec(),
        names => names.to_vec(),
    };
    let mut arms: Vec<Arm> = Vec::new();
    for given in all {
        let arm = arm(&given, experimental)?;
        if arms.iter().any(|other| other.name == arm.name) {
            bail!("two configurations are called {}; rename one of the files", arm.name);
        }
        arms.push(arm);
    }
    Ok(arms)
}

fn arm(given: &str, experimental: Experimental) -> anyhow::Result<Arm> {
    let path = Path::new(given);
    if given == ORACLE && !path.exists() {
        return Ok(Arm { name: given.to_owned(), policy: Policy::Oracle });
    }
    let plan = config::preset_or_file(given, experimental)?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = stem.unwrap_or_else(|| given.to_owned());
    Ok(Arm { name, policy: Policy::Plan(Box::new(plan)) })
}

/// Runs the jobs on as many threads as there are cores; the order of the results is that of the
/// jobs.
fn parallel(
    scenario: &Scenario,
    folder: &Path,
    jobs: &[(&Arm, u64)],
    threads: Option<usize>,
) -> anyhow::Result<Vec<RunRecord>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or(cores).clamp(1, jobs.len().max(1));
    let progress = Progress::new(jobs.len());
    let next = AtomicUsize::new(0);
    let done: Mutex<BTreeMap<usize, Result<RunRecord, sim::SimError>>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((arm, seed)) = jobs.get(at) else { break };
                    let mut report = |now: sim::Progress| progress.at(at, now);
                    let mut watch = Watch { progress: &mut report, decisions: None };
                    let run = sim::run(scenario, folder, arm, *seed, &mut watch);
                    progress.done(at);
                    lock(&done).insert(at, run);
                }
            });
        }
    });
    progress.end();
    let done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.into_values().collect::<Result<Vec<_>, _>>().map_err(Into::into)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// One run whose decisions are written down, one JSON object a line.
fn logged(
    scenario: &Scenario,
    folder: &Path,
    (arm, seed): (&Arm, u64),
    path: &Path,
) -> anyhow::Result<RunRecord> {
    let name = path.display();
    let file = File::create(path).with_context(|| format!("cannot write {name}"))?;
    let mut out = BufWriter::new(file);
    let mut failed = None;
    let mut log = |record: &DecisionRecord| {
        let written = serde_json::to_writer(&mut out, record)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(out.write_all(b"\n")?));
        failed = failed.take().or(written.err());
    };
    let progress = Progress::new(1);
    let mut report = |now: sim::Progress| progress.at(0, now);
    let mut watch = Watch { progress: &mut report, decisions: Some(&mut log) };
    let run = sim::run(scenario, folder, arm, seed, &mut watch)?;
    progress.end();
    match failed.or(out.flush().err().map(Into::into)) {
        Some(error) => Err(error.context(format!("cannot write {name}"))),
        None => Ok(run),
    }
}

fn list() -> anyhow::Result<ExitCode> {
    say("scenarios:");
    for (name, _) in Scenario::BUILT_IN {
        let scenario = Scenario::built_in(name)?;
        say(&format!("  {name:<18} {}", scenario.description.trim()));
    }
    say("configurations:");
    for (name, text) in config::PRESETS {
        say(&format!("  {name:<18} {}", config::about(text)));
    }
    say(&format!(
        "  {ORACLE:<18} group g to engine g modulo engines: knows the workload beforehand"
    ));
    Ok(ExitCode::SUCCESS)
}

fn repeat_faults(seed: u64, steps: Option<u32>, json: bool) -> anyhow::Result<ExitCode> {
    match chaos::run(seed, steps.unwrap_or(chaos::STEPS), true) {
        Ok(report) => {
            if json {
                say(&serde_json::to_string(&report)?);
            } else {
                report.trace.iter().for_each(|line| say(line));
                let (steps, plan) = (report.steps, report.plan);
                say(&format!("seed {seed}: every invariant held ({steps} steps, plan {plan})"));
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => Err(anyhow!("{failure}")),
    }
}
