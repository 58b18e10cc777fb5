//! How much of a request's prompts does each candidate hold, and how do we know?

use crate::EndpointId;
use crate::blocks::{ChainSpec, TokenSpace};
use crate::decision::{HitRecord, PromptChains, Reason, Request, TokensKnown};
use crate::fleet::Fleet;
use crate::index::{Hit, Hits, Index, TierWeights};
use crate::plan::{Plan, ProducerKind, ProducerPlan};
use crate::produce::{ApproxPrefix, Assigned, PrecisePrefix};
use crate::stage::{PrefixMatch, Row};
use crate::stream::{StreamState, SuspectReason};

/// Distinct chains that one request may need: a fleet with more block sizes than this has
/// endpoints whose prefix knowledge is `no-chain`.
const CHAIN_SPECS_MAX: usize = 8;

/// The chains that requests must come with now: `exact` when the prompt's token ids are known,
/// else `estimated`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChainSpecs {
    exact: SpecList,
    estimated: SpecList,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SpecList {
    len: usize,
    specs: [ChainSpec; CHAIN_SPECS_MAX],
}

impl Default for SpecList {
    fn default() -> SpecList {
        SpecList { len: 0, specs: [ChainSpec::exact(0); CHAIN_SPECS_MAX] }
    }
}

impl SpecList {
    fn push(&mut self, spec: ChainSpec) {
        if self.len < CHAIN_SPECS_MAX && !self.as_slice().contains(&spec) {
            self.specs[self.len] = spec;
            self.len += 1;
        }
    }

    fn as_slice(&self) -> &[ChainSpec] {
        &self.specs[..self.len]
    }
}

impl ChainSpecs {
    /// Chains over the engine's own token ids.
    pub fn exact(&self) -> &[ChainSpec] {
        self.exact.as_slice()
    }

    /// Chains over estimated tokens.
    pub fn estimated(&self) -> &[ChainSpec] {
        self.estimated.as_slice()
    }

    /// The chains for a request whose tokens are known like this.
    pub fn of(&self, known: TokensKnown) -> &[ChainSpec] {
        match known {
            TokensKnown::Exact => self.exact(),
            TokensKnown::Estimated => self.estimated(),
            TokensKnown::None(_) => &[],
        }
    }

    pub(crate) fn needed(plan: &Plan, fleet: &Fleet) -> ChainSpecs {
        let mut specs = ChainSpecs::default();
        let engines = block_size_max(fleet);
        for producer in &plan.producers {
            match &producer.kind {
                ProducerKind::Approx(approx) => {
                    specs.exact.push(approx.chain_spec(engines, TokenSpace::Exact));
                    specs.estimated.push(approx.chain_spec(engines, TokenSpace::Estimated));
                }
                ProducerKind::Precise(precise) => {
                    for endpoint in fleet.iter() {
                        specs.exact.push(exact_spec(precise, endpoint.block_size()));
                    }
                    specs.estimated.push(estimated_spec(engines));
                }
                ProducerKind::Burst(burst) => {
                    specs.exact.push(burst.chain_spec(TokenSpace::Exact));
                    specs.estimated.push(burst.chain_spec(TokenSpace::Estimated));
                }
            }
        }
        specs
    }
}

fn block_size_max(fleet: &Fleet) -> Option<u32> {
    fleet.iter().filter_map(|endpoint| endpoint.block_size()).max()
}

fn exact_spec(precise: &PrecisePrefix, learned: Option<u32>) -> ChainSpec {
    ChainSpec::exact(learned.unwrap_or_else(|| precise.block_tokens_assumed()))
}

/// Where precise knowledge is wanted and there are no exact tokens, routing history over estimated
/// tokens is what remains; it is kept as the approximate producer would.
fn estimated_spec(engines: Option<u32>) -> ChainSpec {
    ApproxPrefix::default().chain_spec(engines, TokenSpace::Estimated)
}

/// What one producer knows about one candidate, over all prompts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    /// Why no better.
    pub reason: Reason,
    /// The chain that was looked up.
    pub spec: Option<ChainSpec>,
    /// What it found.
    pub hit: HitRecord,
    /// What the engine's events alone promise, in tokens; see `ledger::Expectation`.
    pub promised_tokens: Option<u32>,
}

