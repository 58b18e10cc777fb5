//! From output tokens to the bytes of an answer: whole, or as server-sent events.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use hyper::body::{Body, Frame};
use kvroute_wire::api::Api;
use kvroute_wire::engine_api::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatMessage, ChunkUsage,
    Completion, CompletionChoice, CompletionChunk, CompletionChunkChoice, Counts, Generated,
    GeneratedChoice, GeneratedChunk,
};
use serde::Serialize;
use tokio::sync::mpsc;

use super::generate::Prepared;
use super::runner::Command;
use super::{Shared, unix_s};
use crate::model::{Emitted, FinishReason, RequestId};

/// Bytes of events collected into one frame of the body at most.
const FRAME_BYTES_MAX: usize = 16 * 1024;

/// The sequences of one request. Dropped early, it aborts what is still running.
pub(super) struct Running {
    shared: Arc<Shared>,
    prepared: Prepared,
    created: u64,
    first_id: RequestId,
    left: BTreeSet<RequestId>,
    output: mpsc::UnboundedReceiver<Emitted>,
    choices: Vec<Choice>,
    cached_first: Option<u32>,
    cached_last: u32,
}

#[derive(Default)]
struct Choice {
    tokens: Vec<u32>,
    text: String,
    finish: Option<FinishReason>,
    opened: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        for &id in &self.left {
            // The engine may be gone; then there is nothing to abort.
            let _ = self.shared.commands.send(Command::Abort(id));
        }
        self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Running {
    /// Hands the sequences to the engine.
    pub(super) fn start(shared: Arc<Shared>, prepared: Prepared) -> Running {
        let count = prepared.prompts.len() as u64 * u64::from(prepared.n);
        let first_id = shared.next_request.fetch_add(count, Ordering::Relaxed);
        let (sender, output) = mpsc::unbounded_channel();
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        for request in prepared.sequences(first_id) {
            // A dead engine closes the channel, which the reader reports.
            let _ = shared.commands.send(Command::Submit { request, output: sender.clone() });
        }
        Running {
            created: unix_s() as u64,
            first_id,
            left: (first_id..first_id + count).collect(),
            output,
            choices: (0..count).map(|_| Choice::default()).collect(),
            cached_first: None,
            cached_last: 0,
            shared,
            prepared,
        }
    }

    /// Books one token; gives the position of its choice.
    fn book(&mut self, emitted: &Emitted) -> usize {
        let index = (emitted.id - self.first_id) as usize;
        self.cached_first.get_or_insert(emitted.cached_tokens);
        let choice = &mut self.choices[index];
        choice.tokens.push(emitted.token);
        choice.finish = emitted.finish;
        if emitted.finish.is_some() {
            self.left.remove(&emitted.id);
            if index + 1 == self.choices.len() {
                self.cached_last = emitted.cached_tokens;
            }
            if self.left.is_empty() {
                let longest = self.choices.iter().map(|c| c.tokens.len() as u32).max();
                self.shared.metrics().answered(self.prepared.n, longest.unwrap_or(0));
            }
        }
        index
    }

    fn counts(&self, cached_tokens: u32) -> Counts {
        let prompt_tokens = self.prepared.prompt_tokens();
        let size = self.shared.config.block_size;
        let created = (prompt_tokens / size * size).saturating_sub(cached_tokens);
        let chat = self.prepared.api == Api::ChatCompletions;
        Counts {
            prompt_tokens,
            completion_tokens: self.choices.iter().map(|c| c.tokens.len() as u32).sum(),
            cached_tokens: Some(cached_tokens),
            created_cache_tokens: chat.then_some(created),
        }
    }

    /// Waits for all tokens and gives the whole answer; `None` when the engine died.
    pub(super) async fn whole(mut self) -> Option<Bytes> {
        while !self.left.is_empty() {
            let emitted = self.output.recv().await?;
            let index = self.book(&emitted);
            let piece = self.shared.text.piece(emitted.token);
            self.choices[index].text.push_str(piece);
        }
        let counts = self.counts(self.cached_last);
        Some(match self.prepared.api {
            Api::ChatCompletions => json(&self.chat(counts)),
            Api::VllmGenerate => json(&self.generated(counts)),
            _ => json(&self.completion(counts)),
        })
    }

    fn completion(&self, counts: Counts) -> Completion<'_> {
        let shown = self.prepared.return_token_ids;
        let choices = self.choices.iter().enumerate().map(|(i, c)| CompletionChoice {
            index: i as u32,
            text: &c.text,
            logprobs: (),
            finish_reason: c.finish.map_or("length", FinishReason::as_str),
            stop_reason: (),
            token_ids: shown.then_some(&c.tokens[..]),
            prompt_logprobs: (),
            prompt_token_ids: shown.then(|| self.prompt(i)),
            routed_experts: (),
        });
        Completion {
            id: &self.prepared.id,
            object: "text_completion",
            created: self.created,
            model: &self.prepared.model,
            choices: choices.collect(),
            service_tier: (),
            system_fingerprint: (),
            usage: counts.into(),
            kv_transfer_params: (),
            ec_transfer_params: (),
            metrics: (),
        }
    }

