//! Which bodies do clients send? Completions and chats in turn, of a shared beginning and a new
//! rest.

use anyhow::ensure;
use kvroute_core::Rng;
use kvroute_lab::words;
use kvroute_tokens::Tokenizer;

use crate::engines::MODEL;

/// Words of the vocabulary that texts are made of.
const WORDS_MAX: usize = 1024;
/// Different beginnings.
const GROUPS: usize = 100;

/// Bodies without end.
pub struct Prompts {
    words: Vec<Box<str>>,
    prefixes: Vec<String>,
    rest_tokens: u32,
    rng: Rng,
    sent: usize,
}

/// One request.
pub struct Ask {
    pub path: &'static str,
    pub body: String,
}

impl Prompts {
    /// Prompts of so many tokens, the chat template's own not counted; so many of them are shared.
    pub fn new(tokenizer: &Tokenizer, tokens: u32, shared: u32) -> anyhow::Result<Prompts> {
        let words = words::words(tokenizer, WORDS_MAX);
        ensure!(words.len() >= words::WORDS_MIN, "the tokenizer knows too few plain words");
        let words = words.into_iter().map(|(_, word)| word).collect();
        let rest_tokens = tokens.saturating_sub(shared);
        let prefixes = Vec::new();
        let mut prompts = Prompts { words, prefixes, rest_tokens, rng: Rng::seeded(1), sent: 0 };
        prompts.prefixes = (0..GROUPS).map(|_| prompts.text(shared)).collect();
        Ok(prompts)
    }

    /// Every word is a token, and needs no escapes in JSON.
    fn text(&mut self, tokens: u32) -> String {
        (0..tokens).map(|_| &*self.words[self.rng.below(self.words.len())]).collect()
    }

    /// The next one.
    pub fn next(&mut self) -> Ask {
        let rest = self.text(self.rest_tokens);
        let prefix = &self.prefixes[self.rng.below(GROUPS)];
        let options = "\"max_tokens\":100,\"temperature\":0.7,\"stream\":true,\
                       \"stream_options\":{\"include_usage\":true}";
        self.sent += 1;
        match self.sent % 2 {
            0 => Ask {
                path: "/v1/completions",
                body: format!("{{\"model\":\"{MODEL}\",\"prompt\":\"{prefix}{rest}\",{options}}}"),
            },
            _ => Ask {
                path: "/v1/chat/completions",
                body: format!(
                    "{{\"model\":\"{MODEL}\",\"messages\":[{{\"role\":\"system\",\"content\":\
                     \"{prefix}\"}},{{\"role\":\"user\",\"content\":\"{rest}\"}}],{options}}}"
                ),
            },
        }
    }
}
