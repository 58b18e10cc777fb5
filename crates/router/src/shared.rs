//! What do all tasks of a router share?

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use kvroute_core::brain::Brain;
use kvroute_core::decision::Mode;
use kvroute_core::plan::TokensNeed;
use kvroute_core::produce::TokenEstimate;
use kvroute_core::settings::Settings;
use kvroute_wire::parsers::Parsers;
use parking_lot::Mutex;
use rustc_hash::FxHashSet;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::clock::Clock;
use crate::config::Tokenizers;
use crate::decisions::Decisions;
use crate::error::RouteError;
use crate::events::bound::Bound;
use crate::metrics::{EndpointReason, Metrics};
use crate::recorder::Recorder;
use crate::rewrite::Rewriter;
use crate::upstream::{PoolLimits, Upstream, Upstreams};

/// How far a router is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Taking requests.
    Serving,
    /// Finishing those that are there; a proxy's requests still come over ext_proc.
    Draining,
    /// Nothing new from anybody.
    Closing,
    /// Breaking off what is left.
    Stopped,
}

/// State of one router.
pub(crate) struct Shared {
    pub settings: Settings,
    pub clock: Clock,
    /// Held for one decision, one event batch or one scrape at a time, never over an await.
    pub brain: Mutex<Brain>,
    /// Writes down what the brain hears.
    pub recorder: Option<Recorder>,
    pub upstreams: Upstreams,
    /// Where engines connect to tell their KV events.
    pub bound: Option<Bound>,
    pub metrics: Metrics,
    pub decisions: Decisions,
    /// Text of the configuration; empty: the built-in one.
    pub config: String,
    pub tokenizers: Tokenizers,
    pub default_model: Option<String>,
    /// Which models serve requests that name others.
    pub rewriter: Rewriter,
    /// Proxies are told every candidate's score.
    pub tells_scores: bool,
    /// The plan uses KV events.
    pub wants_events: bool,
    /// Which tokens the plan reads.
    pub tokens: TokensNeed,
    /// The plan has windows in which requests wait for others.
    pub holds: bool,
    /// Where requests go on each host, when not to the endpoint's own port.
    pub primary_port: Option<u16>,
    /// How tokens are estimated.
    pub estimate: TokenEstimate,
    /// Which APIs are read.
    pub parsers: Parsers,
    /// Request headers that the plan's plugins read, lower case.
    pub scheduling_headers: Vec<String>,
    pub tokenize_room: Arc<Semaphore>,
    /// How long reading a body takes, learned.
    pub tokenize_ns_per_kib: AtomicU64,
    /// Models, and models at endpoints, whose trouble with tokens is in the log.
    pub tokenizer_complaints: Mutex<FxHashSet<String>>,
    /// What is wrong with sources of endpoints right now.
    pub discovery_errors: Mutex<Vec<String>>,
    /// A source of endpoints that cannot be asked.
    pub endpoints_missing: Option<String>,
    pub phase: watch::Sender<Phase>,
    /// Every source of endpoints has told what it lists.
    pub sources_read: watch::Sender<bool>,
    /// Proxies that are connected.
    pub grpc_connections: AtomicU32,
    /// Requests under way.
    pub inflight: AtomicU32,
    /// Endpoints for the scraping task; at most `endpoints_max` wait here.
    pub scraper: mpsc::UnboundedSender<Arc<Upstream>>,
}

impl Shared {
    /// Starts watching an endpoint's metrics.
    pub fn watch(&self, upstream: Arc<Upstream>) {
        // The task ends only with the router, when nobody needs metrics any more.
        let _ = self.scraper.send(upstream);
    }

    /// Limits of each endpoint's connection pool.
    pub fn pool_limits(&self) -> PoolLimits {
        PoolLimits {
            idle_max: self.settings.upstream_idle_connections_max as usize,
            idle_timeout: Duration::from_secs(u64::from(self.settings.upstream_idle_timeout_s)),
            connect_timeout: kvroute_core::settings::ms(self.settings.connect_timeout_ms.max(1)),
        }
    }

    /// Counts a failed exchange.
    pub fn count_upstream_failure(&self, endpoint: &str, reason: &'static str) {
        let label = EndpointReason { endpoint: endpoint.to_owned(), reason };
        self.metrics.upstream_failures.get_or_create(&label).inc();
    }

    /// A place for one more request, if there is one.
    pub fn admit(self: &Arc<Shared>) -> Result<Inflight, RouteError> {
        let max = self.settings.inflight_requests_max;
        let place = Inflight { shared: Arc::clone(self) };
        self.metrics.requests_inflight.inc();
        if self.inflight.fetch_add(1, Ordering::AcqRel) >= max {
            return Err(RouteError::Inflight(max));
        }
        Ok(place)
    }

    /// The best that the plan can know about a prompt; anything less is a fallback.
    pub fn best_mode(&self) -> Mode {
        match self.tokens {
            _ if self.wants_events => Mode::Precise,
            TokensNeed::None => Mode::LoadOnly,
            TokensNeed::Estimated | TokensNeed::Exact => Mode::Approximate,
        }
    }

    /// Whether trouble with the tokens of `what` is worth a line: said once, and not for more
    /// names than labels.
    pub fn is_first_complaint(&self, what: &str) -> bool {
        let mut told = self.tokenizer_complaints.lock();
        told.len() < self.settings.label_values_max as usize && told.insert(what.to_owned())
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }
}

/// A request's place among those under way; given back when dropped.
pub(crate) struct Inflight {
    shared: Arc<Shared>,
}

impl Drop for Inflight {
    fn drop(&mut self) {
        self.shared.inflight.fetch_sub(1, Ordering::AcqRel);
        self.shared.metrics.requests_inflight.dec();
    }
}
