//! What in a request body decides where the request goes?
//!
//! One pass over the body, borrowing from it; no tree. Only what routing needs is checked: the
//! engine answers for everything else, so a field of a wrong type that merely hints (`stream`,
//! `max_tokens`, `n`, ...) counts as absent. A field given twice counts as its last value, as in
//! Python's `json`.

mod anthropic;
mod features;
mod grpc;
mod loose;
mod plain;
mod responses;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use kvroute_core::blocks::MultimodalSpan;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use thiserror::Error;

use crate::api::Api;
use crate::media::{self, MediaItem};
use crate::model_name;
use features::read_items;
use loose::{Loose, LoosePrompt, Wrong};
use plain::Conversation;
pub use plain::{Lists, PlainTurn, emptied};

/// Most prompts of one request that are looked at. A request with more is routed by load: OpenAI
/// allows 2,048 inputs of an embeddings request.
pub const PROMPTS_PER_REQUEST_MAX: usize = 2048;

/// Most multimodal items of one request that are looked at.
pub const MULTIMODAL_ITEMS_MAX: usize = 4096;

/// Why a body is refused. The fault is the client's: status 400.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BodyError {
    /// Not JSON.
    #[error("the request body is not valid JSON: {message} at byte {at}")]
    BadJson {
        /// What the parser says.
        message: String,
        /// Offset in the body.
        at: usize,
    },
    /// JSON, but not an object.
    #[error("the request body must be a JSON object, found {found}")]
    NotObject {
        /// What it is.
        found: &'static str,
    },
    /// A field of a wrong type.
    #[error("`{field}` must be {expected}, found {found}")]
    WrongType {
        /// Name of the field.
        field: &'static str,
        /// The types that are right.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A field that this API requires is missing.
    #[error("`{field}` is missing; {api} needs it")]
    Missing {
        /// Name of the field.
        field: &'static str,
        /// Name of the API.
        api: &'static str,
    },
    /// Not the gRPC message that this method takes.
    #[error("the gRPC message cannot be read: {message}")]
    BadGrpc {
        /// What is wrong with it.
        message: String,
    },
    /// A gRPC message that is compressed.
    #[error(
        "the gRPC message is compressed, which this router does not read; send it uncompressed \
         (no grpc-encoding, or identity)"
    )]
    Compressed,
}

/// Why a request has no prompt that can be turned into tokens. It is routed by load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoPrompt {
    /// The path belongs to no API that is understood.
    OtherApi,
    /// The prompt is given as embeddings.
    PromptEmbeds,
    /// More than [`PROMPTS_PER_REQUEST_MAX`] prompts.
    TooManyPrompts,
    /// `truncate_prompt_tokens`: the engine cuts the prompt by rules of its own.
    Truncated,
    /// A part of the prompt is stored in the engine (`previous_response_id`, `conversation`,
    /// `prompt` of the responses API).
    StoredInEngine,
    /// The responses API names tools, which the engine rewrites for its template.
    ResponsesTools,
    /// The responses API holds an item other than a message of text (a function call and its
    /// output, reasoning, an image, ...), for which engines differ in what they make of it.
    ResponsesItem,
    /// An Anthropic body of a form whose rendering depends on how the engine was started or on its
    /// template: system messages inside of the conversation, `thinking` switched off, and what
    /// vLLM's messages API does not take.
    MessagesForm,
    /// Images, videos or sound that only the engine's processor turns into tokens.
    UnprocessedMedia,
    /// The API neither reads nor fills the cache of prompts.
    NotCached,
}

