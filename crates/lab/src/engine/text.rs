//! Text of prompts and outputs: which ids the simulated model says, and how each reads.

use std::sync::Arc;

use kvroute_tokens::{Tokenizer, TokensError};
use kvroute_wire::request::RequestBody;
use rustc_hash::FxHashMap;

use crate::words;

/// Most ids the output is drawn from: enough to look like text, few enough to decode at start.
const OUTPUT_IDS_MAX: usize = 2048;

/// A tokenizer and the words the model knows.
pub(super) struct Text {
    tokenizer: Tokenizer,
    output_ids: Arc<[u32]>,
    pieces: FxHashMap<u32, Box<str>>,
}

impl Text {
    /// Picks words that survive being read again, where the vocabulary has enough of them, else
    /// ids that read well on their own.
    pub(super) fn new(tokenizer: Tokenizer) -> Text {
        let mut chosen = words::words(&tokenizer, OUTPUT_IDS_MAX);
        if chosen.len() < words::WORDS_MIN {
            let readable = (0..tokenizer.vocab_size()).filter_map(|id| {
                let piece = tokenizer.decode(&[id]).ok().filter(|piece| reads_well(piece))?;
                Some((id, piece.into_boxed_str()))
            });
            chosen = readable.take(OUTPUT_IDS_MAX).collect();
        }
        let output_ids: Arc<[u32]> = match chosen.is_empty() {
            true => [0].into(),
            false => chosen.iter().map(|(id, _)| *id).collect(),
        };
        Text { tokenizer, output_ids, pieces: chosen.into_iter().collect() }
    }

    /// Ids the output is drawn from.
    pub(super) fn output_ids(&self) -> Arc<[u32]> {
        self.output_ids.clone()
    }

    /// How an output id reads.
    pub(super) fn piece(&self, id: u32) -> &str {
        self.pieces.get(&id).map_or("", |piece| piece)
    }

    /// The token ids of each prompt of a request.
    pub(super) fn prompts(&self, body: &RequestBody<'_>) -> Result<Vec<Vec<u32>>, TokensError> {
        self.tokenizer.tokens_of(body)
    }

    pub(super) fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokensError> {
        self.tokenizer.encode(text, special)
    }

    pub(super) fn decode(&self, ids: &[u32]) -> Result<String, TokensError> {
        self.tokenizer.decode(ids)
    }
}

fn reads_well(piece: &str) -> bool {
    !piece.is_empty() && piece.chars().all(|c| c.is_ascii_alphanumeric() || c == ' ')
}
