//! Who serves this request? The one object that hosts talk to.
//!
//! The live router, the simulation and `explain` call the same methods. All state is in here; the
//! host adds sockets, a clock and one mutex.

mod commit;
mod decide;
mod handle;
mod slices;
mod snapshot;
#[cfg(test)]
mod tests;

use handle::Spare;
pub use slices::SLICE_BLOCKS_MAX;
use slices::{Room, Waiting};
pub use snapshot::{
    EndpointSnapshot, FORMAT as SNAPSHOT_FORMAT, Snapshot, SnapshotError, SnapshotHost,
};

use std::borrow::Cow;
use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use crate::blocks::BlockKey;
use crate::cost::{Costed, Costs};
use crate::decision::{Reason, ResponseEvent};
use crate::event::{EventBatch, KvEvent};
use crate::fleet::{EndpointId, EndpointSpec, Fleet, FleetError, RootKind, ServedModel};
use crate::fleet::{EngineMetrics, Name};
use crate::index::{Applied, Index, SpeculationId};
use crate::journal::{Call, Entry, Recorder};
pub use crate::knowledge::ChainSpecs;
use crate::knowledge::Knowledge;
use crate::learn::Speed;
use crate::ledger::{Conclusion, Expectation, Ledger};
use crate::load::{Charge, Load, Reservations, Ticket};
use crate::pipeline::{Guard, Pipeline};
use crate::plan::Plan;
use crate::plugin::PluginSpec;
use crate::produce::{Burst, EncoderCaches};
use crate::settings::ms;
use crate::stage::{Admitter, Detector, Filter};
use crate::stream::{
    Stream, StreamCounters, StreamEffect, StreamInput, StreamLimits, StreamOrder, StreamState,
    SuspectReason,
};
use crate::{Rng, Time};

/// Requests that have ended whose memory is kept for others.
const ENDED_MAX: usize = 128;
/// Memory for more blocks than this is given back.
const ENDED_KEYS_MAX: usize = 8192;
/// How often the table of tickets is searched for forgotten ones.
const TICKETS_SWEEP: Duration = Duration::from_secs(1);

/// Everything that decides.
pub struct Brain {
    plan: Plan,
    speculative: bool,
    speculative_ttl: Duration,
    fleet: Fleet,
    index: Index,
    ledger: Ledger,
    reservations: Reservations<InFlight>,
    costs: Costs,
    streams: Vec<Option<EndpointStream>>,
    /// By position in `Plan::profiles`.
    pipelines: Vec<Pipeline>,
    screeners: Vec<Guard<dyn Filter>>,
    admitters: Vec<Guard<dyn Admitter>>,
    detector: Option<Guard<dyn Detector>>,
    burst: Option<Burst>,
    /// By position in `Plan::others`.
    encoder_caches: Vec<Option<EncoderCaches>>,
    knowledge: Knowledge,
    specs: ChainSpecs,
    rng: Rng,
    orders: Vec<(EndpointId, StreamOrder)>,
    ending: VecDeque<(Time, SpeculationId)>,
    swept: Time,
    counters: BrainCounters,
    builtin: BuiltinStages,
    recorder: Option<Recorder>,
    spare: Spare,
    /// Memory of requests that have ended, for those that come.
    ended: Vec<InFlight>,
}

/// What a producer of encoder cache matches remembers.
fn caches_of(spec: &PluginSpec) -> Option<EncoderCaches> {
    match spec {
        PluginSpec::EncoderCacheProducer(producer) => Some(EncoderCaches::new(producer)),
        _ => None,
    }
}

/// Names of the stages that every plan has.
struct BuiltinStages {
    failing: Name,
    model: Name,
}

/// The event stream of one endpoint.
struct EndpointStream {
    generation: u32,
    stream: Stream,
    applied: Applied,
    waiting: Waiting,
    reset: ResetClaim,
}

/// A reset of an endpoint's cache that passed through the router: did it happen?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResetClaim {
    /// There was none, or what is known no longer depends on it.
    None,
    /// What was known is forgotten, and no batch has been applied since.
    Open,
    /// A batch was applied that says nothing of it: what was forgotten is there still.
    Refused,
}

impl ResetClaim {
    /// After a reset the engine's first batch says `Cleared`.
    fn applies(&mut self, batch: &EventBatch) {
        if *self != ResetClaim::None {
            let cleared = batch.events.contains(&KvEvent::Cleared);
            *self = if cleared { ResetClaim::None } else { ResetClaim::Refused };
        }
    }
}

