//! The routers: how each is started, and how one knows that it is ready.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::engines::{Address, MODEL};
use crate::envoy;
use crate::process;
use crate::saturate::Sender;

/// A router that does not answer after this does not start.
const START_MAX: Duration = Duration::from_secs(60);

/// Answers in a row that make a router ready: every engine is behind it then, not just the first.
const READY_ANSWERS: usize = 64;

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
    /// Envoy that asks kvroute (tokenizer, KV events) over ext_proc.
    ExtProc,
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
    pub const ALL: [Kind; 10] = [
        Kind::Direct,
        Kind::Passthrough,
        Kind::Kvroute,
        Kind::KvrouteApprox,
        Kind::Envoy,
        Kind::ExtProc,
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
            Kind::Envoy | Kind::ExtProc => Some(self.peers.join("envoy")),
            Kind::SglangRr | Kind::SglangCache => Some(self.peers.join("sglang-router")),
            Kind::SmgRr | Kind::SmgCache => Some(self.peers.join("smg")),
        }
    }

    /// Is it installed?
    pub fn has(&self, kind: Kind) -> bool {
        let needs_picker = kind == Kind::ExtProc;
        self.program(kind).is_none_or(|path| path.is_file())
            && (!needs_picker || self.kvroute.is_file())
    }

    /// The Endpoint Picker that a proxy asks, at `port`.
    fn picker(&self, port: u16, engines: &[Address]) -> anyhow::Result<Command> {
        let mut command = Command::new(&self.kvroute);
        kvroute(&mut command, free_port()?)?;
        command.args(["--ext-proc", &format!("127.0.0.1:{port}")]);
        self.precise(&mut command, engines);
        Ok(command)
    }

    /// Exact tokens, and engines that tell what they hold.
    fn precise(&self, command: &mut Command, engines: &[Address]) {
        command.arg("--tokenizer").arg(&self.tokenizer);
        for Address { http, events, replay } in engines {
            let sockets = format!("events=tcp://{events},replay=tcp://{replay}");
            command.arg("--endpoint").arg(format!("http://{http},{sockets}"));
        }
    }

    fn envoy(&self, command: &mut Command, config: &serde_json::Value) -> anyhow::Result<()> {
        let path = self.logs.join("envoy.json");
        std::fs::write(&path, config.to_string())?;
        command.arg("-c").arg(path).args(["--concurrency", "2"]);
        command.args(["--use-dynamic-base-id", "--log-level", "warn"]);
        Ok(())
    }

    fn command(
        &self,
        kind: Kind,
        port: u16,
        picker: Option<u16>,
        engines: &[Address],
    ) -> anyhow::Result<Command> {
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
                self.precise(&mut command, engines);
            }
            Kind::KvrouteApprox => {
                kvroute(&mut command, port)?;
                for Address { http, .. } in engines {
                    command.arg("--endpoint").arg(format!("http://{http}"));
                }
            }
            Kind::Envoy => self.envoy(&mut command, &envoy::round_robin(port, engines))?,
            Kind::ExtProc => {
                let picker = picker.context("Envoy asks a picker")?;
                self.envoy(&mut command, &envoy::asking(port, picker))?;
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

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A running router, or none.
pub struct Target {
    router: Option<Child>,
    /// Whom a proxy asks.
    picker: Option<Child>,
    /// Where each sender sends.
    pub urls: Vec<String>,
}

impl Target {
    /// Starts it and waits until it routes.
    pub async fn start(kind: Kind, paths: &Paths, engines: &[Address]) -> anyhow::Result<Target> {
        if kind == Kind::Direct {
            let urls = engines.iter().map(|engine| format!("http://{}", engine.http)).collect();
            return Ok(Target { router: None, picker: None, urls });
        }
        let (port, picker_port) = (free_port()?, free_port()?);
        let picker = match kind {
            Kind::ExtProc => {
                let log = paths.logs.join(format!("{}-picker.log", kind.name()));
                Some(spawn(paths.picker(picker_port, engines)?, &log)?)
            }
            _ => None,
        };
        let command = paths.command(kind, port, picker.as_ref().map(|_| picker_port), engines)?;
        let router = spawn(command, &paths.logs.join(format!("{}.log", kind.name())))?;
        let urls = vec![format!("http://127.0.0.1:{port}"); engines.len()];
        let mut target = Target { router: Some(router), picker, urls };
        target.ready(engines.len()).await?;
        Ok(target)
    }

    async fn ready(&mut self, engines: usize) -> anyhow::Result<()> {
        let sender = Sender::new(&self.urls[0]);
        let body = json!({"model": MODEL, "prompt": "Is anybody there?", "max_tokens": 1});
        let body = body.to_string();
        let begin = Instant::now();
        let mut answers = 0;
        while answers < READY_ANSWERS.max(engines) {
            for child in self.router.iter_mut().chain(&mut self.picker) {
                if let Some(status) = child.try_wait().ok().flatten() {
                    anyhow::bail!("it ended at once ({status}): see its log");
                }
            }
            match sender.send(body.clone().into(), |_| {}).await {
                Ok(()) => answers += 1,
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

    /// Of all that stands between clients and engines.
    pub fn usage(&self) -> process::Usage {
        let of = |child: &Option<Child>| process::usage(child.as_ref().and_then(Child::id));
        let (router, picker) = (of(&self.router), of(&self.picker));
        process::Usage { cpu_s: router.cpu_s + picker.cpu_s, rss_mb: router.rss_mb + picker.rss_mb }
    }

    /// Of the Endpoint Picker alone, where there is one.
    pub fn picker_usage(&self) -> Option<process::Usage> {
        self.picker.as_ref().map(|picker| process::usage(picker.id()))
    }

    /// Asks it to end, then makes it.
    pub async fn stop(self) {
        for mut child in self.router.into_iter().chain(self.picker) {
            let pids = child.id().map(process::tree).unwrap_or_default();
            signal("-TERM", &pids).await;
            if tokio::time::timeout(Duration::from_secs(5), child.wait()).await.is_err() {
                signal("-KILL", &pids).await;
                // Only its exit status is of no interest.
                let _ = child.wait().await;
            }
        }
    }
}

fn spawn(mut command: Command, log: &Path) -> anyhow::Result<Child> {
    let log = File::create(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
    let program = command.as_std().get_program().to_owned();
    command.spawn().with_context(|| format!("cannot start {}", program.display()))
}

async fn signal(name: &str, pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    let mut command = Command::new("kill");
    command.arg(name).args(pids).stderr(Stdio::null());
    // Whoever has gone by itself cannot be told, which is fine.
    let _ = command.status().await;
}
