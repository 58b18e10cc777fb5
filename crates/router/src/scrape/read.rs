//! What does a page of an endpoint tell, by everything that reads it?

use kvroute_core::collect::{GPU_UTILIZATION, Reading};
use kvroute_core::fleet::{EngineMetrics, Name};
use kvroute_wire::prometheus::{EngineChoice, EngineReader, ScalarReader, gpu_utilization};

use crate::upstream::Upstream;

/// Reads a page. Made once, used for all endpoints.
pub(super) struct PageReader {
    readings: Vec<(Name, Reader)>,
    /// Index of the one that tells the load.
    load: Option<usize>,
}

enum Reader {
    Engine(EngineReader),
    Gpu,
    Scalars(ScalarReader),
}

/// What the last page of one endpoint told.
#[derive(Default)]
pub(super) struct Told {
    by_reading: Vec<ToldBy>,
    pod: String,
    /// How loaded the engine is.
    pub load: Option<EngineMetrics>,
    /// What was missing besides.
    pub missing: Option<String>,
}

/// What one reading of it told.
#[derive(Default)]
struct ToldBy {
    /// Which engine the endpoint is, for a reading that asks.
    choice: Option<EngineChoice>,
    /// Numbers by key.
    values: Vec<(String, f64)>,
}

impl PageReader {
    /// The first page is the one that tells the load.
    pub fn new(readings: &[Reading], is_first: bool) -> PageReader {
        let is_engine = |reading: &Reading| matches!(reading, Reading::Engine(_));
        let reader = |reading: &Reading| match reading {
            Reading::Engine(engine) => {
                (engine.producer.clone(), Reader::Engine(EngineReader::new(engine)))
            }
            Reading::Gpu { producer } => (producer.clone(), Reader::Gpu),
            Reading::Scalars { producer, scalars } => {
                (producer.clone(), Reader::Scalars(ScalarReader::new(scalars)))
            }
        };
        PageReader {
            readings: readings.iter().map(reader).collect(),
            load: readings.iter().position(is_engine).filter(|_| is_first),
        }
    }

    /// Name of the first that reads the page.
    pub fn first(&self) -> Option<&Name> {
        self.readings.first().map(|(name, _)| name)
    }

    /// Whether it tells how loaded an engine is.
    pub fn tells_load(&self) -> bool {
        self.load.is_some()
    }

    /// Nothing yet, of this endpoint.
    pub fn told(&self, upstream: &Upstream) -> Told {
        let nothing = |(_, reader): &(Name, Reader)| match reader {
            Reader::Engine(engine) => {
                let choice = Some(engine.engine_of(&upstream.labels));
                ToldBy { choice, ..ToldBy::default() }
            }
            _ => ToldBy::default(),
        };
        let by_reading = self.readings.iter().map(nothing).collect();
        Told { by_reading, pod: upstream.whereabouts.pod.clone(), ..Told::default() }
    }

    /// Reads a page. An error: it tells no load though it should, or nothing at all.
    pub fn read(&self, page: &[u8], told: &mut Told) -> Result<(), String> {
        let Told { by_reading, pod, load, missing } = told;
        (*load, *missing) = (None, None);
        by_reading.iter_mut().for_each(|by| by.values.clear());
        for (at, ((_, reader), by)) in self.readings.iter().zip(by_reading).enumerate() {
            let tells_load = self.load == Some(at);
            match reader.read(by.choice, page, pod, &mut by.values) {
                Ok(found) if tells_load => *load = found,
                Err(words) if tells_load => return Err(words),
                Err(words) if missing.is_none() => *missing = Some(words),
                Ok(_) | Err(_) => {}
            }
        }
        let is_empty = self.load.is_none() && told.values(self).next().is_none();
        match &told.missing {
            Some(words) if is_empty => Err(words.clone()),
            _ => Ok(()),
        }
    }
}

impl Reader {
    /// Adds numbers to `values`; a load, where it reads one. An error says what is missing.
    fn read(
        &self,
        choice: Option<EngineChoice>,
        page: &[u8],
        pod: &str,
        values: &mut Vec<(String, f64)>,
    ) -> Result<Option<EngineMetrics>, String> {
        match self {
            Reader::Engine(engine) => {
                let Some(choice) = choice else { return Ok(None) };
                let scrape = engine.read(choice, page, values);
                scrape.map(|scrape| Some(scrape.metrics)).map_err(|error| error.to_string())
            }
            Reader::Gpu => {
                let busiest = gpu_utilization(page, pod);
                let share = busiest.ok_or("the page tells no DCGM_FI_DEV_GPU_UTIL of it")?;
                values.push((GPU_UTILIZATION.to_owned(), share));
                Ok(None)
            }
            Reader::Scalars(scalars) => match scalars.read(page, values) {
                Some(name) => Err(format!("the page holds no {name}")),
                None => Ok(None),
            },
        }
    }
}

impl Told {
    /// Numbers by key, with who told them; only where there are any.
    pub fn values<'a>(
        &'a self,
        reader: &'a PageReader,
    ) -> impl Iterator<Item = (&'a Name, &'a [(String, f64)])> {
        let all = reader.readings.iter().zip(&self.by_reading);
        let all = all.map(|((producer, _), by)| (producer, by.values.as_slice()));
        all.filter(|(_, values)| !values.is_empty())
    }
}
