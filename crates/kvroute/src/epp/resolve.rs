//! From flags to what a router is started with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use kvroute_core::settings::Settings;
use kvroute_router::{
    ExtProcConfig, MetricsListener, RouterConfig, ServerCertificate, ServerTls, TlsFiles,
    UpstreamNames,
};
use kvroute_tokens::TokenizerOptions;
use tracing::warn;

use super::flags::EppFlags;
use super::rules::{self, Env, Fleet};
use crate::config;

/// How long the look for IPv4 over IPv6 takes at most.
const DUAL_STACK_PATIENCE: Duration = Duration::from_millis(200);

/// What the flags ask for, and where endpoints come from.
///
/// # Errors
/// The configuration, a tokenizer or an address is wrong, or there is nothing to serve.
pub(super) fn router(flags: &EppFlags, env: Env<'_>) -> anyhow::Result<(RouterConfig, Fleet)> {
    let (plan, config) = plan(flags)?;
    let fleet = rules::fleet(flags, env, &plan).map_err(anyhow::Error::msg)?;
    let engines = &flags.engines;
    let options = TokenizerOptions {
        cache_bytes_max: plan.settings.tokenizer_cache_bytes_max,
        ..TokenizerOptions::default()
    };
    let host = any_address();
    let missing = match &fleet {
        Fleet::Listed => None,
        Fleet::Watched(what) => Some(rules::unwatched(what)),
    };
    let router = RouterConfig {
        tokenizers: config::tokenizers(&engines.tokenizers, &options)?,
        events: config::events(engines, &plan),
        plan,
        config,
        record: None,
        seed: flags.seed,
        http: None,
        ext_proc: Some(ext_proc(flags, host)),
        admin: admin(flags)?,
        metrics: Some(metrics(flags, host)),
        endpoints: config::endpoints(engines)?,
        endpoints_file: engines.endpoints_file.clone(),
        endpoints_missing: missing,
        upstream_metric_names: upstream_names(flags, env),
        default_model: engines.model.clone(),
        tls: None,
    };
    Ok((router, fleet))
}

/// Where the admin page is. Nobody who did not ask for one misses it: where the usual address is
/// taken, by another picker on this host, there is none.
fn admin(flags: &EppFlags) -> anyhow::Result<Option<SocketAddr>> {
    if flags.admin.is_empty() {
        return Ok(None);
    }
    let address = crate::cli::address(&flags.admin)
        .map_err(|valid| anyhow!("--admin: `{}`: {valid}, or nothing for none", flags.admin))?;
    let usual = !flags.given.contains("admin");
    match TcpListener::bind(address) {
        Err(error) if usual => {
            warn!(%address, %error, "There is no admin page: its address is taken; see --admin.");
            Ok(None)
        }
        _ => Ok(Some(address)),
    }
}

/// The plan under the settings that flags override, and the text it comes from.
fn plan(flags: &EppFlags) -> anyhow::Result<(kvroute_core::plan::Plan, String)> {
    let change = |settings: &mut Settings| override_settings(flags, settings);
    let experimental = flags.allow_experimental_plugins.into();
    let text = match &flags.config_file {
        Some(file) => {
            let name = file.display().to_string();
            let text = config::text_of(file).map_err(|error| anyhow!("--config-file: {error}"))?;
            (text, name)
        }
        None => (flags.config_text.clone(), "--config-text".to_owned()),
    };
    match text {
        (text, name) if flags.config_file.is_some() || !text.is_empty() => {
            let (_, plan) = config::read_with(&text, &name, experimental, &change)
                .map_err(|error| anyhow!("{error}"))?;
            Ok((plan, text))
        }
        _ => {
            let mut plan = kvroute_core::plan::Plan::least_cost();
            change(&mut plan.settings);
            Ok((plan, String::new()))
        }
    }
}

/// llm-d's flags go before the `kvroute` settings of the same meaning.
fn override_settings(flags: &EppFlags, settings: &mut Settings) {
    // Lengths were checked with the flags.
    let millis = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    if let Some(drain) = flags.drain_timeout {
        settings.drain_timeout_s = millis(drain).div_ceil(1_000);
    }
    if let Some(interval) = rules::refresh_interval(flags) {
        settings.scrape_interval_ms = millis(interval);
    }
    if let Some(threshold) = flags.metrics_staleness_threshold {
        settings.metrics_staleness_ms = millis(threshold);
    }
    if let Some(bytes) = flags.grpc_max_recv_msg_size {
        settings.ext_proc_message_bytes_max = bytes;
    }
}

fn ext_proc(flags: &EppFlags, host: IpAddr) -> ExtProcConfig {
    let certificate = match (flags.secure_serving, flags.cert_path.as_str()) {
        (false, _) => ServerCertificate::Off,
        (true, "") => ServerCertificate::SelfSigned,
        (true, dir) => files(dir, flags.enable_cert_reload),
    };
    ExtProcConfig {
        address: SocketAddr::new(host, flags.grpc_port),
        health: Some(SocketAddr::new(host, flags.grpc_health_port)),
        tls: ServerTls {
            certificate,
            min_version: flags.tls_min_version,
            cipher_suites: flags.tls_cipher_suites.clone(),
            client_ca: None,
        },
        ignore_subset_hints: flags.disable_endpoint_subset_filter,
        emit_scores: flags.emit_endpoint_scores,
        endpoint_header: flags.endpoint_header,
        drains_in_full: true,
    }
}

fn metrics(flags: &EppFlags, host: IpAddr) -> MetricsListener {
    let certificate = match flags.metrics_cert_dir.as_str() {
        "" => ServerCertificate::Off,
        dir => files(dir, true),
    };
    let refused = rules::is_refused(flags).then(|| {
        "who may read metrics is for Kubernetes to say (--metrics-endpoint-auth), which this \
         version does not ask; start with --metrics-endpoint-auth=false to let everybody read \
         them who can connect, with --metrics-client-ca-file to let those who have a certificate, \
         or read them at the --admin address"
            .to_owned()
    });
    let authority = &flags.metrics_client_ca_file;
    MetricsListener {
        address: SocketAddr::new(host, flags.metrics_port),
        tls: ServerTls {
            certificate,
            client_ca: (!authority.is_empty()).then(|| authority.into()),
            ..ServerTls::default()
        },
        refused,
        says_no_profiles: flags.enable_pprof,
    }
}

/// llm-d's gauges of a pool carry its name.
fn upstream_names(flags: &EppFlags, env: Env<'_>) -> Option<UpstreamNames> {
    flags.upstream_metric_names.then(|| UpstreamNames {
        pool: rules::pool_name(flags, env),
        streams: flags.enable_grpc_stream_metrics,
    })
}

fn files(dir: &str, reload: bool) -> ServerCertificate {
    let dir = Path::new(dir);
    let files = TlsFiles { cert: dir.join("tls.crt"), key: dir.join("tls.key") };
    ServerCertificate::Files { files, reload }
}

/// Every address of this host: IPv6 where a socket of it takes IPv4, too, as Linux has it unless
/// told otherwise.
fn any_address() -> IpAddr {
    let dual = || {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).ok()?;
        let port = listener.local_addr().ok()?.port();
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        TcpStream::connect_timeout(&loopback, DUAL_STACK_PATIENCE).ok()
    };
    match dual() {
        Some(_) => Ipv6Addr::UNSPECIFIED.into(),
        None => Ipv4Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests;
