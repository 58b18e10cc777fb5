//! `topology-extractor`: which labels tell where an endpoint runs?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::Plugin;

/// Parameters of `topology-extractor`: names of labels. An empty one stands for the default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TopologyExtractor {
    /// Label of the machine.
    pub hostname: String,
    /// Label of the rack.
    pub rack: String,
    /// Label of the zone.
    pub zone: String,
    /// Label of the region.
    pub region: String,
}

impl Default for TopologyExtractor {
    fn default() -> TopologyExtractor {
        TopologyExtractor {
            hostname: "kubernetes.io/hostname".to_owned(),
            rack: "topology.kubernetes.io/rack".to_owned(),
            zone: "topology.kubernetes.io/zone".to_owned(),
            region: "topology.kubernetes.io/region".to_owned(),
        }
    }
}

impl Plugin for TopologyExtractor {}

impl TopologyExtractor {
    /// The same, with the default where a name is empty.
    pub fn labels(&self) -> TopologyExtractor {
        let default = TopologyExtractor::default();
        let or = |name: &String, default: String| {
            if name.is_empty() { default } else { name.clone() }
        };
        TopologyExtractor {
            hostname: or(&self.hostname, default.hostname),
            rack: or(&self.rack, default.rack),
            zone: or(&self.zone, default.zone),
            region: or(&self.region, default.region),
        }
    }
}
