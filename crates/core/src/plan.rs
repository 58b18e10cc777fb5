//! What will run? A configuration with every default filled in, every name resolved and every
//! rule checked.

use std::fmt;

use crate::config::{EndpointPickerConfig, PluginEntry, ProfileEntry};
use crate::fleet::Name;
use crate::index::IndexLimits;
use crate::plugin::{PluginKind, PluginSpec, Role, nearest_first};
use crate::produce::{ApproxPrefix, InflightLoad, PrecisePrefix, Tokens};
use crate::settings::Settings;
use crate::stage::{Inputs, LOAD_DEFAULT, PREFIX_DEFAULT, ProducerRef};

#[cfg(test)]
mod tests;

/// A checked configuration. Printing it shows what runs, what was added, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// All limits.
    pub settings: Settings,
    /// Exactly one as long as `single-profile-handler` is the only handler.
    pub profiles: Vec<ProfilePlan>,
    /// Producers of prefix matches, in order of configuration, added ones last.
    pub producers: Vec<ProducerPlan>,
    /// Position in `producers` of the one whose knowledge is reported as the request's: the first
    /// precise one, else the first.
    pub producer_main: Option<usize>,
    /// How load is charged.
    pub load: LoadPlan,
    /// Which tokens requests must come with.
    pub tokens: TokensNeed,
    /// Request headers that plugins read, lower case.
    pub headers: Vec<String>,
    /// What was added, is inert, or deserves a look.
    pub notes: Vec<Note>,
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
}

/// How load is charged.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadPlan {
    /// Parameters.
    pub producer: InflightLoad,
    /// Position in `Plan::producers` of the matches that are subtracted.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

fn error(path: impl Into<String>, message: impl Into<String>) -> PlanError {
    PlanError { path: path.into(), message: message.into() }
}

const FEATURE_GATES: [&str; 2] = ["flowControl", "haPopulateNonLeaderDatastore"];

impl Plan {
    /// Checks and completes a configuration.
    pub fn build(config: &EndpointPickerConfig) -> Result<Plan, PlanError> {
        let mut builder = Builder::new(config)?;
        builder.check_sections()?;
        let entries = builder.profile_entries()?;
        let mut profiles = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            profiles.push(builder.profile(at, entry)?);
        }
        builder.resolve(&mut profiles)?;
        builder.finish(profiles)
    }

    /// What `serve` runs without a configuration file: precise knowledge with the blocks of
    /// requests on their way, llm-d's well-known weights, and new prefixes spread evenly.
    pub fn precise() -> Plan {
        builtin(EndpointPickerConfig::precise())
    }

    /// kvroute's own policy.
    pub fn least_cost() -> Plan {
        builtin(EndpointPickerConfig::least_cost())
    }

    /// The baseline that `demo` and `bench` compare with: endpoint after endpoint.
    pub fn baseline_round_robin() -> Plan {
        let plugin = PluginSpec::RoundRobinPicker(crate::pick::RoundRobin::default());
        let plugins = vec![PluginEntry::from(plugin)];
        builtin(EndpointPickerConfig { plugins, ..EndpointPickerConfig::default() })
    }

    /// What the index may grow to under this plan.
    pub fn index_limits(&self) -> IndexLimits {
        let history = self.producers.iter().map(|producer| match &producer.kind {
            ProducerKind::Approx(approx) => approx.lru_capacity_per_server,
            ProducerKind::Precise(_) => 0,
        });
        let history = history.max().unwrap_or(0);
        let settings = &self.settings;
        IndexLimits {
            bytes_max: settings.index_bytes_max,
            history_blocks_per_endpoint_max: settings.history_blocks_per_endpoint_max.max(history),
            pending_blocks_per_endpoint_max: settings.pending_blocks_per_endpoint_max,
            speculations_max: settings.speculations_max,
        }
    }

    /// Whether any scorer reads what requests cost.
    pub fn reads_costs(&self) -> bool {
        let stages = self.profiles.iter().flat_map(|profile| &profile.scorers);
        stages.into_iter().any(|stage| stage.spec.kind() == PluginKind::CostScorer)
    }

    /// Whether any producer reads events: without one, hosts need not subscribe.
    pub fn reads_events(&self) -> bool {
        self.producers.iter().any(|p| matches!(p.kind, ProducerKind::Precise(_)))
    }

    /// The precise producer, if there is one.
    pub fn precise_producer(&self) -> Option<&PrecisePrefix> {
        self.producers.iter().find_map(|producer| match &producer.kind {
            ProducerKind::Precise(precise) => Some(precise.as_ref()),
            ProducerKind::Approx(_) => None,
        })
    }
}

