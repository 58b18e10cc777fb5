//! Which configurations load, and what is added to them? The files of llm-d (where they are there
//! beside the repository), and configurations of our own in the form of its guides, samples, charts
//! and loader tests.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use kvroute::config;
use kvroute_core::plan::{Experimental, NoteKind, Plan};

fn load(text: &str) -> Result<Plan, String> {
    load_as(text, Experimental::Refused)
}

fn load_as(text: &str, experimental: Experimental) -> Result<Plan, String> {
    let read = config::read(text, "c.yaml", experimental);
    read.map(|(_, plan)| plan).map_err(|error| error.to_string())
}

/// Names of what was added, of every kind but profiles.
fn added(plan: &Plan) -> BTreeSet<&str> {
    let notes = plan.notes.iter().filter(|note| note.kind == NoteKind::Added);
    let names = notes.filter_map(|note| Some(note.text.split_once(':')?.0));
    names.filter(|name| !name.starts_with("profile ")).collect()
}

fn texts(plan: &Plan, kind: NoteKind) -> String {
    let notes = plan.notes.iter().filter(|note| note.kind == kind);
    notes.map(|note| note.text.as_str()).collect::<Vec<_>>().join("\n")
}

/// Files of a folder beside the repository; none, visibly, when it is not there.
#[expect(clippy::print_stderr, reason = "what is skipped is seen")]
fn shared(folder: &str) -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(folder);
    let Ok(entries) = fs::read_dir(&root) else {
        eprintln!("skipped: {} is not there", root.display());
        return Vec::new();
    };
    let mut files: Vec<(String, String)> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// llm-d refuses this one itself: by reading, its parameters are strict and the name is old.
const REJECTED: &str = "epp-mm-embeddings-cache-config.yaml";

