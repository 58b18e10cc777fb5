//! How loaded is an engine, by its own `/metrics` page?
//!
//! Prometheus text exposition (version 0.0.4 and OpenMetrics), of which only the families named
//! in `FAMILIES` are read; other lines cost a look at their first bytes and no allocation. Which
//! engine it is follows from the names, as in llm-d's `core-metrics-extractor` defaults.
//!
//! A page can hold one series per data parallel rank (label `engine` or `dp_rank`). Waiting,
//! running, block and token counts are summed over the series. KV usage is their mean: ranks have
//! pools of one size, and the engine itself chooses the rank for a request.

use kvroute_core::fleet::{EngineMetrics, LoraMetrics};
use memchr::memchr;
use thiserror::Error;

/// Most adapters that are read from one series.
pub const ADAPTERS_MAX: usize = 1024;

/// The engines whose names are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Engine {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// TensorRT-LLM's own server.
    TrtllmServe,
    /// TensorRT-LLM behind Triton.
    TritonTrtllm,
    /// Triton with another backend.
    Triton,
}

impl Engine {
    /// The name that llm-d's engine label uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Engine::Vllm => "vllm",
            Engine::Sglang => "sglang",
            Engine::TrtllmServe => "trtllm-serve",
            Engine::TritonTrtllm => "triton-tensorrt-llm",
            Engine::Triton => "triton",
        }
    }
}

/// What one page says.
#[derive(Clone, Debug, PartialEq)]
pub struct Scrape {
    /// Whose names the page uses.
    pub engine: Engine,
    /// The numbers.
    pub metrics: EngineMetrics,
}

/// Why a page says nothing about load. Zeros would make its endpoint look idle, so the scrape has
/// to count as failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MetricsError {
    /// No family of any known engine.
    #[error(
        "the page holds no metric of vLLM, SGLang, TensorRT-LLM or Triton; \
         is this an engine's /metrics?"
    )]
    NoEngine,
    /// Families of an engine, but neither of its queue lengths.
    #[error("the page of {} has no number of waiting or running requests yet", .0.as_str())]
    NoLoad(Engine),
}

/// What a family tells.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meaning {
    Waiting,
    Running,
    KvUsage,
    BlockSize,
    Blocks,
    PrefixQueries,
    PrefixHits,
    /// vLLM's labels `max_lora`, `running_lora_adapters`, `waiting_lora_adapters`.
    Lora,
    /// Labels with block size and number of blocks.
    CacheConfig,
    /// Triton's TensorRT-LLM backend: the label `request_type` tells waiting from running.
    TritonRequests,
    /// Triton's TensorRT-LLM backend: the label `kv_cache_block_type` tells what it is.
    TritonBlocks,
}

const FAMILIES: [(&[u8], Engine, Meaning); 23] = [
    (b"vllm:num_requests_waiting", Engine::Vllm, Meaning::Waiting),
    (b"vllm:num_requests_running", Engine::Vllm, Meaning::Running),
    (b"vllm:kv_cache_usage_perc", Engine::Vllm, Meaning::KvUsage),
    (b"vllm:gpu_cache_usage_perc", Engine::Vllm, Meaning::KvUsage),
    (b"vllm:prefix_cache_queries_total", Engine::Vllm, Meaning::PrefixQueries),
    (b"vllm:prefix_cache_hits_total", Engine::Vllm, Meaning::PrefixHits),
    (b"vllm:lora_requests_info", Engine::Vllm, Meaning::Lora),
    (b"vllm:cache_config_info", Engine::Vllm, Meaning::CacheConfig),
    (b"sglang:num_queue_reqs", Engine::Sglang, Meaning::Waiting),
    (b"sglang:num_running_reqs", Engine::Sglang, Meaning::Running),
    (b"sglang:token_usage", Engine::Sglang, Meaning::KvUsage),
    (b"sglang:page_size", Engine::Sglang, Meaning::BlockSize),
    (b"sglang:num_pages", Engine::Sglang, Meaning::Blocks),
    (b"sglang:cache_config_info", Engine::Sglang, Meaning::CacheConfig),
    (b"trtllm_num_requests_waiting", Engine::TrtllmServe, Meaning::Waiting),
    (b"trtllm_num_requests_running", Engine::TrtllmServe, Meaning::Running),
    (b"trtllm_kv_cache_utilization", Engine::TrtllmServe, Meaning::KvUsage),
    (b"trtllm_kv_cache_tokens_per_block", Engine::TrtllmServe, Meaning::BlockSize),
    (b"trtllm_kv_cache_max_blocks", Engine::TrtllmServe, Meaning::Blocks),
    (b"nv_trt_llm_request_metrics", Engine::TritonTrtllm, Meaning::TritonRequests),
    (b"nv_trt_llm_kv_cache_block_metrics", Engine::TritonTrtllm, Meaning::TritonBlocks),
    // The TensorRT-LLM backend's families come with these on one page; they rank below them.
    (b"nv_inference_pending_request_count", Engine::Triton, Meaning::Waiting),
    (b"nv_inference_exec_count", Engine::Triton, Meaning::Running),
];

