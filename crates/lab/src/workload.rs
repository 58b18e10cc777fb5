//! Which requests does a test send, and in which order?
//!
//! The shared-prefix workload of the published benchmark: groups that share a system prompt, users
//! within a group that each ask their own question again and again, one fixed shuffled order.

use std::sync::Arc;

use kvroute_core::Rng;

use crate::words;
use kvroute_tokens::{Tokenizer, TokensError};

/// Tokens of one prompt at most.
const PROMPT_TOKENS_MAX: u32 = 10_000_000;

/// Prompts of one workload at most.
const PROMPTS_MAX: u32 = 10_000_000;

/// In which order prompts are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// One shuffled order, repeated.
    #[default]
    Cyclic,
    /// Each request draws its prompt.
    Random,
}

/// The shape of a shared-prefix workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPrefix {
    /// System prompts.
    pub groups: u32,
    /// Users of each system prompt.
    pub users: u32,
    /// Length of a system prompt.
    pub prefix_tokens: u32,
    /// Length of a user's question.
    pub question_tokens: u32,
    /// Length of an answer.
    pub output_tokens: u32,
    /// Order of sending.
    pub order: Order,
    /// Decides texts and order.
    pub seed: u64,
}

/// One prompt that is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Whose system prompt.
    pub group: u32,
    /// Whose question.
    pub user: u32,
    /// Text.
    pub text: Arc<str>,
    /// Its tokens, as the tokenizer counts the text.
    pub tokens: u32,
}

/// A workload that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// A count that must not be 0.
    #[error("the workload needs at least one of: groups, users, prompt tokens, output tokens")]
    Empty,
    /// More than fits in memory.
    #[error("{what} is {value}, the limit is {limit}")]
    TooLarge {
        /// Which count.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u32,
    },
    /// The tokenizer knows too few words to make texts from.
    #[error("the tokenizer has {found} plain words, at least {needed} are needed")]
    TooFewWords {
        /// Found.
        found: usize,
        /// Needed.
        needed: usize,
    },
    /// The tokenizer fails on a text.
    #[error(transparent)]
    Tokens(#[from] TokensError),
}

/// Prompts and the order in which they are sent.
#[derive(Clone, Debug)]
pub struct Workload {
    prompts: Vec<Prompt>,
    order: Vec<u32>,
    drawn: Order,
    seed: u64,
    /// Length of every answer.
    pub output_tokens: u32,
}

impl Workload {
    /// Makes the texts of a shared-prefix workload.
    ///
    /// # Errors
    /// [`WorkloadError`] when the shape is empty or too large, or the tokenizer does not fit.
    pub fn shared_prefix(
        spec: &SharedPrefix,
        tokenizer: &Tokenizer,
    ) -> Result<Workload, WorkloadError> {
        let prompts = u64::from(spec.groups) * u64::from(spec.users);
        let tokens = u64::from(spec.prefix_tokens) + u64::from(spec.question_tokens);
        if prompts == 0 || tokens == 0 || spec.output_tokens == 0 {
            return Err(WorkloadError::Empty);
        }
        for (what, value, limit) in [
            ("groups x users", prompts, PROMPTS_MAX),
            ("prefix_tokens + question_tokens", tokens, PROMPT_TOKENS_MAX),
        ] {
            if value > u64::from(limit) {
                return Err(WorkloadError::TooLarge { what, value, limit });
            }
        }
        let vocabulary = words::words(tokenizer, 1024);
        if vocabulary.len() < words::WORDS_MIN {
            let found = vocabulary.len();
            return Err(WorkloadError::TooFewWords { found, needed: words::WORDS_MIN });
        }
        let mut rng = Rng::seeded(spec.seed);
        let mut prompts = Vec::new();
        for group in 0..spec.groups {
            let prefix = words::text(&vocabulary, spec.prefix_tokens, &mut rng);
            for user in 0..spec.users {
                let question = words::text(&vocabulary, spec.question_tokens, &mut rng);
                let text: Arc<str> = format!("{prefix}{question}").into();
                let tokens = tokenizer.encode(&text, true)?.len() as u32;
                prompts.push(Prompt { group, user, text, tokens });
            }
        }
        let mut order: Vec<u32> = (0..prompts.len() as u32).collect();
        rng.shuffle(&mut order);
        let (drawn, seed) = (spec.order, spec.seed);
        Ok(Workload { prompts, order, drawn, seed, output_tokens: spec.output_tokens })
    }

    /// All prompts.
    pub fn prompts(&self) -> &[Prompt] {
        &self.prompts
    }

    /// The prompt of the request at `position`, counted from the start of a stage.
    pub fn prompt(&self, position: usize) -> &Prompt {
        let index = match self.drawn {
            Order::Cyclic => self.order[position % self.order.len()] as usize,
            Order::Random => Rng::seeded(self.seed ^ (position as u64 + 1).rotate_left(17))
                .below(self.prompts.len()),
        };
        &self.prompts[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: SharedPrefix = SharedPrefix {
        groups: 3,
        users: 4,
        prefix_tokens: 50,
        question_tokens: 10,
        output_tokens: 5,
        order: Order::Cyclic,
        seed: 1,
    };

    #[test]
    fn texts_have_the_asked_lengths_and_groups_share_their_prefix() {
        let tokenizer = Tokenizer::demo();
        let workload = Workload::shared_prefix(&SPEC, &tokenizer).unwrap();
        assert_eq!(workload.prompts().len(), 12);
        let ids = |i: usize| tokenizer.encode(&workload.prompts()[i].text, true).unwrap();
        assert!(workload.prompts().iter().all(|prompt| prompt.tokens == 60));
        assert_eq!(ids(0)[..50], ids(3)[..50]);
        assert_ne!(ids(0)[50..], ids(3)[50..]);
        assert_ne!(ids(0)[..50], ids(4)[..50]);
    }

    #[test]
    fn a_cycle_sends_every_prompt_once_and_a_seed_repeats() {
        let tokenizer = Tokenizer::demo();
        let a = Workload::shared_prefix(&SPEC, &tokenizer).unwrap();
        let b = Workload::shared_prefix(&SPEC, &tokenizer).unwrap();
        let c = Workload::shared_prefix(&SharedPrefix { seed: 2, ..SPEC }, &tokenizer).unwrap();
        let sent = |workload: &Workload| -> Vec<(u32, u32)> {
            (0..12).map(|i| workload.prompt(i)).map(|p| (p.group, p.user)).collect()
        };
        assert_eq!(sent(&a), sent(&b));
        assert_ne!(a.prompts()[0].text, c.prompts()[0].text);
        let mut all = sent(&a);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 12);
        assert_eq!(a.prompt(0), a.prompt(12));
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let tokenizer = Tokenizer::demo();
        for spec in [
            SharedPrefix { groups: 0, ..SPEC },
            SharedPrefix { groups: u32::MAX, users: u32::MAX, ..SPEC },
            SharedPrefix { prefix_tokens: u32::MAX, ..SPEC },
        ] {
            assert!(Workload::shared_prefix(&spec, &tokenizer).is_err());
        }
    }
}
