//! What does Envoy send for a request and its answer? Its messages, with their gRPC prefix, as it
//! sends them in the mode FULL_DUPLEX_STREAMED.

use bytes::{BufMut, Bytes, BytesMut};
use kvroute_wire::grpc::{PREFIX_BYTES, put_prefix};
use kvroute_wire::protobuf::{Fields, Value};

/// Envoy's listener buffers so much of an HTTP/1.1 body before it sends it on.
const PIECE_BYTES_MAX: usize = 32 << 10;

/// `ProcessingRequest.request_headers`, with the modes. `path` is what the client asks.
pub fn request_headers(path: &str, length: usize, id: &str) -> Bytes {
    let length = length.to_string();
    let headers = [
        (":authority", "gateway.example:8081"),
        (":path", path),
        (":method", "POST"),
        (":scheme", "http"),
        ("content-type", "application/json"),
        ("content-length", &length),
        ("accept", "*/*"),
        ("accept-encoding", "gzip, deflate"),
        ("user-agent", "python-httpx/0.28.1"),
        ("authorization", "Bearer sk-0123456789abcdef0123456789abcdef"),
        ("x-forwarded-for", "10.0.0.17"),
        ("x-forwarded-proto", "http"),
        ("x-envoy-expected-rq-timeout-ms", "86400000"),
        ("x-request-id", id),
    ];
    message(|out| {
        nested(out, 2, |out| put_headers(out, &headers));
        // MetadataContext, which is always there, and ProtocolConfiguration.
        nested(out, 8, |_| {});
        out.extend_from_slice(&[11 << 3 | 2, 4, 1 << 3, 4, 2 << 3, 4]);
    })
}

/// `ProcessingRequest.request_body`: all messages of a body, the last an empty one.
pub fn request_body(body: &[u8]) -> Vec<Bytes> {
    let pieces = body.chunks(PIECE_BYTES_MAX).map(|piece| body_piece(4, piece, false));
    pieces.chain([body_piece(4, b"", true)]).collect()
}

/// `ProcessingRequest.response_headers` of vLLM through Envoy.
pub fn response_headers(streamed: bool, end_of_stream: bool) -> Bytes {
    let kind = if streamed { "text/event-stream; charset=utf-8" } else { "application/json" };
    let headers = [
        (":status", "200"),
        ("date", "Sun, 22 Nov 2026 12:00:00 GMT"),
        ("server", "uvicorn"),
        ("content-type", kind),
        ("x-envoy-upstream-service-time", "12"),
        ("transfer-encoding", "chunked"),
    ];
    message(|out| {
        nested(out, 3, |out| {
            put_headers(out, &headers);
            if end_of_stream {
                out.extend_from_slice(&[3 << 3, 1]);
            }
        });
        nested(out, 8, |_| {});
    })
}

/// The messages of an answer of so many tokens, each an event of its own as vLLM writes them, with
/// its usage at the end, and Envoy's empty last piece.
pub fn answer(tokens: u32, prompt_tokens: u32) -> Vec<Bytes> {
    let event = |token: u32| {
        format!(
            "data: {{\"id\":\"chatcmpl-7e5b0c9d4f2a4c1e8d6b3a5f9c7e1b2d\",\"object\":\
             \"chat.completion.chunk\",\"created\":1795348800,\"model\":\"bench\",\"choices\":\
             [{{\"index\":0,\"delta\":{{\"content\":\" word{token:03}\"}},\"logprobs\":null,\
             \"finish_reason\":null}}]}}\n\n"
        )
    };
    let total = prompt_tokens + tokens;
    let last = format!(
        "data: {{\"id\":\"chatcmpl-7e5b0c9d4f2a4c1e8d6b3a5f9c7e1b2d\",\"object\":\
         \"chat.completion.chunk\",\"created\":1795348800,\"model\":\"bench\",\"choices\":[],\
         \"usage\":{{\"prompt_tokens\":{prompt_tokens},\"total_tokens\":{total},\
         \"completion_tokens\":{tokens},\"prompt_tokens_details\":{{\"cached_tokens\":16}}}}}}\n\n\
         data: [DONE]\n\n"
    );
    let pieces = (0..tokens).map(|token| body_piece(5, event(token).as_bytes(), false));
    let ends = [body_piece(5, last.as_bytes(), false), body_piece(5, b"", true)];
    pieces.chain(ends).collect()
}

