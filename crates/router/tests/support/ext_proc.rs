//! An independent client of the ext_proc server: tonic's gRPC, prost's messages. What it gets is
//! checked to be nothing but fields that Envoy knows.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::net::SocketAddr;

use prost::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};

use crate::envoy::*;
use crate::support::LONG;

const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";

/// Header of the endpoint, and the key of its metadata.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";

/// A connection to the server.
#[derive(Clone)]
pub struct Client {
    pub channel: Channel,
    pub gzip: bool,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = endpoint.connect().await.expect("the ext_proc server accepts connections");
        Client { channel, gzip: false }
    }

    /// Begins a stream: what Envoy does for each request of a client.
    pub fn open(&self) -> Call {
        let (requests, mut taken) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        if self.gzip {
            grpc = grpc.send_compressed(CompressionEncoding::Gzip);
        }
        grpc = grpc.accept_compressed(CompressionEncoding::Gzip).max_decoding_message_size(8 << 20);
        let task = tokio::spawn(async move {
            let requests = futures_util::stream::poll_fn(move |cx| taken.poll_recv(cx));
            grpc.ready().await.expect("the connection is up");
            let path = http::uri::PathAndQuery::from_static(PROCESS);
            let called = grpc.streaming(tonic::Request::new(requests), path, Exact).await;
            let mut stream = match called {
                Ok(response) => response.into_inner(),
                Err(status) => return answer.send(Err(status)).unwrap_or_default(),
            };
            loop {
                let (told, last) = match stream.message().await {
                    Ok(Some(message)) => (Ok(message), false),
                    Ok(None) => return,
                    Err(status) => (Err(status), true),
                };
                if answer.send(told).is_err() || last {
                    return;
                }
            }
        });
        Call { requests: Some(requests), answers, task, before: None }
    }
}

/// One stream.
pub struct Call {
    requests: Option<mpsc::UnboundedSender<ProcessingRequest>>,
    answers: mpsc::UnboundedReceiver<Result<ProcessingResponse, Status>>,
    task: JoinHandle<()>,
    /// Read already, and to come next.
    before: Option<ProcessingResponse>,
}

impl Call {
    pub fn send(&self, message: impl Into<ProcessingRequest>) {
        let requests = self.requests.as_ref().expect("not closed yet");
        // A server that has ended the stream no longer listens; what it said is read below.
        let _ = requests.send(message.into());
    }

    /// Ends this side, as a proxy does that has nothing to say any more.
    pub fn close(&mut self) {
        self.requests = None;
    }

