//! Which text does the engine make of this conversation?
//!
//! Chat templates are Jinja, run by transformers in a sandboxed environment with `trim_blocks` and
//! `lstrip_blocks`. Here they are run by another engine that is taught Python's ways
//! ([`crate::methods`]); the golden files of this crate were rendered by the original.
//!
//! Chats of roles and texts take a shorter way ([`crate::direct`]), which gives the same text or
//! none; then, and for all else, the engine does the work.
//!
//! Bounded: the output in bytes, the work in steps, values in depth. A template that a request
//! brings along could still build large values inside these limits, so it is refused unless the
//! options trust it, as engines do.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use kvroute_wire::request::{Chat, Messages};
use minijinja::machinery;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Template, Value};

use crate::content_format;
use crate::direct::Program;
use crate::direct::run::{Conversation, Scratch};
use crate::direct::{Unhandled, probes};
use crate::error::{LoadError, TokensError};
use crate::messages::{self, ContentFormat, Turn};
use crate::methods;
use crate::python;

/// Longest template that is compiled, in bytes. The longest in use have some 20 KB.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// Appended to the final message to find where it ends, as transformers does.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// What is said of a template that makes its engine panic.
pub(crate) const JINJA_PANICKED: &str = "the template engine panicked on this conversation";

/// What time `strftime_now` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The system's clock, in the engine's zone. Templates print dates, so router and engine need
    /// the same one.
    System {
        /// Local time minus UTC.
        utc_offset_seconds: i64,
    },
    /// Always this moment.
    Fixed {
        /// Seconds since 1970, local time.
        seconds: i64,
    },
}

impl Clock {
    pub(crate) fn seconds(self) -> i64 {
        match self {
            Clock::Fixed { seconds } => seconds,
            Clock::System { utc_offset_seconds } => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                i64::try_from(since.as_secs()).unwrap_or(0).saturating_add(utc_offset_seconds)
            }
        }
    }
}

/// The limits and choices of rendering.
#[derive(Clone, Debug)]
pub(crate) struct RenderOptions {
    pub(crate) output_bytes_max: usize,
    pub(crate) steps_max: u64,
    pub(crate) clock: Clock,
    pub(crate) content_format: Option<ContentFormat>,
    pub(crate) trust_request_template: bool,
}

/// The compiled templates of one model.
pub(crate) struct Templates {
    env: Environment<'static>,
    known: Vec<Known>,
    /// `bos_token` and the like.
    special_tokens: Vec<(String, String)>,
    options: RenderOptions,
    direct: AtomicU64,
    by_jinja: AtomicU64,
}

/// How often which way was taken from a conversation to its text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TemplateStats {
    /// Templates that have a direct form, which asks for no memory.
    pub direct_forms: usize,
    /// Conversations that were rendered by it.
    pub direct: u64,
    /// Conversations that the template engine rendered, or refused: tools, tool calls, contents in
    /// parts, and what else the direct form leaves to it.
    pub by_jinja: u64,
}

/// What is known of a template without running it.
struct Known {
    name: String,
    /// The template in the form that needs no engine.
    direct: Option<Program>,
    facts: Facts,
}

#[derive(Clone, Copy)]
struct Facts {
    format: ContentFormat,
    knows_developer: bool,
}

