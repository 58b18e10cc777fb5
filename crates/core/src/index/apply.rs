//! What an engine's event changes.

use super::Index;
use super::applied::{Applied, SkipReason};
use super::budget::Class;
use super::endpoint::Route;
use super::pending::{self, Waiting};
use crate::EndpointId;
use crate::blocks::{self, BlockKey, Root, TokenSpace};
use crate::event::{BlockRemoved, BlockStored, EngineHash, KvEvent};

impl Index {
    /// Applies one event of an endpoint's engine. Events must come in the order of its stream.
    pub fn apply(&mut self, id: EndpointId, event: &KvEvent) -> Applied {
        let mut applied = Applied::default();
        if self.endpoint(id).is_none() {
            let blocks = match event {
                KvEvent::Stored(stored) => stored.hashes.len(),
                KvEvent::Removed(removed) => removed.hashes.len(),
                KvEvent::Cleared => 0,
            };
            applied.skip(SkipReason::UnknownEndpoint, blocks);
            return applied;
        }
        match event {
            KvEvent::Stored(stored) => self.stored(id.slot, stored, &mut applied),
            KvEvent::Removed(removed) => self.removed(id.slot, removed, &mut applied),
            KvEvent::Cleared => {
                applied.cleared = 1;
                self.clear_resident(id);
            }
        }
        applied
    }

