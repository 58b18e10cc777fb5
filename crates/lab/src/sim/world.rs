//! The simulation itself: one event after the other.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvroute_core::brain::Brain;
use kvroute_core::decision::{Headers, NoTokens, Request, ResponseEvent, TokensKnown};
use kvroute_core::event::EventBatch;
use kvroute_core::fleet::EndpointSpec;
use kvroute_core::load::Ticket;
use kvroute_core::plan::{Plan, TokensNeed};
use kvroute_core::settings::Settings;
use kvroute_core::stream::{StreamInput, StreamOrder};
use kvroute_core::{EndpointId, Rng, Time};

use super::engine::{Engine, Scraped};
use super::flight::{Flight, Flights};
use super::prompts::Prompts;
use super::queue::{Event, FlightId, Queue};
use super::timeline::Timeline;
use super::{Arm, Policy, Progress, SimError, Watch};
use crate::model::{Emitted, Finished, NewRequest, Output, Profile, Step};
use crate::record::{Ending, Moment, RequestRecord, RunRecord, StageRecord};
use crate::scenario::{FaultKind, ProfileSpec, Scenario};
use crate::traffic::{Arrival, Call, Traffic};

/// How often the router lets time pass, like the live one.
const TICK: Duration = Duration::from_millis(100);

/// Between the end of a stage's last request and the start of the next stage, inference-perf waits
/// for the end of the second in which it looks, and two seconds more.
const STAGE_PAUSE: Duration = Duration::from_secs(2);

/// Events between two reports of progress.
const PROGRESS_EVERY: u64 = 4096;

/// Name of the model that the engines serve.
const MODEL: &str = "sim";

/// Names the conversation of a request, as the load generator does.
const SESSION_HEADER: &str = "x-session-id";

/// One stage under way.
#[derive(Default)]
struct StageState {
    begin: Time,
    next: Option<Arrival>,
    exhausted: bool,
    /// Requests that have not ended, those that are planned included.
    open: u64,
    over: bool,
}

/// Everything in the simulation.
pub(super) struct World<'a> {
    pub(super) scenario: &'a Scenario,
    arm: &'a Arm,
    traffic: Traffic,
    prompts: Prompts,
    pub(super) brain: Brain,
    settings: Settings,
    known: TokensKnown,
    pub(super) ids: Vec<EndpointId>,
    pub(super) engines: Vec<Engine>,
    /// Faults that are not over, in the order of their beginnings.
    pub(super) faults: Vec<usize>,
    pub(super) queue: Queue,
    pub(super) now: Time,
    pub(super) rng: Rng,
    pub(super) flights: Flights,
    in_flight: u32,
    stages: Vec<StageState>,
    record: RunRecord,
    timeline: Timeline,
    ticked: Time,
    before: Duration,
    after: Duration,
    stats_delay: Duration,
    pub(super) event_delay: Duration,
}

