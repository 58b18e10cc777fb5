//! What happens to a request? All of it, in order.
//!
//! `route` is the path through the embedded proxy. `choose` is the part of it that every door
//! into the router shares: from a complete body to a decision with its reservation.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use hyper::body::Incoming;
use kvroute_core::EndpointId;
use kvroute_core::decision::{
    DATA_PARALLEL_HEADER, Decision, DecisionRecord, Endpoints, Headers, Mode, Reason, RequestHeader,
};
use kvroute_core::fleet::Name;
use kvroute_core::produce::HeldId;
use kvroute_core::settings::ms;
use kvroute_wire::api::Api;
use kvroute_wire::model_name::Restorer;
use kvroute_wire::parsers::{Unclaimed, request_path};
use kvroute_wire::usage::UsageScanner;
use smallvec::SmallVec;
use tracing::{debug, info, warn};

use crate::decisions::Outcome;
use crate::error::RouteError;
use crate::forward::{Answer, Outgoing, Payload, Pieces, forward, known_length};
use crate::headers;
use crate::metrics::upstream::{Decided, Meter, UpstreamMetrics};
use crate::metrics::{StatusLabel, cut};
use crate::observe::{AnswerBody, Body, Observer, Reservation};
use crate::rewrite::Rewrite;
use crate::shared::{HeldBody, Inflight, Shared};
use crate::tokenize::{self, Asked};

/// Header that names an objective; its older name.
const OBJECTIVE: [&str; 2] = ["x-llm-d-inference-objective", "x-gateway-inference-objective"];
/// Mode label of requests whose body the router does not read.
const PASS_THROUGH: &str = "pass-through";
/// Mode label of requests that were never routed.
const NOT_ROUTED: &str = "none";
/// Most memory that a claimed body length reserves; the rest grows as it comes.
pub(crate) const BODY_RESERVE_BYTES_MAX: usize = 256 << 10;

/// Answers one request of a client, whatever happens.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    request: Request<Incoming>,
    client: SocketAddr,
) -> Response<Body> {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let (request_id, id_value) = headers::request_id(&parts.headers);
    let (is_post, path) = (parts.method == Method::POST, parts.uri.path());
    let is_empty = http_body::Body::is_end_stream(&body);
    let claimed = api_of(&shared, is_post, path, &parts.headers, is_empty);
    let api = claimed.as_ref().copied().unwrap_or(Api::Other);
    let way = Way { started, request_id, id_value: id_value.clone(), api };
    let answered = match claimed {
        Ok(_) => route(&shared, &way, client.ip(), parts, body).await,
        Err(unclaimed) => Err(unclaimed.into()),
    };
    let mut response = answered.unwrap_or_else(|error| {
        note_refused(&shared, way.request_id.as_str(), &error);
        error.respond(api)
    });
    response.headers_mut().insert(headers::REQUEST_ID, id_value);
    response
}

/// Counts a request that the router answers itself, before it has gone to an endpoint. From then on
/// its [`Observer`] counts it.
pub(crate) fn note_refused(shared: &Shared, request_id: &str, error: &RouteError) {
    let reason = error.reason();
    debug!(request_id, reason, %error, "A request was answered by the router itself.");
    shared.metrics.count_reject(reason);
    let status = error.status().as_u16();
    // What is about a decision has been counted where the request's model is known.
    let is_counted = matches!(error, RouteError::Rejected(_));
    if let Some(names) = shared.metrics.upstream.as_ref().filter(|_| !is_counted) {
        names.refused(status);
    }
    shared.metrics.count_request("", StatusLabel(status), NOT_ROUTED);
}

/// A request on its way, apart from its contents.
pub(crate) struct Way {
    pub started: Instant,
    pub request_id: Name,
    pub id_value: HeaderValue,
    pub api: Api,
}

