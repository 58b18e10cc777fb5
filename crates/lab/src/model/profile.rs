//! How long one step of an engine takes on given hardware.
//!
//! `t = t0 + c_seq*sequences + c_ctx*decode context + c_uni*unique resident tokens
//!    + c_pf*prefill tokens + c_attn*sum(chunk*(start + chunk/2))`, all in seconds.
//!
//! A profile is a small JSON file; the shipped ones live in `crates/lab/profiles`, and
//! `docs/profiles.md` says where their constants come from. [`crate::fit`] makes one from
//! measurements.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The constants of one model on one kind of hardware. Seconds, per the unit in each name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Shown in reports; may be left out where constants stand inside a scenario.
    #[serde(default)]
    pub name: String,
    /// Floor of a step.
    pub step_base_s: f64,
    /// Per sequence in the step.
    pub step_per_seq_s: f64,
    /// Per token of context that the decoding sequences attend to.
    pub step_per_context_token_s: f64,
    /// Per token resident in a block that a sequence uses; a shared block counts once.
    pub step_per_unique_token_s: f64,
    /// Per prompt token computed.
    pub prefill_per_token_s: f64,
    /// Per prompt token computed and position it attends to.
    pub prefill_attention_s: f64,
}

/// What a step has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepWork {
    /// Sequences in the step.
    pub sequences: u64,
    /// Sum of the context lengths of the decoding sequences, tokens.
    pub decode_context_tokens: u64,
    /// Tokens of capacity in blocks that are in use.
    pub unique_tokens: u64,
    /// Prompt tokens computed.
    pub prefill_tokens: u64,
    /// Sum over the prefill chunks of `2*length*start + length*length`: twice the positions
    /// attended to, so that it stays an integer.
    pub prefill_positions_doubled: u64,
}

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Not the JSON of a profile.
    #[error(
        "profile {name}: {source}. Fields: name, step_base_s, step_per_seq_s, \
             step_per_context_token_s, step_per_unique_token_s, prefill_per_token_s, \
             prefill_attention_s"
    )]
    Json {
        /// File or profile name.
        name: String,
        /// What serde says, with line and column.
        source: serde_json::Error,
    },
    /// A constant is negative or not a number, or the floor of a step is not above 0.
    #[error(
        "profile {name}: {field} is {value}, it must be a finite number, not negative \
             (step_base_s: above 0)"
    )]
    Constant {
        /// File or profile name.
        name: String,
        /// Which constant.
        field: &'static str,
        /// Its value.
        value: f64,
    },
    /// No profile of that name is built in.
    #[error("no profile {name}; built in: {}", Profile::BUILT_IN.map(|(name, _)| name).join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
    },
}

impl Profile {
    /// The profiles that ship with the program: name and file content.
    pub const BUILT_IN: [(&'static str, &'static str); 7] = [
        ("qwen3-32b-tp2-h100", include_str!("../../profiles/qwen3-32b-tp2-h100.json")),
        ("qwen3-32b-tp2-a100", include_str!("../../profiles/qwen3-32b-tp2-a100.json")),
        ("qwen3-8b-h100", include_str!("../../profiles/qwen3-8b-h100.json")),
        ("llama-3.1-8b-h100", include_str!("../../profiles/llama-3.1-8b-h100.json")),
        ("llama-3.1-70b-tp4-h100", include_str!("../../profiles/llama-3.1-70b-tp4-h100.json")),
        (
            "llama-3.3-70b-fp8-tp2-h200",
            include_str!("../../profiles/llama-3.3-70b-fp8-tp2-h200.json"),
        ),
        ("tiny", include_str!("../../profiles/tiny.json")),
    ];

