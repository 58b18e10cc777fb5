//! What plugins say through the protocol: scores, sessions, who prefills, costs, who served.

use crate::client::*;
use crate::envoy::*;
use crate::world::*;

const JSON_HEADERS: &[(&str, &str)] = &[(":status", "200"), ("content-type", "application/json")];

/// Hermetic case "endpoint scores": the sum of the weighted scores of every candidate.
#[tokio::test]
async fn scores_of_all_candidates() {
    let yaml = "
plugins:
- {type: queue-scorer}
- {type: kv-cache-utilization-scorer}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer}
";
    for emit in [true, false] {
        let mut setup = Setup { yaml, ..Setup::default() };
        setup.ext_proc.emit_scores = emit;
        let world = setup.start().await;
        let (_call, answer) = world.post(&[], &completion("m", "x")).await;
        assert_eq!(destination(&answer), world.at(1));
        let metadata = answer.dynamic_metadata.unwrap();
        let Some(Kind::Struct(lb)) = metadata.fields["envoy.lb"].kind.clone() else { panic!() };
        let scores = lb.fields.get("x-gateway-destination-endpoint-scores");
        if !emit {
            assert_eq!(scores, None);
            continue;
        }
        let Some(Kind::Struct(scores)) = scores.and_then(|scores| scores.kind.clone()) else {
            panic!("no scores: {lb:?}");
        };
        assert_eq!(scores.fields.len(), 3);
        // Queues 3, 0, 10: (10 - q) / 10, twice; caches .2, .1, .2: what is free.
        for (at, expected) in [2.0 * 0.7 + 0.8, 2.0 + 0.9, 0.8].into_iter().enumerate() {
            let Some(Kind::Number(score)) = scores.fields[&world.at(at)].kind else { panic!() };
            assert!((score - expected).abs() < 1e-5, "{at}: {score} for {expected}");
        }
    }
}

/// Hermetic cases of session affinity with the header strategy: the token of an answer brings the
/// next request to the same endpoint, however busy it has become.
#[tokio::test]
async fn sessions_come_back() {
    for plugin in ["session-affinity-filter", "session-affinity-scorer"] {
        let yaml = format!(
            "
plugins: [{{type: queue-scorer}}, {{type: {plugin}}}]
schedulingProfiles:
- name: default
  plugins:
  - {{pluginRef: queue-scorer}}
  - {{pluginRef: {plugin}{}}}
",
            if plugin.ends_with("scorer") { ", weight: 9" } else { "" }
        );
        let world = world(&yaml, PODS).await;
        // A first request that had no choice.
        let mut call = world.client.open();
        let body = completion("m", "x");
        let hint = subset(vec!["127.0.1.3".into()]);
        call.send(request_headers(&post(&[]), false).metadata(SUBSET, hint));
        call.send(request_body(&body, true));
        assert_eq!(destination(&call.next().await), world.at(2));
        call.request_body(true).await;
        call.send(response_headers(JSON_HEADERS, false));
        let headers = set_headers(&call.next().await);
        let token = headers.iter().find(|(name, _)| name == "x-session-token");
        let token = token.unwrap_or_else(|| panic!("{plugin}: {headers:?}")).1.clone();
        call.send(response_body("{}", true));
        call.response_body(true).await;
        call.reset().await;
        let (_, answer) = world.post(&[("x-session-token", &token)], &body).await;
        assert_eq!(destination(&answer), world.at(2), "{plugin}");
        let (_, answer) = world.post(&[("x-session-token", "bm9ib2R5")], &body).await;
        assert_eq!(destination(&answer), world.at(1), "{plugin}");
    }
}

/// The decode endpoint is told who prefills, whatever the client says.
#[tokio::test]
async fn who_prefills() {
    let yaml = "
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- {type: always-disagg-pd-decider}
- {type: prefill-filter}
- {type: decode-filter}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";
    let setup = Setup { yaml, roles: &["decode", "prefill"], pods: &PODS[..2], ..Setup::default() };
    let world = setup.start().await;
    let spoofed = [("x-prefiller-host-port", "9.9.9.9:1"), ("x-encoder-hosts-ports", "9.9.9.9:1")];
    let (mut call, answer) = world.post(&spoofed, &completion("m", "x")).await;
    assert_eq!(destination(&answer), world.at(0));
    let prefill = ("x-prefiller-host-port".to_owned(), world.at(1));
    assert!(set_headers(&answer).contains(&prefill), "{answer:?}");
    let removed = removed_headers(&answer);
    assert!(removed.iter().any(|name| name == "x-encoder-hosts-ports"), "{answer:?}");
    assert!(!removed.contains(&prefill.0), "{answer:?}");
    call.request_body(true).await;
    call.answered(200).await;
    world.is_at_rest().await;
}

