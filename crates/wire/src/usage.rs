//! How many tokens did an engine say it used?
//!
//! Finds the `usage` object in a response body that arrives in chunks cut at any byte: plain JSON
//! or server-sent events, with the names of OpenAI's APIs or of Anthropic's, or SGLang's
//! `meta_info`. Chunks without a usage object, nearly all of them, cost one substring search. At
//! most [`USAGE_BYTES_MAX`] bytes are kept. The answers of gRPC methods (`usage/frames.rs`) are
//! read field by field.
//!
//! A usage object is the key `"usage"` followed by `{`. Inside a JSON string every quote is
//! escaped, so the key's opening quote is genuine unless an odd number of backslashes stands
//! before it; text that a model generates cannot look like it.

mod frames;
mod plain;

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;

use crate::api::Api;
use frames::{FrameScanner, Frames};

/// Largest usage object that is read; vLLM's have about 200 bytes. A larger one is stepped over.
pub const USAGE_BYTES_MAX: usize = 4096;

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
static META_INFO: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"meta_info\""));

/// Tokens of a request as its engine counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Of the prompt, tokens that came from the prefix cache; `None` when the engine does not say
    /// (vLLM needs `--enable-prompt-tokens-details`).
    pub cached_tokens: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Looking for the key; the last `matched` bytes are its beginning.
    #[default]
    Searching,
    /// After the key: only white space and a colon may follow.
    BeforeColon,
    /// After the colon: only white space and a brace may follow.
    BeforeBrace,
    /// Inside the object.
    Object,
}

/// Reads one response body.
#[derive(Clone, Debug)]
pub struct UsageScanner {
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Json(JsonScanner),
    Frames(FrameScanner),
}

impl Default for UsageScanner {
    fn default() -> UsageScanner {
        UsageScanner::new()
    }
}

impl UsageScanner {
    /// A scanner for a new body of OpenAI's or Anthropic's APIs.
    pub fn new() -> UsageScanner {
        UsageScanner { form: Form::Json(JsonScanner::new(&USAGE)) }
    }

    /// A scanner for a new body of `api`; `None` where [`Api::tells_usage`] says no.
    pub fn of(api: Api) -> Option<UsageScanner> {
        let form = match api {
            _ if !api.tells_usage() => return None,
            Api::SglangGenerate => Form::Json(JsonScanner::new(&META_INFO)),
            Api::GrpcGenerate => Form::Frames(FrameScanner::new(Frames::Generate)),
            Api::GrpcEmbed => Form::Frames(FrameScanner::new(Frames::Embed)),
            Api::VertexChat | Api::VertexRaw | Api::VertexStreamRaw => {
                let json = Box::new(JsonScanner::new(&USAGE));
                Form::Frames(FrameScanner::new(Frames::HttpBody(json)))
            }
            _ => return Some(UsageScanner::new()),
        };
        Some(UsageScanner { form })
    }

    /// The next bytes of the body.
    pub fn push(&mut self, chunk: &[u8]) {
        match &mut self.form {
            Form::Json(json) => json.push(chunk),
            Form::Frames(frames) => frames.push(chunk),
        }
    }

    /// What the bytes so far say: of several usage objects (a stream with continuous usage) the
    /// last value of each number.
    pub fn usage(&self) -> Option<Usage> {
        match &self.form {
            Form::Json(json) => json.found,
            Form::Frames(frames) => frames.usage(),
        }
    }
}

/// Reads JSON and server-sent events.
#[derive(Clone, Debug)]
struct JsonScanner {
    /// The key with its quotes. Its only border is the quote.
    key: &'static LazyLock<Finder<'static>>,
    state: State,
    /// Bytes of the key seen at the end of the previous chunk.
    matched: usize,
    /// An odd number of backslashes ends the bytes seen so far.
    escaped: bool,
    object: Vec<u8>,
    depth: u32,
    in_string: bool,
    found: Option<Usage>,
    /// Tokens of the prompt that `input_tokens` leaves out (Anthropic), by the last object that
    /// says so.
    left_out: Option<u32>,
}

impl JsonScanner {
    fn new(key: &'static LazyLock<Finder<'static>>) -> JsonScanner {
        JsonScanner {
            key,
            state: State::Searching,
            matched: 0,
            escaped: false,
            object: Vec::new(),
            depth: 0,
            in_string: false,
            found: None,
            left_out: None,
        }
    }

    fn push(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while let Some(byte) = rest.first() {
            let used = match (self.state, byte) {
                (State::Searching, _) => self.search(rest),
                (State::BeforeColon | State::BeforeBrace, b' ' | b'\t' | b'\r' | b'\n') => 1,
                (State::BeforeColon, b':') => {
                    self.state = State::BeforeBrace;
                    1
                }
                (State::BeforeBrace, b'{') => {
                    self.state = State::Object;
                    self.object.clear();
                    self.depth = 0;
                    self.capture(rest)
                }
                (State::BeforeColon | State::BeforeBrace, _) => {
                    self.state = State::Searching;
                    0
                }
                (State::Object, _) => self.capture(rest),
            };
            rest = rest.get(used..).unwrap_or_default();
        }
    }