#[test]
fn the_files_of_llm_d_load() {
    for folder in ["epp-configs/samples", "epp-configs/well-known"] {
        for (name, text) in shared(folder) {
            let outcome = load_as(&text, Experimental::Allowed);
            if name == REJECTED {
                let error = outcome.unwrap_err();
                for part in ["`cacheSizeInMB`", "valid: cacheSizeInMBPerServer", "15:7"] {
                    assert!(error.contains(part), "{part} is missing in {error}");
                }
                let repaired = text.replace("cacheSizeInMB:", "cacheSizeInMBPerServer:");
                load(&repaired).unwrap();
            } else {
                outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
    }
}

#[test]
fn files_with_alpha_plugins_need_the_flag() {
    let alpha = [
        "epp-burst-prefix-cache-config.yaml",
        "pd-topology-epp-config.yaml",
        "sim-epp-gpu-config.yaml",
        "soft-reflective-ceiling-epp-config.yaml",
        "payload-agnostic.yaml",
    ];
    for folder in ["epp-configs/samples", "epp-configs/well-known"] {
        for (name, text) in shared(folder).into_iter().filter(|(name, _)| name != REJECTED) {
            match load(&text) {
                Ok(_) => assert!(!alpha.contains(&name.as_str()), "{name} loads"),
                Err(error) => {
                    assert!(alpha.contains(&name.as_str()), "{name}: {error}");
                    assert!(error.contains("--allow-experimental-plugins"), "{error}");
                }
            }
        }
    }
}

#[test]
fn what_is_added_to_the_well_known_files() {
    let prefix = ["approx-prefix-cache-producer", "token-producer"];
    let expected: [(&str, &[&[&str]]); 5] = [
        ("optimized-baseline.yaml", &[&prefix, &["max-score-picker", "single-profile-handler"]]),
        (
            "tiered-prefix-cache-cpu.yaml",
            &[&prefix[..1], &["max-score-picker", "single-profile-handler"]],
        ),
        ("pd-disaggregation.yaml", &[&prefix, &["inflight-load-producer"]]),
        (
            "wide-ep-lws-experimental-dp-aware.yaml",
            &[&prefix[..1], &["max-score-picker", "inflight-load-producer"]],
        ),
        (
            "predicted-latency-slo.yaml",
            &[&prefix, &["single-profile-handler", "inflight-load-producer"]],
        ),
    ];
    let files = shared("epp-configs/well-known");
    for (name, wanted) in expected {
        let Some((_, text)) = files.iter().find(|(file, _)| file == name) else { continue };
        let plan = load(text).unwrap();
        let mut wanted: BTreeSet<&str> = wanted.concat().into_iter().collect();
        wanted.insert("utilization-detector");
        assert_eq!(added(&plan), wanted, "{name}");
    }
    let agnostic = files.iter().find(|(file, _)| file == "payload-agnostic.yaml");
    if let Some((_, text)) = agnostic {
        let plan = load_as(text, Experimental::Allowed).unwrap();
        let wanted =
            ["inflight-load-producer", "max-score-picker", "single-profile-handler"].as_slice();
        let mut wanted: BTreeSet<&str> = wanted.iter().copied().collect();
        wanted.insert("utilization-detector");
        assert_eq!(added(&plan), wanted);
        let parsers: Vec<&str> = plan.parsers.iter().map(|parser| parser.plugin_type()).collect();
        assert_eq!(parsers, ["passthrough-parser"]);
    }
}

#[test]
fn the_published_benchmarks_files_load_with_notes_about_old_names() {
    let group = "write llm-d.ai/v1alpha1";
    let scorer =
        "kv-cache-scorer is deprecated since llm-d v0.3; write kv-cache-utilization-scorer";
    let older = "releases of 2025";
    let expected: [(&str, &[&str]); 4] = [
        ("estimated.yaml", &[group, scorer, older]),
        ("load.yaml", &[group, scorer]),
        ("precise.yaml", &[group, scorer, older]),
        ("random.yaml", &[group]),
    ];
    let files = shared("benchmark/configs");
    assert!(files.is_empty() || files.len() == expected.len());
    for ((name, text), (expected_name, notes)) in files.iter().zip(expected) {
        assert_eq!(name, expected_name);
        let plan = load(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let warnings = texts(&plan, NoteKind::Warning);
        for note in notes {
            assert!(warnings.contains(note), "{name}: {note} is missing in {warnings}");
        }
    }
    if let Some((_, text)) = files.iter().find(|(name, _)| name == "precise.yaml") {
        assert!(load(text).unwrap().reads_events());
    }
}

/// First line of files that need the flag.
const WITH_FLAG: &str = "# --allow-experimental-plugins\n";

/// Configurations of our own, in the form of llm-d's guides, samples and charts.
#[test]
fn configurations_in_the_form_of_the_guides_load() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/configs");
    let mut read = 0;
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let plan = load_as(&text, Experimental::Allowed);
        let plan = plan.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(!added(&plan).is_empty(), "{}", path.display());
        assert_eq!(load(&text).is_ok(), !text.starts_with(WITH_FLAG), "{}", path.display());
        read += 1;
    }
    assert!(read >= 16, "{read} files");
}

/// A name, and a configuration that llm-d's loader takes.
const LOADER: &[(&str, &str)] = &[
    ("picker alone", "plugins: [{name: m, type: max-score-picker}]"),
    ("no profiles", "plugins: [{name: q, type: queue-scorer, parameters: {}}]"),
    ("no plugins", "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"),
    (
        "the old group",
        "apiVersion: inference.networking.x-k8s.io/v1alpha1\nkind: \
                       EndpointPickerConfig\nplugins: [{type: queue-scorer}]",
    ),
    ("neither version nor kind", "plugins: [{type: queue-scorer}]"),
    (
        "picker before scorer",
        "plugins: [{type: single-profile-handler}, {type: random-picker}, \
                              {type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: \
                              [{pluginRef: random-picker}, {pluginRef: queue-scorer}]}]",
    ),
    (
        "a picker that nobody listed",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: \
                                     p, plugins: [{pluginRef: queue-scorer}, {pluginRef: \
                                     max-score-picker}]}]",
    ),
    (
        "weights of any size",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, \
                             plugins: [{pluginRef: queue-scorer, weight: 50}]}]",
    ),
    (
        "a profile with a producer",
        "plugins: [{type: token-producer}, {type: queue-scorer}]\n\
                                   schedulingProfiles: [{name: p, plugins: [{pluginRef: \
                                   token-producer}, {pluginRef: queue-scorer}]}]",
    ),
    (
        "flow control without the gate",
        "plugins: [{type: queue-scorer}]\nfeatureGates: []\n\
                                       flowControl: {maxBytes: \"1024\"}",
    ),
    (
        "without the gate policies are not looked at",
        "plugins: [{type: queue-scorer}]\nflowControl: \
      {priorityBands: [{priority: 1, orderingPolicyRef: nobody}]}",
    ),
    (
        "gates as Go reads them",
        "plugins: [{type: queue-scorer}]\nfeatureGates: [flowControl=T, \
                                haPopulateNonLeaderDatastore=0]",
    ),
    (
        "policies by name",
        "featureGates: [flowControl]\nplugins: [{type: queue-scorer}, {name: o, \
                          type: fcfs-ordering-policy}, {name: f, type: \
                          global-strict-fairness-policy}]\nflowControl: {priorityBands: \
                          [{priority: 100, orderingPolicyRef: o, fairnessPolicyRef: f}]}",
    ),
    (
        "policies that are always there",
        "featureGates: [flowControl]\nplugins: [{type: \
      queue-scorer}]\nflowControl: {usageLimitPolicyPluginRef: static-usage-limit-policy, \
      priorityBands: [{priority: 1, orderingPolicyRef: fcfs-ordering-policy}]}",
    ),
    (
        "a detector that is always there",
        "plugins: [{type: queue-scorer}]\nflowControl: \
      {saturationDetector: {pluginRef: utilization-detector}}",
    ),
    (
        "a detector without a name",
        "plugins: [{type: queue-scorer}]\nflowControl: \
      {saturationDetector: {}}",
    ),
    (
        "detector and parser in their old places",
        "plugins: [{type: queue-scorer}, {type: \
      openai-parser}]\nsaturationDetector: {pluginRef: utilization-detector}\nparser: {pluginRef: \
      openai-parser}",
    ),
    (
        "a parser that nobody listed",
        "plugins: [{type: queue-scorer}]\nrequestHandler: {parsers: \
      [{pluginRef: anthropic-parser}]}",
    ),
    (
        "a parser under two names",
        "plugins: [{type: queue-scorer}, {type: openai-parser}, {name: b, \
      type: openai-parser}]\nrequestHandler: {parsers: [{pluginRef: openai-parser}, {pluginRef: \
      b}]}",
    ),
    ("an empty data layer", "plugins: [{type: queue-scorer}]\ndataLayer: {}"),
    ("no default source", "plugins: [{type: queue-scorer}]\ndataLayer: {injectDefaults: false}"),
    (
        "a source of one's own",
        "plugins: [{type: queue-scorer}, {type: models-data-source}, {type: \
      models-data-extractor}]\ndataLayer: {sources: [{pluginRef: models-data-source, extractors: \
      [{pluginRef: models-data-extractor}]}]}",
    ),
    (
        "a decider after its handler",
        "plugins: [{type: disagg-profile-handler, parameters: \
      {deciders: {prefill: later}}}, {name: later, type: always-disagg-pd-decider}]\n\
      schedulingProfiles: [{name: decode}, {name: prefill}]",
    ),
    (
        "keys without values",
        "featureGates:\nplugins:\n- type: queue-scorer\n  name:\n  \
      parameters:\nschedulingProfiles:\ndataLayer:\n",
    ),
    ("JSON", r#"{"plugins": [{"type": "queue-scorer"}], "featureGates": ["flowControl"]}"#),
];

