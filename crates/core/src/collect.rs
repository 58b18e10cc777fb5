//! Where do signals come from? llm-d's data layer: which pages of an endpoint are read, how often,
//! and what each of their numbers means.
//!
//! A [`CollectPlan`] is made from the plugins that `dataLayer` binds; the host reads pages by it.

mod core_metrics_extractor;
mod dcgm_data_source;
mod dcgm_extractor;
mod endpoint_notification_source;
mod file_discovery;
mod k8s_notification_source;
mod metric_spec;
mod metrics_data_source;
mod models_data_extractor;
mod models_data_source;
mod multicluster_file_discovery;
mod multicluster_metrics_data_source;
mod multicluster_metrics_extractor;
mod source;
#[cfg(test)]
mod tests;
mod topology_extractor;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::fleet::Name;
use crate::stage::Plugin;

pub use core_metrics_extractor::{CoreMetricsExtractor, CustomMetric, EngineConfig};
pub use core_metrics_extractor::{ENGINE_LABEL, ENGINE_LABEL_LEGACY};
pub use dcgm_data_source::DcgmDataSource;
pub use dcgm_extractor::DcgmExtractor;
pub use endpoint_notification_source::EndpointNotificationSource;
pub use file_discovery::FileDiscovery;
pub use k8s_notification_source::K8sNotificationSource;
pub use metric_spec::MetricSpec;
pub use metrics_data_source::MetricsDataSource;
pub use models_data_extractor::ModelsDataExtractor;
pub use models_data_source::ModelsDataSource;
pub use multicluster_file_discovery::MulticlusterFileDiscovery;
pub use multicluster_metrics_data_source::{
    MULTICLUSTER_PAGE_BYTES_MAX, MulticlusterMetricsDataSource,
};
pub use multicluster_metrics_extractor::{
    MULTICLUSTER_KV_USAGE, MULTICLUSTER_QUEUE, MulticlusterMetricsExtractor,
};
pub use source::{BASE_TICK, Scheme, TlsOptions};
pub use topology_extractor::TopologyExtractor;

/// Key of the busiest GPU's use, 0 to 1.
pub const GPU_UTILIZATION: &str = "GPUUtilization";

/// How often a page is read that nobody set an interval for, where that is not the scraping
/// interval: DCGM exporters measure every second at best.
const DCGM_INTERVAL: Duration = Duration::from_secs(1);

/// Everything that is collected from endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectPlan {
    /// Pages with metrics. The first tells whether an endpoint answers at all, and its engine
    /// reading how loaded it is.
    pub pages: Vec<PagePlan>,
    /// Where models are listed.
    pub models: Ask,
    /// Where endpoints are listed.
    pub discovery: Option<DiscoveryPlan>,
    /// Labels that tell where endpoints run.
    pub topology: TopologyExtractor,
    /// What was configured and has no effect, in words.
    pub notes: Vec<String>,
}

/// A page of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagePlan {
    /// Where it is.
    pub ask: Ask,
    /// What is read from it.
    pub readings: Vec<Reading>,
}

/// Where something is asked for, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Name of the source.
    pub source: Name,
    /// With or without TLS.
    pub scheme: Scheme,
    /// Path, slash included.
    pub path: String,
    /// Port other than the endpoint's own.
    pub port: Option<u16>,
    /// At the endpoint's node rather than at the endpoint, where the node is known.
    pub at_node: bool,
    /// For [`Scheme::Https`].
    pub tls: TlsOptions,
    /// Between two readings; `None`: as the settings say.
    pub interval: Option<Duration>,
    /// Largest page; `None`: as the settings say.
    pub bytes_max: Option<usize>,
}

/// What is read from a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// An engine's load, and numbers of the user's choice.
    Engine(EngineReading),
    /// The busiest GPU, as [`GPU_UTILIZATION`].
    Gpu {
        /// Name of the extractor.
        producer: Name,
    },
    /// Numbers by key.
    Scalars {
        /// Name of the extractor.
        producer: Name,
        /// Keys and metrics.
        scalars: Vec<(String, MetricSpec)>,
    },
}

