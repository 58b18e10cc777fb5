//! What does a router need to be told? Everything that is not part of the scheduling plan.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use kvroute_core::filter::LabelSelector;
use kvroute_core::plan::Plan;
use kvroute_core::produce::SOCKET_PORT;
use kvroute_tokens::Tokenizer;
use thiserror::Error;

pub use tls::{CipherSuite, ServerCertificate, ServerTls, TlsFiles, TlsNameError, TlsVersion};

mod tls;

/// How to start a router. All limits are in `plan`'s settings.
#[derive(Debug)]
pub struct RouterConfig {
    /// How requests are scheduled, and every limit.
    pub plan: Plan,
    /// Text of the configuration that the plan was built from, for recordings and snapshots;
    /// empty: the built-in one.
    pub config: String,
    /// Seed of tie-breaks.
    pub seed: u64,
    /// Where clients connect to the embedded proxy; port 0 picks a free one. `None`: there is
    /// none.
    pub http: Option<SocketAddr>,
    /// Where Envoy connects.
    pub ext_proc: Option<ExtProcConfig>,
    /// Metrics, health, decisions, index; port 0 picks a free one. Whoever reaches this address
    /// can read model names and request ids, so keep it on loopback or a private network.
    /// `None`: there is no such address.
    pub admin: Option<SocketAddr>,
    /// A further address for monitors alone.
    pub metrics: Option<MetricsListener>,
    /// Endpoints by URL.
    pub endpoints: Vec<EndpointFlag>,
    /// Endpoints in a file (llm-d's file-discovery format), read again when it changes.
    pub endpoints_file: Option<PathBuf>,
    /// A source of endpoints that is wanted and cannot be asked: what it is, and what to do. The
    /// router is never ready then, whatever else it knows.
    pub endpoints_missing: Option<String>,
    /// Where KV events come from.
    pub events: EventsConfig,
    /// Tokenizers of the served models.
    pub tokenizers: Tokenizers,
    /// Model that requests without a `model` field mean.
    pub default_model: Option<String>,
    /// Serve clients over TLS.
    pub tls: Option<TlsFiles>,
    /// Record everything that decides, for a replay.
    pub record: Option<Record>,
    /// Publish llm-d's names of metrics beside our own.
    pub upstream_metric_names: Option<UpstreamNames>,
}

/// How Envoy, or another data plane, is answered over ext_proc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtProcConfig {
    /// Where it connects; port 0 picks a free one.
    pub address: SocketAddr,
    /// A second listener, without TLS, for gRPC health checks alone.
    pub health: Option<SocketAddr>,
    /// How the first one speaks TLS.
    pub tls: ServerTls,
    /// What a data plane says about the endpoints that a request is for does not count.
    pub ignore_subset_hints: bool,
    /// Tell every candidate's score in the metadata.
    pub emit_scores: bool,
    /// Answers name their endpoint to clients, in `x-kvroute-endpoint`.
    pub endpoint_header: bool,
    /// A drain lasts its whole time even if no proxy is connected: one may come back that has not
    /// heard yet that it should ask elsewhere.
    pub drains_in_full: bool,
}

impl ExtProcConfig {
    /// In plain text, with the protocol's defaults.
    pub fn plain(address: SocketAddr) -> ExtProcConfig {
        ExtProcConfig {
            address,
            health: None,
            tls: ServerTls::default(),
            ignore_subset_hints: false,
            emit_scores: false,
            endpoint_header: true,
            drains_in_full: false,
        }
    }
}

/// llm-d's metrics, `llm_d_epp_*`, for dashboards that were made for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamNames {
    /// Label `name` of the gauges of the whole fleet.
    pub pool: String,
    /// Also those of ext_proc streams (`--enable-grpc-stream-metrics`).
    pub streams: bool,
}

impl Default for UpstreamNames {
    /// The pool is called as llm-d calls one without a name.
    fn default() -> UpstreamNames {
        UpstreamNames { pool: "epp".to_owned(), streams: false }
    }
}

/// An address with metrics and health and nothing else, so that others may reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsListener {
    /// Port 0 picks a free one.
    pub address: SocketAddr,
    /// How TLS is spoken there.
    pub tls: ServerTls,
    /// Nobody is shown metrics (401), and this is why; health is shown to everybody who can
    /// connect.
    pub refused: Option<String>,
    /// `/debug/pprof` says what to use in place of Go's profiles (501); else there is no such path.
    pub says_no_profiles: bool,
}

