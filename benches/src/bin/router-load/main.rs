//! What does a router cost, and does it stay small?
//!
//! Sends the same shared-prefix load through one router after another to eight simulated engines
//! on the loopback interface and prints, ratios to a plain hyper pass-through first: CPU of the
//! router process for each 1,000 requests, requests for each core, latency added over no router at
//! all, resident memory over time and around prompts of a million tokens, CPU without requests in
//! front of a hundred engines, errors. Engines, router and load generator are processes of their
//! own. Every figure of a run whose generator was late is withheld.

mod engines;
mod envoy;
mod memory;
mod open_loop;
mod process;
mod report;
mod saturate;
mod target;
mod work;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};

use engines::Engines;
use open_loop::OpenLoop;
use report::{Report, Row};
use saturate::Shape;
use target::{Kind, Paths, Target};
use work::Work;

const EXAMPLES: &str = "\
Examples:
  router-load --tokenizer ../target/tokenizers/qwen3/tokenizer.json
      everything, of every router that is installed
  router-load --quick --targets passthrough,kvroute,envoy --parts closed
      CPU of a request, in a minute
  router-load --targets kvroute --seconds 300 --token-gap-ms 10 --parts open
      is its memory flat?";

/// Load through routers, side by side.
#[derive(Parser)]
#[command(after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Command {
    /// The engines' process.
    #[command(hide = true)]
    Engines(engines::EnginesArgs),
}

#[derive(Args)]
struct Bench {
    /// What to measure; without it everything. Others are compared with `direct` (no router) and
    /// `passthrough`, where these are among them. Peers that are not installed are left out.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", value_enum)]
    targets: Vec<Kind>,

    /// What to measure of each.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", value_enum)]
    #[arg(default_values_t = Part::ALL)]
    parts: Vec<Part>,

    /// Shorter loops, one attempt each.
    #[arg(long)]
    quick: bool,

    /// Requests per second, open loop, Poisson arrivals.
    #[arg(long, value_name = "N", default_value_t = 200.0)]
    rate: f64,

    /// Seconds that are measured.
    #[arg(long, value_name = "S", default_value_t = 30)]
    seconds: u64,

    /// Seconds of the same load before them.
    #[arg(long, value_name = "S", default_value_t = 10)]
    warmup_seconds: u64,

    /// Bytes of a prompt, about; five sixths are the prefix that its group shares.
    #[arg(long, value_name = "N", default_value_t = 30_000)]
    prompt_bytes: u32,

    /// Groups that share a prefix.
    #[arg(long, value_name = "N", default_value_t = 152)]
    groups: u32,

    /// Different prompts in each group.
    #[arg(long, value_name = "N", default_value_t = 80)]
    users: u32,

    /// Tokens of an answer, each streamed in a chunk of its own.
    #[arg(long, value_name = "N", default_value_t = 16)]
    output_tokens: u32,

    /// Time between tokens; 0: as fast as the engine can, so chunks come in bursts. One open loop
    /// for each.
    #[arg(long, value_delimiter = ',', value_name = "MS,...", default_value = "0,10")]
    token_gap_ms: Vec<u64>,

    /// Seconds of each closed loop.
    #[arg(long, value_name = "S", default_value_t = 5)]
    saturate_seconds: u64,

    /// How often the targets take turns at the closed loops; of each loop the one with the median
    /// CPU counts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: u32,

    /// Seconds without requests.
    #[arg(long, value_name = "S", default_value_t = 10)]
    idle_seconds: u64,

    /// Engines behind a router without requests.
    #[arg(long, value_name = "N", default_value_t = 100)]
    idle_engines: u32,

    /// Tokens of a very long prompt.
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    long_prompt_tokens: u32,

    /// Seconds to wait at most until nothing else works on the machine, before each run.
    #[arg(long, value_name = "S", default_value_t = 60)]
    wait_seconds: u64,

    /// How often an open loop is run at most while the generator is late or the machine is not
    /// quiet; the quietest counts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    attempts: u32,

    /// Simulated engines.
    #[arg(long, value_name = "N", default_value_t = 8)]
    engines: u32,

    /// KV blocks of 16 tokens in each engine.
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    kv_blocks: u32,

    /// `tokenizer.json` of engines and router; without it the small built-in one.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// The router.
    #[arg(long, value_name = "FILE", default_value = "../target/release/kvroute")]
    kvroute: PathBuf,

    /// Folder of the Python environment that `scripts/peers.sh` makes.
    #[arg(long, value_name = "DIR", default_value = "target/peers")]
    peers: PathBuf,

    /// Where routers' logs and configurations go.
    #[arg(long, value_name = "DIR", default_value = "target/logs")]
    logs: PathBuf,

    /// Also write all figures, the memory samples included, there.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Requests at a fixed rate: latency, CPU, memory.
    Open,
    /// 8 connections that ask again at once: CPU of a request.
    Closed,
    /// 64 streams of 1,000 tokens, 10 ms apart.
    Paced,
    /// No requests, many engines.
    Idle,
    /// Prompts of a million tokens.
    Memory,
}

