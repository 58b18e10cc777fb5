//! How are msgpack bytes read and written without trusting them?
//!
//! A reader over a borrowed slice. It never allocates, never recurses (so nesting depth costs
//! nothing) and never believes a claimed length: every element has at least one byte, so a walk
//! ends with the input. Format: the msgpack specification, `spec.md`.

use thiserror::Error;

/// Why bytes are not the msgpack value asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReadError {
    /// The input ends inside a value.
    #[error("the message ends inside a value at byte {at}")]
    Truncated {
        /// Offset of the value.
        at: usize,
    },
    /// The marker byte that msgpack reserves.
    #[error("byte {at} is 0xc1, which msgpack never uses")]
    Reserved {
        /// Offset of the marker.
        at: usize,
    },
    /// A well-formed value of another type.
    #[error("expected {expected}, found {found} at byte {at}")]
    Type {
        /// What the format asks for.
        expected: &'static str,
        /// What is there.
        found: &'static str,
        /// Offset of the value.
        at: usize,
    },
}

/// The head of one value: the value itself for scalars, the number of children for containers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Head<'a> {
    /// `nil`.
    Nil,
    /// A boolean.
    Bool(bool),
    /// An integer that is not negative.
    Uint(u64),
    /// A negative integer.
    Int(i64),
    /// A float of either width.
    Float(f64),
    /// Text, not yet checked to be UTF-8.
    Str(&'a [u8]),
    /// A byte string.
    Bin(&'a [u8]),
    /// An array and its number of elements, which follow.
    Array(u32),
    /// A map and its number of entries, which follow as key, value.
    Map(u32),
    /// An extension type.
    Ext,
}

impl Head<'_> {
    /// The name of the type, for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Head::Nil => "nil",
            Head::Bool(_) => "a boolean",
            Head::Uint(_) | Head::Int(_) => "an integer",
            Head::Float(_) => "a float",
            Head::Str(_) => "a string",
            Head::Bin(_) => "a byte string",
            Head::Array(_) => "an array",
            Head::Map(_) => "a map",
            Head::Ext => "an extension",
        }
    }
}

