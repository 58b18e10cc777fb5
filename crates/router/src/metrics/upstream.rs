//! What do dashboards made for llm-d read? Its metrics, prefix `llm_d_epp_`, beside our own, with
//! its names, types, labels and buckets; built only when asked for.
//!
//! What llm-d publishes and this does not stands in `docs/metrics.md`, with the reason.

mod flow;
mod meter;
mod pool;
mod streams;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;
use std::time::Duration;

use kvroute_core::decision::DecisionRecord;
use kvroute_core::fleet::Name;
use kvroute_core::identity::{DEFAULT_FLOW, FAIRNESS_HEADERS};
use kvroute_core::plan::{HandlerPlan, Plan, ProducerKind};
use kvroute_core::plugin::PluginSpec;
use kvroute_core::rewrite::ModelRewrite;
use kvroute_core::stage::Plugin;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use self::flow::{Buckets, Flow, Flows};
pub(crate) use self::meter::{MODEL_SERVER_ERROR, Meter, error_code};
use self::pool::Pool;
use self::streams::Streams;
use crate::config::UpstreamNames;

/// Bounds of times of the scheduler, in seconds.
const SCHEDULER: [f64; 10] = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1];
/// Bounds of the time that a request takes here, in seconds.
const REQUEST_PROCESSING: [f64; 16] =
    [5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Bounds of the time that an answer takes here, in seconds.
const RESPONSE_PROCESSING: [f64; 15] =
    [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// Bounds of shares.
const RATIOS: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
/// Bounds of lengths of prefixes, in bytes.
const PREFIX_BYTES: [f64; 14] = [
    0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0,
];
/// What llm-d takes for the length of a token, in bytes.
const BYTES_PER_TOKEN: f64 = 4.0;

/// A plugin.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginLabels {
    plugin_name: String,
    plugin_type: &'static str,
}

/// Which parts of the work were given away.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DisaggLabels {
    #[prometheus(flatten)]
    plugin: PluginLabels,
    model_name: String,
    decision_type: &'static str,
}

/// A rule, and what it made of which model.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RewriteLabels {
    model_rewrite_name: String,
    model_name: String,
    target_model: String,
}

/// What runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InfoLabels {
    commit: &'static str,
    build_ref: &'static str,
}

/// A source of numbers about endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source_type: String,
}

/// A source, and what reads its pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExtractorLabels {
    source_type: String,
    extractor_type: String,
}

/// What is known about a decision where it is counted.
pub(crate) struct Decided<'a> {
    /// As the client names the model.
    pub model: &'a str,
    /// What it stands for.
    pub target: &'a str,
    /// The rule that says so; empty: none.
    pub rule: &'a str,
    pub fairness_id: &'a str,
    pub priority: i32,
    /// Of the request; 0 when it was not read.
    pub body_bytes: usize,
    /// Tokens in a block of the index; `None`: the prompt was not looked up.
    pub block_tokens: Option<u32>,
    /// That the decision took.
    pub took: Duration,
}

/// llm-d's metrics.
pub(crate) struct UpstreamMetrics {
    registry: Registry,
    flows: Flows,
    pool: Pool,
    /// Headers that name a flow, lower case, the one that goes first at the front.
    flow_headers: Vec<String>,
    request_processing: Histogram,
    response_processing: Histogram,
    scheduling: Histogram,
    /// Share and length of prefixes; `None`: the plan looks for none.
    prefix: Option<(Histogram, Histogram)>,
    /// The plan gives parts of the work away.
    disagg: Option<Family<DisaggLabels, Counter>>,
    /// Where they are asked for.
    streams: Option<Streams>,
    /// The plan reads events; then lookups and the blocks that they find are counted.
    lookups: Option<Lookups>,
    rewrites: Family<RewriteLabels, Counter>,
    poll_errors: Family<SourceLabels, Counter>,
    extract_errors: Family<ExtractorLabels, Counter>,
}

/// Looks into the index.
struct Lookups {
    requests: Counter,
    hits: Counter,
    max_pod_hits: Counter,
}

