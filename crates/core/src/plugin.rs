//! Which plugin types exist? One table, from which types, parameters, roles, stability and
//! documentation follow.
//!
//! To add a plugin: write its file (a struct with `Deserialize` and `JsonSchema` for the
//! parameters, [`Plugin`] and the trait of its role), and add its lines here.

use std::fmt;

use schemars::{Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, Visitor};

use crate::stage::{Admitter, Detector, Filter, Picker, Plugin, Scorer};
use crate::{
    admit, collect, detect, filter, flow, handle, identity, parse, pick, produce, report, score,
    screen,
};

/// What a plugin does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Chooses which profiles run.
    Handler,
    /// Says whether a request is served by several endpoints in turn.
    Decider,
    /// Removes candidates before any profile runs.
    Screener,
    /// Removes candidates.
    Filter,
    /// Rates candidates.
    Scorer,
    /// Orders candidates.
    Picker,
    /// Computes what others read.
    Producer,
    /// Lets requests in, or refuses them.
    Admitter,
    /// Says how full the fleet is.
    Detector,
    /// Reads request bodies.
    Parser,
    /// Where signals come from.
    Source,
    /// What is read from a source.
    Extractor,
    /// Which endpoints there are.
    Discovery,
    /// Reads request headers before a request is queued.
    RequestHeader,
    /// Reports about the answer to the proxy.
    Reporter,
    /// Between flows of one priority.
    Fairness,
    /// Within one flow.
    Ordering,
    /// How much of the fleet a priority may use.
    UsageLimit,
    /// Which running requests may be evicted.
    EvictionFilter,
    /// Which of them goes first.
    EvictionOrder,
}

impl Role {
    /// All, in the order of a request's way.
    pub const ALL: [Role; 20] = [
        Role::Handler,
        Role::Decider,
        Role::Screener,
        Role::Filter,
        Role::Scorer,
        Role::Picker,
        Role::Producer,
        Role::Admitter,
        Role::Detector,
        Role::Parser,
        Role::Source,
        Role::Extractor,
        Role::Discovery,
        Role::RequestHeader,
        Role::Reporter,
        Role::Fairness,
        Role::Ordering,
        Role::UsageLimit,
        Role::EvictionFilter,
        Role::EvictionOrder,
    ];

    /// What a plugin of this role is called.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Handler => "profile handler",
            Role::Decider => "decider",
            Role::Screener => "screener",
            Role::Filter => "filter",
            Role::Scorer => "scorer",
            Role::Picker => "picker",
            Role::Producer => "producer",
            Role::Admitter => "admitter",
            Role::Detector => "saturation detector",
            Role::Parser => "parser",
            Role::Source => "data source",
            Role::Extractor => "extractor",
            Role::Discovery => "endpoint discovery",
            Role::RequestHeader => "request header plugin",
            Role::Reporter => "reporter",
            Role::Fairness => "fairness policy",
            Role::Ordering => "queue ordering policy",
            Role::UsageLimit => "usage limit policy",
            Role::EvictionFilter => "eviction filter",
            Role::EvictionOrder => "eviction order",
        }
    }
}

/// How much a plugin type may still change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stability {
    /// llm-d's: needs `--allow-experimental-plugins`.
    Alpha,
    /// llm-d's: always available.
    Beta,
    /// kvroute's own; llm-d does not know it.
    Own,
}

/// A plugin as the pipeline runs it: one part per role that it has.
#[derive(Default)]
pub struct Parts {
    /// As a filter.
    pub filter: Option<Box<dyn Filter>>,
    /// As a screener: a filter before all profiles.
    pub screener: Option<Box<dyn Filter>>,
    /// As a scorer.
    pub scorer: Option<Box<dyn Scorer>>,
    /// As a picker.
    pub picker: Option<Box<dyn Picker>>,
    /// As a saturation detector.
    pub detector: Option<Box<dyn Detector>>,
    /// As an admitter.
    pub admitter: Option<Box<dyn Admitter>>,
}

