//! `session-affinity-scorer` and `session-affinity-filter`: back to the endpoint that served the
//! session before.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::decision::Headers;
use crate::fleet::{EndpointId, Name};
use crate::lru::Lru;
use crate::memory::Memory;
use crate::produce::filled;
use crate::settings::Settings;
use crate::stage::{Filter, Inputs, Picked, Plugin, ProducerRef, ResponseHeader, Scorer, View};
use crate::{Rng, Time};

/// Header of the first strategy, unless another is configured.
const ENDPOINT_HEADER: &str = "x-session-token";
/// Header of the second strategy, unless another is configured.
const SESSION_HEADER: &str = "x-session-id";
/// The attribute that needs no producer: whoever finds an agent's session says it under this name.
pub const AGENT_IDENTITY: &str = "agent-identity";
/// Seconds for which a pin is remembered, unless configured otherwise.
const TTL_SECONDS: f64 = 300.0;
/// Seconds between sweeps of llm-d, unless configured otherwise.
const SWEEP_SECONDS: f64 = 10.0;

/// Parameters of `session-affinity-scorer`, `session-affinity-filter` and
/// `multicluster-session-affinity-filter`. A session is pinned to the endpoint that served it
/// last. The scorer gives that endpoint 1 and the others 0; the filter keeps that endpoint alone.
/// A request without a session, or whose endpoint is no candidate, is placed as any other: the
/// scorer gives all 0, the filter keeps all.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionAffinity {
    /// Where the pin is kept.
    pub strategy: Strategy,
    /// For the strategy `encoded_endpoint_header`.
    pub encoded_endpoint_header_config: EncodedEndpointHeader,
    /// For the strategy `session_id`.
    pub session_id_config: SessionId,
    /// The profile whose endpoint is pinned, as `prefill`; when left out, the endpoint that
    /// answers the client.
    pub profile_name: Option<String>,
    #[serde(skip)]
    pins: Lru<String, Pin>,
    #[serde(skip)]
    pins_max: usize,
}

/// Where the pin of a session is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// In a header of the response, which the client sends back with its next request.
    #[default]
    #[serde(alias = "")]
    EncodedEndpointHeader,
    /// In the router's memory, by session id.
    SessionId,
}

/// Parameters of [`Strategy::EncodedEndpointHeader`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EncodedEndpointHeader {
    /// Carries base64 of `namespace/name` of the endpoint, on requests and responses.
    pub header: String,
}

impl Default for EncodedEndpointHeader {
    fn default() -> EncodedEndpointHeader {
        EncodedEndpointHeader { header: ENDPOINT_HEADER.into() }
    }
}

/// Parameters of [`Strategy::SessionId`].
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionId {
    /// Where the session's id comes from; the first that the request has counts. When left out or
    /// empty: the header `x-session-id`.
    pub sources: Vec<SessionSource>,
    /// Seconds after which a pin that is not used is forgotten; 0: 300.
    pub eviction_ttl_seconds: f64,
    /// Accepted; pins are checked whenever they are read.
    pub eviction_sweep_seconds: f64,
}

impl Default for SessionId {
    fn default() -> SessionId {
        SessionId {
            sources: Vec::new(),
            eviction_ttl_seconds: TTL_SECONDS,
            eviction_sweep_seconds: SWEEP_SECONDS,
        }
    }
}

/// Where a session id comes from: a header or an attribute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionSource {
    /// A request header.
    pub header: Option<String>,
    /// What a plugin says about the request: `SessionIDDataKey` of a session id producer, or
    /// `agent-identity`.
    pub attribute: Option<String>,
    /// The name of that plugin; `agent-identity` needs none.
    pub producer: Option<String>,
}

