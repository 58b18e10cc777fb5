//! What does it cost to turn a chat into tokens: never seen, with a system prompt that was seen,
//! and seen as a whole?

use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvroute_core::Rng;
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use kvroute_wire::api::Api;
use kvroute_wire::request;

use crate::Options;
use crate::clock::{quantile, timed};
use crate::table::{Better, Cell, Table};

const SYSTEM_PROMPTS: usize = 24;
const QUESTIONS: usize = 5;
const SYSTEM_BYTES: usize = 25_000;
const QUESTION_BYTES: usize = 5_000;

/// Sentences of words of 2 to 9 letters, with numbers and paragraphs.
fn prose(rng: &mut Rng, bytes: usize) -> String {
    const SYLLABLES: [&str; 16] = [
        "ca", "re", "ti", "on", "me", "lo", "sta", "ple", "in", "ver", "ka", "du", "es", "the",
        "mo", "ri",
    ];
    let mut text = String::new();
    while text.len() < bytes {
        for _ in 0..5 + rng.below(10) {
            (0..1 + rng.below(3)).for_each(|_| text.push_str(SYLLABLES[rng.below(16)]));
            if rng.below(12) == 0 {
                text.push_str(&format!(" {}", rng.below(10_000)));
            }
            text.push(' ');
        }
        text.push_str(if rng.below(6) == 0 { ".\n\n" } else { ". " });
    }
    text
}

/// Prints the table.
pub fn run(options: &Options) -> Result<()> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tokenizers/qwen3");
    let folder = options.tokenizer.clone().unwrap_or(default);
    ensure!(
        folder.join("tokenizer.json").exists(),
        "{} has no tokenizer.json: run scripts/fetch-tokenizer.sh, or name a folder with \
         --tokenizer",
        folder.display()
    );
    let tokenizer = Tokenizer::load(&folder, &TokenizerOptions::default())
        .with_context(|| format!("{} cannot be used", folder.display()))?;
    let mut rng = Rng::seeded(options.seed);
    let mut kinds = [const { Vec::new() }; 3];
    for _ in 0..SYSTEM_PROMPTS {
        let system = prose(&mut rng, SYSTEM_BYTES);
        for question in 0..QUESTIONS {
            let asked = prose(&mut rng, QUESTION_BYTES);
            let body = format!(
                r#"{{"messages":[{{"role":"system","content":{system:?}}},
                {{"role":"user","content":{asked:?}}}]}}"#
            );
            let body = request::parse(Api::ChatCompletions, body.as_bytes())?;
            for kind in [question.min(1), 2] {
                let (ids, ns) = timed(|| tokenizer.tokens_of(&body));
                ensure!(!ids?.is_empty(), "a chat without tokens");
                kinds[kind].push(ns);
            }
        }
    }
    let title = "Tokenizing a chat of 25 KB and a question of 5 KB, template included: p50 µs";
    let mut table = Table::new(title, Better::Lower);
    let columns = ["first sight", "seen system prompt, new question", "repeated"];
    for (column, mut times) in columns.into_iter().zip(kinds) {
        let p50 = quantile(&mut times, 0.5) as f64 / 1000.0;
        table.put("kvroute", column, Cell::new(p50, format!("{p50:.1}")));
    }
    table.print();
    Ok(())
}
