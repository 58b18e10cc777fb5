//! From a configuration to a plan, in llm-d's order: plugins, references, defaults, profiles,
//! producers.

use super::sections::Sections;
use super::{
    Experimental, HandlerPlan, LatencyPlan, LoadPlan, Note, NoteKind, PeersPlan, Plan, PlanError,
    ProducerKind, ProducerPlan, ProfilePlan, StagePlan, TokensNeed,
};
use crate::config::{ApiVersion, Buffered, EndpointPickerConfig};
use crate::decision::PREFER_HEADER;
use crate::fleet::Name;
use crate::plugin::{PluginKind, PluginSpec, Role, Stability, known_names};
use crate::produce::{TokenEstimate, Tokens};
use crate::rewrite;
use crate::settings::Settings;
use crate::stage::{PREFIX_DEFAULT, Plugin, ProducerRef};

/// Checks and completes a configuration.
pub(super) fn build(
    config: &EndpointPickerConfig,
    experimental: Experimental,
) -> Result<Plan, PlanError> {
    let mut builder = Builder::new(config, experimental)?;
    builder.check_references()?;
    builder.check_gates()?;
    let entries = builder.profile_entries()?;
    let mut profiles = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        profiles.push(builder.profile(at, entry)?);
    }
    let handler = builder.handler(&profiles)?;
    let sections = builder.sections()?;
    let mut around = builder.around_profiles(sections.detector.clone());
    builder.resolve(&mut profiles, &mut around)?;
    builder.finish(handler, profiles, around, sections)
}

/// An error at a place of the configuration.
pub(super) fn error(path: impl Into<String>, message: impl Into<String>) -> PlanError {
    PlanError { path: path.into(), message: message.into() }
}

/// Plugins by name while a plan is made: configured ones, and those that are added.
pub(super) struct Builder<'a> {
    pub config: &'a EndpointPickerConfig,
    pub plugins: Vec<(Name, PluginSpec)>,
    pub notes: Vec<Note>,
}

/// The stages that run before any profile.
#[derive(Default)]
pub(super) struct Around {
    pub screeners: Vec<StagePlan>,
    pub admitters: Vec<StagePlan>,
    pub detector: Option<StagePlan>,
}

