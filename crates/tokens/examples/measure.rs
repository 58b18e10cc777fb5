//! What does it cost to come from a body to block keys, step by step?
//!
//! ```text
//! cargo run --release -p kvroute-tokens --example measure -- [FOLDER] [KILOBYTES]
//! ```
//!
//! FOLDER holds a `tokenizer.json` (`-`: the demo tokenizer). Chats with a system prompt of
//! KILOBYTES (25) and questions of 5 KB, the same with a tool, and as plain text; chains of 16 and
//! 64 tokens a block. Times are the middle of all requests of a kind, on one thread; allocations
//! are the mean.
//! With `--count N` after these two, N requests of the kind `again` are made and nothing is
//! printed, for tools that count instructions.

#![allow(clippy::print_stdout, reason = "a program that prints a table")]

use std::alloc::System;
use std::path::Path;
use std::time::Instant;

use kvroute_core::blocks::{self, ChainSpec, PromptExtras, Root, TokenSpace};
use kvroute_core::decision::PromptChains;
use kvroute_core::rng::Rng;
use kvroute_tokens::{Tokenizer, TokenizerOptions, Wanted};
use kvroute_wire::api::Api;
use kvroute_wire::request::{self, Lists, Prompt};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const SPECS: [ChainSpec; 2] = [
    ChainSpec { block_size: 16, space: TokenSpace::Exact, partial_tail: false },
    ChainSpec { block_size: 64, space: TokenSpace::Exact, partial_tail: false },
];
/// Of a chat that the direct form of a template leaves to Jinja.
const TOOLS: &str = r#","tools":[{"type":"function","function":{"name":"weather",
    "description":"The weather of a place.","parameters":{"type":"object",
    "properties":{"place":{"type":"string"}},"required":["place"]}}}]"#;
const SYSTEMS: usize = 24;
const QUESTIONS: usize = 8;
const QUESTION_BYTES: usize = 5_000;

/// Sentences of made-up length from a small word list, with numbers and line ends between them.
fn prose(rng: &mut Rng, bytes: usize) -> String {
    const WORDS: [&str; 24] = [
        "router", "prefix", "the", "of", "cache", "is", "block", "and", "engine", "holds", "a",
        "request", "which", "token", "in", "answer", "meadow", "harbor", "every", "not", "first",
        "time", "place", "number",
    ];
    let mut text = String::new();
    while text.len() < bytes {
        for _ in 0..4 + rng.below(12) {
            text.push_str(WORDS[rng.below(WORDS.len())]);
            if rng.below(8) == 0 {
                text.push_str(&rng.below(1000).to_string());
            }
            text.push(' ');
        }
        text.push_str(if rng.below(5) == 0 { "end.\n\n" } else { "end. " });
    }
    text
}

