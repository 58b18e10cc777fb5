//! Model servers and routers that are down, die and come back.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use http::Version;
use kvroute::envoy::free_port;

use crate::client::{Client, completion, get, next, post, send};
use crate::picking::decision_about;
use crate::support::{PATIENCE, wait_until};
use crate::upstream::{SERVED_BY, STREAM, Upstream, WISH, event};
use crate::{Setup, Stack};

/// Until a request has this status; a request that is not answered at all fails the test.
async fn until_status(what: &str, http: SocketAddr, status: u16) {
    let asked = async {
        loop {
            let reply = send(http, post("/v1/completions", completion("Hello"), &[])).await;
            if reply.status == status {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn tls_or_not() {
    let upstream = Upstream::start().await;
    for tls in [true, false] {
        for setup in [Setup::standalone(), Setup::override_host(&[upstream.addr])] {
            let Some(stack) = Stack::start(Setup { tls, ..setup }, &[upstream.addr]).await else {
                return;
            };
            let reply = send(stack.http, post("/v1/completions", completion("Hello"), &[])).await;
            assert_eq!(reply.status, 200, "TLS {tls}: {}", reply.text());
            let ready = stack.envoy.listener("ready").unwrap();
            assert_eq!(send(ready, get("/ready", &[])).await.status, 200);
            stack.unharmed().await;
        }
    }
}

#[tokio::test]
async fn the_health_that_envoy_asks_for_is_served() {
    let upstream = Upstream::start().await;
    let setup = Setup::override_host(&[upstream.addr]).set("health-interval", "2s", "0.05s");
    let Some(stack) = Stack::start(setup, &[upstream.addr]).await else { return };
    let healthy = "cluster.ext_proc.health_check.success";
    assert!(stack.envoy.stat(healthy).await.unwrap() > 0);
    assert_eq!(stack.envoy.stat("cluster.ext_proc.health_check.failure").await.unwrap(), 0);
    assert_eq!(stack.envoy.stat("cluster.ext_proc.membership_healthy").await.unwrap(), 1);
    stack.unharmed().await;
}

#[tokio::test]
async fn a_model_server_that_is_down_is_avoided() {
    let upstreams = [Upstream::start().await, Upstream::start().await];
    let addrs = upstreams.each_ref().map(|upstream| upstream.addr);
    // Scrapes would notice it as well.
    let setup = Setup::standalone().settings("scrape_interval_ms: 60000");
    let Some(stack) = Stack::start(setup, &addrs).await else { return };
    let [first, second] = upstreams;
    drop(second);
    let mut failed = 0;
    for _ in 0..40 {
        let reply = send(stack.http, post("/v1/completions", completion("Hello"), &[])).await;
        match reply.status {
            200 => assert_eq!(reply.header(SERVED_BY), first.addr.to_string()),
            503 => failed += 1,
            status => panic!("{status}: {}", reply.text()),
        }
    }
    // Envoy cannot try another one with this configuration; once is what it takes to learn.
    assert_eq!(failed, 1, "{}", stack.envoy.log());
    stack.settled().await;
}

#[tokio::test]
async fn with_a_known_set_of_endpoints_the_next_one_serves() {
    let upstreams = [Upstream::start().await, Upstream::start().await];
    let addrs = upstreams.each_ref().map(|upstream| upstream.addr);
    // Scrapes would notice it as well, and it is not tried again.
    let setup = Setup::override_host(&addrs).settings(
        "scrape_interval_ms: 60000, failure_backoff_ms: 60000, failure_backoff_max_ms: 60000",
    );
    let Some(stack) = Stack::start(setup, &addrs).await else { return };
    let [first, second] = upstreams;
    let gone = second.addr.to_string();
    drop(second);
    let mut named = 0;
    for _ in 0..40 {
        let reply = send(stack.http, post("/v1/completions", completion("Hello"), &[])).await;
        assert_eq!(reply.status, 200, "{}\n{}", reply.text(), stack.envoy.log());
        assert_eq!(reply.header(SERVED_BY), first.addr.to_string());
        let decision = decision_about(&stack.router, &reply).await;
        named += u32::from(decision["decision"]["endpoint"] == gone);
    }
    // Envoy says who served in its place; once is what it takes to learn.
    assert_eq!(named, 1, "{}", stack.envoy.log());
    stack.unharmed().await;
}

/// Both files with a picker that is down from the start: status of a GET and of a POST.
async fn without_picker(setup: &Setup) -> Option<[u16; 2]> {
    let envoy = setup.envoy(&crate::binary()?, free_port().unwrap()).await;
    let http = envoy.http_addr().unwrap();
    let got = send(http, get("/v1/models", &[])).await.status;
    Some([got, send(http, post("/v1/completions", completion("Hello"), &[])).await.status])
}

#[tokio::test]
async fn failing_open_and_closed() {
    let upstream = Upstream::start().await;
    let gateway = || Setup::override_host(&[upstream.addr]).set("health-interval", "2s", "0.05s");
    let Some(open) = without_picker(&gateway()).await else { return };
    assert_eq!(open, [200, 200], "override-host.yaml as it stands");
    assert_eq!(upstream.seen().len(), 2);
    let closed = without_picker(&gateway().set("fail-open", "true", "false")).await;
    assert_eq!(closed, Some([500, 500]), "fail closed");
    // The chart's `failOpen: true` has nobody to send to.
    assert_eq!(without_picker(&Setup::standalone()).await, Some([503, 500]), "standalone.yaml");
    assert_eq!(upstream.seen().len(), 2);
}

/// The real program as charts start it, TLS and health included, so that it can die.
struct Router(Child);

impl Router {
    fn start(ext_proc: SocketAddr, upstream: SocketAddr) -> Router {
        let child = Command::new(env!("CARGO_BIN_EXE_kvroute"))
            .args(["epp", "--metrics-endpoint-auth=false", "--admin", "127.0.0.1:0"])
            .args(["--grpc-port", &ext_proc.port().to_string()])
            .args(["--grpc-health-port", &free_port().unwrap().port().to_string()])
            .args(["--metrics-port", &free_port().unwrap().port().to_string()])
            .args(["--endpoint", &format!("http://{upstream}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Router(child.unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.kill();
    }
}

#[tokio::test]
async fn a_router_may_be_killed_and_started_again() {
    let Some(binary) = crate::binary() else { return };
    let upstream = Upstream::start().await;
    let ext_proc = free_port().unwrap();
    let setup = Setup { tls: true, ..Setup::standalone() };
    let envoy = setup.envoy(&binary, ext_proc).await;
    let http = envoy.http_addr().unwrap();
    for _ in 0..2 {
        let mut router = Router::start(ext_proc, upstream.addr);
        until_status("the router serves", http, 200).await;
        let mut client = Client::connect(http, Version::HTTP_11).await;
        upstream.allow(1);
        let request = post("/v1/completions", completion("Go on."), &[(WISH, STREAM)]);
        let mut answer = client.start(request).await.unwrap();
        assert_eq!(next(answer.body_mut()).await.unwrap().unwrap(), event(0));
        let abandoned = upstream.abandoned();
        router.kill();
        assert!(next(answer.body_mut()).await.is_err(), "a stream must not look complete");
        wait_until("the model server hears of it", || upstream.abandoned() > abandoned).await;
        // At once, and no hang.
        let reply = send(http, post("/v1/completions", completion("Hello"), &[])).await;
        assert_eq!(reply.status, 500, "{}", reply.text());
    }
}

#[tokio::test]
async fn a_gateway_goes_round_a_dead_router_and_comes_back() {
    let Some(binary) = crate::binary() else { return };
    let upstream = Upstream::start().await;
    let setup = Setup::override_host(&[upstream.addr]).set("health-interval", "2s", "0.05s");
    let setup = Setup { tls: true, ..setup };
    let ext_proc = free_port().unwrap();
    let envoy = setup.envoy(&binary, ext_proc).await;
    let http = envoy.http_addr().unwrap();
    let routed = async |wanted: bool| {
        let asked = async {
            loop {
                let reply = send(http, post("/v1/completions", completion("Hello"), &[])).await;
                let seen = upstream.seen().pop();
                let named = seen.is_some_and(|seen| {
                    seen.headers.contains_key("x-gateway-destination-endpoint")
                });
                if reply.status == 200 && named == wanted {
                    return;
                }
                // In between a request may be lost with the router, but not without an answer.
                assert!([200, 500].contains(&reply.status), "{reply:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.expect("the gateway notices");
    };
    routed(false).await;
    for _ in 0..2 {
        let mut router = Router::start(ext_proc, upstream.addr);
        routed(true).await;
        router.kill();
        routed(false).await;
    }
}
