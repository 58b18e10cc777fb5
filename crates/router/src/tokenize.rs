//! What does a body ask for, in tokens and block keys? Read, rendered, tokenized and hashed in
//! one go.
//!
//! Bodies that take little time are read where they arrive: that costs less than handing them
//! over. The others go to a bounded number of blocking threads, so that a prompt of a million
//! tokens stalls nobody else. How long a body takes is learned from those before it. Whatever is
//! missing on the way lowers the knowledge, never the request.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use http::HeaderMap;
use kvroute_core::blocks::{BlockKey, Root, TokenSpace};
use kvroute_core::decision::{NoTokens, PromptChains, TokensKnown};
use kvroute_core::fleet::RootKind;
use kvroute_core::plan::TokensNeed;
use kvroute_core::produce::{AUDIO_TOKENS, TokenEstimate, VideoHints};
use kvroute_tokens::{Counts, Tokenizer, TokensError, Wanted, chains_of_ids};
use kvroute_wire::api::Api;
use kvroute_wire::media::{MediaItem, MediaKind};
use kvroute_wire::request::{self, Lists, NoPrompt, Prompt, RequestBody};
use tracing::warn;

use crate::error::RouteError;
use crate::headers;
use crate::metrics::{ReasonLabel, cut};
use crate::reuse::{Pool, Reused};
use crate::rewrite::{self, Rewrite, Unreachable};
use crate::shared::Shared;

/// Bodies expected to take up to this long are read on the task that received them.
const INLINE_NS_MAX: u64 = 400_000;
/// Time per KiB of body before any has been read; a cached prompt takes a tenth of it.
pub(crate) const NS_PER_KIB_AT_START: u64 = 25_000;
/// Smallest body from which the time per KiB is learned; below, fixed costs dominate.
const LEARN_BYTES_MIN: usize = 2 << 10;
/// Bytes of text for which a token is charged where tokens are not known.
const BYTES_PER_TOKEN: usize = 4;
/// Most tokens that the images, videos and sounds of one request take in an estimate: their sizes
/// are what files and headers claim.
const MEDIA_TOKENS_MAX: usize = 1 << 20;
/// Longest session id that is used.
const SESSION_ID_BYTES_MAX: usize = 256;

/// What a body asks for, as far as routing goes.
#[derive(Debug)]
pub(crate) struct Asked {
    /// The model that serves the request.
    pub model: Reused<String>,
    /// How it came to that, if the request may have named another one.
    pub rewrite: Option<Rewrite>,
    pub max_tokens: Option<u32>,
    /// See `core::decision::Request`.
    pub skips_cache: bool,
    /// vLLM's `session_id`.
    pub session_id: Option<String>,
    pub prompts: Reused<Vec<PromptChains>>,
    /// Characters of the text that the engine will see; `None`: it was not rendered.
    pub rendered_chars: Option<u64>,
    pub prompt_tokens: u32,
    /// Hashes of the images, videos and sounds, in the order in which they appear.
    pub media: Vec<u64>,
    pub known: TokensKnown,
    /// What is not known is missing because of this request alone: it says nothing about how the
    /// model's requests are routed.
    pub request_at_fault: bool,
    /// Of the body; 0 when it was not read.
    pub body_bytes: usize,
}

impl Asked {
    /// Tokens in a block of the first prompt, of the engines' blocks where they are known.
    pub fn block_tokens(&self) -> Option<u32> {
        let chains = &self.prompts.first()?.chains;
        let exact = chains.iter().find(|chain| chain.spec.space == TokenSpace::Exact);
        Some(exact.or(chains.first())?.spec.block_size)
    }

    /// For requests whose body is not read.
    pub fn nothing() -> Asked {
        Asked {
            model: Reused::default(),
            rewrite: None,
            max_tokens: None,
            skips_cache: false,
            session_id: None,
            prompts: Reused::default(),
            rendered_chars: None,
            prompt_tokens: 0,
            media: Vec::new(),
            known: TokensKnown::None(NoTokens::NoPrompt),
            request_at_fault: false,
            body_bytes: 0,
        }
    }
}

/// Memory that bodies are read in, and what comes of them.
pub(crate) struct Memory {
    read: Arc<Pool<(Vec<u8>, Lists)>>,
    models: Arc<Pool<String>>,
    prompts: Arc<Pool<Vec<PromptChains>>>,
}

impl Memory {
    pub fn new() -> Memory {
        let of_prompts = |prompts: &Vec<PromptChains>| {
            let chains = prompts.iter().flat_map(|prompt| &prompt.chains);
            chains.map(|chain| chain.keys.capacity() * size_of::<BlockKey>()).sum()
        };
        Memory {
            read: Arc::new(Pool::new(|(texts, _)| texts.capacity())),
            models: Arc::new(Pool::new(String::capacity)),
            prompts: Arc::new(Pool::new(of_prompts)),
        }
    }
}

