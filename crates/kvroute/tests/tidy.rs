//! Is the tree tidy? Rules that a compiler does not check, as plain tests.

use std::fs;
use std::path::{Path, PathBuf};

use kvroute_core::plan::Experimental;

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 800;
const LINE_COLUMNS_MAX: usize = 100;

/// Calls that do not belong into shipped code, and why.
const BANNED_CALLS: &[(&str, &str)] = &[
    (".unwrap()", "say why it cannot fail with expect, or return an error"),
    ("todo!(", "build it"),
    ("unimplemented!(", "build it"),
    ("dbg!(", "log with tracing"),
];

/// Calls that the pure crates may not make.
const IMPURE_CALLS: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "std::env",
    "std::fs",
    "TcpStream",
    "std::thread",
    "tokio",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the workspace exists")
}

/// Every file below the workspace with one of these endings, build output and git left out.
fn files(endings: &[&str]) -> Vec<PathBuf> {
    fn walk(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a folder of the workspace can be read") {
            let path = entry.expect("its entries too").path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if path.is_dir() {
                if !matches!(name, "target" | ".git" | "node_modules") {
                    walk(&path, endings, found);
                }
            } else if endings.iter().any(|e| name.ends_with(e)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), endings, &mut found);
    found.sort();
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

fn is_test_file(path: &Path) -> bool {
    let name = shown(path);
    name.contains("/tests/") || name.contains("/examples/") || name.contains("/benches/")
}

/// The part of a source file that ships: up to its test module.
fn shipped(text: &str) -> &str {
    match text.find("\n#[cfg(test)]\nmod ") {
        Some(at) if text[at + 1..].lines().nth(1).is_some_and(|l| l.ends_with('{')) => {
            &text[..at + 1]
        }
        _ => text,
    }
}

/// Is this a whole file of tests, compiled for tests only by its parent?
fn is_test_module(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    matches!(name, "tests.rs" | "reference.rs" | "fixture.rs") || name.ends_with("_tests.rs")
}

fn sources() -> Vec<(PathBuf, String)> {
    files(&[".rs"])
        .into_iter()
        .map(|p| {
            let text = fs::read_to_string(&p).expect("source files are UTF-8");
            (p, text)
        })
        .collect()
}

/// Length of each function of rustfmt's output: from its `fn` line to the closing brace in the
/// same column.
fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let Some(name) = function_name(line.trim_start()) else { continue };
        let close = format!("{}}}", " ".repeat(indent));
        let Some(body) = lines[at..].iter().position(|l| l.ends_with('{') || l.ends_with(';'))
        else {
            continue;
        };
        if lines[at + body].ends_with(';') {
            continue;
        }
        if let Some(end) = lines[at..].iter().position(|l| *l == close) {
            found.push((at + 1, name.to_owned(), end + 1));
        }
    }
    found
}

fn function_name(line: &str) -> Option<&str> {
    let mut rest = line;
    for prefix in ["pub(crate) ", "pub(super) ", "pub ", "const ", "async ", "unsafe "] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest.strip_prefix("fn ")?.split(['(', '<']).next()
}

fn report(rule: &str, faults: Vec<String>) {
    assert!(faults.is_empty(), "{rule}:\n  {}", faults.join("\n  "));
}

#[test]
fn the_function_counter_counts() {
    let text = "impl X {\n    pub fn a(\n        b: u8,\n    ) -> u8 {\n        b\n    }\n}\n";
    assert_eq!(functions(text), vec![(2, "a".to_owned(), 5)]);
}

#[test]
fn functions_fit_a_screen() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        for (line, name, length) in functions(&text) {
            if length > FUNCTION_LINES_MAX {
                faults.push(format!("{}:{line} {name}: {length} lines", shown(&path)));
            }
        }
    }
    report("a function has at most 70 lines", faults);
}

#[test]
fn files_stay_readable() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let lines = shipped(&text).lines().count();
        if lines > FILE_LINES_MAX && !is_test_file(&path) && !is_test_module(&path) {
            faults.push(format!("{}: {lines} lines", shown(&path)));
        }
        for (at, line) in text.lines().enumerate() {
            let data = line.trim_start().starts_with(['"', 'r', 'b', '\\']) && line.contains('"');
            if line.chars().count() > LINE_COLUMNS_MAX && !data {
                faults.push(format!("{}:{}: over 100 columns", shown(&path), at + 1));
            }
        }
    }
    report("a file has at most 800 lines without tests, a line at most 100 columns", faults);
}

