//! Engines that start, work, die and come back, and what discovery and scraping say about them.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use kvroute_core::fleet::{EndpointSpec, EngineMetrics, ServedModel};
use kvroute_core::settings::ms;
use kvroute_core::{EndpointId, Time};

use super::delivery::Heard;
use super::engine::{Held, Process};
use super::prompts::{ADAPTERS, MODEL, Prompt};
use super::stream::{Link, ReplayMood};
use super::world::{Event, World};
use super::{Checked, Sabotage, ensure};
use crate::model::{NewRequest, Output};

/// Step durations of the built-in profile are multiplied by this: some 60 ms.
const PACE: f64 = 30.0;
/// The same of a slow engine.
const PACE_SLOW: f64 = 400.0;
/// From so many failed scrapes in a row on, an endpoint counts as unreachable.
const MUTE_SCRAPES_MAX: u32 = 3;
/// Most doublings of an endpoint's back-off for one failed scrape, as in the live router.
const BACKOFF_DOUBLINGS_MAX: u32 = 16;

/// Whether an endpoint's batches can be asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplaySocket {
    /// Configured without one.
    None,
    /// Works.
    Present,
    /// Assumed until asked, but not there.
    Claimed,
}

/// A place where an engine runs.
pub(super) struct Host {
    pub name: String,
    pub process: Option<Process>,
    pub block_size: u32,
    pub kept_max: usize,
    pub member: Option<Member>,
    pub replay: ReplaySocket,
    pub replay_mood: (ReplayMood, Time),
    /// Nothing gets through to its HTTP port.
    pub unreachable_until: Time,
    pub metrics_dark_until: Time,
    pub metrics_frozen_until: Time,
    page: Option<EngineMetrics>,
    pub slow_until: Time,
    /// Its tokenizer is not the router's.
    pub counts_other_tokens: bool,
}

/// The endpoint of a host, while it is in the fleet.
pub(super) struct Member {
    pub id: EndpointId,
    pub link: Link,
    pub heard: Heard,
    scrapes_failed: u32,
    models_due: Time,
}

impl Member {
    /// Until when its link passes nothing.
    pub fn dark_until(&self) -> Time {
        self.link.dark_until
    }
}

impl Host {
    pub fn member_mut(&mut self, id: EndpointId) -> Option<&mut Member> {
        self.member.as_mut().filter(|member| member.id == id)
    }
}

impl World {
    /// A new place with a running engine.
    pub fn found(&mut self, at: usize) {
        let replay = [ReplaySocket::None, ReplaySocket::Present, ReplaySocket::Present];
        let replay = match self.one_in(8) {
            true => ReplaySocket::Claimed,
            false => replay[self.rng.below(3)],
        };
        let host = Host {
            name: format!("engine-{at}"),
            process: None,
            block_size: [4, 8, 16][self.rng.below(3)],
            kept_max: [3, 12, 10_000, 10_000][self.rng.below(4)],
            member: None,
            replay,
            replay_mood: (ReplayMood::Fine, Time::ZERO),
            unreachable_until: Time::ZERO,
            metrics_dark_until: Time::ZERO,
            metrics_frozen_until: Time::ZERO,
            page: None,
            slow_until: Time::ZERO,
            counts_other_tokens: self.one_in(20),
        };
        self.hosts.push(host);
        self.boot(at);
    }

    fn boot(&mut self, host: usize) {
        self.runs += 1;
        let Host { block_size, kept_max, .. } = self.hosts[host];
        let process = Process::new(self.runs, &mut self.rng, block_size, kept_max);
        self.note(format!("engine {host} starts (run {}, blocks of {block_size})", self.runs));
        self.hosts[host].process = Some(process);
    }

    // --- discovery

    /// Discovery lists the endpoint.
    pub fn join(&mut self, host: usize) {
        let place = &self.hosts[host];
        let spec = EndpointSpec {
            name: place.name.clone(),
            address: format!("{}:8000", place.name),
            labels: BTreeMap::new(),
            rank: 0,
            replay_available: self.reads_events && place.replay != ReplaySocket::None,
            events_expected: self.reads_events,
        };
        let added = self.brain.add_endpoint(self.now, spec);
        let id = added.expect("the harness lists each address once and few of them");
        self.note(format!("endpoint {host} joins as {id:?}"));
        self.hosts[host].member = Some(Member {
            id,
            link: Link::new(),
            heard: Heard::default(),
            scrapes_failed: 0,
            models_due: self.now,
        });
        let (connect, scrape) = (self.ms(0, 80), self.ms(0, 300));
        if self.reads_events {
            self.after_ms(connect, Event::Connect { host, id });
        }
        self.after_ms(scrape, Event::Scrape { host, id });
    }

