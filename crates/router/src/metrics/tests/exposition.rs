//! What does a page of metrics declare? For tests.

use std::collections::BTreeMap;

/// One family of a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Declared {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Names of its labels, in order.
    pub labels: Vec<String>,
    /// Bounds of the first series, as they stand there.
    pub buckets: Vec<String>,
    pub help: String,
}

impl Declared {
    /// A row of the table in `docs/metrics.md`.
    pub fn row(&self, name: &str) -> String {
        let labels: Vec<String> = self.labels.iter().map(|label| format!("`{label}`")).collect();
        format!("| `{name}` | {} | {} | {} |\n", self.kind, labels.join(", "), self.help)
    }
}

/// The families of a page, by the name that queries use.
pub(crate) fn families(page: &str) -> BTreeMap<String, Declared> {
    let mut found: BTreeMap<String, Declared> = BTreeMap::new();
    let (mut name, mut help) = (String::new(), "");
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').unwrap().1.trim_end_matches('.');
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (family, kind) = rest.split_once(' ').unwrap();
            let suffix = if kind == "counter" { "_total" } else { "" };
            name = format!("{family}{suffix}");
            let (kind, help) = (kind.to_owned(), help.to_owned());
            let before = found.insert(name.clone(), Declared { kind, help, ..Declared::default() });
            assert_eq!(before, None, "{name} is there twice");
        } else if !line.starts_with('#') {
            let family = found.get_mut(&name).unwrap();
            let series = &line[..line.rfind(' ').unwrap()];
            note(family, series, &name);
        }
    }
    found
}

/// Labels and bounds of the first series of a family.
fn note(family: &mut Declared, series: &str, name: &str) {
    let (sample, labels) = series.trim_end_matches('}').split_once('{').unwrap_or((series, ""));
    let labels = labels.split("\",").filter_map(|pair| pair.split_once("=\""));
    let labels: Vec<(&str, &str)> = labels.map(|(k, v)| (k, v.trim_end_matches('"'))).collect();
    let own = || labels.iter().filter(|(key, _)| *key != "le").map(|(key, _)| (*key).to_owned());
    if family.labels.is_empty() {
        family.labels = own().collect();
    }
    let bound = labels.iter().find(|(key, _)| *key == "le").map(|(_, value)| *value);
    if sample == format!("{name}_bucket")
        && let Some(bound) = bound
        && family.buckets.last().is_none_or(|last| last != "+Inf")
    {
        family.buckets.push(bound.to_owned());
    }
}

/// How many families a registry has, also without series.
pub(crate) fn registered(registry: &prometheus_client::registry::Registry) -> usize {
    format!("{registry:?}").matches("Descriptor {").count()
}
