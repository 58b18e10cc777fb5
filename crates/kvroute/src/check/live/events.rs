//! Does an engine tell what it holds? A prompt that nobody has sent before must cause an event
//! with its tokens, and the replay socket must have that event, too.

use std::time::Duration;

use kvroute_core::event::{BlockStored, GroupKind, KvEvent};
use kvroute_lab::model::{BlockHasher, HashAlgorithm, HashExtras};
use kvroute_router::EventsSource;
use kvroute_router::ask::{self, EventStream, Place};
use kvroute_wire::engine_api::TokensRead;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::endpoint::{About, Asker};
use super::{Check, Expected, Finding, Status, clock};

/// Block size to try with when the metrics do not tell it.
const BLOCK_SIZE_ASSUMED: u32 = 16;
/// Longest prompt of a probe, in tokens: two of the longest blocks that engines use.
const PROBE_TOKENS_MAX: u32 = 8192;
/// How often a prompt is sent: a subscription may take effect after the first.
const ATTEMPTS: u32 = 2;
/// Seeds of block hashes that are tried beside configured ones: vLLM's own of 0.30 and later, and
/// those that its documentation and llm-d's guides use.
const SEEDS_USUAL: [&str; 3] = ["vllm-none-hash", "0", "42"];

/// A prompt of its own.
pub(super) struct Probe {
    /// Token ids where the engine tokenizes, else text.
    pub prompt: Value,
    /// The ids.
    pub tokens: Option<Vec<u32>>,
    /// It fills more than one block.
    pub is_long: bool,
}

/// What came of a probe.
pub(super) struct Told {
    pub probe: Probe,
    /// Seconds by which the engine's clock is ahead.
    pub event_skew_s: Option<f64>,
}

/// The event of a probe.
struct Seen {
    seq: u64,
    stored: BlockStored,
    skew_s: f64,
}

/// Asks about events; an error says why the engine refused the prompt.
pub(super) async fn check(asker: &mut Asker<'_>, about: &mut About) -> Result<Told, String> {
    if !asker.question.expected.reads_events {
        let found = "not asked: no plugin of the configuration reads KV events";
        let finding = Finding::new((Check::Events, Status::Ok), "nothing", found);
        return without_events(asker, about, finding).await;
    }
    let source = &asker.engine.events;
    if matches!(source, EventsSource::Bound | EventsSource::Off | EventsSource::Unselected) {
        let found = match source {
            EventsSource::Bound => {
                "not asked: the engine connects to the router (kvEventsConfig.zmqEndpoint); \
                 /index of the running router shows whether it has"
            }
            EventsSource::Unselected => {
                "nobody subscribes: its labels do not match kvEventsConfig's podLabelSelector"
            }
            _ => "nobody subscribes: kvEventsConfig has discoverPods: false and no zmqEndpoint",
        };
        let bound = *source == EventsSource::Bound;
        let status = if bound { Status::Unknown } else { Status::Warning };
        let finding = Finding::new((Check::Events, status), "nothing", found);
        return without_events(asker, about, finding).await;
    }
    let (place, mut stream) = match connect(asker).await {
        Ok(connected) => connected,
        Err(finding) => return without_events(asker, about, finding).await,
    };
    let Heard { probe, seen, others } = hear(asker, about, &mut stream).await?;
    let asked = format!("a subscription at tcp://{}, and a new prompt", place.events);
    let patience = asker.question.event_patience.as_secs_f32();
    let silent = match (seen, others) {
        (Ok(Some(seen)), _) => {
            let found = format!(
                "alive at tcp://{}: a new prompt was told as {} blocks of {} tokens",
                place.events,
                seen.stored.hashes.len(),
                seen.stored.block_size
            );
            asker.push(Finding::new((Check::Events, Status::Ok), asked, found));
            about.block_size = Some(seen.stored.block_size);
            replay(asker, &place, seen.seq).await;
            let algorithm = about.cache.hash_algorithm.as_deref();
            asker.push(first_hash(&asker.question.expected, algorithm, &seen.stored));
            return Ok(Told { probe, event_skew_s: Some(seen.skew_s) });
        }
        (Ok(None), 0) => format!(
            "events are off: the socket answers, but a new prompt caused no event within \
             {patience} s"
        ),
        (Ok(None), n) => format!(
            "a new prompt caused no event within {patience} s, but {n} batches about other \
             prompts came: the port belongs to another engine, or events are lost"
        ),
        (Err(error), _) => format!("the event stream cannot be read: {error}"),
    };
    let wrong = (Check::Events, Status::Wrong);
    asker.push(Finding::new(wrong, asked, silent).change(EVENTS_ON));
    Ok(Told { probe, event_skew_s: None })
}

