//! How is the fleet as a whole? Gauges, and counters whose truth is kept elsewhere, brought up to
//! date just before they are read.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvroute_core::brain::Brain;
use kvroute_core::fleet::EndpointId;
use kvroute_core::load::Load;
use kvroute_core::plan::Plan;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{PluginLabels, producer, split};
use crate::config::UpstreamNames;
use crate::events::Subscription;
use crate::metrics::mirror;
use crate::upstream::Upstream;

/// Gauge of any number.
type GaugeF64 = Gauge<f64, AtomicU64>;

/// The fleet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabels {
    name: String,
}

/// One endpoint of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemberLabels {
    name: String,
    model_server_endpoint: String,
}

/// One endpoint, and who counts what is in flight there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InflightLabels {
    endpoint_name: String,
    namespace: String,
    producer_name: &'static str,
}

/// One endpoint, as a publisher of events.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PublisherLabels {
    pod_identifier: String,
}

/// Mean and standard deviation of a number over all endpoints that tell it.
struct Spread {
    mean: GaugeF64,
    std_dev: GaugeF64,
}

/// The gauges.
pub(crate) struct Pool {
    name: String,
    ready: Gauge,
    kv_usage: Spread,
    queue: Spread,
    running: Spread,
    queues: Family<MemberLabels, Gauge>,
    inflight_requests: Family<InflightLabels, Gauge>,
    inflight_tokens: Family<InflightLabels, Gauge<i64>>,
    index_size: Option<Gauge>,
    events: Option<Events>,
}

/// What the plan's events tell.
struct Events {
    admissions: Counter,
    evictions: Counter,
    /// Blocks that were stored and removed on each endpoint when they were last looked at.
    seen: Mutex<HashMap<EndpointId, (u64, u64)>>,
    subscribers: Gauge,
    reconnections: Family<PublisherLabels, Counter>,
    messages: Family<PublisherLabels, Counter>,
}

impl Pool {
    /// All families that have a meaning under `plan`, registered.
    pub fn new(r: &mut Registry, names: &UpstreamNames, plan: &Plan) -> Pool {
        let labels = PoolLabels { name: names.pool.clone() };
        let mut gauge = |name: &str, help: &str| {
            let family = Family::<PoolLabels, GaugeF64>::default();
            r.register(name, help, family.clone());
            family.get_or_create_owned(&labels)
        };
        let mut spread = |what: &str, help: &str| Spread {
            mean: gauge(&format!("average_{what}"), &format!("{help}, mean over endpoints")),
            std_dev: gauge(&format!("std_dev_{what}"), &format!("{help}, standard deviation")),
        };
        let kv_usage = spread("kv_cache_utilization", "KV blocks in use, 0 to 1");
        let queue = spread("queue_size", "Requests queued in engines");
        let running = spread("running_requests", "Requests being computed");
        let ready = Family::<PoolLabels, Gauge>::default();
        r.register("ready_endpoints", "Endpoints that answer", ready.clone());
        let pool = Pool {
            name: names.pool.clone(),
            ready: ready.get_or_create_owned(&labels),
            kv_usage,
            queue,
            running,
            queues: Family::default(),
            inflight_requests: Family::default(),
            inflight_tokens: Family::default(),
            index_size: producer(plan).map(|producer| index_size(r, &producer)),
            events: plan.reads_events().then(|| Events::new(r)),
        };
        r.register("per_endpoint_queue_size", "Requests queued in an engine", pool.queues.clone());
        let help = "Requests between decision and end";
        r.register("inflight_requests", help, pool.inflight_requests.clone());
        let help = "Tokens still to be computed for them";
        r.register("inflight_tokens", help, pool.inflight_tokens.clone());
        pool
    }

    /// Copies what the brain and the endpoints say now.
    pub fn mirror(&self, brain: &Brain, upstreams: &[Arc<Upstream>]) {
        let told = |upstream: &Arc<Upstream>| brain.fleet().get(upstream.id)?.metrics();
        let told: Vec<_> = upstreams.iter().map(told).collect();
        let numbers = || told.iter().flatten();
        self.kv_usage.set(numbers().map(|m| m.kv_usage));
        self.queue.set(numbers().map(|m| f64::from(m.waiting)));
        self.running.set(numbers().map(|m| f64::from(m.running)));
        let answers = upstreams.iter().filter(|u| u.up.load(Ordering::Relaxed)).count();
        self.ready.set(whole(answers as u64));
        // Endpoints that left take their series with them.
        self.queues.clear();
        self.inflight_requests.clear();
        self.inflight_tokens.clear();
        for (upstream, told) in upstreams.iter().zip(&told) {
            let load = brain.load(upstream.id);
            self.mirror_endpoint(&upstream.name, told.map(|m| m.waiting), load);
        }
        if let Some(size) = &self.index_size {
            size.set(whole(brain.index().usage().holders as u64));
        }
        if let Some(events) = &self.events {
            events.mirror(brain, upstreams);
        }
    }

