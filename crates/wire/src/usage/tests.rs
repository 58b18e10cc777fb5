use super::*;
use crate::protobuf::fixture::Message;
use kvroute_core::Rng;

fn scan(chunks: &[&[u8]]) -> Option<Usage> {
    let mut scanner = UsageScanner::new();
    chunks.iter().for_each(|chunk| scanner.push(chunk));
    scanner.usage()
}

fn used(prompt_tokens: u32, completion_tokens: u32, cached: Option<u32>) -> Option<Usage> {
    Some(Usage { prompt_tokens, completion_tokens, cached_tokens: cached })
}

const CHAT_STREAM: &str = concat!(
    "data: {\"id\":\"c\",\"choices\":[{\"delta\":{\"content\":",
    "\"say \\\"usage\\\":{\\\"prompt_tokens\\\":1} \\\\\\\\\"}}],\"usage\":null}\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"he: \\\"usage\"}}]}\r\n\r\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":394,\"total_tokens\":402,",
    "\"completion_tokens\":8,\"prompt_tokens_details\":{\"cached_tokens\":320,",
    "\"created_cache_tokens\":null,\"multimodal_tokens\":{}}}}\n\ndata: [DONE]\n\n"
);
const RESPONSES_STREAM: &str = concat!(
    "event: response.completed\ndata: {\"type\":\"response.completed\",",
    "\"response\":{\"tools\":",
    "[{\"usage\":{\"type\":\"}\"}}],\"usage\" : {\"input_tokens\":10,\"input_tokens_details\":",
    "{\"cached_tokens\":4},\"output_tokens\":7,\"output_tokens_details\":null}}}\n\n"
);

fn bodies() -> Vec<(String, Option<Usage>)> {
    let continuous = concat!(
        "data: {\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1,",
        "\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n",
        "data: {\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3}}\n\n"
    );
    let pretty =
        "{\n  \"usage\": {\n    \"prompt_tokens\": 3,\n    \"completion_tokens\": 0\n  }\n}";
    let large = format!("{{\"usage\":{{\"x\":\"{}\"}}}}", "y".repeat(USAGE_BYTES_MAX));
    let after_large = format!("{large}{pretty}");
    let table = [
        (CHAT_STREAM, used(394, 8, Some(320))),
        (RESPONSES_STREAM, used(10, 7, Some(4))),
        (continuous, used(5, 3, Some(2))),
        (pretty, used(3, 0, None)),
        (&after_large, used(3, 0, None)),
        (&large, None),
        ("{\"usage\":null}", None),
        ("{\"usage\":{}}", None),
        ("{\"usage\":{\"prompt_tokens\":\"5\"}}", None),
        ("{\"usage\":{\"prompt_tokens\":5", None),
        ("{\"usage\" {\"prompt_tokens\":5}}", None),
        ("{\"x\\\"usage\":{\"prompt_tokens\":5}}", None),
        ("{\"x\":\"\\\\\",\"usage\":{\"prompt_tokens\":5}}", used(5, 0, None)),
        ("\"\"usage\":{\"prompt_tokens\":5}", used(5, 0, None)),
        ("\"us\"usage\":{\"prompt_tokens\":5}", used(5, 0, None)),
        ("", None),
        ("data: [DONE]\n\n", None),
    ];
    table.iter().map(|(text, usage)| ((*text).to_owned(), *usage)).collect()
}

#[test]
fn bodies_say_what_they_say() {
    for (body, usage) in bodies() {
        assert_eq!(scan(&[body.as_bytes()]), usage, "{body}");
    }
}

#[test]
fn every_split_says_the_same() {
    for (body, usage) in bodies() {
        let bytes = body.as_bytes();
        for at in 0..=bytes.len() {
            assert_eq!(scan(&[&bytes[..at], &bytes[at..]]), usage, "{body} cut at {at}");
        }
        let singles: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(scan(&singles), usage, "{body} byte by byte");
        for seed in 0..200 {
            let mut rng = Rng::seeded(seed);
            let mut chunks = Vec::new();
            let mut rest = bytes;
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(1 + rng.below(rest.len().min(40)));
                chunks.push(chunk);
                rest = tail;
            }
            assert_eq!(scan(&chunks), usage, "{body} seed {seed}");
        }
    }
}

