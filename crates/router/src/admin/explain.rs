//! `POST /explain` and `GET /snapshot`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::sync::OwnedSemaphorePermit;

use super::{Answer, fault, json};
use crate::explain::{Question, explain as explain_question, snapshot as take_snapshot};
use crate::shared::Shared;

/// The body is a client's request body, its headers the client's headers; `path=` in the query
/// names the path that the client would post to, `seed=` the decision's seed (hexadecimal, as
/// decisions show it).
pub(super) async fn explain(shared: &Arc<Shared>, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default();
    let (path, seed) = match asked(query) {
        Ok(asked) => asked,
        Err(text) => return fault(StatusCode::BAD_REQUEST, &text),
    };
    let settings = &shared.settings;
    let patience = Duration::from_secs(u64::from(settings.client_body_timeout_s.max(1)));
    let body = Limited::new(body, settings.body_bytes_max).collect();
    let body = match tokio::time::timeout(patience, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => {
            let max = settings.body_bytes_max;
            let text = format!("{error}: at most {max} bytes (kvroute.body_bytes_max)");
            return fault(StatusCode::PAYLOAD_TOO_LARGE, &text);
        }
        Err(_) => return fault(StatusCode::REQUEST_TIMEOUT, "the body did not arrive"),
    };
    let question = Question { path, headers: parts.headers, body, seed };
    match explain_question(shared, shared.clock.now(), question).await {
        Ok(explained) => json(StatusCode::OK, &explained),
        Err(error) => fault(error.status(), &error.to_string()),
    }
}

/// `path=` and `seed=` of a query.
fn asked(query: &str) -> Result<(Option<String>, Option<u64>), String> {
    let (mut path, mut seed) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("path", value)) => path = Some(decoded(value)),
            Some(("seed", value)) => {
                let number = u64::from_str_radix(value, 16);
                seed = Some(number.map_err(|_| format!("seed={value} is not hexadecimal"))?);
            }
            _ => return Err(format!("`{pair}` means nothing here; write ?path=P or &seed=HEX")),
        }
    }
    Ok((path, seed))
}

/// A text that was written with `%XX` within a URL; what is no such sign stays as it is.
pub(super) fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let [first, after @ ..] = rest {
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        match (*first, digit(0).zip(digit(1))) {
            (b'%', Some((high, low))) => {
                bytes.push((high << 4 | low) as u8);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A text that keeps a place until it is sent.
struct Held {
    text: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

/// Written on a thread where it stalls nobody. The place is given back when the client has all of
/// it, or has gone.
pub(super) async fn snapshot(shared: &Arc<Shared>, place: OwnedSemaphorePermit) -> Answer {
    let there = Arc::clone(shared);
    let work = tokio::task::spawn_blocking(move || {
        let snapshot = take_snapshot(&there).map_err(|error| error.to_string())?;
        Ok::<_, String>(serde_json::to_vec(&snapshot).map(|text| Held { text, _place: place }))
    });
    match work.await {
        Ok(Ok(Ok(held))) => {
            let mut answer = Response::new(Full::new(Bytes::from_owner(held)));
            let kind = HeaderValue::from_static("application/json");
            answer.headers_mut().insert(CONTENT_TYPE, kind);
            answer
        }
        Ok(Err(too_large)) => fault(StatusCode::PAYLOAD_TOO_LARGE, &too_large),
        Ok(Ok(Err(error))) => fault(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::{asked, decoded};

    #[test]
    fn texts_within_urls() {
        assert_eq!(decoded("a%20b%C3%A9%"), "a b\u{e9}%");
        assert_eq!(decoded("%2g%zz%4"), "%2g%zz%4");
    }

    #[test]
    fn queries() {
        let path = "/v1/completions".to_owned();
        assert_eq!(asked(""), Ok((None, None)));
        assert_eq!(asked("path=/v1/completions&seed=ff"), Ok((Some(path.clone()), Some(255))));
        assert_eq!(asked("path=%2Fv1%2Fcompletions"), Ok((Some(path), None)));
        assert!(asked("seed=xyz").unwrap_err().contains("hexadecimal"));
        assert!(asked("sed=1").unwrap_err().contains("sed=1"));
    }
}
