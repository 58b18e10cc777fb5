//! What does a folder with a recording hold?

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use kvroute_core::event::KvEvent;
use kvroute_wire::api::Api;
use kvroute_wire::trace::{self, RecordedMessage, RecordedRequest};
use kvroute_wire::{kv_event, models};

/// A recording, read whole.
#[derive(Debug)]
pub struct Recording {
    /// In the order in which they began.
    pub requests: Vec<RecordedRequest>,
    /// Event messages by the port of their engine, in recorded order.
    pub messages: BTreeMap<u16, Vec<RecordedMessage>>,
    /// Names of LoRA adapters.
    pub adapters: BTreeSet<String>,
}

impl Recording {
    /// Reads `requests.jsonl` and every `kv_events*.jsonl` of a folder.
    ///
    /// # Errors
    /// A file that is missing or cannot be read, and events that belong to no engine.
    pub fn read(dir: &Path) -> anyhow::Result<Recording> {
        let path = dir.join("requests.jsonl");
        let text = fs::read(&path).with_context(|| {
            let dir = dir.display();
            format!("{dir} is no recording: it must hold requests.jsonl and kv_events*.jsonl")
        })?;
        let mut requests = trace::requests(&text)
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("{} is not a recording", path.display()))?;
        if requests.is_empty() {
            bail!("{} holds no requests", path.display());
        }
        requests.sort_by_key(|request| request.t_start_unix_ns);
        let messages = read_messages(dir, &requests)?;
        let adapters = adapters(&requests, &messages);
        Ok(Recording { requests, messages, adapters })
    }

    /// Whether another routed request ran on the same engine at the same time.
    pub fn overlaps(&self, at: usize) -> bool {
        let this = &self.requests[at];
        self.requests.iter().enumerate().any(|(other_at, other)| {
            other_at != at
                && other.port == this.port
                && Api::from_path(&other.path).tells_usage()
                && other.t_start_unix_ns < this.t_end_unix_ns
                && this.t_start_unix_ns < other.t_end_unix_ns
        })
    }
}

/// One file serves a recording of one engine; with several, each file's name ends in the port.
fn read_messages(
    dir: &Path,
    requests: &[RecordedRequest],
) -> anyhow::Result<BTreeMap<u16, Vec<RecordedMessage>>> {
    let ports: BTreeSet<u16> = requests.iter().map(|request| request.port).collect();
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(rest) = name.strip_prefix("kv_events").and_then(|n| n.strip_suffix(".jsonl"))
        else {
            continue;
        };
        let named = rest.trim_start_matches(['-', '_', '.']).parse().ok();
        let only = (ports.len() == 1).then(|| ports.first().copied()).flatten();
        let Some(port) = named.filter(|port| ports.contains(port)).or(only) else {
            bail!("{}: which engine's? Name it kv_events-PORT.jsonl", path.display());
        };
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let messages = trace::messages(&text)
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("{} is not a recording", path.display()))?;
        found.entry(port).or_insert_with(Vec::new).extend(messages);
    }
    if found.is_empty() {
        bail!("{} has no kv_events*.jsonl", dir.display());
    }
    Ok(found)
}

/// Adapters as `/v1/models` lists them, and as blocks were stored for them (a recorded answer may
/// be cut short).
fn adapters(
    requests: &[RecordedRequest],
    messages: &BTreeMap<u16, Vec<RecordedMessage>>,
) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for request in requests.iter().filter(|request| request.path.ends_with("/v1/models")) {
        let listed = models::parse(request.response.as_bytes()).unwrap_or_default();
        names.extend(listed.into_iter().filter(|m| m.parent.is_some()).map(|m| m.id));
    }
    for message in messages.values().flatten() {
        let batch = message.payload().and_then(|payload| kv_event::decode_batch(payload).ok());
        for event in batch.into_iter().flat_map(|batch| batch.events) {
            if let KvEvent::Stored(stored) = event {
                names.extend(stored.lora_name);
            }
        }
    }
    names
}
