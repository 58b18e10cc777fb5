//! What would a vLLM engine do with these requests, step by step?
//!
//! [`EngineModel`] is a pure state machine: paged KV blocks with a prefix cache, continuous
//! batching with chunked prefill, preemption by recomputation, and a step-time model. It has no
//! clock, no IO and no randomness of its own, so a simulation in virtual time and the real server
//! of [`crate::engine`] run the same code.
//!
//! A host submits requests at any time; they wait in an inbox, unseen by the statistics, until the
//! next step begins, as in a real engine whose scheduler is busy. [`EngineModel::next_step`]
//! schedules a step and says how long it takes; everything in [`Step`] becomes visible when that
//! time has passed: tokens, KV events and statistics.
//!
//! Semantics are those of vLLM 0.32 with one KV cache group of full attention.

mod hash;
mod pool;
mod profile;
mod schedule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use kvroute_core::event::{EngineHash, KvEvent};
use kvroute_core::{Rng, Time};
use rustc_hash::FxHashMap;

pub use hash::{Adapter, BlockHash, BlockHasher, HashAlgorithm, HashExtras};
pub use profile::{Profile, ProfileError, StepWork};

use pool::{BlockId, BlockPool};

/// The size and settings of an engine, in vLLM's terms.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Tokens per KV block.
    pub block_size: u32,
    /// `num_gpu_blocks`: KV blocks, one of which is the null block and holds no tokens.
    pub blocks: u32,
    /// Longest sequence, prompt and output together.
    pub max_model_len: u32,
    /// Most sequences in one step.
    pub max_num_seqs: u32,
    /// Most tokens computed in one step.
    pub max_num_batched_tokens: u32,
    /// Most distinct adapters in one step.
    pub max_loras: u32,
    /// Whether a prompt is admitted only when blocks for all of it are free (vLLM 0.32) or as soon
    /// as its first chunk fits (older versions).
    pub reserve_full_prompt: bool,
    /// Whether KV events are made (`enable_kv_cache_events`).
    pub events: bool,
    /// How blocks are named.
    pub hash: HashAlgorithm,
    /// `PYTHONHASHSEED`, or vLLM's own default.
    pub hash_seed: String,
    /// Adapters, in the order of their ids (the first has id 1).
    pub adapters: Vec<Adapter>,
    /// Token ids the model draws its output from.
    pub output_ids: Arc<[u32]>,
    /// Seed of the output.
    pub seed: u64,
}

impl Default for ModelConfig {
    fn default() -> ModelConfig {
        ModelConfig {
            block_size: 16,
            blocks: 8193,
            max_model_len: 32_768,
            max_num_seqs: 1024,
            max_num_batched_tokens: 8192,
            max_loras: 1,
            reserve_full_prompt: true,
            events: true,
            hash: HashAlgorithm::Sha256Cbor,
            hash_seed: "vllm-none-hash".to_owned(),
            adapters: Vec::new(),
            output_ids: (0..1000).collect(),
            seed: 0,
        }
    }
}

/// A [`ModelConfig`] that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelConfigError {
    /// A count that must not be 0.
    #[error("{0} is 0, it must be at least 1")]
    Zero(&'static str),
    /// One sequence of the longest length would never fit.
    #[error(
        "max_model_len {max_model_len} does not fit the KV cache of {usable} blocks of \
         {block_size} tokens: raise the blocks (--kv-blocks) or lower --max-model-len"
    )]
    CacheTooSmall {
        /// Configured limit, tokens.
        max_model_len: u32,
        /// Blocks without the null block.
        usable: u32,
        /// Tokens per block.
        block_size: u32,
    },
}

/// A request's name inside one engine, chosen by the host.
pub type RequestId = u64;

/// Where a request's output comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Output {
    /// The same prompt gives the same output (temperature 0).
    #[default]
    Greedy,
    /// Drawn with this seed.
    Sampled(u64),
    /// These tokens, then greedy ones: to repeat a recorded run.
    Scripted(Vec<u32>),
}

