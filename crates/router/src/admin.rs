//! What can a person or a monitor ask? A listener of its own, read only. `monitor` is another, for
//! monitors alone.
//!
//! `/metrics`, `/healthz`, `/readyz`, `/decisions?last=N`, `/decisions/{request-id}`, `/index`,
//! `/endpoints`, `/snapshot`, and `POST /explain`, which changes nothing either. Everything but the
//! metrics is JSON, indented for people but for the snapshot.

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::metrics::page::PageFormat;
use crate::shared::Shared;
use crate::tls::Acceptor;

mod connections;
mod explain;
mod health;
mod index;
pub(crate) mod monitor;
mod page;

/// Decisions of one answer, at most and when nothing is said.
const DECISIONS_MAX: usize = 10_000;
const DECISIONS_DEFAULT: usize = 20;
/// Snapshots at once, each from the first look to the last byte that is sent. One takes some twice
/// `kvroute.snapshot_bytes_max`.
const SNAPSHOTS_MAX: usize = 2;
/// Requests that are explained at once, with their bodies; more wait. Each locks the brain for
/// about as long as a decision, and for a copy of what plugins remember.
const EXPLAINED_MAX: usize = 8;

type Answer = Response<Full<Bytes>>;

/// Room for what costs memory and the brain's time.
struct Rooms {
    snapshots: Arc<Semaphore>,
    explained: Semaphore,
}

impl Rooms {
    fn new() -> Rooms {
        Rooms {
            snapshots: Arc::new(Semaphore::new(SNAPSHOTS_MAX)),
            explained: Semaphore::new(EXPLAINED_MAX),
        }
    }
}

/// Answers until its task is aborted; draining does not end it.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let rooms = Arc::new(Rooms::new());
    let answer = move |request| {
        let (shared, rooms) = (Arc::clone(&shared), Arc::clone(&rooms));
        async move { answer(&shared, &rooms, request).await }
    };
    connections::serve(listener, Acceptor::Plain, answer).await;
}

async fn answer(shared: &Arc<Shared>, rooms: &Rooms, request: Request<Incoming>) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/explain") => {
            let _place = rooms.explained.acquire().await;
            explain::explain(shared, request).await
        }
        (_, "/explain") => fault(StatusCode::METHOD_NOT_ALLOWED, "POST a client's request body"),
        (&Method::GET | &Method::HEAD, "/snapshot") => {
            match Arc::clone(&rooms.snapshots).try_acquire_owned() {
                Ok(place) => explain::snapshot(shared, place).await,
                Err(_) => {
                    let text = format!(
                        "{SNAPSHOTS_MAX} snapshots are being taken or sent; ask again later"
                    );
                    fault(StatusCode::SERVICE_UNAVAILABLE, &text)
                }
            }
        }
        (&Method::GET | &Method::HEAD, _) => {
            let parts = request.into_parts().0;
            look(shared, &parts, health::Details::Shown).await
        }
        _ => fault(StatusCode::METHOD_NOT_ALLOWED, "this address is read only; use GET"),
    }
}

async fn look(shared: &Arc<Shared>, asked: &Parts, details: health::Details) -> Answer {
    let path = asked.uri.path();
    let query = asked.uri.query().unwrap_or_default();
    match path {
        "/metrics" => metrics(shared, PageFormat::wanted(&asked.headers)).await,
        "/healthz" => json(StatusCode::OK, &health::Health { status: "ok" }),
        "/readyz" => {
            let ready = health::readiness(shared, details);
            let status = if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(status, &ready)
        }
        "/decisions" => match last(query) {
            Some(n) => json(StatusCode::OK, &shared.decisions.last(n)),
            None => fault(StatusCode::BAD_REQUEST, "write /decisions?last=N with a number"),
        },
        "/index" => json(StatusCode::OK, &index::view(shared)),
        "/endpoints" => json(StatusCode::OK, &index::endpoints(shared)),
        "/" => page::answer(),
        _ => match path
            .strip_prefix("/decisions/")
            .map(|id| shared.decisions.find(&explain::decoded(id)))
        {
            Some(Some(entry)) => json(StatusCode::OK, &entry),
            Some(None) => {
                let (kept, bytes, bytes_max) = shared.decisions.kept();
                let text = format!(
                    "no decision of this request id; the last {kept} are kept, {bytes} of \
                     {bytes_max} bytes (kvroute.decisions_bytes_max)"
                );
                fault(StatusCode::NOT_FOUND, &text)
            }
            None => fault(StatusCode::NOT_FOUND, "unknown path; GET / lists what there is"),
        },
    }
}

/// `last=N` of a query.
fn last(query: &str) -> Option<usize> {
    let given = query.split('&').find_map(|pair| pair.strip_prefix("last="));
    match given {
        None => Some(DECISIONS_DEFAULT),
        Some(text) => text.parse().ok().map(|n: usize| n.min(DECISIONS_MAX)),
    }
}

/// Written on a thread where it stalls nobody, for one reader at a time.
async fn metrics(shared: &Arc<Shared>, format: PageFormat) -> Answer {
    let place = Arc::clone(&shared.metrics.writing).acquire_owned().await;
    let there = Arc::clone(shared);
    let work = tokio::task::spawn_blocking(move || {
        let _place = place;
        index::mirror_metrics(&there);
        format.of(there.metrics.render())
    });
    match work.await {
        Ok(page) => {
            let mut answer = Response::new(Full::new(Bytes::from(page)));
            answer.headers_mut().insert(CONTENT_TYPE, format.content_type());
            answer
        }
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec_pretty(value) {
        Ok(mut text) => {
            text.push(b'\n');
            let mut answer = Response::new(Full::new(Bytes::from(text)));
            *answer.status_mut() = status;
            let kind = HeaderValue::from_static("application/json");
            answer.headers_mut().insert(CONTENT_TYPE, kind);
            answer
        }
        Err(error) => {
            let mut answer = Response::new(Full::new(Bytes::from(error.to_string())));
            *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            answer
        }
    }
}

#[derive(Serialize)]
struct Fault<'a> {
    error: &'a str,
}

fn fault(status: StatusCode, error: &str) -> Answer {
    json(status, &Fault { error })
}
