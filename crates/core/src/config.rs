//! What did the user write? The types of llm-d's `EndpointPickerConfig`, plus the key `kvroute`.
//!
//! Everything is strict: an unknown field anywhere is an error that lists the valid ones. Plugin
//! entries are read by a visitor of their own, without a tree in between, so that an error points
//! at the offending character; see [`PluginEntry`].

use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, IgnoredAny, IntoDeserializer, MapAccess, Visitor,
};

pub use crate::config_buffer::Buffered;
use crate::config_tests::ConfigTest;
use crate::plugin::{KindSeed, ParametersSeed, PluginKind, PluginSpec};
pub use crate::settings::Settings;

/// A whole configuration file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EndpointPickerConfig {
    /// API group and version; may be left out.
    pub api_version: Option<ApiVersion>,
    /// May be left out.
    pub kind: Option<Kind>,
    /// `flowControl`, `haPopulateNonLeaderDatastore`; `name=false` switches one off.
    #[schemars(inner(regex(
        pattern = r"^(flowControl|haPopulateNonLeaderDatastore)(=(true|false|[tf01]))?$"
    )))]
    pub feature_gates: Vec<String>,
    /// The plugins that profiles and other sections refer to by name.
    pub plugins: Vec<PluginEntry>,
    /// How requests are scheduled; empty: one profile of all plugins.
    pub scheduling_profiles: Vec<ProfileEntry>,
    /// Where signals come from.
    pub data_layer: Option<DataLayer>,
    /// Queueing in the router.
    pub flow_control: Option<FlowControl>,
    /// How bodies are read.
    pub request_handler: Option<RequestHandler>,
    /// Deprecated place of `flowControl.saturationDetector`.
    pub saturation_detector: Option<PluginRef>,
    /// Deprecated place of `requestHandler.parsers`.
    pub parser: Option<PluginRef>,
    /// kvroute's own extension: limits, and tests of the configuration.
    pub kvroute: Kvroute,
}

/// The key `kvroute`: every limit by its name, and `tests`.
#[derive(Clone, Debug, Default, PartialEq, JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
pub struct Kvroute {
    /// All limits.
    #[schemars(flatten)]
    pub limits: Settings,
    /// What must be decided where; `kvroute check` runs them.
    #[schemars(default)]
    pub tests: Vec<ConfigTest>,
}

impl From<Settings> for Kvroute {
    fn from(limits: Settings) -> Kvroute {
        Kvroute { limits, tests: Vec::new() }
    }
}

impl<'de> Deserialize<'de> for Kvroute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Kvroute, D::Error> {
        struct Section;
        impl<'de> Visitor<'de> for Section {
            type Value = Kvroute;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of limits, with `tests`")
            }
            fn visit_unit<E>(self) -> Result<Kvroute, E> {
                Ok(Kvroute::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Kvroute, A::Error> {
                let mut tests = None;
                let limits = LimitsAccess { map, tests: &mut tests };
                let limits = Settings::deserialize(MapAccessDeserializer::new(limits))?;
                Ok(Kvroute { limits, tests: tests.unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(Section)
    }
}

/// The keys of a map but `tests`, whose value is put aside: so an error in either keeps its place.
struct LimitsAccess<'a, A> {
    map: A,
    tests: &'a mut Option<Vec<ConfigTest>>,
}

const TESTS: &str = "tests";

impl<'de, A: MapAccess<'de>> MapAccess<'de> for LimitsAccess<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        mut seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        loop {
            match self.map.next_key_seed(KeyButTests(seed))? {
                None => return Ok(None),
                Some(Key::Limit(key)) => return Ok(Some(key)),
                Some(Key::Tests(again)) => {
                    if self.tests.is_some() {
                        return Err(de::Error::duplicate_field(TESTS));
                    }
                    *self.tests = Some(self.map.next_value()?);
                    seed = again;
                }
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

struct KeyButTests<K>(K);

/// A key of a limit as it is read, or the seed again that would have read it.
enum Key<L, S> {
    Limit(L),
    Tests(S),
}

impl<'de, K: DeserializeSeed<'de>> DeserializeSeed<'de> for KeyButTests<K> {
    type Value = Key<K::Value, K>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl<'de, K: DeserializeSeed<'de>> Visitor<'de> for KeyButTests<K> {
    type Value = Key<K::Value, K>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a limit, or `tests`")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        match name {
            TESTS => Ok(Key::Tests(self.0)),
            name => self.0.deserialize(name.into_deserializer()).map(Key::Limit),
        }
    }
}

/// API groups under which the configuration is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum ApiVersion {
    /// The current group.
    #[serde(rename = "llm-d.ai/v1alpha1")]
    LlmD,
    /// The deprecated group.
    #[serde(rename = "inference.networking.x-k8s.io/v1alpha1")]
    Inference,
}

/// The only kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Kind {
    /// `EndpointPickerConfig`.
    EndpointPickerConfig,
}

/// A reference to a plugin by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["pluginRef"]))]
pub struct PluginRef {
    /// Name of an entry of `plugins`.
    #[serde(default)]
    pub plugin_ref: String,
}

