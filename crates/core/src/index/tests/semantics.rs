//! What each kind of event means.

use super::*;
use crate::event::{Extra, Tokens};

#[test]
fn a_block_stays_until_its_last_copy_is_removed() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 3);
    assert_eq!(store(&mut index, 0, &tokens, 0).stored, 3);
    // The last block again: a fully cached prompt computes it once more.
    assert_eq!(store(&mut index, 0, &tokens, 2).duplicate, 1);
    let last = &hashes(&tokens)[2..];
    assert_eq!(remove(&mut index, 0, last, Tier::Gpu).removed, 1);
    assert_eq!(resident(&index, 0, &tokens), 3);
    assert_eq!(remove(&mut index, 0, last, Tier::Gpu).removed, 1);
    assert_eq!(resident(&index, 0, &tokens), 2);
    assert_eq!(remove(&mut index, 0, last, Tier::Gpu).unknown, 1);
}

#[test]
fn a_reannounced_prefix_is_not_a_copy() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 3);
    store(&mut index, 0, &tokens, 0);
    assert_eq!(store(&mut index, 0, &tokens, 0).reannounced, 3);
    // A single block may be a real second copy, so may blocks of another tier.
    assert_eq!(store(&mut index, 0, &tokens[..SIZE as usize], 0).duplicate, 1);
    let cpu = BlockStored { tier: Tier::Cpu, ..stored(&tokens, 0) };
    assert_eq!(index.apply(id(0), &KvEvent::Stored(cpu)).stored, 3);
    // Not all of it is there: the missing block makes it a store.
    remove(&mut index, 0, &hashes(&tokens)[2..], Tier::Gpu);
    let again = store(&mut index, 0, &tokens, 0);
    assert_eq!((again.stored, again.duplicate, again.reannounced), (1, 2, 0));
}

#[test]
fn a_hole_ends_the_hit() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 4);
    store(&mut index, 0, &tokens, 0);
    remove(&mut index, 0, &hashes(&tokens)[1..2], Tier::Gpu);
    assert_eq!(resident(&index, 0, &tokens), 1);
    store(&mut index, 0, &tokens[..2 * SIZE as usize], 1);
    assert_eq!(resident(&index, 0, &tokens), 4);
}

#[test]
fn tiers_are_apart_and_the_best_one_weighs() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 3);
    store(&mut index, 0, &tokens, 0);
    // An offload names blocks only.
    let offload = BlockStored {
        hashes: hashes(&tokens)[..2].to_vec().into(),
        tokens: Vec::new().into(),
        block_size: 0,
        tier: Tier::Cpu,
        ..stored(&tokens, 0)
    };
    assert_eq!(index.apply(id(0), &KvEvent::Stored(offload)).stored, 2);
    assert_eq!(hit(&index, 0, &tokens).by_tier, [3, 2, 0, 0]);
    remove(&mut index, 0, &hashes(&tokens), Tier::Gpu);
    let left = hit(&index, 0, &tokens);
    assert_eq!((left.resident, left.resident_weighted), (2, 1.6));
    assert_eq!(left.by_tier, [0, 2, 0, 0]);
    let unknown = BlockStored { tokens: Vec::new().into(), ..stored(&prompt(2, 1), 0) };
    assert_eq!(index.apply(id(0), &KvEvent::Stored(unknown)).unknown, 1);
}

#[test]
fn blocks_with_an_unknown_parent_wait_for_it() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 6);
    let until = |blocks: usize| &tokens[..blocks * SIZE as usize];
    // Grandchildren first, and one of them leaves while it waits.
    assert_eq!(store(&mut index, 0, until(6), 4).pending, 2);
    assert_eq!(store(&mut index, 0, until(4), 2).pending, 2);
    assert_eq!(remove(&mut index, 0, &hashes(&tokens)[5..], Tier::Gpu).removed, 1);
    assert_eq!(resident(&index, 0, &tokens), 0);
    let applied = store(&mut index, 0, until(2), 0);
    assert_eq!((applied.stored, applied.resolved), (2, 3));
    assert_eq!(resident(&index, 0, &tokens), 5);
    assert_eq!(index.usage().pending, 0);
}

#[test]
fn waiting_blocks_are_bounded_and_the_oldest_goes() {
    let mut index = index_of(IndexLimits { pending_blocks_per_endpoint_max: 4, ..ROOMY }, 1);
    let (a, b) = (prompt(1, 4), prompt(2, 4));
    store(&mut index, 0, &a, 1);
    assert_eq!(store(&mut index, 0, &b, 1).pending_dropped, 3);
    assert_eq!(store(&mut index, 0, &prompt(3, 9), 1).pending_dropped, 8);
    store(&mut index, 0, &a[..SIZE as usize], 0);
    store(&mut index, 0, &b[..SIZE as usize], 0);
    assert_eq!((resident(&index, 0, &a), resident(&index, 0, &b)), (1, 4));
}

