//! Which endpoint does a topic mean? `kv@ADDRESS@MODEL`, where ADDRESS is what engines are told to
//! call themselves: `IP:PORT`, `IP`, `HOST:PORT`, a host, or the name of a pod.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::upstream::Upstream;

/// Why a message is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// No endpoint is called so.
    Unknown,
    /// Several endpoints are called so, and the rank does not tell them apart.
    Ambiguous,
    /// The topic is longer than an address can be.
    Malformed,
    /// A newer connection, or another topic of this one, speaks for the endpoint.
    Superseded,
}

impl Miss {
    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Miss::Unknown => "unknown",
            Miss::Ambiguous => "ambiguous",
            Miss::Malformed => "malformed",
            Miss::Superseded => "superseded",
        }
    }
}

/// The endpoint that a topic and the rank of its batch mean. The address says the most, then the
/// name, then the host. One topic may stand for all ranks of an engine, so an endpoint of the
/// batch's rank goes before another one of its host.
pub(super) fn find<'a>(
    all: &'a [Arc<Upstream>],
    topic: &[u8],
    rank: Option<u32>,
) -> Result<&'a Arc<Upstream>, Miss> {
    let called = std::str::from_utf8(topic).map_err(|_| Miss::Unknown)?;
    let called = address_in(called);
    let group = |is: &dyn Fn(&Upstream) -> bool| -> Vec<&'a Arc<Upstream>> {
        all.iter().filter(|upstream| is(upstream)).collect()
    };
    let mut named = match called.parse::<SocketAddr>() {
        Ok(address) => group(&|upstream| upstream.address == address),
        Err(_) => group(&|upstream| is_at(upstream, called)),
    };
    // `IP:PORT` of one rank, told by another one of the same engine.
    let has_rank = |group: &[&Arc<Upstream>], rank| group.iter().any(|u| u.rank == rank);
    if let (Some(rank), Some(one)) = (rank, named.first())
        && !has_rank(&named, rank)
    {
        let ip = one.address.ip();
        let host = group(&|upstream| upstream.address.ip() == ip);
        if has_rank(&host, rank) {
            named = host;
        }
    }
    if named.is_empty() {
        named = group(&|upstream| is_named(upstream, called));
    }
    if named.is_empty() {
        let ip: Option<IpAddr> = called.parse().ok();
        named = group(&|upstream| {
            let host = &upstream.whereabouts.host;
            ip == Some(upstream.address.ip()) || (!host.is_empty() && host == called)
        });
    }
    if named.len() > 1
        && let Some(rank) = rank
    {
        named.retain(|upstream| upstream.rank == rank);
    }
    match named[..] {
        [one] => Ok(one),
        [] => Err(Miss::Unknown),
        _ => Err(Miss::Ambiguous),
    }
}

/// The middle of `kv@ADDRESS@MODEL`; a topic of another form is taken whole.
fn address_in(topic: &str) -> &str {
    let mut parts = topic.splitn(3, '@');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(_), Some(address), Some(_)) => address,
        _ => topic,
    }
}

/// `HOST:PORT` as listed.
fn is_at(upstream: &Upstream, called: &str) -> bool {
    let Some((host, port)) = called.rsplit_once(':') else { return false };
    !host.is_empty()
        && upstream.whereabouts.host == host
        && port.parse() == Ok(upstream.address.port())
}

fn is_named(upstream: &Upstream, called: &str) -> bool {
    !called.is_empty() && (upstream.name == called || upstream.whereabouts.pod == called)
}

#[cfg(test)]
mod tests {
    use kvroute_core::fleet::EndpointId;

    use super::*;
    use crate::config::EventsSource;
    use crate::discover::Target;
    use crate::metrics::Metrics;
    use crate::upstream::{PoolLimits, Whereabouts};

    fn endpoint(slot: u16, name: &str, address: &str, rank: u32, host: &str) -> Arc<Upstream> {
        let target = Target {
            name: name.to_owned(),
            address: address.parse().unwrap(),
            rank,
            labels: Default::default(),
            events: EventsSource::Bound,
            whereabouts: Whereabouts {
                host: host.to_owned(),
                pod: format!("pod-{name}"),
                ..Default::default()
            },
        };
        let limits = PoolLimits {
            idle_max: 0,
            idle_timeout: Default::default(),
            connect_timeout: Default::default(),
        };
        let id = EndpointId { slot, generation: 0 };
        Arc::new(Upstream::new(id, &target, Metrics::new(1).endpoint(name), limits, None))
    }

    #[test]
    fn topics_mean_endpoints() {
        let fleet = [
            endpoint(0, "a", "10.0.0.1:8000", 0, "10.0.0.1"),
            endpoint(1, "b", "10.0.0.2:8000", 0, "gpu2"),
            endpoint(2, "c", "10.0.0.2:8001", 1, "gpu2"),
            endpoint(3, "d", "10.0.0.3:8000", 0, "10.0.0.3"),
            endpoint(4, "e", "10.0.0.3:8001", 0, "10.0.0.3"),
            endpoint(5, "f", "[fd00::1]:8000", 0, "fd00::1"),
        ];
        let table = [
            ("kv@10.0.0.1:8000@m", Some(0), Ok("a")),
            ("kv@10.0.0.1@m", None, Ok("a")),
            ("kv@10.0.0.1@org/m@2", None, Ok("a")),
            ("kv@a@m", None, Ok("a")),
            ("kv@pod-a@m", None, Ok("a")),
            ("pod-a", None, Ok("a")),
            // A rank that is no endpoint's: one endpoint stands for all of its engine's.
            ("kv@10.0.0.1:8000@m", Some(5), Ok("a")),
            // All ranks of an engine have its topic.
            ("kv@10.0.0.2@m", Some(0), Ok("b")),
            ("kv@10.0.0.2@m", Some(1), Ok("c")),
            ("kv@10.0.0.2:8000@m", Some(1), Ok("c")),
            ("kv@gpu2:8001@m", None, Ok("c")),
            ("kv@gpu2@m", Some(1), Ok("c")),
            ("kv@gpu2@m", None, Err(Miss::Ambiguous)),
            // Two engines of one host need ports.
            ("kv@10.0.0.3@m", Some(0), Err(Miss::Ambiguous)),
            ("kv@10.0.0.3:8000@m", Some(0), Ok("d")),
            ("kv@10.0.0.3:8001@m", Some(0), Ok("e")),
            ("kv@[fd00::1]:8000@m", None, Ok("f")),
            ("kv@fd00::1@m", None, Ok("f")),
            ("kv@10.0.0.9:8000@m", Some(0), Err(Miss::Unknown)),
            ("kv@10.0.0.1:8001@m", Some(0), Err(Miss::Unknown)),
            ("kv@@m", None, Err(Miss::Unknown)),
            ("", None, Err(Miss::Unknown)),
            ("@@", Some(0), Err(Miss::Unknown)),
            ("kv", None, Err(Miss::Unknown)),
        ];
        for (topic, rank, expected) in table {
            let found = find(&fleet, topic.as_bytes(), rank).map(|u| u.name.as_str());
            assert_eq!(found, expected, "{topic} {rank:?}");
        }
        assert_eq!(find(&fleet, b"\xff", None).err(), Some(Miss::Unknown));
    }
}
