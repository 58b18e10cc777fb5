//! The routers: how each is started, and how one knows that it is ready.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::engines::{Address, MODEL};
use crate::process;
use crate::saturate::Sender;

/// A router that does not answer after this does not start.
const START_MAX: Duration = Duration::from_secs(60);

/// Answers in a row that make a router ready: every engine is behind it then, not just the first.
const READY_ANSWERS: u32 = 64;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// No router: each sender has an engine of its own.
    Direct,
    /// Round robin on plain hyper, the floor.
    Passthrough,
    /// kvroute with the tokenizer and KV events: precise routing.
    Kvroute,
    /// kvroute without a tokenizer: prompts are estimated, routing goes by its own history.
    KvrouteApprox,
    /// Envoy, round robin.
    Envoy,
    /// sglang-router, round robin.
    SglangRr,
    /// sglang-router, `cache_aware`.
    SglangCache,
    /// smg, round robin.
    SmgRr,
    /// smg, `cache_aware`.
    SmgCache,
}

impl Kind {
    /// Baselines first.
    pub const ALL: [Kind; 9] = [
        Kind::Direct,
        Kind::Passthrough,
        Kind::Kvroute,
        Kind::KvrouteApprox,
        Kind::Envoy,
        Kind::SglangRr,
        Kind::SglangCache,
        Kind::SmgRr,
        Kind::SmgCache,
    ];

    /// As typed.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Where programs are, and where files may be written.
pub struct Paths {
    passthrough: PathBuf,
    kvroute: PathBuf,
    peers: PathBuf,
    logs: PathBuf,
    tokenizer: PathBuf,
}

impl Paths {
    pub fn new(
        kvroute: &Path,
        peers: &Path,
        logs: &Path,
        tokenizer: Option<PathBuf>,
    ) -> anyhow::Result<Paths> {
        let built_in =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/tokens/assets/demo/tokenizer.json");
        Ok(Paths {
            passthrough: std::env::current_exe()?.with_file_name("passthrough"),
            kvroute: kvroute.to_owned(),
            peers: peers.join("bin"),
            logs: logs.to_owned(),
            tokenizer: tokenizer.unwrap_or_else(|| PathBuf::from(built_in)),
        })
    }

    fn program(&self, kind: Kind) -> Option<PathBuf> {
        match kind {
            Kind::Direct => None,
            Kind::Passthrough => Some(self.passthrough.clone()),
            Kind::Kvroute | Kind::KvrouteApprox => Some(self.kvroute.clone()),
            Kind::Envoy => Some(self.peers.join("envoy")),
            Kind::SglangRr | Kind::SglangCache => Some(self.peers.join("sglang-router")),
            Kind::SmgRr | Kind::SmgCache => Some(self.peers.join("smg")),
        }
    }

    /// Is it installed?
    pub fn has(&self, kind: Kind) -> bool {
        self.program(kind).is_none_or(|path| path.is_file())
    }

