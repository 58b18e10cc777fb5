//! Are docs/plugins.md, docs/config.schema.json and the flags in docs/epp.md what the program's
//! tables say? `KVROUTE_BLESS=1 cargo test -p kvroute --test docs` writes them.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use kvroute::epp::{FLAGS, Flag};
use kvroute::schema;
use kvroute_core::plugin::{PluginKind, Role, Stability};
use serde_json::Value;

fn doc(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name)
}

fn is_current(name: &str, expected: &str) {
    if std::env::var_os("KVROUTE_BLESS").is_some() {
        fs::write(doc(name), expected).unwrap();
    }
    let found = fs::read_to_string(doc(name)).unwrap_or_default();
    let hint = "KVROUTE_BLESS=1 cargo test -p kvroute --test docs";
    assert!(found == expected, "docs/{name} is old; write it with: {hint}");
}

#[test]
fn the_schema_is_current() {
    is_current("config.schema.json", &format!("{}\n", schema::pretty()));
}

#[test]
fn the_schema_knows_every_type_and_parameter() {
    let schema = schema::schema();
    let entry = &schema["$defs"].as_object().unwrap();
    let entry = entry.get("PluginEntry").unwrap_or(&schema["properties"]["plugins"]["items"]);
    let types = entry["properties"]["type"]["oneOf"].as_array().unwrap().iter();
    let types: Vec<&str> = types.map(|t| t["const"].as_str().unwrap()).collect();
    for kind in PluginKind::ALL {
        assert!(kind.names().iter().all(|name| types.contains(name)), "{kind:?}");
    }
    for rule in entry["allOf"].as_array().unwrap() {
        let parameters = &rule["then"]["properties"]["parameters"]["anyOf"][0];
        assert!(parameters.is_object(), "{rule}");
    }
    assert!(schema["$defs"]["Kvroute"]["properties"]["body_bytes_max"]["default"].is_u64());
}

#[test]
fn the_list_of_plugins_is_current() {
    is_current("plugins.md", &plugins());
}

/// The table between the marks in docs/epp.md, of all flags of `kvroute epp`.
#[test]
fn the_list_of_flags_is_current() {
    const BEGIN: &str = "test docs -->\n";
    const END: &str = "<!-- end of flags -->";
    let found = fs::read_to_string(doc("epp.md")).unwrap();
    let (head, rest) = found.split_once(BEGIN).expect("a mark before the table");
    let (_, tail) = rest.split_once(END).expect("a mark behind it");
    is_current("epp.md", &format!("{head}{BEGIN}{}\n{END}{tail}", flags()));
}

fn flags() -> String {
    let mut out = String::new();
    for (group, flags) in FLAGS {
        write!(out, "\n### {group}\n\n| flag | default | |\n|---|---|---|\n").unwrap();
        for Flag { name, value, default, help, .. } in flags {
            let value = if value.is_empty() { String::new() } else { format!(" {value}") };
            let default = match *default {
                "" if value.is_empty() => "`false`".to_owned(),
                "" => String::new(),
                default => format!("`{default}`"),
            };
            writeln!(out, "| `--{name}{value}` | {default} | {help} |").unwrap();
        }
    }
    out
}

const HEAD: &str = "# Plugins

