//! The obvious model of the index: sets of whole prefixes, searched from one end to the other.

use std::collections::BTreeMap;

use super::{Hit, IndexLimits, TierWeights};
use crate::event::{BlockRemoved, BlockStored, EngineHash, Extra, GroupKind, KvEvent, Tier};
use crate::{EndpointId, Time};

/// A block together with all before it: adapter, then tokens and extras block by block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix {
    pub adapter: Option<String>,
    pub blocks: Vec<(Vec<u32>, Vec<String>)>,
}

impl Prefix {
    /// The first `n` blocks.
    pub fn first(&self, n: usize) -> Prefix {
        Prefix { adapter: self.adapter.clone(), blocks: self.blocks[..n].to_vec() }
    }

    fn depths(&self) -> impl Iterator<Item = Prefix> + '_ {
        (1..=self.blocks.len()).map(|n| self.first(n))
    }
}

#[derive(Clone, Debug)]
struct Waiting {
    event: BlockStored,
    gone: Vec<usize>,
}

#[derive(Clone, Debug, Default)]
struct Endpoint {
    names: BTreeMap<EngineHash, (Prefix, [u32; 4])>,
    groups: BTreeMap<u32, (GroupKind, BTreeMap<EngineHash, [u32; 4]>)>,
    waiting: Vec<Waiting>,
    /// Oldest first.
    history: Vec<Prefix>,
}

/// What `Index` must be equal to.
#[derive(Debug)]
pub(super) struct Model {
    limits: IndexLimits,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    speculations: BTreeMap<u64, (EndpointId, Prefix, Time)>,
}

fn text(extra: &Extra) -> String {
    match extra {
        Extra::Text(text) | Extra::Multimodal(text) => text.clone(),
        Extra::Digest(_) => unreachable!("not generated"),
    }
}

impl Endpoint {
    fn prefix_of(&self, event: &BlockStored) -> Option<Prefix> {
        match event.parent {
            None => Some(Prefix { adapter: event.lora_name.clone(), blocks: Vec::new() }),
            Some(parent) => self.names.get(&parent).map(|named| named.0.clone()),
        }
    }

    fn place(
        &mut self,
        event: &BlockStored,
        mut prefix: Prefix,
        gone: &[usize],
        added: &mut Vec<Prefix>,
    ) {
        let chunks = event.tokens.ids().chunks(event.block_size as usize);
        for (i, (&hash, chunk)) in event.hashes.iter().zip(chunks).enumerate() {
            let extras = event.extras.get(i).into_iter().flatten().map(text).collect();
            prefix.blocks.push((chunk.to_vec(), extras));
            if !gone.contains(&i) {
                let named = self.names.entry(hash).or_insert((prefix.clone(), [0; 4]));
                named.1[event.tier.index()] += 1;
                added.push(prefix.clone());
            }
        }
    }

    /// Returns the blocks that got their place.
    fn stored(&mut self, event: &BlockStored, pending_max: u32) -> Vec<Prefix> {
        let mut added = Vec::new();
        if let Some(group) = event.group.filter(|_| !event.tokens.is_empty()) {
            let group = self.groups.entry(group).or_insert((event.kind, BTreeMap::new()));
            if group.0 != GroupKind::Full {
                for &hash in &event.hashes {
                    group.1.entry(hash).or_default()[event.tier.index()] += 1;
                }
                return added;
            }
        }
        let has = |hash| self.names.get(hash).is_some_and(|n| n.1[event.tier.index()] > 0);
        if event.tokens.is_empty() {
            for hash in &event.hashes {
                if let Some(named) = self.names.get_mut(hash) {
                    named.1[event.tier.index()] += 1;
                }
            }
        } else if event.parent.is_none()
            && event.hashes.len() > 1
            && self.groups.len() < 2
            && event.hashes.iter().all(has)
        {
            // Announced again.
        } else if let Some(prefix) = self.prefix_of(event) {
            self.place(event, prefix, &[], &mut added);
            while let Some(at) =
                self.waiting.iter().position(|w| self.prefix_of(&w.event).is_some())
            {
                let waiting = self.waiting.remove(at);
                let prefix = self.prefix_of(&waiting.event).unwrap();
                self.place(&waiting.event, prefix, &waiting.gone, &mut added);
            }
        } else if event.hashes.len() <= pending_max as usize {
            self.waiting.push(Waiting { event: event.clone(), gone: Vec::new() });
            let blocks = |w: &Waiting| w.event.hashes.len();
            while self.waiting.iter().map(blocks).sum::<usize>() > pending_max as usize {
                self.waiting.remove(0);
            }
        }
        added
    }

