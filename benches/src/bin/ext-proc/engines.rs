//! Engines as far as an Endpoint Picker sees them: their metrics and their list of models.
//!
//! The pages are those of a simulated vLLM server, copied once: what they cost here must not
//! disturb what is measured.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use kvroute_lab::engine::{self, EngineConfig};
use kvroute_lab::model::Profile;
use kvroute_tokens::Tokenizer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The model that is asked for.
pub const MODEL: &str = "bench";

/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 4 << 10;

/// Whole answers, heads included.
struct Pages {
    metrics: Vec<u8>,
    models: Vec<u8>,
}

/// Starts `count` engines on this runtime; they run as long as it does.
pub async fn start(count: u32, tokenizer: Tokenizer) -> anyhow::Result<Vec<SocketAddr>> {
    let pages = Arc::new(pages(tokenizer).await?);
    let mut addresses = Vec::new();
    for _ in 0..count {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        addresses.push(listener.local_addr()?);
        let pages = Arc::clone(&pages);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&pages)));
            }
        });
    }
    Ok(addresses)
}

async fn pages(tokenizer: Tokenizer) -> anyhow::Result<Pages> {
    let profile = Profile {
        name: "bench".to_owned(),
        step_base_s: 0.01,
        step_per_seq_s: 0.0,
        step_per_context_token_s: 0.0,
        step_per_unique_token_s: 0.0,
        prefill_per_token_s: 0.0,
        prefill_attention_s: 0.0,
    };
    let engine = engine::serve(EngineConfig::loopback(MODEL, tokenizer, profile)).await?;
    let address = engine.http_addr();
    let (metrics, models) =
        (fetch(address, "/metrics").await?, fetch(address, "/v1/models").await?);
    Ok(Pages { metrics: answer("200 OK", &metrics), models: answer("200 OK", &models) })
}

fn answer(status: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ndate: Sun, 22 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n\
         content-length: {length}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n\
         \r\n{body}"
    )
    .into_bytes()
}

async fn fetch(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    // Not 1.1, so that the body comes as it is.
    let ask = format!("GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n");
    stream.write_all(ask.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) =
        text.split_once("\r\n\r\n").context("an answer without an end of its head")?;
    anyhow::ensure!(head.contains(" 200 "), "{path}: {head}");
    Ok(body.to_owned())
}

async fn serve(mut stream: TcpStream, pages: Arc<Pages>) -> Option<()> {
    let missing = answer("404 Not Found", "");
    let mut head = Vec::with_capacity(HEAD_BYTES_MAX);
    stream.set_nodelay(true).ok()?;
    loop {
        let read = stream.read_buf(&mut head).await.ok()?;
        if read == 0 || head.len() > HEAD_BYTES_MAX {
            return None;
        }
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let page = match () {
            () if head.starts_with(b"GET /metrics ") => &pages.metrics,
            () if head.starts_with(b"GET /v1/models ") => &pages.models,
            () => &missing,
        };
        stream.write_all(page).await.ok()?;
        head.clear();
    }
}
