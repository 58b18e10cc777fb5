//! What has been promised to each endpoint and not been answered yet?
//!
//! Load is charged when a decision is made, not when a scrape shows it, so that a burst sees
//! itself. Every charge hangs on a ticket; a ticket that nobody ends is ended by
//! [`Reservations::expire`], so nothing leaks.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Time;
use crate::fleet::EndpointId;

/// Requests and uncached prompt tokens in flight on one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Requests between decision and end of response.
    pub requests: u32,
    /// Tokens still to be computed for them: uncached prompt tokens until the first response
    /// chunk, expected output until the end.
    pub tokens: u64,
}

/// One request in flight. Ends once; what comes later with the same ticket is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "(u32, u32)", from = "(u32, u32)")]
pub struct Ticket {
    index: u32,
    generation: u32,
}

impl From<Ticket> for (u32, u32) {
    fn from(ticket: Ticket) -> (u32, u32) {
        (ticket.index, ticket.generation)
    }
}

impl From<(u32, u32)> for Ticket {
    fn from((index, generation): (u32, u32)) -> Ticket {
        Ticket { index, generation }
    }
}

/// What one request charges to its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    /// Who is charged.
    pub endpoint: EndpointId,
    /// Until the first response chunk.
    pub prompt_tokens: u32,
    /// Until the end.
    pub output_tokens: u32,
}

impl Charge {
    fn tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.output_tokens)
    }
}

/// All charges, and with each ticket what its owner wants to remember.
#[derive(Debug)]
pub struct Reservations<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
    loads: Vec<(u32, Load)>,
    requests_max: u32,
}

#[derive(Debug)]
struct Entry<T> {
    generation: u32,
    held: Option<Held<T>>,
}

#[derive(Debug)]
struct Held<T> {
    charge: Charge,
    alive: Time,
    memo: T,
}

impl<T> Reservations<T> {
    /// None yet.
    pub fn new(requests_max: u32) -> Reservations<T> {
        Reservations { entries: Vec::new(), free: Vec::new(), loads: Vec::new(), requests_max }
    }

    /// Charges of so many requests that nobody here can end: a snapshot tells them.
    pub(crate) fn restore(&mut self, requests: u32, loads: &[(EndpointId, Load)]) {
        let held = || Entry { generation: 0, held: None };
        self.entries.resize_with(requests.min(self.requests_max) as usize, held);
        for (id, load) in loads {
            self.add(*id, load.requests.min(u32::MAX / 2), load.tokens.min(u64::MAX / 4));
        }
    }

    /// Requests in flight.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether one more request would exceed the limit.
    pub fn is_full(&self) -> bool {
        self.len() >= self.requests_max as usize
    }

    /// What is charged to an endpoint; nothing for one that is gone.
    pub fn load(&self, id: EndpointId) -> Load {
        match self.loads.get(usize::from(id.slot)) {
            Some((generation, load)) if *generation == id.generation => *load,
            _ => Load::default(),
        }
    }

    /// Charges an endpoint. The caller has asked [`Reservations::is_full`].
    pub fn reserve(&mut self, now: Time, charge: Charge, memo: T) -> Ticket {
        self.add(charge.endpoint, 1, charge.tokens());
        let held = Some(Held { charge, alive: now, memo });
        match self.free.pop() {
            Some(index) => {
                let entry = &mut self.entries[index as usize];
                entry.held = held;
                Ticket { index, generation: entry.generation }
            }
            None => {
                self.entries.push(Entry { generation: 0, held });
                Ticket { index: self.entries.len() as u32 - 1, generation: 0 }
            }
        }
    }

    /// Charges an endpoint without a ticket, for work that belongs to another one's.
    pub fn charge(&mut self, charge: &Charge) {
        self.add(charge.endpoint, 1, charge.tokens());
    }

    /// Takes such a charge back.
    pub fn discharge(&mut self, charge: &Charge) {
        self.remove(charge.endpoint, 1, charge.tokens());
    }

    /// What was remembered with a ticket, and whom it charges. A sign of life.
    pub fn touch(&mut self, now: Time, ticket: Ticket) -> Option<(EndpointId, &mut T)> {
        let held = self.held(ticket)?;
        held.alive = now;
        Some((held.charge.endpoint, &mut held.memo))
    }

    /// The first response chunk: the prompt is computed.
    pub fn release_prompt(&mut self, ticket: Ticket) {
        let Some(held) = self.held(ticket) else { return };
        let tokens = u64::from(std::mem::take(&mut held.charge.prompt_tokens));
        let endpoint = held.charge.endpoint;
        self.remove(endpoint, 0, tokens);
    }

    /// Moves the charge to another endpoint, with what the prompt costs there.
    pub fn redirect(&mut self, ticket: Ticket, to: EndpointId, prompt_tokens: u32) {
        let Some(held) = self.held(ticket) else { return };
        let from = held.charge;
        held.charge = Charge { endpoint: to, prompt_tokens, ..from };
        let charge = held.charge;
        self.remove(from.endpoint, 1, from.tokens());
        self.add(to, 1, charge.tokens());
    }

    /// The end: everything is given back. `None` when the ticket has ended before.
    pub fn end(&mut self, ticket: Ticket) -> Option<(EndpointId, T)> {
        self.held(ticket)?;
        let entry = self.entries.get_mut(ticket.index as usize)?;
        let held = entry.held.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(ticket.index);
        self.remove(held.charge.endpoint, 1, held.charge.tokens());
        Some((held.charge.endpoint, held.memo))
    }

