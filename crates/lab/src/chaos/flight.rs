//! One request from the client to its end, as the live router forwards and observes it.

use std::time::Duration;

use kvroute_core::blocks::{ChainSpec, PromptExtras, Root, TokenSpace, chain};
use kvroute_core::brain::ChainSpecs;
use kvroute_core::decision::{
    Decision, DecisionRecord, Headers, Mode, NoTokens, PromptChains, Reject, Request,
    ResponseEvent, TokensKnown,
};
use kvroute_core::fleet::RootKind;
use kvroute_core::load::Ticket;
use kvroute_core::stream::StreamState;
use kvroute_core::{EndpointId, Time};

use super::prompts::{MODEL, OUTPUT_TOKENS_MAX, Prompt};
use super::world::{Event, World};
use super::{Checked, Sabotage, ensure};
use crate::model::{Emitted, NewRequest, Output, RequestId};

/// Number of a request, from 1.
pub(super) type FlightNo = u64;

/// A long answer is a sign of life this often.
const TOUCH: Duration = Duration::from_secs(30);

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Before its decision.
    Tokenizing,
    /// On its way to an endpoint.
    Connecting,
    /// In an engine.
    Engine { host: usize, run: u64, id: RequestId },
    /// The engine is done; the end of the answer is on its way.
    Ending,
}

/// What an answer tells about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UsageStyle {
    Full,
    /// Without the number of cached tokens, as older engines answer.
    WithoutCached,
    Missing,
}

/// What the brain must hold for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Charge {
    pub endpoint: EndpointId,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
}

/// A request under way.
pub(super) struct Flight {
    prompt: Prompt,
    known: TokensKnown,
    /// It empties a cache instead of asking something.
    is_reset: bool,
    streams: bool,
    max_tokens: u32,
    usage: UsageStyle,
    /// Usage and end come so much later than the last token.
    end_late_ms: u64,
    specs: ChainSpecs,
    ticket: Option<Ticket>,
    /// `None` before the decision and once the ticket has ended.
    pub charge: Option<Charge>,
    /// Tokens to compute on each endpoint that was considered.
    costs: Vec<(EndpointId, u32)>,
    candidates: Vec<EndpointId>,
    at: usize,
    attempts: u32,
    upstream: Option<(EndpointId, usize)>,
    pub place: Place,
    /// Last sign of life that the brain saw.
    pub alive: Time,
    touched: Time,
    sent: Time,
    last_read: Time,
    answered: bool,
    /// When it will be looked at next.
    pub deadline: Time,
    output: Vec<u32>,
    cached_tokens: u32,
}

impl World {
    // --- before the decision

    pub fn arrive(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        let wait = if self.one_in(4) { 0 } else { self.ms(5, 140) };
        self.after_ms(wait, Event::Arrive);
        let prompt = self.pool.draw(&mut self.rng);
        self.begin(prompt, false);
        Ok(())
    }

    /// A client sends a request.
    pub fn begin(&mut self, prompt: Prompt, is_reset: bool) {
        self.flights_begun += 1;
        let no = self.flights_begun;
        let known = match self.rng.below(20) {
            _ if is_reset => TokensKnown::None(NoTokens::NoPrompt),
            0 => TokensKnown::Estimated,
            1 => TokensKnown::None(NoTokens::TokenizerFailed),
            _ => TokensKnown::Exact,
        };
        let usage = match self.rng.below(8) {
            0 => UsageStyle::Missing,
            1 => UsageStyle::WithoutCached,
            _ => UsageStyle::Full,
        };
        let end_late_ms = if self.one_in(5) { self.ms(50, 3_000) } else { 0 };
        let flight = Flight {
            prompt,
            known,
            is_reset,
            streams: !self.one_in(3),
            max_tokens: 1 + self.rng.below(OUTPUT_TOKENS_MAX) as u32,
            usage,
            end_late_ms,
            specs: self.brain.chain_specs(),
            ticket: None,
            charge: None,
            costs: Vec::new(),
            candidates: Vec::new(),
            at: 0,
            attempts: 0,
            upstream: None,
            place: Place::Tokenizing,
            alive: self.now,
            touched: self.now,
            sent: self.now,
            last_read: self.now,
            answered: false,
            deadline: self.now,
            output: Vec::new(),
            cached_tokens: 0,
        };
        self.flights.insert(no, flight);
        let tokenizing = self.ms(0, 6);
        self.after_ms(tokenizing, Event::Decide(no));
        self.look_again(no, Duration::from_secs(2));
        if !is_reset && self.one_in(8) {
            let patience = self.ms(0, 2_500);
            self.after_ms(patience, Event::ClientGone(no));
        }
    }