impl UpstreamMetrics {
    /// All families that have a meaning under `plan`, registered.
    pub fn new(names: &UpstreamNames, plan: &Plan) -> UpstreamMetrics {
        let mut registry = Registry::with_prefix("llm_d_epp");
        let r = &mut registry;
        let flows =
            Flows::new(r, plan.settings.model_rewrites.iter().flat_map(ModelRewrite::models));
        let pool = Pool::new(r, names, plan);
        let request_processing = Histogram::new(REQUEST_PROCESSING);
        let response_processing = Histogram::new(RESPONSE_PROCESSING);
        let scheduling = Histogram::new(SCHEDULER);
        let help = "From a request's head to its decision";
        r.register("request_processing_duration_seconds", help, request_processing.clone());
        let help = "Time spent on an answer: on its pieces if streamed, else from head to end";
        r.register("response_processing_duration_seconds", help, response_processing.clone());
        r.register("scheduler_e2e_duration_seconds", "One decision", scheduling.clone());
        let (poll_errors, extract_errors) = (Family::default(), Family::default());
        let help = "Pages of metrics that could not be read, by source";
        r.register("datalayer_poll_errors", help, poll_errors.clone());
        let help = "Pages of metrics that could not be understood, by source and reader";
        r.register("datalayer_extract_errors", help, extract_errors.clone());
        let rewrites = Family::default();
        let help = "Requests whose model a rule chose";
        r.register("model_rewrite_decisions", help, rewrites.clone());
        let info = Family::<InfoLabels, Gauge>::default();
        let help = "What runs: build_ref is kvroute's version, a commit is not told";
        r.register("info", help, info.clone());
        let build_ref = concat!("kvroute-", env!("CARGO_PKG_VERSION"));
        info.get_or_create(&InfoLabels { commit: "unknown", build_ref }).set(1);
        UpstreamMetrics {
            flows,
            pool,
            flow_headers: flow_headers(plan),
            request_processing,
            response_processing,
            scheduling,
            prefix: prefix(r, plan),
            disagg: matches!(plan.handler, HandlerPlan::Disagg(_)).then(|| {
                let family = Family::default();
                let help = "Decisions, by the parts of the work that were given away";
                r.register("disagg_decision", help, family.clone());
                family
            }),
            streams: names.streams.then(|| Streams::new(r)),
            lookups: plan.reads_events().then(|| Lookups::new(r)),
            rewrites,
            poll_errors,
            extract_errors,
            registry,
        }
    }

    /// The flow that a request belongs to, by its headers.
    pub fn fairness_id<'a>(&self, header: impl Fn(&str) -> Option<&'a str>) -> &'a str {
        let named = |name: &String| header(name).filter(|value| !value.is_empty());
        self.flow_headers.iter().find_map(named).unwrap_or(DEFAULT_FLOW)
    }

    /// A request has been routed; `port` is that of the chosen endpoint.
    pub fn decided(
        self: &Arc<UpstreamMetrics>,
        about: &Decided<'_>,
        record: &DecisionRecord,
        port: impl FnOnce() -> Option<u16>,
    ) -> Meter {
        let flow = self.flow(about);
        self.scheduling.observe(about.took.as_secs_f64());
        flow.count_chosen(&record.endpoint, port);
        self.note_prefix(about, record);
        if let Some(disagg) = &self.disagg {
            disagg.get_or_create(&disagg_labels(&flow, record)).inc();
        }
        Meter::new(Arc::clone(self), flow, about.body_bytes)
    }

    /// No endpoint could be chosen; the client gets `status`.
    pub fn rejected(&self, about: &Decided<'_>, status: u16) {
        let flow = self.flow(about);
        self.scheduling.observe(about.took.as_secs_f64());
        flow.count_not_chosen();
        flow.count_error(error_code(status));
    }

    /// A request was refused before anything about it was known; the client gets `status`.
    pub fn refused(&self, status: u16) {
        self.flows.get("", "", DEFAULT_FLOW, 0).count_error(error_code(status));
    }

    /// An endpoint has left. Gauges of the fleet go when they are brought up to date.
    pub fn forget_endpoint(&self, endpoint: &str) {
        self.flows.forget_endpoint(endpoint);
    }

    /// The flow of a request; a rule that made it what it is, is counted.
    fn flow(&self, about: &Decided<'_>) -> Arc<Flow> {
        let flow = self.flows.get(about.model, about.target, about.fairness_id, about.priority);
        if !about.rule.is_empty() {
            let labels = flow.labels();
            let labels = RewriteLabels {
                model_rewrite_name: about.rule.to_owned(),
                model_name: labels.model_name.clone(),
                target_model: labels.target_model_name.clone(),
            };
            self.rewrites.get_or_create(&labels).inc();
        }
        flow
    }

    fn note_prefix(&self, about: &Decided<'_>, record: &DecisionRecord) {
        let Some(block_tokens) = about.block_tokens else { return };
        if let Some((ratio, bytes)) = &self.prefix {
            let chosen = f64::from(record.chosen_tokens);
            ratio.observe(chosen / f64::from(record.prompt_tokens.max(1)));
            bytes.observe(chosen * BYTES_PER_TOKEN);
        }
        if let Some(lookups) = &self.lookups {
            let blocks = u64::from(record.available_tokens / block_tokens.max(1));
            lookups.requests.inc();
            lookups.hits.inc_by(blocks);
            lookups.max_pod_hits.inc_by(blocks);
        }
    }

    /// A page of metrics could not be read.
    pub fn count_poll_error(&self, source: &Name) {
        let source_type = source.to_string();
        self.poll_errors.get_or_create(&SourceLabels { source_type }).inc();
    }

    /// A page of metrics could not be understood.
    pub fn count_extract_error(&self, source: &Name, extractor: &Name) {
        let (source_type, extractor_type) = (source.to_string(), extractor.to_string());
        self.extract_errors.get_or_create(&ExtractorLabels { source_type, extractor_type }).inc();
    }

    /// Of ext_proc streams, where they are asked for.
    pub fn streams(&self) -> Option<&Streams> {
        self.streams.as_ref()
    }

    /// The gauges of the fleet, which are brought up to date before they are read.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What is to be encoded beside our own.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }
}

