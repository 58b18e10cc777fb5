//! Pages of metrics as a plan says: other ports, other engines, further sources, TLS, and the
//! endpoints that a configuration lists.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;

use kvroute_core::Time;
use kvroute_core::collect::*;
use kvroute_core::fleet::Name;
use kvroute_router::{RouterHandle, StartError};
use support::*;

fn core(parameters: &str) -> (Name, ExtractorSpec) {
    let extractor = serde_json::from_str(parameters).unwrap();
    (Name::from("core"), ExtractorSpec::CoreMetrics(extractor))
}

fn metrics(source: MetricsDataSource, parameters: &str) -> SourceEntry {
    let spec = SourceSpec::Metrics(source);
    SourceEntry { name: Name::from("metrics"), spec, extractors: vec![core(parameters)] }
}

fn dcgm(port: u16) -> SourceEntry {
    let interval = kvroute_core::config::GoDuration::parse("50ms");
    let source = DcgmDataSource { port: u32::from(port), interval, ..DcgmDataSource::default() };
    let extractor = ExtractorSpec::Dcgm(DcgmExtractor::default());
    let extractors = vec![(Name::from("gpu"), extractor)];
    SourceEntry { name: Name::from("dcgm"), spec: SourceSpec::Dcgm(source), extractors }
}

fn build(sources: &[SourceEntry]) -> CollectPlan {
    CollectPlan::build(sources, true, None).unwrap()
}

async fn try_start(
    endpoints: &[SocketAddr],
    plan: &CollectPlan,
) -> Result<RouterHandle, StartError> {
    let mut config = config(endpoints, settings());
    config.plan.collect = plan.clone();
    kvroute_router::start(config).await
}

async fn start(endpoints: &[SocketAddr], plan: &CollectPlan) -> RouterHandle {
    try_start(endpoints, plan).await.unwrap()
}

/// Requests that wait at the only endpoint.
fn waiting(router: &RouterHandle) -> Option<u32> {
    let brain = router.brain();
    brain.fleet().iter().next()?.metrics().map(|metrics| metrics.waiting)
}

/// A number about the only endpoint, stale or not.
fn attribute(router: &RouterHandle, key: &str, producer: &str) -> Option<f64> {
    let brain = router.brain();
    brain.fleet().iter().next()?.attribute(Time::ZERO, key, Some(producer))
}

/// Asks for an admin page until it is as it should be.
async fn until(router: &RouterHandle, path: &str, is_so: impl Fn(&str) -> bool) -> String {
    let asking = async {
        loop {
            let page = send(router.admin_addr(), get(path)).await.body;
            if is_so(&page) {
                return page;
            }
        }
    };
    tokio::time::timeout(LONG, asking).await.expect(path)
}

fn say(mock: &Mock, page: &str) {
    *mock.state.metrics.lock() = Some(page.to_owned());
}

const BUSY: &str = "vllm:num_requests_waiting 7\nvllm:num_requests_running 1\n";

#[tokio::test]
async fn metrics_at_another_port() {
    let (engine, exporter) = (Mock::start().await, Mock::start().await);
    say(&exporter, BUSY);
    let port = u32::from(exporter.addr.port());
    let source = MetricsDataSource { port, ..MetricsDataSource::default() };
    let router = start(&[engine.addr], &build(&[metrics(source, "{}")])).await;
    eventually("the other port's numbers", || waiting(&router) == Some(7)).await;
    assert_eq!(engine.scrapes(), 0);
    // Models are asked for at the endpoint itself.
    eventually("its models", || {
        router.brain().fleet().iter().next().is_some_and(|e| e.serves("m") == Some(true))
    })
    .await;
}

