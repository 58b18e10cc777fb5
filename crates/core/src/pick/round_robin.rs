//! `kvroute-round-robin-picker`: the next endpoint by name. kvroute's own, llm-d has none: it is
//! the baseline that `demo` and `bench` compare with.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::fleet::Name;
use crate::memory::Memory;
use crate::stage::{Picker, Plugin, View};

/// Round robin over endpoint names, whatever the scores. The place in the round is a name, so
/// endpoints that come and go do not disturb the order of the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RoundRobin {
    #[serde(skip)]
    last: Option<Name>,
}

impl Plugin for RoundRobin {
    fn memory(&self) -> Memory {
        Memory::Last(self.last.as_ref().map(Name::to_string))
    }

    fn recall(&mut self, memory: &Memory) {
        if let Memory::Last(name) = memory {
            self.last = name.as_deref().map(Name::from);
        }
    }
}

impl Picker for RoundRobin {
    fn endpoints_max(&self) -> usize {
        1
    }

    fn pick(&mut self, view: &View<'_>, totals: &[f64], _rng: &mut Rng, order: &mut Vec<usize>) {
        let name = |i: usize| view.endpoint(&view.rows[i]).map(|endpoint| endpoint.name.clone());
        let after = |i: &usize| name(*i) > self.last;
        let next = (0..totals.len()).find(after).unwrap_or(0);
        order.extend((0..totals.len()).map(|i| (next + i) % totals.len()));
        self.last = name(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn every_endpoint_in_turn() {
        let fixture = Fixture::new(3);
        let mut picker = RoundRobin::default();
        let mut turns = || fixture.pick(&mut picker, &[0.0, 9.0, 1.0], 1);
        assert_eq!(turns(), [0, 1, 2]);
        assert_eq!(turns(), [1, 2, 0]);
        assert_eq!(turns(), [2, 0, 1]);
        assert_eq!(turns(), [0, 1, 2]);
    }
}
