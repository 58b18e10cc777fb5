//! From a client's headers and body to the header that names its endpoint.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, HeaderName, HeaderValue};
use kvroute_core::decision::DATA_PARALLEL_HEADER;
use kvroute_core::settings::ms;
use kvroute_wire::api::Api;
use kvroute_wire::ext_proc::{
    BodyMode, Dynamic, DynamicValue, HeaderBlock, HeaderChange, Metadata, Part, Side,
};
use kvroute_wire::grpc::Code;
use rustc_hash::FxHashMap;

use super::answer::Exchange;
use super::{
    BROKEN_STATUS, DESTINATION, NAMESPACE, Next, PIECE_BYTES_MAX, Stop, Stream, hints, read,
    unexpected,
};
use crate::error::RouteError;
use crate::forward::known_length;
use crate::grpc::{End, Silence};
use crate::headers::{self, MODEL_REWRITE};
use crate::rewrite::Rewrite;
use crate::route::{self, BODY_RESERVE_BYTES_MAX, Chosen, Way};
use crate::shared::{HeldBody, Inflight};
use crate::upstream::Upstream;

/// Every candidate's score: a key of the metadata.
const SCORES: &str = "x-gateway-destination-endpoint-scores";

/// A request's head.
struct Head {
    way: Way,
    headers: HeaderMap,
    /// What clients may not set, and did.
    removed: Vec<HeaderName>,
    end_of_stream: bool,
}

/// A request's body.
#[derive(Default)]
struct Body {
    /// All of it, where it is read before the decision.
    whole: Option<Bytes>,
    /// Trailers came after it.
    trailers: bool,
    /// It is not complete: what is left passes through.
    passes: bool,
    /// Its place among the bodies that are held.
    _held: Option<HeldBody>,
}

