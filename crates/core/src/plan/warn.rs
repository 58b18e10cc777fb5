//! What in a configuration has no effect, is old, or is probably not what was meant?

use super::build::{Builder, is_stage_only};
use super::{NoteKind, ProducerKind, ProducerPlan, ProfilePlan, StagePlan};
use crate::fleet::Name;
use crate::plugin::{PluginKind, PluginSpec, Role};
use crate::rewrite;
use crate::settings::ms;

/// Smallest block of an approximate producer; see its `blockSizeTokens`.
const APPROX_BLOCK_TOKENS_MIN: u32 = 64;

impl Builder<'_> {
    /// Adds the notes.
    pub fn warn(&mut self, profiles: &[ProfilePlan], producers: &[ProducerPlan]) {
        let mut notes = Vec::new();
        profiles.iter().for_each(|profile| of_profile(profile, &mut notes));
        self.plugins.iter().for_each(|(name, spec)| of_plugin(name, spec, &mut notes));
        let stages = || profiles.iter().flat_map(|p| p.filters.iter().chain(&p.scorers));
        for (at, producer) in producers.iter().enumerate() {
            let in_profile = stages().any(|stage| stage.prefix == Some(at));
            if !in_profile && !self.is_read_elsewhere(producer) {
                notes.push((NoteKind::Warning, format!("{}: nothing reads it", producer.name)));
            }
        }
        let in_profile = |name: &Name| {
            stages().any(|s| s.name == *name) || profiles.iter().any(|p| p.picker.name == *name)
        };
        for (name, spec) in &self.plugins {
            let inert = spec.plugin().inert();
            notes.extend(inert.into_iter().map(|text| (NoteKind::Inert, format!("{name}.{text}"))));
            if is_stage_only(spec) && !in_profile(name) {
                notes.push((NoteKind::Inert, format!("{name}: in no profile")));
            }
        }
        self.once_only(&mut notes);
        self.too_old(&mut notes);
        let remarks = rewrite::remarks(&self.config.kvroute.limits.model_rewrites);
        let named = |text| (NoteKind::Warning, format!("kvroute.model_rewrites: {text}"));
        notes.extend(remarks.into_iter().map(named));
        notes.into_iter().for_each(|(kind, text)| self.note(kind, text));
    }

    /// Metrics that are stale before the next ones come make every endpoint look full.
    fn too_old(&self, notes: &mut Notes) {
        let intervals = self.plugins.iter().filter_map(|(_, spec)| match spec {
            PluginSpec::MetricsDataSource(source) => source.interval,
            _ => None,
        });
        let every = intervals.map(|interval| interval.0).max();
        let every = every.unwrap_or(ms(self.config.kvroute.limits.scrape_interval_ms));
        for (name, spec) in &self.plugins {
            let PluginSpec::UtilizationDetector(detector) = spec else { continue };
            let threshold = detector.metrics_staleness_threshold.0;
            if every > threshold {
                let text = format!(
                    "{name}.metricsStalenessThreshold: {threshold:?} is less than the {every:?} \
                     between two readings of metrics, so that endpoints look full between them"
                );
                notes.push((NoteKind::Warning, text));
            }
        }
    }

    /// Of some producers the first serves all readers.
    fn once_only(&self, notes: &mut Notes) {
        for kind in [
            PluginKind::InflightLoadProducer,
            PluginKind::PredictedLatencyProducer,
            PluginKind::TokenProducer,
            PluginKind::BurstPrefixProducer,
            PluginKind::P2pSourceProducer,
        ] {
            let mut all = self.plugins.iter().filter(|(_, spec)| spec.kind() == kind);
            let Some((first, _)) = all.next() else { continue };
            for (name, _) in all {
                let text =
                    format!("{name}: {first} is used in its place, one {} runs", kind.name());
                notes.push((NoteKind::Warning, text));
            }
        }
    }

    /// Whether a decider or another producer reads prefix matches of this one. What load subtracts
    /// does not count: it takes whatever there is.
    fn is_read_elsewhere(&self, producer: &ProducerPlan) -> bool {
        let reads = |(_, spec): &(Name, PluginSpec)| {
            let kind = spec.kind();
            let other = kind.is(Role::Decider)
                || kind.is(Role::Producer) && kind != PluginKind::InflightLoadProducer;
            let wanted = spec.plugin().inputs().prefix.filter(|_| other);
            wanted.is_some_and(|wanted| wanted.name() == producer.name.as_str())
        };
        self.plugins.iter().any(reads)
    }
}