/// Sends a prompt although nobody listens: it is sent again later.
async fn without_events(
    asker: &mut Asker<'_>,
    about: &About,
    finding: Finding,
) -> Result<Told, String> {
    asker.push(finding);
    let probe = probe(asker, about, 0).await;
    asker.complete(&about.model, &probe).await?;
    Ok(Told { probe, event_skew_s: None })
}

/// The last prompt that was sent, and what was heard of it.
struct Heard {
    probe: Probe,
    seen: Result<Option<Seen>, String>,
    /// Batches about something else.
    others: u32,
}

async fn hear(
    asker: &mut Asker<'_>,
    about: &About,
    stream: &mut EventStream,
) -> Result<Heard, String> {
    let (mut others, mut attempt) = (0, 0);
    loop {
        let probe = probe(asker, about, attempt).await;
        if let Err(refused) = asker.complete(&about.model, &probe).await {
            let asked = "POST /v1/completions, one token";
            asker.push(Finding::new((Check::Events, Status::Unknown), asked, refused.clone()));
            return Err(refused);
        }
        attempt += 1;
        let patience = asker.question.event_patience / ATTEMPTS;
        let seen = wait(stream, &probe, patience, &mut others).await;
        if attempt == ATTEMPTS || !matches!(seen, Ok(None)) {
            return Ok(Heard { probe, seen, others });
        }
    }
}

const EVENTS_ON: &str = "start vLLM with --kv-events-config \
    '{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"tcp://*:5557\",\
    \"replay_endpoint\":\"tcp://*:5558\"}' (and with prefix caching on); give the ports to kvroute \
    with --kv-events-port and --kv-replay-port where the engine is older than vLLM 0.32";

/// Finds the publisher and subscribes.
async fn connect(asker: &Asker<'_>) -> Result<(Place, EventStream), Finding> {
    let wrong = |asked: String, found: String| {
        Finding::new((Check::Events, Status::Wrong), asked, found).change(EVENTS_ON)
    };
    let place = match ask::event_place(asker.engine).await {
        Ok(place) => place,
        Err(reason) => {
            let found = format!("no event socket: events are off, or cannot be found: {reason}");
            return Err(wrong("GET /kv_event_sources".to_owned(), found));
        }
    };
    let asked = format!("a subscription at tcp://{}", place.events);
    match EventStream::open(&place.events, &asker.question.limits).await {
        Ok(stream) => Ok((place, stream)),
        Err(reason) => {
            let found = format!(
                "events are off, or the port is wrong: no publisher at tcp://{} ({}): {reason}",
                place.events, place.known
            );
            Err(wrong(asked, found))
        }
    }
}

/// A prompt that fills two blocks and a half, beginning with what no other prompt begins with.
async fn probe(asker: &Asker<'_>, about: &About, attempt: u32) -> Probe {
    let block = about.block_size.unwrap_or(BLOCK_SIZE_ASSUMED).max(1);
    let length_max = about.max_model_len.unwrap_or(u32::MAX).saturating_sub(2);
    let wanted = block.saturating_mul(2).saturating_add(block / 2);
    let wanted = wanted.min(PROBE_TOKENS_MAX).min(length_max);
    let unique = (clock::now_unix_s() * 1e6) as u64;
    let mut text = format!("{unique:x}-{:x}-{attempt} kvroute check.", std::process::id());
    (0..wanted).for_each(|at| text += &format!(" probe {}", at % 10));
    let body = json!({"model": about.model, "prompt": text, "add_special_tokens": true});
    let tokens = match asker.post("/tokenize", &body).await {
        Ok(answer) if answer.status == 200 => serde_json::from_slice(&answer.body).ok(),
        _ => None,
    };
    let tokens = tokens.map(|TokensRead { mut tokens }| {
        tokens.truncate(wanted as usize);
        tokens
    });
    Probe {
        prompt: tokens.as_ref().map_or_else(|| json!(text), |tokens| json!(tokens)),
        tokens,
        is_long: wanted > block,
    }
}

