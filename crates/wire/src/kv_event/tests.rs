use std::path::PathBuf;

use kvroute_core::event::{
    BlockRemoved, BlockStored, EngineHash, EventBatch, Extra, GroupKind, KvEvent, Tier,
};
use serde_json::Value;

use super::*;

fn data(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/wire").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn expected_hash(value: &Value) -> EngineHash {
    match value {
        Value::Object(map) => {
            let bytes = unhex(map["$hex"].as_str().unwrap());
            EngineHash(u64::from_be_bytes(bytes[bytes.len() - 8..].try_into().unwrap()))
        }
        other => EngineHash(other.as_u64().unwrap_or_else(|| other.as_i64().unwrap() as u64)),
    }
}

fn expected_extra(value: &Value) -> Extra {
    match value {
        Value::String(text) => Extra::Text(text.clone()),
        Value::Array(items) => Extra::Multimodal(items[0].as_str().unwrap().to_owned()),
        other => Extra::Digest(unhex(other["$hex"].as_str().unwrap())),
    }
}

/// What an event says, read from the JSON beside the payload: named fields in both forms.
fn named(event: &Value, sglang: bool) -> Value {
    let Value::Array(items) = event else { return event.clone() };
    let stored = [
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
    ];
    let removed = ["type", "block_hashes", "medium", "group_idx"];
    let names: &[&str] = if items[0] == "BlockStored" { &stored } else { &removed };
    let mut map: serde_json::Map<String, Value> =
        names.iter().zip(items).map(|(name, item)| ((*name).to_owned(), item.clone())).collect();
    if sglang && let Some(Value::Object(metadata)) = map.remove("lora_name") {
        map.extend(metadata);
    }
    Value::Object(map)
}

fn expected_extras(event: &Value, hashes: usize) -> Vec<Vec<Extra>> {
    let mut extras: Vec<Vec<Extra>> = vec![Vec::new(); hashes];
    for (of_block, items) in
        extras.iter_mut().zip(event["extra_keys"].as_array().into_iter().flatten())
    {
        let items = items.as_array().map_or(&[][..], Vec::as_slice);
        let skipped = usize::from(items.first().is_some_and(|item| *item == event["lora_name"]));
        of_block.extend(items[skipped..].iter().map(expected_extra));
    }
    if let (Some(salt), true) = (event["cache_salt"].as_str(), event["parent_block_hash"].is_null())
    {
        extras[0].push(Extra::Text(salt.to_owned()));
    }
    if extras.iter().all(Vec::is_empty) {
        extras.clear();
    }
    extras
}

fn expected_event(event: &Value, sglang: bool) -> KvEvent {
    let event = named(event, sglang);
    let hashes = || -> Vec<EngineHash> {
        event["block_hashes"].as_array().unwrap().iter().map(expected_hash).collect()
    };
    let number = |name: &str| event[name].as_u64().map(|value| value as u32);
    let tier = event["medium"].as_str().map_or(Tier::Gpu, Tier::from_medium);
    let group = number("group_idx");
    match event["type"].as_str().unwrap() {
        "AllBlocksCleared" => KvEvent::Cleared,
        "BlockRemoved" => KvEvent::Removed(BlockRemoved { hashes: hashes().into(), tier, group }),
        "BlockStored" => KvEvent::Stored(BlockStored {
            hashes: hashes().into(),
            parent: Some(&event["parent_block_hash"]).filter(|v| !v.is_null()).map(expected_hash),
            tokens: event["token_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|token| token.as_u64().unwrap() as u32)
                .collect::<Vec<_>>()
                .into(),
            block_size: number("block_size").unwrap(),
            lora_name: event["lora_name"].as_str().map(str::to_owned),
            tier,
            extras: expected_extras(&event, hashes().len()),
            group,
            kind: match event["kv_cache_spec_kind"].as_str() {
                None | Some("full_attention") => GroupKind::Full,
                Some("sliding_window") => GroupKind::SlidingWindow {
                    window: number("kv_cache_spec_sliding_window").unwrap(),
                },
                other => panic!("{other:?}"),
            },
        }),
        other => panic!("{other}"),
    }
}

fn expected_batch(decoded: &Value, sglang: bool) -> EventBatch {
    EventBatch {
        timestamp_s: decoded[0].as_f64().unwrap(),
        events: decoded[1]
            .as_array()
            .unwrap()
            .iter()
            .map(|event| expected_event(event, sglang))
            .collect(),
        rank: decoded[2].as_u64().map(|rank| rank as u32),
        events_bad: 0,
    }
}

#[test]
fn every_version_of_vllm_and_sglang_is_understood() {
    let golden: Value = serde_json::from_str(&data("event_payloads.json")).unwrap();
    let samples = golden["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 157);
    for sample in samples {
        let engine = sample["engine"].as_str().unwrap();
        let name = format!("{engine} {}", sample["case"]);
        let payload = unhex(sample["payload_hex"].as_str().unwrap());
        let expected = expected_batch(&sample["decoded"], engine.starts_with("sglang"));
        assert_eq!(decode_batch(&payload), Ok(expected.clone()), "{name}");
        let mut again = Vec::new();
        encode_batch(&expected, &mut again);
        let round_trip = decode_batch(&again).unwrap();
        let is_window = |event: &KvEvent| {
            matches!(
                event,
                KvEvent::Stored(BlockStored { kind: GroupKind::SlidingWindow { .. }, .. })
            )
        };
        assert!(round_trip == expected || expected.events.iter().any(is_window), "{name}");
    }
}

struct Frame {
    run: String,
    payload: Vec<u8>,
}

fn frames() -> Vec<Frame> {
    let text = data("kv_event_frames.jsonl");
    let lines = text.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        Frame {
            run: line["run"].as_str().unwrap().to_owned(),
            payload: crate::base64::decode(line["frames_b64"][2].as_str().unwrap()).unwrap(),
        }
    });
    lines.collect()
}

