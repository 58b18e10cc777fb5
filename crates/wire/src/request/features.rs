//! Where do the multimodal items of a prompt of token ids lie?

use kvroute_core::blocks::MultimodalSpan;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{BodyError, MULTIMODAL_ITEMS_MAX};

/// `features` of vLLM's generate API: per modality the hashes of the items and, in the same
/// order, where each lies in the prompt.
#[derive(Deserialize)]
struct Features {
    #[serde(default)]
    mm_hashes: Option<std::collections::BTreeMap<String, Vec<String>>>,
    #[serde(default)]
    mm_placeholders: Option<std::collections::BTreeMap<String, Vec<Placeholder>>>,
}

#[derive(Deserialize)]
struct Placeholder {
    offset: u32,
    length: u32,
}

/// The items that `features` lists.
pub(super) fn read_items(features: &RawValue) -> Result<Vec<MultimodalSpan>, BodyError> {
    let wrong = |found: String| BodyError::WrongType {
        field: "features",
        expected: "an object with mm_hashes and mm_placeholders of equal length per modality",
        found,
    };
    let features: Features =
        serde_json::from_str(features.get()).map_err(|error| wrong(error.to_string()))?;
    let placeholders = features.mm_placeholders.unwrap_or_default();
    let mut items = Vec::new();
    for (modality, hashes) in features.mm_hashes.unwrap_or_default() {
        let places = placeholders.get(&modality).map_or(&[][..], Vec::as_slice);
        if places.len() != hashes.len() || items.len() + hashes.len() > MULTIMODAL_ITEMS_MAX {
            return Err(wrong(format!(
                "{} hashes and {} placeholders of {modality} (at most {MULTIMODAL_ITEMS_MAX})",
                hashes.len(),
                places.len()
            )));
        }
        items.extend(hashes.into_iter().zip(places).map(|(identifier, place)| MultimodalSpan {
            identifier,
            offset: place.offset,
            length: place.length,
        }));
    }
    items.sort_by_key(|item| item.offset);
    Ok(items)
}