/// Waits for the event that tells the probe's first block.
async fn wait(
    stream: &mut EventStream,
    probe: &Probe,
    patience: Duration,
    others: &mut u32,
) -> Result<Option<Seen>, String> {
    let deadline = Instant::now() + patience;
    loop {
        let Ok(batch) = tokio::time::timeout_at(deadline, stream.next()).await else {
            return Ok(None);
        };
        let (seq, batch) = batch?;
        let skew_s = batch.timestamp_s - clock::now_unix_s();
        let stored = batch.events.into_iter().find_map(|event| match event {
            KvEvent::Stored(stored) if is_about(&stored, probe) => Some(stored),
            _ => None,
        });
        match stored {
            Some(stored) => return Ok(Some(Seen { seq, stored, skew_s })),
            None => *others = others.saturating_add(1),
        }
    }
}

/// Does the event tell all blocks from the probe's first one on?
fn is_about(stored: &BlockStored, probe: &Probe) -> bool {
    let tokens = stored.tokens.ids();
    let dense = stored.hashes.len() * stored.block_size as usize == tokens.len();
    let opens = stored.parent.is_none() && stored.kind == GroupKind::Full;
    let same = probe.tokens.as_deref().is_none_or(|probe| probe.starts_with(tokens));
    dense && opens && same && !tokens.is_empty()
}

async fn replay(asker: &mut Asker<'_>, place: &Place, seq: u64) {
    let without = "after a lost event, what the engine holds is known in part, until it restarts \
                   or is reset";
    let Some(address) = &place.replay else {
        let found = format!("no replay socket: {without}");
        let status = (Check::Replay, Status::Warning);
        asker.push(Finding::new(status, "GET /kv_event_sources", found).change(
            "add \"replay_endpoint\":\"tcp://*:5558\" to vLLM's --kv-events-config (and \
             --kv-replay-port or replay= to kvroute, where the engine cannot be asked)",
        ));
        return;
    };
    let asked = format!("batch {seq} of the replay socket at tcp://{address}");
    let finding = match ask::replay(address, seq, &asker.question.limits).await {
        Ok(0) => {
            let found = format!("the replay socket no longer has a batch just sent: {without}");
            Finding::new((Check::Replay, Status::Warning), asked, found)
                .change("raise \"buffer_steps\" in vLLM's --kv-events-config")
        }
        Ok(_) => {
            let found = format!("alive at tcp://{address}");
            Finding::new((Check::Replay, Status::Ok), asked, found)
        }
        Err(reason) => {
            let found = format!("the replay socket does not answer: {reason}; {without}");
            Finding::new((Check::Replay, Status::Wrong), asked, found).change(
                "correct the replay port (vLLM: \"replay_endpoint\" in --kv-events-config; \
                 kvroute: --kv-replay-port or replay=)",
            )
        }
    };
    asker.push(finding);
}

/// Computes the name of the first block in vLLM's ways and compares. `algorithm` is the engine's
/// `--prefix-caching-hash-algo`, where its metrics tell.
fn first_hash(expected: &Expected, algorithm: Option<&str>, stored: &BlockStored) -> Finding {
    let asked = "the first block's hash in a BlockStored event, computed again from its tokens";
    let finding = |status, found: String| Finding::new((Check::FirstHash, status), asked, found);
    let opaque = "kvroute does not need it: it never computes engine hashes";
    if let Some(name @ ("sha256" | "xxhash")) = algorithm {
        let found = format!(
            "made with {name} over Python's pickle, which only the same Python repeats; {opaque}"
        );
        return finding(Status::Unknown, found);
    }
    let algorithms = match algorithm.and_then(HashAlgorithm::from_name) {
        Some(algorithm) => vec![algorithm],
        None => vec![HashAlgorithm::Sha256Cbor, HashAlgorithm::XxhashCbor],
    };
    let makes = |seed: &str| {
        algorithms.iter().copied().find(|algorithm| is_made_with(*algorithm, seed, stored))
    };
    let wrong = expected.hash_seeds.iter().find(|stated| makes(&stated.value).is_none());
    let stated = expected.hash_seeds.iter().map(|stated| stated.value.as_str());
    let own = std::env::var("PYTHONHASHSEED").unwrap_or_default();
    let seeds = stated.chain(SEEDS_USUAL).chain([own.as_str()]);
    let real = seeds.filter_map(|seed| makes(seed).map(|algorithm| (algorithm, seed))).next();
    match (wrong, real) {
        (None, Some((algorithm, seed))) => {
            finding(Status::Ok, format!("reproduced: {} with seed `{seed}`", algorithm.as_str()))
        }
        (None, None) => finding(
            Status::Unknown,
            format!(
                "not reproduced with {}: the engine's seed is random or not a usual one; {opaque}",
                names(&algorithms)
            ),
        ),
        (Some(stated), real) => {
            let (place, value) = (&stated.place, &stated.value);
            let made = real.map_or_else(String::new, |(algorithm, seed)| {
                format!(" (it was made by {} with seed `{seed}`)", algorithm.as_str())
            });
            let found = format!(
                "the hash seed differs: {place} says `{value}`, which does not give the engine's \
                 first hash{made}. {opaque}. Others that compute hashes, and replicas that share \
                 an index, must all have the engine's seed"
            );
            finding(Status::Warning, found).change(format!(
                "leave the seed out here; elsewhere start every vLLM with PYTHONHASHSEED={value} \
                 and --prefix-caching-hash-algo sha256_cbor"
            ))
        }
    }
}

