//! Would the predictions have been right? Feeds a recording of real engines into the index and
//! compares the predicted `cached_tokens` of every sequential request with what was delivered.

pub mod recording;
mod tokens;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Context;
use kvroute_core::blocks::{ChainSpec, PromptExtras, Root, chain};
use kvroute_core::index::{Hits, Index, IndexLimits, TierWeights};
use kvroute_core::stream::{Stream, StreamEffect, StreamInput, StreamLimits, StreamState};
use kvroute_core::{EndpointId, Time};
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use kvroute_wire::api::Api;
use kvroute_wire::kv_event;
use kvroute_wire::request::{self, Prompt, RequestBody};
use kvroute_wire::trace::{RecordedMessage, RecordedRequest};
use serde::Serialize;

use crate::cli::{self, say};
use recording::Recording;
use tokens::Comparison;

/// What `--json` prints, on one line.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Requests whose prediction was what the engine delivered.
    pub right: u32,
    /// Requests whose prediction was not.
    pub wrong: u32,
    /// Requests that say nothing about the index, by reason in `skipped_reasons`.
    pub skipped: u32,
    /// Prompts that tokenize as they did in the engine.
    pub tokens_equal: u32,
    /// Prompts that do not.
    pub tokens_different: u32,
    /// Each wrong prediction and each different prompt.
    pub mismatches: Vec<Mismatch>,
    /// Why requests were skipped, and how many for each reason.
    pub skipped_reasons: BTreeMap<&'static str, u32>,
    /// Events that could not be decoded, and other faults of the recorded stream.
    pub stream_faults: Vec<String>,
}

/// One difference between what was expected and what was recorded.
#[derive(Debug, Serialize)]
pub struct Mismatch {
    /// Label of the request in the recording.
    pub label: String,
    /// Port of its engine.
    pub port: u16,
    /// `cached_tokens` or `tokens`.
    pub kind: &'static str,
    /// Predicted cached tokens, or number of tokens made here.
    pub expected: u32,
    /// Delivered cached tokens, or number of tokens recorded.
    pub recorded: u32,
    /// What explains it.
    pub reason: String,
}

/// Runs `kvroute replay`.
///
/// # Errors
/// The folder or the tokenizer cannot be read.
pub fn main(args: &cli::Replay) -> anyhow::Result<ExitCode> {
    let recording = Recording::read(&args.dir)?;
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(
            Tokenizer::load(path, &TokenizerOptions::default())
                .with_context(|| format!("--tokenizer {}", path.display()))?,
        ),
        None => None,
    };
    let report = run(&recording, tokenizer.as_ref());
    print(&report, tokenizer.is_some());
    if args.json {
        say(&serde_json::to_string(&report)?);
    }
    let clean = report.wrong == 0 && report.tokens_different == 0;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Replays a recording.
pub fn run(recording: &Recording, tokenizer: Option<&Tokenizer>) -> Report {
    let mut replay = Replay::new(recording);
    for (at, request) in recording.requests.iter().enumerate() {
        replay.advance_to(request.port, request.t_start_unix_ns);
        let outcome = replay.judge(at, request, tokenizer);
        replay.count(request, outcome);
        replay.observe_reset(request);
    }
    replay.report
}

enum Outcome {
    Right,
    Wrong { predicted: u32, delivered: u32, reason: String },
    Skipped(&'static str),
}

/// One recorded engine: its stream as far as it has been fed.
struct Engine<'a> {
    id: EndpointId,
    messages: &'a [RecordedMessage],
    fed: usize,
    stream: Stream,
}

struct Replay<'a> {
    recording: &'a Recording,
    index: Index,
    engines: BTreeMap<u16, Engine<'a>>,
    hits: Hits,
    report: Report,
}

