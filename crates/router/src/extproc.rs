//! What does Envoy ask about one request, and what is it told? The other door into the router:
//! `envoy.service.ext_proc.v3.ExternalProcessor/Process`, one stream for each HTTP request.
//!
//! The request is read whole, decided by the same code as the embedded proxy's
//! ([`crate::route::decide`]), and sent on with the header that names its endpoint
//! (`extproc/request.rs`). The answer passes through, piece by piece (`extproc/answer.rs`). Envoy
//! sets no deadline in its full duplex mode, so every wait has one here.

mod answer;
mod hints;
mod request;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use kvroute_core::plan::Plan;
use kvroute_core::plugin::PluginSpec;
use kvroute_core::report::Reporter;
use kvroute_core::settings::ms;
use kvroute_wire::api::Api;
use kvroute_wire::error_body::grpc_status;
use kvroute_wire::ext_proc::{Answer, BodyMode, Dynamic, Immediate, Message, Modes, Part, Side};
use kvroute_wire::grpc::Code;
use tracing::{info, warn};

use crate::config::ExtProcConfig;
use crate::error::RouteError;
use crate::grpc::{Call, End, Open, Silence};
use crate::headers;
use crate::route::note_refused;
use crate::shared::{Phase, Shared};

/// Largest piece of a body in one answer: other data planes than Envoy take messages of 64 KiB.
const PIECE_BYTES_MAX: usize = 62_000;
/// Pieces up to this size are copied behind their heads: that costs less than a frame of its own.
const COPIED_BYTES_MAX: usize = 4 << 10;
/// Answers are sent at the latest when so much waits.
const FLUSH_BYTES: usize = 32 << 10;
/// Namespace of the metadata by which a data plane and an Endpoint Picker talk.
const NAMESPACE: &str = "envoy.lb";
/// Names the chosen endpoints: a header and a key of the metadata.
const DESTINATION: &str = "x-gateway-destination-endpoint";

/// What clients get from Envoy when a stream ends with an error.
const BROKEN_STATUS: u16 = 500;

/// How Envoy is answered.
#[derive(Debug)]
pub(crate) struct Options {
    /// Data planes may say which endpoints a request is for.
    pub subset_hints: bool,
    /// Data planes are told every candidate's score.
    pub emit_scores: bool,
    /// Numbers about answers that data planes are told.
    pub reporters: Vec<Reporter>,
    /// Answers name who gave them.
    pub tells_served: bool,
    /// They do so in kvroute's own header, too.
    pub endpoint_header: bool,
}

impl Options {
    /// As the router and its plan say. The plan's expressions have been read before.
    pub fn new(config: Option<&ExtProcConfig>, plan: &Plan) -> Options {
        let reporters = plan.reporters.iter().filter_map(|spec| match spec {
            PluginSpec::AttributeReporter(reporter) => reporter.compile().ok(),
            _ => None,
        });
        let is_verifier = |spec: &PluginSpec| matches!(spec, PluginSpec::ServedVerifier(_));
        Options {
            subset_hints: config.is_none_or(|config| !config.ignore_subset_hints),
            reporters: reporters.collect(),
            emit_scores: config.is_some_and(|config| config.emit_scores),
            endpoint_header: config.is_none_or(|config| config.endpoint_header),
            tells_served: plan.reporters.iter().any(is_verifier),
        }
    }
}

/// Why a request does not get to an endpoint.
enum Stop {
    /// The router answers it.
    Refuse(RouteError),
    /// Envoy has answered it meanwhile, and says so.
    Answered(Box<Message>),
    /// The client has gone.
    Gone,
    /// Envoy does not keep to the protocol.
    End(End),
}

impl From<RouteError> for Stop {
    fn from(error: RouteError) -> Stop {
        Stop::Refuse(error)
    }
}

impl From<End> for Stop {
    fn from(end: End) -> Stop {
        Stop::End(end)
    }
}

