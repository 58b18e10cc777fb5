//! Which model serves a request that may have named another one, and what follows for its body
//! and its answer?
//!
//! A rule of the configuration decides, else the client's header. The model that serves is the one
//! that is scheduled, tokenized and counted. A request that names no model is scheduled for it,
//! too, but goes out as it came: nothing is put into a body that was not there.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use http::HeaderMap;
use kvroute_core::Rng;
use kvroute_core::rewrite::{ModelRewrite, Rewrites};
use kvroute_wire::api::Api;
use kvroute_wire::model_name::{self, Restorer};
use kvroute_wire::request::RequestBody;
use parking_lot::Mutex;

use crate::headers::MODEL_REWRITE;

/// A request whose model a rule or its header chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rewrite {
    /// Name of the rule; empty: the header.
    pub rule: String,
    /// The model that the body names; empty: none.
    pub from: String,
    /// The model that serves the request; may be the same.
    pub to: String,
    /// Where the body names its model.
    place: Option<Range<usize>>,
}

impl Rewrite {
    /// The body as it goes to the endpoint, in pieces; `None`: as it came.
    pub fn body(&self, body: &Bytes) -> Option<[Bytes; 3]> {
        let place = self.place.as_ref().filter(|_| self.changes())?;
        model_name::replace(body, place, &self.to)
    }

    /// Gives the answer the name that the client knows; `None`: it has that already, or the client
    /// knows none.
    pub fn restorer(&self) -> Option<Restorer> {
        let has_name = self.place.is_some() && !self.from.is_empty();
        (has_name && self.changes()).then(|| Restorer::new(&self.to, &self.from))
    }

    /// Whether another model serves the request than the one it names.
    pub fn changes(&self) -> bool {
        self.from != self.to
    }
}

/// Chooses the models that serve.
#[derive(Debug)]
pub(crate) struct Rewriter {
    rules: Rewrites,
    /// Models that rules ask for or choose.
    named: BTreeSet<String>,
    rng: Mutex<Rng>,
}

impl Rewriter {
    /// `seed` fixes which target each request of a rule gets, in their order.
    pub fn new(rules: &[ModelRewrite], seed: u64) -> Rewriter {
        Rewriter {
            rules: Rewrites::new(rules.to_vec()),
            named: rules.iter().flat_map(ModelRewrite::models).map(str::to_owned).collect(),
            rng: Mutex::new(Rng::seeded(seed)),
        }
    }

    /// Whether a rule names a model.
    pub fn names(&self, model: &str) -> bool {
        self.named.contains(model)
    }

    /// Whether the body of such a request must be there as a whole before it is forwarded: where
    /// it is read, and where it names a model that may have to be another one.
    pub fn reads_body(&self, api: Api, headers: &HeaderMap) -> bool {
        let may_change = || !self.rules.is_empty() || wanted(headers).is_some();
        api.reads_body() || (api == Api::CountTokens && may_change())
    }

    /// What a rule or the header (`wanted`) says about a request for `model`, which `body` names
    /// or, where it names none, stands for.
    pub fn rewrite(
        &self,
        model: &str,
        wanted: Option<&str>,
        body: &RequestBody<'_>,
    ) -> Result<Option<Rewrite>, Unreachable> {
        self.with(&mut self.rng.lock(), model, wanted, body)
    }

    /// The same, for requests of which nothing may come: the next request of a rule gets the same
    /// target.
    pub fn peek(
        &self,
        model: &str,
        wanted: Option<&str>,
        body: &RequestBody<'_>,
    ) -> Result<Option<Rewrite>, Unreachable> {
        let mut rng = self.rng.lock().clone();
        self.with(&mut rng, model, wanted, body)
    }

    fn with(
        &self,
        rng: &mut Rng,
        model: &str,
        wanted: Option<&str>,
        body: &RequestBody<'_>,
    ) -> Result<Option<Rewrite>, Unreachable> {
        let (rule, to) = match self.rules.choose(model, rng) {
            Some(found) => (found.rule.to_owned(), found.model.to_owned()),
            None => match wanted {
                Some(wanted) => (String::new(), wanted.to_owned()),
                None => return Ok(None),
            },
        };
        let from = body.model.as_deref().unwrap_or_default().to_owned();
        let place = body.model_place.clone();
        if place.is_none() && !from.is_empty() && from != to {
            return Err(Unreachable);
        }
        Ok(Some(Rewrite { rule, from, to, place }))
    }
}

/// The model's name lies inside of a gRPC message, where it is not replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unreachable;

