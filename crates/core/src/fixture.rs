//! Test help: a fleet of endpoints `e0`, `e1`, ... and what one plugin says about it.

use std::collections::BTreeMap;

use crate::cost::Costing;
use crate::decision::{Headers, NoTokens, Request, TokensKnown};
use crate::fleet::{EndpointId, EndpointSpec, EngineMetrics, Fleet, LoraMetrics, Name};
use crate::stage::{
    Admitter, Detector, Filter, Latency, MediaMatch, Picked, Picker, Plugin, PrefixMatch,
    ResponseHeader, Row, Scorer, Signals, View,
};
use crate::{Rng, Time};

/// Candidates for one stage.
#[derive(Clone)]
pub(crate) struct Fixture {
    specs: Vec<EndpointSpec>,
    fleet: Fleet,
    rows: Vec<Row>,
    prefix: Vec<PrefixMatch>,
    media: Vec<MediaMatch>,
    media_keys: Vec<u64>,
    sessions: Vec<(Name, String)>,
    peer: Option<usize>,
    profile: &'static str,
    priority: i32,
    model: String,
    prompt_tokens: u32,
    headers: Vec<(String, String)>,
    now: Time,
}

impl Fixture {
    /// `n` endpoints of which nothing is known.
    pub fn new(n: usize) -> Fixture {
        let specs = (0..n).map(|i| EndpointSpec {
            name: format!("e{i}"),
            address: format!("e{i}:80"),
            labels: BTreeMap::new(),
            rank: 0,
            replay_available: false,
            events_expected: true,
        });
        let mut fixture = Fixture {
            specs: specs.collect(),
            fleet: Fleet::default(),
            rows: Vec::new(),
            prefix: vec![PrefixMatch::default(); n],
            media: vec![MediaMatch::default(); n],
            media_keys: Vec::new(),
            sessions: Vec::new(),
            peer: None,
            profile: "default",
            priority: 0,
            model: "model".into(),
            prompt_tokens: 0,
            headers: Vec::new(),
            now: Time::ZERO,
        };
        fixture.build();
        fixture
    }

    fn build(&mut self) {
        self.fleet = Fleet::default();
        let add = |spec: &EndpointSpec| self.fleet.add(spec.clone(), 1000).unwrap();
        let ids: Vec<EndpointId> = self.specs.iter().map(add).collect();
        self.rows.resize(ids.len(), row(ids.first().copied()));
        for (at, id) in (0u32..).zip(ids) {
            let row = &mut self.rows[at as usize];
            (row.id, row.at) = (id, at);
        }
    }

