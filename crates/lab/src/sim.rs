//! What would this configuration do to this fleet under this load?
//!
//! A simulation in virtual time. The code that decides is the router's own
//! ([`kvroute_core::brain::Brain`]); it sees the fleet through the same seams as a live router:
//! metrics with an age, KV events with a delay, and what happens to its requests. The engines are
//! [`crate::model::EngineModel`]s. Everything follows from the scenario, the configuration and the
//! seed; nothing reads a clock.

mod engine;
mod fault;
mod flight;
mod prompts;
mod queue;
pub(crate) mod timeline;
mod world;

use std::path::Path;

use kvroute_core::decision::DecisionRecord;
use kvroute_core::plan::Plan;

use crate::model::{ModelConfigError, ProfileError};
use crate::record::RunRecord;
use crate::scenario::Scenario;
use crate::traffic::TrafficError;

/// Who decides.
#[derive(Clone, Debug)]
pub struct Arm {
    /// Shown in reports.
    pub name: String,
    /// How.
    pub policy: Policy,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug)]
pub enum Policy {
    /// The router's own code under a plan.
    Plan(Box<Plan>),
    /// Group `g` goes to engine `g` modulo the number of engines: a placement that knows the
    /// workload beforehand. A yardstick, not a policy.
    Oracle,
}

/// How far a simulation has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests of all stages, as far as they are known beforehand.
    pub planned: u64,
    /// Sent or refused.
    pub sent: u64,
    /// Virtual seconds.
    pub at_s: u64,
}

/// What a host may watch.
pub struct Watch<'a> {
    /// Called about every thousandth event.
    pub progress: &'a mut dyn FnMut(Progress),
    /// Called with every decision; `None` costs nothing.
    pub decisions: Option<&'a mut dyn FnMut(&DecisionRecord)>,
}

/// A simulation that cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The requests cannot be made.
    #[error(transparent)]
    Traffic(#[from] TrafficError),
    /// The engines' profile is not known.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The engines cannot be as described.
    #[error("fleet: {0}")]
    Engine(#[from] ModelConfigError),
    /// More engines than the plan allows.
    #[error("fleet: {0}")]
    Fleet(#[from] kvroute_core::fleet::FleetError),
}

/// Runs a scenario under one policy. `folder` is where relative paths in the scenario start.
///
/// # Errors
/// See [`SimError`].
pub fn run(
    scenario: &Scenario,
    folder: &Path,
    arm: &Arm,
    seed: u64,
    watch: &mut Watch<'_>,
) -> Result<RunRecord, SimError> {
    world::World::new(scenario, folder, arm, seed)?.run(watch)
}
