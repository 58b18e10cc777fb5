//! The engine model against recorded runs of a real vLLM 0.32: the same requests in the same order
//! must give the same `cached_tokens` and, byte for byte, the same event messages.
//!
//! A real model's output is random here (dummy weights). Output tokens that filled a block are
//! known from the recorded events and repeated; those of a last, partial block are not, and cannot
//! matter to the cache.
#![allow(clippy::unwrap_used, reason = "a test")]

mod recording;

use kvroute_core::Time;
use kvroute_core::event::{EngineHash, EventBatch, KvEvent};
use kvroute_lab::model::{
    Adapter, BlockHasher, EngineModel, HashAlgorithm, HashExtras, ModelConfig, NewRequest, Output,
    Profile,
};
use kvroute_wire::kv_event;
use recording::{Recording, Request};

struct Replayer {
    recording: Recording,
    engine: EngineModel,
    batches: Vec<Vec<KvEvent>>,
    used: Vec<bool>,
    stored: Vec<(Option<EngineHash>, Vec<u32>, EngineHash)>,
    next_id: u64,
}

impl Replayer {
    fn new(name: &str) -> Replayer {
        let recording = Recording::load(name);
        let adapters = recording.engine.adapters.iter();
        let config = ModelConfig {
            block_size: recording.engine.block_size,
            blocks: recording.engine.blocks,
            max_model_len: recording.engine.max_model_len,
            max_num_seqs: 8,
            max_num_batched_tokens: 2048,
            max_loras: 2,
            hash: HashAlgorithm::from_name(&recording.engine.hash).unwrap(),
            hash_seed: recording.engine.seed.clone(),
            adapters: adapters
                .map(|(name, path)| Adapter { name: name.clone(), path: path.clone() })
                .collect(),
            ..ModelConfig::default()
        };
        let engine = EngineModel::new(config, Profile::built_in("tiny").unwrap()).unwrap();
        let mut stored = Vec::new();
        for batch in &recording.batches {
            for event in &batch.batch.events {
                if let KvEvent::Stored(event) = event {
                    let mut parent = event.parent;
                    for (i, hash) in event.hashes.iter().enumerate() {
                        let size = event.block_size as usize;
                        let tokens = event.tokens.ids()[i * size..(i + 1) * size].to_vec();
                        stored.push((parent, tokens, *hash));
                        parent = Some(*hash);
                    }
                }
            }
        }
        let used = vec![false; stored.len()];
        Replayer { recording, engine, batches: Vec::new(), used, stored, next_id: 0 }
    }

    /// The recorded output of a request as far as it filled blocks.
    fn script(&mut self, request: &Request, prompt: &[u32]) -> Vec<u32> {
        let size = self.recording.engine.block_size as usize;
        let config = self.engine.config();
        let mut hasher = BlockHasher::new(config.hash, &config.hash_seed);
        let adapter = config.adapters.iter().find(|adapter| adapter.name == request.model);
        let mut hash = hasher.root();
        let mut parent = None;
        for (i, tokens) in prompt.chunks_exact(size).enumerate() {
            let cache_salt = request.salt.as_deref().filter(|_| i == 0);
            hash = hasher.next(&hash, tokens, HashExtras { adapter, cache_salt });
            parent = Some(hash.key());
        }
        let mut tail = prompt.chunks_exact(size).remainder().to_vec();
        let mut output = Vec::new();
        loop {
            // The last output token is never computed, so it fills no block.
            if output.len() + size - tail.len() >= request.max_tokens as usize {
                return output;
            }
            let found = (0..self.stored.len()).find(|&i| {
                let (p, tokens, _) = &self.stored[i];
                !self.used[i] && *p == parent && tokens.starts_with(&tail)
            });
            let Some(i) = found else { return output };
            let (_, tokens, hash) = &self.stored[i];
            self.used[i] = true;
            output.extend_from_slice(&tokens[tail.len()..]);
            parent = Some(*hash);
            tail.clear();
        }
    }

    fn new_request(&mut self, request: &Request, prompt: &[u32]) -> NewRequest {
        let script = self.script(request, prompt);
        let adapters = &self.engine.config().adapters;
        let adapter = adapters.iter().find(|a| a.name == request.model).map(|a| a.name.clone());
        self.next_id += 1;
        NewRequest {
            id: self.next_id,
            tokens: prompt.to_vec(),
            max_tokens: request.max_tokens,
            cache_salt: request.salt.clone(),
            adapter,
            output: Output::Scripted(script),
            report_reused: request.full,
            ..NewRequest::default()
        }
    }

    /// Sequences that ran together; gives the cached tokens of each. Before which step each
    /// reached the scheduler is a race that only the recording knows: of all orders, the one is
    /// taken whose messages have the recorded shapes.
    fn run(&mut self, group: &[(Request, Vec<u32>)]) -> Vec<u32> {
        let requests: Vec<NewRequest> =
            group.iter().map(|(request, prompt)| self.new_request(request, prompt)).collect();
        let recorded =
            &self.recording.batches[self.batches.len().min(self.recording.batches.len())..];
        let races: Vec<Race> =
            arrivals(requests.len()).iter().map(|at| race(&self.engine, &requests, at)).collect();
        let fits = |race: &Race| {
            race.batches.iter().zip(recorded).all(|(a, b)| shape(a) == shape(&b.batch.events))
        };
        let chosen = races.iter().position(fits).unwrap_or(0);
        let race = races.into_iter().nth(chosen).unwrap();
        self.engine = race.engine;
        self.batches.extend(race.batches);
        race.cached
    }
}