/// A request for one sequence.
#[derive(Clone, Debug, Default)]
pub struct NewRequest {
    /// Unique among the requests in the engine.
    pub id: RequestId,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Output tokens; cut where the sequence would exceed `max_model_len`.
    pub max_tokens: u32,
    /// After this many output tokens the model stops by itself.
    pub stop_after: Option<u32>,
    /// `cache_salt`.
    pub cache_salt: Option<String>,
    /// Adapter by name; `None` is the base model.
    pub adapter: Option<String>,
    /// Where the output comes from.
    pub output: Output,
    /// `kv_cache_report_mode: full`: blocks that are reused are announced again.
    pub report_reused: bool,
}

/// A request the engine refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Nothing to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No room for even one output token.
    #[error("the prompt has {tokens} tokens, the limit with one output token is {limit}")]
    PromptTooLong {
        /// Of the prompt.
        tokens: usize,
        /// `max_model_len - 1`.
        limit: u32,
    },
    /// No such adapter.
    #[error("no adapter is named {0}")]
    UnknownAdapter(String),
    /// The host used an id twice.
    #[error("request id {0} is in use")]
    DuplicateId(RequestId),
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model stopped by itself.
    Stop,
    /// `max_tokens` or `max_model_len` reached.
    Length,
}

impl FinishReason {
    /// vLLM's word.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// One output token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emitted {
    /// Whose.
    pub id: RequestId,
    /// The token.
    pub token: u32,
    /// 0 for the first of the request.
    pub index: u32,
    /// Time since the request's previous token, or since its submission for the first.
    pub gap: Duration,
    /// Prompt tokens that were found in the cache when the request was first admitted.
    pub cached_tokens: u32,
    /// Set with the last token.
    pub finish: Option<FinishReason>,
}

/// A request that ended in a step. Times are on the host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Which.
    pub id: RequestId,
    /// Why.
    pub reason: FinishReason,
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of the output.
    pub output_tokens: u32,
    /// As asked for, after the cut at `max_model_len`.
    pub max_tokens: u32,
    /// Prompt tokens found in the cache.
    pub cached_tokens: u32,
    /// How often it was preempted.
    pub preemptions: u32,
    /// From submission to first admission.
    pub queue: Duration,
    /// From submission to first token.
    pub first_token: Duration,
    /// From submission to last token.
    pub total: Duration,
}

/// What an engine says about itself at the end of a step. Counters count from the start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sequences being computed.
    pub running: u32,
    /// Sequences the scheduler knows and has not admitted, or has preempted.
    pub waiting: u32,
    /// Of those, held back by the limit on adapters.
    pub deferred: u32,
    /// Blocks in use over blocks, 0 to 1.
    pub kv_usage: f64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries_tokens: u64,
    /// Of those, found.
    pub prefix_hits_tokens: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Prompt tokens of requests that have their first token.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Sequences ended by themselves.
    pub finished_stop: u64,
    /// Sequences ended by length.
    pub finished_length: u64,
    /// Sequences aborted.
    pub aborted: u64,
    /// Steps that computed something.
    pub steps: u64,
    /// Adapters of running sequences, by name, sorted.
    pub running_adapters: Vec<String>,
    /// Adapters of waiting sequences, by name, sorted.
    pub waiting_adapters: Vec<String>,
}

/// One step: all of it becomes visible `duration` after the step began.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// How long it takes.
    pub duration: Duration,
    /// What it did.
    pub work: StepWork,
    /// Tokens computed, prompt and decode.
    pub tokens: u32,
    /// Output, in batch order.
    pub emitted: Vec<Emitted>,
    /// Requests that ended.
    pub finished: Vec<Finished>,
    /// KV events, in the order of a vLLM batch: per request, what it evicted before what it
    /// stored.
    pub events: Vec<KvEvent>,
    /// Statistics at the end of the step.
    pub stats: Stats,
}

/// Where a request is kept: an index into `Requests`.
type Slot = u32;

/// The requests of an engine. A slot is found by the id only when a request comes or is aborted:
/// a step looks at every running request, and looks it up by its slot.
#[derive(Clone, Debug, Default)]
struct Requests {
    slots: Vec<Option<Request>>,
    free: Vec<Slot>,
    ids: FxHashMap<RequestId, Slot>,
}

