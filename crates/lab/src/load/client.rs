//! One streamed request: when did its tokens come, and what did the usage say?

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvroute_wire::usage::{Usage, UsageScanner};
use serde::Deserialize;
use tokio::time::Instant;

use super::{LoadConfig, LoadError};
use crate::record::Ending;

/// Bytes of an error body that are quoted.
const ERROR_BYTES_MAX: usize = 300;

/// Bytes of one line of a stream; what is longer is cut.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Bytes of a page that is read whole.
pub(super) const PAGE_BYTES_MAX: usize = 16 << 20;

/// Sends requests of one load.
pub(super) struct Client {
    http: HttpClient<HttpConnector, Full<Bytes>>,
    uri: Uri,
    headers: HeaderMap,
    timeout: Duration,
    /// Tokens that came since somebody asked.
    pub(super) emitted: Arc<AtomicU64>,
}

/// A request that can leave at once.
pub(super) struct Ready {
    pub body: Bytes,
    pub session: Option<u64>,
    /// The text of the answer is wanted.
    pub keep_text: bool,
}

/// What came of a request. Times from sending.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub first: Option<Duration>,
    pub total: Duration,
    /// Between its tokens, seconds.
    pub gaps_s: Vec<f32>,
    pub usage: Option<Usage>,
    /// Tokens seen, for an answer without usage.
    pub tokens: u32,
    pub text: String,
    /// `x-kvroute-endpoint`.
    pub endpoint: Option<String>,
    pub failed: Option<Failed>,
}

/// Why there is no complete answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    pub ending: Ending,
    /// Few kinds, to be counted.
    pub kind: String,
    /// What exactly.
    pub message: String,
}

impl Failed {
    fn new(kind: &str, message: String) -> Failed {
        Failed { ending: Ending::Failed, kind: kind.to_owned(), message }
    }
}

/// A client for plain HTTP.
pub(super) fn http() -> HttpClient<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    HttpClient::builder(TokioExecutor::new()).build(connector)
}

/// The address of a path below a base URL.
pub(super) fn uri(base: &str, path: &str) -> Result<Uri, LoadError> {
    let bad = |reason: String| LoadError::Url { url: base.to_owned(), reason };
    let text = format!("{}{path}", base.trim_end_matches('/'));
    let uri: Uri = text.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?;
    if uri.scheme_str() != Some("http") || uri.host().is_none() {
        return Err(bad("only plain http is supported".to_owned()));
    }
    Ok(uri)
}

/// The header that carries a key.
pub(super) fn authorization(key: Option<&str>) -> Result<HeaderMap, LoadError> {
    let mut headers = HeaderMap::new();
    if let Some(key) = key {
        let mut value =
            HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| LoadError::ApiKey)?;
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
    Ok(headers)
}

impl Client {
    pub(super) fn new(config: &LoadConfig) -> Result<Client, LoadError> {
        let mut headers = authorization(config.api_key.as_deref())?;
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let uri = uri(&config.url, config.api.path())?;
        let emitted = Arc::new(AtomicU64::new(0));
        Ok(Client { http: http(), uri, headers, timeout: config.timeout, emitted })
    }

    /// Sends one request and reads the answer to its end.
    pub(super) async fn send(&self, ready: Ready) -> Answer {
        let mut reader = Reader::new(ready.keep_text, self.emitted.clone());
        let mut endpoint = None;
        let begin = Instant::now();
        let read = self.read(ready, &mut reader, &mut endpoint);
        let done = match tokio::time::timeout(self.timeout, read).await {
            Ok(done) => done,
            Err(_) => {
                let message = format!("no complete answer within {:?}", self.timeout);
                Err(Failed::new("timeout", message))
            }
        };
        let total = begin.elapsed();
        let failed = done.and_then(|()| reader.check()).err();
        let mut answer = reader.answer(begin);
        (answer.total, answer.endpoint, answer.failed) = (total, endpoint, failed);
        answer
    }

