//! `models-data-extractor`: which models does an endpoint serve?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `models-data-extractor`, which reads the page of a `models-data-source`: there
/// are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ModelsDataExtractor {}

impl Plugin for ModelsDataExtractor {}
