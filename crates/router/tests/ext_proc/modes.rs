//! How bodies are sent: what each mode of a proxy's filter is answered, message by message.

use crate::client::*;
use crate::envoy::BodySendMode::{Buffered, BufferedPartial, FullDuplexStreamed, Grpc, Streamed};
use crate::envoy::*;
use crate::support::metric;
use crate::world::*;

const ANSWER: &str = "{\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":10,\
    \"prompt_tokens_details\":{\"cached_tokens\":4}}}";

/// A message about a body that lets it pass as it is.
fn passes(answer: ProcessingResponse) {
    let Some(Response::RequestBody(body) | Response::ResponseBody(body)) = answer.response else {
        panic!("not about a body: {answer:?}");
    };
    assert_eq!(body.response.unwrap_or_default(), CommonResponse::default());
    assert_eq!(answer.dynamic_metadata, None);
}

/// The answer's side, whose mode is any but the full duplex one: each message has one answer.
async fn answered_by_pieces(call: &mut Call, pieces: &[&str]) {
    let headers = [(":status", "200"), ("content-type", "application/json")];
    call.send(response_headers(&headers, false));
    set_headers(&call.next().await);
    for (at, piece) in pieces.iter().enumerate() {
        call.send(response_body(piece, at + 1 == pieces.len()));
        passes(call.next().await);
    }
}

/// BUFFERED: the proxy waits for an answer to the headers before it sends the body, and takes
/// header changes with the body's answer.
#[tokio::test]
async fn buffered_bodies_are_read_behind_answered_headers() {
    let world = usual().await;
    for trailers in [false, true] {
        let id = format!("buffered-{trailers}");
        let mut call = world.client.open();
        let headers = request_headers(&post(&[("x-request-id", &id)]), false);
        call.send(headers.modes(Buffered, Buffered));
        let Some(Response::RequestHeaders(first)) = call.next().await.response else { panic!() };
        assert_eq!(first.response.unwrap_or_default(), CommonResponse::default());
        let body = completion("m", "buffered");
        call.send(request_body(&body, !trailers));
        let answer = call.next().await;
        let Some(Response::RequestBody(told)) = answer.response.clone() else {
            panic!("{answer:?}")
        };
        let told = told.response.unwrap();
        assert_eq!((told.body_mutation, told.clear_route_cache), (None, true));
        let as_headers = HeadersResponse {
            response: Some(CommonResponse {
                header_mutation: told.header_mutation,
                ..CommonResponse::default()
            }),
        };
        let response = Some(Response::RequestHeaders(as_headers));
        assert_eq!(destination(&ProcessingResponse { response, ..answer }), world.at(1));
        // Envoy sends them once the body is answered, if it is to send them at all.
        if trailers {
            call.send(request_trailers(&[("a", "b")]));
            assert_eq!(call.next().await, request_trailers_answer());
        }
        answered_by_pieces(&mut call, &[ANSWER]).await;
        call.reset().await;
        let page = world.outcome(&id).await;
        assert_eq!(page["outcome"]["delivered_tokens"], 4, "{page}");
    }
    world.is_at_rest().await;
}

/// STREAMED, BUFFERED_PARTIAL and NONE: the headers are gone before the body is there, so the
/// request goes by load, which is said.
#[tokio::test]
async fn bodies_that_come_too_late_are_not_waited_for() {
    let world = usual().await;
    for (mode, pieces) in [(Streamed, 3), (BufferedPartial, 1), (BodySendMode::None, 0)] {
        let mut call = world.client.open();
        let headers = post(&[("x-request-id", "late")]);
        call.send(request_headers(&headers, false).modes(mode, Streamed));
        assert_eq!(call.next().await, routed(&world.at(1), &[]), "{mode:?}");
        for at in 1..=pieces {
            call.send(request_body("{\"model\"", at == pieces));
            passes(call.next().await);
        }
        answered_by_pieces(&mut call, &[&ANSWER[..20], &ANSWER[20..], ""]).await;
        call.reset().await;
        world.is_at_rest().await;
    }
    let series = "kvroute_fallbacks_total{reason=\"body-not-sent\"}";
    assert_eq!(metric(&world.router, series).await, 3.0);
}

/// A mode that cannot be answered is refused with what to set instead.
#[tokio::test]
async fn modes_for_something_else_are_refused() {
    let world = usual().await;
    for (request, response) in [(Grpc, FullDuplexStreamed), (FullDuplexStreamed, Grpc)] {
        let mut call = world.client.open();
        call.send(request_headers(&post(&[]), false).modes(request, response));
        let refusal = refusal(call.next().await);
        assert_eq!(refusal.status, 500);
        assert!(refusal.body.contains("to FULL_DUPLEX_STREAMED"), "{refusal:?}");
        call.ends().await;
        world.is_at_rest().await;
    }
}

