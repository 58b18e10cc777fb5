//! The protocol around the messages: modes, compression, limits, what makes no sense.

use tonic::Code;

use crate::client::*;
use crate::envoy::*;
use crate::world::*;

#[tokio::test]
async fn compressed_messages() {
    let world = usual().await;
    let client = Client { gzip: true, ..world.client.clone() };
    let body = completion("m", &text(100_000));
    let mut call = client.open();
    call.send(request_headers(&post(&[]), false));
    call.send(request_body(&body, true));
    assert_eq!(destination(&call.next().await), world.at(1));
    assert_eq!(call.request_body(true).await.0, body.as_bytes());
    call.answered(200).await;
    world.is_at_rest().await;
}

/// The limit is that of the message, compressed or not; the client is told, the connection stays.
#[tokio::test]
async fn messages_over_the_limit() {
    let mut setup = Setup::default();
    setup.settings.ext_proc_message_bytes_max = 100_000;
    let world = setup.start().await;
    for gzip in [false, true] {
        let client = Client { gzip, ..world.client.clone() };
        let mut call = client.open();
        call.send(request_headers(&post(&[]), false));
        call.send(request_body(vec![b' '; 100_001], true));
        let refusal = refusal(call.next().await);
        assert_eq!(refusal.status, 413);
        assert!(refusal.body.contains("ext_proc_message_bytes_max"), "{refusal:?}");
        call.ends().await;
        world.is_at_rest().await;
    }
    let (_, answer) = world.post(&[], &completion("m", &text(90_000))).await;
    destination(&answer);
}

/// Streams in which nothing makes sense end with an error that says so.
#[tokio::test]
async fn streams_that_make_no_sense() {
    let world = usual().await;
    let table: [(&str, Vec<ProcessingRequest>); 4] = [
        ("nothing in it", vec![ProcessingRequest::default()]),
        ("a body first", vec![request_body("x", true)]),
        ("headers twice", vec![request_headers(&post(&[]), false); 2]),
        ("more after the end", {
            let body = request_body(completion("m", "x"), true);
            vec![request_headers(&post(&[]), false), body.clone(), body]
        }),
    ];
    for (case, messages) in table {
        let mut call = world.client.open();
        messages.into_iter().for_each(|message| call.send(message));
        let mut answers = 0;
        let ended = loop {
            match call.next_or_end().await {
                Some(Ok(_)) => answers += 1,
                other => break other,
            }
        };
        let status = ended.expect("an error").expect_err("not an answer");
        assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status:?}");
        assert!(answers <= 2, "{case}");
        world.is_at_rest().await;
    }
    destination(&world.post(&[], &completion("m", "x")).await.1);
}

/// The first message tells how bodies are sent. Full duplex is the main mode.
#[tokio::test]
async fn full_duplex_is_served() {
    use BodySendMode::FullDuplexStreamed as Duplex;
    let world = usual().await;
    let mut call = world.client.open();
    call.send(request_headers(&post(&[]), false).modes(Duplex, Duplex));
    let body = completion("m", "x");
    call.send(request_body(&body, true));
    destination(&call.next().await);
    assert_eq!(call.request_body(true).await.0, body.as_bytes());
    call.answered(200).await;
}

/// Answers to messages that only observe are ignored: a set-up that cannot route is told so.
#[tokio::test]
async fn observers_are_told_that_nothing_comes_of_it() {
    let world = usual().await;
    let mut call = world.client.open();
    let headers = request_headers(&post(&[]), false);
    call.send(ProcessingRequest { observability_mode: true, ..headers });
    let status = call.next_or_end().await.expect("an error").expect_err("not an answer");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    world.is_at_rest().await;
}

/// Requests side by side on one connection do not mix.
#[tokio::test]
async fn many_streams_of_one_connection() {
    let world = usual().await;
    let mut calls = Vec::new();
    for at in 0..50 {
        let call = world.client.open();
        call.send(request_headers(&post(&[("x-request-id", &format!("many-{at}"))]), false));
        calls.push(call);
    }
    for (at, call) in calls.iter().enumerate() {
        call.send(request_body(completion("m", &format!("prompt {at}")), true));
    }
    for (at, mut call) in calls.into_iter().enumerate() {
        let answer = call.next().await;
        destination(&answer);
        let body = completion("m", &format!("prompt {at}"));
        let length = ("content-length".to_owned(), body.len().to_string());
        assert!(set_headers(&answer).contains(&length), "{answer:?}");
        assert_eq!(call.request_body(true).await.0, body.as_bytes());
        call.answered(200).await;
    }
    world.is_at_rest().await;
}