/// A recording of all that the core hears and decides; see `kvroute_core::journal`. It holds no
/// text of prompts, but their token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// A new file; one that exists is refused.
    pub file: PathBuf,
}

/// Where do the KV events of all endpoints come from?
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventsConfig {
    /// Of endpoints that do not say it themselves.
    pub source: EventsSource,
    /// Only endpoints with these labels have that source; `None`: all.
    pub selector: Option<LabelSelector>,
    /// Where engines connect to the router.
    pub bound: Option<BoundSocket>,
}

/// A socket of the router that engines connect to. What a message is about stands in its topic,
/// `kv@ADDRESS@MODEL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundSocket {
    /// A name or an address of this host; `*` is every address.
    pub host: String,
    /// 0 picks a free one.
    pub port: u16,
    /// What topics must begin with.
    pub topic_filter: String,
}

impl EventsConfig {
    /// What the precise producer's `kvEventsConfig` says.
    pub fn planned(plan: &Plan) -> EventsConfig {
        let Some(precise) = plan.precise_producer() else { return EventsConfig::default() };
        let events = &precise.kv_events_config;
        let bound = events.bound().map(|(host, port)| BoundSocket {
            host: host.to_owned(),
            port,
            topic_filter: events.topic_filter().to_owned(),
        });
        let pods = &events.pod_discovery_config;
        let replay = pods.replay_port();
        let source = match (events.discovers(), pods.socket_port) {
            (true, Some(port)) => EventsSource::Ports { events: port, replay },
            (true, None) => EventsSource::Ask { events: SOCKET_PORT, replay },
            (false, _) if bound.is_some() => EventsSource::Bound,
            (false, _) => EventsSource::Off,
        };
        EventsConfig { source, selector: events.selector(), bound }
    }

    /// The source of an endpoint that does not say it itself.
    pub fn of(&self, labels: &BTreeMap<String, String>) -> EventsSource {
        match &self.selector {
            Some(selector) if !selector.matches(labels) => match self.bound {
                Some(_) => EventsSource::Bound,
                None => EventsSource::Unselected,
            },
            _ => self.source.clone(),
        }
    }
}

impl From<EventsSource> for EventsConfig {
    fn from(source: EventsSource) -> EventsConfig {
        EventsConfig { source, ..EventsConfig::default() }
    }
}

/// Where an endpoint publishes its KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventsSource {
    /// Nowhere: its cache is known only by what was routed to it.
    Off,
    /// Nowhere, because its labels do not match `podLabelSelector`.
    Unselected,
    /// It connects to the router's own socket.
    Bound,
    /// Ask the engine (`GET /kv_event_sources`, vLLM 0.32 and later). One that does not know the
    /// question is expected at fixed ports, as with `Ports`.
    Ask {
        /// First port of the publishers.
        events: u16,
        /// First port of the replay sockets, also of engines that tell of none.
        replay: Option<u16>,
    },
    /// At fixed ports of the endpoint's host, the rank added to each.
    Ports {
        /// First port of the publishers.
        events: u16,
        /// First port of the replay sockets.
        replay: Option<u16>,
    },
    /// At these addresses.
    At {
        /// Publisher, `HOST:PORT`.
        events: String,
        /// Replay socket, `HOST:PORT`.
        replay: Option<String>,
    },
}

impl Default for EventsSource {
    /// The engine is asked; one that cannot tell is expected at llm-d's port.
    fn default() -> EventsSource {
        EventsSource::Ask { events: SOCKET_PORT, replay: None }
    }
}

/// Which tokenizer belongs to which model?
#[derive(Clone, Default)]
pub struct Tokenizers {
    /// For models without one of their own.
    pub default: Option<Tokenizer>,
    /// By model name; an adapter uses that of its base model.
    pub by_model: BTreeMap<String, Tokenizer>,
}

impl fmt::Debug for Tokenizers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let models: Vec<&str> = self.by_model.keys().map(String::as_str).collect();
        let default = self.default.is_some();
        f.debug_struct("Tokenizers").field("default", &default).field("by_model", &models).finish()
    }
}

