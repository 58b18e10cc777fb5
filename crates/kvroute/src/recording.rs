//! Does the core decide again what the live router decided, and where would requests have gone
//! under another configuration? Feeds a recording of `kvroute serve --record` to a new brain.
//!
//! Under its own configuration, every decision must come out byte for byte. Under another one, the
//! recorded inputs stay as they were: engines hold what the recorded decisions put there, and
//! answer when they did. So it tells what the other configuration would have done with each
//! request in that moment, not what the fleet would have become; that is for a simulation.

mod reader;
mod rerun;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use kvroute_core::Time;
use kvroute_core::journal::{EndReason, Header};
use kvroute_core::plan::{Experimental, Plan};
use serde::Serialize;
use serde_json::Value;

use crate::cli::say;
use crate::config;
use reader::{Line, Reader};
use rerun::{Rerun, Verdict};

/// What came of a replay; `--json` prints it on one line.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was replayed.
    pub recording: Facts,
    /// Under the recording's own configuration.
    pub same: Option<Same>,
    /// Under another one.
    pub other: Option<Other>,
}

/// What a recording says about itself.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Version of the product that recorded it.
    pub version: String,
    /// Seed of its brain.
    pub seed: u64,
    /// From the router's start to the last call.
    pub duration_s: f64,
    /// Entries, the first and the last left out.
    pub entries: u64,
    /// Why nothing follows; `None`: the router was stopped before it could say.
    pub end: Option<EndReason>,
}

/// Whether the decisions are the same.
#[derive(Debug, Default, Serialize)]
pub struct Same {
    /// Requests, refused ones included.
    pub decisions: u64,
    /// Those whose decision came out byte for byte.
    pub equal: u64,
    /// The first that did not.
    pub first_difference: Option<Difference>,
}

/// A decision that came out differently.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// Line of the recording.
    pub line: u64,
    /// What was decided, with the whole record.
    pub then: Value,
    /// What is decided now.
    pub now: Value,
}

/// What another configuration does with the same inputs.
#[derive(Debug, Default, Serialize)]
pub struct Other {
    /// Requests, refused ones included.
    pub decisions: u64,
    /// Those that go to another endpoint, or are refused on one side only.
    pub elsewhere: u64,
    /// Refused in the recording.
    pub refused_then: u64,
    /// Refused now.
    pub refused_now: u64,
    /// Tokens of the prompts that were routed in the recording.
    pub prompt_tokens_then: u64,
    /// Tokens of the prompts that are routed now.
    pub prompt_tokens_now: u64,
    /// Hits that the recorded decisions predicted.
    pub predicted_tokens_then: u64,
    /// Hits that these decisions predict, from the same caches.
    pub predicted_tokens_now: u64,
    /// Requests by endpoint.
    pub endpoints: BTreeMap<String, ThenNow>,
}

/// A count on both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ThenNow {
    /// In the recording.
    pub then: u64,
    /// Under the other configuration.
    pub now: u64,
}

