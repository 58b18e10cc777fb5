//! How does a request get to an endpoint, and what if that one fails? Until the first byte of an
//! answer another endpoint can take over; from then on the client sees what happens.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderValue, Method, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use kvroute_core::EndpointId;
use kvroute_core::fleet::Name;
use kvroute_core::settings::ms;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::error::{RouteError, failure_label};
use crate::headers::{self, BodyLength, HeadParts};
use crate::http1::Head;
use crate::metrics::ReasonLabel;
use crate::observe::Observer;
use crate::shared::Shared;
use crate::upstream::{Connection, Upstream, UpstreamError};

/// How long an answer is waited for after the endpoint stopped reading the request.
const EARLY_ANSWER: Duration = Duration::from_millis(500);

/// The body of a request on its way to an endpoint.
pub(crate) enum Payload {
    /// Read completely; can be sent again.
    Whole(Bytes),
    /// The same under another model's name, in pieces.
    Renamed([Bytes; 3]),
    /// Passed through as it comes; can be sent once.
    Stream(Option<Incoming>),
}

/// A request as it goes to an endpoint.
pub(crate) struct Outgoing {
    pub request_id: Name,
    pub method: Method,
    pub uri: Uri,
    /// The client's headers without those that stay on its side.
    pub headers: HeaderMap,
    pub id_value: HeaderValue,
    pub client: std::net::IpAddr,
    pub payload: Payload,
    /// The answer's usage is read.
    pub read_answer: bool,
    /// The answer's model gets another name.
    pub restores_name: bool,
}

impl Outgoing {
    /// Path and query.
    pub fn target(&self) -> &str {
        self.uri.path_and_query().map_or("/", |target| target.as_str())
    }
}

/// An answer whose body is still to be read.
pub(crate) struct Answer {
    pub head: Head,
    pub connection: Connection,
    pub upstream: Arc<Upstream>,
}

/// Sends the request to the first of `candidates` that answers. The outcome says which ones were
/// tried, also when none of them answers.
pub(crate) async fn forward(
    shared: &Shared,
    outgoing: &mut Outgoing,
    observer: &mut Observer,
    candidates: &[EndpointId],
) -> Result<Answer, RouteError> {
    let mut failed: Option<RouteError> = None;
    for (at, &id) in candidates.iter().enumerate() {
        let Some(upstream) = shared.upstreams.get(id) else { continue };
        // Also when the first choice has left the fleet meanwhile.
        if candidates.first() != Some(&id) {
            observer.reservation.redirect(id);
        }
        observer.outcome.attempts += 1;
        observer.outcome.set_endpoint(&upstream.name);
        let error = match exchange(shared, &upstream, outgoing).await {
            Ok((head, connection)) => return Ok(Answer { head, connection, upstream }),
            Err(Fault::Client(error)) => return Err(error),
            Err(Fault::Upstream(error)) => error,
        };
        let reason = failure_label(&error);
        shared.count_upstream_failure(&upstream.name, reason);
        shared.brain.lock().on_endpoint_failed(shared.clock.now(), id);
        let again = observer.outcome.attempts <= shared.settings.retries_max
            && may_retry(&error, outgoing)
            && candidates[at + 1..].iter().any(|next| shared.upstreams.get(*next).is_some());
        let (request_id, endpoint) = (outgoing.request_id.as_str(), upstream.name.clone());
        warn!(request_id, endpoint, again, %error, "An endpoint failed before it answered.");
        if again {
            shared.metrics.retries.get_or_create(&ReasonLabel { reason }).inc();
        }
        failed = Some(RouteError::Upstream { endpoint, error });
        if !again {
            break;
        }
    }
    Err(failed.unwrap_or(RouteError::Gone))
}

/// A request that may have begun to take effect is repeated only if that does no harm: generation
/// is, and so are the methods that are safe by definition.
fn may_retry(error: &UpstreamError, outgoing: &Outgoing) -> bool {
    match error {
        UpstreamError::Connect(_) | UpstreamError::ConnectTimeout(_) => {
            !matches!(outgoing.payload, Payload::Stream(None))
        }
        // An engine that is slow to answer is not helped by a second copy of the request.
        UpstreamError::FirstByteTimeout(_) | UpstreamError::Protocol(_) => false,
        _ => is_repeatable(outgoing),
    }
}

fn is_repeatable(outgoing: &Outgoing) -> bool {
    matches!(outgoing.payload, Payload::Whole(_) | Payload::Renamed(_))
        && (outgoing.read_answer || outgoing.method.is_safe())
}

/// Whose fault a failed exchange is.
enum Fault {
    Client(RouteError),
    Upstream(UpstreamError),
}

impl From<UpstreamError> for Fault {
    fn from(error: UpstreamError) -> Fault {
        Fault::Upstream(error)
    }
}

/// One request to one endpoint. A connection that was idle may have been closed by the engine
/// just then; that says nothing about the engine, so a new one is tried.
async fn exchange(
    shared: &Shared,
    upstream: &Upstream,
    outgoing: &mut Outgoing,
) -> Result<(Head, Connection), Fault> {
    // What cannot be repeated must not meet a connection that the engine is just closing.
    let connection = upstream.connection(!is_repeatable(outgoing)).await?;
    let reused = connection.reused;
    match attempt(shared, upstream, outgoing, connection).await {
        Err(Fault::Upstream(UpstreamError::Closed | UpstreamError::Broken(_)))
            if reused && is_repeatable(outgoing) =>
        {
            let connection = upstream.connection(true).await?;
            attempt(shared, upstream, outgoing, connection).await
        }
        other => other,
    }
}

