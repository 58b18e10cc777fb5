//! `disagg-profile-handler`: encode, prefill and decode on endpoints of their own.

use schemars::JsonSchema;
use serde::de::{self, Deserialize, Deserializer};

use crate::plugin::Role;
use crate::stage::{Plugin, Reference};

/// Name of the prefill decider that `pd-profile-handler` asks when it names none.
const PD_DECIDER: &str = "prefix-based-pd-decider";

/// `disagg-profile-handler`. The decode endpoint gets the request; headers tell it where to have
/// images encoded (`x-encoder-hosts-ports`) and the prompt computed (`x-prefiller-host-port`)
/// before. A step without a decider, or whose decider says no, does not run; a step that finds no
/// endpoint is left to the decode endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Disagg {
    /// Which of the two endpoints is chosen first.
    pub stage_order: StageOrder,
    /// Names of the profiles.
    pub profiles: Option<DisaggProfiles>,
    /// Names of the deciders.
    pub deciders: Option<Deciders>,
    /// Older form of `profiles.decode`; not to be mixed with the new form.
    pub decode_profile: Option<String>,
    /// Older form of `profiles.prefill`.
    pub prefill_profile: Option<String>,
    /// Older form of `profiles.encode`.
    pub encode_profile: Option<String>,
    /// Older form of `deciders.prefill`.
    pub prefill_decider_plugin_name: Option<String>,
    /// Older form of `deciders.encode`.
    pub encode_decider_plugin_name: Option<String>,
    /// Oldest form of `deciders.prefill`.
    pub decider_plugin_name: Option<String>,
}

/// Which endpoint is chosen first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StageOrder {
    /// Decode, then, near it, encode and prefill.
    #[default]
    DecodeFirst,
    /// Prefill, then, near it, decode. Prefill always runs: there is no decider for it.
    PrefillFirst,
}

impl<'de> Deserialize<'de> for StageOrder {
    /// llm-d also takes the words in other spellings: `prefillFirst`, `prefill_first`, `prefill`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<StageOrder, D::Error> {
        const NAMES: &[&str] = &["decode-first", "prefill-first"];
        let written = String::deserialize(deserializer)?;
        match written.replace(['-', '_'], "").to_ascii_lowercase().as_str() {
            "" | "decodefirst" | "decode" => Ok(StageOrder::DecodeFirst),
            "prefillfirst" | "prefill" => Ok(StageOrder::PrefillFirst),
            _ => Err(de::Error::unknown_variant(&written, NAMES)),
        }
    }
}

/// Names of the profiles of each step.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DisaggProfiles {
    /// Chooses who answers.
    pub decode: String,
    /// Chooses who computes the prompt.
    pub prefill: String,
    /// Chooses who encodes images, audio and video.
    pub encode: String,
}

impl Default for DisaggProfiles {
    fn default() -> DisaggProfiles {
        let [decode, prefill, encode] = ["decode", "prefill", "encode"].map(String::from);
        DisaggProfiles { decode, prefill, encode }
    }
}

/// Names of the deciders of each step; a step without one does not run.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Deciders {
    /// Whether the prompt is computed elsewhere.
    pub prefill: Option<String>,
    /// Whether images are encoded elsewhere.
    pub encode: Option<String>,
}

/// `pd-profile-handler`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PrefillDecode {
    /// Chooses who answers.
    pub decode_profile: String,
    /// Chooses who computes the prompt.
    pub prefill_profile: String,
    /// Whether the prompt is computed elsewhere.
    pub decider_plugin_name: String,
    /// With it, requests go to this port of the chosen host, and the chosen rank stands in
    /// `x-data-parallel-host-port`; 0: off.
    pub primary_port: u16,
    /// Deprecated and without effect.
    pub prefix_plugin_type: Option<String>,
    /// Deprecated and without effect.
    pub prefix_plugin_name: Option<String>,
    /// Accepted: the decider reads the producer that is configured.
    pub prefix_match_info_producer_name: Option<String>,
}

