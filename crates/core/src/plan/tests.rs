//! Configurations that load, what becomes of them, and how mistakes are told.

use super::*;
use crate::config::{GoDuration, Quantity};
use std::time::Duration;

fn parse(yaml: &str) -> Result<EndpointPickerConfig, String> {
    serde_saphyr::from_str(yaml).map_err(|error| error.to_string())
}

fn plan(yaml: &str) -> Plan {
    Plan::build(&parse(yaml).unwrap(), Experimental::Allowed).unwrap()
}

fn stages(stages: &[StagePlan]) -> Vec<(&str, f64, Option<usize>)> {
    stages.iter().map(|s| (s.name.as_str(), s.weight, s.prefix)).collect()
}

fn texts(plan: &Plan, kind: NoteKind) -> Vec<&str> {
    plan.notes.iter().filter(|n| n.kind == kind).map(|n| n.text.as_str()).collect()
}

#[test]
fn a_blend_of_scorers_gets_its_producers_and_picker() {
    let plan = plan(
        "plugins: [{type: no-hit-lru-scorer}, {type: prefix-cache-scorer}, {type: queue-scorer}]\n\
         schedulingProfiles: [{name: blend, plugins: [{pluginRef: no-hit-lru-scorer, weight: 2}, \
         {pluginRef: prefix-cache-scorer, weight: 3}, {pluginRef: queue-scorer}]}]",
    );
    let profile = &plan.profiles[0];
    assert_eq!(profile.name.as_str(), "blend");
    assert_eq!(
        stages(&profile.scorers),
        [
            ("no-hit-lru-scorer", 2.0, Some(0)),
            ("prefix-cache-scorer", 3.0, Some(0)),
            ("queue-scorer", 1.0, None),
        ]
    );
    assert_eq!(profile.picker.name.as_str(), "max-score-picker");
    assert_eq!(plan.producers[0].name.as_str(), "approx-prefix-cache-producer");
    assert_eq!((plan.producer_main, plan.load.prefix), (Some(0), Some(0)));
    assert_eq!(plan.tokens, TokensNeed::Estimated);
    assert!(!plan.reads_events());
    assert_eq!(
        texts(&plan, NoteKind::Added),
        [
            "max-score-picker: the profile has no picker",
            "single-profile-handler: there is one profile",
            "utilization-detector: says how full the fleet is",
            "approx-prefix-cache-producer: no-hit-lru-scorer reads it",
            "token-producer: prefix matching needs tokens",
        ]
    );
}

#[test]
fn two_producers_of_one_type_are_told_apart_by_name() {
    let plan = plan(
        "plugins: [{type: approx-prefix-cache-producer, name: host-memory, parameters: {autoTune: \
         false, lruCapacityPerServer: 900}}, {type: prefix-cache-scorer, name: on-gpu}, {type: \
         prefix-cache-scorer, name: on-host, parameters: {prefixMatchInfoProducerName: \
         host-memory}}]",
    );
    let names: Vec<&str> = plan.producers.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["host-memory", "approx-prefix-cache-producer"]);
    let scorers = stages(&plan.profiles[0].scorers);
    assert_eq!(scorers, [("on-gpu", 1.0, Some(1)), ("on-host", 1.0, Some(0))]);
}

#[test]
fn history_is_as_long_as_the_producer_asks_for() {
    let limit = |more: &str| {
        let yaml = format!(
            "plugins: [{{type: approx-prefix-cache-producer, parameters: {{lruCapacityPerServer: \
             900}}}}, {{type: prefix-cache-scorer}}{more}"
        );
        plan(&yaml).index_limits().history_blocks_per_endpoint_max
    };
    assert_eq!(limit("]"), 900);
    assert_eq!(limit("]\nkvroute: {history_blocks_per_endpoint_max: 2000}"), 2_000);
    assert_eq!(limit("]\nkvroute: {history_blocks_per_endpoint_max: 500}"), 900);
    assert_eq!(limit(", {type: precise-prefix-cache-scorer}]"), 31_250);
}

#[test]
fn estimates_reach_the_plan() {
    let plan = plan(
        "plugins: [{type: tokenizer, parameters: {estimate: {image: {mode: static, static: \
         {staticToken: 280}}}}}, {type: prefix-cache-scorer}]",
    );
    assert_eq!(plan.tokens, TokensNeed::Estimated);
    assert_eq!(plan.estimate.image.tokens(None), 280);
}

