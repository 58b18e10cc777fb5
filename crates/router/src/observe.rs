//! What does an answer tell on its way to the client? First byte, usage, end: to the ledger, the
//! metrics and the decision ring.
//!
//! The bytes themselves go through as they come. Dropping a [`Body`] before its end is what a
//! client that has gone looks like: the connection to the endpoint is closed at once and what the
//! request reserved is given back.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use kvroute_core::decision::ResponseEvent;
use kvroute_core::fleet::Name;
use kvroute_core::load::Ticket;
use kvroute_wire::model_name::Restorer;
use kvroute_wire::usage::{Usage, UsageScanner};
use tracing::debug;

use crate::decisions::Outcome;
use crate::error::RouteError;
use crate::http1::Framing;
use crate::metrics::StatusLabel;
use crate::metrics::upstream::{MODEL_SERVER_ERROR, Meter, error_code};
use crate::shared::{Inflight, Phase, Shared};
use crate::upstream::{Connection, Upstream, UpstreamError};

/// Status noted for a client that left before its answer.
const CLIENT_GONE: u16 = 499;
/// What is noted for requests that the router's end breaks off.
const STOPPED: &str = "the router was stopped before the end of the answer";
const STOPPED_STATUS: u16 = 503;
/// How often a running answer is reported as alive.
const TOUCH_INTERVAL: Duration = Duration::from_secs(30);

/// The body of a response to a client.
pub(crate) enum Body {
    /// Made by the router.
    Full(Option<Bytes>),
    /// Passed on from an endpoint.
    Answer(Box<AnswerBody>),
}

impl Body {
    /// A body of these bytes.
    pub fn full(bytes: Bytes) -> Body {
        Body::Full(Some(bytes).filter(|b| !b.is_empty()))
    }