impl Part {
    const ALL: [Part; 5] = [Part::Open, Part::Closed, Part::Paced, Part::Idle, Part::Memory];
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

/// Gap between the tokens of paced streams.
const PACED_GAP_MS: u64 = 10;
/// Engines that very long prompts go to, and rounds of them.
const LONG_ENGINES: u32 = 2;
const LONG_ROUNDS: u32 = 3;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Some(Command::Engines(args)) => engines::main(args).await.map(|()| true),
        None => bench(cli.bench.shortened()).await,
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("Some requests failed, or the generator was late: see the tables.");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("router-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every figure counts.
async fn bench(args: Bench) -> anyhow::Result<bool> {
    anyhow::ensure!(args.engines > 0 && args.engines <= 64, "--engines: 1 to 64");
    anyhow::ensure!(args.seconds > 0, "--seconds must be above 0");
    std::fs::create_dir_all(&args.logs).context("--logs")?;
    let paths = Paths::new(&args.kvroute, &args.peers, &args.logs, args.tokenizer.clone())?;
    let work = Work::new(&args.shape(), args.tokenizer.as_deref())?;
    let wants_long = args.parts.contains(&Part::Memory);
    let long = wants_long.then(|| Work::new(&args.long(), args.tokenizer.as_deref()));
    let long = long.transpose()?;
    let mut report = Report::new(args.conditions(&work));
    let kinds = args.kinds(&paths);
    report.rows.extend(kinds.iter().map(|kind| Row::new(kind.name())));
    for round in 0..args.rounds.max(1) {
        for (kind, row) in kinds.iter().zip(&mut report.rows) {
            let works = (&work, long.as_ref());
            if let Err(error) = args.measure(*kind, &paths, works, round, row).await {
                eprintln!("{}: {error:#}", kind.name());
                row.broken = Some(format!("{error:#}"));
            }
        }
    }
    for row in &mut report.rows {
        row.closed = saturate::medians(std::mem::take(&mut row.closed));
    }
    println!("{}", report.markdown());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?).context("--json")?;
    }
    Ok(report.all_good())
}

impl Bench {
    fn shape(&self) -> work::Shape {
        // Prompts take long to make, and the other parts send none of these.
        let is_sent = |part: &Part| matches!(part, Part::Open | Part::Closed | Part::Paced);
        let (groups, users) = match self.parts.iter().any(is_sent) {
            true => (self.groups, self.users),
            false => (self.engines, 1),
        };
        work::Shape {
            engines: self.engines,
            groups,
            users,
            prompt: work::Length::Bytes(self.prompt_bytes),
            output_tokens: self.output_tokens,
        }
    }

    /// A few very long prompts.
    fn long(&self) -> work::Shape {
        work::Shape {
            engines: LONG_ENGINES,
            groups: LONG_ENGINES,
            users: 2,
            prompt: work::Length::Tokens(self.long_prompt_tokens),
            output_tokens: 1,
        }
    }

    fn shortened(self) -> Bench {
        if !self.quick {
            return self;
        }
        Bench {
            seconds: self.seconds.min(8),
            warmup_seconds: self.warmup_seconds.min(3),
            saturate_seconds: self.saturate_seconds.min(2),
            idle_seconds: self.idle_seconds.min(5),
            wait_seconds: self.wait_seconds.min(3),
            attempts: 1,
            ..self
        }
    }

    fn conditions(&self, work: &Work) -> report::Conditions {
        report::Conditions {
            rate: self.rate,
            seconds: self.seconds,
            warmup_seconds: self.warmup_seconds,
            engines: self.engines,
            prompts: work.prompts(),
            prompt_bytes: work.mean_bytes(),
            prompt_tokens: work.mean_tokens(),
            output_tokens: self.output_tokens,
        }
    }

    /// What to measure, in order.
    fn kinds(&self, paths: &Paths) -> Vec<Kind> {
        let asked = if self.targets.is_empty() { &Kind::ALL[..] } else { &self.targets };
        let wanted = |kind: &Kind| asked.contains(kind);
        let (found, missing): (Vec<Kind>, Vec<Kind>) =
            Kind::ALL.into_iter().filter(wanted).partition(|kind| paths.has(*kind));
        for kind in missing {
            eprintln!("{}: not installed (scripts/peers.sh), left out", kind.name());
        }
        found
    }

    async fn start(
        &self,
        kind: Kind,
        engines: engines::EnginesArgs,
        paths: &Paths,
    ) -> anyhow::Result<(Engines, Target)> {
        let engines = Engines::start(&engines).await?;
        process::quiet(Duration::from_secs(self.wait_seconds)).await;
        let target = Target::start(kind, paths, &engines.addresses).await?;
        Ok((engines, target))
    }

    /// The engines of most loads.
    fn engines(&self, token_gap_ms: u64) -> engines::EnginesArgs {
        engines::EnginesArgs {
            count: self.engines,
            token_gap_ms,
            kv_blocks: self.kv_blocks,
            max_model_len: 131_072,
            tokenizer: self.tokenizer.clone(),
        }
    }

