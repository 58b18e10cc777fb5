//! Which variables does `chat_template_kwargs` set, if all of them are simple?

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::values::Val;

/// Hands each pair to `set`; `None` where a key or value is not simple, or not allowed. `set` may
/// have been called even so.
pub(super) fn read<'v>(json: &'v str, set: impl FnMut(&'v str, Val<'v>)) -> Option<()> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    deserializer.deserialize_map(Pairs(set)).ok()?;
    deserializer.end().ok()
}

struct Pairs<F>(F);

impl<'de, F: FnMut(&'de str, Val<'de>)> Visitor<'de> for Pairs<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<&'de str>()? {
            if key == "chat_template" || key == "tokenize" {
                return Err(A::Error::custom("not allowed"));
            }
            let Simple(value) = map.next_value()?;
            self.0(key, value);
        }
        Ok(())
    }
}

/// A value that needs no memory of its own.
struct Simple<'v>(Val<'v>);

impl<'de> Deserialize<'de> for Simple<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Simple<'de>, D::Error> {
        struct SimpleVisitor;
        impl<'de> Visitor<'de> for SimpleVisitor {
            type Value = Simple<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a simple value")
            }

            fn visit_unit<E>(self) -> Result<Simple<'de>, E> {
                Ok(Simple(Val::None))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Simple<'de>, E> {
                Ok(Simple(Val::Bool(value)))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Simple<'de>, E> {
                Ok(Simple(Val::Int(value)))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Simple<'de>, E> {
                let value = i64::try_from(value).map_err(|_| E::custom("a large number"))?;
                Ok(Simple(Val::Int(value)))
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Simple<'de>, E> {
                Ok(Simple(Val::Text(value)))
            }
        }
        deserializer.deserialize_any(SimpleVisitor)
    }
}
