//! How does one read a ZeroMQ publisher? ZMTP 3 for SUB and DEALER over TCP, whoever of the two
//! connects.
//!
//! Only what KV event streams need (RFC 23/ZMTP, NULL mechanism): greeting, READY, subscribe,
//! messages, PING. Frames are read into one buffer with a limit, so that a length claimed by the
//! peer is never allocated on trust, and the end of the connection is an error that the caller
//! sees: reconnecting is its decision, because each reconnect may have lost events.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs};

/// Most frames of one message.
const FRAMES_MAX: usize = 16;
/// Bytes to ask the socket for at once.
const READ_BYTES: usize = 64 << 10;

const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;
const GREETING_BYTES: usize = 64;
/// Largest READY command.
const READY_BYTES_MAX: usize = 16 << 10;

/// Why a connection cannot be used any more.
#[derive(Debug, Error)]
pub(crate) enum ZmtpError {
    /// The connection failed or ended.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not answered in time.
    #[error("no answer within {0:?}; is this a KV event port?")]
    Timeout(Duration),
    /// The peer speaks something else.
    #[error("the peer does not speak ZMTP 3 with the NULL mechanism; is this a KV event port?")]
    NotZmtp,
    /// The peer does something else, such as a subscriber that connected to its own port.
    #[error("the peer is a `{0}` socket; engines publish KV events with PUB, replays with ROUTER")]
    WrongPeer(String),
    /// A message of a size or number of frames beyond the limits.
    #[error("a message of more than the allowed bytes, or of over {FRAMES_MAX} frames")]
    TooLarge,
}

/// What this side of the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Receives what is published.
    Sub,
    /// Asks and receives any number of answers.
    Dealer,
}

/// What the bytes that are here hold.
enum Read {
    Message(Vec<Bytes>),
    /// Body of a command frame.
    Command(Bytes),
    /// No whole frame.
    Nothing,
}

/// A connected socket. Cancelling [`Socket::recv`] loses nothing.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    buf: BytesMut,
    message_bytes_max: usize,
    /// Frames of the message that is being received.
    frames: Vec<Bytes>,
    /// The last read filled the buffer, so there may be more in the system's.
    pub has_more: bool,
}

impl Socket {
    /// Connects and shakes hands, within `timeout` in all. No message may be larger than
    /// `message_bytes_max`.
    pub async fn connect(
        address: impl ToSocketAddrs,
        role: Role,
        timeout: Duration,
        message_bytes_max: usize,
    ) -> Result<Socket, ZmtpError> {
        let connected = async {
            let stream = TcpStream::connect(address).await?;
            Socket::handshake(stream, role, message_bytes_max).await
        };
        let connected = tokio::time::timeout(timeout, connected).await;
        connected.unwrap_or(Err(ZmtpError::Timeout(timeout)))
    }

    /// Shakes hands with a peer that has connected; the rest as [`Socket::connect`].
    pub async fn accept(
        stream: TcpStream,
        role: Role,
        timeout: Duration,
        message_bytes_max: usize,
    ) -> Result<Socket, ZmtpError> {
        let accepted = Socket::handshake(stream, role, message_bytes_max);
        let accepted = tokio::time::timeout(timeout, accepted).await;
        accepted.unwrap_or(Err(ZmtpError::Timeout(timeout)))
    }

    /// The same on both sides: with the NULL mechanism none is the server.
    async fn handshake(
        stream: TcpStream,
        role: Role,
        message_bytes_max: usize,
    ) -> Result<Socket, ZmtpError> {
        stream.set_nodelay(true)?;
        let (buf, frames) = (BytesMut::new(), Vec::new());
        let mut socket = Socket { stream, buf, message_bytes_max, frames, has_more: false };
        socket.stream.write_all(&greeting()).await?;
        while socket.buf.len() < GREETING_BYTES {
            socket.fill().await?;
            check_signature(&socket.buf)?;
        }
        let theirs = socket.buf.split_to(GREETING_BYTES);
        if theirs[10] < 3 || &theirs[12..17] != b"NULL\0" {
            return Err(ZmtpError::NotZmtp);
        }
        socket.stream.write_all(&ready(role)).await?;
        loop {
            match decode_frame(&mut socket.buf, READY_BYTES_MAX)? {
                None => socket.fill().await?,
                Some((FLAG_COMMAND, body)) => {
                    let properties = body.strip_prefix(b"\x05READY").ok_or(ZmtpError::NotZmtp)?;
                    check_peer(role, socket_type(properties))?;
                    return Ok(socket);
                }
                Some(_) => return Err(ZmtpError::NotZmtp),
            }
        }
    }

