//! What does a lookup cost while a writer applies events as fast as it can, and how fast is that?

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Wake;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dynamo_kv_router::indexer::WorkerTask;
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer};
use kvroute_core::Rng;
use parking_lot::{RwLock, RwLockReadGuard};

use crate::Options;
use crate::clock::{overhead_ns, quantile, timed};
use crate::subjects::Subject;
use crate::subjects::dynamo::{Backend, Pooled, fill, mark};
use crate::subjects::kv_index::{self, Chains};
use crate::subjects::naive::Naive;
use crate::subjects::ours::Ours;
use crate::table::{Better, Cell, Table, grouped};
use crate::workload::{Names, PROMPTS, Raw, Workload, removals, stores};

const EVENT_BLOCKS: usize = 16;
/// Prompts that come and go, and how many of them are there at one time.
const CHURNING: usize = 200;
const PRESENT: usize = 50;
const ENDPOINTS: u16 = 8;

/// When the writer began to write at full rate, and when it was done.
#[derive(Default)]
struct Signals {
    begin: OnceLock<Instant>,
    end: OnceLock<Instant>,
}

impl Signals {
    fn next(&self) {
        let cell = if self.begin.get().is_none() { &self.begin } else { &self.end };
        let first = cell.set(Instant::now()).is_ok();
        assert!(first, "the writer signals twice");
    }
}

impl Wake for Signals {
    fn wake(self: Arc<Self>) {
        self.next();
    }
}

/// A value that one writer changes without pause, one event for each lock, and that a reader gets
/// between two events: a lock alone may let the writer have it again and again.
struct Shared<T> {
    value: RwLock<T>,
    /// Whether the reader waits.
    waiting: AtomicBool,
}

impl<T> Shared<T> {
    fn new(value: T) -> Shared<T> {
        Shared { value: RwLock::new(value), waiting: AtomicBool::new(false) }
    }

    fn read(&self) -> RwLockReadGuard<'_, T> {
        if let Some(guard) = self.value.try_read() {
            return guard;
        }
        self.waiting.store(true, Ordering::SeqCst);
        let guard = spin(|| self.value.try_read());
        self.waiting.store(false, Ordering::SeqCst);
        guard
    }

    fn write(&self, change: impl FnOnce(&mut T)) {
        let free = || !self.waiting.load(Ordering::SeqCst);
        let mut guard = spin(|| free().then(|| self.value.try_write()).flatten());
        change(&mut guard);
    }
}

/// Asks until there is an answer: what is waited for takes less time than going to sleep.
fn spin<R>(mut ask: impl FnMut() -> Option<R>) -> R {
    let mut asked = 0u32;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        asked += 1;
        // The machine may run something else instead of the other thread.
        if asked.is_multiple_of(256) {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// What the index holds, and what comes and goes beside it.
struct Mix {
    held: Workload,
    churn: Workload,
    cycles: usize,
}

impl Mix {
    fn base<S: Subject>(&self) -> Vec<S::Event> {
        self.held.stores(names::<S>(), EVENT_BLOCKS).map(S::prepare).collect()
    }

    /// Prompts are stored in turn, each is removed again a while later.
    fn churn<S: Subject>(&self) -> (Vec<S::Event>, usize) {
        let (names, work) = (names::<S>(), &self.churn);
        let mut raws: Vec<Raw> = Vec::new();
        for at in 0..CHURNING + PRESENT {
            if let Some(held) = work.held.get(at).filter(|_| at < CHURNING) {
                let (prompt, all) = (&work.prompts[at], held.blocks.clone());
                let size = work.block_size;
                raws.extend(stores(prompt, size, held.endpoint, all, names, EVENT_BLOCKS));
            }
            if let Some(held) = at.checked_sub(PRESENT).and_then(|old| work.held.get(old)) {
                let prompt = &work.prompts[at - PRESENT];
                let all = held.blocks.clone();
                raws.extend(removals(prompt, held.endpoint, all, names, EVENT_BLOCKS));
            }
        }
        let blocks = self.cycles * raws.iter().map(Raw::blocks).sum::<usize>();
        let cycle = || raws.iter().cloned().map(S::prepare);
        ((0..self.cycles).flat_map(|_| cycle()).collect(), blocks)
    }
}

fn names<S: Subject>() -> Names {
    if S::WHOLE { Names::Shared } else { Names::Native }
}

/// Runs a writer and a reader at once. The writer fills the index, signals, writes at full rate,
/// signals. `lookup` writes the scores of a prompt.
fn race(
    (table, label): (&mut Table, &str),
    mix: &Mix,
    blocks: usize,
    signals: &Signals,
    write: impl FnOnce() + Send,
    mut lookup: impl FnMut(usize, &mut [u32]) -> u64,
) -> Result<()> {
    let mut scores = vec![0; usize::from(ENDPOINTS)];
    let mut rng = Rng::seeded(1);
    let mut times = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(write);
        while signals.begin.get().is_none() {
            std::thread::yield_now();
        }
        while signals.end.get().is_none() {
            times.push(lookup(rng.below(mix.held.prompts.len()), &mut scores));
        }
    });
    let mut truth = Naive::new(ENDPOINTS);
    mix.base::<Naive>().into_iter().for_each(|event| truth.apply(event));
    for (at, prompt) in mix.held.prompts.iter().enumerate() {
        let mut query = Naive::query(&prompt.tokens, mix.held.block_size);
        let mut expected = scores.clone();
        truth.lookup(&mut query, &mut (), &mut expected);
        lookup(at, &mut scores);
        ensure!(scores == expected, "{label} finds {scores:?}, where {expected:?} is right");
    }
    let (begin, end) = signals.begin.get().zip(signals.end.get()).context("no signal")?;
    let rate = blocks as f64 / 1e6 / (*end - *begin).as_secs_f64();
    let overhead = overhead_ns();
    let columns = [("p50 ns", 0.5), ("p99 ns", 0.99), ("p99.9 ns", 0.999)];
    for (column, q) in columns {
        let ns = quantile(&mut times, q).saturating_sub(overhead);
        table.put(label, column, Cell::new(ns as f64, grouped(ns)));
    }
    table.put(label, "lookups", Cell::text(grouped(times.len() as u64)));
    // The better direction of a rate is the other one, so no ratio is printed for it.
    table.put(label, "writer, million blocks/s", Cell::text(format!("{rate:.1}")));
    Ok(())
}

