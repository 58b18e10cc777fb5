//! What an engine calls its blocks: vLLM's chained block hashes.
//!
//! `hash_i = H(cbor((hash_{i-1}, tokens_i, extra_keys_i)))`, canonical CBOR, where the parent of
//! block 0 is `H(cbor(seed))` and the seed is the text of `PYTHONHASHSEED`. Events carry the last
//! 8 bytes, big endian. Source: vLLM 0.32, checked against vectors made by its own functions.

use kvroute_core::event::EngineHash;
use sha2::{Digest as _, Sha256};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed, xxh3_128};

/// Which of vLLM's `--prefix-caching-hash-algo` values names the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashAlgorithm {
    /// `sha256_cbor`: SHA-256 of canonical CBOR.
    #[default]
    Sha256Cbor,
    /// `xxhash_cbor`: XXH3-128 of canonical CBOR; several times cheaper, for demos and large
    /// simulations.
    XxhashCbor,
    /// Not one of vLLM's: XXH3-64 of the tokens as they lie in memory, seeded by the parent. Names
    /// are opaque to a router, so a simulation in virtual time need not pay for better ones.
    Plain,
}

impl HashAlgorithm {
    /// The value of vLLM's flag.
    pub fn as_str(self) -> &'static str {
        match self {
            HashAlgorithm::Sha256Cbor => "sha256_cbor",
            HashAlgorithm::XxhashCbor => "xxhash_cbor",
            HashAlgorithm::Plain => "plain",
        }
    }

    /// The algorithm a flag value names.
    pub fn from_name(name: &str) -> Option<HashAlgorithm> {
        [HashAlgorithm::Sha256Cbor, HashAlgorithm::XxhashCbor]
            .into_iter()
            .find(|algorithm| algorithm.as_str() == name)
    }
}

/// A block hash in full: what the next block's hash depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockHash {
    /// 32 bytes of SHA-256.
    Sha256([u8; 32]),
    /// 16 bytes of XXH3-128, big endian.
    Xxh3([u8; 16]),
    /// 8 bytes of XXH3-64, big endian.
    Plain([u8; 8]),
}

impl BlockHash {
    /// The bytes, as vLLM holds them.
    pub fn bytes(&self) -> &[u8] {
        match self {
            BlockHash::Sha256(bytes) => bytes,
            BlockHash::Xxh3(bytes) => bytes,
            BlockHash::Plain(bytes) => bytes,
        }
    }

    /// What events carry with vLLM's default of integer hashes.
    pub fn key(&self) -> EngineHash {
        let tail = self.bytes().last_chunk::<8>().expect("no digest is shorter than 8 bytes");
        EngineHash(u64::from_be_bytes(*tail))
    }
}

/// A LoRA adapter as vLLM mixes it into hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Name under which it is served.
    pub name: String,
    /// Path it was loaded from; part of the hash since vLLM 0.31.
    pub path: String,
}

/// What is mixed into a block's hash besides parent and tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct HashExtras<'a> {
    /// The adapter of the request, in every block.
    pub adapter: Option<&'a Adapter>,
    /// The request's `cache_salt`; pass it for block 0 only.
    pub cache_salt: Option<&'a str>,
}

/// Computes block hashes; holds a scratch buffer, so one per engine.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    algorithm: HashAlgorithm,
    root: BlockHash,
    scratch: Vec<u8>,
}

impl BlockHasher {
    /// A hasher whose chains start from `seed`, the text of `PYTHONHASHSEED`.
    pub fn new(algorithm: HashAlgorithm, seed: &str) -> BlockHasher {
        let mut scratch = Vec::new();
        cbor_text(seed, &mut scratch);
        let root = digest(algorithm, &scratch);
        BlockHasher { algorithm, root, scratch }
    }

    /// The parent of every block 0 (`NONE_HASH`).
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// The hash of the block after `parent` that holds `tokens`.
    pub fn next(&mut self, parent: &BlockHash, tokens: &[u32], extras: HashExtras) -> BlockHash {
        if self.algorithm == HashAlgorithm::Plain {
            return plain(parent.key(), tokens, extras);
        }
        let out = &mut self.scratch;
        out.clear();
        cbor_head(0x80, 3, out);
        cbor_head(0x40, parent.bytes().len() as u64, out);
        out.extend_from_slice(parent.bytes());
        cbor_head(0x80, tokens.len() as u64, out);
        tokens.iter().for_each(|&token| cbor_head(0x00, u64::from(token), out));
        cbor_extras(extras, out);
        digest(self.algorithm, out)
    }
}

fn digest(algorithm: HashAlgorithm, bytes: &[u8]) -> BlockHash {
    match algorithm {
        HashAlgorithm::Sha256Cbor => BlockHash::Sha256(Sha256::digest(bytes).into()),
        HashAlgorithm::XxhashCbor => BlockHash::Xxh3(xxh3_128(bytes).to_be_bytes()),
        HashAlgorithm::Plain => BlockHash::Plain(xxh3_64(bytes).to_be_bytes()),
    }
}

fn plain(parent: EngineHash, tokens: &[u32], extras: HashExtras) -> BlockHash {
    let adapter = extras.adapter.map_or("", |adapter| &adapter.name);
    let texts = [adapter, extras.cache_salt.unwrap_or("")];
    let seed = texts
        .iter()
        .filter(|text| !text.is_empty())
        .fold(parent.0, |seed, text| xxh3_64_with_seed(text.as_bytes(), seed));
    let hash = xxh3_64_with_seed(bytemuck::cast_slice(tokens), seed);
    BlockHash::Plain(hash.to_be_bytes())
}

fn cbor_extras(extras: HashExtras, out: &mut Vec<u8>) {
    let count = u64::from(extras.adapter.is_some()) + u64::from(extras.cache_salt.is_some());
    if count == 0 {
        out.push(0xf6);
        return;
    }
    cbor_head(0x80, count, out);
    if let Some(adapter) = extras.adapter {
        cbor_head(0x80, 3, out);
        ["lora", &adapter.name, &adapter.path].iter().for_each(|text| cbor_text(text, out));
    }
    if let Some(salt) = extras.cache_salt {
        cbor_head(0x80, 2, out);
        ["cache_salt", salt].iter().for_each(|text| cbor_text(text, out));
    }
}

fn cbor_text(text: &str, out: &mut Vec<u8>) {
    cbor_head(0x60, text.len() as u64, out);
    out.extend_from_slice(text.as_bytes());
}

/// Major type and argument in the shortest form (RFC 8949, section 4.2.1).
fn cbor_head(major: u8, value: u64, out: &mut Vec<u8>) {
    match value {
        0..=23 => out.push(major | value as u8),
        24..=0xff => out.extend_from_slice(&[major | 24, value as u8]),
        0x100..=0xffff => {
            out.push(major | 25);
            out.extend_from_slice(&(value as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(major | 26);
            out.extend_from_slice(&(value as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}
