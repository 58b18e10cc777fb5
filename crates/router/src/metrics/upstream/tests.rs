use std::time::{Duration, Instant};

use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::decision::{Mode, ProfileRecord, Reason, ScoreMatrix};
use kvroute_core::plan::Experimental;
use kvroute_wire::grpc::Code;
use kvroute_wire::usage::Usage;
use prometheus_client::encoding::text;

use super::flow::{FLOWS_MAX, LABEL_VALUES_MAX};
use super::*;
use crate::metrics::LABEL_BYTES_MAX;
use crate::metrics::tests::exposition::{families, registered};

/// Prefill and decode apart, prefixes by events.
const DISAGG: &str = r#"{
    "plugins": [
        {"type": "precise-prefix-cache-producer"},
        {"type": "prefill-filter"}, {"type": "decode-filter"},
        {"type": "always-disagg-pd-decider"},
        {"type": "disagg-profile-handler", "parameters": {
            "profiles": {"prefill": "prefill", "decode": "decode"},
            "deciders": {"prefill": "always-disagg-pd-decider"}}}
    ],
    "schedulingProfiles": [
        {"name": "prefill", "plugins": [{"pluginRef": "prefill-filter"}]},
        {"name": "decode", "plugins": [{"pluginRef": "decode-filter"}]}
    ]}"#;

fn plan(config: &str) -> Plan {
    let config: EndpointPickerConfig = serde_json::from_str(config).unwrap();
    Plan::build(&config, Experimental::Allowed).unwrap()
}

fn metrics(config: &str) -> Arc<UpstreamMetrics> {
    let names = UpstreamNames { pool: "pool".to_owned(), streams: true };
    Arc::new(UpstreamMetrics::new(&names, &plan(config)))
}

fn page(metrics: &UpstreamMetrics) -> String {
    let mut page = String::new();
    text::encode_registry(&mut page, metrics.registry()).unwrap();
    page
}

fn about<'a>(model: &'a str, fairness_id: &'a str) -> Decided<'a> {
    Decided {
        model,
        target: model,
        rule: "",
        fairness_id,
        priority: 2,
        body_bytes: 100,
        block_tokens: Some(16),
        took: Duration::from_micros(150),
    }
}

fn record(endpoint: &str, prefill: Option<&str>) -> DecisionRecord {
    let other = |name: &str| ProfileRecord {
        profile: "prefill".into(),
        step: "prefill",
        endpoint: Some(name.into()),
        failed: None,
        tied: 1,
        margin: None,
        filters: Vec::new(),
        removed: Vec::new(),
        scores: ScoreMatrix::default(),
    };
    DecisionRecord {
        request_id: "r".to_owned(),
        at_s: 0.0,
        model: "m".to_owned(),
        profile: "decode".into(),
        endpoint: endpoint.into(),
        mode: Mode::Precise,
        reason: Reason::EventsLive,
        candidates_degraded: 0,
        prompt_tokens: 100,
        available_tokens: 64,
        chosen_tokens: 48,
        seed: 0,
        tied: 1,
        margin: None,
        filters: Vec::new(),
        candidates: Vec::new(),
        scores: ScoreMatrix::default(),
        others: prefill.map(other).into_iter().collect(),
        request_headers: Vec::new(),
    }
}

/// Everything that can happen, so that every family has a series.
fn happen(metrics: &Arc<UpstreamMetrics>) {
    let record = record("ns/pod", Some("ns/prefiller"));
    let usage = Usage { prompt_tokens: 100, completion_tokens: 5, cached_tokens: Some(48) };
    for (streaming, status) in [(true, 200), (false, 500)] {
        let mut meter = metrics.decided(&about("m", "tenant"), &record, || Some(8000));
        meter.arrived(Instant::now());
        meter.head(streaming);
        meter.piece(Instant::now(), 10);
        meter.piece(Instant::now(), 30);
        meter.end(status, Some(usage));
    }
    metrics.rejected(&about("m", "tenant"), 503);
    metrics.rejected(&Decided { model: "old", rule: "r", ..about("new", "tenant") }, 503);
    metrics.refused(413);
    let streams = metrics.streams().unwrap();
    // One is still open when the page is read, the other has ended.
    std::mem::forget(streams.begin());
    drop(streams.begin());
    streams.end(Code::Cancelled, Duration::from_secs(2));
    metrics.count_poll_error(&"metrics-data-source".into());
    metrics.count_extract_error(&"metrics-data-source".into(), &"core-metrics-extractor".into());
}

