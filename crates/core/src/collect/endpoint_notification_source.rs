//! `endpoint-notification-source`: who wants to hear of endpoints that come and go?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `endpoint-notification-source`: there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct EndpointNotificationSource {}

impl Plugin for EndpointNotificationSource {}
