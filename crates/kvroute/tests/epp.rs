//! `kvroute epp` as a process: llm-d's arguments, ports, health, metrics and signals.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use serde_json::Value;
use support::{PATIENCE, engine, http};
use tokio::net::TcpStream;

/// A policy of llm-d's kind, as a chart would mount it.
const CONFIG: &str = "\
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
";

const SERVING: u8 = 1;
const NOT_SERVING: u8 = 2;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("kvroute-epp-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, content: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvroute"));
    command.arg("epp").args(args);
    for name in ["NAMESPACE", "POD_NAME", "KVROUTE_LOG"] {
        command.env_remove(name);
    }
    command
}

/// Exit code, standard output and standard error of a command line that does not start a router.
fn ends(args: &[&str]) -> (i32, String, String) {
    let output = command(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A picker that runs, on ports of its own.
struct Picker {
    process: Child,
    lines: mpsc::Receiver<String>,
    /// Lines of the log up to the one that says where it listens.
    log: Vec<Value>,
}

impl Picker {
    fn start(args: &[&str], env: &[(&str, &str)]) -> Picker {
        let ports = ["--grpc-port=0", "--grpc-health-port=0", "--metrics-port=0"];
        let mut command = command(args);
        command.args(ports).arg("--admin=127.0.0.1:0").envs(env.iter().copied());
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let (told, lines) = mpsc::channel();
        let log = BufReader::new(process.stderr.take().unwrap());
        // The pipe is read to its end, or the process would wait for it.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                // Nobody listens any more: the pipe is closed.
                if told.send(line).is_err() {
                    break;
                }
            }
        });
        let mut picker = Picker { process, lines, log: Vec::new() };
        loop {
            let line = picker.lines.recv_timeout(PATIENCE).unwrap_or_else(|error| {
                panic!("no line that it listens ({error}): {:?}", picker.log);
            });
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            let listens = line["fields"]["message"] == "The router listens.";
            picker.log.push(line);
            if listens {
                return picker;
            }
        }
    }

    /// An address from the line that says where it listens, over loopback.
    fn address(&self, name: &str) -> SocketAddr {
        let text = self.log.last().unwrap()["fields"][name].as_str().unwrap();
        let address: SocketAddr = text.parse().unwrap();
        SocketAddr::from(([127, 0, 0, 1], address.port()))
    }

    fn logged(&self, level: &str, part: &str) -> bool {
        let found = |line: &&Value| {
            let message = line["fields"]["message"].as_str().unwrap_or_default();
            line["level"] == level && message.contains(part)
        };
        self.log.iter().any(|line| found(&line))
    }

    fn terminate(&self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// Waits for the end; the exit code.
    async fn ended(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it does not end");
    }
}

impl Drop for Picker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// gRPC health over one connection.
struct Health(h2::client::SendRequest<Bytes>);

impl Health {
    async fn connect(address: SocketAddr) -> Health {
        let tcp = TcpStream::connect(address).await.unwrap();
        let (client, connection) = h2::client::handshake(tcp).await.unwrap();
        tokio::spawn(connection);
        Health(client)
    }

    /// The status of a service, or the gRPC status that stands in its place, as text.
    async fn check(&self, service: &str) -> Result<u8, String> {
        let mut message = vec![0x0a, u8::try_from(service.len()).unwrap()];
        message.extend_from_slice(service.as_bytes());
        let mut frame = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
        frame.extend_from_slice(&message);
        let request = Request::post("http://health/grpc.health.v1.Health/Check")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        let mut client = self.0.clone().ready().await.unwrap();
        let (answer, mut body) = client.send_request(request, false).unwrap();
        body.send_data(frame.into(), true).unwrap();
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        let status = |headers: &http::HeaderMap| {
            headers.get("grpc-status").map(|status| status.to_str().unwrap().to_owned())
        };
        if let Some(status) = status(answer.headers()) {
            return Err(status);
        }
        let mut body = answer.into_body();
        let mut bytes = Vec::new();
        while let Some(data) = body.data().await {
            bytes.extend_from_slice(&data.unwrap());
        }
        let trailers = body.trailers().await.unwrap().expect("gRPC ends with trailers");
        assert_eq!(status(&trailers).as_deref(), Some("0"));
        // One message of one field: the status.
        assert_eq!(bytes[..6], [0, 0, 0, 0, 2, 0x08], "{bytes:?}");
        Ok(bytes[6])
    }
}

const EXT_PROC: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

