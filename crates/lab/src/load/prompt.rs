//! From virtual token ids to what is sent: text with exactly as many tokens, or ids.

use std::sync::Arc;

use kvroute_tokens::Tokenizer;
use kvroute_wire::api::Api;
use kvroute_wire::request;
use serde_json::{Value, json};

use super::{LoadApi, LoadConfig, LoadError, PromptForm};
use crate::words;

/// Words of the vocabulary that are used: many enough that two prompts do not agree by chance in a
/// whole block.
const WORDS_MAX: usize = 4096;

/// What an answer said, and where a later prompt repeats it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    /// Position in the later prompt, in virtual tokens.
    pub at: usize,
    /// Virtual tokens that it stands for.
    pub tokens: usize,
    /// What was really said.
    pub text: Arc<str>,
}

/// Makes the bodies of requests.
pub(super) struct Prompts {
    words: Vec<(u32, Box<str>)>,
    tokenizer: Tokenizer,
    api: LoadApi,
    form: PromptForm,
    /// Tokens that the engine puts around a prompt; so many of the prompt's own are left out at the
    /// start, where all prompts that share a prefix lose the same.
    around: usize,
}

impl Prompts {
    pub(super) fn new(config: &LoadConfig, tokenizer: &Tokenizer) -> Result<Prompts, LoadError> {
        let words = words::words(tokenizer, WORDS_MAX);
        if words.len() < words::WORDS_MIN {
            return Err(LoadError::TooFewWords { found: words.len() });
        }
        if (config.api, config.form) == (LoadApi::ChatCompletions, PromptForm::Ids) {
            return Err(LoadError::ChatOfIds);
        }
        let (api, form) = (config.api, config.form);
        let mut prompts = Prompts { words, tokenizer: tokenizer.clone(), api, form, around: 0 };
        prompts.around = prompts.tokens_around()?;
        Ok(prompts)
    }

    /// Counts a prompt of one word as an engine would.
    fn tokens_around(&self) -> Result<usize, LoadError> {
        let mut body = json!({ "model": "" });
        self.put(&mut body, &[0], &[]);
        let (api, body) = (self.api.of_wire(), body.to_string());
        let parsed =
            request::parse(api, body.as_bytes()).map_err(|e| LoadError::Tokens(e.to_string()))?;
        let lists = self.tokenizer.tokens_of(&parsed);
        let lists = lists.map_err(|error| LoadError::Tokens(error.to_string()))?;
        Ok(lists.first().map_or(0, Vec::len).saturating_sub(1))
    }

    fn word(&self, token: u32) -> &(u32, Box<str>) {
        &self.words[token as usize % self.words.len()]
    }

    fn text(&self, tokens: &[u32]) -> String {
        tokens.iter().map(|&token| &*self.word(token).1).collect()
    }

    /// The prompt in parts: own words and, between them, what was said.
    fn parts<'a>(&self, tokens: &'a [u32], said: &'a [Said]) -> Vec<(&'a [u32], Option<&'a str>)> {
        let end = |from: usize, to: usize| tokens.get(from..to.min(tokens.len())).unwrap_or(&[]);
        let first = said.first().map_or(tokens.len(), |said| said.at);
        let mut at = self.around.min(first.saturating_sub(1));
        let mut parts = Vec::new();
        for said in said {
            parts.push((end(at, said.at), Some(&*said.text)));
            at = said.at + said.tokens;
        }
        parts.push((end(at, tokens.len()), None));
        parts
    }

    /// Adds the prompt to a body.
    pub(super) fn put(&self, body: &mut Value, tokens: &[u32], said: &[Said]) {
        let parts = self.parts(tokens, said);
        match (self.api, self.form) {
            (LoadApi::Completions, PromptForm::Text) => {
                let mut text = String::new();
                for (own, said) in parts {
                    text += &self.text(own);
                    text += said.unwrap_or_default();
                }
                body["prompt"] = text.into();
            }
            (LoadApi::Completions, PromptForm::Ids) => {
                let mut ids: Vec<u32> = Vec::with_capacity(tokens.len());
                for (own, said) in parts {
                    ids.extend(own.iter().map(|&token| self.word(token).0));
                    // Text that came from the engine can be tokenized; if not, it is left out.
                    let said = said.map(|text| self.tokenizer.encode(text, false));
                    ids.extend(said.and_then(Result::ok).unwrap_or_default());
                }
                body["prompt"] = ids.into();
            }
            (LoadApi::ChatCompletions, _) => {
                let mut messages = Vec::new();
                for (own, said) in parts {
                    messages.push(json!({"role": "user", "content": self.text(own)}));
                    if let Some(said) = said {
                        messages.push(json!({"role": "assistant", "content": said}));
                    }
                }
                body["messages"] = messages.into();
            }
        }
    }
}

