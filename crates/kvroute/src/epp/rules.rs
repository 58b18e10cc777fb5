//! Do the flags fit together, which of them mean nothing here, and where do endpoints come from?

use std::time::Duration;

use kvroute_core::plan::Plan;

use super::flags::{EppFlags, POOL_GROUP};

/// Ports of one pod, as InferencePools have them.
const TARGET_PORTS_MAX: usize = 8;
/// llm-d reads metrics no more often.
const REFRESH_MIN: Duration = Duration::from_millis(50);
/// Settings count milliseconds in 32 bits.
const MILLIS_MAX: u128 = u32::MAX as u128;

/// An environment variable, if it is set and not empty.
pub(super) type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What the router is to serve, in words for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fleet {
    /// Endpoints are listed by flags or a file.
    Listed,
    /// They are to be found in Kubernetes: the pool, or the pods of a selector.
    Watched(String),
}

/// What can be said before the configuration is read, as llm-d says it.
///
/// # Errors
/// Flags that exclude each other, miss each other, or miss what Kubernetes sets.
pub(super) fn check(flags: &EppFlags, env: Env<'_>) -> Result<(), String> {
    if !flags.pool_name.is_empty() && flags.endpoint_selector.is_some() {
        return Err("--pool-name and --endpoint-selector exclude each other; give one".to_owned());
    }
    if flags.endpoint_selector.is_some() {
        let ports = flags.endpoint_target_ports.len();
        if ports == 0 || ports > TARGET_PORTS_MAX {
            return Err(format!(
                "--endpoint-target-ports: --endpoint-selector needs 1 to {TARGET_PORTS_MAX} \
                 ports, and {ports} are given"
            ));
        }
        let pod = env("POD_NAME").unwrap_or_default();
        if deployment(&pod).is_none() {
            return Err(format!(
                "--endpoint-selector takes the pool's name from the environment variable \
                 POD_NAME, which must be that of a Deployment's pod, NAME-HASH-ID; it is `{pod}`"
            ));
        }
    }
    if flags.config_file.is_some() && !flags.config_text.is_empty() {
        return Err("--config-file and --config-text exclude each other; give one".to_owned());
    }
    let configured = flags.config_file.is_some() || !flags.config_text.is_empty();
    if !configured && !is_kubernetes(flags) && !is_listed(flags) {
        return Err(nothing_to_serve());
    }
    check_metrics_tls(flags)?;
    check_durations(flags)?;
    match (flags.engines.kv_replay_port, flags.engines.kv_events_port) {
        (Some(_), None) => Err("--kv-replay-port needs --kv-events-port".to_owned()),
        _ => Ok(()),
    }
}

fn check_metrics_tls(flags: &EppFlags) -> Result<(), String> {
    let (dir, authority) = (&flags.metrics_cert_dir, &flags.metrics_client_ca_file);
    if dir.is_empty() && !authority.is_empty() {
        return Err("--metrics-client-ca-file needs --metrics-cert-dir".to_owned());
    }
    if !dir.is_empty() && authority.is_empty() && !flags.metrics_endpoint_auth {
        return Err("--metrics-cert-dir with --metrics-endpoint-auth=false shows metrics to \
                    nobody that is known: give --metrics-client-ca-file, too, or leave \
                    --metrics-cert-dir out"
            .to_owned());
    }
    Ok(())
}

fn check_durations(flags: &EppFlags) -> Result<(), String> {
    let drain = flags.drain_timeout.map(|d| ("drain-timeout", d));
    let refresh = flags.refresh_metrics_interval.map(|d| ("refresh-metrics-interval", d));
    let stale = flags.metrics_staleness_threshold.map(|d| ("metrics-staleness-threshold", d));
    for (name, duration) in [drain, refresh, stale].into_iter().flatten() {
        if duration.as_millis() > MILLIS_MAX {
            return Err(format!("--{name}: {duration:?} is too long; at most 49 days"));
        }
    }
    match flags.metrics_staleness_threshold {
        Some(threshold) if threshold < Duration::from_millis(1) => {
            Err("--metrics-staleness-threshold: less than 1ms makes all metrics stale".to_owned())
        }
        _ => Ok(()),
    }
}