/// One source, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source<'a> {
    Header(&'a str),
    Producer(&'a str),
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Pin {
    endpoint: EndpointId,
    used: Time,
}

impl SessionSource {
    fn read(&self) -> Result<Source<'_>, &'static str> {
        match (filled(&self.header), filled(&self.attribute), filled(&self.producer)) {
            (Some(header), None, None) => Ok(Source::Header(header)),
            (Some(_), None, Some(_)) => Err("has a header and a producer; drop one"),
            (None, Some(attribute), None) if attribute.contains('/') => {
                Err("has an attribute with a slash; write its two parts as attribute and producer")
            }
            (None, Some(attribute), producer) => {
                Ok(Source::Producer(producer.unwrap_or(attribute)))
            }
            _ => Err("needs exactly one of header and attribute"),
        }
    }
}

impl SessionId {
    fn sources(&self) -> impl Iterator<Item = Source<'_>> {
        let default = self.sources.is_empty().then_some(Source::Header(SESSION_HEADER));
        self.sources.iter().filter_map(|source| source.read().ok()).chain(default)
    }

    fn session<'a>(
        &self,
        headers: &Headers<'a>,
        sessions: &'a [(Name, String)],
    ) -> Option<&'a str> {
        let mut found = self.sources().filter_map(|source| match source {
            Source::Header(name) => headers.get(name),
            Source::Producer(name) => {
                let told = sessions.iter().find(|(producer, _)| producer.as_str() == name);
                told.map(|(_, id)| id.as_str())
            }
        });
        found.find_map(|id| Some(id.trim()).filter(|id| !id.is_empty()))
    }

    fn ttl(&self) -> Duration {
        let seconds = self.eviction_ttl_seconds;
        let seconds = if seconds > 0.0 { seconds } else { TTL_SECONDS };
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn check(&self) -> Result<(), String> {
        for (at, source) in self.sources.iter().enumerate() {
            source.read().map_err(|why| format!("sessionIdConfig.sources[{at}] {why}"))?;
        }
        for (name, seconds) in [
            ("evictionTtlSeconds", self.eviction_ttl_seconds),
            ("evictionSweepSeconds", self.eviction_sweep_seconds),
        ] {
            if seconds.is_nan() || seconds < 0.0 {
                return Err(format!("sessionIdConfig.{name} {seconds} must not be negative"));
            }
        }
        Ok(())
    }
}

impl EncodedEndpointHeader {
    fn name(&self) -> &str {
        match self.header.trim() {
            "" => ENDPOINT_HEADER,
            name => name,
        }
    }
}

impl SessionAffinity {
    fn pinned(&self, view: &View<'_>) -> Option<EndpointId> {
        let headers = view.request.headers;
        match self.strategy {
            Strategy::EncodedEndpointHeader => {
                let token = headers.get(self.encoded_endpoint_header_config.name())?;
                let wanted = base64_decode(token.trim())?;
                let is_wanted = |name: &str| full_name(name).as_bytes() == wanted;
                let mut rows = view.rows.iter();
                rows.find(|row| view.endpoint(row).is_some_and(|e| is_wanted(e.name.as_str())))
                    .map(|row| row.id)
            }
            Strategy::SessionId => {
                let config = &self.session_id_config;
                let pin = self.pins.get(config.session(headers, view.sessions)?)?;
                (view.now.since(pin.used) < config.ttl()).then_some(pin.endpoint)
            }
        }
    }

    fn forget_old(&mut self, now: Time) {
        let ttl = self.session_id_config.ttl();
        while let Some((_, pin)) = self.pins.oldest() {
            if now.since(pin.used) < ttl {
                break;
            }
            self.pins.pop_oldest();
        }
    }

    /// Whether the endpoint that a profile chose is the one that is pinned.
    fn is_pinned(&self, picked: &Picked<'_>) -> bool {
        filled(&self.profile_name).map_or(picked.primary, |profile| picked.profile == profile)
    }
}

impl Plugin for SessionAffinity {
    fn inputs(&self) -> Inputs<'_> {
        let sources = self.session_id_config.sources.iter();
        let producer = sources.filter_map(|source| filled(&source.producer)).next();
        let producer = producer.filter(|_| self.strategy == Strategy::SessionId);
        Inputs { session: producer.map(ProducerRef::Named), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        self.session_id_config.check()
    }

    fn headers(&self) -> Vec<String> {
        match self.strategy {
            Strategy::EncodedEndpointHeader => {
                vec![self.encoded_endpoint_header_config.name().to_ascii_lowercase()]
            }
            Strategy::SessionId => {
                let headers = self.session_id_config.sources().filter_map(|source| match source {
                    Source::Header(name) => Some(name.to_ascii_lowercase()),
                    Source::Producer(_) => None,
                });
                headers.collect()
            }
        }
    }

    fn inert(&self) -> Vec<String> {
        let (ids, header) = (&self.session_id_config, &self.encoded_endpoint_header_config);
        let by_id = self.strategy == Strategy::SessionId;
        let swept = ids.eviction_sweep_seconds;
        let nobody = |source: &SessionSource| {
            let bare = filled(&source.producer).is_none();
            filled(&source.attribute).is_some_and(|name| bare && name != AGENT_IDENTITY)
        };
        [
            (
                by_id && ids.sources.iter().any(nobody),
                "sessionIdConfig.sources: an attribute other than agent-identity needs a producer",
            ),
            (
                !by_id && *ids != SessionId::default(),
                "sessionIdConfig: the strategy is encoded_endpoint_header",
            ),
            (
                by_id && *header != EncodedEndpointHeader::default(),
                "encodedEndpointHeaderConfig: the strategy is session_id",
            ),
            (
                by_id && swept != SWEEP_SECONDS && swept != 0.0,
                "sessionIdConfig.evictionSweepSeconds: pins are checked whenever they are read",
            ),
        ]
        .into_iter()
        .filter(|(given, _)| *given)
        .map(|(_, text)| text.to_owned())
        .collect()
    }