impl<'a> Builder<'a> {
    fn new(
        config: &'a EndpointPickerConfig,
        experimental: Experimental,
    ) -> Result<Builder<'a>, PlanError> {
        if let Some(field) = config.kvroute.limits.zero() {
            return Err(error(
                format!("kvroute.{field}"),
                "must be positive: with 0 nothing works",
            ));
        }
        let Settings { body_bytes_max, bodies_bytes_max, .. } = config.kvroute.limits;
        if bodies_bytes_max < body_bytes_max {
            return Err(error(
                "kvroute.bodies_bytes_max",
                format!(
                    "must not be less than body_bytes_max: a body of {body_bytes_max} bytes would \
                     never find room in {bodies_bytes_max}"
                ),
            ));
        }
        rewrite::check(&config.kvroute.limits.model_rewrites).map_err(|fault| {
            error(format!("kvroute.model_rewrites{}", fault.path), fault.message)
        })?;
        let mut builder = Builder { config, plugins: Vec::new(), notes: Vec::new() };
        if config.api_version == Some(ApiVersion::Inference) {
            let text = "apiVersion: this group is deprecated; write llm-d.ai/v1alpha1";
            builder.note(NoteKind::Warning, text);
        }
        for (at, entry) in config.plugins.iter().enumerate() {
            let (name, kind) = (Name::from(entry.name()), entry.spec.kind());
            if builder.spec(entry.name()).is_some() {
                let (field, why) = match &entry.name {
                    Some(_) => ("name", "rename one of them"),
                    None => ("type", "a plugin is called like its type; give one of them a `name`"),
                };
                let message = format!("duplicate plugin name '{name}': {why}");
                return Err(error(format!("plugins[{at}].{field}"), message));
            }
            if kind.stability() == Stability::Alpha && experimental == Experimental::Refused {
                let written = entry.written();
                let message = format!(
                    "plugin type '{written}' has Alpha stability level: start with \
                     --allow-experimental-plugins, or leave it out"
                );
                return Err(error(format!("plugins[{at}].type"), message));
            }
            entry.spec.plugin().check().map_err(|text| fault_of_parameters(at, text))?;
            if let Some(old) = kind.deprecation(entry.written()) {
                let text = format!(
                    "{name}: type {} is deprecated since llm-d {}; write {}",
                    entry.written(),
                    old.since,
                    old.instead
                );
                builder.note(NoteKind::Warning, text);
            }
            builder.plugins.push((name, entry.spec.clone()));
        }
        Ok(builder)
    }

    pub fn spec(&self, name: &str) -> Option<&PluginSpec> {
        self.plugins.iter().find(|(n, _)| n.as_str() == name).map(|(_, spec)| spec)
    }

    pub fn note(&mut self, kind: NoteKind, text: impl Into<String>) {
        self.notes.push(Note { kind, text: text.into() });
    }

    pub fn add(&mut self, spec: PluginSpec, why: &str) -> Name {
        let name = Name::from(spec.kind().name());
        self.note(NoteKind::Added, format!("{name}: {why}"));
        self.plugins.push((name.clone(), spec));
        name
    }

    /// The plugin of a name, where a reference may also name a type that need not be listed: then
    /// it is added with its defaults.
    pub fn find_or_add(
        &mut self,
        path: &str,
        name: &str,
        role: Role,
        why: &str,
    ) -> Result<(Name, PluginSpec), PlanError> {
        if self.spec(name).is_none()
            && let Some(spec) = default_spec(name).filter(|spec| need_not_be_listed(spec, role))
        {
            if let Err(text) = spec.plugin().check() {
                let message = format!("plugin '{name}' must be listed: {text}");
                return Err(error(path, message));
            }
            self.add(spec, why);
        }
        let spec = self.spec(name).cloned();
        match spec {
            Some(spec) if spec.kind().is(role) => Ok((Name::from(name), spec)),
            Some(spec) => Err(not_of_role(path, name, &spec, role)),
            None => Err(self.none_fitting(path, name, role.as_str(), |spec| spec.kind().is(role))),
        }
    }

    /// There is no plugin of that name; those that fit are told.
    pub fn none_fitting(
        &self,
        path: &str,
        name: &str,
        what: &str,
        fits: impl Fn(&PluginSpec) -> bool,
    ) -> PlanError {
        if PluginKind::of_name(name).is_some() {
            return self.undefined(path, name);
        }
        let listed = self.plugins.iter().filter(|(_, spec)| fits(spec)).map(|(n, _)| n.as_str());
        let types = PluginKind::ALL.iter().map(|kind| kind.name());
        let types = types.filter(|name| default_spec(name).is_some_and(|spec| fits(&spec)));
        let mut fitting: Vec<&str> = listed.chain(types).collect();
        fitting.sort_unstable();
        fitting.dedup();
        let fitting = known_names(name, fitting.into_iter());
        error(path, format!("references undefined plugin '{name}'; meant is a {what}: {fitting}"))
    }

    pub fn undefined(&self, path: impl Into<String>, name: &str) -> PlanError {
        let names = match PluginKind::of_name(name) {
            Some(_) => format!("add `- type: {name}` to `plugins`"),
            None => {
                let defined = self.plugins.iter().map(|(n, _)| n.as_str());
                format!("defined: {}", known_names(name, defined))
            }
        };
        error(path, format!("references undefined plugin '{name}'; {names}"))
    }

    /// Where a plugin's parameters stand; an added one has no place.
    pub fn path_of(&self, name: &str) -> String {
        let at = self.config.plugins.iter().position(|entry| entry.name() == name);
        at.map_or("plugins".to_owned(), |at| format!("plugins[{at}].parameters"))
    }

    /// All of a role, in order.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = &(Name, PluginSpec)> {
        self.plugins.iter().filter(move |(_, spec)| spec.kind().is(role))
    }

    /// Parameters that name other plugins name ones that exist, fit, and do not name them back.
    fn check_references(&self) -> Result<(), PlanError> {
        for (at, entry) in self.config.plugins.iter().enumerate() {
            for reference in entry.spec.plugin().references() {
                let path = format!("plugins[{at}].parameters.{}", reference.path);
                let Some(spec) = self.spec(reference.name) else {
                    return Err(self.undefined(path, reference.name));
                };
                let mut chain = vec![entry.name()];
                self.find_loop(&mut chain, reference.name, &path)?;
                if !spec.kind().is(reference.role) {
                    return Err(not_of_role(&path, reference.name, spec, reference.role));
                }
            }
        }
        Ok(())
    }

    fn find_loop<'c>(
        &'c self,
        chain: &mut Vec<&'c str>,
        name: &'c str,
        path: &str,
    ) -> Result<(), PlanError> {
        let again = chain.contains(&name);
        chain.push(name);
        if again {
            let message = format!("plugins refer to each other in a loop: {}", chain.join(" -> "));
            return Err(error(path, message));
        }
        if let Some(spec) = self.spec(name) {
            for reference in spec.plugin().references() {
                self.find_loop(chain, reference.name, path)?;
            }
        }
        chain.pop();
        Ok(())
    }

    /// Screeners, admitters and the detector run for every request, without being named in a
    /// profile.
    fn around_profiles(&self, detector: Option<StagePlan>) -> Around {
        let stages = |role| {
            self.of_role(role).map(|(name, spec)| StagePlan::new(name.clone(), spec.clone()))
        };
        Around {
            screeners: stages(Role::Screener).collect(),
            admitters: stages(Role::Admitter).collect(),
            detector,
        }
    }

    fn finish(
        mut self,
        handler: HandlerPlan,
        profiles: Vec<ProfilePlan>,
        around: Around,
        sections: Sections,
    ) -> Result<Plan, PlanError> {
        let producers = self.producers();
        let precise = producers.iter().position(|p| matches!(p.kind, ProducerKind::Precise(_)));
        let main = precise.or(if producers.is_empty() { None } else { Some(0) });
        let load = self.load(&producers, main);
        let latency = self.latency(&producers, main);
        let peers = self.peers(&producers, main);
        let tokens = self.tokens(!producers.is_empty(), precise.is_some());
        self.warn(&profiles, &producers);
        let mut headers: Vec<String> =
            self.plugins.iter().flat_map(|(_, spec)| spec.plugin().headers()).collect();
        headers.push(PREFER_HEADER.to_owned());
        headers.sort_unstable();
        headers.dedup();
        let Around { screeners, admitters, detector } = around;
        Ok(Plan {
            settings: self.config.kvroute.limits.clone(),
            handler,
            profiles,
            screeners,
            admitters,
            detector,
            producers,
            producer_main: main,
            load,
            others: self.others(),
            reporters: self.reporters(),
            latency,
            peers,
            tokens,
            estimate: self.estimate(),
            parsers: sections.parsers,
            collect: sections.collect,
            headers,
            notes: self.notes,
        })
    }

    fn producers(&self) -> Vec<ProducerPlan> {
        let plan = |(name, spec): &(Name, PluginSpec)| {
            let kind = ProducerKind::of(spec)?;
            Some(ProducerPlan { name: name.clone(), kind })
        };
        self.plugins.iter().filter_map(plan).collect()
    }

    /// Producers of something else than prefix matches, load and tokens.
    pub fn others(&self) -> Vec<(Name, PluginSpec)> {
        let other = |(_, spec): &&(Name, PluginSpec)| {
            ProducerKind::of(spec).is_none()
                && !matches!(
                    spec,
                    PluginSpec::InflightLoadProducer(_)
                        | PluginSpec::TokenProducer(_)
                        | PluginSpec::PredictedLatencyProducer(_)
                        | PluginSpec::P2pSourceProducer(_)
                )
        };
        let produces = |(_, spec): &&(Name, PluginSpec)| match spec {
            PluginSpec::AgentIdentity(_) => true,
            _ => spec.kind().is(Role::Producer),
        };
        self.plugins.iter().filter(produces).filter(other).cloned().collect()
    }

    fn reporters(&self) -> Vec<PluginSpec> {
        let specs = self.plugins.iter().map(|(_, spec)| spec);
        specs.filter(|spec| spec.kind().is(Role::Reporter)).cloned().collect()
    }

    /// Load is always charged. It subtracts the matches of the named producer, else of the default
    /// one where it runs, else of the main one.
    fn load(&mut self, producers: &[ProducerPlan], main: Option<usize>) -> LoadPlan {
        let configured = self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::InflightLoadProducer(producer) => Some(producer.clone()),
            _ => None,
        });
        let producer = configured.unwrap_or_default();
        let position = |name: &str| producers.iter().position(|p| p.name.as_str() == name);
        let prefix = match producer.prefix_match_info_producer_name.as_deref() {
            Some(name) if !name.is_empty() => {
                let at = position(name);
                if at.is_none() {
                    let text = format!(
                        "inflight-load-producer: prefixMatchInfoProducerName: no producer is \
                         called '{name}', so nothing is subtracted from prompts"
                    );
                    self.note(NoteKind::Warning, text);
                }
                at
            }
            _ => position(PREFIX_DEFAULT).or(main),
        };
        LoadPlan { producer, prefix }
    }

    /// The first producer of predicted latencies serves all readers.
    fn latency(&self, producers: &[ProducerPlan], main: Option<usize>) -> Option<LatencyPlan> {
        let read = self.plugins.iter().any(|(_, spec)| spec.plugin().inputs().latency.is_some());
        let producer = self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::PredictedLatencyProducer(producer) => Some(producer.clone()),
            _ => None,
        });
        let producer = producer.filter(|_| read)?;
        let wanted = producer.inputs().prefix.map(ProducerRef::name);
        let named = producers.iter().position(|p| Some(p.name.as_str()) == wanted);
        Some(LatencyPlan { producer, prefix: named.or(main) })
    }

    fn peers(&self, producers: &[ProducerPlan], main: Option<usize>) -> Option<PeersPlan> {
        let producer = self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::P2pSourceProducer(producer) => Some(producer.clone()),
            _ => None,
        })?;
        let wanted = producer.inputs().prefix.map(ProducerRef::name);
        let named = producers.iter().position(|p| Some(p.name.as_str()) == wanted);
        Some(PeersPlan { producer, prefix: named.or(main) })
    }

    fn token_producer(&self) -> Option<&Tokens> {
        self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::TokenProducer(tokens) => Some(tokens),
            _ => None,
        })
    }

    fn estimate(&self) -> TokenEstimate {
        self.token_producer().and_then(|tokens| tokens.estimate.clone()).unwrap_or_default()
    }

    fn tokens(&mut self, prefix: bool, precise: bool) -> TokensNeed {
        let configured = self.token_producer();
        let exact = precise || configured.is_some_and(Tokens::wants_exact);
        let reads = |(_, spec): &(Name, PluginSpec)| spec.plugin().inputs().tokens;
        let needed = prefix || self.plugins.iter().any(reads);
        if needed && configured.is_none() {
            let why = if prefix { "prefix matching needs tokens" } else { "tokens are counted" };
            self.add(PluginSpec::TokenProducer(Default::default()), why);
        }
        match (needed, exact) {
            (false, _) => TokensNeed::None,
            (true, false) => TokensNeed::Estimated,
            (true, true) => TokensNeed::Exact,
        }
    }
}