/// How an engine's page is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineReading {
    /// Name of the extractor.
    pub producer: Name,
    /// Label that names an endpoint's engine.
    pub engine_label: String,
    /// Engine of endpoints without the label; `None`: told from the names on the page.
    pub default_engine: Option<Name>,
    /// All engines.
    pub engines: Vec<EngineSpec>,
    /// Engines that can be told from names, the one that wins first.
    pub detected: Vec<Name>,
}

impl EngineReading {
    /// The engine of an endpoint with these labels; `None`: to be told from its page. A name that
    /// nobody knows counts as none.
    pub fn engine_of(&self, labels: &BTreeMap<String, String>) -> Option<&EngineSpec> {
        let known = |name: &str| self.engines.iter().find(|e| e.name.as_str() == name);
        let label = |key: &str| labels.get(key).filter(|name| !name.is_empty());
        let named = label(&self.engine_label).or_else(|| label(ENGINE_LABEL_LEGACY));
        let default = || self.default_engine.as_ref().and_then(|name| known(name.as_str()));
        named.and_then(|name| known(name)).or_else(default)
    }
}

/// One engine's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineSpec {
    /// As the engine label has it.
    pub name: Name,
    /// What its page says about its load.
    pub signals: Vec<(Signal, MetricSpec)>,
    /// Further numbers by key.
    pub scalars: Vec<(String, MetricSpec)>,
}

/// What a metric tells about an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Requests queued.
    Waiting,
    /// Requests being computed.
    Running,
    /// Share of KV blocks in use, 0 to 1.
    KvUsage,
    /// Tokens per block.
    BlockSize,
    /// Number of blocks.
    Blocks,
    /// Counter: prompt tokens looked up in the prefix cache.
    PrefixQueries,
    /// Counter: of those, tokens found.
    PrefixHits,
    /// Adapters, in labels.
    Lora,
    /// Block size and number of blocks, in labels.
    CacheInfo {
        /// Label with the block size.
        block_size_label: String,
        /// Label with the number of blocks.
        blocks_label: String,
    },
}

/// Where endpoints are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryPlan {
    /// The file.
    pub path: String,
    /// Read it again when it changes.
    pub watch: bool,
    /// Its endpoints are clusters: labels tell where their metrics are.
    pub clusters: bool,
}

/// A source as configured.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceSpec {
    /// `metrics-data-source`.
    Metrics(MetricsDataSource),
    /// `models-data-source`.
    Models(ModelsDataSource),
    /// `dcgm-data-source`.
    Dcgm(DcgmDataSource),
    /// `multicluster-metrics-data-source`.
    MulticlusterMetrics(MulticlusterMetricsDataSource),
    /// `k8s-notification-source`.
    K8sNotification(K8sNotificationSource),
    /// `endpoint-notification-source`.
    EndpointNotification(EndpointNotificationSource),
}

/// An extractor as configured.
#[derive(Clone, Debug, PartialEq)]
pub enum ExtractorSpec {
    /// `core-metrics-extractor`.
    CoreMetrics(CoreMetricsExtractor),
    /// `models-data-extractor`.
    Models(ModelsDataExtractor),
    /// `dcgm-extractor`.
    Dcgm(DcgmExtractor),
    /// `topology-extractor`.
    Topology(TopologyExtractor),
    /// `multicluster-metrics-extractor`.
    MulticlusterMetrics(MulticlusterMetricsExtractor),
}

/// Where endpoints are listed, as configured.
#[derive(Clone, Debug, PartialEq)]
pub enum DiscoverySpec {
    /// `file-discovery`.
    File(FileDiscovery),
    /// `multicluster-file-discovery`.
    MulticlusterFile(MulticlusterFileDiscovery),
}

/// One entry of `dataLayer.sources`.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceEntry {
    /// Name of the source.
    pub name: Name,
    /// Its type and parameters.
    pub spec: SourceSpec,
    /// Its extractors with their names, in order.
    pub extractors: Vec<(Name, ExtractorSpec)>,
}

