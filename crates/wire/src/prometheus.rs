//! What does a metrics page say?
//!
//! Prometheus text exposition (version 0.0.4 and OpenMetrics), of which only the families that
//! somebody asks for are read; other lines cost a look at their first bytes and the length of
//! their name, and no allocation. What is asked for follows from a `CollectPlan` of core.
//!
//! A page can hold one series per data parallel rank (label `engine` or `dp_rank`). Waiting,
//! running, block and token counts are summed over the series. KV usage is their mean: ranks have
//! pools of one size, and the engine itself chooses the rank for a request.

mod engine;
mod scalars;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use kvroute_core::collect::{CollectPlan, MetricSpec, Reading};
use memchr::{memchr, memchr_iter, memchr3};

pub use engine::{ADAPTERS_MAX, EngineChoice, EngineReader, MetricsError, Scrape};
pub use scalars::{ScalarReader, gpu_utilization};

/// Reads the metrics page of an engine that is told from the names on it, as it is done without a
/// configuration.
///
/// # Errors
/// [`MetricsError`] when the page does not tell an engine's load.
pub fn parse(page: &[u8]) -> Result<Scrape, MetricsError> {
    static READER: LazyLock<EngineReader> = LazyLock::new(|| {
        let plan = CollectPlan::default();
        match plan.pages.first().and_then(|page| page.readings.first()) {
            Some(Reading::Engine(reading)) => EngineReader::new(reading),
            _ => EngineReader::default(),
        }
    });
    READER.read(READER.engine_of(&BTreeMap::new()), page, &mut Vec::new())
}

/// What vLLM's `cache_config_info` says beyond block size and number of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheConfig {
    /// `enable_prefix_caching`.
    pub prefix_caching: Option<bool>,
    /// `prefix_caching_hash_algo`: how blocks are named.
    pub hash_algorithm: Option<String>,
}

/// Reads the first `cache_config_info` of a page; nothing where there is none.
pub fn cache_config(page: &[u8]) -> CacheConfig {
    let mut lines = page.split(|byte| *byte == b'\n');
    let labels = lines.find_map(|line| line.strip_prefix(b"vllm:cache_config_info"));
    let Some((labels, _)) = labels.and_then(split_labels) else { return CacheConfig::default() };
    CacheConfig {
        prefix_caching: match labels.get(b"enable_prefix_caching") {
            Some(b"True") => Some(true),
            Some(b"False") => Some(false),
            _ => None,
        },
        hash_algorithm: labels.get(b"prefix_caching_hash_algo").map(unescape),
    }
}

/// Bytes of a line that are looked at before its name is searched for.
const BEGIN_BYTES: usize = 10;

/// The families that are read, each with what it means.
#[derive(Debug)]
struct Families<M> {
    /// By length of the name, then by name.
    entries: Vec<Family<M>>,
    /// Which bytes a name may have at each of its first places: most lines fail there.
    begins: Vec<[bool; 256]>,
    /// Bit `n`: a name is `n` bytes long, modulo 64.
    lengths: u64,
}

#[derive(Debug)]
struct Family<M> {
    name: Box<[u8]>,
    labels: Vec<Label>,
    meaning: M,
}

/// A label that a series must have, its value escaped as on a page.
#[derive(Debug)]
struct Label {
    name: Box<[u8]>,
    value: Box<[u8]>,
}

impl<M> Default for Families<M> {
    fn default() -> Families<M> {
        Families { entries: Vec::new(), begins: vec![[false; 256]; BEGIN_BYTES], lengths: 0 }
    }
}

/// What follows the labels of a series.
#[derive(Clone, Copy, Debug)]
struct Sample {
    value: f64,
    /// 0 where the line has none.
    stamp: f64,
}

