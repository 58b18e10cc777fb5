//! Which series does a request count in? One [`Flow`] for each combination of labels, found by one
//! look into a bounded table.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use kvroute_core::fleet::Name;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::split;
use crate::metrics::LABEL_BYTES_MAX;

/// Distinct model names, and distinct fairness ids, that have labels of their own; llm-d's number.
/// What comes later counts as `other`.
pub(super) const LABEL_VALUES_MAX: usize = 1000;
/// Combinations of labels with series of their own. One takes up to 40 KB of the page, if it was
/// answered in every way there is, and some 8 KB as a rule; llm-d has no such limit.
pub(super) const FLOWS_MAX: usize = 1024;
/// Of these, how many are for models alone: fairness ids cannot take their room.
const FLOWS_OF_MODELS: usize = 256;
/// Pairs of model and endpoint that decisions are counted for; further ones count as `other`.
const ATTEMPTS_MAX: usize = 4096;
/// Stands for all that has no label of its own.
pub(super) const OTHER: &str = "other";
/// Stands between the parts of a key; names that contain it count as `other`.
const SEPARATOR: char = '\u{1f}';

/// The labels that all metrics of requests have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct FlowLabels {
    /// As the client names it.
    pub model_name: String,
    /// What it stands for.
    pub target_model_name: String,
    pub fairness_id: String,
    pub priority: i32,
}

/// And why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ErrorLabels {
    #[prometheus(flatten)]
    pub flow: FlowLabels,
    pub error_code: &'static str,
}

/// And how it was answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TtftLabels {
    #[prometheus(flatten)]
    pub flow: FlowLabels,
    pub streaming: bool,
}

/// An attempt to find an endpoint, and whom it found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct AttemptLabels {
    pub status: &'static str,
    pub target_model_name: String,
    pub endpoint_name: String,
    pub namespace: String,
    pub port: String,
}

/// Makes histograms with these bounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buckets(pub &'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

/// Bounds of durations, in seconds, from 5 ms to an hour.
const LONG: [f64; 35] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0,
    1200.0, 1800.0, 2700.0, 3600.0,
];
/// Bounds of times to the first token, in seconds.
const TTFT: [f64; 24] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0,
];
/// Bounds of sizes of requests, in bytes, from 64 B to 1 GiB.
const REQUEST_BYTES: [f64; 25] = [
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    32768.0,
    65536.0,
    131072.0,
    262144.0,
    524288.0,
    1048576.0,
    2097152.0,
    4194304.0,
    8388608.0,
    16777216.0,
    33554432.0,
    67108864.0,
    134217728.0,
    268435456.0,
    536870912.0,
    1073741824.0,
];
/// Bounds of sizes of answers, in bytes. 32778 is what llm-d writes, so that its bounds are met.
const RESPONSE_BYTES: [f64; 15] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    32778.0, 65536.0,
];
/// Bounds of prompts, in tokens; 32778 as above.
const PROMPT_TOKENS: [f64; 19] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    32778.0, 65536.0, 131072.0, 262144.0, 524288.0, 1048576.0,
];
/// Bounds of generated tokens.
const OUTPUT_TOKENS: [f64; 12] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];
/// Bounds of seconds per token.
const NTPOT: [f64; 13] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
const TPOT: [f64; 19] = [
    0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.6, 0.8, 1.0, 2.0,
];
/// Bounds of seconds between two pieces of an answer.
const ITL: [f64; 15] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0];

/// A histogram of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    Duration,
    RequestBytes,
    ResponseBytes,
    InputTokens,
    OutputTokens,
    CachedTokens,
    SecondsPerToken,
    StreamedSecondsPerToken,
    BetweenPieces,
}

