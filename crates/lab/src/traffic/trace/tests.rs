//! Does a file give the requests that it describes, and is every bad line named?

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::scenario::Scenario;
use crate::traffic::{Arrival, Call, Traffic, TrafficError};

/// A folder that is gone when the test is over.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kvroute-trace-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn scenario(workload: &str, load: &str) -> Scenario {
    let text = format!(
        "name: t\nfleet: {{ engines: 1, profile: tiny, kv_tokens: 65536 }}\n\
         workload: {{ kind: trace, file: trace.txt{workload} }}\nload: {{ {load} }}\n"
    );
    Scenario::parse(&text, "t.yaml").unwrap()
}

fn open(scenario: &Scenario, trace: &str) -> Result<Traffic, TrafficError> {
    let folder = Folder::new();
    std::fs::write(folder.0.join("trace.txt"), trace).unwrap();
    Traffic::new(scenario, &folder.0, 1)
}

fn all(traffic: &mut Traffic, stage: usize) -> Vec<Arrival> {
    std::iter::from_fn(|| traffic.next(stage)).collect()
}

fn shared(a: &Call, b: &Call) -> usize {
    a.tokens.iter().zip(b.tokens.iter()).take_while(|(a, b)| a == b).count()
}

const MOONCAKE: &str = r#"
{"timestamp": 3000, "input_length": 1500, "output_length": 7, "hash_ids": [1, 2, 3]}
{"timestamp": 1000, "input_length": 1024, "output_length": 5, "hash_ids": [1, 9]}

{"timestamp": 1500, "input_length": 1500, "output_length": 6, "hash_ids": [1, 2, 3]}
{"timestamp": 9000, "input_length": 10, "output_length": 1, "hash_ids": [77]}
"#;

#[test]
fn mooncake_blocks_become_equal_tokens_at_the_times_of_the_file() {
    let mut traffic = open(&scenario("", "arrivals: trace"), MOONCAKE).unwrap();
    let stage = traffic.stages()[0];
    assert_eq!((stage.rate, stage.duration_s, stage.arrivals), (0.0, 8.0, 4));
    let calls = all(&mut traffic, 0);
    assert_eq!(calls.iter().map(|a| a.at_s).collect::<Vec<_>>(), [0.0, 0.5, 2.0, 8.0]);
    let lengths: Vec<_> =
        calls.iter().map(|a| (a.call.tokens.len(), a.call.output_tokens)).collect();
    assert_eq!(lengths, [(1024, 5), (1500, 6), (1500, 7), (10, 1)]);
    let [a, b, c, d] = [0, 1, 2, 3].map(|i: usize| &calls[i].call);
    assert_eq!((shared(a, b), shared(b, c), shared(c, d)), (512, 1500, 0));
    assert_eq!((b.prompt_id, a.group), (c.prompt_id, b.group));
    assert!(a.prompt_id != b.prompt_id && d.group != a.group);
    assert_eq!((a.max_tokens, traffic.next(1)), (Some(5), None));
}

#[test]
fn other_arrivals_take_the_lines_in_order_and_begin_again() {
    let load = "arrivals: even, stages: [{ rate: 3, duration_s: 1 }, { rate: 3, duration_s: 1 }]";
    let mut traffic = open(&scenario(", max_tokens_sent: false", load), MOONCAKE).unwrap();
    let outputs =
        |calls: &[Arrival]| -> Vec<u32> { calls.iter().map(|a| a.call.output_tokens).collect() };
    let first = all(&mut traffic, 0);
    assert_eq!(outputs(&first), [7, 5, 6]);
    assert_eq!((first[1].at_s, first[1].call.max_tokens), (1.0 / 3.0, None));
    assert_eq!(outputs(&all(&mut traffic, 1)), [1, 7, 5]);
}