/// Replays the recording at `path`, under the configuration at `config` if there is one. Exit code
/// 1 when a decision differs under the recording's own configuration.
///
/// # Errors
/// A file cannot be read, or is not what it should be: exit code 2.
pub fn main(path: &Path, config: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let other =
        config.map(|config| config::load(Some(config), Experimental::Allowed)).transpose()?;
    let name = path.display();
    let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
    let report =
        replay(BufReader::with_capacity(1 << 20, file), other).with_context(|| name.to_string())?;
    print(&report);
    if json {
        say(&serde_json::to_string(&report)?);
    }
    let equal = report.same.as_ref().is_none_or(|same| same.equal == same.decisions);
    Ok(if equal { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Replays a recording, under another plan if there is one.
///
/// # Errors
/// The recording cannot be read, is damaged, or is of another format.
pub fn replay(input: impl BufRead, other: Option<Plan>) -> anyhow::Result<Report> {
    let mut reader = Reader::new(input)?;
    let header = reader.header().clone();
    let is_other = other.is_some();
    let plan = match other {
        Some(plan) => plan,
        None => recorded_plan(&header)?,
    };
    let mut rerun = Rerun::new(plan, header.seed);
    let (mut same, mut others) = (Same::default(), Other::default());
    while let Some(line) = reader.next()? {
        let at = reader.line_number();
        let damaged = || format!("line {at} does not belong there: the recording is damaged");
        match line {
            Line::Call(call) => rerun.call(*call).with_context(damaged)?,
            Line::Added(then) => rerun.added(then).with_context(damaged)?,
            Line::Decided(then) => {
                let verdict = rerun.decided(then).with_context(damaged)?;
                match is_other {
                    true => others.count(&verdict),
                    false => same.compare(&verdict, at, reader.line())?,
                }
            }
        }
    }
    let recording = Facts {
        version: header.version,
        seed: header.seed,
        duration_s: rerun.now().since(Time::ZERO).as_secs_f64(),
        entries: reader.entries(),
        end: reader.end().map(|end| end.reason),
    };
    let (same, other) = if is_other { (None, Some(others)) } else { (Some(same), None) };
    Ok(Report { recording, same, other })
}

fn recorded_plan(header: &Header) -> anyhow::Result<Plan> {
    match header.config.as_str() {
        "" => config::load(None, Experimental::Allowed),
        text => config::load_text(text, "the recording's configuration", Experimental::Allowed),
    }
}

impl Same {
    fn compare(&mut self, verdict: &Verdict, line: u64, then: &[u8]) -> anyhow::Result<()> {
        let now = verdict.to_line()?;
        self.decisions += 1;
        if now == then {
            self.equal += 1;
        } else if self.first_difference.is_none() {
            let read =
                |text: &[u8]| serde_json::from_slice(text).map(|mut v: Value| v["decided"].take());
            self.first_difference = Some(Difference { line, then: read(then)?, now: read(&now)? });
        }
        Ok(())
    }
}

impl Other {
    fn count(&mut self, verdict: &Verdict) {
        self.decisions += 1;
        self.elsewhere += u64::from(verdict.elsewhere);
        match &verdict.then {
            Some(then) => {
                self.prompt_tokens_then += u64::from(then.record.prompt_tokens);
                self.predicted_tokens_then += u64::from(then.record.chosen_tokens);
                self.endpoints.entry(then.record.endpoint.clone()).or_default().then += 1;
            }
            None => self.refused_then += 1,
        }
        match &verdict.now {
            Ok(now) => {
                self.prompt_tokens_now += u64::from(now.record.prompt_tokens);
                self.predicted_tokens_now += u64::from(now.record.chosen_tokens);
                self.endpoints.entry(now.record.endpoint.to_string()).or_default().now += 1;
            }
            Err(_) => self.refused_now += 1,
        }
    }
}

fn print(report: &Report) {
    let Facts { version, seed, duration_s, entries, end } = &report.recording;
    say(&format!(
        "recording: {entries} entries in {duration_s:.1} s by kvroute {version}, seed {seed}"
    ));
    match end {
        Some(EndReason::Complete) => {}
        Some(reason) => say(&format!("the recording is cut: {}", reason.as_str())),
        None => say("the recording is cut: the router ended without closing it"),
    }
    if version != env!("CARGO_PKG_VERSION") {
        say("it is of another version, which may decide differently by design");
    }
    if let Some(same) = &report.same {
        say(&format!("decisions: {} of {} equal", same.equal, same.decisions));
        if let Some(Difference { line, then, now }) = &same.first_difference {
            say(&format!("the first difference, line {line}, then:\n{then:#}\nnow:\n{now:#}"));
        }
    }
    if let Some(other) = &report.other {
        print_other(other);
    }
}

fn print_other(other: &Other) {
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let Other { decisions, elsewhere, refused_then, refused_now, .. } = other;
    let percent = share(*elsewhere, *decisions);
    say(&format!("decisions: {elsewhere} of {decisions} go elsewhere ({percent:.1}%)"));
    say(&format!("refused: {refused_then} then, {refused_now} now"));
    let [then, now] = [
        (other.predicted_tokens_then, other.prompt_tokens_then),
        (other.predicted_tokens_now, other.prompt_tokens_now),
    ];
    say(&format!(
        "predicted hits: {} of {} prompt tokens then ({:.1}%), {} of {} now ({:.1}%)",
        then.0,
        then.1,
        share(then.0, then.1),
        now.0,
        now.1,
        share(now.0, now.1)
    ));
    for (endpoint, ThenNow { then, now }) in &other.endpoints {
        say(&format!("{endpoint}: {then} requests then, {now} now"));
    }
    say("caches and answers are those of the recording: they do not follow the new decisions");
}
