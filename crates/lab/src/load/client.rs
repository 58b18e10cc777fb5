//! One streamed request: when did its tokens come, and what did the usage say?

use bytes::Bytes;
use http::{Method, Request, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvroute_wire::usage::UsageScanner;
use tokio::time::Instant;

use super::{LoadApi, LoadConfig, LoadError, Outcome};

/// Bytes of an error body that are quoted.
const ERROR_BYTES_MAX: usize = 300;

/// Sends requests of one load.
pub(super) struct Client {
    http: HttpClient<HttpConnector, Full<Bytes>>,
    uri: Uri,
    model: String,
    api: LoadApi,
}

impl Client {
    pub(super) fn new(config: &LoadConfig) -> Result<Client, LoadError> {
        let bad = |reason: String| LoadError::Url { url: config.url.clone(), reason };
        let path = match config.api {
            LoadApi::Completions => "/v1/completions",
            LoadApi::ChatCompletions => "/v1/chat/completions",
        };
        let text = format!("{}{path}", config.url.trim_end_matches('/'));
        let uri: Uri =
            text.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err(bad("only plain http is supported".to_owned()));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let http = HttpClient::builder(TokioExecutor::new()).build(connector);
        Ok(Client { http, uri, model: config.model.clone(), api: config.api })
    }

    /// Sends one prompt and reads the answer to its end.
    pub(super) async fn send(&self, text: &str, max_tokens: u32, mut outcome: Outcome) -> Outcome {
        let begin = Instant::now();
        match self.answer(text, max_tokens, begin, &mut outcome).await {
            Ok(()) => {}
            Err(error) => {
                outcome.observation.ttft_s = None;
                outcome.error = Some(error);
            }
        }
        outcome
    }

    fn body(&self, text: &str, max_tokens: u32) -> Bytes {
        let mut body = serde_json::json!({
            "model": self.model,
            "max_tokens": max_tokens,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.api {
            LoadApi::Completions => body["prompt"] = text.into(),
            LoadApi::ChatCompletions => {
                body["messages"] = serde_json::json!([{"role": "user", "content": text}]);
            }
        }
        body.to_string().into()
    }

    async fn answer(
        &self,
        text: &str,
        max_tokens: u32,
        begin: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(self.body(text, max_tokens)))
            .map_err(|error| error.to_string())?;
        let response = self.http.request(request).await.map_err(|error| format!("{error:?}"))?;
        let endpoint = response.headers().get("x-kvroute-endpoint");
        outcome.endpoint = endpoint.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let status = response.status();
        if !status.is_success() {
            let body = response.into_body().collect().await.map_err(|error| error.to_string())?;
            let body = body.to_bytes();
            let text = String::from_utf8_lossy(&body[..body.len().min(ERROR_BYTES_MAX)]);
            return Err(format!("{status}: {text}"));
        }
        read_stream(response.into_body(), begin, outcome).await
    }
}

async fn read_stream(
    mut body: hyper::body::Incoming,
    begin: Instant,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let mut usage = UsageScanner::new();
    let mut events = EventCounter::default();
    let mut last = None;
    let observation = &mut outcome.observation;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| format!("the answer broke off: {error}"))?;
        let Some(data) = frame.data_ref() else { continue };
        let now = Instant::now();
        usage.push(data);
        for _ in 0..events.push(data) {
            match last {
                None => observation.ttft_s = Some(now.duration_since(begin).as_secs_f64()),
                Some(last) => observation.gaps_s.push(now.duration_since(last).as_secs_f32()),
            }
            last = Some(now);
        }
    }
    if !events.done {
        return Err("the answer ended without [DONE]".to_owned());
    }
    let usage = usage.usage().ok_or("the answer has no usage")?;
    // The chunk that carries the usage is an event without a token, and so is the one that opens
    // a chat answer.
    let gaps = (usage.completion_tokens as usize).saturating_sub(1);
    let extra = observation.gaps_s.len().saturating_sub(gaps + 1);
    observation.gaps_s.drain(..extra);
    observation.gaps_s.truncate(gaps);
    observation.prompt_tokens = u64::from(usage.prompt_tokens);
    observation.cached_tokens = u64::from(usage.cached_tokens.unwrap_or(0));
    observation.output_tokens = u64::from(usage.completion_tokens);
    Ok(())
}

/// Counts the `data:` lines of a stream that is cut anywhere.
#[derive(Default)]
struct EventCounter {
    line: [u8; 12],
    length: usize,
    done: bool,
}

impl EventCounter {
    /// How many events other than `[DONE]` end in these bytes.
    fn push(&mut self, bytes: &[u8]) -> usize {
        let mut count = 0;
        for &byte in bytes {
            if byte == b'\n' {
                let line = &self.line[..self.length.min(self.line.len())];
                if line == b"data: [DONE]" && self.length == line.len() {
                    self.done = true;
                } else if line.starts_with(b"data:") {
                    count += 1;
                }
                self.length = 0;
            } else if byte != b'\r' {
                if let Some(slot) = self.line.get_mut(self.length) {
                    *slot = byte;
                }
                self.length += 1;
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_wherever_the_stream_is_cut() {
        let stream = b"data: {\"a\":1}\n\ndata: {}\r\n\r\n: comment\n\ndata: [DONE]\n\n";
        for cut in 0..=stream.len() {
            let mut counter = EventCounter::default();
            let count = counter.push(&stream[..cut]) + counter.push(&stream[cut..]);
            assert_eq!((count, counter.done), (2, true), "cut {cut}");
        }
    }
}
