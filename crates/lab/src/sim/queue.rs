//! What happens next? Events in order of time; of equal times, in the order in which they were
//! planned.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use kvroute_core::Time;
use kvroute_core::event::EventBatch;

/// Position of a flight.
pub(super) type FlightId = u32;

/// Something that will happen.
#[derive(Debug)]
pub(super) enum Event {
    /// A stage begins.
    Stage(usize),
    /// The next request of a stage is sent.
    Arrive(usize),
    /// A request that follows another is sent.
    Follow { stage: usize, call: Box<crate::traffic::Call> },
    /// A request reaches the router.
    Dispatch(FlightId),
    /// The step in progress ends, unless the engine has died since.
    StepEnd { engine: usize, epoch: u32 },
    /// A batch of KV events reaches the router, over a connection that still stands.
    Batch { engine: usize, epoch: u32, seq: u64, batch: Arc<EventBatch> },
    /// The answer to an order to replay.
    Replay { engine: usize, from: u64 },
    /// The router's subscription to an engine stands again.
    Connected { engine: usize, epoch: u32 },
    /// The client has its answer, or knows that there is none.
    Ended(FlightId),
    /// A fault begins.
    Fault(usize),
    /// A fault ends.
    Healed(usize),
}

#[derive(Debug)]
struct Planned {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Planned) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Planned) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Planned) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// All that is planned.
#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<Planned>>,
    planned: u64,
}

impl Queue {
    pub fn push(&mut self, at: Time, event: Event) {
        self.planned += 1;
        self.heap.push(Reverse(Planned { at, order: self.planned, event }));
    }

    pub fn pop(&mut self) -> Option<(Time, Event)> {
        self.heap.pop().map(|Reverse(planned)| (planned.at, planned.event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_by_the_order_of_planning() {
        let mut queue = Queue::default();
        for (at, stage) in [(5, 0), (3, 1), (5, 2), (3, 3)] {
            queue.push(Time(at), Event::Stage(stage));
        }
        let stages: Vec<usize> = std::iter::from_fn(|| queue.pop())
            .map(|(_, event)| match event {
                Event::Stage(stage) => stage,
                _ => usize::MAX,
            })
            .collect();
        assert_eq!(stages, [1, 3, 0, 2]);
    }
}
