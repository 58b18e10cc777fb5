//! `endpoint-attribute-scorer`: a number about the endpoint, as a score.

use schemars::JsonSchema;
use serde::Deserialize;

use super::relative;
use crate::attribute;
use crate::stage::{Plugin, Scorer, View};

/// `endpoint-attribute-scorer`: where a number lies in a range, from 0 to 1. The range is that of
/// the candidates, or a fixed one that cuts what lies outside. Candidates that all have the same
/// number get 1. One whose number is missing or stale gets nothing.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointAttribute {
    /// Name of the number; required. A custom metric's `attributeKey`, or what another extractor
    /// tells, as `GPUUtilization`.
    pub attribute_key: String,
    /// Who tells it: the name of an extractor. Any, when left out or empty; a name that holds a
    /// slash needs it, if only the empty one.
    pub producer: Option<String>,
    /// How the number becomes a score; required.
    pub algorithm: Option<ScoreAlgorithm>,
}

/// How the number becomes a score.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScoreAlgorithm {
    /// Which end of the range is best.
    #[serde(rename = "type")]
    pub kind: ScoreAlgorithmType,
    /// The range; that of the candidates when left out.
    #[serde(default)]
    pub normalization: Normalization,
}

/// Which end of the range is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoreAlgorithmType {
    /// The lower end scores 1.
    LinearLowerIsBetter,
    /// The upper end scores 1.
    LinearHigherIsBetter,
}

/// Where the range comes from; one at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Normalization {
    /// This one.
    pub fixed_range: Option<FixedRange>,
    /// From the least to the most of the candidates.
    pub adaptive_range: Option<AdaptiveRange>,
}

/// A range that does not change.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FixedRange {
    /// Lower end.
    pub min: f64,
    /// Upper end; above `min`.
    pub max: f64,
}

/// The range of the candidates; it has no parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdaptiveRange {}

impl Plugin for EndpointAttribute {
    fn check(&self) -> Result<(), String> {
        attribute::check("attributeKey", &self.attribute_key, &self.producer)?;
        let Some(algorithm) = &self.algorithm else {
            return Err("algorithm is required, with type: linear_lower_is_better or \
                        linear_higher_is_better"
                .into());
        };
        match (algorithm.normalization.fixed_range, algorithm.normalization.adaptive_range) {
            (Some(_), Some(_)) => Err("algorithm.normalization has both fixedRange and \
                                       adaptiveRange; keep one"
                .into()),
            (Some(FixedRange { min, max }), None)
                if !min.is_finite() || !max.is_finite() || min >= max =>
            {
                Err(format!(
                    "algorithm.normalization.fixedRange from {min} to {max} is no range: min must \
                     be below max"
                ))
            }
            _ => Ok(()),
        }
    }
}

