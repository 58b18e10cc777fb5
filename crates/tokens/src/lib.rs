//! Prompt to token ids: which ids will the engine see for this request?
//!
//! The engine caches by token ids, so a router that wants to know what is cached has to come to
//! the same ids: [`Tokenizer::tokens_of`] takes the parsed body of a request, renders the
//! conversation with the model's chat template as vLLM does, and tokenizes the text with the
//! model's own `tokenizer.json`. The way of a prompt through the files: `template.rs` (the text: by
//! `direct.rs` for plain chats, otherwise of what `messages.rs` makes, with `methods.rs` and
//! `python.rs`), `cut.rs` and `model.rs` (the ids), `prefixes.rs` (what was seen before, with its
//! block keys).
//!
//! Where exact ids cannot be had, the answer is a [`TokensError`] with a reason, never a guess.
//! All calls are CPU work, 20 to 200 µs for a prompt of 30 KB, more at first sight of long ones.

mod content_format;
mod cut;
mod direct;
mod error;
mod files;
mod messages;
mod methods;
mod model;
mod prefixes;
mod python;
mod template;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use kvroute_core::blocks::{self, BlockKey, Chain, ChainSpec, PromptExtras, Root};
use kvroute_core::decision::PromptChains;
use kvroute_wire::request::{Chat, Prompt, RequestBody};
use parking_lot::Mutex;

pub use error::{LoadError, TokensError};
pub use messages::ContentFormat;
pub use model::CacheStats;
pub use template::{Clock, TemplateStats};

use direct::run::Scratch;
use files::Files;
use model::Model;
use prefixes::{Link, Work};
use template::{RenderOptions, Templates};

/// How a tokenizer is loaded and what it may cost.
#[derive(Clone, Debug)]
pub struct TokenizerOptions {
    /// Most bytes of text, ids and block keys that the cache of beginnings of prompts holds; 0
    /// turns it off. A span of text that costs more than 1/64 of it is not kept.
    pub cache_bytes_max: usize,
    /// Longest rendered prompt, in bytes.
    pub prompt_bytes_max: usize,
    /// Most steps of the template engine per prompt; a conversation of 1,000 messages takes
    /// about 100,000.
    pub template_steps_max: u64,
    /// A template that replaces the model's, as vLLM's `--chat-template` does.
    pub chat_template: Option<String>,
    /// The form of content that the template wants; `None` reads it from the template, as vLLM
    /// does with `--chat-template-content-format auto`.
    pub content_format: Option<ContentFormat>,
    /// Run templates that requests bring along, as vLLM does with
    /// `--trust-request-chat-template`.
    pub trust_request_template: bool,
    /// The time that `strftime_now` tells a template.
    pub clock: Clock,
}

impl Default for TokenizerOptions {
    fn default() -> TokenizerOptions {
        TokenizerOptions {
            cache_bytes_max: 128 << 20,
            prompt_bytes_max: 64 << 20,
            template_steps_max: 50_000_000,
            chat_template: None,
            content_format: None,
            trust_request_template: false,
            clock: Clock::System { utc_offset_seconds: 0 },
        }
    }
}

/// The tokenizer and chat templates of one model. Clones share everything; any number of threads
/// may use it at once.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

/// The chains that are wanted of the prompts of one request.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// One chain of each prompt for each of them.
    pub specs: &'a [ChainSpec],
    /// Whose weights compute the blocks.
    pub root: Root<'a>,
}

/// How much text and how many tokens the prompts of one request have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens of all prompts.
    pub tokens: usize,
    /// Characters of their texts, templates included; `None`: they came as ids.
    pub chars: Option<u64>,
}

/// Most sets of buffers that are kept for the next requests, as many as threads use at once.
const BUFFERS_MAX: usize = 16;
/// Buffers of text or ids that have grown beyond so many bytes go back to the system.
const BUFFER_BYTES_MAX: usize = 1 << 20;

struct Inner {
    model: Model,
    templates: Templates,
    buffers: Mutex<Vec<Buffers>>,
}

/// Memory that is used again by request after request.
#[derive(Default)]
struct Buffers {
    text: String,
    scratch: Scratch<'static>,
    work: Work,
    links: Vec<Link>,
    keys: Vec<Vec<BlockKey>>,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or the one in a folder, and what lies beside it:
    /// `tokenizer_config.json`, `chat_template.jinja`, `additional_chat_templates/*.jinja`,
    /// `chat_template.json`.
    ///
    /// # Errors
    /// [`LoadError`]. A tokenizer of a kind that is not implemented is refused, and so is one that
    /// does not give back the texts of a self-check.
    pub fn load(path: &Path, options: &TokenizerOptions) -> Result<Tokenizer, LoadError> {
        Tokenizer::build(files::read(path)?, options)
    }

