//! What does the engine hand to the chat template for this conversation?
//!
//! vLLM does not pass messages through: it drops fields it does not know, joins text parts where
//! the template expects a string, parses the arguments of tool calls, and moves reasoning. All of
//! that ends up in the prompt, so it is done here in the same way (vLLM 0.32, `parse_chat_messages`
//! and the request types it reads; the golden files of this crate come from that code).

use std::fmt;

use indexmap::IndexMap;
use kvroute_wire::request::Messages;
use minijinja::Value;
use minijinja::value::ValueKind;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::TokensError;

/// In what form a template wants the content of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// One string; text parts are joined by a line feed.
    Text,
    /// A list of parts, even for a single string. vLLM calls it `openai`.
    Parts,
}

/// First line of the system text that a coding client changes with each request; vLLM removes it.
pub(crate) const BILLING_HEADER: &str = "x-anthropic-billing-header";

const NO_ITEMS: [(&str, Value); 0] = [];

/// The fields of a content part that belong to its type. Any other field of a text part is passed
/// to the template.
const PART_FIELDS: [&str; 18] = [
    "audio_embeds",
    "audio_url",
    "closed",
    "data",
    "file",
    "image_embeds",
    "image_pil",
    "image_url",
    "input_audio",
    "name",
    "prompt_cache_breakpoint",
    "refusal",
    "text",
    "thinking",
    "type",
    "uuid",
    "video_embeds",
    "video_url",
];

/// A message as it stands in the request. A key given twice counts as its last value.
#[derive(Default)]
struct Message {
    role: Option<String>,
    content: Content,
    reasoning: Option<Value>,
    reasoning_content: Option<Value>,
    tool_calls: Option<Value>,
    tool_call_id: Option<Value>,
    name: Option<Value>,
    task: Option<Value>,
    tools: Option<Value>,
}

#[derive(Default)]
enum Content {
    #[default]
    None,
    /// A string.
    Text(Value),
    Parts(Vec<Value>),
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Message, D::Error> {
        struct MessageVisitor;
        impl<'de> Visitor<'de> for MessageVisitor {
            type Value = Message;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message, which is an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message, A::Error> {
                let mut message = Message::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "role" => message.role = Some(map.next_value()?),
                        "content" => message.content = map.next_value()?,
                        "reasoning" => message.reasoning = map.next_value()?,
                        "reasoning_content" => message.reasoning_content = map.next_value()?,
                        "tool_calls" => message.tool_calls = map.next_value()?,
                        "tool_call_id" => message.tool_call_id = Some(map.next_value()?),
                        "name" => message.name = map.next_value()?,
                        "task" => message.task = map.next_value()?,
                        "tools" => message.tools = map.next_value()?,
                        _ => _ = map.next_value::<IgnoredAny>()?,
                    }
                }
                Ok(message)
            }
        }
        deserializer.deserialize_map(MessageVisitor)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of parts or null as content")
            }
            fn visit_unit<E>(self) -> Result<Content, E> {
                Ok(Content::None)
            }
            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(Value::from(text)))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// One message as the template sees it: its fields in order.
