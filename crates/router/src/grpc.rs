//! How is gRPC served? Over HTTP/2 alone, with a limit and a deadline for everything that a caller
//! could hold on to: connections, streams, messages, windows that it never opens.
//!
//! `h2` is used directly, so that a stream whose caller does not read can be reset, which an HTTP
//! server above it would wait for.

use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use h2::server::SendResponse;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use kvroute_core::settings::ms;
use kvroute_wire::error_body::grpc_message;
use kvroute_wire::grpc::{Code, FrameError, MessageReader};
use kvroute_wire::{ext_proc, grpc_health};
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tracing::debug;

use crate::accept::Failure;
use crate::extproc::{self, Options};
use crate::health;
use crate::patient::Patient;
use crate::shared::{Phase, Shared};

/// What a caller may send of a stream, and of all streams of a connection, before it is read.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Bytes of one stream that wait for the socket.
const SEND_BUFFER_BYTES_MAX: usize = 1 << 20;
/// A caller is asked for a sign of life this often, and has so long for it.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest frame that is read: two pieces of a body as Envoy cuts them.
const FRAME_BYTES_MAX: u32 = 64 << 10;
/// Streams of a connection that asks for nothing but health.
const HEALTH_STREAMS_MAX: u32 = 100;
/// How long calls have to notice that their connection is over.
const FAREWELL: Duration = Duration::from_secs(1);

const GRPC_STATUS: &str = "grpc-status";
const GRPC_MESSAGE: &str = "grpc-message";

/// The methods of one listener; gRPC health is among them.
#[derive(Clone)]
pub(crate) struct Methods {
    /// Envoy's external processor; `None`: not here.
    pub ext_proc: Option<Arc<Options>>,
}

/// Speaks HTTP/2 with one caller until it or the router has enough.
pub(crate) async fn converse<S>(
    shared: &Arc<Shared>,
    stream: S,
    methods: &Methods,
    mut phase: watch::Receiver<Phase>,
) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let settings = &shared.settings;
    let silence = Duration::from_secs(u64::from(settings.response_idle_timeout_s.max(1)));
    let streams_max = match methods.ext_proc {
        Some(_) => settings.ext_proc_streams_per_connection_max.max(1),
        None => HEALTH_STREAMS_MAX,
    };
    let header_bytes = u32::try_from(2 * settings.header_bytes_max).unwrap_or(u32::MAX);
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_concurrent_streams(streams_max)
        // All streams of a proxy's worker share a connection. Clients that leave in numbers, and
        // bodies that still come for requests that are refused, must not end everybody's.
        .max_pending_accept_reset_streams(streams_max as usize)
        .max_concurrent_reset_streams(streams_max as usize)
        .max_local_error_reset_streams(None)
        .max_header_list_size(header_bytes.max(16 << 10))
        .handshake::<_, Bytes>(Patient::new(stream, silence));
    let mut connection = timeout(ms(settings.client_header_timeout_ms.max(1)), handshake).await??;
    let mut lost = pin!(lost(connection.ping_pong()));
    // Who asks for nothing but health is no proxy, and needs no drain.
    let _counted = methods.ext_proc.is_some().then(|| Counted::new(shared));
    // On the connection's own task: a piece of an answer is passed on without waking another
    // thread, which would cost more than all that is done with it.
    let mut calls = FuturesUnordered::new();
    let ended: Result<(), Failure> = loop {
        match *phase.borrow_and_update() {
            Phase::Serving | Phase::Draining => {}
            Phase::Closing => connection.graceful_shutdown(),
            Phase::Stopped => break Ok(()),
        }
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let answer = answer(shared, methods, request, respond);
                    calls.push(AssertUnwindSafe(answer).catch_unwind());
                }
                Some(Err(error)) => break Err(error.into()),
                None => break Ok(()),
            },
            // A panic has ended one call, and is in the log.
            Some(_) = calls.next() => {}
            changed = phase.changed() => if let Err(error) = changed { break Err(error.into()) },
            () = lost.as_mut() => break Err("the caller gives no sign of life".into()),
        }
    };
    // They learn that the caller has gone. What those hold that do not is given back all the same.
    drop(connection);
    let _ = timeout(FAREWELL, async { while calls.next().await.is_some() {} }).await;
    ended
}

