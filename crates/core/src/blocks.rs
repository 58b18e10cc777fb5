//! What is each block of a prompt called?
//!
//! Every block has a 64-bit key that depends on its tokens and on everything before it, so equal
//! keys mean equal prefixes. Keys are this project's own: an engine's hashes stay opaque, because
//! its events carry the token ids from which the same keys follow. One chain of keys serves one
//! block size; the root mixes in block size, token space and adapter, so that chains that mean
//! different things never meet.
//!
//! `key_i = product(seed_i ^ S4, content_i ^ S5)`, where `content_i` depends on the block's tokens
//! alone, so that a processor works on several blocks at once, and `seed_i` is `key_{i-1}` with the
//! block's extras (salt, multimodal items, digests) folded in, each by
//! `seed = XXH3-64(bytes, seed ^ EXTRA)`. `product(a, b)` is the upper half of the 128-bit product
//! of two numbers XOR its lower half, as in wyhash; `content` keeps four sums of products, each
//! over every fourth pair of words of two tokens. An engine's operator may see these keys, nobody
//! must be kept from making two prompts with the same one: that would only mislead the routing of
//! these two.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::event::Extra;

/// Name of a block within its whole prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey(pub u64);

impl From<BlockKey> for u64 {
    fn from(key: BlockKey) -> u64 {
        key.0
    }
}

impl From<u64> for BlockKey {
    fn from(key: u64) -> BlockKey {
        BlockKey(key)
    }
}

/// What the numbers called tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenSpace {
    /// Token ids as the engine sees them.
    Exact,
    /// Pseudo tokens, four prompt bytes each, little endian.
    Estimated,
}

/// Which chain of a prompt is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainSpec {
    /// Tokens per block. A chain with block size 0 has no keys.
    pub block_size: u32,
    /// What the tokens are.
    pub space: TokenSpace,
    /// Whether a last, partly filled block gets a key too (knowledge from routing history only:
    /// no engine caches such a block). Keys of full blocks do not depend on it.
    pub partial_tail: bool,
}

impl ChainSpec {
    /// The chain that matches an engine's events.
    pub fn exact(block_size: u32) -> ChainSpec {
        ChainSpec { block_size, space: TokenSpace::Exact, partial_tail: false }
    }
}

/// Whose weights compute the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Root<'a> {
    /// The endpoint's base model.
    Base,
    /// A LoRA adapter, by name.
    Adapter(&'a str),
}

/// A multimodal item in a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MultimodalSpan {
    /// Content identifier, as the engine lists it in its events.
    pub identifier: String,
    /// First placeholder token.
    pub offset: u32,
    /// Number of placeholder tokens.
    pub length: u32,
}

/// What a prompt mixes into its blocks besides tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptExtras<'a> {
    /// Salt of the tenant: goes into the first block.
    pub cache_salt: Option<&'a str>,
    /// Items, in any order: each goes into every block that it overlaps.
    pub items: &'a [MultimodalSpan],
}

/// The keys of a prompt, first block first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    /// Which chain this is.
    pub spec: ChainSpec,
    /// One key per full block, and one for the partial tail where the spec wants it.
    #[serde(with = "crate::journal::packed")]
    pub keys: Vec<BlockKey>,
    /// Tokens of the whole prompt, tail included.
    pub tokens: u32,
}

const ROOT: u64 = 0x6b76_726f_7574_6501;
const ADAPTER: u64 = 0x6b76_726f_7574_6502;
const EXTRA: u64 = 0x6b76_726f_7574_6503;

/// The key before the first block of a prompt.
pub fn root(block_size: u32, space: TokenSpace, root: Root<'_>) -> BlockKey {
    let mut shape = [0; 5];
    shape[..4].copy_from_slice(&block_size.to_le_bytes());
    shape[4] = match space {
        TokenSpace::Exact => 0,
        TokenSpace::Estimated => 1,
    };
    let base = xxh3_64_with_seed(&shape, ROOT);
    BlockKey(match root {
        Root::Base => base,
        Root::Adapter(name) => xxh3_64_with_seed(name.as_bytes(), base ^ ADAPTER),
    })
}

/// What the first block of a prompt is hashed with: the root, and the salt of the tenant.
/// [`extend`] from here gives the keys of [`chain`] for a prompt without multimodal items.
pub fn start(spec: ChainSpec, root_of: Root<'_>, cache_salt: Option<&str>) -> BlockKey {
    let root = root(spec.block_size, spec.space, root_of);
    cache_salt.map_or(root, |salt| BlockKey(fold(root.0, salt.as_bytes())))
}

