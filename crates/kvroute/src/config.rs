//! From a configuration file to a plan, and from flags to what they mean.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::config_tests;
use kvroute_core::plan::{Experimental, Plan, PlanError};
use kvroute_core::settings::Settings;
use kvroute_router::{
    EndpointFlag, EventsConfig, EventsSource, ExtProcConfig, Record, RouterConfig, TlsFiles,
    Tokenizers, UpstreamNames,
};
use kvroute_tokens::{Tokenizer, TokenizerOptions};
use kvroute_wire::config::{CONFIG_BYTES_MAX, ConfigError};
use kvroute_wire::yaml::Tree;
use tracing::info;

use crate::cli;

/// Reads and checks a configuration; `file` names it in errors.
///
/// # Errors
/// What is wrong, with line and column where the file is to blame.
pub fn load_text(text: &str, file: &str, experimental: Experimental) -> anyhow::Result<Plan> {
    let (_, plan) = read(text, file, experimental).map_err(|error| anyhow!("{error}"))?;
    Ok(plan)
}

/// The same: what is written, and what becomes of it.
///
/// # Errors
/// What is wrong, with line and column where the file is to blame.
pub fn read(
    text: &str,
    file: &str,
    experimental: Experimental,
) -> Result<(EndpointPickerConfig, Plan), ConfigError> {
    read_with(text, file, experimental, &|_| {})
}

/// The same, with settings that are changed before a plan is made.
///
/// # Errors
/// What is wrong, with line and column where the file is to blame.
pub fn read_with(
    text: &str,
    file: &str,
    experimental: Experimental,
    change: &dyn Fn(&mut Settings),
) -> Result<(EndpointPickerConfig, Plan), ConfigError> {
    let tree = Tree::parse(text, file, CONFIG_BYTES_MAX)?;
    if tree.is_empty() {
        let message = "nothing is written here: list plugins under `plugins`, or leave --config \
                       out for the built-in configuration";
        return Err(ConfigError::of_file(file, message));
    }
    if tree.text_of("kind") == Some("ConfigMap") {
        let message = "this is a Kubernetes ConfigMap; the configuration is the text of one of the \
                       keys under its `data`: give that";
        return Err(tree.error("kind", message));
    }
    let mut config: EndpointPickerConfig = tree.read()?;
    change(&mut config.kvroute.limits);
    let wrong = |PlanError { path, message }| tree.error(&path, &message);
    let plan = Plan::build(&config, experimental).map_err(wrong)?;
    config_tests::check(&config.kvroute.tests).map_err(wrong)?;
    Ok((config, plan))
}

/// Configurations that ship with the program: name and file content.
pub const PRESETS: [(&str, &str); 8] = [
    ("kvroute", include_str!("../../../config/presets/kvroute.yaml")),
    ("llm-d", include_str!("../../../config/presets/llm-d.yaml")),
    ("blend", include_str!("../../../config/presets/blend.yaml")),
    ("precise", include_str!("../../../config/presets/precise.yaml")),
    ("estimated", include_str!("../../../config/presets/estimated.yaml")),
    ("load", include_str!("../../../config/presets/load.yaml")),
    ("random", include_str!("../../../config/presets/random.yaml")),
    ("round-robin", include_str!("../../../config/presets/round-robin.yaml")),
];

/// The comment at the head of a preset.
pub fn about(text: &str) -> String {
    let comment = text.lines().map_while(|line| line.strip_prefix('#'));
    comment.map(str::trim).collect::<Vec<_>>().join(" ")
}

/// The plan of a preset, and its text.
///
/// # Errors
/// No preset is called so; the message names those there are.
pub fn preset(name: &str) -> anyhow::Result<(Plan, String)> {
    let found = PRESETS.iter().find(|(known, _)| *known == name);
    let names = PRESETS.map(|(name, _)| name).join(", ");
    let (name, text) = found
        .ok_or_else(|| anyhow!("no built-in configuration is called {name}; there are: {names}"))?;
    Ok((load_text(text, name, Experimental::Allowed)?, (*text).to_owned()))
}

/// The plan of a preset, or of a file if there is one of that name.
///
/// # Errors
/// There is neither, or the file is wrong.
pub fn preset_or_file(given: &str, experimental: Experimental) -> anyhow::Result<Plan> {
    let path = Path::new(given);
    if path.is_file() {
        return load(Some(path), experimental);
    }
    preset(given).map(|(plan, _)| plan).with_context(|| format!("{given} is no file"))
}

/// The plan of `--config`, or kvroute's own.
///
/// # Errors
/// The file cannot be read, or is wrong.
pub fn load(path: Option<&Path>, experimental: Experimental) -> anyhow::Result<Plan> {
    load_with_text(path, experimental).map(|(plan, _)| plan)
}