macro_rules! part {
    ($parts:ident, $plugin:ident, Filter) => {
        $parts.filter = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Screener) => {
        $parts.screener = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Scorer) => {
        $parts.scorer = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Picker) => {
        $parts.picker = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Detector) => {
        $parts.detector = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Admitter) => {
        $parts.admitter = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, $other:ident) => {};
}

macro_rules! plugins {
    ($($(#[doc = $about:literal])+
       $variant:ident($parameters:ty) $stability:ident $names:expr => [$($role:ident)+];)+) => {
        /// A plugin type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum PluginKind {
            $($(#[doc = $about])+ $variant,)+
        }

        /// A plugin type with its parameters.
        #[derive(Clone, Debug, PartialEq)]
        pub enum PluginSpec {
            $($(#[doc = $about])+ $variant($parameters),)+
        }

        impl PluginKind {
            /// Every type.
            pub const ALL: &'static [PluginKind] = &[$(PluginKind::$variant),+];

            /// Names in configurations, the current one first.
            pub fn names(self) -> &'static [&'static str] {
                match self {
                    $(PluginKind::$variant => &$names,)+
                }
            }

            /// What it does.
            pub fn roles(self) -> &'static [Role] {
                match self {
                    $(PluginKind::$variant => &[$(Role::$role),+],)+
                }
            }

            /// How much it may still change.
            pub fn stability(self) -> Stability {
                match self {
                    $(PluginKind::$variant => Stability::$stability,)+
                }
            }

            /// What it is for, in a sentence or two.
            pub fn about(self) -> String {
                let lines: &[&str] = match self {
                    $(PluginKind::$variant => &[$($about),+],)+
                };
                lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
            }

            /// The JSON Schema of its parameters, with their documentation and defaults.
            pub fn schema(self, generator: &mut SchemaGenerator) -> Schema {
                match self {
                    $(PluginKind::$variant => generator.subschema_for::<$parameters>(),)+
                }
            }

            /// Reads the parameters of this type; `null` stands for none.
            pub fn read<'de, D: Deserializer<'de>>(self, from: D) -> Result<PluginSpec, D::Error> {
                match self {
                    $(PluginKind::$variant => {
                        parameters::<$parameters, D>(from).map(PluginSpec::$variant)
                    })+
                }
            }
        }

        impl PluginSpec {
            /// The type.
            pub fn kind(&self) -> PluginKind {
                match self {
                    $(PluginSpec::$variant(_) => PluginKind::$variant,)+
                }
            }

            /// What its parameters tell.
            pub fn plugin(&self) -> &dyn Plugin {
                match self {
                    $(PluginSpec::$variant(plugin) => plugin,)+
                }
            }

            /// The plugin as the pipeline runs it, with fresh state.
            pub fn parts(&self) -> Parts {
                #[allow(unused_mut, reason = "many roles have no part")]
                let mut parts = Parts::default();
                match self {
                    $(PluginSpec::$variant(_plugin) => {
                        $(part!(parts, _plugin, $role);)+
                    })+
                }
                parts
            }
        }
    };
}

plugins! {
    // Profile handlers and deciders.
    /// Runs the one profile that there is.
    SingleProfileHandler(handle::Single) Beta ["single-profile-handler"] => [Handler];
    /// Runs the profile that a request header names.
    HeaderProfileHandler(handle::Header) Alpha ["header-profile-handler"] => [Handler];
    /// Runs the one profile, and names the chosen rank in `x-data-parallel-host-port`, while the
    /// request itself goes to the engine's first port.
    DataParallelProfileHandler(handle::DataParallel) Beta
        ["data-parallel-profile-handler"] => [Handler];
    /// Disaggregated serving: a decode endpoint that answers, and, where the deciders say so,
    /// endpoints that encode and prefill before it.
    DisaggProfileHandler(handle::Disagg) Beta ["disagg-profile-handler"] => [Handler];
    /// The older handler of prefill and decode.
    PdProfileHandler(handle::PrefillDecode) Beta ["pd-profile-handler"] => [Handler];
    /// Wrote the headers for `pd-profile-handler`, which writes them itself here.
    DisaggHeadersHandler(handle::DisaggHeaders) Beta
        ["disagg-headers-handler", "prefill-header-handler"] => [RequestHeader];
    /// Prefill elsewhere when enough of the prompt is not cached on the decode endpoint.
    PrefixBasedDecider(handle::PrefixBased) Beta ["prefix-based-pd-decider"] => [Decider];
    /// Always in several steps.
    AlwaysDecider(handle::Always) Beta ["always-disagg-pd-decider"] => [Decider];
    /// In several steps when the prompt holds images, audio or video.
    MultimodalDecider(handle::AlwaysMultimodal) Beta
        ["always-disagg-multimodal-decider"] => [Decider];

    // Filters.
    /// Keeps endpoints whose labels match a Kubernetes label selector.
    LabelSelectorFilter(filter::LabelSelector) Beta
        ["label-selector-filter", "by-label-selector"] => [Filter];
    /// Keeps endpoints that decode: by their label `llm-d.ai/role`, or without one.
    DecodeFilter(filter::Decode) Beta ["decode-filter"] => [Filter];
    /// Keeps endpoints that prefill, by their label `llm-d.ai/role`.
    PrefillFilter(filter::Prefill) Beta ["prefill-filter"] => [Filter];
    /// Keeps endpoints that encode images, audio and video, by their label `llm-d.ai/role`.
    EncodeFilter(filter::Encode) Beta ["encode-filter"] => [Filter];
    /// Keeps endpoints whose label has one of some values: the older form of
    /// `label-selector-filter`.
    ByLabelFilter(filter::ByLabel) Beta ["by-label"] => [Filter];
    /// Keeps endpoints that are less busy than some limits.
    UtilizationFilter(filter::Utilization) Alpha ["utilization-filter"] => [Filter];
    /// Keeps endpoints by a number that an extractor tells about them.
    EndpointAttributeFilter(filter::EndpointAttribute) Alpha
        ["endpoint-attribute-filter"] => [Filter];
    /// Keeps endpoints near the one that an earlier profile chose: prefill near decode.
    TopologyAffinityFilter(filter::TopologyAffinity) Alpha
        ["topology-affinity-filter"] => [Filter];
    /// Keeps the endpoint that served the session before, while it is a candidate.
    SessionAffinityFilter(score::SessionAffinity) Alpha ["session-affinity-filter"] => [Filter];
    /// Keeps the cluster that served the session before, while it is a candidate.
    MulticlusterSessionAffinityFilter(score::SessionAffinity) Alpha
        ["multicluster-session-affinity-filter"] => [Filter];
    /// Keeps the endpoints that a request header lists; for conformance tests.
    HeaderTestingFilter(filter::HeaderTesting) Beta
        ["header-based-testing-filter"] => [Filter];
    /// Keeps endpoints that hold most of the prompt, until they are too busy.
    PrefixAffinityFilter(filter::PrefixAffinity) Beta
        ["prefix-cache-affinity-filter"] => [Filter];

    // Scorers.
    /// Fewer waiting requests are better, between the least and the most of the candidates.
    QueueScorer(score::Queue) Beta ["queue-scorer"] => [Scorer];
    /// Fewer running requests are better, between the least and the most of the candidates.
    RunningScorer(score::Running) Beta ["running-requests-size-scorer"] => [Scorer];
    /// The free share of the KV cache.
    KvUsageScorer(score::KvUsage) Beta
        ["kv-cache-utilization-scorer", "kv-cache-scorer"] => [Scorer];
    /// Half for an empty queue, less for each waiting request.
    LoadAwareScorer(score::LoadAware) Beta ["load-aware-scorer"] => [Scorer];
    /// Fewer requests of this router in flight are better.
    ActiveRequestScorer(score::ActiveRequest) Beta ["active-request-scorer"] => [Scorer];
    /// Fewer tokens of this router in flight, this request's included, are better.
    TokenLoadScorer(score::TokenLoad) Beta ["token-load-scorer"] => [Scorer];
    /// More of the prompt in cache is better.
    PrefixScorer(score::Prefix) Beta ["prefix-cache-scorer"] => [Scorer];
    /// More of the prompt in cache is better; brings a precise producer with it.
    PrecisePrefixScorer(score::PrecisePrefix) Beta ["precise-prefix-cache-scorer"] => [Scorer];
    /// Spreads prompts that nobody has cached.
    NoHitLruScorer(score::NoHitLru) Beta ["no-hit-lru-scorer"] => [Scorer];
    /// Back to the endpoint that served the session before.
    SessionAffinityScorer(score::SessionAffinity) Alpha ["session-affinity-scorer"] => [Scorer];
    /// Endpoints that have the request's adapter loaded, or room for it, are better.
    LoraAffinityScorer(score::LoraAffinity) Beta ["lora-affinity-scorer"] => [Scorer];
    /// Endpoints that are meant for prompts of this length are better, by a label; removes the
    /// others where told to.
    ContextLength(score::ContextLength) Beta ["context-length-aware"] => [Filter Scorer];
    /// Endpoints that have encoded the request's images before are better.
    EncoderCacheScorer(score::EncoderCache) Beta ["mm-embeddings-cache-scorer"] => [Scorer];
    /// Endpoints whose label is what a request header says are better.
    HeaderLabelScorer(score::HeaderLabel) Alpha ["header-label-affinity-scorer"] => [Scorer];
    /// A number that an extractor tells about the endpoints, as a score.
    EndpointAttributeScorer(score::EndpointAttribute) Alpha
        ["endpoint-attribute-scorer"] => [Scorer];
    /// The nearer to the endpoint that an earlier profile chose, the better.
    TopologyAffinityScorer(score::TopologyAffinity) Alpha
        ["topology-affinity-scorer"] => [Scorer];
    /// Clusters with shorter queues are better, between the least and the most of the candidates.
    MulticlusterQueueScorer(score::ClusterQueue) Alpha ["multicluster-queue-scorer"] => [Scorer];
    /// The free share of the clusters' KV caches.
    MulticlusterKvUsageScorer(score::ClusterKvUsage) Alpha
        ["multicluster-kv-cache-utilization-scorer"] => [Scorer];
    /// Clusters that were sent more of the prompt before are better.
    MulticlusterPrefixScorer(score::ClusterPrefix) Alpha
        ["multicluster-prefix-cache-scorer"] => [Scorer];
    /// Where the request does the least harm, in seconds: to itself and to others.
    CostScorer(score::Cost) Own ["kvroute-cost-scorer"] => [Scorer];

    // Pickers.
    /// The highest total; ties at random.
    MaxScorePicker(pick::MaxScore) Beta ["max-score-picker"] => [Picker];
    /// Any candidate.
    RandomPicker(pick::Random) Beta ["random-picker"] => [Picker];
    /// At random, in proportion to the totals.
    WeightedRandomPicker(pick::WeightedRandom) Beta ["weighted-random-picker"] => [Picker];
    /// Endpoint after endpoint.
    RoundRobinPicker(pick::RoundRobin) Own ["kvroute-round-robin-picker"] => [Picker];

    // Producers.
    /// Which endpoints were sent the prompt's prefix before.
    ApproxPrefixProducer(produce::ApproxPrefix) Beta
        ["approx-prefix-cache-producer"] => [Producer];
    /// Which clusters were sent the prompt's prefix before.
    MulticlusterApproxPrefixProducer(produce::ApproxPrefix) Alpha
        ["multicluster-approx-prefix-cache-producer"] => [Producer];
    /// Which endpoints were sent the request's images, audio and video before.
    EncoderCacheProducer(produce::EncoderCache) Beta
        ["mm-embeddings-cache-producer"] => [Producer];
    /// Which session a request belongs to, by a header or a cookie.
    SessionIdProducer(produce::SessionId) Beta ["session-id-producer"] => [Producer];
    /// Which endpoints hold the prompt's prefix, by the engines' own events.
    PrecisePrefixProducer(produce::PrecisePrefix) Beta
        ["precise-prefix-cache-producer"] => [Producer];
    /// What this router has in flight on each endpoint.
    InflightLoadProducer(produce::InflightLoad) Beta ["inflight-load-producer"] => [Producer];
    /// The prompt's tokens.
    TokenProducer(produce::Tokens) Beta ["token-producer", "tokenizer"] => [Producer];

    // Predicted latency: producer, filter, scorer.
    /// How fast each endpoint is expected to answer, by what kvroute has learned of it.
    PredictedLatencyProducer(produce::PredictedLatency) Beta
        ["predicted-latency-producer"] => [Producer];
    /// Keeps endpoints that are expected to answer within the client's latency limits.
    SloHeadroomTierFilter(filter::SloHeadroomTier) Beta
        ["slo-headroom-tier-filter"] => [Filter];
    /// Endpoints that are expected to answer within the client's latency limits are better.
    LatencyScorer(score::Latency) Beta ["latency-scorer"] => [Scorer];

    // Admission and saturation.
    /// Refuses low priorities whose latency limit no endpoint is expected to keep.
    LatencySloAdmitter(admit::LatencySlo) Beta ["latency-slo-admitter"] => [Admitter];
    /// Refuses low priorities at random, the more the fuller the fleet is.
    ProbabilisticAdmitter(admit::Probabilistic) Beta ["probabilistic-admitter"] => [Admitter];
    /// How full the engines are by their metrics; as a filter it keeps those that are not.
    UtilizationDetector(detect::Utilization) Beta
        ["utilization-detector"] => [Detector Filter];
    /// How full the endpoints are by what this router has in flight there; as a filter it keeps
    /// those that are not.
    ConcurrencyDetector(detect::Concurrency) Beta
        ["concurrency-detector"] => [Detector Filter];

    // The data layer.
    /// The endpoints' pages of metrics.
    MetricsDataSource(collect::MetricsDataSource) Beta ["metrics-data-source"] => [Source];
    /// Load and KV cache of engines, and numbers of the user's choice, from their metrics.
    CoreMetricsExtractor(collect::CoreMetricsExtractor) Beta
        ["core-metrics-extractor"] => [Extractor];
    /// The endpoints' lists of models.
    ModelsDataSource(collect::ModelsDataSource) Beta ["models-data-source"] => [Source];
    /// Models and adapters that an endpoint serves.
    ModelsDataExtractor(collect::ModelsDataExtractor) Beta
        ["models-data-extractor"] => [Extractor];
    /// The metrics of NVIDIA's DCGM exporter beside each endpoint.
    DcgmDataSource(collect::DcgmDataSource) Alpha ["dcgm-data-source"] => [Source];
    /// How busy the GPUs of an endpoint are.
    DcgmExtractor(collect::DcgmExtractor) Alpha ["dcgm-extractor"] => [Extractor];
    /// Host, rack, zone and region of endpoints, from their labels.
    TopologyExtractor(collect::TopologyExtractor) Alpha ["topology-extractor"] => [Extractor];
    /// Tells extractors which endpoints come and go.
    EndpointNotificationSource(collect::EndpointNotificationSource) Beta
        ["endpoint-notification-source"] => [Source];
    /// Tells extractors of changes of Kubernetes objects.
    K8sNotificationSource(collect::K8sNotificationSource) Beta
        ["k8s-notification-source"] => [Source];
    /// Endpoints from a file, without Kubernetes.
    FileDiscovery(collect::FileDiscovery) Beta ["file-discovery"] => [Discovery];
    /// Clusters from a file, each an endpoint.
    MulticlusterFileDiscovery(collect::MulticlusterFileDiscovery) Alpha
        ["multicluster-file-discovery"] => [Discovery];
    /// The clusters' pages of metrics.
    MulticlusterMetricsDataSource(collect::MulticlusterMetricsDataSource) Alpha
        ["multicluster-metrics-data-source"] => [Source];
    /// What a cluster says about its pool as a whole.
    MulticlusterMetricsExtractor(collect::MulticlusterMetricsExtractor) Alpha
        ["multicluster-metrics-extractor"] => [Extractor];

    // Bursts and peers.
    /// Holds requests that come at once for a moment, and sends those that share a prompt to the
    /// same endpoint.
    BurstPrefixProducer(produce::BurstPrefix) Alpha
        ["burst-prefix-cache-producer"] => [Producer];
    /// Names a peer from which the chosen endpoint can fetch the prefix that it lacks.
    P2pSourceProducer(produce::P2pSource) Alpha ["p2p-source-producer"] => [Producer];

    // Screeners.
    /// During a rollout of prefill and decode: one revision per request, and only a complete one.
    RolloutScreener(screen::Rollout) Alpha
        ["disaggregatedset-rollout-screener"] => [Screener];

    // Request headers and reports.
    /// Makes the requests of an agent's session one flow, by the headers that agents send.
    AgentIdentity(identity::AgentIdentity) Alpha ["agent-identity"] => [RequestHeader];
    /// Tells the proxy a number computed from the request's usage.
    AttributeReporter(report::AttributeReporter) Beta
        ["request-attribute-reporter"] => [Reporter];
    /// Tells the Gateway API's conformance tests which endpoint served the request.
    ServedVerifier(report::ServedVerifier) Beta
        ["destination-endpoint-served-verifier"] => [Reporter];

    // Parsers.
    /// OpenAI's APIs over HTTP.
    OpenaiParser(parse::Parser) Beta ["openai-parser"] => [Parser];
    /// Anthropic's messages API.
    AnthropicParser(parse::Parser) Beta ["anthropic-parser"] => [Parser];
    /// vLLM's own generate API.
    VllmHttpParser(parse::Parser) Beta ["vllmhttp-parser"] => [Parser];
    /// SGLang's own generate API.
    SglangHttpParser(parse::Parser) Beta ["sglanghttp-parser"] => [Parser];
    /// vLLM's gRPC API.
    VllmGrpcParser(parse::Parser) Beta ["vllmgrpc-parser"] => [Parser];
    /// Vertex AI's prediction service (gRPC).
    VertexParser(parse::Parser) Beta ["vertexai-parser"] => [Parser];
    /// Claims no path and takes what no other parser does; bodies stay unread.
    PassthroughParser(parse::Parser) Beta ["passthrough-parser"] => [Parser];

    // Flow control.
    /// The first of all requests, whichever flow it is from.
    GlobalStrictFairness(flow::GlobalStrict) Beta
        ["global-strict-fairness-policy"] => [Fairness];
    /// Flow after flow.
    RoundRobinFairness(flow::RoundRobinFlows) Beta
        ["round-robin-fairness-policy"] => [Fairness];
    /// The flow that has got the least tokens of late.
    ProgramAwareFairness(flow::ProgramAware) Beta ["program-aware-fairness"] => [Fairness];
    /// First come, first served.
    FcfsOrdering(flow::Fcfs) Beta ["fcfs-ordering-policy"] => [Ordering];
    /// The request whose time in the queue ends first.
    EdfOrdering(flow::Edf) Beta ["edf-ordering-policy"] => [Ordering];
    /// The request whose first token is due first, by its header `x-llm-d-slo-ttft-ms`.
    SloDeadlineOrdering(flow::SloDeadline) Beta
        ["slo-deadline-ordering-policy"] => [Ordering];
    /// The same ceiling for every priority.
    StaticUsageLimit(flow::StaticLimit) Beta ["static-usage-limit-policy"] => [UsageLimit];
    /// Lower priorities stop earlier, which keeps room for higher ones.
    PriorityHoldback(flow::PriorityHoldback) Alpha
        ["priority-holdback-policy"] => [UsageLimit];
    /// The fuller the fleet, the fewer requests of lower priorities go.
    SoftReflectiveCeiling(flow::SoftReflective) Alpha
        ["soft-reflective-ceiling-policy"] => [UsageLimit];
    /// Requests below priority 0 may be stopped for others.
    SheddableEviction(flow::Sheddable) Alpha
        ["sheddable-eviction-filter"] => [EvictionFilter];
    /// The lowest priority is stopped first, and the youngest of it.
    PriorityThenTimeEviction(flow::PriorityThenTime) Alpha
        ["priority-then-time-eviction-order-policy"] => [EvictionOrder];
}

/// Names that llm-d deprecates: the name, since when, and what to write instead.
const DEPRECATED: [(&str, &str, &str); 7] = [
    ("by-label", "v0.9", "label-selector-filter"),
    ("by-label-selector", "v0.9", "label-selector-filter"),
    ("tokenizer", "v0.9", "token-producer"),
    ("disagg-headers-handler", "v0.9", "disagg-profile-handler alone"),
    ("prefill-header-handler", "v0.9", "disagg-profile-handler alone"),
    ("pd-profile-handler", "v0.7", "disagg-profile-handler"),
    ("kv-cache-scorer", "v0.3", "kv-cache-utilization-scorer"),
];

/// Why a name should be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deprecation {
    /// llm-d's release.
    pub since: &'static str,
    /// What to write.
    pub instead: &'static str,
}

impl PluginKind {
    /// The current name.
    pub fn name(self) -> &'static str {
        self.names()[0]
    }

    /// The type of a name, old names included.
    pub fn of_name(name: &str) -> Option<PluginKind> {
        PluginKind::ALL.iter().copied().find(|kind| kind.names().contains(&name))
    }

    /// What a name of it that will not last should be replaced with, and since when; `None` for
    /// names that stay.
    pub fn deprecation(self, written: &str) -> Option<Deprecation> {
        let found = DEPRECATED.iter().find(|(name, ..)| *name == written);
        found.map(|(_, since, instead)| Deprecation { since, instead })
    }

    /// Each of its names with what it does, for the JSON Schema.
    fn type_schemas(self) -> impl Iterator<Item = Schema> {
        self.names().iter().map(move |name| {
            let alpha = match self.stability() {
                Stability::Alpha => " Alpha: needs --allow-experimental-plugins.",
                Stability::Beta | Stability::Own => "",
            };
            let mut schema = json_schema!({
                "const": name,
                "description": format!("{}{alpha}", self.about()),
            });
            if let Some(old) = self.deprecation(name) {
                schema.insert("deprecated".into(), true.into());
                let about = format!("Deprecated since llm-d {}; write {}.", old.since, old.instead);
                schema.insert("description".into(), about.into());
            }
            schema
        })
    }

    /// Whether it has a role.
    pub fn is(self, role: Role) -> bool {
        self.roles().contains(&role)
    }
}