/// Where endpoints come from, once the plan is known.
///
/// # Errors
/// From nowhere.
pub(super) fn fleet(flags: &EppFlags, env: Env<'_>, plan: &Plan) -> Result<Fleet, String> {
    if is_listed(flags) || plan.collect.discovery.is_some() {
        return Ok(Fleet::Listed);
    }
    if !is_kubernetes(flags) {
        return Err(nothing_to_serve());
    }
    let namespace = namespace(flags, env);
    Ok(Fleet::Watched(match flags.endpoint_selector {
        None => format!("InferencePool {namespace}/{}", flags.pool_name),
        Some(_) => {
            let ports: Vec<String> =
                flags.endpoint_target_ports.iter().map(u16::to_string).collect();
            let plural = if ports.len() == 1 { "" } else { "s" };
            let ports = ports.join(", ");
            format!("pods of --endpoint-selector in namespace {namespace}, port{plural} {ports}")
        }
    }))
}

/// Whether nobody may read metrics: who may is for Kubernetes to say, and no certificate of a
/// reader stands for that.
pub(super) fn is_refused(flags: &EppFlags) -> bool {
    flags.metrics_endpoint_auth && flags.metrics_client_ca_file.is_empty()
}

fn is_listed(flags: &EppFlags) -> bool {
    !flags.engines.endpoints.is_empty() || flags.engines.endpoints_file.is_some()
}

fn is_kubernetes(flags: &EppFlags) -> bool {
    !flags.pool_name.is_empty() || flags.endpoint_selector.is_some()
}

fn nothing_to_serve() -> String {
    "nothing to serve: give --pool-name or --endpoint-selector, or list endpoints (--endpoint URL, \
     --endpoints-file FILE, or a file-discovery plugin in dataLayer.discovery of the configuration)"
        .to_owned()
}

/// The pool's namespace: the flag, else where the pod runs.
pub(super) fn namespace(flags: &EppFlags, env: Env<'_>) -> String {
    let given = Some(flags.pool_namespace.clone()).filter(|name| !name.is_empty());
    given.or_else(|| env("NAMESPACE")).unwrap_or_else(|| "default".to_owned())
}

/// The pool's name: the flag, else that of the Deployment, else llm-d's for fleets from files.
pub(super) fn pool_name(flags: &EppFlags, env: Env<'_>) -> String {
    if !flags.pool_name.is_empty() {
        return flags.pool_name.clone();
    }
    let pod = flags.endpoint_selector.as_ref().and_then(|_| env("POD_NAME"));
    pod.as_deref().and_then(deployment).unwrap_or("epp").to_owned()
}

/// The Deployment in the name of one of its pods: `^(.+)-[a-z0-9]+-[a-z0-9]+$`.
fn deployment(pod: &str) -> Option<&str> {
    let mut parts = pod.rsplitn(3, '-');
    let plain = |part: &&str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    parts.next().filter(plain)?;
    parts.next().filter(plain)?;
    parts.next().filter(|name| !name.is_empty() && !name.contains('\n'))
}

/// The interval between readings that holds.
pub(super) fn refresh_interval(flags: &EppFlags) -> Option<Duration> {
    flags.refresh_metrics_interval.map(|interval| interval.max(REFRESH_MIN))
}

