//! The ids of real requests against the ids that a real engine gave for them.
//!
//! Needs the Qwen 3 tokenizer, which is not in the repository (tests/data/tokenizer/README.md);
//! without it the tests say so and check nothing.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use kvroute_tokens::{Tokenizer, TokenizerOptions};
use kvroute_wire::api::Api;
use kvroute_wire::request;
use serde::Deserialize;
use serde_json::value::RawValue;

/// One request of a recording.
#[derive(Deserialize)]
struct Recorded<'a> {
    label: &'a str,
    path: &'a str,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
    #[serde(borrow)]
    tokenize: Option<&'a RawValue>,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Says so past the capture of test output: a check that did not run must not look like one that
/// passed.
fn skipped(why: &str) {
    let mut stderr = std::io::stderr();
    writeln!(stderr, "SKIPPED: {why}").unwrap();
}

fn tokenizer() -> Option<Tokenizer> {
    let named = std::env::var_os("KVROUTE_QWEN3_TOKENIZER").map(PathBuf::from);
    let path = named.unwrap_or_else(|| repository().join("target/tokenizers/qwen3"));
    if !path.exists() {
        let fetch = "run scripts/fetch-tokenizer.sh or set KVROUTE_QWEN3_TOKENIZER";
        skipped(&format!("no Qwen 3 tokenizer at {} ({fetch})", path.display()));
        return None;
    }
    Some(Tokenizer::load(&path, &TokenizerOptions::default()).expect("the tokenizer loads"))
}

/// Compares every prompt of a file of requests; the number that were equal.
fn check_file(tokenizer: &Tokenizer, path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap();
    let mut equal = 0;
    let mut different = Vec::new();
    for line in text.lines() {
        let recorded: Recorded<'_> = serde_json::from_str(line).unwrap();
        let (Some(body), Some(ids)) = (recorded.body, recorded.tokenize) else { continue };
        // Absent where the prompt was given as ids, a list of lists where there were several.
        let Ok(want) = serde_json::from_str::<Vec<u32>>(ids.get()) else { continue };
        let body = request::parse(Api::from_path(recorded.path), body.get().as_bytes()).unwrap();
        match tokenizer.tokens_of(&body) {
            Ok(got) if got == [want.clone()] => equal += 1,
            got => different.push((recorded.label.to_owned(), got, want)),
        }
    }
    assert!(different.is_empty(), "{}: {equal} equal, {different:?}", path.display());
    equal
}

#[test]
fn ids_are_those_of_the_engine() {
    let Some(tokenizer) = tokenizer() else { return };
    let path = repository().join("tests/data/tokenizer/qwen3_prompts.jsonl");
    assert_eq!(check_file(&tokenizer, &path), 32);
    // Once more, from the cache.
    assert_eq!(check_file(&tokenizer, &path), 32);
}

#[test]
fn ids_are_those_of_the_engine_in_further_recordings() {
    let Some(folder) = std::env::var_os("KVROUTE_RECORDINGS") else {
        skipped("no folder of recordings is named in KVROUTE_RECORDINGS");
        return;
    };
    let Some(tokenizer) = tokenizer() else { return };
    let mut counts = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path().join("requests.jsonl");
        if path.exists() {
            counts.insert(path.display().to_string(), check_file(&tokenizer, &path));
        }
    }
    println!("equal prompts: {counts:#?}");
    assert!(counts.values().sum::<usize>() > 0);
}
