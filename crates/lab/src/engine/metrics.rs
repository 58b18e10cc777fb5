//! `/metrics` of an engine: the names, labels and types of vLLM 0.32.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use crate::model::{Finished, ModelConfig, Stats, Step};

const LATENCY_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_GAP_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const ANSWERS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// Which histogram; the position in [`HISTOGRAMS`].
#[derive(Clone, Copy)]
enum H {
    PromptTokens,
    OutputTokens,
    StepTokens,
    MaxOutputTokens,
    Answers,
    MaxTokens,
    FirstToken,
    TokenGap,
    PerToken,
    Total,
    Queue,
    Inference,
    Prefill,
    Decode,
    Preemptions,
    ComputedTokens,
}

/// Name, help and bounds; no bounds means 1, 2, 5, 10, ... up to the longest sequence.
const HISTOGRAMS: [(&str, &str, &[f64]); 16] = [
    ("request_prompt_tokens", "Number of prefill tokens processed.", &[]),
    ("request_generation_tokens", "Number of generation tokens processed.", &[]),
    ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", STEP_TOKENS),
    (
        "request_max_num_generation_tokens",
        "Histogram of maximum number of requested generation tokens.",
        &[],
    ),
    ("request_params_n", "Histogram of the n request parameter.", ANSWERS),
    ("request_params_max_tokens", "Histogram of the max_tokens request parameter.", &[]),
    ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", FIRST_TOKEN_S),
    ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", TOKEN_GAP_S),
    (
        "request_time_per_output_token_seconds",
        "Histogram of time_per_output_token_seconds per request.",
        TOKEN_GAP_S,
    ),
    ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", LATENCY_S),
    ("request_queue_time_seconds", "Histogram of time spent in WAITING phase.", LATENCY_S),
    ("request_inference_time_seconds", "Histogram of time spent in RUNNING phase.", LATENCY_S),
    ("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase.", LATENCY_S),
    ("request_decode_time_seconds", "Histogram of time spent in DECODE phase.", LATENCY_S),
    ("request_num_preemptions", "Histogram of preemptions of a request.", PREEMPTIONS),
    (
        "request_prefill_kv_computed_tokens",
        "Histogram of new KV tokens computed during prefill.",
        &[],
    ),
];

fn token_bounds(max_model_len: u32) -> Vec<f64> {
    let steps = (0..10).flat_map(|exponent| [1u64, 2, 5].map(|m| m * 10u64.pow(exponent)));
    steps.take_while(|&bound| bound <= u64::from(max_model_len)).map(|bound| bound as f64).collect()
}

#[derive(Clone)]
struct Histogram {
    bounds: Vec<f64>,
    counts: Vec<u64>,
    sum: f64,
    total: u64,
}

impl Histogram {
    fn observe(&mut self, value: f64) {
        if let Some(bucket) = self.bounds.iter().position(|&bound| value <= bound) {
            self.counts[bucket] += 1;
        }
        self.sum += value;
        self.total += 1;
    }
}

/// Everything an engine counts.
pub(super) struct Metrics {
    model: String,
    cache_config: String,
    max_loras: Option<u32>,
    started_unix_s: f64,
    stats: Stats,
    computed_prompt_tokens: u64,
    cached_prompt_tokens: u64,
    histograms: Vec<Histogram>,
    adapters_seen: Vec<(String, String, f64)>,
}

/// Combinations of adapters that are reported at most; vLLM keeps all.
const ADAPTER_SERIES_MAX: usize = 1000;

impl Metrics {
    pub(super) fn new(model: &str, config: &ModelConfig, started_unix_s: f64) -> Metrics {
        let tokens = token_bounds(config.max_model_len);
        let histograms = HISTOGRAMS.iter().map(|(_, _, bounds)| {
            let bounds = if bounds.is_empty() { tokens.clone() } else { bounds.to_vec() };
            Histogram { counts: vec![0; bounds.len()], bounds, sum: 0.0, total: 0 }
        });
        Metrics {
            model: escape(model),
            cache_config: cache_config(config),
            max_loras: (!config.adapters.is_empty()).then_some(config.max_loras),
            started_unix_s,
            stats: Stats::default(),
            computed_prompt_tokens: 0,
            cached_prompt_tokens: 0,
            histograms: histograms.collect(),
            adapters_seen: Vec::new(),
        }
    }

    /// The statistics as of the last step.
    pub(super) fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Takes in an engine that has nothing to do.
    pub(super) fn idle(&mut self, stats: &Stats, unix_s: f64) {
        self.stats.clone_from(stats);
        self.see_adapters(unix_s);
    }

