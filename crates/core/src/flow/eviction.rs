//! `sheddable-eviction-filter` and `priority-then-time-eviction-order-policy`: which running
//! requests may be stopped for others, and which one goes first?

use std::cmp::Reverse;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Time;
use crate::stage::Plugin;

/// A request that an endpoint works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// Its priority.
    pub priority: i32,
    /// When it left the queue.
    pub dispatched: Time,
}

/// Parameters of `sheddable-eviction-filter`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sheddable {}

impl Sheddable {
    /// Whether the request may be stopped: below priority 0.
    pub fn accepts(self, request: &Running) -> bool {
        request.priority < 0
    }
}

/// Parameters of `priority-then-time-eviction-order-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PriorityThenTime {}

impl PriorityThenTime {
    /// The smallest goes first: the lowest priority, then whoever was dispatched last, because the
    /// least work is lost with it.
    pub fn key(self, request: &Running) -> (i32, Reverse<Time>) {
        (request.priority, Reverse(request.dispatched))
    }
}

impl Plugin for Sheddable {}
impl Plugin for PriorityThenTime {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_youngest_of_the_lowest_priority_goes_first() {
        let running = |priority, at| Running { priority, dispatched: Time(at) };
        let mut all = [running(0, 9), running(-1, 1), running(-2, 1), running(-2, 5)];
        let may: Vec<bool> = all.iter().map(|request| Sheddable {}.accepts(request)).collect();
        assert_eq!(may, [false, true, true, true]);
        all.sort_by_key(|request| PriorityThenTime {}.key(request));
        assert_eq!(all, [running(-2, 5), running(-2, 1), running(-1, 1), running(0, 9)]);
    }
}
