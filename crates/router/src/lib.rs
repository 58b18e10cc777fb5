//! Sockets and tasks around the brain: two doors for requests (the proxy that clients talk to, and
//! Envoy's ext_proc protocol for proxies that ask where a request goes), the connections to
//! endpoints, KV event subscribers, scraping, discovery, and the admin address.
//!
//! A client's request: `proxy` -> `route` -> `tokenize` -> core's brain -> `forward` -> `observe`.
//! One that Envoy asks about: `grpc` -> `extproc`, which shares the way from `tokenize` to the
//! brain and leaves forwarding to Envoy; the answer comes by `extproc` and `observe` again.
//! Knowledge: `scrape` and `events` feed the brain, `discover` the fleet.
//! Everything shares one `shared::Shared`; nothing is global, so several routers can run in one
//! process.

mod accept;
mod admin;
pub mod ask;
mod clock;
mod config;
mod decisions;
mod discover;
mod error;
mod events;
pub mod explain;
mod extproc;
mod forward;
mod grpc;
mod headers;
mod health;
mod http1;
mod metrics;
mod observe;
mod patient;
mod proxy;
mod recorder;
#[doc(hidden)]
pub mod rehearse;
mod reuse;
mod rewrite;
mod route;
mod scrape;
mod shared;
mod tls;
mod tokenize;
mod upstream;
mod zmtp;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use kvroute_core::brain::Brain;
use parking_lot::{Mutex, MutexGuard};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tracing::info;

use accept::Door;
use admin::monitor::Monitor;
pub use config::{
    BoundSocket, CipherSuite, EndpointFlag, EndpointFlagError, EventsConfig, EventsSource,
    ExtProcConfig, MetricsListener, Record, RouterConfig, ServerCertificate, ServerTls, TlsFiles,
    TlsNameError, TlsVersion, Tokenizers, UpstreamNames,
};
use discover::{Discovery, FileSource, NameSource, Source};
use grpc::Methods;
use metrics::upstream::UpstreamMetrics;
use shared::{Phase, Shared};

/// How often expired knowledge is swept out.
const TICK: Duration = Duration::from_millis(100);
/// How often idle connections are looked through.
const REAP: Duration = Duration::from_secs(1);

/// Stands for a listener that there is not.
const NO_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Why a router could not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address} for {what}: {error}; choose another address")]
    Listen {
        /// Who was to connect there.
        what: Listens,
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// The socket that engines are to connect to cannot be had.
    #[error(
        "cannot listen for engines at zmqEndpoint {address}: {error}; it must be a free port of \
         this host, such as tcp://*:5557"
    )]
    Bound {
        /// The address.
        address: String,
        /// What the system says.
        error: io::Error,
    },
    /// The file of endpoints cannot be read, or is not what it should be.
    #[error("the file of endpoints cannot be used: {0}")]
    Endpoints(String),
    /// Something that sources of metrics need cannot be used.
    #[error("dataLayer: {0}")]
    Collect(String),
    /// The certificate or key cannot be used.
    #[error("cannot serve TLS: {0}")]
    Tls(String),
    /// The recording's file cannot be created.
    #[error("cannot record to {file}: {error}; name a new file in a folder that exists")]
    Record {
        /// The file.
        file: String,
        /// What the system says.
        error: io::Error,
    },
}

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listens {
    /// The embedded proxy.
    Clients,
    /// Proxies that ask over ext_proc.
    ExtProc,
    /// gRPC health without TLS.
    Health,
    /// Metrics and health for monitors.
    Metrics,
    /// The admin page.
    Admin,
}

impl fmt::Display for Listens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Listens::Clients => "clients",
            Listens::ExtProc => "ext_proc",
            Listens::Health => "gRPC health",
            Listens::Metrics => "metrics",
            Listens::Admin => "administration",
        })
    }
}

/// A running router. Dropping it stops everything at once; [`RouterHandle::shutdown`] drains.
pub struct RouterHandle {
    shared: Arc<Shared>,
    http_addr: Option<SocketAddr>,
    ext_proc_addr: Option<SocketAddr>,
    health_addr: Option<SocketAddr>,
    admin_addr: Option<SocketAddr>,
    metrics_addr: Option<SocketAddr>,
    events_addr: Option<SocketAddr>,
    drains_in_full: bool,
    /// Where requests come in; they are drained.
    doors: Vec<JoinHandle<()>>,
    tasks: Vec<JoinHandle<()>>,
}

