//! What did a brain hear, and what did it answer? A recording from which the same brain is built
//! again, call by call.
//!
//! Everything that [`Brain`] decides follows from its plan, its seed and the calls it got, so the
//! calls with their times are enough to decide the same again, byte for byte. A host sets a
//! [`Recorder`] and writes what it hears, one [`Entry`] after the other; [`Brain::apply`] carries
//! a recorded [`Call`] out. Where entries are kept, and how they are written, is the host's own.
//!
//! A recording holds no prompt text, but hashes of stored blocks (of few tokens, where blocks are
//! small, so that they can be guessed) and the names of models, adapters and requests: as
//! confidential as the prompts themselves.

pub(crate) mod exact;
pub(crate) mod packed;
#[cfg(test)]
pub(crate) mod tests;

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Time;
use crate::brain::Brain;
use crate::decision::{Decision, Headers, PromptChains, Reject, Request};
use crate::decision::{ResponseEvent, TokensKnown};
use crate::event::{EventBatch, Extra, KvEvent};
use crate::fleet::{EndpointId, EndpointSpec, EngineMetrics, ServedModel};
use crate::load::Ticket;
use crate::produce::HeldId;
use crate::stream::StreamInput;

/// Version of what is written. A change of any recorded type raises it.
pub const FORMAT: u32 = 5;

/// Longest entry that is written, and that is read, in bytes of its text.
pub const ENTRY_BYTES_MAX: usize = 512 << 20;

/// Hears each entry at once, in order; breaks when it wants no more of them. It runs inside of
/// the brain's calls, so it must be quick.
pub type Recorder = Box<dyn FnMut(Entry<'_>) -> ControlFlow<()> + Send>;

/// The first entry: what the brain was built from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// Version of the product that recorded.
    pub version: String,
    /// Seed of the brain.
    pub seed: u64,
    /// The configuration as the host read it; empty: the built-in one of that version.
    pub config: String,
    /// When time was zero, in seconds of the Unix epoch.
    pub started_unix_s: f64,
}

/// The last entry. A recording without it was cut by the end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Why nothing follows.
    pub reason: EndReason,
    /// Entries before this one, the header left out.
    pub entries: u64,
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The brain's host stopped: nothing is missing.
    Complete,
    /// `recording_bytes_max` was reached.
    FileFull,
    /// `recording_queue_bytes_max` was reached: the disk was slower than the traffic.
    QueueFull,
    /// The disk refused.
    DiskError,
    /// One entry was longer than [`ENTRY_BYTES_MAX`].
    EntryTooLong,
}

impl EndReason {
    /// The name in metrics, logs and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Complete => "complete",
            EndReason::FileFull => "file_full",
            EndReason::QueueFull => "queue_full",
            EndReason::DiskError => "disk_error",
            EndReason::EntryTooLong => "entry_too_long",
        }
    }
}

/// One entry of a recording.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "decisions are the most frequent entries but one")]
pub enum Entry<'a> {
    /// The first.
    Recording(Header),
    /// The brain was told something.
    Call(Call<'a>),
    /// Follows [`Call::AddEndpoint`]: what the endpoint is called in later calls. `None`: refused.
    Added(Option<EndpointId>),
    /// Follows [`Call::Decide`].
    Decided(Cow<'a, Result<Decision, Reject>>),
    /// The last.
    End(End),
}

/// One call that changes something, with all its arguments. Names and arguments are those of the
/// methods of [`Brain`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs, reason = "the methods of the same names say what the arguments are")]
pub enum Call<'a> {
    AddEndpoint {
        now: Time,
        spec: Cow<'a, EndpointSpec>,
    },
    RemoveEndpoint {
        now: Time,
        id: EndpointId,
    },
    OnMetrics {
        now: Time,
        id: EndpointId,
        metrics: Cow<'a, EngineMetrics>,
    },
    OnAttributes {
        now: Time,
        id: EndpointId,
        producer: Cow<'a, str>,
        #[serde(with = "exact::pairs")]
        values: Cow<'a, [(String, f64)]>,
        valid_for: Duration,
    },
    OnScrapeFailed {
        now: Time,
        id: EndpointId,
    },
    OnModels {
        id: EndpointId,
        models: Cow<'a, [ServedModel]>,
    },
    OnEndpointFailed {
        now: Time,
        id: EndpointId,
    },
    OnCacheReset {
        now: Time,
        id: EndpointId,
    },
    OnStream {
        now: Time,
        id: EndpointId,
        input: Cow<'a, StreamInput>,
    },
    OnStreamSlice {
        now: Time,
        id: EndpointId,
        input: Cow<'a, StreamInput>,
    },
    CatchUp {
        id: EndpointId,
    },
    OnResponse {
        now: Time,
        ticket: Ticket,
        event: ResponseEvent,
    },
    Redirect {
        now: Time,
        ticket: Ticket,
        to: EndpointId,
    },
    Tick {
        now: Time,
    },
    Decide {
        now: Time,
        request: Asked<'a>,
    },
    Hold {
        now: Time,
        request: Asked<'a>,
    },
    Leave {
        id: HeldId,
    },
}

