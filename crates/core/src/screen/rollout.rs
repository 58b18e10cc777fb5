//! `disaggregatedset-rollout-screener`: which version of a deployment serves the request?
//!
//! Prefill and decode endpoints of different revisions may not understand each other's KV cache.
//! So one revision that has every role is drawn per request, in proportion to what it has, and
//! only its endpoints are seen by any profile. Where nothing fits, nothing is left: another
//! revision is never put in place of the one that was asked for.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::selector;
use crate::decision::Headers;
use crate::filter::LabelSelector;
use crate::fleet::{Endpoint, Fleet};
use crate::stage::{Filter, Plugin, ResponseHeader, View};
use crate::{Rng, Time};

const REVISION_LABEL: &str = "disaggregatedset.x-k8s.io/revision";
const ROLE_LABEL: &str = "disaggregatedset.x-k8s.io/role";

/// Parameters of `disaggregatedset-rollout-screener`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Rollout {
    /// Which endpoints count when revisions are weighed. Required.
    pub scope: RolloutScope,
    /// Labels that requests may ask for by header.
    pub header_selectors: Vec<HeaderSelector>,
    /// How a revision is chosen. Required.
    pub revision_gating: Option<RevisionGating>,
    /// `scope`, read once.
    #[serde(skip)]
    selected: Option<LabelSelector>,
}

/// `scope`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RolloutScope {
    /// A label selector on one line, as `disaggregatedset.x-k8s.io/name=my-set`. Required.
    pub label_selector: String,
}

/// A label that a request may ask for, and that the response names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct HeaderSelector {
    /// What it is called. Required; no two may be called alike.
    pub name: String,
    /// Header of request and response. Required; no two may read the same.
    pub header_name: String,
    /// Label that it is compared with. Required.
    pub label_key: String,
    /// What the header does. Required.
    pub mode: Option<SelectorMode>,
}

/// What a header selector does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SelectorMode {
    /// Only endpoints with that label, even if there are none.
    Strict,
    /// Nothing: a `header-label-affinity-scorer` may prefer them.
    Prefer,
}

/// `revisionGating`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RevisionGating {
    /// Label that tells the revision of an endpoint.
    pub revision_label_key: String,
    /// Label that tells its role.
    pub role_label_key: String,
    /// How revisions are weighed. Required.
    pub mode: Option<GatingMode>,
    /// Roles that a revision must have. Required unless the mode is `disabled`.
    pub require_roles: Option<RequireRoles>,
}

impl Default for RevisionGating {
    fn default() -> RevisionGating {
        RevisionGating {
            revision_label_key: REVISION_LABEL.into(),
            role_label_key: ROLE_LABEL.into(),
            mode: None,
            require_roles: None,
        }
    }
}

/// How revisions are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GatingMode {
    /// By all their endpoints with a required role.
    Sum,
    /// By their endpoints of the role that has most over all revisions; the first listed among
    /// equals.
    MaxRole,
    /// Not at all: only header selectors count.
    Disabled,
}

/// `requireRoles`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RequireRoles {
    /// Values of the role label, each once.
    pub values: Vec<String>,
}

impl HeaderSelector {
    /// What a strict selector asks for, if the request says so.
    fn wanted<'a>(&self, headers: &Headers<'a>) -> Option<&'a str> {
        let strict = self.mode == Some(SelectorMode::Strict);
        headers.get(&self.header_name).filter(|value| strict && !value.is_empty())
    }
}

impl RevisionGating {
    fn roles(&self) -> &[String] {
        match (&self.mode, &self.require_roles) {
            (Some(GatingMode::Sum | GatingMode::MaxRole), Some(roles)) => &roles.values,
            _ => &[],
        }
    }

    fn revision_key(&self) -> &str {
        match self.revision_label_key.as_str() {
            "" => REVISION_LABEL,
            key => key,
        }
    }

    fn role_key(&self) -> &str {
        match self.role_label_key.as_str() {
            "" => ROLE_LABEL,
            key => key,
        }
    }

    /// The weight of each revision that has every role. An endpoint counts while it does not fail.
    fn weights<'a>(
        &self,
        scope: &LabelSelector,
        fleet: &'a Fleet,
        now: Time,
    ) -> BTreeMap<&'a str, u32> {
        let mut counts: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        let ready = |endpoint: &&Endpoint| !endpoint.is_avoided(now);
        for endpoint in fleet.iter().filter(ready).filter(|e| scope.matches(&e.labels)) {
            let Some(revision) = label(endpoint, self.revision_key()) else { continue };
            let role = endpoint.labels.get(self.role_key());
            if let Some(at) = self.roles().iter().position(|required| Some(required) == role) {
                let counts = counts.entry(revision);
                counts.or_insert_with(|| vec![0; self.roles().len()])[at] += 1;
            }
        }
        counts.retain(|_, of_roles| !of_roles.contains(&0));
        let total = |at: usize| counts.values().map(|of_roles| of_roles[at]).sum::<u32>();
        // The last of equal maxima, so the order is turned round: the first listed role wins.
        let largest = (0..self.roles().len()).rev().max_by_key(|at| total(*at)).unwrap_or(0);
        let weigh = |of_roles: &Vec<u32>| match self.mode {
            Some(GatingMode::MaxRole) => of_roles[largest],
            _ => of_roles.iter().sum(),
        };
        counts.iter().map(|(revision, of_roles)| (*revision, weigh(of_roles))).collect()
    }
}

