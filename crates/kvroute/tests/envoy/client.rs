//! A client that chooses how its requests look on the wire.

use std::io;
use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, Version};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::support::PATIENCE;
use crate::upstream::{AnyBody, Piped, whole};

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

enum Sender {
    One(http1::SendRequest<AnyBody>),
    Two(http2::SendRequest<AnyBody>),
}

/// A connection; several requests may be under way over HTTP/2.
pub struct Client {
    sender: Sender,
    driver: tokio::task::JoinHandle<()>,
}

/// Dropping it drops the connection.
impl Drop for Client {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    pub async fn connect(addr: SocketAddr, version: Version) -> Client {
        let stream = TcpStream::connect(addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let stream = TokioIo::new(stream);
        // How a connection ends is seen by its requests.
        if version == Version::HTTP_2 {
            let (sender, driver) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            let driver = tokio::spawn(async { drop(driver.await) });
            return Client { sender: Sender::Two(sender), driver };
        }
        let (sender, driver) = http1::handshake(stream).await.unwrap();
        let driver = tokio::spawn(async { drop(driver.await) });
        Client { sender: Sender::One(sender), driver }
    }

    /// The answer's head.
    pub async fn start(&mut self, request: Request<AnyBody>) -> hyper::Result<Response<Incoming>> {
        let (mut parts, body) = request.into_parts();
        let answered = match &mut self.sender {
            Sender::One(sender) => {
                sender.ready().await?;
                sender.send_request(Request::from_parts(parts, body))
            }
            Sender::Two(sender) => {
                sender.ready().await?;
                parts.uri = format!("http://gateway.test{}", parts.uri).parse().unwrap();
                parts.version = Version::HTTP_2;
                let request = Request::from_parts(parts, body);
                let answered = sender.send_request(request);
                return timely(answered).await;
            }
        };
        timely(answered).await
    }

    /// The whole answer; an error when it breaks off.
    pub async fn send(&mut self, request: Request<AnyBody>) -> hyper::Result<Reply> {
        let (parts, mut body) = self.start(request).await?.into_parts();
        let mut all = BytesMut::new();
        while let Some(piece) = next(&mut body).await? {
            all.extend_from_slice(&piece);
        }
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body: all.freeze() })
    }
}

async fn timely<T>(waited: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, waited).await.expect("an answer in time")
}

/// The next piece of an answer's body.
pub async fn next(body: &mut Incoming) -> hyper::Result<Option<Bytes>> {
    while let Some(frame) = timely(body.frame()).await {
        if let Ok(data) = frame?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// One exchange on a connection of its own over HTTP/1.1.
pub async fn send(addr: SocketAddr, request: Request<AnyBody>) -> Reply {
    send_by(addr, Version::HTTP_11, request).await
}

pub async fn send_by(addr: SocketAddr, version: Version, request: Request<AnyBody>) -> Reply {
    Client::connect(addr, version).await.send(request).await.expect("a whole answer")
}

pub fn post(path: &str, body: AnyBody, headers: &[(&str, &str)]) -> Request<AnyBody> {
    let mut request = Request::post(path).header("host", "gateway.test");
    request = request.header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body).unwrap()
}

pub fn get(path: &str, headers: &[(&str, &str)]) -> Request<AnyBody> {
    let mut request = Request::get(path).header("host", "gateway.test");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(whole("")).unwrap()
}

/// A body of these pieces, whose length the head does not tell.
pub fn chunked(pieces: Vec<Bytes>) -> AnyBody {
    let (sender, body) = open();
    tokio::spawn(async move {
        for piece in pieces {
            if sender.send(Ok(Frame::data(piece))).await.is_err() {
                return;
            }
        }
    });
    body
}

pub type Pieces = mpsc::Sender<Result<Frame<Bytes>, io::Error>>;

/// A body that ends when the sender is dropped.
pub fn open() -> (Pieces, AnyBody) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, Piped(receiver).boxed())
}

/// A completion of the test model for this prompt.
pub fn completion(prompt: &str) -> AnyBody {
    whole(completion_text(prompt))
}

pub fn completion_text(prompt: &str) -> String {
    serde_json::json!({"model": crate::support::MODEL, "prompt": prompt, "max_tokens": 4})
        .to_string()
}
