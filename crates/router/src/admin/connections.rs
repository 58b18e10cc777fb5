//! Who is connected to a listener for people or monitors? HTTP/1.1, few at once, over TLS or not.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::Answer;
use crate::tls::Acceptor;

/// Connections at once.
const CONNECTIONS_MAX: usize = 64;
/// Patience with a TLS handshake, and with a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers until its task is aborted.
pub(super) async fn serve<F, A>(listener: TcpListener, acceptor: Acceptor, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "A connection for metrics or administration was not accepted.");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (acceptor, answer) = (acceptor.clone(), answer.clone());
        tokio::spawn(async move {
            handshake(stream, acceptor, answer).await;
            drop(permit);
        });
    }
}

async fn handshake<F, A>(stream: TcpStream, acceptor: Acceptor, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    match acceptor {
        Acceptor::Plain => converse(stream, answer).await,
        #[cfg(feature = "tls")]
        Acceptor::Tls(acceptor) => {
            match tokio::time::timeout(HEADER_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => converse(stream, answer).await,
                Ok(Err(error)) => debug!(%error, "A TLS handshake failed."),
                Err(_) => debug!("A TLS handshake took too long."),
            }
        }
    }
}

async fn converse<S, F, A>(stream: S, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn(Request<Incoming>) -> A + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(|request| {
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
        debug!(%error, "A connection for metrics or administration broke.");
    }
}