    /// Breaks the stream off, as Envoy does after the last chunk of an answer.
    pub async fn reset(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// What comes next: a message, the end, or a gRPC error.
    pub async fn next_or_end(&mut self) -> Option<Result<ProcessingResponse, Status>> {
        if let Some(before) = self.before.take() {
            return Some(Ok(before));
        }
        let next = tokio::time::timeout(LONG, self.answers.recv()).await;
        next.expect("an answer or the end in time").map(|told| told.map(sorted))
    }

    pub async fn next(&mut self) -> ProcessingResponse {
        let next = self.next_or_end().await.expect("an answer, not the end");
        next.expect("an answer, not an error")
    }

    /// Nothing more comes, and no error.
    pub async fn ends(&mut self) {
        if let Some(more) = self.next_or_end().await {
            panic!("more than was expected: {more:?}");
        }
    }

    /// Reads the pieces of the request's body as they go on: up to the one that is said to be the
    /// last, or else as long as there is something in them before something else comes. Their
    /// bytes, and the length of each.
    pub async fn request_body(&mut self, ends: bool) -> (Vec<u8>, Vec<usize>) {
        self.body(ends, true).await
    }

    /// The same for the answer's body.
    pub async fn response_body(&mut self, ends: bool) -> (Vec<u8>, Vec<usize>) {
        self.body(ends, false).await
    }

    async fn body(&mut self, ends: bool, of_request: bool) -> (Vec<u8>, Vec<usize>) {
        let (mut whole, mut lengths) = (Vec::new(), Vec::new());
        loop {
            let answer = self.next().await;
            let is_request = matches!(answer.response, Some(Response::RequestBody(_)));
            let is_response = matches!(answer.response, Some(Response::ResponseBody(_)));
            if !ends && !is_request && !is_response {
                self.before = Some(answer);
                return (whole, lengths);
            }
            assert_eq!(is_request, of_request, "{answer:?}");
            let (bytes, end) = piece(answer);
            lengths.push(bytes.len());
            whole.extend(bytes);
            assert!(ends || !end, "the end, where trailers were to follow");
            if end {
                return (whole, lengths);
            }
        }
    }

    /// The endpoint answers with an empty object, and the stream is over.
    pub async fn answered(mut self, status: u16) {
        let status = status.to_string();
        let headers = [(":status", status.as_str()), ("content-type", "application/json")];
        self.send(response_headers(&headers, false));
        set_headers(&self.next().await);
        self.send(response_body("{}", false));
        self.send(response_body("", true));
        assert_eq!(self.response_body(true).await.0, b"{}");
        self.reset().await;
    }

    /// No message has come so far. Shows nothing but what is there already.
    pub fn is_silent(&mut self) -> bool {
        self.before.is_none() && self.answers.is_empty()
    }
}

/// Headers in the order of their names, so that answers can be compared.
fn sorted(mut answer: ProcessingResponse) -> ProcessingResponse {
    use Response as R;
    let mutation = match answer.response.as_mut() {
        Some(R::RequestHeaders(headers) | R::ResponseHeaders(headers)) => {
            headers.response.as_mut().and_then(|common| common.header_mutation.as_mut())
        }
        Some(R::ImmediateResponse(immediate)) => immediate.headers.as_mut(),
        Some(R::RequestTrailers(trailers) | R::ResponseTrailers(trailers)) => {
            trailers.header_mutation.as_mut()
        }
        Some(R::RequestBody(_) | R::ResponseBody(_)) | None => None,
    };
    if let Some(mutation) = mutation {
        mutation.set_headers.sort_by_key(|set| set.header.as_ref().map(|h| h.key.clone()));
        mutation.remove_headers.sort();
    }
    answer
}

/// Prost's messages; an answer with a byte that none of Envoy's fields explains is an error.
struct Exact;
struct Sender;
struct Reader;

impl Codec for Exact {
    type Encode = ProcessingRequest;
    type Decode = ProcessingResponse;
    type Encoder = Sender;
    type Decoder = Reader;

    fn encoder(&mut self) -> Sender {
        Sender
    }

    fn decoder(&mut self) -> Reader {
        Reader
    }
}

impl Encoder for Sender {
    type Item = ProcessingRequest;
    type Error = Status;

