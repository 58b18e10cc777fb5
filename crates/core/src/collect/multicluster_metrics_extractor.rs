//! `multicluster-metrics-extractor`: how loaded is a cluster, by its own average?

use schemars::JsonSchema;
use serde::Deserialize;

use super::MetricSpec;
use crate::stage::Plugin;

/// Key of a cluster's average KV usage, 0 to 1.
pub const MULTICLUSTER_KV_USAGE: &str = "llm-d.ai/multicluster-kv-cache-utilization";
/// Key of a cluster's average queue, in requests per endpoint.
pub const MULTICLUSTER_QUEUE: &str = "llm-d.ai/multicluster-queue-size";

const KV_USAGE_METRIC: &str = "llm_d_epp_average_kv_cache_utilization";
const QUEUE_METRIC: &str = "llm_d_epp_average_queue_size";

/// Parameters of `multicluster-metrics-extractor`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MulticlusterMetricsExtractor {
    /// Metric of the cluster's average KV usage, 0 to 1; empty:
    /// `llm_d_epp_average_kv_cache_utilization`.
    pub kv_cache_utilization_metric: String,
    /// Metric of the cluster's average queue, in requests; empty: `llm_d_epp_average_queue_size`.
    pub queue_size_metric: String,
}

impl Plugin for MulticlusterMetricsExtractor {
    fn check(&self) -> Result<(), String> {
        self.scalars().map(drop)
    }
}

impl MulticlusterMetricsExtractor {
    pub(super) fn scalars(&self) -> Result<Vec<(String, MetricSpec)>, String> {
        let table = [
            ("kvCacheUtilizationMetric", &self.kv_cache_utilization_metric, KV_USAGE_METRIC),
            ("queueSizeMetric", &self.queue_size_metric, QUEUE_METRIC),
        ];
        let keys = [MULTICLUSTER_KV_USAGE, MULTICLUSTER_QUEUE];
        let read = |((field, text, default), key): ((&str, &String, &str), &str)| {
            let text = if text.is_empty() { default } else { text };
            let spec = MetricSpec::parse(text).map_err(|e| format!("{field}: {e}"))?;
            Ok((key.to_owned(), spec))
        };
        table.into_iter().zip(keys).map(read).collect()
    }
}