impl Default for PrefillDecode {
    fn default() -> PrefillDecode {
        PrefillDecode {
            decode_profile: "decode".into(),
            prefill_profile: "prefill".into(),
            decider_plugin_name: PD_DECIDER.into(),
            primary_port: 0,
            prefix_plugin_type: None,
            prefix_plugin_name: None,
            prefix_match_info_producer_name: None,
        }
    }
}

/// `disagg-headers-handler` and `prefill-header-handler`: the handler itself writes the headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DisaggHeaders {
    /// Accepted: the handler knows its prefill profile.
    pub prefill_profile: Option<String>,
    /// Accepted: the handler knows its encode profile.
    pub encode_profile: Option<String>,
}

/// Both forms of the parameters, read as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stages<'a> {
    /// Which endpoint is chosen first.
    pub order: StageOrder,
    /// Profile that chooses who answers.
    pub decode: &'a str,
    /// Profile that chooses who computes the prompt.
    pub prefill: &'a str,
    /// Profile that chooses who encodes.
    pub encode: &'a str,
    /// Decider of prefill: where it stands in the parameters, and its name.
    pub prefill_decider: Option<(&'static str, &'a str)>,
    /// Decider of encode.
    pub encode_decider: Option<(&'static str, &'a str)>,
    /// The port that requests go to; 0: that of the endpoint.
    pub primary_port: u16,
}

/// A profile's name in the new form, the older one, or by default.
fn name<'a>(new: Option<&'a String>, old: &'a Option<String>, default: &'a str) -> &'a str {
    new.or(old.as_ref()).filter(|name| !name.is_empty()).map_or(default, String::as_str)
}

/// A decider's name with its place; an empty one is none.
fn at<'a>(path: &'static str, name: Option<&'a String>) -> Option<(&'static str, &'a str)> {
    name.filter(|name| !name.is_empty()).map(|name| (path, name.as_str()))
}

impl Disagg {
    fn is_older(&self) -> bool {
        [
            &self.decode_profile,
            &self.prefill_profile,
            &self.encode_profile,
            &self.prefill_decider_plugin_name,
            &self.encode_decider_plugin_name,
            &self.decider_plugin_name,
        ]
        .into_iter()
        .any(Option::is_some)
    }

    /// What the parameters mean.
    pub fn stages(&self) -> Stages<'_> {
        let profiles = self.profiles.as_ref();
        let deciders = self.deciders.as_ref();
        Stages {
            order: self.stage_order,
            decode: name(profiles.map(|p| &p.decode), &self.decode_profile, "decode"),
            prefill: name(profiles.map(|p| &p.prefill), &self.prefill_profile, "prefill"),
            encode: name(profiles.map(|p| &p.encode), &self.encode_profile, "encode"),
            prefill_decider: at("deciders.prefill", deciders.and_then(|d| d.prefill.as_ref()))
                .or(at("prefillDeciderPluginName", self.prefill_decider_plugin_name.as_ref()))
                .or(at("deciderPluginName", self.decider_plugin_name.as_ref())),
            encode_decider: at("deciders.encode", deciders.and_then(|d| d.encode.as_ref()))
                .or(at("encodeDeciderPluginName", self.encode_decider_plugin_name.as_ref())),
            primary_port: 0,
        }
    }
}

impl PrefillDecode {
    /// What the parameters mean.
    pub fn stages(&self) -> Stages<'_> {
        Stages {
            order: StageOrder::DecodeFirst,
            decode: &self.decode_profile,
            prefill: &self.prefill_profile,
            encode: "",
            prefill_decider: Some(("deciderPluginName", &self.decider_plugin_name)),
            encode_decider: None,
            primary_port: self.primary_port,
        }
    }
}

impl<'a> Stages<'a> {
    fn references(&self) -> Vec<Reference<'a>> {
        [self.prefill_decider, self.encode_decider]
            .into_iter()
            .flatten()
            .map(|(path, name)| Reference { path, name, role: Role::Decider })
            .collect()
    }
}

