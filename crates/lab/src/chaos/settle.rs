//! The faults stop. Does everything come right, or does it say that it is not?

use std::time::Duration;

use kvroute_core::blocks::{ChainSpec, PromptExtras, Root, chain};
use kvroute_core::fleet::RootKind;
use kvroute_core::index::TierWeights;
use kvroute_core::load::Load;
use kvroute_core::stream::StreamState;
use kvroute_core::{EndpointId, Time};

use super::check::{differences, is_part};
use super::prompts::{MODEL, Prompt};
use super::stream::ReplayMood;
use super::world::{Event, World};
use super::{Checked, ensure};

/// Virtual time in which all requests must have ended: the longest timeouts and retries.
const DRAIN: Duration = Duration::from_secs(4 * 3_600);
/// Rounds in which each engine publishes something; together longer than any rest of a stream.
const ROUNDS: u32 = 5;
/// Virtual time of a round.
const ROUND: Duration = Duration::from_millis(2_000);

impl World {
    /// The end of a run.
    pub fn settle(&mut self) -> Checked {
        self.heal()?;
        self.drain()?;
        for _ in 0..ROUNDS {
            self.force_events();
            self.run_until(self.now + ROUND)?;
        }
        for host in 0..self.hosts.len() {
            self.check_settled(host, false)?;
        }
        // An emptied cache ends every doubt.
        for host in 0..self.hosts.len() {
            let done = self.hosts[host].process.as_mut().is_some_and(|p| p.reset_cache());
            ensure(done, "an idle engine empties its cache", || format!("engine {host}"))?;
        }
        for _ in 0..2 {
            self.force_events();
            self.run_until(self.now + ROUND)?;
        }
        for host in 0..self.hosts.len() {
            self.check_settled(host, true)?;
        }
        self.check_nothing_left()
    }

    fn heal(&mut self) -> Checked {
        self.note("the faults stop".to_owned());
        self.calm = true;
        self.ticks_blocked_until = Time::ZERO;
        for host in 0..self.hosts.len() {
            let place = &mut self.hosts[host];
            place.replay_mood = (ReplayMood::Fine, Time::ZERO);
            place.unreachable_until = Time::ZERO;
            (place.metrics_dark_until, place.metrics_frozen_until) = (Time::ZERO, Time::ZERO);
            place.slow_until = Time::ZERO;
            if let Some(member) = &mut place.member {
                member.link.heal();
            }
            self.restart(host)?;
            self.rejoin(host);
        }
        Ok(())
    }

    fn drain(&mut self) -> Checked {
        let until = self.now + DRAIN;
        while !self.flights.is_empty() {
            self.next()?;
            ensure(self.now < until, "every request ends", || {
                format!("{} are still open", self.flights.len())
            })?;
        }
        // Links that hang are noticed by then, and speculations have ended.
        self.run_until(self.now + Duration::from_secs(21))
    }

    /// Each engine is asked something new, so that it publishes.
    fn force_events(&mut self) {
        for host in 0..self.hosts.len() {
            let tokens = 2 * self.hosts[host].block_size as usize + 1;
            let prompt = self.pool.unique(tokens);
            self.ask_beside(host, prompt);
        }
    }

    /// What the index says of an endpoint is what its engine holds, or its stream says that it is
    /// not and cannot be cured. `cleared`: nothing may be in doubt any more.
    fn check_settled(&mut self, host: usize, cleared: bool) -> Checked {
        let (Some(member), Some(process)) = (&self.hosts[host].member, &self.hosts[host].process)
        else {
            return ensure(false, "all engines are back", || format!("engine {host}"));
        };
        let (id, heard) = (member.id, &member.heard);
        let (mixed, believed) = (heard.mixed, heard.believed);
        let state = self.brain.stream_state(id);
        if !self.reads_events {
            let resident = self.brain.index().endpoint_usage(id).resident;
            return ensure(resident == 0, "without events nothing is resident", || {
                format!("{host}: {resident} blocks")
            });
        }
        let must = cleared || self.can_heal(host);
        if state != Some(StreamState::Live) {
            self.saw("in doubt at the end");
            return ensure(!must, "a stream that can be whole again is live at the end", || {
                let (socket, last) = (self.hosts[host].replay, self.brain.stream_last_seq(id));
                format!(
                    "{host}: {state:?} at {last:?}, replay {socket:?}, after a reset: {cleared}"
                )
            });
        }
        if mixed {
            self.saw("restart unnoticed at the end");
            return Ok(());
        }
        let (last, next) = (self.brain.stream_last_seq(id), process.published());
        ensure(last.map(|last| last + 1) == Some(next), "all batches have been applied", || {
            format!("{host}: the last is {last:?}, {next} were published")
        })?;
        let (claimed, holds) = (self.claimed(id), process.model.cached_names());
        let lacks = self.may_lack(id) || believed;
        let right = if lacks { is_part(&claimed, &holds) } else { claimed == holds };
        ensure(right, "in the end the index is what the engines hold", || {
            format!("{host}: {}", differences(&claimed, &holds))
        })?;
        self.saw(if lacks { "right at the end, in part" } else { "right at the end" });
        if lacks { Ok(()) } else { self.check_lookups(host, id) }
    }

    /// Every prompt is found where its engine would find it, to the token.
    fn check_lookups(&mut self, host: usize, id: EndpointId) -> Checked {
        let prompts: Vec<Prompt> = self.pool.iter().cloned().collect();
        for Prompt { tokens, salt, adapter } in prompts {
            let Some(process) = self.hosts[host].process.as_mut() else { return Ok(()) };
            let holds = process.model.cached_prefix(&tokens, salt, adapter.unwrap_or(MODEL));
            let size = process.block_size();
            let root = adapter.map_or(Root::Base, Root::Adapter);
            if adapter.is_some_and(|name| self.brain.root_of(name) == RootKind::Base) {
                continue;
            }
            let extras = PromptExtras { cache_salt: salt, items: &[] };
            let chain = chain(ChainSpec::exact(size), root, &tokens, &extras);
            self.brain.index().lookup(&chain, &TierWeights::default(), &mut self.hits);
            let reusable = tokens.len().saturating_sub(1) as u32 / size;
            let found = self.hits.get(id).resident.min(reusable) * size;
            ensure(found == holds, "a lookup finds what the engine would reuse", || {
                format!("{host}: {found} tokens found, {holds} held, prompt {tokens:?}")
            })?;
        }
        Ok(())
    }

    /// With all requests ended, nothing is reserved and nothing expected.
    fn check_nothing_left(&mut self) -> Checked {
        self.now = self.now + Duration::from_secs(3_600);
        self.at(self.now, Event::Tick);
        self.run_until(self.now)?;
        let usage = self.brain.index().usage();
        let loads = self.hosts.iter().filter_map(|host| host.member.as_ref());
        let idle = loads.map(|member| self.brain.load(member.id)).all(|l| l == Load::default());
        let nothing = self.brain.inflight_requests() == 0 && idle && usage.speculations == 0;
        ensure(nothing, "nothing is left when all requests have ended", || {
            format!("{} reserved, {usage:?}", self.brain.inflight_requests())
        })?;
        for id in self.gone.clone() {
            self.check_gone(id)?;
        }
        Ok(())
    }
}
