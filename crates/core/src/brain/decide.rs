//! One decision, from the candidates to the profiles that choose among them.

use std::borrow::Cow;

use super::Brain;
use super::handle::Course;
use crate::admit::{is_shed, is_sheddable};
use crate::blocks::TokenSpace;
use crate::cost::Costing;
use crate::decision::{
    Decision, DecisionRecord, NoEndpoints, PREFER_HEADER, Reason, Reject, Request, TokensKnown,
};
use crate::detect::saturation_by_stage;
use crate::fleet::{Endpoint, EndpointId, Name};
use crate::journal::{Call, Entry};
use crate::knowledge::{Known, Sources};
use crate::pipeline::{Inputs, Survivors};
use crate::plugin::PluginSpec;
use crate::produce::{Held, HeldId, uncached_tokens};
use crate::refill::refill;
use crate::score::AGENT_IDENTITY;
use crate::stage::{Latency, MediaMatch, PrefixMatch, Row};
use crate::stream::StreamState;
use crate::{Rng, Time};

/// The preference (RFC 7240) for an answer from cache alone.
const IF_AVAILABLE: &str = "if-available";

/// What was concluded about a request, before anything comes of it.
pub(super) struct Considered {
    /// Every candidate, by name.
    pub rows: Vec<Row>,
    /// Who does which part of the work.
    pub course: Course,
    /// Seed of the random choices.
    pub seed: u64,
    pub sessions: Vec<(Name, String)>,
}

impl Brain {
    /// Chooses an endpoint, and reserves load and speculative residency there before it returns.
    pub fn decide(&mut self, now: Time, request: &Request<'_>) -> Result<Decision, Reject> {
        self.decide_in(now, request, DecisionRecord::default())
    }

    /// As [`Brain::decide`], with the memory of a record that nobody needs any more: what it says
    /// is lost, and what it owns is used again.
    pub fn decide_in(
        &mut self,
        now: Time,
        request: &Request<'_>,
        memory: DecisionRecord,
    ) -> Result<Decision, Reject> {
        self.note(|| Entry::Call(Call::decide(now, request)));
        let seed = self.rng.next_u64();
        let considered = match self.reservations.is_full() {
            true => {
                let requests_max = self.plan.settings.inflight_requests_max;
                Err(Reject::TooManyInFlight { requests_max })
            }
            false => self.consider(now, request, seed),
        };
        let decided = considered.map(|considered| self.commit(now, request, considered, memory));
        self.count(&decided);
        self.note(|| Entry::Decided(Cow::Borrowed(&decided)));
        decided
    }

    /// Whether a request must wait for others before it is decided, and until when. The host then
    /// decides with `Request::held`, or says [`Brain::leave`] when the client has gone.
    pub fn hold(&mut self, now: Time, request: &Request<'_>) -> Option<Held> {
        let (_, parameters) = self.plan.burst()?;
        let space = match request.tokens_known {
            TokensKnown::Exact => TokenSpace::Exact,
            TokensKnown::Estimated => TokenSpace::Estimated,
            TokensKnown::None(_) => return None,
        };
        let spec = parameters.chain_spec(space);
        self.note(|| Entry::Call(Call::hold(now, request)));
        let chains = request.prompts.iter().filter_map(|prompt| prompt.get(spec));
        let joined = self.burst.as_mut()?.join(now, chains.map(|chain| &chain.keys[..]));
        self.counters.held += u64::from(joined.is_ok());
        joined.ok()
    }

    /// A held request is gone before it was decided.
    pub fn leave(&mut self, id: HeldId) {
        self.note(|| Entry::Call(Call::Leave { id }));
        if let Some(burst) = &mut self.burst {
            burst.leave(id);
        }
    }

