//! The endpoint's answer on its way through Envoy: headers, pieces, end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderName, HeaderValue};
use kvroute_core::report::{Report, ReportUsage, ServedVerifier};
use kvroute_wire::api::Api;
use kvroute_wire::ext_proc::{
    BodyMode, DynamicValue, HeaderBlock, HeaderChange, Message, Metadata, Part, Piece, Side,
};
use kvroute_wire::grpc::Code;
use kvroute_wire::model_name::Restorer;
use kvroute_wire::usage::{Usage, UsageScanner};
use tracing::debug;

use super::{BROKEN_STATUS, Next, PIECE_BYTES_MAX, Stream, hints, unexpected};
use crate::error::RouteError;
use crate::grpc::End;
use crate::headers;
use crate::observe::Observer;
use crate::route::{self, Way};
use crate::upstream::{Upstream, UpstreamError};

/// Tells whoever looks that an Endpoint Picker has seen the answer; llm-d's does so.
const SEEN: &str = "x-went-into-resp-headers";
/// The header by which Envoy tells how long an endpoint took. Its own answers have none.
const ENDPOINT_TIME: &str = "x-envoy-upstream-service-time";
/// Envoy's own answer when it got no answer from an endpoint; behind it the reason.
const NO_HEADERS: &str = "upstream connect error or disconnect/reset before headers";
const RESET_REASON: &str = "reset reason: ";
/// How the reasons begin that lie with the endpoint. Others are Envoy's limits, or its own resets.
const ENDPOINT_REASONS: [&str; 3] = ["connection ", "remote ", "protocol error"];

/// What is left of an exchange once its request is decided.
pub(super) struct Exchange {
    routed: Option<Routed>,
    /// Since when, for what the request's deadline is about.
    started: Instant,
    /// Pieces of the request that come are sent on.
    request_passes: bool,
    /// Nothing is to be learned from the answer.
    released: bool,
    headers_seen: bool,
    /// Of the answer's body, what is still to come; `None`: unknown.
    bytes_left: Option<u64>,
    done: bool,
    /// Of answers to requests that were not decided here.
    scanner: Option<UsageScanner>,
}

/// A request that an endpoint was chosen for.
struct Routed {
    observer: Observer,
    upstream: Arc<Upstream>,
    response_headers: Vec<(HeaderName, HeaderValue)>,
    id_value: HeaderValue,
    api: Api,
    /// Gives the model the name that the client knows.
    restorer: Option<Restorer>,
    /// A proxy answers with an error of its own, and its body is to say why.
    unexplained: bool,
}

impl Exchange {
    /// An answer without a request that was decided.
    pub fn unasked() -> Exchange {
        Exchange {
            scanner: Some(UsageScanner::new()),
            routed: None,
            started: Instant::now(),
            request_passes: false,
            released: false,
            headers_seen: false,
            bytes_left: None,
            done: false,
        }
    }

    /// A request on its way.
    pub fn routed(
        observer: Observer,
        upstream: Arc<Upstream>,
        response_headers: Vec<(HeaderName, HeaderValue)>,
        way: &Way,
        restorer: Option<Restorer>,
        request_passes: bool,
        wants_answer: bool,
    ) -> Exchange {
        let (id_value, api) = (way.id_value.clone(), way.api);
        let routed = Routed {
            observer,
            upstream,
            response_headers,
            id_value,
            api,
            restorer,
            unexplained: false,
        };
        Exchange {
            scanner: None,
            routed: Some(routed),
            started: way.started,
            request_passes,
            released: !wants_answer,
            headers_seen: false,
            bytes_left: None,
            done: false,
        }
    }

    fn end(&mut self) {
        if let Some(routed) = &mut self.routed {
            routed.observer.end(None);
        }
        self.done = true;
    }

    fn restorer(&mut self) -> Option<&mut Restorer> {
        self.routed.as_mut().and_then(|routed| routed.restorer.as_mut())
    }

