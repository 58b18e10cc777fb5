//! The main job, end to end: the router in front of simulated engines.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::TcpListener;

use kvroute_core::plan::{Experimental, Plan};
use kvroute_lab::engine::{self, EngineConfig, EngineHandle};
use kvroute_router::{EventsConfig, RouterConfig, RouterHandle};
use support::*;

async fn engines(count: usize) -> Vec<EngineHandle> {
    let mut engines = Vec::new();
    for _ in 0..count {
        engines.push(engine().await);
    }
    engines
}

fn flags(engines: &[EngineHandle]) -> Vec<String> {
    engines.iter().map(flag).collect()
}

#[tokio::test]
async fn what_is_predicted_is_delivered() {
    let engines = engines(3).await;
    let router = router(config(Plan::precise(), &flags(&engines)), &engines).await;
    predictions_come_true(&router, &engines).await;
}

#[tokio::test]
async fn what_engines_tell_that_connect_to_the_router_is_delivered() {
    let reserved: Vec<TcpListener> =
        (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = reserved.iter().map(|l| l.local_addr().unwrap()).collect();
    drop(reserved);
    let [bound, http @ ..] = &addresses[..] else { panic!("{addresses:?}") };
    let mut engines = Vec::new();
    for &http in http {
        let topic = format!("kv@{http}@{MODEL}");
        let events_to = Some(*bound);
        let no = EngineConfig { events: None, replay: None, ..engine_config() };
        engines.push(engine::serve(EngineConfig { http, topic, events_to, ..no }).await.unwrap());
    }
    let text = format!(
        "plugins:
- type: precise-prefix-cache-producer
  parameters:
    kvEventsConfig: {{zmqEndpoint: 'tcp://{bound}', discoverPods: false}}
- type: prefix-cache-scorer
  parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- type: no-hit-lru-scorer
  parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}
"
    );
    let plan = kvroute::config::load_text(&text, "bound.yaml", Experimental::Refused).unwrap();
    let flags: Vec<String> = http.iter().map(|http| format!("http://{http}")).collect();
    let events = EventsConfig::planned(&plan);
    let router = router(RouterConfig { events, ..config(plan, &flags) }, &engines).await;
    predictions_come_true(&router, &engines).await;
}

/// Three groups of questions come home, each time with the cached tokens that were expected.
async fn predictions_come_true(router: &RouterHandle, engines: &[EngineHandle]) {
    let mut homes = Vec::new();
    for question in 0..4 {
        for group in 0..3 {
            settled(router, &engines.iter().collect::<Vec<_>>()).await;
            let answer = complete(router, &prompt(group, question)).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let decision = decision(router, &answer).await;
            let record = &decision["decision"];
            assert_eq!(record["chosen_tokens"], answer.cached_tokens(), "{record:#}");
            let usage = &answer.json()["usage"];
            assert_eq!(record["prompt_tokens"], usage["prompt_tokens"]);
            assert_eq!(decision["outcome"]["delivered_tokens"], answer.cached_tokens());
            match question {
                0 => homes.push(answer.endpoint().to_owned()),
                _ => {
                    assert_eq!(answer.endpoint(), homes[group], "a group stays at home");
                    assert_eq!(record["mode"], "precise");
                    assert!(answer.cached_tokens() > 200, "{answer:?}");
                }
            }
        }
    }
    homes.sort();
    homes.dedup();
    assert_eq!(homes.len(), 3, "cold groups spread");
    let ledger = &admin(router, "/index").await["ledger"];
    let reported = &ledger["reported"];
    assert_eq!(reported["chosen_tokens"], ledger["delivered_tokens"]);
    assert_eq!(ledger["verdicts"]["below"], 0);
}

#[tokio::test]
async fn a_conversation_goes_where_it_went_before() {
    let engines = engines(2).await;
    let router = router(config(Plan::precise(), &flags(&engines)), &engines).await;
    let mut messages = vec![serde_json::json!({"role": "system", "content": prompt(1, 1)})];
    let mut home: Option<String> = None;
    for turn in 0..4 {
        settled(&router, &engines.iter().collect::<Vec<_>>()).await;
        messages.push(serde_json::json!({"role": "user", "content": format!("Turn {turn}?")}));
        let body =
            serde_json::json!({"model": MODEL, "messages": &messages, "max_tokens": 8}).to_string();
        let answer = http(router.http_addr(), "POST", "/v1/chat/completions", &body).await;
        let record = decision(&router, &answer).await["decision"].clone();
        assert_eq!(record["chosen_tokens"], answer.cached_tokens(), "{record:#}");
        let text = answer.json()["choices"][0]["message"]["content"].clone();
        messages.push(serde_json::json!({"role": "assistant", "content": text}));
        let at = home.get_or_insert_with(|| answer.endpoint().to_owned());
        assert_eq!(at, answer.endpoint());
    }
}