    /// Asks a publisher for all messages whose topic starts with `topic`.
    pub async fn subscribe(&mut self, topic: &[u8]) -> Result<(), ZmtpError> {
        let frame = [b"\x01", topic].concat();
        self.send(&[&frame]).await
    }

    /// Sends one message of these frames.
    pub async fn send(&mut self, frames: &[&[u8]]) -> Result<(), ZmtpError> {
        let mut out = Vec::new();
        for (at, frame) in frames.iter().enumerate() {
            let more = if at + 1 < frames.len() { FLAG_MORE } else { 0 };
            encode_frame(more, frame, &mut out);
        }
        Ok(self.stream.write_all(&out).await?)
    }

    /// The next message.
    pub async fn recv(&mut self) -> Result<Vec<Bytes>, ZmtpError> {
        loop {
            match self.read_message()? {
                Read::Message(frames) => return Ok(frames),
                Read::Command(body) => self.command(&body).await?,
                Read::Nothing => self.fill().await?,
            }
        }
    }

    /// The next message that has been read from the system already.
    pub async fn recv_read(&mut self) -> Result<Option<Vec<Bytes>>, ZmtpError> {
        loop {
            match self.read_message()? {
                Read::Message(frames) => return Ok(Some(frames)),
                Read::Command(body) => self.command(&body).await?,
                Read::Nothing => return Ok(None),
            }
        }
    }

    fn read_message(&mut self) -> Result<Read, ZmtpError> {
        loop {
            let so_far: usize = self.frames.iter().map(Bytes::len).sum();
            let room = self.message_bytes_max.saturating_sub(so_far);
            let Some((flags, body)) = decode_frame(&mut self.buf, room)? else {
                return Ok(Read::Nothing);
            };
            if flags & FLAG_COMMAND != 0 {
                return Ok(Read::Command(body));
            }
            self.frames.push(body);
            if self.frames.len() > FRAMES_MAX {
                return Err(ZmtpError::TooLarge);
            }
            if flags & FLAG_MORE == 0 {
                return Ok(Read::Message(std::mem::take(&mut self.frames)));
            }
        }
    }

    /// Answers a PING with its context; other commands mean nothing here.
    async fn command(&mut self, body: &Bytes) -> Result<(), ZmtpError> {
        if let Some(ping) = body.strip_prefix(b"\x04PING") {
            let context = ping.get(2..).unwrap_or_default();
            let pong = [b"\x04PONG", &context[..context.len().min(16)]].concat();
            let mut out = Vec::new();
            encode_frame(FLAG_COMMAND, &pong, &mut out);
            self.stream.write_all(&out).await?;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), ZmtpError> {
        self.buf.reserve(READ_BYTES);
        let room = self.buf.capacity() - self.buf.len();
        match self.stream.read_buf(&mut self.buf).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            n => {
                self.has_more = n == room;
                Ok(())
            }
        }
    }
}

/// Signature, version 3.0, mechanism NULL, not the server.
fn greeting() -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    out[0] = 0xFF;
    out[9] = 0x7F;
    out[10] = 3;
    out[12..16].copy_from_slice(b"NULL");
    out
}

fn check_signature(buf: &[u8]) -> Result<(), ZmtpError> {
    let wrong = |at: usize, byte: u8| buf.get(at).is_some_and(|&b| b != byte);
    if wrong(0, 0xFF) || wrong(9, 0x7F) { Err(ZmtpError::NotZmtp) } else { Ok(()) }
}

/// Publishers speak to subscribers, and whoever answers replays to dealers.
fn check_peer(role: Role, theirs: &[u8]) -> Result<(), ZmtpError> {
    let fits: &[&[u8]] = match role {
        Role::Sub => &[b"PUB", b"XPUB"],
        Role::Dealer => &[b"ROUTER", b"DEALER", b"REP"],
    };
    if fits.contains(&theirs) {
        return Ok(());
    }
    let shown = &theirs[..theirs.len().min(16)];
    Err(ZmtpError::WrongPeer(shown.escape_ascii().to_string()))
}

/// The value of `Socket-Type` among the properties of a READY; empty when there is none.
fn socket_type(mut properties: &[u8]) -> &[u8] {
    while let Some((name, value, rest)) = first_property(properties) {
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return value;
        }
        properties = rest;
    }
    &[]
}

/// Name and value of the first property, and what follows it.
fn first_property(properties: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (&length, rest) = properties.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(length))?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (value, rest) = rest.split_at_checked(length)?;
    Some((name, value, rest))
}

