//! Long batches of KV events, slice by slice.

use super::*;
use crate::brain::SLICE_BLOCKS_MAX;

/// Blocks of each event.
const EVENT_BLOCKS: usize = 64;

/// Says a long batch; what came of it after each slice is what `between` saw.
fn say_in_slices(
    host: &mut Host,
    events: Vec<KvEvent>,
    mut between: impl FnMut(&mut Host),
) -> usize {
    let id = host.ids[0];
    let seq = host.seqs[&id];
    host.seqs.insert(id, seq + 1);
    let input = StreamInput::Batch { seq, batch: batch(events) };
    assert_eq!(host.brain.on_stream_slice(host.now, id, input), StreamOrder::None);
    let mut slices = 1;
    while host.brain.is_behind(id) {
        between(host);
        host.brain.catch_up(id);
        slices += 1;
    }
    slices
}

fn events(n: u32) -> Vec<KvEvent> {
    (0..n).map(|group| stored(&prompt(group, EVENT_BLOCKS * BLOCK), BLOCK)).collect()
}

fn resident(host: &Host) -> usize {
    host.brain.index().endpoint_usage(host.ids[0]).resident
}

#[test]
fn slices_are_short_and_their_sum_is_the_batch() {
    let (mut sliced, mut whole) = (Host::live(2), Host::live(2));
    let mut before = 0;
    let slices = say_in_slices(&mut sliced, events(30), |host| {
        let now = resident(host);
        assert!(now > before && now - before < SLICE_BLOCKS_MAX + EVENT_BLOCKS, "{before} {now}");
        before = now;
        let first = prompt(0, EVENT_BLOCKS * BLOCK);
        assert_eq!(host.ask(&first).endpoint, host.ids[0], "told already");
    });
    assert_eq!(slices, (30 * EVENT_BLOCKS).div_ceil(SLICE_BLOCKS_MAX));
    whole.say(whole.ids[0], events(30));
    let id = whole.ids[0];
    let copies = |host: &Host| host.brain.index().resident_copies(id);
    assert_eq!(copies(&sliced), copies(&whole));
    let applied = |host: &Host| host.brain.stream_applied(id).map(|applied| applied.stored);
    assert_eq!(applied(&sliced), applied(&whole));
}

#[test]
fn what_waits_keeps_its_order_and_goes_with_what_is_forgotten() {
    let gone = removed(&prompt(9, EVENT_BLOCKS * BLOCK), 0);
    let long = || events(20).into_iter().chain([gone.clone()]).collect::<Vec<_>>();
    let mut host = Host::live(2);
    let id = host.ids[0];
    let input = StreamInput::Batch { seq: host.seqs[&id], batch: batch(long()) };
    host.seqs.insert(id, host.seqs[&id] + 1);
    assert_eq!(host.brain.on_stream_slice(host.now, id, input), StreamOrder::None);
    host.say(id, vec![stored(&prompt(9, EVENT_BLOCKS * BLOCK), BLOCK)]);
    assert_eq!(resident(&host), 20 * EVENT_BLOCKS, "the next batch comes after all of this one");
    assert!(!host.brain.is_behind(id));
    say_in_slices(&mut host, events(40), |host| {
        host.brain.on_cache_reset(host.now, id);
        assert!(!host.brain.is_behind(id));
        assert_eq!(resident(host), 0);
    });
    assert_eq!(resident(&host), 0, "of before the reset");
    say_in_slices(&mut host, events(40), |host| {
        host.brain.remove_endpoint(host.now, id);
        assert!(!host.brain.is_behind(id));
    });
}
