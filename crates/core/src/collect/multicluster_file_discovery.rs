//! `multicluster-file-discovery`: which file lists the clusters?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `multicluster-file-discovery`. The file has the format of `file-discovery`; each
/// entry is the gateway of a cluster. Labels `metricsAddress` and `metricsPort` tell where its
/// metrics are, when that is somewhere else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MulticlusterFileDiscovery {
    /// The file. Required.
    pub path: String,
    /// Look again and again whether the file has changed; otherwise it is read once.
    pub watch_file: bool,
}

impl Plugin for MulticlusterFileDiscovery {
    fn check(&self) -> Result<(), String> {
        if self.path.is_empty() {
            return Err("path: must name the file that lists the clusters".to_owned());
        }
        Ok(())
    }
}
