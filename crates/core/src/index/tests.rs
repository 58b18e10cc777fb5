//! The index against the model, and the semantics one by one.

mod budget;
mod random;
mod semantics;

use super::*;
use crate::blocks::{self, ChainSpec, PromptExtras, Root};
use crate::event::{BlockRemoved, BlockStored, EngineHash, GroupKind, KvEvent, Tier};

const ROOMY: IndexLimits = IndexLimits {
    bytes_max: 1 << 30,
    history_blocks_per_endpoint_max: 1000,
    pending_blocks_per_endpoint_max: 1000,
    speculations_max: 1000,
};

const SIZE: u32 = 4;

fn id(slot: u16) -> EndpointId {
    EndpointId { slot, generation: 0 }
}

/// An index with endpoints in slots 0 to `n - 1`.
fn index_of(limits: IndexLimits, n: u16) -> Index {
    let mut index = Index::new(limits);
    (0..n).for_each(|slot| index.add_endpoint(id(slot)));
    index
}

/// A prompt of `blocks` blocks that shares nothing with one of another `name`.
fn prompt(name: u32, blocks: u32) -> Vec<u32> {
    (0..blocks * SIZE).map(|i| name * 100_000 + i).collect()
}

fn chain_of(tokens: &[u32]) -> Chain {
    blocks::chain(ChainSpec::exact(SIZE), Root::Base, tokens, &PromptExtras::default())
}

/// Engine hashes of a prompt: the keys, disguised.
fn hashes(tokens: &[u32]) -> Vec<EngineHash> {
    chain_of(tokens).keys.iter().map(|key| EngineHash(!key.0)).collect()
}

/// The event that stores blocks `from..` of a prompt.
fn stored(tokens: &[u32], from: usize) -> BlockStored {
    let all = hashes(tokens);
    BlockStored {
        hashes: all[from..].to_vec().into(),
        parent: from.checked_sub(1).map(|parent| all[parent]),
        tokens: tokens[from * SIZE as usize..all.len() * SIZE as usize].to_vec().into(),
        block_size: SIZE,
        lora_name: None,
        tier: Tier::Gpu,
        extras: Vec::new(),
        group: None,
        kind: GroupKind::Full,
    }
}

fn store(index: &mut Index, slot: u16, tokens: &[u32], from: usize) -> Applied {
    index.apply(id(slot), &KvEvent::Stored(stored(tokens, from)))
}

fn remove(index: &mut Index, slot: u16, hashes: &[EngineHash], tier: Tier) -> Applied {
    let removed = BlockRemoved { hashes: hashes.to_vec().into(), tier, group: None };
    index.apply(id(slot), &KvEvent::Removed(removed))
}

fn hit(index: &Index, slot: u16, tokens: &[u32]) -> Hit {
    let mut hits = Hits::new();
    index.lookup(&chain_of(tokens), &TierWeights::default(), &mut hits);
    hits.get(id(slot))
}

fn resident(index: &Index, slot: u16, tokens: &[u32]) -> u32 {
    hit(index, slot, tokens).resident
}
