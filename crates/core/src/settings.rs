//! Which limits hold in one process? The `kvroute:` key of the configuration.
//!
//! Every queue, cache, body, wait and label set of the product is bounded by a field here; the
//! unit is part of the name. A configuration of llm-d has no such key and gets the defaults.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::rewrite::ModelRewrite;

/// All limits, with defaults. Each field may be left out.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Largest request body; a larger one is answered with 413.
    pub body_bytes_max: usize,
    /// Bytes of request bodies held at once, over all requests, from their arrival until they have
    /// been sent on; not less than `body_bytes_max`. Requests whose bodies find no room are
    /// answered with 503.
    pub bodies_bytes_max: usize,
    /// Largest request head (request line and headers).
    pub header_bytes_max: usize,
    /// Client connections at once.
    pub connections_max: u32,
    /// Requests between decision and end of response, over all endpoints.
    pub inflight_requests_max: u32,
    /// A request that shows no sign of life for this long is taken as over, and what it reserved
    /// is given back.
    pub inflight_age_max_s: u32,
    /// Endpoints in the fleet.
    pub endpoints_max: u16,
    /// Memory of the residency index.
    pub index_bytes_max: usize,
    /// Routing history per endpoint, in blocks. An `approx-prefix-cache-producer` that asks for
    /// more (`lruCapacityPerServer`) raises it; left at its default, one that asks for less lowers
    /// it, unless there is a precise producer.
    pub history_blocks_per_endpoint_max: u32,
    /// Blocks per endpoint that wait for their parent to become known.
    pub pending_blocks_per_endpoint_max: u32,
    /// Speculative entries at once.
    pub speculations_max: u32,
    /// Blocks of requests in flight that are counted as shared or not, for what requests cost;
    /// beyond it they count as shared by nobody.
    pub inflight_blocks_max: u32,
    /// Whether precise knowledge counts blocks of requests on their way; when left out, what the
    /// producer's `speculativeIndexing` says.
    pub speculative: Option<bool>,
    /// Longest life of a speculative entry whose producer sets no `speculativeTTL`.
    pub speculative_ttl_ms: u32,
    /// How long a speculative entry outlives the first response chunk, so that the engine's own
    /// event can take over without a gap.
    pub speculative_grace_ms: u32,
    /// Memory of the last decisions kept for `/decisions`.
    pub decisions_bytes_max: usize,
    /// Largest snapshot of the fleet that `/snapshot` gives; a larger one is answered with 413.
    pub snapshot_bytes_max: usize,
    /// Longest recording of `--record`; a longer one is cut, and says so.
    pub recording_bytes_max: u64,
    /// Memory of what waits to be written to it; when that is full, the recording is cut.
    pub recording_queue_bytes_max: usize,
    /// Further endpoints tried when one fails before its first response byte.
    pub retries_max: u32,
    /// TCP connect to an endpoint.
    pub connect_timeout_ms: u32,
    /// From the request's last byte to the response's first.
    pub first_byte_timeout_s: u32,
    /// Between two chunks of a response.
    pub response_idle_timeout_s: u32,
    /// A client has this long for the request head.
    pub client_header_timeout_ms: u32,
    /// Between two parts of a request body.
    pub client_body_timeout_s: u32,
    /// From a complete request to its decision: tokenizing and waiting in windows included. Later
    /// ones are answered with 503.
    pub decision_timeout_ms: u32,
    /// A request that a proxy sends over ext_proc must be complete this long after its head.
    pub ext_proc_request_timeout_s: u32,
    /// Longest life of an ext_proc stream: a request with its answer.
    pub ext_proc_stream_timeout_s: u32,
    /// Largest message of an ext_proc stream.
    pub ext_proc_message_bytes_max: usize,
    /// Streams of one ext_proc connection at once; a proxy opens another one for more.
    pub ext_proc_streams_per_connection_max: u32,
    /// Idle keep-alive connections to endpoints are closed after this.
    pub upstream_idle_timeout_s: u32,
    /// Idle keep-alive connections kept per endpoint.
    pub upstream_idle_connections_max: u32,
    /// After SIGTERM, requests in flight have this long.
    pub drain_timeout_s: u32,
    /// Between two scrapes of an endpoint's metrics.
    pub scrape_interval_ms: u32,
    /// One scrape, connect included.
    pub scrape_timeout_ms: u32,
    /// Largest metrics page that is read.
    pub scrape_bytes_max: usize,
    /// Longest wait between scrapes of an endpoint that does not answer.
    pub scrape_backoff_max_ms: u32,
    /// Metrics older than this count as missing.
    pub metrics_staleness_ms: u32,
    /// Between two readings of an endpoint's `/v1/models`.
    pub models_interval_s: u32,
    /// An endpoint that refused or reset a connection is avoided this long; doubled each time.
    pub failure_backoff_ms: u32,
    /// Upper end of that doubling.
    pub failure_backoff_max_ms: u32,
    /// Event batches held back while a replay fills a gap. At least the one that showed it, or a
    /// stream whose replays fail would never go on.
    pub stream_held_batches_max: u32,
    /// Between two replays of one endpoint.
    pub replay_cooldown_ms: u32,
    /// One replay, from request to end marker.
    pub replay_timeout_ms: u32,
    /// A silent event stream of a busy endpoint is reconnected after this.
    pub event_idle_watchdog_s: u32,
    /// Largest event message that is read.
    pub event_bytes_max: usize,
    /// Engines that are connected to `zmqEndpoint` at once; each may hold one unfinished message
    /// of `event_bytes_max`.
    pub event_connections_max: u32,
    /// Between two looks at discovery files and host names.
    pub discovery_interval_ms: u32,
    /// Memory of the tokenizer's prefix cache.
    pub tokenizer_cache_bytes_max: usize,
    /// Prompts tokenized at once; 0: one per core.
    pub tokenize_concurrency_max: u32,
    /// Distinct values of a metrics label that clients control (model names); more become `other`.
    pub label_values_max: u32,
    /// Not a limit: priority by the name that requests give in `x-llm-d-inference-objective`, as
    /// InferenceObjectives have it in Kubernetes. Requests below 0 are refused while the fleet is
    /// full.
    pub objectives: BTreeMap<String, i32>,
    /// Not a limit: which models serve requests that name others, as InferenceModelRewrites say it
    /// in Kubernetes. The request goes out with the name of the model that serves it, its answer
    /// comes back with the name that the client gave; nothing else in them changes. A rule that
    /// names a model beats one without matches; of several rules the first counts. A rule wins
    /// over the header `x-llm-d-model-name-rewrite`.
    pub model_rewrites: Vec<ModelRewrite>,
    /// Sessions that `session-affinity-scorer` remembers.
    pub sessions_max: u32,
    /// Evidence at which an endpoint's event knowledge is put in doubt: a prediction that was too
    /// high adds 2, or 1 when other requests ran beside it; one that was right clears it.
    pub drift_evidence_max: u32,
    /// Correct predictions in a row after which that doubt ends.
    pub drift_agreements_min: u32,
}

