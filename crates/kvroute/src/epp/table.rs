//! Which flags does `kvroute epp` know? One table; parser, help and docs/epp.md follow from it.

use kvroute_router::{CipherSuite, TlsVersion};

use super::flags::{EppFlags, Flag, Set};
use super::values::{boolean, count, duration, one_of, port, ports, remote_port, seed, size};

const LEVELS: [&str; 5] = ["debug", "info", "warn", "error", "panic"];
const STACK_LEVELS: [&str; 4] = ["info", "warn", "error", "panic"];
const TIMES: [&str; 6] = ["epoch", "millis", "nano", "iso8601", "rfc3339", "rfc3339nano"];

/// All flags, in groups.
pub const FLAGS: [(&str, &[Flag]); 8] = [
    ("ext_proc, where Envoy connects", SERVING),
    ("Endpoints", ENDPOINTS),
    ("Configuration", CONFIGURATION),
    ("Reading engines' metrics", READING),
    ("Metrics and health", MONITORING),
    ("Logging", LOGGING),
    ("kvroute's own", OWN),
    ("Removed by llm-d (an error when given)", REMOVED),
];

const fn valued(
    name: &'static str,
    value: &'static str,
    default: &'static str,
    set: Set,
    help: &'static str,
) -> Flag {
    Flag { name, value, default, help, set }
}

const fn switch(name: &'static str, default: &'static str, set: Set, help: &'static str) -> Flag {
    Flag { name, value: "", default, help, set }
}

fn put<T>(slot: &mut T, value: Result<T, String>) -> Result<(), String> {
    *slot = value?;
    Ok(())
}

fn text(slot: &mut String, value: &str) -> Result<(), String> {
    value.clone_into(slot);
    Ok(())
}

fn optional_text(slot: &mut Option<String>, value: &str) -> Result<(), String> {
    *slot = Some(value.to_owned()).filter(|value| !value.is_empty());
    Ok(())
}

fn push(list: &mut Vec<String>, value: &str) -> Result<(), String> {
    list.push(value.to_owned());
    Ok(())
}

fn removed(_: &mut EppFlags, _: &str) -> Result<(), String> {
    Err("this flag is gone; names of metrics stand in the configuration, in engineConfigs of the \
         core-metrics-extractor"
        .to_owned())
}

const SERVING: &[Flag] = &[
    valued("grpc-port", "PORT", "9002", |f, v| put(&mut f.grpc_port, port(v)), "Port of ext_proc."),
    valued(
        "grpc-max-recv-msg-size",
        "SIZE",
        "4MiB",
        |f, v| put(&mut f.grpc_max_recv_msg_size, size(v)),
        "Largest message that is read, such as 10MiB or 25MB.",
    ),
    valued(
        "grpc-max-send-msg-size",
        "SIZE",
        "",
        |f, v| put(&mut f.grpc_max_send_msg_size, size(v)),
        "No effect: bodies are sent in pieces of at most 62,000 bytes.",
    ),
    valued(
        "drain-timeout",
        "DURATION",
        "30s",
        |f, v| put(&mut f.drain_timeout, duration(v).map(Some)),
        "After SIGTERM ext_proc goes on so long, not ready. Before kvroute.drain_timeout_s.",
    ),
    switch(
        "secure-serving",
        "true",
        |f, v| put(&mut f.secure_serving, boolean(v)),
        "TLS on ext_proc's port, self-signed unless --cert-path is given.",
    ),
    valued(
        "cert-path",
        "DIR",
        "",
        |f, v| text(&mut f.cert_path, v),
        "Folder with tls.crt and tls.key.",
    ),
    switch(
        "enable-cert-reload",
        "false",
        |f, v| put(&mut f.enable_cert_reload, boolean(v)),
        "Read --cert-path again when its files change.",
    ),
    valued(
        "tls-min-version",
        "VERSION",
        "",
        |f, v| {
            let parsed = || v.parse().map_err(|_| "write VersionTLS12 or VersionTLS13".to_owned());
            put(
                &mut f.tls_min_version,
                if v.is_empty() { Ok(TlsVersion::default()) } else { parsed() },
            )
        },
        "VersionTLS12 or VersionTLS13. VersionTLS10 and 11 mean TLS 1.2.",
    ),
    valued(
        "tls-cipher-suites",
        "NAMES",
        "",
        |f, v| {
            for name in v.split(',').map(str::trim).filter(|name| !name.is_empty()) {
                let parsed: Result<CipherSuite, _> = name.parse();
                f.tls_cipher_suites.push(parsed.map_err(|error| error.to_string())?);
            }
            Ok(())
        },
        "Cipher suites of TLS 1.2 by their Go names, between commas.",
    ),
    switch(
        "disable-endpoint-subset-filter",
        "false",
        |f, v| put(&mut f.disable_endpoint_subset_filter, boolean(v)),
        "Do not heed the data plane's list of allowed endpoints.",
    ),
    switch(
        "emit-endpoint-scores",
        "false",
        |f, v| put(&mut f.emit_endpoint_scores, boolean(v)),
        "Tell Envoy every candidate's score, in dynamic metadata.",
    ),
];

