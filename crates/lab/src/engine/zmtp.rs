//! The server half of ZMTP 3.1 (RFC 37, NULL mechanism) that an engine needs: greeting, handshake,
//! frames, subscriptions and heartbeats of one connection.
//!
//! Written here because a real engine's sockets are libzmq's: they answer PING, drop messages per
//! subscriber at a high-water mark and vanish at once when the process dies. A test double must do
//! the same, and must be able to misbehave on purpose.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest frame a client may send; subscriptions and replay requests are far shorter.
const FRAME_BYTES_MAX: u64 = 64 * 1024;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// What a client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// It wants messages whose first frame begins so.
    Subscribe(Bytes),
    /// It no longer does.
    Cancel(Bytes),
    /// A whole message.
    Message(Vec<Bytes>),
}

/// One connection after the handshake.
pub(super) struct Peer {
    stream: TcpStream,
    input: BytesMut,
    frames: Vec<Bytes>,
}

/// Appends a message's frames in wire form.
pub(super) fn encode_message(frames: &[&[u8]], out: &mut BytesMut) {
    for (i, frame) in frames.iter().enumerate() {
        let more = if i + 1 < frames.len() { MORE } else { 0 };
        encode_frame(more, frame, out);
    }
}

fn encode_frame(flags: u8, body: &[u8], out: &mut BytesMut) {
    out.reserve(9 + body.len());
    match u8::try_from(body.len()) {
        Ok(length) => {
            out.put_u8(flags);
            out.put_u8(length);
        }
        Err(_) => {
            out.put_u8(flags | LONG);
            out.put_u64(body.len() as u64);
        }
    }
    out.put_slice(body);
}

fn encode_command(name: &str, body: &[u8], out: &mut BytesMut) {
    let mut command = vec![name.len() as u8];
    command.extend_from_slice(name.as_bytes());
    command.extend_from_slice(body);
    encode_frame(COMMAND, &command, out);
}

fn property(name: &str, value: &str, out: &mut Vec<u8>) {
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&(value.len() as u32).to_be_bytes());
    out.extend_from_slice(value.as_bytes());
}

