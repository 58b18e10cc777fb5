//! Who may be chosen at all, and what is left behind.

use super::*;
use crate::config::EndpointPickerConfig;
use crate::decision::NoEndpoints;
use crate::fleet::ServedModel;
use crate::index::IndexUsage;

fn plan(yaml: &str) -> Plan {
    let config: EndpointPickerConfig = serde_saphyr::from_str(yaml).unwrap();
    Plan::build(&config, crate::plan::Experimental::Allowed).unwrap()
}

#[test]
fn a_removed_endpoint_leaves_no_trace() {
    let mut host = Host::live(3);
    let usage = |host: &Host| IndexUsage { bytes: 0, ..host.brain.index().usage() };
    let before = {
        let mut alone = Host::live(3);
        let gone = alone.ids[1];
        alone.brain.remove_endpoint(alone.now, gone);
        usage(&alone)
    };
    let (gone, tokens) = (host.ids[1], prompt(1, 200));
    host.hold(gone, &tokens);
    let decision = host.ask(&tokens);
    assert_eq!(decision.endpoint, gone);
    host.brain.remove_endpoint(host.now, gone);
    assert_eq!(usage(&host), before);
    assert_eq!(host.brain.load(gone), Load::default());
    assert_eq!(host.brain.stream_state(gone), None);
    assert_eq!(host.brain.ledger().account(gone), Default::default());
    // What comes late is about nobody.
    let late = StreamInput::Batch { seq: 2, batch: batch(vec![stored(&tokens, BLOCK)]) };
    assert_eq!(host.brain.on_stream(host.now, gone, late), StreamOrder::None);
    host.metrics(gone, 1, 0.1);
    host.brain.on_endpoint_failed(host.now, gone);
    host.answer(&decision, 200, 192);
    assert_eq!(usage(&host), before);
    let again = host.brain.add_endpoint(host.now, spec("e1")).unwrap();
    assert_eq!(again.slot, gone.slot);
    assert_ne!(again, gone);
    host.metrics(again, 0, 0.0);
    let record = host.ask(&tokens).record;
    assert!(record.candidates.iter().all(|c| c.hit.matched == 0), "{record:?}");
    assert_eq!(host.brain.load(again).requests + host.brain.inflight_requests() as u32, 1);
}

#[test]
fn failing_endpoints_go_last_and_come_back() {
    let mut host = Host::live(2);
    let tokens = prompt(1, 200);
    host.hold(host.ids[0], &tokens);
    host.brain.on_endpoint_failed(host.now, host.ids[0]);
    let decision = host.ask(&tokens);
    assert_eq!(decision.endpoint, host.ids[1]);
    assert_eq!(decision.fallback[..], [host.ids[0]], "better than none when the other fails, too");
    assert_eq!(decision.record.available_tokens, 192);
    host.brain.on_response(host.now, decision.ticket, ResponseEvent::Aborted);
    let by = decision.record.candidates[0].removed_by.as_ref();
    assert_eq!(by.map(Name::as_str), Some("kvroute:failing"));
    assert_eq!(host.brain.counters().avoided_failing, 1);
    host.brain.on_endpoint_failed(host.now, host.ids[1]);
    assert_eq!(host.ask(&prompt(2, 200)).record.filters, []);
    host.pass(0.6);
    assert_eq!(host.ask(&tokens).endpoint, host.ids[0]);
}

#[test]
fn a_model_goes_to_those_that_may_serve_it() {
    let mut host = Host::live(3);
    let served = |id: &str| vec![ServedModel { id: id.into(), parent: None }];
    host.brain.on_models(host.ids[0], served("model"));
    host.brain.on_models(host.ids[1], served("other"));
    let mut chosen = BTreeMap::new();
    for group in 1..20 {
        *chosen.entry(host.ask(&prompt(group, 100)).endpoint).or_insert(0) += 1;
    }
    // The third has not been asked what it serves.
    assert_eq!(chosen.into_keys().collect::<Vec<_>>(), [host.ids[0], host.ids[2]]);
    let unknown = host.try_ask(&prompt(1, 100), |r| r.model = "nobody's").unwrap();
    assert_eq!(unknown.record.filters, []);
}

