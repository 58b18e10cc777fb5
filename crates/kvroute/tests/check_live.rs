//! `kvroute check --live` against simulated engines: a healthy one, and one mismatch at a time,
//! each of which must be named in words.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvroute::check::live::{Check, Expected, Finding, Question, Report, Status, run};
use kvroute_lab::engine::{self, EngineConfig, EngineHandle};
use kvroute_router::{EventsConfig, EventsSource, Tokenizers, ask};
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use serde_json::Value;
use support::{MODEL, engine_config};

const PRECISE: &str = "\
plugins:
  - type: precise-prefix-cache-producer
    name: precise
  - type: prefix-cache-scorer
    parameters: {prefixMatchInfoProducerName: precise}
";

/// A folder of this test's own, gone with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("kvroute-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// The demo tokenizer's files, changed; gives the path of its `tokenizer.json`.
    fn tokenizer(&self, change: impl Fn(&str, String) -> String) -> String {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tokens/assets/demo");
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            let text = std::fs::read_to_string(from.join(name)).unwrap();
            self.file(name, &change(name, text));
        }
        self.0.join("tokenizer.json").display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left in the system's temporary folder hurts nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn precise(processor: &str) -> String {
    let parameters = format!("    parameters:\n      tokenProcessorConfig: {{{processor}}}\n");
    PRECISE.replace("name: precise\n", &format!("name: precise\n{parameters}"))
}

/// Exit code, standard output and standard error of the program.
async fn kvroute(args: &[&str]) -> (i32, String, String) {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let ran = tokio::task::spawn_blocking(move || {
        std::process::Command::new(env!("CARGO_BIN_EXE_kvroute")).args(args).output().unwrap()
    });
    let output = ran.await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

async fn started(change: impl FnOnce(&mut EngineConfig)) -> (EngineHandle, String) {
    let mut config = engine_config();
    change(&mut config);
    let engine = engine::serve(config).await.unwrap();
    let url = format!("http://{}", engine.http_addr());
    (engine, url)
}

/// Runs a check of one engine in JSON; exit code and the one endpoint.
async fn check(file: &str, url: &str, more: &[&str]) -> (i32, Value) {
    let args = [&["check", file, "--live", "--json", "--endpoint", url], more].concat();
    let (code, out, err) = kvroute(&args).await;
    let parsed: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    (code, parsed["live"]["endpoints"][0].clone())
}

fn finding<'a>(endpoint: &'a Value, check: &str) -> &'a Value {
    let findings = endpoint["findings"].as_array().unwrap();
    findings.iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("{check}: {endpoint}"))
}

/// The finding has this status, these words, and says what to change.
fn assert_named(endpoint: &Value, check: &str, status: &str, words: &[&str], change: &str) {
    let finding = finding(endpoint, check);
    assert_eq!(finding["status"], status, "{finding}");
    let found = finding["found"].as_str().unwrap();
    for word in words {
        assert!(found.contains(word), "{word} is missing in: {found}");
    }
    let advice = finding["change"].as_str().unwrap();
    assert!(advice.contains(change), "{change} is missing in: {advice}");
}