/// What is remembered with a ticket.
#[derive(Debug, Default)]
struct InFlight {
    costed: Option<Costed>,
    expectation: Expectation,
    /// The first blocks of the prompt, as many as any endpoint promised.
    promised: Vec<BlockKey>,
    /// What the next best endpoints would be held to.
    alternatives: Vec<Alternative>,
    speculations: Vec<SpeculationId>,
    /// Endpoints that work before the answer starts.
    helpers: Vec<Charge>,
    answered: bool,
    reported: bool,
}

/// Another endpoint that may serve the request.
#[derive(Clone, Copy, Debug)]
struct Alternative {
    endpoint: EndpointId,
    expectation: Expectation,
    uncached_tokens: u32,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BrainCounters {
    /// Decisions, by `Reason::index()` of the chosen endpoint's knowledge; their sum is all
    /// decisions.
    pub decisions: [u64; Reason::ALL.len()],
    /// Candidates, by `Reason::index()` of the knowledge about them.
    pub candidates: [u64; Reason::ALL.len()],
    /// No endpoint: empty fleet, or none allowed.
    pub rejected_no_endpoints: u64,
    /// A filter removed the last candidate.
    pub rejected_saturated: u64,
    /// The router's own limit.
    pub rejected_in_flight: u64,
    /// Requests that waited for others.
    pub held: u64,
    /// Requests of negative priority while the fleet was full.
    pub rejected_shed: u64,
    /// Refused by an admitter.
    pub rejected_not_admitted: u64,
    /// The request named a profile that does not exist.
    pub rejected_no_profile: u64,
    /// Nothing of the prompt was cached, and the request prefers no answer then.
    pub rejected_not_cached: u64,
    /// Candidates passed over because they had just failed.
    pub avoided_failing: u64,
    /// Candidates passed over because they do not serve the model.
    pub avoided_model: u64,
    /// Scores for which a scorer had no data (metrics missing or stale).
    pub scores_missing: u64,
    /// Requests moved to another endpoint.
    pub redirected: u64,
    /// Failures reported by the host.
    pub endpoints_failed: u64,
    /// Scrapes that failed.
    pub scrapes_failed: u64,
    /// Caches emptied through the router.
    pub caches_reset: u64,
    /// Of those, resets that the engine had refused.
    pub resets_refused: u64,
    /// Tickets that nobody ended.
    pub tickets_expired: u64,
    /// Speculative entries made.
    pub speculations: u64,
    /// Endpoints whose events were put in doubt by the ledger.
    pub drifts: u64,
}

impl Brain {
    /// An empty fleet under a plan. The seed fixes every random choice.
    pub fn new(plan: Plan, seed: u64) -> Brain {
        let settings = &plan.settings;
        let precise = plan.precise_producer();
        let indexing = precise.is_some_and(|precise| precise.speculative_indexing);
        let ttl = precise.and_then(|precise| precise.speculative_ttl).map(|ttl| ttl.0);
        let pipelines = plan.profiles.iter().map(|p| Pipeline::new(p, settings)).collect();
        let screeners = plan.screeners.iter();
        let screeners = screeners.filter_map(|s| Guard::new(s, s.spec.parts().screener?, settings));
        let admitters = plan.admitters.iter();
        let admitters = admitters.filter_map(|s| Guard::new(s, s.spec.parts().admitter?, settings));
        let detector = plan.detector.as_ref();
        let detector = detector.and_then(|s| Guard::new(s, s.spec.parts().detector?, settings));
        let mut brain = Brain {
            speculative: settings.speculative.unwrap_or(indexing),
            speculative_ttl: ttl.unwrap_or(ms(settings.speculative_ttl_ms)),
            fleet: Fleet::default(),
            index: Index::new(plan.index_limits()),
            ledger: Ledger::new(settings),
            reservations: Reservations::new(settings.inflight_requests_max),
            costs: Costs::new(plan.reads_costs(), settings.inflight_blocks_max as usize),
            streams: Vec::new(),
            pipelines,
            screeners: screeners.collect(),
            admitters: admitters.collect(),
            detector,
            burst: plan.burst().map(|(_, parameters)| Burst::new(parameters.clone())),
            encoder_caches: plan.others.iter().map(|(_, spec)| caches_of(spec)).collect(),
            knowledge: Knowledge::default(),
            specs: ChainSpecs::default(),
            rng: Rng::seeded(seed),
            orders: Vec::new(),
            ending: VecDeque::new(),
            swept: Time::ZERO,
            counters: BrainCounters::default(),
            builtin: BuiltinStages {
                failing: Name::from("kvroute:failing"),
                model: Name::from("kvroute:model"),
            },
            recorder: None,
            spare: Spare::default(),
            ended: Vec::new(),
            plan,
        };
        brain.collect_specs();
        brain
    }

