//! `p2p-source-producer`: from whom can the chosen endpoint fetch the prefix that it lacks?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::fleet::EndpointId;
use crate::stage::{Inputs, PREFIX_DEFAULT, Plugin, ProducerRef};

/// Parameters of `p2p-source-producer`. Names a peer that holds more of the prompt than the
/// endpoint that computes it, in `x-kv-cache-source-host-port`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct P2pSource {
    /// Producer of the matches that are compared; the default producer when left out.
    pub prefix_match_info_producer_name: Option<String>,
    /// Tokens that the peer must hold beyond the endpoint that computes the prompt, at least 1.
    pub min_cached_token_delta: u32,
    /// Profile whose endpoint computes the prompt, where it runs; else the one that answers does.
    pub prefill_profile_name: String,
}

impl Default for P2pSource {
    fn default() -> P2pSource {
        P2pSource {
            prefix_match_info_producer_name: None,
            min_cached_token_delta: 1,
            prefill_profile_name: "prefill".into(),
        }
    }
}

/// What one endpoint holds of the request's prompts, in blocks without a hole from their start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The endpoint.
    pub id: EndpointId,
    /// In any tier: what it need not fetch.
    pub blocks: u32,
    /// In the CPU tier, from which peers are served; `None`: the knowledge has no tiers.
    pub cpu_blocks: Option<u32>,
    /// Tokens per block.
    pub block_size: u32,
    /// Requests queued in its engine; `None`: its metrics are missing or stale.
    pub waiting: Option<u32>,
}

impl Holding {
    /// Tokens that a peer can fetch.
    fn servable(&self) -> u64 {
        u64::from(self.cpu_blocks.unwrap_or(self.blocks)) * u64::from(self.block_size)
    }
}

impl P2pSource {
    /// The profile whose endpoint computes the prompt.
    pub fn prefill_profile(&self) -> &str {
        match self.prefill_profile_name.as_str() {
            "" => "prefill",
            name => name,
        }
    }

    /// From whom `computing` fetches; `None`: nobody has enough more than it. Candidates are those
    /// within one block of the most; one of them is drawn in proportion to `1 / (1 + waiting)`, so
    /// that a popular prefix is not fetched from one peer by all. The draw is a function of the
    /// request's id. `held`: by endpoint name.
    pub fn source(
        &self,
        request_id: &str,
        computing: EndpointId,
        held: &[Holding],
    ) -> Option<EndpointId> {
        let own = held.iter().find(|held| held.id == computing);
        let own = own.map_or(0, |held| u64::from(held.blocks) * u64::from(held.block_size));
        let enough = own + u64::from(self.min_cached_token_delta.max(1));
        let peers = || held.iter().filter(|h| h.id != computing && h.servable() >= enough);
        let most = peers().map(Holding::servable).max()?;
        let near = || peers().filter(|held| held.servable() + u64::from(held.block_size) >= most);
        // Missing metrics count as the longest queue that is known: silence wins nothing.
        let longest = near().filter_map(|held| held.waiting).max().unwrap_or(0);
        let weight = |held: &Holding| 1.0 / (1.0 + f64::from(held.waiting.unwrap_or(longest)));
        let total: f64 = near().map(weight).sum();
        let mut left = f64::from(fnv1a_32(request_id.as_bytes())) / 2f64.powi(32) * total;
        let drawn = near().find(|held| {
            left -= weight(held);
            left < 0.0
        });
        drawn.or_else(|| near().next_back()).map(|held| held.id)
    }
}

/// FNV-1a, 32 bits (draft-eastlake-fnv, section 2).
fn fnv1a_32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

