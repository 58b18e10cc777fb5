//! How busy is each engine, and which models does it serve? One task asks them all.
//!
//! Every endpoint has a loop with its own connection and page buffer, both reused; the loops are
//! futures of one task, woken by their own timers at spread-out phases. An endpoint that does not
//! answer is asked less and less often; while it cannot be reached at all, requests go to others
//! first.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use kvroute_core::settings::ms;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::shared::Shared;
use crate::upstream::{Connection, Upstream, UpstreamError};

/// From so many failures in a row on, an endpoint that accepts connections but answers nothing
/// counts as unreachable, too. A single late page is what a busy engine looks like.
const MUTE_SCRAPES_MAX: u32 = 3;
/// Share of a scrape's time that connecting may take: less than all, so that a host that cannot be
/// reached is told from one that is slow.
const CONNECT_SHARE: f64 = 0.9;
/// Most doublings of an endpoint's back-off for one failed scrape; it starts in milliseconds, so
/// this covers any wait between scrapes.
const BACKOFF_DOUBLINGS_MAX: u32 = 16;

/// Watches every endpoint that comes through `added` until it leaves the fleet.
pub(crate) async fn run(shared: Arc<Shared>, mut added: mpsc::UnboundedReceiver<Arc<Upstream>>) {
    let mut watches = FuturesUnordered::new();
    loop {
        tokio::select! {
            upstream = added.recv() => match upstream {
                Some(upstream) => watches.push(Watch::new(Arc::clone(&shared), upstream).run()),
                None => return,
            },
            Some(()) = watches.next() => {}
        }
    }
}

/// The scraping of one endpoint.
struct Watch {
    shared: Arc<Shared>,
    upstream: Arc<Upstream>,
    connection: Option<Connection>,
    page: Vec<u8>,
    head: Vec<u8>,
    failures: u32,
}

impl Watch {
    fn new(shared: Arc<Shared>, upstream: Arc<Upstream>) -> Watch {
        let (connection, page, head) = (None, Vec::new(), Vec::new());
        Watch { shared, upstream, connection, page, head, failures: 0 }
    }

    async fn run(mut self) {
        let interval = ms(self.shared.settings.scrape_interval_ms.max(1));
        let models_every =
            Duration::from_secs(u64::from(self.shared.settings.models_interval_s.max(1)));
        let mut models_due = Instant::now();
        let mut due = models_due + interval.mul_f64(fastrand::f64());
        loop {
            let metrics_ok = self.metrics().await;
            if metrics_ok && Instant::now() >= models_due {
                self.models().await;
                models_due = Instant::now() + models_every;
            }
            let now = Instant::now();
            due = match self.failures {
                0 => (due + interval).max(now),
                n => now + self.backoff(n),
            };
            tokio::time::sleep_until(due).await;
            if self.shared.upstreams.get(self.upstream.id).is_none() {
                return;
            }
        }
    }

    /// Doubles from the interval with each failure; up to a quarter is random, so that engines
    /// that died together are not asked together.
    fn backoff(&self, failures: u32) -> Duration {
        self.delay_max(failures).mul_f64(1.0 - fastrand::f64() / 4.0)
    }

    fn delay_max(&self, failures: u32) -> Duration {
        let settings = &self.shared.settings;
        let max = settings.scrape_backoff_max_ms.max(settings.scrape_interval_ms);
        let delay = u64::from(settings.scrape_interval_ms) << failures.min(16);
        Duration::from_millis(delay.min(u64::from(max)))
    }