/// Name, meaning and bounds of each, in the order of [`Of`].
const HISTOGRAMS: [(&str, &str, Buckets); 9] = [
    ("request_duration_seconds", "From a request's head to its answer's end", Buckets(&LONG)),
    ("request_size_bytes", "Sizes of request bodies", Buckets(&REQUEST_BYTES)),
    ("response_size_bytes", "Sizes of answers' bodies", Buckets(&RESPONSE_BYTES)),
    ("request_input_tokens", "Tokens of prompts, as engines count", Buckets(&PROMPT_TOKENS)),
    ("request_output_tokens", "Tokens generated, as engines count", Buckets(&OUTPUT_TOKENS)),
    ("request_cached_tokens", "Tokens of prompts that were cached", Buckets(&PROMPT_TOKENS)),
    ("request_ntpot_seconds", "Duration by generated tokens", Buckets(&NTPOT)),
    (
        "request_streaming_tpot_seconds",
        "Of streamed answers, the time after the first token by the other tokens",
        Buckets(&TPOT),
    ),
    (
        "request_streaming_itl_seconds",
        "Of streamed answers, the time between two pieces of the body",
        Buckets(&ITL),
    ),
];

/// Every family with the labels of a flow.
pub(super) struct FlowFamilies {
    total: Family<FlowLabels, Counter>,
    running: Family<FlowLabels, Gauge>,
    errors: Family<ErrorLabels, Counter>,
    ttft: Family<TtftLabels, Histogram, Buckets>,
    histograms: [Family<FlowLabels, Histogram, Buckets>; HISTOGRAMS.len()],
    attempts: Family<AttemptLabels, Counter>,
    /// Pairs of model and endpoint in it.
    attempts_known: AtomicUsize,
}

impl FlowFamilies {
    fn new() -> FlowFamilies {
        let histogram = |at: usize| Family::new_with_constructor(HISTOGRAMS[at].2);
        FlowFamilies {
            total: Family::default(),
            running: Family::default(),
            errors: Family::default(),
            ttft: Family::new_with_constructor(Buckets(&TTFT)),
            histograms: std::array::from_fn(histogram),
            attempts: Family::default(),
            attempts_known: AtomicUsize::new(0),
        }
    }

    fn register(&self, r: &mut Registry) {
        r.register("request", "Requests that were routed", self.total.clone());
        r.register("request_running", "Routed requests under way", self.running.clone());
        r.register("request_error", "Requests that failed, by reason", self.errors.clone());
        let help = "From a request's head to its answer's first piece, or its end unless streamed";
        r.register("request_ttft_seconds", help, self.ttft.clone());
        for ((name, help, _), family) in HISTOGRAMS.iter().zip(&self.histograms) {
            r.register(*name, *help, family.clone());
        }
        r.register("scheduler_attempts", "Decisions, and whom they chose", self.attempts.clone());
    }
}

/// One combination of labels, and its series, each of which begins with its first observation.
pub(crate) struct Flow {
    labels: FlowLabels,
    families: Arc<FlowFamilies>,
    total: OnceLock<Counter>,
    running: OnceLock<Gauge>,
    ttft: [OnceLock<Histogram>; 2],
    histograms: [OnceLock<Histogram>; HISTOGRAMS.len()],
    attempts: Arc<Attempts>,
    /// An endpoint has answered such a request, or the configuration names its model. What clients
    /// make up has no histograms of its own: they are most of the page.
    is_served: AtomicBool,
}

/// Decisions for one model, by endpoint, with their labels; shared by the flows of the model.
type Attempts = Mutex<HashMap<Name, (AttemptLabels, Counter)>>;

impl Flow {
    fn new(
        families: &Arc<FlowFamilies>,
        labels: FlowLabels,
        attempts: Arc<Attempts>,
        is_served: bool,
    ) -> Flow {
        Flow {
            labels,
            families: Arc::clone(families),
            total: OnceLock::new(),
            running: OnceLock::new(),
            ttft: Default::default(),
            histograms: Default::default(),
            attempts,
            is_served: AtomicBool::new(is_served),
        }
    }

    /// An endpoint has answered.
    pub fn set_served(&self) {
        self.is_served.store(true, Ordering::Relaxed);
    }

