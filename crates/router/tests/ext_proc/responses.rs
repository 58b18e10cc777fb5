//! Answers on their way back: echoed as they come, their usage found, their end noticed.

use crate::client::*;
use crate::envoy::*;
use crate::support::{LONG, metric};
use crate::world::*;

const JSON: &str = "{\"id\":\"x\",\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":10,\
    \"total_tokens\":17,\"prompt_tokens_details\":{\"cached_tokens\":4}}}";
const JSON_HEADERS: &[(&str, &str)] = &[(":status", "200"), ("content-type", "application/json")];
const SSE_HEADERS: &[(&str, &str)] = &[(":status", "200"), ("content-type", "text/event-stream")];

/// Hermetic cases "response only": no request phase, as on a stream that Envoy opens for an
/// answer of its own. JSON in one piece, in two, with an empty end; what is no JSON. Difference
/// 105: llm-d gives a whole body back in one piece.
#[tokio::test]
async fn answers_without_a_request() {
    let world = usual().await;
    let (half, rest) = JSON.split_at(30);
    let table: [&[(&str, bool)]; 5] = [
        &[(JSON, true)],
        &[(half, false), (rest, true)],
        &[(half, false), (rest, false), ("", true)],
        &[("no json", true)],
        &[("", true)],
    ];
    for pieces in table {
        let mut call = world.client.open();
        call.send(response_headers(JSON_HEADERS, false));
        is_headers_answer(&call.next().await);
        for (piece, end) in pieces {
            call.send(response_body(piece, *end));
        }
        let whole: String = pieces.iter().map(|(piece, _)| *piece).collect();
        assert_eq!(call.response_body(true).await.0, whole.as_bytes());
        call.close();
        call.ends().await;
    }
    world.is_at_rest().await;
}

/// An answer's headers: what the processor sets, never the answer's own status or length.
fn is_headers_answer(answer: &ProcessingResponse) {
    assert!(matches!(answer.response, Some(Response::ResponseHeaders(_))), "{answer:?}");
    for (name, _) in set_headers(answer) {
        assert!(!name.starts_with(':') && name != "content-length", "{answer:?}");
    }
    assert_eq!(answer.mode_override, None);
}

/// Hermetic case "response only, SSE": each chunk goes on as it comes.
#[tokio::test]
async fn streams_in_step() {
    let world = usual().await;
    let mut call = world.client.open();
    call.send(response_headers(SSE_HEADERS, false));
    is_headers_answer(&call.next().await);
    let usage = "data: {\"usage\":{\"prompt_tokens\":7,\"total_tokens\":17,\
        \"completion_tokens\":10}}\n\ndata: [DONE]\n\n";
    for chunk in ["data: {}\n\n", usage] {
        call.send(response_body(chunk, false));
        assert_eq!(call.next().await, returned(chunk, false));
    }
    call.send(response_body("", true));
    assert_eq!(call.next().await, returned("", true));
    call.close();
    call.ends().await;
}

/// Usage is found wherever an answer is cut (difference 42), and the outcome stands in the
/// decision.
#[tokio::test]
async fn usage_of_whole_answers_and_of_streams() {
    let world = usual().await;
    let sse = format!("data: {{\"choices\":[]}}\n\ndata: {JSON}\n\ndata: [DONE]\n\n");
    for (name, headers, text) in [("json", JSON_HEADERS, JSON), ("sse", SSE_HEADERS, &sse)] {
        for cut in (0..text.len()).step_by(23) {
            let id = format!("{name}-{cut}");
            let mut call = routed_call(&world, &id).await;
            call.send(response_headers(headers, false));
            is_headers_answer(&call.next().await);
            call.send(response_body(&text[..cut], false));
            call.send(response_body(&text[cut..], false));
            call.send(response_body("", true));
            assert_eq!(call.response_body(true).await.0, text.as_bytes(), "{id}");
            // Envoy resets the stream once it has everything.
            call.reset().await;
            let page = world.outcome(&id).await;
            assert_eq!(page["outcome"]["status"], 200, "{page}");
            assert_eq!(page["outcome"]["prompt_tokens"], 7, "{page}");
            assert_eq!(page["outcome"]["completion_tokens"], 10, "{page}");
            assert_eq!(page["outcome"]["delivered_tokens"], 4, "{page}");
            assert!(page["outcome"]["error"].is_null(), "{page}");
        }
    }
    world.is_at_rest().await;
}