impl Templates {
    /// Compiles named templates; a single template is called `default`.
    pub(crate) fn new(
        sources: Vec<(String, String)>,
        special_tokens: Vec<(String, String)>,
        options: RenderOptions,
    ) -> Result<Templates, LoadError> {
        let mut env = environment(&options);
        let mut known = Vec::new();
        for (name, source) in sources {
            let wrong = |message: String| LoadError::BadTemplate { name: name.clone(), message };
            let source = prepare(&source).map_err(&wrong)?;
            let facts = facts_of(&source, &options).map_err(|e| wrong(message_of(&e)))?;
            let parsed = machinery::parse(&source, "chat_template", syntax());
            let parsed = parsed.map_err(|e| wrong(message_of(&e)))?;
            let is_global = |name: &str| env.globals().any(|(known, _)| known == name);
            let direct = Program::of(&parsed, is_global);
            drop(parsed);
            env.add_template_owned(name.clone(), source).map_err(|e| wrong(message_of(&e)))?;
            known.push(Known { name, direct, facts });
        }
        let (direct, by_jinja) = Default::default();
        let mut templates = Templates { env, known, special_tokens, options, direct, by_jinja };
        for at in 0..templates.known.len() {
            if !templates.is_direct(&templates.known[at]) {
                templates.known[at].direct = None;
            }
        }
        Ok(templates)
    }

    /// Whether the direct form of a template renders some conversation, and all that it renders
    /// like the engine.
    fn is_direct(&self, known: &Known) -> bool {
        let Some(program) = &known.direct else { return false };
        let (mut rendered, mut want, mut got) = (0, String::new(), String::new());
        for chat in probes() {
            got.clear();
            let mut scratch = Scratch::default();
            if self.run_direct(program, known.facts, &chat, &mut scratch, &mut got).is_err() {
                continue;
            }
            let engine = self.by_jinja(known, &chat, None, &mut want);
            if engine.is_err() || got != want {
                return false;
            }
            rendered += 1;
        }
        rendered > 0
    }

    /// Which ways were taken.
    pub(crate) fn stats(&self) -> TemplateStats {
        TemplateStats {
            direct_forms: self.known.iter().filter(|known| known.direct.is_some()).count(),
            direct: self.direct.load(Relaxed),
            by_jinja: self.by_jinja.load(Relaxed),
        }
    }

    /// The text of a conversation, in `text`, whose memory is used again, and that of `scratch`.
    pub(crate) fn render(
        &self,
        chat: &Chat<'_>,
        text: &mut String,
        scratch: &mut Scratch<'static>,
    ) -> Result<(), TokensError> {
        let tools = chat.tools.as_deref().map(|raw| raw.get()).filter(|json| *json != "null");
        let own = chat.chat_template.as_deref();
        let Some(known) = self.find(own, tools.is_some())? else {
            return self.by_own(chat, tools, text);
        };
        if let (Some(program), None) = (&known.direct, tools) {
            let mut used = std::mem::take(scratch).emptied();
            text.clear();
            let rendered = self.run_direct(program, known.facts, chat, &mut used, text);
            *scratch = used.emptied();
            if rendered.is_ok() {
                self.direct.fetch_add(1, Relaxed);
                return Ok(());
            }
        }
        self.by_jinja.fetch_add(1, Relaxed);
        self.by_jinja(known, chat, tools, text)
    }

