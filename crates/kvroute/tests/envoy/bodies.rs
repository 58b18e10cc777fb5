//! Does every body arrive as it was sent, on both ways?

use bytes::Bytes;
use http::{Method, Request, Version};
use http_body_util::BodyExt;
use hyper::body::Frame;
use kvroute_core::Rng;

use crate::client::{Client, chunked, completion, completion_text, get, next, open, post, send};
use crate::upstream::{AnyBody, EVENTS, STREAM, TRAILER, TRAILERS, Upstream, WISH, event, whole};
use crate::{Setup, Stack};

const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

fn noise(length: usize) -> Bytes {
    let mut rng = Rng::seeded(length as u64);
    (0..length).map(|_| rng.next_u64().to_le_bytes()[0]).collect()
}

/// A completion of exactly this many bytes, most of them in a field that nobody reads, in a form
/// that no serializer writes.
fn completion_of(length: usize) -> Bytes {
    let head = "{ \"n\" :1.50e1,\"x\":9007199254740993, \"model\":\"demo\", \
                \"prompt\":\"\\u0068i\", \"x\":\"";
    let tail = "<&>\\u00e9 \u{e9}\"\n}";
    let filler = length - head.len() - tail.len();
    format!("{head}{}{tail}", "a".repeat(filler)).into()
}

/// Sends and compares; the body in one piece with its length told, or in pieces without.
async fn echoes(client: &mut Client, upstream: &Upstream, path: &str, body: Bytes, pieces: usize) {
    let sent: AnyBody = match pieces {
        0 => whole(body.clone()),
        size => chunked(body.chunks(size).map(Bytes::copy_from_slice).collect()),
    };
    let reply = client.send(post(path, sent, &[])).await.unwrap();
    let case = format!("{path}, {} bytes, pieces of {pieces}", body.len());
    assert_eq!(reply.status, 200, "{case}: {}", reply.text());
    let seen = upstream.seen().pop().unwrap();
    assert!(seen.body == body, "{case}: {} bytes reached the model server", seen.body.len());
    assert!(reply.body == body, "{case}: {} bytes came back", reply.body.len());
    assert_eq!(seen.target, path);
}

#[tokio::test]
async fn bodies_of_every_size_arrive_intact() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    for version in VERSIONS {
        let mut client = Client::connect(stack.http, version).await;
        for length in [10, 32_767, 32_768, 62_000, 62_001, 124_000, 1 << 20, 4 << 20] {
            echoes(&mut client, &upstream, "/any/thing?a=b", noise(length), 0).await;
        }
        for length in [200, 16_384, 100_000, 1 << 20, 4 << 20] {
            let body = completion_of(length);
            echoes(&mut client, &upstream, "/v1/completions", body, 0).await;
        }
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn bodies_in_pieces_arrive_intact() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    for version in VERSIONS {
        let mut client = Client::connect(stack.http, version).await;
        for (length, pieces) in [(10, 3), (100_000, 1_000), (300_000, 70_000), (4 << 20, 65_536)] {
            echoes(&mut client, &upstream, "/any/thing", noise(length), pieces).await;
        }
        for (length, pieces) in [(150, 1), (40_000, 777), (200_000, 16_384)] {
            let body = completion_of(length);
            echoes(&mut client, &upstream, "/v1/completions", body, pieces).await;
        }
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn requests_without_a_body_are_routed_like_any_other() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    for version in VERSIONS {
        let mut client = Client::connect(stack.http, version).await;
        for (method, path) in [
            (Method::GET, "/v1/models"),
            (Method::DELETE, "/v1/responses/1"),
            (Method::HEAD, "/health"),
            (Method::POST, "/reset_prefix_cache"),
            (Method::POST, "/v1/completions"),
        ] {
            let mut request = get(path, &[]);
            *request.method_mut() = method.clone();
            let reply = client.send(request).await.unwrap();
            assert_eq!(reply.status, 200, "{method} {path}: {}", reply.text());
            assert!(reply.body.is_empty(), "{method} {path}: {}", reply.text());
            let seen = upstream.seen().pop().unwrap();
            assert_eq!((&seen.method, seen.target.as_str()), (&method, path));
        }
    }
    let decisions = crate::support::admin(&stack.router, "/decisions?last=100").await;
    assert_eq!(decisions.as_array().unwrap().len(), 10, "{decisions}");
    stack.unharmed().await;
}

#[tokio::test]
async fn a_body_may_end_with_trailers() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    let mut client = Client::connect(stack.http, Version::HTTP_2).await;
    let (sender, body) = open();
    let text = completion_text("a prompt with trailers");
    let sent = Bytes::from(text.clone());
    tokio::spawn(async move {
        sender.send(Ok(Frame::data(sent))).await.unwrap();
        let trailers = [("x-checksum".parse().unwrap(), "1".parse().unwrap())];
        sender.send(Ok(Frame::trailers(trailers.into_iter().collect()))).await.unwrap();
    });
    let reply = client.send(post("/v1/completions", body, &[])).await.unwrap();
    assert_eq!((reply.status, reply.text()), (200, text));
    stack.unharmed().await;
}

