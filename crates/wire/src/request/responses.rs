//! Which conversation does a request of the responses API stand for?
//!
//! vLLM turns `instructions` into a system message, a string `input` into a user message, and
//! takes the messages of an `input` list as they are. Only this is done here. What engines treat
//! in ways of their own (function calls and their outputs, reasoning, images, tools) stays opaque,
//! and what is stored in the engine has no conversation at all.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{BodyError, Chat, Fields, Loose, Messages, NoPrompt, Opaque, Prompt};
use super::{hint, present, raw_type_name};
use crate::api::Api;

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    role: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    status: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
}

pub(super) fn into_prompt(fields: Fields<'_>) -> Result<Prompt<'_>, BodyError> {
    if fields.stored_in_engine.iter().any(Loose::is_set) {
        return Ok(Prompt::None(NoPrompt::StoredInEngine));
    }
    let Some(input) = present(fields.input) else {
        return Err(BodyError::Missing { field: "input", api: Api::Responses.as_str() });
    };
    let tools = present(fields.tools).filter(|tools| !is_empty_array(tools));
    let instructions = present(fields.instructions);
    let opaque = |why| {
        let head = instructions.into_iter().chain(tools).collect();
        Ok(Prompt::Opaque(Opaque { why, head, conversation: input }))
    };
    if tools.is_some() {
        return opaque(NoPrompt::ResponsesTools);
    }
    let mut json = String::with_capacity(input.get().len() + 64);
    json.push('[');
    match instructions {
        Some(text) if text.get().starts_with('"') => push_message(&mut json, "system", text.get()),
        Some(other) => {
            return Err(BodyError::WrongType {
                field: "instructions",
                expected: "a string",
                found: raw_type_name(other).to_owned(),
            });
        }
        None => {}
    }
    let mut stays_open = false;
    match input.get().as_bytes().first() {
        Some(b'"') => push_message(&mut json, "user", input.get()),
        Some(b'[') => match push_items(&mut json, input) {
            Some(is_open) => stays_open = is_open,
            None => return opaque(NoPrompt::ResponsesItem),
        },
        _ => {
            return Err(BodyError::WrongType {
                field: "input",
                expected: "a string or an array of items",
                found: raw_type_name(input).to_owned(),
            });
        }
    }
    json.push(']');
    Ok(Prompt::Chat(Chat {
        messages: Messages::Built(json),
        tools: None,
        documents: None,
        chat_template: None,
        chat_template_kwargs: present(fields.chat_template_kwargs),
        add_generation_prompt: !stays_open,
        continue_final_message: stays_open,
        add_special_tokens: false,
        reasoning_effort: hint(fields.reasoning.effort),
    }))
}

fn is_empty_array(raw: &RawValue) -> bool {
    raw.get().bytes().filter(|byte| !byte.is_ascii_whitespace()).eq(*b"[]")
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn push_message(json: &mut String, role: &str, content: &str) {
    if json.len() > 1 {
        json.push(',');
    }
    json.push_str(r#"{"role":"#);
    json.push_str(&quoted(role));
    json.push_str(r#","content":"#);
    json.push_str(content);
    json.push('}');
}

/// Appends all items as messages and says whether the last one stays open; `None` when one of
/// them is no message of text.
fn push_items(json: &mut String, input: &RawValue) -> Option<bool> {
    let items: Vec<Item<'_>> = serde_json::from_str(input.get()).ok()?;
    let mut is_open = false;
    for item in items {
        if item.kind.as_deref().is_some_and(|kind| kind != "message") {
            return None;
        }
        let role = item.role?;
        let content = item.content?;
        match content.get().as_bytes().first() {
            Some(b'"') => push_message(json, &role, content.get()),
            Some(b'[') => push_message(json, &role, &content_of_parts(&role, content)?),
            _ => return None,
        }
        is_open = role == "assistant"
            && matches!(item.status.as_deref(), Some("in_progress" | "incomplete"));
    }
    Some(is_open)
}

/// The content of a message given in parts: of an assistant's one part the text itself, as vLLM
/// does, of other roles the parts with the type that chat templates know.
fn content_of_parts(role: &str, content: &RawValue) -> Option<String> {
    let parts: Vec<Part<'_>> = serde_json::from_str(content.get()).ok()?;
    let mut texts = Vec::with_capacity(parts.len());
    for part in &parts {
        let is_text = matches!(&*part.kind, "input_text" | "output_text" | "text");
        let text = part.text.filter(|text| is_text && text.get().starts_with('"'))?;
        texts.push(text.get());
    }
    match (role, texts.as_slice()) {
        ("assistant", [text]) => Some((*text).to_owned()),
        ("assistant", _) => None,
        _ => {
            let parts: Vec<String> =
                texts.iter().map(|text| format!(r#"{{"type":"text","text":{text}}}"#)).collect();
            Some(format!("[{}]", parts.join(",")))
        }
    }
}
