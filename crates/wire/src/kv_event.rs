//! What does one message of an engine's KV event stream say?
//!
//! Reads the payload (third frame) of every vLLM since 0.9 and every SGLang since 0.5.5: a batch
//! `[timestamp, [event...], rank]` whose events are positional arrays `[tag, ...]` (vLLM up to
//! 0.23, SGLang up to 0.5.20) or maps with a `type` entry (later ones). Unknown entries and
//! further positions are ignored. An event that cannot be understood is left out and counted;
//! the rest of its batch stays. Writes the map form of vLLM 0.32.

use kvroute_core::event::{
    BlockRemoved, BlockStored, EngineHash, EventBatch, Extra, GroupKind, KvEvent, Tier,
};
use thiserror::Error;

use crate::msgpack::{self, Head, ReadError, Reader};

/// Largest payload that is read, in bytes. A scheduler step of a million tokens needs 5 MB.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;

/// Why a whole payload was refused. The stream has a hole then: the host treats it as a gap.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KvEventError {
    /// Larger than [`PAYLOAD_BYTES_MAX`].
    #[error("the engine sent a batch of {bytes} bytes, more than the limit of {PAYLOAD_BYTES_MAX}")]
    TooLarge {
        /// Size of the payload.
        bytes: usize,
    },
    /// The envelope is not a batch, or the bytes are not msgpack.
    #[error(
        "not a KV event batch: {0}; is the subscribed port the engine's KV event publisher, \
         and is its version supported?"
    )]
    Malformed(#[from] ReadError),
    /// Bytes follow the batch.
    #[error("not a KV event batch: {bytes} bytes follow it")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// Why one event was left out of its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EventFault {
    /// Neither an array nor a map, or a field of a wrong type.
    #[error("{0}")]
    Read(#[from] ReadError),
    /// No known event name.
    #[error("an event of a type this version does not know")]
    UnknownType,
    /// A field that the format requires is missing.
    #[error("an event without `{0}`")]
    Missing(&'static str),
    /// An integer outside the range of its field.
    #[error("`{field}` holds a number out of range at byte {at}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// Offset in the payload.
        at: usize,
    },
    /// A block hash of no bytes.
    #[error("an empty block hash at byte {at}")]
    EmptyHash {
        /// Offset in the payload.
        at: usize,
    },
    /// Text that is not UTF-8.
    #[error("text that is not UTF-8 at byte {at}")]
    NotUtf8 {
        /// Offset in the payload.
        at: usize,
    },
    /// `extra_keys` does not have one entry per block.
    #[error("`extra_keys` has {extras} entries for {hashes} blocks")]
    ExtrasLength {
        /// Entries of `extra_keys`.
        extras: usize,
        /// Entries of `block_hashes`.
        hashes: usize,
    },
}

/// Decodes one payload. Events that cannot be understood are counted in `events_bad`.
///
/// # Errors
/// Only when the envelope itself cannot be read.
pub fn decode_batch(payload: &[u8]) -> Result<EventBatch, KvEventError> {
    decode_batch_reporting(payload, &mut |_, _| {})
}

/// As [`decode_batch`], and tells `on_bad` the position in the batch and the fault of every event
/// that was left out.
///
/// # Errors
/// Only when the envelope itself cannot be read.
pub fn decode_batch_reporting(
    payload: &[u8],
    on_bad: &mut dyn FnMut(usize, EventFault),
) -> Result<EventBatch, KvEventError> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(KvEventError::TooLarge { bytes: payload.len() });
    }
    let mut reader = Reader::new(payload);
    let fields = reader.array("a batch [timestamp, events, rank]")?;
    let mut batch = EventBatch { timestamp_s: read_number(&mut reader)?, ..EventBatch::default() };
    let events = reader.array("an array of events")?;
    for index in 0..events as usize {
        let start = reader.position();
        match read_event(&mut reader) {
            Ok(event) => batch.events.push(event),
            Err(fault) => {
                on_bad(index, fault);
                batch.events_bad = batch.events_bad.saturating_add(1);
                reader.rewind(start);
                reader.skip()?;
            }
        }
    }
    for position in 2..fields {
        let start = reader.position();
        if let (2, Head::Uint(rank)) = (position, reader.head()?) {
            batch.rank = u32::try_from(rank).ok();
        } else {
            reader.rewind(start);
            reader.skip()?;
        }
    }
    match reader.remaining() {
        0 => Ok(batch),
        bytes => Err(KvEventError::Trailing { bytes }),
    }
}