/// For each system prompt its questions.
fn bodies(rng: &mut Rng, api: Api, tools: &str, system_bytes: usize) -> Vec<Vec<String>> {
    let body = |system: &str, question: &str| match api {
        Api::ChatCompletions => format!(
            r#"{{"model":"m","stream":true,"max_tokens":100{tools},"messages":[{{"role":"system","content":{system:?}}},{{"role":"user","content":{question:?}}}]}}"#
        ),
        _ => format!(r#"{{"model":"m","prompt":{:?}}}"#, format!("{system}{question}")),
    };
    let systems = (0..SYSTEMS).map(|_| {
        let system = prose(rng, system_bytes);
        (0..QUESTIONS).map(|_| body(&system, &prose(rng, QUESTION_BYTES))).collect()
    });
    systems.collect()
}

#[derive(Default)]
struct Kind {
    nanos: Vec<u128>,
    allocations: usize,
    bytes: usize,
}

impl Kind {
    fn add<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let region = Region::new(ALLOCATOR);
        let start = Instant::now();
        let made = work();
        self.nanos.push(start.elapsed().as_nanos());
        let change = region.change();
        self.allocations += change.allocations + change.reallocations;
        self.bytes += change.bytes_allocated;
        made
    }

    fn row(&mut self, name: &str) {
        self.nanos.sort_unstable();
        let count = self.nanos.len().max(1);
        let at = |part: usize| {
            let place = (count * part / 100).min(count - 1);
            self.nanos.get(place).map_or(0.0, |nanos| *nanos as f64 / 1000.0)
        };
        let (allocations, kib) =
            (self.allocations as f64 / count as f64, self.bytes as f64 / count as f64 / 1024.0);
        println!(
            "| {name} | {:.1} | {:.1} | {:.1} | {allocations:.1} | {kib:.1} |",
            at(10),
            at(50),
            at(99)
        );
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().filter(|folder| folder != "-");
    let kilobytes = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(25);
    let counted = arguments.next().filter(|flag| flag == "--count");
    let counted = counted.and_then(|_| arguments.next()?.parse::<usize>().ok());
    let options = TokenizerOptions::default();
    let tokenizer = match &folder {
        Some(folder) => Tokenizer::load(Path::new(folder), &options),
        None => Tokenizer::demo_with(&options),
    };
    let tokenizer = tokenizer.expect("the tokenizer loads");
    if let Some(count) = counted {
        let body = &bodies(&mut Rng::seeded(1), Api::ChatCompletions, "", kilobytes * 1000)[0][0];
        let mut memory = Memory::default();
        (0..count).for_each(|_| _ = front(&tokenizer, Api::ChatCompletions, body, &mut memory));
        return;
    }
    println!("| step | p10 us | p50 us | p99 us | allocations | KiB |");
    println!("|---|---|---|---|---|---|");
    let chat = Api::ChatCompletions;
    for (name, api, tools) in
        [("chat", chat, ""), ("with tools", chat, TOOLS), ("text", Api::Completions, "")]
    {
        let all = bodies(&mut Rng::seeded(1), api, tools, kilobytes * 1000);
        measure(&tokenizer, name, api, &all);
    }
}

/// What is kept from body to body.
#[derive(Default)]
struct Memory {
    texts: Vec<u8>,
    lists: Lists,
    prompts: Vec<PromptChains>,
}

/// From a body to the keys of its prompt; how many tokens that has.
fn front(tokenizer: &Tokenizer, api: Api, body: &str, memory: &mut Memory) -> usize {
    let Memory { texts, lists, prompts } = memory;
    texts.resize(body.len().max(texts.len()), 0);
    let wanted = Wanted { specs: &SPECS, root: Root::Base };
    let body = request::parse_in(api, body.as_bytes(), texts, lists).expect("a valid body");
    let counts = tokenizer.chains_of(&body, wanted, prompts).expect("a prompt with tokens");
    lists.take_back(body);
    counts.tokens
}

fn measure(tokenizer: &Tokenizer, name: &str, api: Api, all: &[Vec<String>]) {
    let mut kinds: [Kind; 8] = Default::default();
    let mut memory = Memory::default();
    let mut tokens = 0;
    for round in 0..4 {
        for (question, body) in all.iter().flat_map(|bodies| bodies.iter().enumerate()) {
            let kind = if round > 0 { 2 } else { question.min(1) };
            tokens = kinds[kind].add(|| front(tokenizer, api, body, &mut memory));
        }
    }
    for body in all.iter().flatten() {
        let Memory { texts, lists, .. } = &mut memory;
        let parsed = kinds[3].add(|| request::parse_in(api, body.as_bytes(), texts, lists));
        let parsed = parsed.expect("a valid body");
        let text = match &parsed.prompt {
            Prompt::Chat(chat) => {
                kinds[4].add(|| tokenizer.render_chat(chat)).expect("a rendered chat")
            }
            Prompt::Texts(texts) => texts.concat(),
            _ => continue,
        };
        lists.take_back(parsed);
        let ids = kinds[5].add(|| tokenizer.encode(&text, false)).expect("a text with ids");
        for (kind, spec) in kinds[6..].iter_mut().zip(SPECS) {
            kind.add(|| blocks::chain(spec, Root::Base, &ids, &PromptExtras::default()));
        }
    }
    let names = [
        &format!("{name}: first sight"),
        "new question",
        "again",
        "of it: parse",
        "render",
        "ids",
        "not of it: hash all in blocks of 16",
        "of 64",
    ];
    kinds.iter_mut().zip(names).for_each(|(kind, name)| kind.row(name));
    println!("| ({tokens} tokens) | | | | | |");
}
