//! The memory limit, and that nothing stays behind.

use super::*;
use crate::Rng;

#[test]
fn removing_an_endpoint_returns_to_the_start() {
    let mut index = index_of(ROOMY, 2);
    let small = prompt(1, 50);
    store(&mut index, 0, &small, 0);
    store(&mut index, 1, &small, 0);
    index.record(id(0), &chain_of(&small).keys);
    index.speculate(id(1), &chain_of(&small), Time(5));
    let start = index.usage();
    let third = EndpointId { slot: 2, generation: 4 };
    index.add_endpoint(third);
    index.apply(third, &KvEvent::Stored(stored(&small, 0)));
    for name in 2..60 {
        let tokens = prompt(name, 50);
        index.apply(third, &KvEvent::Stored(stored(&tokens, 0)));
        index.apply(third, &KvEvent::Stored(stored(&tokens, 30)));
        index.apply(third, &KvEvent::Stored(stored(&prompt(1000 + name, 3), 1)));
        index.record(third, &chain_of(&prompt(2000 + name, 20)).keys);
        index.speculate(third, &chain_of(&tokens), Time(5));
    }
    assert!(index.usage().bytes > 3 * start.bytes);
    index.remove_endpoint(third);
    index.check();
    let after = index.usage();
    assert!(after.bytes <= start.bytes, "{} bytes are left of {}", after.bytes, start.bytes);
    assert_eq!(IndexUsage { bytes: start.bytes, ..after }, start);
    (0..2).for_each(|slot| index.remove_endpoint(id(slot)));
    assert_eq!(index.usage(), Index::new(ROOMY).usage());
}

#[test]
fn the_budget_holds_at_every_step_and_is_used() {
    for seed in 0..6 {
        let mut rng = Rng::seeded(seed);
        let limits = IndexLimits {
            bytes_max: 200_000 + rng.below(300_000),
            pending_blocks_per_endpoint_max: 300,
            ..ROOMY
        };
        let mut index = index_of(limits, 4);
        let mut bytes_most = 0;
        for step in 0..6000 {
            let slot = rng.below(4) as u16;
            let tokens = prompt(rng.below(1500) as u32, 1 + rng.below(30) as u32);
            match rng.below(10) {
                0 => index.record(id(slot), &chain_of(&tokens).keys),
                1 => drop(index.speculate(id(slot), &chain_of(&tokens), Time(step))),
                2 => drop(store(&mut index, slot, &tokens, 1)),
                3 => index.expire(Time(step.saturating_sub(200))),
                4 => drop(remove(&mut index, slot, &hashes(&tokens), Tier::Gpu)),
                _ => drop(store(&mut index, slot, &tokens, 0)),
            }
            let bytes = index.usage().bytes;
            assert!(bytes <= limits.bytes_max, "seed {seed} step {step}: {bytes} bytes");
            bytes_most = bytes_most.max(bytes);
        }
        index.check();
        assert!(bytes_most * 3 > limits.bytes_max, "seed {seed}: at most {bytes_most} bytes");
        let evicted = index.usage().evicted;
        assert!(evicted.history > 0 && evicted.speculations > 0 && evicted.pending > 0);
        assert!(evicted.resident > 0, "seed {seed}: {evicted:?}");
    }
}

#[test]
fn an_endpoint_that_joins_a_full_index_finds_room() {
    let limits = IndexLimits { bytes_max: 100_000, ..ROOMY };
    let mut index = index_of(limits, 1);
    for name in 0..200 {
        store(&mut index, 0, &prompt(name, 30), 0);
        for slot in 1..10 {
            index.add_endpoint(id(slot));
            let bytes = index.usage().bytes;
            assert!(bytes <= limits.bytes_max, "{bytes} bytes with {slot} more endpoints");
        }
        (1..10).for_each(|slot| index.remove_endpoint(id(slot)));
    }
    index.check();
    assert!(index.usage().evicted.resident > 0);
}

