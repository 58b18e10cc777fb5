//! `no-hit-lru-scorer`: prompts that no cache knows go where a cold prompt went longest ago, so
//! that new prefixes spread evenly.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::fleet::EndpointId;
use crate::lru::Lru;
use crate::memory::Memory;
use crate::stage::{
    Inputs, PREFIX_DEFAULT, Picked, Plugin, ProducerRef, ResponseHeader, Scorer, View,
};

/// Endpoints remembered by default.
const LRU_SIZE: i64 = 1024;

/// `no-hit-lru-scorer`: 0.5 for all when any candidate has a hit. Else, of `n` candidates, the one
/// of rank `r` gets `1 - r / (n - 1)`: first those that never had a cold request, by name, then
/// the others, the longest unused first. Cold requests alone move the order, by every endpoint
/// that a profile chose for them: who answers as well as who computed the prompt before.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct NoHitLru {
    /// Endpoints remembered; 0 and less mean 1024.
    pub lru_size: i64,
    /// Producer of prefix matches: the name of a prefix cache producer;
    /// `approx-prefix-cache-producer` when left out.
    pub prefix_match_info_producer_name: Option<String>,
    /// Deprecated and without effect.
    pub prefix_plugin_type: Option<String>,
    /// Deprecated and without effect; see `prefixMatchInfoProducerName`.
    pub prefix_plugin_name: Option<String>,
    #[serde(skip)]
    used: Lru<EndpointId, ()>,
    #[serde(skip)]
    cold: bool,
    #[serde(skip)]
    ranks: Vec<(Option<u64>, usize)>,
}

impl Default for NoHitLru {
    fn default() -> NoHitLru {
        NoHitLru {
            lru_size: LRU_SIZE,
            prefix_match_info_producer_name: None,
            prefix_plugin_type: None,
            prefix_plugin_name: None,
            used: Lru::default(),
            cold: false,
            ranks: Vec::new(),
        }
    }
}

impl NoHitLru {
    /// One that reads the named producer.
    pub fn reading(producer: &str) -> NoHitLru {
        let name = Some(producer.to_owned());
        NoHitLru { prefix_match_info_producer_name: name, ..NoHitLru::default() }
    }
}

impl Plugin for NoHitLru {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn inert(&self) -> Vec<String> {
        let size = self.lru_size;
        [
            (self.prefix_plugin_type.is_some(), "prefixPluginType: deprecated".to_owned()),
            (
                self.prefix_plugin_name.is_some(),
                "prefixPluginName: deprecated; name the producer in prefixMatchInfoProducerName"
                    .to_owned(),
            ),
            (size <= 0, format!("lruSize {size}: not positive, so {LRU_SIZE} counts")),
        ]
        .into_iter()
        .filter(|(given, _)| *given)
        .map(|(_, text)| text)
        .collect()
    }

    fn picked(&mut self, picked: &Picked<'_>) -> Option<ResponseHeader> {
        if self.cold {
            let capacity = if self.lru_size > 0 { self.lru_size } else { LRU_SIZE };
            let capacity = usize::try_from(capacity).unwrap_or(usize::MAX);
            self.used.put(picked.endpoint.id, (), capacity);
        }
        None
    }

    fn forget(&mut self, id: EndpointId) {
        self.used.remove(&id);
    }

    fn memory(&self) -> Memory {
        Memory::Endpoints(self.used.iter().map(|(id, ())| *id).collect())
    }

    fn recall(&mut self, memory: &Memory) {
        if let Memory::Endpoints(ids) = memory {
            self.used = Lru::default();
            ids.iter().for_each(|id| self.used.put(*id, (), usize::MAX));
        }
    }
}

impl Scorer for NoHitLru {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        self.cold = view.rows.iter().all(|row| view.prefix(row).blocks == 0);
        if !self.cold {
            column.fill(0.5);
            return;
        }
        self.ranks.clear();
        let used = &self.used;
        self.ranks.extend(view.rows.iter().enumerate().map(|(i, row)| (used.tick(&row.id), i)));
        self.ranks.sort_unstable();
        let last = self.ranks.len().saturating_sub(1).max(1) as f64;
        for (rank, (_, i)) in self.ranks.iter().enumerate() {
            column[*i] = 1.0 - rank as f64 / last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn cold_requests_go_round_and_hits_do_not_count() {
        let mut fixture = Fixture::new(3);
        let mut scorer = NoHitLru::default();
        assert_scores(&fixture.score(&mut scorer), &[1.0, 0.5, 0.0]);
        fixture.picked(&mut scorer, 0);
        assert_scores(&fixture.score(&mut scorer), &[0.0, 1.0, 0.5]);
        fixture.picked(&mut scorer, 2);
        assert_scores(&fixture.score(&mut scorer), &[0.5, 1.0, 0.0]);
        fixture.prefix(1, 1.0, 10, 16);
        assert_scores(&fixture.score(&mut scorer), &[0.5, 0.5, 0.5]);
        fixture.picked(&mut scorer, 1);
        fixture.prefix(1, 0.0, 10, 16);
        assert_scores(&fixture.score(&mut scorer), &[0.5, 1.0, 0.0]);
        scorer.forget(fixture.id(2));
        assert_scores(&fixture.score(&mut scorer), &[0.0, 1.0, 0.5]);
    }

    #[test]
    fn who_computed_a_cold_prompt_has_had_its_turn_too() {
        let fixture = Fixture::new(4);
        let mut scorer = NoHitLru::default();
        fixture.score(&mut scorer);
        fixture.picked_as(&mut scorer, 0, "decode", true);
        fixture.picked_as(&mut scorer, 1, "prefill", false);
        let third = 1.0 / 3.0;
        assert_scores(&fixture.score(&mut scorer), &[third, 0.0, 1.0, 2.0 * third]);
    }

    #[test]
    fn parameters_without_effect_are_named() {
        assert!(NoHitLru::default().inert().is_empty());
        let deprecated = NoHitLru {
            lru_size: -1,
            prefix_plugin_type: Some("prefix-cache-scorer".into()),
            prefix_plugin_name: Some("prefix-cache-scorer".into()),
            ..NoHitLru::default()
        };
        assert_eq!(deprecated.inert().len(), 3);
        assert_scores(&Fixture::new(0).score(&mut NoHitLru::default()), &[]);
    }

    #[test]
    fn one_endpoint_gets_all_and_memory_is_bounded() {
        let fixture = Fixture::new(1);
        assert_scores(&fixture.score(&mut NoHitLru::default()), &[1.0]);
        let fixture = Fixture::new(5);
        let mut scorer = NoHitLru { lru_size: 2, ..Default::default() };
        for at in 0..5 {
            fixture.score(&mut scorer);
            fixture.picked(&mut scorer, at);
        }
        assert_eq!(scorer.used.len(), 2);
    }
}
