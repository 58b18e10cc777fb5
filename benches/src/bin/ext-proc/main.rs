//! What does an Endpoint Picker cost? Time to decide, CPU, memory, beside what llm-d publishes.
//!
//! The measuring process is the router and nothing else. Envoy, with the messages of its full
//! duplex mode written by hand, and the engines' metrics pages are another one. Allocations are
//! counted.

mod allocations;
mod engines;
mod envoy;
mod load;
mod measure;
#[path = "../router-load/process.rs"]
#[allow(dead_code, reason = "shared with another benchmark, which uses all of it")]
mod process;
mod prompts;
mod report;
mod tls;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const EXAMPLES: &str = "\
Examples:
  ext-proc
      everything, about ten minutes
  ext-proc --configs kvroute --endpoints 10 --prompt-tokens 200 --transports plain
      the case for which llm-d publishes figures";

/// The cost of an Endpoint Picker.
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
    /// Envoy's and the engines' process.
    #[command(hide = true)]
    Load(load::LoadArgs),
    /// The router's process, for one configuration.
    #[command(hide = true)]
    Rows {
        /// What is asked for, as JSON.
        bench: String,
    },
}

/// How Envoy connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Transport {
    Plain,
    Tls,
}

#[derive(Clone, Args, Serialize, Deserialize)]
struct Bench {
    /// Configurations: names of presets.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    #[arg(default_value = "kvroute,llm-d,random")]
    configs: Vec<String>,

    /// Engines.
    #[arg(long, value_delimiter = ',', value_name = "N,...", default_value = "10,100")]
    endpoints: Vec<u32>,

    /// Tokens of a prompt; five sixths are the beginning that a hundredth of the prompts share.
    #[arg(long, value_delimiter = ',', value_name = "N,...", default_value = "200,7200")]
    prompt_tokens: Vec<u32>,

    /// With and without TLS; with it only the first configuration and the fewest engines.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", default_value = "plain,tls")]
    transports: Vec<Transport>,

    /// Requests per second of the open loops, Poisson arrivals.
    #[arg(long, value_name = "N", default_value_t = 500.0)]
    rate: f64,

    /// Tokens of an answer, each a message of its own.
    #[arg(long, value_name = "N", default_value_t = 100)]
    answer_tokens: u32,

    /// Time between them.
    #[arg(long, value_name = "MS", default_value_t = 10)]
    token_gap_ms: u64,

    /// Seconds of each loop.
    #[arg(long, value_name = "S", default_value_t = 8.0)]
    seconds: f64,

    /// Seconds without requests.
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    idle_seconds: f64,

    /// Callers of the closed loop.
    #[arg(long, value_name = "N", default_value_t = 16)]
    callers: u32,

    /// Threads of the router; 0: as many as cores.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,

    /// Seconds to wait at most until nothing else works on the machine, before each row.
    #[arg(long, value_name = "S", default_value_t = 60)]
    wait_seconds: u64,

    /// How often a loop is run at most while the machine is not quiet; the quietest counts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    attempts: u32,

    /// `tokenizer.json`; without it Qwen3's where `scripts/fetch-tokenizers.sh` puts it, else the
    /// small built-in one.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Some(Command::Load(args)) => load::main(&args).map(|()| true),
        Some(Command::Rows { bench }) => rows(&bench).map(|()| true),
        None => bench(cli.bench),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("Some requests failed: see above.");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("ext-proc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn rows(bench: &str) -> anyhow::Result<()> {
    let rows = measure::one(&serde_json::from_str(bench)?)?;
    println!("{}", serde_json::to_string(&rows)?);
    Ok(())
}

/// Whether every request was answered.
fn bench(mut args: Bench) -> anyhow::Result<bool> {
    let usual = Path::new("../target/tokenizers/qwen3/tokenizer.json");
    let usual = [usual, Path::new("target/tokenizers/qwen3/tokenizer.json")];
    let found = || usual.into_iter().find(|file| file.is_file()).map(Path::to_owned);
    args.tokenizer = args.tokenizer.or_else(found);
    println!("{}", report::conditions(&args));
    let rows = measure::all(&args)?;
    println!("{}", report::tables(&args, &rows));
    Ok(rows.iter().all(|row| row.errors == 0))
}

/// The tokenizer in `file`, or the built-in one.
fn tokenizer(file: Option<&Path>) -> anyhow::Result<Tokenizer> {
    match file {
        None => Ok(Tokenizer::demo()),
        Some(path) => Tokenizer::load(path, &TokenizerOptions::default())
            .with_context(|| format!("--tokenizer {}", path.display())),
    }
}