impl Lookups {
    fn new(r: &mut Registry) -> Lookups {
        let lookups = Lookups {
            requests: Counter::default(),
            hits: Counter::default(),
            max_pod_hits: Counter::default(),
        };
        let help = "Prompts that were looked up in the index";
        r.register("kv_cache_index_lookup_requests", help, lookups.requests.clone());
        let help = "Blocks of them that the best endpoint holds";
        r.register("kv_cache_index_lookup_hits", help, lookups.hits.clone());
        r.register("kv_cache_index_max_pod_hit_count", help, lookups.max_pod_hits.clone());
        lookups
    }
}

/// Headers that name flows: those of `agent-identity` where the plan has it.
fn flow_headers(plan: &Plan) -> Vec<String> {
    let identity = plan.others.iter().find_map(|(_, spec)| match spec {
        PluginSpec::AgentIdentity(identity) => Some(identity.headers()),
        _ => None,
    });
    identity.unwrap_or_else(|| FAIRNESS_HEADERS.map(str::to_owned).into())
}

/// Share and length of the prefixes that the plan's main producer finds.
fn prefix(r: &mut Registry, plan: &Plan) -> Option<(Histogram, Histogram)> {
    let labels = producer(plan)?;
    let ratio = Family::<PluginLabels, _, _>::new_with_constructor(Buckets(&RATIOS));
    let bytes = Family::<PluginLabels, _, _>::new_with_constructor(Buckets(&PREFIX_BYTES));
    let help = "Of prompts, the share that is expected in the chosen endpoint's cache";
    r.register("prefix_indexer_hit_ratio", help, ratio.clone());
    let help = "The same in bytes, four for each token";
    r.register("prefix_indexer_hit_bytes", help, bytes.clone());
    Some((ratio.get_or_create_owned(&labels), bytes.get_or_create_owned(&labels)))
}

/// The plan's main producer of prefix matches.
fn producer(plan: &Plan) -> Option<PluginLabels> {
    let main = plan.producers.get(plan.producer_main?)?;
    let plugin_type = match main.kind {
        ProducerKind::Approx(_) => "approx-prefix-cache-producer",
        ProducerKind::Precise(_) => "precise-prefix-cache-producer",
        ProducerKind::Burst(_) => "burst-prefix-cache-producer",
    };
    Some(PluginLabels { plugin_name: main.name.to_string(), plugin_type })
}

fn disagg_labels(flow: &Flow, record: &DecisionRecord) -> DisaggLabels {
    let runs = |step: &str| record.others.iter().any(|o| o.step == step && o.endpoint.is_some());
    let decision_type = match (runs("encode"), runs("prefill")) {
        (false, false) => "decode-only",
        (false, true) => "prefill-decode",
        (true, false) => "encode-decode",
        (true, true) => "encode-prefill-decode",
    };
    let model = flow.labels().target_model_name.as_str();
    let plugin_type = "disagg-profile-handler";
    DisaggLabels {
        plugin: PluginLabels { plugin_name: plugin_type.to_owned(), plugin_type },
        model_name: if model.is_empty() { "unknown" } else { model }.to_owned(),
        decision_type,
    }
}

/// Namespace and name of an endpoint; the namespace that needs no mention is `default`.
fn split(endpoint: &str) -> (&str, &str) {
    endpoint.split_once('/').unwrap_or(("default", endpoint))
}
