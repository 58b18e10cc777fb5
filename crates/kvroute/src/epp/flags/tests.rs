use std::collections::BTreeSet;

use super::*;

/// The flags of a command line that is right.
pub(in crate::epp) fn run(args: &[&str]) -> EppFlags {
    match read(args) {
        Ok(Asked::Run(flags)) => *flags,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn read(args: &[&str]) -> Result<Asked, String> {
    parse(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
}

fn error(args: &[&str]) -> String {
    match read(args) {
        Err(error) => error,
        Ok(_) => panic!("{args:?} is taken"),
    }
}

/// llm-d's flags with their defaults (`pkg/epp/server/options.go`); an own flag has none of its
/// names.
const UPSTREAM: [(&str, &str); 50] = [
    ("grpc-port", "9002"),
    ("ha-enable-leader-election", "false"),
    ("drain-timeout", "30s"),
    ("grpc-max-recv-msg-size", "4MiB"),
    ("grpc-max-send-msg-size", ""),
    ("pool-group", "inference.networking.k8s.io"),
    ("pool-namespace", "$NAMESPACE, else default"),
    ("pool-name", ""),
    ("endpoint-selector", ""),
    ("endpoint-target-ports", ""),
    ("disable-endpoint-subset-filter", "false"),
    ("emit-endpoint-scores", "false"),
    ("refresh-metrics-interval", "50ms"),
    ("refresh-prometheus-metrics-interval", "5s"),
    ("metrics-staleness-threshold", "2s"),
    ("total-queued-requests-metric", ""),
    ("total-running-requests-metric", ""),
    ("kv-cache-usage-percentage-metric", ""),
    ("lora-info-metric", ""),
    ("cache-info-metric", ""),
    ("v", "2"),
    ("zap-devel", "false"),
    ("zap-encoder", "json"),
    ("zap-log-level", ""),
    ("zap-stacktrace-level", ""),
    ("zap-time-encoding", "rfc3339"),
    ("tracing", "true"),
    ("health-checking", "false"),
    ("metrics-port", "9090"),
    ("grpc-health-port", "9003"),
    ("enable-pprof", "true"),
    ("cert-path", ""),
    ("enable-cert-reload", "false"),
    ("enable-grpc-stream-metrics", "false"),
    ("secure-serving", "true"),
    ("tls-min-version", ""),
    ("tls-cipher-suites", ""),
    ("metrics-endpoint-auth", "true"),
    ("metrics-client-ca-file", ""),
    ("metrics-cert-dir", ""),
    ("config-file", ""),
    ("config-text", ""),
    ("allow-experimental-plugins", "false"),
    // Ours.
    ("endpoint", ""),
    ("endpoints-file", ""),
    ("tokenizer", ""),
    ("model", ""),
    ("kv-events-port", ""),
    ("kv-replay-port", ""),
    ("admin", "127.0.0.1:9091"),
];

fn all() -> impl Iterator<Item = &'static Flag> {
    FLAGS.iter().flat_map(|(_, flags)| *flags)
}

#[test]
fn every_flag_of_llm_d_is_known_with_its_default() {
    for (name, default) in UPSTREAM {
        let flag = flag(name).unwrap_or_else(|| panic!("--{name} is unknown"));
        assert_eq!(flag.default, default, "--{name}");
    }
    let names: BTreeSet<&str> = all().map(|flag| flag.name).collect();
    assert_eq!(names.len(), all().count(), "no name twice");
    let listed: BTreeSet<&str> = UPSTREAM.iter().map(|(name, _)| *name).collect();
    let rest: Vec<&&str> = names.difference(&listed).collect();
    assert_eq!(rest, [&"endpoint-header", &"seed", &"upstream-metric-names"]);
}

#[test]
fn a_default_that_is_written_out_changes_nothing_but_what_was_given() {
    // Those that stand before the configuration's settings are not the same when written out.
    let overrides = [
        "drain-timeout",
        "grpc-max-recv-msg-size",
        "refresh-metrics-interval",
        "metrics-staleness-threshold",
        "pool-namespace",
        "zap-encoder",
        "zap-time-encoding",
    ];
    for flag in all().filter(|f| !f.default.is_empty() && !overrides.contains(&f.name)) {
        let mut flags = run(&[&format!("--{}={}", flag.name, flag.default)]);
        assert_eq!(flags.given, BTreeSet::from([flag.name]));
        flags.given.clear();
        assert_eq!(format!("{flags:?}"), format!("{:?}", EppFlags::default()), "{}", flag.name);
    }
}

/// A valid value that is not the default, and one that is not valid, where there is any.
fn samples(name: &str) -> (&'static str, Option<&'static str>) {
    match name {
        "grpc-port" | "grpc-health-port" | "metrics-port" => ("0", Some("65536")),
        "kv-events-port" | "kv-replay-port" => ("5557", Some("0")),
        "grpc-max-recv-msg-size" | "grpc-max-send-msg-size" => ("10MiB", Some("10 MiB")),
        name if name.ends_with("-interval") || name == "drain-timeout" => ("1m30s", Some("30")),
        "metrics-staleness-threshold" => ("3s", Some("-3s")),
        "tls-min-version" => ("VersionTLS13", Some("TLS13")),
        "tls-cipher-suites" => ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", Some("RC4")),
        "endpoint-selector" => ("app=vllm,tier in (a,b),!canary", Some("a in (b")),
        "endpoint-target-ports" => ("8000,8001", Some("8000, 8001")),
        "v" => ("4", Some("-1")),
        "zap-log-level" => ("debug", Some("0")),
        "zap-encoder" => ("console", Some("text")),
        "zap-stacktrace-level" => ("error", Some("debug")),
        "zap-time-encoding" => ("iso8601", Some("unix")),
        "seed" => ("7", Some("x")),
        _ => ("some-text", None),
    }
}

#[test]
fn every_flag_takes_every_syntax() {
    for flag in all().filter(|flag| !flag.name.ends_with("-metric")) {
        let name = flag.name;
        let written = |args: &[&str]| format!("{:?}", run(args));
        if flag.value.is_empty() {
            let bare = written(&[&format!("--{name}")]);
            for value in ["1", "t", "T", "true", "TRUE", "True"] {
                assert_eq!(written(&[&format!("--{name}={value}")]), bare, "--{name}={value}");
            }
            let off = written(&[&format!("--{name}=false")]);
            assert_ne!(off, bare, "--{name}");
            assert_eq!(written(&[&format!("--{name}=0")]), off);
            assert_eq!(written(&[&format!("--{name}"), &format!("--{name}=F")]), off, "last wins");
            let wrong = error(&[&format!("--{name}=yes")]);
            assert_eq!(wrong, format!("--{name}: `yes`: write true or false"));
            // The word behind a boolean is not its value, as in pflag.
            assert_eq!(run(&[&format!("--{name}"), "false"]).stray, ["false"]);
            continue;
        }
        let (good, bad) = samples(name);
        let joined = written(&[&format!("--{name}={good}")]);
        assert_eq!(written(&[&format!("--{name}"), good]), joined, "--{name}");
        assert_ne!(joined, written(&[]), "--{name}");
        if let Some(bad) = bad {
            let wrong = error(&[&format!("--{name}={bad}")]);
            assert!(wrong.starts_with(&format!("--{name}: `{bad}`: ")), "{wrong}");
        }
        let wrong = error(&[&format!("--{name}")]);
        assert!(wrong.starts_with(&format!("--{name} needs a value")), "{wrong}");
    }
}

#[test]
fn short_flags_as_pflag_reads_them() {
    for args in [&["-v", "4"][..], &["-v=4"], &["-v4"], &["--v=4"], &["--v", "4"]] {
        assert_eq!(run(args).v, 4, "{args:?}");
    }
    assert!(error(&["-v"]).contains("needs a value"));
    assert!(error(&["-v=x"]).starts_with("--v: `x`"));
    assert!(error(&["-zap-encoder=json"]).contains("write --zap-encoder=json"));
    assert!(error(&["-x"]).contains("one dash"));
}

#[test]
fn the_last_wins_and_lists_grow() {
    let flags = run(&["--pool-name", "a", "--grpc-port=1", "--pool-name=b", "--grpc-port", "2"]);
    assert_eq!((flags.pool_name.as_str(), flags.grpc_port), ("b", 2));
    let flags = run(&["--endpoint-target-ports=1,2", "--endpoint-target-ports", "2,3"]);
    assert_eq!(flags.endpoint_target_ports, [1, 2, 3]);
    let flags = run(&["--endpoint=http://a:1", "--endpoint", "http://b:2,rank=1"]);
    assert_eq!(flags.engines.endpoints, ["http://a:1", "http://b:2,rank=1"]);
    let text = "plugins: [{type: queue-scorer}]\na: b=c";
    assert_eq!(run(&["--config-text", text]).config_text, text, "values may hold =");
    assert_eq!(run(&["--pool-name", "--odd"]).pool_name, "--odd", "as in pflag");
}

#[test]
fn what_is_no_flag_is_kept_and_said() {
    let flags = run(&["--secure-serving", "false", "--", "--unknown", "-x"]);
    assert!(flags.secure_serving);
    assert_eq!(flags.stray, ["false", "--unknown", "-x"]);
    assert_eq!(run(&["-"]).stray, ["-"]);
}

#[test]
fn mistakes_name_what_is_near() {
    let near = error(&["--endpoint-target-port=8000"]);
    assert!(near.contains("--endpoint-target-ports"), "{near}");
    assert!(error(&["--Pool-Name=x"]).contains("--pool-name"));
    assert!(error(&["--grpc_port=1"]).contains("--grpc-port"));
    for args in [&["--=x"][..], &["---v=1"]] {
        assert!(error(args).contains("no flag"), "{args:?}");
    }
    let long = "x".repeat(100_000);
    for text in [format!("--{long}"), format!("-{long}"), format!("--grpc-port={long}")] {
        assert!(error(&[&text]).len() < 500);
    }
    assert!(error(&["--lora-info-metric=x"]).contains("engineConfigs"));
    for name in ["total-queued-requests", "total-running-requests", "kv-cache-usage-percentage"] {
        assert!(error(&[&format!("--{name}-metric"), "x"]).contains("this flag is gone"));
    }
}

#[test]
fn help_is_asked_for_in_three_ways() {
    for args in [&["--help"][..], &["-h"], &["--pool-name", "x", "--help"]] {
        assert!(matches!(read(args), Ok(Asked::Help)), "{args:?}");
    }
    let text = help();
    for flag in all() {
        assert!(text.contains(&format!("  --{}", flag.name)), "{}", flag.name);
        assert!(flag.help.ends_with('.') && flag.help.len() <= 92, "{}", flag.help);
    }
    assert!(text.lines().all(|line| line.len() <= 100));
}
