//! Peers of the ext_proc server that do what they like: every stream ends, what it held is given
//! back, and others are served.
//!
//! Messages come in legal and illegal orders, in any sizes, cut anywhere, damaged, with lengths
//! that are lies; streams end in every way, or not at all; windows stay shut. What the server does
//! say must keep Envoy's rules whatever it was told.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "support/ext_proc.rs"]
mod client;
#[path = "support/envoy.rs"]
mod envoy;
#[path = "ext_proc_hostile/frames.rs"]
mod frames;
mod support;
#[path = "ext_proc/world.rs"]
mod world;

use std::alloc::System;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use cap::Cap;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use kvroute_core::Rng;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::RwLock;
use tokio::task::JoinSet;

use client::*;
use envoy::*;
use support::{LONG, metric};
use world::*;

/// Streams of one round.
const STREAMS: u64 = 240;
/// Longest body of one message; the server takes messages of `MESSAGE_BYTES_MAX`.
const BODY_BYTES_MAX: usize = 70_000;
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// What memory may differ by between two rounds that are alike: tables that grow, rarely.
const SLACK_BYTES: usize = 256 << 10;

/// Knows how much memory is in use.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Tests run side by side, but for the one that weighs all memory.
static MEMORY: RwLock<()> = RwLock::const_new(());

/// Deadlines as short as settings allow.
async fn hurried() -> World {
    let mut setup = Setup::default();
    let settings = &mut setup.settings;
    settings.client_header_timeout_ms = 300;
    settings.client_body_timeout_s = 1;
    settings.first_byte_timeout_s = 1;
    settings.response_idle_timeout_s = 1;
    settings.ext_proc_message_bytes_max = MESSAGE_BYTES_MAX;
    settings.ext_proc_request_timeout_s = 1;
    settings.ext_proc_stream_timeout_s = 3;
    settings.decision_timeout_ms = 1_000;
    settings.body_bytes_max = 200_000;
    setup.start().await
}

/// How a peer leaves a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// It has nothing more to say, and listens.
    HalfClose,
    /// RST_STREAM.
    Reset,
    /// Silence: the server must end it.
    Silence,
    /// The connection goes without a word.
    Vanish,
}

/// What a peer does on one stream.
#[derive(Debug)]
struct Script {
    headers: http::Request<()>,
    /// Bytes of DATA frames.
    data: Vec<Bytes>,
    end: End,
    /// Whether the server may send anything beyond the first bytes.
    reads: bool,
    /// Bodies of the request and of the answer, as far as they were sent.
    sent: [Vec<u8>; 2],
}

const ENDS: [End; 4] = [End::HalfClose, End::Reset, End::Silence, End::Vanish];

impl Script {
    fn random(seed: u64) -> Script {
        let mut rng = Rng::seeded(seed);
        let mut sent = [Vec::new(), Vec::new()];
        let mut bytes = Vec::new();
        let legal = rng.below(5);
        for at in 0..legal {
            frame(&mut bytes, &legal_message(&mut rng, at, &mut sent).encode_to_vec());
        }
        if rng.below(2) == 0 {
            for _ in 0..1 + rng.below(4) {
                nonsense(&mut rng, &mut bytes, &mut sent);
            }
        }
        if rng.below(8) == 0 {
            bytes.truncate(rng.below(bytes.len() + 1));
        }
        let mut data = Vec::new();
        let mut bytes = Bytes::from(bytes);
        while !bytes.is_empty() {
            let most = bytes.len().min(30_000);
            data.push(bytes.split_to(1 + rng.below(most)));
        }
        let end = ENDS[rng.below(ENDS.len())];
        Script { headers: head(&mut rng), data, end, reads: rng.below(6) != 0, sent }
    }
}

