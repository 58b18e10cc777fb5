//! gRPC health, asked by an independent client (tonic's) at both of its addresses.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use kvroute_router::{ExtProcConfig, RouterConfig, RouterHandle};
use support::*;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

const NAMES: [&str; 6] = [
    "",
    "liveness",
    "readiness",
    "inference-extension",
    "envoy.service.ext_proc.v3.ExternalProcessor",
    "anything",
];

fn with_ext_proc(config: RouterConfig) -> RouterConfig {
    let loopback = "127.0.0.1:0".parse().unwrap();
    let ext_proc = ExtProcConfig { health: Some(loopback), ..ExtProcConfig::plain(loopback) };
    RouterConfig { ext_proc: Some(ext_proc), ..config }
}

async fn client(address: SocketAddr) -> HealthClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    HealthClient::new(endpoint.connect().await.unwrap())
}

fn asking(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

async fn check(client: &mut HealthClient<Channel>, service: &str) -> ServingStatus {
    client.check(asking(service)).await.unwrap().into_inner().status()
}

async fn watch(
    client: &mut HealthClient<Channel>,
    service: &str,
) -> Streaming<HealthCheckResponse> {
    client.watch(asking(service)).await.unwrap().into_inner()
}

async fn told(watched: &mut Streaming<HealthCheckResponse>) -> Result<ServingStatus, Code> {
    let told = tokio::time::timeout(LONG, watched.message()).await.expect("news");
    told.map_err(|status| status.code()).map(|told| told.expect("a status first").status())
}

fn addresses(router: &RouterHandle) -> [SocketAddr; 2] {
    [router.ext_proc_addr().unwrap(), router.health_addr().unwrap()]
}

#[tokio::test]
async fn an_empty_fleet_serves_under_every_name() {
    let router = kvroute_router::start(with_ext_proc(config(&[], settings()))).await.unwrap();
    for address in addresses(&router) {
        let mut client = client(address).await;
        for name in NAMES {
            assert_eq!(check(&mut client, name).await, ServingStatus::Serving, "{name}");
        }
    }
}

#[tokio::test]
async fn sources_that_have_told_nothing_yet_do_not_serve() {
    let nowhere = "http://no-such-host.invalid:1".parse().unwrap();
    let mut one = with_ext_proc(config(&[], settings()));
    one.endpoints = vec![nowhere];
    let mut two = with_ext_proc(config(&["127.0.0.1:9".parse().unwrap()], settings()));
    two.endpoints.extend(one.endpoints.clone());
    for (config, ready) in [(one, ServingStatus::NotServing), (two, ServingStatus::Serving)] {
        let router = kvroute_router::start(config).await.unwrap();
        for address in addresses(&router) {
            let mut client = client(address).await;
            for name in NAMES {
                let expected = if name == "liveness" { ServingStatus::Serving } else { ready };
                assert_eq!(check(&mut client, name).await, expected, "{name}");
            }
        }
    }
}

#[tokio::test]
async fn watchers_hear_of_the_end() {
    let router = kvroute_router::start(with_ext_proc(config(&[], settings()))).await.unwrap();
    let mut watched = Vec::new();
    for address in addresses(&router) {
        let mut client = client(address).await;
        for name in ["readiness", "anything", "liveness"] {
            let mut stream = watch(&mut client, name).await;
            assert_eq!(told(&mut stream).await, Ok(ServingStatus::Serving));
            watched.push((name, stream));
        }
    }
    let ended = tokio::spawn(router.shutdown(Duration::from_millis(200)));
    for (name, stream) in &mut watched {
        if *name != "liveness" {
            assert_eq!(told(stream).await, Ok(ServingStatus::NotServing), "{name}");
        }
        assert_eq!(told(stream).await, Err(Code::Unavailable), "{name}");
    }
    ended.await.unwrap();
}

#[tokio::test]
async fn watchers_that_leave_leave_nothing_behind() {
    let router = kvroute_router::start(with_ext_proc(config(&[], settings()))).await.unwrap();
    let mut client = client(router.health_addr().unwrap()).await;
    assert_eq!(check(&mut client, "").await, ServingStatus::Serving);
    let mut watched = Vec::new();
    for _ in 0..20 {
        let mut stream = watch(&mut client, "").await;
        assert_eq!(told(&mut stream).await, Ok(ServingStatus::Serving));
        watched.push(stream);
    }
    let calls = async || metric(&router, "kvroute_grpc_calls").await;
    assert_eq!(calls().await, 20.0);
    drop(watched);
    let until = tokio::time::Instant::now() + LONG;
    while calls().await > 0.0 {
        assert!(tokio::time::Instant::now() < until, "the calls of the watchers end");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let router = kvroute_router::start(with_ext_proc(config(&[], settings()))).await.unwrap();
    for (path, message, code) in [
        ("/grpc.health.v1.Health/Check", &b"\x0a\x08liveness"[..], Code::Ok),
        ("/grpc.health.v1.Health/Check", b"\x0a\x08live", Code::InvalidArgument),
        ("/grpc.health.v1.Health/Watch", b"\x0a\x01\xff", Code::InvalidArgument),
        ("/grpc.health.v1.Health/List", b"", Code::Unimplemented),
        ("/envoy.service.ext_proc.v3.ExternalProcessor/Process", b"", Code::Unimplemented),
    ] {
        let tcp = TcpStream::connect(router.health_addr().unwrap()).await.unwrap();
        let (status, answer) = grpc_call(tcp, path, message).await;
        assert_eq!(Code::from(i32::from(status)), code, "{path} {message:?}");
        let serving: &[u8] = if code == Code::Ok { &[0, 0, 0, 0, 2, 8, 1] } else { b"" };
        assert_eq!(answer, serving, "{path} {message:?}");
    }
}

/// A proxy that is not connected right now may not have heard yet that this picker stops (row 119
/// of docs/differences.md).
#[tokio::test]
async fn a_drain_in_full_serves_proxies_that_come_late() {
    const DRAIN: Duration = Duration::from_millis(1500);
    for in_full in [true, false] {
        let mut config = with_ext_proc(config(&[], settings()));
        config.ext_proc.iter_mut().for_each(|ext_proc| ext_proc.drains_in_full = in_full);
        let router = kvroute_router::start(config).await.unwrap();
        let [ext_proc, _] = addresses(&router);
        let began = tokio::time::Instant::now();
        let drain = if in_full { DRAIN } else { LONG * 100 };
        let down = tokio::spawn(router.shutdown(drain));
        if in_full {
            let status = check(&mut client(ext_proc).await, "readiness").await;
            assert_eq!(status, ServingStatus::NotServing);
        }
        let finished = tokio::time::timeout(LONG, down).await.expect("an end").unwrap();
        assert!(finished && (!in_full || began.elapsed() >= DRAIN));
    }
}
