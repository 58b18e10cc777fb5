//! Parameters as users write them, and the plans that follow.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use super::*;
use crate::config::GoDuration;

fn read<T: DeserializeOwned>(json: &str) -> T {
    serde_json::from_str(json).unwrap()
}

fn entry(name: &str, spec: SourceSpec, extractors: &[(&str, ExtractorSpec)]) -> SourceEntry {
    let extractors = extractors.iter().map(|(n, spec)| (Name::from(*n), spec.clone())).collect();
    SourceEntry { name: Name::from(name), spec, extractors }
}

fn core() -> ExtractorSpec {
    ExtractorSpec::CoreMetrics(CoreMetricsExtractor::default())
}

fn dcgm() -> ExtractorSpec {
    ExtractorSpec::Dcgm(DcgmExtractor::default())
}

fn engine(plan: &CollectPlan) -> &EngineReading {
    match &plan.pages[0].readings[0] {
        Reading::Engine(reading) => reading,
        other => panic!("{other:?}"),
    }
}

#[test]
fn defaults_are_those_of_llm_d() {
    let metrics: MetricsDataSource = read("{}");
    assert_eq!(metrics, MetricsDataSource::default());
    assert_eq!((metrics.scheme, metrics.path.as_str()), (Scheme::Http, "/metrics"));
    assert!(metrics.insecure_skip_verify && metrics.interval.is_none());
    let cluster: MulticlusterMetricsDataSource = read("{}");
    assert!(cluster.scheme == Scheme::Https && !cluster.insecure_skip_verify);
    let dcgm: DcgmDataSource = read("{}");
    assert_eq!((dcgm.port, dcgm.use_node_address), (9400, false));
    assert_eq!(read::<ModelsDataSource>("{}").path, "/v1/models");
    let core: CoreMetricsExtractor = read("{}");
    assert_eq!(core.engine_label_key, "llm-d.ai/engine-type");
    assert!(!read::<FileDiscovery>(r#"{"path": "f"}"#).watch_file);
    assert_eq!(read::<DcgmExtractor>(r#"{"any": "thing"}"#), DcgmExtractor {});
    for (set, default) in [("", "kubernetes.io/hostname"), ("node", "node")] {
        let topology: TopologyExtractor = read(&format!(r#"{{"hostname": "{set}"}}"#));
        assert_eq!(topology.labels().hostname, default);
        assert_eq!(topology.labels().rack, "topology.kubernetes.io/rack");
    }
}

#[test]
fn all_parameters_are_read() {
    let metrics: MetricsDataSource = read(
        r#"{"scheme": "https", "path": "/m", "port": 9090, "insecureSkipVerify": false,
            "caCertPath": "ca.pem", "clientCertPath": "c.pem", "clientKeyPath": "k.pem",
            "interval": "250ms"}"#,
    );
    let entry = entry("s", SourceSpec::Metrics(metrics), &[("core", core())]);
    let plan = CollectPlan::build(&[entry], true, None).unwrap();
    assert_eq!(plan.pages.len(), 1);
    let tls = TlsOptions {
        skip_verify: false,
        ca_cert: Some("ca.pem".to_owned()),
        client: Some(("c.pem".to_owned(), "k.pem".to_owned())),
    };
    let expected = Ask {
        source: Name::from("s"),
        scheme: Scheme::Https,
        path: "/m".to_owned(),
        port: Some(9090),
        at_node: false,
        tls,
        interval: Some(Duration::from_millis(250)),
        bytes_max: None,
    };
    assert_eq!(plan.pages[0].ask, expected);
    assert_eq!(plan.notes, Vec::<String>::new());
}

#[test]
fn wrong_parameters_name_their_field() {
    let metrics = |json: &str| read::<MetricsDataSource>(json).check();
    let models = |json: &str| read::<ModelsDataSource>(json).check();
    let dcgm = |json: &str| read::<DcgmDataSource>(json).check();
    let cluster = |json: &str| read::<MulticlusterMetricsDataSource>(json).check();
    let core = |json: &str| read::<CoreMetricsExtractor>(json).check();
    let average = |json: &str| read::<MulticlusterMetricsExtractor>(json).check();
    let one = |rest: &str| core(&format!(r#"{{"engineConfigs": [{{"name": "x", {rest}}}]}}"#));
    let load = r#""queuedRequestsSpec": "q""#;
    let table = [
        (metrics(r#"{"port": 65536}"#), "port: "),
        (metrics(r#"{"path": "m"}"#), "path: "),
        (metrics(r#"{"interval": "70ms"}"#), "interval: "),
        (metrics(r#"{"clientKeyPath": "k"}"#), "clientCertPath: "),
        (models(r#"{"path": ""}"#), "path: "),
        (dcgm(r#"{"port": 0, "useNodeAddress": true}"#), "port: "),
        (cluster(r#"{"clientCertPath": "c"}"#), "clientKeyPath: "),
        (average(r#"{"queueSizeMetric": "a b"}"#), "queueSizeMetric: `a b`"),
        (core(r#"{"defaultEngine": "vlm"}"#), "defaultEngine: no engine `vlm`"),
        (core(r#"{"engineConfigs": [{}]}"#), "engineConfigs[0].name: "),
        (core(r#"{"engineConfigs": [{"name": "default"}]}"#), "engineConfigs[0].name: "),
        (one(r#""kvUsageSpec": "k""#), "engineConfigs[0].queuedRequestsSpec: "),
        (one(r#""runningRequestsSpec": "k{""#), "engineConfigs[0].runningRequestsSpec: `k{`"),
        (one(&format!(r#"{load}, "loraSpec": "9""#)), "engineConfigs[0].loraSpec: "),
        (
            one(&format!(r#"{load}, "customMetrics": [{{"metricSpec": "m"}}]"#)),
            "engineConfigs[0].customMetrics[0].attributeKey: ",
        ),
        (
            one(&format!(r#"{load}, "customMetrics": [{{"attributeKey": "a"}}]"#)),
            "engineConfigs[0].customMetrics[0].metricSpec: ",
        ),
        (read::<FileDiscovery>("{}").check(), "path: "),
        (read::<MulticlusterFileDiscovery>("{}").check(), "path: "),
        (read::<K8sNotificationSource>(r#"{"version": "v1"}"#).check(), "kind: "),
    ];
    for (outcome, start) in table {
        let error = outcome.expect_err(start);
        assert!(error.starts_with(start), "{error} / {start}");
    }
    let twice = r#"{"engineConfigs": [{"name": "x", "queuedRequestsSpec": "q"},
        {"name": "x", "queuedRequestsSpec": "q"}]}"#;
    assert!(core(twice).unwrap_err().starts_with("engineConfigs[1].name: "));
    let custom = r#"{"attributeKey": "a", "metricSpec": "m"}"#;
    let twice = one(&format!(r#"{load}, "customMetrics": [{custom}, {custom}]"#));
    assert!(twice.unwrap_err().contains("customMetrics[1].attributeKey: `a` is there twice"));
}

#[test]
fn unknown_fields_and_schemes_are_refused() {
    let wrong = [
        serde_json::from_str::<MetricsDataSource>(r#"{"shceme": "http"}"#).err(),
        serde_json::from_str::<MetricsDataSource>(r#"{"scheme": "ftp"}"#).err(),
        serde_json::from_str::<DcgmDataSource>(r#"{"caCertPath": "x"}"#).err(),
        serde_json::from_str::<CoreMetricsExtractor>(r#"{"engineConfigs": [{"x": 1}]}"#).err(),
        serde_json::from_str::<TopologyExtractor>(r#"{"node": "x"}"#).err(),
    ];
    for error in wrong {
        let error = error.unwrap().to_string();
        assert!(error.contains("unknown field") || error.contains("unknown variant"), "{error}");
    }
}

#[test]
fn defaults_are_injected_unless_a_metrics_source_is_listed() {
    let default = CollectPlan::build(&[], true, None).unwrap();
    assert_eq!(default, CollectPlan::default());
    let names: Vec<&str> = engine(&default).engines.iter().map(|e| e.name.as_str()).collect();
    let expected = ["vllm", "sglang", "trtllm-serve", "triton-tensorrt-llm", "triton"];
    assert_eq!(names, expected);
    assert_eq!(engine(&default).default_engine, None);

    let nothing = CollectPlan::build(&[], false, None).unwrap();
    assert_eq!(nothing.pages, []);
    assert!(nothing.notes[0].contains("core-metrics-extractor"), "{:?}", nothing.notes);

    let gpu = || entry("gpu", SourceSpec::Dcgm(DcgmDataSource::default()), &[("g", dcgm())]);
    let plan = CollectPlan::build(&[gpu()], true, None).unwrap();
    let sources: Vec<&str> = plan.pages.iter().map(|page| page.ask.source.as_str()).collect();
    assert_eq!(sources, ["metrics-data-source", "gpu"]);
    let attributes: Vec<_> = plan.attributes().map(|(p, key)| (p.as_str(), key)).collect();
    assert_eq!(attributes, [("g", GPU_UTILIZATION)]);

    let own = SourceSpec::Metrics(MetricsDataSource::default());
    let plan = CollectPlan::build(&[gpu(), entry("own", own, &[("c", core())])], true, None);
    let plan = plan.unwrap();
    let sources: Vec<&str> = plan.pages.iter().map(|page| page.ask.source.as_str()).collect();
    assert_eq!(sources, ["own", "gpu"]);
    assert_eq!(plan.pages[1].ask.interval, Some(Duration::from_secs(1)));
}

#[test]
fn an_extractor_that_cannot_read_its_source_is_an_error() {
    let models = || SourceSpec::Models(ModelsDataSource::default());
    let metrics = || SourceSpec::Metrics(MetricsDataSource::default());
    let listed = ExtractorSpec::Models(ModelsDataExtractor::default());
    let topology = ExtractorSpec::Topology(TopologyExtractor::default());
    let table = [
        (models(), core(), "core-metrics-extractor, which cannot read what a models-data-source"),
        (metrics(), listed.clone(), "it reads a models-data-source"),
        (metrics(), topology.clone(), "it reads an endpoint-notification-source"),
    ];
    for (source, extractor, words) in table {
        let sources = [
            entry("fine", models(), &[("m", listed.clone())]),
            entry("s", source, &[("e", extractor)]),
        ];
        let error = CollectPlan::build(&sources, true, None).unwrap_err();
        assert_eq!((error.source_at, error.extractor_at), (Some(1), Some(0)));
        assert!(error.message.contains(words), "{error}");
    }
    let wrong = MetricsDataSource { port: 70_000, ..MetricsDataSource::default() };
    let sources = [entry("s", SourceSpec::Metrics(wrong), &[])];
    let error = CollectPlan::build(&sources, true, None).unwrap_err();
    assert_eq!((error.source_at, error.extractor_at), (Some(0), None));
    let file = DiscoverySpec::File(FileDiscovery::default());
    let error = CollectPlan::build(&[], true, Some(&file)).unwrap_err();
    assert_eq!((error.source_at, error.extractor_at), (None, None));
}

#[test]
fn topology_models_clusters_and_discovery() {
    let topology = TopologyExtractor { zone: "z".to_owned(), ..TopologyExtractor::default() };
    let events = SourceSpec::EndpointNotification(EndpointNotificationSource::default());
    let models =
        ModelsDataSource { interval: GoDuration::parse("1m"), ..ModelsDataSource::default() };
    let cluster = MulticlusterMetricsDataSource::default();
    let average = ExtractorSpec::MulticlusterMetrics(MulticlusterMetricsExtractor::default());
    let sources = [
        entry("events", events, &[("t", ExtractorSpec::Topology(topology))]),
        entry("models", SourceSpec::Models(models), &[]),
        entry("clusters", SourceSpec::MulticlusterMetrics(cluster), &[("average", average)]),
    ];
    let file = MulticlusterFileDiscovery { path: "c.yaml".to_owned(), watch_file: true };
    let discovery = DiscoverySpec::MulticlusterFile(file);
    let plan = CollectPlan::build(&sources, false, Some(&discovery)).unwrap();
    assert_eq!(plan.topology.zone, "z");
    assert_eq!(plan.models.interval, Some(Duration::from_secs(60)));
    assert_eq!(plan.pages[0].ask.bytes_max, Some(8 << 20));
    let keys: Vec<&str> = plan.attributes().map(|(_, key)| key).collect();
    assert_eq!(keys, [MULTICLUSTER_KV_USAGE, MULTICLUSTER_QUEUE]);
    let expected = DiscoveryPlan { path: "c.yaml".to_owned(), watch: true, clusters: true };
    assert_eq!(plan.discovery, Some(expected));
}

#[test]
fn what_has_no_effect_is_said() {
    let unread = entry("unread", SourceSpec::Dcgm(DcgmDataSource::default()), &[]);
    let pods: K8sNotificationSource = read(r#"{"version": "v1", "kind": "Pod"}"#);
    let ca = MetricsDataSource { ca_cert_path: "ca".to_owned(), ..MetricsDataSource::default() };
    let sources = [
        unread,
        entry("pods", SourceSpec::K8sNotification(pods), &[]),
        entry("first", SourceSpec::Metrics(ca), &[("c", core())]),
        entry("second", SourceSpec::Metrics(MetricsDataSource::default()), &[("c2", core())]),
    ];
    let plan = CollectPlan::build(&sources, true, None).unwrap();
    assert_eq!(plan.pages.len(), 2);
    for words in ["`unread`", "Pod objects", "caCertPath has no effect", "`first` tells the load"] {
        assert!(plan.notes.iter().any(|note| note.contains(words)), "{words}: {:?}", plan.notes);
    }
}

#[test]
fn the_engine_is_what_the_label_says() {
    let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    let extractor: CoreMetricsExtractor = read(
        r#"{"engineLabelKey": "engine", "engineConfigs": [
            {"name": "mine", "queuedRequestsSpec": "q"},
            {"name": "vllm", "runningRequestsSpec": "r{a=b}"}]}"#,
    );
    let reading = extractor.reading(&Name::from("c")).unwrap();
    type Pairs<'a> = &'a [(&'a str, &'a str)];
    let table: [(Pairs<'_>, Option<&str>); 7] = [
        (&[], None),
        (&[("engine", "mine")], Some("mine")),
        (&[("engine", ""), (ENGINE_LABEL_LEGACY, "sglang")], Some("sglang")),
        (&[("engine", "triton"), (ENGINE_LABEL_LEGACY, "sglang")], Some("triton")),
        (&[(ENGINE_LABEL_LEGACY, "mine")], Some("mine")),
        (&[("engine", "unheard-of")], None),
        (&[(ENGINE_LABEL, "mine")], None),
    ];
    for (pairs, expected) in table {
        let engine = reading.engine_of(&labels(pairs)).map(|engine| engine.name.as_str());
        assert_eq!(engine, expected, "{pairs:?}");
    }
    let mut with_default = extractor.clone();
    with_default.default_engine = "mine".to_owned();
    let with_default = with_default.reading(&Name::from("c")).unwrap();
    let name = |pairs| with_default.engine_of(&labels(pairs)).map(|engine| engine.name.as_str());
    assert_eq!((name(&[]), name(&[("engine", "x")])), (Some("mine"), Some("mine")));
    let vllm = reading.engines.iter().find(|engine| engine.name.as_str() == "vllm").unwrap();
    let signals: Vec<&Signal> = vllm.signals.iter().map(|(signal, _)| signal).collect();
    assert_eq!(signals, [&Signal::Running, &Signal::PrefixQueries, &Signal::PrefixHits]);
}