/// The headers of the call; mostly as they should be.
fn head(rng: &mut Rng) -> http::Request<()> {
    let usual = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
    let request = http::Request::builder().version(http::Version::HTTP_2);
    let at = |path: &str| format!("http://epp{path}");
    let request = match rng.below(20) {
        0 => request.method("GET").uri(at(usual)),
        1 => request.method("POST").uri(at("/some.Service/Method")),
        2 => request.method("POST").uri(at(usual)).header("content-type", "text/html"),
        3 => request.method("POST").uri(at(usual)).header("grpc-encoding", "snappy"),
        4 => request.method("POST").uri(at(usual)).header("grpc-timeout", "not a time"),
        _ => request.method("POST").uri(at(usual)),
    };
    let typed = request.headers_ref().is_some_and(|h| h.contains_key("content-type"));
    let request = if typed { request } else { request.header("content-type", "application/grpc") };
    request.header("te", "trailers").body(()).unwrap()
}

fn frame(out: &mut Vec<u8>, message: &[u8]) {
    out.push(0);
    out.extend_from_slice(&(message.len() as u32).to_be_bytes());
    out.extend_from_slice(message);
}

/// The message number `at` of a request that makes sense, up to the answer's end.
fn legal_message(rng: &mut Rng, at: usize, sent: &mut [Vec<u8>; 2]) -> ProcessingRequest {
    match at {
        0 => request_headers(&post(&[("x-filler", &text(rng.below(500)))]), false),
        1 => {
            let prompt = text(rng.below(BODY_BYTES_MAX - 20_000));
            let body = completion("m", &prompt);
            sent[0].extend(body.bytes());
            request_body(body, true)
        }
        2 => {
            let kind = if rng.below(2) == 0 { "application/json" } else { "text/event-stream" };
            response_headers(&[(":status", "200"), ("content-type", kind)], false)
        }
        _ => response_piece(rng, sent, at > 3),
    }
}

fn response_piece(rng: &mut Rng, sent: &mut [Vec<u8>; 2], end: bool) -> ProcessingRequest {
    let body = text(rng.below(2_000));
    sent[1].extend(body.bytes());
    response_body(body, end)
}

/// Something that a peer in its right mind would not send here, or not at all.
fn nonsense(rng: &mut Rng, out: &mut Vec<u8>, sent: &mut [Vec<u8>; 2]) {
    let end = rng.below(2) == 0;
    let message = match rng.below(12) {
        0 => request_headers(&post(&[]), end),
        1 => {
            let body = text(rng.below(BODY_BYTES_MAX));
            sent[0].extend(body.bytes());
            request_body(body, end)
        }
        2 => request_trailers(&[("a", "b")]),
        3 => response_headers(&[(":status", "nonsense"), ("content-type", "\u{0}")], end),
        4 => response_piece(rng, sent, end),
        5 => response_trailers(&[("grpc-status", "99")]),
        6 => ProcessingRequest::default(),
        7 => request_headers(&vec![("x", "y"); 1_500], end),
        8 => {
            // A length that is a lie.
            let claimed = [u32::MAX, 1 << 30, 1 << 20, MESSAGE_BYTES_MAX as u32][rng.below(4)];
            out.push(0);
            return out.extend_from_slice(&claimed.to_be_bytes());
        }
        9 => {
            // Compressed, it says.
            out.push(1 + rng.below(255) as u8);
            out.extend_from_slice(&10u32.to_be_bytes());
            return out.extend((0..10).map(|_| rng.next_u64() as u8));
        }
        10 => {
            let message: Vec<u8> = (0..rng.below(300)).map(|_| rng.next_u64() as u8).collect();
            return frame(out, &message);
        }
        _ => {
            let mut message = request_headers(&post(&[]), end).encode_to_vec();
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(message.len());
                message[at] = rng.next_u64() as u8;
            }
            return frame(out, &message);
        }
    };
    frame(out, &message.encode_to_vec());
}

/// A connection whose windows are as told.
async fn connect(address: SocketAddr, reads: bool) -> (SendRequest<Bytes>, JoinSet<()>) {
    let stream = TcpStream::connect(address).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(if reads { 1 << 20 } else { 10 });
    let (sender, connection) = builder.handshake(stream).await.unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        // A connection that the server closes is an end like others.
        let _ = connection.await;
    });
    (sender.ready().await.unwrap(), task)
}

