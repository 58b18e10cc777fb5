//! Every kind of plan over a random trace: nothing leaks, and the log is a function of the seed.

use super::*;
use crate::config::EndpointPickerConfig;
use crate::load::Load;
use crate::plan::Experimental;

/// Encode, prefill and decode near each other, with sources of blocks.
const DISAGG: &str = "
plugins:
- type: disagg-profile-handler
  parameters:
    deciders: {prefill: prefix-based-pd-decider, encode: always-disagg-multimodal-decider}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 32}}
- type: always-disagg-multimodal-decider
- type: decode-filter
- type: prefill-filter
- type: encode-filter
- type: topology-affinity-scorer
- type: mm-embeddings-cache-scorer
- type: prefix-cache-scorer
- type: no-hit-lru-scorer
- type: active-request-scorer
- {type: inflight-load-producer, parameters: {addEstimatedOutputTokens: true}}
- type: p2p-source-producer
- {type: weighted-random-picker, parameters: {maxNumOfEndpoints: 2}}
- type: max-score-picker
schedulingProfiles:
- name: encode
  plugins: [{pluginRef: encode-filter}, {pluginRef: mm-embeddings-cache-scorer},
    {pluginRef: weighted-random-picker}]
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: topology-affinity-scorer},
    {pluginRef: no-hit-lru-scorer}, {pluginRef: active-request-scorer},
    {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer, weight: 2},
    {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
";

/// Prefill first; the decode endpoint near it.
const PREFILL_FIRST: &str = "
plugins:
- {type: disagg-profile-handler, parameters: {stageOrder: prefill-first}}
- type: decode-filter
- type: prefill-filter
- {type: topology-affinity-filter, parameters: {minAffinity: zone}}
- type: concurrency-detector
  parameters: {maxConcurrency: 3, concurrencyMode: hybrid, maxTokenConcurrency: 900}
- type: token-load-scorer
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: concurrency-detector},
    {pluginRef: token-load-scorer}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: concurrency-detector},
    {pluginRef: topology-affinity-filter}, {pluginRef: token-load-scorer}]
flowControl: {saturationDetector: {pluginRef: concurrency-detector}}
";

/// Sessions, latencies, admission, exploration, one revision per request.
const GUARDED: &str = "
plugins:
- type: disaggregatedset-rollout-screener
  parameters:
    scope: {labelSelector: revision}
    headerSelectors: [{name: r, headerName: x-revision, labelKey: revision, mode: strict}]
    revisionGating: {revisionLabelKey: revision, roleLabelKey: llm-d.ai/role, mode: sum,
      requireRoles: {values: [decode]}}
- {type: probabilistic-admitter, parameters: {power: 1, k: 0.2}}
- type: latency-slo-admitter
- {type: session-affinity-scorer, parameters: {strategy: session_id}}
- {type: prefix-cache-affinity-filter, parameters: {explorationProbability: 0.3}}
- {type: slo-headroom-tier-filter, parameters: {epsilonExploreNeg: 0.3}}
- type: latency-scorer
- {type: predicted-latency-producer, parameters: {streamingMode: true}}
- type: random-picker
- type: max-score-picker
schedulingProfiles:
- name: all
  plugins: [{pluginRef: prefix-cache-affinity-filter}, {pluginRef: slo-headroom-tier-filter},
    {pluginRef: session-affinity-scorer}, {pluginRef: latency-scorer},
    {pluginRef: max-score-picker}]
";

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const ROLES: [&str; 4] = ["decode", "prefill", "both", "encode"];

/// Where an endpoint runs and what it does goes by its name, whatever the order.
fn endpoint(name: &str) -> EndpointSpec {
    let at = usize::from(name.as_bytes()[0] - b'a');
    let labels = [
        ("llm-d.ai/role", ROLES[at % 4]),
        ("topology.kubernetes.io/zone", ["x", "y"][at / 2 % 2]),
        ("revision", ["1", "2"][at / 4]),
    ];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    EndpointSpec { labels, ..spec(name) }
}

struct Run {
    host: Host,
    ids: BTreeMap<&'static str, EndpointId>,
    trace: Rng,
    log: String,
    open: Vec<Decision>,
}

