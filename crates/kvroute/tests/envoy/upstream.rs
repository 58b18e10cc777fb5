//! A model server that gives back what it got, and misbehaves when a request asks for it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

/// What a request wants to see, in a header.
pub const WISH: &str = "x-wish";
/// The whole request is read, and never answered.
pub const SILENCE: &str = "silence";
/// [`EVENTS`] server-sent events, each when the test allows it; see [`Upstream::allow`].
pub const STREAM: &str = "stream";
/// One event, and when the second is allowed the connection breaks.
pub const BREAK: &str = "break";
/// The body comes back, and [`TRAILER`] after it.
pub const TRAILERS: &str = "trailers";
/// Name of a trailer.
pub const TRAILER: &str = "x-checksum";
/// Events of a stream, the last of which is `[DONE]`.
pub const EVENTS: usize = 5;
/// Who answered.
pub const SERVED_BY: &str = "x-served-by";

const METRICS: &str = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n\
    vllm:kv_cache_usage_perc 0.1\n";

/// Frames that somebody else sends.
pub struct Piped(pub mpsc::Receiver<Result<Frame<Bytes>, io::Error>>);

impl Body for Piped {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.0.poll_recv(context)
    }
}

pub type AnyBody = BoxBody<Bytes, io::Error>;

pub fn whole(bytes: impl Into<Bytes>) -> AnyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: Method,
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

struct State {
    addr: SocketAddr,
    seen: Mutex<Vec<Seen>>,
    allowed: Semaphore,
    /// Answers that nobody waits for any more.
    abandoned: AtomicUsize,
}

pub struct Upstream {
    pub addr: SocketAddr,
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Upstream {
    pub async fn start() -> Upstream {
        Upstream::start_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_at(addr: SocketAddr) -> Upstream {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (seen, abandoned) = (Mutex::default(), AtomicUsize::new(0));
        let state = Arc::new(State { addr, seen, allowed: Semaphore::new(0), abandoned });
        let task = tokio::spawn(accept(listener, Arc::clone(&state)));
        Upstream { addr, state, task }
    }

    /// Requests of clients; what the router asks for itself is left out.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Whatever was seen is not worth mentioning.
    pub fn forget(&self) {
        self.state.seen.lock().unwrap().clear();
    }

    /// Lets streams send that many more events, all streams together.
    pub fn allow(&self, events: usize) {
        self.state.allowed.add_permits(events);
    }

    pub fn abandoned(&self) -> usize {
        self.state.abandoned.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).unwrap();
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&state), request));
            let builder = auto::Builder::new(TokioExecutor::new());
            // A client that goes is part of the tests.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// Counts a wait that ends before its answer.
struct Waiting(Arc<State>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.abandoned.fetch_add(1, Ordering::SeqCst);
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> io::Result<Response<AnyBody>> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    if parts.uri.path() == "/metrics" {
        return Ok(Response::new(whole(METRICS)));
    }
    // Only what a client sends carries an id.
    if !parts.headers.contains_key("x-request-id") {
        return Ok(Response::builder().status(404).body(whole("")).unwrap());
    }
    let wish = parts.headers.get(WISH).map(|wish| wish.to_str().unwrap().to_owned());
    let target = parts.uri.path_and_query().unwrap().to_string();
    let content_type = parts.headers.get(http::header::CONTENT_TYPE).cloned();
    let (method, headers) = (parts.method, parts.headers);
    state.seen.lock().unwrap().push(Seen { method, target, headers, body: body.clone() });
    let response = Response::builder().header(SERVED_BY, state.addr.to_string());
    match wish.as_deref() {
        None => {
            let typed = content_type.map(|value| (http::header::CONTENT_TYPE, value));
            let mut response = response.body(whole(body)).unwrap();
            response.headers_mut().extend(typed);
            Ok(response)
        }
        Some(SILENCE) => {
            let _waiting = Waiting(state);
            std::future::pending().await
        }
        Some(TRAILERS) => {
            let (sender, receiver) = mpsc::channel(2);
            let trailers = HeaderMap::from_iter([(TRAILER.parse().unwrap(), "1".parse().unwrap())]);
            sender.try_send(Ok(Frame::data(body))).unwrap();
            sender.try_send(Ok(Frame::trailers(trailers))).unwrap();
            Ok(response.body(Piped(receiver).boxed()).unwrap())
        }
        Some(wish) => {
            let (sender, receiver) = mpsc::channel(1);
            tokio::spawn(stream(state, sender, wish == BREAK));
            let response = response.header(http::header::CONTENT_TYPE, "text/event-stream");
            Ok(response.body(Piped(receiver).boxed()).unwrap())
        }
    }
}

/// The text of one event of a stream.
pub fn event(number: usize) -> String {
    if number + 1 == EVENTS {
        return "data: [DONE]\n\n".to_owned();
    }
    format!("data: {{\"choices\":[{{\"text\":\"token {number}\"}}]}}\n\n")
}

async fn stream(
    state: Arc<State>,
    sender: mpsc::Sender<Result<Frame<Bytes>, io::Error>>,
    breaks: bool,
) {
    let waiting = Waiting(Arc::clone(&state));
    for number in 0..EVENTS {
        tokio::select! {
            permit = state.allowed.acquire() => permit.unwrap().forget(),
            () = sender.closed() => return,
        }
        if breaks && number == 1 {
            let _ = sender.send(Err(io::Error::other("broken on purpose"))).await;
            return;
        }
        if sender.send(Ok(Frame::data(event(number).into()))).await.is_err() {
            return;
        }
    }
    std::mem::forget(waiting);
}
