//! What will run? A configuration with every default filled in, every name resolved and every
//! rule checked.

mod build;
mod builtin;
mod handlers;
mod inputs;
mod profiles;
mod sections;
mod show;
#[cfg(test)]
mod tests;
mod warn;

use crate::collect::CollectPlan;
use crate::config::EndpointPickerConfig;
use crate::fleet::Name;
use crate::handle::{Decider, StageOrder};
use crate::index::IndexLimits;
use crate::parse::ParserKind;
use crate::plugin::{PluginKind, PluginSpec};
use crate::produce::{
    ApproxPrefix, BurstPrefix, InflightLoad, P2pSource, PrecisePrefix, PredictedLatency,
    TokenEstimate,
};
use crate::settings::Settings;

pub use show::{Shown, ShownData, ShownNote, ShownPlugin, ShownProducer, ShownProfile};

/// A checked configuration. Printing it shows what runs, what was added, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// All limits.
    pub settings: Settings,
    /// Which profiles run for a request.
    pub handler: HandlerPlan,
    /// At least one.
    pub profiles: Vec<ProfilePlan>,
    /// Remove candidates before any profile runs.
    pub screeners: Vec<StagePlan>,
    /// Let requests in, or refuse them.
    pub admitters: Vec<StagePlan>,
    /// Says how full the fleet is.
    pub detector: Option<StagePlan>,
    /// Producers of prefix matches, in order of configuration, added ones last.
    pub producers: Vec<ProducerPlan>,
    /// Position in `producers` of the one whose knowledge is reported as the request's: the first
    /// precise one, else the first.
    pub producer_main: Option<usize>,
    /// How load is charged.
    pub load: LoadPlan,
    /// Producers of anything else, by name.
    pub others: Vec<(Name, PluginSpec)>,
    /// What proxies are told about answers.
    pub reporters: Vec<PluginSpec>,
    /// What is expected of requests on each endpoint; `None`: nothing reads it.
    pub latency: Option<LatencyPlan>,
    /// From whom endpoints fetch cached blocks; `None`: from nobody.
    pub peers: Option<PeersPlan>,
    /// Which tokens requests must come with.
    pub tokens: TokensNeed,
    /// How tokens are estimated where they are.
    pub estimate: TokenEstimate,
    /// Who reads bodies, in order of preference.
    pub parsers: Vec<ParserKind>,
    /// What is collected from endpoints.
    pub collect: CollectPlan,
    /// Request headers that plugins read, lower case.
    pub headers: Vec<String>,
    /// What was added, is inert, or deserves a look.
    pub notes: Vec<Note>,
}

/// Which profiles run for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandlerPlan {
    /// The one that there is.
    Single,
    /// The one that a request header names.
    Header {
        /// Lower case.
        header: String,
        /// For requests without it.
        default: String,
    },
    /// The one that there is; requests go to one port of the chosen host.
    DataParallel {
        /// That port.
        primary_port: u16,
    },
    /// Several, each for a part of the work.
    Disagg(DisaggPlan),
}

/// Disaggregated serving, with positions in `Plan::profiles`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DisaggPlan {
    /// Which endpoint is chosen first.
    pub order: StageOrder,
    /// Chooses who answers.
    pub decode: usize,
    /// Chooses who computes the prompt, and whether anybody does; without a decider always.
    pub prefill: Option<(usize, Option<Decider>)>,
    /// Chooses who encodes, and whether anybody does.
    pub encode: Option<(usize, Decider)>,
    /// Where requests go on the chosen host, when not to the endpoint's own port.
    pub primary_port: Option<u16>,
}

/// One profile.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfilePlan {
    /// Its name.
    pub name: Name,
    /// In order.
    pub filters: Vec<StagePlan>,
    /// In order.
    pub scorers: Vec<StagePlan>,
    /// Orders what is left.
    pub picker: StagePlan,
}

/// One plugin in a profile.
#[derive(Clone, Debug, PartialEq)]
pub struct StagePlan {
    /// Its name.
    pub name: Name,
    /// Type and parameters.
    pub spec: PluginSpec,
    /// Of a scorer.
    pub weight: f64,
    /// Position in `Plan::producers` of the producer it reads.
    pub prefix: Option<usize>,
    /// Position in `Plan::others` of the producer of encoder cache matches that it reads.
    pub media: Option<usize>,
}

impl StagePlan {
    /// A plugin by itself.
    pub(crate) fn new(name: Name, spec: PluginSpec) -> StagePlan {
        StagePlan { name, spec, weight: 1.0, prefix: None, media: None }
    }
}

/// A producer of prefix matches.
#[derive(Clone, Debug, PartialEq)]
pub struct ProducerPlan {
    /// Its name.
    pub name: Name,
    /// What it is.
    pub kind: ProducerKind,
}

/// Kinds of prefix knowledge.
#[derive(Clone, Debug, PartialEq)]
pub enum ProducerKind {
    /// From routing history.
    Approx(ApproxPrefix),
    /// From events.
    Precise(Box<PrecisePrefix>),
    /// From where the requests of one window are placed.
    Burst(BurstPrefix),
}

