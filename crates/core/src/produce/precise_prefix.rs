//! `precise-prefix-cache-producer`: what do the engines' own events say they hold?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::GoDuration;
use crate::event::Tier;
use crate::index::TierWeights;
use crate::stage::Plugin;

/// Parameters of `precise-prefix-cache-producer`. Many describe the place and the hashes of
/// llm-d's index; kvroute learns block sizes and maps hashes from the events themselves, so those
/// are accepted and have no effect (the plan lists them).
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PrecisePrefix {
    /// Block size until events have shown it.
    pub token_processor_config: TokenProcessor,
    /// Tier weights.
    pub indexer_config: Indexer,
    /// Where events come from.
    pub kv_events_config: KvEvents,
    /// Count the blocks of requests on their way.
    pub speculative_indexing: bool,
    /// Longest life of such an entry.
    #[serde(rename = "speculativeTTL")]
    pub speculative_ttl: Option<GoDuration>,
}

/// `tokenProcessorConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TokenProcessor {
    /// Tokens per block; used for an endpoint until its events show the real one. Default 16.
    pub block_size_tokens: Option<u32>,
    /// Deprecated name of `blockSizeTokens`.
    pub block_size: Option<u32>,
    /// Without effect: engine hashes are opaque here.
    pub hash_seed: String,
    /// Without effect: engine hashes are opaque here.
    pub hash_algorithm: Option<HashAlgorithm>,
}

/// Hashes that llm-d knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HashAlgorithm {
    /// FNV-1a over CBOR.
    CborFnv,
    /// XXH64.
    Xxh64,
}

/// `indexerConfig`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Indexer {
    /// Without effect: the one index is bounded by `kvroute.index_bytes_max`.
    pub kv_block_index_config: KvBlockIndex,
    /// Weight per tier.
    pub kv_cache_backend_configs: Option<Vec<CacheBackend>>,
}

/// `kvBlockIndexConfig`, without effect.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct KvBlockIndex {
    /// Map in memory.
    pub in_memory_config: Option<InMemory>,
    /// Bounded by bytes.
    pub cost_aware_memory_config: Option<CostAware>,
    /// Shared.
    pub redis_config: Option<Redis>,
    /// Metrics are always on.
    pub enable_metrics: bool,
    /// Nanoseconds.
    pub metrics_logging_interval: Option<i64>,
}

/// `inMemoryConfig`, without effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct InMemory {
    /// Keys.
    pub size: Option<u64>,
    /// Endpoints per key.
    pub pod_cache_size: Option<u64>,
}

/// `costAwareMemoryConfig`, without effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CostAware {
    /// Bytes, as text.
    pub size: Option<String>,
}

/// `redisConfig`, without effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Redis {
    /// Server.
    pub address: Option<String>,
}

/// Weight of one tier.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CacheBackend {
    /// Medium name: `gpu`, `cpu`, ...
    pub name: String,
    /// What a block there is worth, 0 to 1.
    pub weight: f64,
}

/// `kvEventsConfig`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct KvEvents {
    /// Without effect: an address that engines connect to; kvroute connects to theirs.
    pub zmq_endpoint: String,
    /// Without effect: what an event is about follows from the socket, so all topics are read.
    pub topic_filter: Option<String>,
    /// Without effect.
    pub concurrency: Option<u32>,
    /// Without effect: the form of each event tells.
    pub engine_type: Option<EngineType>,
    /// Without effect: every endpoint is subscribed to.
    pub discover_pods: Option<bool>,
    /// Ports of the engines' sockets.
    pub pod_discovery_config: PodDiscovery,
}

/// Engines that llm-d tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineType {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
}

/// `podDiscoveryConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PodDiscovery {
    /// Without effect here: the host's discovery decides.
    pub pod_label_selector: Option<String>,
    /// Without effect here.
    pub pod_namespace: Option<String>,
    /// Event socket of rank 0; rank n is n above.
    pub socket_port: u16,
    /// Replay socket of rank 0; none: no replay.
    pub replay_socket_port: Option<u16>,
}

