use std::borrow::Cow;
use std::ops::Range;

use kvroute_core::Rng;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::*;
use crate::api::Api;
use crate::request;

const API: Api = Api::Completions;

/// The answer in the client's words, and how many pieces it took.
fn restored(to: &str, from: &str, chunks: &[&[u8]]) -> (Vec<u8>, usize) {
    let mut restorer = Restorer::new(to, from);
    let mut out: Vec<Bytes> = Vec::new();
    let mut given = 0;
    for chunk in chunks {
        given += chunk.len();
        restorer.push(Bytes::copy_from_slice(chunk), &mut out);
        assert!(restorer.held.len() <= restorer.held_bytes_max(), "{}", restorer.held.len());
    }
    restorer.finish(&mut out);
    assert!(given == 0 || out.iter().all(|piece| !piece.is_empty()));
    (out.concat(), out.len())
}

fn check(to: &str, from: &str, answer: &str, expected: &str) {
    let bytes = answer.as_bytes();
    let text =
        |chunks: &[&[u8]]| String::from_utf8_lossy(&restored(to, from, chunks).0).into_owned();
    assert_eq!(text(&[bytes]), expected, "{answer}");
    for at in 0..=bytes.len() {
        assert_eq!(text(&[&bytes[..at], &bytes[at..]]), expected, "{answer} cut at {at}");
    }
    for size in 1..9 {
        let chunks: Vec<&[u8]> = bytes.chunks(size).collect();
        assert_eq!(text(&chunks), expected, "{answer} in chunks of {size}");
    }
}

