//! Requests that no endpoint gets: status, text, headers.

use crate::client::*;
use crate::support::{LONG, metric};
use crate::world::*;

const DROPPED: &str = "x-llm-d-request-dropped-reason";

const ID: &str = "refused-1";

/// A refusal in the shape of the API that was asked, with what clients may do next (difference
/// 103: llm-d's are texts, `inference error: Code - message`).
fn one(status: i32, kind: &str, message: &str, reason: Option<&str>) -> Refusal {
    let body = format!(
        "{{\"error\":{{\"message\":{message:?},\"type\":\"{kind}\",\"param\":null,\"code\":{status}}}}}"
    );
    let again = matches!(status, 429 | 503).then_some(("retry-after", "1"));
    let headers = [
        Some(("content-type", "application/json")),
        again,
        reason.map(|reason| (DROPPED, reason)),
        Some(("x-request-id", ID)),
    ];
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    Refusal { status, body, headers: headers.into_iter().flatten().map(owned).collect() }
}

/// Hermetic cases "invalid JSON" and "missing model".
#[tokio::test]
async fn bodies_that_cannot_be_read() {
    let world = usual().await;
    let json = |what: &str| format!("the request body is not valid JSON: {what}");
    let table = [
        ("no healthy upstream", json("expected ident at byte 1")),
        ("{\"model\":\"m\"", json("EOF while parsing an object at byte 11")),
        ("", json("EOF while parsing a value at byte 0")),
        ("[]", "the request body must be a JSON object, found an array".to_owned()),
        (
            "{\"prompt\":\"hello world\"}",
            "the request names no model; set `model`, or start the router with --model".to_owned(),
        ),
    ];
    for (body, message) in table {
        let refusal = world.refused(&[("x-request-id", ID)], body).await;
        assert_eq!(refusal, one(400, "invalid_request_error", &message, None), "{body}");
    }
    let path = [(":path", "/v1/other"), ("x-request-id", ID)];
    let refusal = world.refused(&path, "{}").await;
    assert_eq!(refusal.status, 400);
    assert!(refusal.body.contains("no parser claims the path `/v1/other`"), "{refusal:?}");
    world.is_at_rest().await;
}

/// Hermetic case "no pods". Difference 101: llm-d answers a GET with 500; the endpoint picker
/// protocol (004) asks for 503.
#[tokio::test]
async fn an_empty_fleet() {
    let world = world(USUAL, &[]).await;
    let mut call = world.client.open();
    call.send(request_headers(&post(&[(":method", "GET"), ("x-request-id", ID)]), true));
    let refusal_of_get = refusal(call.next().await);
    call.ends().await;
    let refusal_of_post = world.refused(&[("x-request-id", ID)], &completion("m", "x")).await;
    let message = "no endpoint can serve the request: the fleet is empty";
    let reason = Some("rejected-no-endpoints");
    let expected = one(503, "service_unavailable_error", message, reason);
    assert_eq!([refusal_of_get, refusal_of_post], [expected.clone(), expected]);
}

/// A full fleet refuses whom it may; difference 97: with a reason.
#[tokio::test]
async fn sheddable_requests_of_a_full_fleet() {
    let pods = [Pod(99, 0.99, &[]), Pod(99, 0.99, &[])];
    let world = world(USUAL, &pods).await;
    let body = completion("m", "x");
    for header in ["x-llm-d-inference-objective", "x-gateway-inference-objective"] {
        let refusal = world.refused(&[(header, "batch"), ("x-request-id", ID)], &body).await;
        let message = "system saturated, sheddable request dropped";
        assert_eq!(refusal, one(429, "rate_limit_error", message, Some("rejected-saturated")));
        for objective in ["urgent", "unknown"] {
            destination(&world.post(&[(header, objective)], &body).await.1);
        }
    }
    world.is_at_rest().await;
}

/// A filter that leaves nobody: 429, try later.
#[tokio::test]
async fn filters_that_leave_nobody() {
    let yaml = "
plugins:
- {type: concurrency-detector, parameters: {maxConcurrency: 1, headroom: 0}}
- {type: queue-scorer}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: concurrency-detector}, {pluginRef: queue-scorer}]}
";
    let world = world(yaml, &[Pod(0, 0.1, &[])]).await;
    let body = completion("m", "x");
    let (mut call, answer) = world.post(&[], &body).await;
    destination(&answer);
    let refusal = world.refused(&[], &body).await;
    assert_eq!((refusal.status, refusal.header(DROPPED)), (429, Some("rejected-saturated")));
    // The place is free again when the first answer is over.
    call.request_body(true).await;
    call.answered(200).await;
    world.is_at_rest().await;
    destination(&world.post(&[], &body).await.1);
}

/// Bodies count from their first piece until they have been sent on.
#[tokio::test]
async fn bodies_that_find_no_room() {
    let mut setup = Setup::default();
    setup.settings.body_bytes_max = 100_000;
    setup.settings.bodies_bytes_max = 100_000;
    let world = setup.start().await;
    let held = async || metric(&world.router, "kvroute_request_bodies_held_bytes").await;
    let body = completion("m", &text(60_000));
    let mut call = world.client.open();
    call.send(request_headers(&post(&[]), false));
    call.send(request_body(&body[..50_000], false));
    let until = tokio::time::Instant::now() + LONG;
    while held().await != 50_000.0 {
        assert!(tokio::time::Instant::now() < until, "never held: {}", held().await);
    }
    let refusal = world.refused(&[], &body).await;
    assert_eq!((refusal.status, refusal.header("retry-after")), (503, Some("1")), "{refusal:?}");
    assert_eq!(refusal.header(DROPPED), Some("rejected-saturated"));
    assert!(refusal.body.contains("kvroute.bodies_bytes_max"), "{refusal:?}");
    assert_eq!(metric(&world.router, "kvroute_rejects_total{reason=\"bodies_full\"}").await, 1.0);
    let (small, answer) = world.post(&[], &completion("m", "x")).await;
    destination(&answer);
    small.reset().await;
    call.send(request_body(&body[50_000..], true));
    destination(&call.next().await);
    assert_eq!(call.request_body(true).await.0, body.as_bytes());
    // The answer is still to come, the body is gone.
    while held().await != 0.0 {
        assert!(tokio::time::Instant::now() < until, "held for ever: {}", held().await);
    }
    assert_eq!(world.router.brain().inflight_requests(), 1);
    destination(&world.post(&[], &body).await.1);
    call.answered(200).await;
    world.is_at_rest().await;
}

/// The router's own limits are those of the embedded proxy.
#[tokio::test]
async fn limits_of_the_router() {
    let mut setup = Setup::default();
    setup.settings.inflight_requests_max = 1;
    setup.settings.body_bytes_max = 10_000;
    setup.settings.header_bytes_max = 2_000;
    let world = setup.start().await;
    let refusal = world.refused(&[], &completion("m", &text(10_000))).await;
    assert_eq!(refusal.status, 413, "{refusal:?}");
    let refusal = world.refused(&[("x-long", &text(3_000))], &completion("m", "x")).await;
    assert_eq!(refusal.status, 431, "{refusal:?}");
    let (call, answer) = world.post(&[], &completion("m", "x")).await;
    destination(&answer);
    let refusal = world.refused(&[], &completion("m", "x")).await;
    assert_eq!(refusal.status, 429, "{refusal:?}");
    assert_eq!(refusal.header(DROPPED), Some("rejected-saturated"));
    call.reset().await;
    world.is_at_rest().await;
    destination(&world.post(&[], &completion("m", "x")).await.1);
}
