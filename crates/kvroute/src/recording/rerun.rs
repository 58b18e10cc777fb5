//! A brain that hears what another one heard, although it may decide otherwise.
//!
//! Tickets and endpoints are called as the recording calls them; this brain's own names are looked
//! up. What became of a request is told to this brain too, with two exceptions for a request that
//! it sent elsewhere: the recorded engine's token counts say nothing about another engine's cache,
//! and a redirect away from an endpoint that it did not choose does not concern it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anyhow::{bail, ensure};
use kvroute_core::brain::Brain;
use kvroute_core::decision::{Decision, Reject, ResponseEvent};
use kvroute_core::journal::{Answer, Call, Entry};
use kvroute_core::load::Ticket;
use kvroute_core::plan::Plan;
use kvroute_core::{EndpointId, Time};

use super::reader::Then;

/// An endpoint that is in no fleet: calls about it mean nothing.
const NOBODY: EndpointId = EndpointId { slot: u16::MAX, generation: u32::MAX };

/// A decision on both sides.
pub(super) struct Verdict {
    /// `None`: refused.
    pub then: Option<Then>,
    pub now: Result<Decision, Reject>,
    /// They are not the same endpoint.
    pub elsewhere: bool,
}

impl Verdict {
    /// This side as a recording has it.
    pub fn to_line(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&Entry::Decided(Cow::Borrowed(&self.now)))
    }
}

/// One request on its way.
struct Flight {
    ticket: Ticket,
    /// Where it is in the recording, by this brain's name.
    then: EndpointId,
    now: EndpointId,
}

/// See the module's documentation.
pub(super) struct Rerun {
    brain: Brain,
    now: Time,
    ids: BTreeMap<EndpointId, EndpointId>,
    flights: BTreeMap<Ticket, Flight>,
    /// What the last call brought about, until the recording says what it was then.
    answer: Answer,
}

impl Rerun {
    pub fn new(plan: Plan, seed: u64) -> Rerun {
        Rerun {
            brain: Brain::new(plan, seed),
            now: Time::ZERO,
            ids: BTreeMap::new(),
            flights: BTreeMap::new(),
            answer: Answer::None,
        }
    }

    /// The latest time of a decision or tick.
    pub fn now(&self) -> Time {
        self.now
    }

    /// Takes the next call.
    pub fn call(&mut self, mut call: Call<'static>) -> anyhow::Result<()> {
        ensure!(self.answer == Answer::None, "the answer to the call before is missing");
        call.rename_endpoints(|id| *id = self.ids.get(id).copied().unwrap_or(NOBODY));
        match call {
            Call::OnResponse { now, ticket, event } => self.respond(now, ticket, event),
            Call::Redirect { now, ticket, to } => self.redirect(now, ticket, to),
            call => {
                if let Call::Decide { now, .. } | Call::Tick { now } = &call {
                    self.now = self.now.max(*now);
                }
                self.answer = self.brain.apply(call);
            }
        }
        Ok(())
    }

    fn respond(&mut self, now: Time, ticket: Ticket, event: ResponseEvent) {
        let Some(flight) = self.flights.get(&ticket) else { return };
        let of_another = matches!(event, ResponseEvent::Usage { .. }) && flight.then != flight.now;
        if !of_another {
            self.brain.on_response(now, flight.ticket, event);
        }
        if matches!(event, ResponseEvent::End { .. } | ResponseEvent::Aborted) {
            self.flights.remove(&ticket);
        }
    }

    fn redirect(&mut self, now: Time, ticket: Ticket, to: EndpointId) {
        let Some(flight) = self.flights.get_mut(&ticket) else { return };
        if flight.now == flight.then {
            self.brain.redirect(now, flight.ticket, to);
            flight.now = to;
        }
        flight.then = to;
    }

    /// The recording says what an endpoint was called.
    pub fn added(&mut self, then: Option<EndpointId>) -> anyhow::Result<()> {
        let Answer::Added(now) = std::mem::replace(&mut self.answer, Answer::None) else {
            bail!("nothing was added");
        };
        if let Some(then) = then {
            self.ids.insert(then, now.unwrap_or(NOBODY));
        }
        Ok(())
    }

    /// The recording says what was decided.
    pub fn decided(&mut self, then: Option<Then>) -> anyhow::Result<Verdict> {
        let Answer::Decided(now) = std::mem::replace(&mut self.answer, Answer::None) else {
            bail!("nothing was to be decided");
        };
        let now = *now;
        let mut elsewhere = then.is_some() != now.is_ok();
        match (&then, &now) {
            (Some(then), Ok(now)) => {
                let flight = Flight {
                    ticket: now.ticket,
                    then: self.ids.get(&then.endpoint).copied().unwrap_or(NOBODY),
                    now: now.endpoint,
                };
                elsewhere = flight.then != flight.now;
                self.flights.insert(then.ticket, flight);
            }
            // Nobody will ever answer it.
            (None, Ok(now)) => self.brain.on_response(self.now, now.ticket, ResponseEvent::Aborted),
            _ => {}
        }
        Ok(Verdict { then, now, elsewhere })
    }
}
