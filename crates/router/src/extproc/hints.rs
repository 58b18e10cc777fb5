//! What does a data plane say about endpoints? Which ones may serve a request, and who served it.

use kvroute_core::EndpointId;
use kvroute_wire::ext_proc::{Found, Metadata};
use rustc_hash::FxHashSet;

use super::NAMESPACE;
use crate::shared::Shared;

/// Where a data plane lists the endpoints that a request is for.
const SUBSET_NAMESPACE: &str = "envoy.lb.subset_hint";
const SUBSET: &str = "x-gateway-destination-endpoint-subset";
/// Where it names the endpoint that answered.
const SERVED: &str = "x-gateway-destination-endpoint-served";

/// The endpoints that a request is for; `None`: all. Entries are `ip:port`, or `ip` for every port
/// of it; a list, or a text with commas. A hint that is neither is taken as an empty list: what is
/// not understood must not widen the choice.
pub(super) fn allowed(shared: &Shared, metadata: &Metadata) -> Option<Vec<EndpointId>> {
    let found = metadata.get(SUBSET_NAMESPACE, SUBSET);
    let texts = match found {
        Ok(None) => return None,
        Ok(Some(Found::List(texts))) => texts,
        Ok(Some(Found::Text(text))) => text.split(',').map(str::to_owned).collect(),
        Ok(Some(Found::Other)) | Err(_) => Vec::new(),
    };
    let wanted: FxHashSet<&str> = texts.iter().map(|text| text.trim()).collect();
    let upstreams = shared.upstreams.all();
    let is_wanted = |upstream: &crate::upstream::Upstream| {
        let ip = upstream.address.ip().to_string();
        let own = upstream.address.to_string();
        [own.as_str(), upstream.authority.as_str(), ip.as_str()]
            .iter()
            .any(|name| wanted.contains(name))
    };
    Some(upstreams.iter().filter(|u| is_wanted(u)).map(|u| u.id).collect())
}

/// `ip:port` of the endpoint that answered.
pub(super) fn served(metadata: &Metadata) -> Option<String> {
    match metadata.get(NAMESPACE, SERVED) {
        Ok(Some(Found::Text(text))) => Some(text),
        _ => None,
    }
}