impl Plugin for Disagg {
    fn check(&self) -> Result<(), String> {
        if self.is_older() && (self.profiles.is_some() || self.deciders.is_some()) {
            return Err("profiles and deciders must not be mixed with the older parameters \
                        (decodeProfile, prefillDeciderPluginName, ...); keep one form"
                .into());
        }
        let stages = self.stages();
        if stages.order == StageOrder::PrefillFirst && stages.prefill_decider.is_some() {
            return Err("deciders.prefill cannot be used with stageOrder prefill-first: prefill \
                        is chosen before there is a decode endpoint to ask about"
                .into());
        }
        Ok(())
    }

    fn references(&self) -> Vec<Reference<'_>> {
        self.stages().references()
    }
}

impl Plugin for PrefillDecode {
    fn references(&self) -> Vec<Reference<'_>> {
        self.stages().references()
    }

    fn inert(&self) -> Vec<String> {
        let given = [
            (&self.prefix_plugin_type, "prefixPluginType: deprecated"),
            (&self.prefix_plugin_name, "prefixPluginName: deprecated"),
            (
                &self.prefix_match_info_producer_name,
                "prefixMatchInfoProducerName: the decider reads the producer that is configured",
            ),
        ];
        given.iter().filter(|(given, _)| given.is_some()).map(|(_, t)| (*t).to_owned()).collect()
    }
}

impl Plugin for DisaggHeaders {}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Disagg {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn both_forms_say_the_same() {
        let new = read(
            r#"{"profiles": {"decode": "d", "prefill": "p"},
                "deciders": {"prefill": "x", "encode": "y"}}"#,
        );
        let old = read(
            r#"{"decodeProfile": "d", "prefillProfile": "p",
                "prefillDeciderPluginName": "x", "encodeDeciderPluginName": "y"}"#,
        );
        let names = |disagg: &Disagg| {
            let s = disagg.stages();
            let name = |of: Option<(_, &str)>| of.map(|(_, name): (&str, &str)| name.to_owned());
            let profiles = [s.decode, s.prefill, s.encode].map(String::from);
            (profiles, name(s.prefill_decider), name(s.encode_decider))
        };
        assert_eq!(names(&new), names(&old));
        assert_eq!(names(&new).0, ["d", "p", "encode"]);
        let oldest = read(r#"{"deciderPluginName": "x"}"#);
        assert_eq!(oldest.references()[0].path, "deciderPluginName");
        assert_eq!(names(&Disagg::default()).0, ["decode", "prefill", "encode"]);
        assert!(Disagg::default().references().is_empty());
    }

    #[test]
    fn an_order_may_be_spelt_in_any_way_that_llm_d_takes() {
        let order = |text: &str| {
            let json = format!(r#"{{"stageOrder": "{text}"}}"#);
            serde_json::from_str::<Disagg>(&json).map(|disagg| disagg.stage_order)
        };
        for text in ["", "decode-first", "decode_first", "DecodeFirst", "decode"] {
            assert_eq!(order(text).unwrap(), StageOrder::DecodeFirst, "{text}");
        }
        for text in ["prefill-first", "prefillFirst", "PREFILL"] {
            assert_eq!(order(text).unwrap(), StageOrder::PrefillFirst, "{text}");
        }
        let error = order("encode-first").unwrap_err().to_string();
        assert!(error.contains("decode-first") && error.contains("prefill-first"), "{error}");
    }

    #[test]
    fn mixed_forms_and_a_decider_before_decode_are_refused() {
        let mixed = read(r#"{"profiles": {}, "decodeProfile": "d"}"#);
        assert!(mixed.check().unwrap_err().contains("mixed"));
        let first = r#"{"stageOrder": "prefill-first", "deciders": {"prefill": "x"}}"#;
        assert!(read(first).check().unwrap_err().contains("prefill-first"));
        assert!(read(r#"{"stageOrder": "prefill-first"}"#).check().is_ok());
    }
}
