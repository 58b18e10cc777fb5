//! One router after another, and what each load costs it.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use kvroute_core::config::EndpointPickerConfig;
use kvroute_core::plan::{Experimental, Plan};
use kvroute_router::{
    EventsSource, ExtProcConfig, RouterConfig, RouterHandle, ServerCertificate, Tokenizers,
};
use kvroute_wire::config::CONFIG_BYTES_MAX;
use kvroute_wire::yaml::Tree;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use crate::allocations::Allocations;
use crate::load::{Done, Job};
use crate::{Bench, Transport, process, tokenizer};

/// Before anything is measured, of each loop.
const WARMUP_S: f64 = 2.0;
/// Decisions whose time is asked for.
const DECISIONS: usize = 2_000;
/// Requests that leave later than this, 99th percentile, are no open loop.
const LATE_MS_MAX: f64 = 5.0;
/// Messages of an answer beyond its tokens: its usage, and Envoy's empty last piece.
pub const EXTRA_PIECES: u32 = 2;

/// A configuration under one kind of load.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub config: String,
    pub endpoints: usize,
    pub transport: Transport,
    pub prompt_tokens: u32,
    /// One caller, answers without bodies.
    pub alone: Loop,
    /// Many callers, answers without bodies.
    pub closed: Loop,
    /// At a rate, answers without bodies.
    pub silent: Loop,
    /// At a rate, answers streamed.
    pub open: Loop,
    /// Inside of the router, from the whole body to the decision, with the last load.
    pub inside_us: Quantiles,
    /// Cores without requests.
    pub idle_cores: f64,
    pub rss_mb: f64,
    pub errors: u64,
}

/// A load, and what it cost.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Loop {
    pub requests: f64,
    pub seconds: f64,
    pub cpu_s: f64,
    pub allocations: Allocations,
    /// From the last byte of the request sent to the first of the answer read.
    pub decided_us: Quantiles,
    pub late_ms: f64,
    /// Cores of everything that is neither the router nor the load.
    pub other_cores: f64,
}

impl Loop {
    pub fn cores(&self) -> f64 {
        self.cpu_s / self.seconds
    }

    /// How much else the machine did, and whether requests left in time because of it.
    fn disturbance(&self) -> f64 {
        self.other_cores + self.late_ms / LATE_MS_MAX
    }

    /// Its figures are not to be trusted: what is late comes in bursts, which cost less.
    pub fn is_disturbed(&self) -> bool {
        self.late_ms > LATE_MS_MAX || self.other_cores > 2.0 * process::QUIET_CORES
    }