/// What the headers say about a body.
#[derive(Clone, Debug)]
pub(crate) struct Hints {
    videos: VideoHints,
    /// See [`rewrite::wanted`].
    model: Option<String>,
    /// Nothing may come of reading it: no draw, no number, no line in the log.
    leaves_no_trace: bool,
}

impl Hints {
    /// Of these headers.
    pub fn of(headers: &HeaderMap) -> Hints {
        if !headers::has_hints(headers) {
            let videos = VideoHints::default();
            return Hints { videos, model: None, leaves_no_trace: false };
        }
        Hints {
            videos: VideoHints::read(|name| headers.get(name)?.to_str().ok()),
            model: rewrite::wanted(headers).map(str::to_owned),
            leaves_no_trace: false,
        }
    }

    /// For a request that is only explained.
    pub fn of_explained(headers: &HeaderMap) -> Hints {
        Hints { leaves_no_trace: true, ..Hints::of(headers) }
    }
}

/// Reads a body of a routed API. Of other bodies nothing but the model matters, and only if it is
/// another one that serves the request.
pub(crate) async fn read(
    shared: &Arc<Shared>,
    api: Api,
    body: &Bytes,
    hints: Hints,
) -> Result<Asked, RouteError> {
    let is_explained = hints.leaves_no_trace;
    let started = Instant::now();
    if !api.reads_body() {
        let rewrite = model_of(shared, api, &request::parse(api, body)?, &hints)?.rewrite;
        return Ok(Asked { rewrite, ..Asked::nothing() });
    }
    let expected_ns = (body.len() as u64 >> 10) * shared.tokenize_ns_per_kib.load(Relaxed);
    let asked = if expected_ns <= INLINE_NS_MAX || shared.tokens == TokensNeed::None {
        timed(shared, api, body, &hints)
    } else {
        read_elsewhere(shared, api, body, hints).await
    };
    if !is_explained {
        shared.metrics.tokenize.observe(started.elapsed().as_secs_f64());
    }
    asked.map(|asked| Asked { body_bytes: body.len(), ..asked })
}

/// Reads, and learns how long it takes: a moving average over about eight bodies. Races between
/// threads lose a sample, which does not matter.
fn timed(shared: &Shared, api: Api, body: &[u8], hints: &Hints) -> Result<Asked, RouteError> {
    let started = Instant::now();
    let asked = read_now(shared, api, body, hints);
    if body.len() >= LEARN_BYTES_MIN && !hints.leaves_no_trace {
        let ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let seen = ns.saturating_mul(1024) / body.len() as u64;
        let before = shared.tokenize_ns_per_kib.load(Relaxed);
        shared.tokenize_ns_per_kib.store((before * 7 + seen.min(u64::from(u32::MAX))) / 8, Relaxed);
    }
    asked
}

/// The permit goes with the work, which cannot be stopped once it runs, even if the client goes.
async fn read_elsewhere(
    shared: &Arc<Shared>,
    api: Api,
    body: &Bytes,
    hints: Hints,
) -> Result<Asked, RouteError> {
    let videos = hints.videos;
    let wanted = hints.clone();
    let room = Arc::clone(&shared.tokenize_room).acquire_owned().await;
    let (there, bytes) = (Arc::clone(shared), body.clone());
    let work = tokio::task::spawn_blocking(move || {
        let asked = timed(&there, api, &bytes, &hints);
        drop(room);
        asked
    });
    match work.await {
        Ok(asked) => asked,
        // A tokenizer that panics must not take the request with it.
        Err(_) => {
            let parsed = request::parse(api, body)?;
            let named = model_of(shared, api, &parsed, &wanted)?;
            if !wanted.leaves_no_trace {
                complain(shared, &named.model, &"it panicked");
            }
            let estimator = Estimator { estimate: &shared.estimate, videos };
            Ok(without_tokens(&parsed, named, body.len(), &estimator, NoTokens::TokenizerFailed))
        }
    }
}

fn read_now(shared: &Shared, api: Api, body: &[u8], hints: &Hints) -> Result<Asked, RouteError> {
    let mut memory = shared.memory.read.get();
    let (texts, lists) = &mut *memory;
    if texts.len() < body.len() {
        texts.resize(body.len(), 0);
    }
    let parsed = request::parse_in(api, body, texts, lists)?;
    let asked = asked_by(shared, (api, &parsed), body.len(), hints);
    lists.take_back(parsed);
    asked
}

