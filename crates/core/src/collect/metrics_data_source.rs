//! `metrics-data-source`: where is the metrics page of an endpoint, and how often is it read?

use schemars::JsonSchema;
use serde::Deserialize;

use super::source::{self, Scheme};
use crate::config::GoDuration;
use crate::stage::Plugin;

/// Parameters of `metrics-data-source`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MetricsDataSource {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Path of the page.
    pub path: String,
    /// Port of the page; 0: the endpoint's own port. One port for all endpoints, so it does not fit
    /// data parallel ranks that share a host.
    pub port: u32,
    /// With `https`: any certificate of the endpoint will do.
    pub insecure_skip_verify: bool,
    /// With `https` and verification: PEM file of the authorities that may have signed the
    /// endpoint's certificate. Empty: those of the system.
    pub ca_cert_path: String,
    /// With `https`: PEM file of the certificate that the router shows. Set with `clientKeyPath`.
    pub client_cert_path: String,
    /// With `https`: PEM file of the key of that certificate.
    pub client_key_path: String,
    /// Between two readings, a multiple of 50 ms; left out: `kvroute.scrape_interval_ms`.
    pub interval: Option<GoDuration>,
}

impl Default for MetricsDataSource {
    fn default() -> MetricsDataSource {
        MetricsDataSource {
            scheme: Scheme::Http,
            path: "/metrics".to_owned(),
            port: 0,
            insecure_skip_verify: true,
            ca_cert_path: String::new(),
            client_cert_path: String::new(),
            client_key_path: String::new(),
            interval: None,
        }
    }
}

impl Plugin for MetricsDataSource {
    fn check(&self) -> Result<(), String> {
        source::check_path(&self.path)?;
        source::check_port(self.port)?;
        source::check_client(&self.client_cert_path, &self.client_key_path)?;
        source::check_interval(self.interval)
    }
}
