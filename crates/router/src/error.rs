//! What does a client see when the router itself must answer? Status, message, counter: one row
//! for each thing that can go wrong, in the error shape of the API that was called.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use kvroute_core::decision::Reject;
use kvroute_wire::api::Api;
use kvroute_wire::error_body;
use kvroute_wire::parsers::Unclaimed;
use kvroute_wire::request::BodyError;
use thiserror::Error;

use crate::headers::{DROPPED_REASON, ENDPOINT};
use crate::observe::Body;
use crate::upstream::UpstreamError;

/// Seconds after which a refused client may try again.
const RETRY_AFTER_S: u16 = 1;

/// Label of request heads over a limit, the router's own or hyper's.
pub(crate) const HEAD_TOO_LARGE: &str = "head_too_large";

/// Why a request was not answered by an endpoint.
#[derive(Debug, Error)]
pub(crate) enum RouteError {
    #[error("{0}")]
    Body(#[from] BodyError),
    #[error("{0}")]
    Unclaimed(#[from] Unclaimed),
    #[error(
        "this proxy speaks HTTP/1.1 to endpoints, which gRPC does not run over; let a gateway with \
         HTTP/2 to the endpoints forward {0}"
    )]
    Grpc(&'static str),
    #[error("the request names no model; set `model`, or start the router with --model")]
    NoModel,
    #[error("the request body is larger than {0} bytes (kvroute.body_bytes_max)")]
    BodyTooLarge(usize),
    #[error("the request head is larger than {0} bytes (kvroute.header_bytes_max)")]
    HeadTooLarge(usize),
    #[error("the request body did not arrive: nothing came for {0} s")]
    BodyTimeout(u32),
    #[error("the request body broke off")]
    BodyBroken,
    #[error(
        "the request is not complete {0} s after its head (kvroute.ext_proc_request_timeout_s)"
    )]
    RequestTimeout(u32),
    #[error("no decision within {0} ms (kvroute.decision_timeout_ms); try again")]
    DecisionTimeout(u32),
    #[error("the endpoint did not answer within {0} s (kvroute.first_byte_timeout_s)")]
    NoAnswer(u32),
    #[error("nothing of the answer came for {0} s (kvroute.response_idle_timeout_s)")]
    AnswerStalled(u32),
    #[error(
        "the proxy sends bodies over ext_proc in mode {0}, which cannot be answered; set \
         request_body_mode and response_body_mode to FULL_DUPLEX_STREAMED"
    )]
    BodyMode(u32),
    #[error(
        "the proxy sends an ext_proc message of more than {0} bytes \
         (kvroute.ext_proc_message_bytes_max); let it send bodies in smaller pieces"
    )]
    MessageTooLarge(usize),
    #[error("this router does not tunnel; CONNECT and protocol upgrades are not supported")]
    Tunnel,
    #[error("{0} requests are in flight, the limit of this router; try again shortly")]
    Inflight(u32),
    #[error(
        "the bodies of requests under way leave no room for another one in {0} bytes \
         (kvroute.bodies_bytes_max); try again shortly"
    )]
    BodiesFull(usize),
    #[error("{0}")]
    Rejected(Reject),
    #[error("the chosen endpoint has just left the fleet; try again")]
    Gone,
    #[error("no endpoint answered; the last one tried, {endpoint}: {error}")]
    Upstream { endpoint: String, error: UpstreamError },
}

impl RouteError {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            RouteError::Body(_)
            | RouteError::Unclaimed(_)
            | RouteError::NoModel
            | RouteError::BodyBroken => StatusCode::BAD_REQUEST,
            RouteError::BodyTooLarge(_) | RouteError::MessageTooLarge(_) => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            RouteError::HeadTooLarge(_) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            RouteError::BodyTimeout(_) | RouteError::RequestTimeout(_) => {
                StatusCode::REQUEST_TIMEOUT
            }
            RouteError::DecisionTimeout(_) | RouteError::BodiesFull(_) | RouteError::Gone => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            RouteError::NoAnswer(_) | RouteError::AnswerStalled(_) => StatusCode::GATEWAY_TIMEOUT,
            RouteError::BodyMode(_) => StatusCode::INTERNAL_SERVER_ERROR,
            RouteError::Tunnel | RouteError::Grpc(_) => StatusCode::NOT_IMPLEMENTED,
            RouteError::Inflight(_) => StatusCode::TOO_MANY_REQUESTS,
            RouteError::Rejected(reject) => {
                StatusCode::from_u16(reject.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
            }
            RouteError::Upstream { error, .. } => match error {
                UpstreamError::FirstByteTimeout(_) => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::BAD_GATEWAY,
            },
        }
    }

    /// The label in `kvroute_rejects_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            RouteError::Body(_) => "bad_body",
            RouteError::Unclaimed(_) => "unclaimed_path",
            RouteError::Grpc(_) => "grpc",
            RouteError::NoModel => "no_model",
            RouteError::BodyTooLarge(_) => "body_too_large",
            RouteError::HeadTooLarge(_) => HEAD_TOO_LARGE,
            RouteError::BodyTimeout(_) => "body_timeout",
            RouteError::BodyBroken => "body_broken",
            RouteError::RequestTimeout(_) => "request_timeout",
            RouteError::DecisionTimeout(_) => "decision_timeout",
            RouteError::NoAnswer(_) => "no_answer",
            RouteError::AnswerStalled(_) => "answer_stalled",
            RouteError::BodyMode(_) => "body_mode",
            RouteError::MessageTooLarge(_) => "message_too_large",
            RouteError::Tunnel => "tunnel",
            RouteError::Inflight(_) => "inflight_limit",
            RouteError::BodiesFull(_) => "bodies_full",
            RouteError::Rejected(reject) => reject.dropped_reason(),
            RouteError::Gone => "endpoint_gone",
            RouteError::Upstream { error, .. } => failure_label(error),
        }
    }

    /// The `type` of OpenAI's error object.
    fn kind(&self) -> &'static str {
        match self.status().as_u16() {
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 => "service_unavailable_error",
            _ => "api_error",
        }
    }

    /// The answer to a client, in the shape of `api`.
    pub fn respond(&self, api: Api) -> Response<Body> {
        let status = self.status();
        if api.is_grpc() {
            return grpc_error(status.as_u16(), &self.to_string());
        }
        let mut response = Response::new(Body::full(Bytes::from(self.body(api))));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.extend(self.headers());
        if let RouteError::Upstream { endpoint, .. } = self
            && let Ok(name) = HeaderValue::from_str(endpoint)
        {
            headers.insert(ENDPOINT, name);
        }
        response
    }

    /// The body of the answer, JSON.
    pub fn body(&self, api: Api) -> String {
        error_body::render(api, self.status().as_u16(), self.kind(), &self.to_string())
    }

    /// Value of `x-llm-d-request-dropped-reason`, for requests that might have been served at
    /// another time (llm-d's words).
    fn dropped_reason(&self) -> Option<&'static str> {
        match self {
            RouteError::Rejected(reject) => Some(reject.dropped_reason()),
            RouteError::Inflight(_) | RouteError::BodiesFull(_) => Some("rejected-saturated"),
            RouteError::DecisionTimeout(_) => Some("rejected-ttl-expired"),
            RouteError::Gone => Some("rejected-no-endpoints"),
            _ => None,
        }
    }

    /// The headers of the answer that tell of the error.
    pub fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let json = (CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let later = matches!(self.status().as_u16(), 429 | 503);
        let again = later.then(|| (RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S)));
        let dropped = self.dropped_reason().filter(|_| later).map(|reason| {
            (HeaderName::from_static(DROPPED_REASON), HeaderValue::from_static(reason))
        });
        [Some(json), again, dropped].into_iter().flatten()
    }
}