fn read_number(reader: &mut Reader<'_>) -> Result<f64, ReadError> {
    let at = reader.position();
    match reader.head()? {
        Head::Float(value) => Ok(value),
        Head::Uint(value) => Ok(value as f64),
        Head::Int(value) => Ok(value as f64),
        other => Err(Reader::wrong_type(at, "a timestamp in seconds", &other)),
    }
}

/// The event names on the wire.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tag {
    Stored,
    Removed,
    Cleared,
}

impl Tag {
    fn from_name(name: &[u8]) -> Result<Tag, EventFault> {
        match name {
            b"BlockStored" => Ok(Tag::Stored),
            b"BlockRemoved" => Ok(Tag::Removed),
            b"AllBlocksCleared" => Ok(Tag::Cleared),
            _ => Err(EventFault::UnknownType),
        }
    }
}

/// The fields of an event, whatever their order and form on the wire.
#[derive(Clone, Copy)]
enum Field {
    Type,
    Hashes,
    Parent,
    Tokens,
    BlockSize,
    Medium,
    LoraName,
    /// Position 7 of the array form: vLLM's adapter name or SGLang's map of metadata.
    LoraNameOrMetadata,
    CacheSalt,
    ExtraKeys,
    Group,
    Kind,
    Window,
    Ignored,
}

const STORED_POSITIONS: [Field; 12] = [
    Field::Type,
    Field::Hashes,
    Field::Parent,
    Field::Tokens,
    Field::BlockSize,
    Field::Ignored,
    Field::Medium,
    Field::LoraNameOrMetadata,
    Field::ExtraKeys,
    Field::Group,
    Field::Kind,
    Field::Window,
];
const REMOVED_POSITIONS: [Field; 4] = [Field::Type, Field::Hashes, Field::Medium, Field::Group];

fn field_of_key(key: &[u8]) -> Field {
    match key {
        b"type" => Field::Type,
        b"block_hashes" => Field::Hashes,
        b"parent_block_hash" => Field::Parent,
        b"token_ids" => Field::Tokens,
        b"block_size" => Field::BlockSize,
        b"medium" => Field::Medium,
        b"lora_name" => Field::LoraName,
        b"cache_salt" => Field::CacheSalt,
        b"extra_keys" => Field::ExtraKeys,
        b"group_idx" => Field::Group,
        b"kv_cache_spec_kind" => Field::Kind,
        b"kv_cache_spec_sliding_window" => Field::Window,
        _ => Field::Ignored,
    }
}

fn read_event(reader: &mut Reader<'_>) -> Result<KvEvent, EventFault> {
    let at = reader.position();
    let mut parts = Parts::default();
    match reader.head()? {
        Head::Map(entries) => {
            for _ in 0..entries {
                let field = match reader.head()? {
                    Head::Str(key) => field_of_key(key),
                    other => return Err(Reader::wrong_type(at, "text as key", &other).into()),
                };
                parts.read(field, reader)?;
            }
        }
        Head::Array(len) if len > 0 => {
            parts.read(Field::Type, reader)?;
            let positions: &[Field] = match parts.tag {
                Some(Tag::Stored) => &STORED_POSITIONS,
                Some(Tag::Removed) => &REMOVED_POSITIONS,
                Some(Tag::Cleared) | None => &[],
            };
            for position in 1..len as usize {
                parts.read(positions.get(position).copied().unwrap_or(Field::Ignored), reader)?;
            }
        }
        other => return Err(Reader::wrong_type(at, "an event (map or array)", &other).into()),
    }
    parts.into_event()
}

#[derive(Default)]
struct Parts<'a> {
    tag: Option<Tag>,
    hashes: Option<Vec<EngineHash>>,
    parent: Option<EngineHash>,
    tokens: Option<Vec<u32>>,
    block_size: Option<u32>,
    medium: Option<&'a str>,
    lora_name: Option<&'a str>,
    cache_salt: Option<&'a str>,
    /// Where `extra_keys` starts: it is read last, when the number of blocks is known.
    extras_at: Option<Reader<'a>>,
    group: Option<u32>,
    kind: Option<&'a str>,
    window: Option<u32>,
}

