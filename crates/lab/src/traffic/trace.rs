//! Requests from a file: Mooncake's block hashes, or plain prompts, one JSON object in each line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::Deserialize;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{Call, KEPT_TOKENS_MAX, PROMPT_TOKENS_MAX, STAGE_REQUESTS_MAX, Stream, TOKEN_IDS};
use super::{TrafficError, push_tokens, stream};

/// Tokens of one block of a Mooncake trace.
pub const MOONCAKE_BLOCK_TOKENS: u64 = 512;

/// Longest line of a trace, in bytes.
pub const LINE_BYTES_MAX: usize = 64 << 20;

/// Of a text, the first tokens whose equality makes a group.
const GROUP_TOKENS: usize = 64;

/// What a trace is read with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// Decides what the blocks of a Mooncake trace hold.
    pub seed: u64,
    /// Length of an answer, for lines that have none.
    pub output_tokens: Option<u32>,
    /// Whether requests state `max_tokens`.
    pub max_tokens_sent: bool,
    /// Cuts texts into virtual tokens.
    pub bytes_per_token: f64,
    /// Longest request of an engine, answer included.
    pub request_tokens_max: u64,
    /// Whether every line must have a time; lines are then put in order of it.
    pub timed: bool,
}

/// The requests of a file, in order; block hashes and texts are kept, prompts are made when asked
/// for.
#[derive(Debug)]
pub(super) struct Trace {
    options: Options,
    lines: Vec<Line>,
    prompts: Vec<Prompt>,
    /// Blocks of all prompts of a Mooncake trace, numbered as they first occur.
    blocks: Vec<u32>,
    asked: usize,
}

#[derive(Clone, Copy, Debug)]
struct Line {
    at_s: f64,
    prompt: u32,
    output_tokens: u32,
}

#[derive(Debug)]
struct Prompt {
    group: u32,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// From this position of the pool of blocks, so many tokens.
    Blocks {
        from: usize,
        tokens: u32,
    },
    Tokens(Arc<[u32]>),
}

/// One line as written; which fields it has says what it is.
#[derive(Deserialize)]
struct Written {
    timestamp: Option<f64>,
    timestamp_s: Option<f64>,
    input_length: Option<u64>,
    output_length: Option<u64>,
    output_tokens: Option<u64>,
    max_tokens: Option<u64>,
    hash_ids: Option<Vec<u64>>,
    prompt: Option<String>,
    text: Option<String>,
    messages: Option<Vec<Message>>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    role: String,
    #[serde(default)]
    content: serde_json::Value,
}

/// What has been seen before, to number it; never iterated over.
#[derive(Default)]
struct Seen {
    blocks: FxHashMap<u64, u32>,
    prompts: FxHashMap<u128, u32>,
    groups: FxHashMap<u64, u32>,
    kept_tokens: u64,
}

/// Does a file that begins with this line hold one JSON object in each line?
pub(super) fn is_json_lines(first: &[u8]) -> bool {
    let line = first.trim_ascii();
    line.first() == Some(&b'{') && line.contains(&b':')
}

/// The next line that is not blank, with its number; counts lines in `number`.
pub(super) fn next_line(
    reader: &mut BufReader<File>,
    number: &mut u64,
    path: &str,
) -> Result<Option<Vec<u8>>, TrafficError> {
    loop {
        let mut line = Vec::new();
        let mut bounded = reader.take(LINE_BYTES_MAX as u64 + 1);
        let read = bounded
            .read_until(b'\n', &mut line)
            .map_err(|source| TrafficError::Read { path: path.to_owned(), source })?;
        if read == 0 {
            return Ok(None);
        }
        *number += 1;
        if read > LINE_BYTES_MAX {
            let message = format!("longer than {LINE_BYTES_MAX} bytes");
            return Err(TrafficError::Line { path: path.to_owned(), line: *number, message });
        }
        if !line.trim_ascii().is_empty() {
            return Ok(Some(line));
        }
    }
}

impl Trace {
    /// Reads what remains of a file after its `first` line.
    pub(super) fn read(
        options: Options,
        path: &str,
        first: Vec<u8>,
        mut number: u64,
        reader: &mut BufReader<File>,
    ) -> Result<Trace, TrafficError> {
        let mut trace =
            Trace { options, lines: Vec::new(), prompts: Vec::new(), blocks: Vec::new(), asked: 0 };
        let mut seen = Seen::default();
        let mut line = Some(first);
        while let Some(text) = line {
            trace.add(&text, &mut seen).map_err(|message| TrafficError::Line {
                path: path.to_owned(),
                line: number,
                message,
            })?;
            line = next_line(reader, &mut number, path)?;
        }
        if options.timed {
            trace.lines.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
            let begin = trace.lines[0].at_s;
            trace.lines.iter_mut().for_each(|line| line.at_s -= begin);
        }
        Ok(trace)
    }

