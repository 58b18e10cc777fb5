//! Where does an engine publish its KV events?

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;

use crate::ask::once;
use crate::config::EventsSource;

/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 256 << 10;

/// Addresses to connect to, `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Of the publisher.
    pub events: String,
    /// Of the replay socket.
    pub replay: Option<String>,
    /// How they are known, for people.
    pub known: String,
    /// Nobody told them: they are the default.
    pub guessed: bool,
}

/// One rank's entry of `GET /kv_event_sources` (vLLM 0.32).
#[derive(Debug, Deserialize)]
struct EngineSource {
    #[serde(default)]
    enable_kv_cache_events: bool,
    publisher: Option<String>,
    endpoint: Option<String>,
    replay_endpoint: Option<String>,
}

/// The place as configured, or as the engine says; an error says what to do.
pub(crate) async fn find(
    address: SocketAddr,
    rank: u32,
    source: &EventsSource,
    timeout: Duration,
) -> Result<Place, String> {
    let ip = address.ip();
    match source {
        EventsSource::Off => Err("event streams are switched off".to_owned()),
        EventsSource::Unselected => Err("its labels do not match podLabelSelector".to_owned()),
        EventsSource::Bound => Err("engines connect to the router's zmqEndpoint".to_owned()),
        EventsSource::At { events, replay } => Ok(Place {
            events: events.clone(),
            replay: replay.clone(),
            known: "as configured for this endpoint".to_owned(),
            guessed: false,
        }),
        EventsSource::Ports { events, replay } => {
            at_ports(ip, rank, (*events, *replay), "the configured port".to_owned())
        }
        EventsSource::Ask { events, replay } => {
            let request = format!("GET /kv_event_sources HTTP/1.1\r\nhost: {address}\r\n");
            let asked = once(address, request, b"", ANSWER_BYTES_MAX, timeout).await;
            let (head, answer) = asked.map_err(|e| format!("GET /kv_event_sources: {e}"))?;
            match head.status.as_u16() {
                200 => {
                    let mut place = understand(&answer, rank, ip)?;
                    if place.replay.is_none() {
                        let at = replay.map(|first| at_port(ip, rank, first));
                        place.replay = at.transpose()?;
                    }
                    Ok(place)
                }
                // It does not know the question: vLLM before 0.32, SGLang, another engine.
                status @ (404 | 405 | 501) => {
                    let known = format!(
                        "the default port, because GET /kv_event_sources was answered with \
                         {status}; another one is told by --kv-events-port or \
                         podDiscoveryConfig.socketPort"
                    );
                    let place = at_ports(ip, rank, (*events, *replay), known)?;
                    Ok(Place { guessed: true, ..place })
                }
                status => Err(format!("GET /kv_event_sources was answered with {status}")),
            }
        }
    }
}

fn at_ports(
    ip: IpAddr,
    rank: u32,
    (events, replay): (u16, Option<u16>),
    known: String,
) -> Result<Place, String> {
    let events = at_port(ip, rank, events)?;
    let replay = replay.map(|first| at_port(ip, rank, first)).transpose()?;
    Ok(Place { events, replay, known, guessed: false })
}

fn at_port(ip: IpAddr, rank: u32, first: u16) -> Result<String, String> {
    let port = u64::from(first) + u64::from(rank);
    let port = u16::try_from(port).map_err(|_| format!("port {port} does not exist"))?;
    Ok(SocketAddr::new(ip, port).to_string())
}

fn understand(answer: &[u8], rank: u32, ip: IpAddr) -> Result<Place, String> {
    let sources: BTreeMap<String, EngineSource> = serde_json::from_slice(answer)
        .map_err(|e| format!("the answer to GET /kv_event_sources cannot be read: {e}"))?;
    let source = sources.get(&rank.to_string()).ok_or_else(|| {
        format!(
            "the engine lists no event source of rank {rank}; start it with --kv-events-config \
             '{{\"enable_kv_cache_events\":true}}'"
        )
    })?;
    let publishes = source.publisher.as_deref().is_none_or(|p| p == "zmq");
    if !source.enable_kv_cache_events || !publishes {
        return Err("the engine does not publish KV events over ZeroMQ; start it with \
                    --kv-events-config '{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\"}'"
            .to_owned());
    }
    let endpoint = source.endpoint.as_deref().unwrap_or_default();
    let events = reachable(endpoint, ip).ok_or_else(|| {
        format!("the engine publishes at `{endpoint}`, which cannot be reached over TCP")
    })?;
    let replay = source.replay_endpoint.as_deref().and_then(|r| reachable(r, ip));
    Ok(Place { events, replay, known: "as the engine says".to_owned(), guessed: false })
}

/// The address to connect to for one that an engine binds: `*` means the engine's host.
fn reachable(bound: &str, ip: IpAddr) -> Option<String> {
    let (host, port) = bound.strip_prefix("tcp://")?.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|p| *p > 0)?;
    let everywhere = matches!(host, "*" | "0.0.0.0" | "[::]" | "::");
    Some(match everywhere {
        true => SocketAddr::new(ip, port).to_string(),
        false => format!("{host}:{port}"),
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn an_engines_answer_becomes_addresses() {
        let ip = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
        let answer = br#"{"1":{"enable_kv_cache_events":true,"publisher":"zmq",
            "endpoint":"tcp://*:9101","replay_endpoint":"tcp://*:9201","buffer_steps":10000,
            "hwm":100000,"max_queue_size":100000,"topic":""}}"#;
        let place = understand(answer, 1, ip).unwrap();
        assert_eq!(place.events, "10.0.0.1:9101");
        assert_eq!(place.replay.as_deref(), Some("10.0.0.1:9201"));
        let table: [(&[u8], &str); 5] = [
            (answer, "no event source of rank 0"),
            (b"{}", "no event source of rank 0"),
            (b"[]", "cannot be read"),
            (br#"{"0":{"enable_kv_cache_events":false}}"#, "does not publish"),
            (
                br#"{"0":{"enable_kv_cache_events":true,"endpoint":"ipc:///tmp/x"}}"#,
                "cannot be reached",
            ),
        ];
        for (answer, says) in table {
            let error = understand(answer, 0, ip).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
