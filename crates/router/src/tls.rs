//! How is TLS spoken? By the proxy with a certificate and key from files, and to pages of metrics
//! as their source says; both if the crate was built with its feature `tls`.

mod connector;

use crate::StartError;
use crate::config::TlsFiles;

pub(crate) use connector::{Tls, TlsStream};

/// Turns accepted TCP connections into what HTTP is spoken over.
#[derive(Clone)]
pub(crate) enum Acceptor {
    /// Nothing in between.
    Plain,
    /// TLS.
    #[cfg(feature = "tls")]
    Tls(tokio_rustls::TlsAcceptor),
}

impl Acceptor {
    /// Reads the files; plain TCP without them.
    pub fn new(files: Option<&TlsFiles>) -> Result<Acceptor, StartError> {
        files.map_or(Ok(Acceptor::Plain), Acceptor::with_files)
    }

    #[cfg(not(feature = "tls"))]
    fn with_files(_files: &TlsFiles) -> Result<Acceptor, StartError> {
        Err(StartError::Tls("this build has no TLS; build with the feature `tls`".to_owned()))
    }

    #[cfg(feature = "tls")]
    fn with_files(files: &TlsFiles) -> Result<Acceptor, StartError> {
        use std::sync::Arc;

        use tokio_rustls::rustls::crypto::ring;
        use tokio_rustls::rustls::pki_types::pem::PemObject;
        use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
        use tokio_rustls::rustls::server::ServerConfig;

        let wrong = |path: &std::path::Path, error: &dyn std::fmt::Display| {
            StartError::Tls(format!("{}: {error}", path.display()))
        };
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&files.cert)
            .and_then(Iterator::collect)
            .map_err(|e| wrong(&files.cert, &e))?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| wrong(&files.key, &e))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong(&files.cert, &e))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|e| wrong(&files.cert, &e))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Acceptor::Tls(Arc::new(config).into()))
    }
}
