//! `multicluster-metrics-data-source`: where is the metrics page of a cluster?

use schemars::JsonSchema;
use serde::Deserialize;

use super::source::{self, Scheme};
use crate::config::GoDuration;
use crate::stage::Plugin;

/// Largest page of another cluster that is read, in bytes.
pub const MULTICLUSTER_PAGE_BYTES_MAX: usize = 8 << 20;

/// Parameters of `multicluster-metrics-data-source`: as `metrics-data-source`, but over TLS and
/// verified unless told otherwise, and never more than 8 MiB.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MulticlusterMetricsDataSource {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Path of the page.
    pub path: String,
    /// Without effect: labels `metricsAddress` and `metricsPort` of the endpoint say it.
    pub port: u32,
    /// With `https`: any certificate of the cluster will do.
    pub insecure_skip_verify: bool,
    /// With `https` and verification: PEM file of the authorities that may have signed the
    /// cluster's certificate. Empty: those of the system.
    pub ca_cert_path: String,
    /// With `https`: PEM file of the certificate that the router shows. Set with `clientKeyPath`.
    pub client_cert_path: String,
    /// With `https`: PEM file of the key of that certificate.
    pub client_key_path: String,
    /// Between two readings, a multiple of 50 ms; left out: `kvroute.scrape_interval_ms`.
    pub interval: Option<GoDuration>,
}

impl Default for MulticlusterMetricsDataSource {
    fn default() -> MulticlusterMetricsDataSource {
        MulticlusterMetricsDataSource {
            scheme: Scheme::Https,
            path: "/metrics".to_owned(),
            port: 0,
            insecure_skip_verify: false,
            ca_cert_path: String::new(),
            client_cert_path: String::new(),
            client_key_path: String::new(),
            interval: None,
        }
    }
}

impl Plugin for MulticlusterMetricsDataSource {
    fn check(&self) -> Result<(), String> {
        source::check_path(&self.path)?;
        source::check_port(self.port)?;
        source::check_client(&self.client_cert_path, &self.client_key_path)?;
        source::check_interval(self.interval)
    }
}