    /// The built-in profile `name`.
    pub fn built_in(name: &str) -> Result<Profile, ProfileError> {
        match Profile::BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Profile::parse(text, name),
            None => Err(ProfileError::Unknown { name: name.to_owned() }),
        }
    }

    /// Reads the JSON of a profile; `name` is for the error text.
    pub fn parse(text: &str, name: &str) -> Result<Profile, ProfileError> {
        let profile: Profile = serde_json::from_str(text)
            .map_err(|source| ProfileError::Json { name: name.to_owned(), source })?;
        for (field, value, floor) in profile.constants() {
            if !value.is_finite() || value < 0.0 || (floor && value <= 0.0) {
                return Err(ProfileError::Constant { name: name.to_owned(), field, value });
            }
        }
        Ok(profile)
    }

    fn constants(&self) -> [(&'static str, f64, bool); 6] {
        [
            ("step_base_s", self.step_base_s, true),
            ("step_per_seq_s", self.step_per_seq_s, false),
            ("step_per_context_token_s", self.step_per_context_token_s, false),
            ("step_per_unique_token_s", self.step_per_unique_token_s, false),
            ("prefill_per_token_s", self.prefill_per_token_s, false),
            ("prefill_attention_s", self.prefill_attention_s, false),
        ]
    }

    /// How long a step with this work takes.
    pub fn step_duration(&self, work: &StepWork) -> Duration {
        let seconds = self.step_base_s
            + self.step_per_seq_s * work.sequences as f64
            + self.step_per_context_token_s * work.decode_context_tokens as f64
            + self.step_per_unique_token_s * work.unique_tokens as f64
            + self.prefill_per_token_s * work.prefill_tokens as f64
            + self.prefill_attention_s * work.prefill_positions_doubled as f64 / 2.0;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_profile_parses() {
        for (name, _) in Profile::BUILT_IN {
            assert_eq!(Profile::built_in(name).unwrap().name, name);
        }
    }

    #[test]
    fn bad_profiles_are_refused_with_the_reason() {
        let good = include_str!("../../profiles/tiny.json");
        for (text, expected) in [
            (good.replace("step_base_s", "step_bass_s"), "step_bass_s"),
            (good.replace("0.002", "0"), "step_base_s is 0"),
            (good.replace("1e-10", "-1"), "prefill_attention_s is -1"),
        ] {
            let error = Profile::parse(&text, "x").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = Profile::built_in("h200").unwrap_err().to_string();
        assert!(error.contains("qwen3-32b-tp2-h100, qwen3-32b-tp2-a100"), "{error}");
    }

    #[test]
    fn a_cold_prompt_of_10k_tokens_takes_what_the_fit_says() {
        let profile = Profile::built_in("qwen3-32b-tp2-h100").unwrap();
        let work = |start: u64, length: u64| StepWork {
            sequences: 1,
            prefill_tokens: length,
            prefill_positions_doubled: 2 * length * start + length * length,
            ..StepWork::default()
        };
        let seconds = profile.step_duration(&work(0, 8192)).as_secs_f64()
            + profile.step_duration(&work(8192, 1808)).as_secs_f64();
        assert!((0.65..0.85).contains(&seconds), "{seconds}");
    }
    /// Parameters in billions, bytes of each, GPUs, layers, heads, bandwidth in TB/s, TFLOP/s of
    /// the weights' type and of bf16.
    type Specification = (f64, f64, f64, f64, f64, f64, f64, f64);

    #[test]
    fn derived_profiles_follow_from_the_specifications() {
        let fitted: Specification = (32.8, 2.0, 2.0, 64.0, 64.0, 3.35, 989.4, 989.4);
        let derived: [(&str, Specification); 5] = [
            ("qwen3-32b-tp2-a100", (32.8, 2.0, 2.0, 64.0, 64.0, 2.039, 312.0, 312.0)),
            ("qwen3-8b-h100", (8.2, 2.0, 1.0, 36.0, 32.0, 3.35, 989.4, 989.4)),
            ("llama-3.1-8b-h100", (8.03, 2.0, 1.0, 32.0, 32.0, 3.35, 989.4, 989.4)),
            ("llama-3.1-70b-tp4-h100", (70.6, 2.0, 4.0, 80.0, 64.0, 3.35, 989.4, 989.4)),
            ("llama-3.3-70b-fp8-tp2-h200", (70.6, 1.0, 2.0, 80.0, 64.0, 4.8, 1978.9, 989.4)),
        ];
        // Floor, sequence, context, unique, prefill, attention. All models have 8 KV heads.
        let costs = |(weights, bytes, gpus, layers, heads, memory, flops, bf16): Specification| {
            let (kv, dense) = (layers / gpus / memory, weights / gpus / flops);
            [weights * bytes / gpus / memory, dense, kv, kv, dense, layers * heads / gpus / bf16]
        };
        let from = Profile::built_in("qwen3-32b-tp2-h100").unwrap();
        for (name, specification) in derived {
            let profile = Profile::built_in(name).unwrap();
            for (at, (field, value, _)) in profile.constants().into_iter().enumerate() {
                let ratio = costs(specification)[at] / costs(fitted)[at];
                let expected = from.constants()[at].1 * ratio;
                assert!((value / expected - 1.0).abs() < 1e-3, "{name} {field}: {expected}");
            }
        }
    }
}
