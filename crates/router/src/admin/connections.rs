//! Who is connected to a listener for people or monitors? HTTP/1.1, few at once, over TLS or not.

use std::convert::Infallible;
use std::pin::pin;
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
use crate::patient::Patient;
use crate::tls::Acceptor;

/// What one listener allows.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// At once.
    connections_max: usize,
    /// Patience with a TLS handshake, with a request's head, and with a client that does not read.
    silence: Duration,
    /// Of a connection. Whoever reads a byte now and then does not keep it longer; an answer that
    /// is being sent then has `silence` to come to its end.
    total: Duration,
}

const LIMITS: Limits = Limits {
    connections_max: 64,
    silence: Duration::from_secs(10),
    total: Duration::from_secs(300),
};

/// Answers until its task is aborted.
pub(super) async fn serve<F, A>(listener: TcpListener, acceptor: Acceptor, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    serve_within(LIMITS, listener, acceptor, answer).await;
}

async fn serve_within<F, A>(limits: Limits, listener: TcpListener, acceptor: Acceptor, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(limits.connections_max));
    let mut told = false;
    loop {
        if room.available_permits() == 0 && !std::mem::replace(&mut told, true) {
            let connections_max = limits.connections_max;
            warn!(
                connections_max,
                "Nobody else can ask for metrics or health until a connection ends: look who has \
                 them all."
            );
        }
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
            handshake(limits, stream, acceptor, answer).await;
            drop(permit);
        });
    }
}

async fn handshake<F, A>(limits: Limits, stream: TcpStream, acceptor: Acceptor, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    match acceptor {
        Acceptor::Plain => converse(limits, stream, answer).await,
        #[cfg(feature = "tls")]
        Acceptor::Tls(acceptor) => {
            // A failure is told where hands are shaken.
            if let Ok(stream) = acceptor.accept(stream, limits.silence).await {
                converse(limits, stream, answer).await;
            }
        }
    }
}

async fn converse<S, F, A>(limits: Limits, stream: S, answer: F)
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
    server.timer(TokioTimer::new()).header_read_timeout(limits.silence);
    let stream = TokioIo::new(Patient::new(stream, limits.silence));
    let mut connection = pin!(server.serve_connection(stream, service));
    let ended = match tokio::time::timeout(limits.total, connection.as_mut()).await {
        Ok(ended) => Ok(ended),
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(limits.silence, connection).await
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "A connection for metrics or administration broke."),
        Err(_) => debug!("A connection for metrics or administration took too long."),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::Response;
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const ASK: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

    /// Long enough for the slowest machine.
    const LONG: Duration = Duration::from_secs(60);

    /// A listener whose answers are larger than what sockets hold.
    async fn listen(limits: Limits) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let body = Bytes::from(vec![b'x'; 32 << 20]);
        let answer = move |_| std::future::ready(Response::new(Full::new(body.clone())));
        tokio::spawn(serve_within(limits, listener, Acceptor::Plain, answer));
        address
    }

    async fn ask(address: std::net::SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(ASK).await.unwrap();
        stream
    }

    async fn is_answered(mut stream: TcpStream) {
        let mut start = [0; 15];
        let read = tokio::time::timeout(LONG, stream.read_exact(&mut start)).await;
        read.expect("there is room in time").unwrap();
        assert_eq!(&start, b"HTTP/1.1 200 OK");
    }

    #[tokio::test]
    async fn those_who_do_not_read_give_way() {
        let silence = Duration::from_millis(100);
        let address = listen(Limits { connections_max: 4, silence, total: LONG }).await;
        let mut silent = Vec::new();
        for _ in 0..4 {
            silent.push(ask(address).await);
        }
        is_answered(ask(address).await).await;
    }

    #[tokio::test]
    async fn those_who_read_a_little_give_way() {
        let (silence, total) = (Duration::from_secs(1), Duration::from_millis(200));
        let address = listen(Limits { connections_max: 1, silence, total }).await;
        let mut slow = ask(address).await;
        let reading = tokio::spawn(async move {
            let mut piece = [0; 1024];
            while slow.read(&mut piece).await.is_ok_and(|read| read > 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        is_answered(ask(address).await).await;
        reading.abort();
    }
}