impl Requests {
    fn insert(&mut self, request: Request) -> Slot {
        let id = request.id;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as Slot - 1
        });
        self.slots[slot as usize] = Some(request);
        self.ids.insert(id, slot);
        slot
    }

    fn remove(&mut self, slot: Slot) -> Request {
        let request = self.slots[slot as usize].take().expect(KNOWN);
        self.ids.remove(&request.id);
        self.free.push(slot);
        request
    }

    fn get_mut(&mut self, slot: Slot) -> &mut Request {
        self.slots[slot as usize].as_mut().expect(KNOWN)
    }
}

impl std::ops::Index<Slot> for Requests {
    type Output = Request;
    fn index(&self, slot: Slot) -> &Request {
        self.slots[slot as usize].as_ref().expect(KNOWN)
    }
}

const KNOWN: &str = "the queues hold slots of requests that are there";

#[derive(Clone, Debug)]
struct Request {
    id: RequestId,
    tokens: Vec<u32>,
    prompt_tokens: u32,
    max_tokens: u32,
    stop_after: u32,
    computed: u32,
    blocks: Vec<BlockId>,
    named: u32,
    names: Vec<EngineHash>,
    last_hash: BlockHash,
    cache_salt: Option<String>,
    adapter: Option<usize>,
    script: VecDeque<u32>,
    rng: Rng,
    report_reused: bool,
    cached_tokens: Option<u32>,
    preemptions: u32,
    submitted: Time,
    admitted: Option<Time>,
    first_token: Option<Time>,
    last_token: Time,
}

impl Request {
    fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    fn output_tokens(&self) -> u32 {
        self.len() - self.prompt_tokens
    }