/// Whether our types hold everything the frame says.
fn is_carried(frame: &Frame) -> bool {
    let holds = |needle: &[u8]| frame.payload.windows(needle.len()).any(|part| part == needle);
    !frame.run.ends_with("byteshash")
        && !holds(b"session_id")
        && !holds(b"\xa7lora_id\x01")
        && !holds(b"\xa7lora_id\x02")
}

#[test]
fn recorded_frames_are_written_byte_for_byte() {
    let (mut identical, mut equal) = (0, 0);
    for frame in frames() {
        let batch = decode_batch(&frame.payload).unwrap();
        assert_eq!(batch.events_bad, 0, "{}", frame.run);
        let mut again = Vec::new();
        encode_batch(&batch, &mut again);
        if is_carried(&frame) {
            assert_eq!(again, frame.payload, "{}", frame.run);
            identical += 1;
        } else {
            assert_eq!(decode_batch(&again).unwrap(), batch, "{}", frame.run);
            equal += 1;
        }
    }
    assert!(identical >= 30 && equal >= 5, "{identical} identical, {equal} equal");
}

/// A batch of one event given as msgpack bytes.
fn batch_of(event: &[u8]) -> Vec<u8> {
    [&[0x93, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0x91][..], event, &[0xc0]].concat()
}

fn stored_map(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    msgpack::write_map(&mut out, entries.len() + 1);
    for (key, value) in entries {
        msgpack::write_str(&mut out, key);
        out.extend_from_slice(value);
    }
    write_entry_str(&mut out, "type", "BlockStored");
    out
}

const CONTENT: [(&str, &[u8]); 3] =
    [("block_hashes", &[0x92, 1, 2]), ("token_ids", &[0x92, 5, 6]), ("block_size", &[1])];

fn with(more: &[(&str, &[u8])]) -> Vec<u8> {
    batch_of(&stored_map(&[&CONTENT[..], more].concat()))
}

fn only_stored(payload: &[u8]) -> BlockStored {
    let batch = decode_batch(payload).unwrap();
    assert_eq!(batch.events_bad, 0);
    match batch.events.into_iter().next() {
        Some(KvEvent::Stored(stored)) => stored,
        other => panic!("{other:?}"),
    }
}

#[test]
fn fields_in_any_order_and_unknown_ones() {
    let nested: &[u8] = &[0x81, 0x93, 1, 0x91, 0xc0, 3, 0x90];
    let stored = only_stored(&with(&[("novelty", nested), ("parent_block_hash", &[0])]));
    assert_eq!((stored.parent, stored.tokens.ids()), (None, &[5, 6][..]));
    assert_eq!(stored.tier, Tier::Gpu);
    // The array form of a future version has a longer tail.
    let mut event = vec![0xdc, 0, 14];
    msgpack::write_str(&mut event, "BlockStored");
    event.extend_from_slice(&[0x91, 9, 7, 0x91, 5, 1]);
    event.extend_from_slice(&[0xc0; 7]);
    event.extend_from_slice(&[0x91, 0xc0, 0xc3]);
    assert_eq!(only_stored(&batch_of(&event)).parent, Some(EngineHash(7)));
}

#[test]
fn extras_find_their_block() {
    let text = |text: &str| Extra::Text(text.to_owned());
    let image = Extra::Multimodal("i".to_owned());
    const LORA: (&str, &[u8]) = ("lora_name", b"\xa1a");
    type Case<'a> = (&'a [(&'a str, &'a [u8])], Vec<Vec<Extra>>);
    let table: Vec<Case<'_>> = vec![
        (&[("extra_keys", &[0x92, 0xc0, 0xc0])], vec![]),
        (&[("extra_keys", b"\x92\x91\xa1s\xc0")], vec![vec![text("s")], vec![]]),
        (&[("extra_keys", b"\x92\x91\xa1a\x91\xa1a"), LORA], vec![]),
        (&[LORA, ("extra_keys", b"\x92\x92\xa1a\xa1a\x91\xa1a")], vec![vec![text("a")], vec![]]),
        (
            &[("extra_keys", b"\x92\xc0\x92\x92\xa1i\x03\xc4\x01\x07")],
            vec![vec![], vec![image, Extra::Digest(vec![7])]],
        ),
        (&[("cache_salt", b"\xa1s")], vec![vec![text("s")], vec![]]),
        (&[("cache_salt", b"\xa1s"), ("parent_block_hash", &[4])], vec![]),
        (&[("extra_keys", &[0x91, 0xc0])], vec![]),
    ];
    for (entries, extras) in table {
        assert_eq!(only_stored(&with(entries)).extras, extras, "{entries:?}");
    }
}