impl<'a> Parts<'a> {
    fn read(&mut self, field: Field, reader: &mut Reader<'a>) -> Result<(), EventFault> {
        match field {
            Field::Type => self.tag = Some(read_tag(reader)?),
            Field::Hashes => self.hashes = Some(read_hashes(reader)?),
            Field::Parent => self.parent = read_parent(reader)?,
            Field::Tokens => self.tokens = Some(read_tokens(reader)?),
            Field::BlockSize => self.block_size = read_u32(reader, "block_size")?,
            Field::Medium => self.medium = read_text(reader)?,
            Field::LoraName => self.lora_name = read_text(reader)?,
            Field::CacheSalt => self.cache_salt = read_text(reader)?,
            Field::Group => self.group = read_u32(reader, "group_idx")?,
            Field::Kind => self.kind = read_text(reader)?,
            Field::Window => self.window = read_u32(reader, "kv_cache_spec_sliding_window")?,
            Field::ExtraKeys => {
                self.extras_at = Some(reader.clone());
                reader.skip()?;
            }
            Field::LoraNameOrMetadata => {
                let start = reader.position();
                match reader.head()? {
                    Head::Map(entries) => self.read_metadata(entries, reader)?,
                    _ => {
                        reader.rewind(start);
                        self.lora_name = read_text(reader)?;
                    }
                }
            }
            Field::Ignored => reader.skip()?,
        }
        Ok(())
    }

    /// SGLang 0.5.18 to 0.5.20 put a map into the place where vLLM has the adapter's name.
    fn read_metadata(&mut self, entries: u32, reader: &mut Reader<'a>) -> Result<(), EventFault> {
        for _ in 0..entries {
            match reader.head()? {
                Head::Str(b"cache_salt") => self.cache_salt = read_text(reader)?,
                Head::Str(b"lora_name") => self.lora_name = read_text(reader)?,
                Head::Array(_) | Head::Map(_) => return Err(EventFault::UnknownType),
                _ => reader.skip()?,
            }
        }
        Ok(())
    }

    fn into_event(self) -> Result<KvEvent, EventFault> {
        match self.tag.ok_or(EventFault::Missing("type"))? {
            Tag::Cleared => Ok(KvEvent::Cleared),
            Tag::Removed => Ok(KvEvent::Removed(BlockRemoved {
                hashes: self.hashes.ok_or(EventFault::Missing("block_hashes"))?.into(),
                tier: self.medium.map_or(Tier::Gpu, Tier::from_medium),
                group: self.group,
            })),
            Tag::Stored => self.into_stored(),
        }
    }

    fn into_stored(self) -> Result<KvEvent, EventFault> {
        let hashes = self.hashes.ok_or(EventFault::Missing("block_hashes"))?;
        let tokens = self.tokens.ok_or(EventFault::Missing("token_ids"))?;
        let mut extras = match self.extras_at {
            Some(mut at) => read_extras(&mut at, hashes.len())?,
            None => Vec::new(),
        };
        // The adapter is part of the chain's root already, so its name is no extra. Only the
        // first entry can be it: a salt of the same text comes later.
        if let Some(lora) = self.lora_name {
            for of_block in &mut extras {
                if matches!(of_block.first(), Some(Extra::Text(text)) if text == lora) {
                    of_block.remove(0);
                }
            }
        }
        if extras.iter().all(Vec::is_empty) {
            extras.clear();
        }
        // SGLang names the salt on every event of a salted chain; it belongs to the block that
        // opens the prompt, which only an event without a parent contains.
        if let Some(salt) = self.cache_salt
            && !salt.is_empty()
            && self.parent.is_none()
            && !tokens.is_empty()
            && !hashes.is_empty()
        {
            extras.resize(hashes.len(), Vec::new());
            extras[0].push(Extra::Text(salt.to_owned()));
        }
        Ok(KvEvent::Stored(BlockStored {
            parent: self.parent,
            block_size: self.block_size.ok_or(EventFault::Missing("block_size"))?,
            lora_name: self.lora_name.filter(|name| !name.is_empty()).map(str::to_owned),
            tier: self.medium.map_or(Tier::Gpu, Tier::from_medium),
            extras,
            group: self.group,
            kind: kind_of(self.kind, self.window),
            hashes: hashes.into(),
            tokens: tokens.into(),
        }))
    }
}