/// What was asked for and is not done, or done otherwise; one line each.
pub(super) fn remarks(flags: &EppFlags, env: Env<'_>, fleet: &Fleet) -> Vec<String> {
    let mut remarks = Vec::new();
    if !flags.stray.is_empty() {
        remarks.push(format!(
            "Arguments that are no flags are ignored, as llm-d does: {}. A boolean is written \
             --name=false.",
            flags.stray.join(" ")
        ));
    }
    if *fleet == Fleet::Listed && is_kubernetes(flags) {
        remarks.push(
            "Endpoints are listed by flags or a file; Kubernetes is not asked for more.".to_owned(),
        );
    }
    if flags.pool_group != POOL_GROUP {
        remarks
            .push(format!("--pool-group {} is not known; only {POOL_GROUP} is.", flags.pool_group));
    }
    if flags.refresh_metrics_interval.is_some_and(|interval| interval < REFRESH_MIN) {
        remarks
            .push(format!("--refresh-metrics-interval is raised to {REFRESH_MIN:?}, the least."));
    }
    if is_refused(flags) {
        remarks.push(
            "GET /metrics is refused (401) on the metrics port: --metrics-endpoint-auth needs \
             Kubernetes to say who may read, which this version does not ask. \
             --metrics-endpoint-auth=false opens it; so does --metrics-client-ca-file, to who has \
             a certificate."
                .to_owned(),
        );
    }
    let idle = without_effect(flags, env).into_iter().filter(|(holds, ..)| *holds);
    remarks.extend(idle.map(|(_, what, why)| format!("{what} has no effect: {why}.")));
    remarks
}

/// Whether something is asked for that has no effect, what it is, and why.
fn without_effect(flags: &EppFlags, env: Env<'_>) -> Vec<(bool, &'static str, &'static str)> {
    let given = |name: &str| flags.given.contains(name);
    let time = &flags.zap_time_encoding;
    let of_tls = [
        ("cert-path", "--cert-path"),
        ("tls-min-version", "--tls-min-version"),
        ("tls-cipher-suites", "--tls-cipher-suites"),
    ]
    .map(|(name, flag)| {
        (!flags.secure_serving && given(name), flag, "--secure-serving=false turns TLS off")
    });
    let others = [
        (
            flags.ha_enable_leader_election,
            "--ha-enable-leader-election",
            "this version has no lease; every replica is ready and routes by what it has seen",
        ),
        (
            given("tracing") && flags.tracing,
            "--tracing",
            "this version sends no spans; decisions are at the admin address, /decisions",
        ),
        (
            given("refresh-prometheus-metrics-interval"),
            "--refresh-prometheus-metrics-interval",
            "metrics are computed when they are read",
        ),
        (
            given("grpc-max-send-msg-size"),
            "--grpc-max-send-msg-size",
            "bodies are sent in pieces of at most 62,000 bytes",
        ),
        (
            given("health-checking") && !flags.health_checking,
            "--health-checking=false",
            "health is served on ext_proc's port in any case",
        ),
        (
            given("enable-pprof") && flags.enable_pprof,
            "--enable-pprof",
            "there are no Go profiles here; use perf, or /metrics",
        ),
        (given("zap-stacktrace-level"), "--zap-stacktrace-level", "log lines have no stack traces"),
        (
            given("zap-time-encoding") && !time.starts_with("rfc3339"),
            "--zap-time-encoding",
            "times of log lines are RFC 3339",
        ),
        (
            flags.enable_cert_reload && (flags.cert_path.is_empty() || !flags.secure_serving),
            "--enable-cert-reload",
            "ext_proc has no certificate from files; that is --secure-serving with --cert-path",
        ),
        (
            flags.enable_grpc_stream_metrics && !flags.upstream_metric_names,
            "--enable-grpc-stream-metrics",
            "these are names of llm-d, so give --upstream-metric-names, too",
        ),
        (
            env("PREDICTION_SERVER_URL").or_else(|| env("TRAINING_SERVER_URL")).is_some(),
            "PREDICTION_SERVER_URL or TRAINING_SERVER_URL",
            "kvroute predicts latencies itself",
        ),
    ];
    others.into_iter().chain(of_tls).collect()
}

/// What it means that a fleet is to be found in Kubernetes, which this version does not watch.
pub(super) fn unwatched(what: &str) -> String {
    format!(
        "this version does not watch Kubernetes, so {what} gives no endpoints: it is not ready, \
         and every request is refused with 503 (rejected-no-endpoints). List the engines instead: \
         --endpoint URL, --endpoints-file FILE, or a file-discovery plugin in dataLayer.discovery"
    )
}

#[cfg(test)]
mod tests;