/// Answers one stream of Envoy's.
pub(crate) async fn process(shared: &Arc<Shared>, options: &Options, call: &mut Call) -> End {
    let began = Instant::now();
    let named = shared.metrics.upstream.as_ref().and_then(|names| names.streams());
    let _named = named.map(|streams| streams.begin());
    let _open = Open::new(&shared.metrics.ext_proc_streams);
    let age_max = shared.settings.ext_proc_stream_timeout_s.max(1);
    let mut stream = Stream {
        shared,
        options,
        call,
        answer: Answer::new(),
        modes: FULL_DUPLEX,
        trailers_answered: false,
        until: began + Duration::from_secs(u64::from(age_max)),
    };
    let end = stream.run().await.err().unwrap_or_else(End::ok);
    shared.metrics.count_ext_proc_end(end.code);
    if end.code.is_misuse() && shared.complaints.is_first_of_setup(end.code.as_str()) {
        let (code, why) = (end.code.as_str(), &end.message);
        warn!(code, why, "A proxy does not keep to ext_proc's protocol; its client gets a 500.");
    }
    named.inspect(|streams| streams.end(end.code, began.elapsed()));
    // One that has closed its side has made no mistake.
    if end.code == Code::Cancelled { End::ok() } else { end }
}

/// The mode where Envoy does not tell one.
const FULL_DUPLEX: Modes =
    Modes { request: BodyMode::FullDuplexStreamed, response: BodyMode::FullDuplexStreamed };

/// One HTTP request and its answer.
struct Stream<'a> {
    shared: &'a Arc<Shared>,
    options: &'a Options,
    call: &'a mut Call,
    /// What is not sent yet.
    answer: Answer,
    modes: Modes,
    /// The request's trailers have come.
    trailers_answered: bool,
    /// Streams do not get older.
    until: Instant,
}

