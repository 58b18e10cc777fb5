//! Bytes to types and back, for every outside format kvroute speaks.
//!
//! Pure: slices in, values out. Nothing here panics, recurses without a bound or allocates by a
//! length that a peer claims; every limit has a name.

pub mod api;
pub mod base64;
pub mod config;
pub mod discovery;
pub mod engine_api;
pub mod error_body;
pub mod ext_proc;
#[doc(hidden)]
pub mod fuzz_entry;
pub mod grpc;
pub mod grpc_health;
pub mod kv_event;
pub mod media;
pub mod model_name;
pub mod models;
pub mod msgpack;
pub mod parsers;
pub mod prometheus;
pub mod protobuf;
pub mod request;
pub mod trace;
pub mod usage;
pub mod yaml;
mod yaml_tree;
