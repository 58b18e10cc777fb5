//! What a decision says, and what comes of it: record, reservations, history, expectations.

use smallvec::SmallVec;

use super::decide::Considered;
use super::handle::{Course, Other, Ran, Step};
use super::{Alternative, Brain, InFlight};
use crate::Time;
use crate::blocks::{BlockKey, Chain, TokenSpace};
use crate::decision::{
    Candidate, DATA_PARALLEL_HEADER, Decision, DecisionRecord, ENCODERS_HEADER, KV_SOURCE_HEADER,
    LoadRecord, Mode, PREFILLER_HEADER, ProfileRecord, Reason, RemovedRecord, Request,
    RequestHeader, ScoreMatrix,
};
use crate::event::Tier;
use crate::fleet::{EndpointId, Name};
use crate::index::SpeculationId;
use crate::ledger::Expectation;
use crate::load::{Charge, Ticket};
use crate::plan::{HandlerPlan, ProducerKind};
use crate::plugin::PluginSpec;
use crate::produce::Holding;
use crate::refill::{refill, rewrite};
use crate::stage::{Picked, ResponseHeader, Row};
use crate::stream::StreamState;

/// Profiles with whom each chose, and whether that endpoint answers.
type Told = SmallVec<[(usize, EndpointId, bool); 4]>;

impl Brain {
    /// Why the request goes where it goes, written over an older record. What profiles concluded
    /// goes into it, and what it had goes to them.
    fn record(
        &self,
        now: Time,
        request: &Request<'_>,
        considered: &mut Considered,
        record: &mut DecisionRecord,
    ) {
        self.request_headers(request, considered, &mut record.request_headers);
        let Considered { rows, course, seed, .. } = considered;
        let others = course.others.iter_mut();
        refill(&mut record.others, others, |old, other| self.profile_record(rows, other, old));
        refill(&mut record.candidates, rows.iter(), |old, row| {
            let removed_by = course.primary.survivors.removed_by.get(row.at as usize);
            self.candidate(now, row, removed_by.unwrap_or(&None), old);
        });
        let chosen = self.row_of(rows, course.primary.chosen());
        let Ran { profile, survivors, outcome } = &mut course.primary;
        let chosen_known = self.known(chosen);
        let columns = self.plan.producer_main.and_then(|at| self.knowledge.columns.get(at));
        let candidates = || columns.iter().flat_map(|column| &column.known);
        rewrite(&mut record.request_id, request.id);
        record.at_s = now.as_secs_f64();
        rewrite(&mut record.model, request.model);
        record.profile.clone_from(&self.plan.profiles[*profile].name);
        record.endpoint.clone_from(&self.name(chosen.id));
        (record.mode, record.reason) = (chosen_known.reason.mode(), chosen_known.reason);
        record.candidates_degraded = match (self.plan.reads_events(), columns) {
            (false, _) => 0,
            (true, None) => rows.len() as u32,
            (true, Some(_)) => {
                candidates().filter(|k| k.reason.mode() != Mode::Precise).count() as u32
            }
        };
        record.prompt_tokens = request.prompt_tokens;
        record.available_tokens = candidates().map(|k| k.hit.predicted_tokens).max().unwrap_or(0);
        record.chosen_tokens = chosen_known.hit.predicted_tokens;
        record.seed = *seed;
        (record.tied, record.margin) = (outcome.tied, outcome.margin);
        std::mem::swap(&mut record.filters, &mut survivors.filters);
        std::mem::swap(&mut record.scores, &mut outcome.scores);
    }

    fn profile_record(&self, rows: &[Row], other: &mut Other, record: &mut ProfileRecord) {
        let chosen = other.chosen();
        let removed_by = &other.survivors.removed_by;
        let removed = |row: &Row| {
            let by = removed_by.get(row.at as usize)?.clone()?;
            Some(RemovedRecord { endpoint: self.name(row.id), by })
        };
        record.profile.clone_from(&self.plan.profiles[other.profile].name);
        record.step = other.step.as_str();
        record.endpoint = chosen.map(|id| self.name(id));
        record.removed.clear();
        record.removed.extend(rows.iter().filter_map(removed));
        std::mem::swap(&mut record.filters, &mut other.survivors.filters);
        match &mut other.outcome {
            Ok(outcome) => {
                record.failed = None;
                (record.tied, record.margin) = (outcome.tied, outcome.margin);
                std::mem::swap(&mut record.scores, &mut outcome.scores);
            }
            Err(reject) => {
                record.failed = Some(reject.to_string());
                (record.tied, record.margin) = (0, None);
                record.scores = ScoreMatrix::default();
            }
        }
    }

