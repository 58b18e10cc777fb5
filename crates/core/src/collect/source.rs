//! What do all sources that ask over HTTP have in common? How an address is asked, and which
//! answers to such a parameter make no sense.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::GoDuration;

/// Every interval is a multiple of this, as llm-d's base tick wants it.
pub const BASE_TICK: Duration = Duration::from_millis(50);

/// How a page is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// Plain HTTP.
    #[default]
    Http,
    /// HTTP over TLS.
    Https,
}

/// How the two sides of a TLS connection prove who they are. Files are PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Any certificate of the server will do.
    pub skip_verify: bool,
    /// Authorities that may have signed it; `None`: those of the system.
    pub ca_cert: Option<String>,
    /// Certificate and key that the router shows.
    pub client: Option<(String, String)>,
}

impl TlsOptions {
    pub(super) fn of(skip_verify: bool, ca: &str, cert: &str, key: &str) -> TlsOptions {
        let set = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        TlsOptions { skip_verify, ca_cert: set(ca), client: set(cert).zip(set(key)) }
    }
}

pub(super) fn check_path(path: &str) -> Result<(), String> {
    if path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(format!("path: `{path}` must start with a slash and hold no spaces"))
}

pub(super) fn check_port(port: u32) -> Result<(), String> {
    if port <= u32::from(u16::MAX) {
        return Ok(());
    }
    Err(format!("port: {port} must be between 0 and 65535"))
}

/// A port that was checked; 0 stands for none.
pub(super) fn port_of(port: u32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port > 0)
}

pub(super) fn check_interval(interval: Option<GoDuration>) -> Result<(), String> {
    let Some(GoDuration(interval)) = interval else { return Ok(()) };
    if !interval.is_zero() && interval.as_nanos().is_multiple_of(BASE_TICK.as_nanos()) {
        return Ok(());
    }
    Err(format!("interval: {interval:?} must be a multiple of {BASE_TICK:?}, and not zero"))
}

pub(super) fn check_client(cert: &str, key: &str) -> Result<(), String> {
    if cert.is_empty() == key.is_empty() {
        return Ok(());
    }
    let missing = if cert.is_empty() { "clientCertPath" } else { "clientKeyPath" };
    Err(format!("{missing}: clientCertPath and clientKeyPath are set together or not at all"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        let every = |text: &str| check_interval(GoDuration::parse(text));
        assert_eq!(every("50ms"), Ok(()));
        assert_eq!(every("1s"), Ok(()));
        assert_eq!(check_interval(None), Ok(()));
        for text in ["0s", "49ms", "75ms", "1ns"] {
            assert!(every(text).unwrap_err().starts_with("interval: "), "{text}");
        }
        assert_eq!(check_path("/metrics?a=b"), Ok(()));
        for path in ["", "metrics", "/a b", "/a\r\nx: y", "/\u{e9}"] {
            assert!(check_path(path).unwrap_err().starts_with("path: "), "{path}");
        }
        assert_eq!((check_port(0), check_port(65_535)), (Ok(()), Ok(())));
        assert!(check_port(65_536).unwrap_err().starts_with("port: "));
        assert_eq!((port_of(0), port_of(9400), port_of(70_000)), (None, Some(9400), None));
        assert_eq!((check_client("", ""), check_client("c", "k")), (Ok(()), Ok(())));
        assert!(check_client("c", "").unwrap_err().starts_with("clientKeyPath: "));
        assert!(check_client("", "k").unwrap_err().starts_with("clientCertPath: "));
    }
}
