//! Which headers cross the router, and which stay on one side of it?

use std::io::Write;
use std::net::IpAddr;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue};
use kvroute_core::decision::DATA_PARALLEL_HEADER;
use kvroute_core::fleet::Name;

/// Names a request, chosen by the client or by the router; on every response.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_NAME);
pub(crate) const REQUEST_ID_NAME: &str = "x-request-id";
/// The endpoint that answered; on every response that came from one.
pub(crate) const ENDPOINT: HeaderName = HeaderName::from_static(ENDPOINT_NAME);
pub(crate) const ENDPOINT_NAME: &str = "x-kvroute-endpoint";
const FORWARDED_FOR: &str = "x-forwarded-for";

/// Longest request id that is taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Headers by which a scheduler and its data plane talk to each other. A client that could set
/// one would steer requests past the scheduler.
const CONTROL: [&str; 6] = [
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    DROPPED_REASON,
    "x-went-into-resp-headers",
];
/// The same, by how the name begins.
const CONTROL_PREFIXES: [&str; 2] = ["x-gateway-destination-endpoint", "x-kvroute-"];

/// Why the router refused a request.
pub(crate) const DROPPED_REASON: &str = "x-llm-d-request-dropped-reason";

/// The model that is to serve a request, by which its own name is replaced, and the older name of
/// this header. An endpoint does not get them: a router behind this one would replace it again.
pub(crate) const MODEL_REWRITE: [&str; 2] =
    ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"];

/// How headers begin that tell the scheduler something about a request, those above among them.
const HINT_PREFIXES: [&str; 2] = ["x-llm-d-", "x-gateway-"];

/// Whether there is any: most requests have none, and each look for one costs a hash.
pub(crate) fn has_hints(headers: &HeaderMap) -> bool {
    let is_hint = |name: &HeaderName| HINT_PREFIXES.iter().any(|p| name.as_str().starts_with(p));
    headers.keys().any(is_hint)
}

/// Chooses a data parallel rank behind one address (vLLM, SGLang). A client's own choice is
/// replaced only where the router has chosen.
pub(crate) const RANK: &str = "x-data-parallel-rank";

/// Is this a header that only the router itself may set?
pub(crate) fn is_control(name: &HeaderName) -> bool {
    is_control_name(name.as_str().as_bytes())
}

/// The same for a name as a data plane writes it, in any case.
pub(crate) fn is_control_name(name: &[u8]) -> bool {
    let begins_with = |text: &str| {
        name.get(..text.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(text.as_bytes()))
    };
    begins_with("x-")
        && (CONTROL.iter().any(|control| control.len() == name.len() && begins_with(control))
            || CONTROL_PREFIXES.iter().any(|prefix| begins_with(prefix)))
}

/// RFC 9110 section 7.6.1: headers that mean one connection only.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    let name = name.as_str();
    match name.as_bytes().first() {
        Some(b'c') => name == "connection",
        Some(b'k') => name == "keep-alive",
        Some(b'p') => {
            matches!(name, "proxy-connection" | "proxy-authenticate" | "proxy-authorization")
        }
        Some(b't') => matches!(name, "te" | "trailer" | "transfer-encoding"),
        Some(b'u') => name == "upgrade",
        _ => false,
    }
}

/// Removes what `connection` lists, the headers that always mean one connection, and those that
/// only the router may set.
pub(crate) fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','))
            .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
            .collect();
        for name in listed {
            headers.remove(name);
        }
    }
    let stays = |name: &&HeaderName| is_hop_by_hop(name) || is_control(name);
    let found: Vec<HeaderName> = headers.keys().filter(stays).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// Whether a body with these values of `content-encoding` is compressed, so that nothing can be
/// found in it.
pub(crate) fn is_encoded(encodings: impl IntoIterator<Item: AsRef<[u8]>>) -> bool {
    encodings.into_iter().any(|value| value.as_ref() != b"identity")
}

