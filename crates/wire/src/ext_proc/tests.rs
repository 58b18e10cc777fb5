use bytes::Bytes;
use kvroute_core::Rng;

use super::*;
use crate::grpc::{MessageReader, PREFIX_BYTES};
use crate::protobuf::fixture::Message as Proto;

fn header(name: &str, value: &str) -> Proto {
    Proto::new().bytes(1, name.as_bytes()).bytes(3, value.as_bytes())
}

fn headers_request(number: u32, end: bool) -> Vec<u8> {
    let map = Proto::new()
        .bytes(1, &header(":path", "/v1/completions").into_bytes())
        .bytes(1, &Proto::new().bytes(1, b"old").bytes(2, b"value").into_bytes())
        .into_bytes();
    let headers = Proto::new().bytes(1, &map).varint(3, u64::from(end)).into_bytes();
    Proto::new().bytes(number, &headers).into_bytes()
}

#[test]
fn headers_of_both_directions() {
    let read = Message::read(&headers_request(2, true).into()).unwrap();
    let Part::RequestHeaders(block) = read.part else { panic!("{read:?}") };
    assert_eq!(
        (block.get(":path"), block.get("old")),
        (Some(&b"/v1/completions"[..]), Some(&b"value"[..]))
    );
    assert_eq!((block.get("none"), block.end_of_stream), (None, true));
    let read = Message::read(&headers_request(3, false).into()).unwrap();
    assert!(matches!(read.part, Part::ResponseHeaders(block) if !block.end_of_stream));
    assert_eq!((read.modes, read.observability), (None, false));
}

#[test]
fn bodies_share_the_messages_memory() {
    let body = Proto::new().bytes(1, b"hello").varint(2, 1).into_bytes();
    for number in [4, 5] {
        let message = Bytes::from(Proto::new().bytes(number, &body).into_bytes());
        let (Part::RequestBody(piece) | Part::ResponseBody(piece)) =
            Message::read(&message).unwrap().part
        else {
            panic!("no body")
        };
        assert_eq!((&piece.body[..], piece.end_of_stream), (&b"hello"[..], true));
        assert!(message.as_ptr_range().contains(&piece.body.as_ptr()));
    }
}

#[test]
fn modes_of_the_first_message() {
    let modes = Proto::new().varint(1, 4).varint(2, 2).into_bytes();
    let message = Proto::new().bytes(6, &[]).bytes(11, &modes).varint(10, 1).into_bytes();
    let read = Message::read(&message.into()).unwrap();
    let expected = Modes { request: BodyMode::FullDuplexStreamed, response: BodyMode::Buffered };
    assert_eq!(
        (read.part, read.modes, read.observability),
        (Part::RequestTrailers, Some(expected), true)
    );
}

/// A `Metadata` whose filter `f` has `k`.
fn metadata(value: &[u8]) -> Vec<u8> {
    let entry = |key: &str, value: &[u8]| {
        Proto::new().bytes(1, key.as_bytes()).bytes(2, value).into_bytes()
    };
    let fields = Proto::new().bytes(1, &entry("k", value)).into_bytes();
    Proto::new().bytes(1, &entry("other", &[])).bytes(1, &entry("f", &fields)).into_bytes()
}

#[test]
fn metadata_holds_texts_and_lists() {
    let text = |text: &str| Proto::new().bytes(3, text.as_bytes()).into_bytes();
    let list = Proto::new().bytes(1, &text("a")).bytes(1, &text("b")).into_bytes();
    let table = [
        (text("a,b"), Found::Text("a,b".into())),
        (Proto::new().bytes(6, &list).into_bytes(), Found::List(vec!["a".into(), "b".into()])),
        (Proto::new().bytes(6, &[]).into_bytes(), Found::List(vec![])),
        (Proto::new().varint(4, 1).into_bytes(), Found::Other),
    ];
    for (value, expected) in table {
        let message = Proto::new().bytes(6, &[]).bytes(8, &metadata(&value)).into_bytes();
        let read = Message::read(&message.into()).unwrap();
        assert_eq!(read.metadata.get("f", "k"), Ok(Some(expected)));
        assert_eq!(read.metadata.get("f", "x"), Ok(None));
        assert_eq!(read.metadata.get("x", "k"), Ok(None));
    }
}

#[test]
fn damage_is_an_error() {
    assert_eq!(Message::read(&Bytes::new()), Err(ExtProcError::Empty));
    let whole = headers_request(2, true);
    for at in 1..whole.len() {
        assert!(matches!(
            Message::read(&Bytes::copy_from_slice(&whole[..at])),
            Err(ExtProcError::Protobuf(_))
        ));
    }
    let one = Proto::new().bytes(1, b"a").into_bytes();
    let map = (0..=HEADERS_MAX).fold(Proto::new(), |map, _| map.bytes(1, &one)).into_bytes();
    let message = Proto::new().bytes(2, &Proto::new().bytes(1, &map).into_bytes()).into_bytes();
    assert_eq!(Message::read(&message.into()), Err(ExtProcError::Headers));
}

