//! What is there? A page for whoever opens the address without a path.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response};
use http_body_util::Full;

const TEXT: &str = "\
kvroute

/healthz                 is the process alive
/readyz                  should it get requests, and if not, why
/metrics                 for Prometheus
/endpoints               the fleet: load, models, health
/index                   what is resident where, state of every event stream, cache ledger
/decisions?last=N        why the last requests went where they went
/decisions/{request-id}  why one request did
/snapshot                everything that decisions depend on, for kvroute explain --snapshot
POST /explain?path=P     why a request with this body would go where it would; nothing is sent
";

pub(super) fn answer() -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from_static(TEXT.as_bytes())));
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}
