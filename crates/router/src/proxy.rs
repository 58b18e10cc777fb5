//! How do clients reach the router? One listener for HTTP/1.1 and HTTP/2, with TLS if wanted.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use kvroute_core::settings::{Settings, ms};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tracing::{debug, warn};

use crate::error::HEAD_TOO_LARGE;
use crate::patient::Patient;
use crate::route;
use crate::shared::{Phase, Shared};
use crate::tls::Acceptor;

/// Streams of one HTTP/2 connection at once.
const HTTP2_STREAMS_MAX: u32 = 1_000;
/// Header lines of a request; hyper answers 431 to more.
const HEADERS_MAX: usize = 128;
/// A connection without a request is closed after this. Longer than the pools of common clients
/// keep theirs, so that it is not closed just as the next request is sent.
const CLIENT_IDLE: Duration = Duration::from_secs(90);
/// hyper's smallest read buffer.
const HYPER_BUFFER_BYTES_MIN: usize = 8 << 10;

/// Accepts clients until draining begins, then waits for those that are left. Returns when the
/// last connection has ended.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    acceptor: Acceptor,
    mut phase: watch::Receiver<Phase>,
) {
    let connections = Arc::new(Semaphore::new(shared.settings.connections_max as usize));
    // Every connection holds a sender: the channel ends with the last of them.
    let (alive, mut all_gone) = mpsc::channel::<()>(1);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &connections) => accepted,
            _ = phase.wait_for(|phase| *phase != Phase::Serving) => break,
        };
        let (stream, client, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: give connections time to end.
                warn!(%error, "A client's connection could not be accepted.");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (shared, acceptor) = (Arc::clone(&shared), acceptor.clone());
        let (phase, alive) = (phase.clone(), alive.clone());
        tokio::spawn(async move {
            shared.metrics.connections.inc();
            if let Err(error) = connection(&shared, stream, client, acceptor, phase).await {
                count_unread(&shared, error.as_ref());
                debug!(%client, error = %error, "A client's connection broke.");
            }
            shared.metrics.connections.dec();
            drop((permit, alive));
        });
    }
    drop((listener, alive));
    let _ = all_gone.recv().await;
}

/// Heads that hyper cannot read are answered by hyper (400, 414 or 431) and never get to a route.
fn count_unread(shared: &Shared, error: &(dyn std::error::Error + Send + Sync + 'static)) {
    let Some(error) = error.downcast_ref::<hyper::Error>() else { return };
    if error.is_parse_too_large() {
        shared.metrics.count_reject(HEAD_TOO_LARGE);
    } else if error.is_parse() {
        shared.metrics.count_reject("bad_request_head");
    }
}

/// The next connection, once there is room for it. Those that must wait stay in the kernel's
/// backlog.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(room).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, client) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, client, permit))
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn connection(
    shared: &Arc<Shared>,
    stream: TcpStream,
    client: SocketAddr,
    acceptor: Acceptor,
    phase: watch::Receiver<Phase>,
) -> Result<(), Failure> {
    let patience = ms(shared.settings.client_header_timeout_ms.max(1));
    // The protocol is told by the first bytes, and no timer of hyper's runs before them.
    let first = tokio::time::timeout(patience, stream.peek(&mut [0; 1])).await;
    match first {
        Ok(Ok(0)) | Err(_) => return Ok(()),
        Ok(read) => read?,
    };
    match acceptor {
        Acceptor::Plain => converse(shared, stream, client, phase).await,
        #[cfg(feature = "tls")]
        Acceptor::Tls(acceptor) => {
            let stream = tokio::time::timeout(patience, acceptor.accept(stream)).await??;
            converse(shared, stream, client, phase).await
        }
    }
}

async fn converse<S>(
    shared: &Arc<Shared>,
    stream: S,
    client: SocketAddr,
    mut phase: watch::Receiver<Phase>,
) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        let shared = Arc::clone(shared);
        async move { Ok::<_, Infallible>(route::serve(shared, request, client).await) }
    });
    let server = server(&shared.settings);
    let silence_s = shared.settings.response_idle_timeout_s.max(1);
    let stream = Patient::new(stream, Duration::from_secs(u64::from(silence_s)));
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
    let patience = ms(shared.settings.client_header_timeout_ms.max(1));
    let mut head_due = pin!(tokio::time::sleep(patience));
    let mut waiting = true;
    loop {
        let draining = *phase.borrow_and_update();
        match draining {
            Phase::Serving => {}
            Phase::Draining => connection.as_mut().graceful_shutdown(),
            Phase::Stopped => return Ok(()),
        }
        tokio::select! {
            ended = connection.as_mut() => return ended,
            changed = phase.changed() => changed?,
            // hyper has one timer for a head and for an idle connection; the first head has this
            // one, and a client that dawdles later costs no more than one that is idle.
            () = head_due.as_mut(), if waiting => {
                waiting = false;
                if !asked.load(Ordering::Relaxed) {
                    return Ok(());
                }
            }
        }
    }
}

/// hyper with all limits set.
fn server(settings: &Settings) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    let header_bytes = settings.header_bytes_max.max(1 << 10);
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(CLIENT_IDLE.max(ms(settings.client_header_timeout_ms)))
        // Twice the limit, so that the router itself can refuse what is slightly too large.
        .max_buf_size((2 * header_bytes).max(HYPER_BUFFER_BYTES_MIN))
        .max_headers(HEADERS_MAX);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(2 * header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    server
}