/// One scheduling profile.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["name"]))]
pub struct ProfileEntry {
    /// Distinguishes profiles.
    #[serde(default)]
    pub name: String,
    /// In the order in which filters run.
    #[serde(default)]
    pub plugins: Vec<ProfilePlugin>,
}

/// One plugin of a profile.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["pluginRef"]))]
pub struct ProfilePlugin {
    /// Name of an entry of `plugins`.
    #[serde(default)]
    pub plugin_ref: String,
    /// For scorers; 1 when left out.
    #[schemars(range(min = 0.0))]
    pub weight: Option<f64>,
}

/// `dataLayer`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DataLayer {
    /// Whether the metrics source is added by itself; true when left out.
    pub inject_defaults: Option<bool>,
    /// Sources and what reads them.
    pub sources: Vec<DataSource>,
    /// Endpoint discovery.
    pub discovery: Option<PluginRef>,
    /// Router replicas.
    pub peer_discovery: Option<PluginRef>,
    /// What replicas tell each other.
    pub cross_replica_syncer_plugin_ref: Option<String>,
    /// How often.
    pub cross_replica_sync_interval: Option<GoDuration>,
}

/// One data source.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataSource {
    /// The source.
    pub plugin_ref: String,
    /// What reads it.
    #[serde(default)]
    pub extractors: Vec<PluginRef>,
}

/// `flowControl`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct FlowControl {
    /// Bytes queued over all bands; 0: unlimited.
    pub max_bytes: Option<Quantity>,
    /// Requests queued over all bands; 0: unlimited.
    pub max_requests: Option<Quantity>,
    /// Longest wait; `"0s"` switches it off.
    #[serde(rename = "defaultRequestTTL")]
    pub default_request_ttl: Option<GoDuration>,
    /// Longest wait while there is no endpoint.
    #[serde(rename = "noEndpointRequestTTL")]
    pub no_endpoint_request_ttl: Option<GoDuration>,
    /// Template of bands for priorities that are not listed.
    pub default_priority_band: Option<PriorityBand>,
    /// The same for negative priorities.
    pub default_negative_priority_band: Option<PriorityBand>,
    /// Listed bands.
    pub priority_bands: Vec<PriorityBand>,
    /// Policy that limits what a band may use.
    pub usage_limit_policy_plugin_ref: Option<String>,
    /// What decides that the pool is full.
    pub saturation_detector: Option<PluginRef>,
    /// Whether running requests of negative priority may be evicted.
    pub enable_eviction: Option<bool>,
}

/// One priority band.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PriorityBand {
    /// Higher goes first.
    pub priority: i64,
    /// Bytes queued in this band.
    pub max_bytes: Option<Quantity>,
    /// Requests queued in this band.
    pub max_requests: Option<Quantity>,
    /// Between flows.
    pub fairness_policy_ref: Option<String>,
    /// Within a flow.
    pub ordering_policy_ref: Option<String>,
}

/// `requestHandler`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RequestHandler {
    /// In order of preference.
    pub parsers: Vec<PluginRef>,
}

/// One entry of `plugins`: `{type, name?, parameters?}`, in any order.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginEntry {
    /// What other sections call it; the type's name when left out.
    pub name: Option<String>,
    /// Type and typed parameters.
    pub spec: PluginSpec,
    /// See [`PluginEntry::written`].
    pub(crate) written: &'static str,
}

impl From<PluginSpec> for PluginEntry {
    fn from(spec: PluginSpec) -> PluginEntry {
        PluginEntry { name: None, written: spec.kind().name(), spec }
    }
}

impl PluginEntry {
    /// The name that references use.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.spec.kind().name())
    }

    /// The type as it is written, an old name included.
    pub fn written(&self) -> &'static str {
        self.written
    }
}

impl<'de> Deserialize<'de> for PluginEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PluginEntry, D::Error> {
        deserializer.deserialize_map(PluginEntryVisitor)
    }
}

struct PluginEntryVisitor;

/// The keys of a plugin entry.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "camelCase")]
enum EntryKey {
    Type,
    Name,
    Parameters,
}

/// Parameters as far as they can be known: typed once the type is known.
enum Parameters {
    Typed(Box<PluginSpec>),
    /// Read before `type`, as sorted YAML has it.
    Early(Buffered),
}