/// A stream whose request is routed and forwarded.
async fn routed_call(world: &World, id: &str) -> Call {
    let (mut call, answer) = world.post(&[("x-request-id", id)], &completion("m", id)).await;
    assert_eq!(destination(&answer), world.at(1));
    call.request_body(true).await;
    call
}

/// Difference 107.
#[tokio::test]
async fn the_status_of_an_answer_is_noticed_under_both_names() {
    let world = usual().await;
    for (name, status) in [(":status", "503"), ("status", "418"), (":status", "500")] {
        let id = format!("status-{status}");
        let mut call = routed_call(&world, &id).await;
        call.send(response_headers(&[(name, status), ("date", "of the endpoint")], false));
        is_headers_answer(&call.next().await);
        call.send(response_body("no", true));
        assert_eq!(call.response_body(true).await.0, b"no");
        call.reset().await;
        let page = world.outcome(&id).await;
        assert_eq!(page["outcome"]["status"].to_string(), status, "{page}");
    }
    let series = format!(
        "kvroute_requests_total{{endpoint=\"{}\",status=\"503\",mode=\"approximate\"}}",
        world.at(1)
    );
    assert_eq!(metric(&world.router, &series).await, 1.0);
}

/// Answers without a body, and answers that end with their headers.
#[tokio::test]
async fn answers_without_a_body() {
    let world = usual().await;
    let mut call = routed_call(&world, "no-body").await;
    call.send(response_headers(&[(":status", "204")], true));
    is_headers_answer(&call.next().await);
    call.reset().await;
    assert_eq!(world.outcome("no-body").await["outcome"]["status"], 204);
    world.is_at_rest().await;
}

/// Envoy answers a malformed request itself: the stream begins with the answer's headers.
#[tokio::test]
async fn local_replies_of_envoy() {
    let world = usual().await;
    let mut call = world.client.open();
    let headers = [(":status", "400"), ("content-type", "text/plain"), ("content-length", "11")];
    call.send(
        response_headers(&headers, false)
            .modes(BodySendMode::FullDuplexStreamed, BodySendMode::FullDuplexStreamed),
    );
    is_headers_answer(&call.next().await);
    call.send(response_body("Bad Request", true));
    assert_eq!(call.response_body(true).await.0, b"Bad Request");
    call.close();
    call.ends().await;
    // And a dead endpoint's, in the middle of a stream.
    let mut call = routed_call(&world, "dead").await;
    call.send(response_headers(&[(":status", "503"), ("content-length", "9")], false));
    is_headers_answer(&call.next().await);
    call.send(response_body("no health", true));
    assert_eq!(call.response_body(true).await.0, b"no health");
    call.reset().await;
    assert_eq!(world.outcome("dead").await["outcome"]["status"], 503);
    world.is_at_rest().await;
}

/// Long answers, whole and in streams, come back complete in short pieces.
#[tokio::test]
async fn long_answers() {
    let world = usual().await;
    let body = text(400_000);
    for headers in [JSON_HEADERS, SSE_HEADERS] {
        let mut call = routed_call(&world, "long").await;
        call.send(response_headers(headers, false));
        is_headers_answer(&call.next().await);
        for piece in body.as_bytes().chunks(130_000) {
            call.send(response_body(piece, false));
        }
        call.send(response_body("", true));
        let (whole, pieces) = call.response_body(true).await;
        assert_eq!(whole, body.as_bytes());
        assert!(pieces.iter().all(|length| *length <= 62_000), "{pieces:?}");
        call.reset().await;
        world.is_at_rest().await;
    }
}

