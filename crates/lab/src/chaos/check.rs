//! What must hold after every step.

use kvroute_core::EndpointId;
use kvroute_core::event::EngineHash;
use kvroute_core::index::{EndpointUsage, SkipReason};
use kvroute_core::load::Load;
use kvroute_core::stream::{StreamState, SuspectReason};

use super::engine::Held;
use super::flight::{Charge, Place};
use super::world::World;
use super::{Checked, ensure};

/// Every endpoint is compared with its engine this often; one that something happened to, always.
const COMPARE_ALL_STEPS: u32 = 16;

impl World {
    pub fn check(&mut self) -> Checked {
        self.check_reservations()?;
        self.check_limits()?;
        self.check_counters()?;
        self.check_books()?;
        if let Some(&id) = self.gone.last() {
            self.check_gone(id)?;
        }
        if self.step.is_multiple_of(COMPARE_ALL_STEPS) {
            self.touched = (0..self.hosts.len()).collect();
        }
        self.touched.sort_unstable();
        self.touched.dedup();
        for host in std::mem::take(&mut self.touched) {
            self.check_claims(host)?;
        }
        Ok(())
    }

    /// What is reserved is what is in flight.
    fn check_reservations(&self) -> Checked {
        let open = || self.flights.values().filter_map(|flight| flight.charge);
        let (held, count) = (self.brain.inflight_requests(), open().count());
        ensure(held == count, "reservations are the requests in flight", || {
            format!("{held} reserved, {count} open")
        })?;
        for member in self.hosts.iter().filter_map(|host| host.member.as_ref()) {
            let mut load = Load::default();
            for Charge { prompt_tokens, output_tokens, .. } in
                open().filter(|charge| charge.endpoint == member.id)
            {
                load.requests += 1;
                load.tokens += u64::from(prompt_tokens) + u64::from(output_tokens);
            }
            let held = self.brain.load(member.id);
            ensure(held == load, "an endpoint's load is the sum of its requests", || {
                format!("{:?}: {held:?}, its open requests are {load:?}", member.id)
            })?;
        }
        Ok(())
    }

    /// Memory and counts stay within what the plan allows.
    fn check_limits(&self) -> Checked {
        let (usage, limits) = (self.brain.index().usage(), self.limits);
        ensure(usage.bytes <= usage.bytes_max, "the index stays within its budget", || {
            format!("{usage:?}")
        })?;
        let most = limits.speculations_max as usize;
        ensure(usage.speculations <= most, "speculations stay within their limit", || {
            format!("{usage:?}")
        })?;
        let (pending_max, history_max) = (
            limits.pending_blocks_per_endpoint_max,
            limits.history_blocks_per_endpoint_max as usize,
        );
        for member in self.hosts.iter().filter_map(|host| host.member.as_ref()) {
            let usage = self.brain.index().endpoint_usage(member.id);
            let within = usage.pending <= pending_max && usage.history <= history_max;
            ensure(within, "pending and history stay within their limits", || {
                format!("{:?}: {usage:?}", member.id)
            })?;
        }
        let open_max = self.settings.inflight_requests_max as usize;
        ensure(self.brain.inflight_requests() <= open_max, "in flight within the limit", || {
            format!("{} of {open_max}", self.brain.inflight_requests())
        })
    }

    fn check_counters(&self) -> Checked {
        let (counters, calls) = (self.brain.counters(), &self.calls);
        let decisions: u64 = counters.decisions.iter().sum();
        let rejected = counters.rejected_no_endpoints
            + counters.rejected_saturated
            + counters.rejected_in_flight
            + counters.rejected_shed
            + counters.rejected_not_admitted
            + counters.rejected_no_profile
            + counters.rejected_not_cached;
        for (name, counted, called) in [
            ("decisions and rejections", decisions + rejected, calls.decided),
            ("rejections", rejected, calls.rejected),
            ("redirects", counters.redirected, calls.redirected),
            ("failures", counters.endpoints_failed, calls.endpoints_failed),
            ("failed scrapes", counters.scrapes_failed, calls.scrapes_failed),
            ("cache resets", counters.caches_reset, calls.caches_reset),
            ("expired tickets", counters.tickets_expired, calls.expired),
        ] {
            ensure(counted == called, "counters count every call once", || {
                format!("{name}: {counted} counted, {called} called")
            })?;
        }
        let refused = counters.resets_refused <= counters.caches_reset;
        ensure(refused, "no reset is refused twice", || format!("{counters:?}"))
    }