const REPORTER: &str = "
plugins:
- {type: queue-scorer}
- type: request-attribute-reporter
  parameters:
    attributes:
    - key: {name: x-gateway-inference-request-cost}
      expression: usage.completion_tokens
- {type: openai-parser}
requestHandler: {parsers: [{pluginRef: openai-parser}]}
";

/// Hermetic cases "request attribute reporter", JSON and SSE: the number stands beside the last
/// piece of the answer, and nowhere else.
#[tokio::test]
async fn costs_stand_beside_the_last_piece() {
    let world = world(REPORTER, PODS).await;
    let usage = r#"{"usage":{"prompt_tokens":7,"total_tokens":17,"completion_tokens":10}}"#;
    let sse = format!("data: {{}}\n\ndata: {usage}\n\ndata: [DONE]\n\n");
    let cost = field("envoy.lb", field("x-gateway-inference-request-cost", 10.0));
    for (kind, text) in [("application/json", usage), ("text/event-stream", &sse)] {
        for pieces in [1, 2, 3] {
            let (mut call, answer) = world.post(&[], &completion("m", "x")).await;
            destination(&answer);
            call.request_body(true).await;
            call.send(response_headers(&[(":status", "200"), ("content-type", kind)], false));
            assert_eq!(call.next().await.dynamic_metadata, None);
            let (half, rest) = text.split_at(text.len() / 2);
            match pieces {
                1 => call.send(response_body(text, true)),
                2 => {
                    call.send(response_body(half, false));
                    call.send(response_body(rest, true));
                }
                _ => {
                    call.send(response_body(text, false));
                    call.send(response_body("", true));
                }
            }
            let mut told = Vec::new();
            let mut whole = Vec::new();
            loop {
                let answer = call.next().await;
                told.push(answer.dynamic_metadata.clone());
                let (bytes, end) = piece(answer);
                whole.extend(bytes);
                if end {
                    break;
                }
            }
            assert_eq!(whole, text.as_bytes(), "{kind} {pieces}");
            let last = told.pop().flatten();
            assert_eq!(last.as_ref(), Some(&cost), "{kind} {pieces}");
            assert!(told.iter().all(Option::is_none), "{kind} {pieces}: {told:?}");
            call.reset().await;
        }
    }
    world.is_at_rest().await;
}

/// `destination-endpoint-served-verifier`: what conformance tests read.
#[tokio::test]
async fn who_served() {
    let yaml = "plugins: [{type: queue-scorer}, {type: destination-endpoint-served-verifier}]";
    let world = world(yaml, PODS).await;
    let served = field("x-gateway-destination-endpoint-served", "127.0.1.3:8000");
    let table = [
        (Some(served), "127.0.1.3:8000"),
        (Some(Struct::default()), "fail: missing destination endpoint served metadata"),
    ];
    for (metadata, expected) in table {
        let (mut call, answer) = world.post(&[], &completion("m", "x")).await;
        destination(&answer);
        call.request_body(true).await;
        let mut headers = response_headers(JSON_HEADERS, false);
        if let Some(metadata) = metadata {
            headers = headers.metadata("envoy.lb", metadata);
        }
        call.send(headers);
        let set = set_headers(&call.next().await);
        let name = "x-conformance-test-served-endpoint".to_owned();
        assert!(set.contains(&(name, expected.to_owned())), "{set:?}");
        call.send(response_body("{}", true));
        call.response_body(true).await;
        call.reset().await;
    }
    world.is_at_rest().await;
}

/// `header-based-testing-filter`: what conformance tests choose.
#[tokio::test]
async fn endpoints_that_a_test_chooses() {
    let yaml = "
plugins: [{type: header-based-testing-filter}, {type: destination-endpoint-served-verifier}]
schedulingProfiles:
- {name: conformance-profile, plugins: [{pluginRef: header-based-testing-filter}]}
";
    let world = world(yaml, PODS).await;
    for at in 0..3 {
        let ip = format!("127.0.1.{}", at + 1);
        for chosen in [ip.clone(), format!("10.0.0.1,{ip}"), world.at(at)] {
            let header = [("test-epp-endpoint-selection", chosen.as_str())];
            let (_, answer) = world.post(&header, &completion("m", "x")).await;
            assert_eq!(destination(&answer), world.at(at), "{chosen}");
        }
    }
    assert_eq!(world.refused(&[], &completion("m", "x")).await.status, 429);
}

mod grpc {
    //! vLLM's own gRPC methods, as far as they are asked here.

    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct TokenizedInput {
        #[prost(string, tag = "1")]
        pub original_text: String,
        #[prost(uint32, repeated, tag = "2")]
        pub input_ids: Vec<u32>,
    }