    /// Takes in a step when it ends.
    pub(super) fn step(&mut self, step: &Step, unix_s: f64) {
        self.stats.clone_from(&step.stats);
        if step.tokens > 0 {
            self.observe(H::StepTokens, f64::from(step.tokens));
        }
        for emitted in &step.emitted {
            let which = if emitted.index == 0 { H::FirstToken } else { H::TokenGap };
            self.observe(which, emitted.gap.as_secs_f64());
        }
        step.finished.iter().for_each(|finished| self.finished(finished));
        self.see_adapters(unix_s);
    }

    fn see_adapters(&mut self, unix_s: f64) {
        if self.max_loras.is_none() {
            return;
        }
        let running = self.stats.running_adapters.join(",");
        let waiting = self.stats.waiting_adapters.join(",");
        let full = self.adapters_seen.len() >= ADAPTER_SERIES_MAX;
        let known = self.adapters_seen.iter_mut().find(|(r, w, _)| *r == running && *w == waiting);
        match known {
            Some((_, _, seen)) => *seen = unix_s,
            None if full => {}
            None => self.adapters_seen.push((running, waiting, unix_s)),
        }
    }

    fn finished(&mut self, finished: &Finished) {
        let computed = finished.prompt_tokens - finished.cached_tokens;
        self.computed_prompt_tokens += u64::from(computed);
        self.cached_prompt_tokens += u64::from(finished.cached_tokens);
        let decode = finished.total - finished.first_token;
        let gaps = f64::from(finished.output_tokens.saturating_sub(1).max(1));
        let seconds = |duration: Duration| duration.as_secs_f64();
        for (which, value) in [
            (H::PromptTokens, f64::from(finished.prompt_tokens)),
            (H::OutputTokens, f64::from(finished.output_tokens)),
            (H::MaxTokens, f64::from(finished.max_tokens)),
            (H::PerToken, seconds(decode) / gaps),
            (H::Total, seconds(finished.total)),
            (H::Queue, seconds(finished.queue)),
            (H::Inference, seconds(finished.total - finished.queue)),
            (H::Prefill, seconds(finished.first_token - finished.queue)),
            (H::Decode, seconds(decode)),
            (H::Preemptions, f64::from(finished.preemptions)),
            (H::ComputedTokens, f64::from(computed)),
        ] {
            self.observe(which, value);
        }
    }

    /// Takes in an answered request of `answers` sequences per prompt; `output_tokens` is that of
    /// its longest sequence.
    pub(super) fn answered(&mut self, answers: u32, output_tokens: u32) {
        self.observe(H::Answers, f64::from(answers));
        self.observe(H::MaxOutputTokens, f64::from(output_tokens));
    }

    fn observe(&mut self, which: H, value: f64) {
        self.histograms[which as usize].observe(value);
    }

    /// The exposition text.
    pub(super) fn render(&self) -> String {
        let mut page = Page { out: String::with_capacity(32 * 1024), model: &self.model };
        page.start("process_start_time_seconds", "gauge", "Start time of the process.");
        let _ = writeln!(page.out, "process_start_time_seconds {:?}", self.started_unix_s);
        self.render_gauges(&mut page);
        self.render_counters(&mut page);
        self.render_sources(&mut page);
        for ((name, help, _), histogram) in HISTOGRAMS.iter().zip(&self.histograms) {
            page.histogram(name, help, histogram);
        }
        page.start("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig");
        let _ = writeln!(page.out, "vllm:cache_config_info{{{}}} 1.0", self.cache_config);
        self.render_tools(&mut page);
        self.render_adapters(&mut page);
        page.out
    }

