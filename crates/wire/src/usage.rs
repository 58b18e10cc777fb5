//! How many tokens did an engine say it used?
//!
//! Finds the `usage` object in a response body that arrives in chunks cut at any byte: plain JSON
//! or server-sent events, OpenAI's names or those of the responses API. Chunks without a usage
//! object, nearly all of them, cost one substring search. At most [`USAGE_BYTES_MAX`] bytes are
//! kept.
//!
//! A usage object is the key `"usage"` followed by `{`. Inside a JSON string every quote is
//! escaped, so the key's opening quote is genuine unless an odd number of backslashes stands
//! before it; text that a model generates cannot look like it.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;

/// Largest usage object that is read; vLLM's have about 200 bytes. A larger one is stepped over.
pub const USAGE_BYTES_MAX: usize = 4096;

const NEEDLE: &[u8; 7] = b"\"usage\"";
static FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(NEEDLE));

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
#[derive(Clone, Debug, Default)]
pub struct UsageScanner {
    state: State,
    /// Bytes of the key seen at the end of the previous chunk.
    matched: usize,
    /// An odd number of backslashes ends the bytes seen so far.
    escaped: bool,
    object: Vec<u8>,
    depth: u32,
    in_string: bool,
    found: Option<Usage>,
}

impl UsageScanner {
    /// A scanner for a new body.
    pub fn new() -> UsageScanner {
        UsageScanner::default()
    }

