use std::collections::BTreeSet;

use super::super::flags::tests::run;
use super::super::table::FLAGS;
use super::*;

fn nothing(_: &str) -> Option<String> {
    None
}

fn pod(name: &str) -> Option<String> {
    (name == "POD_NAME").then(|| "router-7d9f8c6b5-x2k4z".to_owned())
}

/// What a command line starts, line by line.
fn lines(args: &[&str]) -> Vec<String> {
    let (config, _) = router(&run(args), &pod).unwrap_or_else(|e| panic!("{args:?}: {e:#}"));
    format!("{config:#?}").lines().map(|line| line.trim().to_owned()).collect()
}

const LISTED: &[&str] = &["--admin=", "--endpoint=http://a:1"];
const POOL: &[&str] = &["--admin=", "--pool-name=p"];
const PODS: &[&str] = &["--admin=", "--endpoint-selector=a=b", "--endpoint-target-ports=8000"];
const CERT: &[&str] = &["--admin=", "--endpoint=http://a:1", "--cert-path=/d"];
const MONITOR: &[&str] = &["--admin=", "--endpoint=http://a:1", "--metrics-cert-dir=/m"];
const NAMES: &[&str] = &["--admin=", "--endpoint=http://a:1", "--upstream-metric-names"];
const EVENTS: &[&str] = &["--admin=", "--endpoint=http://a:1", "--kv-events-port=6"];

