//! What does a run look like to a reader? `summary.json`, `report.md` and `report.html`.
//!
//! Tables are made once, in `tables.rs`, and written twice; plots stand in the HTML only.

mod html;
mod markdown;
mod plot;
mod plots;
mod tables;
mod text;
mod timeline;

use std::io;
use std::path::Path;

use crate::record::{Ending, RunRecord};
use crate::scenario::{ArrivalKind, ProfileSpec, Scenario, WorkloadKind};
use crate::summary::SummaryFile;
use tables::Table;
use timeline::Timeline;

/// The figures of some runs of one scenario, and how to show them.
#[derive(Clone, Debug)]
pub struct Report {
    file: SummaryFile,
    about: About,
    losses: Vec<Vec<Losses>>,
    timelines: Vec<Timeline>,
}

/// What the report says about its scenario.
#[derive(Clone, Debug, Default)]
struct About {
    description: String,
    /// What, and how much of it.
    facts: Vec<(&'static str, String)>,
    in_flight_max: u32,
}

/// Requests of one stage that were not answered, of all seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Losses {
    requests: u64,
    refused: u64,
    rejected: u64,
    failed: u64,
}

impl Report {
    /// The report of these records: several configurations, several seeds of each.
    pub fn new(scenario: &Scenario, records: &[RunRecord]) -> Report {
        let file = SummaryFile::of(scenario, records);
        let of = |name: &str| records.iter().filter(|r| r.name == name).collect::<Vec<_>>();
        let named: Vec<Vec<&RunRecord>> = file.runs.iter().map(|run| of(&run.name)).collect();
        Report {
            about: About::new(scenario, &file, &named),
            losses: named.iter().map(|records| Losses::of(records)).collect(),
            timelines: named.iter().map(|records| Timeline::of(records[0])).collect(),
            file,
        }
    }

    /// The figures.
    pub fn summary(&self) -> &SummaryFile {
        &self.file
    }

    /// `summary.json`: the same bytes for the same records.
    pub fn json(&self) -> String {
        // Only strings, numbers and lists of them: nothing that JSON could refuse.
        let mut text = serde_json::to_string_pretty(&self.file).unwrap_or_default();
        text.push('\n');
        text
    }

    /// `report.md`.
    pub fn markdown(&self) -> String {
        markdown::page(self)
    }

    /// `report.html`: one file that needs no other, and no script.
    pub fn html(&self) -> String {
        html::page(self)
    }

    /// Writes `summary.json`, `report.md` and `report.html` into a folder, which is made if needed.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("summary.json"), self.json())?;
        std::fs::write(dir.join("report.md"), self.markdown())?;
        std::fs::write(dir.join("report.html"), self.html())
    }

    fn title(&self) -> String {
        format!("kvroute: {}", self.file.scenario)
    }

    /// What a reader must know before the figures: runs whose figures mean nothing.
    fn warnings(&self) -> Vec<String> {
        let late = self.file.runs.iter().filter(|run| !run.valid).map(|run| {
            let lag = run.lag_s.unwrap_or_default();
            format!(
                "{} is invalid: requests left late (99th percentile {:.3} s, at most {:.3} s), so \
                 its figures are the load generator's own.",
                run.name, lag.p99, lag.max
            )
        });
        late.collect()
    }

    fn tables(&self) -> Vec<Table> {
        let mut all = vec![tables::published_style(&self.file), tables::pooled(&self.file)];
        all.extend(tables::comparison(&self.file));
        all.extend(tables::losses(self));
        all.extend(self.file.runs.iter().filter_map(tables::stage_comparison));
        all.extend(self.file.runs.iter().map(tables::stages));
        all
    }
}