fn kind_of(kind: Option<&str>, window: Option<u32>) -> GroupKind {
    match (kind, window) {
        (None | Some("full_attention" | "mla_attention" | "sink_full_attention"), _) => {
            GroupKind::Full
        }
        (Some("sliding_window" | "sliding_window_mla"), Some(window)) if window > 0 => {
            GroupKind::SlidingWindow { window }
        }
        (Some("mamba"), _) => GroupKind::Mamba,
        _ => GroupKind::NotIndexable,
    }
}

fn read_tag(reader: &mut Reader<'_>) -> Result<Tag, EventFault> {
    let at = reader.position();
    match reader.head()? {
        Head::Str(name) => Tag::from_name(name),
        other => Err(Reader::wrong_type(at, "an event name", &other).into()),
    }
}

fn read_text<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a str>, EventFault> {
    let at = reader.position();
    match reader.head()? {
        Head::Nil => Ok(None),
        Head::Str(text) => match std::str::from_utf8(text) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(EventFault::NotUtf8 { at }),
        },
        other => Err(Reader::wrong_type(at, "text or nil", &other).into()),
    }
}

fn read_u32(reader: &mut Reader<'_>, field: &'static str) -> Result<Option<u32>, EventFault> {
    let at = reader.position();
    match reader.head()? {
        Head::Nil => Ok(None),
        Head::Uint(value) => {
            u32::try_from(value).map(Some).map_err(|_| EventFault::Range { field, at })
        }
        Head::Int(_) => Err(EventFault::Range { field, at }),
        other => Err(Reader::wrong_type(at, "an integer or nil", &other).into()),
    }
}

/// A hash: an integer as it is, a byte string by its last 8 bytes, big endian.
fn hash_of(head: Head<'_>, at: usize) -> Result<EngineHash, EventFault> {
    match head {
        Head::Uint(value) => Ok(EngineHash(value)),
        Head::Int(value) => Ok(EngineHash(value as u64)),
        Head::Bin([]) => Err(EventFault::EmptyHash { at }),
        Head::Bin(bytes) => {
            let tail = &bytes[bytes.len().saturating_sub(8)..];
            Ok(EngineHash(tail.iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte))))
        }
        other => Err(Reader::wrong_type(at, "a block hash", &other).into()),
    }
}

fn read_hashes(reader: &mut Reader<'_>) -> Result<Vec<EngineHash>, EventFault> {
    let len = reader.array("an array of block hashes")? as usize;
    let mut hashes = Vec::with_capacity(len.min(reader.remaining()));
    for _ in 0..len {
        let at = reader.position();
        hashes.push(hash_of(reader.head()?, at)?);
    }
    Ok(hashes)
}

/// Nil opens a prompt, and so does the integer 0, which llm-d's simulator writes instead.
fn read_parent(reader: &mut Reader<'_>) -> Result<Option<EngineHash>, EventFault> {
    let at = reader.position();
    match reader.head()? {
        Head::Nil | Head::Uint(0) => Ok(None),
        head => hash_of(head, at).map(Some),
    }
}

/// Token ids. SGLang under EAGLE keys its pages by pairs of neighbouring tokens; the first of
/// each pair is the prompt's own token, so a page gets the key that the router computes. Such a
/// page also fixes the token after it, hence a prediction can be one block too high where a
/// prompt departs exactly at a page's end.
fn read_tokens(reader: &mut Reader<'_>) -> Result<Vec<u32>, EventFault> {
    let len = reader.array("an array of token ids")? as usize;
    let mut tokens = Vec::with_capacity(len.min(reader.remaining()));
    for _ in 0..len {
        if let Some(token) = reader.short_uint() {
            tokens.push(token);
            continue;
        }
        let at = reader.position();
        match reader.head()? {
            Head::Uint(token) => tokens.push(token_of(token, at)?),
            Head::Array(2) => {
                match reader.head()? {
                    Head::Uint(token) => tokens.push(token_of(token, at)?),
                    other => return Err(Reader::wrong_type(at, "a token id", &other).into()),
                }
                reader.skip()?;
            }
            Head::Int(_) => return Err(EventFault::Range { field: "token_ids", at }),
            other => return Err(Reader::wrong_type(at, "a token id", &other).into()),
        }
    }
    Ok(tokens)
}