    /// From now on `recorder` hears every call that changes something, and what was answered. Set
    /// it before the first call: what went before cannot be replayed.
    pub fn set_recorder(&mut self, recorder: Option<Recorder>) {
        self.recorder = recorder;
    }

    /// Nothing is built for nobody.
    fn note<'a>(&mut self, entry: impl FnOnce() -> Entry<'a>) {
        if let Some(recorder) = &mut self.recorder
            && recorder(entry()).is_break()
        {
            self.recorder = None;
        }
    }

    /// What runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The endpoints and what is known about them.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Who holds which block.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Predicted and delivered hits.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Counts since the start.
    pub fn counters(&self) -> &BrainCounters {
        &self.counters
    }

    /// What is in flight on an endpoint.
    pub fn load(&self, id: EndpointId) -> Load {
        self.reservations.load(id)
    }

    /// How fast an endpoint is believed to be; what a plan with costs has learned.
    pub fn speed(&self, now: Time, id: EndpointId) -> Speed {
        self.costs.speed(now, id)
    }

    /// Requests in flight, over all endpoints.
    pub fn inflight_requests(&self) -> usize {
        self.reservations.len()
    }

    /// The state of an endpoint's event stream; `None` once it has left.
    pub fn stream_state(&self, id: EndpointId) -> Option<StreamState> {
        self.stream(id).map(|entry| entry.stream.state())
    }

    /// Number of the last batch of an endpoint's events that was applied; `None` before the first
    /// one, and once it has left.
    pub fn stream_last_seq(&self, id: EndpointId) -> Option<u64> {
        self.stream(id)?.stream.last_seq()
    }

    /// Counts about an endpoint's event stream; `None` once it has left.
    pub fn stream_counters(&self, id: EndpointId) -> Option<&StreamCounters> {
        self.stream(id).map(|entry| entry.stream.counters())
    }

    /// What an endpoint's events did to the index; `None` once it has left.
    pub fn stream_applied(&self, id: EndpointId) -> Option<&Applied> {
        self.stream(id).map(|entry| &entry.applied)
    }

    /// How many endpoints a profile's picker offers to proxies, the chosen one included; at least
    /// 1.
    pub fn endpoints_offered(&self, profile: &str) -> usize {
        let at = self.plan.profiles.iter().position(|known| known.name.as_str() == profile);
        at.and_then(|at| self.pipelines.get(at)).map_or(1, Pipeline::endpoints_max)
    }

    /// The chains that requests must come with now. Changes as block sizes are learned: ask for
    /// each request.
    pub fn chain_specs(&self) -> ChainSpecs {
        self.specs
    }

    /// How the chains of a request for a model are rooted.
    pub fn root_of(&self, model: &str) -> RootKind {
        self.fleet.root_of(model)
    }

    /// An endpoint has been discovered.
    pub fn add_endpoint(
        &mut self,
        now: Time,
        spec: EndpointSpec,
    ) -> Result<EndpointId, FleetError> {
        self.note(|| Entry::Call(Call::AddEndpoint { now, spec: Cow::Borrowed(&spec) }));
        let added = self.admit(spec);
        self.note(|| Entry::Added(added.as_ref().ok().copied()));
        added
    }

    fn admit(&mut self, spec: EndpointSpec) -> Result<EndpointId, FleetError> {
        let settings = &self.plan.settings;
        let limits = StreamLimits {
            replay_available: spec.replay_available,
            held_batches_max: settings.stream_held_batches_max,
            replay_cooldown: ms(settings.replay_cooldown_ms),
        };
        let id = self.fleet.add(spec, settings.endpoints_max)?;
        self.index.add_endpoint(id);
        self.ledger.open(id);
        let slot = usize::from(id.slot);
        if self.streams.len() <= slot {
            self.streams.resize_with(slot + 1, || None);
        }
        let stream = Stream::new(limits);
        let generation = id.generation;
        self.streams[slot] = Some(EndpointStream {
            generation,
            stream,
            applied: Applied::default(),
            waiting: Waiting::default(),
            reset: ResetClaim::None,
        });
        self.collect_specs();
        Ok(id)
    }

