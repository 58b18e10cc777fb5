//! Which beginning of this text has been tokenized before, and what are its block keys?
//!
//! A tree of spans of text. Each span ends where the tokenizer cuts the text ([`crate::model`] says
//! where), and holds its ids and, for the chains that were asked for, the
//! keys of the blocks that it completes. A prompt is found by walking down and comparing text, so
//! what it shares with any earlier prompt is neither tokenized nor hashed again, and no hash
//! collision can give wrong ids.
//!
//! **Why a stored end is an end in every text**: where a text is cut depends on what stands before
//! the cut and on a few bytes behind it, [`Cut::guard`]. A span is stored with these bytes and
//! matches only with them.
//!
//! The keys of a chain follow from its block size and the seed of its first block, which holds
//! adapter and salt; so these two name a chain here. Bounded by bytes: the spans that were used
//! longest ago go first. A span is used with all before it, so none goes before what stands on it.

use kvroute_core::blocks::{self, BlockKey};

use crate::model::CacheStats;

/// Shortest span, in bytes. What is shorter is tokenized again, which costs about a microsecond.
pub(crate) const SPAN_BYTES_MIN: usize = 64;
/// A span that costs more than this part of the cache is not kept.
const SPAN_PART_MAX: usize = 64;
/// Chains whose keys a span holds. Adapters, salts and block sizes beyond push out the oldest.
const CHAINS_PER_SPAN_MAX: usize = 4;
/// Spans that were driven out and whose memory is kept for the next ones.
const FREE_SPANS_MAX: usize = 16;
/// What a span costs besides text, ids and keys: itself, its place among others, the allocator.
const SPAN_BYTES: usize = size_of::<Span>() + 64;
/// The roots are the first spans: without and with the ids that stand before a prompt.
const LAST_ROOT: u32 = 1;
/// How often a search among the spans of a place goes on with a shorter text.
const CHILD_STEPS_MAX: usize = 4;
/// No span.
const NONE: u32 = u32::MAX;

/// A chain of keys: its block size and what its first block is hashed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Tokens per block; 0 is a chain without keys.
    pub(crate) block_size: u32,
    /// See [`blocks::start`].
    pub(crate) start: BlockKey,
}

impl Link {
    /// Appends the keys of the full blocks of `ids`, which follow on `keys`.
    pub(crate) fn extend(self, ids: &[u32], keys: &mut Vec<BlockKey>) {
        blocks::extend(self.parent(keys), self.block_size, ids, &[], keys);
    }

    /// What the block after `keys` is hashed with.
    pub(crate) fn parent(self, keys: &[BlockKey]) -> BlockKey {
        keys.last().copied().unwrap_or(self.start)
    }

    /// How many of the blocks are full after so many tokens.
    pub(crate) fn full(self, tokens: usize) -> usize {
        tokens.checked_div(self.block_size as usize).unwrap_or(0)
    }

    /// How many of so many tokens are in a block that is not full.
    pub(crate) fn unfilled(self, tokens: usize) -> usize {
        tokens.checked_rem(self.block_size as usize).unwrap_or(0)
    }
}

/// A prompt on its way to ids and keys; its memory is used again.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Ids, from the one at `first` on.
    pub(crate) ids: Vec<u32>,
    /// How many ids come before `ids`.
    pub(crate) first: usize,
    /// Bytes of the text that `ids` or what comes before them stand for.
    pub(crate) bytes: usize,
    /// How many of `ids` come from the tree.
    pub(crate) seen_ids: usize,
    /// Where the text behind that was cut.
    pub(crate) cuts: Vec<Cut>,
    /// Pieces that had to be tokenized.
    pub(crate) pieces: u64,
    /// The spans of the beginning.
    path: Vec<u32>,
    /// Of the last of them, so that nobody hangs anything on its successor.
    generation: u32,
}

/// The end of a span.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// Byte in the text.
    pub(crate) at: usize,
    /// How many bytes behind it are a reason to cut here.
    pub(crate) guard: usize,
    /// How many ids there are up to it in [`Work::ids`].
    pub(crate) ids: usize,
}

impl Work {
    /// Ids, those before `ids` included.
    pub(crate) fn tokens(&self) -> usize {
        self.first + self.ids.len()
    }