/// Plays a script to its end. The server's answers, as far as they could be read.
async fn play(address: SocketAddr, script: &Script) -> Vec<u8> {
    let (mut sender, mut connection) = connect(address, script.reads).await;
    let Ok((answer, mut out)) = sender.send_request(script.headers.clone(), false) else {
        return Vec::new();
    };
    for piece in &script.data {
        if !push(&mut out, piece.clone()).await {
            break;
        }
    }
    match script.end {
        End::HalfClose => drop(out.send_data(Bytes::new(), true)),
        End::Reset => out.send_reset(Reason::CANCEL),
        End::Silence => {}
        End::Vanish => {
            connection.abort_all();
            return Vec::new();
        }
    }
    let told = listen(answer, script.reads).await;
    drop(out);
    told
}

/// Sends a piece when the server has room for it; whether it still takes any.
async fn push(out: &mut SendStream<Bytes>, mut piece: Bytes) -> bool {
    while !piece.is_empty() {
        out.reserve_capacity(piece.len());
        let room = tokio::time::timeout(
            Duration::from_millis(200),
            std::future::poll_fn(|cx| out.poll_capacity(cx)),
        );
        match room.await {
            Ok(Some(Ok(room))) if room > 0 => {
                let now = piece.split_to(room.min(piece.len()));
                if out.send_data(now, false).is_err() {
                    return false;
                }
            }
            Ok(Some(Ok(_))) => {}
            // The server does not read on, or has ended the stream.
            _ => return false,
        }
    }
    true
}

/// Hears the server out, to the end of the stream.
async fn listen(answer: ResponseFuture, reads: bool) -> Vec<u8> {
    let mut told = Vec::new();
    let Ok(response) = answer.await else { return told };
    let mut body = response.into_body();
    while let Some(Ok(data)) = body.data().await {
        if reads {
            let _ = body.flow_control().release_capacity(data.len());
        }
        told.extend_from_slice(&data);
    }
    let _ = body.trailers().await;
    told
}

/// What streams came to.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    routed: u32,
    refused: u32,
    answered: u32,
    silent: u32,
}

impl std::ops::Add for Tally {
    type Output = Tally;

    fn add(self, other: Tally) -> Tally {
        Tally {
            routed: self.routed + other.routed,
            refused: self.refused + other.refused,
            answered: self.answered + other.answered,
            silent: self.silent + other.silent,
        }
    }
}

/// Envoy's rules, as far as answers show: headers first, then the body's pieces in order, then
/// trailers; nothing behind an answer of the processor's own; no byte that was not sent.
fn check_rules(seed: u64, told: &[u8], script: &Script) -> Tally {
    let mut rest = told;
    let mut progress = [0, 0];
    let mut bodies = [Vec::new(), Vec::new()];
    let mut over = false;
    while let Some(([0, length @ ..], after)) = rest.split_first_chunk::<5>() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some((message, after)) = after.split_at_checked(length) else { break };
        rest = after;
        let answer = ProcessingResponse::decode(message).expect("Envoy can read it");
        assert!(!over, "seed {seed}: behind an immediate answer: {answer:?}");
        let (side, step) = match answer.response.as_ref().expect("an answer says something") {
            Response::RequestHeaders(_) => (0, 1),
            Response::ResponseHeaders(_) => (1, 1),
            Response::RequestBody(_) => (0, 2),
            Response::ResponseBody(_) => (1, 2),
            Response::RequestTrailers(_) => (0, 3),
            Response::ResponseTrailers(_) => (1, 3),
            Response::ImmediateResponse(_) => {
                over = true;
                continue;
            }
        };
        let in_order = match step {
            1 => progress[side] == 0,
            _ => matches!(progress[side], 1 | 2),
        };
        assert!(in_order, "seed {seed}: {step} behind {}: {answer:?}", progress[side]);
        progress[side] = step;
        if step == 2 {
            let (bytes, end) = piece(answer);
            assert!(bytes.len() <= 62_000);
            bodies[side].extend(bytes);
            progress[side] += 2 * i32::from(end);
        }
    }
    for (body, sent) in bodies.iter().zip(&script.sent) {
        assert!(sent.starts_with(body), "seed {seed}: bytes that nobody sent");
    }
    Tally {
        routed: u32::from(progress[0] > 0),
        refused: u32::from(over),
        answered: u32::from(progress[1] > 0),
        silent: u32::from(told.is_empty()),
    }
}

