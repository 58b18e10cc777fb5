//! `dcgm-extractor`: how busy are the GPUs of an endpoint?

use schemars::JsonSchema;
use serde::Deserialize;

/// Parameters of `dcgm-extractor`, which reads the page of a `dcgm-data-source`: there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DcgmExtractor {}

impl DcgmExtractor {
    /// Nothing can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn check(&self) -> Result<(), String> {
        Ok(())
    }
}