/// Why sources and extractors do not make a plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CollectError {
    /// Index in `dataLayer.sources`; `None`: the fault is in `dataLayer.discovery`.
    pub source_at: Option<usize>,
    /// Index in the source's `extractors`; `None`: the fault is in the source itself.
    pub extractor_at: Option<usize>,
    /// What is wrong and what to do.
    pub message: String,
}

impl Default for CollectPlan {
    fn default() -> CollectPlan {
        let name = Name::from("core-metrics-extractor");
        let engine = CoreMetricsExtractor::default();
        let engine = engine.reading(&name).expect("the built-in engines are well formed");
        CollectPlan {
            pages: vec![PagePlan {
                ask: metrics_ask(&Name::from("metrics-data-source"), &MetricsDataSource::default()),
                readings: vec![Reading::Engine(engine)],
            }],
            ..CollectPlan::without_pages()
        }
    }
}

impl CollectPlan {
    fn without_pages() -> CollectPlan {
        CollectPlan {
            pages: Vec::new(),
            models: models_ask(&Name::from("models-data-source"), &ModelsDataSource::default()),
            discovery: None,
            topology: TopologyExtractor::default(),
            notes: Vec::new(),
        }
    }

    /// The plan of a `dataLayer`. `inject_defaults` adds the default metrics source and its
    /// extractor where no `metrics-data-source` is listed.
    ///
    /// # Errors
    /// [`CollectError`]: parameters that make no sense, or an extractor that cannot read what its
    /// source delivers.
    pub fn build(
        sources: &[SourceEntry],
        inject_defaults: bool,
        discovery: Option<&DiscoverySpec>,
    ) -> Result<CollectPlan, CollectError> {
        let mut plan = CollectPlan::without_pages();
        for (at, entry) in sources.iter().enumerate() {
            let here = |(extractor_at, message)| CollectError {
                source_at: Some(at),
                extractor_at,
                message,
            };
            plan.add(entry).map_err(here)?;
        }
        let is_metrics = |entry: &SourceEntry| matches!(entry.spec, SourceSpec::Metrics(_));
        if inject_defaults && !sources.iter().any(is_metrics) {
            plan.pages.extend(CollectPlan::default().pages);
        }
        plan.order_pages();
        if let Some(discovery) = discovery {
            let there = |message| CollectError { source_at: None, extractor_at: None, message };
            discovery.check().map_err(there)?;
            plan.discovery = Some(discovery.plan());
        }
        Ok(plan)
    }

    /// The first page is the one with an engine's load.
    fn order_pages(&mut self) {
        let has_load = |page: &PagePlan| {
            page.readings.iter().any(|reading| matches!(reading, Reading::Engine(_)))
        };
        match self.pages.iter().position(has_load) {
            Some(at) => self.pages[..=at].rotate_right(1),
            None => self.notes.push(
                "dataLayer: no source has a core-metrics-extractor, so nothing is known about the \
                 load of endpoints beyond the router's own requests"
                    .to_owned(),
            ),
        }
        let pages = self.pages.iter().filter(|page| has_load(page)).count();
        if pages > 1 {
            let first = &self.pages[0].ask.source;
            self.notes.push(format!(
                "dataLayer: {pages} sources have a core-metrics-extractor; `{first}` tells the \
                 load, the others only their customMetrics"
            ));
        }
    }

    /// Keys of attributes with the producers that tell them.
    pub fn attributes(&self) -> impl Iterator<Item = (&Name, &str)> {
        let readings = self.pages.iter().flat_map(|page| &page.readings);
        readings.flat_map(Reading::attributes)
    }

