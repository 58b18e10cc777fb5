//! What lies in the folder of a model's tokenizer?

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::LoadError;
use crate::model::{Ends, Overrides};

/// Largest file that is read, in bytes. The largest tokenizers in use have 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Most named templates of one model.
const TEMPLATES_MAX: usize = 32;

/// The tokens that a template can name, in the order of transformers.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Where a `tokenizer.json` comes from.
pub(crate) enum Source {
    /// Embedded in the program.
    Embedded(&'static str),
    /// A file.
    File(PathBuf),
}

/// The files of one tokenizer; the large one is read when the model is built.
pub(crate) struct Files {
    /// `tokenizer.json`.
    pub(crate) tokenizer: Source,
    /// What `tokenizer_config.json` changes about it.
    pub(crate) overrides: Overrides,
    /// Name and source of each chat template.
    pub(crate) templates: Vec<(String, String)>,
    /// `bos_token` and the like.
    pub(crate) special_tokens: Vec<(String, String)>,
}

/// The tokenizer in this repository.
pub(crate) fn demo() -> Result<Files, LoadError> {
    let config = include_str!("../assets/demo/tokenizer_config.json");
    let template = include_str!("../assets/demo/chat_template.jinja");
    let config: Value = parse(config, "the embedded tokenizer_config.json")?;
    let mut files = Files {
        tokenizer: Source::Embedded(include_str!("../assets/demo/tokenizer.json")),
        overrides: Overrides::default(),
        templates: vec![("default".to_owned(), template.to_owned())],
        special_tokens: Vec::new(),
    };
    files.apply_config(&config);
    Ok(files)
}

/// Reads `tokenizer.json` at `path`, or in the folder `path`, and what lies beside it.
pub(crate) fn read(path: &Path) -> Result<Files, LoadError> {
    let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    let beside = |name: &str| path.with_file_name(name);
    let mut files = Files {
        tokenizer: Source::File(path.clone()),
        overrides: Overrides::default(),
        templates: Vec::new(),
        special_tokens: Vec::new(),
    };
    let config_path = beside("tokenizer_config.json");
    let config = match read_if_there(&config_path)? {
        Some(text) => parse(&text, &config_path.display().to_string())?,
        None => Value::Null,
    };
    files.apply_config(&config);
    let named = templates_in(&beside("additional_chat_templates"))?;
    if let Some(source) = read_if_there(&beside("chat_template.jinja"))? {
        files.templates = vec![("default".to_owned(), source)];
        files.templates.extend(named);
    } else if files.templates.is_empty() {
        let path = beside("chat_template.json");
        if let Some(text) = read_if_there(&path)? {
            let json: Value = parse(&text, &path.display().to_string())?;
            files.templates = templates_of(&json["chat_template"]);
        }
    }
    Ok(files)
}

impl Files {
    fn apply_config(&mut self, config: &Value) {
        self.templates.extend(templates_of(&config["chat_template"]));
        let token = |key: &str| text_of(&config[key]);
        for key in SPECIAL_TOKENS {
            self.special_tokens.extend(token(key).map(|text| (key.to_owned(), text)));
        }
        if let Some(extra) = config["extra_special_tokens"].as_object() {
            let named = extra.iter().filter_map(|(key, value)| Some((key, text_of(value)?)));
            self.special_tokens.extend(named.map(|(key, text)| (key.clone(), text)));
        }
        if let Some(tokens) = config["added_tokens_decoder"].as_object() {
            let with_id = tokens.iter().filter_map(|(id, token)| {
                let mut token = token.clone();
                let id: u32 = id.parse().ok()?;
                token.as_object_mut()?.insert("id".to_owned(), Value::from(id));
                Some(token)
            });
            self.overrides.added_tokens = with_id.collect();
            self.overrides.added_tokens.sort_by_key(|token| token["id"].as_u64());
        }
        let (bos, eos) = (config["add_bos_token"].as_bool(), config["add_eos_token"].as_bool());
        if bos.is_some() || eos.is_some() {
            self.overrides.ends = Some(Ends {
                before: token("bos_token").filter(|_| bos == Some(true)),
                after: token("eos_token").filter(|_| eos == Some(true)),
            });
        }
    }
}

/// A token is given as its text or as an object that holds it.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// `chat_template` of a configuration: one source, or a list of named ones.
fn templates_of(value: &Value) -> Vec<(String, String)> {
    if let Some(source) = value.as_str() {
        return vec![("default".to_owned(), source.to_owned())];
    }
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let named = list.iter().filter_map(|entry| {
        Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()))
    });
    named.take(TEMPLATES_MAX).collect()
}

/// The files `NAME.jinja` of a folder, by name; none if there is no folder.
fn templates_in(folder: &Path) -> Result<Vec<(String, String)>, LoadError> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    paths.truncate(TEMPLATES_MAX);
    let named = paths.into_iter().map(|path| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, read_text(&path)?))
    });
    named.collect()
}

fn read_if_there(path: &Path) -> Result<Option<String>, LoadError> {
    if path.exists() { read_text(path).map(Some) } else { Ok(None) }
}

pub(crate) fn read_text(path: &Path) -> Result<String, LoadError> {
    let failed = |error| LoadError::Read { path: path.to_owned(), error };
    let bytes = fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
            bytes,
            bytes_max: FILE_BYTES_MAX,
        });
    }
    fs::read_to_string(path).map_err(failed)
}

pub(crate) fn parse<T: DeserializeOwned>(text: &str, what: &str) -> Result<T, LoadError> {
    serde_json::from_str(text)
        .map_err(|error| LoadError::BadJson { what: what.to_owned(), message: error.to_string() })
}
