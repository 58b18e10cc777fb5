//! Which conversations are nothing but roles and texts?
//!
//! Nearly all are. Their messages, and the texts of other prompts, are read in one pass over the
//! body that asks for no memory: a text stands in the body as it is, or, where it has escapes, in
//! memory that the caller lends. Small values are left to the JSON library, and so is any body
//! that this pass does not take: the library then reads it from the start and says what is wrong.

use std::borrow::Cow;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{DeserializeSeed, Error as _, IntoDeserializer, MapAccess};
use serde_json::{Deserializer, Error};

use super::{Chat, Fields, FieldsVisitor, Messages, Prompt, RequestBody};
use crate::api::Api;

/// A message that is a role and a text, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainTurn<'a> {
    /// Who says it.
    pub role: Cow<'a, str>,
    /// What is said.
    pub content: Cow<'a, str>,
}

/// Lists that are used again by request after request.
#[derive(Debug, Default)]
pub struct Lists {
    pub(super) turns: Vec<PlainTurn<'static>>,
    pub(super) texts: Vec<Cow<'static, str>>,
}

impl Lists {
    /// Takes the memory of the lists of a body back.
    pub fn take_back(&mut self, body: RequestBody<'_>) {
        match body.prompt {
            Prompt::Chat(Chat { messages: Messages::Plain { turns, .. }, .. }) => {
                self.turns = emptied(turns);
            }
            Prompt::Texts(texts) => self.texts = emptied(texts),
            _ => {}
        }
    }
}

/// A list without items in the memory of another: the standard library collects in place where
/// items are of one size.
pub fn emptied<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    list.into_iter().filter_map(|_| None).collect()
}

/// The messages of a conversation that are all plain, and their JSON.
#[derive(Debug)]
pub(super) struct Conversation<'a> {
    pub(super) turns: Vec<PlainTurn<'a>>,
    pub(super) json: &'a [u8],
}

/// Reads a body in one pass in memory of the caller; `None` for an API or a body that is read in
/// the library's way.
pub(super) fn attempt<'a>(
    api: Api,
    body: &'a [u8],
    lent: &'a mut [u8],
    lists: &mut Lists,
) -> Option<Fields<'a>> {
    match api {
        Api::ChatCompletions => {
            read(api, body, lent, emptied(std::mem::take(&mut lists.turns))).ok()
        }
        Api::Completions => {
            let fields = read(api, body, lent, Vec::new()).ok()?;
            Some(Fields { texts: emptied(std::mem::take(&mut lists.texts)), ..fields })
        }
        _ => None,
    }
}

/// Reads a body in one pass. `lent` is what texts with escapes may fill, empty for none; `turns` is
/// an empty list, whose memory is used.
pub(super) fn read<'a>(
    api: Api,
    body: &'a [u8],
    lent: &'a mut [u8],
    turns: Vec<PlainTurn<'a>>,
) -> Result<Fields<'a>, Error> {
    let mut members = Members { api, body, at: 0, key: "", lent, turns, conversation: None };
    let mut fields = members.all(FieldsVisitor { api })?;
    fields.conversation = members.conversation;
    Ok(fields)
}

/// The members of the object that a body is.
struct Members<'a> {
    api: Api,
    body: &'a [u8],
    /// The first byte that was not read.
    at: usize,
    /// Of the value that comes next.
    key: &'a str,
    lent: &'a mut [u8],
    turns: Vec<PlainTurn<'a>>,
    conversation: Option<Conversation<'a>>,
}

