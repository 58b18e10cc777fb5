//! Reads the recorded runs in `tests/data/engine` (its README says where they come from).
#![allow(dead_code, clippy::unwrap_used, reason = "test helpers; each binary uses its part")]

use std::path::PathBuf;

use kvroute_core::event::EventBatch;
use kvroute_wire::kv_event;
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub struct Engine {
    pub block_size: u32,
    pub blocks: u32,
    pub max_model_len: u32,
    pub hash: String,
    pub seed: String,
    pub adapters: Vec<(String, String)>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub prompt_tokens_details: Option<Details>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Details {
    pub cached_tokens: u32,
    pub created_cache_tokens: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Request {
    pub label: String,
    pub prompts: Vec<Vec<u32>>,
    #[serde(default)]
    pub n: u32,
    #[serde(default)]
    pub max_tokens: u32,
    pub salt: Option<String>,
    #[serde(default)]
    pub model: String,
    #[serde(default)]
    pub full: bool,
    #[serde(default)]
    pub chat: bool,
    #[serde(default)]
    pub usage: Usage,
}

pub struct Batch {
    pub topic: Vec<u8>,
    pub sequence: Vec<u8>,
    pub payload: Vec<u8>,
    pub batch: EventBatch,
    /// Carries `session_id`, which our event type does not hold.
    pub has_session: bool,
}

pub struct Recording {
    pub engine: Engine,
    pub requests: Vec<Request>,
    pub batches: Vec<Batch>,
}

impl Recording {
    pub fn load(name: &str) -> Recording {
        let text = read(&format!("{name}.jsonl"));
        let mut lines = text.lines();
        let engine = serde_json::from_str(lines.next().unwrap()).unwrap();
        let requests = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
        let events = read(&format!("{name}.events.jsonl"));
        let batches = events
            .lines()
            .map(|line| {
                let frames: [String; 3] = serde_json::from_str(line).unwrap();
                let [topic, sequence, payload] = frames.map(|frame| base64(&frame));
                let batch = kv_event::decode_batch(&payload).unwrap();
                let has_session = payload.windows(10).any(|bytes| bytes == b"session_id");
                Batch { topic, sequence, payload, batch, has_session }
            })
            .collect();
        Recording { engine, requests, batches }
    }
}

pub fn read(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/engine").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("{other} is not base64"),
    };
    let digits: Vec<u8> = text.bytes().filter(|&b| b != b'=').map(value).collect();
    let mut out = Vec::new();
    for chunk in digits.chunks(4) {
        let bits =
            chunk.iter().fold(0u32, |sum, &d| sum << 6 | u32::from(d)) << (6 * (4 - chunk.len()));
        out.extend_from_slice(&bits.to_be_bytes()[1..chunk.len()]);
    }
    out
}