#[test]
fn a_precise_producer_asks_for_exact_tokens() {
    let plan = plan(
        "plugins: [{type: token-producer, parameters: {modelName: m, vllm: {url: 'http://r:1'}}}, \
         {type: precise-prefix-cache-producer, parameters: {tokenProcessorConfig: {blockSize: 16, \
         hashSeed: '7'}, kvEventsConfig: {zmqEndpoint: 'tcp://*:1'}, indexerConfig: \
         {kvBlockIndexConfig: {metricsLoggingInterval: 1000}}}}, {type: decode-filter}, {type: \
         prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: \
         precise-prefix-cache-producer}}]",
    );
    assert_eq!(plan.tokens, TokensNeed::Exact);
    assert!(plan.reads_events());
    let precise = plan.precise_producer().unwrap();
    assert_eq!(precise.block_tokens_assumed(), 16);
    assert!(!precise.speculative_indexing);
    assert_eq!(stages(&plan.profiles[0].filters), [("decode-filter", 1.0, None)]);
    assert!(texts(&plan, NoteKind::Inert).iter().any(|text| text.contains("vllm")));
    assert_eq!(plan.index_limits().history_blocks_per_endpoint_max, 31_250);
}

#[test]
fn without_profiles_everything_runs_in_order() {
    let plan = plan(
        "plugins: [{type: running-requests-size-scorer}, {type: decode-filter}, \
         {type: random-picker}, {type: kv-cache-scorer}, {type: token-load-scorer, name: load}]",
    );
    let profile = &plan.profiles[0];
    let scorers: Vec<&str> = profile.scorers.iter().map(|s| s.name.as_str()).collect();
    // Unnamed, a plugin is called like its type as it is written, an old name included.
    assert_eq!(scorers, ["running-requests-size-scorer", "kv-cache-scorer", "load"]);
    assert_eq!(profile.picker.name.as_str(), "random-picker");
    assert_eq!(plan.tokens, TokensNeed::None);
    assert_eq!(plan.producer_main, None);
}

#[test]
fn keys_come_in_any_order() {
    let sorted = "plugins: [{name: a, parameters: {queueThresholdTokens: 7}, type: \
                  token-load-scorer}, {parameters: {matchLabels: {x: 'y'}, matchExpressions: \
                  [{key: k, operator: In, values: [v]}]}, type: label-selector-filter}, \
                  {parameters: {speculativeTTL: 5s, kvEventsConfig: {engineType: vllm}}, type: \
                  precise-prefix-cache-producer}]";
    let typed_first = "plugins: [{type: token-load-scorer, name: a, parameters: \
                       {queueThresholdTokens: 7}}, {type: label-selector-filter, parameters: \
                       {matchLabels: {x: 'y'}, matchExpressions: [{key: k, operator: In, \
                       values: [v]}]}}, {type: precise-prefix-cache-producer, parameters: \
                       {speculativeTTL: 5s, kvEventsConfig: {engineType: vllm}}}]";
    let config = parse(sorted).unwrap();
    assert_eq!(config, parse(typed_first).unwrap());
    assert_eq!(config.plugins[0].name(), "a");
    let json = r#"{"plugins": [{"parameters": {"threshold": 10}, "type": "load-aware-scorer"}]}"#;
    let from_json: EndpointPickerConfig = serde_json::from_str(json).unwrap();
    assert_eq!(from_json, parse(json).unwrap());
}

#[test]
fn the_whole_schema_is_read() {
    let config = parse(
        "apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
featureGates: [flowControl=false]
plugins:
- type: queue-scorer
flowControl:
  maxBytes: 2Gi
  maxRequests: 5000
  defaultRequestTTL: 1m30s
  priorityBands: [{priority: -1, maxBytes: 1G}]

kvroute: {body_bytes_max: 1000, speculative: false}
",
    )
    .unwrap();
    let flow = config.flow_control.as_ref().unwrap();
    assert_eq!(
        (flow.max_bytes, flow.max_requests),
        (Some(Quantity(2 << 30)), Some(Quantity(5000)))
    );
    assert_eq!(flow.default_request_ttl, Some(GoDuration(Duration::from_secs(90))));
    assert_eq!(flow.priority_bands[0].priority, -1);
    assert_eq!(config.kvroute.limits.body_bytes_max, 1000);
    assert_eq!(config.kvroute.limits.retries_max, 2);
    let inert = Plan::build(&config, Experimental::Allowed).unwrap();
    assert_eq!(texts(&inert, NoteKind::Inert).len(), 1);
}

