//! `dcgm-data-source`: where does NVIDIA's DCGM exporter of an endpoint answer?

use schemars::JsonSchema;
use serde::Deserialize;

use super::source::{self, Scheme};
use crate::config::GoDuration;
use crate::stage::Plugin;

/// Parameters of `dcgm-data-source`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DcgmDataSource {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Path of the exporter's page.
    pub path: String,
    /// Port of the exporter; 0: the endpoint's own port.
    pub port: u32,
    /// With `https`: any certificate of the exporter will do.
    pub insecure_skip_verify: bool,
    /// Ask the exporter at the address of the endpoint's node (a DaemonSet), which its label
    /// `kvroute/node-address` holds; without that label, and when false, at the endpoint's own
    /// (a sidecar).
    pub use_node_address: bool,
    /// Between two readings, a multiple of 50 ms; left out: 1 s, as exporters measure no faster.
    pub interval: Option<GoDuration>,
}

impl Default for DcgmDataSource {
    fn default() -> DcgmDataSource {
        DcgmDataSource {
            scheme: Scheme::Http,
            path: "/metrics".to_owned(),
            port: 9400,
            insecure_skip_verify: true,
            use_node_address: false,
            interval: None,
        }
    }
}

impl Plugin for DcgmDataSource {
    fn check(&self) -> Result<(), String> {
        source::check_path(&self.path)?;
        source::check_port(self.port)?;
        if self.use_node_address && self.port == 0 {
            return Err("port: useNodeAddress needs the exporter's port on the node".to_owned());
        }
        source::check_interval(self.interval)
    }
}