fn asked_by(
    shared: &Shared,
    (api, parsed): (Api, &RequestBody<'_>),
    body_bytes: usize,
    hints: &Hints,
) -> Result<Asked, RouteError> {
    let named = model_of(shared, api, parsed, hints)?;
    let estimator = Estimator { estimate: &shared.estimate, videos: hints.videos };
    if shared.tokens == TokensNeed::None {
        let why = NoTokens::NotNeeded;
        return Ok(without_tokens(parsed, named, body_bytes, &estimator, why));
    }
    let mut prompts = shared.memory.prompts.get();
    let found = chains_of(shared, &named.model, parsed, &estimator, &mut prompts);
    match found.map_err(|error| failure(shared, &named.model, &error, hints)) {
        Ok((Counts { tokens, chars }, known)) => {
            let prompt_tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            let about = about(parsed, named);
            Ok(Asked { prompts, rendered_chars: chars, prompt_tokens, known, ..about })
        }
        Err(Missing { why, request_at_fault }) => {
            let asked = without_tokens(parsed, named, body_bytes, &estimator, why);
            Ok(Asked { request_at_fault, ..asked })
        }
    }
}

/// The model that serves a request. Empty where the API has no place for a model and the router was
/// not told of one: any endpoint may serve it.
struct Named {
    model: Reused<String>,
    rewrite: Option<Rewrite>,
}

fn model_of(
    shared: &Shared,
    api: Api,
    parsed: &RequestBody<'_>,
    hints: &Hints,
) -> Result<Named, RouteError> {
    let given = parsed.model.as_deref().filter(|m| !m.is_empty());
    let model = given.or(shared.default_model.as_deref()).unwrap_or_default();
    let wanted = hints.model.as_deref();
    let rewritten = match hints.leaves_no_trace {
        true => shared.rewriter.peek(model, wanted, parsed),
        false => shared.rewriter.rewrite(model, wanted, parsed),
    };
    let owned = |name: &str| {
        let mut model = shared.memory.models.get();
        model.clear();
        model.push_str(name);
        model
    };
    match rewritten {
        Ok(Some(rewrite)) => {
            return Ok(Named { model: owned(&rewrite.to), rewrite: Some(rewrite) });
        }
        Ok(None) => {}
        Err(Unreachable) => {
            let (api, model) = (api.as_str(), cut(model));
            let is_told = !hints.leaves_no_trace;
            if is_told && shared.complaints.is_first(&format!("{model} of {api}")) {
                warn!(model, api, "A model's name inside of a gRPC message is not rewritten.");
            }
        }
    }
    if model.is_empty() && api.names_model() && api.reads_body() {
        return Err(RouteError::NoModel);
    }
    Ok(Named { model: owned(model), rewrite: None })
}

fn about(parsed: &RequestBody<'_>, named: Named) -> Asked {
    let Named { model, rewrite } = named;
    let session_id = parsed.session_id.as_deref().filter(|s| s.len() <= SESSION_ID_BYTES_MAX);
    Asked {
        model,
        rewrite,
        max_tokens: parsed.max_tokens,
        skips_cache: parsed.skips_cache,
        session_id: session_id.map(str::to_owned),
        media: parsed.media.iter().map(|item| item.hash).collect(),
        ..Asked::nothing()
    }
}

fn without_tokens(
    parsed: &RequestBody<'_>,
    named: Named,
    body_bytes: usize,
    estimator: &Estimator<'_>,
    why: NoTokens,
) -> Asked {
    let prompt_tokens = match &parsed.prompt {
        Prompt::TokenIds(prompts) => prompts.iter().map(Vec::len).sum(),
        Prompt::None(NoPrompt::NotCached) => 0,
        _ => {
            let media: usize = parsed.media.iter().map(|item| item.place.len()).sum();
            let media_tokens: usize = estimator.of_all(&parsed.media).sum();
            body_bytes.saturating_sub(media) / BYTES_PER_TOKEN + media_tokens
        }
    };
    Asked {
        prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
        known: TokensKnown::None(why),
        ..about(parsed, named)
    }
}

/// Why a prompt has no tokens here.
struct Missing {
    why: NoTokens,
    /// See [`Asked`].
    request_at_fault: bool,
}

/// The chains of each prompt: of the tokens that the engine will see, or of estimated ones where
/// the plan is content with that or no tokenizer is known for the model.
fn chains_of(
    shared: &Shared,
    model: &str,
    parsed: &RequestBody<'_>,
    estimator: &Estimator<'_>,
    prompts: &mut Vec<PromptChains>,
) -> Result<(Counts, TokensKnown), TokensError> {
    let (specs, root) = {
        let brain = shared.brain.lock();
        (brain.chain_specs(), brain.root_of(model))
    };
    let root = match root {
        RootKind::Base => Root::Base,
        RootKind::Adapter => Root::Adapter(model),
    };
    let exact = shared.tokens == TokensNeed::Exact;
    let tokenizer = tokenizer_of(shared, model).filter(|_| exact);
    let (lists, known) = match (&parsed.prompt, tokenizer) {
        (Prompt::None(why), _) => return Err(TokensError::NoPrompt(*why)),
        (Prompt::TokenIds(lists), _) => (Cow::Borrowed(lists), TokensKnown::Exact),
        (_, Some(tokenizer)) => {
            let wanted = Wanted { specs: specs.exact(), root };
            let counts = tokenizer.chains_of(parsed, wanted, prompts)?;
            return Ok((counts, TokensKnown::Exact));
        }
        (_, None) => (Cow::Owned(estimator.tokens_of(parsed)), TokensKnown::Estimated),
    };
    let wanted = Wanted { specs: specs.of(known), root };
    let tokens = chains_of_ids(lists.iter().map(Vec::as_slice), parsed, wanted, prompts);
    Ok((Counts { tokens, chars: None }, known))
}

/// The model's own tokenizer, its base model's, or the default.
fn tokenizer_of<'a>(shared: &'a Shared, model: &str) -> Option<&'a Tokenizer> {
    let tokenizers = &shared.tokenizers;
    if tokenizers.by_model.is_empty() {
        return tokenizers.default.as_ref();
    }
    tokenizers.by_model.get(model).or(tokenizers.default.as_ref())
}

