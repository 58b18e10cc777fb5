//! What every index that is compared must be able to do, each through its own public interface.

pub mod dynamo;
pub mod kv_index;
pub mod naive;
pub mod ours;

use std::time::Duration;

use crate::clock::thread_cpu;
use crate::workload::Raw;

/// One index.
pub trait Subject: Sized {
    /// Its name in tables.
    const NAME: &'static str;
    /// Whether it needs nothing but the events: `false` for one that must be told the keys of
    /// removed blocks, too.
    const WHOLE: bool = true;

    /// An event as its interface takes it, hashes that the caller computes included.
    type Event: Send;
    /// A prompt as its interface takes it, hashes included.
    type Query: Clone;
    /// What a caller keeps between lookups.
    type Scratch: Default;

    /// An empty index for endpoints `0..endpoints`.
    fn new(endpoints: u16) -> Self;

    /// What a caller does with an engine's event before it applies it.
    fn prepare(raw: Raw) -> Self::Event;

    /// Applies an event and frees it.
    fn apply(&mut self, event: Self::Event);

    /// Waits until everything applied is visible.
    fn settle(&mut self) {}

    /// What a caller does with a prompt's tokens before it asks.
    fn query(tokens: &[u32], block_size: u32) -> Self::Query;

    /// Writes to each endpoint's place how many of the prompt's first blocks it holds. The query
    /// may be consumed.
    fn lookup(&self, query: &mut Self::Query, scratch: &mut Self::Scratch, scores: &mut [u32]);

    /// CPU time of applying events to a new index, phase by phase, on this thread.
    fn timed(endpoints: u16, phases: Vec<Vec<Self::Event>>) -> Vec<Duration> {
        let mut index = Self::new(endpoints);
        let phase = |events: Vec<Self::Event>| {
            let begin = thread_cpu();
            for event in events {
                index.apply(event);
            }
            thread_cpu() - begin
        };
        phases.into_iter().map(phase).collect()
    }
}