fn body_piece(number: u32, body: &[u8], end_of_stream: bool) -> Bytes {
    message(|out| {
        nested(out, number, |out| {
            if !body.is_empty() {
                put_bytes(out, 1, body);
            }
            if end_of_stream {
                out.extend_from_slice(&[2 << 3, 1]);
            }
        });
    })
}

fn message(write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut inner = BytesMut::new();
    write(&mut inner);
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + inner.len());
    put_prefix(&mut out, inner.len());
    out.extend_from_slice(&inner);
    out.freeze()
}

/// An `HttpHeaders` up to its flag.
fn put_headers(out: &mut BytesMut, headers: &[(&str, &str)]) {
    nested(out, 1, |out| {
        for (name, value) in headers {
            nested(out, 1, |out| {
                put_bytes(out, 1, name.as_bytes());
                put_bytes(out, 3, value.as_bytes());
            });
        }
    });
}

fn nested(out: &mut BytesMut, number: u32, write: impl FnOnce(&mut BytesMut)) {
    let mut inner = BytesMut::new();
    write(&mut inner);
    put_bytes(out, number, &inner);
}

fn put_bytes(out: &mut BytesMut, number: u32, bytes: &[u8]) {
    put_varint(out, u64::from(number << 3 | 2));
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// What a `ProcessingResponse` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Headers,
    /// So many bytes of a body; the last of it.
    Piece {
        bytes: usize,
        end: bool,
    },
    /// Anything else: not what was asked for.
    Other,
}

/// Reads one, as far as the load needs it.
pub fn read(message: &[u8]) -> Told {
    for (number, value) in Fields::new(message).flatten() {
        match number {
            1 | 2 => return Told::Headers,
            // BodyResponse, CommonResponse, BodyMutation, StreamedBodyResponse.
            3 | 4 => {
                let streamed = inside(inside(inside(value.bytes(), 1), 3), 3);
                let (mut bytes, mut end) = (0, false);
                for (number, value) in Fields::new(streamed).flatten() {
                    match (number, value) {
                        (1, Value::Bytes(body)) => bytes = body.len(),
                        (2, value) => end = value.is_true(),
                        _ => {}
                    }
                }
                return Told::Piece { bytes, end };
            }
            // Metadata, which may come first.
            8 => {}
            _ => return Told::Other,
        }
    }
    Told::Other
}

fn inside(message: &[u8], wanted: u32) -> &[u8] {
    let found = Fields::new(message).flatten().find(|(number, _)| *number == wanted);
    found.map_or(&[], |(_, value)| value.bytes())
}

#[cfg(test)]
mod tests {
    use kvroute_wire::ext_proc::{Answer, BodyMode, HeaderChange, Message, Part, Side};

    use super::*;

    fn read_back(bytes: &Bytes) -> Message {
        Message::read(&bytes.slice(PREFIX_BYTES..)).expect("it is Envoy's")
    }

    #[test]
    fn the_router_reads_what_is_sent() {
        let head = read_back(&request_headers("/v1/completions", 12, "id-1"));
        let Part::RequestHeaders(block) = head.part else { panic!("{head:?}") };
        assert_eq!(block.get(":path"), Some(&b"/v1/completions"[..]));
        let modes = head.modes.expect("modes");
        assert_eq!(modes.request, BodyMode::FullDuplexStreamed);
        assert_eq!(modes.response, BodyMode::FullDuplexStreamed);
        let body = vec![b'x'; 70_000];
        let pieces: Vec<_> = request_body(&body).iter().map(read_back).collect();
        assert_eq!(pieces.len(), 4);
        let Part::RequestBody(last) = &pieces[3].part else { panic!("{pieces:?}") };
        assert!(last.end_of_stream && last.body.is_empty());
        assert_eq!(answer(100, 200).len(), 102);
        assert!(matches!(read_back(&response_headers(true, false)).part, Part::ResponseHeaders(_)));
    }

    #[test]
    fn what_the_router_says_is_read() {
        let mut answer = Answer::new();
        answer.headers(Side::Request, &[HeaderChange::Set("a", b"b")], true, &[]);
        assert_eq!(read(&answer.take()[PREFIX_BYTES..]), Told::Headers);
        answer.piece_head(Side::Response, 3, true, &[]);
        answer.piece_bytes(b"abc");
        assert_eq!(read(&answer.take()[PREFIX_BYTES..]), Told::Piece { bytes: 3, end: true });
    }
}