    /// When each line is due, seconds from the first one.
    pub(super) fn times(&self) -> Vec<f64> {
        self.lines.iter().map(|line| line.at_s).collect()
    }

    /// The next line, from the start again after the last.
    pub(super) fn call(&mut self) -> Call {
        let line = self.lines[self.asked % self.lines.len()];
        self.asked += 1;
        let prompt = &self.prompts[line.prompt as usize];
        let tokens = match &prompt.content {
            Content::Tokens(tokens) => tokens.clone(),
            Content::Blocks { from, tokens } => self.tokens_of(*from, *tokens as usize),
        };
        Call {
            prompt_id: u64::from(line.prompt),
            tokens,
            output_tokens: line.output_tokens,
            output: Arc::default(),
            max_tokens: self.options.max_tokens_sent.then_some(line.output_tokens),
            group: prompt.group,
            session: None,
        }
    }

    fn tokens_of(&self, from: usize, count: usize) -> Arc<[u32]> {
        let mut tokens = Vec::with_capacity(count);
        for block in &self.blocks[from..] {
            let rest = (count - tokens.len()).min(MOONCAKE_BLOCK_TOKENS as usize);
            if rest == 0 {
                break;
            }
            let mut rng = stream(self.options.seed, Stream::Block, u64::from(*block));
            push_tokens(&mut tokens, rest, &mut rng);
        }
        tokens.into()
    }

    fn add(&mut self, text: &[u8], seen: &mut Seen) -> Result<(), String> {
        if self.lines.len() as u64 >= STAGE_REQUESTS_MAX {
            return Err(format!("more than {STAGE_REQUESTS_MAX} requests"));
        }
        let written: Written = serde_json::from_slice(text).map_err(|error| {
            let what = error.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            format!("column {}: {what}", error.column())
        })?;
        let at_s = self.time_of(&written)?;
        let output_tokens = self.output_of(&written)?;
        let (prompt, length) = match (&written.hash_ids, plain_text(&written)) {
            (Some(ids), None) => self.blocks_prompt(ids, written.input_length, seen)?,
            (None, Some(text)) => self.text_prompt(&text, seen)?,
            (None, None) => {
                return Err(
                    "no request: expected `input_length` and `hash_ids` (Mooncake), or one \
                            of `prompt`, `text`, `messages`"
                        .into(),
                );
            }
            (Some(_), Some(_)) => {
                return Err("`hash_ids` and a text: a line has one of them".into());
            }
        };
        let room = self.options.request_tokens_max;
        if length + u64::from(output_tokens) > room {
            return Err(format!(
                "{length} tokens and an answer of {output_tokens} do not fit an engine, which has \
                 room for {room} (fleet.kv_tokens)"
            ));
        }
        self.lines.push(Line { at_s, prompt, output_tokens });
        Ok(())
    }

    fn time_of(&self, written: &Written) -> Result<f64, String> {
        let at_s = match (written.timestamp_s, written.timestamp) {
            (Some(seconds), _) => seconds,
            (None, Some(milliseconds)) => milliseconds / 1e3,
            (None, None) if self.options.timed => {
                return Err("no `timestamp` (milliseconds) or `timestamp_s` (seconds), which \
                            `arrivals: trace` needs"
                    .into());
            }
            (None, None) => 0.0,
        };
        match at_s.is_finite() && at_s >= 0.0 {
            true => Ok(at_s),
            false => Err(format!("a time of {at_s} s; it must not be negative")),
        }
    }

    fn output_of(&self, written: &Written) -> Result<u32, String> {
        let fallback = self.options.output_tokens.map(u64::from);
        let length = written
            .output_length
            .or(written.output_tokens)
            .or(written.max_tokens)
            .or(fallback)
            .ok_or(
                "no length of the answer: expected `output_length`, `output_tokens` or \
                 `max_tokens`, or `workload.output_tokens` in the scenario",
            )?;
        match u32::try_from(length) {
            Ok(length @ 1..) if u64::from(length) <= PROMPT_TOKENS_MAX => Ok(length),
            _ => Err(format!("an answer of {length} tokens; from 1 to {PROMPT_TOKENS_MAX}")),
        }
    }