#[test]
fn mistakes_in_the_text_are_told_with_place_and_valid_names() {
    let table = [
        ("plugin: []", "plugins", "1:1"),
        ("plugins:\n- type: queu-scorer", "nearest first: queue-scorer", "2:9"),
        ("plugins:\n- name: x", "missing a `type`", "2:"),
        ("plugins:\n- type: queue-scorer\n  typo: 1", "parameters", "3:3"),
        (
            "plugins:\n- type: token-load-scorer\n  parameters:\n    queueTreshold: 5",
            "queueThresholdTokens",
            "4:5",
        ),
        ("plugins:\n- type: queue-scorer\n  parameters: {a: 1}", "a", "3:16"),
        ("plugins:\n- type: queue-scorer\n  type: queue-scorer", "duplicate", "3:3"),
        ("kind: Pod", "EndpointPickerConfig", "1:7"),
        ("flowControl:\n  defaultRequestTTL: 60", "duration", "2:3"),
        ("kvroute:\n  body_bytes: 1", "body_bytes_max", "2:3"),
        ("schedulingProfiles:\n- name: a\n  plugins:\n  - pluginref: x", "pluginRef", "4:5"),
    ];
    for (yaml, names, place) in table {
        let error = parse(yaml).unwrap_err();
        assert!(error.contains(names), "{yaml}\n{error}");
        assert!(error.contains(place), "{yaml}\n{error}");
    }
}

#[test]
fn mistakes_of_meaning_name_their_place() {
    let scorer = "plugins: [{type: queue-scorer}]\n";
    let profile =
        |plugins: &str| format!("{scorer}schedulingProfiles: [{{name: p, plugins: [{plugins}]}}]");
    let path = "schedulingProfiles[0].plugins[0]";
    let two = "plugins: [{type: max-score-picker}, {type: random-picker}]";
    let table: Vec<(String, String, &str)> =
        vec![
        (profile("{pluginRef: queu}"), format!("{path}.pluginRef"), "defined: queue-scorer"),
        (profile("{weight: 1}"), path.into(), "missing a `pluginRef`"),
        (
            "plugins: [{type: decode-filter}]\nschedulingProfiles: [{name: p, plugins: \
             [{pluginRef: decode-filter, weight: 2}]}]"
                .into(),
            format!("{path}.weight"),
            "no scorer",
        ),
        (profile("{pluginRef: queue-scorer, weight: .nan}"), format!("{path}.weight"), "not NaN"),
        (two.into(), "plugins".into(), "already have a picker 'max-score-picker'"),
        (format!("{scorer}featureGates: [x]"), "featureGates[0]".into(), "flowControl"),
        ("plugins: [{type: queue-scorer}, {type: queue-scorer}]".into(), "plugins[1].type".into(),
            "duplicate"),
        ("plugins: [{type: prefix-cache-scorer, parameters: {matchLengthScaleTokens: 0}}]".into(),
            "plugins[0].parameters.matchLengthScaleTokens".into(), "positive"),
        ("schedulingProfiles: [{plugins: []}]".into(), "schedulingProfiles[0].name".into(),
            "missing a `name`"),
        ("schedulingProfiles: [{name: a}, {name: b}]".into(), "schedulingProfiles".into(),
            "no profile handler configured"),
        ("plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: x}}]"
            .into(), "plugins[0].parameters.prefixMatchInfoProducerName".into(),
            "undefined plugin 'x'"),
        ("plugins: [{type: single-profile-handler}, {type: single-profile-handler, name: b}]"
            .into(), "plugins[1].type".into(), "multiple profile handlers"),
    ];
    let zero = ("kvroute: {scrape_interval_ms: 0}".into(), "kvroute.scrape_interval_ms".into());
    let targets = (
        "kvroute: {model_rewrites: [{name: r, targets: []}]}".into(),
        "kvroute.model_rewrites[0].targets".into(),
    );
    let more = [(zero.0, zero.1, "positive"), (targets.0, targets.1, "at least one target")];
    let table = table.into_iter().chain(more);
    for (yaml, path, message) in table {
        let error = Plan::build(&parse(&yaml).unwrap(), Experimental::Allowed).unwrap_err();
        assert_eq!(error.path, path, "{yaml}");
        assert!(error.message.contains(message), "{yaml}\n{error}");
    }
}