    fn render_gauges(&self, page: &mut Page) {
        let stats = &self.stats;
        page.start(
            "vllm:num_requests_running",
            "gauge",
            "Number of requests in model execution batches.",
        );
        page.line("num_requests_running", "", f64::from(stats.running));
        page.start(
            "vllm:num_requests_waiting",
            "gauge",
            "Number of requests waiting to be processed.",
        );
        page.line("num_requests_waiting", "", f64::from(stats.waiting));
        page.start(
            "vllm:num_requests_waiting_by_reason",
            "gauge",
            "Number of waiting requests by reason.",
        );
        let capacity = stats.waiting.saturating_sub(stats.deferred);
        for (reason, count) in [("capacity", capacity), ("deferred", stats.deferred)] {
            let label = format!("reason=\"{reason}\"");
            page.line("num_requests_waiting_by_reason", &label, f64::from(count));
        }
        page.start("vllm:engine_sleep_state", "gauge", "Engine sleep state.");
        for (state, on) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
            page.line("engine_sleep_state", &format!("sleep_state=\"{state}\""), on);
        }
        page.start(
            "vllm:kv_cache_usage_perc",
            "gauge",
            "KV-cache usage. 1 means 100 percent usage.",
        );
        page.line("kv_cache_usage_perc", "", stats.kv_usage);
    }

    fn render_counters(&self, page: &mut Page) {
        let stats = &self.stats;
        for (name, help, value) in [
            ("estimated_flops_per_gpu", "Estimated floating point operations.", 0),
            ("estimated_read_bytes_per_gpu", "Estimated bytes read.", 0),
            ("estimated_write_bytes_per_gpu", "Estimated bytes written.", 0),
            ("prefix_cache_queries", "Queried tokens.", stats.prefix_queries_tokens),
            ("prefix_cache_hits", "Cached tokens.", stats.prefix_hits_tokens),
            ("external_prefix_cache_queries", "Queried tokens of a connector.", 0),
            ("external_prefix_cache_hits", "Cached tokens of a connector.", 0),
            ("mm_cache_queries", "Multi-modal cache queries.", 0),
            ("mm_cache_hits", "Multi-modal cache hits.", 0),
            ("num_preemptions", "Cumulative number of preemption.", stats.preemptions),
            ("prompt_tokens", "Number of prefill tokens processed.", stats.prompt_tokens),
            ("prompt_tokens_cached", "Number of cached prompt tokens.", self.cached_prompt_tokens),
            ("generation_tokens", "Number of generation tokens.", stats.generation_tokens),
        ] {
            page.start_counter(name, help);
            page.line(&format!("{name}_total"), "", value as f64);
        }
        page.start_counter("request_success", "Count of successfully processed requests.");
        for (reason, count) in [
            ("stop", stats.finished_stop),
            ("length", stats.finished_length),
            ("abort", stats.aborted),
            ("error", 0),
            ("repetition", 0),
        ] {
            let label = format!("finished_reason=\"{reason}\"");
            page.line("request_success_total", &label, count as f64);
        }
    }

    fn render_sources(&self, page: &mut Page) {
        page.start_counter("prompt_tokens_by_source", "Number of prompt tokens by source.");
        for (source, tokens) in [
            ("local_compute", self.computed_prompt_tokens),
            ("local_cache_hit", self.cached_prompt_tokens),
            ("external_kv_transfer", 0),
        ] {
            let label = format!("source=\"{source}\"");
            page.line("prompt_tokens_by_source_total", &label, tokens as f64);
        }
        page.start_counter("prompt_tokens_cached_by_source", "Prefix-cache hit tokens by tier.");
        for source in ["device", "host", "p2p", "disk", "external_unspecified"] {
            let tokens = if source == "device" { self.cached_prompt_tokens } else { 0 };
            let label = format!("source=\"{source}\"");
            page.line("prompt_tokens_cached_by_source_total", &label, tokens as f64);
        }
        page.start_counter("admission_rejections", "Number of admission attempts rejected.");
        for reason in ["max_num_queued_reqs", "max_num_queued_tokens"] {
            let labels = format!("model_name=\"{}\",reason=\"{reason}\"", self.model);
            page.bare("admission_rejections_total", &labels, 0.0);
        }
    }

    fn render_tools(&self, page: &mut Page) {
        page.start_counter("tool_call_parser_invocations", "Tool call parser invocations.");
        for mode in ["streaming", "non_streaming"] {
            for outcome in ["tool_call", "no_tool_call"] {
                for api in ["chat_completions", "responses", "other"] {
                    let labels = format!(
                        "mode=\"{mode}\",model_name=\"{}\",outcome=\"{outcome}\",\
                         request_type=\"{api}\"",
                        self.model
                    );
                    page.bare("tool_call_parser_invocations_total", &labels, 0.0);
                }
            }
        }
    }

    fn render_adapters(&self, page: &mut Page) {
        let Some(max_loras) = self.max_loras else { return };
        page.start("vllm:lora_requests_info", "gauge", "Running stats on lora requests.");
        for (running, waiting, seen) in &self.adapters_seen {
            let labels = format!(
                "max_lora=\"{max_loras}\",running_lora_adapters=\"{}\",\
                 waiting_lora_adapters=\"{}\"",
                escape(running),
                escape(waiting)
            );
            page.bare("lora_requests_info", &labels, *seen);
        }
    }
}

