//! A live router's decisions, recorded and replayed through the core.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use kvroute::recording::{Report, main, replay};
use kvroute_core::blocks::{ChainSpec, PromptExtras, Root, chain};
use kvroute_core::brain::Brain;
use kvroute_core::decision::{Headers, PromptChains, Request, ResponseEvent, TokensKnown};
use kvroute_core::fleet::{EndpointSpec, EngineMetrics};
use kvroute_core::journal::{End, EndReason, Entry, FORMAT, Header};
use kvroute_core::plan::{Experimental, Plan};
use kvroute_core::{Rng, Time};
use kvroute_lab::engine;
use kvroute_router::{Record, RouterHandle};
use serde_json::Value;
use support::*;
use tokio::task::JoinSet;

fn scratch(name: &str) -> PathBuf {
    let file = std::env::temp_dir().join(format!("kvroute-rec-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&file);
    file
}

/// What a recording without a configuration is replayed under.
fn builtin() -> Plan {
    kvroute::config::load(None, Experimental::Refused).unwrap()
}

fn recorded_to(file: &std::path::Path) -> Option<Record> {
    Some(Record { file: file.to_owned() })
}

/// So many requests at once, to be waited for.
fn burst(router: &RouterHandle, count: usize, seed: u64) -> JoinSet<u16> {
    let (addr, mut rng, mut all) = (router.http_addr(), Rng::seeded(seed), JoinSet::new());
    for _ in 0..count {
        let prompt = prompt(rng.below(9), rng.below(50));
        let body = serde_json::json!({"model": MODEL, "prompt": prompt, "max_tokens": 4});
        all.spawn(
            async move { http(addr, "POST", "/v1/completions", &body.to_string()).await.status },
        );
    }
    all
}

fn decided(router: &RouterHandle) -> u64 {
    router.brain().counters().decisions.iter().sum()
}

/// Events that were lost are asked for at once.
const IMPATIENT: &str = "\nkvroute: {replay_cooldown_ms: 1}\n";

/// 240 requests in three bursts; in the second, events are lost and an engine is killed; it comes
/// back for the third. The decisions as `/decisions` has them.
async fn turmoil(file: &std::path::Path) -> Vec<Value> {
    let mut engines = vec![engine().await, engine().await, engine().await];
    let flags: Vec<String> = engines.iter().map(flag).collect();
    let text = include_str!("../../../config/precise.yaml").to_owned() + IMPATIENT;
    let plan = kvroute::config::load_text(&text, "impatient.yaml", Experimental::Refused).unwrap();
    let mut config = config(plan, &flags);
    config.record = Some(Record { file: file.to_owned() });
    config.config = text;
    let router = router(config, &engines).await;
    let calm = burst(&router, 80, 1).join_all().await;
    assert!(calm.iter().all(|status| *status == 200), "{calm:?}");
    engines[1].drop_next_batches(2);
    let storm = burst(&router, 80, 2);
    wait_until("some are decided", || decided(&router) >= 100).await;
    let killed = engines.remove(0);
    let mut again = killed.config().clone();
    killed.kill().await;
    storm.join_all().await;
    again.seed += 1;
    let restarted = engine::serve(again).await.unwrap();
    wait_until("the restarted engine is heard", || *restarted.subscribers().borrow() > 0).await;
    let calm = burst(&router, 80, 3).join_all().await;
    assert!(calm.iter().all(|status| *status == 200), "{calm:?}");
    // More of what the second engine says, so that it is noticed what was lost.
    for question in 0..3 {
        let body = serde_json::json!({"model": MODEL, "prompt": prompt(40 + question, 0)});
        let addr = engines[0].http_addr();
        assert_eq!(http(addr, "POST", "/v1/completions", &body.to_string()).await.status, 200);
    }
    settled(&router, &[&engines[0]]).await;
    assert_eq!(http(router.http_addr(), "POST", "/reset_prefix_cache", "").await.status, 200);
    let live = admin(&router, "/decisions?last=1000").await;
    let live = live.as_array().unwrap();
    let live = live.iter().map(|entry| entry["decision"].clone()).collect();
    assert!(router.shutdown(Duration::from_secs(20)).await);
    live
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_live_decisions_and_their_replay_are_equal_byte_for_byte() {
    let file = scratch("live");
    let live = turmoil(&file).await;
    let text = std::fs::read(&file).unwrap();
    let report = replay(&text[..], None).unwrap();
    let same = report.same.unwrap();
    assert!(same.first_difference.is_none(), "{:#?}", same.first_difference);
    assert_eq!(same.equal, same.decisions);
    assert_eq!(same.decisions, live.len() as u64, "every decision is in the recording");
    assert!(same.decisions >= 241);
    assert_eq!(report.recording.end, Some(EndReason::Complete));
    assert!(report.recording.duration_s > 0.0);
    // The turmoil is in it.
    let all = std::str::from_utf8(&text).unwrap();
    for call in ["on_endpoint_failed", "redirect", "on_cache_reset", "replay_batch", "\"lost\""] {
        assert!(all.contains(call), "{call}");
    }
    // What was recorded is what the router showed.
    let recorded: BTreeMap<String, String> = all
        .lines()
        .filter(|line| line.starts_with("{\"decided\":{\"Ok\""))
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["decided"]["Ok"]["record"].take())
        .map(|record| (record["request_id"].to_string(), record.to_string()))
        .collect();
    for record in live {
        assert_eq!(recorded[&record["request_id"].to_string()], record.to_string());
    }
    // Another plan on the same inputs: the same plan goes nowhere else, a blind one does.
    let other = |plan: Plan| replay(&text[..], Some(plan)).unwrap().other.unwrap();
    let itself = include_str!("../../../config/precise.yaml").to_owned() + IMPATIENT;
    let itself = other(
        kvroute::config::load_text(&itself, "impatient.yaml", Experimental::Refused).unwrap(),
    );
    assert_eq!((itself.elsewhere, itself.decisions), (0, same.decisions));
    assert_eq!(itself.predicted_tokens_now, itself.predicted_tokens_then);
    let blind = other(Plan::baseline_round_robin());
    assert!(blind.elsewhere > 50, "{blind:?}");
    assert_eq!(blind.endpoints.values().map(|both| both.now).sum::<u64>(), blind.decisions);
    std::fs::remove_file(file).unwrap();
}

#[tokio::test]
async fn a_recording_that_reaches_its_limit_says_so_everywhere() {
    let (file, engines) = (scratch("limit"), vec![engine().await]);
    let mut plan = builtin();
    plan.settings.recording_bytes_max = 30_000;
    let mut config = config(plan, &[flag(&engines[0])]);
    config.record = recorded_to(&file);
    let router = router(config, &engines).await;
    let answers = burst(&router, 40, 1).join_all().await;
    assert!(answers.iter().all(|status| *status == 200), "requests do not suffer: {answers:?}");
    let mut metrics = String::new();
    for _ in 0..1000 {
        metrics = http(router.admin_addr(), "GET", "/metrics", "").await.body;
        if metrics.contains("kvroute_recording_active 0") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for line in
        ["kvroute_recording_active 0", "kvroute_recording_cuts_total{reason=\"file_full\"} 1"]
    {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    router.shutdown(Duration::from_secs(20)).await;
    let text = std::fs::read(&file).unwrap();
    assert!((1_000..=30_000).contains(&text.len()), "{}", text.len());
    let report = replay(&text[..], None).unwrap();
    assert_eq!(report.recording.end, Some(EndReason::FileFull));
    let same = report.same.unwrap();
    assert_eq!(same.equal, same.decisions);
    std::fs::remove_file(file).unwrap();
}

#[tokio::test]
async fn a_recording_does_not_overwrite() {
    let (file, engines) = (scratch("existing"), [engine().await]);
    std::fs::write(&file, "precious").unwrap();
    let mut config = config(builtin(), &[flag(&engines[0])]);
    config.record = recorded_to(&file);
    let error = kvroute_router::start(config).await.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("cannot record to") && error.contains("exists"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    std::fs::remove_file(file).unwrap();
}

/// A recording of two endpoints and `requests` requests, written as the router does.
fn scripted(requests: u32) -> Vec<String> {
    let (sender, lines) = mpsc::channel();
    let write = |entry: &Entry<'_>| serde_json::to_string(entry).unwrap();
    let mut brain = Brain::new(builtin(), 5);
    brain.set_recorder(Some(Box::new(move |entry| {
        sender.send(write(&entry)).unwrap();
        ControlFlow::Continue(())
    })));
    for name in ["a", "b"] {
        let spec = EndpointSpec {
            name: name.into(),
            address: format!("{name}:80"),
            labels: BTreeMap::new(),
            rank: 0,
            replay_available: false,
            events_expected: true,
        };
        let id = brain.add_endpoint(Time::ZERO, spec).unwrap();
        let metrics = EngineMetrics { block_size: Some(16), ..EngineMetrics::default() };
        brain.on_metrics(Time(1), id, &metrics);
    }
    for i in 0..requests {
        let (now, tokens) = (Time(u64::from(i) * 1_000_000), vec![i % 3; 100]);
        let extras = PromptExtras::default();
        let chains = vec![chain(ChainSpec::exact(16), Root::Base, &tokens, &extras)];
        let request = Request {
            id: &format!("r{i}"),
            model: "m",
            prompts: &[PromptChains { chains }],
            prompt_tokens: 100,
            tokens_known: TokensKnown::Exact,
            max_tokens: None,
            skips_cache: false,
            held: None,
            media: &[],
            priority: 0,
            headers: Headers::NONE,
            allowed: None,
        };
        let ticket = brain.decide(now, &request).unwrap().ticket;
        if i % 2 == 0 {
            brain.on_response(now, ticket, ResponseEvent::End { status: 200 });
        }
    }
    drop(brain);
    let calls: Vec<String> = lines.iter().collect();
    let header = Header {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        seed: 5,
        config: String::new(),
        started_unix_s: 0.5,
    };
    let end = End { reason: EndReason::Complete, entries: calls.len() as u64 };
    let mut all = vec![write(&Entry::Recording(header))];
    all.extend(calls);
    all.push(write(&Entry::End(end)));
    all
}

fn run(lines: &[String]) -> anyhow::Result<Report> {
    replay(format!("{}\n", lines.join("\n")).as_bytes(), None)
}

#[test]
fn a_recording_cut_anywhere_is_replayed_as_far_as_it_goes() {
    let lines = scripted(12);
    let text = format!("{}\n", lines.join("\n"));
    for at in (lines[0].len() + 1..text.len()).step_by(97) {
        let report = replay(&text.as_bytes()[..at], None).unwrap();
        let same = report.same.unwrap();
        assert_eq!(same.equal, same.decisions, "cut at {at}");
        assert_eq!(report.recording.end, None, "cut at {at}");
    }
    for at in [0, 1, lines[0].len()] {
        let error = replay(&text.as_bytes()[..at], None).unwrap_err();
        assert!(format!("{error:#}").contains("no recording"), "cut at {at}: {error:#}");
    }
    let whole = run(&lines).unwrap();
    assert_eq!(whole.recording.end, Some(EndReason::Complete));
    assert_eq!(whole.same.unwrap().equal, 12);
}

/// What a change to a recording does to it.
type Damage<'a> = &'a dyn Fn(&mut Vec<String>);

#[test]
fn damage_is_named_with_its_line() {
    let table: [(&str, Damage<'_>); 10] = [
        ("line 4 is damaged", &|lines| lines[3] = "nonsense".into()),
        ("line 4 is damaged", &|lines| lines[3] = "{\"call\":{\"tock\":{}}}".into()),
        ("line 4 is damaged", &|lines| lines[3].push('}')),
        ("line 4 is damaged", &|lines| lines[3].clear()),
        ("is a second beginning", &|lines| lines.insert(4, lines[0].clone())),
        ("comes after the end", &|lines| lines.push(lines[1].clone())),
        ("lines are missing", &|lines| drop(lines.remove(3))),
        ("does not belong there", &|lines| lines.insert(4, "{\"added\":null}".into())),
        ("does not belong there", &|lines| drop(lines.remove(2))),
        ("no recording", &|lines| drop(lines.remove(0))),
    ];
    for (wanted, damage) in table {
        let mut lines = scripted(3);
        damage(&mut lines);
        let text = format!("{:#}", run(&lines).unwrap_err());
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let mut lines = scripted(1);
    let (this, next) = (format!("\"format\":{FORMAT}"), format!("\"format\":{}", FORMAT + 1));
    lines[0] = lines[0].replace(&this, &next);
    let says = format!("format {}", FORMAT + 1);
    assert!(format!("{:#}", run(&lines).unwrap_err()).contains(&says));
    for seed in 0..50 {
        let mut rng = Rng::seeded(seed);
        let noise: Vec<u8> = (0..rng.below(4000)).map(|_| rng.below(256) as u8).collect();
        assert!(replay(&noise[..], None).is_err(), "seed {seed}");
        let mut bytes = lines[0].replace(&next, &this).into_bytes();
        bytes.push(b'\n');
        bytes.extend(noise);
        // A cut or an error, but no panic.
        let _ = replay(&bytes[..], None);
    }
}

#[test]
fn a_difference_is_shown_in_full_and_decides_the_exit_code() {
    let mut lines = scripted(6);
    let at = lines.iter().rposition(|line| line.starts_with("{\"decided\"")).unwrap();
    lines[at] = lines[at].replace("\"prompt_tokens\":100", "\"prompt_tokens\":101");
    let same = run(&lines).unwrap().same.unwrap();
    assert_eq!((same.decisions, same.equal), (6, 5));
    let difference = same.first_difference.unwrap();
    assert_eq!(difference.line, at as u64 + 1);
    assert_eq!(difference.then["Ok"]["record"]["prompt_tokens"], 101);
    assert_eq!(difference.now["Ok"]["record"]["prompt_tokens"], 100);

    let file = scratch("exit");
    std::fs::write(&file, lines.join("\n") + "\n").unwrap();
    assert_eq!(main(&file, None, true).unwrap(), ExitCode::from(1));
    std::fs::write(&file, scripted(6).join("\n") + "\n").unwrap();
    assert_eq!(main(&file, None, false).unwrap(), ExitCode::SUCCESS);
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../../config/load-only.yaml");
    assert_eq!(main(&file, Some(config.as_ref()), true).unwrap(), ExitCode::SUCCESS);
    std::fs::remove_file(&file).unwrap();
    assert!(main(&file, None, false).is_err());
}

#[test]
fn another_configuration_refuses_and_admits_for_itself() {
    let lines = scripted(9);
    let text = format!("{}\n", lines.join("\n"));
    let mut narrow = builtin();
    narrow.settings.inflight_requests_max = 2;
    let other = replay(text.as_bytes(), Some(narrow)).unwrap().other.unwrap();
    // Four of nine never end: two fit, and what comes after them is refused.
    assert_eq!((other.decisions, other.refused_then), (9, 0));
    assert_eq!((other.refused_now, other.elsewhere), (5, 5), "{other:?}");
    let mut small = builtin();
    small.settings.endpoints_max = 1;
    let other = replay(text.as_bytes(), Some(small)).unwrap().other.unwrap();
    assert_eq!((other.refused_now, other.endpoints["a"].now), (0, 9), "{other:?}");
    assert_eq!(other.elsewhere, other.endpoints["b"].then);
}
