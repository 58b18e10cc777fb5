//! Requests that another model serves than the one they name. Row 99 of docs/differences.md:
//! llm-d writes the whole body anew; here nothing but the name changes.

use kvroute_core::settings::Settings;

use crate::client::*;
use crate::envoy::*;
use crate::support::{metric, settings};
use crate::world::*;

const JSON: &[(&str, &str)] = &[(":status", "200"), ("content-length", "26")];

/// Hermetic case "InferenceModelRewrite".
async fn rewriting() -> World {
    let rules = "kvroute: {model_rewrites: [{name: canary, \
        matches: [{model: model-to-be-rewritten}], targets: [{model: rewritten-model}]}]}";
    let config = kvroute_wire::config::parse(rules, "test.yaml").unwrap();
    let model_rewrites = config.kvroute.limits.model_rewrites;
    let settings = Settings { model_rewrites, ..settings() };
    Setup { settings, ..Setup::default() }.start().await
}

#[tokio::test]
async fn the_engine_gets_its_name_and_the_client_its_own() {
    let world = rewriting().await;
    let table = [
        (None, "model-to-be-rewritten", "rewritten-model"),
        (Some("x-llm-d-model-name-rewrite"), "other", "by-header"),
        (Some("x-gateway-model-name-rewrite"), "other", "by-header"),
    ];
    for (header, from, to) in table {
        let mut headers = vec![("accept-encoding", "gzip")];
        headers.extend(header.map(|name| (name, to)));
        let body = completion(from, "say \\\"model\\\":");
        let (mut call, answer) = world.post(&headers, &body).await;
        assert_eq!(destination(&answer), world.at(1));
        let expected = completion(to, "say \\\"model\\\":");
        let set = set_headers(&answer);
        assert!(set.contains(&("content-length".into(), expected.len().to_string())), "{set:?}");
        let mut removed: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
        removed.sort_unstable();
        let mut told = removed_headers(&answer);
        told.sort_unstable();
        assert_eq!(told, removed);
        assert_eq!(call.next().await, forwarded(&expected, true));
        call.send(response_headers(JSON, false));
        assert_eq!(removed_headers(&call.next().await), ["content-length"]);
        // Cut inside of the name.
        let whole = format!("{{\"x\":1, \"model\": \"{to}\"}}");
        let (first, rest) = whole.split_at(22);
        call.send(response_body(first, false));
        assert_eq!(call.next().await, returned("{\"x\":1, \"model\": ", false));
        call.send(response_body(rest, false));
        assert_eq!(call.next().await, returned(format!("\"{from}\"}}"), false));
        call.send(response_body("", true));
        assert_eq!(call.next().await, returned("", true));
        call.reset().await;
        world.is_at_rest().await;
    }
    let labels = "rule=\"canary\",from=\"model-to-be-rewritten\",to=\"rewritten-model\"";
    let series = format!("kvroute_model_rewrites_total{{{labels}}}");
    assert_eq!(metric(&world.router, &series).await, 1.0);
}

/// A body of several messages has no more of them for its new name.
#[tokio::test]
async fn large_bodies() {
    let world = rewriting().await;
    for length in [0, 61_000, 61_990, 62_000, 200_000] {
        let (before, after) = (text(length), text(200_000 - length));
        let with = |model: &str| {
            format!("{{\"user\":\"{before}\",\"model\":\"{model}\",\"prompt\":\"{after}\"}}")
        };
        let (mut call, answer) = world.post(&[], &with("model-to-be-rewritten")).await;
        assert_eq!(destination(&answer), world.at(1));
        let (body, pieces) = call.request_body(true).await;
        assert!(body == with("rewritten-model").as_bytes(), "{length}");
        assert!(pieces.iter().all(|piece| *piece <= 62_000), "{pieces:?}");
        assert!(pieces.len() <= 5, "{pieces:?}");
        call.reset().await;
    }
    world.is_at_rest().await;
}

/// What is held back of an answer that ends with trailers goes on before them.
#[tokio::test]
async fn answers_that_end_in_the_middle_of_a_name() {
    let world = rewriting().await;
    for trailers in [false, true] {
        let body = completion("model-to-be-rewritten", "x");
        let (mut call, _) = world.post(&[], &body).await;
        call.request_body(true).await;
        call.send(response_headers(JSON, false));
        call.next().await;
        call.send(response_body("{\"model\":\"rewr", false));
        if trailers {
            call.send(response_trailers(&[("grpc-status", "0")]));
            assert_eq!(call.next().await, returned("{\"model\":", false));
            assert_eq!(call.next().await, returned("\"rewr", false));
            assert_eq!(call.next().await, response_trailers_answer());
        } else {
            call.send(response_body("", true));
            assert_eq!(call.next().await, returned("{\"model\":", false));
            assert_eq!(call.next().await, returned("\"rewr", true));
        }
        call.reset().await;
    }
    world.is_at_rest().await;
}

/// Envoy in its buffered mode has the whole body replaced, or none of it.
#[tokio::test]
async fn buffered_bodies() {
    let world = rewriting().await;
    for (model, renamed) in [("model-to-be-rewritten", Some("rewritten-model")), ("other", None)] {
        let mut call = world.client.open();
        let (request, response) = (BodySendMode::Buffered, BodySendMode::Buffered);
        call.send(request_headers(&post(&[]), false).modes(request, response));
        call.next().await;
        call.send(request_body(completion(model, "x"), true));
        let expected = renamed.map(|name| completion(name, "x").into_bytes());
        assert_eq!(replaced(call.next().await), expected);
        call.send(response_headers(JSON, false));
        call.next().await;
        let answer = |name: &str| format!("{{\"model\":\"{name}\"}}").into_bytes();
        call.send(response_body(answer(renamed.unwrap_or(model)), true));
        assert_eq!(replaced(call.next().await), renamed.map(|_| answer(model)));
        call.reset().await;
    }
    world.is_at_rest().await;
}

