//! Engines and Envoy, in a process of their own: what they cost is not the router's.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::Args;
use h2::RecvStream;
use h2::client::SendRequest;
use http::Request;
use kvroute_core::Rng;
use kvroute_wire::ext_proc::METHOD;
use kvroute_wire::grpc::MessageReader;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time::Instant;

use crate::envoy::{self, Told};
use crate::prompts::{Ask, Prompts};
use crate::{engines, tls, tokenizer};

/// Connections, as of an Envoy with two workers.
const CONNECTIONS: usize = 2;
/// The windows are never what is waited for.
const WINDOW_BYTES: u32 = 1 << 30;
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// A request that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// More requests at once: the router cannot keep up.
const IN_FLIGHT_MAX: usize = 5_000;

/// Settings of the process.
#[derive(Args)]
pub struct LoadArgs {
    #[arg(long)]
    pub endpoints: u32,
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

/// A load, sent as a line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    pub address: SocketAddr,
    pub tls: bool,
    pub prompt_tokens: u32,
    /// Of them, those that prompts share with others.
    pub shared_tokens: u32,
    /// 0: the answer has no body.
    pub answer_tokens: u32,
    pub token_gap_ms: u64,
    /// Requests per second at times of their own.
    pub rate: Option<f64>,
    /// Without a rate: so many callers, each with its next request when the last is answered.
    pub callers: u32,
    pub warmup_s: f64,
    pub seconds: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// Begun (with a rate) or ended (without) while it was measured.
    pub requests: u64,
    pub seconds: f64,
    /// From the last byte of the request sent to the first of the answer read, sorted.
    pub decided_us: Vec<u32>,
    /// How late requests left, 99th percentile.
    pub late_ms: f64,
    pub errors: BTreeMap<String, u64>,
}

/// Runs until standard input ends: each line a [`Job`]. Prints the engines' addresses, and for
/// each job `begin` when it is warm and a [`Done`] when the time is over.
pub fn main(args: &LoadArgs) -> anyhow::Result<()> {
    let tokenizer = tokenizer(args.tokenizer.as_deref())?;
    let (addresses, told) = std::sync::mpsc::channel();
    let (count, of_engines) = (args.endpoints, tokenizer.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            // The other side has gone when it cannot be told.
            let _ = addresses.send(engines::start(count, of_engines).await);
            std::future::pending::<()>().await;
        });
    });
    println!("{}", serde_json::to_string(&told.recv()??)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while let Some(line) = lines.next_line().await? {
            let job: Job = serde_json::from_str(&line)?;
            let prompts = Prompts::new(&tokenizer, job.prompt_tokens, job.shared_tokens)?;
            let done = run(Rc::new(job), prompts).await?;
            println!("{}", serde_json::to_string(&done)?);
        }
        Ok(())
    })
}

/// What the exchanges of a job share.
struct Run {
    job: Rc<Job>,
    connections: Vec<SendRequest<Bytes>>,
    answer: Vec<Bytes>,
    prompts: RefCell<Prompts>,
    counts: RefCell<Done>,
    late_ms: RefCell<Vec<f64>>,
    measuring: Cell<bool>,
    stopping: Cell<bool>,
    sent: Cell<usize>,
    in_flight: Cell<usize>,
}

async fn run(job: Rc<Job>, prompts: Prompts) -> anyhow::Result<Done> {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(connect(&job).await?);
    }
    let answer = match job.answer_tokens {
        0 => Vec::new(),
        tokens => envoy::answer(tokens, job.prompt_tokens),
    };
    let run = Rc::new(Run {
        connections,
        answer,
        prompts: RefCell::new(prompts),
        counts: RefCell::default(),
        late_ms: RefCell::default(),
        measuring: Cell::new(false),
        stopping: Cell::new(false),
        sent: Cell::new(0),
        in_flight: Cell::new(0),
        job: Rc::clone(&job),
    });
    let senders = match job.rate {
        Some(rate) => vec![tokio::task::spawn_local(at_rate(Rc::clone(&run), rate))],
        None => (0..job.callers)
            .map(|_| tokio::task::spawn_local(one_by_one(Rc::clone(&run))))
            .collect(),
    };
    tokio::time::sleep(Duration::from_secs_f64(job.warmup_s)).await;
    println!("begin");
    let begin = Instant::now();
    run.measuring.set(true);
    tokio::time::sleep(Duration::from_secs_f64(job.seconds)).await;
    run.measuring.set(false);
    let mut done = run.counts.take();
    done.seconds = begin.elapsed().as_secs_f64();
    done.decided_us.sort_unstable();
    let mut late = run.late_ms.take();
    late.sort_by(f64::total_cmp);
    done.late_ms = late.get(late.len() * 99 / 100).copied().unwrap_or(0.0);
    if job.rate.is_some() {
        senders.iter().for_each(tokio::task::JoinHandle::abort);
    }
    run.stopping.set(true);
    // The next load begins when this one is gone.
    let until = Instant::now() + PATIENCE;
    while run.in_flight.get() > 0 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(done)
}