    fn add(&mut self, entry: &SourceEntry) -> Result<(), (Option<usize>, String)> {
        let SourceEntry { name, spec, extractors } = entry;
        spec.check().map_err(|message| (None, message))?;
        let mut readings = Vec::new();
        for (at, (extractor, what)) in extractors.iter().enumerate() {
            let here = |message| (Some(at), message);
            if !spec.feeds(what) {
                return Err(here(format!(
                    "`{extractor}` is a {}, which cannot read what a {} delivers; it reads {}",
                    what.type_name(),
                    spec.type_name(),
                    what.reads(),
                )));
            }
            readings.extend(self.reading(extractor, what).map_err(here)?);
        }
        let page = |ask: Ask| PagePlan { ask, readings };
        match spec {
            SourceSpec::Metrics(source) => self.add_page(page(metrics_ask(name, source))),
            SourceSpec::Dcgm(source) => self.add_page(page(dcgm_ask(name, source))),
            SourceSpec::MulticlusterMetrics(source) => {
                if source.port != 0 {
                    self.notes.push(format!("`{name}`: port has no effect on clusters"));
                }
                self.add_page(page(multicluster_ask(name, source)));
            }
            SourceSpec::Models(source) => self.models = models_ask(name, source),
            SourceSpec::K8sNotification(source) => self.notes.push(format!(
                "`{name}`: {} objects are not watched; this version does not ask Kubernetes",
                source.kind
            )),
            SourceSpec::EndpointNotification(_) => {}
        }
        Ok(())
    }

    fn add_page(&mut self, page: PagePlan) {
        if page.readings.is_empty() {
            let name = &page.ask.source;
            self.notes.push(format!("`{name}`: no extractor reads it, so it is not asked"));
            return;
        }
        if page.ask.tls.skip_verify && page.ask.tls.ca_cert.is_some() {
            let name = &page.ask.source;
            self.notes.push(format!(
                "`{name}`: caCertPath has no effect while insecureSkipVerify is true"
            ));
        }
        self.pages.push(page);
    }

    fn reading(
        &mut self,
        name: &Name,
        extractor: &ExtractorSpec,
    ) -> Result<Option<Reading>, String> {
        let producer = name.clone();
        Ok(match extractor {
            ExtractorSpec::CoreMetrics(core) => Some(Reading::Engine(core.reading(name)?)),
            ExtractorSpec::Dcgm(_) => Some(Reading::Gpu { producer }),
            ExtractorSpec::MulticlusterMetrics(cluster) => {
                Some(Reading::Scalars { producer, scalars: cluster.scalars()? })
            }
            ExtractorSpec::Topology(topology) => {
                self.topology = topology.labels();
                None
            }
            ExtractorSpec::Models(_) => None,
        })
    }
}

impl Reading {
    fn attributes(&self) -> Vec<(&Name, &str)> {
        let (producer, scalars): (_, Vec<_>) = match self {
            Reading::Engine(reading) => {
                (&reading.producer, reading.engines.iter().flat_map(|e| &e.scalars).collect())
            }
            Reading::Gpu { producer } => return vec![(producer, GPU_UTILIZATION)],
            Reading::Scalars { producer, scalars } => (producer, scalars.iter().collect()),
        };
        scalars.into_iter().map(|(key, _)| (producer, key.as_str())).collect()
    }
}

impl SourceSpec {
    /// Name of the type in configurations.
    pub fn type_name(&self) -> &'static str {
        match self {
            SourceSpec::Metrics(_) => "metrics-data-source",
            SourceSpec::Models(_) => "models-data-source",
            SourceSpec::Dcgm(_) => "dcgm-data-source",
            SourceSpec::MulticlusterMetrics(_) => "multicluster-metrics-data-source",
            SourceSpec::K8sNotification(_) => "k8s-notification-source",
            SourceSpec::EndpointNotification(_) => "endpoint-notification-source",
        }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            SourceSpec::Metrics(source) => source.check(),
            SourceSpec::Models(source) => source.check(),
            SourceSpec::Dcgm(source) => source.check(),
            SourceSpec::MulticlusterMetrics(source) => source.check(),
            SourceSpec::K8sNotification(source) => source.check(),
            SourceSpec::EndpointNotification(source) => source.check(),
        }
    }

    /// Whether an extractor can read what the source delivers.
    fn feeds(&self, extractor: &ExtractorSpec) -> bool {
        match self {
            SourceSpec::Metrics(_) | SourceSpec::Dcgm(_) | SourceSpec::MulticlusterMetrics(_) => {
                matches!(
                    extractor,
                    ExtractorSpec::CoreMetrics(_)
                        | ExtractorSpec::Dcgm(_)
                        | ExtractorSpec::MulticlusterMetrics(_)
                )
            }
            SourceSpec::Models(_) => matches!(extractor, ExtractorSpec::Models(_)),
            SourceSpec::K8sNotification(_) | SourceSpec::EndpointNotification(_) => {
                matches!(extractor, ExtractorSpec::Topology(_))
            }
        }
    }
}

