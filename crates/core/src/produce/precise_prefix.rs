//! `precise-prefix-cache-producer`: what do the engines' own events say they hold?

use std::fmt;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::GoDuration;
use crate::event::Tier;
use crate::filter::LabelSelector;
use crate::index::TierWeights;
use crate::screen::selector;
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
    /// `tcp://HOST:PORT` where the router listens for engines that connect to it; `*` is every
    /// address of its host. Empty: no engine connects.
    pub zmq_endpoint: String,
    /// What topics must begin with at `zmqEndpoint`; `kv@` when left out. An endpoint's own socket
    /// is read whatever its topic is.
    pub topic_filter: Option<String>,
    /// Without effect.
    pub concurrency: Option<u32>,
    /// Without effect: the form of each event tells.
    pub engine_type: Option<EngineType>,
    /// Subscribe to each endpoint's own socket; true when left out.
    pub discover_pods: Option<bool>,
    /// Which endpoints, and ports of their sockets.
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PodDiscovery {
    /// Labels of the endpoints that are subscribed to, as `key=value,...`; all when left out.
    pub pod_label_selector: Option<String>,
    /// Without effect here.
    pub pod_namespace: Option<String>,
    /// Event socket of rank 0; rank n is n above. When left out, the engine is asked, and 5557 is
    /// taken for one that cannot tell.
    pub socket_port: Option<u16>,
    /// Replay socket of rank 0; none, 0 or less: no replay.
    pub replay_socket_port: Option<i32>,
}

/// Port of rank 0's event socket where nothing tells another (llm-d's default).
pub const SOCKET_PORT: u16 = 5557;
/// What topics begin with where nothing tells otherwise (llm-d's default).
const TOPIC_FILTER: &str = "kv@";
/// Where mistakes are.
const PODS: &str = "kvEventsConfig.podDiscoveryConfig";

impl KvEvents {
    /// What topics must begin with at [`KvEvents::bound`].
    pub fn topic_filter(&self) -> &str {
        self.topic_filter.as_deref().unwrap_or(TOPIC_FILTER)
    }

    /// Whether endpoints' own sockets are subscribed to.
    pub fn discovers(&self) -> bool {
        self.discover_pods.unwrap_or(true)
    }

    /// Host and port where engines connect to the router; `*` is every address. `None`: nowhere.
    pub fn bound(&self) -> Option<(&str, u16)> {
        let (host, port) = self.zmq_endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let port = port.parse().ok()?;
        if host.is_empty() { None } else { Some((host, port)) }
    }

    /// Labels of the endpoints whose sockets are subscribed to; `None`: every endpoint.
    pub fn selector(&self) -> Option<LabelSelector> {
        // A selector that cannot be read does not pass `check`.
        self.selector_as_written().and_then(Result::ok)
    }

    fn selector_as_written(&self) -> Option<Result<LabelSelector, String>> {
        let text = self.pod_discovery_config.pod_label_selector.as_deref()?;
        if text.trim().is_empty() { None } else { Some(selector::parse(text)) }
    }

    fn check(&self) -> Result<(), String> {
        if !self.zmq_endpoint.is_empty() && self.bound().is_none() {
            return Err(format!(
                "kvEventsConfig.zmqEndpoint: `{}` is not an address that engines can connect to; write \
                 tcp://*:5557 (kvroute speaks TCP only)",
                self.zmq_endpoint
            ));
        }
        if let Some(Err(error)) = self.selector_as_written() {
            return Err(format!("{PODS}.podLabelSelector: {error}"));
        }
        let pods = &self.pod_discovery_config;
        if pods.socket_port == Some(0) {
            let message = "0 is no port; leave it out to ask the engines";
            return Err(format!("{PODS}.socketPort: {message}"));
        }
        match pods.replay_socket_port {
            Some(port) if port > i32::from(u16::MAX) => {
                Err(format!("{PODS}.replaySocketPort: {port} is no port"))
            }
            _ => Ok(()),
        }
    }
}

/// Where events come from, in words.
impl fmt::Display for KvEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bound().is_some() {
            write!(f, "engines connect to {}", self.zmq_endpoint)?;
            match self.topic_filter() {
                "" => {}
                filter => write!(f, " (topics that begin with {filter})")?,
            }
        }
        let pods = &self.pod_discovery_config;
        match (self.discovers(), self.bound()) {
            (false, None) => return write!(f, "from nowhere: discoverPods is false"),
            (false, Some(_)) => return Ok(()),
            (true, None) => write!(f, "each endpoint")?,
            (true, Some(_)) => write!(f, "; of those that do not, each endpoint")?,
        }
        if self.selector().is_some() {
            let selector = pods.pod_label_selector.as_deref().unwrap_or_default();
            write!(f, " with labels {selector}")?;
        }
        match pods.socket_port {
            Some(port) => write!(f, " at port {port} + rank")?,
            None => write!(f, " as it says itself, else at port {SOCKET_PORT} + rank")?,
        }
        match pods.replay_port() {
            Some(port) => write!(f, ", replays at port {port} + rank"),
            None => Ok(()),
        }
    }
}