#[test]
fn answers_name_the_model_that_was_asked_for() {
    let spaced = format!("{{\"model\":{}\"t\"}}", " ".repeat(1_000));
    let spaced_restored = spaced.replace("\"t\"", "\"in\"");
    let table = [
        (r#"{"model":"t","x":1}"#, r#"{"model":"in","x":1}"#),
        (r#"{"model": "t"}"#, r#"{"model": "in"}"#),
        ("{\"model\"\n :\t\r\n\"t\"}", "{\"model\"\n :\t\r\n\"in\"}"),
        ("\r\n {\n\"a\":[\n],\n\"model\":\"t\"\n}", "\r\n {\n\"a\":[\n],\n\"model\":\"in\"\n}"),
        (r#"{"model":"\u0074"}"#, r#"{"model":"in"}"#),
        (r#"{"model":"t","model":"t"}"#, r#"{"model":"in","model":"in"}"#),
        (r#"{"message":{"model":"t"},"model":"t"}"#, r#"{"message":{"model":"in"},"model":"in"}"#),
        (r#"{"response":{"x":{},"model":"t"}}"#, r#"{"response":{"x":{},"model":"in"}}"#),
        (r#"{"x":"\\","model":"t"}"#, r#"{"x":"\\","model":"in"}"#),
        (r#"{"x":[{"model":"t"},"]"],"model":"t"}"#, r#"{"x":[{"model":"t"},"]"],"model":"in"}"#),
        (&spaced, &spaced_restored),
    ];
    for (answer, expected) in table {
        check("t", "in", answer, expected);
    }
    let untouched = [
        "",
        "data: [DONE]\n\n",
        r#"{"model":"other"}"#,
        r#"{"model":"tt"}"#,
        r#"{"model":""}"#,
        r#"{"model":null,"t":"t"}"#,
        r#"{"model":["t"]}"#,
        r#"{"model":{"model":"t"}}"#,
        r#"{"models":"t","a_model":"t","model ":"t","\model":"t","mod\u0065l":"t"}"#,
        r#"{"text":"say \"model\":\"t\""}"#,
        r#"{"text":"\\\"model\":\"t\"}"}"#,
        r#"{"text":"model","x":"t"}"#,
        r#"["model","t"]"#,
        r#"[{"model":"t"}]"#,
        r#""model":"t""#,
        r#"{"model":"t"#,
        r#"{"model""#,
        r#"{"mod"#,
        r#"{"model":"\u00"#,
        r#"{"model":"\ud800"}"#,
    ];
    for answer in untouched {
        check("t", "in", answer, answer);
    }
}

/// What a model generates is the client's, also where it is JSON that names a model.
#[test]
fn what_is_generated_stays() {
    let anthropic = r#"{"type":"message","model":"t","content":[{"type":"tool_use","name":"buy",
        "input":{"model":"t","message":{"model":"t"}}}],"usage":{"model":"t"}}"#;
    check("t", "in", anthropic, &anthropic.replacen("\"t\"", "\"in\"", 1));
    let untouched = [
        r#"{"choices":[{"message":{"model":"t","tool_calls":[{"model":"t"}]}}]}"#,
        r#"{"message":{"input":{"model":"t"}},"response":{"output":[{"model":"t"}]}}"#,
        r#"{"message":[{"model":"t"}],"response":"model","x":"t"}"#,
        r#"{"message":{"message":{"model":"t"}},"x":{"response":{"model":"t"}}}"#,
        r#"{"messages":{"model":"t"},"respons":{"model":"t"},"responses":{"model":"t"}}"#,
        r#"{"message":0,"x":{"model":"t"}}"#,
        "data: {\"delta\":{\"partial_json\":\"{\\\"model\\\":\\\"t\\\"}\",\"model\":\"t\"}}\n\n",
    ];
    for answer in untouched {
        check("t", "in", answer, answer);
    }
}

#[test]
fn each_event_is_a_document() {
    let table = [
        (
            "data: {\"model\":\"t\",\"a\":1}\n\ndata: {\"model\":\"t\",\"a\":2}\n\ndata: [DONE]\n",
            "data: {\"model\":\"in\",\"a\":1}\n\ndata: {\"model\":\"in\",\"a\":2}\n\n\
             data: [DONE]\n",
        ),
        (
            "event: message_start\r\ndata:{\"message\":{\"model\":\"t\"}}\r\n\r\n",
            "event: message_start\r\ndata:{\"message\":{\"model\":\"in\"}}\r\n\r\n",
        ),
        (": wait\rdata:\t{\"model\":\"t\"}\r\r", ": wait\rdata:\t{\"model\":\"in\"}\r\r"),
        // An event that is cut off leaves no trace.
        ("data: {\"a\":{\ndata: {\"model\":\"t\"}", "data: {\"a\":{\ndata: {\"model\":\"in\"}"),
        ("data: {\"a\":\"\ndata: {\"model\":\"t\"}", "data: {\"a\":\"\ndata: {\"model\":\"in\"}"),
        (
            "data: {\"a\":\"\\\ndata: {\"model\":\"t\"}",
            "data: {\"a\":\"\\\ndata: {\"model\":\"in\"}",
        ),
        ("data: {\"mod\ndata: {\"model\":\"t\"}", "data: {\"mod\ndata: {\"model\":\"in\"}"),
        ("data: [[\ndata: {\"model\":\"t\"}", "data: [[\ndata: {\"model\":\"in\"}"),
    ];
    for (answer, expected) in table {
        check("t", "in", answer, expected);
    }
    let untouched = [
        "event: {\"model\":\"t\"}\n\n",
        "event: x\n{\"model\":\"t\"}\n\n",
        "datum: {\"model\":\"t\"}\n\n",
        "dat\na: {\"model\":\"t\"}\n\n",
        "x data: {\"model\":\"t\"}\n\n",
        "data: x {\"model\":\"t\"}\n\n",
        "data: {} {\"model\":\"t\"}\n\n",
        "data\n: {\"model\":\"t\"}\n\n",
        "<p>{\"model\":\"t\"}</p>",
    ];
    for answer in untouched {
        check("t", "in", answer, answer);
    }
}

#[test]
fn names_are_compared_unescaped_and_written_escaped() {
    let table = [
        ("a/b", r#"{"model":"a\/b"}"#, "in", r#"{"model":"in"}"#),
        ("a\"b\\", r#"{"model":"a\"b\\"}"#, "x\"y\n", r#"{"model":"x\"y\n"}"#),
        ("ü😀", r#"{"model":"ü😀"}"#, "in", r#"{"model":"in"}"#),
        ("ü😀", r#"{"model":"\u00fc\uD83D\ude00"}"#, "ß", r#"{"model":"ß"}"#),
        ("model", r#"{"model":"model","x":"model"}"#, "m", r#"{"model":"m","x":"model"}"#),
        ("", r#"{"model":""}"#, "in", r#"{"model":"in"}"#),
    ];
    for (to, answer, from, expected) in table {
        check(to, from, answer, expected);
    }
}

#[test]
fn chunks_without_the_key_are_not_copied_nor_held() {
    let mut restorer = Restorer::new("t", "in");
    for text in ["data: {\"choices\":[{\"text\":\"a\"}]}\n\n", "x\\", "a \"mode\": 3", ": 7}"] {
        let chunk = Bytes::copy_from_slice(text.as_bytes());
        let mut out: Vec<Bytes> = Vec::new();
        restorer.push(chunk.clone(), &mut out);
        assert_eq!(out, std::slice::from_ref(&chunk));
        assert_eq!(out[0].as_ptr(), chunk.as_ptr());
    }
    // Of a chunk with a name, all but the name is the chunk's own memory.
    let chunk = Bytes::from_static(b"{\"model\":\"t\",\"x\":1}");
    let mut restorer = Restorer::new("t", "in");
    let mut out: Vec<Bytes> = Vec::new();
    restorer.push(chunk.clone(), &mut out);
    assert_eq!(out.len(), 3);
    assert_eq!((out[0].as_ptr(), out[2].as_ptr()), (chunk.as_ptr(), chunk[12..].as_ptr()));
    // A name that is another one already is not waited for.
    let mut restorer = Restorer::new("t", "in");
    let mut out: Vec<Bytes> = Vec::new();
    restorer.push(Bytes::from_static(b"{\"model\":\"ot"), &mut out);
    assert_eq!(out.concat(), b"{\"model\":\"ot");
}

/// Keys as they are written: borrowed unless they have escapes.
#[derive(Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// The entries of an object, in order; none of what is no object.
struct Entries<'a>(Vec<(Key<'a>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries<'de>, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries<'de>;
            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                to.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// A document with the names in their places replaced.
fn by_force(text: &str, to: &str, from: &str) -> String {
    replaced(text, names(text, to), from)
}

fn replaced(text: &str, names: Vec<Range<usize>>, from: &str) -> String {
    let mut out = text.to_owned();
    for name in names {
        out.replace_range(name, &serde_json::to_string(from).unwrap());
    }
    out
}

/// Where a document has the name as serde_json reads it, from the last place to the first.
fn names(text: &str, to: &str) -> Vec<Range<usize>> {
    let mut names = Vec::new();
    let mut objects = vec![(text, true)];
    while let Some((object, is_root)) = objects.pop() {
        let Ok(Entries(entries)) = serde_json::from_str(object) else { continue };
        for (Key(key), value) in entries {
            let Cow::Borrowed(key) = key else { continue };
            let is_carrier = is_root && ["message", "response"].contains(&key);
            let is_name = serde_json::from_str::<String>(value.get()).is_ok_and(|name| name == to);
            if is_carrier {
                objects.push((value.get(), false));
            } else if key == "model" && is_name {
                let start = value.get().as_ptr() as usize - text.as_ptr() as usize;
                names.push(start..start + value.get().len());
            }
        }
    }
    names.sort_by_key(|name: &Range<usize>| std::cmp::Reverse(name.start));
    names
}

const NAMES: [&str; 6] = ["t", "model", "a/b", "q\"\\", "ü😀", "a longer name, of no meaning"];

/// The first names are the most likely ones.
fn name(rng: &mut Rng) -> &'static str {
    NAMES[rng.below(NAMES.len()).min(rng.below(NAMES.len()))]
}

fn string(rng: &mut Rng) -> String {
    const PIECES: [&str; 12] =
        ["model", "\"", "\\", ":", "t", "a/b", "\n", "\"model\":\"t\"", "ü", "{", "usage", " "];
    let text: String = match rng.below(3) {
        0 => ["model", "model", "message", "response"][rng.below(4)].to_owned(),
        1 => name(rng).to_owned(),
        _ => (0..rng.below(5)).map(|_| PIECES[rng.below(PIECES.len())]).collect(),
    };
    let mut quoted = serde_json::to_string(&text).unwrap();
    if rng.below(6) == 0 && text.is_ascii() && !text.contains(['"', '\\', '\n']) {
        let escaped: String = text.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
        quoted = format!("\"{escaped}\"");
    }
    quoted
}

/// Nesting of random texts.
const DEPTH: usize = 4;

fn value(rng: &mut Rng, depth: usize) -> String {
    let space = |rng: &mut Rng| ["", " ", "\n ", ""][rng.below(4)];
    let count = rng.below(5);
    let kind = match depth {
        0 => rng.below(3),
        DEPTH => 4,
        _ => rng.below(5),
    };
    match kind {
        0 => rng.below(100).to_string(),
        1 | 2 => string(rng),
        3 => {
            let items: Vec<String> = (0..count).map(|_| value(rng, depth - 1)).collect();
            format!("[{}]", items.join(","))
        }
        _ => {
            let entries: Vec<String> = (0..count)
                .map(|_| {
                    let (before, after) = (space(rng), space(rng));
                    let key = string(rng);
                    let value = match key == "\"model\"" && rng.below(4) > 0 {
                        true => serde_json::to_string(name(rng)).unwrap(),
                        false => value(rng, depth - 1),
                    };
                    format!("{key}{before}:{after}{value}")
                })
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

/// The text in chunks of random sizes.
fn cut<'a>(rng: &mut Rng, bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let end = (at + 1 + rng.below(12)).min(bytes.len());
        chunks.push(&bytes[at..end]);
        at = end;
    }
    chunks
}

#[test]
fn as_a_parser_that_knows_paths_would_however_it_is_cut() {
    let mut replaced = 0;
    for seed in 0..5_000 {
        let mut rng = Rng::seeded(seed);
        let text = value(&mut rng, DEPTH);
        let (to, from) = (name(&mut rng), name(&mut rng));
        let expected = by_force(&text, to, from);
        replaced += usize::from(expected != text);
        for chunks in [vec![text.as_bytes()], cut(&mut rng, text.as_bytes())] {
            let found = restored(to, from, &chunks).0;
            let found = String::from_utf8_lossy(&found);
            assert_eq!(found, expected, "seed {seed}: {to} to {from} in {text}");
        }
    }
    assert!(replaced > 100, "{replaced} texts with a name to replace");
}

/// Where nothing may wait from chunk to chunk, names that are cut stay, and no others.
#[test]
fn names_within_a_chunk_are_restored_where_nothing_may_wait() {
    let mut kept = 0;
    for seed in 0..5_000 {
        let mut rng = Rng::seeded(seed);
        let text = value(&mut rng, DEPTH);
        let (to, from) = (name(&mut rng), name(&mut rng));
        let chunks = cut(&mut rng, text.as_bytes());
        let mut ends = Vec::new();
        let (mut restorer, mut out): (_, Vec<Bytes>) = (Restorer::new(to, from), Vec::new());
        for chunk in chunks {
            ends.push(ends.last().unwrap_or(&0) + chunk.len());
            restorer.push(Bytes::copy_from_slice(chunk), &mut out);
            restorer.finish(&mut out);
        }
        let mut names = names(&text, to);
        let all = names.len();
        names.retain(|name| !ends.iter().any(|end| name.start < *end && *end < name.end));
        kept += all - names.len();
        let found = out.concat();
        let found = String::from_utf8_lossy(&found);
        assert_eq!(found, replaced(&text, names, from), "seed {seed}: {to} to {from} in {text}");
    }
    assert!(kept > 50, "{kept} names that are cut");
}

/// Events with documents, whole or cut off, between lines of all kinds.
#[test]
fn events_like_documents_of_their_own_however_they_are_cut() {
    let mut replaced = 0;
    for seed in 0..4_000 {
        let mut rng = Rng::seeded(seed);
        let (to, from) = (name(&mut rng), name(&mut rng));
        let end = ["\n", "\r\n"][rng.below(2)];
        let (mut text, mut expected) = (format!("event: x{end}"), format!("event: x{end}"));
        for _ in 0..rng.below(6) {
            // In an event, a document has no line ends.
            let document = value(&mut rng, DEPTH).replace('\n', " ");
            let before = ["data: ", "data:", "id: ", ": ", "datadata: "][rng.below(5)];
            let (mut written, mut wanted) = (document.clone(), document.clone());
            if before.starts_with("data:") {
                wanted = by_force(&document, to, from);
            }
            if wanted == document && rng.below(3) == 0 {
                let half = (0..=document.len() / 2).rev().find(|at| document.is_char_boundary(*at));
                written.truncate(half.unwrap());
                wanted.truncate(half.unwrap());
            }
            replaced += usize::from(written != wanted);
            text += &format!("{before}{written}{end}");
            expected += &format!("{before}{wanted}{end}");
        }
        for chunks in [vec![text.as_bytes()], cut(&mut rng, text.as_bytes())] {
            let found = restored(to, from, &chunks).0;
            let found = String::from_utf8_lossy(&found);
            assert_eq!(found, expected, "seed {seed}: {to} to {from} in {text}");
        }
    }
    assert!(replaced > 100, "{replaced} events with a name to replace");
}

fn rewritten(body: &str, name: &str) -> Option<String> {
    let bytes = Bytes::copy_from_slice(body.as_bytes());
    let place = request::parse(API, &bytes).unwrap().model_place?;
    Some(String::from_utf8(replace(&bytes, &place, name)?.concat()).unwrap())
}

#[test]
fn requests_change_in_nothing_but_the_name() {
    let table = [
        (r#"{"model":"a","prompt":"x"}"#, Some(r#"{"model":"n/1","prompt":"x"}"#)),
        (
            "{ \"z\" :\t9007199254740993, \"prompt\":\"<&>\u{e9}\\u00e9\",\n\"model\" : \"a\\/b\" }",
            Some(
                "{ \"z\" :\t9007199254740993, \"prompt\":\"<&>\u{e9}\\u00e9\",\n\"model\" : \
                 \"n/1\" }",
            ),
        ),
        (
            r#"{"model":"a","prompt":"x","model":"b","o":{"model":"c"}}"#,
            Some(r#"{"model":"a","prompt":"x","model":"n/1","o":{"model":"c"}}"#),
        ),
        (r#"{"model":null,"prompt":"x"}"#, Some(r#"{"model":"n/1","prompt":"x"}"#)),
        (r#"{"model":"","prompt":"x"}"#, Some(r#"{"model":"n/1","prompt":"x"}"#)),
        (r#"{"mod\u0065l":"a","prompt":"x"}"#, Some(r#"{"mod\u0065l":"n/1","prompt":"x"}"#)),
        (r#"{"prompt":"\"model\":\"a\""}"#, None),
        (r#"{"prompt":"x","o":{"model":"a"}}"#, None),
    ];
    for (body, expected) in table {
        assert_eq!(rewritten(body, "n/1").as_deref(), expected, "{body}");
    }
    let quotes = rewritten(r#"{"model":"a","prompt":"x"}"#, "a \"b\"\\").unwrap();
    assert_eq!(quotes, r#"{"model":"a \"b\"\\","prompt":"x"}"#);
}

#[test]
fn a_place_that_is_not_there_changes_nothing() {
    let body = Bytes::from_static(b"{}");
    assert_eq!(replace(&body, &(1..9), "n"), None);
    assert_eq!(place(&body, "\"elsewhere\""), None);
}

/// Only the body's own API has its model there; what is no name has no place.
#[test]
fn places_of_other_bodies() {
    let place = |api, body: &str| request::parse(api, body.as_bytes()).unwrap().model_place;
    assert_eq!(place(Api::CountTokens, r#"{"model":"m"}"#), Some(9..12));
    assert_eq!(place(Api::CountTokens, r#"{"model":7}"#), None);
    assert_eq!(place(Api::Other, "model"), None);
}