    fn command(&self, kind: Kind, port: u16, engines: &[Address]) -> anyhow::Result<Command> {
        let program = self.program(kind).context("no router has no program")?;
        let mut command = Command::new(program);
        match kind {
            Kind::Direct => {}
            Kind::Passthrough => {
                command.arg(format!("127.0.0.1:{port}"));
                command.args(engines.iter().map(|engine| engine.http.to_string()));
            }
            Kind::Kvroute => {
                kvroute(&mut command, port)?;
                command.arg("--tokenizer").arg(&self.tokenizer);
                for Address { http, events, replay } in engines {
                    let sockets = format!("events=tcp://{events},replay=tcp://{replay}");
                    command.arg("--endpoint").arg(format!("http://{http},{sockets}"));
                }
            }
            Kind::KvrouteApprox => {
                kvroute(&mut command, port)?;
                for Address { http, .. } in engines {
                    command.arg("--endpoint").arg(format!("http://{http}"));
                }
            }
            Kind::Envoy => {
                let path = self.logs.join("envoy.json");
                std::fs::write(&path, envoy(port, engines).to_string())?;
                command.arg("-c").arg(path).args(["--concurrency", "2"]);
                command.args(["--use-dynamic-base-id", "--log-level", "warn"]);
            }
            Kind::SglangRr | Kind::SmgRr => sglang(&mut command, port, "round_robin", engines)?,
            Kind::SglangCache | Kind::SmgCache => {
                sglang(&mut command, port, "cache_aware", engines)?;
            }
        }
        Ok(command)
    }
}

fn kvroute(command: &mut Command, port: u16) -> anyhow::Result<()> {
    command.args(["serve", "--http", &format!("127.0.0.1:{port}")]);
    command.args(["--admin", &format!("127.0.0.1:{}", free_port()?)]);
    Ok(())
}

/// sglang-router and smg have the same flags.
fn sglang(
    command: &mut Command,
    port: u16,
    policy: &str,
    engines: &[Address],
) -> anyhow::Result<()> {
    command.args(["launch", "--host", "127.0.0.1", "--port", &port.to_string()]);
    command.args(["--policy", policy, "--log-level", "warn", "--disable-retries"]);
    command.args(["--prometheus-host", "127.0.0.1"]);
    command.args(["--prometheus-port", &free_port()?.to_string()]);
    command.args(["--worker-startup-check-interval", "1"]);
    command.arg("--worker-urls");
    command.args(engines.iter().map(|engine| format!("http://{}", engine.http)));
    Ok(())
}

/// A static round robin cluster, no access log.
fn envoy(port: u16, engines: &[Address]) -> serde_json::Value {
    let address = |address: SocketAddr| {
        let (ip, port) = (address.ip().to_string(), address.port());
        json!({"socket_address": {"address": ip, "port_value": port}})
    };
    let endpoints: Vec<_> = engines
        .iter()
        .map(|engine| json!({"endpoint": {"address": address(engine.http)}}))
        .collect();
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let manager = "type.googleapis.com/envoy.extensions.filters.network.\
                   http_connection_manager.v3.HttpConnectionManager";
    json!({"static_resources": {
        "listeners": [{
            "name": "in",
            "address": address(SocketAddr::from(([127, 0, 0, 1], port))),
            "filter_chains": [{"filters": [{
                "name": "http",
                "typed_config": {
                    "@type": manager,
                    "stat_prefix": "in",
                    "http_filters": [{"name": "router", "typed_config": {"@type": router}}],
                    "route_config": {"virtual_hosts": [{
                        "name": "all",
                        "domains": ["*"],
                        "routes": [{
                            "match": {"prefix": "/"},
                            "route": {"cluster": "engines", "timeout": "0s"},
                        }],
                    }]},
                },
            }]}],
        }],
        "clusters": [{
            "name": "engines",
            "type": "STATIC",
            "lb_policy": "ROUND_ROBIN",
            "load_assignment": {
                "cluster_name": "engines",
                "endpoints": [{"lb_endpoints": endpoints}],
            },
        }],
    }})
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A running router, or none.
pub struct Target {
    child: Option<Child>,
    /// Where each sender sends.
    pub urls: Vec<String>,
}

impl Target {
    /// Starts it and waits until it routes.
    pub async fn start(kind: Kind, paths: &Paths, engines: &[Address]) -> anyhow::Result<Target> {
        if kind == Kind::Direct {
            let urls = engines.iter().map(|engine| format!("http://{}", engine.http)).collect();
            return Ok(Target { child: None, urls });
        }
        let port = free_port()?;
        let log = File::create(paths.logs.join(format!("{}.log", kind.name())))?;
        let mut command = paths.command(kind, port, engines)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("cannot start {}", kind.name()))?;
        let urls = vec![format!("http://127.0.0.1:{port}"); engines.len()];
        let mut target = Target { child: Some(child), urls };
        target.ready().await?;
        Ok(target)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let sender = Sender::new(&self.urls[0]);
        let body = json!({"model": MODEL, "prompt": "Is anybody there?", "max_tokens": 1});
        let body = body.to_string();
        let begin = Instant::now();
        let mut answers = 0;
        while answers < READY_ANSWERS {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
                anyhow::bail!("it ended at once ({status}): see its log");
            }
            match sender.send(body.clone().into()).await {
                Ok(_) => answers += 1,
                Err(error) if begin.elapsed() > START_MAX => {
                    return Err(error.context("it does not get ready: see its log"));
                }
                Err(_) => {
                    answers = 0;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        Ok(())
    }

    pub fn usage(&self) -> process::Usage {
        process::usage(self.child.as_ref().and_then(Child::id))
    }

    /// Asks it to end, then makes it.
    pub async fn stop(self) {
        let Some(mut child) = self.child else { return };
        let pids = child.id().map(process::tree).unwrap_or_default();
        signal("-TERM", &pids).await;
        if tokio::time::timeout(Duration::from_secs(5), child.wait()).await.is_err() {
            signal("-KILL", &pids).await;
            // Only its exit status is of no interest.
            let _ = child.wait().await;
        }
    }
}

async fn signal(name: &str, pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    let mut command = Command::new("kill");
    command.arg(name).args(pids).stderr(Stdio::null());
    // Whoever has gone by itself cannot be told, which is fine.
    let _ = command.status().await;
}
