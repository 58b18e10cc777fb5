//! Which models does an engine serve, by its `/v1/models`?

use kvroute_core::fleet::ServedModel;
use serde::Deserialize;
use thiserror::Error;

/// Most models that are read of one engine; further ones are an error, not a silent loss.
pub const MODELS_MAX: usize = 4096;

/// Why an answer is no list of models. The fault is the engine's, or the address is wrong.
#[derive(Debug, Error)]
pub enum ModelsError {
    /// Not the JSON that is expected.
    #[error("not a /v1/models answer: {0}; is this an OpenAI-compatible server?")]
    Json(#[from] serde_json::Error),
    /// More than [`MODELS_MAX`].
    #[error("the engine lists {found} models, more than the limit of {MODELS_MAX}")]
    TooMany {
        /// How many it lists.
        found: usize,
    },
}

#[derive(Deserialize)]
struct List {
    data: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    id: String,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    max_model_len: Option<u32>,
}

/// Reads the body of a `/v1/models` answer. vLLM names the base model of an adapter as `parent`.
///
/// # Errors
/// [`ModelsError`].
pub fn parse(body: &[u8]) -> Result<Vec<ServedModel>, ModelsError> {
    let list: List = serde_json::from_slice(body)?;
    if list.data.len() > MODELS_MAX {
        return Err(ModelsError::TooMany { found: list.data.len() });
    }
    let rows = list.data.into_iter();
    Ok(rows.map(|row| ServedModel { id: row.id, parent: row.parent }).collect())
}

/// The longest sequence of a model, prompt and answer together, as vLLM's `/v1/models` says it.
pub fn max_model_len(body: &[u8], model: &str) -> Option<u32> {
    let list: List = serde_json::from_slice(body).ok()?;
    list.data.into_iter().find(|row| row.id == model)?.max_model_len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_vllm_with_adapters() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/models-lora.json");
        let models = parse(&std::fs::read(path).unwrap()).unwrap();
        let model = |id: &str, parent: Option<&str>| ServedModel {
            id: id.to_owned(),
            parent: parent.map(str::to_owned),
        };
        let base = Some("tiny-qwen3");
        assert_eq!(
            models,
            [model("tiny-qwen3", None), model("lora-a", base), model("lora-b", base)]
        );
        let body = std::fs::read(path).unwrap();
        assert!(max_model_len(&body, "tiny-qwen3").is_some_and(|tokens| tokens > 0));
        assert_eq!(max_model_len(&body, "other"), None);
    }

    #[test]
    fn what_is_no_list() {
        let row = r#"{"id":"m"},"#;
        let many = format!(r#"{{"data":[{}{{"id":"m"}}]}}"#, row.repeat(MODELS_MAX));
        let table = [
            ("", "not a /v1/models answer: EOF"),
            ("<html>", "not a /v1/models answer: expected value"),
            (r#"{"object":"list"}"#, "not a /v1/models answer: missing field `data`"),
            (r#"{"data":[{"id":3}]}"#, "not a /v1/models answer: invalid type: integer `3`"),
            (&many, "the engine lists 4097 models"),
        ];
        for (body, message) in table {
            let error = parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        assert_eq!(parse(br#"{"data":[]}"#).unwrap(), []);
    }
}