/// A position in msgpack bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Starts at the first byte.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    /// Offset of the next byte.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Goes to an offset that `position` returned.
    pub fn rewind(&mut self, position: usize) {
        self.at = position.min(self.bytes.len());
    }

    /// Bytes not read yet. An upper bound for the number of values that can follow.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize, start: usize) -> Result<&'a [u8], ReadError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.get(..len).ok_or(ReadError::Truncated { at: start })?;
        self.at += len;
        Ok(taken)
    }

    /// Big-endian bytes of a fixed number: one bounds check and one load.
    #[inline]
    fn fixed<const N: usize>(&mut self, start: usize) -> Result<[u8; N], ReadError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.first_chunk::<N>().ok_or(ReadError::Truncated { at: start })?;
        self.at += N;
        Ok(*taken)
    }

    fn u16(&mut self, start: usize) -> Result<u16, ReadError> {
        self.fixed(start).map(u16::from_be_bytes)
    }

    fn u32(&mut self, start: usize) -> Result<u32, ReadError> {
        self.fixed(start).map(u32::from_be_bytes)
    }

    fn u64(&mut self, start: usize) -> Result<u64, ReadError> {
        self.fixed(start).map(u64::from_be_bytes)
    }

    /// A length of 1, 2 or 4 bytes, for the first, second and third marker of a family.
    fn length(&mut self, which: u8, start: usize) -> Result<usize, ReadError> {
        Ok(match which {
            0 => usize::from(self.fixed::<1>(start)?[0]),
            1 => usize::from(self.u16(start)?),
            _ => self.u32(start)? as usize,
        })
    }

    /// Reads the next head; of a container the children remain to be read.
    #[inline]
    pub fn head(&mut self) -> Result<Head<'a>, ReadError> {
        let at = self.at;
        let marker = *self.bytes.get(at).ok_or(ReadError::Truncated { at })?;
        self.at += 1;
        Ok(match marker {
            0x00..=0x7f => Head::Uint(u64::from(marker)),
            0xcd => Head::Uint(u64::from(self.u16(at)?)),
            0xce => Head::Uint(u64::from(self.u32(at)?)),
            0x80..=0x8f => Head::Map(u32::from(marker & 0x0f)),
            0x90..=0x9f => Head::Array(u32::from(marker & 0x0f)),
            0xa0..=0xbf => Head::Str(self.take(usize::from(marker & 0x1f), at)?),
            0xe0..=0xff => Head::Int(i64::from(marker as i8)),
            _ => self.long_head(marker, at)?,
        })
    }

    /// Reads an unsigned integer of at most 32 bits in one of the forms that token ids have;
    /// `None`, with nothing read, for anything else. Token ids are nearly all of an event's bytes,
    /// so they have a path of their own beside `head`.
    #[inline]
    pub fn short_uint(&mut self) -> Option<u32> {
        let rest = self.bytes.get(self.at..)?;
        let (value, len) = match *rest.first()? {
            marker @ 0x00..=0x7f => (u32::from(marker), 1),
            0xcd => (u32::from(u16::from_be_bytes(*rest[1..].first_chunk()?)), 3),
            0xce => (u32::from_be_bytes(*rest[1..].first_chunk()?), 5),
            _ => return None,
        };
        self.at += len;
        Some(value)
    }

    fn long_head(&mut self, marker: u8, at: usize) -> Result<Head<'a>, ReadError> {
        let signed = |value: i64| match u64::try_from(value) {
            Ok(value) => Head::Uint(value),
            Err(_) => Head::Int(value),
        };
        Ok(match marker {
            0xc0 => Head::Nil,
            0xc2 => Head::Bool(false),
            0xc3 => Head::Bool(true),
            0xcc => Head::Uint(u64::from(self.fixed::<1>(at)?[0])),
            0xcf => Head::Uint(self.u64(at)?),
            0xd0 => signed(i64::from(self.fixed::<1>(at)?[0] as i8)),
            0xd1 => signed(i64::from(self.u16(at)? as i16)),
            0xd2 => signed(i64::from(self.u32(at)? as i32)),
            0xd3 => signed(self.u64(at)? as i64),
            0xca => Head::Float(f64::from(f32::from_bits(self.u32(at)?))),
            0xcb => Head::Float(f64::from_bits(self.u64(at)?)),
            0xd9..=0xdb => {
                let len = self.length(marker - 0xd9, at)?;
                Head::Str(self.take(len, at)?)
            }
            0xc4..=0xc6 => {
                let len = self.length(marker - 0xc4, at)?;
                Head::Bin(self.take(len, at)?)
            }
            0xdc | 0xdd => Head::Array(self.length(marker - 0xdb, at)? as u32),
            0xde | 0xdf => Head::Map(self.length(marker - 0xdd, at)? as u32),
            0xc7..=0xc9 => {
                let len = self.length(marker - 0xc7, at)?;
                self.take(len.saturating_add(1), at)?;
                Head::Ext
            }
            0xd4..=0xd8 => {
                self.take((1 << (marker - 0xd4)) + 1, at)?;
                Head::Ext
            }
            _ => return Err(ReadError::Reserved { at }),
        })
    }

    /// Steps over one value with everything inside it.
    pub fn skip(&mut self) -> Result<(), ReadError> {
        let mut values_left: u64 = 1;
        while values_left > 0 {
            values_left -= 1;
            match self.head()? {
                Head::Array(len) => values_left = values_left.saturating_add(u64::from(len)),
                Head::Map(len) => values_left = values_left.saturating_add(2 * u64::from(len)),
                _ => {}
            }
        }
        Ok(())
    }

    /// The error of a value of the wrong type that starts at `at`.
    pub fn wrong_type(at: usize, expected: &'static str, found: &Head<'_>) -> ReadError {
        ReadError::Type { expected, found: found.type_name(), at }
    }

    /// Reads an array's head.
    pub fn array(&mut self, expected: &'static str) -> Result<u32, ReadError> {
        let at = self.at;
        match self.head()? {
            Head::Array(len) => Ok(len),
            other => Err(Self::wrong_type(at, expected, &other)),
        }
    }
}

