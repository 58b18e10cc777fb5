//! Which endpoints should there be? Flags and files, looked at again and again; the difference to
//! the fleet is applied everywhere at once.
//!
//! A source that cannot be read leaves its endpoints as they were: the error is counted, logged
//! when it changes, and shown at `/endpoints`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvroute_core::fleet::EndpointSpec;
use tracing::{info, warn};

use crate::config::EventsSource;
use crate::events::bound::Bound;
use crate::events::{self, Subscription};
use crate::metrics::ReasonLabel;
use crate::shared::Shared;
use crate::upstream::{Upstream, Whereabouts};

mod file;
mod names;

pub(crate) use file::FileSource;
pub(crate) use names::NameSource;

/// An endpoint that should exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub name: String,
    pub address: SocketAddr,
    pub rank: u32,
    pub labels: BTreeMap<String, String>,
    pub events: EventsSource,
    pub whereabouts: Whereabouts,
}

/// The label that holds the address of an endpoint's node.
const NODE: &str = "kvroute/node-address";

/// The address of the node that labels name; an error says what is wrong.
fn node_of(labels: &BTreeMap<String, String>) -> Result<Option<IpAddr>, String> {
    let wrong = |text: &String| format!("label {NODE}: `{text}` is no IP address");
    let node = labels.get(NODE).filter(|text| !text.is_empty());
    node.map(|text| text.parse().map_err(|_| wrong(text))).transpose()
}

/// Something that lists endpoints.
#[derive(Debug)]
pub(crate) enum Source {
    Names(NameSource),
    File(FileSource),
}

impl Source {
    fn kind(&self) -> &'static str {
        match self {
            Source::Names(_) => "name",
            Source::File(_) => "file",
        }
    }

    /// Looks again; an error leaves what was known.
    async fn refresh(&mut self) -> Result<(), String> {
        match self {
            Source::Names(names) => names.refresh().await,
            Source::File(file) => file.refresh().await,
        }
    }

    fn targets(&self) -> &[Target] {
        match self {
            Source::Names(names) => names.targets(),
            Source::File(file) => file.targets(),
        }
    }
}

/// An endpoint of the fleet and what belongs to it.
struct Member {
    target: Target,
    upstream: Arc<Upstream>,
    subscriber: Option<tokio::task::JoinHandle<()>>,
}

/// Keeps the fleet as the sources say.
pub(crate) struct Discovery {
    shared: Arc<Shared>,
    sources: Vec<(Source, Option<String>)>,
    members: Vec<Member>,
    /// Targets that the fleet refused, so that each is reported once.
    refused: Vec<Target>,
}

impl Discovery {
    pub fn new(shared: Arc<Shared>, sources: Vec<Source>) -> Discovery {
        let sources = sources.into_iter().map(|source| (source, None)).collect();
        Discovery { shared, sources, members: Vec::new(), refused: Vec::new() }
    }

    /// Looks at all sources for ever. Endpoints leave with it when the task is aborted.
    pub async fn run(mut self) {
        let every = kvroute_core::settings::ms(self.shared.settings.discovery_interval_ms.max(50));
        loop {
            tokio::time::sleep(every).await;
            self.refresh().await;
        }
    }

    /// Looks at all sources once and applies the difference.
    pub async fn refresh(&mut self) {
        let mut errors = Vec::new();
        for (source, last_error) in &mut self.sources {
            let error = source.refresh().await.err();
            if let Some(error) = &error {
                let reason = source.kind();
                self.shared.metrics.discovery_errors.get_or_create(&ReasonLabel { reason }).inc();
                if last_error.as_ref() != Some(error) {
                    warn!(source = reason, %error, "Endpoints could not be read; they stay.");
                }
                errors.push(error.clone());
            } else if last_error.is_some() {
                info!(source = source.kind(), "Endpoints can be read again.");
            }
            *last_error = error;
        }
        *self.shared.discovery_errors.lock() = errors;
        self.apply();
        let missing = self.shared.endpoints_missing.is_some();
        if !missing && self.sources.iter().all(Self::is_read) {
            self.shared.sources_read.send_if_modified(|read| !std::mem::replace(read, true));
        }
    }