impl Plugin for P2pSource {
    fn inputs(&self) -> Inputs<'_> {
        let prefix = ProducerRef::of(&self.prefix_match_info_producer_name, PREFIX_DEFAULT);
        Inputs { prefix: Some(prefix), ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        match self.min_cached_token_delta {
            0 => Err("minCachedTokenDelta is 0; a peer must hold at least 1 token more".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(slot: u16) -> EndpointId {
        EndpointId { slot, generation: 0 }
    }

    fn held(slot: u16, blocks: u32, cpu_blocks: Option<u32>, waiting: u32) -> Holding {
        Holding { id: id(slot), blocks, cpu_blocks, block_size: 16, waiting: Some(waiting) }
    }

    #[test]
    fn fnv_vectors_of_the_draft() {
        let table = [("", 0x811c_9dc5), ("a", 0xe40c_292c), ("foobar", 0xbf9c_f968)];
        for (text, hash) in table {
            assert_eq!(fnv1a_32(text.as_bytes()), hash);
        }
    }

    #[test]
    fn parameters() {
        assert_eq!(P2pSource::default().check(), Ok(()));
        let zero = P2pSource { min_cached_token_delta: 0, ..P2pSource::default() };
        assert!(zero.check().unwrap_err().starts_with("minCachedTokenDelta"));
        let unnamed = P2pSource { prefill_profile_name: String::new(), ..P2pSource::default() };
        assert_eq!(unnamed.prefill_profile(), "prefill");
        let inputs = unnamed.inputs();
        assert_eq!(inputs.prefix, Some(ProducerRef::Default(PREFIX_DEFAULT)));
    }

    #[test]
    fn the_peer_holds_more_than_the_endpoint_that_computes() {
        let source = P2pSource::default();
        let of = |held: &[Holding]| source.source("request", id(0), held).map(|id| id.slot);
        let table: [(&[Holding], _); 9] = [
            (&[], None),
            (&[held(0, 9, None, 0)], None),
            (&[held(0, 0, None, 0), held(1, 0, None, 0)], None),
            (&[held(0, 4, None, 0), held(1, 4, None, 0)], None),
            (&[held(0, 4, None, 0), held(1, 5, None, 0)], Some(1)),
            // Only what lies in its CPU tier can be fetched; the own blocks count in any tier.
            (&[held(0, 4, None, 0), held(1, 9, Some(4), 0)], None),
            (&[held(0, 4, Some(0), 0), held(1, 9, Some(5), 0)], Some(1)),
            // The endpoint that computes is not told to fetch from itself.
            (&[held(0, 3, Some(9), 0), held(1, 4, None, 0)], Some(1)),
            // Unknown to the producer: it holds nothing.
            (&[held(1, 1, None, 0)], Some(1)),
        ];
        for (at, (held, slot)) in table.into_iter().enumerate() {
            assert_eq!(of(held), slot, "row {at}");
        }
        let picky = P2pSource { min_cached_token_delta: 33, ..P2pSource::default() };
        let all = [held(0, 4, None, 0), held(1, 6, None, 0), held(2, 7, None, 9)];
        assert_eq!(picky.source("request", id(0), &all), Some(id(2)));
    }

    #[test]
    fn peers_within_a_block_of_the_most_are_drawn_by_their_queues() {
        let source = P2pSource::default();
        let mut all = vec![held(0, 0, None, 0), held(1, 10, None, 0), held(2, 9, None, 1)];
        all.extend([held(3, 10, None, 3), held(4, 8, None, 0)]);
        all.push(Holding { waiting: None, ..held(5, 10, None, 0) });
        let mut drawn = [0u32; 6];
        for request in 0..10_000 {
            let to = source.source(&format!("request-{request}"), id(0), &all).unwrap();
            drawn[usize::from(to.slot)] += 1;
        }
        // Weights 1, 1/2, 1/4 and, for missing metrics, 1/4.
        for (slot, expected) in [(0, 0), (1, 5_000), (2, 2_500), (3, 1_250), (4, 0), (5, 1_250)] {
            let drawn = drawn[slot];
            assert!(drawn.abs_diff(expected) <= 250, "{slot}: {drawn}, not about {expected}");
        }
        let again = source.source("request-7", id(0), &all);
        assert_eq!(again, source.source("request-7", id(0), &all));
    }
}
