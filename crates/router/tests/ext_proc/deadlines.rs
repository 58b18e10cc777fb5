//! A proxy in the full duplex mode waits for ever: every deadline is the router's.

use crate::client::*;
use crate::support::metric;
use crate::world::*;

/// All of them a second, none by way of another.
async fn hurried() -> World {
    let mut setup = Setup::default();
    let settings = &mut setup.settings;
    settings.client_body_timeout_s = 1;
    settings.first_byte_timeout_s = 1;
    settings.response_idle_timeout_s = 1;
    settings.ext_proc_request_timeout_s = 60;
    setup.start().await
}

#[tokio::test]
async fn a_body_that_stops() {
    let world = hurried().await;
    let mut call = world.client.open();
    call.send(request_headers(&post(&[]), false));
    call.send(request_body("{\"model\":", false));
    let refusal = refusal(call.next().await);
    assert_eq!(refusal.status, 408, "{refusal:?}");
    assert!(refusal.body.contains("nothing came for 1 s"), "{refusal:?}");
    call.ends().await;
    world.is_at_rest().await;
}

/// Drop by drop is no way around it.
#[tokio::test]
async fn a_body_that_never_ends() {
    let mut setup = Setup::default();
    setup.settings.client_body_timeout_s = 60;
    setup.settings.ext_proc_request_timeout_s = 1;
    let world = setup.start().await;
    let mut call = world.client.open();
    call.send(request_headers(&post(&[]), false));
    while call.is_silent() {
        call.send(request_body(" ", false));
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let refusal = refusal(call.next().await);
    assert_eq!(refusal.status, 408, "{refusal:?}");
    assert!(refusal.body.contains("kvroute.ext_proc_request_timeout_s"), "{refusal:?}");
    call.ends().await;
    world.is_at_rest().await;
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer() {
    let world = hurried().await;
    let (mut call, answer) = world.post(&[("x-request-id", "silent")], &completion("m", "x")).await;
    assert_eq!(destination(&answer), world.at(1));
    call.request_body(true).await;
    let refusal = refusal(call.next().await);
    assert_eq!(refusal.status, 504, "{refusal:?}");
    assert_eq!(refusal.header("x-request-id"), Some("silent"));
    call.ends().await;
    assert_eq!(world.outcome("silent").await["outcome"]["status"], 504);
    // Counted once, as a request of that endpoint.
    let page = crate::support::admin(&world.router, "/metrics").await.body;
    assert_eq!(page.matches("\nkvroute_requests_total{").count(), 1, "{page}");
    let series = format!(
        "kvroute_requests_total{{endpoint=\"{}\",status=\"504\",mode=\"approximate\"}}",
        world.at(1)
    );
    assert_eq!(metric(&world.router, &series).await, 1.0, "{page}");
    assert_eq!(metric(&world.router, "kvroute_rejects_total{reason=\"no_answer\"}").await, 1.0);
    world.is_at_rest().await;
}

/// As with the embedded proxy, the next request goes elsewhere; a silence in the middle of an
/// answer is no such reason.
#[tokio::test]
async fn an_endpoint_that_does_not_answer_is_avoided() {
    for (begins, next) in [(true, 1), (false, 0)] {
        let mut setup = Setup::default();
        let settings = &mut setup.settings;
        (settings.first_byte_timeout_s, settings.response_idle_timeout_s) = (1, 1);
        (settings.failure_backoff_ms, settings.failure_backoff_max_ms) = (60_000, 60_000);
        let world = setup.start().await;
        let (mut call, answer) = world.post(&[], &completion("m", "x")).await;
        assert_eq!(destination(&answer), world.at(1));
        call.request_body(true).await;
        if begins {
            call.send(response_headers(&[(":status", "200")], false));
            set_headers(&call.next().await);
        }
        assert_eq!(refusal(call.next().await).status, 504);
        call.ends().await;
        let (_, answer) = world.post(&[], &completion("m", "y")).await;
        assert_eq!(destination(&answer), world.at(next), "it began: {begins}");
    }
}

/// What is not read passes through; who sends it is waited for as for any other body, and the
/// endpoint is not to blame.
#[tokio::test]
async fn an_upload_that_stops_or_never_ends() {
    for (silence_s, whole_s, says) in
        [(1, 60, "nothing came for 1 s"), (60, 1, "kvroute.ext_proc_request_timeout_s")]
    {
        let mut setup = Setup::default();
        let settings = &mut setup.settings;
        settings.client_body_timeout_s = silence_s;
        settings.ext_proc_request_timeout_s = whole_s;
        settings.first_byte_timeout_s = 60;
        let world = setup.start().await;
        let mut call = world.client.open();
        let headers = [(":method", "PUT"), ("x-request-id", "upload")];
        call.send(request_headers(&post(&headers), false));
        assert_eq!(destination(&call.next().await), world.at(1));
        call.send(request_body("some", false));
        assert_eq!(call.next().await, forwarded("some", false));
        let mut next = None;
        while next.is_none() {
            if whole_s == 1 {
                call.send(request_body(".", false));
            }
            next = Some(call.next().await).filter(|answer| *answer != forwarded(".", false));
        }
        let refusal = refusal(next.unwrap());
        assert_eq!(refusal.status, 408, "{refusal:?}");
        assert!(refusal.body.contains(says), "{refusal:?}");
        call.ends().await;
        assert_eq!(world.outcome("upload").await["outcome"]["status"], 408);
        let page = crate::support::admin(&world.router, "/metrics").await.body;
        assert!(!page.contains("kvroute_upstream_failures_total{"), "{page}");
        world.is_at_rest().await;
    }
}

/// A proxy's own answer that stalls: the endpoint's failure has been counted.
#[tokio::test]
async fn a_local_reply_that_stalls_is_counted_once() {
    let world = hurried().await;
    let (mut call, _) = world.post(&[("x-request-id", "local")], &completion("m", "x")).await;
    call.request_body(true).await;
    call.send(response_headers(&[(":status", "503")], false));
    set_headers(&call.next().await);
    let before = world.outcome("local").await;
    assert_eq!(before["outcome"]["status"], 503, "{before}");
    assert_eq!(refusal(call.next().await).status, 504);
    call.ends().await;
    assert_eq!(world.outcome("local").await, before);
    let series = |reason: &str| {
        let endpoint = world.at(1);
        format!("kvroute_upstream_failures_total{{endpoint=\"{endpoint}\",reason=\"{reason}\"}}")
    };
    assert_eq!(metric(&world.router, &series("proxy_answered")).await, 1.0);
    let page = crate::support::admin(&world.router, "/metrics").await.body;
    assert_eq!(page.matches("kvroute_upstream_failures_total{").count(), 1, "{page}");
    assert_eq!(page.matches("\nkvroute_requests_total{").count(), 1, "{page}");
    world.is_at_rest().await;
}

#[tokio::test]
async fn an_answer_that_stops() {
    let world = hurried().await;
    let (mut call, _) = world.post(&[("x-request-id", "stops")], &completion("m", "x")).await;
    call.request_body(true).await;
    call.send(response_headers(&[(":status", "200")], false));
    set_headers(&call.next().await);
    call.send(response_body("some", false));
    assert_eq!(call.next().await, returned("some", false));
    // Envoy breaks the answer off, so that the client sees that it is not complete.
    assert_eq!(refusal(call.next().await).status, 504);
    call.ends().await;
    let page = world.outcome("stops").await;
    assert!(page["outcome"]["error"].is_string(), "{page}");
    world.is_at_rest().await;
}

#[tokio::test]
async fn a_stream_that_grows_old() {
    let mut setup = Setup::default();
    setup.settings.ext_proc_stream_timeout_s = 1;
    let world = setup.start().await;
    let (mut call, _) = world.post(&[("x-request-id", "old")], &completion("m", "x")).await;
    call.request_body(true).await;
    let status = call.next_or_end().await.expect("an error").expect_err("not an answer");
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
    world.is_at_rest().await;
    // Nobody has left.
    let page = world.outcome("old").await;
    assert_eq!(page["outcome"]["status"], 500, "{page}");
    let error = page["outcome"]["error"].as_str().unwrap();
    assert!(error.contains("kvroute.ext_proc_stream_timeout_s"), "{page}");
    assert_eq!(metric(&world.router, "kvroute_client_aborts_total").await, 0.0);
    let ends = "kvroute_ext_proc_ends_total{code=\"deadline_exceeded\"}";
    assert_eq!(metric(&world.router, ends).await, 1.0);
}

/// A peer that keeps sending does not stay for ever, either.
#[tokio::test]
async fn a_busy_stream_that_grows_old() {
    let mut setup = Setup::default();
    setup.settings.ext_proc_stream_timeout_s = 1;
    let world = setup.start().await;
    let (mut call, _) = world.post(&[("x-request-id", "busy")], &completion("m", "x")).await;
    call.request_body(true).await;
    call.send(response_headers(&[(":status", "200")], false));
    set_headers(&call.next().await);
    let status = loop {
        call.send(response_body("x", false));
        match call.next_or_end().await.expect("no clean end") {
            Ok(answer) => assert_eq!(answer, returned("x", false)),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
    world.is_at_rest().await;
    // The client has got its head.
    let page = world.outcome("busy").await;
    assert_eq!(page["outcome"]["status"], 200, "{page}");
    assert!(page["outcome"]["error"].is_string(), "{page}");
}

/// Streams that say nothing at all.
#[tokio::test]
async fn a_stream_without_a_message() {
    let mut setup = Setup::default();
    setup.settings.client_header_timeout_ms = 100;
    let world = setup.start().await;
    let mut call = world.client.open();
    let status = call.next_or_end().await.expect("an error").expect_err("not an answer");
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
    world.is_at_rest().await;
}