/// A series in every family.
pub(in crate::metrics) fn filled() -> Arc<UpstreamMetrics> {
    let metrics = metrics(DISAGG);
    happen(&metrics);
    metrics.pool().fill("pod");
    metrics
}

/// Name, type, labels of all that llm-d publishes and that has a meaning here, from its
/// documentation; `flow` stands for the four labels of a request.
const FAMILIES: &str = "\
request_total counter flow
request_error_total counter flow error_code
request_duration_seconds histogram flow
request_size_bytes histogram flow
response_size_bytes histogram flow
request_input_tokens histogram flow
request_output_tokens histogram flow
request_cached_tokens histogram flow
request_running gauge flow
request_ntpot_seconds histogram flow
request_ttft_seconds histogram flow streaming
request_streaming_tpot_seconds histogram flow
request_streaming_itl_seconds histogram flow
average_kv_cache_utilization gauge name
average_queue_size gauge name
average_running_requests gauge name
std_dev_kv_cache_utilization gauge name
std_dev_queue_size gauge name
std_dev_running_requests gauge name
ready_endpoints gauge name
scheduler_e2e_duration_seconds histogram
scheduler_attempts_total counter status target_model_name endpoint_name namespace port
request_processing_duration_seconds histogram
response_processing_duration_seconds histogram
info gauge commit build_ref
model_rewrite_decisions_total counter model_rewrite_name model_name target_model
extproc_streams_inflight gauge
extproc_stream_duration_seconds histogram
extproc_streams_total counter code
datalayer_poll_errors_total counter source_type
datalayer_extract_errors_total counter source_type extractor_type
prefix_indexer_size gauge plugin_name plugin_type
prefix_indexer_hit_ratio histogram plugin_name plugin_type
prefix_indexer_hit_bytes histogram plugin_name plugin_type
disagg_decision_total counter plugin_name plugin_type model_name decision_type
kv_cache_index_admissions_total counter
kv_cache_index_evictions_total counter
kv_cache_index_lookup_requests_total counter
kv_cache_index_lookup_hits_total counter
kv_cache_index_max_pod_hit_count_total counter
kv_cache_events_active_subscribers gauge
kv_cache_events_subscriber_reconnections_total counter pod_identifier
kv_cache_events_messages_received_total counter pod_identifier
per_endpoint_queue_size gauge name model_server_endpoint
inflight_requests gauge endpoint_name namespace producer_name
inflight_tokens gauge endpoint_name namespace producer_name
";

