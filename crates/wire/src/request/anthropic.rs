//! Which conversation does a request of Anthropic's messages API stand for?
//!
//! vLLM (0.32, `entrypoints/anthropic/serving.py`) turns such a request into one of the chat API,
//! and so does this: `system` becomes the first message, thinking becomes `reasoning`, the use of
//! a tool a tool call, each tool result a message before the rest of its turn. The forms whose
//! rendering depends on the engine's flags or on its template, and those that vLLM refuses, stay
//! opaque:
//!
//! * system messages inside of the conversation, which some templates get at its start;
//! * `thinking: {"type": "disabled"}`, for which vLLM tries the template out;
//! * a list as tool result in an assistant's message, which vLLM writes as Python does.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::{BodyError, Chat, Fields, Loose, Messages, NoPrompt, Opaque, Prompt, hint, present};
use crate::api::Api;

/// A system text that a coding client changes with each request; vLLM leaves it out.
const BILLING_HEADER: &str = "x-anthropic-billing-header";

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    content: &'a RawValue,
}

#[derive(Deserialize)]
struct Block<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, default)]
    source: Option<&'a RawValue>,
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_use_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Source<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    url: Option<&'a RawValue>,
    #[serde(borrow, default)]
    media_type: Option<&'a RawValue>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Tool<'a> {
    #[serde(borrow)]
    name: &'a RawValue,
    #[serde(borrow, default)]
    description: Option<&'a RawValue>,
    #[serde(borrow)]
    input_schema: &'a RawValue,
    #[serde(borrow, default)]
    strict: Option<&'a RawValue>,
    #[serde(borrow, default)]
    defer_loading: Option<&'a RawValue>,
}

