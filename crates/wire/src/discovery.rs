//! Which endpoints does a file list (llm-d's `file-discovery`)?
//!
//! `endpoints:` with `name`, `namespace` (`default`), `address`, `port` and `labels` each. llm-d
//! wants an IPv4 literal and the port as a string; a host name, an IPv6 literal and a number are
//! accepted too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{Error as _, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use crate::yaml::{Tree, YamlError};

/// Largest file, in bytes (llm-d's limit).
pub const FILE_BYTES_MAX: usize = 1 << 20;

/// One endpoint of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEndpoint {
    /// Unique within its namespace.
    pub name: String,
    /// `default` when left out.
    pub namespace: String,
    /// IP address or host name; an IPv6 address without brackets.
    pub address: String,
    /// TCP port.
    pub port: u16,
    /// What filters read.
    pub labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    endpoints: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    address: Address,
    port: Port,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

fn default_namespace() -> String {
    "default".to_owned()
}

struct Address(String);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Address, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&text);
        let is_v6 = bare.parse::<std::net::Ipv6Addr>().is_ok();
        let is_name = !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
        if is_v6 || is_name {
            return Ok(Address(bare.to_owned()));
        }
        let expected = "an IP address or a host name, without scheme and port";
        Err(D::Error::invalid_value(Unexpected::Str(&text), &expected))
    }
}

struct Port(u16);

struct PortVisitor;

impl Visitor<'_> for PortVisitor {
    type Value = Port;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port from 1 to 65535")
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Port, E> {
        match u16::try_from(value) {
            Ok(port) if port > 0 => Ok(Port(port)),
            _ => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
        }
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Port, E> {
        let unexpected = Unexpected::Signed(value);
        u64::try_from(value)
            .map_err(|_| E::invalid_value(unexpected, &self))
            .and_then(|value| self.visit_u64(value))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Port, E> {
        match text.parse() {
            Ok(port) if port > 0 => Ok(Port(port)),
            _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
        }
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Port, D::Error> {
        deserializer.deserialize_any(PortVisitor)
    }
}

/// Reads a discovery file; `file` names it in errors.
///
/// # Errors
/// [`YamlError`] with the place of the fault. Nothing of a faulty file is used.
pub fn parse(text: &str, file: &str) -> Result<Vec<FileEndpoint>, YamlError> {
    let tree = Tree::parse(text, file, FILE_BYTES_MAX)?;
    let parsed: File = tree.read()?;
    let mut names = BTreeSet::new();
    let mut endpoints = Vec::with_capacity(parsed.endpoints.len());
    for (at, entry) in parsed.endpoints.into_iter().enumerate() {
        let name = entry.name;
        let complaint = match () {
            () if name.is_empty() => Some("an endpoint needs a name".to_owned()),
            () if !names.insert((entry.namespace.clone(), name.clone())) => Some(format!(
                "the endpoint `{name}` is listed twice in namespace `{}`; rename one",
                entry.namespace
            )),
            () => None,
        };
        if let Some(complaint) = complaint {
            return Err(tree.error(&format!("endpoints[{at}].name"), &complaint));
        }
        endpoints.push(FileEndpoint {
            name,
            namespace: entry.namespace,
            address: entry.address.0,
            port: entry.port.0,
            labels: entry.labels.unwrap_or_default(),
        });
    }
    Ok(endpoints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_and_json() {
        let yaml = "endpoints:\n- name: a\n  address: 10.0.0.1\n  port: \"8000\"\n  labels:\n    \
                    llm-d.ai/role: decode\n\
                    - {name: b, namespace: x, address: \"[::1]\", port: 81}\n\
                    - name: b\n  address: vllm-0.svc\n  port: \"1\"\n";
        let endpoint = |name: &str, namespace: &str, address: &str, port| FileEndpoint {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            address: address.to_owned(),
            port,
            labels: BTreeMap::new(),
        };
        let mut first = endpoint("a", "default", "10.0.0.1", 8000);
        first.labels.insert("llm-d.ai/role".to_owned(), "decode".to_owned());
        let rest = [endpoint("b", "x", "::1", 81), endpoint("b", "default", "vllm-0.svc", 1)];
        let expected = [&[first][..], &rest].concat();
        assert_eq!(parse(yaml, "f.yaml").unwrap(), expected);
        let json = r#"{"endpoints": [{"name": "q", "address": "h", "port": 9, "labels": null}]}"#;
        assert_eq!(parse(json, "f.json").unwrap(), [endpoint("q", "default", "h", 9)]);
        assert_eq!(parse("endpoints: []", "f.yaml").unwrap(), []);
    }

    #[test]
    fn faults_name_their_place() {
        let entry = |rest: &str| format!("endpoints:\n- name: a\n  {rest}\n");
        let long = " ".repeat(FILE_BYTES_MAX + 1);
        let table = [
            ("endpoints:\n- nam: a\n".to_owned(), Some(2), "unknown field `nam`"),
            ("endpoint: []\n".to_owned(), Some(1), "valid: endpoints"),
            (entry("address: 10.0.0.1"), Some(2), "`port` is missing"),
            (entry("address: http://x\n  port: 1"), Some(3), "without scheme and port"),
            (entry("address: x\n  port: 0"), Some(4), "a port from 1 to 65535"),
            (entry("address: x\n  port: \"70000\""), Some(4), "a port from 1 to 65535"),
            (entry("address: x\n  port: 1\n  port: 2"), Some(5), "port"),
            (entry("address: x\n  port: 1\n- {name: a, address: y, port: 2}"), Some(5), "twice"),
            ("endpoints:\n- {name: \"\", address: y, port: 2}".to_owned(), Some(2), "needs a name"),
            ("endpoints: [".to_owned(), Some(1), ""),
            (String::new(), None, "`endpoints` is missing"),
            (long, None, "more than the limit of 1048576"),
        ];
        for (text, line, message) in table {
            let error = parse(&text, "fleet.yaml").unwrap_err();
            let shown: String = text.chars().take(80).collect();
            assert_eq!(error.line, line, "{shown}: {error}");
            assert!(error.rendered.contains(message), "{shown}: {error}");
            assert!(error.rendered.contains("fleet.yaml"), "{shown}: {error}");
        }
    }
}
