//! Who may be chosen, who is, and what the client hears when nobody can be.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use bytes::Bytes;
use http::Version;
use kvroute_core::plan::Plan;
use kvroute_lab::engine::EngineHandle;
use kvroute_router::RouterHandle;
use serde_json::Value;

use crate::client::{Client, Reply, completion, get, post, send};
use crate::support::{admin, prompt};
use crate::upstream::{SERVED_BY, Upstream, whole};
use crate::{Setup, Stack, support};

/// A filter in front that turns headers of a test into the metadata of a data plane: candidates
/// as one text, and as a list (a `google.protobuf.Value`, base64).
fn subset_filter() -> String {
    let to = "metadata_namespace: envoy.lb.subset_hint, key: x-gateway-destination-endpoint-subset";
    let config = "envoy.extensions.filters.http.header_to_metadata.v3.Config";
    format!(
        "          - name: subsets
            typed_config:
              '@type': type.googleapis.com/{config}
              request_rules:
              - {{header: x-subset-text, remove: true, on_header_present: {{{to}}}}}
              - header: x-subset-list
                remove: true
                on_header_present: {{{to}, type: PROTOBUF_VALUE, encode: BASE64}}"
    )
}

/// A length-delimited field of protobuf; all of these are short.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
    field.extend_from_slice(bytes);
    field
}

/// A list of texts as `google.protobuf.Value` (`list_value` = 6, `string_value` = 3), base64.
fn list(items: &[String]) -> String {
    let values: Vec<u8> =
        items.iter().flat_map(|item| field(1, &field(3, item.as_bytes()))).collect();
    base64(&field(6, &values))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let mut block = [0; 4];
        block[1..=three.len()].copy_from_slice(three);
        let bits = u32::from_be_bytes(block);
        for digit in 0..4 {
            let at = (bits >> (18 - 6 * digit)) & 63;
            text.push(if digit <= three.len() { DIGITS[at as usize] as char } else { '=' });
        }
    }
    text
}

async fn upstreams<const N: usize>() -> ([Upstream; N], [SocketAddr; N]) {
    let mut all = Vec::new();
    for _ in 0..N {
        all.push(Upstream::start().await);
    }
    let all: [Upstream; N] = all.try_into().unwrap_or_else(|_| unreachable!("as many as asked"));
    let addrs = all.each_ref().map(|upstream| upstream.addr);
    (all, addrs)
}

async fn ask(stack: &Stack, headers: &[(&str, &str)]) -> Reply {
    send(stack.http, post("/v1/completions", completion("Who serves this?"), headers)).await
}

/// What the router notes about an answered request. Envoy gives its requests ids of its own.
pub(crate) async fn decision_about(router: &RouterHandle, reply: &Reply) -> Value {
    admin(router, &format!("/decisions/{}", reply.header("x-request-id"))).await
}

#[tokio::test]
async fn only_candidates_of_the_data_plane_are_chosen() {
    let (_upstreams, addrs) = upstreams::<3>().await;
    let setup = Setup::override_host(&addrs).filters(&subset_filter());
    let Some(stack) = Stack::start(setup, &addrs).await else { return };
    let names = addrs.map(|addr| addr.to_string());
    for (header, pair, one) in [
        ("x-subset-text", names[..2].join(","), names[2].clone()),
        ("x-subset-list", list(&names[..2]), list(&names[2..])),
    ] {
        let mut served = BTreeSet::new();
        for _ in 0..20 {
            let reply = ask(&stack, &[(header, &pair)]).await;
            assert_eq!(reply.status, 200, "{header}: {}", reply.text());
            served.insert(reply.header(SERVED_BY).to_owned());
        }
        let both: BTreeSet<String> = names[..2].iter().cloned().collect();
        assert_eq!(served, both, "{header}");
        for _ in 0..3 {
            assert_eq!(ask(&stack, &[(header, &one)]).await.header(SERVED_BY), names[2]);
            // Without a body too.
            let reply = send(stack.http, get("/v1/models", &[(header, &one)])).await;
            assert_eq!(reply.header(SERVED_BY), names[2], "{header}");
        }
    }
    stack.unharmed().await;
}