    /// What of the answer can go on, its model under the name that the client knows.
    fn restored(&mut self, body: Bytes, is_last: bool) -> Vec<Bytes> {
        let Some(restorer) = self.restorer() else { return vec![body] };
        let mut parts = Vec::new();
        restorer.push(body, &mut parts);
        if is_last {
            restorer.finish(&mut parts);
        }
        // One message costs less than three.
        if parts.len() > 1 && parts.iter().map(Bytes::len).sum::<usize>() <= PIECE_BYTES_MAX {
            return vec![Bytes::from(parts.concat())];
        }
        parts
    }

    /// All of the answer has been seen, as far as can be known, but not the message that says so:
    /// there is none where the trailers that end an answer are not sent.
    fn is_whole(&self) -> bool {
        self.headers_seen && (self.bytes_left == Some(0) || self.usage().is_some())
    }

    fn usage(&self) -> Option<Usage> {
        let routed = self.routed.as_ref().and_then(|routed| routed.observer.scanner.as_ref());
        self.scanner.as_ref().or(routed).and_then(UsageScanner::usage)
    }

    /// There is something in the answer's body that is to be read or changed.
    fn wants_body(&self) -> bool {
        let routed = self.routed.as_ref();
        routed.is_some_and(|routed| routed.observer.scanner.is_some() || routed.restorer.is_some())
    }

    /// The answer need not be looked at, and the request is on its way: Envoy can go on alone.
    /// Behind the answer's head it cannot: in full duplex it sends pieces without waiting, and
    /// those under way when the stream ends would be lost to the client. So an answer whose head
    /// alone is wanted is followed to its end.
    fn is_released(&self) -> bool {
        self.released && !self.request_passes && !self.headers_seen
    }
}

