//! What does a router keep of very long prompts, and what does it use when nobody asks?

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::engines::MODEL;
use crate::saturate::Sender;
use crate::target::Target;
use crate::work::Work;

/// How often memory is looked at while requests are under way.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a router may tidy up before memory is looked at.
const SETTLE: Duration = Duration::from_secs(2);
/// Requests of a round.
const ROUND: usize = 4;

/// Memory around rounds of long prompts, MB.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LongPrompts {
    pub prompt_tokens: f64,
    pub prompt_bytes: f64,
    pub before_mb: f64,
    pub max_mb: f64,
    /// After each round.
    pub after_mb: Vec<f64>,
    /// Of one request, milliseconds, the best of all.
    pub answer_ms: f64,
    pub errors: u64,
}

/// Sends `rounds` of the same long prompts, one after the other.
pub async fn long_prompts(target: &Target, work: &Work, rounds: u32) -> LongPrompts {
    let mut seen = LongPrompts {
        prompt_tokens: work.mean_tokens(),
        prompt_bytes: work.mean_bytes(),
        before_mb: target.usage().rss_mb,
        answer_ms: f64::INFINITY,
        ..LongPrompts::default()
    };
    for _ in 0..rounds {
        for at in 0..ROUND {
            let sender = at % work.senders.len();
            let workload = &work.senders[sender];
            let prompt = &workload.prompt(at / work.senders.len()).text;
            let body = json!({"model": MODEL, "prompt": &**prompt, "max_tokens": 1});
            let client = Sender::new(&target.urls[sender]);
            let begin = tokio::time::Instant::now();
            let answer = client.send(body.to_string().into(), |_| {});
            let mut answer = std::pin::pin!(answer);
            let outcome = loop {
                tokio::select! {
                    outcome = answer.as_mut() => break outcome,
                    () = tokio::time::sleep(LOOK_EVERY) => {
                        seen.max_mb = seen.max_mb.max(target.usage().rss_mb);
                    }
                }
            };
            if let Err(error) = outcome {
                eprintln!("  {error:#}");
                seen.errors += 1;
                continue;
            }
            seen.answer_ms = seen.answer_ms.min(begin.elapsed().as_secs_f64() * 1000.0);
        }
        tokio::time::sleep(SETTLE).await;
        seen.after_mb.push(target.usage().rss_mb);
    }
    seen
}

/// A router that nobody asks.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Idle {
    pub engines: u32,
    pub cpu_ms_per_s: f64,
    pub rss_mb: f64,
}

/// Watches it for `span`.
pub async fn idle(target: &Target, engines: u32, span: Duration) -> Idle {
    tokio::time::sleep(SETTLE).await;
    let before = target.usage();
    tokio::time::sleep(span).await;
    let after = target.usage();
    let cpu_ms_per_s = (after - before).cpu_s * 1000.0 / span.as_secs_f64();
    Idle { engines, cpu_ms_per_s, rss_mb: after.rss_mb }
}
