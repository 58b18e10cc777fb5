//! Which images, videos and sounds does a conversation hold, and where?
//!
//! A picture has a name, the hash of its URL or data, by which two requests with the same picture
//! know each other, and a place in the JSON of the conversation: estimates of tokens put a number
//! of placeholders there instead of its bytes. Where the file itself is in the request, its size
//! in pixels is read from its first bytes; nothing is decoded or fetched.
//!
//! Understood are the content parts of OpenAI's chat API (`image_url`, `video_url`, `audio_url`,
//! `input_audio`), of the responses API (`input_image` with its `image_url`) and of Anthropic's
//! messages (`image` with its `source`), in the content of messages, of tool results and in the
//! output of function calls.

mod pixels;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_64;

use crate::request::MULTIMODAL_ITEMS_MAX;

/// What a model is shown or played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A film.
    Video,
    /// Sound.
    Audio,
}

/// One picture, film or sound of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaItem {
    /// What it is.
    pub kind: MediaKind,
    /// Names its content: the URL, or the base64 data without what stands before it in a `data:`
    /// URL. The same in every process.
    pub hash: u64,
    /// Width and height of an image, where its file is in the request and of a known format.
    pub pixels: Option<(u32, u32)>,
    /// Where the URL or data stands in the JSON that was searched, in bytes, without its quotes.
    pub place: Range<usize>,
}

/// Lists of parts in messages in lists of parts (a tool's result) are all that APIs have.
const DEPTH_MAX: u32 = 6;
/// A list (1) of messages (2) with lists (3) of parts (4).
const PARTS_DEPTH: u32 = 4;

/// What stands in the JSON of every media part, so that conversations without any, nearly all of
/// them, are not walked through. Inside a string each of them would have escaped quotes.
static SIGNS: LazyLock<[Finder<'static>; 3]> =
    LazyLock::new(|| ["_url\"", "\"input_audio\"", "\"source\""].map(Finder::new));

/// The items of a conversation, a JSON array of messages or of input items, in their order: at
/// most [`MULTIMODAL_ITEMS_MAX`]. What is malformed has none.
pub fn find(json: &str) -> Vec<MediaItem> {
    if SIGNS.iter().all(|sign| sign.find(json.as_bytes()).is_none()) {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_str(json);
    // Malformed JSON ends the walk; what was found before counts, and the engine answers.
    let _ = Walk { depth: 1, found: &mut found }.deserialize(&mut deserializer);
    found.iter().filter_map(|(kind, raw)| item_of(json, *kind, raw)).collect()
}

/// The content of a media part: the text itself, or an object with it.
#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow, default)]
    url: Option<&'a RawValue>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

fn item_of(json: &str, kind: MediaKind, raw: &RawValue) -> Option<MediaItem> {
    let raw = match raw.get().as_bytes().first() {
        Some(b'{') => {
            let content: Content<'_> = serde_json::from_str(raw.get()).ok()?;
            content.url.or(content.data)?.get()
        }
        _ => raw.get(),
    };
    let quoted = raw.strip_prefix('"')?.strip_suffix('"')?;
    if quoted.is_empty() {
        return None;
    }
    let start = (quoted.as_ptr() as usize).checked_sub(json.as_ptr() as usize)?;
    let text = match quoted.contains('\\') {
        true => Cow::Owned(serde_json::from_str::<String>(raw).ok()?),
        false => Cow::Borrowed(quoted),
    };
    let (file, is_file) = content_of(&text);
    let pixels = (kind == MediaKind::Image && is_file).then(|| pixels::of_base64(file)).flatten();
    let place = start..start + quoted.len();
    Some(MediaItem { kind, hash: xxh3_64(file.as_bytes()), pixels, place })
}

/// The base64 text of a file, or the URL of one that is elsewhere.
fn content_of(text: &str) -> (&str, bool) {
    match text.split_once(";base64,").filter(|(head, _)| head.starts_with("data:")) {
        Some((_, data)) => (data, true),
        // A scheme ends at a colon, which base64 does not have.
        None => (text, !text.contains(':')),
    }
}

/// Looks for media parts below a value.
struct Walk<'s, 'a> {
    depth: u32,
    found: &'s mut Vec<(MediaKind, &'a RawValue)>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.depth <= DEPTH_MAX && self.found.len() < MULTIMODAL_ITEMS_MAX {
            true => deserializer.deserialize_any(self),
            false => IgnoredAny::deserialize(deserializer).map(drop),
        }
    }
}

impl<'de> Visitor<'de> for Walk<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let (depth, found) = (self.depth + 1, self.found);
        while seq.next_element_seed(Walk { depth, found: &mut *found })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Walk { depth, found } = self;
        let is_part = depth >= PARTS_DEPTH;
        let mut is_image = false;
        let mut source = None;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match (&*key, is_part) {
                ("image_url", true) => push(found, MediaKind::Image, map.next_value()?),
                ("video_url", true) => push(found, MediaKind::Video, map.next_value()?),
                ("audio_url" | "input_audio", true) => {
                    push(found, MediaKind::Audio, map.next_value()?);
                }
                ("source", true) => source = Some(map.next_value()?),
                ("type", true) => is_image = map.next_value::<&RawValue>()?.get() == IMAGE,
                ("content" | "output", _) => {
                    map.next_value_seed(Walk { depth: depth + 1, found: &mut *found })?;
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        if let (true, Some(source)) = (is_image, source) {
            push(found, MediaKind::Image, source);
        }
        Ok(())
    }
}

