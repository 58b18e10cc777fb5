//! Writes what a processor answers: each a `ProcessingResponse`, with its gRPC prefix.

use bytes::{BufMut, Bytes, BytesMut};

use crate::grpc::{PREFIX_BYTES, put_prefix};

/// Which direction an answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// From the client to the endpoint.
    Request,
    /// Back.
    Response,
}

/// What happens to a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderChange<'a> {
    /// It has this value alone.
    Set(&'a str, &'a [u8]),
    /// It is gone.
    Remove(&'a str),
}

/// A value that other filters can read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DynamicValue<'a> {
    /// A text.
    Text(&'a str),
    /// A number.
    Number(f64),
    /// Numbers by name.
    Numbers(&'a [(&'a str, f64)]),
}

/// An answer of the processor's own, in the place of an endpoint's.
#[derive(Clone, Copy, Debug)]
pub struct Immediate<'a> {
    /// HTTP.
    pub status: u16,
    /// Set on the answer.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// Its body.
    pub body: &'a [u8],
    /// `grpc-status` for clients that speak gRPC.
    pub grpc_status: Option<u8>,
    /// What Envoy's access log shows as `RESPONSE_CODE_DETAILS`; no blanks.
    pub details: &'a str,
}

/// Answers on their way, one after the other.
#[derive(Debug, Default)]
pub struct Answer {
    out: BytesMut,
}

impl Answer {
    /// Nothing yet.
    pub fn new() -> Answer {
        Answer::default()
    }

