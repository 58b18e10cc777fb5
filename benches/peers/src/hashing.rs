//! What does it cost to turn tokens into hashes of blocks?

use std::hash::Hasher;
use std::hint::black_box;

use anyhow::Result;
use kvroute_core::Rng;
use sha2::{Digest, Sha256};

use crate::Options;
use crate::clock::{overhead_ns, quantile, timed};
use crate::subjects::Subject;
use crate::subjects::kv_index::Chains;
use crate::subjects::ours::Ours;
use crate::table::{Better, Cell, Table, grouped};
use crate::workload::{PROMPT_TOKENS, tokens};
use dynamo_kv_router::RadixTree;
use dynamo_kv_router::protocols::compute_seq_hash_for_block;

/// SHA-256 of the parent's hash and the tokens.
fn sha256(tokens: &[u32], block_size: u32) -> Vec<[u8; 32]> {
    let mut parent = [0; 32];
    let block = |block: &[u32]| {
        let mut hasher = Sha256::new();
        hasher.update(parent);
        let bytes: Vec<u8> = block.iter().flat_map(|token| token.to_le_bytes()).collect();
        hasher.update(bytes);
        parent = hasher.finalize().into();
        parent
    };
    tokens.chunks_exact(block_size as usize).map(block).collect()
}

/// The head of a CBOR item (RFC 8949, section 3): its major type and a number.
fn cbor(major: u8, number: u64, out: &mut Vec<u8>) {
    let major = major << 5;
    match number {
        0..=23 => out.push(major | number as u8),
        24..=0xff => out.extend([major | 24, number as u8]),
        0x100..=0xffff => {
            out.push(major | 25);
            out.extend((number as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(major | 26);
            out.extend((number as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend(number.to_be_bytes());
        }
    }
}

/// FNV-1a of `[parent, [tokens], null]` in CBOR, as llm-d's router names blocks.
fn fnv_cbor(tokens: &[u32], block_size: u32) -> Vec<u64> {
    let (mut parent, mut bytes) = (0, Vec::new());
    let block = |block: &[u32]| {
        bytes.clear();
        cbor(4, 3, &mut bytes);
        cbor(0, parent, &mut bytes);
        cbor(4, block.len() as u64, &mut bytes);
        block.iter().for_each(|&token| cbor(0, u64::from(token), &mut bytes));
        bytes.push(0xf6);
        let mut hasher = fnv::FnvHasher::default();
        hasher.write(&bytes);
        parent = hasher.finish();
        parent
    };
    tokens.chunks_exact(block_size as usize).map(block).collect()
}

/// Prints the table.
pub fn run(options: &Options) -> Result<()> {
    let title = format!("Hashing {} tokens: p50 ns", grouped(PROMPT_TOKENS as u64));
    let mut table = Table::new(title, Better::Lower);
    let overhead = overhead_ns();
    let mut rng = Rng::seeded(options.seed);
    let prompts: Vec<Vec<u32>> = (0..100).map(|_| tokens(&mut rng, PROMPT_TOKENS)).collect();
    let rounds = if options.quick { 5 } else { 50 };
    type Hash = fn(&[u32], u32);
    let hashes: [(&str, Hash); 6] = [
        ("reference: FNV-1a over CBOR, chained", |tokens, size| {
            black_box(fnv_cbor(tokens, size));
        }),
        ("reference: SHA-256, chained", |tokens, size| {
            black_box(sha256(tokens, size));
        }),
        ("kv-index, each block alone", |tokens, size| {
            black_box(Chains::<false>::query(tokens, size));
        }),
        ("dynamo, each block alone", |tokens, size| {
            black_box(RadixTree::query(tokens, size));
        }),
        ("dynamo, chained", |tokens, size| {
            black_box(compute_seq_hash_for_block(&RadixTree::query(tokens, size)));
        }),
        ("kvroute, chained", |tokens, size| {
            black_box(Ours::query(tokens, size));
        }),
    ];
    for block_size in [16, 64, 128] {
        let mut times = vec![Vec::new(); hashes.len()];
        for _ in 0..rounds {
            for ((_, hash), times) in hashes.iter().zip(&mut times) {
                let all = prompts.iter().map(|prompt| timed(|| hash(prompt, block_size)).1);
                times.extend(all);
            }
        }
        for ((name, _), mut times) in hashes.iter().zip(times) {
            let p50 = quantile(&mut times, 0.5).saturating_sub(overhead);
            let column = format!("blocks of {block_size}");
            table.put(name, &column, Cell::new(p50 as f64, grouped(p50)));
        }
    }
    table.print();
    Ok(())
}
