//! Values of a request body before anyone has decided whether their type is right.
//!
//! A body may name a field twice; Python's `json` keeps the last one. So a wrong type counts only
//! once the whole body has been read, and until then a value is held as whatever it is.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::PROMPTS_PER_REQUEST_MAX;

/// A scalar, or the name of a container whose content is skipped.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Loose<'a> {
    #[default]
    Missing,
    Null,
    Bool(bool),
    Uint(u64),
    Int(i64),
    Float(f64),
    Text(Cow<'a, str>),
    Array,
    Object,
}

impl Loose<'_> {
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Loose::Missing => "nothing",
            Loose::Null => "null",
            Loose::Bool(_) => "a boolean",
            Loose::Uint(_) | Loose::Int(_) => "an integer",
            Loose::Float(_) => "a fraction",
            Loose::Text(_) => "a string",
            Loose::Array => "an array",
            Loose::Object => "an object",
        }
    }

    pub(super) fn is_set(&self) -> bool {
        !matches!(self, Loose::Missing | Loose::Null)
    }

    /// A count, where the value can be read as one; 8.0 is 8, as pydantic reads it.
    pub(super) fn count(&self) -> Option<u32> {
        match self {
            Loose::Uint(value) => Some(u32::try_from(*value).unwrap_or(u32::MAX)),
            Loose::Float(value) if value.fract() == 0.0 && *value >= 0.0 => Some(*value as u32),
            _ => None,
        }
    }

    pub(super) fn flag(&self) -> Option<bool> {
        match self {
            Loose::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Loose<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Loose<'de>, D::Error> {
        deserializer.deserialize_any(LooseVisitor)
    }
}

struct LooseVisitor;

impl<'de> Visitor<'de> for LooseVisitor {
    type Value = Loose<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Loose<'de>, E> {
        Ok(Loose::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Loose<'de>, E> {
        Ok(Loose::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Loose<'de>, E> {
        Ok(Loose::Uint(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Loose<'de>, E> {
        Ok(Loose::Int(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Loose<'de>, E> {
        Ok(Loose::Float(value))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Loose<'de>, E> {
        Ok(Loose::Text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Loose<'de>, E> {
        Ok(Loose::Text(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Loose<'de>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Loose::Array)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loose<'de>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Loose::Object)
    }
}

/// What stands at `prompt`, `input` or `token_ids`.
#[derive(Debug, Default)]
pub(super) enum LoosePrompt<'a> {
    #[default]
    Missing,
    Text(Cow<'a, str>),
    Texts(Vec<Cow<'a, str>>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
    Empty,
    /// More than `PROMPTS_PER_REQUEST_MAX` prompts.
    TooMany,
    /// None of the forms; what was found, and where.
    Wrong(Wrong),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) found: &'static str,
    /// Position in the list, where it is one element that does not fit.
    pub(super) index: Option<usize>,
}

impl<'de> Deserialize<'de> for LoosePrompt<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LoosePrompt<'de>, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

/// The scalars that are no prompt, in one place for both visitors below.
macro_rules! scalars_are {
    ($value:ty, $make:expr) => {
        fn visit_unit<E>(self) -> Result<$value, E> {
            Ok($make(Loose::Null))
        }

        fn visit_bool<E>(self, value: bool) -> Result<$value, E> {
            Ok($make(Loose::Bool(value)))
        }

        fn visit_u64<E>(self, value: u64) -> Result<$value, E> {
            Ok($make(Loose::Uint(value)))
        }

        fn visit_i64<E>(self, value: i64) -> Result<$value, E> {
            Ok($make(Loose::Int(value)))
        }

        fn visit_f64<E>(self, value: f64) -> Result<$value, E> {
            Ok($make(Loose::Float(value)))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<$value, A::Error> {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok($make(Loose::Object))
        }
    };
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = LoosePrompt<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prompt")
    }

    scalars_are!(LoosePrompt<'de>, |value: Loose<'de>| match value {
        Loose::Null => LoosePrompt::Missing,
        other => LoosePrompt::Wrong(Wrong { found: other.type_name(), index: None }),
    });

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<LoosePrompt<'de>, E> {
        Ok(LoosePrompt::Text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<LoosePrompt<'de>, E> {
        Ok(LoosePrompt::Text(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LoosePrompt<'de>, A::Error> {
        let mut prompt = match seq.next_element::<Element<'de>>()? {
            None => return Ok(LoosePrompt::Empty),
            Some(Element::Text(text)) => LoosePrompt::Texts(vec![text]),
            Some(Element::Id(id)) => LoosePrompt::Ids(vec![id]),
            Some(Element::Ids(ids)) => LoosePrompt::IdLists(vec![ids]),
            Some(Element::Wrong(found)) => LoosePrompt::Wrong(Wrong { found, index: Some(0) }),
        };
        let mut index = 0;
        loop {
            index += 1;
            let is_done = matches!(prompt, LoosePrompt::Wrong(_) | LoosePrompt::TooMany);
            if is_done {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                return Ok(prompt);
            }
            let Some(element) = seq.next_element::<Element<'de>>()? else { return Ok(prompt) };
            let prompts_full = index >= PROMPTS_PER_REQUEST_MAX;
            match (&mut prompt, element) {
                (LoosePrompt::Ids(ids), Element::Id(id)) => ids.push(id),
                (LoosePrompt::Texts(_) | LoosePrompt::IdLists(_), _) if prompts_full => {
                    prompt = LoosePrompt::TooMany;
                }
                (LoosePrompt::Texts(texts), Element::Text(text)) => texts.push(text),
                (LoosePrompt::IdLists(lists), Element::Ids(ids)) => lists.push(ids),
                (_, element) => {
                    let found = element.type_name();
                    prompt = LoosePrompt::Wrong(Wrong { found, index: Some(index) });
                }
            }
        }
    }
}

/// One element of a prompt list.
enum Element<'a> {
    Text(Cow<'a, str>),
    Id(u32),
    Ids(Vec<u32>),
    Wrong(&'static str),
}

impl Element<'_> {
    fn type_name(&self) -> &'static str {
        match self {
            Element::Text(_) => "a string",
            Element::Id(_) => "an integer",
            Element::Ids(_) => "an array",
            Element::Wrong(found) => found,
        }
    }
}

impl<'de> Deserialize<'de> for Element<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Element<'de>, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

const NOT_A_TOKEN: &str = "an integer that is no token id";

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or an array of token ids")
    }

    scalars_are!(Element<'de>, |value: Loose<'de>| match value {
        Loose::Uint(id) => u32::try_from(id).map_or(Element::Wrong(NOT_A_TOKEN), Element::Id),
        Loose::Int(_) => Element::Wrong(NOT_A_TOKEN),
        other => Element::Wrong(other.type_name()),
    });

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Element<'de>, E> {
        Ok(Element::Text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Element<'de>, E> {
        Ok(Element::Text(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element<'de>, A::Error> {
        let mut ids = Vec::new();
        let mut wrong = None;
        while let Some(value) = seq.next_element::<Loose<'de>>()? {
            match value {
                Loose::Uint(id) if wrong.is_none() => match u32::try_from(id) {
                    Ok(id) => ids.push(id),
                    Err(_) => wrong = Some(NOT_A_TOKEN),
                },
                Loose::Uint(_) => {}
                Loose::Int(_) => wrong = wrong.or(Some(NOT_A_TOKEN)),
                other => wrong = wrong.or(Some(other.type_name())),
            }
        }
        Ok(wrong.map_or(Element::Ids(ids), Element::Wrong))
    }
}