    /// Ready for the next prompt.
    pub(crate) fn clear(&mut self) {
        self.ids.clear();
        self.cuts.clear();
        self.path.clear();
        (self.first, self.bytes, self.seen_ids, self.pieces) = (0, 0, 0, 0);
    }
}

/// Texts too short for the tree, ends of prompts above all, and their ids. Each has one place,
/// which the next one takes that has the same.
#[derive(Debug)]
pub(crate) struct Shorts {
    places: Vec<(Vec<u8>, Vec<u32>)>,
}

impl Shorts {
    /// Ids of so many texts are kept at most, of less than [`SPAN_BYTES_MIN`] bytes each.
    const PLACES: usize = 256;

    pub(crate) fn new() -> Shorts {
        Shorts { places: vec![Default::default(); Shorts::PLACES] }
    }

    /// FNV-1a.
    fn place(text: &[u8]) -> usize {
        let hash = text.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        (hash ^ (hash >> 32)) as usize % Shorts::PLACES
    }

    /// Appends the ids of a text that is known.
    pub(crate) fn find(&self, text: &[u8], ids: &mut Vec<u32>) -> bool {
        let (known, known_ids) = &self.places[Shorts::place(text)];
        let is_known = !text.is_empty() && known == text;
        if is_known {
            ids.extend_from_slice(known_ids);
        }
        is_known
    }

    pub(crate) fn keep(&mut self, text: &[u8], ids: &[u32]) {
        let (known, known_ids) = &mut self.places[Shorts::place(text)];
        known.clear();
        known.extend_from_slice(text);
        known_ids.clear();
        known_ids.extend_from_slice(ids);
    }
}

/// A span that is to be kept.
struct New<'a> {
    /// With the guard.
    text: &'a [u8],
    guard: usize,
    ids: &'a [u32],
    is_last: bool,
    links: &'a [Link],
    /// Of the whole text.
    keys: &'a [Vec<BlockKey>],
}

/// The tree.
#[derive(Debug)]
pub(crate) struct Prefixes {
    spans: Vec<Span>,
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    stats: CacheStats,
    /// Ids of which keys are made.
    gathered: Vec<u32>,
}

#[derive(Debug)]
struct Span {
    generation: u32,
    parent: u32,
    newer: u32,
    older: u32,
    /// The text ends here.
    is_last: bool,
    charged: usize,
    /// Ids before this span.
    tokens_before: usize,
    /// With the guard.
    text: Vec<u8>,
    guard: usize,
    ids: Vec<u32>,
    chains: Vec<(Link, Vec<BlockKey>)>,
    /// Spans that follow, by text; apart from them those with which a text ends.
    children: Vec<u32>,
    last_children: Vec<u32>,
}

impl Span {
    fn new() -> Span {
        Span {
            generation: 0,
            parent: NONE,
            newer: NONE,
            older: NONE,
            is_last: false,
            charged: 0,
            tokens_before: 0,
            text: Vec::new(),
            guard: 0,
            ids: Vec::new(),
            chains: Vec::new(),
            children: Vec::new(),
            last_children: Vec::new(),
        }
    }

    fn tokens(&self) -> usize {
        self.tokens_before + self.ids.len()
    }

    fn cost(&self) -> usize {
        let keys = self.chains.iter().map(|(_, keys)| keys.capacity() * size_of::<BlockKey>());
        let ids = self.ids.capacity() * size_of::<u32>();
        SPAN_BYTES + self.text.capacity() + ids + keys.sum::<usize>()
    }
}

impl Prefixes {
    /// An empty tree. `before`: the ids that the model puts before a prompt, where it is asked to.
    pub(crate) fn new(bytes_max: usize, before: &[u32]) -> Prefixes {
        let with_before = Span { ids: before.to_vec(), ..Span::new() };
        Prefixes {
            spans: vec![Span::new(), with_before],
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            stats: CacheStats { bytes_max, ..CacheStats::default() },
            gathered: Vec::new(),
        }
    }

    pub(crate) fn stats(&self) -> CacheStats {
        self.stats
    }