/// A client that goes gives everything back, wherever the request was.
#[tokio::test]
async fn clients_that_leave() {
    let world = usual().await;
    for how in ["close", "reset"] {
        for at in 0..4 {
            let id = format!("{how}-{at}");
            let mut call = world.client.open();
            call.send(request_headers(&post(&[("x-request-id", &id)]), false));
            if at > 0 {
                call.send(request_body(completion("m", &id), true));
                destination(&call.next().await);
                call.request_body(true).await;
            }
            if at > 1 {
                call.send(response_headers(SSE_HEADERS, false));
                is_headers_answer(&call.next().await);
            }
            if at > 2 {
                call.send(response_body("data: {}\n\n", false));
                assert_eq!(call.next().await, returned("data: {}\n\n", false));
            }
            if how == "reset" {
                call.reset().await;
            } else {
                call.close();
                call.ends().await;
            }
            world.is_at_rest().await;
            if at > 0 {
                let page = world.outcome(&id).await;
                assert_eq!(page["outcome"]["status"], 499, "{id}: {page}");
            }
        }
    }
    let ends = "kvroute_ext_proc_ends_total{code=\"cancelled\"}";
    let all_counted = async {
        // What is reset at once may never arrive.
        while metric(&world.router, ends).await < 7.0 {}
    };
    tokio::time::timeout(LONG, all_counted).await.expect("streams that were broken off");
    assert!(metric(&world.router, "kvroute_client_aborts_total").await >= 7.0);
    assert_eq!(metric(&world.router, "kvroute_ext_proc_ends_total{code=\"ok\"}").await, 0.0);
}

/// A proxy that breaks the protocol behind the decision is no client that left.
#[tokio::test]
async fn messages_out_of_order_behind_the_decision() {
    let world = usual().await;
    let mut call = routed_call(&world, "disorder").await;
    call.send(response_body("too early", false));
    let end = call.next_or_end().await.unwrap().unwrap_err();
    assert_eq!(end.code(), tonic::Code::InvalidArgument, "{end:?}");
    let page = world.outcome("disorder").await;
    assert_eq!(page["outcome"]["status"], 500, "{page}");
    assert_eq!(page["outcome"]["error"], "response_body out of order", "{page}");
    assert_eq!(metric(&world.router, "kvroute_client_aborts_total").await, 0.0);
    world.is_at_rest().await;
}

/// What is set on an answer, to the byte (difference 102), and what an endpoint may not say.
#[tokio::test]
async fn the_headers_of_an_answer() {
    let world = usual().await;
    let mut call = routed_call(&world, "headers").await;
    call.send(response_headers(
        &[
            (":status", "200"),
            ("content-length", "2"),
            ("content-type", "application/json"),
            ("x-request-id", "of-the-engine"),
            ("x-mine", "1"),
        ],
        false,
    ));
    let expected = response_headers_answer(&[
        ("x-kvroute-endpoint", &world.at(1)),
        ("x-request-id", "headers"),
        ("x-went-into-resp-headers", "true"),
    ]);
    assert_eq!(call.next().await, expected);
    call.reset().await;
    let mut call = routed_call(&world, "spoofed").await;
    let spoofed = ["x-gateway-destination-endpoint-served", "x-llm-d-request-dropped-reason"];
    let headers = [(":status", "200"), (spoofed[0], "9.9.9.9:1"), (spoofed[1], "none")];
    call.send(response_headers(&headers, false));
    let answer = call.next().await;
    assert_eq!(removed_headers(&answer), spoofed);
    call.reset().await;
    world.is_at_rest().await;
}