fn refuse(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Peer {
    /// Greets a client and agrees on socket types; `ours` is `PUB` or `ROUTER`.
    pub(super) async fn accept(mut stream: TcpStream, ours: &'static str) -> io::Result<Peer> {
        stream.set_nodelay(true)?;
        let mut greeting = [0u8; 64];
        (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, 1);
        greeting[12..16].copy_from_slice(b"NULL");
        stream.write_all(&greeting).await?;
        let mut theirs = [0u8; 64];
        stream.read_exact(&mut theirs).await?;
        if theirs[0] != 0xff || theirs[9] & 1 != 1 || theirs[10] < 3 {
            return Err(refuse("the peer does not speak ZMTP 3"));
        }
        if theirs[12..32] != greeting[12..32] {
            return Err(refuse("the peer asks for a security mechanism other than NULL"));
        }
        let mut ready = Vec::new();
        property("Socket-Type", ours, &mut ready);
        if ours == "ROUTER" {
            property("Identity", "", &mut ready);
        }
        let mut out = BytesMut::new();
        encode_command("READY", &ready, &mut out);
        stream.write_all(&out).await?;
        let mut peer = Peer { stream, input: BytesMut::new(), frames: Vec::new() };
        let (flags, body) = peer.frame().await?;
        let fits: &[&[u8]] = match ours {
            "PUB" => &[b"SUB", b"XSUB"],
            _ => &[b"DEALER", b"REQ", b"ROUTER"],
        };
        let theirs = socket_type(flags, &body).ok_or_else(|| refuse("no READY command"))?;
        if !fits.contains(&&*theirs) {
            return Err(refuse("the peer's socket type does not fit"));
        }
        Ok(peer)
    }

    /// The next thing the client sent. Safe to cancel.
    pub(super) async fn read(&mut self) -> io::Result<Incoming> {
        loop {
            let (flags, body) = self.frame().await?;
            if flags & COMMAND != 0 {
                if let Some(incoming) = self.command(body).await? {
                    return Ok(incoming);
                }
                continue;
            }
            if self.frames.len() >= 8 {
                return Err(refuse("too many frames in one message"));
            }
            self.frames.push(body);
            if flags & MORE == 0 {
                return Ok(Incoming::Message(std::mem::take(&mut self.frames)));
            }
        }
    }

    /// Sends bytes made by [`encode_message`].
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    async fn command(&mut self, mut body: Bytes) -> io::Result<Option<Incoming>> {
        let Some(&length) = body.first() else { return Ok(None) };
        if body.len() < 1 + usize::from(length) {
            return Err(refuse("a command is shorter than its name"));
        }
        body.advance(1);
        let name = body.split_to(usize::from(length));
        Ok(match &*name {
            b"SUBSCRIBE" => Some(Incoming::Subscribe(body)),
            b"CANCEL" => Some(Incoming::Cancel(body)),
            b"PING" => {
                let context = body.get(2..).unwrap_or_default();
                let mut pong = BytesMut::new();
                encode_command("PONG", context, &mut pong);
                self.stream.write_all(&pong).await?;
                None
            }
            b"ERROR" => return Err(refuse("the peer reports an error")),
            _ => None,
        })
    }

    async fn frame(&mut self) -> io::Result<(u8, Bytes)> {
        loop {
            if let Some(frame) = take_frame(&mut self.input)? {
                return Ok(frame);
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn take_frame(input: &mut BytesMut) -> io::Result<Option<(u8, Bytes)>> {
    let Some(&flags) = input.first() else { return Ok(None) };
    let (head, length) = if flags & LONG == 0 {
        let Some(&length) = input.get(1) else { return Ok(None) };
        (2, u64::from(length))
    } else {
        let Some(length) = input.get(1..9).and_then(|bytes| bytes.try_into().ok()) else {
            return Ok(None);
        };
        (9, u64::from_be_bytes(length))
    };
    if length > FRAME_BYTES_MAX {
        return Err(refuse("a frame is longer than any request to this socket"));
    }
    if input.len() < head + length as usize {
        return Ok(None);
    }
    input.advance(head);
    Ok(Some((flags, input.split_to(length as usize).freeze())))
}

/// The `Socket-Type` of a READY command.
fn socket_type(flags: u8, body: &[u8]) -> Option<Vec<u8>> {
    let mut rest = body.strip_prefix(b"\x05READY").filter(|_| flags & COMMAND != 0)?;
    loop {
        let (&name_length, tail) = rest.split_first()?;
        let (name, tail) = tail.split_at_checked(usize::from(name_length))?;
        let (length, tail) = tail.split_first_chunk::<4>()?;
        let (value, tail) = tail.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if name.eq_ignore_ascii_case(b"socket-type") {
            return Some(value.to_vec());
        }
        rest = tail;
    }
}

/// What an old-style (ZMTP 3.0) subscriber sends as a message: 1 or 0, then the topic.
pub(super) fn legacy_subscription(frames: &[Bytes]) -> Option<Incoming> {
    let [frame] = frames else { return None };
    match frame.first() {
        Some(1) => Some(Incoming::Subscribe(frame.slice(1..))),
        Some(0) => Some(Incoming::Cancel(frame.slice(1..))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_at_any_split() {
        let long = vec![7u8; 300];
        let mut wire = BytesMut::new();
        encode_message(&[b"", b"topic", &long], &mut wire);
        for split in 0..wire.len() {
            let mut input = BytesMut::new();
            let mut frames = Vec::new();
            for part in [&wire[..split], &wire[split..]] {
                input.extend_from_slice(part);
                while let Some(frame) = take_frame(&mut input).unwrap() {
                    frames.push(frame);
                }
            }
            let expected: [(u8, &[u8]); 3] = [(MORE, b""), (MORE, b"topic"), (LONG, &long)];
            assert_eq!(frames.len(), 3);
            for ((flags, body), (expected_flags, expected)) in frames.iter().zip(expected) {
                assert_eq!((*flags, &**body), (expected_flags, expected), "split {split}");
            }
        }
    }

    #[test]
    fn garbage_is_refused_and_never_panics() {
        let mut input = BytesMut::from(&[LONG, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..]);
        assert!(take_frame(&mut input).is_err());
        for body in [&b""[..], b"\x05READY", b"\x05READY\x0bSocket-Type\xff\xff\xff\xffPUB"] {
            assert_eq!(socket_type(COMMAND, body), None);
        }
        let mut ready = b"\x05READY".to_vec();
        property("Identity", "", &mut ready);
        property("Socket-Type", "SUB", &mut ready);
        assert_eq!(socket_type(COMMAND, &ready), Some(b"SUB".to_vec()));
        assert_eq!(socket_type(0, &ready), None);
    }
}