impl NoPrompt {
    /// All reasons.
    pub const ALL: [NoPrompt; 10] = [
        NoPrompt::OtherApi,
        NoPrompt::PromptEmbeds,
        NoPrompt::TooManyPrompts,
        NoPrompt::Truncated,
        NoPrompt::StoredInEngine,
        NoPrompt::ResponsesTools,
        NoPrompt::ResponsesItem,
        NoPrompt::MessagesForm,
        NoPrompt::UnprocessedMedia,
        NoPrompt::NotCached,
    ];

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            NoPrompt::OtherApi => "other_api",
            NoPrompt::PromptEmbeds => "prompt_embeds",
            NoPrompt::TooManyPrompts => "too_many_prompts",
            NoPrompt::Truncated => "truncated",
            NoPrompt::StoredInEngine => "stored_in_engine",
            NoPrompt::ResponsesTools => "responses_tools",
            NoPrompt::ResponsesItem => "responses_item",
            NoPrompt::MessagesForm => "messages_form",
            NoPrompt::UnprocessedMedia => "unprocessed_media",
            NoPrompt::NotCached => "not_cached",
        }
    }
}

/// What routing needs to know of one request body.
#[derive(Clone, Debug)]
pub struct RequestBody<'a> {
    /// Model or adapter name; `None` when the body names none.
    pub model: Option<Cow<'a, str>>,
    /// Bytes of the body that are the value of `model` (quotes included, or `null`), of the last
    /// one where it is given twice. `None`: the body has no such field, or holds it inside of
    /// another encoding (gRPC).
    pub model_place: Option<Range<usize>>,
    /// The answer comes as server-sent events.
    pub stream: bool,
    /// `stream_options.include_usage`: the stream ends with a usage object.
    pub include_usage: bool,
    /// Most tokens to generate (`max_completion_tokens`, `max_tokens`, `max_output_tokens`,
    /// `sampling_params.max_tokens` or `sampling_params.max_new_tokens`).
    pub max_tokens: Option<u32>,
    /// Answers per prompt; `None` when the body does not say (1).
    pub n: Option<u32>,
    /// The engine needs the logits of every prompt position (`prompt_logprobs`, `echo` with
    /// `logprobs`, SGLang's `logprob_start_len`), so it computes the whole prompt and reads nothing
    /// from its cache.
    pub skips_cache: bool,
    /// Separates the prefix caches of tenants (`cache_salt`, SGLang's `extra_key`).
    pub cache_salt: Option<Cow<'a, str>>,
    /// vLLM's `session_id`.
    pub session_id: Option<Cow<'a, str>>,
    /// The engine adds special tokens (BOS) to [`Prompt::Texts`].
    pub add_special_tokens: bool,
    /// What the model is asked.
    pub prompt: Prompt<'a>,
    /// Multimodal items of [`Prompt::TokenIds`], by offset.
    pub items: Vec<MultimodalSpan>,
    /// Images, videos and sounds of [`Prompt::Chat`] and [`Prompt::Opaque`], in order, with their
    /// places in [`Messages::json`] or [`Opaque::conversation`]. At most [`MULTIMODAL_ITEMS_MAX`].
    pub media: Vec<MediaItem>,
}

/// The prompt or prompts of a request.
#[derive(Clone, Debug)]
pub enum Prompt<'a> {
    /// None that can be turned into tokens.
    None(NoPrompt),
    /// Plain texts, each one prompt.
    Texts(Vec<Cow<'a, str>>),
    /// Token ids, each list one prompt.
    TokenIds(Vec<Vec<u32>>),
    /// A conversation, to be rendered by the model's template.
    Chat(Chat<'a>),
    /// A conversation that only the engine can render. It grows at its end like any other, which
    /// is enough for estimates.
    Opaque(Opaque<'a>),
}

/// A conversation of which only the JSON is known.
#[derive(Clone, Debug)]
pub struct Opaque<'a> {
    /// Why it has no tokens.
    pub why: NoPrompt,
    /// What stands before it in the prompt (instructions, tools), JSON.
    pub head: Vec<&'a RawValue>,
    /// Its messages or items, JSON.
    pub conversation: &'a RawValue,
}

/// A conversation and what its template is told.
#[derive(Clone, Debug)]
pub struct Chat<'a> {
    /// The messages.
    pub messages: Messages<'a>,
    /// Tools in the form of OpenAI's chat API, JSON.
    pub tools: Option<Cow<'a, RawValue>>,
    /// `documents`, JSON.
    pub documents: Option<&'a RawValue>,
    /// A template that replaces the model's.
    pub chat_template: Option<Cow<'a, str>>,
    /// `chat_template_kwargs`, a JSON object.
    pub chat_template_kwargs: Option<&'a RawValue>,
    /// The template opens the assistant's turn.
    pub add_generation_prompt: bool,
    /// The last message stays open.
    pub continue_final_message: bool,
    /// The engine adds special tokens to the rendered text.
    pub add_special_tokens: bool,
    /// `reasoning_effort`, which vLLM passes to the template.
    pub reasoning_effort: Option<Cow<'a, str>>,
}

