//! The state of a run, its queue of events, and what each event does.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use kvroute_core::brain::Brain;
use kvroute_core::decision::{Decision, Reject};
use kvroute_core::index::{Hits, IndexLimits};
use kvroute_core::settings::Settings;
use kvroute_core::{EndpointId, Rng, Time};
use xxhash_rust::xxh3::Xxh3;

use super::engine::Held;
use super::fleet::Host;
use super::flight::{Flight, FlightNo};
use super::plans::{self, Drawn};
use super::prompts::Pool;
use super::{ChaosFailure, ChaosReport, Checked, RECENT_MAX, Sabotage, Violation};

/// Between two ticks of the router, as in the live one.
const TICK_MS: u64 = 100;
/// The same once the faults have stopped: there is less to do.
const TICK_CALM_MS: u64 = 250;

/// Something that will happen.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// A client sends a request.
    Arrive,
    /// A request is tokenized.
    Decide(FlightNo),
    /// A request reaches its endpoint.
    Attempt(FlightNo),
    /// A connection to the endpoint could not be made in time.
    ConnectTimeout { flight: FlightNo, attempts: u32 },
    /// The client leaves.
    ClientGone(FlightNo),
    /// An answer is looked at: does it still come?
    Deadline(FlightNo),
    /// The last byte of an answer comes.
    Finish(FlightNo),
    /// An engine's step is over.
    StepEnd { host: usize, run: u64 },
    /// An engine starts again.
    Restart(usize),
    /// An endpoint comes back into the fleet.
    Rejoin(usize),
    /// A subscriber tries to connect.
    Connect { host: usize, id: EndpointId },
    /// The publisher has taken note of a subscription.
    Subscribed { host: usize, id: EndpointId, connection: u64 },
    /// A connection ends.
    LinkLost { host: usize, id: EndpointId, connection: u64 },
    /// The next message of a link arrives.
    Deliver { host: usize, id: EndpointId, connection: u64 },
    /// Messages of an earlier connection turn up.
    Late { host: usize, id: EndpointId, connection: u64 },
    /// The next item of a replay arrives.
    ReplayNext { host: usize, id: EndpointId, replay: u64 },
    /// An order that a tick gave is picked up.
    Mailbox { host: usize, id: EndpointId },
    /// An endpoint's metrics are read.
    Scrape { host: usize, id: EndpointId },
    /// Time passes in the brain.
    Tick,
    /// Something goes wrong.
    Fault,
}

/// Calls of the brain that it counts itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Calls {
    pub decided: u64,
    pub rejected: u64,
    pub endpoints_failed: u64,
    pub scrapes_failed: u64,
    pub caches_reset: u64,
    pub redirected: u64,
    pub expired: u64,
}

/// Everything.
pub(super) struct World {
    seed: u64,
    steps: u32,
    trace: bool,
    pub sabotage: Option<Sabotage>,
    /// Counts the occasions for sabotage.
    pub occasions: u64,
    pub rng: Rng,
    pub now: Time,
    /// When the current event was planned for; `now` is later after a jump of the clock.
    pub planned: Time,
    pub plan_name: &'static str,
    pub brain: Brain,
    pub settings: Settings,
    pub limits: IndexLimits,
    pub reads_events: bool,
    queue: BTreeMap<(Time, u64), Event>,
    order: u64,
    pub hosts: Vec<Host>,
    hosts_max: usize,
    pub flights: BTreeMap<FlightNo, Flight>,
    pub flights_begun: FlightNo,
    pub pool: Pool,
    /// What each process held after each batch it published.
    pub states: BTreeMap<(u64, u64), Rc<Held>>,
    pub runs: u64,
    /// Endpoints that have left.
    pub gone: Vec<EndpointId>,
    pub calls: Calls,
    pub outcomes: BTreeMap<&'static str, u64>,
    pub faults: BTreeMap<&'static str, u64>,
    pub seen: BTreeMap<String, u64>,
    digest: Xxh3,
    /// Faults have stopped.
    pub calm: bool,
    pub step: u32,
    pub touched: Vec<usize>,
    pub ticks_blocked_until: Time,
    pub compared_exactly: u64,
    pub hits: Hits,
    journal: VecDeque<String>,
}