impl Stream<'_> {
    /// A request from its head on.
    pub(super) async fn request(
        &mut self,
        block: HeaderBlock,
        metadata: Metadata,
        place: Result<Inflight, RouteError>,
    ) -> Result<(), End> {
        let (head, claimed) = self.head(block);
        let routed = match claimed.and(place) {
            Ok(place) => self.route(&head, metadata, place).await,
            Err(error) => Err(error.into()),
        };
        match routed {
            Ok(exchange) => self.answers(exchange, None).await,
            Err(Stop::Refuse(error)) => self.refuse_request(&head.way, &error).await,
            Err(Stop::Answered(message)) => self.answers(Exchange::unasked(), Some(*message)).await,
            Err(Stop::Gone) => {
                self.shared.metrics.client_aborts.inc();
                Err(self.gone())
            }
            // Nothing has been answered but that the body may come.
            Err(Stop::End(end)) if end.code == Code::ResourceExhausted => {
                let max = self.shared.settings.ext_proc_message_bytes_max;
                self.refuse_request(&head.way, &RouteError::MessageTooLarge(max)).await
            }
            Err(Stop::End(end)) => Err(end),
        }
    }

    /// Reads a head; the second value tells why it is refused.
    fn head(&self, block: HeaderBlock) -> (Head, Result<(), RouteError>) {
        let started = Instant::now();
        let is_post = block.get(":method") == Some(b"POST");
        let path = String::from_utf8_lossy(block.get(":path").unwrap_or_default()).into_owned();
        let bytes: usize = block.headers.iter().map(|(n, v)| n.len() + v.len() + 4).sum();
        // Whatever their values are.
        let control = block.headers.iter().filter(|(name, _)| headers::is_control_name(name));
        let mut removed: Vec<HeaderName> =
            control.filter_map(|(name, _)| HeaderName::from_bytes(name).ok()).collect();
        let mut headers = HeaderMap::with_capacity(block.headers.len());
        for (name, value) in block.headers {
            // Pseudo-headers have no names that HTTP allows.
            if let Ok(name) = HeaderName::from_bytes(&name)
                && let Ok(value) = HeaderValue::from_maybe_shared(value)
            {
                headers.append(name, value);
            }
        }
        for name in &removed {
            headers.remove(name);
        }
        // They are read, and for nobody else.
        let read = headers.keys().filter(|name| MODEL_REWRITE.contains(&name.as_str()));
        removed.extend(read.cloned());
        let (request_id, id_value) = headers::request_id(&headers);
        let end_of_stream = block.end_of_stream;
        let claimed = route::api_of(self.shared, is_post, &path, &headers, end_of_stream);
        let api = claimed.as_ref().copied().unwrap_or(Api::Other);
        let max = self.shared.settings.header_bytes_max;
        let fits = if bytes > max { Err(RouteError::HeadTooLarge(max)) } else { Ok(()) };
        let way = Way { started, request_id, id_value, api };
        let head = Head { way, headers, removed, end_of_stream };
        (head, claimed.map(drop).map_err(RouteError::from).and(fits))
    }

    /// Reads, decides, and sends the request on.
    async fn route(
        &mut self,
        head: &Head,
        metadata: Metadata,
        place: Inflight,
    ) -> Result<Exchange, Stop> {
        for mode in [self.modes.request, self.modes.response] {
            if let BodyMode::Other(mode) = mode {
                return Err(RouteError::BodyMode(mode).into());
            }
        }
        let mut metadata = metadata;
        let body = self.body(head, &mut metadata).await?;
        let subset = self.options.subset_hints.then(|| hints::allowed(self.shared, &metadata));
        let chosen = self.decide(head, &body, subset.flatten().as_deref()).await?;
        let upstream = self.shared.upstreams.get(chosen.candidates[0]).ok_or(RouteError::Gone)?;
        let restorer = chosen.rewrite.as_ref().and_then(Rewrite::restorer);
        // A compressed answer does not show its usage, nor its model.
        let reads_answer = head.way.api.tells_usage() || restorer.is_some();
        let sent = self.send_on(head, &body, &chosen, &upstream, reads_answer).await;
        let wants_answer =
            reads_answer || !chosen.response_headers.is_empty() || self.options.tells_served;
        let response_headers = chosen.response_headers.clone();
        let mut observer = route::observe(self.shared, &head.way, chosen, place);
        observer.outcome.attempts = 1;
        observer.outcome.set_endpoint(&upstream.name);
        if let Err(end) = sent {
            observer.break_off(BROKEN_STATUS, &end.message);
            return Err(end.into());
        }
        Ok(Exchange::routed(
            observer,
            upstream,
            response_headers,
            &head.way,
            restorer,
            body.passes,
            wants_answer,
        ))
    }

    fn is_read(&self, head: &Head) -> bool {
        self.shared.rewriter.reads_body(head.way.api, &head.headers)
    }

    /// The body, as far as it is needed and its mode allows.
    async fn body(&mut self, head: &Head, metadata: &mut Metadata) -> Result<Body, Stop> {
        let is_read = self.is_read(head);
        // Without a body there is nothing to read: the request goes by load.
        if head.end_of_stream {
            return Ok(Body::default());
        }
        match self.modes.request {
            BodyMode::FullDuplexStreamed if !is_read => {
                Ok(Body { passes: true, ..Body::default() })
            }
            BodyMode::FullDuplexStreamed => self.collect(head, metadata).await,
            // Envoy waits for this answer before it sends the body, and keeps the headers until
            // that is answered.
            BodyMode::Buffered => {
                self.answer.headers(Side::Request, &[], false, &[]);
                self.collect(head, metadata).await
            }
            // The headers are gone when the body comes, or it never comes whole.
            BodyMode::None
            | BodyMode::Streamed
            | BodyMode::BufferedPartial
            | BodyMode::Other(_) => {
                if is_read {
                    self.note_blind("body-not-sent");
                }
                let passes = self.modes.request != BodyMode::None;
                Ok(Body { passes, ..Body::default() })
            }
        }
    }

    /// Collects a whole body. One that comes in a single piece is not copied.
    async fn collect(&mut self, head: &Head, metadata: &mut Metadata) -> Result<Body, Stop> {
        let settings = &self.shared.settings;
        let (bytes_max, whole_s) =
            (settings.body_bytes_max, settings.ext_proc_request_timeout_s.max(1));
        let silence_s = settings.client_body_timeout_s.max(1);
        let until = Instant::now() + Duration::from_secs(u64::from(whole_s));
        let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
        let mut held = self.shared.hold_body();
        let trailers = loop {
            let left = until.saturating_duration_since(Instant::now());
            let patience = left.min(Duration::from_secs(u64::from(silence_s)));
            let message = match self.next(patience).await? {
                Next::Message(message) => message,
                Next::TooLong if left <= patience => {
                    return Err(RouteError::RequestTimeout(whole_s).into());
                }
                Next::TooLong => return Err(RouteError::BodyTimeout(silence_s).into()),
                Next::Gone => return Err(Stop::Gone),
            };
            if !message.metadata.is_empty() {
                hints::update(metadata, &message.metadata);
            }
            match message.part {
                Part::RequestBody(piece) => {
                    if first.len() + rest.len() + piece.body.len() > bytes_max {
                        return Err(RouteError::BodyTooLarge(bytes_max).into());
                    }
                    held.take(piece.body.len())?;
                    match first.is_empty() && rest.is_empty() {
                        true => first = piece.body,
                        false if piece.body.is_empty() => {}
                        false => {
                            if rest.is_empty() {
                                rest.reserve(expected(head).max(first.len() + piece.body.len()));
                                rest.extend_from_slice(&std::mem::take(&mut first));
                            }
                            rest.extend_from_slice(&piece.body);
                        }
                    }
                    // A buffered body comes whole; trailers wait until it is answered.
                    if piece.end_of_stream || self.modes.request == BodyMode::Buffered {
                        break false;
                    }
                }
                Part::RequestTrailers => break true,
                Part::ResponseHeaders(_) => return Err(Stop::Answered(Box::new(message))),
                other => return Err(unexpected(&other).into()),
            }
        };
        let whole = if rest.is_empty() { first } else { rest.freeze() };
        self.shared.metrics.request_body.observe(whole.len() as f64);
        Ok(Body { whole: Some(whole), trailers, passes: false, _held: Some(held) })
    }

    /// Decides, unless Envoy or the client has had enough meanwhile.
    async fn decide(
        &mut self,
        head: &Head,
        body: &Body,
        allowed: Option<&[kvroute_core::EndpointId]>,
    ) -> Result<Chosen, Stop> {
        let whole = body.whole.as_ref().filter(|_| self.is_read(head));
        let decided = route::decide(self.shared, &head.way, &head.headers, whole, allowed);
        if body.passes {
            // What is left of the body waits in its window.
            return Ok(decided.await?);
        }
        let limit = ms(self.shared.settings.decision_timeout_ms).saturating_mul(2);
        tokio::select! {
            biased;
            decided = decided => Ok(decided?),
            came = self.call.next(limit) => match came {
                Ok(bytes) => {
                    let message = read(&bytes)?;
                    match message.part {
                        Part::ResponseHeaders(_) => Err(Stop::Answered(Box::new(message))),
                        other => Err(unexpected(&other).into()),
                    }
                }
                Err(Silence::Broken(error)) => Err(Stop::End(error.into())),
                Err(_) => Err(Stop::Gone),
            },
        }
    }

    /// Names the endpoint, and gives the body back.
    async fn send_on(
        &mut self,
        head: &Head,
        body: &Body,
        chosen: &Chosen,
        upstream: &Arc<Upstream>,
        reads_answer: bool,
    ) -> Result<(), End> {
        let destination = self.destination(chosen, upstream);
        let pieces = body.whole.as_ref().map(|body| renamed(body, chosen.rewrite.as_ref()));
        let length = pieces.as_ref().map(|pieces| pieces.iter().map(Bytes::len).sum::<usize>());
        let length = length.map(|bytes| bytes.to_string()).unwrap_or_default();
        let rank = upstream.rank.to_string();
        let mut changes = vec![HeaderChange::Set(DESTINATION, destination.as_bytes())];
        if !length.is_empty() && !head.end_of_stream {
            changes.push(HeaderChange::Set(CONTENT_LENGTH.as_str(), length.as_bytes()));
        }
        if head.headers.get(headers::REQUEST_ID) != Some(&head.way.id_value) {
            let id = head.way.id_value.as_bytes();
            changes.push(HeaderChange::Set(headers::REQUEST_ID_NAME, id));
        }
        let told = chosen.told().map(|h| HeaderChange::Set(h.name, h.value.as_bytes()));
        changes.extend(told);
        if let Some(address) = &upstream.data_parallel {
            changes.push(HeaderChange::Set(DATA_PARALLEL_HEADER, address.as_bytes()));
        }
        if upstream.shares_address.load(std::sync::atomic::Ordering::Relaxed) {
            changes.push(HeaderChange::Set(headers::RANK, rank.as_bytes()));
        }
        if reads_answer && head.headers.contains_key(ACCEPT_ENCODING) {
            changes.push(HeaderChange::Remove(ACCEPT_ENCODING.as_str()));
        }
        let set: Vec<&str> = changes.iter().filter_map(set_name).collect();
        let removed = head.removed.iter().map(HeaderName::as_str);
        let removed: Vec<_> =
            removed.filter(|name| !set.contains(name)).map(HeaderChange::Remove).collect();
        changes.extend(removed);
        let scores = self.scores(chosen);
        let scores: Vec<(&str, f64)> = scores.iter().map(|(n, s)| (n.as_str(), *s)).collect();
        let mut values = vec![(DESTINATION, DynamicValue::Text(&destination))];
        if self.options.emit_scores {
            values.push((SCORES, DynamicValue::Numbers(&scores)));
        }
        let dynamic = &[(NAMESPACE, &values[..])][..];
        self.send_body(body, pieces, &changes, dynamic).await
    }

    async fn send_body(
        &mut self,
        body: &Body,
        pieces: Option<Vec<Bytes>>,
        changes: &[HeaderChange<'_>],
        dynamic: Dynamic<'_>,
    ) -> Result<(), End> {
        match (pieces, self.modes.request) {
            (Some(pieces), BodyMode::Buffered) => {
                let renamed = (pieces.len() > 1).then(|| pieces.concat());
                self.answer.whole_body(Side::Request, changes, true, renamed.as_deref(), dynamic);
            }
            (Some(pieces), _) => {
                self.answer.headers(Side::Request, changes, true, dynamic);
                // Trailers alone end a body that never had a piece.
                self.pass_all_on(Side::Request, pieces, !body.trailers, &[]).await?;
            }
            (None, _) => self.answer.headers(Side::Request, changes, true, dynamic),
        }
        if body.trailers {
            self.answer.trailers(Side::Request, &[]);
        }
        Ok(())
    }

    /// The chosen endpoint, and those that the plan offers for when it fails.
    fn destination(&self, chosen: &Chosen, first: &Upstream) -> String {
        let mut destination = first.authority.clone();
        let others = chosen.candidates.iter().take(chosen.offered).skip(1);
        for other in others.filter_map(|id| self.shared.upstreams.get(*id)) {
            destination.push(',');
            destination.push_str(&other.authority);
        }
        destination
    }

    /// Every candidate's score, by address.
    fn scores(&self, chosen: &Chosen) -> Vec<(String, f64)> {
        if chosen.scores.is_empty() {
            return Vec::new();
        }
        let upstreams = self.shared.upstreams.all();
        let addresses: FxHashMap<&str, &str> =
            upstreams.iter().map(|u| (u.name.as_str(), u.authority.as_str())).collect();
        let scores = chosen.scores.iter();
        scores
            .filter_map(|(name, total)| Some(((*addresses.get(name.as_str())?).to_owned(), *total)))
            .collect()
    }
}

/// The body as it goes on: one piece, or several under a new name. Around that so much is copied
/// that it needs no more messages than before.
fn renamed(body: &Bytes, rewrite: Option<&Rewrite>) -> Vec<Bytes> {
    let Some([mut before, name, mut after]) = rewrite.and_then(|rewrite| rewrite.body(body)) else {
        return vec![body.clone()];
    };
    let around = before.split_off(before.len() - before.len() % PIECE_BYTES_MAX);
    let room = PIECE_BYTES_MAX.saturating_sub(around.len() + name.len());
    let behind = after.split_to(after.len().min(room));
    vec![before, Bytes::from([around, name, behind].concat()), after]
}

/// Memory for a body of the length that its head claims.
fn expected(head: &Head) -> usize {
    let claimed = known_length(&head.headers).unwrap_or(0);
    usize::try_from(claimed).unwrap_or(usize::MAX).min(BODY_RESERVE_BYTES_MAX)
}

fn set_name<'a>(change: &HeaderChange<'a>) -> Option<&'a str> {
    match change {
        HeaderChange::Set(name, _) => Some(name),
        HeaderChange::Remove(_) => None,
    }
}
