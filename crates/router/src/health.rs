//! Is the router well, as gRPC asks? `grpc.health.v1.Health`, for the proxy in front and for
//! Kubernetes' probes.
//!
//! Ready is a router that has heard from all sources of endpoints and is not draining. A fleet
//! without endpoints is one: its requests get their answer, which says so.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use kvroute_wire::grpc::{Code, put_prefix};
use kvroute_wire::grpc_health::{self, ServingStatus};

use crate::grpc::{Call, End, Silence};
use crate::shared::{Phase, Shared};

/// What a check asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// Whether the process lives.
    Liveness,
    /// Whether it takes requests.
    Readiness,
    /// Nothing that has a name here.
    Unknown,
}

impl Asked {
    /// The names are those of the Endpoint Picker Protocol, and `inference-extension` that of
    /// llm-d's charts.
    fn of(service: &str) -> Asked {
        match service {
            "liveness" => Asked::Liveness,
            ""
            | "readiness"
            | "envoy.service.ext_proc.v3.ExternalProcessor"
            | "inference-extension" => Asked::Readiness,
            _ => Asked::Unknown,
        }
    }

    /// `leads`: among routers that elect one of them, whether it is this one. Without an election
    /// llm-d answers any name, and probes rely on that.
    fn status(self, ready: bool, leads: Option<bool>) -> ServingStatus {
        let serves = match self {
            Asked::Liveness => true,
            Asked::Unknown if leads.is_some() => return ServingStatus::ServiceUnknown,
            Asked::Readiness | Asked::Unknown => ready && leads != Some(false),
        };
        if serves { ServingStatus::Serving } else { ServingStatus::NotServing }
    }

    fn status_now(self, shared: &Shared) -> ServingStatus {
        let ready = shared.phase() == Phase::Serving && *shared.sources_read.borrow();
        // This router takes part in no election.
        self.status(ready, None)
    }
}

/// Answers once.
pub(crate) async fn check(shared: &Shared, call: &mut Call) -> End {
    let asked = match asked(shared, call).await {
        Ok(asked) => asked,
        Err(end) => return end,
    };
    match asked.status_now(shared) {
        ServingStatus::ServiceUnknown => {
            End::new(Code::NotFound, "there is no service of that name here")
        }
        status => call.send(message(status)).await.map_or_else(gone, |()| End::ok()),
    }
}

/// Tells how it is, and tells of every change until the caller goes or the router stops.
pub(crate) async fn watch(shared: &Shared, call: &mut Call) -> End {
    let asked = match asked(shared, call).await {
        Ok(asked) => asked,
        Err(end) => return end,
    };
    let (mut phase, mut read) = (shared.phase.subscribe(), shared.sources_read.subscribe());
    let mut told = None;
    loop {
        // Seen before it is looked at, so that what changes in between is looked at again.
        let stops = matches!(*phase.borrow_and_update(), Phase::Closing | Phase::Stopped);
        read.mark_unchanged();
        let now = asked.status_now(shared);
        if told != Some(now) {
            if let Err(silence) = call.send(message(now)).await {
                return gone(silence);
            }
            told = Some(now);
        }
        if stops {
            return End::new(Code::Unavailable, "the router stops");
        }
        tokio::select! {
            () = call.gone() => return gone(Silence::Gone),
            // The senders are `shared`'s own.
            _ = phase.changed() => {}
            _ = read.changed() => {}
        }
    }
}

async fn asked(shared: &Shared, call: &mut Call) -> Result<Asked, End> {
    let patience = u64::from(shared.settings.client_body_timeout_s.max(1));
    let request = call.next(Duration::from_secs(patience)).await.map_err(gone)?;
    let service = grpc_health::service(&request);
    service.map(Asked::of).map_err(|e| End::new(Code::InvalidArgument, e.to_string()))
}

/// How a call ends whose caller does something else than it should.
fn gone(silence: Silence) -> End {
    match silence {
        Silence::TooLong => End::new(Code::DeadlineExceeded, "the caller took too long"),
        Silence::Gone => End::new(Code::Cancelled, "the caller went away"),
        Silence::Broken(error) => error.into(),
    }
}

fn message(status: ServingStatus) -> Bytes {
    let response = grpc_health::response(status);
    let mut out = BytesMut::with_capacity(16);
    put_prefix(&mut out, response.len());
    out.put_slice(&response);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_serves_when() {
        use ServingStatus::{NotServing as No, ServiceUnknown as Unknown, Serving as Yes};
        // Ready or not: without an election, as the leader, as another.
        let readiness = [(Yes, No), (Yes, No), (No, No)];
        let unknown = [(Yes, No), (Unknown, Unknown), (Unknown, Unknown)];
        let table = [
            ("liveness", [(Yes, Yes); 3]),
            ("", readiness),
            ("readiness", readiness),
            ("envoy.service.ext_proc.v3.ExternalProcessor", readiness),
            ("inference-extension", readiness),
            ("Liveness", unknown),
            ("vllm", unknown),
        ];
        for (service, expected) in table {
            let asked = Asked::of(service);
            let found = [None, Some(true), Some(false)]
                .map(|leads| (asked.status(true, leads), asked.status(false, leads)));
            assert_eq!(found, expected, "{service}");
        }
    }
}