impl Scorer for EndpointAttribute {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let Some(algorithm) = self.algorithm else { return };
        let lower_is_better = algorithm.kind == ScoreAlgorithmType::LinearLowerIsBetter;
        let number =
            |at: usize| attribute::read(view, &view.rows[at], &self.attribute_key, &self.producer);
        let Some(FixedRange { min, max }) = algorithm.normalization.fixed_range else {
            let sign = if lower_is_better { 1.0 } else { -1.0 };
            return relative(column, |at| Some(sign * number(at)?));
        };
        for (at, cell) in column.iter_mut().enumerate() {
            let Some(number) = number(at) else { continue };
            let share = ((number - min) / (max - min)).clamp(0.0, 1.0);
            *cell = if lower_is_better { 1.0 - share } else { share };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    use ScoreAlgorithmType::{LinearHigherIsBetter, LinearLowerIsBetter};

    fn scorer(kind: ScoreAlgorithmType, range: Option<(f64, f64)>) -> EndpointAttribute {
        let fixed_range = range.map(|(min, max)| FixedRange { min, max });
        let normalization = Normalization { fixed_range, adaptive_range: None };
        EndpointAttribute {
            attribute_key: "n".into(),
            producer: None,
            algorithm: Some(ScoreAlgorithm { kind, normalization }),
        }
    }

    fn score(scorer: &EndpointAttribute, numbers: &[f64]) -> Vec<f64> {
        let mut fixture = Fixture::new(numbers.len());
        for (at, number) in numbers.iter().enumerate() {
            fixture.attribute(at, "n", "p", *number);
        }
        fixture.score(&mut scorer.clone())
    }

    #[test]
    fn a_place_in_the_range_of_the_candidates() {
        let lower = scorer(LinearLowerIsBetter, None);
        let higher = scorer(LinearHigherIsBetter, None);
        let table: [(&EndpointAttribute, &[f64], &[f64]); 8] = [
            (&lower, &[10.0, 5.0, 0.0], &[0.0, 0.5, 1.0]),
            (&higher, &[10.0, 5.0, 0.0], &[1.0, 0.5, 0.0]),
            (&lower, &[-10.0, 0.0], &[1.0, 0.0]),
            (&lower, &[5.0, 5.0], &[1.0, 1.0]),
            (&higher, &[0.0, 0.0], &[1.0, 1.0]),
            (&lower, &[7.0], &[1.0]),
            (&lower, &[10.0, f64::NAN, 0.0], &[0.0, f64::NAN, 1.0]),
            (&lower, &[], &[]),
        ];
        for (scorer, numbers, scores) in table {
            assert_scores(&score(scorer, numbers), scores);
        }
    }

    #[test]
    fn a_place_in_a_fixed_range() {
        let lower = scorer(LinearLowerIsBetter, Some((0.0, 1.0)));
        let higher = scorer(LinearHigherIsBetter, Some((10.0, 20.0)));
        assert_scores(
            &score(&lower, &[0.25, 0.0, 7.0, -3.0, f64::NAN]),
            &[0.75, 1.0, 0.0, 1.0, f64::NAN],
        );
        assert_scores(&score(&lower, &[0.5, 0.5]), &[0.5, 0.5]);
        assert_scores(&score(&higher, &[15.0, 20.0, 5.0]), &[0.5, 1.0, 0.0]);
    }

    #[test]
    fn only_fresh_numbers_of_the_producer_count() {
        let mut fixture = Fixture::new(2);
        fixture.attribute(0, "n", "p", 0.2);
        fixture.attribute(1, "n", "q", 0.4);
        let mut scorer = scorer(LinearHigherIsBetter, Some((0.0, 1.0)));
        assert_scores(&fixture.score(&mut scorer), &[0.2, 0.4]);
        scorer.producer = Some("q".into());
        assert_scores(&fixture.score(&mut scorer), &[f64::NAN, 0.4]);
        fixture.now_s(3600.0);
        assert_scores(&fixture.score(&mut scorer), &[f64::NAN, f64::NAN]);
    }

    #[test]
    fn parameters_that_make_no_sense_are_refused() {
        assert!(scorer(LinearLowerIsBetter, None).check().is_ok());
        for (min, max) in [(1.0, 1.0), (2.0, 1.0), (f64::NAN, 1.0), (0.0, f64::INFINITY)] {
            assert!(scorer(LinearLowerIsBetter, Some((min, max))).check().is_err());
        }
        let mut both = scorer(LinearLowerIsBetter, Some((0.0, 1.0)));
        let algorithm = both.algorithm.as_mut().unwrap();
        algorithm.normalization.adaptive_range = Some(AdaptiveRange {});
        assert!(both.check().unwrap_err().contains("keep one"));
        let combined = EndpointAttribute {
            attribute_key: "GPUUtilization/dcgm-extractor".into(),
            ..scorer(LinearLowerIsBetter, None)
        };
        assert!(combined.check().is_err());
        assert!(EndpointAttribute::default().check().is_err());
        let unknown = r#"{"attributeKey": "n", "algorithm": {"type": "cubic"}}"#;
        assert!(serde_json::from_str::<EndpointAttribute>(unknown).is_err());
    }
}
