//! Where may a text be cut so that its pieces, encoded one by one, give the ids of the whole?
//!
//! A cache of encoded pieces needs such places: a shared system prompt is found again only if it
//! is cut from what follows it. Added tokens (`<|im_start|>` and the like) are one kind of place
//! and are found by the tokenizer. This module adds places inside plain text, for tokenizers whose
//! pre-tokenizer is known word for word.
//!
//! **The rule**: after an ASCII letter that a space follows. **Why it is exact**, for each pattern
//! in `assets/cut_patterns.json` and for GPT-2's:
//! - No alternative of the pattern matches a letter followed by a space: letters are followed by
//!   letters, marks or an apostrophe's contraction only, so every match that holds the letter ends
//!   with it, and the next one starts at the space. There is no look-behind, so from there on the
//!   pattern sees the same text whether or not something stands before it.
//! - The only look-ahead, `\s+(?!\S)`, looks at the character after a run of white space. The left
//!   piece ends in a letter, so each of its runs is followed by a character of the piece itself.
//! - The model encodes each match on its own, and NFC never composes across a letter and a space.
//!
//! The pieces depend only on what stands before them, so two texts with a common beginning have
//! the same pieces up to the one where they part.

use std::collections::BTreeMap;

use serde_json::Value;

/// Shortest piece that is cut off, in bytes. Where two prompts part, half of this is tokenized
/// again on average; each piece costs a fraction of a microsecond, and some 200 bytes of cache.
pub(crate) const PIECE_BYTES_MIN: usize = 2048;

/// The patterns for which the rule is exact, by the models that use them.
const PATTERNS: &str = include_str!("../assets/cut_patterns.json");

/// Whether pieces of plain text can be encoded one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutRule {
    /// Only at added tokens.
    Never,
    /// Also after an ASCII letter before a space.
    BeforeSpace,
}

impl CutRule {
    /// The rule for these parts of a `tokenizer.json`; [`CutRule::Never`] for whatever is not known
    /// to be exact.
    pub(crate) fn of(normalizer: &Value, pre_tokenizer: &Value) -> CutRule {
        let patterns: BTreeMap<String, String> =
            serde_json::from_str(PATTERNS).expect("the tests read this embedded file");
        let is_exact =
            is_exact_normalizer(normalizer) && is_exact_pre_tokenizer(pre_tokenizer, &patterns);
        if is_exact { CutRule::BeforeSpace } else { CutRule::Never }
    }

    /// The pieces of `text`, which together are `text`.
    pub(crate) fn pieces(self, text: &str) -> Pieces<'_> {
        Pieces { rest: text, rule: self }
    }
}

fn is_exact_normalizer(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        None => normalizer.is_null(),
        Some("NFC") => true,
        Some("Sequence") => {
            let list = normalizer["normalizers"].as_array();
            list.is_some_and(|list| list.iter().all(is_exact_normalizer))
        }
        Some(_) => false,
    }
}

fn is_exact_pre_tokenizer(pre_tokenizer: &Value, patterns: &BTreeMap<String, String>) -> bool {
    let steps = match pre_tokenizer["type"].as_str() {
        Some("Sequence") => match pre_tokenizer["pretokenizers"].as_array() {
            Some(steps) => steps.as_slice(),
            None => return false,
        },
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let Some((last, splits)) = steps.split_last() else { return false };
    // A space in front of each piece would be one more than in front of the whole.
    let is_byte_level = last["type"] == "ByteLevel" && last["add_prefix_space"] == false;
    // With `use_regex` missing, HF takes GPT-2's pattern.
    let splits_words = last["use_regex"] != false;
    is_byte_level
        && splits.iter().all(|step| is_exact_split(step, patterns))
        && (splits_words || !splits.is_empty())
}

fn is_exact_split(step: &Value, patterns: &BTreeMap<String, String>) -> bool {
    let is_known = |pattern: &Value| patterns.values().any(|known| pattern == known);
    match step["type"].as_str() {
        Some("Split") => {
            // The patterns match everything, so what is kept is the same either way.
            let keeps_matches = (step["behavior"] == "Isolated" && step["invert"] == false)
                || (step["behavior"] == "Removed" && step["invert"] == true);
            keeps_matches && is_known(&step["pattern"]["Regex"])
        }
        Some("Digits") => true,
        _ => false,
    }
}

/// The pieces of a text.
pub(crate) struct Pieces<'a> {
    rest: &'a str,
    rule: CutRule,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.rest.is_empty() {
            return None;
        }
        let at = match self.rule {
            CutRule::Never => self.rest.len(),
            CutRule::BeforeSpace => next_cut(self.rest.as_bytes()),
        };
        let (piece, rest) = self.rest.split_at(at);
        self.rest = rest;
        Some(piece)
    }
}

