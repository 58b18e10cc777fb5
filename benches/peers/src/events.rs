//! How many blocks of events does a CPU second apply?

use std::time::Duration;

use anyhow::{Result, ensure};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};

use crate::Options;
use crate::lookup::{LONG_PROMPTS, LONG_TOKENS};
use crate::subjects::dynamo::Pooled;
use crate::subjects::kv_index::Chains;
use crate::subjects::naive::Naive;
use crate::subjects::ours::Ours;
use crate::subjects::{Subject, Timed};
use crate::table::{Better, Cell, Table};
use crate::workload::{Names, PROMPTS, Raw, Workload};

/// Million blocks per CPU second: preparing what is stored, storing it, preparing what is removed,
/// removing it.
struct Rates {
    store: f64,
    remove: f64,
    store_hashed: f64,
    remove_prepared: f64,
}

fn once<S: Subject>(work: &Workload, names: Names, per_event: usize) -> Rates {
    let phases = || -> [Box<dyn Iterator<Item = Raw> + '_>; 2] {
        [Box::new(work.stores(names, per_event)), Box::new(work.removals(names, per_event))]
    };
    let blocks: usize = work.stores(names, per_event).map(|raw| raw.blocks()).sum();
    let whole = S::timed(work.endpoints, phases(), Timed::Whole);
    let applied = S::timed(work.endpoints, phases(), Timed::Applying);
    let rate = |time: Duration| blocks as f64 / 1e6 / time.as_secs_f64();
    Rates {
        store: rate(applied[0]),
        remove: rate(applied[1]),
        store_hashed: rate(whole[0]),
        remove_prepared: rate(whole[1]),
    }
}

/// Scores that are not those of the naive map, of all prompts and endpoints.
fn wrong<S: Subject>(work: &Workload, index: &mut S, truth: &Naive) -> usize {
    index.settle();
    let mut scores = vec![0; usize::from(work.endpoints)];
    let (mut expected, mut scratch) = (scores.clone(), S::Scratch::default());
    let mut wrong = 0;
    for prompt in &work.prompts {
        let mut query = S::query(&prompt.tokens, work.block_size);
        index.lookup(&mut query, &mut scratch, &mut scores);
        let mut query = Naive::query(&prompt.tokens, work.block_size);
        truth.lookup(&mut query, &mut (), &mut expected);
        wrong += scores.iter().zip(&expected).filter(|(got, right)| got != right).count();
    }
    wrong
}

/// Everything stored, everything removed: the part of the scores that are wrong after both and
/// halfway.
fn wrong_share<S: Subject>(work: &Workload, names: Names, per_event: usize) -> f64 {
    let (mut index, mut truth) = (S::new(work.endpoints), Naive::new(work.endpoints));
    let told = Names::Native;
    work.stores(names, per_event).for_each(|raw| index.apply(S::prepare(raw)));
    work.stores(told, per_event).for_each(|raw| truth.apply(Naive::prepare(raw)));
    let mut count = wrong(work, &mut index, &truth);
    let half = work.removals(names, per_event).count() / 2;
    let removals = work.removals(names, per_event).zip(work.removals(told, per_event));
    for (at, (raw, naive)) in removals.enumerate() {
        if at == half {
            count += wrong(work, &mut index, &truth);
        }
        index.apply(S::prepare(raw));
        truth.apply(Naive::prepare(naive));
    }
    count += wrong(work, &mut index, &truth);
    count as f64 / (3 * work.prompts.len() * usize::from(work.endpoints)) as f64
}

/// The tables of one workload.
struct Tables {
    hashed: Table,
    alone: Table,
    own: Table,
}