/// Only what is posted to a claimed path is read. A post without a body, like other methods, asks
/// nothing that a parser could read: the endpoint says what it thinks of it.
pub(crate) fn api_of(
    shared: &Shared,
    is_post: bool,
    path: &str,
    headers: &HeaderMap,
    is_empty: bool,
) -> Result<Api, Unclaimed> {
    if !is_post {
        return Ok(Api::Other);
    }
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if is_empty { Ok(Api::Other) } else { shared.parsers.resolve(request_path(path, header)) }
}

/// The whole request: parse, tokenize, chains, decide, forward, observe.
async fn route(
    shared: &Arc<Shared>,
    way: &Way,
    client: IpAddr,
    mut parts: Parts,
    body: Incoming,
) -> Result<Response<Body>, RouteError> {
    let inflight = shared.admit()?;
    check_head(shared, &parts)?;
    if way.api.is_grpc() {
        return Err(RouteError::Grpc(way.api.as_str()));
    }
    headers::strip(&mut parts.headers);
    let routed = shared.rewriter.reads_body(way.api, &parts.headers);
    // The body is kept for other endpoints until one answers.
    let mut held = shared.hold_body();
    let payload = if routed {
        Payload::Whole(collect(shared, &parts.headers, body, &mut held).await?)
    } else {
        pass_through(shared, &parts.headers, body)?
    };
    let whole = match &payload {
        Payload::Whole(bytes) if routed => Some(bytes),
        _ => None,
    };
    let mut chosen = decide(shared, way, &parts.headers, whole, None).await?;
    chosen.tell_endpoint(&mut parts.headers);
    let payload = renamed(payload, chosen.rewrite.as_ref());
    let restorer = chosen.rewrite.as_ref().and_then(Rewrite::restorer);
    let mut outgoing = Outgoing {
        request_id: way.request_id.clone(),
        uri: parts.uri,
        method: parts.method,
        headers: parts.headers,
        id_value: way.id_value.clone(),
        client,
        payload,
        read_answer: way.api.tells_usage(),
        restores_name: restorer.is_some(),
    };
    let candidates = std::mem::take(&mut chosen.candidates);
    let response_headers = std::mem::take(&mut chosen.response_headers);
    let mut observer = observe(shared, way, chosen, inflight);
    match forward(shared, &mut outgoing, &mut observer, &candidates).await {
        Ok(answer) => {
            note_cache_reset(shared, &outgoing, &answer);
            Ok(respond(shared, answer, observer, restorer, response_headers))
        }
        Err(error) => {
            observer.refuse(&error);
            Ok(error.respond(way.api))
        }
    }
}

/// The body under the name of the model that serves it.
fn renamed(payload: Payload, rewrite: Option<&Rewrite>) -> Payload {
    let renamed = match (&payload, rewrite) {
        (Payload::Whole(body), Some(rewrite)) => rewrite.body(body),
        _ => None,
    };
    renamed.map_or(payload, Payload::Renamed)
}

fn check_head(shared: &Shared, parts: &Parts) -> Result<(), RouteError> {
    let max = shared.settings.header_bytes_max;
    let target = parts.uri.path_and_query().map_or(0, |t| t.as_str().len());
    if parts.method == Method::CONNECT {
        return Err(RouteError::Tunnel);
    }
    if target + headers::bytes_of(&parts.headers) > max {
        return Err(RouteError::HeadTooLarge(max));
    }
    Ok(())
}

/// Reads a whole body, without copying one that comes in a single piece.
async fn collect(
    shared: &Shared,
    headers: &HeaderMap,
    body: Incoming,
    held: &mut HeldBody,
) -> Result<Bytes, RouteError> {
    let expected = check_length(shared, headers)?;
    let mut pieces = Pieces::new(shared, Some(body));
    let first = pieces.next().await?.unwrap_or_default();
    held.take(first.len())?;
    let Some(second) = pieces.next().await? else { return Ok(observed(shared, first)) };
    held.take(second.len())?;
    let expected = expected.unwrap_or(0).min(BODY_RESERVE_BYTES_MAX);
    let mut all = BytesMut::with_capacity(expected.max(first.len() + second.len()));
    all.extend_from_slice(&first);
    all.extend_from_slice(&second);
    while let Some(piece) = pieces.next().await? {
        held.take(piece.len())?;
        all.extend_from_slice(&piece);
    }
    Ok(observed(shared, all.freeze()))
}

