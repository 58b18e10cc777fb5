//! One decision, from the candidates to the record.

use std::borrow::Cow;

use super::{Alternative, Brain, InFlight};
use crate::blocks::{BlockKey, Chain, TokenSpace};
use crate::cost::Costing;
use crate::decision::{
    Candidate, Decision, DecisionRecord, LoadRecord, Mode, NoEndpoints, Reason, Reject, Request,
};
use crate::fleet::{EndpointId, Name};
use crate::index::SpeculationId;
use crate::journal::{Call, Entry};
use crate::knowledge::{Known, Sources};
use crate::ledger::Expectation;
use crate::load::Charge;
use crate::pipeline::{Inputs, Outcome};
use crate::plan::ProducerKind;
use crate::produce::uncached_tokens;
use crate::stage::{Picked, PrefixMatch, ResponseHeader, Row};
use crate::stream::StreamState;
use crate::{Rng, Time};

impl Brain {
    /// Chooses an endpoint, and reserves load and speculative residency there before it returns.
    pub fn decide(&mut self, now: Time, request: &Request<'_>) -> Result<Decision, Reject> {
        self.note(|| Entry::Call(Call::decide(now, request)));
        let seed = self.rng.next_u64();
        let decided = self.try_decide(now, request, seed);
        match &decided {
            Ok(decision) => self.counters.decisions[decision.record.reason.index()] += 1,
            Err(Reject::NoEndpoints { .. }) => self.counters.rejected_no_endpoints += 1,
            Err(Reject::Saturated { .. }) => self.counters.rejected_saturated += 1,
            Err(Reject::TooManyInFlight { .. }) => self.counters.rejected_in_flight += 1,
        }
        self.note(|| Entry::Decided(Cow::Borrowed(&decided)));
        decided
    }

    fn try_decide(
        &mut self,
        now: Time,
        request: &Request<'_>,
        seed: u64,
    ) -> Result<Decision, Reject> {
        if self.reservations.is_full() {
            let requests_max = self.plan.settings.inflight_requests_max;
            return Err(Reject::TooManyInFlight { requests_max });
        }
        let mut rng = Rng::seeded(seed);
        let considered = self.collect_rows(now, request)?;
        self.fill_knowledge(request, &considered);
        self.survivors.rows = self.charge_rows(now, request, considered);
        let considered = self.survivors.rows.clone();
        self.remove_builtin(now, request);
        let columns = &self.knowledge.columns;
        let inputs = Inputs { now, request, fleet: &self.fleet, columns };
        self.pipeline.filter(&inputs, &mut rng, &mut self.survivors)?;
        let outcome = self.pipeline.choose(&inputs, &mut rng, &self.survivors.rows);
        self.counters.scores_missing += u64::from(outcome.scores_missing);
        let record = self.record(now, request, seed, &considered, &outcome);
        Ok(self.commit(now, request, &considered, outcome, record))
    }

    /// Every endpoint that the request allows, by name.
    fn collect_rows(&mut self, now: Time, request: &Request<'_>) -> Result<Vec<Row>, Reject> {
        let staleness = self.plan.settings.metrics_staleness();
        let allowed = |id: &EndpointId| request.allowed.is_none_or(|ids| ids.contains(id));
        let candidates = self.fleet.iter().filter(|endpoint| allowed(&endpoint.id));
        let rows: Vec<Row> = (0u32..)
            .zip(candidates)
            .map(|(at, endpoint)| Row {
                id: endpoint.id,
                at,
                signals: endpoint.signals(now, staleness),
                inflight: self.reservations.load(endpoint.id),
                uncached_tokens: request.prompt_tokens,
                costing: Costing::default(),
                latency: None,
            })
            .collect();
        self.survivors.filters.clear();
        self.survivors.removed_by.clear();
        self.survivors.removed_by.resize(rows.len(), None);
        if !rows.is_empty() {
            return Ok(rows);
        }
        let empty = self.fleet.is_empty();
        let why = if empty { NoEndpoints::EmptyFleet } else { NoEndpoints::NoneAllowed };
        Err(Reject::NoEndpoints { why })
    }