#[test]
fn a_long_line_of_waiting_events_resolves_without_recursion() {
    let mut index = index_of(IndexLimits { pending_blocks_per_endpoint_max: 20_000, ..ROOMY }, 1);
    let tokens = prompt(1, 20_000);
    let all = stored(&tokens, 0);
    for block in (0..20_000).rev() {
        let at = block * SIZE as usize;
        let one = BlockStored {
            hashes: vec![all.hashes[block]].into(),
            parent: block.checked_sub(1).map(|parent| all.hashes[parent]),
            tokens: tokens[at..at + SIZE as usize].to_vec().into(),
            ..stored(&tokens[..SIZE as usize], 0)
        };
        index.apply(id(0), &KvEvent::Stored(one));
    }
    assert_eq!(resident(&index, 0, &tokens), 20_000);
}

#[test]
fn clearing_forgets_reports_and_keeps_history() {
    for by_event in [true, false] {
        let mut index = index_of(ROOMY, 1);
        let tokens = prompt(1, 3);
        store(&mut index, 0, &tokens, 0);
        store(&mut index, 0, &prompt(2, 3), 1);
        index.record(id(0), &chain_of(&tokens).keys);
        match by_event {
            true => assert_eq!(index.apply(id(0), &KvEvent::Cleared).cleared, 1),
            false => index.clear_resident(id(0)),
        }
        let left = hit(&index, 0, &tokens);
        assert_eq!((left.resident, left.history, left.any), (0, 3, 3));
        assert_eq!((index.usage().resident, index.usage().pending), (0, 0));
        assert_eq!(index.block_size(id(0)), Some(SIZE));
    }
}

#[test]
fn a_speculation_counts_until_it_ends() {
    let tokens = prompt(1, 4);
    let two = &tokens[..2 * SIZE as usize];
    let start = || {
        let mut index = index_of(ROOMY, 1);
        store(&mut index, 0, two, 0);
        let made = index.speculate(id(0), &chain_of(&tokens), Time(10));
        let now = hit(&index, 0, &tokens);
        assert_eq!((now.resident, now.expected, now.any), (2, 4, 4));
        assert_eq!(now.expected_weighted, 4.0);
        (index, made)
    };
    let expected = |index: &Index| hit(index, 0, &tokens).expected;
    // Withdrawn; a second request with the same blocks holds on.
    let (mut index, made) = start();
    let second = index.speculate(id(0), &chain_of(&tokens), Time(20));
    index.withdraw(made);
    index.withdraw(made);
    assert_eq!(expected(&index), 4);
    index.withdraw(second);
    assert_eq!(expected(&index), 2);
    // Over.
    let (mut index, _) = start();
    index.expire(Time(9));
    assert_eq!(expected(&index), 4);
    index.expire(Time(10));
    assert_eq!((expected(&index), index.usage().speculations), (2, 0));
    // Confirmed: what the engine drops afterwards is not expected any more.
    let (mut index, _) = start();
    store(&mut index, 0, &tokens[..3 * SIZE as usize], 2);
    assert_eq!(index.usage().speculations, 1);
    store(&mut index, 0, &tokens, 3);
    assert_eq!(index.usage().speculations, 0);
    remove(&mut index, 0, &hashes(&tokens)[2..], Tier::Gpu);
    assert_eq!(expected(&index), 2);
}

#[test]
fn speculations_are_bounded_and_the_first_to_end_goes() {
    let mut index = index_of(IndexLimits { speculations_max: 2, ..ROOMY }, 1);
    let tokens: Vec<Vec<u32>> = (0..3).map(|name| prompt(name, 1)).collect();
    for (tokens, until) in tokens.iter().zip([Time(5), Time(3), Time(9)]) {
        index.speculate(id(0), &chain_of(tokens), until);
    }
    let expected: Vec<u32> = tokens.iter().map(|tokens| hit(&index, 0, tokens).expected).collect();
    assert_eq!((expected, index.usage().evicted.speculations), (vec![1, 0, 1], 1));
}

