//! `mm-embeddings-cache-scorer`: endpoints that have encoded the request's images before.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::stage::{Inputs, MEDIA_DEFAULT, MediaMatch, Plugin, ProducerRef, Scorer, View};

/// `mm-embeddings-cache-scorer`: the share of the request's images, audio and video that the
/// endpoint has been sent before; 0 for a request without any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EncoderCache {
    /// Producer of the matches: the name of an `mm-embeddings-cache-producer`.
    pub producer_name: Option<String>,
}

impl Plugin for EncoderCache {
    fn inputs(&self) -> Inputs<'_> {
        let media = ProducerRef::of(&self.producer_name, MEDIA_DEFAULT);
        Inputs { media: Some(media), ..Inputs::default() }
    }
}

impl Scorer for EncoderCache {
    fn score(&mut self, view: &View<'_>, column: &mut [f64]) {
        for (row, cell) in view.rows.iter().zip(column) {
            let MediaMatch { matched, total } = view.media(row);
            *cell = if total == 0 { 0.0 } else { matched as f64 / total as f64 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, assert_scores};

    #[test]
    fn the_share_of_items_that_it_has_seen() {
        let mut fixture = Fixture::new(4);
        for (at, matched) in [0, 1, 3].into_iter().enumerate() {
            fixture.media(at, matched, 3);
        }
        let mut scorer = EncoderCache::default();
        assert_scores(&fixture.score(&mut scorer), &[0.0, 1.0 / 3.0, 1.0, 0.0]);
        assert_scores(&Fixture::new(0).score(&mut scorer), &[]);
        assert_eq!(scorer.inputs().media, Some(ProducerRef::Default(MEDIA_DEFAULT)));
        scorer.producer_name = Some("mine".into());
        assert_eq!(scorer.inputs().media, Some(ProducerRef::Named("mine")));
    }
}
