//! What endpoints are told when several work for one request, and who is refused when all are busy.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;

use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_router::{RouterConfig, RouterHandle};
use support::*;

/// A router of this configuration over endpoints with roles.
async fn routed(name: &str, yaml: &str, endpoints: &[(SocketAddr, &str)]) -> RouterHandle {
    let config: EndpointPickerConfig = kvroute_wire::config::parse(yaml, "test.yaml").unwrap();
    let config = EndpointPickerConfig {
        kvroute: kvroute_core::settings::Settings {
            objectives: config.kvroute.limits.objectives.clone(),
            ..settings()
        }
        .into(),
        ..config
    };
    let plan = Plan::build(&config, Experimental::Allowed).unwrap();
    let file = listed(name, endpoints);
    let config =
        RouterConfig { plan, endpoints_file: Some(file), ..support::config(&[], settings()) };
    let router = kvroute_router::start(config).await.unwrap();
    for _ in 0..2_000 {
        let page = admin_json(&router, "/endpoints").await;
        if page.as_array().map_or(0, Vec::len) == endpoints.len() {
            return router;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("the endpoints never joined");
}

fn listed(name: &str, endpoints: &[(SocketAddr, &str)]) -> PathBuf {
    let entry = |(at, (addr, role)): (usize, &(SocketAddr, &str))| {
        let (host, port) = (addr.ip(), addr.port());
        format!(
            "- {{name: e{at}, address: {host}, port: \"{port}\", \
             labels: {{llm-d.ai/role: {role}}}}}\n"
        )
    };
    let entries: String = endpoints.iter().enumerate().map(entry).collect();
    let path = std::env::temp_dir().join(format!("kvroute-{name}-{}.yaml", std::process::id()));
    std::fs::write(&path, format!("endpoints:\n{entries}")).unwrap();
    path
}

#[tokio::test]
async fn the_decode_endpoint_is_told_who_prefills_whatever_the_client_says() {
    let (decode, prefill) = (Mock::start().await, Mock::start().await);
    let yaml = "
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- type: always-disagg-pd-decider
- type: prefill-filter
- type: decode-filter
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";
    let endpoints = [(decode.addr, "decode"), (prefill.addr, "prefill")];
    let router = routed("disagg", yaml, &endpoints).await;
    let spoofed = "x-prefiller-host-port: 9.9.9.9:1\r\nx-encoder-hosts-ports: 9.9.9.9:1\r\n\
                   x-request-id: pd-1\r\n";
    let got = send(router.http_addr(), post_with("/v1/completions", spoofed, COMPLETION)).await;
    assert_eq!(got.status, 200, "{got:?}");
    let seen = decode.seen().remove(0);
    assert_eq!(seen.header("x-prefiller-host-port"), Some(prefill.addr.to_string().as_str()));
    assert_eq!(seen.header("x-encoder-hosts-ports"), None);
    assert!(prefill.seen().is_empty(), "the sidecar calls it, not the router");
    let page = admin_json(&router, "/decisions/pd-1").await;
    assert_eq!(page["decision"]["others"][0]["step"], "prefill");
    assert_eq!(page["decision"]["others"][0]["endpoint"], "e1");
}

#[tokio::test]
async fn ranks_share_the_first_port_and_are_named_in_a_header() {
    let (front, rank) = (Mock::start().await, Mock::start().await);
    let yaml = format!(
        "plugins:
- {{type: data-parallel-profile-handler, parameters: {{primaryPort: {}}}}}
- type: decode-filter
- type: kvroute-round-robin-picker
",
        front.addr.port()
    );
    let endpoints = [(front.addr, "decode"), (rank.addr, "decode")];
    let router = routed("parallel", &yaml, &endpoints).await;
    for _ in 0..4 {
        works(&router).await;
    }
    let mut named: Vec<String> = front
        .seen()
        .iter()
        .map(|seen| seen.header("x-data-parallel-host-port").unwrap_or("none").to_owned())
        .collect();
    named.sort();
    named.dedup();
    let mut ranks = [front.addr.to_string(), rank.addr.to_string()];
    ranks.sort();
    assert_eq!(named, ranks);
    assert!(rank.seen().is_empty());
}

#[tokio::test]
async fn a_full_fleet_serves_only_who_matters() {
    let engine = Mock::start().await;
    *engine.state.metrics.lock() = Some(METRICS.replace("waiting{engine=\"0\"} 0", "waiting 9"));
    let yaml = "
plugins: [{type: queue-scorer}]
flowControl: {saturationDetector: {pluginRef: utilization-detector}}
kvroute: {objectives: {batch: -1, chat: 3}}
";
    let router = routed("shed", yaml, &[(engine.addr, "decode")]).await;
    let ask = async |objective: &str| {
        let header = format!("x-llm-d-inference-objective: {objective}\r\n");
        send(router.http_addr(), post_with("/v1/completions", &header, COMPLETION)).await
    };
    assert_eq!(ask("chat").await.status, 200);
    assert_eq!(ask("nobody").await.status, 200);
    let shed = ask("batch").await;
    assert_eq!(shed.status, 429);
    assert!(shed.body.contains("system saturated, sheddable request dropped"), "{}", shed.body);
    assert_eq!(shed.headers["x-llm-d-request-dropped-reason"], "rejected-saturated");
}

#[tokio::test]
async fn requests_that_arrive_together_wait_for_each_other() {
    let engines = [Mock::start().await, Mock::start().await];
    let yaml = "
plugins:
- {type: burst-prefix-cache-producer, parameters: {windowDurationMs: 300, blockSizeTokens: 4}}
- {type: prefix-cache-scorer, parameters:
    {prefixMatchInfoProducerName: burst-prefix-cache-producer}}
";
    let endpoints = [(engines[0].addr, "decode"), (engines[1].addr, "decode")];
    let router = routed("burst", yaml, &endpoints).await;
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "the same words ".repeat(20));
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..6 {
        requests.spawn(send(router.http_addr(), post("/v1/completions", &body)));
    }
    while let Some(got) = requests.join_next().await {
        assert_eq!(got.unwrap().status, 200);
    }
    let mut shares = [engines[0].seen().len(), engines[1].seen().len()];
    shares.sort_unstable();
    assert_eq!(shares, [0, 6]);
}
