//! Where do plugin parameters wait when they come before the plugin's `type`?
//!
//! Tools that sort keys (Helm's `toYaml`) write `name`, `parameters`, `type`. Parameters read
//! before their type is known are kept here and read again, typed, afterwards. Files of users are
//! read through `wire::yaml::Tree`, which gives `type` first, so that errors keep their place; this
//! is for every other reader.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{self, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};

/// A value without a type yet. Depth and size are bounded by the format that is read.
#[derive(Clone, Debug, PartialEq)]
pub enum Buffered {
    /// Nothing, or `null`.
    Null,
    /// A truth value.
    Bool(bool),
    /// A number that is negative.
    Signed(i64),
    /// A number that is not.
    Unsigned(u64),
    /// A number with a fraction.
    Float(f64),
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Buffered>),
    /// A map, in the order of the text.
    Map(Vec<(String, Buffered)>),
}

impl Buffered {
    /// Reads the value again, with errors of the outer format.
    pub fn into_deserializer<E: de::Error>(self) -> BufferedDeserializer<E> {
        BufferedDeserializer(self, PhantomData)
    }
}

impl<'de> Deserialize<'de> for Buffered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Buffered, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Buffered;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("parameters")
            }
            fn visit_unit<E>(self) -> Result<Buffered, E> {
                Ok(Buffered::Null)
            }
            fn visit_none<E>(self) -> Result<Buffered, E> {
                Ok(Buffered::Null)
            }
            fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Buffered, D::Error> {
                Buffered::deserialize(inner)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Buffered, E> {
                Ok(Buffered::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Buffered, E> {
                Ok(u64::try_from(value).map_or(Buffered::Signed(value), Buffered::Unsigned))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Buffered, E> {
                Ok(Buffered::Unsigned(value))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Buffered, E> {
                Ok(Buffered::Float(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Buffered, E> {
                Ok(Buffered::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Buffered, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Buffered::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Buffered, A::Error> {
                let mut entries: Vec<(String, Buffered)> = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Buffered::Map(entries))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// See [`Buffered::into_deserializer`].
pub struct BufferedDeserializer<E>(Buffered, PhantomData<E>);

impl<E: de::Error> IntoDeserializer<'_, E> for Buffered {
    type Deserializer = BufferedDeserializer<E>;
    fn into_deserializer(self) -> BufferedDeserializer<E> {
        BufferedDeserializer(self, PhantomData)
    }
}

impl<'de, E: de::Error> Deserializer<'de> for BufferedDeserializer<E> {
    type Error = E;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
        match self.0 {
            Buffered::Null => visitor.visit_unit(),
            Buffered::Bool(value) => visitor.visit_bool(value),
            Buffered::Signed(value) => visitor.visit_i64(value),
            Buffered::Unsigned(value) => visitor.visit_u64(value),
            Buffered::Float(value) => visitor.visit_f64(value),
            Buffered::Text(value) => visitor.visit_string(value),
            Buffered::List(items) => visitor.visit_seq(SeqDeserializer::new(items.into_iter())),
            Buffered::Map(entries) => visitor.visit_map(MapDeserializer::new(entries.into_iter())),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
        match self.0 {
            Buffered::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, E> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, E> {
        match self.0 {
            Buffered::Text(variant) => visitor.visit_enum(variant.into_deserializer()),
            _ => Err(E::custom("expected one of the names listed in the documentation")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}