impl ExtractorSpec {
    /// Name of the type in configurations.
    pub fn type_name(&self) -> &'static str {
        match self {
            ExtractorSpec::CoreMetrics(_) => "core-metrics-extractor",
            ExtractorSpec::Models(_) => "models-data-extractor",
            ExtractorSpec::Dcgm(_) => "dcgm-extractor",
            ExtractorSpec::Topology(_) => "topology-extractor",
            ExtractorSpec::MulticlusterMetrics(_) => "multicluster-metrics-extractor",
        }
    }

    fn reads(&self) -> &'static str {
        match self {
            ExtractorSpec::Models(_) => "a models-data-source",
            ExtractorSpec::Topology(_) => {
                "an endpoint-notification-source or a k8s-notification-source"
            }
            _ => "a metrics-data-source, dcgm-data-source or multicluster-metrics-data-source",
        }
    }
}

impl DiscoverySpec {
    fn check(&self) -> Result<(), String> {
        match self {
            DiscoverySpec::File(file) => file.check(),
            DiscoverySpec::MulticlusterFile(file) => file.check(),
        }
    }

    fn plan(&self) -> DiscoveryPlan {
        let (path, watch, clusters) = match self {
            DiscoverySpec::File(file) => (&file.path, file.watch_file, false),
            DiscoverySpec::MulticlusterFile(file) => (&file.path, file.watch_file, true),
        };
        DiscoveryPlan { path: path.clone(), watch, clusters }
    }
}

fn ask(source: &Name, scheme: Scheme, path: &str, tls: TlsOptions) -> Ask {
    Ask {
        source: source.clone(),
        scheme,
        path: path.to_owned(),
        port: None,
        at_node: false,
        tls,
        interval: None,
        bytes_max: None,
    }
}

fn metrics_ask(name: &Name, from: &MetricsDataSource) -> Ask {
    let (cert, key) = (&from.client_cert_path, &from.client_key_path);
    let tls = TlsOptions::of(from.insecure_skip_verify, &from.ca_cert_path, cert, key);
    Ask {
        port: source::port_of(from.port),
        interval: from.interval.map(|interval| interval.0),
        ..ask(name, from.scheme, &from.path, tls)
    }
}

fn multicluster_ask(name: &Name, from: &MulticlusterMetricsDataSource) -> Ask {
    let (cert, key) = (&from.client_cert_path, &from.client_key_path);
    let tls = TlsOptions::of(from.insecure_skip_verify, &from.ca_cert_path, cert, key);
    Ask {
        interval: from.interval.map(|interval| interval.0),
        bytes_max: Some(MULTICLUSTER_PAGE_BYTES_MAX),
        ..ask(name, from.scheme, &from.path, tls)
    }
}

fn models_ask(name: &Name, from: &ModelsDataSource) -> Ask {
    let (cert, key) = (&from.client_cert_path, &from.client_key_path);
    let tls = TlsOptions::of(from.insecure_skip_verify, &from.ca_cert_path, cert, key);
    let interval = from.interval.map(|interval| interval.0);
    Ask { interval, ..ask(name, from.scheme, &from.path, tls) }
}

fn dcgm_ask(name: &Name, from: &DcgmDataSource) -> Ask {
    let tls = TlsOptions::of(from.insecure_skip_verify, "", "", "");
    Ask {
        port: source::port_of(from.port),
        at_node: from.use_node_address,
        interval: Some(from.interval.map_or(DCGM_INTERVAL, |interval| interval.0)),
        ..ask(name, from.scheme, &from.path, tls)
    }
}