impl Stream<'_> {
    /// Follows an exchange to its end, and notes why it ends. Clients that leave and the router's
    /// own end are what dropping it looks like.
    pub(super) async fn answers(
        &mut self,
        mut exchange: Exchange,
        first: Option<Message>,
    ) -> Result<(), End> {
        if self.modes.response == BodyMode::None && exchange.wants_body() {
            self.note_blind("answer-not-sent");
        }
        let followed = self.follow(&mut exchange, first).await;
        let observer = exchange.routed.as_mut().map(|routed| &mut routed.observer);
        if let (Err(end), Some(observer)) = (&followed, observer)
            && !matches!(end.code, Code::Cancelled | Code::Unavailable)
        {
            observer.break_off(BROKEN_STATUS, &end.message);
        }
        followed
    }

    async fn follow(
        &mut self,
        exchange: &mut Exchange,
        mut first: Option<Message>,
    ) -> Result<(), End> {
        loop {
            if exchange.done || exchange.is_released() {
                if let Some(routed) = &mut exchange.routed {
                    routed.observer.release();
                }
                return self.flush().await;
            }
            let (patience, error) = self.patience(exchange);
            let next = match first.take() {
                Some(message) => Next::Message(message),
                None => self.next(patience).await?,
            };
            match next {
                Next::Message(message) => self.on_message(exchange, message).await?,
                // Without the answer's body, this is what its end looks like. Even its head may be
                // one that is not sent.
                _ if self.modes.response == BodyMode::None
                    && (exchange.headers_seen || !exchange.request_passes) =>
                {
                    exchange.done = true;
                }
                Next::TooLong => return self.give_up(exchange, &error).await,
                // In full duplex, trailers are sent.
                Next::Gone if !self.is_duplex() && exchange.is_whole() => exchange.end(),
                Next::Gone => return Err(self.gone()),
            }
        }
    }

    /// Pieces of the answer that come need no answers of their own.
    fn is_duplex(&self) -> bool {
        self.modes.response == BodyMode::FullDuplexStreamed
    }

    /// How long the next message is waited for, and what it means when none comes.
    fn patience(&self, exchange: &Exchange) -> (Duration, RouteError) {
        let settings = &self.shared.settings;
        let (seconds, error): (_, fn(u32) -> RouteError) = match exchange.headers_seen {
            true => (settings.response_idle_timeout_s, RouteError::AnswerStalled),
            false if exchange.request_passes => {
                (settings.client_body_timeout_s, RouteError::BodyTimeout)
            }
            false => (settings.first_byte_timeout_s, RouteError::NoAnswer),
        };
        let patience = Duration::from_secs(u64::from(seconds.max(1)));
        if exchange.request_passes && !exchange.headers_seen {
            let whole_s = settings.ext_proc_request_timeout_s.max(1);
            let until = exchange.started + Duration::from_secs(u64::from(whole_s));
            let left = until.saturating_duration_since(Instant::now());
            if left < patience {
                return (left, RouteError::RequestTimeout(whole_s));
            }
        }
        (patience, error(seconds.max(1)))
    }

    /// Ends an exchange that goes nowhere: the client gets an error, or its answer is cut.
    async fn give_up(&mut self, exchange: &mut Exchange, error: &RouteError) -> Result<(), End> {
        let Some(routed) = &mut exchange.routed else {
            self.shared.metrics.count_reject(error.reason());
            return self.refuse(Api::Other, None, error).await;
        };
        // What a proxy answers itself is over for the endpoint.
        let is_open = !routed.observer.ended;
        if is_open && matches!(error, RouteError::NoAnswer(_) | RouteError::AnswerStalled(_)) {
            self.shared.count_upstream_failure(&routed.upstream.name, error.reason());
        }
        if is_open && matches!(error, RouteError::NoAnswer(_)) {
            self.note_endpoint_failed(routed);
        }
        let (api, id_value) = (routed.api, routed.id_value.clone());
        routed.observer.refuse(error);
        self.refuse(api, Some(&id_value), error).await
    }

    async fn on_message(&mut self, exchange: &mut Exchange, message: Message) -> Result<(), End> {
        match message.part {
            Part::RequestBody(piece) if exchange.request_passes => {
                exchange.request_passes = !piece.end_of_stream;
                match self.modes.request {
                    BodyMode::FullDuplexStreamed => {
                        self.pass_on(Side::Request, piece.body, piece.end_of_stream, &[]).await
                    }
                    _ => {
                        self.answer.whole_body(Side::Request, &[], false, None, &[]);
                        Ok(())
                    }
                }
            }
            Part::RequestTrailers if exchange.request_passes || self.trailers_may_follow() => {
                exchange.request_passes = false;
                self.trailers_answered = true;
                self.answer.trailers(Side::Request, &[]);
                Ok(())
            }
            // What Envoy had sent before it answered the request itself.
            Part::RequestBody(_) | Part::RequestTrailers if exchange.routed.is_none() => Ok(()),
            Part::ResponseHeaders(block) if !exchange.headers_seen => {
                self.on_headers(exchange, &block, &message.metadata);
                Ok(())
            }
            Part::ResponseBody(piece) if exchange.headers_seen => {
                self.on_piece(exchange, piece).await
            }
            Part::ResponseTrailers if exchange.headers_seen => {
                if self.modes.response == BodyMode::FullDuplexStreamed {
                    let held = exchange.restored(Bytes::new(), true);
                    self.pass_all_on(Side::Response, held, false, &[]).await?;
                }
                let reports = self.reports(exchange);
                exchange.end();
                let reports = named(&reports);
                self.answer.trailers(Side::Response, &dynamic(&reports));
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    fn on_headers(&mut self, exchange: &mut Exchange, block: &HeaderBlock, metadata: &Metadata) {
        exchange.headers_seen = true;
        let length = block.get(CONTENT_LENGTH.as_str()).and_then(|l| std::str::from_utf8(l).ok());
        exchange.bytes_left = length.and_then(|length| length.parse().ok());
        // Envoy's own name of it; other data planes leave the colon out.
        let status = block.get(":status").or_else(|| block.get("status"));
        let status = status.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
        let served = hints::served(metadata);
        let mut changes = vec![HeaderChange::Set(SEEN, b"true")];
        let names = block.headers.iter().map(|(name, _)| &name[..]);
        let spoofed = names.filter(|name| headers::is_control_name(name));
        let spoofed = spoofed.filter_map(|name| std::str::from_utf8(name).ok());
        changes.extend(spoofed.map(HeaderChange::Remove));
        let mut told = Vec::new();
        if self.options.tells_served {
            let header = ServedVerifier::header(served.as_deref());
            told.push((header.name.to_string(), header.value.into_bytes()));
        }
        if let Some(routed) = &mut exchange.routed {
            let is_encoded = headers::is_encoded(block.get("content-encoding"));
            if routed.restorer.is_some() {
                let is_seen = self.modes.response != BodyMode::None;
                if is_seen && route::may_restore(self.shared, &routed.upstream.name, is_encoded) {
                    changes.push(HeaderChange::Remove(CONTENT_LENGTH.as_str()));
                } else {
                    routed.restorer = None;
                }
            }
            self.note_served(routed, served.as_deref());
            routed.observer.head(status.unwrap_or(0), block.get("content-type"));
            self.note_failure(routed, block, status);
            if self.modes.response == BodyMode::None && !routed.observer.ended {
                // Nothing else tells that the endpoint has read the prompt.
                routed.observer.sign_of_life(Instant::now());
            }
            if self.options.endpoint_header {
                let endpoint = routed.upstream.header.as_bytes().to_vec();
                told.push((headers::ENDPOINT_NAME.into(), endpoint));
            }
            told.push((headers::REQUEST_ID_NAME.into(), routed.id_value.as_bytes().to_vec()));
            let wanted = routed.response_headers.iter();
            told.extend(wanted.map(|(n, v)| (n.to_string(), v.as_bytes().to_vec())));
        }
        changes.extend(told.iter().map(|(name, value)| HeaderChange::Set(name, value)));
        if block.end_of_stream {
            exchange.end();
        }
        self.answer.headers(Side::Response, &changes, false, &[]);
    }

    /// A data plane may have tried another endpoint than the first, which has failed it then.
    fn note_served(&self, routed: &mut Routed, served: Option<&str>) {
        let Some(served) = served.filter(|served| *served != routed.upstream.authority) else {
            return;
        };
        let upstreams = self.shared.upstreams.all();
        let Some(other) = upstreams.into_iter().find(|u| u.authority == served) else { return };
        self.note_endpoint_failed(routed);
        routed.observer.reservation.redirect(other.id);
        routed.observer.outcome.attempts += 1;
        routed.observer.outcome.set_endpoint(&other.name);
        routed.upstream = other;
    }

    /// Envoy answers for an endpoint that it cannot reach, that breaks off or that takes too long,
    /// and when it has no room. Such an answer lacks what endpoints and Envoy put on those that
    /// endpoints gave.
    fn note_failure(&self, routed: &mut Routed, block: &HeaderBlock, status: Option<u16>) {
        let is_local = matches!(status, Some(502..=504))
            && block.get(ENDPOINT_TIME).is_none()
            && block.get("date").is_none();
        if is_local {
            let endpoint = &routed.upstream.name;
            debug!(endpoint, status, "The proxy answered in the place of an endpoint.");
            // What follows says nothing about the endpoint, least of all that it answers.
            routed.observer.end(Some(&UpstreamError::ProxyAnswered));
            // 504 is a route's timeout, which says nothing against the endpoint.
            routed.unexplained = status != Some(504);
        }
    }

    /// The body of a proxy's own answer tells whether the endpoint is to be avoided.
    fn note_reason(&self, routed: &mut Routed, body: &[u8]) {
        if body.is_empty() || !std::mem::take(&mut routed.unexplained) {
            return;
        }
        if blames_endpoint(body) {
            self.note_endpoint_failed(routed);
        }
    }

    fn note_endpoint_failed(&self, routed: &Routed) {
        let now = self.shared.clock.now();
        self.shared.brain.lock().on_endpoint_failed(now, routed.upstream.id);
    }

    async fn on_piece(&mut self, exchange: &mut Exchange, piece: Piece) -> Result<(), End> {
        if let Some(routed) = exchange.routed.as_mut().filter(|routed| !routed.observer.ended) {
            routed.observer.chunk(&piece.body, Instant::now());
        }
        if let Some(routed) = &mut exchange.routed {
            self.note_reason(routed, &piece.body);
        }
        if let Some(scanner) = &mut exchange.scanner {
            scanner.push(&piece.body);
        }
        exchange.bytes_left = match self.modes.response {
            BodyMode::Buffered => Some(0),
            _ => exchange.bytes_left.map(|left| left.saturating_sub(piece.body.len() as u64)),
        };
        let restores = exchange.restorer().is_some();
        // Where a piece's answer takes its place, what is held back would be lost if trailers ended
        // the answer: a name that is cut in two stays as it is.
        let parts = exchange.restored(piece.body, piece.end_of_stream || !self.is_duplex());
        let mut reports = Vec::new();
        if piece.end_of_stream {
            reports = self.reports(exchange);
            exchange.end();
        }
        let reports = named(&reports);
        let dynamic = dynamic(&reports);
        match self.modes.response {
            BodyMode::FullDuplexStreamed => {
                self.pass_all_on(Side::Response, parts, piece.end_of_stream, &dynamic).await
            }
            _ => {
                let restored = restores.then(|| parts.concat());
                self.answer.whole_body(Side::Response, &[], false, restored.as_deref(), &dynamic);
                Ok(())
            }
        }
    }

    /// What the plan wants data planes to be told about a complete answer.
    fn reports(&self, exchange: &Exchange) -> Vec<Report> {
        let Some(usage) = exchange.usage() else { return Vec::new() };
        let usage = ReportUsage {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cached_tokens: usage.cached_tokens,
        };
        let reported = self.options.reporters.iter().filter_map(|reporter| {
            reporter.report(&usage).unwrap_or_else(|error| {
                debug!(%error, "A number about an answer could not be computed.");
                self.shared.metrics.count_fallback("report-failed");
                None
            })
        });
        reported.collect()
    }
}

/// Whether the text of Envoy's own answer says that it could not connect to an endpoint, or that
/// the endpoint broke the exchange off.
fn blames_endpoint(body: &[u8]) -> bool {
    let text = String::from_utf8_lossy(body);
    let reason = text.split_once(NO_HEADERS).and_then(|(_, rest)| rest.split_once(RESET_REASON));
    reason.is_some_and(|(_, reason)| ENDPOINT_REASONS.iter().any(|r| reason.starts_with(r)))
}

type Named<'a> = Vec<(&'a str, Vec<(&'a str, DynamicValue<'a>)>)>;

/// Reports by namespace.
fn named(reports: &[Report]) -> Named<'_> {
    let mut named: Named<'_> = Vec::new();
    for report in reports {
        // Metadata has no integers.
        let value = (report.name.as_str(), DynamicValue::Number(report.value as f64));
        match named.iter_mut().find(|(namespace, _)| *namespace == report.namespace) {
            Some((_, values)) => values.push(value),
            None => named.push((&report.namespace, vec![value])),
        }
    }
    named
}

