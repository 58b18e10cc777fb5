//! `header-based-testing-filter`: the endpoints that a test asks for.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{Filter, Plugin, View};

/// The header of the Gateway API's conformance tests.
const HEADER: &str = "test-epp-endpoint-selection";

/// `header-based-testing-filter`: keeps the endpoints that the request header
/// `test-epp-endpoint-selection` lists, as `host` or `host:port`, separated by commas. A request
/// without the header is refused. For conformance tests: with it, clients choose endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderTesting {}

impl Plugin for HeaderTesting {
    fn headers(&self) -> Vec<String> {
        vec![HEADER.into()]
    }
}

impl Filter for HeaderTesting {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        let wanted = view.request.headers.get(HEADER).unwrap_or_default();
        let listed = || wanted.split(',').map(str::trim).filter(|w| !w.is_empty()).map(split);
        for (row, keep) in view.rows.iter().zip(keep) {
            let address = view.endpoint(row).map_or("", |endpoint| endpoint.address.as_str());
            let (host, port) = split(address);
            let is_it = |(h, p): (&str, Option<&str>)| h == host && (p.is_none() || p == port);
            *keep = listed().any(is_it);
        }
    }
}

/// Host and port of `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
fn split(text: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, rest.strip_prefix(':'));
    }
    match text.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, Some(port)),
        _ => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn the_listed_endpoints_are_kept() {
        let mut fixture = Fixture::new(4);
        for (at, address) in
            ["10.0.0.1:80", "10.0.0.1:81", "10.0.0.2:80", "[fd00::1]:80"].into_iter().enumerate()
        {
            fixture.address(at, address);
        }
        let table = [
            ("10.0.0.1", [true, true, false, false]),
            ("10.0.0.1:81", [false, true, false, false]),
            (" 10.0.0.2 ,, 10.0.0.1:80", [true, false, true, false]),
            ("fd00::1", [false, false, false, true]),
            ("[fd00::1]", [false, false, false, true]),
            ("[fd00::1]:80", [false, false, false, true]),
            ("[fd00::1]:81", [false; 4]),
            ("256.256.256.256", [false; 4]),
            ("", [false; 4]),
        ];
        for (wanted, kept) in table {
            fixture.header("Test-EPP-Endpoint-Selection", wanted);
            assert_eq!(fixture.filter(&mut HeaderTesting {}), kept, "{wanted:?}");
        }
        assert_eq!(Fixture::new(2).filter(&mut HeaderTesting {}), [false; 2]);
    }
}
