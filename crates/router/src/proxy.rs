//! How do clients reach the router? One listener for HTTP/1.1 and HTTP/2, with TLS if wanted.

use std::convert::Infallible;
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
use tokio::sync::watch;

use crate::accept::Failure;
use crate::error::HEAD_TOO_LARGE;
use crate::patient::Patient;
use crate::route;
use crate::shared::{Phase, Shared};

/// Streams of one HTTP/2 connection at once.
const HTTP2_STREAMS_MAX: u32 = 1_000;
/// A connection without a request is closed after this. Longer than the pools of common clients
/// keep theirs, so that it is not closed just as the next request is sent.
const CLIENT_IDLE: Duration = Duration::from_secs(90);
/// hyper's smallest read buffer.
const HYPER_BUFFER_BYTES_MIN: usize = 8 << 10;

/// Heads that hyper cannot read are answered by hyper (400, 414 or 431) and never get to a route.
pub(crate) fn count_unread(
    shared: &Shared,
    error: &(dyn std::error::Error + Send + Sync + 'static),
) {
    let Some(error) = error.downcast_ref::<hyper::Error>() else { return };
    if error.is_parse_too_large() {
        shared.metrics.count_reject(HEAD_TOO_LARGE);
    } else if error.is_parse() {
        shared.metrics.count_reject("bad_request_head");
    }
}

/// Speaks HTTP with one client until it or the router has enough.
pub(crate) async fn converse<S>(
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
            Phase::Draining | Phase::Closing => connection.as_mut().graceful_shutdown(),
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

/// hyper with all limits set. It answers 431 to more than 100 header lines, its default: another
/// number would cost it two pieces of memory for each head.
fn server(settings: &Settings) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    let header_bytes = settings.header_bytes_max.max(1 << 10);
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(CLIENT_IDLE.max(ms(settings.client_header_timeout_ms)))
        // Twice the limit, so that the router itself can refuse what is slightly too large.
        .max_buf_size((2 * header_bytes).max(HYPER_BUFFER_BYTES_MIN));
    server
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(2 * header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    server
}