impl Default for Settings {
    fn default() -> Settings {
        const MIB: usize = 1 << 20;
        Settings {
            body_bytes_max: 32 * MIB,
            bodies_bytes_max: 1_024 * MIB,
            header_bytes_max: 64 << 10,
            connections_max: 16_384,
            inflight_requests_max: 16_384,
            inflight_age_max_s: 3_600,
            endpoints_max: 4_096,
            index_bytes_max: 1_024 * MIB,
            history_blocks_per_endpoint_max: 31_250,
            pending_blocks_per_endpoint_max: 8_192,
            speculations_max: 65_536,
            inflight_blocks_max: 4_194_304,
            speculative: None,
            speculative_ttl_ms: 30_000,
            speculative_grace_ms: 250,
            decisions_bytes_max: 16 * MIB,
            snapshot_bytes_max: 64 * MIB,
            recording_bytes_max: 16 << 30,
            recording_queue_bytes_max: 64 * MIB,
            retries_max: 2,
            connect_timeout_ms: 2_000,
            first_byte_timeout_s: 600,
            response_idle_timeout_s: 300,
            client_header_timeout_ms: 10_000,
            client_body_timeout_s: 30,
            decision_timeout_ms: 30_000,
            ext_proc_request_timeout_s: 300,
            ext_proc_stream_timeout_s: 7_200,
            ext_proc_message_bytes_max: 4 * MIB,
            ext_proc_streams_per_connection_max: 10_000,
            upstream_idle_timeout_s: 90,
            upstream_idle_connections_max: 256,
            drain_timeout_s: 30,
            scrape_interval_ms: 50,
            scrape_timeout_ms: 1_000,
            scrape_bytes_max: 4 * MIB,
            scrape_backoff_max_ms: 5_000,
            metrics_staleness_ms: 2_000,
            models_interval_s: 10,
            failure_backoff_ms: 500,
            failure_backoff_max_ms: 10_000,
            stream_held_batches_max: 4_096,
            replay_cooldown_ms: 5_000,
            replay_timeout_ms: 30_000,
            event_idle_watchdog_s: 30,
            event_bytes_max: 64 * MIB,
            event_connections_max: 4_096,
            discovery_interval_ms: 1_000,
            tokenizer_cache_bytes_max: 64 * MIB,
            tokenize_concurrency_max: 0,
            label_values_max: 1_000,
            objectives: BTreeMap::new(),
            model_rewrites: Vec::new(),
            sessions_max: 65_536,
            drift_evidence_max: 6,
            drift_agreements_min: 5,
        }
    }
}

