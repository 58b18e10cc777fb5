//! `by-label`: does one label have one of the values?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{Filter, Plugin, View};

/// `by-label`, the older form of `label-selector-filter`: keeps endpoints whose label has one of
/// the values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ByLabel {
    /// The label; required.
    pub label: String,
    /// Values that pass. A missing label has the empty value.
    pub valid_values: Vec<String>,
    /// Whether endpoints without the label pass.
    pub allows_no_label: bool,
}

impl Plugin for ByLabel {
    fn check(&self) -> Result<(), String> {
        if self.label.is_empty() {
            return Err("label is required: the name of the label".into());
        }
        if self.valid_values.is_empty() && !self.allows_no_label {
            return Err("validValues is empty and allowsNoLabel is false, so that no endpoint \
                        passes; list at least one value"
                .into());
        }
        Ok(())
    }
}

impl Filter for ByLabel {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        for (row, keep) in view.rows.iter().zip(keep) {
            let Some(endpoint) = view.endpoint(row) else { continue };
            let label = endpoint.labels.get(&self.label);
            let value = label.map_or("", String::as_str);
            *keep = (label.is_none() && self.allows_no_label)
                || self.valid_values.iter().any(|valid| valid == value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn filter(valid_values: &[&str], allows_no_label: bool) -> ByLabel {
        ByLabel {
            label: "tier".into(),
            valid_values: valid_values.iter().map(|value| (*value).to_owned()).collect(),
            allows_no_label,
        }
    }

    #[test]
    fn the_label_has_one_of_the_values() {
        let mut fixture = Fixture::new(4);
        fixture.label(0, "tier", "fast");
        fixture.label(1, "tier", "slow");
        fixture.label(2, "tier", "");
        fixture.label(3, "other", "fast");
        let table: [(ByLabel, [bool; 4]); 5] = [
            (filter(&["fast"], false), [true, false, false, false]),
            (filter(&["fast", "slow"], false), [true, true, false, false]),
            (filter(&["fast"], true), [true, false, false, true]),
            (filter(&[], true), [false, false, false, true]),
            (filter(&[""], false), [false, false, true, true]),
        ];
        for (mut filter, kept) in table {
            assert_eq!(fixture.filter(&mut filter), kept, "{filter:?}");
        }
        assert_eq!(Fixture::new(0).filter(&mut filter(&["fast"], false)), [true; 0]);
    }

    #[test]
    fn a_filter_that_nobody_passes_is_refused() {
        assert!(filter(&[], false).check().is_err());
        assert!(filter(&[], true).check().is_ok());
        assert!(filter(&["a"], false).check().is_ok());
        assert!(ByLabel { label: String::new(), ..filter(&["a"], false) }.check().is_err());
    }
}
