//! Workloads, simulated engine, load generator, reports.
//!
//! [`model`] says what an engine does, step by step, without clock or sockets; [`engine`] makes a
//! server of it that a client cannot tell from vLLM; [`traffic`] decides what is asked, [`load`]
//! asks it over HTTP and measures. Either way a run is [`record`]ed, [`summary`] makes figures of
//! records and [`report`] shows them.

pub mod chaos;
pub mod engine;
pub mod fit;
pub mod load;
pub mod model;
pub mod record;
pub mod report;
pub mod scenario;
pub mod sim;
pub mod summary;
pub mod traffic;
pub mod words;