Every plugin type that a configuration may name, in the order of a request's way. This file follows
from the program: types, parameters and defaults are those that `kvroute` reads. Formulas are
llm-d's; where they differ, [differences](differences.md) says so and why.
[Editors](check.md#editors) complete and check them.

**Beta**: llm-d's, always there. **Alpha**: llm-d's, needs `--allow-experimental-plugins`.
**kvroute**: our own. A plugin that has several roles stands under the first.
";

/// What roles are for, in the order of a request's way.
const ABOUT: [(Role, &str); 20] = [
    (
        Role::Parser,
        "Read request bodies and find the usage in answers. Named in `requestHandler.parsers`.",
    ),
    (
        Role::RequestHeader,
        "Read request headers before anything is decided. They run when `plugins` lists them.",
    ),
    (Role::Admitter, "Let requests in or refuse them. They run when `plugins` lists them."),
    (Role::Detector, "Say how full the fleet is. Named in `flowControl.saturationDetector`."),
    (
        Role::Producer,
        "Compute what other plugins read. One that is needed and not listed is added.",
    ),
    (
        Role::Screener,
        "Remove endpoints before any profile runs. They run when `plugins` lists them.",
    ),
    (Role::Handler, "Choose which profiles run for a request. There is one."),
    (
        Role::Decider,
        "Say whether a request is served in several steps. Named by a profile handler.",
    ),
    (Role::Filter, "Remove endpoints, in the order of the profile."),
    (Role::Scorer, "Rate endpoints from 0 to 1; the sum of score times weight counts."),
    (Role::Picker, "Choose from the scored endpoints. A profile has one; else `max-score-picker`."),
    (Role::Reporter, "Report about answers. They run when `plugins` lists them."),
    (Role::Source, "Where numbers come from. Named in `dataLayer.sources`."),
    (Role::Extractor, "What is read from a source. Named in `dataLayer.sources[].extractors`."),
    (Role::Discovery, "Which endpoints there are. Named in `dataLayer.discovery`."),
    (Role::Fairness, "Between flows of one priority. Named in `flowControl.priorityBands`."),
    (Role::Ordering, "Within a flow. Named in `flowControl.priorityBands`."),
    (
        Role::UsageLimit,
        "How much a priority may use. Named in `flowControl.usageLimitPolicyPluginRef`.",
    ),
    (Role::EvictionFilter, "Which running requests may be evicted."),
    (Role::EvictionOrder, "Which of them goes first."),
];

fn plugins() -> String {
    let schema = schema::schema();
    let mut out = HEAD.to_owned();
    assert!(Role::ALL.iter().all(|role| ABOUT.iter().any(|(known, _)| known == role)));
    for (role, about) in ABOUT {
        let first = |kind: &&PluginKind| kind.roles()[0] == role;
        let kinds: Vec<&PluginKind> = PluginKind::ALL.iter().filter(first).collect();
        if kinds.is_empty() {
            continue;
        }
        let title = capital(role.as_str());
        let plural = match title.strip_suffix('y') {
            Some(_) if role == Role::Discovery => title,
            Some(stem) => format!("{stem}ies"),
            None => format!("{title}s"),
        };
        writeln!(out, "\n## {plural}\n\n{about}").unwrap();
        kinds.into_iter().for_each(|kind| plugin(&mut out, *kind, &schema));
    }
    out
}

fn capital(text: &str) -> String {
    if text.starts_with("vLLM") {
        return text.to_owned();
    }
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
}

fn plugin(out: &mut String, kind: PluginKind, schema: &Value) {
    let stability = match kind.stability() {
        Stability::Alpha => "Alpha",
        Stability::Beta => "Beta",
        Stability::Own => "kvroute",
    };
    write!(out, "\n### {}\n\n**{stability}**", kind.name()).unwrap();
    if kind.roles().len() > 1 {
        let others: Vec<&str> = kind.roles()[1..].iter().map(|role| role.as_str()).collect();
        write!(out, ", also a {}", others.join(" and ")).unwrap();
    }
    write!(out, ". {}", capital(kind.about().trim())).unwrap();
    for name in kind.names() {
        if let Some(old) = kind.deprecation(name) {
            let subject = if *name == kind.name() { "The type" } else { "The name" };
            let (since, instead) = (old.since, old.instead);
            write!(out, " {subject} `{name}` is deprecated since llm-d {since}; write {instead}.")
                .unwrap();
        } else if *name != kind.name() {
            write!(out, " Also written `{name}`.").unwrap();
        }
    }
    out.push('\n');
    let parameters = parameters_of(kind, schema);
    let (about, rows) = (description(parameters), rows(parameters, schema, ""));
    let about = about.split_once(": ").filter(|(head, _)| head.starts_with('`'));
    if let Some((_, about)) = about {
        writeln!(out, "\n{}", capital(about)).unwrap();
    }
    if !rows.is_empty() {
        out.push_str("\n| parameter | type | default | |\n|---|---|---|---|\n");
        out.push_str(&rows);
    }
}

fn parameters_of(kind: PluginKind, schema: &Value) -> &Value {
    let entry = match &schema["$defs"]["PluginEntry"] {
        Value::Null => &schema["properties"]["plugins"]["items"],
        entry => entry,
    };
    let of_kind = |rule: &&Value| rule["if"]["properties"]["type"]["enum"][0] == kind.name();
    let rule = entry["allOf"].as_array().unwrap().iter().find(of_kind).unwrap();
    resolve(&rule["then"]["properties"]["parameters"]["anyOf"][0], schema)
}

/// Follows references and takes the value out of `value or null`.
fn resolve<'a>(node: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(path) = node["$ref"].as_str() {
        return resolve(&schema["$defs"][path.trim_start_matches("#/$defs/")], schema);
    }
    let inner = node["anyOf"].as_array().and_then(|of| of.iter().find(|n| n["type"] != "null"));
    inner.map_or(node, |inner| resolve(inner, schema))
}

