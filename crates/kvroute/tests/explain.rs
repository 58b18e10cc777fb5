//! `kvroute explain` in front of simulated engines: online, offline, and what goes wrong.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use kvroute_core::plan::Plan;
use kvroute_lab::engine::EngineHandle;
use kvroute_router::{RouterConfig, RouterHandle};
use serde_json::{Value, json};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TOKENIZER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../tokens/assets/demo/tokenizer.json");

struct Scene {
    router: RouterHandle,
    engines: Vec<EngineHandle>,
    dir: PathBuf,
}

impl Scene {
    /// Two engines, of which one holds the prompts of group 1.
    async fn new(name: &str) -> Scene {
        let engines = vec![engine().await, engine().await];
        let flags: Vec<String> = engines.iter().map(flag).collect();
        let router = router(config(Plan::least_cost(), &flags), &engines).await;
        complete(&router, &prompt(1, 1)).await;
        settled(&router, &engines.iter().collect::<Vec<_>>()).await;
        let dir =
            std::env::temp_dir().join(format!("kvroute-explain-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scene { router, engines, dir }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let file = self.dir.join(name);
        std::fs::write(&file, text).unwrap();
        file.display().to_string()
    }

    fn request(&self, question: usize) -> String {
        let body = json!({"model": MODEL, "prompt": prompt(1, question), "max_tokens": 4});
        self.file("request.json", &body.to_string())
    }

    fn admin(&self) -> String {
        format!("http://{}", self.router.admin_addr())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

async fn kvroute(args: &[&str]) -> Output {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let run = move || Command::new(env!("CARGO_BIN_EXE_kvroute")).args(args).output().unwrap();
    tokio::task::spawn_blocking(run).await.unwrap()
}

async fn json_of(args: &[&str]) -> Value {
    let output = kvroute(&[args, &["--json"]].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn failure(args: &[&str]) -> String {
    let output = kvroute(&[&["explain"], args].concat()).await;
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

/// What is decided, without the moment at which it is.
fn decided(explained: &Value) -> Value {
    let mut decision = explained["decision"].clone();
    for candidate in decision["candidates"].as_array_mut().unwrap() {
        candidate["load"]["metrics_age_s"] = Value::Null;
    }
    decision["at_s"] = Value::Null;
    decision["request_id"] = Value::Null;
    decision
}

#[tokio::test(flavor = "multi_thread")]
async fn online_offline_and_the_real_request_agree() {
    let scene = Scene::new("agree").await;
    let (admin, request) = (scene.admin(), scene.request(2));
    let before = scene.router.brain().counters().decisions;
    let online = json_of(&["explain", &request, "--admin", &admin]).await;
    // A file that others could read becomes one that they cannot.
    let file = scene.file("fleet.json", "");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let saved = kvroute(&["explain", "--save-snapshot", &file, "--admin", &admin]).await;
    assert!(saved.status.success(), "{saved:?}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let offline =
        json_of(&["explain", &request, "--snapshot", &file, "--tokenizer", TOKENIZER]).await;
    assert_eq!(scene.router.brain().counters().decisions, before, "nothing was decided");
    assert_eq!(scene.router.brain().inflight_requests(), 0);

    let answer = complete(&scene.router, &prompt(1, 2)).await;
    let real = decision(&scene.router, &answer).await;
    assert_eq!(decided(&online)["endpoint"], answer.endpoint());
    // Speeds are compared as of different moments: what was learned fades.
    let shape = |explained: &Value| {
        let mut decision = decided(explained);
        decision["scores"] = Value::Null;
        decision["margin"] = Value::Null;
        decision
    };
    assert_eq!(shape(&online), shape(&real), "{online:#}\n{real:#}");
    assert_eq!(shape(&offline), shape(&real), "{offline:#}\n{real:#}");
    assert_eq!(online["prompt"], real["prompt"]);
    assert_eq!(offline["prompt"], real["prompt"]);
    assert_eq!(online["left_out"], json!([]));
    let chars = prompt(1, 2).chars().count();
    assert_eq!(online["prompt"]["rendered_chars"], json!(chars));
    assert!(online["decision"]["chosen_tokens"].as_u64() > Some(200));
    // The snapshot holds no prompt.
    let snapshot = std::fs::read_to_string(&file).unwrap();
    assert!(!snapshot.contains("Rules of group"));
    assert_eq!(scene.engines.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn people_get_tables() {
    let scene = Scene::new("tables").await;
    let (admin, request) = (scene.admin(), scene.request(2));
    let shown = kvroute(&["explain", &request, "--admin", &admin, "--seed", "ff"]).await;
    let text = String::from_utf8(shown.stdout).unwrap();
    for part in [
        "characters as rendered",
        "Knowledge      precise: the endpoint's event stream is complete",
        "seed 00000000000000ff",
        "What each endpoint holds",
        "kvroute-cost-scorer, weight 1",
        "For the second to win",
        "a cost below",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    assert!(!text.contains('\x1b'), "no colour into a pipe");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");

    let answer = complete(&scene.router, &prompt(1, 3)).await;
    for id in [answer.headers["x-request-id"].as_str(), "last"] {
        let shown = kvroute(&["explain", "--decision", id, "--admin", &admin]).await;
        let text = String::from_utf8(shown.stdout).unwrap();
        assert!(text.contains("Outcome        status 200 from"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_and_paths_count() {
    let engines = vec![engine().await, engine().await];
    let flags: Vec<String> = engines.iter().map(flag).collect();
    let text = "plugins: [{type: session-affinity-scorer, parameters: {strategy: session_id}}]";
    let plan = kvroute::config::load_text(text, "t", true.into()).unwrap();
    let router = router(config(plan, &flags), &engines).await;
    let admin = format!("http://{}", router.admin_addr());
    let body = json!({"model": MODEL, "prompt": "x", "max_tokens": 1}).to_string();
    let mut headers = String::new();
    for session in 0..6 {
        let path = "/v1/completions";
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\nx-session-id: s{session}\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = raw(router.http_addr(), &request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        headers += &answer;
    }
    assert!(headers.contains("x-kvroute-endpoint"));
    let file = std::env::temp_dir().join(format!("kvroute-explain-h-{}", std::process::id()));
    std::fs::write(&file, &body).unwrap();
    let file = file.display().to_string();
    let of = async |extra: &[&str]| {
        json_of(&[&["explain", file.as_str(), "--admin", admin.as_str()], extra].concat()).await
    };
    let best = |explained: &Value| {
        explained["decision"]["scores"][0]["total"].as_f64().unwrap()
            + explained["decision"]["scores"][1]["total"].as_f64().unwrap()
    };
    assert_eq!(best(&of(&["--header", "x-session-id: s3"]).await), 1.0);
    assert_eq!(best(&of(&["--header", "x-session-id: unknown"]).await), 0.0);
    let other = of(&["--path", "/v1/models"]).await;
    assert_eq!(other["prompt"]["tokens"], 0);
    std::fs::remove_file(file).unwrap();
}

async fn raw(addr: std::net::SocketAddr, request: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_say_what_to_do() {
    let scene = Scene::new("mistakes").await;
    let (admin, request) = (scene.admin(), scene.request(1));
    let nonsense = scene.file("nonsense.json", "{\"model\": ");
    let list = scene.file("list.json", "[]");
    let nameless = scene.file("nameless.json", "{\"prompt\": \"x\"}");
    let future = scene.file("future.json", "{\"format\": 99, \"more\": 1}");
    let damaged = scene.file("damaged.json", "{\"format\": 1}");
    let table: [(&[&str], &[&str]); 12] = [
        (&[&nonsense, "--admin", &admin], &["nonsense.json", "not JSON", "line 1"]),
        (&[&list, "--admin", &admin], &["JSON object"]),
        (&["nowhere.json", "--admin", &admin], &["cannot read nowhere.json"]),
        (&[&nameless, "--admin", &admin], &["names no model"]),
        (&[&request, "--admin", "http://127.0.0.1:1"], &["nobody listens", "--admin"]),
        (&[&request, "--admin", "https://x:1"], &["--admin https://x:1", "http://HOST:PORT"]),
        (&[&request, "--admin", &admin, "--seed", "xyz"], &["--seed xyz", "hexadecimal"]),
        (&[&request, "--admin", &admin, "--header", "nope"], &["--header", "name: value"]),
        (&["--decision", "no such", "--admin", &admin], &["the last 1 are kept", "16777216"]),
        (&[&request, "--snapshot", &future], &["format 99", "take it again"]),
        (&[&request, "--snapshot", "/dev/zero"], &["/dev/zero is longer", "limit of a snapshot"]),
        (&[&request, "--snapshot", &damaged], &["damaged.json is damaged", "--save-snapshot"]),
    ];
    for (args, parts) in table {
        let text = failure(args).await;
        for part in parts {
            assert!(text.contains(part), "{args:?}: {part} is missing in: {text}");
        }
    }
    let http = format!("http://{}", scene.router.http_addr());
    assert!(failure(&[&request, "--admin", &http]).await.contains("not the admin address"));
    let request_is_none = failure(&[&request, "--snapshot", &request]).await;
    assert!(request_is_none.contains("is not a snapshot"), "{request_is_none}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_beyond_the_limit_is_refused_in_words() {
    let engines = vec![engine().await];
    let flags: Vec<String> = engines.iter().map(flag).collect();
    let mut plan = Plan::least_cost();
    plan.settings.snapshot_bytes_max = 1000;
    let router = router(config(plan, &flags), &engines).await;
    let answer = http(router.admin_addr(), "GET", "/snapshot", "").await;
    assert_eq!(answer.status, 413);
    assert!(answer.body.contains("kvroute.snapshot_bytes_max"), "{}", answer.body);
    let big = http(router.admin_addr(), "POST", "/explain?wrong=1", "{}").await;
    assert_eq!(big.status, 400);
    assert!(big.body.contains("wrong=1"), "{}", big.body);
    let get = http(router.admin_addr(), "GET", "/explain", "").await;
    assert_eq!(get.status, 405);
}

/// Clients that do not read what they asked for hold no more than two snapshots in memory.
#[tokio::test(flavor = "multi_thread")]
async fn no_more_than_two_snapshots_wait_for_slow_clients() {
    let engines = vec![engine().await];
    let flags: Vec<String> = engines.iter().map(flag).collect();
    // Longer than what sockets buffer.
    let text = format!("# {}", "x".repeat(24 << 20));
    let config = RouterConfig { config: text, ..config(Plan::least_cost(), &flags) };
    let router = router(config, &engines).await;
    let admin = router.admin_addr();
    let slow = || async {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        stream.write_all(b"GET /snapshot HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        stream
    };
    let waiting = [slow().await, slow().await];
    let third = http(admin, "GET", "/snapshot", "").await;
    assert_eq!(third.status, 503);
    assert!(third.body.contains("ask again later"), "{}", third.body);
    drop(waiting);
    let again = async {
        while http(admin, "HEAD", "/snapshot", "").await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("places are given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_runs_the_tests_of_a_configuration() {
    let dir = std::env::temp_dir().join(format!("kvroute-tests-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for file in ["load", "prefix", "disaggregated"] {
        let path = format!("{}/../../config/tests/{file}.yaml", env!("CARGO_MANIFEST_DIR"));
        let good = kvroute(&["check", &path]).await;
        let text = String::from_utf8(good.stdout).unwrap();
        assert!(good.status.success() && text.contains("ok      "), "{text}");
        assert!(!text.contains("FAILED"));
    }
    let path = format!("{}/../../config/tests/load.yaml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let turned = dir.join("turned.yaml");
    std::fs::write(&turned, text.replacen("expect: {endpoint: b}", "expect: {endpoint: a}", 1))
        .unwrap();
    let turned = turned.display().to_string();
    let bad = kvroute(&["check", &turned]).await;
    let text = String::from_utf8(bad.stdout).unwrap();
    assert_eq!(bad.status.code(), Some(1), "{text}");
    for part in [
        "FAILED  the shortest queue wins",
        "expected: it goes to a",
        "but:      it goes to b",
        "queue-scorer, weight 2",
        "tests: 4 of 5 hold",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    let json = kvroute(&["check", &turned, "--json"]).await;
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    let first = &json["files"][0]["tests"][0];
    assert_eq!((&first["ok"], &first["decision"]["endpoint"]), (&json!(false), &json!("b")));
    std::fs::write(
        &turned,
        "plugins: [{type: queue-scorer}]\nkvroute:\n  tests:\n    - name: t\n      \
        fleet: [{name: alpha}]\n      request: {}\n      expect: {endpoint: alfa}\n",
    )
    .unwrap();
    let wrong = kvroute(&["check", &turned]).await;
    assert_eq!(wrong.status.code(), Some(2));
    let text = String::from_utf8(wrong.stdout).unwrap();
    for part in [":7:", "'alfa' is not in the fleet", "there are: alpha"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}
