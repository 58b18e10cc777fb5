//! `context-length-aware`: endpoints that are meant for prompts of this length.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;
use crate::fleet::Endpoint;
use crate::stage::{Filter, Inputs, Plugin, Scorer, View};

/// The most for an endpoint whose range the prompt misses, and the least for one that it hits.
const OUTSIDE: f64 = 0.3;

/// `context-length-aware`: a label of the form `min-max` says for which prompt lengths in tokens an
/// endpoint is meant. As a scorer, with the range's width `w` and `room = max - tokens`:
///
/// ```text
/// in range   0.3 + 0.7 * (0.7 / (1 + w / 10000) + 0.3 * room / w), 1 when w = 0
/// outside    0.3 / (1 + distance / 1000)
/// no label   0.5
/// no range   0
/// ```
///
/// As a filter, if switched on, it keeps endpoints in range and those without the label.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ContextLength {
    /// The label.
    pub label: String,
    /// Whether endpoints whose range the prompt misses are removed.
    pub enable_filtering: bool,
}

impl Default for ContextLength {
    fn default() -> ContextLength {
        ContextLength { label: "llm-d.ai/context-length-range".into(), enable_filtering: false }
    }
}

/// What the label says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meant {
    /// Nothing: there is none.
    Any,
    /// Prompts of so many tokens, both ends included.
    Range(u64, u64),
    /// Something that is no range.
    Unreadable,
}

impl Meant {
    fn read(label: Option<&str>) -> Meant {
        let Some(label) = label else { return Meant::Any };
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let ends = label.split_once('-').map(|(min, max)| (number(min), number(max)));
        match ends {
            Some((Some(min), Some(max))) if min <= max => Meant::Range(min, max),
            _ => Meant::Unreadable,
        }
    }

    fn score(self, tokens: u64) -> f64 {
        match self {
            Meant::Any => 0.5,
            Meant::Unreadable => 0.0,
            Meant::Range(min, max) if min == max && tokens == min => 1.0,
            Meant::Range(min, max) if (min..=max).contains(&tokens) => {
                let width = (max - min) as f64;
                let tight = 1.0 / (1.0 + width / 10_000.0);
                let room = (max - tokens) as f64 / width;
                OUTSIDE + (1.0 - OUTSIDE) * (0.7 * tight + 0.3 * room)
            }
            Meant::Range(min, max) => {
                let distance = if tokens > max { tokens - max } else { min - tokens };
                OUTSIDE / (1.0 + distance as f64 / 1_000.0)
            }
        }
    }
}

impl ContextLength {
    fn meant(&self, endpoint: Option<&Endpoint>) -> Meant {
        let label = endpoint.and_then(|endpoint| endpoint.labels.get(&self.label));
        Meant::read(label.map(String::as_str))
    }
}

impl Plugin for ContextLength {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { tokens: true, ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        if self.label.is_empty() {
            return Err("label must not be empty: the label that holds the range".into());
        }
        Ok(())
    }
}

impl Filter for ContextLength {
    fn filter(&mut self, view: &View<'_>, _rng: &mut Rng, keep: &mut [bool]) {
        if !self.enable_filtering {
            return;
        }
        let tokens = u64::from(view.request.prompt_tokens);
        for (row, keep) in view.rows.iter().zip(keep) {
            *keep = match self.meant(view.endpoint(row)) {
                Meant::Any => true,
                Meant::Range(min, max) => (min..=max).contains(&tokens),
                Meant::Unreadable => false,
            };
        }
    }
}

impl Scorer for ContextLength {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let tokens = u64::from(view.request.prompt_tokens);
        for (row, cell) in view.rows.iter().zip(column) {
            *cell = self.meant(view.endpoint(row)).score(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    fn fixture(labels: &[&str], tokens: u32) -> Fixture {
        let mut fixture = Fixture::new(labels.len());
        for (at, label) in labels.iter().enumerate() {
            if *label != "none" {
                fixture.label(at, "llm-d.ai/context-length-range", label);
            }
        }
        fixture.prompt_tokens(tokens);
        fixture
    }

    #[test]
    fn tight_ranges_with_room_win_and_far_ones_lose() {
        let table = [
            ("0-10000", 0, 0.3 + 0.7 * (0.7 * 0.5 + 0.3)),
            ("0-10000", 5_000, 0.3 + 0.7 * (0.7 * 0.5 + 0.3 * 0.5)),
            ("0-10000", 10_000, 0.3 + 0.7 * 0.7 * 0.5),
            ("100-100", 100, 1.0),
            ("100-100", 101, 0.3 / 1.001),
            ("0-1000", 2_000, 0.15),
            ("5000-9000", 2_000, 0.3 / 4.0),
            (" 0 - 1000 ", 2_000, 0.15),
            ("none", 7, 0.5),
            ("", 7, 0.0),
            ("1000", 7, 0.0),
            ("9-3", 7, 0.0),
            ("1-2-3", 2, 0.0),
            ("-5-10", 7, 0.0),
            ("0-18446744073709551615", 7, 0.3 + 0.7 * 0.3),
        ];
        for (label, tokens, score) in table {
            let scores = fixture(&[label], tokens).score(&mut ContextLength::default());
            assert!((scores[0] - score).abs() < 1e-9, "{label:?} {tokens}: {scores:?} {score}");
        }
        assert_scores(&Fixture::new(0).score(&mut ContextLength::default()), &[]);
    }

    #[test]
    fn filters_only_when_asked_to() {
        let labels = ["0-1000", "1000-2000", "2001-9000", "none", "big"];
        let mut filter = ContextLength::default();
        assert_eq!(fixture(&labels, 1_000).filter(&mut filter), [true; 5]);
        filter.enable_filtering = true;
        let table = [
            (1_000, [true, true, false, true, false]),
            (2_000, [false, true, false, true, false]),
            (99_999, [false, false, false, true, false]),
        ];
        for (tokens, kept) in table {
            assert_eq!(fixture(&labels, tokens).filter(&mut filter), kept, "{tokens}");
        }
        assert!(filter.check().is_ok());
        assert!(ContextLength { label: String::new(), ..filter }.check().is_err());
    }
}