    /// An endpoint has gone: nothing about it remains, but its share of the fleet's sums.
    pub fn remove_endpoint(&mut self, now: Time, id: EndpointId) {
        self.note(|| Entry::Call(Call::RemoveEndpoint { now, id }));
        if !self.fleet.remove(id) {
            return;
        }
        self.index.remove_endpoint(id);
        self.ledger.close(id);
        self.reservations.forget(id);
        self.costs.forget(id);
        self.streams[usize::from(id.slot)] = None;
        if let Some(burst) = &mut self.burst {
            burst.forget(id);
        }
        self.encoder_caches.iter_mut().flatten().for_each(|caches| caches.forget(id));
        self.pipelines.iter_mut().for_each(|pipeline| pipeline.forget(id));
        self.screeners.iter_mut().for_each(|screener| screener.plugin.forget(id));
        self.orders.retain(|(of, _)| *of != id);
        self.collect_specs();
    }

    /// A scrape succeeded.
    pub fn on_metrics(&mut self, now: Time, id: EndpointId, metrics: &EngineMetrics) {
        let recorded = Cow::Borrowed(metrics);
        self.note(|| Entry::Call(Call::OnMetrics { now, id, metrics: recorded }));
        let block_size = |fleet: &Fleet| fleet.get(id).and_then(|endpoint| endpoint.block_size());
        let before = block_size(&self.fleet);
        self.fleet.on_metrics(now, id, metrics);
        if block_size(&self.fleet) != before {
            self.collect_specs();
        }
    }

    /// A scrape failed. Signals go stale by their age, not by this.
    pub fn on_scrape_failed(&mut self, now: Time, id: EndpointId) {
        self.note(|| Entry::Call(Call::OnScrapeFailed { now, id }));
        self.counters.scrapes_failed += 1;
        self.fleet.on_scrape_failed(id);
    }

    /// A producer told numbers about an endpoint, each with its key; they hold for `valid_for`.
    /// What is no number ends what was told under its key.
    pub fn on_attributes(
        &mut self,
        now: Time,
        id: EndpointId,
        producer: &str,
        values: &[(String, f64)],
        valid_for: Duration,
    ) {
        self.note(|| {
            let (producer, values) = (Cow::Borrowed(producer), Cow::Borrowed(values));
            Entry::Call(Call::OnAttributes { now, id, producer, values, valid_for })
        });
        self.fleet.on_attributes(now, id, producer, values, valid_for);
    }

    /// An endpoint listed its models.
    pub fn on_models(&mut self, id: EndpointId, models: Vec<ServedModel>) {
        self.note(|| Entry::Call(Call::OnModels { id, models: Cow::Borrowed(&models) }));
        self.fleet.on_models(id, models);
    }

    /// The endpoint refused or reset a connection: others go first for a while.
    pub fn on_endpoint_failed(&mut self, now: Time, id: EndpointId) {
        self.note(|| Entry::Call(Call::OnEndpointFailed { now, id }));
        self.counters.endpoints_failed += 1;
        self.fleet.on_failed(now, id, &self.plan.settings);
    }

    /// A request to empty the endpoint's cache passed through and was answered with success: what
    /// was known is void, the routing history and requests on their way included. vLLM answers
    /// 200 also when it refuses, because blocks are in use; its next batch tells, see
    /// [`Brain::on_stream`].
    pub fn on_cache_reset(&mut self, now: Time, id: EndpointId) {
        self.note(|| Entry::Call(Call::OnCacheReset { now, id }));
        if self.fleet.get(id).is_some() {
            self.counters.caches_reset += 1;
            self.index.remove_endpoint(id);
            self.index.add_endpoint(id);
            if let Some(Some(entry)) = self.streams.get_mut(usize::from(id.slot)) {
                entry.reset = ResetClaim::Open;
                entry.waiting.forget();
            }
        }
    }

    /// Something came from an endpoint's event stream, or about it. The answer is what the host
    /// must do. After a cache reset the first batch says `Cleared`; when it does not, the engine
    /// refused the reset, and what was forgotten is learned again.
    pub fn on_stream(&mut self, now: Time, id: EndpointId, input: StreamInput) -> StreamOrder {
        self.note(|| Entry::Call(Call::OnStream { now, id, input: Cow::Borrowed(&input) }));
        self.apply_waiting(id, Room::for_all());
        self.hear(now, id, input, Room::for_all())
    }

