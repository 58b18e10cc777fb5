//! Which profiles run, who is told, and who is charged: profile handlers, deciders, admission.

use super::*;
use crate::config::EndpointPickerConfig;
use crate::load::Load;
use crate::plan::Experimental;

/// Endpoints `d0`, `d1` decode, `p0`, `p1` prefill, `x0` encodes.
fn fleet(yaml: &str) -> Host {
    let config: EndpointPickerConfig = serde_saphyr::from_str(yaml).unwrap();
    let plan = Plan::build(&config, Experimental::Allowed).unwrap();
    let mut host = Host::new(plan, &[]);
    for (name, role) in
        [("d0", "decode"), ("d1", "decode"), ("p0", "prefill"), ("p1", "prefill"), ("x0", "encode")]
    {
        let labels = [("llm-d.ai/role".to_owned(), role.to_owned())].into();
        let id = host.brain.add_endpoint(Time::ZERO, EndpointSpec { labels, ..spec(name) });
        host.ids.push(id.unwrap());
    }
    for id in host.ids.clone() {
        host.metrics(id, 0, 0.0);
    }
    host
}

fn disagg(parameters: &str, deciders: &str) -> String {
    format!(
        "plugins:
- {{type: disagg-profile-handler, parameters: {parameters}}}
{deciders}
- type: decode-filter
- type: prefill-filter
- type: encode-filter
- type: queue-scorer
- type: prefix-cache-scorer
schedulingProfiles:
- {{name: encode, plugins: [{{pluginRef: encode-filter}}]}}
- name: prefill
  plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: queue-scorer}}]
- name: decode
  plugins: [{{pluginRef: decode-filter}}, {{pluginRef: queue-scorer}},
    {{pluginRef: prefix-cache-scorer, weight: 3}}]
"
    )
}

const BOTH: &str = "- type: always-disagg-pd-decider\n- type: always-disagg-multimodal-decider";

fn always() -> String {
    let parameters = "{deciders: {prefill: always-disagg-pd-decider, \
                      encode: always-disagg-multimodal-decider}}";
    disagg(parameters, BOTH)
}

fn told<'a>(decision: &'a Decision, name: &str) -> Option<&'a str> {
    let mut headers = decision.request_headers.iter();
    headers.find(|header| header.name == name).map(|header| header.value.as_str())
}

#[test]
fn decode_answers_and_is_told_who_prefills_and_who_encodes() {
    let mut host = fleet(&always());
    let ids = host.ids.clone();
    host.metrics(ids[1], 5, 0.0);
    host.metrics(ids[2], 5, 0.0);
    let plain = host.ask(&prompt(1, 300));
    assert_eq!(plain.endpoint, ids[0]);
    assert_eq!(told(&plain, "x-prefiller-host-port"), Some("p1:8000"));
    assert_eq!(told(&plain, "x-encoder-hosts-ports"), None);
    let record = &plain.record;
    assert_eq!((record.profile.as_str(), record.endpoint.as_str()), ("decode", "d0"));
    let steps: Vec<_> = record.others.iter().map(|o| (o.step, o.profile.as_str())).collect();
    assert_eq!(steps, [("prefill", "prefill")]);
    assert_eq!(record.others[0].endpoint.as_ref().unwrap().as_str(), "p1");
    assert_eq!(record.others[0].removed.len(), 3);
    let image = host.try_ask(&prompt(2, 300), |request| request.media = &[7]).unwrap();
    assert_eq!(told(&image, "x-encoder-hosts-ports"), Some("x0:8000"));
    let steps: Vec<_> = image.record.others.iter().map(|other| other.step).collect();
    assert_eq!(steps, ["encode", "prefill"]);
}

