//! Each transition, as a table of scripts.

use super::StreamInput::*;
use super::SuspectReason as Why;
use super::*;
use crate::event::{BlockRemoved, EngineHash, Tier};

/// A batch of one run of an engine; batches of different runs differ.
fn batch(run: u64, seq: u64) -> EventBatch {
    let removed = BlockRemoved {
        hashes: vec![EngineHash(run * 1000 + seq)].into(),
        tier: Tier::Gpu,
        group: None,
    };
    EventBatch {
        timestamp_s: (run * 1000 + seq) as f64,
        events: vec![KvEvent::Removed(removed)],
        ..EventBatch::default()
    }
}

fn live(run: u64, seq: u64) -> StreamInput {
    Batch { seq, batch: batch(run, seq) }
}

fn again(run: u64, seq: u64) -> StreamInput {
    ReplayBatch { seq, batch: batch(run, seq) }
}

fn cleared(seq: u64) -> StreamInput {
    let events = vec![KvEvent::Cleared];
    Batch { seq, batch: EventBatch { timestamp_s: seq as f64, events, ..EventBatch::default() } }
}

fn garbled(seq: u64) -> StreamInput {
    Batch { seq, batch: EventBatch { events_bad: 1, ..batch(0, seq) } }
}

const WITH: StreamLimits = StreamLimits {
    replay_available: true,
    held_batches_max: 3,
    replay_cooldown: Duration::from_secs(30),
};
const WITHOUT: StreamLimits = StreamLimits { replay_available: false, ..WITH };

/// Feeds a script at time 0, ticks after it at an hour; returns what was done and the state.
fn run(limits: StreamLimits, script: Vec<StreamInput>) -> (String, StreamState) {
    let mut stream = Stream::new(limits);
    let mut log: Vec<String> = Vec::new();
    for input in script {
        let now = if input == Tick { Time::from_secs_f64(3600.0) } else { Time::ZERO };
        let order = stream.on(now, input, &mut |effect| {
            log.push(match effect {
                StreamEffect::Reset => "reset".into(),
                StreamEffect::Apply(batch) => format!("{}", batch.timestamp_s),
            });
        });
        if let StreamOrder::Replay { from } = order {
            log.push(format!("replay:{from}"));
        }
    }
    (log.join(" "), stream.state())
}

#[track_caller]
fn check(limits: StreamLimits, script: Vec<StreamInput>, log: &str, state: StreamState) {
    assert_eq!(run(limits, script), (log.to_owned(), state));
}

use StreamState::{Initial, Live, Replaying, Suspect};

#[test]
fn from_the_beginning_everything_is_known() {
    check(WITHOUT, vec![], "", Initial);
    check(WITHOUT, vec![Connected], "", Initial);
    check(WITHOUT, vec![Connected, live(0, 0), live(0, 1)], "0 1", Live);
    check(WITH, vec![live(0, 0), live(0, 1)], "0 1", Live);
    // An idle engine is asked; one that has published nothing has an empty cache.
    check(WITH, vec![Connected], "replay:0", Replaying);
    check(WITH, vec![Connected, ReplayDone], "replay:0", Live);
    check(WITH, vec![Connected, ReplayDone, live(0, 0)], "replay:0 0", Live);
    let warm = vec![Connected, again(0, 0), again(0, 1), ReplayDone, live(0, 2)];
    check(WITH, warm, "replay:0 0 1 2", Live);
}

#[test]
fn a_late_start_is_replayed_or_suspect() {
    check(WITHOUT, vec![live(0, 7), live(0, 8)], "7 8", Suspect(Why::LateStart));
    let replayed = vec![live(0, 2), again(0, 0), again(0, 1), again(0, 2), live(0, 3), ReplayDone];
    check(WITH, replayed, "replay:0 0 1 2 3", Live);
    // The buffer begins too late: useful, not complete, and not worth asking again.
    let short = vec![live(0, 7), again(0, 5), again(0, 6), again(0, 7), ReplayDone, Tick];
    check(WITH, short, "replay:0 reset 5 6 7", Suspect(Why::ReplayIncomplete));
    let empty = vec![live(0, 7), ReplayDone, live(0, 8), Tick];
    check(WITH, empty, "replay:0 7 8", Suspect(Why::ReplayIncomplete));
    let failed = vec![live(0, 7), ReplayFailed, live(0, 8)];
    check(WITH, failed, "replay:0 7 8", Suspect(Why::LateStart));
    let healed = vec![live(0, 1), ReplayFailed, Tick, again(0, 0), again(0, 1), ReplayDone];
    check(WITH, healed, "replay:0 1 replay:0 reset 0 1", Live);
}

