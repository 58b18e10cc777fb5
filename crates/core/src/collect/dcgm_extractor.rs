//! `dcgm-extractor`: how busy are the GPUs of an endpoint?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `dcgm-extractor`, which reads the page of a `dcgm-data-source`: there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DcgmExtractor {}

impl Plugin for DcgmExtractor {}
