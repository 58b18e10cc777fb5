//! `kvroute replay` on recordings of real vLLM 0.32.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use kvroute::replay::{self, Report, recording::Recording};
use kvroute_tokens::{Tokenizer, TokenizerOptions};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn traces(name: &str) -> PathBuf {
    root().join("tests/data/traces").join(name)
}

fn replay(dir: &Path) -> Report {
    replay::run(&Recording::read(dir).unwrap(), None)
}

#[test]
fn single_group_recordings_have_no_wrong_prediction() {
    for name in ["sha256", "byteshash", "lora"] {
        let report = replay(&traces(name));
        assert_eq!(report.wrong, 0, "{name}: {:#?}", report.mismatches);
        assert!(report.right >= 43, "{name}: {report:#?}");
        assert!(report.stream_faults.is_empty(), "{name}: {report:#?}");
    }
}

#[test]
fn the_hybrid_recording_has_two_wrong_at_most() {
    let report = replay(&traces("hybrid"));
    assert_eq!(report.right + report.wrong, 45);
    assert!(report.right >= 43, "{:#?}", report.mismatches);
    assert!(report.mismatches.iter().all(|m| m.reason.contains("hybrid")), "each has its reason");
}

#[test]
fn several_engines_are_told_apart_by_port() {
    let dir = std::env::temp_dir().join(format!("kvroute-replay-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let requests = fs::read_to_string(traces("sha256").join("requests.jsonl")).unwrap();
    let port = requests.split("\"port\":").nth(1).unwrap().split([',', '}']).next().unwrap();
    let of_port =
        |new: &str| requests.replace(&format!("\"port\":{port},"), &format!("\"port\": {new},"));
    fs::write(dir.join("requests.jsonl"), of_port("8200") + &of_port("8210")).unwrap();
    for port in ["8200", "8210"] {
        let to = dir.join(format!("kv_events-{port}.jsonl"));
        fs::copy(traces("sha256").join("kv_events.jsonl"), to).unwrap();
    }
    let report = replay(&dir);
    assert_eq!((report.wrong, report.right), (0, 2 * replay(&traces("sha256")).right));
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_missing_batch_is_told() {
    let dir = std::env::temp_dir().join(format!("kvroute-replay-gap-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    fs::copy(traces("sha256").join("requests.jsonl"), dir.join("requests.jsonl")).unwrap();
    let events = fs::read_to_string(traces("sha256").join("kv_events.jsonl")).unwrap();
    let kept: Vec<&str> =
        events.lines().enumerate().filter(|(at, _)| *at != 3).map(|(_, line)| line).collect();
    fs::write(dir.join("kv_events.jsonl"), kept.join("\n")).unwrap();
    let report = replay(&dir);
    assert!(report.wrong > 0);
    assert!(report.mismatches.iter().any(|m| m.reason.contains("incomplete")), "{report:#?}");
    fs::remove_dir_all(dir).unwrap();
}

/// Needs Qwen3's tokenizer: `scripts/fetch-tokenizer.sh` puts it there.
#[test]
fn prompts_tokenize_as_in_the_engine() {
    let path = root().join("target/tokenizers/qwen3/tokenizer.json");
    if !path.exists() {
        // Past the capture of the test runner, so that it is seen.
        let line = b"SKIPPED: no Qwen3 tokenizer; run scripts/fetch-tokenizer.sh\n";
        std::io::stderr().write_all(line).unwrap();
        return;
    }
    let tokenizer = Tokenizer::load(&path, &TokenizerOptions::default()).unwrap();
    for name in ["sha256", "byteshash", "lora", "hybrid"] {
        let recording = Recording::read(&traces(name)).unwrap();
        let report = replay::run(&recording, Some(&tokenizer));
        assert_eq!(report.tokens_different, 0, "{name}: {:#?}", report.mismatches);
        assert!(report.tokens_equal >= 40, "{name}: {report:#?}");
    }
}
