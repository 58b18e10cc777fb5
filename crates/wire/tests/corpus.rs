//! The fuzz targets over their corpora and over damaged golden inputs, without a fuzzer.

use std::path::{Path, PathBuf};

use kvroute_core::Rng;
use kvroute_wire::fuzz_entry::TARGETS;

const MUTATIONS_PER_INPUT: u64 = 300;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/wire").join(name)
}

/// The corpus of a target, in a fixed order.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = data("corpus").join(target);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<(String, Vec<u8>)> = entries
        .map(|entry| {
            let path = entry.expect("a readable folder").path();
            (path.display().to_string(), std::fs::read(&path).expect("a readable file"))
        })
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{target} has a corpus");
    inputs
}

/// One to four random damages: a flipped bit, a cut, an insertion, a repetition, a new byte.
fn damage(input: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len().max(1)).min(bytes.len());
        match rng.below(5) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << rng.below(8),
            1 => drop(bytes.drain(at..(at + 1 + rng.below(8)).min(bytes.len()))),
            2 => bytes.insert(at, rng.next_u64() as u8),
            3 => {
                let end = (at + 1 + rng.below(32)).min(bytes.len());
                let repeated = bytes[at..end].to_vec();
                bytes.splice(at..at, repeated);
            }
            4 if rng.below(8) == 0 => bytes.truncate(at),
            _ if !bytes.is_empty() => bytes[at] = b"\"{}[]:,\\\xc1\xdd\xff\x00\n #0"[rng.below(16)],
            _ => {}
        }
    }
    bytes
}

#[test]
fn every_corpus_passes() {
    for (name, run) in TARGETS {
        for (file, input) in corpus(name) {
            eprintln!("{name}: {file}");
            run(&input);
        }
    }
}

#[test]
fn damaged_inputs_never_panic() {
    for (target, (name, run)) in TARGETS.into_iter().enumerate() {
        for (index, (file, input)) in corpus(name).into_iter().enumerate() {
            for mutation in 0..MUTATIONS_PER_INPUT {
                let seed = (target as u64) << 48 | (index as u64) << 32 | mutation;
                let damaged = damage(&input, &mut Rng::seeded(seed));
                let outcome = std::panic::catch_unwind(|| run(&damaged));
                assert!(outcome.is_ok(), "{name}: {file} damaged with seed {seed}");
            }
        }
    }
}
