//! `kvroute bench`: a scenario against real servers, measured from the outside.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kvroute_lab::load::{self, Load, LoadApi, LoadConfig, Measured, Progress, PromptForm, Scraper};
use kvroute_lab::report::Report;
use kvroute_lab::scenario::Scenario;
use kvroute_lab::summary::{Run, Summary};

use crate::cli::{self, say, tell};
use crate::{engine, serve};

const REDRAW: Duration = Duration::from_millis(200);
const BAR: usize = 24;
/// Exit code of a measurement that cannot be used.
const UNUSABLE: u8 = 1;

/// Runs `kvroute bench`. Exit code 1 when a run was late, was stopped, or nothing was answered.
///
/// # Errors
/// A flag is wrong, the scenario cannot be had, or the report cannot be written.
pub fn main(args: &cli::Bench) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (report, usable) = runtime.block_on(bench(args))?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    table(&report.summary().runs, !args.engines.is_empty());
    if let Some(dir) = &args.out {
        report.write(dir).with_context(|| format!("--out {}", dir.display()))?;
        say(&format!("\nThe report: {}", dir.join("report.html").display()));
    }
    if args.json {
        say(&serde_json::to_string(report.summary())?);
    }
    Ok(if usable { ExitCode::SUCCESS } else { ExitCode::from(UNUSABLE) })
}

/// Measures every URL, one after the other, and says whether all figures can be used.
///
/// # Errors
/// As [`main`].
pub async fn bench(args: &cli::Bench) -> anyhow::Result<(Report, bool)> {
    let (mut scenario, folder) = Scenario::load(&args.scenario)?;
    if !scenario.faults.is_empty() {
        tell("The faults of the scenario are for the simulation; over HTTP none happens.");
    }
    if args.speed != 1.0 {
        // Other rates than the published ones: nothing to be shown beside.
        scenario.published.clear();
    }
    let tokenizer = engine::tokenizer(args.tokenizer.as_deref())?;
    let targets = targets(&args.urls)?;
    let mut loads = Vec::new();
    for (name, url) in &targets {
        let config = config(args, name, url).await?;
        loads.push(Load::new(config, &scenario, &folder, &tokenizer).context("--url")?);
    }
    let interval = Duration::try_from_secs_f64(scenario.fleet.scrape_interval_s)?;
    let scraper = match args.engines.is_empty() {
        true => None,
        false => Some(Scraper::start(&args.engines, interval).context("--engine")?),
    };
    let (mut records, mut usable) = (Vec::new(), true);
    for ((name, _), load) in targets.iter().zip(loads) {
        let mut bar = Bar::new(name);
        let stop = async {
            // Without a handler for signals the run cannot be stopped early, and goes on.
            if serve::stop_signal().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let looks = scraper.as_ref().map(Scraper::looks);
        let measured = load.run(looks, stop, |progress| bar.draw(&progress)).await;
        bar.end();
        usable &= judge(name, &measured);
        let stopped = measured.partial;
        records.push(measured.record);
        if stopped {
            break;
        }
    }
    Ok((Report::new(&scenario, &records), usable))
}

async fn config(args: &cli::Bench, name: &str, url: &str) -> anyhow::Result<LoadConfig> {
    let api_key = match &args.api_key {
        None => None,
        Some(variable) => {
            let key = std::env::var(variable);
            Some(key.with_context(|| format!("--api-key: no environment variable {variable}"))?)
        }
    };
    let model = match &args.model {
        Some(model) => model.clone(),
        None => load::served_model(url, api_key.as_deref())
            .await
            .context("the server was asked for its model")?,
    };
    let authority = |url: &String| {
        let rest = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
        rest.trim_end_matches('/').to_owned()
    };
    Ok(LoadConfig {
        api: match args.api {
            cli::BenchApi::Completions => LoadApi::Completions,
            cli::BenchApi::Chat => LoadApi::ChatCompletions,
        },
        form: match args.prompt {
            cli::BenchPrompt::Text => PromptForm::Text,
            cli::BenchPrompt::Ids => PromptForm::Ids,
        },
        api_key,
        timeout: Duration::from_secs(args.timeout_s.into()),
        speed: args.speed,
        seed: args.seed,
        endpoints: args.engines.iter().map(authority).collect(),
        ..LoadConfig::new(name, url, &model)
    })
}

/// Names and URLs; without a name a run is called by its host.
fn targets(urls: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    let mut targets: Vec<(String, String)> = Vec::new();
    for text in urls {
        let (name, url) = match text.split_once('=') {
            Some((name, url)) if !name.contains("://") => (name, url),
            _ => (text.split_once("://").map_or(text.as_str(), |(_, host)| host), text.as_str()),
        };
        let name = name.trim_end_matches('/');
        ensure!(!name.is_empty(), "--url {text:?}: the name is empty; write NAME=URL");
        if targets.iter().any(|(other, _)| other == name) {
            bail!("--url {text:?}: two runs are called {name}; write NAME=URL");
        }
        targets.push((name.to_owned(), url.to_owned()));
    }
    Ok(targets)
}

/// Says what is wrong with a measurement, and whether its figures can be used.
fn judge(name: &str, measured: &Measured) -> bool {
    let lag = measured.record.lag.unwrap_or_default();
    let answered = measured.record.requests.iter().filter(|r| r.ttft_s > 0.0).count();
    tell(&format!(
        "{name}: {answered} of {} requests answered; they left late by {:.1} ms (median), \
         {:.1} ms (99th percentile), {:.1} ms (at most)",
        measured.record.requests.len(),
        lag.p50 * 1e3,
        lag.p99 * 1e3,
        lag.max * 1e3
    ));
    for (kind, failure) in &measured.failures {
        tell(&format!("{name}: {} failed: {kind}, first: {}", failure.count, failure.example));
    }
    if measured.without_usage > 0 {
        tell(&format!(
            "{name}: {} answers have no usage: their tokens are counted by events, and none of \
             them counts as cached",
            measured.without_usage
        ));
    }
    if measured.without_cached > 0 {
        tell(&format!(
            "{name}: {} answers do not say how much was cached, so the hit ratio is too low \
             (vLLM: --enable-prompt-tokens-details)",
            measured.without_cached
        ));
    }
    if !measured.valid {
        tell(&format!(
            "\nINVALID: {name}: requests left more than {:.0} ms late (99th percentile), so the \
             figures are the load generator's own. Use a quieter machine, or a lower rate.\n",
            load::LAG_P99_MAX_S * 1e3
        ));
    }
    if measured.partial {
        tell(&format!("PARTIAL: {name}: stopped early; the figures are of what had ended."));
    }
    measured.valid && !measured.partial && answered > 0
}

/// One line of progress on a terminal, nothing in a pipe.
struct Bar<'a> {
    on: bool,
    name: &'a str,
    drawn: Option<Instant>,
}