/// Poisson arrivals.
async fn at_rate(run: Rc<Run>, rate: f64) {
    let mut rng = Rng::seeded(7);
    let mut due = Instant::now();
    loop {
        due += Duration::from_secs_f64(-(1.0 - rng.next_f64()).ln() / rate);
        tokio::time::sleep_until(due).await;
        if run.measuring.get() {
            run.late_ms.borrow_mut().push(due.elapsed().as_secs_f64() * 1e3);
            run.counts.borrow_mut().requests += 1;
        }
        if run.in_flight.get() >= IN_FLIGHT_MAX {
            count_error(&run, "too many at once");
            continue;
        }
        tokio::task::spawn_local(one(Rc::clone(&run)));
    }
}

async fn one_by_one(run: Rc<Run>) {
    while !run.stopping.get() {
        one(Rc::clone(&run)).await;
        if run.measuring.get() {
            run.counts.borrow_mut().requests += 1;
        }
    }
}

fn count_error(run: &Run, what: &str) {
    *run.counts.borrow_mut().errors.entry(what.to_owned()).or_insert(0) += 1;
}

async fn one(run: Rc<Run>) {
    let ask = run.prompts.borrow_mut().next();
    run.in_flight.set(run.in_flight.get() + 1);
    let exchanged = tokio::time::timeout(PATIENCE, exchange(&run, ask)).await;
    run.in_flight.set(run.in_flight.get() - 1);
    match exchanged {
        Ok(Ok(())) => {}
        Ok(Err(error)) => count_error(&run, &format!("{error:#}")),
        Err(_) => count_error(&run, "no end"),
    }
}

/// A request and its answer, as Envoy does it.
async fn exchange(run: &Run, ask: Ask) -> anyhow::Result<()> {
    let number = run.sent.replace(run.sent.get() + 1);
    let connection = run.connections[number % CONNECTIONS].clone();
    let mut connection = connection.ready().await?;
    let call = Request::post(format!("http://router{METHOD}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "10000m")
        .body(())?;
    let (response, mut out) = connection.send_request(call, false)?;
    let id = format!("4f6f0f3c-93b4-4ab0-8d2c-{number:012x}");
    out.send_data(envoy::request_headers(ask.path, ask.body.len(), &id), false)?;
    for piece in envoy::request_body(ask.body.as_bytes()) {
        out.send_data(piece, false)?;
    }
    let asked = Instant::now();
    let body = response.await?.into_body();
    let mut answers = Answers { body, reader: MessageReader::new(MESSAGE_BYTES_MAX, false) };
    let told = answers.next().await?;
    ensure!(told == Told::Headers, "refused");
    if run.measuring.get() {
        let took = u32::try_from(asked.elapsed().as_micros()).unwrap_or(u32::MAX);
        run.counts.borrow_mut().decided_us.push(took);
    }
    ensure!(answers.body_bytes().await? == ask.body.len(), "another body came back");
    out.send_data(envoy::response_headers(true, run.answer.is_empty()), false)?;
    let gap = Duration::from_millis(run.job.token_gap_ms);
    let mut due = Instant::now();
    for piece in &run.answer {
        if !gap.is_zero() {
            due += gap;
            tokio::time::sleep_until(due).await;
        }
        out.send_data(piece.clone(), false)?;
    }
    ensure!(answers.next().await? == Told::Headers, "the answer's headers are refused");
    if !run.answer.is_empty() {
        ensure!(answers.body_bytes().await? > 0, "the answer's body is lost");
    }
    Ok(())
}

/// What the router says on one stream.
struct Answers {
    body: RecvStream,
    reader: MessageReader,
}

impl Answers {
    async fn next(&mut self) -> anyhow::Result<Told> {
        loop {
            if let Some(message) = self.reader.read()? {
                return Ok(envoy::read(&message));
            }
            let Some(piece) = self.body.data().await else { bail!("the stream ended early") };
            let piece = piece?;
            self.body.flow_control().release_capacity(piece.len())?;
            self.reader.push(piece);
        }
    }

    /// Bytes of a body that comes to its end.
    async fn body_bytes(&mut self) -> anyhow::Result<usize> {
        let mut sum = 0;
        loop {
            match self.next().await? {
                Told::Piece { bytes, end } => {
                    sum += bytes;
                    if end {
                        return Ok(sum);
                    }
                }
                other => bail!("{other:?} inside of a body"),
            }
        }
    }
}

async fn connect(job: &Job) -> anyhow::Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(job.address).await?;
    stream.set_nodelay(true)?;
    match job.tls {
        true => handshake(tls::connect(stream).await?).await,
        false => handshake(stream).await,
    }
}

async fn handshake<S>(stream: S) -> anyhow::Result<SendRequest<Bytes>>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (send, connection) = h2::client::Builder::new()
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .initial_max_send_streams(IN_FLIGHT_MAX)
        .handshake(stream)
        .await
        .context("HTTP/2")?;
    tokio::task::spawn_local(async move {
        // What breaks it breaks the exchanges, too, which tell.
        let _ = connection.await;
    });
    Ok(send)
}