    /// Finds the longest known beginning of `text`: appends its keys for each chain, and so many
    /// of its last ids to `work` as unfilled blocks need, or all.
    pub(crate) fn find(
        &mut self,
        text: &[u8],
        is_after_special: bool,
        (links, keys): (&[Link], &mut [Vec<BlockKey>]),
        all_ids: bool,
        work: &mut Work,
    ) {
        self.walk(text, u32::from(is_after_special), work);
        let Some(last) = work.path.last().copied() else { return };
        let tokens = self.span(last).tokens();
        // Few texts have more than a token for each two bytes.
        let tokens_max = tokens + (text.len() - work.bytes) / 2;
        for (link, keys) in links.iter().zip(keys) {
            keys.reserve(link.full(tokens_max) + 2);
            self.append_keys(&work.path, *link, keys);
        }
        let unfilled = links.iter().map(|link| link.unfilled(tokens)).max().unwrap_or(0);
        let wanted = if all_ids { tokens } else { unfilled };
        self.append_last_ids(&work.path, wanted, &mut work.ids);
        work.first = tokens - wanted;
        work.seen_ids = wanted;
        work.generation = self.span(last).generation;
        for at in work.path.iter().skip(1).rev() {
            self.unlink(*at);
            self.link_newest(*at);
        }
        self.stats.hits += work.path.len() as u64 - 1;
        self.stats.hit_bytes += work.bytes as u64;
        self.make_room(0, NONE);
    }

    /// Keeps what had to be tokenized: `work` after the tokenizer, `keys` of the whole text.
    pub(crate) fn keep(
        &mut self,
        text: &[u8],
        links: &[Link],
        keys: &[Vec<BlockKey>],
        work: &Work,
    ) {
        self.stats.misses += work.pieces;
        self.stats.miss_bytes += text.len().saturating_sub(work.bytes) as u64;
        let Some(mut parent) = work.path.last().copied() else { return };
        if self.span(parent).generation != work.generation {
            return;
        }
        let (mut at, mut from) = (work.bytes, work.seen_ids);
        let last = Cut { at: text.len(), guard: 0, ids: work.ids.len() };
        for (cut, is_last) in work.cuts.iter().map(|cut| (cut, false)).chain([(&last, true)]) {
            let guard = cut.guard;
            let (stored, ids) = (text.get(at..cut.at + guard), work.ids.get(from..cut.ids));
            let (Some(stored), Some(ids)) = (stored, ids) else { return };
            if stored.len() - guard < SPAN_BYTES_MIN {
                return;
            }
            let new = New { text: stored, guard, ids, is_last, links, keys };
            let Some(child) = self.insert(parent, &new) else { return };
            (parent, at, from) = (child, cut.at, cut.ids);
        }
    }

    fn span(&self, at: u32) -> &Span {
        &self.spans[at as usize]
    }

    fn span_mut(&mut self, at: u32) -> &mut Span {
        &mut self.spans[at as usize]
    }

    fn walk(&self, text: &[u8], root: u32, work: &mut Work) {
        work.path.push(root);
        let (mut here, mut at) = (root, 0);
        loop {
            let rest = text.get(at..).unwrap_or_default();
            let span = self.span(here);
            if let Some(child) = self.child(&span.children, rest) {
                work.path.push(child);
                let found = self.span(child);
                (here, at) = (child, at + found.text.len() - found.guard);
                continue;
            }
            if let Ok(place) = self.place(&span.last_children, rest) {
                work.path.push(span.last_children[place]);
                at = text.len();
            }
            work.bytes = at;
            return;
        }
    }

    /// The longest span that `rest` begins with. One is missed where many begin with each other's
    /// beginning; its text is tokenized again.
    fn child(&self, children: &[u32], rest: &[u8]) -> Option<u32> {
        let mut before = rest;
        for _ in 0..CHILD_STEPS_MAX {
            let found = match children {
                [] => return None,
                [only] => *only,
                _ => {
                    let is_before = |at: &u32| self.span(*at).text.as_slice() <= before;
                    *children.get(children.partition_point(is_before).checked_sub(1)?)?
                }
            };
            let text = self.span(found).text.as_slice();
            if before.starts_with(text) {
                return Some(found);
            }
            if children.len() == 1 {
                return None;
            }
            // What `rest` begins with comes before `found`, and `found` begins with it, too.
            let common = text.iter().zip(before).take_while(|(a, b)| a == b).count();
            before = before.get(..common)?;
        }
        None
    }