    fn look_again(&mut self, no: FlightNo, wait: Duration) {
        let deadline = self.now + wait;
        if let Some(flight) = self.flights.get_mut(&no) {
            flight.deadline = deadline;
            self.at(deadline, Event::Deadline(no));
        }
    }

    // --- the decision

    pub fn decide(&mut self, no: FlightNo) -> Checked {
        let Some(flight) = self.flights.get(&no) else { return Ok(()) };
        let prompts = self.chains(flight);
        let (id, model) = (format!("r{no}"), flight.prompt.adapter.unwrap_or(MODEL));
        let request = Request {
            id: &id,
            model: if flight.is_reset { "" } else { model },
            prompts: &prompts,
            prompt_tokens: if flight.is_reset { 0 } else { flight.prompt.tokens.len() as u32 },
            tokens_known: flight.known,
            max_tokens: (!no.is_multiple_of(3)).then_some(flight.max_tokens),
            skips_cache: no.is_multiple_of(17),
            held: None,
            media: &[],
            priority: 0,
            headers: Headers::NONE,
            allowed: None,
        };
        let decided = self.brain.decide(self.now, &request);
        self.calls.decided += 1;
        let output_tokens = self
            .brain
            .plan()
            .load
            .producer
            .output_tokens(request.prompt_tokens, request.max_tokens);
        self.digest_decision(&decided);
        if self.sabotage == Some(Sabotage::DecisionUncounted) && no == 20 {
            let _ = self.brain.decide(self.now, &request);
        }
        match decided {
            Ok(decision) => self.decided(no, decision, output_tokens),
            Err(reject) => self.rejected(no, &reject),
        }
    }

    fn rejected(&mut self, no: FlightNo, reject: &Reject) -> Checked {
        self.calls.rejected += 1;
        self.note(format!("r{no} is rejected: {reject}"));
        self.saw(match reject {
            Reject::NoEndpoints { .. } => "rejected: no endpoints",
            Reject::Saturated { .. } => "rejected: saturated",
            Reject::TooManyInFlight { .. } => "rejected: in flight",
            Reject::Screened { .. } => "rejected: screened",
            Reject::Shed => "rejected: shed",
            Reject::NotAdmitted { .. } => "rejected: not admitted",
            Reject::NoProfile { .. } => "rejected: no profile",
            Reject::NotCached { .. } => "rejected: not cached",
        });
        self.ended(no, "rejected")
    }

    fn chains(&self, flight: &Flight) -> Vec<PromptChains> {
        let model = flight.prompt.adapter.unwrap_or(MODEL);
        let root = match self.brain.root_of(model) {
            RootKind::Base => Root::Base,
            RootKind::Adapter => Root::Adapter(model),
        };
        let extras = PromptExtras { cache_salt: flight.prompt.salt, items: &[] };
        let of = |spec: &ChainSpec| match spec.space {
            TokenSpace::Exact => chain(*spec, root, &flight.prompt.tokens, &extras),
            TokenSpace::Estimated => {
                let estimated: Vec<u32> = flight.prompt.tokens.iter().map(|t| t * 7 + 1).collect();
                chain(*spec, root, &estimated, &extras)
            }
        };
        match flight.known {
            TokensKnown::None(_) => Vec::new(),
            known => vec![PromptChains { chains: flight.specs.of(known).iter().map(of).collect() }],
        }
    }

