//! How are many 64-bit names written in little space? As one string, 16 hexadecimal digits each.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};

const DIGITS: usize = 16;

pub(crate) fn serialize<T, S>(names: &[T], serializer: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Into<u64>,
    S: Serializer,
{
    let mut text = String::with_capacity(names.len() * DIGITS);
    for name in names {
        let name: u64 = (*name).into();
        let digit = |at: u32| char::from_digit((name >> (60 - 4 * at)) as u32 & 15, 16);
        text.extend((0..DIGITS as u32).filter_map(digit));
    }
    serializer.serialize_str(&text)
}

pub(crate) fn deserialize<'de, L, D>(deserializer: D) -> Result<L, D::Error>
where
    L: IntoIterator<Item: From<u64>> + FromIterator<L::Item>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_str(Names(PhantomData))
}

struct Names<L>(PhantomData<L>);

impl<L: IntoIterator<Item: From<u64>> + FromIterator<L::Item>> Visitor<'_> for Names<L> {
    type Value = L;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string of {DIGITS} hexadecimal digits for each name")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<L, E> {
        let name = |digits: &[u8]| {
            digits.iter().try_fold(0, |name: u64, digit| {
                let digit = char::from(*digit).to_digit(16)?;
                Some(name << 4 | u64::from(digit))
            })
        };
        let names = text.as_bytes().chunks(DIGITS);
        let whole = text.len().is_multiple_of(DIGITS);
        let names: Option<L> = names.map(|digits| name(digits).map(L::Item::from)).collect();
        names.filter(|_| whole).ok_or_else(|| E::invalid_length(text.len(), &self))
    }
}

/// One name, written the same way.
pub(crate) mod one {
    use serde::de::Error;
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(name: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        super::serialize(std::slice::from_ref(name), serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let names: Vec<u64> = super::deserialize(deserializer)?;
        match names[..] {
            [name] => Ok(name),
            _ => Err(D::Error::custom("write one number of 16 hexadecimal digits")),
        }
    }
}