    /// Whether it has histograms of its own.
    pub fn is_served(&self) -> bool {
        self.is_served.load(Ordering::Relaxed)
    }

    /// The labels.
    pub fn labels(&self) -> &FlowLabels {
        &self.labels
    }

    /// One more request that was routed.
    pub fn count(&self) {
        self.total.get_or_init(|| self.families.total.get_or_create_owned(&self.labels)).inc();
    }

    /// Requests under way.
    pub fn running(&self) -> &Gauge {
        self.running.get_or_init(|| self.families.running.get_or_create_owned(&self.labels))
    }

    /// One more value.
    pub fn observe(&self, of: Of, value: f64) {
        let at = of as usize;
        let family = &self.families.histograms[at];
        self.histograms[at].get_or_init(|| family.get_or_create_owned(&self.labels)).observe(value);
    }

    /// One more time to the first token.
    pub fn observe_ttft(&self, streaming: bool, seconds: f64) {
        let series = self.ttft[usize::from(streaming)].get_or_init(|| {
            let labels = TtftLabels { flow: self.labels.clone(), streaming };
            self.families.ttft.get_or_create_owned(&labels)
        });
        series.observe(seconds);
    }

    /// One more failure.
    pub fn count_error(&self, error_code: &'static str) {
        let labels = ErrorLabels { flow: self.labels.clone(), error_code };
        self.families.errors.get_or_create(&labels).inc();
    }

    /// A decision for an endpoint.
    pub fn count_chosen(&self, endpoint: &Name, port: impl FnOnce() -> Option<u16>) {
        let mut known = self.attempts.lock();
        if let Some((_, series)) = known.get(endpoint) {
            series.inc();
            return;
        }
        let attempts = &self.families.attempts;
        if self.families.attempts_known.fetch_add(1, Ordering::Relaxed) >= ATTEMPTS_MAX {
            self.families.attempts_known.fetch_sub(1, Ordering::Relaxed);
            attempts.get_or_create(&attempt("success", OTHER, [OTHER, "", ""])).inc();
            return;
        }
        let (namespace, name) = split(endpoint.as_str());
        let port = port().map_or_else(String::new, |port| port.to_string());
        let target = self.labels.target_model_name.as_str();
        let labels = attempt("success", target, [name, namespace, &port]);
        let series = attempts.get_or_create_owned(&labels);
        series.inc();
        known.insert(endpoint.clone(), (labels, series));
    }

    /// No endpoint could be chosen.
    pub fn count_not_chosen(&self) {
        let labels = attempt("failure", &self.labels.target_model_name, [""; 3]);
        self.families.attempts.get_or_create(&labels).inc();
    }
}

fn attempt(
    status: &'static str,
    target: &str,
    [name, namespace, port]: [&str; 3],
) -> AttemptLabels {
    AttemptLabels {
        status,
        target_model_name: target.to_owned(),
        endpoint_name: name.to_owned(),
        namespace: namespace.to_owned(),
        port: port.to_owned(),
    }
}

/// The table of all flows.
pub(super) struct Flows {
    families: Arc<FlowFamilies>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    flows: HashMap<Box<str>, Arc<Flow>>,
    /// By model.
    attempts: HashMap<Box<str>, Arc<Attempts>>,
    /// Models of the configuration: they have labels of their own whoever else comes.
    configured: HashSet<Box<str>>,
    models: HashSet<Box<str>>,
    fairness_ids: HashSet<Box<str>>,
    /// Reused, so that a look allocates nothing.
    key: String,
}

