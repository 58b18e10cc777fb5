//! `data-parallel-profile-handler`: each rank is an endpoint, one port takes all requests.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// `data-parallel-profile-handler`. Ranks listen on ports of one host; a proxy in front of the
/// engine passes a request on to the rank that `x-data-parallel-host-port` names. llm-d itself
/// calls this deprecated.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DataParallel {
    /// The port that requests are sent to, whichever rank is chosen; 1 to 65535.
    pub primary_port: u16,
}

impl Default for DataParallel {
    fn default() -> DataParallel {
        DataParallel { primary_port: 8000 }
    }
}

impl Plugin for DataParallel {
    fn check(&self) -> Result<(), String> {
        if self.primary_port == 0 { Err("primaryPort must be positive".into()) } else { Ok(()) }
    }
}