/// The answers of one producer, by `Row::at`.
#[derive(Debug, Default)]
pub(crate) struct Column {
    pub known: Vec<Known>,
    pub prefix: Vec<PrefixMatch>,
}

/// What the producers read.
#[derive(Clone, Copy)]
pub(crate) struct Sources<'a> {
    pub request: &'a Request<'a>,
    pub fleet: &'a Fleet,
    pub index: &'a Index,
    pub state_of: &'a dyn Fn(EndpointId) -> StreamState,
    /// The endpoint counts other prompt tokens than the router.
    pub differs: &'a dyn Fn(EndpointId) -> bool,
    pub speculative: bool,
    /// Where the request belongs by its window.
    pub assigned: Option<Assigned>,
}

/// Memory that is used again by each request.
#[derive(Debug, Default)]
pub(crate) struct Knowledge {
    hits: Hits,
    pub columns: Vec<Column>,
}

impl Knowledge {
    /// Asks every producer about every candidate.
    pub fn fill(&mut self, producers: &[ProducerPlan], sources: &Sources<'_>, rows: &[Row]) {
        self.columns.resize_with(producers.len(), Column::default);
        for (producer, column) in producers.iter().zip(&mut self.columns) {
            column.known.clear();
            let engines = block_size_max(sources.fleet);
            column.known.extend(rows.iter().map(|row| match &producer.kind {
                ProducerKind::Approx(approx) => approximate(approx, engines, sources),
                ProducerKind::Precise(precise) => precisely(precise, engines, sources, row.id),
                ProducerKind::Burst(_) => placed(sources, row.id),
            }));
            look_up(&mut self.hits, column, producer, sources, rows);
            column.prefix.clear();
            column.prefix.extend(column.known.iter().map(|known| PrefixMatch {
                weighted: known.hit.matched_weighted,
                blocks: known.hit.matched,
                total: known.hit.blocks,
                block_size: known.hit.block_size,
            }));
        }
    }
}

impl Known {
    fn new(reason: Reason, spec: Option<ChainSpec>) -> Known {
        let block_size = spec.map_or(0, |spec| spec.block_size);
        let hit = HitRecord { block_size, ..HitRecord::default() };
        // While the stream is silent or being rebuilt, its engine has promised nothing.
        let is_held = matches!(
            reason,
            Reason::EventsLive | Reason::StreamSuspect | Reason::Drift | Reason::PromptDiffers
        );
        Known { reason, spec, hit, promised_tokens: is_held.then_some(0) }
    }

    /// Nothing is known after all.
    pub fn nothing(reason: Reason) -> Known {
        Known::new(reason, None)
    }
}

/// What the requests of one window promise each other: nothing of it is in a cache yet.
fn placed(sources: &Sources<'_>, id: EndpointId) -> Known {
    let known = Known::nothing(Reason::BurstPlaced);
    let Some(assigned) = sources.assigned else { return known };
    let PrefixMatch { weighted, blocks, total, block_size } = assigned.on(id);
    let hit = HitRecord {
        block_size,
        blocks: total,
        matched: blocks,
        matched_weighted: weighted,
        ..HitRecord::default()
    };
    Known { hit, ..known }
}

fn approximate(approx: &ApproxPrefix, engines: Option<u32>, sources: &Sources<'_>) -> Known {
    let spec = |space| Some(approx.chain_spec(engines, space));
    match sources.request.tokens_known {
        TokensKnown::Exact => Known::new(Reason::HistoryConfigured, spec(TokenSpace::Exact)),
        TokensKnown::Estimated => {
            Known::new(Reason::HistoryConfigured, spec(TokenSpace::Estimated))
        }
        TokensKnown::None(why) => Known::nothing(why.into()),
    }
}

fn precisely(
    precise: &PrecisePrefix,
    engines: Option<u32>,
    sources: &Sources<'_>,
    id: EndpointId,
) -> Known {
    let Some(endpoint) = sources.fleet.get(id) else { return Known::nothing(Reason::NoChain) };
    match sources.request.tokens_known {
        TokensKnown::Exact => {
            let state = (sources.state_of)(id);
            let reason = match reason_of(state, endpoint.events_expected) {
                Reason::EventsLive | Reason::StreamSuspect if (sources.differs)(id) => {
                    Reason::PromptDiffers
                }
                reason => reason,
            };
            Known::new(reason, Some(exact_spec(precise, endpoint.block_size())))
        }
        TokensKnown::Estimated => {
            Known::new(Reason::TokensEstimated, Some(estimated_spec(engines)))
        }
        TokensKnown::None(why) => Known::nothing(why.into()),
    }
}