/// A [`Request`] that can be kept: everything that decides, and the id that is shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields of `Request`")]
pub struct Asked<'a> {
    pub id: Cow<'a, str>,
    pub model: Cow<'a, str>,
    pub prompts: Cow<'a, [PromptChains]>,
    pub prompt_tokens: u32,
    pub tokens_known: TokensKnown,
    pub max_tokens: Option<u32>,
    pub skips_cache: bool,
    pub held: Option<HeldId>,
    pub media: Cow<'a, [u64]>,
    pub priority: i32,
    pub headers: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    pub allowed: Option<Cow<'a, [EndpointId]>>,
}

impl<'a> From<&Request<'a>> for Asked<'a> {
    fn from(request: &Request<'a>) -> Asked<'a> {
        let header = |&(name, value): &(&'a str, &'a str)| (name.into(), value.into());
        Asked {
            id: request.id.into(),
            model: request.model.into(),
            prompts: request.prompts.into(),
            prompt_tokens: request.prompt_tokens,
            tokens_known: request.tokens_known,
            max_tokens: request.max_tokens,
            skips_cache: request.skips_cache,
            held: request.held,
            media: request.media.into(),
            priority: request.priority,
            headers: request.headers.0.iter().map(header).collect(),
            allowed: request.allowed.map(Cow::Borrowed),
        }
    }
}

impl Asked<'_> {
    fn into_owned(self) -> Asked<'static> {
        let text = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        Asked {
            id: text(self.id),
            model: text(self.model),
            prompts: Cow::Owned(self.prompts.into_owned()),
            headers: self.headers.into_iter().map(|(k, v)| (text(k), text(v))).collect(),
            allowed: self.allowed.map(|ids| Cow::Owned(ids.into_owned())),
            prompt_tokens: self.prompt_tokens,
            tokens_known: self.tokens_known,
            max_tokens: self.max_tokens,
            skips_cache: self.skips_cache,
            held: self.held,
            media: Cow::Owned(self.media.into_owned()),
            priority: self.priority,
        }
    }

    fn bytes(&self) -> usize {
        let chains = self.prompts.iter().flat_map(|prompt| &prompt.chains);
        let chains: usize = chains.map(|chain| size_of_val(chain) + 8 * chain.keys.len()).sum();
        let headers: usize = self.headers.iter().map(|(k, v)| 64 + k.len() + v.len()).sum();
        let allowed = self.allowed.as_ref().map_or(0, |ids| size_of_val(&ids[..]));
        let media = size_of_val(&self.media[..]);
        self.id.len() + self.model.len() + chains + headers + allowed + media
    }
}

/// What [`Brain::apply`] brought about.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Nothing that a recording holds.
    None,
    /// As [`Entry::Added`].
    Added(Option<EndpointId>),
    /// As [`Entry::Decided`].
    Decided(Box<Result<Decision, Reject>>),
}