#[test]
fn recorded_answers_at_every_split() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/answers.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let mut answers = 0;
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        let count = |field: &serde_json::Value| field.as_u64().map(|value| value as u32);
        let usage = &value["usage"];
        let expected = used(
            count(&usage["prompt_tokens"]).unwrap(),
            count(&usage["completion_tokens"]).unwrap(),
            count(&usage["prompt_tokens_details"]["cached_tokens"]),
        );
        let bytes = line.as_bytes();
        for at in 0..=bytes.len() {
            assert_eq!(scan(&[&bytes[..at], &bytes[at..]]), expected, "cut at {at}: {line}");
        }
        answers += 1;
    }
    assert!(answers >= 8, "{answers} answers");
}

#[test]
fn memory_stays_bounded() {
    let mut scanner = JsonScanner::new(&USAGE);
    scanner.push(b"\"usage\":{");
    for _ in 0..1000 {
        scanner.push(&[b'{'; 1000]);
    }
    assert!(scanner.object.capacity() <= 2 * USAGE_BYTES_MAX);
}

const ANTHROPIC_STREAM: &str = concat!(
    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",",
    "\"usage\":{\"input_tokens\":15,\"cache_creation_input_tokens\":100,",
    "\"cache_read_input_tokens\":320,\"output_tokens\":1}}}\n\n",
    "event: content_block_delta\ndata: {\"delta\":{\"text\":\"\\\"usage\\\":{}\"}}\n\n",
    "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},",
    "\"usage\":{\"output_tokens\":42}}\n\n"
);

/// vLLM says in the first event that it does not know yet what came from the cache.
const ANTHROPIC_STREAM_OF_VLLM: &str = concat!(
    "data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":394,",
    "\"output_tokens\":0}}}\n\n",
    "data: {\"type\":\"message_delta\",\"usage\":{\"input_tokens\":74,\"output_tokens\":8,",
    "\"cache_read_input_tokens\":320}}\n\n"
);

const SGLANG_STREAM: &str = concat!(
    "data: {\"text\":\"say \\\"meta_info\\\":{\\\"prompt_tokens\\\":1}\",",
    "\"meta_info\":{\"id\":\"r\",\"finish_reason\":null,\"prompt_tokens\":394,",
    "\"completion_tokens\":1,\"cached_tokens\":320}}\n\n",
    "data: {\"text\":\"x\",\"usage\":{\"prompt_tokens\":7},\"meta_info\":{\"finish_reason\":",
    "{\"type\":\"stop\",\"matched\":2},\"prompt_tokens\":394,\"completion_tokens\":8,",
    "\"cached_tokens\":320,\"e2e_latency\":0.5}}\n\ndata: [DONE]\n\n"
);

fn chunk(prompt: u64, completion: u64, cached: u64) -> Message {
    let chunk = Message::new().packed(1, &[7, 70_000]).varint(2, prompt).varint(3, completion);
    Message::new().bytes(1, &chunk.varint(4, cached).bytes(5, &[0xff; 40]).into_bytes())
}

fn complete(prompt: u64, completion: u64, cached: u64, index: u64) -> Message {
    let complete = Message::new().packed(1, &[7]).bytes(2, b"stop").varint(3, prompt);
    let complete = complete.varint(4, completion).varint(5, cached).varint(8, index);
    Message::new().bytes(2, &complete.into_bytes())
}

