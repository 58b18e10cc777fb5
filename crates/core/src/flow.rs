//! Who goes first when requests have to wait? The rules of flow control as pure functions: between
//! flows of one priority (fairness), within a flow (ordering), how full the fleet may be for a
//! priority (usage limits), and which running request makes room (eviction). One file per kind.

mod eviction;
mod fairness;
mod ordering;
mod usage_limit;

pub use eviction::{PriorityThenTime, Running, Sheddable};
pub use fairness::{FlowHead, GlobalStrict, ProgramAware, RoundRobinFlows, Service, Strategy};
pub use ordering::{Edf, Fcfs, OrderKey, Queued, SloDeadline, slo_ttft};
pub use usage_limit::{
    Domain, PriorityHoldback, Shape, SoftReflective, SoftReflectiveTicks, StaticLimit,
};