fn observed(shared: &Shared, body: Bytes) -> Bytes {
    shared.metrics.request_body.observe(body.len() as f64);
    body
}

fn check_length(shared: &Shared, headers: &HeaderMap) -> Result<Option<usize>, RouteError> {
    let max = shared.settings.body_bytes_max;
    let length = known_length(headers).map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if length.is_some_and(|n| n > max) {
        return Err(RouteError::BodyTooLarge(max));
    }
    Ok(length)
}

fn pass_through(
    shared: &Shared,
    headers: &HeaderMap,
    body: Incoming,
) -> Result<Payload, RouteError> {
    check_length(shared, headers)?;
    let empty = http_body::Body::is_end_stream(&body);
    Ok(if empty { Payload::Whole(Bytes::new()) } else { Payload::Stream(Some(body)) })
}

/// From a complete body, if it is read, to a decision: tokenized, held back where the plan has
/// windows, decided among the endpoints that are allowed. Dropping the result gives back what was
/// reserved.
pub(crate) async fn decide(
    shared: &Arc<Shared>,
    way: &Way,
    headers: &HeaderMap,
    body: Option<&Bytes>,
    allowed: Option<&[EndpointId]>,
) -> Result<Chosen, RouteError> {
    let limit_ms = shared.settings.decision_timeout_ms.max(1);
    let since = Instant::now();
    let decided = async {
        let asked = match body {
            Some(body) => {
                tokenize::read(shared, way.api, body, tokenize::Hints::of(headers)).await?
            }
            None => Asked::nothing(),
        };
        let candidate =
            Candidate { request_id: way.request_id.as_str(), asked: &asked, headers, allowed };
        let held = hold(shared, &candidate).await;
        choose(shared, &candidate, held.as_ref().map(|held| held.id), since)
    };
    let decided = tokio::time::timeout(ms(limit_ms), decided).await;
    decided.unwrap_or(Err(RouteError::DecisionTimeout(limit_ms)))
}

/// A decision that holds its reservation.
pub(crate) struct Chosen {
    pub reservation: Reservation,
    /// What goes into llm-d's metrics, where they are asked for.
    pub meter: Option<Meter>,
    /// The chosen endpoint, then the next best ones.
    pub candidates: Endpoints,
    /// Headers that plugins want on the response.
    pub response_headers: Vec<(HeaderName, HeaderValue)>,
    /// How many of the candidates the plan offers to proxies.
    pub offered: usize,
    /// The totals of those that no filter removed, if proxies are told.
    pub scores: Vec<(Name, f64)>,
    /// Headers for the endpoint: who else works for the request.
    request_headers: Vec<RequestHeader>,
    /// How the request came to its model, if that may be another one than it named.
    pub rewrite: Option<Rewrite>,
    mode: Mode,
    endpoint: Name,
    /// Where the decision stands in the ring.
    number: u64,
}

impl Chosen {
    /// What endpoints are told whichever of them is tried.
    pub fn told(&self) -> impl Iterator<Item = &RequestHeader> {
        self.request_headers.iter().filter(|header| header.name != DATA_PARALLEL_HEADER)
    }

    /// Sets the headers that name those who work for the request before it is answered. The rank
    /// behind a shared port differs by the endpoint that is tried, and is set there.
    fn tell_endpoint(&self, headers: &mut HeaderMap) {
        for RequestHeader { name, value } in self.told() {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
    }
}

/// A request before its decision.
pub(crate) struct Candidate<'a> {
    pub request_id: &'a str,
    pub asked: &'a Asked,
    pub headers: &'a HeaderMap,
    /// The only endpoints that may serve it; `None`: all.
    pub allowed: Option<&'a [EndpointId]>,
}

