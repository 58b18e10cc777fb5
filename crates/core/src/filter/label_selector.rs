//! `label-selector-filter`: does the endpoint carry the labels?

use std::collections::BTreeMap;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::screen::selector;
use crate::stage::{Filter, Plugin, View};

/// A Kubernetes label selector: all of `matchLabels` and all of `matchExpressions` must hold. An
/// empty selector keeps every endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LabelSelector {
    /// Label and the one value it must have.
    pub match_labels: BTreeMap<String, String>,
    /// Further conditions.
    pub match_expressions: Vec<LabelExpression>,
}

/// One condition on a label.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelExpression {
    /// The label.
    pub key: String,
    /// How its value is compared.
    pub operator: LabelOperator,
    /// What it is compared with; empty for `Exists` and `DoesNotExist`.
    #[serde(default)]
    pub values: Vec<String>,
}

/// Kubernetes' operators. `NotIn` holds for an endpoint without the label, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum LabelOperator {
    /// The value is listed.
    In,
    /// The value is not listed, or there is none.
    NotIn,
    /// There is a value.
    Exists,
    /// There is none.
    DoesNotExist,
}

impl LabelExpression {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            LabelOperator::In => value.is_some_and(|v| self.values.contains(v)),
            LabelOperator::NotIn => value.is_none_or(|v| !self.values.contains(v)),
            LabelOperator::Exists => value.is_some(),
            LabelOperator::DoesNotExist => value.is_none(),
        }
    }
}

impl LabelSelector {
    /// Whether an endpoint with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|expression| expression.holds(labels))
    }
}

/// Kubernetes' short notation: `app=vllm,tier in (a, b),!canary`.
impl FromStr for LabelSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<LabelSelector, String> {
        selector::parse(text)
    }
}

impl Plugin for LabelSelector {
    fn check(&self) -> Result<(), String> {
        for (at, e) in self.match_expressions.iter().enumerate() {
            let listed = matches!(e.operator, LabelOperator::In | LabelOperator::NotIn);
            match (listed, e.values.is_empty()) {
                (true, true) => {
                    return Err(format!("matchExpressions[{at}]: {:?} needs values", e.operator));
                }
                (false, false) => {
                    let field = format!("matchExpressions[{at}].values");
                    return Err(format!("{field}: {:?} takes no values", e.operator));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Filter for LabelSelector {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        for (row, keep) in view.rows.iter().zip(keep) {
            *keep = view.endpoint(row).is_some_and(|endpoint| self.matches(&endpoint.labels));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn expression(key: &str, operator: LabelOperator, values: &[&str]) -> LabelSelector {
        LabelSelector {
            match_expressions: vec![LabelExpression {
                key: key.into(),
                operator,
                values: values.iter().map(|v| v.to_string()).collect(),
            }],
            ..LabelSelector::default()
        }
    }

    #[test]
    fn selectors_have_kubernetes_semantics() {
        use LabelOperator::{DoesNotExist, Exists, In, NotIn};
        let with = labels(&[("tier", "fast")]);
        let without = labels(&[]);
        let table = [
            (expression("tier", In, &["fast", "slow"]), true, false),
            (expression("tier", NotIn, &["slow"]), true, true),
            (expression("tier", NotIn, &["fast"]), false, true),
            (expression("tier", Exists, &[]), true, false),
            (expression("tier", DoesNotExist, &[]), false, true),
            (LabelSelector { match_labels: with.clone(), ..Default::default() }, true, false),
            (LabelSelector::default(), true, true),
        ];
        for (selector, on_with, on_without) in table {
            assert_eq!(selector.matches(&with), on_with, "{selector:?}");
            assert_eq!(selector.matches(&without), on_without, "{selector:?}");
        }
    }

    #[test]
    fn operators_without_their_values_are_refused() {
        assert!(expression("a", LabelOperator::In, &[]).check().is_err());
        assert!(expression("a", LabelOperator::Exists, &["x"]).check().is_err());
        assert!(expression("a", LabelOperator::NotIn, &["x"]).check().is_ok());
    }
}
