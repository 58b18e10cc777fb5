//! How loaded is an engine, by its own page?

use std::collections::BTreeMap;

use kvroute_core::collect::{EngineReading, EngineSpec, MetricSpec, Signal};
use kvroute_core::fleet::{EngineMetrics, LoraMetrics, Name};
use thiserror::Error;

use super::scalars::Newest;
use super::{Families, Labels, Sample, unescape};

/// Most adapters that are read from one series.
pub const ADAPTERS_MAX: usize = 1024;

/// What one page says.
#[derive(Clone, Debug, PartialEq)]
pub struct Scrape {
    /// Whose names were read.
    pub engine: Name,
    /// The numbers.
    pub metrics: EngineMetrics,
}

/// Why a page says nothing about load. Zeros would make its endpoint look idle, so the scrape has
/// to count as failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MetricsError {
    /// No family of any known engine.
    #[error(
        "the page holds no metric of vLLM, SGLang, TensorRT-LLM or Triton; \
         is this an engine's /metrics?"
    )]
    NoEngine,
    /// No family of the engine that the endpoint is said to be.
    #[error(
        "the page holds no metric of the engine `{0}`; \
         correct the endpoint's engine label or `defaultEngine`"
    )]
    OtherEngine(Name),
    /// Families of an engine, but neither of its queue lengths.
    #[error("the page of {0} has no number of waiting or running requests yet")]
    NoLoad(Name),
}

/// Which engine an endpoint is, as far as it is known before its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineChoice(Option<usize>);

/// Reads engines' pages as a plan says. Made once, used for every page.
#[derive(Debug, Default)]
pub struct EngineReader {
    reading: Option<EngineReading>,
    /// In the order of the plan.
    families: Vec<Families<What>>,
    /// Families of all engines that can be told from names, with the rank of the engine.
    detect: Families<(usize, What)>,
    /// Index of the engine of each rank.
    ranks: Vec<usize>,
}

/// Which of an engine's numbers a family is.
#[derive(Clone, Debug)]
enum What {
    Signal(Signal),
    /// Index of a number of the user's choice.
    Scalar(usize),
}

fn asked(engine: &EngineSpec) -> impl Iterator<Item = (&MetricSpec, What)> {
    let signals = engine.signals.iter();
    let signals = signals.map(|(signal, spec)| (spec, What::Signal(signal.clone())));
    let scalars = engine.scalars.iter().enumerate();
    signals.chain(scalars.map(|(at, (_, spec))| (spec, What::Scalar(at))))
}

impl EngineReader {
    /// The reader of a plan.
    pub fn new(reading: &EngineReading) -> EngineReader {
        let engines = &reading.engines;
        let at = |name: &Name| engines.iter().position(|engine| engine.name == *name);
        let ranks: Vec<usize> = reading.detected.iter().filter_map(at).collect();
        let ranked = ranks.iter().enumerate();
        let detect = ranked.flat_map(|(rank, at)| {
            asked(&engines[*at]).map(move |(spec, what)| (spec, (rank, what)))
        });
        EngineReader {
            families: engines.iter().map(|engine| Families::new(asked(engine))).collect(),
            detect: Families::new(detect),
            ranks,
            reading: Some(reading.clone()),
        }
    }

    /// The engine of an endpoint with these labels.
    pub fn engine_of(&self, labels: &BTreeMap<String, String>) -> EngineChoice {
        let Some(reading) = &self.reading else { return EngineChoice(None) };
        let chosen = reading.engine_of(labels);
        let is_it = |engine: &EngineSpec| chosen.is_some_and(|chosen| chosen.name == engine.name);
        EngineChoice(reading.engines.iter().position(is_it))
    }

    /// Reads a page. Numbers of the user's choice that it holds are added to `values` by their
    /// keys, also when it is of no other use.
    ///
    /// # Errors
    /// [`MetricsError`] when the page does not tell the engine's load.
    pub fn read(
        &self,
        choice: EngineChoice,
        page: &[u8],
        values: &mut Vec<(String, f64)>,
    ) -> Result<Scrape, MetricsError> {
        let mut totals = Totals::default();
        let at = match choice.0 {
            Some(at) => self.fixed(at, page, &mut totals),
            None => self.detect(page, &mut totals),
        };
        let engines = self.reading.as_ref().map_or(&[][..], |reading| &reading.engines);
        let named = |at: Option<usize>| at.and_then(|at| engines.get(at));
        let Some(engine) = named(at) else {
            let said = named(choice.0).map(|engine| MetricsError::OtherEngine(engine.name.clone()));
            return Err(said.unwrap_or(MetricsError::NoEngine));
        };
        totals.scalars.add_to(values, &engine.scalars);
        match totals.into_metrics() {
            Some(metrics) => Ok(Scrape { engine: engine.name.clone(), metrics }),
            None => Err(MetricsError::NoLoad(engine.name.clone())),
        }
    }