#[test]
fn rejections_name_their_reason() {
    let mut host = Host::new(Plan::precise(), &[]);
    let empty = host.try_ask(&prompt(1, 10), |_| {}).unwrap_err();
    assert_eq!(empty, Reject::NoEndpoints { why: NoEndpoints::EmptyFleet });
    assert_eq!((empty.status(), empty.dropped_reason()), (503, "rejected-no-endpoints"));
    let mut host = Host::live(1);
    let none = host.try_ask(&prompt(1, 10), |r| r.allowed = Some(&[])).unwrap_err();
    assert_eq!(none, Reject::NoEndpoints { why: NoEndpoints::NoneAllowed });

    let mut host = Host::new(plan("plugins: [{type: prefill-filter}]"), &["a", "b"]);
    let drained = host.try_ask(&prompt(1, 10), |_| {}).unwrap_err();
    assert_eq!((drained.status(), drained.dropped_reason()), (429, "rejected-saturated"));
    assert_eq!(drained.to_string(), "filter \"prefill-filter\" left no endpoint of 2; retry later");

    let mut host = Host::new(plan("kvroute: {inflight_requests_max: 1}"), &["a"]);
    let first = host.ask(&prompt(1, 10));
    let full = host.try_ask(&prompt(1, 10), |_| {}).unwrap_err();
    assert_eq!(full, Reject::TooManyInFlight { requests_max: 1 });
    host.brain.on_response(host.now, first.ticket, ResponseEvent::Aborted);
    host.ask(&prompt(1, 10));
    assert_eq!(host.brain.counters().rejected_in_flight, 1);
}

#[test]
fn forgotten_tickets_give_everything_back() {
    let yaml = "{plugins: [{type: precise-prefix-cache-scorer, parameters: {speculativeIndexing: \
                true}}], kvroute: {inflight_age_max_s: 10}}";
    let mut host = Host::new(plan(yaml), &["a"]);
    host.say(host.ids[0], Vec::new());
    let decision = host.ask(&prompt(1, 100));
    assert_eq!(host.brain.index().usage().speculations, 1);
    host.pass(9.0);
    assert_eq!(host.brain.inflight_requests(), 1);
    host.pass(2.0);
    assert_eq!(host.brain.inflight_requests(), 0);
    assert_eq!(host.brain.load(host.ids[0]), Load::default());
    assert_eq!(host.brain.index().usage().speculations, 0);
    assert_eq!(host.brain.counters().tickets_expired, 1);
    host.answer(&decision, 100, 0);
    assert_eq!(host.brain.ledger().total().reported.requests, 0);
}

#[test]
fn endpoints_without_fresh_metrics_lose_against_others() {
    let mut host = Host::live(2);
    host.pass(2.5);
    host.metrics(host.ids[1], 3, 0.9);
    let decision = host.ask(&prompt(1, 100));
    assert_eq!(decision.endpoint, host.ids[1]);
    let stale = &decision.record.candidates[0].load;
    assert_eq!((stale.waiting, stale.metrics_age_s), (None, Some(2.5)));
    assert_eq!(host.brain.counters().scores_missing, 2);
}

#[test]
fn approximate_knowledge_needs_no_events_and_is_contiguous() {
    let mut host = Host::new(plan("plugins: [{type: prefix-cache-scorer}]"), &["a", "b", "c"]);
    let tokens = prompt(1, 1000);
    let first = host.ask(&tokens);
    assert_eq!(first.record.reason, Reason::HistoryConfigured);
    assert_eq!(first.record.candidates[0].hit.blocks, 16);
    let second = host.ask(&tokens);
    assert_eq!(second.endpoint, first.endpoint);
    assert_eq!(second.record.chosen_tokens, 960);
    // The same tail after another start is no hit.
    let other = [prompt(2, 64), tokens[64..].to_vec()].concat();
    assert_eq!(host.ask(&other).record.available_tokens, 0);
    let round = Host::new(Plan::baseline_round_robin(), &["a"]).ask(&tokens);
    assert_eq!(round.record.reason, Reason::NotConfigured);
}

#[test]
fn round_robin_goes_round_whatever_is_known() {
    let mut host = Host::new(Plan::baseline_round_robin(), &["b", "a", "c"]);
    assert!(host.brain.chain_specs().exact().is_empty());
    let names: Vec<String> =
        (0..4).map(|_| host.ask(&prompt(1, 100)).record.endpoint.to_string()).collect();
    assert_eq!(names, ["a", "b", "c", "a"]);
}

