//! How long does a lookup take, from hashes and from tokens?

use anyhow::Result;
use kvroute_core::Rng;

use crate::Options;
use crate::built::{Filled, verified};
use crate::clock::{overhead_ns, quantile};
use crate::table::{Better, Cell, Table, grouped};
use crate::workload::{PROMPTS, Workload};

/// A workload of lookups, and what it is called in tables.
pub struct Case {
    pub name: &'static str,
    block_size: u32,
    /// How many there are and how many of them hold a prefix; `None`: 8 endpoints, and prompts of
    /// 65,536 tokens that share nothing.
    endpoints: Option<(u16, u16)>,
}

/// The cases, small ones first.
pub const CASES: [Case; 7] = [
    Case { name: "8, h1", block_size: 64, endpoints: Some((8, 1)) },
    Case { name: "8, h8", block_size: 64, endpoints: Some((8, 8)) },
    Case { name: "64, h64", block_size: 64, endpoints: Some((64, 64)) },
    Case { name: "256, h256", block_size: 64, endpoints: Some((256, 256)) },
    Case { name: "blocks of 16, 8, h8", block_size: 16, endpoints: Some((8, 8)) },
    Case { name: "blocks of 128, 8, h8", block_size: 128, endpoints: Some((8, 8)) },
    Case { name: "65,536 tokens, 8, h1", block_size: 64, endpoints: None },
];

/// Prompts of 65,536 tokens: as many as make 1.05 million blocks.
pub const LONG_PROMPTS: usize = 1024;
/// Their tokens.
pub const LONG_TOKENS: usize = 65_536;

impl Case {
    /// Its workload, some times smaller than in the published tables.
    pub fn work(&self, seed: u64, smaller: usize) -> Workload {
        match self.endpoints {
            Some((endpoints, holders)) => {
                let prompts = PROMPTS / smaller;
                Workload::shared(seed, prompts, self.block_size, endpoints, holders)
            }
            None => {
                let prompts = LONG_PROMPTS / smaller;
                Workload::distinct(seed, self.block_size, prompts, LONG_TOKENS)
            }
        }
    }
}

/// Times of all rounds, by kind of index.
struct Times(Vec<Vec<u64>>);

fn rounds(
    built: &mut [Box<dyn Filled>],
    work: &Workload,
    seed: u64,
    count: usize,
    time: impl Fn(&mut dyn Filled, usize) -> u64,
) -> Times {
    let mut rng = Rng::seeded(seed);
    let mut order: Vec<usize> = (0..work.prompts.len()).collect();
    let mut times = vec![Vec::new(); built.len()];
    for _ in 0..count {
        rng.shuffle(&mut order);
        for (filled, times) in built.iter_mut().zip(&mut times) {
            times.extend(order.iter().map(|&prompt| time(filled.as_mut(), prompt)));
        }
    }
    Times(times)
}

/// Prints the tables.
pub fn run(options: &Options) -> Result<()> {
    let overhead = overhead_ns();
    let title = "Lookup alone, every endpoint's score in an array: p50 / p99 ns";
    let mut alone = Table::new(title, Better::Lower);
    let title = "Lookup from tokens, hashing included: p50 / p99 ns";
    let mut from_tokens = Table::new(title, Better::Lower);
    for case in &CASES {
        if !options.wants(case.name) {
            continue;
        }
        let work = case.work(options.seed, options.smaller());
        let mut built = verified(&work)?;
        let prompts = work.prompts.len();
        let lookups: usize = if options.quick { 2_000 } else { 12_000 };
        let count = lookups.div_ceil(prompts);
        let times = rounds(&mut built, &work, options.seed, count, |filled, prompt| {
            filled.lookup_ns(prompt)
        });
        put(&mut alone, case.name, &built, times, overhead);
        let times = rounds(&mut built, &work, options.seed, count.div_ceil(4), |filled, prompt| {
            filled.tokens_ns(&work.prompts[prompt].tokens)
        });
        put(&mut from_tokens, case.name, &built, times, overhead);
    }
    alone.print();
    from_tokens.print();
    println!(
        "\nColumns: endpoints, and how many of them (h) hold a prefix; prompts of 7,200 tokens in \
         blocks of 64 unless said. The timer's {overhead} ns are subtracted."
    );
    Ok(())
}

fn put(table: &mut Table, column: &str, built: &[Box<dyn Filled>], times: Times, overhead: u64) {
    for (filled, mut times) in built.iter().zip(times.0) {
        let p50 = quantile(&mut times, 0.5).saturating_sub(overhead);
        let p99 = quantile(&mut times, 0.99).saturating_sub(overhead);
        let text = format!("{} / {}", grouped(p50), grouped(p99));
        table.put(filled.name(), column, Cell::new(p50 as f64, text));
    }
}
