//! The indexes of dynamo-kv-router, of NVIDIA's Dynamo.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use dynamo_kv_router::indexer::{SyncIndexer, WorkerTask};
use dynamo_kv_router::protocols::{
    BlockHashOptions, ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
    KvCacheStoreData, KvCacheStoredBlockData, LocalBlockHash, OverlapScores, RouterEvent,
    compute_block_hash_for_seq,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};
use tokio::sync::oneshot;

use super::{Subject, Timed};
use crate::clock::thread_cpu;
use crate::workload::Raw;

/// Events on their way to a worker thread while an index is built.
const QUEUED_EVENTS_MAX: usize = 64;
/// Blocks that `PositionalIndexer` jumps over, as its documentation suggests.
const JUMP_BLOCKS: usize = 32;

fn hash(tokens: &[u32], block_size: u32) -> Vec<LocalBlockHash> {
    compute_block_hash_for_seq(tokens, block_size, BlockHashOptions::default())
}

fn event(raw: Raw) -> RouterEvent {
    let (endpoint, data) = match raw {
        Raw::Stored { endpoint, block_size, parent, names, tokens } => {
            let block = |(local, &name): (LocalBlockHash, &u64)| KvCacheStoredBlockData {
                block_hash: ExternalSequenceBlockHash(name),
                tokens_hash: local,
                mm_extra_info: None,
            };
            let blocks = hash(&tokens, block_size).into_iter().zip(&names).map(block).collect();
            let parent_hash = parent.map(ExternalSequenceBlockHash);
            let data = KvCacheStoreData { parent_hash, start_position: None, blocks };
            (endpoint, KvCacheEventData::Stored(data))
        }
        Raw::Removed { endpoint, names } => {
            let block_hashes = names.into_iter().map(ExternalSequenceBlockHash).collect();
            (endpoint, KvCacheEventData::Removed(KvCacheRemoveData { block_hashes }))
        }
    };
    RouterEvent::new(u64::from(endpoint), KvCacheEvent { event_id: 0, data, dp_rank: 0 })
}

/// Writes scores to the places of endpoints.
pub fn fill(found: OverlapScores, scores: &mut [u32]) {
    scores.fill(0);
    for (worker, score) in found.scores {
        scores[worker.worker_id as usize] = score;
    }
}

impl Subject for RadixTree {
    const NAME: &'static str = "dynamo RadixTree";

    type Event = RouterEvent;
    type Query = Vec<LocalBlockHash>;
    type Scratch = ();

    fn new(_: u16) -> RadixTree {
        RadixTree::new()
    }

    fn prepare(raw: Raw) -> RouterEvent {
        event(raw)
    }

    fn apply(&mut self, event: RouterEvent) {
        // It refuses what it cannot place; wrong scores are counted where they matter.
        let _ = self.apply_event(event);
    }

    fn query(tokens: &[u32], block_size: u32) -> Vec<LocalBlockHash> {
        hash(tokens, block_size)
    }

    fn lookup(&self, query: &mut Vec<LocalBlockHash>, _: &mut (), scores: &mut [u32]) {
        fill(self.find_matches(std::mem::take(query), false), scores);
    }
}

/// An index whose events are applied by a worker loop.
pub trait Backend: SyncIndexer + Sized {
    const NAME: &'static str;

    fn make() -> Self;
}

impl Backend for ConcurrentRadixTreeCompressed {
    const NAME: &'static str = "dynamo CRTC";

    fn make() -> ConcurrentRadixTreeCompressed {
        ConcurrentRadixTreeCompressed::new()
    }
}

impl Backend for PositionalIndexer {
    const NAME: &'static str = "dynamo Positional";

    fn make() -> PositionalIndexer {
        PositionalIndexer::new(JUMP_BLOCKS)
    }
}

/// The index and the one thread that applies its events.
pub struct Pooled<B> {
    pub backend: Arc<B>,
    tasks: flume::Sender<WorkerTask>,
    thread: Option<JoinHandle<()>>,
}

