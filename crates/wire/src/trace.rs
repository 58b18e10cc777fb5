//! What did a recording of a real engine hold?
//!
//! A recording is a folder with `requests.jsonl` and one or more `kv_events*.jsonl`, one JSON
//! object per line. Unknown entries are ignored, so recordings may carry more.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::base64;
use crate::usage::{self, Usage};

/// Longest line of a recording, in bytes.
pub const LINE_BYTES_MAX: usize = 64 << 20;

/// Why a line of a recording was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line}: {message}")]
pub struct TraceError {
    /// Line in the file, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub message: String,
}

/// One message of the KV event stream: a line of `kv_events*.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedMessage {
    /// When it arrived, Unix nanoseconds.
    pub recv_unix_ns: u64,
    /// The ZeroMQ frames: topic, sequence number, payload.
    pub frames: Vec<Vec<u8>>,
}

impl RecordedMessage {
    /// The sequence number of the second frame.
    pub fn seq(&self) -> Option<u64> {
        let bytes: [u8; 8] = self.frames.get(1)?.as_slice().try_into().ok()?;
        Some(u64::from_be_bytes(bytes))
    }

    /// The third frame, for `kv_event::decode_batch`.
    pub fn payload(&self) -> Option<&[u8]> {
        self.frames.get(2).map(Vec::as_slice)
    }
}

/// One HTTP call: a line of `requests.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedRequest {
    /// What the call was for.
    pub label: String,
    /// Port of the engine.
    pub port: u16,
    /// `POST` when the recording does not say.
    pub method: String,
    /// Request path.
    pub path: String,
    /// Request headers.
    pub headers: BTreeMap<String, String>,
    /// JSON text of the body; empty when there was none.
    pub body: Vec<u8>,
    /// What the engine's `/tokenize` made of the prompt, where it was asked.
    pub tokenize: Option<Vec<u32>>,
    /// Token ids per prompt, as the engine's render endpoint gave them; empty where it did not.
    pub render: Vec<Vec<u32>>,
    /// When the call began, Unix nanoseconds.
    pub t_start_unix_ns: u64,
    /// When its answer was complete, Unix nanoseconds.
    pub t_end_unix_ns: u64,
    /// HTTP status.
    pub status: u16,
    /// What the engine said about tokens.
    pub usage: Option<Usage>,
    /// The answer: its text for administrative calls, JSON otherwise.
    pub response: String,
}

#[derive(Deserialize)]
struct MessageLine<'a> {
    recv_unix_ns: u64,
    #[serde(borrow)]
    frames_b64: Vec<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct RequestLine<'a> {
    label: String,
    port: u16,
    method: Option<String>,
    path: String,
    headers: Option<BTreeMap<String, String>>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
    tokenize: Option<Vec<u32>>,
    #[serde(borrow)]
    render: Option<&'a RawValue>,
    t_start_unix_ns: u64,
    t_end_unix_ns: u64,
    status: u16,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RenderedPrompt {
    token_ids: Vec<u32>,
}

/// Reads the lines of a `kv_events*.jsonl`; empty lines are stepped over.
pub fn messages(text: &[u8]) -> impl Iterator<Item = Result<RecordedMessage, TraceError>> {
    lines(text).map(|(line, text)| {
        let fault = |message: String| TraceError { line, message };
        let parsed: MessageLine<'_> = parse_line(text).map_err(fault)?;
        let frames: Option<Vec<Vec<u8>>> =
            parsed.frames_b64.iter().map(|frame| base64::decode(frame)).collect();
        let frames = frames.ok_or_else(|| fault("`frames_b64` is not base64".to_owned()))?;
        Ok(RecordedMessage { recv_unix_ns: parsed.recv_unix_ns, frames })
    })
}