/// A JSON array of chat messages.
#[derive(Clone, Debug)]
pub enum Messages<'a> {
    /// As in the body.
    Raw(&'a str),
    /// Nothing but roles and texts.
    Plain {
        /// The messages.
        turns: Vec<PlainTurn<'a>>,
        /// The same as in the body.
        json: &'a [u8],
    },
    /// Made from the body of another API than chat.
    Built(String),
}

impl Messages<'_> {
    /// The JSON text of the array.
    pub fn json(&self) -> &str {
        match self {
            Messages::Raw(json) => json,
            // Strings that have been read and what JSON has between them: always text.
            Messages::Plain { json, .. } => std::str::from_utf8(json).unwrap_or("[]"),
            Messages::Built(text) => text,
        }
    }
}

/// Reads a request body of `api`. Where [`Api::reads_body`] says no, the body may be anything:
/// nothing is refused, and a `model` is reported where there is one.
///
/// # Errors
/// [`BodyError`], whose text can be shown to the client as it is.
pub fn parse(api: Api, body: &[u8]) -> Result<RequestBody<'_>, BodyError> {
    parse_in(api, body, &mut [], &mut Lists::default())
}

/// The same in the memory of the caller: texts that cannot be used as they stand in the body are
/// written to `lent`, if it is as long as the body, and lists are made of `lists`, which can
/// [take](Lists::take_back) them back. Chats of roles and texts, and prompts that are one text,
/// then ask for no memory.
///
/// # Errors
/// As [`parse`].
pub fn parse_in<'a>(
    api: Api,
    body: &'a [u8],
    lent: &'a mut [u8],
    lists: &mut Lists,
) -> Result<RequestBody<'a>, BodyError> {
    let lent = if lent.len() < body.len() { &mut [] } else { lent };
    if !api.reads_body() {
        let is_object = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        let fields = is_object.then(|| read_fields(api, body, lent, lists));
        return Ok(fields.transpose().ok().flatten().unwrap_or_default().into_passed_through());
    }
    match api {
        Api::GrpcGenerate => grpc::generate(body),
        Api::GrpcEmbed => grpc::embed(body),
        Api::VertexChat => wrapped(Api::ChatCompletions, body),
        Api::VertexRaw | Api::VertexStreamRaw => wrapped(Api::Responses, body),
        _ => read_fields(api, body, lent, lists)?.into_body(api),
    }
}

/// JSON of `api` inside of a gRPC message.
fn wrapped(api: Api, body: &[u8]) -> Result<RequestBody<'_>, BodyError> {
    Ok(RequestBody { model_place: None, ..parse(api, grpc::http_body(body)?)? })
}

fn read_fields<'a>(
    api: Api,
    body: &'a [u8],
    lent: &'a mut [u8],
    lists: &mut Lists,
) -> Result<Fields<'a>, BodyError> {
    let in_one_pass = plain::attempt(api, body, lent, lists);
    match in_one_pass.map_or_else(|| read_once(api, body), Ok) {
        Ok(fields) => {
            let model_place = fields.model_text.and_then(|text| model_name::place(body, text));
            Ok(Fields { model_place, ..fields })
        }
        Err(error) => Err(match serde_json::from_slice::<Loose<'_>>(body) {
            Ok(value) if value != Loose::Object => {
                BodyError::NotObject { found: value.type_name() }
            }
            _ => bad_json(body, &error),
        }),
    }
}