#[test]
fn the_help_is_as_written_down() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/epp/help.txt");
    let (code, out, err) = ends(&["--help"]);
    assert_eq!((code, err.as_str()), (0, ""));
    if std::env::var_os("KVROUTE_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &out).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(out == expected, "tests/data/epp/help.txt is old; write it with KVROUTE_BLESS=1");
    assert_eq!(ends(&["--pool-name", "x", "-h"]).1, out);
}

#[test]
fn mistakes_end_it_with_code_2_and_what_is_valid() {
    let table: [(&[&str], &str); 8] = [
        (&[], "nothing to serve"),
        (&["--pool-nam=x"], "--pool-name"),
        (&["--pool-name=x", "--endpoint-selector=a=b"], "exclude each other"),
        (&["--pool-name=x", "--config-file=/not/there"], "/not/there"),
        (&["--pool-name=x", "--config-text=plugins: [{type: queue-scorrer}]"], "queue-scorer"),
        (&["--config-text=plugins: [{type: queue-scorer}]"], "nothing to serve"),
        (&["--pool-name=x", "--admin=here"], "--admin"),
        (&["--pool-name=x", "--lora-info-metric=y"], "engineConfigs"),
    ];
    for (args, expected) in table {
        let (code, out, err) = ends(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.starts_with("kvroute: ") && err.contains(expected), "{args:?}: {err}");
    }
}

/// The arguments of llm-d's standalone chart: TLS, and nothing to serve, because Kubernetes is not
/// watched (rows 112 and 114 of docs/differences.md).
#[tokio::test]
async fn the_standalone_chart_starts_it_and_it_is_not_ready() {
    let scratch = Scratch::new("standalone");
    let config = scratch.file("default-plugins.yaml", CONFIG);
    let args = [
        "--endpoint-selector",
        "app=vllm",
        "--endpoint-target-ports",
        "8000",
        "--zap-encoder",
        "json",
        "--config-file",
        &config,
        "--grpc-health-port",
        "9003",
        "--tracing=false",
        "--drain-timeout=100ms",
    ];
    let pod = [("POD_NAME", "llm-epp-7d9f8c6b5-x2k4z"), ("NAMESPACE", "models")];
    let mut picker = Picker::start(&args, &pod);
    assert!(picker.logged("ERROR", "does not watch Kubernetes"), "{:?}", picker.log);
    let health = Health::connect(picker.address("health")).await;
    assert_eq!(health.check("liveness").await, Ok(SERVING));
    for service in ["", "readiness", "inference-extension", EXT_PROC] {
        assert_eq!(health.check(service).await, Ok(NOT_SERVING), "{service}");
    }
    let monitor = picker.address("metrics");
    let refused = http(monitor, "GET", "/metrics", "").await;
    assert_eq!(refused.status, 401);
    assert!(refused.body.contains("--metrics-endpoint-auth=false"), "{}", refused.body);
    assert_eq!(http(monitor, "GET", "/healthz", "").await.status, 200);
    let ready = http(monitor, "GET", "/readyz", "").await;
    assert!(ready.status == 503 && ready.body.contains("--endpoints-file"), "{}", ready.body);
    assert_eq!(http(monitor, "GET", "/debug/pprof/", "").await.status, 501);
    assert_eq!(http(picker.address("admin"), "GET", "/metrics", "").await.status, 200);
    drop(health);
    picker.terminate();
    assert_eq!(picker.ended().await, Some(0));
}

/// The arguments of llm-d's gateway chart with two replicas, and engines from our own flags.
#[tokio::test]
async fn the_gateway_chart_starts_it_and_sigterm_ends_it_politely() {
    let scratch = Scratch::new("gateway");
    let config = scratch.file("default-plugins.yaml", CONFIG);
    let engine = engine().await;
    let endpoint = format!("--endpoint=http://{}", engine.http_addr());
    let args = [
        "--pool-name",
        "pool1",
        "--pool-namespace",
        "default",
        "--pool-group",
        "inference.networking.k8s.io",
        "--zap-encoder",
        "json",
        "--config-file",
        &config,
        "--ha-enable-leader-election",
        "--grpc-health-port",
        "9003",
        "--secure-serving=false",
        "--v=4",
        "--tracing=false",
        "--metrics-endpoint-auth=false",
        &endpoint,
    ];
    let mut picker = Picker::start(&args, &[]);
    assert!(picker.logged("WARN", "--ha-enable-leader-election"), "{:?}", picker.log);
    let health = Health::connect(picker.address("health")).await;
    let beside = Health::connect(picker.address("ext_proc")).await;
    for service in ["", "liveness", "readiness", "inference-extension", EXT_PROC] {
        assert_eq!(health.check(service).await, Ok(SERVING), "{service}");
        assert_eq!(beside.check(service).await, Ok(SERVING), "{service}");
    }
    let metrics = http(picker.address("metrics"), "GET", "/metrics", "").await;
    assert!(metrics.status == 200 && metrics.body.contains("kvroute_"), "{}", metrics.status);
    picker.terminate();
    let begun = Instant::now();
    while beside.check("readiness").await == Ok(SERVING) {
        assert!(begun.elapsed() < PATIENCE, "it stays ready");
    }
    assert_eq!(beside.check("liveness").await, Ok(SERVING));
    let late = Health::connect(picker.address("ext_proc")).await;
    assert_eq!(late.check(EXT_PROC).await, Ok(NOT_SERVING), "connections are still taken");
    assert!(picker.process.try_wait().unwrap().is_none(), "it goes on");
    drop((health, beside, late));
    picker.terminate();
    assert_eq!(picker.ended().await, Some(0));
}

