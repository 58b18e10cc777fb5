//! Which ids does the model's tokenizer give for this text?
//!
//! The work is done by the crate `fastokens`. Against the tokenizers that engines run (Hugging
//! Face `tokenizers` 0.23) it gave the same ids for Qwen 3, Llama 2 and 3, Gemma 3 and DeepSeek V3
//! on texts around each of 129,542 code points and on 43,160 others, and for gpt-oss on 3,160. The
//! release candidate of Hugging Face's own next version differed in up to 489 of them, because of
//! newer Unicode tables, and takes twice the time.
//!
//! A prompt is split at added tokens and, where that is provably exact, inside plain text
//! ([`crate::cut`]); the ids of each piece are kept in a cache that is bounded by bytes, so that a
//! shared system prompt is tokenized once. A hit compares the text itself, so no hash collision
//! can give wrong ids.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fastokens::added_tokens::Segment;
use fastokens::{EncodeSegment, Tokenizer as Fast};
use serde::Deserialize;
use serde_json::Value;

use crate::cut::CutRule;
use crate::error::{LoadError, TokensError};
use crate::files::{self, Source};

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
        source: &Source,
        overrides: Overrides,
        cache_bytes_max: usize,
    ) -> Result<Model, LoadError> {
        let (text, name) = match source {
            Source::Embedded(text) => (Cow::Borrowed(*text), "the embedded file".to_owned()),
            Source::File(path) => (Cow::Owned(files::read_text(path)?), path.display().to_string()),
        };
        let outline: Outline = files::parse(&text, &name)?;
        outline.check()?;
        let mut fast = build(source, &text, &outline, overrides.added_tokens)
            .map_err(|error| unsupported(&outline, &error))?;
        drop(text);
        // Engines hand the whole prompt over and cut it, if at all, by rules of their own.
        fast.set_truncation(None);
        fast.set_padding(None);
        if cache_bytes_max > 0 {
            fast.enable_segment_cache(cache_bytes_max);
        }
        let added = fast.added_token_configs();
        let is_split_here =
            outline.normalizer.is_null() || added.iter().all(|token| !token.normalized);
        let highest_added = added.iter().map(|token| token.id + 1).max().unwrap_or(0);
        let ids = highest_added.max(u32::try_from(fast.vocab_size()).unwrap_or(u32::MAX));
        let ends = match overrides.ends {
            None => None,
            Some(ends) => Some((id_of(&fast, ends.before)?, id_of(&fast, ends.after)?)),
        };
        let rule = CutRule::of(&outline.normalizer, &outline.pre_tokenizer);
        let model = Model { fast, rule, is_split_here, ends, ids };
        if !outline.decoder.is_null() {
            model.check_probes(outline.writes_every_byte())?;
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

/// The small parts of a `tokenizer.json`; its vocabulary is passed over.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    model: OutlineOfModel,
}

#[derive(Deserialize)]
struct OutlineOfModel {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

impl Outline {
    fn check(&self) -> Result<(), LoadError> {
        match self.model.dropout {
            Some(dropout) if dropout > 0.0 => Err(LoadError::Unsupported {
                message: "`dropout`, which makes ids random".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// An empty affix means none, which the library spells `null`.
    fn has_empty_affix(&self) -> bool {
        let affixes = [&self.model.continuing_subword_prefix, &self.model.end_of_word_suffix];
        affixes.into_iter().any(|affix| affix.as_deref() == Some(""))
    }

    /// Whether the tokenizer writes any byte, so that every text comes back.
    fn writes_every_byte(&self) -> bool {
        self.model.byte_fallback || self.pre_tokenizer.to_string().contains("\"ByteLevel\"")
    }
}

fn unsupported(outline: &Outline, error: &fastokens::Error) -> LoadError {
    let kind = outline.model.kind.as_deref().unwrap_or("unknown");
    // The library says "Other" for a model of a known kind that it cannot read.
    let message = match error.to_string() {
        text if text.ends_with("model type: Other") && kind == "BPE" => {
            "a BPE model with a vocabulary, merges or options that cannot be read".to_owned()
        }
        text => format!("{text} (a model of type {kind})"),
    };
    LoadError::Unsupported { message }
}

/// Builds the tokenizer. A file that needs no rewriting is read by the library itself, which takes
/// half the time of a tree.
fn build(
    source: &Source,
    text: &str,
    outline: &Outline,
    added_tokens: Vec<Value>,
) -> Result<Fast, fastokens::Error> {
    if let (Source::File(path), false) = (source, outline.has_empty_affix()) {
        return Fast::from_file(path);
    }
    let mut json: Value = serde_json::from_str(text)?;
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if json["model"][key] == "" {
            json["model"][key] = Value::Null;
        }
    }
    if let Some(list) = json["added_tokens"].as_array_mut() {
        // Tokens that only `tokenizer_config.json` names, as transformers adds them.
        let is_new = |token: &Value| !list.iter().any(|t| t["content"] == token["content"]);
        let new: Vec<Value> = added_tokens.into_iter().filter(is_new).collect();
        list.extend(new);
    }
    Fast::from_json(json)
}
