//! How do clients reach the router? One listener for HTTP/1.1 and HTTP/2, with TLS if wanted.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use http::{Request, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use kvroute_core::settings::{Settings, ms};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::accept::Failure;
use crate::error::HEAD_TOO_LARGE;
use crate::patient::Patient;
use crate::route;
use crate::shared::{Phase, Shared};

/// Streams of one HTTP/2 connection at once.
const HTTP2_STREAMS_MAX: u32 = 1_000;
/// A connection without a request is closed after this, or up to as much later. Longer than the
/// pools of common clients keep theirs, so that it is not closed just as the next request is sent.
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
    let presence = Presence::default();
    let service = service_fn(|request: Request<Incoming>| {
        let (shared, request_lives) = (Arc::clone(shared), presence.asked(request.version()));
        async move {
            let response = route::serve(shared, request, client).await;
            Ok::<_, Infallible>(response.map(|body| body.holding(request_lives)))
        }
    });
    let server = server(&shared.settings);
    let silence_s = shared.settings.response_idle_timeout_s.max(1);
    let stream = Patient::new(stream, Duration::from_secs(u64::from(silence_s)));
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
    let patience = ms(shared.settings.client_header_timeout_ms.max(1));
    let mut look_due = pin!(tokio::time::sleep(patience));
    let mut looks = Looks::default();
    let mut is_watched = true;
    loop {
        let draining = *phase.borrow_and_update();
        match draining {
            Phase::Serving => {}
            Phase::Draining | Phase::Closing => connection.as_mut().graceful_shutdown(),
            Phase::Stopped => return Ok(()),
        }
        tokio::select! {
            biased;
            ended = connection.as_mut() => return ended,
            changed = phase.changed() => changed?,
            // The first head has a limit of its own. Later a client that dawdles costs no more than
            // one that is idle, and a timer of hyper's would be set again for each request.
            () = look_due.as_mut(), if is_watched => {
                let asked = presence.requests.load(Ordering::Relaxed);
                match looks.next(asked, presence.is_busy()) {
                    Look::Stay => {}
                    // What was answered may still be on its way.
                    Look::End => connection.as_mut().graceful_shutdown(),
                    Look::Cut => return Ok(()),
                }
                // HTTP/2 asks its clients whether they are there.
                is_watched = !presence.is_http2.load(Ordering::Relaxed);
                look_due.as_mut().reset(Instant::now() + CLIENT_IDLE.max(patience));
            }
        }
    }
}

/// What a look at a connection now and then finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Stay,
    /// It has been idle since the last look.
    End,
    /// It never asked anything, or would not end.
    Cut,
}

#[derive(Default)]
struct Looks {
    /// Requests at the last look, if none was being answered.
    idle_at: Option<u64>,
    last: u32,
}

impl Looks {
    fn next(&mut self, asked: u64, is_busy: bool) -> Look {
        let idle_at = (!is_busy).then_some(asked);
        let was_idle = idle_at.is_some() && idle_at == self.idle_at;
        self.idle_at = idle_at;
        match self.last {
            _ if asked == 0 => Look::Cut,
            1.. if was_idle => Look::Cut,
            _ if was_idle => {
                self.last += 1;
                Look::End
            }
            _ => Look::Stay,
        }
    }
}

/// What is known of a connection's use.
#[derive(Default)]
struct Presence {
    requests: AtomicU64,
    is_http2: AtomicBool,
    /// Every request that is not answered to its end holds one more.
    lives: Arc<()>,
}

impl Presence {
    /// A request has come; what it must hold until its answer is complete.
    fn asked(&self, version: Version) -> Arc<()> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if version == Version::HTTP_2 {
            self.is_http2.store(true, Ordering::Relaxed);
        }
        Arc::clone(&self.lives)
    }

    fn is_busy(&self) -> bool {
        Arc::strong_count(&self.lives) > 1
    }
}

/// hyper with all limits set. It answers 431 to more than 100 header lines, its default: another
/// number would cost it two pieces of memory for each head.
fn server(settings: &Settings) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    let header_bytes = settings.header_bytes_max.max(1 << 10);
    server
        .http1()
        .header_read_timeout(None)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_connection_that_was_idle_for_a_whole_look_ends() {
        let ask = |looks: &mut Looks, steps: &[(u64, bool)]| -> Vec<Look> {
            steps.iter().map(|&(asked, is_busy)| looks.next(asked, is_busy)).collect()
        };
        use Look::{Cut, End, Stay};
        assert_eq!(ask(&mut Looks::default(), &[(0, false)]), [Cut], "it never asked");
        // The long answer ended just before the second look.
        let steps = [(1, true), (1, false), (1, false), (1, false)];
        assert_eq!(ask(&mut Looks::default(), &steps), [Stay, Stay, End, Cut]);
        let steps = [(1, false), (2, false), (2, true), (2, false), (3, false), (3, false)];
        assert_eq!(ask(&mut Looks::default(), &steps), [Stay, Stay, Stay, Stay, Stay, End]);
    }
}