/// Reads a metrics page.
///
/// # Errors
/// [`MetricsError`] when the page does not tell an engine's load.
pub fn parse(page: &[u8]) -> Result<Scrape, MetricsError> {
    let mut totals = Totals::default();
    let mut rest = page;
    while !rest.is_empty() {
        let end = memchr(b'\n', rest).unwrap_or(rest.len());
        let (line, tail) = rest.split_at(end);
        rest = tail.get(1..).unwrap_or_default();
        if matches!(line.first(), Some(b'v' | b's' | b't' | b'n')) {
            totals.read_line(line);
        }
    }
    totals.into_scrape()
}

/// What vLLM's `cache_config_info` says beyond block size and number of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheConfig {
    /// `enable_prefix_caching`.
    pub prefix_caching: Option<bool>,
    /// `prefix_caching_hash_algo`: how blocks are named.
    pub hash_algorithm: Option<String>,
}

/// Reads the first `cache_config_info` of a page; nothing where there is none.
pub fn cache_config(page: &[u8]) -> CacheConfig {
    let mut lines = page.split(|byte| *byte == b'\n');
    let labels = lines.find_map(|line| line.strip_prefix(b"vllm:cache_config_info"));
    let Some((labels, _)) = labels.and_then(split_labels) else { return CacheConfig::default() };
    CacheConfig {
        prefix_caching: match labels.get(b"enable_prefix_caching") {
            Some(b"True") => Some(true),
            Some(b"False") => Some(false),
            _ => None,
        },
        hash_algorithm: labels.get(b"prefix_caching_hash_algo").map(unescape),
    }
}

/// A sum over series, and their number.
#[derive(Clone, Copy, Default)]
struct Sum {
    total: f64,
    series: u32,
}

impl Sum {
    fn add(&mut self, value: f64) {
        self.total += value;
        self.series += 1;
    }

    fn count(self) -> Option<u32> {
        (self.series > 0).then_some(self.total as u32)
    }

    fn mean(self) -> f64 {
        if self.series == 0 { 0.0 } else { self.total / f64::from(self.series) }
    }
}

#[derive(Default)]
struct Totals {
    engine: Option<Engine>,
    waiting: Sum,
    running: Sum,
    kv_usage: Sum,
    block_size: Option<u32>,
    blocks: Sum,
    /// From labels; counts where no family has the number itself.
    blocks_in_labels: Sum,
    prefix_queries: Sum,
    prefix_hits: Sum,
    /// The newest series of adapters: old label sets stay on the page for ever, and the value is
    /// the time at which a set was current.
    lora: Option<(f64, LoraMetrics)>,
}

impl Totals {
    /// Lines that cannot be read are no samples.
    fn read_line(&mut self, line: &[u8]) {
        let name_len = line.iter().position(|byte| matches!(byte, b'{' | b' ' | b'\t'));
        let Some((name, rest)) = name_len.and_then(|len| line.split_at_checked(len)) else {
            return;
        };
        let Some((_, engine, meaning)) = FAMILIES.iter().find(|family| family.0 == name) else {
            return;
        };
        let Some((labels, value)) = split_labels(rest) else { return };
        let Some(value) = number(value) else { return };
        match self.engine {
            Some(Engine::TritonTrtllm) if *engine == Engine::Triton => return,
            Some(Engine::Triton) if *engine == Engine::TritonTrtllm => *self = Totals::default(),
            Some(other) if other != *engine => return,
            _ => {}
        }
        self.engine = Some(*engine);
        self.take(*meaning, labels, value);
    }

