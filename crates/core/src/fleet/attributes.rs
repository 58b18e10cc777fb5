//! Which numbers has somebody told about an endpoint, and do they still hold?
//!
//! A number belongs to the producer that told it, and has a key. It is stale once it is older than
//! it was said to hold.

use std::time::Duration;

use super::{AttributeState, Name};
use crate::Time;

/// Most numbers that are kept about one endpoint; a configuration names each of them.
pub const ATTRIBUTES_MAX: usize = 256;

/// The numbers of one endpoint, few enough to be searched one by one.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Attributes(Vec<Attribute>);

#[derive(Clone, Debug, PartialEq)]
struct Attribute {
    key: Name,
    producer: Name,
    value: f64,
    at: Time,
    valid_for: Duration,
}

impl Attributes {
    /// The newest value that is not stale; of equally new ones that of the producer whose name
    /// sorts first.
    pub(super) fn get(&self, now: Time, key: &str, producer: Option<&str>) -> Option<f64> {
        let told = self.0.iter().filter(|told| told.key.as_str() == key);
        let asked = told.filter(|told| producer.is_none_or(|name| told.producer.as_str() == name));
        let fresh = asked.filter(|told| now.since(told.at) <= told.valid_for);
        let newest = fresh.max_by(|a, b| a.at.cmp(&b.at).then_with(|| b.producer.cmp(&a.producer)));
        newest.map(|told| told.value)
    }

    /// All of them, stale ones included.
    pub(super) fn state(&self) -> Vec<AttributeState> {
        let state = |told: &Attribute| AttributeState {
            key: told.key.to_string(),
            producer: told.producer.to_string(),
            value: told.value,
            at: told.at,
            valid_for: told.valid_for,
        };
        self.0.iter().map(state).collect()
    }

    /// What [`Attributes::state`] told; of more than the limit the first are kept.
    pub(super) fn restore(states: &[AttributeState]) -> Attributes {
        let attribute = |state: &AttributeState| Attribute {
            key: Name::from(state.key.as_str()),
            producer: Name::from(state.producer.as_str()),
            value: state.value,
            at: state.at,
            valid_for: state.valid_for,
        };
        Attributes(states.iter().take(ATTRIBUTES_MAX).map(attribute).collect())
    }

    /// What is no number is not kept, and ends what was told under its key.
    pub(super) fn set(
        &mut self,
        now: Time,
        producer: &str,
        values: &[(String, f64)],
        valid_for: Duration,
    ) {
        for (key, value) in values {
            let is_it =
                |told: &Attribute| told.key.as_str() == key && told.producer.as_str() == producer;
            let place = self.0.iter().position(is_it);
            match place {
                Some(at) if !value.is_finite() => drop(self.0.swap_remove(at)),
                Some(at) => {
                    let told = &mut self.0[at];
                    (told.value, told.at, told.valid_for) = (*value, now, valid_for);
                }
                None if value.is_finite() && self.0.len() < ATTRIBUTES_MAX => {
                    let (key, producer) = (Name::from(key.as_str()), Name::from(producer));
                    self.0.push(Attribute { key, producer, value: *value, at: now, valid_for });
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn told(values: &[(&str, f64)]) -> Vec<(String, f64)> {
        values.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect()
    }

    #[test]
    fn a_value_holds_as_long_as_it_was_said_to() {
        let mut attributes = Attributes::default();
        attributes.set(Time(5), "p", &told(&[("a", 0.5), ("b", 2.0)]), SECOND);
        attributes.set(Time(5), "p", &told(&[("b", 3.0)]), SECOND * 2);
        let at = |nanos: u64, key: &str| attributes.get(Time(nanos), key, None);
        assert_eq!(at(5, "a"), Some(0.5));
        assert_eq!(at(1_000_000_005, "a"), Some(0.5));
        assert_eq!(at(1_000_000_006, "a"), None);
        assert_eq!(at(1_000_000_006, "b"), Some(3.0));
        assert_eq!(at(5, "c"), None);
    }

    #[test]
    fn producers_do_not_mix_and_the_newest_speaks_for_all() {
        let mut attributes = Attributes::default();
        attributes.set(Time(1), "z", &told(&[("k", 1.0)]), SECOND);
        attributes.set(Time(1), "b", &told(&[("k", 2.0)]), SECOND);
        assert_eq!(attributes.get(Time(1), "k", Some("z")), Some(1.0));
        assert_eq!(attributes.get(Time(1), "k", Some("b")), Some(2.0));
        assert_eq!(attributes.get(Time(1), "k", Some("c")), None);
        assert_eq!(attributes.get(Time(1), "k", None), Some(2.0));
        attributes.set(Time(2), "z", &told(&[("k", 4.0)]), Duration::ZERO);
        assert_eq!(attributes.get(Time(2), "k", None), Some(4.0));
        assert_eq!(attributes.get(Time(3), "k", None), Some(2.0));
    }

    #[test]
    fn what_is_no_number_ends_the_value_and_too_many_are_not_kept() {
        let mut attributes = Attributes::default();
        attributes.set(Time(1), "p", &told(&[("a", 1.0), ("b", f64::NAN)]), SECOND);
        attributes.set(Time(1), "p", &told(&[("a", f64::INFINITY)]), SECOND);
        assert_eq!(attributes, Attributes::default());
        let many: Vec<(String, f64)> =
            (0..ATTRIBUTES_MAX + 5).map(|n| (format!("k{n}"), n as f64)).collect();
        attributes.set(Time(1), "p", &many, SECOND);
        assert_eq!(attributes.0.len(), ATTRIBUTES_MAX);
        attributes.set(Time(1), "p", &told(&[("k0", 7.0)]), SECOND);
        assert_eq!(attributes.get(Time(1), "k0", Some("p")), Some(7.0));
    }
}