impl<'a> World<'a> {
    pub fn new(
        scenario: &'a Scenario,
        folder: &Path,
        arm: &'a Arm,
        seed: u64,
    ) -> Result<World<'a>, SimError> {
        let traffic = Traffic::new(scenario, folder, seed)?;
        let plan = match &arm.policy {
            Policy::Plan(plan) => (**plan).clone(),
            Policy::Oracle => Plan::baseline_round_robin(),
        };
        let known = match plan.tokens {
            TokensNeed::None => TokensKnown::None(NoTokens::NotNeeded),
            TokensNeed::Estimated => TokensKnown::Estimated,
            TokensNeed::Exact => TokensKnown::Exact,
        };
        let fleet = &scenario.fleet;
        let profile = match &fleet.profile {
            ProfileSpec::Named(name) => Profile::built_in(name)?,
            ProfileSpec::Inline(profile) => profile.clone(),
        };
        // Streams of their own, so that a fault does not change the arrivals.
        let mut rng = Rng::seeded(seed ^ 0x5eed_0000_fa17);
        let mut world = World {
            prompts: Prompts::new(scenario.workload.bytes_per_token.unwrap_or(4.0)),
            settings: plan.settings.clone(),
            brain: Brain::new(plan, seed),
            known,
            ids: Vec::new(),
            engines: Vec::new(),
            faults: Vec::new(),
            queue: Queue::default(),
            now: Time::ZERO,
            flights: Flights::default(),
            in_flight: 0,
            stages: traffic.stages().iter().map(|_| StageState::default()).collect(),
            record: RunRecord { name: arm.name.clone(), seed, ..RunRecord::default() },
            timeline: Timeline::new(),
            ticked: Time::ZERO,
            before: seconds(scenario.client.overhead_before_s),
            after: seconds(scenario.client.overhead_after_s),
            stats_delay: seconds(fleet.stats_delay_s),
            event_delay: seconds(fleet.event_delay_s),
            rng: Rng::seeded(rng.next_u64()),
            scenario,
            arm,
            traffic,
        };
        world.add_engines(&profile, seed, &mut rng)?;
        Ok(world)
    }

    fn add_engines(&mut self, profile: &Profile, seed: u64, rng: &mut Rng) -> Result<(), SimError> {
        let fleet = &self.scenario.fleet;
        let loses = |kind| matches!(kind, FaultKind::EventLoss | FaultKind::Crash);
        let replay_kept = self.scenario.faults.iter().any(|fault| loses(fault.kind));
        // Like the live router, which subscribes to events only where a plan reads them.
        let events = self.brain.plan().reads_events();
        for at in 0..fleet.engines {
            let seed = seed ^ (u64::from(at) + 1).rotate_left(40);
            let phase = rng.next_f64();
            let engine = Engine::new(fleet, profile, seed, phase, events, replay_kept)?;
            self.engines.push(engine);
            let spec = EndpointSpec {
                name: format!("engine-{at:04}"),
                address: format!("engine-{at}:8000"),
                labels: Default::default(),
                rank: 0,
                replay_available: replay_kept,
                events_expected: events,
            };
            let id = self.brain.add_endpoint(Time::ZERO, spec)?;
            self.ids.push(id);
            if events {
                self.tell(usize::from(at), StreamInput::Connected);
            }
        }
        Ok(())
    }

    /// Runs until every request has ended.
    pub fn run(mut self, watch: &mut Watch<'_>) -> Result<RunRecord, SimError> {
        for stage in self.traffic.stages() {
            self.record.stages.push(StageRecord {
                rate: stage.rate,
                duration_s: stage.duration_s,
                warmup: stage.warmup,
                ..StageRecord::default()
            });
        }
        let planned = self.traffic.stages().iter().map(|stage| stage.arrivals).sum();
        self.plan_faults();
        if !self.stages.is_empty() {
            self.queue.push(Time::ZERO, Event::Stage(0));
        }
        let mut events = 0u64;
        while let Some((at, event)) = self.queue.pop() {
            self.pass_time(at);
            self.on(event, watch)?;
            events += 1;
            if events.is_multiple_of(PROGRESS_EVERY) {
                let (sent, at_s) = (self.record.requests.len() as u64, at.as_secs_f64() as u64);
                (watch.progress)(Progress { planned, sent, at_s });
            }
            if self.stages.iter().all(|stage| stage.over) && self.flights.len() == 0 {
                break;
            }
        }
        self.record.timeline = self.timeline.into_moments();
        Ok(self.record)
    }

    fn pass_time(&mut self, at: Time) {
        self.now = at;
        let now_s = at.as_secs_f64();
        if self.timeline.is_due(now_s) {
            self.timeline.sums.preemptions = self.engines.iter_mut().map(Engine::preemptions).sum();
            let (in_flight, engines) = (self.in_flight, &mut self.engines);
            self.timeline.note(now_s, || look(in_flight, engines));
        }
        if at.since(self.ticked) >= TICK {
            self.ticked = at;
            for (id, order) in self.brain.tick(at) {
                if let Some(engine) = self.ids.iter().position(|known| *known == id) {
                    self.obey(engine, order);
                }
            }
        }
    }

    fn on(&mut self, event: Event, watch: &mut Watch<'_>) -> Result<(), SimError> {
        match event {
            Event::Stage(stage) => self.begin_stage(stage),
            Event::Arrive(stage) => self.arrive(stage),
            Event::Follow { stage, call } => self.send(stage, *call),
            Event::Dispatch(flight) => self.dispatch(flight, watch),
            Event::StepEnd { engine, epoch } => {
                if self.engines[engine].epoch == epoch {
                    self.end_step(engine);
                }
            }
            Event::Batch { engine, epoch, seq, batch } => {
                if self.engines[engine].epoch == epoch && self.engines[engine].up {
                    let batch = Arc::unwrap_or_clone(batch);
                    self.tell(engine, StreamInput::Batch { seq, batch });
                }
            }
            Event::Replay { engine, from } => self.replay(engine, from),
            Event::Connected { engine, epoch } => {
                if self.engines[engine].epoch == epoch && self.engines[engine].up {
                    self.engines[engine].subscribed = true;
                    self.tell(engine, StreamInput::Connected);
                }
            }
            Event::Ended(flight) => self.end(flight),
            Event::Fault(fault) => self.begin_fault(fault),
            Event::Healed(fault) => self.end_fault(fault)?,
        }
        Ok(())
    }

    fn begin_stage(&mut self, stage: usize) {
        let spec = self.traffic.stages()[stage];
        self.stages[stage].begin = self.now;
        self.record.stages[stage].begin_s = self.now.as_secs_f64();
        if spec.clients > 0 {
            while let Some(arrival) = self.traffic.next(stage) {
                self.follow(stage, arrival);
            }
            self.stages[stage].exhausted = true;
        } else {
            self.plan_arrival(stage);
        }
        let next = stage + 1;
        if !self.scenario.load.drain_between_stages && next < self.stages.len() {
            self.queue.push(self.now + seconds(spec.duration_s), Event::Stage(next));
        }
        self.check_stage(stage);
    }

    fn plan_arrival(&mut self, stage: usize) {
        let state = &mut self.stages[stage];
        match self.traffic.next(stage) {
            Some(arrival) => {
                let due = state.begin + seconds(arrival.at_s);
                state.next = Some(arrival);
                self.queue.push(due.max(self.now), Event::Arrive(stage));
            }
            None => state.exhausted = true,
        }
    }

    fn arrive(&mut self, stage: usize) {
        let Some(arrival) = self.stages[stage].next.take() else { return };
        self.stages[stage].open += 1;
        self.plan_arrival(stage);
        self.send(stage, arrival.call);
    }

    fn follow(&mut self, stage: usize, arrival: Arrival) {
        let state = &mut self.stages[stage];
        state.open += 1;
        let due = state.begin + seconds(arrival.at_s);
        let call = Box::new(arrival.call);
        self.queue.push(due.max(self.now), Event::Follow { stage, call });
    }

    /// The client sends, unless it has too many in flight already.
    fn send(&mut self, stage: usize, call: Call) {
        let record = self.record.requests.len();
        let refused = self.in_flight >= self.scenario.client.in_flight_max;
        self.record.requests.push(RequestRecord {
            stage: stage as u32,
            endpoint: u16::MAX,
            ending: if refused { Ending::Refused } else { Ending::Failed },
            sent_s: self.now.as_secs_f64(),
            prompt_tokens: call.tokens.len() as u32,
            ..RequestRecord::default()
        });
        if refused {
            self.stages[stage].open -= 1;
            self.check_stage(stage);
            return;
        }
        self.in_flight += 1;
        let flight = self.flights.insert(Flight {
            stage,
            record,
            call,
            sent: self.now,
            ticket: None,
            fallback: Vec::new(),
            engine: None,
            held: None,
            attempts: 0,
            answered: false,
            ending: None,
        });
        self.queue.push(self.now + self.before, Event::Dispatch(flight));
    }

    /// The router decides.
    fn dispatch(&mut self, id: FlightId, watch: &mut Watch<'_>) {
        self.scrape();
        let Some(flight) = self.flights.get_mut(id) else { return };
        let (stage, record, held) = (flight.stage, flight.record, flight.held);
        let chains = self.prompts.chains(self.brain.chain_specs(), self.known, &flight.call);
        let tokens = flight.call.tokens.len();
        let forced = match self.arm.policy {
            Policy::Plan(_) => None,
            Policy::Oracle => Some(self.ids[flight.call.group as usize % self.ids.len()]),
        };
        let session = flight.call.session.map(|session| session.to_string());
        let headers = session.as_deref().map(|session| [(SESSION_HEADER, session)]);
        let mut request = Request {
            id: "",
            model: MODEL,
            prompts: &chains,
            prompt_tokens: match self.known {
                TokensKnown::Exact => tokens as u32,
                _ => self.prompts.estimated_tokens(tokens),
            },
            tokens_known: self.known,
            max_tokens: flight.call.max_tokens,
            skips_cache: false,
            held,
            media: &[],
            priority: 0,
            headers: &Headers(headers.as_ref().map_or(&[], |headers| headers)),
            allowed: forced.as_ref().map(std::slice::from_ref),
        };
        if held.is_none()
            && let Some(held) = self.brain.hold(self.now, &request)
        {
            if held.until > self.now {
                flight.held = Some(held.id);
                return self.queue.push(held.until, Event::Dispatch(id));
            }
            request.held = Some(held.id);
        }
        let decided = self.brain.decide(self.now, &request);
        self.note_signals(stage);
        match decided {
            Err(_) => {
                self.record.requests[record].ending = Ending::Rejected;
                self.finish(id, Ending::Rejected);
            }
            Ok(decision) => {
                if let Some(decisions) = &mut watch.decisions {
                    decisions(&decision.record);
                }
                let Some(flight) = self.flights.get_mut(id) else { return };
                flight.ticket = Some(decision.ticket);
                flight.fallback = decision.fallback.into_vec();
                self.place(id, decision.endpoint);
            }
        }
    }

    /// What the router sees of every engine, for the figures.
    fn note_signals(&mut self, stage: usize) {
        let record = &mut self.record.stages[stage];
        for endpoint in self.brain.fleet().iter() {
            if let Some(metrics) = endpoint.metrics() {
                record.waiting.add(f64::from(metrics.waiting), 1);
                record.kv_usage.add(metrics.kv_usage, 1);
            }
        }
    }

    fn scrape(&mut self) {
        for (engine, id) in self.engines.iter_mut().zip(&self.ids) {
            match engine.scrape(self.now) {
                Scraped::NotDue => {}
                Scraped::Failed => self.brain.on_scrape_failed(self.now, *id),
                Scraped::Metrics(at, metrics) => self.brain.on_metrics(at, *id, &metrics),
            }
        }
    }

    /// Sends a request to an endpoint, or to the next that answers.
    pub(super) fn place(&mut self, id: FlightId, mut endpoint: EndpointId) {
        loop {
            let Some(flight) = self.flights.get_mut(id) else { return };
            flight.attempts += 1;
            let at = self.ids.iter().position(|known| *known == endpoint);
            let Some(engine) = at.filter(|at| self.engines[*at].up) else {
                self.brain.on_endpoint_failed(self.now, endpoint);
                match self.next_choice(id) {
                    Some(next) => endpoint = next,
                    None => return self.finish(id, Ending::Failed),
                }
                continue;
            };
            flight.engine = Some(engine);
            return self.submit(id, engine);
        }
    }

    /// The endpoint to try after a failure; the reservation has moved there.
    pub(super) fn next_choice(&mut self, id: FlightId) -> Option<EndpointId> {
        let retries_max = self.settings.retries_max;
        let flight = self.flights.get_mut(id)?;
        let ticket = flight.ticket?;
        if flight.attempts > retries_max || flight.fallback.is_empty() {
            return None;
        }
        let next = flight.fallback.remove(0);
        self.brain.redirect(self.now, ticket, next);
        Some(next)
    }

    fn submit(&mut self, id: FlightId, engine: usize) {
        let Some(flight) = self.flights.get_mut(id) else { return };
        self.record.requests[flight.record].endpoint = engine as u16;
        let output = match flight.call.output.is_empty() {
            // No two answers are alike, so blocks of answers are not shared by chance.
            true => Output::Sampled(flight.record as u64),
            false => Output::Scripted(flight.call.output.to_vec()),
        };
        let request = NewRequest {
            id: u64::from(id),
            tokens: flight.call.tokens.to_vec(),
            max_tokens: flight.call.output_tokens,
            output,
            ..NewRequest::default()
        };
        if self.engines[engine].model().submit(self.now, request).is_err() {
            // An engine answers 400 to a prompt that it cannot hold.
            if let Some(ticket) = flight.ticket.take() {
                self.brain.on_response(self.now, ticket, ResponseEvent::End { status: 400 });
            }
            return self.finish(id, Ending::Failed);
        }
        self.start(engine);
    }

    pub(super) fn start(&mut self, engine: usize) {
        let epoch = self.engines[engine].epoch;
        if let Some(end) = self.engines[engine].start(self.now, self.stats_delay) {
            self.queue.push(end, Event::StepEnd { engine, epoch });
        }
    }

    fn end_step(&mut self, engine: usize) {
        let Some(step) = self.engines[engine].take_step(self.now, self.stats_delay) else { return };
        let Step { emitted, finished, events, .. } = step;
        self.timeline.sums.output_tokens += emitted.len() as u64;
        self.note_tokens(&emitted);
        finished.iter().for_each(|finished| self.answer(finished));
        if !events.is_empty() {
            let timestamp_s = self.now.as_secs_f64();
            let batch = EventBatch { timestamp_s, events, ..EventBatch::default() };
            self.publish(engine, batch);
        }
        self.start(engine);
    }

    /// First tokens end the wait for an answer; gaps of the same length in the same stage, which
    /// is nearly all of a step, are counted together.
    fn note_tokens(&mut self, emitted: &[Emitted]) {
        let mut run: Option<(usize, Duration, u64)> = None;
        for token in emitted {
            let id = token.id as FlightId;
            let Some(flight) = self.flights.get_mut(id) else { continue };
            let stage = flight.stage;
            if token.index == 0 {
                self.first_token(id, token);
                continue;
            }
            match &mut run {
                Some((of, gap, times)) if *of == stage && *gap == token.gap => *times += 1,
                _ => {
                    if let Some((stage, gap, times)) = run.replace((stage, token.gap, 1)) {
                        self.record.stages[stage].gaps_s.add(gap.as_secs_f64(), times);
                    }
                }
            }
        }
        if let Some((stage, gap, times)) = run {
            self.record.stages[stage].gaps_s.add(gap.as_secs_f64(), times);
        }
    }

    fn first_token(&mut self, id: FlightId, token: &Emitted) {
        let quantum_s = self.scenario.client.quantum_s;
        let Some(flight) = self.flights.get_mut(id) else { return };
        flight.answered = true;
        let true_s = (self.now + self.after).since(flight.sent).as_secs_f64();
        let ttft_s = match quantum_s > 0.0 {
            // A time that is a multiple already must not be lifted by its rounding error.
            true => (true_s / quantum_s - 1e-9).ceil() * quantum_s,
            false => true_s,
        };
        let record = &mut self.record.requests[flight.record];
        record.ttft_s = ttft_s as f32;
        record.cached_tokens = token.cached_tokens;
        self.timeline.sums.prompt_tokens += u64::from(record.prompt_tokens);
        self.timeline.sums.cached_tokens += u64::from(token.cached_tokens);
        if let Some(ticket) = flight.ticket {
            self.brain.on_response(self.now, ticket, ResponseEvent::FirstChunk);
        }
    }

    fn answer(&mut self, finished: &Finished) {
        let id = finished.id as FlightId;
        let Some(flight) = self.flights.get_mut(id) else { return };
        let record = &mut self.record.requests[flight.record];
        record.output_tokens = finished.output_tokens;
        let ratio = self.scenario.workload.counted_output_ratio.unwrap_or(1.0);
        record.counted_tokens = (f64::from(finished.output_tokens) * ratio) as f32;
        if let Some(ticket) = flight.ticket.take() {
            let usage = ResponseEvent::Usage {
                prompt_tokens: finished.prompt_tokens,
                cached_tokens: Some(finished.cached_tokens),
                completion_tokens: finished.output_tokens,
            };
            self.brain.on_response(self.now, ticket, usage);
            self.brain.on_response(self.now, ticket, ResponseEvent::End { status: 200 });
        }
        self.finish(id, Ending::Answered);
    }

    /// The end of a request as the router sees it; the client sees it a little later.
    pub(super) fn finish(&mut self, id: FlightId, ending: Ending) {
        let after = match ending {
            Ending::Answered => self.after,
            _ => Duration::ZERO,
        };
        let Some(flight) = self.flights.get_mut(id) else { return };
        flight.ending = Some(ending);
        if let Some(ticket) = flight.ticket.take() {
            self.abort(ticket);
        }
        self.queue.push(self.now + after, Event::Ended(id));
    }

    fn abort(&mut self, ticket: Ticket) {
        self.brain.on_response(self.now, ticket, ResponseEvent::Aborted);
    }

    fn end(&mut self, id: FlightId) {
        let Some(flight) = self.flights.remove(id) else { return };
        self.in_flight -= 1;
        let stage = flight.stage;
        let record = &mut self.record.requests[flight.record];
        record.ending = flight.ending.unwrap_or(Ending::Failed);
        record.total_s = self.now.since(flight.sent).as_secs_f64() as f32;
        let at_s = self.now.since(self.stages[stage].begin).as_secs_f64();
        if let Some(arrival) = self.traffic.follow_up(stage, &flight.call, at_s) {
            self.follow(stage, arrival);
        }
        self.stages[stage].open -= 1;
        self.check_stage(stage);
    }

    fn check_stage(&mut self, stage: usize) {
        let state = &mut self.stages[stage];
        if state.over || !state.exhausted || state.open > 0 {
            return;
        }
        state.over = true;
        let next = stage + 1;
        if self.scenario.load.drain_between_stages && next < self.stages.len() {
            let passed_s = self.now.since(self.stages[stage].begin).as_secs_f64();
            let due = self.stages[stage].begin + seconds(passed_s.ceil()) + STAGE_PAUSE;
            self.queue.push(due, Event::Stage(next));
        }
    }

    /// Feeds the router's view of an engine's event stream.
    pub(super) fn tell(&mut self, engine: usize, input: StreamInput) {
        let order = self.brain.on_stream(self.now, self.ids[engine], input);
        self.obey(engine, order);
    }

    fn obey(&mut self, engine: usize, order: StreamOrder) {
        if let StreamOrder::Replay { from } = order {
            // There and back.
            let due = self.now + self.event_delay * 2;
            self.queue.push(due, Event::Replay { engine, from });
        }
    }

    fn replay(&mut self, engine: usize, from: u64) {
        if !self.engines[engine].up {
            return self.tell(engine, StreamInput::ReplayFailed);
        }
        for (seq, batch) in self.engines[engine].replayed(from) {
            let batch = EventBatch::clone(&batch);
            self.tell(engine, StreamInput::ReplayBatch { seq, batch });
        }
        self.tell(engine, StreamInput::ReplayDone);
    }
}

fn look(in_flight: u32, engines: &mut [Engine]) -> Moment {
    let count = engines.len().max(1) as f32;
    let mut moment = Moment { in_flight, ..Moment::default() };
    // Of an engine that is down there is nothing to see.
    for engine in engines.iter_mut().filter(|engine| engine.up) {
        let stats = engine.model().stats();
        moment.waiting += stats.waiting as f32 / count;
        moment.waiting_max = moment.waiting_max.max(stats.waiting as f32);
        moment.running += stats.running as f32 / count;
        moment.kv_usage += stats.kv_usage as f32 / count;
    }
    moment
}

pub(super) fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::ZERO)
}