    /// A small tokenizer of our own with a ChatML template, for demos and tests: 3,000 tokens,
    /// made by `scripts/train-tokenizer.py`.
    #[must_use]
    pub fn demo() -> Tokenizer {
        Tokenizer::demo_with(&TokenizerOptions::default())
            .expect("the embedded files are checked by the tests")
    }

    /// [`Tokenizer::demo`] with other options.
    ///
    /// # Errors
    /// [`LoadError`] for a template in the options that does not compile.
    pub fn demo_with(options: &TokenizerOptions) -> Result<Tokenizer, LoadError> {
        Tokenizer::build(files::demo()?, options)
    }

    fn build(files: Files, options: &TokenizerOptions) -> Result<Tokenizer, LoadError> {
        let sources = match &options.chat_template {
            Some(source) => vec![("default".to_owned(), source.clone())],
            None => files.templates,
        };
        let render = RenderOptions {
            output_bytes_max: options.prompt_bytes_max,
            steps_max: options.template_steps_max,
            clock: options.clock,
            content_format: options.content_format,
            trust_request_template: options.trust_request_template,
        };
        let templates = Templates::new(sources, files.special_tokens, render)?;
        let model = Model::new(&files.tokenizer, files.overrides, options.cache_bytes_max)?;
        let inner = Inner { model, templates, buffers: Mutex::default() };
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// The ids of a text; with `add_special_tokens` also those that the model puts around a
    /// prompt (BOS).
    ///
    /// # Errors
    /// [`TokensError::Tokenizer`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokensError> {
        self.inner.model.encode(text, add_special_tokens)
    }