    async fn metrics(&mut self) -> bool {
        let outcome = self.get("/metrics").await;
        let failure = outcome.as_ref().err().map(reach_of);
        let (shared, upstream) = (&self.shared, &self.upstream);
        let now = shared.clock.now();
        upstream.metrics.scrapes.inc();
        let was_up = upstream.up.load(Ordering::Relaxed);
        let read = match outcome {
            Ok(200) => kvroute_wire::prometheus::parse(&self.page).map_err(|e| e.to_string()),
            Ok(status) => Err(format!("GET /metrics was answered with {status}")),
            Err(error) => Err(error.to_string()),
        };
        match read {
            Ok(page) => {
                if page.metrics.running > 0 {
                    upstream.note_busy(u64::from(shared.settings.scrape_interval_ms));
                }
                shared.brain.lock().on_metrics(now, upstream.id, &page.metrics);
                self.failures = 0;
                if !was_up {
                    info!(endpoint = upstream.name, "An endpoint answers.");
                }
            }
            Err(error) => {
                upstream.metrics.scrape_failures.inc();
                if self.failures == 0 {
                    warn!(endpoint = upstream.name, error, "An endpoint's metrics are missing.");
                }
                self.failures = self.failures.saturating_add(1);
                let mute = self.failures >= MUTE_SCRAPES_MAX;
                if failure.is_some_and(|reach| reach == Reach::None || mute) {
                    self.avoid();
                }
                shared.brain.lock().on_scrape_failed(now, upstream.id);
            }
        }
        upstream.up.store(self.failures == 0, Ordering::Relaxed);
        upstream.metrics.up.set(i64::from(self.failures == 0));
        self.failures == 0
    }

    /// Lets requests go to others first until the next scrape has come to its end, so that a dead
    /// endpoint is found by scrapes and not by requests. That holds as long as
    /// `failure_backoff_max_ms` exceeds the longest time between two scrapes.
    fn avoid(&self) {
        let (shared, id) = (&self.shared, self.upstream.id);
        let settings = &shared.settings;
        let longest = self.delay_max(self.failures) + ms(settings.scrape_timeout_ms.max(1));
        let now = shared.clock.now();
        let mut brain = shared.brain.lock();
        for _ in 0..BACKOFF_DOUBLINGS_MAX {
            brain.on_endpoint_failed(now, id);
            if brain.fleet().get(id).is_none_or(|e| e.is_avoided(now + longest)) {
                return;
            }
        }
    }

    async fn models(&mut self) {
        let name = &self.upstream.name.clone();
        match self.get("/v1/models").await {
            Ok(200) => match kvroute_wire::models::parse(&self.page) {
                Ok(models) => self.shared.brain.lock().on_models(self.upstream.id, models),
                Err(error) => debug!(endpoint = name, %error, "The model list cannot be read."),
            },
            Ok(status) => debug!(endpoint = name, status, "The endpoint lists no models."),
            Err(error) => debug!(endpoint = name, %error, "The endpoint lists no models."),
        }
    }

    /// Reads a page into `self.page`; the answer's status.
    async fn get(&mut self, path: &str) -> Result<u16, UpstreamError> {
        let timeout = ms(self.shared.settings.scrape_timeout_ms.max(1));
        let connection = self.connection.take();
        let reused = connection.is_some();
        let outcome = tokio::time::timeout(timeout, self.exchange(path, connection, timeout)).await;
        match outcome.unwrap_or(Err(UpstreamError::FirstByteTimeout(timeout))) {
            // The engine may have closed a connection that was idle.
            Err(UpstreamError::Closed | UpstreamError::Broken(_)) if reused => {
                let again = self.exchange(path, None, timeout);
                tokio::time::timeout(timeout, again)
                    .await
                    .unwrap_or(Err(UpstreamError::FirstByteTimeout(timeout)))
            }
            other => other,
        }
    }

    async fn exchange(
        &mut self,
        path: &str,
        connection: Option<Connection>,
        timeout: Duration,
    ) -> Result<u16, UpstreamError> {
        let mut connection = match connection {
            Some(connection) => connection,
            None => {
                let limit = timeout.mul_f64(CONNECT_SHARE);
                Connection::open(self.upstream.address, limit).await?
            }
        };
        self.head.clear();
        for part in ["GET ", path, " HTTP/1.1\r\nhost: ", &self.upstream.authority, "\r\n\r\n"] {
            self.head.extend_from_slice(part.as_bytes());
        }
        connection.send(&self.head, b"").await?;
        let mut head = connection.read_head(false).await?;
        let bytes_max = self.shared.settings.scrape_bytes_max;
        connection.read_body(&mut head.framing, &mut self.page, bytes_max).await?;
        if head.keep_alive {
            self.connection = Some(connection);
        }
        Ok(head.status.as_u16())
    }
}

/// How far a scrape that failed came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// No connection.
    None,
    /// A connection, but no complete answer.
    Connected,
}

fn reach_of(error: &UpstreamError) -> Reach {
    match error {
        UpstreamError::Connect(_) | UpstreamError::ConnectTimeout(_) => Reach::None,
        _ => Reach::Connected,
    }
}