    /// `GenerateRequest` and `EmbedRequest`, which agree in these.
    #[derive(Clone, PartialEq, Message)]
    pub struct Request {
        #[prost(string, tag = "1")]
        pub request_id: String,
        #[prost(message, optional, tag = "2")]
        pub tokenized: Option<TokenizedInput>,
        #[prost(bool, tag = "5")]
        pub stream: bool,
    }

    /// A message in its frame.
    pub fn frame(message: &impl Message) -> Vec<u8> {
        let bytes = message.encode_to_vec();
        [&[0][..], &(bytes.len() as u32).to_be_bytes(), &bytes].concat()
    }

    pub fn request(ids: u32) -> Vec<u8> {
        let input_ids = (1..=ids).collect();
        let tokenized = TokenizedInput { original_text: "x".into(), input_ids };
        let request_id = "grpc-1".to_owned();
        frame(&Request { request_id, tokenized: Some(tokenized), stream: true })
    }

    /// The end of an answer: prompt, completion and cached tokens.
    #[derive(Clone, PartialEq, Message)]
    pub struct Complete {
        #[prost(uint32, tag = "3")]
        pub prompt_tokens: u32,
        #[prost(uint32, tag = "4")]
        pub completion_tokens: u32,
        #[prost(uint32, tag = "5")]
        pub cached_tokens: u32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct GenerateResponse {
        #[prost(message, optional, tag = "2")]
        pub complete: Option<Complete>,
    }
}

const GRPC: &str = "
plugins:
- {type: queue-scorer}
- {type: kv-cache-utilization-scorer}
- {type: vllmgrpc-parser}
requestHandler: {parsers: [{pluginRef: vllmgrpc-parser}]}
";

/// Hermetic cases of the vLLM gRPC parser: generate and embed, whole and split, ended by a piece
/// or by trailers; answers end with trailers, never with a piece.
#[tokio::test]
async fn grpc_methods() {
    let world = world(GRPC, PODS).await;
    let complete = grpc::Complete { prompt_tokens: 40, completion_tokens: 3, cached_tokens: 16 };
    let response = grpc::frame(&grpc::GenerateResponse { complete: Some(complete) });
    for method in ["Generate", "Embed"] {
        for (split, trailers) in [(false, false), (true, false), (false, true), (true, true)] {
            let path = format!("/vllm.grpc.engine.VllmEngine/{method}");
            let id = format!("{method}-{split}-{trailers}");
            let headers = [
                (":path", path.as_str()),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                ("x-request-id", &id),
            ];
            let body = grpc::request(40);
            let mut call = world.client.open();
            call.send(request_headers(&post(&headers), false));
            let cut = if split { 9 } else { 0 };
            if split {
                call.send(request_body(&body[..cut], false));
            }
            call.send(request_body(&body[cut..], !trailers));
            if trailers {
                call.send(request_trailers(&[]));
            }
            assert_eq!(destination(&call.next().await), world.at(1), "{id}");
            assert_eq!(call.request_body(!trailers).await.0, body, "{id}");
            if trailers {
                assert_eq!(call.next().await, request_trailers_answer(), "{id}");
            }
            let headers = [(":status", "200"), ("content-type", "application/grpc")];
            call.send(response_headers(&headers, false));
            set_headers(&call.next().await);
            call.send(response_body(&response, false));
            call.send(response_trailers(&[("grpc-status", "0")]));
            assert_eq!(call.response_body(false).await.0, response, "{id}");
            assert_eq!(call.next().await, response_trailers_answer(), "{id}");
            call.reset().await;
            let page = world.outcome(&id).await;
            assert_eq!(page["outcome"]["status"], 200, "{page}");
            if method == "Generate" {
                assert_eq!(page["outcome"]["prompt_tokens"], 40, "{page}");
                assert_eq!(page["outcome"]["delivered_tokens"], 16, "{page}");
            }
        }
    }
    world.is_at_rest().await;
}

/// A refusal of a gRPC request carries its gRPC status for the client.
#[tokio::test]
async fn refusals_of_grpc_methods() {
    let world = world(GRPC, PODS).await;
    let headers =
        [(":path", "/vllm.grpc.engine.VllmEngine/Generate"), ("content-type", "application/grpc")];
    let (mut call, answer) = world.post(&headers, "no frame").await;
    let Some(Response::ImmediateResponse(immediate)) = answer.response else { panic!() };
    assert_eq!(immediate.status.map(|status| status.code), Some(400));
    assert_eq!(immediate.grpc_status.map(|status| status.status), Some(3));
    call.ends().await;
    world.is_at_rest().await;
}
