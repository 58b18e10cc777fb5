//! Engines that connect to the router's event socket, with a real ZeroMQ library on their side.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use kvroute_core::Rng;
use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_core::settings::Settings;
use kvroute_core::stream::{StreamState, SuspectReason};
use kvroute_router::{EventsConfig, RouterConfig, RouterHandle};
use serde_json::Value;
use support::events::*;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use zeromq::{Socket, SocketRecv, SocketSend, SubSocket, XPubSocket};

const ONLY_BOUND: &str = r#"{"zmqEndpoint": "tcp://127.0.0.1:0", "discoverPods": false}"#;

/// A router under a configuration with this `kvEventsConfig`.
fn configured(endpoints: &[SocketAddr], events: &str, settings: Settings) -> RouterConfig {
    let text = format!(
        r#"{{"plugins": [
            {{"type": "precise-prefix-cache-producer", "parameters":
                {{"kvEventsConfig": {events}}}}},
            {{"type": "prefix-cache-scorer", "parameters":
                {{"prefixMatchInfoProducerName": "precise-prefix-cache-producer"}}}}]}}"#
    );
    let file: EndpointPickerConfig = serde_json::from_str(&text).unwrap();
    let file = EndpointPickerConfig { kvroute: settings.clone().into(), ..file };
    let plan = Plan::build(&file, Experimental::Refused).unwrap();
    let events = EventsConfig::planned(&plan);
    RouterConfig { plan, events, ..config(endpoints, settings) }
}

async fn start(endpoints: &[SocketAddr], events: &str) -> RouterHandle {
    kvroute_router::start(configured(endpoints, events, settings())).await.unwrap()
}

/// The publisher of an engine, which connects to the router. It is of the kind that can see that
/// its subscriber is there.
struct Engine {
    socket: XPubSocket,
    topic: String,
    next: u64,
}

impl Engine {
    async fn connect(router: &RouterHandle, topic: String) -> Engine {
        let mut socket = XPubSocket::new();
        let address = router.events_addr().unwrap();
        socket.connect(&format!("tcp://{address}")).await.unwrap();
        let subscription = socket.recv().await.unwrap();
        assert_eq!(&subscription.get(0).unwrap()[..], b"\x01kv@");
        Engine { socket, topic, next: 0 }
    }

    async fn of(router: &RouterHandle, mock: &Mock) -> Engine {
        Engine::connect(router, format!("kv@{}@m", mock.addr)).await
    }

    /// Publishes a block under the next number.
    async fn publish(&mut self, hash: u64) {
        let seq = self.next.to_be_bytes();
        self.next += 1;
        let frames = [self.topic.as_bytes(), &seq, &payload(&stored(hash))];
        self.socket.send(message(&frames)).await.unwrap();
    }
}

/// Blocks of an endpoint, and how far its stream is trusted.
fn known(router: &RouterHandle, mock: &Mock) -> Option<(usize, StreamState)> {
    let brain = router.brain();
    let address = mock.addr.to_string();
    let id = brain.fleet().iter().find(|endpoint| endpoint.address.as_str() == address)?.id;
    Some((brain.index().endpoint_usage(id).resident, brain.stream_state(id)?))
}

