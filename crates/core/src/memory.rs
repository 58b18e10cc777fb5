//! What does a plugin remember of requests before this one, in a form that can be kept?

use serde::{Deserialize, Serialize};

use crate::Time;
use crate::fleet::EndpointId;

/// Bytes of an endpoint's slot and generation as text, with what stands around them.
const ENDPOINT_BYTES: usize = 24;
/// Bytes of a number as text, with a comma.
const NUMBER_BYTES: usize = 21;

/// The state of one plugin, as far as its next answers depend on it. A snapshot holds it; a
/// plugin of the same type and parameters takes it up again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// Its answers depend on the request and the fleet alone.
    #[default]
    Nothing,
    /// Endpoints in order of use, the one unused longest first.
    Endpoints(Vec<EndpointId>),
    /// Sessions in order of use, the one unused longest first: id, endpoint, last use.
    Sessions(Vec<(String, EndpointId, Time)>),
    /// The name of the endpoint that it chose last.
    Last(Option<String>),
    /// Multimodal items of each endpoint, the one unused longest first.
    Items(Vec<(EndpointId, Vec<u64>)>),
    /// It remembers something that cannot be kept: what, in words.
    LeftOut(String),
}

impl Memory {
    /// Bytes that it takes as text, about and from above.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Memory::Nothing => 0,
            Memory::Endpoints(ids) => ids.len() * ENDPOINT_BYTES,
            Memory::Sessions(sessions) => {
                let one = |id: &str| id.len() + ENDPOINT_BYTES + NUMBER_BYTES;
                sessions.iter().map(|(id, ..)| one(id)).sum()
            }
            Memory::Last(name) => name.as_ref().map_or(0, String::len),
            Memory::Items(endpoints) => {
                let one = |items: &[u64]| ENDPOINT_BYTES + items.len() * NUMBER_BYTES;
                endpoints.iter().map(|(_, items)| one(items)).sum()
            }
            Memory::LeftOut(what) => what.len(),
        }
    }
}
