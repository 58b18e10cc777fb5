//! The command line of `kvroute sim`: what it takes, writes, prints and refuses.

#![allow(clippy::unwrap_used, reason = "tests fail that way")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

const SCENARIO: &str = "name: tiny
fleet: { engines: 2, profile: tiny, kv_tokens: 4096 }
workload:
  kind: shared-prefix
  groups: 6
  users: 2
  prefix_tokens: 320
  question_tokens: 40
  output_tokens: 20
load:
  stages:
    - { rate: 10, duration_s: 2 }
    - { rate: 20, duration_s: 2 }
client: { in_flight_max: 1000 }
published:
  - name: spread
    summary: { output_tokens_per_s: 123.5 }
";

const SPREAD: &str = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - type: random-picker
schedulingProfiles:
  - name: default
    plugins: [{ pluginRef: random-picker }]
";

/// A folder with a scenario and a configuration, gone at the end of its test.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let name = format!("kvroute-sim-{test}-{}", std::process::id());
        let folder = Folder(std::env::temp_dir().join(name));
        std::fs::create_dir_all(folder.0.join("other")).unwrap();
        folder.write("tiny.yaml", SCENARIO);
        folder.write("spread.yaml", SPREAD);
        folder
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap()
    }

    fn sim(&self, args: &[&str]) -> Output {
        sim(&self.0, args)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn sim(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvroute"));
    command.current_dir(folder).arg("sim").args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {error}", output.status);
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a refused command says.
fn refusal(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    error
}

/// The shape of `summary.json`.
fn assert_figures(of: &Value) {
    for key in ["requests", "output_tokens_per_s", "requests_per_s", "hit_ratio"] {
        assert!(of[key].is_number(), "{key}: {of}");
    }
    for (key, inner) in [
        ("ttft_s", &["mean", "p50", "p90", "p99"][..]),
        ("itl_s", &["mean", "p50", "p90"]),
        ("wait_queue", &["mean", "p90", "max"]),
        ("kv_usage", &["mean", "p90", "max"]),
    ] {
        assert!(inner.iter().all(|inner| of[key][inner].is_number()), "{key}: {of}");
    }
}

#[test]
fn a_run_writes_three_files_and_prints_the_summary() {
    let folder = Folder::new("files");
    let args = ["--scenario", "tiny.yaml", "--config", "spread.yaml", "kvroute", "--seeds", "2"];
    let output = folder.sim(&[&args[..], &["--out", "out", "--json"]].concat());
    let printed = stdout(&output);
    assert_eq!(printed.trim_end(), folder.read("out/summary.json").trim_end());
    let summary: Value = serde_json::from_str(&printed).unwrap();
    let head = ["scenario", "seed", "seeds"].map(|key| summary[key].to_string());
    assert_eq!(head, ["\"tiny\"", "1", "2"]);
    let runs = summary["runs"].as_array().unwrap();
    let names: Vec<&str> = runs.iter().map(|run| run["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["spread", "kvroute"]);
    for run in runs {
        assert_figures(&run["summary"]);
        assert_figures(&run["pooled"]);
        assert!(run["pooled"]["failed_ratio"] == 0.0 && run["valid"] == true, "{run}");
        let stages = run["stages"].as_array().unwrap();
        let rates: Vec<f64> = stages.iter().map(|stage| stage["rate"].as_f64().unwrap()).collect();
        assert_eq!(rates, [10.0, 20.0]);
        stages.iter().for_each(assert_figures);
        let seeds: Vec<&Value> = run["seeds"].as_array().unwrap().iter().collect();
        assert_eq!(seeds.iter().map(|s| s["seed"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    }
    let published = &runs[0]["published"]["summary"]["output_tokens_per_s"];
    assert_eq!((published, &runs[1]["published"]), (&Value::from(123.5), &Value::Null));
    for (name, marks) in [
        ("out/report.md", ["tiny", "spread", "kvroute"]),
        ("out/report.html", ["</html>", "spread", "kvroute"]),
    ] {
        let text = folder.read(name);
        assert!(marks.iter().all(|mark| text.contains(mark)), "{name}: {text}");
    }
    // The same again, on one thread: the same bytes.
    let again = folder.sim(&[&args[..], &["--json", "--threads", "1"]].concat());
    assert_eq!(stdout(&again), printed);
}

#[test]
fn without_json_a_table_is_printed() {
    let folder = Folder::new("table");
    let table = stdout(&folder.sim(&["--scenario", "tiny.yaml", "--config", "spread.yaml"]));
    assert!(table.contains("spread") && table.contains("published"), "{table}");
}

#[test]
fn a_bad_scenario_is_refused_with_its_place() {
    let folder = Folder::new("bad");
    for (from, to, place, word) in [
        ("  users: 2\n", "  user: 2\n", "tiny.yaml:6:3", "user"),
        ("    - { rate: 20,", "    - { rate: -20,", "tiny.yaml:13:15", "rate"),
        ("profile: tiny", "profile: tyni", "tiny.yaml:2:31", "tiny"),
        ("groups: 6", "groups: six", "tiny.yaml:5:11", "six"),
    ] {
        folder.write("tiny.yaml", &SCENARIO.replace(from, to));
        let error = refusal(&folder.sim(&["--scenario", "tiny.yaml", "--config", "spread.yaml"]));
        assert!(error.contains(place) && error.contains(word), "{to}: {error}");
    }
}

#[test]
fn a_bad_configuration_is_refused_with_its_place() {
    let folder = Folder::new("config");
    folder.write("spread.yaml", &SPREAD.replace("type: random-picker", "type: random-piker"));
    let error = refusal(&folder.sim(&["--scenario", "tiny.yaml", "--config", "spread.yaml"]));
    assert!(error.contains("spread.yaml:4:") && error.contains("random-picker"), "{error}");
}

#[test]
fn unknown_names_are_answered_with_those_there_are() {
    let folder = Folder::new("names");
    let error = refusal(&folder.sim(&["--scenario", "b2b-sass"]));
    for name in ["b2b-saas", "overload-110", "zipf", "agentic", "faults"] {
        assert!(error.contains(name), "{error}");
    }
    let error = refusal(&folder.sim(&["--scenario", "tiny.yaml", "--config", "kvruote"]));
    for name in ["kvroute", "llm-d", "precise", "random", "round-robin"] {
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn two_configurations_of_one_name_are_refused() {
    let folder = Folder::new("stems");
    folder.write("other/spread.yaml", SPREAD);
    let configs = ["--config", "spread.yaml", "other/spread.yaml"];
    let error = refusal(&folder.sim(&[&["--scenario", "tiny.yaml"], &configs[..]].concat()));
    assert!(error.contains("two configurations are called spread"), "{error}");
}

#[test]
fn decisions_are_written_one_object_a_line() {
    let folder = Folder::new("decisions");
    let args = ["--scenario", "tiny.yaml", "--config", "precise", "--decisions", "log.jsonl"];
    let printed = stdout(&folder.sim(&[&args[..], &["--json"]].concat()));
    let log = folder.read("log.jsonl");
    let decisions: Vec<Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let summary: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(Value::from(decisions.len()), summary["runs"][0]["summary"]["requests"]);
    assert_eq!(decisions.len(), 60);
    for decision in &decisions {
        assert!(decision["endpoint"].as_str().unwrap().starts_with("engine-"), "{decision}");
        assert_eq!(decision["candidates"].as_array().unwrap().len(), 2);
    }
    let error = refusal(&folder.sim(&[&args[..], &["--seeds", "2"]].concat()));
    assert!(error.contains("this would run 2"), "{error}");
}

#[test]
fn a_run_of_the_fault_simulation_can_be_repeated() {
    let folder = Folder::new("faults");
    let told = stdout(&folder.sim(&["--fault-seed", "1", "--fault-steps", "200"]));
    assert!(told.contains("seed 1: every invariant held"), "{told}");
    assert_eq!(stdout(&folder.sim(&["--fault-seed", "1", "--fault-steps", "200"])), told);
}

#[test]
fn the_list_names_every_scenario_and_configuration() {
    let folder = Folder::new("list");
    let list = stdout(&folder.sim(&["--list"]));
    let named: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let scenarios = kvroute_lab::scenario::Scenario::BUILT_IN.map(|(name, _)| name);
    let presets = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../../config/presets"));
    let presets: Vec<String> = presets
        .unwrap()
        .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    assert!(presets.len() > 5);
    let wanted = presets.iter().map(String::as_str).chain(scenarios).chain(["oracle"]);
    wanted.for_each(|name| assert!(named.contains(&name), "{name}: {list}"));
}
