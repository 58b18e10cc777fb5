//! What can be typed: commands and flags, nothing of what they do.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::{bench, check, demo, engine, epp, explain, fit, replay, schema, serve, sim};

const EXAMPLES: &str = "\
Examples:
  kvroute demo
      8 simulated engines, round robin beside precise routing, in one minute
  kvroute serve --endpoint http://gpu1:8000 --endpoint http://gpu2:8000 --tokenizer tokenizer.json
      route to two vLLM servers by what their caches hold
  kvroute replay recordings/run-1 --tokenizer tokenizer.json
      would the predictions have been right?

Exit codes: 0 done, 1 failed or found wrong, 2 wrong usage or configuration.";

/// Routes each LLM request to the endpoint that already holds its KV cache.
#[derive(Debug, Parser)]
#[command(name = "kvroute", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// What to log: error, warn, info, debug, trace, or per module (`kvroute_router=debug`).
    #[arg(long, global = true, value_name = "FILTER", env = "KVROUTE_LOG")]
    #[arg(value_parser = log_filter, help_heading = "Logging", hide_env = true)]
    log: Option<String>,

    /// How a log line looks.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    #[arg(help_heading = "Logging")]
    log_format: LogFormat,

    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// The arguments of `kvroute engine`, if that is the command.
    pub fn engine(self) -> Option<Engine> {
        match self.command {
            Command::Engine(args) => Some(*args),
            _ => None,
        }
    }
}