    fn decided(&mut self, no: FlightNo, decision: Decision, output_tokens: u32) -> Checked {
        let Decision { ticket, endpoint, fallback, record, .. } = decision;
        self.note(format!("r{no} goes to {endpoint:?}: {}", record.reason.as_str()));
        self.saw(record.reason.as_str());
        let id_of = |name: &str| self.brain.fleet().by_name(name).map(|endpoint| endpoint.id);
        let costs: Vec<(EndpointId, u32)> = record
            .candidates
            .iter()
            .filter_map(|c| Some((id_of(c.endpoint.as_str())?, c.load.uncached_tokens)))
            .collect();
        let cost = costs.iter().find(|(id, _)| *id == endpoint).map(|(_, tokens)| *tokens);
        ensure(cost.is_some(), "the chosen endpoint is a candidate", || format!("{record:?}"))?;
        self.check_decision(&record, &fallback, endpoint)?;
        let now = self.now;
        let Some(flight) = self.flights.get_mut(&no) else { return Ok(()) };
        flight.charge = Some(Charge { endpoint, prompt_tokens: cost.unwrap_or(0), output_tokens });
        (flight.ticket, flight.costs, flight.alive) = (Some(ticket), costs, now);
        flight.candidates = [endpoint].into_iter().chain(fallback).collect();
        self.advance(no)
    }

    /// Precise knowledge rests on a live stream, and the next best are others of the fleet.
    fn check_decision(
        &self,
        record: &DecisionRecord,
        fallback: &[EndpointId],
        chosen: EndpointId,
    ) -> Checked {
        for candidate in &record.candidates {
            let precise = candidate.reason.mode() == Mode::Precise;
            let honest = !precise || candidate.stream == StreamState::Live;
            ensure(honest, "precise knowledge rests on a live stream", || {
                format!("{candidate:?}")
            })?;
            let hit = candidate.hit;
            let ordered =
                hit.resident <= hit.expected && hit.predicted_tokens <= record.prompt_tokens;
            ensure(ordered, "a hit is within the prompt", || format!("{candidate:?}"))?;
        }
        let known = fallback.iter().all(|id| self.brain.fleet().get(*id).is_some());
        let mut others: Vec<EndpointId> = [chosen].into_iter().chain(fallback.to_vec()).collect();
        others.sort_unstable();
        others.dedup();
        ensure(known && others.len() == fallback.len() + 1, "retries go to others", || {
            format!("{chosen:?}, then {fallback:?}")
        })
    }

    // --- forwarding

    /// Goes to the next candidate that is still in the fleet.
    fn advance(&mut self, no: FlightNo) -> Checked {
        loop {
            let Some(flight) = self.flights.get(&no) else { return Ok(()) };
            let (at, first) = (flight.at, flight.candidates.first().copied());
            let Some(&id) = flight.candidates.get(at) else {
                self.response(no, ResponseEvent::Aborted);
                return self.ended(no, "failed");
            };
            let Some(host) = self.host_of(id) else {
                self.flight(no).at += 1;
                continue;
            };
            if first != Some(id) {
                self.redirect(no, id);
            }
            let flight = self.flight(no);
            flight.attempts += 1;
            flight.output.clear();
            (flight.upstream, flight.place) = (Some((id, host)), Place::Connecting);
            let wait = self.ms(0, 4);
            self.after_ms(wait, Event::Attempt(no));
            return Ok(());
        }
    }

    fn flight(&mut self, no: FlightNo) -> &mut Flight {
        self.flights.get_mut(&no).expect("callers have looked the flight up")
    }

    fn redirect(&mut self, no: FlightNo, to: EndpointId) {
        let (now, known) = (self.now, self.brain.fleet().get(to).is_some());
        let flight = self.flight(no);
        let Some(ticket) = flight.ticket else { return };
        let cost = flight.costs.iter().find(|(id, _)| *id == to).map(|(_, tokens)| *tokens);
        let prompt_tokens = cost.unwrap_or(flight.prompt.tokens.len() as u32);
        if let Some(charge) = &mut flight.charge {
            flight.alive = now;
            if charge.endpoint != to && known {
                (charge.endpoint, charge.prompt_tokens) = (to, prompt_tokens);
                self.calls.redirected += 1;
            }
        }
        self.note(format!("r{no} is redirected to {to:?}"));
        self.brain.redirect(now, ticket, to);
    }