impl<'a> Members<'a> {
    fn all(&mut self, visitor: FieldsVisitor) -> Result<Fields<'a>, Error> {
        self.expect(b'{').ok_or_else(unread)?;
        let fields = serde::de::Visitor::visit_map(visitor, &mut *self)?;
        self.space();
        if self.at < self.body.len() { Err(unread()) } else { Ok(fields) }
    }

    fn next(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.next(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    /// Passes over white space and this byte.
    fn expect(&mut self, byte: u8) -> Option<()> {
        self.space();
        let is_next = self.next() == Some(byte);
        self.at += usize::from(is_next);
        is_next.then_some(())
    }

    /// A string, from its quote on.
    fn string(&mut self) -> Option<Cow<'a, str>> {
        self.expect(b'"')?;
        let rest = self.body.get(self.at..)?;
        let clean = clean_len(rest);
        if rest.get(clean) == Some(&b'"') {
            self.at += clean + 1;
            return std::str::from_utf8(rest.get(..clean)?).ok().map(Cow::Borrowed);
        }
        let lent = std::mem::take(&mut self.lent);
        if lent.is_empty() {
            let start = self.at;
            self.skip_string_from(start)?;
            let mut own = vec![0; self.at - start];
            let (_, written) = unescape(rest, &mut own)?;
            own.truncate(written);
            return String::from_utf8(own).ok().map(Cow::Owned);
        }
        let (read, written) = unescape(rest, lent)?;
        self.at += read;
        let (text, lent) = lent.split_at_mut_checked(written)?;
        self.lent = lent;
        std::str::from_utf8(text).ok().map(Cow::Borrowed)
    }

    /// Reads messages; `None` for any that are not plain.
    fn messages(&mut self) -> Option<Conversation<'a>> {
        let start = self.at;
        let mut turns = std::mem::take(&mut self.turns);
        turns.clear();
        self.expect(b'[')?;
        let mut is_first = true;
        while self.expect(b']').is_none() {
            if !is_first {
                self.expect(b',')?;
            }
            is_first = false;
            turns.push(self.message()?);
        }
        Some(Conversation { turns, json: self.body.get(start..self.at)? })
    }

    fn message(&mut self) -> Option<PlainTurn<'a>> {
        let (mut role, mut content) = (None, None);
        self.expect(b'{')?;
        loop {
            let key = self.string()?;
            self.expect(b':')?;
            let field = match &*key {
                "role" => &mut role,
                "content" => &mut content,
                _ => return None,
            };
            // Of a key that is there twice, the last value counts.
            if field.is_some() {
                return None;
            }
            *field = Some(self.string()?);
            if self.expect(b'}').is_some() {
                return Some(PlainTurn { role: role?, content: content? });
            }
            self.expect(b',')?;
        }
    }

    /// The JSON of the next value, whatever it is.
    fn value(&mut self) -> Option<&'a [u8]> {
        let start = self.at;
        let mut depth = 0_usize;
        loop {
            match self.next()? {
                b'"' => self.skip_string_from(self.at + 1)?,
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' | b',' if depth == 0 => break,
                b'}' | b']' => {
                    depth -= 1;
                    self.at += 1;
                }
                _ => self.at += 1,
            }
        }
        self.body.get(start..self.at)
    }

    /// Passes over a string whose text begins at `start`.
    fn skip_string_from(&mut self, start: usize) -> Option<()> {
        self.at = start;
        loop {
            self.at += memchr::memchr2(b'"', b'\\', self.body.get(self.at..)?)?;
            if self.next() == Some(b'"') {
                self.at += 1;
                return Some(());
            }
            self.at += 2;
        }
    }
}

impl<'a> MapAccess<'a> for Members<'a> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'a>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        if self.expect(b'}').is_some() {
            return Ok(None);
        }
        if !self.key.is_empty() {
            self.expect(b',').ok_or_else(unread)?;
        }
        let key = match self.string() {
            Some(Cow::Borrowed(key)) if !key.is_empty() => key,
            _ => return Err(unread()),
        };
        self.expect(b':').ok_or_else(unread)?;
        self.space();
        self.key = key;
        seed.deserialize(BorrowedStrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let start = self.at;
        match (self.api, self.key, self.next()) {
            (Api::ChatCompletions, "messages", _) => {
                self.conversation = self.messages();
                if self.conversation.is_some() {
                    return seed.deserialize(&mut Deserializer::from_slice(b"null"));
                }
                self.at = start;
            }
            (Api::Completions, "prompt", Some(b'"')) => match self.string() {
                Some(Cow::Borrowed(text)) => {
                    return seed.deserialize(BorrowedStrDeserializer::new(text));
                }
                Some(Cow::Owned(text)) => return seed.deserialize(text.into_deserializer()),
                None => self.at = start,
            },
            _ => {}
        }
        let json = self.value().ok_or_else(unread)?;
        let mut deserializer = Deserializer::from_slice(json);
        let value = seed.deserialize(&mut deserializer)?;
        deserializer.end().map(|()| value)
    }
}

