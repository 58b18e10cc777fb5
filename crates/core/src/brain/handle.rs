//! Which profiles run, and what does each conclude?

use super::Brain;
use super::decide::Asked;
use crate::Rng;
use crate::decision::{Reject, Request};
use crate::fleet::EndpointId;
use crate::handle::StageOrder;
use crate::pipeline::{Outcome, Survivors};
use crate::plan::{DisaggPlan, HandlerPlan};
use crate::produce::uncached_tokens;
use crate::stage::MediaMatch;

/// What the profile handler concluded.
pub(super) struct Course {
    /// Who answers.
    pub primary: Ran,
    /// Who works for the request before, in order.
    pub others: Vec<Other>,
    /// Where the request goes on the chosen host, when not to the endpoint's own port.
    pub primary_port: Option<u16>,
}

/// A profile that chose.
pub(super) struct Ran {
    /// Position in `Plan::profiles`.
    pub profile: usize,
    pub survivors: Survivors,
    pub outcome: Outcome,
}

/// A part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Encode,
    Prefill,
}

impl Step {
    /// Its name in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Encode => "encode",
            Step::Prefill => "prefill",
        }
    }
}

/// A profile beside the primary one. Where it finds nobody, the primary endpoint does the work.
pub(super) struct Other {
    pub step: Step,
    pub profile: usize,
    pub survivors: Survivors,
    pub outcome: Result<Outcome, Reject>,
}

impl Other {
    /// Whom it chose.
    pub fn chosen(&self) -> Option<EndpointId> {
        self.outcome.as_ref().ok()?.order.first().copied()
    }
}

impl Ran {
    /// The chosen endpoint; a picker orders at least one.
    pub fn chosen(&self) -> EndpointId {
        let first = self.outcome.order.first().copied();
        first.unwrap_or_else(|| self.survivors.rows[0].id)
    }
}

impl Course {
    fn of(primary: Ran) -> Course {
        Course { primary, others: Vec::new(), primary_port: None }
    }
}

/// Memory that decisions use again, one after the other. A request that is rejected may keep what
/// it has taken; the next one then asks for new memory.
#[derive(Default)]
pub(super) struct Spare {
    pub survivors: Vec<Survivors>,
    pub outcomes: Vec<Outcome>,
    pub others: Vec<Other>,
    pub media: Vec<Vec<MediaMatch>>,
    pub keep: Vec<bool>,
}

impl Spare {
    /// The same once more.
    pub fn like(&mut self, other: &Survivors) -> Survivors {
        let mut survivors = self.survivors.pop().unwrap_or_default();
        survivors.clone_from(other);
        survivors
    }

    /// Takes back what a course was made of.
    pub fn take_back(&mut self, course: Course) {
        let Course { primary: Ran { survivors, outcome, .. }, mut others, .. } = course;
        self.survivors.push(survivors);
        self.outcomes.push(outcome);
        for Other { survivors, outcome, .. } in others.drain(..) {
            self.survivors.push(survivors);
            self.outcomes.extend(outcome);
        }
        if others.capacity() > 0 {
            self.others = others;
        }
    }
}

impl Brain {
    /// Runs the profiles of a request as the plan's handler says.
    pub(super) fn run_handler(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        base: Survivors,
    ) -> Result<Course, Reject> {
        // Set aside, because it is not to be copied.
        let handler = std::mem::replace(&mut self.plan.handler, HandlerPlan::Single);
        let course = self.run_profiles(asked, rng, base, &handler);
        self.plan.handler = handler;
        course
    }

    fn run_profiles(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        base: Survivors,
        handler: &HandlerPlan,
    ) -> Result<Course, Reject> {
        match handler {
            HandlerPlan::Single => self.primary(asked, rng, base, 0, None).map(Course::of),
            HandlerPlan::DataParallel { primary_port } => {
                let course = Course::of(self.primary(asked, rng, base, 0, None)?);
                Ok(Course { primary_port: Some(*primary_port), ..course })
            }
            HandlerPlan::Header { header, default } => {
                let profile = self.profile_named(asked.request, header, default)?;
                self.primary(asked, rng, base, profile, None).map(Course::of)
            }
            HandlerPlan::Disagg(disagg) => self.disaggregate(asked, rng, base, disagg),
        }
    }