    /// The number of the prompt made of these blocks, and its length in tokens.
    fn blocks_prompt(
        &mut self,
        ids: &[u64],
        length: Option<u64>,
        seen: &mut Seen,
    ) -> Result<(u32, u64), String> {
        let length = length.ok_or("`hash_ids` without `input_length`")?;
        if !(1..=PROMPT_TOKENS_MAX).contains(&length) {
            return Err(format!("`input_length` {length}; from 1 to {PROMPT_TOKENS_MAX}"));
        }
        if length.div_ceil(MOONCAKE_BLOCK_TOKENS) != ids.len() as u64 {
            return Err(format!(
                "{} `hash_ids` for {length} tokens; expected {}, one for each {} tokens",
                ids.len(),
                length.div_ceil(MOONCAKE_BLOCK_TOKENS),
                MOONCAKE_BLOCK_TOKENS
            ));
        }
        let bytes: Vec<u8> =
            ids.iter().chain([&length]).flat_map(|number| number.to_le_bytes()).collect();
        if let Some(number) = seen.prompts.get(&xxh3_128(&bytes)) {
            return Ok((*number, length));
        }
        let from = self.blocks.len();
        if (from + ids.len()) as u64 > KEPT_TOKENS_MAX {
            return Err(format!("more than {KEPT_TOKENS_MAX} blocks in all"));
        }
        for id in ids {
            let next = seen.blocks.len() as u32;
            self.blocks.push(*seen.blocks.entry(*id).or_insert(next));
        }
        let group = seen.group(ids[0]);
        let content = Content::Blocks { from, tokens: length as u32 };
        Ok((self.keep(xxh3_128(&bytes), Prompt { group, content }, seen), length))
    }

    /// The number of the prompt with this text, and its length in tokens.
    fn text_prompt(&mut self, text: &str, seen: &mut Seen) -> Result<(u32, u64), String> {
        let length = (text.len() as f64 / self.options.bytes_per_token).ceil() as u64;
        if !(1..=PROMPT_TOKENS_MAX).contains(&length) {
            return Err(format!("a text of {length} tokens; from 1 to {PROMPT_TOKENS_MAX}"));
        }
        let key = xxh3_128(text.as_bytes());
        if let Some(number) = seen.prompts.get(&key) {
            return Ok((*number, length));
        }
        seen.kept_tokens += length;
        if seen.kept_tokens > KEPT_TOKENS_MAX {
            return Err(format!("more than {KEPT_TOKENS_MAX} tokens of different texts in all"));
        }
        let tokens = text_tokens(text.as_bytes(), length, self.options.bytes_per_token);
        let first = tokens.iter().take(GROUP_TOKENS).flat_map(|id| id.to_le_bytes());
        let group = seen.group(xxh3_64(&first.collect::<Vec<u8>>()));
        let content = Content::Tokens(tokens.into());
        Ok((self.keep(key, Prompt { group, content }, seen), length))
    }

    fn keep(&mut self, key: u128, prompt: Prompt, seen: &mut Seen) -> u32 {
        let number = self.prompts.len() as u32;
        self.prompts.push(prompt);
        seen.prompts.insert(key, number);
        number
    }
}

impl Seen {
    fn group(&mut self, key: u64) -> u32 {
        let next = self.groups.len() as u32;
        *self.groups.entry(key).or_insert(next)
    }
}

/// The text of a line, of a chat with its roles, so that a longer chat begins with a shorter one.
fn plain_text(written: &Written) -> Option<String> {
    if let Some(text) = written.prompt.as_ref().or(written.text.as_ref()) {
        return Some(text.clone());
    }
    let mut text = String::new();
    for message in written.messages.as_ref()? {
        text.push_str(&message.role);
        text.push('\n');
        match &message.content {
            serde_json::Value::String(content) => text.push_str(content),
            parts => text.push_str(&parts.to_string()),
        }
        text.push('\n');
    }
    Some(text)
}

/// Cuts a text every `bytes_per_token` bytes; each piece is hashed to a token, so that equal
/// beginnings of texts are equal beginnings of tokens.
fn text_tokens(text: &[u8], count: u64, bytes_per_token: f64) -> Vec<u32> {
    let cut = |at: u64| ((at as f64 * bytes_per_token) as usize).min(text.len());
    (0..count)
        .map(|at| {
            let hash = xxh3_64(&text[cut(at)..cut(at + 1)]) >> 32;
            ((hash * u64::from(TOKEN_IDS)) >> 32) as u32
        })
        .collect()
}

#[cfg(test)]
mod tests;