    /// No request is lost: each is somewhere from where it will come to its end.
    fn check_books(&self) -> Checked {
        let ended: u64 = self.outcomes.values().sum();
        let open = self.flights.len() as u64;
        ensure(ended + open == self.flights_begun, "requests are open or have ended", || {
            format!("{} begun, {open} open, {ended} ended", self.flights_begun)
        })?;
        for (no, flight) in &self.flights {
            let somewhere = match flight.place {
                Place::Engine { host, run, id } => {
                    let process = self.hosts[host].process.as_ref();
                    process.is_some_and(|p| p.run == run && p.flights.get(&id) == Some(no))
                }
                Place::Tokenizing | Place::Connecting | Place::Ending => true,
            };
            let lost = !somewhere || flight.deadline < self.planned;
            ensure(!lost, "no request is lost", || format!("r{no} in {:?}", flight.place))?;
        }
        Ok(())
    }

    /// An endpoint that has left leaves nothing.
    pub fn check_gone(&self, id: EndpointId) -> Checked {
        let usage = self.brain.index().endpoint_usage(id);
        let nothing = usage == EndpointUsage::default()
            && self.brain.load(id) == Load::default()
            && self.brain.stream_state(id).is_none()
            && self.brain.fleet().get(id).is_none()
            && self.brain.index().resident_copies(id).is_empty()
            && self.brain.ledger().account(id) == Default::default();
        ensure(nothing, "an endpoint that has left leaves nothing", || format!("{id:?}: {usage:?}"))
    }

    /// An endpoint whose stream is live claims what its engine held after the last batch that
    /// arrived: nothing else, and nothing less unless a limit or a documented reason explains it.
    /// One that is known to have missed something claims nothing else either.
    fn check_claims(&mut self, host: usize) -> Checked {
        use SuspectReason::{Gap, HeldOverflow, LateStart, ReplayIncomplete};
        let Some(member) = &self.hosts[host].member else { return Ok(()) };
        let id = member.id;
        let incomplete = match self.brain.stream_state(id) {
            Some(StreamState::Live) => false,
            Some(StreamState::Suspect(Gap | HeldOverflow | LateStart | ReplayIncomplete)) => true,
            _ => return Ok(()),
        };
        if member.heard.mixed {
            return Ok(());
        }
        let claimed = self.claimed(id);
        let may_lack =
            self.may_lack(id) || incomplete || member.heard.believed || member.heard.reset_claimed;
        let last = self.brain.stream_last_seq(id);
        let runs = last.into_iter().flat_map(|last| member.heard.runs(last));
        let held: Vec<_> = runs.filter_map(|run| self.states.get(&(run, last?))).collect();
        let nothing = Held::new();
        let fits = |held: &Held| {
            if may_lack { is_part(&claimed, held) } else { claimed == *held }
        };
        let found = match last {
            None => fits(&nothing),
            Some(_) => held.iter().any(|held| fits(held)),
        };
        let pending = self.brain.index().endpoint_usage(id).pending;
        ensure(found, "a live endpoint claims what its engine told", || {
            let held = held.last().map_or(&nothing, |held| &***held);
            let differences = differences(&claimed, held);
            format!("{host} after batch {last:?} (lacking allowed: {may_lack}): {differences}")
        })?;
        ensure(may_lack || pending == 0, "a live endpoint waits for no parent", || {
            format!("{host}: {pending} blocks wait")
        })?;
        self.compared_exactly += u64::from(!may_lack);
        Ok(())
    }

    /// What the index says an endpoint's engine holds.
    pub fn claimed(&self, id: EndpointId) -> Held {
        let copies = self.brain.index().resident_copies(id).into_iter();
        copies.map(|((hash, _), copies)| (hash, copies)).collect()
    }

    /// The index had to leave blocks out to stay within its budget.
    pub fn may_lack(&self, id: EndpointId) -> bool {
        let skipped = self.brain.stream_applied(id);
        let skipped = skipped.map_or(0, |applied| applied.skipped_for(SkipReason::OverBudget));
        let evicted = self.brain.index().usage().evicted;
        skipped + evicted.resident + evicted.pending > 0
    }
}

/// Whether each copy of `part` is among those of `whole`.
pub(super) fn is_part(part: &Held, whole: &Held) -> bool {
    part.iter().all(|(hash, copies)| whole.get(hash).is_some_and(|held| held >= copies))
}

/// Which blocks two sides disagree on.
pub(super) fn differences(claimed: &Held, held: &Held) -> String {
    let of = |held: &Held, hash: &EngineHash| held.get(hash).copied().unwrap_or(0);
    let mut hashes: Vec<&EngineHash> = claimed.keys().chain(held.keys()).collect();
    hashes.sort_unstable();
    hashes.dedup();
    let differ = hashes.into_iter().filter(|hash| of(claimed, hash) != of(held, hash));
    let lines: Vec<String> = differ
        .map(|hash| format!("{:x}: claimed {}, held {}", hash.0, of(claimed, hash), of(held, hash)))
        .collect();
    format!("{} blocks differ of {}: {}", lines.len(), held.len(), lines.join("; "))
}
