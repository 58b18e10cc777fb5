//! How far does a prompt's chain reach on each endpoint?

use super::Index;
use super::endpoint::Endpoint;
use super::sets::{EMPTY, Plane, Set, SetId};
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

/// Ways to hold a block that reach for themselves, as planes: resident, expected, recorded, any.
const WAYS: [u8; 4] = [
    Plane::TIERS,
    Plane::TIERS | 1 << Plane::SPECULATIVE,
    1 << Plane::HISTORY,
    Plane::TIERS | 1 << Plane::SPECULATIVE | 1 << Plane::HISTORY,
];

/// What tiers a hit is in, where that is not all in the first.
#[derive(Clone, Copy, Debug, Default)]
struct Tiers {
    by_tier: [u32; 4],
    resident_weighted: f64,
    expected_weighted: f64,
}

/// Blocks of the chain up to `end` are held by `set`.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    end: u32,
    set: SetId,
}

/// The hits of one lookup, dense by slot. Reuse it: it allocates only when a larger slot, or a path
/// through more runs, than ever before is hit.
#[derive(Clone, Debug, Default)]
pub struct Hits {
    /// By way, by slot; empty where a way reaches as far as the one before.
    reach: [Vec<u32>; WAYS.len()],
    /// Of the endpoints, by slot.
    generations: Vec<u32>,
    /// By slot, if the first tier is not the only one.
    tiers: Vec<Tiers>,
    /// Hits that more than their own blocks decide.
    narrowed: Vec<(EndpointId, Hit)>,
    path: Vec<Stretch>,
    /// Weight of a block in the first tier.
    weight: f64,
    in_tiers: bool,
}

impl Hits {
    /// No hits.
    pub fn new() -> Hits {
        Hits::default()
    }

    /// The hit of an endpoint; all zero when its first block is not there.
    pub fn get(&self, id: EndpointId) -> Hit {
        let slot = usize::from(id.slot);
        let [resident, expected, history, any] = &self.reach;
        let Some(&resident) = resident.get(slot) else { return Hit::default() };
        if self.generations.get(slot) != Some(&id.generation) {
            return Hit::default();
        }
        if let Some((_, hit)) = self.narrowed.iter().find(|(narrowed, _)| *narrowed == id) {
            return *hit;
        }
        let expected = expected.get(slot).copied().unwrap_or(resident);
        let history = history.get(slot).copied().unwrap_or(0);
        let any = any.get(slot).copied().unwrap_or(expected);
        let tiers = match self.tiers.get(slot).filter(|_| self.in_tiers) {
            Some(tiers) => *tiers,
            None => Tiers {
                by_tier: [resident, 0, 0, 0],
                resident_weighted: f64::from(resident) * self.weight,
                expected_weighted: f64::from(resident) * self.weight
                    + f64::from(expected - resident),
            },
        };
        let Tiers { by_tier, resident_weighted, expected_weighted } = tiers;
        Hit { resident, resident_weighted, by_tier, expected, expected_weighted, history, any }
    }

    /// `Hit::resident` of each endpoint by its slot; slots behind the end hold nothing.
    pub fn resident_by_slot(&self) -> &[u32] {
        &self.reach[0]
    }

    /// Forgets all hits, keeps the memory. A lookup begins with it.
    pub fn reset(&mut self) {
        self.reach.iter_mut().for_each(Vec::clear);
        self.narrowed.clear();
        self.path.clear();
        self.in_tiers = false;
    }
}

impl Index {
    /// Finds how far a chain reaches on every endpoint. Cost: runs that the chain goes through,
    /// and holders of its first block; nothing is allocated per endpoint or per call. What `hits`
    /// held before is forgotten.
    pub fn lookup(&self, chain: &Chain, weights: &TierWeights, hits: &mut Hits) {
        self.look_up_keys(&chain.keys, weights, hits);
        if self.hybrids > 0 {
            let weights = weights.by_set();
            for endpoint in self.slots.iter().flatten().filter(|endpoint| endpoint.is_hybrid()) {
                let id = EndpointId { slot: endpoint.slot, generation: endpoint.generation };
                let hit = hits.get(id);
                if hit.any > 0 {
                    let hit = self.narrow(endpoint, chain, &weights, hit, &hits.path);
                    hits.reach[0][usize::from(id.slot)] = hit.resident;
                    hits.narrowed.push((id, hit));
                }
            }
        }
    }

    /// The same as if every endpoint had one KV cache group.
    fn look_up_keys(&self, keys: &[BlockKey], weights: &TierWeights, hits: &mut Hits) {
        hits.reset();
        self.walk(keys, &mut hits.path);
        let Some(first) = hits.path.first() else { return };
        if hits.generations != self.generations {
            hits.generations.clone_from(&self.generations);
        }
        let slots = self.tree.sets.get(first.set).width() * 64;
        let planes = hits.path.iter().fold(0, |all, s| all | self.tree.sets.get(s.set).planes);
        hits.weight = weights.0[0];
        hits.in_tiers = planes & Plane::TIERS & !1 != 0;
        let [tiers, expected, history, any] = WAYS;
        self.measure(hits, slots, tiers, 0);
        // A way that adds nothing to another reaches as far.
        if planes & expected & !Plane::TIERS != 0 {
            self.measure(hits, slots, expected, 1);
        }
        if planes & history != 0 {
            self.measure(hits, slots, history, 2);
            self.measure(hits, slots, any, 3);
        }
        if hits.in_tiers {
            self.weigh(hits, &weights.by_set());
        }
    }