fn dynamic<'a>(named: &'a Named<'a>) -> Vec<(&'a str, &'a [(&'a str, DynamicValue<'a>)])> {
    named.iter().map(|(namespace, values)| (*namespace, &values[..])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts of Envoy 1.40's router filter and its reset reasons.
    #[test]
    fn which_of_envoys_own_answers_blame_the_endpoint() {
        let reset = "upstream connect error or disconnect/reset before headers. ";
        let retried = format!("{reset}retried and the latest ");
        let table = [
            (reset, "reset reason: remote connection failure", true),
            (
                reset,
                "reset reason: remote connection failure, transport failure reason: delayed \
                 connect error: Connection refused",
                true,
            ),
            (&retried, "reset reason: connection timeout", true),
            (reset, "reset reason: connection failure", true),
            (reset, "reset reason: connection termination", true),
            (reset, "reset reason: remote reset", true),
            (reset, "reset reason: remote refused stream reset", true),
            (reset, "reset reason: protocol error", true),
            (reset, "reset reason: overflow", false),
            (reset, "reset reason: overload manager reset", false),
            (reset, "reset reason: local reset", false),
            (reset, "reset reason: local connection failure", false),
            (reset, "", false),
            ("", "reset reason: connection timeout", false),
            ("no healthy upstream", "", false),
            ("upstream request timeout", "", false),
            ("", "", false),
        ];
        for (before, reason, expected) in table {
            let body = format!("{before}{reason}");
            assert_eq!(blames_endpoint(body.as_bytes()), expected, "{body}");
        }
    }
}
