//! How many bytes does a block cost?

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

use anyhow::Result;
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};
use kvroute_core::Rng;

use crate::Options;
use crate::subjects::Subject;
use crate::subjects::dynamo::Pooled;
use crate::subjects::kv_index::Chains;
use crate::subjects::naive::Naive;
use crate::subjects::ours::Ours;
use crate::table::{Better, Cell, Table, grouped};
use crate::workload::{Names, Prompt, stores, tokens};

const EVENT_BLOCKS: usize = 16;

/// The system's allocator, counting while it is asked to.
pub struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static BYTES: AtomicIsize = AtomicIsize::new(0);

fn count(bytes: isize) {
    if COUNTS.load(Ordering::Relaxed) {
        BYTES.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[allow(unsafe_code, reason = "an allocator cannot be written without it")]
// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Prompts that share nothing.
#[derive(Clone, Copy)]
struct Size {
    prompts: usize,
    blocks_each: usize,
    block_size: u32,
}

impl Size {
    fn blocks(&self) -> usize {
        self.prompts * self.blocks_each
    }
}

/// Bytes that an index holds once every holder has stored every prompt.
fn bytes<S: Subject>(size: Size, holders: u16, names: Names, seed: u64) -> usize {
    BYTES.store(0, Ordering::SeqCst);
    COUNTS.store(true, Ordering::SeqCst);
    let mut index = S::new(holders);
    for endpoint in 0..holders {
        let mut rng = Rng::seeded(seed);
        for _ in 0..size.prompts {
            let count = size.blocks_each * size.block_size as usize;
            let prompt = Prompt::new(tokens(&mut rng, count), size.block_size);
            let all = 0..size.blocks_each;
            for raw in stores(&prompt, size.block_size, endpoint, all, names, EVENT_BLOCKS) {
                index.apply(S::prepare(raw));
            }
        }
    }
    index.settle();
    let bytes = BYTES.load(Ordering::SeqCst);
    COUNTS.store(false, Ordering::SeqCst);
    drop(index);
    bytes.unsigned_abs()
}

fn measure<S: Subject>(
    options: &Options,
    table: &mut Table,
    sizes: &[Size],
    label: &str,
    names: Names,
) {
    if !options.wants(label) {
        return;
    }
    let limit = options.memory_gb_max * 1e9;
    for holders in [1u16, 8] {
        let mut per_block = 0.0;
        for &size in sizes {
            let column = format!("{}, {holders} each", grouped(size.blocks() as u64));
            let expected = per_block * size.blocks() as f64;
            // Growing takes old and new at once.
            if expected * 1.5 > limit {
                let text = format!("left out: {:.0} GB", expected / 1e9);
                table.put(label, &column, Cell::text(text));
                continue;
            }
            per_block =
                bytes::<S>(size, holders, names, options.seed) as f64 / size.blocks() as f64;
            table.put(label, &column, Cell::new(per_block, format!("{per_block:.1}")));
        }
    }
}

/// Prints the table.
pub fn run(options: &Options) -> Result<()> {
    let mut sizes = vec![
        Size { prompts: 757, blocks_each: 56, block_size: 128 },
        Size { prompts: 8_929, blocks_each: 112, block_size: 64 },
    ];
    if !options.quick {
        sizes.push(Size { prompts: 89_286, blocks_each: 112, block_size: 64 });
    }
    let title = "Bytes per distinct block, everything included (live bytes of the allocator), by \
                 blocks and by endpoints that hold each";
    let mut table = Table::new(title, Better::Lower);
    type Crtc = Pooled<ConcurrentRadixTreeCompressed>;
    type Positional = Pooled<PositionalIndexer>;
    let shared = Names::Shared;
    measure::<Naive>(options, &mut table, &sizes, Naive::NAME, Names::Native);
    measure::<RadixTree>(options, &mut table, &sizes, RadixTree::NAME, shared);
    measure::<Crtc>(options, &mut table, &sizes, Crtc::NAME, shared);
    measure::<Positional>(options, &mut table, &sizes, Positional::NAME, shared);
    measure::<Chains<false>>(options, &mut table, &sizes, "kv-index ChainIndex", shared);
    measure::<Ours>(options, &mut table, &sizes, "kvroute, shared names", shared);
    measure::<Ours>(options, &mut table, &sizes, "kvroute, native names", Names::Native);
    let label = "kvroute, names of each engine's own";
    measure::<Ours>(options, &mut table, &sizes, label, Names::Own);
    table.print();
    println!("\nPrompts share nothing, and are stored in events of {EVENT_BLOCKS} blocks.");
    Ok(())
}