    /// The sets that hold the chain, as far as anybody does.
    fn walk(&self, keys: &[BlockKey], path: &mut Vec<Stretch>) {
        let tree = &self.tree;
        let mut done = 0;
        while let Some(&key) = keys.get(done) {
            let Some(place) = tree.start(key) else { return };
            let run = tree.runs.get(place.run);
            let mut at = u16::from(place.at);
            let end = at + tree.reach(place, &keys[done..]).max(1) as u16;
            let before = done;
            while at < end {
                let step = run.step(at);
                // A block that nobody holds ends the walk, unless it lies elsewhere by now.
                if step.set == EMPTY {
                    break;
                }
                let to = step.end.min(end);
                done += usize::from(to - at);
                at = to;
                match path.last_mut() {
                    Some(last) if last.set == step.set => last.end = done as u32,
                    _ => path.push(Stretch { end: done as u32, set: step.set }),
                }
            }
            if done == before {
                return;
            }
        }
    }

    /// How far each endpoint that holds the first block in one of these ways holds all.
    fn measure(&self, hits: &mut Hits, slots: usize, planes: u8, way: usize) {
        let Hits { reach: rows, path, .. } = hits;
        let Some((first, others)) = path.split_first() else { return };
        let set = |stretch: &Stretch| self.tree.sets.get(stretch.set);
        let rows = &mut rows[way];
        rows.resize(slots, 0);
        for (word, rows) in rows.chunks_exact_mut(64).enumerate() {
            let mut slots = set(first).union(planes, word);
            let mut reach = first.end;
            for stretch in others {
                if slots == 0 {
                    break;
                }
                let stay = slots & set(stretch).union(planes, word);
                write(rows, slots & !stay, reach);
                slots = stay;
                reach = stretch.end;
            }
            write(rows, slots, reach);
        }
    }

    /// In which tiers the hits are.
    fn weigh(&self, hits: &mut Hits, weights: &[f64; 16]) {
        let Hits { reach: rows, tiers, path, .. } = hits;
        let Some(first) = path.first() else { return };
        let [resident, expected, ..] = rows;
        tiers.clear();
        tiers.resize(resident.len(), Tiers::default());
        for slot in self.tree.sets.get(first.set).slots(u8::MAX) {
            let resident = resident[usize::from(slot)];
            let expected = expected.get(usize::from(slot)).copied().unwrap_or(resident);
            tiers[usize::from(slot)] = Tiers {
                by_tier: std::array::from_fn(|tier| {
                    let holds = |set: &Set| set.of(slot) & 1 << tier != 0;
                    let left = path.iter().find(|s| !holds(self.tree.sets.get(s.set)));
                    let end = left.map_or(path.last(), |left| {
                        path.iter().take_while(|s| s.end < left.end).last()
                    });
                    end.map_or(0, |end| end.end)
                }),
                resident_weighted: self.sum(path, slot, resident, weights),
                expected_weighted: self.sum(path, slot, expected, weights),
            };
        }
    }

    /// Weight of the first blocks on an endpoint; one that is not resident weighs 1.
    fn sum(&self, path: &[Stretch], slot: u16, blocks: u32, weights: &[f64; 16]) -> f64 {
        let (mut start, mut sum) = (0, 0.0);
        for stretch in path.iter().take_while(|_| blocks > 0) {
            let weight = match self.tree.sets.get(stretch.set).of(slot) & Plane::TIERS {
                0 => 1.0,
                tiers => weights[usize::from(tiers)],
            };
            sum += weight * f64::from(stretch.end.min(blocks).saturating_sub(start));
            start = stretch.end;
        }
        sum
    }

    /// Shortens a hit to where an engine with several groups can go on.
    fn narrow(
        &self,
        endpoint: &Endpoint,
        chain: &Chain,
        weights: &[f64; 16],
        mut hit: Hit,
        path: &[Stretch],
    ) -> Hit {
        let Some(before_last) = chain.tokens.checked_sub(1) else { return hit };
        let reusable = before_last / chain.spec.block_size.max(1);
        let slot = endpoint.slot;

        let resident = &chain.keys[..hit.resident.min(reusable) as usize];
        hit.resident = endpoint.boundary(resident, |_| false) as u32;
        hit.resident_weighted = self.sum(path, slot, hit.resident, weights);
        hit.by_tier.iter_mut().for_each(|count| *count = (*count).min(hit.resident));

        // A request on its way will leave the other groups' blocks as well.
        let expected = &chain.keys[..hit.expected.min(reusable) as usize];
        let speculated = |at: usize| {
            let stretch = path.iter().find(|stretch| at < stretch.end as usize);
            let planes = stretch.map_or(0, |s| self.tree.sets.get(s.set).of(slot));
            planes & 1 << Plane::SPECULATIVE != 0
        };
        hit.expected = endpoint.boundary(expected, speculated) as u32;
        hit.expected_weighted = self.sum(path, slot, hit.expected, weights);
        hit
    }

    /// Tells of each block of a chain who holds it, as far as anybody does.
    pub(super) fn find(&self, keys: &[BlockKey], each: &mut dyn FnMut(BlockKey, &Set)) {
        let mut path = Vec::new();
        self.walk(keys, &mut path);
        let mut start = 0;
        for stretch in path {
            let set = self.tree.sets.get(stretch.set);
            keys[start..stretch.end as usize].iter().for_each(|key| each(*key, set));
            start = stretch.end as usize;
        }
    }
}

/// The chain reaches so far on these of 64 endpoints.
fn write(rows: &mut [u32], mut slots: u64, reach: u32) {
    if slots == u64::MAX {
        rows.fill(reach);
        return;
    }
    while slots != 0 {
        if let Some(row) = rows.get_mut(slots.trailing_zeros() as usize) {
            *row = reach;
        }
        slots &= slots - 1;
    }
}
