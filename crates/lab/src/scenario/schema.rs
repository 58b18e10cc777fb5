//! The JSON Schema of a scenario file, for editors; [`super::check`] knows more than it says.

use serde_json::{Map, Value, json};

use super::check::{CLIENTS_MAX, ENGINES_MAX, FAULTS_MAX, STAGES_MAX, TURNS_MAX};
use crate::model::Profile;

/// The schema, draft 2020-12.
pub fn schema() -> Value {
    let mut root = record(
        &["name", "fleet", "workload", "load"],
        json!({
            "name": { "type": "string", "minLength": 1, "description": "Shown in reports." },
            "description": { "type": "string", "description": "What it shows, in a sentence." },
            "fleet": reference("fleet", "The engines: equal ones."),
            "workload": reference("workload", "What is asked."),
            "load": reference("load", "When it is asked."),
            "client": reference("client", "Who asks."),
            "faults": list("fault", FAULTS_MAX, "What goes wrong, and when."),
            "published": list(
                "published",
                FAULTS_MAX,
                "Figures that somebody measured on real hardware, to be shown beside.",
            ),
        }),
    );
    root["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    root["title"] = json!("kvroute scenario");
    root["description"] = json!("What is simulated or measured. Seconds and tokens throughout.");
    root["$defs"] = json!({
        "fleet": fleet(),
        "profile": profile(),
        "workload": workload(),
        "load": load(),
        "stage": stage(),
        "client": client(),
        "fault": fault(),
        "published": published(),
        "publishedStage": published_stage(),
        "figures": record(&[], figures()),
    });
    root
}

/// An object with these fields and no others.
fn record(required: &[&str], properties: Value) -> Value {
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    })
}

fn reference(name: &str, description: &str) -> Value {
    json!({ "$ref": format!("#/$defs/{name}"), "description": description })
}

fn list(name: &str, most: usize, description: &str) -> Value {
    let items = json!({ "$ref": format!("#/$defs/{name}") });
    json!({ "type": "array", "maxItems": most, "items": items, "description": description })
}

fn count(most: u64, description: &str) -> Value {
    json!({ "type": "integer", "minimum": 1, "maximum": most, "description": description })
}

fn not_negative(description: &str) -> Value {
    json!({ "type": "number", "minimum": 0, "description": description })
}

fn above_zero(description: &str) -> Value {
    json!({ "type": "number", "exclusiveMinimum": 0, "description": description })
}

fn one_of(names: &[&str], description: &str) -> Value {
    json!({ "enum": names, "description": description })
}

fn with_default(mut value: Value, default: impl Into<Value>) -> Value {
    value["default"] = default.into();
    value
}

/// Rules of the form: when `field` is this, these are required.
fn required_when(field: &str, rules: &[(&str, &[&str])]) -> Value {
    let rule = |(value, required): &(&str, &[&str])| {
        json!({
            "if": { "properties": { field: { "const": value } }, "required": [field] },
            "then": { "required": required },
        })
    };
    rules.iter().map(rule).collect()
}

fn fleet() -> Value {
    let tokens_max = u64::from(u32::MAX);
    record(
        &["engines", "profile", "kv_tokens"],
        json!({
            "engines": count(ENGINES_MAX, "How many."),
            "profile": {
                "description": "How long a step takes: the name of a built-in profile, or its \
                                constants.",
                "oneOf": [
                    { "enum": Profile::BUILT_IN.iter().map(|(name, _)| *name).collect::<Vec<_>>() },
                    { "$ref": "#/$defs/profile" },
                ],
            },
            "kv_tokens": count(tokens_max, "KV cache of one engine, tokens, as vLLM prints it."),
            "block_size": with_default(count(65_536, "Tokens per KV block."), 16),
            "max_batched_tokens": with_default(
                count(10_000_000, "Most tokens computed in one step."), 8192),
            "max_seqs": with_default(count(10_000_000, "Most sequences in one step."), 1024),
            "reserve_full_prompt": {
                "type": "boolean", "default": false,
                "description": "Admit a prompt only when blocks for all of it are free (vLLM \
                                0.32) instead of when its first chunk fits (earlier versions).",
            },
            "scrape_interval_s": with_default(
                above_zero("How often the router reads each engine's metrics, seconds."), 0.05),
            "event_delay_s": with_default(
                not_negative("From the end of a step to its KV events at the router, seconds."),
                0.005),
            "stats_delay_s": with_default(
                not_negative("From the end of a step until its statistics can be read, seconds."),
                0.1),
        }),
    )
}

