//! Which ids does the model's tokenizer give for this text?
//!
//! The work is done by the crate `fastokens`. Against the tokenizers that engines run (Hugging
//! Face `tokenizers` 0.23) it gave the same ids for Qwen 3, Llama 2 and 3, Gemma 3 and DeepSeek V3
//! on texts around each of 129,542 code points and on 43,160 others, and for gpt-oss on 3,160. The
//! release candidate of Hugging Face's own next version differed in up to 489 of them, because of
//! newer Unicode tables, and takes twice the time.
//!
//! A prompt is split at added tokens and, where that is provably exact, inside plain text
//! ([`crate::cut`]). At these places its beginnings are kept ([`crate::prefixes`]), so that a
//! shared system prompt is tokenized and hashed once.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fastokens::added_tokens::Segment;
use fastokens::{EncodeSegment, Tokenizer as Fast};
use kvroute_core::blocks::BlockKey;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;

use crate::cut::CutRule;
use crate::error::{LoadError, TokensError};
use crate::files::{self, Source};
use crate::prefixes::{Cut, Link, Prefixes, SPAN_BYTES_MIN, Shorts, Work};

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

/// How well the cache of beginnings of prompts does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Spans of text whose ids were found.
    pub hits: u64,
    /// Pieces of text that had to be tokenized.
    pub misses: u64,
    /// Bytes of text that hits covered.
    pub hit_bytes: u64,
    /// Bytes of text that had to be tokenized.
    pub miss_bytes: u64,
    /// Spans in the cache.
    pub entries: usize,
    /// Bytes that they are charged with: text, ids, block keys and a fixed part per span.
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
    /// What the added tokens say about where a prompt may be cut.
    added: Added,
    /// Ids that are put around a prompt where that is asked for.
    before: Vec<u32>,
    after: Vec<u32>,
    ids: u32,
    /// `None`: nothing is kept.
    prefixes: Option<Mutex<Prefixes>>,
    shorts: Mutex<Shorts>,
}

/// The added tokens, as far as they look at what stands beside them.
struct Added {
    /// Some match whole words only, so a piece is not split like the same text inside of others.
    single_word: bool,
    /// Some take in the white space beside them.
    strips: bool,
    texts: Vec<Vec<u8>>,
    /// Bytes of the longest.
    longest: usize,
    /// Whether some begin with a byte.
    first_bytes: Box<[bool; 256]>,
}

impl Added {
    fn of(fast: &Fast) -> Added {
        let tokens = fast.added_token_configs();
        let texts: Vec<Vec<u8>> = tokens.iter().map(|token| token.content.clone().into()).collect();
        let mut first_bytes = Box::new([false; 256]);
        for first in texts.iter().filter_map(|text| text.first()) {
            first_bytes[usize::from(*first)] = true;
        }
        Added {
            first_bytes,
            single_word: tokens.iter().any(|token| token.single_word),
            strips: tokens.iter().any(|token| token.lstrip || token.rstrip),
            longest: texts.iter().map(Vec::len).max().unwrap_or(0),
            texts,
        }
    }

