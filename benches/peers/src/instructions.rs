//! How many instructions does a lookup take? A count does not depend on what else the machine does.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use dynamo_kv_router::RadixTree;

use crate::Options;
use crate::built::{COLLECTED, KINDS};
use crate::lookup::CASES;
use crate::subjects::kv_index::Chains;
use crate::subjects::naive::Naive;
use crate::subjects::ours::Ours;
use crate::subjects::{MESSAGE_EVENTS, Subject};
use crate::table::{Better, Cell, Table, grouped};
use crate::workload::{Names, PROMPTS, Raw, Workload};

/// Workloads are smaller here, because valgrind is slow: how many prompts there are changes the
/// chance of a cache miss, not the instructions.
const SMALLER: usize = 10;

/// Looks each prompt of a case up once, in an index of one kind.
pub fn look_up(options: &Options, case: &str, kind: &str) -> Result<()> {
    let case = CASES.iter().find(|known| known.name == case).context("no such case")?;
    let (_, make) = KINDS.iter().find(|(name, _)| *name == kind).context("no such index")?;
    let work = case.work(options.seed, SMALLER);
    let prompts: Vec<usize> = (0..work.prompts.len()).collect();
    make(&work).lookup_each(&prompts);
    println!("{}", prompts.len());
    Ok(())
}

/// Which part of applying events is collected.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pass {
    /// Storing, from events that carry tokens.
    StoreTokens,
    /// Storing, from hashes where the interface takes them.
    Store,
    /// Removing.
    Remove,
}

/// Applies events some at a time, under the profiler's eyes: from tokens, or as they are prepared.
fn apply_messages<S: Subject>(
    index: &mut S,
    mut raws: impl Iterator<Item = Raw>,
    from_tokens: bool,
) {
    let (mut message, mut events) = (Vec::new(), Vec::new());
    loop {
        message.extend(raws.by_ref().take(MESSAGE_EVENTS));
        if message.is_empty() {
            return;
        }
        if !from_tokens {
            events.extend(message.drain(..).map(S::prepare));
        }
        collected_message(index, &mut message, &mut events);
    }
}

#[inline(never)]
fn collected_message<S: Subject>(
    index: &mut S,
    message: &mut Vec<Raw>,
    events: &mut Vec<S::Event>,
) {
    events.extend(message.drain(..).map(S::prepare));
    index.apply_message(events);
}

fn store_and_remove<S: Subject>(work: &Workload, names: Names, per_event: usize, pass: Pass) {
    let mut index = S::new(work.endpoints);
    let stores = work.stores(names, per_event);
    match pass {
        Pass::StoreTokens => apply_messages(&mut index, stores, true),
        Pass::Store => apply_messages(&mut index, stores, false),
        Pass::Remove => {
            stores.for_each(|raw| index.apply(S::prepare(raw)));
            apply_messages(&mut index, work.removals(names, per_event), false);
        }
    }
}

type Apply = fn(&Workload, Names, usize, Pass);

/// Indexes that apply events on the caller's thread, and how engines name blocks. Dynamo's others
/// apply theirs in a loop that also waits for them.
const APPLIERS: [(&str, Apply, Names); 6] = [
    ("naive map, told the keys", store_and_remove::<Naive>, Names::Native),
    (RadixTree::NAME, store_and_remove::<RadixTree>, Names::Shared),
    ("kv-index ChainIndex", store_and_remove::<Chains<false>>, Names::Shared),
    (Ours::NAME, store_and_remove::<Ours>, Names::Shared),
    ("kvroute, native names", store_and_remove::<Ours>, Names::Native),
    ("kvroute, names of each engine's own", store_and_remove::<Ours>, Names::Own),
];

/// Applies the events of a small fleet to an index of one kind.
pub fn apply(options: &Options, kind: &str, per_event: usize, pass: Pass) -> Result<()> {
    let found = APPLIERS.iter().find(|(name, ..)| *name == kind);
    let (_, apply, names) = found.context("no such index")?;
    ensure!(per_event > 0, "an event has at least one block");
    let work = Workload::shared(options.seed, PROMPTS / SMALLER, 64, 8, 8);
    apply(&work, *names, per_event, pass);
    println!("{}", work.stores(*names, per_event).map(|raw| raw.blocks()).sum::<usize>());
    Ok(())
}

/// Runs this program under valgrind: instructions below functions named like `function`, divided
/// by the number that the program prints.
fn count(options: &Options, function: &str, arguments: &[&str]) -> Result<u64> {
    let path = std::env::temp_dir().join(format!("kvroute-peers.{}.out", std::process::id()));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--quiet"])
        .arg(format!("--toggle-collect=*{function}*"))
        .arg(format!("--callgrind-out-file={}", path.display()))
        .arg(std::env::current_exe()?)
        .args(["--seed", &options.seed.to_string()])
        .args(arguments)
        .output()
        .context("valgrind cannot be started: install it, or leave `instructions` out")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind failed: {errors}");
    let pieces: u64 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
    let profile = std::fs::read_to_string(&path)?;
    std::fs::remove_file(&path)?;
    let total = profile.lines().find_map(|line| line.strip_prefix("totals:"));
    let total: u64 = total.context("valgrind's output has no total")?.trim().parse()?;
    ensure!(total > 0 && pieces > 0, "valgrind did not find {function}");
    Ok(total / pieces)
}

/// Prints the tables.
pub fn run(options: &Options) -> Result<()> {
    let title = "Instructions of a lookup from hashes, every endpoint's score in an array";
    let mut table = Table::new(title, Better::Lower);
    for case in CASES.iter().filter(|case| options.wants(case.name)) {
        for (kind, _) in KINDS {
            let number = count(options, COLLECTED, &["look-up", case.name, kind])?;
            table.put(kind, case.name, Cell::new(number as f64, grouped(number)));
        }
    }
    table.print();
    let title = "Instructions of a block's event, 8 endpoints that hold each prefix";
    let mut table = Table::new(title, Better::Lower);
    for (kind, ..) in APPLIERS.iter().filter(|(name, ..)| options.wants(name)) {
        for size in ["16", "1"] {
            for pass in ["store-tokens", "store", "remove"] {
                let number = count(options, "collected_message", &["apply", kind, size, pass])?;
                let column = format!("{size}/event, {}", pass.replace('-', " from "));
                table.put(kind, &column, Cell::new(number as f64, grouped(number)));
            }
        }
    }
    table.print();
    Ok(())
}