    /// Names the blocks that have become complete.
    fn extend_names(&mut self, config: &ModelConfig, hasher: &mut BlockHasher) {
        let size = config.block_size as usize;
        let adapter = self.adapter.map(|i| &config.adapters[i]);
        while (self.names.len() + 1) * size <= self.tokens.len() {
            let from = self.names.len() * size;
            let cache_salt = self.cache_salt.as_deref().filter(|_| from == 0);
            let extras = HashExtras { adapter, cache_salt };
            let tokens = &self.tokens[from..from + size];
            self.last_hash = hasher.next(&self.last_hash, tokens, extras);
            self.names.push(self.last_hash.key());
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Arrival {
    Submit(Slot),
    Abort(RequestId),
}

/// One engine. A clone goes its own way: for asking what would happen.
#[derive(Clone)]
pub struct EngineModel {
    config: ModelConfig,
    profile: Profile,
    pace: f64,
    hasher: BlockHasher,
    pool: BlockPool,
    requests: Requests,
    running: Vec<Slot>,
    waiting: VecDeque<Slot>,
    inbox: VecDeque<Arrival>,
    events: Vec<KvEvent>,
    stats: Stats,
}

impl EngineModel {
    /// An idle engine with an empty cache.
    pub fn new(config: ModelConfig, profile: Profile) -> Result<EngineModel, ModelConfigError> {
        let counts = [
            ("block_size", config.block_size),
            ("max_model_len", config.max_model_len),
            ("max_num_seqs", config.max_num_seqs),
            ("max_num_batched_tokens", config.max_num_batched_tokens),
            ("max_loras", config.max_loras),
            ("output_ids", config.output_ids.len() as u32),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(ModelConfigError::Zero(name));
        }
        let usable = config.blocks.saturating_sub(1);
        if config.max_model_len.div_ceil(config.block_size) > usable {
            return Err(ModelConfigError::CacheTooSmall {
                max_model_len: config.max_model_len,
                usable,
                block_size: config.block_size,
            });
        }
        Ok(EngineModel {
            hasher: BlockHasher::new(config.hash, &config.hash_seed),
            pool: BlockPool::new(usable),
            requests: Requests::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            inbox: VecDeque::new(),
            events: Vec::new(),
            stats: Stats::default(),
            config,
            profile,
            pace: 1.0,
        })
    }

    /// Settings as given.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Multiplies the duration of every step from the next one on; 0.05 is 20 times faster than the
    /// profile. Negative and NaN count as 0.
    pub fn set_pace(&mut self, pace: f64) {
        self.pace = pace.max(0.0);
    }

    /// Puts a request into the inbox.
    pub fn submit(&mut self, now: Time, request: NewRequest) -> Result<(), SubmitError> {
        let limit = self.config.max_model_len - 1;
        let adapter = match &request.adapter {
            None => None,
            Some(name) => match self.config.adapters.iter().position(|a| a.name == *name) {
                None => return Err(SubmitError::UnknownAdapter(name.clone())),
                found => found,
            },
        };
        if request.tokens.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.tokens.len() > limit as usize {
            return Err(SubmitError::PromptTooLong { tokens: request.tokens.len(), limit });
        }
        if self.requests.ids.contains_key(&request.id) {
            return Err(SubmitError::DuplicateId(request.id));
        }
        let mut accepted = self.accept(now, request, adapter);
        accepted.extend_names(&self.config, &mut self.hasher);
        let slot = self.requests.insert(accepted);
        self.inbox.push_back(Arrival::Submit(slot));
        Ok(())
    }

    fn accept(&self, now: Time, request: NewRequest, adapter: Option<usize>) -> Request {
        let prompt_tokens = request.tokens.len() as u32;
        let (seed, script) = match request.output {
            Output::Greedy => (fingerprint(&request.tokens), Vec::new()),
            Output::Sampled(seed) => (fingerprint(&request.tokens) ^ !seed, Vec::new()),
            Output::Scripted(script) => (fingerprint(&request.tokens), script),
        };
        Request {
            id: request.id,
            tokens: request.tokens,
            prompt_tokens,
            max_tokens: request.max_tokens.min(self.config.max_model_len - prompt_tokens),
            stop_after: request.stop_after.unwrap_or(u32::MAX),
            computed: 0,
            blocks: Vec::new(),
            named: 0,
            names: Vec::new(),
            last_hash: self.hasher.root(),
            cache_salt: request.cache_salt,
            adapter,
            script: script.into(),
            rng: Rng::seeded(self.config.seed ^ seed),
            report_reused: request.report_reused,
            cached_tokens: None,
            preemptions: 0,
            submitted: now,
            admitted: None,
            first_token: None,
            last_token: now,
        }
    }

    /// Ends a request before the next step. An unknown or finished one is ignored.
    pub fn abort(&mut self, id: RequestId) {
        if self.requests.ids.contains_key(&id) {
            self.inbox.push_back(Arrival::Abort(id));
        }
    }

    /// Empties the prefix cache. Refused, like vLLM's, while a sequence holds blocks. The event
    /// leaves with the next step: an idle engine looks warm until then.
    pub fn reset_prefix_cache(&mut self) -> bool {
        let done = self.pool.reset();
        if done && self.config.events {
            self.events.push(KvEvent::Cleared);
        }
        done
    }

    /// Whether there is anything to do: a sequence, or an arrival to take in.
    pub fn is_idle(&self) -> bool {
        self.requests.ids.is_empty() && self.inbox.is_empty()
    }

    /// Statistics as of the end of the last step.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// What the prefix cache holds now: how many blocks have each name.
    pub fn cached_names(&self) -> BTreeMap<EngineHash, u32> {
        self.pool.names()
    }

    /// How many leading tokens of this prompt the cache holds now, as a request would find them.
    pub fn cached_prefix(&mut self, tokens: &[u32], salt: Option<&str>, adapter: &str) -> u32 {
        let adapter = self.config.adapters.iter().find(|a| a.name == adapter);
        let size = self.config.block_size as usize;
        let mut parent = self.hasher.root();
        let mut hit = 0;
        for (i, block) in tokens.chunks_exact(size).enumerate() {
            let extras = HashExtras { adapter, cache_salt: salt.filter(|_| i == 0) };
            parent = self.hasher.next(&parent, block, extras);
            if self.pool.find(parent.key()).is_none() {
                break;
            }
            hit += 1;
        }
        hit.min(tokens.len().saturating_sub(1) / size) as u32 * self.config.block_size
    }
}

/// A number that depends on every token.
fn fingerprint(tokens: &[u32]) -> u64 {
    tokens.iter().fold(tokens.len() as u64, |sum, &token| {
        (sum.rotate_left(5) ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    })
}
