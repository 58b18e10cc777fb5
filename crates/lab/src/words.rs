//! Which words of a vocabulary survive being written and read again?
//!
//! Outputs and workloads are made of them: text built from such words has exactly the ids it was
//! built from, so cache hits do not depend on luck.

use kvroute_tokens::Tokenizer;

/// Fewer words than this make poor text; then a vocabulary is not used for its words.
pub const WORDS_MIN: usize = 16;

/// Ids that read as a space and at least two lowercase ASCII letters, and come back as themselves;
/// the first `max` of the vocabulary.
pub fn words(tokenizer: &Tokenizer, max: usize) -> Vec<(u32, Box<str>)> {
    let mut found = Vec::new();
    for id in 0..tokenizer.vocab_size() {
        if found.len() >= max {
            break;
        }
        let Ok(piece) = tokenizer.decode(&[id]) else { continue };
        if is_word(&piece) && tokenizer.encode(&piece, false).is_ok_and(|ids| ids == [id]) {
            found.push((id, piece.into_boxed_str()));
        }
    }
    found
}

fn is_word(piece: &str) -> bool {
    piece
        .strip_prefix(' ')
        .is_some_and(|word| word.len() >= 2 && word.bytes().all(|byte| byte.is_ascii_lowercase()))
}
