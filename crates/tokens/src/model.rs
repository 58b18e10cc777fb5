//! Which ids does the model's tokenizer give for this text?
//!
//! The work is done by the crate `fastokens`. Against the tokenizers that engines run (Hugging
//! Face `tokenizers` 0.23) it gave the same ids for Qwen 3, Llama 2 and 3, Gemma 3, DeepSeek V3 and
//! gpt-oss on every one of 129,542 code points in five contexts and on 43,160 texts each, where
//! the release candidate of Hugging Face's own next version differed in up to 489 because of newer
//! Unicode tables; and it takes less than half the time. The table is in `docs/performance.md`.
//!
//! A prompt is split at added tokens and, where that is provably exact, inside plain text
//! ([`crate::cut`]); the ids of each piece are kept in a cache that is bounded by bytes, so that a
//! shared system prompt is tokenized once. A hit compares the text itself, so no hash collision
//! can give wrong ids.

use std::panic::{AssertUnwindSafe, catch_unwind};

use fastokens::added_tokens::Segment;
use fastokens::{EncodeSegment, Tokenizer as Fast};
use serde_json::Value;

use crate::cut::CutRule;
use crate::error::{LoadError, TokensError};

/// Texts that must come back unchanged from encoding and decoding. ASCII first: the others only
/// for tokenizers that can write every byte.
const PROBES: [&str; 4] = [
    "The quick brown fox jumps over 13 lazy dogs, isn't that so?\n\n  fn main() { a[0] += 1; }",
    "{\"id\": 42, \"tags\": [\"a\", \"b\"], \"ok\": true}\tend",
    "Grüße, señor! 東京の天気は晴れ。 Привет, как дела?",
    "emoji 👩‍👩‍👧 and symbols ∑≠√ \u{a0}\u{200b}x",
];

/// What the configuration beside `tokenizer.json` says about the tokenizer itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    /// `added_tokens_decoder` of `tokenizer_config.json`.
    pub(crate) added_tokens: Vec<Value>,
    /// The texts put before and after a prompt, where `add_bos_token` or `add_eos_token` is given.
    /// transformers then ignores what `tokenizer.json` says.
    pub(crate) ends: Option<Ends>,
}

/// Special tokens around a prompt.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ends {
    pub(crate) before: Option<String>,
    pub(crate) after: Option<String>,
}

/// How well the cache of encoded pieces does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Pieces whose ids were found.
    pub hits: u64,
    /// Pieces that had to be tokenized.
    pub misses: u64,
    /// Bytes of text that hits covered.
    pub hit_bytes: u64,
    /// Bytes of text that had to be tokenized.
    pub miss_bytes: u64,
    /// Pieces in the cache.
    pub entries: usize,
    /// Bytes that they are charged with: text, ids and a fixed part per piece.
    pub bytes: usize,
    /// The bound of `bytes`.
    pub bytes_max: usize,
}

/// A loaded tokenizer.
pub(crate) struct Model {
    fast: Fast,
    rule: CutRule,
    /// Added tokens are matched in the raw text alone, so the text can be split here. Otherwise
    /// (Llama 2) some are matched after normalization and the library does both.
    is_split_here: bool,
    /// Ids around a prompt that override the post-processor.
    ends: Option<(Option<u32>, Option<u32>)>,
    ids: u32,
}

impl Model {
    pub(crate) fn new(
        mut json: Value,
        overrides: Overrides,
        cache_bytes_max: usize,
    ) -> Result<Model, LoadError> {
        let unsupported = |message: String| LoadError::Unsupported { message };
        canonicalize(&mut json)?;
        merge_added_tokens(&mut json, overrides.added_tokens);
        let rule = CutRule::of(&json);
        let has_normalizer = !json["normalizer"].is_null();
        let checks_bytes = decodes_every_byte(&json);
        let has_decoder = !json["decoder"].is_null();
        let mut fast = Fast::from_json(json).map_err(|error| unsupported(error.to_string()))?;
        // Engines hand the whole prompt over and cut it, if at all, by rules of their own.
        fast.set_truncation(None);
        fast.set_padding(None);
        if cache_bytes_max > 0 {
            fast.enable_segment_cache(cache_bytes_max);
        }
        let added = fast.added_token_configs();
        let is_split_here = !has_normalizer || added.iter().all(|token| !token.normalized);
        let highest_added = added.iter().map(|token| token.id + 1).max().unwrap_or(0);
        let ids = highest_added.max(u32::try_from(fast.vocab_size()).unwrap_or(u32::MAX));
        let ends = match overrides.ends {
            None => None,
            Some(ends) => Some((id_of(&fast, ends.before)?, id_of(&fast, ends.after)?)),
        };
        let model = Model { fast, rule, is_split_here, ends, ids };
        if has_decoder {
            model.check_probes(checks_bytes)?;
        }
        model.check_added_tokens()?;
        Ok(model)
    }

    /// One more than the highest id.
    pub(crate) fn vocab_size(&self) -> u32 {
        self.ids
    }

    pub(crate) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokensError> {
        // The texts come from the network and the library has unsafe code and indexing of its
        // own: should it ever panic, one request loses its precise route and nothing else.
        let encoded = catch_unwind(AssertUnwindSafe(|| self.encode_unguarded(text)));
        let ids = encoded.map_err(|_| failed("it panicked on this text".to_owned()))??;
        if !add_special_tokens {
            return Ok(ids);
        }
        Ok(match self.ends {
            None => self.fast.post_process(ids, true),
            Some((before, after)) => before.into_iter().chain(ids).chain(after).collect(),
        })
    }