#[test]
fn duplicates_are_dropped_and_lower_numbers_are_restarts() {
    for limits in [WITH, WITHOUT] {
        let twice = vec![live(0, 0), live(0, 0), live(0, 1), live(0, 0), live(0, 1)];
        check(limits, twice, "0 1", Live);
        let restarted = vec![live(0, 0), live(0, 1), live(1, 0), live(1, 1)];
        check(limits, restarted, "0 1 reset 1000 1001", Live);
        // The new engine's first batch that arrives has the number of the old one's last.
        let same = vec![live(0, 0), live(1, 0)];
        check(limits, same, "0 reset 1000", Live);
    }
    let late = vec![live(0, 0), live(0, 1), live(0, 2), live(1, 1)];
    check(WITHOUT, late, "0 1 2 reset 1001", Suspect(Why::LateStart));
    let late = vec![live(0, 0), live(0, 1), live(0, 2), live(1, 1), again(1, 0), ReplayDone];
    check(WITH, late, "0 1 2 reset replay:0 1000 1001", Live);
}

#[test]
fn a_gap_is_replayed_or_voids() {
    let gap = || vec![live(0, 0), live(0, 3), live(0, 4)];
    check(WITHOUT, gap(), "0 reset 3 4", Suspect(Why::Gap));
    check(WITH, gap(), "0 replay:0", Replaying);
    let with = |more: Vec<StreamInput>| gap().into_iter().chain(more).collect::<Vec<_>>();
    let good = with(vec![again(0, 0), again(0, 1), again(0, 2), again(0, 3), ReplayDone]);
    check(WITH, good, "0 replay:0 1 2 3 4", Live);
    // The engine has not our last batch any more: what lies between may be lost.
    let cut = with(vec![again(0, 2), again(0, 3), ReplayDone]);
    check(WITH, cut, "0 replay:0 reset 2 3 4", Suspect(Why::ReplayIncomplete));
    let hole = with(vec![again(0, 0), again(0, 2), ReplayDone]);
    check(WITH, hole, "0 replay:0 reset 2 3 4", Suspect(Why::ReplayIncomplete));
    let backward = with(vec![again(0, 0), again(0, 1), again(0, 0), again(0, 2), ReplayDone]);
    check(WITH, backward, "0 replay:0 1 2 3 4", Live);
    // Nothing new came, though more was published: it will not come.
    let nothing = with(vec![again(0, 0), ReplayDone]);
    check(WITH, nothing, "0 replay:0 reset 3 4", Suspect(Why::Gap));
    let part = with(vec![again(0, 0), again(0, 1), ReplayDone]);
    check(WITH, part, "0 replay:0 1 replay:1", Replaying);
    let failed = with(vec![again(0, 0), again(0, 1), ReplayFailed]);
    check(WITH, failed, "0 replay:0 1 reset 3 4", Suspect(Why::Gap));
}

#[test]
fn after_a_failed_replay_there_is_a_rest_and_then_a_cure() {
    let failed = || vec![live(0, 0), live(0, 2), ReplayFailed, live(0, 4)];
    check(WITH, failed(), "0 replay:0 reset 2 reset 4", Suspect(Why::Gap));
    let all = [Tick, again(0, 0), again(0, 1), again(0, 2), again(0, 3), again(0, 4), ReplayDone];
    let cured = failed().into_iter().chain(all).collect();
    check(WITH, cured, "0 replay:0 reset 2 reset 4 replay:0 reset 0 1 2 3 4", Live);
    // No tick brings a replay where there is no socket.
    let without = vec![live(0, 0), live(0, 2), Tick];
    check(WITHOUT, without, "0 reset 2", Suspect(Why::Gap));
}

#[test]
fn a_clear_ends_every_doubt() {
    let gap = vec![live(0, 0), live(0, 2), cleared(3), live(0, 4)];
    check(WITHOUT, gap, "0 reset 2 3 4", Live);
    let late = vec![live(0, 5), cleared(6)];
    check(WITHOUT, late, "5 6", Live);
    let short = vec![live(0, 7), again(0, 6), again(0, 7), ReplayDone, cleared(8)];
    check(WITH, short, "replay:0 reset 6 7 8", Live);
}

