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
    /// Where there is only one profile, it runs whatever the header says. Empty: `EPP-Profile`.
    pub header_name: String,
    /// The profile of requests without the header. Empty: `decode`.
    pub default_profile: String,
}

const HEADER: &str = "EPP-Profile";
const PROFILE: &str = "decode";

impl Default for Header {
    fn default() -> Header {
        Header { header_name: HEADER.into(), default_profile: PROFILE.into() }
    }
}

fn filled_or<'a>(text: &'a str, default: &'a str) -> &'a str {
    Some(text.trim()).filter(|text| !text.is_empty()).unwrap_or(default)
}

impl Header {
    /// The header that is read, lower case.
    pub fn header(&self) -> String {
        filled_or(&self.header_name, HEADER).to_ascii_lowercase()
    }

    /// The profile of requests without it.
    pub fn profile_otherwise(&self) -> &str {
        filled_or(&self.default_profile, PROFILE)
    }

    /// Whether that profile was chosen by the user.
    pub fn names_default(&self) -> bool {
        self.profile_otherwise() != PROFILE
    }
}

impl Plugin for Header {
    fn headers(&self) -> Vec<String> {
        vec![self.header()]
    }
}
