//! How much KV cache, and how much work, do the requests in flight need on each endpoint?
//!
//! A scrape shows what is in use, late; this shows what has been promised, at once: the distinct
//! blocks of the prompts in flight (requests that share a prefix share its blocks) and room for
//! the output that is expected. More than the endpoint has means that it will preempt somebody.

mod runs;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::blocks::{BlockKey, Chain};
use crate::fleet::EndpointId;
use runs::{Leaf, Runs, Spare};

/// What one request has committed. Ends once, by [`Committed::release`].
#[derive(Debug, PartialEq, Eq)]
pub struct Commitment {
    endpoint: EndpointId,
    /// One for each of its chains.
    leaves: SmallVec<[Leaf; 1]>,
    /// Blocks of all of them.
    blocks: usize,
    block_size: u32,
    /// Tokens that are nobody else's: tails, output, and prompts whose blocks are not counted.
    own_tokens: u64,
    work: Work,
}

/// What one request has an endpoint compute, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Prompt tokens that are not cached: until the first token.
    pub prefill: u64,
    /// Context of its decoding steps, on average: until the end.
    pub context: u64,
}

/// What the requests in flight need of one endpoint, in a form that can be kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommittedState {
    /// Tokens of KV cache.
    pub tokens: u64,
    /// See [`Work::prefill`].
    pub prefill: u64,
    /// See [`Work::context`].
    pub context: u64,
    /// The distinct blocks among them.
    #[serde(with = "crate::journal::packed")]
    pub keys: Vec<BlockKey>,
}

/// More tokens than any fleet can hold; what a file tells beyond it is wrong.
const TOKENS_MAX: u64 = 1 << 50;

/// All commitments, by endpoint.
#[derive(Debug)]
pub struct Committed {
    slots: Vec<Slot>,
    /// Blocks of all commitments, and the most there may be.
    keys: usize,
    keys_max: usize,
    spare: Spare,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    runs: Runs,
    tokens: u64,
    work: Work,
}

impl Committed {
    /// Nothing yet. Of more than `keys_max` blocks in flight the rest counts as shared by nobody.
    pub fn new(keys_max: usize) -> Committed {
        Committed { slots: Vec::new(), keys: 0, keys_max, spare: Spare::default() }
    }

    /// Tokens that the requests in flight need there.
    pub fn tokens(&self, id: EndpointId) -> u64 {
        self.slot(id).map_or(0, |slot| slot.tokens)
    }

    /// What the requests in flight still have it compute.
    pub fn work(&self, id: EndpointId) -> Work {
        self.slot(id).map_or(Work::default(), |slot| slot.work)
    }

    /// Tokens of a chain's blocks that no request in flight there needs already.
    pub fn added_tokens(&self, id: EndpointId, chain: &Chain) -> u64 {
        let shared = self.slot(id).map_or(0, |slot| slot.runs.shared(&chain.keys));
        (chain.keys.len() - shared) as u64 * u64::from(chain.spec.block_size)
    }