fn read_once(api: Api, body: &[u8]) -> Result<Fields<'_>, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let read = deserializer.deserialize_map(FieldsVisitor { api });
    read.and_then(|fields| deserializer.end().map(|()| fields))
}

fn bad_json(body: &[u8], error: &serde_json::Error) -> BodyError {
    let line_start = match error.line() {
        0 | 1 => 0,
        line => {
            let mut newlines = body.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            newlines.nth(line - 2).map_or(0, |(at, _)| at + 1)
        }
    };
    let at = (line_start + error.column().saturating_sub(1)).min(body.len());
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or_default().to_owned();
    BodyError::BadJson { message, at }
}

/// The fields of a body that matter to any API.
#[derive(Default)]
struct Fields<'a> {
    model: Loose<'a>,
    /// The model as it is written.
    model_text: Option<&'a str>,
    model_place: Option<Range<usize>>,
    stream: Loose<'a>,
    stream_options: Nested<'a>,
    max_tokens: Loose<'a>,
    max_completion_tokens: Loose<'a>,
    max_output_tokens: Loose<'a>,
    sampling_params: Nested<'a>,
    n: Loose<'a>,
    echo: Loose<'a>,
    logprobs: Loose<'a>,
    prompt_logprobs: Loose<'a>,
    cache_salt: Loose<'a>,
    session_id: Loose<'a>,
    truncate_prompt_tokens: Loose<'a>,
    prompt_embeds: Loose<'a>,
    prompt: LoosePrompt<'a>,
    /// An empty list for texts.
    texts: Vec<Cow<'a, str>>,
    features: Option<&'a RawValue>,
    messages: Option<&'a RawValue>,
    conversation: Option<Conversation<'a>>,
    tools: Option<&'a RawValue>,
    documents: Option<&'a RawValue>,
    chat_template: Loose<'a>,
    chat_template_kwargs: Option<&'a RawValue>,
    add_generation_prompt: Loose<'a>,
    continue_final_message: Loose<'a>,
    add_special_tokens: Loose<'a>,
    reasoning_effort: Loose<'a>,
    reasoning: Nested<'a>,
    input: Option<&'a RawValue>,
    instructions: Option<&'a RawValue>,
    stored_in_engine: [Loose<'a>; 3],
    items: Option<&'a RawValue>,
    system: Option<&'a RawValue>,
    thinking: Nested<'a>,
    output_config: Nested<'a>,
    text: LoosePrompt<'a>,
    return_logprob: Loose<'a>,
    logprob_start_len: Loose<'a>,
    media_data: Loose<'a>,
}

/// The few entries of nested objects that matter; other types of value count as empty objects.
#[derive(Default)]
struct Nested<'a> {
    include_usage: Loose<'a>,
    max_tokens: Loose<'a>,
    max_new_tokens: Loose<'a>,
    n: Loose<'a>,
    prompt_logprobs: Loose<'a>,
    effort: Loose<'a>,
    kind: Loose<'a>,
}

struct FieldsVisitor {
    api: Api,
}

