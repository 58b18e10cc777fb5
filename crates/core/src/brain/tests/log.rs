//! Same seed and same trace: same bytes.

use super::*;

/// A trace of requests, events, answers, failures and churn, and the log of its decisions. The
/// endpoints are found in the order of `names`; which of them does what goes by name.
fn run(seed: u64, names: &[&str]) -> String {
    let mut host = Host::new(Plan::precise(), &[]);
    host.brain = Brain::new(Plan::precise(), seed);
    let mut ids = BTreeMap::new();
    for name in names {
        let id = host.brain.add_endpoint(host.now, spec(name)).unwrap();
        ids.insert(name.to_string(), id);
    }
    let mut by_name: Vec<EndpointId> = ids.into_values().collect();
    let mut trace = Rng::seeded(7);
    let mut log = String::new();
    let mut open: Vec<(Decision, u32, usize)> = Vec::new();
    for step in 0..300 {
        host.pass(0.01);
        let group = trace.below(12) as u32 + 1;
        let tokens = prompt(group, 64 + trace.below(20) * BLOCK);
        match trace.below(8) {
            0 => host.metrics(by_name[trace.below(by_name.len())], step % 5, 0.3),
            1 if step == 150 || step == 151 => {
                let gone = by_name.remove(1);
                host.brain.remove_endpoint(host.now, gone);
            }
            1 => host.brain.on_endpoint_failed(host.now, by_name[trace.below(by_name.len())]),
            2 | 3 if !open.is_empty() => {
                let (decision, group, length) = open.swap_remove(trace.below(open.len()));
                if host.brain.fleet().get(decision.endpoint).is_some() {
                    host.hold(decision.endpoint, &prompt(group, length));
                }
                let cached = decision.record.chosen_tokens;
                host.answer(&decision, length as u32, cached);
            }
            _ => {
                let decision = host.ask(&tokens);
                log += &serde_json::to_string(&decision.record).unwrap();
                log.push('\n');
                open.push((decision, group, tokens.len()));
            }
        }
    }
    log
}

#[test]
fn the_log_is_a_function_of_seed_and_trace() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let log = run(5, &names);
    assert!(log.lines().count() > 100);
    assert_eq!(log, run(5, &names));
    assert_ne!(log, run(6, &names));
}

#[test]
fn the_order_in_which_endpoints_are_found_decides_nothing() {
    let mut names = ["a", "b", "c", "d", "e", "f"];
    let log = run(5, &names);
    for seed in 0..5 {
        Rng::seeded(seed).shuffle(&mut names);
        assert_eq!(log, run(5, &names), "{names:?}");
    }
}

#[test]
fn a_record_reads_as_an_explanation() {
    let mut host = Host::live(2);
    let tokens = prompt(1, 4 * BLOCK + 1);
    host.hold(host.ids[1], &tokens);
    let record = host.ask(&tokens).record;
    let json: serde_json::Value = serde_json::to_value(&record).unwrap();
    assert_eq!(json["endpoint"], "e1");
    assert_eq!(json["mode"], "precise");
    assert_eq!(json["reason"], "events-live");
    assert_eq!(json["candidates"][1]["stream"], "live");
    assert_eq!(json["candidates"][1]["hit"]["by_tier"]["gpu"], 4);
    let cell = &json["scores"][1]["scores"][0];
    assert_eq!(cell["scorer"], "prefix-cache-scorer");
    assert_eq!((cell["raw"].as_f64(), cell["weight"].as_f64()), (Some(1.0), Some(3.0)));
    assert_eq!(cell["contribution"].as_f64(), Some(3.0));
    let rows = json["scores"].as_array().unwrap();
    let totals: Vec<f64> = rows.iter().map(|row| row["total"].as_f64().unwrap()).collect();
    let margin = totals[1] - totals[0];
    assert_eq!(json["margin"].as_f64(), Some(margin));
    assert!(record.bytes() > 500);
}
