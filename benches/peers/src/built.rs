//! An index that holds a workload, whatever kind of index it is.

use std::hint::black_box;

use anyhow::{Result, ensure};

use crate::clock::timed;
use crate::subjects::Subject;
use crate::subjects::dynamo::Pooled;
use crate::subjects::kv_index::Chains;
use crate::subjects::naive::Naive;
use crate::subjects::ours::Ours;
use crate::workload::{Names, Workload};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};

/// Blocks of an event while an index is built.
const EVENT_BLOCKS: usize = 16;

/// An index, filled, and the prompts it is asked for.
pub trait Filled {
    fn name(&self) -> &'static str;

    /// How many blocks of a prompt each endpoint holds.
    fn scores(&mut self, prompt: usize) -> Vec<u32>;

    /// Nanoseconds of one lookup by hashes.
    fn lookup_ns(&mut self, prompt: usize) -> u64;

    /// Nanoseconds of one lookup from tokens.
    fn tokens_ns(&mut self, tokens: &[u32]) -> u64;

    /// Looks each prompt up once, in the function that a profiler looks for.
    fn lookup_each(&mut self, prompts: &[usize]);
}

struct Built<S: Subject> {
    index: S,
    queries: Vec<S::Query>,
    block_size: u32,
    scratch: S::Scratch,
    scores: Vec<u32>,
}

impl<S: Subject> Built<S> {
    fn new(work: &Workload) -> Built<S> {
        let mut index = S::new(work.endpoints);
        let names = if S::WHOLE { Names::Shared } else { Names::Native };
        for raw in work.stores(names, EVENT_BLOCKS) {
            index.apply(S::prepare(raw));
        }
        index.settle();
        let query = |prompt: &crate::workload::Prompt| S::query(&prompt.tokens, work.block_size);
        Built {
            index,
            queries: work.prompts.iter().map(query).collect(),
            block_size: work.block_size,
            scratch: S::Scratch::default(),
            scores: vec![0; usize::from(work.endpoints)],
        }
    }
}

/// Part of the name of the function that a profiler looks for.
pub const COLLECTED: &str = "collected_lookups";

#[inline(never)]
fn collected_lookups<S: Subject>(built: &mut Built<S>, queries: &mut [S::Query]) {
    for query in queries {
        built.index.lookup(query, &mut built.scratch, &mut built.scores);
        black_box(&built.scores);
    }
}

impl<S: Subject> Filled for Built<S> {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn scores(&mut self, prompt: usize) -> Vec<u32> {
        let mut query = self.queries[prompt].clone();
        self.index.lookup(&mut query, &mut self.scratch, &mut self.scores);
        self.scores.clone()
    }

    fn lookup_ns(&mut self, prompt: usize) -> u64 {
        // A copy, for everybody alike: hashes that were just computed are in the cache, and one
        // of the interfaces consumes them.
        let mut query = self.queries[prompt].clone();
        let (index, scratch) = (&self.index, &mut self.scratch);
        let ((), ns) = timed(|| index.lookup(&mut query, scratch, &mut self.scores));
        black_box(&self.scores);
        ns
    }

    fn tokens_ns(&mut self, tokens: &[u32]) -> u64 {
        let (index, scratch) = (&self.index, &mut self.scratch);
        let ((), ns) = timed(|| {
            let mut query = S::query(tokens, self.block_size);
            index.lookup(&mut query, scratch, &mut self.scores);
        });
        black_box(&self.scores);
        ns
    }

    fn lookup_each(&mut self, prompts: &[usize]) {
        let mut queries: Vec<S::Query> =
            prompts.iter().map(|&prompt| self.queries[prompt].clone()).collect();
        collected_lookups(self, &mut queries);
    }
}

fn make<S: Subject + 'static>(work: &Workload) -> Box<dyn Filled>
where
    S::Query: 'static,
    S::Scratch: 'static,
{
    Box::new(Built::<S>::new(work))
}

type Make = fn(&Workload) -> Box<dyn Filled>;

/// How to fill each kind of index with a workload, the naive one first.
pub const KINDS: [(&str, Make); 7] = [
    (Naive::NAME, make::<Naive>),
    (RadixTree::NAME, make::<RadixTree>),
    (Pooled::<ConcurrentRadixTreeCompressed>::NAME, make::<Pooled<ConcurrentRadixTreeCompressed>>),
    (Pooled::<PositionalIndexer>::NAME, make::<Pooled<PositionalIndexer>>),
    (Chains::<true>::NAME, make::<Chains<true>>),
    (Chains::<false>::NAME, make::<Chains<false>>),
    (Ours::NAME, make::<Ours>),
];

/// All of them, each compared with the naive one for every prompt and endpoint.
pub fn verified(work: &Workload) -> Result<Vec<Box<dyn Filled>>> {
    let mut built: Vec<Box<dyn Filled>> = KINDS.iter().map(|(_, make)| make(work)).collect();
    let Some((truth, others)) = built.split_first_mut() else { return Ok(built) };
    for prompt in 0..work.prompts.len() {
        let expected = truth.scores(prompt);
        for other in &mut *others {
            let got = other.scores(prompt);
            ensure!(
                got == expected,
                "{} finds {got:?} for prompt {prompt}, where {expected:?} is right",
                other.name()
            );
        }
    }
    Ok(built)
}
