//! Does the core stay right when everything around it goes wrong?
//!
//! One seed is one run: two to five engines with small caches, their event publishers, clients,
//! and the real [`kvroute_core::brain::Brain`] under a plan drawn at random, told what the live
//! router would tell it and in the same order. Around it everything fails at random: batches are
//! lost, late, repeated, unreadable; links break; replays are refused, cut short, slow, or answered
//! by another engine; engines crash, restart with other blocks, lose their caches; endpoints leave
//! and come back; metrics stop or stand still; clients leave; the clock jumps forward.
//!
//! After every step the invariants of `check` must hold. At the end the faults stop, and what the
//! index says must be what the engines hold, or the endpoint's stream must say that it is not.
//! Time is virtual and everything random comes from the seed: a run can be repeated exactly.

mod check;
mod delivery;
mod engine;
mod fault;
mod fleet;
mod flight;
mod plans;
mod prompts;
mod settle;
mod stream;
mod world;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Serialize;

use world::World;

/// Steps of a run in which things go wrong, before the faults stop.
pub const STEPS: u32 = 600;

/// Most lines of a run that a failure shows.
const RECENT_MAX: usize = 24;

/// What a run did. The same seed and steps give the same report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChaosReport {
    /// As given.
    pub seed: u64,
    /// Steps, those after the faults stopped included.
    pub steps: u32,
    /// The plan that was drawn.
    pub plan: &'static str,
    /// Engines, at most at one time.
    pub engines: usize,
    /// Virtual time that passed, milliseconds.
    pub virtual_ms: u64,
    /// How requests ended, by name.
    pub outcomes: BTreeMap<&'static str, u64>,
    /// What went wrong, by name.
    pub faults: BTreeMap<&'static str, u64>,
    /// What the core was seen doing: states of streams, reasons of decisions, and more.
    pub seen: BTreeMap<String, u64>,
    /// How often an endpoint's blocks were compared with its engine's and had to be equal.
    pub compared_exactly: u64,
    /// Fingerprint of all decisions and outcomes in order.
    pub digest: u64,
    /// Everything that happened, line by line; empty unless a trace was asked for.
    pub trace: Vec<String>,
}

/// An invariant was broken.
#[derive(Clone, Debug, thiserror::Error)]
pub struct ChaosFailure {
    /// The seed.
    pub seed: u64,
    /// Steps with faults that were asked for.
    pub steps: u32,
    /// The plan that was drawn.
    pub plan: &'static str,
    /// The step after which it showed.
    pub step: u32,
    /// Virtual time, seconds.
    pub at_s: f64,
    /// Which invariant.
    pub invariant: &'static str,
    /// What was found instead.
    pub detail: String,
    /// The last events, or all with a trace.
    pub recent: Vec<String>,
}

impl ChaosFailure {
    /// The command that repeats the run.
    pub fn replay_command(&self) -> String {
        let steps = match self.steps {
            STEPS => String::new(),
            steps => format!(" --fault-steps {steps}"),
        };
        format!("kvroute sim --fault-seed {}{steps}", self.seed)
    }
}

impl fmt::Display for ChaosFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ChaosFailure { seed, plan, step, at_s, invariant, detail, recent, .. } = self;
        writeln!(f, "seed {seed} (plan {plan}), step {step} at {at_s:.3} s: {invariant}")?;
        writeln!(f, "  {detail}")?;
        writeln!(f, "what happened before:")?;
        recent.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        write!(f, "repeat it: {}", self.replay_command())
    }
}

/// Something broken on purpose, to show that a check can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// A link drops batches and renumbers the rest, so that no gap shows.
    HiddenLoss,
    /// A link empties batches on their way.
    EmptiedBatch,
    /// The end of some responses is not reported.
    EndUnreported,
    /// A client gets its answer twice.
    AnsweredTwice,
    /// A request disappears on its way to the engine.
    RequestLost,
    /// A removed endpoint stays in the brain.
    EndpointKept,
    /// Decisions are made that nobody asked for.
    DecisionUncounted,
    /// An engine drops cached blocks without an event.
    SilentEviction,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Sabotage; 8] = [
        Sabotage::HiddenLoss,
        Sabotage::EmptiedBatch,
        Sabotage::EndUnreported,
        Sabotage::AnsweredTwice,
        Sabotage::RequestLost,
        Sabotage::EndpointKept,
        Sabotage::DecisionUncounted,
        Sabotage::SilentEviction,
    ];
}

/// An invariant that does not hold, and what was found instead.
#[derive(Debug)]
struct Violation {
    invariant: &'static str,
    detail: String,
}

/// What a step returns.
type Checked = Result<(), Violation>;

/// Fails with `detail` unless `holds`.
fn ensure(holds: bool, invariant: &'static str, detail: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Violation { invariant, detail: detail() }) }
}

/// One run. `trace` keeps every event for the report or the failure.
///
/// # Errors
/// [`ChaosFailure`] when an invariant was broken or the core panicked.
pub fn run(seed: u64, steps: u32, trace: bool) -> Result<ChaosReport, ChaosFailure> {
    run_sabotaged(seed, steps, trace, None)
}

/// One run with something broken on purpose: for showing that the checks can fail.
///
/// # Errors
/// As [`run`].
pub fn run_sabotaged(
    seed: u64,
    steps: u32,
    trace: bool,
    sabotage: Option<Sabotage>,
) -> Result<ChaosReport, ChaosFailure> {
    let mut world = World::new(seed, steps, trace, sabotage);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run())).unwrap_or_else(|panic| {
        Err(Violation { invariant: "nothing panics", detail: message_of(&*panic) })
    });
    match ended {
        Ok(()) => Ok(world.report()),
        Err(violation) => Err(world.failure(violation)),
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a panic without a message".to_owned())
}
