//! How are the bytes of an HTTP/1.1 response read? The head first, then the body by its framing.
//!
//! Pure: works on a buffer that the caller fills. The body comes out as it arrived, without a
//! frame for each chunk: what one read brought in is one piece, moved together in place.

use std::mem::MaybeUninit;
use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use thiserror::Error;

/// Longest response head that is read, in bytes.
pub(crate) const HEAD_BYTES_MAX: usize = 64 << 10;
/// Most header lines of a response.
const HEADERS_MAX: usize = 100;
/// Longest chunk-size or trailer line, in bytes.
const LINE_BYTES_MAX: usize = 4 << 10;

/// Why a response is not HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum Http1Error {
    /// The head cannot be parsed.
    #[error("the response head is not HTTP/1.1")]
    Head,
    /// Larger than [`HEAD_BYTES_MAX`] or more lines than [`HEADERS_MAX`].
    #[error("the response head is larger than {HEAD_BYTES_MAX} bytes or {HEADERS_MAX} lines")]
    HeadTooLarge,
    /// Lengths that contradict each other, or a transfer coding other than chunked.
    #[error("the response has an unknown body length")]
    Length,
    /// A chunk without a valid size line.
    #[error("the response has a malformed chunk")]
    Chunk,
}

/// What a response's head says.
#[derive(Debug)]
pub(crate) struct Head {
    pub status: StatusCode,
    /// Every header, those of the connection included.
    pub headers: HeaderMap,
    pub framing: Framing,
    /// Whether the connection may carry another exchange after the body.
    pub keep_alive: bool,
}

/// Where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// After this many more bytes.
    Length(u64),
    /// At the chunk of size zero.
    Chunked(ChunkState),
    /// Where the connection ends.
    Close,
}

/// What the next byte of a chunked body belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChunkState {
    /// A size line.
    Size,
    /// Data, this many bytes more.
    Data(u64),
    /// The line end after data.
    DataEnd,
    /// Trailer lines, up to an empty one.
    Trailer,
    /// Nothing: the body is complete.
    Done,
}

impl Framing {
    /// Is the body complete?
    pub fn is_done(&self) -> bool {
        matches!(self, Framing::Length(0) | Framing::Chunked(ChunkState::Done))
    }

    /// Takes the body bytes that `buf` holds out of it; empty when more input is needed.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Bytes, Http1Error> {
        match self {
            Framing::Close => Ok(buf.split().freeze()),
            Framing::Length(left) => {
                let n = usize::try_from(*left).unwrap_or(usize::MAX).min(buf.len());
                *left -= n as u64;
                Ok(buf.split_to(n).freeze())
            }
            Framing::Chunked(state) => decode_chunked(state, buf),
        }
    }
}

/// Moves the data of all chunks that `buf` holds together and splits it off.
fn decode_chunked(state: &mut ChunkState, buf: &mut BytesMut) -> Result<Bytes, Http1Error> {
    let (mut read, mut start, mut end) = (0, None::<usize>, 0);
    while read < buf.len() {
        match *state {
            ChunkState::Data(left) => {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len() - read);
                if start.is_none() {
                    (start, end) = (Some(read), read);
                }
                if end != read {
                    buf.copy_within(read..read + n, end);
                }
                (read, end) = (read + n, end + n);
                let left = left - n as u64;
                *state = if left == 0 { ChunkState::DataEnd } else { ChunkState::Data(left) };
            }
            ChunkState::Done => break,
            ChunkState::Size | ChunkState::DataEnd | ChunkState::Trailer => {
                let Some(length) = buf[read..].iter().position(|&b| b == b'\n') else {
                    if buf.len() - read > LINE_BYTES_MAX {
                        return Err(Http1Error::Chunk);
                    }
                    break;
                };
                let line = &buf[read..read + length];
                match after_line(*state, line.strip_suffix(b"\r").unwrap_or(line)) {
                    Ok(next) => *state = next,
                    // What came before the fault is handed out; the next call finds it again.
                    Err(_) if start.is_some() => break,
                    Err(error) => return Err(error),
                }
                read += length + 1;
            }
        }
    }
    let Some(start) = start else {
        buf.advance(read);
        return Ok(Bytes::new());
    };
    buf.advance(start);
    let data = buf.split_to(end - start).freeze();
    buf.advance(read - end);
    Ok(data)
}

