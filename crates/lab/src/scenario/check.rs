//! Does a scenario make sense? What its types alone cannot say: which fields a kind needs and
//! refuses, and which values are possible.

use kvroute_core::plugin::nearest_first;

use super::{ArrivalKind, FaultKind, FaultSpec, FleetSpec, LoadSpec, ProfileSpec, PromptOrder};
use super::{Published, Scenario, StageSpec, WorkloadKind, WorkloadSpec};
use crate::model::{Profile, ProfileError};

/// Most engines of a fleet.
pub const ENGINES_MAX: u64 = 4096;

/// Most stages of a load.
pub const STAGES_MAX: usize = 1000;

/// Most faults of a scenario.
pub const FAULTS_MAX: usize = 10_000;

/// Most clients of a closed loop.
pub const CLIENTS_MAX: u64 = 65_536;

/// Most turns of a session.
pub const TURNS_MAX: u64 = 1000;

/// Longest time in a scenario: 115 days.
pub const SECONDS_MAX: f64 = 1e7;

/// Highest rate of a stage, requests per second.
pub const RATE_MAX: f64 = 1e6;

const SIZE_MAX: u64 = 10_000_000;

/// Something that makes no sense, and the path to it.
#[derive(Debug)]
pub(super) struct Fault {
    /// As in `load.stages[2].rate`.
    pub path: String,
    /// What is wrong and what is expected.
    pub message: String,
}

type Check = Result<(), Fault>;

fn fault(path: &str, message: impl Into<String>) -> Check {
    Err(Fault { path: path.to_owned(), message: message.into() })
}

/// The first thing that makes no sense.
pub(super) fn check(scenario: &Scenario) -> Check {
    if scenario.name.trim().is_empty() {
        return fault("name", "is empty; reports and folders are named after it");
    }
    fleet(&scenario.fleet)?;
    workload(&scenario.workload)?;
    kv_cache(&scenario.fleet, &scenario.workload)?;
    load(&scenario.load, &scenario.workload)?;
    client(scenario)?;
    if scenario.faults.len() > FAULTS_MAX {
        return fault("faults", format!("more than {FAULTS_MAX}"));
    }
    for (at, spec) in scenario.faults.iter().enumerate() {
        one_fault(&format!("faults[{at}]"), spec, scenario.fleet.engines)?;
    }
    scenario.published.iter().enumerate().try_for_each(|(at, figures)| published(at, figures))
}

fn count(path: &str, value: u64, max: u64) -> Check {
    match value {
        0 => fault(path, "is 0; it must be at least 1"),
        value if value > max => fault(path, format!("is {value}; the limit is {max}")),
        _ => Ok(()),
    }
}

fn above_zero(path: &str, value: f64, max: f64) -> Check {
    if value > 0.0 && value <= max {
        return Ok(());
    }
    fault(path, format!("is {value}; it must be above 0 and at most {max}"))
}

fn not_negative(path: &str, value: f64, max: f64) -> Check {
    if (0.0..=max).contains(&value) {
        return Ok(());
    }
    fault(path, format!("is {value}; it must be from 0 to {max}"))
}

fn fleet(fleet: &FleetSpec) -> Check {
    count("fleet.engines", fleet.engines.into(), ENGINES_MAX)?;
    profile(&fleet.profile)?;
    count("fleet.block_size", fleet.block_size.into(), 65_536)?;
    count("fleet.max_batched_tokens", fleet.max_batched_tokens.into(), SIZE_MAX)?;
    count("fleet.max_seqs", fleet.max_seqs.into(), SIZE_MAX)?;
    count("fleet.kv_tokens", fleet.kv_tokens, u64::from(u32::MAX))?;
    above_zero("fleet.scrape_interval_s", fleet.scrape_interval_s, SECONDS_MAX)?;
    not_negative("fleet.event_delay_s", fleet.event_delay_s, SECONDS_MAX)?;
    not_negative("fleet.stats_delay_s", fleet.stats_delay_s, SECONDS_MAX)
}

fn profile(profile: &ProfileSpec) -> Check {
    match profile {
        ProfileSpec::Named(name) => {
            let names = || Profile::BUILT_IN.iter().map(|(name, _)| *name);
            if names().any(|known| known == name) {
                return Ok(());
            }
            let near = nearest_first(name, names()).join(", ");
            let message = format!(
                "no profile `{name}` is built in; there are, nearest first: {near}. The constants \
                 of other hardware can stand here instead of a name"
            );
            fault("fleet.profile", message)
        }
        ProfileSpec::Inline(profile) => {
            // Reading what was written runs the checks of profiles on one that came from YAML.
            let text = serde_json::to_string(profile).expect("a profile is a flat record");
            match Profile::parse(&text, "fleet.profile") {
                Ok(_) => Ok(()),
                Err(ProfileError::Constant { field, value, .. }) => fault(
                    &format!("fleet.profile.{field}"),
                    format!(
                        "is {value}; it must be finite and not negative (step_base_s: above 0)"
                    ),
                ),
                Err(_) => fault("fleet.profile", "a constant is not a finite number"),
            }
        }
    }
}