    /// As [`Brain::on_stream`], also for what the brain tells itself, as far as there is room.
    fn hear(
        &mut self,
        now: Time,
        id: EndpointId,
        input: StreamInput,
        mut room: Room,
    ) -> StreamOrder {
        let slot = usize::from(id.slot);
        let entry = self.streams.get_mut(slot).and_then(Option::as_mut);
        let Some(entry) = entry.filter(|entry| entry.generation == id.generation) else {
            return StreamOrder::None;
        };
        let EndpointStream { stream, applied, reset, waiting, .. } = entry;
        let (index, ledger) = (&mut self.index, &mut self.ledger);
        let order = stream.on(now, input, &mut |effect| match effect {
            StreamEffect::Apply(batch) => {
                reset.applies(batch);
                index.prefetch(batch.events.iter().take(SLICE_BLOCKS_MAX));
                waiting.apply(batch, &mut room, |event| index.apply_to(id, event, applied));
            }
            StreamEffect::Reset => {
                *reset = ResetClaim::None;
                waiting.forget();
                index.clear_resident(id);
            }
        });
        let state = stream.state();
        // While a replay is under way, what comes next may tell otherwise.
        let refused = *reset == ResetClaim::Refused && state != StreamState::Replaying;
        if refused {
            *reset = ResetClaim::None;
        }
        // A doubt of the ledger ends when the stream has cured it in another way.
        let drifting = state == StreamState::Suspect(SuspectReason::Drift);
        if ledger.in_doubt(id) && !drifting && state != StreamState::Replaying {
            ledger.settled(id);
        }
        if self.fleet.on_block_size(id, self.index.block_size(id)) {
            self.collect_specs();
        }
        if refused {
            self.counters.resets_refused += 1;
            return self.hear(now, id, StreamInput::Drift, Room::for_all());
        }
        order
    }

    /// A response said something about itself. Unknown and ended tickets are ignored.
    pub fn on_response(&mut self, now: Time, ticket: Ticket, event: ResponseEvent) {
        self.note(|| Entry::Call(Call::OnResponse { now, ticket, event }));
        match event {
            ResponseEvent::FirstChunk => self.on_first_chunk(now, ticket),
            ResponseEvent::Usage { prompt_tokens, cached_tokens, completion_tokens } => {
                self.on_usage(now, ticket, prompt_tokens, cached_tokens, completion_tokens);
            }
            ResponseEvent::End { status } => {
                self.on_end(now, ticket, (200..300).contains(&status));
            }
            ResponseEvent::Aborted => self.on_end(now, ticket, false),
        }
    }

    fn on_first_chunk(&mut self, now: Time, ticket: Ticket) {
        let Some((endpoint, inflight)) = self.reservations.touch(now, ticket) else { return };
        if std::mem::replace(&mut inflight.answered, true) {
            return;
        }
        let until = now + ms(self.plan.settings.speculative_grace_ms);
        self.ending.extend(inflight.speculations.drain(..).map(|id| (until, id)));
        if let Some(costed) = &mut inflight.costed {
            self.costs.first_token(now, endpoint, costed);
        }
        let helpers = std::mem::take(&mut inflight.helpers);
        helpers.iter().for_each(|charge| self.reservations.discharge(charge));
        self.reservations.release_prompt(ticket);
        self.fleet.on_answered(endpoint);
    }

    fn on_usage(
        &mut self,
        now: Time,
        ticket: Ticket,
        prompt_tokens: u32,
        cached_tokens: Option<u32>,
        completion_tokens: u32,
    ) {
        let Some((endpoint, inflight)) = self.reservations.touch(now, ticket) else { return };
        if let Some(costed) = &mut inflight.costed {
            self.costs.usage(costed, completion_tokens);
        }
        // vLLM before 0.30 leaves the field out when nothing was cached; an engine that has told
        // cached tokens before means zero.
        let told = self.ledger.account(endpoint).reported.requests > 0;
        let Some(cached_tokens) = cached_tokens.or(told.then_some(0)) else { return };
        if std::mem::replace(&mut inflight.reported, true) {
            return;
        }
        let expectation = inflight.expectation;
        let missing = (cached_tokens / expectation.block_size.max(1)) as usize;
        let lost = inflight
            .promised
            .get(missing)
            .is_some_and(|key| self.index.may_have_lost(endpoint, *key, expectation.removals));
        // An answer of one token ends before the events of its own step can arrive.
        let early = completion_tokens <= 1 && expectation.concurrent;
        let conclusion = self.ledger.delivered(
            endpoint,
            &expectation,
            prompt_tokens,
            cached_tokens,
            lost || early,
        );
        let input = match conclusion {
            None => return,
            Some(Conclusion::Drift) => {
                self.counters.drifts += 1;
                StreamInput::Drift
            }
            Some(Conclusion::Agrees) => StreamInput::Agrees,
        };
        let order = self.hear(now, endpoint, input, Room::for_all());
        self.push_order(endpoint, order);
    }