/// An endpoint as typed: `URL[,events=tcp://HOST:PORT][,replay=tcp://HOST:PORT][,rank=N]`
/// `[,label.KEY=VALUE]...`; the URL is `http://HOST[:PORT][/]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointFlag {
    /// Name or address; a name stands for all its addresses.
    pub host: String,
    /// Port of the HTTP server; 80 when the URL has none.
    pub port: u16,
    /// Data parallel rank.
    pub rank: u32,
    /// Labels for filters.
    pub labels: BTreeMap<String, String>,
    /// Where its KV events come from; `None`: as the router's configuration says.
    pub events: Option<EventsSource>,
}

/// What is wrong with an [`EndpointFlag`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EndpointFlagError {
    /// Not `http://HOST[:PORT]`.
    #[error("`{0}` is not an endpoint; write http://HOST:PORT (engines are reached without TLS)")]
    Url(String),
    /// Not one of the known options.
    #[error("`{0}` is not an option of an endpoint; valid: events= replay= rank= label.KEY=")]
    Option(String),
    /// A value that cannot be read.
    #[error("`{0}` has a wrong value; events and replay take tcp://HOST:PORT, rank a number")]
    Value(String),
    /// A replay socket without a publisher.
    #[error("`replay=` needs `events=` beside it")]
    ReplayAlone,
}

impl FromStr for EndpointFlag {
    type Err = EndpointFlagError;

    fn from_str(text: &str) -> Result<EndpointFlag, EndpointFlagError> {
        let mut parts = text.split(',');
        let (host, port) = host_port_of_url(parts.next().unwrap_or_default())?;
        let (mut rank, mut labels) = (0, BTreeMap::new());
        let (mut events, mut replay) = (None, None);
        for part in parts {
            let wrong = || EndpointFlagError::Value(part.to_owned());
            match part.split_once('=') {
                Some(("events", value)) => events = Some(tcp_address(value).ok_or_else(wrong)?),
                Some(("replay", value)) => replay = Some(tcp_address(value).ok_or_else(wrong)?),
                Some(("rank", value)) => rank = value.parse().map_err(|_| wrong())?,
                Some((key, value)) if key.len() > 6 && key.starts_with("label.") => {
                    labels.insert(key[6..].to_owned(), value.to_owned());
                }
                _ => return Err(EndpointFlagError::Option(part.to_owned())),
            }
        }
        let events = match (events, replay) {
            (Some(events), replay) => Some(EventsSource::At { events, replay }),
            (None, Some(_)) => return Err(EndpointFlagError::ReplayAlone),
            (None, None) => None,
        };
        Ok(EndpointFlag { host, port, rank, labels, events })
    }
}

impl fmt::Display for EndpointFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

fn host_port_of_url(url: &str) -> Result<(String, u16), EndpointFlagError> {
    let wrong = || EndpointFlagError::Url(url.to_owned());
    let rest = match url.split_once("://") {
        Some(("http", rest)) => rest,
        Some(_) => return Err(wrong()),
        None => url,
    };
    let authority: http::uri::Authority =
        rest.strip_suffix('/').unwrap_or(rest).parse().map_err(|_| wrong())?;
    if authority.as_str().contains('@') || authority.host().is_empty() {
        return Err(wrong());
    }
    // `host()` keeps the brackets of an IPv6 address, which resolvers do not take.
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let has_port = authority.as_str().len() > authority.host().len();
    let port = match authority.port_u16() {
        Some(port) => port,
        None if has_port => return Err(wrong()),
        None => 80,
    };
    if port == 0 { Err(wrong()) } else { Ok((host, port)) }
}