#[derive(Default)]
pub(crate) struct Turn {
    fields: Vec<(&'static str, Value)>,
}

impl Turn {
    pub(crate) fn role(&self) -> &str {
        self.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.fields.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    pub(crate) fn set(&mut self, key: &'static str, value: Value) {
        match self.fields.iter_mut().find(|(name, _)| *name == key) {
            Some(field) => field.1 = value,
            None => self.fields.push((key, value)),
        }
    }

    pub(crate) fn into_value(self) -> Value {
        map_of(self.fields)
    }
}

/// A dict with these items, in this order; of equal keys the last value counts.
pub(crate) fn map_of<K: Into<Value>, V: Into<Value>>(
    items: impl IntoIterator<Item = (K, V)>,
) -> Value {
    let map: IndexMap<Value, Value> =
        items.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
    Value::from_object(map)
}

/// The conversation of a request for a template that wants `format`.
///
/// # Errors
/// [`TokensError::BadMessages`] and [`TokensError::Multimodal`].
pub(crate) fn conversation(
    messages: &Messages<'_>,
    format: ContentFormat,
) -> Result<Vec<Turn>, TokensError> {
    if let Messages::Plain { turns, .. } = messages {
        let messages = turns.iter().map(|turn| Message {
            role: Some(turn.role.to_string()),
            content: Content::Text(Value::from(&*turn.content)),
            ..Message::default()
        });
        return messages.map(|message| turn_of(message, format)).collect();
    }
    let messages: Vec<Message> =
        serde_json::from_str(messages.json()).map_err(bad_json("messages"))?;
    messages.into_iter().map(|message| turn_of(message, format)).collect()
}

pub(crate) fn bad_json(what: &str) -> impl Fn(serde_json::Error) -> TokensError + '_ {
    move |error| bad(format!("{what}: {error}"))
}

fn bad(message: String) -> TokensError {
    TokensError::BadMessages { message }
}

fn turn_of(message: Message, format: ContentFormat) -> Result<Turn, TokensError> {
    let role = message.role.ok_or_else(|| bad("a message has no role".to_owned()))?;
    let mut content = content_of(&role, message.content, format)?;
    if role == "tool" {
        content = tool_text(content);
    }
    let mut turn = Turn::default();
    turn.set("role", Value::from(role.as_str()));
    turn.set("content", content);
    match role.as_str() {
        "assistant" => {
            let calls = message.tool_calls.filter(|calls| !calls.is_none());
            if let Some(calls) = calls.as_ref().map_or(Ok(None), tool_calls)? {
                turn.set("tool_calls", calls);
            }
            let given = |value: &Option<Value>| value.clone().filter(|value| !value.is_none());
            let reasoning = given(&message.reasoning).or_else(|| given(&message.reasoning_content));
            if let Some(reasoning) = reasoning {
                turn.set("reasoning", reasoning.clone());
                turn.set("reasoning_content", reasoning);
            }
        }
        "tool" => {
            if let Some(id) = message.tool_call_id {
                turn.set("tool_call_id", id);
            }
        }
        _ => {}
    }
    for (key, value) in [("name", message.name), ("task", message.task)] {
        if let Some(value) = value.filter(|value| value.as_str().is_some()) {
            turn.set(key, value);
        }
    }
    if role == "developer" {
        turn.set("tools", message.tools.unwrap_or(Value::from(())));
    }
    Ok(turn)
}

fn content_of(role: &str, content: Content, format: ContentFormat) -> Result<Value, TokensError> {
    let mut parts = match content {
        Content::None => Vec::new(),
        // The usual case: no list is built for a string that stays one.
        Content::Text(text) if format == ContentFormat::Text && is_kept(role, &text) => {
            return Ok(text);
        }
        Content::Text(text) => vec![TextPart { text, extra: Vec::new(), is_reference: false }],
        Content::Parts(parts) => {
            let mut texts = Vec::with_capacity(parts.len());
            for part in &parts {
                texts.extend(text_part(part)?);
            }
            texts
        }
    };
    if role == "system" {
        parts.retain_mut(remove_billing_header);
    }
    Ok(match format {
        ContentFormat::Text => match parts.as_slice() {
            [only] => only.text.clone(),
            parts => {
                let texts: Vec<&str> = parts.iter().map(TextPart::as_str).collect();
                Value::from(texts.join("\n"))
            }
        },
        ContentFormat::Parts => parts.into_iter().map(TextPart::into_value).collect(),
    })
}

/// Whether a message's text is passed on as it is.
fn is_kept(role: &str, text: &Value) -> bool {
    role != "system" || !text.as_str().is_some_and(|text| text.starts_with(BILLING_HEADER))
}

/// A part of a message that is text.
struct TextPart {
    /// A string.
    text: Value,
    /// Fields that vLLM does not know and passes on.
    extra: Vec<(Value, Value)>,
    /// A `tool_reference`: a name for the template to expand.
    is_reference: bool,
}

impl TextPart {
    fn as_str(&self) -> &str {
        self.text.as_str().unwrap_or_default()
    }