fn measure<S: Subject>(
    options: &Options,
    tables: &mut Tables,
    (what, work): (&str, &Workload),
    label: &str,
    names: Names,
) -> Result<()> {
    if !options.wants(label) {
        return Ok(());
    }
    let rounds = if options.quick || what == "big" { 3 } else { 7 };
    for per_event in [16, 1] {
        let wrong = wrong_share::<S>(work, names, per_event);
        // Some peers rely on engines that share their hashes.
        ensure!(wrong == 0.0 || names == Names::Own, "{label}: {wrong} of the scores are wrong");
        let all: Vec<Rates> = (0..rounds).map(|_| once::<S>(work, names, per_event)).collect();
        // What others do on the machine only slows down.
        let best = |of: fn(&Rates) -> f64| all.iter().map(of).fold(0.0, f64::max);
        let put = |table: &mut Table, pass: &str, value: f64| {
            let column = format!("{what}, {per_event}/event, {pass}");
            let cell = match wrong {
                0.0 => Cell::new(value, format!("{value:.1}")),
                _ => Cell::text(format!("({:.0} % of scores wrong)", 100.0 * wrong)),
            };
            table.put(label, &column, cell);
        };
        let (table, hashed) = match names {
            Names::Own => (&mut tables.own, None),
            _ => (&mut tables.alone, Some(&mut tables.hashed)),
        };
        put(table, "store", best(|rates| rates.store));
        put(table, "remove", best(|rates| rates.remove));
        if let Some(table) = hashed {
            put(table, "store", best(|rates| rates.store_hashed));
            put(table, "remove", best(|rates| rates.remove_prepared));
        }
    }
    Ok(())
}

fn each(options: &Options, tables: &mut Tables, work: (&str, &Workload)) -> Result<()> {
    type Crtc = Pooled<ConcurrentRadixTreeCompressed>;
    type Positional = Pooled<PositionalIndexer>;
    type Chain = Chains<false>;
    let label = "naive map, told the keys";
    measure::<Naive>(options, tables, work, label, Names::Native)?;
    measure::<RadixTree>(options, tables, work, RadixTree::NAME, Names::Shared)?;
    measure::<Crtc>(options, tables, work, Crtc::NAME, Names::Shared)?;
    measure::<Positional>(options, tables, work, Positional::NAME, Names::Shared)?;
    measure::<Chain>(options, tables, work, "kv-index ChainIndex", Names::Shared)?;
    measure::<Ours>(options, tables, work, Ours::NAME, Names::Shared)?;
    let label = "kvroute, native names";
    measure::<Ours>(options, tables, work, label, Names::Native)?;
    measure::<RadixTree>(options, tables, work, RadixTree::NAME, Names::Own)?;
    measure::<Crtc>(options, tables, work, Crtc::NAME, Names::Own)?;
    measure::<Chain>(options, tables, work, "kv-index ChainIndex", Names::Own)?;
    measure::<Ours>(options, tables, work, Ours::NAME, Names::Own)
}

/// Prints the tables.
pub fn run(options: &Options) -> Result<()> {
    let new = |title: &str| Table::new(title, Better::Higher);
    let mut tables = Tables {
        hashed: new("Events that carry tokens, hashing included: million blocks per CPU second"),
        alone: new("Events with hashes, where the interface takes them: million blocks per CPU \
                    second"),
        own: new("The same, every engine with names of its own"),
    };
    let small = Workload::shared(options.seed, PROMPTS, 64, 8, 8);
    each(options, &mut tables, ("small", &small))?;
    drop(small);
    let big = Workload::distinct(options.seed, 64, LONG_PROMPTS / options.smaller(), LONG_TOKENS);
    each(options, &mut tables, ("big", &big))?;
    tables.hashed.print();
    tables.alone.print();
    tables.own.print();
    println!(
        "\nSmall: 8 endpoints hold 150 prefixes each, 126,000 entries; big: 1.05 million distinct \
         blocks. One thread, messages of 128 events, the best of several rounds. Events are freed \
         inside the time. kvroute reads where the names of some events lie before it applies \
         them. PositionalIndexer demands names that it can compute, so it has no row where each \
         engine has its own; the radix trees follow an event only if engines share their names."
    );
    Ok(())
}
