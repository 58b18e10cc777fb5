//! What do rendering and tokenizing cost, at first sight and again?
//!
//! ```text
//! cargo run --release -p kvroute-tokens --example measure -- [FOLDER]
//! ```
//!
//! FOLDER holds a `tokenizer.json`; without it the demo tokenizer is measured. Prompts: 24 system
//! prompts of 25 KB, 5 users of 5 KB each, as chat and as plain text. Times are the middle of all
//! calls of a kind, on one thread.

#![allow(clippy::print_stdout, reason = "a program that prints a table")]

use std::path::Path;
use std::time::Instant;

use kvroute_core::rng::Rng;
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use kvroute_wire::api::Api;
use kvroute_wire::request::{self, Prompt};

const SYSTEMS: usize = 24;
const USERS: usize = 5;

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

fn middle(mut nanos: Vec<u128>) -> String {
    nanos.sort_unstable();
    nanos.get(nanos.len() / 2).map_or("-".to_owned(), |n| format!("{:.1}", *n as f64 / 1000.0))
}

/// Times by kind: first sight of the system prompt, known system prompt with a new user, exact
/// repeat; and the times of rendering alone.
fn run(tokenizer: &Tokenizer, api: Api, bodies: &[Vec<String>]) -> [Vec<u128>; 4] {
    let mut kinds = [const { Vec::new() }; 4];
    for round in 0..2 {
        for users in bodies {
            for (user, body) in users.iter().enumerate() {
                let body = request::parse(api, body.as_bytes()).expect("the body is valid");
                let start = Instant::now();
                let ids = tokenizer.tokens_of(&body).expect("the prompt can be tokenized");
                let nanos = start.elapsed().as_nanos();
                assert!(!ids.is_empty());
                kinds[if round == 1 { 2 } else { user.min(1) }].push(nanos);
                if let Prompt::Chat(chat) = &body.prompt {
                    let start = Instant::now();
                    tokenizer.render_chat(chat).expect("the conversation can be rendered");
                    kinds[3].push(start.elapsed().as_nanos());
                }
            }
        }
    }
    kinds
}

fn main() {
    let folder = std::env::args().nth(1);
    let load = |cache_bytes_max| {
        let options = TokenizerOptions { cache_bytes_max, ..TokenizerOptions::default() };
        match &folder {
            Some(folder) => Tokenizer::load(Path::new(folder), &options),
            None => Tokenizer::demo_with(&options),
        }
        .expect("the tokenizer loads")
    };
    let start = Instant::now();
    let first = load(0);
    println!("loaded in {} ms, {} ids", start.elapsed().as_millis(), first.vocab_size());
    let mut rng = Rng::seeded(1);
    let (mut chats, mut texts) = (Vec::new(), Vec::new());
    for _ in 0..SYSTEMS {
        let system = prose(&mut rng, 25_000);
        let users: Vec<String> = (0..USERS).map(|_| prose(&mut rng, 5_000)).collect();
        let chat = |user: &String| {
            format!(
                r#"{{"messages":[{{"role":"system","content":{system:?}}},
                {{"role":"user","content":{user:?}}}]}}"#
            )
        };
        let text = |user: &String| format!(r#"{{"prompt":{:?}}}"#, format!("{system}{user}"));
        chats.push(users.iter().map(chat).collect());
        texts.push(users.iter().map(text).collect());
    }
    println!("| prompts | cache | first sight us | new user us | repeat us | rendering alone us |");
    println!("|---|---|---|---|---|---|");
    for (name, api, bodies) in
        [("chat", Api::ChatCompletions, &chats), ("text", Api::Completions, &texts)]
    {
        for cache_bytes_max in [0, 128 << 20] {
            let tokenizer = load(cache_bytes_max);
            let [new, known, repeat, render] = run(&tokenizer, api, bodies).map(middle);
            let cache = if cache_bytes_max == 0 { "off" } else { "on" };
            println!("| {name} | {cache} | {new} | {known} | {repeat} | {render} |");
        }
    }
}
