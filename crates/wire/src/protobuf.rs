//! What fields does a protobuf message have?
//!
//! A reader of the wire format for a handful of messages, without generated code: field by field,
//! borrowing, no recursion. Groups, which proto3 does not have, are refused.

#[cfg(test)]
pub(crate) mod fixture;

use thiserror::Error;

/// Longest encoding of an integer.
pub const VARINT_BYTES_MAX: usize = 10;

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProtobufError {
    /// A field reaches beyond the end.
    #[error("a field is cut off")]
    Truncated,
    /// An integer has more than ten bytes or 64 bits.
    #[error("an integer is too long")]
    Varint,
    /// No field may have this number.
    #[error("a field has the number 0 or one that is too large")]
    Number,
    /// A wire type that proto3 does not use.
    #[error("a field has the wire type {0}, which is not used any more")]
    WireType(u8),
}

/// The value of a field as it is encoded; the schema says what it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Integers, booleans, enumerations.
    Varint(u64),
    /// `fixed64`, `double`.
    Fixed64(u64),
    /// Strings, bytes, messages, packed lists.
    Bytes(&'a [u8]),
    /// `fixed32`, `float`.
    Fixed32(u32),
}

impl<'a> Value<'a> {
    /// The bytes of a string, a message or a packed list; empty for another encoding.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Value::Bytes(bytes) => bytes,
            _ => &[],
        }
    }

    /// An unsigned integer of 32 bits, cut as protobuf's own readers do; `None` for another
    /// encoding.
    pub fn uint32(self) -> Option<u32> {
        match self {
            Value::Varint(value) => Some(value as u32),
            _ => None,
        }
    }

    /// Whether a boolean is true.
    pub fn is_true(self) -> bool {
        matches!(self, Value::Varint(value) if value != 0)
    }
}