impl World {
    pub fn new(seed: u64, steps: u32, trace: bool, sabotage: Option<Sabotage>) -> World {
        let mut rng = Rng::seeded(seed);
        let Drawn { name, plan } = plans::draw(&mut rng);
        let (settings, limits) = (plan.settings.clone(), plan.index_limits());
        let reads_events = plan.reads_events();
        let pool = Pool::new(&mut rng);
        World {
            seed,
            steps,
            trace,
            sabotage,
            occasions: 0,
            brain: Brain::new(plan, rng.next_u64()),
            rng,
            now: Time::ZERO,
            planned: Time::ZERO,
            plan_name: name,
            settings,
            limits,
            reads_events,
            queue: BTreeMap::new(),
            order: 0,
            hosts: Vec::new(),
            hosts_max: 0,
            flights: BTreeMap::new(),
            flights_begun: 0,
            pool,
            states: BTreeMap::new(),
            runs: 0,
            gone: Vec::new(),
            calls: Calls::default(),
            outcomes: BTreeMap::new(),
            faults: BTreeMap::new(),
            seen: BTreeMap::new(),
            digest: Xxh3::new(),
            calm: false,
            step: 0,
            touched: Vec::new(),
            ticks_blocked_until: Time::ZERO,
            compared_exactly: 0,
            hits: Hits::new(),
            journal: VecDeque::new(),
        }
    }

    /// The whole run.
    pub fn run(&mut self) -> Checked {
        let hosts = 2 + self.rng.below(4);
        for at in 0..hosts {
            self.found(at);
        }
        self.hosts_max = hosts;
        for host in 0..hosts {
            self.join(host);
        }
        self.after_ms(5, Event::Arrive);
        self.after_ms(TICK_MS, Event::Tick);
        self.after_ms(300, Event::Fault);
        while self.step < self.steps {
            self.next()?;
        }
        self.settle()
    }

    /// The next event, and a look at everything after it.
    pub fn next(&mut self) -> Checked {
        let Some(((planned, _), event)) = self.queue.pop_first() else { return Ok(()) };
        self.step += 1;
        self.planned = planned;
        self.now = self.now.max(planned);
        self.touched.clear();
        self.handle(event)?;
        self.check()
    }