/// A request as the brain sees it.
pub(crate) fn scheduled<'a>(
    shared: &Shared,
    candidate: &Candidate<'a>,
    seen: &'a Headers<'a>,
    held: Option<HeldId>,
) -> kvroute_core::decision::Request<'a> {
    let asked = candidate.asked;
    kvroute_core::decision::Request {
        id: candidate.request_id,
        model: &asked.model,
        prompts: &asked.prompts,
        prompt_tokens: asked.prompt_tokens,
        tokens_known: asked.known,
        max_tokens: asked.max_tokens,
        skips_cache: asked.skips_cache,
        held,
        media: &asked.media,
        priority: priority(shared, candidate.headers),
        headers: seen,
        allowed: candidate.allowed,
    }
}

/// A place in a window; given up when the client goes before its end.
struct HeldPlace<'a> {
    shared: &'a Shared,
    id: HeldId,
}

impl Drop for HeldPlace<'_> {
    fn drop(&mut self) {
        self.shared.brain.lock().leave(self.id);
    }
}

/// Waits until the window of requests that arrive together closes, where the plan has windows.
async fn hold<'a>(shared: &'a Shared, candidate: &Candidate<'_>) -> Option<HeldPlace<'a>> {
    if !shared.holds {
        return None;
    }
    let now = shared.clock.now();
    let held = {
        let seen = scheduling_headers(shared, candidate.headers, candidate.asked);
        let seen = Headers(&seen);
        let request = scheduled(shared, candidate, &seen, None);
        shared.brain.lock().hold(now, &request)?
    };
    let place = HeldPlace { shared, id: held.id };
    tokio::time::sleep(held.until.since(now)).await;
    Some(place)
}

/// Decides where a request goes, and notes the decision. Its body has been complete `since` then.
pub(crate) fn choose(
    shared: &Arc<Shared>,
    candidate: &Candidate<'_>,
    held: Option<HeldId>,
    since: Instant,
) -> Result<Chosen, RouteError> {
    let started = Instant::now();
    let asked = candidate.asked;
    if let Some(Rewrite { rule, from, to, .. }) = &asked.rewrite {
        shared.metrics.count_rewrite(rule, from, to, |model| shared.knows_model(model));
    }
    let seen = scheduling_headers(shared, candidate.headers, asked);
    let seen = Headers(&seen);
    let request = scheduled(shared, candidate, &seen, held);
    let (memory, prompt) = shared.decisions.spare();
    let decided = {
        let mut brain = shared.brain.lock();
        brain.decide_in(shared.clock.now(), &request, memory).map(|decision| {
            let offered = brain.endpoints_offered(decision.record.profile.as_str());
            (decision, offered)
        })
    };
    let names = shared.metrics.upstream.as_ref();
    let names = names.map(|names| (names, about(names, candidate, request.priority, started)));
    let (decision, offered) = decided.map_err(|reject| {
        names.as_ref().inspect(|(names, about)| names.rejected(about, reject.status()));
        RouteError::Rejected(reject)
    })?;
    let Decision { ticket, endpoint, fallback, response_headers, request_headers, record, .. } =
        decision;
    shared.metrics.decision.observe(started.elapsed().as_secs_f64());
    let reservation = Reservation::new(Arc::clone(shared), ticket);
    let port = || shared.upstreams.get(endpoint).map(|upstream| upstream.address.port());
    let meter = names.map(|(names, about)| names.decided(&about, &record, port));
    let (mode, name) = (record.mode, record.endpoint.clone());
    if !asked.model.is_empty() {
        note_mode(shared, asked, &record);
    }
    let scores = scores_of(shared, &record);
    let number = shared.decisions.push(record, prompt.of_another(asked), since.elapsed());
    let mut candidates = fallback;
    candidates.insert(0, endpoint);
    let response_headers = response_headers
        .into_iter()
        .filter_map(|h| Some((h.name.parse().ok()?, h.value.parse().ok()?)))
        .collect();
    Ok(Chosen {
        reservation,
        meter,
        candidates,
        response_headers,
        offered,
        scores,
        request_headers,
        rewrite: asked.rewrite.clone(),
        mode,
        endpoint: name,
        number,
    })
}