    pub fn attempt(&mut self, no: FlightNo) -> Checked {
        let now = self.now;
        let Some(flight) = self.flights.get(&no) else { return Ok(()) };
        let (Some((_, host)), Place::Connecting) = (flight.upstream, flight.place) else {
            return Ok(());
        };
        let attempts = flight.attempts;
        if self.sabotaged(Sabotage::RequestLost, 20) {
            return Ok(());
        }
        if now < self.hosts[host].unreachable_until {
            let timeout = self.settings.connect_timeout_ms.into();
            self.after_ms(timeout, Event::ConnectTimeout { flight: no, attempts });
            return Ok(());
        }
        let Some(process) = self.hosts[host].process.as_mut() else {
            return self.failed(no, true);
        };
        if self.flights[&no].is_reset {
            let done = process.reset_cache();
            self.note(format!("reset of {host} through the router: {done}"));
            self.saw(if done { "reset through the router done" } else { "reset refused" });
            self.flight(no).place = Place::Ending;
            let wait = self.ms(0, 40);
            self.after_ms(wait, Event::Finish(no));
            return Ok(());
        }
        let (run, id) = (process.run, process.next_request());
        let flight = self.flights.get_mut(&no).expect("looked up above");
        let request = NewRequest {
            id,
            tokens: flight.prompt.tokens.clone(),
            max_tokens: flight.max_tokens,
            stop_after: None,
            cache_salt: flight.prompt.salt.map(str::to_owned),
            adapter: flight.prompt.adapter.map(str::to_owned),
            output: Output::Greedy,
            report_reused: false,
        };
        process.model.submit(now, request).expect("prompts of the pool fit every engine");
        process.flights.insert(id, no);
        (flight.place, flight.sent) = (Place::Engine { host, run, id }, now);
        self.kick(host);
        Ok(())
    }

    pub fn connect_timeout(&mut self, no: FlightNo, attempts: u32) -> Checked {
        let flight = self.flights.get(&no);
        let waits = |f: &Flight| f.attempts == attempts && f.place == Place::Connecting;
        if flight.is_some_and(waits) { self.failed(no, true) } else { Ok(()) }
    }

    /// The endpoint failed before its first byte.
    fn failed(&mut self, no: FlightNo, may_retry: bool) -> Checked {
        let flight = &self.flights[&no];
        let Some((id, _)) = flight.upstream else { return Ok(()) };
        self.endpoint_failed(id);
        let flight = &self.flights[&no];
        let left = flight.candidates.get(flight.at + 1..).unwrap_or_default();
        let again = flight.attempts <= self.settings.retries_max
            && may_retry
            && left.iter().any(|next| self.host_of(*next).is_some());
        if again {
            self.saw("retries");
            self.flight(no).at += 1;
            return self.advance(no);
        }
        self.response(no, ResponseEvent::Aborted);
        self.ended(no, "failed")
    }

    fn endpoint_failed(&mut self, id: EndpointId) {
        self.calls.endpoints_failed += 1;
        self.brain.on_endpoint_failed(self.now, id);
    }

    // --- the answer