    /// Events until a time.
    pub fn run_until(&mut self, until: Time) -> Checked {
        while self.queue.first_key_value().is_some_and(|((at, _), _)| *at <= until) {
            self.next()?;
        }
        self.now = self.now.max(until);
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Arrive => self.arrive(),
            Event::Decide(no) => self.decide(no),
            Event::Attempt(no) => self.attempt(no),
            Event::ConnectTimeout { flight, attempts } => self.connect_timeout(flight, attempts),
            Event::ClientGone(no) => self.client_gone(no),
            Event::Deadline(no) => self.deadline(no),
            Event::Finish(no) => self.finish(no),
            Event::StepEnd { host, run } => self.step_end(host, run),
            Event::Restart(host) => self.restart(host),
            Event::Rejoin(host) => {
                self.rejoin(host);
                Ok(())
            }
            Event::Connect { host, id } => self.connect(host, id),
            Event::Subscribed { host, id, connection } => {
                self.subscribed(host, id, connection);
                Ok(())
            }
            Event::LinkLost { host, id, connection } => self.link_lost(host, id, connection),
            Event::Deliver { host, id, connection } => self.deliver(host, id, connection),
            Event::Late { host, id, connection } => {
                self.late(host, id, connection);
                Ok(())
            }
            Event::ReplayNext { host, id, replay } => self.replay_next(host, id, replay),
            Event::Mailbox { host, id } => self.mailbox(host, id),
            Event::Scrape { host, id } => {
                self.scrape(host, id);
                Ok(())
            }
            Event::Tick => self.tick(),
            Event::Fault => self.fault(),
        }
    }

    fn tick(&mut self) -> Checked {
        let blocked = self.ticks_blocked_until;
        if self.now < blocked {
            self.at(blocked, Event::Tick);
            return Ok(());
        }
        self.after_ms(if self.calm { TICK_CALM_MS } else { TICK_MS }, Event::Tick);
        let orders = self.brain.tick(self.now);
        self.expire_flights()?;
        for (id, order) in orders {
            self.note(format!("tick orders {order:?} for {id:?}"));
            self.post(id, order)?;
        }
        Ok(())
    }

    // --- time

    pub fn at(&mut self, time: Time, event: Event) {
        self.order += 1;
        self.queue.insert((time, self.order), event);
    }

    pub fn after(&mut self, wait: Duration, event: Event) {
        self.at(self.now + wait, event);
    }

    pub fn after_ms(&mut self, ms: u64, event: Event) {
        self.after(Duration::from_millis(ms), event);
    }

    /// A number of milliseconds at random, both ends included.
    pub fn ms(&mut self, least: u64, most: u64) -> u64 {
        least + self.rng.below((most - least + 1) as usize) as u64
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.rng.below(n) == 0
    }

    /// Whether sabotage of this kind strikes now: every so many occasions.
    pub fn sabotaged(&mut self, sabotage: Sabotage, every: u64) -> bool {
        if self.sabotage != Some(sabotage) {
            return false;
        }
        self.occasions += 1;
        self.occasions.is_multiple_of(every)
    }

    // --- what is told about the run

    pub fn note(&mut self, line: String) {
        if !self.trace && self.journal.len() == RECENT_MAX {
            self.journal.pop_front();
        }
        self.journal.push_back(format!("{:>5} {:>10.4} {line}", self.step, self.now.as_secs_f64()));
    }

    pub fn saw(&mut self, what: &str) {
        match self.seen.get_mut(what) {
            Some(count) => *count += 1,
            None => _ = self.seen.insert(what.to_owned(), 1),
        }
    }

    pub fn digest_decision(&mut self, decided: &Result<Decision, Reject>) {
        match decided {
            Ok(decision) => {
                let record = serde_json::to_vec(&decision.record);
                self.digest.update(&record.expect("a record has string keys only"));
            }
            Err(reject) => self.digest.update(reject.to_string().as_bytes()),
        }
    }

    pub fn digest_outcome(&mut self, no: FlightNo, outcome: &str) {
        self.digest.update(&no.to_le_bytes());
        self.digest.update(&self.now.0.to_le_bytes());
        self.digest.update(outcome.as_bytes());
    }

    pub fn report(self) -> ChaosReport {
        let mut seen = self.seen;
        for (name, count) in [
            ("tickets expired", self.brain.counters().tickets_expired),
            ("resets refused", self.brain.counters().resets_refused),
            ("resident blocks driven out", self.brain.index().usage().evicted.resident),
            ("redirects", self.brain.counters().redirected),
            ("drifts", self.brain.counters().drifts),
        ] {
            *seen.entry(name.to_owned()).or_insert(0) += count;
        }
        ChaosReport {
            seed: self.seed,
            steps: self.step,
            plan: self.plan_name,
            engines: self.hosts_max,
            virtual_ms: self.now.0 / 1_000_000,
            outcomes: self.outcomes,
            faults: self.faults,
            seen,
            compared_exactly: self.compared_exactly,
            digest: self.digest.digest(),
            trace: if self.trace { self.journal.into() } else { Vec::new() },
        }
    }

    pub fn failure(self, violation: Violation) -> ChaosFailure {
        ChaosFailure {
            seed: self.seed,
            steps: self.steps,
            plan: self.plan_name,
            step: self.step,
            at_s: self.now.as_secs_f64(),
            invariant: violation.invariant,
            detail: violation.detail,
            recent: self.journal.into(),
        }
    }
}
