//! Which plugin types exist? One table, from which types, parameters and roles follow.
//!
//! To add a plugin: write its file (a struct with `Deserialize` for the parameters, and the trait
//! of its role), and add its line here.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, Visitor};

use crate::config::Ignored;
use crate::stage::{Filter, Picker, Scorer};
use crate::{filter, pick, produce, score};

/// What a plugin does in the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Chooses which profiles run.
    Handler,
    /// Removes candidates.
    Filter,
    /// Rates candidates.
    Scorer,
    /// Orders candidates.
    Picker,
    /// Computes what others read.
    Producer,
}

/// A plugin as the pipeline runs it: one part per role that it has.
#[derive(Default)]
pub struct Parts {
    /// As a filter.
    pub filter: Option<Box<dyn Filter>>,
    /// As a scorer.
    pub scorer: Option<Box<dyn Scorer>>,
    /// As a picker.
    pub picker: Option<Box<dyn Picker>>,
}

macro_rules! part {
    ($parts:ident, $plugin:ident, Filter) => {
        $parts.filter = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Scorer) => {
        $parts.scorer = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Picker) => {
        $parts.picker = Some(Box::new($plugin.clone()))
    };
    ($parts:ident, $plugin:ident, Handler) => {};
    ($parts:ident, $plugin:ident, Producer) => {};
}

macro_rules! plugins {
    ($($variant:ident($parameters:ty) $names:expr => [$($role:ident)+];)+) => {
        /// A plugin type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum PluginKind {
            $(
                #[doc = concat!("See [`PluginSpec::", stringify!($variant), "`].")]
                $variant,
            )+
        }

        /// A plugin type with its parameters.
        #[derive(Clone, Debug, PartialEq)]
        pub enum PluginSpec {
            $(
                #[doc = concat!("Type names: `", stringify!($names), "`.")]
                $variant($parameters),
            )+
        }

        impl PluginKind {
            /// Every type.
            pub const ALL: &'static [PluginKind] = &[$(PluginKind::$variant),+];

            /// Names in configurations, the current one first.
            pub fn names(self) -> &'static [&'static str] {
                match self {
                    $(PluginKind::$variant => &$names,)+
                }
            }

            /// What it does.
            pub fn roles(self) -> &'static [Role] {
                match self {
                    $(PluginKind::$variant => &[$(Role::$role),+],)+
                }
            }

            /// Reads the parameters of this type; `null` stands for none.
            pub fn read<'de, D: Deserializer<'de>>(self, from: D) -> Result<PluginSpec, D::Error> {
                match self {
                    $(PluginKind::$variant => {
                        parameters::<$parameters, D>(from).map(PluginSpec::$variant)
                    })+
                }
            }
        }

        impl PluginSpec {
            /// The type.
            pub fn kind(&self) -> PluginKind {
                match self {
                    $(PluginSpec::$variant(_) => PluginKind::$variant,)+
                }
            }

            /// The plugin as the pipeline runs it, with fresh state.
            pub fn parts(&self) -> Parts {
                #[allow(unused_mut, reason = "producers and handlers have no part")]
                let mut parts = Parts::default();
                match self {
                    $(PluginSpec::$variant(_plugin) => {
                        $(part!(parts, _plugin, $role);)+
                    })+
                }
                parts
            }
        }
    };
}

plugins! {
    SingleProfileHandler(Ignored) ["single-profile-handler"] => [Handler];
    LabelSelectorFilter(filter::LabelSelector) ["label-selector-filter"] => [Filter];
    DecodeFilter(filter::Decode) ["decode-filter"] => [Filter];
    PrefillFilter(filter::Prefill) ["prefill-filter"] => [Filter];
    PrefixAffinityFilter(filter::PrefixAffinity) ["prefix-cache-affinity-filter"] => [Filter];
    QueueScorer(score::Queue) ["queue-scorer"] => [Scorer];
    RunningScorer(score::Running) ["running-requests-size-scorer"] => [Scorer];
    KvUsageScorer(score::KvUsage)
        ["kv-cache-utilization-scorer", "kv-cache-scorer"] => [Scorer];
    LoadAwareScorer(score::LoadAware) ["load-aware-scorer"] => [Scorer];
    ActiveRequestScorer(score::ActiveRequest) ["active-request-scorer"] => [Scorer];
    TokenLoadScorer(score::TokenLoad) ["token-load-scorer"] => [Scorer];
    PrefixScorer(score::Prefix) ["prefix-cache-scorer"] => [Scorer];
    PrecisePrefixScorer(score::PrecisePrefix) ["precise-prefix-cache-scorer"] => [Scorer];
    NoHitLruScorer(score::NoHitLru) ["no-hit-lru-scorer"] => [Scorer];
    SessionAffinityScorer(score::SessionAffinity) ["session-affinity-scorer"] => [Scorer];
    CostScorer(score::Cost) ["kvroute-cost-scorer"] => [Scorer];
    LoraAffinityScorer(score::LoraAffinity) ["lora-affinity-scorer"] => [Scorer];
    ApproxPrefixProducer(produce::ApproxPrefix) ["approx-prefix-cache-producer"] => [Producer];
    PrecisePrefixProducer(produce::PrecisePrefix)
        ["precise-prefix-cache-producer"] => [Producer];
    InflightLoadProducer(produce::InflightLoad) ["inflight-load-producer"] => [Producer];
    TokenProducer(produce::Tokens) ["token-producer", "tokenizer"] => [Producer];
    MaxScorePicker(pick::MaxScore) ["max-score-picker"] => [Picker];
    RandomPicker(pick::Random) ["random-picker"] => [Picker];
    WeightedRandomPicker(pick::WeightedRandom) ["weighted-random-picker"] => [Picker];
    RoundRobinPicker(pick::RoundRobin) ["kvroute-round-robin-picker"] => [Picker];
}