    fn count(&mut self, decided: &Result<Decision, Reject>) {
        let counters = &mut self.counters;
        match decided {
            Ok(decision) => counters.decisions[decision.record.reason.index()] += 1,
            Err(Reject::NoEndpoints { .. } | Reject::Screened { .. }) => {
                counters.rejected_no_endpoints += 1;
            }
            Err(Reject::Saturated { .. }) => counters.rejected_saturated += 1,
            Err(Reject::TooManyInFlight { .. }) => counters.rejected_in_flight += 1,
            Err(Reject::Shed) => counters.rejected_shed += 1,
            Err(Reject::NotAdmitted { .. }) => counters.rejected_not_admitted += 1,
            Err(Reject::NoProfile { .. }) => counters.rejected_no_profile += 1,
            Err(Reject::NotCached { .. }) => counters.rejected_not_cached += 1,
        }
    }

    /// Everything that leads to a decision: it changes scratch memory only.
    fn consider(
        &mut self,
        now: Time,
        request: &Request<'_>,
        seed: u64,
    ) -> Result<Considered, Reject> {
        let mut rng = Rng::seeded(seed);
        let mut base = self.collect_rows(now, request)?;
        let sessions = self.sessions(request);
        self.fill_knowledge(now, request, &base.rows);
        self.charge_rows(now, request, &mut base.rows);
        let columns = std::mem::take(&mut self.knowledge.columns);
        let media = self.media_columns(request, &base.rows);
        let asked = Asked { now, request, columns: &columns, media: &media, sessions: &sessions };
        let course = self.choose_course(&asked, &mut rng, base);
        (self.knowledge.columns, self.spare.media) = (columns, media);
        let mut course = course?;
        let rows = course.primary.survivors.take_all();
        Ok(Considered { rows, course, seed, sessions })
    }

    /// Admission, screening, profiles.
    fn choose_course(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        mut base: Survivors,
    ) -> Result<Course, Reject> {
        self.shed(asked, &base.rows)?;
        self.remove_other_models(asked.request, &mut base);
        self.screen(asked, rng, &mut base)?;
        self.admit_request(asked, rng, &base.rows)?;
        let with_failing = self.remove_failing(asked.now, &mut base);
        let course = match (self.run_handler(asked, rng, base), with_failing) {
            // Those that do not fail cannot serve it: one that failed a moment ago perhaps can.
            (Err(Reject::Saturated { .. }), Some(all)) => self.run_handler(asked, rng, all),
            (course, unused) => {
                self.spare.survivors.extend(unused);
                course
            }
        }?;
        self.check_preference(asked, &course)?;
        let outcomes = course.others.iter().filter_map(|other| other.outcome.as_ref().ok());
        let missing = outcomes.map(|outcome| outcome.scores_missing).sum::<u32>();
        self.counters.scores_missing += u64::from(course.primary.outcome.scores_missing + missing);
        Ok(course)
    }

    /// A request may prefer no answer to one that must be computed from the start: a coordinator
    /// asks so whether a decode endpoint alone will do.
    fn check_preference(&self, asked: &Asked<'_>, course: &Course) -> Result<(), Reject> {
        let preferred = asked.request.headers.get(PREFER_HEADER).unwrap_or_default();
        let mut preferences = preferred.split(',').map(str::trim);
        let chosen = course.primary.chosen();
        let mut rows = course.primary.survivors.rows.iter();
        let found = rows.find(|row| row.id == chosen).and_then(|row| self.main_match(asked, row));
        let is_cached = found.is_some_and(|found| found.blocks > 0);
        match preferences.any(|one| one.eq_ignore_ascii_case(IF_AVAILABLE)) && !is_cached {
            true => Err(Reject::NotCached { endpoint: self.name(chosen) }),
            false => Ok(()),
        }
    }

    /// What the main producer finds on a candidate.
    pub(super) fn main_match(&self, asked: &Asked<'_>, row: &Row) -> Option<PrefixMatch> {
        let column = self.plan.producer_main.and_then(|at| asked.columns.get(at))?;
        column.prefix.get(row.at as usize).copied()
    }