/// Starts a router and returns when it listens and knows the endpoints that its sources list.
///
/// # Errors
/// [`StartError`] when an address cannot be bound, or TLS files or the file of endpoints cannot be
/// read, be they named here or in the plan's `dataLayer`. Host names that cannot be resolved do not
/// prevent a start: they are tried again. So is a file of endpoints that turns bad later; its
/// endpoints stay as they were.
pub async fn start(mut config: RouterConfig) -> Result<RouterHandle, StartError> {
    let collect = &config.plan.collect;
    let collector = Arc::new(scrape::Collector::new(collect).map_err(StartError::Collect)?);
    let server_tls = ServerTls::from_files(config.tls.clone());
    let acceptor = tls::Acceptor::new(&server_tls, tls::ALPN_HTTP)?;
    let ext_proc = config.ext_proc.clone();
    let grpc_tls = ext_proc.as_ref().map(|ext_proc| ext_proc.tls.clone()).unwrap_or_default();
    let grpc_acceptor = tls::Acceptor::new(&grpc_tls, tls::ALPN_GRPC)?;
    let sources = sources(&config).await?;
    let http = listen_if(Listens::Clients, config.http).await?;
    let address = ext_proc.as_ref().map(|ext_proc| ext_proc.address);
    let grpc = listen_if(Listens::ExtProc, address).await?;
    let address = ext_proc.as_ref().and_then(|ext_proc| ext_proc.health);
    let health = listen_if(Listens::Health, address).await?;
    let admin = listen_if(Listens::Admin, config.admin).await?;
    let admin_addr = address_of(&admin);
    let (monitor, metrics_addr) = Monitor::bind(config.metrics.take()).await?.unzip();
    let engines = listen_for_engines(&mut config).await?;
    let events_addr = engines.as_ref().and_then(|listener| listener.local_addr().ok());
    let (scraper, added) = mpsc::unbounded_channel();
    let (phase, phase_seen) = watch::channel(Phase::Serving);
    let shared = Arc::new(share(config, phase, scraper)?);

    let mut tasks = vec![tokio::spawn(scrape::run(Arc::clone(&shared), collector, added))];
    let mut discovery = Discovery::new(Arc::clone(&shared), sources);
    discovery.refresh().await;
    tasks.push(tokio::spawn(discovery.run()));
    if let Some(engines) = engines {
        tasks.push(tokio::spawn(events::bound::serve(Arc::clone(&shared), engines)));
    }
    tasks.push(tokio::spawn(tick(Arc::clone(&shared))));
    tasks.push(tokio::spawn(events::Pulse::run(Arc::clone(&shared))));
    tasks.extend(acceptor.watch(&shared.metrics));
    tasks.extend(grpc_acceptor.watch(&shared.metrics));
    tasks.extend(serve_people(&shared, admin, monitor));
    let options = Arc::new(extproc::Options::new(ext_proc.as_ref(), shared.brain.lock().plan()));
    let methods = |ext_proc| Door::Grpc(Methods { ext_proc });
    let [http_addr, ext_proc_addr, health_addr] = [&http, &grpc, &health].map(address_of);
    let doors = [
        (http, acceptor, Door::Proxy),
        (grpc, grpc_acceptor, methods(Some(options))),
        (health, tls::Acceptor::Plain, methods(None)),
    ];
    let open = |(listener, acceptor, door): (Option<(TcpListener, SocketAddr)>, _, _)| {
        let (listener, _) = listener?;
        let (shared, phase) = (Arc::clone(&shared), phase_seen.clone());
        Some(tokio::spawn(accept::serve(shared, listener, acceptor, door, phase)))
    };
    let doors: Vec<JoinHandle<()>> = doors.into_iter().filter_map(open).collect();
    info!(
        http = http_addr.map(tracing::field::display),
        ext_proc = ext_proc_addr.map(tracing::field::display),
        health = health_addr.map(tracing::field::display),
        metrics = metrics_addr.map(tracing::field::display),
        admin = admin_addr.map(tracing::field::display),
        "The router listens."
    );
    Ok(RouterHandle {
        shared,
        http_addr,
        ext_proc_addr,
        health_addr,
        admin_addr,
        metrics_addr,
        events_addr,
        drains_in_full: ext_proc.is_some_and(|ext_proc| ext_proc.drains_in_full),
        doors,
        tasks,
    })
}

/// What is told to people and monitors.
fn serve_people(
    shared: &Arc<Shared>,
    admin: Option<(TcpListener, SocketAddr)>,
    monitor: Option<Monitor>,
) -> Vec<JoinHandle<()>> {
    let mut tasks = Vec::new();
    if let Some((admin, _)) = admin {
        tasks.push(tokio::spawn(admin::serve(Arc::clone(shared), admin)));
    }
    if let Some(monitor) = monitor {
        tasks.extend(monitor.acceptor().watch(&shared.metrics));
        tasks.push(tokio::spawn(monitor.serve(Arc::clone(shared))));
    }
    tasks
}