/// A plugin entry: which types there are, and the parameters of each. One condition for each type,
/// so that editors complete the parameters of the type that is written, and say what is wrong with
/// them rather than that no type fits.
pub(crate) fn entry_schema(generator: &mut SchemaGenerator) -> Schema {
    let kinds = PluginKind::ALL.iter();
    let types: Vec<Schema> = kinds.clone().flat_map(|kind| kind.type_schemas()).collect();
    let parameters: Vec<Schema> = kinds
        .map(|kind| {
            let schema = kind.schema(generator);
            json_schema!({
                "if": { "properties": { "type": { "enum": kind.names() } } },
                "then": {
                    "properties": { "parameters": { "anyOf": [schema, { "type": "null" }] } },
                },
            })
        })
        .collect();
    json_schema!({
        "type": "object",
        "properties": {
            "type": {
                "description": "What the plugin is; docs/plugins.md describes all types.",
                "oneOf": types,
            },
            "name": {
                "type": ["string", "null"],
                "description": "What other sections call it; its type when left out.",
            },
            "parameters": { "description": "What can be set, by type." },
        },
        "required": ["type"],
        "additionalProperties": false,
        "allOf": parameters,
    })
}

/// Reads parameters; a missing or `null` value is an empty map, so that a required field is
/// reported by its name.
fn parameters<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    struct Optional<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Optional<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of parameters")
        }
        fn visit_none<E: de::Error>(self) -> Result<T, E> {
            T::deserialize(crate::config::Buffered::Map(Vec::new()).into_deserializer::<E>())
        }
        fn visit_unit<E: de::Error>(self) -> Result<T, E> {
            self.visit_none()
        }
        fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<T, D::Error> {
            T::deserialize(inner)
        }
    }
    from.deserialize_option(Optional(std::marker::PhantomData))
}

