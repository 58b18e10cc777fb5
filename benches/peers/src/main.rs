//! kvroute's index beside other projects' indexes, on the same generated workloads, in one run.
//!
//! ```text
//! cargo run --release --manifest-path benches/peers/Cargo.toml              # everything
//! cargo run --release --manifest-path benches/peers/Cargo.toml -- lookup --quick
//! cargo run --release --manifest-path benches/peers/Cargo.toml --features tokenizing -- tokenizing
//! ```
//!
//! Answers are compared before anything is timed; a wrong one ends the program.

mod built;
mod clock;
mod events;
mod hashing;
mod instructions;
mod lookup;
mod memory;
mod mixed;
mod subjects;
mod table;
#[cfg(feature = "tokenizing")]
mod tokenizing;
mod workload;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// kvroute's index beside other projects' indexes.
#[derive(Parser)]
struct Arguments {
    /// What to measure; everything when left out.
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

/// What every part is told.
#[derive(clap::Args, Clone)]
pub struct Options {
    /// Smaller sizes and fewer rounds.
    #[arg(long, global = true)]
    quick: bool,
    /// From which all workloads follow.
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
    /// What does not fit into this is left out of the memory table: peers take long to fill more.
    #[arg(long, global = true, default_value_t = 4.0)]
    memory_gb_max: f64,
    /// Only cases of lookups, or indexes for events and memory, whose name contains this.
    #[arg(long, global = true)]
    only: Option<String>,
    /// A folder with a tokenizer.json; Qwen3's, where scripts/fetch-tokenizer.sh puts it, when left
    /// out.
    #[cfg(feature = "tokenizing")]
    #[arg(long, global = true)]
    tokenizer: Option<std::path::PathBuf>,
}

impl Options {
    /// By how much workloads are smaller than those of the published tables.
    pub fn smaller(&self) -> usize {
        if self.quick { 5 } else { 1 }
    }

    /// Whether a case is wanted.
    pub fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }
}

#[derive(Subcommand, Clone)]
enum Command {
    /// Lookups from hashes and from tokens.
    Lookup,
    /// Lookups while a writer writes.
    Mixed,
    /// Stores and removals.
    Events,
    /// Hashes of blocks.
    Hashing,
    /// Chats to tokens.
    #[cfg(feature = "tokenizing")]
    Tokenizing,
    /// Bytes per block.
    Memory,
    /// Instructions of lookups and events, counted by valgrind, which must be installed.
    Instructions,
    /// What `instructions` runs under valgrind.
    #[command(hide = true)]
    LookUp {
        /// Name of a case.
        case: String,
        /// Name of a kind of index.
        kind: String,
    },
    /// The same for events.
    #[command(hide = true)]
    Apply {
        /// Name of a kind of index.
        kind: String,
        /// Blocks of an event.
        per_event: usize,
        pass: instructions::Pass,
    },
}

fn main() -> Result<()> {
    let Arguments { command, options } = Arguments::parse();
    let all = [
        Command::Lookup,
        Command::Instructions,
        Command::Mixed,
        Command::Events,
        Command::Memory,
        Command::Hashing,
        #[cfg(feature = "tokenizing")]
        Command::Tokenizing,
    ];
    let wanted = command.map_or(all.to_vec(), |command| vec![command]);
    for command in wanted {
        match command {
            Command::Lookup => lookup::run(&options)?,
            Command::Mixed => mixed::run(&options)?,
            Command::Hashing => hashing::run(&options)?,
            #[cfg(feature = "tokenizing")]
            Command::Tokenizing => tokenizing::run(&options)?,
            Command::Events => events::run(&options)?,
            Command::Memory => memory::run(&options)?,
            Command::Instructions => instructions::run(&options)?,
            Command::LookUp { case, kind } => instructions::look_up(&options, &case, &kind)?,
            Command::Apply { kind, per_event, pass } => {
                instructions::apply(&options, &kind, per_event, pass)?;
            }
        }
    }
    Ok(())
}
