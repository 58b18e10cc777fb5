//! The sections beside plugins and profiles: feature gates, flow control, parsers, data layer.

use super::build::{Builder, error, not_of_role};
use super::{NoteKind, PlanError, StagePlan};
use crate::collect::{CollectPlan, DiscoverySpec, ExtractorSpec, SourceEntry, SourceSpec};
use crate::config::{DataLayer, FlowControl, PriorityBand};
use crate::fleet::Name;
use crate::parse::ParserKind;
use crate::plugin::{PluginSpec, Role, known_names};

const FLOW_CONTROL: &str = "flowControl";
const FEATURE_GATES: [&str; 2] = [FLOW_CONTROL, "haPopulateNonLeaderDatastore"];

/// Gates of older releases.
const OLD_GATES: [&str; 3] = ["dataLayer", "prepareDataPlugins", "enableLegacyMetrics"];

/// A gate's value, as Go reads it.
fn truth(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "1" | "t" | "true" => Some(true),
        "0" | "f" | "false" => Some(false),
        _ => None,
    }
}

/// What the sections say.
pub(super) struct Sections {
    pub parsers: Vec<ParserKind>,
    pub collect: CollectPlan,
    pub detector: Option<StagePlan>,
}

impl Builder<'_> {
    /// Gates that exist, with values that they can have.
    pub fn check_gates(&self) -> Result<(), PlanError> {
        for (at, gate) in self.config.feature_gates.iter().enumerate() {
            let path = format!("featureGates[{at}]");
            let (name, value) = gate.split_once('=').unwrap_or((gate, "true"));
            if OLD_GATES.contains(&name) {
                let message = format!(
                    "feature gate '{name}' is unknown or unregistered: what it switched is always \
                     on since llm-d v0.9; leave it out"
                );
                return Err(error(path, message));
            }
            if !FEATURE_GATES.contains(&name) {
                let known = known_names(name, FEATURE_GATES.into_iter());
                let message =
                    format!("feature gate '{name}' is unknown or unregistered; known: {known}");
                return Err(error(path, message));
            }
            if truth(value).is_none() {
                let message = format!(
                    "'{value}' is not a valid value for the feature gate {name}; write true or \
                     false"
                );
                return Err(error(path, message));
            }
        }
        Ok(())
    }

    fn is_on(&self, gate: &str) -> bool {
        let gates = self.config.feature_gates.iter().rev();
        let value = |given: &String| match given.split_once('=') {
            Some((name, value)) if name == gate => truth(value),
            None if given == gate => Some(true),
            _ => None,
        };
        gates.filter_map(value).next().unwrap_or(false)
    }

    /// Checks every section; the saturation detector runs even where requests do not queue.
    pub fn sections(&mut self) -> Result<Sections, PlanError> {
        self.flow_control()?;
        Ok(Sections {
            parsers: self.parsers()?,
            collect: self.data_layer()?,
            detector: Some(self.detector()?),
        })
    }

    fn detector(&mut self) -> Result<StagePlan, PlanError> {
        let config = self.config;
        let current = config.flow_control.as_ref().and_then(|flow| {
            let detector = flow.saturation_detector.as_ref()?;
            Some(("flowControl.saturationDetector", detector))
        });
        let older = config.saturation_detector.as_ref();
        if older.is_some() {
            let text = "saturationDetector: deprecated place; write flowControl.saturationDetector";
            self.note(NoteKind::Warning, text);
        }
        let given = current.or(older.map(|detector| ("saturationDetector", detector)));
        let (path, name) = match given {
            Some((path, detector)) if !detector.plugin_ref.is_empty() => {
                (format!("{path}.pluginRef"), detector.plugin_ref.as_str())
            }
            _ => ("plugins".to_owned(), "utilization-detector"),
        };
        let why = "says how full the fleet is";
        let (name, spec) = self.find_or_add(&path, name, Role::Detector, why)?;
        Ok(StagePlan::new(name, spec))
    }

    fn flow_control(&mut self) -> Result<(), PlanError> {
        let on = self.is_on(FLOW_CONTROL);
        let Some(flow) = &self.config.flow_control else {
            if on {
                self.note(NoteKind::Inert, "featureGates: flowControl: requests do not queue yet");
            }
            return Ok(());
        };
        self.note(
            NoteKind::Inert,
            match on {
                true => {
                    "flowControl: read and checked; requests do not queue yet, those of \
                         negative priority are refused when the fleet is full"
                }
                false => {
                    "flowControl: the feature gate flowControl is off; only \
                          saturationDetector is used"
                }
            },
        );
        if !on {
            return Ok(());
        }
        self.check_bands(flow)?;
        if let Some(name) = flow.usage_limit_policy_plugin_ref.as_ref().filter(|n| !n.is_empty()) {
            let path = "flowControl.usageLimitPolicyPluginRef";
            self.find_or_add(path, name, Role::UsageLimit, "flowControl names it")?;
        }
        Ok(())
    }

    fn check_bands(&mut self, flow: &FlowControl) -> Result<(), PlanError> {
        for (at, band) in flow.priority_bands.iter().enumerate() {
            let path = format!("flowControl.priorityBands[{at}]");
            if flow.priority_bands[..at].iter().any(|other| other.priority == band.priority) {
                let message =
                    format!("duplicate priority level {}; a level has one band", band.priority);
                return Err(error(format!("{path}.priority"), message));
            }
            self.check_band(&path, band)?;
        }
        let templates = [
            ("flowControl.defaultPriorityBand", &flow.default_priority_band),
            ("flowControl.defaultNegativePriorityBand", &flow.default_negative_priority_band),
        ];
        for (path, band) in templates {
            if let Some(band) = band {
                self.check_band(path, band)?;
            }
        }
        Ok(())
    }

    fn check_band(&mut self, path: &str, band: &PriorityBand) -> Result<(), PlanError> {
        let policies = [
            ("fairnessPolicyRef", &band.fairness_policy_ref, Role::Fairness),
            ("orderingPolicyRef", &band.ordering_policy_ref, Role::Ordering),
        ];
        for (field, name, role) in policies {
            if let Some(name) = name.as_ref().filter(|name| !name.is_empty()) {
                self.find_or_add(&format!("{path}.{field}"), name, role, "flowControl names it")?;
            }
        }
        Ok(())
    }

    fn data_layer(&mut self) -> Result<CollectPlan, PlanError> {
        let none = DataLayer::default();
        let data_layer = self.config.data_layer.as_ref().unwrap_or(&none);
        let mut sources = self.sources(data_layer)?;
        let discovery = match &data_layer.discovery {
            Some(discovery) => {
                let path = "dataLayer.discovery.pluginRef";
                let (_, spec) = self.of_ref(path, &discovery.plugin_ref, Role::Discovery)?;
                DiscoverySpec::of(&spec)
            }
            None => None,
        };
        self.replicas(data_layer)?;
        let inject = data_layer.inject_defaults.unwrap_or(true);
        let is_metrics = |entry: &SourceEntry| matches!(entry.spec, SourceSpec::Metrics(_));
        if inject && !sources.iter().any(is_metrics) {
            sources.push(self.default_source());
        }
        let plan = CollectPlan::build(&sources, false, discovery.as_ref()).map_err(|fault| {
            let path = match (fault.source_at, fault.extractor_at) {
                (Some(source), _) if source >= data_layer.sources.len() => "dataLayer".to_owned(),
                (Some(source), Some(at)) => {
                    format!("dataLayer.sources[{source}].extractors[{at}].pluginRef")
                }
                (Some(source), None) => format!("dataLayer.sources[{source}].pluginRef"),
                (None, _) => "dataLayer.discovery.pluginRef".to_owned(),
            };
            error(path, fault.message)
        })?;
        plan.notes.iter().for_each(|text| self.note(NoteKind::Inert, text.as_str()));
        let topology = self.plugins.iter().find_map(|(_, spec)| match spec {
            PluginSpec::TopologyExtractor(topology) => Some(topology.labels()),
            _ => None,
        });
        // It hears of endpoints without being bound to a source.
        Ok(CollectPlan { topology: topology.unwrap_or_default(), ..plan })
    }

    fn sources(&self, data_layer: &DataLayer) -> Result<Vec<SourceEntry>, PlanError> {
        let mut sources = Vec::new();
        for (at, source) in data_layer.sources.iter().enumerate() {
            let path = format!("dataLayer.sources[{at}]");
            let (name, spec) =
                self.of_ref(&format!("{path}.pluginRef"), &source.plugin_ref, Role::Source)?;
            let spec = SourceSpec::of(&spec).ok_or_else(|| error(&path, "is no data source"))?;
            let mut extractors = Vec::new();
            for (at, extractor) in source.extractors.iter().enumerate() {
                let path = format!("{path}.extractors[{at}].pluginRef");
                let name = extractor.plugin_ref.as_str();
                // llm-d has its producers hear of endpoints in this way; here all of them do.
                let spec = self.spec(name).ok_or_else(|| self.undefined(&path, name))?;
                if spec.kind().is(Role::Producer) {
                    continue;
                }
                let spec = ExtractorSpec::of(spec).ok_or_else(|| {
                    let message = format!("plugin '{name}' is not an extractor");
                    error(&path, message)
                })?;
                extractors.push((Name::from(name), spec));
            }
            sources.push(SourceEntry { name, spec, extractors });
        }
        Ok(sources)
    }

    /// The metrics source with its extractor that nobody listed; plugins that are called like
    /// their types bring their parameters.
    fn default_source(&self) -> SourceEntry {
        const SOURCE: &str = "metrics-data-source";
        const EXTRACTOR: &str = "core-metrics-extractor";
        let source = self.spec(SOURCE).and_then(SourceSpec::of);
        let extractor = self.spec(EXTRACTOR).and_then(ExtractorSpec::of);
        let extractor = extractor.unwrap_or(ExtractorSpec::CoreMetrics(Default::default()));
        SourceEntry {
            name: Name::from(SOURCE),
            spec: source.unwrap_or(SourceSpec::Metrics(Default::default())),
            extractors: vec![(Name::from(EXTRACTOR), extractor)],
        }
    }

    /// llm-d has the places, and no plugin for them.
    fn replicas(&self, data_layer: &DataLayer) -> Result<(), PlanError> {
        let peers = data_layer.peer_discovery.as_ref().map(|peer| peer.plugin_ref.as_str());
        let syncer = data_layer.cross_replica_syncer_plugin_ref.as_deref();
        for (path, name, what) in [
            ("dataLayer.peerDiscovery.pluginRef", peers, "peer discovery"),
            ("dataLayer.crossReplicaSyncerPluginRef", syncer, "cross-replica syncer"),
        ] {
            let Some(name) = name.filter(|name| !name.is_empty()) else { continue };
            if self.spec(name).is_none() {
                return Err(self.undefined(path, name));
            }
            let message = format!("plugin '{name}' is not a {what}; there is none, leave it out");
            return Err(error(path, message));
        }
        Ok(())
    }

    fn of_ref(&self, path: &str, name: &str, role: Role) -> Result<(Name, PluginSpec), PlanError> {
        let spec = self.spec(name).ok_or_else(|| self.undefined(path, name))?;
        if !spec.kind().is(role) {
            return Err(not_of_role(path, name, spec, role));
        }
        Ok((Name::from(name), spec.clone()))
    }

    /// The parsers, in order; those of llm-d's default list when none is named.
    fn parsers(&mut self) -> Result<Vec<ParserKind>, PlanError> {
        let config = self.config;
        let current = config.request_handler.iter().flat_map(|handler| &handler.parsers);
        let mut refs: Vec<(String, &str)> = current
            .enumerate()
            .map(|(at, parser)| {
                (format!("requestHandler.parsers[{at}].pluginRef"), parser.plugin_ref.as_str())
            })
            .collect();
        if let Some(parser) = &config.parser {
            self.note(NoteKind::Warning, "parser: deprecated place; write requestHandler.parsers");
            if refs.is_empty() {
                refs.push(("parser.pluginRef".into(), parser.plugin_ref.as_str()));
            }
        }
        let mut parsers = Vec::new();
        for (path, name) in refs {
            let why = "requestHandler names it";
            let (_, spec) = self.find_or_add(&path, name, Role::Parser, why)?;
            let of_type = |kind: &&ParserKind| kind.plugin_type() == spec.kind().name();
            let kind = ParserKind::ALL.iter().find(of_type).copied();
            if matches!(kind, Some(ParserKind::VllmGrpc | ParserKind::Vertex)) {
                let text = format!(
                    "{name}: the embedded proxy forwards no gRPC, it answers UNIMPLEMENTED"
                );
                self.note(NoteKind::Warning, text);
            }
            parsers.extend(kind);
        }
        Ok(if parsers.is_empty() { ParserKind::DEFAULTS.to_vec() } else { parsers })
    }
}

