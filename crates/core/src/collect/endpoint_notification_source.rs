//! `endpoint-notification-source`: who wants to hear of endpoints that come and go?

use schemars::JsonSchema;
use serde::Deserialize;

/// Parameters of `endpoint-notification-source`: there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct EndpointNotificationSource {}

impl EndpointNotificationSource {
    /// Nothing can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn check(&self) -> Result<(), String> {
        Ok(())
    }
}
