//! `ChainIndex` of kv-index, of the SMG and SGLang gateways.

use kv_index::{
    ChainBlockMap, ChainIndex, ContentHash, SequenceHash, StoredBlock, compute_content_hash,
    compute_request_content_hashes,
};

use super::Subject;
use crate::workload::Raw;

/// The index and what its event lanes keep. With `MAP`, lookups fill a hash map.
pub struct Chains<const MAP: bool> {
    pub index: ChainIndex,
    pub lanes: Vec<ChainBlockMap>,
}

/// An event with hashes.
pub enum Event {
    Stored { endpoint: u16, parent: Option<SequenceHash>, blocks: Vec<StoredBlock> },
    Removed { endpoint: u16, hashes: Vec<SequenceHash> },
}

/// Applies an event: what an event lane does.
pub fn apply(index: &ChainIndex, lanes: &mut [ChainBlockMap], event: Event) {
    match event {
        Event::Stored { endpoint, parent, blocks } => {
            let lane = &mut lanes[usize::from(endpoint)];
            let stored = index.apply_stored(u32::from(endpoint), &blocks, parent, lane);
            assert!(stored.is_ok(), "a store of the workload has no parent");
        }
        Event::Removed { endpoint, hashes } => {
            let lane = &mut lanes[usize::from(endpoint)];
            index.apply_removed(u32::from(endpoint), &hashes, lane);
        }
    }
}

/// Asks for the scores without a map.
pub fn score_into(index: &ChainIndex, query: &[ContentHash], scores: &mut [u32]) {
    scores.fill(0);
    let report = |worker: u32, score| scores[worker as usize] = score;
    index.score_into(query, |content| content.0, false, report);
}

impl<const MAP: bool> Subject for Chains<MAP> {
    const NAME: &'static str = match MAP {
        true => "kv-index ChainIndex, find_matches",
        false => "kv-index ChainIndex, score_into",
    };

    type Event = Event;
    type Query = Vec<ContentHash>;
    type Scratch = ();

    fn new(endpoints: u16) -> Chains<MAP> {
        let index = ChainIndex::with_max_workers(usize::from(endpoints));
        let lane = |endpoint: u16| {
            let worker = index.intern_worker(&format!("http://10.0.0.{endpoint}:8000"));
            assert_eq!(worker.ok(), Some(u32::from(endpoint)), "workers are numbered in turn");
            ChainBlockMap::new()
        };
        let lanes = (0..endpoints).map(lane).collect();
        Chains { index, lanes }
    }

    fn prepare(raw: Raw) -> Event {
        match raw {
            Raw::Stored { endpoint, block_size, parent, names, tokens } => {
                let block = |(tokens, &name): (&[u32], &u64)| StoredBlock {
                    seq_hash: SequenceHash(name),
                    content_hash: compute_content_hash(tokens),
                };
                let blocks = tokens.chunks_exact(block_size as usize).zip(&names).map(block);
                let blocks = blocks.collect();
                Event::Stored { endpoint, parent: parent.map(SequenceHash), blocks }
            }
            Raw::Removed { endpoint, names } => {
                Event::Removed { endpoint, hashes: names.into_iter().map(SequenceHash).collect() }
            }
        }
    }

    fn apply(&mut self, event: Event) {
        apply(&self.index, &mut self.lanes, event);
    }

    fn query(tokens: &[u32], block_size: u32) -> Vec<ContentHash> {
        compute_request_content_hashes(tokens, block_size as usize)
    }

    fn lookup(&self, query: &mut Vec<ContentHash>, _: &mut (), scores: &mut [u32]) {
        if MAP {
            let found = self.index.find_matches(query, false);
            scores.fill(0);
            for (worker, score) in found.scores {
                scores[worker as usize] = score;
            }
        } else {
            score_into(&self.index, query, scores);
        }
    }
}