#[tokio::test]
async fn salted_prompts_do_not_share() {
    let engines = engines(1).await;
    let router = router(config(Plan::precise(), &flags(&engines)), &engines).await;
    let ask = async |salt: &str| {
        settled(&router, &[&engines[0]]).await;
        let body = serde_json::json!({
            "model": MODEL, "prompt": prompt(1, 1), "max_tokens": 2, "cache_salt": salt
        });
        http(router.http_addr(), "POST", "/v1/completions", &body.to_string()).await
    };
    assert_eq!(ask("tenant-a").await.cached_tokens(), 0);
    assert_eq!(ask("tenant-b").await.cached_tokens(), 0);
    let again = ask("tenant-a").await;
    assert!(again.cached_tokens() > 200);
    let record = decision(&router, &again).await["decision"].clone();
    assert_eq!(record["chosen_tokens"], again.cached_tokens());
}

#[tokio::test]
async fn a_lost_event_is_noticed_and_replayed() {
    let engines = engines(1).await;
    let router = router(config(Plan::precise(), &flags(&engines)), &engines).await;
    complete(&router, &prompt(1, 1)).await;
    settled(&router, &[&engines[0]]).await;
    engines[0].drop_next_batches(1);
    complete(&router, &prompt(2, 1)).await;
    complete(&router, &prompt(3, 1)).await;
    settled(&router, &[&engines[0]]).await;
    let stream = stream(&router, &engines[0]).await;
    assert_eq!(stream["state"], "live", "{stream:#}");
    assert_eq!(stream["counters"]["gaps"], 1, "{stream:#}");
    let answer = complete(&router, &prompt(2, 2)).await;
    let record = decision(&router, &answer).await["decision"].clone();
    assert!(answer.cached_tokens() > 200);
    assert_eq!(record["chosen_tokens"], answer.cached_tokens());
    assert_eq!(record["mode"], "precise");
}

#[tokio::test]
async fn a_killed_engine_is_left_and_its_restart_forgets() {
    let mut engines = engines(2).await;
    let router = router(config(Plan::precise(), &flags(&engines)), &engines).await;
    let first = complete(&router, &prompt(1, 1)).await;
    let at = engines.iter().position(|e| name(e) == first.endpoint()).unwrap();
    settled(&router, &[&engines[at]]).await;
    let killed = engines.remove(at);
    let (mut again, home) = (killed.config().clone(), name(&killed));
    killed.kill().await;
    for question in 2..5 {
        let answer = complete(&router, &prompt(1, question)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.endpoint(), name(&engines[0]));
    }
    again.seed += 1;
    let restarted = engine::serve(again).await.unwrap();
    assert_eq!(name(&restarted), home);
    wait_until("the restarted engine is heard", || *restarted.subscribers().borrow() > 0).await;
    let direct = serde_json::json!({"model": MODEL, "prompt": prompt(9, 9), "max_tokens": 2});
    http(restarted.http_addr(), "POST", "/v1/completions", &direct.to_string()).await;
    settled_after_restart(&router, &restarted).await;
    let usage = {
        let brain = router.brain();
        let id = brain.fleet().by_name(&home).unwrap().id;
        brain.index().endpoint_usage(id)
    };
    let tokens = kvroute_tokens::Tokenizer::demo().encode(&prompt(9, 9), true).unwrap().len();
    assert_eq!(usage.resident, tokens / 16, "only what the new process stored: {usage:?}");
    settled(&router, &[&engines[0]]).await;
    let answer = complete(&router, &prompt(1, 7)).await;
    let record = decision(&router, &answer).await["decision"].clone();
    assert_eq!(record["chosen_tokens"], answer.cached_tokens(), "{record:#}");
}