/// Reads a type name: the type, and which of its names it was.
pub(crate) struct KindSeed;

impl<'de> DeserializeSeed<'de> for KindSeed {
    type Value = (PluginKind, &'static str);
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = (PluginKind, &'static str);
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a plugin type")
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
                PluginKind::ALL
                    .iter()
                    .find_map(|kind| Some((*kind, *kind.names().iter().find(|n| **n == name)?)))
                    .ok_or_else(|| E::custom(unknown_type(name)))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Reads the parameters of a type that is known.
pub(crate) struct ParametersSeed(pub PluginKind);

impl<'de> DeserializeSeed<'de> for ParametersSeed {
    type Value = PluginSpec;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<PluginSpec, D::Error> {
        self.0.read(deserializer)
    }
}

fn unknown_type(name: &str) -> String {
    let names = PluginKind::ALL.iter().flat_map(|kind| kind.names().iter().copied());
    format!(
        "plugin type `{name}` is not registered; nearest first: {} (docs/plugins.md has all)",
        known_names(name, names)
    )
}

/// Names that a message lists; the others are counted.
const NAMES_SHOWN_MAX: usize = 8;

/// The valid names for a message about one that is not: the nearest first, or in their own order
/// when nothing is wanted.
pub fn known_names<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> String {
    let names = match wanted {
        "" => names.collect(),
        _ => nearest_first(wanted, names),
    };
    match names.len().saturating_sub(NAMES_SHOWN_MAX) {
        0 if names.is_empty() => "none".to_owned(),
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..NAMES_SHOWN_MAX].join(", ")),
    }
}

/// Orders names by how little must be typed differently to get from `wanted` to them; what begins
/// alike is nearer, because people abbreviate and forget the middle.
pub fn nearest_first<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.collect();
    let alike = |name: &str| wanted.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    let far = |name: &str| edit_distance(wanted, name) + wanted.len() - alike(name);
    names.sort_by_key(|name| (far(name), *name));
    names
}

