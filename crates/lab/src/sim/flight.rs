//! Which requests are on their way?

use kvroute_core::load::Ticket;
use kvroute_core::produce::HeldId;
use kvroute_core::{EndpointId, Time};

use super::queue::FlightId;
use crate::record::Ending;
use crate::traffic::Call;

/// One request on its way.
pub(super) struct Flight {
    /// Its stage.
    pub stage: usize,
    /// Its place in the record.
    pub record: usize,
    /// What it asks.
    pub call: Call,
    /// When it was sent.
    pub sent: Time,
    /// What the decision reserved.
    pub ticket: Option<Ticket>,
    /// Who may serve it if the chosen one fails.
    pub fallback: Vec<EndpointId>,
    /// Where it is.
    pub engine: Option<usize>,
    /// It waits, or has waited, for others.
    pub held: Option<HeldId>,
    /// Tried so far.
    pub attempts: u32,
    /// The first token has left the engine.
    pub answered: bool,
    /// How it ended, once it has.
    pub ending: Option<Ending>,
}

/// All requests on their way, by position; a position is used again after the end.
#[derive(Default)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<FlightId>,
}

impl Flights {
    pub fn insert(&mut self, flight: Flight) -> FlightId {
        match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = Some(flight);
                id
            }
            None => {
                self.slots.push(Some(flight));
                self.slots.len() as FlightId - 1
            }
        }
    }

    pub fn get_mut(&mut self, id: FlightId) -> Option<&mut Flight> {
        self.slots.get_mut(id as usize)?.as_mut()
    }

    pub fn remove(&mut self, id: FlightId) -> Option<Flight> {
        let flight = self.slots.get_mut(id as usize)?.take()?;
        self.free.push(id);
        Some(flight)
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The flights at an engine that have not ended.
    pub fn at(&self, engine: usize) -> Vec<FlightId> {
        let here = |flight: &Flight| flight.engine == Some(engine) && flight.ending.is_none();
        let slots = (0..).zip(&self.slots);
        slots.filter(|(_, slot)| slot.as_ref().is_some_and(here)).map(|(id, _)| id).collect()
    }
}
