//! The obvious index: a map from block key to endpoints, one probe for each block.

use std::collections::HashMap;

use smallvec::SmallVec;

use super::Subject;
use super::ours::Ours;
use crate::workload::Raw;

/// Knows neither parents nor engines' names: it must be told kvroute's keys.
#[derive(Default)]
pub struct Naive(HashMap<u64, SmallVec<[u16; 4]>, rustc_hash::FxBuildHasher>);

impl Subject for Naive {
    const NAME: &'static str = "naive map";
    const WHOLE: bool = false;

    type Event = (u16, Vec<u64>, bool);
    type Query = Vec<u64>;
    type Scratch = ();

    fn new(_: u16) -> Naive {
        Naive::default()
    }

    fn prepare(raw: Raw) -> (u16, Vec<u64>, bool) {
        match raw {
            Raw::Stored { endpoint, names, .. } => (endpoint, names, true),
            Raw::Removed { endpoint, names } => (endpoint, names, false),
        }
    }

    fn apply(&mut self, (endpoint, keys, stored): (u16, Vec<u64>, bool)) {
        for key in keys {
            if stored {
                let holders = self.0.entry(key).or_default();
                if !holders.contains(&endpoint) {
                    holders.push(endpoint);
                }
            } else if let Some(holders) = self.0.get_mut(&key) {
                holders.retain(|holder| *holder != endpoint);
                if holders.is_empty() {
                    self.0.remove(&key);
                }
            }
        }
    }

    fn query(tokens: &[u32], block_size: u32) -> Vec<u64> {
        Ours::query(tokens, block_size).keys.iter().map(|key| key.0).collect()
    }

    fn lookup(&self, query: &mut Vec<u64>, _: &mut (), scores: &mut [u32]) {
        scores.fill(0);
        for (at, key) in (0u32..).zip(query.iter()) {
            let mut goes_on = false;
            for &endpoint in self.0.get(key).into_iter().flatten() {
                let score = &mut scores[usize::from(endpoint)];
                if *score == at {
                    *score = at + 1;
                    goes_on = true;
                }
            }
            if !goes_on {
                break;
            }
        }
    }
}