/// An index without concurrency of its own, behind a lock.
fn locked<S: Subject + Send + Sync>(table: &mut Table, label: &str, mix: &Mix) -> Result<()> {
    let mut index = S::new(ENDPOINTS);
    mix.base::<S>().into_iter().for_each(|event| index.apply(event));
    let shared = Shared::new(index);
    let signals = Signals::default();
    let (events, blocks) = mix.churn::<S>();
    let queries = queries::<S>(mix);
    let mut scratch = S::Scratch::default();
    let write = || {
        signals.next();
        for event in events {
            shared.write(|index| index.apply(event));
        }
        signals.next();
    };
    race((table, label), mix, blocks, &signals, write, |prompt, scores| {
        let mut query = queries[prompt].clone();
        timed(|| shared.read().lookup(&mut query, &mut scratch, scores)).1
    })
}

fn queries<S: Subject>(mix: &Mix) -> Vec<S::Query> {
    let query = |prompt: &crate::workload::Prompt| S::query(&prompt.tokens, mix.held.block_size);
    mix.held.prompts.iter().map(query).collect()
}

/// One of Dynamo's: its worker loop over a full queue, markers between.
fn pooled<B: Backend>(table: &mut Table, mix: &Mix) -> Result<()> {
    let backend = B::make();
    let signals = Arc::new(Signals::default());
    let (tasks, receiver) = flume::unbounded();
    let (events, blocks) = mix.churn::<Pooled<B>>();
    let mut markers = Vec::new();
    for phase in [mix.base::<Pooled<B>>(), events] {
        for event in phase {
            tasks.send(WorkerTask::Event(event)).expect("the receiver is held here");
        }
        markers.push(mark(&tasks, &signals));
    }
    tasks.send(WorkerTask::Terminate).expect("the receiver is held here");
    let queries = queries::<Pooled<B>>(mix);
    let write = || backend.worker(receiver, None).expect("the worker loop ends when it is told to");
    race((table, B::NAME), mix, blocks, &signals, write, |prompt, scores| {
        timed(|| fill(backend.find_matches(&queries[prompt], false), scores)).1
    })
}

/// `ChainIndex`: the writer owns the lanes.
fn chains(table: &mut Table, mix: &Mix) -> Result<()> {
    type Chain = Chains<false>;
    let Chain { index, mut lanes } = Chain::new(ENDPOINTS);
    let signals = Signals::default();
    let (events, blocks) = mix.churn::<Chain>();
    let base = mix.base::<Chain>();
    let queries = queries::<Chain>(mix);
    let write = || {
        base.into_iter().for_each(|event| kv_index::apply(&index, &mut lanes, event));
        signals.next();
        events.into_iter().for_each(|event| kv_index::apply(&index, &mut lanes, event));
        signals.next();
    };
    race((table, Chain::NAME), mix, blocks, &signals, write, |prompt, scores| {
        timed(|| kv_index::score_into(&index, &queries[prompt], scores)).1
    })
}

/// Prints the table.
pub fn run(options: &Options) -> Result<()> {
    let title = "One writer at full rate and one reader: a lookup from hashes, 8 endpoints, h8";
    let mut table = Table::new(title, Better::Lower);
    let held = Workload::shared(options.seed, PROMPTS, 64, ENDPOINTS, ENDPOINTS);
    let churn = Workload::distinct(options.seed + 1, 64, CHURNING, 7_200);
    let mix = Mix { held, churn, cycles: if options.quick { 5 } else { 30 } };
    locked::<Naive>(&mut table, "naive map, behind a lock", &mix)?;
    pooled::<ConcurrentRadixTreeCompressed>(&mut table, &mix)?;
    pooled::<PositionalIndexer>(&mut table, &mix)?;
    chains(&mut table, &mix)?;
    locked::<Ours>(&mut table, "kvroute, behind a lock", &mix)?;
    table.print();
    println!(
        "\nWritten: 200 prompts of 112 blocks come and go, 50 at a time, {EVENT_BLOCKS} blocks an \
         event. Behind a lock: parking_lot's RwLock, held for one event; both spin for it, and the \
         writer lets a reader that waits go first."
    );
    Ok(())
}