#[test]
fn any_bytes_are_read_or_refused() {
    let whole = headers_request(2, true);
    for seed in 0..5_000 {
        let mut rng = Rng::seeded(seed);
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(bytes.len());
            bytes[at] = rng.next_u64() as u8;
        }
        let _ = Message::read(&bytes.into());
    }
}

/// The messages that were written, without their prefixes.
fn written(answer: &mut Answer) -> Vec<Bytes> {
    let mut reader = MessageReader::new(1 << 20, false);
    reader.push(answer.take());
    let mut messages = Vec::new();
    while let Some(message) = reader.read().unwrap() {
        messages.push(message);
    }
    reader.finish().unwrap();
    messages
}

#[test]
fn a_piece_is_written_as_the_long_way_would() {
    for length in [0, 1, 127, 128, 16_383, 16_384, 62_000] {
        for end in [false, true] {
            for (side, number) in [(Side::Request, 3), (Side::Response, 4)] {
                let body = vec![7; length];
                let mut answer = Answer::new();
                answer.piece_head(side, length, end, &[]);
                answer.piece_bytes(&body);
                let mut streamed = Proto::new();
                if end {
                    streamed = streamed.varint(2, 1);
                }
                if length > 0 {
                    streamed = streamed.bytes(1, &body);
                }
                let mutation = Proto::new().bytes(3, &streamed.into_bytes()).into_bytes();
                let common = Proto::new().bytes(3, &mutation).into_bytes();
                let response = Proto::new().bytes(1, &common).into_bytes();
                let expected = Proto::new().bytes(number, &response).into_bytes();
                assert_eq!(written(&mut answer), [expected], "{length} {end}");
            }
        }
    }
}

/// A piece that is held back is replaced by nothing, which is not the same as being left alone.
#[test]
fn a_body_may_be_replaced_by_nothing() {
    let nothing = Proto::new().bytes(1, b"").into_bytes();
    let table = [
        (None, Proto::new()),
        (Some(&b""[..]), Proto::new().bytes(3, &nothing)),
        (Some(b"a"), Proto::new().bytes(3, &Proto::new().bytes(1, b"a").into_bytes())),
    ];
    for (body, common) in table {
        let mut answer = Answer::new();
        answer.whole_body(Side::Response, &[], false, body, &[]);
        let response = Proto::new().bytes(1, &common.into_bytes()).into_bytes();
        assert_eq!(written(&mut answer), [Proto::new().bytes(4, &response).into_bytes()]);
    }
}

#[test]
fn answers_byte_by_byte() {
    let mut answer = Answer::new();
    let changes = [HeaderChange::Set("a", b"1"), HeaderChange::Remove("b")];
    let values = [("k", DynamicValue::Text("v")), ("n", DynamicValue::Number(1.0))];
    answer.headers(Side::Request, &changes, true, &[("ns", &values[..])]);
    answer.trailers(Side::Response, &[]);
    let immediate = Immediate {
        status: 503,
        headers: &[("a", b"1")],
        body: b"no",
        grpc_status: Some(14),
        details: "why",
    };
    answer.immediate(&immediate);
    let set = Proto::new().bytes(1, &header("a", "1").into_bytes()).into_bytes();
    let mutation = Proto::new().bytes(1, &set).bytes(2, b"b").into_bytes();
    let common = Proto::new().bytes(2, &mutation).varint(5, 1).into_bytes();
    let headers = Proto::new().bytes(1, &common).into_bytes();
    let entry = |key: &str, value: Vec<u8>| {
        Proto::new().bytes(1, key.as_bytes()).bytes(2, &value).into_bytes()
    };
    let number = [&[0x11][..], &1.0f64.to_le_bytes()].concat();
    let inner = Proto::new()
        .bytes(1, &entry("k", Proto::new().bytes(3, b"v").into_bytes()))
        .bytes(1, &entry("n", number))
        .into_bytes();
    let outer = Proto::new().bytes(1, &entry("ns", Proto::new().bytes(5, &inner).into_bytes()));
    let set = Proto::new().bytes(1, &set).into_bytes();
    let refused = Proto::new()
        .bytes(1, &Proto::new().varint(1, 503).into_bytes())
        .bytes(2, &set)
        .bytes(3, b"no")
        .bytes(4, &Proto::new().varint(1, 14).into_bytes())
        .bytes(5, b"why");
    let expected = [
        Proto::new().bytes(1, &headers).bytes(8, &outer.into_bytes()).into_bytes(),
        Proto::new().bytes(6, &[]).into_bytes(),
        Proto::new().bytes(7, &refused.into_bytes()).into_bytes(),
    ];
    assert_eq!(written(&mut answer), expected);
    assert_eq!(PREFIX_BYTES, 5);
}