    /// Ends every ticket without a sign of life for `age_max`; returns what they remembered.
    pub fn expire(&mut self, now: Time, age_max: Duration) -> Vec<(EndpointId, T)> {
        let is_old = |entry: &Entry<T>| {
            entry.held.as_ref().is_some_and(|held| now.since(held.alive) >= age_max)
        };
        let old: Vec<Ticket> = (0u32..)
            .zip(&self.entries)
            .filter(|(_, entry)| is_old(entry))
            .map(|(index, entry)| Ticket { index, generation: entry.generation })
            .collect();
        old.into_iter().filter_map(|ticket| self.end(ticket)).collect()
    }

    /// The endpoint has left: its sums go, its tickets stay until their requests end.
    pub fn forget(&mut self, id: EndpointId) {
        if let Some((generation, load)) = self.loads.get_mut(usize::from(id.slot))
            && *generation == id.generation
        {
            *load = Load::default();
        }
    }

    fn held(&mut self, ticket: Ticket) -> Option<&mut Held<T>> {
        let entry = self.entries.get_mut(ticket.index as usize)?;
        entry.held.as_mut().filter(|_| entry.generation == ticket.generation)
    }

    fn add(&mut self, id: EndpointId, requests: u32, tokens: u64) {
        let slot = usize::from(id.slot);
        if self.loads.len() <= slot {
            self.loads.resize(slot + 1, (0, Load::default()));
        }
        let (generation, load) = &mut self.loads[slot];
        if *generation != id.generation {
            (*generation, *load) = (id.generation, Load::default());
        }
        load.requests += requests;
        load.tokens += tokens;
    }

    fn remove(&mut self, id: EndpointId, requests: u32, tokens: u64) {
        if let Some((generation, load)) = self.loads.get_mut(usize::from(id.slot))
            && *generation == id.generation
        {
            load.requests = load.requests.saturating_sub(requests);
            load.tokens = load.tokens.saturating_sub(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    fn id(slot: u16) -> EndpointId {
        EndpointId { slot, generation: 0 }
    }

    fn charge(slot: u16, prompt_tokens: u32, output_tokens: u32) -> Charge {
        Charge { endpoint: id(slot), prompt_tokens, output_tokens }
    }

    #[test]
    fn prompt_goes_at_the_first_chunk_and_the_rest_at_the_end() {
        let mut all = Reservations::new(10);
        let ticket = all.reserve(Time(0), charge(0, 100, 20), "a");
        assert_eq!(all.load(id(0)), Load { requests: 1, tokens: 120 });
        all.release_prompt(ticket);
        all.release_prompt(ticket);
        assert_eq!(all.load(id(0)), Load { requests: 1, tokens: 20 });
        assert_eq!(all.end(ticket), Some((id(0), "a")));
        assert_eq!(all.end(ticket), None);
        assert_eq!(all.load(id(0)), Load::default());
    }

    #[test]
    fn a_ticket_that_never_ends_expires_and_a_used_slot_is_safe() {
        let mut all = Reservations::new(10);
        let lost = all.reserve(Time::from_secs_f64(0.0), charge(0, 100, 0), 1);
        let live = all.reserve(Time::from_secs_f64(0.0), charge(0, 50, 0), 2);
        assert!(all.touch(Time::from_secs_f64(8.0), live).is_some());
        let gone = all.expire(Time::from_secs_f64(10.0), Duration::from_secs(10));
        assert_eq!(gone, [(id(0), 1)]);
        assert_eq!(all.load(id(0)), Load { requests: 1, tokens: 50 });
        let next = all.reserve(Time(0), charge(1, 7, 0), 3);
        assert_eq!(all.end(lost), None);
        assert_eq!(all.load(id(1)).tokens, 7);
        assert_eq!(all.end(next), Some((id(1), 3)));
    }

    #[test]
    fn a_redirect_moves_the_charge() {
        let mut all = Reservations::new(10);
        let ticket = all.reserve(Time(0), charge(0, 100, 5), ());
        all.redirect(ticket, id(1), 300);
        assert_eq!(all.load(id(0)), Load::default());
        assert_eq!(all.load(id(1)), Load { requests: 1, tokens: 305 });
        assert_eq!(all.end(ticket), Some((id(1), ())));
        assert_eq!(all.load(id(1)), Load::default());
    }

    #[test]
    fn any_sequence_of_calls_gives_everything_back() {
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let mut all = Reservations::new(1000);
            let mut tickets = Vec::new();
            for step in 0..300 {
                match rng.below(5) {
                    0 | 1 => {
                        let slot = rng.below(3) as u16;
                        let tokens = rng.below(500) as u32;
                        tickets.push(all.reserve(Time(step), charge(slot, tokens, 3), ()));
                    }
                    2 if !tickets.is_empty() => {
                        all.release_prompt(tickets[rng.below(tickets.len())]);
                    }
                    3 if !tickets.is_empty() => {
                        let ticket = tickets[rng.below(tickets.len())];
                        all.redirect(ticket, id(rng.below(3) as u16), 9);
                    }
                    _ if !tickets.is_empty() => {
                        all.end(tickets[rng.below(tickets.len())]);
                    }
                    _ => {}
                }
            }
            for ticket in tickets {
                all.end(ticket);
            }
            let loads: Vec<Load> = (0..3).map(|slot| all.load(id(slot))).collect();
            assert_eq!(loads, [Load::default(); 3], "seed {seed}");
            assert!(all.is_empty(), "seed {seed}");
        }
    }
}