    /// What the chosen endpoint must be told: who prefills and who encodes.
    fn request_headers(
        &self,
        request: &Request<'_>,
        considered: &Considered,
        headers: &mut Vec<RequestHeader>,
    ) {
        let course = &considered.course;
        headers.clear();
        for other in &course.others {
            let Ok(outcome) = &other.outcome else { continue };
            // One endpoint prefills, the one that is charged for it; encoders share the work.
            let (name, offered) = match other.step {
                Step::Encode => (ENCODERS_HEADER, self.pipelines[other.profile].endpoints_max()),
                Step::Prefill => (PREFILLER_HEADER, 1),
            };
            let addresses = outcome.order.iter().take(offered).map(|id| self.address(*id));
            headers.push(RequestHeader { name, value: addresses.collect::<Vec<_>>().join(",") });
        }
        if let Some(source) = self.kv_source(request, considered) {
            let value = self.address(source).to_owned();
            headers.push(RequestHeader { name: KV_SOURCE_HEADER, value });
        }
        if course.primary_port.is_some() {
            let value = self.address(course.primary.chosen()).to_owned();
            headers.push(RequestHeader { name: DATA_PARALLEL_HEADER, value });
        }
    }

    /// From whom the endpoint that computes the prompt takes cached blocks.
    fn kv_source(&self, request: &Request<'_>, considered: &Considered) -> Option<EndpointId> {
        let peers = self.plan.peers.as_ref()?;
        let Considered { rows, course, .. } = considered;
        let prefills = course.others.iter().filter(|other| {
            let name = self.plan.profiles[other.profile].name.as_str();
            other.step == Step::Prefill && name == peers.producer.prefill_profile()
        });
        let prefill = prefills.filter_map(Other::chosen).next();
        let computing = prefill.unwrap_or(course.primary.chosen());
        let column = self.knowledge.columns.get(peers.prefix?)?;
        let reached = rows.iter().zip(&column.known).filter(|(row, _)| self.may_help(course, row));
        let held = reached.map(|(row, known)| {
            let hit = &known.hit;
            let tiers = known.reason.mode() == Mode::Precise;
            Holding {
                id: row.id,
                blocks: hit.matched,
                cpu_blocks: tiers.then(|| hit.by_tier[Tier::Cpu.index()]),
                block_size: hit.block_size,
                waiting: row.signals.map(|signals| signals.waiting),
            }
        });
        peers.producer.source(request.id, computing, &held.collect::<Vec<_>>())
    }

    /// Whether an endpoint may work for the request at all: profiles may have removed it, but
    /// nothing before them.
    fn may_help(&self, course: &Course, row: &Row) -> bool {
        let removed_by = course.primary.survivors.removed_by.get(row.at as usize);
        let Some(by) = removed_by.and_then(Option::as_ref) else { return true };
        let screens = self.screeners.iter().any(|screener| screener.name == *by);
        !screens && *by != self.builtin.failing && *by != self.builtin.model
    }

    fn candidate(&self, now: Time, row: &Row, removed_by: &Option<Name>, record: &mut Candidate) {
        let known = self.known(row);
        let endpoint = self.fleet.get(row.id);
        let age = endpoint.and_then(|endpoint| endpoint.metrics_age(now));
        if let Some(endpoint) = endpoint {
            record.endpoint.clone_from(&endpoint.name);
        }
        record.removed_by.clone_from(removed_by);
        record.reason = known.reason;
        record.stream = self.stream_state(row.id).unwrap_or(StreamState::Initial);
        record.hit = known.hit;
        record.load = LoadRecord {
            inflight_requests: row.inflight.requests,
            inflight_tokens: row.inflight.tokens,
            uncached_tokens: row.uncached_tokens,
            waiting: row.signals.map(|signals| signals.waiting),
            running: row.signals.map(|signals| signals.running),
            kv_usage: row.signals.map(|signals| signals.kv_usage),
            metrics_age_s: age.map(|age| age.as_secs_f64()),
        };
    }

    pub(super) fn name(&self, id: EndpointId) -> Name {
        self.fleet.get(id).map_or_else(|| Name::from(""), |endpoint| endpoint.name.clone())
    }

    fn address(&self, id: EndpointId) -> &str {
        self.fleet.get(id).map_or("", |endpoint| endpoint.address.as_str())
    }