/// The body that takes the place of the one that was shown, if one does.
fn replaced(answer: ProcessingResponse) -> Option<Vec<u8>> {
    let Some(Response::RequestBody(body) | Response::ResponseBody(body)) = answer.response else {
        panic!("not an answer to a body: {answer:?}");
    };
    match body.response.unwrap_or_default().body_mutation?.mutation? {
        Mutation::Body(body) => Some(body),
        other => panic!("not a whole body: {other:?}"),
    }
}

/// A stream whose request another model serves.
async fn rewritten(world: &World, modes: Option<(BodySendMode, BodySendMode)>) -> Call {
    let mut call = world.client.open();
    let mut headers = request_headers(&post(&[]), false);
    if let Some((request, response)) = modes {
        headers = headers.modes(request, response);
    }
    call.send(headers);
    call.send(request_body(completion("model-to-be-rewritten", "x"), true));
    destination(&call.next().await);
    call.request_body(true).await;
    let headers =
        [(":status", "200"), ("content-type", "application/json"), ("content-length", "9")];
    call.send(response_headers(&headers, false));
    // The length changes with the name.
    assert_eq!(removed_headers(&call.next().await), ["content-length"]);
    call
}

const ANSWER: &str = r#"{"id":"1","model":"rewritten-model","choices":[]}"#;
const RESTORED: &str = r#"{"id":"1","model":"model-to-be-rewritten","choices":[]}"#;

#[tokio::test]
async fn the_name_in_an_answer_wherever_it_is_cut() {
    let world = rewriting().await;
    for cut in 0..=ANSWER.len() {
        let mut call = rewritten(&world, None).await;
        call.send(response_body(&ANSWER[..cut], false));
        call.send(response_body(&ANSWER[cut..], cut % 2 == 0));
        if cut % 2 == 1 {
            call.send(response_body("", true));
        }
        let (got, _) = call.response_body(true).await;
        assert_eq!(String::from_utf8(got).unwrap(), RESTORED, "{cut}");
        call.reset().await;
    }
    world.is_at_rest().await;
}

/// The same where each piece has one answer: a name that lies in one piece is restored, and one
/// that is cut stays, because what is held back could be lost.
#[tokio::test]
async fn the_name_in_an_answer_whose_pieces_are_answered_one_by_one() {
    let world = rewriting().await;
    let found = ANSWER.find("\"rewritten").unwrap();
    let name = found..found + "\"rewritten-model\"".len();
    for mode in [BodySendMode::Streamed, BodySendMode::Buffered] {
        for cut in 0..=ANSWER.len() {
            let trailers = cut % 2 == 0;
            let modes = Some((BodySendMode::FullDuplexStreamed, mode));
            let mut call = rewritten(&world, modes).await;
            let then = (cut + 3).min(ANSWER.len());
            let pieces: &[&str] = match mode {
                BodySendMode::Streamed => &[&ANSWER[..cut], &ANSWER[cut..then], &ANSWER[then..]],
                _ => &[ANSWER],
            };
            let mut got = Vec::new();
            for (at, piece) in pieces.iter().enumerate() {
                let is_last = at + 1 == pieces.len() && !trailers;
                call.send(response_body(piece, is_last));
                got.extend(left_of(call.next().await, piece));
            }
            if trailers {
                call.send(response_trailers(&[("a", "b")]));
                assert_eq!(call.next().await, response_trailers_answer());
            }
            let is_cut = mode == BodySendMode::Streamed
                && [cut, then].iter().any(|at| name.contains(at) && *at > name.start);
            let expected = if is_cut { ANSWER } else { RESTORED };
            assert_eq!(String::from_utf8(got).unwrap(), expected, "{mode:?} {cut}");
            call.reset().await;
        }
    }
    world.is_at_rest().await;
}

/// What becomes of a piece by Envoy's rules: a mutation that names no kind changes nothing.
fn left_of(answer: ProcessingResponse, piece: &str) -> Vec<u8> {
    let Some(Response::ResponseBody(body)) = answer.response else { panic!("{answer:?}") };
    let mutation = body.response.unwrap_or_default().body_mutation.unwrap_or_default();
    match mutation.mutation {
        None => piece.as_bytes().to_vec(),
        Some(Mutation::Body(body)) => body,
        Some(Mutation::ClearBody(clear)) => {
            if clear {
                Vec::new()
            } else {
                piece.as_bytes().to_vec()
            }
        }
        Some(other) => panic!("only for the full duplex mode: {other:?}"),
    }
}

/// A body that is not sent keeps its name, and so its length.
#[tokio::test]
async fn answers_that_are_not_sent_keep_name_and_length() {
    let world = rewriting().await;
    let mut call = world.client.open();
    let modes = (BodySendMode::FullDuplexStreamed, BodySendMode::None);
    call.send(request_headers(&post(&[]), false).modes(modes.0, modes.1));
    call.send(request_body(completion("model-to-be-rewritten", "x"), true));
    destination(&call.next().await);
    call.request_body(true).await;
    call.send(response_headers(&[(":status", "200"), ("content-length", "9")], false));
    assert_eq!(removed_headers(&call.next().await), Vec::<String>::new());
    call.reset().await;
    world.is_at_rest().await;
}