    /// Consumes bytes up to the end of the next key, or all of them.
    fn search(&mut self, bytes: &[u8]) -> usize {
        if self.matched > 0 {
            return self.continue_match(bytes[0]);
        }
        let key = self.key.needle();
        let Some(at) = self.key.find(bytes) else {
            let tail = bytes.len().saturating_sub(key.len() - 1);
            let quotes = (tail..bytes.len()).filter(|at| bytes[*at] == b'"');
            let begun = quotes
                .map(|at| (at, &bytes[at..]))
                .find(|(at, end)| key.starts_with(end) && !self.is_escaped(bytes, *at));
            let longest = begun.map(|(_, end)| end.len());
            self.escaped = self.is_escaped(bytes, bytes.len());
            self.matched = longest.unwrap_or(0);
            return bytes.len();
        };
        let is_escaped = self.is_escaped(bytes, at);
        self.escaped = false;
        if is_escaped {
            return at + 1;
        }
        self.state = State::BeforeColon;
        at + key.len()
    }

    /// Goes on with a key that began in an earlier chunk.
    fn continue_match(&mut self, byte: u8) -> usize {
        self.escaped = false;
        let key = self.key.needle();
        if byte == key[self.matched] {
            self.matched += 1;
            if self.matched == key.len() {
                self.matched = 0;
                self.state = State::BeforeColon;
            }
            return 1;
        }
        // Nothing of the key before this byte can be a backslash, so a quote here is genuine.
        self.matched = usize::from(byte == b'"');
        self.matched
    }

    /// Whether an odd number of backslashes stands before `bytes[at]`.
    fn is_escaped(&self, bytes: &[u8], at: usize) -> bool {
        let run = bytes[..at].iter().rev().take_while(|byte| **byte == b'\\').count();
        let before = run == at && self.escaped;
        (run % 2 == 1) != before
    }

    /// Consumes bytes of the object up to its end.
    fn capture(&mut self, bytes: &[u8]) -> usize {
        let room = USAGE_BYTES_MAX - self.object.len();
        let here = bytes.len().min(room);
        let mut next = 0;
        while next < here {
            if !std::mem::take(&mut self.escaped) {
                let tells = |byte: &u8| TELLS[usize::from(*byte)];
                let Some(step) = bytes[next..here].iter().position(tells) else { break };
                next += step;
                match bytes[next] {
                    b'\\' => self.escaped = self.in_string,
                    b'"' => self.in_string = !self.in_string,
                    _ if self.in_string => {}
                    b'{' => self.depth += 1,
                    _ => self.depth -= 1,
                }
            }
            next += 1;
            if self.depth == 0 {
                self.complete(&bytes[..next]);
                self.end_object();
                return next;
            }
        }
        self.object.extend_from_slice(&bytes[..here]);
        if here < bytes.len() {
            self.end_object();
        }
        here
    }

    fn end_object(&mut self) {
        self.state = State::Searching;
        self.object.clear();
        self.in_string = false;
    }

    /// The object ends with `end`; most lie in one piece and are read where they are.
    fn complete(&mut self, end: &[u8]) {
        if self.object.is_empty() {
            return self.merge(read_object(end));
        }
        self.object.extend_from_slice(end);
        self.merge(read_object(&self.object));
    }

    /// Takes over what the object says; one that is no usage object says nothing.
    fn merge(&mut self, object: Option<UsageObject>) {
        let Some(object) = object else { return };
        self.left_out = object.left_out().or(self.left_out);
        self.found = object.merged_into(self.found, self.left_out);
    }
}

/// Reads a usage object alone, as recordings keep it; `None` when it is none.
pub fn parse_object(json: &[u8]) -> Option<Usage> {
    let object = read_object(json)?;
    let left_out = object.left_out();
    object.merged_into(None, left_out)
}

fn read_object(json: &[u8]) -> Option<UsageObject> {
    plain::read(json).or_else(|| serde_json::from_slice(json).ok())
}

/// Bytes that tell where an object ends.
const TELLS: [bool; 256] = {
    let mut tells = [false; 256];
    tells[b'"' as usize] = true;
    tells[b'\\' as usize] = true;
    tells[b'{' as usize] = true;
    tells[b'}' as usize] = true;
    tells
};

#[derive(Debug, Default, PartialEq, Deserialize)]
struct UsageObject {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<Details>,
    input_tokens: Option<u32>,
    output_tokens: Option<u32>,
    input_tokens_details: Option<Details>,
    /// Anthropic: `input_tokens` counts neither these nor those below.
    cache_read_input_tokens: Option<u32>,
    cache_creation_input_tokens: Option<u32>,
    /// SGLang.
    cached_tokens: Option<u32>,
}

impl UsageObject {
    fn left_out(&self) -> Option<u32> {
        let (read, created) = (self.cache_read_input_tokens, self.cache_creation_input_tokens);
        let any = read.or(created);
        any.map(|_| read.unwrap_or(0).saturating_add(created.unwrap_or(0)))
    }

    fn merged_into(self, found: Option<Usage>, left_out: Option<u32>) -> Option<Usage> {
        let input = self.input_tokens.map(|n| n.saturating_add(left_out.unwrap_or(0)));
        let prompt = self.prompt_tokens.or(input);
        let completion = self.completion_tokens.or(self.output_tokens);
        let details = self.prompt_tokens_details.or(self.input_tokens_details);
        let cached = details
            .and_then(|details| details.cached_tokens)
            .or(self.cache_read_input_tokens)
            .or(self.cached_tokens);
        if prompt.is_none() && completion.is_none() {
            return found;
        }
        let before = found.unwrap_or_default();
        Some(Usage {
            prompt_tokens: prompt.unwrap_or(before.prompt_tokens),
            completion_tokens: completion.unwrap_or(before.completion_tokens),
            cached_tokens: cached.or(before.cached_tokens),
        })
    }
}

#[derive(Debug, PartialEq, Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

#[cfg(test)]
mod tests;
