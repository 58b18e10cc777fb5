//! Which configuration did the user write?
//!
//! The types are `core::config`; here they are read from YAML or JSON, strictly.

use kvroute_core::config::EndpointPickerConfig;

use crate::yaml;
pub use crate::yaml::YamlError as ConfigError;

/// Largest configuration, in bytes.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Reads a configuration; `file_name` names it in errors.
///
/// # Errors
/// [`ConfigError`] with file, line, column, the lines around the fault and the valid names.
pub fn parse(text: &str, file_name: &str) -> Result<EndpointPickerConfig, ConfigError> {
    yaml::read(text, file_name, CONFIG_BYTES_MAX)
}
