//! What is asked? A few prompts with shared prefixes, so that caches matter, under adapters and
//! salts now and then.

use kvroute_core::Rng;

/// Name of the base model.
pub(super) const MODEL: &str = "base";
/// Adapters that every engine serves.
pub(super) const ADAPTERS: [&str; 2] = ["lora-a", "lora-b"];
/// Longest prompt, in tokens.
pub(super) const PROMPT_TOKENS_MAX: usize = 72;
/// Longest output, in tokens.
pub(super) const OUTPUT_TOKENS_MAX: usize = 24;

const GROUPS: usize = 4;
const POOL_MAX: usize = 40;

/// One prompt, and what else decides where its blocks are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prompt {
    pub tokens: Vec<u32>,
    pub salt: Option<&'static str>,
    pub adapter: Option<&'static str>,
}

/// The prompts of a run.
pub(super) struct Pool {
    prompts: Vec<Prompt>,
    serial: u32,
}

impl Pool {
    pub fn new(rng: &mut Rng) -> Pool {
        let mut prompts = Vec::new();
        for group in 0..GROUPS {
            let prefix = 4 + rng.below(40);
            for user in 0..4 {
                let question = 1 + rng.below(24);
                let tokens = (0..prefix).map(|at| token(group, 0, at));
                let tokens = tokens.chain((0..question).map(|at| token(group, user + 1, at)));
                prompts.push(dressed(rng, tokens.collect()));
            }
        }
        Pool { prompts, serial: 0 }
    }

    pub fn draw(&self, rng: &mut Rng) -> Prompt {
        self.prompts[rng.below(self.prompts.len())].clone()
    }

    /// A conversation goes on: the answer becomes part of a new prompt.
    pub fn learn(&mut self, rng: &mut Rng, prompt: Prompt) {
        if prompt.tokens.len() <= PROMPT_TOKENS_MAX && !self.prompts.contains(&prompt) {
            if self.prompts.len() < POOL_MAX {
                self.prompts.push(prompt);
            } else {
                let at = rng.below(self.prompts.len());
                self.prompts[at] = prompt;
            }
        }
    }

    /// A prompt that nobody asked before.
    pub fn unique(&mut self, tokens: usize) -> Prompt {
        self.serial += 1;
        let first = 1_000_000 + self.serial * 1_000;
        let tokens = (0..tokens as u32).map(|at| first + at).collect();
        Prompt { tokens, salt: None, adapter: None }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Prompt> {
        self.prompts.iter()
    }
}

fn token(group: usize, user: usize, at: usize) -> u32 {
    (group * 10_000 + user * 1_000 + at) as u32
}

fn dressed(rng: &mut Rng, tokens: Vec<u32>) -> Prompt {
    let salt = (rng.below(6) == 0).then(|| ["tenant-a", "tenant-b"][rng.below(2)]);
    let adapter = (rng.below(5) == 0).then(|| ADAPTERS[rng.below(2)]);
    Prompt { tokens, salt, adapter }
}
