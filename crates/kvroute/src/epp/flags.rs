//! What do the flags of `kvroute epp` say? The syntax is pflag's, because llm-d's Helm charts
//! write it: `--name value`, `--name=value`, booleans bare or with `=true`, `-v 4`, `-v=4`, `--`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use kvroute_core::filter::LabelSelector;
use kvroute_core::plugin::nearest_first;
use kvroute_router::{CipherSuite, TlsVersion};

use super::table::FLAGS;
use crate::cli::Engines;

/// Names that are offered when a flag is unknown.
const NEAREST_SHOWN: usize = 3;
/// Much of an argument that is repeated in an error, in characters.
const SHOWN_MAX: usize = 80;

/// All flags, as given or by default. The table of flags says what each is for.
#[derive(Clone, Debug)]
pub(super) struct EppFlags {
    pub grpc_port: u16,
    pub grpc_max_recv_msg_size: Option<usize>,
    pub grpc_max_send_msg_size: Option<usize>,
    pub drain_timeout: Option<Duration>,
    pub secure_serving: bool,
    pub cert_path: String,
    pub enable_cert_reload: bool,
    pub tls_min_version: TlsVersion,
    pub tls_cipher_suites: Vec<CipherSuite>,
    pub disable_endpoint_subset_filter: bool,
    pub emit_endpoint_scores: bool,

    pub pool_name: String,
    pub pool_namespace: String,
    pub pool_group: String,
    pub endpoint_selector: Option<LabelSelector>,
    pub endpoint_target_ports: Vec<u16>,
    pub ha_enable_leader_election: bool,

    pub config_file: Option<PathBuf>,
    pub config_text: String,
    pub allow_experimental_plugins: bool,

    pub refresh_metrics_interval: Option<Duration>,
    pub metrics_staleness_threshold: Option<Duration>,
    pub refresh_prometheus_metrics_interval: Duration,

    pub grpc_health_port: u16,
    pub health_checking: bool,
    pub metrics_port: u16,
    pub metrics_endpoint_auth: bool,
    pub metrics_cert_dir: String,
    pub metrics_client_ca_file: String,
    pub enable_pprof: bool,
    pub enable_grpc_stream_metrics: bool,

    pub v: u32,
    pub zap_devel: bool,
    pub zap_encoder: String,
    pub zap_log_level: String,
    pub zap_stacktrace_level: String,
    pub zap_time_encoding: String,
    pub tracing: bool,

    /// kvroute's own: what `serve` calls the same.
    pub engines: Engines,
    pub admin: String,
    pub endpoint_header: bool,
    pub upstream_metric_names: bool,
    pub seed: u64,

    /// Names of the flags that were given, whatever their value.
    pub given: BTreeSet<&'static str>,
    /// Arguments that are no flags. llm-d ignores them.
    pub stray: Vec<String>,
}

impl Default for EppFlags {
    fn default() -> EppFlags {
        EppFlags {
            grpc_port: 9002,
            grpc_max_recv_msg_size: None,
            grpc_max_send_msg_size: None,
            drain_timeout: None,
            secure_serving: true,
            cert_path: String::new(),
            enable_cert_reload: false,
            tls_min_version: TlsVersion::default(),
            tls_cipher_suites: Vec::new(),
            disable_endpoint_subset_filter: false,
            emit_endpoint_scores: false,
            pool_name: String::new(),
            pool_namespace: String::new(),
            pool_group: POOL_GROUP.to_owned(),
            endpoint_selector: None,
            endpoint_target_ports: Vec::new(),
            ha_enable_leader_election: false,
            config_file: None,
            config_text: String::new(),
            allow_experimental_plugins: false,
            refresh_metrics_interval: None,
            metrics_staleness_threshold: None,
            refresh_prometheus_metrics_interval: Duration::from_secs(5),
            grpc_health_port: 9003,
            health_checking: false,
            metrics_port: 9090,
            metrics_endpoint_auth: true,
            metrics_cert_dir: String::new(),
            metrics_client_ca_file: String::new(),
            enable_pprof: true,
            enable_grpc_stream_metrics: false,
            v: 2,
            zap_devel: false,
            zap_encoder: String::new(),
            zap_log_level: String::new(),
            zap_stacktrace_level: String::new(),
            zap_time_encoding: String::new(),
            tracing: true,
            engines: Engines::default(),
            admin: ADMIN.to_owned(),
            endpoint_header: false,
            upstream_metric_names: false,
            seed: 0,
            given: BTreeSet::new(),
            stray: Vec::new(),
        }
    }
}

