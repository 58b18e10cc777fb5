//! The proxy over TLS, with both protocols.
#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use kvroute_router::{StartError, TlsFiles};
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
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(data("tls-cert.pem")).unwrap()).unwrap();
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
async fn wrong_files_refuse_the_start() {
    let table = [
        (TlsFiles { cert: data("no.pem"), ..files() }, "no.pem"),
        (TlsFiles { key: data("tls-cert.pem"), ..files() }, "tls-cert.pem"),
    ];
    for (tls, says) in table {
        let mut config = config(&[], settings());
        config.tls = Some(tls);
        let error = kvroute_router::start(config).await.err().expect("an error");
        assert!(matches!(&error, StartError::Tls(text) if text.contains(says)), "{error}");
    }
}