/// A key of the body; the text is needed for a comparison only.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Key<'de>, D::Error> {
        match Loose::deserialize(deserializer)? {
            Loose::Text(text) => Ok(Key(text)),
            other => Err(serde::de::Error::custom(format_args!(
                "expected a string as key, found {}",
                other.type_name()
            ))),
        }
    }
}

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        let is_responses = self.api == Api::Responses;
        let is_messages = self.api == Api::Messages;
        let is_sglang = self.api == Api::SglangGenerate;
        while let Some(key) = map.next_key::<Key<'de>>()? {
            match &*key.0 {
                "model" => {
                    let text = map.next_value::<&RawValue>()?.get();
                    fields.model = serde_json::from_str(text).map_err(serde::de::Error::custom)?;
                    fields.model_text = Some(text);
                }
                "stream" => fields.stream = map.next_value()?,
                "stream_options" => fields.stream_options = map.next_value()?,
                "max_tokens" => fields.max_tokens = map.next_value()?,
                "max_completion_tokens" => fields.max_completion_tokens = map.next_value()?,
                "max_output_tokens" => fields.max_output_tokens = map.next_value()?,
                "sampling_params" => fields.sampling_params = map.next_value()?,
                "n" => fields.n = map.next_value()?,
                "echo" => fields.echo = map.next_value()?,
                "logprobs" => fields.logprobs = map.next_value()?,
                "prompt_logprobs" => fields.prompt_logprobs = map.next_value()?,
                "cache_salt" => fields.cache_salt = map.next_value()?,
                "session_id" => fields.session_id = map.next_value()?,
                "truncate_prompt_tokens" => fields.truncate_prompt_tokens = map.next_value()?,
                "prompt_embeds" => fields.prompt_embeds = map.next_value()?,
                "prompt" if self.api == Api::Completions => fields.prompt = map.next_value()?,
                "input" if self.api == Api::Embeddings => fields.prompt = map.next_value()?,
                "token_ids" if self.api == Api::VllmGenerate => fields.prompt = map.next_value()?,
                "features" => fields.features = Some(map.next_value()?),
                "messages" => fields.messages = Some(map.next_value()?),
                "tools" => fields.tools = Some(map.next_value()?),
                "documents" => fields.documents = Some(map.next_value()?),
                "chat_template" => fields.chat_template = map.next_value()?,
                "chat_template_kwargs" => fields.chat_template_kwargs = Some(map.next_value()?),
                "add_generation_prompt" => fields.add_generation_prompt = map.next_value()?,
                "continue_final_message" => fields.continue_final_message = map.next_value()?,
                "add_special_tokens" => fields.add_special_tokens = map.next_value()?,
                "reasoning_effort" => fields.reasoning_effort = map.next_value()?,
                "reasoning" => fields.reasoning = map.next_value()?,
                "input" if is_responses => fields.input = Some(map.next_value()?),
                "instructions" if is_responses => fields.instructions = Some(map.next_value()?),
                "previous_response_id" => fields.stored_in_engine[0] = map.next_value()?,
                "conversation" => fields.stored_in_engine[1] = map.next_value()?,
                "prompt" if is_responses => fields.stored_in_engine[2] = map.next_value()?,
                "items" if self.api == Api::Conversations => fields.items = Some(map.next_value()?),
                "system" if is_messages => fields.system = Some(map.next_value()?),
                "thinking" if is_messages => fields.thinking = map.next_value()?,
                "output_config" if is_messages => fields.output_config = map.next_value()?,
                "input_ids" if is_sglang => fields.prompt = map.next_value()?,
                "text" if is_sglang => fields.text = map.next_value()?,
                "extra_key" if is_sglang => fields.cache_salt = map.next_value()?,
                "input_embeds" if is_sglang => fields.prompt_embeds = map.next_value()?,
                "return_logprob" => fields.return_logprob = map.next_value()?,
                "logprob_start_len" => fields.logprob_start_len = map.next_value()?,
                "image_data" | "video_data" | "audio_data" if is_sglang => {
                    let data = map.next_value::<Loose<'de>>()?;
                    fields.media_data = if data.is_set() { data } else { fields.media_data };
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(fields)
    }
}

impl<'de> Deserialize<'de> for Nested<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Nested<'de>, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?;
        let mut nested = Nested::default();
        if raw.get().starts_with('{') {
            let mut inner = serde_json::Deserializer::from_str(raw.get());
            nested = inner.deserialize_map(NestedVisitor).map_err(serde::de::Error::custom)?;
        }
        Ok(nested)
    }
}

