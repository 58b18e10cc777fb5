//! Does each parser survive any bytes, and keep its promises about them?
//!
//! One function per parser, called by the fuzz targets in `fuzz/` and by `tests/corpus.rs`, so
//! that both check the same promises. A broken promise is a panic.

use crate::api::Api;
use crate::request::Prompt;
use crate::usage::UsageScanner;
use crate::{config, discovery, kv_event, models, prometheus, request};

/// A fuzz target by name.
pub type Target = (&'static str, fn(&[u8]));

/// All targets; the names are those of the corpus folders.
pub const TARGETS: [Target; 7] = [
    ("kv_event", kv_event),
    ("request", request),
    ("usage", usage),
    ("prometheus", prometheus),
    ("config", config),
    ("discovery", discovery),
    ("models", models),
];

/// What was decoded can be encoded, and read again without loss of an event.
pub fn kv_event(bytes: &[u8]) {
    let mut faults = 0;
    let Ok(batch) = kv_event::decode_batch_reporting(bytes, &mut |_, _| faults += 1) else {
        return;
    };
    assert_eq!(batch.events_bad, faults);
    let mut encoded = Vec::new();
    kv_event::encode_batch(&batch, &mut encoded);
    let again = kv_event::decode_batch(&encoded).expect("what we write is a batch");
    assert_eq!((again.events.len(), again.events_bad), (batch.events.len(), 0));
    assert_eq!(again.rank, batch.rank);
}

/// A conversation that is handed on is a JSON array, and prompts respect their limit.
pub fn request(bytes: &[u8]) {
    let apis = [
        Api::Completions,
        Api::ChatCompletions,
        Api::Responses,
        Api::Embeddings,
        Api::VllmGenerate,
        Api::Other,
    ];
    for api in apis {
        match request::parse(api, bytes) {
            Ok(body) => match body.prompt {
                Prompt::None(_) => {}
                Prompt::Texts(texts) => {
                    assert!((1..=request::PROMPTS_PER_REQUEST_MAX).contains(&texts.len()));
                }
                Prompt::TokenIds(lists) => {
                    assert!((1..=request::PROMPTS_PER_REQUEST_MAX).contains(&lists.len()));
                }
                Prompt::Chat(chat) => {
                    let json = chat.messages.json();
                    let parsed = serde_json::from_str::<Vec<serde::de::IgnoredAny>>(json);
                    assert!(parsed.is_ok(), "{json}");
                }
            },
            Err(error) => {
                assert!(api != Api::Other, "bodies of other APIs are never refused");
                if let request::BodyError::BadJson { at, .. } = error {
                    assert!(at <= bytes.len());
                }
            }
        }
    }
}

/// Where a body is cut makes no difference.
pub fn usage(bytes: &[u8]) {
    let mut whole = UsageScanner::new();
    whole.push(bytes);
    let step = 1 + bytes.first().map_or(0, |byte| usize::from(*byte % 16));
    let mut cut = UsageScanner::new();
    bytes.chunks(step).for_each(|chunk| cut.push(chunk));
    assert_eq!(whole.usage(), cut.usage(), "in chunks of {step}");
}

/// Shares stay shares.
pub fn prometheus(bytes: &[u8]) {
    if let Ok(scrape) = prometheus::parse(bytes) {
        assert!((0.0..=1.0).contains(&scrape.metrics.kv_usage));
    }
}

/// An error names its file.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(error) = config::parse(text, "fuzz.yaml") {
        assert!(error.rendered.contains("fuzz.yaml"), "{error}");
    }
}

/// An error names its file, and no endpoint has port 0.
pub fn discovery(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match discovery::parse(text, "fuzz.yaml") {
        Ok(endpoints) => assert!(endpoints.iter().all(|endpoint| endpoint.port > 0)),
        Err(error) => assert!(error.rendered.contains("fuzz.yaml"), "{error}"),
    }
}

/// The list respects its limit.
pub fn models(bytes: &[u8]) {
    if let Ok(models) = models::parse(bytes) {
        assert!(models.len() <= models::MODELS_MAX);
    }
}
