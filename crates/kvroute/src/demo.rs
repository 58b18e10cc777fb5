//! `kvroute demo`: 8 simulated engines, the real router and a load; round robin beside kvroute
//! routing, one after the other, so that neither takes the other's processor time. With an Envoy,
//! kvroute's run once more behind it.

mod fleet;
mod view;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use kvroute_lab::load::{Load, LoadConfig, Measured};
use kvroute_lab::record::RunRecord;
use kvroute_lab::report::Report;
use kvroute_lab::scenario::Scenario;
use kvroute_router::RouterHandle;
use kvroute_tokens::Tokenizer;

use crate::cli::{self, say};
use crate::envoy::{Envoy, STANDALONE, Template};
use crate::{config, serve};
use fleet::Fleet;
use view::View;

/// Simulated engines.
const ENGINES: usize = 8;
/// The second run, by our own policy.
const KVROUTE: &str = "kvroute";
/// The third run: the same policy, asked by Envoy.
const ENVOY: &str = "kvroute-envoy";
/// How much faster than the modelled hardware (Qwen3-32B on two H100) the engines run.
const SPEED: f64 = 2.0;
/// KV blocks of one engine: all engines together hold 1.37 times the workload, as in the
/// published benchmark (73 % of the capacity).
const KV_BLOCKS: u32 = 3085;
const DURATION_S: f64 = 14.0;
const QUICK_DURATION_S: f64 = 6.0;

/// The published workload (150 groups of 5 users, 6,000 and 1,200 tokens) with fewer groups; more
/// requests per second than round robin can serve, and fewer than kvroute can.
const SCENARIO: &str = "
name: demo
description: The published workload with 24 groups on 8 simulated engines at double speed
fleet: {engines: 8, profile: qwen3-32b-tp2-h100, kv_tokens: 49360, block_size: 16}
workload:
  {kind: shared-prefix, groups: 24, users: 5, prefix_tokens: 6000, question_tokens: 1200,
   output_tokens: 64}
load: {arrivals: constant, stages: [{rate: 45, duration_s: DURATION_S}]}
client: {in_flight_max: 4096}
";

/// Runs `kvroute demo`.
///
/// # Errors
/// The engines or the router do not start, or the load generator was too late for its figures to
/// mean anything.
pub fn main(args: &cli::Demo) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(compare(args))?;
    view::table(report.summary());
    if let Some(dir) = &args.out {
        report.write(dir).with_context(|| format!("--out {}", dir.display()))?;
        say(&format!("\nThe report: {}", dir.join("report.html").display()));
    }
    if args.json {
        say(&serde_json::to_string(report.summary())?);
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(ExitCode::SUCCESS)
}

/// Runs the workload under both plans, and the second once more behind Envoy if there is one.
///
/// # Errors
/// As [`main`].
pub async fn compare(args: &cli::Demo) -> anyhow::Result<Report> {
    if let Some(binary) = &args.envoy {
        Envoy::check(binary).context("--envoy")?;
    }
    let duration_s = if args.quick { QUICK_DURATION_S } else { DURATION_S };
    let text = SCENARIO.replace("DURATION_S", &duration_s.to_string());
    let scenario = Scenario::parse(&text, "the demo's scenario")?;
    let mut view = View::new(ENGINES);
    let mut records = Vec::new();
    for name in ["round-robin", KVROUTE] {
        records.push(run(name, args, &scenario, &mut view).await?);
    }
    if args.envoy.is_some() {
        records.push(run(ENVOY, args, &scenario, &mut view).await?);
    }
    Ok(Report::new(&scenario, &records))
}

async fn run(
    name: &'static str,
    args: &cli::Demo,
    scenario: &Scenario,
    view: &mut View,
) -> anyhow::Result<RunRecord> {
    let tokenizer = Tokenizer::demo();
    let fleet = Fleet::start(ENGINES, KV_BLOCKS, SPEED, &tokenizer, args.seed).await?;
    let behind = args.envoy.as_deref().filter(|_| name == ENVOY);
    let preset = config::preset(if name == ENVOY { KVROUTE } else { name })?;
    let router = fleet.route(preset, &tokenizer, args.seed).await?;
    fleet.wait_until_known(&router).await?;
    let envoy = match behind {
        Some(binary) => Some(in_front(binary, &router).await?),
        None => None,
    };
    let door = envoy.as_ref().map_or(Ok(router.http_addr()), Envoy::http_addr)?;
    let url = format!("http://{door}");
    let config = LoadConfig {
        seed: args.seed,
        timeout: Duration::from_secs(60),
        endpoints: fleet.engines().iter().map(|engine| engine.http_addr().to_string()).collect(),
        ..LoadConfig::new(name, &url, fleet::MODEL)
    };
    view.begin(name, router.admin_addr());
    let load = Load::new(config, scenario, Path::new("."), &tokenizer)?;
    let progress = |progress| view.draw(progress, &fleet, &router);
    let measured = load.run(Some(fleet.looks()), std::future::pending(), progress).await;
    view.end();
    check(name, &measured)?;
    if args.keep && name == KVROUTE {
        keep(&router).await?;
    }
    drop(envoy);
    router.shutdown(Duration::from_secs(5)).await;
    fleet.shutdown().await;
    Ok(measured.record)
}

/// Envoy as a sidecar of the router.
async fn in_front(binary: &Path, router: &RouterHandle) -> anyhow::Result<Envoy> {
    let ext_proc = router.ext_proc_addr().context("the router does not serve ext_proc")?;
    let template = Template::new(STANDALONE).on_loopback(ext_proc)?.without("tls")?;
    Envoy::start(binary, &template).await
}

/// Waits until somebody has seen enough.
async fn keep(router: &RouterHandle) -> anyhow::Result<()> {
    let (http, admin) = (router.http_addr(), router.admin_addr());
    say(&format!(
        "\nEngines and router go on until Ctrl-C, requests at http://{http}. Why did one go where \
         it went?\n\n  kvroute explain --decision last --admin http://{admin}\n"
    ));
    serve::stop_signal().await.context("cannot listen for signals")
}

fn check(name: &str, measured: &Measured) -> anyhow::Result<()> {
    if let Some((kind, failure)) = measured.failures.iter().next() {
        bail!("{name}: a request failed: {kind}: {}", failure.example);
    }
    if !measured.valid {
        let lag = measured.record.lag.unwrap_or_default();
        bail!(
            "{name}: requests left late (99th percentile {:.0} ms, at most {:.0} ms), so the \
             figures would be the load generator's own; run it on a quieter machine",
            lag.p99 * 1e3,
            lag.max * 1e3
        );
    }
    measured.record.requests.first().map(|_| ()).context("no request was sent")
}