struct NestedVisitor;

impl<'de> Visitor<'de> for NestedVisitor {
    type Value = Nested<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Nested<'de>, A::Error> {
        let mut nested = Nested::default();
        while let Some(key) = map.next_key::<Key<'de>>()? {
            match &*key.0 {
                "include_usage" => nested.include_usage = map.next_value()?,
                "max_tokens" => nested.max_tokens = map.next_value()?,
                "max_new_tokens" => nested.max_new_tokens = map.next_value()?,
                "n" => nested.n = map.next_value()?,
                "type" => nested.kind = map.next_value()?,
                "prompt_logprobs" => nested.prompt_logprobs = map.next_value()?,
                "effort" => nested.effort = map.next_value()?,
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(nested)
    }
}

/// A JSON value that is there and not `null`.
fn present(raw: Option<&RawValue>) -> Option<&RawValue> {
    raw.filter(|raw| raw.get() != "null")
}

fn raw_type_name(raw: &RawValue) -> &'static str {
    type_name(raw.get())
}

fn type_name(json: &str) -> &'static str {
    match json.as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

fn text<'a>(field: &'static str, value: Loose<'a>) -> Result<Option<Cow<'a, str>>, BodyError> {
    match value {
        Loose::Missing | Loose::Null => Ok(None),
        Loose::Text(text) => Ok(Some(text)),
        other => {
            let found = other.type_name().to_owned();
            Err(BodyError::WrongType { field, expected: "a string", found })
        }
    }
}