#[test]
fn pairs_of_eagle_count_by_their_first_token() {
    let pairs: &[u8] = &[0x92, 0x92, 5, 6, 0x92, 6, 7];
    let entries = [("block_hashes", &[0x91, 1][..]), ("token_ids", pairs), ("block_size", &[2])];
    assert_eq!(only_stored(&batch_of(&stored_map(&entries))).tokens.ids(), [5, 6]);
}

#[test]
fn kinds_of_groups() {
    let window: (&str, &[u8]) = ("kv_cache_spec_sliding_window", &[64]);
    let table: [(&str, bool, GroupKind); 8] = [
        ("full_attention", false, GroupKind::Full),
        ("mla_attention", false, GroupKind::Full),
        ("sink_full_attention", true, GroupKind::Full),
        ("sliding_window", true, GroupKind::SlidingWindow { window: 64 }),
        ("sliding_window_mla", true, GroupKind::SlidingWindow { window: 64 }),
        ("sliding_window", false, GroupKind::NotIndexable),
        ("mamba", false, GroupKind::Mamba),
        ("chunked_local_attention", false, GroupKind::NotIndexable),
    ];
    for (name, has_window, kind) in table {
        let mut value = Vec::new();
        msgpack::write_str(&mut value, name);
        let mut entries = vec![("kv_cache_spec_kind", value.as_slice())];
        entries.extend(has_window.then_some(window));
        assert_eq!(only_stored(&with(&entries)).kind, kind, "{name}");
    }
}

#[test]
fn one_bad_event_never_drops_its_batch() {
    let mut good = Vec::new();
    msgpack::write_map(&mut good, 1);
    write_entry_str(&mut good, "type", "AllBlocksCleared");
    let table: Vec<(Vec<u8>, &str)> = vec![
        (vec![0x05], "expected an event (map or array), found an integer"),
        (vec![0x90], "expected an event (map or array), found an array"),
        (vec![0x80], "an event without `type`"),
        (b"\x91\xa5Novel".to_vec(), "an event of a type this version does not know"),
        (stored_map(&CONTENT[..2]), "an event without `block_size`"),
        (stored_map(&CONTENT[1..]), "an event without `block_hashes`"),
        (b"\x81\x91\x01\x02".to_vec(), "expected text as key, found an array"),
        (stored_map(&[("token_ids", b"\x92\x01\xa1x")]), "expected a token id, found a string"),
        (stored_map(&[("token_ids", b"\x91\xff")]), "`token_ids` holds a number out of range"),
        (stored_map(&[("block_hashes", b"\x91\xc4\x00")]), "an empty block hash"),
        (stored_map(&[("lora_name", b"\xa1\xff")]), "text that is not UTF-8"),
        (
            stored_map(&[&CONTENT[..], &[("extra_keys", &b"\x91\x91\xa1s"[..])]].concat()),
            "`extra_keys` has 1 entries for 2 blocks",
        ),
    ];
    for (bad, message) in table {
        let payload =
            [&b"\x93\x00\x93"[..], good.as_slice(), bad.as_slice(), good.as_slice(), b"\x01"]
                .concat();
        let mut faults = Vec::new();
        let batch = decode_batch_reporting(&payload, &mut |index, fault| {
            faults.push((index, fault.to_string()));
        });
        let batch = batch.unwrap_or_else(|error| panic!("{message}: {error}"));
        assert_eq!(batch.events, [KvEvent::Cleared, KvEvent::Cleared], "{message}");
        assert_eq!((batch.events_bad, batch.rank), (1, Some(1)), "{message}");
        assert_eq!(faults.len(), 1);
        assert_eq!(faults[0].0, 1);
        assert!(faults[0].1.starts_with(message), "{} is not {message}", faults[0].1);
    }
}

#[test]
fn envelopes_that_are_no_batch() {
    let table: [(&[u8], &str); 6] = [
        (b"", "not a KV event batch: the message ends inside a value at byte 0"),
        (
            b"\xa2hi",
            "not a KV event batch: expected a batch [timestamp, events, rank], found a string",
        ),
        (b"\x92\xa1x\x90", "not a KV event batch: expected a timestamp in seconds, found a string"),
        (b"\x92\x01\xc0", "not a KV event batch: expected an array of events, found nil"),
        (b"\x92\x01\xdd\xff\xff\xff\xff", "not a KV event batch: the message ends"),
        (b"\x92\x01\x90\x00", "not a KV event batch: 1 bytes follow it"),
    ];
    for (payload, message) in table {
        let error = decode_batch(payload).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    let error = decode_batch(&vec![0; PAYLOAD_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, KvEventError::TooLarge { .. }));
}
