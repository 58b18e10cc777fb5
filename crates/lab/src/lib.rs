//! Workloads, simulated engine, load generator, reports.