/// The same, and what the message says.
const LOADER_REFUSES: &[(&str, &str, &str)] = &[
    ("text for a plugin", "plugins:\n- testing 1 2 3\n", "found \"testing 1 2 3\""),
    ("no type", "plugins:\n- parameters: {a: 1}\n", "missing a `type`"),
    ("a type that is none", "plugins: [{name: x, type: unknown-plugin}]", "not registered"),
    (
        "parameters of a wrong kind",
        "plugins: [{type: load-aware-scorer, parameters: {threshold: \
      asdf}}]",
        "found \"asdf\"",
    ),
    ("a gate that is none", "plugins: [{type: queue-scorer}]\nfeatureGates: [a-gate]", "a-gate"),
    (
        "a value that is none",
        "plugins: [{type: queue-scorer}]\nfeatureGates: [flowControl=maybe]",
        "'maybe' is not a valid value",
    ),
    ("gates of old", "plugins: [{type: queue-scorer}]\nfeatureGates: [dataLayer]", "leave it out"),
    (
        "a profile without a name",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{plugins: \
      [{pluginRef: queue-scorer}]}]",
        "missing a `name`",
    ),
    (
        "no reference",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: \
      [{weight: 10}]}]",
        "missing a `pluginRef`",
    ),
    (
        "a reference to nobody",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, \
      plugins: [{pluginRef: nobody}]}]",
        "undefined plugin 'nobody'",
    ),
    (
        "one name twice",
        "plugins: [{name: a, type: queue-scorer}, {name: a, type: \
      load-aware-scorer}]",
        "duplicate plugin name 'a'",
    ),
    (
        "one profile twice",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p}, {name: \
      p}]",
        "duplicate name 'p'",
    ),
    (
        "two pickers",
        "plugins: [{type: max-score-picker}, {type: random-picker}]\n\
      schedulingProfiles: [{name: p, plugins: [{pluginRef: max-score-picker}, {pluginRef: \
      random-picker}]}]",
        "already have a picker",
    ),
    (
        "two handlers",
        "plugins: [{type: single-profile-handler}, {name: b, type: \
      single-profile-handler}]",
        "multiple profile handlers",
    ),
    (
        "no handler for two",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: a}, \
      {name: b}]",
        "no profile handler",
    ),
    (
        "the single handler for two",
        "plugins: [{type: single-profile-handler}]\nschedulingProfiles: \
      [{name: a}, {name: b}]",
        "cannot support multiple",
    ),
    (
        "a source that is none",
        "plugins: [{type: queue-scorer}]\ndataLayer: {sources: [{pluginRef: \
      queue-scorer}]}",
        "not a data source",
    ),
    (
        "an extractor that is nobody",
        "plugins: [{type: queue-scorer}, {type: models-data-source}]\n\
      dataLayer: {sources: [{pluginRef: models-data-source, extractors: [{pluginRef: nobody}]}]}",
        "nobody",
    ),
    (
        "a policy that is nobody",
        "featureGates: [flowControl]\nplugins: [{type: queue-scorer}]\n\
      flowControl: {priorityBands: [{priority: 1, orderingPolicyRef: nobody}]}",
        "nobody",
    ),
    (
        "a policy that must be listed",
        "featureGates: [flowControl]\nplugins: [{type: \
      queue-scorer}]\nflowControl: {priorityBands: [{priority: 1, orderingPolicyRef: \
      edf-ordering-policy}]}",
        "add `- type: edf-ordering-policy`",
    ),
    (
        "a policy that is a scorer",
        "featureGates: [flowControl]\nplugins: [{type: queue-scorer}]\n\
      flowControl: {priorityBands: [{priority: 1, fairnessPolicyRef: queue-scorer}]}",
        "not a fairness policy",
    ),
    (
        "less than nothing",
        "featureGates: [flowControl]\nplugins: [{type: queue-scorer}]\n\
      flowControl: {maxBytes: -1}",
        "not negative",
    ),
    (
        "a detector that must be listed",
        "plugins: [{type: queue-scorer}]\nflowControl: \
      {saturationDetector: {pluginRef: concurrency-detector}}",
        "add `- type: concurrency-det",
    ),
    (
        "a detector that is a scorer",
        "plugins: [{type: queue-scorer}]\nsaturationDetector: \
      {pluginRef: queue-scorer}",
        "not a saturation detector",
    ),
    (
        "a parser that is a picker",
        "plugins: [{name: m, type: max-score-picker}]\nrequestHandler: \
      {parsers: [{pluginRef: m}]}",
        "not a parser",
    ),
    (
        "a parser that is nobody",
        "plugins: [{name: mine, type: openai-parser}]\nrequestHandler: \
      {parsers: [{pluginRef: theirs}]}",
        "theirs",
    ),
    (
        "a loop",
        "plugins: [{name: h, type: disagg-profile-handler, parameters: {deciders: {encode: \
      h}}}]\nschedulingProfiles: [{name: decode}]",
        "loop: h -> h",
    ),
    (
        "a decider that is nobody",
        "plugins: [{type: pd-profile-handler, parameters: \
      {deciderPluginName: nobody}}]\nschedulingProfiles: [{name: decode}, {name: prefill}]",
        "undefined plugin 'nobody'",
    ),
    ("a field that is none", "plugins: [{type: queue-scorer}]\nfieldX: 1", "unknown field"),
];

