//! What Envoy sees of the ext_proc server: every message of the protocol, by an independent client.
//!
//! The cases are those that llm-d's hermetic tests make of an Endpoint Picker, and what Envoy
//! itself was seen to send. Where kvroute answers otherwise, the test names the row of
//! `docs/differences.md`.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "support/ext_proc.rs"]
mod client;
#[path = "support/envoy.rs"]
mod envoy;
mod support;
#[path = "ext_proc/world.rs"]
mod world;

#[path = "ext_proc/deadlines.rs"]
mod deadlines;
#[path = "ext_proc/modes.rs"]
mod modes;
#[path = "ext_proc/names.rs"]
mod names;
#[path = "ext_proc/plugins.rs"]
mod plugins;
#[path = "ext_proc/protocol.rs"]
mod protocol;
#[path = "ext_proc/refused.rs"]
mod refused;
#[path = "ext_proc/requests.rs"]
mod requests;
#[path = "ext_proc/responses.rs"]
mod responses;
#[path = "ext_proc/rewrites.rs"]
mod rewrites;
