//! `mm-embeddings-cache-producer`: which endpoints have encoded an image before?

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::fleet::EndpointId;
use crate::lru::Lru;
use crate::memory::Memory;
use crate::stage::{Inputs, MediaMatch, Plugin};

/// Cache per endpoint unless configured otherwise, in MiB.
const CACHE_MIB: i64 = 4_096;
/// What one item is taken to need, in MiB.
const ITEM_MIB: i64 = 2;

/// `mm-embeddings-cache-producer`: which of the request's images, audio and video each endpoint was
/// sent before and has probably kept encoded. Every item counts alike.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EncoderCache {
    /// Size of an endpoint's encoder cache in MiB; an item is taken to need 2 of them. 0 and less
    /// mean 4096.
    #[serde(rename = "cacheSizeInMBPerServer")]
    pub cache_size_in_mb_per_server: i64,
}

impl Default for EncoderCache {
    fn default() -> EncoderCache {
        EncoderCache { cache_size_in_mb_per_server: CACHE_MIB }
    }
}

impl EncoderCache {
    /// Items that are remembered for each endpoint.
    pub fn items_max(&self) -> usize {
        let given = self.cache_size_in_mb_per_server;
        let size = if given > 0 { given } else { CACHE_MIB };
        usize::try_from(size / ITEM_MIB).unwrap_or(usize::MAX).max(1)
    }
}

impl Plugin for EncoderCache {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { tokens: true, ..Inputs::default() }
    }

    fn inert(&self) -> Vec<String> {
        let given = self.cache_size_in_mb_per_server;
        let text =
            || format!("cacheSizeInMBPerServer {given}: not positive, so {CACHE_MIB} counts");
        if given > 0 { Vec::new() } else { vec![text()] }
    }
}

/// What each endpoint was sent, as one producer remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncoderCaches {
    items_max: usize,
    endpoints: BTreeMap<EndpointId, Lru<u64, ()>>,
}

impl EncoderCaches {
    /// Nobody was sent anything.
    pub fn new(producer: &EncoderCache) -> EncoderCaches {
        EncoderCaches { items_max: producer.items_max(), endpoints: BTreeMap::new() }
    }

    /// How many of a request's items the endpoint has; an item that comes twice counts once.
    pub fn matches(&self, id: EndpointId, media: &[u64]) -> MediaMatch {
        let items = distinct(media);
        let cache = self.endpoints.get(&id);
        let is_cached = |item: &&u64| cache.is_some_and(|cache| cache.get(*item).is_some());
        MediaMatch {
            matched: items.iter().filter(is_cached).count() as u64,
            total: items.len() as u64,
        }
    }

    /// The endpoint is sent these items. Beyond the cache's size those unused longest go.
    pub fn record(&mut self, id: EndpointId, media: &[u64]) {
        if media.is_empty() {
            return;
        }
        let cache = self.endpoints.entry(id).or_default();
        media.iter().for_each(|item| cache.put(*item, (), self.items_max));
    }

    /// What it remembers; of these items only, where some are given.
    pub fn memory(&self, only: Option<&[u64]>) -> Memory {
        let wanted = |item: &u64| only.is_none_or(|only| only.contains(item));
        let items = |cache: &Lru<u64, ()>| {
            cache.iter().map(|(item, ())| *item).filter(wanted).collect::<Vec<u64>>()
        };
        Memory::Items(self.endpoints.iter().map(|(id, cache)| (*id, items(cache))).collect())
    }

    /// Takes up again what [`EncoderCaches::memory`] told.
    pub fn recall(&mut self, memory: &Memory) {
        if let Memory::Items(endpoints) = memory {
            self.endpoints.clear();
            endpoints.iter().for_each(|(id, items)| self.record(*id, items));
        }
    }

    /// The endpoint has left.
    pub fn forget(&mut self, id: EndpointId) {
        self.endpoints.remove(&id);
    }
}

fn distinct(media: &[u64]) -> Vec<u64> {
    let mut items = media.to_vec();
    items.sort_unstable();
    items.dedup();
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    fn id(slot: u16) -> EndpointId {
        EndpointId { slot, generation: 0 }
    }

    fn caches(mib: i64) -> EncoderCaches {
        EncoderCaches::new(&EncoderCache { cache_size_in_mb_per_server: mib })
    }

    #[test]
    fn an_item_needs_two_mebibytes() {
        let table = [(4_096, 2_048), (10, 5), (3, 1), (1, 1), (0, 2_048), (-7, 2_048)];
        for (mib, items) in table {
            let producer = EncoderCache { cache_size_in_mb_per_server: mib };
            assert_eq!(producer.items_max(), items, "{mib}");
            assert_eq!(producer.inert().is_empty(), mib > 0);
        }
        let sample = r#"{"cacheSizeInMB": 2048}"#;
        assert!(serde_json::from_str::<EncoderCache>(sample).is_err());
        let good = r#"{"cacheSizeInMBPerServer": 64}"#;
        assert_eq!(serde_json::from_str::<EncoderCache>(good).unwrap().items_max(), 32);
    }

    #[test]
    fn what_was_sent_matches_until_it_is_driven_out() {
        let mut caches = caches(6);
        assert_eq!(caches.matches(id(0), &[]), MediaMatch::default());
        assert_eq!(caches.matches(id(0), &[1, 2]), MediaMatch { matched: 0, total: 2 });
        caches.record(id(0), &[1, 2, 2]);
        assert_eq!(caches.matches(id(0), &[2, 1, 3, 1]), MediaMatch { matched: 2, total: 3 });
        assert_eq!(caches.matches(id(1), &[1]), MediaMatch { matched: 0, total: 1 });
        caches.record(id(0), &[1, 3, 4]);
        assert_eq!(caches.matches(id(0), &[1, 2, 3, 4]), MediaMatch { matched: 3, total: 4 });
        assert_eq!(caches.matches(id(0), &[2]).matched, 0);
        caches.forget(id(0));
        caches.forget(id(7));
        assert_eq!(caches.matches(id(0), &[1]).matched, 0);
        caches.record(id(0), &[]);
        assert!(caches.endpoints.is_empty());
    }

    #[test]
    fn a_cache_is_the_last_distinct_items() {
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let mut caches = caches(8);
            let mut sent: Vec<u64> = Vec::new();
            for _ in 0..60 {
                let item = rng.below(9) as u64;
                caches.record(id(0), &[item]);
                sent.retain(|other| *other != item);
                sent.push(item);
                let kept = &sent[sent.len().saturating_sub(4)..];
                for item in 0..9 {
                    let matched = caches.matches(id(0), &[item]).matched == 1;
                    assert_eq!(matched, kept.contains(&item), "seed {seed} {item} {sent:?}");
                }
            }
        }
    }
}