#[tokio::test]
async fn engines_and_numbers_of_the_users_choice() {
    let engine = Mock::start().await;
    say(&engine, "my_queue{state=\"waiting\"} 5\nmy_queue{state=\"x\"} 9\nmy_depth 2.5\n");
    let parameters = r#"{"engineConfigs": [{"name": "mine",
        "queuedRequestsSpec": "my_queue{state=waiting}",
        "customMetrics": [{"attributeKey": "depth", "metricSpec": "my_depth"}]}]}"#;
    let plan = build(&[metrics(MetricsDataSource::default(), parameters)]);
    let mut labelled = config(&[engine.addr], settings());
    let flag = format!("http://{},label.llm-d.ai/engine-type=mine", engine.addr);
    labelled.endpoints = vec![flag.parse().unwrap()];
    labelled.plan.collect = plan.clone();
    let router = kvroute_router::start(labelled).await.unwrap();
    eventually("its queue", || waiting(&router) == Some(5)).await;
    assert_eq!(attribute(&router, "depth", "core"), Some(2.5));
    // Without the label the page is that of no engine.
    let other = start(&[engine.addr], &plan).await;
    eventually("failures", || {
        other.brain().fleet().iter().next().is_some_and(|e| e.scrape_failures() > 1)
    })
    .await;
    assert_eq!(waiting(&other), None);
}

#[tokio::test]
async fn gpus_of_an_exporter_and_an_exporter_that_is_down() {
    let (engine, exporter) = (Mock::start().await, Mock::start().await);
    say(&exporter, "DCGM_FI_DEV_GPU_UTIL{gpu=\"0\"} 40\nDCGM_FI_DEV_GPU_UTIL{gpu=\"1\"} 60\n");
    let router = start(&[engine.addr], &build(&[dcgm(exporter.addr.port())])).await;
    let gpus = |router: &RouterHandle| attribute(router, GPU_UTILIZATION, "gpu");
    eventually("the busiest GPU", || gpus(&router) == Some(0.6)).await;
    eventually("the engine's own numbers", || waiting(&router) == Some(0)).await;

    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let router = start(&[engine.addr], &build(&[dcgm(port)])).await;
    let page = until(&router, "/metrics", |page| page.contains("kvroute_source_failures_total{"));
    let page = page.await;
    assert!(page.contains("source=\"dcgm\""), "{page}");
    eventually("the engine's own numbers", || waiting(&router) == Some(0)).await;
    assert_eq!(gpus(&router), None);
    // Nobody else's trouble: the endpoint answers, and takes requests.
    let scrapes = engine.scrapes();
    eventually("further scrapes", || engine.scrapes() > scrapes + 3).await;
    let brain = router.brain();
    let endpoint = brain.fleet().iter().next().unwrap();
    assert_eq!((endpoint.scrape_failures(), endpoint.failures()), (0, 0));
}

#[tokio::test]
async fn without_metrics_the_models_tell_who_answers() {
    let engine = Mock::start().await;
    let models = ModelsDataSource {
        interval: kvroute_core::config::GoDuration::parse("50ms"),
        ..ModelsDataSource::default()
    };
    let spec = SourceSpec::Models(models);
    let entry = SourceEntry { name: Name::from("models"), spec, extractors: Vec::new() };
    let plan = CollectPlan::build(&[entry], false, None).unwrap();
    let router = start(&[engine.addr], &plan).await;
    let ready = |page: &str| page.replace(' ', "").contains("\"ready\":true");
    until(&router, "/readyz", ready).await;
    assert_eq!((engine.scrapes(), waiting(&router)), (0, None));
}

/// A file that goes with the test.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> File {
        let file =
            File(std::env::temp_dir().join(format!("kvroute-{name}-{}", std::process::id())));
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.0, text).unwrap();
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn listed(mocks: &[(&str, &Mock)]) -> String {
    let entry = |(name, mock): &(&str, &Mock)| {
        let port = mock.addr.port();
        format!("- {{name: {name}, address: 127.0.0.1, port: \"{port}\"}}\n")
    };
    format!("endpoints:\n{}", mocks.iter().map(entry).collect::<String>())
}

fn names(router: &RouterHandle) -> Vec<String> {
    router.brain().fleet().iter().map(|endpoint| endpoint.name.to_string()).collect()
}