/// Every field that depends on the kind, and whether it is there.
fn workload_fields(spec: &WorkloadSpec) -> [(&'static str, bool); 11] {
    [
        ("groups", spec.groups.is_some()),
        ("users", spec.users.is_some()),
        ("prefix_tokens", spec.prefix_tokens.is_some()),
        ("question_tokens", spec.question_tokens.is_some()),
        ("output_tokens", spec.output_tokens.is_some()),
        ("order", spec.order.is_some()),
        ("zipf", spec.zipf.is_some()),
        ("turns", spec.turns.is_some()),
        ("think_s", spec.think_s.is_some()),
        ("file", spec.file.is_some()),
        ("max_tokens_sent", spec.max_tokens_sent.is_some()),
    ]
}

/// Fields that a kind needs, and fields that it may have.
fn workload_rules(kind: WorkloadKind) -> (&'static [&'static str], &'static [&'static str]) {
    match kind {
        WorkloadKind::SharedPrefix => (
            &["groups", "users", "prefix_tokens", "question_tokens", "output_tokens"],
            &["order", "zipf", "max_tokens_sent"],
        ),
        WorkloadKind::Agentic => (
            &["groups", "prefix_tokens", "question_tokens", "output_tokens", "turns", "think_s"],
            &["zipf", "max_tokens_sent"],
        ),
        WorkloadKind::Trace => (&["file"], &["output_tokens", "max_tokens_sent"]),
    }
}

fn kind_name<T: serde::Serialize>(kind: T) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// Are the fields that `kind` needs there, and no others? `always` are for every kind.
fn fields(
    path: &str,
    kind: &str,
    present: &[(&str, bool)],
    rules: (&[&str], &[&str]),
    always: &[&str],
) -> Check {
    let (needed, possible) = rules;
    for (field, there) in present {
        if needed.contains(field) && !there {
            return fault(&format!("{path}.{field}"), format!("is missing; `{kind}` needs it"));
        }
        if *there && !needed.contains(field) && !possible.contains(field) {
            let valid = [needed, possible, always].concat().join(", ");
            let message = format!("is not for `{kind}`; its fields are: {valid}");
            return fault(&format!("{path}.{field}"), message);
        }
    }
    Ok(())
}

fn workload(spec: &WorkloadSpec) -> Check {
    let always = ["counted_output_ratio", "bytes_per_token"];
    let rules = workload_rules(spec.kind);
    fields("workload", &kind_name(spec.kind), &workload_fields(spec), rules, &always)?;
    for (field, value, max) in [
        ("groups", spec.groups, SIZE_MAX),
        ("users", spec.users, SIZE_MAX),
        ("output_tokens", spec.output_tokens, SIZE_MAX),
        ("turns", spec.turns, TURNS_MAX),
        ("question_tokens", spec.question_tokens, SIZE_MAX),
    ] {
        value.map_or(Ok(()), |v| count(&format!("workload.{field}"), v.into(), max))?;
    }
    for (field, value, max) in [
        ("prefix_tokens", spec.prefix_tokens.map(f64::from), SIZE_MAX as f64),
        ("zipf", spec.zipf, 100.0),
        ("think_s", spec.think_s, SECONDS_MAX),
    ] {
        value.map_or(Ok(()), |v| not_negative(&format!("workload.{field}"), v, max))?;
    }
    for (field, value, max) in [
        ("counted_output_ratio", spec.counted_output_ratio, 100.0),
        ("bytes_per_token", spec.bytes_per_token, 1000.0),
    ] {
        value.map_or(Ok(()), |v| above_zero(&format!("workload.{field}"), v, max))?;
    }
    let random = spec.order == Some(PromptOrder::Random);
    if spec.kind == WorkloadKind::SharedPrefix
        && spec.zipf.is_some_and(|zipf| zipf > 0.0)
        && !random
    {
        return fault("workload.zipf", "needs `order: random`: a cycle visits all prompts equally");
    }
    if spec.file.as_deref() == Some("") {
        return fault("workload.file", "is empty; it must be a path, relative to the scenario");
    }
    Ok(())
}

/// Can the longest request be served at all? Traces are checked when they are read.
fn kv_cache(fleet: &FleetSpec, spec: &WorkloadSpec) -> Check {
    let size = |field: Option<u32>| u64::from(field.unwrap_or(0));
    let turn = size(spec.question_tokens) + size(spec.output_tokens);
    let turns = u64::from(spec.turns.unwrap_or(1));
    let longest = size(spec.prefix_tokens) + turns * turn;
    let room = fleet.request_tokens_max();
    if longest <= room && room > 0 {
        return Ok(());
    }
    let message = format!(
        "an engine has room for {room} tokens (whole blocks of {}, one of which stays empty), the \
         longest request has {longest} with its answer",
        fleet.block_size
    );
    fault("fleet.kv_tokens", message)
}

