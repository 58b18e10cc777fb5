//! `header-profile-handler`: the client says which profile runs.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// `header-profile-handler`. A coordinator that sends a request through the router once per phase
/// names the phase.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Header {
    /// The request header that holds the profile's name. A name of no profile is refused with 400.
    pub header_name: String,
    /// The profile of requests without the header.
    pub default_profile: String,
}

impl Default for Header {
    fn default() -> Header {
        Header { header_name: "EPP-Profile".into(), default_profile: "decode".into() }
    }
}

impl Plugin for Header {
    fn check(&self) -> Result<(), String> {
        if self.header_name.is_empty() {
            return Err("headerName must not be empty".into());
        }
        Ok(())
    }

    fn headers(&self) -> Vec<String> {
        vec![self.header_name.to_ascii_lowercase()]
    }
}