    fn place(&self, children: &[u32], text: &[u8]) -> Result<usize, usize> {
        children.binary_search_by(|at| self.span(*at).text.as_slice().cmp(text))
    }

    /// Appends the keys of the blocks that the spans of `path` complete; those that are not known
    /// are made of the ids, and kept.
    fn append_keys(&mut self, path: &[u32], link: Link, keys: &mut Vec<BlockKey>) {
        if link.block_size == 0 {
            return;
        }
        for (index, at) in path.iter().enumerate() {
            let span = self.span(*at);
            if let Some((_, known)) = span.chains.iter().find(|(known, _)| *known == link) {
                keys.extend_from_slice(known);
                continue;
            }
            let (had, unfilled) = (keys.len(), link.unfilled(span.tokens_before));
            let mut ids = std::mem::take(&mut self.gathered);
            ids.clear();
            self.append_last_ids(&path[..index], unfilled, &mut ids);
            ids.extend_from_slice(&self.span(*at).ids);
            link.extend(&ids, keys);
            self.gathered = ids;
            self.keep_keys(*at, link, &keys[had..]);
        }
    }

    fn keep_keys(&mut self, at: u32, link: Link, keys: &[BlockKey]) {
        let span = self.span_mut(at);
        let mut kept = match span.chains.len() < CHAINS_PER_SPAN_MAX {
            true => Vec::with_capacity(keys.len()),
            false => span.chains.remove(0).1,
        };
        kept.clear();
        kept.extend_from_slice(keys);
        span.chains.push((link, kept));
        self.charge(at);
    }

    /// Appends the last `count` ids of the spans of `path`.
    fn append_last_ids(&self, path: &[u32], count: usize, ids: &mut Vec<u32>) {
        let (mut from, mut had) = (path.len(), 0);
        while had < count && from > 0 {
            from -= 1;
            had += self.span(path[from]).ids.len();
        }
        let mut skip = had.saturating_sub(count);
        for at in &path[from..] {
            ids.extend_from_slice(self.span(*at).ids.get(skip..).unwrap_or_default());
            skip = 0;
        }
    }

    /// The span with this text behind `parent`, new or known; `None`: there is no room for it.
    fn insert(&mut self, parent: u32, new: &New<'_>) -> Option<u32> {
        let list = self.list(parent, new.is_last);
        if let Ok(place) = self.place(list, new.text) {
            return list.get(place).copied();
        }
        let blocks = new.links.iter().map(|link| link.full(new.ids.len()) + 1).sum::<usize>();
        let ids = size_of_val(new.ids);
        let cost = SPAN_BYTES + new.text.len() + ids + blocks * size_of::<BlockKey>();
        if cost > self.stats.bytes_max / SPAN_PART_MAX || !self.make_room(cost, parent) {
            return None;
        }
        let at = self.new_span()?;
        let tokens_before = self.span(parent).tokens();
        let span = self.span_mut(at);
        (span.parent, span.is_last, span.tokens_before) = (parent, new.is_last, tokens_before);
        span.guard = new.guard;
        span.text.extend_from_slice(new.text);
        span.ids.extend_from_slice(new.ids);
        let tokens = span.tokens();
        for (link, keys) in new.links.iter().zip(new.keys) {
            let is_known = self.span(at).chains.iter().any(|(known, _)| known == link);
            let blocks = link.full(tokens_before)..link.full(tokens);
            if let (false, Some(keys)) = (is_known, keys.get(blocks)) {
                self.keep_keys(at, *link, keys);
            }
        }
        let list = self.list(parent, new.is_last);
        let place = self.place(list, new.text).unwrap_or_else(|place| place);
        self.list_mut(parent, new.is_last).insert(place, at);
        self.charge(at);
        self.link_behind(at, parent);
        self.stats.entries += 1;
        self.make_room(0, at);
        Some(at)
    }

    fn list(&self, parent: u32, is_last: bool) -> &[u32] {
        let span = self.span(parent);
        if is_last { &span.last_children } else { &span.children }
    }

    fn list_mut(&mut self, parent: u32, is_last: bool) -> &mut Vec<u32> {
        let span = self.span_mut(parent);
        if is_last { &mut span.last_children } else { &mut span.children }
    }

