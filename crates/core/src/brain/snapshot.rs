//! What would be decided now, and why, without deciding it?
//!
//! A [`Snapshot`] holds everything that one decision depends on. A brain that is restored from it
//! decides as the original would have, with the same seed byte for byte, and can do no harm to it:
//! so a decision is explained by making it on a copy, with the same code. [`Brain::explain`] makes
//! a copy of the part that one request can see; [`Brain::snapshot`] keeps all of it for later.
//!
//! Left out is what only later calls would read: tickets, the positions of event streams, evidence
//! of the ledger, ages and copies of blocks, blocks that wait for their parent, counters. What a
//! decision reads and a plugin cannot tell stands in [`Snapshot::left_out`].

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::Brain;
use crate::blocks::BlockKey;
use crate::cost::CostState;
use crate::decision::{Decision, Reject, Request};
use crate::fleet::{EndpointId, EndpointState, Fleet, Name};
use crate::index::{BlocksState, Index, IndexLimits};
use crate::learn::SeenState;
use crate::load::Load;
use crate::memory::Memory;
use crate::plan::Plan;
use crate::settings::ms;
use crate::stream::{Stream, StreamLimits, StreamState};
use crate::{Rng, Time};

/// Version of what is written. A change of any type in a snapshot raises it.
pub const FORMAT: u32 = 1;

/// Bytes of one block's name in a snapshot: 16 digits.
const KEY_BYTES: usize = 16;
/// Bytes of everything about one endpoint but its blocks, a guess from above.
const ENDPOINT_BYTES: usize = 4 << 10;

/// Everything that one decision depends on. It holds no text of prompts and no token ids, but
/// names of models, adapters and endpoints, labels, and session ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// What the host adds about itself.
    pub host: SnapshotHost,
    /// When it was taken; decisions are explained as of this moment.
    pub at: Time,
    /// What decisions depend on and is not in here, in words.
    pub left_out: Vec<String>,
    /// The endpoints, by name.
    pub endpoints: Vec<EndpointSnapshot>,
    /// Models that any endpoint has as an adapter.
    pub adapters: Vec<String>,
    /// Seed that the next decision will get.
    #[serde(with = "crate::journal::packed::one")]
    pub next_seed: u64,
    /// Requests in flight, over all endpoints.
    pub inflight_requests: u32,
    /// How fast the fleet is, as learned.
    pub learned: SeenState,
    /// What plugins remember, by profile (none: outside of profiles) and name.
    pub memories: Vec<(String, String, Memory)>,
}

/// What a host tells about itself in a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotHost {
    /// Version of the product.
    pub version: String,
    /// Text of the configuration that runs; empty: the built-in one of that version.
    pub config: String,
    /// When the snapshot was taken, in seconds of the Unix epoch.
    #[serde(with = "crate::journal::exact")]
    pub taken_unix_s: f64,
    /// Model that requests without one mean.
    pub default_model: Option<String>,
    /// Models that have a tokenizer; `*`: all that are not named.
    pub tokenizers: Vec<String>,
}

/// One endpoint of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSnapshot {
    /// What the fleet's table holds.
    pub endpoint: EndpointState,
    /// How far its events are complete.
    pub stream: StreamState,
    /// The ledger has put its events in doubt.
    pub in_doubt: bool,
    /// Its engine counts other prompt tokens than the router.
    pub prompt_differs: bool,
    /// What is in flight there.
    pub load: Load,
    /// What costs depend on; `None`: the plan reads none.
    pub costs: Option<CostState>,
    /// The blocks that it holds.
    pub blocks: BlocksState,
}

/// Why a snapshot cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Written by another version.
    #[error(
        "its format is {found}, this version reads format {FORMAT}; take a new snapshot with \
             the version that explains it"
    )]
    Format {
        /// Format of the snapshot.
        found: u32,
    },
    /// Its endpoints contradict each other.
    #[error("its endpoints contradict each other: {0}; the file has been changed")]
    Endpoints(String),
}

impl Snapshot {
    /// Bytes that it takes as text, about.
    pub fn bytes(&self) -> usize {
        let keys = |e: &EndpointSnapshot| {
            e.blocks.keys() + e.costs.as_ref().map_or(0, |costs| costs.committed.keys.len())
        };
        let keys: usize = self.endpoints.iter().map(keys).sum();
        let memories: usize = self.memories.iter().map(|(.., memory)| memory.bytes()).sum();
        let endpoints = self.endpoints.len() * ENDPOINT_BYTES;
        keys * KEY_BYTES + endpoints + memories + self.host.config.len()
    }
}