/// Nothing but the named checks is other than fine.
fn assert_else_ok(endpoint: &Value, except: &[&str]) {
    for finding in endpoint["findings"].as_array().unwrap() {
        let name = finding["check"].as_str().unwrap();
        assert!(except.contains(&name) || finding["status"] == "ok", "{finding}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_engine_is_fine() {
    let scratch = Scratch::new("healthy");
    let text = precise("blockSizeTokens: 16, hashSeed: vllm-none-hash");
    let file = scratch.file("c.yaml", &text);
    let tokenizer = scratch.tokenizer(|_, text| text);
    let (_engine, url) = started(|_| ()).await;
    let more = ["--tokenizer", &tokenizer, "--model", MODEL];
    let (code, endpoint) = check(&file, &url, &more).await;
    assert_else_ok(&endpoint, &[]);
    assert_eq!((code, endpoint["findings"].as_array().unwrap().len()), (0, Check::ALL.len()));
    let found = |name| finding(&endpoint, name)["found"].as_str().unwrap().to_owned();
    assert!(found("first_hash").contains("sha256_cbor with seed `vllm-none-hash`"));
    assert!(found("tokenizer").starts_with("equal: the same "));
    assert!(found("template").contains("of one with tools"), "{}", found("template"));

    let args = ["check", &file, "--live", "--endpoint", &url, "--tokenizer", &tokenizer];
    let (code, out, _) = kvroute(&args).await;
    assert_eq!(code, 0);
    for line in [
        "cached prefixes, told by the engines' events",
        "  ok      events          alive at tcp://",
    ] {
        assert!(out.contains(line), "{line} is missing in: {out}");
    }
    assert!(out.ends_with("1 engine asked: 12 ok\n"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_block_size_is_named() {
    let scratch = Scratch::new("block-size");
    let file = scratch.file("c.yaml", &precise("blockSizeTokens: 64"));
    let tokenizer = scratch.tokenizer(|_, text| text);
    let (_engine, url) = started(|_| ()).await;
    let (code, endpoint) = check(&file, &url, &["--tokenizer", &tokenizer]).await;
    assert_eq!(code, 1);
    let words =
        ["the block size differs", "blockSizeTokens says 64", "blocks hold 16 tokens", "c.yaml"];
    assert_named(&endpoint, "block_size", "wrong", &words, "--block-size 64");
    assert_else_ok(&endpoint, &["block_size"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_hash_seed_is_named() {
    let scratch = Scratch::new("hash-seed");
    let file = scratch.file("c.yaml", &precise("hashSeed: \"7\""));
    let tokenizer = scratch.tokenizer(|_, text| text);
    let (_engine, url) = started(|config| config.hash_seed = "42".to_owned()).await;
    let (code, endpoint) = check(&file, &url, &["--tokenizer", &tokenizer]).await;
    assert_eq!(code, 0, "kvroute does not need the seed");
    let words = ["the hash seed differs", "hashSeed says `7`", "with seed `42`", "does not need"];
    assert_named(&endpoint, "first_hash", "warning", &words, "PYTHONHASHSEED=7");
    assert_else_ok(&endpoint, &["first_hash"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_chat_template_is_named() {
    let scratch = Scratch::new("template");
    let file = scratch.file("c.yaml", PRECISE);
    let tokenizer = scratch.tokenizer(|name, text| match name {
        "chat_template.jinja" => format!("Be brief. {text}"),
        _ => text,
    });
    let (_engine, url) = started(|_| ()).await;
    let (code, endpoint) = check(&file, &url, &["--tokenizer", &tokenizer]).await;
    assert_eq!(code, 1);
    let words = ["the chat template differs", "token 0 (from 0) is", "of a conversation"];
    assert_named(&endpoint, "template", "wrong", &words, "chat_template.jinja");
    assert_else_ok(&endpoint, &["template"]);
}

/// The tokenizer without the last half of its merges: the same vocabulary, other tokens.
fn with_fewer_merges(name: &str, text: String) -> String {
    if name != "tokenizer.json" {
        return text;
    }
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.truncate(merges.len() / 2);
    json.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_tokenizer_is_named() {
    let scratch = Scratch::new("tokenizer");
    let file = scratch.file("c.yaml", PRECISE);
    let tokenizer = scratch.tokenizer(with_fewer_merges);
    let (_engine, url) = started(|_| ()).await;
    let (code, endpoint) = check(&file, &url, &["--tokenizer", &tokenizer]).await;
    assert_eq!(code, 1);
    let words = ["the tokenizer differs", "(from 0) is", "at the engine", "The quick brown"];
    assert_named(&endpoint, "tokenizer", "wrong", &words, "--tokenizer the tokenizer.json");
    assert_else_ok(&endpoint, &["tokenizer", "template"]);
    assert_eq!(finding(&endpoint, "template")["status"], "unknown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_off_are_named() {
    let scratch = Scratch::new("events");
    let file = scratch.file("c.yaml", PRECISE);
    let tokenizer = scratch.tokenizer(|_, text| text);
    let (_engine, url) = started(|config| config.events = None).await;
    let (code, endpoint) = check(&file, &url, &["--tokenizer", &tokenizer]).await;
    assert_eq!(code, 1);
    let flag = "enable_kv_cache_events\":true";
    assert_named(&endpoint, "events", "wrong", &["events are off"], flag);
    assert_else_ok(&endpoint, &["events"]);
    // The ports are named, but nobody is there.
    let ports = ["--kv-events-port", "1", "--tokenizer", &tokenizer];
    let (code, endpoint) = check(&file, &url, &ports).await;
    assert_eq!(code, 1);
    let words = ["events are off, or the port is wrong", "tcp://127.0.0.1:1"];
    assert_named(&endpoint, "events", "wrong", &words, flag);
    // A configuration that reads no events does not miss them.
    let file = scratch.file("load.yaml", "plugins:\n  - type: queue-scorer\n");
    let (code, endpoint) = check(&file, &url, &[]).await;
    assert_eq!(code, 0);
    assert_else_ok(&endpoint, &[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_port_is_named_by_what_answers_there() {
    let scratch = Scratch::new("port");
    let file = scratch.file("c.yaml", PRECISE);
    let (engine, _) = started(|_| ()).await;
    let events = format!("http://{}", engine.events_addr().unwrap());
    let (code, endpoint) = check(&file, &events, &[]).await;
    assert_eq!(code, 1);
    let words = ["the port is wrong", "a ZeroMQ socket answers", "port of KV events"];
    assert_named(&endpoint, "reachable", "wrong", &words, "correct the port in --endpoint");

    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (code, endpoint) = check(&file, &format!("http://{free}"), &[]).await;
    assert_eq!(code, 1);
    let words = ["nothing listens at", "connection refused", "the port is wrong"];
    assert_named(&endpoint, "reachable", "wrong", &words, "correct the port in --endpoint");

    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap();
    let server = tokio::spawn(some_web_server(other));
    let (code, endpoint) = check(&file, &format!("http://{address}"), &[]).await;
    server.abort();
    assert_eq!(code, 1);
    let words = ["that is no engine", "(nginx)", "status 404"];
    assert_named(&endpoint, "reachable", "wrong", &words, "correct the port in --endpoint");
}

async fn some_web_server(listener: tokio::net::TcpListener) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        let _ = stream.read(&mut buffer).await.unwrap();
        let answer = "HTTP/1.1 404 Not Found\r\nserver: nginx\r\ncontent-length: 0\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_that_make_no_sense_are_refused() {
    let table: [(&[&str], &str); 4] = [
        (&["check", "--live"], "no engines: give --live --endpoint"),
        (&["check"], "FILE"),
        (&["check", "c.yaml", "--endpoint", "http://127.0.0.1:1"], "with --live only"),
        (&["check", "--live", "--endpoint", "https://a:1"], "is not an endpoint"),
    ];
    for (args, words) in table {
        let (code, _, err) = kvroute(args).await;
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(words), "{err}");
    }
}

async fn asked(engine: &EngineHandle, change: impl FnOnce(&mut Question)) -> Report {
    let flag = support::flag(engine).parse().unwrap();
    let engines = ask::engines(vec![flag], None, &EventsConfig::default()).await.unwrap();
    let expected = Expected { reads_events: true, wants_tokens: true, ..Expected::default() };
    let mut question = Question::new(engines, Tokenizers::default(), expected, None);
    change(&mut question);
    run(question).await
}

fn of(report: &Report, check: Check) -> &Finding {
    report.endpoints[0].findings.iter().find(|finding| finding.check == check).unwrap()
}

#[tokio::test]
async fn a_silent_event_socket_a_lost_replay_and_no_tokenizer_are_named() {
    let (engine, _) = started(|_| ()).await;
    engine.pause_events(true);
    let patience = Duration::from_millis(200);
    let report = asked(&engine, |question| question.event_patience = patience).await;
    let events = of(&report, Check::Events);
    assert_eq!(events.status, Status::Wrong);
    assert!(events.found.contains("caused no event within 0.2 s"), "{events:?}");
    engine.pause_events(false);

    let report = asked(&engine, |question| {
        let replay = Some("127.0.0.1:1".to_owned());
        let events = engine.events_addr().unwrap().to_string();
        question.engines[0].events = EventsSource::At { events, replay };
        question.model = Some("other".to_owned());
    })
    .await;
    let replay = of(&report, Check::Replay);
    assert_eq!(replay.status, Status::Wrong);
    assert!(replay.found.contains("does not answer"), "{replay:?}");
    let model = of(&report, Check::Model);
    assert_eq!(model.status, Status::Wrong);
    assert!(model.found.contains("--model says `other`, which is not served"), "{model:?}");
    let tokenizer = of(&report, Check::Tokenizer);
    assert_eq!(tokenizer.status, Status::Warning);
    assert!(tokenizer.found.contains("routing will be approximate"), "{tokenizer:?}");
}

#[tokio::test]
async fn engines_that_differ_are_told_apart() {
    let other = TokenizerOptions {
        chat_template: Some("{{ messages[0].content }}".to_owned()),
        ..TokenizerOptions::default()
    };
    let (same, _) = started(|_| ()).await;
    let (different, _) =
        started(|config| config.tokenizer = Tokenizer::demo_with(&other).unwrap()).await;
    let flags = [&same, &different].map(|engine| support::flag(engine).parse().unwrap());
    let engines = ask::engines(flags.to_vec(), None, &EventsConfig::default()).await.unwrap();
    let tokenizers = Tokenizers { default: Some(Tokenizer::demo()), ..Tokenizers::default() };
    let expected = Expected { wants_tokens: true, ..Expected::default() };
    let report = run(Question::new(engines, tokenizers, expected, None)).await;
    assert_eq!(report.endpoints[0].endpoint, support::name(&same));
    assert_eq!(report.endpoints[0].status, Status::Ok, "{}", report.table());
    assert_eq!(report.endpoints[1].status, Status::Wrong);
    assert_eq!(report.status, Status::Wrong);
    let table = report.table();
    assert!(table.contains("wrong   template        the chat template differs"), "{table}");
}