    /// Of one request, in microseconds.
    pub fn cpu_us(&self) -> f64 {
        self.cpu_s / self.requests * 1e6
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Quantiles {
    /// Of values in order.
    fn of<T: Copy + Into<f64>>(sorted: &[T]) -> Quantiles {
        let at = |share: f64| {
            let place = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(place.saturating_sub(1)).map_or(f64::NAN, |value| (*value).into())
        };
        Quantiles { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}

/// The other process.
struct Load {
    child: Child,
    ask: ChildStdin,
    told: BufReader<ChildStdout>,
    engines: Vec<SocketAddr>,
}

impl Load {
    fn start(endpoints: u32, tokenizer: Option<&Path>) -> anyhow::Result<Load> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["load", "--endpoints", &endpoints.to_string()]);
        if let Some(file) = tokenizer {
            command.arg("--tokenizer").arg(file);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let ask = child.stdin.take().context("its input is piped")?;
        let told = BufReader::new(child.stdout.take().context("its output is piped")?);
        let mut load = Load { child, ask, told, engines: Vec::new() };
        let line = load.line()?;
        load.engines = serde_json::from_str(&line).context("the engines did not start")?;
        Ok(load)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.told.read_line(&mut line)? == 0 {
            bail!("the load's process has ended");
        }
        Ok(line)
    }

    fn run(&mut self, job: &Job) -> anyhow::Result<(Loop, Done)> {
        writeln!(self.ask, "{}", serde_json::to_string(job)?)?;
        let line = self.line()?;
        anyhow::ensure!(line == "begin\n", "the load says {line}");
        let look = |child: u32| {
            let (own, load) = (process::usage_of_this().cpu_s, process::usage(Some(child)).cpu_s);
            (own, process::machine_cpu_s() - own - load, Allocations::now())
        };
        let child = self.child.id();
        let before = look(child);
        let begin = Instant::now();
        std::thread::sleep(Duration::from_secs_f64(job.seconds));
        let after = look(child);
        let seconds = begin.elapsed().as_secs_f64();
        let done: Done = serde_json::from_str(&self.line()?)?;
        let cost = Loop {
            requests: done.requests as f64,
            seconds,
            cpu_s: after.0 - before.0,
            allocations: after.2 - before.2,
            decided_us: Quantiles::of(&done.decided_us),
            late_ms: done.late_ms,
            other_cores: (after.1 - before.1) / seconds,
        };
        Ok((cost, done))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // It may have gone by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that was asked for, each configuration in a process of its own: memory that one has
/// left behind is not the next one's.
pub fn all(args: &Bench) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (at, endpoints) in args.endpoints.iter().enumerate() {
        for transport in &args.transports {
            for config in &args.configs {
                let first = at == 0 && args.configs.first() == Some(config);
                if *transport == Transport::Tls && !first {
                    continue;
                }
                let one = Bench {
                    configs: vec![config.clone()],
                    endpoints: vec![*endpoints],
                    transports: vec![*transport],
                    ..args.clone()
                };
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("rows").arg(serde_json::to_string(&one)?);
                let done = command.stderr(Stdio::inherit()).output()?;
                anyhow::ensure!(done.status.success(), "{config} could not be measured");
                let measured: Vec<Row> = serde_json::from_slice(&done.stdout)?;
                rows.extend(measured);
            }
        }
    }
    Ok(rows)
}

/// The rows of one configuration.
pub fn one(args: &Bench) -> anyhow::Result<Vec<Row>> {
    let ([config], [endpoints], [transport]) =
        (&args.configs[..], &args.endpoints[..], &args.transports[..])
    else {
        bail!("rows are of one configuration");
    };
    let mut load = Load::start(*endpoints, args.tokenizer.as_deref())?;
    let router = Router::start(args, config, *transport, &load.engines)?;
    router.measure(args, config, *transport, &mut load)
}

/// Folder of the presets that ship with the program.
const PRESETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/presets");

fn plan(preset: &str) -> anyhow::Result<(Plan, String)> {
    let file = format!("{PRESETS}/{preset}.yaml");
    let text = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    let tree = Tree::parse(&text, &file, CONFIG_BYTES_MAX).map_err(|error| anyhow!("{error}"))?;
    let config: EndpointPickerConfig = tree.read().map_err(|error| anyhow!("{error}"))?;
    let plan = Plan::build(&config, Experimental::Allowed);
    Ok((plan.map_err(|error| anyhow!("{file}: {}", error.message))?, text))
}

/// A router on a runtime of its own.
struct Router {
    handle: RouterHandle,
    runtime: Runtime,
}

impl Router {
    fn start(
        args: &Bench,
        preset: &str,
        transport: Transport,
        engines: &[SocketAddr],
    ) -> anyhow::Result<Router> {
        let (plan, text) = plan(preset)?;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoints = engines.iter().map(|engine| format!("http://{engine}").parse());
        let default = Some(tokenizer(args.tokenizer.as_deref())?);
        let mut ext_proc = ExtProcConfig::plain(any);
        if transport == Transport::Tls {
            ext_proc.tls.certificate = ServerCertificate::SelfSigned;
        }
        let config = RouterConfig {
            plan,
            config: text,
            seed: 0,
            http: None,
            ext_proc: Some(ext_proc),
            admin: Some(any),
            metrics: None,
            endpoints: endpoints.collect::<Result<_, _>>()?,
            endpoints_file: None,
            endpoints_missing: None,
            // The engines here tell none.
            events: EventsSource::Off.into(),
            tokenizers: Tokenizers { default, ..Tokenizers::default() },
            default_model: None,
            tls: None,
            record: None,
            upstream_metric_names: None,
        };
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        if args.threads > 0 {
            builder.worker_threads(args.threads);
        }
        let runtime = builder.enable_all().build()?;
        let handle = runtime.block_on(kvroute_router::start(config))?;
        Ok(Router { handle, runtime })
    }

    fn measure(
        &self,
        args: &Bench,
        config: &str,
        transport: Transport,
        load: &mut Load,
    ) -> anyhow::Result<Vec<Row>> {
        let address = self.handle.ext_proc_addr().context("it serves ext_proc")?;
        let mut rows = Vec::new();
        let endpoints = load.engines.len();
        self.runtime.block_on(process::quiet(Duration::from_secs(args.wait_seconds)));
        let (before, begin) = (process::usage_of_this().cpu_s, Instant::now());
        std::thread::sleep(Duration::from_secs_f64(args.idle_seconds));
        let idle_cores = (process::usage_of_this().cpu_s - before) / begin.elapsed().as_secs_f64();
        for &prompt_tokens in &args.prompt_tokens {
            let job = Job {
                address,
                tls: transport == Transport::Tls,
                prompt_tokens,
                shared_tokens: prompt_tokens * 5 / 6,
                answer_tokens: 0,
                token_gap_ms: args.token_gap_ms,
                rate: None,
                callers: 1,
                warmup_s: WARMUP_S,
                seconds: args.seconds / 2.0,
            };
            let seconds = args.seconds;
            let many = Job { callers: args.callers, seconds, ..job.clone() };
            let silent = Job { rate: Some(args.rate), seconds, ..job.clone() };
            let (answer_tokens, gap_s) = (args.answer_tokens, args.token_gap_ms as f64 / 1e3);
            let warmup_s = WARMUP_S + gap_s * f64::from(answer_tokens + EXTRA_PIECES);
            let open = Job { answer_tokens, warmup_s, ..silent.clone() };
            let mut errors = 0;
            let mut run = |job: &Job| self.quietest(args, load, job, &mut errors);
            eprintln!("{config}, {endpoints} engines, {prompt_tokens} tokens, {transport:?}");
            let (alone, closed) = (run(&job)?, run(&many)?);
            let (silent, open) = (run(&silent)?, run(&open)?);
            let rss_mb = process::usage_of_this().rss_mb;
            let inside_us = self.runtime.block_on(self.inside())?;
            rows.push(Row {
                config: config.to_owned(),
                endpoints,
                transport,
                prompt_tokens,
                alone,
                closed,
                silent,
                open,
                inside_us,
                idle_cores,
                rss_mb,
                errors,
            });
        }
        Ok(rows)
    }

    /// A load, tried again while something else disturbs it.
    fn quietest(
        &self,
        args: &Bench,
        load: &mut Load,
        job: &Job,
        errors: &mut u64,
    ) -> anyhow::Result<Loop> {
        let mut best: Option<Loop> = None;
        for _ in 0..args.attempts.max(1) {
            let (cost, done) = load.run(job)?;
            for (what, count) in &done.errors {
                eprintln!("{count} times {what}");
            }
            *errors += done.errors.values().sum::<u64>();
            let is_quiet = !cost.is_disturbed();
            if best.as_ref().is_none_or(|best| cost.disturbance() < best.disturbance()) {
                best = Some(cost);
            }
            if is_quiet {
                break;
            }
            let patience = Duration::from_secs(args.wait_seconds);
            self.runtime.block_on(process::quiet(patience));
        }
        best.context("it was tried at least once")
    }

    /// How long the last decisions took, by the router's own account.
    async fn inside(&self) -> anyhow::Result<Quantiles> {
        let mut stream = TcpStream::connect(self.handle.admin_addr()).await?;
        let ask = format!(
            "GET /decisions?last={DECISIONS} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(ask.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n").context("no answer")?;
        let entries: Vec<Value> = serde_json::from_slice(&answer[head + 4..])?;
        let mut took: Vec<f64> =
            entries.iter().filter_map(|entry| Some(entry["took_s"].as_f64()? * 1e6)).collect();
        took.sort_by(f64::total_cmp);
        Ok(Quantiles::of(&took))
    }
}