    /// What is written so far. The memory is reused once it is sent.
    pub fn take(&mut self) -> Bytes {
        self.out.split().freeze()
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// `request_headers` or `response_headers`: what changes, whether the route is chosen anew,
    /// and what other filters are to know, by namespace.
    pub fn headers(
        &mut self,
        side: Side,
        changes: &[HeaderChange<'_>],
        clear_route_cache: bool,
        dynamic: Dynamic<'_>,
    ) {
        let number = if side == Side::Request { 1 } else { 2 };
        self.message(|out| {
            nested(out, number, |out| {
                nested(out, 1, |out| common(out, changes, clear_route_cache, |_| {}));
            });
            put_dynamic(out, dynamic);
        });
    }

    /// The answer to a body, or to a piece of one, that changes headers and perhaps the body:
    /// `request_body` or `response_body` as the modes other than full duplex have them.
    pub fn whole_body(
        &mut self,
        side: Side,
        changes: &[HeaderChange<'_>],
        clear_route_cache: bool,
        body: Option<&[u8]>,
        dynamic: Dynamic<'_>,
    ) {
        self.message(|out| {
            nested(out, body_number(side), |out| {
                nested(out, 1, |out| {
                    common(out, changes, clear_route_cache, |out| {
                        // The member is set even when it is empty: without one, the piece stays.
                        if let Some(body) = body {
                            nested(out, 3, |out| nested(out, 1, |out| out.put_slice(body)));
                        }
                    });
                });
            });
            put_dynamic(out, dynamic);
        });
    }

    /// A piece of a body of `length` bytes in the full duplex mode, up to the body itself: its
    /// bytes must follow. It is the last if `end_of_stream`.
    pub fn piece_head(
        &mut self,
        side: Side,
        length: usize,
        end_of_stream: bool,
        dynamic: Dynamic<'_>,
    ) {
        let mut tail = BytesMut::new();
        put_dynamic(&mut tail, dynamic);
        // From the inside out: the body and its flag, StreamedBodyResponse, BodyMutation,
        // CommonResponse, BodyResponse.
        let flag = 2 * usize::from(end_of_stream);
        let body = if length == 0 { 0 } else { 1 + varint_bytes(length) + length };
        let streamed = flag + body;
        let mutation = 1 + varint_bytes(streamed) + streamed;
        let common = 1 + varint_bytes(mutation) + mutation;
        let response = 1 + varint_bytes(common) + common;
        let whole = 1 + varint_bytes(response) + response + tail.len();
        self.out.reserve(PREFIX_BYTES + whole - length);
        put_prefix(&mut self.out, whole);
        let out = &mut self.out;
        out.extend_from_slice(&tail);
        for (number, length) in
            [(body_number(side), response), (1, common), (3, mutation), (3, streamed)]
        {
            put_tag(out, number, 2);
            put_varint(out, length as u64);
        }
        if end_of_stream {
            put_bool(out, 2);
        }
        if length > 0 {
            put_tag(out, 1, 2);
            put_varint(out, length as u64);
        }
    }

    /// Bytes of the piece whose head has been written.
    pub fn piece_bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// `request_trailers` or `response_trailers`: as they are.
    pub fn trailers(&mut self, side: Side, dynamic: Dynamic<'_>) {
        let number = if side == Side::Request { 5 } else { 6 };
        self.message(|out| {
            nested(out, number, |_| {});
            put_dynamic(out, dynamic);
        });
    }

    /// `immediate_response`.
    pub fn immediate(&mut self, answer: &Immediate<'_>) {
        self.message(|out| {
            nested(out, 7, |out| {
                nested(out, 1, |out| {
                    put_tag(out, 1, 0);
                    put_varint(out, u64::from(answer.status));
                });
                nested(out, 2, |out| {
                    answer.headers.iter().for_each(|(name, value)| set_header(out, name, value));
                });
                put_bytes(out, 3, answer.body);
                if let Some(status) = answer.grpc_status {
                    nested(out, 4, |out| {
                        put_tag(out, 1, 0);
                        put_varint(out, u64::from(status));
                    });
                }
                put_bytes(out, 5, answer.details.as_bytes());
            });
        });
    }

    fn message(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let start = self.out.len();
        put_prefix(&mut self.out, 0);
        write(&mut self.out);
        let length = self.out.len() - start - PREFIX_BYTES;
        let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        self.out[start + 1..start + PREFIX_BYTES].copy_from_slice(&length);
    }
}

/// Namespaces, each once, with their keys and values; empty: none.
pub type Dynamic<'a> = &'a [(&'a str, &'a [(&'a str, DynamicValue<'a>)])];

fn body_number(side: Side) -> u32 {
    if side == Side::Request { 3 } else { 4 }
}

/// A `CommonResponse`.
fn common(
    out: &mut BytesMut,
    changes: &[HeaderChange<'_>],
    clear_route_cache: bool,
    body: impl FnOnce(&mut BytesMut),
) {
    if !changes.is_empty() {
        nested(out, 2, |out| {
            for change in changes {
                match change {
                    HeaderChange::Set(name, value) => set_header(out, name, value),
                    HeaderChange::Remove(name) => put_bytes(out, 2, name.as_bytes()),
                }
            }
        });
    }
    body(out);
    if clear_route_cache {
        put_bool(out, 5);
    }
}

/// A `HeaderValueOption` without an append action: ext_proc overwrites then.
fn set_header(out: &mut BytesMut, name: &str, value: &[u8]) {
    nested(out, 1, |out| {
        nested(out, 1, |out| {
            put_bytes(out, 1, name.as_bytes());
            put_bytes(out, 3, value);
        });
    });
}

/// `dynamic_metadata`: a `Struct` whose keys are the namespaces.
fn put_dynamic(out: &mut BytesMut, dynamic: Dynamic<'_>) {
    if dynamic.is_empty() {
        return;
    }
    nested(out, 8, |out| {
        for (namespace, values) in dynamic {
            entry(out, namespace, |out| {
                nested(out, 5, |out| {
                    values.iter().for_each(|(key, value)| {
                        entry(out, key, |out| put_value(out, *value));
                    });
                });
            });
        }
    });
}

/// An entry of a `Struct`'s fields.
fn entry(out: &mut BytesMut, key: &str, value: impl FnOnce(&mut BytesMut)) {
    nested(out, 1, |out| {
        put_bytes(out, 1, key.as_bytes());
        nested(out, 2, value);
    });
}

fn put_value(out: &mut BytesMut, value: DynamicValue<'_>) {
    match value {
        // The member is set even when the text is empty.
        DynamicValue::Text(text) => nested(out, 3, |out| out.extend_from_slice(text.as_bytes())),
        DynamicValue::Number(number) => {
            put_tag(out, 2, 1);
            out.put_f64_le(number);
        }
        DynamicValue::Numbers(numbers) => nested(out, 5, |out| {
            for (key, number) in numbers {
                entry(out, key, |out| put_value(out, DynamicValue::Number(*number)));
            }
        }),
    }
}

/// A field with what `write` writes, behind its length.
fn nested(out: &mut BytesMut, number: u32, write: impl FnOnce(&mut BytesMut)) {
    put_tag(out, number, 2);
    let start = out.len();
    write(out);
    let length = out.len() - start;
    let before = out.len();
    put_varint(out, length as u64);
    let digits = out.len() - before;
    out[start..].rotate_right(digits);
}

fn put_bytes(out: &mut BytesMut, number: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_tag(out, number, 2);
        put_varint(out, bytes.len() as u64);
        out.extend_from_slice(bytes);
    }
}

fn put_bool(out: &mut BytesMut, number: u32) {
    put_tag(out, number, 0);
    out.put_u8(1);
}

fn put_tag(out: &mut BytesMut, number: u32, kind: u32) {
    put_varint(out, u64::from(number << 3 | kind));
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn varint_bytes(value: usize) -> usize {
    (usize::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}