    async fn read(
        &self,
        ready: Ready,
        reader: &mut Reader,
        endpoint: &mut Option<String>,
    ) -> Result<(), Failed> {
        let mut request = Request::new(Full::new(ready.body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        if let Some(session) = ready.session {
            request.headers_mut().insert("x-session-id", HeaderValue::from(session));
        }
        let response = self.http.request(request).await.map_err(|error| {
            let kind = if error.is_connect() { "cannot connect" } else { "no response" };
            let source = std::error::Error::source(&error);
            Failed::new(kind, source.map_or_else(|| error.to_string(), ToString::to_string))
        })?;
        let header = response.headers().get("x-kvroute-endpoint");
        *endpoint = header.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let page = Limited::new(body, PAGE_BYTES_MAX).collect().await;
            let page = page.map(|page| page.to_bytes()).unwrap_or_default();
            let quoted = &page[..page.len().min(ERROR_BYTES_MAX)];
            let message = String::from_utf8_lossy(quoted).into_owned();
            let ending = match status.as_u16() {
                429 | 503 => Ending::Rejected,
                _ => Ending::Failed,
            };
            return Err(Failed { ending, kind: format!("status {}", status.as_u16()), message });
        }
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Failed::new("broken off", error.to_string()))?;
            if let Some(data) = frame.data_ref() {
                reader.push(data, Instant::now());
            }
        }
        Ok(())
    }
}

/// What matters of an event.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
    error: Option<serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Delta<'a> {
    #[serde(borrow)]
    role: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning_content: Option<Cow<'a, str>>,
}

impl Chunk<'_> {
    /// The text of a token; `None` for an event without one: the opening of a chat, the usage.
    fn token(&self) -> Option<String> {
        let choice = self.choices.first()?;
        let Some(delta) = &choice.delta else {
            return Some(choice.text.as_deref().unwrap_or_default().to_owned());
        };
        let says = |text: &Option<Cow<'_, str>>| text.as_deref().unwrap_or_default().to_owned();
        let text = says(&delta.content);
        let silent = text.is_empty() && says(&delta.reasoning_content).is_empty();
        (!silent || delta.role.is_none()).then_some(text)
    }
}

/// Reads server-sent events that are cut anywhere.
struct Reader {
    usage: UsageScanner,
    line: Vec<u8>,
    first: Option<Instant>,
    last: Option<Instant>,
    gaps_s: Vec<f32>,
    tokens: u32,
    keep_text: bool,
    text: String,
    error: Option<String>,
    done: bool,
    emitted: Arc<AtomicU64>,
}

impl Reader {
    fn new(keep_text: bool, emitted: Arc<AtomicU64>) -> Reader {
        Reader {
            usage: UsageScanner::new(),
            line: Vec::new(),
            first: None,
            last: None,
            gaps_s: Vec::new(),
            tokens: 0,
            keep_text,
            text: String::new(),
            error: None,
            done: false,
            emitted,
        }
    }

    fn push(&mut self, bytes: &[u8], now: Instant) {
        self.usage.push(bytes);
        let mut lines = bytes.split(|&byte| byte == b'\n').peekable();
        while let Some(part) = lines.next() {
            let room = LINE_BYTES_MAX - self.line.len().min(LINE_BYTES_MAX);
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            if lines.peek().is_some() {
                let line = std::mem::take(&mut self.line);
                self.on_line(line.trim_ascii_end(), now);
                self.line = line;
                self.line.clear();
            }
        }
    }

    fn on_line(&mut self, line: &[u8], now: Instant) {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start) else { return };
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        // Parsing each event would cost the generator more than all the rest.
        if self.first.is_some() && !self.keep_text && !data.starts_with(b"{\"error\"") {
            if has_choice(data) {
                self.on_token(now);
            }
            return;
        }
        match serde_json::from_slice::<Chunk<'_>>(data) {
            Err(error) => self.error = Some(format!("an event is no JSON: {error}")),
            Ok(Chunk { error: Some(error), .. }) => self.error = Some(error.to_string()),
            Ok(chunk) => {
                if let Some(text) = chunk.token() {
                    self.on_token(now);
                    if self.keep_text {
                        self.text += &text;
                    }
                }
            }
        }
    }

    fn on_token(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        if let Some(last) = self.last.replace(now) {
            self.gaps_s.push(now.duration_since(last).as_secs_f32());
        }
        self.tokens = self.tokens.saturating_add(1);
        self.emitted.fetch_add(1, Ordering::Relaxed);
    }

    /// Is the answer complete?
    fn check(&self) -> Result<(), Failed> {
        if let Some(error) = &self.error {
            return Err(Failed::new("error in the stream", error.clone()));
        }
        match (self.done, self.first) {
            (false, _) => {
                Err(Failed::new("broken off", "the answer ended without [DONE]".to_owned()))
            }
            (true, None) => Err(Failed::new("empty answer", "no token came".to_owned())),
            (true, Some(_)) => Ok(()),
        }
    }

    fn answer(mut self, begin: Instant) -> Answer {
        let usage = self.usage.usage();
        if let Some(usage) = usage {
            // Several tokens may share an event, and a last event may have none.
            self.tokens = usage.completion_tokens;
            self.gaps_s.resize(usage.completion_tokens.saturating_sub(1) as usize, 0.0);
        }
        Answer {
            first: self.first.map(|first| first.duration_since(begin)),
            gaps_s: self.gaps_s,
            usage,
            tokens: self.tokens,
            text: self.text,
            ..Answer::default()
        }
    }
}

