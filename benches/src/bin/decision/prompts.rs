//! Which bodies are sent? Chats: a system prompt, mostly one of a few, and a question.

use anyhow::ensure;
use bytes::Bytes;
use clap::ValueEnum;
use kvroute_core::Rng;
use kvroute_lab::words;
use kvroute_tokens::Tokenizer;

/// Words of the vocabulary that texts are made of.
const WORDS_MAX: usize = 1024;
/// Different system prompts.
pub const SYSTEMS: usize = 16;
/// The model of every request.
const MODEL: &str = "m";

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// 200 tokens, half of them a system prompt that was seen.
    Short,
    /// 7,200 tokens: a system prompt of 6,000 that was seen, and a new question.
    ChatSeen,
    /// 7,200 tokens, all of them seen.
    ChatRepeat,
    /// 7,200 tokens, none of them seen.
    ChatFirst,
    /// 65,536 tokens, of which 65,000 were seen.
    LongSeen,
}

impl Case {
    pub fn name(self) -> &'static str {
        match self {
            Case::Short => "200 tokens",
            Case::ChatSeen => "7,200 tokens, system prompt seen",
            Case::ChatRepeat => "7,200 tokens, exact repeat",
            Case::ChatFirst => "7,200 tokens, first sight",
            Case::LongSeen => "64k tokens, prefix seen",
        }
    }

    /// Tokens of the system prompt, and of the question.
    fn tokens(self) -> (u32, u32) {
        match self {
            Case::Short => (100, 100),
            Case::ChatSeen | Case::ChatRepeat | Case::ChatFirst => (6_000, 1_200),
            Case::LongSeen => (65_000, 536),
        }
    }
}

/// Bodies of one case.
pub struct Prompts {
    case: Case,
    words: Vec<Box<str>>,
    rng: Rng,
    systems: Vec<String>,
    questions: Vec<String>,
    made: usize,
}

impl Prompts {
    pub fn new(tokenizer: &Tokenizer, case: Case) -> anyhow::Result<Prompts> {
        let words = words::words(tokenizer, WORDS_MAX);
        ensure!(words.len() >= words::WORDS_MIN, "the tokenizer knows too few plain words");
        let words = words.into_iter().map(|(_, word)| word).collect();
        let (systems, questions) = (Vec::new(), Vec::new());
        let rng = Rng::seeded(case as u64);
        let mut prompts = Prompts { case, words, rng, systems, questions, made: 0 };
        let (system, question) = case.tokens();
        prompts.systems = (0..SYSTEMS).map(|_| prompts.text(system)).collect();
        prompts.questions = (0..SYSTEMS).map(|_| prompts.text(question)).collect();
        Ok(prompts)
    }

    /// Every word is a token, and needs no escapes in JSON.
    fn text(&mut self, tokens: u32) -> String {
        (0..tokens).map(|_| &*self.words[self.rng.below(self.words.len())]).collect()
    }

    fn body(system: &str, question: &str) -> Bytes {
        Bytes::from(format!(
            "{{\"model\":\"{MODEL}\",\"messages\":[{{\"role\":\"system\",\"content\":\
             \"{system}\"}},{{\"role\":\"user\",\"content\":\"{question}\"}}],\"max_tokens\":100,\
             \"temperature\":0.7,\"stream\":true,\"stream_options\":{{\"include_usage\":true}}}}"
        ))
    }

    /// Two that begin with the same system prompt, the first of which is the one that repeats.
    pub fn of_system(&mut self, at: usize) -> [Bytes; 2] {
        let other = self.text(32);
        let (system, question) = (&self.systems[at], &self.questions[at]);
        [Prompts::body(system, question), Prompts::body(system, &other)]
    }

    /// The next one.
    pub fn next(&mut self) -> Bytes {
        let (system, question) = self.case.tokens();
        let at = self.made % SYSTEMS;
        self.made += 1;
        match self.case {
            Case::ChatRepeat => Prompts::body(&self.systems[at], &self.questions[at]),
            Case::ChatFirst => Prompts::body(&self.text(system), &self.text(question)),
            Case::Short | Case::ChatSeen | Case::LongSeen => {
                let question = self.text(question);
                Prompts::body(&self.systems[at], &question)
            }
        }
    }
}