impl ProducerKind {
    /// The prefix knowledge that a plugin produces, if it does.
    pub(super) fn of(spec: &PluginSpec) -> Option<ProducerKind> {
        match spec {
            PluginSpec::ApproxPrefixProducer(p)
            | PluginSpec::MulticlusterApproxPrefixProducer(p) => {
                Some(ProducerKind::Approx(p.clone()))
            }
            PluginSpec::PrecisePrefixProducer(p) => {
                Some(ProducerKind::Precise(Box::new(p.clone())))
            }
            PluginSpec::BurstPrefixProducer(p) => Some(ProducerKind::Burst(p.clone())),
            _ => None,
        }
    }
}

/// A type with its default parameters, by its name.
pub(super) fn default_spec(type_name: &str) -> Option<PluginSpec> {
    let none = Buffered::Null.into_deserializer::<serde::de::value::Error>();
    PluginKind::of_name(type_name)?.read(none).ok()
}

/// Whether llm-d adds the plugin itself where a section names it: every parser and producer, and
/// of the others the default one.
fn need_not_be_listed(spec: &PluginSpec, role: Role) -> bool {
    let kind = spec.kind();
    let default = match role {
        Role::Parser | Role::Producer => true,
        Role::Detector => kind == PluginKind::UtilizationDetector,
        Role::Fairness => kind == PluginKind::GlobalStrictFairness,
        Role::Ordering => kind == PluginKind::FcfsOrdering,
        Role::UsageLimit => kind == PluginKind::StaticUsageLimit,
        Role::Picker => kind == PluginKind::MaxScorePicker,
        _ => false,
    };
    default && kind.is(role)
}

/// Whether a plugin runs in profiles.
pub(super) fn is_stage(spec: &PluginSpec) -> bool {
    [Role::Filter, Role::Scorer, Role::Picker].into_iter().any(|role| spec.kind().is(role))
}

/// Whether it runs nowhere else.
pub(super) fn is_stage_only(spec: &PluginSpec) -> bool {
    is_stage(spec) && !spec.kind().is(Role::Detector)
}

/// A check names the field that is wrong with its first word.
fn fault_of_parameters(at: usize, text: String) -> PlanError {
    let word = text.split([' ', ':']).next().unwrap_or_default();
    let is_field = word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || ".[]".contains(c));
    let field = if is_field { format!(".{word}") } else { String::new() };
    error(format!("plugins[{at}].parameters{field}"), text)
}

pub(super) fn not_of_role(path: &str, name: &str, spec: &PluginSpec, role: Role) -> PlanError {
    let (is, wanted) = (spec.kind().name(), role.as_str());
    let of_type = if name == is { String::new() } else { format!(" (type: '{is}')") };
    error(path, format!("plugin '{name}'{of_type} is not a {wanted}"))
}
