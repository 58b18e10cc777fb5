//! Which numbers does the router publish? All of them are declared here, prefix `kvroute_`.
//!
//! Label values that clients control (model names) are bounded by `label_values_max`; further
//! ones, and long ones, are counted as `other`. As many again have room if they are known, from
//! the configuration or from engines: clients cannot take the labels of these. Endpoint labels
//! leave with their endpoint.

pub(crate) mod page;
#[cfg(test)]
mod tests;
pub(crate) mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvroute_core::event::Tier;
use kvroute_wire::grpc::Code;
use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::Semaphore;

use self::upstream::UpstreamMetrics;
use crate::recorder::RecorderMetrics;

/// States of an event stream, as `kvroute_stream_state` names them.
pub(crate) const STREAM_STATES: [&str; 4] = ["initial", "live", "replaying", "suspect"];

/// Stands for label values beyond the limit.
const OTHER: &str = "other";
/// Names that clients choose and that have more bytes are never labels, and are cut in the log.
pub(crate) const LABEL_BYTES_MAX: usize = 256;

/// A name that a client chose, as long as the log shows it.
pub(crate) fn cut(name: &str) -> &str {
    let mut end = name.len().min(LABEL_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.get(..end).unwrap_or_default()
}

/// A gauge of fractions.
type GaugeF64 = Gauge<f64, AtomicU64>;

/// Labels of a finished request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub endpoint: String,
    pub status: StatusLabel,
    pub mode: &'static str,
}

/// An HTTP status; 0 is one that the router has not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct StatusLabel(pub u16);

impl EncodeLabelValue for StatusLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        match self.0 {
            0 => "unknown".encode(encoder),
            status => status.encode(encoder),
        }
    }
}

/// One reason out of a fixed list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    pub reason: &'static str,
}

/// Which of several ways was taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct WayLabel {
    pub way: &'static str,
}

/// How something came out.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ResultLabel {
    pub result: &'static str,
}

/// A gRPC status by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct CodeLabel {
    pub code: &'static str,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EndpointLabel {
    pub endpoint: String,
}

/// One endpoint and one reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EndpointReason {
    pub endpoint: String,
    pub reason: &'static str,
}

/// One endpoint and the state it is in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EndpointState {
    pub endpoint: String,
    pub state: &'static str,
}

/// One endpoint and a memory tier.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EndpointTier {
    pub endpoint: String,
    pub tier: &'static str,
}

/// A model and how its requests are routed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ModelMode {
    pub model: String,
    pub mode: &'static str,
}

/// A model that requests named, the one that served them, and the rule that said so; an empty rule
/// is the client's header.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub(crate) struct RewriteLabels {
    pub rule: String,
    pub from: String,
    pub to: String,
}

/// One endpoint and a source of numbers about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EndpointSource {
    pub endpoint: String,
    pub source: String,
}

/// Handles of one endpoint's counters, resolved once.
#[derive(Clone, Debug)]
pub(crate) struct EndpointMetrics {
    pub scrapes: Counter,
    pub scrape_failures: Counter,
    pub stream_reconnects: Counter,
    pub stream_messages: Counter,
    pub events_bad: Counter,
    pub up: Gauge,
}