/// The model by which the client's header wants the request to be served.
pub(crate) fn wanted(headers: &HeaderMap) -> Option<&str> {
    let given = MODEL_REWRITE.iter().find_map(|name| headers.get(*name));
    given.and_then(|value| value.to_str().ok()).filter(|model| !model.is_empty())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use kvroute_wire::request;

    use super::*;

    fn rules(json: &str) -> Vec<ModelRewrite> {
        serde_json::from_str(json).unwrap()
    }

    const RULE: &str = r#"[{"name":"r","matches":[{"model":"a"}],"targets":[{"model":"b"}]}]"#;

    #[test]
    fn a_rule_wins_over_the_header() {
        let table = [
            ("[]", "a", None, None),
            ("[]", "a", Some("h"), Some(("", "h"))),
            (RULE, "a", None, Some(("r", "b"))),
            (RULE, "a", Some("h"), Some(("r", "b"))),
            (RULE, "c", Some("h"), Some(("", "h"))),
            (RULE, "c", None, None),
        ];
        for (list, model, wanted, expected) in table {
            let text = format!(r#"{{"model":"{model}","prompt":"x"}}"#);
            let body = request::parse(Api::Completions, text.as_bytes()).unwrap();
            let found = Rewriter::new(&rules(list), 1).rewrite(model, wanted, &body).unwrap();
            let seen = found.as_ref().map(|found| (found.rule.as_str(), found.to.as_str()));
            assert_eq!(seen, expected, "{model} {wanted:?}");
            assert!(found.is_none_or(|found| found.from == model));
        }
    }

    #[test]
    fn peeking_moves_no_draw() {
        let rule = r#"[{"name":"r","targets":[{"model":"b"},{"model":"c"}]}]"#;
        let body = request::parse(Api::Completions, br#"{"model":"a","prompt":"x"}"#).unwrap();
        let (one, other) = (Rewriter::new(&rules(rule), 1), Rewriter::new(&rules(rule), 1));
        for at in 0..50 {
            let peeked = one.peek("a", None, &body).unwrap();
            assert_eq!(one.peek("a", None, &body).unwrap(), peeked, "{at}");
            assert_eq!(one.rewrite("a", None, &body).unwrap(), peeked, "{at}");
            assert_eq!(other.rewrite("a", None, &body).unwrap(), peeked, "{at}");
        }
    }

    #[test]
    fn what_is_not_there_is_not_replaced() {
        let rewriter = Rewriter::new(&[], 1);
        // The body, whether it changes, and whether the answer does.
        let table = [
            (r#"{"model":"a","prompt":"x"}"#, true, true),
            (r#"{"model":"t","prompt":"x"}"#, false, false),
            (r#"{"model":"","prompt":"x"}"#, true, false),
            (r#"{"model":null,"prompt":"x"}"#, true, false),
            (r#"{"prompt":"x"}"#, false, false),
        ];
        for (text, changes, restores) in table {
            let bytes = Bytes::copy_from_slice(text.as_bytes());
            let body = request::parse(Api::Completions, &bytes).unwrap();
            let rewrite = rewriter.rewrite("", Some("t"), &body).unwrap().unwrap();
            assert_eq!(rewrite.body(&bytes).is_some(), changes, "{text}");
            assert_eq!(rewrite.restorer().is_some(), restores, "{text}");
        }
    }

    #[test]
    fn names_in_messages_of_grpc_stay() {
        let rewriter = Rewriter::new(&[], 1);
        let body = request::parse(Api::Completions, br#"{"model":"a","prompt":"x"}"#).unwrap();
        let body = RequestBody { model_place: None, ..body };
        assert_eq!(rewriter.rewrite("a", Some("t"), &body), Err(Unreachable));
        assert!(rewriter.rewrite("a", Some("a"), &body).is_ok());
        assert_eq!(rewriter.rewrite("a", None, &body), Ok(None));
    }

    #[test]
    fn the_newer_header_wins() {
        let mut headers = HeaderMap::new();
        assert_eq!(wanted(&headers), None);
        headers.insert("x-gateway-model-name-rewrite", HeaderValue::from_static("old"));
        assert_eq!(wanted(&headers), Some("old"));
        headers.insert("x-llm-d-model-name-rewrite", HeaderValue::from_static("new"));
        assert_eq!(wanted(&headers), Some("new"));
        headers.insert("x-llm-d-model-name-rewrite", HeaderValue::from_static(""));
        assert_eq!(wanted(&headers), None);
    }
}