const ENDPOINTS: &[Flag] = &[
    valued(
        "pool-name",
        "NAME",
        "",
        |f, v| text(&mut f.pool_name, v),
        "InferencePool to serve. Not watched in this version: list endpoints yourself.",
    ),
    valued(
        "pool-namespace",
        "NAME",
        "$NAMESPACE, else default",
        |f, v| text(&mut f.pool_namespace, v),
        "Its namespace.",
    ),
    valued(
        "pool-group",
        "GROUP",
        "inference.networking.k8s.io",
        |f, v| text(&mut f.pool_group, v),
        "Its API group.",
    ),
    valued(
        "endpoint-selector",
        "SELECTOR",
        "",
        |f, v| {
            let parsed = || v.parse().map(Some);
            put(&mut f.endpoint_selector, if v.is_empty() { Ok(None) } else { parsed() })
        },
        "Labels of pods to serve in place of a pool: app=vllm,tier in (a,b),!canary. Not watched.",
    ),
    valued(
        "endpoint-target-ports",
        "PORTS",
        "",
        |f, v| ports(&mut f.endpoint_target_ports, v),
        "With --endpoint-selector: 1 to 8 ports of each pod, between commas.",
    ),
    switch(
        "ha-enable-leader-election",
        "false",
        |f, v| put(&mut f.ha_enable_leader_election, boolean(v)),
        "No effect in this version: every replica is ready, and routes by itself.",
    ),
];

const CONFIGURATION: &[Flag] = &[
    valued(
        "config-file",
        "FILE",
        "",
        |f, v| {
            f.config_file = Some(v.into()).filter(|_| !v.is_empty());
            Ok(())
        },
        "EndpointPickerConfig; without it kvroute's own policy.",
    ),
    valued(
        "config-text",
        "YAML",
        "",
        |f, v| text(&mut f.config_text, v),
        "The same as text, in place of a file.",
    ),
    switch(
        "allow-experimental-plugins",
        "false",
        |f, v| put(&mut f.allow_experimental_plugins, boolean(v)),
        "Accept plugin types of stability Alpha.",
    ),
];

const READING: &[Flag] = &[
    valued(
        "refresh-metrics-interval",
        "DURATION",
        "50ms",
        |f, v| put(&mut f.refresh_metrics_interval, duration(v).map(Some)),
        "Between two readings of an engine, at least 50ms. Before kvroute.scrape_interval_ms.",
    ),
    valued(
        "metrics-staleness-threshold",
        "DURATION",
        "2s",
        |f, v| put(&mut f.metrics_staleness_threshold, duration(v).map(Some)),
        "Older metrics count as missing. Before kvroute.metrics_staleness_ms.",
    ),
    valued(
        "refresh-prometheus-metrics-interval",
        "DURATION",
        "5s",
        |f, v| put(&mut f.refresh_prometheus_metrics_interval, duration(v)),
        "No effect: metrics are computed when they are read.",
    ),
];

const MONITORING: &[Flag] = &[
    valued(
        "grpc-health-port",
        "PORT",
        "9003",
        |f, v| put(&mut f.grpc_health_port, port(v)),
        "Port of gRPC health, without TLS.",
    ),
    switch(
        "health-checking",
        "false",
        |f, v| put(&mut f.health_checking, boolean(v)),
        "No effect: health is served on ext_proc's port in any case.",
    ),
    valued(
        "metrics-port",
        "PORT",
        "9090",
        |f, v| put(&mut f.metrics_port, port(v)),
        "Port of /metrics, /healthz and /readyz.",
    ),
    switch(
        "metrics-endpoint-auth",
        "true",
        |f, v| put(&mut f.metrics_endpoint_auth, boolean(v)),
        "Ask Kubernetes who may read /metrics. This version cannot, so nobody may.",
    ),
    valued(
        "metrics-cert-dir",
        "DIR",
        "",
        |f, v| text(&mut f.metrics_cert_dir, v),
        "Folder with tls.crt and tls.key: TLS on the metrics port.",
    ),
    valued(
        "metrics-client-ca-file",
        "FILE",
        "",
        |f, v| text(&mut f.metrics_client_ca_file, v),
        "With --metrics-cert-dir: the metrics port is for who has a certificate of this authority.",
    ),
    switch(
        "enable-pprof",
        "true",
        |f, v| put(&mut f.enable_pprof, boolean(v)),
        "/debug/pprof says what to use for Go's profiles (501); off: no such path.",
    ),
    switch(
        "enable-grpc-stream-metrics",
        "false",
        |f, v| put(&mut f.enable_grpc_stream_metrics, boolean(v)),
        "With --upstream-metric-names: metrics of ext_proc's streams.",
    ),
];