async fn knows(router: &RouterHandle, mock: &Mock, blocks: usize, state: StreamState) {
    let until = tokio::time::Instant::now() + LONG;
    while known(router, mock) != Some((blocks, state)) {
        if tokio::time::Instant::now() > until {
            let view = admin_json(router, "/index").await;
            panic!("never {blocks} blocks, {state:?}: {:#}", view["endpoints"]);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn dropped(router: &RouterHandle, reason: &str) -> f64 {
    metric(router, &format!("kvroute_bound_dropped_total{{reason=\"{reason}\"}}")).await
}

/// Waits until a page of the admin address is as wanted.
async fn shows(router: &RouterHandle, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let until = tokio::time::Instant::now() + LONG;
    loop {
        let view = admin_json(router, "/index").await;
        if is(&view) {
            return view;
        }
        assert!(tokio::time::Instant::now() < until, "never {what}: {view}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn subscription<'a>(view: &'a Value, mock: &Mock) -> &'a Value {
    let all = view["endpoints"].as_array().unwrap();
    let name = mock.addr.to_string();
    &all.iter().find(|e| e["endpoint"] == name.as_str()).unwrap()["stream"]["subscription"]
}

#[tokio::test]
async fn engines_of_one_host_that_connect_make_routing_precise() {
    let mocks = [Mock::start().await, Mock::start().await];
    let router = start(&[mocks[0].addr, mocks[1].addr], ONLY_BOUND).await;
    let address = router.events_addr().unwrap().to_string();
    let view = admin_json(&router, "/index").await;
    let awaited = subscription(&view, &mocks[0])["awaited"].to_string();
    assert!(awaited.contains(&address), "{view}");
    assert_eq!(view["bound"]["topic_filter"], "kv@");

    let mut engines = [Engine::of(&router, &mocks[0]).await, Engine::of(&router, &mocks[1]).await];
    for (at, hash) in [(0, 1), (1, 2), (1, 3), (0, 4)] {
        engines[at].publish(hash).await;
    }
    for mock in &mocks {
        knows(&router, mock, 2, StreamState::Live).await;
    }
    let view = admin_json(&router, "/index").await;
    assert_eq!(view["bound"]["connections"], 2, "{view}");
    let connected = subscription(&view, &mocks[1])["connected"].to_string();
    assert!(connected.contains(&address), "{view}");

    ready(&router, 2).await;
    for (hash, holder) in [(3, 1), (1, 0), (2, 1), (4, 0)] {
        let mut prompt = match &stored(hash).events[0] {
            kvroute_core::event::KvEvent::Stored(stored) => stored.tokens.ids().to_vec(),
            other => panic!("{other:?}"),
        };
        prompt.push(7);
        let id = format!("precise-{hash}");
        let body = format!(r#"{{"model":"m","prompt":{prompt:?},"max_tokens":1}}"#);
        let header = format!("x-request-id: {id}\r\n");
        let got = send(router.http_addr(), post_with("/v1/completions", &header, &body)).await;
        assert_eq!(got.status, 200, "{got:?}");
        let record = &admin_json(&router, &format!("/decisions/{id}")).await["decision"];
        assert_eq!(record["mode"], "precise", "{record}");
        assert_eq!(record["endpoint"], mocks[holder].addr.to_string(), "{record}");
        assert_eq!(record["chosen_tokens"], 16, "{record}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_is_noticed_and_the_next_one_goes_on() {
    let mock = Mock::start().await;
    let router = start(&[mock.addr], ONLY_BOUND).await;
    let mut engine = Engine::of(&router, &mock).await;
    engine.publish(1).await;
    engine.publish(2).await;
    knows(&router, &mock, 2, StreamState::Live).await;
    let next = engine.next;
    drop(engine);
    knows(&router, &mock, 2, StreamState::Suspect(SuspectReason::Lost)).await;
    let view = admin_json(&router, "/index").await;
    let failed = subscription(&view, &mock)["failed"].to_string();
    assert!(failed.contains("has gone"), "{view}");

    // The same engine.
    let mut engine = Engine::of(&router, &mock).await;
    engine.next = next;
    engine.publish(3).await;
    knows(&router, &mock, 3, StreamState::Live).await;
    // What is lost cannot be asked for: all that was known is void.
    engine.next += 1;
    engine.publish(5).await;
    knows(&router, &mock, 1, StreamState::Suspect(SuspectReason::Gap)).await;
    drop(engine);
    // Another one in its place.
    let mut engine = Engine::of(&router, &mock).await;
    engine.publish(6).await;
    knows(&router, &mock, 1, StreamState::Live).await;
    let series = format!("kvroute_stream_reconnects_total{{endpoint=\"{}\"}}", mock.addr);
    assert_eq!(metric(&router, &series).await, 2.0);
}

#[tokio::test]
async fn messages_of_nobody_known_are_counted_and_shown() {
    let mocks = [Mock::start().await, Mock::start().await];
    let dir = std::env::temp_dir().join(format!("kvroute-bound-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("endpoints.json");
    let list = |mocks: &[Mock]| {
        let entry = |mock: &Mock| {
            let (ip, port) = (mock.addr.ip(), mock.addr.port());
            format!(r#"{{"name": "{}", "address": "{ip}", "port": "{port}"}}"#, mock.addr)
        };
        let all: Vec<String> = mocks.iter().map(entry).collect();
        std::fs::write(&file, format!(r#"{{"endpoints": [{}]}}"#, all.join(","))).unwrap();
    };
    list(&mocks[..1]);
    let limits = Settings { label_values_max: 3, ..settings() };
    let mut config = configured(&[], ONLY_BOUND, limits);
    config.endpoints_file = Some(file.clone());
    let router = kvroute_router::start(config).await.unwrap();

    let mut stranger = Engine::of(&router, &mocks[1]).await;
    stranger.publish(1).await;
    stranger.publish(2).await;
    let topic = stranger.topic.clone();
    let view = shows(&router, "two", |view| view["bound"]["unused"][topic.as_str()] == 2).await;
    assert_eq!(view["endpoints"].as_array().unwrap().len(), 1);
    assert_eq!(dropped(&router, "unknown").await, 2.0);
    // Topics are bounded; those that are too long are cut.
    let long = "x".repeat(5_000);
    for topic in ["kv@\n@m", &format!("kv@{long}"), "kv@a@", "kv@b@"] {
        stranger.topic = topic.to_owned();
        stranger.publish(1).await;
    }
    let view = shows(&router, "all", |view| view["bound"]["unused"]["other"] == 2).await;
    assert_eq!(view["bound"]["unused"]["kv@\\n@m"], 1, "{view}");
    assert_eq!(dropped(&router, "malformed").await, 1.0);

    // As soon as the endpoint is listed, it is heard. What came before is missing.
    list(&mocks);
    eventually("it joins", || known(&router, &mocks[1]).is_some()).await;
    (stranger.topic, stranger.next) = (topic, 2);
    stranger.publish(3).await;
    knows(&router, &mocks[1], 1, StreamState::Suspect(SuspectReason::LateStart)).await;
    // One name for two endpoints: nobody knows which.
    let mut vague = Engine::connect(&router, "kv@127.0.0.1@m".to_owned()).await;
    vague.publish(4).await;
    shows(&router, "vague", |view| view["bound"]["unused"]["other"] == 3).await;
    assert_eq!(dropped(&router, "ambiguous").await, 1.0);
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn whatever_connects_does_no_harm() {
    let mock = Mock::start().await;
    let limits = Settings { connect_timeout_ms: 300, event_bytes_max: 4_096, ..settings() };
    let router = kvroute_router::start(configured(&[mock.addr], ONLY_BOUND, limits)).await.unwrap();
    let address = router.events_addr().unwrap();
    let mut greeting = [0u8; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xFF, 0x7F, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    let publisher = [&greeting[..], b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB"].concat();
    let mut huge = publisher.clone();
    huge.extend_from_slice(b"\x02\xff\xff\xff\xff\xff\xff\xff\xff");
    // Frames that are small alone: no message may be large.
    let mut endless = publisher.clone();
    (0..10).for_each(|_| endless.extend([&b"\x01\xff"[..], &[7; 255]].concat()));
    (0..20).for_each(|_| endless.extend([&b"\x01\xff"[..], &[7; 255]].concat()));
    let mut subscriber = greeting.to_vec();
    subscriber.extend_from_slice(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB");
    let mut table: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        greeting[..20].to_vec(),
        huge,
        endless,
        subscriber,
    ];
    let seed = 5;
    let mut rng = Rng::seeded(seed);
    for _ in 0..20 {
        let mut bytes = publisher.clone();
        bytes.extend((0..200).map(|_| rng.below(256) as u8));
        table.push(bytes);
    }
    for bytes in &table {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        // The router lets go of it, in whatever way.
        let mut rest = Vec::new();
        let gone = tokio::time::timeout(LONG, stream.read_to_end(&mut rest)).await;
        assert!(gone.is_ok(), "seed {seed}: {bytes:?}");
    }
    // A half-open handshake ends by the clock.
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut rest = Vec::new();
    let gone = tokio::time::timeout(LONG, silent.read_to_end(&mut rest)).await;
    assert!(gone.is_ok());
    assert_eq!(dropped(&router, "handshake").await, 4.0, "HTTP, cut, subscriber, silence");
    let mut other = SubSocket::new();
    assert!(other.connect(&format!("tcp://{address}")).await.is_err(), "two subscribers");

    let mut engine = Engine::of(&router, &mock).await;
    let topic = engine.topic.clone();
    let seq = 0u64.to_be_bytes();
    let bad: [&[&[u8]]; 4] = [
        &[topic.as_bytes()],
        &[topic.as_bytes(), &seq],
        &[topic.as_bytes(), b"short", b"\x93"],
        &[topic.as_bytes(), &seq, b"\xc1garbage"],
    ];
    for frames in bad {
        engine.socket.send(message(frames)).await.unwrap();
    }
    engine.publish(1).await;
    knows(&router, &mock, 1, StreamState::Live).await;
    let series = format!("kvroute_events_bad_total{{endpoint=\"{}\"}}", mock.addr);
    assert_eq!(metric(&router, &series).await, 4.0);
    works(&router).await;
}

#[tokio::test]
async fn an_engine_that_connects_goes_before_the_subscription_to_it() {
    let mock = Mock::start().await;
    let mut own = Publisher::start(free_port().await, true).await;
    *mock.state.event_sources.lock() = Some(own.sources());
    own.publish(&stored(1), true, false).await;
    let limits = Settings { replay_cooldown_ms: 50, ..settings() };
    let events = r#"{"zmqEndpoint": "tcp://127.0.0.1:0"}"#;
    let router = kvroute_router::start(configured(&[mock.addr], events, limits)).await.unwrap();
    knows(&router, &mock, 1, StreamState::Live).await;
    let view = admin_json(&router, "/index").await;
    let place = subscription(&view, &mock)["connected"].to_string();
    assert!(place.contains("as the engine says"), "{view}");

    let mut engine = Engine::of(&router, &mock).await;
    engine.publish(20).await;
    knows(&router, &mock, 1, StreamState::Live).await;
    engine.publish(21).await;
    knows(&router, &mock, 2, StreamState::Live).await;
    // Nobody hears this one twice, or at all.
    own.publish(&stored(2), false, false).await;
    engine.publish(22).await;
    knows(&router, &mock, 3, StreamState::Live).await;
    let place = router.events_addr().unwrap().to_string();
    let view = admin_json(&router, "/index").await;
    assert!(subscription(&view, &mock)["connected"].to_string().contains(&place), "{view}");
    drop(engine);
    // Then the subscription has the word again, and what was published there is learned.
    shows(&router, "own", |view| {
        subscription(view, &mock)["connected"].to_string().contains("as the engine says")
    })
    .await;
    own.publish(&stored(3), false, false).await;
    knows(&router, &mock, 3, StreamState::Live).await;
}

#[tokio::test]
async fn the_newest_connection_of_an_endpoint_is_heard() {
    let mock = Mock::start().await;
    let limits = Settings { event_connections_max: 2, ..settings() };
    let router = kvroute_router::start(configured(&[mock.addr], ONLY_BOUND, limits)).await.unwrap();
    let mut old = Engine::of(&router, &mock).await;
    old.publish(1).await;
    knows(&router, &mock, 1, StreamState::Live).await;
    let mut new = Engine::of(&router, &mock).await;
    new.next = 1;
    new.publish(2).await;
    knows(&router, &mock, 2, StreamState::Live).await;
    old.publish(9).await;
    let topic = new.topic.clone();
    shows(&router, "superseded", |view| view["bound"]["unused"][topic.as_str()] == 1).await;
    assert_eq!(dropped(&router, "superseded").await, 1.0);
    assert_eq!(known(&router, &mock), Some((2, StreamState::Live)));
    // No third one.
    let mut third = TcpStream::connect(router.events_addr().unwrap()).await.unwrap();
    let mut nothing = Vec::new();
    let _ = tokio::time::timeout(LONG, third.read_to_end(&mut nothing)).await.unwrap();
    assert_eq!((nothing.len(), dropped(&router, "connections").await), (0, 1.0));

    drop(new);
    knows(&router, &mock, 2, StreamState::Suspect(SuspectReason::Lost)).await;
    (old.next, old.topic) = (2, topic);
    old.publish(3).await;
    knows(&router, &mock, 3, StreamState::Live).await;
}

#[tokio::test]
async fn labels_and_ports_of_the_configuration_hold() {
    let (mock, other) = (Mock::start().await, Mock::start().await);
    let mut publisher = Publisher::start(free_port().await, true).await;
    publisher.publish(&stored(1), true, false).await;
    let events = format!(
        r#"{{"podDiscoveryConfig": {{"socketPort": {}, "replaySocketPort": {},
            "podLabelSelector": "serves=yes"}}}}"#,
        publisher.events.port(),
        publisher.replay.port()
    );
    let mut config = configured(&[], &events, settings());
    config.endpoints = vec![
        format!("http://{},label.serves=yes", mock.addr).parse().unwrap(),
        format!("http://{},label.serves=no", other.addr).parse().unwrap(),
    ];
    let router = kvroute_router::start(config).await.unwrap();
    assert_eq!(router.events_addr(), None);
    knows(&router, &mock, 1, StreamState::Live).await;
    let view = admin_json(&router, "/index").await;
    let place = subscription(&view, &mock)["connected"].to_string();
    assert!(place.contains("the configured port"), "{view}");
    assert_eq!(subscription(&view, &other), "unselected", "{view}");
    assert!(view["bound"].is_null());
}

#[tokio::test]
async fn a_socket_that_cannot_be_had_prevents_the_start() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let events = format!(r#"{{"zmqEndpoint": "tcp://{}"}}"#, taken.local_addr().unwrap());
    let Err(error) = kvroute_router::start(configured(&[], &events, settings())).await else {
        panic!("the port was taken");
    };
    let error = error.to_string();
    assert!(error.contains("zmqEndpoint") && error.contains("tcp://*:5557"), "{error}");
}
