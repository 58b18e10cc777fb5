//! Which distinct blocks do the requests in flight on one endpoint need?
//!
//! A block's key stands for everything before it, so the prompts form a tree. It is kept as runs:
//! stretches of blocks that the same requests need. A prompt costs one look for each run that it
//! passes, not one for each block, and only what nobody needed before is stored.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::blocks::BlockKey;

/// Stands for no run.
const NONE: u32 = u32::MAX;
/// Lists of keys whose memory is kept for others.
const SPARE_MAX: usize = 64;
/// Longer ones are given back.
const SPARE_KEYS_MAX: usize = 8192;

/// Memory of runs that are gone.
#[derive(Debug, Default)]
pub(super) struct Spare(Vec<Vec<u64>>);

impl Spare {
    fn take(&mut self) -> Vec<u64> {
        self.0.pop().unwrap_or_default()
    }

    fn put(&mut self, mut keys: Vec<u64>) {
        if self.0.len() < SPARE_MAX && keys.capacity() <= SPARE_KEYS_MAX {
            keys.clear();
            self.0.push(keys);
        }
    }
}

#[derive(Debug)]
struct Run {
    /// Never empty while anybody needs it.
    keys: Vec<u64>,
    /// Requests that need all of it.
    users: u32,
    /// The run before it.
    parent: u32,
}

/// The end of one request's blocks: the run whose last block is its last.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Leaf(u32);

/// The blocks of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// By their first key.
    heads: FxHashMap<u64, u32>,
    runs: Vec<Run>,
    free: Vec<u32>,
    /// Of a snapshot: nobody gives them back, and their order is not known.
    loose: FxHashSet<u64>,
}

impl Runs {
    /// Blocks of which only the keys are known.
    pub fn of_loose(keys: impl Iterator<Item = u64>) -> Runs {
        Runs { loose: keys.collect(), ..Runs::default() }
    }

    /// Whether nobody needs anything.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.loose.is_empty()
    }

    /// How many of a chain's first blocks are needed already.
    pub fn shared(&self, chain: &[BlockKey]) -> usize {
        let mut at = 0;
        while let Some(run) = self.starting_with(chain.get(at)) {
            let keys = &self.runs[run as usize].keys;
            let held = common(keys, &chain[at..]);
            at += held;
            if held < keys.len() {
                break;
            }
        }
        if self.loose.is_empty() {
            return at;
        }
        at.max(chain.partition_point(|key| self.loose.contains(&key.0)))
    }

    fn starting_with(&self, key: Option<&BlockKey>) -> Option<u32> {
        self.heads.get(&key?.0).copied()
    }

    /// One more request needs a chain. Also answers how many of its blocks nobody needed before.
    pub fn add(&mut self, chain: &[BlockKey], spare: &mut Spare) -> (Leaf, usize) {
        let (mut at, mut leaf) = (0, NONE);
        while let Some(found) = self.starting_with(chain.get(at)) {
            let keys = &self.runs[found as usize].keys;
            let held = common(keys, &chain[at..]);
            leaf = if held < keys.len() { self.split(found, held, spare) } else { found };
            self.runs[leaf as usize].users += 1;
            at += held;
        }
        let rest = &chain[at..];
        let Some(first) = rest.first() else { return (Leaf(leaf), 0) };
        let mut keys = spare.take();
        keys.extend(rest.iter().map(|key| key.0));
        let new = self.unknown(&keys);
        let run = self.put(Run { keys, users: 1, parent: leaf });
        self.heads.insert(first.0, run);
        (Leaf(run), new)
    }

    /// Divides a run in two. The second part keeps the number, because it ends where requests end;
    /// the answer is the number of the first part.
    fn split(&mut self, run: u32, at: usize, spare: &mut Spare) -> u32 {
        let mut first = spare.take();
        let Run { keys, users, parent } = &mut self.runs[run as usize];
        first.extend(keys.drain(..at));
        let (head, next) = (first[0], keys[0]);
        let upper = Run { keys: first, users: *users, parent: *parent };
        let upper = self.put(upper);
        self.runs[run as usize].parent = upper;
        self.heads.insert(head, upper);
        self.heads.insert(next, run);
        upper
    }

    fn put(&mut self, run: Run) -> u32 {
        match self.free.pop() {
            Some(at) => {
                self.runs[at as usize] = run;
                at
            }
            None => {
                self.runs.push(run);
                self.runs.len() as u32 - 1
            }
        }
    }

    /// A request needs its blocks no more. Answers how many nobody needs now.
    pub fn remove(&mut self, leaf: Leaf, spare: &mut Spare) -> usize {
        let (mut at, mut gone) = (leaf.0, 0);
        while let Some(run) = self.runs.get_mut(at as usize) {
            run.users -= 1;
            let parent = run.parent;
            if run.users == 0 {
                let keys = std::mem::take(&mut run.keys);
                gone += self.unknown(&keys);
                self.heads.remove(&keys[0]);
                self.free.push(at);
                spare.put(keys);
            }
            at = parent;
        }
        gone
    }

    /// How many of these keys no snapshot told of.
    fn unknown(&self, keys: &[u64]) -> usize {
        match self.loose.is_empty() {
            true => keys.len(),
            false => keys.iter().filter(|key| !self.loose.contains(key)).count(),
        }
    }

    /// The blocks of one request.
    pub fn chain(&self, leaf: &Leaf) -> Vec<BlockKey> {
        let (mut at, mut keys) = (leaf.0, Vec::new());
        while let Some(run) = self.runs.get(at as usize) {
            keys.extend(run.keys.iter().rev().map(|key| BlockKey(*key)));
            at = run.parent;
        }
        keys.reverse();
        keys
    }

    /// All blocks, in no order that means anything; some more than once.
    #[expect(clippy::disallowed_methods, reason = "the caller sorts them")]
    pub fn keys(&self) -> impl Iterator<Item = BlockKey> + '_ {
        let runs = self.runs.iter().flat_map(|run| &run.keys);
        runs.chain(self.loose.iter()).map(|key| BlockKey(*key))
    }
}

