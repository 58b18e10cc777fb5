//! `decode-filter`, `prefill-filter` and `encode-filter`: does the endpoint play that role?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{Filter, Plugin, Row, View};

/// The label that names an endpoint's role.
pub const ROLE_LABEL: &str = "llm-d.ai/role";

const DECODE: &[&str] = &["decode", "prefill-decode", "both", "encode-prefill-decode"];
const PREFILL: &[&str] =
    &["prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"];
const ENCODE: &[&str] = &["encode", "encode-prefill", "encode-prefill-decode"];

/// `decode-filter`: the role includes decoding, or there is no role label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Decode {}

/// `prefill-filter`: the role includes prefill; an endpoint without a role label does not pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prefill {}

/// `encode-filter`: the role includes encoding images, audio and video; an endpoint without a role
/// label does not pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Encode {}

impl Plugin for Decode {}

impl Filter for Decode {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        by_role(view, keep, decodes);
    }
}

impl Plugin for Prefill {}

impl Filter for Prefill {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        by_role(view, keep, prefills);
    }
}

/// Whether an endpoint of this role decodes.
pub(crate) fn decodes(role: Option<&str>) -> bool {
    role.is_none_or(|role| DECODE.contains(&role))
}

/// Whether an endpoint of this role prefills for others.
pub(crate) fn prefills(role: Option<&str>) -> bool {
    role.is_some_and(|role| PREFILL.contains(&role))
}

/// The role that an endpoint's label names.
pub(crate) fn role_of<'a>(view: &View<'a>, row: &Row) -> Option<&'a str> {
    let endpoint = view.fleet.get(row.id)?;
    endpoint.labels.get(ROLE_LABEL).map(String::as_str)
}

impl Plugin for Encode {}

impl Filter for Encode {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        by_role(view, keep, |role| role.is_some_and(|role| ENCODE.contains(&role)));
    }
}

fn by_role(view: &View<'_>, keep: &mut [bool], passes: impl Fn(Option<&str>) -> bool) {
    for (row, keep) in view.rows.iter().zip(keep) {
        *keep = passes(role_of(view, row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn roles_decide_and_only_decode_accepts_a_missing_label() {
        let table: [(&str, bool, bool, bool); 9] = [
            ("", true, false, false),
            ("decode", true, false, false),
            ("prefill", false, true, false),
            ("encode", false, false, true),
            ("both", true, true, false),
            ("prefill-decode", true, true, false),
            ("encode-prefill", false, true, true),
            ("encode-prefill-decode", true, true, true),
            ("Decode", false, false, false),
        ];
        for (role, decode, prefill, encode) in table {
            let mut fixture = Fixture::new(1);
            if !role.is_empty() {
                fixture.label(0, ROLE_LABEL, role);
            }
            assert_eq!(fixture.filter(&mut Decode {}), [decode], "{role:?}");
            assert_eq!(fixture.filter(&mut Prefill {}), [prefill], "{role:?}");
            assert_eq!(fixture.filter(&mut Encode {}), [encode], "{role:?}");
        }
    }
}