#[test]
fn events_that_cannot_be_read_make_suspect() {
    let bad = || vec![live(0, 0), garbled(1), live(0, 2)];
    check(WITHOUT, bad(), "0 1 2", Suspect(Why::BadEvents));
    let cured = vec![Tick, again(0, 0), again(0, 1), again(0, 2), ReplayDone];
    let cured = bad().into_iter().chain(cured).collect();
    check(WITH, cured, "0 1 2 replay:0 reset 0 1 2", Live);
    // The engine itself sends what cannot be read: asking once is enough.
    let Batch { seq, batch } = garbled(1) else { unreachable!() };
    let same = vec![Tick, again(0, 0), ReplayBatch { seq, batch }, again(0, 2), ReplayDone, Tick];
    let same = bad().into_iter().chain(same).collect();
    check(WITH, same, "0 1 2 replay:0 reset 0 1 2", Suspect(Why::BadEvents));
}

#[test]
fn a_lost_connection_keeps_knowledge_until_the_next_batch_tells() {
    let lost = || vec![live(0, 0), live(0, 1), Lost];
    let with = |more: Vec<StreamInput>| lost().into_iter().chain(more).collect::<Vec<_>>();
    check(WITHOUT, lost(), "0 1", Suspect(Why::Lost));
    check(WITHOUT, with(vec![Connected]), "0 1", Suspect(Why::Lost));
    check(WITHOUT, with(vec![Connected, live(0, 2)]), "0 1 2", Live);
    check(WITHOUT, with(vec![Connected, live(0, 3)]), "0 1 reset 3", Suspect(Why::Gap));
    check(WITHOUT, with(vec![Connected, live(1, 0)]), "0 1 reset 1000", Live);
    check(WITHOUT, vec![Lost, Connected, live(0, 0)], "0", Live);
    // With a replay socket the last batch is compared: it tells at once.
    let same = with(vec![Connected, again(0, 1), again(0, 2), live(0, 3), ReplayDone]);
    check(WITH, same, "0 1 replay:1 2 3", Live);
    let chance = vec![Connected, live(1, 2), again(1, 1), again(1, 2), ReplayDone];
    let chance: Vec<_> = with(chance);
    check(WITH, chance.clone(), "0 1 replay:1 reset replay:0", Replaying);
    let all = [again(1, 0), again(1, 1), again(1, 2), ReplayDone];
    let all = chance.into_iter().chain(all).collect();
    check(WITH, all, "0 1 replay:1 reset replay:0 1000 1001 1002", Live);
    let gone = with(vec![Connected, ReplayDone, ReplayDone]);
    check(WITH, gone, "0 1 replay:1 reset replay:0", Live);
    // The comparison failed: the number fits, but that may be chance.
    let unproven = with(vec![Connected, ReplayFailed, live(0, 2)]);
    check(WITH, unproven.clone(), "0 1 replay:1 2", Suspect(Why::Lost));
    let proven = [Tick, again(0, 0), again(0, 1), again(0, 2), ReplayDone];
    let proven = unproven.into_iter().chain(proven).collect();
    check(WITH, proven, "0 1 replay:1 2 replay:0 reset 0 1 2", Live);
}

#[test]
fn an_engine_that_restarts_during_a_replay_starts_over() {
    let gap = || vec![live(0, 0), live(0, 3)];
    let with = |more: Vec<StreamInput>| gap().into_iter().chain(more).collect::<Vec<_>>();
    let seen = with(vec![again(0, 0), live(1, 0), again(0, 1), live(1, 1), ReplayDone]);
    check(WITH, seen, "0 replay:0 reset 1000 1001", Live);
    let failed = with(vec![live(1, 0), ReplayFailed]);
    check(WITH, failed, "0 replay:0 reset 1000", Live);
    let late = with(vec![live(1, 1), ReplayDone, again(1, 0), again(1, 1), ReplayDone]);
    check(WITH, late, "0 replay:0 reset replay:0 1000 1001", Live);
    let lost = with(vec![again(0, 0), Lost, Connected, again(0, 1), ReplayDone]);
    check(WITH, lost, "0 replay:0 reset replay:0", Replaying);
    let lost_and_failed = with(vec![Lost, ReplayFailed]);
    check(WITH, lost_and_failed, "0 replay:0 reset", Suspect(Why::LateStart));
}

