//! The KV blocks of one engine: who holds which, which are cached under what name, and which one
//! is evicted next.
//!
//! Follows vLLM 0.32's block pool. Free blocks form a queue; allocation takes from its head and
//! thereby evicts what the block held. A freed block without a name goes to the head, a named one
//! to the tail, so cached content lives as long as possible. The same name may sit in several
//! blocks at once; lookups return the one that was named first.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;

use kvroute_core::event::EngineHash;
use rustc_hash::FxHashMap;

/// Index of a block.
pub(super) type BlockId = u32;

const NONE: BlockId = BlockId::MAX;

#[derive(Clone, Debug)]
struct Block {
    users: u32,
    name: Option<EngineHash>,
    previous: BlockId,
    next: BlockId,
}

/// The blocks of one engine.
#[derive(Clone, Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    head: BlockId,
    tail: BlockId,
    free: u32,
    named: FxHashMap<u64, Copies>,
}

/// The blocks of one name, in the order in which they got it. One is the rule.
#[derive(Clone, Debug)]
enum Copies {
    One(BlockId),
    More(Vec<BlockId>),
}

impl Copies {
    fn first(&self) -> Option<BlockId> {
        match self {
            Copies::One(id) => Some(*id),
            Copies::More(ids) => ids.first().copied(),
        }
    }
}

impl BlockPool {
    /// A pool of `count` free blocks.
    pub(super) fn new(count: u32) -> BlockPool {
        let mut pool = BlockPool {
            blocks: vec![
                Block { users: 0, name: None, previous: NONE, next: NONE };
                count as usize
            ],
            head: NONE,
            tail: NONE,
            free: 0,
            named: FxHashMap::default(),
        };
        (0..count).for_each(|id| pool.push_back(id));
        pool
    }

    /// Blocks that nobody uses.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    /// Blocks that somebody uses.
    pub(super) fn used(&self) -> u32 {
        self.blocks.len() as u32 - self.free
    }

    /// The block named `name` that got that name first.
    pub(super) fn find(&self, name: EngineHash) -> Option<BlockId> {
        self.named.get(&name.0).and_then(Copies::first)
    }

    /// Whether nobody uses `id`.
    pub(super) fn is_free(&self, id: BlockId) -> bool {
        self.blocks[id as usize].users == 0
    }

    /// One more user of `id`.
    pub(super) fn touch(&mut self, id: BlockId) {
        if self.is_free(id) {
            self.unlink(id);
        }
        self.blocks[id as usize].users += 1;
    }

    /// The block whose turn it is, now used once, and the name it loses. `None` when all are used.
    pub(super) fn take(&mut self) -> Option<(BlockId, Option<EngineHash>)> {
        let id = (self.head != NONE).then_some(self.head)?;
        self.unlink(id);
        self.blocks[id as usize].users = 1;
        let evicted = self.blocks[id as usize].name.take();
        if let Some(name) = evicted {
            self.forget(name, id);
        }
        Some((id, evicted))
    }

    /// Names a used block.
    pub(super) fn name(&mut self, id: BlockId, name: EngineHash) {
        self.blocks[id as usize].name = Some(name);
        match self.named.entry(name.0) {
            Entry::Vacant(place) => {
                place.insert(Copies::One(id));
            }
            Entry::Occupied(mut place) => match place.get_mut() {
                Copies::One(first) => {
                    let ids = vec![*first, id];
                    place.insert(Copies::More(ids));
                }
                Copies::More(ids) => ids.push(id),
            },
        }
    }

    /// One user fewer of each block, in eviction order.
    pub(super) fn release(&mut self, ids: impl Iterator<Item = BlockId>) {
        let mut nameless = Vec::new();
        for id in ids {
            let block = &mut self.blocks[id as usize];
            block.users -= 1;
            match (block.users, block.name) {
                (0, None) => nameless.push(id),
                (0, Some(_)) => self.push_back(id),
                _ => {}
            }
        }
        nameless.into_iter().rev().for_each(|id| self.push_front(id));
    }

    /// Forgets all names. Refused while a block is used.
    pub(super) fn reset(&mut self) -> bool {
        if self.used() > 0 {
            return false;
        }
        self.named.clear();
        self.blocks.iter_mut().for_each(|block| block.name = None);
        true
    }

    /// Names, and how many blocks have each.
    pub(super) fn names(&self) -> BTreeMap<EngineHash, u32> {
        let mut names = BTreeMap::new();
        for name in self.blocks.iter().filter_map(|block| block.name) {
            *names.entry(name).or_insert(0) += 1;
        }
        names
    }

    /// How many blocks have a name.
    #[cfg(test)]
    pub(super) fn named_count(&self) -> usize {
        self.blocks.iter().filter(|block| block.name.is_some()).count()
    }

    fn forget(&mut self, name: EngineHash, id: BlockId) {
        let Entry::Occupied(mut place) = self.named.entry(name.0) else { return };
        match place.get_mut() {
            Copies::More(ids) if ids.len() > 1 => ids.retain(|&copy| copy != id),
            _ => {
                place.remove();
            }
        }
    }

    fn push_back(&mut self, id: BlockId) {
        let tail = self.tail;
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (tail, NONE);
        match tail {
            NONE => self.head = id,
            _ => self.blocks[tail as usize].next = id,
        }
        self.tail = id;
        self.free += 1;
    }

    fn push_front(&mut self, id: BlockId) {
        let head = self.head;
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (NONE, head);
        match head {
            NONE => self.tail = id,
            _ => self.blocks[head as usize].previous = id,
        }
        self.head = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { previous, next, .. } = self.blocks[id as usize];
        match previous {
            NONE => self.head = next,
            _ => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.tail = previous,
            _ => self.blocks[next as usize].previous = previous,
        }
        self.free -= 1;
    }
}
