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

    /// Applies the events of a message and frees them.
    fn apply_message(&mut self, events: &mut Vec<Self::Event>) {
        events.drain(..).for_each(|event| self.apply(event));
    }

    /// Waits until everything applied is visible.
    fn settle(&mut self) {}

    /// What a caller does with a prompt's tokens before it asks.
    fn query(tokens: &[u32], block_size: u32) -> Self::Query;

    /// Writes to each endpoint's place how many of the prompt's first blocks it holds. The query
    /// may be consumed.
    fn lookup(&self, query: &mut Self::Query, scratch: &mut Self::Scratch, scores: &mut [u32]);

    /// CPU time of applying events to a new index, phase by phase, on this thread. Events come as
    /// from a socket, some at a time: what makes them is not in the time, freeing them is.
    fn timed<'a>(
        endpoints: u16,
        phases: [Box<dyn Iterator<Item = Raw> + 'a>; 2],
        what: Timed,
    ) -> [Duration; 2] {
        let mut index = Self::new(endpoints);
        let (mut raws, mut events) = (Vec::new(), Vec::new());
        phases.map(|mut phase| {
            let mut time = Duration::ZERO;
            loop {
                raws.extend(phase.by_ref().take(MESSAGE_EVENTS));
                if raws.is_empty() {
                    return time;
                }
                if what == Timed::Applying {
                    events.extend(raws.drain(..).map(Self::prepare));
                }
                let begin = thread_cpu();
                events.extend(raws.drain(..).map(Self::prepare));
                index.apply_message(&mut events);
                time += thread_cpu() - begin;
            }
        })
    }
}

/// What is timed of an event's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// What a caller does before, such as hashing tokens, and applying.
    Whole,
    /// Applying alone.
    Applying,
}

/// Events that are there before the first of them is applied.
pub const MESSAGE_EVENTS: usize = 128;