    /// The next bytes of the body.
    pub fn push(&mut self, chunk: &[u8]) {
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

    /// What the bytes so far say: of several usage objects (a stream with continuous usage) the
    /// last value of each number.
    pub fn usage(&self) -> Option<Usage> {
        self.found
    }

    /// Consumes bytes up to the end of the next key, or all of them.
    fn search(&mut self, bytes: &[u8]) -> usize {
        if self.matched > 0 {
            return self.continue_match(bytes[0]);
        }
        let Some(at) = FINDER.find(bytes) else {
            let longest = (1..NEEDLE.len()).rev().find(|len| {
                bytes.ends_with(&NEEDLE[..*len]) && !self.is_escaped(bytes, bytes.len() - len)
            });
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
        at + NEEDLE.len()
    }

    /// Goes on with a key that began in an earlier chunk. Its only border is the quote.
    fn continue_match(&mut self, byte: u8) -> usize {
        self.escaped = false;
        if byte == NEEDLE[self.matched] {
            self.matched += 1;
            if self.matched == NEEDLE.len() {
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
        for (at, byte) in bytes.iter().enumerate() {
            if self.object.len() == USAGE_BYTES_MAX {
                self.end_object();
                return at;
            }
            self.object.push(*byte);
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' if !self.in_string => self.depth += 1,
                b'}' if !self.in_string => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        self.merge();
                        self.end_object();
                        return at + 1;
                    }
                }
                _ => {}
            }
        }
        bytes.len()
    }

    fn end_object(&mut self) {
        self.state = State::Searching;
        self.object.clear();
        self.in_string = false;
    }

    /// Takes over what the complete object says; one that is no usage object says nothing.
    fn merge(&mut self) {
        let Ok(object) = serde_json::from_slice::<UsageObject>(&self.object) else { return };
        self.found = object.merged_into(self.found);
    }
}

/// Reads a usage object alone, as recordings keep it; `None` when it is none.
pub fn parse_object(json: &[u8]) -> Option<Usage> {
    serde_json::from_slice::<UsageObject>(json).ok()?.merged_into(None)
}

#[derive(Deserialize)]
struct UsageObject {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<Details>,
    input_tokens: Option<u32>,
    output_tokens: Option<u32>,
    input_tokens_details: Option<Details>,
}

impl UsageObject {
    fn merged_into(self, found: Option<Usage>) -> Option<Usage> {
        let prompt = self.prompt_tokens.or(self.input_tokens);
        let completion = self.completion_tokens.or(self.output_tokens);
        let details = self.prompt_tokens_details.or(self.input_tokens_details);
        let cached = details.and_then(|details| details.cached_tokens);
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

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvroute_core::Rng;

    fn scan(chunks: &[&[u8]]) -> Option<Usage> {
        let mut scanner = UsageScanner::new();
        chunks.iter().for_each(|chunk| scanner.push(chunk));
        scanner.usage()
    }

    fn used(prompt_tokens: u32, completion_tokens: u32, cached: Option<u32>) -> Option<Usage> {
        Some(Usage { prompt_tokens, completion_tokens, cached_tokens: cached })
    }

    const CHAT_STREAM: &str = concat!(
        "data: {\"id\":\"c\",\"choices\":[{\"delta\":{\"content\":",
        "\"say \\\"usage\\\":{\\\"prompt_tokens\\\":1} \\\\\\\\\"}}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"he: \\\"usage\"}}]}\r\n\r\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":394,\"total_tokens\":402,",
        "\"completion_tokens\":8,\"prompt_tokens_details\":{\"cached_tokens\":320,",
        "\"created_cache_tokens\":null,\"multimodal_tokens\":{}}}}\n\ndata: [DONE]\n\n"
    );
    const RESPONSES_STREAM: &str = concat!(
        "event: response.completed\ndata: {\"type\":\"response.completed\",",
        "\"response\":{\"tools\":",
        "[{\"usage\":{\"type\":\"}\"}}],\"usage\" : {\"input_tokens\":10,\"input_tokens_details\":",
        "{\"cached_tokens\":4},\"output_tokens\":7,\"output_tokens_details\":null}}}\n\n"
    );

    fn bodies() -> Vec<(String, Option<Usage>)> {
        let continuous = concat!(
            "data: {\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1,",
            "\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n",
            "data: {\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3}}\n\n"
        );
        let pretty =
            "{\n  \"usage\": {\n    \"prompt_tokens\": 3,\n    \"completion_tokens\": 0\n  }\n}";
        let large = format!("{{\"usage\":{{\"x\":\"{}\"}}}}", "y".repeat(USAGE_BYTES_MAX));
        let after_large = format!("{large}{pretty}");
        let table = [
            (CHAT_STREAM, used(394, 8, Some(320))),
            (RESPONSES_STREAM, used(10, 7, Some(4))),
            (continuous, used(5, 3, Some(2))),
            (pretty, used(3, 0, None)),
            (&after_large, used(3, 0, None)),
            (&large, None),
            ("{\"usage\":null}", None),
            ("{\"usage\":{}}", None),
            ("{\"usage\":{\"prompt_tokens\":\"5\"}}", None),
            ("{\"usage\":{\"prompt_tokens\":5", None),
            ("{\"usage\" {\"prompt_tokens\":5}}", None),
            ("{\"x\\\"usage\":{\"prompt_tokens\":5}}", None),
            ("{\"x\":\"\\\\\",\"usage\":{\"prompt_tokens\":5}}", used(5, 0, None)),
            ("\"\"usage\":{\"prompt_tokens\":5}", used(5, 0, None)),
            ("\"us\"usage\":{\"prompt_tokens\":5}", used(5, 0, None)),
            ("", None),
            ("data: [DONE]\n\n", None),
        ];
        table.iter().map(|(text, usage)| ((*text).to_owned(), *usage)).collect()
    }

    #[test]
    fn bodies_say_what_they_say() {
        for (body, usage) in bodies() {
            assert_eq!(scan(&[body.as_bytes()]), usage, "{body}");
        }
    }

    #[test]
    fn every_split_says_the_same() {
        for (body, usage) in bodies() {
            let bytes = body.as_bytes();
            for at in 0..=bytes.len() {
                assert_eq!(scan(&[&bytes[..at], &bytes[at..]]), usage, "{body} cut at {at}");
            }
            let singles: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(scan(&singles), usage, "{body} byte by byte");
            for seed in 0..200 {
                let mut rng = Rng::seeded(seed);
                let mut chunks = Vec::new();
                let mut rest = bytes;
                while !rest.is_empty() {
                    let (chunk, tail) = rest.split_at(1 + rng.below(rest.len().min(40)));
                    chunks.push(chunk);
                    rest = tail;
                }
                assert_eq!(scan(&chunks), usage, "{body} seed {seed}");
            }
        }
    }

    #[test]
    fn recorded_answers_at_every_split() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/answers.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let mut answers = 0;
        for line in text.lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            let count = |field: &serde_json::Value| field.as_u64().map(|value| value as u32);
            let usage = &value["usage"];
            let expected = used(
                count(&usage["prompt_tokens"]).unwrap(),
                count(&usage["completion_tokens"]).unwrap(),
                count(&usage["prompt_tokens_details"]["cached_tokens"]),
            );
            let bytes = line.as_bytes();
            for at in 0..=bytes.len() {
                assert_eq!(scan(&[&bytes[..at], &bytes[at..]]), expected, "cut at {at}: {line}");
            }
            answers += 1;
        }
        assert!(answers >= 8, "{answers} answers");
    }

    #[test]
    fn memory_stays_bounded() {
        let mut scanner = UsageScanner::new();
        scanner.push(b"\"usage\":{");
        for _ in 0..1000 {
            scanner.push(&[b'{'; 1000]);
        }
        assert!(scanner.object.capacity() <= 2 * USAGE_BYTES_MAX);
    }
}