    fn encode(&mut self, item: ProcessingRequest, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(to).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Reader {
    type Item = ProcessingResponse;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<ProcessingResponse>, Status> {
        let length = bytes::Buf::remaining(from);
        let read = ProcessingResponse::decode(from);
        let message = read.map_err(|error| Status::data_loss(format!("unreadable: {error}")))?;
        if message.encoded_len() != length {
            let known = message.encoded_len();
            let text = format!("{length} bytes, of which Envoy knows {known}: {message:?}");
            return Err(Status::data_loss(text));
        }
        Ok(Some(message))
    }
}

impl From<Request> for ProcessingRequest {
    fn from(request: Request) -> ProcessingRequest {
        ProcessingRequest { request: Some(request), ..ProcessingRequest::default() }
    }
}

impl ProcessingRequest {
    /// With these fields in a namespace of the filter metadata.
    pub fn metadata(mut self, namespace: &str, fields: Struct) -> ProcessingRequest {
        let context = self.metadata_context.get_or_insert_default();
        context.filter_metadata.insert(namespace.to_owned(), fields);
        self
    }

    /// With the modes that the first message tells.
    pub fn modes(mut self, request: BodySendMode, response: BodySendMode) -> ProcessingRequest {
        self.protocol_config = Some(ProtocolConfiguration {
            request_body_mode: request as i32,
            response_body_mode: response as i32,
            send_body_without_waiting_for_header_response: false,
        });
        self
    }
}

fn header_map(headers: &[(&str, &str)]) -> Option<HeaderMap> {
    let value = |(key, value): &(&str, &str)| HeaderValue {
        key: (*key).to_owned(),
        value: String::new(),
        raw_value: value.as_bytes().to_vec(),
    };
    Some(HeaderMap { headers: headers.iter().map(value).collect() })
}

fn http_headers(headers: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    HttpHeaders { headers: header_map(headers), end_of_stream }
}

fn http_body(body: impl AsRef<[u8]>, end_of_stream: bool) -> HttpBody {
    HttpBody { body: body.as_ref().to_vec(), end_of_stream }
}

pub fn request_headers(headers: &[(&str, &str)], end_of_stream: bool) -> ProcessingRequest {
    Request::RequestHeaders(http_headers(headers, end_of_stream)).into()
}

pub fn request_body(body: impl AsRef<[u8]>, end_of_stream: bool) -> ProcessingRequest {
    Request::RequestBody(http_body(body, end_of_stream)).into()
}

pub fn request_trailers(trailers: &[(&str, &str)]) -> ProcessingRequest {
    Request::RequestTrailers(HttpTrailers { trailers: header_map(trailers) }).into()
}

pub fn response_headers(headers: &[(&str, &str)], end_of_stream: bool) -> ProcessingRequest {
    Request::ResponseHeaders(http_headers(headers, end_of_stream)).into()
}

pub fn response_body(body: impl AsRef<[u8]>, end_of_stream: bool) -> ProcessingRequest {
    Request::ResponseBody(http_body(body, end_of_stream)).into()
}

pub fn response_trailers(trailers: &[(&str, &str)]) -> ProcessingRequest {
    Request::ResponseTrailers(HttpTrailers { trailers: header_map(trailers) }).into()
}

/// A header as answers set it: raw bytes, and Envoy's default of overwriting.
fn set(name: &str, value: &str) -> HeaderValueOption {
    let header = HeaderValue {
        key: name.to_owned(),
        value: String::new(),
        raw_value: value.as_bytes().to_vec(),
    };
    HeaderValueOption { header: Some(header), append: None, append_action: 0 }
}

pub fn mutation(headers: &[(&str, &str)]) -> HeaderMutation {
    let set_headers = headers.iter().map(|(name, value)| set(name, value)).collect();
    HeaderMutation { set_headers, remove_headers: Vec::new() }
}

fn answer(response: Response) -> ProcessingResponse {
    let response = Some(response);
    sorted(ProcessingResponse { response, ..ProcessingResponse::default() })
}

/// The answer to the headers of a request that goes to `endpoint`, with these headers beside the
/// destination.
pub fn routed(endpoint: &str, headers: &[(&str, &str)]) -> ProcessingResponse {
    let mut all = vec![(DESTINATION, endpoint)];
    all.extend_from_slice(headers);
    let common = CommonResponse {
        header_mutation: Some(mutation(&all)),
        clear_route_cache: true,
        ..CommonResponse::default()
    };
    let response = Response::RequestHeaders(HeadersResponse { response: Some(common) });
    let metadata = field("envoy.lb", field(DESTINATION, endpoint));
    ProcessingResponse { dynamic_metadata: Some(metadata), ..answer(response) }
}

fn streamed(body: &[u8], end_of_stream: bool) -> BodyResponse {
    let body = HttpBody { body: body.to_vec(), end_of_stream };
    let mutation = BodyMutation { mutation: Some(Mutation::StreamedResponse(body)) };
    let common = CommonResponse { body_mutation: Some(mutation), ..CommonResponse::default() };
    BodyResponse { response: Some(common) }
}

/// A chunk of the request on its way to the endpoint.
pub fn forwarded(body: impl AsRef<[u8]>, end_of_stream: bool) -> ProcessingResponse {
    answer(Response::RequestBody(streamed(body.as_ref(), end_of_stream)))
}

/// A chunk of the answer on its way to the client.
pub fn returned(body: impl AsRef<[u8]>, end_of_stream: bool) -> ProcessingResponse {
    answer(Response::ResponseBody(streamed(body.as_ref(), end_of_stream)))
}

/// The answer to the headers of an answer.
pub fn response_headers_answer(headers: &[(&str, &str)]) -> ProcessingResponse {
    let common =
        CommonResponse { header_mutation: Some(mutation(headers)), ..CommonResponse::default() };
    answer(Response::ResponseHeaders(HeadersResponse { response: Some(common) }))
}

pub fn response_trailers_answer() -> ProcessingResponse {
    answer(Response::ResponseTrailers(TrailersResponse::default()))
}

pub fn request_trailers_answer() -> ProcessingResponse {
    answer(Response::RequestTrailers(TrailersResponse::default()))
}

/// What the client of a refused request gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    pub status: i32,
    pub body: String,
    /// In the order of their names.
    pub headers: Vec<(String, String)>,
}

impl Refusal {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }
}

/// Reads a refusal; anything else fails the test.
pub fn refusal(answer: ProcessingResponse) -> Refusal {
    assert_eq!(answer.dynamic_metadata, None);
    let Some(Response::ImmediateResponse(immediate)) = answer.response else {
        panic!("not a refusal: {answer:?}");
    };
    let headers = immediate.headers.unwrap_or_default();
    assert_eq!(headers.remove_headers, Vec::<String>::new());
    let text = |set: HeaderValueOption| {
        assert_eq!((set.append, set.append_action), (None, 0));
        let header = set.header.unwrap();
        assert_eq!(header.value, "", "values are raw");
        (header.key, String::from_utf8(header.raw_value).unwrap())
    };
    Refusal {
        status: immediate.status.unwrap().code,
        body: String::from_utf8(immediate.body).unwrap(),
        headers: headers.set_headers.into_iter().map(text).collect(),
    }
}

/// The headers that an answer sets, in the order of their names.
pub fn set_headers(answer: &ProcessingResponse) -> Vec<(String, String)> {
    let set = header_mutation(answer).set_headers;
    let text = |set: HeaderValueOption| {
        let header = set.header.unwrap();
        (header.key, String::from_utf8(header.raw_value).unwrap())
    };
    set.into_iter().map(text).collect()
}

/// The headers that an answer removes.
pub fn removed_headers(answer: &ProcessingResponse) -> Vec<String> {
    header_mutation(answer).remove_headers
}

fn header_mutation(answer: &ProcessingResponse) -> HeaderMutation {
    let Some(Response::RequestHeaders(headers) | Response::ResponseHeaders(headers)) =
        &answer.response
    else {
        panic!("not an answer to headers: {answer:?}");
    };
    headers.response.clone().unwrap_or_default().header_mutation.unwrap_or_default()
}

/// The bytes of an answer that is a piece of a body, and whether it is the last. Nothing else may
/// stand in it: in the full duplex mode Envoy takes other mutations for an error.
pub fn piece(answer: ProcessingResponse) -> (Vec<u8>, bool) {
    let Some(Response::RequestBody(body) | Response::ResponseBody(body)) = answer.response else {
        panic!("not a piece of a body: {answer:?}");
    };
    let common = body.response.unwrap();
    let Some(Mutation::StreamedResponse(body)) =
        common.body_mutation.clone().and_then(|mutation| mutation.mutation)
    else {
        panic!("not a streamed body: {common:?}");
    };
    assert_eq!(CommonResponse { body_mutation: None, ..common }, CommonResponse::default());
    (body.body, body.end_of_stream)
}

/// The endpoint that an answer names, in its header and in its metadata alike.
pub fn destination(answer: &ProcessingResponse) -> String {
    let headers = set_headers(answer);
    let named: Vec<&String> =
        headers.iter().filter(|(name, _)| name == DESTINATION).map(|(_, value)| value).collect();
    assert_eq!(named.len(), 1, "{headers:?}");
    let metadata = answer.dynamic_metadata.clone().unwrap_or_default();
    let Some(Kind::Struct(lb)) = metadata.fields.get("envoy.lb").and_then(|v| v.kind.clone())
    else {
        panic!("no metadata: {answer:?}");
    };
    assert_eq!(lb.fields.get(DESTINATION), Some(&named[0].as_str().into()));
    named[0].clone()
}