#[test]
fn a_refused_cache_reset_is_made_good() {
    let mut host = Host::live(1);
    let (id, tokens) = (host.ids[0], prompt(1, 10 * BLOCK));
    host.hold(id, &tokens);
    host.brain.on_cache_reset(host.now, id);
    assert_eq!(host.brain.index().endpoint_usage(id).resident, 0);
    // The engine did not clear anything: its next batch does not say so. Without a replay socket
    // its events are in doubt from then on, and the mode says it.
    host.say(id, vec![stored(&prompt(2, BLOCK), BLOCK)]);
    assert_eq!(host.brain.counters().resets_refused, 1);
    assert_ne!(host.ask(&tokens).record.mode, Mode::Precise);
    // A reset that did happen leaves no doubt.
    let mut host = Host::live(1);
    host.brain.on_cache_reset(host.now, host.ids[0]);
    host.say(host.ids[0], vec![KvEvent::Cleared, stored(&tokens, BLOCK)]);
    assert_eq!(host.brain.counters().resets_refused, 0);
    assert_eq!(host.ask(&tokens).record.mode, Mode::Precise);
}

#[test]
fn a_refused_cache_reset_is_made_good_after_a_replay_that_began_later() {
    let mut host = Host::new(Plan::precise(), &[]);
    let with_replay = EndpointSpec { replay_available: true, ..spec("a") };
    let id = host.brain.add_endpoint(host.now, with_replay).unwrap();
    let (old, new) = (prompt(1, 10 * BLOCK), prompt(2, 10 * BLOCK));
    host.hold(id, &old);
    // The reset is refused while a gap is open, and the replay begins after what was forgotten.
    let gap = StreamInput::Batch { seq: 2, batch: batch(Vec::new()) };
    assert_eq!(host.brain.on_stream(host.now, id, gap), StreamOrder::Replay { from: 0 });
    host.brain.on_cache_reset(host.now, id);
    for (seq, events) in [(0, vec![stored(&old, BLOCK)]), (1, vec![stored(&new, BLOCK)])] {
        let input = StreamInput::ReplayBatch { seq, batch: batch(events) };
        assert_eq!(host.brain.on_stream(host.now, id, input), StreamOrder::None);
    }
    let order = host.brain.on_stream(host.now, id, StreamInput::ReplayDone);
    assert_eq!(order, StreamOrder::Replay { from: 0 });
    assert_eq!(host.brain.counters().resets_refused, 1);
    assert_ne!(host.brain.stream_state(id), Some(StreamState::Live));
}

#[test]
fn a_batch_that_comes_twice_does_not_refuse_a_cache_reset() {
    let mut host = Host::live(1);
    let id = host.ids[0];
    host.hold(id, &prompt(1, 10 * BLOCK));
    host.brain.on_cache_reset(host.now, id);
    host.seqs.insert(id, 1);
    host.hold(id, &prompt(1, 10 * BLOCK));
    host.say(id, vec![KvEvent::Cleared]);
    assert_eq!(host.brain.counters().resets_refused, 0);
    assert_eq!(host.brain.stream_state(id), Some(StreamState::Live));
}

#[test]
fn what_an_engine_cannot_deliver_is_not_promised() {
    let tokens = prompt(1, 10 * BLOCK);
    let misses = |change: fn(&mut Request<'_>)| {
        let mut host = Host::live(1);
        host.hold(host.ids[0], &tokens);
        for _ in 0..8 {
            let decision = host.try_ask(&tokens, change).unwrap();
            host.answer(&decision, tokens.len() as u32, 0);
        }
        let verdicts = host.brain.ledger().total().verdicts;
        (verdicts.below > 0, verdicts.drifts > 0)
    };
    assert_eq!(misses(|_| {}), (true, true));
    assert_eq!(misses(|request| request.skips_cache = true), (false, false));
}

#[test]
fn another_tokenizer_in_the_engine_shows_and_history_routes() {
    let mut host = Host::live(1);
    let (tokens, ours) = (prompt(1, 10 * BLOCK), 10 * BLOCK as u32);
    for _ in 0..3 {
        let decision = host.ask(&tokens);
        assert_eq!(decision.record.mode, Mode::Precise);
        host.answer(&decision, ours + 7, 0);
        host.pass(1.0);
    }
    let decision = host.ask(&tokens);
    assert_eq!(decision.record.reason, Reason::PromptDiffers);
    assert_eq!(decision.record.candidates[0].hit.matched, 10, "history");
    // One right count, and the events are believed again.
    host.answer(&decision, ours, 0);
    assert_eq!(host.ask(&tokens).record.reason, Reason::EventsLive);
}
