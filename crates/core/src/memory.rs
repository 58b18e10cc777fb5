//! What does a plugin remember of requests before this one, in a form that can be kept?

use serde::{Deserialize, Serialize};

use crate::Time;
use crate::fleet::EndpointId;

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