impl Settings {
    /// The first field whose 0 would stop the product rather than switch something off.
    pub fn zero(&self) -> Option<&'static str> {
        let fields = [
            ("body_bytes_max", self.body_bytes_max),
            ("header_bytes_max", self.header_bytes_max),
            ("index_bytes_max", self.index_bytes_max),
            ("scrape_bytes_max", self.scrape_bytes_max),
            ("event_bytes_max", self.event_bytes_max),
            ("endpoints_max", usize::from(self.endpoints_max)),
            ("connections_max", self.connections_max as usize),
            ("inflight_requests_max", self.inflight_requests_max as usize),
            ("inflight_age_max_s", self.inflight_age_max_s as usize),
            ("connect_timeout_ms", self.connect_timeout_ms as usize),
            ("first_byte_timeout_s", self.first_byte_timeout_s as usize),
            ("response_idle_timeout_s", self.response_idle_timeout_s as usize),
            ("client_header_timeout_ms", self.client_header_timeout_ms as usize),
            ("client_body_timeout_s", self.client_body_timeout_s as usize),
            ("decision_timeout_ms", self.decision_timeout_ms as usize),
            ("ext_proc_request_timeout_s", self.ext_proc_request_timeout_s as usize),
            ("ext_proc_stream_timeout_s", self.ext_proc_stream_timeout_s as usize),
            ("ext_proc_message_bytes_max", self.ext_proc_message_bytes_max),
            (
                "ext_proc_streams_per_connection_max",
                self.ext_proc_streams_per_connection_max as usize,
            ),
            ("scrape_interval_ms", self.scrape_interval_ms as usize),
            ("scrape_timeout_ms", self.scrape_timeout_ms as usize),
            ("metrics_staleness_ms", self.metrics_staleness_ms as usize),
            ("models_interval_s", self.models_interval_s as usize),
            ("stream_held_batches_max", self.stream_held_batches_max as usize),
            ("replay_timeout_ms", self.replay_timeout_ms as usize),
            ("discovery_interval_ms", self.discovery_interval_ms as usize),
        ];
        fields.into_iter().find(|(_, value)| *value == 0).map(|(name, _)| name)
    }

    /// Age from which metrics count as missing.
    pub fn metrics_staleness(&self) -> Duration {
        ms(self.metrics_staleness_ms)
    }
}

/// A setting in milliseconds as a duration.
pub fn ms(value: u32) -> Duration {
    Duration::from_millis(u64::from(value))
}
