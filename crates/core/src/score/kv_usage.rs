//! `kv-cache-utilization-scorer`: more free KV cache is better, in absolute terms.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, Scorer, View};

/// `kv-cache-utilization-scorer` (old name `kv-cache-scorer`): `1 - usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KvUsage {}

impl Plugin for KvUsage {}

impl Scorer for KvUsage {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            if let Some(signals) = row.signals {
                *cell = 1.0 - signals.kv_usage;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_published_vector_holds() {
        let mut fixture = Fixture::new(4);
        for (at, usage) in [0.8, 0.5, 0.0].into_iter().enumerate() {
            fixture.signals(at, 0, 0, usage);
        }
        assert_scores(&fixture.score(&mut KvUsage {}), &[0.2, 0.5, 1.0, f64::NAN]);
    }
}
