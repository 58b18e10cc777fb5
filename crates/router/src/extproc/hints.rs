//! What does a data plane say about endpoints? Which ones may serve a request, and who served it.

use std::net::{IpAddr, SocketAddr};

use kvroute_core::EndpointId;
use kvroute_wire::ext_proc::{Found, Metadata};
use rustc_hash::FxHashSet;

use super::NAMESPACE;
use crate::shared::Shared;
use crate::upstream::Upstream;

/// Where a data plane lists the endpoints that a request is for.
const SUBSET_NAMESPACE: &str = "envoy.lb.subset_hint";
const SUBSET: &str = "x-gateway-destination-endpoint-subset";
/// Where it names the endpoint that answered.
const SERVED: &str = "x-gateway-destination-endpoint-served";

/// The endpoints that a request is for; `None`: all. Entries are `ip:port`, or `ip` for every port
/// of it; a list, or a text with commas. What is not understood must not widen the choice: it names
/// nobody.
pub(super) fn allowed(shared: &Shared, metadata: &Metadata) -> Option<Vec<EndpointId>> {
    let texts = match metadata.get(SUBSET_NAMESPACE, SUBSET) {
        Ok(None) => return None,
        Ok(Some(Found::List(texts))) => texts,
        Ok(Some(Found::Text(text))) => text.split(',').map(str::to_owned).collect(),
        Ok(Some(Found::Other)) | Err(_) => Vec::new(),
    };
    let (mut addresses, mut hosts) = (FxHashSet::default(), FxHashSet::default());
    for text in &texts {
        if let Ok(address) = text.trim().parse::<SocketAddr>() {
            addresses.insert(address);
        } else if let Ok(host) = text.trim().parse::<IpAddr>() {
            hosts.insert(host);
        }
    }
    let is_wanted = |upstream: &Upstream| {
        hosts.contains(&upstream.address.ip())
            || addresses.contains(&upstream.address)
            || addresses.contains(&upstream.served_at)
    };
    let upstreams = shared.upstreams.all();
    Some(upstreams.iter().filter(|u| is_wanted(u)).map(|u| u.id).collect())
}

/// Takes over the metadata of a later message. One that leaves a hint out does not take it back.
pub(super) fn update(known: &mut Metadata, later: &Metadata) {
    let hints = |metadata: &Metadata| !matches!(metadata.get(SUBSET_NAMESPACE, SUBSET), Ok(None));
    if hints(later) || !hints(known) {
        known.clone_from(later);
    }
}

/// `ip:port` of the endpoint that answered.
pub(super) fn served(metadata: &Metadata) -> Option<String> {
    match metadata.get(NAMESPACE, SERVED) {
        Ok(Some(Found::Text(text))) => Some(text),
        _ => None,
    }
}