/// Streams of these seeds, side by side.
async fn round(address: SocketAddr, seeds: std::ops::Range<u64>) -> Tally {
    let mut streams = JoinSet::new();
    for seed in seeds {
        streams.spawn(async move {
            let script = Script::random(seed);
            let played = tokio::time::timeout(LONG, play(address, &script)).await;
            let Ok(told) = played else {
                panic!("seed {seed}: the stream never ends: {:?} {}", script.end, script.reads)
            };
            check_rules(seed, &told, &script)
        });
    }
    streams.join_all().await.into_iter().fold(Tally::default(), |all, one| all + one)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_streams_end_and_leave_nothing_behind() {
    let _alone = MEMORY.write().await;
    let world = hurried().await;
    let address = world.router.ext_proc_addr().unwrap();
    // The first round is the one in which tables grow that stay.
    let mut before = usize::MAX;
    for first in [0, 1_000, 2_000] {
        let seeds = first..first + STREAMS;
        println!("seeds {seeds:?}");
        let tally = round(address, seeds).await;
        world.is_at_rest().await;
        assert_eq!(metric(&world.router, "kvroute_ext_proc_streams").await, 0.0);
        assert_eq!(metric(&world.router, "kvroute_request_bodies_held_bytes").await, 0.0);
        let Tally { routed, refused, answered, silent } = tally;
        assert!(routed.min(refused).min(answered).min(silent) > 0, "not everything: {tally:?}");
        let until = tokio::time::Instant::now() + LONG;
        let most = before.saturating_add(SLACK_BYTES);
        while ALLOCATOR.allocated() > most {
            let (left, now) = (ALLOCATOR.allocated(), tokio::time::Instant::now());
            assert!(now < until, "{left} bytes are in use, {before} were a round before");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        before = ALLOCATOR.allocated();
    }
    let (mut call, answer) = world.post(&[], &completion("m", "still there")).await;
    destination(&answer);
    call.request_body(true).await;
    call.answered(200).await;
    world.is_at_rest().await;
}

/// Streams that stop wherever they are, in silence: the server ends them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_ends_at_a_deadline() {
    let _beside = MEMORY.read().await;
    let world = hurried().await;
    let address = world.router.ext_proc_addr().unwrap();
    let mut streams = JoinSet::new();
    for messages in 0..5 {
        for reads in [true, false] {
            streams.spawn(async move {
                let mut rng = Rng::seeded(messages as u64);
                let (mut bytes, mut sent) = (Vec::new(), [Vec::new(), Vec::new()]);
                for at in 0..messages {
                    frame(&mut bytes, &legal_message(&mut rng, at, &mut sent).encode_to_vec());
                }
                let data = vec![Bytes::from(bytes)];
                let mut rng = Rng::seeded(1);
                let end = End::Silence;
                let script = Script { headers: head(&mut rng), data, end, reads, sent };
                let played = tokio::time::timeout(LONG, play(address, &script)).await;
                assert!(played.is_ok(), "open after {messages} messages, reads: {reads}");
            });
        }
    }
    streams.join_all().await;
    world.is_at_rest().await;
}

/// What is no HTTP/2 at all, or only its beginning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_none() {
    let _beside = MEMORY.read().await;
    let world = hurried().await;
    let address = world.router.ext_proc_addr().unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let huge = [0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1];
    let table: [(&str, Vec<u8>); 6] = [
        ("nothing", Vec::new()),
        ("half a preface", preface[..9].to_vec()),
        ("HTTP/1.1", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()),
        ("a huge frame", [&preface[..], &settings, &huge].concat()),
        ("garbage", [&preface[..], &[0xa5; 400]].concat()),
    ];
    for (case, bytes) in table {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut rest = Vec::new();
        // A reset is an end, too.
        let closed = tokio::time::timeout(LONG, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "open: {case}");
    }
    destination(&world.post(&[], &completion("m", "still there")).await.1);
}
