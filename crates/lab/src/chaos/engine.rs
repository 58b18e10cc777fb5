//! One engine process: the model, the publisher of its events, and what a reader of all its events
//! would know.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use kvroute_core::event::{EngineHash, EventBatch, KvEvent};
use kvroute_core::fleet::{EngineMetrics, LoraMetrics};
use kvroute_core::{Rng, Time};
use kvroute_wire::kv_event;

use super::flight::FlightNo;
use super::prompts::{ADAPTERS, OUTPUT_TOKENS_MAX, PROMPT_TOKENS_MAX};
use crate::model::{
    Adapter, EngineModel, HashAlgorithm, ModelConfig, Profile, RequestId, Stats, Step,
};

/// Copies of each block by its engine hash.
pub(super) type Held = BTreeMap<EngineHash, u32>;

/// A message of an engine's event stream.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// The process that published it.
    pub run: u64,
    pub seq: u64,
    pub payload: Rc<[u8]>,
}

/// A running engine.
pub(super) struct Process {
    /// Unique among all processes of all engines.
    pub run: u64,
    pub model: EngineModel,
    /// The step in progress.
    pub step: Option<Step>,
    /// Requests of the router.
    pub flights: BTreeMap<RequestId, FlightNo>,
    requests: RequestId,
    next_seq: u64,
    /// What can be replayed.
    pub kept: VecDeque<Message>,
    kept_max: usize,
    /// What its events so far say it holds.
    pub told: Held,
    /// The cache was emptied, and the event is still to come.
    pub clear_due: bool,
}

impl Process {
    pub fn new(run: u64, rng: &mut Rng, block_size: u32, kept_max: usize) -> Process {
        let longest = (PROMPT_TOKENS_MAX + OUTPUT_TOKENS_MAX) as u32;
        let adapter = |name: &&str| Adapter { name: (*name).to_owned(), path: format!("/{name}") };
        let config = ModelConfig {
            block_size,
            blocks: 1 + longest.div_ceil(block_size) + rng.below(24) as u32,
            max_model_len: longest,
            max_num_seqs: 2 + rng.below(10) as u32,
            max_num_batched_tokens: 24 + rng.below(100) as u32,
            max_loras: 1 + rng.below(2) as u32,
            reserve_full_prompt: rng.below(2) == 0,
            events: true,
            hash: HashAlgorithm::XxhashCbor,
            hash_seed: ["0", "1", "2"][rng.below(3)].to_owned(),
            adapters: ADAPTERS.iter().map(adapter).collect(),
            output_ids: (500_000..500_020).collect(),
            seed: rng.next_u64(),
        };
        let profile = Profile::built_in("tiny").expect("a built-in profile can be read");
        let model = EngineModel::new(config, profile).expect("one sequence fits the cache");
        Process {
            run,
            model,
            step: None,
            flights: BTreeMap::new(),
            requests: 0,
            next_seq: 0,
            kept: VecDeque::new(),
            kept_max,
            told: Held::new(),
            clear_due: false,
        }
    }

    pub fn block_size(&self) -> u32 {
        self.model.config().block_size
    }

    pub fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        self.requests
    }

    /// How many batches there were.
    pub fn published(&self) -> u64 {
        self.next_seq
    }

    /// Whether a replay from the beginning would be complete.
    pub fn keeps_all(&self) -> bool {
        self.kept.len() as u64 == self.next_seq
    }

    /// Empties the cache as `/reset_prefix_cache` does; refused while blocks are in use.
    pub fn reset_cache(&mut self) -> bool {
        let done = self.model.reset_prefix_cache();
        self.clear_due |= done;
        done
    }

    /// Numbers and keeps the events of a step.
    pub fn publish(&mut self, now: Time, events: Vec<KvEvent>) -> Message {
        for event in &events {
            note(&mut self.told, event);
            self.clear_due &= *event != KvEvent::Cleared;
        }
        let timestamp_s = 1.7e9 + now.as_secs_f64();
        let batch = EventBatch { timestamp_s, events, rank: Some(0), events_bad: 0 };
        let mut payload = Vec::new();
        kv_event::encode_batch(&batch, &mut payload);
        let message = Message { run: self.run, seq: self.next_seq, payload: payload.into() };
        self.next_seq += 1;
        self.kept.push_back(message.clone());
        if self.kept.len() > self.kept_max {
            self.kept.pop_front();
        }
        message
    }

    /// Its metrics page.
    pub fn metrics(&self, stats: &Stats) -> EngineMetrics {
        let config = self.model.config();
        EngineMetrics {
            waiting: stats.waiting,
            running: stats.running,
            kv_usage: stats.kv_usage,
            block_size: Some(config.block_size),
            blocks: Some(config.blocks),
            lora: Some(LoraMetrics {
                running: stats.running_adapters.clone(),
                waiting: stats.waiting_adapters.clone(),
                max: config.max_loras,
            }),
            prefix_queries_tokens: Some(stats.prefix_queries_tokens),
            prefix_hits_tokens: Some(stats.prefix_hits_tokens),
        }
    }
}

/// What an event says, in the simplest way: each block stored is a copy more, each removed one a
/// copy less.
fn note(held: &mut Held, event: &KvEvent) {
    match event {
        KvEvent::Stored(stored) => {
            stored.hashes.iter().for_each(|hash| *held.entry(*hash).or_insert(0) += 1);
        }
        KvEvent::Removed(removed) => {
            for hash in &removed.hashes {
                if let Some(copies) = held.get_mut(hash) {
                    *copies -= 1;
                    if *copies == 0 {
                        held.remove(hash);
                    }
                }
            }
        }
        KvEvent::Cleared => held.clear(),
    }
}