fn profile() -> Value {
    let fields = [
        ("step_base_s", "Floor of a step, seconds."),
        ("step_per_seq_s", "Per sequence in the step, seconds."),
        ("step_per_context_token_s", "Per token of decoding context, seconds."),
        ("step_per_unique_token_s", "Per token resident in a block in use, seconds."),
        ("prefill_per_token_s", "Per prompt token computed, seconds."),
        ("prefill_attention_s", "Per prompt token and position it attends to, seconds."),
    ];
    let mut properties = Map::new();
    properties.insert("name".into(), json!({ "type": "string", "description": "In reports." }));
    for (field, description) in fields {
        let rule = match field {
            "step_base_s" => above_zero(description),
            _ => not_negative(description),
        };
        properties.insert(field.into(), rule);
    }
    record(&fields.map(|(field, _)| field), properties.into())
}

fn workload() -> Value {
    let count = |description| count(10_000_000, description);
    let mut value = record(
        &["kind"],
        json!({
            "kind": one_of(&["shared-prefix", "agentic", "trace"], "Which kind."),
            "groups": count("Shared prefixes; agentic: system prompts, shared by sessions."),
            "users": count("Shared prefix: users of each prefix, each with a question."),
            "prefix_tokens": not_negative("Length of a shared prefix, as the engine counts it."),
            "question_tokens": count("Length of a question; agentic: of what each turn adds."),
            "output_tokens": count("Length of an answer; trace: for lines without one."),
            "counted_output_ratio": with_default(
                above_zero("Tokens that the client counts in an answer, over those generated."),
                1),
            "bytes_per_token": with_default(
                above_zero("Bytes of prompt text per token, for routers that hash text."), 4),
            "order": with_default(
                one_of(
                    &["cyclic", "random"],
                    "Shared prefix: one shuffled order, from its start in every stage; or each \
                     request draws its prompt.",
                ),
                "cyclic"),
            "zipf": not_negative(
                "Exponent of the popularity of groups; without it all are equal. Shared prefix: \
                 needs `order: random`."),
            "turns": self::count(TURNS_MAX, "Agentic: turns of a session."),
            "think_s": not_negative("Agentic: mean seconds from an answer to the next turn."),
            "max_tokens_sent": {
                "type": "boolean", "default": true,
                "description": "Whether requests state `max_tokens`.",
            },
            "file": {
                "type": "string", "minLength": 1,
                "description": "Trace: path, relative to the scenario file.",
            },
        }),
    );
    let sizes = ["groups", "prefix_tokens", "question_tokens", "output_tokens"];
    value["allOf"] = required_when(
        "kind",
        &[
            ("shared-prefix", &[&sizes[..], &["users"]].concat()),
            ("agentic", &[&sizes[..], &["turns", "think_s"]].concat()),
            ("trace", &["file"]),
        ],
    );
    value
}

fn load() -> Value {
    let mut stages = list("stage", STAGES_MAX, "One after the other. Not with `trace`.");
    stages["default"] = json!([]);
    record(
        &[],
        json!({
            "arrivals": with_default(
                one_of(
                    &["poisson", "constant", "even", "closed", "trace"],
                    "poisson: a Poisson number in each second; constant: exponential gaps, \
                     scaled to the stage (both as inference-perf); even: equal gaps; closed: \
                     client.in_flight_max clients wait for their answers; trace: the times of \
                     the trace.",
                ),
                "poisson"),
            "stages": stages,
            "drain_between_stages": {
                "type": "boolean", "default": true,
                "description": "Start a stage only when every request of the one before has \
                                ended.",
            },
        }),
    )
}

