//! `lora-affinity-scorer`: endpoints that hold the adapter, or have room for it, are better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, Scorer, View};

/// `lora-affinity-scorer`: 1 when the adapter runs there; else 0.8 while there is a free adapter
/// slot; else 0.6 when the adapter waits there; else 0. An engine that says nothing about adapters
/// has no slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraAffinity {}

impl Plugin for LoraAffinity {}

impl Scorer for LoraAffinity {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let model = view.request.model;
        for (row, cell) in view.rows.iter().zip(column) {
            if row.signals.is_none() {
                continue;
            }
            let metrics = view.endpoint(row).and_then(|endpoint| endpoint.metrics());
            let lora = metrics.and_then(|metrics| metrics.lora.as_ref());
            *cell = lora.map_or(0.0, |lora| {
                let holds = |names: &[String]| names.iter().any(|name| name == model);
                if holds(&lora.running) {
                    1.0
                } else if lora.running.len() + lora.waiting.len() < lora.max as usize {
                    0.8
                } else if holds(&lora.waiting) {
                    0.6
                } else {
                    0.0
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn held_beats_free_beats_waiting() {
        let mut fixture = Fixture::new(5);
        fixture.lora(0, &["adapter"], &[], 1);
        fixture.lora(1, &["other"], &[], 2);
        fixture.lora(2, &["other"], &["adapter"], 2);
        fixture.lora(3, &["other"], &["another"], 2);
        fixture.signals(4, 0, 0, 0.0);
        fixture.model("adapter");
        assert_scores(&fixture.score(&mut LoraAffinity {}), &[1.0, 0.8, 0.6, 0.0, 0.0]);
    }
}
