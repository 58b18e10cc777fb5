//! How does a request go out under another model's name, and its answer come back under the one
//! that the client gave, every other byte as it was?
//!
//! Nothing is parsed again and nothing is copied but the name: bodies are given as pieces.

mod walk;

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

use walk::Walk;

/// Where in `body` does `text`, a part of it that is a JSON string or `null`, stand?
pub(crate) fn place(body: &[u8], text: &str) -> Option<Range<usize>> {
    let start = (text.as_ptr() as usize).checked_sub(body.as_ptr() as usize)?;
    let place = start..start.checked_add(text.len())?;
    let is_there = body.get(place.clone()) == Some(text.as_bytes());
    (is_there && (text.starts_with('"') || text == "null")).then_some(place)
}

/// A name as JSON writes it, with its quotes.
fn quoted(name: &str) -> Bytes {
    // Strings are written without fail; without the name, the engine would say what is missing.
    Bytes::from(serde_json::to_string(name).unwrap_or_else(|_| "null".to_owned()))
}

/// A body with `name` in the `place` of its model name (`RequestBody::model_place`): what stands
/// before it, the name, and what stands behind it. `None` when the body has no such place.
pub fn replace(body: &Bytes, place: &Range<usize>, name: &str) -> Option<[Bytes; 3]> {
    body.get(place.clone())?;
    Some([body.slice(..place.start), quoted(name), body.slice(place.end..)])
}

/// Gives an answer the model name that the client knows: JSON or server-sent events, cut into
/// chunks anywhere.
///
/// Where the API puts the model's name (`model_name/walk.rs`: `model`, `message.model` and
/// `response.model` of the answer or of an event), the serving model's, however it is escaped,
/// becomes the client's. What the model generates stays as it is, be it JSON with a `model` of its
/// own. Where a chunk ends inside of such a value, the bytes from its quote on wait for the next
/// chunk: at most [`Restorer::held_bytes_max`].
#[derive(Clone, Debug)]
pub struct Restorer {
    /// The serving model's name.
    to: String,
    /// The same with a quote before it.
    opened: Vec<u8>,
    /// Longest form of it in JSON, quotes included.
    value_bytes_max: usize,
    /// The client's name, in quotes.
    from: Bytes,
    /// Begins with the quote that `walk` stopped at; may be the beginning of what is replaced.
    held: Bytes,
    walk: Walk,
}

/// What a string is that stands where the model's name does.
enum Verdict {
    /// Another name.
    Other,
    /// More bytes will tell.
    Undecided,
    /// The serving model's, so many bytes with its quotes.
    Name(usize),
}

impl Restorer {
    /// Replaces `to` by `from` in a new answer.
    pub fn new(to: &str, from: &str) -> Restorer {
        // At most, every UTF-16 unit is written as \uXXXX.
        let value_bytes_max = 2 + 6 * to.encode_utf16().count();
        Restorer {
            to: to.to_owned(),
            opened: [b"\"", to.as_bytes()].concat(),
            value_bytes_max,
            from: quoted(from),
            held: Bytes::new(),
            walk: Walk::default(),
        }
    }

    /// Most bytes that wait for the next chunk.
    pub fn held_bytes_max(&self) -> usize {
        self.value_bytes_max
    }

    /// Takes the next chunk of the answer, and adds what can go on to `out`, in order.
    pub fn push(&mut self, chunk: Bytes, out: &mut impl Extend<Bytes>) {
        let mut rest = chunk;
        while !self.held.is_empty() && !rest.is_empty() {
            let more = rest.split_to(rest.len().min(self.held_bytes_max()));
            let mut joined = BytesMut::with_capacity(self.held.len() + more.len());
            joined.extend_from_slice(&self.held);
            joined.extend_from_slice(&more);
            self.held = Bytes::new();
            self.pass(joined.freeze(), out);
        }
        if !rest.is_empty() {
            self.pass(rest, out);
        }
    }

    /// The answer is over, complete or not, or nothing may wait until its next chunk: what still
    /// waits goes on as it is.
    pub fn finish(&mut self, out: &mut impl Extend<Bytes>) {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return;
        }
        let mut found = Some(0);
        while let Some(quote) = found {
            self.walk.enter();
            found = self.walk.next_name(&held, quote + 1);
        }
        emit(held, out);
    }

    /// Passes bytes on up to those that must wait.
    fn pass(&mut self, mut bytes: Bytes, out: &mut impl Extend<Bytes>) {
        let mut at = 0;
        while let Some(found) = self.walk.next_name(&bytes, at) {
            match self.examine(bytes.get(found..).unwrap_or_default()) {
                Verdict::Other => {
                    self.walk.enter();
                    at = found + 1;
                }
                Verdict::Undecided => {
                    self.held = bytes.split_off(found);
                    break;
                }
                Verdict::Name(len) => {
                    self.walk.skip();
                    let rest = bytes.split_off(found + len);
                    bytes.truncate(found);
                    emit(bytes, out);
                    emit(self.from.clone(), out);
                    (bytes, at) = (rest, 0);
                }
            }
        }
        emit(bytes, out);
    }

    /// Bytes that begin with a string, or with as much of it as has come.
    fn examine(&self, bytes: &[u8]) -> Verdict {
        let value = bytes.get(..self.value_bytes_max).unwrap_or(bytes);
        match end_of_string(value) {
            Some(end) if self.is_name(&value[..end]) => Verdict::Name(end),
            None if self.may_be_name(value) => Verdict::Undecided,
            _ => Verdict::Other,
        }
    }

    /// Whether a complete string is the name.
    fn is_name(&self, string: &[u8]) -> bool {
        if !string.contains(&b'\\') {
            return string.strip_suffix(b"\"") == Some(&self.opened[..]);
        }
        serde_json::from_slice::<Cow<'_, str>>(string).is_ok_and(|text| text == self.to)
    }

    /// Whether a string that is not complete may become the name.
    fn may_be_name(&self, string: &[u8]) -> bool {
        let is_short = string.len() < self.value_bytes_max;
        is_short && (self.opened.starts_with(string) || string.contains(&b'\\'))
    }
}

/// Where a string that begins at the first byte ends.
fn end_of_string(bytes: &[u8]) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in bytes.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn emit(bytes: Bytes, out: &mut impl Extend<Bytes>) {
    out.extend(Some(bytes).filter(|bytes| !bytes.is_empty()));
}

#[cfg(test)]
mod tests;
