//! Texts of shared prefixes, for loops that send the next when the last is answered.

use std::sync::Arc;

use anyhow::ensure;
use kvroute_core::Rng;
use kvroute_lab::words;
use kvroute_tokens::Tokenizer;

/// Words of the vocabulary that texts are made of.
const WORDS_MAX: usize = 1024;

/// The shape of a workload.
#[derive(Clone, Copy, Debug)]
pub struct SharedPrefix {
    pub groups: u32,
    pub users: u32,
    pub prefix_tokens: u32,
    pub question_tokens: u32,
    pub output_tokens: u32,
    pub seed: u64,
}

/// One prompt that is sent.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub text: Arc<str>,
    /// As the tokenizer counts the text.
    pub tokens: u32,
}

/// Prompts in one shuffled order.
#[derive(Clone, Debug)]
pub struct Workload {
    pub spec: SharedPrefix,
    prompts: Vec<Prompt>,
}

impl Workload {
    pub fn new(spec: &SharedPrefix, tokenizer: &Tokenizer) -> anyhow::Result<Workload> {
        let words = words::words(tokenizer, WORDS_MAX);
        ensure!(words.len() >= words::WORDS_MIN, "the tokenizer knows too few plain words");
        let mut rng = Rng::seeded(spec.seed);
        let mut text = |count: u32| -> String {
            (0..count).map(|_| &*words[rng.below(words.len())].1).collect()
        };
        let mut prompts = Vec::new();
        for _ in 0..spec.groups {
            let prefix = text(spec.prefix_tokens);
            for _ in 0..spec.users {
                let text: Arc<str> = format!("{prefix}{}", text(spec.question_tokens)).into();
                let tokens = tokenizer.encode(&text, true)?.len() as u32;
                prompts.push(Prompt { text, tokens });
            }
        }
        ensure!(!prompts.is_empty(), "there is no prompt to send");
        rng.shuffle(&mut prompts);
        Ok(Workload { spec: *spec, prompts })
    }

    /// All prompts.
    pub fn prompts(&self) -> &[Prompt] {
        &self.prompts
    }

    /// The prompt of the request at `position`.
    pub fn prompt(&self, position: usize) -> &Prompt {
        &self.prompts[position % self.prompts.len()]
    }
}