fn load(load: &LoadSpec, workload: &WorkloadSpec) -> Check {
    if load.arrivals == ArrivalKind::Trace {
        if workload.kind != WorkloadKind::Trace {
            let kind = kind_name(workload.kind);
            let message = format!("`trace` takes its times from a file; the workload is `{kind}`");
            return fault("load.arrivals", message);
        }
        return match load.stages.is_empty() {
            true => Ok(()),
            false => fault("load.stages", "is not for `arrivals: trace`, which has its own times"),
        };
    }
    if load.stages.is_empty() {
        return fault("load.stages", "is missing or empty; at least one stage is needed");
    }
    if load.stages.len() > STAGES_MAX {
        return fault("load.stages", format!("more than {STAGES_MAX}"));
    }
    if load.arrivals == ArrivalKind::Closed && !load.drain_between_stages && load.stages.len() > 1 {
        let message = "is false, but the clients of a closed loop are busy with one stage until it \
                       is over; it must be true, or there must be one stage";
        return fault("load.drain_between_stages", message);
    }
    let mut stages = load.stages.iter().enumerate();
    stages.try_for_each(|(at, spec)| stage(&format!("load.stages[{at}]"), spec, load.arrivals))
}

fn stage(path: &str, spec: &StageSpec, arrivals: ArrivalKind) -> Check {
    above_zero(&format!("{path}.duration_s"), spec.duration_s, SECONDS_MAX)?;
    let rate_path = format!("{path}.rate");
    match (arrivals, spec.rate) {
        (ArrivalKind::Closed, None) => Ok(()),
        (ArrivalKind::Closed, Some(_)) => fault(
            &rate_path,
            "is not for `arrivals: closed`, in which client.in_flight_max clients wait for answers",
        ),
        (_, None) => fault(&rate_path, "is missing; only a closed loop has none"),
        (_, Some(rate)) => {
            above_zero(&rate_path, rate, RATE_MAX)?;
            if rate * spec.duration_s < 1.0 {
                return fault(&rate_path, "gives no request within the stage's duration_s");
            }
            Ok(())
        }
    }
}

fn client(scenario: &Scenario) -> Check {
    let client = &scenario.client;
    let clients = u64::from(client.in_flight_max);
    count("client.in_flight_max", clients, u64::from(u32::MAX))?;
    if scenario.load.arrivals == ArrivalKind::Closed && clients > CLIENTS_MAX {
        let message = format!(
            "is {clients}; a closed loop has so many clients, and the limit is {CLIENTS_MAX}"
        );
        return fault("client.in_flight_max", message);
    }
    not_negative("client.overhead_before_s", client.overhead_before_s, SECONDS_MAX)?;
    not_negative("client.overhead_after_s", client.overhead_after_s, SECONDS_MAX)?;
    not_negative("client.quantum_s", client.quantum_s, SECONDS_MAX)
}

fn one_fault(path: &str, spec: &FaultSpec, engines: u16) -> Check {
    let needed: &[&str] = match spec.kind {
        FaultKind::Crash | FaultKind::MetricsPartition => &[],
        FaultKind::EventLoss | FaultKind::EventDuplication => &["share"],
        FaultKind::EventDelay => &["delay_s"],
        FaultKind::SlowEngine => &["factor"],
    };
    let present = [
        ("share", spec.share.is_some()),
        ("delay_s", spec.delay_s.is_some()),
        ("factor", spec.factor.is_some()),
    ];
    fields(path, &kind_name(spec.kind), &present, (needed, &[]), &["engine", "at_s", "for_s"])?;
    if let Some(engine) = spec.engine.filter(|engine| *engine >= engines) {
        let last = engines.saturating_sub(1);
        let message = format!("is {engine}; the engines of the fleet are 0 to {last}");
        return fault(&format!("{path}.engine"), message);
    }
    not_negative(&format!("{path}.at_s"), spec.at_s, SECONDS_MAX)?;
    above_zero(&format!("{path}.for_s"), spec.for_s, SECONDS_MAX)?;
    for (field, value, max) in [
        ("share", spec.share, 1.0),
        ("delay_s", spec.delay_s, SECONDS_MAX),
        ("factor", spec.factor, 1e6),
    ] {
        value.map_or(Ok(()), |v| above_zero(&format!("{path}.{field}"), v, max))?;
    }
    Ok(())
}

fn published(at: usize, published: &Published) -> Check {
    let path = format!("published[{at}]");
    if published.name.is_empty() {
        return fault(&format!("{path}.name"), "is empty; it is the name of a configuration");
    }
    for (stage, figures) in published.stages.iter().enumerate() {
        above_zero(&format!("{path}.stages[{stage}].rate"), figures.rate, RATE_MAX)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