    /// The same, holding `life` as long as it passes on an answer.
    pub fn holding(mut self, life: Arc<()>) -> Body {
        if let Body::Answer(answer) = &mut self {
            answer.life = Some(life);
        }
        self
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match self.get_mut() {
            Body::Full(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Body::Answer(answer) => answer.poll_data(cx).map_ok(Frame::data),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Full(bytes) => bytes.is_none(),
            Body::Answer(answer) => answer.is_over(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Body::Answer(answer) => match answer.framing {
                // A name of another length is to come.
                _ if answer.restorer.is_some() => SizeHint::default(),
                Framing::Length(left) => SizeHint::with_exact(left),
                _ => SizeHint::default(),
            },
        }
    }
}

/// An answer that is being read from its endpoint.
pub(crate) struct AnswerBody {
    /// `None` once the answer is complete or broken.
    connection: Option<Connection>,
    framing: Framing,
    keep_alive: bool,
    upstream: Arc<Upstream>,
    observer: Observer,
    /// Gives the model the name that the client knows.
    restorer: Option<Restorer>,
    /// What it has passed on and the client's connection has not taken yet.
    restored: VecDeque<Bytes>,
    idle_timeout: Duration,
    last_read: Instant,
    /// What broke the answer, to be told at the next poll.
    broken: Option<UpstreamError>,
    /// What was passed on last is to be written before the error is told.
    writes_first: bool,
    /// Tells the client's connection that it is in use.
    life: Option<Arc<()>>,
}

impl AnswerBody {
    /// Reads the rest of an answer from `connection`.
    pub fn new(
        connection: Connection,
        framing: Framing,
        keep_alive: bool,
        upstream: Arc<Upstream>,
        observer: Observer,
        restorer: Option<Restorer>,
        idle_timeout: Duration,
    ) -> AnswerBody {
        let mut body = AnswerBody {
            connection: Some(connection),
            framing,
            keep_alive,
            upstream,
            observer,
            restorer,
            restored: VecDeque::new(),
            idle_timeout,
            last_read: Instant::now(),
            broken: None,
            writes_first: false,
            life: None,
        };
        if body.framing.is_done() {
            body.finish();
        }
        body
    }

    fn is_over(&self) -> bool {
        self.connection.is_none() && self.broken.is_none() && self.restored.is_empty()
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, UpstreamError>>> {
        loop {
            if let Some(piece) = self.restored.pop_front() {
                return Poll::Ready(Some(Ok(piece)));
            }
            let received = ready!(self.poll_received(cx));
            let Some(restorer) = &mut self.restorer else { return Poll::Ready(received) };
            match received {
                Some(Ok(data)) => restorer.push(data, &mut self.restored),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    self.flush();
                    return Poll::Ready(self.restored.pop_front().map(Ok));
                }
            }
            if self.connection.is_none() {
                self.flush();
            }
        }
    }

    /// The next bytes of the endpoint.
    fn poll_received(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, UpstreamError>>> {
        if std::mem::take(&mut self.writes_first) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        match connection.poll_body(&mut self.framing, cx) {
            Poll::Ready(Ok(data)) => {
                if !data.is_empty() {
                    self.last_read = Instant::now();
                    self.observer.chunk(&data, self.last_read);
                }
                if data.is_empty() || self.framing.is_done() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(data)).filter(|d| d.as_ref().is_ok_and(|d| !d.is_empty())))
            }
            Poll::Ready(Err(error)) => self.fail(error, cx),
            Poll::Pending => {
                let limit = self.idle_timeout;
                ready!(connection.poll_silence(self.last_read, limit, cx));
                self.fail(UpstreamError::IdleTimeout(limit), cx)
            }
        }
    }

    /// Nothing more comes: what still waits for its end goes on.
    fn flush(&mut self) {
        if let Some(restorer) = &mut self.restorer {
            restorer.finish(&mut self.restored);
        }
    }

    fn finish(&mut self) {
        if let Some(connection) = self.connection.take() {
            if self.keep_alive && self.framing.is_done() {
                self.upstream.give_back(connection);
            }
            self.observer.end(None);
        }
    }

    /// The error reaches hyper, which breaks the client's connection: the client sees that its
    /// answer is not complete. hyper drops what it has not written yet, so it gets one turn to
    /// write before it is told.
    fn fail(
        &mut self,
        error: UpstreamError,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, UpstreamError>>> {
        self.connection = None;
        self.flush();
        self.observer.end(Some(&error));
        if error.is_connection_lost() {
            let shared = &self.observer.shared;
            shared.brain.lock().on_endpoint_failed(shared.clock.now(), self.upstream.id);
        }
        self.broken = Some(error);
        self.writes_first = !self.restored.is_empty();
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// What a decision reserved; given back when this is dropped, whatever happens.
pub(crate) struct Reservation {
    shared: Arc<Shared>,
    ticket: Ticket,
    open: bool,
}

impl Reservation {
    pub fn new(shared: Arc<Shared>, ticket: Ticket) -> Reservation {
        Reservation { shared, ticket, open: true }
    }

    /// Moves it to another endpoint.
    pub fn redirect(&self, to: kvroute_core::EndpointId) {
        let now = self.shared.clock.now();
        self.shared.brain.lock().redirect(now, self.ticket, to);
    }

    /// The first byte of the answer has come.
    pub fn first_chunk(&self) {
        let now = self.shared.clock.now();
        self.shared.brain.lock().on_response(now, self.ticket, ResponseEvent::FirstChunk);
    }

    /// The answer has ended; once.
    pub fn close(&mut self, usage: Option<Usage>, last: ResponseEvent) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let now = self.shared.clock.now();
        let mut brain = self.shared.brain.lock();
        if let Some(usage) = usage {
            let (prompt_tokens, completion_tokens) = (usage.prompt_tokens, usage.completion_tokens);
            let cached_tokens = usage.cached_tokens;
            let event = ResponseEvent::Usage { prompt_tokens, cached_tokens, completion_tokens };
            brain.on_response(now, self.ticket, event);
        }
        brain.on_response(now, self.ticket, last);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.close(None, ResponseEvent::Aborted);
    }
}

/// Follows one request from its decision to its end.
pub(crate) struct Observer {
    pub shared: Arc<Shared>,
    pub reservation: Reservation,
    pub request_id: Name,
    /// Where the decision stands in the ring.
    pub number: u64,
    pub mode: &'static str,
    pub started: Instant,
    /// Held until the end.
    pub _inflight: Inflight,
    /// For answers whose usage is read.
    pub scanner: Option<UsageScanner>,
    pub outcome: Outcome,
    /// What goes into llm-d's metrics, where they are asked for.
    pub meter: Option<Meter>,
    /// When the brain was last told that the answer goes on.
    pub touched: Instant,
    pub ended: bool,
}

impl Observer {
    /// The answer's head has come.
    pub fn head(&mut self, status: u16, content_type: Option<&[u8]>) {
        self.outcome.status = status;
        if let Some(meter) = &mut self.meter {
            meter.head(content_type.is_some_and(is_event_stream));
        }
    }

    /// A piece of the answer's body, which came at `now`.
    pub fn chunk(&mut self, data: &[u8], now: Instant) {
        if data.is_empty() {
            return;
        }
        self.sign_of_life(now);
        if let Some(scanner) = &mut self.scanner {
            scanner.push(data);
        }
        if let Some(meter) = &mut self.meter {
            meter.piece(now, data.len());
        }
    }

    /// The answer has begun, or goes on.
    pub fn sign_of_life(&mut self, now: Instant) {
        if self.outcome.ttft_s.is_none() {
            let ttft_s = now.saturating_duration_since(self.started).as_secs_f64();
            self.outcome.ttft_s = Some(ttft_s);
            self.shared.metrics.ttft.observe(ttft_s);
            self.reservation.first_chunk();
            self.touched = now;
        } else if now.saturating_duration_since(self.touched) >= TOUCH_INTERVAL {
            // A long answer is a sign of life, too.
            self.reservation.first_chunk();
            self.touched = now;
        }
    }

    /// The answer goes on unseen: what the request reserved is given back now, as if it had gone
    /// well.
    pub fn release(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let status = self.outcome.status;
        if let Some(meter) = self.meter.as_ref().filter(|_| status >= 400) {
            meter.fail(MODEL_SERVER_ERROR);
        }
        self.outcome.not_followed = true;
        let status = if status == 0 { 200 } else { status };
        self.close(None, ResponseEvent::End { status });
    }

    /// No endpoint answered, or none to the end: the router does.
    pub fn refuse(&mut self, error: &RouteError) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let status = error.status().as_u16();
        self.shared.metrics.count_reject(error.reason());
        if let Some(meter) = &self.meter {
            meter.fail(error_code(status));
        }
        self.outcome.status = status;
        self.outcome.error = Some(error.to_string());
        self.close(None, ResponseEvent::Aborted);
    }

    /// The router broke the exchange off, or a proxy did not keep to the protocol: no client has
    /// left. The status is for one that has had none yet.
    pub fn break_off(&mut self, status: u16, why: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        if self.outcome.status == 0 {
            self.outcome.status = status;
        }
        if let Some(meter) = &self.meter {
            meter.fail(error_code(status));
        }
        self.outcome.error = Some(why.to_owned());
        self.close(None, ResponseEvent::Aborted);
    }

    /// The answer is over; with an error, if it was cut short.
    pub fn end(&mut self, error: Option<&UpstreamError>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let usage = self.scanner.as_ref().and_then(UsageScanner::usage);
        // In the middle of an answer a missing count says nothing.
        let usage = usage.filter(|usage| error.is_none() || usage.cached_tokens.is_some());
        let last = match error {
            None => ResponseEvent::End { status: self.outcome.status },
            Some(_) => ResponseEvent::Aborted,
        };
        if let Some(error) = error {
            self.outcome.error = Some(error.to_string());
            let reason = crate::error::failure_label(error);
            self.shared.count_upstream_failure(self.outcome.endpoint.as_str(), reason);
        }
        match (self.meter.as_mut(), error) {
            (Some(meter), None) => meter.end(self.outcome.status, usage),
            (Some(meter), Some(_)) => meter.fail(MODEL_SERVER_ERROR),
            (None, _) => {}
        }
        self.close(usage, last);
    }

    /// The answer has ended; once.
    pub fn close(&mut self, usage: Option<Usage>, last: ResponseEvent) {
        let outcome = &mut self.outcome;
        if let Some(usage) = usage {
            outcome.prompt_tokens = Some(usage.prompt_tokens);
            outcome.completion_tokens = Some(usage.completion_tokens);
            outcome.delivered_tokens = usage.cached_tokens;
        }
        self.reservation.close(usage, last);
        outcome.total_s = self.started.elapsed().as_secs_f64();
        let (status, endpoint) = (outcome.status, outcome.endpoint.as_str());
        debug!(
            request_id = self.request_id.as_str(),
            endpoint,
            status,
            mode = self.mode,
            total_s = outcome.total_s,
            error = outcome.error,
            "A request is done."
        );
        // It is under way no longer, however long what is left of it is kept.
        self.meter = None;
        self.shared.metrics.count_request(endpoint, StatusLabel(status), self.mode);
        self.shared.decisions.finish(self.number, std::mem::take(outcome));
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.shared.phase() == Phase::Stopped {
            self.break_off(STOPPED_STATUS, STOPPED);
            return;
        }
        self.ended = true;
        self.shared.metrics.client_aborts.inc();
        self.outcome.status = CLIENT_GONE;
        self.outcome.error = Some("the client left before the end of its answer".to_owned());
        self.close(None, ResponseEvent::Aborted);
    }
}

/// Whether an answer comes token by token.
fn is_event_stream(content_type: &[u8]) -> bool {
    let wanted = b"text/event-stream";
    content_type.get(..wanted.len()).is_some_and(|start| start.eq_ignore_ascii_case(wanted))
}