/// Reads the lines of a `requests.jsonl`; empty lines are stepped over.
pub fn requests(text: &[u8]) -> impl Iterator<Item = Result<RecordedRequest, TraceError>> {
    lines(text).map(|(line, text)| {
        let fault = |message: String| TraceError { line, message };
        let parsed: RequestLine<'_> = parse_line(text).map_err(fault)?;
        Ok(RecordedRequest {
            label: parsed.label,
            port: parsed.port,
            method: parsed.method.unwrap_or_else(|| "POST".to_owned()),
            path: parsed.path,
            headers: parsed.headers.unwrap_or_default(),
            body: parsed.body.map(|body| body.get().as_bytes().to_vec()).unwrap_or_default(),
            tokenize: parsed.tokenize,
            render: parsed.render.map(rendered_prompts).unwrap_or_default(),
            t_start_unix_ns: parsed.t_start_unix_ns,
            t_end_unix_ns: parsed.t_end_unix_ns,
            status: parsed.status,
            usage: parsed.usage.and_then(|usage| usage::parse_object(usage.get().as_bytes())),
            response: parsed.response.map(text_of).unwrap_or_default(),
        })
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let numbered = text.split(|byte| *byte == b'\n').enumerate();
    numbered.map(|(at, line)| (at + 1, line.trim_ascii())).filter(|(_, line)| !line.is_empty())
}

fn parse_line<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, String> {
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("{} bytes, more than the limit of {LINE_BYTES_MAX}", line.len()));
    }
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

/// A render answer is one object, a list of them, or the text of an error.
fn rendered_prompts(render: &RawValue) -> Vec<Vec<u32>> {
    let text = render.get();
    let prompts = match text.as_bytes().first() {
        Some(b'[') => serde_json::from_str(text).unwrap_or_default(),
        Some(b'{') => serde_json::from_str(text).map(|prompt| vec![prompt]).unwrap_or_default(),
        _ => Vec::new(),
    };
    prompts.into_iter().map(|prompt: RenderedPrompt| prompt.token_ids).collect()
}

fn text_of(value: &RawValue) -> String {
    serde_json::from_str(value.get()).unwrap_or_else(|_| value.get().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::kv_event;
    use crate::request::{self, Prompt};

    fn data(name: &str) -> Vec<u8> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/");
        std::fs::read(format!("{path}{name}")).unwrap()
    }

    #[test]
    fn a_recorded_stream() {
        let text = data("kv_event_frames.jsonl");
        let mut count = 0;
        for message in messages(&text) {
            let message = message.unwrap();
            assert!(message.seq().is_some() && message.frames[0].starts_with(b"kv@"));
            assert!(kv_event::decode_batch(message.payload().unwrap()).is_ok());
            count += 1;
        }
        assert_eq!(count, 45);
    }

    #[test]
    fn recorded_requests() {
        let text = data("requests.jsonl");
        let requests: Vec<RecordedRequest> = requests(&text).map(Result::unwrap).collect();
        assert!(requests.len() >= 12);
        for recorded in &requests {
            let api = Api::from_path(&recorded.path);
            let body = match request::parse(api, &recorded.body) {
                Ok(body) => body,
                Err(error) => panic!("{}: {error}", recorded.label),
            };
            assert!(recorded.t_start_unix_ns <= recorded.t_end_unix_ns);
            let label = recorded.label.as_str();
            match (label, &body.prompt) {
                ("two-prompts", Prompt::Texts(texts)) => {
                    assert_eq!((texts.len(), recorded.render.len()), (2, 2));
                }
                (_, Prompt::Texts(texts)) => assert_eq!(texts.len(), 1, "{label}"),
                (_, Prompt::TokenIds(ids)) => assert_eq!(*ids, recorded.render, "{label}"),
                (_, Prompt::Chat(chat)) => {
                    assert!(chat.messages.json().starts_with('['), "{label}");
                    assert_eq!(chat.tools.is_some(), label == "chat-tools");
                    assert_eq!(chat.chat_template_kwargs.is_some(), label == "chat-no-think");
                }
                (_, Prompt::None(_) | Prompt::Opaque(_)) => assert_eq!(api, Api::Other, "{label}"),
            }
            assert_eq!(body.cache_salt.is_some(), label.contains("salt"), "{label}");
            assert_eq!(body.session_id.is_some(), label == "session-id", "{label}");
            assert_eq!(recorded.usage.is_some(), api != Api::Other, "{label}");
            if let (Some(usage), Some(ids)) = (recorded.usage, &recorded.tokenize) {
                assert_eq!(usage.prompt_tokens as usize, ids.len(), "{label}");
                assert!(usage.cached_tokens.is_some());
            }
        }
        let reset = requests.iter().find(|request| request.label == "reset_prefix_cache").unwrap();
        assert_eq!(
            (reset.method.as_str(), reset.response.as_str()),
            ("POST", r#"{"success":true}"#)
        );
        assert!(reset.body.is_empty());
    }

    #[test]
    fn faults_name_their_line() {
        let text = b"\n{\"recv_unix_ns\":1,\"frames_b64\":[\"AA==\"]}\n{\"recv_unix_ns\":1}\n\
            {\"recv_unix_ns\":1,\"frames_b64\":[\"A\"]}";
        let read: Vec<_> = messages(text).collect();
        assert_eq!(read[0], Ok(RecordedMessage { recv_unix_ns: 1, frames: vec![vec![0]] }));
        assert_eq!(read[1].as_ref().unwrap_err().line, 3);
        assert_eq!(read[2].as_ref().unwrap_err().to_string(), "line 4: `frames_b64` is not base64");
        let bad = requests(b"{}").next().unwrap().unwrap_err();
        assert!(bad.message.starts_with("missing field"), "{bad}");
    }
}