#[cfg(test)]
impl Cli {
    /// The arguments of `kvroute bench` on this command line.
    pub(crate) fn bench_of<const N: usize>(line: [&str; N]) -> Option<Bench> {
        match Cli::try_parse_from(line).ok()?.command {
            Command::Bench(args) => Some(*args),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The router: an HTTP proxy in front of model servers.
    Serve(Box<Serve>),
    /// The router behind Envoy: llm-d's Endpoint Picker, over ext_proc, with llm-d's flags.
    #[command(disable_help_flag = true)]
    Epp(Epp),
    /// Does a configuration load, what does it do, and are the engines as it expects them?
    Check(Box<Check>),
    /// Where does a request go, and why? Asks a running router, or decides on a snapshot of one.
    Explain(Box<Explain>),
    /// The JSON Schema of configurations, for editors.
    #[command(after_help = "\
Example:
  kvroute schema >kvroute.schema.json
and as the first line of a configuration:
  # yaml-language-server: $schema=kvroute.schema.json")]
    Schema,
    /// Simulated engines, the router and a load, beside round robin.
    Demo(Demo),
    /// A simulated vLLM server.
    Engine(Box<Engine>),
    /// What would a configuration do? A scenario in virtual time, decided by the router's code.
    Sim(Sim),
    /// Sends a scenario to any OpenAI-compatible server and measures.
    Bench(Box<Bench>),
    /// Checks predictions against a recording of a real engine.
    Replay(Replay),
    /// Fits a hardware profile to times measured on an engine.
    Fit(Fit),
    /// Prints a shell's completion script.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Which engines, and how their prompts and events are read: the same for `serve` and `check`.
#[derive(Clone, Debug, Default, Args)]
pub struct Engines {
    /// An engine's base URL; a host name stands for all its addresses. Repeat for more.
    #[arg(long = "endpoint", value_name = "URL")]
    pub endpoints: Vec<String>,

    /// Endpoints from a file (llm-d's file-discovery format); `serve` reads it again when it
    /// changes.
    #[arg(long, value_name = "FILE")]
    pub endpoints_file: Option<PathBuf>,

    /// `tokenizer.json` of the engines' model, its configuration beside it; `MODEL=FILE` for one
    /// model of several. Without it prompts are estimated and routing is approximate.
    #[arg(long = "tokenizer", value_name = "[MODEL=]FILE")]
    pub tokenizers: Vec<String>,

    /// Model that requests without a `model` field mean.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// First KV event port of every engine (rank N: port + N), whatever the configuration says.
    #[arg(long, value_name = "PORT")]
    pub kv_events_port: Option<u16>,

    /// First replay port of every engine, with `--kv-events-port`.
    #[arg(long, value_name = "PORT", requires = "kv_events_port")]
    pub kv_replay_port: Option<u16>,
}

/// `kvroute serve`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  kvroute serve --endpoint http://gpu1:8000 --endpoint http://gpu2:8000 --tokenizer tokenizer.json
  kvroute serve --config precise.yaml --endpoints-file endpoints.yaml --http 0.0.0.0:8080
  kvroute serve --endpoint http://gpu1:8000 --ext-proc 127.0.0.1:9002
  kvroute serve --endpoint http://gpu1:8000      # no tokenizer, no events: learns from history

An endpoint may name its event sockets:  URL,events=tcp://HOST:PORT,replay=tcp://HOST:PORT
Without them the configuration's kvEventsConfig holds, or the engine is asked
(GET /kv_event_sources), and one that cannot tell is expected to publish at port 5557 + rank.")]
pub struct Serve {
    /// The engines.
    #[command(flatten)]
    pub engines: Engines,

    /// An EndpointPickerConfig; without it kvroute's own policy.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// A built-in configuration instead, such as `llm-d`; `kvroute sim --list` names them.
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub preset: Option<String>,

    /// Accept plugin types of stability Alpha.
    #[arg(long)]
    pub allow_experimental_plugins: bool,

    /// Where clients connect.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = address)]
    pub http: SocketAddr,

    /// Where Envoy, or another data plane, asks over ext_proc, in plain text; `kvroute epp` is the
    /// same with llm-d's flags, ports and TLS.
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub ext_proc: Option<SocketAddr>,

    /// Metrics, health, decisions, index. Reachable by whoever can reach the address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9090", value_parser = address)]
    pub admin: SocketAddr,

    /// Certificate chain (PEM) to serve TLS with; it and its key are read again when they change.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Its private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Publish llm-d's metrics (`llm_d_epp_*`) beside kvroute's own, for dashboards made for it.
    #[arg(long)]
    pub upstream_metric_names: bool,

    /// Seed of tie-breaks.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Record all that decides to a new file, to be replayed later. It holds hashes of prompts'
    /// blocks, which can be guessed where blocks are small: keep it as you keep prompts.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
}

/// `kvroute epp`. Its flags are llm-d's, and so is their syntax: `crate::epp` reads them.
#[derive(Clone, Debug, Args)]
pub struct Epp {
    /// llm-d's flags; --help lists them.
    #[arg(value_name = "FLAGS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

/// `kvroute check`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Exit code 0: the files load, their tests hold (and with --live nothing is wrong), 1: a test fails or
an engine is not as it should be, 2: a file or a flag is wrong. docs/check.md lists every finding
and its cure, docs/config-tests.md says how tests are written.

Examples:
  kvroute check precise.yaml
  helm template ... | yq .data.config | kvroute check -
  kvroute check precise.yaml --live --endpoint http://gpu1:8000 --tokenizer tokenizer.json
  kvroute check --live --endpoint http://gpu1:8000     # against the built-in configuration")]
pub struct Check {
    /// EndpointPickerConfig files; `-` reads standard input.
    #[arg(value_name = "FILE", required_unless_present = "live")]
    pub files: Vec<PathBuf>,

    /// Ask the engines, too. Sends each a few tiny requests.
    #[arg(long)]
    pub live: bool,

    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,

    /// Accept plugin types of stability Alpha.
    #[arg(long)]
    pub allow_experimental_plugins: bool,

    /// The engines.
    #[command(flatten)]
    pub engines: Engines,
}

/// `kvroute explain`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Nothing is sent to an engine and nothing changes: the decision is made on a copy. docs/explain.md
says what each line means.

Examples:
  kvroute explain request.json --admin http://127.0.0.1:9090
  kvroute explain request.json --header 'x-session-id: 7' --path /v1/chat/completions
  kvroute explain --decision 5f0c... --admin http://127.0.0.1:9090
  kvroute explain --save-snapshot fleet.json
  kvroute explain request.json --snapshot fleet.json --tokenizer tokenizer.json")]
pub struct Explain {
    /// The body that a client would post; `-` reads it from standard input.
    #[arg(value_name = "REQUEST.json", conflicts_with_all = ["decision", "save_snapshot"])]
    #[arg(required_unless_present_any = ["decision", "save_snapshot"])]
    pub request: Option<PathBuf>,

    /// The router's admin address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9090")]
    pub admin: String,

    /// Decide by this snapshot instead of asking a router.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["decision", "save_snapshot"])]
    pub snapshot: Option<PathBuf>,

    /// Decide by this configuration instead of the one in the snapshot.
    #[arg(long, value_name = "FILE", requires = "snapshot")]
    pub config: Option<PathBuf>,

    /// With --snapshot: `tokenizer.json` of the model; `MODEL=FILE` for one model of several.
    #[arg(long = "tokenizer", value_name = "[MODEL=]FILE", requires = "snapshot")]
    pub tokenizers: Vec<String>,

    /// The path that the client would post to; without it what the body looks like.
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,

    /// A header of the client; repeat for more.
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<String>,

    /// Seed of the decision's random choices, hexadecimal as decisions show it; without it that of
    /// the router's next decision.
    #[arg(long, value_name = "HEX")]
    pub seed: Option<String>,

    /// Show the decision about a real request, by its x-request-id; `last`: the newest one.
    #[arg(long, value_name = "ID", conflicts_with = "save_snapshot")]
    pub decision: Option<String>,

    /// Write a snapshot of the router's fleet: names, load, cached blocks; no text of prompts.
    #[arg(long, value_name = "FILE")]
    pub save_snapshot: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `kvroute engine`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  kvroute engine --http 127.0.0.1:8000 --kv-events tcp://*:5557 --replay tcp://*:5558
  kvroute engine --http 127.0.0.1:8000 --kv-events-connect tcp://127.0.0.1:5557")]
pub struct Engine {
    /// Where clients connect.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000", value_parser = address)]
    pub http: SocketAddr,

    /// Served model name.
    #[arg(long, value_name = "NAME", default_value = "demo")]
    pub model: String,

    /// LoRA adapters it offers.
    #[arg(long = "adapter", value_name = "NAME")]
    pub adapters: Vec<String>,

    /// `tokenizer.json`; without it a small built-in one.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,

    /// Tokens per KV block.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub block_size: u32,

    /// KV blocks of the cache.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub kv_blocks: u32,

    /// Publish KV events there.
    #[arg(long, value_name = "tcp://ADDR")]
    pub kv_events: Option<String>,

    /// Connect to a router's `zmqEndpoint` and publish KV events there, too.
    #[arg(long, value_name = "tcp://IP:PORT")]
    pub kv_events_connect: Option<String>,

    /// Topic of the events, which names the engine to such a router; kv@ADDR@NAME when left out,
    /// of --http and --model.
    #[arg(long, value_name = "TOPIC")]
    pub kv_events_topic: Option<String>,

    /// Answer replay requests there.
    #[arg(long, value_name = "tcp://ADDR", requires = "kv_events")]
    pub replay: Option<String>,

    /// How blocks are named, as vLLM's flag of the same name: sha256_cbor or xxhash_cbor.
    #[arg(long, value_name = "NAME", default_value = "sha256_cbor")]
    pub prefix_caching_hash_algo: String,

    /// What names of blocks start from: vLLM's PYTHONHASHSEED.
    #[arg(long, value_name = "TEXT", default_value = "vllm-none-hash")]
    pub hash_seed: String,

    /// A template in the place of the tokenizer's own.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,

    /// Hardware profile: how long a step takes.
    #[arg(long, value_name = "NAME", default_value = "qwen3-32b-tp2-h100")]
    pub profile: String,

    /// Run this many times faster than the profile says.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub speed: f64,

    /// Longest prompt plus answer, in tokens.
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    pub max_model_len: u32,

    /// Seed of the generated tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// `kvroute demo`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  kvroute demo
  kvroute demo --quick --json | tail -1")]
pub struct Demo {
    /// Seed of the workload and of tie-breaks.
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub seed: u64,

    /// A third of the load, for a first look or a smoke test.
    #[arg(long)]
    pub quick: bool,

    /// Leave engines and router running afterwards, to look at them and to explain decisions.
    #[arg(long)]
    pub keep: bool,

    /// Write summary.json, report.md and report.html into this folder.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Print the summary as one JSON object on the last line.
    #[arg(long)]
    pub json: bool,

    /// A third run, with this Envoy (version 1.40) in front and kvroute behind its `ext_proc`
    /// protocol; `scripts/fetch-envoy.sh` gets one.
    #[arg(long, value_name = "FILE")]
    pub envoy: Option<PathBuf>,
}

/// `kvroute bench`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Open loop: requests leave when the scenario says, whether or not answers come. A run whose requests
left late is invalid, and so is the exit code (1).

Examples:
  kvroute bench --url http://gateway:8080 --scenario b2b-saas-steady --out results
  kvroute bench --url old=http://a:8080 --url new=http://b:8080 --scenario mine.yaml \\
      --tokenizer Qwen3-32B/tokenizer.json --engine http://gpu1:8000 --engine http://gpu2:8000")]
pub struct Bench {
    /// Where to send, one run after the other; `NAME=URL` names the run.
    #[arg(long = "url", value_name = "[NAME=]URL", required = true)]
    pub urls: Vec<String>,

    /// Built-in scenario, or a file.
    #[arg(long, value_name = "NAME|FILE")]
    pub scenario: String,

    /// Model to ask for; without it the first that the server names.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// Which API.
    #[arg(long, value_enum, default_value_t = BenchApi::Completions)]
    pub api: BenchApi,

    /// `tokenizer.json` of the model, so that prompts have the scenario's number of tokens; without
    /// it a small built-in one.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,

    /// Send words, or the token ids of words (completions only).
    #[arg(long, value_enum, default_value_t = BenchPrompt::Text)]
    pub prompt: BenchPrompt,

    /// Run the scenario's clock this many times faster: rates times X, durations by X.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub speed: f64,

    /// An engine whose /metrics tells queue and KV usage; repeat for all.
    #[arg(long = "engine", value_name = "URL")]
    pub engines: Vec<String>,

    /// Seconds after which a request without a complete answer has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout_s: u32,

    /// Environment variable that holds the API key.
    #[arg(long, value_name = "ENV")]
    pub api_key: Option<String>,

    /// Decides prompts, order and arrivals.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Write summary.json, report.md and report.html into this folder.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Print the summary as one JSON object on the last line.
    #[arg(long)]
    pub json: bool,
}

/// Which API `kvroute bench` uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchApi {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// How `kvroute bench` sends prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchPrompt {
    /// Words.
    Text,
    /// Token ids.
    Ids,
}

/// `kvroute replay`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
The folder holds requests.jsonl and any number of kv_events*.jsonl, one for each engine.
Exit code 1 when a prediction or a token differs.

Example:
  kvroute replay recordings/run-1 --tokenizer Qwen3-32B/tokenizer.json")]
pub struct Replay {
    /// Folder of the recording.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Also render and tokenize each prompt with this `tokenizer.json` and compare the ids.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,

    /// Print one JSON object on the last line.
    #[arg(long)]
    pub json: bool,
}

/// `kvroute sim`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  kvroute sim                                    the published benchmark, five configurations
  kvroute sim --scenario b2b-saas --seeds 8 --out report
  kvroute sim --scenario mine.yaml --config today.yaml tomorrow.yaml
  kvroute sim --scenario overload-150 --config precise kvroute oracle
  kvroute sim --recording run.jsonl --config tomorrow.yaml

docs/scenarios.md describes scenario files, docs/benchmark.md what the published one shows.")]
pub struct Sim {
    /// A built-in scenario or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "b2b-saas")]
    pub scenario: String,

    /// EndpointPickerConfig files or presets to compare, named by their files; without it the
    /// published ones and kvroute's own.
    #[arg(long, value_name = "NAME|FILE", num_args = 1..)]
    pub config: Vec<String>,

    /// Accept plugin types of stability Alpha.
    #[arg(long)]
    pub allow_experimental_plugins: bool,

    /// First seed: decides prompts, arrivals and ties.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// How many seeds; figures are means over them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub seeds: u32,

    /// Write summary.json, report.md and report.html into this folder.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Print summary.json.
    #[arg(long)]
    pub json: bool,

    /// Runs at once; without it one per core.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Write every decision of a single run, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub decisions: Option<PathBuf>,

    /// Replay what `serve --record` wrote; with --config ask what that one would have decided.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scenario", "seed", "seeds", "out"])]
    pub recording: Option<PathBuf>,

    /// Repeat one run of the fault simulation.
    #[arg(long, value_name = "N", conflicts_with_all = ["scenario", "config", "out"])]
    pub fault_seed: Option<u64>,

    /// With --fault-seed: steps with faults.
    #[arg(long, value_name = "N", requires = "fault_seed")]
    pub fault_steps: Option<u32>,

    /// Print the built-in scenarios and configurations.
    #[arg(long)]
    pub list: bool,
}

/// `kvroute fit`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
TABLE is CSV or TSV with a header: concurrency, prompt_tokens, cached_tokens, output_tokens,
shared_tokens (of all sequences), ttft_s (used at concurrency 1), tpot_s. docs/profiles.md says
which rows tell which constant. The profile goes to standard output, the rest to standard error.

Examples:
  kvroute fit measured.csv --name my-gpu > my-gpu.json
  kvroute fit measured.tsv --like qwen3-32b-tp2-h100 --clients independent")]
pub struct Fit {
    /// Measurements, one a line.
    #[arg(value_name = "TABLE")]
    pub table: PathBuf,

    /// Name of the profile; without it that of the file.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// The engine's `--max-num-batched-tokens`.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub batched_tokens: u32,

    /// Profile (name or file) that gives what the table cannot tell, in proportion.
    #[arg(long, value_name = "PROFILE")]
    pub like: Option<String>,

    /// How the sequences of a row ran beside each other.
    #[arg(long, value_enum, default_value_t = FitClients::Together)]
    pub clients: FitClients,
}

/// How the sequences of one row ran beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FitClients {
    /// Nobody's prefill fell into another's answer: started at once, or prompts cached.
    Together,
    /// A closed loop out of step: each answer saw the prefill of every other client.
    Independent,
}

/// An address to listen on.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    let named = text.replace("localhost:", "127.0.0.1:");
    named.parse().map_err(|_| "write IP:PORT, for example 127.0.0.1:8080 or [::]:8080".to_owned())
}

/// Levels, or modules with levels; what cannot be meant is refused. Nothing is as if not given:
/// that is how a variable of the environment is taken back.
fn log_filter(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    if text.is_empty() {
        return Ok(String::new());
    }
    let is_level = |part: &str| LEVELS.contains(&part.trim().to_ascii_lowercase().as_str());
    let known = text.split(',').all(|part| match part.rsplit_once('=') {
        Some((_, level)) => is_level(level),
        None => is_level(part),
    });
    match (known, tracing_subscriber::EnvFilter::try_new(text)) {
        (true, Ok(_)) => Ok(text.to_owned()),
        _ => Err(format!("write a level ({}) or MODULE=LEVEL", LEVELS.join(", "))),
    }
}

/// Parses the command line, runs the command and says what went wrong.
pub fn main() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let foreign = args.split_off(behind_epp(&args));
    let mut cli = Cli::parse_from(args);
    if let Command::Epp(epp) = &mut cli.command {
        epp.args = foreign;
    }
    let log = cli.log.as_deref().filter(|log| !log.is_empty());
    let json = matches!(cli.log_format, LogFormat::Json);
    match cli.command {
        // It has flags of its own about logging.
        Command::Epp(_) => {}
        Command::Serve(_) | Command::Engine(_) => init_logging(log.unwrap_or("info"), json),
        _ => init_logging(log.unwrap_or("error"), json),
    }
    let done = match cli.command {
        Command::Epp(args) => epp::main(&args, log),
        Command::Serve(args) => serve::main(&args),
        Command::Check(args) => check::main(&args),
        Command::Explain(args) => explain::main(&args),
        Command::Schema => schema::main(),
        Command::Demo(args) => demo::main(&args),
        Command::Engine(args) => engine::main(&args),
        Command::Sim(args) => sim::main(&args),
        Command::Bench(args) => bench::main(&args),
        Command::Replay(args) => replay::main(&args),
        Command::Fit(args) => fit::main(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "kvroute", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        tell(&format!("kvroute: {error:#}"));
        ExitCode::from(2)
    })
}

/// Where the arguments begin that llm-d's flags are read from: behind `epp`, if that is the
/// command, else at the end.
fn behind_epp(args: &[OsString]) -> usize {
    let mut at = 1;
    while let Some(arg) = args.get(at).and_then(|arg| arg.to_str()) {
        match arg {
            "epp" => return at + 1,
            "--log" | "--log-format" => at += 2,
            _ if arg.len() > 2 && arg.starts_with("--") => at += 1,
            _ => break,
        }
    }
    args.len()
}

/// A line for the person at the terminal, outside of the log.
pub fn tell(line: &str) {
    let _nobody_reads = writeln!(std::io::stderr(), "{line}");
}

/// A line of the command's result. Who closes the pipe early (`| head`) has seen enough.
pub fn say(line: &str) {
    let _enough = writeln!(std::io::stdout(), "{line}");
}

/// From here on the log goes to standard error: what the filter lets through, as JSON objects or as
/// text. Call it once.
pub(crate) fn init_logging(filter: &str, json: bool) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(|| Unheard(std::io::stderr()))
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if json { builder.json().init() } else { builder.init() }
}

/// Standard error that may be closed: a line that nobody can read is no reason to stop.
struct Unheard(std::io::Stderr);

impl Write for Unheard {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let _nobody_reads = self.0.write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_behind_epp_is_not_ours() {
        let table: [(&[&str], usize); 12] = [
            (&["kvroute", "epp"], 2),
            (&["kvroute", "epp", "--log=debug"], 2),
            (&["kvroute", "epp", "--", "--version"], 2),
            (&["kvroute", "--log", "debug", "epp", "-v=4"], 4),
            (&["kvroute", "--log-format", "json", "--log=debug", "epp", "epp"], 5),
            (&["kvroute"], 1),
            (&["kvroute", "help", "epp"], 3),
            (&["kvroute", "serve", "epp"], 3),
            (&["kvroute", "--log", "epp"], 3),
            (&["kvroute", "--log", "epp", "epp", "x"], 4),
            (&["kvroute", "--", "epp", "-x"], 4),
            (&[], 0),
        ];
        for (args, ours) in table {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            assert_eq!(behind_epp(&args), ours, "{args:?}");
        }
    }

    #[test]
    fn an_empty_filter_is_none() {
        assert_eq!(log_filter(""), Ok(String::new()));
        assert!(log_filter("debug,").is_err());
    }
}