#[tokio::test]
async fn without_a_candidate_there_is_an_answer() {
    let (upstreams, addrs) = upstreams::<1>().await;
    let setup = Setup::override_host(&addrs).filters(&subset_filter());
    let Some(stack) = Stack::start(setup, &addrs).await else { return };
    for (header, value) in [
        ("x-subset-text", "192.0.2.1:8000".to_owned()),
        ("x-subset-list", list(&["192.0.2.1:8000".to_owned()])),
        ("x-subset-list", list(&[])),
    ] {
        let reply = ask(&stack, &[(header, &value)]).await;
        assert_eq!(reply.status, 503, "{header}: {}", reply.text());
        let reason = reply.header("x-llm-d-request-dropped-reason");
        assert_eq!(reason, "rejected-no-endpoints", "{header}");
        let reply = send(stack.http, get("/v1/models", &[(header, &value)])).await;
        assert_eq!(reply.status, 503, "{header}: {}", reply.text());
    }
    assert!(upstreams[0].seen().is_empty());
    stack.unharmed().await;
}

#[tokio::test]
async fn a_router_without_endpoints_says_so() {
    let Some(stack) = Stack::start(Setup::standalone(), &[]).await else { return };
    let reply = ask(&stack, &[]).await;
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert_eq!(send(stack.http, get("/v1/models", &[])).await.status, 503);
    stack.unharmed().await;
}

#[tokio::test]
async fn a_client_cannot_choose_an_address() {
    let (upstreams, addrs) = upstreams::<2>().await;
    let decoy = addrs[1].to_string();
    // With and without Envoy's own protection; only the first endpoint is the router's.
    for setup in [Setup::standalone().without("strip"), Setup::standalone()] {
        let Some(stack) = Stack::start(setup, &addrs[..1]).await else { return };
        let spoofed = [("x-gateway-destination-endpoint", decoy.as_str())];
        assert_eq!(ask(&stack, &spoofed).await.header(SERVED_BY), addrs[0].to_string());
        let reply = send(stack.http, get("/v1/models", &spoofed)).await;
        assert_eq!(reply.header(SERVED_BY), addrs[0].to_string());
        stack.unharmed().await;
    }
    assert!(upstreams[1].seen().is_empty());
}

#[tokio::test]
async fn what_cannot_be_read_is_refused() {
    let (upstreams, addrs) = upstreams::<1>().await;
    let setup = Setup::standalone().settings("body_bytes_max: 100000");
    let Some(stack) = Stack::start(setup, &addrs).await else { return };
    let long = vec![b'a'; 100_001];
    let cases: [(&str, &[u8], u16); 4] = [
        ("no JSON", b"no healthy upstream", 400),
        ("half of it", b"{\"model\": \"demo\", \"prompt\": \"", 400),
        ("no model", b"{\"prompt\": \"hello world\"}", 400),
        ("too long", &long, 413),
    ];
    for (case, body, status) in cases {
        let body = whole(Bytes::copy_from_slice(body));
        let reply = send(stack.http, post("/v1/completions", body, &[])).await;
        assert_eq!(reply.status, status, "{case}: {}", reply.text());
        assert_eq!(reply.header("content-type"), "application/json", "{case}");
        let error: Value = serde_json::from_slice(&reply.body).unwrap();
        assert!(!error["error"]["message"].as_str().unwrap().is_empty(), "{case}: {error}");
    }
    assert!(upstreams[0].seen().is_empty());
    // The connection and the router go on.
    assert_eq!(ask(&stack, &[]).await.status, 200);
    stack.unharmed().await;
}

#[tokio::test]
async fn what_envoy_answers_itself_is_no_fault() {
    let (upstreams, addrs) = upstreams::<1>().await;
    let Some(stack) = Stack::start(Setup::standalone(), &addrs).await else { return };
    // The picker hears only of Envoy's own answer: there is no request phase.
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let request = get("/v1%2Fmodels", &[]);
        let reply = Client::connect(stack.http, version).await.send(request).await.unwrap();
        assert_eq!((reply.status, reply.header("location")), (307, "/v1/models"), "{reply:?}");
        // Envoy hangs up before the picker can say anything to this one.
        let request = get("/v1/models", &[("x_under_score", "1")]);
        let reply = Client::connect(stack.http, version).await.send(request).await;
        assert!(reply.is_err(), "{reply:?}");
    }
    assert!(upstreams[0].seen().is_empty());
    assert_eq!(ask(&stack, &[]).await.status, 200);
    stack.unharmed().await;
}