    fn into_value(self) -> Value {
        let (kind, key) =
            if self.is_reference { ("tool_reference", "name") } else { ("text", "text") };
        let fields = [("type".into(), Value::from(kind)), (Value::from(key), self.text)];
        map_of(fields.into_iter().chain(self.extra))
    }
}

/// The text of a part; `None` for one that is skipped because it has none.
fn text_part(part: &Value) -> Result<Option<TextPart>, TokensError> {
    if part.as_str().is_some() {
        let text = part.clone();
        return Ok(Some(TextPart { text, extra: Vec::new(), is_reference: false }));
    }
    if part.kind() != ValueKind::Map {
        return Err(bad(format!("a content part is a {}, not an object", part.kind())));
    }
    let field = |key: &str| part.get_attr(key).unwrap_or_default();
    let kind = field("type");
    let Some(kind) = kind.as_str() else {
        let media = ["image_url", "audio_url", "video_url", "input_audio", "image_embeds"];
        let found = media.iter().find(|key| !field(key).is_undefined());
        return Err(match found {
            Some(media) => TokensError::Multimodal { part: (*media).to_owned() },
            None => bad("a content part has no type".to_owned()),
        });
    };
    let (key, is_reference) = match kind {
        "text" | "input_text" | "output_text" => ("text", false),
        "thinking" => ("thinking", false),
        "refusal" => ("refusal", false),
        "tool_reference" => ("name", true),
        _ => return Err(TokensError::Multimodal { part: kind.to_owned() }),
    };
    if !field("uuid").is_undefined() && !field("uuid").is_none() {
        return Err(TokensError::Multimodal { part: kind.to_owned() });
    }
    let text = field(key);
    if text.as_str().is_none() {
        return match kind {
            "text" | "refusal" if text.is_none() || text.is_undefined() => Ok(None),
            _ => Err(bad(format!("a part of type {kind} has no string `{key}`"))),
        };
    }
    let is_extra = |key: &Value| key.as_str().is_some_and(|key| !PART_FIELDS.contains(&key));
    let extra = if is_reference { Vec::new() } else { entries(part, is_extra) };
    Ok(Some(TextPart { text, extra, is_reference }))
}

fn entries(map: &Value, keep: impl Fn(&Value) -> bool) -> Vec<(Value, Value)> {
    let keys = map.try_iter().into_iter().flatten().filter(keep);
    keys.map(|key| (key.clone(), map.get_item(&key).unwrap_or_default())).collect()
}

/// Removes the client's attribution line from a part of the system text; false when nothing else
/// is in it.
fn remove_billing_header(part: &mut TextPart) -> bool {
    if !part.as_str().starts_with(BILLING_HEADER) {
        return true;
    }
    part.text = Value::from(part.as_str().split_once('\n').map_or("", |(_, rest)| rest));
    !part.as_str().is_empty()
}

/// The content of a tool's answer is one string even for templates that want parts, unless it
/// holds something other than text.
fn tool_text(content: Value) -> Value {
    if content.as_str().is_some() {
        return content;
    }
    let parts: Vec<Value> = content.try_iter().into_iter().flatten().collect();
    let is_text = |part: &Value| part.get_attr("type").unwrap_or_default().as_str() == Some("text");
    if !parts.iter().all(is_text) {
        return content;
    }
    let texts: Vec<Value> =
        parts.iter().map(|part| part.get_attr("text").unwrap_or_default()).collect();
    let texts: Vec<&str> = texts.iter().map(|text| text.as_str().unwrap_or_default()).collect();
    Value::from(texts.join("\n"))
}

/// The tool calls of an assistant's message, their arguments as objects; `None` for an empty list.
fn tool_calls(calls: &Value) -> Result<Option<Value>, TokensError> {
    if !matches!(calls.kind(), ValueKind::Seq) {
        return Err(bad(format!("tool_calls is a {}, not a list", calls.kind())));
    }
    let mut list = Vec::new();
    for call in calls.try_iter().into_iter().flatten() {
        let function = call.get_attr("function").unwrap_or_default();
        let kind = call.get_attr("type").unwrap_or_default();
        let is_function = kind.is_undefined() || kind.as_str() == Some("function");
        if function.kind() != ValueKind::Map || !is_function {
            return Err(bad("a tool call is not of type function".to_owned()));
        }
        let arguments = function.get_attr("arguments").unwrap_or_default();
        let arguments = ("arguments", parsed_arguments(&arguments));
        let function = reordered(&function, &["arguments", "name"], arguments);
        list.push(reordered(&call, &["id", "function", "type"], ("function", function)));
    }
    Ok((!list.is_empty()).then(|| Value::from(list)))
}

/// `map` with the keys of its type first, in the order in which vLLM's request types name them,
/// and one value replaced.
fn reordered(map: &Value, first: &[&'static str], replaced: (&'static str, Value)) -> Value {
    let mut sorted = Vec::new();
    for key in first {
        if *key == replaced.0 {
            sorted.push((Value::from(*key), replaced.1.clone()));
        } else if let Some(value) = present(map, key) {
            sorted.push((Value::from(*key), value));
        }
    }
    let is_other = |key: &Value| key.as_str().is_none_or(|key| !first.contains(&key));
    sorted.extend(entries(map, is_other));
    map_of(sorted)
}

fn present(map: &Value, key: &str) -> Option<Value> {
    map.get_attr(key).ok().filter(|value| !value.is_undefined())
}

/// Arguments as an object; whatever is no object and no JSON of one becomes an empty object, so
/// that one bad turn does not make a conversation unusable.
fn parsed_arguments(arguments: &Value) -> Value {
    if arguments.kind() == ValueKind::Map {
        return arguments.clone();
    }
    let text = arguments.as_str().unwrap_or_default();
    let parsed: Option<Value> = serde_json::from_str(text).ok();
    let is_object = |value: &Value| value.kind() == ValueKind::Map;
    parsed.filter(is_object).unwrap_or_else(|| map_of(NO_ITEMS))
}

/// The tools as vLLM's request types write them: fixed order of the keys, `null` for what is
/// missing, nothing that is unknown. A tool that is no function is passed as it is.
pub(crate) fn tools(json: &str) -> Result<Value, TokensError> {
    let list: Vec<Value> = serde_json::from_str(json).map_err(bad_json("tools"))?;
    Ok(list.iter().map(tool_of).collect())
}

fn tool_of(tool: &Value) -> Value {
    let Some(function) = present(tool, "function").filter(|f| f.kind() == ValueKind::Map) else {
        return tool.clone();
    };
    let given = |map: &Value, key: &str| present(map, key).filter(|value| !value.is_none());
    let defer = given(tool, "defer_loading");
    let mut inner: Vec<(&str, Value)> = ["name", "description", "parameters"]
        .map(|key| (key, present(&function, key).unwrap_or(Value::from(()))))
        .to_vec();
    inner.extend(given(&function, "strict").map(|value| ("strict", value)));
    let inner_defer = given(&function, "defer_loading").or_else(|| defer.clone());
    inner.extend(inner_defer.map(|value| ("defer_loading", value)));
    let mut outer = vec![("type", Value::from("function")), ("function", map_of(inner))];
    outer.extend(defer.map(|value| ("defer_loading", value)));
    map_of(outer)
}

/// A template that does not know the role `developer` gets those messages as `system`, and one
/// system message at the start if there would be more.
pub(crate) fn developers_to_system(turns: Vec<Turn>) -> Vec<Turn> {
    let mut turns = turns;
    for turn in &mut turns {
        if turn.role() == "developer" {
            turn.set("role", Value::from("system"));
            turn.fields.retain(|(key, _)| *key != "tools");
        }
    }
    let first_only = turns.iter().skip(1).all(|turn| turn.role() != "system");
    if first_only {
        return turns;
    }
    let mut texts = Vec::new();
    for turn in turns.iter().filter(|turn| turn.role() == "system") {
        let content = turn.get("content").cloned().unwrap_or_default();
        let text = match content.as_str() {
            Some(text) => text.to_owned(),
            None => tool_text(content).as_str().unwrap_or_default().to_owned(),
        };
        texts.extend((!text.is_empty()).then_some(text));
    }
    let mut merged = Turn::default();
    merged.set("role", Value::from("system"));
    merged.set("content", Value::from(texts.join("\n\n")));
    let others = turns.into_iter().filter(|turn| turn.role() != "system");
    std::iter::once(merged).chain(others).collect()
}
