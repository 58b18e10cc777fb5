//! Which conversations are nothing but roles and texts?
//!
//! Nearly all are. Their messages are read in the one pass over the body; others are left as JSON,
//! to be read again by whoever needs what is in them.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Key;

/// A message that is a role and a text, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainTurn<'a> {
    /// Who says it.
    pub role: Cow<'a, str>,
    /// What is said.
    pub content: Arc<str>,
}

/// The messages of a conversation where all of them are plain; `None` for any other value.
struct Turns<'a>(Option<Vec<PlainTurn<'a>>>);

/// One message, if it is plain.
struct Turn<'a>(Option<PlainTurn<'a>>);

/// A string, if it is one.
struct Role<'a>(Option<Cow<'a, str>>);

/// The same, copied once and shared from then on.
struct Content(Option<Arc<str>>);

/// The values that a visitor finds and has no use for.
macro_rules! nothing_of {
    ($value:ident, [$($visit:ident: $type:ty),*]) => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("any JSON value")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok($value(None))
        }

        $(fn $visit<E>(self, _: $type) -> Result<Self::Value, E> {
            Ok($value(None))
        })*
    };
}

/// Lists and objects among them.
macro_rules! skipped {
    (seq $value:ident) => {
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            Ok($value(None))
        }
    };
    (map $value:ident) => {
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok($value(None))
        }
    };
}

impl<'de> Deserialize<'de> for Turns<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Turns<'de>, D::Error> {
        struct TurnsVisitor;
        impl<'de> Visitor<'de> for TurnsVisitor {
            type Value = Turns<'de>;
            nothing_of!(Turns, [visit_bool: bool, visit_u64: u64, visit_i64: i64, visit_f64: f64,
                visit_str: &str]);
            skipped!(map Turns);
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Turns<'de>, A::Error> {
                let mut turns = Vec::new();
                while let Some(Turn(turn)) = seq.next_element()? {
                    let Some(turn) = turn else {
                        while seq.next_element::<IgnoredAny>()?.is_some() {}
                        return Ok(Turns(None));
                    };
                    turns.push(turn);
                }
                Ok(Turns(Some(turns)))
            }
        }
        deserializer.deserialize_any(TurnsVisitor)
    }
}

impl<'de> Deserialize<'de> for Turn<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Turn<'de>, D::Error> {
        struct TurnVisitor;
        impl<'de> Visitor<'de> for TurnVisitor {
            type Value = Turn<'de>;
            nothing_of!(Turn, [visit_bool: bool, visit_u64: u64, visit_i64: i64, visit_f64: f64,
                visit_str: &str]);
            skipped!(seq Turn);
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Turn<'de>, A::Error> {
                let (mut role, mut content, mut is_plain) = (None, None, true);
                while let Some(key) = map.next_key::<Key<'de>>()? {
                    match &*key.0 {
                        "role" => role = map.next_value::<Role<'de>>()?.0,
                        "content" => content = map.next_value::<Content>()?.0,
                        _ => {
                            is_plain = false;
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                let turn = role.zip(content).filter(|_| is_plain);
                Ok(Turn(turn.map(|(role, content)| PlainTurn { role, content })))
            }
        }
        deserializer.deserialize_any(TurnVisitor)
    }
}

impl<'de> Deserialize<'de> for Role<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Role<'de>, D::Error> {
        struct RoleVisitor;
        impl<'de> Visitor<'de> for RoleVisitor {
            type Value = Role<'de>;
            nothing_of!(Role, [visit_bool: bool, visit_u64: u64, visit_i64: i64, visit_f64: f64]);
            skipped!(seq Role);
            skipped!(map Role);
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Role<'de>, E> {
                Ok(Role(Some(Cow::Borrowed(text))))
            }
            fn visit_str<E>(self, text: &str) -> Result<Role<'de>, E> {
                Ok(Role(Some(Cow::Owned(text.to_owned()))))
            }
        }
        deserializer.deserialize_any(RoleVisitor)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            nothing_of!(Content, [visit_bool: bool, visit_u64: u64, visit_i64: i64,
                visit_f64: f64]);
            skipped!(seq Content);
            skipped!(map Content);
            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content(Some(Arc::from(text))))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// A conversation in a body that is being read.
pub(super) struct Conversation<'a> {
    pub(super) turns: Option<Vec<PlainTurn<'a>>>,
    /// Where its JSON begins in the body.
    start: usize,
    /// The JSON; `None` until its end has been passed.
    pub(super) json: Option<&'a [u8]>,
}

impl<'a> Conversation<'a> {
    /// Reads the value of `key`; an error where the key does not stand in `body` as it is.
    pub(super) fn read<A: MapAccess<'a>>(
        map: &mut A,
        body: &[u8],
        key: &Key<'_>,
    ) -> Result<Conversation<'a>, A::Error> {
        let turns = map.next_value()?;
        Conversation::of(body, key, turns).ok_or_else(unplaced)
    }

    fn of(body: &[u8], key: &Key<'_>, turns: Turns<'a>) -> Option<Conversation<'a>> {
        let quote = place_of(body, key)? + key.0.len();
        let behind = body.get(quote + 1..)?;
        let value = behind.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
        Some(Conversation { turns: turns.0, start: body.len() - value.len(), json: None })
    }

    /// Notes where the JSON ends: before `next`, or before the bracket that ends the body. An error
    /// where that cannot be told, or what was passed over is no text.
    pub(super) fn end<E: Error>(
        &mut self,
        body: &'a [u8],
        next: Option<&Key<'_>>,
    ) -> Result<(), E> {
        if self.json.is_none() {
            self.json = Some(self.json_before(body, next).ok_or_else(unplaced)?);
        }
        Ok(())
    }

    fn json_before(&self, body: &'a [u8], next: Option<&Key<'_>>) -> Option<&'a [u8]> {
        let before = match next {
            Some(next) => body.get(..place_of(body, next)?.checked_sub(1)?)?,
            None => body.trim_ascii_end().strip_suffix(b"}")?,
        };
        let before = before.trim_ascii_end();
        let before = before.strip_suffix(b",").unwrap_or(before);
        let json = before.get(self.start..)?.trim_ascii_end();
        if self.turns.is_none() {
            std::str::from_utf8(json).ok()?;
        }
        Some(json)
    }
}

/// Ends the attempt to read a body in one pass.
fn unplaced<E: Error>() -> E {
    E::custom("the messages cannot be found in the body")
}

/// Where the text of a key begins, behind its quote.
fn place_of(body: &[u8], key: &Key<'_>) -> Option<usize> {
    let Cow::Borrowed(text) = &key.0 else { return None };
    let place = (text.as_ptr() as usize).checked_sub(body.as_ptr() as usize)?;
    (body.get(place..place.checked_add(text.len())?) == Some(text.as_bytes())).then_some(place)
}
