//! `core-metrics-extractor`: which metrics of which engine tell how loaded it is?

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{EngineReading, EngineSpec, MetricSpec, Signal};
use crate::fleet::{ATTRIBUTES_MAX, Name};
use crate::stage::Plugin;

/// Label of an endpoint that names its engine.
pub const ENGINE_LABEL: &str = "llm-d.ai/engine-type";
/// Its older name, which still counts where the endpoint does not have the label itself.
pub const ENGINE_LABEL_LEGACY: &str = "inference.networking.k8s.io/engine-type";

/// A name that llm-d keeps for itself.
const RESERVED: &str = "default";

/// Parameters of `core-metrics-extractor`. The engine of an endpoint is what its label says, else
/// the default engine; without either it is told from the names on its metrics page.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CoreMetricsExtractor {
    /// Label of an endpoint that names its engine; where it is missing, the older label
    /// `inference.networking.k8s.io/engine-type` counts.
    pub engine_label_key: String,
    /// Engine of endpoints without that label. Empty: vLLM, SGLang, TensorRT-LLM or Triton,
    /// whichever the names on the endpoint's page belong to.
    pub default_engine: String,
    /// Engines of your own, or other metrics for `vllm`, `sglang`, `trtllm-serve`,
    /// `triton-tensorrt-llm` or `triton`. An engine that is named here is what stands here.
    pub engine_configs: Vec<EngineConfig>,
}

impl Default for CoreMetricsExtractor {
    fn default() -> CoreMetricsExtractor {
        CoreMetricsExtractor {
            engine_label_key: ENGINE_LABEL.to_owned(),
            default_engine: String::new(),
            engine_configs: Vec::new(),
        }
    }
}

/// One engine: where its page says what. Each specification is `name` or
/// `name{label=value,...}`; an empty one says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Value of the engine label.
    pub name: String,
    /// Requests queued in the engine.
    pub queued_requests_spec: String,
    /// Requests being computed.
    pub running_requests_spec: String,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_usage_spec: String,
    /// Adapters, in labels `max_lora`, `running_lora_adapters` and `waiting_lora_adapters`; the
    /// series with the highest value counts.
    pub lora_spec: String,
    /// Block size and number of KV blocks, both in labels.
    pub cache_info_spec: String,
    /// Label of `cacheInfoSpec` with the block size; empty: `block_size`.
    pub cache_block_size_label_name: String,
    /// Label of `cacheInfoSpec` with the number of blocks; empty: `num_gpu_blocks`.
    pub cache_num_blocks_label_name: String,
    /// Tokens per KV block, as a value.
    pub cache_block_size_spec: String,
    /// Number of KV blocks, as a value.
    pub cache_num_blocks_spec: String,
    /// Further numbers that become attributes of the endpoint.
    pub custom_metrics: Vec<CustomMetric>,
}

/// A number of the page that plugins can read by its key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CustomMetric {
    /// Key of the attribute. Required, once per engine.
    pub attribute_key: String,
    /// The metric; of several series the one with the newest time stamp, else the first. Required.
    pub metric_spec: String,
}

impl Plugin for CoreMetricsExtractor {
    fn check(&self) -> Result<(), String> {
        self.reading(&Name::from("")).map(drop)
    }
}

impl CoreMetricsExtractor {
    /// What follows for the reader of pages; `producer` is the plugin's own name.
    pub(super) fn reading(&self, producer: &Name) -> Result<EngineReading, String> {
        let mut engines: Vec<EngineSpec> = Vec::new();
        for (at, config) in self.engine_configs.iter().enumerate() {
            let place = |message| format!("engineConfigs[{at}].{message}");
            let engine = config.engine().map_err(place)?;
            if engines.iter().any(|other| other.name == engine.name) {
                return Err(place(format!("name: `{}` is there twice", config.name)));
            }
            engines.push(engine);
        }
        let built_in = built_in();
        let detected = built_in.iter().map(|engine| engine.name.clone()).collect();
        for engine in built_in {
            if !engines.iter().any(|own| own.name == engine.name) {
                engines.push(engine);
            }
        }
        let default_engine = match self.default_engine.as_str() {
            "" => None,
            name => match engines.iter().find(|engine| engine.name.as_str() == name) {
                Some(engine) => Some(engine.name.clone()),
                None => {
                    let known: Vec<&str> = engines.iter().map(|e| e.name.as_str()).collect();
                    let known = known.join(", ");
                    return Err(format!("defaultEngine: no engine `{name}`; there are {known}"));
                }
            },
        };
        let label = match self.engine_label_key.as_str() {
            "" => ENGINE_LABEL,
            label => label,
        };
        let (producer, engine_label) = (producer.clone(), label.to_owned());
        Ok(EngineReading { producer, engine_label, default_engine, engines, detected })
    }
}