/// A growing exposition text.
struct Page<'a> {
    out: String,
    model: &'a str,
}

impl Page<'_> {
    fn start(&mut self, name: impl Display, kind: &str, help: &str) {
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn start_counter(&mut self, name: &str, help: &str) {
        self.start(format_args!("vllm:{name}_total"), "counter", help);
    }

    /// A sample with the labels of an engine; `label` sorts between them.
    fn line(&mut self, name: &str, label: &str, value: f64) {
        let model = self.model;
        let _ = match label {
            "" => {
                writeln!(self.out, "vllm:{name}{{engine=\"0\",model_name=\"{model}\"}} {value:?}")
            }
            _ if label < "model_name" => writeln!(
                self.out,
                "vllm:{name}{{engine=\"0\",{label},model_name=\"{model}\"}} {value:?}"
            ),
            _ => writeln!(
                self.out,
                "vllm:{name}{{engine=\"0\",model_name=\"{model}\",{label}}} {value:?}"
            ),
        };
    }

    fn bare(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.out, "vllm:{name}{{{labels}}} {value:?}");
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.start(format_args!("vllm:{name}"), "histogram", help);
        let labels = format!("engine=\"0\",model_name=\"{}\"", self.model);
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            below += count;
            let _ = writeln!(
                self.out,
                "vllm:{name}_bucket{{engine=\"0\",le=\"{bound:?}\",model_name=\"{}\"}} {below}.0",
                self.model
            );
        }
        let total = histogram.total;
        let _ = writeln!(
            self.out,
            "vllm:{name}_bucket{{engine=\"0\",le=\"+Inf\",model_name=\"{}\"}} {total}.0",
            self.model
        );
        self.bare(&format!("{name}_count"), &labels, total as f64);
        self.bare(&format!("{name}_sum"), &labels, histogram.sum);
    }
}

/// A label value in the exposition format.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The labels of `cache_config_info`: what a user set, and vLLM's defaults for the rest.
fn cache_config(config: &ModelConfig) -> String {
    let size = config.block_size;
    let blocks = config.blocks;
    let tokens = u64::from(size) * u64::from(blocks);
    let concurrency = tokens as f64 / f64::from(config.max_model_len);
    let hash = config.hash.as_str();
    let labels = [
        ("_block_size_resolved", "True".to_owned()),
        ("block_size", size.to_string()),
        ("cache_dtype", "auto".to_owned()),
        ("cache_hit_alignment_tokens", "None".to_owned()),
        ("effective_attention_block_size", size.to_string()),
        ("enable_mamba_shared_prefix_checkpoint", "False".to_owned()),
        ("enable_prefix_caching", "True".to_owned()),
        ("engine", "0".to_owned()),
        ("gpu_memory_utilization", "0.92".to_owned()),
        ("hash_block_size", "None".to_owned()),
        ("is_attention_free", "False".to_owned()),
        ("kv_cache_dtype_skip_layers", "[]".to_owned()),
        ("kv_cache_layout", "None".to_owned()),
        ("kv_cache_max_concurrency", format!("{concurrency:?}")),
        ("kv_cache_memory_bytes", "None".to_owned()),
        ("kv_cache_size_tokens", tokens.to_string()),
        ("kv_offloading_backend", "native".to_owned()),
        ("kv_offloading_size", "None".to_owned()),
        ("kv_sharing_fast_prefill", "False".to_owned()),
        ("mamba_block_size", "None".to_owned()),
        ("mamba_cache_dtype", "auto".to_owned()),
        ("mamba_cache_mode", "none".to_owned()),
        ("mamba_page_size_padded", "None".to_owned()),
        ("mamba_ssm_cache_dtype", "float32".to_owned()),
        ("num_cpu_blocks", "None".to_owned()),
        ("num_gpu_blocks", blocks.to_string()),
        ("num_gpu_blocks_override", blocks.to_string()),
        ("prefix_cache_retention_interval", "0".to_owned()),
        ("prefix_caching_hash_algo", hash.to_owned()),
        ("prefix_match_unit", "None".to_owned()),
        ("replayssm_buffer_len", "16".to_owned()),
        ("skip_page_size_padded", "None".to_owned()),
        ("sliding_window", "None".to_owned()),
        ("swa_bounded_replay", "True".to_owned()),
        ("use_kda_recoverssm", "False".to_owned()),
        ("use_replayssm", "False".to_owned()),
        ("user_specified_block_size", "True".to_owned()),
    ];
    labels.map(|(name, value)| format!("{name}=\"{value}\"")).join(",")
}
