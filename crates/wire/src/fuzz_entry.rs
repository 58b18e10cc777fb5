//! Does each parser survive any bytes, and keep its promises about them?
//!
//! One function per parser, called by the fuzz targets in `fuzz/` and by `tests/corpus.rs`, so
//! that both check the same promises. A broken promise is a panic.

use bytes::Bytes;
use kvroute_core::parse::ParserKind;

use crate::api::Api;
use crate::ext_proc::{self, Part};
use crate::grpc::MessageReader;
use crate::model_name::Restorer;
use crate::parsers::Parsers;
use crate::request::{Prompt, RequestBody};
use crate::usage::UsageScanner;
use crate::{config, discovery, kv_event, model_name, models, prometheus, protobuf, request};

/// A fuzz target by name.
pub type Target = (&'static str, fn(&[u8]));

/// All targets; the names are those of the corpus folders.
pub const TARGETS: [Target; 12] = [
    ("kv_event", kv_event),
    ("request", request),
    ("parsers", parsers),
    ("protobuf", protobuf),
    ("usage", usage),
    ("grpc", grpc),
    ("ext_proc", ext_proc),
    ("model_name", model_name),
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

/// A conversation that is handed on is a JSON array, media lie inside of it and in order, and
/// prompts and items respect their limits.
pub fn request(bytes: &[u8]) {
    for api in Api::ALL {
        match request::parse(api, bytes) {
            Ok(body) => {
                check_body(&body);
                check_model_place(bytes, &body);
            }
            Err(error) => {
                assert!(api.reads_body(), "bodies of {api:?} are never refused");
                if let request::BodyError::BadJson { at, .. } = error {
                    assert!(at <= bytes.len());
                }
            }
        }
    }
}

fn check_body(body: &RequestBody<'_>) {
    let json = match &body.prompt {
        Prompt::None(_) => "",
        Prompt::Texts(texts) => {
            assert!((1..=request::PROMPTS_PER_REQUEST_MAX).contains(&texts.len()));
            ""
        }
        Prompt::TokenIds(lists) => {
            assert!((1..=request::PROMPTS_PER_REQUEST_MAX).contains(&lists.len()));
            ""
        }
        Prompt::Chat(chat) => {
            let json = chat.messages.json();
            let parsed = serde_json::from_str::<Vec<serde::de::IgnoredAny>>(json);
            assert!(parsed.is_ok(), "{json}");
            json
        }
        Prompt::Opaque(opaque) => opaque.conversation.get(),
    };
    assert!(body.items.len() <= request::MULTIMODAL_ITEMS_MAX);
    assert!(body.media.len() <= request::MULTIMODAL_ITEMS_MAX);
    let mut end = 0;
    for item in &body.media {
        assert!(end <= item.place.start && item.place.start < item.place.end, "{json}");
        assert!(json.get(item.place.clone()).is_some(), "{json}");
        end = item.place.end;
    }
}

fn check_model_place(bytes: &[u8], body: &RequestBody<'_>) {
    let Some(place) = &body.model_place else { return };
    let text = bytes.get(place.clone()).expect("the place lies in the body");
    let name = serde_json::from_slice::<Option<String>>(text).expect("a name or null stands there");
    assert_eq!(name.as_deref(), body.model.as_deref());
}

/// The first byte lists parsers, the rest is a path. A path is claimed by an API of a listed
/// parser, or left over, or refused.
pub fn parsers(bytes: &[u8]) {
    let Some((list, path)) = bytes.split_first() else { return };
    let Ok(path) = std::str::from_utf8(path) else { return };
    let listed = ParserKind::ALL.into_iter().enumerate().filter(|(at, _)| list >> at & 1 == 1);
    let kinds: Vec<ParserKind> = listed.map(|(_, kind)| kind).collect();
    let all = Parsers::new(&ParserKind::ALL).resolve(path);
    let found = Parsers::new(&kinds).resolve(path);
    match found {
        Ok(Api::Other) => assert!(kinds.contains(&ParserKind::Passthrough)),
        Ok(_) => assert!(all.is_ok_and(|api| api != Api::Other), "{path}"),
        Err(error) => {
            assert!(!kinds.contains(&ParserKind::Passthrough));
            assert!(error.to_string().contains(&error.path));
        }
    }
}

/// The fields of a message lie in it, and reading ends.
pub fn protobuf(bytes: &[u8]) {
    let mut fields = 0;
    let mut held = 0;
    for field in protobuf::Fields::new(bytes) {
        let Ok((number, value)) = field else { continue };
        assert!(number > 0);
        fields += 1;
        held += value.bytes().len();
        let mut ids = Vec::new();
        if protobuf::push_uint32s(value, &mut ids).is_ok() {
            assert!(ids.len() <= value.bytes().len().max(1));
        }
    }
    assert!(2 * fields + held <= bytes.len(), "{fields} fields with {held} bytes");
}

/// Where a body is cut makes no difference.
pub fn usage(bytes: &[u8]) {
    let step = 1 + bytes.first().map_or(0, |byte| usize::from(*byte % 16));
    for api in Api::ALL {
        let Some(mut whole) = UsageScanner::of(api) else { continue };
        let mut cut = whole.clone();
        whole.push(bytes);
        bytes.chunks(step).for_each(|chunk| cut.push(chunk));
        assert_eq!(whole.usage(), cut.usage(), "{api:?} in chunks of {step}");
    }
}

/// Where a stream is cut makes no difference, and no message is larger than allowed.
pub fn grpc(bytes: &[u8]) {
    const BYTES_MAX: usize = 1 << 16;
    let step = 1 + bytes.first().map_or(0, |byte| usize::from(*byte % 16));
    let read = |step: usize| {
        let mut reader = MessageReader::new(BYTES_MAX, true);
        let mut messages = Vec::new();
        for piece in bytes.chunks(step.max(1)) {
            reader.push(Bytes::copy_from_slice(piece));
            loop {
                match reader.read() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(error) => return (messages, Err(error)),
                }
            }
        }
        let end = reader.finish();
        (messages, end)
    };
    let whole = read(bytes.len());
    assert_eq!(whole, read(step), "in pieces of {step}");
    assert!(whole.0.iter().all(|message| message.len() <= BYTES_MAX));
}

/// What is read lies in the message.
pub fn ext_proc(bytes: &[u8]) {
    let whole = Bytes::copy_from_slice(bytes);
    let Ok(message) = ext_proc::Message::read(&whole) else { return };
    let _ = message.metadata.get("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset");
    let held = match &message.part {
        Part::RequestHeaders(block) | Part::ResponseHeaders(block) => {
            assert!(block.headers.len() <= ext_proc::HEADERS_MAX);
            block.headers.iter().map(|(name, value)| name.len() + value.len()).sum()
        }
        Part::RequestBody(piece) | Part::ResponseBody(piece) => piece.body.len(),
        Part::RequestTrailers | Part::ResponseTrailers => 0,
    };
    assert!(held <= bytes.len(), "{held} of {} bytes", bytes.len());
}

/// Where an answer is cut makes no difference, and JSON inside of one stays as it is. A request's
/// new name is read again.
pub fn model_name(bytes: &[u8]) {
    let step = 1 + bytes.first().map_or(0, |byte| usize::from(*byte % 16));
    for (to, from) in [("t", "in"), ("a/\u{fc}", "\"")] {
        let mut whole = Restorer::new(to, from);
        let mut cut = whole.clone();
        let (mut at_once, mut piecewise): (Vec<Bytes>, Vec<Bytes>) = Default::default();
        whole.push(Bytes::copy_from_slice(bytes), &mut at_once);
        whole.finish(&mut at_once);
        for chunk in bytes.chunks(step) {
            cut.push(Bytes::copy_from_slice(chunk), &mut piecewise);
        }
        cut.finish(&mut piecewise);
        assert_eq!(at_once.concat(), piecewise.concat(), "{to} in chunks of {step}");
        if serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok() {
            let generated = [b"{\"input\":", bytes, b"}"].concat();
            let (mut restorer, mut out): (_, Vec<Bytes>) = (Restorer::new(to, from), Vec::new());
            restorer.push(generated.clone().into(), &mut out);
            restorer.finish(&mut out);
            assert_eq!(out.concat(), generated);
        }
    }
    let Ok(body) = request::parse(Api::Completions, bytes) else { return };
    let Some(place) = body.model_place else { return };
    let new = model_name::replace(&Bytes::copy_from_slice(bytes), &place, "new \"name\"");
    let new = new.expect("the place lies in the body").concat();
    let again = request::parse(Api::Completions, &new).expect("only the name is another one");
    assert_eq!(again.model.as_deref(), Some("new \"name\""));
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
