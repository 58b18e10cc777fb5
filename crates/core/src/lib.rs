//! Decides which endpoint serves a request.
//!
//! Pure: no IO, no threads, no clock, no environment, no random generator of its own. Time is a
//! [`Time`] passed in, randomness a seeded [`Rng`]. The live router, the simulation and `explain`
//! run this same code.

pub mod admit;
mod attribute;
pub mod blocks;
pub mod brain;
pub mod collect;
pub mod committed;
pub mod config;
mod config_buffer;
pub mod config_tests;
pub mod cost;
pub mod decision;
pub mod detect;
pub mod event;
pub mod filter;
#[cfg(test)]
mod fixture;
pub mod fleet;
pub mod flow;
pub mod handle;
pub mod identity;
pub mod index;
pub mod journal;
mod knowledge;
pub mod learn;
pub mod ledger;
pub mod load;
mod lru;
pub mod memory;
pub mod parse;
pub mod pick;
mod pipeline;
pub mod plan;
pub mod plugin;
pub mod produce;
mod refill;
pub mod report;
pub mod rewrite;
pub mod rng;
pub mod score;
pub mod screen;
pub mod settings;
pub mod stage;
pub mod stream;
pub mod time;

pub use fleet::EndpointId;
pub use rng::Rng;
pub use time::Time;