fn builtin(config: EndpointPickerConfig) -> Plan {
    Plan::build(&config).expect("built-in configurations are tested")
}

impl EndpointPickerConfig {
    /// kvroute's own policy: precise knowledge, and the least harm done.
    pub fn least_cost() -> EndpointPickerConfig {
        let precise = PrecisePrefix { speculative_indexing: true, ..PrecisePrefix::default() };
        let specs = [
            PluginSpec::PrecisePrefixProducer(precise),
            PluginSpec::CostScorer(crate::score::Cost::default()),
        ];
        EndpointPickerConfig {
            plugins: specs.map(PluginEntry::from).to_vec(),
            ..EndpointPickerConfig::default()
        }
    }

    /// The configuration of [`Plan::precise`].
    pub fn precise() -> EndpointPickerConfig {
        use crate::score::{KvUsage, NoHitLru, Prefix, Queue};
        let producer = "precise-prefix-cache-producer";
        let named = || Some(producer.to_owned());
        let prefix = Prefix { prefix_match_info_producer_name: named(), ..Prefix::default() };
        let precise = PrecisePrefix { speculative_indexing: true, ..PrecisePrefix::default() };
        let load =
            InflightLoad { prefix_match_info_producer_name: named(), ..InflightLoad::default() };
        let weighted = [
            (PluginSpec::PrefixScorer(prefix), 3.0),
            (PluginSpec::QueueScorer(Queue {}), 2.0),
            (PluginSpec::KvUsageScorer(KvUsage {}), 2.0),
            (PluginSpec::NoHitLruScorer(NoHitLru::reading(producer)), 2.0),
        ];
        let others =
            [PluginSpec::PrecisePrefixProducer(precise), PluginSpec::InflightLoadProducer(load)];
        let refs = weighted.iter().map(|(spec, weight)| crate::config::ProfilePlugin {
            plugin_ref: spec.kind().name().to_owned(),
            weight: Some(*weight),
        });
        let profile = ProfileEntry { name: "default".into(), plugins: refs.collect() };
        let specs = others.into_iter().chain(weighted.into_iter().map(|(spec, _)| spec));
        EndpointPickerConfig {
            plugins: specs.map(PluginEntry::from).collect(),
            scheduling_profiles: vec![profile],
            ..EndpointPickerConfig::default()
        }
    }
}

/// Plugins by name while a plan is made: configured ones, and those that are added.
struct Builder<'a> {
    config: &'a EndpointPickerConfig,
    plugins: Vec<(Name, PluginSpec)>,
    notes: Vec<Note>,
}