impl Default for PodDiscovery {
    fn default() -> PodDiscovery {
        PodDiscovery {
            pod_label_selector: None,
            pod_namespace: None,
            socket_port: 5557,
            replay_socket_port: None,
        }
    }
}

impl PrecisePrefix {
    /// Tokens per block of an endpoint whose events have not shown it yet.
    pub fn block_tokens_assumed(&self) -> u32 {
        let processor = &self.token_processor_config;
        processor.block_size_tokens.or(processor.block_size).filter(|b| *b > 0).unwrap_or(16)
    }

    /// Weights by tier: the configured ones over the defaults.
    pub fn tier_weights(&self) -> TierWeights {
        let mut weights = TierWeights::default();
        for backend in self.indexer_config.kv_cache_backend_configs.iter().flatten() {
            weights.0[Tier::from_medium(&backend.name).index()] = backend.weight;
        }
        weights
    }
}

impl Plugin for PrecisePrefix {
    fn check(&self) -> Result<(), String> {
        let backends = self.indexer_config.kv_cache_backend_configs.iter().flatten();
        for (at, CacheBackend { name, weight }) in backends.enumerate() {
            if !(0.0..=1.0).contains(weight) {
                let field = format!("indexerConfig.kvCacheBackendConfigs[{at}].weight");
                return Err(format!("{field}: {weight} of tier {name:?} is not in [0, 1]"));
            }
        }
        Ok(())
    }

    fn inert(&self) -> Vec<String> {
        let processor = &self.token_processor_config;
        let index = &self.indexer_config.kv_block_index_config;
        let own_index = index.in_memory_config.is_some()
            || index.cost_aware_memory_config.is_some()
            || index.redis_config.is_some();
        let events = &self.kv_events_config;
        let pods = &events.pod_discovery_config;
        let hashes = !processor.hash_seed.is_empty() || processor.hash_algorithm.is_some();
        let selected = pods.pod_label_selector.is_some() || pods.pod_namespace.is_some();
        [
            (hashes, "hashSeed and hashAlgorithm: engine hashes are opaque, events carry tokens"),
            (own_index, "kvBlockIndexConfig: the index is bounded by kvroute.index_bytes_max"),
            (events.concurrency.is_some(), "concurrency: every stream has a task of its own"),
            (events.engine_type.is_some(), "engineType: the form of each event tells"),
            (
                !events.zmq_endpoint.is_empty(),
                "zmqEndpoint: kvroute connects to the socket of each engine",
            ),
            (events.topic_filter.is_some(), "topicFilter: all topics are read"),
            (
                events.discover_pods == Some(false),
                "discoverPods: every endpoint of the fleet is subscribed to",
            ),
            (
                selected,
                "podLabelSelector and podNamespace: every endpoint of the fleet is subscribed to",
            ),
        ]
        .into_iter()
        .filter(|(given, _)| *given)
        .map(|(_, text)| text.to_owned())
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tier_weights_override_the_defaults_by_medium_name() {
        let backend = |name: &str, weight| CacheBackend { name: name.into(), weight };
        let mut producer = PrecisePrefix::default();
        assert_eq!(producer.tier_weights().0, [1.0, 0.8, 1.0, 1.0]);
        producer.indexer_config.kv_cache_backend_configs =
            Some(vec![backend("CPU", 0.5), backend("storage", 0.2)]);
        assert_eq!(producer.tier_weights().0, [1.0, 0.5, 0.2, 1.0]);
        assert!(producer.check().is_ok());
        producer.indexer_config.kv_cache_backend_configs = Some(vec![backend("gpu", 2.0)]);
        assert!(producer.check().is_err());
    }

    #[test]
    fn the_deprecated_block_size_still_counts() {
        let mut producer = PrecisePrefix::default();
        assert_eq!(producer.block_tokens_assumed(), 16);
        producer.token_processor_config.block_size = Some(64);
        assert_eq!(producer.block_tokens_assumed(), 64);
    }
}