    fn prepare(&mut self, settings: &Settings) {
        self.pins_max = settings.sessions_max as usize;
    }

    fn picked(&mut self, picked: &Picked<'_>) -> Option<ResponseHeader> {
        if !self.is_pinned(picked) {
            return None;
        }
        match self.strategy {
            Strategy::EncodedEndpointHeader => {
                let name = self.encoded_endpoint_header_config.name().to_ascii_lowercase();
                let value = base64_encode(full_name(picked.endpoint.name.as_str()).as_bytes());
                Some(ResponseHeader { name, value })
            }
            Strategy::SessionId => {
                self.forget_old(picked.now);
                let headers = picked.request.headers;
                let session = self.session_id_config.session(headers, picked.sessions);
                if let Some(session) = session {
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

    fn memory(&self) -> Memory {
        let pins = self.pins.iter();
        Memory::Sessions(pins.map(|(id, pin)| (id.clone(), pin.endpoint, pin.used)).collect())
    }

    fn recall(&mut self, memory: &Memory) {
        if let Memory::Sessions(sessions) = memory {
            self.pins = Lru::default();
            for (session, endpoint, used) in sessions {
                let pin = Pin { endpoint: *endpoint, used: *used };
                self.pins.put(session.clone(), pin, self.pins_max);
            }
        }
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

impl Filter for SessionAffinity {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        let Some(pinned) = self.pinned(view) else { return };
        if view.rows.iter().any(|row| row.id == pinned) {
            for (row, keep) in view.rows.iter().zip(keep) {
                *keep = row.id == pinned;
            }
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

    fn by_id(sources: &[SessionSource]) -> SessionAffinity {
        let session_id_config = SessionId { sources: sources.to_vec(), ..SessionId::default() };
        let mut plugin = SessionAffinity {
            strategy: Strategy::SessionId,
            session_id_config,
            ..SessionAffinity::default()
        };
        plugin.prepare(&Settings { sessions_max: 2, ..Settings::default() });
        plugin
    }

    fn source(
        header: Option<&str>,
        attribute: Option<&str>,
        producer: Option<&str>,
    ) -> SessionSource {
        let [header, attribute, producer] =
            [header, attribute, producer].map(|text| text.map(str::to_owned));
        SessionSource { header, attribute, producer }
    }

    /// What the scorer gives, and whom the filter keeps.
    fn check(fixture: &Fixture, plugin: &mut SessionAffinity, pinned: Option<usize>) {
        let all = 0..fixture.score(plugin).len();
        let scores: Vec<f64> =
            all.clone().map(|at| if pinned == Some(at) { 1.0 } else { 0.0 }).collect();
        assert_scores(&fixture.score(plugin), &scores);
        let kept: Vec<bool> = all.map(|at| pinned.is_none_or(|pinned| pinned == at)).collect();
        assert_eq!(fixture.filter(plugin), kept);
    }

    #[test]
    fn the_token_of_a_response_pins_the_next_request() {
        let mut fixture = Fixture::new(3);
        let mut plugin = SessionAffinity::default();
        check(&fixture, &mut plugin, None);
        let header = fixture.picked(&mut plugin, 1).unwrap();
        assert_eq!(header.name, "x-session-token");
        assert_eq!(base64_decode(&header.value).unwrap(), b"default/e1");
        fixture.header("X-Session-Token", &header.value);
        check(&fixture, &mut plugin, Some(1));
        let mut gone = fixture.clone();
        gone.drop_row(1);
        check(&gone, &mut plugin, None);
        for unreadable in ["no base64!", "", "ZTE="] {
            fixture.header("x-session-token", unreadable);
            check(&fixture, &mut plugin, None);
        }
        check(&Fixture::new(0), &mut plugin, None);
    }

    #[test]
    fn session_ids_are_remembered_until_they_are_old() {
        let mut fixture = Fixture::new(2);
        let mut plugin = by_id(&[]);
        fixture.header("x-session-id", " s1 ");
        check(&fixture, &mut plugin, None);
        assert_eq!(fixture.picked(&mut plugin, 1), None);
        fixture.header("x-session-id", "s1");
        fixture.now_s(299.0);
        check(&fixture, &mut plugin, Some(1));
        fixture.now_s(300.0);
        check(&fixture, &mut plugin, None);
        for session in ["s2", "s3", "s4"] {
            fixture.header("x-session-id", session);
            fixture.picked(&mut plugin, 0);
        }
        assert_eq!(plugin.pins.len(), 2);
        plugin.forget(fixture.id(0));
        assert_eq!(plugin.pins.len(), 0);
        fixture.header("x-session-id", "  ");
        fixture.picked(&mut plugin, 0);
        assert_eq!(plugin.pins.len(), 0);
    }

    #[test]
    fn the_first_source_that_the_request_has_counts() {
        let mut plugin = by_id(&[
            source(Some("X-A"), None, None),
            source(None, Some("SessionIDDataKey"), Some("cookies")),
            source(None, Some("agent-identity"), None),
        ]);
        assert_eq!(plugin.headers(), ["x-a"]);
        assert_eq!(plugin.inputs().session, Some(ProducerRef::Named("cookies")));
        assert_eq!(by_id(&[]).inputs().session, None);
        assert_eq!(by_id(&[]).headers(), ["x-session-id"]);
        let mut fixture = Fixture::new(3);
        fixture.session("cookies", "s1");
        fixture.picked(&mut plugin, 1);
        fixture.session("agent-identity", "s2");
        fixture.picked(&mut plugin, 2);
        check(&fixture, &mut plugin, Some(2));
        fixture.header("x-a", "s1");
        check(&fixture, &mut plugin, Some(1));
        fixture.session("another", "s2");
        fixture.header("x-b", "s2");
        check(&fixture, &mut plugin, None);
    }

    #[test]
    fn one_profile_is_pinned() {
        let mut fixture = Fixture::new(3);
        fixture.header("x-session-id", "s");
        let prefill = Some("prefill".to_owned());
        let mut prefilling = SessionAffinity { profile_name: prefill, ..by_id(&[]) };
        let mut answering = by_id(&[]);
        for plugin in [&mut prefilling, &mut answering] {
            fixture.picked_as(plugin, 2, "decode", true);
            fixture.picked_as(plugin, 0, "prefill", false);
            fixture.picked_as(plugin, 1, "encode", false);
        }
        check(&fixture, &mut prefilling, Some(0));
        check(&fixture, &mut answering, Some(2));
        let mut token = SessionAffinity::default();
        assert!(fixture.picked_as(&mut token, 0, "prefill", false).is_none());
        assert!(fixture.picked_as(&mut token, 2, "decode", true).is_some());
    }

    #[test]
    fn sources_and_times_that_make_no_sense_are_refused() {
        let table = [
            (source(Some("x-a"), None, None), true),
            (source(None, Some("SessionIDDataKey"), Some("session-id-producer")), true),
            (source(None, Some("agent-identity"), None), true),
            (source(None, None, None), false),
            (source(Some(" "), None, None), false),
            (source(Some("x-a"), Some("agent-identity"), None), false),
            (source(Some("x-a"), None, Some("session-id-producer")), false),
            (source(None, None, Some("session-id-producer")), false),
            (source(None, Some("SessionIDDataKey/session-id-producer"), None), false),
        ];
        for (source, is_good) in table {
            assert_eq!(by_id(std::slice::from_ref(&source)).check().is_ok(), is_good, "{source:?}");
        }
        let mut plugin = by_id(&[]);
        plugin.session_id_config.eviction_ttl_seconds = 0.0;
        assert!(plugin.check().is_ok());
        assert_eq!(plugin.session_id_config.ttl(), Duration::from_secs(300));
        plugin.session_id_config.eviction_ttl_seconds = 0.5;
        assert_eq!(plugin.session_id_config.ttl(), Duration::from_millis(500));
        plugin.session_id_config.eviction_ttl_seconds = -1.0;
        assert!(plugin.check().is_err());
        plugin.session_id_config.eviction_ttl_seconds = f64::INFINITY;
        assert_eq!(plugin.session_id_config.ttl(), Duration::MAX);
    }

    #[test]
    fn parameters_without_effect_are_named() {
        assert!(by_id(&[]).inert().is_empty());
        assert!(SessionAffinity::default().inert().is_empty());
        let unused = by_id(&[source(Some("x-a"), None, None)]);
        let unused = SessionAffinity { strategy: Strategy::EncodedEndpointHeader, ..unused };
        assert!(unused.inert()[0].starts_with("sessionIdConfig"));
        let mut plugin = by_id(&[]);
        plugin.session_id_config.eviction_sweep_seconds = 60.0;
        plugin.encoded_endpoint_header_config.header = "x-b".into();
        plugin.session_id_config.sources = vec![source(None, Some("SessionIDDataKey"), None)];
        assert_eq!(plugin.inert().len(), 3);
        let agents = by_id(&[source(None, Some("agent-identity"), None)]);
        assert!(agents.inert().is_empty());
        assert_eq!(agents.inputs().session, None);
    }
}
