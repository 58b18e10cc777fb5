//! `session-affinity-scorer`: the endpoint that served the session before is better.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Time;
use crate::fleet::EndpointId;
use crate::lru::Lru;
use crate::settings::Settings;
use crate::stage::{Picked, Plugin, ResponseHeader, Scorer, View};

/// `session-affinity-scorer`: 1 for the endpoint that the session is pinned to, 0 for the others.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionAffinity {
    /// Where the pin is kept.
    pub strategy: Strategy,
    /// For `encoded_endpoint_header`.
    pub encoded_endpoint_header_config: EncodedEndpointHeader,
    /// For `session_id`.
    pub session_id_config: SessionId,
    /// The profile whose pick is pinned; there is one profile, so it has no effect.
    pub profile_name: Option<String>,
    #[serde(skip)]
    pins: Lru<String, Pin>,
    #[serde(skip)]
    pins_max: usize,
}

/// Where the pin of a session is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// In a header that the client sends back.
    #[default]
    EncodedEndpointHeader,
    /// In the router's memory, by session id.
    SessionId,
}

/// Parameters of [`Strategy::EncodedEndpointHeader`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EncodedEndpointHeader {
    /// Carries base64 of `namespace/name`, on requests and responses.
    pub header: String,
}

impl Default for EncodedEndpointHeader {
    fn default() -> EncodedEndpointHeader {
        EncodedEndpointHeader { header: "x-session-token".into() }
    }
}

/// Parameters of [`Strategy::SessionId`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionId {
    /// The first that the request has is its session.
    pub sources: Vec<SessionSource>,
    /// A pin that is not used for this long is forgotten.
    pub eviction_ttl_seconds: u64,
    /// Accepted; pins are checked whenever they are read.
    pub eviction_sweep_seconds: u64,
}

impl Default for SessionId {
    fn default() -> SessionId {
        let header = Some("x-session-id".into());
        SessionId {
            sources: vec![SessionSource { header, attribute: None, producer: None }],
            eviction_ttl_seconds: 300,
            eviction_sweep_seconds: 10,
        }
    }
}

/// Where a session id comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionSource {
    /// A request header.
    pub header: Option<String>,
    /// An attribute that a producer publishes.
    pub attribute: Option<String>,
    /// That producer.
    pub producer: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Pin {
    endpoint: EndpointId,
    used: Time,
}

impl SessionAffinity {
    fn session<'a>(&self, request: &crate::decision::Request<'a>) -> Option<&'a str> {
        let sources = self.session_id_config.sources.iter();
        let mut headers = sources.filter_map(|source| source.header.as_deref());
        headers.find_map(|name| request.headers.get(name)).filter(|id| !id.is_empty())
    }

    fn pinned(&self, view: &View<'_>) -> Option<EndpointId> {
        match self.strategy {
            Strategy::EncodedEndpointHeader => {
                let header = &self.encoded_endpoint_header_config.header;
                let wanted = base64_decode(view.request.headers.get(header)?)?;
                let is_wanted = |name: &str| full_name(name).as_bytes() == wanted;
                let mut rows = view.rows.iter();
                rows.find(|row| view.endpoint(row).is_some_and(|e| is_wanted(e.name.as_str())))
                    .map(|row| row.id)
            }
            Strategy::SessionId => {
                let pin = self.pins.get(self.session(view.request)?)?;
                (view.now.since(pin.used) < self.ttl()).then_some(pin.endpoint)
            }
        }
    }

    fn ttl(&self) -> Duration {
        Duration::from_secs(self.session_id_config.eviction_ttl_seconds)
    }

    fn forget_old(&mut self, now: Time) {
        while let Some((_, pin)) = self.pins.oldest() {
            if now.since(pin.used) < self.ttl() {
                break;
            }
            self.pins.pop_oldest();
        }
    }
}

impl Plugin for SessionAffinity {
    fn check(&self) -> Result<(), String> {
        for source in &self.session_id_config.sources {
            if source.attribute.is_some() || source.producer.is_some() {
                return Err("a session id from a producer's attribute is not available in this \
                            version; use `header`"
                    .into());
            }
            if source.header.is_none() {
                return Err("each of `sources` needs a `header`".into());
            }
        }
        Ok(())
    }