    /// The engine, if the page has names of it.
    fn fixed(&self, at: usize, page: &[u8], totals: &mut Totals) -> Option<usize> {
        let mut found = None;
        self.families.get(at)?.scan(page, |what, labels, sample| {
            found = Some(at);
            totals.take(what, labels, sample);
        });
        found
    }

    /// The engine of the lowest rank that the page has names of; others are left out.
    fn detect(&self, page: &[u8], totals: &mut Totals) -> Option<usize> {
        let mut lowest = None;
        self.detect.scan(page, |(rank, what), labels, sample| {
            if lowest.is_some_and(|lowest| lowest < *rank) {
                return;
            }
            if lowest.replace(*rank) != Some(*rank) {
                *totals = Totals::default();
            }
            totals.take(what, labels, sample);
        });
        lowest.and_then(|rank| self.ranks.get(rank).copied())
    }
}

/// A sum over series, and their number.
#[derive(Clone, Copy, Default)]
struct Sum {
    total: f64,
    series: u32,
}

impl Sum {
    fn add(&mut self, value: f64) {
        self.total += value;
        self.series += 1;
    }

    fn count(self) -> Option<u32> {
        (self.series > 0).then_some(self.total as u32)
    }

    fn mean(self) -> f64 {
        if self.series == 0 { 0.0 } else { self.total / f64::from(self.series) }
    }
}

#[derive(Default)]
struct Totals {
    waiting: Sum,
    running: Sum,
    kv_usage: Sum,
    block_size: Option<u32>,
    blocks: Sum,
    /// From labels; counts where no family has the number itself.
    blocks_in_labels: Sum,
    prefix_queries: Sum,
    prefix_hits: Sum,
    /// The newest series of adapters: old label sets stay on the page for ever, and the value is
    /// the time at which a set was current.
    lora: Option<(f64, LoraMetrics)>,
    scalars: Newest,
}

impl Totals {
    fn take(&mut self, what: &What, labels: Labels<'_>, sample: Sample) {
        let value = sample.value;
        let signal = match what {
            What::Scalar(at) => return self.scalars.take(*at, sample),
            What::Signal(signal) => signal,
        };
        let is_amount = value.is_finite() && value >= 0.0;
        match signal {
            _ if !is_amount => {}
            Signal::Waiting => self.waiting.add(value),
            Signal::Running => self.running.add(value),
            Signal::KvUsage => self.kv_usage.add(value),
            Signal::BlockSize => self.block_size = Some(value as u32),
            Signal::Blocks => self.blocks.add(value),
            Signal::PrefixQueries => self.prefix_queries.add(value),
            Signal::PrefixHits => self.prefix_hits.add(value),
            Signal::Lora => self.take_lora(labels, value),
            Signal::CacheInfo { block_size_label, blocks_label } => {
                if let Some(count) = labels.get(block_size_label.as_bytes()).and_then(count_of) {
                    self.block_size = Some(count);
                }
                if let Some(count) = labels.get(blocks_label.as_bytes()).and_then(count_of) {
                    self.blocks_in_labels.add(f64::from(count));
                }
            }
        }
    }

    fn take_lora(&mut self, labels: Labels<'_>, value: f64) {
        if self.lora.as_ref().is_some_and(|(newest, _)| *newest > value) {
            return;
        }
        let mut lora = LoraMetrics::default();
        for (name, text) in labels {
            match name {
                b"max_lora" => lora.max = count_of(text).unwrap_or(0),
                b"running_lora_adapters" => lora.running = adapters(text),
                b"waiting_lora_adapters" => lora.waiting = adapters(text),
                _ => {}
            }
        }
        self.lora = Some((value, lora));
    }

    /// `None`: no number of requests.
    fn into_metrics(self) -> Option<EngineMetrics> {
        let (waiting, running) = (self.waiting.count(), self.running.count());
        if waiting.is_none() && running.is_none() {
            return None;
        }
        let tokens = |sum: Sum| (sum.series > 0).then_some(sum.total as u64);
        Some(EngineMetrics {
            waiting: waiting.unwrap_or(0),
            running: running.unwrap_or(0),
            kv_usage: self.kv_usage.mean().clamp(0.0, 1.0),
            block_size: self.block_size,
            blocks: self.blocks.count().or(self.blocks_in_labels.count()),
            lora: self.lora.map(|(_, lora)| lora),
            prefix_queries_tokens: tokens(self.prefix_queries),
            prefix_hits_tokens: tokens(self.prefix_hits),
        })
    }
}

fn count_of(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The names of a comma-separated label, escapes resolved.
fn adapters(text: &[u8]) -> Vec<String> {
    let names = text.split(|byte| *byte == b',').map(unescape);
    let names = names.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
    names.take(ADAPTERS_MAX).collect()
}
