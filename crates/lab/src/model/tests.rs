//! Mechanisms of the model one by one; `tests/model_conformance.rs` compares whole recorded runs.

use std::collections::BTreeMap;

use kvroute_core::event::{EngineHash, KvEvent};
use kvroute_core::{Rng, Time};
use serde::Deserialize;

use super::*;

fn engine(config: ModelConfig) -> EngineModel {
    EngineModel::new(config, Profile::built_in("tiny").unwrap()).unwrap()
}

fn small() -> ModelConfig {
    ModelConfig {
        block_size: 4,
        blocks: 17,
        max_model_len: 64,
        max_num_batched_tokens: 16,
        max_num_seqs: 8,
        ..ModelConfig::default()
    }
}

fn request(id: RequestId, tokens: impl IntoIterator<Item = u32>, max_tokens: u32) -> NewRequest {
    NewRequest { id, tokens: tokens.into_iter().collect(), max_tokens, ..NewRequest::default() }
}

fn drain(engine: &mut EngineModel) -> Vec<Step> {
    let mut now = Time::ZERO;
    let mut steps = Vec::new();
    while let Some(step) = engine.next_step(now) {
        now = now + step.duration;
        steps.push(step);
        assert!(steps.len() < 100_000, "the engine makes no progress");
    }
    steps
}

fn run(engine: &mut EngineModel, request: NewRequest) -> (Finished, Vec<KvEvent>) {
    engine.submit(Time::ZERO, request).unwrap();
    let steps = drain(engine);
    let finished = steps.iter().flat_map(|step| &step.finished).copied().next().unwrap();
    (finished, steps.into_iter().flat_map(|step| step.events).collect())
}

/// The names and order of what left and entered, for short comparisons.
fn shape(events: &[KvEvent]) -> Vec<(char, usize)> {
    events
        .iter()
        .map(|event| match event {
            KvEvent::Stored(stored) => ('S', stored.hashes.len()),
            KvEvent::Removed(removed) => ('R', removed.hashes.len()),
            KvEvent::Cleared => ('C', 0),
        })
        .collect()
}

#[derive(Deserialize)]
struct Vector {
    name: String,
    block_size: usize,
    token_ids: Vec<u32>,
    spec: Spec,
    hashes: Vec<VectorHashes>,
}

#[derive(Deserialize)]
struct Spec {
    cache_salt: Option<String>,
    lora: Option<(String, String)>,
}

#[derive(Deserialize)]
struct VectorHashes {
    algo: String,
    seed: String,
    block_hashes: Vec<String>,
    event_ints: Vec<u64>,
}

