//! Reads a file that a person wrote (YAML, or JSON, which is YAML too) into a type, strictly, with
//! errors that point at the place.

use serde::de::DeserializeOwned;
use thiserror::Error;

/// Deepest nesting of a file.
pub const DEPTH_MAX: usize = 64;

/// Why a file was refused. Its text holds file, line, column, the lines around and, where a name
/// is unknown, the valid ones.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{rendered}")]
pub struct YamlError {
    /// The file, as the caller names it.
    pub file: String,
    /// Line of the fault, from 1; `None` when it has no place.
    pub line: Option<u64>,
    /// Column of the fault, from 1.
    pub column: Option<u64>,
    /// The whole message, several lines.
    pub rendered: String,
}

impl YamlError {
    /// An error at no particular place.
    pub fn of_file(file: &str, message: &str) -> YamlError {
        let rendered = format!("error in {file}: {message}");
        YamlError { file: file.to_owned(), line: None, column: None, rendered }
    }

    /// An error at a place that the parser itself had no objection to.
    pub fn at(file: &str, line: u64, column: u64, message: &str) -> YamlError {
        let rendered = format!("error in {file}:{line}:{column}: {message}");
        YamlError { file: file.to_owned(), line: Some(line), column: Some(column), rendered }
    }
}

/// Reads one document. Duplicate keys are errors; aliases and depth are bounded.
pub fn read<T: DeserializeOwned>(text: &str, file: &str, bytes_max: usize) -> Result<T, YamlError> {
    if text.len() > bytes_max {
        let message = format!("{} bytes, more than the limit of {bytes_max}", text.len());
        return Err(YamlError::of_file(file, &message));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: DEPTH_MAX },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let place = error.location();
        let rendered = error.render_with_options(serde_saphyr::render_options! {
            formatter: &serde_saphyr::UserMessageFormatter,
            source_name: Some(file),
        });
        // The first line repeats what the snippet says at its caret.
        let rendered = match rendered.split_once('\n') {
            Some((_, snippet)) if snippet.trim_start().starts_with("-->") => {
                format!("error in {file}\n{snippet}")
            }
            _ => format!("error in {file}: {rendered}"),
        };
        YamlError {
            file: file.to_owned(),
            line: place.map(|place| place.line()),
            column: place.map(|place| place.column()),
            rendered,
        }
    })
}
