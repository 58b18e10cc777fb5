//! Clients, the real Envoy, the router behind `ext_proc`, and model servers: is everything that
//! arrives what was sent, and does nothing hang?
//!
//! Envoy runs with the files of `deploy/envoy`, other addresses put into them. It is found where
//! `scripts/fetch-envoy.sh` puts it, or at `$KVROUTE_ENVOY`; without it every test says that it
//! is skipped, or fails if `$KVROUTE_ENVOY_REQUIRED` is set.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../support/mod.rs"]
mod support;

mod bodies;
mod client;
mod endings;
mod failures;
mod modes;
mod picking;
mod upstream;

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use kvroute::envoy::{Envoy, OVERRIDE_HOST, STANDALONE, Template};
use kvroute_core::plan::{Experimental, Plan};
use kvroute_router::{ExtProcConfig, RouterConfig, RouterHandle, ServerCertificate, ServerTls};

use support::{config, wait_until};

/// What a test runs: by default the sidecar's configuration, without TLS, health checks that do
/// not wait, and requests that spread over all endpoints.
pub(crate) struct Setup {
    pub(crate) template: Template,
    pub(crate) tls: bool,
    pub(crate) plan: Plan,
}

impl Setup {
    pub(crate) fn standalone() -> Setup {
        Setup { template: Template::new(STANDALONE), tls: false, plan: plan("") }
    }

    pub(crate) fn override_host(endpoints: &[SocketAddr]) -> Setup {
        let lines: Vec<String> = endpoints
            .iter()
            .map(|at| format!("address: {}, port_value: {}", at.ip(), at.port()))
            .collect();
        let template = Template::new(OVERRIDE_HOST);
        let template =
            template.each("endpoint", "address: 127.0.0.1, port_value: 8000", &lines).unwrap();
        Setup { template, tls: false, plan: plan("") }
    }

    pub(crate) fn set(mut self, mark: &str, from: &str, to: &str) -> Setup {
        self.template = self.template.set(mark, from, to).unwrap();
        self
    }

    pub(crate) fn without(mut self, mark: &str) -> Setup {
        self.template = self.template.without(mark).unwrap();
        self
    }

    /// Further settings of kvroute, as YAML under its key.
    pub(crate) fn settings(mut self, settings: &str) -> Setup {
        self.plan = plan(settings);
        self
    }

    /// Filters that stand before the picker's.
    pub(crate) fn filters(self, filters: &str) -> Setup {
        let to = format!("http_filters:\n{filters}");
        self.set("filters", "http_filters:", &to)
    }

    /// Envoy for a picker at this address.
    pub(crate) async fn envoy(&self, binary: &Path, ext_proc: SocketAddr) -> Envoy {
        let mut template = self.template.clone().on_loopback(ext_proc).unwrap();
        if !self.tls {
            template = template.without("tls").unwrap();
        }
        Envoy::start(binary, &template).await.unwrap_or_else(|error| panic!("{error:#}"))
    }
}

/// Any endpoint may be chosen, and what fails is avoided for long.
fn plan(settings: &str) -> Plan {
    let often =
        if settings.contains("scrape_interval_ms") { "" } else { "scrape_interval_ms: 50," };
    let text = format!(
        "plugins: [{{type: random-picker}}]
schedulingProfiles: [{{name: default, plugins: [{{pluginRef: random-picker}}]}}]
kvroute: {{{often} {settings}}}
"
    );
    kvroute::config::load_text(&text, "the test's", Experimental::Refused).unwrap()
}

/// The program, or why there is none; then the test is over.
pub(crate) fn binary() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/envoy/envoy");
    let path = std::env::var_os("KVROUTE_ENVOY").map_or(built, PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    let why = format!("no Envoy at {}; get one with scripts/fetch-envoy.sh", path.display());
    assert!(std::env::var_os("KVROUTE_ENVOY_REQUIRED").is_none(), "{why}");
    // Not captured, unlike a print.
    let mut stderr = std::io::stderr();
    writeln!(stderr, "SKIPPED: {why}").unwrap();
    None
}

/// A router that serves `ext_proc`, and nothing else that clients use.
pub(crate) fn picker(plan: Plan, tls: bool, endpoints: &[SocketAddr]) -> RouterConfig {
    let flags: Vec<String> = endpoints.iter().map(|at| format!("http://{at}")).collect();
    let certificate = if tls { ServerCertificate::SelfSigned } else { ServerCertificate::Off };
    let tls = ServerTls { certificate, ..ServerTls::default() };
    let any = "127.0.0.1:0".parse().unwrap();
    let ext_proc = Some(ExtProcConfig { tls, ..ExtProcConfig::plain(any) });
    RouterConfig { http: None, ext_proc, ..config(plan, &flags) }
}

/// Envoy and the router behind it.
pub(crate) struct Stack {
    /// Where clients connect.
    pub(crate) http: SocketAddr,
    pub(crate) envoy: Envoy,
    pub(crate) router: RouterHandle,
}

impl Stack {
    /// `None` without an Envoy.
    pub(crate) async fn start(setup: Setup, endpoints: &[SocketAddr]) -> Option<Stack> {
        let binary = binary()?;
        let config = picker(setup.plan.clone(), setup.tls, endpoints);
        let router = kvroute_router::start(config).await.unwrap();
        wait_until("every endpoint is known", || {
            let brain = router.brain();
            brain.fleet().iter().filter(|e| e.metrics().is_some()).count() == endpoints.len()
        })
        .await;
        let envoy = setup.envoy(&binary, router.ext_proc_addr().unwrap()).await;
        Some(Stack { http: envoy.http_addr().unwrap(), envoy, router })
    }

    /// Nothing is left over in the router.
    pub(crate) async fn settled(&self) {
        wait_until("nothing is in flight", || self.router.inflight() == 0).await;
    }

    /// Envoy had nothing to complain about, and the router holds nothing any more.
    pub(crate) async fn unharmed(&self) {
        self.settled().await;
        for counter in [
            "ext_proc.spurious_msgs_received",
            "ext_proc.streams_failed",
            "ext_proc.failure_mode_allowed",
            "ext_proc.message_timeouts",
            "ext_proc.rejected_header_mutations",
        ] {
            let count = self.envoy.stat(counter).await.unwrap();
            assert_eq!(count, 0, "{counter}\n{}", self.envoy.log());
        }
        let log = self.envoy.log();
        for word in ["spurious", "ext_proc_error", "[error]", "[critical]"] {
            assert!(!log.contains(word), "{word} in Envoy's log:\n{log}");
        }
    }
}
