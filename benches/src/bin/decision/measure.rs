//! One case at a time, and its parts.

use std::time::Instant;

use anyhow::{anyhow, ensure};
use bytes::Bytes;
use kvroute_core::decision::{DecisionRecord, ResponseEvent};
use kvroute_router::rehearse::{Decided, Read, Rehearsal};
use kvroute_router::{EventsSource, RouterConfig, Tokenizers};
use kvroute_tokens::Tokenizer;
use tokio::runtime::Runtime;

use crate::allocations::Allocations;
use crate::fleet::Fleet;
use crate::prompts::{Case, Prompts};
use crate::{Cli, Policy};

/// Every so many decisions time passes and metrics are fresh.
const SCRAPE_EVERY: usize = 16;

pub const HEAD: &str = "\
| plan, endpoints, request | whole p50 us | p99 us | max us | body to chains p50 us | decide and \
note p50 us | p99 us | brain alone p50 us | p99 us | allocations (bytes): whole | body to chains | \
decide and note | brain alone |
|---|---|---|---|---|---|---|---|---|---|---|---|---|";

/// What one part took, of each request.
#[derive(Default)]
struct Part {
    ns: Vec<u64>,
    allocations: Allocations,
}

impl Part {
    /// Runs it once; counted once warm.
    fn time<R>(&mut self, is_warm: bool, run: impl FnOnce() -> R) -> R {
        let (before, started) = (Allocations::now(), Instant::now());
        let result = run();
        let took = started.elapsed();
        let allocated = Allocations::now() - before;
        if is_warm {
            self.ns.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
            self.allocations.count += allocated.count;
            self.allocations.bytes += allocated.bytes;
        }
        result
    }

    /// In microseconds.
    fn quantile(&mut self, share: f64) -> f64 {
        self.ns.sort_unstable();
        let at = (share * self.ns.len() as f64).ceil() as usize;
        self.ns.get(at.saturating_sub(1)).map_or(f64::NAN, |ns| *ns as f64 / 1e3)
    }

    fn allocated(&self) -> String {
        let n = (self.ns.len() as f64).max(1.0);
        let Allocations { count, bytes } = self.allocations;
        format!("{:.1} ({:.0})", count as f64 / n, bytes as f64 / n)
    }
}

/// The stage of one case.
struct Stage {
    rehearsal: Rehearsal,
    fleet: Fleet,
    runtime: Runtime,
    /// Of the brain's last decision.
    memory: DecisionRecord,
}

impl Stage {
    fn between(&self, round: usize) {
        let now = self.rehearsal.now();
        // Streams without gaps ask for nothing.
        let _ = self.rehearsal.brain().tick(now);
        if round.is_multiple_of(SCRAPE_EVERY) {
            self.fleet.scrape(&self.rehearsal);
        }
    }

    fn read(&self, body: &Bytes) -> anyhow::Result<Read> {
        self.runtime.block_on(self.rehearsal.read(body)).map_err(|why| anyhow!(why))
    }

    fn brain(&mut self, read: &Read, part: &mut Part, is_warm: bool) -> anyhow::Result<()> {
        let now = self.rehearsal.now();
        let mut brain = self.rehearsal.brain();
        let memory = std::mem::take(&mut self.memory);
        let decided = part.time(is_warm, || self.rehearsal.ask(&mut brain, read, memory));
        let decision = decided.map_err(|reject| anyhow!("{reject}"))?;
        brain.on_response(now, decision.ticket, ResponseEvent::FirstChunk);
        brain.on_response(now, decision.ticket, ResponseEvent::End { status: 200 });
        self.memory = decision.record;
        Ok(())
    }
}

/// Measures one case, as a row of the table.
pub fn row(
    args: &Cli,
    policy: Policy,
    endpoints: u32,
    case: Case,
    tokenizer: &Tokenizer,
) -> anyhow::Result<String> {
    let mut prompts = Prompts::new(tokenizer, case)?;
    let rehearsal = Rehearsal::new(config(args, policy, tokenizer))?;
    let fleet = Fleet::enter(&rehearsal, endpoints, args, case, &mut prompts, tokenizer)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let memory = DecisionRecord::default();
    let mut stage = Stage { rehearsal, fleet, runtime, memory };
    let parts = if args.brain_only {
        brain_only(args, &mut stage, &mut prompts)?
    } else {
        all(args, &mut stage, &mut prompts)?
    };
    let [mut whole, mut read, mut choose, mut brain] = parts;
    Ok(format!(
        "| {}, {endpoints}, {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | \
         {} | {} | {} | {} |",
        policy.name(),
        case.name(),
        whole.quantile(0.5),
        whole.quantile(0.99),
        whole.quantile(1.0),
        read.quantile(0.5),
        choose.quantile(0.5),
        choose.quantile(0.99),
        brain.quantile(0.5),
        brain.quantile(0.99),
        whole.allocated(),
        read.allocated(),
        choose.allocated(),
        brain.allocated(),
    ))
}

/// In turn: a request in one go, one in its parts, and one that asks the brain alone. Each has a
/// body of its own, so that none is helped by another.
fn all(args: &Cli, stage: &mut Stage, prompts: &mut Prompts) -> anyhow::Result<[Part; 4]> {
    let [mut whole, mut read, mut choose, mut brain] = [(); 4].map(|()| Part::default());
    for round in 0..args.warmup + args.rounds {
        let is_warm = round >= args.warmup;
        stage.between(round);
        let [one, two, three] = [(); 3].map(|()| prompts.next());
        let decide = || stage.runtime.block_on(stage.rehearsal.decide(&one));
        answer(whole.time(is_warm, decide))?;
        let asked = read.time(is_warm, || stage.read(&two))?;
        answer(choose.time(is_warm, || stage.rehearsal.choose(&asked)))?;
        let asked = stage.read(&three)?;
        stage.brain(&asked, &mut brain, is_warm)?;
    }
    Ok([whole, read, choose, brain])
}

fn brain_only(args: &Cli, stage: &mut Stage, prompts: &mut Prompts) -> anyhow::Result<[Part; 4]> {
    let mut brain = Part::default();
    let asked = (0..64).map(|_| stage.read(&prompts.next())).collect::<Result<Vec<_>, _>>()?;
    for round in 0..args.warmup + args.rounds {
        stage.between(round);
        stage.brain(&asked[round % asked.len()], &mut brain, round >= args.warmup)?;
    }
    Ok([Part::default(), Part::default(), Part::default(), brain])
}

fn answer(decided: Result<Decided, String>) -> anyhow::Result<()> {
    let decided = decided.map_err(|why| anyhow!(why))?;
    ensure!(decided.endpoint().is_some(), "a decision names an endpoint");
    decided.answer();
    Ok(())
}

fn config(args: &Cli, policy: Policy, tokenizer: &Tokenizer) -> RouterConfig {
    let mut plan = policy.plan();
    plan.settings.decisions_bytes_max = args.decisions_mib << 20;
    let default = Some(tokenizer.clone());
    RouterConfig {
        plan,
        config: String::new(),
        seed: 1,
        http: None,
        ext_proc: None,
        admin: None,
        metrics: None,
        endpoints: Vec::new(),
        endpoints_file: None,
        endpoints_missing: None,
        events: EventsSource::Off.into(),
        tokenizers: Tokenizers { default, ..Tokenizers::default() },
        default_model: None,
        tls: None,
        record: None,
        upstream_metric_names: None,
    }
}
