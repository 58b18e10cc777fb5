//! `file-discovery`: which file lists the endpoints?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `file-discovery`. The file lists `endpoints` with `name`, `namespace`
/// (`default`), `address`, `port` and `labels` each, in YAML or JSON, at most 1 MiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct FileDiscovery {
    /// The file. Required.
    pub path: String,
    /// Look again and again whether the file has changed; otherwise it is read once.
    pub watch_file: bool,
}

impl Plugin for FileDiscovery {
    fn check(&self) -> Result<(), String> {
        if self.path.is_empty() {
            return Err("path: must name the file that lists the endpoints".to_owned());
        }
        Ok(())
    }
}