fn reason_of(state: StreamState, events_expected: bool) -> Reason {
    match state {
        StreamState::Live => Reason::EventsLive,
        StreamState::Initial if !events_expected => Reason::EventsNotExpected,
        StreamState::Initial => Reason::StreamInitial,
        StreamState::Replaying => Reason::StreamReplaying,
        StreamState::Suspect(SuspectReason::Drift) => Reason::Drift,
        StreamState::Suspect(_) => Reason::StreamSuspect,
    }
}

/// Looks up each distinct chain once per prompt and adds what it finds.
fn look_up(
    hits: &mut Hits,
    column: &mut Column,
    producer: &ProducerPlan,
    sources: &Sources<'_>,
    rows: &[Row],
) {
    let mut specs = SpecList::default();
    column.known.iter().filter_map(|known| known.spec).for_each(|spec| specs.push(spec));
    let (weights, approx) = match &producer.kind {
        ProducerKind::Precise(precise) => (precise.tier_weights(), None),
        ProducerKind::Approx(approx) => (TierWeights::default(), Some(approx)),
        ProducerKind::Burst(_) => return,
    };
    for spec in specs.as_slice() {
        let blocks_max = approx.map_or(u32::MAX, |approx| approx.blocks_max(spec.block_size));
        for prompt in sources.request.prompts {
            let found = look_up_prompt(hits, sources.index, prompt, *spec, &weights);
            for (known, row) in column.known.iter_mut().zip(rows) {
                match found {
                    _ if known.spec != Some(*spec) => {}
                    None => *known = Known::nothing(Reason::NoChain),
                    Some(prompt) => {
                        add(known, hits.get(row.id), prompt, blocks_max, sources.speculative);
                    }
                }
            }
        }
    }
    // Beyond the most chains that a request may carry.
    for known in &mut column.known {
        if known.spec.is_some_and(|spec| !specs.as_slice().contains(&spec)) {
            *known = Known::nothing(Reason::NoChain);
        }
    }
}

/// Blocks of a prompt that have a key, and of those that an engine may take from its cache.
#[derive(Clone, Copy)]
struct PromptBlocks {
    keys: u32,
    cacheable: u32,
}

fn look_up_prompt(
    hits: &mut Hits,
    index: &Index,
    prompt: &PromptChains,
    spec: ChainSpec,
    weights: &TierWeights,
) -> Option<PromptBlocks> {
    let chain = prompt.get(spec)?;
    index.lookup(chain, weights, hits);
    let keys = u32::try_from(chain.keys.len()).unwrap_or(u32::MAX);
    Some(PromptBlocks { keys, cacheable: chain.tokens.saturating_sub(1) / spec.block_size.max(1) })
}

fn add(known: &mut Known, hit: Hit, prompt: PromptBlocks, blocks_max: u32, speculative: bool) {
    let (matched, weighted) = match known.reason {
        Reason::EventsLive if speculative => (hit.expected, hit.expected_weighted),
        Reason::EventsLive => (hit.resident, hit.resident_weighted),
        Reason::StreamInitial | Reason::StreamReplaying | Reason::StreamSuspect => {
            (hit.any, f64::from(hit.any))
        }
        _ => (hit.history, f64::from(hit.history)),
    };
    let record = &mut known.hit;
    record.blocks += prompt.keys.min(blocks_max);
    record.matched += matched.min(blocks_max);
    record.matched_weighted += weighted.min(f64::from(blocks_max));
    let tokens = |blocks: u32| blocks.min(prompt.cacheable).saturating_mul(record.block_size);
    record.predicted_tokens =
        record.predicted_tokens.saturating_add(tokens(matched.min(blocks_max)));
    if let Some(promised) = &mut known.promised_tokens {
        *promised = promised.saturating_add(tokens(hit.resident));
    }
    record.resident += hit.resident;
    record.expected += hit.expected;
    record.history += hit.history;
    record.by_tier.iter_mut().zip(hit.by_tier).for_each(|(sum, blocks)| *sum += blocks);
}