type Notes = Vec<(NoteKind, String)>;

/// Totals that are the same for every endpoint leave the choice to chance.
fn of_profile(profile: &ProfilePlan, notes: &mut Notes) {
    let warn = |notes: &mut Notes, text| notes.push((NoteKind::Warning, text));
    let (name, picker) = (&profile.name, &profile.picker);
    let by_score =
        matches!(picker.spec.kind(), PluginKind::MaxScorePicker | PluginKind::WeightedRandomPicker);
    let weightless = |stage: &&StagePlan| stage.weight == 0.0;
    let zero = profile.scorers.iter().filter(weightless).count();
    if by_score && profile.scorers.is_empty() {
        let text = format!("profile {name}: no scorers, so {} picks at random", picker.name);
        warn(notes, text);
    } else if by_score && zero == profile.scorers.len() {
        let text = format!("profile {name}: every weight is 0, so {} picks at random", picker.name);
        warn(notes, text);
    } else if zero > 0 {
        for stage in profile.scorers.iter().filter(weightless) {
            let text = format!("{}: weight 0 in profile {name}, so it changes nothing", stage.name);
            notes.push((NoteKind::Inert, text));
        }
    }
    if !by_score && !profile.scorers.is_empty() {
        let text =
            format!("profile {name}: {} does not look at scores, only filters count", picker.name);
        warn(notes, text);
    }
    for stage in &profile.scorers {
        if let PluginSpec::PrefixScorer(scorer) = &stage.spec
            && scorer.older_form().is_some()
        {
            let text = format!(
                "{}: parameters of llm-d's releases of 2025; it matches and scores as those did. \
                 Today they stand at approx-prefix-cache-producer or \
                 precise-prefix-cache-producer",
                stage.name
            );
            warn(notes, text);
        }
    }
}

fn of_plugin(name: &Name, spec: &PluginSpec, notes: &mut Notes) {
    let mut warn = |text: &str| notes.push((NoteKind::Warning, format!("{name}.{text}")));
    match spec {
        PluginSpec::PrefixBasedDecider(decider) if decider.non_cached_tokens == 0 => {
            warn("nonCachedTokens: 0, so prefill never goes elsewhere; write a number of tokens");
        }
        PluginSpec::DisaggProfileHandler(disagg) => {
            let older = [
                ("decodeProfile", &disagg.decode_profile, "profiles.decode"),
                ("prefillProfile", &disagg.prefill_profile, "profiles.prefill"),
                ("encodeProfile", &disagg.encode_profile, "profiles.encode"),
                ("prefillDeciderPluginName", &disagg.prefill_decider_plugin_name, PREFILL),
                ("encodeDeciderPluginName", &disagg.encode_decider_plugin_name, "deciders.encode"),
                ("deciderPluginName", &disagg.decider_plugin_name, PREFILL),
            ];
            for (old, _, new) in older.into_iter().filter(|(_, value, _)| value.is_some()) {
                warn(&format!("{old}: deprecated; write {new}"));
            }
        }
        _ => match ProducerKind::of(spec) {
            Some(ProducerKind::Approx(approx)) => {
                if approx.block_size.is_some() {
                    warn("blockSize: deprecated; write blockSizeTokens (four characters a token)");
                }
                let tokens = approx.max_prefix_tokens_to_match;
                if (1..APPROX_BLOCK_TOKENS_MIN).contains(&tokens) {
                    warn(&format!(
                        "maxPrefixTokensToMatch: {tokens} is less than a block of \
                         {APPROX_BLOCK_TOKENS_MIN} tokens; one block of a prompt is looked at"
                    ));
                }
                if approx.lru_capacity_per_server == 0 && !approx.auto_tune {
                    warn("lruCapacityPerServer: 0, so nothing is remembered and nothing matches");
                }
            }
            Some(ProducerKind::Precise(precise)) => {
                if precise.token_processor_config.block_size.is_some() {
                    warn("tokenProcessorConfig.blockSize: deprecated; write blockSizeTokens");
                }
                let events = &precise.kv_events_config;
                if !events.discovers() && events.bound().is_none() {
                    warn(
                        "kvEventsConfig: discoverPods is false and there is no zmqEndpoint, so no \
                         KV events come and no cache is known precisely",
                    );
                }
            }
            _ => {}
        },
    }
}

const PREFILL: &str = "deciders.prefill";