    pub fn token(&mut self, host: usize, run: u64, emitted: Emitted) -> Checked {
        let process = self.hosts[host].process.as_mut().filter(|process| process.run == run);
        let Some(process) = process else { return Ok(()) };
        let Some(no) = process.flights.get(&emitted.id).copied() else { return Ok(()) };
        if emitted.finish.is_some() {
            process.flights.remove(&emitted.id);
        }
        let now = self.now;
        let flight = self
            .flights
            .get_mut(&no)
            .filter(|flight| flight.place == Place::Engine { host, run, id: emitted.id });
        ensure(flight.is_some(), "engines answer requests that wait", || format!("r{no}"))?;
        let flight = self.flight(no);
        flight.output.push(emitted.token);
        flight.cached_tokens = emitted.cached_tokens;
        let complete = flight.output.len() as u32 == emitted.index + 1;
        let (streams, late) = (flight.streams, flight.end_late_ms);
        ensure(complete, "no token of an answer is missing", || format!("r{no}"))?;
        if streams || emitted.finish.is_some() {
            self.chunk(no, now);
        }
        if emitted.finish.is_none() {
            return Ok(());
        }
        self.flight(no).place = Place::Ending;
        if late == 0 {
            return self.finish(no);
        }
        self.after_ms(late, Event::Finish(no));
        Ok(())
    }

    /// Bytes of the answer arrive.
    fn chunk(&mut self, no: FlightNo, now: Time) {
        let flight = self.flight(no);
        flight.last_read = now;
        let first = !std::mem::replace(&mut flight.answered, true);
        if first || now.since(flight.touched) >= TOUCH {
            flight.touched = now;
            self.response(no, ResponseEvent::FirstChunk);
        }
    }

    /// The answer is complete.
    pub fn finish(&mut self, no: FlightNo) -> Checked {
        let Some(flight) = self.flights.get(&no) else { return Ok(()) };
        let Some((id, host)) = flight.upstream else { return Ok(()) };
        if flight.is_reset {
            if self.hosts[host].process.is_none() {
                return self.failed(no, false);
            }
            self.cache_reset(host, id);
        }
        if self.sabotaged(Sabotage::EndUnreported, 10) {
            self.flight(no).charge = None;
        } else {
            self.usage(no, host);
            self.response(no, ResponseEvent::End { status: 200 });
        }
        let flight = self.flight(no);
        let mut prompt = flight.prompt.clone();
        prompt.tokens.append(&mut flight.output);
        let is_reset = flight.is_reset;
        self.ended(no, "answered")?;
        if self.sabotaged(Sabotage::AnsweredTwice, 10) {
            return self.ended(no, "answered");
        }
        if !is_reset && self.one_in(4) {
            self.pool.learn(&mut self.rng, prompt);
        }
        Ok(())
    }

    fn usage(&mut self, no: FlightNo, host: usize) {
        let flight = &self.flights[&no];
        if flight.is_reset || flight.usage == UsageStyle::Missing {
            return;
        }
        let other = u32::from(self.hosts[host].counts_other_tokens);
        let cached_tokens = flight.cached_tokens;
        let usage = ResponseEvent::Usage {
            prompt_tokens: flight.prompt.tokens.len() as u32 + 3 * other,
            cached_tokens: (flight.usage == UsageStyle::Full).then_some(cached_tokens),
            completion_tokens: flight.output.len() as u32,
        };
        self.response(no, usage);
    }

    /// The router has seen a reset succeed.
    fn cache_reset(&mut self, host: usize, id: EndpointId) {
        self.calls.caches_reset += u64::from(self.brain.fleet().get(id).is_some());
        self.note(format!("the router notes that the cache of {host} was reset"));
        self.brain.on_cache_reset(self.now, id);
        self.touched.push(host);
        if let Some(member) = self.hosts[host].member_mut(id) {
            member.heard.reset_claimed = true;
        }
    }

    /// Tells the brain what a response said, and keeps the books.
    fn response(&mut self, no: FlightNo, event: ResponseEvent) {
        let now = self.now;
        let Some(flight) = self.flights.get_mut(&no) else { return };
        let Some(ticket) = flight.ticket else { return };
        let endpoint = flight.charge.map(|charge| charge.endpoint);
        match event {
            ResponseEvent::FirstChunk => {
                flight.charge.iter_mut().for_each(|charge| charge.prompt_tokens = 0);
                flight.alive = now;
            }
            ResponseEvent::Usage { .. } => flight.alive = now,
            ResponseEvent::End { .. } | ResponseEvent::Aborted => flight.charge = None,
        }
        self.brain.on_response(now, ticket, event);
        if let Some(id) = endpoint
            && let Some(host) = self.host_of(id)
        {
            let counted = self.counted(id);
            self.touched.push(host);
            if let Some(member) = self.hosts[host].member_mut(id) {
                member.heard.counted(counted);
            }
        }
    }