    /// The text of ids, special tokens included. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TokensError::Tokenizer`], for an id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokensError> {
        self.inner.model.decode(ids)
    }

    /// One more than the highest id.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.inner.model.vocab_size()
    }

    /// The text that the engine makes of a conversation.
    ///
    /// # Errors
    /// [`TokensError`].
    pub fn render_chat(&self, chat: &Chat<'_>) -> Result<String, TokensError> {
        let mut text = String::new();
        let mut buffers = self.inner.buffers.lock().pop().unwrap_or_default();
        let rendered = self.inner.templates.render(chat, &mut text, &mut buffers.scratch);
        self.put_back(buffers);
        rendered.map(|()| text)
    }

    /// The ids that the engine will see, one list per prompt of the request.
    ///
    /// # Errors
    /// [`TokensError`], whose [`TokensError::reason`] names why the request has no exact ids.
    pub fn tokens_of(&self, body: &RequestBody<'_>) -> Result<Vec<Vec<u32>>, TokensError> {
        match &body.prompt {
            Prompt::None(reason) => Err(TokensError::NoPrompt(*reason)),
            Prompt::Opaque(opaque) => Err(TokensError::NoPrompt(opaque.why)),
            Prompt::TokenIds(lists) => Ok(lists.clone()),
            Prompt::Texts(texts) => {
                texts.iter().map(|text| self.encode(text, body.add_special_tokens)).collect()
            }
            Prompt::Chat(chat) => {
                Ok(vec![self.encode(&self.render_chat(chat)?, chat.add_special_tokens)?])
            }
        }
    }

    /// The chains of the prompts of a request, in `prompts`, whose memory is used again. They are
    /// those that [`blocks::chain`] makes of [`Tokenizer::tokens_of`]; what a prompt shares with
    /// earlier ones is neither tokenized nor hashed again.
    ///
    /// # Errors
    /// As [`Tokenizer::tokens_of`]; `prompts` then mean nothing.
    pub fn chains_of(
        &self,
        body: &RequestBody<'_>,
        wanted: Wanted<'_>,
        prompts: &mut Vec<PromptChains>,
    ) -> Result<Counts, TokensError> {
        let mut buffers = self.inner.buffers.lock().pop().unwrap_or_default();
        let counted = self.chains_with(body, wanted, prompts, &mut buffers);
        self.put_back(buffers);
        counted
    }

    fn put_back(&self, buffers: Buffers) {
        let of_ids = buffers.work.ids.capacity() * size_of::<u32>();
        let of_texts = buffers.text.capacity().max(buffers.scratch.bytes());
        let mut kept = self.inner.buffers.lock();
        if of_ids.max(of_texts) <= BUFFER_BYTES_MAX && kept.len() < BUFFERS_MAX {
            kept.push(buffers);
        }
    }

    fn chains_with(
        &self,
        body: &RequestBody<'_>,
        wanted: Wanted<'_>,
        prompts: &mut Vec<PromptChains>,
        buffers: &mut Buffers,
    ) -> Result<Counts, TokensError> {
        let chars = |text: &str| text.chars().count() as u64;
        let mut counts = Counts::default();
        match &body.prompt {
            Prompt::None(reason) => return Err(TokensError::NoPrompt(*reason)),
            Prompt::Opaque(opaque) => return Err(TokensError::NoPrompt(opaque.why)),
            Prompt::TokenIds(lists) => {
                let lists = lists.iter().map(Vec::as_slice);
                counts.tokens = chains_of_ids(lists, body, wanted, prompts);
            }
            Prompt::Texts(texts) => {
                prompts.resize_with(texts.len(), PromptChains::default);
                for (text, chains) in texts.iter().zip(prompts) {
                    let special = body.add_special_tokens;
                    counts.tokens += self.chains(text, special, body, wanted, (chains, buffers))?;
                }
                counts.chars = Some(texts.iter().map(|text| chars(text)).sum());
            }
            Prompt::Chat(chat) => {
                let mut text = std::mem::take(&mut buffers.text);
                self.inner.templates.render(chat, &mut text, &mut buffers.scratch)?;
                prompts.resize_with(1, PromptChains::default);
                let special = chat.add_special_tokens;
                for chains in prompts {
                    counts.tokens = self.chains(&text, special, body, wanted, (chains, buffers))?;
                }
                counts.chars = Some(chars(&text));
                buffers.text = text;
            }
        }
        Ok(counts)
    }

    /// The chains of one text; how many tokens it has.
    fn chains(
        &self,
        text: &str,
        add_special_tokens: bool,
        body: &RequestBody<'_>,
        wanted: Wanted<'_>,
        (chains, buffers): (&mut PromptChains, &mut Buffers),
    ) -> Result<usize, TokensError> {
        if !body.items.is_empty() {
            // Keys that depend on more than ids, salt and root are not kept.
            let ids = self.encode(text, add_special_tokens)?;
            let mut made = Vec::new();
            let tokens = chains_of_ids(std::iter::once(ids.as_slice()), body, wanted, &mut made);
            *chains = made.pop().unwrap_or_default();
            return Ok(tokens);
        }
        let Buffers { work, links, keys, .. } = buffers;
        let salt = body.cache_salt.as_deref();
        links.clear();
        links.extend(wanted.specs.iter().map(|spec| Link {
            block_size: spec.block_size,
            start: blocks::start(*spec, wanted.root, salt),
        }));
        let mut used = chains.chains.drain(..).map(|chain| chain.keys);
        keys.clear();
        keys.extend(links.iter().map(|_| used.next().unwrap_or_default()));
        drop(used);
        let read = self.inner.model.read(text, add_special_tokens, (links, keys), false, work);
        let tokens = work.tokens();
        for ((spec, link), mut keys) in wanted.specs.iter().zip(links.iter()).zip(keys.drain(..)) {
            let unfilled = link.unfilled(tokens);
            if spec.partial_tail && unfilled > 0 {
                let from = work.ids.len().saturating_sub(unfilled);
                let ids = work.ids.get(from..).unwrap_or_default();
                keys.push(blocks::partial(link.parent(&keys), ids));
            }
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            chains.chains.push(Chain { spec: *spec, keys, tokens });
        }
        read.map(|()| tokens)
    }

    /// How conversations became texts.
    #[must_use]
    pub fn template_stats(&self) -> TemplateStats {
        self.inner.templates.stats()
    }

    /// What the cache of beginnings of prompts holds and how often it helped.
    #[must_use]
    pub fn cache_stats(&self) -> CacheStats {
        self.inner.model.cache_stats()
    }
}

/// The chains of prompts that came as ids; how many ids they are.
pub fn chains_of_ids<'a>(
    lists: impl Iterator<Item = &'a [u32]>,
    body: &RequestBody<'_>,
    wanted: Wanted<'_>,
    prompts: &mut Vec<PromptChains>,
) -> usize {
    let extras = PromptExtras { cache_salt: body.cache_salt.as_deref(), items: &body.items };
    let mut tokens = 0;
    prompts.clear();
    prompts.extend(lists.map(|ids| {
        tokens += ids.len();
        let chain = |spec: &ChainSpec| blocks::chain(*spec, wanted.root, ids, &extras);
        PromptChains { chains: wanted.specs.iter().map(chain).collect() }
    }));
    tokens
}

/// Pseudo tokens for a text whose tokenizer is not known: each four bytes as one little-endian
/// number, the last ones filled up with zeros (llm-d's `estimate`). They agree among each other
/// and with no engine.
#[must_use]
pub fn estimate(text: &[u8]) -> Vec<u32> {
    let (quads, rest) = text.as_chunks::<4>();
    let mut last = [0; 4];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    let last = (!rest.is_empty()).then_some(last);
    quads.iter().copied().chain(last).map(u32::from_le_bytes).collect()
}
