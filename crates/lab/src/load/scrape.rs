//! How loaded are the engines, by their own metrics pages?

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use kvroute_wire::prometheus;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::client::{self, PAGE_BYTES_MAX};
use super::{LoadError, Look, Looks};

/// A page that takes longer says nothing.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Reads the metrics of engines until it is dropped.
pub struct Scraper {
    latest: Arc<Vec<Mutex<Option<Look>>>>,
    // Dropped, it stops the tasks.
    _tasks: JoinSet<()>,
}

impl Scraper {
    /// Starts to read `URL/metrics` of every engine. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`LoadError::Url`].
    pub fn start(engines: &[String], interval: Duration) -> Result<Scraper, LoadError> {
        let uris = engines.iter().map(|engine| client::uri(engine, "/metrics"));
        let uris: Vec<Uri> = uris.collect::<Result<_, _>>()?;
        let latest: Arc<Vec<Mutex<Option<Look>>>> =
            Arc::new(uris.iter().map(|_| Mutex::default()).collect());
        let http = client::http();
        let mut tasks = JoinSet::new();
        for (at, uri) in uris.into_iter().enumerate() {
            let (http, latest) = (http.clone(), latest.clone());
            tasks.spawn(async move {
                let mut tick = tokio::time::interval(interval.max(Duration::from_millis(1)));
                tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
                loop {
                    tick.tick().await;
                    let look = tokio::time::timeout(TIMEOUT, look(&http, &uri)).await;
                    *latest[at].lock().unwrap_or_else(PoisonError::into_inner) =
                        look.ok().flatten();
                }
            });
        }
        Ok(Scraper { latest, _tasks: tasks })
    }

    /// The last look at every engine that could be read.
    pub fn looks(&self) -> Looks {
        let latest = self.latest.clone();
        Arc::new(move || {
            let all = latest.iter();
            all.filter_map(|look| *look.lock().unwrap_or_else(PoisonError::into_inner)).collect()
        })
    }
}

async fn look(http: &Client<HttpConnector, Full<Bytes>>, uri: &Uri) -> Option<Look> {
    let mut request = Request::new(Full::default());
    *request.uri_mut() = uri.clone();
    let response = http.request(request).await.ok()?;
    let page = Limited::new(response.into_body(), PAGE_BYTES_MAX).collect().await.ok()?;
    let metrics = prometheus::parse(&page.to_bytes()).ok()?.metrics;
    Some(Look {
        waiting: f64::from(metrics.waiting),
        running: f64::from(metrics.running),
        kv_usage: metrics.kv_usage,
    })
}