/// The fields of a message, in order, each as its number and value.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The fields of `message`. After an error there are no more.
    pub fn new(message: &'a [u8]) -> Fields<'a> {
        Fields { rest: message }
    }

    fn read(&mut self) -> Result<(u32, Value<'a>), ProtobufError> {
        let tag = varint(&mut self.rest)?;
        let number = u32::try_from(tag >> 3).map_err(|_| ProtobufError::Number)?;
        if !(1..1 << 29).contains(&number) {
            return Err(ProtobufError::Number);
        }
        let value = match (tag & 7) as u8 {
            0 => Value::Varint(varint(&mut self.rest)?),
            1 => Value::Fixed64(u64::from_le_bytes(*self.array()?)),
            2 => {
                let length = varint(&mut self.rest)?;
                let length = usize::try_from(length).map_err(|_| ProtobufError::Truncated)?;
                let (bytes, rest) =
                    self.rest.split_at_checked(length).ok_or(ProtobufError::Truncated)?;
                self.rest = rest;
                Value::Bytes(bytes)
            }
            5 => Value::Fixed32(u32::from_le_bytes(*self.array()?)),
            other => return Err(ProtobufError::WireType(other)),
        };
        Ok((number, value))
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], ProtobufError> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(ProtobufError::Truncated)?;
        self.rest = rest;
        Ok(array)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Value<'a>), ProtobufError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// Takes one integer off the front.
///
/// # Errors
/// [`ProtobufError::Truncated`] and [`ProtobufError::Varint`].
pub fn varint(bytes: &mut &[u8]) -> Result<u64, ProtobufError> {
    let mut value: u64 = 0;
    for at in 0..VARINT_BYTES_MAX {
        let byte = *bytes.get(at).ok_or(ProtobufError::Truncated)?;
        let bits = u64::from(byte & 0x7f);
        if at == VARINT_BYTES_MAX - 1 && byte > 1 {
            return Err(ProtobufError::Varint);
        }
        value |= bits << (7 * at);
        if byte < 0x80 {
            *bytes = &bytes[at + 1..];
            return Ok(value);
        }
    }
    Err(ProtobufError::Varint)
}

/// Appends a repeated `uint32`: packed into one field, or one integer of a field of its own.
///
/// # Errors
/// [`ProtobufError`], and then `into` may hold some of the integers.
pub fn push_uint32s(value: Value<'_>, into: &mut Vec<u32>) -> Result<(), ProtobufError> {
    match value {
        Value::Varint(value) => into.push(value as u32),
        Value::Bytes(mut packed) => {
            while !packed.is_empty() {
                into.push(varint(&mut packed)? as u32);
            }
        }
        Value::Fixed64(_) => return Err(ProtobufError::WireType(1)),
        Value::Fixed32(_) => return Err(ProtobufError::WireType(5)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvroute_core::Rng;

    use super::fixture::Message;
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<(u32, Value<'_>)>, ProtobufError> {
        Fields::new(bytes).collect()
    }

    #[test]
    fn values_of_every_encoding() {
        // The examples of protobuf's documentation of its encoding.
        assert_eq!(read(&[0x08, 0x96, 0x01]), Ok(vec![(1, Value::Varint(150))]));
        assert_eq!(read(b"\x12\x07testing"), Ok(vec![(2, Value::Bytes(b"testing"))]));
        assert_eq!(read(&[0x0d, 1, 0, 0, 0]), Ok(vec![(1, Value::Fixed32(1))]));
        assert_eq!(
            read(&[0x09, 1, 0, 0, 0, 0, 0, 0, 2]),
            Ok(vec![(1, Value::Fixed64(2 << 56 | 1))])
        );
        assert_eq!(read(&[]), Ok(vec![]));
        let longest = [0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(read(&longest), Ok(vec![(1, Value::Varint(u64::MAX))]));
        let mut ids = Vec::new();
        push_uint32s(Value::Bytes(&[3, 0x8e, 2, 0x9e, 0xa7, 5]), &mut ids).unwrap();
        push_uint32s(Value::Varint(7), &mut ids).unwrap();
        assert_eq!(ids, [3, 270, 86942, 7]);
    }

    #[test]
    fn damage_is_named() {
        use ProtobufError::*;
        let too_long = [0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        let table: &[(&[u8], ProtobufError)] = &[
            (&[0x08], Truncated),
            (&[0x08, 0x80], Truncated),
            (&[0x12, 5, b'a'], Truncated),
            (&[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], Truncated),
            (&[0x0d, 1, 0, 0], Truncated),
            (&[0x09, 1], Truncated),
            (&too_long, Varint),
            (&[0xff; 11], Varint),
            (&[0x00, 0], Number),
            (&[0x80, 0x80, 0x80, 0x80, 0x10, 0], Number),
            (&[0x0b], WireType(3)),
            (&[0x0c], WireType(4)),
            (&[0x0f], WireType(7)),
        ];
        for (bytes, error) in table {
            assert_eq!(read(bytes), Err(*error), "{bytes:?}");
            // What comes after an error is not read.
            assert_eq!(Fields::new(bytes).count(), 1, "{bytes:?}");
        }
        assert_eq!(push_uint32s(Value::Bytes(&[0x80]), &mut Vec::new()), Err(Truncated));
        assert_eq!(push_uint32s(Value::Fixed32(1), &mut Vec::new()), Err(WireType(5)));
    }

    #[test]
    fn what_is_written_is_read() {
        for seed in 0..500 {
            let mut rng = Rng::seeded(seed);
            let mut message = Message::new();
            let mut expected = Vec::new();
            for _ in 0..rng.below(6) {
                let number = 1 + rng.below(40) as u32;
                if rng.below(2) == 0 {
                    let value = rng.next_u64() >> rng.below(64);
                    message = message.varint(number, value);
                    expected.push((number, None, value));
                } else {
                    let bytes: Vec<u8> = (0..rng.below(300)).map(|at| at as u8).collect();
                    message = message.bytes(number, &bytes);
                    expected.push((number, Some(bytes), 0));
                }
            }
            let bytes = message.into_bytes();
            let found: Vec<_> = read(&bytes)
                .unwrap()
                .into_iter()
                .map(|(number, value)| match value {
                    Value::Varint(value) => (number, None, value),
                    other => (number, Some(other.bytes().to_vec()), 0),
                })
                .collect();
            assert_eq!(found, expected, "seed {seed}");
            // A message that is cut between two fields is a message; elsewhere it is an error.
            for at in 0..bytes.len() {
                let whole = Fields::new(&bytes[..at]).filter(Result::is_ok).count();
                assert!(whole <= expected.len());
            }
        }
    }
}