impl PluginKind {
    /// The current name.
    pub fn name(self) -> &'static str {
        self.names()[0]
    }

    /// The type of a name, old names included.
    pub fn of_name(name: &str) -> Option<PluginKind> {
        PluginKind::ALL.iter().copied().find(|kind| kind.names().contains(&name))
    }

    /// Whether it has a role.
    pub fn is(self, role: Role) -> bool {
        self.roles().contains(&role)
    }
}

/// Reads parameters; a missing or `null` value is an empty map, so that a required field is
/// reported by its name.
fn parameters<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    struct Optional<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Optional<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of parameters")
        }
        fn visit_none<E: de::Error>(self) -> Result<T, E> {
            T::deserialize(crate::config::Buffered::Map(Vec::new()).into_deserializer::<E>())
        }
        fn visit_unit<E: de::Error>(self) -> Result<T, E> {
            self.visit_none()
        }
        fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<T, D::Error> {
            T::deserialize(inner)
        }
    }
    from.deserialize_option(Optional(std::marker::PhantomData))
}

/// Reads a type name: the type, and which of its names it was.
pub(crate) struct KindSeed;

impl<'de> DeserializeSeed<'de> for KindSeed {
    type Value = (PluginKind, &'static str);
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = (PluginKind, &'static str);
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a plugin type")
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
                PluginKind::ALL
                    .iter()
                    .find_map(|kind| Some((*kind, *kind.names().iter().find(|n| **n == name)?)))
                    .ok_or_else(|| E::custom(unknown_type(name)))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Reads the parameters of a type that is known.
pub(crate) struct ParametersSeed(pub PluginKind);

impl<'de> DeserializeSeed<'de> for ParametersSeed {
    type Value = PluginSpec;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<PluginSpec, D::Error> {
        self.0.read(deserializer)
    }
}

fn unknown_type(name: &str) -> String {
    let names = PluginKind::ALL.iter().flat_map(|kind| kind.names().iter().copied());
    format!(
        "plugin type `{name}` is not registered; valid types, nearest first: {}",
        nearest_first(name, names).join(", ")
    )
}

/// Orders names by how little must be typed differently to get from `wanted` to them.
pub fn nearest_first<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.collect();
    names.sort_by_key(|name| (edit_distance(wanted, name), *name));
    names
}

/// Levenshtein distance over bytes, on the first 64 of each: names are short, input may not be.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (&a.as_bytes()[..a.len().min(64)], &b.as_bytes()[..b.len().min(64)]);
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_nearest_comes_first() {
        let mut names: Vec<&str> =
            PluginKind::ALL.iter().flat_map(|kind| kind.names().iter().copied()).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(nearest_first("queu-scorer", names.into_iter())[0], "queue-scorer");
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
    }

    #[test]
    fn a_plugin_has_the_parts_of_its_roles() {
        for kind in PluginKind::ALL {
            let none = crate::config::Buffered::Null;
            let spec = kind.read(none.into_deserializer::<de::value::Error>()).unwrap();
            let parts = spec.parts();
            assert_eq!(parts.filter.is_some(), kind.is(Role::Filter), "{kind:?}");
            assert_eq!(parts.scorer.is_some(), kind.is(Role::Scorer), "{kind:?}");
            assert_eq!(parts.picker.is_some(), kind.is(Role::Picker), "{kind:?}");
        }
    }
}