/// Where endpoints are listed; a file is read here for the first time.
async fn sources(config: &RouterConfig) -> Result<Vec<Source>, StartError> {
    let mut sources =
        vec![Source::Names(NameSource::new(config.endpoints.clone(), config.events.clone()))];
    let planned = config.plan.collect.discovery.as_ref().filter(|_| config.endpoints.is_empty());
    let file = match (&config.endpoints_file, planned) {
        (Some(file), _) => Some(FileSource::new(file.clone(), config.events.clone())),
        (None, Some(plan)) => Some(FileSource::planned(plan, config.events.clone())),
        (None, None) => None,
    };
    if let Some(mut file) = file {
        file.load().await.map_err(StartError::Endpoints)?;
        sources.push(Source::File(file));
    }
    Ok(sources)
}

fn address_of(listener: &Option<(TcpListener, SocketAddr)>) -> Option<SocketAddr> {
    listener.as_ref().map(|(_, address)| *address)
}

fn share(
    config: RouterConfig,
    phase: watch::Sender<Phase>,
    scraper: mpsc::UnboundedSender<Arc<upstream::Upstream>>,
) -> Result<Shared, StartError> {
    let settings = config.plan.settings.clone();
    let mut metrics = metrics::Metrics::new(settings.label_values_max);
    let names = config.upstream_metric_names.as_ref();
    let upstream = names.map(|names| UpstreamMetrics::new(names, &config.plan));
    metrics.upstream = upstream.map(Arc::new);
    let topics_max = settings.label_values_max;
    let bound = config.events.bound.as_ref().filter(|_| config.plan.reads_events());
    let bound = bound.map(|socket| events::bound::Bound::new(socket, topics_max));
    let recorder = record(&config, &metrics)?;
    let room = match settings.tokenize_concurrency_max {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n as usize,
    };
    let clock = clock::Clock::start();
    let rewriter = rewrite::Rewriter::new(&settings.model_rewrites, config.seed);
    let mut brain = Brain::new(config.plan, config.seed);
    brain.set_recorder(recorder.as_ref().map(recorder::Recorder::hook));
    Ok(Shared {
        clock,
        wants_events: brain.plan().reads_events(),
        tokens: brain.plan().tokens,
        holds: brain.plan().burst().is_some(),
        primary_port: brain.plan().primary_port(),
        estimate: brain.plan().estimate.clone(),
        parsers: kvroute_wire::parsers::Parsers::new(&brain.plan().parsers),
        scheduling_headers: brain.plan().headers.clone(),
        brain: Mutex::new(brain),
        recorder,
        upstreams: upstream::Upstreams::default(),
        pulse: events::Pulse::default(),
        bound,
        metrics,
        decisions: decisions::Decisions::new(settings.decisions_bytes_max),
        config: config.config,
        tokenizers: config.tokenizers,
        default_model: config.default_model,
        rewriter,
        memory: tokenize::Memory::new(),
        tokenize_room: Arc::new(Semaphore::new(room)),
        tokenize_ns_per_kib: AtomicU64::new(tokenize::NS_PER_KIB_AT_START),
        complaints: shared::Complaints::new(settings.label_values_max),
        discovery_errors: Mutex::default(),
        phase,
        sources_read: watch::Sender::new(false),
        inflight: AtomicU32::new(0),
        grpc_connections: AtomicU32::new(0),
        tells_scores: config.ext_proc.is_some_and(|ext_proc| ext_proc.emit_scores),
        endpoints_missing: config.endpoints_missing,
        scraper,
        settings,
    })
}

fn record(
    config: &RouterConfig,
    metrics: &metrics::Metrics,
) -> Result<Option<recorder::Recorder>, StartError> {
    let Some(record) = &config.record else { return Ok(None) };
    let limits = recorder::RecorderLimits {
        file_bytes_max: config.plan.settings.recording_bytes_max,
        queue_bytes_max: config.plan.settings.recording_queue_bytes_max,
    };
    let started = recorder::Recorder::start(record, &config.config, config.seed, limits, metrics);
    let file = || record.file.display().to_string();
    started.map(Some).map_err(|error| StartError::Record { file: file(), error })
}

async fn listen_if(
    what: Listens,
    address: Option<SocketAddr>,
) -> Result<Option<(TcpListener, SocketAddr)>, StartError> {
    match address {
        Some(address) => listen(what, address).await.map(Some),
        None => Ok(None),
    }
}