impl Losses {
    /// Stage by stage, warm-up left out, seeds added up.
    fn of(records: &[&RunRecord]) -> Vec<Losses> {
        let mut all: Vec<Losses> = Vec::new();
        for record in records {
            let mut place = Vec::new();
            let mut kept = 0;
            for stage in &record.stages {
                place.push((!stage.warmup).then_some(kept));
                kept += usize::from(!stage.warmup);
            }
            all.resize(all.len().max(kept), Losses::default());
            for request in &record.requests {
                let Some(Some(at)) = place.get(request.stage as usize) else { continue };
                let stage = &mut all[*at];
                stage.requests += 1;
                match request.ending {
                    Ending::Answered => {}
                    Ending::Refused => stage.refused += 1,
                    Ending::Rejected => stage.rejected += 1,
                    Ending::Failed => stage.failed += 1,
                }
            }
        }
        all
    }
}

impl About {
    fn new(scenario: &Scenario, file: &SummaryFile, records: &[Vec<&RunRecord>]) -> About {
        let fleet = &scenario.fleet;
        let profile = match &fleet.profile {
            ProfileSpec::Named(name) => name.as_str(),
            ProfileSpec::Inline(profile) if profile.name.is_empty() => "its own constants",
            ProfileSpec::Inline(profile) => profile.name.as_str(),
        };
        let live = records.iter().flatten().any(|record| record.lag.is_some());
        let seeds: Vec<String> =
            records.iter().max_by_key(|seeds| seeds.len()).map_or(Vec::new(), |records| {
                records.iter().map(|record| record.seed.to_string()).collect()
            });
        let facts = vec![
            (
                "Made by",
                if live { "requests over HTTP" } else { "simulation in virtual time" }.into(),
            ),
            (if file.seeds == 1 { "Seed" } else { "Seeds" }, seeds.join(", ")),
            (
                "Fleet",
                format!(
                    "{} engines, {profile}, {} KV tokens each in blocks of {}",
                    fleet.engines,
                    text::grouped(fleet.kv_tokens as f64, 0),
                    fleet.block_size
                ),
            ),
            ("Workload", workload(scenario)),
            ("Load", load(scenario)),
        ];
        About {
            description: scenario.description.clone(),
            facts,
            in_flight_max: scenario.client.in_flight_max,
        }
    }
}

fn workload(scenario: &Scenario) -> String {
    let spec = &scenario.workload;
    let mut parts = vec![
        match spec.kind {
            WorkloadKind::SharedPrefix => "shared prefixes",
            WorkloadKind::Agentic => "sessions of several turns",
            WorkloadKind::Trace => "a trace",
        }
        .to_owned(),
    ];
    let sizes = [
        (spec.groups, "groups"),
        (spec.users, "users each"),
        (spec.turns, "turns"),
        (spec.prefix_tokens, "tokens of prefix"),
        (spec.question_tokens, "of question"),
        (spec.output_tokens, "of answer"),
    ];
    for (size, what) in sizes {
        parts.extend(size.map(|size| format!("{} {what}", text::grouped(f64::from(size), 0))));
    }
    parts.extend(spec.zipf.map(|exponent| format!("Zipf {exponent}")));
    parts.join(", ")
}

fn load(scenario: &Scenario) -> String {
    let spec = &scenario.load;
    let arrivals = match spec.arrivals {
        ArrivalKind::Poisson => "Poisson arrivals",
        ArrivalKind::Constant => "exponential gaps, scaled to the stage",
        ArrivalKind::Even => "equal gaps",
        ArrivalKind::Closed => "a closed loop",
        ArrivalKind::Trace => "the times of the trace",
    };
    let stages = match spec.stages.len() {
        0 => String::new(),
        1 => ", 1 stage".to_owned(),
        many => format!(", {many} stages"),
    };
    let drained = match spec.stages.len() > 1 && spec.drain_between_stages {
        true => ", each waits until the one before is answered",
        false => "",
    };
    let limit = text::grouped(f64::from(scenario.client.in_flight_max), 0);
    format!("{arrivals}{stages}{drained}; at most {limit} in flight")
}

#[cfg(test)]
pub(crate) mod tests;