/// Some prompts cannot be tokenized here and never could (images), and some never will be
/// (nonsense, which the engine refuses). All are counted; only what lies in the tokenizer deserves
/// a line in the log, because only that will happen to other requests as well.
fn failure(shared: &Shared, model: &str, error: &TokensError, hints: &Hints) -> Missing {
    let reason = error.reason();
    if !hints.leaves_no_trace {
        shared.metrics.tokenize_failures.get_or_create(&ReasonLabel { reason }).inc();
    }
    let why = match error {
        TokensError::NoPrompt(_) => NoTokens::NoPrompt,
        TokensError::TooLarge { .. } => NoTokens::TooLong,
        _ => NoTokens::TokenizerFailed,
    };
    let request_at_fault = error.is_clients_fault();
    if !request_at_fault && !hints.leaves_no_trace {
        complain(shared, model, error);
    }
    Missing { why, request_at_fault }
}

/// Says once for each model that its prompts cannot be tokenized; the counter tells how often.
fn complain(shared: &Shared, model: &str, error: &dyn std::fmt::Display) {
    let model = cut(model);
    if shared.complaints.is_first(model) {
        warn!(model, %error, "A prompt could not be tokenized; such requests are routed by load.");
    }
}

/// How many tokens a prompt has, and which, where no tokenizer says it.
struct Estimator<'a> {
    estimate: &'a TokenEstimate,
    videos: VideoHints,
}

