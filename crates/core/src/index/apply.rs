//! What an engine's event changes.

use super::Index;
use super::applied::{Applied, SkipReason};
use super::budget::Class;
use super::endpoint::{OwnBlock, Route};
use super::names::PREFETCHED_FROM_BYTES;
use super::pending::{self, Waiting};
use super::runs::{Place, Span};
use super::sets::Plane;
use super::tree::{Hold, Naming, Part};
use crate::EndpointId;
use crate::blocks::{self, BlockKey, Root, TokenSpace};
use crate::event::{BlockRemoved, BlockStored, EngineHash, GroupKind, KvEvent, Tokens};
use smallvec::SmallVec;

/// Blocks of an endpoint whose names are compared with their keys before they are taken for keys.
pub(super) const COMPARED_MIN: u32 = 64;
/// Names that are looked for in advance: more would drive one another out of the nearest caches.
const PREFETCHED_MAX: usize = 128;
/// From then on the names of one event of so many are compared.
pub(super) const COMPARED_EVERY: u32 = 16;

impl Index {
    /// Applies one event of an endpoint's engine. Events must come in the order of its stream.
    pub fn apply(&mut self, id: EndpointId, event: &KvEvent) -> Applied {
        let mut applied = Applied::default();
        self.apply_to(id, event, &mut applied);
        applied
    }

    /// The same, where `applied` is a sum.
    pub fn apply_to(&mut self, id: EndpointId, event: &KvEvent, applied: &mut Applied) {
        if self.endpoint(id).is_none() {
            let blocks = match event {
                KvEvent::Stored(stored) => stored.hashes.len(),
                KvEvent::Removed(removed) => removed.hashes.len(),
                KvEvent::Cleared => 0,
            };
            applied.skip(SkipReason::UnknownEndpoint, blocks);
            return;
        }
        match event {
            KvEvent::Stored(stored) => self.stored(id.slot, stored, applied),
            KvEvent::Removed(removed) => self.removed(id.slot, removed, applied),
            KvEvent::Cleared => {
                applied.cleared += 1;
                self.clear_resident(id);
            }
        }
    }

