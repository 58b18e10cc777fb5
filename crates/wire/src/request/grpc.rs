//! What do the gRPC methods of vLLM and Vertex AI ask for?
//!
//! vLLM's messages are those of `vllm_engine.proto` (package `vllm.grpc.engine`, smg-grpc-proto
//! 0.4); Vertex AI's (`google/cloud/aiplatform/v1beta1/prediction_service.proto`) hold an HTTP
//! body (`google/api/httpbody.proto`) with the JSON of OpenAI's APIs. Fields that are not named
//! here are stepped over.

use std::borrow::Cow;

use kvroute_core::blocks::MultimodalSpan;

use super::{BodyError, MULTIMODAL_ITEMS_MAX, NoPrompt, Prompt, RequestBody};
use crate::api::Api;
use crate::protobuf::{Fields, ProtobufError, Value, push_uint32s};

/// Flag and length before each message.
const FRAME_HEAD_BYTES: usize = 5;

impl From<ProtobufError> for BodyError {
    fn from(error: ProtobufError) -> BodyError {
        BodyError::BadGrpc { message: error.to_string() }
    }
}

fn bad(message: &str) -> BodyError {
    BodyError::BadGrpc { message: message.to_owned() }
}

/// The one message of a unary request.
fn message(body: &[u8]) -> Result<&[u8], BodyError> {
    let Some(([flag, length @ ..], rest)) = body.split_first_chunk::<FRAME_HEAD_BYTES>() else {
        return Err(bad("the body is shorter than the head of a frame (5 bytes)"));
    };
    match flag {
        0 => {}
        1 => return Err(BodyError::Compressed),
        _ => return Err(bad("the body does not begin with a frame")),
    }
    let length = u32::from_be_bytes(*length) as usize;
    match rest.len() {
        found if found < length => Err(bad("its frame is cut off")),
        found if found > length => Err(bad("more than one message, where the method takes one")),
        _ => Ok(rest),
    }
}

/// The HTTP body in a request of Vertex AI: field 2 of all three methods' messages.
pub(super) fn http_body(body: &[u8]) -> Result<&[u8], BodyError> {
    let mut data = None;
    for field in Fields::new(message(body)?) {
        let (2, Value::Bytes(http_body)) = field? else { continue };
        let before = data.unwrap_or_default();
        data = Some(before);
        for field in Fields::new(http_body) {
            if let (2, Value::Bytes(bytes)) = field? {
                data = Some(bytes);
            }
        }
    }
    data.ok_or(BodyError::Missing { field: "http_body", api: "Vertex AI's prediction service" })
}

/// `GenerateRequest`.
#[derive(Default)]
struct Generate<'a> {
    input: Option<Input<'a>>,
    max_tokens: Option<u32>,
    n: Option<u32>,
    wants_prompt_logprobs: bool,
    is_truncated: bool,
    stream: bool,
    items: Vec<MultimodalSpan>,
    has_media: bool,
}

enum Input<'a> {
    Ids(Vec<u32>),
    Text(&'a str),
}

pub(super) fn generate(body: &[u8]) -> Result<RequestBody<'_>, BodyError> {
    let mut request = Generate::default();
    for field in Fields::new(message(body)?) {
        match field? {
            (2, value @ Value::Bytes(_)) => request.input = Some(Input::Ids(input_ids(value)?)),
            (3, Value::Bytes(text)) => {
                let text = std::str::from_utf8(text).map_err(|_| bad("`text` is not UTF-8"))?;
                request.input = Some(Input::Text(text));
            }
            (4, Value::Bytes(sampling)) => request.read_sampling(sampling)?,
            (5, value) => request.stream = value.is_true(),
            (7 | 11, Value::Bytes(media)) => request.read_media(media)?,
            (10, Value::Bytes(_)) => request.has_media = true,
            _ => {}
        }
    }
    request.items.sort_by_key(|item| item.offset);
    let prompt = match request.input {
        None => {
            let api = Api::GrpcGenerate.as_str();
            return Err(BodyError::Missing { field: "tokenized", api });
        }
        Some(_) if request.is_truncated => Prompt::None(NoPrompt::Truncated),
        Some(_) if request.has_media => Prompt::None(NoPrompt::UnprocessedMedia),
        Some(Input::Ids(ids)) => Prompt::TokenIds(vec![ids]),
        Some(Input::Text(text)) => Prompt::Texts(vec![Cow::Borrowed(text)]),
    };
    Ok(RequestBody {
        stream: request.stream,
        max_tokens: request.max_tokens,
        n: request.n,
        skips_cache: request.wants_prompt_logprobs,
        items: request.items,
        ..of_prompt(prompt)
    })
}

pub(super) fn embed(body: &[u8]) -> Result<RequestBody<'_>, BodyError> {
    let mut ids = None;
    for field in Fields::new(message(body)?) {
        if let (2, value @ Value::Bytes(_)) = field? {
            ids = Some(input_ids(value)?);
        }
    }
    let api = Api::GrpcEmbed.as_str();
    let ids = ids.ok_or(BodyError::Missing { field: "tokenized", api })?;
    Ok(of_prompt(Prompt::TokenIds(vec![ids])))
}