#[tokio::test]
async fn the_endpoint_that_served_is_the_one_that_counts() {
    let (_upstreams, addrs) = upstreams::<1>().await;
    let gone = kvroute::envoy::free_port().unwrap();
    // The second is where the router was told that one is; nothing listens there.
    let all = [addrs[0], gone];
    let Some(binary) = crate::binary() else { return };
    let setup = Setup::override_host(&all);
    let router =
        kvroute_router::start(crate::picker(setup.plan.clone(), false, &all)).await.unwrap();
    support::wait_until("one endpoint is known", || {
        router.brain().fleet().iter().any(|endpoint| endpoint.metrics().is_some())
    })
    .await;
    let envoy = setup.envoy(&binary, router.ext_proc_addr().unwrap()).await;
    let stack = Stack { http: envoy.http_addr().unwrap(), envoy, router };
    for _ in 0..10 {
        let reply = ask(&stack, &[]).await;
        assert_eq!((reply.status, reply.header(SERVED_BY)), (200, addrs[0].to_string().as_str()));
        stack.settled().await;
        let decision = decision_about(&stack.router, &reply).await;
        assert_eq!(decision["outcome"]["endpoint"], addrs[0].to_string(), "{decision}");
    }
    stack.unharmed().await;
}

/// Tokens that prompts had, and that engines had already.
#[derive(Debug, Default, PartialEq)]
struct Hits {
    prompt_tokens: u64,
    cached_tokens: u64,
}

impl Hits {
    fn ratio(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens as f64
    }
}

/// The same questions to new engines and a new router through a door of it: groups that share a
/// prefix, asked in turn, each answer and its events awaited.
async fn hits_through(door: SocketAddr, router: &RouterHandle, engines: &[EngineHandle]) -> Hits {
    let mut client = Client::connect(door, Version::HTTP_11).await;
    let mut hits = Hits::default();
    for (question, group) in (0..5).flat_map(|q| (0..6).map(move |g| (q, g))) {
        let request = post("/v1/completions", completion(&prompt(group, question)), &[]);
        let reply = client.send(request).await.unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
        support::settled(router, &engines.iter().collect::<Vec<_>>()).await;
        support::wait_until("the answer is accounted", || router.inflight() == 0).await;
        let usage = &serde_json::from_slice::<Value>(&reply.body).unwrap()["usage"];
        let cached = &usage["prompt_tokens_details"]["cached_tokens"];
        let decision = decision_about(router, &reply).await;
        assert_eq!(&decision["outcome"]["delivered_tokens"], cached, "{decision}");
        hits.prompt_tokens += usage["prompt_tokens"].as_u64().unwrap();
        hits.cached_tokens += cached.as_u64().unwrap();
    }
    hits
}

#[tokio::test]
async fn precise_routing_hits_as_often_as_through_the_embedded_proxy() {
    let Some(binary) = crate::binary() else { return };
    let mut found = Vec::new();
    for behind_envoy in [false, true] {
        let engines = [support::engine().await, support::engine().await, support::engine().await];
        let flags: Vec<String> = engines.iter().map(support::flag).collect();
        let mut config = support::config(Plan::precise(), &flags);
        if behind_envoy {
            let picker = crate::picker(Plan::precise(), false, &[]);
            (config.http, config.ext_proc) = (None, picker.ext_proc);
        }
        let router = support::router(config, &engines).await;
        if !behind_envoy {
            found.push(hits_through(router.http_addr(), &router, &engines).await);
            continue;
        }
        let envoy = Setup::standalone().envoy(&binary, router.ext_proc_addr().unwrap()).await;
        let stack = Stack { http: envoy.http_addr().unwrap(), envoy, router };
        found.push(hits_through(stack.http, &stack.router, &engines).await);
        stack.unharmed().await;
    }
    let [proxy, envoy] = &found[..] else { unreachable!("two doors") };
    assert!(proxy.ratio() > 0.6, "{found:?}");
    assert!((proxy.ratio() - envoy.ratio()).abs() < 0.02, "{found:?}");
}
