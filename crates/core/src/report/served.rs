//! `destination-endpoint-served-verifier`: tells conformance tests who served a request.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, ResponseHeader};

/// Parameters of `destination-endpoint-served-verifier`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServedVerifier {}

impl ServedVerifier {
    /// The response header that the Gateway API's conformance tests read. `served`: `host:port`
    /// of the endpoint that answered, as the proxy told it; `None`: the proxy did not tell.
    pub fn header(served: Option<&str>) -> ResponseHeader {
        let value = served.unwrap_or("fail: missing destination endpoint served metadata");
        ResponseHeader {
            name: "x-conformance-test-served-endpoint".into(),
            value: value.to_owned(),
        }
    }
}

impl Plugin for ServedVerifier {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_names_the_endpoint_or_says_that_nobody_told() {
        assert_eq!(ServedVerifier::header(Some("10.0.0.1:80")).value, "10.0.0.1:80");
        assert!(ServedVerifier::header(None).value.starts_with("fail: "));
    }
}
