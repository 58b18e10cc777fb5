//! Where does a gRPC message begin and end, and what did a call come to?
//!
//! The framing of gRPC over HTTP/2: each message has a prefix of a byte (is it compressed?) and a
//! length of four. Messages arrive in pieces cut anywhere; one that lies in a single piece is not
//! copied. Source: grpc/doc/PROTOCOL-HTTP2.md.

use std::io::Read;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::read::GzDecoder;
use thiserror::Error;

/// Bytes before each message.
pub const PREFIX_BYTES: usize = 5;
/// Most memory that a claimed length reserves; the rest grows as it comes.
const RESERVE_BYTES_MAX: usize = 64 << 10;

/// How a call ended, as `grpc-status` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// As it should.
    Ok = 0,
    /// The caller went away.
    Cancelled = 1,
    /// The caller sent what makes no sense.
    InvalidArgument = 3,
    /// It took too long.
    DeadlineExceeded = 4,
    /// There is no such thing.
    NotFound = 5,
    /// A limit is reached.
    ResourceExhausted = 8,
    /// It cannot be done in this state.
    FailedPrecondition = 9,
    /// There is no such method.
    Unimplemented = 12,
    /// The framing is broken.
    Internal = 13,
    /// Not now.
    Unavailable = 14,
}

impl Code {
    /// Whether it says that the caller did what it must not.
    pub fn is_misuse(self) -> bool {
        matches!(
            self,
            Code::InvalidArgument
                | Code::FailedPrecondition
                | Code::ResourceExhausted
                | Code::Internal
        )
    }

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::Ok => "ok",
            Code::Cancelled => "cancelled",
            Code::InvalidArgument => "invalid_argument",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::NotFound => "not_found",
            Code::ResourceExhausted => "resource_exhausted",
            Code::FailedPrecondition => "failed_precondition",
            Code::Unimplemented => "unimplemented",
            Code::Internal => "internal",
            Code::Unavailable => "unavailable",
        }
    }
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// A message is larger than allowed.
    #[error("a message of {claimed} bytes; the limit is {bytes_max}")]
    TooLarge {
        /// By its prefix, or the limit plus one for one that grows beyond it when unpacked.
        claimed: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The first byte is neither 0 nor 1.
    #[error("a message's prefix begins with {0}; only 0 and 1 are known")]
    Flag(u8),
    /// A compressed message in a call that did not name a compression.
    #[error("a compressed message, but the call names no compression that is known (gzip is)")]
    Encoding,
    /// Not gzip.
    #[error("a compressed message that is no gzip")]
    Gzip,
    /// The call ended inside of a message.
    #[error("the call ends inside of a message")]
    Truncated,
}

impl FrameError {
    /// What the caller is told.
    pub fn code(self) -> Code {
        match self {
            FrameError::TooLarge { .. } => Code::ResourceExhausted,
            FrameError::Encoding => Code::Unimplemented,
            FrameError::Flag(_) | FrameError::Gzip | FrameError::Truncated => Code::Internal,
        }
    }
}

/// Cuts a stream of pieces into messages. Keeps at most one unfinished message.
#[derive(Debug)]
pub struct MessageReader {
    /// Not yet read.
    pieces: Bytes,
    /// An unfinished message with its prefix.
    unfinished: BytesMut,
    bytes_max: usize,
    gzip: bool,
}

impl MessageReader {
    /// For a call whose messages have at most `bytes_max` bytes, unpacked too. `gzip`: its
    /// `grpc-encoding` is gzip.
    pub fn new(bytes_max: usize, gzip: bool) -> MessageReader {
        MessageReader { pieces: Bytes::new(), unfinished: BytesMut::new(), bytes_max, gzip }
    }

    /// The next piece, once [`MessageReader::read`] has found no more messages in the last.
    pub fn push(&mut self, piece: Bytes) {
        if self.unfinished.is_empty() {
            self.pieces = piece;
        } else {
            self.unfinished.extend_from_slice(&piece);
        }
    }

    /// The next complete message; `None`: more pieces are needed.
    ///
    /// # Errors
    /// [`FrameError`]; what follows cannot be read any more.
    pub fn read(&mut self) -> Result<Option<Bytes>, FrameError> {
        let head = if self.unfinished.is_empty() { &self.pieces[..] } else { &self.unfinished[..] };
        let Some((prefix, rest)) = head.split_first_chunk::<PREFIX_BYTES>() else {
            self.keep(PREFIX_BYTES);
            return Ok(None);
        };
        let [flag, length @ ..] = *prefix;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if flag > 1 {
            return Err(FrameError::Flag(flag));
        }
        if length > self.bytes_max {
            return Err(FrameError::TooLarge { claimed: length, bytes_max: self.bytes_max });
        }
        if rest.len() < length {
            self.keep(PREFIX_BYTES + length);
            return Ok(None);
        }
        let message = self.take(length);
        if flag == 0 { Ok(Some(message)) } else { self.unpack(&message).map(Some) }
    }

    /// The call's end.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] inside of a message.
    pub fn finish(&self) -> Result<(), FrameError> {
        let left = self.pieces.len() + self.unfinished.len();
        if left == 0 { Ok(()) } else { Err(FrameError::Truncated) }
    }

