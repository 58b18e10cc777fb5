//! How is a page asked for over TLS?

#[cfg(not(feature = "tls"))]
pub(crate) use absent::{Tls, TlsStream};
#[cfg(feature = "tls")]
pub(crate) use present::{Tls, TlsStream};

/// A build without TLS: what would need it cannot be made.
#[cfg(not(feature = "tls"))]
mod absent {
    use std::io;

    use kvroute_core::collect::TlsOptions;
    use tokio::net::TcpStream;

    #[derive(Clone, Debug)]
    pub(crate) enum Tls {}

    /// Never made; a plain connection stands in for its type.
    pub(crate) type TlsStream = TcpStream;

    impl Tls {
        pub fn new(_options: &TlsOptions) -> Result<Tls, String> {
            Err("this build has no TLS; build with the feature `tls`".to_owned())
        }

        pub async fn connect(&self, _host: &str, _tcp: TcpStream) -> io::Result<TlsStream> {
            match *self {}
        }
    }
}

#[cfg(feature = "tls")]
mod present {
    use std::fmt;
    use std::io;
    use std::path::Path;
    use std::sync::Arc;

    use kvroute_core::collect::TlsOptions;
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::client::danger::{
        HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
    };
    use tokio_rustls::rustls::crypto::{
        CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature,
    };
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use tokio_rustls::rustls::{
        ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    };

    /// Where systems keep the authorities that they trust.
    const SYSTEM_AUTHORITIES: [&str; 6] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/pki/tls/cacert.pem",
        "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];

    /// Makes connections as a source says.
    #[derive(Clone)]
    pub(crate) struct Tls(TlsConnector);

    pub(crate) type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

    impl fmt::Debug for Tls {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Tls")
        }
    }

    impl Tls {
        /// Reads the files that are named; the error says which one is wrong.
        pub fn new(options: &TlsOptions) -> Result<Tls, String> {
            let provider = Arc::new(ring::default_provider());
            let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()
                .map_err(|e| e.to_string())?;
            let builder = if options.skip_verify {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            } else {
                builder.with_root_certificates(authorities(options.ca_cert.as_deref())?)
            };
            let config = match &options.client {
                None => builder.with_no_client_auth(),
                Some((cert, key)) => {
                    let chain = certificates(cert)?;
                    let secret =
                        PrivateKeyDer::from_pem_file(key).map_err(|e| format!("{key}: {e}"))?;
                    builder
                        .with_client_auth_cert(chain, secret)
                        .map_err(|e| format!("{cert}: {e}"))?
                }
            };
            Ok(Tls(Arc::new(config).into()))
        }

        /// Shakes hands with a server that is to be `host`, a name or an address.
        pub async fn connect(&self, host: &str, tcp: TcpStream) -> io::Result<TlsStream> {
            let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
            let made = self.0.connect(name, tcp).await;
            made.map_err(|e| io::Error::new(e.kind(), format!("TLS with {host}: {e}")))
        }
    }

    fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, String> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        let read: Vec<_> = read.map_err(|e| format!("{path}: {e}"))?;
        match read.is_empty() {
            true => Err(format!("{path}: the file holds no certificate")),
            false => Ok(read),
        }
    }

    fn authorities(path: Option<&str>) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        match path {
            Some(path) => {
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|e| format!("{path}: {e}"))?;
                }
            }
            None => {
                let exists = |path: &&&str| Path::new(path).exists();
                let found = SYSTEM_AUTHORITIES.iter().find(exists);
                let path = found.ok_or("the system has no list of authorities; set caCertPath")?;
                // A list that old machines share has entries that nobody reads any more.
                roots.add_parsable_certificates(certificates(path)?);
            }
        }
        Ok(roots)
    }

    /// Takes any certificate of whoever owns its key.
    #[derive(Debug)]
    struct Anybody(Arc<CryptoProvider>);

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _end_entity: &CertificateDer<'_>,
            _intermediates: &[CertificateDer<'_>],
            _server_name: &ServerName<'_>,
            _ocsp_response: &[u8],
            _now: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            verify_tls12_signature(message, cert, signed, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            verify_tls13_signature(message, cert, signed, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}