impl<'a> Replay<'a> {
    fn new(recording: &'a Recording) -> Replay<'a> {
        let mut index = Index::new(IndexLimits::default());
        let mut engines = BTreeMap::new();
        for (slot, (port, messages)) in (0..).zip(&recording.messages) {
            let id = EndpointId { slot, generation: 0 };
            index.add_endpoint(id);
            let stream = Stream::new(StreamLimits {
                replay_available: false,
                held_batches_max: 0,
                ..StreamLimits::default()
            });
            engines.insert(*port, Engine { id, messages, fed: 0, stream });
        }
        let report = Report::default();
        Replay { recording, index, engines, hits: Hits::default(), report }
    }

    /// Feeds what an engine published before `unix_ns`.
    fn advance_to(&mut self, port: u16, unix_ns: u64) {
        let Some(engine) = self.engines.get_mut(&port) else { return };
        while let Some(message) = engine.messages.get(engine.fed) {
            let batch = message.payload().map(kv_event::decode_batch);
            let published = match &batch {
                Some(Ok(batch)) if batch.timestamp_s > 0.0 => (batch.timestamp_s * 1e9) as u64,
                _ => message.recv_unix_ns,
            };
            if published >= unix_ns {
                break;
            }
            engine.fed += 1;
            match (message.seq(), batch) {
                (Some(seq), Some(Ok(batch))) => {
                    if batch.events_bad > 0 {
                        let fault =
                            format!("port {port} batch {seq}: {} bad events", batch.events_bad);
                        self.report.stream_faults.push(fault);
                    }
                    feed(&mut self.index, engine, seq, batch, unix_ns);
                }
                (seq, Some(Err(error))) => {
                    self.report.stream_faults.push(format!("port {port} batch {seq:?}: {error}"));
                }
                _ => self.report.stream_faults.push(format!("port {port}: not a KV event message")),
            }
        }
    }

    /// A reset is published with the next scheduler step only; the call itself is known at once.
    fn observe_reset(&mut self, request: &RecordedRequest) {
        let reset = request.path.ends_with("/reset_prefix_cache") && request.status == 200;
        if let (true, Some(engine)) = (reset, self.engines.get(&request.port)) {
            self.index.clear_resident(engine.id);
        }
    }

    fn judge(
        &mut self,
        at: usize,
        request: &RecordedRequest,
        tokenizer: Option<&Tokenizer>,
    ) -> Outcome {
        let api = Api::from_path(&request.path);
        if !api.tells_usage() || request.body.is_empty() {
            return Outcome::Skipped("not a routed request");
        }
        let Ok(body) = request::parse(api, &request.body) else {
            return Outcome::Skipped("body cannot be read");
        };
        let comparison = tokens::compare(request, &body, tokenizer);
        self.count_tokens(request, &comparison);
        let Some(usage) = request.usage else { return Outcome::Skipped("no usage: it failed") };
        let Some(delivered) = usage.cached_tokens else {
            return Outcome::Skipped("engine does not report cached_tokens");
        };
        if self.recording.overlaps(at) {
            return Outcome::Skipped("ran beside another request");
        }
        let Some(tokens) = tokens::of(request, &body, &comparison) else {
            return Outcome::Skipped(match &body.prompt {
                Prompt::Texts(texts) if texts.len() > 1 => "several prompts",
                Prompt::TokenIds(ids) if ids.len() > 1 => "several prompts",
                _ => "no token ids recorded",
            });
        };
        self.predict(request, &body, tokens, delivered)
    }

    fn predict(
        &mut self,
        request: &RecordedRequest,
        body: &RequestBody<'_>,
        tokens: &[u32],
        delivered: u32,
    ) -> Outcome {
        let Some(engine) = self.engines.get(&request.port) else {
            return Outcome::Skipped("no events recorded for this engine");
        };
        let Some(block_size) = self.index.block_size(engine.id) else {
            return judged(0, delivered, || "no block was stored before".to_owned());
        };
        let model = body.model.as_deref().unwrap_or_default();
        let root = match self.recording.adapters.contains(model) {
            true => Root::Adapter(model),
            false => Root::Base,
        };
        let extras = PromptExtras { cache_salt: body.cache_salt.as_deref(), items: &body.items };
        let chain = chain(ChainSpec::exact(block_size), root, tokens, &extras);
        self.hits.reset();
        self.index.lookup(&chain, &TierWeights::default(), &mut self.hits);
        let hit = self.hits.get(engine.id);
        // The engine computes at least the last token, and reuses whole blocks only.
        let blocks_max = (chain.tokens.saturating_sub(1)) / block_size;
        let predicted = hit.resident.min(blocks_max) * block_size;
        judged(predicted, delivered, || self.explain(engine, predicted, delivered))
    }

    fn explain(&self, engine: &Engine<'_>, predicted: u32, delivered: u32) -> String {
        let usage = self.index.endpoint_usage(engine.id);
        let last = engine.messages[..engine.fed].last().and_then(RecordedMessage::seq);
        let seen =
            last.map_or("no batch seen".to_owned(), |seq| format!("batches seen up to {seq}"));
        let state = engine.stream.state();
        let why = if !matches!(state, StreamState::Live) {
            format!("the event stream is incomplete ({state:?})")
        } else if usage.pending > 0 && predicted < delivered {
            format!("{} stored blocks have a parent that no event announced", usage.pending)
        } else if usage.groups > 1 {
            "hybrid model: copies of a block that were announced again cannot be told from new ones"
                .to_owned()
        } else if predicted < delivered {
            "the engine reused blocks that no event announced; does another tokenizer, template, \
             salt or adapter explain it?"
                .to_owned()
        } else {
            "the index holds blocks that the engine did not reuse: a removal is missing, or blocks \
             were announced that it cannot use"
                .to_owned()
        };
        format!("{why}; {seen}")
    }

    fn count(&mut self, request: &RecordedRequest, outcome: Outcome) {
        match outcome {
            Outcome::Right => self.report.right += 1,
            Outcome::Wrong { predicted, delivered, reason } => {
                self.report.wrong += 1;
                self.report.mismatches.push(Mismatch {
                    label: request.label.clone(),
                    port: request.port,
                    kind: "cached_tokens",
                    expected: predicted,
                    recorded: delivered,
                    reason,
                });
            }
            Outcome::Skipped(reason) => {
                self.report.skipped += 1;
                *self.report.skipped_reasons.entry(reason).or_default() += 1;
            }
        }
    }

    fn count_tokens(&mut self, request: &RecordedRequest, comparison: &Comparison) {
        match comparison {
            Comparison::NotAsked | Comparison::NotRecorded(_) => {}
            Comparison::Equal => self.report.tokens_equal += 1,
            Comparison::Different { ours, recorded, reason } => {
                self.report.tokens_different += 1;
                self.report.mismatches.push(Mismatch {
                    label: request.label.clone(),
                    port: request.port,
                    kind: "tokens",
                    expected: *ours,
                    recorded: *recorded,
                    reason: reason.clone(),
                });
            }
        }
    }
}

fn feed(
    index: &mut Index,
    engine: &mut Engine<'_>,
    seq: u64,
    batch: kvroute_core::event::EventBatch,
    unix_ns: u64,
) {
    let id = engine.id;
    let input = StreamInput::Batch { seq, batch };
    // Nothing can be ordered: a recording has no replay socket.
    let _ = engine.stream.on(Time(unix_ns), input, &mut |effect| match effect {
        StreamEffect::Apply(batch) => {
            for event in &batch.events {
                index.apply(id, event);
            }
        }
        StreamEffect::Reset => index.clear_resident(id),
    });
}

fn judged(predicted: u32, delivered: u32, reason: impl FnOnce() -> String) -> Outcome {
    if predicted == delivered {
        Outcome::Right
    } else {
        Outcome::Wrong { predicted, delivered, reason: reason() }
    }
}

fn print(report: &Report, tokenized: bool) {
    let judged = report.right + report.wrong;
    say(&format!("cached_tokens predicted: {} of {judged} right", report.right));
    if tokenized {
        let all = report.tokens_equal + report.tokens_different;
        say(&format!("prompts tokenized as the engine did: {} of {all}", report.tokens_equal));
    }
    for (reason, count) in &report.skipped_reasons {
        say(&format!("skipped {count}: {reason}"));
    }
    for fault in &report.stream_faults {
        say(&format!("event stream: {fault}"));
    }
    for wrong in &report.mismatches {
        say(&format!(
            "{} (port {}): {} expected {}, recorded {}: {}",
            wrong.label, wrong.port, wrong.kind, wrong.expected, wrong.recorded, wrong.reason
        ));
    }
}
