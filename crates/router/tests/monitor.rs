//! The listener for monitors alone: metrics and health, over TLS or not, and nothing else.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;

use kvroute_router::{MetricsListener, RouterHandle, ServerTls};
use support::*;

fn monitor(tls: ServerTls, refused: Option<&str>) -> MetricsListener {
    let address = "127.0.0.1:0".parse().unwrap();
    MetricsListener { address, tls, refused: refused.map(str::to_owned), says_no_profiles: true }
}

async fn start(metrics: MetricsListener, endpoints: &[SocketAddr]) -> RouterHandle {
    let mut config = config(endpoints, settings());
    config.metrics = Some(metrics);
    kvroute_router::start(config).await.unwrap()
}

#[tokio::test]
async fn monitors_see_numbers_and_health_and_nothing_else() {
    let engine = Mock::start().await;
    let router = start(monitor(ServerTls::default(), None), &[engine.addr]).await;
    let address = router.metrics_addr().unwrap();
    ready(&router, 1).await;
    let metrics = send(address, get("/metrics")).await;
    assert!(metrics.status == 200 && metrics.body.contains("kvroute_"), "{}", metrics.body);
    assert!(metrics.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    let open = "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: application/openmetrics-text\r\n\r\n";
    let metrics = send(address, open).await;
    assert!(metrics.headers["content-type"].starts_with("application/openmetrics-text"));
    assert!(metrics.body.ends_with("# EOF\n"), "{}", metrics.body);
    let table = [
        ("/healthz", 200),
        ("/readyz", 200),
        ("/debug/pprof", 501),
        ("/debug/pprof/heap?debug=1", 501),
        ("/", 404),
        ("/decisions", 404),
        ("/index", 404),
        ("/snapshot", 404),
        ("/explain", 404),
    ];
    for (path, status) in table {
        assert_eq!(send(address, get(path)).await.status, status, "{path}");
    }
    assert_eq!(send(address, post("/explain", COMPLETION)).await.status, 405);
    assert!(send(address, get("/")).await.body.contains("/readyz"), "it says what there is");
}

#[tokio::test]
async fn pages_that_are_asked_for_at_once_are_all_complete() {
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    config.metrics = Some(monitor(ServerTls::default(), None));
    let names = kvroute_router::UpstreamNames { pool: "pool".to_owned(), streams: false };
    config.upstream_metric_names = Some(names);
    let router = kvroute_router::start(config).await.unwrap();
    ready(&router, 1).await;
    let ask = |_| send(router.metrics_addr().unwrap(), get("/metrics"));
    for _ in 0..10 {
        for page in futures_util::future::join_all((0..16).map(ask)).await {
            let series = page.body.matches("\nllm_d_epp_inflight_requests{").count();
            assert_eq!(series, 1, "{}", page.body);
        }
    }
}

#[tokio::test]
async fn monitors_are_not_shown_what_files_say() {
    let engine = Mock::start().await;
    let path = std::env::temp_dir().join(format!("kvroute-monitor-{}.yaml", std::process::id()));
    let (host, port) = (engine.addr.ip(), engine.addr.port());
    let good = format!("endpoints:\n- {{ name: one, address: {host}, port: \"{port}\" }}\n");
    std::fs::write(&path, good).unwrap();
    let mut config = config(&[], settings());
    config.endpoints_file = Some(path.clone());
    config.metrics = Some(monitor(ServerTls::default(), None));
    let router = kvroute_router::start(config).await.unwrap();
    ready(&router, 1).await;
    std::fs::write(&path, "endpoints:\n- secret: one\n").unwrap();
    let until = tokio::time::Instant::now() + LONG;
    while !admin(&router, "/readyz").await.body.contains("secret") {
        assert!(tokio::time::Instant::now() < until, "the fault is not noticed");
    }
    let page = send(router.metrics_addr().unwrap(), get("/readyz")).await.body;
    assert!(page.contains("1 sources of endpoints cannot be read"), "{page}");
    assert!(!page.contains("secret") && !page.contains("yaml"), "{page}");
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn refused_metrics_say_why_and_health_is_still_told() {
    let engine = Mock::start().await;
    let router = start(monitor(ServerTls::default(), Some("ask somebody")), &[engine.addr]).await;
    let address = router.metrics_addr().unwrap();
    ready(&router, 1).await;
    let refused = send(address, get("/metrics")).await;
    assert_eq!((refused.status, refused.headers["www-authenticate"].as_str()), (401, "Bearer"));
    assert!(refused.body.contains("ask somebody") && !refused.body.contains("kvroute_"));
    let with_token = "GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer x\r\n\r\n";
    assert_eq!(send(address, with_token).await.status, 401);
    assert_eq!(send(address, get("/readyz")).await.status, 200);
    assert_eq!(admin(&router, "/metrics").await.status, 200, "the admin address stays open");
}

#[tokio::test]
async fn a_source_of_endpoints_that_cannot_be_asked_is_a_reason_not_to_be_ready() {
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    config.endpoints_missing = Some("the pool is not watched".to_owned());
    let router = kvroute_router::start(config).await.unwrap();
    works(&router).await;
    let answer = admin(&router, "/readyz").await;
    assert!(answer.status == 503 && answer.body.contains("not watched"), "{}", answer.body);
}

#[cfg(feature = "tls")]
mod tls {
    use std::path::PathBuf;
    use std::sync::Arc;

    use kvroute_router::{ServerCertificate, TlsFiles};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::crypto::ring;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};

    use super::*;

    fn data(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/router").join(name)
    }

    /// An authority in a file, and a certificate of it with its key.
    struct Authority {
        file: PathBuf,
        client: (CertificateDer<'static>, PrivateKeyDer<'static>),
    }

    fn authority(name: &str) -> Authority {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.pem"));
        std::fs::write(&file, certificate.pem()).unwrap();
        let issuer = rcgen::Issuer::new(params, key);
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["monitor".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Authority { file, client: (certificate.der().clone(), key) }
    }

    /// The status line's code, or nothing when the connection was refused.
    async fn status(address: SocketAddr, client: Option<&Authority>) -> Option<u16> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(data("tls-cert.pem")).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match client {
            Some(Authority { client: (certificate, key), .. }) => {
                config.with_client_auth_cert(vec![certificate.clone()], key.clone_key()).unwrap()
            }
            None => config.with_no_client_auth(),
        };
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.ok()?;
        let request = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        answer.split(' ').nth(1)?.parse().ok()
    }

    #[tokio::test]
    async fn readers_need_a_certificate_of_the_authority() {
        let (ours, other) = (authority("monitor-ours"), authority("monitor-other"));
        let files = TlsFiles { cert: data("tls-cert.pem"), key: data("tls-key.pem") };
        let certificate = ServerCertificate::Files { files, reload: true };
        let open = ServerTls { certificate, ..ServerTls::default() };
        let closed = ServerTls { client_ca: Some(ours.file.clone()), ..open.clone() };
        let router = start(monitor(open, None), &[]).await;
        assert_eq!(status(router.metrics_addr().unwrap(), None).await, Some(200));
        let router = start(monitor(closed.clone(), None), &[]).await;
        let address = router.metrics_addr().unwrap();
        assert_eq!(status(address, Some(&ours)).await, Some(200));
        assert_eq!(status(address, Some(&other)).await, None);
        assert_eq!(status(address, None).await, None);
        let empty = ServerTls { client_ca: Some(data("tls-key.pem")), ..closed };
        let mut config = config(&[], settings());
        config.metrics = Some(monitor(empty, None));
        let error = kvroute_router::start(config).await.map(drop).unwrap_err().to_string();
        assert!(error.contains("tls-key.pem"), "{error}");
    }
}