    /// A request of negative priority gives way when the fleet is full.
    fn shed(&self, asked: &Asked<'_>, rows: &[Row]) -> Result<(), Reject> {
        let priority = asked.request.priority;
        let Some(detector) = self.detector.as_ref().filter(|_| is_sheddable(priority)) else {
            return Ok(());
        };
        let inputs = asked.inputs(&self.fleet, None);
        let view = inputs.view(rows, detector.wants());
        let saturation = saturation_by_stage(&*detector.plugin, &view);
        if is_shed(priority, saturation) { Err(Reject::Shed) } else { Ok(()) }
    }

    /// Admitters have their say about every request, and about the endpoints that screeners leave.
    fn admit_request(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        rows: &[Row],
    ) -> Result<(), Reject> {
        let inputs = asked.inputs(&self.fleet, None);
        for admitter in &self.admitters {
            let view = inputs.view(rows, admitter.wants());
            if let Err(why) = admitter.plugin.admit(&view, rng) {
                return Err(Reject::NotAdmitted { admitter: admitter.name.clone(), why });
            }
        }
        Ok(())
    }

    fn screen(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        base: &mut Survivors,
    ) -> Result<(), Reject> {
        let keep = &mut self.spare.keep;
        for screener in &mut self.screeners {
            let candidates = base.rows.len() as u32;
            keep.clear();
            keep.resize(base.rows.len(), true);
            let inputs = asked.inputs(&self.fleet, None);
            let wants = screener.wants();
            screener.plugin.filter(&inputs.view(&base.rows, wants), rng, keep);
            base.retain(&screener.name, |at, _| keep[at]);
            if base.rows.is_empty() {
                return Err(Reject::Screened { screener: screener.name.clone(), candidates });
            }
        }
        Ok(())
    }

    /// The sessions that the plan's producers find in the request.
    fn sessions(&self, request: &Request<'_>) -> Vec<(Name, String)> {
        let found = self.plan.others.iter().filter_map(|(name, spec)| match spec {
            PluginSpec::SessionIdProducer(producer) => {
                Some((name.clone(), producer.session(request.headers)?))
            }
            PluginSpec::AgentIdentity(identity) => {
                let id = identity.session(request.headers)?;
                Some((Name::from(AGENT_IDENTITY), id.to_owned()))
            }
            _ => None,
        });
        found.collect()
    }

    /// Which of the request's items each candidate holds encoded, by position in `Plan::others`.
    fn media_columns(&mut self, request: &Request<'_>, rows: &[Row]) -> Vec<Vec<MediaMatch>> {
        let mut columns = std::mem::take(&mut self.spare.media);
        refill(&mut columns, self.encoder_caches.iter(), |column, caches| {
            column.clear();
            if let Some(caches) = caches {
                column.extend(rows.iter().map(|row| caches.matches(row.id, request.media)));
            }
        });
        columns
    }

    /// Every endpoint that the request allows, by name.
    fn collect_rows(&mut self, now: Time, request: &Request<'_>) -> Result<Survivors, Reject> {
        let mut base = self.spare.survivors.pop().unwrap_or_default();
        let staleness = self.plan.settings.metrics_staleness();
        let allowed = |id: &EndpointId| request.allowed.is_none_or(|ids| ids.contains(id));
        let candidates = self.fleet.iter().filter(|endpoint| allowed(&endpoint.id));
        base.begin((0u32..).zip(candidates).map(|(at, endpoint)| Row {
            id: endpoint.id,
            at,
            signals: endpoint.signals(now, staleness),
            inflight: self.reservations.load(endpoint.id),
            uncached_tokens: request.prompt_tokens,
            costing: Costing::default(),
            latency: None,
        }));
        if !base.rows.is_empty() {
            return Ok(base);
        }
        let empty = self.fleet.is_empty();
        let why = if empty { NoEndpoints::EmptyFleet } else { NoEndpoints::NoneAllowed };
        Err(Reject::NoEndpoints { why })
    }