/// The same, with the text that it was read from; empty for the built-in one.
fn load_with_text(
    path: Option<&Path>,
    experimental: Experimental,
) -> anyhow::Result<(Plan, String)> {
    let Some(path) = path else { return Ok((Plan::least_cost(), String::new())) };
    let name = path.display().to_string();
    let text = text_of(path).map_err(|error| anyhow!("{error}"))?;
    Ok((load_text(&text, &name, experimental)?, text))
}

/// The text of a file, or why it cannot be one of a configuration. No more is read than one may
/// have.
///
/// # Errors
/// It cannot be read, is too long, or is no text.
pub fn text_of(file: &Path) -> Result<String, ConfigError> {
    let name = file.display().to_string();
    let wrong = |message: &str| ConfigError::of_file(&name, message);
    if file.is_dir() {
        return Err(wrong("this is a folder; name the files in it"));
    }
    let open = File::open(file).map_err(|error| wrong(&format!("cannot read it: {error}")))?;
    text_from(open, &name)
}

/// The same from something that is open; `name` stands for it in errors.
///
/// # Errors
/// As [`text_of`].
pub fn text_from(from: impl Read, name: &str) -> Result<String, ConfigError> {
    let wrong = |message: &str| ConfigError::of_file(name, message);
    let mut bytes = Vec::new();
    // One byte more than the limit tells that the file is too long.
    let read = from.take(CONFIG_BYTES_MAX as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| wrong(&format!("cannot read it: {error}")))?;
    if bytes.len() > CONFIG_BYTES_MAX {
        let message = format!("longer than {CONFIG_BYTES_MAX} bytes, the limit of a configuration");
        return Err(wrong(&message));
    }
    let text = String::from_utf8(bytes).map_err(|_| wrong("this is no text (UTF-8)"))?;
    if text.contains('\0') {
        return Err(wrong("this is no text: it holds zero bytes"));
    }
    Ok(text)
}

/// What `kvroute serve` was told, resolved.
///
/// # Errors
/// A flag, the configuration or a tokenizer is wrong.
pub fn router(args: &cli::Serve) -> anyhow::Result<RouterConfig> {
    let engines = &args.engines;
    let (plan, config) = match &args.preset {
        Some(name) => preset(name).context("--preset")?,
        None => load_with_text(args.config.as_deref(), args.allow_experimental_plugins.into())?,
    };
    let listed = engines.endpoints_file.is_some() || plan.collect.discovery.is_some();
    if engines.endpoints.is_empty() && !listed {
        bail!(
            "no endpoints: give --endpoint URL (once for each engine) or --endpoints-file FILE, \
             or list them in a file that the configuration's dataLayer.discovery names"
        );
    }
    let events = events(engines, &plan);
    let record = args.record.clone().map(|file| Record { file });
    let options = TokenizerOptions {
        cache_bytes_max: plan.settings.tokenizer_cache_bytes_max,
        ..TokenizerOptions::default()
    };
    Ok(RouterConfig {
        tokenizers: tokenizers(&engines.tokenizers, &options)?,
        plan,
        config,
        record,
        upstream_metric_names: args.upstream_metric_names.then(UpstreamNames::default),
        seed: args.seed,
        http: Some(args.http),
        ext_proc: args.ext_proc.map(ExtProcConfig::plain),
        admin: Some(args.admin),
        endpoints: endpoints(engines)?,
        endpoints_file: engines.endpoints_file.clone(),
        endpoints_missing: None,
        metrics: None,
        events,
        default_model: engines.model.clone(),
        tls: match (&args.tls_cert, &args.tls_key) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert: cert.clone(), key: key.clone() }),
            _ => None,
        },
    })
}

/// The endpoints that are named by flags.
///
/// # Errors
/// The flag that is wrong.
pub fn endpoints(engines: &cli::Engines) -> anyhow::Result<Vec<EndpointFlag>> {
    let flags = engines.endpoints.iter();
    flags.map(|text| text.parse().with_context(|| format!("--endpoint {text}"))).collect()
}

/// Where events come from: what flags say holds for every endpoint, else what the plan says.
pub fn events(engines: &cli::Engines, plan: &Plan) -> EventsConfig {
    let planned = EventsConfig::planned(plan);
    let Some(events) = engines.kv_events_port else { return planned };
    if planned != EventsConfig::default() {
        info!(port = events, "--kv-events-port goes before the configuration's kvEventsConfig.");
    }
    EventsSource::Ports { events, replay: engines.kv_replay_port }.into()
}