impl<B: Backend> Subject for Pooled<B> {
    const NAME: &'static str = B::NAME;

    type Event = RouterEvent;
    type Query = Vec<LocalBlockHash>;
    type Scratch = ();

    fn new(_: u16) -> Pooled<B> {
        let backend = Arc::new(B::make());
        let (tasks, receiver) = flume::bounded(QUEUED_EVENTS_MAX);
        let worker = Arc::clone(&backend);
        let thread = std::thread::spawn(move || {
            worker.worker(receiver, None).expect("the worker loop ends when it is told to");
        });
        Pooled { backend, tasks, thread: Some(thread) }
    }

    fn prepare(raw: Raw) -> RouterEvent {
        event(raw)
    }

    fn apply(&mut self, event: RouterEvent) {
        self.tasks.send(WorkerTask::Event(event)).expect("the worker thread lives");
    }

    fn settle(&mut self) {
        let (done, wait) = oneshot::channel();
        self.tasks.send(WorkerTask::Flush(done)).expect("the worker thread lives");
        wait.blocking_recv().expect("the worker thread answers");
    }

    fn query(tokens: &[u32], block_size: u32) -> Vec<LocalBlockHash> {
        hash(tokens, block_size)
    }

    fn lookup(&self, query: &mut Vec<LocalBlockHash>, _: &mut (), scores: &mut [u32]) {
        fill(self.backend.find_matches(query, false), scores);
    }

    /// The worker loop, run here over a full queue: neither waiting nor waking is in the time.
    /// Events are prepared before.
    fn timed<'a>(
        _: u16,
        phases: [Box<dyn Iterator<Item = Raw> + 'a>; 2],
        what: Timed,
    ) -> [Duration; 2] {
        let stamps = Arc::new(Stamps::default());
        let (tasks, receiver) = flume::unbounded();
        let mut markers = vec![mark(&tasks, &stamps)];
        let preparing = phases.map(|phase| {
            let mut time = Duration::ZERO;
            for raw in phase {
                let begin = thread_cpu();
                let event = event(raw);
                time += thread_cpu() - begin;
                tasks.send(WorkerTask::Event(event)).expect("the receiver is held here");
            }
            markers.push(mark(&tasks, &stamps));
            time
        });
        tasks.send(WorkerTask::Terminate).expect("the receiver is held here");
        B::make().worker(receiver, None).expect("the worker loop ends when it is told to");
        let stamps = stamps.0.lock().expect("nothing panics while it is held");
        let applied = [stamps[1] - stamps[0], stamps[2] - stamps[1]];
        match what {
            Timed::Whole => [preparing[0] + applied[0], preparing[1] + applied[1]],
            Timed::Applying => applied,
        }
    }
}

impl<B> Drop for Pooled<B> {
    fn drop(&mut self) {
        let ended = self.tasks.send(WorkerTask::Terminate).is_ok();
        if let (true, Some(thread)) = (ended, self.thread.take()) {
            thread.join().expect("the worker thread does not panic");
        }
    }
}

/// CPU times at which the worker loop came to markers in its queue.
#[derive(Default)]
struct Stamps(Mutex<Vec<Duration>>);

impl Wake for Stamps {
    fn wake(self: Arc<Self>) {
        self.0.lock().expect("nothing panics while it is held").push(thread_cpu());
    }
}

/// Queues a task whose answer wakes a waker, on the thread of the worker loop, when it is its turn.
pub fn mark(
    tasks: &flume::Sender<WorkerTask>,
    stamps: &Arc<impl Wake + Send + Sync + 'static>,
) -> Pin<Box<oneshot::Receiver<()>>> {
    let (done, wait) = oneshot::channel();
    let mut wait = Box::pin(wait);
    let waker = Waker::from(Arc::clone(stamps));
    let answer = wait.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(answer.is_pending(), "nobody answered yet");
    tasks.send(WorkerTask::Flush(done)).expect("the receiver is held by the caller");
    wait
}
