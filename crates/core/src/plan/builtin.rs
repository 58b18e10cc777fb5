//! Configurations that are in the program itself.

use super::{Experimental, Plan};
use crate::config::{EndpointPickerConfig, PluginEntry, ProfileEntry};
use crate::plugin::PluginSpec;
use crate::produce::{InflightLoad, PrecisePrefix};

impl Plan {
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
}

fn builtin(config: EndpointPickerConfig) -> Plan {
    Plan::build(&config, Experimental::Refused).expect("built-in configurations are tested")
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