fn stage() -> Value {
    record(
        &["duration_s"],
        json!({
            "rate": above_zero(
                "Requests per second; agentic: sessions per second. Not for closed loops."),
            "duration_s": above_zero("Seconds of sending."),
            "warmup": {
                "type": "boolean", "default": false,
                "description": "Leave it out of figures.",
            },
        }),
    )
}

fn client() -> Value {
    let most = u64::from(u32::MAX);
    let in_flight = format!(
        "Requests in flight at most; more fail at once, before the router sees them. A closed \
         loop: its clients, at most {CLIENTS_MAX}."
    );
    record(
        &[],
        json!({
            "in_flight_max": with_default(count(most, &in_flight), 100_000),
            "overhead_before_s": with_default(
                not_negative("From sending to the arrival at the engine, seconds."), 0),
            "overhead_after_s": with_default(
                not_negative("From the end of an engine's step to the client, seconds."), 0),
            "quantum_s": with_default(
                not_negative(
                    "Measured times to the first token are rounded up to multiples of this; 0: \
                     not at all.",
                ),
                0),
        }),
    )
}

fn fault() -> Value {
    let kinds = [
        "crash",
        "event-loss",
        "event-delay",
        "event-duplication",
        "metrics-partition",
        "slow-engine",
    ];
    let mut value = record(
        &["kind", "at_s", "for_s"],
        json!({
            "kind": one_of(
                &kinds,
                "crash: gone with its cache, back empty; event-loss, event-duplication: a share \
                 of its KV event batches; event-delay: they are late; metrics-partition: no \
                 metrics; slow-engine: steps take longer.",
            ),
            "engine": {
                "type": "integer", "minimum": 0,
                "description": "Position of the engine; without it all of them.",
            },
            "at_s": not_negative("Start, seconds from the start of the run."),
            "for_s": above_zero("How long, seconds."),
            "share": {
                "type": "number", "exclusiveMinimum": 0, "maximum": 1,
                "description": "event-loss, event-duplication: of event batches.",
            },
            "delay_s": above_zero("event-delay: seconds."),
            "factor": above_zero("slow-engine: how many times as long a step takes."),
        }),
    );
    value["allOf"] = required_when(
        "kind",
        &[
            ("event-loss", &["share"]),
            ("event-duplication", &["share"]),
            ("event-delay", &["delay_s"]),
            ("slow-engine", &["factor"]),
        ],
    );
    value
}

fn published() -> Value {
    record(
        &["name"],
        json!({
            "name": {
                "type": "string", "minLength": 1,
                "description": "Shown beside the run of this name.",
            },
            "summary": reference("figures", "Over all stages."),
            "stages": list("publishedStage", STAGES_MAX, "By rate."),
        }),
    )
}

fn published_stage() -> Value {
    let mut properties = figures();
    properties["rate"] = above_zero("Requests per second.");
    record(&["rate"], properties)
}

fn figures() -> Value {
    let fields = [
        ("output_tokens_per_s", "Counted output tokens per second."),
        ("requests_per_s", "Requests per second."),
        ("ttft_mean_s", "Time to the first token, mean, seconds."),
        ("ttft_p90_s", "Time to the first token, 90th percentile, seconds."),
        ("itl_mean_s", "Between tokens, as published, mean, seconds."),
        ("itl_p90_s", "Between tokens, as published, 90th percentile, seconds."),
        ("wait_queue_mean", "Requests waiting in an engine, mean."),
        ("wait_queue_p90", "Requests waiting in an engine, 90th percentile."),
        ("wait_queue_max", "Requests waiting in an engine, most."),
        ("kv_usage_mean", "KV cache in use, 0 to 1, mean."),
        ("kv_usage_p90", "KV cache in use, 0 to 1, 90th percentile."),
        ("kv_usage_max", "KV cache in use, 0 to 1, most."),
    ];
    let mut properties = Map::new();
    for (field, description) in fields {
        let mut rule = not_negative(description);
        rule["type"] = json!(["number", "null"]);
        properties.insert(field.to_owned(), rule);
    }
    properties.into()
}

#[cfg(test)]
mod tests;
