//! Which endpoints exist, and what do we know about each of them right now?

mod attributes;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

pub use self::attributes::ATTRIBUTES_MAX;
use self::attributes::Attributes;
pub use self::state::{AttributeState, EndpointState};
use crate::Time;
use crate::collect::TopologyExtractor;
use crate::settings::{Settings, ms};
use crate::stage::Signals;

/// A place in the fleet table. A slot is reused after its endpoint is gone, with a new
/// generation, so that late messages about the old endpoint are recognised and ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "(u16, u32)", from = "(u16, u32)")]
pub struct EndpointId {
    /// Row of the table.
    pub slot: u16,
    /// How often the row has been given away before this endpoint.
    pub generation: u32,
}

impl From<EndpointId> for (u16, u32) {
    fn from(id: EndpointId) -> (u16, u32) {
        (id.slot, id.generation)
    }
}

impl From<(u16, u32)> for EndpointId {
    fn from((slot, generation): (u16, u32)) -> EndpointId {
        EndpointId { slot, generation }
    }
}

/// A shared, immutable name (endpoint, plugin): cloned into decision records without allocating.
#[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Clone for Name {
    fn clone(&self) -> Name {
        Name(Arc::clone(&self.0))
    }

    /// A record that is written again mostly gets the names that it has.
    fn clone_from(&mut self, source: &Name) {
        if !Arc::ptr_eq(&self.0, &source.0) {
            self.0 = Arc::clone(&source.0);
        }
    }
}

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Name {
        Name(Arc::from(text))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// What a host says about an endpoint when it enters the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSpec {
    /// Shown to users; rows are ordered by it, so that discovery order decides nothing.
    pub name: String,
    /// `host:port` of its HTTP server.
    pub address: String,
    /// Labels that filters read (`llm-d.ai/role`, ...).
    pub labels: BTreeMap<String, String>,
    /// Data parallel rank; 0 where there is one.
    pub rank: u32,
    /// The engine offers a replay socket.
    pub replay_available: bool,
    /// An event stream is configured for it. Without one its cache is known only by what was
    /// routed to it.
    pub events_expected: bool,
}

/// One scrape of an engine's metrics, whatever the engine calls them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineMetrics {
    /// Requests queued in the engine.
    pub waiting: u32,
    /// Requests being computed.
    pub running: u32,
    /// Share of KV blocks in use, 0 to 1.
    #[serde(with = "crate::journal::exact")]
    pub kv_usage: f64,
    /// Tokens per KV block.
    pub block_size: Option<u32>,
    /// KV blocks in total.
    pub blocks: Option<u32>,
    /// Adapter slots.
    pub lora: Option<LoraMetrics>,
    /// Counter: prompt tokens looked up in the engine's prefix cache.
    pub prefix_queries_tokens: Option<u64>,
    /// Counter: of those, tokens found.
    pub prefix_hits_tokens: Option<u64>,
}

/// Which adapters an engine holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraMetrics {
    /// Adapters with running requests.
    pub running: Vec<String>,
    /// Adapters with waiting requests only.
    pub waiting: Vec<String>,
    /// Adapters that fit at once.
    pub max: u32,
}

/// One row of an engine's `/v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServedModel {
    /// Name that requests use.
    pub id: String,
    /// For an adapter: the base model.
    pub parent: Option<String>,
}

/// Where an endpoint runs, as far as its labels tell: what `topology-extractor` of llm-d reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Topology<'a> {
    /// Label `kubernetes.io/hostname`.
    pub hostname: Option<&'a str>,
    /// Label `topology.kubernetes.io/rack`.
    pub rack: Option<&'a str>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<&'a str>,
    /// Label `topology.kubernetes.io/region`.
    pub region: Option<&'a str>,
}

/// How the chain of a request for some model is rooted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootKind {
    /// The endpoint's base model.
    Base,
    /// A LoRA adapter: `Root::Adapter` with the model's name.
    Adapter,
}

