//! What do the answers of gRPC methods say?
//!
//! A frame is a flag (compressed or not), a length of four bytes and a protobuf message, which may
//! be long (log probabilities, the JSON of a whole answer) and is cut anywhere. So nothing is
//! collected: fields are followed byte by byte, those that do not matter are stepped over, and
//! text is handed to the JSON scanner as it comes. A message that makes no sense, or is
//! compressed, says nothing; the next frame is read again.

use super::{JsonScanner, Usage};
use crate::protobuf::VARINT_BYTES_MAX;

/// Whose answers.
#[derive(Clone, Debug)]
pub(super) enum Frames {
    /// `GenerateResponse` of vLLM: a chunk (field 1) or the end (field 2) of one output.
    Generate,
    /// `EmbedResponse` of vLLM.
    Embed,
    /// `google.api.HttpBody`, whose data are JSON or server-sent events.
    HttpBody(Box<JsonScanner>),
}

/// Fields of `GenerateResponse` that hold a message with counts.
const CHUNK: u32 = 1;
const COMPLETE: u32 = 2;
/// Fields of `EmbedResponse` and `HttpBody`.
const EMBED_PROMPT_TOKENS: u32 = 2;
const HTTP_DATA: u32 = 2;

/// Where in a message the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// In the number and wire type of a field.
    Tag,
    /// In an integer.
    Number { field: u32 },
    /// In the length of bytes.
    Length { field: u32 },
    /// In bytes that do not matter.
    Skip { left: u32 },
    /// In the bytes of an HTTP body.
    Data { left: u32 },
    /// In a message that is given up.
    Lost,
}

/// Counts of one inner message.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    prompt: u32,
    completion: u32,
    cached: u32,
}

#[derive(Clone, Debug)]
pub(super) struct FrameScanner {
    answers: Frames,
    /// Head of the frame, as far as it has come.
    head: [u8; 5],
    head_len: usize,
    /// Bytes of the message that are to come.
    left: u32,
    /// Of vLLM's inner message: its field, and how many of its bytes are to come.
    inner: Option<(u32, u32)>,
    step: Step,
    varint: u64,
    varint_len: usize,
    counts: Counts,
    found: Option<Usage>,
    /// Tokens of the outputs that have ended (one request may ask for several); `None` before the
    /// first has.
    completed: Option<u32>,
}

impl FrameScanner {
    pub(super) fn new(answers: Frames) -> FrameScanner {
        FrameScanner {
            answers,
            head: [0; 5],
            head_len: 0,
            left: 0,
            inner: None,
            step: Step::Tag,
            varint: 0,
            varint_len: 0,
            counts: Counts::default(),
            found: None,
            completed: None,
        }
    }

    pub(super) fn usage(&self) -> Option<Usage> {
        match &self.answers {
            Frames::HttpBody(json) => json.found,
            Frames::Generate | Frames::Embed => self.found,
        }
    }

    pub(super) fn push(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while !rest.is_empty() {
            if self.left == 0 {
                rest = self.read_head(rest);
                continue;
            }
            let here = rest.len().min(self.left as usize);
            let used = self.consume(&rest[..here]);
            self.advance(used as u32);
            rest = &rest[used..];
        }
    }

