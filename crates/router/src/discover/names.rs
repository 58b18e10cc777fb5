//! Which endpoints do the flags mean? Names are resolved again at every look, because the
//! addresses behind a service name change.

use std::net::SocketAddr;

use crate::config::{EndpointFlag, EventsConfig};

use crate::upstream::Whereabouts;

use super::{Target, node_of};

/// Endpoints of flags, in the flags' order.
#[derive(Debug)]
pub(crate) struct NameSource {
    flags: Vec<(EndpointFlag, Vec<SocketAddr>)>,
    events: EventsConfig,
    targets: Vec<Target>,
}

impl NameSource {
    /// `events` holds for flags that say nothing about events.
    pub fn new(flags: Vec<EndpointFlag>, events: EventsConfig) -> NameSource {
        let flags = flags.into_iter().map(|flag| (flag, Vec::new())).collect();
        NameSource { flags, events, targets: Vec::new() }
    }

    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Resolves every name; the first failure is returned, its flag keeps its addresses.
    pub async fn refresh(&mut self) -> Result<(), String> {
        let mut failed = None;
        for (flag, addresses) in &mut self.flags {
            match resolve(&flag.host, flag.port).await {
                Ok(found) => *addresses = found,
                Err(error) => failed = failed.or(Some(format!("cannot resolve {flag}: {error}"))),
            }
        }
        self.targets.clear();
        for (flag, addresses) in &self.flags {
            let node = node_of(&flag.labels).unwrap_or_else(|error| {
                failed.get_or_insert(format!("{flag}: {error}"));
                None
            });
            for &address in addresses {
                self.targets.push(Target {
                    name: name_of(address, flag.rank),
                    address,
                    rank: flag.rank,
                    labels: flag.labels.clone(),
                    events: flag.events.clone().unwrap_or_else(|| self.events.of(&flag.labels)),
                    whereabouts: Whereabouts {
                        host: flag.host.clone(),
                        node,
                        ..Whereabouts::default()
                    },
                });
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// `ip:port`, with the rank where several share an address.
fn name_of(address: SocketAddr, rank: u32) -> String {
    if rank == 0 { address.to_string() } else { format!("{address}/{rank}") }
}

/// All addresses, sorted. A name with addresses of both families gives the IPv4 ones only: they
/// usually belong to the same host, which must not count twice.
pub(super) async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let found = tokio::net::lookup_host((host, port)).await;
    let mut addresses: Vec<SocketAddr> = found.map_err(|e| e.to_string())?.collect();
    if addresses.iter().any(SocketAddr::is_ipv4) {
        addresses.retain(SocketAddr::is_ipv4);
    }
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() { Err("the name has no address".to_owned()) } else { Ok(addresses) }
}
