//! How busy is each engine, and which models does it serve? One task asks them all, where and as
//! often as the plan says.
//!
//! Every endpoint has a loop for each page, with its own connection and page buffer, both reused;
//! the loops are futures of one task. Endpoints are asked in groups, each at its own phase of the
//! interval: to wake a thread costs more than to read a page, so a timer for each endpoint would
//! be most of the work, and all of them at once would hold up requests. The first page tells
//! whether an endpoint answers: one that does not is asked less and less often, and while it cannot
//! be reached at all, requests go to others first. Trouble with further pages, such as those of a
//! DCGM exporter, is counted and otherwise left alone.

mod fetch;
mod read;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use kvroute_core::collect::CollectPlan;
use kvroute_core::settings::ms;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use self::fetch::{Asked, Fetch, Place};
use self::read::{PageReader, Told};
use crate::metrics::EndpointSource;
use crate::shared::Shared;
use crate::upstream::{Upstream, UpstreamError};

/// From so many failures in a row on, an endpoint that accepts connections but answers nothing
/// counts as unreachable, too. A single late page is what a busy engine looks like.
const MUTE_SCRAPES_MAX: u32 = 3;
/// Most doublings of an endpoint's back-off for one failed scrape; it starts in milliseconds, so
/// this covers any wait between scrapes.
const BACKOFF_DOUBLINGS_MAX: u32 = 16;
/// Endpoints that are asked together.
const GROUP: u16 = 32;
/// How far apart groups are asked, at most.
const GROUP_GAP: Duration = Duration::from_millis(7);
/// Numbers of the user's choice hold for so many intervals of their page at least.
const ATTRIBUTE_INTERVALS: u32 = 3;

/// The plan as the scraping task needs it: names compiled, files of TLS read.
pub(crate) struct Collector {
    pages: Vec<Page>,
    models: Asked,
}

struct Page {
    asked: Asked,
    reader: PageReader,
}

impl Collector {
    /// The error names a file that cannot be used.
    pub fn new(plan: &CollectPlan) -> Result<Collector, String> {
        let pages = plan.pages.iter().enumerate().map(|(at, page)| {
            let reader = PageReader::new(&page.readings, at == 0);
            Ok(Page { asked: Asked::new(&page.ask)?, reader })
        });
        Ok(Collector {
            pages: pages.collect::<Result<_, String>>()?,
            models: Asked::new(&plan.models)?,
        })
    }

    fn models_every(&self, shared: &Shared) -> Duration {
        let default = u64::from(shared.settings.models_interval_s.max(1));
        self.models.ask.interval.unwrap_or(Duration::from_secs(default))
    }
}

/// Watches every endpoint that comes through `added` until it leaves the fleet.
pub(crate) async fn run(
    shared: Arc<Shared>,
    collector: Arc<Collector>,
    mut added: mpsc::UnboundedReceiver<Arc<Upstream>>,
) {
    let mut watches = FuturesUnordered::new();
    let begin = Instant::now();
    loop {
        tokio::select! {
            upstream = added.recv() => {
                let Some(upstream) = upstream else { return };
                for page in 0..collector.pages.len().max(1) {
                    watches.push(Watch::new(&shared, &collector, &upstream, page, begin).run());
                }
            },
            Some(()) = watches.next() => {}
        }
    }
}

/// The reading of one page of one endpoint; with the first goes the list of models.
struct Watch {
    shared: Arc<Shared>,
    collector: Arc<Collector>,
    upstream: Arc<Upstream>,
    /// Index of the page. There may be none; then the list of models tells who answers.
    page: usize,
    /// Between two readings.
    interval: Duration,
    /// Turns are multiples of the interval after this.
    turns_since: Instant,
    fetch: Fetch,
    /// For the models, where they are not asked for over the same connection.
    fetch_models: Option<Fetch>,
    told: Told,
    failures: u32,
    /// What was missing on the last page that could be read.
    missing: Option<String>,
}

/// Why an endpoint's page tells nothing.
struct Failure {
    words: String,
    reach: Reach,
}

/// How far a scrape that failed came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// No connection.
    None,
    /// A connection, but no complete answer.
    Connected,
    /// An answer of no use.
    Answered,
    /// A page that could not be understood.
    Read,
}

impl From<UpstreamError> for Failure {
    fn from(error: UpstreamError) -> Failure {
        let reach = match &error {
            UpstreamError::Connect(_) | UpstreamError::ConnectTimeout(_) => Reach::None,
            _ => Reach::Connected,
        };
        Failure { words: error.to_string(), reach }
    }
}