/// The key of a last block that `tokens` fill only in part, after `parent`.
pub fn partial(parent: BlockKey, tokens: &[u32]) -> BlockKey {
    BlockKey(hash(tokens, parent.0))
}

/// The chain of a prompt. Cost: one pass over the tokens, one allocation, two more when the prompt
/// has multimodal items.
pub fn chain(
    spec: ChainSpec,
    root_of: Root<'_>,
    tokens: &[u32],
    extras: &PromptExtras<'_>,
) -> Chain {
    let tokens_count = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    let block_size = spec.block_size as usize;
    if block_size == 0 {
        return Chain { spec, keys: Vec::new(), tokens: tokens_count };
    }
    let mut keys = Vec::with_capacity(tokens.len().div_ceil(block_size));
    let mut items: Vec<&MultimodalSpan> = extras.items.iter().collect();
    items.sort_by_key(|item| item.offset);
    let last = items.iter().map(|item| u64::from(item.offset) + u64::from(item.length)).max();
    // Blocks with something in them beside tokens, of which a salt is in the first.
    let mixed = last.map_or(0, |last| last.div_ceil(block_size as u64) as usize);
    let mixed = mixed.max(usize::from(extras.cache_salt.is_some()));
    let mixed = (mixed * block_size).min(tokens.len());
    let mut key = root(spec.block_size, spec.space, root_of);
    let (first, rest) = tokens.split_at(mixed - mixed % block_size);
    for (index, block) in first.chunks_exact(block_size).enumerate() {
        key = BlockKey(hash(block, seed(key, index * block_size, block, &items, extras)));
        keys.push(key);
    }
    let (full, tail) = rest.split_at(rest.len() - rest.len() % block_size);
    append(key, block_size, full, &mut keys);
    if spec.partial_tail && !tail.is_empty() {
        let key = keys.last().copied().unwrap_or(key);
        let start = tokens.len() - tail.len();
        keys.push(BlockKey(hash(tail, seed(key, start, tail, &items, extras))));
    }
    Chain { spec, keys, tokens: tokens_count }
}

/// What a block that begins at token `start` is hashed with after another one.
fn seed(
    before: BlockKey,
    start: usize,
    block: &[u32],
    items: &[&MultimodalSpan],
    extras: &PromptExtras<'_>,
) -> u64 {
    let (from, to) = (start as u64, (start + block.len()) as u64);
    let inside = items.iter().filter(|item| overlaps(item, from, to));
    let seed = inside.fold(before.0, |seed, item| fold(seed, item.identifier.as_bytes()));
    match extras.cache_salt {
        Some(salt) if start == 0 => fold(seed, salt.as_bytes()),
        _ => seed,
    }
}

/// Appends the keys of blocks that hold tokens alone. Blocks of a size that engines use are hashed
/// by code made for that size.
fn append(before: BlockKey, block_size: usize, tokens: &[u32], keys: &mut Vec<BlockKey>) {
    let mut key = before.0;
    let mut next = |block: &[u32]| {
        key = hash(block, key);
        BlockKey(key)
    };
    match block_size {
        16 => keys.extend(tokens.as_chunks::<16>().0.iter().map(|block| next(block))),
        32 => keys.extend(tokens.as_chunks::<32>().0.iter().map(|block| next(block))),
        size => keys.extend(tokens.chunks_exact(size).map(next)),
    }
}

/// Appends to `keys` the keys of the blocks of an event: `tokens` in blocks of `block_size` after
/// `parent`, block `i` with `extras[i]` (none when there is no such element). Tokens that do not
/// fill a block get no key.
pub fn extend(
    parent: BlockKey,
    block_size: u32,
    tokens: &[u32],
    extras: &[Vec<Extra>],
    keys: &mut Vec<BlockKey>,
) {
    if block_size == 0 {
        return;
    }
    let mut key = parent;
    let with_extras = (extras.len() * block_size as usize).min(tokens.len());
    let (first, rest) = tokens.split_at(with_extras - with_extras % block_size as usize);
    for (block, extras) in first.chunks_exact(block_size as usize).zip(extras) {
        key = BlockKey(hash(block, folded(key.0, extras)));
        keys.push(key);
    }
    append(key, block_size as usize, rest, keys);
}