impl Run {
    fn new(yaml: &str, seed: u64, names: &[&'static str]) -> Run {
        let config: EndpointPickerConfig = serde_saphyr::from_str(yaml).unwrap();
        let plan = Plan::build(&config, Experimental::Allowed).unwrap();
        let mut host = Host::new(plan.clone(), &[]);
        host.brain = Brain::new(plan, seed);
        let now = host.now;
        let add =
            |name: &&'static str| (*name, host.brain.add_endpoint(now, endpoint(name)).unwrap());
        let ids = names.iter().map(add).collect();
        Run { host, ids, trace: Rng::seeded(7), log: String::new(), open: Vec::new() }
    }

    fn any(&mut self) -> EndpointId {
        let at = self.trace.below(self.ids.len());
        *self.ids.values().nth(at).unwrap()
    }

    fn ask(&mut self) {
        let tokens = prompt(self.trace.below(6) as u32, 20 + self.trace.below(300));
        let session = self.trace.below(5).to_string();
        let revision = ["", "", "1", "2"][self.trace.below(4)];
        let slo = ["1", "500"][self.trace.below(2)];
        let headers =
            [("x-session-id", &*session), ("x-revision", revision), ("x-slo-ttft-ms", slo)];
        let media = [self.trace.below(4) as u64, 9];
        let items = self.trace.below(3);
        let priority = self.trace.below(3) as i32 - 1;
        let prompts = self.host.chains(&tokens, TokensKnown::Exact);
        let mut request = Request {
            id: &format!("r{}", self.log.len()),
            model: "model",
            prompts: &prompts,
            prompt_tokens: tokens.len() as u32,
            tokens_known: TokensKnown::Exact,
            media: &media[..items],
            priority,
            headers: &Headers(&headers),
            ..Request::default()
        };
        request.held = self.host.brain.hold(self.host.now, &request).map(|held| held.id);
        let decided = self.host.brain.decide(self.host.now, &request);
        match decided {
            Ok(decision) => {
                self.log += &serde_json::to_string(&decision.record).unwrap();
                self.open.push(decision);
            }
            Err(reject) => self.log += &reject.to_string(),
        }
        self.log.push('\n');
    }

    /// What comes of a request that is open: more of its answer, its end, another endpoint.
    fn go_on(&mut self) {
        let Some(last) = self.open.len().checked_sub(1) else { return };
        let at = self.trace.below(last + 1);
        let (now, ticket) = (self.host.now, self.open[at].ticket);
        let usage =
            ResponseEvent::Usage { prompt_tokens: 60, cached_tokens: None, completion_tokens: 5 };
        match self.trace.below(6) {
            0 | 1 => self.host.brain.on_response(now, ticket, ResponseEvent::FirstChunk),
            2 => self.host.brain.on_response(now, ticket, usage),
            3 => {
                let to = self.any();
                self.host.brain.redirect(now, ticket, to);
            }
            end => {
                let end = match end {
                    4 => ResponseEvent::End { status: [200, 500][self.trace.below(2)] },
                    _ => ResponseEvent::Aborted,
                };
                self.host.brain.on_response(now, ticket, end);
                self.open.swap_remove(at);
            }
        }
    }

    /// An endpoint leaves, and another of its name comes.
    fn replace(&mut self) {
        let name = NAMES[self.trace.below(NAMES.len())];
        self.host.brain.remove_endpoint(self.host.now, self.ids[name]);
        let id = self.host.brain.add_endpoint(self.host.now, endpoint(name)).unwrap();
        self.ids.insert(name, id);
    }

    fn steps(mut self, steps: usize) -> Run {
        for _ in 0..steps {
            self.host.pass(0.01);
            match self.trace.below(16) {
                0..=5 => self.ask(),
                6..=12 => self.go_on(),
                13 => {
                    let (id, waiting) = (self.any(), self.trace.below(4) as u32);
                    self.host.metrics(id, waiting, 0.3);
                }
                14 if self.trace.below(4) == 0 => self.replace(),
                _ => {
                    let (id, now) = (self.any(), self.host.now);
                    self.host.brain.on_endpoint_failed(now, id);
                }
            }
        }
        self
    }
}

fn plans() -> [(&'static str, String); 4] {
    let burst =
        DISAGG.replace("- type: p2p-source-producer\n", "- type: burst-prefix-cache-producer\n");
    [
        ("disagg", DISAGG.to_owned()),
        ("prefill-first", PREFILL_FIRST.to_owned()),
        ("guarded", GUARDED.to_owned()),
        ("burst", burst),
    ]
}

#[test]
fn whatever_happens_to_requests_and_endpoints_no_load_is_left() {
    for (name, yaml) in plans() {
        let mut run = Run::new(&yaml, 3, &NAMES).steps(600);
        assert!(run.log.lines().count() > 100, "{name}");
        let decisions: u64 = run.host.brain.counters().decisions.iter().sum();
        assert!(decisions > 60, "{name}: {decisions} decisions\n{}", run.log);
        // Half of what is open ends, the other half is forgotten by its host.
        for decision in run.open.iter().step_by(2) {
            run.host.brain.on_response(run.host.now, decision.ticket, ResponseEvent::Aborted);
        }
        run.host.pass(4_000.0);
        assert_eq!(run.host.brain.inflight_requests(), 0, "{name}");
        for (endpoint, id) in &run.ids {
            assert_eq!(run.host.brain.load(*id), Load::default(), "{name}: {endpoint}");
        }
    }
}

#[test]
fn every_plan_decides_by_seed_and_trace_alone() {
    for (name, yaml) in plans() {
        let log = |seed, names: &[&'static str]| Run::new(&yaml, seed, names).steps(200).log;
        let first = log(3, &NAMES);
        assert_eq!(first, log(3, &NAMES), "{name}");
        assert_ne!(first, log(4, &NAMES), "{name}");
        for seed in 0..3 {
            let mut names = NAMES;
            Rng::seeded(seed).shuffle(&mut names);
            assert_eq!(first, log(3, &names), "{name}: {names:?}");
        }
    }
}
