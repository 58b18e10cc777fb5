//! `slo-headroom-tier-filter`: keep to endpoints that are expected to answer in time.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::stage::{Filter, Inputs, LATENCY_DEFAULT, Plugin, ProducerRef, Row, View};

/// Parameters of `slo-headroom-tier-filter`. Candidates are in time where both predicted latencies
/// keep the client's limits, and late otherwise, without a prediction too. Those in time are kept
/// alone while there are both. All are kept while nothing is predicted.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SloHeadroomTier {
    /// With this probability, 0 to 1, the late ones are kept instead, so that they can show that
    /// they have recovered.
    pub epsilon_explore_neg: f64,
    /// Producer of predicted latencies.
    pub latency_prediction_info_producer_name: Option<String>,
}

impl Default for SloHeadroomTier {
    fn default() -> SloHeadroomTier {
        SloHeadroomTier { epsilon_explore_neg: 0.01, latency_prediction_info_producer_name: None }
    }
}

impl Plugin for SloHeadroomTier {
    fn inputs(&self) -> Inputs<'_> {
        let latency = ProducerRef::of(&self.latency_prediction_info_producer_name, LATENCY_DEFAULT);
        Inputs { latency: Some(latency), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        if (0.0..=1.0).contains(&self.epsilon_explore_neg) {
            return Ok(());
        }
        Err(format!("epsilonExploreNeg {} is not in [0, 1]", self.epsilon_explore_neg))
    }
}

impl Filter for SloHeadroomTier {
    fn filter(&mut self, view: &View<'_>, rng: &mut Rng, keep: &mut [bool]) {
        let in_time = |row: &Row| row.latency.is_some_and(|latency| latency.is_in_time());
        let count = view.rows.iter().filter(|row| in_time(row)).count();
        if count == 0 || count == view.rows.len() {
            return;
        }
        let explores = rng.next_f64() < self.epsilon_explore_neg;
        for (row, keep) in view.rows.iter().zip(keep) {
            *keep = in_time(row) != explores;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use crate::stage::Latency;

    fn fixture(headrooms: &[Option<(f64, f64)>]) -> Fixture {
        let mut fixture = Fixture::new(headrooms.len());
        for (at, headrooms) in headrooms.iter().enumerate() {
            if let Some((ttft_headroom_s, tpot_headroom_s)) = *headrooms {
                let predicted = Latency { ttft_headroom_s, tpot_headroom_s, ..Default::default() };
                fixture.latency(at, predicted);
            }
        }
        fixture
    }

    #[test]
    fn those_in_time_are_kept_while_there_are_others() {
        let never = SloHeadroomTier { epsilon_explore_neg: 0.0, ..Default::default() };
        let always = SloHeadroomTier { epsilon_explore_neg: 1.0, ..Default::default() };
        let nan = f64::NAN;
        let in_time = Some((1.0, 0.5));
        type Case<'a> = (&'a [Option<(f64, f64)>], &'a [bool], &'a [bool]);
        let table: [Case<'_>; 10] = [
            (&[], &[], &[]),
            (&[in_time], &[true], &[true]),
            (&[Some((-1.0, 0.0))], &[true], &[true]),
            (&[None, None], &[true, true], &[true, true]),
            (&[in_time, Some((0.0, 0.0))], &[true, true], &[true, true]),
            (&[Some((-1.0, 1.0)), Some((1.0, -1.0)), None], &[true; 3], &[true; 3]),
            (&[in_time, Some((1.0, -0.1))], &[true, false], &[false, true]),
            (&[in_time, Some((-0.1, 1.0))], &[true, false], &[false, true]),
            (&[in_time, None, Some((-1.0, -1.0))], &[true, false, false], &[false, true, true]),
            (&[in_time, Some((nan, 0.0))], &[true, false], &[false, true]),
        ];
        for (headrooms, kept, explored) in table {
            assert_eq!(fixture(headrooms).filter(&mut never.clone()), kept, "{headrooms:?}");
            assert_eq!(fixture(headrooms).filter(&mut always.clone()), explored, "{headrooms:?}");
        }
    }

    #[test]
    fn late_ones_are_tried_as_often_as_said() {
        let fixture = fixture(&[Some((1.0, 1.0)), Some((-1.0, 1.0))]);
        let mut filter = SloHeadroomTier { epsilon_explore_neg: 0.25, ..Default::default() };
        let explored = (0..4_000).filter(|seed| fixture.filter_seeded(&mut filter, *seed)[1]);
        assert!((800..1_200).contains(&explored.count()));
    }

    #[test]
    fn probabilities_out_of_range_are_refused() {
        for epsilon_explore_neg in [-0.1, 1.1, f64::NAN] {
            let bad = SloHeadroomTier { epsilon_explore_neg, ..Default::default() };
            assert!(bad.check().unwrap_err().starts_with("epsilonExploreNeg"));
        }
        assert!(SloHeadroomTier::default().check().is_ok());
    }
}