impl SourceSpec {
    fn of(spec: &PluginSpec) -> Option<SourceSpec> {
        Some(match spec {
            PluginSpec::MetricsDataSource(source) => SourceSpec::Metrics(source.clone()),
            PluginSpec::ModelsDataSource(source) => SourceSpec::Models(source.clone()),
            PluginSpec::DcgmDataSource(source) => SourceSpec::Dcgm(source.clone()),
            PluginSpec::MulticlusterMetricsDataSource(source) => {
                SourceSpec::MulticlusterMetrics(source.clone())
            }
            PluginSpec::K8sNotificationSource(source) => {
                SourceSpec::K8sNotification(source.clone())
            }
            PluginSpec::EndpointNotificationSource(source) => {
                SourceSpec::EndpointNotification(*source)
            }
            _ => return None,
        })
    }
}

impl ExtractorSpec {
    fn of(spec: &PluginSpec) -> Option<ExtractorSpec> {
        Some(match spec {
            PluginSpec::CoreMetricsExtractor(core) => ExtractorSpec::CoreMetrics(core.clone()),
            PluginSpec::ModelsDataExtractor(models) => ExtractorSpec::Models(*models),
            PluginSpec::DcgmExtractor(dcgm) => ExtractorSpec::Dcgm(*dcgm),
            PluginSpec::TopologyExtractor(topology) => ExtractorSpec::Topology(topology.clone()),
            PluginSpec::MulticlusterMetricsExtractor(cluster) => {
                ExtractorSpec::MulticlusterMetrics(cluster.clone())
            }
            _ => return None,
        })
    }
}

impl DiscoverySpec {
    fn of(spec: &PluginSpec) -> Option<DiscoverySpec> {
        match spec {
            PluginSpec::FileDiscovery(file) => Some(DiscoverySpec::File(file.clone())),
            PluginSpec::MulticlusterFileDiscovery(file) => {
                Some(DiscoverySpec::MulticlusterFile(file.clone()))
            }
            _ => None,
        }
    }
}