/// Answers of the other APIs, and what they say.
fn answers() -> Vec<(Api, Vec<u8>, Option<Usage>)> {
    let frames = |messages: Vec<Message>| -> Vec<u8> {
        messages.into_iter().flat_map(Message::into_frame).collect()
    };
    let http = |text: &str| Message::new().bytes(1, b"text/event-stream").bytes(2, text.as_bytes());
    let (start, end) = CHAT_STREAM.split_at(CHAT_STREAM.len() - 90);
    let mut compressed = frames(vec![complete(1, 1, 1, 0)]);
    compressed[0] = 1;
    let mut broken = Message::new().bytes(1, &[0x0b, 1, 2, 3]).into_frame();
    broken.extend(frames(vec![complete(9, 2, 0, 0)]));
    let mut after_compressed = compressed.clone();
    after_compressed.extend(frames(vec![chunk(9, 1, 4)]));
    let embedded = Message::new().bytes(1, &[8; 64]).varint(2, 12).varint(3, 16);
    vec![
        (Api::Messages, ANTHROPIC_STREAM.into(), used(435, 42, Some(320))),
        (Api::Messages, ANTHROPIC_STREAM_OF_VLLM.into(), used(394, 8, Some(320))),
        (
            Api::Messages,
            br#"{"content":[],"usage":{"input_tokens":5,"output_tokens":2}}"#.into(),
            used(5, 2, None),
        ),
        (Api::SglangGenerate, SGLANG_STREAM.into(), used(394, 8, Some(320))),
        (Api::SglangGenerate, br#"{"meta_info":{"id":"r"}}"#.into(), None),
        (
            Api::GrpcGenerate,
            frames(vec![chunk(31, 1, 16), chunk(31, 2, 16)]),
            used(31, 2, Some(16)),
        ),
        (
            Api::GrpcGenerate,
            frames(vec![chunk(31, 1, 16), complete(31, 300, 16, 0)]),
            used(31, 300, Some(16)),
        ),
        // Two outputs of one request: each tells its own tokens.
        (
            Api::GrpcGenerate,
            frames(vec![complete(31, 3, 16, 0), complete(31, 4, 16, 1)]),
            used(31, 7, Some(16)),
        ),
        // Zeros are not sent.
        (Api::GrpcGenerate, frames(vec![complete(31, 1, 0, 0)]), used(31, 1, Some(0))),
        (Api::GrpcGenerate, frames(vec![Message::new().bytes(1, b"")]), None),
        (Api::GrpcGenerate, frames(vec![Message::new()]), None),
        (Api::GrpcGenerate, compressed, None),
        (Api::GrpcGenerate, after_compressed, used(9, 1, Some(4))),
        (Api::GrpcGenerate, broken, used(9, 2, Some(0))),
        (Api::GrpcEmbed, frames(vec![embedded]), used(12, 0, None)),
        (Api::VertexChat, frames(vec![http(start), http(end)]), used(394, 8, Some(320))),
        (Api::VertexRaw, frames(vec![http(RESPONSES_STREAM)]), used(10, 7, Some(4))),
        (Api::VertexStreamRaw, frames(vec![http(""), http("{}")]), None),
    ]
}

#[test]
fn answers_of_other_apis_at_every_split() {
    for (at, (api, bytes, expected)) in answers().into_iter().enumerate() {
        let scan = |chunks: &[&[u8]]| {
            let mut scanner = UsageScanner::of(api).unwrap();
            chunks.iter().for_each(|chunk| scanner.push(chunk));
            scanner.usage()
        };
        assert_eq!(scan(&[&bytes]), expected, "{api:?} {at}");
        for cut in 0..=bytes.len() {
            assert_eq!(
                scan(&[&bytes[..cut], &bytes[cut..]]),
                expected,
                "{api:?} {at} cut at {cut}"
            );
        }
        let singles: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(scan(&singles), expected, "{api:?} {at} byte by byte");
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let mut chunks = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(1 + rng.below(rest.len().min(20)));
                chunks.push(chunk);
                rest = tail;
            }
            assert_eq!(scan(&chunks), expected, "{api:?} {at} seed {seed}");
        }
    }
}

#[test]
fn an_answer_that_breaks_off_says_what_it_said_before() {
    let mut bytes = chunk(31, 1, 16).into_frame();
    let first = bytes.len();
    bytes.extend(chunk(31, 2, 16).into_frame());
    for end in 0..bytes.len() {
        let mut scanner = UsageScanner::of(Api::GrpcGenerate).unwrap();
        scanner.push(&bytes[..end]);
        let expected = if end < first { None } else { used(31, 1, Some(16)) };
        assert_eq!(scanner.usage(), expected, "{end}");
    }
}

#[test]
fn only_apis_with_usage_have_scanners() {
    for api in Api::ALL {
        assert_eq!(UsageScanner::of(api).is_some(), api.tells_usage(), "{api:?}");
    }
    let silent = [Api::CountTokens, Api::Conversations, Api::Render, Api::Other];
    assert!(silent.iter().all(|api| !api.tells_usage()));
}

#[test]
fn a_usage_object_alone() {
    let anthropic = br#"{"input_tokens":15,"cache_read_input_tokens":20,"output_tokens":3}"#;
    assert_eq!(parse_object(anthropic), used(35, 3, Some(20)));
    assert_eq!(parse_object(br#"{"prompt_tokens":5}"#), used(5, 0, None));
    assert_eq!(parse_object(b"{}"), None);
}