fn of_prompt(prompt: Prompt<'_>) -> RequestBody<'_> {
    RequestBody {
        model: None,
        model_place: None,
        stream: false,
        include_usage: false,
        max_tokens: None,
        n: None,
        skips_cache: false,
        cache_salt: None,
        session_id: None,
        add_special_tokens: true,
        prompt,
        items: Vec::new(),
        media: Vec::new(),
    }
}

/// `TokenizedInput`: its ids stand in field 2, packed or one by one.
fn input_ids(tokenized: Value<'_>) -> Result<Vec<u32>, BodyError> {
    let mut ids = Vec::new();
    for field in Fields::new(tokenized.bytes()) {
        if let (2, value) = field? {
            push_uint32s(value, &mut ids)?;
        }
    }
    Ok(ids)
}

impl Generate<'_> {
    /// `SamplingParams`.
    fn read_sampling(&mut self, sampling: &[u8]) -> Result<(), BodyError> {
        for field in Fields::new(sampling) {
            match field? {
                (8, value) => self.max_tokens = value.uint32(),
                // 0 is proto3's word for absent.
                (15, value) => self.n = value.uint32().filter(|n| *n > 0),
                (23, _) => self.wants_prompt_logprobs = true,
                (27, _) => self.is_truncated = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// `MultimodalInputs`: places in field 5 and, in the same order, hashes in field 6.
    fn read_media(&mut self, media: &[u8]) -> Result<(), BodyError> {
        let mut places = Vec::new();
        let mut hashes = Vec::new();
        for field in Fields::new(media) {
            match field? {
                (5, Value::Bytes(place)) => places.push(place_of(place)?),
                (6, Value::Bytes(hash)) => hashes.push(String::from_utf8_lossy(hash).into_owned()),
                _ => {}
            }
            if places.len().max(hashes.len()) + self.items.len() > MULTIMODAL_ITEMS_MAX {
                let message = format!("more than {MULTIMODAL_ITEMS_MAX} multimodal items");
                return Err(BodyError::BadGrpc { message });
            }
        }
        // Without names and places of its own for every item, the engine makes them up.
        self.has_media |= places.is_empty() || places.len() != hashes.len();
        let named = hashes.into_iter().zip(places);
        self.items.extend(named.map(|(identifier, (offset, length))| MultimodalSpan {
            identifier,
            offset,
            length,
        }));
        Ok(())
    }
}

/// `PlaceholderRange`: offset and length.
fn place_of(place: &[u8]) -> Result<(u32, u32), BodyError> {
    let (mut offset, mut length) = (0, 0);
    for field in Fields::new(place) {
        match field? {
            (1, value) => offset = value.uint32().unwrap_or(0),
            (2, value) => length = value.uint32().unwrap_or(0),
            _ => {}
        }
    }
    Ok((offset, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protobuf::fixture::Message;
    use crate::request::parse;

    fn tokenized(ids: &[u32]) -> Vec<u8> {
        Message::new().bytes(1, b"as text").packed(2, ids).into_bytes()
    }

    fn generate_request() -> Message {
        Message::new().bytes(1, b"req-1").bytes(2, &tokenized(&[1, 300, 151_643]))
    }

    fn read(api: Api, frame: &[u8]) -> RequestBody<'_> {
        parse(api, frame).unwrap_or_else(|error| panic!("{frame:?}: {error}"))
    }

    fn ids(body: &RequestBody<'_>) -> Vec<u32> {
        match &body.prompt {
            Prompt::TokenIds(lists) => lists.concat(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_generate_request() {
        let place =
            |offset, length| Message::new().varint(1, offset).varint(2, length).into_bytes();
        let media = Message::new()
            .bytes(2, &[0; 50])
            .bytes(5, &place(2, 1))
            .bytes(5, &place(0, 2))
            .bytes(6, b"h2")
            .bytes(6, b"h1")
            .into_bytes();
        let sampling = Message::new().varint(8, 64).varint(15, 3).bytes(10, b"stop").into_bytes();
        let frame =
            generate_request().bytes(4, &sampling).varint(5, 1).bytes(7, &media).into_frame();
        let body = read(Api::GrpcGenerate, &frame);
        assert_eq!(ids(&body), [1, 300, 151_643]);
        assert_eq!((body.max_tokens, body.n, body.stream), (Some(64), Some(3), true));
        assert!(body.model.is_none() && !body.skips_cache);
        let items: Vec<(&str, u32, u32)> =
            body.items.iter().map(|item| (&*item.identifier, item.offset, item.length)).collect();
        assert_eq!(items, [("h1", 0, 2), ("h2", 2, 1)]);
    }

    #[test]
    fn a_text_is_one_prompt_and_the_last_input_counts() {
        let frame = generate_request().bytes(3, "wör".as_bytes()).into_frame();
        let body = read(Api::GrpcGenerate, &frame);
        assert!(matches!(&body.prompt, Prompt::Texts(texts) if *texts == ["wör"]));
        assert!(body.add_special_tokens);
        let frame = Message::new().bytes(3, b"x").bytes(2, &tokenized(&[7])).into_frame();
        assert_eq!(ids(&read(Api::GrpcGenerate, &frame)), [7]);
        // Ids that are not packed.
        let one_by_one = Message::new().varint(2, 5).varint(2, 6).into_bytes();
        let frame = Message::new().bytes(2, &one_by_one).into_frame();
        assert_eq!(ids(&read(Api::GrpcGenerate, &frame)), [5, 6]);
        assert_eq!(ids(&read(Api::GrpcEmbed, &frame)), [5, 6]);
    }

    #[test]
    fn prompts_that_only_the_engine_knows() {
        let sampling = Message::new().varint(27, 10).varint(23, 1).into_bytes();
        let hashless = Message::new().bytes(2, b"pixels").into_bytes();
        let table = [
            (generate_request().bytes(4, &sampling), NoPrompt::Truncated),
            (generate_request().bytes(7, &hashless), NoPrompt::UnprocessedMedia),
            (generate_request().bytes(11, &hashless), NoPrompt::UnprocessedMedia),
            (generate_request().bytes(10, b""), NoPrompt::UnprocessedMedia),
        ];
        for (request, expected) in table {
            let frame = request.into_frame();
            let body = read(Api::GrpcGenerate, &frame);
            assert!(matches!(body.prompt, Prompt::None(why) if why == expected), "{body:?}");
            assert_eq!(body.skips_cache, expected == NoPrompt::Truncated);
        }
    }

    #[test]
    fn bodies_inside_of_messages_of_vertex() {
        let json = br#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}"#;
        let http_body = Message::new().bytes(1, b"application/json").bytes(2, json).into_bytes();
        let frame = Message::new().bytes(1, b"projects/p").bytes(2, &http_body).into_frame();
        let body = read(Api::VertexChat, &frame);
        assert!(matches!(&body.prompt, Prompt::Chat(_)) && body.stream);
        assert_eq!(body.model.as_deref(), Some("m"));
        let json = br#"{"model":"m","input":"hi"}"#;
        let http_body = Message::new().bytes(2, json).into_bytes();
        let frame = Message::new().bytes(2, &http_body).into_frame();
        for api in [Api::VertexRaw, Api::VertexStreamRaw] {
            assert!(matches!(read(api, &frame).prompt, Prompt::Chat(_)));
        }
        let error = parse(Api::VertexChat, &frame).unwrap_err();
        assert_eq!(error.to_string(), "`messages` is missing; chat_completions needs it");
        let empty = Message::new().bytes(1, b"projects/p").into_frame();
        let error = parse(Api::VertexChat, &empty).unwrap_err().to_string();
        assert_eq!(error, "`http_body` is missing; Vertex AI's prediction service needs it");
    }

    #[test]
    fn frames_that_are_refused() {
        let whole = generate_request().into_frame();
        let mut compressed = whole.clone();
        compressed[0] = 1;
        let mut strange = whole.clone();
        strange[0] = b'{';
        let mut twice = whole.clone();
        twice.extend_from_slice(&whole);
        let cut = &whole[..whole.len() - 1];
        let bad = |message: &str| format!("the gRPC message cannot be read: {message}");
        let table: &[(&[u8], String)] = &[
            (&[], bad("the body is shorter than the head of a frame (5 bytes)")),
            (&[0; 4], bad("the body is shorter than the head of a frame (5 bytes)")),
            (&compressed, BodyError::Compressed.to_string()),
            (&strange, bad("the body does not begin with a frame")),
            (&twice, bad("more than one message, where the method takes one")),
            (cut, bad("its frame is cut off")),
            (&[0, 0xff, 0xff, 0xff, 0xff, 1], bad("its frame is cut off")),
            (&[0; 5], "`tokenized` is missing; grpc_generate needs it".to_owned()),
            (&[0, 0, 0, 0, 2, 0x12, 9], bad("a field is cut off")),
            (&[0, 0, 0, 0, 3, 0x1a, 1, 0xff], bad("`text` is not UTF-8")),
        ];
        for (frame, expected) in table {
            let error = parse(Api::GrpcGenerate, frame).unwrap_err();
            assert_eq!(error.to_string(), *expected, "{frame:?}");
        }
        assert!(parse(Api::GrpcEmbed, &[0; 5]).is_err());
        let many = (0..=MULTIMODAL_ITEMS_MAX).fold(Message::new(), |m, _| m.bytes(6, b"h"));
        let frame = generate_request().bytes(7, &many.into_bytes()).into_frame();
        let error = parse(Api::GrpcGenerate, &frame).unwrap_err().to_string();
        assert!(error.contains("more than 4096 multimodal items"), "{error}");
    }
}
