//! What may a monitor ask, on a port that others reach, too? Numbers and health, no names of
//! requests and nothing of what files say: `/metrics`, `/healthz`, `/readyz`.

use std::net::SocketAddr;
use std::sync::Arc;

use http::header::WWW_AUTHENTICATE;
use http::request::Parts;
use http::{HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use tokio::net::TcpListener;

use super::{Answer, connections, fault, health, look};
use crate::config::MetricsListener;
use crate::shared::Shared;
use crate::tls::Acceptor;
use crate::{Listens, StartError};

/// What is said to who looks for Go's profiles, which llm-d has there.
const NO_PROFILES: &str = "there are no Go profiles of this program; use perf on the process, or \
                           GET /metrics";
const ONLY: &str = "this port has /metrics, /healthz and /readyz; everything else is at the admin \
                    address";

/// A listener for monitors, not yet answering.
pub(crate) struct Monitor {
    listener: TcpListener,
    acceptor: Acceptor,
    refused: Option<String>,
    says_no_profiles: bool,
}

impl Monitor {
    /// Takes the address, if one is wanted; returns it as bound.
    pub async fn bind(
        config: Option<MetricsListener>,
    ) -> Result<Option<(Monitor, SocketAddr)>, StartError> {
        let Some(config) = config else { return Ok(None) };
        let MetricsListener { address, tls, refused, says_no_profiles } = config;
        let acceptor = Acceptor::new(&tls, &["http/1.1"])?;
        let (listener, address) = crate::listen(Listens::Metrics, address).await?;
        Ok(Some((Monitor { listener, acceptor, refused, says_no_profiles }, address)))
    }

    /// How TLS is spoken there, to look after its files.
    pub fn acceptor(&self) -> &Acceptor {
        &self.acceptor
    }

    /// Answers until its task is aborted. Where metrics are refused, nobody is shown them.
    pub async fn serve(self, shared: Arc<Shared>) {
        let refused: Option<Arc<str>> = self.refused.map(Arc::from);
        let says_no_profiles = self.says_no_profiles;
        let answer = move |request: Request<Incoming>| {
            let (shared, refused) = (Arc::clone(&shared), refused.clone());
            let parts = request.into_parts().0;
            async move {
                match says_no_profiles && is_of_profiles(&parts) {
                    true => fault(StatusCode::NOT_IMPLEMENTED, NO_PROFILES),
                    false => answer(&shared, refused.as_deref(), &parts).await,
                }
            }
        };
        connections::serve(self.listener, self.acceptor, answer).await;
    }
}

fn is_of_profiles(asked: &Parts) -> bool {
    let rest = asked.uri.path().strip_prefix("/debug/pprof");
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

async fn answer(shared: &Arc<Shared>, refused: Option<&str>, asked: &Parts) -> Answer {
    if !matches!(asked.method, Method::GET | Method::HEAD) {
        return fault(StatusCode::METHOD_NOT_ALLOWED, "this port is read only; use GET");
    }
    match (asked.uri.path(), refused) {
        ("/metrics", Some(why)) => {
            let mut answer = fault(StatusCode::UNAUTHORIZED, why);
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            answer
        }
        ("/metrics" | "/healthz" | "/readyz", _) => {
            look(shared, asked, health::Details::Counted).await
        }
        _ => fault(StatusCode::NOT_FOUND, ONLY),
    }
}
