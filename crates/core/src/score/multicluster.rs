//! `multicluster-queue-scorer`, `multicluster-kv-cache-utilization-scorer` and
//! `multicluster-prefix-cache-scorer`: the endpoints are clusters.
//!
//! The router of each cluster tells the averages of its endpoints as its own metrics; they arrive
//! here as numbers about the endpoint.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{prefix, relative};
use crate::attribute;
use crate::stage::{Inputs, PREFIX_DEFAULT, Plugin, ProducerRef, Scorer, View};

/// Key of the average number of requests that wait in an engine of the cluster.
pub const CLUSTER_QUEUE: &str = "llm-d.ai/multicluster-queue-size";

/// Key of the average share of KV blocks in use in the cluster, 0 to 1.
pub const CLUSTER_KV_USAGE: &str = "llm-d.ai/multicluster-kv-cache-utilization";

/// `multicluster-queue-scorer`: `(max - q) / (max - min)` over the clusters' average queues; all
/// equal: 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterQueue {}

/// `multicluster-kv-cache-utilization-scorer`: 1 less the cluster's average use of its KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterKvUsage {}

/// `multicluster-prefix-cache-scorer`: as `prefix-cache-scorer`, by the clusters that the prompt's
/// prefix was sent to.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ClusterPrefix {
    /// Producer of prefix matches: the name of a prefix cache producer;
    /// `approx-prefix-cache-producer` when left out.
    pub prefix_match_info_producer_name: Option<String>,
    /// What the length of the match weighs against its share of the prompt, 0 to 1.
    pub match_length_weight: f64,
    /// Matched tokens from which the length part is full.
    pub match_length_scale_tokens: f64,
}

impl Default for ClusterPrefix {
    fn default() -> ClusterPrefix {
        ClusterPrefix {
            prefix_match_info_producer_name: None,
            match_length_weight: 0.0,
            match_length_scale_tokens: prefix::SCALE_TOKENS,
        }
    }
}

impl Plugin for ClusterQueue {}

impl Scorer for ClusterQueue {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        relative(column, |at| attribute::read(view, &view.rows[at], CLUSTER_QUEUE, &None));
    }
}

impl Plugin for ClusterKvUsage {}

impl Scorer for ClusterKvUsage {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            if let Some(usage) = attribute::read(view, row, CLUSTER_KV_USAGE, &None) {
                *cell = 1.0 - usage.clamp(0.0, 1.0);
            }
        }
    }
}

impl Plugin for ClusterPrefix {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        prefix::check(self.match_length_weight, self.match_length_scale_tokens)
    }
}

impl Scorer for ClusterPrefix {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            let (weight, scale) = (self.match_length_weight, self.match_length_scale_tokens);
            *cell = prefix::value(view.prefix(row), weight, scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn averages_of_clusters_score_as_those_of_engines() {
        let mut fixture = Fixture::new(4);
        // What the clusters' gateways tell as engines does not count.
        fixture.signals(3, 0, 0, 0.0);
        for (at, (queue, usage)) in [(10.0, 0.8), (2.5, 0.5), (0.0, 0.0)].into_iter().enumerate() {
            fixture.attribute(at, CLUSTER_QUEUE, "p", queue);
            fixture.attribute(at, CLUSTER_KV_USAGE, "p", usage);
        }
        assert_scores(&fixture.score(&mut ClusterQueue {}), &[0.0, 0.75, 1.0, f64::NAN]);
        assert_scores(&fixture.score(&mut ClusterKvUsage {}), &[0.2, 0.5, 1.0, f64::NAN]);
        fixture.now_s(3600.0);
        assert_scores(&fixture.score(&mut ClusterQueue {}), &[f64::NAN; 4]);
        assert_scores(&fixture.score(&mut ClusterKvUsage {}), &[f64::NAN; 4]);
    }

    #[test]
    fn equal_clusters_are_equally_good() {
        let mut fixture = Fixture::new(2);
        fixture.attribute(0, CLUSTER_QUEUE, "p", 3.0);
        fixture.attribute(1, CLUSTER_QUEUE, "p", 3.0);
        assert_scores(&fixture.score(&mut ClusterQueue {}), &[1.0, 1.0]);
        assert_scores(&Fixture::new(0).score(&mut ClusterQueue {}), &[]);
    }

    #[test]
    fn prefixes_score_as_within_a_cluster() {
        let mixed = ClusterPrefix {
            match_length_weight: 0.5,
            match_length_scale_tokens: 100.0,
            ..Default::default()
        };
        let table = [
            (&ClusterPrefix::default(), 5.0, 10, 0.5),
            (&mixed, 5.0, 10, 0.25125),
            (&mixed, 50.0, 100, 0.375),
            (&mixed, 0.0, 0, 0.0),
        ];
        for (scorer, matched, total, score) in table {
            let mut fixture = Fixture::new(1);
            fixture.prefix(0, matched, total, 1);
            assert_scores(&fixture.score(&mut scorer.clone()), &[score]);
        }
        assert!(ClusterPrefix { match_length_weight: 2.0, ..mixed }.check().is_err());
        assert!(ClusterPrefix::default().check().is_ok());
    }
}