impl Brain {
    /// Carries a recorded call out. Orders to replay event streams are left out: what came of
    /// them stands in the calls that follow.
    pub fn apply(&mut self, call: Call<'_>) -> Answer {
        match call {
            Call::AddEndpoint { now, spec } => {
                return Answer::Added(self.add_endpoint(now, spec.into_owned()).ok());
            }
            Call::Decide { now, request } => return self.decide_again(now, &request),
            Call::Hold { now, request } => self.hold_again(now, &request),
            Call::Leave { id } => self.leave(id),
            Call::RemoveEndpoint { now, id } => self.remove_endpoint(now, id),
            Call::OnMetrics { now, id, metrics } => self.on_metrics(now, id, &metrics),
            Call::OnAttributes { now, id, producer, values, valid_for } => {
                self.on_attributes(now, id, &producer, &values, valid_for);
            }
            Call::OnScrapeFailed { now, id } => self.on_scrape_failed(now, id),
            Call::OnModels { id, models } => self.on_models(id, models.into_owned()),
            Call::OnEndpointFailed { now, id } => self.on_endpoint_failed(now, id),
            Call::OnCacheReset { now, id } => self.on_cache_reset(now, id),
            Call::OnStream { now, id, input } => {
                let _ = self.on_stream(now, id, input.into_owned());
            }
            Call::OnStreamSlice { now, id, input } => {
                let _ = self.on_stream_slice(now, id, input.into_owned());
            }
            Call::CatchUp { id } => self.catch_up(id),
            Call::OnResponse { now, ticket, event } => self.on_response(now, ticket, event),
            Call::Redirect { now, ticket, to } => self.redirect(now, ticket, to),
            Call::Tick { now } => {
                let _ = self.tick(now);
            }
        }
        Answer::None
    }

    fn decide_again(&mut self, now: Time, asked: &Asked<'_>) -> Answer {
        Answer::Decided(Box::new(asked.with(|request| self.decide(now, request))))
    }

    fn hold_again(&mut self, now: Time, asked: &Asked<'_>) {
        let _ = asked.with(|request| self.hold(now, request));
    }
}

impl Asked<'_> {
    /// The request as the brain takes it.
    fn with<R>(&self, run: impl FnOnce(&Request<'_>) -> R) -> R {
        let asked = self;
        let headers: Vec<(&str, &str)> =
            asked.headers.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
        let request = Request {
            id: &asked.id,
            model: &asked.model,
            prompts: &asked.prompts,
            prompt_tokens: asked.prompt_tokens,
            tokens_known: asked.tokens_known,
            max_tokens: asked.max_tokens,
            skips_cache: asked.skips_cache,
            held: asked.held,
            media: &asked.media,
            priority: asked.priority,
            headers: &Headers(&headers),
            allowed: asked.allowed.as_deref(),
        };
        run(&request)
    }
}