fn token_of(token: u64, at: usize) -> Result<u32, EventFault> {
    u32::try_from(token).map_err(|_| EventFault::Range { field: "token_ids", at })
}

/// Empty when no block has extras, otherwise one entry per block.
fn read_extras(reader: &mut Reader<'_>, hashes: usize) -> Result<Vec<Vec<Extra>>, EventFault> {
    let at = reader.position();
    let blocks = match reader.head()? {
        Head::Nil => return Ok(Vec::new()),
        Head::Array(len) => len as usize,
        other => {
            return Err(Reader::wrong_type(at, "an array with one entry per block", &other).into());
        }
    };
    let mut extras: Vec<Vec<Extra>> = Vec::new();
    for block in 0..blocks {
        let at = reader.position();
        let len = match reader.head()? {
            Head::Nil => 0,
            Head::Array(len) => len,
            other => return Err(Reader::wrong_type(at, "the extras of a block", &other).into()),
        };
        for _ in 0..len {
            let Some(extra) = read_extra(reader)? else { continue };
            if blocks != hashes {
                return Err(EventFault::ExtrasLength { extras: blocks, hashes });
            }
            extras.resize(hashes, Vec::new());
            extras[block].push(extra);
        }
    }
    Ok(extras)
}

/// One extra; of kinds that no engine is known to write nothing is kept.
fn read_extra(reader: &mut Reader<'_>) -> Result<Option<Extra>, EventFault> {
    let start = reader.position();
    match reader.head()? {
        Head::Str(text) => Ok(Some(Extra::Text(owned_text(text, start)?))),
        Head::Bin(digest) => Ok(Some(Extra::Digest(digest.to_vec()))),
        Head::Array(len) if len > 0 => {
            let at = reader.position();
            let identifier = match reader.head()? {
                Head::Str(text) => owned_text(text, at)?,
                other => return Err(Reader::wrong_type(at, "an identifier", &other).into()),
            };
            for _ in 1..len {
                reader.skip()?;
            }
            Ok(Some(Extra::Multimodal(identifier)))
        }
        _ => {
            reader.rewind(start);
            reader.skip()?;
            Ok(None)
        }
    }
}

fn owned_text(text: &[u8], at: usize) -> Result<String, EventFault> {
    std::str::from_utf8(text).map(str::to_owned).map_err(|_| EventFault::NotUtf8 { at })
}

/// Appends `batch` in the map form of vLLM 0.32, byte for byte as its msgspec classes write it:
/// the fields through `lora_name` always, later ones only when set, `extra_keys` with one entry
/// per block for blocks with content. `lora_id`, `locality`, `ownership`, `session_id` and the
/// offsets of multimodal items are not part of [`EventBatch`]: nil, absent and 0. Tokens that were
/// hashed cannot be written: of such an event only the names are left.
pub fn encode_batch(batch: &EventBatch, out: &mut Vec<u8>) {
    msgpack::write_array(out, 3);
    msgpack::write_f64(out, batch.timestamp_s);
    msgpack::write_array(out, batch.events.len());
    for event in &batch.events {
        match event {
            KvEvent::Stored(stored) => encode_stored(stored, out),
            KvEvent::Removed(removed) => encode_removed(removed, out),
            KvEvent::Cleared => {
                msgpack::write_map(out, 1);
                write_entry_str(out, "type", "AllBlocksCleared");
            }
        }
    }
    match batch.rank {
        Some(rank) => msgpack::write_uint(out, u64::from(rank)),
        None => msgpack::write_nil(out),
    }
}

