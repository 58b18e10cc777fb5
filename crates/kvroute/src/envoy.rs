//! How is a real Envoy run in front of a router? With the configurations of `deploy/envoy`, other
//! addresses put into them, as a child process that ends with its owner. For the demo and for
//! tests; kvroute itself never starts Envoy.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, anyhow, bail};
use http::{HeaderMap, Method};
use kvroute_router::ask::{Answer, AskError, AskLimits, exchange_at};
use serde_json::Value;

/// `deploy/envoy/standalone.yaml`: Envoy connects to the address that the picker names.
pub const STANDALONE: &str = include_str!("../../../deploy/envoy/standalone.yaml");
/// `deploy/envoy/override-host.yaml`: Envoy knows the endpoints, the picker names one of them.
pub const OVERRIDE_HOST: &str = include_str!("../../../deploy/envoy/override-host.yaml");

/// Envoy listens within a second; this is for a machine that is busy.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a starting Envoy is asked whether it is ready.
const START_POLL: Duration = Duration::from_millis(20);
/// Another program may take the admin port between its choice and Envoy's start.
const START_ATTEMPTS: u32 = 3;
/// Name of the listener for clients in both configurations.
const LISTENER: &str = "inference";

const LIMITS: AskLimits =
    AskLimits { answer: Duration::from_secs(10), body_bytes_max: 16 << 20, event_bytes_max: 0 };

/// A configuration whose marked lines (`... # @mark`) take other values.
#[derive(Clone, Debug)]
pub struct Template(String);

impl Template {
    /// One of the files of `deploy/envoy`.
    pub fn new(text: &str) -> Template {
        Template(text.to_owned())
    }

    /// The configuration with `from` replaced by `to` in every line of that mark.
    ///
    /// # Errors
    /// No line with this mark has such a part.
    pub fn set(self, mark: &str, from: &str, to: &str) -> anyhow::Result<Template> {
        self.each(mark, from, &[to])
    }

    /// The same, each line once for every one of `to`.
    ///
    /// # Errors
    /// As [`Template::set`].
    pub fn each<S: AsRef<str>>(self, mark: &str, from: &str, to: &[S]) -> anyhow::Result<Template> {
        let (mut text, mut found) = (String::new(), false);
        let ending = format!("# @{mark}");
        for line in self.0.lines() {
            if line.ends_with(&ending) && line.contains(from) {
                found = true;
                to.iter().for_each(|to| text += &(line.replace(from, to.as_ref()) + "\n"));
            } else {
                text += &(line.to_owned() + "\n");
            }
        }
        if found { Ok(Template(text)) } else { bail!("no line of Envoy's {ending} has {from}") }
    }

    /// The configuration without the lines from `# @mark begin` to `# @mark end`.
    ///
    /// # Errors
    /// There are no such lines.
    pub fn without(self, mark: &str) -> anyhow::Result<Template> {
        let (begin, end) = (format!("# @{mark} begin"), format!("# @{mark} end"));
        let (mut text, mut found, mut inside) = (String::new(), false, false);
        for line in self.0.lines() {
            inside |= line.ends_with(&begin);
            if !inside {
                text += &(line.to_owned() + "\n");
            }
            if line.ends_with(&end) {
                (found, inside) = (found || inside, false);
            }
        }
        if found && !inside { Ok(Template(text)) } else { bail!("Envoy's {begin} has no end") }
    }

    /// The configuration for a picker at this address, every listener on a free port of loopback.
    ///
    /// # Errors
    /// The text has lost its marks.
    pub fn on_loopback(self, ext_proc: SocketAddr) -> anyhow::Result<Template> {
        self.set(
            "listen",
            "address: 0.0.0.0, port_value: 8081",
            "address: 127.0.0.1, port_value: 0",
        )?
        .set("ready", "address: 0.0.0.0, port_value: 19001", "address: 127.0.0.1, port_value: 0")?
        .set("ext-proc", "address: 127.0.0.1, port_value: 9002", &socket(ext_proc))
    }

    /// The configuration as it stands.
    pub fn text(&self) -> &str {
        &self.0
    }
}

fn socket(address: SocketAddr) -> String {
    format!("address: {}, port_value: {}", address.ip(), address.port())
}

/// A running Envoy with one worker. Dropping it ends the process and removes its files.
pub struct Envoy {
    child: Child,
    dir: PathBuf,
    admin: SocketAddr,
    listeners: Vec<(String, SocketAddr)>,
}

impl Envoy {
    /// Starts Envoy and returns when it takes requests.
    ///
    /// # Errors
    /// There is no such program, it refuses the configuration (its own words are in the error), or
    /// it does not listen in time.
    pub async fn start(binary: &Path, config: &Template) -> anyhow::Result<Envoy> {
        let mut attempt = 1;
        loop {
            let started = Envoy::launch(binary, config)?.ready().await;
            match started {
                Err(error) if attempt == START_ATTEMPTS || !is_taken(&error) => return Err(error),
                Err(_) => attempt += 1,
                Ok(envoy) => return Ok(envoy),
            }
        }
    }