async fn settled_after_restart(router: &RouterHandle, engine: &EngineHandle) {
    for _ in 0..1000 {
        let stream = stream(router, engine).await;
        if stream["state"] == "live" && stream["counters"]["restarts"].as_u64() >= Some(1) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the restart was not noticed: {:#}", stream(router, engine).await);
}

#[tokio::test]
async fn a_cache_reset_is_noticed() {
    let engines = engines(1).await;
    let router = router(config(Plan::precise(), &flags(&engines)), &engines).await;
    complete(&router, &prompt(1, 1)).await;
    settled(&router, &[&engines[0]]).await;
    // Through the router the reset is known at once, although the engine tells with its next step.
    let reset = http(router.http_addr(), "POST", "/reset_prefix_cache", "").await;
    assert_eq!(reset.status, 200, "{reset:?}");
    let answer = complete(&router, &prompt(1, 2)).await;
    let record = decision(&router, &answer).await["decision"].clone();
    assert_eq!((record["chosen_tokens"].as_u64(), answer.cached_tokens()), (Some(0), 0));
    // Beside the router the next request finds out, and the one after it is right again.
    settled(&router, &[&engines[0]]).await;
    assert!(engines[0].reset().await);
    complete(&router, &prompt(1, 3)).await;
    settled(&router, &[&engines[0]]).await;
    let answer = complete(&router, &prompt(1, 4)).await;
    let record = decision(&router, &answer).await["decision"].clone();
    assert_eq!(record["chosen_tokens"], answer.cached_tokens());
    assert!(answer.cached_tokens() > 200);
}

#[tokio::test]
async fn without_events_and_tokenizer_history_routes() {
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut config = engine_config();
        config.events = None;
        config.replay = None;
        silent.push(engine::serve(config).await.unwrap());
    }
    let flags: Vec<String> = silent.iter().map(|e| format!("http://{}", e.http_addr())).collect();
    let mut config = config(Plan::precise(), &flags);
    config.tokenizers = kvroute_router::Tokenizers::default();
    let router = kvroute_router::start(config).await.unwrap();
    wait_until("every engine answers", || {
        router.brain().fleet().iter().filter(|e| e.metrics().is_some()).count() == 3
    })
    .await;
    for group in 0..3 {
        let home = complete(&router, &prompt(group, 0)).await;
        for question in 1..4 {
            let answer = complete(&router, &prompt(group, question)).await;
            assert_eq!(answer.endpoint(), home.endpoint());
            assert!(answer.cached_tokens() > 200);
            let record = decision(&router, &answer).await["decision"].clone();
            assert_eq!(record["mode"], "approximate");
            assert_eq!(record["reason"], "tokens-estimated");
        }
    }
    let metrics = http(router.admin_addr(), "GET", "/metrics", "").await.body;
    assert!(metrics.contains("kvroute_mode"), "{metrics}");
}

#[tokio::test]
async fn endpoints_of_a_file_come_and_go() {
    let engines = engines(2).await;
    let dir = std::env::temp_dir().join(format!("kvroute-endpoints-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("endpoints.yaml");
    let entry = |at: usize| {
        let addr = engines[at].http_addr();
        format!("  - {{name: e{at}, address: {}, port: \"{}\"}}\n", addr.ip(), addr.port())
    };
    std::fs::write(&file, format!("endpoints:\n{}{}", entry(0), entry(1))).unwrap();
    let mut config = config(Plan::precise(), &[]);
    config.endpoints_file = Some(file.clone());
    let router = kvroute_router::start(config).await.unwrap();
    wait_until("both are in the fleet", || router.brain().fleet().len() == 2).await;
    // The sockets of the events are asked for: GET /kv_event_sources.
    wait_until("both are subscribed to", || {
        engines.iter().all(|engine| *engine.subscribers().borrow() > 0)
    })
    .await;
    for group in 0..4 {
        assert_eq!(complete(&router, &prompt(group, 0)).await.status, 200);
    }
    std::fs::write(&file, format!("endpoints:\n{}", entry(1))).unwrap();
    wait_until("one is gone", || router.brain().fleet().len() == 1).await;
    std::fs::write(&file, "endpoints: [{nonsense: 1}]").unwrap();
    for question in 1..4 {
        let answer = complete(&router, &prompt(0, question)).await;
        assert_eq!(answer.status, 200);
        assert!(answer.endpoint().contains("e1"), "{answer:?}");
    }
    assert_eq!(router.brain().index().usage().endpoints, 1, "no trace of the other");
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn a_chat_template_that_differs_from_the_engines_is_noticed() {
    let engines = engines(2).await;
    let options = kvroute_tokens::TokenizerOptions {
        chat_template: Some("{% for m in messages %}{{ m.content }}\n{% endfor %}".into()),
        ..kvroute_tokens::TokenizerOptions::default()
    };
    let mut config = config(Plan::precise(), &flags(&engines));
    config.tokenizers.default = Some(kvroute_tokens::Tokenizer::demo_with(&options).unwrap());
    let router = router(config, &engines).await;
    let ask = async |question: usize| {
        settled(&router, &engines.iter().collect::<Vec<_>>()).await;
        let messages = serde_json::json!([{"role": "user", "content": prompt(1, question)}]);
        let body = serde_json::json!({"model": MODEL, "messages": messages, "max_tokens": 2});
        http(router.http_addr(), "POST", "/v1/chat/completions", &body.to_string()).await
    };
    let mut reasons = Vec::new();
    for question in 0..12 {
        let answer = ask(question).await;
        assert_eq!(answer.status, 200);
        reasons.push(decision(&router, &answer).await["decision"]["reason"].clone());
    }
    assert_eq!(reasons.last().unwrap(), "prompt-differs", "{reasons:?}");
    let metrics = http(router.admin_addr(), "GET", "/metrics", "").await.body;
    assert!(metrics.contains("kvroute_fallbacks_total{reason=\"prompt-differs\"}"), "{metrics}");
    // Routing history keeps the prefix at home all the same.
    let (one, two) = (ask(20).await, ask(21).await);
    assert_eq!(one.endpoint(), two.endpoint());
    assert!(two.cached_tokens() > 200);
}