#[test]
fn history_keeps_what_was_used_last_and_the_front_of_it() {
    let mut index = index_of(IndexLimits { history_blocks_per_endpoint_max: 5, ..ROOMY }, 1);
    let (a, b) = (prompt(1, 4), prompt(2, 3));
    index.record(id(0), &chain_of(&a).keys);
    index.record(id(0), &chain_of(&b).keys);
    let history = |index: &Index, tokens: &[u32]| hit(index, 0, tokens).history;
    assert_eq!((history(&index, &a), history(&index, &b)), (2, 3));
    index.record(id(0), &chain_of(&prompt(3, 9)).keys);
    assert_eq!(history(&index, &prompt(3, 9)), 5);
    assert_eq!(index.usage().history, 5);
}

#[test]
fn stale_and_unknown_endpoints_are_ignored() {
    let mut index = index_of(ROOMY, 1);
    let old = id(0);
    let new = EndpointId { slot: 0, generation: 1 };
    let tokens = prompt(1, 2);
    store(&mut index, 0, &tokens, 0);
    index.add_endpoint(new);
    assert_eq!(index.usage().resident, 0, "the slot has a new owner");
    let event = KvEvent::Stored(stored(&tokens, 0));
    for gone in [old, EndpointId { slot: 7, generation: 0 }] {
        let applied = index.apply(gone, &event);
        assert_eq!(applied.skipped_for(SkipReason::UnknownEndpoint), 2);
        assert_eq!(index.speculate(gone, &chain_of(&tokens), Time(1)), SpeculationId::NONE);
        index.record(gone, &chain_of(&tokens).keys);
        index.clear_resident(gone);
        index.remove_endpoint(gone);
        assert_eq!(index.endpoint_usage(gone), EndpointUsage::default());
        assert_eq!(index.block_size(gone), None);
    }
    assert_eq!(index.apply(new, &event).stored, 2);
    index.add_endpoint(new);
    assert_eq!(index.usage().resident, 2, "adding twice changes nothing");
}

#[test]
fn the_block_size_is_learned_per_endpoint() {
    let mut index = index_of(ROOMY, 2);
    let tokens = prompt(1, 4);
    let large = |tokens: &[u32]| BlockStored {
        hashes: (0..tokens.len() as u64 / 8).map(EngineHash).collect(),
        block_size: 8,
        ..stored(tokens, 0)
    };
    assert_eq!(index.block_size(id(0)), None);
    store(&mut index, 0, &tokens, 0);
    index.apply(id(1), &KvEvent::Stored(large(&tokens)));
    assert_eq!((index.block_size(id(0)), index.block_size(id(1))), (Some(4), Some(8)));
    assert_eq!((resident(&index, 0, &tokens), resident(&index, 1, &tokens)), (4, 0));
    // A short page of SGLang is no new block size; a larger one is.
    let short = BlockStored { block_size: 3, tokens: vec![9; 3].into(), ..stored(&tokens[..4], 0) };
    let applied = index.apply(id(0), &KvEvent::Stored(short));
    assert_eq!(applied.skipped_for(SkipReason::PartialBlock), 1);
    let applied = index.apply(id(0), &KvEvent::Stored(large(&tokens)));
    assert_eq!((applied.resized, applied.stored), (1, 2));
    assert_eq!((index.block_size(id(0)), resident(&index, 0, &tokens)), (Some(8), 0));
    index.clear_resident(id(0));
    assert_eq!(store(&mut index, 0, &tokens, 0).stored, 4);
    assert_eq!(index.block_size(id(0)), Some(4));
}

#[test]
fn what_contradicts_itself_is_left_out_and_counted() {
    let tokens = prompt(1, 2);
    let good = || stored(&tokens, 0);
    let grouped = || BlockStored { group: Some(0), ..good() };
    let odd = tokens[..7].to_vec();
    let table = [
        (BlockStored { block_size: 0, ..good() }, SkipReason::Malformed, 2, 0),
        (BlockStored { extras: vec![vec![]], ..good() }, SkipReason::Malformed, 2, 0),
        (BlockStored { tokens: vec![1; 9].into(), ..good() }, SkipReason::NotDense, 2, 0),
        (BlockStored { tokens: vec![1; 4].into(), ..good() }, SkipReason::NotDense, 2, 0),
        (BlockStored { tokens: odd.clone().into(), ..grouped() }, SkipReason::NotDense, 2, 0),
        (BlockStored { tokens: odd.into(), ..good() }, SkipReason::PartialBlock, 1, 1),
        (
            BlockStored { kind: GroupKind::NotIndexable, ..grouped() },
            SkipReason::NotIndexable,
            2,
            0,
        ),
        (BlockStored { kind: GroupKind::Mamba, ..good() }, SkipReason::NotIndexable, 2, 0),
        (BlockStored { block_size: u32::MAX, ..good() }, SkipReason::NotDense, 2, 0),
    ];
    for (event, reason, skipped, stored) in table {
        let mut index = index_of(ROOMY, 1);
        let shown = format!("{event:?}");
        let applied = index.apply(id(0), &KvEvent::Stored(event));
        assert_eq!((applied.skipped_for(reason), applied.stored), (skipped, stored), "{shown}");
        assert_eq!(resident(&index, 0, &tokens), stored as u32);
    }
}

