//! The plan in words, for people and, as [`Shown`], for programs.

use std::fmt::{self, Write as _};

use serde::Serialize;

use super::{HandlerPlan, Note, NoteKind, Plan, ProducerKind, StagePlan, TokensNeed};
use crate::collect::{Ask, Reading, Scheme};
use crate::fleet::Name;
use crate::handle::{Decider, StageOrder};
use crate::plugin::PluginSpec;
use crate::stage::Inputs;

/// Width of what is printed, in characters.
const COLUMNS_MAX: usize = 100;

/// Everything that runs, by name and in words.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    /// Which profiles run for a request, one step a line.
    pub handler: Vec<String>,
    /// In order of the configuration.
    pub profiles: Vec<ShownProfile>,
    /// Remove candidates before any profile runs.
    pub screeners: Vec<ShownPlugin>,
    /// Let requests in, or refuse them.
    pub admitters: Vec<ShownPlugin>,
    /// Says how full the fleet is.
    pub detector: Option<ShownPlugin>,
    /// What is known about each endpoint, and who reads it.
    pub producers: Vec<ShownProducer>,
    /// Where KV events come from, if anything reads them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<String>,
    /// Which tokens requests come with.
    pub tokens: String,
    /// Who reads bodies, in order of preference.
    pub parsers: Vec<String>,
    /// What is collected from endpoints.
    pub data: Vec<ShownData>,
    /// What was added, then what is inert, then what deserves a look.
    pub notes: Vec<ShownNote>,
}

/// One profile.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownProfile {
    /// Its name.
    pub name: String,
    /// In the order in which they run.
    pub filters: Vec<ShownPlugin>,
    /// With their weights.
    pub scorers: Vec<ShownPlugin>,
    /// Orders what is left.
    pub picker: ShownPlugin,
}

/// One plugin in its place.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownPlugin {
    /// Its name.
    pub name: String,
    /// Its type.
    pub r#type: &'static str,
    /// Of a scorer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// The producers that it reads, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<String>,
}

/// One producer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownProducer {
    /// Its name.
    pub name: String,
    /// Its type.
    pub r#type: &'static str,
    /// What it knows.
    pub knows: String,
    /// Who reads it, by name.
    pub read_by: Vec<String>,
}

/// One thing that is collected.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownData {
    /// Name of the source.
    pub source: String,
    /// Where it is, and what is read.
    pub what: String,
}

/// One remark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownNote {
    /// `added`, `inert` or `warning`.
    pub kind: &'static str,
    /// In words.
    pub text: String,
}

impl NoteKind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            NoteKind::Added => "added",
            NoteKind::Inert => "inert",
            NoteKind::Warning => "warning",
        }
    }
}

impl Plan {
    /// The plan in words.
    pub fn shown(&self) -> Shown {
        let all = |stages: &[StagePlan]| stages.iter().map(|stage| self.plugin(stage)).collect();
        let profiles = self.profiles.iter().map(|profile| ShownProfile {
            name: profile.name.to_string(),
            filters: all(&profile.filters),
            scorers: profile.scorers.iter().map(|stage| self.scorer(stage)).collect(),
            picker: self.plugin(&profile.picker),
        });
        let mut notes: Vec<&Note> = self.notes.iter().collect();
        notes.sort_by_key(|note| note.kind);
        let note = |note: &Note| ShownNote { kind: note.kind.as_str(), text: note.text.clone() };
        Shown {
            handler: self.handler_in_words(),
            profiles: profiles.collect(),
            screeners: all(&self.screeners),
            admitters: all(&self.admitters),
            detector: self.detector.as_ref().map(|stage| self.plugin(stage)),
            producers: self.producers_in_words(),
            events: self.precise_producer().map(|precise| precise.kv_events_config.to_string()),
            tokens: self.tokens_in_words().to_owned(),
            parsers: self.parsers.iter().map(|parser| parser.plugin_type().to_owned()).collect(),
            data: self.data_in_words(),
            notes: notes.into_iter().map(note).collect(),
        }
    }