    fn removed(&mut self, event: &BlockRemoved) {
        let tier = event.tier.index();
        for hash in &event.hashes {
            let grouped = event.group.is_some() && !self.groups.is_empty();
            match event.group.and_then(|group| self.groups.get_mut(&group)) {
                None if grouped => continue,
                Some((kind, members)) if *kind != GroupKind::Full => {
                    if let Some(copies) = members.get_mut(hash) {
                        copies[tier] = copies[tier].saturating_sub(1);
                    }
                    continue;
                }
                _ => {}
            }
            match self.names.get_mut(hash).filter(|named| named.1[tier] > 0) {
                Some(named) => named.1[tier] -= 1,
                None => self.removed_waiting(*hash, event.tier),
            }
            self.names.retain(|_, named| named.1 != [0; 4]);
        }
    }

    fn removed_waiting(&mut self, hash: EngineHash, tier: Tier) {
        for waiting in self.waiting.iter_mut().filter(|w| w.event.tier == tier) {
            let here = (0..waiting.event.hashes.len())
                .find(|i| waiting.event.hashes[*i] == hash && !waiting.gone.contains(i));
            if let Some(i) = here {
                waiting.gone.push(i);
                return;
            }
        }
    }

    fn clear(&mut self) {
        *self = Endpoint { history: std::mem::take(&mut self.history), ..Endpoint::default() };
    }

    fn tiers(&self, prefix: &Prefix) -> [bool; 4] {
        let mut tiers = [false; 4];
        for (_, copies) in self.names.values().filter(|named| named.0 == *prefix) {
            copies.iter().zip(&mut tiers).for_each(|(copies, tier)| *tier |= *copies > 0);
        }
        tiers
    }

    /// Whether an engine can go on after `m` blocks.
    fn reusable(&self, prefix: &Prefix, m: usize, assumed: &dyn Fn(&Prefix) -> bool) -> bool {
        self.groups.values().all(|(kind, members)| {
            let size = prefix.blocks.first().map_or(1, |block| block.0.len());
            let needed = match kind {
                GroupKind::SlidingWindow { window } => (*window as usize - 1).div_ceil(size),
                GroupKind::Mamba => 1,
                _ => 0,
            };
            (m.saturating_sub(needed)..m).all(|i| {
                let block = prefix.first(i + 1);
                let named = self.names.iter().find(|(_, named)| named.0 == block);
                let copies = named.and_then(|(hash, _)| members.get(hash));
                copies.is_some_and(|copies| *copies != [0; 4]) || assumed(&block)
            })
        })
    }
}

impl Model {
    pub fn new(limits: IndexLimits) -> Model {
        Model { limits, endpoints: BTreeMap::new(), speculations: BTreeMap::new() }
    }

    pub fn add_endpoint(&mut self, id: EndpointId) {
        self.endpoints.entry(id).or_default();
    }

    pub fn remove_endpoint(&mut self, id: EndpointId) {
        self.endpoints.remove(&id);
        self.speculations.retain(|_, speculation| speculation.0 != id);
    }