fn names(algorithms: &[HashAlgorithm]) -> String {
    algorithms.iter().map(|algorithm| algorithm.as_str()).collect::<Vec<_>>().join(" or ")
}

fn is_made_with(algorithm: HashAlgorithm, seed: &str, stored: &BlockStored) -> bool {
    let mut hasher = BlockHasher::new(algorithm, seed);
    let block = stored.tokens.ids().get(..stored.block_size as usize);
    let (Some(block), Some(hash)) = (block, stored.hashes.first()) else { return false };
    let root = hasher.root();
    hasher.next(&root, block, HashExtras::default()).key() == *hash
}

#[cfg(test)]
mod tests {
    use kvroute_core::event::{Hashes, Tier};

    use super::super::Stated;
    use super::*;

    fn stored(algorithm: HashAlgorithm, seed: &str) -> BlockStored {
        let tokens: Vec<u32> = (100..132).collect();
        let mut hasher = BlockHasher::new(algorithm, seed);
        let first = hasher.next(&hasher.root(), &tokens[..16], HashExtras::default());
        let second = hasher.next(&first, &tokens[16..], HashExtras::default());
        BlockStored {
            hashes: [first.key(), second.key()].into_iter().collect(),
            parent: None,
            tokens: tokens.into(),
            block_size: 16,
            lora_name: None,
            tier: Tier::Gpu,
            extras: Vec::new(),
            group: None,
            kind: GroupKind::Full,
        }
    }

    fn seed(seed: &str) -> Expected {
        let stated = Stated { place: "c.yaml: s".into(), value: seed.to_owned() };
        let hash_seeds = if seed.is_empty() { vec![] } else { vec![stated] };
        Expected { hash_seeds, ..Expected::default() }
    }

    #[test]
    fn a_first_hash_is_judged() {
        use HashAlgorithm::{Sha256Cbor, XxhashCbor};
        let table = [
            ("", None, stored(Sha256Cbor, "vllm-none-hash"), Status::Ok, "`vllm-none-hash`"),
            ("", None, stored(XxhashCbor, "0"), Status::Ok, "xxhash_cbor with seed `0`"),
            ("7", None, stored(Sha256Cbor, "7"), Status::Ok, "seed `7`"),
            ("7", None, stored(Sha256Cbor, "0"), Status::Warning, "with seed `0`"),
            ("7", None, stored(Sha256Cbor, "strange"), Status::Warning, "seed differs"),
            ("", None, stored(Sha256Cbor, "strange"), Status::Unknown, "not reproduced"),
            ("7", Some("sha256"), stored(Sha256Cbor, "7"), Status::Unknown, "pickle"),
        ];
        for (configured, algorithm, stored, status, words) in table {
            let found = first_hash(&seed(configured), algorithm, &stored);
            assert_eq!(found.status, status, "{found:?}");
            assert!(found.found.contains(words), "{found:?}");
        }
    }

    #[test]
    fn an_event_must_be_about_the_probe() {
        let event = stored(HashAlgorithm::Sha256Cbor, "0");
        let tokens: Vec<u32> = (100..140).collect();
        let prompt = json!(tokens);
        let probe = Probe { prompt, tokens: Some(tokens), is_long: true };
        assert!(is_about(&event, &probe));
        let other = BlockStored { tokens: Vec::from_iter(0..32).into(), ..event.clone() };
        let later = BlockStored { parent: event.hashes.first().copied(), ..event.clone() };
        let window = BlockStored { hashes: event.hashes[..1].into(), ..event.clone() };
        let update = BlockStored { hashes: Hashes::new(), tokens: vec![].into(), ..event };
        for event in [other, later, window, update] {
            assert!(!is_about(&event, &probe), "{event:?}");
        }
    }
}
