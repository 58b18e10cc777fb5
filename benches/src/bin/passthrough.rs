//! The floor: a reverse proxy that does nothing but round robin, on plain hyper.
//!
//! usage: passthrough LISTEN_ADDR UPSTREAM_ADDR...

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Uri};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

struct Proxy {
    client: Client<HttpConnector, Incoming>,
    upstreams: Vec<String>,
    next: AtomicUsize,
}

impl Proxy {
    fn aim(&self, request: &mut Request<Incoming>) -> anyhow::Result<()> {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % self.upstreams.len();
        let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
        *request.uri_mut() = Uri::try_from(format!("http://{}{path}", self.upstreams[at]))?;
        request.headers_mut().remove(http::header::HOST);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let listen: SocketAddr = args.next().unwrap_or_default().parse()?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let proxy = Arc::new(Proxy {
        client: Client::builder(TokioExecutor::new()).build(connector),
        upstreams: args.collect(),
        next: AtomicUsize::new(0),
    });
    anyhow::ensure!(!proxy.upstreams.is_empty(), "usage: passthrough LISTEN_ADDR UPSTREAM_ADDR...");
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let proxy = proxy.clone();
        tokio::spawn(async move {
            let service = service_fn(|mut request: Request<Incoming>| {
                let proxy = proxy.clone();
                async move {
                    proxy.aim(&mut request)?;
                    anyhow::Ok(proxy.client.request(request).await?)
                }
            });
            let http = hyper::server::conn::http1::Builder::new();
            // A connection's end, good or bad, is the client's business.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