#[tokio::test]
async fn a_plan_lists_endpoints_when_nobody_else_does() {
    let (a, b) = (Mock::start().await, Mock::start().await);
    let file = File::new("watched", &listed(&[("a", &a)]));
    let plan = |watch_file: bool| {
        let discovery = DiscoverySpec::File(FileDiscovery { path: file.path(), watch_file });
        CollectPlan::build(&[], true, Some(&discovery)).unwrap()
    };
    let watching = start(&[], &plan(true)).await;
    let once = start(&[], &plan(false)).await;
    let named = start(&[b.addr], &plan(true)).await;
    assert_eq!(names(&named), [b.addr.to_string()]);
    file.write("endpoints: [");
    until(&watching, "/readyz", |page| page.contains("kvroute-watched")).await;
    assert_eq!(names(&watching), ["a"]);
    file.write(&listed(&[("b", &b), ("a", &a)]));
    eventually("both endpoints", || names(&watching) == ["a", "b"]).await;
    assert_eq!(names(&once), ["a"]);

    let discovery = FileDiscovery { path: "/no/such/file".to_owned(), watch_file: true };
    let missing = CollectPlan::build(&[], true, Some(&DiscoverySpec::File(discovery))).unwrap();
    let refused = try_start(&[], &missing).await;
    assert!(matches!(refused, Err(StartError::Endpoints(words)) if words.contains("/no/such")));
}

#[tokio::test]
async fn clusters_tell_where_their_metrics_are() {
    let (gateway, averages) = (Mock::start().await, Mock::start().await);
    say(
        &averages,
        "llm_d_epp_average_kv_cache_utilization{name=\"pool\"} 0.5\n\
         llm_d_epp_average_queue_size{name=\"pool\"} 3\n",
    );
    let file = File::new(
        "clusters",
        &format!(
            "endpoints:\n- name: east\n  address: localhost\n  port: \"{}\"\n  labels:\n    \
             metricsAddress: localhost\n    metricsPort: \"{}\"\n",
            gateway.addr.port(),
            averages.addr.port(),
        ),
    );
    let source = MulticlusterMetricsDataSource {
        scheme: Scheme::Http,
        ..MulticlusterMetricsDataSource::default()
    };
    let extractor = ExtractorSpec::MulticlusterMetrics(MulticlusterMetricsExtractor::default());
    let entry = SourceEntry {
        name: Name::from("clusters"),
        spec: SourceSpec::MulticlusterMetrics(source),
        extractors: vec![(Name::from("average"), extractor)],
    };
    let discovery = MulticlusterFileDiscovery { path: file.path(), watch_file: false };
    let discovery = DiscoverySpec::MulticlusterFile(discovery);
    let plan = CollectPlan::build(&[entry], false, Some(&discovery)).unwrap();
    let router = start(&[], &plan).await;
    let read = |key: &str| attribute(&router, key, "average");
    eventually("its average queue", || read(MULTICLUSTER_QUEUE) == Some(3.0)).await;
    assert_eq!(read(MULTICLUSTER_KV_USAGE), Some(0.5));
    assert_eq!(gateway.scrapes(), 0);
    assert_eq!(names(&router), ["east"]);
}

#[cfg(feature = "tls")]
mod tls {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::crypto::ring;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio_rustls::rustls::server::{ServerConfig, WebPkiClientVerifier};
    use tokio_rustls::rustls::{RootCertStore, ServerConnection};

    use super::*;