impl LoadApi {
    pub(super) fn path(self) -> &'static str {
        match self {
            LoadApi::Completions => "/v1/completions",
            LoadApi::ChatCompletions => "/v1/chat/completions",
        }
    }

    fn of_wire(self) -> Api {
        match self {
            LoadApi::Completions => Api::Completions,
            LoadApi::ChatCompletions => Api::ChatCompletions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(prompts: &Prompts, tokens: &[u32], said: &[Said]) -> (usize, Vec<u32>) {
        let mut body = json!({ "model": "m" });
        prompts.put(&mut body, tokens, said);
        let body = body.to_string();
        let parsed = request::parse(prompts.api.of_wire(), body.as_bytes()).unwrap();
        let ids = prompts.tokenizer.tokens_of(&parsed).unwrap().remove(0);
        (ids.len(), ids)
    }

    fn shared(a: &[u32], b: &[u32]) -> usize {
        a.iter().zip(b).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn a_shared_virtual_prefix_is_a_shared_real_one_of_the_same_length() {
        let tokenizer = Tokenizer::demo();
        for (api, form) in [
            (LoadApi::Completions, PromptForm::Text),
            (LoadApi::Completions, PromptForm::Ids),
            (LoadApi::ChatCompletions, PromptForm::Text),
        ] {
            let config = LoadConfig { api, form, ..LoadConfig::new("m", "http://x", "m") };
            let prompts = Prompts::new(&config, &tokenizer).unwrap();
            let a: Vec<u32> = (0..500).collect();
            let b: Vec<u32> = (0..300).chain(1000..1200).collect();
            let ((count_a, ids_a), (count_b, ids_b)) =
                (count(&prompts, &a, &[]), count(&prompts, &b, &[]));
            assert_eq!((count_a, count_b), (500, 500), "{api:?} {form:?}");
            // A chat ends with what the template puts there, so the words end earlier.
            let expected = if api == LoadApi::Completions { 300..=300 } else { 270..=300 };
            assert!(expected.contains(&shared(&ids_a, &ids_b)), "{api:?} {form:?}");
        }
        let chat = LoadConfig {
            api: LoadApi::ChatCompletions,
            form: PromptForm::Ids,
            ..LoadConfig::new("m", "http://x", "m")
        };
        assert!(matches!(Prompts::new(&chat, &tokenizer), Err(LoadError::ChatOfIds)));
    }

    #[test]
    fn what_was_said_stands_where_the_virtual_answer_would() {
        let tokenizer = Tokenizer::demo();
        let config = LoadConfig::new("m", "http://x", "m");
        let prompts = Prompts::new(&config, &tokenizer).unwrap();
        let tokens: Vec<u32> = (0..50).collect();
        let answer: String = prompts.text(&[901, 902, 903, 904]);
        let said = [Said { at: 20, tokens: 4, text: answer.clone().into() }];
        let mut body = json!({});
        prompts.put(&mut body, &tokens, &said);
        let own = |range: std::ops::Range<usize>| prompts.text(&tokens[range]);
        assert_eq!(body["prompt"], format!("{}{answer}{}", own(0..20), own(24..50)));
        assert_eq!(count(&prompts, &tokens, &said).0, 50);
        // A place beyond the prompt is harmless.
        prompts.put(&mut body, &tokens[..5], &said);
        let config = LoadConfig { api: LoadApi::ChatCompletions, ..config };
        let prompts = Prompts::new(&config, &tokenizer).unwrap();
        prompts.put(&mut body, &tokens, &said);
        let roles: Vec<_> =
            body["messages"].as_array().unwrap().iter().map(|m| m["role"].clone()).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        assert_eq!(body["messages"][1]["content"], *answer);
    }
}
