//! What must be known before candidates are filtered and rated? One file per producer.

mod approx_prefix;
pub mod burst;
mod encoder_cache;
mod inflight_load;
pub mod p2p_source;
mod precise_prefix;
mod predicted_latency;
mod session_id;
mod tokens;

pub use approx_prefix::ApproxPrefix;
pub use burst::{Assigned, BalanceBy, Burst, BurstPrefix, Held, HeldId, NotHeld};
pub use encoder_cache::{EncoderCache, EncoderCaches};
pub use inflight_load::{InflightLoad, uncached_tokens};
pub use p2p_source::{Holding, P2pSource};
pub use precise_prefix::{
    CacheBackend, CostAware, EngineType, HashAlgorithm, InMemory, Indexer, KvBlockIndex, KvEvents,
    PodDiscovery, PrecisePrefix, Redis, SOCKET_PORT, TokenProcessor,
};
pub(crate) use predicted_latency::TTFT_HEADERS;
pub use predicted_latency::{PredictedLatency, Slo};
pub use session_id::SessionId;
pub(crate) use session_id::filled;
pub use tokens::{
    AUDIO_TOKENS, ImageEstimate, TokenEstimate, Tokens, VideoEstimate, VideoHints, VllmRender,
};
