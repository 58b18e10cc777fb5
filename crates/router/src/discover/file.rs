//! Which endpoints does a file list? llm-d's `file-discovery` format, read again at every look.
//!
//! The file's content is compared, not its time: a Kubernetes ConfigMap changes by swapping a
//! symlink, and editors write in many ways. Labels tell what the format has no fields for:
//! `kvroute/rank`, `kvroute/events` and `kvroute/replay` (`tcp://HOST:PORT`), and
//! `kvroute/node-address`. Where the endpoints are clusters (`multicluster-file-discovery`),
//! `metricsAddress` and `metricsPort` tell where a cluster's metrics are.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use kvroute_core::collect::DiscoveryPlan;
use kvroute_wire::discovery::{self, FILE_BYTES_MAX, FileEndpoint};
use tokio::io::AsyncReadExt;

use crate::config::{EventsConfig, EventsSource, tcp_address};

use crate::upstream::Whereabouts;

use super::{Target, names, node_of};

const RANK: &str = "kvroute/rank";
const EVENTS: &str = "kvroute/events";
const REPLAY: &str = "kvroute/replay";
const METRICS_ADDRESS: &str = "metricsAddress";
const METRICS_PORT: &str = "metricsPort";

/// One entry of the file and the addresses it stands for.
#[derive(Debug)]
struct Listed {
    endpoint: FileEndpoint,
    rank: u32,
    events: EventsSource,
    addresses: Vec<SocketAddr>,
    node: Option<IpAddr>,
    /// Host and port of its metrics, and the address that the host had last.
    metrics: Option<(String, u16, Option<SocketAddr>)>,
}

/// Endpoints of a file, in its order.
#[derive(Debug)]
pub(crate) struct FileSource {
    path: PathBuf,
    events: EventsConfig,
    watched: bool,
    clusters: bool,
    content: Option<Vec<u8>>,
    listed: Vec<Listed>,
    targets: Vec<Target>,
}

impl FileSource {
    /// `events` holds for endpoints whose labels say nothing about events.
    pub fn new(path: PathBuf, events: EventsConfig) -> FileSource {
        let (watched, clusters) = (true, false);
        let (listed, targets) = (Vec::new(), Vec::new());
        FileSource { path, events, watched, clusters, content: None, listed, targets }
    }

    /// The file that a configuration names.
    pub fn planned(plan: &DiscoveryPlan, events: EventsConfig) -> FileSource {
        let source = FileSource::new(PathBuf::from(&plan.path), events);
        FileSource { watched: plan.watch, clusters: plan.clusters, ..source }
    }

    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Reads the file if it has changed. One that is wrong in any place changes nothing.
    pub async fn load(&mut self) -> Result<(), String> {
        if !self.watched && self.content.is_some() {
            return Ok(());
        }
        let shown = self.path.display().to_string();
        let content = self.read().await.map_err(|e| format!("{shown}: {e}"))?;
        if self.content.as_ref() != Some(&content) {
            let text = std::str::from_utf8(&content).map_err(|e| format!("{shown}: {e}"))?;
            let parsed = discovery::parse(text, &shown).map_err(|e| e.to_string())?;
            let listed = parsed.into_iter().map(|endpoint| self.understand(endpoint));
            self.listed = listed.collect::<Result<_, _>>().map_err(|e| format!("{shown}: {e}"))?;
            self.content = Some(content);
        }
        Ok(())
    }

    /// Reads the file if it has changed, and resolves host names again.
    pub async fn refresh(&mut self) -> Result<(), String> {
        self.load().await?;
        let shown = self.path.display().to_string();
        let mut failed = None;
        for listed in &mut self.listed {
            if let Some((host, port, known)) = &mut listed.metrics {
                match names::resolve(host, *port).await {
                    Ok(addresses) => *known = addresses.first().copied(),
                    Err(error) => {
                        let message = format!("{shown}: cannot resolve {host}: {error}");
                        failed = failed.or(Some(message));
                    }
                }
            }
            let (host, port) = (listed.endpoint.address.as_str(), listed.endpoint.port);
            match names::resolve(host, port).await {
                Ok(addresses) => listed.addresses = addresses,
                Err(error) => {
                    let message = format!("{shown}: cannot resolve {host}: {error}");
                    failed = failed.or(Some(message));
                }
            }
        }
        self.targets = self.listed.iter().flat_map(targets_of).collect();
        failed.map_or(Ok(()), Err)
    }

    async fn read(&self) -> Result<Vec<u8>, String> {
        let file = tokio::fs::File::open(&self.path).await.map_err(|e| e.to_string())?;
        let mut content = Vec::new();
        let mut limited = file.take(FILE_BYTES_MAX as u64 + 1);
        limited.read_to_end(&mut content).await.map_err(|e| e.to_string())?;
        if content.len() > FILE_BYTES_MAX {
            return Err(format!("larger than {FILE_BYTES_MAX} bytes"));
        }
        Ok(content)
    }

    fn understand(&self, endpoint: FileEndpoint) -> Result<Listed, String> {
        let label = |key: &str| endpoint.labels.get(key).map(String::as_str);
        let wrong =
            |key: &str| format!("endpoint {}: label {key} has a wrong value", endpoint.name);
        let rank = match label(RANK) {
            Some(text) => text.parse().map_err(|_| wrong(RANK))?,
            None => 0,
        };
        let address = |key: &str| match label(key) {
            Some(text) => tcp_address(text).map(Some).ok_or_else(|| wrong(key)),
            None => Ok(None),
        };
        let events = match (address(EVENTS)?, address(REPLAY)?) {
            (Some(events), replay) => EventsSource::At { events, replay },
            (None, Some(_)) => return Err(wrong(EVENTS)),
            (None, None) => self.events.of(&endpoint.labels),
        };
        let of_it = |error: String| format!("endpoint {}: {error}", endpoint.name);
        let node = node_of(&endpoint.labels).map_err(of_it)?;
        let metrics = match label(METRICS_ADDRESS).filter(|host| self.clusters && !host.is_empty())
        {
            Some(host) => {
                let port = match label(METRICS_PORT).filter(|port| !port.is_empty()) {
                    Some(port) => port.parse().map_err(|_| wrong(METRICS_PORT))?,
                    None => endpoint.port,
                };
                Some((host.to_owned(), port, None))
            }
            None => None,
        };
        Ok(Listed { endpoint, rank, events, addresses: Vec::new(), node, metrics })
    }
}

fn targets_of(listed: &Listed) -> Vec<Target> {
    let name = match listed.endpoint.namespace.as_str() {
        "default" => listed.endpoint.name.clone(),
        namespace => format!("{namespace}/{}", listed.endpoint.name),
    };
    let several = listed.addresses.len() > 1;
    let metrics = match &listed.metrics {
        // Its metrics are somewhere that is not known yet, so the cluster cannot be judged.
        Some((_, _, None)) => return Vec::new(),
        Some((host, _, Some(address))) => Some((host.clone(), *address)),
        None => None,
    };
    let whereabouts = Whereabouts {
        host: listed.endpoint.address.clone(),
        pod: listed.endpoint.name.clone(),
        node: listed.node,
        metrics,
    };
    let target = |address: &SocketAddr| Target {
        name: if several { format!("{name}@{}", address.ip()) } else { name.clone() },
        address: *address,
        rank: listed.rank,
        labels: listed.endpoint.labels.clone(),
        events: listed.events.clone(),
        whereabouts: whereabouts.clone(),
    };
    listed.addresses.iter().map(target).collect()
}