impl Stream<'_> {
    async fn run(&mut self) -> Result<(), End> {
        let patience = ms(self.shared.settings.client_header_timeout_ms.max(1));
        let first = match self.next(patience).await? {
            Next::Message(first) => first,
            Next::TooLong => return Err(End::new(Code::DeadlineExceeded, "no message came")),
            Next::Gone => return Ok(()),
        };
        if first.observability {
            let text = "observability_mode is on, so nothing that is answered here has an effect";
            return Err(End::new(Code::FailedPrecondition, text));
        }
        self.modes = first.modes.unwrap_or(FULL_DUPLEX);
        let place = self.shared.admit();
        match first.part {
            Part::RequestHeaders(block) => self.request(block, first.metadata, place).await,
            // An answer of Envoy's own to a request that it did not show.
            Part::ResponseHeaders(_) => {
                let _place = place.map_err(|e| End::new(Code::ResourceExhausted, e.to_string()))?;
                self.answers(answer::Exchange::unasked(), Some(first)).await
            }
            other => Err(unexpected(&other)),
        }
    }

    /// The next message, if it comes in time. What was written before is sent first.
    async fn next(&mut self, patience: Duration) -> Result<Next, End> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.too_old());
        }
        let bytes = match self.call.read() {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                self.flush().await?;
                match self.call.next(patience.min(left)).await {
                    Ok(bytes) => bytes,
                    Err(Silence::TooLong) if left < patience => return Err(self.too_old()),
                    Err(Silence::TooLong) => return Ok(Next::TooLong),
                    Err(Silence::Gone) => return Ok(Next::Gone),
                    Err(Silence::Broken(error)) => return Err(error.into()),
                }
            }
            Err(Silence::Broken(error)) => return Err(error.into()),
            Err(_) => return Ok(Next::Gone),
        };
        read(&bytes).map(Next::Message)
    }

    fn too_old(&self) -> End {
        let age_max = self.shared.settings.ext_proc_stream_timeout_s.max(1);
        let text = format!("older than {age_max} s (kvroute.ext_proc_stream_timeout_s)");
        End::new(Code::DeadlineExceeded, text)
    }

    /// How a stream ends whose caller has closed its side, or gone, before it was over: what a
    /// client that left looks like, and the router's own end.
    fn gone(&self) -> End {
        match self.shared.phase() {
            Phase::Stopped => End::new(Code::Unavailable, "the router is being stopped"),
            _ => End::new(Code::Cancelled, "the client left"),
        }
    }

    /// Sends what is written. A caller that has gone is noticed at the next message.
    async fn flush(&mut self) -> Result<(), End> {
        if self.answer.is_empty() {
            return Ok(());
        }
        let bytes = self.answer.take();
        self.send(bytes).await
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), End> {
        match self.call.send(bytes).await {
            Ok(()) | Err(Silence::Gone) => Ok(()),
            Err(_) => Err(End::new(Code::DeadlineExceeded, "the caller does not read")),
        }
    }

    /// Sends parts of a body on, of which some may be empty.
    async fn pass_all_on(
        &mut self,
        side: Side,
        parts: Vec<Bytes>,
        end_of_stream: bool,
        dynamic: Dynamic<'_>,
    ) -> Result<(), End> {
        let mut parts: Vec<Bytes> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let last = parts.pop();
        for part in parts {
            self.pass_on(side, part, false, &[]).await?;
        }
        if last.is_some() || end_of_stream {
            self.pass_on(side, last.unwrap_or_default(), end_of_stream, dynamic).await?;
        }
        Ok(())
    }

    /// Sends bytes of a body on, in pieces of at most [`PIECE_BYTES_MAX`].
    async fn pass_on(
        &mut self,
        side: Side,
        mut body: Bytes,
        end_of_stream: bool,
        dynamic: Dynamic<'_>,
    ) -> Result<(), End> {
        loop {
            let piece = body.split_to(body.len().min(PIECE_BYTES_MAX));
            let last = body.is_empty();
            let (end, dynamic) = (last && end_of_stream, if last { dynamic } else { &[] });
            self.answer.piece_head(side, piece.len(), end, dynamic);
            if piece.len() <= COPIED_BYTES_MAX {
                self.answer.piece_bytes(&piece);
            } else {
                self.flush().await?;
                self.send(piece).await?;
            }
            if self.answer.len() >= FLUSH_BYTES {
                self.flush().await?;
            }
            if last {
                return Ok(());
            }
        }
    }

    /// Answers in the place of an endpoint, and ends the stream.
    async fn refuse(
        &mut self,
        api: Api,
        request_id: Option<&HeaderValue>,
        error: &RouteError,
    ) -> Result<(), End> {
        let body = match api.is_grpc() {
            true => error.to_string(),
            false => error.body(api),
        };
        let set: Vec<_> =
            error.headers().filter(|(name, _)| !api.is_grpc() || *name != CONTENT_TYPE).collect();
        let mut set: Vec<(&str, &[u8])> =
            set.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        set.extend(request_id.map(|id| (headers::REQUEST_ID_NAME, id.as_bytes())));
        let status = error.status().as_u16();
        let details = format!("kvroute_{}", error.reason().replace('-', "_"));
        self.answer.immediate(&Immediate {
            status,
            headers: &set,
            body: body.as_bytes(),
            grpc_status: api.is_grpc().then(|| grpc_status(status)),
            details: &details,
        });
        self.flush().await
    }

    /// Refuses a request that nothing has been answered for.
    async fn refuse_request(
        &mut self,
        way: &crate::route::Way,
        error: &RouteError,
    ) -> Result<(), End> {
        note_refused(self.shared, way.request_id.as_str(), error);
        if let RouteError::BodyMode(_) = error
            && self.shared.complaints.is_first_of_setup("ext_proc body mode")
        {
            warn!(%error, "A proxy's ext_proc filter is not set up as it must be.");
        }
        self.refuse(way.api, Some(&way.id_value), error).await
    }

    /// In full duplex, trailers end the body and have been answered with it.
    fn trailers_may_follow(&self) -> bool {
        self.modes.request != BodyMode::FullDuplexStreamed && !self.trailers_answered
    }

    /// Says once what a mode costs.
    fn note_blind(&self, what: &'static str) {
        self.shared.metrics.count_fallback(what);
        if self.shared.complaints.is_first_of_setup(what) {
            info!(
                what,
                "A proxy does not send bodies over ext_proc as routing needs them; set both body \
                 modes to FULL_DUPLEX_STREAMED."
            );
        }
    }
}

/// What came of waiting for a message.
enum Next {
    Message(Message),
    TooLong,
    Gone,
}

fn read(bytes: &Bytes) -> Result<Message, End> {
    Message::read(bytes).map_err(|error| End::new(Code::InvalidArgument, error.to_string()))
}

fn unexpected(part: &Part) -> End {
    let what = match part {
        Part::RequestHeaders(_) => "request_headers",
        Part::RequestBody(_) => "request_body",
        Part::RequestTrailers => "request_trailers",
        Part::ResponseHeaders(_) => "response_headers",
        Part::ResponseBody(_) => "response_body",
        Part::ResponseTrailers => "response_trailers",
    };
    End::new(Code::InvalidArgument, format!("{what} out of order"))
}