    fn chat(&self, counts: Counts) -> ChatCompletion<'_> {
        let shown = self.prepared.return_token_ids;
        let choices = self.choices.iter().enumerate().map(|(i, c)| ChatChoice {
            index: i as u32,
            message: ChatMessage {
                role: "assistant",
                content: &c.text,
                refusal: (),
                annotations: (),
                audio: (),
                function_call: (),
                reasoning: (),
            },
            logprobs: (),
            finish_reason: c.finish.map_or("length", FinishReason::as_str),
            stop_reason: (),
            token_ids: shown.then_some(&c.tokens[..]),
            routed_experts: (),
        });
        ChatCompletion {
            id: &self.prepared.id,
            object: "chat.completion",
            created: self.created,
            model: &self.prepared.model,
            choices: choices.collect(),
            service_tier: (),
            system_fingerprint: (),
            usage: counts.into(),
            prompt_logprobs: (),
            prompt_token_ids: shown.then_some(&self.prepared.prompts[0][..]),
            prompt_text: (),
            kv_transfer_params: (),
            ec_transfer_params: (),
            metrics: (),
        }
    }

    fn generated(&self, counts: Counts) -> Generated<'_> {
        let choices = self.choices.iter().enumerate();
        let choices = choices.map(|(i, c)| generated_choice(i, c.finish, &c.tokens));
        Generated {
            request_id: &self.prepared.id,
            model: &self.prepared.model,
            created: self.created,
            usage: counts.into(),
            prompt_logprobs: (),
            prompt_token_id_logprobs: (),
            prompt_token_ids: (),
            mm_placeholders: (),
            metrics: (),
            kv_transfer_params: (),
            ec_transfer_params: (),
            output_mode: "tokens",
            choices: choices.collect(),
        }
    }

    /// The events for one token.
    fn stream(&mut self, emitted: &Emitted, out: &mut BytesMut) {
        let index = self.book(emitted);
        let first = !std::mem::replace(&mut self.choices[index].opened, true);
        match self.prepared.api {
            Api::ChatCompletions => self.stream_chat(index, emitted, first, out),
            Api::VllmGenerate => event(
                &GeneratedChunk {
                    request_id: &self.prepared.id,
                    usage: self.running_usage(index, self.choices[index].tokens.len()),
                    output_mode: "tokens",
                    choices: vec![generated_choice(index, emitted.finish, &[emitted.token])],
                },
                out,
            ),
            _ => self.stream_completion(index, emitted, first, out),
        }
        if self.left.is_empty() {
            self.stream_end(out);
        }
    }

    fn stream_chat(&self, index: usize, emitted: &Emitted, first: bool, out: &mut BytesMut) {
        let ids = self.prepared.return_token_ids;
        if first {
            let delta = ChatDelta { role: Some("assistant"), content: "" };
            let mut chunk = self.chat_chunk(index, delta, self.running_usage(index, 0));
            chunk.prompt_token_ids = Some(ids.then_some(self.prompt(index)));
            chunk.prompt_text = Some(());
            event(&chunk, out);
        }
        let token = [emitted.token];
        let delta = ChatDelta { role: None, content: self.shared.text.piece(emitted.token) };
        let usage = self.running_usage(index, self.choices[index].tokens.len());
        let mut chunk = self.chat_chunk(index, delta, usage);
        chunk.choices[0].finish_reason = emitted.finish.map(FinishReason::as_str);
        chunk.choices[0].stop_reason = emitted.finish.map(|_| ());
        chunk.choices[0].token_ids = Some(ids.then_some(&token[..]));
        event(&chunk, out);
    }

    fn stream_completion(&self, index: usize, emitted: &Emitted, first: bool, out: &mut BytesMut) {
        let ids = self.prepared.return_token_ids;
        let token = [emitted.token];
        let choice = CompletionChunkChoice {
            index: index as u32,
            text: self.shared.text.piece(emitted.token),
            logprobs: (),
            finish_reason: emitted.finish.map(FinishReason::as_str),
            stop_reason: (),
            prompt_token_ids: (ids && first).then_some(self.prompt(index)),
            token_ids: ids.then_some(&token[..]),
        };
        let usage = self.running_usage(index, self.choices[index].tokens.len());
        event(&self.completion_chunk(vec![choice], usage), out);
    }

    fn prompt(&self, index: usize) -> &[u32] {
        &self.prepared.prompts[index / self.prepared.n as usize]
    }

    /// What every chunk carries with `continuous_usage_stats`.
    fn running_usage(&self, index: usize, tokens: usize) -> Option<ChunkUsage> {
        let prompt_tokens = self.prompt(index).len() as u32;
        let completion_tokens = tokens as u32;
        let counts = Counts { prompt_tokens, completion_tokens, ..Counts::default() };
        self.prepared.continuous_usage.then(|| counts.into())
    }

    fn stream_end(&self, out: &mut BytesMut) {
        if self.prepared.include_usage {
            let usage = Some(self.counts(self.cached_first.unwrap_or(0)).into());
            match self.prepared.api {
                Api::ChatCompletions => {
                    let mut chunk =
                        self.chat_chunk(0, ChatDelta { role: None, content: "" }, usage);
                    chunk.choices.clear();
                    event(&chunk, out);
                }
                Api::VllmGenerate => event(
                    &GeneratedChunk {
                        request_id: &self.prepared.id,
                        usage,
                        output_mode: "tokens",
                        choices: Vec::new(),
                    },
                    out,
                ),
                _ => event(&self.completion_chunk(Vec::new(), usage), out),
            }
        }
        out.put_slice(b"data: [DONE]\n\n");
    }

    fn completion_chunk<'a>(
        &'a self,
        choices: Vec<CompletionChunkChoice<'a>>,
        usage: Option<ChunkUsage>,
    ) -> CompletionChunk<'a> {
        CompletionChunk {
            id: &self.prepared.id,
            object: "text_completion",
            created: self.created,
            model: &self.prepared.model,
            choices,
            usage,
        }
    }

    fn chat_chunk<'a>(
        &'a self,
        index: usize,
        delta: ChatDelta<'a>,
        usage: Option<ChunkUsage>,
    ) -> ChatChunk<'a> {
        let choice = ChatChunkChoice {
            index: index as u32,
            delta,
            logprobs: (),
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        };
        ChatChunk {
            id: &self.prepared.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.prepared.model,
            choices: vec![choice],
            usage,
            prompt_token_ids: None,
            prompt_text: None,
        }
    }
}