/// How many keys are the same from the beginning. Where two are, all before them are.
fn common(keys: &[u64], chain: &[BlockKey]) -> usize {
    let (mut same, mut end) = (0, keys.len().min(chain.len()));
    if end > 0 && keys[end - 1] == chain[end - 1].0 {
        return end;
    }
    while same < end {
        let middle = same + (end - same) / 2;
        if keys[middle] == chain[middle].0 {
            same = middle + 1;
        } else {
            end = middle;
        }
    }
    same
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    /// A prompt whose keys say everything before them.
    fn chain(tokens: &[usize]) -> Vec<BlockKey> {
        let keys = tokens.iter().scan(1u64, |key, token| {
            *key = key.wrapping_mul(31).wrapping_add(*token as u64);
            Some(BlockKey(*key))
        });
        keys.collect()
    }

    #[test]
    fn sums_and_shares_are_those_of_a_brute_count() {
        for seed in 0..100 {
            let mut rng = Rng::seeded(seed);
            let loose = chain(&vec![0; rng.below(3)]);
            let mut runs = Runs::of_loose(loose.iter().map(|key| key.0));
            let (mut spare, mut held, mut sum) = (Spare::default(), Vec::new(), loose.len());
            for _ in 0..200 {
                let tokens: Vec<usize> = (0..rng.below(9)).map(|_| rng.below(2)).collect();
                let prompt = chain(&tokens);
                if rng.below(2) == 0 || held.is_empty() {
                    let (leaf, new) = runs.add(&prompt, &mut spare);
                    sum += new;
                    held.push((leaf, prompt.clone()));
                } else {
                    let (leaf, chain) = held.swap_remove(rng.below(held.len()));
                    assert_eq!(runs.chain(&leaf), chain, "seed {seed}");
                    sum -= runs.remove(leaf, &mut spare);
                }
                let mut all: Vec<BlockKey> = held.iter().flat_map(|(_, c)| c.clone()).collect();
                all.extend(&loose);
                all.sort_unstable();
                all.dedup();
                let mut found: Vec<BlockKey> = runs.keys().collect();
                found.sort_unstable();
                found.dedup();
                assert_eq!((&found, sum), (&all, all.len()), "seed {seed}");
                let shared = prompt.iter().take_while(|key| all.contains(key)).count();
                assert_eq!(runs.shared(&prompt), shared, "seed {seed}");
            }
            held.into_iter().for_each(|(leaf, _)| sum -= runs.remove(leaf, &mut spare));
            assert_eq!((sum, runs.heads.len()), (loose.len(), 0), "seed {seed}");
            assert_eq!(runs.free.len(), runs.runs.len(), "seed {seed}");
        }
    }
}
