//! How far does a prompt's chain reach on each endpoint?

use super::Index;
use super::endpoint::Endpoint;
use super::holders::Holder;
use crate::EndpointId;
use crate::blocks::{BlockKey, Chain};

/// What a block is worth, by the best tier that holds it (`Tier::index()`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierWeights(pub [f64; 4]);

impl Default for TierWeights {
    /// llm-d's: gpu 1, cpu 0.8, every other tier 1.
    fn default() -> TierWeights {
        TierWeights([1.0, 0.8, 1.0, 1.0])
    }
}

impl TierWeights {
    /// The weight of a block by its set of tiers.
    fn by_set(&self) -> [f64; 16] {
        let best = |set: usize| {
            let weights = (0..4).filter(|tier| set & 1 << tier != 0).map(|tier| self.0[tier]);
            weights.fold(0.0, f64::max)
        };
        std::array::from_fn(best)
    }
}

/// How far one chain reaches on one endpoint. All counts are blocks from the start of the prompt
/// without a hole.
///
/// On an endpoint with several KV cache groups, `resident`, `by_tier` and `expected` end at a
/// boundary from which the engine can really go on, and before the last token of the prompt, which
/// an engine always computes; so they can be smaller than what is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hit {
    /// Resident in any tier, as the engine reported.
    pub resident: u32,
    /// The same, each block by the weight of its best tier.
    pub resident_weighted: f64,
    /// Resident, per tier, by `Tier::index()`.
    pub by_tier: [u32; 4],
    /// Resident or speculative.
    pub expected: u32,
    /// The same; a block that is only speculative weighs 1.
    pub expected_weighted: f64,
    /// In the routing history.
    pub history: u32,
    /// Resident, speculative or in the history: for endpoints whose reports are incomplete.
    pub any: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Row {
    generation: u32,
    touched: bool,
    hit: Hit,
}

/// The hits of one lookup, dense by slot. Reuse it: it allocates only when a larger slot than ever
/// before is hit.
#[derive(Clone, Debug, Default)]
pub struct Hits {
    rows: Vec<Row>,
    touched: Vec<u16>,
}

impl Hits {
    /// No hits.
    pub fn new() -> Hits {
        Hits::default()
    }

    /// The hit of an endpoint; all zero when its first block is not there.
    pub fn get(&self, id: EndpointId) -> Hit {
        match self.rows.get(usize::from(id.slot)) {
            Some(row) if row.touched && row.generation == id.generation => row.hit,
            _ => Hit::default(),
        }
    }

    /// Forgets all hits, keeps the memory. A lookup begins with it.
    pub fn reset(&mut self) {
        for slot in self.touched.drain(..) {
            self.rows[usize::from(slot)] = Row::default();
        }
    }

    fn touch(&mut self, slot: u16, generation: u32) {
        if self.rows.len() <= usize::from(slot) {
            self.rows.resize(usize::from(slot) + 1, Row::default());
        }
        let row = &mut self.rows[usize::from(slot)];
        *row = Row { generation, touched: true, hit: Hit::default() };
        self.touched.push(slot);
    }
}

impl Hit {
    /// Takes block `at` of the chain into account; whether any count went on.
    fn advance(&mut self, at: u32, holder: Holder, weights: &[f64; 16]) -> bool {
        if self.any != at {
            return false;
        }
        self.any = at + 1;
        let tiers = holder.bits & Holder::TIERS;
        let weight = weights[usize::from(tiers)];
        for (tier, count) in self.by_tier.iter_mut().enumerate() {
            *count += u32::from(tiers & 1 << tier != 0 && *count == at);
        }
        if tiers != 0 && self.resident == at {
            self.resident = at + 1;
            self.resident_weighted += weight;
        }
        if (tiers != 0 || holder.speculations > 0) && self.expected == at {
            self.expected = at + 1;
            self.expected_weighted += if tiers != 0 { weight } else { 1.0 };
        }
        self.history += u32::from(holder.bits & Holder::HISTORY != 0 && self.history == at);
        true
    }
}

impl Index {
    /// Finds how far a chain reaches on every endpoint. Cost: blocks of the longest hit times
    /// holders of each; nothing is allocated per endpoint or per call. What `hits` held before is
    /// forgotten.
    pub fn lookup(&self, chain: &Chain, weights: &TierWeights, hits: &mut Hits) {
        hits.reset();
        let weights = weights.by_set();
        for (at, key) in (0u32..).zip(&chain.keys) {
            let holders = self.blocks.holders(key.0);
            if at == 0 {
                for holder in holders {
                    hits.touch(holder.slot, self.generation(holder.slot));
                }
            }
            let mut goes_on = false;
            for &holder in holders {
                if let Some(row) = hits.rows.get_mut(usize::from(holder.slot)) {
                    goes_on |= row.touched && row.hit.advance(at, holder, &weights);
                }
            }
            if !goes_on {
                break;
            }
        }
        for &slot in &hits.touched {
            if let Some(endpoint) = self.slots[usize::from(slot)].as_deref()
                && endpoint.is_hybrid()
            {
                let hit = &mut hits.rows[usize::from(slot)].hit;
                self.narrow(endpoint, chain, &weights, hit);
            }
        }
    }

    fn generation(&self, slot: u16) -> u32 {
        self.slots[usize::from(slot)].as_deref().map_or(0, |endpoint| endpoint.generation)
    }

    /// Shortens a hit to where an engine with several groups can go on.
    fn narrow(&self, endpoint: &Endpoint, chain: &Chain, weights: &[f64; 16], hit: &mut Hit) {
        let Some(before_last) = chain.tokens.checked_sub(1) else { return };
        let reusable = before_last / chain.spec.block_size.max(1);
        let slot = endpoint.slot;
        let holder = |key: &BlockKey| self.blocks.holder(key.0, slot);
        let weigh = |holder: Holder| match holder.bits & Holder::TIERS {
            0 => 1.0,
            tiers => weights[usize::from(tiers)],
        };
        let sum = |keys: &[BlockKey]| keys.iter().map(|key| weigh(holder(key))).sum();

        let resident = &chain.keys[..hit.resident.min(reusable) as usize];
        let resident = &resident[..endpoint.boundary(resident, |_| false)];
        hit.resident = resident.len() as u32;
        hit.resident_weighted = sum(resident);
        hit.by_tier.iter_mut().for_each(|count| *count = (*count).min(hit.resident));

        // A request on its way will leave the other groups' blocks as well.
        let expected = &chain.keys[..hit.expected.min(reusable) as usize];
        let speculated = |key: BlockKey| holder(&key).speculations > 0;
        let expected = &expected[..endpoint.boundary(expected, speculated)];
        hit.expected = expected.len() as u32;
        hit.expected_weighted = sum(expected);
    }
}