fn generated_choice(
    index: usize,
    finish: Option<FinishReason>,
    token_ids: &[u32],
) -> GeneratedChoice<'_> {
    GeneratedChoice {
        index: index as u32,
        finish_reason: finish.map(FinishReason::as_str),
        stop_reason: (),
        token_ids,
        routed_experts: (),
        sampling_mask: (),
        weight_versions: (),
        logprobs: (),
    }
}

fn json(answer: &impl Serialize) -> Bytes {
    serde_json::to_vec(answer).expect("an answer has only string keys").into()
}

fn event(chunk: &impl Serialize, out: &mut BytesMut) {
    out.put_slice(b"data: ");
    serde_json::to_writer(out.writer(), chunk).expect("a chunk has only string keys");
    out.put_slice(b"\n\n");
}

/// The body of a response.
pub(super) enum ResponseBody {
    /// Known whole.
    Whole(Option<Bytes>),
    /// Server-sent events as the engine computes.
    Events(Box<Running>),
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            ResponseBody::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            ResponseBody::Events(running) if running.left.is_empty() => Poll::Ready(None),
            ResponseBody::Events(running) => {
                let mut out = BytesMut::new();
                while !running.left.is_empty() && out.len() < FRAME_BYTES_MAX {
                    match running.output.poll_recv(context) {
                        Poll::Ready(Some(emitted)) => running.stream(&emitted, &mut out),
                        Poll::Ready(None) => {
                            let died = io::Error::other("the engine died");
                            return Poll::Ready(Some(Err(died)));
                        }
                        Poll::Pending if out.is_empty() => return Poll::Pending,
                        Poll::Pending => break,
                    }
                }
                Poll::Ready(Some(Ok(Frame::data(out.freeze()))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, ResponseBody::Whole(None))
    }
}
