//! Hundreds of runs in which everything fails at random; see `kvroute_lab::chaos`.

use kvroute_lab::chaos;

#[test]
fn scan() {
    let from: u64 = std::env::var("FROM").map_or(0, |s| s.parse().unwrap());
    let count: u64 = std::env::var("COUNT").map_or(50, |s| s.parse().unwrap());
    let full = std::env::var("FULL").is_ok();
    let started = std::time::Instant::now();
    let mut by: std::collections::BTreeMap<String, Vec<u64>> = Default::default();
    for seed in from..from + count {
        if let Err(failure) = chaos::run(seed, chaos::STEPS, full) {
            by.entry(failure.invariant.to_owned()).or_default().push(seed);
            if full || by.values().map(|v| v.len()).sum::<usize>() <= 2 {
                println!("{failure}\n");
            }
        }
    }
    println!("{by:?} in {:?}", started.elapsed());
}

#[test]
fn coverage() {
    use std::collections::BTreeMap;
    let (mut plans, mut outcomes, mut faults, mut seen) =
        (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let (mut exact, mut steps, mut ms) = (0, 0, 0);
    for seed in 0..60 {
        let Ok(r) = chaos::run(seed, chaos::STEPS, false) else { continue };
        *plans.entry(r.plan).or_insert(0) += 1;
        for (k, v) in r.outcomes {
            *outcomes.entry(k).or_insert(0) += v;
        }
        for (k, v) in r.faults {
            *faults.entry(k).or_insert(0) += v;
        }
        for (k, v) in r.seen {
            *seen.entry(k).or_insert(0) += v;
        }
        exact += r.compared_exactly;
        steps += r.steps;
        ms += r.virtual_ms;
    }
    println!("{plans:#?} {outcomes:#?} {faults:#?} {seen:#?} {exact} {steps} {ms}");
}

#[test]
fn sabotage() {
    for sabotage in chaos::Sabotage::ALL {
        let found = (0..40)
            .find_map(|seed| chaos::run_sabotaged(seed, chaos::STEPS, false, Some(sabotage)).err());
        println!("{sabotage:?}: {:?}", found.map(|f| (f.seed, f.step, f.invariant)));
    }
}
#[test]
fn list() {
    for seed in
        std::env::var("SEEDS").unwrap_or_default().split(',').filter_map(|s| s.trim().parse().ok())
    {
        match chaos::run(seed, chaos::STEPS, false) {
            Ok(_) => println!("{seed} ok"),
            Err(f) => println!(
                "{seed} {} step {} {}: {} ",
                f.plan,
                f.step,
                f.invariant,
                &f.detail[..f.detail.len().min(150)]
            ),
        }
    }
}