/// The first place at or after [`PIECE_BYTES_MIN`] where the rule allows a cut.
fn next_cut(bytes: &[u8]) -> usize {
    let tail = bytes.get(PIECE_BYTES_MIN - 1..).unwrap_or_default();
    let found = tail.windows(2).position(|pair| pair[0].is_ascii_alphabetic() && pair[1] == b' ');
    found.map_or(bytes.len(), |at| PIECE_BYTES_MIN + at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pieces_join_to_the_text_and_end_in_letters() {
        let text = "word word2 über 你好 x\n".repeat(2000);
        let pieces: Vec<&str> = CutRule::BeforeSpace.pieces(&text).collect();
        assert!(pieces.len() > 5);
        assert_eq!(pieces.concat(), text);
        for piece in &pieces[..pieces.len() - 1] {
            assert!(piece.len() >= PIECE_BYTES_MIN);
            assert!(piece.ends_with(|c: char| c.is_ascii_alphabetic()));
        }
        for piece in &pieces[1..] {
            assert!(piece.starts_with(' '));
        }
        assert_eq!(CutRule::Never.pieces(&text).count(), 1);
        assert_eq!(CutRule::BeforeSpace.pieces("").count(), 0);
    }

    #[test]
    fn a_common_beginning_has_common_pieces() {
        let shared = "the same words again and again ".repeat(200);
        let (a, b) = (format!("{shared}one end"), format!("{shared}another end of it"));
        let pieces = |text: &'static str| CutRule::BeforeSpace.pieces(text).collect::<Vec<_>>();
        let (a, b) = (pieces(a.leak()), pieces(b.leak()));
        assert_eq!(a[..a.len() - 1], b[..b.len() - 1]);
        assert_ne!(a.last(), b.last());
    }

    #[test]
    fn only_what_is_known_word_for_word_is_cut() {
        let split = |pattern: &str, behavior: &str| {
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior,
                   "invert": false})
        };
        let bytes = |prefix: bool, regex: bool| {
            json!({"type": "ByteLevel",
            "add_prefix_space": prefix, "use_regex": regex})
        };
        let sequence = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
        let patterns: BTreeMap<String, String> = serde_json::from_str(PATTERNS).unwrap();
        let pattern = &patterns["Qwen 2, 2.5, 3"];
        let qwen = split(pattern, "Isolated");
        let table = [
            (json!(null), sequence(&[qwen.clone(), bytes(false, false)]), true),
            (json!({"type": "NFC"}), sequence(&[qwen.clone(), bytes(false, false)]), true),
            (json!({"type": "NFKC"}), sequence(&[qwen.clone(), bytes(false, false)]), false),
            (json!(null), sequence(&[qwen.clone(), bytes(true, false)]), false),
            (json!(null), sequence(&[split(pattern, "Removed"), bytes(false, false)]), false),
            (json!(null), sequence(&[split(r"\w+", "Isolated"), bytes(false, false)]), false),
            (json!(null), bytes(false, true), true),
            (json!(null), bytes(false, false), false),
            (json!(null), json!({"type": "Metaspace"}), false),
            (json!(null), json!(null), false),
            (json!(null), sequence(&[]), false),
        ];
        for (normalizer, pre_tokenizer, is_cut) in table {
            let want = if is_cut { CutRule::BeforeSpace } else { CutRule::Never };
            let got = CutRule::of(&normalizer, &pre_tokenizer);
            assert_eq!(got, want, "{normalizer} {pre_tokenizer}");
        }
    }
}