fn scores_of(shared: &Shared, record: &DecisionRecord) -> Vec<(Name, f64)> {
    if !shared.tells_scores {
        return Vec::new();
    }
    record.scores.rows.iter().map(|row| (row.endpoint.clone(), row.total)).collect()
}

/// The request as llm-d's metrics label it.
fn about<'a>(
    names: &UpstreamMetrics,
    candidate: &Candidate<'a>,
    priority: i32,
    started: Instant,
) -> Decided<'a> {
    let Candidate { asked, headers, .. } = *candidate;
    let served = asked.model.as_str();
    let (rule, model, target) = match &asked.rewrite {
        Some(Rewrite { rule, from, to, .. }) => (rule.as_str(), from.as_str(), to.as_str()),
        None => ("", served, served),
    };
    Decided {
        model,
        target,
        rule,
        fairness_id: names.fairness_id(|name| headers.get(name)?.to_str().ok()),
        priority,
        body_bytes: asked.body_bytes,
        block_tokens: asked.block_tokens(),
        took: started.elapsed(),
    }
}

/// The priority of the objective that the request names; 0 for others.
fn priority(shared: &Shared, headers: &HeaderMap) -> i32 {
    if shared.settings.objectives.is_empty() {
        return 0;
    }
    let given = OBJECTIVE.iter().find_map(|name| headers.get(*name));
    let name = given.and_then(|value| value.to_str().ok()).unwrap_or_default();
    shared.settings.objectives.get(name).copied().unwrap_or(0)
}

/// Names and values.
type SeenHeaders<'a> = SmallVec<[(&'a str, &'a str); 8]>;

/// The headers that the plan's plugins read; a session id in the body stands in for the header.
pub(crate) fn scheduling_headers<'a>(
    shared: &'a Shared,
    headers: &'a HeaderMap,
    asked: &'a Asked,
) -> SeenHeaders<'a> {
    seen_headers(&shared.scheduling_headers, headers, asked.session_id.as_deref())
}

/// Every value of every header: HTTP/2 sends cookies one by one.
fn seen_headers<'a>(
    names: &'a [String],
    headers: &'a HeaderMap,
    session_id: Option<&'a str>,
) -> SeenHeaders<'a> {
    let mut seen = SeenHeaders::new();
    for name in names {
        let before = seen.len();
        // A look at each is less than a hash of the name: there are few.
        let values = headers.iter().filter(|(given, _)| given.as_str() == name);
        let values = values.filter_map(|(_, value)| value.to_str().ok());
        seen.extend(values.map(|value| (name.as_str(), value)));
        let in_body = session_id.filter(|_| name == "x-session-id" && seen.len() == before);
        seen.extend(in_body.map(|value| (name.as_str(), value)));
    }
    seen
}

fn note_mode(shared: &Shared, asked: &Asked, record: &DecisionRecord) {
    let metrics = &shared.metrics;
    metrics.prompt_tokens.observe(f64::from(asked.prompt_tokens));
    // Counted as `tokenize_failures`; the model is routed as before.
    if asked.request_at_fault {
        return;
    }
    let is_known = |model: &str| shared.knows_model(model);
    metrics.set_model_mode(&asked.model, record.mode.as_str(), is_known);
    if record.mode > shared.best_mode() {
        metrics.count_fallback(record.reason.as_str());
    }
    if record.reason == Reason::PromptDiffers {
        let (model, endpoint) = (cut(&asked.model), record.endpoint.as_str());
        if shared.complaints.is_first(&format!("{model} at {endpoint}")) {
            warn!(
                model,
                endpoint,
                "The engine counts other prompt tokens than the router: give --tokenizer the \
                 engine's own tokenizer.json and chat template. Until then history routes."
            );
        }
    }
}