fn label<'a>(endpoint: &'a Endpoint, key: &str) -> Option<&'a str> {
    endpoint.labels.get(key).map(String::as_str).filter(|value| !value.is_empty())
}

/// One key, in proportion to the weights.
fn draw<'a>(weights: &BTreeMap<&'a str, u32>, rng: &mut Rng) -> Option<&'a str> {
    let total: u32 = weights.values().sum();
    let mut left = rng.below(total as usize) as u32;
    let drawn = weights.iter().find(|(_, weight)| {
        let here = left < **weight;
        left = left.saturating_sub(**weight);
        here
    });
    drawn.map(|(revision, _)| *revision)
}

impl Rollout {
    /// What the response says about the endpoint that served it: the label of every selector.
    pub fn response_headers(&self, endpoint: &Endpoint) -> Vec<ResponseHeader> {
        let header = |selector: &HeaderSelector| {
            let value = label(endpoint, &selector.label_key)?.to_owned();
            Some(ResponseHeader { name: selector.header_name.to_ascii_lowercase(), value })
        };
        self.header_selectors.iter().filter_map(header).collect()
    }

    fn check_selectors(&self) -> Result<(), String> {
        for (at, selector) in self.header_selectors.iter().enumerate() {
            let missing = [
                ("name", selector.name.is_empty()),
                ("headerName", selector.header_name.is_empty()),
                ("labelKey", selector.label_key.is_empty()),
                ("mode", selector.mode.is_none()),
            ];
            if let Some((field, _)) = missing.iter().find(|(_, missing)| *missing) {
                return Err(format!("headerSelectors[{at}].{field} is required"));
            }
            for before in &self.header_selectors[..at] {
                if before.name == selector.name {
                    return Err(format!("headerSelectors[{at}].name {:?} twice", before.name));
                }
                if before.header_name.eq_ignore_ascii_case(&selector.header_name) {
                    let name = &selector.header_name;
                    return Err(format!("headerSelectors[{at}].headerName {name:?} twice"));
                }
            }
        }
        Ok(())
    }

    fn check_gating(&self) -> Result<(), String> {
        let Some(gating) = &self.revision_gating else {
            return Err("revisionGating is required; `mode: disabled` turns it off".into());
        };
        match gating.mode {
            None => return Err("revisionGating.mode is required: sum, max-role, disabled".into()),
            Some(GatingMode::Disabled) => return Ok(()),
            Some(GatingMode::Sum | GatingMode::MaxRole) => {}
        }
        let roles = gating.roles();
        if roles.is_empty() {
            return Err("revisionGating.requireRoles.values needs at least one role".into());
        }
        for (at, role) in roles.iter().enumerate() {
            let field = format!("revisionGating.requireRoles.values[{at}]");
            if role.is_empty() {
                return Err(format!("{field} is empty"));
            }
            if roles[..at].contains(role) {
                return Err(format!("{field} {role:?} twice"));
            }
        }
        Ok(())
    }
}

impl Plugin for Rollout {
    fn check(&self) -> Result<(), String> {
        let selector = &self.scope.label_selector;
        if selector.is_empty() {
            return Err("scope.labelSelector is required".into());
        }
        selector::parse(selector).map_err(|why| format!("scope.labelSelector: {why}"))?;
        self.check_selectors()?;
        self.check_gating()
    }

    fn headers(&self) -> Vec<String> {
        self.header_selectors.iter().map(|s| s.header_name.to_ascii_lowercase()).collect()
    }
}

