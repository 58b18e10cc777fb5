use kvroute_core::plan::Experimental;

use super::super::flags::tests::run;
use super::*;
use crate::config::load_text;

const POD: &str = "llm-router-epp-7d9f8c6b5-x2k4z";

fn env(name: &str) -> Option<String> {
    match name {
        "POD_NAME" => Some(POD.to_owned()),
        "NAMESPACE" => Some("models".to_owned()),
        _ => None,
    }
}

fn nothing(_: &str) -> Option<String> {
    None
}

#[test]
fn flags_that_do_not_fit_together_are_errors() {
    let selector = "--endpoint-selector=app=vllm";
    let (pool, ports) = ("--pool-name=p", "--endpoint-target-ports=8000");
    let nine = "--endpoint-target-ports=1,2,3,4,5,6,7,8,9";
    let table: [(&[&str], &str); 18] = [
        (&[pool], ""),
        (&[selector, ports], ""),
        (&["--endpoint=http://a:1"], ""),
        (&["--endpoints-file=f"], ""),
        (&["--config-file=c"], ""),
        (&["--pool-name=", "--config-text=x"], ""),
        (&[], "nothing to serve"),
        (&["--pool-name="], "nothing to serve"),
        (&[pool, selector, ports], "exclude each other"),
        (&[pool, selector, "--config-file=not-there"], "--pool-name and --endpoint-selector"),
        (&[selector], "0 are given"),
        (&[selector, nine], "9 are given"),
        (&[selector, nine, "--endpoint-selector="], "nothing to serve"),
        (&[pool, "--config-file=c", "--config-text=x"], "--config-file and --config-text"),
        (&[pool, "--metrics-client-ca-file=ca"], "needs --metrics-cert-dir"),
        (
            &[pool, "--metrics-cert-dir=d", "--metrics-endpoint-auth=false"],
            "shows metrics to nobody",
        ),
        (&[pool, "--kv-replay-port=1"], "--kv-events-port"),
        (&[pool, "--metrics-staleness-threshold=0"], "--metrics-staleness-threshold"),
    ];
    for (args, expected) in table {
        match check(&run(args), &env) {
            Ok(()) => assert_eq!(expected, "", "{args:?}"),
            Err(error) => {
                assert!(!expected.is_empty() && error.contains(expected), "{args:?}: {error}");
            }
        }
    }
    let mtls = ["--metrics-client-ca-file=ca", "--metrics-endpoint-auth=false"];
    assert_eq!(check(&run(&[pool, "--metrics-cert-dir=d", mtls[0], mtls[1]]), &env), Ok(()));
    let long = check(&run(&[pool, "--drain-timeout=1200h"]), &env).unwrap_err();
    assert!(long.contains("--drain-timeout"), "{long}");
    assert!(check(&run(&[selector, ports]), &nothing).unwrap_err().contains("POD_NAME"));
}

#[test]
fn the_pool_is_named_by_flag_deployment_or_as_llm_d_does() {
    let table = [
        (POD, Some("llm-router-epp")),
        ("a-b1-c2", Some("a")),
        ("a-b-c-d-e", Some("a-b-c")),
        ("-b-c", None),
        ("a-b", None),
        ("a--c", None),
        ("a-B-c", None),
        ("", None),
    ];
    for (pod, expected) in table {
        assert_eq!(deployment(pod), expected, "{pod}");
    }
    let selector = ["--endpoint-selector=a=b", "--endpoint-target-ports=1"];
    assert_eq!(pool_name(&run(&["--pool-name=p"]), &env), "p");
    assert_eq!(pool_name(&run(&selector), &env), "llm-router-epp");
    assert_eq!(pool_name(&run(&["--endpoint=a:1"]), &env), "epp");
    assert_eq!(namespace(&run(&["--pool-namespace=x"]), &env), "x");
    assert_eq!(namespace(&run(&["--pool-namespace="]), &env), "models");
    assert_eq!(namespace(&run(&[]), &nothing), "default");
}