/// Why an endpoint cannot enter the fleet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FleetError {
    /// The same address and rank twice.
    #[error("endpoint {address} (rank {rank}) is in the fleet already; list each address once")]
    Duplicate {
        /// `host:port`.
        address: String,
        /// Data parallel rank.
        rank: u32,
    },
    /// The table is full.
    #[error("the fleet holds {endpoints_max} endpoints, its limit; raise kvroute.endpoints_max")]
    Full {
        /// The limit that was reached.
        endpoints_max: u16,
    },
}

/// One endpoint and what is known about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Its place in the table.
    pub id: EndpointId,
    /// Shown to users.
    pub name: Name,
    /// `host:port` of its HTTP server.
    pub address: Name,
    /// Labels that filters read.
    pub labels: BTreeMap<String, String>,
    /// Data parallel rank.
    pub rank: u32,
    /// The engine offers a replay socket.
    pub replay_available: bool,
    /// An event stream is configured for it.
    pub events_expected: bool,
    metrics: Option<(Time, EngineMetrics)>,
    scrape_failures: u32,
    models: Option<Vec<ServedModel>>,
    attributes: Attributes,
    block_size_seen: Option<u32>,
    failures: u32,
    avoided_until: Time,
}

impl Endpoint {
    /// The last metrics, stale or not.
    pub fn metrics(&self) -> Option<&EngineMetrics> {
        self.metrics.as_ref().map(|(_, metrics)| metrics)
    }

    /// How old they are.
    pub fn metrics_age(&self, now: Time) -> Option<Duration> {
        self.metrics.as_ref().map(|(at, _)| now.since(*at))
    }

    /// The load signals, unless they are older than `staleness`.
    pub fn signals(&self, now: Time, staleness: Duration) -> Option<Signals> {
        let (at, m) = self.metrics.as_ref()?;
        let fresh = now.since(*at) <= staleness;
        fresh.then_some(Signals { waiting: m.waiting, running: m.running, kv_usage: m.kv_usage })
    }

    /// Scrapes that failed since the last that did not.
    pub fn scrape_failures(&self) -> u32 {
        self.scrape_failures
    }

    /// Models and adapters that it serves; `None`: it has not been asked.
    pub fn models(&self) -> Option<&[ServedModel]> {
        self.models.as_deref()
    }

    /// Whether it serves a model; `None`: it has not been asked.
    pub fn serves(&self, model: &str) -> Option<bool> {
        let models = self.models.as_ref()?;
        Some(models.iter().any(|served| served.id == model))
    }

    /// A number that a producer told about it, the newest one when none is named; `None`: nothing
    /// was told, or it is older than it was said to hold.
    pub fn attribute(&self, now: Time, key: &str, producer: Option<&str>) -> Option<f64> {
        self.attributes.get(now, key, producer)
    }

    /// Where it runs, by the labels that Kubernetes uses. An empty label tells nothing.
    pub fn topology(&self) -> Topology<'_> {
        let [hostname, rack, zone, region] = [
            "kubernetes.io/hostname",
            "topology.kubernetes.io/rack",
            "topology.kubernetes.io/zone",
            "topology.kubernetes.io/region",
        ]
        .map(|key| self.label(key));
        Topology { hostname, rack, zone, region }
    }

    /// Where it runs, by labels of the user's choice.
    pub fn topology_by(&self, labels: &TopologyExtractor) -> Topology<'_> {
        let TopologyExtractor { hostname, rack, zone, region } = labels;
        let [hostname, rack, zone, region] = [hostname, rack, zone, region].map(|k| self.label(k));
        Topology { hostname, rack, zone, region }
    }

    fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Tokens per block: as its events showed, else as its metrics say.
    pub fn block_size(&self) -> Option<u32> {
        let reported = || self.metrics().and_then(|metrics| metrics.block_size);
        self.block_size_seen.or_else(reported).filter(|block_size| *block_size > 0)
    }

    /// Whether it has failed so recently that others go first.
    pub fn is_avoided(&self, now: Time) -> bool {
        now < self.avoided_until
    }

    /// Failures since its last response.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