/// Without the answer's body its end is not told: what is known when the stream ends counts.
#[tokio::test]
async fn answers_whose_bodies_are_not_sent() {
    let mut setup = Setup::default();
    setup.settings.response_idle_timeout_s = 1;
    let world = setup.start().await;
    for waits in [false, true] {
        let id = format!("blind-{waits}");
        let mut call = world.client.open();
        let headers = request_headers(&post(&[("x-request-id", &id)]), false);
        call.send(headers.modes(FullDuplexStreamed, BodySendMode::None));
        call.send(request_body(completion("m", "blind"), true));
        destination(&call.next().await);
        call.request_body(true).await;
        call.send(response_headers(&[(":status", "200")], false));
        set_headers(&call.next().await);
        let first_byte = "kvroute_ttft_seconds_count";
        assert_eq!(metric(&world.router, first_byte).await, 1.0 + f64::from(u8::from(waits)));
        // A long answer is no reason to break it off.
        if waits {
            call.ends().await;
        } else {
            call.reset().await;
        }
        let page = world.outcome(&id).await;
        assert_eq!(page["outcome"]["status"], 200, "{page}");
        assert!(page["outcome"]["error"].is_null(), "{page}");
    }
    world.is_at_rest().await;
    let series = "kvroute_fallbacks_total{reason=\"answer-not-sent\"}";
    assert_eq!(metric(&world.router, series).await, 2.0);
}

/// And without the answer's head, the end of the stream is all that is seen.
#[tokio::test]
async fn answers_of_which_nothing_is_sent() {
    let mut setup = Setup::default();
    setup.settings.first_byte_timeout_s = 1;
    let world = setup.start().await;
    for waits in [false, true] {
        let id = format!("unseen-{waits}");
        let mut call = world.client.open();
        let headers = request_headers(&post(&[("x-request-id", &id)]), false);
        call.send(headers.modes(FullDuplexStreamed, BodySendMode::None));
        call.send(request_body(completion("m", "unseen"), true));
        destination(&call.next().await);
        call.request_body(true).await;
        if waits {
            call.ends().await;
        } else {
            call.reset().await;
        }
        let page = world.outcome(&id).await;
        assert!(page["outcome"]["error"].is_null(), "{page}");
    }
    world.is_at_rest().await;
    assert_eq!(metric(&world.router, "kvroute_client_aborts_total").await, 0.0);
    let page = crate::support::admin(&world.router, "/metrics").await.body;
    assert!(!page.contains("kvroute_upstream_failures_total{"), "{page}");
}

/// Where trailers end an answer and are not sent, no message marks its end. One whose usage or
/// length says that it is whole is no abort; in full duplex trailers are always sent.
#[tokio::test]
async fn answers_whose_trailers_are_not_sent() {
    let world = usual().await;
    let length = ANSWER.len().to_string();
    let table = [
        (Streamed, ANSWER, None, 200),
        (Streamed, "{}", Some("2"), 200),
        (Streamed, "{}", Some("3"), 499),
        (Streamed, "{}", None, 499),
        (Buffered, "{}", None, 200),
        (FullDuplexStreamed, ANSWER, Some(length.as_str()), 499),
    ];
    for (at, (mode, body, length, status)) in table.into_iter().enumerate() {
        let id = format!("whole-{at}");
        let mut call = world.client.open();
        let headers = request_headers(&post(&[("x-request-id", &id)]), false);
        call.send(headers.modes(FullDuplexStreamed, mode));
        call.send(request_body(completion("m", &id), true));
        destination(&call.next().await);
        call.request_body(true).await;
        let mut headers = vec![(":status", "200"), ("content-type", "application/json")];
        headers.extend(length.map(|length| ("content-length", length)));
        call.send(response_headers(&headers, false));
        set_headers(&call.next().await);
        call.send(response_body(body, false));
        call.next().await;
        call.reset().await;
        let page = world.outcome(&id).await;
        assert_eq!(page["outcome"]["status"], status, "{mode:?} {body} {length:?}: {page}");
        assert_eq!(page["outcome"]["error"].is_null(), status == 200, "{page}");
    }
    world.is_at_rest().await;
    assert_eq!(metric(&world.router, "kvroute_client_aborts_total").await, 3.0);
}
