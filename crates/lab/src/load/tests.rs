use std::time::Duration;

use super::*;
use crate::engine::{EngineConfig, EngineHandle};
use crate::model::Profile;
use crate::record::Ending;

const SCENARIO: &str = "
name: test
fleet: {engines: 1, profile: tiny, kv_tokens: 65536, block_size: 16}
workload: {kind: shared-prefix, groups: 2, users: 2, prefix_tokens: 64, question_tokens: 32,
  output_tokens: 4}
load: {arrivals: even, stages: [{rate: 100, duration_s: 0.2}]}
";

async fn engine() -> EngineHandle {
    let profile = Profile::built_in("tiny").unwrap();
    let mut config = EngineConfig::loopback("base", Tokenizer::demo(), profile);
    config.speed = 20.0;
    crate::engine::serve(config).await.unwrap()
}

fn load(engine: &EngineHandle) -> Load {
    let scenario = Scenario::parse(SCENARIO, "test").unwrap();
    let url = format!("http://{}", engine.http_addr());
    let config = LoadConfig { lag_p99_max_s: 5.0, ..LoadConfig::new("one", &url, "base") };
    Load::new(config, &scenario, Path::new("."), &Tokenizer::demo()).unwrap()
}

#[tokio::test]
async fn a_schedule_in_the_past_is_late_and_invalid() {
    let engine = engine().await;
    let now = Instant::now();
    let on_time = Driver::new(load(&engine), None, now);
    let measured = on_time.run(std::future::pending(), |_| {}).await;
    assert!(measured.valid && !measured.partial, "{:?}", measured.record.lag);
    let origin = now.checked_sub(Duration::from_secs(20)).unwrap();
    let late = Driver::new(load(&engine), None, origin);
    let measured = late.run(std::future::pending(), |_| {}).await;
    let lag = measured.record.lag.unwrap();
    assert!(!measured.valid && lag.p50 > 19.0 && lag.max >= lag.p99, "{lag:?}");
    // It was late, and everything was sent all the same.
    let answered = |r: &&crate::record::RequestRecord| r.ending == Ending::Answered;
    assert_eq!(measured.record.requests.iter().filter(answered).count(), 20);
}

#[tokio::test]
async fn stopped_early_it_keeps_what_had_ended_and_says_so() {
    let engine = engine().await;
    let (sender, mut seen) = tokio::sync::watch::channel(0);
    let stop = async move {
        // The other end lives as long as the run.
        let _ = seen.wait_for(|&ended| ended >= 5).await;
    };
    let driver = Driver::new(load(&engine), None, Instant::now());
    let measured = driver.run(stop, |progress| {
        sender.send_replace(progress.ended);
    });
    let measured = measured.await;
    assert!(measured.partial);
    assert_eq!(measured.record.name, "one (stopped early)");
    let count = measured.record.requests.len();
    assert!((5..20).contains(&count), "{count}");
    assert!(measured.record.requests.iter().all(|r| r.ending == Ending::Answered));
}