impl Brain {
    /// Everything that a decision depends on. Cost: all blocks of all endpoints; where that is too
    /// long for one breath, take [`Brain::snapshot_without_blocks`] and
    /// [`Brain::snapshot_blocks`] one endpoint after the other.
    pub fn snapshot(&self, now: Time) -> Snapshot {
        let mut snapshot = self.snapshot_without_blocks(now);
        for endpoint in &mut snapshot.endpoints {
            endpoint.blocks = self.snapshot_blocks(endpoint.endpoint.id);
        }
        snapshot
    }

    /// The same, where every endpoint holds nothing.
    pub fn snapshot_without_blocks(&self, now: Time) -> Snapshot {
        self.snapshot_of(now, None, None)
    }

    /// The blocks of one endpoint; none once it has left. Cost: these blocks.
    pub fn snapshot_blocks(&self, id: EndpointId) -> BlocksState {
        self.index.state(id)
    }

    /// Bytes that [`Brain::snapshot`] would take as text, about. Cost: the number of endpoints.
    pub fn snapshot_bytes(&self) -> usize {
        let usage = self.index.usage();
        let keys = usage.resident + usage.history;
        keys * KEY_BYTES + usage.endpoints * ENDPOINT_BYTES
    }

    /// Blocks aside; of commitments and multimodal items these only, where some are given.
    fn snapshot_of(
        &self,
        now: Time,
        only: Option<&[&[BlockKey]]>,
        media: Option<&[u64]>,
    ) -> Snapshot {
        let endpoint = |endpoint: &crate::fleet::Endpoint| EndpointSnapshot {
            endpoint: endpoint.state(),
            stream: self.stream_state(endpoint.id).unwrap_or(StreamState::Initial),
            in_doubt: self.ledger.in_doubt(endpoint.id),
            prompt_differs: self.ledger.prompt_differs(endpoint.id),
            load: self.reservations.load(endpoint.id),
            costs: self.costs.state(endpoint.id, only),
            blocks: BlocksState::default(),
        };
        let memories = self.memories(media);
        let lost = memories.iter().filter_map(|(_, plugin, memory)| match memory {
            Memory::LeftOut(what) => Some(format!("{plugin}: {what}")),
            _ => None,
        });
        let windows = self.plan.burst().map(|(at, _)| {
            let name = &self.plan.producers[at].name;
            format!("{name}: who waits in a window; decided as if the request came alone")
        });
        Snapshot {
            format: FORMAT,
            host: SnapshotHost::default(),
            at: now,
            left_out: lost.chain(windows).collect(),
            endpoints: self.fleet.iter().map(endpoint).collect(),
            adapters: self.fleet.adapters().map(str::to_owned).collect(),
            next_seed: self.next_seed(),
            inflight_requests: u32::try_from(self.reservations.len()).unwrap_or(u32::MAX),
            learned: self.costs.fleet_state(),
            memories,
        }
    }

    /// What one request can see of [`Brain::snapshot`]: cheap enough to be taken while requests
    /// wait. Cost: blocks of the longest hit times holders of each, and the plugins' memories.
    pub fn snapshot_for(&self, now: Time, request: &Request<'_>) -> Snapshot {
        let chains = request.prompts.iter().flat_map(|prompt| &prompt.chains);
        let chains: Vec<&[BlockKey]> = chains.map(|chain| &chain.keys[..]).collect();
        let mut snapshot = self.snapshot_of(now, Some(&chains), Some(request.media));
        let ids: Vec<EndpointId> = snapshot.endpoints.iter().map(|e| e.endpoint.id).collect();
        let blocks = self.index.state_of(&ids, &chains);
        for (endpoint, blocks) in snapshot.endpoints.iter_mut().zip(blocks) {
            endpoint.blocks = blocks;
        }
        snapshot
    }

