//! How often is memory asked for on the way from a body to block keys?
//!
//! For what was seen, never; for text that was not seen before, by the tokenizer and for what is
//! kept of it. The bound is what was measured; a change that needs more has to say why.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::alloc::System;

use kvroute_core::blocks::{ChainSpec, Root};
use kvroute_core::decision::PromptChains;
use kvroute_tokens::{Tokenizer, Wanted};
use kvroute_wire::api::Api;
use kvroute_wire::request::{self, Lists};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Of the tokenizer and the cache, for a question of 1 KB.
const QUESTION_MAX: usize = 12;

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

/// What a caller keeps from body to body.
#[derive(Default)]
struct Memory {
    texts: Vec<u8>,
    lists: Lists,
    prompts: Vec<PromptChains>,
}

/// From a body to its block keys; how many tokens it has.
fn front(tokenizer: &Tokenizer, api: Api, json: &str, memory: &mut Memory) -> usize {
    let specs = [
        ChainSpec::exact(16),
        ChainSpec::exact(64),
        ChainSpec { partial_tail: true, ..ChainSpec::exact(16) },
    ];
    let wanted = Wanted { specs: &specs, root: Root::Base };
    let Memory { texts, lists, prompts } = memory;
    if texts.len() < json.len() {
        texts.resize(json.len(), 0);
    }
    let body = request::parse_in(api, json.as_bytes(), texts, lists).unwrap();
    let counts = tokenizer.chains_of(&body, wanted, prompts).unwrap();
    lists.take_back(body);
    counts.tokens
}

/// One test, because the allocator counts for the whole process.
#[test]
fn what_was_seen_asks_for_no_memory() {
    let tokenizer = Tokenizer::demo();
    let mut memory = Memory::default();
    let text = "words and\\nmore words ".repeat(1000);
    let text = format!(r#"{{"model":"m","prompt":"{text}"}}"#);
    let question = |name: &str| chat(&format!("{name}?\n{}", "what else is there ".repeat(50)));
    let asked = question("second").replace(
        r#""model":"m""#,
        r#""model":"m","stream":true,"chat_template_kwargs":{"enable_thinking":false}"#,
    );
    for warm_up in [question("first"), asked.clone(), question("third")] {
        front(&tokenizer, Api::ChatCompletions, &warm_up, &mut memory);
        front(&tokenizer, Api::Completions, &text, &mut memory);
    }
    for (api, json) in [(Api::Completions, &text), (Api::ChatCompletions, &asked)] {
        let (again, tokens) = count(|| front(&tokenizer, api, json, &mut memory));
        assert!(tokens > 3000, "{tokens}");
        assert_eq!(again, 0, "{api:?}");
    }
    let json = question("fourth");
    let work = || front(&tokenizer, Api::ChatCompletions, &json, &mut memory);
    let (new, tokens) = count(work);
    assert!(tokens > 5000, "{tokens}");
    assert!(0 < new && new <= QUESTION_MAX, "{new} for a new question");
    assert_eq!(tokenizer.template_stats().by_jinja, 0);
    println!("{new} for a new question");
}
