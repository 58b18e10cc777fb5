use kvroute_core::Rng;

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
    let long_space = format!("{{\"model\":{}\"t\"}}", " ".repeat(SPACE_BYTES_MAX + 1));
    let most_space = format!("{{\"model\":{}\"t\"}}", " ".repeat(SPACE_BYTES_MAX));
    let most_restored = most_space.replace("\"t\"", "\"in\"");
    let table = [
        (r#"{"model":"t","x":1}"#, r#"{"model":"in","x":1}"#),
        (r#"{"model": "t"}"#, r#"{"model": "in"}"#),
        ("{\"model\"\n :\t\r\n\"t\"}", "{\"model\"\n :\t\r\n\"in\"}"),
        (r#"{"model":"\u0074"}"#, r#"{"model":"in"}"#),
        (r#"{"message":{"model":"t"},"model":"t"}"#, r#"{"message":{"model":"in"},"model":"in"}"#),
        (
            "data: {\"model\":\"t\",\"a\":1}\n\ndata: {\"model\":\"t\",\"a\":2}\n\ndata: [DONE]\n",
            "data: {\"model\":\"in\",\"a\":1}\n\ndata: {\"model\":\"in\",\"a\":2}\n\n\
             data: [DONE]\n",
        ),
        (r#"{"x":"\\","model":"t"}"#, r#"{"x":"\\","model":"in"}"#),
        (r#""mo"model":"t""#, r#""mo"model":"in""#),
        (r#""model""model":"t""#, r#""model""model":"in""#),
        (r#""model":"model":"t""#, r#""model":"model":"in""#),
        (&most_space, &most_restored),
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
        r#"{"models":"t","a_model":"t"}"#,
        r#"{"text":"say \"model\":\"t\""}"#,
        r#"{"text":"\\\"model\":\"t\"}"}"#,
        r#"{"text":"model","x":"t"}"#,
        r#"["model","t"]"#,
        r#"{"model":"t"#,
        r#"{"model""#,
        r#"{"mod"#,
        r#"{"model":"\u00"#,
        r#"{"model":"\ud800"}"#,
        &long_space,
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
    let mut out: Vec<Bytes> = Vec::new();
    restorer.push(chunk.clone(), &mut out);
    assert_eq!(out.len(), 3);
    assert_eq!((out[0].as_ptr(), out[2].as_ptr()), (chunk.as_ptr(), chunk[12..].as_ptr()));
    // A name that is another one already is not waited for.
    let mut out: Vec<Bytes> = Vec::new();
    restorer.push(Bytes::from_static(b"{\"model\":\"ot"), &mut out);
    assert_eq!(out.concat(), b"{\"model\":\"ot");
}

/// Walks over a JSON text string by string.
fn by_force(text: &str, to: &str, from: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::new();
    let (mut at, mut copied) = (0, 0);
    let mut key = None;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = at + end_of_string(&bytes[at..]).unwrap();
                let string = &text[at..end];
                let named = serde_json::from_str::<String>(string).is_ok_and(|name| name == to);
                if key == Some("\"model\"") && named {
                    out.push_str(&text[copied..at]);
                    out.push_str(&serde_json::to_string(from).unwrap());
                    copied = end;
                }
                let is_key = text[end..].trim_start().starts_with(':');
                key = is_key.then_some(string);
                at = end;
            }
            b':' | b' ' | b'\n' => at += 1,
            _ => {
                key = None;
                at += 1;
            }
        }
    }
    out + &text[copied..]
}

const NAMES: [&str; 6] = ["t", "model", "a/b", "q\"\\", "ü😀", "a longer name, of no meaning"];

fn string(rng: &mut Rng) -> String {
    const PIECES: [&str; 12] =
        ["model", "\"", "\\", ":", "t", "a/b", "\n", "\"model\":\"t\"", "ü", "{", "usage", " "];
    let text: String = match rng.below(3) {
        0 => "model".to_owned(),
        1 => NAMES[rng.below(NAMES.len())].to_owned(),
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
                    format!("{}{before}:{after}{}", string(rng), value(rng, depth - 1))
                })
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

#[test]
fn like_a_walk_over_the_strings_of_any_json_however_it_is_cut() {
    let mut replaced = 0;
    for seed in 0..3_000 {
        let mut rng = Rng::seeded(seed);
        let text = value(&mut rng, DEPTH);
        let (to, from) = (NAMES[rng.below(NAMES.len())], NAMES[rng.below(NAMES.len())]);
        let expected = by_force(&text, to, from);
        replaced += usize::from(expected != text);
        let bytes = text.as_bytes();
        let mut chunks = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let end = (at + 1 + rng.below(12)).min(bytes.len());
            chunks.push(&bytes[at..end]);
            at = end;
        }
        for chunks in [vec![bytes], chunks] {
            let found = restored(to, from, &chunks).0;
            let found = String::from_utf8_lossy(&found);
            assert_eq!(found, expected, "seed {seed}: {to} to {from} in {text}");
        }
    }
    assert!(replaced > 100, "{replaced} texts with a name to replace");
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