async fn listen(
    what: Listens,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error| StartError::Listen { what, address, error };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// The socket of the plan's `zmqEndpoint`. Its port is noted where the system picked it.
async fn listen_for_engines(config: &mut RouterConfig) -> Result<Option<TcpListener>, StartError> {
    let wanted = config.plan.reads_events();
    let Some(socket) = config.events.bound.as_mut().filter(|_| wanted) else { return Ok(None) };
    let address = format!("tcp://{}:{}", socket.host, socket.port);
    let listener = events::bound::listen(socket).await;
    let listener = listener.map_err(|error| StartError::Bound { address, error })?;
    socket.port = listener.local_addr().map_or(socket.port, |address| address.port());
    info!(host = socket.host, port = socket.port, "Engines may connect and tell their KV events.");
    Ok(Some(listener))
}

/// Lets time pass in the brain and in the connection pools.
async fn tick(shared: Arc<Shared>) {
    let mut reaped = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(TICK).await;
        let orders = shared.brain.lock().tick(shared.clock.now());
        for (id, order) in orders {
            if let Some(upstream) = shared.upstreams.get(id) {
                upstream.order(order);
            }
        }
        if reaped.elapsed() >= REAP {
            reaped = tokio::time::Instant::now();
            shared.upstreams.all().iter().for_each(|u| u.reap());
        }
    }
}

impl RouterHandle {
    /// Where clients connect; port 0 of no address if there is no embedded proxy.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr.unwrap_or(NO_ADDRESS)
    }

    /// Where Envoy connects, if it may.
    pub fn ext_proc_addr(&self) -> Option<SocketAddr> {
        self.ext_proc_addr
    }

    /// Where gRPC health is asked for without TLS.
    pub fn health_addr(&self) -> Option<SocketAddr> {
        self.health_addr
    }

    /// Where metrics, health, decisions and the index are served; port 0 of no address if they are
    /// not.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin_addr.unwrap_or(NO_ADDRESS)
    }

    /// Where monitors find metrics and health, if that is an address of its own.
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics_addr
    }

    /// Where engines connect to tell their KV events, if the plan says so.
    pub fn events_addr(&self) -> Option<SocketAddr> {
        self.events_addr
    }

    /// The brain, locked: requests wait while it is held, so look and let go. Never hold it over
    /// an await.
    pub fn brain(&self) -> MutexGuard<'_, Brain> {
        self.shared.brain.lock()
    }

    /// Stops: not ready at once, no new connections of clients, requests in flight have `drain` to
    /// finish before they are broken off. Over ext_proc new requests are answered as long, or until
    /// no proxy is connected where that is enough; then those in flight have `drain` once more. A
    /// recording is complete afterwards. Returns whether all of them finished.
    pub async fn shutdown(mut self, drain: Duration) -> bool {
        self.shared.phase.send_replace(Phase::Draining);
        info!(inflight = self.inflight(), "Draining.");
        let doors = std::mem::take(&mut self.doors);
        let aborts: Vec<_> = doors.iter().map(JoinHandle::abort_handle).collect();
        let mut all = futures_util::future::join_all(doors);
        let mut finished = false;
        if self.ext_proc_addr.is_some() {
            match self.drains_in_full {
                true => tokio::time::sleep(drain).await,
                // Either way it is over.
                false => drop(tokio::time::timeout(drain, self.no_grpc_connection()).await),
            }
            self.shared.phase.send_replace(Phase::Closing);
        }
        finished |= tokio::time::timeout(drain, &mut all).await.is_ok();
        if !finished {
            info!(inflight = self.inflight(), "The drain timeout is over; breaking off the rest.");
            self.shared.phase.send_replace(Phase::Stopped);
            // Connections end at their next turn; what they hold is given back then.
            let _ = tokio::time::timeout(Duration::from_secs(1), &mut all).await;
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
        let shared = Arc::clone(&self.shared);
        let written = tokio::task::spawn_blocking(move || {
            shared.recorder.iter().for_each(recorder::Recorder::finish);
        });
        // It fails only when the runtime is going down.
        let _ = written.await;
        finished
    }

    async fn no_grpc_connection(&self) {
        while self.shared.grpc_connections.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(TICK).await;
        }
    }

    /// Requests under way.
    pub fn inflight(&self) -> u32 {
        self.shared.inflight.load(Ordering::Acquire)
    }
}

impl Drop for RouterHandle {
    fn drop(&mut self) {
        self.shared.phase.send_replace(Phase::Stopped);
        self.shared.recorder.iter().for_each(recorder::Recorder::close);
        self.tasks.iter().chain(&self.doors).for_each(JoinHandle::abort);
    }
}