/// The same for blocks of which only the [`content`] is known.
pub fn follow(parent: BlockKey, contents: &[u64], extras: &[Vec<Extra>], keys: &mut Vec<BlockKey>) {
    let mut key = parent.0;
    for (index, content) in contents.iter().enumerate() {
        key = chained(extras.get(index).map_or(key, |extras| folded(key, extras)), *content);
        keys.push(BlockKey(key));
    }
}

fn folded(seed: u64, extras: &[Extra]) -> u64 {
    extras.iter().fold(seed, |seed, extra| match extra {
        // An untagged string may be a salt or an item: old engines do not say which.
        Extra::Text(text) | Extra::Multimodal(text) => fold(seed, text.as_bytes()),
        Extra::Digest(bytes) => fold(seed, bytes),
    })
}

fn overlaps(item: &MultimodalSpan, start: u64, end: u64) -> bool {
    let from = u64::from(item.offset);
    item.length > 0 && from < end && from + u64::from(item.length) > start
}

fn fold(seed: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, seed ^ EXTRA)
}

/// Numbers without a pattern: what tokens, which are small, are told apart from.
const S: [u64; 6] = [
    0x2cc9_2b6f_85a3_08d3,
    0x9319_8a2e_8370_7345,
    0xa409_3823_99f3_1d01,
    0x882e_fa99_ec4e_6c89,
    0xc528_21e6_b8d0_1377,
    0xbe54_66cf_b4e9_0c6d,
];

/// Tokens that are hashed at a time.
const STRIPE: usize = 16;