impl<'a> Builder<'a> {
    fn new(config: &'a EndpointPickerConfig) -> Result<Builder<'a>, PlanError> {
        if let Some(field) = config.kvroute.zero() {
            return Err(error(format!("kvroute.{field}"), "must be positive"));
        }
        let mut builder = Builder { config, plugins: Vec::new(), notes: Vec::new() };
        for (at, entry) in config.plugins.iter().enumerate() {
            let name = Name::from(entry.name());
            if builder.spec(entry.name()).is_some() {
                let message = format!("duplicate plugin name '{name}'; give one of them a `name`");
                return Err(error(format!("plugins[{at}].name"), message));
            }
            entry
                .spec
                .plugin()
                .check()
                .map_err(|text| error(format!("plugins[{at}].parameters"), text))?;
            builder.plugins.push((name, entry.spec.clone()));
        }
        Ok(builder)
    }

    fn spec(&self, name: &str) -> Option<&PluginSpec> {
        self.plugins.iter().find(|(n, _)| n.as_str() == name).map(|(_, spec)| spec)
    }

    fn note(&mut self, kind: NoteKind, text: impl Into<String>) {
        self.notes.push(Note { kind, text: text.into() });
    }

    fn add(&mut self, spec: PluginSpec, why: &str) -> Name {
        let name = Name::from(spec.kind().name());
        self.note(NoteKind::Added, format!("{name}: {why}"));
        self.plugins.push((name.clone(), spec));
        name
    }

    fn undefined(&self, path: String, name: &str) -> PlanError {
        let names = nearest_first(name, self.plugins.iter().map(|(n, _)| n.as_str()));
        let names = if names.is_empty() { "none".into() } else { names.join(", ") };
        error(path, format!("references undefined plugin '{name}'; defined: {names}"))
    }

    /// Sections beside plugins and profiles: references must exist; most of it has no effect yet.
    fn check_sections(&mut self) -> Result<(), PlanError> {
        let config = self.config;
        for (at, gate) in config.feature_gates.iter().enumerate() {
            self.check_gate(format!("featureGates[{at}]"), gate)?;
        }
        if let Some(data_layer) = &config.data_layer {
            for (at, source) in data_layer.sources.iter().enumerate() {
                let path = format!("dataLayer.sources[{at}]");
                let extractors = source.extractors.iter().map(|e| &e.plugin_ref);
                for name in std::iter::once(&source.plugin_ref).chain(extractors) {
                    if self.spec(name).is_none() {
                        return Err(self.undefined(path, name));
                    }
                }
            }
            self.note(NoteKind::Inert, "dataLayer: metrics and events are always collected");
        }
        if config.flow_control.is_some() || config.saturation_detector.is_some() {
            self.note(NoteKind::Inert, "flowControl: requests do not queue in this version");
        }
        if config.request_handler.is_some() || config.parser.is_some() {
            self.note(NoteKind::Inert, "requestHandler: the path of a request decides its parser");
        }
        let handlers = self.plugins.iter().filter(|(_, spec)| spec.kind().is(Role::Handler));
        if handlers.count() > 1 {
            return Err(error("plugins", "multiple profile handlers found; keep one"));
        }
        Ok(())
    }

    fn check_gate(&mut self, path: String, gate: &str) -> Result<(), PlanError> {
        let (name, value) = gate.split_once('=').unwrap_or((gate, "true"));
        if !FEATURE_GATES.contains(&name) {
            let known = FEATURE_GATES.join(", ");
            let message =
                format!("feature gate '{name}' is unknown or unregistered; known: {known}");
            return Err(error(path, message));
        }
        match value {
            "true" if name == "flowControl" => {
                self.note(
                    NoteKind::Inert,
                    "featureGates: flowControl is not available in this version",
                );
                Ok(())
            }
            "true" | "false" => Ok(()),
            _ => {
                let message = format!("{value} is not a valid value for the feature gate {name}");
                Err(error(path, message))
            }
        }
    }

    /// The configured profiles, or one of every plugin that can run in one.
    fn profile_entries(&mut self) -> Result<Vec<ProfileEntry>, PlanError> {
        let entries = match self.config.scheduling_profiles.as_slice() {
            [] => {
                self.note(NoteKind::Added, "profile default: of every filter, scorer and picker");
                let stages = self.plugins.iter().filter(|(_, spec)| is_stage(spec));
                let plugins = stages.map(|(name, _)| crate::config::ProfilePlugin {
                    plugin_ref: name.to_string(),
                    weight: None,
                });
                vec![ProfileEntry { name: "default".into(), plugins: plugins.collect() }]
            }
            entries => entries.to_vec(),
        };
        for (at, entry) in entries.iter().enumerate() {
            let path = format!("schedulingProfiles[{at}].name");
            if entry.name.is_empty() {
                return Err(error(path, "the profile is missing a name"));
            }
            if entries[..at].iter().any(|other| other.name == entry.name) {
                return Err(error(path, format!("duplicate name '{}'", entry.name)));
            }
        }
        if entries.len() > 1 {
            let message = "the single-profile-handler cannot support multiple scheduling \
                           profiles; keep one";
            return Err(error("schedulingProfiles", message));
        }
        if !self.plugins.iter().any(|(_, spec)| spec.kind().is(Role::Handler)) {
            let handler = PluginSpec::SingleProfileHandler(crate::handle::Single::default());
            self.add(handler, "there is one profile");
        }
        Ok(entries)
    }

    fn profile(&mut self, at: usize, entry: &ProfileEntry) -> Result<ProfilePlan, PlanError> {
        let (mut filters, mut scorers, mut pickers) = (Vec::new(), Vec::new(), Vec::new());
        for (index, plugin) in entry.plugins.iter().enumerate() {
            let path = format!("schedulingProfiles[{at}].plugins[{index}]");
            if plugin.plugin_ref.is_empty() {
                return Err(error(path, "the entry is missing a pluginRef"));
            }
            let name = Name::from(plugin.plugin_ref.as_str());
            let Some(spec) = self.spec(name.as_str()).cloned() else {
                return Err(self.undefined(format!("{path}.pluginRef"), name.as_str()));
            };
            let kind = spec.kind();
            if let Some(weight) = plugin.weight {
                check_weight(&path, &name, kind, weight)?;
            }
            let weight = plugin.weight.unwrap_or(1.0);
            if !is_stage(&spec) {
                let text = format!("{path}: {name} is neither filter, scorer nor picker");
                self.note(NoteKind::Inert, text);
            }
            let stage = StagePlan { name, spec, weight, prefix: None };
            let roles = kind.roles().iter();
            for role in roles {
                match role {
                    Role::Filter => filters.push(stage.clone()),
                    Role::Scorer => scorers.push(stage.clone()),
                    Role::Picker => pickers.push(stage.clone()),
                    _ => {}
                }
            }
        }
        let path = format!("schedulingProfiles[{at}]");
        let picker = self.picker(path, pickers)?;
        Ok(ProfilePlan { name: Name::from(entry.name.as_str()), filters, scorers, picker })
    }

    fn picker(&mut self, path: String, pickers: Vec<StagePlan>) -> Result<StagePlan, PlanError> {
        let mut pickers = pickers.into_iter();
        match (pickers.next(), pickers.next()) {
            (Some(one), None) => Ok(one),
            (Some(one), Some(two)) => {
                let (one, two) = (one.name, two.name);
                let message =
                    format!("failed to set '{two}' as picker, already have a picker '{one}'");
                Err(error(path, message))
            }
            (None, _) => {
                let configured = self.plugins.iter().find(|(_, spec)| spec.kind().is(Role::Picker));
                let (name, spec) = configured.cloned().unwrap_or_else(|| {
                    let spec = PluginSpec::MaxScorePicker(crate::pick::MaxScore::default());
                    (self.add(spec.clone(), "the profile has no picker"), spec)
                });
                Ok(StagePlan { name, spec, weight: 1.0, prefix: None })
            }
        }
    }

    /// Finds the producer of every stage, adds those that are missing.
    fn resolve(&mut self, profiles: &mut [ProfilePlan]) -> Result<(), PlanError> {
        for stage in profiles.iter_mut().flat_map(|p| p.filters.iter_mut().chain(&mut p.scorers)) {
            let parts = stage.spec.parts();
            let filter = parts.filter.as_ref().map(|f| f.inputs());
            let scorer = parts.scorer.as_ref().map(|s| s.inputs());
            for inputs in [filter, scorer].into_iter().flatten() {
                self.add_missing(stage, inputs)?;
                if let Some(prefix) = inputs.prefix {
                    let name = self.prefix_producer(prefix);
                    stage.prefix = self.prefix_producers().position(|(n, _)| *n == name);
                }
            }
        }
        Ok(())
    }

    /// `precise-prefix-cache-scorer` reads any precise producer, others the one of that name.
    fn prefix_producer(&self, wanted: ProducerRef<'_>) -> Name {
        let precise =
            |(_, spec): &&(Name, PluginSpec)| matches!(spec, PluginSpec::PrecisePrefixProducer(_));
        match wanted {
            ProducerRef::Default(name) if name != PREFIX_DEFAULT => {
                let configured = self.plugins.iter().find(precise);
                configured.map_or(Name::from(name), |(name, _)| name.clone())
            }
            wanted => Name::from(wanted.name()),
        }
    }

    fn add_missing(&mut self, stage: &StagePlan, inputs: Inputs<'_>) -> Result<(), PlanError> {
        let why = format!("{} reads it", stage.name);
        if let Some(wanted) = inputs.prefix {
            let name = self.prefix_producer(wanted);
            let spec = self.spec(name.as_str());
            if spec.is_some_and(|spec| !is_prefix_producer(spec)) {
                let message = format!("'{name}' does not produce prefix matches");
                return Err(error(format!("plugins ({})", stage.name), message));
            }
            if spec.is_none() {
                let spec = self.prefix_producer_to_add(stage, name.as_str())?;
                self.add(spec, &why);
            }
        }
        if let Some(wanted) = inputs.load
            && self.spec(wanted.name()).is_none()
        {
            if wanted.name() != LOAD_DEFAULT {
                return Err(self.undefined(format!("plugins ({})", stage.name), wanted.name()));
            }
            self.add(PluginSpec::InflightLoadProducer(InflightLoad::default()), &why);
        }
        Ok(())
    }

    fn prefix_producer_to_add(
        &self,
        stage: &StagePlan,
        name: &str,
    ) -> Result<PluginSpec, PlanError> {
        match (PluginKind::of_name(name), &stage.spec) {
            (Some(PluginKind::PrecisePrefixProducer), PluginSpec::PrecisePrefixScorer(scorer)) => {
                Ok(PluginSpec::PrecisePrefixProducer(scorer.producer()))
            }
            (Some(PluginKind::PrecisePrefixProducer), PluginSpec::PrefixScorer(scorer)) => {
                Ok(PluginSpec::PrecisePrefixProducer(scorer.older_tracking()))
            }
            (Some(PluginKind::ApproxPrefixProducer), PluginSpec::PrefixScorer(scorer))
                if scorer.older_form().is_some() =>
            {
                Ok(PluginSpec::ApproxPrefixProducer(scorer.older_history()))
            }
            (Some(PluginKind::PrecisePrefixProducer), _) => {
                Ok(PluginSpec::PrecisePrefixProducer(PrecisePrefix::default()))
            }
            (Some(PluginKind::ApproxPrefixProducer), _) => {
                Ok(PluginSpec::ApproxPrefixProducer(ApproxPrefix::default()))
            }
            _ => Err(self.undefined(format!("plugins ({})", stage.name), name)),
        }
    }

    fn prefix_producers(&self) -> impl Iterator<Item = &(Name, PluginSpec)> {
        self.plugins.iter().filter(|(_, spec)| is_prefix_producer(spec))
    }

    fn finish(mut self, profiles: Vec<ProfilePlan>) -> Result<Plan, PlanError> {
        let producers: Vec<ProducerPlan> = self
            .prefix_producers()
            .filter_map(|(name, spec)| {
                let kind = match spec {
                    PluginSpec::ApproxPrefixProducer(p) => ProducerKind::Approx(p.clone()),
                    PluginSpec::PrecisePrefixProducer(p) => {
                        ProducerKind::Precise(Box::new(p.clone()))
                    }
                    _ => return None,
                };
                Some(ProducerPlan { name: name.clone(), kind })
            })
            .collect();
        let precise = producers.iter().position(|p| matches!(p.kind, ProducerKind::Precise(_)));
        let main = precise.or(if producers.is_empty() { None } else { Some(0) });
        let load = self.load(&producers, main)?;
        let tokens = self.tokens(!producers.is_empty(), precise.is_some());
        self.warn(&profiles, &producers);
        let mut headers: Vec<String> = profiles
            .iter()
            .flat_map(|profile| &profile.scorers)
            .flat_map(|stage| stage.spec.parts().scorer.map(|s| s.headers()).unwrap_or_default())
            .collect();
        headers.sort_unstable();
        headers.dedup();
        Ok(Plan {
            settings: self.config.kvroute.clone(),
            profiles,
            producers,
            producer_main: main,
            load,
            tokens,
            headers,
            notes: self.notes,
        })
    }

    /// Load is always charged. It subtracts the matches of the named producer, else of the default
    /// one where it runs, else of the main one.
    fn load(&self, producers: &[ProducerPlan], main: Option<usize>) -> Result<LoadPlan, PlanError> {
        let configured = self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::InflightLoadProducer(producer) => Some(producer.clone()),
            _ => None,
        });
        let producer = configured.unwrap_or_default();
        let position = |name: &str| producers.iter().position(|p| p.name.as_str() == name);
        let prefix = match producer.prefix_match_info_producer_name.as_deref() {
            Some(name) if !name.is_empty() => match position(name) {
                Some(at) => Some(at),
                None => {
                    return Err(self.undefined(format!("plugins ({LOAD_DEFAULT})"), name));
                }
            },
            _ => position(PREFIX_DEFAULT).or(main),
        };
        Ok(LoadPlan { producer, prefix })
    }

    fn tokens(&mut self, prefix: bool, precise: bool) -> TokensNeed {
        let configured = self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::TokenProducer(tokens) => Some(tokens.clone()),
            _ => None,
        });
        if configured.as_ref().is_some_and(|tokens| tokens.vllm.is_some()) {
            let text = "token-producer.vllm: prompts are tokenized in this process, its url is \
                        not called";
            self.note(NoteKind::Inert, text);
        }
        let exact = precise || configured.as_ref().is_some_and(|tokens| tokens.vllm.is_some());
        if prefix && configured.is_none() {
            self.add(PluginSpec::TokenProducer(Tokens::default()), "prefix matching needs tokens");
        }
        match (prefix, exact) {
            (false, _) => TokensNeed::None,
            (true, false) => TokensNeed::Estimated,
            (true, true) => TokensNeed::Exact,
        }
    }

    fn warn(&mut self, profiles: &[ProfilePlan], producers: &[ProducerPlan]) {
        let stages = || profiles.iter().flat_map(|p| p.filters.iter().chain(&p.scorers));
        for stage in stages() {
            if let PluginSpec::PrefixScorer(scorer) = &stage.spec
                && scorer.older_form().is_some()
            {
                let text = format!(
                    "{}: parameters of llm-d's releases of 2025; it matches and scores as those did",
                    stage.name
                );
                self.note(NoteKind::Warning, text);
            }
        }
        for (at, producer) in producers.iter().enumerate() {
            if !stages().any(|stage| stage.prefix == Some(at)) {
                let text = format!("{}: nothing in a profile reads it", producer.name);
                self.note(NoteKind::Warning, text);
            }
        }
        let in_profile = |name: &Name| {
            stages().any(|s| s.name == *name) || profiles.iter().any(|p| p.picker.name == *name)
        };
        let unused: Vec<String> = self
            .plugins
            .iter()
            .filter(|(name, spec)| is_stage(spec) && !in_profile(name))
            .map(|(name, _)| format!("{name}: in no profile"))
            .collect();
        unused.into_iter().for_each(|text| self.note(NoteKind::Inert, text));
    }
}