#[test]
fn empty_references_mean_the_default() {
    let plan = plan(
        "plugins: [{type: queue-scorer}]\nsaturationDetector: {pluginRef: ''}\nflowControl: \
         {saturationDetector: {pluginRef: ''}, usageLimitPolicyPluginRef: '', priorityBands: \
         [{priority: 1, fairnessPolicyRef: '', orderingPolicyRef: ''}]}\n\
         featureGates: [flowControl]",
    );
    assert_eq!(plan.detector.unwrap().name.as_str(), "utilization-detector");
}

/// Defaults are added; what llm-d calls Alpha must be listed, and needs the flag.
#[test]
fn producers_that_are_not_listed_are_of_the_wanted_kind_and_stable() {
    let built = |name: &str, parameter: &str, producer: &str| {
        let yaml = format!("plugins: [{{type: {name}, parameters: {{{parameter}: {producer}}}}}]");
        Plan::build(&parse(&yaml).unwrap(), Experimental::Refused).map_err(|e| e.to_string())
    };
    let prefix = |producer| built("prefix-cache-scorer", "prefixMatchInfoProducerName", producer);
    assert!(prefix("precise-prefix-cache-producer").is_ok());
    let burst = prefix("burst-prefix-cache-producer").unwrap_err();
    assert!(burst.contains("undefined plugin 'burst-prefix-cache-producer'"), "{burst}");
    let load = |producer| built("active-request-scorer", "inFlightLoadProducerName", producer);
    assert!(load("inflight-load-producer").is_ok());
    let other = load("approx-prefix-cache-producer").unwrap_err();
    assert!(other.contains("in-flight load"), "{other}");
}

#[test]
fn metrics_that_are_stale_between_two_readings_are_a_warning() {
    let warns = |more: &str| {
        let plan = plan(&format!("plugins: [{{type: queue-scorer}}{more}"));
        texts(&plan, NoteKind::Warning).iter().any(|text| text.contains("metricsStaleness"))
    };
    assert!(!warns("]"));
    assert!(!warns(", {type: metrics-data-source, parameters: {interval: 200ms}}]"));
    assert!(warns(", {type: metrics-data-source, parameters: {interval: 250ms}}]"));
    assert!(warns("]\nkvroute: {scrape_interval_ms: 1000}"));
}

#[test]
fn several_producers_of_a_kind_that_runs_once_are_a_warning() {
    let plan = plan(
        "plugins: [{type: active-request-scorer}, {type: inflight-load-producer}, {type: \
         inflight-load-producer, name: second}]",
    );
    let warnings = texts(&plan, NoteKind::Warning);
    assert!(warnings.iter().any(|text| text.starts_with("second: ")), "{warnings:?}");
}

#[test]
fn load_that_subtracts_what_nobody_produces_is_a_warning() {
    let plan = plan(
        "plugins: [{type: active-request-scorer}, {type: inflight-load-producer, parameters: \
         {prefixMatchInfoProducerName: approx-prefix-cache-producer}}]",
    );
    assert_eq!((plan.load.prefix, plan.producers.len()), (None, 0));
    let warnings = texts(&plan, NoteKind::Warning);
    assert!(warnings.iter().any(|text| text.contains("no producer is called")), "{warnings:?}");
}

#[test]
fn the_precise_scorer_brings_its_own_producer_or_uses_the_one_there_is() {
    let alone = plan(
        "plugins: [{type: precise-prefix-cache-scorer, parameters: {tokenProcessorConfig: \
         {blockSize: 64}}}]",
    );
    assert_eq!(alone.precise_producer().unwrap().block_tokens_assumed(), 64);
    let both = plan(
        "plugins: [{type: precise-prefix-cache-scorer}, {type: precise-prefix-cache-producer, \
         name: events}]",
    );
    assert_eq!(both.producers.len(), 1);
    assert_eq!(both.profiles[0].scorers[0].prefix, Some(0));
}

