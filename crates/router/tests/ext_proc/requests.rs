//! Requests that are routed: where they go, and what is said about it.

use crate::client::*;
use crate::support::metric;
use crate::support::settings;
use crate::world::*;

const FULL: &[&str] = &["foo", "bar", "1fdg2"];

/// Hermetic cases "lower queue and kv", "active lora, low queue", "lora despite kv", "no shedding
/// by default" and "model not in objectives".
#[tokio::test]
async fn load_and_adapters_decide() {
    let table: [(&str, &str, [Pod; 3], usize); 5] = [
        ("lower queue and kv", "my-model-12345", PODS.try_into().unwrap(), 1),
        (
            "active lora, low queue",
            "1fdg2",
            [
                Pod(0, 0.2, &["foo", "bar"]),
                Pod(0, 0.1, &["foo", "1fdg2"]),
                Pod(10, 0.2, &["foo", "bar"]),
            ],
            1,
        ),
        (
            "lora despite kv",
            "1fdg2",
            [
                Pod(10, 0.2, &["foo", "bar"]),
                Pod(10, 0.4, &["foo", "1fdg2"]),
                Pod(10, 0.3, &["foo"]),
            ],
            1,
        ),
        (
            "no shedding by default",
            "1fdg2",
            [Pod(6, 0.2, &["foo", "bar", "1fdg2"]), Pod(0, 0.85, &["foo"]), Pod(10, 0.9, &["foo"])],
            0,
        ),
        (
            "model not in objectives",
            "direct-model",
            [Pod(6, 0.2, FULL), Pod(0, 0.85, FULL), Pod(10, 0.9, FULL)],
            0,
        ),
    ];
    for (case, model, pods, expected) in table {
        // Without adapters on one's side, queues and caches decide: .4 + .8 before 1 + .15.
        let world = world(USUAL, &pods).await;
        let body = completion(model, case);
        let (mut call, answer) =
            world.post(&[("hi", "mom"), ("x-request-id", "test-request-id")], &body).await;
        // Difference 102: llm-d sets every header of the request again, with the value it has.
        let length = body.len().to_string();
        let set = [("content-length", length.as_str())];
        assert_eq!(answer, routed(&world.at(expected), &set), "{case}");
        assert_eq!(call.next().await, forwarded(&body, true), "{case}");
        assert!(call.is_silent(), "{case}");
        call.close();
        call.ends().await;
        world.is_at_rest().await;
    }
}

/// Hermetic case "split body". What an HTTP/1.1 client's body looks like in Envoy: the end comes
/// as a piece of its own.
#[tokio::test]
async fn bodies_in_pieces() {
    let world = usual().await;
    let body = completion("m", "split");
    for cut in 0..=body.len() {
        if cut % 7 != 0 && cut != body.len() {
            continue;
        }
        let mut call = world.client.open();
        call.send(request_headers(&post(&[]), false));
        call.send(request_body(&body[..cut], false));
        call.send(request_body(&body[cut..], cut % 2 == 0));
        if cut % 2 != 0 {
            call.send(request_body("", true));
        }
        assert_eq!(destination(&call.next().await), world.at(1), "{cut}");
        let (whole, pieces) = call.request_body(true).await;
        assert_eq!(whole, body.as_bytes(), "{cut}");
        assert_eq!(pieces.len(), 1, "{cut}");
    }
    world.is_at_rest().await;
}

/// Difference 100: llm-d never answers a body that ends with trailers.
#[tokio::test]
async fn a_body_that_ends_with_trailers() {
    let world = usual().await;
    let body = completion("m", "trailers");
    let mut call = world.client.open();
    call.send(request_headers(&post(&[]), false));
    call.send(request_body(&body, false));
    call.send(request_trailers(&[("grpc-status", "0")]));
    assert_eq!(destination(&call.next().await), world.at(1));
    assert_eq!(call.next().await, forwarded(&body, false));
    assert_eq!(call.next().await, request_trailers_answer());
    call.answered(200).await;
    world.is_at_rest().await;
}

/// Hermetic case "GET". Row 15 of the differences: llm-d takes any endpoint of the pool.
#[tokio::test]
async fn requests_without_a_body_are_scheduled_like_others() {
    let world = usual().await;
    for method in ["GET", "POST", "DELETE"] {
        let mut call = world.client.open();
        let headers =
            post(&[(":method", method), (":path", "/v1/models"), ("x-request-id", "get-1")]);
        call.send(request_headers(&headers, true));
        assert_eq!(call.next().await, routed(&world.at(1), &[]), "{method}");
        // Difference 106: there is nothing to learn from the answer, so nothing is known of it.
        call.ends().await;
        world.is_at_rest().await;
        let outcome = &world.outcome("get-1").await["outcome"];
        assert_eq!((&outcome["status"], &outcome["not_followed"]), (&0.into(), &true.into()));
        assert!(outcome["error"].is_null(), "{outcome}");
    }
    let series = format!(
        "kvroute_requests_total{{endpoint=\"{}\",status=\"unknown\",mode=\"pass-through\"}}",
        world.at(1)
    );
    assert_eq!(metric(&world.router, &series).await, 3.0);
}

