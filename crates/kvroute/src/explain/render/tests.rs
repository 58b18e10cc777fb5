use serde_json::{Value, json};

use super::*;
use crate::explain::text;

fn cell(scorer: &str, weight: f64, raw: Option<f64>) -> Value {
    let within = raw.map_or(0.0, |raw| raw.clamp(0.0, 1.0));
    let clamped = raw.is_some_and(|raw| raw != within);
    json!({"scorer": scorer, "weight": weight, "raw": raw, "contribution": within * weight,
           "clamped": clamped})
}

fn row(endpoint: &str, total: f64, scores: [Value; 2]) -> Value {
    json!({"endpoint": endpoint, "total": total, "scores": scores})
}

fn candidate(endpoint: &str, removed_by: Option<&str>, gpu: u32, cpu: u32) -> Value {
    json!({
        "endpoint": endpoint, "removed_by": removed_by, "reason": "events-live", "stream": "live",
        "hit": {"block_size": 16, "blocks": 94, "matched": gpu + cpu, "matched_weighted": 90.0,
                "predicted_tokens": (gpu + cpu) * 16, "resident": gpu + cpu, "expected": gpu + cpu,
                "by_tier": {"gpu": gpu, "cpu": cpu, "disk": 0, "other": 0}, "history": 0},
        "load": {"inflight_requests": 2, "inflight_tokens": 1234, "uncached_tokens": 16,
                 "waiting": 0, "running": 3, "kv_usage": 0.425, "metrics_age_s": 0.05},
    })
}

/// Two candidates, one that fell out, and a prefill profile.
fn answer() -> Value {
    let scores = [
        row(
            "10.0.0.1:8000",
            4.375,
            [cell("prefix-cache-scorer", 3.0, Some(0.875)), cell("queue-scorer", 1.75, Some(1.0))],
        ),
        row(
            "10.0.0.2:8000",
            1.75,
            [cell("prefix-cache-scorer", 3.0, None), cell("queue-scorer", 1.75, Some(1.5))],
        ),
    ];
    json!({
        "prompt": {"rendered_chars": 4605, "prompts": 1, "tokens": 1504, "known": "exact",
                   "blocks": [{"block_size": 16, "space": "exact", "blocks": 94}]},
        "decision": {
            "request_id": "explain", "at_s": 1.5, "model": "qwen3", "profile": "decode",
            "endpoint": "10.0.0.1:8000", "mode": "precise", "reason": "events-live",
            "candidates_degraded": 0, "prompt_tokens": 1504, "available_tokens": 1488,
            "chosen_tokens": 1488, "seed": "00000000000000ff", "tied": 1, "margin": 2.625,
            "filters": [{"name": "decode-filter", "candidates": 3, "kept": 2}],
            "candidates": [candidate("10.0.0.1:8000", None, 93, 0),
                           candidate("10.0.0.2:8000", None, 0, 12),
                           candidate("10.0.0.3:8000", Some("decode-filter"), 0, 0)],
            "scores": scores,
            "others": [{
                "profile": "prefill", "step": "prefill", "endpoint": "10.0.0.3:8000",
                "failed": null, "tied": 1, "margin": null, "filters": [], "removed": [],
                "scores": [],
            }],
            "request_headers": [{"name": "x-prefiller-host-port", "value": "10.0.0.3:8000"}],
        },
        "rejected": null,
        "fallback": ["10.0.0.2:8000"],
        "left_out": ["a: what was before"],
    })
}

const GOLDEN: &str = "\
Prompt         4,605 characters as rendered, 1,504 tokens (exact), 94 exact blocks of 16 tokens
Model          qwen3
Goes to        10.0.0.1:8000, by profile decode
Told with it   x-prefiller-host-port: 10.0.0.3:8000
If it fails    10.0.0.2:8000
Knowledge      precise: the endpoint's event stream is complete
Predicted hit  1,488 of 1,504 tokens there, 1,488 where most is
Tie            none (seed 00000000000000ff)
Margin         2.625 ahead of the next
Not known      a: what was before

What each endpoint holds of the prompt, in blocks
  endpoint         knowledge  of blocks  gpu  cpu  with expected  history  hit  hit tokens
  10.0.0.1:8000  events-live    94 x 16   93    0             93        0   93       1,488
  10.0.0.2:8000  events-live    94 x 16    0   12             12        0   12         192
  10.0.0.3:8000  events-live    94 x 16    0    0              0        0    0           0