async fn attempt(
    shared: &Shared,
    upstream: &Upstream,
    outgoing: &mut Outgoing,
    mut connection: Connection,
) -> Result<(Head, Connection), Fault> {
    let limit = Duration::from_secs(u64::from(shared.settings.first_byte_timeout_s.max(1)));
    let mut head = Vec::with_capacity(1024);
    let to_head = outgoing.method == Method::HEAD;
    headers::write_head(
        &HeadParts {
            method: &outgoing.method,
            target: outgoing.target(),
            authority: &upstream.authority,
            request_id: &outgoing.id_value,
            client: outgoing.client,
            length: length_of(outgoing),
            rank: upstream.shares_address.load(Ordering::Relaxed).then_some(upstream.rank),
            data_parallel: upstream.data_parallel.as_ref(),
            read_answer: outgoing.read_answer || outgoing.restores_name,
        },
        &outgoing.headers,
        &mut head,
    );
    let sent = match &mut outgoing.payload {
        Payload::Whole(bytes) => within(limit, connection.send(&head, bytes, limit).await)?,
        Payload::Renamed([before, name, after]) => {
            let begun = Instant::now();
            match within(limit, connection.send(&head, before, limit).await)? {
                Ok(()) => {
                    let left = limit.saturating_sub(begun.elapsed());
                    within(limit, connection.send(name, after, left).await)?
                }
                broken => broken,
            }
        }
        Payload::Stream(body) => {
            let body = body.take();
            let mut sink = Sink { connection: &mut connection, limit };
            send_stream(shared, &mut sink, &head, body, &outgoing.headers).await?
        }
    };
    // An engine may refuse a request before it has read all of it, and say why.
    let limit = if sent.is_ok() { limit } else { EARLY_ANSWER };
    match (sent, connection.read_head(to_head, limit).await) {
        (Ok(()), answered) => Ok((answered?, connection)),
        (Err(_), Ok(head)) => Ok((Head { keep_alive: false, ..head }, connection)),
        (Err(error), Err(_)) => Err(error.into()),
    }
}

/// The inner result is that of the writes: the endpoint may have stopped reading and still answer.
fn within(
    limit: Duration,
    sent: Option<io::Result<()>>,
) -> Result<Result<(), UpstreamError>, UpstreamError> {
    let sent = sent.ok_or(UpstreamError::FirstByteTimeout(limit))?;
    Ok(sent.map_err(UpstreamError::Broken))
}

fn length_of(outgoing: &Outgoing) -> BodyLength {
    match &outgoing.payload {
        Payload::Whole(bytes) if bytes.is_empty() && outgoing.method.is_safe() => BodyLength::None,
        Payload::Whole(bytes) => BodyLength::Known(bytes.len() as u64),
        Payload::Renamed(pieces) => {
            BodyLength::Known(pieces.iter().map(|piece| piece.len() as u64).sum())
        }
        Payload::Stream(_) => match known_length(&outgoing.headers) {
            Some(length) => BodyLength::Known(length),
            None => BodyLength::Chunked,
        },
    }
}

/// What `content-length` says; the server has checked it against the body's framing.
pub(crate) fn known_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A connection that must take each piece within a limit.
struct Sink<'a> {
    connection: &'a mut Connection,
    limit: Duration,
}

impl Sink<'_> {
    async fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let sent = self.connection.send(head, body, self.limit).await;
        sent.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Passes a body through piece by piece. The inner result is the endpoint's side: it may stop
/// reading and still answer.
async fn send_stream(
    shared: &Shared,
    sink: &mut Sink<'_>,
    head: &[u8],
    body: Option<Incoming>,
    headers: &HeaderMap,
) -> Result<Result<(), UpstreamError>, Fault> {
    let chunked = known_length(headers).is_none();
    let mut sent = sink.send(head, b"").await;
    let mut pieces = Pieces::new(shared, body);
    while sent.is_ok() {
        let Some(piece) = pieces.next().await.map_err(Fault::Client)? else { break };
        sent = if chunked {
            let size = format!("{:x}\r\n", piece.len());
            match sink.send(size.as_bytes(), &piece).await {
                Ok(()) => sink.send(b"\r\n", b"").await,
                Err(error) => Err(error),
            }
        } else {
            sink.send(&piece, b"").await
        };
    }
    if chunked && sent.is_ok() {
        sent = sink.send(b"0\r\n\r\n", b"").await;
    }
    Ok(sent.map_err(UpstreamError::Broken))
}

/// A client's body, bounded in size and in the silence between two pieces.
pub(crate) struct Pieces<'a> {
    shared: &'a Shared,
    body: Option<Incoming>,
    bytes: usize,
}

impl<'a> Pieces<'a> {
    pub fn new(shared: &'a Shared, body: Option<Incoming>) -> Pieces<'a> {
        Pieces { shared, body, bytes: 0 }
    }

    /// The next piece that is not empty.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RouteError> {
        let settings = &self.shared.settings;
        let Some(body) = &mut self.body else { return Ok(None) };
        let silence_s = settings.client_body_timeout_s.max(1);
        let silence = ms(silence_s.saturating_mul(1_000));
        loop {
            let frame = tokio::time::timeout(silence, body.frame()).await;
            let Some(frame) = frame.map_err(|_| RouteError::BodyTimeout(silence_s))? else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| {
                info!(%error, "A client's request body broke off.");
                RouteError::BodyBroken
            })?;
            let Ok(piece) = frame.into_data() else { continue };
            self.bytes = self.bytes.saturating_add(piece.len());
            if self.bytes > settings.body_bytes_max {
                return Err(RouteError::BodyTooLarge(settings.body_bytes_max));
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}