/// Sum of names and values, in bytes, with the four that separate them on the wire.
pub(crate) fn bytes_of(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

/// The client's request id if it can be shown in logs, paths and headers, else a new one.
pub(crate) fn request_id(headers: &HeaderMap) -> (Name, HeaderValue) {
    if let Some(value) = headers.get(REQUEST_ID)
        && let Ok(text) = value.to_str()
        && (1..=REQUEST_ID_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    {
        return (Name::from(text), value.clone());
    }
    let id = new_request_id();
    let text = std::str::from_utf8(&id).unwrap_or("-");
    let value = HeaderValue::from_bytes(&id).unwrap_or(HeaderValue::from_static("-"));
    (Name::from(text), value)
}

/// A random UUID, version 4, written by hand: formatting takes several times as long.
fn new_request_id() -> [u8; 36] {
    let random = fastrand::u128(..);
    let random = random & !(0xF << 76) | (4 << 76);
    let random = random & !(0x3 << 62) | (2 << 62);
    let mut id = [b'-'; 36];
    // Where a byte's digits stand, between the dashes.
    const PLACES: [u8; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
    for (place, byte) in PLACES.into_iter().zip(random.to_be_bytes()) {
        let digit = |value: u8| b"0123456789abcdef"[usize::from(value & 0xF)];
        let at = usize::from(place);
        (id[at], id[at + 1]) = (digit(byte >> 4), digit(byte));
    }
    id
}

/// What an upstream request's head needs besides the client's headers.
pub(crate) struct HeadParts<'a> {
    /// `GET`, `POST`, ...
    pub method: &'a http::Method,
    /// Path and query.
    pub target: &'a str,
    /// `host:port` of the endpoint.
    pub authority: &'a str,
    pub request_id: &'a HeaderValue,
    pub client: IpAddr,
    pub length: BodyLength,
    /// Rank to choose behind an address that several ranks share.
    pub rank: Option<u32>,
    /// The chosen rank's own address, behind a port that takes the requests of all ranks.
    pub data_parallel: Option<&'a HeaderValue>,
    /// Whether the answer will be read, for usage or a model's name, which a compressed one does
    /// not show.
    pub read_answer: bool,
}

/// How the body of an upstream request is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyLength {
    /// No body and no header about it.
    None,
    /// So many bytes.
    Known(u64),
    /// `transfer-encoding: chunked`.
    Chunked,
}

/// Writes the head of the upstream request. `headers` are the client's, hop-by-hop and control
/// headers already removed; all others go through as they are, trace context included.
pub(crate) fn write_head(parts: &HeadParts<'_>, headers: &HeaderMap, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(parts.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(parts.target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    line(out, HOST.as_str(), parts.authority.as_bytes());
    for (name, value) in headers {
        let name = name.as_str();
        let stays = match name {
            "host" | "content-length" | "expect" | REQUEST_ID_NAME | FORWARDED_FOR => true,
            "accept-encoding" => parts.read_answer,
            RANK => parts.rank.is_some(),
            _ => MODEL_REWRITE.contains(&name),
        };
        if !stays {
            line(out, name, value.as_bytes());
        }
    }
    line(out, REQUEST_ID.as_str(), parts.request_id.as_bytes());
    write_forwarded_for(parts.client, headers, out);
    if let Some(rank) = parts.rank {
        number_line(out, RANK, u64::from(rank));
    }
    if let Some(address) = parts.data_parallel {
        line(out, DATA_PARALLEL_HEADER, address.as_bytes());
    }
    match parts.length {
        BodyLength::None => {}
        BodyLength::Known(n) => number_line(out, CONTENT_LENGTH.as_str(), n),
        BodyLength::Chunked => line(out, TRANSFER_ENCODING.as_str(), b"chunked"),
    }
    out.extend_from_slice(b"\r\n");
}

fn write_forwarded_for(client: IpAddr, headers: &HeaderMap, out: &mut Vec<u8>) {
    out.extend_from_slice(FORWARDED_FOR.as_bytes());
    out.extend_from_slice(b": ");
    for value in headers.get_all(FORWARDED_FOR) {
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b", ");
    }
    match client.to_canonical() {
        IpAddr::V4(address) => {
            for (at, byte) in address.octets().into_iter().enumerate() {
                if at > 0 {
                    out.push(b'.');
                }
                number(out, u64::from(byte));
            }
        }
        // Writing to memory does not fail.
        IpAddr::V6(address) => drop(write!(out, "{address}")),
    }
    out.extend_from_slice(b"\r\n");
}

fn number_line(out: &mut Vec<u8>, name: &str, value: u64) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    number(out, value);
    out.extend_from_slice(b"\r\n");
}