fn after_line(state: ChunkState, line: &[u8]) -> Result<ChunkState, Http1Error> {
    match state {
        ChunkState::Size => match chunk_size(line)? {
            0 => Ok(ChunkState::Trailer),
            n => Ok(ChunkState::Data(n)),
        },
        ChunkState::DataEnd if line.is_empty() => Ok(ChunkState::Size),
        ChunkState::Trailer if line.is_empty() => Ok(ChunkState::Done),
        ChunkState::Trailer => Ok(ChunkState::Trailer),
        _ => Err(Http1Error::Chunk),
    }
}

fn chunk_size(line: &[u8]) -> Result<u64, Http1Error> {
    let digits = line.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    if digits.is_empty() || digits.len() > 15 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(Http1Error::Chunk);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| Http1Error::Chunk)?;
    u64::from_str_radix(digits, 16).map_err(|_| Http1Error::Chunk)
}

/// Takes a response's head out of `buf`; `None` when it is not complete. Interim responses
/// (`100 Continue`, `103 Early Hints`) are skipped. `to_head` says that the request was a `HEAD`.
pub(crate) fn parse_head(buf: &mut BytesMut, to_head: bool) -> Result<Option<Head>, Http1Error> {
    loop {
        let mut lines = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        let read = parser.parse_response_with_uninit_headers(&mut response, buf, &mut lines);
        let length = match read {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if buf.len() > HEAD_BYTES_MAX => {
                return Err(Http1Error::HeadTooLarge);
            }
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(Http1Error::HeadTooLarge),
            Err(_) => return Err(Http1Error::Head),
        };
        let code = response.code.unwrap_or_default();
        if (100..200).contains(&code) {
            // A switch of protocols is never asked for, so nothing valid can follow it.
            if code == 101 {
                return Err(Http1Error::Head);
            }
            buf.advance(length);
            continue;
        }
        let status = StatusCode::from_u16(code).map_err(|_| Http1Error::Head)?;
        let version_1_1 = response.version == Some(1);
        let lines = places(response.headers, buf);
        let headers = header_map(&buf.split_to(length).freeze(), &lines)?;
        let keep_alive = keeps_alive(&headers, version_1_1);
        let framing = framing_of(&headers, status, to_head)?;
        let keep_alive = keep_alive && framing != Framing::Close;
        return Ok(Some(Head { status, headers, framing, keep_alive }));
    }
}

/// Where the name and the value of a line stand in the head.
type Place = (Range<usize>, Range<usize>);

