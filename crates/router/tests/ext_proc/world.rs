//! A router with an ext_proc server over engines that say how busy they are.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::net::SocketAddr;

use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_core::settings::Settings;
use kvroute_router::{ExtProcConfig, RouterConfig, RouterHandle, UpstreamNames};

use crate::client::*;
use crate::envoy::*;
use crate::support::{self, Mock, admin_json, eventually, ready, settings};

/// What an engine's metrics say: waiting requests, KV cache usage, running adapters.
#[derive(Clone, Copy)]
pub struct Pod(pub u32, pub f64, pub &'static [&'static str]);

impl Pod {
    /// Full with the adapters that it has, so that there is no room for another one.
    fn page(&self) -> String {
        let Pod(waiting, usage, adapters) = self;
        let lora = match adapters.len() {
            0 => String::new(),
            full => format!(
                "vllm:lora_requests_info{{max_lora=\"{full}\",running_lora_adapters=\"{}\",\
                 waiting_lora_adapters=\"\"}} 1.7e9\n",
                adapters.join(",")
            ),
        };
        format!(
            "vllm:num_requests_running 0\nvllm:num_requests_waiting {waiting}\n\
             vllm:kv_cache_usage_perc {usage}\n{lora}"
        )
    }
}

/// The scorers and the parser of llm-d's hermetic tests, weights 1.
pub const USUAL: &str = "
plugins:
- {type: queue-scorer}
- {type: kv-cache-utilization-scorer}
- {type: prefix-cache-scorer}
- {type: lora-affinity-scorer}
- {type: openai-parser}
requestHandler: {parsers: [{pluginRef: openai-parser}]}
kvroute: {objectives: {urgent: 2, batch: -1}}
";

/// Endpoint 1 is the best by load.
pub const PODS: &[Pod] = &[Pod(3, 0.2, &[]), Pod(0, 0.1, &[]), Pod(10, 0.2, &[])];

pub struct World {
    pub engines: Vec<Mock>,
    pub router: RouterHandle,
    pub client: Client,
}

/// What differs from a usual router.
pub struct Setup<'a> {
    pub yaml: &'a str,
    pub pods: &'a [Pod],
    /// `llm-d.ai/role` of each engine.
    pub roles: &'a [&'a str],
    pub settings: Settings,
    pub ext_proc: ExtProcConfig,
    /// llm-d's metrics.
    pub names: Option<UpstreamNames>,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        let ext_proc = ExtProcConfig::plain("127.0.0.1:0".parse().unwrap());
        Setup { yaml: USUAL, pods: PODS, roles: &[], settings: settings(), ext_proc, names: None }
    }
}

pub async fn usual() -> World {
    Setup::default().start().await
}

pub async fn world(yaml: &str, pods: &[Pod]) -> World {
    Setup { yaml, pods, ..Setup::default() }.start().await
}

impl Setup<'_> {
    pub async fn start(self) -> World {
        let mut engines = Vec::new();
        for (at, pod) in self.pods.iter().enumerate() {
            let mock = Mock::start_at(SocketAddr::from(([127, 0, 1, at as u8 + 1], 0))).await;
            *mock.state.metrics.lock() = Some(pod.page());
            *mock.state.models.lock() = r#"{"data":[]}"#.to_owned();
            engines.push(mock);
        }
        let addresses: Vec<SocketAddr> = engines.iter().map(|engine| engine.addr).collect();
        let mut config: EndpointPickerConfig =
            kvroute_wire::config::parse(self.yaml, "test.yaml").unwrap();
        let objectives = config.kvroute.limits.objectives.clone();
        config.kvroute = Settings { objectives, ..self.settings.clone() }.into();
        let mut start = RouterConfig {
            plan: Plan::build(&config, Experimental::Allowed).unwrap(),
            http: None,
            ext_proc: Some(self.ext_proc),
            upstream_metric_names: self.names,
            ..support::config(&addresses, self.settings)
        };
        for (flag, role) in start.endpoints.iter_mut().zip(self.roles) {
            flag.labels.insert("llm-d.ai/role".into(), (*role).into());
        }
        let router = kvroute_router::start(start).await.unwrap();
        ready(&router, engines.len()).await;
        let client = Client::connect(router.ext_proc_addr().unwrap()).await;
        World { engines, router, client }
    }
}

impl World {
    /// `ip:port` of an engine.
    pub fn at(&self, engine: usize) -> String {
        self.engines[engine].addr.to_string()
    }

    /// Nothing is under way any more.
    pub async fn is_at_rest(&self) {
        eventually("no request is under way", || {
            self.router.inflight() == 0 && self.router.brain().inflight_requests() == 0
        })
        .await;
    }

    /// What became of a request, once it is over.
    pub async fn outcome(&self, request_id: &str) -> serde_json::Value {
        let until = tokio::time::Instant::now() + support::LONG;
        loop {
            let page = admin_json(&self.router, &format!("/decisions/{request_id}")).await;
            if page["outcome"].is_object() {
                return page;
            }
            assert!(tokio::time::Instant::now() < until, "never over: {page}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// A stream on which a POST with this body has begun and is answered.
    pub async fn post(&self, headers: &[(&str, &str)], body: &str) -> (Call, ProcessingResponse) {
        let mut call = self.client.open();
        call.send(request_headers(&post(headers), false));
        call.send(request_body(body, true));
        let answer = call.next().await;
        (call, answer)
    }

    /// The same, refused.
    pub async fn refused(&self, headers: &[(&str, &str)], body: &str) -> Refusal {
        let (mut call, answer) = self.post(headers, body).await;
        let refusal = refusal(answer);
        call.ends().await;
        refusal
    }
}

/// The headers of a POST as Envoy sends them, with these in addition; a pseudo header among them
/// takes the place of the usual one.
pub fn post<'a>(headers: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let usual = [
        (":authority", "gateway"),
        (":path", "/v1/completions"),
        (":method", "POST"),
        (":scheme", "http"),
        ("content-type", "application/json"),
    ];
    let replaced = |name: &str| headers.iter().any(|(other, _)| *other == name);
    let mut all: Vec<_> = usual.into_iter().filter(|(name, _)| !replaced(name)).collect();
    all.extend_from_slice(headers);
    all
}

/// A completion for this model, written as a client might.
pub fn completion(model: &str, prompt: &str) -> String {
    format!(
        "{{\"model\": \"{model}\",\"prompt\": \"{prompt}\",\"max_tokens\":100,\"temperature\":0}}"
    )
}

/// The subset hint that a data plane gives.
pub fn subset(value: impl Into<Value>) -> Struct {
    field("x-gateway-destination-endpoint-subset", value)
}

/// Where `subset` belongs.
pub const SUBSET: &str = "envoy.lb.subset_hint";

/// A text of the given length that differs everywhere.
pub fn text(length: usize) -> String {
    (0..).flat_map(|n: u32| format!("{n} ").into_bytes()).take(length).map(char::from).collect()
}