    /// Gets what the first of these events will need from memory, all at once, so that applying
    /// them does not wait for it one after the other; how many events these are, one at least.
    pub fn prefetch<'a>(&self, events: impl Iterator<Item = &'a KvEvent>) -> usize {
        if self.tree.names.bytes() < PREFETCHED_FROM_BYTES {
            return events.count().max(1);
        }
        let (mut left, mut count) = (PREFETCHED_MAX, 0);
        let mut alone: SmallVec<[EngineHash; PREFETCHED_MAX]> = SmallVec::new();
        for event in events {
            let (names, are_new) = match event {
                KvEvent::Stored(stored) => (&stored.hashes[..], true),
                KvEvent::Removed(removed) => (&removed.hashes[..], false),
                KvEvent::Cleared => (&[][..], false),
            };
            if names.len() > left && count > 0 {
                break;
            }
            let names = &names[..names.len().min(left)];
            left -= names.len();
            self.tree.names.prefetch(names, are_new);
            if let (&[name], false) = (names, are_new) {
                alone.push(name);
            }
            count += 1;
        }
        // Names that leave together are sought together; others wait for their runs, too.
        let places = alone.iter().filter_map(|name| self.tree.names.get(name.0));
        std::hint::black_box(
            places.fold(0, |all, place| all ^ self.tree.runs.get(place.run).len()),
        );
        count.max(1)
    }

    fn stored(&mut self, slot: u16, event: &BlockStored, applied: &mut Applied) {
        let kind = (!event.tokens.is_empty()).then_some(event.kind);
        if event.group.is_none() && kind.is_none_or(|kind| kind == GroupKind::Full) {
            match kind {
                Some(_) if self.store_along(slot, event, applied) => {}
                Some(_) => self.content(slot, event, applied),
                None => self.retiered(slot, event, applied),
            }
            return;
        }
        match self.change(slot, |endpoint, tree| endpoint.route(tree, event.group, kind)) {
            Route::Skip(reason) => applied.skip(reason, event.hashes.len()),
            Route::Unknown => applied.unknown += event.hashes.len() as u64,
            Route::Beside(at) => self.stored_beside(slot, at, event, applied),
            Route::Indexed if event.tokens.is_empty() => self.retiered(slot, event, applied),
            Route::Indexed => self.content(slot, event, applied),
        }
    }

    /// Blocks of a group that only limits what can be reused: their names are enough. Their tokens
    /// are not looked at, because a sliding window's event has more of them than blocks.
    fn stored_beside(&mut self, slot: u16, at: usize, event: &BlockStored, applied: &mut Applied) {
        use crate::event::GroupKind::Full;
        let dense = event.tokens.len() == event.hashes.len() * event.block_size as usize;
        if event.kind == Full && !event.tokens.is_empty() && !dense {
            self.change(slot, |endpoint, _| endpoint.distrust(at));
            applied.skip(SkipReason::NotDense, event.hashes.len());
            return;
        }
        for &hash in &event.hashes {
            if !self.make_room(slot, 1, 0, Class::Resident) {
                applied.skip(SkipReason::OverBudget, 1);
                continue;
            }
            match self.change(slot, |endpoint, _| endpoint.add_beside(at, hash, event.tier)) {
                true => applied.stored += 1,
                false => applied.duplicate += 1,
            }
        }
    }

    /// Blocks without content: known ones have a copy in another tier now.
    fn retiered(&mut self, slot: u16, event: &BlockStored, applied: &mut Applied) {
        if !self.make_room(slot, event.hashes.len(), 0, Class::Resident) {
            applied.skip(SkipReason::OverBudget, event.hashes.len());
            return;
        }
        for &hash in &event.hashes {
            let Some((place, key)) = self.place_of(slot, hash) else {
                applied.unknown += 1;
                continue;
            };
            self.change(slot, |endpoint, tree| {
                let is_first = if endpoint.has_own_names() {
                    endpoint.add_own(tree, OwnBlock { hash, key, place }, event.tier, false).0
                } else {
                    let part = Part { span: Span::of(place), is_new: false };
                    endpoint.add(tree, part, &[hash.0], event.tier).0 == 1
                };
                applied.stored += u64::from(is_first);
                applied.duplicate += u64::from(!is_first);
            });
        }
    }

    /// The block that an endpoint calls so, if it holds it.
    fn place_of(&self, slot: u16, hash: EngineHash) -> Option<(Place, BlockKey)> {
        self.slots[usize::from(slot)].as_deref()?.place_of(&self.tree, hash)
    }

    fn content(&mut self, slot: u16, event: &BlockStored, applied: &mut Applied) {
        let Some(blocks) = self.check_content(slot, event, applied) else { return };
        match self.parent(slot, event) {
            None => self.keep_pending(slot, event, applied),
            Some(_) if self.is_reannounced(slot, event, blocks) => {
                applied.reannounced += blocks as u64;
            }
            Some(parent) => {
                let confirms = self.place(slot, event, parent, blocks, &[], applied);
                let known = &event.hashes[..blocks];
                if self.resolve(slot, known, applied) || confirms {
                    self.confirm(slot);
                }
            }
        }
    }

    /// How many blocks of the event can be named; `None` when nothing of it can be used.
    fn check_content(
        &mut self,
        slot: u16,
        event: &BlockStored,
        applied: &mut Applied,
    ) -> Option<usize> {
        let (hashes, tokens) = (event.hashes.len(), event.tokens.len());
        let size = event.block_size as usize;
        let extras_fit = event.extras.is_empty() || event.extras.len() == hashes;
        if size == 0 || !extras_fit || !event.tokens.fit(event.block_size) {
            applied.skip(SkipReason::Malformed, hashes);
            return None;
        }
        // SGLang ends a coalesced event with a page that may be short.
        let short_tail = event.group.is_none() && tokens.div_ceil(size) == hashes;
        if tokens != hashes * size && !short_tail {
            applied.skip(SkipReason::NotDense, hashes);
            return None;
        }
        let (known, empty) = {
            let endpoint = self.slots[usize::from(slot)].as_deref()?;
            (endpoint.block_size, endpoint.resident() == 0)
        };
        if known != event.block_size {
            if event.block_size < known && !empty {
                applied.skip(SkipReason::PartialBlock, hashes);
                return None;
            }
            self.change(slot, |endpoint, tree| {
                if !empty {
                    endpoint.clear(tree);
                    // The event's own group is known again at once.
                    endpoint.route(tree, event.group, Some(event.kind));
                }
                endpoint.block_size = event.block_size;
            });
            applied.resized += u64::from(known != 0);
        }
        let full = tokens / size;
        applied.skip(SkipReason::PartialBlock, hashes - full);
        Some(full)
    }

    /// The block before the first, and its key; `None` while they are not known.
    fn parent(&self, slot: u16, event: &BlockStored) -> Option<Parent> {
        let root = || {
            let root = event.lora_name.as_deref().map_or(Root::Base, Root::Adapter);
            (None, blocks::root(event.block_size, TokenSpace::Exact, root))
        };
        let block = |hash: EngineHash| {
            let (place, key) = self.place_of(slot, hash)?;
            Some((Some(place), key))
        };
        match event.parent {
            None => Some(root()),
            // Engines of the array form write 0 where there is no parent.
            Some(EngineHash(0)) => Some(block(EngineHash(0)).unwrap_or_else(root)),
            Some(parent) => block(parent),
        }
    }

    /// Whether the event lists reused blocks (vLLM's `kv_cache_report_mode=full`), which is not
    /// marked as such: it begins a prompt, and every block of it is there already. With several
    /// groups, real second copies look the same.
    fn is_reannounced(&self, slot: u16, event: &BlockStored, blocks: usize) -> bool {
        let Some(endpoint) = self.slots[usize::from(slot)].as_deref() else { return false };
        event.parent.is_none()
            && blocks >= 2
            && !endpoint.is_hybrid()
            && event.hashes[..blocks].iter().all(|&hash| endpoint.has(&self.tree, hash, event.tier))
    }

    /// Adds the blocks of an event but those in `gone`; whether a speculation waited for one.
    fn place(
        &mut self,
        slot: u16,
        event: &BlockStored,
        parent: Parent,
        blocks: usize,
        gone: &[u32],
        applied: &mut Applied,
    ) -> bool {
        let before = self.evicted;
        let has_room = self.make_room(slot, blocks, 0, Class::Resident);
        // What had to go may have been the parent.
        let is_same = self.evicted == before;
        let parent = if is_same { Some(parent) } else { self.parent(slot, event) };
        let Some((mut after, parent)) = parent.filter(|_| has_room) else {
            applied.skip(SkipReason::OverBudget, blocks - gone.len());
            return false;
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.names.clear();
        scratch.names.extend(event.hashes[..blocks].iter().map(|hash| hash.0));
        scratch.keys.clear();
        if self.takes_names_for_keys(slot, blocks) {
            scratch.keys.extend(scratch.names.iter().map(|&name| BlockKey(name)));
        } else {
            keys_of(parent, event, &mut scratch.keys);
            if self.compare(slot, &scratch.keys, &scratch.names) {
                // With what was forgotten the parent may be gone, and its run.
                let parent = event.parent.filter(|_| after.is_some());
                after = parent.and_then(|parent| self.place_of(slot, parent)).map(|at| at.0);
            }
        }
        let keys: &[BlockKey] = &scratch.keys;
        let hold = Hold { slot, plane: Plane::tier(event.tier) };
        scratch.parts.clear();
        self.tree.path(after, keys, hold, &mut scratch.parts);
        let all = Placed { parts: &scratch.parts, keys, names: &scratch.names, gone };
        let awaited = self.change(slot, |endpoint, tree| {
            if !endpoint.has_own_names() && all.name(tree).is_err() {
                endpoint.own_names(tree, all.parts);
            }
            all.store(endpoint, tree, event.tier, applied)
        });
        let last = all.parts.last().filter(|_| gone.is_empty());
        if let (Some(part), Some(&name)) = (last, all.names.last()) {
            let place = part.span.place(part.span.len() - 1);
            if let Some(endpoint) = self.slots[usize::from(slot)].as_deref_mut() {
                endpoint.latest.put(name, place);
            }
        }
        self.scratch = scratch;
        self.tree.sweep_if_due();
        awaited
    }

    /// Whether an endpoint's names have turned out to be keys, so that they need no comparison
    /// now.
    fn takes_names_for_keys(&mut self, slot: u16, blocks: usize) -> bool {
        if self.tree.naming() != Naming::Native {
            return false;
        }
        let Some(endpoint) = self.slots[usize::from(slot)].as_deref_mut() else { return false };
        if endpoint.has_own_names() || endpoint.compared < COMPARED_MIN {
            return false;
        }
        let takes = endpoint.is_trusted();
        endpoint.trust(blocks);
        takes
    }

    /// Learns whether an endpoint's names are keys; whether it turned out that they are not.
    fn compare(&mut self, slot: u16, keys: &[BlockKey], names: &[u64]) -> bool {
        let equal = keys.iter().zip(names).all(|(key, &name)| key.0 == name);
        match self.tree.naming() {
            Naming::Portable if equal && self.tree.names.len() == 0 => self.tree.go_native(),
            Naming::Portable => return false,
            Naming::Native => {}
        }
        self.change(slot, |endpoint, tree| {
            if equal {
                endpoint.compared = endpoint.compared.saturating_add(keys.len() as u32);
            } else if !endpoint.has_own_names() {
                // Names that were not compared may have been taken for other blocks' keys.
                if endpoint.compared >= COMPARED_MIN {
                    endpoint.forget_blocks(tree);
                }
                endpoint.own_names(tree, &[]);
            }
        });
        !equal
    }

    /// Places the events that waited for one of the blocks, and those that waited for them;
    /// whether a speculation waited for one of their blocks.
    fn resolve(&mut self, slot: u16, blocks: &[EngineHash], applied: &mut Applied) -> bool {
        let mut confirms = false;
        let nothing_waits = |index: &Index| {
            let endpoint = index.slots[usize::from(slot)].as_deref();
            endpoint.is_none_or(|endpoint| endpoint.pending.blocks() == 0)
        };
        if nothing_waits(self) {
            return false;
        }
        let mut known = blocks.to_vec();
        while let Some(hash) = known.pop() {
            if nothing_waits(self) {
                break;
            }
            while let Some(Waiting { event, gone }) = self.change(slot, |e, _| e.pending.take(hash))
            {
                let Some(parent) = self.parent(slot, &event) else {
                    applied.pending_dropped += event.hashes.len() as u64;
                    continue;
                };
                let blocks = event.tokens.len() / event.block_size.max(1) as usize;
                let mut placed = Applied::default();
                confirms |= self.place(slot, &event, parent, blocks, &gone, &mut placed);
                applied.resolved += placed.stored + placed.duplicate;
                let over = placed.skipped_for(SkipReason::OverBudget);
                applied.skip(SkipReason::OverBudget, over as usize);
                let here = |(at, hash): (u32, &EngineHash)| (!gone.contains(&at)).then_some(*hash);
                known.extend((0..).zip(&event.hashes[..blocks]).filter_map(here));
            }
        }
        confirms
    }

    fn keep_pending(&mut self, slot: u16, event: &BlockStored, applied: &mut Applied) {
        let Some(parent) = event.parent else { return };
        let (blocks, limit) = (event.hashes.len(), self.limits.pending_blocks_per_endpoint_max);
        let bytes = pending::heap_bytes(event) + pending::ENTRY_BYTES_MAX;
        if blocks > limit as usize || !self.make_room(slot, 0, bytes, Class::Pending) {
            applied.pending_dropped += blocks as u64;
            return;
        }
        applied.pending += blocks as u64;
        self.change(slot, |endpoint, _| {
            endpoint.pending.push(parent, event);
            while endpoint.pending.blocks() > limit
                && let Some(old) = endpoint.pending.pop_oldest()
            {
                applied.pending_dropped += old.event.hashes.len() as u64;
            }
        });
    }

    /// Ends the speculations of an endpoint whose last block is resident by now.
    pub(super) fn confirm(&mut self, slot: u16) {
        let Some(endpoint) = self.slots[usize::from(slot)].as_deref() else { return };
        let filled = |id: &&_| {
            let spans = self.speculations.get(**id).map(|speculation| &speculation.spans);
            let last = spans.and_then(|spans| spans.last());
            last.is_some_and(|last| {
                let set = self.tree.set(last.place(last.len() - 1));
                set.of(slot) & Plane::TIERS != 0
            })
        };
        let filled: Vec<_> = endpoint.speculations.iter().filter(filled).copied().collect();
        filled.into_iter().for_each(|id| self.withdraw(id));
    }

    fn removed(&mut self, slot: u16, event: &BlockRemoved, applied: &mut Applied) {
        if self.remove_along(slot, event, applied) {
            return;
        }
        let mut search = std::mem::take(&mut self.scratch.search);
        let blocks = event.hashes.len();
        self.change(slot, |endpoint, tree| {
            let missing = match endpoint.route(tree, event.group, None) {
                Route::Skip(reason) => {
                    applied.skip(reason, blocks);
                    return;
                }
                Route::Unknown => blocks,
                Route::Beside(at) => {
                    let mut hashes = event.hashes.iter();
                    let missing = hashes.by_ref();
                    missing.filter(|&&h| !endpoint.remove_beside(at, h, event.tier)).count()
                }
                Route::Indexed => endpoint.remove(tree, &event.hashes, event.tier, &mut search),
            };
            applied.removed += (blocks - missing) as u64;
            applied.unknown += missing as u64;
            endpoint.trim(4);
        });
        self.scratch.search = search;
        self.tree.sweep_if_due();
    }
}

