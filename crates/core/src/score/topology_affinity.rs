//! `topology-affinity-scorer`: the nearer to the endpoint of an earlier profile, the better.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::filter::{Nearness, TOPOLOGY_PRODUCER_INERT};
use crate::stage::{Plugin, Scorer, View};

/// `topology-affinity-scorer`: by what the endpoint shares with the one that an earlier profile
/// chose for the same request: host 1, rack 0.2, zone 0.05, region 0.02, else 0. 0 for all when
/// there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TopologyAffinity {
    /// Accepted; where an endpoint runs is read from its labels.
    pub topology_producer_name: Option<String>,
}

impl Plugin for TopologyAffinity {
    fn inert(&self) -> Vec<String> {
        self.topology_producer_name.iter().map(|_| TOPOLOGY_PRODUCER_INERT.to_owned()).collect()
    }
}

impl Scorer for TopologyAffinity {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            let both = view.peer.zip(view.endpoint(row));
            *cell = match both.and_then(|(peer, endpoint)| Nearness::between(peer, endpoint)) {
                Some(Nearness::Host) => 1.0,
                Some(Nearness::Rack) => 0.2,
                Some(Nearness::Zone) => 0.05,
                Some(Nearness::Region) => 0.02,
                None => 0.0,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn nearer_is_better() {
        let mut fixture = Fixture::new(7);
        let places = [
            ["h", "k", "z", "r"],
            ["h", "k", "z", "r"],
            ["h2", "k", "z", "r"],
            ["h3", "k3", "z", "r"],
            ["h4", "k4", "z4", "r"],
            ["h5", "k5", "z5", "r5"],
            ["", "", "z", ""],
        ];
        for (at, place) in places.into_iter().enumerate() {
            fixture.place(at, place);
        }
        let mut scorer = TopologyAffinity::default();
        assert_scores(&fixture.score(&mut scorer), &[0.0; 7]);
        fixture.peer(0);
        assert_scores(&fixture.score(&mut scorer), &[1.0, 1.0, 0.2, 0.05, 0.02, 0.0, 0.05]);
        let mut unknown = Fixture::new(2);
        unknown.peer(0);
        assert_scores(&unknown.score(&mut scorer), &[0.0, 0.0]);
        assert_scores(&Fixture::new(0).score(&mut scorer), &[]);
        assert!(scorer.inert().is_empty());
        scorer.topology_producer_name = Some("mine".into());
        assert_eq!(scorer.inert().len(), 1);
    }
}