    /// Discovery no longer lists it. Its requests in flight go on.
    pub fn leave(&mut self, host: usize) -> Checked {
        let Some(member) = self.hosts[host].member.take() else { return Ok(()) };
        let id = member.id;
        self.note(format!("endpoint {host} leaves"));
        if !self.sabotaged(Sabotage::EndpointKept, 1) {
            self.brain.remove_endpoint(self.now, id);
        }
        self.gone.push(id);
        self.check_gone(id)
    }

    pub fn rejoin(&mut self, host: usize) {
        if self.hosts[host].member.is_none() {
            self.join(host);
        }
    }

    pub fn host_of(&self, id: EndpointId) -> Option<usize> {
        self.hosts.iter().position(|host| host.member.as_ref().is_some_and(|m| m.id == id))
    }

    // --- the engine's steps

    /// Lets the engine go on if it has something to do.
    pub fn kick(&mut self, host: usize) {
        let pace = if self.now < self.hosts[host].slow_until { PACE_SLOW } else { PACE };
        let now = self.now;
        let Some(process) = self.hosts[host].process.as_mut() else { return };
        if process.step.is_some() {
            return;
        }
        process.model.set_pace(pace);
        let Some(step) = process.model.next_step(now) else { return };
        let (wait, run) = (step.duration.max(Duration::from_micros(1)), process.run);
        process.step = Some(step);
        self.after(wait, Event::StepEnd { host, run });
    }

    pub fn step_end(&mut self, host: usize, run: u64) -> Checked {
        let now = self.now;
        let process = self.hosts[host].process.as_mut().filter(|process| process.run == run);
        let Some(process) = process else { return Ok(()) };
        let Some(mut step) = process.step.take() else { return Ok(()) };
        let events = std::mem::take(&mut step.events);
        let preemptions = step.stats.preemptions;
        if preemptions > 0 {
            self.saw("steps of engines that preempted");
        }
        if !events.is_empty() {
            self.publish_events(host, now, events)?;
        }
        for emitted in step.emitted {
            self.token(host, run, emitted)?;
        }
        self.kick(host);
        Ok(())
    }

    fn publish_events(
        &mut self,
        host: usize,
        now: Time,
        mut events: Vec<kvroute_core::event::KvEvent>,
    ) -> Checked {
        if self.sabotaged(Sabotage::SilentEviction, 3) {
            events.retain(|event| !matches!(event, kvroute_core::event::KvEvent::Removed(_)));
        }
        let Some(process) = self.hosts[host].process.as_mut() else { return Ok(()) };
        let message = process.publish(now, events);
        let told: Rc<Held> = Rc::new(process.told.clone());
        let holds = process.model.cached_names();
        let equal = process.clear_due || holds == *told;
        self.states.insert((message.run, message.seq), Rc::clone(&told));
        ensure(equal, "an engine's events tell what its cache holds", || {
            format!("engine {host}, batch {}: told {told:?}, holds {holds:?}", message.seq)
        })?;
        self.publish(host, message);
        Ok(())
    }

    /// Somebody else asks this engine, past the router.
    pub fn ask_beside(&mut self, host: usize, prompt: Prompt) {
        let now = self.now;
        let Some(process) = self.hosts[host].process.as_mut() else { return };
        let request = NewRequest {
            id: process.next_request(),
            tokens: prompt.tokens,
            max_tokens: 2,
            stop_after: None,
            cache_salt: prompt.salt.map(str::to_owned),
            adapter: prompt.adapter.map(str::to_owned),
            output: Output::Greedy,
            report_reused: false,
        };
        process.model.submit(now, request).expect("prompts of the pool fit every engine");
        self.kick(host);
    }

    // --- dying