/// A connection in the count of those of proxies.
struct Counted<'a>(&'a Shared);

impl Counted<'_> {
    fn new(shared: &Shared) -> Counted<'_> {
        shared.grpc_connections.fetch_add(1, Ordering::AcqRel);
        Counted(shared)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.grpc_connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One more in a gauge of those under way, however it ends.
pub(crate) struct Open<'a>(&'a Gauge);

impl Open<'_> {
    pub fn new(gauge: &Gauge) -> Open<'_> {
        gauge.inc();
        Open(gauge)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Ends when the caller has stopped answering pings.
async fn lost(pings: Option<PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection itself tells why it ends.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// Runs one call to its end.
async fn answer(
    shared: &Arc<Shared>,
    methods: &Methods,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let _open = Open::new(&shared.metrics.grpc_calls);
    let (head, body) = request.into_parts();
    let mut call = match Call::new(shared, &head.headers, body, respond) {
        Ok(call) => call,
        Err(mut respond) => {
            let mut refused = Response::new(());
            *refused.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            // The caller may be gone.
            let _ = respond.send_response(refused, true);
            return;
        }
    };
    let end = match (head.uri.path(), &methods.ext_proc) {
        (ext_proc::METHOD, Some(options)) => extproc::process(shared, options, &mut call).await,
        (grpc_health::CHECK, _) => health::check(shared, &mut call).await,
        (grpc_health::WATCH, _) => health::watch(shared, &mut call).await,
        (path, _) => End::new(Code::Unimplemented, format!("there is no method {path} here")),
    };
    debug!(code = ?end.code, why = end.message, "A call is over.");
    call.finish(&end);
}

/// How a call ended.
#[derive(Debug)]
pub(crate) struct End {
    pub code: Code,
    /// In words; empty when all is well.
    pub message: String,
}

impl End {
    /// With an error.
    pub fn new(code: Code, message: impl Into<String>) -> End {
        End { code, message: message.into() }
    }

    /// As it should.
    pub fn ok() -> End {
        End::new(Code::Ok, "")
    }
}

impl From<FrameError> for End {
    fn from(error: FrameError) -> End {
        End::new(error.code(), error.to_string())
    }
}

/// What a caller did instead of sending a message.
#[derive(Debug)]
pub(crate) enum Silence {
    /// Nothing, for as long as it was waited.
    TooLong,
    /// It has closed its side, or gone.
    Gone,
    /// Sent what is no message.
    Broken(FrameError),
}

/// A deadline that moves with every message. Its timer is set anew only when it fires or would
/// come too late: most messages come long before it.
#[derive(Default)]
struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    /// Ready once it is `until`, whatever it was before.
    fn poll(&mut self, cx: &mut Context<'_>, until: Instant) -> Poll<()> {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if timer.deadline() > until {
            timer.as_mut().reset(until);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= until {
                return Poll::Ready(());
            }
            timer.as_mut().reset(until);
        }
    }
}

/// One call: messages in, messages out.
pub(crate) struct Call {
    receive: RecvStream,
    reader: MessageReader,
    alarm: Alarm,
    respond: SendResponse<Bytes>,
    /// Once the response's head is sent.
    send: Option<SendStream<Bytes>>,
    /// How long the caller may not read.
    patience: Duration,
    /// Nothing can be sent any more.
    broken: bool,
}

impl Call {
    /// Gives the response back if the request is not gRPC.
    fn new(
        shared: &Shared,
        headers: &HeaderMap,
        receive: RecvStream,
        respond: SendResponse<Bytes>,
    ) -> Result<Call, SendResponse<Bytes>> {
        let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
        if !headers.get(CONTENT_TYPE).is_some_and(is_grpc) {
            return Err(respond);
        }
        let settings = &shared.settings;
        let gzip = headers.get("grpc-encoding").is_some_and(|value| value == "gzip");
        let reader = MessageReader::new(settings.ext_proc_message_bytes_max, gzip);
        let patience = Duration::from_secs(u64::from(settings.client_body_timeout_s.max(1)));
        let alarm = Alarm::default();
        Ok(Call { receive, reader, alarm, respond, send: None, patience, broken: false })
    }