    /// How many bytes behind a cut decide that the text before it is split as it is, whatever
    /// follows; `None`: no number does. `is_inside`: the cut is inside of plain text, not behind an
    /// added token.
    fn guard(&self, before: &[u8], behind: &str, is_inside: bool) -> Option<usize> {
        // White space there could belong to a token before it or behind it.
        let is_open = !is_inside && self.strips && behind.starts_with(char::is_whitespace);
        if self.single_word || is_open {
            return None;
        }
        let next = match (is_inside, behind.chars().next()) {
            // The space that ends a word, or what ends the white space of a token.
            (true, Some(next)) => next.len_utf8(),
            (false, Some(next)) if self.strips => next.len_utf8(),
            _ => 0,
        };
        let window = &before[before.len().saturating_sub(self.longest)..];
        let may_begin = |from: &usize| self.first_bytes[usize::from(window[*from])];
        let begun = (0..window.len()).filter(may_begin).flat_map(|from| {
            let begun = &window[from..];
            let is_longer = |text: &&Vec<u8>| text.len() > begun.len() && text.starts_with(begun);
            self.texts.iter().filter(is_longer).map(|text| text.len() - begun.len())
        });
        Some(begun.max().unwrap_or(0).max(next))
    }
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
        let added = fast.added_token_configs();
        let is_split_here =
            outline.normalizer.is_null() || added.iter().all(|token| !token.normalized);
        let highest_added = added.iter().map(|token| token.id + 1).max().unwrap_or(0);
        let ids = highest_added.max(u32::try_from(fast.vocab_size()).unwrap_or(u32::MAX));
        let (before, after) = match overrides.ends {
            None => ends_of(&fast)?,
            Some(ends) => {
                let list = |token| id_of(&fast, token).map(Vec::from_iter);
                (list(ends.before)?, list(ends.after)?)
            }
        };
        let rule = CutRule::of(&outline.normalizer, &outline.pre_tokenizer);
        let added = Added::of(&fast);
        let prefixes =
            (cache_bytes_max > 0).then(|| Mutex::new(Prefixes::new(cache_bytes_max, &before)));
        let shorts = Mutex::new(Shorts::new());
        let model =
            Model { fast, rule, is_split_here, added, before, after, ids, prefixes, shorts };
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

    /// The ids of a text.
    pub(crate) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokensError> {
        let mut work = Work::default();
        self.read(text, add_special_tokens, (&[], &mut []), true, &mut work)?;
        Ok(work.ids)
    }

    /// Tokenizes a text: the keys of its full blocks for each chain, all of its ids or at least
    /// those that fill no block in `work`.
    pub(crate) fn read(
        &self,
        text: &str,
        add_special_tokens: bool,
        (links, keys): (&[Link], &mut [Vec<BlockKey>]),
        all_ids: bool,
        work: &mut Work,
    ) -> Result<(), TokensError> {
        work.clear();
        keys.iter_mut().for_each(Vec::clear);
        let prefixes = self.prefixes.as_ref().filter(|_| text.len() >= SPAN_BYTES_MIN);
        match prefixes {
            Some(prefixes) => {
                let bytes = text.as_bytes();
                let found = (links, &mut *keys);
                prefixes.lock().find(bytes, add_special_tokens, found, all_ids, work);
            }
            None if add_special_tokens => work.ids.extend_from_slice(&self.before),
            None => {}
        }
        let rest = text.get(work.bytes..).unwrap_or_default().as_bytes();
        let is_short = self.prefixes.is_some() && rest.len() < SPAN_BYTES_MIN;
        if is_short && self.shorts.lock().find(rest, &mut work.ids) {
            work.bytes = text.len();
        }
        if work.bytes < text.len() {
            let had = work.ids.len();
            // The texts come from the network and the library has unsafe code and indexing of its
            // own: should it ever panic, one request loses its precise route and nothing else.
            let encoded = catch_unwind(AssertUnwindSafe(|| self.encode_rest(text, work)));
            encoded.map_err(|_| failed("it panicked on this text".to_owned()))??;
            let last = work.cuts.last().map_or((work.bytes, had), |cut| (cut.at, cut.ids));
            let (end, ids) = (text.get(last.0..), work.ids.get(last.1..));
            if let (Some(_), Some(end), Some(ids)) = (&self.prefixes, end, ids)
                && end.len() < SPAN_BYTES_MIN
            {
                self.shorts.lock().keep(end.as_bytes(), ids);
            }
        }
        complete(links, keys, work);
        if let Some(prefixes) = prefixes.filter(|_| work.bytes < text.len()) {
            prefixes.lock().keep(text.as_bytes(), links, keys, work);
        }
        if add_special_tokens && !self.after.is_empty() {
            work.ids.extend_from_slice(&self.after);
            complete(links, keys, work);
        }
        Ok(())
    }