#[test]
fn texts_with_equal_beginnings_become_tokens_with_equal_beginnings() {
    let trace = r#"{"prompt": "abcdefghij klmnop", "max_tokens": 3}
{"text": "abcdefghij klXXXX", "output_tokens": 4}
{"messages": [{"role": "user", "content": "hello"}]}
{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
{"prompt": "abcdefghij klmnop", "output_length": 9}
{"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
"#;
    let load = "arrivals: even, stages: [{ rate: 6, duration_s: 1 }]";
    let spec = scenario(", bytes_per_token: 2.5, output_tokens: 8", load);
    let calls = all(&mut open(&spec, trace).unwrap(), 0);
    let call = |at: usize| &calls[at].call;
    assert_eq!((call(0).tokens.len(), call(0).output_tokens), (7, 3));
    // 13 bytes are equal, which are 5 whole tokens.
    assert_eq!((shared(call(0), call(1)), call(1).output_tokens), (5, 4));
    // "user\nhello\n" has 11 bytes: 4 whole tokens.
    assert_eq!((shared(call(2), call(3)), call(2).output_tokens), (4, 8));
    assert_eq!((call(4).prompt_id, call(4).output_tokens), (call(0).prompt_id, 9));
    assert_eq!(call(4).tokens, call(0).tokens);
    assert!(call(5).tokens.len() > call(2).tokens.len());
}

#[test]
fn seconds_and_milliseconds_are_told_apart_by_name() {
    let trace =
        "{\"timestamp_s\": 100.5, \"text\": \"a\"}\n{\"timestamp\": 101000, \"text\": \"b\"}";
    let spec = scenario(", output_tokens: 8", "arrivals: trace");
    let calls = all(&mut open(&spec, trace).unwrap(), 0);
    assert_eq!(calls.iter().map(|a| a.at_s).collect::<Vec<_>>(), [0.0, 0.5]);
}

const CONFIG: &str = "
load:
  type: constant
  stages:
    - rate: 2
      duration: 3
    - rate: 4
      duration: 5
api: { type: completion }
data:
  type: shared_prefix
  shared_prefix:
    num_groups: 3
    num_prompts_per_group: 2
    system_prompt_len: 60
    question_len: 12
    output_len: 10
";

#[test]
fn a_configuration_of_inference_perf_is_a_shared_prefix_workload() {
    let mut traffic = open(&scenario("", "arrivals: trace"), CONFIG).unwrap();
    let stages: Vec<_> = traffic.stages().iter().map(|s| (s.rate, s.duration_s)).collect();
    assert_eq!(stages, [(2.0, 3.0), (4.0, 5.0)]);
    let calls = all(&mut traffic, 1);
    assert!((calls[19].at_s - 5.0).abs() < 1e-9, "{}", calls[19].at_s);
    for a in &calls {
        assert_eq!((a.call.tokens.len(), a.call.output_tokens), (72, 10));
        let same_group = a.call.group == calls[0].call.group;
        assert_eq!(shared(&a.call, &calls[0].call) >= 60, same_group);
    }
    let load = "arrivals: even, stages: [{ rate: 7, duration_s: 1 }]";
    assert_eq!(open(&scenario("", load), CONFIG).unwrap().stages()[0].arrivals, 7);
}

#[test]
fn bad_lines_are_named() {
    let good = "{\"timestamp\": 0, \"prompt\": \"x\", \"max_tokens\": 1}\n\n";
    let table = [
        ("{\"timestamp\": 0", "column 15: EOF"),
        ("[]", "column 2: invalid length"),
        ("{\"timestamp\": 0, \"max_tokens\": 3}", "no request: expected `input_length`"),
        ("{\"prompt\": \"x\", \"max_tokens\": 3}", "no `timestamp`"),
        ("{\"timestamp\": -1, \"prompt\": \"x\", \"max_tokens\": 3}", "must not be negative"),
        ("{\"timestamp\": 0, \"prompt\": \"x\"}", "no length of the answer"),
        ("{\"timestamp\": 0, \"prompt\": \"x\", \"max_tokens\": 0}", "an answer of 0 tokens"),
        ("{\"timestamp\": 0, \"prompt\": \"\", \"max_tokens\": 1}", "a text of 0 tokens"),
        ("{\"timestamp\": 0, \"prompt\": [1], \"max_tokens\": 1}", "column 27: invalid type"),
        ("{\"timestamp\": 0, \"prompt\": \"x\", \"max_tokens\": 65536}", "do not fit an engine"),
        ("{\"timestamp\": 0, \"hash_ids\": [1], \"max_tokens\": 1}", "without `input_length`"),
        (
            "{\"timestamp\": 0, \"hash_ids\": [1], \"input_length\": 513, \"max_tokens\": 1}",
            "expected 2, one for each 512",
        ),
        (
            "{\"timestamp\": 0, \"hash_ids\": [], \"input_length\": 0, \"max_tokens\": 1}",
            "`input_length` 0",
        ),
        (
            "{\"timestamp\": 0, \"hash_ids\": [], \"prompt\": \"x\", \"max_tokens\": 1}",
            "a line has one of them",
        ),
    ];
    for (line, expected) in table {
        let error = open(&scenario("", "arrivals: trace"), &format!("{good}{line}")).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("trace.txt:3: "), "{line}: {error}");
        assert!(error.contains(expected), "{line}: no `{expected}` in {error}");
    }
}

#[test]
fn files_that_are_no_traces_are_refused() {
    let timed = scenario("", "arrivals: trace");
    let only_data = &CONFIG[CONFIG.find("data:").unwrap()..];
    let table = [
        ("\n \n".to_owned(), "is empty"),
        ("data: {}\n".to_owned(), "trace.txt:1:"),
        ("hello\n".to_owned(), "trace.txt"),
        (CONFIG.replace("shared_prefix\n", "synthetic\n"), "shared_prefix"),
        (CONFIG.replace("constant", "concurrent"), "trace.txt:3:9"),
        (
            CONFIG
                .replace("    question_len", "    enable_multi_turn_chat: true\n    question_len"),
            "enable_multi_turn_chat",
        ),
        (CONFIG.replace("60", "70000"), "an engine has room for 65520"),
        (CONFIG.replace("60", "4000000000"), "do not fit in memory"),
        (only_data.to_owned(), "no stages"),
    ];
    for (trace, expected) in table {
        let error = open(&timed, &trace).unwrap_err().to_string();
        assert!(error.contains(expected), "no `{expected}` in {error}");
    }
    let missing = Traffic::new(&timed, std::path::Path::new("/nowhere"), 1).unwrap_err();
    assert!(missing.to_string().starts_with("cannot read the trace /nowhere/trace.txt"));
}