#[test]
fn adapters_salts_and_engine_names_keep_blocks_apart() {
    let mut index = index_of(ROOMY, 2);
    let tokens = prompt(1, 2);
    let lora = BlockStored { lora_name: Some("a".into()), ..stored(&tokens, 0) };
    index.apply(id(0), &KvEvent::Stored(lora));
    assert_eq!(resident(&index, 0, &tokens), 0);
    let salted =
        BlockStored { extras: vec![vec![Extra::Text("s".into())], vec![]], ..stored(&tokens, 0) };
    index.apply(id(1), &KvEvent::Stored(salted));
    let mut hits = Hits::new();
    let mut reach = |root, cache_salt| {
        let extras = PromptExtras { cache_salt, items: &[] };
        let chain = blocks::chain(ChainSpec::exact(SIZE), root, &tokens, &extras);
        index.lookup(&chain, &TierWeights::default(), &mut hits);
        [0, 1].map(|slot| hits.get(id(slot)).resident)
    };
    assert_eq!(reach(Root::Adapter("a"), None), [2, 0]);
    assert_eq!(reach(Root::Adapter("b"), None), [0, 0]);
    assert_eq!(reach(Root::Base, Some("s")), [0, 2]);
    assert_eq!(reach(Root::Base, Some("t")), [0, 0]);
}

#[test]
fn a_name_given_to_other_content_names_only_that() {
    let mut index = index_of(ROOMY, 1);
    let (a, b) = (prompt(1, 2), prompt(2, 2));
    store(&mut index, 0, &a, 0);
    let event = BlockStored { hashes: hashes(&a).into(), ..stored(&b, 0) };
    // All names are there, so this looks announced again; a copy of one block does not.
    let one = BlockStored {
        hashes: event.hashes[..1].to_vec().into(),
        tokens: b[..SIZE as usize].to_vec().into(),
        ..event
    };
    index.apply(id(0), &KvEvent::Stored(one));
    assert_eq!((resident(&index, 0, &a), resident(&index, 0, &b)), (0, 1));
    index.check();
}

/// The group events of one step of a model with a sliding window of 9 tokens: two blocks.
fn hybrid_step(tokens: &[u32], window: &[usize]) -> [KvEvent; 2] {
    let full = BlockStored { group: Some(1), ..stored(tokens, 0) };
    let beside = BlockStored {
        hashes: window.iter().map(|&block| full.hashes[block]).collect(),
        group: Some(0),
        kind: GroupKind::SlidingWindow { window: 9 },
        ..full.clone()
    };
    [KvEvent::Stored(beside), KvEvent::Stored(full)]
}

fn apply_all(index: &mut Index, events: &[KvEvent]) {
    for event in events {
        index.apply(id(0), event);
    }
}

#[test]
fn a_sliding_window_moves_the_boundary() {
    let tokens = prompt(1, 6);
    // Blocks in the window group -> the boundary of a prompt that goes on after 6 blocks.
    let table: [(&[usize], u32); 6] =
        [(&[4, 5], 6), (&[3, 4], 5), (&[2, 4, 5], 6), (&[1, 3, 5], 0), (&[0, 2, 4], 1), (&[], 0)];
    for (window, boundary) in table {
        for group_first in [0, 1] {
            let mut index = index_of(ROOMY, 1);
            let mut events = hybrid_step(&tokens, window);
            events.rotate_left(group_first);
            apply_all(&mut index, &events);
            let longer = [&tokens[..], &[7, 7]].concat();
            let got = hit(&index, 0, &longer);
            assert_eq!(got.resident, boundary, "{window:?}");
            assert_eq!(got.resident_weighted, f64::from(boundary));
            assert_eq!((got.by_tier[0], got.any), (boundary, 6));
        }
    }
    // A prompt of exactly the cached blocks computes its last one again: the boundary is before.
    let mut index = index_of(ROOMY, 1);
    apply_all(&mut index, &hybrid_step(&tokens, &[4, 5]));
    assert_eq!(resident(&index, 0, &tokens), 0);
    index.speculate(id(0), &chain_of(&tokens), Time(9));
    assert_eq!(hit(&index, 0, &tokens).expected, 5);
}