    /// The process is gone; `quietly`: something in between keeps the connection of its events.
    pub fn crash(&mut self, host: usize, quietly: bool) -> Checked {
        let Some(process) = self.hosts[host].process.take() else { return Ok(()) };
        self.note(format!("engine {host} dies (run {})", process.run));
        for (_, flight) in process.flights {
            self.broken(flight)?;
        }
        let notice = match self.rng.below(5) {
            0 => self.ms(3_000, 20_000),
            _ => self.ms(0, 50),
        };
        if let Some(member) = &mut self.hosts[host].member
            && member.link.up
            && !quietly
        {
            member.link.subscribed = None;
            let (id, connection) = (member.id, member.link.connection());
            self.after_ms(notice, Event::LinkLost { host, id, connection });
        }
        Ok(())
    }

    pub fn restart(&mut self, host: usize) -> Checked {
        if self.hosts[host].process.is_none() {
            if self.one_in(4) && !self.calm {
                self.hosts[host].block_size = [4, 8, 16][self.rng.below(3)];
            }
            self.boot(host);
        }
        Ok(())
    }

    /// A new process behind the same connection: only its numbers tell.
    pub fn restart_quietly(&mut self, host: usize) -> Checked {
        self.crash(host, true)?;
        self.boot(host);
        let run = self.hosts[host].process.as_ref().map(|process| process.run);
        if let Some(member) = &mut self.hosts[host].member {
            (member.link.subscribed, member.link.protect_next) = (run, true);
            (member.link.lose_next, member.link.garble_next) = (0, false);
        }
        Ok(())
    }

    // --- metrics

    pub fn scrape(&mut self, host: usize, id: EndpointId) {
        let now = self.now;
        let place = &mut self.hosts[host];
        if place.member.as_ref().is_none_or(|member| member.id != id) {
            return;
        }
        let reachable = now >= place.unreachable_until;
        let answers = reachable && now >= place.metrics_dark_until;
        let page = place.process.as_ref().filter(|_| answers).map(|process| {
            let frozen = place.page.clone().filter(|_| now < place.metrics_frozen_until);
            frozen.unwrap_or_else(|| process.metrics(process.model.stats()))
        });
        let connects = reachable && place.process.is_some();
        let failures = match &page {
            Some(_) => 0,
            None => place.member.as_ref().map_or(0, |member| member.scrapes_failed) + 1,
        };
        if let Some(member) = &mut place.member {
            member.scrapes_failed = failures;
        }
        match page {
            Some(page) => self.scraped(host, id, page),
            None => {
                if !connects || failures >= MUTE_SCRAPES_MAX {
                    self.avoid(id);
                }
                self.calls.scrapes_failed += 1;
                self.brain.on_scrape_failed(now, id);
            }
        }
        let wait = if self.calm { 1_000 } else { self.settings.scrape_interval_ms.into() };
        self.after_ms(wait << failures.min(3), Event::Scrape { host, id });
    }

    fn scraped(&mut self, host: usize, id: EndpointId, page: EngineMetrics) {
        self.brain.on_metrics(self.now, id, &page);
        self.hosts[host].page = Some(page);
        let due = self.now + Duration::from_secs(self.settings.models_interval_s.into());
        let Some(member) = &mut self.hosts[host].member else { return };
        if self.now >= member.models_due {
            member.models_due = due;
            let adapter = |name: &&str| ServedModel {
                id: (*name).to_owned(),
                parent: Some(MODEL.to_owned()),
            };
            let base = ServedModel { id: MODEL.to_owned(), parent: None };
            let models = [base].into_iter().chain(ADAPTERS.iter().map(adapter)).collect();
            self.brain.on_models(id, models);
        }
    }

    /// Requests go to others until the next scrape has ended, as the live router arranges it.
    fn avoid(&mut self, id: EndpointId) {
        let longest = ms(self.settings.scrape_backoff_max_ms);
        for _ in 0..BACKOFF_DOUBLINGS_MAX {
            self.calls.endpoints_failed += 1;
            self.brain.on_endpoint_failed(self.now, id);
            let endpoint = self.brain.fleet().get(id);
            if endpoint.is_none_or(|endpoint| endpoint.is_avoided(self.now + longest)) {
                return;
            }
        }
    }

    /// Whether a stream could be whole again by itself: everything can be asked for again.
    pub fn can_heal(&self, host: usize) -> bool {
        let place = &self.hosts[host];
        let keeps = place.process.as_ref().is_some_and(Process::keeps_all);
        place.replay == ReplaySocket::Present && keeps
    }
}