impl Filter for Rollout {
    fn filter(&mut self, view: &View<'_>, rng: &mut Rng, keep: &mut [bool]) {
        let headers = view.request.headers;
        let wanted: Vec<(&str, &str)> = self
            .header_selectors
            .iter()
            .filter_map(|s| Some((s.label_key.as_str(), s.wanted(headers)?)))
            .collect();
        for (row, keep) in view.rows.iter().zip(&mut *keep) {
            let has = |(key, value): &(&str, &str)| {
                view.endpoint(row).and_then(|endpoint| label(endpoint, key)) == Some(value)
            };
            *keep &= wanted.iter().all(has);
        }
        let Some(gating) = self.revision_gating.as_ref().filter(|g| !g.roles().is_empty()) else {
            return;
        };
        // A selector that `check` has let pass can be read.
        let scope = self
            .selected
            .get_or_insert_with(|| selector::parse(&self.scope.label_selector).unwrap_or_default());
        let revision = |row| view.endpoint(row).and_then(|e| label(e, gating.revision_key()));
        let mut weights = gating.weights(scope, view.fleet, view.now);
        weights.retain(|covered, _| view.rows.iter().any(|row| revision(row) == Some(*covered)));
        if wanted.is_empty() {
            let drawn = draw(&weights, rng);
            weights.retain(|revision, _| Some(*revision) == drawn);
        }
        for (row, keep) in view.rows.iter().zip(keep) {
            *keep &= revision(row).is_some_and(|revision| weights.contains_key(revision));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use crate::settings::Settings;

    const REVISION_HEADER: &str = "x-disagg-revision";

    fn rollout(mode: &str) -> Rollout {
        let text = format!(
            "scope: {{labelSelector: set=mine}}
headerSelectors:
- {{name: revision, headerName: X-Disagg-Revision, labelKey: {REVISION_LABEL}, mode: strict}}
- {{name: slice, headerName: x-slice, labelKey: slice, mode: prefer}}
revisionGating: {{mode: {mode}, requireRoles: {{values: [prefill, decode]}}}}"
        );
        let rollout: Rollout = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(rollout.check(), Ok(()));
        rollout
    }

    /// Endpoints by revision and role.
    fn fleet(endpoints: &[(&str, &str)]) -> Fixture {
        let mut fixture = Fixture::new(endpoints.len());
        for (at, (revision, role)) in endpoints.iter().enumerate() {
            fixture.label(at, "set", "mine");
            fixture.label(at, REVISION_LABEL, revision);
            fixture.label(at, ROLE_LABEL, role);
        }
        fixture
    }

    const BOTH: [(&str, &str); 5] =
        [("a", "prefill"), ("a", "decode"), ("b", "prefill"), ("b", "decode"), ("a", "decode")];

    #[test]
    fn one_complete_revision_is_drawn() {
        let fixture = fleet(&BOTH);
        let (a, b) = ([true, true, false, false, true], [false, false, true, true, false]);
        for mode in ["sum", "max-role"] {
            let mut drawn = [0; 2];
            for seed in 0..1_000 {
                let keep = fixture.filter_seeded(&mut rollout(mode), seed);
                let mut turned = fixture.reversed().filter_seeded(&mut rollout(mode), seed);
                turned.reverse();
                assert_eq!(keep, turned, "the order of endpoints decides nothing");
                assert!(keep == a || keep == b, "{keep:?}");
                drawn[usize::from(keep == b)] += 1;
            }
            // Sum: 3 to 2. Most endpoints decode: 2 to 1.
            let expected = if mode == "sum" { 600 } else { 667 };
            assert!(u32::abs_diff(drawn[0], expected) < 50, "{mode}: {drawn:?}");
        }
    }

    #[test]
    fn the_weights_of_a_rollout_half_way() {
        let mut endpoints = vec![("a", "prefill"); 2];
        endpoints.extend([("a", "decode"); 9]);
        endpoints.extend([("b", "prefill"), ("b", "decode"), ("c", "decode")]);
        let mut fixture = fleet(&endpoints);
        let scope = selector::parse("set=mine").unwrap();
        let mut weights = |mode| {
            let gating = rollout(mode).revision_gating.unwrap();
            let weights = gating.weights(&scope, fixture.fleet(), Time::ZERO);
            weights.into_iter().map(|(name, weight)| format!("{name}{weight}")).collect::<Vec<_>>()
        };
        assert_eq!(weights("sum"), ["a11", "b2"]);
        assert_eq!(weights("max-role"), ["a9", "b1"]);
        assert_eq!(weights("disabled"), Vec::<String>::new());
    }

    #[test]
    fn equal_roles_are_decided_by_their_order() {
        let mut fixture =
            fleet(&[("a", "prefill"), ("a", "prefill"), ("a", "decode"), ("b", "prefill")]);
        let scope = LabelSelector::default();
        let mut gating = rollout("max-role").revision_gating.unwrap();
        gating.require_roles = Some(RequireRoles { values: vec!["decode".into()] });
        assert_eq!(gating.weights(&scope, fixture.fleet(), Time::ZERO), [("a", 1)].into());
        let mut more = fleet(&[
            ("a", "prefill"),
            ("a", "prefill"),
            ("a", "decode"),
            ("b", "prefill"),
            ("b", "decode"),
            ("b", "decode"),
        ]);
        let gating = rollout("max-role").revision_gating.unwrap();
        let expected = [("a", 2), ("b", 1)].into();
        assert_eq!(gating.weights(&scope, more.fleet(), Time::ZERO), expected, "prefill is first");
    }

    #[test]
    fn what_has_no_revision_or_an_incomplete_one_is_left_out() {
        let mut fixture = fleet(&[BOTH[0], BOTH[1], ("b", "decode"), ("", "decode")]);
        let complete = [true, true, false, false];
        assert_eq!(fixture.filter(&mut rollout("sum")), complete);
        // A decode endpoint that fails does not count, and nothing is left of its revision.
        let id = fixture.id(1);
        fixture.fleet().on_failed(Time::ZERO, id, &Settings::default());
        assert_eq!(fixture.filter(&mut rollout("sum")), [false; 4]);
        fixture.now_s(3_600.0);
        assert_eq!(fixture.filter(&mut rollout("sum")), complete);
        // Nor does one out of scope.
        fixture.label(1, "set", "other");
        assert_eq!(fixture.filter(&mut rollout("max-role")), [false; 4]);
        assert_eq!(fixture.filter(&mut rollout("disabled")), [true; 4]);
        assert_eq!(Fixture::new(0).filter(&mut rollout("sum")), [false; 0]);
    }

    #[test]
    fn a_strict_header_is_obeyed_or_nothing_is_left() {
        let mut fixture = fleet(&BOTH);
        let a = [true, true, false, false, true];
        for (mode, value, keep) in [
            ("sum", "a", a),
            ("disabled", "a", a),
            ("sum", "c", [false; 5]),
            ("disabled", "c", [false; 5]),
            ("disabled", "", [true; 5]),
        ] {
            fixture.header(REVISION_HEADER, value);
            for seed in 0..10 {
                let kept = fixture.filter_seeded(&mut rollout(mode), seed);
                assert_eq!(kept, keep, "{mode} {value}");
            }
        }
        // A revision that is asked for must be complete, too.
        let mut half = fleet(&[BOTH[0], BOTH[1], ("b", "decode")]);
        half.header(REVISION_HEADER, "b");
        assert_eq!(half.filter(&mut rollout("sum")), [false; 3]);
        half.header("x-slice", "nowhere");
        assert_eq!(half.filter(&mut rollout("sum")), [true, true, false], "prefer drops nobody");
    }

    #[test]
    fn the_response_names_the_labels_of_every_selector() {
        let mut fixture = fleet(&BOTH);
        fixture.label(0, "slice", "7");
        let id = fixture.id(0);
        let fleet = fixture.fleet();
        let headers = rollout("sum").response_headers(fleet.get(id).unwrap());
        let pairs: Vec<_> = headers.iter().map(|h| (h.name.as_str(), h.value.as_str())).collect();
        assert_eq!(pairs, [(REVISION_HEADER, "a"), ("x-slice", "7")]);
        assert_eq!(rollout("sum").headers(), [REVISION_HEADER, "x-slice"]);
    }

    #[test]
    fn mistakes_name_their_field() {
        let selector = "{name: n, headerName: h, labelKey: l, mode: strict}";
        let roles = "requireRoles: {values: [a]}";
        let gating = format!("revisionGating: {{mode: sum, {roles}}}");
        let scope = "scope: {labelSelector: a=b}";
        let table = [
            (String::new(), "scope.labelSelector is required"),
            ("scope: {labelSelector: 'a ='}".into(), "revisionGating is required"),
            ("scope: {labelSelector: 'a >'}".into(), "scope.labelSelector: `a >`"),
            (scope.into(), "revisionGating is required"),
            (format!("{scope}\nrevisionGating: {{}}"), "revisionGating.mode is required"),
            (format!("{scope}\nrevisionGating: {{mode: sum}}"), "revisionGating.requireRoles"),
            (
                format!("{scope}\nrevisionGating: {{mode: sum, requireRoles: {{values: ['']}}}}"),
                "revisionGating.requireRoles.values[0] is empty",
            ),
            (
                format!("{scope}\nrevisionGating: {{mode: sum, requireRoles: {{values: [a, a]}}}}"),
                "revisionGating.requireRoles.values[1] \"a\" twice",
            ),
            (
                format!("{scope}\n{gating}\nheaderSelectors: [{{name: n, labelKey: l}}]"),
                "headerSelectors[0].headerName is required",
            ),
            (
                format!("{scope}\n{gating}\nheaderSelectors: [{selector}, {selector}]"),
                "headerSelectors[1].name \"n\" twice",
            ),
        ];
        for (text, message) in table {
            let text = if text.is_empty() { "{}".into() } else { text };
            let rollout: Rollout = serde_saphyr::from_str(&text).unwrap();
            let error = rollout.check().unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
        }
    }
}