fn description(node: &Value) -> String {
    node["description"].as_str().unwrap_or_default().replace('\n', " ")
}

/// One row for each parameter, nested ones below their parent.
fn rows(node: &Value, schema: &Value, prefix: &str) -> String {
    let mut out = String::new();
    let Some(properties) = node["properties"].as_object() else { return out };
    for (name, property) in properties {
        let inner = resolve(property, schema);
        let about = match description(property) {
            about if about.is_empty() => description(inner),
            about => about,
        };
        let default = match property.get("default") {
            None => required(node, name),
            Some(Value::Null) => String::new(),
            Some(Value::Object(_)) => String::new(),
            Some(Value::Number(number)) => format!("`{}`", number.as_f64().unwrap()),
            Some(Value::String(text)) if text.is_empty() => String::new(),
            Some(Value::String(text)) => format!("`{text}`"),
            Some(value) => format!("`{value}`"),
        };
        let path = format!("{prefix}{name}");
        let about = about.replace('|', "\\|");
        writeln!(out, "| `{path}` | {} | {default} | {about} |", type_of(property, schema))
            .unwrap();
        let items = resolve(&inner["items"], schema);
        out.push_str(&rows(inner, schema, &format!("{path}.")));
        out.push_str(&rows(items, schema, &format!("{path}[].")));
    }
    out
}

fn required(node: &Value, name: &str) -> String {
    let required = node["required"].as_array();
    let is = required.is_some_and(|names| names.iter().any(|known| known == name));
    if is { "required".to_owned() } else { String::new() }
}

fn type_of(property: &Value, schema: &Value) -> String {
    let inner = resolve(property, schema);
    if inner["examples"][0] == "60s" {
        return "duration".to_owned();
    }
    let names = |of: &Value, key: &str| -> Vec<String> {
        let of = of.as_array().into_iter().flatten();
        let name = |one: &Value| if key.is_empty() { one.clone() } else { one[key].clone() };
        of.map(name).filter_map(|name| Some(format!("`{}`", name.as_str()?))).collect()
    };
    let of = [names(&inner["enum"], ""), names(&inner["oneOf"], "const")].concat();
    if !of.is_empty() {
        return of.join(", ");
    }
    let types: Vec<&str> = match &inner["type"] {
        Value::String(one) => vec![one],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => vec!["anything"],
    };
    let word = |name: &&str| match *name {
        "integer" => "whole number".to_owned(),
        "string" => "text".to_owned(),
        "boolean" => "true, false".to_owned(),
        "array" => match type_of(&inner["items"], schema).as_str() {
            "map" => "list of maps".to_owned(),
            items => format!("list of {items}"),
        },
        "object" => "map".to_owned(),
        other => other.to_owned(),
    };
    let words: Vec<String> = types.iter().filter(|name| **name != "null").map(word).collect();
    words.join(" or ")
}
