//! How often is memory asked for on the way from a body to block keys?
//!
//! What is left after warm-up is the template engine's (values, stack, output of its filters) and,
//! for text that was not seen before, the tokenizer's and what is kept of it. The bounds are what
//! was measured; a change that needs more has to say why.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::alloc::System;

use kvroute_core::blocks::{ChainSpec, Root};
use kvroute_core::decision::PromptChains;
use kvroute_tokens::{Tokenizer, Wanted};
use kvroute_wire::api::Api;
use kvroute_wire::request::{self, Prompt};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Of the JSON parser, whose buffer for strings with escapes grows to the longest one; of each
/// message its text, and the list of them.
const PARSING_MAX: usize = 14;
/// Of the template engine, for a conversation of two messages.
const TEMPLATE_MAX: usize = 51;
/// In all, for a conversation that was seen: the end of a prompt, shorter than what is kept, is
/// tokenized each time.
const AGAIN_MAX: usize = 53;
/// Of the tokenizer and the cache, for a question of 1 KB.
const QUESTION_MAX: usize = 8;

/// How often `work` asked for memory.
fn count<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let region = Region::new(ALLOCATOR);
    let made = work();
    let change = region.change();
    (change.allocations + change.reallocations, made)
}

fn chat(question: &str) -> String {
    let system = "You are a careful assistant.\nAnswer what is asked. ".repeat(500);
    format!(
        r#"{{"model":"m","messages":[{{"role":"system","content":{system:?}}},{{"role":"user","content":{question:?}}}]}}"#
    )
}

/// One test, because the allocator counts for the whole process.
#[test]
fn what_was_seen_asks_for_little_memory() {
    let tokenizer = Tokenizer::demo();
    let specs = [
        ChainSpec::exact(16),
        ChainSpec::exact(64),
        ChainSpec { partial_tail: true, ..ChainSpec::exact(16) },
    ];
    let wanted = Wanted { specs: &specs, root: Root::Base };
    let mut prompts: Vec<PromptChains> = Vec::new();

    // Plain texts: everything but the list of prompts in the body is memory that was used before.
    let text = format!(r#"{{"model":"m","prompt":"{}"}}"#, "words and more words ".repeat(1000));
    let mut complete = || {
        let body = request::parse(Api::Completions, text.as_bytes()).unwrap();
        tokenizer.chains_of(&body, wanted, &mut prompts).unwrap().tokens
    };
    complete();
    complete();
    let (allocations, tokens) = count(complete);
    assert!(tokens > 3000, "{tokens}");
    assert_eq!(allocations, 1, "a prompt that was seen");

    // Conversations: what the template engine needs, and nothing else.
    let question = |name: &str| chat(&format!("{name}? {}", "what else is there ".repeat(50)));
    for warm_up in ["first", "second", "third"] {
        let json = question(warm_up);
        let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
        tokenizer.chains_of(&body, wanted, &mut prompts).unwrap();
    }
    let json = question("second");
    let (of_parsing, body) = count(|| request::parse(Api::ChatCompletions, json.as_bytes()));
    let body = body.unwrap();
    let Prompt::Chat(conversation) = &body.prompt else { panic!("no conversation") };
    let (of_template, text) = count(|| tokenizer.render_chat(conversation).unwrap());
    let (again, counts) = count(|| tokenizer.chains_of(&body, wanted, &mut prompts).unwrap());
    assert!(counts.tokens > 5000 && text.len() > 20_000);
    assert!(of_parsing <= PARSING_MAX, "{of_parsing} of parsing");
    assert!(of_template <= TEMPLATE_MAX, "{of_template} of the template");
    assert!(again <= AGAIN_MAX, "{again}, {of_template} of them of the template");

    let json = question("fourth");
    let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
    let (new, _) = count(|| tokenizer.chains_of(&body, wanted, &mut prompts).unwrap());
    assert!(new <= again + QUESTION_MAX, "{new} for a new question, {again} for a known one");
    println!("parsing {of_parsing}, template {of_template}, again {again}, new question {new}");
}