/// The text of a hint; another type of value counts as absent.
fn hint(value: Loose<'_>) -> Option<Cow<'_, str>> {
    match value {
        Loose::Text(text) => Some(text),
        _ => None,
    }
}

impl<'a> Fields<'a> {
    fn into_passed_through(self) -> RequestBody<'a> {
        RequestBody {
            model: hint(self.model),
            model_place: self.model_place,
            stream: self.stream.flag().unwrap_or(false),
            include_usage: false,
            max_tokens: self.max_tokens.count(),
            n: self.n.count(),
            skips_cache: false,
            cache_salt: hint(self.cache_salt),
            session_id: hint(self.session_id),
            add_special_tokens: false,
            prompt: Prompt::None(NoPrompt::OtherApi),
            items: Vec::new(),
            media: Vec::new(),
        }
    }

    fn into_body(mut self, api: Api) -> Result<RequestBody<'a>, BodyError> {
        let max_tokens = match api {
            Api::Responses => self.max_output_tokens.count(),
            Api::VllmGenerate => self.sampling_params.max_tokens.count(),
            Api::SglangGenerate => self.sampling_params.max_new_tokens.count(),
            _ => self.max_completion_tokens.count().or(self.max_tokens.count()),
        };
        let items = match present(self.features) {
            Some(features) if api == Api::VllmGenerate => read_items(features)?,
            _ => Vec::new(),
        };
        let stream = self.stream.flag().unwrap_or(false);
        let salt_field = if api == Api::SglangGenerate { "extra_key" } else { "cache_salt" };
        let mut body = RequestBody {
            model: text("model", std::mem::take(&mut self.model))?,
            model_place: self.model_place.take(),
            stream,
            // Anthropic's streams always end with one.
            include_usage: self.stream_options.include_usage.flag().unwrap_or(false)
                || (api == Api::Messages && stream),
            max_tokens,
            n: self.n.count().or(self.sampling_params.n.count()),
            skips_cache: self.skips_cache(api),
            cache_salt: text(salt_field, std::mem::take(&mut self.cache_salt))?,
            session_id: hint(std::mem::take(&mut self.session_id)),
            add_special_tokens: api == Api::SglangGenerate
                || self.add_special_tokens.flag().unwrap_or(true),
            prompt: self.into_prompt(api)?,
            items,
            media: Vec::new(),
        };
        body.media = match &body.prompt {
            Prompt::Chat(Chat { messages: Messages::Plain { .. }, .. }) => Vec::new(),
            Prompt::Chat(chat) => media::find(chat.messages.json()),
            Prompt::Opaque(opaque) => media::find(opaque.conversation.get()),
            Prompt::None(_) | Prompt::Texts(_) | Prompt::TokenIds(_) => Vec::new(),
        };
        Ok(body)
    }

    fn skips_cache(&self, api: Api) -> bool {
        if api == Api::SglangGenerate {
            // -1, the default, asks for the logits of what is generated only.
            return self.return_logprob.flag() == Some(true)
                && self.logprob_start_len.count().is_some();
        }
        self.prompt_logprobs.is_set()
            || self.sampling_params.prompt_logprobs.is_set()
            || (self.echo.flag() == Some(true) && self.logprobs.is_set())
    }

    fn into_prompt(mut self, api: Api) -> Result<Prompt<'a>, BodyError> {
        let prompt = std::mem::take(&mut self.prompt);
        let is_truncated = self.truncate_prompt_tokens.is_set();
        let prompt = match api {
            Api::Completions if self.prompt_embeds.is_set() => Prompt::None(NoPrompt::PromptEmbeds),
            Api::Completions => match prompt {
                LoosePrompt::Text(text) => {
                    let mut texts = std::mem::take(&mut self.texts);
                    texts.push(text);
                    Prompt::Texts(texts)
                }
                prompt => prompt_of("prompt", api, prompt, PROMPT_FORMS)?,
            },
            Api::Embeddings if present(self.messages).is_some() => self.into_chat(api)?,
            Api::Embeddings => prompt_of("input", api, prompt, PROMPT_FORMS)?,
            Api::VllmGenerate => token_ids_of(prompt, api)?,
            Api::SglangGenerate => self.into_sglang(prompt)?,
            Api::ChatCompletions => self.into_chat(api)?,
            Api::Responses => responses::into_prompt(self)?,
            Api::Messages => anthropic::into_prompt(self)?,
            Api::Conversations => match present(self.items) {
                Some(conversation) => {
                    let (why, head) = (NoPrompt::NotCached, Vec::new());
                    Prompt::Opaque(Opaque { why, head, conversation })
                }
                None => Prompt::None(NoPrompt::NotCached),
            },
            Api::Images | Api::Render => Prompt::None(NoPrompt::NotCached),
            // These have no fields in JSON of their own.
            Api::GrpcGenerate
            | Api::GrpcEmbed
            | Api::VertexChat
            | Api::VertexRaw
            | Api::VertexStreamRaw
            | Api::CountTokens
            | Api::Other => Prompt::None(NoPrompt::OtherApi),
        };
        Ok(if is_truncated { Prompt::None(NoPrompt::Truncated) } else { prompt })
    }

    /// SGLang takes ids before a text, which it tokenizes as it is, with special tokens.
    fn into_sglang(self, ids: LoosePrompt<'a>) -> Result<Prompt<'a>, BodyError> {
        const TEXT_FORMS: &str = "a string or an array of strings";
        let api = Api::SglangGenerate;
        if self.prompt_embeds.is_set() {
            return Ok(Prompt::None(NoPrompt::PromptEmbeds));
        }
        if self.media_data.is_set() {
            return Ok(Prompt::None(NoPrompt::UnprocessedMedia));
        }
        let wrong = |field, expected, found: &str| {
            Err(BodyError::WrongType { field, expected, found: found.to_owned() })
        };
        match (ids, self.text) {
            (LoosePrompt::Missing, LoosePrompt::Ids(_) | LoosePrompt::IdLists(_)) => {
                wrong("text", TEXT_FORMS, "an array of numbers")
            }
            (LoosePrompt::Missing, LoosePrompt::Missing) => {
                Err(BodyError::Missing { field: "input_ids", api: api.as_str() })
            }
            (LoosePrompt::Missing, text) => prompt_of("text", api, text, TEXT_FORMS),
            (LoosePrompt::Text(_) | LoosePrompt::Texts(_), _) => {
                wrong("input_ids", ID_FORMS, "a text")
            }
            (ids, _) => prompt_of("input_ids", api, ids, ID_FORMS),
        }
    }

    fn messages_array(&self, api: Api) -> Result<&'a RawValue, BodyError> {
        let Some(messages) = present(self.messages) else {
            return Err(BodyError::Missing { field: "messages", api: api.as_str() });
        };
        if !messages.get().starts_with('[') {
            return Err(BodyError::WrongType {
                field: "messages",
                expected: "an array of messages",
                found: raw_type_name(messages).to_owned(),
            });
        }
        Ok(messages)
    }

    /// The messages of a chat, which are JSON of an array at least.
    fn chat_messages(&mut self, api: Api) -> Result<Messages<'a>, BodyError> {
        match self.conversation.take() {
            Some(Conversation { turns, json }) => Ok(Messages::Plain { turns, json }),
            None => self.messages_array(api).map(|messages| Messages::Raw(messages.get())),
        }
    }

    fn into_chat(mut self, api: Api) -> Result<Prompt<'a>, BodyError> {
        let messages = self.chat_messages(api)?;
        let opens_turn = api != Api::Embeddings;
        Ok(Prompt::Chat(Chat {
            messages,
            tools: present(self.tools).map(Cow::Borrowed),
            documents: present(self.documents),
            chat_template: hint(self.chat_template),
            chat_template_kwargs: present(self.chat_template_kwargs),
            add_generation_prompt: self.add_generation_prompt.flag().unwrap_or(opens_turn),
            continue_final_message: self.continue_final_message.flag().unwrap_or(false),
            add_special_tokens: self.add_special_tokens.flag().unwrap_or(false),
            reasoning_effort: hint(self.reasoning_effort),
        }))
    }
}

