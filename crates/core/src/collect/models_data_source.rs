//! `models-data-source`: where does an endpoint list the models that it serves?

use schemars::JsonSchema;
use serde::Deserialize;

use super::source::{self, Scheme};
use crate::config::GoDuration;
use crate::stage::Plugin;

/// Parameters of `models-data-source`. The router asks for the models in any case; this says how.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ModelsDataSource {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Path of the list.
    pub path: String,
    /// With `https`: any certificate of the endpoint will do.
    pub insecure_skip_verify: bool,
    /// With `https` and verification: PEM file of the authorities that may have signed the
    /// endpoint's certificate. Empty: those of the system.
    pub ca_cert_path: String,
    /// With `https`: PEM file of the certificate that the router shows. Set with `clientKeyPath`.
    pub client_cert_path: String,
    /// With `https`: PEM file of the key of that certificate.
    pub client_key_path: String,
    /// Between two readings, a multiple of 50 ms; left out: `kvroute.models_interval_s`.
    pub interval: Option<GoDuration>,
}

impl Default for ModelsDataSource {
    fn default() -> ModelsDataSource {
        ModelsDataSource {
            scheme: Scheme::Http,
            path: "/v1/models".to_owned(),
            insecure_skip_verify: true,
            ca_cert_path: String::new(),
            client_cert_path: String::new(),
            client_key_path: String::new(),
            interval: None,
        }
    }
}

impl Plugin for ModelsDataSource {
    fn check(&self) -> Result<(), String> {
        source::check_path(&self.path)?;
        source::check_client(&self.client_cert_path, &self.client_key_path)?;
        source::check_interval(self.interval)
    }
}
