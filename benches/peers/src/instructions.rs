//! How many instructions does a lookup take? A count does not depend on what else the machine does.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Options;
use crate::built::{COLLECTED, KINDS};
use crate::lookup::CASES;
use crate::table::{Better, Cell, Table, grouped};

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

/// Instructions of a lookup, averaged over a case's prompts.
fn count(options: &Options, case: &str, kind: &str) -> Result<u64> {
    let path = std::env::temp_dir().join(format!("kvroute-peers.{}.out", std::process::id()));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--quiet"])
        .arg(format!("--toggle-collect=*{COLLECTED}*"))
        .arg(format!("--callgrind-out-file={}", path.display()))
        .arg(std::env::current_exe()?)
        .args(["look-up", case, kind, "--seed", &options.seed.to_string()])
        .output()
        .context("valgrind cannot be started: install it, or leave `instructions` out")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind failed: {errors}");
    let lookups: u64 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
    let profile = std::fs::read_to_string(&path)?;
    std::fs::remove_file(&path)?;
    let total = profile.lines().find_map(|line| line.strip_prefix("totals:"));
    let total: u64 = total.context("valgrind's output has no total")?.trim().parse()?;
    ensure!(total > 0 && lookups > 0, "valgrind did not find {COLLECTED}");
    Ok(total / lookups)
}

/// Prints the table.
pub fn run(options: &Options) -> Result<()> {
    let title = "Instructions of a lookup from hashes, every endpoint's score in an array";
    let mut table = Table::new(title, Better::Lower);
    for case in CASES.iter().filter(|case| options.wants(case.name)) {
        for (kind, _) in KINDS {
            let instructions = count(options, case.name, kind)?;
            let cell = Cell::new(instructions as f64, grouped(instructions));
            table.put(kind, case.name, cell);
        }
    }
    table.print();
    Ok(())
}