    async fn measure(
        &self,
        kind: Kind,
        paths: &Paths,
        (work, long): (&Work, Option<&Work>),
        round: u32,
        row: &mut Row,
    ) -> anyhow::Result<()> {
        for part in &self.parts {
            match part {
                part if round > 0 && *part != Part::Closed => {}
                Part::Open => self.open(kind, paths, work, row).await?,
                Part::Closed => {
                    eprintln!("{}: closed loops", kind.name());
                    row.closed.extend(self.loops(kind, paths, work, &Shape::CLOSED, 0).await?);
                }
                Part::Paced => {
                    eprintln!("{}: streams, tokens {PACED_GAP_MS} ms apart", kind.name());
                    let shapes = [Shape::Paced];
                    row.paced = self.loops(kind, paths, work, &shapes, PACED_GAP_MS).await?;
                }
                Part::Idle if kind == Kind::Direct => {}
                Part::Idle => row.idle = Some(self.idle(kind, paths).await?),
                Part::Memory if kind == Kind::Direct => {}
                Part::Memory => {
                    if let Some(long) = long {
                        row.long_prompts = Some(self.long_prompts(kind, paths, long).await?);
                    }
                }
            }
        }
        Ok(())
    }

    async fn open(
        &self,
        kind: Kind,
        paths: &Paths,
        work: &Work,
        row: &mut Row,
    ) -> anyhow::Result<()> {
        for &gap_ms in &self.token_gap_ms {
            eprintln!("{}: {} requests/s, tokens {gap_ms} ms apart", kind.name(), self.rate);
            let mut measured = self.open_loop(kind, gap_ms, paths, work).await?;
            for _ in 1..self.attempts {
                if measured.valid && measured.other_cores <= process::QUIET_CORES {
                    break;
                }
                let (cores, lag_ms) = (measured.other_cores, measured.lag_p99_ms);
                eprintln!("  again: others used {cores:.1} cores, requests {lag_ms:.1} ms late");
                let again = self.open_loop(kind, gap_ms, paths, work).await?;
                if again.valid && (!measured.valid || again.other_cores < measured.other_cores) {
                    measured = again;
                }
            }
            row.open.push((gap_ms, measured));
        }
        Ok(())
    }

    async fn open_loop(
        &self,
        kind: Kind,
        gap_ms: u64,
        paths: &Paths,
        work: &Work,
    ) -> anyhow::Result<open_loop::Measured> {
        let (engines, target) = self.start(kind, self.engines(gap_ms), paths).await?;
        let measured = OpenLoop {
            rate: self.rate,
            warmup: Duration::from_secs(self.warmup_seconds),
            span: Duration::from_secs(self.seconds),
        }
        .run(&target, &engines, work)
        .await?;
        target.stop().await;
        engines.stop().await;
        Ok(measured)
    }

    async fn loops(
        &self,
        kind: Kind,
        paths: &Paths,
        work: &Work,
        shapes: &[Shape],
        gap_ms: u64,
    ) -> anyhow::Result<Vec<saturate::Measured>> {
        let (engines, target) = self.start(kind, self.engines(gap_ms), paths).await?;
        let span = Duration::from_secs(self.saturate_seconds.max(1));
        let mut all = Vec::new();
        for shape in shapes {
            all.push(saturate::run(*shape, &target, &engines, work, span).await?);
        }
        target.stop().await;
        engines.stop().await;
        Ok(all)
    }

    async fn idle(&self, kind: Kind, paths: &Paths) -> anyhow::Result<memory::Idle> {
        eprintln!("{}: idle, {} engines", kind.name(), self.idle_engines);
        let count = self.idle_engines;
        let (kv_blocks, max_model_len) = (1_024, 8_192);
        let few = engines::EnginesArgs { count, kv_blocks, max_model_len, ..self.engines(0) };
        let (engines, target) = self.start(kind, few, paths).await?;
        let span = Duration::from_secs(self.idle_seconds.max(1));
        let idle = memory::idle(&target, count, span).await;
        target.stop().await;
        engines.stop().await;
        Ok(idle)
    }

    async fn long_prompts(
        &self,
        kind: Kind,
        paths: &Paths,
        work: &Work,
    ) -> anyhow::Result<memory::LongPrompts> {
        eprintln!("{}: prompts of {} tokens", kind.name(), self.long_prompt_tokens);
        let max_model_len = self.long_prompt_tokens.saturating_mul(2);
        let large = engines::EnginesArgs {
            count: LONG_ENGINES,
            max_model_len,
            kv_blocks: max_model_len / 16 + 64,
            ..self.engines(0)
        };
        let (engines, target) = self.start(kind, large, paths).await?;
        let seen = memory::long_prompts(&target, work, LONG_ROUNDS).await;
        target.stop().await;
        engines.stop().await;
        Ok(seen)
    }
}