/// The keys of an event's blocks behind the one with key `parent`.
#[inline]
pub(super) fn keys_of(parent: BlockKey, event: &BlockStored, keys: &mut Vec<BlockKey>) {
    match &event.tokens {
        Tokens::Ids(ids) => blocks::extend(parent, event.block_size, ids, &event.extras, keys),
        Tokens::Hashed { blocks: contents, count } => {
            let full = (*count / event.block_size.max(1)) as usize;
            blocks::follow(parent, &contents[..full.min(contents.len())], &event.extras, keys);
        }
    }
}

/// The block before the first of an event, if there is one, and the key from which to go on.
type Parent = (Option<Place>, BlockKey);

/// The blocks of an event, found or made.
struct Placed<'a> {
    parts: &'a [Part],
    keys: &'a [BlockKey],
    names: &'a [u64],
    /// Blocks of the event that have left the cache again.
    gone: &'a [u32],
}

impl Placed<'_> {
    /// The stretches of a part that are still there, with the number of their first block.
    fn stretches(&self, part: Part, first: usize) -> impl Iterator<Item = (Part, usize)> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let is_gone = |at: usize| self.gone.contains(&((first + at) as u32));
            let start = (from..part.span.len()).find(|&at| !is_gone(at))?;
            let end = (start..part.span.len()).find(|&at| is_gone(at)).unwrap_or(part.span.len());
            from = end;
            Some((Part { span: part.span.part(start..end), ..part }, first + start))
        })
    }

    /// All stretches, and with it the number of the first block of each.
    fn all(&self) -> impl Iterator<Item = (Part, usize)> {
        let mut next = 0;
        self.parts.iter().flat_map(move |part| {
            let first = next;
            next += part.span.len();
            self.stretches(*part, first)
        })
    }

    /// Calls the blocks what the event calls them.
    fn name(&self, tree: &mut super::Tree) -> Result<(), ()> {
        if tree.naming() == Naming::Native {
            return Ok(());
        }
        let mut stretches = self.all();
        stretches.try_for_each(|(part, first)| tree.name(part, &self.names[first..]))
    }

    /// Notes that an endpoint holds the blocks; whether a speculation waited for one.
    fn store(
        &self,
        endpoint: &mut super::Endpoint,
        tree: &mut super::Tree,
        tier: crate::event::Tier,
        applied: &mut Applied,
    ) -> bool {
        let mut awaited = false;
        for (part, first) in self.all() {
            let names = &self.names[first..first + part.span.len()];
            if !endpoint.has_own_names() {
                let (stored, waits) = endpoint.add(tree, part, names, tier);
                applied.stored += stored as u64;
                applied.duplicate += (names.len() - stored) as u64;
                awaited |= waits;
                continue;
            }
            for (at, (&name, key)) in names.iter().zip(&self.keys[first..]).enumerate() {
                let (hash, place) = (EngineHash(name), part.span.place(at));
                let block = OwnBlock { hash, key: *key, place };
                let (is_first, waits) = endpoint.add_own(tree, block, tier, part.is_new);
                applied.stored += u64::from(is_first);
                applied.duplicate += u64::from(!is_first);
                awaited |= waits;
            }
        }
        for part in self.parts.iter().filter(|part| part.is_new && !self.gone.is_empty()) {
            self.leave_gone(endpoint.slot, tree, *part, tier);
        }
        awaited
    }

    /// Blocks that are made because others follow them are not held if they have left again.
    fn leave_gone(&self, slot: u16, tree: &mut super::Tree, part: Part, tier: crate::event::Tier) {
        let before = self.parts.iter().take_while(|other| other.span != part.span);
        let first: usize = before.map(|other| other.span.len()).sum();
        for at in 0..part.span.len() {
            if self.gone.contains(&((first + at) as u32)) {
                let span = part.span.part(at..at + 1);
                tree.unhold(span, slot, 1 << Plane::tier(tier), |_, _| ());
            }
        }
    }
}

#[cfg(test)]
impl Index {
    /// Copies of every resident engine hash of an endpoint, by hash and tier bit.
    pub(crate) fn copies_by_hash(
        &self,
        id: EndpointId,
    ) -> std::collections::BTreeMap<(u64, u8), u32> {
        let endpoint = self.endpoint(id);
        endpoint.map(|endpoint| endpoint.copies_by_hash(&self.tree)).unwrap_or_default()
    }

    /// Checks the running sums against a recount.
    pub(crate) fn check(&self) {
        self.tree.check();
        let endpoints: usize = self.slots.iter().flatten().map(|endpoint| endpoint.bytes()).sum();
        assert_eq!(self.endpoint_bytes, endpoints);
    }
}
