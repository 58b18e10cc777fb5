//! The sections beside plugins and profiles: feature gates, flow control, parsers, data layer.

use super::build::{Builder, error};
use super::{NoteKind, PlanError, StagePlan};
use crate::config::{FlowControl, PriorityBand};
use crate::fleet::Name;
use crate::plugin::{Role, nearest_first};

const FLOW_CONTROL: &str = "flowControl";
const FEATURE_GATES: [&str; 2] = [FLOW_CONTROL, "haPopulateNonLeaderDatastore"];

impl Builder<'_> {
    /// Gates that exist, with values that they can have.
    pub fn check_gates(&self) -> Result<(), PlanError> {
        for (at, gate) in self.config.feature_gates.iter().enumerate() {
            let path = format!("featureGates[{at}]");
            let (name, value) = gate.split_once('=').unwrap_or((gate, "true"));
            if !FEATURE_GATES.contains(&name) {
                let known = nearest_first(name, FEATURE_GATES.into_iter()).join(", ");
                let message =
                    format!("feature gate '{name}' is unknown or unregistered; known: {known}");
                return Err(error(path, message));
            }
            if !["true", "false"].contains(&value) {
                let message = format!(
                    "{value} is not a valid value for the feature gate {name}; true or false is"
                );
                return Err(error(path, message));
            }
        }
        Ok(())
    }

    fn is_on(&self, gate: &str) -> bool {
        let gates = self.config.feature_gates.iter().rev();
        let value = |given: &String| match given.split_once('=') {
            Some((name, value)) if name == gate => Some(value == "true"),
            None if given == gate => Some(true),
            _ => None,
        };
        gates.filter_map(value).next().unwrap_or(false)
    }

    /// Checks every section; the saturation detector runs even where requests do not queue.
    pub fn sections(&mut self) -> Result<Option<StagePlan>, PlanError> {
        self.flow_control()?;
        self.data_layer()?;
        self.detector()
    }

    fn detector(&mut self) -> Result<Option<StagePlan>, PlanError> {
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
            Some((path, detector)) => (format!("{path}.pluginRef"), detector.plugin_ref.as_str()),
            None => ("plugins".to_owned(), "utilization-detector"),
        };
        if given.is_none() && super::build::default_spec(name).is_none() {
            return Ok(None);
        }
        let why = "says how full the fleet is";
        let (name, spec) = self.find_or_add(&path, name, Role::Detector, why)?;
        Ok(Some(StagePlan::new(name, spec)))
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
        self.check_bands(flow)?;
        if let Some(name) = &flow.usage_limit_policy_plugin_ref {
            let path = "flowControl.usageLimitPolicyPluginRef";
            self.find_or_add(path, name, Role::UsageLimit, "flowControl names it")?;
        }
        Ok(())
    }

    fn check_bands(&mut self, flow: &FlowControl) -> Result<(), PlanError> {
        for (at, band) in flow.priority_bands.iter().enumerate() {
            let path = format!("flowControl.priorityBands[{at}]");
            if flow.priority_bands[..at].iter().any(|other| other.priority == band.priority) {
                let message = format!("duplicate priority level {}", band.priority);
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
            if let Some(name) = name {
                self.find_or_add(&format!("{path}.{field}"), name, role, "flowControl names it")?;
            }
        }
        Ok(())
    }

    fn data_layer(&mut self) -> Result<(), PlanError> {
        let Some(data_layer) = &self.config.data_layer else { return Ok(()) };
        for (at, source) in data_layer.sources.iter().enumerate() {
            let path = format!("dataLayer.sources[{at}]");
            let extractors = source.extractors.iter().map(|e| &e.plugin_ref);
            for name in std::iter::once(&source.plugin_ref).chain(extractors) {
                if self.spec(name).is_none() {
                    return Err(self.undefined(path, name));
                }
            }
        }
        Ok(())
    }

    /// The parsers, in order; those of llm-d's default list when none is named.
    pub fn parsers(&mut self) -> Result<Vec<Name>, PlanError> {
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
        let mut names = Vec::new();
        for (path, name) in refs {
            let (name, _) =
                self.find_or_add(&path, name, Role::Parser, "requestHandler names it")?;
            names.push(name);
        }
        Ok(names)
    }
}