    fn read_head<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let missing = (self.head.len() - self.head_len).min(bytes.len());
        let (head, rest) = bytes.split_at(missing);
        self.head[self.head_len..][..missing].copy_from_slice(head);
        self.head_len += missing;
        if self.head_len == self.head.len() {
            let [flag, length @ ..] = self.head;
            self.head_len = 0;
            self.left = u32::from_be_bytes(length);
            self.step = if flag == 0 { Step::Tag } else { Step::Lost };
            self.inner = None;
            self.varint_len = 0;
            self.varint = 0;
            self.counts = Counts::default();
        }
        rest
    }

    /// Bytes that are to come of the message or, inside of one, of the inner message.
    fn room(&self) -> u32 {
        self.inner.map_or(self.left, |(_, left)| left)
    }

    /// Takes at least one of `bytes`, which belong to one message, and says how many.
    fn consume(&mut self, bytes: &[u8]) -> usize {
        match &mut self.step {
            Step::Lost => bytes.len(),
            Step::Skip { left } | Step::Data { left } => {
                let used = bytes.len().min(*left as usize);
                *left -= used as u32;
                let is_over = *left == 0;
                if let (Step::Data { .. }, Frames::HttpBody(json)) = (self.step, &mut self.answers)
                {
                    json.push(&bytes[..used]);
                }
                if is_over {
                    self.step = Step::Tag;
                }
                used
            }
            Step::Tag | Step::Number { .. } | Step::Length { .. } => {
                self.consume_varint(bytes[0]);
                1
            }
        }
    }

    fn consume_varint(&mut self, byte: u8) {
        if self.varint_len == VARINT_BYTES_MAX {
            self.step = Step::Lost;
            return;
        }
        // The tenth byte has one bit that counts; what is cut off makes no count.
        self.varint |= u64::from(byte & 0x7f).wrapping_shl(7 * self.varint_len as u32);
        self.varint_len += 1;
        if byte >= 0x80 {
            return;
        }
        let value = std::mem::take(&mut self.varint);
        self.varint_len = 0;
        // This byte still counts as to come.
        let room = self.room() - 1;
        self.step = match self.step {
            Step::Tag => self.field(value, room),
            Step::Number { field } => {
                self.count(field, value as u32);
                Step::Tag
            }
            Step::Length { field } => self.enter(field, value, room),
            other => other,
        };
    }

    fn field(&self, tag: u64, room: u32) -> Step {
        let field = u32::try_from(tag >> 3).unwrap_or(0);
        let skip = |left: u32| if left <= room { Step::Skip { left } } else { Step::Lost };
        match (field, tag & 7) {
            (0, _) => Step::Lost,
            (_, 0) => Step::Number { field },
            (_, 1) => skip(8),
            (_, 2) => Step::Length { field },
            (_, 5) => skip(4),
            _ => Step::Lost,
        }
    }

    /// Bytes begin: those of an inner message, of an HTTP body, or others.
    fn enter(&mut self, field: u32, length: u64, room: u32) -> Step {
        let Some(left) = u32::try_from(length).ok().filter(|left| *left <= room) else {
            return Step::Lost;
        };
        match (&self.answers, field) {
            (Frames::Generate, CHUNK | COMPLETE) if self.inner.is_none() => {
                // One more than it has: the last byte of its length is to be counted yet.
                self.inner = Some((field, left + 1));
                Step::Tag
            }
            _ if left == 0 => Step::Tag,
            (Frames::HttpBody(_), HTTP_DATA) => Step::Data { left },
            _ => Step::Skip { left },
        }
    }

    fn count(&mut self, field: u32, value: u32) {
        match (&self.answers, self.inner, field) {
            (Frames::Generate, Some((CHUNK, _)), 2) => self.counts.prompt = value,
            (Frames::Generate, Some((CHUNK, _)), 3) => self.counts.completion = value,
            (Frames::Generate, Some((CHUNK, _)), 4) => self.counts.cached = value,
            (Frames::Generate, Some((COMPLETE, _)), 3) => self.counts.prompt = value,
            (Frames::Generate, Some((COMPLETE, _)), 4) => self.counts.completion = value,
            (Frames::Generate, Some((COMPLETE, _)), 5) => self.counts.cached = value,
            (Frames::Embed, None, EMBED_PROMPT_TOKENS) if value > 0 => {
                self.found = Some(Usage { prompt_tokens: value, ..Usage::default() });
            }
            _ => {}
        }
    }

    /// Bytes have been taken: an inner message, or the whole one, may be over.
    fn advance(&mut self, used: u32) {
        self.left -= used;
        let Some((field, left)) = &mut self.inner else { return };
        *left = left.saturating_sub(used);
        if *left == 0 {
            let field = *field;
            self.inner = None;
            if self.step == Step::Tag && self.varint_len == 0 {
                self.end_inner(field);
            } else {
                self.step = Step::Lost;
            }
        }
    }

    /// Proto3 leaves zeros out, so a message without counts is one that does not tell them.
    fn end_inner(&mut self, field: u32) {
        let Counts { prompt, completion, cached } = std::mem::take(&mut self.counts);
        if prompt == 0 && completion == 0 {
            return;
        }
        if field == COMPLETE {
            self.completed = Some(self.completed.unwrap_or(0).saturating_add(completion));
        }
        self.found = Some(Usage {
            prompt_tokens: prompt,
            completion_tokens: self.completed.unwrap_or(completion),
            cached_tokens: Some(cached),
        });
    }
}