const PROMPT_FORMS: &str = "a string, an array of strings, an array of token ids, or an array of \
                            arrays of token ids";

const ID_FORMS: &str = "an array of token ids or an array of arrays of token ids";

fn prompt_of<'a>(
    field: &'static str,
    api: Api,
    prompt: LoosePrompt<'a>,
    expected: &'static str,
) -> Result<Prompt<'a>, BodyError> {
    let wrong = |found: String| Err(BodyError::WrongType { field, expected, found });
    match prompt {
        LoosePrompt::Text(text) => Ok(Prompt::Texts(vec![text])),
        LoosePrompt::Texts(texts) => Ok(Prompt::Texts(texts)),
        LoosePrompt::Ids(ids) => Ok(Prompt::TokenIds(vec![ids])),
        LoosePrompt::IdLists(lists) => Ok(Prompt::TokenIds(lists)),
        LoosePrompt::TooMany => Ok(Prompt::None(NoPrompt::TooManyPrompts)),
        LoosePrompt::Missing => Err(BodyError::Missing { field, api: api.as_str() }),
        LoosePrompt::Empty => wrong("an empty array".to_owned()),
        LoosePrompt::Wrong(Wrong { found, index: None }) => wrong(found.to_owned()),
        LoosePrompt::Wrong(Wrong { found, index: Some(index) }) => {
            wrong(format!("{found} at position {index}"))
        }
    }
}

fn token_ids_of(prompt: LoosePrompt<'_>, api: Api) -> Result<Prompt<'_>, BodyError> {
    const EXPECTED: &str = "an array of token ids";
    let found = match prompt {
        LoosePrompt::Text(_) => "a string",
        LoosePrompt::Texts(_) => "an array of strings",
        LoosePrompt::IdLists(_) | LoosePrompt::TooMany => "an array of arrays",
        other => return prompt_of("token_ids", api, other, EXPECTED),
    };
    Err(BodyError::WrongType { field: "token_ids", expected: EXPECTED, found: found.to_owned() })
}
