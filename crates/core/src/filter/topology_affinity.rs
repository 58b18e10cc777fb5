//! `topology-affinity-filter`: is the endpoint near the one that an earlier profile chose?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::fleet::Endpoint;
use crate::stage::{Filter, Plugin, View};

/// What topology plugins say about `topologyProducerName`.
pub(crate) const TOPOLOGY_PRODUCER_INERT: &str =
    "topologyProducerName: where an endpoint runs is read from its labels";

/// `topology-affinity-filter`: keeps endpoints that are at least so near to the endpoint that an
/// earlier profile chose for the same request. All pass when there is none, when it is not known
/// where that one runs, or when nobody is near enough.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TopologyAffinity {
    /// The loosest that passes.
    pub min_affinity: Nearness,
    /// Accepted; where an endpoint runs is read from its labels.
    pub topology_producer_name: Option<String>,
}

/// How near two endpoints are: the tightest that they share. From nearest to farthest.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Deserialize,
    JsonSchema,
    serde::Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Nearness {
    /// Label `kubernetes.io/hostname`.
    #[default]
    #[serde(alias = "")]
    Host,
    /// Label `topology.kubernetes.io/rack`.
    Rack,
    /// Label `topology.kubernetes.io/zone`.
    Zone,
    /// Label `topology.kubernetes.io/region`.
    Region,
}

impl Nearness {
    /// The tightest that both share; `None`: nothing, or nothing is known.
    pub fn between(a: &Endpoint, b: &Endpoint) -> Option<Nearness> {
        let (a, b) = (a.topology(), b.topology());
        let levels = [
            (Nearness::Host, a.hostname, b.hostname),
            (Nearness::Rack, a.rack, b.rack),
            (Nearness::Zone, a.zone, b.zone),
            (Nearness::Region, a.region, b.region),
        ];
        let shared = levels.into_iter().find(|(_, a, b)| a.is_some() && a == b);
        shared.map(|(nearness, ..)| nearness)
    }
}

impl Plugin for TopologyAffinity {
    fn inert(&self) -> Vec<String> {
        self.topology_producer_name.iter().map(|_| TOPOLOGY_PRODUCER_INERT.to_owned()).collect()
    }
}

impl Filter for TopologyAffinity {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        let Some(peer) = view.peer else { return };
        for (row, keep) in view.rows.iter().zip(keep.iter_mut()) {
            let nearness = view.endpoint(row).and_then(|e| Nearness::between(peer, e));
            *keep = nearness.is_some_and(|nearness| nearness <= self.min_affinity);
        }
        if !keep.contains(&true) {
            keep.fill(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    /// The peer, and one endpoint for each nearness, the last in another region.
    fn fixture() -> Fixture {
        let mut fixture = Fixture::new(6);
        let places = [
            ["h", "k", "z", "r"],
            ["h", "k", "z", "r"],
            ["h2", "k", "z", "r"],
            ["h3", "k3", "z", "r"],
            ["h4", "k4", "z4", "r"],
            ["h5", "k5", "z5", "r5"],
        ];
        for (at, place) in places.into_iter().enumerate() {
            fixture.place(at, place);
        }
        fixture
    }

    #[test]
    fn as_near_as_asked_for() {
        let mut fixture = fixture();
        let filter = |min_affinity| TopologyAffinity { min_affinity, ..Default::default() };
        assert_eq!(fixture.filter(&mut filter(Nearness::Host)), [true; 6]);
        fixture.peer(0);
        let table = [
            (Nearness::Host, [true, true, false, false, false, false]),
            (Nearness::Rack, [true, true, true, false, false, false]),
            (Nearness::Zone, [true, true, true, true, false, false]),
            (Nearness::Region, [true, true, true, true, true, false]),
        ];
        for (nearness, kept) in table {
            assert_eq!(fixture.filter(&mut filter(nearness)), kept, "{nearness:?}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_near_and_nobody_near_means_all() {
        let mut fixture = Fixture::new(3);
        fixture.peer(0);
        assert_eq!(fixture.filter(&mut TopologyAffinity::default()), [true; 3]);
        fixture.place(0, ["h", "", "", ""]);
        fixture.place(1, ["", "", "", ""]);
        assert_eq!(fixture.filter(&mut TopologyAffinity::default()), [true, false, false]);
        let mut apart = Fixture::new(2);
        apart.place(0, ["h", "k", "z", "r"]);
        apart.place(1, ["h2", "k2", "z2", "r2"]);
        apart.peer(0);
        apart.drop_row(0);
        assert_eq!(apart.filter(&mut TopologyAffinity::default()), [true]);
        assert_eq!(Fixture::new(0).filter(&mut TopologyAffinity::default()), [true; 0]);
    }
}
