//! What do Envoy and an external processor say to each other?
//!
//! The part of `envoy.service.ext_proc.v3` that an Endpoint Picker needs, read field by field
//! without copies and written without intermediate messages. Field numbers: Envoy's
//! `api/envoy/service/ext_proc/v3/external_processor.proto`, `config/core/v3/base.proto`,
//! `type/v3/http_status.proto`, and protobuf's `struct.proto`.

mod answer;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use thiserror::Error;

use crate::protobuf::{Fields, ProtobufError, Value};

pub use answer::{Answer, Dynamic, DynamicValue, HeaderChange, Immediate, Side};

/// The gRPC method.
pub const METHOD: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Most headers of one message; Envoy's own default limit is 100.
pub const HEADERS_MAX: usize = 1_000;

/// Why bytes are no message of Envoy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ExtProcError {
    /// Not protobuf.
    #[error("not a ProcessingRequest: {0}")]
    Protobuf(#[from] ProtobufError),
    /// None of the messages that there are.
    #[error("a ProcessingRequest without a request")]
    Empty,
    /// More headers than [`HEADERS_MAX`].
    #[error("more than {HEADERS_MAX} headers")]
    Headers,
}

/// One message of Envoy's.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// What it is about.
    pub part: Part,
    /// What filters before this one noted.
    pub metadata: Metadata,
    /// How bodies are sent; on the first message of a stream, if at all.
    pub modes: Option<Modes>,
    /// Answers are ignored.
    pub observability: bool,
}

/// The part of a request or an answer that a message brings.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// The client's headers.
    RequestHeaders(HeaderBlock),
    /// A piece of the client's body.
    RequestBody(Piece),
    /// What follows the client's body.
    RequestTrailers,
    /// The answer's headers.
    ResponseHeaders(HeaderBlock),
    /// A piece of the answer's body.
    ResponseBody(Piece),
    /// What follows the answer's body.
    ResponseTrailers,
}

/// Headers as they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderBlock {
    /// Names and values, in order. Names are lower case over HTTP/2 and as Envoy has them.
    pub headers: Vec<(Bytes, Bytes)>,
    /// There is no body.
    pub end_of_stream: bool,
}

impl HeaderBlock {
    /// The first value of a header, by its lower-case name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(key, _)| key.eq_ignore_ascii_case(name.as_bytes()));
        found.map(|(_, value)| &value[..])
    }
}

/// A piece of a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes.
    pub body: Bytes,
    /// It is the last, and no trailers follow.
    pub end_of_stream: bool,
}

/// How Envoy sends bodies (`ProcessingMode.BodySendMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyMode {
    /// Not at all.
    None,
    /// Piece by piece, each waiting for its answer.
    Streamed,
    /// Whole, once the headers are answered.
    Buffered,
    /// Its beginning, once the headers are answered.
    BufferedPartial,
    /// As they come, answered when and how the processor likes.
    FullDuplexStreamed,
    /// A mode for gRPC messages, or one that is not known.
    Other(u32),
}

impl BodyMode {
    fn from_number(number: u32) -> BodyMode {
        match number {
            0 => BodyMode::None,
            1 => BodyMode::Streamed,
            2 => BodyMode::Buffered,
            3 => BodyMode::BufferedPartial,
            4 => BodyMode::FullDuplexStreamed,
            other => BodyMode::Other(other),
        }
    }
}

/// How bodies of both directions are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modes {
    /// The client's.
    pub request: BodyMode,
    /// The answer's.
    pub response: BodyMode,
}

/// Dynamic metadata: filters' names, keys, values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    message: Bytes,
}

/// A text or a list of texts in [`Metadata`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A text.
    Text(String),
    /// The texts of a list; other entries are left out.
    List(Vec<String>),
    /// A value of another type.
    Other,
}

impl Metadata {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.message.is_empty()
    }

    /// The value of a key of a filter; `None`: there is no such key.
    ///
    /// # Errors
    /// [`ProtobufError`]: the message is damaged.
    pub fn get(&self, filter: &str, key: &str) -> Result<Option<Found>, ProtobufError> {
        let Some(fields) = map_value(&self.message, 1, filter)? else { return Ok(None) };
        let Some(value) = map_value(fields, 1, key)? else { return Ok(None) };
        let mut found = Found::Other;
        for field in Fields::new(value) {
            found = match field? {
                (3, Value::Bytes(text)) => Found::Text(lossy(text)),
                (6, Value::Bytes(list)) => Found::List(texts(list)?),
                _ => found,
            };
        }
        Ok(Some(found))
    }
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