#[test]
fn the_loader_takes_what_llm_ds_takes() {
    for (name, text) in LOADER {
        load(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn the_loader_refuses_what_llm_ds_refuses() {
    for (name, text, message) in LOADER_REFUSES {
        let Err(error) = load(text) else { panic!("{name} loads:\n{text}") };
        let one_line = error.replace("\n  |", " ").replace("\n", " ");
        let one_line = one_line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(one_line.contains(message), "{name}: no {message} in\n{error}");
    }
}

#[test]
fn what_cannot_matter_is_said() {
    let profile = |plugins: &str, refs: &str| {
        format!("plugins: [{plugins}]\nschedulingProfiles: [{{name: p, plugins: [{refs}]}}]")
    };
    let queue = "{type: queue-scorer}";
    let table = [
        ("plugins: [{type: decode-filter}]".to_owned(), "no scorers, so max-score-picker picks"),
        (profile(queue, "{pluginRef: queue-scorer, weight: 0}"), "every weight is 0"),
        (
            profile(
                &format!("{queue}, {{type: load-aware-scorer}}"),
                "{pluginRef: queue-scorer, weight: 0}, {pluginRef: load-aware-scorer}",
            ),
            "queue-scorer: weight 0 in profile p, so it changes nothing",
        ),
        (
            profile(
                &format!("{queue}, {{type: random-picker}}"),
                "{pluginRef: queue-scorer}, {pluginRef: random-picker}",
            ),
            "random-picker does not look at scores",
        ),
        (
            "plugins: [{type: queue-scorer}, {type: precise-prefix-cache-producer}]".to_owned(),
            "precise-prefix-cache-producer: nothing reads it",
        ),
        (
            "plugins: [{type: approx-prefix-cache-producer, parameters: {maxPrefixTokensToMatch: \
             32}}, {type: prefix-cache-scorer}]"
                .to_owned(),
            "32 is less than a block",
        ),
        (
            "plugins: [{type: approx-prefix-cache-producer, parameters: {autoTune: false, \
             lruCapacityPerServer: 0}}, {type: prefix-cache-scorer}]"
                .to_owned(),
            "nothing matches",
        ),
        (
            "plugins: [{type: precise-prefix-cache-producer, parameters: {tokenProcessorConfig: \
             {blockSize: 16}, kvEventsConfig: {discoverPods: false}}}, {type: prefix-cache-scorer, \
             parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}]"
                .to_owned(),
            "so no KV events come",
        ),
        (
            profile(&format!("{queue}, {{type: decode-filter}}"), "{pluginRef: queue-scorer}"),
            "decode-filter: in no profile",
        ),
    ];
    for (text, note) in table {
        let plan = load(&text).unwrap();
        let notes = [NoteKind::Warning, NoteKind::Inert].map(|kind| texts(&plan, kind)).join("\n");
        assert!(notes.contains(note), "{text}\nno {note} in\n{notes}");
    }
    let quiet = load("plugins: [{type: queue-scorer}, {type: prefix-cache-scorer}]").unwrap();
    assert_eq!(texts(&quiet, NoteKind::Warning) + &texts(&quiet, NoteKind::Inert), "");
}