#[test]
fn block_hashes_are_those_of_vllm() {
    let text = include_str!("../../../../tests/data/engine/hash_vectors.json");
    let vectors: Vec<Vector> = serde_json::from_str(text).unwrap();
    let mut compared = 0;
    for vector in &vectors {
        let adapter = vector
            .spec
            .lora
            .as_ref()
            .map(|(name, path)| Adapter { name: name.clone(), path: path.clone() });
        for expected in &vector.hashes {
            let algorithm = HashAlgorithm::from_name(&expected.algo).unwrap();
            let mut hasher = BlockHasher::new(algorithm, &expected.seed);
            let mut parent = hasher.root();
            for (i, tokens) in vector.token_ids.chunks_exact(vector.block_size).enumerate() {
                let cache_salt = vector.spec.cache_salt.as_deref().filter(|_| i == 0);
                let extras = HashExtras { adapter: adapter.as_ref(), cache_salt };
                parent = hasher.next(&parent, tokens, extras);
                let hex: String = parent.bytes().iter().map(|b| format!("{b:02x}")).collect();
                assert_eq!(hex, expected.block_hashes[i], "{} {}", vector.name, expected.algo);
                assert_eq!(parent.key(), EngineHash(expected.event_ints[i]));
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn a_prefill_is_one_event_and_each_block_filled_by_decoding_is_another() {
    let mut engine = engine(small());
    let (finished, events) = run(&mut engine, request(1, 0..10, 8));
    assert_eq!((finished.output_tokens, finished.cached_tokens), (8, 0));
    assert_eq!(shape(&events), [('S', 2), ('S', 1), ('S', 1)]);
    let KvEvent::Stored(second) = &events[1] else { panic!("{events:?}") };
    let KvEvent::Stored(first) = &events[0] else { panic!("{events:?}") };
    assert_eq!(second.parent, Some(first.hashes[1]));
    assert_eq!(second.tokens.ids()[..2], [8, 9]);
}

#[test]
fn a_fully_cached_prompt_recomputes_its_last_block_into_a_duplicate() {
    let mut engine = engine(small());
    run(&mut engine, request(1, 0..8, 1));
    let (finished, events) = run(&mut engine, request(2, 0..8, 1));
    assert_eq!(finished.cached_tokens, 4);
    assert_eq!(shape(&events), [('S', 1)]);
    assert_eq!(engine.pool.named_count(), 3);
    assert_eq!(engine.cached_prefix(&(0..9).collect::<Vec<_>>(), None, ""), 8);
}

#[test]
fn the_least_recently_used_block_goes_first_and_the_tail_of_a_request_before_its_head() {
    let mut engine = engine(ModelConfig { max_model_len: 32, blocks: 9, ..small() });
    let (_, a) = run(&mut engine, request(1, 100..112, 1));
    let (_, b) = run(&mut engine, request(2, 200..212, 1));
    run(&mut engine, request(3, 100..113, 1));
    let (_, events) = run(&mut engine, request(4, 300..316, 1));
    let names = |events: &[KvEvent]| match &events[0] {
        KvEvent::Stored(stored) => stored.hashes.clone(),
        other => panic!("{other:?}"),
    };
    // 8 usable blocks: 3 of A, 3 of B, 2 never named. A was used after B. Request 4 takes the two
    // nameless blocks, then B from its tail.
    assert_eq!(shape(&events), [('R', 1), ('R', 1), ('S', 4)]);
    let removed: Vec<EngineHash> = events[..2]
        .iter()
        .map(|event| match event {
            KvEvent::Removed(removed) => removed.hashes[0],
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(removed, [names(&b)[2], names(&b)[1]]);
    assert!(engine.pool.find(names(&a)[0]).is_some());
}

#[test]
fn a_long_prompt_is_computed_in_chunks_beside_decoding() {
    let mut engine = engine(small());
    engine.submit(Time::ZERO, request(1, 0..3, 20)).unwrap();
    engine.next_step(Time::ZERO).unwrap();
    engine.submit(Time::ZERO, request(2, 100..140, 1)).unwrap();
    let first = engine.next_step(Time::ZERO).unwrap();
    assert_eq!((first.tokens, first.emitted.len()), (16, 1));
    assert_eq!(first.work.prefill_tokens, 15);
    let second = engine.next_step(Time::ZERO).unwrap();
    assert_eq!((second.tokens, second.emitted.len()), (16, 1));
    assert_eq!(second.work.prefill_positions_doubled, 2 * 15 * 15 + 15 * 15);
    let third = engine.next_step(Time::ZERO).unwrap();
    assert_eq!((third.tokens, third.emitted.len()), (11, 2));
}

#[test]
fn when_blocks_run_out_the_last_running_request_is_recomputed_later() {
    let mut engine =
        engine(ModelConfig { blocks: 9, max_model_len: 32, reserve_full_prompt: false, ..small() });
    engine.submit(Time::ZERO, request(1, 0..12, 20)).unwrap();
    engine.next_step(Time::ZERO).unwrap();
    engine.submit(Time::ZERO, request(2, 100..112, 20)).unwrap();
    let steps = drain(&mut engine);
    let finished: Vec<Finished> = steps.iter().flat_map(|s| s.finished.clone()).collect();
    assert_eq!(finished.iter().map(|f| f.id).collect::<Vec<_>>(), [1, 2]);
    assert!(finished[1].preemptions >= 1);
    assert_eq!(finished[0].preemptions, 0);
    assert_eq!(finished[1].output_tokens, 20);
    let tokens = steps.iter().flat_map(|s| &s.emitted).filter(|e| e.id == 2);
    assert_eq!(tokens.map(|e| e.index).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
    assert_eq!(engine.stats().waiting, 0);
    assert_eq!(engine.stats().kv_usage, 0.0);
}

#[test]
fn an_arrival_is_unseen_until_the_next_step_and_an_abort_frees_everything() {
    let mut engine = engine(ModelConfig { max_num_seqs: 1, ..small() });
    engine.submit(Time::ZERO, request(1, 0..8, 50)).unwrap();
    let step = engine.next_step(Time::ZERO).unwrap();
    engine.submit(Time::ZERO, request(2, 50..58, 50)).unwrap();
    assert_eq!((step.stats.running, step.stats.waiting), (1, 0));
    assert_eq!(engine.stats().waiting, 0);
    let step = engine.next_step(Time::ZERO).unwrap();
    assert_eq!((step.stats.running, step.stats.waiting), (1, 1));
    assert!(!engine.reset_prefix_cache(), "blocks are in use");
    engine.abort(1);
    let step = engine.next_step(Time::ZERO).unwrap();
    assert_eq!((step.stats.running, step.stats.waiting, step.stats.aborted), (1, 0, 1));
    engine.abort(2);
    engine.abort(77);
    assert!(engine.next_step(Time::ZERO).is_none());
    assert_eq!((engine.stats().aborted, engine.stats().kv_usage), (2, 0.0));
    assert!(engine.is_idle());
    assert!(engine.reset_prefix_cache());
    assert!(engine.is_idle(), "the event of a reset waits for the next request");
    let (_, events) = run(&mut engine, request(3, 0..8, 1));
    assert_eq!(shape(&events), [('C', 0), ('S', 2)]);
}

#[test]
fn salts_and_adapters_do_not_share_blocks_and_too_many_adapters_wait() {
    let adapters = ["a", "b"].map(|name| Adapter { name: name.into(), path: name.into() });
    let mut engine = engine(ModelConfig { adapters: adapters.to_vec(), ..small() });
    let with = |id, adapter: Option<&str>, salt: Option<&str>| NewRequest {
        adapter: adapter.map(str::to_owned),
        cache_salt: salt.map(str::to_owned),
        ..request(id, 0..9, 2)
    };
    let cases = [
        (None, None),
        (Some("a"), None),
        (Some("b"), None),
        (None, Some("s")),
        (Some("a"), Some("s")),
    ];
    for (i, (adapter, salt)) in cases.into_iter().enumerate() {
        let (cold, events) = run(&mut engine, with(10 + i as u64, adapter, salt));
        let (warm, _) = run(&mut engine, with(20 + i as u64, adapter, salt));
        assert_eq!((cold.cached_tokens, warm.cached_tokens), (0, 8), "{adapter:?} {salt:?}");
        let KvEvent::Stored(stored) = &events[events.len() - 1] else { panic!() };
        assert_eq!(stored.lora_name.as_deref(), adapter);
        assert_eq!(stored.extras.len(), if salt.is_some() { 2 } else { 0 });
    }
    engine.submit(Time::ZERO, with(1, Some("a"), None)).unwrap();
    engine.submit(Time::ZERO, with(2, Some("b"), None)).unwrap();
    engine.submit(Time::ZERO, with(3, Some("a"), None)).unwrap();
    let step = engine.next_step(Time::ZERO).unwrap();
    assert_eq!((step.stats.running, step.stats.waiting, step.stats.deferred), (2, 1, 1));
    assert_eq!(step.stats.running_adapters, ["a"]);
    assert_eq!(step.stats.waiting_adapters, ["b"]);
}

#[test]
fn bad_requests_and_settings_are_refused() {
    let mut engine = engine(small());
    let refused =
        |engine: &mut EngineModel, request| engine.submit(Time::ZERO, request).unwrap_err();
    assert_eq!(refused(&mut engine, request(1, [], 1)), SubmitError::EmptyPrompt);
    let error = refused(&mut engine, request(1, 0..64, 1));
    assert_eq!(error, SubmitError::PromptTooLong { tokens: 64, limit: 63 });
    let unknown = NewRequest { adapter: Some("x".into()), ..request(1, 0..4, 1) };
    assert_eq!(refused(&mut engine, unknown), SubmitError::UnknownAdapter("x".into()));
    engine.submit(Time::ZERO, request(1, 0..63, 100)).unwrap();
    assert_eq!(refused(&mut engine, request(1, 0..4, 1)), SubmitError::DuplicateId(1));
    let steps = drain(&mut engine);
    let finished = steps.iter().flat_map(|s| &s.finished).next().unwrap();
    assert_eq!((finished.output_tokens, finished.reason), (1, FinishReason::Length));
    let profile = Profile::built_in("tiny").unwrap();
    let small_cache = ModelConfig { blocks: 16, ..small() };
    assert!(matches!(
        EngineModel::new(small_cache, profile.clone()),
        Err(ModelConfigError::CacheTooSmall { usable: 15, .. })
    ));
    let zero = ModelConfig { max_num_seqs: 0, ..small() };
    assert!(matches!(EngineModel::new(zero, profile), Err(ModelConfigError::Zero("max_num_seqs"))));
}

/// Random load with aborts and resets: a follower that only reads events, with counts per name,
/// always knows exactly what the pool holds, and the same seed gives the same steps.
#[test]
fn events_tell_exactly_what_the_cache_holds() {
    for seed in 0..30 {
        let first = random_run(seed);
        assert_eq!(first, random_run(seed), "seed {seed}");
        assert!(first.1 > 0, "seed {seed} removed nothing");
    }
}

fn random_run(seed: u64) -> (u64, usize) {
    let mut rng = Rng::seeded(seed);
    let mut engine =
        engine(ModelConfig { blocks: 33, reserve_full_prompt: seed.is_multiple_of(2), ..small() });
    let mut held: BTreeMap<EngineHash, i64> = BTreeMap::new();
    let (mut now, mut checksum, mut removed) = (Time::ZERO, 0u64, 0);
    for id in 0..300u64 {
        let head = rng.below(4) as u32 * 1000;
        let tokens: Vec<u32> = (0..1 + rng.below(40) as u32).map(|i| head + i).collect();
        engine.submit(now, request(id, tokens, 1 + rng.below(12) as u32)).unwrap();
        if rng.below(5) == 0 {
            engine.abort(rng.below(id as usize + 1) as u64);
        }
        for _ in 0..rng.below(4) {
            let Some(step) = engine.next_step(now) else { break };
            now = now + step.duration;
            let tokens = step.emitted.iter().map(|e| u64::from(e.token) ^ e.id);
            checksum = tokens.fold(checksum, |sum, x| sum.rotate_left(7) ^ x);
            for event in &step.events {
                let (hashes, change) = match event {
                    KvEvent::Stored(stored) => (&stored.hashes, 1),
                    KvEvent::Removed(gone) => (&gone.hashes, -1),
                    KvEvent::Cleared => panic!("nobody reset the cache"),
                };
                removed += usize::from(change < 0);
                hashes.iter().for_each(|&hash| *held.entry(hash).or_default() += change);
            }
            let known: i64 = held.values().sum();
            assert_eq!(known, engine.pool.named_count() as i64, "seed {seed}");
            assert!(held.iter().all(|(&h, &n)| n >= 0 && (n > 0) == engine.pool.find(h).is_some()));
        }
    }
    (checksum, removed)
}