#[test]
fn a_prefill_endpoint_is_charged_until_the_answer_starts() {
    let mut host = fleet(&always());
    let [decode, prefill] = [host.ids[0], host.ids[3]];
    host.metrics(host.ids[1], 5, 0.0);
    host.metrics(host.ids[2], 5, 0.0);
    for end in [ResponseEvent::FirstChunk, ResponseEvent::Aborted] {
        let tokens = prompt(host.requests, 300);
        let decision = host.ask(&tokens);
        assert_eq!(host.brain.load(prefill), Load { requests: 1, tokens: 300 });
        assert_eq!(host.brain.load(decode).requests, 1);
        host.brain.on_response(host.now, decision.ticket, end);
        assert_eq!(host.brain.load(prefill), Load::default());
        host.brain.on_response(host.now, decision.ticket, ResponseEvent::End { status: 200 });
        assert_eq!(host.brain.load(decode), Load::default());
        assert_eq!(host.brain.load(prefill), Load::default());
    }
}

#[test]
fn a_step_that_finds_nobody_is_left_to_the_decode_endpoint() {
    let mut host = fleet(&always());
    for at in [2, 3, 4] {
        host.brain.remove_endpoint(host.now, host.ids[at]);
    }
    let decision = host.try_ask(&prompt(1, 300), |request| request.media = &[7]).unwrap();
    assert_eq!(decision.request_headers, []);
    let failed = decision.record.others.iter().map(|other| other.failed.as_deref());
    assert!(failed.clone().all(|why| why.is_some_and(|why| why.contains("filter"))), "{failed:?}");
    for at in [0, 1] {
        host.brain.remove_endpoint(host.now, host.ids[at]);
    }
    let labels = [("llm-d.ai/role".to_owned(), "prefill".to_owned())].into();
    host.brain.add_endpoint(Time::ZERO, EndpointSpec { labels, ..spec("p2") }).unwrap();
    let reject = host.try_ask(&prompt(1, 300), |_| {}).unwrap_err();
    assert!(matches!(reject, Reject::Saturated { .. }), "{reject}");
}

#[test]
fn what_is_cached_at_the_decode_endpoint_is_not_prefilled_elsewhere() {
    let by = "- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 64}}";
    let mut host = fleet(&disagg("{deciders: {prefill: prefix-based-pd-decider}}", by));
    let tokens = prompt(1, 640);
    let first = host.ask(&tokens);
    assert!(told(&first, "x-prefiller-host-port").is_some());
    let again = host.ask(&tokens);
    assert_eq!(again.endpoint, first.endpoint);
    assert_eq!(told(&again, "x-prefiller-host-port"), None);
    assert_eq!(again.record.others, []);
}

#[test]
fn prefill_first_prefills_always() {
    let mut host = fleet(&disagg("{stageOrder: prefill-first}", ""));
    let decision = host.ask(&prompt(1, 20));
    assert!(told(&decision, "x-prefiller-host-port").is_some());
    assert_eq!(decision.record.profile.as_str(), "decode");
}

#[test]
fn a_header_names_the_profile() {
    let yaml = "
plugins: [{type: header-profile-handler}, {type: decode-filter}, {type: prefill-filter}]
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";
    let mut host = fleet(yaml);
    assert_eq!(host.brain.plan().headers, ["epp-profile", "prefer"]);
    let mut profile_of = |value: Option<&str>| {
        let headers: Vec<(&str, &str)> = value.map(|v| ("EPP-Profile", v)).into_iter().collect();
        let headers = Headers(&headers);
        host.requests += 1;
        let request = Request {
            id: "r",
            model: "model",
            prompt_tokens: 5,
            headers: &headers,
            ..Request::default()
        };
        host.brain.decide(host.now, &request).map(|decision| decision.record.profile.to_string())
    };
    assert_eq!(profile_of(None).unwrap(), "decode");
    assert_eq!(profile_of(Some("prefill")).unwrap(), "prefill");
    let unknown = profile_of(Some("encode")).unwrap_err();
    assert_eq!((unknown.status(), unknown.to_string().contains("prefill, decode")), (400, true));
}