    /// Appends the ids of what stands behind the known beginning, and notes where it was cut.
    fn encode_rest(&self, text: &str, work: &mut Work) -> Result<(), TokensError> {
        let rest = text.get(work.bytes..).unwrap_or_default();
        if !self.is_split_here {
            work.pieces += 1;
            let ids = self.fast.encode(rest).map_err(|error| failed(error.to_string()))?;
            work.ids.extend_from_slice(&ids);
            return Ok(());
        }
        let segments = self.fast.added_tokens().and_then(|t| t.split_with_opt(rest, false));
        let Some(segments) = segments else { return self.encode_plain(text, rest, work) };
        for segment in segments {
            match segment {
                Segment::Token(id) => work.ids.push(id),
                Segment::Text(plain) => self.encode_plain(text, plain, work)?,
            }
        }
        Ok(())
    }

    /// Encodes `plain`, a part of `text` in which no added token is looked for any more.
    fn encode_plain(&self, text: &str, plain: &str, work: &mut Work) -> Result<(), TokensError> {
        let mut is_inside = false;
        for piece in self.rule.pieces(plain) {
            let at = (piece.as_ptr() as usize).saturating_sub(text.as_ptr() as usize);
            let last = work.cuts.last().map_or(work.bytes, |cut| cut.at);
            if at >= last + SPAN_BYTES_MIN {
                let (before, behind) = text.split_at(at);
                let guard = self.added.guard(before.as_bytes(), behind, is_inside);
                let guard = guard.filter(|guard| *guard <= behind.len());
                work.cuts.extend(guard.map(|guard| Cut { at, guard, ids: work.ids.len() }));
            }
            let segment = [EncodeSegment::ordinary(piece)];
            let found: Vec<u32> = self
                .fast
                .encode_segments_unpadded(&segment)
                .map_err(|error| failed(error.to_string()))?;
            work.ids.extend_from_slice(&found);
            work.pieces += 1;
            is_inside = true;
        }
        Ok(())
    }

    /// The ids without any cutting or caching of ours, for checks.
    pub(crate) fn encode_whole(&self, text: &str) -> Result<Vec<u32>, TokensError> {
        self.fast.encode(text).map_err(|error| failed(error.to_string()))
    }

    /// `ids` between those that are put around a prompt.
    #[cfg(test)]
    pub(crate) fn around(&self, ids: &[u32]) -> Vec<u32> {
        [&self.before, ids, &self.after].concat()
    }

    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String, TokensError> {
        self.fast.decode(ids, false).map_err(|error| failed(error.to_string()))
    }

    pub(crate) fn cache_stats(&self) -> CacheStats {
        self.prefixes.as_ref().map(|prefixes| prefixes.lock().stats()).unwrap_or_default()
    }

    #[cfg(test)]
    pub(crate) fn check_cache(&self) {
        self.prefixes.iter().for_each(|prefixes| prefixes.lock().check());
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

/// Appends the keys of the blocks that the ids of `work` fill.
fn complete(links: &[Link], keys: &mut [Vec<BlockKey>], work: &Work) {
    for (link, keys) in links.iter().zip(keys) {
        let from = (keys.len() * link.block_size as usize).saturating_sub(work.first);
        link.extend(work.ids.get(from..).unwrap_or_default(), keys);
    }
}

/// The ids that the tokenizer's own post-processor puts before and after a prompt.
fn ends_of(fast: &Fast) -> Result<(Vec<u32>, Vec<u32>), LoadError> {
    let around = |ids: &[u32]| fast.post_process(ids.to_vec(), true);
    // Ids that no special token has, so that they are found among what is put around them.
    let [a, b, c] = [u32::MAX, u32::MAX - 1, u32::MAX - 2];
    let (one, two) = (around(&[a]), around(&[b, c]));
    let place = one.iter().position(|id| *id == a).unwrap_or(0);
    let (before, after) = (one.get(..place), one.get(place + 1..));
    let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
    match two == [before, &[b, c], after].concat() {
        true => Ok((before.to_vec(), after.to_vec())),
        false => Err(LoadError::Unsupported {
            message: "a post-processor that does more than put ids around a prompt".to_owned(),
        }),
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