    fn mirror_endpoint(&self, endpoint: &str, waiting: Option<u32>, load: Load) {
        let (namespace, name) = split(endpoint);
        if let Some(waiting) = waiting {
            let (name, model_server_endpoint) = (self.name.clone(), name.to_owned());
            let labels = MemberLabels { name, model_server_endpoint };
            self.queues.get_or_create(&labels).set(i64::from(waiting));
        }
        let labels = InflightLabels {
            endpoint_name: name.to_owned(),
            namespace: namespace.to_owned(),
            producer_name: "inflight-load-producer",
        };
        self.inflight_requests.get_or_create(&labels).set(i64::from(load.requests));
        self.inflight_tokens.get_or_create(&labels).set(whole(load.tokens));
    }

    /// A series in every family with endpoints' labels.
    #[cfg(test)]
    pub fn fill(&self, endpoint: &str) {
        self.mirror_endpoint(endpoint, Some(0), Load::default());
        if let Some(events) = &self.events {
            events.mirror_endpoint(endpoint, 0, 0);
        }
    }
}

fn index_size(r: &mut Registry, producer: &PluginLabels) -> Gauge {
    let size = Family::<PluginLabels, Gauge>::default();
    let help = "Pairs of block and endpoint in the index";
    r.register("prefix_indexer_size", help, size.clone());
    size.get_or_create_owned(producer)
}

impl Spread {
    /// 0 of nothing.
    fn set(&self, values: impl Iterator<Item = f64> + Clone) {
        let count = values.clone().count().max(1) as f64;
        let mean = values.clone().sum::<f64>() / count;
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        self.mean.set(mean);
        self.std_dev.set(variance.sqrt());
    }
}

impl Events {
    fn new(r: &mut Registry) -> Events {
        let events = Events {
            admissions: Counter::default(),
            evictions: Counter::default(),
            seen: Mutex::default(),
            subscribers: Gauge::default(),
            reconnections: Family::default(),
            messages: Family::default(),
        };
        let help = "Blocks that came into the index by events";
        r.register("kv_cache_index_admissions", help, events.admissions.clone());
        let help = "Blocks that left it by events";
        r.register("kv_cache_index_evictions", help, events.evictions.clone());
        let help = "Endpoints whose events are subscribed to, or should be";
        r.register("kv_cache_events_active_subscribers", help, events.subscribers.clone());
        let help = "Connections to publishers after the first";
        r.register("kv_cache_events_subscriber_reconnections", help, events.reconnections.clone());
        let help = "Messages received from publishers";
        r.register("kv_cache_events_messages_received", help, events.messages.clone());
        events
    }

    fn mirror(&self, brain: &Brain, upstreams: &[Arc<Upstream>]) {
        let mut seen = self.seen.lock();
        seen.retain(|id, _| upstreams.iter().any(|upstream| upstream.id == *id));
        self.reconnections.clear();
        self.messages.clear();
        let mut subscribers = 0;
        for upstream in upstreams {
            if let Some(applied) = brain.stream_applied(upstream.id) {
                let (stored, removed) = seen.entry(upstream.id).or_default();
                self.admissions.inc_by(applied.stored.saturating_sub(*stored));
                self.evictions.inc_by(applied.removed.saturating_sub(*removed));
                (*stored, *removed) = (applied.stored, applied.removed);
            }
            let off = [Subscription::Off, Subscription::Unselected];
            if off.contains(&upstream.subscription.lock()) {
                continue;
            }
            subscribers += 1;
            let metrics = &upstream.metrics;
            let (connects, messages) = (&metrics.stream_reconnects, &metrics.stream_messages);
            self.mirror_endpoint(&upstream.name, connects.get(), messages.get());
        }
        self.subscribers.set(subscribers);
    }

    fn mirror_endpoint(&self, endpoint: &str, reconnections: u64, messages: u64) {
        let (namespace, name) = split(endpoint);
        let labels = PublisherLabels { pod_identifier: format!("{namespace}/{name}") };
        mirror(&self.reconnections.get_or_create(&labels), reconnections);
        mirror(&self.messages.get_or_create(&labels), messages);
    }
}

fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
