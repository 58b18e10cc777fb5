//! Decides which endpoint serves a request.
//!
//! Pure: no IO, no threads, no clock, no environment, no random generator of its own. Time is a
//! [`Time`] passed in, randomness a seeded [`Rng`]. The live router, the simulation and `explain`
//! run this same code.

pub mod event;
pub mod rng;
pub mod time;

pub use rng::Rng;
pub use time::Time;