    /// Commits the blocks of some chains of one block size, and `own_tokens` more.
    pub fn commit<'a>(
        &mut self,
        endpoint: EndpointId,
        chains: impl Iterator<Item = &'a Chain> + Clone,
        own_tokens: u64,
        work: Work,
    ) -> Commitment {
        let block_size = chains.clone().next().map_or(0, |chain| chain.spec.block_size);
        let leaves = SmallVec::new();
        let mut commitment =
            Commitment { endpoint, leaves, blocks: 0, block_size, own_tokens, work };
        let count: usize = chains.clone().map(|chain| chain.keys.len()).sum();
        if self.keys + count <= self.keys_max {
            self.add(&mut commitment, chains.map(|chain| &chain.keys[..]));
        } else {
            commitment.own_tokens += count as u64 * u64::from(block_size);
            self.add(&mut commitment, std::iter::empty());
        }
        commitment
    }

    /// Gives back what a request has committed.
    pub fn release(&mut self, commitment: Commitment) {
        let Commitment { endpoint, leaves, blocks, block_size, own_tokens, work } = commitment;
        self.keys -= blocks;
        let slot = self.slots.get_mut(usize::from(endpoint.slot));
        let Some(slot) = slot.filter(|slot| slot.generation == endpoint.generation) else { return };
        let gone = leaves.into_iter().map(|leaf| slot.runs.remove(leaf, &mut self.spare));
        slot.tokens -= gone.sum::<usize>() as u64 * u64::from(block_size);
        slot.tokens -= own_tokens;
        slot.work.prefill -= work.prefill;
        slot.work.context -= work.context;
    }

    /// The prompt is computed.
    pub fn prefilled(&mut self, commitment: &mut Commitment) {
        let tokens = std::mem::take(&mut commitment.work.prefill);
        if let Some(slot) = self.slot_mut(commitment.endpoint) {
            slot.work.prefill -= tokens;
        }
    }

    /// The request goes to another endpoint, which has so many prompt tokens to compute. Blocks
    /// that the first one took along when it left the fleet count as nobody else's.
    pub fn redirect(&mut self, commitment: &mut Commitment, to: EndpointId, prefill: u64) {
        let chains: Vec<Vec<BlockKey>> = match self.slot(commitment.endpoint) {
            Some(slot) => commitment.leaves.iter().map(|leaf| slot.runs.chain(leaf)).collect(),
            None => Vec::new(),
        };
        let found: usize = chains.iter().map(Vec::len).sum();
        let lost = (commitment.blocks - found) as u64 * u64::from(commitment.block_size);
        let mut moved = Commitment {
            endpoint: to,
            leaves: SmallVec::new(),
            blocks: 0,
            own_tokens: commitment.own_tokens + lost,
            work: Work { prefill, ..commitment.work },
            ..*commitment
        };
        self.add(&mut moved, chains.iter().map(Vec::as_slice));
        self.release(std::mem::replace(commitment, moved));
    }

    /// What requests in flight need of an endpoint; of these chains only, where some are given.
    pub fn state(&self, id: EndpointId, only: Option<&[&[BlockKey]]>) -> CommittedState {
        let Some(slot) = self.slot(id) else { return CommittedState::default() };
        let mut keys: Vec<BlockKey> = match only {
            None => slot.runs.keys().collect(),
            Some(chains) => {
                let shared = chains.iter().flat_map(|chain| &chain[..slot.runs.shared(chain)]);
                shared.copied().collect()
            }
        };
        keys.sort_unstable();
        keys.dedup();
        let Slot { tokens, work, .. } = *slot;
        CommittedState { tokens, prefill: work.prefill, context: work.context, keys }
    }

    /// Takes up again what [`Committed::state`] told. Nobody can release it.
    pub fn restore(&mut self, id: EndpointId, state: &CommittedState) {
        let at = usize::from(id.slot);
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, Slot::default);
        }
        self.keys += state.keys.len();
        self.slots[at] = Slot {
            generation: id.generation,
            runs: Runs::of_loose(state.keys.iter().map(|key| key.0)),
            tokens: state.tokens.min(TOKENS_MAX),
            work: Work {
                prefill: state.prefill.min(TOKENS_MAX),
                context: state.context.min(TOKENS_MAX),
            },
        };
    }

    /// The endpoint has left: its sums go, commitments there end without effect.
    pub fn forget(&mut self, id: EndpointId) {
        if let Some(slot) = self.slot_mut(id) {
            *slot = Slot { generation: id.generation.wrapping_add(1), ..Slot::default() };
        }
    }

    fn add<'a>(
        &mut self,
        commitment: &mut Commitment,
        chains: impl Iterator<Item = &'a [BlockKey]>,
    ) {
        let id = commitment.endpoint;
        let at = usize::from(id.slot);
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, Slot::default);
        }
        let slot = &mut self.slots[at];
        if slot.generation != id.generation {
            *slot = Slot { generation: id.generation, ..Slot::default() };
        }
        for chain in chains {
            let (leaf, new) = slot.runs.add(chain, &mut self.spare);
            commitment.leaves.push(leaf);
            commitment.blocks += chain.len();
            slot.tokens += new as u64 * u64::from(commitment.block_size);
        }
        self.keys += commitment.blocks;
        slot.tokens += commitment.own_tokens;
        slot.work.prefill += commitment.work.prefill;
        slot.work.context += commitment.work.context;
    }

    fn slot(&self, id: EndpointId) -> Option<&Slot> {
        self.slots.get(usize::from(id.slot)).filter(|slot| slot.generation == id.generation)
    }

    fn slot_mut(&mut self, id: EndpointId) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(id.slot)).filter(|slot| slot.generation == id.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;
    use crate::blocks::{ChainSpec, PromptExtras, Root, chain};

    const WORK: Work = Work { prefill: 3, context: 5 };

    fn id(slot: u16) -> EndpointId {
        EndpointId { slot, generation: 0 }
    }

    fn prompt(tokens: &[u32]) -> Chain {
        chain(ChainSpec::exact(4), Root::Base, tokens, &PromptExtras::default())
    }

    #[test]
    fn a_shared_prefix_is_committed_once() {
        let mut committed = Committed::new(100);
        let a = prompt(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let b = prompt(&[1, 2, 3, 4, 9, 9, 9, 9]);
        let mut first =
            committed.commit(id(0), std::iter::once(&a), 10, Work { prefill: 8, context: 13 });
        assert_eq!(committed.tokens(id(0)), 18);
        assert_eq!(committed.added_tokens(id(0), &b), 4);
        assert_eq!(committed.added_tokens(id(1), &b), 8);
        let mut second = committed.commit(id(0), std::iter::once(&b), 0, Work::default());
        assert_eq!(committed.tokens(id(0)), 22);
        committed.redirect(&mut second, id(1), 6);
        assert_eq!((committed.tokens(id(0)), committed.tokens(id(1))), (18, 8));
        assert_eq!((committed.work(id(0)).prefill, committed.work(id(1)).prefill), (8, 6));
        committed.prefilled(&mut first);
        committed.prefilled(&mut first);
        assert_eq!(committed.work(id(0)), Work { prefill: 0, context: 13 });
        committed.release(first);
        assert_eq!(committed.work(id(0)), Work::default());
        committed.forget(id(1));
        committed.release(second);
        assert_eq!((committed.tokens(id(0)), committed.tokens(id(1)), committed.keys), (0, 0, 0));
    }

    #[test]
    fn beyond_the_limit_blocks_count_as_nobodys() {
        let mut committed = Committed::new(3);
        let a = prompt(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let held: Vec<Commitment> =
            (0..3).map(|_| committed.commit(id(0), std::iter::once(&a), 1, WORK)).collect();
        assert_eq!(committed.tokens(id(0)), 8 + 1 + 2 * (8 + 1));
        held.into_iter().for_each(|commitment| committed.release(commitment));
        assert_eq!((committed.tokens(id(0)), committed.keys), (0, 0));
    }

    #[test]
    fn sums_are_those_of_a_brute_count() {
        for seed in 0..30 {
            let mut rng = Rng::seeded(seed);
            let mut committed = Committed::new(usize::MAX);
            let mut held: Vec<(Commitment, Chain)> = Vec::new();
            for _ in 0..200 {
                if rng.below(2) == 0 || held.is_empty() {
                    let tokens: Vec<u32> =
                        (0..4 * rng.below(6)).map(|at| (at / 8 * rng.below(2)) as u32).collect();
                    let chain = prompt(&tokens);
                    let to = id(rng.below(2) as u16);
                    held.push((committed.commit(to, std::iter::once(&chain), 0, WORK), chain));
                } else {
                    let (commitment, _) = held.swap_remove(rng.below(held.len()));
                    committed.release(commitment);
                }
                for slot in 0..2 {
                    let here = held.iter().filter(|(c, _)| c.endpoint == id(slot));
                    let mut keys: Vec<BlockKey> = here.flat_map(|(_, c)| c.keys.clone()).collect();
                    keys.sort_unstable();
                    keys.dedup();
                    assert_eq!(committed.tokens(id(slot)), 4 * keys.len() as u64, "seed {seed}");
                }
            }
        }
    }

    /// Sums never go below zero, and end at zero, whatever leaves, comes back, moves and is full.
    #[test]
    fn any_sequence_of_calls_gives_everything_back() {
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let mut committed = Committed::new(rng.below(60));
            let mut ids = [id(0), id(1), id(2)];
            let mut held: Vec<Commitment> = Vec::new();
            for _ in 0..300 {
                let to = ids[rng.below(3)];
                match rng.below(6) {
                    0 | 1 => {
                        let group = rng.below(2) as u32;
                        let tokens: Vec<u32> =
                            (0..4 * rng.below(8) as u32).map(|_| group).collect();
                        let chain = chain(
                            ChainSpec::exact(1 << rng.below(3)),
                            Root::Base,
                            &tokens,
                            &PromptExtras::default(),
                        );
                        let own_tokens = rng.below(9) as u64;
                        held.push(committed.commit(to, std::iter::once(&chain), own_tokens, WORK));
                    }
                    2 => {
                        let at = to.slot as usize;
                        committed.forget(to);
                        ids[at].generation += 1;
                        assert_eq!(committed.tokens(ids[at]), 0);
                    }
                    _ if held.is_empty() => {}
                    3 => {
                        let at = rng.below(held.len());
                        committed.redirect(&mut held[at], to, 7);
                    }
                    4 => {
                        let at = rng.below(held.len());
                        committed.prefilled(&mut held[at]);
                    }
                    _ => {
                        let at = rng.below(held.len());
                        committed.release(held.swap_remove(at));
                    }
                }
            }
            held.into_iter().for_each(|commitment| committed.release(commitment));
            for id in ids {
                let left = (committed.tokens(id), committed.work(id), committed.keys);
                assert_eq!(left, (0, Work::default(), 0), "seed {seed}");
            }
            assert!(committed.slots.iter().all(|slot| slot.runs.is_empty()), "seed {seed}");
        }
    }
}
