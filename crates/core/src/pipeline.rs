//! In which order do stages run, and what does each see? Filters, scorers, picker: one profile.

use crate::EndpointId;
use crate::Rng;
use crate::Time;
use crate::decision::{FilterRecord, Reject, Request, Score, ScoreColumn, ScoreMatrix, ScoreRow};
use crate::fleet::{Fleet, Name};
use crate::knowledge::Column;
use crate::memory::Memory;
use crate::plan::{ProfilePlan, StagePlan};
use crate::refill::refill;
use crate::settings::Settings;
use crate::stage::{Filter, MediaMatch, Picked, Picker, Plugin, ResponseHeader, Row, Scorer, View};

/// A profile with the state of its plugins.
pub(crate) struct Pipeline {
    pub profile: Name,
    filters: Vec<FilterStage>,
    scorers: Vec<ScorerStage>,
    picker: Box<dyn Picker>,
    picker_name: Name,
    keep: Vec<bool>,
    column: Vec<f64>,
    totals: Vec<f64>,
    order: Vec<usize>,
}

struct FilterStage {
    name: Name,
    filter: Box<dyn Filter>,
    prefix: Option<usize>,
    media: Option<usize>,
}

struct ScorerStage {
    name: Name,
    weight: f64,
    scorer: Box<dyn Scorer>,
    prefix: Option<usize>,
    media: Option<usize>,
}

/// What a pipeline reads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub now: Time,
    pub request: &'a Request<'a>,
    pub fleet: &'a Fleet,
    /// By position in `Plan::producers`.
    pub columns: &'a [Column],
    /// By position in `Plan::others`; empty for those that produce something else.
    pub media: &'a [Vec<MediaMatch>],
    pub sessions: &'a [(Name, String)],
    pub peer: Option<EndpointId>,
}

/// What one stage asked for, and where it runs.
#[derive(Clone, Copy, Default)]
pub(crate) struct Wants<'a> {
    pub prefix: Option<usize>,
    pub media: Option<usize>,
    pub profile: &'a str,
}

/// A screener or admitter with its state, outside of profiles.
pub(crate) struct Guard<T: ?Sized> {
    pub name: Name,
    pub plugin: Box<T>,
    pub prefix: Option<usize>,
    pub media: Option<usize>,
}

impl<T: Plugin + ?Sized> Guard<T> {
    /// With fresh state.
    pub fn new(stage: &StagePlan, mut plugin: Box<T>, settings: &Settings) -> Option<Guard<T>> {
        plugin.prepare(settings);
        let (prefix, media) = (stage.prefix, stage.media);
        Some(Guard { name: stage.name.clone(), plugin, prefix, media })
    }

    /// What it asked for.
    pub fn wants(&self) -> Wants<'static> {
        Wants { prefix: self.prefix, media: self.media, profile: "" }
    }
}

/// What filters leave behind: the rows, who removed the others, and how it went.
#[derive(Default)]
pub(crate) struct Survivors {
    /// By name.
    pub rows: Vec<Row>,
    /// Those that there were at first; empty while none has been removed.
    all: Vec<Row>,
    /// By `Row::at`.
    pub removed_by: Vec<Option<Name>>,
    /// In order.
    pub filters: Vec<FilterRecord>,
}

/// In memory that is there, as far as it reaches.
impl Clone for Survivors {
    fn clone(&self) -> Survivors {
        let mut survivors = Survivors::default();
        survivors.clone_from(self);
        survivors
    }

    fn clone_from(&mut self, source: &Survivors) {
        let Survivors { rows, all, removed_by, filters } = source;
        self.rows.clone_from(rows);
        self.all.clone_from(all);
        self.removed_by.clone_from(removed_by);
        self.filters.clone_from(filters);
    }
}

/// What a pipeline concludes. Written again for each request.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Rows in order of preference, never empty.
    pub order: Vec<EndpointId>,
    /// All scores.
    pub scores: ScoreMatrix,
    /// Candidates with exactly the best total.
    pub tied: u32,
    /// Total of the chosen one less the best of the others.
    pub margin: Option<f64>,
    /// Scores for which a scorer had no data.
    pub scores_missing: u32,
}

impl<'a> Inputs<'a> {
    /// What a stage sees of these rows.
    pub fn view<'v>(&'v self, rows: &'v [Row], wants: Wants<'v>) -> View<'v>
    where
        'a: 'v,
    {
        let column = wants.prefix.and_then(|at| self.columns.get(at));
        View {
            now: self.now,
            request: self.request,
            fleet: self.fleet,
            rows,
            prefix: column.map_or(&[], |column| &column.prefix),
            media: wants.media.and_then(|at| self.media.get(at)).map_or(&[], Vec::as_slice),
            sessions: self.sessions,
            profile: wants.profile,
            peer: self.peer.and_then(|id| self.fleet.get(id)),
        }
    }
}

