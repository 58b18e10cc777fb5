//! `kvroute schema`: what can be written in a configuration, as a JSON Schema for editors?

use std::process::ExitCode;

use kvroute_core::config::EndpointPickerConfig;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use crate::cli;

/// Runs `kvroute schema`.
///
/// # Errors
/// None; commands share this form.
pub fn main() -> anyhow::Result<ExitCode> {
    cli::say(&pretty());
    Ok(ExitCode::SUCCESS)
}

/// The JSON Schema (draft 2020-12) of configurations.
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    generator.into_root_schema_for::<EndpointPickerConfig>().to_value()
}

/// The same as text, as it stands in docs/config.schema.json.
pub fn pretty() -> String {
    format!("{:#}", schema())
}