fn ready(role: Role) -> Vec<u8> {
    let kind: &[u8] = match role {
        Role::Sub => b"SUB",
        Role::Dealer => b"DEALER",
    };
    let mut body = b"\x05READY\x0bSocket-Type".to_vec();
    property(kind, &mut body);
    if role == Role::Dealer {
        body.extend_from_slice(b"\x08Identity");
        property(b"", &mut body);
    }
    let mut out = Vec::new();
    encode_frame(FLAG_COMMAND, &body, &mut out);
    out
}

fn property(value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(value);
}

fn encode_frame(flags: u8, body: &[u8], out: &mut Vec<u8>) {
    match u8::try_from(body.len()) {
        Ok(length) => out.extend_from_slice(&[flags, length]),
        Err(_) => {
            out.push(flags | FLAG_LONG);
            out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(body);
}

/// Takes one frame out of `buf`: its flags without the length's, and its body.
fn decode_frame(
    buf: &mut BytesMut,
    frame_bytes_max: usize,
) -> Result<Option<(u8, Bytes)>, ZmtpError> {
    let Some(&flags) = buf.first() else { return Ok(None) };
    if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 {
        return Err(ZmtpError::NotZmtp);
    }
    let (header, length) = if flags & FLAG_LONG != 0 {
        let Some(length) = buf.get(1..9) else { return Ok(None) };
        let length = length.try_into().map(u64::from_be_bytes).unwrap_or(u64::MAX);
        (9, usize::try_from(length).unwrap_or(usize::MAX))
    } else {
        let Some(&length) = buf.get(1) else { return Ok(None) };
        (2, usize::from(length))
    };
    if length > frame_bytes_max {
        return Err(ZmtpError::TooLarge);
    }
    if buf.len() < header + length {
        return Ok(None);
    }
    buf.advance(header);
    let body = if length == 0 { Bytes::new() } else { buf.split_to(length).freeze() };
    Ok(Some((flags & !FLAG_LONG, body)))
}

#[cfg(test)]
mod tests {
    use kvroute_core::Rng;

    use super::*;

    #[test]
    fn frames_survive_any_cut() {
        let mut wire = Vec::new();
        let bodies: [&[u8]; 4] = [b"", b"topic", &[7; 255], &[9; 70_000]];
        for body in bodies {
            encode_frame(FLAG_MORE, body, &mut wire);
        }
        let mut rng = Rng::seeded(11);
        for _ in 0..50 {
            let (mut buf, mut at, mut seen) = (BytesMut::new(), 0, Vec::new());
            while at < wire.len() {
                let n = (1 + rng.below(4000)).min(wire.len() - at);
                buf.extend_from_slice(&wire[at..at + n]);
                at += n;
                while let Some((flags, body)) = decode_frame(&mut buf, 1 << 20).unwrap() {
                    assert_eq!(flags, FLAG_MORE);
                    seen.push(body);
                }
            }
            assert_eq!(seen, bodies);
        }
    }

    #[test]
    fn a_claimed_length_is_not_believed() {
        let mut wire = vec![FLAG_LONG];
        wire.extend_from_slice(&u64::MAX.to_be_bytes());
        let error = decode_frame(&mut BytesMut::from(&wire[..]), 1 << 20).unwrap_err();
        assert!(matches!(error, ZmtpError::TooLarge));
        let error = decode_frame(&mut BytesMut::from(&b"GET / HTTP/1.1"[..]), 99).unwrap_err();
        assert!(matches!(error, ZmtpError::NotZmtp));
    }

    #[test]
    fn the_greeting_is_the_standards() {
        let ours = greeting();
        assert_eq!((ours[0], ours[9], ours[10], &ours[12..17]), (0xFF, 0x7F, 3, &b"NULL\0"[..]));
        check_signature(&ours).unwrap();
        assert!(check_signature(b"HTTP/1.1 400").is_err());
        assert_eq!(ready(Role::Sub), b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB");
        assert_eq!(socket_type(&ready(Role::Dealer)[8..]), b"DEALER");
    }

    #[test]
    fn only_publishers_are_subscribed_to() {
        let table: [(&[u8], Option<&str>); 6] = [
            (b"\x0bSocket-Type\0\0\0\x03PUB", None),
            (b"\x01x\0\0\0\x01y\x0bsocket-type\0\0\0\x04XPUB", None),
            (b"\x0bSocket-Type\0\0\0\x03SUB", Some("`SUB`")),
            (b"", Some("``")),
            (b"\x0bSocket-Type\xff\xff\xff\xffPUB", Some("``")),
            (b"\xffSocket-Type", Some("``")),
        ];
        for (properties, refused) in table {
            let checked = check_peer(Role::Sub, socket_type(properties));
            match refused {
                None => checked.unwrap(),
                Some(named) => assert!(checked.unwrap_err().to_string().contains(named)),
            }
        }
    }
}
