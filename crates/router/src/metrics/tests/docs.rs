//! Is the table in `docs/metrics.md` what is published? `KVROUTE_BLESS=1 cargo test -p
//! kvroute-router --lib metrics::tests` writes it.

use std::fs;
use std::path::Path;

use super::super::*;
use super::exposition::{families, registered};

/// A series in every family.
pub(super) fn filled() -> Metrics {
    let metrics = Metrics::new(8);
    let endpoint = || "10.0.0.1:8000".to_owned();
    let label = EndpointLabel { endpoint: endpoint() };
    let reason = ReasonLabel { reason: "r" };
    metrics.endpoint("10.0.0.1:8000");
    metrics.set_model_mode("m", "precise", |_| false);
    metrics.count_request(&endpoint(), StatusLabel(200), "precise");
    for family in [
        &metrics.rejects,
        &metrics.fallbacks,
        &metrics.tokenize_failures,
        &metrics.retries,
        &metrics.discovery_errors,
        &metrics.bound_dropped,
        &metrics.recording.cuts,
        &metrics.tls_handshake_failures,
    ] {
        family.get_or_create_owned(&reason);
    }
    for family in [
        &metrics.tokens_available,
        &metrics.tokens_chosen,
        &metrics.tokens_delivered,
        &metrics.stream_gaps,
        &metrics.stream_replays,
        &metrics.stream_restarts,
        &metrics.drift_alarms,
        &metrics.prompts_different,
    ] {
        family.get_or_create_owned(&label);
    }
    metrics.engine_waiting.get_or_create_owned(&label);
    metrics.engine_running.get_or_create_owned(&label);
    metrics.engine_kv_usage.get_or_create_owned(&label);
    metrics.count_upstream_failure(&endpoint(), "r");
    metrics.count_ext_proc_end(Code::Ok);
    metrics.certificate_reloads.get_or_create_owned(&ResultLabel { result: "ok" });
    metrics.chats_rendered.get_or_create_owned(&WayLabel { way: "direct" });
    metrics.count_rewrite("r", "a", "b", |_| false);
    let tier = EndpointTier { endpoint: endpoint(), tier: "gpu" };
    metrics.index_blocks.get_or_create_owned(&tier);
    let state = EndpointState { endpoint: endpoint(), state: "live" };
    metrics.stream_state.get_or_create_owned(&state);
    let source = || EndpointSource { endpoint: endpoint(), source: "s".to_owned() };
    metrics.source_scrapes.get_or_create_owned(&source());
    metrics.source_failures.get_or_create_owned(&source());
    metrics
}

/// The rows of all families of a registry.
fn table(registry: &Registry) -> String {
    let mut page = String::new();
    text::encode_registry(&mut page, registry).unwrap();
    let families = families(&page);
    let names: Vec<&String> = families.keys().collect();
    let hint = "a family has no series: give it one in the test";
    assert_eq!(families.len(), registered(registry), "{hint}; these have: {names:#?}");
    let head = "| name | type | labels | meaning |\n|---|---|---|---|\n";
    families.iter().fold(head.to_owned(), |table, (name, family)| table + &family.row(name))
}

#[test]
fn the_tables_are_current() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    let found = fs::read_to_string(&file).unwrap();
    let upstream = upstream::tests::filled();
    let mut expected = found.clone();
    for (name, table) in
        [("kvroute", table(&filled().registry)), ("llm-d", table(upstream.registry()))]
    {
        let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
        let from = expected.find(&begin).expect(&begin) + begin.len();
        let to = expected.find(&end).expect(&end);
        expected.replace_range(from..to, &table);
    }
    if std::env::var_os("KVROUTE_BLESS").is_some() {
        fs::write(&file, &expected).unwrap();
    } else {
        let hint = "KVROUTE_BLESS=1 cargo test -p kvroute-router --lib metrics::tests";
        assert!(found == expected, "docs/metrics.md is old; write it with: {hint}");
    }
}

#[test]
fn what_llm_d_has_is_published_or_said_to_be_missing() {
    let text = include_str!("../../../../../docs/metrics.md");
    let (_, missing) = text.split_once("## Not published").unwrap();
    for name in MISSING.split_whitespace() {
        assert!(missing.contains(&format!("`{name}`")), "{name}");
        assert!(!text.contains(&format!("`llm_d_epp_{name}`")), "{name}");
    }
}

/// llm-d's metrics that have no meaning here.
const MISSING: &str = "
    plugin_duration_seconds plugin_data_scope_violations_total encoder_cache_queries_total
    encoder_cache_hits_total encoder_cache_hit_ratio pd_decision_total
    disaggregatedset_strict_header_no_match_total disaggregatedset_revision_gating_share
    request_predicted_ttft_seconds request_predicted_tpot_seconds
    request_ttft_prediction_duration_seconds request_tpot_prediction_duration_seconds
    request_slo_violation_total inference_request_metric
    program_aware_jains_fairness_index program_aware_avg_wait_time_milliseconds
    program_aware_attained_service_tokens kv_cache_index_lookup_latency_seconds
    kv_cache_events_dedup_removed_hashes_suppressed_total
    kv_cache_events_dedup_removed_hashes_forwarded_total kv_cache_events_stores_skipped_total
    kv_cache_events_removals_skipped_total kv_cache_events_zmq_errors_total
    kv_cache_events_pool_queue_depth kv_cache_events_pool_capacity";