#[test]
fn removals_find_their_group_and_copies_are_real_there() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 3);
    let longer = [&tokens[..], &[7]].concat();
    for _ in 0..2 {
        apply_all(&mut index, &hybrid_step(&tokens, &[1, 2]));
    }
    let last = hashes(&tokens)[2];
    let mut remove_from = |group| {
        let removed =
            BlockRemoved { hashes: vec![last].into(), tier: Tier::Gpu, group: Some(group) };
        let applied = index.apply(id(0), &KvEvent::Removed(removed));
        (applied.removed, resident(&index, 0, &longer))
    };
    assert_eq!(remove_from(0), (1, 3), "a second copy is left in the window");
    assert_eq!(remove_from(1), (1, 3), "and in the full group");
    assert_eq!(remove_from(9), (0, 3), "nothing is in that group");
    assert_eq!(remove_from(0), (1, 0));
    assert_eq!(remove_from(1), (1, 0));
    assert_eq!(remove_from(1), (0, 0));
}

#[test]
fn a_second_full_group_must_hold_every_block() {
    let tokens = prompt(1, 3);
    let longer = [&tokens[..], &[7]].concat();
    let group = |group, tokens: &[u32]| {
        KvEvent::Stored(BlockStored { group: Some(group), ..stored(tokens, 0) })
    };
    let mut index = index_of(ROOMY, 1);
    index.apply(id(0), &group(0, &tokens));
    index.apply(id(0), &group(1, &tokens[..2 * SIZE as usize]));
    assert_eq!(resident(&index, 0, &longer), 2);
    // Older engines do not say what kind a group is; one with gaps is no full group.
    let KvEvent::Stored(mut gaps) = group(1, &tokens) else { unreachable!() };
    gaps.hashes.remove(0);
    index.apply(id(0), &KvEvent::Stored(gaps));
    assert_eq!(resident(&index, 0, &longer), 3);
}

#[test]
fn groups_are_learned_again_after_a_reset() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 3);
    apply_all(&mut index, &hybrid_step(&tokens, &[]));
    assert_eq!(resident(&index, 0, &tokens), 0);
    let changed = BlockStored { group: Some(0), ..stored(&tokens, 0) };
    let changed = KvEvent::Stored(changed);
    let applied = index.apply(id(0), &changed);
    assert_eq!(applied.skipped_for(SkipReason::GroupChanged), 3);
    index.clear_resident(id(0));
    assert_eq!(index.apply(id(0), &changed).stored, 3);
    assert_eq!(resident(&index, 0, &tokens), 3, "one group now");
}

#[test]
fn an_engine_whose_names_cease_to_be_keys_loses_what_it_told_and_nothing_else() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 90);
    let named_by_keys = |from: usize, to: usize| {
        let until = &tokens[..to * SIZE as usize];
        let keys: Vec<EngineHash> =
            chain_of(until).keys.iter().map(|key| EngineHash(key.0)).collect();
        let parent = from.checked_sub(1).map(|parent| keys[parent]);
        BlockStored { hashes: keys[from..].into(), parent, ..stored(until, from) }
    };
    index.apply(id(0), &KvEvent::Stored(named_by_keys(0, 64)));
    assert_eq!(index.usage().naming, Naming::Native);
    for at in 64..88 {
        let mut event = named_by_keys(at, at + 1);
        // The event whose names are compared again is among these.
        if at >= 72 {
            event.hashes[0] = EngineHash(at as u64);
            event.parent = event.parent.filter(|_| at == 72).or(Some(EngineHash(at as u64 - 1)));
        }
        index.apply(id(0), &KvEvent::Stored(event));
        index.check();
    }
    assert!(index.endpoint_usage(id(0)).own_names);
    assert_eq!(resident(&index, 0, &tokens), 0, "what was taken for keys may have been others'");
}

#[test]
fn fewer_hashes_of_blocks_than_tokens_are_malformed() {
    let mut index = index_of(ROOMY, 1);
    let tokens = prompt(1, 4);
    store(&mut index, 0, &tokens[..2 * SIZE as usize], 0);
    let count = 2 * SIZE;
    for hashed in [0, 1, 3] {
        let blocks = (0..hashed).collect();
        let event = BlockStored { tokens: Tokens::Hashed { blocks, count }, ..stored(&tokens, 2) };
        let applied = index.apply(id(0), &KvEvent::Stored(event));
        assert_eq!(applied.skipped_for(SkipReason::Malformed), 2, "{hashed} hashes");
        index.check();
    }
    let mut event = stored(&tokens, 2);
    event.hash_tokens();
    assert_eq!(index.apply(id(0), &KvEvent::Stored(event)).stored, 2);
    assert_eq!(resident(&index, 0, &tokens), 4);
}