    /// The row of an endpoint; there is at least one row, and it is one of them.
    fn row_of<'r>(&self, rows: &'r [Row], id: EndpointId) -> &'r Row {
        rows.iter().find(|row| row.id == id).unwrap_or(&rows[0])
    }

    /// Makes the decision true: reservations, history, ledger, plugin state.
    pub(super) fn commit(
        &mut self,
        now: Time,
        request: &Request<'_>,
        mut considered: Considered,
        mut record: DecisionRecord,
    ) -> Decision {
        self.record(now, request, &mut considered, &mut record);
        let Considered { rows, mut course, sessions, .. } = considered;
        let prefill = course.others.iter().find(|other| other.step == Step::Prefill);
        let prefill = prefill.and_then(Other::chosen);
        let mut inflight = self.ended.pop().unwrap_or_default();
        let expect = |row: &Row| Alternative {
            endpoint: row.id,
            expectation: self.expectation(request, record.available_tokens, row, prefill.is_some()),
            uncached_tokens: row.uncached_tokens,
        };
        let row = *self.row_of(&rows, course.primary.chosen());
        let chosen = expect(&row);
        let options = &mut inflight.alternatives;
        options.clear();
        options.extend(self.offered(&course.primary, &rows).skip(1).map(expect));
        let fallback = options.iter().map(|option| option.endpoint).collect();
        self.promised(request, &row, &chosen, options, &mut inflight.promised);
        inflight.expectation = chosen.expectation;
        (inflight.answered, inflight.reported) = (false, false);
        self.ledger.decided(chosen.endpoint, &chosen.expectation);
        let mut told = Told::new();
        told.push((course.primary.profile, chosen.endpoint, true));
        told.extend(course.others.iter().filter_map(|o| Some((o.profile, o.chosen()?, false))));
        let response_headers = self.tell_plugins(now, request, &sessions, &told);
        inflight.speculations.clear();
        for row in [Some(&row), prefill.map(|id| self.row_of(&rows, id))].into_iter().flatten() {
            self.remember(request, row);
            self.speculate(now, request, row, &mut inflight.speculations);
        }
        self.remember_media(request, &told);
        self.charge_helpers(&course.others, &rows, &mut inflight.helpers);
        let spec = self.known(&row).spec;
        inflight.costed = self.costs.begin(now, &row, request, spec, prefill.is_some());
        let ticket = self.reserve(now, request, &chosen, inflight);
        let primary_port = course.primary_port;
        course.primary.survivors.give_back(rows);
        self.spare.take_back(course);
        Decision {
            ticket,
            endpoint: chosen.endpoint,
            fallback,
            response_headers,
            request_headers: record.request_headers.clone(),
            primary_port,
            record,
        }
    }

    fn reserve(
        &mut self,
        now: Time,
        request: &Request<'_>,
        chosen: &Alternative,
        inflight: InFlight,
    ) -> Ticket {
        let load = &self.plan.load.producer;
        let charge = Charge {
            endpoint: chosen.endpoint,
            prompt_tokens: chosen.uncached_tokens,
            output_tokens: load.output_tokens(request.prompt_tokens, request.max_tokens),
        };
        self.reservations.reserve(now, charge, inflight)
    }

    /// The chosen endpoint and the next best ones, as many as may be tried. When everything
    /// better fails, an endpoint that failed before is still worth a try.
    fn offered<'r>(&self, primary: &'r Ran, rows: &'r [Row]) -> impl Iterator<Item = &'r Row> {
        let retries_max = self.plan.settings.retries_max as usize;
        let pipeline = &self.pipelines[primary.profile];
        let offered = 1 + retries_max.max(pipeline.endpoints_max() - 1);
        let removed = self.builtin.failing.clone();
        let failing = rows.iter().filter(move |row| {
            let removed_by = primary.survivors.removed_by.get(row.at as usize);
            removed_by.is_some_and(|by| by.as_ref() == Some(&removed))
        });
        let order = primary.outcome.order.iter();
        let ordered = order.filter_map(|id| rows.iter().find(|row| row.id == *id));
        ordered.chain(failing).take(offered)
    }

    /// Those who work before the answer are charged until it starts: a prefill endpoint with the
    /// tokens that it has to compute.
    fn charge_helpers(&mut self, others: &[Other], rows: &[Row], charges: &mut Vec<Charge>) {
        let charge = |other: &Other| {
            let endpoint = other.chosen()?;
            let prompt_tokens = match other.step {
                Step::Prefill => self.row_of(rows, endpoint).uncached_tokens,
                Step::Encode => 0,
            };
            Some(Charge { endpoint, prompt_tokens, output_tokens: 0 })
        };
        charges.clear();
        charges.extend(others.iter().filter_map(charge));
        charges.iter().for_each(|charge| self.reservations.charge(charge));
    }

    fn expectation(
        &self,
        request: &Request<'_>,
        available_tokens: u32,
        row: &Row,
        prefilled: bool,
    ) -> Expectation {
        let known = self.known(row);
        Expectation {
            prompt_tokens: request.prompt_tokens,
            available_tokens,
            chosen_tokens: known.hit.predicted_tokens,
            // Engines report the cached tokens of the last prompt only, and read nothing from
            // the cache where they need every position's logits. Behind a prefill elsewhere they
            // report what that endpoint had.
            promised_tokens: known
                .promised_tokens
                .filter(|_| request.prompts.len() == 1 && !request.skips_cache && !prefilled),
            block_size: known.hit.block_size,
            removals: self.index.removals(row.id),
            incomplete: known.reason == Reason::StreamSuspect,
            concurrent: row.inflight.requests > 0 || row.signals.is_some_and(|s| s.waiting > 0),
        }
    }

    /// The blocks of the prompt that any of the options promises: to tell an eviction from a lie.
    /// Of options whose blocks differ in size, those of the chosen one's size.
    fn promised(
        &self,
        request: &Request<'_>,
        row: &Row,
        chosen: &Alternative,
        others: &[Alternative],
        promised: &mut Vec<BlockKey>,
    ) {
        promised.clear();
        let (Some(spec), [prompt]) = (self.known(row).spec, request.prompts) else { return };
        let options = others.iter().chain([chosen]);
        let tokens = options.filter_map(|option| option.expectation.promised_tokens).max();
        let blocks = (tokens.unwrap_or(0) / spec.block_size.max(1)) as usize;
        let keys = prompt.get(spec).map_or(&[][..], |chain| &chain.keys);
        promised.extend_from_slice(&keys[..blocks.min(keys.len())]);
    }

    /// Tells the stages of each profile whom it chose.
    fn tell_plugins(
        &mut self,
        now: Time,
        request: &Request<'_>,
        sessions: &[(Name, String)],
        told: &[(usize, EndpointId, bool)],
    ) -> Vec<ResponseHeader> {
        let mut headers = Vec::new();
        for (profile, id, primary) in told {
            let Some(endpoint) = self.fleet.get(*id) else { continue };
            let name = self.plan.profiles[*profile].name.as_str();
            let primary = *primary;
            let picked = Picked { now, endpoint, request, sessions, profile: name, primary };
            headers.extend(self.pipelines[*profile].picked(&picked));
            for screener in self.plan.screeners.iter().filter(|_| primary) {
                if let PluginSpec::RolloutScreener(rollout) = &screener.spec {
                    headers.extend(rollout.response_headers(endpoint));
                }
            }
        }
        headers
    }

    /// Images are encoded where a profile of their own says, and kept there and where the request
    /// is answered.
    fn remember_media(&mut self, request: &Request<'_>, told: &[(usize, EndpointId, bool)]) {
        let encode = match &self.plan.handler {
            HandlerPlan::Disagg(disagg) => disagg.encode.map(|(profile, _)| profile),
            _ => None,
        };
        for caches in self.encoder_caches.iter_mut().flatten() {
            for (profile, id, primary) in told {
                if *primary || Some(*profile) == encode {
                    caches.record(*id, request.media);
                }
            }
        }
    }

    /// Routing history, for every chain that a producer looked up on the chosen endpoint: what
    /// remains when events fail.
    fn remember(&mut self, request: &Request<'_>, chosen: &Row) {
        for (at, column) in self.knowledge.columns.iter().enumerate() {
            let spec_of = |column: &crate::knowledge::Column| {
                column.known.get(chosen.at as usize).and_then(|known| known.spec)
            };
            let Some(spec) = spec_of(column) else { continue };
            let mut earlier = self.knowledge.columns[..at].iter();
            if earlier.any(|column| spec_of(column) == Some(spec)) {
                continue;
            }
            let blocks_max = match self.plan.producers.get(at).map(|producer| &producer.kind) {
                Some(ProducerKind::Approx(approx)) => approx.blocks_max(spec.block_size) as usize,
                _ => usize::MAX,
            };
            for chain in request.prompts.iter().filter_map(|prompt| prompt.get(spec)) {
                self.index.record(chosen.id, &chain.keys[..chain.keys.len().min(blocks_max)]);
            }
        }
    }

    /// Speculative residency: the next request with this prefix finds it here, although the engine
    /// has not said so yet. Not for prompts that are resident already, nor without events, which
    /// would have to confirm it.
    fn speculate(
        &mut self,
        now: Time,
        request: &Request<'_>,
        chosen: &Row,
        speculations: &mut Vec<SpeculationId>,
    ) {
        let known = self.known(chosen);
        let Some(spec) = known.spec else { return };
        let confirmed = matches!(
            known.reason,
            Reason::EventsLive
                | Reason::StreamInitial
                | Reason::StreamReplaying
                | Reason::StreamSuspect
        );
        let resident = known.hit.resident >= known.hit.blocks;
        if !self.speculative || !confirmed || resident || spec.space != TokenSpace::Exact {
            return;
        }
        let until = now + self.speculative_ttl;
        let chains = request.prompts.iter().filter_map(|prompt| prompt.get(spec));
        let index = &mut self.index;
        let before = speculations.len();
        let chains = chains.filter(|chain: &&Chain| !chain.keys.is_empty());
        speculations.extend(chains.map(|chain| index.speculate(chosen.id, chain, until)));
        self.counters.speculations += (speculations.len() - before) as u64;
    }
}