impl Survivors {
    /// Nobody has been removed; `rows` are those that there are.
    pub fn begin(&mut self, rows: impl Iterator<Item = Row>) {
        self.rows.clear();
        self.rows.extend(rows);
        self.all.clear();
        self.removed_by.clear();
        self.removed_by.resize(self.rows.len(), None);
        self.filters.clear();
    }

    /// All rows that there were at first, taken out.
    pub fn take_all(&mut self) -> Vec<Row> {
        let nobody_removed = self.all.is_empty();
        std::mem::take(if nobody_removed { &mut self.rows } else { &mut self.all })
    }

    /// Takes the memory of what was taken out back.
    pub fn give_back(&mut self, rows: Vec<Row>) {
        let place = if self.rows.capacity() == 0 { &mut self.rows } else { &mut self.all };
        *place = rows;
    }

    /// Removes rows in the name of a stage.
    pub fn retain(&mut self, name: &Name, mut keep: impl FnMut(usize, &Row) -> bool) {
        let candidates = self.rows.len() as u32;
        let removes = self.rows.iter().enumerate().any(|(at, row)| !keep(at, row));
        if removes && self.all.is_empty() {
            self.all.clone_from(&self.rows);
        }
        let removed_by = &mut self.removed_by;
        let mut at = 0;
        self.rows.retain(|row| {
            let kept = keep(at, row);
            at += 1;
            if !kept && let Some(by) = removed_by.get_mut(row.at as usize) {
                *by = Some(name.clone());
            }
            kept
        });
        let kept = self.rows.len() as u32;
        self.filters.push(FilterRecord { name: name.clone(), candidates, kept });
    }
}

impl Pipeline {
    /// Fresh state.
    pub fn new(profile: &ProfilePlan, settings: &Settings) -> Pipeline {
        let filter = |stage: &StagePlan| {
            let mut filter = stage.spec.parts().filter?;
            filter.prepare(settings);
            let (name, prefix, media) = (stage.name.clone(), stage.prefix, stage.media);
            Some(FilterStage { name, filter, prefix, media })
        };
        let scorer = |stage: &StagePlan| {
            let mut scorer = stage.spec.parts().scorer?;
            scorer.prepare(settings);
            let (name, weight) = (stage.name.clone(), stage.weight);
            Some(ScorerStage { name, weight, scorer, prefix: stage.prefix, media: stage.media })
        };
        let picker = profile.picker.spec.parts().picker;
        let mut picker = picker.expect("a plan's picker is a picker");
        picker.prepare(settings);
        Pipeline {
            profile: profile.name.clone(),
            filters: profile.filters.iter().filter_map(filter).collect(),
            scorers: profile.scorers.iter().filter_map(scorer).collect(),
            picker,
            picker_name: profile.picker.name.clone(),
            keep: Vec::new(),
            column: Vec::new(),
            totals: Vec::new(),
            order: Vec::new(),
        }
    }

    /// How many endpoints are offered to a proxy.
    pub fn endpoints_max(&self) -> usize {
        self.picker.endpoints_max()
    }

    /// Runs the filters.
    fn filter(
        &mut self,
        inputs: &Inputs<'_>,
        rng: &mut Rng,
        survivors: &mut Survivors,
    ) -> Result<(), Reject> {
        for stage in &mut self.filters {
            self.keep.clear();
            self.keep.resize(survivors.rows.len(), true);
            let profile = self.profile.as_str();
            let wants = Wants { prefix: stage.prefix, media: stage.media, profile };
            stage.filter.filter(&inputs.view(&survivors.rows, wants), rng, &mut self.keep);
            let candidates = survivors.rows.len() as u32;
            let keep = &self.keep;
            survivors.retain(&stage.name, |at, _| keep[at]);
            if survivors.rows.is_empty() {
                return Err(Reject::Saturated { filter: stage.name.clone(), candidates });
            }
        }
        Ok(())
    }

    /// Runs all stages; `survivors` tells also after a rejection who removed whom. Without one,
    /// `outcome` is the conclusion, whatever it was before.
    pub fn run(
        &mut self,
        inputs: &Inputs<'_>,
        rng: &mut Rng,
        survivors: &mut Survivors,
        outcome: &mut Outcome,
    ) -> Result<(), Reject> {
        self.filter(inputs, rng, survivors)?;
        self.choose(inputs, rng, &survivors.rows, outcome);
        Ok(())
    }