/// Loads tokenizers: `FILE` is for every model, `MODEL=FILE` for one.
///
/// # Errors
/// A file is none, or two are for every model.
pub fn tokenizers(flags: &[String], options: &TokenizerOptions) -> anyhow::Result<Tokenizers> {
    let mut tokenizers = Tokenizers::default();
    for flag in flags {
        let (model, file) = match flag.split_once('=') {
            Some((model, file)) if !Path::new(flag).exists() => (Some(model), file),
            _ => (None, flag.as_str()),
        };
        let tokenizer = Tokenizer::load(Path::new(file), options)
            .with_context(|| format!("--tokenizer {flag}"))?;
        if tokenizer.template_stats().direct_forms == 0 {
            info!(flag, "No chat template with a direct form: chats cost some 10 us more each.");
        }
        match model {
            Some(model) => {
                tokenizers.by_model.insert(model.to_owned(), tokenizer);
            }
            None if tokenizers.default.is_none() => tokenizers.default = Some(tokenizer),
            None => bail!("two tokenizers for every model; write --tokenizer MODEL=FILE"),
        }
    }
    Ok(tokenizers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits_example() -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../config/limits.yaml");
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn the_limits_example_shows_every_limit_with_its_default() {
        let text = limits_example();
        let plan = load_text(&text, "limits.yaml", Experimental::Refused).unwrap();
        assert_eq!(plan.settings, Settings::default());
        let named = format!("{:?}", Settings::default());
        let fields = named.split(['{', ',']).filter_map(|part| part.trim().split_once(':'));
        for (field, _) in fields {
            let field = field.trim();
            assert!(text.contains(&format!("  {field}:")), "config/limits.yaml lacks {field}");
        }
    }

    #[test]
    fn the_presets_load_and_our_own_is_the_default() {
        for (name, text) in PRESETS {
            preset(name).unwrap();
            assert!(!about(text).is_empty(), "{name}");
        }
        // What was added differs where a file says what is left to defaults.
        let plain = |plan: Plan| Plan { notes: Vec::new(), ..plan };
        assert_eq!(plain(preset("kvroute").unwrap().0), plain(Plan::least_cost()));
        assert_eq!(plain(preset("blend").unwrap().0), plain(Plan::precise()));
        let error = format!("{:#}", preset_or_file("precis", Experimental::Refused).unwrap_err());
        assert!(error.contains("precise"), "{error}");
    }

    #[test]
    fn ports_of_events_come_from_flags_then_from_the_configuration_then_from_the_engines() {
        let plan = |ports: &str| {
            let text = format!(
                "plugins:\n- type: precise-prefix-cache-producer\n  parameters: {{kvEventsConfig: \
                 {{podDiscoveryConfig: {{{ports}}}}}}}\n"
            );
            load_text(&text, "c.yaml", Experimental::Refused).unwrap()
        };
        let ports = |events, replay| EventsSource::Ports { events, replay };
        let ask = |replay| EventsSource::Ask { events: 5557, replay };
        let table = [
            (None, "", ask(None)),
            (None, "socketPort: 5557", ports(5557, None)),
            (None, "socketPort: 6000", ports(6000, None)),
            (None, "replaySocketPort: 6001", ask(Some(6001))),
            (Some(1), "socketPort: 6000", ports(1, None)),
        ];
        for (kv_events_port, text, expected) in table {
            let flags = cli::Engines { kv_events_port, ..cli::Engines::default() };
            assert_eq!(events(&flags, &plan(text)), expected.into(), "{text}");
        }
        let flags = cli::Engines { kv_events_port: Some(1), ..cli::Engines::default() };
        let text = "plugins: [{type: precise-prefix-cache-scorer, parameters: {kvEventsConfig: \
                    {zmqEndpoint: \"tcp://*:5557\"}}}]";
        let bound = load_text(text, "c.yaml", Experimental::Refused).unwrap();
        assert!(events(&cli::Engines::default(), &bound).bound.is_some());
        assert_eq!(events(&flags, &bound).bound, None, "flags say where all events come from");
    }

    #[test]
    fn a_typo_names_line_column_and_the_valid_names() {
        let text = "kind: EndpointPickerConfig\nplugins:\n  - type: queue-scorrer\n";
        let error = format!("{:#}", load_text(text, "my.yaml", Experimental::Refused).unwrap_err());
        for part in ["my.yaml", "3:", "queue-scorrer", "queue-scorer"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }

    #[test]
    fn a_wrong_reference_names_line_column_and_what_is_defined() {
        let text = "plugins:\n  - type: queue-scorer\nschedulingProfiles:\n  - name: p\n    \
                    plugins:\n      - pluginRef: queue-scorrer\n";
        let error = format!("{:#}", load_text(text, "my.yaml", Experimental::Refused).unwrap_err());
        for part in ["my.yaml:6:", "queue-scorrer", "defined: queue-scorer"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}