    fn stored(&mut self, slot: u16, event: &BlockStored, applied: &mut Applied) {
        let kind = (!event.tokens.is_empty()).then_some(event.kind);
        match self.change(slot, |endpoint, _| endpoint.route(event.group, kind)) {
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
            if !self.make_room(slot, 0, Class::Resident) {
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
        for &hash in &event.hashes {
            match self.slots[usize::from(slot)].as_deref().and_then(|e| e.key_of(hash)) {
                Some(key) => drop(self.add(slot, event, hash, key, applied)),
                None => applied.unknown += 1,
            }
        }
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
                let confirms = self.resolve(slot, known, applied) || confirms;
                if confirms {
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
        if size == 0 || !extras_fit {
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
            self.change(slot, |endpoint, blocks| {
                if !empty {
                    endpoint.clear(blocks);
                    // The event's own group is known again at once.
                    endpoint.route(event.group, Some(event.kind));
                }
                endpoint.block_size = event.block_size;
            });
            applied.resized += u64::from(known != 0);
        }
        let full = tokens / size;
        applied.skip(SkipReason::PartialBlock, hashes - full);
        Some(full)
    }

    /// The key before the first block; `None` while it is not known.
    fn parent(&self, slot: u16, event: &BlockStored) -> Option<BlockKey> {
        let root = || {
            let root = event.lora_name.as_deref().map_or(Root::Base, Root::Adapter);
            blocks::root(event.block_size, TokenSpace::Exact, root)
        };
        let key_of = |hash| self.slots[usize::from(slot)].as_deref()?.key_of(hash);
        match event.parent {
            None => Some(root()),
            // Engines of the array form write 0 where there is no parent.
            Some(EngineHash(0)) => Some(key_of(EngineHash(0)).unwrap_or_else(root)),
            Some(parent) => key_of(parent),
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
            && event.hashes[..blocks].iter().all(|&hash| endpoint.has(hash, event.tier))
    }

    /// Adds the blocks of an event but those in `gone`; whether a speculation waited for one.
    fn place(
        &mut self,
        slot: u16,
        event: &BlockStored,
        parent: BlockKey,
        blocks: usize,
        gone: &[u32],
        applied: &mut Applied,
    ) -> bool {
        let mut keys = Vec::with_capacity(blocks);
        blocks::extend(parent, event.block_size, &event.tokens, &event.extras, &mut keys);
        let mut confirms = false;
        for (at, (&hash, key)) in (0u32..).zip(event.hashes.iter().zip(keys)) {
            if !gone.contains(&at) {
                confirms |= self.add(slot, event, hash, key, applied);
            }
        }
        confirms
    }

    /// Adds one copy of a block; whether a speculation waited for it.
    fn add(
        &mut self,
        slot: u16,
        event: &BlockStored,
        hash: EngineHash,
        key: BlockKey,
        applied: &mut Applied,
    ) -> bool {
        if !self.make_room(slot, 0, Class::Resident) {
            applied.skip(SkipReason::OverBudget, 1);
            return false;
        }
        let speculated =
            self.speculations.len() > 0 && self.blocks.holder(key.0, slot).speculations > 0;
        match self.change(slot, |endpoint, blocks| endpoint.add(blocks, hash, key, event.tier)) {
            true => applied.stored += 1,
            false => applied.duplicate += 1,
        }
        speculated
    }

    fn keep_pending(&mut self, slot: u16, event: &BlockStored, applied: &mut Applied) {
        let Some(parent) = event.parent else { return };
        let (blocks, limit) = (event.hashes.len(), self.limits.pending_blocks_per_endpoint_max);
        let bytes = pending::heap_bytes(event) + pending::ENTRY_BYTES_MAX;
        if blocks > limit as usize || !self.make_room(slot, bytes, Class::Pending) {
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

    /// Places the events that waited for one of the blocks, and those that waited for them;
    /// whether a speculation waited for one of their blocks.
    fn resolve(&mut self, slot: u16, blocks: &[EngineHash], applied: &mut Applied) -> bool {
        let mut confirms = false;
        let mut known = blocks.to_vec();
        while let Some(hash) = known.pop() {
            if self.slots[usize::from(slot)].as_deref().is_none_or(|e| e.pending.blocks() == 0) {
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

    /// Ends the speculations of an endpoint whose last block is resident by now.
    fn confirm(&mut self, slot: u16) {
        let Some(endpoint) = self.slots[usize::from(slot)].as_deref() else { return };
        let filled = |id: &&_| {
            let speculation = self.speculations.get(**id);
            let last = speculation.and_then(|speculation| speculation.keys.last());
            last.is_some_and(|&key| self.blocks.holder(key, slot).is_resident())
        };
        let filled: Vec<_> = endpoint.speculations.iter().filter(filled).copied().collect();
        filled.into_iter().for_each(|id| self.withdraw(id));
    }

    fn removed(&mut self, slot: u16, event: &BlockRemoved, applied: &mut Applied) {
        self.change(slot, |endpoint, blocks| {
            let route = endpoint.route(event.group, None);
            for &hash in &event.hashes {
                let known = match route {
                    Route::Skip(reason) => {
                        applied.skip(reason, 1);
                        continue;
                    }
                    Route::Unknown => false,
                    Route::Beside(at) => endpoint.remove_beside(at, hash, event.tier),
                    Route::Indexed => {
                        endpoint.remove(blocks, hash, event.tier)
                            || endpoint.pending.remove(hash, event.tier)
                    }
                };
                applied.removed += u64::from(known);
                applied.unknown += u64::from(!known);
            }
            endpoint.trim(4);
        });
        self.blocks.trim(4);
    }
}

#[cfg(test)]
impl Index {
    /// Copies of every resident engine hash of an endpoint, by hash and tier bit.
    pub(crate) fn copies_by_hash(
        &self,
        id: EndpointId,
    ) -> std::collections::BTreeMap<(u64, u8), u32> {
        self.endpoint(id).map(|endpoint| endpoint.copies_by_hash()).unwrap_or_default()
    }

    /// Checks the running sums against a recount.
    pub(crate) fn check(&self) {
        let (bytes, entries) = self.blocks.recount();
        assert_eq!((self.blocks.bytes(), self.blocks.entries()), (bytes, entries));
        let endpoints: usize = self.slots.iter().flatten().map(|endpoint| endpoint.bytes()).sum();
        assert_eq!(self.endpoint_bytes, endpoints);
    }
}