/// A flag, what stands before it, and part of a line that only it brings.
const WITH_EFFECT: [(&[&str], &str, &str); 35] = [
    (LISTED, "--grpc-port=7", ":7,"),
    (LISTED, "--grpc-max-recv-msg-size=1MiB", "ext_proc_message_bytes_max: 1048576"),
    (LISTED, "--drain-timeout=7s", "drain_timeout_s: 7,"),
    (LISTED, "--secure-serving=false", "certificate: Off"),
    (LISTED, "--cert-path=/d", r#"cert: "/d/tls.crt""#),
    (LISTED, "--cert-path=/d", r#"key: "/d/tls.key""#),
    (CERT, "--enable-cert-reload", "reload: true"),
    (LISTED, "--tls-min-version=VersionTLS13", "min_version: Tls13"),
    (LISTED, "--tls-cipher-suites=TLS_AES_128_GCM_SHA256", "number: 4865"),
    (LISTED, "--disable-endpoint-subset-filter", "ignore_subset_hints: true"),
    (LISTED, "--emit-endpoint-scores", "emit_scores: true"),
    (NAMES, "--pool-name=p", r#"pool: "p""#),
    (POOL, "--pool-namespace=n", "InferencePool n/p"),
    (NAMES, "--endpoint-selector=app=x", r#"pool: "router""#),
    (PODS, "--endpoint-target-ports=8001", "ports 8000, 8001"),
    (LISTED, "--config-text=plugins: [{type: queue-scorer}]", "queue-scorer"),
    (LISTED, "--refresh-metrics-interval=1s", "scrape_interval_ms: 1000,"),
    (LISTED, "--metrics-staleness-threshold=7s", "metrics_staleness_ms: 7000,"),
    (LISTED, "--grpc-health-port=7", ":7,"),
    (LISTED, "--metrics-port=7", ":7,"),
    (LISTED, "--metrics-endpoint-auth=false", "refused: None"),
    (LISTED, "--metrics-cert-dir=/m", r#"cert: "/m/tls.crt""#),
    (MONITOR, "--metrics-client-ca-file=/ca", r#""/ca""#),
    (MONITOR, "--metrics-client-ca-file=/ca", "refused: None"),
    (LISTED, "--enable-pprof=false", "says_no_profiles: false"),
    (NAMES, "--enable-grpc-stream-metrics", "streams: true"),
    (LISTED, "--endpoint=http://b:2", r#"host: "b""#),
    (LISTED, "--endpoints-file=f", r#""f""#),
    (LISTED, "--model=m", r#""m""#),
    (LISTED, "--kv-events-port=7", "events: 7"),
    (EVENTS, "--kv-replay-port=7", "7,"),
    (LISTED, "--admin=127.0.0.1:7", "127.0.0.1:7,"),
    (LISTED, "--endpoint-header", "endpoint_header: true"),
    (LISTED, "--upstream-metric-names", "UpstreamNames {"),
    (LISTED, "--seed=7", "seed: 7,"),
];

/// Those that change nothing of the router: the log's, and those that say that they do nothing.
const WITHOUT: [&str; 13] = [
    "--grpc-max-send-msg-size=1MiB",
    "--pool-group=x",
    "--ha-enable-leader-election",
    "--refresh-prometheus-metrics-interval=1s",
    "--health-checking",
    "--v=4",
    "--zap-log-level=warn",
    "--zap-encoder=console",
    "--zap-devel",
    "--zap-stacktrace-level=info",
    "--zap-time-encoding=epoch",
    "--tracing=false",
    "--enable-pprof=true",
];

/// Flags that tests of their own show.
const ELSEWHERE: [&str; 3] = ["config-file", "allow-experimental-plugins", "tokenizer"];

#[test]
fn every_flag_reaches_the_router() {
    for (before, flag, expected) in WITH_EFFECT {
        let usual = lines(before);
        let changed = lines(&[before, &[flag]].concat());
        let new: Vec<&String> = changed.iter().filter(|line| !usual.contains(line)).collect();
        // A line that stands twice is new where it stands more often.
        let more = |line: &&String| {
            let count = |lines: &[String]| lines.iter().filter(|other| other == line).count();
            count(&changed) > count(&usual)
        };
        let found = changed.iter().filter(more).any(|line| line.contains(expected));
        assert!(found, "{flag} does not bring `{expected}` but {new:#?}");
    }
    for flag in WITHOUT {
        assert_eq!(lines(&[LISTED, &[flag]].concat()), lines(LISTED), "{flag}");
    }
    let shown = WITH_EFFECT.iter().map(|(_, flag, _)| *flag).chain(WITHOUT);
    let shown = shown.filter_map(|flag| flag.strip_prefix("--"));
    let shown: BTreeSet<&str> = shown.filter_map(|flag| flag.split('=').next()).collect();
    let groups = FLAGS.iter().filter(|(group, _)| !group.starts_with("Removed"));
    let names = groups.flat_map(|(_, flags)| *flags).map(|flag| flag.name);
    let rest: Vec<&str> =
        names.filter(|name| !shown.contains(name) && !ELSEWHERE.contains(name)).collect();
    assert_eq!(rest, Vec::<&str>::new(), "flags that no row shows");
}

#[test]
fn files_are_read_as_text_is() {
    let dir = std::env::temp_dir().join(format!("kvroute-resolve-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("c.yaml");
    let text = "plugins: [{type: queue-scorer}]";
    std::fs::write(&file, text).unwrap();
    let flag = format!("--config-file={}", file.display());
    let of_text = format!("--config-text={text}");
    assert_eq!(lines(&[LISTED, &[&flag]].concat()), lines(&[LISTED, &[&of_text]].concat()));
    let _ = std::fs::remove_dir_all(&dir);
    for (name, expected) in [("/dev/zero", "limit"), ("/not/there", "cannot read it")] {
        let flags = run(&[LISTED, &[&format!("--config-file={name}")]].concat());
        let error = format!("{:#}", router(&flags, &nothing).unwrap_err());
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    let flags = run(&[LISTED, &["--tokenizer=m=/not/there.json"]].concat());
    let error = format!("{:#}", router(&flags, &nothing).unwrap_err());
    assert!(error.contains("--tokenizer m=/not/there.json"), "{error}");
}

#[test]
fn experimental_plugins_are_refused_unless_wanted() {
    let text = "--config-text=plugins: [{type: session-affinity-scorer}]";
    let refused = router(&run(&[LISTED, &[text]].concat()), &nothing);
    assert!(refused.is_err_and(|e| format!("{e:#}").contains("--allow-experimental-plugins")));
    let taken = run(&[LISTED, &[text, "--allow-experimental-plugins"]].concat());
    assert!(router(&taken, &nothing).is_ok());
}

#[test]
fn the_usual_admin_address_may_be_taken_and_one_that_is_asked_for_may_not() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut flags = run(&[&format!("--admin={address}")]);
    assert_eq!(admin(&flags).unwrap(), Some(address));
    flags.given.clear();
    assert_eq!(admin(&flags).unwrap(), None);
    drop(taken);
    assert_eq!(admin(&flags).unwrap(), Some(address));
    assert_eq!(admin(&run(&["--admin="])).unwrap(), None);
    assert!(admin(&run(&["--admin=x"])).unwrap_err().to_string().contains("--admin"));
}
