//! Do dashboards made for llm-d find their numbers? Requests through the embedded proxy, and what
//! `/metrics` says about them.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use kvroute_router::{RouterConfig, RouterHandle, UpstreamNames};
use support::{
    COMPLETION, METRICS, Mock, Script, admin, config, metric, post, post_with, ready, send,
    settings, works,
};

const FLOW: &str = "model_name=\"m\",target_model_name=\"m\",fairness_id=\"tenant\",priority=\"0\"";

async fn named(mock: &Mock) -> RouterHandle {
    let names = UpstreamNames { pool: "pool-a".to_owned(), ..UpstreamNames::default() };
    let config = config(&[mock.addr], settings());
    let config = RouterConfig { upstream_metric_names: Some(names), ..config };
    let router = kvroute_router::start(config).await.unwrap();
    ready(&router, 1).await;
    router
}

fn sse() -> Script {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
                connection: close\r\n\r\n";
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":3,\
                 \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\ndata: [DONE]\n\n";
    let token = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
    Script::Raw([head, token, token, usage].map(|piece| piece.as_bytes().to_vec()).into())
}

async fn counted(router: &RouterHandle, series: &str) {
    let until = tokio::time::Instant::now() + support::LONG;
    while metric(router, series).await == 0.0 {
        assert!(tokio::time::Instant::now() < until, "never: {series}");
    }
}

#[tokio::test]
async fn three_requests_and_a_refusal() {
    let mock = Mock::start().await;
    let router = named(&mock).await;
    let request =
        post_with("/v1/completions", "x-llm-d-inference-fairness-id: tenant\r\n", COMPLETION);
    let mut answered = 0;
    for (script, status) in [(Script::Answer(200, support::OK_BODY.to_owned()), 200), (sse(), 200)]
    {
        mock.script(script);
        let got = send(router.http_addr(), &request).await;
        assert_eq!(got.status, status);
        answered += got.body.len();
    }
    mock.script(Script::Answer(500, "{}".to_owned()));
    let got = send(router.http_addr(), &request).await;
    assert_eq!(got.status, 500);
    answered += got.body.len();
    assert_eq!(send(router.http_addr(), post("/v1/completions", "{")).await.status, 400);

    let refused = "model_name=\"\",target_model_name=\"\",fairness_id=\"default-flow\",\
                   priority=\"0\",error_code=\"BadRequest\"";
    let pool = "name=\"pool-a\"";
    let (address, port) = (mock.addr, mock.addr.port());
    let attempt = format!(
        "status=\"success\",target_model_name=\"m\",endpoint_name=\"{address}\",\
         namespace=\"default\",port=\"{port}\""
    );
    let table = [
        (format!("request_total{{{FLOW}}}"), 3.0),
        (format!("request_running{{{FLOW}}}"), 0.0),
        (format!("request_error_total{{{FLOW},error_code=\"ModelServerError\"}}"), 1.0),
        (format!("request_error_total{{{refused}}}"), 1.0),
        (format!("request_duration_seconds_count{{{FLOW}}}"), 3.0),
        (format!("request_size_bytes_sum{{{FLOW}}}"), 3.0 * COMPLETION.len() as f64),
        (format!("response_size_bytes_sum{{{FLOW}}}"), answered as f64),
        (format!("request_input_tokens_sum{{{FLOW}}}"), 18.0),
        (format!("request_output_tokens_sum{{{FLOW}}}"), 5.0),
        (format!("request_cached_tokens_sum{{{FLOW}}}"), 8.0),
        (format!("request_ntpot_seconds_count{{{FLOW}}}"), 2.0),
        (format!("request_ttft_seconds_count{{{FLOW},streaming=\"true\"}}"), 1.0),
        (format!("request_ttft_seconds_count{{{FLOW},streaming=\"false\"}}"), 2.0),
        (format!("request_streaming_tpot_seconds_count{{{FLOW}}}"), 1.0),
        (format!("scheduler_attempts_total{{{attempt}}}"), 3.0),
        ("scheduler_e2e_duration_seconds_count".to_owned(), 3.0),
        ("request_processing_duration_seconds_count".to_owned(), 3.0),
        ("response_processing_duration_seconds_count".to_owned(), 3.0),
        (format!("ready_endpoints{{{pool}}}"), 1.0),
    ];
    for (series, expected) in table {
        let found = metric(&router, &format!("llm_d_epp_{series}")).await;
        assert_eq!(found, expected, "{series}");
    }
    let open = "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: application/openmetrics-text\r\n\r\n";
    let page = send(router.admin_addr(), open).await.body;
    assert!(page.ends_with("# EOF\n") && page.matches("# EOF").count() == 1, "{page}");
    let pieces = format!("llm_d_epp_request_streaming_itl_seconds_count{{{FLOW}}}");
    // How many pieces a stream comes in is the network's choice.
    assert!(metric(&router, &pieces).await <= 2.0, "{page}");
}

#[tokio::test]
async fn the_fleet_is_told_as_it_is() {
    let mock = Mock::start().await;
    let busy =
        METRICS.replace("requests_waiting{engine=\"0\"} 0", "requests_waiting{engine=\"0\"} 4");
    *mock.state.metrics.lock() =
        Some(busy.replace("perc{engine=\"0\"} 0.1", "perc{engine=\"0\"} 0.5"));
    let router = named(&mock).await;
    let (endpoint, pool) = (mock.addr.to_string(), "name=\"pool-a\"");
    let member = format!("endpoint_name=\"{endpoint}\",namespace=\"default\"");
    for (series, expected) in [
        (format!("average_queue_size{{{pool}}}"), 4.0),
        (format!("std_dev_queue_size{{{pool}}}"), 0.0),
        (format!("average_kv_cache_utilization{{{pool}}}"), 0.5),
        (format!("per_endpoint_queue_size{{{pool},model_server_endpoint=\"{endpoint}\"}}"), 4.0),
        (format!("inflight_requests{{{member},producer_name=\"inflight-load-producer\"}}"), 0.0),
    ] {
        let page = admin(&router, "/metrics").await.body;
        let line = format!("llm_d_epp_{series} ");
        assert!(page.contains(&line), "{line} is not in {page}");
        assert_eq!(metric(&router, line.trim_end()).await, expected, "{series}");
    }
    *mock.state.metrics.lock() = None;
    let poll = "llm_d_epp_datalayer_poll_errors_total{source_type=\"metrics-data-source\"}";
    counted(&router, poll).await;
    *mock.state.metrics.lock() = Some("nothing 1\n".to_owned());
    let extract = "llm_d_epp_datalayer_extract_errors_total{source_type=\"metrics-data-source\",\
                   extractor_type=\"core-metrics-extractor\"}";
    counted(&router, extract).await;
}

/// Row 110 of docs/differences.md.
#[tokio::test]
async fn nothing_is_told_unasked() {
    let mock = Mock::start().await;
    let router = support::router(&[mock.addr], settings()).await;
    works(&router).await;
    let page = admin(&router, "/metrics").await.body;
    assert!(!page.contains("llm_d_epp") && page.contains("kvroute_requests_total"), "{page}");
}