/// Ends the attempt to read a body in one pass.
fn unread() -> Error {
    Error::custom("the body cannot be read in one pass")
}

/// How many bytes of a string come before its end, an escape, or what no string may hold.
fn clean_len(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    // The highest bit of each byte that is special. One may be set in error, but only above one
    // that is set rightly: what is subtracted borrows from the byte above.
    let below = |word: u64, least: u8| word.wrapping_sub(ONES * u64::from(least)) & !word;
    let special = |word: &[u8; 8]| {
        let word = u64::from_le_bytes(*word);
        let (quote, escape) = (word ^ (ONES * u64::from(b'"')), word ^ (ONES * u64::from(b'\\')));
        (below(quote, 1) | below(escape, 1) | below(word, b' ')) & (ONES << 7)
    };
    let (pairs, rest) = bytes.as_chunks::<16>();
    for (at, pair) in pairs.iter().enumerate() {
        // Two words at once are one in a vector.
        let (words, _) = pair.as_chunks::<8>();
        let [one, two] = words else { break };
        let (one, two) = (special(one), special(two));
        if one | two != 0 {
            let zeros = if one != 0 { one.trailing_zeros() } else { 64 + two.trailing_zeros() };
            return at * 16 + zeros as usize / 8;
        }
    }
    let is_special = |byte: &u8| matches!(*byte, b'"' | b'\\' | 0..b' ');
    pairs.len() * 16 + rest.iter().position(is_special).unwrap_or(rest.len())
}

/// Writes a string without its escapes, which is never longer, up to its closing quote; how many
/// bytes were read, the quote included, and written. `None` for what no string may be.
fn unescape(from: &[u8], to: &mut [u8]) -> Option<(usize, usize)> {
    let (mut read, mut written) = (0, 0);
    loop {
        let rest = from.get(read..)?;
        let clean = clean_len(rest);
        to.get_mut(written..written + clean)?.copy_from_slice(rest.get(..clean)?);
        read += clean;
        written += clean;
        match rest.get(clean)? {
            b'"' => return Some((read + 1, written)),
            b'\\' => {}
            _ => return None,
        }
        let (width, character) = escaped(from.get(read + 1..)?)?;
        read += 1 + width;
        let mut utf8 = [0; 4];
        let utf8 = character.encode_utf8(&mut utf8).as_bytes();
        to.get_mut(written..written + utf8.len())?.copy_from_slice(utf8);
        written += utf8.len();
    }
}

/// What stands behind a backslash: how many bytes, and which character they mean.
fn escaped(bytes: &[u8]) -> Option<(usize, char)> {
    let simple = match bytes.first()? {
        b'n' => '\n',
        b'"' => '"',
        b'\\' => '\\',
        b't' => '\t',
        b'r' => '\r',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'u' => return escaped_unit(bytes),
        _ => return None,
    };
    Some((1, simple))
}

/// `u` with four digits, or two of that with a backslash between them for characters beyond 16
/// bits.
fn escaped_unit(bytes: &[u8]) -> Option<(usize, char)> {
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 5)?.strip_prefix(b"u")?;
        digits.iter().try_fold(0, |unit, digit| Some(unit * 16 + char::from(*digit).to_digit(16)?))
    };
    let first = unit(0)?;
    if let Some(character) = char::from_u32(first) {
        return Some((5, character));
    }
    let second = unit(6).filter(|second| bytes.get(5) == Some(&b'\\') && second >> 10 == 0x37)?;
    let is_leading = first >> 10 == 0x36;
    let character = char::from_u32(0x10000 + ((first & 0x3ff) << 10) + (second & 0x3ff));
    is_leading.then_some((11, character?))
}
