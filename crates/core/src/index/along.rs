//! The short way of an event through the index.
//!
//! Most events are plain: blocks that follow their parent in its run, blocks that leave one by one
//! from a prompt's end. They are applied here, in one go. What differs in any way (another run, a
//! copy, a tier, a group, names of an endpoint's own, a budget that is short) takes the way through
//! [`super::apply`], which knows every case: nothing has changed by then.

use super::Index;
use super::applied::Applied;
use super::apply::keys_of;
use super::runs::{Place, RUN_BLOCKS_MAX, Span};
use super::sets::{EMPTY, Plane};
use super::tree::{Hold, Naming, Tree};
use crate::blocks::BlockKey;
use crate::event::{BlockRemoved, BlockStored, EngineHash};

/// Blocks to be held, all behind one place.
struct Blocks<'a> {
    names: &'a [EngineHash],
    keys: &'a [BlockKey],
    hold: Hold,
}

impl Index {
    /// Stores blocks that go on where their parent is; whether these do.
    pub(super) fn store_along(
        &mut self,
        slot: u16,
        event: &BlockStored,
        applied: &mut Applied,
    ) -> bool {
        let count = event.hashes.len();
        let is_whole = event.tokens.len() == count * event.block_size as usize;
        if event.parent.is_none() || !self.has_room_left(count + 1) {
            return false;
        }
        let Index { slots, tree, scratch, .. } = self;
        let Some(endpoint) = slots[usize::from(slot)].as_deref_mut() else { return false };
        let is_plain = is_whole
            && event.block_size == endpoint.block_size
            && event.extras.is_empty()
            && event.tokens.fit(event.block_size)
            && (1..=usize::from(RUN_BLOCKS_MAX)).contains(&count)
            && endpoint.is_plain();
        let Some(parent) = event.parent.filter(|_| is_plain) else { return false };
        let Some((place, key)) = endpoint.place_of(tree, parent) else { return false };
        scratch.keys.clear();
        let are_keys = tree.naming() == Naming::Native;
        if are_keys {
            if !endpoint.is_trusted() {
                return false;
            }
            scratch.keys.extend(event.hashes.iter().map(|hash| BlockKey(hash.0)));
        } else {
            keys_of(key, event, &mut scratch.keys);
        }
        let hold = Hold { slot, plane: Plane::tier(event.tier) };
        let blocks = Blocks { names: &event.hashes, keys: &scratch.keys, hold };
        let Some(planes) = tree.go_on(place, &blocks) else { return false };
        if are_keys {
            endpoint.trust(count);
        }
        let before = endpoint.runs_bytes();
        endpoint.holds(tree, place.run, count, event.tier, planes);
        self.endpoint_bytes = self.endpoint_bytes + endpoint.runs_bytes() - before;
        let last = Place { run: place.run, at: (usize::from(place.at) + count) as u8 };
        endpoint.latest.put(blocks.names[count - 1].0, last);
        tree.sets.tidy();
        applied.stored += count as u64;
        if planes & 1 << Plane::SPECULATIVE != 0 {
            self.confirm(slot);
        }
        #[cfg(test)]
        {
            self.along[0] += 1;
        }
        true
    }

    /// Removes blocks of an endpoint of which nothing else must be looked at; whether that is so.
    pub(super) fn remove_along(
        &mut self,
        slot: u16,
        event: &BlockRemoved,
        applied: &mut Applied,
    ) -> bool {
        let Index { slots, tree, scratch, .. } = self;
        let Some(endpoint) = slots[usize::from(slot)].as_deref_mut() else { return false };
        if event.group.is_some() || !endpoint.is_plain() || endpoint.has_copies() {
            return false;
        }
        // Of what a plain endpoint has, nothing grows or shrinks when a block goes.
        let missing = endpoint.remove(tree, &event.hashes, event.tier, &mut scratch.search);
        applied.removed += (event.hashes.len() - missing) as u64;
        applied.unknown += missing as u64;
        tree.sweep_if_due();
        #[cfg(test)]
        {
            self.along[1] += 1;
        }
        true
    }
}

impl Tree {
    /// Holds blocks behind a place of the same run, if they are there already, all held by the
    /// same but not so by this endpoint, or if they are new and the place is the last: then in
    /// which ways the endpoint held them.
    fn go_on(&mut self, place: Place, blocks: &Blocks<'_>) -> Option<u8> {
        let next = Place { at: place.at.checked_add(1)?, ..place };
        let len = usize::from(self.runs.get(place.run).len());
        let span = Span {
            run: next.run,
            from: next.at.into(),
            to: u16::from(next.at) + blocks.keys.len() as u16,
        };
        match len == usize::from(next.at) {
            true => self.add_behind(span, blocks).then_some(0),
            false if usize::from(span.to) <= len => self.join(span, blocks),
            false => None,
        }
    }

    /// Holds blocks that are there, if all of it is as [`Tree::go_on`] says.
    fn join(&mut self, span: Span, blocks: &Blocks<'_>) -> Option<u8> {
        let (last, hold) = (blocks.keys.len() - 1, blocks.hold);
        let is_called = |at: usize| self.names.get(blocks.names[at].0) == Some(span.place(at));
        let step = self.runs.get(span.run).step(span.from);
        let set = self.sets.get(step.set);
        let (planes, is_named) = (set.of(hold.slot), self.is_named(set));
        if span.to > step.end || planes & 1 << hold.plane != 0 {
            return None;
        }
        let is_same = match self.naming() {
            // Equal keys at one place are equal before it, and here they are the names.
            Naming::Native => is_named && is_called(last) && is_called(0),
            Naming::Portable => {
                self.runs.keys(span.run)[usize::from(span.to) - 1] == blocks.keys[last]
                    && match is_named {
                        true => (0..=last).all(is_called),
                        false => self.give_names(span, blocks.names),
                    }
            }
        };
        if !is_same {
            return None;
        }
        self.runs.change(&mut self.sets, span, |sets, set, _| {
            sets.change(set, hold.slot, hold.plane, true)
        });
        match planes {
            _ if step.set == EMPTY => self.note_made(span.len()),
            0 => self.note_holders(span.len()),
            _ => {}
        }
        Some(planes)
    }

    /// Makes blocks at the end of a run, if nobody knows them.
    fn add_behind(&mut self, span: Span, blocks: &Blocks<'_>) -> bool {
        if span.to > RUN_BLOCKS_MAX {
            return false;
        }
        let are_keys = self.naming() == Naming::Native;
        if !are_keys && blocks.keys.iter().any(|key| self.start(*key).is_some()) {
            return false;
        }
        if !self.give_names(span, blocks.names) {
            return false;
        }
        let Blocks { keys, hold, .. } = *blocks;
        let set = self.sets.change(EMPTY, hold.slot, hold.plane, true);
        let kept = if are_keys { &[] } else { keys };
        self.runs.append(&mut self.sets, span.run, span.len() as u16, kept, set);
        self.note_made(span.len());
        true
    }

    /// Gives blocks their names, if these mean nothing so far.
    fn give_names(&mut self, span: Span, names: &[EngineHash]) -> bool {
        if self.runs.get(span.run).tainted {
            return false;
        }
        for (at, name) in names.iter().enumerate() {
            if self.names.get_or_insert(name.0, span.place(at)).is_some() {
                for given in &names[..at] {
                    let found = self.names.find(given.0);
                    found.into_iter().for_each(|found| self.names.take(found));
                }
                self.names.settle();
                return false;
            }
        }
        true
    }
}
