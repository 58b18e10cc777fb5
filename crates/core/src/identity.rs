//! `agent-identity`: whose request is it, as far as its headers tell?
//!
//! Requests of one session of an agent are one flow: they share a queue, and flows are served
//! fairly. A client may name its flow itself; else the header by which the agent names its session
//! does.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::decision::Headers;
use crate::stage::Plugin;

/// Headers by which a client names its flow, the current one first.
pub const FAIRNESS_HEADERS: [&str; 2] =
    ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"];

/// The flow of requests that name none.
pub const DEFAULT_FLOW: &str = "default-flow";

/// Headers by which agents name their sessions: Claude Code, OpenCode, Codex, and Codex before
/// 0.131.
const SESSION_HEADERS: [&str; 4] =
    ["x-claude-code-session-id", "x-session-affinity", "session-id", "session_id"];

/// The flow that a client names itself.
pub fn named_flow<'a>(headers: &Headers<'a>) -> Option<&'a str> {
    first(headers, FAIRNESS_HEADERS.into_iter())
}

/// Parameters of `agent-identity`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct AgentIdentity {
    /// Headers that are asked first, in this order, before those of the agents that are known.
    pub additional_session_headers: Vec<String>,
}

impl AgentIdentity {
    /// The request's flow: as the client names it, else the session; `None`: there is neither,
    /// which makes it part of [`DEFAULT_FLOW`]. An empty header names nothing.
    pub fn fairness_id<'a>(&self, headers: &Headers<'a>) -> Option<&'a str> {
        named_flow(headers).or_else(|| self.session(headers))
    }

    /// The agent's session, whatever flow the client names: a flow may be a whole tenant.
    pub fn session<'a>(&self, headers: &Headers<'a>) -> Option<&'a str> {
        first(headers, self.session_headers())
    }

    fn session_headers(&self) -> impl Iterator<Item = &str> {
        self.additional_session_headers.iter().map(String::as_str).chain(SESSION_HEADERS)
    }
}

fn first<'a, 'b>(
    headers: &Headers<'a>,
    mut names: impl Iterator<Item = &'b str>,
) -> Option<&'a str> {
    names.find_map(|name| headers.get(name).filter(|value| !value.is_empty()))
}

impl Plugin for AgentIdentity {
    fn headers(&self) -> Vec<String> {
        let names = FAIRNESS_HEADERS.into_iter().chain(self.session_headers());
        names.filter(|name| !name.is_empty()).map(str::to_ascii_lowercase).collect()
    }

    fn inert(&self) -> Vec<String> {
        let empty = self.additional_session_headers.iter().any(String::is_empty);
        let text = "additionalSessionHeaders: an empty name matches no header";
        empty.then(|| text.to_owned()).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_header_that_says_something_names_the_flow() {
        let own = AgentIdentity { additional_session_headers: vec!["X-My-Agent".into()] };
        let plain = AgentIdentity::default();
        type Row<'a> = (&'a AgentIdentity, &'a [(&'a str, &'a str)], Option<&'a str>);
        let table: [Row<'_>; 9] = [
            (&plain, &[], None),
            (&plain, &[("session_id", "old")], Some("old")),
            (&plain, &[("session_id", "old"), ("session-id", "new")], Some("new")),
            (&plain, &[("session-id", "new"), ("X-Session-Affinity", "oc")], Some("oc")),
            (&plain, &[("x-session-affinity", "a"), ("x-claude-code-session-id", "b")], Some("b")),
            (&plain, &[("x-claude-code-session-id", ""), ("session-id", "c")], Some("c")),
            (&plain, &[("x-my-agent", "mine")], None),
            (&own, &[("session-id", "c"), ("x-my-agent", "mine")], Some("mine")),
            (
                &own,
                &[("x-my-agent", "mine"), ("x-gateway-inference-fairness-id", "named")],
                Some("named"),
            ),
        ];
        for (plugin, pairs, expected) in table {
            assert_eq!(plugin.fairness_id(&Headers(pairs)), expected, "{pairs:?}");
        }
        let tenant = Headers(&[("x-llm-d-inference-fairness-id", "all"), ("session-id", "s")]);
        assert_eq!((plain.fairness_id(&tenant), plain.session(&tenant)), (Some("all"), Some("s")));
        let both = [(FAIRNESS_HEADERS[1], "old"), (FAIRNESS_HEADERS[0], "new")];
        assert_eq!(named_flow(&Headers(&both)), Some("new"));
    }

    #[test]
    fn headers_are_listed_in_lower_case() {
        let own =
            AgentIdentity { additional_session_headers: vec!["X-My-Agent".into(), "".into()] };
        assert_eq!(own.headers()[2..4], ["x-my-agent", "x-claude-code-session-id"]);
        assert_eq!((own.inert().len(), AgentIdentity::default().inert().len()), (1, 0));
    }
}