#[test]
fn what_is_worth_least_goes_first() {
    let mut index = index_of(IndexLimits { bytes_max: 100_000, ..ROOMY }, 2);
    for name in 0..4 {
        index.record(id(0), &chain_of(&prompt(100 + name, 20)).keys);
        index.speculate(id(0), &chain_of(&prompt(200 + name, 20)), Time(u64::from(name)));
        store(&mut index, 0, &prompt(300 + name, 5), 1);
    }
    store(&mut index, 1, &prompt(400, 20), 0);
    let mut order = Vec::new();
    for name in 0.. {
        store(&mut index, 0, &prompt(500 + name, 20), 0);
        let Evicted { history, speculations, pending, resident } = index.usage().evicted;
        let now = [history > 0, speculations > 0, pending > 0, resident > 0];
        if order.last() != Some(&now) {
            order.push(now);
        }
        if resident > 0 {
            break;
        }
    }
    // Kinds never go before those worth less are used up.
    for now in order {
        assert!(now.is_sorted_by(|a, b| a >= b), "{now:?}");
    }
    let usage = index.usage();
    assert_eq!((usage.history, usage.speculations, usage.pending), (0, 0, 0));
    // The endpoint with most gives, what it stored first.
    assert_eq!(resident(&index, 1, &prompt(400, 20)), 20);
    assert_eq!(resident(&index, 0, &prompt(500, 20)), 0);
}

#[test]
fn history_does_not_drive_out_what_engines_reported() {
    let mut index = index_of(IndexLimits { bytes_max: 60_000, ..ROOMY }, 1);
    for name in 0..40 {
        store(&mut index, 0, &prompt(name, 20), 0);
    }
    let resident = index.usage().resident;
    for name in 100..200 {
        index.record(id(0), &chain_of(&prompt(name, 20)).keys);
        index.speculate(id(0), &chain_of(&prompt(name, 20)), Time(1));
        assert_eq!(index.usage().resident, resident);
    }
}

#[test]
fn a_budget_below_the_fixed_part_stores_nothing_and_says_so() {
    let mut index = index_of(IndexLimits { bytes_max: 0, ..ROOMY }, 1);
    let applied = store(&mut index, 0, &prompt(1, 3), 0);
    assert_eq!(applied.skipped_for(SkipReason::OverBudget), 3);
    assert_eq!(store(&mut index, 0, &prompt(1, 3), 1).pending_dropped, 2);
    index.record(id(0), &chain_of(&prompt(1, 3)).keys);
    let made = index.speculate(id(0), &chain_of(&prompt(1, 3)), Time(1));
    assert_eq!(made, SpeculationId::NONE);
    assert_eq!(hit(&index, 0, &prompt(1, 3)), Hit::default());
}

/// Bytes per distinct block with `pods` endpoints that hold all blocks.
fn bytes_per_block(blocks: u32, pods: u16) -> f64 {
    let mut index = index_of(ROOMY, pods);
    for name in 0..blocks / 16 {
        let tokens = prompt(name, 16);
        for slot in 0..pods {
            store(&mut index, slot, &tokens, 0);
        }
    }
    index.usage().bytes as f64 / f64::from(blocks)
}

#[test]
fn a_block_takes_few_bytes() {
    for (blocks, pods, most) in [(40_000, 1, 80.0), (40_000, 8, 480.0)] {
        let bytes = bytes_per_block(blocks, pods);
        println!("{blocks} blocks on {pods} endpoints: {bytes:.1} bytes per distinct block");
        assert!(bytes < most, "{blocks} blocks on {pods} endpoints: {bytes:.1} bytes per block");
    }
}

#[test]
fn endpoints_that_turn_to_names_of_their_own_do_not_exceed_the_budget_for_long() {
    let limits = IndexLimits { bytes_max: 400 << 10, ..ROOMY };
    let mut index = index_of(limits, 16);
    let tokens = prompt(1, 1024);
    for slot in 0..16 {
        assert_eq!(store(&mut index, slot, &tokens, 0).stored, 1024);
    }
    for slot in 0..16 {
        // A name of the shared prompt for another block.
        let other = prompt(2 + u32::from(slot), 1);
        let event = BlockStored { hashes: hashes(&tokens)[..1].into(), ..stored(&other, 0) };
        index.apply(id(slot), &KvEvent::Stored(event));
        let next = prompt(100 + u32::from(slot), 1);
        store(&mut index, slot, &next, 0);
        let usage = index.usage();
        assert!(usage.bytes <= usage.bytes_max, "after slot {slot}: {usage:?}");
    }
    assert!(index.usage().evicted.resident > 0, "it was filled");
    index.check();
}