    fn plugin(&self, stage: &StagePlan) -> ShownPlugin {
        let mut reads: Vec<String> = Vec::new();
        reads.extend(self.prefix_name(stage.prefix).map(Name::to_string));
        let inputs = stage.spec.plugin().inputs();
        let others = [inputs.load, inputs.latency, inputs.media, inputs.session];
        reads.extend(others.into_iter().flatten().map(|producer| producer.name().to_owned()));
        let (name, r#type) = (stage.name.to_string(), stage.spec.kind().name());
        ShownPlugin { name, r#type, weight: None, reads }
    }

    fn scorer(&self, stage: &StagePlan) -> ShownPlugin {
        ShownPlugin { weight: Some(stage.weight), ..self.plugin(stage) }
    }

    fn prefix_name(&self, at: Option<usize>) -> Option<&Name> {
        Some(&self.producers.get(at?)?.name)
    }

    /// Every plugin that reads producers, around profiles and in them.
    fn stages(&self) -> impl Iterator<Item = &StagePlan> {
        let around = self.screeners.iter().chain(&self.admitters).chain(&self.detector);
        let inside = self.profiles.iter().flat_map(|p| p.filters.iter().chain(&p.scorers));
        inside.chain(around)
    }

    fn producers_in_words(&self) -> Vec<ShownProducer> {
        let mut shown = Vec::new();
        for (at, producer) in self.producers.iter().enumerate() {
            let (r#type, knows) = match &producer.kind {
                ProducerKind::Approx(_) => (
                    "approx-prefix-cache-producer",
                    "cached prefixes, guessed from routing history",
                ),
                ProducerKind::Precise(_) => (
                    "precise-prefix-cache-producer",
                    "cached prefixes, told by the engines' events",
                ),
                ProducerKind::Burst(_) => {
                    ("burst-prefix-cache-producer", "prefixes of requests that arrive together")
                }
            };
            let mut read_by = names(self.stages().filter(|stage| stage.prefix == Some(at)));
            for (reader, prefix) in self.prefix_readers() {
                if prefix == Some(at) {
                    push_new(&mut read_by, reader);
                }
            }
            let (name, knows) = (producer.name.to_string(), knows.to_owned());
            shown.push(ShownProducer { name, r#type, knows, read_by });
        }
        let read_by = |reads: &dyn Fn(&Inputs<'_>) -> bool| {
            names(self.stages().filter(|stage| reads(&stage.spec.plugin().inputs())))
        };
        shown.push(ShownProducer {
            name: "inflight-load-producer".to_owned(),
            r#type: "inflight-load-producer",
            knows: "requests and tokens in flight".to_owned(),
            read_by: read_by(&|inputs| inputs.load.is_some()),
        });
        if self.latency.is_some() {
            shown.push(ShownProducer {
                name: "predicted-latency-producer".to_owned(),
                r#type: "predicted-latency-producer",
                knows: "expected times to first and next token".to_owned(),
                read_by: read_by(&|inputs| inputs.latency.is_some()),
            });
        }
        for (name, spec) in &self.others {
            let is = |read: Option<&str>| read == Some(name.as_str());
            shown.push(ShownProducer {
                name: name.to_string(),
                r#type: spec.kind().name(),
                knows: other_in_words(spec).to_owned(),
                read_by: read_by(&|inputs| {
                    is(inputs.media.map(|m| m.name())) || is(inputs.session.map(|s| s.name()))
                }),
            });
        }
        shown
    }

    /// Readers of prefix matches that are no stages.
    fn prefix_readers(&self) -> Vec<(&'static str, Option<usize>)> {
        let mut readers = vec![("inflight-load-producer", self.load.prefix)];
        let latency = self.latency.as_ref().and_then(|latency| latency.prefix);
        readers.push(("predicted-latency-producer", latency));
        readers.push(("p2p-source-producer", self.peers.as_ref().and_then(|peers| peers.prefix)));
        if let HandlerPlan::Disagg(disagg) = &self.handler {
            let by_prefix = |decider: Option<&Decider>| {
                self.producer_main.filter(|_| matches!(decider, Some(Decider::PrefixBased(_))))
            };
            let prefill = disagg.prefill.as_ref().and_then(|(_, decider)| decider.as_ref());
            readers.push(("prefix-based-pd-decider", by_prefix(prefill)));
        }
        readers
    }

    fn handler_in_words(&self) -> Vec<String> {
        let name = |at: usize| &self.profiles[at].name;
        match &self.handler {
            HandlerPlan::Single => vec![format!("profile {} for every request", name(0))],
            HandlerPlan::Header { header, default } => {
                vec![format!("the profile that header {header} names, else {default}")]
            }
            HandlerPlan::DataParallel { primary_port } => vec![format!(
                "profile {} for every request; it goes to port {primary_port} of the chosen host, \
                 the chosen rank in x-data-parallel-host-port",
                name(0)
            )],
            HandlerPlan::Disagg(disagg) => {
                let encode = disagg.encode.as_ref().map(|(at, decider)| {
                    format!("encode by profile {}, {}", name(*at), decider_in_words(decider))
                });
                let prefill = disagg.prefill.as_ref().map(|(at, decider)| {
                    let when = decider.as_ref().map_or("always".to_owned(), decider_in_words);
                    format!("prefill by profile {}, {when}", name(*at))
                });
                let decode = Some(format!("decode by profile {}, always", name(disagg.decode)));
                let steps = match disagg.order {
                    StageOrder::DecodeFirst => [decode, encode, prefill],
                    StageOrder::PrefillFirst => [prefill, decode, encode],
                };
                let port = disagg
                    .primary_port
                    .map(|port| format!("requests go to port {port} of the chosen host"));
                steps.into_iter().chain([port]).flatten().collect()
            }
        }
    }

    fn tokens_in_words(&self) -> &'static str {
        match self.tokens {
            TokensNeed::None => "not needed",
            TokensNeed::Estimated => "estimated, four bytes each",
            TokensNeed::Exact => "exact (--tokenizer); estimated where there is no tokenizer",
        }
    }

    fn data_in_words(&self) -> Vec<ShownData> {
        let mut shown = Vec::new();
        for page in &self.collect.pages {
            let readings: Vec<String> = page.readings.iter().map(reading_in_words).collect();
            let readings = match readings.is_empty() {
                true => "nothing is read from it".to_owned(),
                false => readings.join(", "),
            };
            let (source, at) = (page.ask.source.to_string(), ask_in_words(&page.ask));
            shown.push(ShownData { source, what: format!("{at}: {readings}") });
        }
        let models = &self.collect.models;
        let what = format!("{}: served models and adapters", ask_in_words(models));
        shown.push(ShownData { source: models.source.to_string(), what });
        if let Some(discovery) = &self.collect.discovery {
            let watch = if discovery.watch { ", again when it changes" } else { "" };
            let kind = if discovery.clusters { "clusters" } else { "endpoints" };
            let what = format!("{kind} are read from {}{watch}", discovery.path);
            shown.push(ShownData { source: "discovery".to_owned(), what });
        }
        shown
    }
}

fn names<'a>(stages: impl Iterator<Item = &'a StagePlan>) -> Vec<String> {
    let mut names = Vec::new();
    stages.for_each(|stage| push_new(&mut names, stage.name.as_str()));
    names
}

fn push_new(names: &mut Vec<String>, name: &str) {
    if !names.iter().any(|known| known == name) {
        names.push(name.to_owned());
    }
}

fn other_in_words(spec: &PluginSpec) -> &'static str {
    match spec {
        PluginSpec::SessionIdProducer(_) => "the request's session",
        PluginSpec::EncoderCacheProducer(_) => "images, audio and video that are encoded already",
        PluginSpec::P2pSourceProducer(_) => {
            "which endpoint the cached blocks could be fetched from"
        }
        _ => "see docs/plugins.md",
    }
}

fn decider_in_words(decider: &Decider) -> String {
    match decider {
        Decider::PrefixBased(by) if by.non_cached_tokens == 0 => {
            "never: nonCachedTokens is 0".to_owned()
        }
        Decider::PrefixBased(by) => {
            let least = match by.prompt_tokens {
                0 => String::new(),
                tokens => format!(" and the prompt has {tokens} or more"),
            };
            format!("if {} tokens or more are not cached{least}", by.non_cached_tokens)
        }
        Decider::Always => "always".to_owned(),
        Decider::Multimodal => "if there are images, audio or video".to_owned(),
    }
}

fn ask_in_words(ask: &Ask) -> String {
    let port = ask.port.map_or(String::new(), |port| format!(" at port {port}"));
    let node = if ask.at_node { " of the node" } else { "" };
    let tls = if ask.scheme == Scheme::Https { " over TLS" } else { "" };
    format!("{}{port}{node}{tls}", ask.path)
}

fn reading_in_words(reading: &Reading) -> String {
    match reading {
        Reading::Engine(engine) => {
            let default = engine.default_engine.as_ref();
            let by = default.map_or(String::new(), |name| {
                format!("; {name} where label {} names no engine", engine.engine_label)
            });
            format!("the engine's load ({}{by})", engine.producer)
        }
        Reading::Gpu { producer } => format!("the busiest GPU ({producer})"),
        Reading::Scalars { producer, scalars } => {
            let keys: Vec<&str> = scalars.iter().map(|(key, _)| key.as_str()).collect();
            format!("{} ({producer})", keys.join(", "))
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown().fmt(f)
    }
}

/// One line of the table: what it is, its name, and a remark.
struct Line<'a> {
    label: &'a str,
    name: String,
    remark: String,
}

impl Shown {
    fn lines(&self) -> Vec<Line<'_>> {
        let line =
            |label, name: &str, remark: String| Line { label, name: name.to_owned(), remark };
        let plugin = |label, plugin: &ShownPlugin| {
            let weight = plugin.weight.map(|weight| format!("x {weight}"));
            let reads = match plugin.reads.is_empty() {
                true => None,
                false => Some(format!("reads {}", plugin.reads.join(", "))),
            };
            let type_ = Some(plugin.r#type).filter(|t| *t != plugin.name).map(str::to_owned);
            let remark: Vec<String> = [weight, type_, reads].into_iter().flatten().collect();
            line(label, &plugin.name, remark.join("; "))
        };
        let mut lines = Vec::new();
        let labels = std::iter::once("handler").chain(std::iter::repeat(""));
        lines.extend(
            labels.zip(&self.handler).map(|(label, step)| line(label, step, String::new())),
        );
        lines.extend(self.screeners.iter().map(|stage| plugin("screener", stage)));
        lines.extend(self.admitters.iter().map(|stage| plugin("admitter", stage)));
        lines.extend(self.detector.iter().map(|stage| plugin("detector", stage)));
        for profile in &self.profiles {
            lines.push(line("profile", &profile.name, String::new()));
            lines.extend(profile.filters.iter().map(|stage| plugin("  filter", stage)));
            lines.extend(profile.scorers.iter().map(|stage| plugin("  scorer", stage)));
            lines.push(plugin("  picker", &profile.picker));
        }
        for producer in &self.producers {
            let readers = match producer.read_by.is_empty() {
                true => String::new(),
                false => format!("; read by {}", producer.read_by.join(", ")),
            };
            let knows = format!("{}{readers}", producer.knows);
            lines.push(line("producer", &producer.name, knows));
        }
        lines.extend(self.events.iter().map(|events| line("events", events, String::new())));
        lines.push(line("tokens", &self.tokens, String::new()));
        lines.push(line("parsers", &self.parsers.join(", "), String::new()));
        lines.extend(self.data.iter().map(|data| line("data", &data.source, data.what.clone())));
        let notes = self.notes.iter();
        lines.extend(notes.map(|note| line(note.kind, &note.text, String::new())));
        lines
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines();
        let width = |text: &str| text.chars().count();
        let with_remark = lines.iter().filter(|line| !line.remark.is_empty());
        let names = with_remark.map(|line| width(&line.name)).max().unwrap_or(0);
        let labels = lines.iter().map(|line| width(line.label)).max().unwrap_or(0);
        for Line { label, name, remark } in &lines {
            let (left, text) = match remark.is_empty() {
                true => (labels + 2, name),
                false => (labels + 2 + names + 2, remark),
            };
            let mut head = format!("{label:labels$}  ");
            if !remark.is_empty() {
                write!(head, "{name:names$}  ")?;
            }
            f.write_str(&head)?;
            wrap(f, text, left)?;
        }
        Ok(())
    }
}

/// The text in lines that begin at a column.
fn wrap(f: &mut fmt::Formatter<'_>, text: &str, left: usize) -> fmt::Result {
    let mut at = left;
    for (index, word) in text.split(' ').enumerate() {
        let width = word.chars().count();
        if index > 0 && at + 1 + width > COLUMNS_MAX {
            write!(f, "\n{:left$}", "")?;
            at = left;
        } else if index > 0 {
            f.write_char(' ')?;
            at += 1;
        }
        f.write_str(word)?;
        at += width;
    }
    f.write_char('\n')
}