pub(super) fn into_prompt(fields: Fields<'_>) -> Result<Prompt<'_>, BodyError> {
    let conversation = fields.messages_array(Api::Messages)?;
    let (system, tools) = (present(fields.system), present(fields.tools));
    let is_disabled = matches!(&fields.thinking.kind, Loose::Text(kind) if kind == "disabled");
    let built = match is_disabled {
        false => messages_of(system, conversation).zip(tools.map_or(Some(None), tools_of)),
        true => None,
    };
    let Some((messages, tools)) = built else {
        let head = tools.into_iter().chain(system).collect();
        return Ok(Prompt::Opaque(Opaque { why: NoPrompt::MessagesForm, head, conversation }));
    };
    Ok(Prompt::Chat(Chat {
        messages: Messages::Built(messages),
        tools: tools.map(Cow::Owned),
        documents: None,
        chat_template: None,
        chat_template_kwargs: present(fields.chat_template_kwargs),
        add_generation_prompt: true,
        continue_final_message: false,
        add_special_tokens: false,
        reasoning_effort: hint(fields.output_config.effort),
    }))
}

/// The inside of a JSON string, escapes as they are; `None` for another value.
fn inside(raw: &RawValue) -> Option<&str> {
    raw.get().strip_prefix('"')?.strip_suffix('"')
}

/// The inside of a string that may be left out.
fn inside_or_empty(raw: Option<&RawValue>) -> Option<&str> {
    raw.map_or(Some(""), inside)
}

/// A JSON array that is written element by element.
struct List {
    json: String,
}

impl List {
    fn with_capacity(bytes: usize) -> List {
        let mut json = String::with_capacity(bytes);
        json.push('[');
        List { json }
    }

    fn is_empty(&self) -> bool {
        self.json.len() == 1
    }

    fn push(&mut self, pieces: &[&str]) {
        if !self.is_empty() {
            self.json.push(',');
        }
        pieces.iter().for_each(|piece| self.json.push_str(piece));
    }

    fn finish(mut self) -> String {
        self.json.push(']');
        self.json
    }
}

/// The messages of the chat API, a JSON array; `None` for a form that stays opaque.
fn messages_of(system: Option<&RawValue>, conversation: &RawValue) -> Option<String> {
    let messages: Vec<Message<'_>> = serde_json::from_str(conversation.get()).ok()?;
    let mut list = List::with_capacity(conversation.get().len() + 128);
    let system = system.map_or(Some(String::new()), system_text)?;
    if !system.is_empty() {
        list.push(&[r#"{"role":"system","content":""#, &system, "\"}"]);
    }
    for message in &messages {
        let role = match &*message.role {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => return None,
        };
        push_message(&mut list, role, message.content)?;
    }
    Some(list.finish())
}

/// The texts of `system` one after the other.
fn system_text(system: &RawValue) -> Option<String> {
    if let Some(text) = inside(system) {
        return Some(text.to_owned());
    }
    let blocks: Vec<Block<'_>> = serde_json::from_str(system.get()).ok()?;
    let mut all = String::new();
    for block in blocks.iter().filter(|block| block.kind == "text") {
        let text = inside_or_empty(block.text)?;
        if !text.starts_with(BILLING_HEADER) {
            all.push_str(text);
        }
    }
    Some(all)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    User,
    Assistant,
}

/// What the blocks of one message make.
struct Turn {
    parts: List,
    part_count: usize,
    /// The inside of the content, while it is one text.
    only_text: Option<String>,
    reasoning: String,
    thinks: bool,
    calls: List,
}

fn push_message(list: &mut List, role: Role, content: &RawValue) -> Option<()> {
    let name = if role == Role::User { "user" } else { "assistant" };
    if content.get().starts_with('"') {
        list.push(&[r#"{"role":""#, name, r#"","content":"#, content.get(), "}"]);
        return Some(());
    }
    let blocks: Vec<Block<'_>> = serde_json::from_str(content.get()).ok()?;
    let mut turn = Turn {
        parts: List::with_capacity(64),
        part_count: 0,
        only_text: None,
        reasoning: String::new(),
        thinks: false,
        calls: List::with_capacity(0),
    };
    for block in &blocks {
        turn.read(list, role, block)?;
    }
    turn.finish(list, role, name);
    Some(())
}

impl Turn {
    fn read(&mut self, list: &mut List, role: Role, block: &Block<'_>) -> Option<()> {
        match &*block.kind {
            "text" => self.push_text(inside_or_empty(block.text)?),
            "image" => {
                if let Some(url) = block.source.map(url_of) {
                    self.push_part(&[IMAGE_PART, &url?, "\"}}"]);
                }
            }
            "thinking" => {
                self.reasoning.push_str(inside_or_empty(block.thinking)?);
                self.thinks |= block.thinking.is_some();
            }
            // Opaque to the engine too, and answers to nothing.
            "redacted_thinking" | "tool_reference" => {}
            // The engine does not look at calls of a user.
            "tool_use" if role == Role::User => {}
            "tool_use" => self.push_call(block)?,
            "tool_result" if role == Role::User => push_tool_result(list, block)?,
            "tool_result" => {
                let text = inside_or_empty(block.content)?;
                self.push_text(&format!("Tool result: {text}"));
            }
            _ => return None,
        }
        Some(())
    }

    fn push_part(&mut self, pieces: &[&str]) {
        self.parts.push(pieces);
        self.part_count += 1;
        self.only_text = None;
    }

    fn push_text(&mut self, text: &str) {
        if !text.is_empty() {
            self.push_part(&[r#"{"type":"text","text":""#, text, "\"}"]);
            self.only_text = (self.part_count == 1).then(|| text.to_owned());
        }
    }

    /// The engine makes up an id from its clock where there is none.
    fn push_call(&mut self, block: &Block<'_>) -> Option<()> {
        let id = inside(block.id?).filter(|id| !id.is_empty())?;
        let name = inside_or_empty(block.name)?;
        let input = block.input.map_or("{}", RawValue::get);
        if !input.starts_with('{') {
            return None;
        }
        self.calls.push(&[
            r#"{"id":""#,
            id,
            r#"","type":"function","function":{"name":""#,
            name,
            r#"","arguments":"#,
            input,
            "}}",
        ]);
        Some(())
    }

    /// A user's turn of which nothing is left is no message; an assistant's is.
    fn finish(self, list: &mut List, role: Role, name: &str) {
        if role == Role::User && self.part_count == 0 {
            return;
        }
        let mut message = format!(r#"{{"role":"{name}""#);
        match (&self.only_text, self.part_count) {
            (_, 0) => {}
            (Some(text), _) => {
                message.push_str(r#","content":""#);
                message.push_str(text);
                message.push('"');
            }
            (None, _) => {
                message.push_str(r#","content":"#);
                message.push_str(&self.parts.finish());
            }
        }
        if self.thinks && role == Role::Assistant {
            message.push_str(r#","reasoning":""#);
            message.push_str(&self.reasoning);
            message.push('"');
        }
        if !self.calls.is_empty() {
            message.push_str(r#","tool_calls":"#);
            message.push_str(&self.calls.finish());
        }
        message.push('}');
        list.push(&[&message]);
    }
}

const IMAGE_PART: &str = r#"{"type":"image_url","image_url":{"url":""#;

/// The inside of the URL of an image; data without a type is taken for a JPEG.
fn url_of(source: &RawValue) -> Option<String> {
    let source: Source<'_> = serde_json::from_str(source.get()).ok()?;
    if source.kind.as_deref() == Some("url") {
        return inside_or_empty(source.url).map(str::to_owned);
    }
    let media_type = source.media_type.map_or(Some("image/jpeg"), inside)?;
    Some(format!("data:{media_type};base64,{}", inside_or_empty(source.data)?))
}

/// A tool's answer is a message of its own; its images follow as one of the user, and the tools
/// that it names as one more answer.
fn push_tool_result(list: &mut List, block: &Block<'_>) -> Option<()> {
    let id = inside_or_empty(block.tool_use_id)?;
    let mut text = String::new();
    let mut images = List::with_capacity(0);
    let mut references = List::with_capacity(0);
    match block.content {
        None => {}
        Some(content) if content.get().starts_with('"') => text.push_str(inside(content)?),
        Some(content) => {
            let items: Vec<Block<'_>> = serde_json::from_str(content.get()).ok()?;
            let mut texts = Vec::new();
            for item in &items {
                match &*item.kind {
                    "text" => texts.push(inside_or_empty(item.text)?),
                    "image" => {
                        let url = url_of(item.source?)?;
                        if !url.is_empty() {
                            images.push(&[IMAGE_PART, &url, "\"}}"]);
                        }
                    }
                    "tool_reference" => {
                        let named = |raw| inside_or_empty(raw).filter(|name| !name.is_empty());
                        if let Some(name) = named(item.tool_name).or_else(|| named(item.name)) {
                            references.push(&[r#"{"type":"tool_reference","name":""#, name, "\"}"]);
                        }
                    }
                    _ => {}
                }
            }
            text = texts.join("\\n");
        }
    }
    let head = [r#"{"role":"tool","tool_call_id":""#, id, r#"","content":"#];
    list.push(&[head[0], head[1], head[2], "\"", &text, "\"}"]);
    if !images.is_empty() {
        list.push(&[r#"{"role":"user","content":"#, &images.finish(), "}"]);
    }
    if !references.is_empty() {
        list.push(&[head[0], head[1], head[2], &references.finish(), "}"]);
    }
    Some(())
}

/// Tools in the form of the chat API; `None` for one that the engine refuses.
fn tools_of(tools: &RawValue) -> Option<Option<Box<RawValue>>> {
    let tools: Vec<Tool<'_>> = serde_json::from_str(tools.get()).ok()?;
    let mut list = List::with_capacity(256);
    for tool in &tools {
        let schema = typed_schema(tool.input_schema)?;
        let mut json = format!(
            r#"{{"type":"function","function":{{"name":{},"description":{},"parameters":{schema}"#,
            tool.name,
            tool.description.map_or("null", RawValue::get),
        );
        for (key, value) in [("strict", tool.strict), ("defer_loading", tool.defer_loading)] {
            if let Some(value) = value {
                json.push_str(&format!(r#","{key}":{value}"#));
            }
        }
        list.push(&[&json, "}}"]);
    }
    RawValue::from_string(list.finish()).ok().map(Some)
}

/// A schema without a type is one of an object; vLLM adds the type at its end.
fn typed_schema(schema: &RawValue) -> Option<Cow<'_, str>> {
    let text = schema.get();
    let fields: BTreeMap<String, IgnoredAny> = serde_json::from_str(text).ok()?;
    if fields.contains_key("type") {
        return Some(Cow::Borrowed(text));
    }
    let open = text.strip_prefix('{')?.strip_suffix('}')?.trim_end();
    let comma = if open.trim_start().is_empty() { "" } else { "," };
    Some(Cow::Owned(format!(r#"{{{open}{comma}"type":"object"}}"#)))
}

#[cfg(test)]
mod tests {
    use crate::api::Api;
    use crate::media::MediaKind;
    use crate::request::{BodyError, Prompt, RequestBody, parse};

    fn read(body: &str) -> RequestBody<'_> {
        parse(Api::Messages, body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"))
    }

    /// The messages of the chat API, or why there are none.
    fn messages(body: &str) -> String {
        match read(body).prompt {
            Prompt::Chat(chat) => chat.messages.json().to_owned(),
            Prompt::Opaque(opaque) => format!("opaque {}", opaque.why.as_str()),
            other => panic!("{other:?}"),
        }
    }

    fn of(messages_json: &str) -> String {
        messages(&format!(r#"{{"model":"m","max_tokens":5,"messages":{messages_json}}}"#))
    }

    #[test]
    fn turns_become_messages_as_vllm_makes_them() {
        let table = [
            (r#"[{"role":"user","content":"hi\n"}]"#, r#"[{"role":"user","content":"hi\n"}]"#),
            (
                r#"[{"role":"user","content":[{"type":"text","text":"a","cache_control":{}}]}]"#,
                r#"[{"role":"user","content":"a"}]"#,
            ),
            (
                r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":""},
                    {"type":"text","text":"b"}]}]"#,
                concat!(
                    r#"[{"role":"user","content":[{"type":"text","text":"a"},"#,
                    r#"{"type":"text","text":"b"}]}]"#
                ),
            ),
            (
                r#"[{"role":"user","content":[]},{"role":"user","content":"b"}]"#,
                r#"[{"role":"user","content":"b"}]"#,
            ),
            (r#"[{"role":"assistant","content":[]}]"#, r#"[{"role":"assistant"}]"#),
            (
                r#"[{"role":"assistant","content":[{"type":"thinking","thinking":"a","signature":"s"},
                    {"type":"redacted_thinking","data":"x"},{"type":"thinking","thinking":"b"},
                    {"type":"text","text":"so"},
                    {"type":"tool_use","id":"t1","name":"f","input":{"x":[1,"y"]}},
                    {"type":"tool_use","id":"t2","name":"g"}]}]"#,
                concat!(
                    r#"[{"role":"assistant","content":"so","reasoning":"ab","tool_calls":["#,
                    r#"{"id":"t1","type":"function","function":{"name":"f","#,
                    r#""arguments":{"x":[1,"y"]}}},"#,
                    r#"{"id":"t2","type":"function","function":{"name":"g","arguments":{}}}]}]"#
                ),
            ),
        ];
        for (given, expected) in table {
            assert_eq!(of(given), expected, "{given}");
        }
    }

    #[test]
    fn results_of_tools_and_images() {
        let table = [
            // Results of tools come before the rest of the turn; images follow each of them.
            (
                r#"[{"role":"user","content":[{"type":"text","text":"and"},
                    {"type":"tool_result","tool_use_id":"t1","content":"one"},
                    {"type":"tool_result","tool_use_id":"t2","content":[
                        {"type":"text","text":"a"},{"type":"text","text":"b"},
                        {"type":"image","source":{"type":"url","url":"http://i"}},
                        {"type":"tool_reference","tool_name":"f"}]},
                    {"type":"tool_result","tool_use_id":"t3"}]}]"#,
                concat!(
                    r#"[{"role":"tool","tool_call_id":"t1","content":"one"},"#,
                    r#"{"role":"tool","tool_call_id":"t2","content":"a\nb"},"#,
                    r#"{"role":"user","content":[{"type":"image_url","image_url":"#,
                    r#"{"url":"http://i"}}]},"#,
                    r#"{"role":"tool","tool_call_id":"t2","content":["#,
                    r#"{"type":"tool_reference","name":"f"}]},"#,
                    r#"{"role":"tool","tool_call_id":"t3","content":""},"#,
                    r#"{"role":"user","content":"and"}]"#
                ),
            ),
            (
                r#"[{"role":"user","content":[{"type":"tool_result","tool_use_id":"t"}]}]"#,
                r#"[{"role":"tool","tool_call_id":"t","content":""}]"#,
            ),
            (
                r#"[{"role":"assistant","content":[{"type":"tool_result","content":"x"}]}]"#,
                r#"[{"role":"assistant","content":"Tool result: x"}]"#,
            ),
            (
                r#"[{"role":"user","content":[{"type":"image","source":{"type":"base64",
                    "media_type":"image/png","data":"QUJD"}},
                    {"type":"image","source":{"data":"QUJD"}}]}]"#,
                concat!(
                    r#"[{"role":"user","content":[{"type":"image_url","image_url":"#,
                    r#"{"url":"data:image/png;base64,QUJD"}},{"type":"image_url","image_url":"#,
                    r#"{"url":"data:image/jpeg;base64,QUJD"}}]}]"#
                ),
            ),
        ];
        for (given, expected) in table {
            assert_eq!(of(given), expected, "{given}");
        }
    }

    #[test]
    fn the_system_text() {
        let table = [
            (r#""be brief""#, r#"[{"role":"system","content":"be brief"},"#),
            (r#""""#, "["),
            ("null", "["),
            ("[]", "["),
            (
                r#"[{"type":"text","text":"x-anthropic-billing-header: 7"},
                    {"type":"text","text":"a"},{"type":"text","text":"b"}]"#,
                r#"[{"role":"system","content":"ab"},"#,
            ),
        ];
        for (system, expected) in table {
            let body =
                format!(r#"{{"system":{system},"messages":[{{"role":"user","content":"u"}}]}}"#);
            let expected = format!(r#"{expected}{{"role":"user","content":"u"}}]"#);
            assert_eq!(messages(&body), expected, "{system}");
        }
    }

    #[test]
    fn what_the_engine_renders_in_its_own_way_stays_opaque() {
        let opaque = "opaque messages_form";
        for messages in [
            r#"[{"role":"system","content":"s"}]"#,
            r#"[{"role":"robot","content":"s"}]"#,
            r#"[{"role":"user"}]"#,
            r#"[{"role":"user","content":7}]"#,
            r#"[{"role":"user","content":[{"type":"document","source":{}}]}]"#,
            r#"[{"role":"user","content":[{"text":"no type"}]}]"#,
            r#"[{"role":"assistant","content":[{"type":"tool_use","name":"f","input":{}}]}]"#,
            r#"[{"role":"assistant","content":[{"type":"tool_use","id":"t","input":"x"}]}]"#,
            r#"[{"role":"assistant","content":[{"type":"tool_result","content":[]}]}]"#,
            "[7]",
        ] {
            assert_eq!(of(messages), opaque, "{messages}");
        }
        for rest in [
            r#""thinking":{"type":"disabled"}"#,
            r#""tools":[{"type":"web_search","name":"w"}]"#,
            r#""tools":[{"name":"w","input_schema":[]}]"#,
            r#""tools":{}"#,
            r#""system":7"#,
        ] {
            let body = format!(r#"{{"messages":[{{"role":"user","content":"u"}}],{rest}}}"#);
            assert_eq!(messages(&body), opaque, "{rest}");
        }
        let body = r#"{"system":"s","tools":[7],"messages":[]}"#;
        let Prompt::Opaque(opaque) = read(body).prompt else { panic!("{body}") };
        let head: Vec<&str> = opaque.head.iter().map(|raw| raw.get()).collect();
        assert_eq!(head, ["[7]", "\"s\""]);
        assert_eq!(
            parse(Api::Messages, br#"{"messages":"x"}"#).unwrap_err(),
            BodyError::WrongType {
                field: "messages",
                expected: "an array of messages",
                found: "a string".to_owned()
            }
        );
    }

    #[test]
    fn tools_become_functions() {
        let body = r#"{"messages":[],"tools":[
            {"name":"a","description":"does","input_schema":{"type":"object","x":1},"strict":true},
            {"name":"b","input_schema":{ "x":{"type":1} }},{"name":"c","input_schema":{}},
            {"name":"d","input_schema":{"type":null},"defer_loading":true}]}"#;
        let Prompt::Chat(chat) = read(body).prompt else { panic!("{body}") };
        let functions = [
            concat!(
                r#"{"name":"a","description":"does","parameters":{"type":"object","x":1},"#,
                r#""strict":true}"#
            ),
            concat!(
                r#"{"name":"b","description":null,"#,
                r#""parameters":{ "x":{"type":1},"type":"object"}}"#
            ),
            r#"{"name":"c","description":null,"parameters":{"type":"object"}}"#,
            concat!(
                r#"{"name":"d","description":null,"parameters":{"type":null},"#,
                r#""defer_loading":true}"#
            ),
        ];
        let tools = functions.map(|f| format!(r#"{{"type":"function","function":{f}}}"#));
        assert_eq!(
            chat.tools.map(|tools| tools.get().to_owned()),
            Some(format!("[{}]", tools.join(",")))
        );
        let Prompt::Chat(chat) = read(r#"{"messages":[],"tools":null}"#).prompt else { panic!() };
        assert!(chat.tools.is_none());
    }

    #[test]
    fn what_else_is_read() {
        let body = r#"{"model":"m","max_tokens":9,"stream":true,"cache_salt":"s",
            "thinking":{"type":"enabled","budget_tokens":2000},"output_config":{"effort":"low"},
            "chat_template_kwargs":{"a":1},
            "messages":[{"role":"user","content":[{"type":"image","source":{"type":"url",
            "url":"http://i/1"}}]}]}"#;
        let body = read(body);
        assert_eq!((body.model.as_deref(), body.max_tokens), (Some("m"), Some(9)));
        assert!(body.stream && body.include_usage);
        assert_eq!(body.cache_salt.as_deref(), Some("s"));
        let Prompt::Chat(chat) = &body.prompt else { panic!("{body:?}") };
        assert_eq!(chat.reasoning_effort.as_deref(), Some("low"));
        assert!(chat.add_generation_prompt && !chat.continue_final_message);
        assert_eq!(chat.chat_template_kwargs.map(|raw| raw.get()), Some(r#"{"a":1}"#));
        assert_eq!(body.media.len(), 1);
        assert_eq!(body.media[0].kind, MediaKind::Image);
        assert_eq!(&chat.messages.json()[body.media[0].place.clone()], "http://i/1");
        assert!(!read(r#"{"messages":[]}"#).include_usage);
    }

    /// Random bodies and the chat requests that vLLM 0.32 makes of them
    /// (`AnthropicServingMessages.to_chat_completion_request`), without what is null, and with the
    /// arguments of tool calls as the objects that its renderer makes of them.
    #[test]
    fn as_vllm_converts_them() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/messages.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.lines().count() >= 80);
        for line in text.lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let body = row["body"].to_string();
            let Prompt::Chat(chat) = read(&body).prompt else { panic!("{body}") };
            let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(json(chat.messages.json()), row["messages"], "{body}");
            let tools = chat.tools.as_deref().map(|tools| json(tools.get()));
            assert_eq!(tools.as_ref(), row.get("tools"), "{body}");
            assert_eq!(chat.reasoning_effort.as_deref(), row["effort"].as_str(), "{body}");
        }
    }
}
