//! What is resident where, how good is that knowledge, and how did predictions turn out?

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvroute_core::brain::{Brain, BrainCounters};
use kvroute_core::decision::Reason;
use kvroute_core::event::Tier;
use kvroute_core::index::{Applied, EndpointUsage, IndexUsage};
use kvroute_core::ledger::Account;
use kvroute_core::stream::StreamState;
use serde::Serialize;

use crate::events::Subscription;
use crate::events::bound::BoundView;
use crate::metrics::{EndpointLabel, EndpointState, EndpointTier, STREAM_STATES, WayLabel, mirror};
use crate::shared::Shared;
use crate::upstream::Upstream;

/// Answer of `/index`.
#[derive(Serialize)]
pub(super) struct View {
    index: IndexUsage,
    ledger: Account,
    decisions_by_reason: BTreeMap<&'static str, u64>,
    counters: CountersView,
    /// The socket that engines connect to, if there is one.
    bound: Option<BoundView>,
    endpoints: Vec<EndpointView>,
}

/// One endpoint's cache.
#[derive(Serialize)]
struct EndpointView {
    endpoint: String,
    block_size: Option<u32>,
    blocks_by_tier: BTreeMap<&'static str, u32>,
    blocks: BlocksView,
    stream: StreamView,
    ledger: Account,
    /// The ledger has put the endpoint's events in doubt.
    in_doubt: bool,
}

/// What the brain counts, apart from its decisions; see `BrainCounters`.
#[derive(Serialize)]
struct CountersView {
    rejected_no_endpoints: u64,
    rejected_saturated: u64,
    rejected_in_flight: u64,
    held: u64,
    rejected_shed: u64,
    rejected_not_admitted: u64,
    rejected_no_profile: u64,
    rejected_not_cached: u64,
    avoided_failing: u64,
    avoided_model: u64,
    scores_missing: u64,
    redirected: u64,
    endpoints_failed: u64,
    scrapes_failed: u64,
    caches_reset: u64,
    resets_refused: u64,
    tickets_expired: u64,
    speculations: u64,
    drifts: u64,
}

/// What the index holds for an endpoint, apart from tiers; see `EndpointUsage`.
#[derive(Serialize)]
struct BlocksView {
    resident: usize,
    copies_extra: u64,
    groups: usize,
    pending: u32,
    history: usize,
    speculations: usize,
    bytes: usize,
}

/// One event stream.
#[derive(Serialize)]
struct StreamView {
    state: &'static str,
    /// Why it is in doubt.
    reason: Option<&'static str>,
    subscription: Subscription,
    counters: serde_json::Value,
    /// What events did to the index, in blocks.
    applied: BTreeMap<&'static str, u64>,
    messages: u64,
    events_bad: u64,
    /// Connections after the first.
    reconnects: u64,
}

/// Answer of `/endpoints`, one element each.
#[derive(Serialize)]
pub(super) struct EndpointStatus {
    name: String,
    address: String,
    rank: u32,
    labels: BTreeMap<String, String>,
    answers: bool,
    /// Passed over for the moment, because it failed.
    avoided: bool,
    models: Option<Vec<String>>,
    inflight_requests: u32,
    inflight_tokens: u64,
    waiting: Option<u32>,
    running: Option<u32>,
    kv_usage: Option<f64>,
    metrics_age_s: Option<f64>,
    scrape_failures: u32,
}

/// The numbers of `/index`.
pub(super) fn view(shared: &Shared) -> View {
    let upstreams = shared.upstreams.all();
    let brain = shared.brain.lock();
    let counters = *brain.counters();
    let reasons = Reason::ALL.iter().map(|r| (r.as_str(), counters.decisions[r.index()]));
    View {
        index: brain.index().usage(),
        ledger: *brain.ledger().total(),
        decisions_by_reason: reasons.filter(|(_, n)| *n > 0).collect(),
        counters: counters_view(&counters),
        bound: shared.bound.as_ref().map(|bound| bound.view(&shared.metrics)),
        endpoints: in_order(&brain, &upstreams).map(|u| endpoint_view(&brain, u)).collect(),
    }
}

/// By name, like every list of endpoints.
fn in_order<'a>(
    brain: &'a Brain,
    upstreams: &'a [Arc<Upstream>],
) -> impl Iterator<Item = &'a Upstream> {
    let of = |id| upstreams.iter().find(|u| u.id == id).map(Arc::as_ref);
    brain.fleet().iter().filter_map(move |endpoint| of(endpoint.id))
}

