//! Hundreds of runs in which everything fails at random; see `kvroute_lab::chaos`.
//!
//! A failure prints the seed, what broke, the events before it and the command that repeats the
//! run: `kvroute sim --fault-seed N`, or
//! `KVROUTE_FAULT_SEED=N cargo test -p kvroute-lab --test chaos one_seed -- --nocapture`.
//! A seed that found a fault stays here, in `seeds_that_found_something`.

use std::collections::BTreeMap;

use kvroute_lab::chaos::{self, ChaosReport, STEPS, Sabotage};

/// Seeds of each of the scanning tests, which run side by side.
const SEEDS_PER_TEST: u64 = 100;

fn run(seed: u64) -> ChaosReport {
    chaos::run(seed, STEPS, false).unwrap_or_else(|failure| panic!("{failure}"))
}

/// What runs did, added up.
#[derive(Default)]
struct Sums {
    plans: BTreeMap<&'static str, u64>,
    counts: BTreeMap<String, u64>,
    compared_exactly: u64,
}

impl Sums {
    fn add(&mut self, report: ChaosReport) {
        *self.plans.entry(report.plan).or_insert(0) += 1;
        self.compared_exactly += report.compared_exactly;
        let named = report.outcomes.into_iter().chain(report.faults);
        let named = named.map(|(name, count)| (name.to_owned(), count)).chain(report.seen);
        for (name, count) in named {
            *self.counts.entry(name).or_insert(0) += count;
        }
    }

    /// Runs in which nothing happens show nothing.
    fn assert_eventful(&self) {
        assert_eq!(self.plans.len(), 8, "not every plan was drawn: {:?}", self.plans);
        assert!(self.compared_exactly > 5_000, "{} comparisons", self.compared_exactly);
        for (name, least) in EVENTFUL {
            let count = self.counts.get(name).copied().unwrap_or(0);
            assert!(count >= least, "{name}: {count} times: {:#?}", self.counts);
        }
    }
}

/// What happens at least so often in each scanning test.
const EVENTFUL: [(&str, u64); 54] = [
    ("answered", 1_500),
    ("failed", 300),
    ("aborted", 100),
    ("rejected", 200),
    ("aborted before", 80),
    ("aborted in the answer", 30),
    ("answers cut short", 50),
    ("timeouts", 30),
    ("retries", 120),
    ("redirects", 120),
    ("rejected: in flight", 200),
    ("rejected: no endpoints", 8),
    ("tickets expired", 100),
    ("drifts", 4),
    ("resets refused", 12),
    ("resident blocks driven out", 30),
    ("reset through the router done", 5),
    ("reset refused", 10),
    ("live", 1_500),
    ("replaying", 500),
    ("late_start", 200),
    ("gap", 500),
    ("replay_incomplete", 200),
    ("held_overflow", 1),
    ("drift", 200),
    ("lost", 40),
    ("in doubt at the end", 20),
    ("right at the end", 100),
    ("right at the end, in part", 12),
    ("batch lost", 10),
    ("batch repeated", 10),
    ("batch after reconnect", 2),
    ("batch unreadable", 10),
    ("batches lost", 10),
    ("link delayed", 10),
    ("link partitioned", 10),
    ("link broken", 10),
    ("replays refused", 10),
    ("replays truncated", 10),
    ("replays slow", 10),
    ("replay buffer emptied", 10),
    ("engine crashed", 10),
    ("engine restarted behind its connection", 10),
    ("cache reset through the router", 10),
    ("cache reset beside the router", 10),
    ("endpoint removed", 10),
    ("endpoint replaced", 10),
    ("metrics partitioned", 10),
    ("metrics stale", 10),
    ("engine unreachable", 10),
    ("engine slow", 10),
    ("ticks late", 10),
    ("clock jumped", 2),
    ("word about an endpoint that is gone", 10),
];

fn scan(part: u64) {
    let mut sums = Sums::default();
    for seed in part * SEEDS_PER_TEST..(part + 1) * SEEDS_PER_TEST {
        sums.add(run(seed));
    }
    sums.assert_eventful();
}

#[test]
fn faults_at_random_first_part() {
    scan(0);
}

#[test]
fn faults_at_random_second_part() {
    scan(1);
}

#[test]
fn faults_at_random_third_part() {
    scan(2);
}

#[test]
fn faults_at_random_fourth_part() {
    scan(3);
}

/// Each found a fault of the core once. What a seed draws changes with the simulation, so the core
/// has a test of its own for each fault.
#[test]
fn seeds_that_found_something() {
    const RESET: &str = "a refused cache reset was forgotten when a replay filled a gap";
    const ROOM: &str = "an endpoint that joined a full index exceeded its budget";
    for (seed, found) in [(442, RESET), (461, RESET), (1683, RESET), (692, ROOM), (1252, ROOM)] {
        let failure = chaos::run(seed, STEPS, false).err();
        assert!(failure.is_none(), "{found}, again? {}", failure.unwrap());
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..12 {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
    assert_ne!(run(1).digest, run(2).digest);
}

#[test]
fn a_trace_changes_nothing_and_tells_everything() {
    let traced = chaos::run(3, STEPS, true).unwrap();
    assert!(traced.trace.len() > STEPS as usize / 2, "{} lines", traced.trace.len());
    assert_eq!(ChaosReport { trace: Vec::new(), ..traced }, run(3));
}

/// What is broken on purpose is found within a few seeds, by the check that is meant for it.
#[test]
fn every_sabotage_is_caught() {
    let claims = "a live endpoint claims what its engine told";
    for (sabotage, invariant) in [
        (Sabotage::HiddenLoss, claims),
        (Sabotage::EmptiedBatch, claims),
        (Sabotage::EndUnreported, "reservations are the requests in flight"),
        (Sabotage::AnsweredTwice, "a request ends once"),
        (Sabotage::RequestLost, "no request is lost"),
        (Sabotage::EndpointKept, "an endpoint that has left leaves nothing"),
        (Sabotage::DecisionUncounted, "reservations are the requests in flight"),
        (Sabotage::SilentEviction, "an engine's events tell what its cache holds"),
    ] {
        let broken = |seed| chaos::run_sabotaged(seed, STEPS, false, Some(sabotage)).err();
        let failure = (0..12).find_map(broken);
        let failure = failure.unwrap_or_else(|| panic!("{sabotage:?} was not caught"));
        assert_eq!(failure.invariant, invariant, "{sabotage:?}: {failure}");
        let (text, seed) = (failure.to_string(), failure.seed);
        assert!(text.contains(&format!("kvroute sim --fault-seed {seed}")), "{text}");
        assert!(!failure.recent.is_empty(), "{text}");
    }
}

/// Repeats the run of `KVROUTE_FAULT_SEED`, with every event, if that is set.
#[test]
fn one_seed() {
    let Ok(seed) = std::env::var("KVROUTE_FAULT_SEED") else { return };
    let seed = seed.parse().expect("KVROUTE_FAULT_SEED is a number");
    match chaos::run(seed, STEPS, true) {
        Ok(report) => println!("{}\n{report:#?}", report.trace.join("\n")),
        Err(failure) => panic!("{failure}"),
    }
}