const LOGGING: &[Flag] = &[
    valued(
        "v",
        "N",
        "2",
        |f, v| put(&mut f.v, count(v)),
        "Up to 2: info; 3: debug of kvroute; 4: debug of everything; 5: trace. Also -v N.",
    ),
    valued(
        "zap-log-level",
        "LEVEL",
        "",
        |f, v| {
            let level = match count(v) {
                Ok(number) if number > 0 => Ok(v.to_owned()),
                _ => one_of(&LEVELS, v).map_err(|valid| format!("{valid}, or a number above 0")),
            };
            put(&mut f.zap_log_level, level)
        },
        "debug, info, warn, error, panic, or a number as -v; goes before -v.",
    ),
    valued(
        "zap-encoder",
        "FORMAT",
        "json",
        |f, v| put(&mut f.zap_encoder, one_of(&["json", "console"], v)),
        "json or console.",
    ),
    switch(
        "zap-devel",
        "false",
        |f, v| put(&mut f.zap_devel, boolean(v)),
        "console and debug, where nothing else is said.",
    ),
    valued(
        "zap-stacktrace-level",
        "LEVEL",
        "",
        |f, v| put(&mut f.zap_stacktrace_level, one_of(&STACK_LEVELS, v)),
        "No effect: log lines have no stack traces.",
    ),
    valued(
        "zap-time-encoding",
        "FORMAT",
        "rfc3339",
        |f, v| put(&mut f.zap_time_encoding, one_of(&TIMES, v)),
        "No effect: times of log lines are RFC 3339.",
    ),
    switch(
        "tracing",
        "true",
        |f, v| put(&mut f.tracing, boolean(v)),
        "No effect in this version: no spans are sent.",
    ),
];

const OWN: &[Flag] = &[
    valued(
        "endpoint",
        "URL",
        "",
        |f, v| push(&mut f.engines.endpoints, v),
        "An engine's base URL, as of `kvroute serve`. Repeat for more.",
    ),
    valued(
        "endpoints-file",
        "FILE",
        "",
        |f, v| {
            f.engines.endpoints_file = Some(v.into()).filter(|_| !v.is_empty());
            Ok(())
        },
        "Endpoints from a file (llm-d's file-discovery format), read again when it changes.",
    ),
    valued(
        "tokenizer",
        "[MODEL=]FILE",
        "",
        |f, v| push(&mut f.engines.tokenizers, v),
        "tokenizer.json of a model. Without it prompts are estimated. Repeat for more models.",
    ),
    valued(
        "model",
        "NAME",
        "",
        |f, v| optional_text(&mut f.engines.model, v),
        "Model that requests without a `model` field mean.",
    ),
    valued(
        "kv-events-port",
        "PORT",
        "",
        |f, v| put(&mut f.engines.kv_events_port, remote_port(v).map(Some)),
        "First KV event port of every engine (rank N: port + N).",
    ),
    valued(
        "kv-replay-port",
        "PORT",
        "",
        |f, v| put(&mut f.engines.kv_replay_port, remote_port(v).map(Some)),
        "First replay port of every engine, with --kv-events-port.",
    ),
    valued(
        "admin",
        "ADDR",
        "127.0.0.1:9091",
        |f, v| text(&mut f.admin, v),
        "The full admin page: decisions, index, explain. Keep it on loopback. --admin= is none.",
    ),
    switch(
        "endpoint-header",
        "false",
        |f, v| put(&mut f.endpoint_header, boolean(v)),
        "Tell clients which endpoint answered: x-kvroute-endpoint. Its address is the pod's.",
    ),
    switch(
        "upstream-metric-names",
        "false",
        |f, v| put(&mut f.upstream_metric_names, boolean(v)),
        "Also llm-d's names of metrics (llm_d_epp_*), for its dashboards.",
    ),
    valued("seed", "N", "0", |f, v| put(&mut f.seed, seed(v)), "Seed of tie-breaks."),
];

const REMOVED: &[Flag] = &[
    valued("total-queued-requests-metric", "NAME", "", removed, "Waiting requests."),
    valued("total-running-requests-metric", "NAME", "", removed, "Running requests."),
    valued("kv-cache-usage-percentage-metric", "NAME", "", removed, "Use of the KV cache."),
    valued("lora-info-metric", "NAME", "", removed, "LoRA adapters."),
    valued("cache-info-metric", "NAME", "", removed, "Block size and number."),
];
