//! How long may one batch of KV events keep everybody else waiting? As long as a slice of it: the
//! host lets others in between, and what they see lies between two batches of that engine.

use std::collections::VecDeque;

use super::Brain;
use crate::Time;
use crate::event::{EventBatch, KvEvent};
use crate::fleet::EndpointId;
use crate::journal::{Call, Entry};
use crate::stream::{StreamInput, StreamOrder};

/// Blocks of a slice. An event is applied as a whole, so one that has more is a slice of its own:
/// an engine puts the blocks of one step of one request into an event, some hundred at most.
pub const SLICE_BLOCKS_MAX: usize = 256;

/// Room of a slice, in blocks.
pub(super) struct Room(usize);

impl Room {
    /// No slice: everything at once.
    pub fn for_all() -> Room {
        Room(usize::MAX)
    }

    fn for_a_slice() -> Room {
        Room(SLICE_BLOCKS_MAX)
    }

    /// Whether this event belongs into the slice.
    pub fn takes(&mut self, event: &KvEvent) -> bool {
        let blocks = match event {
            KvEvent::Stored(stored) => stored.hashes.len(),
            KvEvent::Removed(removed) => removed.hashes.len(),
            KvEvent::Cleared => 1,
        };
        let taken = self.0 > 0;
        self.0 = self.0.saturating_sub(blocks.max(1));
        taken
    }
}

/// Events that the stream has let through and that are to be applied, in order.
#[derive(Default)]
pub(super) struct Waiting(VecDeque<KvEvent>);

impl Waiting {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What waits is void.
    pub fn forget(&mut self) {
        self.0 = VecDeque::new();
    }

    /// Calls `apply` with the events of a batch for which there is room, and keeps the others,
    /// behind those that wait already.
    pub fn apply(&mut self, batch: &EventBatch, room: &mut Room, mut apply: impl FnMut(&KvEvent)) {
        for event in &batch.events {
            match self.0.is_empty() && room.takes(event) {
                true => apply(event),
                false => self.0.push_back(event.clone()),
            }
        }
    }

    /// Calls `apply` with those that wait, as many as there is room for.
    fn take(&mut self, mut room: Room, mut apply: impl FnMut(&KvEvent)) {
        while self.0.front().is_some_and(|event| room.takes(event)) {
            let Some(event) = self.0.pop_front() else { return };
            apply(&event);
        }
        if self.0.is_empty() {
            self.forget();
        }
    }
}

impl Brain {
    /// As [`Brain::on_stream`], but of the events that are to be applied only a first slice is:
    /// call [`Brain::catch_up`] while [`Brain::is_behind`], and let others have the brain before.
    pub fn on_stream_slice(
        &mut self,
        now: Time,
        id: EndpointId,
        input: StreamInput,
    ) -> StreamOrder {
        let recorded = std::borrow::Cow::Borrowed(&input);
        self.note(|| Entry::Call(Call::OnStreamSlice { now, id, input: recorded }));
        self.hear(now, id, input, Room::for_a_slice())
    }

    /// Whether events of an endpoint wait for [`Brain::catch_up`].
    pub fn is_behind(&self, id: EndpointId) -> bool {
        self.stream(id).is_some_and(|entry| !entry.waiting.is_empty())
    }

    /// Applies the next slice of an endpoint's events, if any wait.
    pub fn catch_up(&mut self, id: EndpointId) {
        self.note(|| Entry::Call(Call::CatchUp { id }));
        self.apply_waiting(id, Room::for_a_slice());
    }

    /// Applies what waits, as far as there is room.
    pub(super) fn apply_waiting(&mut self, id: EndpointId, room: Room) {
        let entry = self.streams.get_mut(usize::from(id.slot)).and_then(Option::as_mut);
        let Some(entry) = entry.filter(|entry| entry.generation == id.generation) else { return };
        let (index, applied) = (&mut self.index, &mut entry.applied);
        index.prefetch(entry.waiting.0.iter().take(SLICE_BLOCKS_MAX));
        entry.waiting.take(room, |event| index.apply_to(id, event, applied));
        if self.fleet.on_block_size(id, self.index.block_size(id)) {
            self.collect_specs();
        }
    }
}