    /// Whether this is a program that can be run, and is an Envoy.
    ///
    /// # Errors
    /// It is not, or it does not run on this machine.
    pub fn check(binary: &Path) -> anyhow::Result<()> {
        let name = binary.display();
        let version = Command::new(binary).arg("--version").stdin(Stdio::null()).output();
        let version = version.with_context(|| format!("cannot start {name}"))?;
        match String::from_utf8_lossy(&version.stdout).contains("envoy") {
            true => Ok(()),
            false => bail!("{name} --version does not say that it is an Envoy"),
        }
    }

    fn launch(binary: &Path, config: &Template) -> anyhow::Result<Envoy> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let admin = free_port().context("no free port for Envoy")?;
        let config =
            config.clone().set("admin", "address: 127.0.0.1, port_value: 19000", &socket(admin))?;
        let name = format!("kvroute-envoy-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let (file, log) = (dir.join("envoy.yaml"), dir.join("envoy.log"));
        fs::write(&file, config.text())?;
        let out = fs::File::create(&log)?;
        let child = Command::new(binary)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"])
            .arg("--config-path")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Envoy { child, dir, admin, listeners: Vec::new() })
    }

    async fn ready(mut self) -> anyhow::Result<Envoy> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("Envoy ended at its start ({status}):\n{}", self.log());
            }
            if self.get("/ready").await.is_ok_and(|answer| answer.status == 200) {
                break;
            }
            if began.elapsed() > START_TIMEOUT {
                bail!("Envoy is not ready after {START_TIMEOUT:?}:\n{}", self.log());
            }
            tokio::time::sleep(START_POLL).await;
        }
        let page = self.get("/listeners?format=json").await?.body;
        self.listeners = listeners(&serde_json::from_slice(&page)?);
        Ok(self)
    }

    /// Where clients connect.
    ///
    /// # Errors
    /// The configuration has no listener of the name `inference`.
    pub fn http_addr(&self) -> anyhow::Result<SocketAddr> {
        self.listener(LISTENER)
    }

    /// Where a listener listens.
    ///
    /// # Errors
    /// The configuration has no listener of that name.
    pub fn listener(&self, name: &str) -> anyhow::Result<SocketAddr> {
        let found = self.listeners.iter().find(|(known, _)| known == name);
        found.map(|(_, at)| *at).ok_or_else(|| anyhow!("Envoy has no listener {name}"))
    }

    /// What the admin address answers.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn get(&self, path: &str) -> Result<Answer, AskError> {
        exchange_at(self.admin, &Method::GET, path, &HeaderMap::new(), b"", &LIMITS).await
    }

    /// Sum of the counters and gauges whose names end so, as in `ext_proc.streams_started`.
    ///
    /// # Errors
    /// The admin address does not answer, or knows none.
    pub async fn stat(&self, ending: &str) -> anyhow::Result<u64> {
        let page = self.get("/stats").await?.body;
        let lines = String::from_utf8_lossy(&page);
        let values = lines.lines().filter_map(|line| line.split_once(": "));
        let wanted = values.filter(|(name, _)| name.ends_with(ending));
        let numbers: Vec<u64> = wanted.filter_map(|(_, value)| value.parse().ok()).collect();
        if numbers.is_empty() {
            bail!("Envoy counts no {ending}")
        }
        Ok(numbers.iter().sum())
    }

    /// Access log, warnings and errors so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("envoy.log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        // One that has ended already needs no end, and files that stay are in the system's folder
        // for such.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A port of loopback that nothing listens at now.
///
/// # Errors
/// The system has none.
pub fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

fn is_taken(error: &anyhow::Error) -> bool {
    error.to_string().contains("Address already in use")
}

/// Names and addresses of the admin address's list.
fn listeners(page: &Value) -> Vec<(String, SocketAddr)> {
    let address = |listener: &Value| {
        let socket = &listener["local_address"]["socket_address"];
        let port = u16::try_from(socket["port_value"].as_u64()?).ok()?;
        Some(SocketAddr::new(socket["address"].as_str()?.parse().ok()?, port))
    };
    let all = page["listener_statuses"].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter_map(|l| Some((l["name"].as_str()?.to_owned(), address(l)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_lines_take_other_values() {
        let text = "a: 1  # @x\nb: 1\nc: 1  # @y\nd: 1  # @z begin\ne\nf  # @z end\ng\n";
        let template = || Template::new(text);
        let set = template().set("x", "1", "2").unwrap();
        assert!(set.text().starts_with("a: 2  # @x\nb: 1\nc: 1  # @y\n"), "{}", set.text());
        let each = template().each("y", "c: 1", &["c: 3", "c: 4"]).unwrap();
        assert!(each.text().contains("c: 3  # @y\nc: 4  # @y\n"), "{}", each.text());
        assert_eq!(template().without("z").unwrap().text(), "a: 1  # @x\nb: 1\nc: 1  # @y\ng\n");
        for wrong in [template().set("x", "9", "2"), template().set("w", "1", "2")] {
            assert!(wrong.is_err());
        }
        assert!(template().without("y").is_err());
    }

    #[test]
    fn both_configurations_have_every_mark() {
        let ext_proc = "127.0.0.1:1234".parse().unwrap();
        for text in [STANDALONE, OVERRIDE_HOST] {
            let rendered = Template::new(text).on_loopback(ext_proc).unwrap();
            let rendered = rendered.without("tls").unwrap().without("strip").unwrap();
            assert!(rendered.text().contains("port_value: 1234"));
            assert!(!rendered.text().contains("0.0.0.0"));
        }
    }
}
