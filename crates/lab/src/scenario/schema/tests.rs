//! Does the schema have every field of the types, and no other, and is the file current?

use std::path::PathBuf;

use serde_json::Value;

use super::schema;
use crate::scenario::Scenario;

/// Every field of every type.
const FULL: &str = "
name: full
description: every field
fleet:
  engines: 1
  profile: { name: mine, step_base_s: 1, step_per_seq_s: 1, step_per_context_token_s: 1,
    step_per_unique_token_s: 1, prefill_per_token_s: 1, prefill_attention_s: 1 }
  kv_tokens: 100
workload: { kind: trace, groups: 1, users: 1, prefix_tokens: 1, question_tokens: 1,
  output_tokens: 1, counted_output_ratio: 1, bytes_per_token: 1, order: random, zipf: 1, turns: 1,
  think_s: 1, max_tokens_sent: true, file: x }
load: { stages: [{ rate: 1, duration_s: 1 }] }
faults: [{ kind: crash, engine: 0, at_s: 1, for_s: 1, share: 1, delay_s: 1, factor: 1 }]
published: [{ name: x, stages: [{ rate: 1 }] }]
";

fn resolved<'a>(root: &'a Value, mut node: &'a Value) -> &'a Value {
    loop {
        if let Some(Value::Array(either)) = node.get("oneOf") {
            node = &either[1];
        }
        let Some(Value::String(path)) = node.get("$ref") else { return node };
        node = root.pointer(path.strip_prefix('#').unwrap()).expect("a reference leads somewhere");
    }
}

/// Fields of `value` that the schema lacks, and with `both` those that only the schema has.
fn differences(root: &Value, node: &Value, value: &Value, both: bool, at: &str) -> Vec<String> {
    let node = resolved(root, node);
    match value {
        Value::Object(fields) => {
            let Some(Value::Object(known)) = node.get("properties") else {
                return vec![format!("{at} is no record")];
            };
            assert_eq!(node["additionalProperties"], false, "{at}");
            let more = known.keys().filter(|name| both && !fields.contains_key(*name));
            let mut found: Vec<String> = more.map(|name| format!("no {at}.{name}")).collect();
            for (name, value) in fields {
                let at = format!("{at}.{name}");
                match known.get(name) {
                    Some(node) => {
                        assert!(node["description"].is_string(), "{at} lacks a description");
                        found.extend(differences(root, node, value, both, &at));
                    }
                    None => found.push(format!("unknown {at}")),
                }
            }
            found
        }
        Value::Array(items) => {
            let items = items.iter();
            items.flat_map(|item| differences(root, &node["items"], item, both, at)).collect()
        }
        Value::String(name) => match node.get("enum") {
            Some(Value::Array(names)) if !names.contains(value) => vec![format!("{at}: {name}")],
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

#[test]
fn the_schema_has_every_field_and_no_other() {
    let full: Scenario = kvroute_wire::yaml::read(FULL, "full.yaml", 1 << 20).unwrap();
    let value = serde_json::to_value(&full).unwrap();
    let root = schema();
    assert_eq!(differences(&root, &root, &value, true, ""), Vec::<String>::new());
    let mut wrong = value;
    wrong["fleet"]["engins"] = 1.into();
    wrong["faults"][0]["kind"] = "crush".into();
    wrong["load"].as_object_mut().unwrap().remove("arrivals");
    let mut found = differences(&root, &root, &wrong, true, "");
    found.sort();
    assert_eq!(found, [".faults.kind: crush", "no .load.arrivals", "unknown .fleet.engins"]);
}

#[test]
fn every_built_in_scenario_conforms() {
    let root = schema();
    for (name, text) in Scenario::BUILT_IN {
        let value: Value = kvroute_wire::yaml::read(text, name, 1 << 20).unwrap();
        for field in root["required"].as_array().unwrap() {
            assert!(value.get(field.as_str().unwrap()).is_some(), "{name} lacks {field}");
        }
        let mut without_profile = value;
        let profile = without_profile["fleet"].as_object_mut().unwrap().remove("profile").unwrap();
        let names = root["$defs"]["fleet"]["properties"]["profile"]["oneOf"][0]["enum"].clone();
        assert!(names.as_array().unwrap().contains(&profile));
        let found = differences(&root, &root, &without_profile, false, "");
        assert_eq!(found, Vec::<String>::new(), "{name}");
    }
}

#[test]
fn every_kind_is_in_the_schema() {
    let defs = &schema()["$defs"];
    for (def, field, from, to) in [
        ("workload", "kind", "kind: trace", "kind: KIND"),
        ("workload", "order", "order: random", "order: KIND"),
        ("load", "arrivals", "\nload: {", "\nload: { arrivals: KIND, "),
        ("fault", "kind", "kind: crash", "kind: KIND"),
    ] {
        let names = defs[def]["properties"][field]["enum"].as_array().unwrap();
        let mut names: Vec<&str> = names.iter().map(|name| name.as_str().unwrap()).collect();
        let read = |name: &str| {
            let text = FULL.replace(from, &to.replace("KIND", name));
            kvroute_wire::yaml::read::<Scenario>(&text, "full.yaml", 1 << 20)
        };
        assert!(names.iter().all(|name| read(name).is_ok()), "{def}.{field}");
        let error = read("bogus").unwrap_err().message;
        let (_, known) = error.split_once("valid: ").unwrap();
        let mut known: Vec<&str> = known.split(", ").collect();
        known.sort_unstable();
        names.sort_unstable();
        assert_eq!(known, names, "{def}.{field}");
    }
}

fn file() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/scenario.schema.json"))
}

#[test]
fn the_file_is_current() {
    let text = std::fs::read_to_string(file()).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    let hint = "cargo test -p kvroute-lab write_the_schema -- --ignored";
    assert!(found == schema(), "docs/scenario.schema.json is old; write it with: {hint}");
}

/// Not a test: writes the file that the test above reads.
#[test]
#[ignore = "writes docs/scenario.schema.json"]
fn write_the_schema() {
    let text = serde_json::to_string_pretty(&schema()).unwrap();
    std::fs::write(file(), text + "\n").unwrap();
}

/// Names of all properties of the schema.
fn names(node: &Value, found: &mut Vec<String>) {
    if let Some(Value::Object(properties)) = node.get("properties") {
        found.extend(properties.keys().cloned());
        properties.values().for_each(|node| names(node, found));
    }
    if let Some(Value::Object(defs)) = node.get("$defs") {
        defs.values().for_each(|node| names(node, found));
    }
}

#[test]
fn the_document_has_every_field_and_scenario_and_its_example_is_read() {
    let text = std::fs::read_to_string(file().with_file_name("scenarios.md")).unwrap();
    let mut all = Vec::new();
    names(&schema(), &mut all);
    assert!(all.len() > 60, "{all:?}");
    let built_in = Scenario::BUILT_IN.iter().map(|(name, _)| (*name).to_owned());
    let sections = ["name", "description"];
    for name in all.into_iter().chain(built_in).filter(|name| !sections.contains(&name.as_str())) {
        assert!(text.contains(&format!("`{name}`")), "docs/scenarios.md lacks `{name}`");
    }
    let (_, example) = text.split_once("```yaml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    Scenario::parse(example, "docs/scenarios.md").unwrap();
}
