//! Where in an answer stands the name of the model that made it?
//!
//! At the top level of a JSON document, or of an object that the top level calls `message`
//! (Anthropic's `message_start`) or `response` (the events of OpenAI's Responses API). A document
//! is the whole answer, or what follows `data:` on a line of server-sent events. Everything deeper
//! belongs to the client: arguments of tools, schemas, generated JSON.
//!
//! Only the depth and the last key are kept, whatever the nesting. An event whose data is spread
//! over several lines is not looked into: no engine writes that.

use memchr::memchr3;

/// The key of the name.
const MODEL: &[u8] = b"model";
/// Keys of the top level whose objects have the key, too.
const CARRIERS: [&[u8]; 2] = [b"message", b"response"];
/// Bytes of the longest of these keys.
const KEY_BYTES_MAX: usize = 8;
/// What a document of a server-sent event follows, at its line's start.
const DATA: &[u8] = b"data:";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Nothing but white space has come.
    #[default]
    Start,
    /// At a line's start, behind so many bytes of `data:`.
    Line(usize),
    /// In a line, or in the rest of one, without a document.
    Skipped,
    /// Behind `data:`.
    Data,
    /// In a document, between strings.
    Between,
    /// In a key of a watched object.
    Key,
    /// In another string.
    Text,
}

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Model,
    Carrier,
    Other,
}

/// What comes next in a watched object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Due {
    #[default]
    Key,
    Colon(Known),
    Value(Known),
}

/// A walk over an answer cut into chunks anywhere. What is no JSON leads it astray no further than
/// to the end of its document, or of its line in an event.
#[derive(Clone, Debug, Default)]
pub(super) struct Walk {
    place: Place,
    /// The document ends where its line does.
    is_event: bool,
    /// A backslash that counts ends the bytes before.
    escaped: bool,
    /// Open objects and arrays.
    depth: usize,
    /// The outermost of them that may have the name, at most two. The innermost one is watched
    /// when it is the last of these.
    path: usize,
    due: Due,
    key: [u8; KEY_BYTES_MAX],
    /// Bytes of the key, also of those that `key` has no room for.
    key_len: usize,
}

impl Walk {
    /// Walks on from `bytes[at]`, to the opening quote of the next string that is a model's name.
    /// The walk stops before it; [`Walk::enter`] or [`Walk::skip`] says how it goes on.
    pub fn next_name(&mut self, bytes: &[u8], mut at: usize) -> Option<usize> {
        while let Some((byte, behind)) = bytes.get(at..).and_then(<[u8]>::split_first) {
            at += match self.place {
                Place::Between => {
                    if *byte == b'"' && self.is_watched() && self.due == Due::Value(Known::Model) {
                        return Some(at);
                    }
                    self.between(*byte);
                    let in_text = self.place != Place::Between;
                    if in_text { 1 } else { 1 + behind.iter().take_while(|b| is_dull(**b)).count() }
                }
                Place::Key | Place::Text => self.string(&bytes[at..]),
                Place::Skipped => self.line(&bytes[at..]),
                Place::Start | Place::Line(_) | Place::Data => {
                    self.before(*byte);
                    1
                }
            };
        }
        None
    }

    /// The walk goes on behind the quote that it stopped at, inside of the string.
    pub fn enter(&mut self) {
        self.place = Place::Text;
    }

    /// The walk goes on behind the string that it stopped at.
    pub fn skip(&mut self) {
        self.due = Due::Value(Known::Other);
    }

    fn is_watched(&self) -> bool {
        self.depth == self.path
    }

    /// A byte before a document.
    fn before(&mut self, byte: u8) {
        let matched = match self.place {
            Place::Line(matched) => matched,
            _ => 0,
        };
        self.place = match (self.place, byte) {
            (Place::Start | Place::Data, b'{' | b'[') => {
                self.is_event = self.place == Place::Data;
                (self.depth, self.path) = (0, 0);
                self.open(byte);
                Place::Between
            }
            (Place::Start, b' ' | b'\t' | b'\r' | b'\n') => Place::Start,
            (_, b'\r' | b'\n') => Place::Line(0),
            (Place::Data, b' ' | b'\t') => Place::Data,
            (Place::Data, _) => Place::Skipped,
            _ if DATA.get(matched) != Some(&byte) => Place::Skipped,
            _ if matched + 1 == DATA.len() => Place::Data,
            _ => Place::Line(matched + 1),
        };
    }

    /// How many of these bytes are the rest of a line.
    fn line(&mut self, bytes: &[u8]) -> usize {
        match memchr::memchr2(b'\n', b'\r', bytes) {
            None => bytes.len(),
            Some(end) => {
                self.place = Place::Line(0);
                end + 1
            }
        }
    }

    /// How many of these bytes are dealt with: up to the string's end or to a backslash in it.
    fn string(&mut self, bytes: &[u8]) -> usize {
        if std::mem::take(&mut self.escaped) {
            return usize::from(bytes.first() != Some(&b'\n'));
        }
        let found = memchr3(b'"', b'\\', b'\n', bytes);
        let end = found.unwrap_or(bytes.len());
        if self.place == Place::Key {
            // No known key has a backslash: one with escapes is another one.
            let is_escape = bytes.get(end) == Some(&b'\\');
            self.extend_key(&bytes[..end + usize::from(is_escape)]);
        }
        match bytes.get(end) {
            Some(b'\\') => self.escaped = true,
            Some(b'\n') if self.is_event => self.place = Place::Line(0),
            Some(b'"') => {
                if self.place == Place::Key {
                    self.due = Due::Colon(self.known());
                }
                self.place = Place::Between;
            }
            _ => {}
        }
        end + usize::from(found.is_some())
    }

    fn extend_key(&mut self, more: &[u8]) {
        let room = self.key.get_mut(self.key_len..).unwrap_or_default();
        room.iter_mut().zip(more).for_each(|(slot, byte)| *slot = *byte);
        self.key_len = self.key_len.saturating_add(more.len());
    }

    fn known(&self) -> Known {
        match self.key.get(..self.key_len) {
            Some(MODEL) => Known::Model,
            Some(key) if CARRIERS.contains(&key) => Known::Carrier,
            _ => Known::Other,
        }
    }

    /// A byte of a document that is not in a string.
    fn between(&mut self, byte: u8) {
        match (byte, self.due) {
            (b'"', Due::Key) if self.is_watched() => {
                self.key_len = 0;
                self.place = Place::Key;
            }
            (b'"', _) => self.place = Place::Text,
            (b':', Due::Colon(known)) if self.is_watched() => self.due = Due::Value(known),
            (b',', _) if self.is_watched() => self.due = Due::Key,
            (b'{' | b'[', _) => self.open(byte),
            (b'}' | b']', _) => self.close(),
            (b'\n' | b'\r', _) if self.is_event => self.place = Place::Line(0),
            _ => {}
        }
    }

    fn open(&mut self, byte: u8) {
        let may_have = match self.depth {
            0 => true,
            1 => self.path == 1 && self.due == Due::Value(Known::Carrier),
            _ => false,
        };
        self.depth = self.depth.saturating_add(1);
        if may_have && byte == b'{' {
            self.path = self.depth;
            self.due = Due::Key;
        }
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        self.path = self.path.min(self.depth);
        if self.depth == 0 {
            self.place = Place::Skipped;
        }
    }
}

/// Whether a byte between strings means nothing to the walk.
fn is_dull(byte: u8) -> bool {
    !matches!(byte, b'"' | b':' | b',' | b'{' | b'}' | b'[' | b']' | b'\n' | b'\r')
}