    // --- other ends

    /// The engine of a request has died.
    pub fn broken(&mut self, no: FlightNo) -> Checked {
        let Some(flight) = self.flights.get(&no) else { return Ok(()) };
        let Some((id, host)) = flight.upstream else { return Ok(()) };
        if !flight.answered {
            return self.failed(no, true);
        }
        if flight.usage == UsageStyle::Full && no.is_multiple_of(3) {
            self.usage(no, host);
        }
        self.response(no, ResponseEvent::Aborted);
        self.endpoint_failed(id);
        self.saw("answers cut short");
        self.ended(no, "failed")
    }

    pub fn client_gone(&mut self, no: FlightNo) -> Checked {
        let Some(flight) = self.flights.get(&no) else { return Ok(()) };
        self.saw(if flight.answered { "aborted in the answer" } else { "aborted before" });
        self.leave_engine(no);
        self.response(no, ResponseEvent::Aborted);
        self.ended(no, "aborted")
    }

    fn leave_engine(&mut self, no: FlightNo) {
        let Some(Place::Engine { host, run, id }) = self.flights.get(&no).map(|f| f.place) else {
            return;
        };
        let process = self.hosts[host].process.as_mut().filter(|process| process.run == run);
        if let Some(process) = process {
            process.flights.remove(&id);
            process.model.abort(id);
            self.kick(host);
        }
    }

    /// Does the answer still come?
    pub fn deadline(&mut self, no: FlightNo) -> Checked {
        let Some(flight) = self.flights.get(&no) else { return Ok(()) };
        let (first, idle) =
            (self.settings.first_byte_timeout_s, self.settings.response_idle_timeout_s);
        let until = match flight.place {
            Place::Connecting if self.sabotage == Some(Sabotage::RequestLost) => return Ok(()),
            Place::Tokenizing | Place::Connecting => self.now + Duration::from_secs(2),
            Place::Ending if flight.is_reset => self.now + Duration::from_secs(2),
            _ if flight.answered => flight.last_read + Duration::from_secs(idle.into()),
            _ => flight.sent + Duration::from_secs(first.into()),
        };
        if self.now < until {
            let wait = until.since(self.now);
            self.look_again(no, wait);
            return Ok(());
        }
        self.leave_engine(no);
        self.saw("timeouts");
        if !self.flights[&no].answered {
            return self.failed(no, false);
        }
        self.response(no, ResponseEvent::Aborted);
        self.ended(no, "failed")
    }

    /// A request has come to its end, the only one.
    fn ended(&mut self, no: FlightNo, outcome: &'static str) -> Checked {
        let flight = self.flights.remove(&no);
        ensure(flight.is_some(), "a request ends once", || format!("r{no} again: {outcome}"))?;
        *self.outcomes.entry(outcome).or_insert(0) += 1;
        self.note(format!("r{no} is {outcome}"));
        self.digest_outcome(no, outcome);
        Ok(())
    }

    /// After a tick: tickets that nobody ended have expired, all that are old enough or none yet.
    pub fn expire_flights(&mut self) -> Checked {
        let expired = self.brain.counters().tickets_expired - self.calls.expired;
        self.calls.expired += expired;
        let age_max = Duration::from_secs(self.settings.inflight_age_max_s.into());
        let now = self.now;
        let old =
            |flight: &&mut Flight| flight.charge.is_some() && now.since(flight.alive) >= age_max;
        let overdue = self.flights.values_mut().filter(old).count() as u64;
        ensure(expired == 0 || expired == overdue, "tickets expire by age", || {
            format!("{expired} expired, {overdue} were old enough")
        })?;
        if expired > 0 {
            self.note(format!("{expired} tickets expire"));
            self.flights.values_mut().filter(old).for_each(|flight| flight.charge = None);
        }
        Ok(())
    }
}
