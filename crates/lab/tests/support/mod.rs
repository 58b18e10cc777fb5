//! Small clients for the server tests: HTTP, and the client half of ZMTP 3.
#![allow(dead_code, clippy::unwrap_used, reason = "test helpers; each binary uses its part")]

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvroute_core::event::EventBatch;
use kvroute_lab::engine::{EngineConfig, EngineHandle, serve};
use kvroute_lab::model::Profile;
use kvroute_wire::kv_event;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub type Http = Client<HttpConnector, Full<Bytes>>;

pub fn http() -> Http {
    Client::builder(TokioExecutor::new()).build_http()
}

pub async fn engine(change: impl FnOnce(&mut EngineConfig)) -> EngineHandle {
    let profile = Profile::built_in("tiny").unwrap();
    let mut config = EngineConfig::loopback("base", kvroute_tokens::Tokenizer::demo(), profile);
    config.speed = 20.0;
    config.topic = "kv@127.0.0.1:8000@base".to_owned();
    change(&mut config);
    serve(config).await.unwrap()
}

pub struct Answer {
    pub status: u16,
    pub kind: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The events of a stream, `[DONE]` left out but required.
    pub fn events(&self) -> Vec<Value> {
        assert!(self.kind.starts_with("text/event-stream"), "{}", self.kind);
        let mut data: Vec<&str> = self
            .body
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").unwrap())
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

pub async fn call(address: SocketAddr, method: &str, path: &str, body: &str) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{address}{path}"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap();
    let response = http().request(request).await.unwrap();
    let status = response.status().as_u16();
    let kind = response.headers().get("content-type");
    let kind = kind.map(|kind| kind.to_str().unwrap().to_owned()).unwrap_or_default();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer { status, kind, body: String::from_utf8(body.to_vec()).unwrap() }
}

pub async fn post(address: SocketAddr, path: &str, body: Value) -> Answer {
    call(address, "POST", path, &body.to_string()).await
}

pub async fn get(address: SocketAddr, path: &str) -> Answer {
    call(address, "GET", path, "").await
}

/// The value of a sample of `/metrics`.
pub async fn metric(address: SocketAddr, start: &str) -> f64 {
    let page = get(address, "/metrics").await.body;
    let line =
        page.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// A SUB or DEALER socket.
pub struct Zmtp {
    stream: TcpStream,
}

impl Zmtp {
    pub async fn connect(address: SocketAddr, kind: &str) -> Zmtp {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut greeting = [0u8; 64];
        (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, 1);
        greeting[12..16].copy_from_slice(b"NULL");
        stream.write_all(&greeting).await.unwrap();
        let mut ready = b"\x05READY\x0bSocket-Type\0\0\0".to_vec();
        ready.push(kind.len() as u8);
        ready.extend_from_slice(kind.as_bytes());
        let mut zmtp = Zmtp { stream };
        zmtp.send(4, &ready).await;
        let mut theirs = [0u8; 64];
        zmtp.stream.read_exact(&mut theirs).await.unwrap();
        let (flags, body) = zmtp.frame().await.unwrap();
        assert!(flags == 4 && body.starts_with(b"\x05READY"));
        zmtp
    }

    pub async fn subscriber(engine: &EngineHandle) -> Zmtp {
        let mut zmtp = Zmtp::connect(engine.events_addr().unwrap(), "SUB").await;
        let before = *engine.subscribers().borrow();
        zmtp.send(4, b"\x09SUBSCRIBE").await;
        engine.subscribers().wait_for(|count| *count > before).await.unwrap();
        zmtp
    }

    pub async fn send(&mut self, flags: u8, body: &[u8]) {
        let mut frame = vec![flags, u8::try_from(body.len()).unwrap()];
        frame.extend_from_slice(body);
        self.stream.write_all(&frame).await.unwrap();
    }

    pub async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let flags = self.stream.read_u8().await.ok()?;
        let length = match flags & 2 {
            0 => u64::from(self.stream.read_u8().await.ok()?),
            _ => self.stream.read_u64().await.ok()?,
        };
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).await.ok()?;
        Some((flags, body))
    }

    /// The next message; `None` when the peer has gone.
    pub async fn message(&mut self) -> Option<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let (flags, body) = self.frame().await?;
            frames.push(body);
            if flags & 1 == 0 {
                return Some(frames);
            }
        }
    }

    /// The next event batch and its sequence number.
    pub async fn batch(&mut self) -> (u64, EventBatch) {
        let frames = self.message().await.expect("the publisher is there");
        let [_, sequence, payload] = &frames[..] else { panic!("{} frames", frames.len()) };
        let sequence = u64::from_be_bytes(sequence[..].try_into().unwrap());
        (sequence, kv_event::decode_batch(payload).unwrap())
    }

    /// Asks a replay socket and gives all messages up to the end marker, that included.
    pub async fn replay(address: SocketAddr, start: u64) -> Vec<Vec<Vec<u8>>> {
        let mut zmtp = Zmtp::connect(address, "DEALER").await;
        zmtp.send(1, b"").await;
        zmtp.send(0, &start.to_be_bytes()).await;
        let mut messages = Vec::new();
        loop {
            let message = zmtp.message().await.expect("the replay socket answers");
            let end = message[2] == [0xff; 8];
            messages.push(message);
            if end {
                return messages;
            }
        }
    }
}