/// `HOST:PORT` of `tcp://HOST:PORT`; `*` as host means nothing to one who connects.
pub(crate) fn tcp_address(text: &str) -> Option<String> {
    let rest = text.strip_prefix("tcp://").unwrap_or(text);
    let (host, port) = rest.rsplit_once(':')?;
    let valid = !host.is_empty() && host != "*" && port.parse::<u16>().is_ok_and(|p| p > 0);
    valid.then(|| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use kvroute_core::config::EndpointPickerConfig;
    use kvroute_core::plan::Experimental;

    use super::*;

    fn planned(events: &str) -> EventsConfig {
        let config: EndpointPickerConfig = serde_json::from_str(&format!(
            r#"{{"plugins": [{{"type": "precise-prefix-cache-producer", "parameters":
                {{"kvEventsConfig": {events}}}}}]}}"#
        ))
        .unwrap();
        EventsConfig::planned(&Plan::build(&config, Experimental::Refused).unwrap())
    }

    #[test]
    fn a_plan_says_where_events_come_from() {
        let pods = |text: &str| planned(&format!(r#"{{"podDiscoveryConfig": {{{text}}}}}"#));
        let ask = |replay| EventsSource::Ask { events: 5557, replay };
        assert_eq!(planned("{}"), EventsConfig::default());
        assert_eq!(pods(r#""replaySocketPort": 7"#).source, ask(Some(7)));
        assert_eq!(pods(r#""replaySocketPort": 0"#).source, ask(None));
        let ports = EventsSource::Ports { events: 5557, replay: Some(6) };
        assert_eq!(pods(r#""socketPort": 5557, "replaySocketPort": 6"#).source, ports);
        assert_eq!(planned(r#"{"discoverPods": false}"#).source, EventsSource::Off);
        let bound = planned(r#"{"discoverPods": false, "zmqEndpoint": "tcp://*:9"}"#);
        assert_eq!(bound.source, EventsSource::Bound);
        let socket = BoundSocket { host: "*".into(), port: 9, topic_filter: "kv@".into() };
        assert_eq!(bound.bound, Some(socket));
        let without = EventsConfig::planned(&Plan::baseline_round_robin());
        assert_eq!(without, EventsConfig::default());
    }

    #[test]
    fn labels_choose_who_is_subscribed_to() {
        let labels = |value: &str| [("serves".to_owned(), value.to_owned())].into();
        let selector = r#""podDiscoveryConfig": {"podLabelSelector": "serves=yes"}"#;
        let own = planned(&format!("{{{selector}}}"));
        assert_eq!(own.of(&labels("yes")), EventsSource::default());
        assert_eq!(own.of(&labels("no")), EventsSource::Unselected);
        assert_eq!(own.of(&BTreeMap::new()), EventsSource::Unselected);
        let both = planned(&format!(r#"{{"zmqEndpoint": "tcp://*:9", {selector}}}"#));
        assert_eq!(both.of(&labels("yes")), EventsSource::default());
        assert_eq!(both.of(&labels("no")), EventsSource::Bound);
    }

    #[test]
    fn endpoints_as_typed() {
        let table = [
            ("http://gpu1:8000", "gpu1", 8000),
            ("http://10.0.0.1:8000/", "10.0.0.1", 8000),
            ("http://[::1]:9", "::1", 9),
            ("gpu1:8000", "gpu1", 8000),
            ("http://gpu1", "gpu1", 80),
        ];
        for (text, host, port) in table {
            let flag: EndpointFlag = text.parse().unwrap();
            assert_eq!((flag.host.as_str(), flag.port, flag.events), (host, port, None), "{text}");
        }
        let text = "http://a:1,events=tcp://a:5557,replay=tcp://a:5558,rank=3,label.x/y=z";
        let flag: EndpointFlag = text.parse().unwrap();
        let (events, replay) = ("a:5557".to_owned(), Some("a:5558".to_owned()));
        assert_eq!(flag.events, Some(EventsSource::At { events, replay }));
        assert_eq!((flag.rank, flag.labels["x/y"].as_str()), (3, "z"));
    }

    #[test]
    fn mistakes_say_what_is_valid() {
        use EndpointFlagError::*;
        let table = [
            ("https://a:1", Url("https://a:1".into())),
            ("http://u@a:1", Url("http://u@a:1".into())),
            ("http://a:1/v1", Url("http://a:1/v1".into())),
            ("http://a:0", Url("http://a:0".into())),
            ("http://a:99999", Url("http://a:99999".into())),
            ("", Url(String::new())),
            ("a:1,event=x", Option("event=x".into())),
            ("a:1,events=tcp://*:5557", Value("events=tcp://*:5557".into())),
            ("a:1,rank=-1", Value("rank=-1".into())),
            ("a:1,replay=tcp://a:2", ReplayAlone),
        ];
        for (text, error) in table {
            assert_eq!(text.parse::<EndpointFlag>(), Err(error), "{text}");
        }
    }
}