    /// Appends the text of a conversation of roles and texts. After an error, `text` holds nothing
    /// of worth.
    fn run_direct<'v>(
        &'v self,
        program: &'v Program,
        facts: Facts,
        chat: &'v Chat<'_>,
        scratch: &mut Scratch<'v>,
        text: &mut String,
    ) -> Result<(), Unhandled> {
        let Messages::Plain { turns, .. } = &chat.messages else {
            return Err(Unhandled("messages with more than roles and texts"));
        };
        if chat.continue_final_message || chat.documents.is_some() {
            return Err(Unhandled("an open final message, or documents"));
        }
        let format = self.options.content_format.unwrap_or(facts.format);
        let conversation = Conversation::of(turns, format, facts.knows_developer);
        let conversation = conversation.ok_or(Unhandled("messages that are rewritten"))?;
        let given = (chat, self.special_tokens.as_slice());
        program.run(conversation, given, &self.options, scratch, text)
    }

    fn by_jinja(
        &self,
        known: &Known,
        chat: &Chat<'_>,
        tools: Option<&str>,
        text: &mut String,
    ) -> Result<(), TokensError> {
        let template = self.env.get_template(&known.name).map_err(failed)?;
        self.run(&template, known.facts, chat, tools, text)
    }

    /// By the template that the request brings along.
    fn by_own(
        &self,
        chat: &Chat<'_>,
        tools: Option<&str>,
        text: &mut String,
    ) -> Result<(), TokensError> {
        if !self.options.trust_request_template {
            return Err(TokensError::RequestTemplate);
        }
        let wrong = |message: String| TokensError::Template { message };
        let source = prepare(chat.chat_template.as_deref().unwrap_or_default()).map_err(wrong)?;
        let facts = facts_of(&source, &self.options).map_err(failed)?;
        let template = self.env.template_from_str(&source).map_err(failed)?;
        self.by_jinja.fetch_add(1, Relaxed);
        self.run(&template, facts, chat, tools, text)
    }

    /// The template of a request; `None` when it brings its own. With tools, a template named
    /// `tool_use` comes before `default`.
    fn find(&self, own: Option<&str>, with_tools: bool) -> Result<Option<&Known>, TokensError> {
        let named = |name: &str| self.known.iter().find(|known| known.name == name);
        if let Some(own) = own {
            return Ok(named(own));
        }
        let for_tools = with_tools.then(|| named("tool_use")).flatten();
        for_tools.or_else(|| named("default")).map(Some).ok_or_else(|| {
            let names: Vec<&str> = self.known.iter().map(|known| known.name.as_str()).collect();
            let message = match names.is_empty() {
                true => {
                    "this tokenizer has none (tokenizer_config.json or chat_template.jinja beside \
                     tokenizer.json)"
                        .to_owned()
                }
                false => format!("none is called `default` (there are {})", names.join(", ")),
            };
            TokensError::NoTemplate { message }
        })
    }

    fn run(
        &self,
        template: &Template<'_, '_>,
        facts: Facts,
        chat: &Chat<'_>,
        tools: Option<&str>,
        text: &mut String,
    ) -> Result<(), TokensError> {
        let format = self.options.content_format.unwrap_or(facts.format);
        let mut turns = messages::conversation(&chat.messages, format)?;
        if !facts.knows_developer && turns.iter().any(|turn| turn.role() == "developer") {
            turns = messages::developers_to_system(turns);
        }
        let open = match chat.continue_final_message {
            true => Some(leave_open(&mut turns, chat.add_generation_prompt)?),
            false => None,
        };
        let context = self.context(turns, chat, tools)?;
        let mut bytes = std::mem::take(text).into_bytes();
        bytes.clear();
        let mut out = Limited { bytes, bytes_max: self.options.output_bytes_max };
        // The engine has indexing of its own, which `messages[::-1]` without messages gets wrong.
        let render = || template.render_captured_to(context, &mut out).map(drop);
        let rendered = catch_unwind(AssertUnwindSafe(render));
        let panicked = |_| TokensError::Template { message: JINJA_PANICKED.to_owned() };
        rendered.map_err(panicked)?.map_err(|error| self.stopped(&out, &error))?;
        *text = String::from_utf8(out.bytes)
            .map_err(|error| TokensError::Template { message: error.to_string() })?;
        open.map_or(Ok(()), |final_text| cut_final(text, &final_text))
    }

    /// The variables of the template, in the order in which vLLM lets one override another.
    fn context(
        &self,
        turns: Vec<Turn>,
        chat: &Chat<'_>,
        tools: Option<&str>,
    ) -> Result<Value, TokensError> {
        let mut variables: Vec<(Value, Value)> = Vec::new();
        let mut set = |key: &str, value: Value| variables.push((Value::from(key), value));
        for (key, value) in &self.special_tokens {
            set(key, Value::from(value.as_str()));
        }
        set("documents", Value::from(()));
        set("tools", tools.map_or(Ok(Value::from(())), messages::tools)?);
        let kwargs = chat.chat_template_kwargs.map_or(Ok(Vec::new()), |raw| keywords(raw.get()))?;
        let sets_thinking = kwargs.iter().any(|(key, _)| key == "enable_thinking");
        for (key, value) in kwargs {
            set(&key, value);
        }
        if let Some(raw) = chat.documents.filter(|raw| raw.get() != "null") {
            let documents = serde_json::from_str(raw.get());
            set("documents", documents.map_err(messages::bad_json("documents"))?);
        }
        if let Some(effort) = chat.reasoning_effort.as_deref() {
            if effort != "auto" {
                set("reasoning_effort", Value::from(effort));
            }
            if !sets_thinking {
                set("enable_thinking", Value::from(effort != "none"));
            }
        }
        set("add_generation_prompt", Value::from(chat.add_generation_prompt));
        set("messages", turns.into_iter().map(Turn::into_value).collect());
        Ok(messages::map_of(variables))
    }

    fn stopped(&self, out: &Limited, error: &Error) -> TokensError {
        if error.kind() == ErrorKind::OutOfFuel {
            let limit = self.options.steps_max;
            return TokensError::TooLarge {
                what: "the work of the chat template, in steps,",
                limit,
            };
        }
        if out.bytes.len() >= out.bytes_max {
            let limit = out.bytes_max as u64;
            return TokensError::TooLarge { what: "the rendered prompt, in bytes,", limit };
        }
        TokensError::Template { message: message_of(error) }
    }
}