#[test]
fn one_profile_runs_whatever_the_header_says_and_a_missing_default_refuses_alone() {
    let one = "
plugins: [{type: header-profile-handler, parameters: {headerName: '', defaultProfile: ''}},
  {type: queue-scorer}]
schedulingProfiles: [{name: only, plugins: [{pluginRef: queue-scorer}]}]
";
    let ask = |host: &mut Host, value: Option<&str>| {
        let headers: Vec<(&str, &str)> = value.map(|v| ("epp-profile", v)).into_iter().collect();
        let headers = Headers(&headers);
        let request = Request {
            id: "r",
            model: "model",
            prompt_tokens: 5,
            headers: &headers,
            ..Request::default()
        };
        host.brain.decide(host.now, &request).map(|decision| decision.record.profile.to_string())
    };
    let mut host = fleet(one);
    assert_eq!(ask(&mut host, None).unwrap(), "only");
    assert_eq!(ask(&mut host, Some("prefill")).unwrap(), "only");
    let two = one.replace("plugins: [{pluginRef: queue-scorer}]}", "plugins: []}, {name: other}");
    let mut host = fleet(&two);
    assert_eq!(ask(&mut host, Some(" other ")).unwrap(), "other");
    assert_eq!(ask(&mut host, None).unwrap_err().status(), 400);
    let notes = &host.brain.plan().notes;
    assert!(notes.iter().any(|note| note.text.contains("no profile 'decode'")), "{notes:?}");
}

/// Encoders share the work; one endpoint prefills, the one that is charged for it.
#[test]
fn further_choices_are_told_of_encoders_alone() {
    let picker = "- {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}";
    let mut host = fleet(
        &always().replace("- type: decode-filter", &format!("{picker}\n- type: decode-filter")),
    );
    let labels = [("llm-d.ai/role".to_owned(), "encode".to_owned())].into();
    host.brain.add_endpoint(Time::ZERO, EndpointSpec { labels, ..spec("x1") }).unwrap();
    let image = host.try_ask(&prompt(2, 300), |request| request.media = &[7]).unwrap();
    let count = |name| told(&image, name).unwrap().split(',').count();
    assert_eq!((count("x-encoder-hosts-ports"), count("x-prefiller-host-port")), (2, 1));
}

/// A coordinator asks first whether a decode endpoint has the prompt.
#[test]
fn a_request_that_prefers_a_cached_answer_is_refused_without_one() {
    let mut host = fleet(&always());
    let tokens = prompt(1, 300);
    let prefer = |host: &mut Host, value: &str| {
        let headers = [("prefer", value)];
        let prompts = host.chains(&tokens, TokensKnown::Exact);
        let request = Request {
            id: "r",
            model: "model",
            prompts: &prompts,
            prompt_tokens: 300,
            tokens_known: TokensKnown::Exact,
            headers: &Headers(&headers),
            ..Request::default()
        };
        host.brain.decide(host.now, &request).map(|decision| decision.endpoint)
    };
    let refused = prefer(&mut host, "wait=10, If-Available").unwrap_err();
    assert_eq!((refused.status(), host.brain.inflight_requests()), (412, 0));
    let served = prefer(&mut host, "wait=10").unwrap();
    assert_eq!(prefer(&mut host, "if-available"), Ok(served));
    assert_eq!(host.brain.counters().rejected_not_cached, 1);
}