/// The table of all endpoints. Iteration goes by name, then address, then rank, so the order in
/// which endpoints were found decides nothing.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    slots: Vec<Slot>,
    order: Vec<u16>,
    adapters: BTreeSet<String>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    generation: u32,
    endpoint: Option<Endpoint>,
}

impl Fleet {
    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// All endpoints by name.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.order.iter().filter_map(|slot| self.slots[usize::from(*slot)].endpoint.as_ref())
    }

    /// One endpoint; `None` once it has left.
    pub fn get(&self, id: EndpointId) -> Option<&Endpoint> {
        let slot = self.slots.get(usize::from(id.slot))?;
        slot.endpoint.as_ref().filter(|_| slot.generation == id.generation)
    }

    /// The endpoint of a name.
    pub fn by_name(&self, name: &str) -> Option<&Endpoint> {
        self.iter().find(|endpoint| endpoint.name.as_str() == name)
    }

    /// How the chain of a request for `model` is rooted: a model that any endpoint lists with a
    /// parent, or has as an adapter, is one.
    pub fn root_of(&self, model: &str) -> RootKind {
        if self.adapters.contains(model) { RootKind::Adapter } else { RootKind::Base }
    }

    pub(crate) fn add(
        &mut self,
        spec: EndpointSpec,
        endpoints_max: u16,
    ) -> Result<EndpointId, FleetError> {
        let EndpointSpec { name, address, labels, rank, replay_available, events_expected } = spec;
        if self.iter().any(|e| e.address.as_str() == address && e.rank == rank) {
            return Err(FleetError::Duplicate { address, rank });
        }
        if self.len() >= usize::from(endpoints_max) {
            return Err(FleetError::Full { endpoints_max });
        }
        let free = self.slots.iter().position(|slot| slot.endpoint.is_none());
        let slot = free.unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let place = &mut self.slots[slot];
        // The limit is a u16, so every slot is one.
        let id = EndpointId { slot: slot as u16, generation: place.generation };
        place.endpoint = Some(Endpoint {
            id,
            name: Name::from(name.as_str()),
            address: Name::from(address.as_str()),
            labels,
            rank,
            replay_available,
            events_expected,
            metrics: None,
            scrape_failures: 0,
            models: None,
            attributes: Attributes::default(),
            block_size_seen: None,
            failures: 0,
            avoided_until: Time::ZERO,
        });
        let mut order: Vec<u16> = self.order.drain(..).chain([id.slot]).collect();
        order.sort_by(|a, b| self.sort_key(*a).cmp(&self.sort_key(*b)));
        self.order = order;
        Ok(id)
    }

    fn sort_key(&self, slot: u16) -> Option<(&Name, &Name, u32)> {
        let endpoint = self.slots[usize::from(slot)].endpoint.as_ref()?;
        Some((&endpoint.name, &endpoint.address, endpoint.rank))
    }

    /// Whether there was such an endpoint.
    pub(crate) fn remove(&mut self, id: EndpointId) -> bool {
        if self.get(id).is_none() {
            return false;
        }
        let slot = &mut self.slots[usize::from(id.slot)];
        slot.endpoint = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.order.retain(|slot| *slot != id.slot);
        self.collect_adapters();
        true
    }

    fn get_mut(&mut self, id: EndpointId) -> Option<&mut Endpoint> {
        let slot = self.slots.get_mut(usize::from(id.slot))?;
        slot.endpoint.as_mut().filter(|_| slot.generation == id.generation)
    }

    pub(crate) fn on_metrics(&mut self, now: Time, id: EndpointId, metrics: &EngineMetrics) {
        let Some(endpoint) = self.get_mut(id) else { return };
        let mut metrics = metrics.clone();
        metrics.kv_usage = metrics.kv_usage.clamp(0.0, 1.0);
        let lora = metrics.lora.iter();
        let names: Vec<String> =
            lora.flat_map(|l| l.running.iter().chain(&l.waiting)).cloned().collect();
        if endpoint.scrape_failures > 0 {
            // It was gone and is back: what failed then says nothing now.
            endpoint.failures = 0;
            endpoint.avoided_until = Time::ZERO;
        }
        endpoint.scrape_failures = 0;
        endpoint.metrics = Some((now, metrics));
        self.adapters.extend(names);
    }

    pub(crate) fn on_scrape_failed(&mut self, id: EndpointId) {
        if let Some(endpoint) = self.get_mut(id) {
            endpoint.scrape_failures = endpoint.scrape_failures.saturating_add(1);
        }
    }

    pub(crate) fn on_models(&mut self, id: EndpointId, models: Vec<ServedModel>) {
        if let Some(endpoint) = self.get_mut(id) {
            endpoint.models = Some(models);
            self.collect_adapters();
        }
    }

    pub(crate) fn on_attributes(
        &mut self,
        now: Time,
        id: EndpointId,
        producer: &str,
        values: &[(String, f64)],
        valid_for: Duration,
    ) {
        if let Some(endpoint) = self.get_mut(id) {
            endpoint.attributes.set(now, producer, values, valid_for);
        }
    }

    /// Whether this is news.
    pub(crate) fn on_block_size(&mut self, id: EndpointId, block_size: Option<u32>) -> bool {
        let Some(endpoint) = self.get_mut(id) else { return false };
        if block_size.is_none() || endpoint.block_size_seen == block_size {
            return false;
        }
        endpoint.block_size_seen = block_size;
        true
    }

    pub(crate) fn on_failed(&mut self, now: Time, id: EndpointId, settings: &Settings) {
        let Some(endpoint) = self.get_mut(id) else { return };
        let doublings = endpoint.failures.min(16);
        let wait_ms = settings.failure_backoff_ms.saturating_mul(1 << doublings);
        endpoint.failures = endpoint.failures.saturating_add(1);
        endpoint.avoided_until = now + ms(wait_ms.min(settings.failure_backoff_max_ms));
    }

    pub(crate) fn on_answered(&mut self, id: EndpointId) {
        if let Some(endpoint) = self.get_mut(id) {
            endpoint.failures = 0;
            endpoint.avoided_until = Time::ZERO;
        }
    }

    fn collect_adapters(&mut self) {
        let mut adapters = BTreeSet::new();
        for endpoint in self.iter() {
            let listed = endpoint.models.iter().flatten().filter(|model| model.parent.is_some());
            adapters.extend(listed.map(|model| model.id.clone()));
            let lora = endpoint.metrics().and_then(|metrics| metrics.lora.as_ref());
            let loaded = lora.into_iter().flat_map(|lora| lora.running.iter().chain(&lora.waiting));
            adapters.extend(loaded.cloned());
        }
        self.adapters = adapters;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str) -> EndpointSpec {
        EndpointSpec {
            name: name.into(),
            address: format!("{name}:80"),
            labels: BTreeMap::new(),
            rank: 0,
            replay_available: false,
            events_expected: true,
        }
    }

    #[test]
    fn order_is_by_name_and_stale_ids_mean_nothing() {
        let mut fleet = Fleet::default();
        let ids: Vec<_> = ["c", "a", "b"].map(|n| fleet.add(spec(n), 10).unwrap()).into();
        let names = |fleet: &Fleet| fleet.iter().map(|e| e.name.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&fleet), ["a", "b", "c"]);
        assert!(fleet.remove(ids[1]));
        assert!(!fleet.remove(ids[1]));
        let again = fleet.add(spec("d"), 10).unwrap();
        assert_eq!((again.slot, again.generation), (ids[1].slot, ids[1].generation + 1));
        assert_eq!(fleet.get(ids[1]), None);
        assert_eq!(names(&fleet), ["b", "c", "d"]);
    }

    #[test]
    fn duplicates_and_too_many_are_refused() {
        let mut fleet = Fleet::default();
        fleet.add(spec("a"), 2).unwrap();
        let twice = fleet.add(spec("a"), 2).unwrap_err();
        assert_eq!(twice, FleetError::Duplicate { address: "a:80".into(), rank: 0 });
        fleet.add(spec("b"), 2).unwrap();
        assert_eq!(fleet.add(spec("c"), 2), Err(FleetError::Full { endpoints_max: 2 }));
    }

    #[test]
    fn adapters_are_models_with_a_parent_and_go_with_their_endpoint() {
        let mut fleet = Fleet::default();
        let id = fleet.add(spec("a"), 2).unwrap();
        let model = |id: &str, parent: Option<&str>| ServedModel {
            id: id.into(),
            parent: parent.map(str::to_owned),
        };
        fleet.on_models(id, vec![model("base", None), model("adapter", Some("base"))]);
        assert_eq!(fleet.root_of("base"), RootKind::Base);
        assert_eq!(fleet.root_of("adapter"), RootKind::Adapter);
        fleet.remove(id);
        assert_eq!(fleet.root_of("adapter"), RootKind::Base);
    }

    #[test]
    fn topology_is_what_the_labels_say() {
        let mut fleet = Fleet::default();
        let labels = [
            ("kubernetes.io/hostname", "node-1"),
            ("topology.kubernetes.io/zone", "z"),
            ("topology.kubernetes.io/rack", ""),
        ];
        let labels = labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let id = fleet.add(EndpointSpec { labels, ..spec("a") }, 2).unwrap();
        let expected =
            Topology { hostname: Some("node-1"), zone: Some("z"), ..Topology::default() };
        let endpoint = fleet.get(id).unwrap();
        assert_eq!(endpoint.topology(), expected);
        assert_eq!(endpoint.topology_by(&TopologyExtractor::default()), expected);
        let own = TopologyExtractor {
            region: "topology.kubernetes.io/zone".to_owned(),
            zone: "none".to_owned(),
            ..TopologyExtractor::default()
        };
        let expected =
            Topology { hostname: Some("node-1"), region: Some("z"), ..Topology::default() };
        assert_eq!(endpoint.topology_by(&own), expected);
    }

    #[test]
    fn attributes_are_of_one_endpoint_and_go_with_it() {
        let mut fleet = Fleet::default();
        let [a, b] = ["a", "b"].map(|name| fleet.add(spec(name), 3).unwrap());
        let values = [("k".to_owned(), 0.25)];
        fleet.on_attributes(Time(1), a, "p", &values, Duration::from_secs(1));
        let read = |fleet: &Fleet, id| fleet.get(id)?.attribute(Time(2), "k", Some("p"));
        assert_eq!((read(&fleet, a), read(&fleet, b)), (Some(0.25), None));
        fleet.remove(a);
        fleet.on_attributes(Time(1), a, "p", &values, Duration::from_secs(1));
        let again = fleet.add(spec("a"), 3).unwrap();
        assert_eq!(read(&fleet, again), None);
    }

    #[test]
    fn failures_double_the_wait_and_an_answer_ends_it() {
        let mut fleet = Fleet::default();
        let id = fleet.add(spec("a"), 2).unwrap();
        let settings = Settings {
            failure_backoff_ms: 100,
            failure_backoff_max_ms: 250,
            ..Settings::default()
        };
        for wait_ms in [100, 200, 250, 250] {
            fleet.on_failed(Time(0), id, &settings);
            let endpoint = fleet.get(id).unwrap();
            assert!(endpoint.is_avoided(Time(wait_ms * 1_000_000 - 1)));
            assert!(!endpoint.is_avoided(Time(wait_ms * 1_000_000)));
        }
        fleet.on_answered(id);
        assert!(!fleet.get(id).unwrap().is_avoided(Time(0)));
    }
}
