//! How are mistakes in configurations told? Every file of `tests/data/broken` is refused with the
//! message beside it. `KVROUTE_BLESS=1 cargo test -p kvroute --test broken` writes the messages:
//! read them as somebody who has made the mistake.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::{Path, PathBuf};

use kvroute::config;
use kvroute_core::plan::Experimental;
use kvroute_wire::config::CONFIG_BYTES_MAX;

/// First line of files that are wrong even with the flag.
const WITH_FLAG: &str = "# --allow-experimental-plugins\n";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/broken")
}

fn broken() -> Vec<PathBuf> {
    let entries = fs::read_dir(folder()).unwrap();
    let files = entries.map(|entry| entry.unwrap().path());
    let is_config = |path: &PathBuf| path.extension().is_some_and(|e| e == "yaml" || e == "json");
    let mut files: Vec<PathBuf> = files.filter(is_config).collect();
    files.sort();
    files
}

fn message(text: &str, name: &str) -> String {
    let experimental = Experimental::from(text.starts_with(WITH_FLAG));
    match config::read(text, name, experimental) {
        Ok(_) => format!("{name} loads\n"),
        Err(error) => format!("{error}\n"),
    }
}

#[test]
fn every_mistake_is_told_as_it_should() {
    let files = broken();
    assert!(files.len() >= 30, "{} broken files", files.len());
    let bless = std::env::var_os("KVROUTE_BLESS").is_some();
    let mut faults = Vec::new();
    for path in files {
        let name = path.file_name().unwrap().to_str().unwrap();
        let found = message(&fs::read_to_string(&path).unwrap(), name);
        assert!(found.starts_with("error in "), "{found}");
        let beside = path.with_extension("txt");
        if bless {
            fs::write(&beside, &found).unwrap();
        }
        let expected = fs::read_to_string(&beside).unwrap_or_default();
        if found != expected {
            faults.push(format!("{name}: expected\n{expected}\nfound\n{found}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_message_has_its_file() {
    let names = broken().into_iter().map(|path| path.with_extension("txt"));
    let names: Vec<PathBuf> = names.collect();
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let known = path.extension().is_some_and(|e| e != "txt") || names.contains(&path);
        assert!(known, "{} belongs to no configuration", path.display());
    }
}

/// Nearly all mistakes have a place; those of a whole file have none.
#[test]
fn errors_name_line_column_and_path() {
    for path in broken() {
        let text = fs::read_to_string(&path).unwrap();
        let experimental = Experimental::from(text.starts_with(WITH_FLAG));
        let name = path.file_stem().unwrap().to_str().unwrap();
        let Err(error) = config::read(&text, name, experimental) else { panic!("{name} loads") };
        let whole = ["empty", "only-a-comment", "text"].contains(&name);
        assert_eq!(error.line.is_none(), whole, "{error}");
        assert_eq!(error.column.is_none(), whole, "{error}");
        let syntax = ["yaml-", "json-syntax", "duplicate-key", "duplicate-top", "several", "deep"];
        let has_path = !whole && !syntax.iter().any(|prefix| name.starts_with(prefix));
        assert_eq!(!error.path.is_empty(), has_path, "{name}: {}", error.path);
    }
}

#[test]
fn a_file_that_is_too_large() {
    let text = format!("plugins: []\n# {}\n", "x".repeat(CONFIG_BYTES_MAX));
    let expected = format!(
        "error in big.yaml: {} bytes, more than the limit of {CONFIG_BYTES_MAX}\n",
        text.len()
    );
    assert_eq!(message(&text, "big.yaml"), expected);
}
