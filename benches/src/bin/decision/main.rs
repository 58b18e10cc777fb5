//! How long does a decision take, from the whole body of a chat to the endpoint? By the live
//! router's own code, without sockets, with the KV events of every endpoint applied.

#[path = "../ext-proc/allocations.rs"]
mod allocations;
mod fleet;
mod measure;
mod prompts;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use kvroute_core::plan::Plan;
use kvroute_tokens::{Tokenizer, TokenizerOptions};

use crate::prompts::Case;

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const EXAMPLES: &str = "\
Examples:
  decision
      everything, about a minute
  decision --endpoints 8 --cases chat-seen --rounds 2000";

/// The time of a decision, by its parts.
#[derive(Parser)]
#[command(after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// The plan that decides.
    #[arg(long, value_delimiter = ',', default_value = "least-cost,precise")]
    plans: Vec<Policy>,

    /// Endpoints.
    #[arg(long, value_delimiter = ',', value_name = "N,...", default_value = "8,64,256,1024")]
    endpoints: Vec<u32>,

    /// Kinds of requests.
    #[arg(long, value_delimiter = ',')]
    #[arg(default_value = "short,chat-seen,chat-repeat,chat-first,long-seen")]
    cases: Vec<Case>,

    /// Decisions of each case that are measured.
    #[arg(long, value_name = "N", default_value_t = 400)]
    rounds: usize,

    /// Decisions before them.
    #[arg(long, value_name = "N", default_value_t = 200)]
    warmup: usize,

    /// Blocks that each endpoint holds beside those of the prompts.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    other_blocks: u32,

    /// Memory of the decisions that are shown, in MiB: full once warm.
    #[arg(long, value_name = "MIB", default_value_t = 1)]
    decisions_mib: usize,

    /// Only the brain's part, so that a profiler sees nothing else.
    #[arg(long)]
    brain_only: bool,

    /// `tokenizer.json`; without it Qwen3's where `scripts/fetch-tokenizers.sh` puts it, else the
    /// small built-in one.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// Plans without a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    LeastCost,
    Precise,
}

impl Policy {
    fn plan(self) -> Plan {
        match self {
            Policy::LeastCost => Plan::least_cost(),
            Policy::Precise => Plan::precise(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Policy::LeastCost => "least-cost",
            Policy::Precise => "precise",
        }
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("decision: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Cli) -> anyhow::Result<()> {
    let (tokenizer, name) = tokenizer(args.tokenizer.as_deref())?;
    println!("Tokenizer: {name}. {} decisions of each case.\n", args.rounds);
    println!("{}", measure::HEAD);
    for policy in &args.plans {
        for endpoints in &args.endpoints {
            for case in &args.cases {
                let row = measure::row(args, *policy, *endpoints, *case, &tokenizer)?;
                println!("{row}");
            }
        }
    }
    Ok(())
}

fn tokenizer(given: Option<&Path>) -> anyhow::Result<(Tokenizer, String)> {
    let usual = Path::new("../target/tokenizers/qwen3/tokenizer.json");
    let usual = [usual, Path::new("target/tokenizers/qwen3/tokenizer.json")];
    let Some(path) = given.or_else(|| usual.into_iter().find(|file| file.is_file())) else {
        return Ok((Tokenizer::demo(), "the built-in one".to_owned()));
    };
    let loaded = Tokenizer::load(path, &TokenizerOptions::default());
    let name = path.display().to_string();
    Ok((loaded.with_context(|| format!("--tokenizer {name}"))?, name))
}