/// Levenshtein distance over bytes, on the first 64 of each: names are short, input may not be.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (&a.as_bytes()[..a.len().min(64)], &b.as_bytes()[..b.len().min(64)]);
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_nearest_comes_first() {
        let mut names: Vec<&str> =
            PluginKind::ALL.iter().flat_map(|kind| kind.names().iter().copied()).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(nearest_first("queu-scorer", names.into_iter())[0], "queue-scorer");
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
    }

    #[test]
    fn a_plugin_has_the_parts_of_its_roles() {
        for kind in PluginKind::ALL {
            let none = crate::config::Buffered::Null;
            let spec = kind.read(none.into_deserializer::<de::value::Error>()).unwrap();
            let parts = spec.parts();
            assert_eq!(parts.filter.is_some(), kind.is(Role::Filter), "{kind:?}");
            assert_eq!(parts.scorer.is_some(), kind.is(Role::Scorer), "{kind:?}");
            assert_eq!(parts.picker.is_some(), kind.is(Role::Picker), "{kind:?}");
            assert_eq!(parts.screener.is_some(), kind.is(Role::Screener), "{kind:?}");
            assert_eq!(parts.detector.is_some(), kind.is(Role::Detector), "{kind:?}");
            assert_eq!(parts.admitter.is_some(), kind.is(Role::Admitter), "{kind:?}");
        }
    }
}