impl Watch {
    fn new(
        shared: &Arc<Shared>,
        collector: &Arc<Collector>,
        upstream: &Arc<Upstream>,
        page: usize,
        turns_since: Instant,
    ) -> Watch {
        let models = &collector.models;
        let models_place = Place::of_endpoint(models, upstream);
        let default = ms(shared.settings.scrape_interval_ms.max(1));
        let (fetch, fetch_models, interval, told) = match collector.pages.get(page) {
            Some(Page { asked, reader }) => {
                let place = Place::of_metrics(asked, upstream);
                let shares = place.is_same(&models_place, [&asked.ask, &models.ask]);
                let interval = asked.ask.interval.unwrap_or(default);
                let own = (page == 0 && !shares).then(|| Fetch::new(models_place));
                (Fetch::new(place), own, interval, reader.told(upstream))
            }
            None => {
                let interval = collector.models_every(shared);
                (Fetch::new(models_place), None, interval, Told::default())
            }
        };
        Watch {
            shared: Arc::clone(shared),
            collector: Arc::clone(collector),
            upstream: Arc::clone(upstream),
            page,
            interval,
            turns_since,
            fetch,
            fetch_models,
            told,
            failures: 0,
            missing: None,
        }
    }

    async fn run(mut self) {
        let models_every = self.collector.models_every(&self.shared);
        let mut models_due = Instant::now();
        loop {
            let went_well = match self.page {
                0 => self.first_page().await,
                _ => self.further_page().await,
            };
            let asks_models = self.page == 0 && !self.collector.pages.is_empty();
            if went_well && asks_models && Instant::now() >= models_due {
                if let Err(failure) = self.models().await {
                    let (endpoint, error) = (&self.upstream.name, failure.words);
                    debug!(endpoint, error, "The endpoint lists no models.");
                }
                models_due = Instant::now() + models_every;
            }
            let due = match self.failures {
                0 => self.next_turn(),
                n => Instant::now() + self.backoff(n),
            };
            tokio::time::sleep_until(due).await;
            if self.shared.upstreams.get(self.upstream.id).is_none() {
                self.forget();
                return;
            }
        }
    }

    /// When the endpoint's group is asked next.
    fn next_turn(&self) -> Instant {
        let phase = GROUP_GAP.saturating_mul(u32::from(self.upstream.id.slot / GROUP));
        next_turn(self.turns_since, phase, self.interval, Instant::now())
    }

    /// Doubles from the interval with each failure; up to a quarter is random, so that engines
    /// that died together are not asked together.
    fn backoff(&self, failures: u32) -> Duration {
        self.delay_max(failures).mul_f64(1.0 - fastrand::f64() / 4.0)
    }

    fn delay_max(&self, failures: u32) -> Duration {
        let max = ms(self.shared.settings.scrape_backoff_max_ms).max(self.interval);
        self.interval.saturating_mul(1 << failures.min(16)).min(max)
    }

    fn timeout(&self) -> Duration {
        ms(self.shared.settings.scrape_timeout_ms.max(1))
    }

    /// The page that tells whether the endpoint answers; whether it does.
    async fn first_page(&mut self) -> bool {
        let outcome = match self.collector.pages.is_empty() {
            true => self.models().await,
            false => self.read().await,
        };
        let (shared, upstream) = (&self.shared, &self.upstream);
        upstream.metrics.scrapes.inc();
        match outcome {
            Ok(()) => {
                if self.told.load.as_ref().is_some_and(|load| load.running > 0) {
                    let interval_ms = u64::try_from(self.interval.as_millis()).unwrap_or(u64::MAX);
                    upstream.note_busy(interval_ms);
                }
                self.failures = 0;
                if !upstream.up.load(Ordering::Relaxed) {
                    info!(endpoint = upstream.name, "An endpoint answers.");
                }
            }
            Err(Failure { words, reach }) => {
                upstream.metrics.scrape_failures.inc();
                self.count_failure(reach);
                if self.failures == 0 {
                    let error = words;
                    warn!(endpoint = upstream.name, error, "An endpoint's metrics are missing.");
                }
                self.failures = self.failures.saturating_add(1);
                let mute = self.failures >= MUTE_SCRAPES_MAX && reach == Reach::Connected;
                if reach == Reach::None || mute {
                    self.avoid();
                }
                let tells_load = |page: &Page| page.reader.tells_load();
                if self.collector.pages.first().is_some_and(tells_load) {
                    shared.brain.lock().on_scrape_failed(shared.clock.now(), upstream.id);
                }
            }
        }
        self.upstream.up.store(self.failures == 0, Ordering::Relaxed);
        self.upstream.metrics.up.set(i64::from(self.failures == 0));
        self.failures == 0
    }

    /// A page about something else; its trouble is nobody else's.
    async fn further_page(&mut self) -> bool {
        let outcome = self.read().await;
        let (metrics, label) = (&self.shared.metrics, self.label());
        metrics.source_scrapes.get_or_create(&label).inc();
        match outcome {
            Ok(()) => self.failures = 0,
            Err(Failure { words, reach }) => {
                self.count_failure(reach);
                metrics.source_failures.get_or_create(&label).inc();
                if self.failures == 0 {
                    let (endpoint, source, error) = (&label.endpoint, &label.source, words);
                    warn!(endpoint, source, error, "A source tells nothing about an endpoint.");
                }
                self.failures = self.failures.saturating_add(1);
            }
        }
        self.failures == 0
    }

    fn label(&self) -> EndpointSource {
        let page = self.collector.pages.get(self.page);
        let source = page.map_or_else(String::new, |page| page.asked.ask.source.to_string());
        EndpointSource { endpoint: self.upstream.name.clone(), source }
    }

