//! Test help: a fleet of endpoints `e0`, `e1`, ... and what one plugin says about it.

use std::collections::BTreeMap;

use crate::config::Buffered;
use crate::cost::Costing;
use crate::decision::{Headers, NoTokens, Request, TokensKnown};
use crate::fleet::{EndpointId, EndpointSpec, EngineMetrics, Fleet, LoraMetrics, Name};
use crate::plugin::{PluginKind, PluginSpec};
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
    peer: Option<EndpointId>,
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

    /// Host, rack, zone and region; an empty one is not told. Forgets metrics and numbers, as
    /// [`Fixture::label`] does.
    pub fn place(&mut self, at: usize, place: [&str; 4]) {
        let keys = [
            "kubernetes.io/hostname",
            "topology.kubernetes.io/rack",
            "topology.kubernetes.io/zone",
            "topology.kubernetes.io/region",
        ];
        for (key, value) in keys.into_iter().zip(place) {
            self.specs[at].labels.insert(key.into(), value.into());
        }
        self.build();
    }

    pub fn address(&mut self, at: usize, address: &str) {
        self.specs[at].address = address.into();
        self.build();
    }

    /// A number that holds for ten seconds.
    pub fn attribute(&mut self, at: usize, key: &str, producer: &str, value: f64) {
        let values = [(key.to_owned(), value)];
        let valid_for = std::time::Duration::from_secs(10);
        self.fleet.on_attributes(self.now, self.rows[at].id, producer, &values, valid_for);
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
        self.peer = Some(self.id(at));
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
            peer: self.peer.and_then(|id| self.fleet.get(id)),
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

    /// One candidate less.
    pub fn drop_row(&mut self, at: usize) {
        self.rows.remove(at);
    }

    /// Some of the candidates.
    pub fn only(&self, kept: &[bool]) -> Fixture {
        let mut fixture = self.clone();
        let mut kept = kept.iter();
        fixture.rows.retain(|_| kept.next() == Some(&true));
        fixture
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

    /// The profile that runs chose it, and it answers.
    pub fn picked(&self, plugin: &mut impl Plugin, at: usize) -> Option<ResponseHeader> {
        self.picked_as(plugin, at, self.profile, true)
    }

    pub fn picked_as(
        &self,
        plugin: &mut impl Plugin,
        at: usize,
        profile: &str,
        primary: bool,
    ) -> Option<ResponseHeader> {
        let endpoint = self.fleet.get(self.id(at)).unwrap();
        self.with(|view, request| {
            plugin.picked(&Picked {
                now: self.now,
                endpoint,
                request,
                sessions: view.sessions,
                profile,
                primary,
            })
        })
    }

    pub fn pick(
        &self,
        picker: &mut (impl Picker + ?Sized),
        totals: &[f64],
        seed: u64,
    ) -> Vec<usize> {
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

/// One of a few values, so that some are alike.
fn one_of<'a>(rng: &mut Rng, values: &[&'a str]) -> &'a str {
    values[rng.below(values.len())]
}

impl Fixture {
    /// Up to five candidates of which something is known, and a request.
    pub fn random(rng: &mut Rng) -> Fixture {
        let n = rng.below(6);
        let mut fixture = Fixture::new(n);
        for at in 0..n {
            fixture.random_labels(at, rng);
        }
        for at in 0..n {
            fixture.random_load(at, rng);
        }
        if n > 0 && rng.below(2) == 0 {
            fixture.peer(rng.below(n));
        }
        fixture.prompt_tokens(rng.below(20_000) as u32);
        fixture.priority(rng.below(3) as i32 - 1);
        fixture.media_keys(&[1, 2, 3][..rng.below(4)]);
        fixture.model(one_of(rng, &["model", "adapter"]));
        fixture.session("session-id-producer", one_of(rng, &["s1", "s2"]));
        let headers = [("x-tier", "fast"), ("test-epp-endpoint-selection", "e0,e2:80")];
        let (name, value) = headers[rng.below(2)];
        fixture.header(name, value);
        fixture
    }

    fn random_labels(&mut self, at: usize, rng: &mut Rng) {
        let place = std::array::from_fn(|_| one_of(rng, &["", "a", "b"]));
        self.place(at, place);
        let roles = ["decode", "prefill", "both", "encode", "encode-prefill"];
        let ranges = ["0-1000", "500-9000", "8000-8000", "none"];
        for (key, values) in [
            ("llm-d.ai/role", &roles[..]),
            ("llm-d.ai/context-length-range", &ranges),
            ("tier", &["fast", "slow"]),
        ] {
            if rng.below(4) > 0 {
                self.label(at, key, one_of(rng, values));
            }
        }
    }