    fn on_end(&mut self, now: Time, ticket: Ticket, succeeded: bool) {
        let Some((endpoint, inflight)) = self.reservations.end(ticket) else { return };
        self.settle(now, endpoint, inflight, succeeded);
    }

    fn settle(&mut self, now: Time, endpoint: EndpointId, mut inflight: InFlight, succeeded: bool) {
        let InFlight { speculations, reported, answered, costed, helpers, .. } = &mut inflight;
        helpers.iter().for_each(|charge| self.reservations.discharge(charge));
        if let Some(costed) = costed.take() {
            self.costs.end(now, endpoint, costed, succeeded);
        }
        if succeeded && *answered {
            let until = now + ms(self.plan.settings.speculative_grace_ms);
            self.ending.extend(speculations.drain(..).map(|id| (until, id)));
        } else {
            speculations.drain(..).for_each(|id| self.index.withdraw(id));
        }
        if succeeded && !*reported {
            self.ledger.unreported(endpoint);
        }
        if self.ended.len() < ENDED_MAX && inflight.promised.capacity() <= ENDED_KEYS_MAX {
            self.ended.push(inflight);
        }
    }

    /// The host tries another endpoint: what was reserved moves there. Speculative residency ends,
    /// because the first endpoint will not fill those blocks.
    pub fn redirect(&mut self, now: Time, ticket: Ticket, to: EndpointId) {
        self.note(|| Entry::Call(Call::Redirect { now, ticket, to }));
        let known = self.fleet.get(to).is_some();
        let Some((from, inflight)) = self.reservations.touch(now, ticket) else { return };
        if from == to || !known {
            return;
        }
        let found = inflight.alternatives.iter().find(|other| other.endpoint == to).copied();
        let alternative = found.unwrap_or(Alternative {
            endpoint: to,
            expectation: Expectation {
                chosen_tokens: 0,
                promised_tokens: None,
                ..inflight.expectation
            },
            uncached_tokens: inflight.expectation.prompt_tokens,
        });
        inflight.expectation = alternative.expectation;
        inflight.answered = false;
        if let Some(costed) = &mut inflight.costed {
            self.costs.redirect(now, to, alternative.uncached_tokens, costed);
        }
        for id in std::mem::take(&mut inflight.speculations) {
            self.index.withdraw(id);
        }
        self.counters.redirected += 1;
        self.reservations.redirect(ticket, to, alternative.uncached_tokens);
    }

    /// Time passes: what is due ends. Call it about ten times a second, and carry out the orders
    /// that it returns: they come from the passing of time and from the ledger.
    #[must_use = "orders ask the host to replay event streams"]
    pub fn tick(&mut self, now: Time) -> Vec<(EndpointId, StreamOrder)> {
        self.note(|| Entry::Call(Call::Tick { now }));
        self.index.expire(now);
        while let Some((until, id)) = self.ending.front().copied()
            && until <= now
        {
            self.ending.pop_front();
            self.index.withdraw(id);
        }
        if now.since(self.swept) >= TICKETS_SWEEP {
            self.swept = now;
            let age_max = Duration::from_secs(self.plan.settings.inflight_age_max_s.into());
            for (endpoint, inflight) in self.reservations.expire(now, age_max) {
                self.counters.tickets_expired += 1;
                self.settle(now, endpoint, inflight, false);
            }
        }
        let ids: Vec<EndpointId> = self.fleet.iter().map(|endpoint| endpoint.id).collect();
        for id in ids {
            let order = self.hear(now, id, StreamInput::Tick, Room::for_all());
            self.push_order(id, order);
        }
        std::mem::take(&mut self.orders)
    }

    fn push_order(&mut self, id: EndpointId, order: StreamOrder) {
        if !matches!(order, StreamOrder::None) {
            self.orders.retain(|(of, _)| *of != id);
            self.orders.push((id, order));
        }
    }

    fn stream(&self, id: EndpointId) -> Option<&EndpointStream> {
        let entry = self.streams.get(usize::from(id.slot))?.as_ref()?;
        (entry.generation == id.generation).then_some(entry)
    }

    fn collect_specs(&mut self) {
        self.specs = ChainSpecs::needed(&self.plan, &self.fleet);
    }
}