/// gRPC says what went wrong in headers; the HTTP status is always 200.
fn grpc_error(status: u16, message: &str) -> Response<Body> {
    let mut response = Response::new(Body::full(Bytes::new()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(u16::from(error_body::grpc_status(status))));
    if let Ok(message) = HeaderValue::from_str(&error_body::grpc_message(message)) {
        headers.insert("grpc-message", message);
    }
    response
}

/// What happened to an exchange with an endpoint, as a label.
pub(crate) fn failure_label(error: &UpstreamError) -> &'static str {
    match error {
        UpstreamError::Connect(_) => "connect",
        UpstreamError::ConnectTimeout(_) => "connect_timeout",
        UpstreamError::Broken(_) => "reset",
        UpstreamError::Closed => "closed",
        UpstreamError::Truncated => "truncated",
        UpstreamError::Protocol(_) => "protocol",
        UpstreamError::FirstByteTimeout(_) => "first_byte_timeout",
        UpstreamError::IdleTimeout(_) => "idle_timeout",
        UpstreamError::ProxyAnswered => "proxy_answered",
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use kvroute_core::decision::NoEndpoints;

    use super::*;

    #[test]
    fn errors_of_grpc_methods_stand_in_headers() {
        let error = RouteError::Grpc(Api::GrpcGenerate.as_str());
        let response = error.respond(Api::GrpcGenerate);
        assert_eq!(response.status(), StatusCode::OK);
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "application/grpc");
        assert_eq!(header("grpc-status"), "12");
        assert!(header("grpc-message").ends_with("forward grpc_generate"));
        assert_eq!(error.respond(Api::Other).status(), StatusCode::NOT_IMPLEMENTED);
    }

    /// The words are llm-d's, by what happened there; bad requests and failed endpoints have none.
    #[test]
    fn dropped_requests_say_why() {
        let why = NoEndpoints::EmptyFleet;
        let table = [
            (RouteError::Inflight(1), 429, Some("rejected-saturated")),
            (RouteError::BodiesFull(1), 503, Some("rejected-saturated")),
            (RouteError::DecisionTimeout(1), 503, Some("rejected-ttl-expired")),
            (RouteError::Gone, 503, Some("rejected-no-endpoints")),
            (RouteError::Rejected(Reject::NoEndpoints { why }), 503, Some("rejected-no-endpoints")),
            (RouteError::Rejected(Reject::Shed), 429, Some("rejected-saturated")),
            (RouteError::NoModel, 400, None),
            (RouteError::BodyTooLarge(1), 413, None),
            (RouteError::BodyTimeout(1), 408, None),
            (RouteError::NoAnswer(1), 504, None),
        ];
        for (error, status, reason) in table {
            assert_eq!(error.status().as_u16(), status, "{error}");
            let headers: HeaderMap = error.headers().collect();
            let found = headers.get(DROPPED_REASON).map(|value| value.to_str().unwrap());
            assert_eq!(found, reason, "{error}");
            assert_eq!(headers.contains_key(RETRY_AFTER), reason.is_some(), "{error}");
        }
    }

    #[test]
    fn a_path_that_nobody_claims_is_a_bad_request() {
        let parsers = kvroute_wire::parsers::Parsers::new(&[]);
        let error = RouteError::from(parsers.resolve("/v1/x").unwrap_err());
        assert_eq!((error.status().as_u16(), error.reason()), (400, "unclaimed_path"));
        assert_eq!(error.kind(), "invalid_request_error");
    }
}