    /// A message that has arrived already.
    ///
    /// # Errors
    /// [`Silence::Broken`]
    pub fn read(&mut self) -> Result<Option<Bytes>, Silence> {
        self.reader.read().map_err(Silence::Broken)
    }

    /// The next message. Cancelling this loses none.
    ///
    /// # Errors
    /// [`Silence`]
    pub async fn next(&mut self, patience: Duration) -> Result<Bytes, Silence> {
        if let Some(message) = self.read()? {
            return Ok(message);
        }
        let until = Instant::now() + patience;
        poll_fn(|cx| match self.poll_arrive(cx) {
            Poll::Pending => self.alarm.poll(cx, until).map(|()| Err(Silence::TooLong)),
            arrived => arrived,
        })
        .await
    }

    fn poll_arrive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Silence>> {
        loop {
            if let Some(message) = self.read()? {
                return Poll::Ready(Ok(message));
            }
            let piece = match ready!(self.receive.poll_data(cx)) {
                Some(Ok(piece)) => piece,
                Some(Err(_)) => return Poll::Ready(Err(Silence::Gone)),
                None => {
                    self.reader.finish().map_err(Silence::Broken)?;
                    return Poll::Ready(Err(Silence::Gone));
                }
            };
            // It fails for a stream that is over, which the next piece tells.
            let _ = self.receive.flow_control().release_capacity(piece.len());
            self.reader.push(piece);
        }
    }

    /// Sends bytes of messages, as fast as the caller reads.
    ///
    /// # Errors
    /// [`Silence::Gone`], and [`Silence::TooLong`] when the caller does not read.
    pub async fn send(&mut self, mut bytes: Bytes) -> Result<(), Silence> {
        let patience = self.patience;
        let sent = timeout(patience, async {
            let stream = self.stream()?;
            while !bytes.is_empty() {
                stream.reserve_capacity(bytes.len());
                let room = match stream.capacity() {
                    0 => match poll_fn(|cx| stream.poll_capacity(cx)).await {
                        Some(Ok(room)) => room,
                        _ => return Err(Silence::Gone),
                    },
                    room => room,
                };
                let part = bytes.split_to(room.min(bytes.len()));
                stream.send_data(part, false).map_err(|_| Silence::Gone)?;
            }
            Ok(())
        });
        let sent = sent.await.unwrap_or(Err(Silence::TooLong));
        self.broken |= sent.is_err();
        sent
    }

    /// Waits until the caller has given up the call or is gone.
    pub async fn gone(&mut self) {
        if let Ok(stream) = self.stream() {
            // Either way it is over.
            let _ = poll_fn(|cx| stream.poll_reset(cx)).await;
        }
        self.broken = true;
    }

    /// The stream of the response, whose head goes with the first message.
    fn stream(&mut self) -> Result<&mut SendStream<Bytes>, Silence> {
        if self.send.is_none() {
            let head = grpc_head();
            let stream = self.respond.send_response(head, false).map_err(|_| Silence::Gone)?;
            self.send = Some(stream);
        }
        self.send.as_mut().ok_or(Silence::Gone)
    }

    /// Ends the call: with its status, or with a reset when the caller cannot take that.
    fn finish(mut self, end: &End) {
        if self.broken {
            match &mut self.send {
                Some(stream) => stream.send_reset(Reason::CANCEL),
                None => self.respond.send_reset(Reason::CANCEL),
            }
            return;
        }
        let mut status = HeaderMap::with_capacity(2);
        status.insert(GRPC_STATUS, HeaderValue::from(end.code as u16));
        if let Ok(message) = HeaderValue::from_str(&grpc_message(&end.message))
            && !message.is_empty()
        {
            status.insert(GRPC_MESSAGE, message);
        }
        // Errors mean that the caller has gone.
        match &mut self.send {
            Some(stream) => drop(stream.send_trailers(status)),
            None => {
                let mut head = grpc_head();
                head.headers_mut().extend(status);
                drop(self.respond.send_response(head, true));
            }
        }
    }
}

fn grpc_head() -> Response<()> {
    let mut head = Response::new(());
    let headers = head.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-accept-encoding", HeaderValue::from_static("identity,gzip"));
    head
}