impl EngineConfig {
    fn engine(&self) -> Result<EngineSpec, String> {
        match self.name.as_str() {
            "" => return Err("name: an engine needs a name".to_owned()),
            RESERVED => return Err(format!("name: `{RESERVED}` is reserved; choose another")),
            _ => {}
        }
        let or = |text: &String, default: &str| match text.as_str() {
            "" => default.to_owned(),
            _ => text.clone(),
        };
        let cache_info = Signal::CacheInfo {
            block_size_label: or(&self.cache_block_size_label_name, "block_size"),
            blocks_label: or(&self.cache_num_blocks_label_name, "num_gpu_blocks"),
        };
        let table = [
            ("queuedRequestsSpec", &self.queued_requests_spec, Signal::Waiting),
            ("runningRequestsSpec", &self.running_requests_spec, Signal::Running),
            ("kvUsageSpec", &self.kv_usage_spec, Signal::KvUsage),
            ("loraSpec", &self.lora_spec, Signal::Lora),
            ("cacheInfoSpec", &self.cache_info_spec, cache_info),
            ("cacheBlockSizeSpec", &self.cache_block_size_spec, Signal::BlockSize),
            ("cacheNumBlocksSpec", &self.cache_num_blocks_spec, Signal::Blocks),
        ];
        let mut signals = Vec::new();
        for (field, text, signal) in table {
            if !text.is_empty() {
                let spec = MetricSpec::parse(text).map_err(|e| format!("{field}: {e}"))?;
                signals.push((signal, spec));
            }
        }
        if self.queued_requests_spec.is_empty() && self.running_requests_spec.is_empty() {
            let what = "queuedRequestsSpec: an engine needs this or runningRequestsSpec";
            return Err(format!("{what}; without either its endpoints would always look idle"));
        }
        let scalars = self.scalars()?;
        let mut engine = EngineSpec { name: Name::from(self.name.as_str()), signals, scalars };
        engine.complete();
        Ok(engine)
    }

    fn scalars(&self) -> Result<Vec<(String, MetricSpec)>, String> {
        if self.custom_metrics.len() > ATTRIBUTES_MAX {
            return Err(format!("customMetrics: an endpoint keeps at most {ATTRIBUTES_MAX}"));
        }
        let mut keys = BTreeSet::new();
        let mut scalars = Vec::new();
        for (at, custom) in self.custom_metrics.iter().enumerate() {
            let key = custom.attribute_key.as_str();
            let wrong = |message: String| format!("customMetrics[{at}].{message}");
            if key.is_empty() {
                return Err(wrong("attributeKey: must not be empty".to_owned()));
            }
            if !keys.insert(key) {
                return Err(wrong(format!("attributeKey: `{key}` is there twice")));
            }
            let spec = MetricSpec::parse(&custom.metric_spec);
            let spec = spec.map_err(|e| wrong(format!("metricSpec: {e}")))?;
            scalars.push((key.to_owned(), spec));
        }
        Ok(scalars)
    }
}

impl EngineSpec {
    /// Adds what llm-d's configuration has no field for.
    fn complete(&mut self) {
        let vllm = |name: &str| MetricSpec { name: format!("vllm:{name}"), labels: Vec::new() };
        let more = match self.name.as_str() {
            "vllm" => vec![
                (Signal::PrefixQueries, vllm("prefix_cache_queries_total")),
                (Signal::PrefixHits, vllm("prefix_cache_hits_total")),
            ],
            _ => Vec::new(),
        };
        self.signals.extend(more);
        // The name of the same number before vLLM 0.10.
        let usage = (Signal::KvUsage, vllm("kv_cache_usage_perc"));
        if self.signals.contains(&usage) {
            self.signals.push((Signal::KvUsage, vllm("gpu_cache_usage_perc")));
        }
    }
}

/// The engines whose names are known, the more telling one first where a page holds the names of
/// two.
pub(super) fn built_in() -> Vec<EngineSpec> {
    let cache_info = |block_size: &str, blocks: &str| Signal::CacheInfo {
        block_size_label: block_size.to_owned(),
        blocks_label: blocks.to_owned(),
    };
    let engine = |name: &str, table: Vec<(Signal, &str)>| {
        let spec = |text| MetricSpec::parse(text).expect("the built-in names are well formed");
        let signals = table.into_iter().map(|(signal, text)| (signal, spec(text))).collect();
        let mut engine = EngineSpec { name: Name::from(name), signals, scalars: Vec::new() };
        engine.complete();
        engine
    };
    vec![
        engine(
            "vllm",
            vec![
                (Signal::Waiting, "vllm:num_requests_waiting"),
                (Signal::Running, "vllm:num_requests_running"),
                (Signal::KvUsage, "vllm:kv_cache_usage_perc"),
                (Signal::Lora, "vllm:lora_requests_info"),
                (cache_info("block_size", "num_gpu_blocks"), "vllm:cache_config_info"),
            ],
        ),
        engine(
            "sglang",
            vec![
                (Signal::Waiting, "sglang:num_queue_reqs"),
                (Signal::Running, "sglang:num_running_reqs"),
                (Signal::KvUsage, "sglang:token_usage"),
                (Signal::BlockSize, "sglang:page_size"),
                (Signal::Blocks, "sglang:num_pages"),
                (cache_info("page_size", "num_pages"), "sglang:cache_config_info"),
            ],
        ),
        engine(
            "trtllm-serve",
            vec![
                (Signal::Waiting, "trtllm_num_requests_waiting"),
                (Signal::Running, "trtllm_num_requests_running"),
                (Signal::KvUsage, "trtllm_kv_cache_utilization"),
                (Signal::BlockSize, "trtllm_kv_cache_tokens_per_block"),
                (Signal::Blocks, "trtllm_kv_cache_max_blocks"),
            ],
        ),
        engine(
            "triton-tensorrt-llm",
            vec![
                (Signal::Waiting, "nv_trt_llm_request_metrics{request_type=waiting}"),
                (Signal::Running, "nv_trt_llm_request_metrics{request_type=scheduled}"),
                (
                    Signal::KvUsage,
                    "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
                ),
                (
                    Signal::BlockSize,
                    "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
                ),
                (Signal::Blocks, "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}"),
            ],
        ),
        engine(
            "triton",
            vec![
                (Signal::Waiting, "nv_inference_pending_request_count"),
                (Signal::Running, "nv_inference_exec_count"),
            ],
        ),
    ]
}
