//! Streams of one connection whose frames are written by hand: several at once, in one piece, as a
//! proxy does under load. What some clients do must not end what others wait for.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::*;
use crate::envoy::*;
use crate::support::{LONG, metric};
use crate::world::*;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

const CANCEL: u32 = 8;

/// Names of the headers of a call; the values are put in without compression.
const HEAD: [(&str, &str); 6] = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
    (":authority", "epp"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
];

/// A connection to the server. It panics when the server ends it.
struct Frames {
    stream: TcpStream,
    /// Written and not sent.
    out: Vec<u8>,
    /// Of each stream, the bytes of messages that have not been looked at.
    told: BTreeMap<u32, Vec<u8>>,
    next_id: u32,
}

impl Frames {
    async fn connect(address: SocketAddr) -> Frames {
        let stream = TcpStream::connect(address).await.unwrap();
        let out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let mut frames = Frames { stream, out, told: BTreeMap::new(), next_id: 1 };
        frames.frame(SETTINGS, 0, 0, &[]);
        // Room for all that is said to the connection.
        frames.frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes());
        frames
    }

    fn frame(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) {
        self.out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
        self.out.extend_from_slice(&[kind, flags]);
        self.out.extend_from_slice(&id.to_be_bytes());
        self.out.extend_from_slice(payload);
    }

    /// Begins a call with this message.
    fn open(&mut self, message: &ProcessingRequest) -> u32 {
        let id = self.next_id;
        self.next_id += 2;
        let mut head = Vec::new();
        for (name, value) in HEAD {
            // A literal that is not indexed (RFC 7541, 6.2.2).
            head.push(0);
            for text in [name, value] {
                head.push(text.len() as u8);
                head.extend_from_slice(text.as_bytes());
            }
        }
        self.frame(HEADERS, END_HEADERS, id, &head);
        self.message(id, message);
        id
    }

    fn message(&mut self, id: u32, message: &ProcessingRequest) {
        let mut framed = Vec::new();
        super::frame(&mut framed, &message.encode_to_vec());
        self.frame(DATA, 0, id, &framed);
    }

    fn reset(&mut self, id: u32) {
        self.frame(RST_STREAM, 0, id, &CANCEL.to_be_bytes());
    }

    /// Sends everything in one piece.
    async fn flush(&mut self) {
        let out = std::mem::take(&mut self.out);
        let sent = tokio::time::timeout(LONG, self.stream.write_all(&out)).await;
        sent.expect("the server reads").expect("the connection is up");
    }

    /// The next message on a stream.
    async fn next(&mut self, id: u32) -> ProcessingResponse {
        self.flush().await;
        loop {
            let told = self.told.entry(id).or_default();
            if let Some(([0, length @ ..], rest)) = told.split_first_chunk::<5>()
                && let Some(message) = rest.get(..u32::from_be_bytes(*length) as usize)
            {
                let answer = ProcessingResponse::decode(message).unwrap();
                told.drain(..5 + message.len());
                return answer;
            }
            tokio::time::timeout(LONG, self.read(id)).await.expect("an answer in time");
        }
    }

    /// Reads one frame of any stream; the end of `awaited` fails the test.
    async fn read(&mut self, awaited: u32) {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.expect("the connection stays");
        let [l0, l1, l2, kind, flags, id @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
        self.stream.read_exact(&mut payload).await.expect("the connection stays");
        let id = u32::from_be_bytes(id);
        match kind {
            DATA => self.told.entry(id).or_default().extend(payload),
            SETTINGS if flags & ACK == 0 => self.frame(SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => self.frame(PING, ACK, 0, &payload),
            GOAWAY => panic!("the server ends the connection: {payload:?}"),
            RST_STREAM if id == awaited => panic!("stream {id} is reset: {payload:?}"),
            HEADERS if id == awaited && flags & END_STREAM != 0 => panic!("stream {id} is over"),
            _ => {}
        }
        self.flush().await;
    }

    /// A request that is routed, up to the answer to its head.
    async fn routed(&mut self) -> u32 {
        let id = self.open(&request_headers(&post(&[]), false));
        self.message(id, &request_body(completion("m", "stays"), true));
        destination(&self.next(id).await);
        let (_, end) = piece(self.next(id).await);
        assert!(end);
        id
    }

    /// The rest of it.
    async fn answered(&mut self, id: u32) {
        self.message(id, &response_headers(&[(":status", "200")], false));
        set_headers(&self.next(id).await);
        self.message(id, &response_body("{}", true));
        assert_eq!(self.next(id).await, returned("{}", true));
        self.reset(id);
        self.flush().await;
    }
}

/// Clients that leave in numbers, before anybody could look at their requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bursts_of_cancelled_requests_leave_others_alone() {
    let _beside = super::MEMORY.read().await;
    let world = usual().await;
    let mut proxy = Frames::connect(world.router.ext_proc_addr().unwrap()).await;
    for _ in 0..5 {
        let victim = proxy.routed().await;
        for _ in 0..10 {
            for _ in 0..100 {
                let id = proxy.open(&request_headers(&post(&[]), false));
                proxy.reset(id);
            }
            proxy.flush().await;
        }
        proxy.answered(victim).await;
    }
    world.is_at_rest().await;
}

/// Requests that are refused while their bodies are on the way: the pieces come for streams that
/// are over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_bodies_of_refused_requests_leave_others_alone() {
    let _beside = super::MEMORY.read().await;
    let mut setup = Setup::default();
    setup.settings.inflight_requests_max = 1;
    let world = setup.start().await;
    let mut proxy = Frames::connect(world.router.ext_proc_addr().unwrap()).await;
    let victim = proxy.routed().await;
    for _ in 0..20 {
        let refused = [(); 100].map(|()| proxy.open(&request_headers(&post(&[]), false)));
        for id in refused {
            assert_eq!(refusal(proxy.next(id).await).status, 429);
        }
        for id in refused {
            proxy.message(id, &request_body("late", true));
        }
        proxy.flush().await;
    }
    proxy.answered(victim).await;
    world.is_at_rest().await;
    let rejects = metric(&world.router, "kvroute_rejects_total{reason=\"inflight_limit\"}").await;
    assert_eq!(rejects, 2_000.0);
}