struct Race {
    engine: EngineModel,
    batches: Vec<Vec<KvEvent>>,
    cached: Vec<u32>,
}

/// For each of `count` sequences the step before which it arrives, in all ways that keep order.
fn arrivals(count: usize) -> Vec<Vec<usize>> {
    let mut all = vec![vec![0]];
    for _ in 1..count {
        all = all
            .into_iter()
            .flat_map(|at| {
                let last = at[at.len() - 1];
                (last..last + 3).map(move |next| at.iter().copied().chain([next]).collect())
            })
            .collect();
    }
    all
}

fn race(engine: &EngineModel, requests: &[NewRequest], arrivals: &[usize]) -> Race {
    let mut engine = engine.clone();
    let (mut batches, mut finished) = (Vec::new(), Vec::new());
    for step in 0.. {
        for (request, _) in requests.iter().zip(arrivals).filter(|(_, at)| **at == step) {
            engine.submit(Time::ZERO, request.clone()).unwrap();
        }
        match engine.next_step(Time::ZERO) {
            None if step > arrivals[arrivals.len() - 1] => break,
            None => {}
            Some(step) => {
                finished.extend(step.finished);
                batches.extend((!step.events.is_empty()).then_some(step.events));
            }
        }
    }
    let cached = |r: &NewRequest| finished.iter().find(|f| f.id == r.id).unwrap().cached_tokens;
    Race { cached: requests.iter().map(cached).collect(), engine, batches }
}

fn shape(events: &[KvEvent]) -> Vec<(bool, usize)> {
    events
        .iter()
        .map(|event| match event {
            KvEvent::Stored(stored) => (true, stored.hashes.len()),
            KvEvent::Removed(removed) => (false, removed.hashes.len()),
            KvEvent::Cleared => (false, 0),
        })
        .collect()
}

fn replay(name: &str) -> Replayer {
    let mut replayer = Replayer::new(name);
    let requests = replayer.recording.requests.clone();
    let mut i = 0;
    while i < requests.len() {
        let request = &requests[i];
        if request.label == "reset" {
            assert!(replayer.engine.reset_prefix_cache());
            i += 1;
            continue;
        }
        let together =
            requests[i..].iter().take_while(|r| r.label.starts_with("concurrent")).count().max(1);
        let mut group = Vec::new();
        for request in &requests[i..i + together] {
            for prompt in &request.prompts {
                (0..request.n).for_each(|_| group.push((request.clone(), prompt.clone())));
            }
        }
        let cached = replayer.run(&group);
        if together == 1 {
            let details = request.usage.prompt_tokens_details.as_ref().unwrap();
            assert_eq!(cached.last(), Some(&details.cached_tokens), "{name} {}", request.label);
        }
        i += together;
    }
    replayer
}

/// Hashes replaced by the order in which they first appear. The recording with adapters names them
/// by a path that it does not tell (it is part of the hash), so only identity can be compared
/// there; the hashes themselves are compared with vectors in the model's own tests.
fn anonymous(batches: &[Vec<KvEvent>]) -> Vec<Vec<KvEvent>> {
    let mut seen: Vec<EngineHash> = Vec::new();
    let mut rename = |hash: &mut EngineHash| {
        let at = seen.iter().position(|known| known == hash).unwrap_or_else(|| {
            seen.push(*hash);
            seen.len() - 1
        });
        *hash = EngineHash(at as u64);
    };
    let mut batches = batches.to_vec();
    for event in batches.iter_mut().flatten() {
        match event {
            KvEvent::Stored(stored) => {
                stored.parent.iter_mut().for_each(&mut rename);
                stored.hashes.iter_mut().for_each(&mut rename);
            }
            KvEvent::Removed(removed) => removed.hashes.iter_mut().for_each(&mut rename),
            KvEvent::Cleared => {}
        }
    }
    batches
}

#[test]
fn whole_runs_give_the_recorded_cached_tokens_and_event_messages() {
    for name in ["sha256_cbor", "xxhash_cbor", "byteshash"] {
        let replayer = replay(name);
        let recorded = &replayer.recording.batches;
        for (i, (batch, ours)) in recorded.iter().zip(&replayer.batches).enumerate() {
            assert_eq!(ours, &batch.batch.events, "{name} batch {i}");
            if name == "byteshash" || batch.has_session {
                continue;
            }
            let ours = EventBatch { events: ours.clone(), ..batch.batch.clone() };
            let mut payload = Vec::new();
            kv_event::encode_batch(&ours, &mut payload);
            assert_eq!(payload, batch.payload, "{name} batch {i}");
        }
        assert_eq!(replayer.batches.len(), recorded.len(), "{name}");
    }
}

#[test]
fn a_run_with_adapters_gives_the_recorded_cached_tokens_and_events() {
    let replayer = replay("lora");
    let recorded: Vec<_> =
        replayer.recording.batches.iter().map(|batch| batch.batch.events.clone()).collect();
    let (ours, recorded) = (anonymous(&replayer.batches), anonymous(&recorded));
    for (i, (ours, recorded)) in ours.iter().zip(&recorded).enumerate() {
        assert_eq!(ours, recorded, "batch {i}");
    }
    assert_eq!(ours.len(), recorded.len());
}