    fn profile_named(
        &self,
        request: &Request<'_>,
        header: &str,
        default: &str,
    ) -> Result<usize, Reject> {
        let mut profiles = self.plan.profiles.iter();
        if profiles.len() == 1 {
            return Ok(0);
        }
        let given = request.headers.get(header).map(str::trim);
        let name = given.filter(|name| !name.is_empty()).unwrap_or(default);
        profiles.position(|profile| profile.name.as_str() == name).ok_or_else(|| {
            let names = self.plan.profiles.iter().map(|profile| profile.name.as_str());
            let names = names.collect::<Vec<_>>().join(", ");
            Reject::NoProfile { name: name.to_owned(), header: header.to_owned(), names }
        })
    }

    fn disaggregate(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        base: Survivors,
        plan: &DisaggPlan,
    ) -> Result<Course, Reject> {
        let mut others = std::mem::take(&mut self.spare.others);
        let mut peer = None;
        if let (StageOrder::PrefillFirst, Some((profile, _))) = (plan.order, plan.prefill) {
            let prefill = self.other(asked, rng, &base, (Step::Prefill, profile), None);
            peer = prefill.chosen();
            others.push(prefill);
        }
        let candidates = self.spare.like(&base);
        let primary = self.primary(asked, rng, candidates, plan.decode, peer)?;
        let decode = primary.chosen();
        if let Some((profile, decider)) = plan.encode {
            let uncached = self.uncached_on(asked.request, asked, &primary);
            if decider.decide(asked.request.prompt_tokens, uncached, asked.request.media.len()) {
                others.push(self.other(asked, rng, &base, (Step::Encode, profile), Some(decode)));
            }
        }
        if let (StageOrder::DecodeFirst, Some((profile, decider))) = (plan.order, plan.prefill) {
            let uncached = self.uncached_on(asked.request, asked, &primary);
            let (tokens, media) = (asked.request.prompt_tokens, asked.request.media.len());
            if decider.is_none_or(|decider| decider.decide(tokens, uncached, media)) {
                others.push(self.other(asked, rng, &base, (Step::Prefill, profile), Some(decode)));
            }
        }
        self.spare.survivors.push(base);
        Ok(Course { primary, others, primary_port: plan.primary_port })
    }

    /// Prompt tokens that the chosen endpoint has not cached, as the plan's main producer sees it.
    fn uncached_on(&self, request: &Request<'_>, asked: &Asked<'_>, ran: &Ran) -> u32 {
        let chosen = ran.chosen();
        let row = ran.survivors.rows.iter().find(|row| row.id == chosen);
        let found = row.and_then(|row| self.main_match(asked, row));
        uncached_tokens(request.prompt_tokens, found.unwrap_or_default())
    }

    fn primary(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        mut survivors: Survivors,
        profile: usize,
        peer: Option<EndpointId>,
    ) -> Result<Ran, Reject> {
        let mut outcome = self.spare.outcomes.pop().unwrap_or_default();
        let inputs = asked.inputs(&self.fleet, peer);
        self.pipelines[profile].run(&inputs, rng, &mut survivors, &mut outcome)?;
        Ok(Ran { profile, survivors, outcome })
    }

    fn other(
        &mut self,
        asked: &Asked<'_>,
        rng: &mut Rng,
        base: &Survivors,
        (step, profile): (Step, usize),
        peer: Option<EndpointId>,
    ) -> Other {
        let mut survivors = self.spare.like(base);
        let mut outcome = self.spare.outcomes.pop().unwrap_or_default();
        let inputs = asked.inputs(&self.fleet, peer);
        let ran = self.pipelines[profile].run(&inputs, rng, &mut survivors, &mut outcome);
        Other { step, profile, survivors, outcome: ran.map(|()| outcome) }
    }
}
