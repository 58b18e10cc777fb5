//! Is the router alive, and should it get requests?

use std::sync::atomic::Ordering;

use serde::Serialize;

use crate::shared::{Phase, Shared};

/// Answer of `/healthz`.
#[derive(Serialize)]
pub(super) struct Health {
    pub status: &'static str,
}

/// Answer of `/readyz`.
#[derive(Serialize)]
pub(super) struct Readiness {
    pub ready: bool,
    /// Why not, or what is worth knowing although it is.
    pub reasons: Vec<String>,
    pub endpoints: usize,
    pub endpoints_answering: usize,
    pub requests_inflight: u32,
}

/// How much is said about what is wrong with sources of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Details {
    /// Everything, which may be lines of files.
    Shown,
    /// How many there are.
    Counted,
}

/// Ready: not draining, every source of endpoints can be asked, and at least one endpoint answers.
pub(super) fn readiness(shared: &Shared, details: Details) -> Readiness {
    let upstreams = shared.upstreams.all();
    let answering = upstreams.iter().filter(|u| u.up.load(Ordering::Relaxed)).count();
    let mut reasons = {
        let errors = shared.discovery_errors.lock();
        match details {
            Details::Counted if !errors.is_empty() => vec![format!(
                "{} sources of endpoints cannot be read; the log and the admin address say why",
                errors.len()
            )],
            _ => errors.clone(),
        }
    };
    let draining = shared.phase() != Phase::Serving;
    if draining {
        reasons.push("draining: the router is about to stop".to_owned());
    }
    let missing = shared.endpoints_missing.as_ref();
    reasons.extend(missing.cloned());
    if upstreams.is_empty() {
        reasons.push("no endpoints: no source of endpoints lists any".to_owned());
    } else if answering == 0 {
        reasons.push(format!("none of {} endpoints answers GET /metrics", upstreams.len()));
    }
    Readiness {
        ready: !draining && missing.is_none() && answering > 0,
        reasons,
        endpoints: upstreams.len(),
        endpoints_answering: answering,
        requests_inflight: shared.inflight.load(Ordering::Relaxed),
    }
}