impl Estimator<'_> {
    /// Pseudo tokens of each prompt. A conversation counts as the JSON of its tools and messages,
    /// which grows at its end from turn to turn like the prompt does.
    fn tokens_of(&self, parsed: &RequestBody<'_>) -> Vec<Vec<u32>> {
        match &parsed.prompt {
            Prompt::None(_) | Prompt::TokenIds(_) => Vec::new(),
            Prompt::Texts(texts) => {
                texts.iter().map(|text| kvroute_tokens::estimate(text.as_bytes())).collect()
            }
            Prompt::Chat(chat) => {
                let head = [chat.tools.as_deref(), chat.documents].into_iter().flatten();
                let head = head.map(|part| part.get()).collect();
                vec![self.conversation(head, chat.messages.json(), &parsed.media)]
            }
            Prompt::Opaque(opaque) => {
                let head = opaque.head.iter().map(|part| part.get()).collect();
                vec![self.conversation(head, opaque.conversation.get(), &parsed.media)]
            }
        }
    }

    /// Each item stands for its tokens instead of its URL or data: as many of one number, which
    /// comes from its content, beginning at a token of its own (llm-d's `estimate`).
    fn conversation(&self, head: String, json: &str, media: &[MediaItem]) -> Vec<u32> {
        // Without the closing bracket, which would differ from the next turn's comma.
        let json = json.trim_end().trim_end_matches(']');
        let mut tokens = Vec::new();
        let mut text = head;
        let mut at = 0;
        for (item, count) in media.iter().zip(self.of_all(media)) {
            text.push_str(json.get(at..item.place.start).unwrap_or_default());
            tokens.append(&mut kvroute_tokens::estimate(text.as_bytes()));
            tokens.extend(std::iter::repeat_n(item.hash as u32, count));
            text.clear();
            at = item.place.end;
        }
        text.push_str(json.get(at..).unwrap_or_default());
        tokens.append(&mut kvroute_tokens::estimate(text.as_bytes()));
        tokens
    }

    /// Tokens of each item: at least one, and in sum not many more than the limit.
    fn of_all(&self, media: &[MediaItem]) -> impl Iterator<Item = usize> {
        let mut room = MEDIA_TOKENS_MAX;
        media.iter().map(move |item| {
            let tokens = match item.kind {
                MediaKind::Image => self.estimate.image.tokens(item.pixels),
                MediaKind::Video => self.estimate.video.tokens(&self.videos),
                MediaKind::Audio => AUDIO_TOKENS,
            };
            let tokens = (tokens as usize).min(room).max(1);
            room = room.saturating_sub(tokens);
            tokens
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PNG of 64 x 64 pixels, followed by what tells it from others.
    fn picture(name: &str) -> String {
        format!("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABA{name}")
    }

    fn image(url: &str) -> String {
        format!(r#"{{"type":"image_url","image_url":{{"url":"{url}"}}}}"#)
    }

    fn tokens(parts: &[String], hints: VideoHints) -> Vec<u32> {
        let json = format!(r#"{{"messages":[{{"role":"user","content":[{}]}}]}}"#, parts.join(","));
        let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
        let estimate = TokenEstimate::default();
        let mut prompts = Estimator { estimate: &estimate, videos: hints }.tokens_of(&body);
        assert_eq!(prompts.len(), 1);
        prompts.remove(0)
    }

    #[test]
    fn an_image_takes_the_room_of_its_pixels_at_its_place() {
        let none = VideoHints::default();
        let text = r#"{"type":"text","text":"what is it?"}"#.to_owned();
        let cat = tokens(&[image(&picture("AAAA")), text.clone()], none);
        let dog = tokens(&[image(&picture("BBBB")), text.clone()], none);
        let linked = tokens(&[image("http://a/b"), text.clone()], none);
        // 64 x 64 / 1024, and 640 x 360 / 1024 for one whose size is not known.
        assert_eq!(linked.len() - cat.len(), 225 - 4);
        assert_eq!(cat.len(), dog.len());
        let differing: Vec<usize> = (0..cat.len()).filter(|at| cat[*at] != dog[*at]).collect();
        assert_eq!(differing.len(), 4, "{differing:?}");
        assert!(differing.windows(2).all(|pair| pair[1] == pair[0] + 1));
        // Up to the image the prompts are one; a turn more leaves what was before.
        let longer = tokens(&[image(&picture("AAAA")), text.clone(), text], none);
        assert_eq!(longer[..cat.len() - 2], cat[..cat.len() - 2]);
    }

    #[test]
    fn videos_follow_the_headers_and_sound_is_constant() {
        let video = r#"{"type":"video_url","video_url":{"url":"h:v"}}"#.to_owned();
        let sound = r#"{"type":"audio_url","audio_url":{"url":"h:v"}}"#.to_owned();
        let none = VideoHints::default();
        let long = VideoHints { duration_s: Some(60.0), ..none };
        let video = [video];
        let (short, long) = (tokens(&video, none), tokens(&video, long));
        assert_eq!(long.len() - short.len(), 50 * 225);
        let heard = tokens(&[sound], none);
        assert_eq!(short.len() - heard.len(), 10 * 225 - AUDIO_TOKENS as usize);
    }

    #[test]
    fn the_room_of_media_is_limited() {
        // 2^31 pixels wide and high, as the file claims.
        let huge = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUn////9/////";
        let parts = vec![image(huge); 50];
        let count = tokens(&parts, VideoHints::default()).len();
        assert!((MEDIA_TOKENS_MAX..MEDIA_TOKENS_MAX + 2000).contains(&count), "{count}");
    }

    #[test]
    fn opaque_conversations_are_estimated_with_what_stands_before_them() {
        let body = br#"{"instructions":"be brief","tools":[{"type":"f"}],"input":"hi"}"#;
        let body = request::parse(Api::Responses, body).unwrap();
        let estimate = TokenEstimate::default();
        let estimator = Estimator { estimate: &estimate, videos: VideoHints::default() };
        let expected = kvroute_tokens::estimate(br#""be brief"[{"type":"f"}]"hi""#);
        assert_eq!(estimator.tokens_of(&body), [expected]);
    }
}