    fn fill_knowledge(&mut self, request: &Request<'_>, rows: &[Row]) {
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
        };
        self.knowledge.fill(&self.plan.producers, &sources, rows);
        for row in rows {
            self.counters.candidates[self.known(row).reason.index()] += 1;
        }
    }

    fn charge_rows(&self, now: Time, request: &Request<'_>, mut rows: Vec<Row>) -> Vec<Row> {
        let column = self.plan.load.prefix.and_then(|at| self.knowledge.columns.get(at));
        for row in &mut rows {
            let prefix = column.and_then(|column| column.prefix.get(row.at as usize)).copied();
            let prefix = prefix.unwrap_or(PrefixMatch::default());
            row.uncached_tokens = uncached_tokens(request.prompt_tokens, prefix);
            if let Some(endpoint) = self.fleet.get(row.id) {
                row.costing = self.costs.costing(now, endpoint, request, self.known(row).spec);
            }
        }
        rows
    }

    /// What the main producer knows about a candidate.
    fn known(&self, row: &Row) -> Known {
        let column = self.plan.producer_main.and_then(|at| self.knowledge.columns.get(at));
        let known = column.and_then(|column| column.known.get(row.at as usize)).copied();
        known.unwrap_or_else(|| Known::nothing(Reason::NotConfigured))
    }

    /// Stages of every plan: endpoints that just failed, and endpoints that are known to serve
    /// other models only, are passed over while others remain.
    fn remove_builtin(&mut self, now: Time, request: &Request<'_>) {
        let (fleet, survivors) = (&self.fleet, &mut self.survivors);
        let serves = |row: &Row| fleet.get(row.id).and_then(|e| e.serves(request.model));
        let before = survivors.rows.len();
        if survivors.rows.iter().any(|row| serves(row) == Some(true))
            && survivors.rows.iter().any(|row| serves(row) == Some(false))
        {
            survivors.retain(&self.builtin.model, |_, row| serves(row) != Some(false));
        }
        let left = survivors.rows.len();
        self.counters.avoided_model += (before - left) as u64;
        let fails = |row: &Row| fleet.get(row.id).is_some_and(|e| e.is_avoided(now));
        let failing = survivors.rows.iter().filter(|row| fails(row)).count();
        if failing > 0 && failing < left {
            survivors.retain(&self.builtin.failing, |_, row| !fails(row));
            self.counters.avoided_failing += failing as u64;
        }
    }

    fn record(
        &self,
        now: Time,
        request: &Request<'_>,
        seed: u64,
        considered: &[Row],
        outcome: &Outcome,
    ) -> DecisionRecord {
        let chosen = considered.iter().find(|row| Some(&row.id) == outcome.order.first());
        let chosen = chosen.unwrap_or(&considered[0]);
        let known = self.known(chosen);
        let candidates = || considered.iter().map(|row| self.known(row));
        let degraded = candidates().filter(|k| k.reason.mode() != Mode::Precise).count() as u32;
        let wants_precise = self.plan.reads_events();
        DecisionRecord {
            request_id: request.id.to_owned(),
            at_s: now.as_secs_f64(),
            model: request.model.to_owned(),
            profile: self.pipeline.profile.clone(),
            endpoint: self.name(chosen.id),
            mode: known.reason.mode(),
            reason: known.reason,
            candidates_degraded: if wants_precise { degraded } else { 0 },
            prompt_tokens: request.prompt_tokens,
            available_tokens: candidates().map(|k| k.hit.predicted_tokens).max().unwrap_or(0),
            chosen_tokens: known.hit.predicted_tokens,
            seed,
            tied: outcome.tied,
            margin: outcome.margin,
            filters: self.survivors.filters.clone(),
            candidates: considered.iter().map(|row| self.candidate(now, row)).collect(),
            scores: outcome.scores.clone(),
        }
    }

    fn candidate(&self, now: Time, row: &Row) -> Candidate {
        let known = self.known(row);
        let age = self.fleet.get(row.id).and_then(|endpoint| endpoint.metrics_age(now));
        Candidate {
            endpoint: self.name(row.id),
            removed_by: self.survivors.removed_by.get(row.at as usize).cloned().flatten(),
            reason: known.reason,
            stream: self.stream_state(row.id).unwrap_or(StreamState::Initial),
            hit: known.hit,
            load: LoadRecord {
                inflight_requests: row.inflight.requests,
                inflight_tokens: row.inflight.tokens,
                uncached_tokens: row.uncached_tokens,
                waiting: row.signals.map(|signals| signals.waiting),
                running: row.signals.map(|signals| signals.running),
                kv_usage: row.signals.map(|signals| signals.kv_usage),
                metrics_age_s: age.map(|age| age.as_secs_f64()),
            },
        }
    }

    fn name(&self, id: EndpointId) -> Name {
        self.fleet.get(id).map_or_else(|| Name::from(""), |endpoint| endpoint.name.clone())
    }

    /// Makes the decision true: reservations, history, ledger, plugin state.
    fn commit(
        &mut self,
        now: Time,
        request: &Request<'_>,
        considered: &[Row],
        outcome: Outcome,
        record: DecisionRecord,
    ) -> Decision {
        let available_tokens = record.available_tokens;
        let retries_max = self.plan.settings.retries_max as usize;
        let offered = 1 + retries_max.max(self.pipeline.endpoints_max() - 1);
        let row_of = |id: &EndpointId| considered.iter().find(|row| row.id == *id);
        // When everything better fails, an endpoint that failed before is still worth a try.
        let failing = considered.iter().filter(|row| {
            let removed_by = self.survivors.removed_by.get(row.at as usize);
            removed_by.is_some_and(|by| by.as_ref() == Some(&self.builtin.failing))
        });
        let last_resort = failing.map(|row| &row.id);
        let mut options: Vec<Alternative> = outcome
            .order
            .iter()
            .chain(last_resort)
            .take(offered)
            .filter_map(row_of)
            .map(|row| Alternative {
                endpoint: row.id,
                expectation: self.expectation(request, available_tokens, row),
                uncached_tokens: row.uncached_tokens,
            })
            .collect();
        // There is at least one candidate, and the picker orders all of them.
        let row = row_of(&options[0].endpoint).unwrap_or(&considered[0]);
        let promised = self.promised(request, row, &options);
        let chosen = options.remove(0);
        self.ledger.decided(chosen.endpoint, &chosen.expectation);
        let response_headers = self.tell_plugins(now, request, chosen.endpoint);
        self.remember(request, row);
        let speculations = self.speculate(now, request, row);
        let output_tokens =
            self.plan.load.producer.output_tokens(request.prompt_tokens, request.max_tokens);
        let charge = Charge {
            endpoint: chosen.endpoint,
            prompt_tokens: chosen.uncached_tokens,
            output_tokens,
        };
        let fallback = options.iter().map(|option| option.endpoint).collect();
        let costed = self.costs.begin(now, row, request, self.known(row).spec);
        let inflight = InFlight {
            costed,
            promised,
            expectation: chosen.expectation,
            alternatives: options,
            speculations,
            answered: false,
            reported: false,
        };
        let ticket = self.reservations.reserve(now, charge, inflight);
        Decision { ticket, endpoint: chosen.endpoint, fallback, response_headers, record }
    }

    fn expectation(&self, request: &Request<'_>, available_tokens: u32, row: &Row) -> Expectation {
        let known = self.known(row);
        Expectation {
            prompt_tokens: request.prompt_tokens,
            available_tokens,
            chosen_tokens: known.hit.predicted_tokens,
            // Engines report the cached tokens of the last prompt only, and read nothing from
            // the cache where they need every position's logits.
            promised_tokens: known
                .promised_tokens
                .filter(|_| request.prompts.len() == 1 && !request.skips_cache),
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
        chosen: &Row,
        options: &[Alternative],
    ) -> Box<[BlockKey]> {
        let spec = self.known(chosen).spec;
        let (Some(spec), [prompt]) = (spec, request.prompts) else { return Box::default() };
        let tokens = options.iter().filter_map(|option| option.expectation.promised_tokens).max();
        let blocks = (tokens.unwrap_or(0) / spec.block_size.max(1)) as usize;
        let keys = prompt.get(spec).map_or(&[][..], |chain| &chain.keys);
        keys[..blocks.min(keys.len())].into()
    }

    fn tell_plugins(
        &mut self,
        now: Time,
        request: &Request<'_>,
        id: EndpointId,
    ) -> Vec<ResponseHeader> {
        match self.fleet.get(id) {
            Some(endpoint) => {
                let profile = self.pipeline.profile.clone();
                self.pipeline.picked(&Picked {
                    now,
                    endpoint,
                    request,
                    sessions: &[],
                    profile: profile.as_str(),
                    primary: true,
                })
            }
            None => Vec::new(),
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
    fn speculate(&mut self, now: Time, request: &Request<'_>, chosen: &Row) -> Vec<SpeculationId> {
        let known = self.known(chosen);
        let Some(spec) = known.spec else { return Vec::new() };
        let confirmed = matches!(
            known.reason,
            Reason::EventsLive
                | Reason::StreamInitial
                | Reason::StreamReplaying
                | Reason::StreamSuspect
        );
        let resident = known.hit.resident >= known.hit.blocks;
        if !self.speculative || !confirmed || resident || spec.space != TokenSpace::Exact {
            return Vec::new();
        }
        let until = now + self.speculative_ttl;
        let chains = request.prompts.iter().filter_map(|prompt| prompt.get(spec));
        let index = &mut self.index;
        let ids: Vec<SpeculationId> = chains
            .filter(|chain: &&Chain| !chain.keys.is_empty())
            .map(|chain| index.speculate(chosen.id, chain, until))
            .collect();
        self.counters.speculations += ids.len() as u64;
        ids
    }
}
