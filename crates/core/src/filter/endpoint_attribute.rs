//! `endpoint-attribute-filter`: is a number about the endpoint on the right side of a threshold?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Filter, Plugin, View};
use crate::{Rng, attribute};

/// `endpoint-attribute-filter`: keeps endpoints of which a number compares to a threshold as it
/// should.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointAttribute {
    /// Name of the number; required. A custom metric's `attributeKey`, or what another extractor
    /// tells, as `GPUUtilization`.
    pub attribute: String,
    /// Who tells it: the name of an extractor. Any, when left out or empty; a name that holds a
    /// slash needs it, if only the empty one.
    pub producer: Option<String>,
    /// What happens to endpoints of which it is not known, or no longer.
    pub on_missing: OnMissing,
    /// Keep all endpoints when none passes. Else the request is refused.
    pub fallback_on_empty: bool,
    /// How the number is judged; required.
    pub algorithm: Option<FilterAlgorithm>,
}

/// What happens to an endpoint of which nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
pub enum OnMissing {
    /// It is kept.
    #[default]
    #[serde(alias = "")]
    Pass,
    /// It is removed.
    Fail,
}

/// How the number is judged.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FilterAlgorithm {
    /// The way; there is one.
    #[serde(rename = "type")]
    pub kind: FilterAlgorithmType,
    /// For `threshold`; required.
    #[serde(default)]
    pub threshold: Option<Threshold>,
}

/// Ways to judge a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FilterAlgorithmType {
    /// By comparison with one value.
    Threshold,
}

/// A comparison with one value.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Threshold {
    /// Read as: the endpoint's number, operator, `value`.
    pub operator: Comparison,
    /// The value.
    pub value: f64,
}

/// Comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Comparison {
    /// Below the value.
    LessThan,
    /// At most the value.
    LessThanOrEqual,
    /// Above the value.
    GreaterThan,
    /// At least the value.
    GreaterThanOrEqual,
    /// The value.
    Equal,
    /// Any other.
    NotEqual,
}

impl Threshold {
    fn holds(self, number: f64) -> bool {
        match self.operator {
            Comparison::LessThan => number < self.value,
            Comparison::LessThanOrEqual => number <= self.value,
            Comparison::GreaterThan => number > self.value,
            Comparison::GreaterThanOrEqual => number >= self.value,
            Comparison::Equal => number == self.value,
            Comparison::NotEqual => number != self.value,
        }
    }
}

impl Plugin for EndpointAttribute {
    fn check(&self) -> Result<(), String> {
        attribute::check("attribute", &self.attribute, &self.producer)?;
        match self.algorithm {
            None => Err("algorithm is required, with type: threshold".into()),
            Some(FilterAlgorithm { threshold: None, .. }) => {
                Err("algorithm.threshold is required: an operator and a value".into())
            }
            Some(FilterAlgorithm { threshold: Some(threshold), .. })
                if !threshold.value.is_finite() =>
            {
                let value = threshold.value;
                Err(format!("algorithm.threshold.value {value} must be finite"))
            }
            Some(_) => Ok(()),
        }
    }
}

impl Filter for EndpointAttribute {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        let threshold = self.algorithm.and_then(|algorithm| algorithm.threshold);
        let Some(threshold) = threshold else { return };
        for (row, keep) in view.rows.iter().zip(keep.iter_mut()) {
            *keep = match attribute::read(view, row, &self.attribute, &self.producer) {
                Some(number) => threshold.holds(number),
                None => self.on_missing == OnMissing::Pass,
            };
        }
        if self.fallback_on_empty && !keep.contains(&true) {
            keep.fill(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn filter(operator: Comparison, value: f64) -> EndpointAttribute {
        let threshold = Some(Threshold { operator, value });
        EndpointAttribute {
            attribute: "n".into(),
            algorithm: Some(FilterAlgorithm { kind: FilterAlgorithmType::Threshold, threshold }),
            ..EndpointAttribute::default()
        }
    }

    #[test]
    fn the_number_compares_to_the_threshold() {
        let mut fixture = Fixture::new(3);
        for (at, number) in [1.0, 2.0, 3.0].into_iter().enumerate() {
            fixture.attribute(at, "n", "p", number);
        }
        let table = [
            (Comparison::LessThan, [true, false, false]),
            (Comparison::LessThanOrEqual, [true, true, false]),
            (Comparison::GreaterThan, [false, false, true]),
            (Comparison::GreaterThanOrEqual, [false, true, true]),
            (Comparison::Equal, [false, true, false]),
            (Comparison::NotEqual, [true, false, true]),
        ];
        for (operator, kept) in table {
            assert_eq!(fixture.filter(&mut filter(operator, 2.0)), kept, "{operator:?}");
        }
    }

    #[test]
    fn missing_and_stale_numbers_pass_or_fail_and_nobody_left_may_mean_all() {
        let mut fixture = Fixture::new(3);
        fixture.attribute(0, "n", "p", 1.0);
        fixture.attribute(1, "n", "q", 9.0);
        let low = filter(Comparison::LessThan, 5.0);
        let with = |on_missing, fallback_on_empty, producer: Option<&str>| EndpointAttribute {
            on_missing,
            fallback_on_empty,
            producer: producer.map(str::to_owned),
            ..low.clone()
        };
        let table = [
            (with(OnMissing::Pass, false, None), [true, false, true]),
            (with(OnMissing::Fail, false, None), [true, false, false]),
            (with(OnMissing::Fail, false, Some("")), [true, false, false]),
            (with(OnMissing::Pass, false, Some("q")), [true, false, true]),
            (with(OnMissing::Fail, false, Some("q")), [false; 3]),
            (with(OnMissing::Fail, true, Some("q")), [true; 3]),
        ];
        for (mut filter, kept) in table {
            assert_eq!(fixture.filter(&mut filter), kept, "{filter:?}");
        }
        fixture.now_s(3600.0);
        assert_eq!(fixture.filter(&mut with(OnMissing::Fail, false, None)), [false; 3]);
        assert_eq!(fixture.filter(&mut with(OnMissing::Pass, false, None)), [true; 3]);
        assert_eq!(Fixture::new(0).filter(&mut low.clone()), [true; 0]);
    }

    #[test]
    fn what_is_required_is_asked_for() {
        assert!(filter(Comparison::Equal, 1.0).check().is_ok());
        assert!(filter(Comparison::Equal, f64::NAN).check().is_err());
        let mut bad = filter(Comparison::Equal, 1.0);
        bad.attribute = "GPUUtilization/dcgm-extractor".into();
        assert!(bad.check().unwrap_err().contains("producer: dcgm-extractor"));
        bad.producer = Some("dcgm-extractor".into());
        assert!(bad.check().is_ok());
        bad.algorithm = None;
        assert!(bad.check().is_err());
        let kind = FilterAlgorithmType::Threshold;
        bad.algorithm = Some(FilterAlgorithm { kind, threshold: None });
        assert!(bad.check().is_err());
        assert!(EndpointAttribute::default().check().is_err());
    }
}