    fn random_load(&mut self, at: usize, rng: &mut Rng) {
        if rng.below(4) > 0 {
            let usage = rng.below(11) as f64 / 10.0;
            self.lora(at, &[one_of(rng, &["adapter", "other"])], &["another"], 3);
            self.signals(at, rng.below(200) as u32, rng.below(50) as u32, usage);
        }
        self.inflight(at, rng.below(9) as u32, rng.next_u64() >> rng.below(64));
        self.uncached(at, rng.below(1_000_000) as u32);
        let total = rng.below(100) as u32;
        self.prefix(at, rng.below(total as usize + 1) as f64, total, 16);
        let items = rng.below(4);
        self.media(at, rng.below(items + 1) as u64, items as u64);
        let keys =
            ["n", "llm-d.ai/multicluster-queue-size", "llm-d.ai/multicluster-kv-cache-utilization"];
        for key in keys {
            if rng.below(4) > 0 {
                self.attribute(at, key, "p", (rng.next_f64() - 0.2) * 10.0);
            }
        }
        if rng.below(3) > 0 {
            let mut seconds = || rng.next_f64() - 0.4;
            self.latency(
                at,
                Latency {
                    ttft_s: seconds().abs(),
                    tpot_s: seconds().abs(),
                    ttft_headroom_s: seconds(),
                    tpot_headroom_s: seconds(),
                },
            );
        }
    }
}

/// Parameters beside the defaults that properties must hold for.
const SPECS: &[(&str, &str)] = &[
    ("by-label", r#"{"label": "tier", "validValues": ["fast"]}"#),
    ("by-label", r#"{"label": "tier", "validValues": ["slow"], "allowsNoLabel": true}"#),
    ("label-selector-filter", r#"{"matchLabels": {"tier": "fast"}}"#),
    (
        "utilization-filter",
        r#"{"conditions": [{"metric": "waiting-queue", "maxValue": 50},
            {"metric": "active-requests", "maxValue": 4}]}"#,
    ),
    (
        "utilization-filter",
        r#"{"conditions": [{"metric": "kv-cache-utilization", "maxValue": 0.1}],
            "fallbackOnEmpty": true}"#,
    ),
    (
        "endpoint-attribute-filter",
        r#"{"attribute": "n", "onMissing": "Fail", "algorithm": {"type": "threshold",
            "threshold": {"operator": "LessThan", "value": 3}}}"#,
    ),
    ("topology-affinity-filter", r#"{"minAffinity": "zone"}"#),
    ("context-length-aware", r#"{"enableFiltering": true}"#),
    ("prefix-cache-affinity-filter", r#"{"affinityThreshold": 0.3, "maxTTFTPenaltyMs": 1}"#),
    (
        "endpoint-attribute-scorer",
        r#"{"attributeKey": "n", "algorithm": {"type": "linear_higher_is_better"}}"#,
    ),
    (
        "endpoint-attribute-scorer",
        r#"{"attributeKey": "n", "algorithm": {"type": "linear_lower_is_better",
            "normalization": {"fixedRange": {"min": 0, "max": 5}}}}"#,
    ),
    ("header-label-affinity-scorer", r#"{"headerName": "x-tier", "labelKey": "tier"}"#),
    ("prefix-cache-scorer", r#"{"matchLengthWeight": 0.7, "matchLengthScaleTokens": 500}"#),
    ("prefix-cache-scorer", r#"{"mode": "cache_tracking"}"#),
    ("active-request-scorer", r#"{"idleThreshold": 2, "maxBusyScore": 0.4}"#),
    ("token-load-scorer", r#"{"queueThresholdTokens": 1000}"#),
    ("load-aware-scorer", r#"{"threshold": 7}"#),
];

/// Every plugin without parameters, and some with.
pub(crate) fn every_spec() -> Vec<PluginSpec> {
    let none = |kind: &PluginKind| {
        kind.read(Buffered::Null.into_deserializer::<serde::de::value::Error>()).unwrap()
    };
    let given = |(name, json): &(&str, &str)| {
        let kind = PluginKind::of_name(name).unwrap();
        let spec = kind.read(&mut serde_json::Deserializer::from_str(json)).unwrap();
        assert_eq!(spec.plugin().check(), Ok(()), "{name} {json}");
        spec
    };
    PluginKind::ALL.iter().map(none).chain(SPECS.iter().map(given)).collect()
}

/// Equal up to rounding; NaN equals NaN.
pub(crate) fn assert_scores(actual: &[f64], expected: &[f64]) {
    let same = |(a, b): (&f64, &f64)| (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-9;
    let all = actual.len() == expected.len() && actual.iter().zip(expected).all(same);
    assert!(all, "{actual:?} is not {expected:?}");
}