fn is_stage(spec: &PluginSpec) -> bool {
    [Role::Filter, Role::Scorer, Role::Picker].into_iter().any(|role| spec.kind().is(role))
}

fn is_prefix_producer(spec: &PluginSpec) -> bool {
    matches!(spec, PluginSpec::ApproxPrefixProducer(_) | PluginSpec::PrecisePrefixProducer(_))
}

fn check_weight(path: &str, name: &Name, kind: PluginKind, weight: f64) -> Result<(), PlanError> {
    let path = format!("{path}.weight");
    if !kind.is(Role::Scorer) {
        return Err(error(path, format!("{name} is no scorer, it has no weight")));
    }
    if !weight.is_finite() || weight < 0.0 {
        return Err(error(path, format!("{weight} must be finite and not negative")));
    }
    Ok(())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for profile in &self.profiles {
            writeln!(f, "profile {}", profile.name)?;
            for stage in &profile.filters {
                writeln!(f, "  filter  {}{}", stage.name, self.reads(stage))?;
            }
            for stage in &profile.scorers {
                let (name, weight, reads) = (&stage.name, stage.weight, self.reads(stage));
                writeln!(f, "  scorer  {name} x {weight}{reads}")?;
            }
            writeln!(f, "  picker  {}", profile.picker.name)?;
        }
        for producer in &self.producers {
            let kind = match producer.kind {
                ProducerKind::Approx(_) => "approximate, from routing history",
                ProducerKind::Precise(_) => "precise, from engine events",
            };
            writeln!(f, "prefix knowledge {}: {kind}", producer.name)?;
        }
        let tokens = match self.tokens {
            TokensNeed::None => "not needed",
            TokensNeed::Estimated => "estimated, four bytes each",
            TokensNeed::Exact => "exact; estimated where there is no tokenizer",
        };
        writeln!(f, "tokens {tokens}")?;
        for note in &self.notes {
            let kind = match note.kind {
                NoteKind::Added => "added",
                NoteKind::Inert => "inert",
                NoteKind::Warning => "warning",
            };
            writeln!(f, "{kind}: {}", note.text)?;
        }
        Ok(())
    }
}

impl Plan {
    fn reads(&self, stage: &StagePlan) -> String {
        match stage.prefix.and_then(|at| self.producers.get(at)) {
            Some(producer) => format!(" (reads {})", producer.name),
            None => String::new(),
        }
    }
}