    pub fn apply(&mut self, id: EndpointId, event: &KvEvent) {
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        match event {
            KvEvent::Cleared => endpoint.clear(),
            KvEvent::Removed(removed) => endpoint.removed(removed),
            KvEvent::Stored(stored) => {
                let added = endpoint.stored(stored, self.limits.pending_blocks_per_endpoint_max);
                let awaited = |block: &Prefix| self.is_speculated(id, block);
                if added.iter().any(awaited) {
                    // All speculations whose last block is there are fulfilled.
                    let endpoint = &self.endpoints[&id];
                    let filled = |prompt: &Prefix| endpoint.tiers(prompt) != [false; 4];
                    self.speculations.retain(|_, (at, prompt, _)| *at != id || !filled(prompt));
                }
            }
        }
    }

    fn is_speculated(&self, id: EndpointId, block: &Prefix) -> bool {
        let mut all = self.speculations.values();
        all.any(|(at, prompt, _)| *at == id && prompt.depths().any(|p| p == *block))
    }

    pub fn clear_resident(&mut self, id: EndpointId) {
        self.endpoints.get_mut(&id).into_iter().for_each(Endpoint::clear);
    }

    pub fn record(&mut self, id: EndpointId, prompt: &Prefix) {
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        let limit = self.limits.history_blocks_per_endpoint_max as usize;
        let mut used: Vec<Prefix> = prompt.depths().take(limit).collect();
        used.reverse();
        endpoint.history.retain(|prefix| !used.contains(prefix));
        endpoint.history.extend(used);
        let over = endpoint.history.len().saturating_sub(limit);
        endpoint.history.drain(..over);
    }

    pub fn speculate(&mut self, serial: u64, id: EndpointId, prompt: &Prefix, until: Time) {
        if self.endpoints.contains_key(&id) {
            self.speculations.insert(serial, (id, prompt.clone(), until));
        }
    }

    pub fn withdraw(&mut self, serial: u64) {
        self.speculations.remove(&serial);
    }

    pub fn expire(&mut self, now: Time) {
        self.speculations.retain(|_, speculation| speculation.2 > now);
    }

    /// How far a prompt of `tokens` tokens, with these full blocks, reaches on an endpoint.
    pub fn lookup(
        &self,
        id: EndpointId,
        prompt: &Prefix,
        tokens: usize,
        weights: &TierWeights,
    ) -> Hit {
        let Some(endpoint) = self.endpoints.get(&id) else { return Hit::default() };
        let speculated = |block: &Prefix| self.is_speculated(id, block);
        let depths: Vec<Prefix> = prompt.depths().collect();
        let reach = |holds: &dyn Fn(&Prefix) -> bool| {
            depths.iter().take_while(|block| holds(block)).count()
        };
        let is_resident = |block: &Prefix| endpoint.tiers(block) != [false; 4];
        let recorded = |block: &Prefix| endpoint.history.contains(block);
        let boundary = |reach: usize, assumed: &dyn Fn(&Prefix) -> bool| match endpoint.groups.len()
        {
            0 | 1 => reach,
            _ => {
                let size = prompt.blocks.first().map_or(1, |block| block.0.len());
                let most = reach.min(tokens.saturating_sub(1) / size);
                (0..=most).rev().find(|&m| endpoint.reusable(prompt, m, assumed)).unwrap()
            }
        };
        let resident = boundary(reach(&is_resident), &|_| false);
        let expected = boundary(reach(&|b| is_resident(b) || speculated(b)), &speculated);
        let weight = |block: &Prefix| {
            let tiers = endpoint.tiers(block);
            let held = (0..4).filter(|&tier| tiers[tier]).map(|tier| weights.0[tier]);
            held.reduce(f64::max).unwrap_or(1.0)
        };
        let weigh = |n: usize| depths[..n].iter().map(weight).sum::<f64>();
        let tier = |tier: usize| reach(&|block| endpoint.tiers(block)[tier]).min(resident) as u32;
        Hit {
            resident: resident as u32,
            resident_weighted: weigh(resident),
            by_tier: std::array::from_fn(tier),
            expected: expected as u32,
            expected_weighted: weigh(expected),
            history: reach(&recorded) as u32,
            any: reach(&|b| is_resident(b) || speculated(b) || recorded(b)) as u32,
        }
    }
}
