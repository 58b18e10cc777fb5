//! The commands of the one binary.

pub mod bench;
pub mod check;
pub mod cli;
pub mod config;
pub mod demo;
pub mod engine;
pub mod envoy;
pub mod epp;
pub mod explain;
pub mod fit;
pub mod recording;
pub mod replay;
pub mod schema;
pub mod serve;
pub mod sim;