Load
  endpoint       waiting  running  KV used  in flight  its tokens  to compute  metrics age
  10.0.0.1:8000        0        3   42.5 %          2       1,234          16       0.05 s
  10.0.0.2:8000        0        3   42.5 %          2       1,234          16       0.05 s
  10.0.0.3:8000        0        3   42.5 %          2       1,234          16       0.05 s

Filters
  decode-filter: 2 of 3 left; out: 10.0.0.3:8000

Scores: raw score x weight = contribution
  [1] prefix-cache-scorer, weight 3
  [2] queue-scorer, weight 1.75
  endpoint                     [1]                 [2]  total
  10.0.0.1:8000  0.875 x 3 = 2.625     1 x 1.75 = 1.75  4.375
  10.0.0.2:8000        no data = 0  1.5! x 1.75 = 1.75   1.75
  ! counts as the nearest of 0 and 1

For the second to win
  10.0.0.2:8000 is second and lacks 2.625. It wins, all else equal,
    if its prefix-cache-scorer were above 0.875 (now no data)
    never by queue-scorer alone

Profile prefill (prefill)
Chooses        10.0.0.3:8000
Tie            none (seed 00000000000000ff)
Margin         nobody else was left

Filters
  None removed anybody.

Scores: raw score x weight = contribution
  No endpoint was left to be scored.";

#[test]
fn the_whole_of_a_decision() {
    let text = text(&answer(), Paint::Plain).unwrap();
    assert_eq!(text, GOLDEN, "\n{text}");
    assert!(text.lines().all(|line| line.chars().count() <= WIDTH));
}

#[test]
fn colour_is_for_terminals_and_changes_no_text() {
    let plain = text(&answer(), Paint::Plain).unwrap();
    let coloured = text(&answer(), Paint::Colour).unwrap();
    assert!(!plain.contains('\x1b') && coloured.contains("\x1b[1m"));
    let stripped = ["\x1b[1m", "\x1b[2m", "\x1b[0m"].iter().fold(coloured, |t, c| t.replace(c, ""));
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&stripped), words(&plain));
}

#[test]
fn what_was_refused_and_what_became_of_it() {
    let refused = json!({
        "prompt": {"tokens": 12, "known": {"none": "no_tokenizer"}},
        "rejected": {"status": 429, "reason": "rejected-saturated", "message": "filter x left none"},
    });
    let text = text(&refused, Paint::Plain).unwrap();
    assert!(
        text.contains("Refused        filter x left none with status 429 (rejected-saturated)")
    );
    assert!(text.contains("12 tokens (counted by length, because there are none: no tokenizer)"));
    let mut real = answer();
    real["outcome"] = json!({"status": 200, "endpoint": "10.0.0.2:8000", "attempts": 2,
        "ttft_s": 0.25, "total_s": 1.5, "delivered_tokens": 1488, "completion_tokens": 64});
    let text = super::super::text(&real, Paint::Plain).unwrap();
    assert!(text.contains("status 200 from 10.0.0.2:8000 after 2 attempts"), "{text}");
    assert!(text.contains("1.5 s, 1,488 tokens from its cache"), "{text}");
    real["outcome"] = json!({"status": 0, "endpoint": "e", "attempts": 1, "total_s": 0.0001,
        "not_followed": true});
    let unseen = super::super::text(&real, Paint::Plain).unwrap();
    assert!(unseen.contains("status unknown from e, not followed to its end"), "{unseen}");
    assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
}

#[test]
fn a_large_fleet_is_cut_and_says_so() {
    let mut large = answer();
    let candidates: Vec<Value> =
        (0..60).map(|n| candidate(&format!("e{n:02}"), None, 0, 0)).collect();
    large["decision"]["candidates"] = json!(candidates);
    let text = text(&large, Paint::Plain).unwrap();
    assert!(text.contains("and 20 more (--json has all)"), "{text}");
}

#[test]
fn nonsense_is_an_error_not_a_panic() {
    for answer in [json!([1]), json!({"decision": 3}), json!({"decision": {"scores": "x"}})] {
        assert!(text(&answer, Paint::Plain).is_err(), "{answer}");
    }
    assert!(text(&json!({"decision": {}}), Paint::Plain).is_ok());
}