impl Flows {
    /// An empty table, its families registered. Models of the configuration have labels of their
    /// own however many others there are.
    pub fn new<'a>(
        registry: &mut Registry,
        configured: impl IntoIterator<Item = &'a str>,
    ) -> Flows {
        let families = Arc::new(FlowFamilies::new());
        families.register(registry);
        let configured = configured.into_iter().map(Box::from).collect();
        Flows { families, known: Mutex::new(Known { configured, ..Known::default() }) }
    }

    /// An endpoint has left; its decisions are counted no more, and others have its room.
    pub fn forget_endpoint(&self, endpoint: &str) {
        let endpoint = Name::from(endpoint);
        let attempts: Vec<_> = self.known.lock().attempts.values().cloned().collect();
        let families = &self.families;
        for attempts in attempts {
            if let Some((labels, _)) = attempts.lock().remove(&endpoint) {
                families.attempts.remove(&labels);
                families.attempts_known.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Whose histograms a request counts in: its own flow's, if it is served.
    pub fn measured(&self, flow: &Arc<Flow>) -> Arc<Flow> {
        match flow.is_served() {
            true => Arc::clone(flow),
            false => self.get(OTHER, OTHER, OTHER, flow.labels.priority),
        }
    }

    /// The flow of a request. Priorities come from the configuration, the rest from clients.
    pub fn get(&self, model: &str, target: &str, fairness_id: &str, priority: i32) -> Arc<Flow> {
        let mut known = self.known.lock();
        let known = &mut *known;
        if let Some(flow) = known.find(model, target, fairness_id, priority) {
            return flow;
        }
        let Known { configured, models, .. } = known;
        let mut of_model = |name| match configured.contains(name) {
            true => name,
            false => bounded(models, name),
        };
        let (model, target) = (of_model(model), of_model(target));
        let fairness_id = bounded(&mut known.fairness_ids, fairness_id);
        let choices = [(fairness_id, FLOWS_MAX - FLOWS_OF_MODELS), (OTHER, FLOWS_MAX)];
        for (fairness_id, flows_max) in choices {
            if let Some(flow) = known.find(model, target, fairness_id, priority) {
                return flow;
            }
            if known.flows.len() < flows_max {
                return known.insert(&self.families, (model, target, fairness_id), priority);
            }
        }
        // There is one of these for each priority, whatever the limit says.
        let last = known.find(OTHER, OTHER, OTHER, priority);
        last.unwrap_or_else(|| known.insert(&self.families, (OTHER, OTHER, OTHER), priority))
    }
}

impl Known {
    /// Looks; the key stays.
    fn find(&mut self, model: &str, target: &str, id: &str, priority: i32) -> Option<Arc<Flow>> {
        let key = &mut self.key;
        key.clear();
        for part in [model, target, id] {
            if !is_label(part) {
                return None;
            }
            key.push_str(part);
            key.push(SEPARATOR);
        }
        for byte in priority.to_be_bytes() {
            key.push(char::from(byte));
        }
        self.flows.get(key.as_str()).cloned()
    }

    /// Adds what was just looked for in vain.
    fn insert(
        &mut self,
        families: &Arc<FlowFamilies>,
        (model, target, fairness_id): (&str, &str, &str),
        priority: i32,
    ) -> Arc<Flow> {
        let labels = FlowLabels {
            model_name: model.to_owned(),
            target_model_name: target.to_owned(),
            fairness_id: fairness_id.to_owned(),
            priority,
        };
        let attempts = Arc::clone(self.attempts.entry(target.into()).or_default());
        let is_served = self.configured.contains(target) || target == OTHER;
        let flow = Arc::new(Flow::new(families, labels, attempts, is_served));
        self.flows.insert(self.key.as_str().into(), Arc::clone(&flow));
        flow
    }
}

/// Whether a name can be a label at all.
fn is_label(name: &str) -> bool {
    name.len() <= LABEL_BYTES_MAX && !name.contains(SEPARATOR)
}

/// The name itself while there is room, else [`OTHER`].
fn bounded<'a>(known: &mut HashSet<Box<str>>, name: &'a str) -> &'a str {
    if !is_label(name) {
        return OTHER;
    }
    let is_new = !name.is_empty() && name != OTHER && !known.contains(name);
    if is_new {
        if known.len() >= LABEL_VALUES_MAX {
            return OTHER;
        }
        known.insert(name.into());
    }
    name
}