/// Clients behind a gateway learn no address of a pod unless they are to: row 120 of
/// docs/differences.md.
#[tokio::test]
async fn the_endpoint_is_told_to_clients_only_where_wanted() {
    let mut setup = Setup::default();
    setup.ext_proc.endpoint_header = false;
    let world = setup.start().await;
    let mut call = routed_call(&world, "quiet").await;
    call.send(response_headers(JSON_HEADERS, false));
    let told = set_headers(&call.next().await);
    assert!(told.contains(&("x-request-id".to_owned(), "quiet".to_owned())), "{told:?}");
    assert!(told.iter().all(|(_, value)| *value != world.at(1)), "{told:?}");
    call.reset().await;
    world.is_at_rest().await;
}

/// The data plane may have tried another endpoint than the first, and says which one served. The
/// first is avoided then.
#[tokio::test]
async fn another_endpoint_served() {
    let world = unforgiving().await;
    let mut call = routed_call(&world, "other").await;
    let served = field("x-gateway-destination-endpoint-served", world.at(2).as_str());
    let headers = response_headers(JSON_HEADERS, false);
    call.send(headers.metadata("envoy.lb", served));
    let endpoint = ("x-kvroute-endpoint".to_owned(), world.at(2));
    assert!(set_headers(&call.next().await).contains(&endpoint));
    call.send(response_body(JSON, true));
    call.response_body(true).await;
    call.reset().await;
    let page = world.outcome("other").await;
    assert_eq!(page["outcome"]["endpoint"], world.at(2), "{page}");
    assert_eq!(page["outcome"]["attempts"], 2, "{page}");
    world.is_at_rest().await;
    assert_eq!(next_of(&world).await, world.at(0));
    // Who serves what it was to serve has not failed.
    let (mut call, _) = world.post(&[], &completion("m", "again")).await;
    call.request_body(true).await;
    let served = field("x-gateway-destination-endpoint-served", world.at(0).as_str());
    call.send(response_headers(JSON_HEADERS, true).metadata("envoy.lb", served));
    call.next().await;
    assert_eq!(next_of(&world).await, world.at(0));
}

/// A world that remembers a failure for longer than any test runs.
async fn unforgiving() -> World {
    let mut setup = Setup::default();
    setup.settings.failure_backoff_ms = 60_000;
    setup.settings.failure_backoff_max_ms = 60_000;
    setup.start().await
}

/// The engine that the next request goes to.
async fn next_of(world: &World) -> String {
    let (_, answer) = world.post(&[], &completion("m", "y")).await;
    destination(&answer)
}

const UNREACHED: &str = "upstream connect error or disconnect/reset before headers. reset reason: \
    remote connection failure";
const NO_ROOM: &str =
    "upstream connect error or disconnect/reset before headers. reset reason: overflow";

/// An endpoint that the proxy cannot reach is avoided for a while. One that answers 503 itself has
/// been reached, and a proxy's timeout, or its own limits, say nothing against the endpoint.
#[tokio::test]
async fn endpoints_that_the_proxy_cannot_reach() {
    let world = unforgiving().await;
    let own: &[(&str, &str)] = &[(":status", "503"), ("date", "x"), ("server", "uvicorn")];
    let timed: &[(&str, &str)] = &[(":status", "503"), ("x-envoy-upstream-service-time", "3")];
    let proxys = |status| [(":status", status), ("content-length", "9")];
    type Headers<'a> = &'a [(&'a str, &'a str)];
    let table: [(Headers<'_>, &str, usize); 8] = [
        (own, UNREACHED, 1),
        (timed, UNREACHED, 1),
        (&proxys("504"), "upstream request timeout", 1),
        (&proxys("504"), UNREACHED, 1),
        (&proxys("503"), "no healthy upstream", 1),
        (&proxys("503"), NO_ROOM, 1),
        (&proxys("500"), UNREACHED, 1),
        (&proxys("503"), UNREACHED, 0),
    ];
    for (headers, body, next) in table {
        let mut call = routed_call(&world, "unreached").await;
        call.send(response_headers(headers, false));
        is_headers_answer(&call.next().await);
        call.send(response_body(body, false));
        call.send(response_body("", true));
        call.response_body(true).await;
        call.reset().await;
        assert_eq!(next_of(&world).await, world.at(next), "{headers:?} {body}");
    }
}