    fn data(name: &str) -> String {
        format!("{}/../../tests/data/router/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    /// A page over TLS; asks clients for a certificate when `asks`.
    async fn serve(asks: bool) -> SocketAddr {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let chain = || vec![CertificateDer::from_pem_file(data("tls-cert.pem")).unwrap()];
        let builder = if asks {
            let mut roots = RootCertStore::empty();
            roots.add(chain().remove(0)).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::from_pem_file(data("tls-key.pem")).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(chain(), key).unwrap()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(tcp).await else { return };
                    let _: &ServerConnection = stream.get_ref().1;
                    let mut request = [0; 1024];
                    // Each request of the router comes in one record.
                    while stream.read(&mut request).await.is_ok_and(|n| n > 0) {
                        stream.write_all(answer(200, BUSY).as_bytes()).await.unwrap();
                        stream.flush().await.unwrap();
                    }
                });
            }
        });
        address
    }

    fn source(port: u16) -> MetricsDataSource {
        let (scheme, port) = (Scheme::Https, u32::from(port));
        MetricsDataSource { scheme, port, ..MetricsDataSource::default() }
    }

    #[tokio::test]
    async fn any_certificate_or_a_known_one() {
        let engine = Mock::start().await;
        let page = serve(false).await;
        let any = source(page.port());
        let known = MetricsDataSource {
            insecure_skip_verify: false,
            ca_cert_path: data("tls-cert.pem"),
            ..any.clone()
        };
        for source in [any, known] {
            let router = start(&[engine.addr], &build(&[metrics(source, "{}")])).await;
            eventually("numbers over TLS", || waiting(&router) == Some(7)).await;
        }
        assert_eq!(engine.scrapes(), 0);
    }

    #[tokio::test]
    async fn an_unknown_certificate_is_refused() {
        let engine = Mock::start().await;
        let page = serve(false).await;
        let unknown = MetricsDataSource { insecure_skip_verify: false, ..source(page.port()) };
        let plan = build(&[metrics(unknown, "{}")]);
        let router = match try_start(&[engine.addr], &plan).await {
            Ok(router) => router,
            // A system without any authorities refuses earlier.
            Err(StartError::Collect(words)) if words.contains("caCertPath") => return,
            Err(error) => panic!("{error}"),
        };
        eventually("failures", || {
            router.brain().fleet().iter().next().is_some_and(|e| e.scrape_failures() > 1)
        })
        .await;
        assert_eq!(waiting(&router), None);
    }

    #[tokio::test]
    async fn a_server_that_asks_for_a_certificate_gets_one() {
        let engine = Mock::start().await;
        let page = serve(true).await;
        let shown = MetricsDataSource {
            client_cert_path: data("tls-cert.pem"),
            client_key_path: data("tls-key.pem"),
            ..source(page.port())
        };
        let router = start(&[engine.addr], &build(&[metrics(shown, "{}")])).await;
        eventually("numbers over mutual TLS", || waiting(&router) == Some(7)).await;
        let router = start(&[engine.addr], &build(&[metrics(source(page.port()), "{}")])).await;
        eventually("failures", || {
            router.brain().fleet().iter().next().is_some_and(|e| e.scrape_failures() > 1)
        })
        .await;
        assert_eq!(waiting(&router), None);
    }

    #[tokio::test]
    async fn files_that_are_wrong_refuse_the_start() {
        let table = [
            (
                MetricsDataSource {
                    insecure_skip_verify: false,
                    ca_cert_path: data("no.pem"),
                    ..source(1)
                },
                "no.pem",
            ),
            (
                MetricsDataSource {
                    insecure_skip_verify: false,
                    ca_cert_path: data("README.md"),
                    ..source(1)
                },
                "holds no certificate",
            ),
            (
                MetricsDataSource {
                    client_cert_path: data("tls-cert.pem"),
                    client_key_path: data("tls-cert.pem"),
                    ..source(1)
                },
                "tls-cert.pem",
            ),
        ];
        for (source, words) in table {
            let plan = build(&[metrics(source, "{}")]);
            let started = try_start(&[], &plan).await;
            let error = started.map(drop).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("`metrics`"), "{error}");
        }
    }
}

#[cfg(not(feature = "tls"))]
#[tokio::test]
async fn a_build_without_tls_says_so() {
    let scheme = Scheme::Https;
    let source = MetricsDataSource { scheme, ..MetricsDataSource::default() };
    let plan = build(&[metrics(source, "{}")]);
    let started = try_start(&[], &plan).await;
    let error = started.map(drop).unwrap_err().to_string();
    assert!(error.contains("this build has no TLS"), "{error}");
}