/// From here on, dropping the observer is what a client that left looks like; what else ends a
/// request is told to it.
pub(crate) fn observe(
    shared: &Arc<Shared>,
    way: &Way,
    chosen: Chosen,
    inflight: Inflight,
) -> Observer {
    let routed = way.api.reads_body();
    let outcome = Outcome { endpoint: chosen.endpoint.clone(), ..Outcome::default() };
    let mut meter = chosen.meter;
    meter.iter_mut().for_each(|meter| meter.arrived(way.started));
    Observer {
        shared: Arc::clone(shared),
        reservation: chosen.reservation,
        request_id: way.request_id.clone(),
        number: chosen.number,
        mode: if routed { chosen.mode.as_str() } else { PASS_THROUGH },
        started: way.started,
        _inflight: inflight,
        scanner: UsageScanner::of(way.api),
        outcome,
        meter,
        touched: way.started,
        ended: false,
    }
}

/// The endpoint's answer as the client gets it.
fn respond(
    shared: &Shared,
    answer: Answer,
    mut observer: Observer,
    restorer: Option<Restorer>,
    response_headers: Vec<(HeaderName, HeaderValue)>,
) -> Response<Body> {
    let Answer { head, connection, upstream } = answer;
    let content_type = head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    observer.head(head.status.as_u16(), content_type);
    let idle_s = shared.settings.response_idle_timeout_s.max(1);
    let (status, mut headers) = (head.status, head.headers);
    headers::strip(&mut headers);
    let is_encoded = headers::is_encoded(headers.get_all(CONTENT_ENCODING).iter());
    let restorer = restorer.filter(|_| may_restore(shared, &upstream.name, is_encoded));
    if restorer.is_some() {
        headers.remove(CONTENT_LENGTH);
    }
    headers.insert(headers::ENDPOINT, upstream.header.clone());
    for (name, value) in response_headers {
        headers.insert(name, value);
    }
    let idle_timeout = Duration::from_secs(u64::from(idle_s));
    let body = AnswerBody::new(
        connection,
        head.framing,
        head.keep_alive,
        upstream,
        observer,
        restorer,
        idle_timeout,
    );
    let mut response = Response::new(Body::Answer(Box::new(body)));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Whether names can be found in an answer, which they cannot if it is compressed.
pub(crate) fn may_restore(shared: &Shared, endpoint: &str, compressed: bool) -> bool {
    if compressed && shared.complaints.is_first(&format!("compressed answers of {endpoint}")) {
        warn!(
            endpoint,
            "Its answers are compressed, unasked: their models keep the target's name."
        );
    }
    !compressed
}

/// An engine publishes that its cache was cleared only with its next request. A reset that went
/// through this router is known at once, for the one endpoint that it reached.
fn note_cache_reset(shared: &Shared, outgoing: &Outgoing, answer: &Answer) {
    let path = outgoing.uri.path();
    let is_reset = outgoing.method == Method::POST && path.ends_with("/reset_prefix_cache");
    if is_reset && answer.head.status.is_success() {
        info!(endpoint = answer.upstream.name, "An endpoint's prefix cache was reset.");
        shared.brain.lock().on_cache_reset(shared.clock.now(), answer.upstream.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_of_several_headers_are_all_seen() {
        let names = ["cookie".to_owned(), "x-session-id".to_owned()];
        let mut headers = HeaderMap::new();
        headers.append("cookie", HeaderValue::from_static("a=1"));
        headers.append("cookie", HeaderValue::from_static("sid=42"));
        let seen = seen_headers(&names, &headers, Some("body"));
        assert_eq!(seen[..], [("cookie", "a=1"), ("cookie", "sid=42"), ("x-session-id", "body")]);
        drop(seen);
        headers.insert("x-session-id", HeaderValue::from_static("head"));
        let seen = seen_headers(&names, &headers, Some("body"));
        assert_eq!(seen.last(), Some(&("x-session-id", "head")));
    }
}