/// Labels of one endpoint's requests and failures, of which there are few; with the counters of the
/// former, which every request needs.
#[derive(Debug, Default)]
struct Served {
    requests: Vec<(StatusLabel, &'static str, Counter)>,
    failures: BTreeSet<&'static str>,
}

/// Every metric family.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    pub rejects: Family<ReasonLabel, Counter>,
    pub fallbacks: Family<ReasonLabel, Counter>,
    pub tokenize_failures: Family<ReasonLabel, Counter>,
    pub chats_rendered: Family<WayLabel, Counter>,
    pub retries: Family<ReasonLabel, Counter>,
    upstream_failures: Family<EndpointReason, Counter>,
    pub client_aborts: Counter,
    pub requests_inflight: Gauge,
    /// The account itself: what is added here is held.
    pub bodies_held: Gauge,
    pub connections: Gauge,
    /// Health included.
    pub grpc_calls: Gauge,
    pub ext_proc_streams: Gauge,
    ext_proc_ends: Family<CodeLabel, Counter>,
    pub ttft: Histogram,
    pub decision: Histogram,
    pub tokenize: Histogram,
    pub request_body: Histogram,
    pub prompt_tokens: Histogram,
    pub tokens_available: Family<EndpointLabel, Counter>,
    pub tokens_chosen: Family<EndpointLabel, Counter>,
    pub tokens_delivered: Family<EndpointLabel, Counter>,
    pub index_bytes: Gauge,
    pub index_blocks: Family<EndpointTier, Gauge>,
    pub stream_state: Family<EndpointState, Gauge>,
    pub stream_gaps: Family<EndpointLabel, Counter>,
    pub stream_replays: Family<EndpointLabel, Counter>,
    pub stream_restarts: Family<EndpointLabel, Counter>,
    pub drift_alarms: Family<EndpointLabel, Counter>,
    /// Answers whose engine counted other prompt tokens than the router.
    pub prompts_different: Family<EndpointLabel, Counter>,
    pub engine_waiting: Family<EndpointLabel, Gauge>,
    pub engine_running: Family<EndpointLabel, Gauge>,
    pub engine_kv_usage: Family<EndpointLabel, GaugeF64>,
    pub discovery_errors: Family<ReasonLabel, Counter>,
    /// Engines that have connected to the router's event socket.
    pub bound_connections: Gauge,
    /// Of their messages, or of connections, those that were not used.
    pub bound_dropped: Family<ReasonLabel, Counter>,
    pub recording: RecorderMetrics,
    /// Changes of certificate files, by whether the new ones are used.
    pub certificate_reloads: Family<ResultLabel, Counter>,
    pub tls_handshake_failures: Family<ReasonLabel, Counter>,
    /// Pages of sources other than the first, which `scrapes` counts.
    pub source_scrapes: Family<EndpointSource, Counter>,
    pub source_failures: Family<EndpointSource, Counter>,
    scrapes: Family<EndpointLabel, Counter>,
    scrape_failures: Family<EndpointLabel, Counter>,
    stream_reconnects: Family<EndpointLabel, Counter>,
    stream_messages: Family<EndpointLabel, Counter>,
    events_bad: Family<EndpointLabel, Counter>,
    endpoint_up: Family<EndpointLabel, Gauge>,
    model_mode: Family<ModelMode, Gauge>,
    /// Current mode of each model that has a label of its own.
    models: Mutex<BTreeMap<String, &'static str>>,
    /// Requests whose model a rule or a header chose.
    model_rewrites: Family<RewriteLabels, Counter>,
    /// Those that have labels of their own.
    rewrites: Mutex<BTreeSet<RewriteLabels>>,
    label_values_max: usize,
    /// Labels of what the endpoints of the fleet served, so that they can go.
    served: Mutex<BTreeMap<String, Served>>,
    /// For whoever brings the numbers up to date and writes a page of them: two at once would take
    /// each other's series, and much memory.
    pub writing: Arc<Semaphore>,
    /// llm-d's, where they are asked for.
    pub upstream: Option<Arc<UpstreamMetrics>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

const SECONDS_SHORT: [f64; 12] =
    [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1];
const SECONDS_LONG: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const SIZES: [f64; 12] = [256.0, 1e3, 2e3, 4e3, 8e3, 16e3, 32e3, 64e3, 128e3, 512e3, 2e6, 16e6];

impl Metrics {
    /// All families, registered.
    pub fn new(label_values_max: u32) -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("kvroute"),
            requests: Family::default(),
            rejects: Family::default(),
            fallbacks: Family::default(),
            tokenize_failures: Family::default(),
            chats_rendered: Family::default(),
            retries: Family::default(),
            upstream_failures: Family::default(),
            client_aborts: Counter::default(),
            requests_inflight: Gauge::default(),
            bodies_held: Gauge::default(),
            connections: Gauge::default(),
            grpc_calls: Gauge::default(),
            ext_proc_streams: Gauge::default(),
            ext_proc_ends: Family::default(),
            ttft: Histogram::new(SECONDS_LONG),
            decision: Histogram::new(SECONDS_SHORT),
            tokenize: Histogram::new(SECONDS_SHORT),
            request_body: Histogram::new(SIZES),
            prompt_tokens: Histogram::new(SIZES),
            tokens_available: Family::default(),
            tokens_chosen: Family::default(),
            tokens_delivered: Family::default(),
            index_bytes: Gauge::default(),
            index_blocks: Family::default(),
            stream_state: Family::default(),
            stream_gaps: Family::default(),
            stream_replays: Family::default(),
            stream_restarts: Family::default(),
            drift_alarms: Family::default(),
            prompts_different: Family::default(),
            engine_waiting: Family::default(),
            engine_running: Family::default(),
            engine_kv_usage: Family::default(),
            discovery_errors: Family::default(),
            bound_connections: Gauge::default(),
            bound_dropped: Family::default(),
            recording: RecorderMetrics {
                active: Gauge::default(),
                bytes: Counter::default(),
                cuts: Family::default(),
            },
            certificate_reloads: Family::default(),
            tls_handshake_failures: Family::default(),
            source_scrapes: Family::default(),
            source_failures: Family::default(),
            scrapes: Family::default(),
            scrape_failures: Family::default(),
            stream_reconnects: Family::default(),
            stream_messages: Family::default(),
            events_bad: Family::default(),
            endpoint_up: Family::default(),
            model_mode: Family::default(),
            models: Mutex::default(),
            model_rewrites: Family::default(),
            rewrites: Mutex::default(),
            label_values_max: label_values_max as usize,
            served: Mutex::default(),
            writing: Arc::new(Semaphore::new(1)),
            upstream: None,
        };
        metrics.register_requests();
        metrics.register_prompts();
        metrics.register_knowledge();
        metrics.register_bound();
        metrics.register_recording();
        metrics
    }

    fn register_requests(&mut self) {
        let r = &mut self.registry;
        r.register("requests", "Finished requests", self.requests.clone());
        r.register("rejects", "Requests answered by the router itself", self.rejects.clone());
        r.register(
            "fallbacks",
            "Requests routed with less knowledge than configured, by reason, unless that lies in \
             the request itself",
            self.fallbacks.clone(),
        );
        r.register("retries", "Requests sent to another endpoint, by reason", self.retries.clone());
        r.register("upstream_failures", "Failed exchanges", self.upstream_failures.clone());
        let help = "Clients that left before the end of their answer, as far as that is seen";
        r.register("client_aborts", help, self.client_aborts.clone());
        r.register("requests_inflight", "Requests under way", self.requests_inflight.clone());
        r.register("connections", "Client connections", self.connections.clone());
        r.register("grpc_calls", "gRPC calls under way, health included", self.grpc_calls.clone());
        r.register("ext_proc_streams", "ext_proc streams", self.ext_proc_streams.clone());
        r.register("ext_proc_ends", "Ended ext_proc streams", self.ext_proc_ends.clone());
        r.register(
            "certificate_reloads",
            "Changes of certificate files, by whether the new ones are used",
            self.certificate_reloads.clone(),
        );
        r.register(
            "tls_handshake_failures",
            "TLS handshakes of clients that failed",
            self.tls_handshake_failures.clone(),
        );
        let seconds = || Unit::Seconds;
        r.register_with_unit(
            "ttft",
            "From a request's head to the first byte of its answer's body",
            seconds(),
            self.ttft.clone(),
        );
        r.register_with_unit("decision", "One decision", seconds(), self.decision.clone());
        r.register_with_unit(
            "request_body",
            "Sizes of request bodies",
            Unit::Bytes,
            self.request_body.clone(),
        );
        r.register_with_unit(
            "request_bodies_held",
            "Request bodies that have come and are not sent on",
            Unit::Bytes,
            self.bodies_held.clone(),
        );
        r.register(
            "model_rewrites",
            "Requests whose model a rule (or, without one, the client's header) chose",
            self.model_rewrites.clone(),
        );
        r.register("model_mode", "1 for the mode a model is routed in", self.model_mode.clone());
    }

    fn register_prompts(&mut self) {
        let r = &mut self.registry;
        r.register(
            "tokenize_failures",
            "Prompts without exact tokens, by reason",
            self.tokenize_failures.clone(),
        );
        r.register(
            "chats_rendered",
            "Chats made into text by their template, by way: in a `direct` form, or by the slower \
             `jinja` where tools, contents in parts or the template itself ask for it",
            self.chats_rendered.clone(),
        );
        r.register_with_unit(
            "tokenize",
            "Reading a body into tokens and block keys",
            Unit::Seconds,
            self.tokenize.clone(),
        );
        r.register("prompt_tokens", "Lengths of prompts in tokens", self.prompt_tokens.clone());
    }

    fn register_knowledge(&mut self) {
        let r = &mut self.registry;
        r.register(
            "cache_available_tokens",
            "Best cached prefix in the fleet, by the endpoint that was chosen",
            self.tokens_available.clone(),
        );
        r.register(
            "cache_chosen_tokens",
            "Cached prefix predicted for the chosen endpoint",
            self.tokens_chosen.clone(),
        );
        r.register(
            "cache_delivered_tokens",
            "Cached tokens that the endpoint reported",
            self.tokens_delivered.clone(),
        );
        let r = &mut self.registry;
        r.register_with_unit("index", "Memory of the index", Unit::Bytes, self.index_bytes.clone());
        r.register("index_blocks", "Resident blocks", self.index_blocks.clone());
        r.register("stream_state", "1 for a stream's state", self.stream_state.clone());
        r.register("stream_gaps", "Holes in the sequence", self.stream_gaps.clone());
        r.register("stream_replays", "Replays asked for", self.stream_replays.clone());
        r.register("stream_restarts", "Engine restarts noticed", self.stream_restarts.clone());
        r.register(
            "stream_reconnects",
            "Connections after the first",
            self.stream_reconnects.clone(),
        );
        r.register("stream_messages", "Messages received", self.stream_messages.clone());
        r.register("events_bad", "Events that could not be read", self.events_bad.clone());
        r.register(
            "drift_alarms",
            "Times an endpoint delivered less than predicted for too long",
            self.drift_alarms.clone(),
        );
        r.register(
            "prompts_different",
            "Answers whose engine counted other prompt tokens than the router",
            self.prompts_different.clone(),
        );
        r.register("engine_waiting", "Requests queued in the engine", self.engine_waiting.clone());
        r.register("engine_running", "Requests being computed", self.engine_running.clone());
        r.register("engine_kv_usage_ratio", "KV blocks in use", self.engine_kv_usage.clone());
        r.register("scrapes", "Metrics pages read", self.scrapes.clone());
        r.register("scrape_failures", "Metrics pages not read", self.scrape_failures.clone());
        r.register(
            "source_scrapes",
            "Pages of further sources, such as a DCGM exporter, read",
            self.source_scrapes.clone(),
        );
        r.register(
            "source_failures",
            "Pages of further sources that were not read, or told nothing",
            self.source_failures.clone(),
        );
        r.register("endpoint_up", "1 when the endpoint answers", self.endpoint_up.clone());
        r.register(
            "discovery_errors",
            "Looks at a source of endpoints that failed; the endpoints stay as they were",
            self.discovery_errors.clone(),
        );
    }

    fn register_bound(&mut self) {
        let r = &mut self.registry;
        r.register(
            "bound_connections",
            "Engines connected to the router's event socket",
            self.bound_connections.clone(),
        );
        r.register(
            "bound_dropped",
            "Messages and connections at the router's event socket that were not used, by reason",
            self.bound_dropped.clone(),
        );
    }

    fn register_recording(&mut self) {
        let (r, recording) = (&mut self.registry, &self.recording);
        r.register("recording_active", "1 while a recording goes on", recording.active.clone());
        let bytes = recording.bytes.clone();
        r.register_with_unit("recording", "Bytes of the recording", Unit::Bytes, bytes);
        let help = "Recordings that ended before the router did, by reason";
        r.register("recording_cuts", help, recording.cuts.clone());
    }

    /// Handles for one endpoint.
    pub fn endpoint(&self, name: &str) -> EndpointMetrics {
        let label = EndpointLabel { endpoint: name.to_owned() };
        self.served.lock().entry(name.to_owned()).or_default();
        EndpointMetrics {
            scrapes: self.scrapes.get_or_create_owned(&label),
            scrape_failures: self.scrape_failures.get_or_create_owned(&label),
            stream_reconnects: self.stream_reconnects.get_or_create_owned(&label),
            stream_messages: self.stream_messages.get_or_create_owned(&label),
            events_bad: self.events_bad.get_or_create_owned(&label),
            up: self.endpoint_up.get_or_create_owned(&label),
        }
    }

    /// Counts a request that is over, by the endpoint that it went to (empty: none). What ends
    /// after its endpoint has left counts as `other`.
    pub fn count_request(&self, endpoint: &str, status: StatusLabel, mode: &'static str) {
        let counter = |endpoint: &str| {
            let labels = RequestLabels { endpoint: endpoint.to_owned(), status, mode };
            self.requests.get_or_create_owned(&labels)
        };
        let mut served = self.served.lock();
        let Some(Served { requests, .. }) = served.get_mut(endpoint) else {
            let known = if endpoint.is_empty() { endpoint } else { OTHER };
            counter(known).inc();
            return;
        };
        if let Some((.., found)) = requests.iter().find(|r| (r.0, r.1) == (status, mode)) {
            found.inc();
            return;
        }
        let new = counter(endpoint);
        new.inc();
        requests.push((status, mode, new));
    }

    /// Counts a failed exchange with an endpoint that has not left.
    pub fn count_upstream_failure(&self, endpoint: &str, reason: &'static str) {
        let mut served = self.served.lock();
        let endpoint = match served.get_mut(endpoint) {
            Some(served) => {
                served.failures.insert(reason);
                endpoint
            }
            None => OTHER,
        };
        let label = EndpointReason { endpoint: endpoint.to_owned(), reason };
        self.upstream_failures.get_or_create(&label).inc();
    }

    fn forget_served(&self, name: &str) {
        let mut all = self.served.lock();
        let Some(served) = all.remove(name) else { return };
        let endpoint = || name.to_owned();
        for (status, mode, _) in served.requests {
            self.requests.remove(&RequestLabels { endpoint: endpoint(), status, mode });
        }
        for reason in served.failures {
            self.upstream_failures.remove(&EndpointReason { endpoint: endpoint(), reason });
        }
    }

    /// Forgets an endpoint's gauges and counters. Pages of further sources (`source_scrapes`) go
    /// with the task that reads them.
    pub fn forget_endpoint(&self, name: &str) {
        self.forget_served(name);
        if let Some(upstream) = &self.upstream {
            upstream.forget_endpoint(name);
        }
        let label = EndpointLabel { endpoint: name.to_owned() };
        for family in [
            &self.scrapes,
            &self.scrape_failures,
            &self.stream_reconnects,
            &self.stream_messages,
            &self.events_bad,
            &self.stream_gaps,
            &self.stream_replays,
            &self.stream_restarts,
            &self.drift_alarms,
            &self.prompts_different,
            &self.tokens_available,
            &self.tokens_chosen,
            &self.tokens_delivered,
        ] {
            family.remove(&label);
        }
        for family in [&self.endpoint_up, &self.engine_waiting, &self.engine_running] {
            family.remove(&label);
        }
        self.engine_kv_usage.remove(&label);
        for tier in Tier::ALL {
            let tier = tier.as_str();
            self.index_blocks.remove(&EndpointTier { endpoint: name.to_owned(), tier });
        }
        for state in STREAM_STATES {
            self.stream_state.remove(&EndpointState { endpoint: name.to_owned(), state });
        }
    }

    /// Counts a request that the router answered by itself.
    pub fn count_reject(&self, reason: &'static str) {
        self.rejects.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Counts an ext_proc stream that has ended.
    pub fn count_ext_proc_end(&self, code: Code) {
        self.ext_proc_ends.get_or_create(&CodeLabel { code: code.as_str() }).inc();
    }

    /// Counts a request routed with less knowledge than configured.
    pub fn count_fallback(&self, reason: &'static str) {
        self.fallbacks.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Whether one more name has labels of its own, beside `names` others.
    fn has_room(&self, names: usize, is_known: impl FnOnce() -> bool) -> bool {
        let max = self.label_values_max;
        names < max || (names < max.saturating_mul(2) && is_known())
    }

    /// Notes how a model's requests are routed.
    pub fn set_model_mode(
        &self,
        model: &str,
        mode: &'static str,
        is_known: impl FnOnce(&str) -> bool,
    ) {
        let mut models = self.models.lock();
        let model = match models.get(model) {
            Some(before) if *before == mode => return,
            Some(_) => model,
            None if model.len() > LABEL_BYTES_MAX => OTHER,
            None if self.has_room(models.len(), || is_known(model)) => model,
            None => OTHER,
        };
        let before = models.insert(model.to_owned(), mode);
        if let Some(before) = before.filter(|b| *b != mode) {
            self.model_mode.remove(&ModelMode { model: model.to_owned(), mode: before });
        }
        self.model_mode.get_or_create(&ModelMode { model: model.to_owned(), mode }).set(1);
    }

    /// Counts a request that a rule (empty: its header) gave a model. Without room, targets that
    /// are known keep their label.
    pub fn count_rewrite(&self, rule: &str, from: &str, to: &str, is_known: impl Fn(&str) -> bool) {
        let labels = |from: &str, to: &str| {
            let [rule, from, to] = [rule, from, to].map(str::to_owned);
            RewriteLabels { rule, from, to }
        };
        let [from, to] =
            [from, to].map(|name| if name.len() > LABEL_BYTES_MAX { OTHER } else { name });
        let mut found = labels(from, to);
        let mut known = self.rewrites.lock();
        if !known.contains(&found) {
            let are_known = || (from.is_empty() || is_known(from)) && is_known(to);
            if self.has_room(known.len(), are_known) {
                known.insert(found.clone());
            } else {
                found = labels(OTHER, if is_known(to) { to } else { OTHER });
            }
        }
        self.model_rewrites.get_or_create(&found).inc();
    }

    /// All numbers, as OpenMetrics.
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(16 << 10);
        let upstream = self.upstream.iter().map(|upstream| upstream.registry());
        let written = std::iter::once(&self.registry)
            .chain(upstream)
            .try_for_each(|registry| text::encode_registry(&mut out, registry))
            .and_then(|()| text::encode_eof(&mut out));
        // Writing into a string cannot fail; an empty page shows if it ever does.
        written.map(|()| out).unwrap_or_default()
    }
}

/// Sets a counter whose truth is kept elsewhere.
pub(crate) fn mirror(counter: &Counter, value: u64) {
    counter.inner().store(value, Ordering::Relaxed);
}