impl<'de> Visitor<'de> for PluginEntryVisitor {
    type Value = PluginEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plugin: a map with `type` and optionally `name` and `parameters`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PluginEntry, A::Error> {
        let mut kind: Option<PluginKind> = None;
        let mut written = "";
        let mut name: Option<Option<String>> = None;
        let mut parameters: Option<Parameters> = None;
        while let Some(key) = map.next_key::<EntryKey>()? {
            match key {
                EntryKey::Type if kind.is_some() => return Err(de::Error::duplicate_field("type")),
                EntryKey::Type => {
                    let (found, as_written) = map.next_value_seed(KindSeed)?;
                    (kind, written) = (Some(found), as_written);
                }
                EntryKey::Name if name.is_some() => return Err(de::Error::duplicate_field("name")),
                EntryKey::Name => name = Some(map.next_value()?),
                EntryKey::Parameters if parameters.is_some() => {
                    return Err(de::Error::duplicate_field("parameters"));
                }
                EntryKey::Parameters => {
                    parameters = Some(match kind {
                        Some(kind) => {
                            Parameters::Typed(Box::new(map.next_value_seed(ParametersSeed(kind))?))
                        }
                        None => Parameters::Early(map.next_value()?),
                    });
                }
            }
        }
        let kind = kind.ok_or_else(|| de::Error::custom("this plugin is missing a `type`"))?;
        let spec = match parameters {
            Some(Parameters::Typed(spec)) => *spec,
            Some(Parameters::Early(buffered)) => {
                kind.read(buffered.into_deserializer::<A::Error>())?
            }
            None => kind.read(Buffered::Null.into_deserializer::<A::Error>())?,
        };
        // A plugin without a name is called like its type, as it is written: by its old name where
        // that stands there, because profiles refer to it so.
        let named = name.flatten().filter(|n| !n.is_empty());
        let old = (written != kind.name()).then(|| written.to_owned());
        Ok(PluginEntry { name: named.or(old), spec, written })
    }
}

/// A duration in Go's notation: `"60s"`, `"1m30s"`, `"200ms"`, `"0"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(pub Duration);

impl GoDuration {
    /// Reads Go's notation; `None` for anything else, negative durations included.
    pub fn parse(text: &str) -> Option<GoDuration> {
        if text == "0" {
            return Some(GoDuration(Duration::ZERO));
        }
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let number: f64 = rest[..digits].parse().ok()?;
            rest = &rest[digits..];
            let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
            seconds += number * unit_seconds(&rest[..unit])?;
            rest = &rest[unit..];
        }
        if text.is_empty() {
            return None;
        }
        Duration::try_from_secs_f64(seconds).ok().map(GoDuration)
    }
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit {
        "ns" => 1e-9,
        "us" | "µs" | "μs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    })
}

impl serde::Serialize for GoDuration {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = match (self.0.subsec_nanos(), self.0.subsec_millis()) {
            (0, _) => format!("{}s", self.0.as_secs()),
            (nanos, millis) if nanos == millis * 1_000_000 => format!("{}ms", self.0.as_millis()),
            _ => format!("{}ns", self.0.as_nanos()),
        };
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<GoDuration, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = GoDuration;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as \"60s\", \"1m30s\" or \"200ms\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<GoDuration, E> {
                GoDuration::parse(text)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A Kubernetes quantity without fractions of one: `5000`, `"1G"`, `"64Mi"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(pub u64);

impl Quantity {
    /// Reads a quantity; `None` for anything else, negative ones included.
    pub fn parse(text: &str) -> Option<Quantity> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let number: f64 = text[..digits].parse().ok()?;
        let unit = match &text[digits..] {
            "" => 1.0,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "P" => 1e15,
            "E" => 1e18,
            "Ki" => 1024.0,
            "Mi" => 1024f64.powi(2),
            "Gi" => 1024f64.powi(3),
            "Ti" => 1024f64.powi(4),
            "Pi" => 1024f64.powi(5),
            "Ei" => 1024f64.powi(6),
            exponent if exponent.starts_with(['e', 'E']) => {
                format!("1{exponent}").parse().ok().filter(|x: &f64| x.is_finite())?
            }
            _ => return None,
        };
        Some(Quantity((number * unit).ceil() as u64))
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Quantity, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Quantity;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a quantity that is not negative, such as 5000, \"1G\" or \"64Mi\"")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Quantity, E> {
                Ok(Quantity(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Quantity, E> {
                let unexpected = de::Unexpected::Signed(value);
                u64::try_from(value).map(Quantity).map_err(|_| E::invalid_value(unexpected, &self))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                Quantity::parse(text)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// Parameters that are accepted and mean nothing, as llm-d has it for some plugins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ignored;

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Ignored, D::Error> {
        deserializer.deserialize_ignored_any(IgnoredAny).map(|_| Ignored)
    }
}

/// Documents a type that is read from text or anything else by hand.
macro_rules! written_schema {
    ($($type:ty, $name:literal => $schema:expr;)+) => {$(
        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                let schema: fn(&mut SchemaGenerator) -> Schema = $schema;
                schema(generator)
            }
        }
    )+};
}

written_schema! {
    GoDuration, "Duration" => |_| json_schema!({
        "type": "string",
        "pattern": r"^\+?(0|([0-9]*\.?[0-9]+(ns|us|µs|μs|ms|s|m|h))+)$",
        "examples": ["60s", "1m30s", "200ms"],
    });
    Quantity, "Quantity" => |_| json_schema!({
        "type": ["integer", "string"],
        "minimum": 0,
        "pattern": r"^[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?$",
        "examples": [5000, "1G", "64Mi"],
    });
    Ignored, "Ignored" => |_| json_schema!({});
    PluginEntry, "PluginEntry" => crate::plugin::entry_schema;
}