/// Revisions may not understand each other's cache.
#[test]
fn blocks_are_not_fetched_from_endpoints_that_screeners_removed() {
    let yaml = "
plugins:
- type: p2p-source-producer
- type: disaggregatedset-rollout-screener
  parameters:
    scope: {labelSelector: llm-d.ai/role}
    headerSelectors: [{name: role, headerName: x-role, labelKey: llm-d.ai/role, mode: strict}]
    revisionGating: {mode: disabled}
- type: queue-scorer
schedulingProfiles: [{name: all, plugins: [{pluginRef: queue-scorer}]}]
";
    let mut host = fleet(yaml);
    for at in [1, 2, 4] {
        host.brain.remove_endpoint(host.now, host.ids[at]);
    }
    host.metrics(host.ids[3], 5, 0.0);
    let tokens = prompt(1, 300);
    let mut ask = |role: &str| {
        let headers = [("x-role", role)];
        let prompts = host.chains(&tokens, TokensKnown::Exact);
        let request = Request {
            id: "r",
            model: "model",
            prompts: &prompts,
            prompt_tokens: 300,
            tokens_known: TokensKnown::Exact,
            headers: &Headers(&headers),
            ..Request::default()
        };
        let decision = host.brain.explain(host.now, &request, Some(1)).unwrap();
        if role == "prefill" {
            host.brain.decide(host.now, &request).unwrap();
        }
        let source = decision.request_headers.first().map(|header| header.value.clone());
        (decision.record.endpoint.to_string(), source)
    };
    assert_eq!(ask("prefill"), ("p1".to_owned(), None));
    assert_eq!(ask(""), ("d0".to_owned(), Some("p1:8000".to_owned())));
    assert_eq!(ask("decode"), ("d0".to_owned(), None));
}

#[test]
fn ranks_of_one_host_share_a_port() {
    let yaml = "plugins: [{type: data-parallel-profile-handler, parameters: {primaryPort: 9000}},\
                {type: queue-scorer}]";
    let mut host = fleet(yaml);
    let decision = host.ask(&prompt(1, 20));
    assert_eq!(decision.primary_port, Some(9000));
    let own = host.brain.fleet().get(decision.endpoint).unwrap().address.to_string();
    assert_eq!(told(&decision, "x-data-parallel-host-port"), Some(own.as_str()));
}

#[test]
fn a_full_fleet_refuses_low_priorities_alone() {
    let mut host = fleet("plugins: [{type: queue-scorer}]");
    let ask = |host: &mut Host, priority| {
        host.try_ask(&prompt(1, 20), |request| request.priority = priority).map(|_| ())
    };
    assert_eq!(ask(&mut host, -1), Ok(()));
    for id in host.ids.clone() {
        host.metrics(id, 5, 0.0);
    }
    assert_eq!(ask(&mut host, -1), Err(Reject::Shed));
    assert_eq!(ask(&mut host, 0), Ok(()));
    assert_eq!(host.brain.counters().rejected_shed, 1);
}

/// Endpoints that remain when the failing ones are passed over may all be of another role.
#[test]
fn the_only_endpoint_of_a_role_is_tried_although_it_failed() {
    let mut host = fleet(&always());
    let [d0, d1] = [host.ids[0], host.ids[1]];
    host.brain.remove_endpoint(host.now, d1);
    host.brain.on_endpoint_failed(host.now, d0);
    let decision = host.ask(&prompt(1, 300));
    assert_eq!(decision.endpoint, d0);
    assert_eq!(decision.record.candidates[0].removed_by, None);
    assert!(decision.record.filters.iter().all(|filter| !filter.name.as_str().contains("failing")));
    host.brain.remove_endpoint(host.now, d0);
    assert!(matches!(host.try_ask(&prompt(2, 300), |_| {}), Err(Reject::Saturated { .. })));
}

/// Admitters judge by the endpoints that the request may go to.
#[test]
fn admitters_do_not_count_endpoints_that_screeners_removed() {
    let yaml = "
plugins:
- {type: probabilistic-admitter, parameters: {power: 1, k: 1000}}
- type: disaggregatedset-rollout-screener
  parameters:
    scope: {labelSelector: llm-d.ai/role}
    headerSelectors: [{name: role, headerName: x-role, labelKey: llm-d.ai/role, mode: strict}]
    revisionGating: {mode: disabled}
- type: queue-scorer
- {type: concurrency-detector}
flowControl: {saturationDetector: {pluginRef: concurrency-detector}}
schedulingProfiles: [{name: all, plugins: [{pluginRef: queue-scorer}]}]
";
    let mut host = fleet(yaml);
    host.metrics(host.ids[2], 50, 1.0);
    let ask = |host: &mut Host, role: &str| {
        let headers = [("x-role", role)];
        let headers = Headers(&headers);
        let request = Request {
            id: "r",
            model: "model",
            prompt_tokens: 5,
            priority: -1,
            headers: &headers,
            ..Request::default()
        };
        host.brain.decide(host.now, &request).map(|_| ())
    };
    assert_eq!(ask(&mut host, "decode"), Ok(()));
    assert!(matches!(ask(&mut host, "prefill"), Err(Reject::NotAdmitted { .. })));
}