impl Bar<'_> {
    fn new(name: &str) -> Bar<'_> {
        Bar { on: std::io::stderr().is_terminal(), name, drawn: None }
    }

    fn draw(&mut self, progress: &Progress) {
        if !self.on || self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW) {
            return;
        }
        self.drawn = Some(Instant::now());
        let share = (progress.at_s / progress.planned_s.max(1e-9)).clamp(0.0, 1.0);
        let full = (share * BAR as f64) as usize;
        let text = format!(
            "\r\x1b[2K{} [{}{}] stage {} of {}, {} sent, {} in flight, {} failed, {:.0} s",
            self.name,
            "█".repeat(full),
            "░".repeat(BAR - full),
            progress.stage + 1,
            progress.stages,
            progress.sent,
            progress.sent - progress.ended,
            progress.failed,
            progress.at_s
        );
        // A terminal that went away is no reason to stop measuring.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    fn end(&self) {
        if self.drawn.is_some() {
            tell("");
        }
    }
}

/// Title, value, digits after the point.
type Figure = (&'static str, fn(&Summary) -> f64, usize);

/// The figures of all runs side by side: all requests in one pool, true times. The queue only where
/// engines were looked at.
fn table(runs: &[Run], looked: bool) {
    let figures: [Figure; 9] = [
        ("requests", |s| s.requests as f64, 0),
        ("hit ratio", |s| s.hit_ratio, 3),
        ("TTFT mean, s", |s| s.ttft_s.mean, 3),
        ("TTFT p50, s", |s| s.ttft_s.p50, 3),
        ("TTFT p90, s", |s| s.ttft_s.p90, 3),
        ("TTFT p99, s", |s| s.ttft_s.p99, 3),
        ("time per output token, s", |s| s.itl_s.mean, 4),
        ("output tokens/s", |s| s.output_tokens_per_s, 0),
        ("answers/s", |s| s.requests_per_s, 1),
    ];
    let queue: [Figure; 1] = [("waiting per engine, mean", |s| s.wait_queue.mean, 2)];
    let queue = queue.into_iter().filter(|_| looked);
    let width = runs.iter().map(|run| run.name.chars().count()).max().unwrap_or(0).max(12) + 2;
    let cells = |of: &dyn Fn(&Run) -> String| -> String {
        runs.iter().map(|run| format!("{:>width$}", of(run))).collect()
    };
    say("");
    say(&format!("{:<26}{}", "", cells(&|run| run.name.clone())));
    for (title, value, digits) in figures.into_iter().chain(queue) {
        let cell = |run: &Run| format!("{:.digits$}", value(&run.pooled.summary));
        say(&format!("{title:<26}{}", cells(&cell)));
    }
    say(&format!("{:<26}{}", "failed", cells(&|run| run.failed.to_string())));
    let valid = |run: &Run| if run.valid { "yes" } else { "NO" }.to_owned();
    say(&format!("{:<26}{}", "valid (left on time)", cells(&valid)));
}

#[cfg(test)]
mod tests {
    use kvroute_lab::engine::{self, EngineConfig};
    use kvroute_lab::model::Profile;
    use kvroute_tokens::Tokenizer;

    use super::*;

    #[test]
    fn urls_may_have_names() {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let found = targets(&texts(&["http://a:1/", "new=http://b:2/?x=y"])).unwrap();
        assert_eq!(found[0], ("a:1".to_owned(), "http://a:1/".to_owned()));
        assert_eq!(found[1], ("new".to_owned(), "http://b:2/?x=y".to_owned()));
        assert!(targets(&texts(&["x=http://a", "x=http://b"])).is_err());
        assert!(targets(&texts(&["=http://a"])).is_err());
    }

    #[test]
    fn an_engine_is_measured_and_the_report_written() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let config =
            EngineConfig::loopback("base", Tokenizer::demo(), Profile::built_in("tiny").unwrap());
        let engine = runtime.block_on(engine::serve(config)).unwrap();
        let dir = std::env::temp_dir().join(format!("kvroute-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("mine.yaml");
        let scenario = "
name: mine
fleet: {engines: 1, profile: tiny, kv_tokens: 65536, block_size: 16}
workload: {kind: shared-prefix, groups: 2, users: 2, prefix_tokens: 64, question_tokens: 32,
  output_tokens: 4}
load: {arrivals: even, stages: [{rate: 10, duration_s: 2}]}
";
        std::fs::write(&file, scenario).unwrap();
        let url = format!("http://{}", engine.http_addr());
        let (file, out) = (file.display().to_string(), dir.display().to_string());
        let line = [
            "kvroute",
            "bench",
            "--url",
            &url,
            "--scenario",
            &file,
            "--engine",
            &url,
            "--speed",
            "5",
            "--out",
            &out,
            "--json",
        ];
        let args = cli::Cli::bench_of(line).unwrap();
        let (report, _) = runtime.block_on(bench(&args)).unwrap();
        let run = &report.summary().runs[0];
        assert_eq!((run.summary.requests, run.failed, run.stages[0].rate), (20, 0, 50.0));
        assert!(run.lag_s.is_some() && run.summary.hit_ratio > 0.5);
        // Whether it was on time depends on the machine; that it is written does not.
        main(&args).unwrap();
        let text = std::fs::read_to_string(dir.join("summary.json")).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(summary["scenario"], "mine");
        assert!(dir.join("report.html").exists() && dir.join("report.md").exists());
        std::fs::remove_dir_all(&dir).unwrap();
        runtime.block_on(engine.kill());
    }
}