/// How load is charged.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadPlan {
    /// Parameters.
    pub producer: InflightLoad,
    /// Position in `Plan::producers` of the matches that are subtracted.
    pub prefix: Option<usize>,
}

/// How latency is predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct LatencyPlan {
    /// Parameters.
    pub producer: PredictedLatency,
    /// Position in `Plan::producers` of the matches that it reads.
    pub prefix: Option<usize>,
}

/// How a source of cached blocks is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct PeersPlan {
    /// Parameters.
    pub producer: P2pSource,
    /// Position in `Plan::producers` of the matches that it reads.
    pub prefix: Option<usize>,
}

/// Which tokens a plan reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokensNeed {
    /// None: nothing needs to be tokenized or hashed.
    None,
    /// Four bytes each are good enough.
    Estimated,
    /// The engine's own; estimates where they cannot be had.
    Exact,
}

/// A remark about a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What kind of remark.
    pub kind: NoteKind,
    /// In words.
    pub text: String,
}

/// Kinds of remarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoteKind {
    /// Not in the configuration, but needed.
    Added,
    /// In the configuration, but without effect.
    Inert,
    /// Probably not what was meant.
    Warning,
}

/// Why a configuration cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct PlanError {
    /// Where, as `schedulingProfiles[0].plugins[2].pluginRef`.
    pub path: String,
    /// What is wrong and what to do.
    pub message: String,
}

/// Whether plugins that llm-d calls Alpha may be used; the flag `--allow-experimental-plugins`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Experimental {
    /// They are errors.
    #[default]
    Refused,
    /// They are like all others.
    Allowed,
}

impl From<bool> for Experimental {
    fn from(allowed: bool) -> Experimental {
        if allowed { Experimental::Allowed } else { Experimental::Refused }
    }
}

impl Plan {
    /// Checks and completes a configuration.
    ///
    /// # Errors
    /// The first fault, with its place in the configuration.
    pub fn build(
        config: &EndpointPickerConfig,
        experimental: Experimental,
    ) -> Result<Plan, PlanError> {
        build::build(config, experimental)
    }

    /// What the index may grow to under this plan.
    pub fn index_limits(&self) -> IndexLimits {
        let settings = &self.settings;
        IndexLimits {
            bytes_max: settings.index_bytes_max,
            history_blocks_per_endpoint_max: self.history_blocks_max(),
            pending_blocks_per_endpoint_max: settings.pending_blocks_per_endpoint_max,
            speculations_max: settings.speculations_max,
        }
    }

    fn history_blocks_max(&self) -> u32 {
        let given = self.settings.history_blocks_per_endpoint_max;
        let wanted = self.producers.iter().filter_map(|producer| match &producer.kind {
            ProducerKind::Approx(approx) => Some(approx.lru_capacity_per_server),
            ProducerKind::Precise(_) | ProducerKind::Burst(_) => None,
        });
        let Some(most) = wanted.max() else { return given };
        // Precise knowledge falls back on history, and does not ask for so little.
        let is_default = given == Settings::default().history_blocks_per_endpoint_max;
        if is_default && !self.reads_events() { most } else { most.max(given) }
    }

    /// The port of each host that requests go to, when not the endpoints' own.
    pub fn primary_port(&self) -> Option<u16> {
        match &self.handler {
            HandlerPlan::DataParallel { primary_port } => Some(*primary_port),
            HandlerPlan::Disagg(disagg) => disagg.primary_port,
            HandlerPlan::Single | HandlerPlan::Header { .. } => None,
        }
    }

    /// Whether anything reads what requests cost.
    pub fn reads_costs(&self) -> bool {
        if self.latency.is_some() {
            return true;
        }
        let stages = self.profiles.iter().flat_map(|profile| &profile.scorers);
        stages.into_iter().any(|stage| stage.spec.kind() == PluginKind::CostScorer)
    }

    /// The producer that holds requests until their window closes, and its position.
    pub fn burst(&self) -> Option<(usize, &BurstPrefix)> {
        self.producers.iter().enumerate().find_map(|(at, producer)| match &producer.kind {
            ProducerKind::Burst(burst) => Some((at, burst)),
            ProducerKind::Approx(_) | ProducerKind::Precise(_) => None,
        })
    }

    /// Whether any producer reads events: without one, hosts need not subscribe.
    pub fn reads_events(&self) -> bool {
        self.producers.iter().any(|p| matches!(p.kind, ProducerKind::Precise(_)))
    }

    /// The precise producer, if there is one.
    pub fn precise_producer(&self) -> Option<&PrecisePrefix> {
        self.producers.iter().find_map(|producer| match &producer.kind {
            ProducerKind::Precise(precise) => Some(precise.as_ref()),
            ProducerKind::Approx(_) | ProducerKind::Burst(_) => None,
        })
    }
}