    fn new_span(&mut self) -> Option<u32> {
        if let Some(at) = self.free.pop() {
            return Some(at);
        }
        let at = u32::try_from(self.spans.len()).ok().filter(|at| *at != NONE)?;
        self.spans.push(Span::new());
        Some(at)
    }

    /// Notes what a span costs now. The roots are free.
    fn charge(&mut self, at: u32) {
        if at > LAST_ROOT {
            let span = &mut self.spans[at as usize];
            let cost = span.cost();
            let before = std::mem::replace(&mut span.charged, cost);
            self.stats.bytes = self.stats.bytes + cost - before;
        }
    }

    /// Drives out what was used longest ago, but not `parent`, until `cost` fits in.
    fn make_room(&mut self, cost: usize, parent: u32) -> bool {
        while self.stats.bytes + cost > self.stats.bytes_max {
            let oldest = self.oldest;
            if oldest == NONE || oldest == parent {
                return false;
            }
            self.remove(oldest);
        }
        true
    }

    fn remove(&mut self, at: u32) {
        self.unlink(at);
        let (parent, is_last) = (self.span(at).parent, self.span(at).is_last);
        let list = self.list(parent, is_last);
        if let Ok(place) = self.place(list, &self.span(at).text) {
            self.list_mut(parent, is_last).remove(place);
        }
        let keeps_memory = self.free.len() < FREE_SPANS_MAX;
        let span = self.span_mut(at);
        let charged = std::mem::take(&mut span.charged);
        span.generation = span.generation.wrapping_add(1);
        span.text.clear();
        span.ids.clear();
        span.chains.clear();
        if !keeps_memory {
            *span = Span { generation: span.generation, ..Span::new() };
        }
        self.stats.bytes -= charged;
        self.stats.entries -= 1;
        self.free.push(at);
    }

    fn unlink(&mut self, at: u32) {
        let (newer, older) = (self.span(at).newer, self.span(at).older);
        match newer {
            NONE => self.newest = older,
            newer => self.span_mut(newer).older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.span_mut(older).newer = newer,
        }
    }

    /// Places a span right behind the one it stands on: then what is older than all others never
    /// has spans that stand on it.
    fn link_behind(&mut self, at: u32, parent: u32) {
        if parent <= LAST_ROOT {
            return self.link_newest(at);
        }
        let older = std::mem::replace(&mut self.span_mut(parent).older, at);
        let span = self.span_mut(at);
        (span.newer, span.older) = (parent, older);
        match older {
            NONE => self.oldest = at,
            older => self.span_mut(older).newer = at,
        }
    }

    fn link_newest(&mut self, at: u32) {
        let older = std::mem::replace(&mut self.newest, at);
        let span = self.span_mut(at);
        (span.newer, span.older) = (NONE, older);
        match older {
            NONE => self.oldest = at,
            older => self.span_mut(older).newer = at,
        }
    }
}

#[cfg(test)]
impl Prefixes {
    /// What must hold at any time.
    pub(crate) fn check(&self) {
        let (mut at, mut newer, mut order) = (self.newest, NONE, Vec::new());
        while at != NONE {
            let span = self.span(at);
            assert_eq!(span.newer, newer);
            order.push(at);
            (newer, at) = (at, span.older);
        }
        assert_eq!(self.oldest, newer);
        assert_eq!(order.len(), self.stats.entries);
        assert_eq!(order.len() + self.free.len() + 2, self.spans.len());
        let bytes = order.iter().map(|at| self.span(*at).cost()).sum::<usize>();
        assert_eq!(bytes, self.stats.bytes);
        assert!(bytes <= self.stats.bytes_max);
        for (place, at) in order.iter().enumerate() {
            let span = self.span(*at);
            let stands_on_newer = order[..place].contains(&span.parent);
            assert!(span.parent <= LAST_ROOT || stands_on_newer, "a span outlives its parent");
            assert!(self.list(span.parent, span.is_last).contains(at));
            assert_eq!(span.tokens_before, self.span(span.parent).tokens());
        }
        for span in &self.spans {
            for list in [&span.children, &span.last_children] {
                assert!(list.windows(2).all(|pair| {
                    let [a, b] = [pair[0], pair[1]].map(|at| self.span(at).text.as_slice());
                    a < b
                }));
            }
        }
    }
}
