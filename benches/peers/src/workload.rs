//! Which prompts exist, who holds which of their blocks, and how do engines name them?
//!
//! Everything follows from a seed. The shapes: prompts of 7,200 tokens of which the first 6,000
//! are shared by five prompts each (750 prompts, 150 prefixes, as in llm-d's benchmark), and long
//! prompts that share nothing.

use std::ops::Range;

use dynamo_kv_router::protocols::{
    BlockHashOptions, compute_block_hash_for_seq, compute_seq_hash_for_block,
};
use kvroute_core::Rng;
use kvroute_core::blocks::{self, ChainSpec, PromptExtras, Root};

/// Prompts of the shared shape.
pub const PROMPTS: usize = 750;
const PROMPTS_PER_PREFIX: usize = 5;
const PREFIX_TOKENS: usize = 6_000;
/// Tokens of a prompt of the shared shape.
pub const PROMPT_TOKENS: usize = 7_200;
/// Ids of a tokenizer of usual size.
const VOCABULARY: usize = 150_000;

/// One prompt.
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// Its blocks' names: a rolling XXH3 hash that Dynamo's `PositionalIndexer` can reproduce, as
    /// it demands. Opaque to the others.
    names: Vec<u64>,
    /// Its blocks' keys in kvroute.
    keys: Vec<u64>,
}

impl Prompt {
    pub fn new(tokens: Vec<u32>, block_size: u32) -> Prompt {
        let local = compute_block_hash_for_seq(&tokens, block_size, BlockHashOptions::default());
        let names = compute_seq_hash_for_block(&local);
        let spec = ChainSpec::exact(block_size);
        let chain = blocks::chain(spec, Root::Base, &tokens, &PromptExtras::default());
        Prompt { tokens, names, keys: chain.keys.iter().map(|key| key.0).collect() }
    }

    pub fn blocks(&self) -> usize {
        self.names.len()
    }
}

/// How engines name blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// By a hash that all engines share (the same hash seed everywhere), and that is not kvroute's.
    Shared,
    /// By kvroute's own keys.
    Native,
    /// By hashes that differ from engine to engine.
    Own,
}

