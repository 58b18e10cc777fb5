//! Which endpoints are there, and what do they hold? Every fourth holds the blocks of a prompt, as
//! its engine announced them; all hold others.

use std::collections::BTreeMap;

use anyhow::Context;
use bytes::Bytes;
use kvroute_core::EndpointId;
use kvroute_core::event::{BlockStored, EngineHash, EventBatch, GroupKind, KvEvent, Tier};
use kvroute_core::fleet::{EndpointSpec, EngineMetrics};
use kvroute_core::stream::{StreamInput, StreamOrder};
use kvroute_router::rehearse::Rehearsal;
use kvroute_tokens::Tokenizer;
use kvroute_wire::api::Api;
use kvroute_wire::request;

use crate::Cli;
use crate::prompts::{Case, Prompts, SYSTEMS};

/// Tokens of an engine's block.
const BLOCK: usize = 16;
/// One endpoint of so many holds a given prompt.
const HOLDERS: usize = 4;
/// Blocks of an engine's cache.
const BLOCKS_TOTAL: u32 = 100_000;

/// Endpoints and the numbers of their next batches.
pub struct Fleet {
    pub ids: Vec<EndpointId>,
    seqs: Vec<u64>,
}

impl Fleet {
    /// Enters the fleet and what it holds.
    pub fn enter(
        rehearsal: &Rehearsal,
        endpoints: u32,
        args: &Cli,
        case: Case,
        prompts: &mut Prompts,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<Fleet> {
        let mut fleet = Fleet { ids: Vec::new(), seqs: vec![0; endpoints as usize] };
        for at in 0..endpoints {
            let spec = EndpointSpec {
                name: format!("engine-{at:04}"),
                address: format!("10.0.{}.{}:8000", at / 256, at % 256),
                labels: BTreeMap::new(),
                rank: 0,
                replay_available: false,
                events_expected: true,
            };
            let id = rehearsal.brain().add_endpoint(rehearsal.now(), spec)?;
            fleet.ids.push(id);
            let others: Vec<u32> =
                (0..args.other_blocks * BLOCK as u32).map(|i| (at << 20) + i).collect();
            fleet.tell(rehearsal, at as usize, &others)?;
        }
        fleet.scrape(rehearsal);
        for system in 0..SYSTEMS {
            let [one, other] = prompts.of_system(system).map(|body| ids_of(tokenizer, &body));
            let (one, other) = (one?, other?);
            let shared = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
            let held = if case == Case::ChatRepeat { one.len() } else { shared };
            for at in (system % HOLDERS..endpoints as usize).step_by(HOLDERS) {
                fleet.tell(rehearsal, at, &one[..held])?;
            }
        }
        Ok(fleet)
    }

    /// An engine stored the full blocks of these tokens.
    fn tell(&mut self, rehearsal: &Rehearsal, at: usize, tokens: &[u32]) -> anyhow::Result<()> {
        let full = tokens.len() / BLOCK;
        let first = tokens.iter().take(64).fold(0u64, |sum, token| {
            sum.rotate_left(7).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(*token)
        });
        let stored = BlockStored {
            hashes: (0..full as u64).map(|i| EngineHash(first.wrapping_add(i))).collect(),
            parent: None,
            tokens: tokens[..full * BLOCK].to_vec().into(),
            block_size: BLOCK as u32,
            lora_name: None,
            tier: Tier::Gpu,
            extras: Vec::new(),
            group: None,
            kind: GroupKind::Full,
        };
        let events = vec![KvEvent::Stored(stored)];
        let batch = EventBatch { timestamp_s: 0.0, events, rank: None, events_bad: 0 };
        let input = StreamInput::Batch { seq: self.seqs[at], batch };
        self.seqs[at] += 1;
        let order = rehearsal.brain().on_stream(rehearsal.now(), self.ids[at], input);
        anyhow::ensure!(order == StreamOrder::None, "a stream without gaps asks for nothing");
        Ok(())
    }

    /// Fresh metrics of all.
    pub fn scrape(&self, rehearsal: &Rehearsal) {
        for (at, id) in self.ids.iter().enumerate() {
            let metrics = EngineMetrics {
                waiting: 0,
                running: at as u32 % 5,
                kv_usage: (at % 7) as f64 / 10.0,
                block_size: Some(BLOCK as u32),
                blocks: Some(BLOCKS_TOTAL),
                ..EngineMetrics::default()
            };
            rehearsal.brain().on_metrics(rehearsal.now(), *id, &metrics);
        }
    }
}

fn ids_of(tokenizer: &Tokenizer, body: &Bytes) -> anyhow::Result<Vec<u32>> {
    let parsed = request::parse(Api::ChatCompletions, body)?;
    tokenizer.tokens_of(&parsed)?.into_iter().next().context("a chat has one prompt")
}