    fn encode_unguarded(&self, text: &str) -> Result<Vec<u32>, TokensError> {
        if !self.is_split_here {
            return self.fast.encode(text).map_err(|error| failed(error.to_string()));
        }
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        let segments = self.fast.added_tokens().and_then(|t| t.split_with_opt(text, false));
        match segments {
            None => self.encode_plain(text, &mut ids)?,
            Some(segments) => {
                for segment in segments {
                    match segment {
                        Segment::Token(id) => ids.push(id),
                        Segment::Text(text) => self.encode_plain(text, &mut ids)?,
                    }
                }
            }
        }
        Ok(ids)
    }

    /// Encodes text in which no added token is looked for any more.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokensError> {
        for piece in self.rule.pieces(text) {
            let piece = [EncodeSegment::ordinary(piece)];
            let found: Vec<u32> = self
                .fast
                .encode_segments_unpadded(&piece)
                .map_err(|error| failed(error.to_string()))?;
            ids.extend_from_slice(&found);
        }
        Ok(())
    }

    /// The ids without any cutting or caching of ours, for checks.
    pub(crate) fn encode_whole(&self, text: &str) -> Result<Vec<u32>, TokensError> {
        self.fast.encode(text).map_err(|error| failed(error.to_string()))
    }

    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String, TokensError> {
        self.fast.decode(ids, false).map_err(|error| failed(error.to_string()))
    }

    pub(crate) fn cache_stats(&self) -> CacheStats {
        let stats = self.fast.segment_cache_stats().unwrap_or_default();
        CacheStats {
            hits: stats.hits,
            misses: stats.misses,
            hit_bytes: stats.hit_bytes,
            miss_bytes: stats.miss_bytes,
            entries: stats.entries,
            bytes: stats.bytes,
            bytes_max: stats.max_bytes,
        }
    }

    fn check_probes(&self, checks_bytes: bool) -> Result<(), LoadError> {
        let probes = PROBES.iter().take(if checks_bytes { PROBES.len() } else { 2 });
        for probe in probes {
            let message = |what: String| LoadError::SelfCheck { message: what };
            let ids = self.encode(probe, false).map_err(|e| message(e.to_string()))?;
            let back = self.decode(&ids).map_err(|e| message(e.to_string()))?;
            if back != *probe {
                return Err(message(format!("{probe:?} came back as {back:?}")));
            }
            let long = format!("{probe} and so on ").repeat(20);
            let (cut, whole) = (self.encode(&long, false), self.encode_whole(&long));
            if cut.map_err(|e| message(e.to_string()))?
                != whole.map_err(|e| message(e.to_string()))?
            {
                return Err(message(format!("{probe:?} repeated has other ids in pieces")));
            }
        }
        Ok(())
    }

    fn check_added_tokens(&self) -> Result<(), LoadError> {
        for token in self.fast.added_token_configs() {
            if token.single_word || !token.special {
                continue;
            }
            let ids = self.encode(&token.content, false);
            if ids.as_ref().ok() != Some(&vec![token.id]) {
                let message = format!("{:?} should be id {}, not {ids:?}", token.content, token.id);
                return Err(LoadError::SelfCheck { message });
            }
        }
        Ok(())
    }
}

fn failed(message: String) -> TokensError {
    TokensError::Tokenizer { message }
}

fn id_of(fast: &Fast, token: Option<String>) -> Result<Option<u32>, LoadError> {
    let Some(token) = token else { return Ok(None) };
    match fast.token_to_id(&token) {
        Some(id) => Ok(Some(id)),
        None => {
            let message = format!(
                "tokenizer_config.json puts {token:?} around prompts, which is \
                                   not in the vocabulary"
            );
            Err(LoadError::Unsupported { message })
        }
    }
}

/// Rewrites spellings that mean the same, and refuses what would make ids random.
fn canonicalize(json: &mut Value) -> Result<(), LoadError> {
    let unsupported = |message: &str| LoadError::Unsupported { message: message.to_owned() };
    let model = json.get_mut("model").and_then(Value::as_object_mut);
    let model = model.ok_or_else(|| unsupported("there is no `model`"))?;
    // An empty affix is none.
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(key).is_some_and(|affix| affix == "") {
            model.insert(key.to_owned(), Value::Null);
        }
    }
    if model.get("dropout").and_then(Value::as_f64).is_some_and(|dropout| dropout > 0.0) {
        return Err(unsupported("`dropout`, which makes ids random"));
    }
    Ok(())
}

/// Adds tokens that only `tokenizer_config.json` names, as transformers does.
fn merge_added_tokens(json: &mut Value, tokens: Vec<Value>) {
    if !json["added_tokens"].is_array() {
        json["added_tokens"] = Value::Array(Vec::new());
    }
    let Some(list) = json["added_tokens"].as_array_mut() else { return };
    for token in tokens {
        let is_known = list.iter().any(|known| known["content"] == token["content"]);
        if !is_known {
            list.push(token);
        }
    }
}

/// Whether the tokenizer writes any byte, so that every text comes back.
fn decodes_every_byte(json: &Value) -> bool {
    let text = |value: &Value| value.to_string().contains("\"ByteLevel\"");
    json["model"]["byte_fallback"] == true || text(&json["pre_tokenizer"])
}