/// Whoever reads the log may end before the picker does.
#[tokio::test]
async fn a_closed_log_stops_nothing() {
    let engine = engine().await;
    let endpoint = format!("--endpoint=http://{}", engine.http_addr());
    let args = ["--secure-serving=false", "-v=5", "--drain-timeout=100ms", &endpoint];
    let mut picker = Picker::start(&args, &[]);
    picker.lines = mpsc::channel().1;
    let (admin, ext_proc) = (picker.address("admin"), picker.address("ext_proc"));
    for _ in 0..50 {
        assert_eq!(http(admin, "GET", "/healthz", "").await.status, 200);
        let health = Health::connect(ext_proc).await;
        assert_eq!(health.check("liveness").await, Ok(SERVING));
    }
    picker.terminate();
    assert_eq!(picker.ended().await, Some(0));
}

/// What stands behind `epp` is for llm-d's parser alone.
#[test]
fn our_own_flags_are_none_behind_epp() {
    for args in [["--log=debug"], ["--log-format=json"], ["--version"]] {
        let (code, _, err) = ends(&args);
        assert!(code == 2 && err.contains("unknown flag"), "{args:?}: {err}");
    }
    let (code, _, err) = ends(&["--", "--help"]);
    assert!(code == 2 && err.contains("nothing to serve"), "{err}");
    let empty = command(&["--help"]).env("KVROUTE_LOG", "").output().unwrap();
    assert_eq!(empty.status.code(), Some(0));
}

/// An address that is taken is told with its flag.
#[test]
fn a_taken_port_is_told_with_its_flag() {
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let free = ["--grpc-port=0", "--grpc-health-port=0", "--metrics-port=0", "--admin="];
    let admin = format!("--admin=127.0.0.1:{port}");
    let others = ["grpc-port", "grpc-health-port", "metrics-port"];
    let others = others.map(|name| format!("--{name}={port}"));
    for flag in others.iter().chain([&admin]) {
        let mut args = vec!["--pool-name=x"];
        args.extend(free);
        args.push(flag);
        let (code, _, err) = ends(&args);
        let name = flag.split('=').next().unwrap();
        assert!(code == 2 && err.contains(&format!("kvroute: {name}: cannot listen")), "{err}");
    }
}

/// llm-d's file discovery, without any pool: row 111 of docs/differences.md.
#[tokio::test]
async fn endpoints_from_the_configuration_need_no_pool() {
    let scratch = Scratch::new("files");
    let engine = engine().await;
    let port = engine.http_addr().port();
    let list = format!("endpoints: [{{name: a, address: 127.0.0.1, port: \"{port}\"}}]\n");
    let list = scratch.file("endpoints.yaml", &list);
    let text = format!(
        "plugins:\n- {{type: file-discovery, name: files, parameters: {{path: {list}}}}}\n\
         - {{type: queue-scorer}}\ndataLayer: {{discovery: {{pluginRef: files}}}}\n"
    );
    let args = ["--config-text", &text, "--secure-serving=false", "--refresh-metrics-interval=1s"];
    let picker = Picker::start(&args, &[]);
    let health = Health::connect(picker.address("ext_proc")).await;
    assert_eq!(health.check("readiness").await, Ok(SERVING));
    let admin = picker.address("admin");
    let begun = Instant::now();
    while http(admin, "GET", "/readyz", "").await.status != 200 {
        assert!(begun.elapsed() < PATIENCE, "the engine is never read");
    }
    let endpoints = http(admin, "GET", "/endpoints", "").await.body;
    assert!(endpoints.contains(&port.to_string()), "{endpoints}");
}
