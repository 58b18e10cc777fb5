//! llm-d's metrics count what comes through this door, too.

use kvroute_router::UpstreamNames;

use crate::client::*;
use crate::support::metric;
use crate::world::*;

const SSE: &[(&str, &str)] = &[(":status", "200"), ("content-type", "text/event-stream")];
const HEADERS: &[(&str, &str)] =
    &[("x-llm-d-inference-objective", "urgent"), ("x-llm-d-inference-fairness-id", "tenant")];

/// A streamed answer in three pieces, an error of the engine, a request that nobody may serve, one
/// that is none, and a client that leaves, which is no error. Difference 107: the status is
/// `:status`.
#[tokio::test]
async fn what_is_counted_under_llm_ds_names() {
    let names = Some(UpstreamNames { streams: true, ..UpstreamNames::default() });
    let world = Setup { names, ..Setup::default() }.start().await;
    let body = completion("m", "x");
    let (mut call, _) = world.post(HEADERS, &body).await;
    call.request_body(true).await;
    call.send(response_headers(SSE, false));
    call.next().await;
    let usage = "data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3,\
                 \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n";
    for piece in ["data: {}\n\n", "data: {}\n\n", usage] {
        call.send(response_body(piece, false));
        call.next().await;
    }
    call.send(response_body("", true));
    call.next().await;
    call.close();
    call.ends().await;

    let (mut call, _) = world.post(HEADERS, &body).await;
    call.request_body(true).await;
    call.send(response_headers(&[(":status", "500")], true));
    call.next().await;
    call.close();
    call.ends().await;

    let (call, _) = world.post(HEADERS, &body).await;
    call.reset().await;

    let mut call = world.client.open();
    let nobody = subset(vec!["127.0.9.9".into()]);
    call.send(request_headers(&post(HEADERS), false).metadata(SUBSET, nobody));
    call.send(request_body(&body, true));
    assert_eq!(refusal(call.next().await).status, 503);
    call.ends().await;
    assert_eq!(world.refused(HEADERS, "{").await.status, 400);
    world.is_at_rest().await;

    let flow = "model_name=\"m\",target_model_name=\"m\",fairness_id=\"tenant\",priority=\"2\"";
    let unknown = "model_name=\"\",target_model_name=\"\",fairness_id=\"default-flow\",\
                   priority=\"0\",error_code=\"BadRequest\"";
    for (series, expected) in [
        (format!("request_total{{{flow}}}"), 3.0),
        (format!("request_running{{{flow}}}"), 0.0),
        (format!("request_error_total{{{flow},error_code=\"ModelServerError\"}}"), 1.0),
        (format!("request_error_total{{{flow},error_code=\"ServiceUnavailable\"}}"), 1.0),
        (format!("request_error_total{{{unknown}}}"), 1.0),
        (format!("request_size_bytes_sum{{{flow}}}"), 3.0 * body.len() as f64),
        (format!("request_duration_seconds_count{{{flow}}}"), 2.0),
        (format!("response_size_bytes_sum{{{flow}}}"), (2 * 10 + usage.len()) as f64),
        (format!("request_input_tokens_sum{{{flow}}}"), 7.0),
        (format!("request_output_tokens_sum{{{flow}}}"), 3.0),
        (format!("request_cached_tokens_sum{{{flow}}}"), 4.0),
        (format!("request_ttft_seconds_count{{{flow},streaming=\"true\"}}"), 1.0),
        (format!("request_ttft_seconds_count{{{flow},streaming=\"false\"}}"), 1.0),
        (format!("request_streaming_itl_seconds_count{{{flow}}}"), 2.0),
        (format!("request_streaming_tpot_seconds_count{{{flow}}}"), 1.0),
        ("request_processing_duration_seconds_count".to_owned(), 3.0),
        ("extproc_streams_inflight".to_owned(), 0.0),
        ("extproc_stream_duration_seconds_count".to_owned(), 5.0),
    ] {
        let found = metric(&world.router, &format!("llm_d_epp_{series}")).await;
        assert_eq!(found, expected, "{series}");
    }
}