impl Names {
    fn of(self, prompt: &Prompt, block: usize, endpoint: u16) -> u64 {
        match self {
            Names::Shared => prompt.names[block],
            Names::Native => prompt.keys[block],
            Names::Own => {
                let salt = (u64::from(endpoint) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                (prompt.names[block] ^ salt).wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(29)
            }
        }
    }
}

/// An endpoint holds some blocks of a prompt.
#[derive(Clone)]
pub struct Held {
    pub endpoint: u16,
    pub prompt: u32,
    pub blocks: Range<usize>,
}

/// What an engine says, owned as if it came from the network.
#[derive(Clone)]
pub enum Raw {
    Stored {
        endpoint: u16,
        block_size: u32,
        /// The name of the block before the first.
        parent: Option<u64>,
        names: Vec<u64>,
        tokens: Vec<u32>,
    },
    Removed {
        endpoint: u16,
        names: Vec<u64>,
    },
}

impl Raw {
    pub fn blocks(&self) -> usize {
        match self {
            Raw::Stored { names, .. } | Raw::Removed { names, .. } => names.len(),
        }
    }
}

/// The storing of some blocks of a prompt, cut into events.
pub fn stores(
    prompt: &Prompt,
    block_size: u32,
    endpoint: u16,
    blocks: Range<usize>,
    names: Names,
    per_event: usize,
) -> impl Iterator<Item = Raw> {
    let size = block_size as usize;
    blocks.clone().step_by(per_event).map(move |start| {
        let end = (start + per_event).min(blocks.end);
        Raw::Stored {
            endpoint,
            block_size,
            parent: start.checked_sub(1).map(|block| names.of(prompt, block, endpoint)),
            names: (start..end).map(|block| names.of(prompt, block, endpoint)).collect(),
            tokens: prompt.tokens[start * size..end * size].to_vec(),
        }
    })
}

/// Their removal, the last block first, as engines evict.
pub fn removals(
    prompt: &Prompt,
    endpoint: u16,
    blocks: Range<usize>,
    names: Names,
    per_event: usize,
) -> impl Iterator<Item = Raw> {
    let count = blocks.len();
    (0..count).step_by(per_event).map(move |done| {
        let last = blocks.end - done;
        let first = last - per_event.min(count - done);
        let list = (first..last).rev().map(|block| names.of(prompt, block, endpoint)).collect();
        Raw::Removed { endpoint, names: list }
    })
}

/// Prompts and their holders.
pub struct Workload {
    pub block_size: u32,
    pub endpoints: u16,
    pub prompts: Vec<Prompt>,
    /// In the order in which they are stored.
    pub held: Vec<Held>,
}

/// Random tokens.
pub fn tokens(rng: &mut Rng, count: usize) -> Vec<u32> {
    (0..count).map(|_| rng.below(VOCABULARY) as u32).collect()
}

impl Workload {
    /// Prompts of 7,200 tokens, five to a prefix. `holders` endpoints hold each prefix, one of them
    /// holds the rest of a prompt.
    pub fn shared(
        seed: u64,
        count: usize,
        block_size: u32,
        endpoints: u16,
        holders: u16,
    ) -> Workload {
        let mut rng = Rng::seeded(seed);
        let prefixes = count / PROMPTS_PER_PREFIX;
        let starts: Vec<Vec<u32>> =
            (0..prefixes).map(|_| tokens(&mut rng, PREFIX_TOKENS)).collect();
        let prompts: Vec<Prompt> = (0..count)
            .map(|prompt| {
                let mut all = starts[prompt % prefixes].clone();
                all.extend(tokens(&mut rng, PROMPT_TOKENS - PREFIX_TOKENS));
                Prompt::new(all, block_size)
            })
            .collect();
        let shared = PREFIX_TOKENS / block_size as usize;
        let nth =
            |prompt: usize, n: usize| ((prompt % prefixes + n) % usize::from(endpoints)) as u16;
        let mut held: Vec<Held> = Vec::new();
        for prefix in 0..prefixes {
            let holds = |n| Held {
                endpoint: nth(prefix, usize::from(n)),
                prompt: prefix as u32,
                blocks: 0..shared,
            };
            held.extend((0..holders).map(holds));
        }
        for (prompt, of) in prompts.iter().enumerate() {
            let endpoint = nth(prompt, rng.below(usize::from(holders)));
            held.push(Held { endpoint, prompt: prompt as u32, blocks: shared..of.blocks() });
        }
        // Each endpoint stores by itself: first its prefixes, then the rest.
        held.sort_by_key(|held| held.endpoint);
        Workload { block_size, endpoints, prompts, held }
    }

    /// Prompts that share nothing, each on one of 8 endpoints, in turn.
    pub fn distinct(seed: u64, block_size: u32, count: usize, tokens_each: usize) -> Workload {
        let mut rng = Rng::seeded(seed);
        let prompts: Vec<Prompt> =
            (0..count).map(|_| Prompt::new(tokens(&mut rng, tokens_each), block_size)).collect();
        let holder = |(at, prompt): (usize, &Prompt)| Held {
            endpoint: (at % 8) as u16,
            prompt: at as u32,
            blocks: 0..prompt.blocks(),
        };
        let held = prompts.iter().enumerate().map(holder).collect();
        Workload { block_size, endpoints: 8, prompts, held }
    }

    /// Everything stored, in order.
    pub fn stores(&self, names: Names, per_event: usize) -> impl Iterator<Item = Raw> {
        self.held.iter().flat_map(move |held| {
            let prompt = &self.prompts[held.prompt as usize];
            let blocks = held.blocks.clone();
            stores(prompt, self.block_size, held.endpoint, blocks, names, per_event)
        })
    }

    /// Everything removed, the latest first.
    pub fn removals(&self, names: Names, per_event: usize) -> impl Iterator<Item = Raw> {
        self.held.iter().rev().flat_map(move |held| {
            let prompt = &self.prompts[held.prompt as usize];
            removals(prompt, held.endpoint, held.blocks.clone(), names, per_event)
        })
    }
}
