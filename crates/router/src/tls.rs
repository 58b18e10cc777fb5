//! How is TLS spoken? By listeners with a certificate of their own or from files, and to pages of
//! metrics as their source says; both if the crate was built with its feature `tls`.

mod connector;
#[cfg(feature = "tls")]
mod server;

use tokio::task::JoinHandle;

use crate::StartError;
use crate::config::{ServerCertificate, ServerTls};
use crate::metrics::Metrics;

pub(crate) use connector::{Tls, TlsStream};

/// What a listener for HTTP/1.1 and HTTP/2 offers by ALPN.
pub(crate) const ALPN_HTTP: &[&str] = &["h2", "http/1.1"];

/// What a listener for gRPC offers.
pub(crate) const ALPN_GRPC: &[&str] = &["h2"];

/// Turns accepted TCP connections into what HTTP is spoken over.
#[derive(Clone)]
pub(crate) enum Acceptor {
    /// Nothing in between.
    Plain,
    /// TLS.
    #[cfg(feature = "tls")]
    Tls(server::Server),
}

impl Acceptor {
    /// Makes the certificate or reads the files. Clients that name protocols, but none of `alpn`,
    /// are refused.
    pub fn new(tls: &ServerTls, alpn: &[&str]) -> Result<Acceptor, StartError> {
        match tls.certificate {
            ServerCertificate::Off => Ok(Acceptor::Plain),
            _ => Acceptor::with_tls(tls, alpn),
        }
    }

    #[cfg(not(feature = "tls"))]
    fn with_tls(_tls: &ServerTls, _alpn: &[&str]) -> Result<Acceptor, StartError> {
        Err(StartError::Tls("this build has no TLS; build with the feature `tls`".to_owned()))
    }

    #[cfg(feature = "tls")]
    fn with_tls(tls: &ServerTls, alpn: &[&str]) -> Result<Acceptor, StartError> {
        server::Server::new(tls, alpn).map(Acceptor::Tls).map_err(StartError::Tls)
    }

    /// From here on failed handshakes are counted. Starts to look after the files, if that is
    /// wanted; ends when the task is aborted.
    #[cfg_attr(not(feature = "tls"), expect(unused_variables, reason = "there are no files"))]
    pub fn watch(&self, metrics: &Metrics) -> Option<JoinHandle<()>> {
        match self {
            Acceptor::Plain => None,
            #[cfg(feature = "tls")]
            Acceptor::Tls(server) => {
                server.count_failures(metrics.tls_handshake_failures.clone());
                let reloads = metrics.certificate_reloads.clone();
                server.files().map(|files| tokio::spawn(files.watch(reloads)))
            }
        }
    }
}
