//! `single-profile-handler`: there is one profile.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::Ignored;
use crate::stage::Plugin;

/// `single-profile-handler`. Parameters are accepted and mean nothing.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Single(Ignored);

impl Plugin for Single {}
