//! What is known about an endpoint, in a form that can be kept and taken up again?

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::attributes::Attributes;
use super::{Endpoint, EndpointId, EndpointSpec, EngineMetrics, Fleet, Name, ServedModel, Slot};
use crate::Time;

/// One endpoint of a snapshot: everything that the fleet's table holds about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointState {
    /// Its place in the table; decisions name it so.
    pub id: EndpointId,
    /// What the host said about it.
    pub spec: EndpointSpec,
    /// The last scrape and when it was.
    pub metrics: Option<(Time, EngineMetrics)>,
    /// Scrapes that failed since.
    pub scrape_failures: u32,
    /// What it serves; `None`: it has not been asked.
    pub models: Option<Vec<ServedModel>>,
    /// Numbers that producers told.
    pub attributes: Vec<AttributeState>,
    /// Tokens per block, as its events showed.
    pub block_size_seen: Option<u32>,
    /// Failures since its last answer.
    pub failures: u32,
    /// Until then others go first.
    pub avoided_until: Time,
}

/// One number that a producer told about an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttributeState {
    /// What it is.
    pub key: String,
    /// Who told.
    pub producer: String,
    /// The number.
    #[serde(with = "crate::journal::exact")]
    pub value: f64,
    /// When it was told.
    pub at: Time,
    /// How long it holds.
    pub valid_for: Duration,
}

impl Endpoint {
    pub(crate) fn state(&self) -> EndpointState {
        EndpointState {
            id: self.id,
            spec: EndpointSpec {
                name: self.name.to_string(),
                address: self.address.to_string(),
                labels: self.labels.clone(),
                rank: self.rank,
                replay_available: self.replay_available,
                events_expected: self.events_expected,
            },
            metrics: self.metrics.clone(),
            scrape_failures: self.scrape_failures,
            models: self.models.clone(),
            attributes: self.attributes.state(),
            block_size_seen: self.block_size_seen,
            failures: self.failures,
            avoided_until: self.avoided_until,
        }
    }
}

impl Fleet {
    /// Models that any endpoint has as an adapter, or had since its last look at models.
    pub(crate) fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(String::as_str)
    }

    /// A table of these endpoints.
    ///
    /// # Errors
    /// Two of them share a place, or an address and rank; in words.
    pub(crate) fn restore<'a>(
        endpoints: impl Iterator<Item = &'a EndpointState>,
        adapters: &[String],
    ) -> Result<Fleet, String> {
        let mut fleet = Fleet::default();
        let mut places: BTreeMap<(&str, u32), &str> = BTreeMap::new();
        for state in endpoints {
            let EndpointSpec { name, address, rank, .. } = &state.spec;
            if let Some(other) = places.insert((address, *rank), name) {
                return Err(format!("`{other}` and `{name}` are one address and rank"));
            }
            fleet.restore_endpoint(state)?;
        }
        let mut order: Vec<u16> = fleet.order.clone();
        order.sort_by(|a, b| fleet.sort_key(*a).cmp(&fleet.sort_key(*b)));
        fleet.order = order;
        fleet.adapters = adapters.iter().cloned().collect();
        Ok(fleet)
    }

    fn restore_endpoint(&mut self, state: &EndpointState) -> Result<(), String> {
        let EndpointState { id, spec, .. } = state;
        let slot = usize::from(id.slot);
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, Slot::default);
        }
        let place = &mut self.slots[slot];
        if let Some(other) = &place.endpoint {
            return Err(format!("`{}` and `{}` share a place", other.name, spec.name));
        }
        place.generation = id.generation;
        place.endpoint = Some(Endpoint {
            id: *id,
            name: Name::from(spec.name.as_str()),
            address: Name::from(spec.address.as_str()),
            labels: spec.labels.clone(),
            rank: spec.rank,
            replay_available: spec.replay_available,
            events_expected: spec.events_expected,
            metrics: state.metrics.clone(),
            scrape_failures: state.scrape_failures,
            models: state.models.clone(),
            attributes: Attributes::restore(&state.attributes),
            block_size_seen: state.block_size_seen,
            failures: state.failures,
            avoided_until: state.avoided_until,
        });
        self.order.push(id.slot);
        Ok(())
    }
}
