//! What an engine says about its cache: one KV event, already decoded.
//!
//! The wire crate produces these from msgpack (`wire::kv_event`), the simulated engine directly.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::blocks;

/// Where in an endpoint's memory hierarchy a block lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Accelerator memory. An event without a medium means this tier.
    Gpu,
    /// Host memory (`CPU`, `CPU_PINNED`).
    Cpu,
    /// Local disk or shared storage (`DISK`, `STORAGE`, `EXTERNAL`).
    Disk,
    /// A medium this version has no name for.
    Other,
}

impl Tier {
    /// All tiers, in the order of `index()`.
    pub const ALL: [Tier; 4] = [Tier::Gpu, Tier::Cpu, Tier::Disk, Tier::Other];

    /// Position in per-tier arrays.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The tier of a `medium` field, whatever its letter case.
    pub fn from_medium(medium: &str) -> Tier {
        match () {
            () if medium.eq_ignore_ascii_case("gpu") => Tier::Gpu,
            () if medium.eq_ignore_ascii_case("cpu") => Tier::Cpu,
            () if medium.eq_ignore_ascii_case("cpu_pinned") => Tier::Cpu,
            () if medium.eq_ignore_ascii_case("disk") => Tier::Disk,
            () if medium.eq_ignore_ascii_case("storage") => Tier::Disk,
            () if medium.eq_ignore_ascii_case("external") => Tier::Disk,
            () => Tier::Other,
        }
    }

    /// The name shown to users.
    pub fn as_str(self) -> &'static str {
        match self {
            Tier::Gpu => "gpu",
            Tier::Cpu => "cpu",
            Tier::Disk => "disk",
            Tier::Other => "other",
        }
    }
}

/// An engine's own name for a block, squeezed to 64 bits: an integer as it is (a signed one
/// reinterpreted), a byte string by its last 8 bytes, big endian. Opaque.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EngineHash(pub u64);

impl From<EngineHash> for u64 {
    fn from(hash: EngineHash) -> u64 {
        hash.0
    }
}

impl From<u64> for EngineHash {
    fn from(hash: u64) -> EngineHash {
        EngineHash(hash)
    }
}

/// What kind of attention a KV cache group serves (`kv_cache_spec_kind` of vLLM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupKind {
    /// `full_attention`, `mla_attention`, `sink_full_attention`, or an event without a kind: the
    /// blocks from the start of the prompt decide what can be reused.
    Full,
    /// `sliding_window` and `sliding_window_mla`: the last `window` tokens before the boundary
    /// must be cached too.
    SlidingWindow {
        /// Window in tokens.
        window: u32,
    },
    /// `mamba`: the state at the boundary must be cached too.
    Mamba,
    /// Kinds that say nothing about prefix reuse here (`cross_attention`, unknown ones, ...).
    NotIndexable,
}

/// What is mixed into one block's identity besides its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extra {
    /// A tenant's `cache_salt`, or any other bare string an engine lists.
    Text(String),
    /// A multimodal item, by its content identifier.
    Multimodal(String),
    /// A digest of prompt embeddings.
    Digest(Vec<u8>),
}

/// Names of blocks. Most events have one or two: an answer's next block, an evicted one.
pub type Hashes = SmallVec<[EngineHash; 2]>;

/// The tokens of an event's blocks, or what the index needs of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tokens {
    /// Their ids, as the engine sent them.
    Ids(Vec<u32>),
    /// Nothing but what each block's tokens hash to: see [`BlockStored::hash_tokens`].
    Hashed {
        /// Of each block, a partly filled last one included ([`blocks::content`]).
        #[serde(with = "crate::journal::packed")]
        blocks: SmallVec<[u64; 2]>,
        /// How many tokens there were.
        count: u32,
    },
}

impl Tokens {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Tokens::Ids(ids) => ids.len(),
            Tokens::Hashed { count, .. } => *count as usize,
        }
    }

    /// Whether there are none: an update without content.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their ids; none once they are hashed.
    pub fn ids(&self) -> &[u32] {
        match self {
            Tokens::Ids(ids) => ids,
            Tokens::Hashed { .. } => &[],
        }
    }

    /// Whether there are as many hashes as blocks, where they are hashed.
    pub(crate) fn fit(&self, block_size: u32) -> bool {
        match self {
            Tokens::Ids(_) => true,
            Tokens::Hashed { blocks, count } => {
                blocks.len() == count.div_ceil(block_size.max(1)) as usize
            }
        }
    }

    /// Bytes on the heap.
    pub fn heap_bytes(&self) -> usize {
        match self {
            Tokens::Ids(ids) => size_of_val(&ids[..]),
            Tokens::Hashed { blocks, .. } if blocks.spilled() => size_of_val(&blocks[..]),
            Tokens::Hashed { .. } => 0,
        }
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(ids: Vec<u32>) -> Tokens {
        Tokens::Ids(ids)
    }
}

/// Blocks entered an endpoint's cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockStored {
    /// Names of the blocks, in chain order.
    #[serde(with = "crate::journal::packed")]
    pub hashes: Hashes,
    /// The block before the first; `None` when the first block opens a prompt.
    pub parent: Option<EngineHash>,
    /// The tokens of the new blocks; empty for a tier update without content.
    pub tokens: Tokens,
    /// Tokens per block; 0 when the event carries no content.
    pub block_size: u32,
    /// Adapter whose weights filled the blocks.
    pub lora_name: Option<String>,
    /// Memory tier.
    pub tier: Tier,
    /// Per block, the extras mixed into it, the adapter's own name left out. Empty when none has
    /// any; otherwise as long as `hashes`.
    pub extras: Vec<Vec<Extra>>,
    /// KV cache group, when the engine has several.
    pub group: Option<u32>,
    /// Kind of that group.
    pub kind: GroupKind,
}

impl BlockStored {
    /// Hashes the tokens and forgets them. What takes the time of an event, and most of its
    /// memory, is then done with before anybody waits for the index.
    pub fn hash_tokens(&mut self) {
        if let (Tokens::Ids(ids), 1..) = (&self.tokens, self.block_size) {
            let blocks = ids.chunks(self.block_size as usize).map(blocks::content).collect();
            self.tokens = Tokens::Hashed { blocks, count: ids.len() as u32 };
        }
    }
}

/// Blocks left an endpoint's cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRemoved {
    /// Names of the blocks.
    #[serde(with = "crate::journal::packed")]
    pub hashes: Hashes,
    /// Memory tier.
    pub tier: Tier,
    /// KV cache group, when the engine has several.
    pub group: Option<u32>,
}

/// One statement of an engine about its cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvEvent {
    /// Blocks entered the cache.
    Stored(BlockStored),
    /// Blocks left the cache.
    Removed(BlockRemoved),
    /// Everything left the cache.
    Cleared,
}

/// One message of the event stream: what happened in one scheduler step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventBatch {
    /// When the engine published it, Unix seconds.
    #[serde(with = "crate::journal::exact")]
    pub timestamp_s: f64,
    /// In the order in which they must be applied.
    pub events: Vec<KvEvent>,
    /// Data parallel rank, where given.
    pub rank: Option<u32>,
    /// Events of this batch that could not be decoded and were left out.
    pub events_bad: u32,
}

impl EventBatch {
    /// Hashes the tokens of all events: see [`BlockStored::hash_tokens`].
    pub fn hash_tokens(&mut self) {
        for event in &mut self.events {
            if let KvEvent::Stored(stored) = event {
                stored.hash_tokens();
            }
        }
    }
}