/// Appends an unsigned integer in its shortest form.
pub fn write_uint(out: &mut Vec<u8>, value: u64) {
    match value {
        0..=0x7f => out.push(value as u8),
        0x80..=0xff => out.extend_from_slice(&[0xcc, value as u8]),
        0x100..=0xffff => {
            out.push(0xcd);
            out.extend_from_slice(&(value as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(0xce);
            out.extend_from_slice(&(value as u32).to_be_bytes());
        }
        _ => {
            out.push(0xcf);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

/// Appends `nil`.
pub fn write_nil(out: &mut Vec<u8>) {
    out.push(0xc0);
}

/// Appends a 64-bit float.
pub fn write_f64(out: &mut Vec<u8>, value: f64) {
    out.push(0xcb);
    out.extend_from_slice(&value.to_be_bytes());
}

/// Appends text. A length above 4 GiB cannot occur: callers write names and short keys.
pub fn write_str(out: &mut Vec<u8>, value: &str) {
    match value.len() {
        len @ 0..=31 => out.push(0xa0 | len as u8),
        len @ 32..=255 => out.extend_from_slice(&[0xd9, len as u8]),
        len @ 256..=65_535 => {
            out.push(0xda);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            out.push(0xdb);
            out.extend_from_slice(&(len as u32).to_be_bytes());
        }
    }
    out.extend_from_slice(value.as_bytes());
}

/// Appends a byte string.
pub fn write_bin(out: &mut Vec<u8>, value: &[u8]) {
    match value.len() {
        len @ 0..=255 => out.extend_from_slice(&[0xc4, len as u8]),
        len @ 256..=65_535 => {
            out.push(0xc5);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            out.push(0xc6);
            out.extend_from_slice(&(len as u32).to_be_bytes());
        }
    }
    out.extend_from_slice(value);
}

/// Appends the head of an array of `len` elements.
pub fn write_array(out: &mut Vec<u8>, len: usize) {
    write_container(out, len, 0x90, 0xdc);
}

/// Appends the head of a map of `len` entries.
pub fn write_map(out: &mut Vec<u8>, len: usize) {
    write_container(out, len, 0x80, 0xde);
}

fn write_container(out: &mut Vec<u8>, len: usize, short: u8, long: u8) {
    match len {
        0..=15 => out.push(short | len as u8),
        16..=65_535 => {
            out.push(long);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        _ => {
            out.push(long + 1);
            out.extend_from_slice(&(len as u32).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_marker_reads_as_its_type() {
        let table: &[(&[u8], Head<'_>)] = &[
            (&[0x7f], Head::Uint(127)),
            (&[0xff], Head::Int(-1)),
            (&[0xcc, 0xff], Head::Uint(255)),
            (&[0xcd, 1, 0], Head::Uint(256)),
            (&[0xce, 1, 0, 0, 0], Head::Uint(1 << 24)),
            (&[0xcf, 0xff, 0, 0, 0, 0, 0, 0, 1], Head::Uint(0xff00_0000_0000_0001)),
            (&[0xd0, 0x80], Head::Int(-128)),
            (&[0xd1, 0x00, 0x05], Head::Uint(5)),
            (&[0xd2, 0xff, 0xff, 0xff, 0xfe], Head::Int(-2)),
            (&[0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0], Head::Int(i64::MIN)),
            (&[0xca, 0x3f, 0x80, 0, 0], Head::Float(1.0)),
            (&[0xc0], Head::Nil),
            (&[0xc3], Head::Bool(true)),
            (&[0xa2, b'h', b'i'], Head::Str(b"hi")),
            (&[0xd9, 1, b'x'], Head::Str(b"x")),
            (&[0xda, 0, 1, b'x'], Head::Str(b"x")),
            (&[0xdb, 0, 0, 0, 1, b'x'], Head::Str(b"x")),
            (&[0xc4, 1, 9], Head::Bin(&[9])),
            (&[0xc5, 0, 1, 9], Head::Bin(&[9])),
            (&[0xc6, 0, 0, 0, 1, 9], Head::Bin(&[9])),
            (&[0xdc, 0, 3], Head::Array(3)),
            (&[0xdd, 0, 0, 0, 3], Head::Array(3)),
            (&[0xde, 0, 3], Head::Map(3)),
            (&[0xdf, 0, 0, 0, 3], Head::Map(3)),
            (&[0xd4, 1, 2], Head::Ext),
            (&[0xd8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], Head::Ext),
            (&[0xc7, 1, 2, 3], Head::Ext),
        ];
        for (bytes, head) in table {
            let mut reader = Reader::new(bytes);
            assert_eq!(reader.head(), Ok(*head), "{bytes:x?}");
            assert_eq!(reader.remaining(), 0, "{bytes:x?}");
            for len in 0..bytes.len() {
                let cut = Reader::new(&bytes[..len]).head();
                assert_eq!(cut, Err(ReadError::Truncated { at: 0 }), "{bytes:x?} cut at {len}");
            }
        }
        assert_eq!(Reader::new(&[0xc1]).head(), Err(ReadError::Reserved { at: 0 }));
    }

    #[test]
    fn the_short_path_reads_what_head_reads() {
        for bytes in [&b"\x00"[..], b"\x7f", b"\xcd\x01\x02", b"\xce\xff\0\0\x01"] {
            let mut reader = Reader::new(bytes);
            let value = reader.short_uint().map(u64::from);
            assert_eq!(value.map(Head::Uint), Reader::new(bytes).head().ok());
            assert_eq!(reader.remaining(), 0);
        }
        for bytes in [&b""[..], b"\xcc\x80", b"\xcd\x01", b"\xce\0\0\0", b"\xff", b"\xc0"] {
            let mut reader = Reader::new(bytes);
            assert_eq!((reader.short_uint(), reader.position()), (None, 0));
        }
    }

    #[test]
    fn claimed_lengths_and_depth_cost_nothing() {
        let huge = [0xdd, 0xff, 0xff, 0xff, 0xff, 0xc0];
        assert!(matches!(Reader::new(&huge).skip(), Err(ReadError::Truncated { .. })));
        let deep = vec![0x91; 1 << 20];
        assert!(matches!(Reader::new(&deep).skip(), Err(ReadError::Truncated { .. })));
        let mut closed = deep;
        closed.push(0xc0);
        assert_eq!(Reader::new(&closed).skip(), Ok(()));
    }

    #[test]
    fn what_is_written_is_read() {
        for value in [0, 127, 128, 255, 256, 65_535, 65_536, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            write_uint(&mut out, value);
            assert_eq!(Reader::new(&out).head(), Ok(Head::Uint(value)));
        }
        for len in [0, 31, 32, 255, 256, 65_535, 65_536] {
            let text = "x".repeat(len);
            let mut out = Vec::new();
            write_str(&mut out, &text);
            write_bin(&mut out, text.as_bytes());
            write_array(&mut out, len);
            write_map(&mut out, len);
            let mut reader = Reader::new(&out);
            assert_eq!(reader.head(), Ok(Head::Str(text.as_bytes())));
            assert_eq!(reader.head(), Ok(Head::Bin(text.as_bytes())));
            assert_eq!(reader.head(), Ok(Head::Array(len as u32)));
            assert_eq!(reader.head(), Ok(Head::Map(len as u32)));
        }
    }
}
