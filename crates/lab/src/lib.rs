//! Workloads, simulated engine, load generator, reports.

pub mod model;