    /// Holds on to the beginning of a message of `expected` bytes.
    fn keep(&mut self, expected: usize) {
        if self.unfinished.is_empty() && !self.pieces.is_empty() {
            self.unfinished.reserve(expected.min(RESERVE_BYTES_MAX).max(self.pieces.len()));
            self.unfinished.extend_from_slice(&self.pieces);
            self.pieces = Bytes::new();
        }
    }

    /// Cuts a message off the front, whose bytes are there.
    fn take(&mut self, length: usize) -> Bytes {
        if self.unfinished.is_empty() {
            self.pieces.advance(PREFIX_BYTES);
            return self.pieces.split_to(length);
        }
        let mut message = self.unfinished.split_to(PREFIX_BYTES + length).freeze();
        message.advance(PREFIX_BYTES);
        // What follows begins in the last piece, so it is short.
        self.pieces = std::mem::take(&mut self.unfinished).freeze();
        message
    }

    fn unpack(&self, packed: &[u8]) -> Result<Bytes, FrameError> {
        if !self.gzip {
            return Err(FrameError::Encoding);
        }
        let bytes_max = self.bytes_max;
        let mut message = Vec::with_capacity(packed.len().min(RESERVE_BYTES_MAX));
        let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
        let read = GzDecoder::new(packed).take(limit).read_to_end(&mut message);
        match read {
            Err(_) => Err(FrameError::Gzip),
            Ok(claimed) if claimed > bytes_max => Err(FrameError::TooLarge { claimed, bytes_max }),
            Ok(_) => Ok(message.into()),
        }
    }
}

/// Writes the prefix of a message of `length` bytes that is not compressed. A length beyond 32
/// bits does not occur: what is answered is cut into chunks.
pub fn put_prefix(out: &mut BytesMut, length: usize) {
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use kvroute_core::Rng;

    use super::*;

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        let mut out = vec![flag];
        out.extend_from_slice(&(message.len() as u32).to_be_bytes());
        out.extend_from_slice(message);
        out
    }

    fn packed(message: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(message).unwrap();
        encoder.finish().unwrap()
    }

    fn all(reader: &mut MessageReader, piece: &[u8]) -> Result<Vec<Bytes>, FrameError> {
        reader.push(Bytes::copy_from_slice(piece));
        let mut found = Vec::new();
        while let Some(message) = reader.read()? {
            found.push(message);
        }
        Ok(found)
    }

    #[test]
    fn any_cut_gives_the_same_messages() {
        for seed in 0..300 {
            let mut rng = Rng::seeded(seed);
            let messages: Vec<Vec<u8>> = (0..1 + rng.below(5))
                .map(|_| (0..rng.below(40)).map(|_| rng.next_u64() as u8).collect())
                .collect();
            let stream: Vec<u8> = messages
                .iter()
                .flat_map(|m| if rng.below(3) == 0 { framed(1, &packed(m)) } else { framed(0, m) })
                .collect();
            let mut reader = MessageReader::new(64, true);
            let (mut found, mut at) = (Vec::new(), 0);
            while at < stream.len() {
                let end = (at + 1 + rng.below(30)).min(stream.len());
                found.extend(all(&mut reader, &stream[at..end]).unwrap());
                assert_eq!(
                    reader.finish().is_ok(),
                    reader.pieces.len() + reader.unfinished.len() == 0
                );
                at = end;
            }
            assert_eq!(found, messages, "seed {seed}");
            assert_eq!(reader.finish(), Ok(()));
        }
    }

    #[test]
    fn a_message_in_one_piece_is_not_copied() {
        let piece = Bytes::from([framed(0, b"first"), framed(0, b"second")].concat());
        let mut reader = MessageReader::new(64, false);
        reader.push(piece.clone());
        for at in [PREFIX_BYTES, 2 * PREFIX_BYTES + 5] {
            let message = reader.read().unwrap().unwrap();
            assert_eq!(message.as_ptr(), piece[at..].as_ptr());
        }
        assert_eq!(reader.read(), Ok(None));
    }

    #[test]
    fn damage_is_named() {
        let bomb = packed(&vec![0; 1 << 20]);
        let table: [(&[u8], bool, FrameError); 6] = [
            (&[2, 0, 0, 0, 0], true, FrameError::Flag(2)),
            (
                &[0, 0xff, 0xff, 0xff, 0xff],
                true,
                FrameError::TooLarge { claimed: u32::MAX as usize, bytes_max: 8192 },
            ),
            (&framed(1, b"x"), true, FrameError::Gzip),
            (&framed(1, b"x"), false, FrameError::Encoding),
            (&framed(1, &bomb), true, FrameError::TooLarge { claimed: 8193, bytes_max: 8192 }),
            (&framed(1, &packed(b"hello")[..12]), true, FrameError::Gzip),
        ];
        for (bytes, gzip, error) in table {
            let mut reader = MessageReader::new(8192, gzip);
            assert!(all(&mut reader, bytes) == Err(error), "{error}");
        }
        let mut reader = MessageReader::new(8192, true);
        assert_eq!(all(&mut reader, &[0, 0, 0, 0, 9, 1]), Ok(vec![]));
        assert_eq!(reader.finish(), Err(FrameError::Truncated));
    }
}