    /// A source with an error has been read if it lists endpoints all the same: one name out of
    /// several may never be resolved.
    fn is_read((source, error): &(Source, Option<String>)) -> bool {
        error.is_none() || !source.targets().is_empty()
    }

    fn apply(&mut self) {
        let mut wanted: Vec<Target> = Vec::new();
        for target in self.sources.iter().flat_map(|(source, _)| source.targets()) {
            let same = |w: &Target| w.address == target.address && w.rank == target.rank;
            if !wanted.iter().any(same) {
                wanted.push(target.clone());
            }
        }
        let (keep, gone): (Vec<_>, Vec<_>) =
            self.members.drain(..).partition(|m| wanted.contains(&m.target));
        self.members = keep;
        for member in gone {
            self.remove(member);
        }
        self.refused.retain(|t| wanted.contains(t));
        for target in wanted {
            if !self.members.iter().any(|m| m.target == target) {
                self.add(target);
            }
        }
        let all = self.shared.upstreams.all();
        for upstream in &all {
            let ranks = all.iter().filter(|other| other.address == upstream.address).count();
            upstream.shares_address.store(ranks > 1, Ordering::Relaxed);
        }
    }

    fn add(&mut self, target: Target) {
        let shared = &self.shared;
        let events = if shared.wants_events { target.events.clone() } else { EventsSource::Off };
        let spec = EndpointSpec {
            name: target.name.clone(),
            address: target.address.to_string(),
            labels: target.labels.clone(),
            rank: target.rank,
            replay_available: match &events {
                EventsSource::Off | EventsSource::Unselected | EventsSource::Bound => false,
                EventsSource::Ask { .. } => true,
                EventsSource::Ports { replay, .. } => replay.is_some(),
                EventsSource::At { replay, .. } => replay.is_some(),
            },
            events_expected: !matches!(events, EventsSource::Off | EventsSource::Unselected),
        };
        let id = match shared.brain.lock().add_endpoint(shared.clock.now(), spec) {
            Ok(id) => id,
            Err(error) => {
                if !self.refused.contains(&target) {
                    warn!(endpoint = target.name, %error, "An endpoint was refused.");
                    self.refused.push(target);
                }
                return;
            }
        };
        let metrics = shared.metrics.endpoint(&target.name);
        let limits = shared.pool_limits();
        let primary_port = shared.primary_port;
        let upstream = Arc::new(Upstream::new(id, &target, metrics, limits, primary_port));
        let (subscription, subscribes) = match events {
            EventsSource::Off => (Subscription::Off, false),
            EventsSource::Unselected => (Subscription::Unselected, false),
            EventsSource::Bound => {
                let socket = shared.bound.as_ref().map_or_else(String::new, Bound::address);
                (Subscription::Awaited(socket), false)
            }
            _ => (Subscription::Searching, true),
        };
        *upstream.subscription.lock() = subscription;
        shared.upstreams.insert(Arc::clone(&upstream));
        shared.watch(Arc::clone(&upstream));
        let subscriber = subscribes.then(|| {
            tokio::spawn(events::subscribe(Arc::clone(shared), Arc::clone(&upstream), events))
        });
        info!(endpoint = target.name, address = %target.address, "An endpoint joined.");
        self.members.push(Member { target, upstream, subscriber });
    }

    fn remove(&self, member: Member) {
        let Member { target, upstream, subscriber } = member;
        if let Some(task) = subscriber {
            task.abort();
        }
        self.shared.upstreams.remove(upstream.id);
        self.shared.brain.lock().remove_endpoint(self.shared.clock.now(), upstream.id);
        upstream.close_idle();
        self.shared.metrics.forget_endpoint(&target.name);
        info!(endpoint = target.name, "An endpoint left; its requests in flight finish.");
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        for member in &self.members {
            if let Some(task) = &member.subscriber {
                task.abort();
            }
        }
    }
}