fn endpoint_view(brain: &Brain, upstream: &Upstream) -> EndpointView {
    let id = upstream.id;
    let blocks = brain.index().endpoint_usage(id);
    let state = brain.stream_state(id);
    let counters = brain.stream_counters(id).map(serde_json::to_value);
    let metrics = &upstream.metrics;
    EndpointView {
        endpoint: upstream.name.clone(),
        block_size: brain.fleet().get(id).and_then(|e| e.block_size()),
        blocks_by_tier: tiers(&blocks).collect(),
        blocks: blocks_view(&blocks),
        stream: StreamView {
            state: state.map_or("gone", state_name),
            reason: state.and_then(reason_of),
            subscription: upstream.subscription.lock().clone(),
            counters: counters.and_then(Result::ok).unwrap_or_default(),
            applied: brain.stream_applied(id).map(applied).unwrap_or_default(),
            messages: metrics.stream_messages.get(),
            events_bad: metrics.events_bad.get(),
            reconnects: metrics.stream_reconnects.get(),
        },
        ledger: brain.ledger().account(id),
        in_doubt: brain.ledger().in_doubt(id),
    }
}

fn counters_view(all: &BrainCounters) -> CountersView {
    // Each field by its name, so that a new counter is not forgotten here.
    let BrainCounters {
        decisions: _,
        candidates: _,
        rejected_no_endpoints,
        rejected_saturated,
        rejected_in_flight,
        held,
        rejected_shed,
        rejected_not_admitted,
        rejected_no_profile,
        rejected_not_cached,
        avoided_failing,
        avoided_model,
        scores_missing,
        redirected,
        endpoints_failed,
        scrapes_failed,
        caches_reset,
        resets_refused,
        tickets_expired,
        speculations,
        drifts,
    } = *all;
    CountersView {
        rejected_no_endpoints,
        rejected_saturated,
        rejected_in_flight,
        held,
        rejected_shed,
        rejected_not_admitted,
        rejected_no_profile,
        rejected_not_cached,
        avoided_failing,
        avoided_model,
        scores_missing,
        redirected,
        endpoints_failed,
        scrapes_failed,
        caches_reset,
        resets_refused,
        tickets_expired,
        speculations,
        drifts,
    }
}

fn blocks_view(usage: &EndpointUsage) -> BlocksView {
    BlocksView {
        resident: usage.resident,
        copies_extra: usage.copies_extra,
        groups: usage.groups,
        pending: usage.pending,
        history: usage.history,
        speculations: usage.speculations,
        bytes: usage.bytes,
    }
}

fn tiers(usage: &EndpointUsage) -> impl Iterator<Item = (&'static str, u32)> {
    let by_tier = usage.by_tier;
    Tier::ALL.iter().map(move |tier| (tier.as_str(), by_tier[tier.index()]))
}

fn applied(counts: &Applied) -> BTreeMap<&'static str, u64> {
    BTreeMap::from([
        ("stored", counts.stored),
        ("duplicate", counts.duplicate),
        ("reannounced", counts.reannounced),
        ("removed", counts.removed),
        ("unknown", counts.unknown),
        ("pending", counts.pending),
        ("resolved", counts.resolved),
        ("pending_dropped", counts.pending_dropped),
        ("skipped", counts.skipped.iter().sum()),
        ("cleared", counts.cleared),
        ("resized", counts.resized),
    ])
}

fn state_name(state: StreamState) -> &'static str {
    match state {
        StreamState::Initial => STREAM_STATES[0],
        StreamState::Live => STREAM_STATES[1],
        StreamState::Replaying => STREAM_STATES[2],
        StreamState::Suspect(_) => STREAM_STATES[3],
    }
}

fn reason_of(state: StreamState) -> Option<&'static str> {
    match state {
        StreamState::Suspect(reason) => Some(reason.as_str()),
        _ => None,
    }
}