    pub fn id(&self, at: usize) -> EndpointId {
        self.rows[at].id
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub fn label(&mut self, at: usize, key: &str, value: &str) {
        self.specs[at].labels.insert(key.into(), value.into());
        self.build();
    }

    pub fn signals(&mut self, at: usize, waiting: u32, running: u32, kv_usage: f64) {
        self.rows[at].signals = Some(Signals { waiting, running, kv_usage });
    }

    pub fn inflight(&mut self, at: usize, requests: u32, tokens: u64) {
        self.rows[at].inflight.requests = requests;
        self.rows[at].inflight.tokens = tokens;
    }

    pub fn uncached(&mut self, at: usize, tokens: u32) {
        self.rows[at].uncached_tokens = tokens;
    }

    pub fn prefix(&mut self, at: usize, weighted: f64, total: u32, block_size: u32) {
        let blocks = weighted.ceil() as u32;
        self.prefix[at] = PrefixMatch { weighted, blocks, total, block_size };
    }

    pub fn lora(&mut self, at: usize, running: &[&str], waiting: &[&str], max: u32) {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let lora = LoraMetrics { running: names(running), waiting: names(waiting), max };
        let metrics = EngineMetrics { lora: Some(lora), ..EngineMetrics::default() };
        self.fleet.on_metrics(self.now, self.rows[at].id, &metrics);
        self.signals(at, 0, 0, 0.0);
    }

    pub fn prompt_tokens(&mut self, tokens: u32) {
        self.prompt_tokens = tokens;
    }

    pub fn costing(&mut self, at: usize, costing: Costing) {
        self.rows[at].costing = costing;
    }

    pub fn model(&mut self, model: &str) {
        self.model = model.into();
    }

    pub fn header(&mut self, name: &str, value: &str) {
        self.headers = vec![(name.into(), value.into())];
    }

    pub fn media(&mut self, at: usize, matched: u64, total: u64) {
        self.media[at] = MediaMatch { matched, total };
    }

    /// The request holds items of these contents.
    pub fn media_keys(&mut self, keys: &[u64]) {
        self.media_keys = keys.to_vec();
    }

    pub fn session(&mut self, producer: &str, id: &str) {
        self.sessions = vec![(Name::from(producer), id.into())];
    }

    /// An earlier profile chose this one.
    pub fn peer(&mut self, at: usize) {
        self.peer = Some(at);
    }

    pub fn priority(&mut self, priority: i32) {
        self.priority = priority;
    }

    pub fn latency(&mut self, at: usize, latency: Latency) {
        self.rows[at].latency = Some(latency);
    }

    /// A scrape at this moment, which signals of the same numbers go with.
    pub fn metrics(&mut self, at: usize, metrics: &EngineMetrics) {
        self.fleet.on_metrics(self.now, self.rows[at].id, metrics);
        self.signals(at, metrics.waiting, metrics.running, metrics.kv_usage);
    }

    /// The table, for what has no method of its own here.
    pub fn fleet(&mut self) -> &mut Fleet {
        &mut self.fleet
    }

    pub fn now_s(&mut self, secs: f64) {
        self.now = Time::from_secs_f64(secs);
    }

    fn with<R>(&self, run: impl FnOnce(&View<'_>, &Request<'_>) -> R) -> R {
        let pairs: Vec<(&str, &str)> =
            self.headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let headers = Headers(&pairs);
        let request = Request {
            id: "request",
            model: &self.model,
            prompts: &[],
            prompt_tokens: self.prompt_tokens,
            tokens_known: TokensKnown::None(NoTokens::NoPrompt),
            max_tokens: None,
            skips_cache: false,
            held: None,
            media: &self.media_keys,
            priority: self.priority,
            headers: &headers,
            allowed: None,
        };
        let view = View {
            now: self.now,
            request: &request,
            fleet: &self.fleet,
            rows: &self.rows,
            prefix: &self.prefix,
            media: &self.media,
            sessions: &self.sessions,
            profile: self.profile,
            peer: self.peer.and_then(|at| self.fleet.get(self.rows[at].id)),
        };
        run(&view, &request)
    }

    pub fn filter(&self, filter: &mut (impl Filter + ?Sized)) -> Vec<bool> {
        self.filter_seeded(filter, 1)
    }

    pub fn filter_seeded(&self, filter: &mut (impl Filter + ?Sized), seed: u64) -> Vec<bool> {
        let mut keep = vec![true; self.rows.len()];
        self.with(|view, _| filter.filter(view, &mut Rng::seeded(seed), &mut keep));
        keep
    }

    pub fn saturation(&self, detector: &(impl Detector + ?Sized)) -> f64 {
        self.with(|view, _| detector.saturation(view))
    }

    pub fn admit(&self, admitter: &(impl Admitter + ?Sized), seed: u64) -> Result<(), String> {
        self.with(|view, _| admitter.admit(view, &mut Rng::seeded(seed)))
    }

    /// The same candidates, last first.
    pub fn reversed(&self) -> Fixture {
        let mut fixture = self.clone();
        fixture.rows.reverse();
        fixture
    }

    pub fn score(&self, scorer: &mut (impl Scorer + ?Sized)) -> Vec<f64> {
        let mut column = vec![f64::NAN; self.rows.len()];
        self.with(|view, _| scorer.score(view, &mut column));
        column
    }

    pub fn picked(&self, plugin: &mut impl Plugin, at: usize) -> Option<ResponseHeader> {
        let endpoint = self.fleet.get(self.id(at)).unwrap();
        self.with(|view, request| {
            plugin.picked(&Picked {
                now: self.now,
                endpoint,
                request,
                sessions: view.sessions,
                profile: view.profile,
                primary: true,
            })
        })
    }

    pub fn pick(&self, picker: &mut impl Picker, totals: &[f64], seed: u64) -> Vec<usize> {
        let mut order = Vec::new();
        self.with(|view, _| picker.pick(view, totals, &mut Rng::seeded(seed), &mut order));
        order
    }
}

fn row(id: Option<EndpointId>) -> Row {
    let id = id.unwrap_or(EndpointId { slot: 0, generation: 0 });
    Row {
        id,
        at: 0,
        signals: None,
        inflight: Default::default(),
        uncached_tokens: 0,
        costing: Default::default(),
        latency: None,
    }
}

/// Equal up to rounding; NaN equals NaN.
pub(crate) fn assert_scores(actual: &[f64], expected: &[f64]) {
    let same = |(a, b): (&f64, &f64)| (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-9;
    let all = actual.len() == expected.len() && actual.iter().zip(expected).all(same);
    assert!(all, "{actual:?} is not {expected:?}");
}