    fn take(&mut self, meaning: Meaning, labels: Labels<'_>, value: f64) {
        let is_amount = value.is_finite() && value >= 0.0;
        match meaning {
            _ if !is_amount => {}
            Meaning::Waiting => self.waiting.add(value),
            Meaning::Running => self.running.add(value),
            Meaning::KvUsage => self.kv_usage.add(value),
            Meaning::BlockSize => self.block_size = Some(value as u32),
            Meaning::Blocks => self.blocks.add(value),
            Meaning::PrefixQueries => self.prefix_queries.add(value),
            Meaning::PrefixHits => self.prefix_hits.add(value),
            Meaning::Lora => self.take_lora(labels, value),
            Meaning::CacheConfig => {
                for (name, text) in labels {
                    match (name, count_of(text)) {
                        (b"block_size" | b"page_size", Some(count)) => {
                            self.block_size = Some(count)
                        }
                        (b"num_gpu_blocks" | b"num_pages", Some(count)) => {
                            self.blocks_in_labels.add(f64::from(count));
                        }
                        _ => {}
                    }
                }
            }
            Meaning::TritonRequests => match labels.get(b"request_type") {
                Some(b"waiting") => self.waiting.add(value),
                Some(b"scheduled") => self.running.add(value),
                _ => {}
            },
            Meaning::TritonBlocks => match labels.get(b"kv_cache_block_type") {
                Some(b"fraction") => self.kv_usage.add(value),
                Some(b"tokens_per") => self.block_size = Some(value as u32),
                Some(b"max") => self.blocks.add(value),
                _ => {}
            },
        }
    }

    fn take_lora(&mut self, labels: Labels<'_>, value: f64) {
        if self.lora.as_ref().is_some_and(|(newest, _)| *newest > value) {
            return;
        }
        let mut lora = LoraMetrics::default();
        for (name, text) in labels {
            match name {
                b"max_lora" => lora.max = count_of(text).unwrap_or(0),
                b"running_lora_adapters" => lora.running = adapters(text),
                b"waiting_lora_adapters" => lora.waiting = adapters(text),
                _ => {}
            }
        }
        self.lora = Some((value, lora));
    }

    fn into_scrape(self) -> Result<Scrape, MetricsError> {
        let engine = self.engine.ok_or(MetricsError::NoEngine)?;
        let (waiting, running) = (self.waiting.count(), self.running.count());
        if waiting.is_none() && running.is_none() {
            return Err(MetricsError::NoLoad(engine));
        }
        let tokens = |sum: Sum| (sum.series > 0).then_some(sum.total as u64);
        let metrics = EngineMetrics {
            waiting: waiting.unwrap_or(0),
            running: running.unwrap_or(0),
            kv_usage: self.kv_usage.mean().clamp(0.0, 1.0),
            block_size: self.block_size,
            blocks: self.blocks.count().or(self.blocks_in_labels.count()),
            lora: self.lora.map(|(_, lora)| lora),
            prefix_queries_tokens: tokens(self.prefix_queries),
            prefix_hits_tokens: tokens(self.prefix_hits),
        };
        Ok(Scrape { engine, metrics })
    }
}

/// The value of a sample; a time stamp or an exemplar may follow it.
fn number(rest: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(rest).ok()?;
    text.split_ascii_whitespace().next()?.parse().ok()
}

fn count_of(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The names of a comma-separated label, escapes resolved.
fn adapters(text: &[u8]) -> Vec<String> {
    let names = text.split(|byte| *byte == b',').map(unescape);
    let names = names.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
    names.take(ADAPTERS_MAX).collect()
}

fn unescape(text: &[u8]) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(escaped) => *escaped,
                None => break,
            },
            byte => *byte,
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Splits what follows a name into the labels, braces left out, and the rest.
fn split_labels(rest: &[u8]) -> Option<(Labels<'_>, &[u8])> {
    let Some(inner) = rest.strip_prefix(b"{") else { return Some((Labels(&[]), rest)) };
    let mut in_quotes = false;
    let mut escaped = false;
    for (at, byte) in inner.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_quotes => escaped = true,
            b'"' => in_quotes = !in_quotes,
            b'}' if !in_quotes => return Some((Labels(&inner[..at]), &inner[at + 1..])),
            _ => {}
        }
    }
    None
}