/// The numbers of `/endpoints`.
pub(super) fn endpoints(shared: &Shared) -> Vec<EndpointStatus> {
    let upstreams = shared.upstreams.all();
    let now = shared.clock.now();
    let brain = shared.brain.lock();
    let status = |upstream: &Upstream| {
        let endpoint = brain.fleet().get(upstream.id)?;
        let load = brain.load(upstream.id);
        let metrics = endpoint.metrics();
        let models = endpoint.models();
        Some(EndpointStatus {
            name: upstream.name.clone(),
            address: upstream.authority.clone(),
            rank: upstream.rank,
            labels: endpoint.labels.clone(),
            answers: upstream.up.load(Ordering::Relaxed),
            avoided: endpoint.is_avoided(now),
            models: models.map(|all| all.iter().map(|m| m.id.clone()).collect()),
            inflight_requests: load.requests,
            inflight_tokens: load.tokens,
            waiting: metrics.map(|m| m.waiting),
            running: metrics.map(|m| m.running),
            kv_usage: metrics.map(|m| m.kv_usage),
            metrics_age_s: endpoint.metrics_age(now).map(|age| age.as_secs_f64()),
            scrape_failures: endpoint.scrape_failures(),
        })
    };
    in_order(&brain, &upstreams).filter_map(status).collect()
}

/// Copies the brain's numbers into the metrics, just before they are read.
pub(super) fn mirror_metrics(shared: &Shared) {
    let upstreams = shared.upstreams.all();
    let brain = shared.brain.lock();
    let bytes = brain.index().usage().bytes;
    shared.metrics.index_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    for upstream in &upstreams {
        mirror_cache(shared, &brain, upstream);
        mirror_stream(shared, &brain, upstream);
        mirror_load(shared, &brain, upstream);
    }
    mirror_templates(shared);
    if let Some(names) = &shared.metrics.upstream {
        names.pool().mirror(&brain, &upstreams);
    }
}

fn mirror_templates(shared: &Shared) {
    let (mut direct, mut jinja) = (0, 0);
    for tokenizer in shared.tokenizers.default.iter().chain(shared.tokenizers.by_model.values()) {
        let stats = tokenizer.template_stats();
        (direct, jinja) = (direct + stats.direct, jinja + stats.by_jinja);
    }
    for (way, chats) in [("direct", direct), ("jinja", jinja)] {
        mirror(&shared.metrics.chats_rendered.get_or_create(&WayLabel { way }), chats);
    }
}

fn label_of(upstream: &Upstream) -> EndpointLabel {
    EndpointLabel { endpoint: upstream.name.clone() }
}

fn mirror_cache(shared: &Shared, brain: &Brain, upstream: &Upstream) {
    let (metrics, label) = (&shared.metrics, label_of(upstream));
    let account = brain.ledger().account(upstream.id);
    for (family, value) in [
        (&metrics.tokens_available, account.decided.available_tokens),
        (&metrics.tokens_chosen, account.decided.chosen_tokens),
        (&metrics.tokens_delivered, account.delivered_tokens),
        (&metrics.drift_alarms, account.verdicts.drifts),
        (&metrics.prompts_different, account.verdicts.prompt_differs),
    ] {
        mirror(&family.get_or_create(&label), value);
    }
    for (tier, blocks) in tiers(&brain.index().endpoint_usage(upstream.id)) {
        let label = EndpointTier { endpoint: upstream.name.clone(), tier };
        metrics.index_blocks.get_or_create(&label).set(i64::from(blocks));
    }
}

fn mirror_stream(shared: &Shared, brain: &Brain, upstream: &Upstream) {
    let (metrics, label) = (&shared.metrics, label_of(upstream));
    let Some(state) = brain.stream_state(upstream.id).map(state_name) else { return };
    for one in STREAM_STATES {
        let label = EndpointState { endpoint: upstream.name.clone(), state: one };
        metrics.stream_state.get_or_create(&label).set(i64::from(one == state));
    }
    if let Some(counters) = brain.stream_counters(upstream.id) {
        mirror(&metrics.stream_gaps.get_or_create(&label), counters.gaps);
        mirror(&metrics.stream_replays.get_or_create(&label), counters.replays);
        mirror(&metrics.stream_restarts.get_or_create(&label), counters.restarts);
    }
}

fn mirror_load(shared: &Shared, brain: &Brain, upstream: &Upstream) {
    let (metrics, label) = (&shared.metrics, label_of(upstream));
    let Some(engine) = brain.fleet().get(upstream.id).and_then(|e| e.metrics()) else { return };
    metrics.engine_waiting.get_or_create(&label).set(i64::from(engine.waiting));
    metrics.engine_running.get_or_create(&label).set(i64::from(engine.running));
    metrics.engine_kv_usage.get_or_create(&label).set(engine.kv_usage);
}