    fn headers(&self) -> Vec<String> {
        let lower = |name: &String| name.to_ascii_lowercase();
        match self.strategy {
            Strategy::EncodedEndpointHeader => {
                vec![lower(&self.encoded_endpoint_header_config.header)]
            }
            Strategy::SessionId => {
                let sources = self.session_id_config.sources.iter();
                sources.filter_map(|source| source.header.as_ref()).map(lower).collect()
            }
        }
    }

    fn prepare(&mut self, settings: &Settings) {
        self.pins_max = settings.sessions_max as usize;
    }

    fn picked(&mut self, picked: &Picked<'_>) -> Option<ResponseHeader> {
        match self.strategy {
            Strategy::EncodedEndpointHeader => {
                let name = self.encoded_endpoint_header_config.header.to_ascii_lowercase();
                let value = base64_encode(full_name(picked.endpoint.name.as_str()).as_bytes());
                Some(ResponseHeader { name, value })
            }
            Strategy::SessionId => {
                self.forget_old(picked.now);
                if let Some(session) = self.session(picked.request) {
                    let pin = Pin { endpoint: picked.endpoint.id, used: picked.now };
                    self.pins.put(session.to_owned(), pin, self.pins_max);
                }
                None
            }
        }
    }

    fn forget(&mut self, id: EndpointId) {
        self.pins.retain(|pin| pin.endpoint != id);
    }
}

impl Scorer for SessionAffinity {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let pinned = self.pinned(view);
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = if pinned == Some(row.id) { 1.0 } else { 0.0 };
        }
    }
}

/// `namespace/name`; an endpoint without a namespace is in `default`.
fn full_name(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("default/{name}") }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64, standard alphabet, padded (RFC 4648 section 4).
fn base64_encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = (0..3).fold(0u32, |bits, i| bits << 8 | u32::from(*chunk.get(i).unwrap_or(&0)));
        for i in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// The inverse; `None` for anything that is not base64.
fn base64_decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let digit = ALPHABET.iter().position(|a| *a == c)?;
        bits = bits << 6 | digit as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn base64_vectors_of_the_standard() {
        let table =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("fooba", "Zm9vYmE=")];
        for (plain, encoded) in table {
            assert_eq!(base64_encode(plain.as_bytes()), encoded);
            assert_eq!(base64_decode(encoded).as_deref(), Some(plain.as_bytes()));
        }
        assert_eq!(base64_decode("Zm9v*"), None);
    }

    #[test]
    fn the_token_of_a_response_pins_the_next_request() {
        let mut fixture = Fixture::new(3);
        let mut scorer = SessionAffinity::default();
        assert_scores(&fixture.score(&mut scorer), &[0.0, 0.0, 0.0]);
        let header = fixture.picked(&mut scorer, 1).unwrap();
        assert_eq!(header.name, "x-session-token");
        assert_eq!(base64_decode(&header.value).unwrap(), b"default/e1");
        fixture.header("x-session-token", &header.value);
        assert_scores(&fixture.score(&mut scorer), &[0.0, 1.0, 0.0]);
        fixture.header("x-session-token", "no base64!");
        assert_scores(&fixture.score(&mut scorer), &[0.0, 0.0, 0.0]);
    }

    #[test]
    fn session_ids_are_remembered_until_they_are_old() {
        let mut fixture = Fixture::new(2);
        let mut scorer = SessionAffinity { strategy: Strategy::SessionId, ..Default::default() };
        scorer.prepare(&Settings { sessions_max: 2, ..Settings::default() });
        fixture.header("x-session-id", "s1");
        assert_scores(&fixture.score(&mut scorer), &[0.0, 0.0]);
        assert_eq!(fixture.picked(&mut scorer, 1), None);
        fixture.now_s(299.0);
        assert_scores(&fixture.score(&mut scorer), &[0.0, 1.0]);
        fixture.now_s(300.0);
        assert_scores(&fixture.score(&mut scorer), &[0.0, 0.0]);
        for session in ["s2", "s3", "s4"] {
            fixture.header("x-session-id", session);
            fixture.picked(&mut scorer, 0);
        }
        assert_eq!(scorer.pins.len(), 2);
        scorer.forget(fixture.id(0));
        assert_eq!(scorer.pins.len(), 0);
    }
}
