//! `k8s-notification-source`: which Kubernetes objects should be watched?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `k8s-notification-source`. Without effect: this version watches no Kubernetes
/// objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct K8sNotificationSource {
    /// API group; empty: the core group.
    pub group: String,
    /// API version, such as `v1`. Required.
    pub version: String,
    /// Kind of object, such as `Pod`. Required.
    pub kind: String,
}

impl Plugin for K8sNotificationSource {
    fn check(&self) -> Result<(), String> {
        for (field, value) in [("version", &self.version), ("kind", &self.kind)] {
            if value.is_empty() {
                return Err(format!("{field}: must say which objects are watched"));
            }
        }
        Ok(())
    }
}