#[test]
fn endpoints_come_from_lists_before_kubernetes() {
    let plan = |text: &str| load_text(text, "c.yaml", Experimental::Refused).unwrap();
    let plain = plan("plugins: [{type: queue-scorer}]");
    let listing = plan(
        "plugins: [{type: file-discovery, name: f, parameters: {path: e.yaml}}]\n\
         dataLayer: {discovery: {pluginRef: f}}",
    );
    let of = |args: &[&str], plan: &Plan| fleet(&run(args), &env, plan);
    assert_eq!(of(&["--pool-name=p"], &listing), Ok(Fleet::Listed));
    assert_eq!(of(&["--config-file=c"], &listing), Ok(Fleet::Listed));
    assert_eq!(of(&["--pool-name=p", "--endpoint=a:1"], &plain), Ok(Fleet::Listed));
    let pool = Fleet::Watched("InferencePool models/p".to_owned());
    assert_eq!(of(&["--pool-name=p"], &plain), Ok(pool));
    let selector = ["--endpoint-selector=app=vllm", "--endpoint-target-ports=8000,8001"];
    let Ok(Fleet::Watched(pods)) = of(&selector, &plain) else { panic!("not watched") };
    assert!(pods.contains("models, ports 8000, 8001"), "{pods}");
    assert!(of(&["--config-file=c"], &plain).unwrap_err().contains("nothing to serve"));
}

/// Which flag has a remark of its own, by what it begins with.
#[test]
fn what_is_asked_for_and_not_done_is_said() {
    let open = "--metrics-endpoint-auth=false";
    let table: [(&[&str], &str); 24] = [
        (&[], ""),
        (&["--tracing=false", "--health-checking", "--enable-pprof=false"], ""),
        (&["--zap-time-encoding=rfc3339nano", "--refresh-metrics-interval=50ms"], ""),
        (&["--enable-cert-reload", "--cert-path=d"], ""),
        (&["--pool-group=inference.networking.k8s.io"], ""),
        (&["--secure-serving", "false"], "Arguments that are no flags"),
        (&["--pool-name=p"], "Endpoints are listed"),
        (&["--pool-group=x"], "--pool-group x"),
        (&["--ha-enable-leader-election"], "--ha-enable-leader-election"),
        (&["--refresh-metrics-interval=10ms"], "--refresh-metrics-interval is raised to 50ms"),
        (&["--tracing"], "--tracing has no effect"),
        (&["--refresh-prometheus-metrics-interval=1s"], "--refresh-prometheus"),
        (&["--grpc-max-send-msg-size=1MB"], "--grpc-max-send-msg-size"),
        (&["--health-checking=false"], "--health-checking=false"),
        (&["--enable-pprof"], "--enable-pprof"),
        (&["--zap-stacktrace-level=info"], "--zap-stacktrace-level"),
        (&["--zap-time-encoding=epoch"], "--zap-time-encoding"),
        (&["--enable-cert-reload"], "--enable-cert-reload"),
        (&["--secure-serving=false", "--cert-path=d"], "--cert-path has no effect"),
        (&["--secure-serving=false", "--tls-min-version=VersionTLS13"], "--tls-min-version"),
        (&["--secure-serving=false", "--tls-cipher-suites="], "--tls-cipher-suites"),
        (&["--secure-serving=false", "--enable-cert-reload"], "--enable-cert-reload"),
        (&["--enable-grpc-stream-metrics"], "--enable-grpc-stream-metrics"),
        (&["--metrics-endpoint-auth"], "GET /metrics is refused"),
    ];
    for (args, expected) in table {
        let args: Vec<&str> = [open].iter().chain(args).copied().collect();
        let remarks = remarks(&run(&args), &env, &Fleet::Listed);
        match expected {
            "" => assert_eq!(remarks, Vec::<String>::new(), "{args:?}"),
            _ => assert!(remarks.len() == 1 && remarks[0].starts_with(expected), "{remarks:?}"),
        }
    }
    let mtls = ["--metrics-cert-dir=d", "--metrics-client-ca-file=ca"];
    assert_eq!(remarks(&run(&mtls), &env, &Fleet::Listed), Vec::<String>::new());
    let predicts = |name: &str| (name == "PREDICTION_SERVER_URL").then(|| "http://x".to_owned());
    assert!(remarks(&run(&[open]), &predicts, &Fleet::Listed)[0].starts_with("PREDICTION"));
}

#[test]
fn metrics_are_read_no_more_often_than_llm_d_reads_them() {
    let of = |text: &str| refresh_interval(&run(&["--refresh-metrics-interval", text]));
    assert_eq!(of("1ms"), Some(Duration::from_millis(50)));
    assert_eq!(of("0"), Some(Duration::from_millis(50)));
    assert_eq!(of("1s"), Some(Duration::from_secs(1)));
    assert_eq!(refresh_interval(&run(&[])), None);
}