    fn fill_knowledge(&mut self, now: Time, request: &Request<'_>, rows: &[Row]) {
        let assigned = request.held.and_then(|id| self.burst.as_mut()?.assignment(now, id, rows));
        let (streams, ledger) = (&self.streams, &self.ledger);
        let state_of = |id: EndpointId| {
            let entry = streams.get(usize::from(id.slot)).and_then(Option::as_ref);
            entry.map_or(StreamState::Initial, |entry| entry.stream.state())
        };
        let sources = Sources {
            request,
            fleet: &self.fleet,
            index: &self.index,
            state_of: &state_of,
            differs: &|id| ledger.prompt_differs(id),
            speculative: self.speculative,
            assigned,
        };
        self.knowledge.fill(&self.plan.producers, &sources, rows);
        for row in rows {
            self.counters.candidates[self.known(row).reason.index()] += 1;
        }
    }

    fn charge_rows(&self, now: Time, request: &Request<'_>, rows: &mut [Row]) {
        let column = self.plan.load.prefix.and_then(|at| self.knowledge.columns.get(at));
        for row in rows {
            let prefix = column.and_then(|column| column.prefix.get(row.at as usize)).copied();
            let prefix = prefix.unwrap_or(PrefixMatch::default());
            row.uncached_tokens = uncached_tokens(request.prompt_tokens, prefix);
            if let Some(endpoint) = self.fleet.get(row.id) {
                row.costing = self.costs.costing(now, endpoint, request, self.known(row).spec);
                row.latency = self.predict(endpoint, row, request);
            }
        }
    }

    fn predict(&self, endpoint: &Endpoint, row: &Row, request: &Request<'_>) -> Option<Latency> {
        let latency = self.plan.latency.as_ref()?;
        let column = latency.prefix.and_then(|at| self.knowledge.columns.get(at));
        let prefix = column.and_then(|column| column.prefix.get(row.at as usize)).copied();
        latency.producer.predict(endpoint, row, prefix.unwrap_or_default(), request)
    }

    /// What the main producer knows about a candidate.
    pub(super) fn known(&self, row: &Row) -> Known {
        let column = self.plan.producer_main.and_then(|at| self.knowledge.columns.get(at));
        let known = column.and_then(|column| column.known.get(row.at as usize)).copied();
        known.unwrap_or_else(|| Known::nothing(Reason::NotConfigured))
    }

    /// A stage of every plan: endpoints that are known to serve other models only are passed over
    /// while others are known to serve the request's.
    fn remove_other_models(&mut self, request: &Request<'_>, survivors: &mut Survivors) {
        let fleet = &self.fleet;
        let serves = |row: &Row| fleet.get(row.id).and_then(|e| e.serves(request.model));
        let before = survivors.rows.len();
        if survivors.rows.iter().any(|row| serves(row) == Some(true))
            && survivors.rows.iter().any(|row| serves(row) == Some(false))
        {
            survivors.retain(&self.builtin.model, |_, row| serves(row) != Some(false));
        }
        self.counters.avoided_model += (before - survivors.rows.len()) as u64;
    }

    /// Another one: endpoints that just failed are passed over while others remain. The answer is
    /// who remained before, if that makes a difference.
    fn remove_failing(&mut self, now: Time, survivors: &mut Survivors) -> Option<Survivors> {
        let fleet = &self.fleet;
        let fails = |row: &Row| fleet.get(row.id).is_some_and(|e| e.is_avoided(now));
        let failing = survivors.rows.iter().filter(|row| fails(row)).count();
        if failing == 0 || failing == survivors.rows.len() {
            return None;
        }
        let before = self.spare.like(survivors);
        survivors.retain(&self.builtin.failing, |_, row| !fails(row));
        self.counters.avoided_failing += failing as u64;
        Some(before)
    }
}

/// A request with what producers found about it.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub now: Time,
    pub request: &'a Request<'a>,
    pub columns: &'a [crate::knowledge::Column],
    pub media: &'a [Vec<MediaMatch>],
    pub sessions: &'a [(Name, String)],
}

impl<'a> Asked<'a> {
    /// What a pipeline reads, after an earlier profile chose `peer`.
    pub fn inputs(&self, fleet: &'a crate::fleet::Fleet, peer: Option<EndpointId>) -> Inputs<'a> {
        let Asked { now, request, columns, media, sessions } = *self;
        Inputs { now, request, fleet, columns, media, sessions, peer }
    }
}
