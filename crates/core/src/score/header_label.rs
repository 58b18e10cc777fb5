//! `header-label-affinity-scorer`: endpoints whose label is what the request's header says.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Plugin, Scorer, View};

/// `header-label-affinity-scorer`: 1 where the endpoint's label has the value of the request's
/// header, else 0; 0 for all without the header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct HeaderLabel {
    /// The request header; required.
    pub header_name: String,
    /// The label; required.
    pub label_key: String,
}

impl Plugin for HeaderLabel {
    fn check(&self) -> Result<(), String> {
        if self.header_name.is_empty() {
            return Err("headerName is required: the request header that is read".into());
        }
        if self.label_key.is_empty() {
            return Err("labelKey is required: the label that is compared".into());
        }
        Ok(())
    }

    fn headers(&self) -> Vec<String> {
        vec![self.header_name.to_ascii_lowercase()]
    }
}

impl Scorer for HeaderLabel {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        let wanted = view.request.headers.get(&self.header_name).filter(|v| !v.is_empty());
        for (row, cell) in view.rows.iter().zip(column) {
            let label = view.endpoint(row).and_then(|e| e.labels.get(&self.label_key));
            let is_it = wanted.is_some() && label.map(String::as_str) == wanted;
            *cell = if is_it { 1.0 } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_label_is_what_the_header_says() {
        let mut fixture = Fixture::new(4);
        for (at, value) in ["blue", "green", ""].into_iter().enumerate() {
            fixture.label(at, "slice", value);
        }
        let mut scorer = HeaderLabel { header_name: "X-Slice".into(), label_key: "slice".into() };
        assert_scores(&fixture.score(&mut scorer), &[0.0; 4]);
        let table = [
            ("blue", [1.0, 0.0, 0.0, 0.0]),
            ("green", [0.0, 1.0, 0.0, 0.0]),
            ("Blue", [0.0; 4]),
            ("", [0.0; 4]),
        ];
        for (value, scores) in table {
            fixture.header("x-slice", value);
            assert_scores(&fixture.score(&mut scorer), &scores);
        }
        assert_eq!(scorer.headers(), ["x-slice"]);
        assert_scores(&Fixture::new(0).score(&mut scorer), &[]);
    }

    #[test]
    fn both_names_are_required() {
        let (some, none) = ("x".to_owned(), String::new());
        let table = [(&some, &some, true), (&some, &none, false), (&none, &some, false)];
        for (header, label, is_good) in table {
            let scorer = HeaderLabel { header_name: header.clone(), label_key: label.clone() };
            assert_eq!(scorer.check().is_ok(), is_good, "{scorer:?}");
        }
    }
}