    /// A brain that decides as the one did that the snapshot was taken of. `seed` is that of its
    /// first decision. It has no limit on memory but the snapshot's own size.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn restore(plan: Plan, snapshot: &Snapshot, seed: u64) -> Result<Brain, SnapshotError> {
        if snapshot.format != FORMAT {
            return Err(SnapshotError::Format { found: snapshot.format });
        }
        let endpoints = snapshot.endpoints.iter().map(|endpoint| &endpoint.endpoint);
        let fleet =
            Fleet::restore(endpoints, &snapshot.adapters).map_err(SnapshotError::Endpoints)?;
        let mut brain = Brain::new(plan, 0);
        brain.fleet = fleet;
        brain.index = Index::new(IndexLimits {
            bytes_max: usize::MAX / 2,
            history_blocks_per_endpoint_max: u32::MAX,
            pending_blocks_per_endpoint_max: 0,
            speculations_max: u32::MAX,
        });
        brain.costs.restore_fleet(&snapshot.learned);
        snapshot.endpoints.iter().for_each(|endpoint| brain.restore_endpoint(endpoint));
        let load = |e: &EndpointSnapshot| (e.endpoint.id, e.load);
        let loads: Vec<(EndpointId, Load)> = snapshot.endpoints.iter().map(load).collect();
        brain.reservations.restore(snapshot.inflight_requests, &loads);
        brain.recall(&snapshot.memories);
        brain.rng = Rng::beginning_with(seed);
        brain.collect_specs();
        Ok(brain)
    }

    fn restore_endpoint(&mut self, state: &EndpointSnapshot) {
        let id = state.endpoint.id;
        self.index.restore(id, &state.blocks);
        self.ledger.open(id);
        self.ledger.restore(id, state.in_doubt, state.prompt_differs);
        let settings = &self.plan.settings;
        let limits = StreamLimits {
            replay_available: state.endpoint.spec.replay_available,
            held_batches_max: settings.stream_held_batches_max,
            replay_cooldown: ms(settings.replay_cooldown_ms),
        };
        let slot = usize::from(id.slot);
        if self.streams.len() <= slot {
            self.streams.resize_with(slot + 1, || None);
        }
        self.streams[slot] = Some(super::EndpointStream {
            generation: id.generation,
            stream: Stream::in_state(limits, state.stream),
            applied: super::Applied::default(),
            waiting: super::Waiting::default(),
            reset: super::ResetClaim::None,
        });
        if let Some(costs) = &state.costs {
            self.costs.restore(id, costs);
        }
    }

    /// The decision that this request would get now, made on a copy: nothing is reserved,
    /// remembered, counted or recorded. `seed` of its random choices; `None`: the one that the next
    /// request will get.
    pub fn explain(
        &self,
        now: Time,
        request: &Request<'_>,
        seed: Option<u64>,
    ) -> Result<Decision, Reject> {
        let (snapshot, seed) = (self.snapshot_for(now, request), seed.unwrap_or(self.next_seed()));
        Brain::restore(self.plan.clone(), &snapshot, seed)
            .expect("a snapshot that was just taken has this format and no contradictions")
            .decide(now, request)
    }

    /// Seed of the next decision.
    pub fn next_seed(&self) -> u64 {
        self.rng.clone().next_u64()
    }

    fn memories(&self, media: Option<&[u64]>) -> Vec<(String, String, Memory)> {
        let in_profiles = self.pipelines.iter().flat_map(|pipeline| {
            let profile = pipeline.profile.to_string();
            let memories = pipeline.memories().into_iter();
            memories.map(move |(name, memory)| (profile.clone(), name.to_string(), memory))
        });
        let screeners = self.screeners.iter().map(|guard| (&guard.name, guard.plugin.memory()));
        let admitters = self.admitters.iter().map(|guard| (&guard.name, guard.plugin.memory()));
        let detectors = self.detector.iter().map(|guard| (&guard.name, guard.plugin.memory()));
        let guards = screeners.chain(admitters).chain(detectors);
        let guards = guards.filter(|(_, memory)| *memory != Memory::Nothing);
        let guards = guards.map(|(name, memory)| (String::new(), name.to_string(), memory));
        let caches = self.plan.others.iter().zip(&self.encoder_caches);
        let caches = caches.filter_map(|((name, _), caches)| {
            Some((String::new(), name.to_string(), caches.as_ref()?.memory(media)))
        });
        in_profiles.chain(guards).chain(caches).collect()
    }

    fn recall(&mut self, memories: &[(String, String, Memory)]) {
        for (profile, plugin, memory) in memories {
            let pipelines = self.pipelines.iter_mut();
            for pipeline in pipelines.filter(|p| p.profile.as_str() == profile) {
                pipeline.recall(plugin, memory);
            }
            if profile.is_empty() {
                self.recall_outside(plugin, memory);
            }
        }
    }

    /// Of plugins outside of profiles.
    fn recall_outside(&mut self, plugin: &str, memory: &Memory) {
        let is_it = |name: &Name| name.as_str() == plugin;
        for guard in self.screeners.iter_mut().filter(|guard| is_it(&guard.name)) {
            guard.plugin.recall(memory);
        }
        for guard in self.admitters.iter_mut().filter(|guard| is_it(&guard.name)) {
            guard.plugin.recall(memory);
        }
        for guard in self.detector.iter_mut().filter(|guard| is_it(&guard.name)) {
            guard.plugin.recall(memory);
        }
        let caches = self.plan.others.iter().zip(&mut self.encoder_caches);
        for (_, caches) in caches.filter(|((name, _), _)| is_it(name)) {
            caches.iter_mut().for_each(|caches| caches.recall(memory));
        }
    }
}
