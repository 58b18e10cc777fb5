//! What does `kvroute check` print, and with which exit code, without any engine?

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path =
            std::env::temp_dir().join(format!("kvroute-check-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

fn run(args: &[&str], input: &str) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvroute"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

const GOOD: &str = "plugins:\n- type: queue-scorer\n- type: decode-filter\n";
const BAD: &str = "plugins:\n- type: queue-scorrer\n";
const WORSE: &str = "plugins:\n- type: load-aware-scorer\n  parameters: {treshold: 1}\n";

#[test]
fn a_good_file_is_shown_as_a_plan() {
    let scratch = Scratch::new("good");
    let file = scratch.file("good.yaml", GOOD);
    let (code, out, err) = run(&["check", &file], "");
    assert_eq!((code, err.as_str()), (0, ""));
    let expected = format!(
        "{file}: ok

  handler   profile default for every request
  detector  utilization-detector
  profile   default
    filter  decode-filter
    scorer  queue-scorer            x 1
    picker  max-score-picker
  producer  inflight-load-producer  requests and tokens in flight
  tokens    not needed
  parsers   openai-parser, anthropic-parser, vllmhttp-parser, passthrough-parser
  data      metrics-data-source     /metrics: the engine's load (core-metrics-extractor)
  data      models-data-source      /v1/models: served models and adapters
  added     profile default: of every filter, scorer and picker
  added     max-score-picker: the profile has no picker
  added     single-profile-handler: there is one profile
  added     utilization-detector: says how full the fleet is
"
    );
    assert_eq!(out, expected);
}

#[test]
fn every_file_is_looked_at() {
    let scratch = Scratch::new("several");
    let files = [("a.yaml", BAD), ("b.yaml", GOOD), ("c.yaml", WORSE)];
    let files = files.map(|(name, text)| scratch.file(name, text));
    let (code, out, _) = run(&["check", &files[0], &files[1], &files[2]], "");
    assert_eq!(code, 2);
    for part in ["a.yaml:2:9", "`queue-scorrer`", "b.yaml: ok", "c.yaml:3:16", "`treshold`"] {
        assert!(out.contains(part), "{part} is missing in {out}");
    }
    let (code, out, _) = run(&["check", "--json", &files[0], &files[1], &files[2]], "");
    assert_eq!(code, 2);
    let value: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(out.lines().count(), 1);
    let [bad, good, worse] = value["files"].as_array().unwrap().as_slice() else { panic!("{out}") };
    assert_eq!(
        (&bad["ok"], &good["ok"], &worse["ok"]),
        (&false.into(), &true.into(), &false.into())
    );
    assert_eq!(bad["file"], files[0].as_str());
    let error = &worse["errors"][0];
    assert_eq!((&error["line"], &error["column"]), (&3.into(), &16.into()));
    assert_eq!(error["path"], "plugins[0].parameters.treshold");
    assert_eq!(error["message"], "unknown field `treshold`; valid: threshold");
    let plan = &good["plan"];
    assert_eq!(plan["profiles"][0]["scorers"][0]["name"], "queue-scorer");
    assert_eq!(plan["profiles"][0]["scorers"][0]["weight"], 1.0);
    assert_eq!(plan["profiles"][0]["picker"]["type"], "max-score-picker");
    assert_eq!(plan["parsers"][0], "openai-parser");
    assert!(plan["notes"].as_array().unwrap().iter().all(|note| note["kind"] == "added"));
}

#[test]
fn a_dash_is_standard_input() {
    let (code, out, _) = run(&["check", "-"], GOOD);
    assert!(code == 0 && out.starts_with("<stdin>: ok\n"), "{out}");
    let (code, out, _) = run(&["check", "-"], BAD);
    assert!(code == 2 && out.contains(" --> <stdin>:2:9\n"), "{out}");
    let (code, _, err) = run(&["check", "-", "-"], GOOD);
    assert!(code == 2 && err.contains("read once"), "{err}");
}

#[test]
fn what_is_no_configuration_is_refused_with_words() {
    let scratch = Scratch::new("nonsense");
    let folder = scratch.0.display().to_string();
    let table = [
        (folder.clone(), "this is a folder; name the files in it"),
        (format!("{folder}/nobody.yaml"), "cannot read it: No such file"),
        (scratch.file("binary", [0xff, 0xfe, 0, 1, 2]), "this is no text (UTF-8)"),
        (scratch.file("zeros", [b'a', 0, b'b']), "zero bytes"),
        (scratch.file("empty", ""), "nothing is written here"),
        (scratch.file("large", "# x\n".repeat(300_000)), "longer than 1048576 bytes"),
    ];
    for (file, message) in &table {
        let (code, out, err) = run(&["check", file], "");
        assert_eq!(code, 2, "{file}");
        assert!(out.starts_with(&format!("error in {file}: ")), "{out}{err}");
        assert!(out.contains(message), "{out}");
    }
    let (code, _, err) = run(&["check"], "");
    assert!(code == 2 && err.contains("<FILE>"), "{err}");
}

#[test]
fn the_flag_lets_alpha_in() {
    let alpha = "plugins:\n- type: session-affinity-scorer\n";
    let (code, out, _) = run(&["check", "-"], alpha);
    assert!(code == 2 && out.contains("--allow-experimental-plugins"), "{out}");
    let (code, ..) = run(&["check", "--allow-experimental-plugins", "-"], alpha);
    assert_eq!(code, 0);
}

#[test]
fn the_schema_is_printed() {
    let (code, out, _) = run(&["schema"], "");
    let schema: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, 0);
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert!(schema["properties"]["schedulingProfiles"].is_object());
}

#[test]
fn who_has_seen_enough_may_close_the_pipe() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvroute"))
        .arg("schema")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}
