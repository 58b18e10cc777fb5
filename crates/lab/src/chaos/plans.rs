//! Under which plan does the brain run? Every kind of knowledge, and limits so small that they are
//! reached.

use kvroute_core::Rng;
use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_core::settings::Settings;

/// A plan and what to call it.
pub(super) struct Drawn {
    pub name: &'static str,
    pub plan: Plan,
}

const APPROXIMATE: &str = "\
plugins:
- type: approx-prefix-cache-producer
  parameters: {lruCapacityPerServer: 24}
- type: prefix-cache-scorer
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: lora-affinity-scorer
";

const EVERYTHING: &str = "\
plugins:
- type: approx-prefix-cache-producer
- type: precise-prefix-cache-producer
  parameters: {speculativeIndexing: true, speculativeTTL: 2s}
- type: inflight-load-producer
  parameters: {addEstimatedOutputTokens: true}
- type: prefix-cache-affinity-filter
- type: precise-prefix-cache-scorer
- type: prefix-cache-scorer
- type: no-hit-lru-scorer
- type: active-request-scorer
- type: token-load-scorer
- type: running-requests-size-scorer
- type: session-affinity-scorer
- type: lora-affinity-scorer
- type: weighted-random-picker
";

const BLIND: &str = "\
plugins:
- type: load-aware-scorer
- type: active-request-scorer
- type: random-picker
";

/// Plans, and how many runs get each, out of their sum.
const KINDS: [(&str, usize); 8] = [
    ("llm-d-weights", 3),
    ("least-cost", 4),
    ("precise", 4),
    ("precise-small", 6),
    ("everything", 3),
    ("approximate", 2),
    ("load-only", 1),
    ("round-robin", 1),
];

/// A plan at random.
pub(super) fn draw(rng: &mut Rng) -> Drawn {
    let sum = KINDS.iter().map(|(_, weight)| weight).sum();
    let mut at = rng.below(sum);
    let mut name = KINDS[0].0;
    for (kind, weight) in KINDS {
        name = kind;
        if at < weight {
            break;
        }
        at -= weight;
    }
    let mut config = config_of(name);
    config.kvroute.limits = settings(rng);
    if name.starts_with("precise") {
        config.kvroute.limits.speculative = Some(rng.below(2) == 0);
    }
    if name == "precise-small" {
        small(rng, &mut config.kvroute.limits);
    }
    let plan =
        Plan::build(&config, Experimental::Allowed).expect("the plans of this table are valid");
    Drawn { name, plan }
}

fn config_of(name: &str) -> EndpointPickerConfig {
    let text = match name {
        "approximate" => APPROXIMATE,
        "everything" => EVERYTHING,
        "load-only" => BLIND,
        "round-robin" => "plugins: [{type: kvroute-round-robin-picker}]\n",
        "least-cost" => return EndpointPickerConfig::least_cost(),
        _ => return EndpointPickerConfig::precise(),
    };
    kvroute_wire::config::parse(text, name).expect("the configurations of this file are valid")
}

fn any<T: Copy>(rng: &mut Rng, values: &[T]) -> T {
    values[rng.below(values.len())]
}

/// Waits as short as the runs are, and sometimes the defaults.
fn settings(rng: &mut Rng) -> Settings {
    Settings {
        inflight_age_max_s: any(rng, &[3, 60, 3_600]),
        first_byte_timeout_s: any(rng, &[15, 600]),
        response_idle_timeout_s: any(rng, &[10, 300]),
        retries_max: any(rng, &[0, 1, 2, 5]),
        replay_cooldown_ms: any(rng, &[0, 300, 5_000]),
        replay_timeout_ms: any(rng, &[400, 30_000]),
        stream_held_batches_max: any(rng, &[1, 1, 3, 4_096, 4_096]),
        speculative_ttl_ms: any(rng, &[150, 30_000]),
        speculative_grace_ms: any(rng, &[0, 250]),
        drift_evidence_max: any(rng, &[2, 6]),
        drift_agreements_min: any(rng, &[2, 5]),
        scrape_interval_ms: any(rng, &[250, 600]),
        ..Settings::default()
    }
}

/// Limits that are reached.
fn small(rng: &mut Rng, settings: &mut Settings) {
    settings.index_bytes_max = any(rng, &[21, 25, 33, 53, 1 << 20]) << 10;
    settings.history_blocks_per_endpoint_max = any(rng, &[0, 6, 40, 31_250]);
    settings.pending_blocks_per_endpoint_max = any(rng, &[0, 2, 9, 8_192]);
    settings.speculations_max = any(rng, &[0, 2, 8, 65_536]);
    settings.inflight_requests_max = any(rng, &[4, 12, 16_384]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_can_be_drawn() {
        let mut rng = Rng::seeded(1);
        let mut names: Vec<&str> = (0..300).map(|_| draw(&mut rng).name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KINDS.len());
    }
}