fn encode_stored(stored: &BlockStored, out: &mut Vec<u8>) {
    let (kind, window) = kind_name(stored);
    let tokens = stored.tokens.ids();
    let has_blocks = !tokens.is_empty() && !stored.hashes.is_empty();
    let optional = [has_blocks, stored.group.is_some(), kind.is_some(), window.is_some()];
    msgpack::write_map(out, 8 + optional.iter().filter(|present| **present).count());
    write_entry_str(out, "type", "BlockStored");
    encode_hashes(&stored.hashes, out);
    msgpack::write_str(out, "parent_block_hash");
    match stored.parent {
        Some(parent) => msgpack::write_uint(out, parent.0),
        None => msgpack::write_nil(out),
    }
    msgpack::write_str(out, "token_ids");
    msgpack::write_array(out, tokens.len());
    for token in tokens {
        msgpack::write_uint(out, u64::from(*token));
    }
    write_entry_uint(out, "block_size", stored.block_size);
    msgpack::write_str(out, "lora_id");
    msgpack::write_nil(out);
    write_entry_str(out, "medium", medium_name(stored.tier));
    msgpack::write_str(out, "lora_name");
    match &stored.lora_name {
        Some(name) => msgpack::write_str(out, name),
        None => msgpack::write_nil(out),
    }
    if has_blocks {
        encode_extras(stored, out);
    }
    if let Some(group) = stored.group {
        write_entry_uint(out, "group_idx", group);
    }
    if let Some(kind) = kind {
        write_entry_str(out, "kv_cache_spec_kind", kind);
    }
    if let Some(window) = window {
        write_entry_uint(out, "kv_cache_spec_sliding_window", window);
    }
}

fn encode_removed(removed: &BlockRemoved, out: &mut Vec<u8>) {
    msgpack::write_map(out, 3 + usize::from(removed.group.is_some()));
    write_entry_str(out, "type", "BlockRemoved");
    encode_hashes(&removed.hashes, out);
    write_entry_str(out, "medium", medium_name(removed.tier));
    if let Some(group) = removed.group {
        write_entry_uint(out, "group_idx", group);
    }
}

fn encode_hashes(hashes: &[EngineHash], out: &mut Vec<u8>) {
    msgpack::write_str(out, "block_hashes");
    msgpack::write_array(out, hashes.len());
    for hash in hashes {
        msgpack::write_uint(out, hash.0);
    }
}

fn encode_extras(stored: &BlockStored, out: &mut Vec<u8>) {
    msgpack::write_str(out, "extra_keys");
    msgpack::write_array(out, stored.hashes.len());
    for block in 0..stored.hashes.len() {
        let extras = stored.extras.get(block).map_or(&[][..], Vec::as_slice);
        let len = usize::from(stored.lora_name.is_some()) + extras.len();
        if len == 0 {
            msgpack::write_nil(out);
            continue;
        }
        msgpack::write_array(out, len);
        if let Some(name) = &stored.lora_name {
            msgpack::write_str(out, name);
        }
        for extra in extras {
            match extra {
                Extra::Text(text) => msgpack::write_str(out, text),
                Extra::Digest(digest) => msgpack::write_bin(out, digest),
                Extra::Multimodal(identifier) => {
                    msgpack::write_array(out, 2);
                    msgpack::write_str(out, identifier);
                    msgpack::write_uint(out, 0);
                }
            }
        }
    }
}

/// Name and window of the group's kind; an event without group or without content has none.
fn kind_name(stored: &BlockStored) -> (Option<&'static str>, Option<u32>) {
    if stored.tokens.ids().is_empty() || (stored.group.is_none() && stored.kind == GroupKind::Full)
    {
        return (None, None);
    }
    match stored.kind {
        GroupKind::Full => (Some("full_attention"), None),
        GroupKind::SlidingWindow { window } => (Some("sliding_window"), Some(window)),
        GroupKind::Mamba => (Some("mamba"), None),
        GroupKind::NotIndexable => (Some("unknown"), None),
    }
}

fn medium_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Gpu => "GPU",
        Tier::Cpu => "CPU",
        Tier::Disk => "STORAGE",
        Tier::Other => "OTHER",
    }
}

fn write_entry_str(out: &mut Vec<u8>, key: &str, value: &str) {
    msgpack::write_str(out, key);
    msgpack::write_str(out, value);
}

fn write_entry_uint(out: &mut Vec<u8>, key: &str, value: u32) {
    msgpack::write_str(out, key);
    msgpack::write_uint(out, u64::from(value));
}

#[cfg(test)]
mod tests;