/// The pairs of a label set: name and value, the value still escaped.
#[derive(Clone, Copy)]
struct Labels<'a>(&'a [u8]);

impl<'a> Labels<'a> {
    fn get(self, wanted: &[u8]) -> Option<&'a [u8]> {
        { self }.find(|(name, _)| *name == wanted).map(|(_, value)| value)
    }
}

impl<'a> Iterator for Labels<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let equals = memchr(b'=', self.0)?;
        let name = self.0[..equals].trim_ascii();
        let name = name.strip_prefix(b",").unwrap_or(name).trim_ascii();
        let value = self.0[equals + 1..].trim_ascii_start().strip_prefix(b"\"")?;
        let mut escaped = false;
        let end = value.iter().position(|byte| {
            let is_end = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            is_end
        })?;
        self.0 = &value[end + 1..];
        Some((name, &value[..end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(name: &str) -> Scrape {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/metrics/");
        parse(&std::fs::read(format!("{path}{name}")).unwrap()).unwrap()
    }

    fn metrics(page: &str) -> EngineMetrics {
        parse(page.as_bytes()).unwrap().metrics
    }

    #[test]
    fn recorded_pages_of_vllm() {
        let scrape = recorded("vllm-lora.prom");
        assert_eq!(scrape.engine, Engine::Vllm);
        let expected = EngineMetrics {
            block_size: Some(32),
            blocks: Some(64),
            // The series of lora-a and of no adapter are older.
            lora: Some(LoraMetrics { running: vec![], waiting: vec![], max: 2 }),
            prefix_queries_tokens: Some(13_049),
            prefix_hits_tokens: Some(7_808),
            ..EngineMetrics::default()
        };
        assert_eq!(scrape.metrics, expected);
        let chat = recorded("vllm-chat.prom").metrics;
        assert_eq!((chat.blocks, chat.block_size, chat.lora), (Some(64), Some(32), None));
        let hybrid = recorded("vllm-hybrid.prom").metrics;
        assert_eq!((hybrid.blocks, hybrid.block_size), (Some(160), Some(32)));
    }

    #[test]
    fn the_newest_adapters_count() {
        let series = |running: &str, waiting: &str, value: &str| {
            format!(
                "vllm:lora_requests_info{{max_lora=\"4\",running_lora_adapters=\"{running}\",\
                 waiting_lora_adapters=\"{waiting}\"}} {value}\n"
            )
        };
        let page = [
            "vllm:num_requests_running 1\n".to_owned(),
            series("old", "", "1.7953263526e+09"),
            series("a, b,\\\"c\\\\,", "d", "1.7953263530e+09"),
            series("older", "", "1.7953263520e+09"),
        ]
        .concat();
        let lora = metrics(&page).lora.unwrap();
        assert_eq!((lora.max, lora.waiting), (4, vec!["d".to_owned()]));
        assert_eq!(lora.running, ["a", "b", "\"c\\"]);
    }

    #[test]
    fn ranks_add_up_and_usage_is_their_mean() {
        let page = "# HELP vllm:num_requests_waiting x\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"m}\\\"{\"} 3.0\r\n\
            vllm:num_requests_waiting{engine=\"1\",model_name=\"m\"} 4 1700000000000\n\
            vllm:num_requests_waiting_by_reason{engine=\"0\",reason=\"capacity\"} 99\n\
            vllm:num_requests_running{engine=\"0\"} 5\n\
            vllm:num_requests_running{engine=\"1\"} NaN\n\
            vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n\
            vllm:kv_cache_usage_perc{engine=\"1\"} 0.75\n\
            vllm:kv_cache_usage_perc{engine=\"2\"} +Inf\n\
            vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"10\"} 1.0\n\
            vllm:cache_config_info{engine=\"1\",block_size=\"16\",num_gpu_blocks=\"None\"} 1.0\n\
            vllm:cache_config_info{engine=\"2\",block_size=\"16\",num_gpu_blocks=\"10\"} 1.0";
        let read = metrics(page);
        assert_eq!((read.waiting, read.running), (7, 5));
        assert!((read.kv_usage - 0.625).abs() < 1e-12);
        assert_eq!((read.block_size, read.blocks), (Some(16), Some(20)));
    }

    #[test]
    fn the_cache_configuration_of_vllm() {
        let page = "# HELP vllm:cache_config_info x\nvllm:cache_config_info{block_size=\"32\",\
            enable_prefix_caching=\"False\",prefix_caching_hash_algo=\"sha256_cbor\"} 1.0\n";
        let expected = CacheConfig {
            prefix_caching: Some(false),
            hash_algorithm: Some("sha256_cbor".to_owned()),
        };
        assert_eq!(cache_config(page.as_bytes()), expected);
        for page in ["", "vllm:cache_config_info 1\n", "vllm:cache_config_info{a=\"b\"} 1\n"] {
            assert_eq!(cache_config(page.as_bytes()), CacheConfig::default(), "{page}");
        }
    }

    #[test]
    fn other_engines() {
        let sglang = "sglang:num_queue_reqs{model_name=\"m\",tp_rank=\"0\"} 2\n\
            sglang:num_running_reqs{model_name=\"m\"} 3\n\
            sglang:token_usage{model_name=\"m\"} 0.25\n\
            sglang:cache_config_info{page_size=\"64\",num_pages=\"100\"} 1\n\
            sglang:page_size{model_name=\"m\"} 64.0\nsglang:num_pages{model_name=\"m\"} 100.0";
        let trtllm = "trtllm_num_requests_waiting 2\ntrtllm_num_requests_running 3\n\
            trtllm_kv_cache_utilization 0.25\ntrtllm_kv_cache_tokens_per_block 64\n\
            trtllm_kv_cache_max_blocks 100";
        let triton = "nv_inference_pending_request_count{model=\"m\"} 77\n\
            nv_trt_llm_request_metrics{request_type=\"waiting\",model=\"m\"} 2\n\
            nv_trt_llm_request_metrics{model=\"m\",request_type=\"scheduled\"} 3\n\
            nv_trt_llm_request_metrics{request_type=\"context\"} 9\n\
            nv_inference_exec_count{model=\"m\"} 78\n\
            nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"} 0.25\n\
            nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 64\n\
            nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\"} 100";
        let table = [
            (sglang, Engine::Sglang),
            (trtllm, Engine::TrtllmServe),
            (triton, Engine::TritonTrtllm),
        ];
        for (page, engine) in table {
            let scrape = parse(page.as_bytes()).unwrap();
            let expected = EngineMetrics {
                waiting: 2,
                running: 3,
                kv_usage: 0.25,
                block_size: Some(64),
                blocks: Some(100),
                ..EngineMetrics::default()
            };
            assert_eq!(scrape, Scrape { engine, metrics: expected });
        }
        let plain = "nv_inference_pending_request_count 7\nnv_inference_exec_count 8\n";
        let scrape = parse(plain.as_bytes()).unwrap();
        assert_eq!((scrape.engine, scrape.metrics.waiting), (Engine::Triton, 7));
        assert_eq!(scrape.metrics.running, 8);
    }

    #[test]
    fn pages_that_say_nothing_are_errors() {
        let table = [
            ("", MetricsError::NoEngine),
            ("<html>no metrics</html>", MetricsError::NoEngine),
            ("# HELP vllm:num_requests_waiting x\nprocess_open_fds 3\n", MetricsError::NoEngine),
            ("vllm:num_requests_waiting{engine=\"0\" 3\n", MetricsError::NoEngine),
            ("vllm:num_requests_waiting three\n", MetricsError::NoEngine),
            ("vllm:kv_cache_usage_perc 0.5\n", MetricsError::NoLoad(Engine::Vllm)),
            ("vllm:num_requests_waiting -1\n", MetricsError::NoLoad(Engine::Vllm)),
        ];
        for (page, error) in table {
            assert_eq!(parse(page.as_bytes()), Err(error), "{page}");
        }
    }
}