    /// Runs the scorers and the picker on at least one row.
    fn choose(&mut self, inputs: &Inputs<'_>, rng: &mut Rng, rows: &[Row], outcome: &mut Outcome) {
        let scores = &mut outcome.scores;
        self.empty_matrix(inputs, rows, scores);
        let mut scores_missing = 0;
        self.totals.clear();
        self.totals.resize(rows.len(), 0.0);
        let columns = self.scorers.len();
        for (at, stage) in self.scorers.iter_mut().enumerate() {
            self.column.clear();
            self.column.resize(rows.len(), f64::NAN);
            let profile = self.profile.as_str();
            let wants = Wants { prefix: stage.prefix, media: stage.media, profile };
            stage.scorer.score(&inputs.view(rows, wants), &mut self.column);
            for (row, raw) in self.column.iter().enumerate() {
                scores.raw[row * columns + at] = *raw;
                scores_missing += u32::from(raw.is_nan());
                self.totals[row] += Score::of(*raw, stage.weight).contribution;
            }
        }
        scores.rows.iter_mut().zip(&self.totals).for_each(|(row, total)| row.total = *total);
        self.order.clear();
        let wants = Wants { profile: self.profile.as_str(), ..Wants::default() };
        self.picker.pick(&inputs.view(rows, wants), &self.totals, rng, &mut self.order);
        let first = self.order.first().copied().unwrap_or(0);
        let best = self.totals.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let others = self.totals.iter().enumerate().filter(|(at, _)| *at != first);
        let second = others.map(|(_, total)| *total).reduce(f64::max);
        outcome.order.clear();
        outcome.order.extend(self.order.iter().map(|at| rows[*at].id));
        outcome.tied = self.totals.iter().filter(|total| **total == best).count() as u32;
        outcome.margin = second.map(|second| self.totals[first] - second);
        outcome.scores_missing = scores_missing;
    }

    /// All candidates are in the fleet's table.
    fn empty_matrix(&self, inputs: &Inputs<'_>, rows: &[Row], scores: &mut ScoreMatrix) {
        let ScoreMatrix { columns, rows: totals, raw } = scores;
        refill(columns, self.scorers.iter(), |column, stage| {
            let ScoreColumn { name, weight } = column;
            name.clone_from(&stage.name);
            *weight = stage.weight;
        });
        refill(totals, rows.iter(), |total, row| {
            let ScoreRow { endpoint, total } = total;
            *total = 0.0;
            if let Some(known) = inputs.fleet.get(row.id) {
                endpoint.clone_from(&known.name);
            }
        });
        raw.clear();
        raw.resize(rows.len() * self.scorers.len(), f64::NAN);
    }

    /// Tells the stages what was picked; the headers that they want on the response.
    pub fn picked(&mut self, picked: &Picked<'_>) -> Vec<ResponseHeader> {
        let filters = self.filters.iter_mut().filter_map(|stage| stage.filter.picked(picked));
        let mut headers: Vec<ResponseHeader> = filters.collect();
        headers.extend(self.scorers.iter_mut().filter_map(|stage| stage.scorer.picked(picked)));
        headers.extend(self.picker.picked(picked));
        headers
    }

    /// What its plugins remember, in order; none that remembers nothing.
    pub fn memories(&self) -> Vec<(Name, Memory)> {
        let filters = self.filters.iter().map(|stage| (&stage.name, stage.filter.memory()));
        let scorers = self.scorers.iter().map(|stage| (&stage.name, stage.scorer.memory()));
        let picker = (&self.picker_name, self.picker.memory());
        let all = filters.chain(scorers).chain([picker]);
        all.filter(|(_, memory)| *memory != Memory::Nothing)
            .map(|(name, memory)| (name.clone(), memory))
            .collect()
    }

    /// The plugin of this name takes up again what it remembered.
    pub fn recall(&mut self, name: &str, memory: &Memory) {
        for stage in self.filters.iter_mut().filter(|stage| stage.name.as_str() == name) {
            stage.filter.recall(memory);
        }
        for stage in self.scorers.iter_mut().filter(|stage| stage.name.as_str() == name) {
            stage.scorer.recall(memory);
        }
        if self.picker_name.as_str() == name {
            self.picker.recall(memory);
        }
    }

    /// The endpoint has left.
    pub fn forget(&mut self, id: EndpointId) {
        self.filters.iter_mut().for_each(|stage| stage.filter.forget(id));
        self.scorers.iter_mut().for_each(|stage| stage.scorer.forget(id));
        self.picker.forget(id);
    }
}
