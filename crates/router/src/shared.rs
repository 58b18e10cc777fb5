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
use crate::events::Pulse;
use crate::events::bound::Bound;
use crate::metrics::{Metrics, cut};
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
    /// For subscribers of busy engines.
    pub pulse: Pulse,
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
    /// What bodies are read in.
    pub memory: crate::tokenize::Memory,
    pub tokenize_room: Arc<Semaphore>,
    /// How long reading a body takes, learned.
    pub tokenize_ns_per_kib: AtomicU64,
    /// Whose trouble is in the log.
    pub complaints: Complaints,
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
        self.metrics.count_upstream_failure(endpoint, reason);
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

    /// Room for a request body, of which nothing has come yet.
    pub fn hold_body(self: &Arc<Shared>) -> HeldBody {
        HeldBody { shared: Arc::clone(self), bytes: 0 }
    }

    /// The best that the plan can know about a prompt; anything less is a fallback.
    pub fn best_mode(&self) -> Mode {
        match self.tokens {
            _ if self.wants_events => Mode::Precise,
            TokensNeed::None => Mode::LoadOnly,
            TokensNeed::Estimated | TokensNeed::Exact => Mode::Approximate,
        }
    }

    /// Whether the configuration or an engine names a model.
    pub fn knows_model(&self, model: &str) -> bool {
        let is_served = |brain: &Brain| brain.fleet().iter().any(|e| e.serves(model) == Some(true));
        self.rewriter.names(model) || is_served(&self.brain.lock())
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }
}

/// What has been complained about in the log: each thing once, not with every request.
#[derive(Default)]
pub(crate) struct Complaints {
    names_max: usize,
    named: Mutex<FxHashSet<String>>,
    /// Apart from names, which clients choose: they cannot fill the room for these.
    setup: Mutex<FxHashSet<&'static str>>,
}

impl Complaints {
    /// Nothing yet; at most about so many names.
    pub fn new(names_max: u32) -> Complaints {
        Complaints { names_max: names_max as usize, ..Complaints::default() }
    }

    /// Whether trouble with `name`, a model's or an endpoint's, is worth a line now. Of longer
    /// names only the beginning counts.
    pub fn is_first(&self, name: &str) -> bool {
        let name = cut(name);
        let mut told = self.named.lock();
        told.len() < self.names_max && told.insert(name.to_owned())
    }

    /// The same for what is wrong with a proxy's set-up, of which there are few things.
    pub fn is_first_of_setup(&self, what: &'static str) -> bool {
        self.setup.lock().insert(what)
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

/// Bytes of one request's body in the account of those that are held; given back when dropped.
pub(crate) struct HeldBody {
    shared: Arc<Shared>,
    bytes: i64,
}

impl HeldBody {
    /// Takes room for so many more bytes, if there is as much.
    pub fn take(&mut self, bytes: usize) -> Result<(), RouteError> {
        let max = self.shared.settings.bodies_bytes_max;
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX / 2);
        self.bytes = self.bytes.saturating_add(bytes);
        let before = self.shared.metrics.bodies_held.inc_by(bytes);
        let fits = usize::try_from(before.saturating_add(bytes)).is_ok_and(|held| held <= max);
        if fits { Ok(()) } else { Err(RouteError::BodiesFull(max)) }
    }
}

impl Drop for HeldBody {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.shared.metrics.bodies_held.dec_by(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::LABEL_BYTES_MAX;

    #[test]
    fn names_leave_room_for_complaints_about_the_setup() {
        let complaints = Complaints::new(2);
        let told = ["a", "a", "b", "c"].map(|name| complaints.is_first(name));
        assert_eq!(told, [true, false, true, false]);
        let told = ["mode", "mode", "a"].map(|what| complaints.is_first_of_setup(what));
        assert_eq!(told, [true, false, true]);
    }

    #[test]
    fn long_names_are_not_kept() {
        let complaints = Complaints::new(8);
        let long = "x".repeat(1 << 20);
        assert!(complaints.is_first(&long));
        assert!(!complaints.is_first(&format!("{long} at an endpoint")));
        let kept: usize = complaints.named.lock().iter().map(String::capacity).sum();
        assert!(kept <= LABEL_BYTES_MAX, "{kept}");
    }
}
