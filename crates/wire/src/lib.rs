//! Bytes to types and back, for every outside format kvroute speaks.
//!
//! Pure: slices in, values out. Nothing here panics, recurses without a bound or allocates by a
//! length that a peer claims; every limit has a name.

pub mod api;
pub mod base64;
pub mod kv_event;
pub mod msgpack;
pub mod request;
pub mod usage;
