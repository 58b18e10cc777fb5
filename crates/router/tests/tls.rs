//! The proxy over TLS, with both protocols.
#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvroute_router::{ExtProcConfig, RouterHandle, ServerTls, StartError, TlsFiles};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/router").join(name)
}

fn files() -> TlsFiles {
    TlsFiles { cert: data("tls-cert.pem"), key: data("tls-key.pem") }
}

fn connector(alpn: &[u8]) -> TlsConnector {
    connector_trusting(alpn, &[CertificateDer::from_pem_file(data("tls-cert.pem")).unwrap()])
}

fn connector_trusting(alpn: &[u8], trusted: &[CertificateDer<'static>]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    trusted.iter().for_each(|certificate| roots.add(certificate.clone()).unwrap());
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Arc::new(config).into()
}

#[tokio::test]
async fn both_protocols_are_served_and_plain_text_is_not() {
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    config.tls = Some(files());
    let router = kvroute_router::start(config).await.unwrap();
    for alpn in [&b"http/1.1"[..], b"h2"] {
        let tcp = TcpStream::connect(router.http_addr()).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = connector(alpn).connect(name, tcp).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
        if alpn == b"h2" {
            let io = hyper_util::rt::TokioIo::new(stream);
            let executor = hyper_util::rt::TokioExecutor::new();
            let (mut client, connection) =
                hyper::client::conn::http2::handshake(executor, io).await.unwrap();
            tokio::spawn(connection);
            let request = http::Request::post("https://localhost/v1/completions")
                .body(http_body_util::Full::new(bytes::Bytes::from_static(COMPLETION.as_bytes())))
                .unwrap();
            assert_eq!(client.send_request(request).await.unwrap().status(), 200);
        } else {
            let request = post_with("/v1/completions", "connection: close\r\n", COMPLETION);
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(OK_BODY), "{answer}");
        }
    }
    let mut plain = TcpStream::connect(router.http_addr()).await.unwrap();
    plain.write_all(get("/v1/models").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert_eq!(engine.seen().len(), 2);
}

#[tokio::test]
async fn grpc_is_served_over_tls_and_http_2_alone() {
    let loopback = "127.0.0.1:0".parse().unwrap();
    let mut config = config(&[], settings());
    config.ext_proc = Some(ExtProcConfig {
        tls: ServerTls::from_files(Some(files())),
        health: Some(loopback),
        ..ExtProcConfig::plain(loopback)
    });
    let router = kvroute_router::start(config).await.unwrap();
    let tcp = || async { TcpStream::connect(router.ext_proc_addr().unwrap()).await.unwrap() };
    let name = || ServerName::try_from("localhost").unwrap();
    let refused = connector(b"http/1.1").connect(name(), tcp().await).await;
    assert!(refused.unwrap_err().to_string().contains("NoApplicationProtocol"));
    let mut plain = tcp().await;
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let _ = plain.read_to_end(&mut Vec::new()).await;
    for reason in ["application_protocol", "not_tls"] {
        let series = format!("kvroute_tls_handshake_failures_total{{reason=\"{reason}\"}}");
        assert_eq!(metric(&router, &series).await, 1.0, "{reason}");
    }
    let stream = connector(b"h2").connect(name(), tcp().await).await.unwrap();
    let serving = (0, vec![0, 0, 0, 0, 2, 8, 1]);
    assert_eq!(grpc_call(stream, "/grpc.health.v1.Health/Check", b"").await, serving);
    // Probes come without TLS, to an address of their own.
    let plain = TcpStream::connect(router.health_addr().unwrap()).await.unwrap();
    assert_eq!(grpc_call(plain, "/grpc.health.v1.Health/Check", b"").await, serving);
}

#[tokio::test]
async fn wrong_files_refuse_the_start() {
    let table = [
        (TlsFiles { cert: data("no.pem"), ..files() }, "no.pem"),
        (TlsFiles { key: data("tls-cert.pem"), ..files() }, "tls-cert.pem"),
        (TlsFiles { cert: data("tls-key.pem"), ..files() }, "tls-key.pem"),
    ];
    for (tls, says) in table {
        let mut config = config(&[], settings());
        config.tls = Some(tls);
        let error = kvroute_router::start(config).await.err().expect("an error");
        assert!(matches!(&error, StartError::Tls(text) if text.contains(says)), "{error}");
    }
}

/// A folder as Kubernetes mounts a Secret: its files are links into another folder, which changes
/// by swapping the link to that.
struct Secret(PathBuf);

impl Secret {
    fn new(name: &str) -> Secret {
        let name = format!("kvroute-tls-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        for file in ["tls.crt", "tls.key"] {
            std::os::unix::fs::symlink(format!("current/{file}"), folder.join(file)).unwrap();
        }
        Secret(folder)
    }

    fn files(&self) -> TlsFiles {
        TlsFiles { cert: self.0.join("tls.crt"), key: self.0.join("tls.key") }
    }

    fn swap(&self, version: &str, cert: &str, key: &str) {
        std::fs::create_dir(self.0.join(version)).unwrap();
        std::fs::write(self.0.join(version).join("tls.crt"), cert).unwrap();
        std::fs::write(self.0.join(version).join("tls.key"), key).unwrap();
        std::os::unix::fs::symlink(version, self.0.join("next")).unwrap();
        std::fs::rename(self.0.join("next"), self.0.join("current")).unwrap();
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The certificate that a new client is shown.
async fn shown(addr: SocketAddr, trusted: &[CertificateDer<'static>]) -> CertificateDer<'static> {
    let tcp = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector_trusting(b"http/1.1", trusted).connect(name, tcp).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

async fn reloads(router: &RouterHandle, result: &str, count: f64) {
    let series = format!("kvroute_certificate_reloads_total{{result=\"{result}\"}}");
    let until = tokio::time::Instant::now() + LONG;
    while metric(router, &series).await < count {
        assert!(tokio::time::Instant::now() < until, "never: {series} {count}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(metric(router, &series).await, count, "{series}");
}

#[tokio::test]
async fn certificates_change_under_connections() {
    let made = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let pairs = [made(), made(), made()];
    let trusted = pairs.each_ref().map(|pair| pair.cert.der().clone());
    let pem = pairs.each_ref().map(|pair| (pair.cert.pem(), pair.signing_key.serialize_pem()));
    let secret = Secret::new("change");
    secret.swap("v1", &pem[0].0, &pem[0].1);
    let engine = Mock::start().await;
    let mut config = config(&[engine.addr], settings());
    config.tls = Some(secret.files());
    let router = kvroute_router::start(config).await.unwrap();
    let addr = router.http_addr();
    assert_eq!(shown(addr, &trusted).await, trusted[0]);

    let tcp = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut old = connector_trusting(b"http/1.1", &trusted).connect(name, tcp).await.unwrap();

    secret.swap("v2", &pem[1].0, &pem[1].1);
    reloads(&router, "ok", 1.0).await;
    assert_eq!(shown(addr, &trusted).await, trusted[1]);

    // A certificate with another one's key.
    secret.swap("v3", &pem[2].0, &pem[0].1);
    reloads(&router, "failed", 1.0).await;
    assert_eq!(shown(addr, &trusted).await, trusted[1]);

    secret.swap("v4", &pem[2].0, &pem[2].1);
    reloads(&router, "ok", 2.0).await;
    assert_eq!(shown(addr, &trusted).await, trusted[2]);

    let request = post_with("/v1/completions", "connection: close\r\n", COMPLETION);
    old.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    old.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}
