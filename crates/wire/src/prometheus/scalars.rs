//! Which numbers of a page did somebody ask for by name?

use std::sync::LazyLock;

use kvroute_core::collect::MetricSpec;

use super::{Families, Sample, escape};

/// The family of NVIDIA's DCGM exporter that tells how busy a GPU is, in percent.
const GPU_FAMILY: &str = "DCGM_FI_DEV_GPU_UTIL";

/// Of each number the sample with the newest time stamp, else the first.
#[derive(Debug, Default)]
pub(super) struct Newest(Vec<Option<Sample>>);

impl Newest {
    pub(super) fn take(&mut self, at: usize, sample: Sample) {
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        let place = &mut self.0[at];
        if place.is_none_or(|newest| newest.stamp < sample.stamp) {
            *place = Some(sample);
        }
    }

    fn get(&self, at: usize) -> Option<f64> {
        self.0.get(at)?.map(|sample| sample.value).filter(|value| value.is_finite())
    }

    /// Adds what was found, by its key.
    pub(super) fn add_to(&self, values: &mut Vec<(String, f64)>, keys: &[(String, MetricSpec)]) {
        for (at, (key, _)) in keys.iter().enumerate() {
            values.extend(self.get(at).map(|value| (key.clone(), value)));
        }
    }
}

/// Reads numbers by name. Made once, used for every page.
#[derive(Debug)]
pub struct ScalarReader {
    scalars: Vec<(String, MetricSpec)>,
    families: Families<usize>,
}

impl ScalarReader {
    /// A reader of these metrics, each under its key.
    pub fn new(scalars: &[(String, MetricSpec)]) -> ScalarReader {
        let asked = scalars.iter().enumerate().map(|(at, (_, spec))| (spec, at));
        ScalarReader { scalars: scalars.to_vec(), families: Families::new(asked) }
    }

    /// Adds what the page holds to `values`; the name of a metric that it does not hold.
    pub fn read(&self, page: &[u8], values: &mut Vec<(String, f64)>) -> Option<&str> {
        let mut newest = Newest::default();
        self.families.scan(page, |at, _, sample| newest.take(*at, sample));
        newest.add_to(values, &self.scalars);
        let missing = (0..self.scalars.len()).find(|at| newest.get(*at).is_none());
        missing.map(|at| self.scalars[at].1.name.as_str())
    }
}

/// How busy the busiest GPU is, 0 to 1, by the page of a DCGM exporter; `None`: it does not tell.
/// An exporter of a whole node labels each GPU with its `pod`: those of others do not count where
/// the endpoint's own is known (`pod` not empty).
pub fn gpu_utilization(page: &[u8], pod: &str) -> Option<f64> {
    static GPU: LazyLock<Families<()>> = LazyLock::new(|| {
        let spec = MetricSpec { name: GPU_FAMILY.to_owned(), labels: Vec::new() };
        Families::new([(&spec, ())])
    });
    let (own, mut busiest) = (escape(pod), None);
    GPU.scan(page, |(), labels, sample| {
        let is_other = |label: &[u8]| !own.is_empty() && *label != *own;
        let is_share = (0.0..=100.0).contains(&sample.value);
        if is_share && !labels.get(b"pod").is_some_and(is_other) {
            busiest = Some(busiest.unwrap_or(0.0_f64).max(sample.value));
        }
    });
    busiest.map(|percent| percent / 100.0)
}
