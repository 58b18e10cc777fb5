//! kvroute's index.

use kvroute_core::EndpointId;
use kvroute_core::blocks::{self, Chain, ChainSpec, PromptExtras, Root};
use kvroute_core::event::{
    BlockRemoved, BlockStored, EngineHash, GroupKind, Hashes, KvEvent, Tier,
};
use kvroute_core::index::{Applied, Hits, Index, IndexLimits, TierWeights};

use super::Subject;
use crate::workload::Raw;

pub struct Ours {
    index: Index,
    applied: Applied,
}

#[derive(Default)]
pub struct Scratch {
    hits: Hits,
    weights: TierWeights,
}

fn id(slot: u16) -> EndpointId {
    EndpointId { slot, generation: 0 }
}

fn hashes(names: Vec<u64>) -> Hashes {
    names.into_iter().map(EngineHash).collect()
}

impl Subject for Ours {
    const NAME: &'static str = "kvroute";

    type Event = (EndpointId, KvEvent);
    type Query = Chain;
    type Scratch = Scratch;

    fn new(endpoints: u16) -> Ours {
        // No limit that this benchmark could reach: it compares what the same blocks cost.
        let limits = IndexLimits { bytes_max: 1 << 36, ..IndexLimits::default() };
        let mut index = Index::new(limits);
        (0..endpoints).for_each(|slot| index.add_endpoint(id(slot)));
        Ours { index, applied: Applied::default() }
    }

    fn prepare(raw: Raw) -> (EndpointId, KvEvent) {
        match raw {
            Raw::Stored { endpoint, block_size, parent, names, tokens } => {
                let mut stored = BlockStored {
                    hashes: hashes(names),
                    parent: parent.map(EngineHash),
                    tokens: tokens.into(),
                    block_size,
                    lora_name: None,
                    tier: Tier::Gpu,
                    extras: Vec::new(),
                    group: None,
                    kind: GroupKind::Full,
                };
                stored.hash_tokens();
                (id(endpoint), KvEvent::Stored(stored))
            }
            Raw::Removed { endpoint, names } => {
                let removed = BlockRemoved { hashes: hashes(names), tier: Tier::Gpu, group: None };
                (id(endpoint), KvEvent::Removed(removed))
            }
        }
    }

    fn apply(&mut self, (id, event): (EndpointId, KvEvent)) {
        self.index.apply_to(id, &event, &mut self.applied);
    }

    fn apply_message(&mut self, events: &mut Vec<(EndpointId, KvEvent)>) {
        let mut rest = &events[..];
        while !rest.is_empty() {
            let soon = self.index.prefetch(rest.iter().map(|(_, event)| event));
            let (now, later) = rest.split_at(soon);
            now.iter().for_each(|(id, event)| self.index.apply_to(*id, event, &mut self.applied));
            rest = later;
        }
        events.clear();
    }

    fn query(tokens: &[u32], block_size: u32) -> Chain {
        let spec = ChainSpec::exact(block_size);
        blocks::chain(spec, Root::Base, tokens, &PromptExtras::default())
    }

    fn lookup(&self, query: &mut Chain, scratch: &mut Scratch, scores: &mut [u32]) {
        self.index.lookup(query, &scratch.weights, &mut scratch.hits);
        let hits = scratch.hits.resident_by_slot();
        let known = hits.len().min(scores.len());
        scores[..known].copy_from_slice(&hits[..known]);
        scores[known..].fill(0);
    }
}