/// The texts of a `ListValue`.
fn texts(list: &[u8]) -> Result<Vec<String>, ProtobufError> {
    let mut texts = Vec::new();
    for field in Fields::new(list) {
        let (1, Value::Bytes(value)) = field? else { continue };
        for field in Fields::new(value) {
            if let (3, Value::Bytes(text)) = field? {
                texts.push(lossy(text));
            }
        }
    }
    Ok(texts)
}

/// The message that a `map<string, Message>` at `number` has for a key; the last of several.
fn map_value<'a>(
    message: &'a [u8],
    number: u32,
    wanted: &str,
) -> Result<Option<&'a [u8]>, ProtobufError> {
    let mut found = None;
    for field in Fields::new(message) {
        let (at, Value::Bytes(entry)) = field? else { continue };
        if at != number {
            continue;
        }
        let (mut key, mut value) = (&[][..], &[][..]);
        for field in Fields::new(entry) {
            match field? {
                (1, Value::Bytes(bytes)) => key = bytes,
                (2, Value::Bytes(bytes)) => value = bytes,
                _ => {}
            }
        }
        if key == wanted.as_bytes() {
            found = Some(value);
        }
    }
    Ok(found)
}

impl Message {
    /// Reads a `ProcessingRequest`. Bodies, names and values share the memory of `message`.
    ///
    /// # Errors
    /// [`ExtProcError`]
    pub fn read(message: &Bytes) -> Result<Message, ExtProcError> {
        let mut part = None;
        let mut metadata = Metadata::default();
        let (mut modes, mut observability) = (None, false);
        for field in Fields::new(message) {
            let (number, value) = field?;
            let inner = value.bytes();
            match number {
                2 => part = Some(Part::RequestHeaders(header_block(message, inner)?)),
                3 => part = Some(Part::ResponseHeaders(header_block(message, inner)?)),
                4 => part = Some(Part::RequestBody(piece(message, inner)?)),
                5 => part = Some(Part::ResponseBody(piece(message, inner)?)),
                6 => part = Some(Part::RequestTrailers),
                7 => part = Some(Part::ResponseTrailers),
                8 => metadata.message = message.slice_ref(inner),
                10 => observability = value.is_true(),
                11 => modes = Some(read_modes(inner)?),
                _ => {}
            }
        }
        let part = part.ok_or(ExtProcError::Empty)?;
        Ok(Message { part, metadata, modes, observability })
    }
}

/// An `HttpHeaders`.
fn header_block(whole: &Bytes, message: &[u8]) -> Result<HeaderBlock, ExtProcError> {
    let mut block = HeaderBlock::default();
    for field in Fields::new(message) {
        match field? {
            (1, Value::Bytes(map)) => header_map(whole, map, &mut block.headers)?,
            (3, value) => block.end_of_stream = value.is_true(),
            _ => {}
        }
    }
    Ok(block)
}

/// A `HeaderMap`. Values stand in `raw_value`, or in `value` where a proxy was told so.
fn header_map(
    whole: &Bytes,
    map: &[u8],
    into: &mut Vec<(Bytes, Bytes)>,
) -> Result<(), ExtProcError> {
    for field in Fields::new(map) {
        let (1, Value::Bytes(header)) = field? else { continue };
        let (mut name, mut value, mut raw) = (&[][..], &[][..], &[][..]);
        for field in Fields::new(header) {
            match field? {
                (1, Value::Bytes(bytes)) => name = bytes,
                (2, Value::Bytes(bytes)) => value = bytes,
                (3, Value::Bytes(bytes)) => raw = bytes,
                _ => {}
            }
        }
        if into.len() == HEADERS_MAX {
            return Err(ExtProcError::Headers);
        }
        let value = if raw.is_empty() { value } else { raw };
        into.push((whole.slice_ref(name), whole.slice_ref(value)));
    }
    Ok(())
}

/// An `HttpBody`.
fn piece(whole: &Bytes, message: &[u8]) -> Result<Piece, ExtProcError> {
    let mut piece = Piece::default();
    for field in Fields::new(message) {
        match field? {
            (1, Value::Bytes(body)) => piece.body = whole.slice_ref(body),
            (2, value) => piece.end_of_stream = value.is_true(),
            _ => {}
        }
    }
    Ok(piece)
}

/// A `ProtocolConfiguration`.
fn read_modes(message: &[u8]) -> Result<Modes, ExtProcError> {
    let mut modes = Modes { request: BodyMode::None, response: BodyMode::None };
    for field in Fields::new(message) {
        let (number, value) = field?;
        let mode = BodyMode::from_number(value.uint32().unwrap_or(0));
        match number {
            1 => modes.request = mode,
            2 => modes.response = mode,
            _ => {}
        }
    }
    Ok(modes)
}
