//! What does one request add to llm-d's metrics, from its decision to its end?

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvroute_wire::usage::Usage;

use super::UpstreamMetrics;
use super::flow::{Flow, Of};

/// What llm-d calls every fault of a model server.
pub(crate) const MODEL_SERVER_ERROR: &str = "ModelServerError";

/// llm-d's name of the reason why the router itself answers with `status`.
pub(crate) fn error_code(status: u16) -> &'static str {
    match status {
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        412 => "PreconditionFailed",
        429 => "ResourceExhausted",
        502 | 504 => MODEL_SERVER_ERROR,
        503 => "ServiceUnavailable",
        400..=499 => "BadRequest",
        _ => "Internal",
    }
}

/// A routed request. It counts as running until this is dropped.
pub(crate) struct Meter {
    names: Arc<UpstreamMetrics>,
    flow: Arc<Flow>,
    arrived: Instant,
    /// Of its body; 0 when it was not read.
    request_bytes: usize,
    /// When the answer's head came.
    answered: Option<Instant>,
    streaming: bool,
    /// When the first and the last piece of the answer came.
    first: Option<Instant>,
    last: Option<Instant>,
    response_bytes: u64,
    /// Time spent on the answer's pieces.
    busy: Duration,
}

impl Meter {
    /// A request that was just routed. `arrived` is corrected by [`Meter::arrived`].
    pub(super) fn new(names: Arc<UpstreamMetrics>, flow: Arc<Flow>, request_bytes: usize) -> Meter {
        flow.count();
        flow.running().inc();
        Meter {
            names,
            flow,
            arrived: Instant::now(),
            request_bytes,
            answered: None,
            streaming: false,
            first: None,
            last: None,
            response_bytes: 0,
            busy: Duration::ZERO,
        }
    }

    /// When the request's head came. To be called once, when the request is on its way.
    pub fn arrived(&mut self, at: Instant) {
        self.arrived = at;
        self.names.request_processing.observe(at.elapsed().as_secs_f64());
    }

    /// The answer's head came.
    pub fn head(&mut self, streaming: bool) {
        self.answered = Some(Instant::now());
        self.streaming = streaming;
    }

    /// A piece of the answer came at `at` and has been seen to. One without bytes only marks the
    /// end.
    pub fn piece(&mut self, at: Instant, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.response_bytes = self.response_bytes.saturating_add(bytes as u64);
        if self.streaming {
            self.flow.set_served();
            match self.last {
                None => self.flow.observe_ttft(true, seconds(self.arrived, at)),
                Some(last) => self.flow.observe(Of::BetweenPieces, seconds(last, at)),
            }
            self.busy += at.elapsed();
        }
        self.first = self.first.or(Some(at));
        self.last = Some(at);
    }

    /// The whole answer has come.
    pub fn end(&mut self, status: u16, usage: Option<Usage>) {
        let now = Instant::now();
        let total = seconds(self.arrived, now);
        match status {
            400.. => self.flow.count_error(MODEL_SERVER_ERROR),
            _ => self.flow.set_served(),
        }
        let flow = self.names.flows.measured(&self.flow);
        flow.observe(Of::Duration, total);
        flow.observe(Of::ResponseBytes, self.response_bytes as f64);
        if !self.streaming {
            flow.observe_ttft(false, total);
        }
        let busy = match self.answered {
            Some(answered) if !self.streaming => now.duration_since(answered),
            _ => self.busy,
        };
        self.names.response_processing.observe(busy.as_secs_f64());
        let Some(usage) = usage else { return };
        if usage.prompt_tokens > 0 {
            flow.observe(Of::InputTokens, f64::from(usage.prompt_tokens));
        }
        if let Some(cached) = usage.cached_tokens {
            flow.observe(Of::CachedTokens, f64::from(cached));
        }
        if usage.completion_tokens == 0 {
            return;
        }
        let generated = f64::from(usage.completion_tokens);
        flow.observe(Of::OutputTokens, generated);
        flow.observe(Of::SecondsPerToken, total / generated);
        if let Some(first) = self.first.filter(|_| self.streaming && usage.completion_tokens > 1) {
            let after = seconds(first, now);
            flow.observe(Of::StreamedSecondsPerToken, after / (generated - 1.0));
        }
    }

    /// There is no answer, or it broke off.
    pub fn fail(&self, code: &'static str) {
        self.flow.count_error(code);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.flow.running().dec();
        if self.request_bytes > 0 {
            let flow = self.names.flows.measured(&self.flow);
            flow.observe(Of::RequestBytes, self.request_bytes as f64);
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