#[test]
fn too_many_held_batches_are_asked_for_again() {
    let script = || {
        let mut script = vec![live(0, 0)];
        script.extend((2..8).map(|seq| live(0, seq)));
        script.extend([again(0, 0), again(0, 1), again(0, 2), ReplayDone]);
        script
    };
    // 2, 3, 4 are held, 5 to 7 dropped.
    check(WITH, script(), "0 replay:0 1 2 3 4 replay:4", Replaying);
    let with = |more: Vec<StreamInput>| script().into_iter().chain(more).collect::<Vec<_>>();
    let rest = (4..8).map(|seq| again(0, seq)).chain([ReplayDone]).collect();
    check(WITH, with(rest), "0 replay:0 1 2 3 4 replay:4 5 6 7", Live);
    let failed = "0 replay:0 1 2 3 4 replay:4 reset";
    check(WITH, with(vec![ReplayFailed]), failed, Suspect(Why::HeldOverflow));
    let nothing = "0 replay:0 1 2 3 4 replay:4";
    let script = with(vec![again(0, 4), ReplayDone]);
    check(WITH, script, nothing, Suspect(Why::ReplayIncomplete));
}

#[test]
fn drift_asks_for_everything_and_agreement_ends_it() {
    let drift = || vec![live(0, 0), live(0, 1), Drift];
    check(WITHOUT, drift(), "0 1", Suspect(Why::Drift));
    let agrees = drift().into_iter().chain([Agrees]).collect();
    check(WITHOUT, agrees, "0 1", Live);
    check(WITHOUT, vec![Drift, Agrees], "", Initial);
    let all = [again(0, 0), again(0, 1), ReplayDone];
    let replayed = drift().into_iter().chain(all).collect();
    check(WITH, replayed, "0 1 replay:0 reset 0 1", Live);
    // It came out shorter than what had been seen: not the whole truth.
    let shorter = [again(0, 0), ReplayDone];
    let short = drift().into_iter().chain(shorter).collect();
    check(WITH, short, "0 1 replay:0 reset 0", Suspect(Why::ReplayIncomplete));
}

#[test]
fn a_late_batch_of_an_engine_that_is_gone_does_not_go_on_the_replay_of_the_next() {
    let script = || {
        let mut script = vec![live(1, 0), live(1, 1), Lost, Connected];
        script.extend([again(2, 0), again(2, 1), ReplayDone, again(2, 0), again(2, 1)]);
        script.extend([ReplayDone, live(1, 2)]);
        script
    };
    let log = "1000 1001 replay:1 reset replay:0 2000 2001";
    check(WITH, script(), log, Live);
    let next = script().into_iter().chain([live(2, 2)]).collect();
    check(WITH, next, &format!("{log} 2002"), Live);
}

#[test]
fn the_replay_of_one_engine_and_live_batches_of_the_next_do_not_mix() {
    let script = vec![Connected, live(2, 0), again(1, 0), again(1, 1), ReplayDone];
    check(WITH, script, "replay:0 1000 1001 reset replay:0", Replaying);
}

#[test]
fn inputs_that_make_no_sense_do_nothing() {
    let stray = vec![again(0, 4), ReplayDone, ReplayFailed, Tick, Agrees, Lost, Drift];
    check(WITH, stray, "", Initial);
    let edge = vec![live(0, 0), live(0, u64::MAX), again(0, 0), again(0, u64::MAX), ReplayDone];
    check(WITH, edge, "0 replay:0 reset 18446744073709552000", Suspect(Why::ReplayIncomplete));
    let huge = vec![live(0, u64::MAX), live(0, u64::MAX), live(1, 0)];
    check(WITHOUT, huge, "18446744073709552000 reset 1000", Live);
}

#[test]
fn everything_is_counted() {
    let mut stream = Stream::new(WITH);
    let script = vec![
        live(0, 0),
        live(0, 0),
        live(0, 4),
        again(0, 0),
        again(0, 1),
        ReplayFailed,
        live(1, 0),
        Batch { seq: 1, batch: EventBatch { events_bad: 1, ..batch(1, 1) } },
        Lost,
        again(0, 9),
    ];
    for input in script {
        let _ = stream.on(Time::ZERO, input, &mut |_| {});
    }
    let want = StreamCounters {
        batches: 5,
        applied: 5,
        replayed: 1,
        duplicates: 1,
        gaps: 2,
        missed: 5,
        restarts: 1,
        resets: 2,
        replays: 1,
        replays_failed: 1,
        replays_incomplete: 0,
        held_dropped: 0,
        events_bad: 1,
        lost: 1,
        stray: 1,
    };
    assert_eq!(*stream.counters(), want);
}