#[inline]
fn product(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[inline]
fn hash(tokens: &[u32], seed: u64) -> u64 {
    chained(seed, content(tokens))
}

/// The key of a block after another.
#[inline]
fn chained(seed: u64, content: u64) -> u64 {
    product(seed ^ S[4], content ^ S[5])
}

/// What a block's tokens alone hash to: with the key before it, that gives the block's own.
#[inline]
pub fn content(tokens: &[u32]) -> u64 {
    let mut sums = [S[0], S[1], S[2], S[3]];
    let (stripes, rest) = tokens.as_chunks::<STRIPE>();
    stripes.iter().for_each(|stripe| add(&mut sums, stripe));
    if !rest.is_empty() {
        let mut stripe = [0; STRIPE];
        stripe[..rest.len()].copy_from_slice(rest);
        add(&mut sums, &stripe);
    }
    let content = product(sums[0] ^ S[2], sums[1] ^ S[3]) ^ product(sums[2] ^ S[0], sums[3] ^ S[1]);
    content ^ (tokens.len() as u64) << 32
}

#[inline]
fn add(sums: &mut [u64; 4], stripe: &[u32; STRIPE]) {
    let word = |at: usize| u64::from(stripe[at]) | u64::from(stripe[at + 1]) << 32;
    for (at, sum) in sums.iter_mut().enumerate() {
        let (a, b) = (word(4 * at), word(4 * at + 2));
        // The second word again, so that it counts even if the first factor is zero.
        *sum = product(a ^ *sum, b ^ S[at]) ^ b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: ChainSpec =
        ChainSpec { block_size: 4, space: TokenSpace::Exact, partial_tail: false };

    fn tokens(n: u32) -> Vec<u32> {
        (1..=n).collect()
    }

    fn keys(spec: ChainSpec, root: Root<'_>, n: u32, extras: &PromptExtras<'_>) -> Vec<BlockKey> {
        chain(spec, root, &tokens(n), extras).keys
    }

    fn plain(n: u32) -> Vec<BlockKey> {
        keys(SPEC, Root::Base, n, &PromptExtras::default())
    }

    /// Which blocks of two chains have the same key.
    fn same(a: &[BlockKey], b: &[BlockKey]) -> Vec<bool> {
        a.iter().zip(b).map(|(a, b)| a == b).collect()
    }

    fn item(identifier: &str, offset: u32, length: u32) -> MultimodalSpan {
        MultimodalSpan { identifier: identifier.into(), offset, length }
    }

    #[test]
    fn keys_are_stable_across_versions() {
        let salted = PromptExtras { cache_salt: Some("tenant-a"), items: &[] };
        let golden = [
            plain(8)[0].0,
            plain(8)[1].0,
            keys(SPEC, Root::Adapter("lora-a"), 4, &PromptExtras::default())[0].0,
            keys(SPEC, Root::Base, 4, &salted)[0].0,
        ];
        assert_eq!(golden, GOLDEN, "a changed formula needs a new version of whatever stores keys");
    }

    const GOLDEN: [u64; 4] = [
        6_561_115_347_157_776_368,
        18_345_025_049_017_097_661,
        3_025_122_581_843_247_454,
        10_066_959_466_212_844_773,
    ];

    #[test]
    fn keys_are_spread_whatever_the_tokens_look_like() {
        // Numbers that count, of one token and of a whole block, in each place; zeros; lengths.
        let mut keys = Vec::new();
        for size in [1usize, 2, 3, 4, 15, 16, 17, 64] {
            for place in 0..size {
                for number in 1..=20_000 / size as u32 {
                    let mut tokens = vec![0; size];
                    tokens[place] = number;
                    keys.push(hash(&tokens, 0));
                }
            }
            keys.push(hash(&vec![0; size], 0));
            keys.extend((1..2000).map(|number| hash(&vec![number; size], 0)).filter(|_| size > 1));
            keys.extend((1..2000).map(|seed| hash(&vec![0; size], seed)));
        }
        let count = keys.len();
        for bit in 0..64 {
            let ones = keys.iter().filter(|key| *key >> bit & 1 == 1).count();
            let off = (ones as f64 / count as f64 - 0.5).abs();
            assert!(off < 0.01, "bit {bit} is set in {ones} of {count}");
        }
        // Of so many keys no two share their first 48 bits by chance; a few do.
        let distinct = |shift: u32| {
            let mut parts: Vec<u64> = keys.iter().map(|key| key >> shift).collect();
            parts.sort_unstable();
            parts.dedup();
            parts.len()
        };
        assert_eq!(distinct(0), count);
        assert!(count - distinct(16) < 8, "{} of {count}", distinct(16));
    }

    #[test]
    fn a_key_depends_on_all_before_it() {
        let mut other = tokens(12);
        other[5] = 99;
        let other = chain(SPEC, Root::Base, &other, &PromptExtras::default());
        assert_eq!(same(&plain(12), &other.keys), [true, false, false]);
        assert_eq!(plain(12)[..2], plain(8)[..]);
    }

    #[test]
    fn a_salt_changes_every_block_because_it_enters_the_first() {
        let a = PromptExtras { cache_salt: Some("a"), items: &[] };
        let b = PromptExtras { cache_salt: Some("b"), items: &[] };
        let [a, b] = [a, b].map(|extras| keys(SPEC, Root::Base, 8, &extras));
        assert_eq!(same(&a, &b), [false, false]);
        assert_eq!(same(&a, &plain(8)), [false, false]);
        // The salt enters once: from there on the step is the plain one.
        let mut rest = Vec::new();
        extend(a[0], 4, &tokens(8)[4..], &[], &mut rest);
        assert_eq!(rest, a[1..]);
    }

    #[test]
    fn an_item_enters_the_blocks_it_overlaps() {
        // (offset, length) -> the first block that differs from the plain chain of 4 blocks.
        let table = [
            ((0, 1), Some(0)),
            ((3, 1), Some(0)),
            ((4, 4), Some(1)),
            ((7, 2), Some(1)),
            ((15, 9), Some(3)),
            ((16, 4), None),
            ((6, 0), None),
        ];
        for ((offset, length), first) in table {
            let items = [item("image", offset, length)];
            let extras = PromptExtras { cache_salt: None, items: &items };
            let got = same(&keys(SPEC, Root::Base, 16, &extras), &plain(16));
            assert_eq!(got.iter().position(|same| !same), first, "item at {offset}+{length}");
        }
        // An item over blocks 1 and 2 is mixed into both, and not into block 3.
        let items = [item("image", 7, 2)];
        let keys = keys(SPEC, Root::Base, 16, &PromptExtras { cache_salt: None, items: &items });
        let image = vec![Extra::Multimodal("image".into())];
        let mut events = Vec::new();
        let extras = [vec![], image.clone(), image, vec![]];
        extend(root(4, TokenSpace::Exact, Root::Base), 4, &tokens(16), &extras, &mut events);
        assert_eq!(keys, events);
    }

    #[test]
    fn items_are_taken_by_offset_and_before_the_salt() {
        let items = [item("b", 3, 2), item("a", 1, 1)];
        let extras = PromptExtras { cache_salt: Some("s"), items: &items };
        let mut events = Vec::new();
        let listed = [
            vec![
                Extra::Multimodal("a".into()),
                Extra::Multimodal("b".into()),
                Extra::Text("s".into()),
            ],
            vec![Extra::Text("b".into())],
        ];
        extend(root(4, TokenSpace::Exact, Root::Base), 4, &tokens(8), &listed, &mut events);
        assert_eq!(keys(SPEC, Root::Base, 8, &extras), events);
    }

    #[test]
    fn both_sides_agree_in_every_combination() {
        for block_size in [1, 3, 16] {
            for adapter in [None, Some("lora-a"), Some("")] {
                for salt in [None, Some("tenant-a"), Some("")] {
                    let space = TokenSpace::Exact;
                    let root_of = adapter.map_or(Root::Base, Root::Adapter);
                    let spec = ChainSpec::exact(block_size);
                    let extras = PromptExtras { cache_salt: salt, items: &[] };
                    let request = chain(spec, root_of, &tokens(50), &extras);
                    let listed: Vec<Vec<Extra>> =
                        salt.map(|salt| vec![Extra::Text(salt.into())]).into_iter().collect();
                    let mut events = Vec::new();
                    let start = root(block_size, space, root_of);
                    extend(start, block_size, &tokens(50), &listed, &mut events);
                    assert_eq!(request.keys, events, "{block_size} {adapter:?} {salt:?}");
                    assert_eq!(request.keys.len(), 50 / block_size as usize);
                }
            }
        }
    }

    #[test]
    fn chains_that_mean_different_things_never_meet() {
        let none = PromptExtras::default();
        let estimated = ChainSpec { space: TokenSpace::Estimated, ..SPEC };
        let chains = [
            plain(16),
            keys(estimated, Root::Base, 16, &none),
            keys(ChainSpec::exact(8), Root::Base, 16, &none),
            keys(SPEC, Root::Adapter("a"), 16, &none),
            keys(SPEC, Root::Adapter("b"), 16, &none),
            keys(SPEC, Root::Adapter(""), 16, &none),
        ];
        for (i, a) in chains.iter().enumerate() {
            for b in &chains[..i] {
                assert!(a.iter().all(|key| !b.contains(key)));
            }
        }
    }

    #[test]
    fn a_partial_tail_has_a_key_only_where_it_is_wanted() {
        let tail = ChainSpec { partial_tail: true, ..SPEC };
        // tokens -> (keys without, keys with tail)
        for (n, full, with_tail) in [(0, 0, 0), (3, 0, 1), (4, 1, 1), (7, 1, 2), (8, 2, 2)] {
            let a = keys(SPEC, Root::Base, n, &PromptExtras::default());
            let b = keys(tail, Root::Base, n, &PromptExtras::default());
            assert_eq!((a.len(), b.len()), (full, with_tail), "{n} tokens");
            assert_eq!(a[..], b[..full]);
        }
        let chain = chain(SPEC, Root::Base, &tokens(7), &PromptExtras::default());
        assert_eq!(chain.tokens, 7);
    }

    #[test]
    fn a_chain_can_be_made_in_steps() {
        for (salt, partial_tail, n) in
            [(None, true, 10), (Some("tenant-a"), true, 11), (Some(""), false, 10), (None, true, 8)]
        {
            let spec = ChainSpec { partial_tail, ..SPEC };
            let extras = PromptExtras { cache_salt: salt, items: &[] };
            let whole = chain(spec, Root::Adapter("a"), &tokens(n), &extras);
            let (first, rest) = (&tokens(n)[..4], &tokens(n)[4..]);
            let from = start(spec, Root::Adapter("a"), salt);
            let mut keys = Vec::new();
            extend(from, 4, first, &[], &mut keys);
            extend(keys[0], 4, rest, &[], &mut keys);
            let left = &tokens(n)[keys.len() * 4..];
            if partial_tail && !left.is_empty() {
                keys.push(partial(*keys.last().unwrap(), left));
            }
            assert_eq!(whole.keys, keys, "{salt:?} {partial_tail} {n}");
        }
    }

    #[test]
    fn a_block_size_of_zero_gives_no_keys() {
        assert!(keys(ChainSpec::exact(0), Root::Base, 8, &PromptExtras::default()).is_empty());
        let mut none = Vec::new();
        extend(BlockKey(1), 0, &tokens(8), &[], &mut none);
        assert!(none.is_empty());
    }
}
