//! `kvroute demo`: 8 simulated engines, the real router and a load; round robin beside precise
//! routing, one after the other, so that neither takes the other's processor time.

mod fleet;
mod view;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use kvroute_core::plan::Plan;
use kvroute_lab::load::{self, LoadConfig, LoadReport};
use kvroute_lab::summary::{Run, SummaryFile};
use kvroute_lab::workload::{Order, SharedPrefix, Workload};
use kvroute_tokens::Tokenizer;

use crate::cli::{self, say};
use fleet::Fleet;
use view::View;

/// Simulated engines.
const ENGINES: usize = 8;
/// How much faster than the modelled hardware (Qwen3-32B on two H100) the engines run.
const SPEED: f64 = 2.0;
/// KV blocks of one engine: all engines together hold 1.37 times the workload, as in the
/// published benchmark (73 % of the capacity).
const KV_BLOCKS: u32 = 3085;
/// Requests per second: above what round robin can serve, below what precise routing can.
const RATE: f64 = 45.0;
const DURATION_S: f64 = 14.0;
const QUICK_DURATION_S: f64 = 6.0;

/// The published workload (150 groups of 5 users, 6,000 and 1,200 tokens) with fewer groups.
const WORKLOAD: SharedPrefix = SharedPrefix {
    groups: 24,
    users: 5,
    prefix_tokens: 6000,
    question_tokens: 1200,
    output_tokens: 64,
    order: Order::Cyclic,
    seed: 0,
};

/// Runs `kvroute demo`.
///
/// # Errors
/// The engines or the router do not start, or the load generator was too late for its figures to
/// mean anything.
pub fn main(args: &cli::Demo) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let file = runtime.block_on(compare(args))?;
    view::table(&file);
    if args.json {
        say(&serde_json::to_string(&file)?);
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(ExitCode::SUCCESS)
}

/// Runs the workload under both plans.
///
/// # Errors
/// As [`main`].
pub async fn compare(args: &cli::Demo) -> anyhow::Result<SummaryFile> {
    let tokenizer = Tokenizer::demo();
    let spec = SharedPrefix { seed: args.seed, ..WORKLOAD };
    let workload = Arc::new(Workload::shared_prefix(&spec, &tokenizer)?);
    let mut file = SummaryFile::new("demo", args.seed);
    let mut view = View::new(ENGINES);
    for (name, plan) in
        [("round-robin", Plan::baseline_round_robin()), ("precise", Plan::precise())]
    {
        let run = run(name, plan, args, &tokenizer, &workload, &mut view).await?;
        file.runs.push(run);
    }
    Ok(file)
}

async fn run(
    name: &'static str,
    plan: Plan,
    args: &cli::Demo,
    tokenizer: &Tokenizer,
    workload: &Arc<Workload>,
    view: &mut View,
) -> anyhow::Result<Run> {
    let fleet = Fleet::start(ENGINES, KV_BLOCKS, SPEED, tokenizer, args.seed).await?;
    let router = fleet.route(plan, tokenizer, args.seed).await?;
    fleet.wait_until_known(&router).await?;
    let duration_s = if args.quick { QUICK_DURATION_S } else { DURATION_S };
    let url = format!("http://{}", router.http_addr());
    let config = LoadConfig {
        seed: args.seed,
        timeout: Duration::from_secs(60),
        lag_max: Duration::from_millis(250),
        ..LoadConfig::new(&url, fleet::MODEL, RATE, duration_s)
    };
    view.begin(name, router.admin_addr());
    let report = {
        let progress = |progress| view.draw(progress, &fleet, &router);
        load::run(&config, workload, Some(fleet.probe()), progress).await?
    };
    view.end();
    check(name, &report)?;
    router.shutdown(Duration::from_secs(5)).await;
    fleet.shutdown().await;
    Ok(report.run(name))
}

fn check(name: &str, report: &LoadReport) -> anyhow::Result<()> {
    if let Some(error) = report.outcomes.iter().find_map(|outcome| outcome.error.as_deref()) {
        bail!("{name}: a request failed: {error}");
    }
    if !report.valid {
        bail!(
            "{name}: requests left up to {:.0} ms late, so the figures would be the load \
             generator's own; run it on a quieter machine",
            report.lag.max * 1e3
        );
    }
    report.outcomes.first().map(|_| ()).context("no request was sent")
}