impl<M> Families<M> {
    fn new<'s>(asked: impl IntoIterator<Item = (&'s MetricSpec, M)>) -> Families<M> {
        let mut families = Families::default();
        for (spec, meaning) in asked {
            let name: Box<[u8]> = spec.name.as_bytes().into();
            for (at, allowed) in families.begins.iter_mut().enumerate() {
                match name.get(at) {
                    Some(byte) => allowed[usize::from(*byte)] = true,
                    // Behind a name that is shorter.
                    None => *allowed = [true; 256],
                }
            }
            families.lengths |= 1 << (name.len() % 64);
            let label = |(name, value): &(String, String)| Label {
                name: name.as_bytes().into(),
                value: escape(value),
            };
            let labels = spec.labels.iter().map(label).collect();
            families.entries.push(Family { name, labels, meaning });
        }
        // Stable: of one name the entries stay in the order in which they were asked for.
        families.entries.sort_by(|a, b| Self::order(&a.name, &b.name));
        families
    }

    fn order(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
        a.len().cmp(&b.len()).then_with(|| a.cmp(b))
    }

    /// Calls `take` for each sample that somebody asked for, once per family that means it. Lines
    /// that cannot be read are no samples.
    fn scan<'p>(&self, page: &'p [u8], mut take: impl FnMut(&M, Labels<'p>, Sample)) {
        let mut begin = 0;
        for end in memchr_iter(b'\n', page).chain([page.len()]) {
            let line = &page[begin..end];
            let may_begin = |at: usize| self.begins[at][usize::from(line[at])];
            if (0..line.len().min(self.begins.len())).all(may_begin) {
                self.read_line(line, &mut take);
            }
            begin = end + 1;
        }
    }

    fn read_line<'p>(&self, line: &'p [u8], take: &mut impl FnMut(&M, Labels<'p>, Sample)) {
        let Some(name_len) = memchr3(b'{', b' ', b'\t', line) else { return };
        if self.lengths & (1 << (name_len % 64)) == 0 {
            return;
        }
        let (name, rest) = line.split_at(name_len);
        let before = |family: &Family<M>| Self::order(&family.name, name).is_lt();
        let start = self.entries.partition_point(before);
        let meant = self.entries[start..].iter().take_while(|family| *family.name == *name);
        let mut read = None;
        for family in meant {
            let Some((labels, sample)) = read.or_else(|| sample(rest)) else { return };
            read = Some((labels, sample));
            if family.labels.iter().all(|l| labels.get(&l.name) == Some(&l.value)) {
                take(&family.meaning, labels, sample);
            }
        }
    }
}

fn sample(rest: &[u8]) -> Option<(Labels<'_>, Sample)> {
    let (labels, rest) = split_labels(rest)?;
    let text = std::str::from_utf8(rest).ok()?;
    let mut words = text.split_ascii_whitespace();
    let value = words.next()?.parse().ok()?;
    // An exemplar may follow instead.
    let stamp = words.next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    Some((labels, Sample { value, stamp }))
}

fn escape(value: &str) -> Box<[u8]> {
    let mut out = Vec::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'\\' | b'"' => out.extend([b'\\', byte]),
            b'\n' => out.extend(b"\\n"),
            _ => out.push(byte),
        }
    }
    out.into_boxed_slice()
}

fn unescape(text: &[u8]) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(escaped) => *escaped,
                None => break,
            },
            byte => *byte,
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Splits what follows a name into the labels, braces left out, and the rest.
fn split_labels(rest: &[u8]) -> Option<(Labels<'_>, &[u8])> {
    let Some(inner) = rest.strip_prefix(b"{") else { return Some((Labels(&[]), rest)) };
    let mut in_quotes = false;
    let mut escaped = false;
    for (at, byte) in inner.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_quotes => escaped = true,
            b'"' => in_quotes = !in_quotes,
            b'}' if !in_quotes => return Some((Labels(&inner[..at]), &inner[at + 1..])),
            _ => {}
        }
    }
    None
}

/// The pairs of a label set: name and value, the value still escaped.
#[derive(Clone, Copy)]
struct Labels<'a>(&'a [u8]);

impl<'a> Labels<'a> {
    fn get(self, wanted: &[u8]) -> Option<&'a [u8]> {
        { self }.find(|(name, _)| *name == wanted).map(|(_, value)| value)
    }
}

impl<'a> Iterator for Labels<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let equals = memchr(b'=', self.0)?;
        let name = self.0[..equals].trim_ascii();
        let name = name.strip_prefix(b",").unwrap_or(name).trim_ascii();
        let value = self.0[equals + 1..].trim_ascii_start().strip_prefix(b"\"")?;
        let mut escaped = false;
        let end = value.iter().position(|byte| {
            let is_end = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            is_end
        })?;
        self.0 = &value[end + 1..];
        Some((name, &value[..end]))
    }
}
