//! Why did the last requests go where they went? A ring of decisions, bounded by bytes.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use kvroute_core::decision::DecisionRecord;
use kvroute_core::fleet::Name;
use parking_lot::Mutex;
use serde::Serialize;

use crate::explain::{BlocksRecord, PromptRecord};

/// Records that fell out of the ring whose memory is kept for new ones: as many as may be written
/// at the same time.
const SPARE_MAX: usize = 8;
/// Allowance for the texts of an outcome.
const OUTCOME_TEXT_BYTES: usize = 128;

/// What became of a request.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Outcome {
    /// Status that the client got; 499 when it left first, 0 when the router has not seen it.
    pub status: u16,
    /// Endpoint that answered, or the last one tried.
    pub endpoint: Name,
    /// Endpoints tried.
    pub attempts: u32,
    /// From the request's head to the first byte of the answer's body.
    pub ttft_s: Option<f64>,
    /// A proxy has brought the answer to its end alone (`docs/differences.md`, row 106).
    pub not_followed: bool,
    /// From the request's head to the end of the answer, or of what was followed of it.
    pub total_s: f64,
    /// Prompt tokens as the engine counts them.
    pub prompt_tokens: Option<u32>,
    /// Generated tokens.
    pub completion_tokens: Option<u32>,
    /// Prompt tokens that the engine had cached.
    pub delivered_tokens: Option<u32>,
    /// What went wrong.
    pub error: Option<String>,
}

impl Outcome {
    /// Another endpoint than was chosen may answer.
    pub fn set_endpoint(&mut self, name: &str) {
        if self.endpoint.as_str() != name {
            self.endpoint = Name::from(name);
        }
    }
}

/// One request in the ring.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    /// Seconds since the Unix epoch.
    pub at_unix_s: f64,
    /// From the whole body to the decision: reading, waiting for others where the plan has
    /// windows, deciding.
    pub took_s: f64,
    pub prompt: PromptRecord,
    pub decision: DecisionRecord,
    /// Missing while the request is under way.
    pub outcome: Option<Outcome>,
    #[serde(skip)]
    bytes: usize,
}

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<Entry>,
    /// Number of the first entry.
    first: u64,
    bytes: usize,
    /// What fell out last.
    spare: Vec<(DecisionRecord, PromptRecord)>,
}

/// The last decisions, newest last.
#[derive(Debug)]
pub(crate) struct Decisions {
    ring: Mutex<Ring>,
    bytes_max: usize,
}

impl Decisions {
    /// Keeps at most about `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Decisions {
        Decisions { ring: Mutex::default(), bytes_max }
    }

    /// Memory for a new decision: records that nobody sees any more, if there are any.
    pub fn spare(&self) -> (DecisionRecord, PromptRecord) {
        self.ring.lock().spare.pop().unwrap_or_default()
    }

    /// Adds a decision that took so long; the number says where its outcome belongs.
    pub fn push(&self, decision: DecisionRecord, prompt: PromptRecord, took: Duration) -> u64 {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let at_unix_s = since_epoch.map_or(0.0, |d| d.as_secs_f64());
        let blocks = prompt.blocks.capacity() * size_of::<BlocksRecord>();
        let asked = prompt.rewritten_from.as_ref().map_or(0, String::capacity);
        let bytes = size_of::<Entry>() + OUTCOME_TEXT_BYTES + blocks + asked + decision.bytes();
        let took_s = took.as_secs_f64();
        let entry = Entry { at_unix_s, took_s, prompt, decision, outcome: None, bytes };
        let mut ring = self.ring.lock();
        ring.bytes += bytes;
        ring.entries.push_back(entry);
        while ring.bytes > self.bytes_max && !ring.entries.is_empty() {
            let Some(old) = ring.entries.pop_front() else { break };
            ring.bytes -= old.bytes;
            ring.first += 1;
            if ring.spare.len() < SPARE_MAX {
                ring.spare.push((old.decision, old.prompt));
            }
        }
        (ring.first + ring.entries.len() as u64).saturating_sub(1)
    }

    /// Notes what became of a decision, if it is still there.
    pub fn finish(&self, number: u64, outcome: Outcome) {
        let mut ring = self.ring.lock();
        let Some(at) = number.checked_sub(ring.first) else { return };
        if let Some(entry) = usize::try_from(at).ok().and_then(|at| ring.entries.get_mut(at)) {
            entry.outcome = Some(outcome);
        }
    }

    /// The newest `n`, newest first.
    pub fn last(&self, n: usize) -> Vec<Entry> {
        self.ring.lock().entries.iter().rev().take(n).cloned().collect()
    }

    /// How many are kept, and in how many bytes of how many.
    pub fn kept(&self) -> (usize, usize, usize) {
        let ring = self.ring.lock();
        (ring.entries.len(), ring.bytes, self.bytes_max)
    }

    /// The newest of this request id.
    pub fn find(&self, id: &str) -> Option<Entry> {
        self.ring.lock().entries.iter().rev().find(|e| e.decision.request_id == id).cloned()
    }
}