impl<'a> Call<'a> {
    /// A request that may have to wait.
    pub(crate) fn hold(now: Time, request: &Request<'a>) -> Call<'a> {
        Call::Hold { now, request: Asked::from(request) }
    }

    /// A request for a decision.
    pub(crate) fn decide(now: Time, request: &Request<'a>) -> Call<'a> {
        Call::Decide { now, request: Asked::from(request) }
    }

    /// Calls `name` with every endpoint that the call names, to be called otherwise.
    pub fn rename_endpoints(&mut self, mut name: impl FnMut(&mut EndpointId)) {
        match self {
            Call::RemoveEndpoint { id, .. }
            | Call::OnMetrics { id, .. }
            | Call::OnAttributes { id, .. }
            | Call::OnScrapeFailed { id, .. }
            | Call::OnModels { id, .. }
            | Call::OnEndpointFailed { id, .. }
            | Call::OnCacheReset { id, .. }
            | Call::OnStream { id, .. }
            | Call::OnStreamSlice { id, .. }
            | Call::CatchUp { id }
            | Call::Redirect { to: id, .. } => name(id),
            Call::Decide { request, .. } | Call::Hold { request, .. } => {
                let allowed = request.allowed.iter_mut();
                allowed.for_each(|ids| ids.to_mut().iter_mut().for_each(&mut name));
            }
            Call::AddEndpoint { .. }
            | Call::OnResponse { .. }
            | Call::Leave { .. }
            | Call::Tick { .. } => {}
        }
    }

    /// The same, owning what it holds.
    pub fn into_owned(self) -> Call<'static> {
        match self {
            Call::AddEndpoint { now, spec } => {
                Call::AddEndpoint { now, spec: Cow::Owned(spec.into_owned()) }
            }
            Call::OnMetrics { now, id, metrics } => {
                Call::OnMetrics { now, id, metrics: Cow::Owned(metrics.into_owned()) }
            }
            Call::OnAttributes { now, id, producer, values, valid_for } => {
                let producer = Cow::Owned(producer.into_owned());
                let values = Cow::Owned(values.into_owned());
                Call::OnAttributes { now, id, producer, values, valid_for }
            }
            Call::OnModels { id, models } => {
                Call::OnModels { id, models: Cow::Owned(models.into_owned()) }
            }
            Call::OnStream { now, id, input } => {
                Call::OnStream { now, id, input: Cow::Owned(input.into_owned()) }
            }
            Call::OnStreamSlice { now, id, input } => {
                Call::OnStreamSlice { now, id, input: Cow::Owned(input.into_owned()) }
            }
            Call::CatchUp { id } => Call::CatchUp { id },
            Call::Decide { now, request } => Call::Decide { now, request: request.into_owned() },
            Call::Hold { now, request } => Call::Hold { now, request: request.into_owned() },
            Call::Leave { id } => Call::Leave { id },
            Call::RemoveEndpoint { now, id } => Call::RemoveEndpoint { now, id },
            Call::OnScrapeFailed { now, id } => Call::OnScrapeFailed { now, id },
            Call::OnEndpointFailed { now, id } => Call::OnEndpointFailed { now, id },
            Call::OnCacheReset { now, id } => Call::OnCacheReset { now, id },
            Call::OnResponse { now, ticket, event } => Call::OnResponse { now, ticket, event },
            Call::Redirect { now, ticket, to } => Call::Redirect { now, ticket, to },
            Call::Tick { now } => Call::Tick { now },
        }
    }

    /// Memory that an owned copy takes beyond the enum itself.
    fn bytes(&self) -> usize {
        match self {
            Call::AddEndpoint { spec, .. } => {
                let labels: usize = spec.labels.iter().map(|(k, v)| 64 + k.len() + v.len()).sum();
                size_of::<EndpointSpec>() + spec.name.len() + spec.address.len() + labels
            }
            Call::OnMetrics { metrics, .. } => {
                let lora = metrics.lora.iter().flat_map(|l| l.running.iter().chain(&l.waiting));
                lora.map(|name| size_of::<String>() + name.len()).sum()
            }
            Call::OnAttributes { producer, values, .. } => {
                let values = values.iter().map(|value| size_of_val(value) + value.0.len());
                producer.len() + values.sum::<usize>()
            }
            Call::OnModels { models, .. } => {
                let parent = |model: &ServedModel| model.parent.as_ref().map_or(0, String::len);
                models.iter().map(|m| size_of_val(m) + m.id.len() + parent(m)).sum()
            }
            Call::OnStream { input, .. } | Call::OnStreamSlice { input, .. } => match &**input {
                StreamInput::Batch { batch, .. } | StreamInput::ReplayBatch { batch, .. } => {
                    batch_bytes(batch)
                }
                _ => 0,
            },
            Call::Decide { request, .. } | Call::Hold { request, .. } => request.bytes(),
            _ => 0,
        }
    }
}

fn batch_bytes(batch: &EventBatch) -> usize {
    let extra = |extra: &Extra| {
        size_of_val(extra)
            + match extra {
                Extra::Text(text) | Extra::Multimodal(text) => text.len(),
                Extra::Digest(bytes) => bytes.len(),
            }
    };
    let list = |list: &Vec<Extra>| size_of_val(list) + list.iter().map(extra).sum::<usize>();
    let event = |event: &KvEvent| {
        size_of_val(event)
            + match event {
                KvEvent::Stored(stored) => {
                    let lora = stored.lora_name.as_ref().map_or(0, String::len);
                    let extras: usize = stored.extras.iter().map(list).sum();
                    8 * stored.hashes.len() + stored.tokens.heap_bytes() + lora + extras
                }
                KvEvent::Removed(removed) => 8 * removed.hashes.len(),
                KvEvent::Cleared => 0,
            }
    };
    batch.events.iter().map(event).sum()
}

impl Entry<'_> {
    /// The same, owning what it holds.
    pub fn into_owned(self) -> Entry<'static> {
        match self {
            Entry::Recording(header) => Entry::Recording(header),
            Entry::Call(call) => Entry::Call(call.into_owned()),
            Entry::Added(id) => Entry::Added(id),
            Entry::Decided(decided) => Entry::Decided(Cow::Owned(decided.into_owned())),
            Entry::End(end) => Entry::End(end),
        }
    }

    /// Memory that an owned copy takes, for a queue that is bounded by bytes. An estimate.
    pub fn bytes(&self) -> usize {
        size_of::<Entry<'_>>()
            + match self {
                Entry::Call(call) => call.bytes(),
                Entry::Decided(decided) => match &**decided {
                    Ok(decision) => decision.record.bytes(),
                    Err(_) => 0,
                },
                Entry::Recording(_) | Entry::Added(_) | Entry::End(_) => 0,
            }
    }
}