#[test]
fn names_types_and_labels_are_llm_ds() {
    let metrics = filled();
    let mut found = families(&page(&metrics));
    assert_eq!(found.len(), registered(metrics.registry()));
    for line in FAMILIES.lines() {
        let line = line.replace("flow", "model_name target_model_name fairness_id priority");
        let mut words = line.split(' ');
        let name = format!("llm_d_epp_{}", words.next().unwrap());
        let family = found.remove(&name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(family.kind, words.next().unwrap(), "{name}");
        assert_eq!(family.labels, words.collect::<Vec<_>>(), "{name}");
    }
    assert!(found.is_empty(), "llm-d has none of these: {:?}", found.keys());
}

#[test]
fn buckets_are_llm_ds() {
    let metrics = metrics(DISAGG);
    happen(&metrics);
    let found = families(&page(&metrics));
    let long = "0.005 0.025 0.05 0.1 0.2 0.4 0.6 0.8 1 1.25 1.5 2 3 4 5 6 8 10 15 20 30 45 60 120";
    let longest = format!("{long} 180 240 300 360 480 600 900 1200 1800 2700 3600");
    let tokens = "1 8 16 32 64 128 256 512 1024 2048 4096 8192";
    let many = format!("{tokens} 16384 32778 65536 131072 262144 524288 1048576");
    let scheduler = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1";
    let table = [
        ("request_duration_seconds", longest.as_str()),
        ("request_ttft_seconds", long),
        (
            "request_size_bytes",
            "64 128 256 512 1024 2048 4096 8192 16384 32768 65536 131072 262144 524288 1048576 \
             2097152 4194304 8388608 16777216 33554432 67108864 134217728 268435456 536870912 \
             1073741824",
        ),
        ("response_size_bytes", &format!("{tokens} 16384 32778 65536")),
        ("request_input_tokens", &many),
        ("request_cached_tokens", &many),
        ("request_output_tokens", tokens),
        ("request_ntpot_seconds", "0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5 10"),
        (
            "request_streaming_tpot_seconds",
            "0.0005 0.00205 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.125 0.15 0.2 0.3 0.4 0.5 0.6 0.8 \
             1 2",
        ),
        (
            "request_streaming_itl_seconds",
            "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.15 0.2 0.3 0.5 0.75 1 2",
        ),
        ("scheduler_e2e_duration_seconds", scheduler),
        (
            "request_processing_duration_seconds",
            "0.0005 0.001 0.002 0.005 0.01 0.015 0.025 0.04 0.06 0.1 0.25 0.5 1 2.5 5 10",
        ),
        (
            "response_processing_duration_seconds",
            "0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5",
        ),
        (
            "extproc_stream_duration_seconds",
            "0.001 0.005 0.01 0.05 0.1 0.5 1 5 10 30 60 120 300 600",
        ),
        ("prefix_indexer_hit_ratio", "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1"),
        (
            "prefix_indexer_hit_bytes",
            "0 16 32 64 128 256 512 1024 2048 4096 8192 16384 32768 65536",
        ),
    ];
    let histograms = found.values().filter(|family| family.kind == "histogram").count();
    assert_eq!(histograms, table.len());
    for (name, buckets) in table {
        let family = &found[&format!("llm_d_epp_{name}")];
        let number = |text: &str| text.parse::<f64>().unwrap();
        let expected: Vec<f64> = buckets.split(' ').map(number).chain([f64::INFINITY]).collect();
        let found: Vec<f64> =
            family.buckets.iter().map(|b| number(b.trim_start_matches('+'))).collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn what_happened_is_counted() {
    let metrics = metrics(DISAGG);
    happen(&metrics);
    let page = page(&metrics);
    let flow = "model_name=\"m\",target_model_name=\"m\",fairness_id=\"tenant\",priority=\"2\"";
    let plugin = "plugin_name=\"precise-prefix-cache-producer\",\
                  plugin_type=\"precise-prefix-cache-producer\"";
    let handler = "plugin_name=\"disagg-profile-handler\",plugin_type=\"disagg-profile-handler\"";
    for line in [
        format!("request_total{{{flow}}} 2"),
        format!("request_running{{{flow}}} 0"),
        format!("request_error_total{{{flow},error_code=\"ModelServerError\"}} 1"),
        format!("request_error_total{{{flow},error_code=\"ServiceUnavailable\"}} 1"),
        "request_error_total{model_name=\"\",target_model_name=\"\",fairness_id=\"default-flow\",\
         priority=\"0\",error_code=\"BadRequest\"} 1"
            .to_owned(),
        format!("request_size_bytes_sum{{{flow}}} 200.0"),
        format!("response_size_bytes_sum{{{flow}}} 80.0"),
        format!("request_input_tokens_sum{{{flow}}} 200.0"),
        format!("request_output_tokens_sum{{{flow}}} 10.0"),
        format!("request_cached_tokens_sum{{{flow}}} 96.0"),
        format!("request_ntpot_seconds_count{{{flow}}} 2"),
        format!("request_ttft_seconds_count{{{flow},streaming=\"true\"}} 1"),
        format!("request_ttft_seconds_count{{{flow},streaming=\"false\"}} 1"),
        format!("request_streaming_tpot_seconds_count{{{flow}}} 1"),
        format!("request_streaming_itl_seconds_count{{{flow}}} 1"),
        "scheduler_attempts_total{status=\"success\",target_model_name=\"m\",\
         endpoint_name=\"pod\",namespace=\"ns\",port=\"8000\"} 2"
            .to_owned(),
        "scheduler_attempts_total{status=\"failure\",target_model_name=\"m\",\
         endpoint_name=\"\",namespace=\"\",port=\"\"} 1"
            .to_owned(),
        "scheduler_e2e_duration_seconds_count 4".to_owned(),
        "model_rewrite_decisions_total{model_rewrite_name=\"r\",model_name=\"old\",\
         target_model=\"new\"} 1"
            .to_owned(),
        "response_processing_duration_seconds_count 2".to_owned(),
        "kv_cache_index_lookup_requests_total 2".to_owned(),
        "extproc_streams_inflight 1".to_owned(),
        "extproc_stream_duration_seconds_sum 2.0".to_owned(),
        "extproc_streams_total{code=\"Canceled\"} 1".to_owned(),
        "kv_cache_index_lookup_hits_total 8".to_owned(),
        format!("prefix_indexer_hit_ratio_sum{{{plugin}}} 0.96"),
        format!("prefix_indexer_hit_bytes_sum{{{plugin}}} 384.0"),
        format!(
            "disagg_decision_total{{{handler},model_name=\"m\",decision_type=\"prefill-decode\"}} 2"
        ),
    ] {
        assert!(page.contains(&format!("\nllm_d_epp_{line}\n")), "{line} is not in {page}");
    }
}

#[test]
fn a_running_request_counts_until_it_is_dropped() {
    let metrics = metrics("{}");
    let line = |n: u32| format!("fairness_id=\"f\",priority=\"2\"}} {n}\n");
    let meter = metrics.decided(&about("m", "f"), &record("pod", None), || None);
    assert!(page(&metrics).contains(&line(1)));
    drop(meter);
    assert!(page(&metrics).contains(&line(0)));
}

#[test]
fn labels_of_clients_are_bounded() {
    let mut registry = Registry::default();
    let flows = Flows::new(&mut registry, ["late but configured"]);
    let named = |flow: &Flow| flow.labels().model_name.clone();
    for at in 0..LABEL_VALUES_MAX {
        let model = format!("m{at}");
        assert_eq!(named(&flows.get(&model, &model, "f", 0)), model);
    }
    let late = flows.get("late", "late", "f", 0);
    assert_eq!(
        (named(&late).as_str(), late.labels().target_model_name.as_str()),
        ("other", "other")
    );
    assert!(Arc::ptr_eq(&late, &flows.get("later", "later", "f", 0)));
    assert_eq!(named(&flows.get("m7", "m7", "f", 0)), "m7");
    assert_eq!(named(&flows.get("late but configured", "m7", "f", 0)), "late but configured");
    let long = "x".repeat(LABEL_BYTES_MAX + 1);
    let strange = flows.get("m7", "m7", &long, 0);
    assert_eq!(strange.labels().fairness_id, "other");
}

#[test]
fn combinations_of_labels_are_bounded() {
    let mut registry = Registry::default();
    let flows = Flows::new(&mut registry, []);
    let mut seen = std::collections::HashSet::new();
    for model in 0..100 {
        let model = format!("m{model}");
        for id in 0..100 {
            let flow = flows.get(&model, &model, &format!("f{id}"), 0);
            seen.insert(format!("{:?}", flow.labels()));
        }
    }
    assert!(seen.len() <= FLOWS_MAX, "{}", seen.len());
    let own = flows.get("m0", "m0", "f0", 0);
    assert_eq!(own.labels().fairness_id, "f0", "what is there stays");
    let last = flows.get("m99", "m99", "f99", 0);
    let labels = last.labels();
    assert_eq!((labels.model_name.as_str(), labels.fairness_id.as_str()), ("m99", "other"));
}

#[test]
fn what_nobody_serves_has_no_histograms_of_its_own() {
    let metrics = metrics("{}");
    let ask = |model: &str, status: u16| {
        let mut meter = metrics.decided(&about(model, "f"), &record("pod", None), || None);
        meter.head(false);
        meter.piece(Instant::now(), 10);
        meter.end(status, None);
    };
    ask("made-up", 404);
    ask("m", 200);
    ask("m", 500);
    let page = page(&metrics);
    let count = |name: &str, model: &str, id: &str| {
        let labels = format!(
            "{{model_name=\"{model}\",target_model_name=\"{model}\",fairness_id=\"{id}\",\
             priority=\"2\"}} "
        );
        let start = format!("llm_d_epp_{name}{labels}");
        let value = page.lines().find_map(|line| line.strip_prefix(start.as_str()));
        value.map_or(0, |value| value.parse::<u32>().unwrap())
    };
    for (model, id, expected) in [("made-up", "f", 0), ("other", "other", 1), ("m", "f", 2)] {
        for name in ["request_duration_seconds", "request_size_bytes", "response_size_bytes"] {
            assert_eq!(count(&format!("{name}_count"), model, id), expected, "{name} {model}");
        }
    }
    assert_eq!(count("request_total", "made-up", "f"), 1, "{page}");
}

#[test]
fn attempts_are_bounded() {
    let metrics = metrics("{}");
    for at in 0..5000 {
        metrics.decided(&about("m", "f"), &record(&format!("pod{at}"), None), || Some(1));
    }
    let page = page(&metrics);
    let series = page.matches("llm_d_epp_scheduler_attempts_total{").count();
    assert_eq!(series, 4097);
    assert!(page.contains("target_model_name=\"other\",endpoint_name=\"other\""), "{page}");
    metrics.forget_endpoint("pod7");
    metrics.decided(&about("m", "f"), &record("late", None), || Some(1));
    let page = self::page(&metrics);
    assert!(!page.contains("endpoint_name=\"pod7\""), "what left takes its series along");
    assert!(page.contains("endpoint_name=\"late\""), "and makes room");
}

#[test]
fn the_flow_is_the_one_that_headers_name() {
    let agents = r#"{"plugins": [{"type": "agent-identity"}]}"#;
    type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
    let table: [Row<'_>; 6] = [
        ("{}", &[], "default-flow"),
        ("{}", &[("x-llm-d-inference-fairness-id", "")], "default-flow"),
        ("{}", &[("x-gateway-inference-fairness-id", "old")], "old"),
        (
            "{}",
            &[("x-gateway-inference-fairness-id", "old"), ("x-llm-d-inference-fairness-id", "new")],
            "new",
        ),
        ("{}", &[("session-id", "s")], "default-flow"),
        (agents, &[("session-id", "s")], "s"),
    ];
    for (config, headers, expected) in table {
        let metrics = metrics(config);
        let header = |name: &str| headers.iter().find(|(key, _)| *key == name).map(|(_, v)| *v);
        assert_eq!(metrics.fairness_id(header), expected, "{config} {headers:?}");
    }
}

#[test]
fn reasons_are_llm_ds() {
    let table = [
        (400, "BadRequest"),
        (401, "Unauthorized"),
        (403, "Forbidden"),
        (404, "NotFound"),
        (412, "PreconditionFailed"),
        (413, "BadRequest"),
        (429, "ResourceExhausted"),
        (500, "Internal"),
        (502, "ModelServerError"),
        (503, "ServiceUnavailable"),
        (504, "ModelServerError"),
    ];
    for (status, code) in table {
        assert_eq!(error_code(status), code, "{status}");
    }
}