/// The type of Anthropic's image part; a `source` of another type is a document.
const IMAGE: &str = "\"image\"";

fn push<'a>(found: &mut Vec<(MediaKind, &'a RawValue)>, kind: MediaKind, raw: &'a RawValue) {
    if found.len() < MULTIMODAL_ITEMS_MAX {
        found.push((kind, raw));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of 2 x 3 pixels: the first bytes of a PNG.
    const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAADCAYAAAA=";

    /// Kind, content and size.
    type Shown<'a> = (MediaKind, &'a str, Option<(u32, u32)>);

    fn shown(json: &str) -> Vec<Shown<'_>> {
        let items = find(json).into_iter();
        items.map(|item| (item.kind, &json[item.place], item.pixels)).collect()
    }

    #[test]
    fn parts_of_every_api() {
        use MediaKind::*;
        let png = format!("data:image/png;base64,{PNG}");
        let size = Some((2, 3));
        let part = |part: &str| format!(r#"[{{"role":"user","content":[{part}]}}]"#);
        let table: &[(String, Vec<Shown<'_>>)] = &[
            (
                part(r#"{"type":"image_url","image_url":{"url":"http://a/b"}}"#),
                vec![(Image, "http://a/b", None)],
            ),
            (
                part(&format!(r#"{{"image_url":{{"detail":"low","url":"{png}"}}}}"#)),
                vec![(Image, &png, size)],
            ),
            (part(r#"{"type":"input_image","image_url":"u:1"}"#), vec![(Image, "u:1", None)]),
            (part(r#"{"type":"input_image","image_url":null,"file_id":"f"}"#), vec![]),
            (part(r#"{"type":"video_url","video_url":{"url":"v:1"}}"#), vec![(Video, "v:1", None)]),
            (part(r#"{"type":"audio_url","audio_url":{"url":"a:1"}}"#), vec![(Audio, "a:1", None)]),
            (
                part(r#"{"type":"input_audio","input_audio":{"data":"QUJD","format":"wav"}}"#),
                vec![(Audio, "QUJD", None)],
            ),
            (
                part(&format!(r#"{{"type":"image","source":{{"type":"base64","data":"{PNG}"}}}}"#)),
                vec![(Image, PNG, size)],
            ),
            (
                part(r#"{"source":{"type":"url","url":"h:x"},"type":"image"}"#),
                vec![(Image, "h:x", None)],
            ),
            (part(r#"{"type":"document","source":{"type":"url","url":"h:x"}}"#), vec![]),
            (
                part(
                    r#"{"type":"tool_result","content":[{"type":"image","source":{"url":"t:1"}}]}"#,
                ),
                vec![(Image, "t:1", None)],
            ),
            (
                r#"[{"type":"function_call_output","output":[{"image_url":"o:1"}]}]"#.to_owned(),
                vec![(Image, "o:1", None)],
            ),
            // What a tool is called with is no part.
            (part(r#"{"type":"tool_use","input":{"image_url":"n:1","content":[]}}"#), vec![]),
            (part(r#"{"type":"text","text":"\"image_url\":\"x\""}"#), vec![]),
            (r#"[{"image_url":"m:1","content":"source"}]"#.to_owned(), vec![]),
            (r#"[{"content":[{"image_url":""},{"image_url":7},{"image_url":{}}]}]"#.into(), vec![]),
            (
                r#"[{"content":[{"image_url":"a:1"}]},{"content":[{"image_url":"b:1"},"#.into(),
                vec![(Image, "a:1", None), (Image, "b:1", None)],
            ),
            ("".into(), vec![]),
            ("\"source\"".into(), vec![]),
        ];
        for (json, expected) in table {
            assert_eq!(shown(json), *expected, "{json}");
        }
    }

    #[test]
    fn the_same_content_has_the_same_hash() {
        let hashes = |urls: &[&str]| -> Vec<u64> {
            let parts: Vec<String> =
                urls.iter().map(|url| format!(r#"{{"image_url":"{url}"}}"#)).collect();
            let json = format!(r#"[{{"content":[{}]}}]"#, parts.join(","));
            find(&json).iter().map(|item| item.hash).collect()
        };
        let found = hashes(&["http://a/1", "http://a/2", "http://a/1", "http:\\/\\/a\\/1"]);
        assert_eq!(found.len(), 4);
        assert_eq!((found[0], found[0]), (found[2], found[3]));
        assert_ne!(found[0], found[1]);
        let data = hashes(&["data:image/png;base64,QUJD", "data:image/jpeg;base64,QUJD", "QUJD"]);
        assert_eq!((data[0], data[0]), (data[1], data[2]));
        // Written down: other processes and versions find the same.
        assert_eq!(found[0], xxh3_64(b"http://a/1"));
    }

    #[test]
    fn items_are_limited() {
        let part = r#"{"image_url":"u:1"}"#;
        let parts = vec![part; MULTIMODAL_ITEMS_MAX + 5].join(",");
        let items = find(&format!(r#"[{{"content":[{parts}]}}]"#));
        assert_eq!(items.len(), MULTIMODAL_ITEMS_MAX);
    }

    #[test]
    fn nesting_is_limited() {
        let deep = format!("{}{}", r#"[{"content":"#.repeat(5000), r#""image_url""#);
        assert_eq!(find(&deep), []);
    }
}
