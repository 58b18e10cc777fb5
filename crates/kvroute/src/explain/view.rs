//! What stands in a decision, as the admin address and the router's own types write it.
//!
//! One reading for all sources: a running router, a snapshot, a test of a configuration. What a
//! later version adds is not read; what an earlier one lacks is empty.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An explained request, or a real one.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Shown {
    pub prompt: Option<Prompt>,
    pub decision: Option<Record>,
    pub rejected: Option<Rejected>,
    pub fallback: Vec<String>,
    pub left_out: Vec<String>,
    /// Of a real request that has ended.
    pub outcome: Option<Outcome>,
}

impl Shown {
    /// A decision by itself.
    ///
    /// # Errors
    /// It is none.
    pub fn of_record(record: &impl Serialize) -> serde_json::Result<Shown> {
        let decision = serde_json::from_value(serde_json::to_value(record)?)?;
        Ok(Shown { decision: Some(decision), ..Shown::default() })
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Prompt {
    pub rendered_chars: Option<u64>,
    pub prompts: u32,
    pub tokens: u32,
    pub known: Value,
    pub blocks: Vec<Blocks>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Blocks {
    pub block_size: u32,
    pub space: String,
    pub blocks: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Rejected {
    pub status: u16,
    pub reason: String,
    pub message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Outcome {
    pub status: u16,
    pub endpoint: String,
    pub attempts: u32,
    pub ttft_s: Option<f64>,
    pub not_followed: bool,
    pub total_s: f64,
    pub prompt_tokens: Option<u32>,
    pub completion_tokens: Option<u32>,
    pub delivered_tokens: Option<u32>,
    pub error: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Record {
    pub model: String,
    pub profile: String,
    pub endpoint: String,
    pub mode: String,
    pub reason: String,
    pub prompt_tokens: u32,
    pub available_tokens: u32,
    pub chosen_tokens: u32,
    pub seed: String,
    pub tied: u32,
    pub margin: Option<f64>,
    pub filters: Vec<Filter>,
    pub candidates: Vec<Candidate>,
    pub scores: Vec<Row>,
    pub others: Vec<Profile>,
    pub request_headers: Vec<Header>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    pub name: String,
    pub candidates: u32,
    pub kept: u32,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Candidate {
    pub endpoint: String,
    pub removed_by: Option<String>,
    pub reason: String,
    pub hit: Hit,
    pub load: Load,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Hit {
    pub block_size: u32,
    pub blocks: u32,
    pub matched: u32,
    pub predicted_tokens: u32,
    pub by_tier: BTreeMap<String, u32>,
    pub expected: u32,
    pub history: u32,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Load {
    pub inflight_requests: u32,
    pub inflight_tokens: u64,
    pub uncached_tokens: u32,
    pub waiting: Option<u32>,
    pub running: Option<u32>,
    pub kv_usage: Option<f64>,
    pub metrics_age_s: Option<f64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Row {
    pub endpoint: String,
    pub total: f64,
    pub scores: Vec<Cell>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Cell {
    pub scorer: String,
    pub weight: f64,
    /// `None`: no data.
    pub raw: Option<f64>,
    pub contribution: f64,
    pub clamped: bool,
}

/// A profile beside the primary one.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Profile {
    pub profile: String,
    pub step: String,
    pub endpoint: Option<String>,
    pub failed: Option<String>,
    pub tied: u32,
    pub margin: Option<f64>,
    pub filters: Vec<Filter>,
    pub removed: Vec<Removed>,
    pub scores: Vec<Row>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Removed {
    pub endpoint: String,
    pub by: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Header {
    pub name: String,
    pub value: String,
}
