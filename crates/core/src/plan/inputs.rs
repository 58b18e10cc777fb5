//! Producers: who reads what, and what must be added so that it is there.

use super::build::{Around, Builder, error};
use super::{PlanError, ProducerKind, ProfilePlan, StagePlan};
use crate::fleet::Name;
use crate::plugin::{PluginKind, PluginSpec, Role};
use crate::produce::{ApproxPrefix, PrecisePrefix};
use crate::stage::{Inputs, ProducerRef};

/// Where plugins name a producer of prefix matches.
const PREFIX_FIELD: &str = "prefixMatchInfoProducerName";
/// The same for in-flight load and predicted latencies.
const LOAD_FIELD: &str = "inFlightLoadProducerName";
const LATENCY_FIELD: &str = "latencyPredictionInfoProducerName";

impl Builder<'_> {
    /// Finds the producers of every plugin that runs, adds those that are missing, and those that
    /// added ones need.
    pub fn resolve(
        &mut self,
        profiles: &mut [ProfilePlan],
        around: &mut Around,
    ) -> Result<(), PlanError> {
        let in_profiles =
            profiles.iter_mut().flat_map(|p| p.filters.iter_mut().chain(&mut p.scorers));
        let Around { screeners, admitters, detector } = around;
        let outside = screeners.iter_mut().chain(admitters).chain(detector);
        let stages: Vec<&mut StagePlan> = in_profiles.chain(outside).collect();
        for stage in &stages {
            self.add_missing(&stage.name, &stage.spec)?;
        }
        self.add_for_others()?;
        for stage in stages {
            let inputs = stage.spec.plugin().inputs();
            if let Some(wanted) = inputs.prefix {
                let name = self.prefix_producer(wanted);
                let mut producers =
                    self.plugins.iter().filter(|(_, spec)| ProducerKind::of(spec).is_some());
                stage.prefix = producers.position(|(n, _)| *n == name);
            }
            if let Some(wanted) = inputs.media {
                let others = self.others();
                stage.media = others.iter().position(|(n, _)| n.as_str() == wanted.name());
            }
        }
        Ok(())
    }

    /// Producers read each other. They and deciders read prefixes whoever produces them, unless
    /// they name one.
    fn add_for_others(&mut self) -> Result<(), PlanError> {
        let mut at = 0;
        while let Some((name, spec)) = self.plugins.get(at).cloned() {
            let kind = spec.kind();
            if kind.is(Role::Producer) || kind.is(Role::Decider) {
                let any = self.plugins.iter().any(|(_, spec)| ProducerKind::of(spec).is_some());
                let mut inputs = spec.plugin().inputs();
                inputs.prefix = inputs.prefix.filter(|wanted| !any || is_named(*wanted));
                self.add_inputs(&name, &spec, inputs)?;
            }
            at += 1;
        }
        Ok(())
    }

    /// `precise-prefix-cache-scorer` reads any precise producer, others the one of that name.
    fn prefix_producer(&self, wanted: ProducerRef<'_>) -> Name {
        let precise =
            |(_, spec): &&(Name, PluginSpec)| matches!(spec, PluginSpec::PrecisePrefixProducer(_));
        match wanted {
            ProducerRef::Default(name)
                if PluginKind::of_name(name) == Some(PluginKind::PrecisePrefixProducer) =>
            {
                let configured = self.plugins.iter().find(precise);
                configured.map_or(Name::from(name), |(name, _)| name.clone())
            }
            wanted => Name::from(wanted.name()),
        }
    }

    fn add_missing(&mut self, reader: &Name, spec: &PluginSpec) -> Result<(), PlanError> {
        self.add_inputs(reader, spec, spec.plugin().inputs())
    }

    fn add_inputs(
        &mut self,
        reader: &Name,
        spec: &PluginSpec,
        inputs: Inputs<'_>,
    ) -> Result<(), PlanError> {
        let why = format!("{reader} reads it");
        let path = |field| format!("{}.{field}", self.path_of(reader.as_str()));
        if let Some(wanted) = inputs.prefix {
            let name = self.prefix_producer(wanted);
            match self.spec(name.as_str()) {
                Some(spec) if ProducerKind::of(spec).is_none() => {
                    let message = format!("plugin '{name}' does not produce prefix matches");
                    return Err(error(path(PREFIX_FIELD), message));
                }
                Some(_) => {}
                None => {
                    let spec = self.prefix_producer_to_add(reader, spec, name.as_str())?;
                    self.add(spec, &why);
                }
            }
        }
        for (field, kind, what, wanted) in [
            (LOAD_FIELD, PluginKind::InflightLoadProducer, "in-flight load", inputs.load),
            (LATENCY_FIELD, PluginKind::PredictedLatencyProducer, "latencies", inputs.latency),
            ("producerName", PluginKind::EncoderCacheProducer, "encoder caches", inputs.media),
            ("sessionIdConfig", PluginKind::SessionIdProducer, "sessions", inputs.session),
        ] {
            let Some(name) = wanted.map(ProducerRef::name) else { continue };
            let path = format!("{}.{field}", self.path_of(reader.as_str()));
            let configured = self.spec(name).map(PluginSpec::kind);
            if configured.or(PluginKind::of_name(name)).is_some_and(|other| other != kind) {
                let message =
                    format!("plugin '{name}' does not produce {what}; {} does", kind.name());
                return Err(error(path, message));
            }
            self.find_or_add(&path, name, Role::Producer, &why)?;
        }
        Ok(())
    }

    fn prefix_producer_to_add(
        &self,
        reader: &Name,
        spec: &PluginSpec,
        name: &str,
    ) -> Result<PluginSpec, PlanError> {
        match (PluginKind::of_name(name), spec) {
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
            _ => {
                let path = format!("{}.{PREFIX_FIELD}", self.path_of(reader.as_str()));
                let fits = |spec: &PluginSpec| ProducerKind::of(spec).is_some();
                Err(self.none_fitting(&path, name, "producer of prefix matches", fits))
            }
        }
    }
}

fn is_named(wanted: ProducerRef<'_>) -> bool {
    matches!(wanted, ProducerRef::Named(_))
}