#[tokio::test]
async fn an_answer_may_end_with_trailers() {
    let upstream = Upstream::start().await;
    let over_http2 = "connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}";
    let setup = Setup::override_host(&[upstream.addr]);
    let setup = setup.set("model-servers", "connect_timeout: 5s", over_http2);
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    let mut client = Client::connect(stack.http, Version::HTTP_2).await;
    for body in ["", "a prompt"] {
        let text = completion_text(body);
        let request = post("/v1/completions", whole(text.clone()), &[(WISH, TRAILERS)]);
        let answer = client.start(request).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(answer.trailers().unwrap()[TRAILER], "1");
        assert_eq!(answer.to_bytes(), text);
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn a_stream_is_passed_on_in_step() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    for version in VERSIONS {
        let mut client = Client::connect(stack.http, version).await;
        let request = post("/v1/completions", completion("Stream this."), &[(WISH, STREAM)]);
        let mut answer = client.start(request).await.unwrap();
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        // The model server goes on only when the client has seen what it said.
        for number in 0..EVENTS {
            upstream.allow(1);
            let mut got = Vec::new();
            while got.len() < event(number).len() {
                got.extend(next(answer.body_mut()).await.unwrap().expect("the stream goes on"));
            }
            assert_eq!(String::from_utf8(got).unwrap(), event(number), "{version:?}");
        }
        while let Some(rest) = next(answer.body_mut()).await.unwrap() {
            assert!(rest.is_empty(), "{version:?}: {rest:?}");
        }
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn many_streams_at_once() {
    const STREAMS: usize = 32;
    let upstreams = [Upstream::start().await, Upstream::start().await];
    let endpoints = upstreams.each_ref().map(|upstream| upstream.addr);
    let Some(stack) = Stack::start(Setup::standalone(), &endpoints).await else { return };
    let expected: String = (0..EVENTS).map(event).collect();
    let http = stack.http;
    let clients: Vec<_> = (0..STREAMS)
        .map(|i| {
            tokio::spawn(async move {
                let mut client = Client::connect(http, VERSIONS[i % 2]).await;
                let path = "/v1/completions";
                let body = whole(completion_of(200 + 7_000 * i));
                let streamed = client.send(post(path, body, &[(WISH, STREAM)])).await.unwrap();
                let long = completion_of(60_000 + i);
                let echoed = client.send(post(path, whole(long.clone()), &[])).await.unwrap();
                assert!(echoed.body == long, "{i}");
                streamed.text()
            })
        })
        .collect();
    crate::support::wait_until("every stream is under way", || {
        upstreams.iter().map(|upstream| upstream.seen().len()).sum::<usize>() == STREAMS
    })
    .await;
    assert_eq!(stack.router.inflight() as usize, STREAMS);
    upstreams.iter().for_each(|upstream| upstream.allow(STREAMS * EVENTS));
    for client in clients {
        assert_eq!(client.await.unwrap(), expected);
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn many_streams_over_one_connection() {
    const STREAMS: usize = 32;
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    let mut client = Client::connect(stack.http, Version::HTTP_2).await;
    let mut answers = Vec::new();
    upstream.allow(STREAMS * EVENTS);
    for i in 0..STREAMS {
        let body = whole(completion_of(300 + 3_000 * i));
        let request = post("/v1/completions", body, &[(WISH, STREAM)]);
        answers.push(client.start(request).await.unwrap());
    }
    let expected: String = (0..EVENTS).map(event).collect();
    for answer in answers {
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(String::from_utf8_lossy(&body), expected);
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn headers_arrive_as_they_were_sent() {
    let upstream = Upstream::start().await;
    let Some(stack) = Stack::start(Setup::standalone(), &[upstream.addr]).await else { return };
    let sent = [
        ("authorization", "Bearer t"),
        ("x-some-header", "a, b;q=\u{e9}"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("x-llm-d-inference-objective", "gold"),
        ("x-prefiller-host-port", "192.0.2.1:1"),
        ("x-gateway-destination-endpoint-subset", "192.0.2.1:1"),
    ];
    let mut request: Request<AnyBody> = post("/v1/completions", completion("Hello"), &[]);
    for (name, value) in sent {
        let value = http::HeaderValue::from_bytes(value.as_bytes()).unwrap();
        request.headers_mut().append(name, value);
    }
    let mut client = Client::connect(stack.http, Version::HTTP_11).await;
    assert_eq!(client.send(request).await.unwrap().status, 200);
    let seen = upstream.seen().remove(0);
    for (name, value) in &sent[..3] {
        let found: Vec<&[u8]> = seen.headers.get_all(*name).iter().map(|v| v.as_bytes()).collect();
        assert_eq!(found, [value.as_bytes()], "{name}");
    }
    let target = seen.headers["x-gateway-destination-endpoint"].to_str().unwrap();
    assert_eq!(target, upstream.addr.to_string());
    assert!(!seen.headers.contains_key("x-prefiller-host-port"), "{seen:?}");
    assert_eq!(send(stack.http, get("/v1/models", &[])).await.status, 200);
    stack.unharmed().await;
}

#[tokio::test]
async fn another_model_changes_its_name_and_nothing_else() {
    let upstream = Upstream::start().await;
    let rule = "model_rewrites: [{name: r, matches: [{model: demo}], \
        targets: [{model: a-much-longer-name}]}]";
    let setup = Setup::standalone().settings(rule);
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    for version in VERSIONS {
        let mut client = Client::connect(stack.http, version).await;
        for length in [200, 32_768, 100_000, 1 << 20] {
            let sent = completion_of(length);
            let request = post("/v1/completions", whole(sent.clone()), &[]);
            let reply = client.send(request).await.unwrap();
            assert_eq!(reply.status, 200, "{}", reply.text());
            let text = String::from_utf8(sent.to_vec()).unwrap();
            let renamed = text.replacen("\"demo\"", "\"a-much-longer-name\"", 1);
            let seen = upstream.seen().pop().unwrap();
            assert!(seen.body == renamed, "{length} bytes: the model server saw something else");
            // What comes back has the client's name again.
            assert!(reply.body == sent, "{length} bytes: something else came back");
        }
    }
    stack.unharmed().await;
}
