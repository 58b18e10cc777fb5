//! What goes wrong, and how it looks from the router: as it would live.

use std::sync::Arc;
use std::time::Duration;

use kvroute_core::event::EventBatch;
use kvroute_core::stream::StreamInput;

use super::SimError;
use super::engine::Faults;
use super::queue::Event;
use super::world::{World, seconds};
use crate::record::Ending;
use crate::scenario::{FaultKind, FaultSpec};

/// From the return of an engine to the router's subscription to its events.
const RECONNECT: Duration = Duration::from_millis(500);

impl World<'_> {
    pub(super) fn plan_faults(&mut self) {
        for (at, fault) in self.scenario.faults.iter().enumerate() {
            let begin = self.now + seconds(fault.at_s);
            self.queue.push(begin, Event::Fault(at));
            self.queue.push(begin + seconds(fault.for_s), Event::Healed(at));
        }
    }

    fn hit(&self, fault: &FaultSpec) -> Vec<usize> {
        match fault.engine {
            Some(engine) => vec![usize::from(engine)],
            None => (0..self.engines.len()).collect(),
        }
    }

    pub(super) fn begin_fault(&mut self, at: usize) {
        self.faults.push(at);
        self.set_faults();
        let fault = self.scenario.faults[at];
        if fault.kind == FaultKind::Crash {
            self.hit(&fault).into_iter().for_each(|engine| self.crash(engine));
        }
    }

    pub(super) fn end_fault(&mut self, at: usize) -> Result<(), SimError> {
        self.faults.retain(|other| *other != at);
        self.set_faults();
        let fault = self.scenario.faults[at];
        if fault.kind == FaultKind::Crash {
            for engine in self.hit(&fault) {
                if self.engines[engine].restart(self.now)? {
                    let epoch = self.engines[engine].epoch;
                    self.queue.push(self.now + RECONNECT, Event::Connected { engine, epoch });
                }
            }
        }
        Ok(())
    }

    /// Of several faults of one kind at one engine the one that began last counts.
    fn set_faults(&mut self) {
        self.engines.iter_mut().for_each(|engine| engine.faults = Faults::default());
        for at in 0..self.faults.len() {
            let fault = self.scenario.faults[self.faults[at]];
            for engine in self.hit(&fault) {
                let faults = &mut self.engines[engine].faults;
                match fault.kind {
                    FaultKind::Crash => {}
                    FaultKind::EventLoss => faults.loss = fault.share.unwrap_or(1.0),
                    FaultKind::EventDuplication => faults.duplication = fault.share.unwrap_or(1.0),
                    FaultKind::EventDelay => faults.delay_s = fault.delay_s.unwrap_or(0.0),
                    FaultKind::MetricsPartition => faults.partition = true,
                    FaultKind::SlowEngine => faults.pace = fault.factor.unwrap_or(1.0),
                }
            }
        }
    }

    /// Answers that had begun are broken; requests without a byte of answer go elsewhere.
    fn crash(&mut self, engine: usize) {
        self.engines[engine].crash();
        self.tell(engine, StreamInput::Lost);
        for id in self.flights.at(engine) {
            self.brain.on_endpoint_failed(self.now, self.ids[engine]);
            let Some(flight) = self.flights.get_mut(id) else { continue };
            let next = if flight.answered { None } else { self.next_choice(id) };
            match next {
                Some(next) => self.place(id, next),
                None => self.finish(id, Ending::Failed),
            }
        }
    }

    /// Puts a batch on its way to the router. Batches of one connection never overtake each other.
    pub(super) fn publish(&mut self, engine: usize, batch: EventBatch) {
        let epoch = self.engines[engine].epoch;
        let faults = self.engines[engine].faults;
        let (seq, batch) = self.engines[engine].publish(batch);
        if !self.engines[engine].subscribed {
            return;
        }
        if faults.loss > 0.0 && self.rng.next_f64() < faults.loss {
            return;
        }
        let delay = self.event_delay + seconds(faults.delay_s);
        let due = self.engines[engine].delivery(self.now + delay);
        if faults.duplication > 0.0 && self.rng.next_f64() < faults.duplication {
            let batch = Arc::clone(&batch);
            self.queue.push(due, Event::Batch { engine, epoch, seq, batch });
        }
        self.queue.push(due, Event::Batch { engine, epoch, seq, batch });
    }
}
