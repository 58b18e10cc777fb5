//! What does a running router say, over its admin address?

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http::{HeaderMap, Method};
use kvroute_router::EndpointFlag;
use kvroute_router::ask::{AskError, AskLimits, exchange_at};
use serde_json::Value;

use super::Question;

/// Longest snapshot that is taken from a router, in bytes.
pub const SNAPSHOT_BYTES_MAX: usize = 1 << 30;

/// A snapshot may be large, and a prompt long.
const LIMITS: AskLimits = AskLimits {
    answer: Duration::from_secs(120),
    body_bytes_max: SNAPSHOT_BYTES_MAX,
    event_bytes_max: 0,
};

/// The snapshot of the router's fleet, as it is to be kept.
///
/// # Errors
/// The router cannot be reached, or refuses: its index is too large.
pub async fn snapshot(admin: &str) -> anyhow::Result<Vec<u8>> {
    exchange(admin, &Method::GET, "/snapshot", &HeaderMap::new(), &[]).await
}

/// Stands for the newest decision.
const LAST: &str = "last";

/// A real request's decision; `last` is the newest.
///
/// # Errors
/// The router cannot be reached, or keeps no such decision.
pub async fn decision(admin: &str, id: &str) -> anyhow::Result<Value> {
    if id == LAST {
        let last = exchange(admin, &Method::GET, "/decisions?last=1", &HeaderMap::new(), &[]).await;
        let mut last: Vec<Value> = serde_json::from_value(json(&last?)?)?;
        return last.pop().context("the router has decided nothing yet");
    }
    let path = format!("/decisions/{}", encoded(id));
    json(&exchange(admin, &Method::GET, &path, &HeaderMap::new(), &[]).await?)
}

/// Where a request would go.
///
/// # Errors
/// The router cannot be reached, or refuses the request.
pub async fn explain(admin: &str, question: &Question) -> anyhow::Result<Value> {
    let path = question.path.iter().map(|path| format!("path={}", encoded(path)));
    let seed = question.seed.iter().map(|seed| format!("seed={seed:x}"));
    let query: Vec<String> = path.chain(seed).collect();
    let target = format!("/explain?{}", query.join("&"));
    let headers = &question.headers;
    json(&exchange(admin, &Method::POST, &target, headers, &question.body).await?)
}

async fn exchange(
    admin: &str,
    method: &Method,
    target: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let address = resolve(admin).await?;
    let answer = exchange_at(address, method, target, headers, body, &LIMITS).await;
    let answer = answer.map_err(|error| match error {
        AskError::Refused => anyhow!(
            "nobody listens at {admin}: is the router running, and is that its --admin address?"
        ),
        error => anyhow!("the router's admin address {admin} does not answer: {error}"),
    })?;
    if answer.status == 200 {
        return Ok(answer.body);
    }
    let text = String::from_utf8_lossy(&answer.body);
    let said = serde_json::from_str::<Value>(&text).ok();
    let said = said.and_then(|said| Some(said.get("error")?.as_str()?.to_owned()));
    match (answer.status, said) {
        (_, Some(error)) => bail!("{error}"),
        (status, None) => bail!(
            "{admin} answers {status}: it is not the admin address of a router of this version"
        ),
    }
}

async fn resolve(admin: &str) -> anyhow::Result<SocketAddr> {
    let flag: EndpointFlag = admin.parse().map_err(|_| {
        anyhow!("--admin {admin}: write http://HOST:PORT, as `serve --admin` listens")
    })?;
    let mut found = tokio::net::lookup_host((flag.host.as_str(), flag.port))
        .await
        .with_context(|| format!("--admin {admin}: the host cannot be found"))?;
    found.next().with_context(|| format!("--admin {admin}: the host has no address"))
}

fn json(body: &[u8]) -> anyhow::Result<Value> {
    serde_json::from_slice(body).context("the router's answer is not JSON")
}

/// A text within a URL.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes().fold(String::new(), |mut all, byte| {
        match plain(byte) {
            true => all.push(char::from(byte)),
            false => all += &format!("%{byte:02X}"),
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::encoded;

    #[test]
    fn texts_within_urls() {
        assert_eq!(encoded("/v1/chat/completions"), "/v1/chat/completions");
        assert_eq!(encoded("a b&c=d?\u{e9}\r\n"), "a%20b%26c%3Dd%3F%C3%A9%0D%0A");
    }
}