/// Hermetic case "passthrough parser".
#[tokio::test]
async fn bodies_that_no_parser_reads_go_by_load() {
    let yaml = USUAL.replace("openai-parser", "passthrough-parser");
    let world = world(&yaml, PODS).await;
    for body in ["passthrough-parser", "{\"model\"", ""] {
        let (mut call, answer) = world.post(&[], body).await;
        assert_eq!(destination(&answer), world.at(1), "{body}");
        assert_eq!(call.request_body(true).await.0, body.as_bytes());
        call.ends().await;
    }
    world.is_at_rest().await;
}

/// Hermetic cases "subset": the best of the list, the rest of it, nobody. Data planes give a list
/// or one text with commas. Difference 104: llm-d compares the IP alone.
#[tokio::test]
async fn a_subset_of_the_endpoints() {
    let world = usual().await;
    let ip = |at: usize| world.at(at);
    let all = format!("{},{}, {}", ip(0), ip(1), ip(2));
    let list = |of: &[usize]| of.iter().map(|at| ip(*at).as_str().into()).collect::<Vec<_>>();
    let table: [(&str, crate::envoy::Value, Option<usize>); 11] = [
        ("all", list(&[0, 1, 2]).into(), Some(1)),
        ("without the best", list(&[0, 2]).into(), Some(0)),
        ("one", list(&[2]).into(), Some(2)),
        ("known and unknown", vec![ip(2).as_str().into(), "10.9.9.9:1".into()].into(), Some(2)),
        ("unknown only", vec!["10.9.9.9:1".into()].into(), None),
        ("empty list", Vec::new().into(), None),
        ("text", all.as_str().into(), Some(1)),
        ("text with one", ip(2).as_str().into(), Some(2)),
        ("empty text", "".into(), None),
        ("an address without a port", "127.0.1.3".into(), Some(2)),
        ("a number", 7.0.into(), None),
    ];
    for (case, hint, expected) in table {
        for with_body in [true, false] {
            let case = format!("{case}, body: {with_body}");
            let mut call = world.client.open();
            let headers = request_headers(&post(&[]), !with_body);
            call.send(headers.metadata(SUBSET, subset(hint.clone())));
            if with_body {
                let body = request_body(completion("m", &case), true);
                call.send(body.metadata(SUBSET, subset(hint.clone())));
            }
            let answer = call.next().await;
            if let Some(expected) = expected {
                assert_eq!(destination(&answer), world.at(expected), "{case}");
                continue;
            }
            let refusal = refusal(answer);
            assert_eq!(refusal.status, 503, "{case}: {refusal:?}");
            let dropped = refusal.header("x-llm-d-request-dropped-reason");
            assert_eq!(dropped, Some("rejected-no-endpoints"), "{case}");
            call.ends().await;
        }
    }
    world.is_at_rest().await;
}

/// `--disable-endpoint-subset-filter`.
#[tokio::test]
async fn subsets_may_be_ignored() {
    let mut setup = Setup::default();
    setup.ext_proc.ignore_subset_hints = true;
    let world = setup.start().await;
    let mut call = world.client.open();
    let hint = subset(vec!["127.0.1.3".into()]);
    call.send(request_headers(&post(&[]), true).metadata(SUBSET, hint));
    assert_eq!(destination(&call.next().await), world.at(1));
}

/// A client cannot name its endpoint, or who prefills, or what was dropped.
#[tokio::test]
async fn control_headers_of_clients_are_overwritten_or_removed() {
    let world = usual().await;
    let spoofed = [
        ("x-gateway-destination-endpoint", "9.9.9.9:1"),
        ("x-gateway-destination-endpoint-subset", "9.9.9.9:1"),
        ("x-gateway-destination-endpoint-served", "9.9.9.9:1"),
        ("x-prefiller-host-port", "9.9.9.9:1"),
        ("x-encoder-hosts-ports", "9.9.9.9:1"),
        ("x-data-parallel-host-port", "9.9.9.9:1"),
        ("x-kv-cache-source-host-port", "9.9.9.9:1"),
        ("x-llm-d-request-dropped-reason", "none"),
    ];
    for with_body in [true, false] {
        let mut call = world.client.open();
        call.send(request_headers(&post(&spoofed), !with_body));
        if with_body {
            call.send(request_body(completion("m", "x"), true));
        }
        let answer = call.next().await;
        assert_eq!(destination(&answer), world.at(1));
        let removed = removed_headers(&answer);
        for (name, _) in &spoofed[1..] {
            assert!(removed.iter().any(|gone| gone == name), "{name} stays: {answer:?}");
        }
        let set = set_headers(&answer);
        assert!(!set.iter().any(|(_, value)| value.contains("9.9.9.9")), "{set:?}");
    }
    world.is_at_rest().await;
}

