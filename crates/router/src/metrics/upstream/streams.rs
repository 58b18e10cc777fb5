//! How many ext_proc streams are there, how long do they last, and how do they end?

use std::time::Duration;

use kvroute_wire::grpc::Code;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::grpc::Open;

/// Bounds of durations, in seconds.
const SECONDS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// How a stream ended, by Go's name of the status.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    code: &'static str,
}

/// Of all streams.
pub(crate) struct Streams {
    inflight: Gauge,
    duration: Histogram,
    ended: Family<EndLabels, Counter>,
}

impl Streams {
    /// The families, registered.
    pub fn new(r: &mut Registry) -> Streams {
        let streams = Streams {
            inflight: Gauge::default(),
            duration: Histogram::new(SECONDS),
            ended: Family::default(),
        };
        r.register("extproc_streams_inflight", "ext_proc streams", streams.inflight.clone());
        let help = "How long ext_proc streams last";
        r.register("extproc_stream_duration_seconds", help, streams.duration.clone());
        let help = "Ended ext_proc streams, by gRPC status";
        r.register("extproc_streams", help, streams.ended.clone());
        streams
    }

    /// One more, until the answer is dropped.
    pub fn begin(&self) -> Open<'_> {
        Open::new(&self.inflight)
    }

    /// One has ended so.
    pub fn end(&self, code: Code, took: Duration) {
        self.duration.observe(took.as_secs_f64());
        self.ended.get_or_create(&EndLabels { code: go_name(code) }).inc();
    }
}

fn go_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
    }
}