#[test]
fn a_plan_says_where_events_come_from_however_they_are_configured() {
    let given = "{zmqEndpoint: \"tcp://*:5557\", discoverPods: false}";
    for plugin in [
        "precise-prefix-cache-producer, parameters: {kvEventsConfig: ",
        "precise-prefix-cache-scorer, parameters: {kvEventsConfig: ",
        "prefix-cache-scorer, parameters: {mode: cache_tracking, kvEventsConfig: ",
    ] {
        let shown = plan(&format!("plugins: [{{type: {plugin}{given}}}}}]")).to_string();
        let line = "events    engines connect to tcp://*:5557 (topics that begin with kv@)";
        assert!(shown.lines().any(|l| l == line), "{shown}");
    }
    let nowhere = plan(
        "plugins: [{type: precise-prefix-cache-producer, parameters: {kvEventsConfig: \
         {discoverPods: false}}}]",
    );
    let warnings = texts(&nowhere, NoteKind::Warning);
    assert!(warnings.iter().any(|text| text.contains("so no KV events come")), "{nowhere}");
    assert!(nowhere.to_string().contains("events    from nowhere"), "{nowhere}");
}

#[test]
fn built_in_plans_print_what_runs() {
    let text = Plan::precise().to_string();
    for line in [
        "handler   profile default for every request",
        "profile   default",
        "  scorer  prefix-cache-scorer            x 3; reads precise-prefix-cache-producer",
        "  scorer  no-hit-lru-scorer              x 2; reads precise-prefix-cache-producer",
        "  picker  max-score-picker",
        "producer  precise-prefix-cache-producer  cached prefixes, told by the engines' events; read by",
        "added     max-score-picker: the profile has no picker",
        "events    each endpoint as it says itself, else at port 5557 + rank",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(!text.contains("warning"), "{text}");
    assert_eq!(Plan::baseline_round_robin().tokens, TokensNeed::None);
}

#[test]
fn durations_and_quantities_are_those_of_go_and_kubernetes() {
    let seconds = |text| GoDuration::parse(text).map(|d| d.0.as_secs_f64());
    for (text, value) in [
        ("60s", Some(60.0)),
        ("1m30s", Some(90.0)),
        ("200ms", Some(0.2)),
        ("1.5h", Some(5400.0)),
        ("0", Some(0.0)),
        ("0s", Some(0.0)),
        ("", None),
        ("60", None),
        ("-1s", None),
        ("s", None),
        ("1x", None),
        ("99999999999999999999h", None),
    ] {
        assert_eq!(seconds(text), value, "{text:?}");
    }
    for text in ["200ms", "60s", "1500000ns", "0s"] {
        let duration = GoDuration::parse(text).unwrap();
        assert_eq!(serde_json::to_value(duration).unwrap(), text);
    }
    let quantity = |text| Quantity::parse(text).map(|q| q.0);
    for (text, value) in [
        ("5000", Some(5000)),
        ("1G", Some(1_000_000_000)),
        ("64Mi", Some(64 << 20)),
        ("1.5k", Some(1500)),
        ("1e3", Some(1000)),
        ("", None),
        ("-1", None),
        ("1X", None),
        ("1e999", None),
    ] {
        assert_eq!(quantity(text), value, "{text:?}");
    }
}

#[test]
fn what_is_collected_by_default_takes_parameters_from_plugins_of_that_name() {
    use crate::collect::{CollectPlan, Reading};

    let default = plan("plugins: [{type: queue-scorer}]").collect;
    assert_eq!(default, CollectPlan::default());
    let given = plan(
        "plugins:\n- type: queue-scorer\n- type: metrics-data-source\n  \
         parameters: {port: 9090}\n- type: core-metrics-extractor\n  \
         parameters: {defaultEngine: sglang}\n- type: topology-extractor\n  \
         parameters: {zone: my-zone}\n",
    );
    let page = &given.collect.pages[0];
    assert_eq!((given.collect.pages.len(), page.ask.port), (1, Some(9090)));
    assert_eq!(given.collect.topology.zone, "my-zone");
    let Reading::Engine(engine) = &page.readings[0] else { panic!("{page:?}") };
    assert_eq!(engine.default_engine.as_ref().map(Name::as_str), Some("sglang"));
    let off = plan("plugins: [{type: queue-scorer}]\ndataLayer: {injectDefaults: false}");
    assert_eq!(off.collect.pages, []);
}