fn places(lines: &[httparse::Header<'_>], head: &[u8]) -> Vec<Place> {
    let place = |part: &[u8]| {
        let begin = (part.as_ptr() as usize).saturating_sub(head.as_ptr() as usize);
        begin..begin + part.len()
    };
    lines.iter().map(|line| (place(line.name.as_bytes()), place(line.value))).collect()
}

/// The values stay where they are in the head, which lives as long as one of them.
fn header_map(head: &Bytes, lines: &[Place]) -> Result<HeaderMap, Http1Error> {
    let mut headers = HeaderMap::with_capacity(lines.len() + 4);
    for (name, value) in lines {
        let name = head.get(name.clone()).ok_or(Http1Error::Head)?;
        let name = HeaderName::from_bytes(name).map_err(|_| Http1Error::Head)?;
        // An empty value lies nowhere.
        let value = if value.is_empty() { 0..0 } else { value.clone() };
        let value = HeaderValue::from_maybe_shared(head.slice(value));
        let value = value.map_err(|_| Http1Error::Head)?;
        headers.try_append(name, value).map_err(|_| Http1Error::HeadTooLarge)?;
    }
    Ok(headers)
}

fn keeps_alive(headers: &HeaderMap, version_1_1: bool) -> bool {
    let has = |token: &str| {
        headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
    };
    if version_1_1 { !has("close") } else { has("keep-alive") && !has("close") }
}

/// RFC 9112 section 6.3.
fn framing_of(
    headers: &HeaderMap,
    status: StatusCode,
    to_head: bool,
) -> Result<Framing, Http1Error> {
    if to_head || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
        return Ok(Framing::Length(0));
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
        let only = (codings.next(), codings.next());
        return match only {
            (Some(v), None) if v.as_bytes().eq_ignore_ascii_case(b"chunked") => {
                Ok(Framing::Chunked(ChunkState::Size))
            }
            _ => Err(Http1Error::Length),
        };
    }
    let mut length = None;
    for value in headers.get_all(CONTENT_LENGTH) {
        let text = value.to_str().map_err(|_| Http1Error::Length)?.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Http1Error::Length);
        }
        let n: u64 = text.parse().map_err(|_| Http1Error::Length)?;
        if length.replace(n).is_some_and(|before| before != n) {
            return Err(Http1Error::Length);
        }
    }
    Ok(length.map_or(Framing::Close, Framing::Length))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `wire` in two pieces, cut at `cut`, and returns what came out.
    fn read(wire: &[u8], cut: usize) -> Result<(Head, Vec<u8>, usize), Http1Error> {
        let mut buf = BytesMut::new();
        let mut head = None;
        let mut body = Vec::new();
        let mut pieces = 0;
        for part in [&wire[..cut], &wire[cut..]] {
            buf.extend_from_slice(part);
            if head.is_none() {
                head = parse_head(&mut buf, false)?;
            }
            if let Some(head) = &mut head {
                let data = head.framing.decode(&mut buf)?;
                pieces += usize::from(!data.is_empty());
                body.extend_from_slice(&data);
            }
        }
        Ok((head.ok_or(Http1Error::Head)?, body, pieces))
    }

    #[test]
    fn a_chunked_body_is_whole_wherever_it_is_cut() {
        let wire = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-empty:\r\n\r\n\
            4\r\ndata\r\nB;ext=1\r\n more bytes\r\n1\r\n!\r\n0\r\ntrailer: x\r\n\r\n";
        for cut in 0..wire.len() {
            let (head, body, _) = read(wire, cut).unwrap();
            assert_eq!(body, b"data more bytes!", "cut at {cut}");
            assert!(head.framing.is_done() && head.keep_alive);
            assert_eq!(head.headers["x-empty"], "");
        }
        let (_, _, pieces) = read(wire, 0).unwrap();
        assert_eq!(pieces, 1, "chunks that arrive together leave together");
    }

    #[test]
    fn a_counted_body_leaves_what_follows() {
        let mut buf = BytesMut::from(
            &b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n\
               HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabcHTTP"[..],
        );
        let mut head = parse_head(&mut buf, false).unwrap().unwrap();
        assert_eq!(head.status, 404);
        assert_eq!(head.framing.decode(&mut buf).unwrap(), "abc");
        assert!(head.framing.is_done());
        assert_eq!(&buf[..], b"HTTP");
    }

    #[test]
    fn bodies_that_have_no_length() {
        let table: [(&[u8], Framing, bool); 5] = [
            (b"HTTP/1.1 200 OK\r\n\r\n", Framing::Close, false),
            (b"HTTP/1.1 204 No Content\r\n\r\n", Framing::Length(0), true),
            (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", Framing::Length(0), true),
            (b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n", Framing::Length(1), false),
            (
                b"HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 1\r\n\r\n",
                Framing::Length(1),
                false,
            ),
        ];
        for (wire, framing, keep_alive) in table {
            let head = parse_head(&mut BytesMut::from(wire), false).unwrap().unwrap();
            assert_eq!((head.framing, head.keep_alive), (framing, keep_alive));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let table: [(&[u8], Http1Error); 6] = [
            (b"SSH-2.0-OpenSSH\r\n\r\n", Http1Error::Head),
            (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", Http1Error::Head),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
                Http1Error::Length,
            ),
            (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", Http1Error::Length),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", Http1Error::Length),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", Http1Error::Chunk),
        ];
        for (wire, error) in table {
            assert_eq!(read(wire, 0).err(), Some(error), "{}", String::from_utf8_lossy(wire));
        }
        let wire = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n";
        let mut buf = BytesMut::from(&wire[..]);
        let mut head = parse_head(&mut buf, false).unwrap().unwrap();
        assert_eq!(head.framing.decode(&mut buf).unwrap(), "a", "what is right is not lost");
        assert_eq!(head.framing.decode(&mut buf), Err(Http1Error::Chunk));
        let endless = [b"HTTP/1.1 200 OK\r\nx: ".to_vec(), vec![b'a'; HEAD_BYTES_MAX]].concat();
        assert_eq!(read(&endless, 0).err(), Some(Http1Error::HeadTooLarge));
    }
}
