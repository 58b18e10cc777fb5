//! Ways in which Envoy can be told to hand over bodies, other than the one to use.

use bytes::Bytes;
use http::Version;

use crate::client::{Client, completion, completion_text, get, post};
use crate::support::http;
use crate::upstream::{EVENTS, STREAM, Upstream, WISH, event, whole};
use crate::{Setup, Stack};

const FULL_DUPLEX: &str = "FULL_DUPLEX_STREAMED";

async fn routes_and_streams(stack: &Stack, upstream: &Upstream, case: &str) {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let mut client = Client::connect(stack.http, version).await;
        for length in [10, 20_000] {
            let body = Bytes::from(completion_text(&"word ".repeat(length / 5)));
            let request = post("/v1/completions", whole(body.clone()), &[]);
            let reply = client.send(request).await.unwrap();
            assert_eq!(reply.status, 200, "{case}: {}", reply.text());
            assert!(upstream.seen().pop().unwrap().body == body, "{case}: changed on its way");
            assert!(reply.body == body, "{case}: changed on its way back");
        }
        upstream.allow(EVENTS);
        let request = post("/v1/completions", completion("Go on."), &[(WISH, STREAM)]);
        let reply = client.send(request).await.unwrap();
        let expected: String = (0..EVENTS).map(event).collect();
        assert_eq!((reply.status, reply.text()), (200, expected), "{case}");
        let reply = client.send(get("/v1/models", &[])).await.unwrap();
        assert_eq!(reply.status, 200, "{case}: {}", reply.text());
        let reply = client.send(post("/v1/completions", whole("{no json"), &[])).await.unwrap();
        assert_eq!(reply.status, 400, "{case}: {}", reply.text());
    }
}

#[tokio::test]
async fn buffered_requests_are_routed() {
    let upstream = Upstream::start().await;
    for response in [FULL_DUPLEX, "BUFFERED", "STREAMED", "NONE"] {
        let setup = Setup::standalone().set("request-body", FULL_DUPLEX, "BUFFERED").set(
            "response-body",
            FULL_DUPLEX,
            response,
        );
        let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
        routes_and_streams(&stack, &upstream, response).await;
        stack.unharmed().await;
    }
}

#[tokio::test]
async fn answers_may_be_handed_over_in_any_way() {
    let upstream = Upstream::start().await;
    for response in ["BUFFERED", "STREAMED", "NONE"] {
        let setup = Setup::standalone().set("response-body", FULL_DUPLEX, response);
        let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
        routes_and_streams(&stack, &upstream, response).await;
        stack.unharmed().await;
    }
}

#[tokio::test]
async fn requests_that_cannot_be_read_are_routed_by_load_and_this_is_counted() {
    let upstream = Upstream::start().await;
    for (request, trailers) in
        [("STREAMED", "SEND"), ("BUFFERED_PARTIAL", "SEND"), ("NONE", "SKIP")]
    {
        let setup = Setup::standalone()
            .set("request-body", FULL_DUPLEX, request)
            .set("response-body", FULL_DUPLEX, "STREAMED")
            .set("trailers", "SEND", trailers);
        let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let mut client = Client::connect(stack.http, version).await;
            let body = Bytes::from(completion_text(&"word ".repeat(20_000)));
            let sent = post("/v1/completions", whole(body.clone()), &[]);
            let reply = client.send(sent).await.unwrap();
            assert_eq!(reply.status, 200, "{request}: {}", reply.text());
            assert!(upstream.seen().pop().unwrap().body == body, "{request}: changed on its way");
            assert!(reply.body == body, "{request}: changed on its way back");
            let reply = client.send(get("/v1/models", &[])).await.unwrap();
            assert_eq!(reply.status, 200, "{request}: {}", reply.text());
        }
        let metrics = http(stack.router.admin_addr(), "GET", "/metrics", "").await.body;
        let counted = metrics.lines().find(|line| line.contains("body-not-sent"));
        let counted = counted.unwrap_or_else(|| panic!("{request}: not counted"));
        assert!(counted.ends_with(" 2"), "{request}: {counted}");
        stack.unharmed().await;
    }
}