#[test]
fn requests_of_one_window_go_together_and_others_need_not_wait() {
    let yaml = "
plugins:
- type: burst-prefix-cache-producer
- type: prefix-cache-scorer
  parameters: {prefixMatchInfoProducerName: burst-prefix-cache-producer}
";
    let mut host = fleet(yaml);
    let hold = |host: &mut Host, tokens: &[u32]| {
        let prompts = host.chains(tokens, TokensKnown::Exact);
        let request = Request {
            id: "r",
            model: "model",
            prompts: &prompts,
            prompt_tokens: tokens.len() as u32,
            tokens_known: TokensKnown::Exact,
            ..Request::default()
        };
        host.brain.hold(host.now, &request)
    };
    assert_eq!(hold(&mut host, &[]), None);
    let held: Vec<_> = (0..4).map(|_| hold(&mut host, &prompt(1, 200)).unwrap()).collect();
    assert!(held.iter().all(|one| one.until == host.now + Duration::from_millis(100)));
    host.pass(0.1);
    let mut chosen = Vec::new();
    for one in held {
        let decided = host.try_ask(&prompt(1, 200), |request| request.held = Some(one.id));
        let decision = decided.unwrap();
        assert_eq!(decision.record.reason, Reason::BurstPlaced);
        chosen.push(decision.endpoint);
    }
    assert!(chosen.iter().all(|id| *id == chosen[0]), "{chosen:?}");
    assert_eq!(host.brain.counters().held, 4);
}

#[test]
fn an_explanation_changes_nothing() {
    let mut host = fleet(&always());
    let tokens = prompt(1, 300);
    let prompts = host.chains(&tokens, TokensKnown::Exact);
    let request = Request {
        id: "r1",
        model: "model",
        prompts: &prompts,
        prompt_tokens: 300,
        tokens_known: TokensKnown::Exact,
        ..Request::default()
    };
    let seed = host.ask(&tokens).record.seed;
    let before = (*host.brain.counters(), host.brain.inflight_requests());
    let explained = host.brain.explain(host.now, &request, Some(seed)).unwrap();
    let again = host.brain.explain(host.now, &request, Some(seed)).unwrap();
    assert_eq!(explained, again);
    assert_eq!((*host.brain.counters(), host.brain.inflight_requests()), before);
}

#[test]
fn images_go_back_to_where_they_were_encoded_and_sessions_to_their_endpoint() {
    let yaml = "
plugins:
- type: mm-embeddings-cache-scorer
- {type: session-id-producer, name: cookie, parameters: {cookieName: sid}}
- {type: session-affinity-scorer, parameters: {strategy: session_id, sessionIdConfig:
    {sources: [{attribute: SessionID, producer: cookie}]}}}
";
    let mut host = fleet(yaml);
    let image = |host: &mut Host, key: u64| {
        host.try_ask(&prompt(9, 20), |request| request.media = &[7, 8][..1 + key as usize]).unwrap()
    };
    let first = image(&mut host, 1);
    for _ in 0..8 {
        assert_eq!(image(&mut host, 0).endpoint, first.endpoint);
    }
    let headers = Headers(&[("cookie", "a=b; sid=42")]);
    let session = |host: &mut Host| {
        let request = Request {
            id: "r",
            model: "model",
            prompt_tokens: 5,
            headers: &headers,
            ..Request::default()
        };
        host.brain.decide(host.now, &request).unwrap().endpoint
    };
    let pinned = session(&mut host);
    assert!((0..8).all(|_| session(&mut host) == pinned));
    assert!(host.brain.plan().headers.contains(&"cookie".to_owned()));
}
