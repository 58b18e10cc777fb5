//! Does the index know what a real engine has cached? For every sequential request of a recording,
//! the events published before it predict `cached_tokens`, which the engine's answer then tells.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};

use kvroute_core::blocks::{ChainSpec, PromptExtras, Root, chain};
use kvroute_core::event::{EventBatch, KvEvent};
use kvroute_core::index::{Applied, Hits, Index, IndexLimits, SkipReason, TierWeights};
use kvroute_core::stream::{
    Stream, StreamEffect, StreamInput, StreamLimits, StreamOrder, StreamState,
};
use kvroute_core::{EndpointId, Time};
use kvroute_wire::api::Api;
use kvroute_wire::kv_event;
use kvroute_wire::request::{self, Prompt, RequestBody};
use kvroute_wire::trace::{self, RecordedRequest};

const ID: EndpointId = EndpointId { slot: 0, generation: 0 };

/// What was known of one engine so far.
struct Replica {
    index: Index,
    stream: Stream,
    applied: Applied,
    adapters: Vec<String>,
}

impl Replica {
    fn new(adapters: Vec<String>) -> Replica {
        let mut index = Index::new(IndexLimits::default());
        index.add_endpoint(ID);
        let stream = Stream::new(StreamLimits::default());
        Replica { index, stream, applied: Applied::default(), adapters }
    }

    fn publish(&mut self, seq: u64, batch: EventBatch) {
        let (index, applied) = (&mut self.index, &mut self.applied);
        let order = self.stream.on(Time::ZERO, StreamInput::Batch { seq, batch }, &mut |effect| {
            let StreamEffect::Apply(batch) = effect else { panic!("no reason to reset") };
            assert_eq!(batch.events_bad, 0);
            batch.events.iter().for_each(|event| *applied += index.apply(ID, event));
        });
        assert_eq!((order, self.stream.state()), (StreamOrder::None, StreamState::Live));
    }

    fn administer(&mut self, call: &RecordedRequest) {
        if (call.method.as_str(), call.path.as_str()) == ("POST", "/reset_prefix_cache") {
            assert_eq!(call.status, 200);
            self.index.clear_resident(ID);
        }
    }

    /// Tokens of the prompt that will come from the cache: whole blocks, and never the last token,
    /// which the engine always computes.
    fn predict(&self, body: &RequestBody<'_>, tokens: &[u32]) -> u32 {
        let Some(block_size) = self.index.block_size(ID) else { return 0 };
        let model = body.model.as_deref().unwrap();
        let is_adapter = self.adapters.iter().any(|adapter| adapter == model);
        let root = if is_adapter { Root::Adapter(model) } else { Root::Base };
        let extras = PromptExtras { cache_salt: body.cache_salt.as_deref(), items: &[] };
        let chain = chain(ChainSpec::exact(block_size), root, tokens, &extras);
        let mut hits = Hits::new();
        self.index.lookup(&chain, &TierWeights::default(), &mut hits);
        hits.get(ID).resident.min((chain.tokens - 1) / block_size) * block_size
    }
}

/// The token ids of a body with a single prompt.
fn single_prompt(call: &RecordedRequest, body: &RequestBody<'_>) -> Option<Vec<u32>> {
    match &body.prompt {
        Prompt::TokenIds(ids) => (ids.len() == 1).then(|| ids[0].clone()),
        Prompt::Texts(texts) if texts.len() != 1 => None,
        Prompt::None(_) => None,
        _ => call.tokenize.clone(),
    }
}

/// Adapters by their blocks: the recorded list of models is cut off before them.
fn adapters(events: &[(u64, EventBatch)]) -> Vec<String> {
    let events = events.iter().flat_map(|(_, batch)| &batch.events);
    let name = |event: &KvEvent| match event {
        KvEvent::Stored(stored) => stored.lora_name.clone(),
        _ => None,
    };
    events.filter_map(name).collect()
}

fn overlaps(call: &RecordedRequest, other: &RecordedRequest) -> bool {
    call.usage.is_some()
        && other.usage.is_some()
        && call.t_start_unix_ns < other.t_end_unix_ns
        && other.t_start_unix_ns < call.t_end_unix_ns
}

/// Predictions of one recording: how many were right, and the others in words.
fn verify(dir: &Path) -> (usize, Vec<String>, Applied) {
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let events = read("kv_events.jsonl");
    let events = trace::messages(&events).map(Result::unwrap).map(|message| {
        let batch = kv_event::decode_batch(message.payload().unwrap()).unwrap();
        (message.seq().unwrap(), batch)
    });
    let events: Vec<(u64, EventBatch)> = events.collect();
    let mut replica = Replica::new(adapters(&events));
    let mut events = events.into_iter().peekable();
    let mut calls: Vec<RecordedRequest> =
        trace::requests(&read("requests.jsonl")).map(Result::unwrap).collect();
    calls.sort_by_key(|call| call.t_start_unix_ns);
    let (mut right, mut wrong) = (0, Vec::new());
    for (at, call) in calls.iter().enumerate() {
        let before =
            |(_, batch): &(u64, EventBatch)| batch.timestamp_s * 1e9 < call.t_start_unix_ns as f64;
        while let Some((seq, batch)) = events.next_if(before) {
            replica.publish(seq, batch);
        }
        replica.administer(call);
        let Some(delivered) = call.usage.and_then(|usage| usage.cached_tokens) else { continue };
        let body = request::parse(Api::from_path(&call.path), &call.body).unwrap();
        let others = calls[..at].iter().chain(&calls[at + 1..]);
        let alone = !others.into_iter().any(|other| overlaps(call, other));
        let Some(tokens) = single_prompt(call, &body).filter(|_| alone) else { continue };
        match replica.predict(&body, &tokens) {
            predicted if predicted == delivered => right += 1,
            predicted => wrong.push(format!("{}: {predicted} for {delivered}", call.label)),
        }
    }
    (right, wrong, replica.applied)
}

fn recording(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/traces").join(name)
}

#[test]
fn every_prediction_is_right_with_one_kind_of_cache() {
    for (name, predictions) in [("sha256", 45), ("lora", 43), ("byteshash", 45)] {
        let (right, wrong, applied) = verify(&recording(name));
        assert!(wrong.is_empty(), "{name}, {right} right, wrong: {wrong:?}");
        assert_eq!(right, predictions, "{name}");
        assert_eq!((applied.pending, applied.unknown, applied.skipped), (0, 0, [0; 8]), "{name}");
        assert!(applied.removed > 0 && applied.reannounced > 0, "{name}: {applied:?}");
    }
}

#[test]
fn a_sliding_window_beside_full_attention_is_predicted() {
    let (right, wrong, applied) = verify(&recording("hybrid"));
    assert!(right >= 43 && right + wrong.len() == 45, "{right} right, wrong: {wrong:?}");
    // What was announced again cannot be told from a copy here, and is all that goes wrong.
    let after = |label: &String| label.contains("report-mode") || label.contains("evict");
    assert!(wrong.iter().all(after), "{wrong:?}");
    assert_eq!(applied.skipped_for(SkipReason::NotDense), 0);
}