/// Whether the list of choices of an event has an entry.
fn has_choice(data: &[u8]) -> bool {
    const KEY: &[u8] = b"\"choices\":";
    let key = data.windows(KEY.len()).position(|part| part == KEY);
    let list = key.map(|at| data[at + KEY.len()..].trim_ascii_start());
    let inside = list.and_then(|list| list.strip_prefix(b"["));
    inside.is_some_and(|inside| !inside.trim_ascii_start().starts_with(b"]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &[u8], cut: usize, keep_text: bool) -> (Answer, Option<Failed>, u64) {
        let emitted = Arc::new(AtomicU64::new(0));
        let mut reader = Reader::new(keep_text, emitted.clone());
        let begin = Instant::now();
        reader.push(&stream[..cut], begin + Duration::from_millis(100));
        reader.push(&stream[cut..], begin + Duration::from_millis(300));
        let failed = reader.check().err();
        (reader.answer(begin), failed, emitted.load(Ordering::Relaxed))
    }

    const CHAT: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"a\",\"content\":\"\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\" a\"}}]}\r\n\r\n: comment\n\n\
        data: {\"choices\": [{\"delta\":{\"content\":\" \\\"choices\\\":[] b\"}}]}\n\n\
        data: {\"choices\": [], \"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n\
        data: [DONE]\n\n";

    #[tokio::test]
    async fn tokens_are_counted_wherever_the_stream_is_cut() {
        for cut in 0..=CHAT.len() {
            for keep_text in [false, true] {
                let (answer, failed, emitted) = read(CHAT.as_bytes(), cut, keep_text);
                assert_eq!((answer.tokens, failed, emitted), (2, None, 2), "cut {cut}");
                assert_eq!(answer.usage.unwrap().prompt_tokens, 7);
                assert_eq!(answer.gaps_s.len(), 1);
                let expected = if keep_text { " a \"choices\":[] b" } else { "" };
                assert_eq!(answer.text, expected);
            }
        }
        // The opening is no token: the first came with the second piece.
        let opening = CHAT.find("\n\n").unwrap() + 2;
        let (answer, ..) = read(CHAT.as_bytes(), opening, false);
        assert_eq!(answer.first, Some(Duration::from_millis(300)));
    }

    #[tokio::test]
    async fn events_with_several_tokens_and_answers_without_usage_are_measured() {
        let event = "data: {\"choices\":[{\"text\":\"x\"}]}\n\n";
        let usage =
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":5}}\n\ndata: [DONE]\n\n";
        let stream = format!("{event}{event}{usage}");
        let (answer, failed, _) = read(stream.as_bytes(), event.len(), false);
        assert_eq!((answer.tokens, failed), (5, None));
        assert_eq!(answer.gaps_s, [0.2, 0.0, 0.0, 0.0]);
        let stream = format!("{event}{event}data: [DONE]\n\n");
        let (answer, failed, _) = read(stream.as_bytes(), 0, false);
        assert_eq!((answer.tokens, answer.usage, failed), (2, None, None));
    }

    #[tokio::test]
    async fn incomplete_answers_have_a_kind() {
        for (stream, kind) in [
            ("data: {\"choices\":[{\"text\":\"x\"}]}\n\n", "broken off"),
            ("data: [DONE]\n\n", "empty answer"),
            ("data: {\"error\":{\"message\":\"no\"}}\n\ndata: [DONE]\n\n", "error in the stream"),
            ("data: {]\n\ndata: [DONE]\n\n", "error in the stream"),
        ] {
            assert_eq!(read(stream.as_bytes(), 3, false).1.unwrap().kind, kind, "{stream}");
        }
    }
}