/// Other data planes take at most 64 KiB in a piece; llm-d cuts at 62,000 bytes.
#[tokio::test]
async fn long_bodies_come_back_in_short_pieces() {
    let world = usual().await;
    let body = completion("m", &text(300_000));
    let mut call = world.client.open();
    call.send(request_headers(&post(&[]), false));
    for piece in body.as_bytes().chunks(100_000) {
        call.send(request_body(piece, false));
    }
    call.send(request_body("", true));
    let length = body.len().to_string();
    let answer = call.next().await;
    assert!(set_headers(&answer).contains(&("content-length".to_owned(), length)), "{answer:?}");
    let (whole, pieces) = call.request_body(true).await;
    assert_eq!(whole, body.as_bytes());
    assert!(pieces.iter().all(|length| (1..=62_000).contains(length)), "{pieces:?}");
    assert_eq!(pieces.len(), body.len().div_ceil(62_000), "{pieces:?}");
}

/// llm-d's `Prefer: if-available`: an endpoint that has some of the prompt cached, or none.
#[tokio::test]
async fn from_cache_or_not_at_all() {
    let world = usual().await;
    let body = completion("m", &text(4_000));
    let prefer = [("prefer", "if-available")];
    let refusal = world.refused(&prefer, &body).await;
    assert_eq!(refusal.status, 412, "{refusal:?}");
    let (mut call, answer) = world.post(&[], &body).await;
    let first = destination(&answer);
    call.request_body(true).await;
    call.answered(200).await;
    let (_, answer) = world.post(&prefer, &body).await;
    assert_eq!(destination(&answer), first);
}

/// The prefix decides before a small difference of load.
#[tokio::test]
async fn a_prompt_goes_where_it_went_before() {
    let pods = [Pod(0, 0.1, &[]), Pod(0, 0.1, &[]), Pod(0, 0.1, &[])];
    let yaml = USUAL.replace("{type: lora-affinity-scorer}", "{type: active-request-scorer}");
    let world = Setup { yaml: &yaml, pods: &pods, settings: settings(), ..Setup::default() };
    let world = world.start().await;
    let prompt = text(8_000);
    let mut seen = Vec::new();
    for turn in 0..4 {
        let (mut call, answer) =
            world.post(&[], &completion("m", &format!("{prompt} turn {turn}"))).await;
        seen.push(destination(&answer));
        call.request_body(true).await;
        call.answered(200).await;
        world.is_at_rest().await;
    }
    seen.dedup();
    assert_eq!(seen.len(), 1, "{seen:?}");
}

/// A later message without the hint does not widen the choice.
#[tokio::test]
async fn a_hint_stays_when_later_messages_leave_it_out() {
    let world = usual().await;
    let hint = subset(vec![world.at(2).as_str().into()]);
    for other in [None, Some("envoy.filters.http.rbac")] {
        let mut call = world.client.open();
        call.send(request_headers(&post(&[]), false).metadata(SUBSET, hint.clone()));
        let mut body = request_body(completion("m", "x"), true);
        if let Some(other) = other {
            body = body.metadata(other, crate::envoy::field("rule", "allowed"));
        }
        call.send(body);
        assert_eq!(destination(&call.next().await), world.at(2), "{other:?}");
    }
    world.is_at_rest().await;
}

/// A picker that offers several endpoints: the best first, in the header and in the metadata.
#[tokio::test]
async fn endpoints_to_fall_back_on() {
    let yaml = "
plugins:
- {type: queue-scorer}
- {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}
";
    let world = world(yaml, PODS).await;
    let (_, answer) = world.post(&[], &completion("m", "x")).await;
    assert_eq!(destination(&answer), format!("{},{}", world.at(1), world.at(0)));
    world.is_at_rest().await;
}

/// Ids that clients give are kept; without one the request gets a new one, on both sides.
#[tokio::test]
async fn request_ids() {
    let world = usual().await;
    let (mut call, answer) = world.post(&[], &completion("m", "x")).await;
    let headers = set_headers(&answer);
    let id = headers.iter().find(|(name, _)| name == "x-request-id").expect("an id");
    assert_eq!(id.1.len(), 36);
    call.request_body(true).await;
    call.send(response_headers(&[(":status", "200")], true));
    assert!(set_headers(&call.next().await).contains(id));
    call.reset().await;
    world.outcome(&id.1).await;
    // Usage cannot be read of what is compressed.
    let (_, answer) = world.post(&[("accept-encoding", "gzip")], &completion("m", "x")).await;
    assert_eq!(removed_headers(&answer), ["accept-encoding"]);
    world.is_at_rest().await;
}
