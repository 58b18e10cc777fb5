//! Which prompts are sent: shared prefixes, one share of the groups for each connection to send.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use kvroute_tokens::{Tokenizer, TokenizerOptions};

use crate::workload::{Prompt, SharedPrefix, Workload};

/// Prompts of the sample that tells how long a token is.
const SAMPLE_TOKENS: u32 = 2000;

/// How much of what.
pub struct Shape {
    pub engines: u32,
    pub groups: u32,
    pub users: u32,
    pub prompt: Length,
    pub output_tokens: u32,
}

/// How long a prompt is, about.
#[derive(Clone, Copy)]
pub enum Length {
    Bytes(u32),
    Tokens(u32),
}

/// The groups, dealt out to as many senders as there are engines. Without a router, sender N talks
/// to engine N, which is perfect affinity; with one, all talk to it and send exactly the same.
pub struct Work {
    pub senders: Vec<Arc<Workload>>,
    pub tokenizer: Tokenizer,
}

impl Work {
    pub fn new(shape: &Shape, tokenizer: Option<&Path>) -> anyhow::Result<Work> {
        let tokenizer = load(tokenizer)?;
        let spec = SharedPrefix {
            groups: 1,
            users: 1,
            prefix_tokens: SAMPLE_TOKENS,
            question_tokens: 0,
            output_tokens: shape.output_tokens,
            seed: 0,
        };
        let sample = Workload::new(&spec, &tokenizer)?;
        let token_bytes = sample.prompts()[0].text.len() as f64 / f64::from(SAMPLE_TOKENS);
        let tokens = match shape.prompt {
            Length::Bytes(bytes) => (f64::from(bytes) / token_bytes) as u32,
            Length::Tokens(tokens) => tokens,
        };
        let question_tokens = tokens / 6;
        let senders = (0..shape.engines).map(|sender| {
            let groups =
                shape.groups / shape.engines + u32::from(sender < shape.groups % shape.engines);
            let spec = SharedPrefix {
                groups: groups.max(1),
                users: shape.users,
                prefix_tokens: tokens - question_tokens,
                question_tokens,
                seed: u64::from(sender) + 1,
                ..spec
            };
            Ok(Arc::new(Workload::new(&spec, &tokenizer)?))
        });
        let senders = senders.collect::<anyhow::Result<_>>()?;
        Ok(Work { senders, tokenizer })
    }

    fn all(&self) -> impl Iterator<Item = &Prompt> {
        self.senders.iter().flat_map(|workload| workload.prompts())
    }

    pub fn prompts(&self) -> usize {
        self.all().count()
    }

    pub fn mean_bytes(&self) -> f64 {
        self.all().map(|prompt| prompt.text.len() as f64).sum::<f64>() / self.prompts() as f64
    }

    pub fn mean_tokens(&self) -> f64 {
        self.all().map(|prompt| f64::from(prompt.tokens)).sum::<f64>() / self.prompts() as f64
    }
}

/// The tokenizer in `file`, or the built-in one.
pub fn load(file: Option<&Path>) -> anyhow::Result<Tokenizer> {
    match file {
        None => Ok(Tokenizer::demo()),
        Some(path) => Tokenizer::load(path, &TokenizerOptions::default())
            .with_context(|| format!("--tokenizer {}", path.display())),
    }
}
