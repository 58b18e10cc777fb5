//! How good is each candidate? One file per plugin; formulas are those of llm-d.
//!
//! A scorer that has no data for an endpoint (never scraped, stale metrics) leaves NaN there: the
//! endpoint gets nothing from this scorer, and the decision record shows that data was missing.

mod active_request;
mod kv_usage;
mod load_aware;
mod lora_affinity;
mod no_hit_lru;
mod prefix;
mod queue;
mod session_affinity;
mod token_load;

pub use active_request::ActiveRequest;
pub use kv_usage::KvUsage;
pub use load_aware::LoadAware;
pub use lora_affinity::LoraAffinity;
pub use no_hit_lru::NoHitLru;
pub use prefix::{PrecisePrefix, Prefix};
pub use queue::{Queue, Running};
pub use session_affinity::{
    EncodedEndpointHeader, SessionAffinity, SessionId, SessionSource, Strategy,
};
pub use token_load::TokenLoad;