    fn forget(&self) {
        if self.page > 0 {
            self.shared.metrics.source_scrapes.remove(&self.label());
            self.shared.metrics.source_failures.remove(&self.label());
        }
    }

    /// Fetches the page and tells the brain what it says.
    async fn read(&mut self) -> Result<(), Failure> {
        let timeout = self.timeout();
        let Some(Page { asked, reader }) = self.collector.pages.get(self.page) else {
            return Ok(());
        };
        let path = &asked.ask.path;
        let bytes_max = asked.ask.bytes_max.unwrap_or(self.shared.settings.scrape_bytes_max);
        let status = self.fetch.get(path, timeout, bytes_max).await?;
        let useless = |words| Failure { words, reach: Reach::Answered };
        if status != 200 {
            return Err(useless(format!("GET {path} was answered with {status}")));
        }
        let outcome = reader.read(&self.fetch.page, &mut self.told);
        self.tell(reader);
        if outcome.is_ok() && self.told.missing != self.missing {
            self.missing.clone_from(&self.told.missing);
            if let Some(missing) = &self.missing {
                let (endpoint, source) = (&self.upstream.name, asked.ask.source.as_str());
                warn!(endpoint, source, missing, "A page does not tell all that is asked for.");
            }
        }
        outcome.map_err(|words| Failure { words, reach: Reach::Read })
    }

    /// Counts a page without numbers under llm-d's names, where they are asked for.
    fn count_failure(&self, reach: Reach) {
        let Some(names) = &self.shared.metrics.upstream else { return };
        let Some(Page { asked, reader }) = self.collector.pages.get(self.page) else { return };
        match reader.first().filter(|_| reach == Reach::Read) {
            Some(extractor) => names.count_extract_error(&asked.ask.source, extractor),
            None => names.count_poll_error(&asked.ask.source),
        }
    }

    fn tell(&self, reader: &PageReader) {
        let (shared, id) = (&self.shared, self.upstream.id);
        let staleness = ms(shared.settings.metrics_staleness_ms);
        let valid_for = staleness.max(self.interval.saturating_mul(ATTRIBUTE_INTERVALS));
        let now = shared.clock.now();
        let mut brain = shared.brain.lock();
        if let Some(load) = &self.told.load {
            brain.on_metrics(now, id, load);
        }
        for (producer, values) in self.told.values(reader) {
            brain.on_attributes(now, id, producer.as_str(), values, valid_for);
        }
    }

    /// Lets requests go to others first until the next scrape has come to its end, so that a dead
    /// endpoint is found by scrapes and not by requests. That holds as long as
    /// `failure_backoff_max_ms` exceeds the longest time between two scrapes.
    fn avoid(&self) {
        let (shared, id) = (&self.shared, self.upstream.id);
        let longest = self.delay_max(self.failures) + self.timeout();
        let now = shared.clock.now();
        let mut brain = shared.brain.lock();
        for _ in 0..BACKOFF_DOUBLINGS_MAX {
            brain.on_endpoint_failed(now, id);
            if brain.fleet().get(id).is_none_or(|e| e.is_avoided(now + longest)) {
                return;
            }
        }
    }

    async fn models(&mut self) -> Result<(), Failure> {
        let path = &self.collector.models.ask.path;
        let (timeout, bytes_max) = (self.timeout(), self.shared.settings.scrape_bytes_max);
        let fetch = self.fetch_models.as_mut().unwrap_or(&mut self.fetch);
        let status = fetch.get(path, timeout, bytes_max).await?;
        let useless = |words| Failure { words, reach: Reach::Answered };
        if status != 200 {
            return Err(useless(format!("GET {path} was answered with {status}")));
        }
        let models =
            kvroute_wire::models::parse(&fetch.page).map_err(|error| useless(error.to_string()))?;
        self.shared.brain.lock().on_models(self.upstream.id, models);
        Ok(())
    }
}

/// The first time after `now` that is `phase` and a whole number of intervals after `begin`:
/// exactly the same for all that have the phase, so that one wake-up serves them.
fn next_turn(begin: Instant, phase: Duration, interval: Duration, now: Instant) -> Instant {
    let interval_ns = interval.as_nanos().max(1);
    let phase_ns = phase.as_nanos() % interval_ns;
    let since_ns = now.saturating_duration_since(begin).as_nanos();
    let turns = (since_ns + interval_ns - phase_ns) / interval_ns;
    let at_ns = turns * interval_ns + phase_ns;
    begin + Duration::from_nanos(u64::try_from(at_ns).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_after_now_and_the_same_for_a_group() {
        let begin = Instant::now();
        let ms = Duration::from_millis;
        for (now_ms, phase_ms, due_ms) in [
            (0, 0, 50),
            (0, 7, 7),
            (7, 7, 57),
            (49, 0, 50),
            (50, 0, 100),
            (120, 7, 157),
            (3, 57, 7),
        ] {
            let due = next_turn(begin, ms(phase_ms), ms(50), begin + ms(now_ms));
            assert_eq!(due - begin, ms(due_ms), "{now_ms} {phase_ms}");
        }
    }
}
