//! Requests that end before their time: clients that go, model servers that are silent or break
//! off, deadlines, and a router that is asked to stop.

use std::time::Duration;

use bytes::Bytes;
use http::Version;
use hyper::body::Frame;

use crate::client::{Client, completion, completion_text, next, open, post, send};
use crate::support::{PATIENCE, wait_until};
use crate::upstream::{BREAK, EVENTS, SILENCE, STREAM, Upstream, WISH, event, whole};
use crate::{Setup, Stack};

const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

#[tokio::test]
async fn a_client_may_go_at_any_time() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    for version in VERSIONS {
        // While it sends its request.
        let (sender, body) = open();
        let mut client = Client::connect(stack.http, version).await;
        let begun = tokio::spawn(async move {
            let half = Bytes::from("{\"model\": \"demo\", \"prompt\": \"");
            sender.send(Ok(Frame::data(half))).await.unwrap();
            std::future::pending::<()>().await;
        });
        let asked = tokio::spawn(async move {
            client.start(post("/v1/completions", body, &[])).await.map(|_| ()).unwrap_err();
        });
        wait_until("the request is under way", || stack.router.inflight() == 1).await;
        asked.abort();
        begun.abort();
        stack.settled().await;
        assert!(upstream.seen().is_empty());

        // While it waits for the answer.
        let mut client = Client::connect(stack.http, version).await;
        let request = post("/v1/completions", completion("Wait."), &[(WISH, SILENCE)]);
        let asked = tokio::spawn(async move { client.start(request).await.map(|_| ()) });
        wait_until("the model server has the request", || !upstream.seen().is_empty()).await;
        assert_eq!(stack.router.inflight(), 1);
        let abandoned = upstream.abandoned();
        asked.abort();
        stack.settled().await;
        wait_until("the model server hears of it", || upstream.abandoned() > abandoned).await;

        // While it reads the answer.
        let mut client = Client::connect(stack.http, version).await;
        let request = post("/v1/completions", completion("Go on."), &[(WISH, STREAM)]);
        upstream.allow(1);
        let mut answer = client.start(request).await.unwrap();
        assert!(next(answer.body_mut()).await.unwrap().is_some());
        assert_eq!(stack.router.inflight(), 1);
        let abandoned = upstream.abandoned();
        drop((answer, client));
        stack.settled().await;
        wait_until("the model server hears of it", || upstream.abandoned() > abandoned).await;
        let seen = upstream.seen().len();
        let request = post("/v1/completions", completion("Still there?"), &[]);
        assert_eq!(send(stack.http, request).await.status, 200);
        assert_eq!(upstream.seen().len(), seen + 1);
        if version == Version::HTTP_11 {
            upstream.forget();
        }
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    for version in VERSIONS {
        upstream.allow(1);
        let mut client = Client::connect(stack.http, version).await;
        let request = post("/v1/completions", completion("Break."), &[(WISH, BREAK)]);
        let mut answer = client.start(request).await.unwrap();
        assert_eq!(next(answer.body_mut()).await.unwrap().unwrap(), event(0));
        upstream.allow(1);
        assert!(next(answer.body_mut()).await.is_err(), "{version:?}: it must not look complete");
        stack.settled().await;
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn a_model_server_that_never_answers_is_given_up() {
    let upstream = Upstream::start().await;
    let setup = Setup::standalone().settings("first_byte_timeout_s: 1");
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    let request = post("/v1/completions", completion("Hello?"), &[(WISH, SILENCE)]);
    let reply = send(stack.http, request).await;
    assert_eq!(reply.status, 504, "{}", reply.text());
    wait_until("the model server hears of it", || upstream.abandoned() == 1).await;
    stack.unharmed().await;
}

#[tokio::test]
async fn a_stream_that_stops_is_given_up() {
    let upstream = Upstream::start().await;
    let setup = Setup::standalone().settings("response_idle_timeout_s: 1");
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    upstream.allow(1);
    let mut client = Client::connect(stack.http, Version::HTTP_11).await;
    let request = post("/v1/completions", completion("Hello?"), &[(WISH, STREAM)]);
    let mut answer = client.start(request).await.unwrap();
    assert_eq!(next(answer.body_mut()).await.unwrap().unwrap(), event(0));
    assert!(next(answer.body_mut()).await.is_err(), "it must not look complete");
    wait_until("the model server hears of it", || upstream.abandoned() == 1).await;
    stack.settled().await;
}

#[tokio::test]
async fn a_client_that_stops_in_its_request_is_given_up() {
    let upstream = Upstream::start().await;
    let setup = Setup::standalone().settings("client_body_timeout_s: 1");
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    for version in VERSIONS {
        let (sender, body) = open();
        let half = Bytes::from("{\"model\": \"demo\", \"prompt\": \"");
        let mut client = Client::connect(stack.http, version).await;
        let (_, reply) = tokio::join!(
            sender.send(Ok(Frame::data(half))),
            client.start(post("/v1/completions", body, &[]))
        );
        assert_eq!(reply.unwrap().status(), 408, "{version:?}");
        drop(sender);
    }
    assert!(upstream.seen().is_empty());
    stack.unharmed().await;
}

#[tokio::test]
async fn the_routes_own_timeout_frees_the_request() {
    let upstream = Upstream::start().await;
    let setup = Setup::standalone().set("route-timeout", "86400s", "0.3s");
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    let request = post("/v1/completions", completion("Hello?"), &[(WISH, SILENCE)]);
    let reply = send(stack.http, request).await;
    assert_eq!(reply.status, 504, "{}", reply.text());
    stack.unharmed().await;
}

#[tokio::test]
async fn a_router_that_stops_finishes_what_it_has() {
    const DRAIN: Duration = Duration::from_secs(2);
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    let mut client = Client::connect(stack.http, Version::HTTP_11).await;
    let request = post("/v1/completions", completion("Go on."), &[(WISH, STREAM)]);
    upstream.allow(1);
    let mut answer = client.start(request).await.unwrap();
    assert_eq!(next(answer.body_mut()).await.unwrap().unwrap(), event(0));
    let Stack { http, envoy, router } = stack;
    let stopping = tokio::spawn(router.shutdown(DRAIN));
    // Envoy has not noticed yet: what it still asks is answered. Later requests have an answer
    // too, whoever gives it.
    let request = post("/v1/completions", completion("Just in time."), &[]);
    assert_eq!(send(http, request).await.status, 200);
    wait_until_refused(http).await;
    assert!(!stopping.is_finished());
    upstream.allow(EVENTS);
    let mut rest = Vec::new();
    while let Some(piece) = next(answer.body_mut()).await.unwrap() {
        rest.extend(piece);
    }
    let expected: String = (1..EVENTS).map(event).collect();
    assert_eq!(String::from_utf8(rest).unwrap(), expected);
    assert!(stopping.await.unwrap(), "it waited for the stream");
    assert!(!envoy.log().contains("spurious"), "{}", envoy.log());
}

async fn wait_until_refused(http: std::net::SocketAddr) {
    let refused = async {
        loop {
            let reply = send(http, post("/v1/completions", completion("Late."), &[])).await;
            if reply.status != 200 {
                assert!([500, 503].contains(&reply.status), "{reply:?}");
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("no new requests after a while");
}

#[tokio::test]
async fn a_router_that_may_not_wait_breaks_off() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    let body = whole(completion_text("Hello?"));
    let asked = tokio::spawn(send(stack.http, post("/v1/completions", body, &[(WISH, SILENCE)])));
    wait_until("the model server has the request", || !upstream.seen().is_empty()).await;
    assert!(!stack.router.shutdown(Duration::from_millis(10)).await);
    // The client is not left waiting.
    let reply = asked.await.unwrap();
    assert!(reply.status >= 500, "{reply:?}");
}