impl PodDiscovery {
    /// Replay socket of rank 0, if there is one.
    pub fn replay_port(&self) -> Option<u16> {
        self.replay_socket_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0)
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
        self.kv_events_config.check()
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
        let unused = !events.discovers() && *pods != PodDiscovery::default();
        [
            (hashes, "hashSeed and hashAlgorithm: engine hashes are opaque, events carry tokens"),
            (own_index, "kvBlockIndexConfig: the index is bounded by kvroute.index_bytes_max"),
            (events.concurrency.is_some(), "concurrency: every stream has a task of its own"),
            (events.engine_type.is_some(), "engineType: the form of each event tells"),
            (unused, "podDiscoveryConfig: discoverPods is false"),
            (
                pods.pod_namespace.is_some() && !unused,
                "podNamespace: endpoints are found by flags and files, not in Kubernetes",
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

    fn events(yaml: &str) -> KvEvents {
        serde_json::from_str(yaml).unwrap()
    }

    #[test]
    fn where_events_come_from_is_said_in_words() {
        let table = [
            ("{}", "each endpoint as it says itself, else at port 5557 + rank"),
            (
                r#"{"podDiscoveryConfig": {"socketPort": 5600, "replaySocketPort": 5700,
                    "podLabelSelector": "a=b"}}"#,
                "each endpoint with labels a=b at port 5600 + rank, replays at port 5700 + rank",
            ),
            (
                r#"{"zmqEndpoint": "tcp://*:5557", "discoverPods": false}"#,
                "engines connect to tcp://*:5557 (topics that begin with kv@)",
            ),
            (
                r#"{"zmqEndpoint": "tcp://*:1", "topicFilter": ""}"#,
                "engines connect to tcp://*:1; of those that do not, each endpoint as it says \
                 itself, else at port 5557 + rank",
            ),
            (r#"{"discoverPods": false}"#, "from nowhere: discoverPods is false"),
        ];
        for (given, words) in table {
            assert_eq!(events(given).to_string(), words, "{given}");
        }
        let off = events(r#"{"podDiscoveryConfig": {"replaySocketPort": -1}}"#);
        assert_eq!(off.pod_discovery_config.replay_port(), None);
    }

    #[test]
    fn addresses_and_labels_are_checked() {
        let bound = |endpoint: &str| {
            let events = KvEvents { zmq_endpoint: endpoint.to_owned(), ..KvEvents::default() };
            events.check().map(|()| events.bound().map(|(host, port)| (host.to_owned(), port)))
        };
        for (endpoint, host, port) in [
            ("tcp://*:5557", "*", 5557),
            ("tcp://0.0.0.0:5557", "0.0.0.0", 5557),
            ("tcp://[::]:5557", "::", 5557),
            ("tcp://router.default.svc:1", "router.default.svc", 1),
        ] {
            assert_eq!(bound(endpoint), Ok(Some((host.to_owned(), port))), "{endpoint}");
        }
        assert_eq!(bound(""), Ok(None));
        for wrong in ["tcp://*", "tcp://:5557", "*:5557", "ipc:///tmp/x", "tcp://a:70000"] {
            assert!(bound(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
        let pods = |text: &str| events(&format!(r#"{{"podDiscoveryConfig": {{{text}}}}}"#)).check();
        assert!(pods(r#""podLabelSelector": "a=b=c""#).unwrap_err().contains("podLabelSelector"));
        assert!(pods(r#""socketPort": 0"#).unwrap_err().contains("socketPort"));
        assert!(pods(r#""replaySocketPort": 70000"#).unwrap_err().contains("70000"));
        assert_eq!(pods(r#""podLabelSelector": """#), Ok(()));
    }

    #[test]
    fn only_what_has_no_effect_is_called_so() {
        let inert = |given: &str| {
            let plugin = PrecisePrefix { kv_events_config: events(given), ..Default::default() };
            plugin.inert().join("; ")
        };
        let effective = r#"{"zmqEndpoint": "tcp://*:1", "topicFilter": "x", "discoverPods": true,
            "podDiscoveryConfig": {"socketPort": 1, "replaySocketPort": 2,
            "podLabelSelector": "a=b"}}"#;
        assert_eq!(inert(effective), "");
        let words = inert(
            r#"{"concurrency": 4, "engineType": "vllm",
                "podDiscoveryConfig": {"podNamespace": "x"}}"#,
        );
        for field in ["concurrency", "engineType", "podNamespace"] {
            assert!(words.contains(field), "{words}");
        }
        let words = inert(r#"{"discoverPods": false, "podDiscoveryConfig": {"socketPort": 1}}"#);
        assert_eq!(words, "podDiscoveryConfig: discoverPods is false");
    }

    #[test]
    fn the_deprecated_block_size_still_counts() {
        let mut producer = PrecisePrefix::default();
        assert_eq!(producer.block_tokens_assumed(), 16);
        producer.token_processor_config.block_size = Some(64);
        assert_eq!(producer.block_tokens_assumed(), 64);
    }
}