/// By hand: formatting takes several times as long, and every request has some.
fn number(out: &mut Vec<u8>, mut value: u64) {
    let mut digits = [0; 20];
    let mut begin = digits.len();
    loop {
        begin -= 1;
        digits[begin] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[begin..]);
}

fn line(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn headers_of_the_router_in_any_case() {
        for (name, expected) in [
            ("x-kvroute-endpoint", true),
            ("X-Kvroute-", true),
            ("x-gateway-destination-endpoint", true),
            ("x-gateway-destination-endpoint-Served", true),
            ("X-WENT-INTO-RESP-HEADERS", true),
            ("x-went-into-resp-headers-", false),
            ("x-went-into-resp-header", false),
            ("x-kvroute", false),
            ("x-", false),
            ("x", false),
            ("", false),
            ("content-type", false),
        ] {
            assert_eq!(is_control_name(name.as_bytes()), expected, "{name}");
        }
    }

    #[test]
    fn one_connections_headers_stay_there() {
        let mut headers = map(&[
            ("connection", "x-once, close"),
            ("x-once", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("traceparent", "00-a-b-01"),
        ]);
        strip(&mut headers);
        assert_eq!(headers, map(&[("traceparent", "00-a-b-01")]));
    }

    #[test]
    fn a_client_cannot_steer() {
        let mut headers = map(&[
            ("x-gateway-destination-endpoint", "10.0.0.1:1"),
            ("x-gateway-destination-endpoint-subset", "10.0.0.1:1"),
            ("x-prefiller-host-port", "10.0.0.1:1"),
            ("x-encoder-hosts-ports", "10.0.0.1:1"),
            ("x-data-parallel-host-port", "10.0.0.1:1"),
            ("x-kv-cache-source-host-port", "10.0.0.1:1"),
            ("x-llm-d-request-dropped-reason", "x"),
            ("x-kvroute-endpoint", "x"),
            ("x-session-id", "kept"),
        ]);
        strip(&mut headers);
        assert_eq!(headers, map(&[("x-session-id", "kept")]));
    }

    #[test]
    fn request_ids_are_kept_only_when_harmless() {
        for (given, kept) in [("req-1.a:b_C", true), ("a b", false), ("a\"b", false), ("", false)] {
            let headers = map(&[("x-request-id", given)]);
            let (id, value) = request_id(&headers);
            assert_eq!(id.as_str() == given, kept, "{given:?}");
            assert_eq!(value.to_str().unwrap(), id.as_str());
        }
        let (id, _) = request_id(&HeaderMap::new());
        let id = id.as_str();
        assert_eq!((id.len(), &id[14..15]), (36, "4"));
        assert!(b"89ab".contains(&id.as_bytes()[19]));
        assert_ne!(id, request_id(&HeaderMap::new()).0.as_str());
    }

    #[test]
    fn the_upstream_head_is_exact() {
        let headers = map(&[
            ("host", "router"),
            ("accept-encoding", "gzip"),
            ("expect", "100-continue"),
            ("content-length", "7"),
            ("tracestate", "a=b"),
            ("x-forwarded-for", "10.1.1.1"),
            ("x-data-parallel-rank", "7"),
            ("x-llm-d-model-name-rewrite", "t"),
            ("x-gateway-model-name-rewrite", "t"),
        ]);
        let parts = HeadParts {
            method: &http::Method::POST,
            target: "/v1/completions?x=1",
            authority: "10.0.0.1:8000",
            request_id: &HeaderValue::from_static("id-1"),
            client: IpAddr::V4(Ipv4Addr::LOCALHOST),
            length: BodyLength::Known(7),
            rank: Some(1),
            data_parallel: Some(&HeaderValue::from_static("10.0.0.1:8001")),
            read_answer: true,
        };
        let mut out = Vec::new();
        write_head(&parts, &headers, &mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "POST /v1/completions?x=1 HTTP/1.1\r\nhost: 10.0.0.1:8000\r\ntracestate: a=b\r\n\
             x-request-id: id-1\r\nx-forwarded-for: 10.1.1.1, 127.0.0.1\r\n\
             x-data-parallel-rank: 1\r\nx-data-parallel-host-port: 10.0.0.1:8001\r\n\
             content-length: 7\r\n\r\n"
        );
    }
}