/// API group of InferencePools.
pub(super) const POOL_GROUP: &str = "inference.networking.k8s.io";
/// Where the full admin page is, unless told otherwise: not where metrics are.
pub(super) const ADMIN: &str = "127.0.0.1:9091";

/// What a command line asks for.
#[derive(Debug)]
pub(super) enum Asked {
    /// The list of flags.
    Help,
    /// To run so.
    Run(Box<EppFlags>),
}

/// Sets one flag by the text of its value. `Err`: what would be valid.
pub(super) type Set = fn(&mut EppFlags, &str) -> Result<(), String>;

/// One flag: all that parser, help and documentation know of it.
pub struct Flag {
    /// Name without dashes.
    pub name: &'static str,
    /// What stands for its value in the help; empty for booleans.
    pub value: &'static str,
    /// Its value when it is not given.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
    pub(super) set: Set,
}

/// The flag of this name.
pub(super) fn flag(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().flat_map(|(_, flags)| *flags).find(|flag| flag.name == name)
}

/// Reads the arguments behind `epp`.
///
/// # Errors
/// The flag that is unknown or whose value is not valid, and what would be.
pub(super) fn parse(args: &[String]) -> Result<Asked, String> {
    let mut flags = EppFlags::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            flags.stray.extend(rest.by_ref().cloned());
            break;
        }
        let (name, inline) = match split(arg)? {
            Some((name, inline)) => (name, inline),
            None => {
                flags.stray.push(arg.clone());
                continue;
            }
        };
        let Some(flag) = flag(name) else {
            if matches!(name, "help" | "h") {
                return Ok(Asked::Help);
            }
            return Err(unknown(name));
        };
        let value = match (inline, flag.value.is_empty()) {
            (Some(value), _) => value,
            (None, true) => "true",
            (None, false) => rest.next().map(String::as_str).ok_or_else(|| {
                format!("--{} needs a value: --{}={}", flag.name, flag.name, flag.value)
            })?,
        };
        (flag.set)(&mut flags, value)
            .map_err(|valid| format!("--{}: `{}`: {valid}", flag.name, shown(value)))?;
        flags.given.insert(flag.name);
    }
    Ok(Asked::Run(Box::new(flags)))
}

/// Name and value of one argument; `None`: it is no flag.
fn split(arg: &str) -> Result<Option<(&str, Option<&str>)>, String> {
    if let Some(long) = arg.strip_prefix("--") {
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (long, None),
        };
        return match name.is_empty() || name.starts_with('-') {
            true => Err(format!("`{}` is no flag: write --name=value", shown(arg))),
            false => Ok(Some((name, value))),
        };
    }
    match arg.strip_prefix('-') {
        None | Some("") => Ok(None),
        Some("h") => Ok(Some(("help", None))),
        // The one flag with a letter of its own; its value may follow at once, as in -v4.
        Some(short) if short.starts_with('v') => {
            let value = &short[1..];
            let value = value.strip_prefix('=').unwrap_or(value);
            Ok(Some(("v", Some(value).filter(|_| short.len() > 1))))
        }
        Some(short) => {
            let name = short.split('=').next().unwrap_or(short);
            let hint = match flag(name) {
                Some(_) => format!("write --{short}"),
                None => "only -v and -h are written with one dash".to_owned(),
            };
            Err(format!("unknown flag `{}`: {}", shown(arg), shown(&hint)))
        }
    }
}

fn unknown(name: &str) -> String {
    let names = FLAGS.iter().flat_map(|(_, flags)| *flags).map(|flag| flag.name);
    let near = nearest_first(name, names);
    let near: Vec<String> = near.iter().take(NEAREST_SHOWN).map(|n| format!("--{n}")).collect();
    format!(
        "unknown flag --{}; the nearest are {}; kvroute epp --help lists all",
        shown(name),
        near.join(", ")
    )
}

/// The beginning of what was typed.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

/// The help: one line or two for each flag, in groups.
pub(super) fn help() -> String {
    let mut out = String::from(
        "llm-d's Endpoint Picker for Envoy (ext_proc), with llm-d's flags. docs/epp.md says more.\n\
         \nUsage: kvroute epp [FLAGS]\n",
    );
    for (group, flags) in FLAGS {
        out.push_str(&format!("\n{group}:\n"));
        for flag in flags {
            let value = if flag.value.is_empty() { "" } else { &format!(" {}", flag.value) };
            let default = match flag.default {
                "" | "false" => "",
                default => &format!(" [{default}]"),
            };
            out.push_str(&format!("  --{}{value}{default}\n      {}\n", flag.name, flag.help));
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests;