#[test]
fn no_banned_calls() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        if is_test_file(&path) || is_test_module(&path) || shown(&path).starts_with("benches/") {
            continue;
        }
        for (at, line) in shipped(&text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for (call, why) in BANNED_CALLS {
                if code.contains(call) {
                    faults.push(format!("{}:{} {call} {why}", shown(&path), at + 1));
                }
            }
        }
    }
    report("calls that do not ship", faults);
}

#[test]
fn core_and_wire_are_pure() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let name = shown(&path);
        let pure = name.starts_with("crates/core/src") || name.starts_with("crates/wire/src");
        if !pure || is_test_module(&path) {
            continue;
        }
        for (at, line) in shipped(&text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for call in IMPURE_CALLS.iter().filter(|c| code.contains(**c)) {
                faults.push(format!("{name}:{} {call}", at + 1));
            }
        }
    }
    report("core and wire touch no clock, file, socket, thread or environment", faults);
}

#[test]
fn arrows_between_crates_point_down() {
    let allowed: &[(&str, &[&str])] = &[
        ("core", &[]),
        ("wire", &["core"]),
        ("tokens", &["wire", "core"]),
        ("router", &["tokens", "wire", "core"]),
        ("lab", &["tokens", "wire", "core"]),
    ];
    let mut faults = Vec::new();
    for (name, below) in allowed {
        let path = root().join("crates").join(name).join("Cargo.toml");
        let manifest = fs::read_to_string(&path).expect("each crate has a manifest");
        for line in manifest.lines().filter_map(|l| l.strip_prefix("kvroute-")) {
            let other = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if !below.contains(&other) {
                faults.push(format!("{name} depends on {other}"));
            }
        }
        if !manifest.contains("[lints]\nworkspace = true") {
            faults.push(format!("{name} does not take the workspace's lints"));
        }
    }
    report("dependencies between crates", faults);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut faults = Vec::new();
    for path in files(&[".md"]) {
        let text = fs::read_to_string(&path).expect("documents are UTF-8");
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            let outside = file.starts_with("http:") || file.starts_with("https:");
            let beside = path.parent().expect("a file has a folder").join(file);
            if !file.is_empty() && !outside && !beside.exists() {
                faults.push(format!("{} -> {target}", shown(&path)));
            }
        }
    }
    report("links", faults);
}

#[test]
fn no_paths_of_a_machine() {
    let marks = ["/ho\u{6d}e/", "/ro\u{6f}t/", "/wor\u{6b}/", "/Us\u{65}rs/"];
    let mut faults = Vec::new();
    for path in files(&[".rs", ".md", ".toml", ".yaml", ".yml", ".sh", ".py"]) {
        let text = fs::read_to_string(&path).expect("text files are UTF-8");
        for mark in marks.iter().filter(|m| text.contains(**m)) {
            faults.push(format!("{}: {mark}", shown(&path)));
        }
    }
    report("the project names no path of a machine", faults);
}

#[test]
fn example_configurations_parse() {
    let examples = files(&[".yaml"]);
    let examples: Vec<_> =
        examples.into_iter().filter(|p| shown(p).starts_with("config/")).collect();
    assert!(!examples.is_empty(), "config/ holds examples");
    let mut faults = Vec::new();
    for path in examples {
        let text = fs::read_to_string(&path).expect("examples are UTF-8");
        if let Err(error) = kvroute::config::load_text(&text, &shown(&path), Experimental::Allowed)
        {
            faults.push(format!("{}: {error}", shown(&path)));
        }
    }
    let endpoints = root().join("config/endpoints.yaml.example");
    let text = fs::read_to_string(&endpoints).expect("examples are UTF-8");
    if let Err(error) = kvroute_wire::discovery::parse(&text, "config/endpoints.yaml.example") {
        faults.push(error.to_string());
    }
    report("an example configuration does not load", faults);
}