/// The environment of transformers: same white space rules, same functions.
fn environment(options: &RenderOptions) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_syntax(syntax());
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(options.steps_max));
    methods::install(&mut env);
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    let clock = options.clock;
    env.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
        let mut text = String::new();
        python::strftime(&mut text, format, clock.seconds()).ok_or_else(|| {
            let message = format!("strftime_now: a code in {format:?} is not implemented");
            Error::new(ErrorKind::InvalidOperation, message)
        })?;
        Ok(text)
    });
    env
}

fn syntax() -> SyntaxConfig {
    let built = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    built.expect("the default delimiters are valid")
}

fn facts_of(source: &str, options: &RenderOptions) -> Result<Facts, Error> {
    let format = match options.content_format {
        Some(format) => format,
        None => content_format::detect(&machinery::parse(source, "chat_template", syntax())?),
    };
    let knows_developer = source.contains("\"developer\"") || source.contains("'developer'");
    Ok(Facts { format, knows_developer })
}

/// The template with `{% generation %}` blocks, which mark the assistant's words for training, as
/// blocks that the engine knows.
fn prepare(source: &str) -> Result<String, String> {
    if source.len() > TEMPLATE_BYTES_MAX {
        return Err(format!("it has more than {TEMPLATE_BYTES_MAX} bytes"));
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']).trim_start();
        let name = inner.split(|c: char| !c.is_alphanumeric() && c != '_').next();
        let replacement = match name {
            Some("generation") => Some(("generation", "with")),
            Some("endgeneration") => Some(("endgeneration", "endwith")),
            _ => None,
        };
        rest = tag;
        if let Some((old, new)) = replacement {
            out.push_str(&tag[..tag.len() - inner.len()]);
            out.push_str(new);
            rest = &inner[old.len()..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// `chat_template_kwargs` as pairs.
fn keywords(json: &str) -> Result<Vec<(String, Value)>, TokensError> {
    if json == "null" {
        return Ok(Vec::new());
    }
    let map: Value =
        serde_json::from_str(json).map_err(messages::bad_json("chat_template_kwargs"))?;
    let bad = |message: String| TokensError::BadMessages { message };
    if map.kind() != minijinja::value::ValueKind::Map {
        return Err(bad(format!("chat_template_kwargs is a {}, not an object", map.kind())));
    }
    let mut pairs = Vec::new();
    for key in map.try_iter().into_iter().flatten() {
        let name = key.as_str().unwrap_or_default().to_owned();
        if name == "chat_template" || name == "tokenize" {
            return Err(bad(format!("chat_template_kwargs must not hold `{name}`")));
        }
        pairs.push((name, map.get_item(&key).unwrap_or_default()));
    }
    Ok(pairs)
}

/// Marks the end of the final message and returns its text.
fn leave_open(turns: &mut [Turn], opens_next: bool) -> Result<String, TokensError> {
    let bad = |message: &str| TokensError::BadMessages { message: message.to_owned() };
    if opens_next {
        return Err(bad("continue_final_message and add_generation_prompt exclude each other"));
    }
    let last = turns.last_mut().ok_or_else(|| bad("there is no message to continue"))?;
    let content = last.get("content").cloned().unwrap_or_default();
    if let Some(text) = content.as_str() {
        last.set("content", Value::from(format!("{text}{CONTINUE_TAG}")));
        return Ok(text.to_owned());
    }
    let mut parts: Vec<Value> = content.try_iter().into_iter().flatten().collect();
    let is_text = |part: &Value| part.get_attr("text").is_ok_and(|text| !text.is_undefined());
    let part = parts.iter_mut().rev().find(|part| is_text(part));
    let part = part.ok_or_else(|| bad("the final message has no text to continue"))?;
    let text = part.get_attr("text").unwrap_or_default().to_string();
    let keys: Vec<Value> = part.try_iter().into_iter().flatten().collect();
    let tagged = keys.iter().map(|key| {
        let value = match key.as_str() == Some("text") {
            true => Value::from(format!("{text}{CONTINUE_TAG}")),
            false => part.get_item(key).unwrap_or_default(),
        };
        (key.clone(), value)
    });
    *part = messages::map_of(tagged);
    last.set("content", Value::from(parts));
    Ok(text)
}

/// Cuts the rendered text where the final message ends.
fn cut_final(text: &mut String, final_text: &str) -> Result<(), TokensError> {
    let trim = |text: &str| text.trim_matches(python::is_space).to_owned();
    let at = text.rfind(CONTINUE_TAG.trim_end());
    let Some(at) = at.filter(|_| text.contains(&trim(final_text))) else {
        let message = "the template does not print the final message as it is, so it cannot be \
                       continued"
            .to_owned();
        return Err(TokensError::BadMessages { message });
    };
    let is_kept = text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if !is_kept {
        // The template trimmed the message, and with it the white space before the mark.
        text.truncate(text.trim_end_matches(python::is_space).len());
    }
    Ok(())
}

fn failed(error: Error) -> TokensError {
    TokensError::Template { message: message_of(&error) }
}

fn message_of(error: &Error) -> String {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{message} (line {line} of the template)"),
        None => message,
    }
}

/// Output that stops growing at a limit.
struct Limited {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl io::Write for Limited {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let free = self.bytes_max.saturating_sub(self.bytes.len());
        let fits = data.get(..free.min(data.len())).unwrap_or_default();
        self.bytes.extend_from_slice(fits);
        if fits.len() < data.len() {
            return Err(io::Error::other("the rendered prompt is too long"));
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
impl Templates {
    /// By the direct form alone, even where the engine would be asked.
    pub(crate) fn render_direct(
        &self,
        chat: &Chat<'_>,
        text: &mut String,
        scratch: &mut Scratch<'static>,
    ) -> Result<(), Unhandled> {
        let known = &self.known[0];
        let program = known.direct.as_ref().ok_or(Unhandled("a template without direct form"))?;
        let mut used = std::mem::take(scratch).emptied();
        text.clear();
        let rendered = self.run_direct(program, known.facts, chat, &mut used, text);
        *scratch = used.emptied();
        rendered
    }

    /// By the engine alone.
    pub(crate) fn render_by_jinja(
        &self,
        chat: &Chat<'_>,
        text: &mut String,
    ) -> Result<(), TokensError> {
        self.by_jinja(&self.known[0], chat, None, text)
    }
}
